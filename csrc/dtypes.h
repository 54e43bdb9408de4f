// The dtypes of logits and gradients.

#pragma once

#include <cstdint>

namespace {

// The numbers are those that native.py passes. 16-bit numbers are handled as their bits.
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t size_of(Dtype dtype) { return dtype == kFloat32 ? 4 : 2; }

// The number at index i of an array of the dtype.
inline const void* element(const void* array, int64_t i, Dtype dtype) {
  return static_cast<const char*>(array) + i * size_of(dtype);
}

inline void* element(void* array, int64_t i, Dtype dtype) { return static_cast<char*>(array) + i * size_of(dtype); }

}  // namespace
