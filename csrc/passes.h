// The passes over a row on one instruction set: its sums, and its gradient. pairs.h makes the two for one row and the next.
//
// A row is worked on in blocks. Logits of 16 bits, and capped ones, become floats in a buffer in the first-level cache;
// others are read where they lie.

namespace {
namespace EM_NAMESPACE {

// Makes floats of n <= kBlock logits: of the capped logits, with the slopes of the cap where wanted, or of the logits.
EM_INLINE void widen_block(const void* z, int64_t n, Dtype dtype, Softcap cap, bool capped, float* values,
                           float* slopes) {
  const auto put = [&](int64_t i, Float v) __attribute__((always_inline)) {
    if (capped) {
      const Capped c = soft_cap(v, cap);
      v = c.value;
      if (slopes) std::memcpy(slopes + i, &c.slope, sizeof v);
    }
    std::memcpy(values + i, &v, sizeof v);
  };
  int64_t i = 0;
  for (; i + EM_LANES <= n; i += EM_LANES) put(i, load(element(z, i, dtype), dtype));
  if (i < n) put(i, load_first(element(z, i, dtype), n - i, dtype));
}

// A block's logits as floats, and the slopes of the soft cap.
struct Block {
  alignas(64) float values[kBlock + EM_LANES];
  alignas(64) float slopes[kBlock + EM_LANES];

