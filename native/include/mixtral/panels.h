// Weights as the kernels read them: panels of 16 rows, every quant and scale a permutation of what the file holds.
//
// A matrix [rows, columns] is cut into panels of 16 rows (the last one padded with zeros), and a panel into blocks of 256
// columns: quants and, after them, scales. Memory is read in one run, which was a third faster than quants and scales in
// two planes. Quants come in groups of 32 columns as vectors of 64 bytes: byte 4n + i of vector j
// belongs to row n and column 4j + i of the group. Of 4 bits, vectors 2j and 2j + 1 share one as low and high nibbles.
//
//   kind  quants of a group                                      scales of a block of 256 columns, or of a group
//   q2_k  2 vectors, the bit pairs of the first are vectors 0-3   16 bytes (scale, and minimum * 16), d and dmin f16: 320 bytes
//   q3_k  3 vectors of 3-bit fields: two in the low six bits of   16 scales i8, d f16: 288 bytes
//         each; the top bits of the first and second are the low
//         two bits of vectors 6 and 7, those of the third the rest
//   q4_k  4 nibble vectors                                        8 scales u8, 8 minimums u8, d and dmin f16: 320 bytes
//   q5_k  4 nibble vectors, 1 whose bit j is bit 4 of vector j    as q4_k
//   q6_k  4 nibble vectors, 2 whose bit pairs are bits 4 and 5    16 scales i8, d f16: 288 bytes
//   g4    4 nibble vectors                                        scale f16, zero u8: 48 bytes, per `group` columns
//   g8    8 vectors                                               as g4
//
// Every scale is 16 lanes wide, one for each row; the bytes of q2_k, the scales of q3_k and the minimums of q4_k and q5_k
// are pairs, 2 * 16 lanes, of sub-blocks that follow each other. A value is (quant - zero) * scale, or scale * quant -
// minimum; the zero of q3_k is 4 and that of q6_k is 32.
#pragma once

#include <cstdint>

#include "mixtral/inline.h"

namespace mixtral {

enum class Kind : int { q2_k = 0, q3_k = 1, q4_k = 2, q5_k = 3, q6_k = 4, g4 = 5, g8 = 6 };

constexpr int kPanel = 16, kGroup = 32, kBlock = 256;

// Bytes of 32 quants of 16 rows, and of a run of scales.
MIXTRAL_INLINE constexpr int64_t quant_bytes_of(Kind kind) {
  constexpr int kBytes[] = {128, 192, 256, 320, 384, 256, 512};
  return kBytes[static_cast<int>(kind)];
}
MIXTRAL_INLINE constexpr int64_t scale_bytes_of(Kind kind) {
  constexpr int kBytes[] = {320, 288, 320, 320, 288, 48, 48};
  return kBytes[static_cast<int>(kind)];
}
// Values and bytes of the GGML block that a kind is packed from; of g4 and g8 those of Q4_0 and Q8_0.
MIXTRAL_INLINE constexpr int64_t block_values_of(Kind kind) { return kind < Kind::g4 ? kBlock : kGroup; }
MIXTRAL_INLINE constexpr int64_t block_bytes_of(Kind kind) {
  constexpr int kBytes[] = {84, 110, 144, 176, 210, 18, 34};
  return kBytes[static_cast<int>(kind)];
}

struct Panels {
  Kind kind;
  int64_t rows, columns, group;
  const uint8_t* data;

  MIXTRAL_INLINE int64_t count() const { return (rows + kPanel - 1) / kPanel; }
  MIXTRAL_INLINE int64_t blocks() const { return (columns + kBlock - 1) / kBlock; }
  // Bytes of a block of so many columns; a multiple of 64.
  MIXTRAL_INLINE int64_t block_bytes(int64_t width) const {
    return (width / kGroup * quant_bytes_of(kind) + width / (kind < Kind::g4 ? kBlock : group) * scale_bytes_of(kind) + 63) / 64 * 64;
  }
  // From a block to the next one. The last block of a row may be shorter.
  MIXTRAL_INLINE int64_t stride() const { return block_bytes(kBlock); }
  // Where the scales of a block begin.
  MIXTRAL_INLINE int64_t scales_at(int64_t block) const {
    const int64_t left = columns - block * kBlock;
    return (left < kBlock ? left : kBlock) / kGroup * quant_bytes_of(kind);
  }
  MIXTRAL_INLINE int64_t panel_bytes() const {
    const int64_t whole = columns / kBlock, rest = columns % kBlock;
    return whole * stride() + (rest == 0 ? 0 : block_bytes(rest));
  }
  MIXTRAL_INLINE const uint8_t* panel(int64_t number) const { return data + number * panel_bytes(); }
};

// GGML rows into panels: Q2_K to Q6_K, and Q4_0 and Q8_0 as g4 and g8 with groups of 32. `blocks` is [rows, bytes of a
// row]. False if a scale is not finite.
bool pack_blocks(const Panels& shape, const uint8_t* blocks, uint8_t* out, int threads);
// The inverse, for q2_k to q6_k.
void unpack_blocks(const Panels& panels, uint8_t* blocks, int threads);
// Integers of `bits` (1 to 8) in groups of `group` columns, a multiple of the panels' own group: codes [rows, columns *
// bits / 8], the lowest bit first; scales f16 [rows, columns / group]; zeros u8 of the same shape, or null where all are
// half of the range.
struct Coded {
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* zeros;
  int bits;
  int64_t group;
};
void pack_groups(const Panels& shape, const Coded& from, uint8_t* out, int threads);
// Into codes of a byte each [rows, columns], and scales and zeros [rows, columns / the panels' group].
void unpack_groups(const Panels& panels, uint8_t* codes, uint16_t* scales, uint8_t* zeros, int threads);

}  // namespace mixtral
