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
//
// Passes over memory: row_sums reads the logits once, in blocks that stay in the first-level cache between the search for
// their maximum and their exponentials; the totals move to a new maximum when a block brings one. The gradient reads the
// row again, from the second-level cache where em_entropy_with_gradient has just read it, and writes it.
//
// Precision: lanes sum a few terms in float32, their sums are totalled in float64, and the results of a row are made of
// those in float64 and rounded once. A row of all -inf, or with a NaN or +inf, has NaN statistics and a NaN gradient;
// -inf elsewhere contributes exactly 0. A row's results depend on nothing but the row, and the loss is summed in the
// rows' order: both are the same bits for any number of threads.
//
// The file includes itself once per instruction set (EM_LANES defined) and picks one at run time.

#ifndef EM_LANES

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define EM_INLINE static inline __attribute__((always_inline))
#define EM_EXPORT extern "C" __attribute__((visibility("default")))

// How vectors wider than the registers are passed does not matter: only functions that are inlined take any.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// 16 KiB: half of a first-level cache, the other half holds the block that is being prefetched. Not critical: 2048 is as
// fast within 5 %.
constexpr int64_t kBlock = 4096;

// A gradient this large is not left in the cache, and lies on pages that the allocator has just mapped (glibc takes larger
// allocations from the kernel, always). Measured on 100 MB: stores that bypass the cache take 0.85 of the time into memory
// in use; huge pages take 0.3 to 0.4 of it into memory touched for the first time.
constexpr int64_t kLargeGradient = int64_t{32} << 20;

// 2^17 elements are 60 us of work, starting a thread takes 20 us.
constexpr int64_t kElementsPerThread = int64_t{1} << 17;

// exp is computed as a power of two: e^((z - m) / tau) = 2^((z - m) c). The two parts of c = log2(e) / tau keep the exponent
// accurate for any difference. Differences below `lowest` have e^d = 0: the smallest exponents would be subnormal.
struct Scale {
  float hi, lo, lowest, inv_tau;
  double inv_tau_exact;

  explicit Scale(double c) : hi(static_cast<float>(c)), lo(static_cast<float>(c - hi)) {
    lowest = static_cast<float>(-127 / c);
    inv_tau_exact = c * 0.6931471805599453;
    inv_tau = static_cast<float>(inv_tau_exact);
  }

  static Scale of_temperature(double tau) { return Scale(1.4426950408889634 / tau); }
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

// Whether all of a row of n but its maxima may lie more than 28 nats below them, where -a <= n 28 e^-28. The row's gradient
// is then the exponential of the next one, in which the rounding of z - m, 6e-8 of it, comes to 1.7e-6. Of a row whose
// target is left out it is the other columns that this is asked of: the target's part is exact.
bool all_but_one_hot(double a, int64_t n) { return -a <= 2e-11 * static_cast<double>(n); }

// e^d (a + b d + c d^2)
struct Polynomial {
  float a, b, c;
};

}  // namespace

#define EM_LANES 4
#define EM_NAMESPACE baseline
#include "entropy_cpu.cpp"
#undef EM_LANES
#undef EM_NAMESPACE

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define EM_LANES 8
#define EM_NAMESPACE avx2
#include "entropy_cpu.cpp"
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
#include "entropy_cpu.cpp"
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
  Sums (*row_sums)(const float*, int64_t, int64_t, const Scale&, Wanted);
  void (*row_gradient)(const float*, int64_t, float, const Scale&, const Polynomial&, bool, bool, float*);
};

constexpr Kernels kKernels[] = {
    {baseline::row_sums, baseline::row_gradient},
#if defined(__x86_64__)
    {avx2::row_sums, avx2::row_gradient},
    {avx512::row_sums, avx512::row_gradient},
#endif
};

int best_instructions() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

std::atomic<int> instructions{best_instructions()};

// Row r of logits whose rows have two strides, or of a contiguous gradient.
struct Rows {
  const float* logits;
  int64_t vocab, inner, outer_stride, inner_stride;
  float* out;

  const float* row(int64_t r) const { return logits + offset(r); }
  float* out_row(int64_t r) const { return in_place() ? out + offset(r) : out + r * vocab; }
  bool in_place() const { return out == logits; }
  int64_t offset(int64_t r) const { return (r / inner) * outer_stride + (r % inner) * inner_stride; }
};

