// Vectors of EM_LANES floats of one instruction set: loaded from logits of any dtype, and stored as any.
//
// Conversions round to the nearest, ties to even, and keep NaNs, infinities and subnormal numbers. Where an instruction set has
// no instruction for that they are made of integer operations, and those of bfloat16 always: AVX-512's instruction takes
// subnormal numbers for zeros.

namespace {
namespace EM_NAMESPACE {

typedef float Float __attribute__((vector_size(EM_LANES * 4)));
typedef double Double __attribute__((vector_size(EM_LANES * 8)));
typedef int32_t Int __attribute__((vector_size(EM_LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(EM_LANES * 4)));
typedef uint16_t Half __attribute__((vector_size(EM_LANES * 2)));

EM_INLINE Float broadcast(float x) { return x - Float{}; }

template <class Vector>
EM_INLINE Vector read(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

EM_INLINE Float float_of(Bits bits) { return reinterpret_cast<Float>(bits); }
EM_INLINE Bits bits_of(Float v) { return reinterpret_cast<Bits>(v); }

EM_INLINE Bits widen(Half h) {
#if EM_LANES == 16
  return reinterpret_cast<Bits>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(h)));
#else
  return __builtin_convertvector(h, Bits);
#endif
}

EM_INLINE Half low_half(Bits bits) {
#if EM_LANES == 16
  return reinterpret_cast<Half>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(bits)));
#else
  return __builtin_convertvector(bits, Half);
#endif
}

// The larger of the two; y if x is NaN.
EM_INLINE Float larger(Float x, Float y) { return x > y ? x : y; }

EM_INLINE Float magnitude(Float v) { return float_of(bits_of(v) & 0x7fffffffu); }

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

EM_INLINE Float from_bfloat16(Half h) { return float_of(widen(h) << 16); }

// Of a result of arithmetic: its NaNs are quiet, and stay NaNs without their low bits.
EM_INLINE Half to_bfloat16(Float v) {
  const Bits bits = bits_of(v), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return low_half((v == v ? rounded : bits) >> 16);
}

EM_INLINE Float from_float16(Half h) {
#if EM_LANES == 16
  return reinterpret_cast<Float>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(h)));
#elif EM_LANES == 8
  return reinterpret_cast<Float>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
#else
  const Bits bits = widen(h), sign = (bits & 0x8000u) << 16, shifted = (bits & 0x7fffu) << 13;
  // The exponents' biases are 127 and 15. A product normalises what is subnormal in 16 bits.
  const Bits finite = bits_of(float_of(shifted) * 0x1p112f);
  return float_of(sign | (shifted >= 0x7c00u << 13 ? shifted | 0x7f800000u : finite));
#endif
}

EM_INLINE Half to_float16(Float v) {
#if EM_LANES == 16
  return reinterpret_cast<Half>(_mm512_maskz_cvtps_ph(0xffff, __m512(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif EM_LANES == 8
  return reinterpret_cast<Half>(_mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Bits sign = bits_of(v) & 0x80000000u, bits = bits_of(v) ^ sign;
  // Half a unit in the last place, a little less below an even number; 112 is the difference of the biases.
  const Bits normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // The last place of 1/2 is that of float16's subnormal numbers.
  const Bits subnormal = bits_of(magnitude(v) + 0.5f) - 0x3f000000u;
  const Bits beyond = bits > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;  // 2^16 and more, or NaN
  const Bits half = bits >= 0x47800000u ? beyond : bits < 0x38800000u ? subnormal : normal;
  return low_half(half | sign >> 16);
#endif
}

EM_INLINE Float load(const void* p, Dtype dtype = kFloat32) {
  if (dtype == kFloat32) return read<Float>(p);
  return dtype == kBFloat16 ? from_bfloat16(read<Half>(p)) : from_float16(read<Half>(p));
}

// The first n lanes from p; the others hold -inf, whose exponential is 0, unless stated otherwise.
EM_INLINE Float load_first(const void* p, int64_t n, Dtype dtype = kFloat32, float others = -kInfinity) {
  Float whole{};
  std::memcpy(&whole, p, static_cast<size_t>(n * size_of(dtype)));
  Float v = broadcast(others);
  const Float loaded = load(&whole, dtype);
  std::memcpy(&v, &loaded, static_cast<size_t>(n) * sizeof(float));
  return v;
}

EM_INLINE void stream(void* p, Float v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, static_cast<Float*>(p));
#elif EM_LANES == 16
  _mm512_stream_ps(static_cast<float*>(p), reinterpret_cast<__m512>(v));
#elif EM_LANES == 8
  _mm256_stream_ps(static_cast<float*>(p), reinterpret_cast<__m256>(v));
#elif defined(__x86_64__)
  _mm_stream_ps(static_cast<float*>(p), reinterpret_cast<__m128>(v));
#else
  std::memcpy(p, &v, sizeof v);
#endif
}

EM_INLINE void stream(void* p, Half v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, static_cast<Half*>(p));
#elif EM_LANES == 16
  _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#elif EM_LANES == 8
  _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
#else
  std::memcpy(p, &v, sizeof v);
#endif
}

// Stores v as the dtype; past the cache, at an address that is a multiple of the vector's size, if asked to.
EM_INLINE void store(void* p, Float v, Dtype dtype, bool past_cache) {
  if (dtype == kFloat32) {
    past_cache ? stream(p, v) : (void)std::memcpy(p, &v, sizeof v);
  } else {
    const Half h = dtype == kBFloat16 ? to_bfloat16(v) : to_float16(v);
    past_cache ? stream(p, h) : (void)std::memcpy(p, &h, sizeof h);
  }
}

// How many numbers of the dtype lie between p and the next address that stores past the cache take.
EM_INLINE int64_t before_line(const void* p, Dtype dtype) {
  constexpr uintptr_t kLine = 64;
  return static_cast<int64_t>((kLine - reinterpret_cast<uintptr_t>(p) % kLine) % kLine) / size_of(dtype);
}

EM_INLINE void store_first(void* p, Float v, int64_t n, Dtype dtype) {
  Float whole{};
  store(&whole, v, dtype, false);
  std::memcpy(p, &whole, static_cast<size_t>(n * size_of(dtype)));
}

}  // namespace EM_NAMESPACE
}  // namespace