  // The n logits at z as floats: the memory at z itself where they are that.
  const float* widened(const void* z, int64_t n, Dtype dtype, const Softcap& cap, bool with_slopes) {
    float* const to = with_slopes ? slopes : nullptr;
    // One loop for each choice, made before it.
    switch (dtype) {
      case kFloat32:
        if (!cap) return static_cast<const float*>(z);
        widen_block(z, n, kFloat32, cap, true, values, to);
        break;
      case kBFloat16:
        cap ? widen_block(z, n, kBFloat16, cap, true, values, to)
            : widen_block(z, n, kBFloat16, cap, false, values, nullptr);
        break;
      case kFloat16:
        cap ? widen_block(z, n, kFloat16, cap, true, values, to)
            : widen_block(z, n, kFloat16, cap, false, values, nullptr);
        break;
    }
    return values;
  }
};

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

// Adds the terms of a block to the sums, and hands on the exponentials of the vector at i to each(i, exponentials); fetches
// the `ahead_size` bytes per logit at `ahead`, where the next block is, into the first-level cache meanwhile, and where
// `further` what lies three blocks after that into the second-level cache.
template <class Each>
EM_INLINE void add_block(const float* z, int64_t n, const Scale& scale, Wanted wanted, bool exact, const char* ahead,
                         int64_t ahead_size, bool further, Sums& sums, const Each& each) {
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
      s[k] += x.exp;
      if (wanted == Wanted::kEntropy) {
        a[k] += x.exp * x.difference;
        return x.exp;
      }
      // The square of z - m may lie beyond a float where that of d does not.
      const Float d = x.difference * scale.inv_tau, product = x.exp * d;
      a[k] += x.exp * d;
      b[k] += product * d;
      if (wanted >= Wanted::kExtra) {
        z_sum[k] += (logits_or_m - sums.m) * kSixteenth;
        e2[k] += x.exp * x.exp;
      }
      return x.exp;
    };
    const int64_t end = std::min(n, start + kRun);
    int64_t i = start;
    for (; i + 2 * EM_LANES <= end; i += 2 * EM_LANES) {
      for (int k = 0; k < 2; ++k) {
        // The search for the next block's maximum has no arithmetic to speak of for memory to hide behind.
        const char* const next = ahead + (i + k * EM_LANES) * ahead_size;
        __builtin_prefetch(next);
        if (further) __builtin_prefetch(next + 3 * kBlock * ahead_size, 0, 2);
        const Float logits = load(z + i + k * EM_LANES);
        each(i + k * EM_LANES, add(k, logits, logits));
      }
    }
    for (; i < end; i += EM_LANES) {
      const int64_t count = std::min<int64_t>(EM_LANES, end - i);
      each(i, add(0, load_first(z + i, count), load_first(z + i, count, kFloat32, sums.m)));
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
  sums.a += sum_lanes(block_a) * (wanted == Wanted::kEntropy ? scale.inv_tau_exact : 1);
  sums.b += sum_lanes(block_b);
  sums.sum_d += sum_lanes(block_z) * scale.inv_tau_exact / kSixteenth;
  sums.sum_e2 += sum_lanes(block_e2);
  sums.count += n;
}

// One pass over a row of n, from the column after `left_out` on in blocks of their own.
EM_INLINE Sums pass(const void* z, int64_t n, Dtype dtype, int64_t left_out, const Scale& scale, const Softcap& cap,
                    Wanted wanted, bool exact) {
  Block block;
  // A finite start, so that -inf in a row's first blocks is as far below it as anywhere else.
  Sums sums{-FLT_MAX, 0, 0, 0, 0, 0, 0};
  for (int64_t i = 0; i < n;) {
    if (i == left_out) {
      ++i;
      continue;
    }
    const int64_t length = std::min(kBlock, (i < left_out ? std::min(left_out, n) : n) - i);
    const float* const values = block.widened(element(z, i, dtype), length, dtype, cap, false);
    const float m = block_maximum(values, length, sums.m);
    if (m > sums.m) sums.move_to(m, scale.inv_tau_exact);
    const char* const ahead = static_cast<const char*>(element(z, i + kBlock, dtype));
    add_block(values, length, scale, wanted, exact, ahead, size_of(dtype), false, sums, [](int64_t, Float) {});
    i += length;
  }
  return checked(sums);
}

Sums row_sums(const void* z, int64_t n, Dtype dtype, int64_t left_out, const Scale& scale, const Softcap& cap,
              Wanted wanted) {
  // One loop for each choice, made before it.
  const auto with = [&](bool exact) __attribute__((always_inline)) {
    switch (wanted) {
      case Wanted::kEntropy:
        return pass(z, n, dtype, left_out, scale, cap, Wanted::kEntropy, exact);
      case Wanted::kSecondMoment:
        return pass(z, n, dtype, left_out, scale, cap, Wanted::kSecondMoment, exact);
      default:
        return pass(z, n, dtype, left_out, scale, cap, Wanted::kExtra, exact);
    }
  };
  const Sums sums = with(false);
  return all_but_one_hot(sums.a, n) ? with(true) : sums;
}

// The gradient by n logits; by the capped logits where z are those, times the slopes.
EM_INLINE void gradient(const void* z, const float* slopes, int64_t n, Dtype dtype, float m, Scale scale,
                        Polynomial polynomial, bool exact, bool past_cache, void* out, Dtype out_dtype) {
  const bool quadratic = polynomial.c != 0;
  const auto value = [&](int64_t i, Float logits) __attribute__((always_inline)) {
    const Term x = term(logits, m, scale, exact);
    const Float d = x.difference * scale.inv_tau;
    // That every vector asks anew costs nothing: the multipliers are busy for longer.
    const Float slope = quadratic ? polynomial.b + polynomial.c * d : broadcast(polynomial.b);
    const Float by_capped = x.exp * (polynomial.a + slope * d);
    return slopes ? by_capped * load(slopes + i) : by_capped;
  };
  int64_t i = 0;
  for (; i + EM_LANES <= n; i += EM_LANES) {
    __builtin_prefetch(element(z, i - kBlock, dtype));
    store(element(out, i, out_dtype), value(i, load(element(z, i, dtype), dtype)), out_dtype, past_cache);
  }
  if (i < n) {
    const Float last = value(i, load_first(element(z, i, dtype), n - i, dtype));
    store_first(element(out, i, out_dtype), last, n - i, out_dtype);
  }
}

// What a gradient's loop is compiled for.
template <Dtype kFrom, Dtype kTo>
struct Dtypes {
  static constexpr Dtype from = kFrom, to = kTo;
};

// Calls the function with Dtypes: one loop for each choice, made before it. A gradient of logits of 16 bits has their dtype.
template <class Function>
EM_INLINE auto with_dtypes(Dtype from, Dtype to, const Function& function) {
  if (from == kBFloat16) return function(Dtypes<kBFloat16, kBFloat16>());
  if (from == kFloat16) return function(Dtypes<kFloat16, kFloat16>());
  if (to == kBFloat16) return function(Dtypes<kFloat32, kBFloat16>());
  if (to == kFloat16) return function(Dtypes<kFloat32, kFloat16>());
  return function(Dtypes<kFloat32, kFloat32>());
}

void gradient_block(const void* z, const float* slopes, int64_t n, Dtype dtype, float m, const Scale& scale,
                    const Polynomial& polynomial, bool exact, bool past_cache, void* out, Dtype out_dtype) {
  with_dtypes(dtype, out_dtype, [&](auto dtypes) __attribute__((always_inline)) {
    using D = decltype(dtypes);
    exact ? gradient(z, slopes, n, D::from, m, scale, polynomial, true, past_cache, out, D::to)
          : gradient(z, slopes, n, D::from, m, scale, polynomial, false, past_cache, out, D::to);
  });
}

void row_gradient(const void* z, int64_t n, Dtype dtype, float m, const Scale& scale, const Softcap& cap,
                  const Polynomial& polynomial, bool exact, bool past_cache, void* out, Dtype out_dtype) {
  Block block;
  const auto part = [&](int64_t i, int64_t length, bool streams) {
    const void* values = element(z, i, dtype);
    if (cap) values = block.widened(values, length, dtype, cap, true);
    gradient_block(values, cap ? block.slopes : nullptr, length, cap ? kFloat32 : dtype, m, scale, polynomial, exact,
                   streams, element(out, i, out_dtype), out_dtype);
  };
  // Stores past the cache must be aligned: what lies before the first such address is a block of its own.
  const int64_t head = past_cache ? std::min(n, before_line(out, out_dtype)) : 0;
  // From the end of the row, which the second-level cache holds of a row that it does not hold whole.
  for (int64_t i = head + (n - head - 1) / kBlock * kBlock; n > head && i >= head; i -= kBlock) {
    part(i, std::min(kBlock, n - i), past_cache);
  }
  if (head > 0) part(0, head, false);
}

// One logit, capped where there is a cap, and the slope of that.
Logit logit(const void* z, Dtype dtype, const Softcap& cap) {
  const Float v = load_first(z, 1, dtype);
  if (!cap) return {v[0], 1.0f};
  const Capped capped = soft_cap(v, cap);
  return {capped.value[0], capped.slope[0]};
}

void set(void* to, Dtype dtype, float value) { store_first(to, broadcast(value), 1, dtype); }

}  // namespace EM_NAMESPACE
}  // namespace
