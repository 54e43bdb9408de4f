// Entropy statistics of softmax rows and their gradient on the CPU, in float32, behind a plain C interface.
//
// For a row of logits z with d_j = (z_j - max z) / tau, one pass over the row accumulates
//
//     s = sum e^d      a = sum d e^d      b = sum d^2 e^d
//
// and a second one writes the gradient e^d_j (A + B d_j + C d_j^2) + alpha [j = target]. The entropy is
// H = log s - a/s; its gradient w.r.t. z_j is -(1/tau) / s * e^d_j (d_j - a/s), where log s has cancelled, which keeps
// it accurate in rows that are almost one-hot.
//
// Passes over memory: row_sums reads the logits once, in blocks that stay in the first-level cache between the search for
// their maximum and their exponentials; the totals move to a new maximum when a block brings one. The gradient reads the
// row again, from the second-level cache where em_entropy_with_gradient has just read it, and writes it.
//
// Precision: lanes sum a few terms in float32, their sums are totalled in float64. A row of all -inf, or with a NaN or +inf,
// has NaN sums and a NaN gradient; -inf elsewhere contributes exactly 0. A row's results depend on nothing but the row,
// so they are the same bits for any number of threads.
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

struct Sums {
  float m;
  double s, a, b;

  // Whether all of a row of n but its maxima may lie more than 28 nats below them, where -a <= n 28 e^-28. The row's
  // gradient is then the exponential of the next one, in which the rounding of z - m, 6e-8 of it, comes to 1.7e-6.
  bool all_but_one_hot(int64_t n) const { return -a <= 2e-11 * static_cast<double>(n); }
};

struct Coefficients {
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
  Sums (*row_sums)(const float*, int64_t, const Scale&, bool);
  void (*row_gradient)(const float*, int64_t, float, const Scale&, const Coefficients&, bool, bool, float*);
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
  float* grad;

  const float* row(int64_t r) const { return logits + offset(r); }
  float* grad_row(int64_t r) const { return in_place() ? grad + offset(r) : grad + r * vocab; }
  bool in_place() const { return grad == logits; }
  int64_t offset(int64_t r) const { return (r / inner) * outer_stride + (r % inner) * inner_stride; }
};

template <class RowFunction>
void for_each_row(int64_t rows, int64_t vocab, int threads, const RowFunction& function) {
  // Threads take rows off a counter, 2^14 elements or a row at a time, whichever is more.
  const int64_t step = std::max<int64_t>(1, (int64_t{1} << 14) / vocab);
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
  const uintptr_t first = (reinterpret_cast<uintptr_t>(at.grad) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(at.grad) + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // Advice: a kernel that refuses loses only speed.
#endif
  return true;
}

}  // namespace

// Arguments that all functions share.
//   logits        rows of `vocab` float32; row r starts at logits + (r / inner) * outer_stride + (r % inner) * inner_stride.
//   temperature   of each row, or NULL: temperature_all is that of every row.
//   grad          (rows, vocab), contiguous; or logits itself: each gradient row replaces its logits.
//   threads       the most threads to use; small inputs stay on the calling thread.

// Sets m, s, a and, unless it is NULL, b of every row; 0 where mask (uint8, may be NULL) is 0, and the row is not read.
EM_EXPORT void em_row_sums(const float* logits, int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t rows,
                           int64_t vocab, const uint8_t* mask, const float* temperature, double temperature_all, float* m,
                           float* s, float* a, float* b, int threads) {
  const Rows at{logits, vocab, inner, outer_stride, inner_stride, nullptr};
  const Kernels& kernels = kKernels[instructions];
  for_each_row(rows, vocab, threads, [&](int64_t r) {
    Sums sums{};
    if (!mask || mask[r]) {
      const Scale scale = Scale::of_temperature(temperature ? temperature[r] : temperature_all);
      sums = kernels.row_sums(at.row(r), vocab, scale, b != nullptr);
    }
    m[r] = sums.m;
    s[r] = static_cast<float>(sums.s);
    a[r] = static_cast<float>(sums.a);
    if (b) b[r] = static_cast<float>(sums.b);
  });
}

// grad_j = e^d_j (A + B d_j + C d_j^2) + alpha [j = target] of every row, where d_j = (z_j - m) / temperature, m is that of
// em_row_sums, and c_hi + c_lo = log2(e) / temperature. A row whose c_hi is 0 is not read and its gradient is 0. C may be
// NULL; target and alpha are NULL together.
EM_EXPORT void em_row_gradient(const float* logits, int64_t inner, int64_t outer_stride, int64_t inner_stride, int64_t rows,
                               int64_t vocab, const float* m, const float* c_hi, const float* c_lo, const float* A,
                               const float* B, const float* C, const int64_t* target, const float* alpha, float* grad, int threads) {
  const Rows at{logits, vocab, inner, outer_stride, inner_stride, grad};
  const Kernels& kernels = kKernels[instructions];
  const bool stream = prepare_large_gradient(at, rows);
  for_each_row(rows, vocab, threads, [&](int64_t r) {
    float* const out = at.grad_row(r);
    if (c_hi[r] == 0) {
      std::fill_n(out, vocab, 0.0f);
      return;
    }
    const bool in_range = !target || (target[r] >= 0 && target[r] < vocab);
    const Coefficients coefficients{in_range ? A[r] : kNaN, B[r], C ? C[r] : 0.0f};
    const Scale scale(static_cast<double>(c_hi[r]) + c_lo[r]);
    // Whether z - m may be rounded is not known here.
    kernels.row_gradient(at.row(r), vocab, m[r], scale, coefficients, stream, true, out);
    if (target && in_range) out[target[r]] += alpha[r];
  });
}

