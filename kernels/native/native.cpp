// The native CPU backend: the same ops compiled for several instruction sets, behind a plain C interface.
// Nothing of Python or PyTorch is needed to build it.
#include "common.h"

namespace hftcore {

enum Type { FLOAT32, BFLOAT16, FLOAT16 };

// numbered as in __init__.py
enum Op {
  COLUMN_ENERGY,
  NONFINITE,
  PRUNE_ROWS,
  PRUNE_GROUPS,
  SCORE_HISTOGRAM,
  TIE_COUNTS,
  CUT,
  BLOCK_SCORES,
  MASKED_TAKE,
  MASKED_PUT,
  FINGERPRINT,
  MASK_COUNTS,
};

// what one pass over the keys of a row tells
struct Summary {
  int32_t top;
  int64_t zeros;
  float sum;
};

template <class T>
struct Element {
  using Bits = uint16_t;
};
template <>
struct Element<float> {
  using Bits = uint32_t;
};

namespace portable {
#include "lanes_portable.h"

#include "ops.h"
}  // namespace portable

}  // namespace hftcore

#pragma GCC visibility push(default)
extern "C" {

// 0 portable, 1 AVX2, 2 AVX-512
int hftcore_best_simd() { return 0; }

// 0, or 1 when memory could not be had (nothing was changed), or 2 for an unknown op
int hftcore_run(int simd, int op, const hftcore::Job* job) {
  if (op < 0 || op > hftcore::MASK_COUNTS || simd < 0 || simd > hftcore_best_simd()) return 2;
  return hftcore::portable::run(op, *job) ? 0 : 1;
}
}
#pragma GCC visibility pop
