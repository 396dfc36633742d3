// Per-sample inner products of tokens: x x^T, and < x x^T, g g^T > without either matrix in memory. Included like keys.h.
//
// A pair of rows is multiplied along its contiguous axis with one vector of sums in registers: nothing is packed. Only pairs up to
// the diagonal are, in tiles of rows that stay in the second-level cache with a chunk of their columns.

constexpr int64_t CHUNK = 512;

// x and g: `a` samples of `rows` tokens, the tokens weight_row and reference_row apart, the samples weight_column and reference_column;
// `columns` features of x and `b` of g, contiguous. `norm`: the Gram matrices of x, float32, if they are there. `c`: rows of a tile at
// most, a multiple of all block sizes, so that rounding a tile up never leaves fewer of them than `rows` / `c`.
struct Grams {
  const Job& job;
  int64_t height, bands, pairs;  // rows of a tile, a multiple of all block sizes; tiles of a sample's rows; pairs of these

  explicit Grams(const Job& job) : job(job) {
    int64_t count = (job.rows + job.c - 1) / job.c;
    height = round_up((job.rows + count - 1) / count, 12);
    bands = (job.rows + height - 1) / height;
    pairs = bands * (bands + 1) / 2;
  }
};

struct Tile {
  int64_t sample, first, second;  // rows [first, first + rows) against [second, second + columns), second <= first
  int64_t rows, columns, pitch;
  float* values;

  Tile(const Grams& grams, int64_t item, float* values) : pitch(grams.height), values(values) {
    int64_t band = 0, pair = item % grams.pairs;
    for (; pair > band; ++band) pair -= band + 1;
    sample = item / grams.pairs;
    first = band * pitch;
    second = pair * pitch;
    rows = smaller(pitch, grams.job.rows - first);
    columns = smaller(pitch, grams.job.rows - second);
  }
};

template <class T>
INLINE void pointers(const Side<T>& side, int64_t sample, int64_t first, int64_t count, int64_t start, int64_t blocks, int64_t k,
                     const T** out) {
  // rows past the last one are the last one again; what comes of them is not used
  for (int64_t i = 0; i < blocks; ++i) out[i] = side.at(sample, first + smaller(start + i, count - 1)) + k;
}

template <class T>
INLINE void multiply_rows(const T* const* inner, const T* const* outer, int64_t n, Floats (&sum)[SUM_INNER][SUM_OUTER]) {
  using F = Factors<T>;
  constexpr int64_t COUNT = LANES * F::TOGETHER;
  for (auto& row : sum)
    for (Floats& one : row) one = spread(0);
  int64_t k = 0;
  for (; k + COUNT <= n; k += COUNT) {
    F x[SUM_INNER];
    for (int64_t i = 0; i < SUM_INNER; ++i) x[i] = F::at(inner[i] + k);
    for (int64_t j = 0; j < SUM_OUTER; ++j) {
      F y = F::at(outer[j] + k);
      for (int64_t i = 0; i < SUM_INNER; ++i) sum[i][j] = multiply_add(x[i], y, sum[i][j]);
    }
  }
  if (k == n) return;
  for (int64_t j = 0; j < SUM_OUTER; ++j) {
    F y = F::some(outer[j] + k, n - k);
    for (int64_t i = 0; i < SUM_INNER; ++i) sum[i][j] = multiply_add(F::some(inner[i] + k, n - k), y, sum[i][j]);
  }
}

// `use(row, column, sums)` for every block of the tile up to the diagonal, for one chunk of the features after the other.
template <class T, class Use>
INLINE void for_blocks(const Tile& tile, const Side<T>& side, Use use) {
  for (int64_t k = 0; k < side.features; k += CHUNK) {
    int64_t n = smaller(CHUNK, side.features - k);
    for (int64_t i = 0; i < tile.rows; i += SUM_OUTER) {
      const T* outer[SUM_OUTER];
      pointers(side, tile.sample, tile.first, tile.rows, i, SUM_OUTER, k, outer);
      int64_t stop = tile.first == tile.second ? smaller(tile.columns, i + SUM_OUTER) : tile.columns;
      for (int64_t j = 0; j < stop; j += SUM_INNER) {
        const T* inner[SUM_INNER];
        pointers(side, tile.sample, tile.second, tile.columns, j, SUM_INNER, k, inner);
        Floats sum[SUM_INNER][SUM_OUTER];
        multiply_rows(inner, outer, n, sum);
        use(i, j, sum);
      }
    }
  }
}

