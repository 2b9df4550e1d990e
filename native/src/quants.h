// The quants of a panel as bytes, and their products with scales, for gemm.cpp and amx.cpp.
#pragma once

#include "integers.h"

namespace mixtral::MIXTRAL_LEVEL {
namespace {

// Bits of a quant, and whether 16 columns share a scale.
template <Kind K>
constexpr int kBits = K == Kind::q5_k ? 5 : K == Kind::q6_k ? 6 : K == Kind::g8 ? 8 : 4;
template <Kind K>
constexpr bool kSixteen = K == Kind::q2_k || K == Kind::q3_k || K == Kind::q6_k;
template <Kind K>
constexpr bool kMinimums = K == Kind::q2_k || K == Kind::q4_k || K == Kind::q5_k;

inline Bytes shifted(Bytes v, int right) {
  return right >= 0 ? (Bytes)((Words)v >> static_cast<uint16_t>(right)) : (Bytes)((Words)v << static_cast<uint16_t>(-right));
}

// The eight vectors of a group; `from` points to this part of the panel's lanes in the first one.
template <Kind K>
inline void unpack(const uint8_t* from, Bytes* v) {
  if constexpr (K == Kind::g8) {
    for (int j = 0; j < 8; ++j) v[j] = load<Bytes>(from + 64 * j);
    return;
  }
  if constexpr (K == Kind::q2_k) {
    for (int j = 0; j < 8; ++j) v[j] = shifted(load<Bytes>(from + j / 4 * 64), 2 * (j % 4)) & bytes(3);
    return;
  }
  if constexpr (K == Kind::q3_k) {
    const Bytes last = load<Bytes>(from + 128);
    for (int j = 0; j < 6; ++j) v[j] = shifted(load<Bytes>(from + j / 2 * 64), 3 * (j % 2)) & bytes(7);
    for (int j = 0; j < 2; ++j) {
      v[6 + j] = (shifted(load<Bytes>(from + j * 64), 6) & bytes(3)) | (shifted(last, 4 + j) & bytes(4));
    }
    return;
  }
  for (int j = 0; j < 4; ++j) {
    const Bytes both = load<Bytes>(from + 64 * j);
    v[2 * j] = both & bytes(15);
    v[2 * j + 1] = shifted(both, 4) & bytes(15);
  }
  if constexpr (K == Kind::q5_k) {
    const Bytes high = load<Bytes>(from + 256);
    for (int j = 0; j < 8; ++j) v[j] |= shifted(high, j - 4) & bytes(16);
  }
  if constexpr (K == Kind::q6_k) {
    for (int j = 0; j < 8; ++j) v[j] |= shifted(load<Bytes>(from + 256 + j / 4 * 64), 2 * (j % 4) - 4) & bytes(48);
  }
}

#if MIXTRAL_LANES == 16

constexpr int kProduct = 124;  // added to the products of Q3_K, -124 to 128

// `both`: the scales of the two halves of a group, as pairs of words.
template <Kind K>
inline void products(const uint8_t* quants, Words both, Bytes* v) {
  unpack<K>(quants, v);
  const Ints pair = (Ints)both;
  if constexpr (K == Kind::q2_k) {
    // The four products of each of four rows in a table of 16 bytes.
    const Bytes row = (Bytes)(Ints{0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3} * 0x04040404);
    const Bytes first = (Bytes)((pair & 15) * 0x03020100), second = (Bytes)((pair >> 16 & 15) * 0x03020100);
    for (int j = 0; j < 8; ++j) v[j] = look_up(j < 4 ? first : second, v[j] | row);
  } else {
    // Two in a word: the carries of the sums undo those of the products.
    const Words first = (Words)((pair & 0xFFFF) | pair << 16), second = (Words)((pair & -65536) | (pair >> 16 & 0xFFFF));
    const Words add_first = (kProduct - 4 * first) * 257, add_second = (kProduct - 4 * second) * 257;
    for (int j = 0; j < 8; ++j) {
      v[j] = (Bytes)((Words)v[j] * (j < 4 ? first : second) + (j < 4 ? add_first : add_second));
    }
  }
}

#endif

}  // namespace
}  // namespace mixtral::MIXTRAL_LEVEL
