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

// sums of floats; of the products in grams.h and shares.h so many lie in the 16 registers
constexpr int64_t LANES = 8, SUM_INNER = 3, SUM_OUTER = 4, SHARE_ROWS = 6;
using Floats = __m256;

INLINE Floats load_some(const float* p, int64_t n) {
  const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(n)), place));
}
template <class T>
INLINE Floats load_some(const T* p, int64_t n) {
  if (n >= LANES) return load(p);
  T some[LANES] = {};
  for (int64_t j = 0; j < n; ++j) some[j] = p[j];
  return load(some);
}
INLINE Floats spread(float x) { return _mm256_set1_ps(x); }
INLINE void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
INLINE Floats add_square(Floats sum, Floats x) { return _mm256_add_ps(sum, _mm256_mul_ps(x, x)); }
INLINE Floats multiply_add(Floats x, Floats y, Floats sum) { return _mm256_fmadd_ps(x, y, sum); }
INLINE Floats add(Floats x, Floats y) { return _mm256_add_ps(x, y); }
INLINE Floats subtract(Floats x, Floats y) { return _mm256_sub_ps(x, y); }
INLINE Floats greater(Floats x, Floats y) { return _mm256_max_ps(x, y); }  // y where either is NaN
INLINE float add_up(Floats x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// to[outer * pitch + inner] += what the lanes of sum[inner][outer] add up to
INLINE void add_up_to(float* to, int64_t pitch, const Floats (&sum)[SUM_INNER][SUM_OUTER]) {
  for (int64_t j = 0; j < SUM_OUTER; ++j)
    for (int64_t i = 0; i < SUM_INNER; ++i) to[j * pitch + i] += add_up(sum[i][j]);
}

INLINE Floats nearest(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// x * 2^whole, for whole <= 0; what would be below the normal numbers is about the least of them
INLINE Floats times_power(Floats x, Floats whole) {
  __m256i exponent = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_set1_ps(-126), whole));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23)));
}

INLINE __m256i load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE void store_int(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
INLINE uint64_t flags(__m256i x) { return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(x))); }

struct Sum {
  __m256 lane[2];
};

INLINE void reset(Sum& sum) { sum.lane[0] = sum.lane[1] = _mm256_setzero_ps(); }

INLINE float finish(const Sum& sum) {
  float lane[8], total = 0;
  _mm256_storeu_ps(lane, _mm256_add_ps(sum.lane[0], sum.lane[1]));
  for (float one : lane) total += one;
  return total;
}

template <class T>
INLINE __m256i keys8(const T* w, const T* r, const float* norm) {
  __m256 x = load(w);
  if (r) x = _mm256_sub_ps(x, load(r));
  // the sign is cleared after the product: it also clears that of infinity times zero
  return _mm256_and_si256(_mm256_castps_si256(_mm256_mul_ps(x, _mm256_loadu_ps(norm))), _mm256_set1_epi32(0x7FFFFFFF));
}

template <class T>
INLINE void keys64(const T* w, const T* r, const float* norm, int32_t* key, Sum& sum) {
  for (int i = 0; i < BLOCK; i += 8) {
    __m256i bits = keys8(w + i, r ? r + i : nullptr, norm + i);
    store_int(key + i, bits);
    sum.lane[i / 8 % 2] = _mm256_add_ps(sum.lane[i / 8 % 2], _mm256_castsi256_ps(bits));
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

INLINE uint64_t below64(const int32_t* key, int32_t value) {
  const __m256i v = _mm256_set1_epi32(value);
  uint64_t below = 0;
  for (int i = 0; i < BLOCK; i += 8) below |= flags(_mm256_cmpgt_epi32(v, load_int(key + i))) << i;
  return below;
}

struct Below {
  __m256i count;  // negative
};

INLINE void reset(Below& below) { below.count = _mm256_setzero_si256(); }

INLINE int64_t finish(const Below& below) {
  int32_t lane[8];
  int64_t total = 0;
  store_int(lane, below.count);
  for (int32_t one : lane) total -= one;
  return total;
}

INLINE int32_t* collect8(__m256i key, __m256i low, __m256i high, int32_t* out, Below& below) {
  // keys and bounds are never negative as int32, so signed comparisons order them
  __m256i under = _mm256_cmpgt_epi32(low, key);
  below.count = _mm256_add_epi32(below.count, under);
  uint64_t inside = flags(_mm256_andnot_si256(under, _mm256_cmpgt_epi32(high, key)));
  __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(COMPRESS.lane[inside])));
  store_int(out, _mm256_permutevar8x32_epi32(key, order));
  return out + __builtin_popcountll(inside);
}

INLINE int32_t* collect64(const int32_t* key, int32_t low, uint32_t width, int32_t* out, Below& below) {
  const __m256i l = _mm256_set1_epi32(low), high = _mm256_set1_epi32(int32_t(uint32_t(low) + width));
  for (int i = 0; i < BLOCK; i += 8) out = collect8(load_int(key + i), l, high, out, below);
  return out;
}

template <class T>
INLINE int32_t* collect_scores64(const T* w, const T* r, const float* norm, int32_t low, uint32_t width, int32_t* out,
                                 Below& below, Sum& sum) {
  const __m256i l = _mm256_set1_epi32(low), high = _mm256_set1_epi32(int32_t(uint32_t(low) + width));
  for (int i = 0; i < BLOCK; i += 8) {
    __m256i bits = keys8(w + i, r ? r + i : nullptr, norm + i);
    sum.lane[i / 8 % 2] = _mm256_add_ps(sum.lane[i / 8 % 2], _mm256_castsi256_ps(bits));
    out = collect8(bits, l, high, out, below);
  }
  return out;
}

INLINE void cut64(float* w, const float* r, const float* norm, int32_t value, bool invert) {
  const __m256i v = _mm256_set1_epi32(value), flip = _mm256_set1_epi32(invert ? -1 : 0);
  for (int i = 0; i < BLOCK; i += 8) {
    __m256i removed = _mm256_xor_si256(_mm256_cmpgt_epi32(v, keys8(w + i, r ? r + i : nullptr, norm + i)), flip);
    __m256i other = r ? load_int(r + i) : _mm256_setzero_si256();
    store_int(w + i, _mm256_blendv_epi8(load_int(w + i), other, removed));
  }
}

template <class T>
INLINE void cut64(T* w, const T* r, const float* norm, int32_t value, bool invert) {
  const __m256i v = _mm256_set1_epi32(value), flip = _mm256_set1_epi32(invert ? -1 : 0);
  for (int i = 0; i < BLOCK; i += 16) {
    __m256i first = _mm256_cmpgt_epi32(v, keys8(w + i, r ? r + i : nullptr, norm + i));
    __m256i second = _mm256_cmpgt_epi32(v, keys8(w + i + 8, r ? r + i + 8 : nullptr, norm + i + 8));
    // packing works within halves of a vector: the quarters are put in order again
    __m256i removed = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8);
    __m256i other = r ? load_int(r + i) : _mm256_setzero_si256();
    store_int(w + i, _mm256_blendv_epi8(load_int(w + i), other, _mm256_xor_si256(removed, flip)));
  }
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

template <class T>
INLINE T* take64(const T* w, uint64_t marked, T* out) {
  return take_marked(w, marked, out);
}

template <class T>
INLINE const T* give64(T* w, uint64_t marked, const T* in) {
  return put_marked(w, marked, in);
}