template <class RowFunction>
void for_each_row(int64_t rows, int64_t vocab, int threads, const RowFunction& function) {
  // Threads take rows off a counter, 2^14 elements or a row at a time, whichever is more.
  const int64_t step = std::max<int64_t>(1, (int64_t{1} << 14) / std::max<int64_t>(1, vocab));
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t first; (first = next.fetch_add(step, std::memory_order_relaxed)) < rows;) {
      for (int64_t r = first; r < std::min(first + step, rows); ++r) function(r);
    }
  };
  const int64_t useful = std::min((rows + step - 1) / step, rows * vocab / kElementsPerThread);
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min<int64_t>(threads, useful); ++i) {
    try {
      others.emplace_back(work);
    } catch (const std::system_error&) {
      break;  // No more threads to be had: those that run do all the work.
    }
  }
  work();
  for (std::thread& other : others) other.join();
}

// Whether the gradient goes past the cache; asks for huge pages below it if so.
bool prepare_large_gradient(const Rows& at, int64_t rows) {
  const int64_t bytes = rows * at.vocab * int64_t{sizeof(float)};
  if (at.in_place() || bytes < kLargeGradient) return false;
#if defined(__linux__)
  constexpr uintptr_t page = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(at.out) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(at.out) + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // Advice: a kernel that refuses loses only speed.
#endif
  return true;
}

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

// Arguments that all functions share.
//   logits        rows of `vocab` float32; r starts at logits + (r / inner) * outer_stride + (r % inner) * inner_stride.
//   kept          of each row, uint8, or NULL; a row that is not kept is not read, and all its results are 0.
//   target        of each row, or NULL. One that lies outside [0, vocab) is no column.
//   temperature   of each row, or NULL: temperature_all is that of every row.
//   out           (rows, vocab), contiguous; or logits itself: each gradient row replaces its logits.
//   threads       the most threads to use; small inputs stay on the calling thread.

