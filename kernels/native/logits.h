// Softmax of logits and its gradient, a band of the vocabulary at a time, without the logits of all tokens. Included like keys.h.
//
// The logits of one band and some tokens lie in the second-level cache, the tokens adjacent, so that maxima and sums over the
// vocabulary are those of vectors. They are products along the contiguous axis, as in grams.h.

constexpr int64_t SOME_TOKENS = 96;  // of a tile; a multiple of all block sizes and of LANES
constexpr float LOG2E = 1.44269504f, LOWEST = -3.40282347e38f;

// `weight`: `rows` tokens of `columns` features; `reference`: the head, `b` rows of them; `norm`: the bias, float32 [b], or null;
// `rowwise`: the target of each token; `a`: rows of the head in a band, a multiple of all block sizes.
template <class T>
struct Logits {
  const Job& job;
  Side<T> tokens, head;

  explicit Logits(const Job& job) : job(job), tokens(inputs<T>(job)), head(output_gradients<T>(job)) { head.features = job.columns; }
  int64_t bands() const { return (job.b + job.a - 1) / job.a; }
  float* out(int64_t row) const { return static_cast<float*>(job.values) + row * job.rows; }

  // of one band and some tokens; entries of a block past either are arbitrary
  struct Tile {
    int64_t first, count, token, n;
    float* logits;  // [v][t]
    float* at(int64_t v, int64_t t) const { return logits + v * SOME_TOKENS + t; }
  };
};

// 2^x for x <= 0, to a unit or two in the last place: the Taylor series of e^(x ln 2) around the nearest integer
INLINE Floats power_of_two(Floats x) {
  constexpr float TERMS[] = {1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f};
  x = greater(spread(-200), x);  // no infinity, whose fraction would be NaN
  Floats whole = nearest(x), fraction = subtract(x, whole), sum = spread(TERMS[0]);
  for (int i = 1; i < 7; ++i) sum = multiply_add(sum, fraction, spread(TERMS[i]));
  return times_power(sum, whole);
}

INLINE Floats exponential(Floats x) { return power_of_two(multiply_add(x, spread(LOG2E), spread(0))); }

template <class T>
inline void multiply_tile(const Logits<T>& given, const typename Logits<T>::Tile& tile) {
  const Job& job = given.job;
  for (int64_t v = 0; v < job.a; ++v) {
    Floats start = spread(job.norm && v < tile.count ? job.norm[tile.first + v] : 0);
    for (int64_t t = 0; t < SOME_TOKENS; t += LANES) store(tile.at(v, t), start);
  }
  for (int64_t k = 0; k < job.columns; k += CHUNK) {
    const int64_t depth = smaller(CHUNK, job.columns - k);
    for (int64_t v = 0; v < tile.count; v += SUM_OUTER) {
      const T* outer[SUM_OUTER];
      pointers(given.head, 0, tile.first, tile.count, v, SUM_OUTER, k, outer);
      for (int64_t t = 0; t < tile.n; t += SUM_INNER) {
        const T* inner[SUM_INNER];
        pointers(given.tokens, 0, tile.token, tile.n, t, SUM_INNER, k, inner);
        Floats sum[SUM_INNER][SUM_OUTER];
        multiply_rows(inner, outer, depth, sum);
        add_up_to(tile.at(v, t), SOME_TOKENS, sum);
      }
    }
  }
}

// `use(band, tile)` for all tokens of the bands handed out.
template <class T, class Use>
INLINE void for_tiles(const Logits<T>& given, char* memory, Chunks& chunks, Use use) {
  const Job& job = given.job;
  int64_t band, end;
  while (chunks.next(band, end))
    for (; band < end; ++band)
      for (int64_t token = 0; token < job.rows; token += SOME_TOKENS) {
        const int64_t first = band * job.a;
        typename Logits<T>::Tile tile{first, smaller(job.a, job.b - first), token, smaller(SOME_TOKENS, job.rows - token),
                                      reinterpret_cast<float*>(memory)};
        multiply_tile(given, tile);
        use(band, tile);
      }
}

