// Bytes and words of quants, and sums of their products, for gemm.cpp: what lanes.h has not.
//
// Lanes never mix, so that their number changes no result.
#pragma once

#include "lanes.h"
#include "mixtral/panels.h"

namespace mixtral::MIXTRAL_LEVEL {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
typedef uint16_t Words __attribute__((vector_size(kBytes)));

inline Bytes bytes(uint8_t value) { return value - Bytes{}; }

#if defined(MIXTRAL_X86) && MIXTRAL_LANES == 16

// The plain forms of these make GCC 12 warn of an uninitialised value.
inline Ints widen(const uint8_t* from) {
  return (Ints)_mm512_maskz_cvtepu8_epi32(0xFFFF, _mm_loadu_si128((const __m128i*)from));
}
inline Ints widen_signed(const uint8_t* from) {
  return (Ints)_mm512_maskz_cvtepi8_epi32(0xFFFF, _mm_loadu_si128((const __m128i*)from));
}

// The sum over 4N columns of quants (v) times activations (a), for every lane, on top of `sum`.
template <int N, int Width>
inline Ints dot(Ints sum, const Bytes* v, const int8_t* a) {
  __m512i total = (__m512i)sum;
  UNROLL for (int j = 0; j < N; ++j) {
    total = _mm512_dpbusd_epi32(total, (__m512i)v[j], _mm512_set1_epi32(load<int32_t>(a + 4 * j)));
  }
  return (Ints)total;
}

// Pairs of bytes (u8 [lanes, 2]) as pairs of words.
inline Words pairs(const uint8_t* from) { return (Words)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from)); }
inline Words pairs_signed(const uint8_t* from) {
  return (Words)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
}
// Bytes of `table` that `places` name, each among the 16 of its own quarter.
inline Bytes look_up(Bytes table, Bytes places) {
  return (Bytes)_mm512_shuffle_epi8((__m512i)table, (__m512i)places);
}
// sum + pairs of signed words times one pair.
inline Ints add_pairs(Ints sum, Words pairs, int32_t by) {
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)pairs, _mm512_set1_epi32(by));
}

#elif defined(MIXTRAL_X86) && defined(__AVX2__)

inline Ints widen(const uint8_t* from) { return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
inline Ints widen_signed(const uint8_t* from) { return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)); }

template <int N, int Width>
inline Ints dot(Ints sum, const Bytes* v, const int8_t* a) {
  const __m256i ones = _mm256_set1_epi16(1);
  // vpmaddubsw adds two products in 16 bits, and so many of its results can be added before they overflow.
  constexpr int kRun = Width == 4 ? 8 : Width == 5 ? 4 : 2;
  __m256i total = (__m256i)sum;
  UNROLL for (int j = 0; j < N; j += kRun) {
    __m256i words = _mm256_setzero_si256();
    for (int i = j; i < j + kRun && i < N; ++i) {
      const __m256i x = _mm256_set1_epi32(load<int32_t>(a + 4 * i));
      if constexpr (Width == 8) {
        // 255 * 127 * 2 does not fit: the highest bit goes by itself.
        const __m256i high = _mm256_and_si256((__m256i)v[i], _mm256_set1_epi8(-128));
        const __m256i low = _mm256_andnot_si256(_mm256_set1_epi8(-128), (__m256i)v[i]);
        total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), ones));
        total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones));
      } else {
        words = _mm256_add_epi16(words, _mm256_maddubs_epi16((__m256i)v[i], x));
      }
    }
    if constexpr (Width != 8) total = _mm256_add_epi32(total, _mm256_madd_epi16(words, ones));
  }
  return (Ints)total;
}

inline Words pairs(const uint8_t* from) { return (Words)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from)); }
inline Ints add_pairs(Ints sum, Words pairs, int32_t by) {
  return (Ints)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi32(by)));
}

#else

inline Ints widen(const uint8_t* from) {
  Ints wide{};
  for (int n = 0; n < kLanes; ++n) wide[n] = from[n];
  return wide;
}

inline Ints widen_signed(const uint8_t* from) {
  Ints wide{};
  for (int n = 0; n < kLanes; ++n) wide[n] = static_cast<int8_t>(from[n]);
  return wide;
}

inline Words pairs(const uint8_t* from) {
  Words wide{};
  for (int n = 0; n < 2 * kLanes; ++n) wide[n] = from[n];
  return wide;
}

#ifdef MIXTRAL_X86

template <int N, int Width>
inline Ints dot(Ints sum, const Bytes* v, const int8_t* a) {
  __m128i total = (__m128i)sum;
  UNROLL for (int j = 0; j < N; ++j) {
    // Columns 0 and 2 of the four, and 1 and 3, as words.
    const __m128i x = _mm_set1_epi32(load<int32_t>(a + 4 * j)), even = _mm_srai_epi16(_mm_slli_epi16(x, 8), 8);
    const __m128i first = _mm_and_si128((__m128i)v[j], _mm_set1_epi16(255)), second = _mm_srli_epi16((__m128i)v[j], 8);
    total = _mm_add_epi32(total, _mm_madd_epi16(first, even));
    total = _mm_add_epi32(total, _mm_madd_epi16(second, _mm_srai_epi16(x, 8)));
  }
  return (Ints)total;
}

inline Ints add_pairs(Ints sum, Words pairs, int32_t by) {
  return (Ints)_mm_add_epi32((__m128i)sum, _mm_madd_epi16((__m128i)pairs, _mm_set1_epi32(by)));
}

#else

template <int N, int Width>
inline Ints dot(Ints sum, const Bytes* v, const int8_t* a) {
  for (int j = 0; j < N; ++j) {
    for (int n = 0; n < kLanes; ++n) {
      for (int i = 0; i < 4; ++i) sum[n] += v[j][4 * n + i] * a[4 * j + i];
    }
  }
  return sum;
}

inline Ints add_pairs(Ints sum, Words pairs, int32_t by) {
  const int32_t first = static_cast<int16_t>(by & 0xFFFF), second = by >> 16;
  for (int n = 0; n < kLanes; ++n) {
    sum[n] += static_cast<int16_t>(pairs[2 * n]) * first + static_cast<int16_t>(pairs[2 * n + 1]) * second;
  }
  return sum;
}

#endif

#endif

}  // namespace
}  // namespace mixtral::MIXTRAL_LEVEL
