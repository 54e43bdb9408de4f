// The functions of a logit that all passes are made of: its exponential, and its soft cap with the slope of that.

namespace {
namespace EM_NAMESPACE {

struct Term {
  Float difference, exp;
};

// z - m and e^((z - m) / tau), for z <= m. The exponential is within 2 ulp where it is a normal number, 0 below, NaN for a
// NaN; of the rounded z - m unless `exact`.
EM_INLINE Term term(Float z, float m, const Scale& scale, bool exact) {
  // Adding 1.5 * 2^23 rounds to an integer n and leaves n in the low bits; 127 more makes them a float's exponent.
  const Float shift = broadcast(12582912.0f + 127.0f);
  const Float lowest = broadcast(scale.lowest), rounded = z - m;
  const Float difference = larger(lowest, rounded);
  const Float shifted = difference * scale.hi + shift;
  const Float n = shifted - shift;
  Float f = fused_multiply_add(difference, broadcast(scale.hi), -n);
  f = fused_multiply_add(difference, broadcast(scale.lo), f);
  if (exact) {
    const Float back = rounded - z, lost = (z - (rounded - back)) - (m + back);
    f = fused_multiply_add(rounded > lowest ? lost : Float{}, broadcast(scale.hi), f);
  }
  // 2^f on [-1/2, 1/2]: minimax in units in the last place (1.06 of them) with the constant term 1, so that e^0 = 1.
  Float p = 0x1.5aa136p-10f * f + 0x1.3cecc6p-7f;
  p = p * f + 0x1.c6bad0p-5f;
  p = p * f + 0x1.ebf9b4p-3f;
  p = p * f + 0x1.62e424p-1f;
  p = p * f + 1.0f;
  // n = -127, the lowest, becomes the factor 0. A product, unlike an addition to the exponent, keeps a NaN.
  const Float power = float_of(bits_of(shifted) << 23);
  return {difference, p * power};
}

struct Capped {
  Float value, slope;
};

// c tanh(z / c) within 2 ulp, and its derivative 1 - tanh^2, which keeps its relative accuracy where it is tiny: with
// e = e^(-2 |z| / c), tanh is 1 - 2 e / (1 + e) and its slope 4 e / (1 + e)^2. An infinity stays what it is: a banned
// token stays banned, and a logit that has overflowed is seen.
EM_INLINE Capped soft_cap(Float z, const Softcap& cap) {
  const Float x = magnitude(z), e = term(-x, 0.0f, cap.exponent, false).exp, r = 1.0f / (1.0f + e);
  const Float large = broadcast(cap.c) - 2.0f * cap.c * (e * r);
  // Up to 1, tanh y = y + y^3 P(y^2), with a P whose error is at most a tenth of a unit in the last place of tanh y.
  const Float y = x * cap.over_c, t = y * y;
  Float p = -0x1.77dd18p-12f * t + 0x1.2da4ecp-9f;
  p = p * t + -0x1.0460c0p-7f;
  p = p * t + 0x1.600992p-6f;
  p = p * t + -0x1.b96222p-5f;
  p = p * t + 0x1.110be2p-3f;
  p = p * t + -0x1.55553cp-2f;
  const Float small = x + x * (t * p), value = y > 1.0f ? large : small;
  const Bits sign = bits_of(z) & 0x80000000u;
  return {x == kInfinity ? z : float_of(bits_of(value) | sign), 4.0f * e * (r * r)};
}

}  // namespace EM_NAMESPACE
}  // namespace
