// Softmax of logits, a band of the vocabulary at a time, without the logits of all tokens. Included like keys.h.
//
// The logits of one band and some tokens lie in the second-level cache, the tokens adjacent, so that maxima and sums over the
// vocabulary are those of vectors. They are products along the contiguous axis, as in grams.h.

constexpr int64_t SOME_TOKENS = 96;  // of a tile; a multiple of all block sizes and of LANES
constexpr float LOG2E = 1.44269504f, LOWEST = -3.40282347e38f;

// `weight`: `rows` tokens of `columns` features; `reference`: the head, `b` rows of them; `norm`: the bias, float32 [b], or null;
// `rowwise`: the target of each token; `a`: rows of the head in a band, a multiple of all block sizes. `values`, float32:
// [bands, 2, rows], the greatest logit and the sum of exponentials relative to it, then the logits of the targets, [rows].
template <class T>
struct Logprobs {
  const Job& job;
  Side<T> tokens, head;

  explicit Logprobs(const Job& job) : job(job), tokens(inputs<T>(job)), head(output_gradients<T>(job)) { head.features = job.columns; }
  int64_t bands() const { return (job.b + job.a - 1) / job.a; }
  float* out(int64_t row) const { return static_cast<float*>(job.values) + row * job.rows; }
};

// 2^x for x <= 0, to a unit or two in the last place: the Taylor series of e^(x ln 2) around the nearest integer
INLINE Floats power_of_two(Floats x) {
  constexpr float TERMS[] = {1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f};
  x = greater(spread(-200), x);  // no infinity, whose fraction would be NaN
  Floats whole = nearest(x), fraction = subtract(x, whole), sum = spread(TERMS[0]);
  for (int i = 1; i < 7; ++i) sum = multiply_add(sum, fraction, spread(TERMS[i]));
  return times_power(sum, whole);
}

// logits[v][t] of `n` tokens and `count` rows of the head; entries of a block past either are arbitrary
template <class T>
inline void make_logits(const Logprobs<T>& given, int64_t token, int64_t n, int64_t first, int64_t count, float* logits) {
  const Job& job = given.job;
  for (int64_t v = 0; v < job.a; ++v) {
    Floats start = spread(job.norm && v < count ? job.norm[first + v] : 0);
    for (int64_t t = 0; t < SOME_TOKENS; t += LANES) store(logits + v * SOME_TOKENS + t, start);
  }
  for (int64_t k = 0; k < job.columns; k += CHUNK) {
    const int64_t depth = smaller(CHUNK, job.columns - k);
    for (int64_t v = 0; v < count; v += SUM_OUTER) {
      const T* outer[SUM_OUTER];
      pointers(given.head, 0, first, count, v, SUM_OUTER, k, outer);
      for (int64_t t = 0; t < n; t += SUM_INNER) {
        const T* inner[SUM_INNER];
        pointers(given.tokens, 0, token, n, t, SUM_INNER, k, inner);
        Floats sum[SUM_INNER][SUM_OUTER];
        multiply_rows(inner, outer, depth, sum);
        add_up_to(logits + v * SOME_TOKENS + t, SOME_TOKENS, sum);
      }
    }
  }
}

template <class T>
inline void token_logprobs(const void* context, char* memory, Chunks& chunks) {
  const Logprobs<T>& given = *static_cast<const Logprobs<T>*>(context);
  const Job& job = given.job;
  float* logits = reinterpret_cast<float*>(memory);
  float* greatest = logits + job.a * SOME_TOKENS;
  float* total = greatest + SOME_TOKENS;
  int64_t band, end;
  while (chunks.next(band, end))
    for (; band < end; ++band) {
      const int64_t first = band * job.a, count = smaller(job.a, job.b - first);
      for (int64_t token = 0; token < job.rows; token += SOME_TOKENS) {
        const int64_t n = smaller(SOME_TOKENS, job.rows - token);
        make_logits(given, token, n, first, count, logits);
        for (int64_t t = 0; t < n; t += LANES) {
          // not minus infinity: a band that the bias masks altogether must add 0, not NaN
          Floats peak = spread(LOWEST), sum = spread(0);
          for (int64_t v = 0; v < count; ++v) peak = greater(peak, load(logits + v * SOME_TOKENS + t));
          for (int64_t v = 0; v < count; ++v) {
            Floats above = subtract(load(logits + v * SOME_TOKENS + t), peak);
            sum = add(sum, power_of_two(multiply_add(above, spread(LOG2E), spread(0))));
          }
          store(greatest + t, peak);
          store(total + t, sum);
        }
        std::memcpy(given.out(2 * band) + token, greatest, size_t(n) * sizeof(float));
        std::memcpy(given.out(2 * band + 1) + token, total, size_t(n) * sizeof(float));
        for (int64_t t = 0; t < n; ++t) {
          const int64_t target = job.rowwise[token + t] - first;
          if (target >= 0 && target < count) given.out(2 * given.bands())[token + t] = logits[target * SOME_TOKENS + t];
        }
      }
    }
}

template <class T>
inline bool run_logprobs(const Job& job) {
  Logprobs<T> given(job);
  const int64_t scratch = (job.a + 2) * SOME_TOKENS * int64_t{sizeof(float)};
  return parallel(given.bands(), job.a * job.rows * job.columns / LANES, 1, job.threads, scratch, token_logprobs<T>, &given);
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
      return run_logprobs<T>(job);
    default:
      return false;
  }
}
