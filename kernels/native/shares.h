// Each sample's share g^T x of a gradient: its square, and the sum over the samples. Included like keys.h.
//
// A tile of the gradient stays in the second-level cache while one sample after the other is added to it. The tokens are packed, STEP
// words at a time, into panels of few features, so that a block of sums in registers reads both sides in order; a share's sums are squared
// where they are, on their way to the tile.

constexpr int64_t STEP = 192;
constexpr int64_t WIDE = 2 * LANES;                   // features of a panel of one side; of the other they are SHARE_ROWS
constexpr int64_t TALL = 4, TALLEST = 16, BROAD = 12;  // panels of a tile: of the other side at least and at most, of this at most

// x and g as in grams.h; `values`: the gradient [b, columns], float32, or null; `rowwise`: the squares, double [a].
template <class T>
struct Shares {
  const Job& job;
  Side<T> narrow, wide;
  int64_t height, width;  // features of a tile
  int64_t rows, columns;  // tiles
  double* squares;        // [tiles, a]

  explicit Shares(const Job& job) : job(job) {
    narrow = output_gradients<T>(job);
    wide = inputs<T>(job);
    if (is_transposed()) std::swap(narrow, wide);
    // whatever the number of threads: some tiles for each of many, but none so small that packing shows
    height = larger(TALL, smaller(TALLEST, (narrow.features / 4 + SHARE_ROWS - 1) / SHARE_ROWS)) * SHARE_ROWS;
    width = larger(2, smaller(BROAD, (wide.features / 4 + WIDE - 1) / WIDE)) * WIDE;
    rows = (narrow.features + height - 1) / height;
    columns = (wide.features + width - 1) / width;
  }

  // a panel of the wide side should be full
  bool is_transposed() const { return job.columns < WIDE && job.b > job.columns; }
  static constexpr int64_t TOKENS = STEP * Factors<T>::TOGETHER;  // of a step
  int64_t steps() const { return (job.rows + TOKENS - 1) / TOKENS; }
  int64_t scratch() const { return (height * width * (steps() > 1 ? 2 : 1) + (height + width) * STEP) * int64_t{sizeof(float)}; }
};

// `n` tokens of `count` features as words [.., pitch], zeros behind each token's. Up to LANES - 1 words are written behind the last.
template <class T>
inline void pack(const T* from, int64_t row, int64_t n, int64_t count, int64_t pitch, float* to) {
  constexpr int64_t TOGETHER = Factors<T>::TOGETHER;
  for (int64_t t = 0; t < n; t += TOGETHER, from += TOGETHER * row, to += pitch)
    for (int64_t i = 0; i < pitch; i += LANES) store(to + i, Factors<T>::words(from + i, row, n - t, larger(0, count - i)));
}

// A block of sums over tokens, and what becomes of it.
struct Block {
  const float *narrow, *wide;  // words [n, the block's rows], [n, WIDE]
  int64_t n;
  float *earlier, *later;  // sums over the tokens before, or null; where they are kept for those to come, or null where these are the last
  float* total;            // the tile's block, or null where it is not wanted
  bool is_first;           // sample of the total
};

template <class T, int64_t R>
INLINE float add_block_of(const Block& block) {
  Floats sum[R][2];
  for (int64_t r = 0; r < R; ++r)
    for (int64_t v = 0; v < 2; ++v) sum[r][v] = spread(0);
  const float *a = block.narrow, *b = block.wide;
  for (int64_t t = 0; t < block.n; ++t, a += R, b += WIDE) {
    auto x = Factors<T>::packed(b), y = Factors<T>::packed(b + LANES);
    for (int64_t r = 0; r < R; ++r) {
      auto one = Factors<T>::repeated(a[r]);
      sum[r][0] = multiply_add(one, x, sum[r][0]);
      sum[r][1] = multiply_add(one, y, sum[r][1]);
    }
  }
  Floats square[2] = {spread(0), spread(0)};
  for (int64_t r = 0; r < R; ++r)
    for (int64_t v = 0; v < 2; ++v) {
      int64_t place = r * WIDE + v * LANES;
      // added now, not the start of these sums: rounding then grows with the tokens of a step and the steps, not with all tokens
      if (block.earlier) sum[r][v] = add(load(block.earlier + place), sum[r][v]);
      if (block.later) {
        store(block.later + place, sum[r][v]);
        continue;
      }
      square[v] = multiply_add(sum[r][v], sum[r][v], square[v]);
      if (block.total) store(block.total + place, block.is_first ? sum[r][v] : add(load(block.total + place), sum[r][v]));
    }
  return add_up(square[0]) + add_up(square[1]);
}

