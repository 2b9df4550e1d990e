// Products of rounded activations with panels of packed weights: exact integers, and float steps in one fixed order.
//
// An activation row is int8 with a float32 scale for each block of 256 columns (A8). A result depends on its row and
// its weights alone: not on other rows, on how rows are grouped, or on the thread; the integers and the order of float
// operations are the same on every instruction set.
#pragma once

#include <cstdint>

#include "mixtral/panels.h"

namespace mixtral {

// 256 columns of a row of rounded activations, with sums of q over 16 columns (also times -32, as Q6_K needs them), over
// 32 and over all. The scale is NaN if a number is not finite. Columns beyond the last one are zero.
struct alignas(64) RoundedBlock {
  int8_t q[kBlock];
  int32_t low16[kBlock / 16];
  int16_t sum16[kBlock / 16];
  int16_t sum32[kBlock / kGroup];
  int32_t sum;
  float scale;
};

// Rounded activations, [blocks, rows]: the rows that a kernel works on at a time are neighbours in memory, in each block.
// Tiles (Kernels::tiles) read up to 15 blocks behind the last one, and use nothing of them.
struct Rounded {
  int64_t rows, columns;
  RoundedBlock* data;

  MIXTRAL_INLINE int64_t blocks() const { return (columns + kBlock - 1) / kBlock; }
  MIXTRAL_INLINE RoundedBlock& at(int64_t row, int64_t block) const { return data[block * rows + row]; }
};

// One instruction set.
struct GemmTable {
  // Rounds `count` values (at most 256).
  void (*round)(const float* values, int count, RoundedBlock& to);
  // out[i * stride + n] for the rows n < 16 * panels of the panels [first, first + panels) and the activation rows[i],
  // i < count. Writes all of them.
  void (*multiply)(const Panels& weights, int64_t first, int64_t panels, const Rounded& a, const int32_t* rows,
                   int64_t count, float* out, int64_t stride);
  // out[i] = gate[i] / (1 + exp(-gate[i])) * up[i]; count is a multiple of 16.
  void (*swiglu)(const float* gate, const float* up, float* out, int64_t count);
};

}  // namespace mixtral
