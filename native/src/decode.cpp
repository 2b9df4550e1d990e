// Integers in groups to numbers: (code - zero) * scale in float32, rounded once where the result is bfloat16.
#include <algorithm>
#include <cstring>

#include "mixtral/panels.h"
#include "mixtral/pool.h"
#include "spread.h"

namespace mixtral {
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
void decode_run(const uint8_t* codes, int64_t count, float scale, int zero, Number* out) {
  uint8_t q[kRun];
  for (int64_t k = 0; k < count; k += 8, codes += Bits) {
    const uint64_t eight = spread<Bits>(codes);
    std::memcpy(q + k, &eight, sizeof eight);
  }
  for (int64_t k = 0; k < count; ++k) out[k] = made_of(static_cast<float>(q[k] - zero) * scale, out);
}

template <int Bits, typename Number>
void decode_row(const Grouped& from, int64_t row, Number* out) {
  const uint8_t* codes = from.codes + row * (from.columns / 8 * Bits);
  const int64_t groups = from.columns / from.group;
  for (int64_t g = 0; g < groups; ++g) {
    const float scale = from.scales[row * groups + g];
    const int zero = from.zeros != nullptr ? from.zeros[row * groups + g] : 1 << (Bits - 1);
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
using Decoder = void (*)(const Grouped&, int64_t, Number*);

template <typename Number>
Decoder<Number> decoder_of(int bits) {
  switch (bits) {
    case 1: return decode_row<1, Number>;
    case 2: return decode_row<2, Number>;
    case 3: return decode_row<3, Number>;
    case 4: return decode_row<4, Number>;
    case 5: return decode_row<5, Number>;
    case 6: return decode_row<6, Number>;
    case 7: return decode_row<7, Number>;
    default: return decode_row<8, Number>;
  }
}

template <typename Number>
void decode_rows(const Grouped& from, int64_t rows, Number* out, int threads) {
  constexpr int64_t kValues = 1 << 15;  // that a thread decodes at a time
  const Decoder<Number> decoder = decoder_of<Number>(from.bits);
  const int64_t step = std::max<int64_t>(1, kValues / from.columns);
  parallel((rows + step - 1) / step, threads, [&](int64_t part) {
    for (int64_t row = part * step; row < std::min(rows, (part + 1) * step); ++row) {
      decoder(from, row, out + row * from.columns);
    }
  });
}

}  // namespace

void decode_groups(const Grouped& from, int64_t rows, uint16_t* out, int threads) { decode_rows(from, rows, out, threads); }
void decode_groups(const Grouped& from, int64_t rows, float* out, int threads) { decode_rows(from, rows, out, threads); }

}  // namespace mixtral
