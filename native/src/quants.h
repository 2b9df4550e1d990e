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

// Vector j of the eight of a group; `from` points to this part of the panel's lanes in the first one. Where loops are
// unrolled j is known, and only what it needs is loaded.
template <Kind K>
inline Bytes quant(const uint8_t* from, int j) {
  if constexpr (K == Kind::g8) return load<Bytes>(from + 64 * j);
  if constexpr (K == Kind::q2_k) return shifted(load<Bytes>(from + j / 4 * 64), 2 * (j % 4)) & bytes(3);
  if constexpr (K == Kind::q3_k) {
    if (j < 6) return shifted(load<Bytes>(from + j / 2 * 64), 3 * (j % 2)) & bytes(7);
    const Bytes low = shifted(load<Bytes>(from + (j - 6) * 64), 6) & bytes(3);
    return low | (shifted(load<Bytes>(from + 128), j - 2) & bytes(4));
  }
  const Bytes v = shifted(load<Bytes>(from + j / 2 * 64), 4 * (j % 2)) & bytes(15);
  if constexpr (K == Kind::q5_k) return v | (shifted(load<Bytes>(from + 256), j - 4) & bytes(16));
  if constexpr (K == Kind::q6_k) return v | (shifted(load<Bytes>(from + 256 + j / 4 * 64), 2 * (j % 4) - 4) & bytes(48));
  return v;
}

// All eight vectors of a group.
template <Kind K>
inline void unpack(const uint8_t* from, Bytes* v) {
  UNROLL for (int j = 0; j < 8; ++j) v[j] = quant<K>(from, j);
}

#if MIXTRAL_LANES == 16

constexpr int kProduct = 124;  // added to the products of Q3_K, -124 to 128

// What turns the quants of a panel's group into products: of Q2_K the four products of each of four rows, a table of 16
// bytes, for each half of the group; of Q3_K the scales as words, and what is added.
template <Kind K>
struct Products {
  Bytes table[2];
  Words scale[2], add[2];

  // `both`: the scales of the two halves of a group, as pairs of words.
  explicit Products(Words both) {
    const Ints pair = (Ints)both;
    if constexpr (K == Kind::q2_k) {
      table[0] = (Bytes)((pair & 15) * 0x03020100), table[1] = (Bytes)((pair >> 16 & 15) * 0x03020100);
    } else {
      scale[0] = (Words)((pair & 0xFFFF) | pair << 16), scale[1] = (Words)((pair & -65536) | (pair >> 16 & 0xFFFF));
      for (int half = 0; half < 2; ++half) add[half] = (kProduct - 4 * scale[half]) * 257;
    }
  }

  Bytes operator()(const uint8_t* from, int j) const {
    const Bytes v = quant<K>(from, j);
    if constexpr (K == Kind::q2_k) {
      const Bytes row = (Bytes)(Ints{0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3} * 0x04040404);
      return look_up(table[j / 4], v | row);
    } else {
      // Two in a word: the carries of the sums undo those of the products.
      return (Bytes)((Words)v * scale[j / 4] + add[j / 4]);
    }
  }
};

// All eight vectors of a group, times the scales.
template <Kind K>
inline void products(const uint8_t* quants, Words both, Bytes* v) {
  const Products<K> times(both);
  UNROLL for (int j = 0; j < 8; ++j) v[j] = times(quants, j);
}

#endif

}  // namespace
}  // namespace mixtral::MIXTRAL_LEVEL
