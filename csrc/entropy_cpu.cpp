// Entropy statistics of softmax rows and their gradient on the CPU, in float32, behind a plain C interface.
//
// For a row of logits z with maximum m and d_j = (z_j - m) / tau, one pass over the row accumulates
//
//     s = sum e^d      a = sum d e^d      b = sum d^2 e^d      and on request sum d and sum e^(2 d)
//
// over every column but the target's, whose part is added in float64: the log-probability and the gradient of a target
// are functions of the sum over the other columns, which a sum that holds the target's own 1 would round away. A second
// pass writes the gradient e^d_j (A + B d_j + C d_j^2), and the target's entry is computed apart. The entropy is
// H = log s - a/s; its gradient w.r.t. z_j is -(1/tau) / s * e^d_j (d_j - a/s), where log s has cancelled, which keeps
// it accurate in rows that are almost one-hot. The formulas of the other statistics are those of ops/statistics.py.
// Under a soft cap c, c tanh(z / c) takes the place of z, and the gradient is multiplied by the slope of that.
//
// Passes over memory: row_sums reads the logits once, in blocks that stay in the first-level cache between the search for
// their maximum and their exponentials; the totals move to a new maximum when a block brings one. em_row_gradient reads the
// row again and writes its gradient. em_entropy_with_gradient keeps the exponentials of a row, and writes its gradient from
// them, out of the second-level cache, in the loop that makes the sums of the next row.
//
// Precision: logits of 16 bits become floats as they are read, and a gradient of 16 bits is rounded once as it is written.
// Lanes sum a few terms in float32, their sums are totalled in float64, and the results of a row are made of
// those in float64 and rounded once. A row of all -inf, or with a NaN or +inf, has NaN statistics and a NaN gradient;
// -inf elsewhere contributes exactly 0. A row's results depend on nothing but the row, and the loss is summed in the
// rows' order: both are the same bits for any number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "dtypes.h"
#include "instruction_sets.h"
#include "rows.h"
#include "statistics.h"
#include "sums.h"
#include "threads.h"
#include "weighted_entropy.h"

#define EM_EXPORT extern "C" __attribute__((visibility("default")))

// Arguments that all functions share.
//   logits        rows of `vocab` numbers of `dtype`, as dtypes.h numbers them; row r starts
//                 (r / inner) * outer_stride + (r % inner) * inner_stride numbers after the first.
//   softcap       the soft cap of the logits, or 0 for none.
//   kept          of each row, uint8, or NULL; a row that is not kept is not read, and all its results are 0.
//   target        of each row, or NULL. One that lies outside [0, vocab) is no column.
//   temperature   of each row, or NULL: temperature_all is that of every row.
//   out           the gradient's rows, of out_dtype and with two strides as the logits' are; or logits itself: each
//                 gradient row replaces its logits.
//   threads       the most threads to use; small inputs stay on the calling thread.

// Sets the sums of every row over all columns but the target's. b may be NULL, and so may all of count, sum_d and sum_e2.
EM_EXPORT void em_row_sums(const void* logits, int dtype, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                           int64_t rows, int64_t vocab, double softcap, const uint8_t* kept, const int64_t* target,
                           const float* temperature, double temperature_all, float* m, float* s, float* a, float* b,
                           float* count, float* sum_d, float* sum_e2, int threads) {
  const Logits z{logits, static_cast<Dtype>(dtype), inner, outer_stride, inner_stride};
  const Softcap cap(softcap);
  const Wanted wanted = count ? Wanted::kExtra : b ? Wanted::kSecondMoment : Wanted::kEntropy;
  for_each_row(rows, vocab, rows_at_a_time(vocab), threads, [&](int64_t r) {
    Sums sums{};
    if (!kept || kept[r]) {
      const Scale scale = Scale::of_temperature(temperature ? temperature[r] : temperature_all);
      sums = kernels().row_sums(z[r], vocab, z.dtype, target ? target[r] : -1, scale, cap, wanted);
    }
    m[r] = sums.m;
    s[r] = static_cast<float>(sums.s);
    a[r] = static_cast<float>(sums.a);
    if (b) b[r] = static_cast<float>(sums.b);
    if (!count) return;
    count[r] = static_cast<float>(sums.count);
    sum_d[r] = static_cast<float>(sums.sum_d);
    sum_e2[r] = static_cast<float>(sums.sum_e2);
  });
}

// Sets the statistics of every row, and in `saved`, (7, rows), what its gradient needs. A row whose target is out of
// range is NaN. logprob is NULL where target is; varentropy and extra, (4, rows), may be NULL.
EM_EXPORT void em_row_statistics(const void* logits, int dtype, int64_t inner, int64_t outer_stride,
                                 int64_t inner_stride, int64_t rows, int64_t vocab, double softcap, const uint8_t* kept,
                                 const int64_t* target, const float* temperature, double temperature_all,
                                 float* entropy, float* lse, float* logprob, float* varentropy, float* extra,
                                 float* saved, int threads) {
  const Logits z{logits, static_cast<Dtype>(dtype), inner, outer_stride, inner_stride};
  const Softcap cap(softcap);
  const Wanted wanted = extra ? Wanted::kExtra : varentropy ? Wanted::kSecondMoment : Wanted::kEntropy;
  for_each_row(rows, vocab, rows_at_a_time(vocab), threads, [&](int64_t r) {
    Statistics row{};
    if (!kept || kept[r]) {
      const int64_t t = target ? target[r] : -1;
      const bool exists = t >= 0 && t < vocab;
      const float target_logit = exists ? kernels().logit(element(z[r], t, z.dtype), z.dtype, cap).value : kNaN;
      const Scale scale = Scale::of_temperature(temperature ? temperature[r] : temperature_all);
      const Sums sums = kernels().row_sums(z[r], vocab, z.dtype, t, scale, cap, wanted);
      row = finish(sums, target ? &target_logit : nullptr, scale, varentropy != nullptr);
    }
    const auto set = [r](float* to, double value) { if (to) to[r] = static_cast<float>(value); };
    set(entropy, row.entropy);
    set(lse, row.lse);
    set(logprob, row.logprob);
    set(varentropy, row.varentropy);
    for (int i = 0; extra && i < 4; ++i) set(extra + i * rows, row.extra[i]);
    for (int i = 0; i < 7; ++i) set(saved + i * rows, row.saved[i]);
  });
}

