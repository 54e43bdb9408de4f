// Two rows in one loop: the sums of one, and the gradient of the row before it.
//
// The sums are arithmetic, and the gradient, from exponentials that were kept, is memory: beside each other they take
// hardly longer than either, where one after the other take the sum of both.

namespace {
namespace EM_NAMESPACE {

// The gradient by a block of n logits, a vector at a time in any order. All of it is inlined: members in memory would be
// read again after each store, which may have changed them for all that the compiler knows.
template <class D>
struct GradientOfBlock {
  const void* z;
  const float* exponentials;
  void* out;
  int64_t n, head;
  float m, lowest, a, b;
  bool past_cache;

  __attribute__((always_inline)) GradientOfBlock(const PendingGradient& row, int64_t start, int64_t length)
      : z(element(row.z, start, D::from)),
        exponentials(row.exponentials->values + start),
        out(element(row.out, start, D::to)),
        n(length),
        // Stores past the cache must be aligned.
        head(row.past_cache ? std::min(n, before_line(out, D::to)) : 0),
        m(row.m),
        lowest(row.scale.lowest),
        past_cache(row.past_cache) {
    const double d = (static_cast<double>(row.exponentials->maxima[start / kBlock]) - m) * row.scale.inv_tau_exact;
    // Subnormal factors would make every product of the block slow.
    const double w = d < -87 ? 0 : std::exp(d);
    a = static_cast<float>(w * row.a);
    b = static_cast<float>(w * row.b);
  }

  Float __attribute__((always_inline)) value(Float logits, Float e) const {
    // -inf would make a NaN of 0.
    return e * (a + b * larger(broadcast(lowest), logits - m));
  }

  // The i-th vector after the head, if it lies in the block.
  void __attribute__((always_inline)) vector(int64_t i) const {
    i += head;
    if (i + EM_LANES > n) return;
    const Float v = value(load(element(z, i, D::from), D::from), load(exponentials + i));
    // What is stored in the cache is fetched for it, 512 numbers earlier: in time even from memory.
    if (!past_cache) __builtin_prefetch(element(out, i + 512, D::to), 1);
    store(element(out, i, D::to), v, D::to, past_cache);
  }

  // The head, and all from the i-th vector after it on.
  void __attribute__((always_inline)) rest(int64_t i) const {
    up_to(0, head);
    for (; head + i + EM_LANES <= n; i += EM_LANES) vector(i);
    up_to(head + (n - head) / EM_LANES * EM_LANES, n);
  }

  void __attribute__((always_inline)) up_to(int64_t i, int64_t end) const {
    for (; i < end; i += EM_LANES) {
      const int64_t count = std::min<int64_t>(EM_LANES, end - i);
      const Float logits = load_first(element(z, i, D::from), count, D::from);
      store_first(element(out, i, D::to), value(logits, load_first(exponentials + i, count)), count, D::to);
    }
  }
};

// Logits of float32 in rows up to this long are fetched four blocks ahead too, as what is read and written beside them leaves
// them waiting for memory longer than one block takes. With 1 MiB of second-level cache the whole takes 0.85 to 0.95 of the
// time. Longer rows take 1.05 times as long: the row and its exponentials drive out what was fetched so early.
constexpr int64_t kShortRow = int64_t{1} << 16;

template <class D>
EM_INLINE Sums sums_beside(const void* z, int64_t n, const Scale& scale, Exponentials& kept,
                           const PendingGradient* before) {
  Block block;
  const bool further = D::from == kFloat32 && n <= kShortRow;
  // A finite start, so that -inf in a row's first blocks is as far below it as anywhere else.
  Sums sums{-FLT_MAX, 0, 0, 0, 0, 0, 0};
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t length = std::min(kBlock, n - start);
    const float* const values = block.widened(element(z, start, D::from), length, D::from, Softcap(0), false);
    const float m = block_maximum(values, length, sums.m);
    if (m > sums.m) sums.move_to(m, scale.inv_tau_exact);
    kept.maxima[start / kBlock] = sums.m;
    float* const to = kept.values + start;
    const auto keep = [&](int64_t i, Float e) __attribute__((always_inline)) { std::memcpy(to + i, &e, sizeof e); };
    const char* const ahead = static_cast<const char*>(element(z, start + kBlock, D::from));
    const auto add = [&](const auto& each) __attribute__((always_inline)) {
      add_block(values, length, scale, Wanted::kEntropy, false, ahead, size_of(D::from), further, sums, each);
    };
    if (!before) {
      add(keep);
      continue;
    }
    const GradientOfBlock<D> gradient(*before, start, length);
    add([&](int64_t i, Float e) __attribute__((always_inline)) {
      keep(i, e);
      gradient.vector(i);
    });
    gradient.rest((length + EM_LANES - 1) / EM_LANES * EM_LANES);
  }
  return checked(sums);
}

template <class D>
EM_INLINE void gradient_alone(const PendingGradient& row, int64_t n) {
  for (int64_t start = 0; start < n; start += kBlock) {
    GradientOfBlock<D>(row, start, std::min(kBlock, n - start)).rest(0);
  }
}

// The sums of a row for its entropy, whose exponentials are kept; writes the gradient of the row before, unless it is NULL.
Sums row_sums_beside(const void* z, int64_t n, Dtype from, Dtype to, const Scale& scale, Exponentials& kept,
                     const PendingGradient* before) {
  return with_dtypes(from, to, [&](auto dtypes) __attribute__((always_inline)) {
    return sums_beside<decltype(dtypes)>(z, n, scale, kept, before);
  });
}

void pending_gradient(const PendingGradient& row, int64_t n, Dtype from, Dtype to) {
  with_dtypes(from, to, [&](auto dtypes) __attribute__((always_inline)) { gradient_alone<decltype(dtypes)>(row, n); });
}

}  // namespace EM_NAMESPACE
}  // namespace
