// Blocks of 64 columns as four 512-bit vectors. Included inside a namespace compiled for AVX-512.

INLINE float widen(float x) { return x; }
INLINE float widen(BFloat16 x) { return from_bits(uint32_t{x.bits} << 16); }
INLINE float widen(Float16 x) { return _cvtsh_ss(x.bits); }

INLINE __m512 load(const float* p) { return _mm512_loadu_ps(p); }

INLINE __m512 load(const BFloat16* p) {
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE __m512 load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// sums of floats; of the products in grams.h and shares.h so many lie in the 32 registers
constexpr int64_t LANES = 16, SUM_INNER = 4, SUM_OUTER = 6, SHARE_ROWS = 14;
using Floats = __m512;

INLINE __mmask16 first_lanes(int64_t n) { return n < 16 ? __mmask16((1u << n) - 1) : __mmask16(0xFFFF); }
INLINE Floats load_some(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
INLINE Floats load_some(const BFloat16* p, int64_t n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16));
}
INLINE Floats load_some(const Float16* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
INLINE Floats spread(float x) { return _mm512_set1_ps(x); }
INLINE void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
INLINE Floats add_square(Floats sum, Floats x) { return _mm512_add_ps(sum, _mm512_mul_ps(x, x)); }
INLINE Floats multiply_add(Floats x, Floats y, Floats sum) { return _mm512_fmadd_ps(x, y, sum); }
INLINE Floats add(Floats x, Floats y) { return _mm512_add_ps(x, y); }
INLINE Floats subtract(Floats x, Floats y) { return _mm512_sub_ps(x, y); }
INLINE Floats greater(Floats x, Floats y) { return _mm512_max_ps(x, y); }  // y where either is NaN
INLINE float add_up(Floats x) { return _mm512_reduce_add_ps(x); }

// to[outer * pitch + inner] += what the lanes of sum[inner][outer] add up to
INLINE void add_up_to(float* to, int64_t pitch, const Floats (&sum)[SUM_INNER][SUM_OUTER]) {
  for (int64_t j = 0; j < SUM_OUTER; ++j, to += pitch) {
    __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(sum[0][j], sum[1][j]), _mm512_unpackhi_ps(sum[0][j], sum[1][j]));
    __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(sum[2][j], sum[3][j]), _mm512_unpackhi_ps(sum[2][j], sum[3][j]));
    __m512 four = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xEE));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    __m128 all = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), all));
  }
}

INLINE Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 0); }
INLINE Floats times_power(Floats x, Floats whole) { return _mm512_scalef_ps(x, whole); }  // x * 2^whole

struct Sum {
  __m512 lane[4];
};

INLINE void reset(Sum& sum) {
  for (__m512& lane : sum.lane) lane = _mm512_setzero_ps();
}

INLINE float finish(const Sum& sum) {
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum.lane[0], sum.lane[1]), _mm512_add_ps(sum.lane[2], sum.lane[3])));
}

template <class T>
INLINE __m512i keys16(const T* w, const T* r, const float* norm) {
  __m512 x = load(w);
  if (r) x = _mm512_sub_ps(x, load(r));
  // the sign is cleared after the product: it also clears that of infinity times zero
  return _mm512_and_si512(_mm512_castps_si512(_mm512_mul_ps(x, _mm512_loadu_ps(norm))), _mm512_set1_epi32(0x7FFFFFFF));
}

template <class T>
INLINE void keys64(const T* w, const T* r, const float* norm, int32_t* key, Sum& sum) {
  for (int i = 0; i < 4; ++i) {
    __m512i bits = keys16(w + 16 * i, r ? r + 16 * i : nullptr, norm + 16 * i);
    _mm512_storeu_si512(key + 16 * i, bits);
    sum.lane[i] = _mm512_add_ps(sum.lane[i], _mm512_castsi512_ps(bits));
  }
}

INLINE void compare64(const int32_t* key, int32_t value, uint64_t& below, uint64_t& equal) {
  const __m512i v = _mm512_set1_epi32(value);
  below = equal = 0;
  for (int i = 0; i < BLOCK; i += 16) {
    __m512i k = _mm512_loadu_si512(key + i);
    below |= uint64_t{_mm512_cmplt_epi32_mask(k, v)} << i;
    equal |= uint64_t{_mm512_cmpeq_epi32_mask(k, v)} << i;
  }
}

INLINE uint64_t below64(const int32_t* key, int32_t value) {
  const __m512i v = _mm512_set1_epi32(value);
  uint64_t below = 0;
  for (int i = 0; i < BLOCK; i += 16) below |= uint64_t{_mm512_cmplt_epi32_mask(_mm512_loadu_si512(key + i), v)} << i;
  return below;
}

struct Below {
  __m512i count;  // negative
};

INLINE void reset(Below& below) { below.count = _mm512_setzero_si512(); }
INLINE int64_t finish(const Below& below) { return -int64_t{_mm512_reduce_add_epi32(below.count)}; }

INLINE int32_t* collect16(__m512i key, int32_t low, uint32_t width, int32_t* out, Below& below) {
  // keys and bounds are never negative, so the difference is exactly when the key lies below
  __m512i above = _mm512_sub_epi32(key, _mm512_set1_epi32(low));
  below.count = _mm512_add_epi32(below.count, _mm512_srai_epi32(above, 31));
  uint32_t inside = _mm512_cmplt_epu32_mask(above, _mm512_set1_epi32(int32_t(width)));
  // compressed in a register: compressing straight to memory is slow on some processors
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(__mmask16(inside), key));
  return out + __builtin_popcount(inside);
}

