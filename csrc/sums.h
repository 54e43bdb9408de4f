// The sums over a row, and the numbers that their terms and those of the gradient depend on.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kLog2e = 1.4426950408889634;

// exp is computed as a power of two: e^((z - m) / tau) = 2^((z - m) c). The two parts of c = log2(e) / tau keep the exponent
// accurate for any difference. Differences below `lowest` have e^d = 0: the smallest exponents would be subnormal.
struct Scale {
  float hi, lo, lowest, inv_tau;
  double inv_tau_exact;

  explicit Scale(double c) : hi(static_cast<float>(c)), lo(static_cast<float>(c - hi)) {
    lowest = static_cast<float>(-127 / c);
    inv_tau_exact = c / kLog2e;
    inv_tau = static_cast<float>(inv_tau_exact);
  }

  static Scale of_temperature(double tau) { return Scale(kLog2e / tau); }
};

// The soft cap: c tanh(z / c) takes the place of the logit z. No cap where c is 0. Both tanh(z / c) and its slope are made
// of e^(-2 |z| / c).
struct Softcap {
  float c, over_c;
  Scale exponent;

  explicit Softcap(double cap)
      : c(static_cast<float>(cap)), over_c(static_cast<float>(1 / cap)), exponent(2 * kLog2e / cap) {}

  explicit operator bool() const { return c != 0; }
};

// A logit as the passes see it, and its derivative by the logit in memory.
struct Logit {
  float value, slope;
};

// Which sums a pass makes; each choice includes the one before.
enum class Wanted { kEntropy, kSecondMoment, kExtra };

// e^-800 is 0 in float64, and (-800) e^-800 is 0 where (-inf) * 0 is NaN.
constexpr double kLowestExponent = -800;

// The sums over `count` columns of a row; m is -inf and the sums are 0 where all of these logits are -inf.
struct Sums {
  float m;
  double s, a, b, sum_d, sum_e2;
  int64_t count;

  // Measures d from the maximum of more columns.
  void move_to(float maximum, double inv_tau) {
    // Equal maxima may both be -inf, whose difference is NaN.
    double D = m == maximum ? 0 : (static_cast<double>(m) - maximum) * inv_tau;
    m = maximum;
    if (count > 0) sum_d += static_cast<double>(count) * D;
    D = std::max(D, kLowestExponent);
    const double w = std::exp(D);
    b = w * (b + D * (2 * a + D * s));
    a = w * (a + D * s);
    s *= w;
    sum_e2 *= w * w;
  }
};

// The maximum itself adds 1 to s: there was none but -inf if s is 0, a NaN or +inf if it is NaN.
inline Sums checked(const Sums& sums) {
  if (sums.s == 0) return {-kInfinity, 0, 0, 0, 0, 0, sums.count};
  return sums.s >= 1 ? sums : Sums{kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, sums.count};
}

// Whether all of a row of n but its maxima may lie more than 28 nats below them, where -a <= n 28 e^-28. The row's gradient
// is then the exponential of the next one, in which the rounding of z - m, 6e-8 of it, comes to 1.7e-6. Of a row whose
// target is left out it is the other columns that this is asked of: the target's part is exact.
inline bool all_but_one_hot(double a, int64_t n) { return -a <= 2e-11 * static_cast<double>(n); }

// e^d (a + b d + c d^2)
struct Polynomial {
  float a, b, c;
};

}  // namespace
