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

// sums of floats, and how many of them the products in grams.h and shares.h take
constexpr int64_t LANES = 4, SUM_INNER = 2, SUM_OUTER = 4, SHARE_ROWS = 6;

struct Floats {
  float lane[LANES];
};

template <class T>
INLINE Floats load_some(const T* p, int64_t n) {
  Floats x = {};
  for (int64_t j = 0; j < LANES && j < n; ++j) x.lane[j] = widen(p[j]);
  return x;
}

template <class T>
INLINE Floats load(const T* p) {
  Floats x;
  for (int64_t j = 0; j < LANES; ++j) x.lane[j] = widen(p[j]);
  return x;
}

INLINE void store(float* p, Floats x) { std::memcpy(p, x.lane, sizeof x.lane); }

INLINE Floats add_square(Floats sum, Floats x) {
  for (int64_t j = 0; j < LANES; ++j) sum.lane[j] += x.lane[j] * x.lane[j];
  return sum;
}

INLINE Floats spread(float x) { return {{x, x, x, x}}; }

INLINE Floats multiply_add(Floats x, Floats y, Floats sum) {
  for (int64_t j = 0; j < LANES; ++j) sum.lane[j] += x.lane[j] * y.lane[j];
  return sum;
}

INLINE Floats add(Floats x, Floats y) {
  for (int64_t j = 0; j < LANES; ++j) x.lane[j] += y.lane[j];
  return x;
}

INLINE Floats subtract(Floats x, Floats y) {
  for (int64_t j = 0; j < LANES; ++j) x.lane[j] -= y.lane[j];
  return x;
}

// y where either is NaN
INLINE Floats greater(Floats x, Floats y) {
  for (int64_t j = 0; j < LANES; ++j) x.lane[j] = x.lane[j] > y.lane[j] ? x.lane[j] : y.lane[j];
  return x;
}

INLINE float add_up(Floats x) { return (x.lane[0] + x.lane[1]) + (x.lane[2] + x.lane[3]); }

// to[outer * pitch + inner] += what the lanes of sum[inner][outer] add up to
INLINE void add_up_to(float* to, int64_t pitch, const Floats (&sum)[SUM_INNER][SUM_OUTER]) {
  for (int64_t j = 0; j < SUM_OUTER; ++j)
    for (int64_t i = 0; i < SUM_INNER; ++i) to[j * pitch + i] += add_up(sum[i][j]);
}

INLINE Floats nearest(Floats x) {
  for (float& lane : x.lane) lane = std::nearbyintf(lane);
  return x;
}

// x * 2^whole
INLINE Floats times_power(Floats x, Floats whole) {
  for (int64_t j = 0; j < LANES; ++j) x.lane[j] *= std::exp2f(whole.lane[j]);
  return x;
}

// sums of scores; not finite if one of them is not
struct Sum {
  float lane[16];
};

INLINE void reset(Sum& sum) { std::memset(&sum, 0, sizeof(sum)); }

INLINE float finish(const Sum& sum) {
  float total = 0;
  for (float one : sum.lane) total += one;
  return total;
}

template <class T>
INLINE void keys16(const T* w, const T* r, const float* norm, int32_t* bits) {
  for (int j = 0; j < 16; ++j) {
    float x = r ? widen(w[j]) - widen(r[j]) : widen(w[j]);
    bits[j] = int32_t(to_bits(from_bits(to_bits(x) & 0x7FFFFFFFu) * norm[j]) & 0x7FFFFFFFu);
  }
}

template <class T>
INLINE void keys64(const T* w, const T* r, const float* norm, int32_t* key, Sum& sum) {
  for (int i = 0; i < BLOCK; i += 16) {
    int32_t bits[16];
    keys16(w + i, r ? r + i : nullptr, norm + i, bits);
    for (int j = 0; j < 16; ++j) key[i + j] = bits[j];
    for (int j = 0; j < 16; ++j) sum.lane[j] += from_bits(uint32_t(bits[j]));
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

INLINE uint64_t below64(const int32_t* key, int32_t value) {
  uint64_t below, equal;
  compare64(key, value, below, equal);
  return below;
}

struct Below {
  int64_t count;
};

INLINE void reset(Below& below) { below.count = 0; }
INLINE int64_t finish(const Below& below) { return below.count; }

// appends the keys in [low, low + width) to `out` (room for 64 more is needed), and counts those below
INLINE int32_t* collect16(const int32_t* key, int32_t low, uint32_t width, int32_t* out, Below& below) {
  int32_t less = 0, any = 0;
  for (int j = 0; j < 16; ++j) less += key[j] < low;
  for (int j = 0; j < 16; ++j) any |= uint32_t(key[j]) - uint32_t(low) < width;
  below.count += less;
  // few keys are inside most windows, and finding none takes no branch a key
  if (!any) return out;
  for (int j = 0; j < 16; ++j) {
    *out = key[j];
    out += uint32_t(key[j]) - uint32_t(low) < width;
  }
  return out;
}

INLINE int32_t* collect64(const int32_t* key, int32_t low, uint32_t width, int32_t* out, Below& below) {
  for (int i = 0; i < BLOCK; i += 16) out = collect16(key + i, low, width, out, below);
  return out;
}

// the same for scores that are not kept
template <class T>
INLINE int32_t* collect_scores64(const T* w, const T* r, const float* norm, int32_t low, uint32_t width, int32_t* out,
                                 Below& below, Sum& sum) {
  for (int i = 0; i < BLOCK; i += 16) {
    int32_t bits[16];
    keys16(w + i, r ? r + i : nullptr, norm + i, bits);
    for (int j = 0; j < 16; ++j) sum.lane[j] += from_bits(uint32_t(bits[j]));
    out = collect16(bits, low, width, out, below);
  }
  return out;
}

// weights whose key is below `value` (or, inverted, is not) become the reference's, or zero
template <class T>
INLINE void cut64(T* w, const T* r, const float* norm, int32_t value, bool invert) {
  using Bits = typename Element<T>::Bits;
  for (int i = 0; i < BLOCK; i += 16) {
    int32_t key[16];
    Bits own[16], other[16] = {};
    keys16(w + i, r ? r + i : nullptr, norm + i, key);
    std::memcpy(own, w + i, sizeof(own));
    if (r) std::memcpy(other, r + i, sizeof(other));
    for (int j = 0; j < 16; ++j) {
      Bits removed = Bits(-int32_t((key[j] < value) != invert));
      own[j] = Bits((own[j] & Bits(~removed)) | (other[j] & removed));
    }
    std::memcpy(static_cast<void*>(w + i), own, sizeof(own));
  }
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

template <class T>
INLINE T* take64(const T* w, uint64_t marked, T* out) {
  return take_marked(w, marked, out);
}

template <class T>
INLINE const T* give64(T* w, uint64_t marked, const T* in) {
  return put_marked(w, marked, in);
}
