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

// A function takes all of its arguments as one, which native.py packs in this order: Python converts them at once in a fifth
// of the time that it needs for them one by one.

// What every function is given.
struct Given {
  Logits logits;
  int64_t rows, vocab;
  double softcap;   // Of the logits, or 0 for none.
  int64_t threads;  // The most to use; small inputs stay on the calling thread.
};

struct Temperature {
  const float* of_row;  // Or NULL, and `of_all` is that of every row.
  double of_all;

  Scale operator[](int64_t r) const { return Scale::of_temperature(of_row ? of_row[r] : of_all); }
};

// A row that is not kept is not read, and all its results are 0.
struct Kept {
  const uint8_t* rows;  // Or NULL, where all are.

  bool operator[](int64_t r) const { return !rows || rows[r]; }
};

struct Target {
  const int64_t* columns;  // Of each row, or NULL. One that lies outside [0, vocab) is no column.

  int64_t operator[](int64_t r) const { return columns ? columns[r] : -1; }
};

struct RowSums {
  Given given;
  Kept kept;
  Target target;
  Temperature temperature;
  float *m, *s, *a, *b, *count, *sum_d, *sum_e2;  // b may be NULL, and so may all of count, sum_d and sum_e2.
};

// Sets the sums of every row over all columns but the target's.
EM_EXPORT void em_row_sums(const RowSums& at) {
  const Given& in = at.given;
  const Softcap cap(in.softcap);
  const Wanted wanted = at.count ? Wanted::kExtra : at.b ? Wanted::kSecondMoment : Wanted::kEntropy;
  for_each_row(in.rows, in.vocab, in.threads, [&](int64_t r) {
    Sums sums{};
    if (at.kept[r]) {
      const Logits& z = in.logits;
      sums = kernels().row_sums(z[r], in.vocab, z.dtype, at.target[r], at.temperature[r], cap, wanted);
    }
    at.m[r] = sums.m;
    at.s[r] = static_cast<float>(sums.s);
    at.a[r] = static_cast<float>(sums.a);
    if (at.b) at.b[r] = static_cast<float>(sums.b);
    if (!at.count) return;
    at.count[r] = static_cast<float>(sums.count);
    at.sum_d[r] = static_cast<float>(sums.sum_d);
    at.sum_e2[r] = static_cast<float>(sums.sum_e2);
  });
}

struct RowStatistics {
  Given given;
  Kept kept;
  Target target;
  Temperature temperature;
  float *entropy, *lse, *logprob, *varentropy, *extra;  // logprob is NULL where target is; the next two may be NULL.
  float* saved;
};

// Sets the statistics of every row, and in `saved`, (7, rows), what its gradient needs; `extra` is (4, rows). A row whose
// target is out of range is NaN.
EM_EXPORT void em_row_statistics(const RowStatistics& at) {
  const Given& in = at.given;
  const Logits& z = in.logits;
  const Softcap cap(in.softcap);
  const Wanted wanted = at.extra ? Wanted::kExtra : at.varentropy ? Wanted::kSecondMoment : Wanted::kEntropy;
  for_each_row(in.rows, in.vocab, in.threads, [&](int64_t r) {
    Statistics row{};
    if (at.kept[r]) {
      const int64_t t = at.target[r];
      const bool exists = t >= 0 && t < in.vocab;
      const float target_logit = exists ? kernels().logit(element(z[r], t, z.dtype), z.dtype, cap).value : kNaN;
      const Scale scale = at.temperature[r];
      const Sums sums = kernels().row_sums(z[r], in.vocab, z.dtype, t, scale, cap, wanted);
      row = finish(sums, at.target.columns ? &target_logit : nullptr, scale, at.varentropy != nullptr);
    }
    const auto set = [r](float* to, double value) { if (to) to[r] = static_cast<float>(value); };
    set(at.entropy, row.entropy);
    set(at.lse, row.lse);
    set(at.logprob, row.logprob);
    set(at.varentropy, row.varentropy);
    for (int i = 0; at.extra && i < 4; ++i) set(at.extra + i * in.rows, row.extra[i]);
    for (int i = 0; i < 7; ++i) set(at.saved + i * in.rows, row.saved[i]);
  });
}

struct RowGradient {
  Given given;
  const float* saved;  // By em_row_statistics.
  Target target;       // NULL where the upstream gradient of logprob is.
  Upstream upstream;   // Of each statistic, at any stride, or NULL.
  Gradient out;        // Or the logits themselves: each row's gradient replaces its logits.
};

