// Blocks of 64 columns as eight 256-bit vectors. Included inside a namespace compiled for AVX2 and F16C.

INLINE float widen(float x) { return x; }
INLINE float widen(BFloat16 x) { return from_bits(uint32_t{x.bits} << 16); }
INLINE float widen(Float16 x) { return _cvtsh_ss(x.bits); }

INLINE __m256 load(const float* p) { return _mm256_loadu_ps(p); }

INLINE __m256 load(const BFloat16* p) {
  __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE __m256 load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

INLINE __m256i load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE void store_int(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
INLINE uint64_t flags(__m256i x) { return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(x))); }

struct Stats {
  __m256i top, zeros;
  __m256 sum;
};

INLINE void reset(Stats& stats) {
  stats.top = stats.zeros = _mm256_setzero_si256();
  stats.sum = _mm256_setzero_ps();
}

INLINE Summary finish(const Stats& stats) {
  int32_t top[8], zeros[8];
  float sum[8];
  store_int(top, stats.top);
  store_int(zeros, stats.zeros);
  _mm256_storeu_ps(sum, stats.sum);
  Summary summary{0, 0, 0};
  for (int j = 0; j < 8; ++j) {
    if (top[j] > summary.top) summary.top = top[j];
    summary.zeros += zeros[j];
    summary.sum += sum[j];
  }
  return summary;
}

template <class T>
INLINE void keys64(const T* w, const T* r, const float* norm, int32_t* key, Stats& stats) {
  const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF), nothing = _mm256_setzero_si256();
  for (int i = 0; i < BLOCK; i += 8) {
    __m256 x = load(w + i);
    if (r) x = _mm256_sub_ps(x, load(r + i));
    // the sign is cleared after the product: it also clears that of infinity times zero
    __m256i bits = _mm256_and_si256(_mm256_castps_si256(_mm256_mul_ps(x, _mm256_loadu_ps(norm + i))), magnitude);
    store_int(key + i, bits);
    stats.top = _mm256_max_epi32(stats.top, bits);
    stats.zeros = _mm256_sub_epi32(stats.zeros, _mm256_cmpeq_epi32(bits, nothing));
    stats.sum = _mm256_add_ps(stats.sum, _mm256_castsi256_ps(bits));
  }
}

INLINE void compare64(const int32_t* key, int32_t value, uint64_t& below, uint64_t& equal) {
  const __m256i v = _mm256_set1_epi32(value);
  below = equal = 0;
  for (int i = 0; i < BLOCK; i += 8) {
    __m256i k = load_int(key + i);
    below |= flags(_mm256_cmpgt_epi32(v, k)) << i;
    equal |= flags(_mm256_cmpeq_epi32(v, k)) << i;
  }
}

// for each set of lanes, the lanes in order: what AVX-512 calls compress
struct Compress {
  alignas(64) uint8_t lane[256][8];
  constexpr Compress() : lane() {
    for (int set = 0; set < 256; ++set) {
      int used = 0;
      for (int j = 0; j < 8; ++j)
        if (set >> j & 1) lane[set][used++] = uint8_t(j);
    }
  }
};
static constexpr Compress COMPRESS;

INLINE int32_t* collect64(const int32_t* key, int32_t low, uint32_t width, int32_t* out, int64_t& below) {
  // keys and bounds are never negative as int32, so signed comparisons order them
  const __m256i l = _mm256_set1_epi32(low), high = _mm256_set1_epi32(int32_t(uint32_t(low) + width));
  uint64_t less = 0;
  for (int i = 0; i < BLOCK; i += 8) {
    __m256i k = load_int(key + i);
    __m256i under = _mm256_cmpgt_epi32(l, k);
    less |= flags(under) << i;
    uint64_t inside = flags(_mm256_andnot_si256(under, _mm256_cmpgt_epi32(high, k)));
    __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(COMPRESS.lane[inside])));
    store_int(out, _mm256_permutevar8x32_epi32(k, order));
    out += __builtin_popcountll(inside);
  }
  below += __builtin_popcountll(less);
  return out;
}

INLINE void put64(float* w, const float* r, uint64_t marked) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (int i = 0; i < BLOCK; i += 8, marked >>= 8) {
    __m256i chosen = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int32_t(marked & 0xFF)), bit), bit);
    __m256i other = r ? load_int(r + i) : _mm256_setzero_si256();
    store_int(w + i, _mm256_blendv_epi8(load_int(w + i), other, chosen));
  }
}

template <class T>
INLINE void put64(T* w, const T* r, uint64_t marked) {
  const __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  for (int i = 0; i < BLOCK; i += 16, marked >>= 16) {
    __m256i chosen = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(int16_t(marked & 0xFFFF)), bit), bit);
    __m256i other = r ? load_int(r + i) : _mm256_setzero_si256();
    store_int(w + i, _mm256_blendv_epi8(load_int(w + i), other, chosen));
  }
}
