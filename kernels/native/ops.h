// The ops over rows, written once and compiled for every instruction set: included inside a namespace that already has
// keys64, compare64, collect64 and put64. No lambdas here: they would lose the namespace's target.

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The keys of `columns` weights, padded to a multiple of BLOCK with keys above every finite one.
template <class T>
inline Summary make_keys(const T* w, const T* r, const float* norm, int64_t columns, int32_t* key) {
  Stats stats;
  reset(stats);
  int64_t whole = columns / BLOCK * BLOCK;
  if (r) {
    for (int64_t i = 0; i < whole; i += BLOCK) keys64(w + i, r + i, norm + i, key + i, stats);
  } else {
    for (int64_t i = 0; i < whole; i += BLOCK) keys64(w + i, static_cast<const T*>(nullptr), norm + i, key + i, stats);
  }
  int64_t rest = columns - whole;
  if (rest) {
    T some_w[BLOCK] = {}, some_r[BLOCK] = {};
    float some_norm[BLOCK] = {};
    std::memcpy(static_cast<void*>(some_w), w + whole, size_t(rest) * sizeof(T));
    if (r) std::memcpy(static_cast<void*>(some_r), r + whole, size_t(rest) * sizeof(T));
    std::memcpy(some_norm, norm + whole, size_t(rest) * sizeof(float));
    keys64(static_cast<const T*>(some_w), static_cast<const T*>(some_r), static_cast<const float*>(some_norm), key + whole,
           stats);
    for (int64_t i = rest; i < BLOCK; ++i) key[whole + i] = PADDING;
  }
  Summary summary = finish(stats);
  if (rest) summary.zeros -= BLOCK - rest;
  return summary;
}

template <class T>
struct BitsOf {
  using type = uint16_t;
};
template <>
struct BitsOf<float> {
  using type = uint32_t;
};

// The largest magnitude of n weights; NaN or infinity if one of them is.
template <class T>
inline float peak(const T* w, int64_t n) {
  using Bits = typename BitsOf<T>::type;
  Bits top = 0;
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, static_cast<const void*>(w + i), sizeof bits);
    bits = Bits(bits & (Bits(~Bits(0)) >> 1));
    top = bits > top ? bits : top;
  }
  T value;
  std::memcpy(static_cast<void*>(&value), &top, sizeof top);
  return widen(value);
}

// Of `columns` keys: how many lie below `value` (returned) and how many equal it.
inline int64_t count(const int32_t* key, int64_t columns, int32_t value, int64_t& equal) {
  int64_t below = 0;
  equal = 0;
  for (int64_t i = 0; i < columns; i += BLOCK) {
    uint64_t less, same;
    compare64(key + i, value, less, same);
    below += __builtin_popcountll(less);
    equal += __builtin_popcountll(same);
  }
  return below;
}

// Copies the keys in [low, high) to `out` and pads them; returns how many, and how many lie below.
inline int64_t collect(const int32_t* key, int64_t columns, int32_t low, int32_t high, int32_t* out, int64_t& below) {
  int32_t* end = out;
  below = 0;
  uint32_t width = uint32_t(high) - uint32_t(low);
  for (int64_t i = 0; i < columns; i += BLOCK) end = collect64(key + i, low, width, end, below);
  for (int64_t i = 0; i < BLOCK; ++i) end[i] = PADDING;
  return end - out;
}

// Bits of the removed columns: those below `value` and the first `quota` ones equal to it, or all the others.
inline void mark(const int32_t* key, int64_t columns, int32_t value, int64_t& quota, bool invert, uint8_t* bits) {
  for (int64_t i = 0; i < columns; i += BLOCK) {
    uint64_t low, tie;
    compare64(key + i, value, low, tie);
    if (tie) {
      int64_t ties = __builtin_popcountll(tie);
      for (; ties > quota; --ties) tie &= ~(uint64_t{1} << (63 - __builtin_clzll(tie)));
      quota -= ties;
      low |= tie;
    }
    if (invert) low = ~low;
    int64_t rest = columns - i;
    if (rest < BLOCK) low &= (uint64_t{1} << rest) - 1;
    std::memcpy(bits + i / 8, &low, size_t(smaller(8, (rest + 7) / 8)));
  }
}

