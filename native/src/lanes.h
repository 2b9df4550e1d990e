// Vectors of MIXTRAL_LANES numbers for the kernels, and rows of 16 of them.
//
// A sum over many columns is kept as 16 numbers, and these are added in one fixed tree, so that the width of a register
// changes no result. Everything is internal to the including file: a copy made for wide registers must never serve a
// processor without them.
#pragma once

#include <cstdint>

#include "mixtral/half.h"

#ifdef MIXTRAL_X86
#include <immintrin.h>
#endif

// Loops over registers: unrolled whole, or the registers would live in memory.
#define UNROLL _Pragma("GCC unroll 8")

namespace mixtral::MIXTRAL_LEVEL {
namespace {

constexpr int kLanes = MIXTRAL_LANES, kParts = 16 / kLanes, kBytes = 4 * kLanes;

typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef uint32_t Bits __attribute__((vector_size(kBytes)));
typedef float Floats __attribute__((vector_size(kBytes)));

template <typename T>
inline T load(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
template <typename T>
inline void store(void* to, T value) {
  __builtin_memcpy(to, &value, sizeof value);
}

inline Ints all(int32_t value) { return value - Ints{}; }
inline Floats all(float value) { return value - Floats{}; }
inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

#if defined(MIXTRAL_X86) && MIXTRAL_LANES == 16

inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm512_maskz_max_ps(0xFFFF, a, b); }
inline Floats halves(const void* from) {
  return _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
// sum + the four products of a byte without sign (a) and one with a sign (b), for every lane.
inline Ints quads(Ints sum, Ints a, Ints b) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}

#elif defined(MIXTRAL_X86) && defined(__AVX2__)

inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats halves(const void* from) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from))); }
inline Ints quads(Ints sum, Ints a, Ints b) {
  // 255 * 127 * 2 does not fit 16 bits: the highest bit of a goes by itself.
  const __m256i ones = _mm256_set1_epi16(1), top = _mm256_set1_epi8(-128);
  const __m256i high = _mm256_and_si256((__m256i)a, top), low = _mm256_andnot_si256(top, (__m256i)a);
  const __m256i first = _mm256_madd_epi16(_mm256_maddubs_epi16(high, (__m256i)b), ones);
  const __m256i second = _mm256_madd_epi16(_mm256_maddubs_epi16(low, (__m256i)b), ones);
  return sum + (Ints)_mm256_add_epi32(first, second);
}

#else

inline Floats fma(Floats a, Floats b, Floats c) {
  for (int n = 0; n < kLanes; ++n) c[n] = __builtin_fmaf(a[n], b[n], c[n]);
  return c;
}
// As the instructions do: the second one where either is not a number.
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats halves(const void* from) {
  Floats wide{};
  for (int n = 0; n < kLanes; ++n) wide[n] = widen_half(load<uint16_t>(static_cast<const uint8_t*>(from) + 2 * n));
  return wide;
}
inline Ints quads(Ints sum, Ints a, Ints b) {
  for (int n = 0; n < kLanes; ++n) {
    for (int i = 0; i < 4; ++i) sum[n] += (a[n] >> 8 * i & 0xFF) * static_cast<int8_t>(b[n] >> 8 * i & 0xFF);
  }
  return sum;
}

#endif

// sum + the two products of bfloat16 pairs, for every lane: the odd one first, then the even one, each sum rounded, and
// subnormal numbers as zero. (A product of two bfloat16 is exact.)
inline Floats bf16_pairs(Floats sum, Ints a, Ints b) {
#ifdef MIXTRAL_BF16
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  const Ints odd = all(static_cast<int32_t>(0xFFFF0000));
  sum = fma((Floats)(a & odd), (Floats)(b & odd), sum);
  return fma((Floats)(a << 16), (Floats)(b << 16), sum);
#endif
}

// Float32 to bfloat16 in the low halves, to nearest with ties to even; what is not a number stays so.
inline Ints to_bf16(Floats x) {
  const Bits bits = (Bits)x;  // of what is not a number the sum may be too large: without a sign it wraps around
  const Ints rounded = (Ints)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  return x == x ? rounded : all(0x7FC0);
}
inline uint16_t to_bf16(float x) {
  const uint32_t bits = load<uint32_t>(&x);
  return x == x ? static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) : 0x7FC0;
}
inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  return load<float>(&wide);
}

// 1 / 5! down to 1 / 0!.
constexpr float kPowers[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};

// exp(x) for |x| <= 87, relative error below 2^-22: 2^n times a polynomial in the rest; products and sums only.
inline Floats exponential(Floats x) {
  const Floats sum = x * 1.44269504f + 12582912.0f, n = sum - 12582912.0f;
  const Floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Floats p = all(1.0f / 720);
  for (const float c : kPowers) p = p * r + c;
  // The lowest bits of the sum are n. What is not a number has made p one that is none, whatever it is multiplied by.
  return p * (Floats)(((Bits)sum + 127) << 23);
}

struct Row16 {
  Floats part[kParts];
};

// The sum of 16 numbers: halves on top of each other.
inline float total(const float* lanes) {
  float eight[8], four[4];
  for (int i = 0; i < 8; ++i) eight[i] = lanes[i] + lanes[i + 8];
  for (int i = 0; i < 4; ++i) four[i] = eight[i] + eight[i + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}
inline float total(const Row16& row) {
  float lanes[16];
  __builtin_memcpy(lanes, &row, sizeof lanes);
  return total(lanes);
}

}  // namespace
}  // namespace mixtral::MIXTRAL_LEVEL
