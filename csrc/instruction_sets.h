// The passes over a row, compiled for several instruction sets, and the choice among them at run time.

#pragma once

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "dtypes.h"
#include "pending.h"
#include "sums.h"

#define EM_INLINE static inline __attribute__((always_inline))

// How vectors wider than the registers are passed does not matter: only functions that are inlined take any.
#pragma GCC diagnostic ignored "-Wpsabi"

#define EM_LANES 4
#define EM_NAMESPACE baseline
#include "lanes.h"
#include "exponential.h"
#include "passes.h"
#include "pairs.h"
#undef EM_LANES
#undef EM_NAMESPACE

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define EM_LANES 8
#define EM_NAMESPACE avx2
#include "lanes.h"
#include "exponential.h"
#include "passes.h"
#include "pairs.h"
#undef EM_LANES
#undef EM_NAMESPACE
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma")
#endif
#define EM_LANES 16
#define EM_NAMESPACE avx512
#include "lanes.h"
#include "exponential.h"
#include "passes.h"
#include "pairs.h"
#undef EM_LANES
#undef EM_NAMESPACE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

namespace {

struct Kernels {
  decltype(&baseline::row_sums) row_sums;
  decltype(&baseline::row_gradient) row_gradient;
  decltype(&baseline::row_sums_beside) row_sums_beside;
  decltype(&baseline::pending_gradient) pending_gradient;
  decltype(&baseline::logit) logit;
  decltype(&baseline::set) set;
};

#define EM_KERNELS(isa)                                                                                             \
  {isa::row_sums, isa::row_gradient, isa::row_sums_beside, isa::pending_gradient, isa::logit, isa::set}

constexpr Kernels kKernels[] = {
    EM_KERNELS(baseline),
#if defined(__x86_64__)
    EM_KERNELS(avx2),
    EM_KERNELS(avx512),
#endif
};

inline int best_instructions() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // This may run before the constructor that would do it.
  if (__builtin_cpu_supports("avx512f")) return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
  return 0;
}

std::atomic<int> instructions{best_instructions()};

inline const Kernels& kernels() { return kKernels[instructions]; }

}  // namespace