INLINE uint64_t load_bits(const uint8_t* bits, int64_t columns) {
  uint64_t word = 0;
  if (columns >= BLOCK) {
    std::memcpy(&word, bits, 8);
  } else {
    std::memcpy(&word, bits, size_t((columns + 7) / 8));
    word &= (uint64_t{1} << columns) - 1;
  }
  return word;
}

// The marked weights of a row become the reference's, or zero.
template <class T>
inline void put(T* w, const T* r, const uint8_t* bits, int64_t columns) {
  int64_t whole = columns / BLOCK * BLOCK;
  for (int64_t i = 0; i < whole; i += BLOCK) {
    uint64_t word;
    std::memcpy(&word, bits + i / 8, 8);
    if (word) put64(w + i, r ? r + i : nullptr, word);
  }
  if (whole < columns) {
    uint64_t word = load_bits(bits + whole / 8, columns - whole);
    for (; word; word &= word - 1) {
      int64_t j = whole + __builtin_ctzll(word);
      w[j] = r ? r[j] : T{};
    }
  }
}

// The smallest `key` with at least `count` keys at or below it, and how many keys equal to it are among the lowest `count`.
struct Cut {
  int32_t key;
  int64_t quota;
};

// The k-th smallest of `m` padded keys, by trying each of them.
inline Cut nth_of_few(const int32_t* key, int64_t m, int64_t k) {
  for (int64_t i = 0; i < m; ++i) {
    int64_t equal, below = count(key, m, key[i], equal);
    if (below < k && k <= below + equal) return {key[i], k - below};
  }
  return {FINITE, 0};
}

// Where the threshold is expected: it moves little from row to row, once divided by the row's mean score.
struct Guess {
  float scaled = 0;     // threshold over mean score of the last row
  float error = 0.01f;  // running mean of the relative miss
};

// The k-th smallest (1 <= k <= m) of `m` padded keys. All lie in [low, high) where `inside`. `one` and `two` hold m + 128 keys
// each; `from` may be `one`. Every step keeps only a bracket that is known to hold the answer, whatever it was guessed from.
inline Cut nth(const int32_t* from, int64_t m, int64_t k, int32_t low, int32_t high, bool smooth, int32_t* one, int32_t* two) {
  int64_t size = m;
  for (int round = 0; size > 64; ++round) {
    if (high - low == 1) return {low, k};
    int32_t x, y;
    double p = (double(k) - 0.5) / double(size);
    if (round >= 12) {  // values chosen to defeat the samples: halve the range of bits
      x = low;
      y = low + (high - low) / 2;
    } else if (smooth) {
      double width = double(high) - double(low);
      double half = 2.0 * std::sqrt(double(size) * p * (1 - p)) + 2.0;
      double left = std::floor(width * (p - half / double(size)));
      double right = std::ceil(width * (p + half / double(size)));
      x = left > 0 ? low + int32_t(left) : low;
      y = right < width ? low + int32_t(right) : high;
      if (y <= x) y = x + 1;
    } else {
      alignas(64) int32_t sample[BLOCK];
      for (int64_t i = 0; i < BLOCK; ++i) sample[i] = from[i * size / BLOCK];
      int64_t middle = int64_t(p * 64) + 1;
      int64_t reach = int64_t(16.0 * std::sqrt(p * (1 - p))) + 2;
      int64_t first = middle - reach, last = middle + reach;
      x = first < 1 ? low : nth_of_few(sample, BLOCK, first).key;
      y = last > 64 ? high : nth_of_few(sample, BLOCK, last).key + 1;
    }
    int32_t* to = from == one ? two : one;
    int64_t below, found = collect(from, size, x, y, to, below);
    int64_t before = size;
    if (k <= below) {
      high = x;
      found = collect(from, size, low, high, to, below);
      smooth = false;
    } else if (k > below + found) {
      k -= below + found;
      low = y;
      found = collect(from, size, low, high, to, below);
      smooth = false;
    } else {
      k -= below;
      low = x;
      high = y;
    }
    from = to;
    size = found;
    if (size > before / 2) smooth = false;
  }
  return nth_of_few(from, size, k);
}

