// What the sums of products in grams.h, shares.h and logits.h are made of. Included like keys.h.
//
// Factors are of any of the three types; their products are exact in float32, in which they are summed.

// One side of the products: `features` adjacent ones of each token.
template <class T>
struct Side {
  const T* data;
  int64_t sample, row, features;

  const T* at(int64_t which, int64_t token) const { return data + which * sample + token * row; }
};

template <class T>
INLINE Side<T> inputs(const Job& job) {
  return {static_cast<const T*>(job.weight), job.weight_column, job.weight_row, job.columns};
}

template <class T>
INLINE Side<T> output_gradients(const Job& job) {
  return {static_cast<const T*>(job.reference), job.reference_column, job.reference_row, job.b};
}

// A vector of factors. A word is what a lane of it holds: here one element, widened.
template <class T>
struct Factors {
  static constexpr int64_t TOGETHER = 1;  // elements of a word
  Floats lane;

  static INLINE Factors at(const T* p) { return {load(p)}; }
  static INLINE Factors some(const T* p, int64_t n) { return {load_some(p, n)}; }
  static INLINE Factors packed(const float* words) { return {load(words)}; }
  static INLINE Factors repeated(float word) { return {spread(word)}; }

  // the words of up to `n` adjacent features of this token (and of those that follow, `row` apart, as far as a word holds them and
  // there are `tokens`)
  static INLINE Floats words(const T* p, int64_t, int64_t, int64_t n) { return load_some(p, n); }
};

template <class T>
INLINE Floats multiply_add(Factors<T> x, Factors<T> y, Floats sum) {
  return multiply_add(x.lane, y.lane, sum);
}
