// The entropy of a row times its weight, and the gradient of that.

#pragma once

#include <cmath>
#include <cstdint>
#include <new>
#include <optional>

#include "instruction_sets.h"
#include "pending.h"
#include "rows.h"
#include "sums.h"

namespace {

// One thread's rows. The gradient of a row is written beside the sums of the next, or by `finish`.
class WeightedEntropy {
 public:
  WeightedEntropy(const Logits& logits, const Gradient& out, int64_t vocab, const Softcap& cap, bool past_cache)
      : logits_(logits), out_(out), vocab_(vocab), cap_(cap), past_cache_(past_cache) {
    // Under a cap a gradient needs the slopes too.
    if (!out.first || cap) return;
    try {
      for (Exponentials& buffer : buffers()) buffer.fit(vocab);
      keeps_ = true;
    } catch (const std::bad_alloc&) {
      // Without the memory for them, the exponentials are made twice.
    }
  }

  double operator()(int64_t r, double weight, const Scale& scale) {
    const void* const z = logits_[r];
    Exponentials& kept = buffers()[turn_];
    Sums sums;
    if (keeps_) {
      sums = kernels().row_sums_beside(z, vocab_, logits_.dtype, out_.dtype, scale, kept, before_ ? &*before_ : nullptr);
      before_.reset();
    }
    // The exponentials of such a row are made with more care than those that are kept.
    const bool careful = keeps_ && all_but_one_hot(sums.a, vocab_);
    if (!keeps_ || careful) sums = kernels().row_sums(z, vocab_, logits_.dtype, -1, scale, cap_, Wanted::kEntropy);
    // Of a row that is all -inf this is 0 / 0.
    const double mean_d = sums.a / sums.s;
    if (out_.first) {
      const double factor = weight * scale.inv_tau_exact / sums.s;
      // Of z - m, which kept exponentials are multiplied by, the factor must be a float: it is not at all temperatures.
      const double of_logits = factor * scale.inv_tau_exact;
      if (keeps_ && !careful && of_logits > 1e-25 && of_logits < 1e25) {
        before_ = PendingGradient{z, &kept, sums.m, scale, factor * mean_d, -of_logits, out_[r], past_cache_};
        turn_ = 1 - turn_;
      } else {
        const Polynomial polynomial{static_cast<float>(factor * mean_d), static_cast<float>(-factor), 0.0f};
        kernels().row_gradient(z, vocab_, logits_.dtype, sums.m, scale, cap_, polynomial,
                               all_but_one_hot(sums.a, vocab_), past_cache_, out_[r], out_.dtype);
      }
    }
    return weight * (std::log(sums.s) - mean_d);
  }

  void finish() {
    if (before_) kernels().pending_gradient(*before_, vocab_, logits_.dtype, out_.dtype);
  }

 private:
  const Logits& logits_;
  const Gradient& out_;
  const int64_t vocab_;
  const Softcap& cap_;
  const bool past_cache_;
  std::optional<PendingGradient> before_;
  int turn_ = 0;
  bool keeps_ = false;

  // They stay with the thread: their pages are mapped once.
  static Exponentials (&buffers())[2] {
    static thread_local Exponentials two[2];
    return two;
  }
};

}  // namespace