// How many rows of sums are worth having for so many features of the narrow side.
INLINE int64_t rows_for(int64_t features) { return features >= SHARE_ROWS ? SHARE_ROWS : round_up(features, 2); }

template <class T, int64_t R>
INLINE float add_block(int64_t rows, const Block& block) {
  if constexpr (R > 2)
    if (rows < R) return add_block<T, R - 2>(rows, block);
  return add_block_of<T, R>(block);
}

template <class T>
inline void give_tile(const Shares<T>& shares, const float* tile, int64_t top, int64_t left, int64_t height, int64_t width) {
  const int64_t pitch = shares.job.columns;
  float* gradient = static_cast<float*>(shares.job.values);
  for (int64_t i = 0; i < height; i += SHARE_ROWS)
    for (int64_t j = 0; j < width; j += WIDE) {
      const float* block = tile + i * shares.width + j * SHARE_ROWS;
      const int64_t rows = smaller(SHARE_ROWS, height - i), columns = smaller(WIDE, width - j);
      if (shares.is_transposed()) {
        for (int64_t c = 0; c < columns; ++c)
          for (int64_t r = 0; r < rows; ++r) gradient[(left + j + c) * pitch + top + i + r] = block[r * WIDE + c];
      } else {
        for (int64_t r = 0; r < rows; ++r)
          std::memcpy(gradient + (top + i + r) * pitch + left + j, block + r * WIDE, size_t(columns) * sizeof(float));
      }
    }
}

template <class T>
inline void share_tile(const Shares<T>& shares, int64_t item, float* memory) {
  const Job& job = shares.job;
  const int64_t top = item / shares.columns * shares.height, left = item % shares.columns * shares.width;
  const int64_t height = smaller(shares.height, shares.narrow.features - top), width = smaller(shares.width, shares.wide.features - left);
  float* narrow = memory;
  float* wide = narrow + shares.height * STEP;
  float* tile = wide + shares.width * STEP;
  float* partial = tile + shares.height * shares.width;
  const int64_t steps = shares.steps();
  for (int64_t sample = 0; sample < job.a; ++sample) {
    double square = 0;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t first = step * shares.TOKENS, n = smaller(shares.TOKENS, job.rows - first);
      const T *a = shares.narrow.at(sample, first) + top, *b = shares.wide.at(sample, first) + left;
      for (int64_t i = 0; i < height; i += SHARE_ROWS)
        pack(a + i, shares.narrow.row, n, smaller(SHARE_ROWS, height - i), rows_for(height - i), narrow + i * STEP);
      for (int64_t j = 0; j < width; j += WIDE) pack(b + j, shares.wide.row, n, smaller(WIDE, width - j), WIDE, wide + j * STEP);
      for (int64_t j = 0; j < width; j += WIDE)
        for (int64_t i = 0; i < height; i += SHARE_ROWS) {
          const int64_t place = i * shares.width + j * SHARE_ROWS;
          Block block{narrow + i * STEP,
                      wide + j * STEP,
                      (n + Factors<T>::TOGETHER - 1) / Factors<T>::TOGETHER,
                      step ? partial + place : nullptr,
                      step + 1 < steps ? partial + place : nullptr,
                      job.values ? tile + place : nullptr,
                      sample == 0};
          float found = add_block<T, SHARE_ROWS>(rows_for(height - i), block);
          if (!block.later) square += double(found);
        }
    }
    shares.squares[item * job.a + sample] = square;
  }
  if (job.values) give_tile(shares, tile, top, left, height, width);
}

template <class T>
inline void share_tiles(const void* context, char* memory, Chunks& chunks) {
  int64_t begin, end;
  while (chunks.next(begin, end))
    for (; begin < end; ++begin) share_tile(*static_cast<const Shares<T>*>(context), begin, reinterpret_cast<float*>(memory));
}

template <class T>
inline bool run_shares(const Job& job) {
  Shares<T> shares(job);
  const int64_t tiles = shares.rows * shares.columns;
  shares.squares = static_cast<double*>(std::malloc(size_t(tiles * job.a) * sizeof(double)));
  if (!shares.squares) return false;
  int64_t work = job.a * job.rows * smaller(shares.height, shares.narrow.features) * shares.width / LANES;
  bool done = parallel(tiles, work, 1, job.threads, shares.scratch(), share_tiles<T>, &shares);
  double* squares = reinterpret_cast<double*>(job.rowwise);
  for (int64_t sample = 0; done && sample < job.a; ++sample) {
    squares[sample] = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) squares[sample] += shares.squares[tile * job.a + sample];
  }
  std::free(shares.squares);
  return done;
}
