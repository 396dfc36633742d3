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

struct Stats {
  __m512i top, zeros;
  __m512 sum;
};

INLINE void reset(Stats& stats) {
  stats.top = stats.zeros = _mm512_setzero_si512();
  stats.sum = _mm512_setzero_ps();
}

INLINE Summary finish(const Stats& stats) {
  return {_mm512_reduce_max_epi32(stats.top), _mm512_reduce_add_epi32(stats.zeros), _mm512_reduce_add_ps(stats.sum)};
}

template <class T>
INLINE void keys64(const T* w, const T* r, const float* norm, int32_t* key, Stats& stats) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF), minus_one = _mm512_set1_epi32(-1);
  for (int i = 0; i < BLOCK; i += 16) {
    __m512 x = load(w + i);
    if (r) x = _mm512_sub_ps(x, load(r + i));
    // the sign is cleared after the product: it also clears that of infinity times zero
    __m512i bits = _mm512_and_si512(_mm512_castps_si512(_mm512_mul_ps(x, _mm512_loadu_ps(norm + i))), magnitude);
    _mm512_storeu_si512(key + i, bits);
    stats.top = _mm512_max_epi32(stats.top, bits);
    stats.zeros = _mm512_mask_sub_epi32(stats.zeros, _mm512_testn_epi32_mask(bits, bits), stats.zeros, minus_one);
    stats.sum = _mm512_add_ps(stats.sum, _mm512_castsi512_ps(bits));
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

INLINE int32_t* collect64(const int32_t* key, int32_t low, uint32_t width, int32_t* out, int64_t& below) {
  const __m512i l = _mm512_set1_epi32(low), w = _mm512_set1_epi32(int32_t(width));
  uint64_t less = 0;
  for (int i = 0; i < BLOCK; i += 16) {
    __m512i k = _mm512_loadu_si512(key + i);
    less |= uint64_t{_mm512_cmplt_epi32_mask(k, l)} << i;
    uint32_t inside = _mm512_cmplt_epu32_mask(_mm512_sub_epi32(k, l), w);
    // compressed in a register: compressing straight to memory is slow on some processors
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(__mmask16(inside), k));
    out += __builtin_popcount(inside);
  }
  below += __builtin_popcountll(less);
  return out;
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