// Sets the gradient of every row.
EM_EXPORT void em_row_gradient(const RowGradient& at) {
  const Given& in = at.given;
  const Logits& z = in.logits;
  const Gradient& out = at.out;
  const Softcap cap(in.softcap);
  const Writing writing(z, out, in.rows, in.vocab);
  const auto write_row = [&](int64_t r) {
    void* const to = out[r];
    const Saved row(at.saved, in.rows, r);
    if (row.scale == 0) {
      std::memset(to, 0, static_cast<size_t>(in.vocab * size_of(out.dtype)));
      return;
    }
    const Scale scale(row.scale);
    const Coefficients coefficients(row, scale.inv_tau_exact, at.upstream, r);
    const int64_t t = at.target[r];
    const bool has_target = t >= 0 && t < in.vocab;
    // Read before the loop, which may write the gradient over the logits.
    const Logit of_target = has_target ? kernels().logit(element(z[r], t, z.dtype), z.dtype, cap) : Logit{};
    const bool exact = all_but_one_hot(row.mean_d * row.s, in.vocab);
    kernels().row_gradient(z[r], in.vocab, z.dtype, static_cast<float>(row.m), scale, cap, coefficients.in_d(), exact,
                           writing.past_cache, to, out.dtype);
    if (!has_target) return;
    const double value = coefficients.at_target((of_target.value - row.m) * scale.inv_tau_exact);
    kernels().set(element(to, t, out.dtype), out.dtype, static_cast<float>(value * of_target.slope));
  };
  share_rows(in.rows, in.vocab, in.threads, [&](const auto& next) {
    for (int64_t r; (r = next()) >= 0;) write_row(r);
    writing.finish();
  });
}

// A row of weight 0 is not read. The weight is 1 where both pointers are NULL.
struct TokenWeight {
  const uint8_t* is_one;
  const float* weight;

  double operator[](int64_t r) const { return is_one ? is_one[r] : weight ? weight[r] : 1.0; }
};

struct EntropyWithGradient {
  Given given;
  TokenWeight token_weight;
  double divisor;
  int64_t of_weights;  // Whether the sum of the weights, of which 0 counts as 1, multiplies the divisor.
  Temperature temperature;
  Gradient out;  // Or NULL, or the logits themselves: each row's gradient replaces its logits.
};

// Returns sum_r w_r H_r / divisor, and sets `out` to its gradient.
EM_EXPORT float em_entropy_with_gradient(const EntropyWithGradient& at) {
  const Given& in = at.given;
  const Softcap cap(in.softcap);
  const Writing writing(in.logits, at.out, in.rows, in.vocab);
  double divisor = at.divisor;
  if (at.of_weights) {
    double total = 0;
    for (int64_t r = 0; r < in.rows; ++r) total += at.token_weight[r];
    divisor *= total == 0 ? 1 : total;
  }
  std::vector<double> weighted(static_cast<size_t>(in.rows));
  share_rows(in.rows, in.vocab, in.threads, [&](const auto& next) {
    WeightedEntropy entropy(in.logits, at.out, in.vocab, cap, writing.past_cache);
    for (int64_t r; (r = next()) >= 0;) {
      const double w = at.token_weight[r];
      if (w != 0) {
        weighted[static_cast<size_t>(r)] = entropy(r, w / divisor, at.temperature[r]);
      } else if (at.out.first) {
        std::memset(at.out[r], 0, static_cast<size_t>(in.vocab * size_of(at.out.dtype)));
      }
    }
    entropy.finish();
    writing.finish();
  });
  double sum = 0;
  for (const double x : weighted) sum += x;
  return static_cast<float>(sum);
}

// The bytes of a function's arguments, by which a caller from other sources than these is told.
#define EM_SIZE(function, Arguments) \
  EM_EXPORT int function##_size() { return static_cast<int>(sizeof(Arguments)); }
EM_SIZE(em_row_sums, RowSums)
EM_SIZE(em_row_statistics, RowStatistics)
EM_SIZE(em_row_gradient, RowGradient)
EM_SIZE(em_entropy_with_gradient, EntropyWithGradient)

// Limits the instruction set from now on, for tests: 0 the baseline, 1 AVX2, 2 AVX-512. Returns the one that will be used.
EM_EXPORT int em_limit_instructions(int limit) { return instructions = std::min(limit, best_instructions()); }