// The gradient of every row from `saved` of em_row_statistics and the gradients of its statistics, each of any stride, or
// NULL. A target is NULL where grad_logprob is.
EM_EXPORT void em_row_gradient(const void* logits, int dtype, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                               int64_t rows, int64_t vocab, double softcap, const float* saved, const int64_t* target,
                               const float* grad_entropy, int64_t entropy_stride, const float* grad_lse,
                               int64_t lse_stride, const float* grad_logprob, int64_t logprob_stride,
                               const float* grad_varentropy, int64_t varentropy_stride, void* out, int out_dtype,
                               int64_t out_outer_stride, int64_t out_inner_stride, int threads) {
  const Logits z{logits, static_cast<Dtype>(dtype), inner, outer_stride, inner_stride};
  const Gradient gradient{out, static_cast<Dtype>(out_dtype), inner, out_outer_stride, out_inner_stride};
  const Softcap cap(softcap);
  const Writing writing(z, gradient, rows, vocab, threads);
  const Upstream upstream{{grad_entropy, entropy_stride},
                          {grad_lse, lse_stride},
                          {grad_logprob, logprob_stride},
                          {grad_varentropy, varentropy_stride}};
  const auto write_row = [&](int64_t r) {
    void* const to = gradient[r];
    const Saved row(saved, rows, r);
    if (row.scale == 0) {
      std::memset(to, 0, static_cast<size_t>(vocab * size_of(gradient.dtype)));
      return;
    }
    const Scale scale(row.scale);
    const Coefficients coefficients(row, scale.inv_tau_exact, upstream, r);
    const int64_t t = target ? target[r] : -1;
    const bool has_target = t >= 0 && t < vocab;
    // Read before the loop, which may write the gradient over the logits.
    const Logit of_target = has_target ? kernels().logit(element(z[r], t, z.dtype), z.dtype, cap) : Logit{};
    const bool exact = all_but_one_hot(row.mean_d * row.s, vocab);
    kernels().row_gradient(z[r], vocab, z.dtype, static_cast<float>(row.m), scale, cap, coefficients.in_d(), exact,
                           writing.past_cache, to, gradient.dtype);
    if (!has_target) return;
    const double value = coefficients.at_target((of_target.value - row.m) * scale.inv_tau_exact);
    kernels().set(element(to, t, gradient.dtype), gradient.dtype, static_cast<float>(value * of_target.slope));
  };
  share_rows(rows, vocab, writing.rows_at_a_time, threads, [&](const auto& next) {
    for (int64_t r; (r = next()) >= 0;) write_row(r);
    writing.finish();
  });
}

// Returns sum_r w_r H_r / divisor, and sets `out`, unless it is NULL, to its gradient. w_r is kept[r] or token_weight[r], or
// 1 where both are NULL; a row whose weight is 0 is not kept. `of_weights` multiplies the divisor by the sum of the
// weights, of which 0 counts as 1.
EM_EXPORT float em_entropy_with_gradient(const void* logits, int dtype, int64_t inner, int64_t outer_stride,
                                         int64_t inner_stride, int64_t rows, int64_t vocab, double softcap,
                                         const uint8_t* kept, const float* token_weight, double divisor,
                                         int of_weights, const float* temperature, double temperature_all, void* out,
                                         int out_dtype, int64_t out_outer_stride, int64_t out_inner_stride,
                                         int threads) {
  const Logits z{logits, static_cast<Dtype>(dtype), inner, outer_stride, inner_stride};
  const Gradient gradient{out, static_cast<Dtype>(out_dtype), inner, out_outer_stride, out_inner_stride};
  const Softcap cap(softcap);
  const Writing writing(z, gradient, rows, vocab, threads);
  const auto weight = [&](int64_t r) { return kept ? kept[r] : token_weight ? token_weight[r] : 1.0; };
  if (of_weights) {
    double total = 0;
    for (int64_t r = 0; r < rows; ++r) total += weight(r);
    divisor *= total == 0 ? 1 : total;
  }
  std::vector<double> weighted(static_cast<size_t>(rows));
  share_rows(rows, vocab, writing.rows_at_a_time, threads, [&](const auto& next) {
    WeightedEntropy entropy(z, gradient, vocab, cap, writing.past_cache);
    for (int64_t r; (r = next()) >= 0;) {
      const double w = weight(r);
      if (w != 0) {
        const Scale scale = Scale::of_temperature(temperature ? temperature[r] : temperature_all);
        weighted[static_cast<size_t>(r)] = entropy(r, w / divisor, scale);
      } else if (out) {
        std::memset(gradient[r], 0, static_cast<size_t>(vocab * size_of(gradient.dtype)));
      }
    }
    entropy.finish();
    writing.finish();
  });
  double sum = 0;
  for (const double x : weighted) sum += x;
  return static_cast<float>(sum);
}

// Limits the instruction set from now on, for tests: 0 the baseline, 1 AVX2, 2 AVX-512. Returns the one that will be used.
EM_EXPORT int em_limit_instructions(int limit) { return instructions = std::min(limit, best_instructions()); }
