// Vectors of floats as wide as the processor has them, in the notation that GCC and Clang share.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define KV_WIDE 1  // vectors of 512 bits
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
constexpr int kWideBytes = 4 * kLanes;
typedef uint8_t WideBytes __attribute__((vector_size(kWideBytes)));

template <typename Vector>
inline Vector load(const void* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <typename Vector>
inline void store(void* to, Vector x) {
  std::memcpy(to, &x, sizeof x);
}

inline Floats all(float x) { return x - Floats{}; }

inline Floats choose(Ints where, Floats yes, Floats no) { return where ? yes : no; }

// a * b + c, rounded once where the processor can.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(KV_WIDE)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_FEATURE_FMA)
  for (int i = 0; i < kLanes; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

inline Floats less(Floats a, Floats b) { return choose(a < b, a, b); }
inline Floats greater(Floats a, Floats b) { return choose(a > b, a, b); }

// GCC would widen bytes one by one.
inline Floats to_floats(Bytes x) {
#if defined(KV_WIDE)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)x));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)x)));
#else
  return __builtin_convertvector(__builtin_convertvector(x, Ints), Floats);
#endif
}

// Of whole numbers 0..255.
inline Bytes to_bytes(Floats x) {
#if defined(KV_WIDE)
  return (Bytes)_mm512_cvtepi32_epi8(_mm512_cvttps_epi32(x));
#elif defined(__AVX2__)
  const __m256i whole = _mm256_cvttps_epi32(x);
  const __m128i half =
      _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  return (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(half, half));
#else
  return __builtin_convertvector(__builtin_convertvector(x, Ints), Bytes);
#endif
}

// Of numbers of less than 2**31.
inline Floats floor(Floats x) {
  const Floats whole = __builtin_convertvector(__builtin_convertvector(x, Ints), Floats);
  return whole - choose(whole > x, all(1.0f), Floats{});
}

// Shifts of bytes, two at a time: processors have none of single ones.
template <typename Vector>
inline Vector left(Vector x, int bits, uint8_t mask) {
  typedef uint16_t Pairs __attribute__((vector_size(sizeof(Vector))));
  return (Vector)((Pairs)x << bits) & mask;
}

template <typename Vector>
inline Vector right(Vector x, int bits, uint8_t mask) {
  typedef uint16_t Pairs __attribute__((vector_size(sizeof(Vector))));
  return (Vector)((Pairs)x >> bits) & mask;
}

// The kinds of numbers that raw pages and scales have.
enum class Kind : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

inline Floats from_bfloat16(Shorts x) { return (Floats)(__builtin_convertvector(x, Words) << 16); }

// In integers where it matters: threads of XLA take subnormal floats for zero.
inline Floats from_float16(Shorts x) {
  const Words bits = __builtin_convertvector(x, Words);
  const Words sign = (bits & 0x8000u) << 16, rest = bits & 0x7FFFu;
  const Floats normal = (Floats)((rest << 13) + (112u << 23));
  const Floats special = (Floats)((rest << 13) | 0x7F800000u);
  const Floats small = __builtin_convertvector((Ints)rest, Floats) * 0x1p-24f;
  Floats x32 = choose((Ints)(rest < 0x0400u), small, normal);
  x32 = choose((Ints)(rest >= 0x7C00u), special, x32);
  return (Floats)((Words)x32 | sign);
}

// To the nearest, ties to even; NaN stays one.
inline Shorts to_bfloat16(Floats x) {
#if defined(KV_WIDE) && defined(__AVX512BF16__)
  return (Shorts)_mm512_cvtneps_pbh(x);
#endif
  const Words bits = (Words)x;
  Words half = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = (bits >> 16) | 0x40u;
  const Words is_nan = (Words)((bits & 0x7FFFFFFFu) > 0x7F800000u);
  half = (nan & is_nan) | (half & ~is_nan);
  return __builtin_convertvector(half, Shorts);
}

inline Shorts to_float16(Floats x) {
  const Words bits = (Words)x, sign = (bits >> 16) & 0x8000u, size = bits & 0x7FFFFFFFu;
  const Words odd = (size >> 13) & 1u;
  const Words normal = (size - (112u << 23) + 0xFFFu + odd) >> 13;
  // Below 2**-14: adding 2**-1, whose last bit is 2**-24, rounds.
  const Words small = (Words)((Floats)size + all(0.5f)) - (126u << 23);
  Words half = (Words)choose((Ints)(size < (113u << 23)), (Floats)small, (Floats)normal);
  const Words infinite = Words{} + 0x7C00u, nan = 0x7E00u | ((size >> 13) & 0x3FFu);
  half = (Words)choose((Ints)(size >= 0x477FF000u), (Floats)infinite, (Floats)half);
  half = (Words)choose((Ints)(size > 0x7F800000u), (Floats)nan, (Floats)half);
  return __builtin_convertvector(half | sign, Shorts);
}

// kLanes numbers from element `at` of an array of a kind.
inline Floats read(const void* from, Kind kind, int64_t at) {
  if (kind == Kind::kFloat32) return load<Floats>(static_cast<const float*>(from) + at);
  const Shorts x = load<Shorts>(static_cast<const uint16_t*>(from) + at);
  return kind == Kind::kBFloat16 ? from_bfloat16(x) : from_float16(x);
}

// kLanes numbers, rounded to a kind, to element `at` of an array of it.
template <Kind kind>
inline void write(void* to, int64_t at, Floats x) {
  if constexpr (kind == Kind::kFloat32) {
    store(static_cast<float*>(to) + at, x);
  } else {
    const Shorts half = kind == Kind::kBFloat16 ? to_bfloat16(x) : to_float16(x);
    store(static_cast<uint16_t*>(to) + at, half);
  }
}

// As `write`, 2 * kLanes numbers.
template <Kind kind>
inline void write_two(void* to, int64_t at, Floats x, Floats y) {
#if defined(KV_WIDE) && defined(__AVX512BF16__)
  if constexpr (kind == Kind::kBFloat16) {
    store(static_cast<uint16_t*>(to) + at, _mm512_cvtne2ps_pbh(y, x));
    return;
  }
#endif
  write<kind>(to, at, x);
  write<kind>(to, at + kLanes, y);
}

// The first halves of a and b, element by element in turn, and the second halves; bytes or floats.
template <typename Vector>
inline Vector interleave_first(Vector a, Vector b) {
#if defined(KV_WIDE)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#endif
}

template <typename Vector>
inline Vector interleave_second(Vector a, Vector b) {
#if defined(KV_WIDE)
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
#else
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
}

// kLanes rows of kLanes bytes or floats, turned; `rounds`: log2 of kLanes.
template <typename Vector, int rounds = kLanes == 16 ? 4 : 3>
inline void transpose(Vector* x) {
  if constexpr (rounds > 0) {
    Vector next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; i++) {
      next[2 * i] = interleave_first(x[i], x[i + kLanes / 2]);
      next[2 * i + 1] = interleave_second(x[i], x[i + kLanes / 2]);
    }
    transpose<Vector, rounds - 1>(next);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) x[i] = next[i];
  }
}