// `values`, float32: [bands, 2, rows], the greatest logit and the sum of exponentials relative to it, then the targets' logits, [rows]
template <class T>
inline void token_logprobs(const void* context, char* memory, Chunks& chunks) {
  const Logits<T>& given = *static_cast<const Logits<T>*>(context);
  float* greatest = reinterpret_cast<float*>(memory) + given.job.a * SOME_TOKENS;
  float* total = greatest + SOME_TOKENS;
  for_tiles(given, memory, chunks, [&](int64_t band, const typename Logits<T>::Tile& tile) __attribute__((always_inline)) {
    for (int64_t t = 0; t < tile.n; t += LANES) {
      // not minus infinity: a band that the bias masks altogether must add 0, not NaN
      Floats peak = spread(LOWEST), sum = spread(0);
      for (int64_t v = 0; v < tile.count; ++v) peak = greater(peak, load(tile.at(v, t)));
      for (int64_t v = 0; v < tile.count; ++v) sum = add(sum, exponential(subtract(load(tile.at(v, t)), peak)));
      store(greatest + t, peak);
      store(total + t, sum);
    }
    std::memcpy(given.out(2 * band) + tile.token, greatest, size_t(tile.n) * sizeof(float));
    std::memcpy(given.out(2 * band + 1) + tile.token, total, size_t(tile.n) * sizeof(float));
    for (int64_t t = 0; t < tile.n; ++t) {
      const int64_t target = given.job.rowwise[tile.token + t] - tile.first;
      if (target >= 0 && target < tile.count) given.out(2 * given.bands())[tile.token + t] = *tile.at(target, t);
    }
  });
}

// `mask`, float32 [2, rows]: each token's log of the sum of all exponentials, and its coefficient; `values`, float32 [b, rows]: the
// coefficient times ([the target] - the probability)
template <class T>
inline void logit_gradients(const void* context, char* memory, Chunks& chunks) {
  const Logits<T>& given = *static_cast<const Logits<T>*>(context);
  const float* lse = reinterpret_cast<const float*>(given.job.mask);
  const float* coefficient = lse + given.job.rows;
  for_tiles(given, memory, chunks, [&](int64_t, const typename Logits<T>::Tile& tile) __attribute__((always_inline)) {
    for (int64_t t = 0; t < tile.n; t += LANES) {
      Floats offset = load_some(lse + tile.token + t, tile.n - t), factor = load_some(coefficient + tile.token + t, tile.n - t);
      for (int64_t v = 0; v < tile.count; ++v) {
        Floats probability = exponential(subtract(load(tile.at(v, t)), offset));
        store(tile.at(v, t), multiply_add(factor, subtract(spread(0), probability), spread(0)));
      }
    }
    for (int64_t t = 0; t < tile.n; ++t) {
      const int64_t target = given.job.rowwise[tile.token + t] - tile.first;
      if (target >= 0 && target < tile.count) *tile.at(target, t) += coefficient[tile.token + t];
    }
    for (int64_t v = 0; v < tile.count; ++v)
      std::memcpy(given.out(tile.first + v) + tile.token, tile.at(v, 0), size_t(tile.n) * sizeof(float));
  });
}

template <class T>
inline bool run_logits(Body body, const Job& job) {
  Logits<T> given(job);
  const int64_t scratch = (job.a + 2) * SOME_TOKENS * int64_t{sizeof(float)};
  return parallel(given.bands(), job.a * job.rows * job.columns / LANES, 1, job.threads, scratch, body, &given);
}

template <class T>
inline bool run_product(int op, const Job& job) {
  switch (op) {
    case LOWER_GRAM:
      return run_grams<T>(false, job);
    case GHOST_NORMS:
      return run_grams<T>(true, job);
    case SHARES:
      return run_shares<T>(job);
    case LOGPROBS:
      return run_logits<T>(token_logprobs<T>, job);
    case LOGIT_GRADIENTS:
      return run_logits<T>(logit_gradients<T>, job);
    default:
      return false;
  }
}