// Sets the sums of every row over all columns but the target's. b may be NULL, and so may all of count, sum_d and sum_e2.
EM_EXPORT void em_row_sums(const float* logits, int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t rows,
                           int64_t vocab, const uint8_t* kept, const int64_t* target, const float* temperature,
                           double temperature_all, float* m, float* s, float* a, float* b, float* count, float* sum_d,
                           float* sum_e2, int threads) {
  const Rows at{logits, vocab, inner, outer_stride, inner_stride, nullptr};
  const Kernels& kernels = kKernels[instructions];
  const Wanted wanted = count ? Wanted::kExtra : b ? Wanted::kSecondMoment : Wanted::kEntropy;
  for_each_row(rows, vocab, threads, [&](int64_t r) {
    Sums sums{};
    if (!kept || kept[r]) {
      const Scale scale = Scale::of_temperature(temperature ? temperature[r] : temperature_all);
      sums = kernels.row_sums(at.row(r), vocab, target ? target[r] : -1, scale, wanted);
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
EM_EXPORT void em_row_statistics(const float* logits, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                                 int64_t rows, int64_t vocab, const uint8_t* kept, const int64_t* target,
                                 const float* temperature, double temperature_all, float* entropy, float* lse,
                                 float* logprob, float* varentropy, float* extra, float* saved, int threads) {
  const Rows at{logits, vocab, inner, outer_stride, inner_stride, nullptr};
  const Kernels& kernels = kKernels[instructions];
  const Wanted wanted = extra ? Wanted::kExtra : varentropy ? Wanted::kSecondMoment : Wanted::kEntropy;
  for_each_row(rows, vocab, threads, [&](int64_t r) {
    Statistics row{};
    if (!kept || kept[r]) {
      const float* const z = at.row(r);
      const int64_t t = target ? target[r] : -1;
      const float target_logit = t >= 0 && t < vocab ? z[t] : kNaN;
      const Scale scale = Scale::of_temperature(temperature ? temperature[r] : temperature_all);
      const Sums sums = kernels.row_sums(z, vocab, t, scale, wanted);
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
EM_EXPORT void em_row_gradient(const float* logits, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                               int64_t rows, int64_t vocab, const float* saved, const int64_t* target,
                               const float* grad_entropy, int64_t entropy_stride, const float* grad_lse,
                               int64_t lse_stride, const float* grad_logprob, int64_t logprob_stride,
                               const float* grad_varentropy, int64_t varentropy_stride, float* out, int threads) {
  const Rows at{logits, vocab, inner, outer_stride, inner_stride, out};
  const Kernels& kernels = kKernels[instructions];
  const bool stream = prepare_large_gradient(at, rows);
  const Upstream upstream{{grad_entropy, entropy_stride},
                          {grad_lse, lse_stride},
                          {grad_logprob, logprob_stride},
                          {grad_varentropy, varentropy_stride}};
  for_each_row(rows, vocab, threads, [&](int64_t r) {
    const float* const z = at.row(r);
    float* const to = at.out_row(r);
    const Saved row(saved, rows, r);
    if (row.scale == 0) {
      std::fill_n(to, vocab, 0.0f);
      return;
    }
    const Scale scale(row.scale);
    const Coefficients coefficients(row, scale.inv_tau_exact, upstream, r);
    const int64_t t = target ? target[r] : -1;
    const bool has_target = t >= 0 && t < vocab;
    // Read before the loop, which may write the gradient over the logits.
    const double d_target = has_target ? (z[t] - row.m) * scale.inv_tau_exact : 0;
    const bool exact = all_but_one_hot(row.mean_d * row.s, vocab);
    kernels.row_gradient(z, vocab, static_cast<float>(row.m), scale, coefficients.in_d(), stream, exact, to);
    if (has_target) to[t] = coefficients.at_target(d_target);
  });
}

// Sets `loss` to sum_r w_r H_r / divisor, and `out` to its gradient. w_r is token_weight[r], or 1 where token_weight is
// NULL; a row whose weight is 0 is not kept.
EM_EXPORT void em_entropy_with_gradient(const float* logits, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                                        int64_t rows, int64_t vocab, const uint8_t* kept, const float* token_weight,
                                        double divisor, const float* temperature, double temperature_all, float* loss,
                                        float* out, int threads) {
  const Rows at{logits, vocab, inner, outer_stride, inner_stride, out};
  const Kernels& kernels = kKernels[instructions];
  const bool stream = prepare_large_gradient(at, rows);
  std::vector<double> weighted(static_cast<size_t>(rows));
  for_each_row(rows, vocab, threads, [&](int64_t r) {
    float* const to = at.out_row(r);
    const double w = kept ? kept[r] : token_weight ? token_weight[r] : 1.0;
    if (w == 0) {
      std::fill_n(to, vocab, 0.0f);
      return;
    }
    const Scale scale = Scale::of_temperature(temperature ? temperature[r] : temperature_all);
    const Sums sums = kernels.row_sums(at.row(r), vocab, -1, scale, Wanted::kEntropy);
    // Of a row that is all -inf this is 0 / 0.
    const double mean_d = sums.a / sums.s;
    weighted[static_cast<size_t>(r)] = w / divisor * (std::log(sums.s) - mean_d);
    const double factor = w / divisor * scale.inv_tau_exact / sums.s;
    const Polynomial polynomial{static_cast<float>(factor * mean_d), static_cast<float>(-factor), 0.0f};
    kernels.row_gradient(at.row(r), vocab, sums.m, scale, polynomial, stream, all_but_one_hot(sums.a, vocab), to);
  });
  double sum = 0;
  for (const double x : weighted) sum += x;
  *loss = static_cast<float>(sum);
}

// Limits the instruction set from now on, for tests: 0 the baseline, 1 AVX2, 2 AVX-512. Returns the one that will be used.
EM_EXPORT int em_limit_instructions(int limit) { return instructions = std::min(limit, best_instructions()); }

#else  // EM_LANES: one instruction set, whose vectors hold EM_LANES floats

namespace {
namespace EM_NAMESPACE {

typedef float Float __attribute__((vector_size(EM_LANES * 4)));
typedef double Double __attribute__((vector_size(EM_LANES * 8)));
typedef int32_t Int __attribute__((vector_size(EM_LANES * 4)));

EM_INLINE Float broadcast(float x) { return x - Float{}; }

EM_INLINE Float load(const float* p) {
  Float v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The first n lanes from p; the others hold -inf, whose exponential is 0, unless stated otherwise.
EM_INLINE Float load_first(const float* p, int64_t n, float others = -kInfinity) {
  Float v = broadcast(others);
  std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
  return v;
}

EM_INLINE void store(float* p, Float v) { std::memcpy(p, &v, sizeof v); }

EM_INLINE void store_past_cache(float* p, Float v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<Float*>(p));
#elif EM_LANES == 16
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif EM_LANES == 8
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#elif defined(__x86_64__)
  _mm_stream_ps(p, reinterpret_cast<__m128>(v));
#else
  store(p, v);
#endif
}

// The larger of the two; y if x is NaN.
EM_INLINE Float larger(Float x, Float y) { return x > y ? x : y; }

EM_INLINE Double widen(Float v) { return __builtin_convertvector(v, Double); }

// x y + z rounded once. Where only speed is at stake the compiler is left to contract expressions, or not.
EM_INLINE Float fused_multiply_add(Float x, Float y, Float z) {
#if EM_LANES == 16
  return reinterpret_cast<Float>(_mm512_fmadd_ps(__m512(x), __m512(y), __m512(z)));
#elif EM_LANES == 8
  return reinterpret_cast<Float>(_mm256_fmadd_ps(__m256(x), __m256(y), __m256(z)));
#elif defined(__aarch64__)
  return reinterpret_cast<Float>(vfmaq_f32(float32x4_t(z), float32x4_t(x), float32x4_t(y)));
#else
  return __builtin_convertvector(widen(x) * widen(y) + widen(z), Float);
#endif
}

EM_INLINE double sum_lanes(const Double& v) {
  double sum = 0;
  for (int i = 0; i < EM_LANES; ++i) sum += v[i];
  return sum;
}

struct Term {
  Float d, exp;
};

// d = (z - m) / tau and e^d, for z <= m. e^d is within 2 ulp where it is a normal number, 0 below, NaN for a NaN; of the
// rounded z - m unless `exact`.
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
  const Float power = reinterpret_cast<Float>(reinterpret_cast<Int>(shifted) << 23);
  return {difference * scale.inv_tau, p * power};
}

// The maximum of m and z[0..n), NaNs left out.
EM_INLINE float block_maximum(const float* z, int64_t n, float m) {
  Float top[4];
  for (Float& t : top) t = broadcast(m);
  int64_t i = 0;
  for (; i + 4 * EM_LANES <= n; i += 4 * EM_LANES) {
    for (int k = 0; k < 4; ++k) top[k] = larger(load(z + i + k * EM_LANES), top[k]);
  }
  for (; i + EM_LANES <= n; i += EM_LANES) top[0] = larger(load(z + i), top[0]);
  if (i < n) top[0] = larger(load_first(z + i, n - i), top[0]);
  const Float all = larger(larger(top[0], top[1]), larger(top[2], top[3]));
  for (int k = 0; k < EM_LANES; ++k) m = all[k] > m ? all[k] : m;
  return m;
}

EM_INLINE void add_block(const float* z, int64_t n, const Scale& scale, Wanted wanted, bool exact, Sums& sums) {
  // Lanes sum runs of 8 terms in float32: the one lane whose sum starts with the maximum's 1 rounds all that follows to
  // 2^-24, and the entropy of a row that is almost one-hot is no larger than a few such errors.
  constexpr int64_t kRun = 16 * EM_LANES;
  // Of z - m the lanes sum a sixteenth: a run of logits banned by the lowest float must not overflow.
  constexpr float kSixteenth = 0.0625f;
  Double block_s{}, block_a{}, block_b{}, block_z{}, block_e2{};
  for (int64_t start = 0; start < n; start += kRun) {
    Float s[2] = {}, a[2] = {}, b[2] = {}, z_sum[2] = {}, e2[2] = {};
    const auto add = [&](int k, Float logits, Float logits_or_m) __attribute__((always_inline)) {
      const Term x = term(logits, sums.m, scale, exact);
      const Float product = x.exp * x.d;
      s[k] += x.exp;
      a[k] += x.exp * x.d;
      if (wanted >= Wanted::kSecondMoment) b[k] += product * x.d;
      if (wanted >= Wanted::kExtra) {
        z_sum[k] += (logits_or_m - sums.m) * kSixteenth;
        e2[k] += x.exp * x.exp;
      }
    };
    const int64_t end = std::min(n, start + kRun);
    int64_t i = start;
    for (; i + 2 * EM_LANES <= end; i += 2 * EM_LANES) {
      for (int k = 0; k < 2; ++k) {
        // The search for the next block's maximum has no arithmetic to speak of for memory to hide behind.
        __builtin_prefetch(z + i + k * EM_LANES + kBlock);
        const Float logits = load(z + i + k * EM_LANES);
        add(k, logits, logits);
      }
    }
    for (; i < end; i += EM_LANES) {
      const int64_t count = std::min<int64_t>(EM_LANES, end - i);
      add(0, load_first(z + i, count), load_first(z + i, count, sums.m));
    }
    block_s += widen(s[0] + s[1]);
    block_a += widen(a[0] + a[1]);
    if (wanted >= Wanted::kSecondMoment) block_b += widen(b[0] + b[1]);
    if (wanted >= Wanted::kExtra) {
      block_z += widen(z_sum[0] + z_sum[1]);
      block_e2 += widen(e2[0] + e2[1]);
    }
  }
  sums.s += sum_lanes(block_s);
  sums.a += sum_lanes(block_a);
  sums.b += sum_lanes(block_b);
  sums.sum_d += sum_lanes(block_z) * scale.inv_tau_exact / kSixteenth;
  sums.sum_e2 += sum_lanes(block_e2);
  sums.count += n;
}

// One pass over a row of n, from the column after `left_out` on in blocks of their own.
EM_INLINE Sums pass(const float* z, int64_t n, int64_t left_out, const Scale& scale, Wanted wanted, bool exact) {
  // A finite start, so that -inf in a row's first blocks is as far below it as anywhere else.
  Sums sums{-FLT_MAX, 0, 0, 0, 0, 0, 0};
  for (int64_t i = 0; i < n;) {
    if (i == left_out) {
      ++i;
      continue;
    }
    const int64_t length = std::min(kBlock, (i < left_out ? std::min(left_out, n) : n) - i);
    const float m = block_maximum(z + i, length, sums.m);
    if (m > sums.m) sums.move_to(m, scale.inv_tau_exact);
    add_block(z + i, length, scale, wanted, exact, sums);
    i += length;
  }
  // The maximum itself adds 1 to s: there was none but -inf if s is 0, a NaN or +inf if it is NaN.
  if (sums.s == 0) return {-kInfinity, 0, 0, 0, 0, 0, sums.count};
  return sums.s >= 1 ? sums : Sums{kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, sums.count};
}

Sums row_sums(const float* z, int64_t n, int64_t left_out, const Scale& scale, Wanted wanted) {
  // One loop for each choice, made before it.
  const auto with = [&](bool exact) __attribute__((always_inline)) {
    switch (wanted) {
      case Wanted::kEntropy:
        return pass(z, n, left_out, scale, Wanted::kEntropy, exact);
      case Wanted::kSecondMoment:
        return pass(z, n, left_out, scale, Wanted::kSecondMoment, exact);
      default:
        return pass(z, n, left_out, scale, Wanted::kExtra, exact);
    }
  };
  const Sums sums = with(false);
  return all_but_one_hot(sums.a, n) ? with(true) : sums;
}

EM_INLINE void gradient(const float* z, int64_t n, float m, const Scale& scale, const Polynomial& at, bool quadratic,
                        bool stream, bool exact, float* out) {
  const auto value = [&](Float logits) __attribute__((always_inline)) {
    const Term x = term(logits, m, scale, exact);
    return x.exp * (quadratic ? at.a + x.d * (at.b + at.c * x.d) : at.a + at.b * x.d);
  };
  const auto first = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Float v = value(load_first(z + i, count));
    std::memcpy(out + i, &v, static_cast<size_t>(count) * sizeof(float));
  };
  int64_t i = 0;
  if (stream) {  // Such stores must be aligned.
    const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) / sizeof(float) % EM_LANES);
    i = std::min(n, (EM_LANES - past) % EM_LANES);
    if (i > 0) first(0, i);
  }
  for (; i + EM_LANES <= n; i += EM_LANES) {
    if (stream) {
      store_past_cache(out + i, value(load(z + i)));
    } else {
      store(out + i, value(load(z + i)));
    }
  }
  if (i < n) first(i, n - i);
#if defined(__x86_64__)
  if (stream) _mm_sfence();  // Streaming stores are not ordered before what tells another thread that they are done.
#endif
}

void row_gradient(const float* z, int64_t n, float m, const Scale& scale, const Polynomial& at, bool stream, bool exact,
                  float* out) {
  // One loop for each choice, made before it.
  const auto with = [&](bool quadratic, bool streams) __attribute__((always_inline)) {
    exact ? gradient(z, n, m, scale, at, quadratic, streams, true, out)
          : gradient(z, n, m, scale, at, quadratic, streams, false, out);
  };
  if (at.c != 0) {
    stream ? with(true, true) : with(true, false);
  } else {
    stream ? with(false, true) : with(false, false);
  }
}

}  // namespace EM_NAMESPACE
}  // namespace

#endif
