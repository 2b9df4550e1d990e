// Integers in groups to numbers: the passes over rows of decode.h.
#include "mixtral/decode.h"

#include <cstring>

#include "spread.h"

#if defined(MIXTRAL_X86) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace mixtral::MIXTRAL_LEVEL {
namespace {

INLINE float made_of(float value, float*) { return value; }

// To nearest, ties to even. An infinite product stays one, and none is NaN, as scales are finite.
INLINE uint16_t made_of(float value, uint16_t*) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

constexpr int64_t kRun = 64;  // codes that are bytes before they are numbers

template <int Bits, typename Number>
INLINE void decode_run(const uint8_t* codes, int64_t count, float scale, int zero, Number* out) {
  uint8_t q[kRun];
  for (int64_t k = 0; k < count; k += 8, codes += Bits) {
    const uint64_t eight = spread<Bits>(codes);
    std::memcpy(q + k, &eight, sizeof eight);
  }
  for (int64_t k = 0; k < count; ++k) out[k] = made_of(static_cast<float>(q[k] - zero) * scale, out);
}

#if defined(MIXTRAL_X86) && defined(__AVX512BW__)
// Of four bits there are only 16 numbers in a group: they are made once, and a permutation of words finds 32 at a time.
INLINE void look_up(const uint8_t* codes, int64_t count, float scale, int zero, uint16_t* out) {
  uint16_t numbers[32];
  for (int k = 0; k < 16; ++k) numbers[k] = numbers[k + 16] = made_of(static_cast<float>(k - zero) * scale, numbers);
  const __m512i table = _mm512_loadu_si512(numbers), nibbles = _mm512_set1_epi32(0x000F000F);
  for (int64_t k = 0; k < count; k += 32, codes += 16) {
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m512i places = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12)), nibbles);
    _mm512_storeu_si512(out + k, _mm512_permutexvar_epi16(places, table));
  }
}
#endif

template <int Bits, typename Number>
void decode_row(const Grouped& from, int64_t row, Number* out) {
  const uint8_t* codes = from.codes + row * (from.columns / 8 * Bits);
  const int64_t groups = from.columns / from.group;
  for (int64_t g = 0; g < groups; ++g) {
    const float scale = from.scales[row * groups + g];
    const int zero = from.zeros != nullptr ? from.zeros[row * groups + g] : 1 << (Bits - 1);
#if defined(MIXTRAL_X86) && defined(__AVX512BW__)
    if constexpr (Bits == 4 && sizeof(Number) == 2) {
      if (from.group % 32 == 0) {
        look_up(codes, from.group, scale, zero, out);
        out += from.group;
        codes += from.group / 2;
        continue;
      }
    }
#endif
    for (int64_t left = from.group; left > 0; left -= kRun, out += kRun, codes += kRun / 8 * Bits) {
      if (left < kRun) {
        decode_run<Bits>(codes, left, scale, zero, out);
        out += left;
        codes += left / 8 * Bits;
        break;
      }
      decode_run<Bits>(codes, kRun, scale, zero, out);
    }
  }
}

template <typename Number>
void decode_rows(const Grouped& from, int64_t begin, int64_t end, Number* out) {
  constexpr void (*kDecoders[])(const Grouped&, int64_t, Number*) = {
      decode_row<1, Number>, decode_row<2, Number>, decode_row<3, Number>, decode_row<4, Number>,
      decode_row<5, Number>, decode_row<6, Number>, decode_row<7, Number>, decode_row<8, Number>};
  for (int64_t row = begin; row < end; ++row) kDecoders[from.bits - 1](from, row, out + row * from.columns);
}

}  // namespace

extern const DecodeTable decode;
const DecodeTable decode = {decode_rows<uint16_t>, decode_rows<float>};

}  // namespace mixtral::MIXTRAL_LEVEL