template <class T>
inline void make_gram(const Tile& tile, const Side<T>& side) {
  std::memset(tile.values, 0, size_t(tile.pitch * tile.pitch) * sizeof(float));
  for_blocks(tile, side, [&](int64_t i, int64_t j, const Floats(&sum)[SUM_INNER][SUM_OUTER]) __attribute__((always_inline)) {
    add_up_to(tile.values + i * tile.pitch + j, tile.pitch, sum);
  });
}

template <class T>
inline void lower_gram(const void* context, char* memory, Chunks& chunks) {
  const Grams& grams = *static_cast<const Grams*>(context);
  const Job& job = grams.job;
  int64_t begin, end;
  while (chunks.next(begin, end))
    for (; begin < end; ++begin) {
      Tile tile(grams, begin, reinterpret_cast<float*>(memory));
      make_gram(tile, inputs<T>(job));
      float* out = static_cast<float*>(job.values) + tile.sample * job.rows * job.rows;
      for (int64_t i = 0; i < tile.rows; ++i) {
        int64_t row = tile.first + i, count = smaller(tile.columns, row + 1 - tile.second);
        std::memcpy(out + row * job.rows + tile.second, tile.values + i * tile.pitch, size_t(count) * sizeof(float));
      }
    }
}

// What lies left of the diagonal counts twice, for its mirror image, and what is above it or no token's not at all.
inline void weigh(const Tile& tile) {
  for (int64_t i = 0; i < tile.pitch; ++i) {
    float* row = tile.values + i * tile.pitch;
    const int64_t diagonal = tile.first + i - tile.second;
    const int64_t twice = i < tile.rows ? smaller(diagonal, tile.columns) : 0;
    for (int64_t j = 0; j < twice; ++j) row[j] *= 2;
    const int64_t used = i < tile.rows && diagonal < tile.columns ? twice + 1 : twice;
    for (int64_t j = used; j < tile.pitch; ++j) row[j] = 0;
  }
}

template <class T>
inline void ghost_norms(const void* context, char* memory, Chunks& chunks) {
  const Grams& grams = *static_cast<const Grams*>(context);
  const Job& job = grams.job;
  int64_t begin, end;
  while (chunks.next(begin, end))
    for (; begin < end; ++begin) {
      Tile tile(grams, begin, reinterpret_cast<float*>(memory));
      if (job.norm) {
        const float* gram = job.norm + tile.sample * job.rows * job.rows;
        for (int64_t i = 0; i < tile.rows; ++i)
          std::memcpy(tile.values + i * tile.pitch, gram + (tile.first + i) * job.rows + tile.second,
                      size_t(tile.columns) * sizeof(float));
      } else {
        make_gram(tile, inputs<T>(job));
      }
      weigh(tile);
      double total = 0;
      for_blocks(tile, output_gradients<T>(job), [&](int64_t i, int64_t j, const Floats(&sum)[SUM_INNER][SUM_OUTER]) __attribute__((always_inline)) {
        Floats part = spread(0);
        for (int64_t r = 0; r < SUM_OUTER; ++r)
          for (int64_t c = 0; c < SUM_INNER; ++c)
            part = multiply_add(spread(tile.values[(i + r) * tile.pitch + j + c]), sum[c][r], part);
        total += double(add_up(part));
      });
      static_cast<double*>(job.values)[begin] = total;
    }
}

template <class T>
inline bool run_grams(bool ghost, const Job& job) {
  Grams grams(job);
  int64_t scratch = grams.height * grams.height * int64_t{sizeof(float)};
  int64_t work = grams.height * grams.height * ((job.norm ? 0 : job.columns) + (ghost ? job.b : 0)) / LANES;
  return parallel(job.a * grams.pairs, work, 1, job.threads, scratch, ghost ? ghost_norms<T> : lower_gram<T>, &grams);
}
