// Scores of a row as keys, and what is done with them, written once and compiled for every instruction set: included inside a
// namespace that already has keys64, compare64 and the other blocks of 64. No lambdas here: they would lose the namespace's target.

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Brings a block of weights that will be read soon, here or beyond the matrix, towards the cache.
template <class T>
INLINE void fetch64(const T* w, int64_t bytes) {
  for (int64_t i = 0; i < BLOCK * int64_t{sizeof(T)}; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(w) + bytes + i);
}

// The last columns of a row as a whole block: zeros behind them.
template <class T>
struct Tail {
  T weight[BLOCK] = {}, reference[BLOCK] = {};
  float norm[BLOCK] = {};

  Tail(const T* w, const T* r, const float* n, int64_t count) {
    std::memcpy(static_cast<void*>(weight), w, size_t(count) * sizeof(T));
    if (r) std::memcpy(static_cast<void*>(reference), r, size_t(count) * sizeof(T));
    std::memcpy(norm, n, size_t(count) * sizeof(float));
  }
};

// The keys of `columns` weights, padded to a multiple of BLOCK with keys above every finite one. Returns the sum of the scores.
template <class T>
inline float make_keys(const T* w, const T* r, const float* norm, int64_t columns, int32_t* key) {
  Sum sum;
  reset(sum);
  int64_t whole = columns / BLOCK * BLOCK;
  if (r) {
    for (int64_t i = 0; i < whole; i += BLOCK) {
      fetch64(w + i, AHEAD);
      fetch64(r + i, AHEAD);
      keys64(w + i, r + i, norm + i, key + i, sum);
    }
  } else {
    for (int64_t i = 0; i < whole; i += BLOCK) {
      fetch64(w + i, AHEAD);
      keys64(w + i, static_cast<const T*>(nullptr), norm + i, key + i, sum);
    }
  }
  if (whole < columns) {
    Tail<T> tail(w + whole, r ? r + whole : nullptr, norm + whole, columns - whole);
    keys64<T>(tail.weight, tail.reference, tail.norm, key + whole, sum);
    for (int64_t i = columns - whole; i < BLOCK; ++i) key[whole + i] = PADDING;
  }
  return finish(sum);
}

