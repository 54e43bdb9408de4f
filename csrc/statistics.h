// The statistics of a row from its sums, and the coefficients of its gradient: ops/statistics.py in C++.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "sums.h"

namespace {

// The statistics of a row, and what its gradient needs; the order of `extra` and `saved` is that of ops/types.py.
struct Statistics {
  double entropy, lse, logprob, varentropy, extra[4], saved[7];
};

// The statistics from the sums over all columns but the target's, as `finish` of ops/statistics.py defines them.
// `target_logit` is NaN where the target is out of range, and NULL where there are no targets.
Statistics finish(Sums sums, const float* target_logit, const Scale& scale, bool second_moment) {
  const double inv_tau = scale.inv_tau_exact;
  Sums target{};
  bool is_top = false;
  if (target_logit) {
    const float z = *target_logit;
    const double one = z == -kInfinity ? 0 : z == kInfinity ? kNaN : 1;
    target = {z, one, 0, 0, 0, one, 1};
    is_top = z >= sums.m;
    const float m = is_top ? z : sums.m;
    target.move_to(m, inv_tau);
    sums.move_to(m, inv_tau);
  }
  // A row that is all -inf has no distribution.
  const double total = sums.s + target.s, s = total > 0 ? total : kNaN;
  const double log_s = std::isnan(s) ? kNaN : is_top ? std::log1p(sums.s) : std::log(s);
  const double mean_d = (sums.a + target.a) / s;
  const double varentropy = second_moment ? std::max((sums.b + target.b) / s - mean_d * mean_d, 0.0) : 0;
  const double d_target = target_logit && !is_top ? (static_cast<double>(*target_logit) - sums.m) * inv_tau : 0;
  const double miss = target_logit ? sums.s / s : 0;
  const double top1 = std::isnan(s) ? kNaN : is_top;
  const double mean_logprob = (sums.sum_d + target.sum_d) / static_cast<double>(sums.count + target.count) - log_s;
  const double collision = (sums.sum_e2 + target.sum_e2) / (s * s);
  return {log_s - mean_d,
          sums.m * inv_tau + log_s,
          d_target - log_s,
          varentropy,
          {1 / s, top1, mean_logprob, collision},
          {sums.m, s, mean_d, varentropy, miss, scale.hi, scale.lo}};
}

// `planes` is what em_row_statistics has saved.
struct Saved {
  double m, s, mean_d, varentropy, miss, scale;

  Saved(const float* planes, int64_t rows, int64_t r) {
    const auto plane = [=](int i) { return static_cast<double>(planes[i * rows + r]); };
    m = plane(0);
    s = plane(1);
    mean_d = plane(2);
    varentropy = plane(3);
    miss = plane(4);
    scale = plane(5) + plane(6);
  }
};

// One number a row, at any stride; 0 where the pointer is NULL.
struct Column {
  const float* values;
  int64_t stride;

  double operator[](int64_t r) const { return values ? values[r * stride] : 0.0; }
};

// The gradients of the loss w.r.t. the statistics.
struct Upstream {
  Column entropy, lse, logprob, varentropy;
};

// The gradient of a row as `coefficients` of ops/statistics.py defines it: e^d (constant + linear u + quadratic u^2) with
// u = d - mean_d. At the target, `target_constant` takes the place of `constant`, and alpha is added.
struct Coefficients {
  double constant, linear, quadratic, target_constant, alpha, mean_d;

  Coefficients(const Saved& saved, double inv_tau, const Upstream& upstream, int64_t r) : mean_d(saved.mean_d) {
    const double over_s = inv_tau / saved.s;
    quadratic = upstream.varentropy[r] * over_s;
    linear = 2 * quadratic - upstream.entropy[r] * over_s;
    target_constant = upstream.lse[r] * over_s - quadratic * saved.varentropy;
    constant = target_constant - upstream.logprob[r] * over_s;
    alpha = upstream.logprob[r] * inv_tau * saved.miss;
  }

  Polynomial in_d() const {
    return {static_cast<float>(constant + mean_d * (mean_d * quadratic - linear)),
            static_cast<float>(linear - 2 * mean_d * quadratic), static_cast<float>(quadratic)};
  }

  float at_target(double d) const {
    d = std::max(d, kLowestExponent);
    const double u = d - mean_d;
    return static_cast<float>(std::exp(d) * (target_constant + u * (linear + u * quadratic)) + alpha);
  }
};

}  // namespace