// Exact whatever the guess is: a bracket that misses only costs time.
inline Cut select(const int32_t* key, int64_t columns, int64_t k, const Summary& summary, Guess& guess, int32_t* one,
                  int32_t* two) {
  if (k <= 0) return {0, 0};
  if (k >= columns) return {FINITE, 0};
  if (k <= summary.zeros) return {0, k};
  if (columns <= 64) return nth_of_few(key, columns, k);
  float mean = summary.sum / float(columns);
  float centre = guess.scaled * mean;
  Cut cut;
  bool done = false;
  if (centre > 0 && centre < 1e38f) {
    float half = 5 * guess.error;
    if (half > 0.25f) half = 0.25f;
    int32_t low = int32_t(to_bits(centre * (1 - half))), high = int32_t(to_bits(centre * (1 + half))) + 1;
    if (low < 1) low = 1;
    int64_t below, inside = collect(key, columns, low, high, one, below);
    if (below < k && k <= below + inside) {
      cut = nth(one, inside, k - below, low, high, inside * 4 < columns, one, two);
      done = true;
    }
  }
  if (!done) cut = nth(key, columns, k, 0, FINITE, false, one, two);
  float threshold = from_bits(uint32_t(cut.key));
  if (centre > 0 && centre < 1e38f) {
    float miss = std::fabs(threshold / centre - 1);
    if (!(miss < 0.25f)) miss = 0.25f;
    guess.error += (miss - guess.error) * 0.125f;
    if (guess.error < 1e-6f) guess.error = 1e-6f;
  }
  guess.scaled = mean > 0 && mean < 1e38f ? threshold / mean : 0;
  return cut;
}

// Each op is `scratch` bytes a thread needs, and a body that works through chunks of rows.
template <class T>
struct Ops {
  struct Band {
    Rows<T> weight, reference;
    int64_t together;

    static int64_t scratch(const Job& job) { return 2 * Rows<T>::scratch(job.columns); }

    Band(const Job& job, char*& memory)
        : weight(job.weight, job.weight_row, job.weight_column, job.columns, memory),
          reference(job.reference, job.reference_row, job.reference_column, job.columns,
                    memory + Rows<T>::scratch(job.columns)),
          together(Rows<T>::together(job.columns)) {
      memory += scratch(job);
    }

    int64_t load(int64_t begin, int64_t end) {
      end = smaller(end, begin + together);
      weight.load(begin, end);
      reference.load(begin, end);
      return end;
    }
  };

  static int64_t padded(const Job& job) { return round_up(job.columns, BLOCK) + 2 * BLOCK; }

  static int64_t prune_rows_scratch(const Job& job) { return Band::scratch(job) + 13 * padded(job); }

