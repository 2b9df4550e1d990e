// Vectors of MIXTRAL_WIDTH floats and what the encoders do with them, for kquants.cpp and groups.cpp.
//
// Lanes never mix inside a vector, except where they are turned, so that the width changes no result. Everything is
// internal to the including file: a copy made for wide registers must never serve a processor without them.
#pragma once

#include <cstdint>
#include <utility>

#ifdef MIXTRAL_X86
#include <immintrin.h>
#endif

namespace mixtral::MIXTRAL_LEVEL {
namespace {

constexpr int kWidth = MIXTRAL_WIDTH;
constexpr int kLanes = 16;
constexpr float kTiny = 0x1p-60f;
// Values that no float16 scale can reach, and values that none can tell from zero.
constexpr float kTooLarge = 0x1p30f, kNothing = 0x1p-60f;
// Added to the number of steps that the range is divided into.
constexpr float kOffsets[] = {-1.5f, -1.125f, -0.75f, -0.375f, 0.0f, 0.375f, 0.75f};

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef float Row[kLanes] __attribute__((aligned(64)));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
// The same from any address of a float.
inline Vec load_any(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Ints bits_of(Vec v) { return reinterpret_cast<Ints>(v); }
inline Vec floats_of(Ints v) { return reinterpret_cast<Vec>(v); }
inline Vec all(float value) { return value - Vec{}; }

inline Vec larger(Vec a, Vec b) {
#if MIXTRAL_WIDTH == 16 && defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xFFFF, a, b);  // the plain one warns of an uninitialised value in GCC 12
#elif MIXTRAL_WIDTH == 8 && defined(__AVX__)
  return _mm256_max_ps(a, b);
#elif MIXTRAL_WIDTH == 4 && defined(__SSE__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Vec smaller(Vec a, Vec b) {
#if MIXTRAL_WIDTH == 16 && defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xFFFF, a, b);
#elif MIXTRAL_WIDTH == 8 && defined(__AVX__)
  return _mm256_min_ps(a, b);
#elif MIXTRAL_WIDTH == 4 && defined(__SSE__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline Vec size_of(Vec a) { return larger(a, -a); }

// a / b, and 0 where b is as good as 0.
inline Vec divide(Vec a, Vec b) {
  const auto usable = size_of(b) > kTiny;
  return usable ? a / (usable ? b : all(1.0f)) : all(0.0f);
}

inline float divide(float a, float b) { return (b < 0.0f ? -b : b) > kTiny ? a / b : 0.0f; }

// The nearest integer (of small numbers), ties to even. The sum has no bits left for a fraction.
inline Vec nearest(Vec v) {
#if MIXTRAL_WIDTH == 16 && defined(__AVX512F__)
  return _mm512_maskz_roundscale_ps(0xFFFF, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif MIXTRAL_WIDTH == 8 && defined(__AVX__)
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (v + 12582912.0f) - 12582912.0f;
#endif
}

// The same in low..high, by the sum everywhere.
inline Vec round_to(Vec x, float low, float high) {
  const Vec clamped = smaller(larger(x, all(low)), all(high));
  return (clamped + 12582912.0f) - 12582912.0f;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The power of two that brings a size (as bits, normal and below 2^126) into [0.5, 1).
inline float unit_for(uint32_t bits) {
  const uint32_t power = (253u - (bits >> 23)) << 23;
  float unit;
  __builtin_memcpy(&unit, &power, sizeof unit);
  return unit;
}

// --- rows of values to rows of lanes ---------------------------------------------------------------------------------

template <int D>
constexpr int upper(int lane) {
  return lane & D ? kWidth + lane - D : lane;
}

template <int D>
constexpr int lower(int lane) {
  return lane & D ? kWidth + lane : lane + D;
}

// Of the square that two vectors D rows apart make with their neighbours D lanes apart, swaps two corners.
template <int D, int... Lane>
inline void swap_corners(Vec& a, Vec& b, std::integer_sequence<int, Lane...>) {
  const Vec top = __builtin_shufflevector(a, b, upper<D>(Lane)...);
  b = __builtin_shufflevector(a, b, lower<D>(Lane)...);
  a = top;
}

template <int D>
inline void swap_all(Vec (&rows)[kWidth]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (!(i & D)) swap_corners<D>(rows[i], rows[i + D], std::make_integer_sequence<int, kWidth>());
  }
  if constexpr (D > 1) swap_all<D / 2>(rows);
}

// Row i of the result holds value i of each of the kLanes arrays in `from`; `count` is a multiple of kWidth.
inline void turn(const float* const* from, int count, Row* to) {
  for (int g = 0; g < kLanes; g += kWidth) {
    for (int start = 0; start < count; start += kWidth) {
      Vec square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) square[i] = load_any(from[g + i] + start);
      swap_all<kWidth / 2>(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(&to[start + i][g], square[i]);
    }
  }
}

}  // namespace
}  // namespace mixtral::MIXTRAL_LEVEL