// Sums of neighbours: those of a, then those of b.
inline Floats add_pairs(Floats a, Floats b) {
#if defined(KV_WIDE)
  const Floats even =
      __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Floats odd =
      __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  const Floats even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  const Floats odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
  return even + odd;
}

// Within four elements: the first two for the last two, and each for its neighbour.
inline Floats swap_pairs(Floats x) {
#if defined(KV_WIDE)
  return __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#else
  return __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
#endif
}

inline Floats swap_neighbours(Floats x) {
#if defined(KV_WIDE)
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#else
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
#endif
}

// Element i: the sum of x[i]'s elements, and again from element `count` on. `count`: a power of
// two, at most kLanes. Recursive, so that all of it stays in registers.
template <int count, int width = kLanes>
inline Floats sums(const Floats* x) {
  if constexpr (width == 1) {
    return x[0];
  } else if constexpr (count == 1) {
    const Floats next[1] = {add_pairs(x[0], x[0])};
    return sums<1, width / 2>(next);
  } else {
    Floats next[count / 2];
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; i++) next[i] = add_pairs(x[2 * i], x[2 * i + 1]);
    return sums<count / 2, width / 2>(next);
  }
}

// exp of numbers that are at most 0, off by two units in the last place; 0 below -87.
inline Floats exp_negative(Floats x) {
  const Floats reachable = greater(x, all(-87.0f));
  const Ints whole = __builtin_convertvector(reachable * 1.44269504f - 0.5f, Ints);
  const Floats n = __builtin_convertvector(whole, Floats);
  const Floats rest = (reachable - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats y = all(1.9875691500e-4f);
  y = y * rest + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * (rest * rest) + rest + 1.0f;
  y = y * (Floats)((whole + 127) << 23);
  return choose(x < all(-87.0f), Floats{}, y);
}