  static void prune_rows(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    int64_t columns = job.columns, bytes = (columns + 7) / 8;
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    int32_t* one = key + padded(job);
    int32_t* two = one + padded(job);
    uint8_t* own = reinterpret_cast<uint8_t*>(two + padded(job));
    Guess guess;
    int64_t refused = 0, begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        int64_t first = row, last = band.load(row, end);
        for (; row < last; ++row) {
          uint8_t* bits = job.mask ? job.mask + row * bytes : own;
          T* w = band.weight.at(row);
          const T* r = band.reference.at(row);
          Summary summary = make_keys<T>(w, r, job.norm, columns, key);
          if (summary.top >= FINITE) {
            ++refused;
            if (job.mask) std::memset(bits, 0, size_t(bytes));
            continue;
          }
          Cut cut = select(key, columns, job.a, summary, guess, one, two);
          mark(key, columns, cut.key, cut.quota, job.invert, bits);
          if (!job.mask) put<T>(w, r, bits, columns);
        }
        if (!job.mask) band.weight.save(first, last);
      }
    }
    __atomic_fetch_add(static_cast<int64_t*>(job.values), refused, __ATOMIC_RELAXED);
  }

  static int64_t span_scratch(const Job& job) { return Band::scratch(job) + 9 * (SPAN + 2 * BLOCK); }

  static void nonfinite(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    float longest = peak(job.norm, job.columns);
    int64_t total = 0, begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        for (int64_t last = band.load(row, end); row < last; ++row) {
          const T *w = band.weight.at(row), *r = band.reference.at(row);
          // rounding keeps order, so no score of the row exceeds this product: cheaper than the scores themselves
          if (!r && std::isfinite(peak(w, job.columns) * longest)) continue;
          for (int64_t i = 0; i < job.columns; i += SPAN) {
            int64_t n = smaller(SPAN, job.columns - i), equal;
            if (make_keys<T>(w + i, r ? r + i : nullptr, job.norm + i, n, key).top >= FINITE)
              total += n - count(key, n, FINITE, equal);
          }
        }
      }
    }
    __atomic_fetch_add(static_cast<int64_t*>(job.values), total, __ATOMIC_RELAXED);
  }

  static void tie_counts(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        for (int64_t last = band.load(row, end); row < last; ++row) {
          const T *w = band.weight.at(row), *r = band.reference.at(row);
          int64_t total = 0;
          for (int64_t i = 0; i < job.columns; i += SPAN) {
            int64_t n = smaller(SPAN, job.columns - i), equal;
            make_keys<T>(w + i, r ? r + i : nullptr, job.norm + i, n, key);
            count(key, n, int32_t(job.a), equal);
            total += equal;
          }
          job.rowwise[row] = total;
        }
      }
    }
  }

  static int64_t histogram_scratch(const Job& job) { return span_scratch(job) + 4 * (SPAN + 2 * BLOCK) + 8 * (job.c + 3); }

  // a = low, b = shift, c = bins
  static void score_histogram(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    int32_t* inside = key + SPAN + BLOCK;
    int64_t* bins = reinterpret_cast<int64_t*>(inside + SPAN + 3 * BLOCK);
    std::memset(bins, 0, size_t(job.c + 3) * 8);
    int64_t low = job.a < 0 ? 0 : smaller(job.a, FINITE);
    int64_t high = job.b >= 31 ? int64_t{FINITE} : smaller(job.a + (job.c << job.b), FINITE);
    if (high < low) high = low;
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        for (int64_t last = band.load(row, end); row < last; ++row) {
          const T *w = band.weight.at(row), *r = band.reference.at(row);
          for (int64_t i = 0; i < job.columns; i += SPAN) {
            int64_t n = smaller(SPAN, job.columns - i), equal, below, strange = 0;
            Summary summary = make_keys<T>(w + i, r ? r + i : nullptr, job.norm + i, n, key);
            if (summary.top >= FINITE) strange = n - count(key, n, FINITE, equal);
            int64_t found = collect(key, n, int32_t(low), int32_t(high), inside, below);
            bins[0] += below;
            bins[job.c + 1] += n - below - found - strange;
            bins[job.c + 2] += strange;
            for (int64_t j = 0; j < found; ++j) ++bins[1 + ((inside[j] - job.a) >> job.b)];
          }
        }
      }
    }
    int64_t* out = static_cast<int64_t*>(job.values);
    for (int64_t i = 0; i < job.c + 3; ++i)
      if (bins[i]) __atomic_fetch_add(out + i, bins[i], __ATOMIC_RELAXED);
  }

  // a = key, rowwise = quota
  static void cut(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    int64_t bytes = (job.columns + 7) / 8;
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    uint8_t* own = reinterpret_cast<uint8_t*>(key + SPAN + 2 * BLOCK);
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        int64_t first = row, last = band.load(row, end);
        for (; row < last; ++row) {
          T* w = band.weight.at(row);
          const T* r = band.reference.at(row);
          int64_t quota = job.rowwise[row];
          for (int64_t i = 0; i < job.columns; i += SPAN) {
            int64_t n = smaller(SPAN, job.columns - i);
            uint8_t* bits = job.mask ? job.mask + row * bytes + i / 8 : own;
            make_keys<T>(w + i, r ? r + i : nullptr, job.norm + i, n, key);
            mark(key, n, int32_t(job.a), quota, job.invert, bits);
            if (!job.mask) put<T>(w + i, r ? r + i : nullptr, bits, n);
          }
        }
        if (!job.mask) band.weight.save(first, last);
      }
    }
  }

  // n:4 for finite keys: the six comparisons of four neighbours, for many groups at once
  static void mark_fours(const int32_t* key, int64_t groups, int n, bool invert, uint8_t* four, uint8_t* bits) {
    const int flip = invert ? 15 : 0;
    for (int64_t g = 0; g < groups; ++g) {
      int32_t a = key[4 * g], b = key[4 * g + 1], c = key[4 * g + 2], d = key[4 * g + 3];
      int ba = b < a, ca = c < a, da = d < a, cb = c < b, db = d < b, dc = d < c;
      int low = (ba + ca + da < n) | (1 - ba + cb + db < n) << 1 | (2 - ca - cb + dc < n) << 2 | (3 - da - db - dc < n) << 3;
      four[g] = uint8_t(low ^ flip);
    }
    for (int64_t i = 0; i < groups / 2; ++i) bits[i] = uint8_t(four[2 * i] | four[2 * i + 1] << 4);
    if (groups % 2) bits[groups / 2] = four[groups - 1];
  }

  static int64_t groups_scratch(const Job& job) { return Band::scratch(job) + 5 * padded(job); }

  // a = n, b = m
  static void prune_groups(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    int64_t columns = job.columns, bytes = (columns + 7) / 8, n = job.a, m = job.b;
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    uint8_t* own = reinterpret_cast<uint8_t*>(key + padded(job));
    uint64_t all = m == 64 ? ~uint64_t{0} : (uint64_t{1} << m) - 1;
    int64_t refused = 0, begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        int64_t first = row, last = band.load(row, end);
        for (; row < last; ++row) {
          T* w = band.weight.at(row);
          const T* r = band.reference.at(row);
          uint8_t* bits = job.mask ? job.mask + row * bytes : own;
          Summary summary = make_keys<T>(w, r, job.norm, columns, key);
          if (m == 4 && summary.top < FINITE) {
            mark_fours(key, columns / 4, int(n), job.invert, own + padded(job) / 4, bits);
            if (!job.mask) put<T>(w, r, bits, columns);
            continue;
          }
          uint64_t word = 0;   // bits not yet written
          int64_t held = 0, written = 0;
          for (int64_t g = 0; g < columns; g += m) {
            uint64_t low = 0;
            bool strange = false;
            for (int64_t i = 0; i < m; ++i) {
              int32_t own_key = key[g + i];
              int64_t rank = 0;
              for (int64_t j = 0; j < i; ++j) rank += key[g + j] <= own_key;
              for (int64_t j = i + 1; j < m; ++j) rank += key[g + j] < own_key;
              low |= uint64_t{rank < n} << i;
              strange |= own_key >= FINITE;
            }
            if (job.invert) low ^= all;
            if (strange) {
              ++refused;
              low = 0;
            }
            word |= low << held;
            held += m;
            if (held >= 64) {
              std::memcpy(bits + written, &word, 8);
              written += 8;
              held -= 64;
              word = held ? low >> (m - held) : 0;
            }
          }
          if (held) std::memcpy(bits + written, &word, size_t((held + 7) / 8));
          if (!job.mask) put<T>(w, r, bits, columns);
        }
        if (!job.mask) band.weight.save(first, last);
      }
    }
    __atomic_fetch_add(static_cast<int64_t*>(job.values), refused, __ATOMIC_RELAXED);
  }

  static int64_t blocks_scratch(const Job& job) { return Band::scratch(job) + 12 * padded(job); }

  // a = bm, b = bn; items are rows of blocks
  static void block_scores(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    int64_t bm = job.a, bn = job.b, across = job.columns / bn;
    Band band(job, memory);
    int32_t* key = reinterpret_cast<int32_t*>(memory);
    double* total = reinterpret_cast<double*>(key + padded(job));
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t block = begin; block < end; ++block) {
        for (int64_t i = 0; i < across; ++i) total[i] = 0;
        for (int64_t row = block * bm; row < (block + 1) * bm;) {
          for (int64_t last = band.load(row, (block + 1) * bm); row < last; ++row) {
            make_keys<T>(band.weight.at(row), band.reference.at(row), job.norm, job.columns, key);
            for (int64_t j = 0; j < bn; ++j)
              for (int64_t i = 0; i < across; ++i) {
                double score = from_bits(uint32_t(key[i * bn + j]));
                total[i] += score * score;
              }
          }
        }
        float* out = static_cast<float*>(job.values) + block * across;
        for (int64_t i = 0; i < across; ++i) out[i] = float(total[i]);
      }
    }
  }

  static int64_t band_scratch(const Job& job) { return Band::scratch(job); }

  // rowwise = where in `values` each row begins
  static void masked_take(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    int64_t bytes = (job.columns + 7) / 8;
    Band band(job, memory);
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        for (int64_t last = band.load(row, end); row < last; ++row) {
          const T* w = band.weight.at(row);
          T* out = static_cast<T*>(job.values) + job.rowwise[row];
          for (int64_t i = 0; i < job.columns; i += BLOCK) {
            uint64_t word = load_bits(job.mask + row * bytes + i / 8, job.columns - i);
            for (; word; word &= word - 1) *out++ = w[i + __builtin_ctzll(word)];
          }
        }
      }
    }
  }

  static void masked_put(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    int64_t bytes = (job.columns + 7) / 8;
    Band band(job, memory);
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t row = begin; row < end;) {
        int64_t first = row, last = band.load(row, end);
        for (; row < last; ++row) {
          T* w = band.weight.at(row);
          const uint8_t* bits = job.mask + row * bytes;
          if (!job.values) {
            put<T>(w, nullptr, bits, job.columns);
            continue;
          }
          const T* value = static_cast<const T*>(job.values) + job.rowwise[row];
          for (int64_t i = 0; i < job.columns; i += BLOCK) {
            uint64_t word = load_bits(bits + i / 8, job.columns - i);
            for (; word; word &= word - 1) w[i + __builtin_ctzll(word)] = *value++;
          }
        }
        band.weight.save(first, last);
      }
    }
  }

  static constexpr int64_t STRIP = 1024;  // columns whose sums stay in the first-level cache
  static constexpr int64_t GROUP = 64;    // tokens summed in float32

  static int64_t energy_scratch(const Job&) { return STRIP * (4 + 8 + 4 * int64_t{sizeof(T)}); }

  // a = tokens of a slab, b = strips; items are (slab, strip); values = float64 [slabs, columns]
  static void column_energy(const void* context, char* memory, Chunks& chunks) {
    const Job& job = *static_cast<const Job*>(context);
    double* total = reinterpret_cast<double*>(memory);
    float* partial = reinterpret_cast<float*>(total + STRIP);
    T* gathered = reinterpret_cast<T*>(partial + STRIP);
    const T* x = static_cast<const T*>(job.weight);
    int64_t begin, end;
    while (chunks.next(begin, end)) {
      for (int64_t item = begin; item < end; ++item) {
        int64_t slab = item / job.b, strip = item % job.b * STRIP;
        int64_t n = smaller(STRIP, job.columns - strip);
        int64_t token = slab * job.a, stop = smaller(token + job.a, job.rows);
        std::memset(total, 0, STRIP * 8);
        while (token < stop) {
          std::memset(partial, 0, STRIP * 4);
          for (int64_t counted = 0; counted < GROUP && token < stop; ++token) {
            if (job.mask && !job.mask[token]) continue;
            ++counted;
            const T* row = x + token * job.weight_row + strip * job.weight_column;
            if (job.weight_column != 1) {
              for (int64_t j = 0; j < n; ++j) gathered[j] = row[j * job.weight_column];
              row = gathered;
            }
            for (int64_t j = 0; j < n; ++j) {
              float value = widen(row[j]);
              partial[j] += value * value;
            }
          }
          for (int64_t j = 0; j < n; ++j) total[j] += partial[j];
        }
        std::memcpy(static_cast<double*>(job.values) + slab * job.columns + strip, total, size_t(n) * 8);
      }
    }
  }
};