// The largest magnitude of n weights; NaN or infinity if one of them is.
template <class T>
inline float peak(const T* w, int64_t n) {
  using Bits = typename Element<T>::Bits;
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

// How many of `columns` keys are infinities and NaNs. A sum of scores that is finite has none.
inline int64_t count_nonfinite(const int32_t* key, int64_t columns, float sum) {
  int64_t equal;
  return std::isfinite(sum) ? 0 : columns - count(key, columns, FINITE, equal);
}

// Copies the keys in [low, high) to `out` and pads them; returns how many, and how many lie below. Meanwhile it brings `ahead`,
// as many weights as there are keys, towards the cache.
template <class T>
inline int64_t collect(const int32_t* key, int64_t columns, int32_t low, int32_t high, int32_t* out, int64_t& under,
                       const T* ahead) {
  int32_t* end = out;
  Below below;
  reset(below);
  uint32_t width = uint32_t(high) - uint32_t(low);
  for (int64_t i = 0; i < columns; i += BLOCK) {
    if (ahead) fetch64(ahead + i, 0);
    end = collect64(key + i, low, width, end, below);
  }
  for (int64_t i = 0; i < BLOCK; ++i) end[i] = PADDING;
  under = finish(below);
  return end - out;
}

inline int64_t collect(const int32_t* key, int64_t columns, int32_t low, int32_t high, int32_t* out, int64_t& under) {
  return collect(key, columns, low, high, out, under, static_cast<const float*>(nullptr));
}

// The same straight from the weights, whose keys are not kept. The sum of the scores tells whether all are finite.
template <class T>
inline int64_t collect_scores(const T* w, const T* r, const float* norm, int64_t columns, int32_t low, int32_t high, int32_t* out,
                              int64_t& under, float& total) {
  int32_t* end = out;
  Below below;
  Sum sum;
  reset(below);
  reset(sum);
  uint32_t width = uint32_t(high) - uint32_t(low);
  int64_t whole = columns / BLOCK * BLOCK;
  for (int64_t i = 0; i < whole; i += BLOCK) {
    fetch64(w + i, AHEAD);
    end = collect_scores64(w + i, r ? r + i : nullptr, norm + i, low, width, end, below, sum);
  }
  under = finish(below);
  if (whole < columns) {
    Tail<T> tail(w + whole, r ? r + whole : nullptr, norm + whole, columns - whole);
    int32_t key[BLOCK];
    keys64<T>(tail.weight, tail.reference, tail.norm, key, sum);
    for (int64_t i = 0; i < columns - whole; ++i) {
      under += key[i] < low;
      *end = key[i];
      end += uint32_t(key[i]) - uint32_t(low) < width;
    }
  }
  total = finish(sum);
  return end - out;
}

// What a row loses: the keys below `key`, and the first `quota` of those equal to it.
struct Cut {
  int32_t key;
  int64_t quota;
};

// Bits of the removed columns: the low set of the cut, or (inverted) all the others. Takes the ties it uses off the quota.
inline void mark(const int32_t* key, int64_t columns, Cut& cut, bool invert, uint8_t* bits) {
  for (int64_t i = 0; i < columns; i += BLOCK) {
    uint64_t low, tie;
    if (cut.quota == 0) {
      low = below64(key + i, cut.key);
    } else {
      compare64(key + i, cut.key, low, tie);
      int64_t ties = __builtin_popcountll(tie);
      for (; ties > cut.quota; --ties) tie &= ~(uint64_t{1} << (63 - __builtin_clzll(tie)));
      cut.quota -= ties;
      low |= tie;
    }
    if (invert) low = ~low;
    int64_t rest = columns - i;
    if (rest < BLOCK) low &= (uint64_t{1} << rest) - 1;
    std::memcpy(bits + i / 8, &low, size_t(smaller(8, (rest + 7) / 8)));
  }
}

// The same straight from the weights; `key` holds a span.
template <class T>
inline void mark_scores(const T* w, const T* r, const float* norm, int64_t columns, Cut cut, bool invert, int32_t* key,
                        uint8_t* bits) {
  for (int64_t i = 0; i < columns; i += SPAN) {
    int64_t n = smaller(SPAN, columns - i);
    make_keys<T>(w + i, r ? r + i : nullptr, norm + i, n, key);
    mark(key, n, cut, invert, bits + i / 8);
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

// Removes what a cut without ties names, straight from the weights.
template <class T>
inline void remove_below(T* w, const T* r, const float* norm, int64_t columns, int32_t value, bool invert) {
  int64_t whole = columns / BLOCK * BLOCK;
  if (r) {
    for (int64_t i = 0; i < whole; i += BLOCK) {
      fetch64(w + i, AHEAD);
      cut64(w + i, r + i, norm + i, value, invert);
    }
  } else {
    for (int64_t i = 0; i < whole; i += BLOCK) {
      fetch64(w + i, AHEAD);
      cut64(w + i, static_cast<const T*>(nullptr), norm + i, value, invert);
    }
  }
  if (whole < columns) {
    Tail<T> tail(w + whole, r ? r + whole : nullptr, norm + whole, columns - whole);
    cut64(tail.weight, tail.reference, tail.norm, value, invert);
    std::memcpy(static_cast<void*>(w + whole), tail.weight, size_t(columns - whole) * sizeof(T));
  }
}

// Removes what a cut names from a row, span by span; `key` and `bits` hold a span.
template <class T>
inline void remove(T* w, const T* r, const float* norm, int64_t columns, Cut cut, bool invert, int32_t* key, uint8_t* bits) {
  for (int64_t i = 0; i < columns; i += SPAN) {
    int64_t n = smaller(SPAN, columns - i);
    const T* other = r ? r + i : nullptr;
    if (cut.quota == 0) {
      remove_below(w + i, other, norm + i, columns - i, cut.key, invert);
      return;
    }
    make_keys<T>(w + i, other, norm + i, n, key);
    mark(key, n, cut, invert, bits);
    put<T>(w + i, other, bits, n);
  }
}
