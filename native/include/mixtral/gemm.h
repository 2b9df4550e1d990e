// Products of rounded activations with panels of packed weights: exact integers, and float steps in one fixed order.
//
// An activation row is int8 with a float32 scale for each block of 256 columns (A8). A result depends on its row and
// its weights alone: not on other rows, on how rows are grouped, or on the thread; the integers and the order of float
// operations are the same on every instruction set.
#pragma once

#include <cstdint>

#include "mixtral/panels.h"

namespace mixtral {

// Rows of rounded activations: q [rows, columns], scales [rows, blocks], and sums of q over 16 columns (also times -32,
// as Q6_K needs them) and over 32 columns. A block with a number that is not finite has the scale NaN.
struct Rounded {
  int64_t columns;
  int8_t* q;
  float* scales;
  int32_t* low16;
  int16_t* sum16;
  int16_t* sum32;

  MIXTRAL_INLINE int64_t blocks() const { return (columns + kBlock - 1) / kBlock; }
};

// One instruction set.
struct GemmTable {
  // Rounds `count` values (a multiple of 32, at most 256) of a row: block number `block` of row `row`.
  void (*round)(const float* values, int count, const Rounded& to, int64_t row, int64_t block);
  // out[i * stride + n] for the 16 rows n of a panel and the activation rows[i], i < count. Writes all 16.
  void (*panel)(const Panels& weights, int64_t panel, const Rounded& a, const int32_t* rows, int64_t count, float* out,
                int64_t stride);
  // out[i] = gate[i] / (1 + exp(-gate[i])) * up[i]; count is a multiple of 16.
  void (*swiglu)(const float* gate, const float* up, float* out, int64_t count);
};

}  // namespace mixtral