// Σ mix64(element + (position + 1) · golden ratio); a = number of elements, items are pieces of b of them
template <class Bits>
inline void fingerprint(const void* context, char*, Chunks& chunks) {
  const Job& job = *static_cast<const Job*>(context);
  const Bits* bits = static_cast<const Bits*>(job.weight);
  uint64_t total = 0;
  int64_t begin, end;
  while (chunks.next(begin, end)) {
    int64_t stop = smaller(end * job.b, job.a);
    for (int64_t i = begin * job.b; i < stop; ++i) {
      uint64_t z = bits[i] + (uint64_t(i) + 1) * 0x9E3779B97F4A7C15u;
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
      total += z ^ (z >> 31);
    }
  }
  __atomic_fetch_add(static_cast<uint64_t*>(job.values), total, __ATOMIC_RELAXED);
}

// How many entries of each row are marked.
inline void mask_counts(const void* context, char*, Chunks& chunks) {
  const Job& job = *static_cast<const Job*>(context);
  int64_t bytes = (job.columns + 7) / 8, begin, end;
  while (chunks.next(begin, end))
    for (int64_t row = begin; row < end; ++row) {
      int64_t total = 0;
      for (int64_t i = 0; i < job.columns; i += BLOCK)
        total += __builtin_popcountll(load_bits(job.mask + row * bytes + i / 8, job.columns - i));
      job.rowwise[row] = total;
    }
}

