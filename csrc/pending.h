// A row whose sums are known and whose gradient is still to be written, from exponentials that were kept.

#pragma once

#include <cstdint>
#include <vector>

#include "sums.h"

namespace {

// 8 KiB of floats: a block, the one that is being prefetched, and a few vectors of four other streams share a first-level
// cache of 32 KiB. Twice as much takes 1.1 to 1.3 times as long where a row is a multiple of 4 KiB, and the streams' lines
// fall into the same sets.
constexpr int64_t kBlock = 2048;

// The exponentials e^((z - m) / tau) of a row, and the m of each of its blocks: the maximum of all logits up to its end.
class Exponentials {
 public:
  float *values = nullptr, *maxima = nullptr;

  void fit(int64_t vocab) {
    // A vector that lies across two cache lines is loaded and stored as two. The row's last vector is stored whole.
    constexpr int64_t kLine = 64 / sizeof(float);
    const size_t size = static_cast<size_t>(kLine + vocab + kLine + vocab / kBlock + 1);
    if (numbers_.size() < size) numbers_.resize(size);
    const int64_t first = static_cast<int64_t>(reinterpret_cast<uintptr_t>(numbers_.data()) / sizeof(float));
    values = numbers_.data() + (kLine - first % kLine) % kLine;
    maxima = values + vocab + kLine;
  }

 private:
  std::vector<float> numbers_;
};

// The gradient e^((z - m) / tau) (a + b (z - m)) of a row: what it is made of, and where it is written.
struct PendingGradient {
  const void* z;
  const Exponentials* exponentials;
  float m;
  Scale scale;
  double a, b;
  void* out;
  bool past_cache;
};

}  // namespace