// The entropy of every row, and the gradient of sum_r weight_r H_r. A row whose weight is 0 is not read; both are 0.
EM_EXPORT void em_entropy_with_gradient(const float* logits, int64_t inner, int64_t outer_stride, int64_t inner_stride,
                                        int64_t rows, int64_t vocab, const float* weight, const float* temperature,
                                        double temperature_all, float* entropy, float* grad, int threads) {
  const Rows at{logits, vocab, inner, outer_stride, inner_stride, grad};
  const Kernels& kernels = kKernels[instructions];
  const bool stream = prepare_large_gradient(at, rows);
  for_each_row(rows, vocab, threads, [&](int64_t r) {
    float* const out = at.grad_row(r);
    if (weight[r] == 0) {
      entropy[r] = 0;
      std::fill_n(out, vocab, 0.0f);
      return;
    }
    const Scale scale = Scale::of_temperature(temperature ? temperature[r] : temperature_all);
    const Sums sums = kernels.row_sums(at.row(r), vocab, scale, false);
    const double mean = sums.a / sums.s;
    entropy[r] = static_cast<float>(std::log(sums.s) - mean);
    const double factor = weight[r] * scale.inv_tau_exact / sums.s;
    const Coefficients coefficients{static_cast<float>(factor * mean), static_cast<float>(-factor), 0.0f};
    kernels.row_gradient(at.row(r), vocab, sums.m, scale, coefficients, stream, sums.all_but_one_hot(vocab), out);
  });
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

// The first n lanes from p, and -inf, which contributes nothing to any sum, in the others.
EM_INLINE Float load_first(const float* p, int64_t n) {
  Float v = broadcast(-kInfinity);
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

EM_INLINE void add_block(const float* z, int64_t n, const Scale& scale, bool with_b, bool exact, Sums& sums) {
  // Lanes sum runs of 8 terms in float32: the one lane whose sum starts with the maximum's 1 rounds all that follows to
  // 2^-24, and the entropy of a row that is almost one-hot is no larger than a few such errors.
  constexpr int64_t kRun = 16 * EM_LANES;
  Double block_s{}, block_a{}, block_b{};
  for (int64_t start = 0; start < n; start += kRun) {
    Float s[2] = {}, a[2] = {}, b[2] = {};
    const auto add = [&](int k, Float logits) __attribute__((always_inline)) {
      const Term x = term(logits, sums.m, scale, exact);
      const Float product = x.exp * x.d;
      s[k] += x.exp;
      a[k] += x.exp * x.d;
      if (with_b) b[k] += product * x.d;
    };
    const int64_t end = std::min(n, start + kRun);
    int64_t i = start;
    for (; i + 2 * EM_LANES <= end; i += 2 * EM_LANES) {
      for (int k = 0; k < 2; ++k) {
        // The search for the next block's maximum has no arithmetic to speak of for memory to hide behind.
        __builtin_prefetch(z + i + k * EM_LANES + kBlock);
        add(k, load(z + i + k * EM_LANES));
      }
    }
    for (; i < end; i += EM_LANES) add(0, i + EM_LANES <= end ? load(z + i) : load_first(z + i, end - i));
    block_s += widen(s[0] + s[1]);
    block_a += widen(a[0] + a[1]);
    if (with_b) block_b += widen(b[0] + b[1]);
  }
  sums.s += sum_lanes(block_s);
  sums.a += sum_lanes(block_a);
  sums.b += sum_lanes(block_b);
}

EM_INLINE Sums pass(const float* z, int64_t n, const Scale& scale, bool with_b, bool exact) {
  // A finite start, so that -inf in a row's first blocks is as far below it as anywhere else.
  Sums sums{-FLT_MAX, 0, 0, 0};
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t length = std::min(kBlock, n - i);
    const float m = block_maximum(z + i, length, sums.m);
    if (m > sums.m) {
      const double D = (static_cast<double>(sums.m) - m) * scale.inv_tau_exact, w = std::exp(D);
      sums = {m, w * sums.s, w * (sums.a + D * sums.s), w * (sums.b + D * (2 * sums.a + D * sums.s))};
    }
    add_block(z + i, length, scale, with_b, exact, sums);
  }
  // The maximum itself adds 1 to s: there was none but -inf if s is 0, a NaN or +inf if it is NaN.
  return sums.s >= 1 ? sums : Sums{kNaN, kNaN, kNaN, kNaN};
}

Sums row_sums(const float* z, int64_t n, const Scale& scale, bool with_b) {
  const Sums sums = with_b ? pass(z, n, scale, true, false) : pass(z, n, scale, false, false);
  return sums.all_but_one_hot(n) ? pass(z, n, scale, true, true) : sums;
}

EM_INLINE void gradient(const float* z, int64_t n, float m, const Scale& scale, const Coefficients& at, bool quadratic,
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

void row_gradient(const float* z, int64_t n, float m, const Scale& scale, const Coefficients& at, bool stream, bool exact,
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