template <class T>
inline bool run_typed(int op, const Job& job) {
  using O = Ops<T>;
  int64_t unit = job.weight_column == 1 ? 1 : Rows<T>::together(job.columns);
  switch (op) {
    case PRUNE_ROWS:
      return parallel(job.rows, job.columns, unit, job.threads, O::prune_rows_scratch(job), O::prune_rows, &job);
    case PRUNE_GROUPS:
      return parallel(job.rows, job.columns, unit, job.threads, O::groups_scratch(job), O::prune_groups, &job);
    case NONFINITE:
      return parallel(job.rows, job.columns, unit, job.threads, O::span_scratch(job), O::nonfinite, &job);
    case TIE_COUNTS:
      return parallel(job.rows, job.columns, unit, job.threads, O::span_scratch(job), O::tie_counts, &job);
    case SCORE_HISTOGRAM:
      return parallel(job.rows, job.columns, unit, job.threads, O::histogram_scratch(job), O::score_histogram, &job);
    case CUT:
      return parallel(job.rows, job.columns, unit, job.threads, O::span_scratch(job), O::cut, &job);
    case BLOCK_SCORES:
      return parallel(job.rows / job.a, job.columns * job.a, 1, job.threads, O::blocks_scratch(job), O::block_scores, &job);
    case MASKED_TAKE:
      return parallel(job.rows, job.columns, unit, job.threads, O::band_scratch(job), O::masked_take, &job);
    case MASKED_PUT:
      return parallel(job.rows, job.columns, unit, job.threads, O::band_scratch(job), O::masked_put, &job);
    case COLUMN_ENERGY:
      return parallel((job.rows + job.a - 1) / job.a * job.b, job.a * O::STRIP, 1, job.threads, O::energy_scratch(job),
                      O::column_energy, &job);
    default:
      return false;
  }
}

inline bool run(int op, const Job& job) {
  if (op == MASK_COUNTS) return parallel(job.rows, job.columns / 8, 1, job.threads, 0, mask_counts, &job);
  if (op == FINGERPRINT) {
    int64_t pieces = (job.a + job.b - 1) / job.b;
    switch (job.dtype) {
      case 1: return parallel(pieces, job.b, 1, job.threads, 0, fingerprint<uint8_t>, &job);
      case 2: return parallel(pieces, job.b, 1, job.threads, 0, fingerprint<uint16_t>, &job);
      case 4: return parallel(pieces, job.b, 1, job.threads, 0, fingerprint<uint32_t>, &job);
      case 8: return parallel(pieces, job.b, 1, job.threads, 0, fingerprint<uint64_t>, &job);
      default: return false;
    }
  }
  switch (job.dtype) {
    case FLOAT32: return run_typed<float>(op, job);
    case BFLOAT16: return run_typed<BFloat16>(op, job);
    case FLOAT16: return run_typed<Float16>(op, job);
    default: return false;
  }
}
