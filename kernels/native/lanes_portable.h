// Blocks of 64 columns in plain loops, for any machine. Included inside a namespace.

INLINE float widen(float x) { return x; }

INLINE float widen(BFloat16 x) { return from_bits(uint32_t{x.bits} << 16); }

INLINE float widen(Float16 x) {
  // the exponent is rebased by an exact product; infinities and NaNs get theirs back by hand
  uint32_t magnitude = uint32_t(x.bits & 0x7FFF) << 13;
  uint32_t bits = to_bits(from_bits(magnitude) * 0x1p112f);
  bits |= magnitude >= 0x0F800000u ? 0x7F800000u : 0u;
  return from_bits(bits | uint32_t(x.bits & 0x8000) << 16);
}

struct Stats {
  int32_t top[16];
  int32_t zeros[16];
  float sum[16];
};

INLINE void reset(Stats& stats) { std::memset(&stats, 0, sizeof(stats)); }

INLINE Summary finish(const Stats& stats) {
  Summary summary{0, 0, 0};
  for (int j = 0; j < 16; ++j) {
    if (stats.top[j] > summary.top) summary.top = stats.top[j];
    summary.zeros += stats.zeros[j];
    summary.sum += stats.sum[j];
  }
  return summary;
}

template <class T>
INLINE void keys64(const T* w, const T* r, const float* norm, int32_t* key, Stats& stats) {
  for (int i = 0; i < BLOCK; i += 16) {
    int32_t bits[16];
    for (int j = 0; j < 16; ++j) {
      float x = r ? widen(w[i + j]) - widen(r[i + j]) : widen(w[i + j]);
      bits[j] = int32_t(to_bits(from_bits(to_bits(x) & 0x7FFFFFFFu) * norm[i + j]) & 0x7FFFFFFFu);
    }
    for (int j = 0; j < 16; ++j) key[i + j] = bits[j];
    for (int j = 0; j < 16; ++j) stats.top[j] = bits[j] > stats.top[j] ? bits[j] : stats.top[j];
    for (int j = 0; j < 16; ++j) stats.zeros[j] += bits[j] == 0;
    for (int j = 0; j < 16; ++j) stats.sum[j] += from_bits(uint32_t(bits[j]));
  }
}

// bits of the columns whose key is below, and equal to, `value`
INLINE void compare64(const int32_t* key, int32_t value, uint64_t& below, uint64_t& equal) {
  uint8_t flag[2][BLOCK];
  for (int j = 0; j < BLOCK; ++j) flag[0][j] = key[j] < value;
  for (int j = 0; j < BLOCK; ++j) flag[1][j] = key[j] == value;
  uint64_t word[2] = {0, 0};
  for (int side = 0; side < 2; ++side)
    for (int b = 0; b < 8; ++b) {
      uint64_t eight;
      std::memcpy(&eight, flag[side] + 8 * b, 8);
      word[side] |= ((eight * 0x0102040810204080u) >> 56) << (8 * b);
    }
  below = word[0];
  equal = word[1];
}

// appends the keys in [low, low + width) to `out` (room for 64 more is needed), and counts those below
INLINE int32_t* collect64(const int32_t* key, int32_t low, uint32_t width, int32_t* out, int64_t& below) {
  int32_t less = 0;
  for (int j = 0; j < BLOCK; ++j) less += key[j] < low;
  below += less;
  // few keys are inside most windows, and finding none takes no branch a key
  for (int i = 0; i < BLOCK; i += 16) {
    int any = 0;
    for (int j = i; j < i + 16; ++j) any |= uint32_t(key[j]) - uint32_t(low) < width;
    if (!any) continue;
    for (int j = i; j < i + 16; ++j) {
      *out = key[j];
      out += uint32_t(key[j]) - uint32_t(low) < width;
    }
  }
  return out;
}

// the marked ones of 64 weights become the reference's, or zero
template <class T>
INLINE void put64(T* w, const T* r, uint64_t marked) {
  using Bits = typename Element<T>::Bits;
  for (int i = 0; i < BLOCK; i += 8, marked >>= 8) {
    Bits value[8], other[8] = {};
    std::memcpy(value, w + i, sizeof(value));
    if (r) std::memcpy(other, r + i, sizeof(other));
    for (int j = 0; j < 8; ++j) {
      // without a branch: the mask looks random to the processor
      Bits keep = Bits((marked >> j & 1) - 1);
      value[j] = Bits((value[j] & keep) | (other[j] & Bits(~keep)));
    }
    std::memcpy(static_cast<void*>(w + i), value, sizeof(value));
  }
}
