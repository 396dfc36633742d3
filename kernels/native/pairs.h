// Factors of bfloat16 where the processor multiplies pairs of them (AVX512-BF16). Included after products.h.
//
// The two products of a lane are added to its float32 sum one after the other; denormal factors and sums count as zero.

template <>
struct Factors<BFloat16> {
  static constexpr int64_t TOGETHER = 2;
  __m512bh lane;

  static INLINE Factors at(const BFloat16* p) { return {__m512bh(_mm512_loadu_si512(p))}; }
  static INLINE Factors some(const BFloat16* p, int64_t n) {
    return {__m512bh(_mm512_maskz_loadu_epi16(__mmask32((uint64_t{1} << n) - 1), p))};
  }
  static INLINE Factors packed(const float* words) { return {__m512bh(_mm512_loadu_si512(words))}; }
  static INLINE Factors repeated(float word) { return {__m512bh(_mm512_set1_ps(word))}; }

  static INLINE Floats words(const BFloat16* p, int64_t row, int64_t tokens, int64_t n) {
    __m512i both = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p));
    if (tokens > 1) {
      __m512i next = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p + row));
      both = _mm512_or_si512(both, _mm512_slli_epi32(next, 16));
    }
    return _mm512_castsi512_ps(both);
  }
};

INLINE Floats multiply_add(Factors<BFloat16> x, Factors<BFloat16> y, Floats sum) {
  return _mm512_dpbf16_ps(sum, x.lane, y.lane);
}
