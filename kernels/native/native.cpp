// The native CPU backend: the same ops compiled for several instruction sets, behind a plain C interface.
// Nothing of Python or PyTorch is needed to build it.
#include "common.h"

// GCC honours a target for templates too; elsewhere the portable code serves
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HFTCORE_X86 1
#if __GNUC__ >= 10
#define HFTCORE_PAIRS 1  // older ones know no AVX512-BF16
#endif
// the compiler's own intrinsics of undefined lanes set these off
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

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
  SAMPLED_KEYS,
  KEYS_BETWEEN,
  ROW_KEYS,
  ROW_MERGE,
  LOWER_GRAM,
  GHOST_NORMS,
  SHARES,
  LOGPROBS,
  LOGIT_GRADIENTS,
};

inline bool is_product(int op) { return op >= LOWER_GRAM; }

template <class T>
struct Element {
  using Bits = uint16_t;
};
template <>
struct Element<float> {
  using Bits = uint32_t;
};

INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

namespace portable {
#include "lanes_portable.h"

#include "keys.h"

#include "select.h"

#include "products.h"

#include "grams.h"

#include "shares.h"

#include "logits.h"

#include "ops.h"
}  // namespace portable

// No header but ours may be included below: a standard template must never be compiled for more than the baseline.
#ifdef HFTCORE_X86

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
namespace avx2 {
#include "lanes_avx2.h"

#include "keys.h"

#include "select.h"

#include "products.h"

#include "grams.h"

#include "shares.h"

#include "logits.h"

#include "ops.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512")
namespace avx512 {
#include "lanes_avx512.h"

#include "keys.h"

#include "select.h"

#include "products.h"

#include "grams.h"

#include "shares.h"

#include "logits.h"

#include "ops.h"
}  // namespace avx512
#pragma GCC pop_options

#ifdef HFTCORE_PAIRS
// products of bfloat16 alone: what it adds serves nothing else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512")
namespace avx512bf16 {
#include "lanes_avx512.h"

#include "keys.h"

#include "products.h"

#include "pairs.h"

#include "grams.h"

#include "shares.h"

#include "logits.h"
}  // namespace avx512bf16
#pragma GCC pop_options
#endif

#endif

}  // namespace hftcore

#pragma GCC visibility push(default)
extern "C" {

// 0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with products of bfloat16
int hftcore_best_simd() {
#ifdef HFTCORE_X86
  // the instructions of the AVX2 machines (2013) that the compiler may use there
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
              __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("lzcnt");
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef HFTCORE_PAIRS
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return 3;
#endif
  return avx2 ? avx512 ? 2 : 1 : 0;
#else
  return 0;
#endif
}

// From now on work is shared by this team's threads, or where it is null by threads of our own.
void hftcore_use_team(hftcore::Team team) { hftcore::team = team; }

// 0, or 1 when memory could not be had (nothing was changed), or 2 for an unknown op
int hftcore_run(int simd, int op, const hftcore::Job* job) {
  if (op < 0 || op > hftcore::LOGIT_GRADIENTS || simd < 0 || simd > hftcore_best_simd()) return 2;
#ifdef HFTCORE_PAIRS
  if (simd == 3 && hftcore::is_product(op) && job->dtype == hftcore::BFLOAT16)
    return hftcore::avx512bf16::run_product<hftcore::BFloat16>(op, *job) ? 0 : 1;
#endif
#ifdef HFTCORE_X86
  if (simd >= 2) return hftcore::avx512::run(op, *job) ? 0 : 1;
  if (simd == 1) return hftcore::avx2::run(op, *job) ? 0 : 1;
#endif
  return hftcore::portable::run(op, *job) ? 0 : 1;
}
}
#pragma GCC visibility pop
