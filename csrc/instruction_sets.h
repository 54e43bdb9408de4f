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
#include "sums.h"

#define EM_INLINE static inline __attribute__((always_inline))

// How vectors wider than the registers are passed does not matter: only functions that are inlined take any.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace {

// 16 KiB: half of a first-level cache, the other half holds the block that is being prefetched. Not critical: 2048 is as
// fast within 5 %.
constexpr int64_t kBlock = 4096;

}  // namespace

#define EM_LANES 4
#define EM_NAMESPACE baseline
#include "lanes.h"
#include "exponential.h"
#include "passes.h"
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
  decltype(&baseline::logit) logit;
  decltype(&baseline::set) set;
};

constexpr Kernels kKernels[] = {
    {baseline::row_sums, baseline::row_gradient, baseline::logit, baseline::set},
#if defined(__x86_64__)
    {avx2::row_sums, avx2::row_gradient, avx2::logit, avx2::set},
    {avx512::row_sums, avx512::row_gradient, avx512::logit, avx512::set},
#endif
};

inline int best_instructions() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
  return 0;
}

std::atomic<int> instructions{best_instructions()};

inline const Kernels& kernels() { return kKernels[instructions]; }

}  // namespace