INLINE int32_t* collect64(const int32_t* key, int32_t low, uint32_t width, int32_t* out, Below& below) {
  for (int i = 0; i < BLOCK; i += 16) out = collect16(_mm512_loadu_si512(key + i), low, width, out, below);
  return out;
}

template <class T>
INLINE int32_t* collect_scores64(const T* w, const T* r, const float* norm, int32_t low, uint32_t width, int32_t* out,
                                 Below& below, Sum& sum) {
  for (int i = 0; i < 4; ++i) {
    __m512i bits = keys16(w + 16 * i, r ? r + 16 * i : nullptr, norm + 16 * i);
    sum.lane[i] = _mm512_add_ps(sum.lane[i], _mm512_castsi512_ps(bits));
    out = collect16(bits, low, width, out, below);
  }
  return out;
}

INLINE void cut64(float* w, const float* r, const float* norm, int32_t value, bool invert) {
  const __mmask16 flip = invert ? 0xFFFF : 0;
  for (int i = 0; i < BLOCK; i += 16) {
    __m512i key = keys16(w + i, r ? r + i : nullptr, norm + i);
    __mmask16 removed = _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32(value)) ^ flip;
    __m512 other = r ? _mm512_loadu_ps(r + i) : _mm512_setzero_ps();
    _mm512_storeu_ps(w + i, _mm512_mask_mov_ps(_mm512_loadu_ps(w + i), removed, other));
  }
}

template <class T>
INLINE void cut64(T* w, const T* r, const float* norm, int32_t value, bool invert) {
  const __m512i v = _mm512_set1_epi32(value);
  const __mmask32 flip = invert ? 0xFFFFFFFF : 0;
  for (int i = 0; i < BLOCK; i += 32) {
    __mmask16 first = _mm512_cmplt_epi32_mask(keys16(w + i, r ? r + i : nullptr, norm + i), v);
    __mmask16 second = _mm512_cmplt_epi32_mask(keys16(w + i + 16, r ? r + i + 16 : nullptr, norm + i + 16), v);
    __mmask32 removed = _mm512_kunpackw(second, first) ^ flip;
    __m512i other = r ? _mm512_loadu_si512(r + i) : _mm512_setzero_si512();
    _mm512_storeu_si512(w + i, _mm512_mask_mov_epi16(_mm512_loadu_si512(w + i), removed, other));
  }
}

INLINE void put64(float* w, const float* r, uint64_t marked) {
  for (int i = 0; i < BLOCK; i += 16) {
    __m512 other = r ? _mm512_loadu_ps(r + i) : _mm512_setzero_ps();
    _mm512_storeu_ps(w + i, _mm512_mask_mov_ps(_mm512_loadu_ps(w + i), __mmask16(marked >> i), other));
  }
}

template <class T>
INLINE void put64(T* w, const T* r, uint64_t marked) {
  for (int i = 0; i < BLOCK; i += 32) {
    __m512i other = r ? _mm512_loadu_si512(r + i) : _mm512_setzero_si512();
    _mm512_storeu_si512(w + i, _mm512_mask_mov_epi16(_mm512_loadu_si512(w + i), __mmask32(marked >> i), other));
  }
}

INLINE __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1); }

INLINE float* take64(const float* w, uint64_t marked, float* out) {
  for (int i = 0; i < BLOCK; i += 16) {
    __mmask16 some = __mmask16(marked >> i);
    int n = __builtin_popcount(some);
    _mm512_mask_storeu_ps(out, first_lanes(n), _mm512_maskz_compress_ps(some, _mm512_loadu_ps(w + i)));
    out += n;
  }
  return out;
}

template <class T>
INLINE T* take64(const T* w, uint64_t marked, T* out) {
  for (int i = 0; i < BLOCK; i += 16) {
    __mmask16 some = __mmask16(marked >> i);
    int n = __builtin_popcount(some);
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i)));
    _mm256_mask_storeu_epi16(out, first_lanes(n), _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(some, wide)));
    out += n;
  }
  return out;
}

INLINE const float* give64(float* w, uint64_t marked, const float* in) {
  for (int i = 0; i < BLOCK; i += 16) {
    __mmask16 some = __mmask16(marked >> i);
    int n = __builtin_popcount(some);
    __m512 values = _mm512_maskz_loadu_ps(first_lanes(n), in);
    _mm512_storeu_ps(w + i, _mm512_mask_expand_ps(_mm512_loadu_ps(w + i), some, values));
    in += n;
  }
  return in;
}

template <class T>
INLINE const T* give64(T* w, uint64_t marked, const T* in) {
  for (int i = 0; i < BLOCK; i += 16) {
    __mmask16 some = __mmask16(marked >> i);
    int n = __builtin_popcount(some);
    __m512i values = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), in));
    __m256i* at = reinterpret_cast<__m256i*>(w + i);
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at));
    _mm256_storeu_si256(at, _mm512_cvtepi32_epi16(_mm512_mask_expand_epi32(wide, some, values)));
    in += n;
  }
  return in;
}
