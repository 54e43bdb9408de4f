// The rows of logits and of their gradient in memory.

#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtypes.h"

namespace {

// Row r starts (r / inner) * outer_stride + (r % inner) * inner_stride numbers after `first`.
template <class Pointer>
struct Rows {
  Pointer first;
  Dtype dtype;
  int64_t inner, outer_stride, inner_stride;

  Pointer operator[](int64_t r) const {
    return element(first, (r / inner) * outer_stride + (r % inner) * inner_stride, dtype);
  }
};

using Logits = Rows<const void*>;
using Gradient = Rows<void*>;

// A gradient this large is not left in the cache, and lies on pages that the allocator has just mapped (glibc takes larger
// allocations from the kernel, always). Measured on 100 MB: stores that bypass the cache take 0.85 of the time into memory
// in use; huge pages take 0.3 to 0.4 of it into memory touched for the first time.
constexpr int64_t kLargeGradient = int64_t{32} << 20;

// How the rows of a gradient are written.
struct Writing {
  bool past_cache = false;

  Writing(const Logits& logits, const Gradient& out, int64_t rows, int64_t vocab) {
    if (rows == 0 || !out.first) return;
    const char* const first = static_cast<const char*>(out.first);
    const char* const end = static_cast<const char*>(element(out[rows - 1], vocab, out.dtype));
    if (out.first == logits.first || end - first < kLargeGradient) return;
    past_cache = true;
#if defined(__linux__)
    constexpr uintptr_t page = 4096;
    const uintptr_t from = (reinterpret_cast<uintptr_t>(first) + page - 1) / page * page;
    const uintptr_t to = reinterpret_cast<uintptr_t>(end) / page * page;
    madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // Advice: a kernel that refuses loses only speed.
#endif
  }

  // Stores past the cache are not ordered before what tells another thread that they are done.
  void finish() const {
#if defined(__x86_64__)
    if (past_cache) _mm_sfence();
#endif
  }
};

}  // namespace
