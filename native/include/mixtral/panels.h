// Weights as the kernels read them: panels of 16 rows, every quant and scale a permutation of what the file holds.
//
// A matrix [rows, columns] is cut into panels of 16 rows (the last one padded with zeros). A panel is a plane of quants
// and, after it, a plane of scales. Quants come in groups of 32 columns as vectors of 64 bytes: byte 4n + i of vector j
// belongs to row n and column 4j + i of the group. Of 4 bits, vectors 2j and 2j + 1 share one as low and high nibbles.
//
//   kind  quants of a group                                     scales of a block of 256 columns, or of a group
//   q4_k  4 nibble vectors                                      8 scales u8, 4 pairs of lows u8, d and dmin f16: 320 bytes
//   q5_k  4 nibble vectors, 1 whose bit j is bit 4 of vector j  as q4_k
//   q6_k  4 nibble vectors, 2 whose bit pairs are bits 4 and 5  16 scales i8, d f16: 288 bytes
//   g4    4 nibble vectors                                      scale f16, zero u8: 48 bytes, per `group` columns
//   g8    8 vectors                                             as g4
//
// Every scale is 16 lanes wide, one for each row. A value is (quant - zero) * scale, or scale * quant - low.
#pragma once

#include <cstdint>

namespace mixtral {

enum class Kind : int { q4_k = 0, q5_k = 1, q6_k = 2, g4 = 3, g8 = 4 };

constexpr int kPanel = 16, kGroup = 32, kBlock = 256;

struct Panels {
  Kind kind;
  int64_t rows, columns, group;
  const uint8_t* data;

  int64_t group_bytes() const {
    constexpr int kBytes[] = {256, 320, 384, 256, 512};
    return kBytes[static_cast<int>(kind)];
  }
  // Columns that share a run of scales, and its bytes.
  int64_t span() const { return kind < Kind::g4 ? kBlock : group; }
  int64_t span_bytes() const {
    constexpr int kBytes[] = {320, 320, 288, 48, 48};
    return kBytes[static_cast<int>(kind)];
  }
  int64_t count() const { return (rows + kPanel - 1) / kPanel; }
  int64_t quant_bytes() const { return columns / kGroup * group_bytes(); }
  int64_t panel_bytes() const { return quant_bytes() + columns / span() * span_bytes(); }
  const uint8_t* quants(int64_t panel) const { return data + panel * panel_bytes(); }
  const uint8_t* scales(int64_t panel) const { return quants(panel) + quant_bytes(); }
};

// GGML rows (Q4_K, Q5_K, Q6_K) into panels and back. `blocks` is [rows, bytes of a row].
void pack_blocks(const Panels& shape, const uint8_t* blocks, uint8_t* out, int threads);
void unpack_blocks(const Panels& panels, uint8_t* blocks, int threads);
// Integers in groups: codes u8 [rows, columns], scales f16 [rows, columns / group], zeros u8 of the same shape.
void pack_groups(const Panels& shape, const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, uint8_t* out,
                 int threads);
void unpack_groups(const Panels& panels, uint8_t* codes, uint16_t* scales, uint8_t* zeros, int threads);

}  // namespace mixtral
