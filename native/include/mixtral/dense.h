// Products with weights that are not quantised, as checkpoints store them: rows of bfloat16, float16 or float32.
//
// A result is a sum of 16 partial sums: number n takes the columns 32 b + 2 n and 32 b + 2 n + 1 of bfloat16 (the odd
// one first), or 16 b + n of the others, in ascending b; the 16 are added in one tree. Activations are float32, and
// rounded to bfloat16 before they meet bfloat16.
//
// The level `amx` sums bfloat16 in the order of its instruction: one sum takes 32 columns at a time, in ascending order;
// their even columns and their odd ones are added up apart, in ascending order from zero, then the two together, then this
// to the sum.
#pragma once

#include <cstdint>

#include "mixtral/inline.h"

namespace mixtral {

enum class Float : int { bf16 = 0, f16 = 1, f32 = 2 };

struct Dense {
  Float kind;
  int64_t rows, columns;
  const uint8_t* data;  // [rows, columns]

  MIXTRAL_INLINE int64_t row_bytes() const { return columns * (kind == Float::f32 ? 4 : 2); }
};

// Activation rows [count, padded]: bfloat16 or float32, with zeros from `columns` to the next multiple of 32. Where there
// are tiles (Kernels::tiles), bfloat16 is [count / 16, padded / 2, 16, 2]: the pairs of 16 rows lie side by side.
struct Plain {
  int64_t padded;
  uint16_t* bf16;
  float* f32;
};

struct DenseTable {
  // out[i * stride + n] for the weight rows first + n, n < columns, and the activation rows[i], i < count.
  void (*multiply)(const Dense& weights, int64_t first, int64_t columns, const Plain& a, const int32_t* rows,
                   int64_t count, float* out, int64_t stride);
  // Columns [column, column + count) of an activation row as bfloat16, the nearest one, ties to even; behind them zeros.
  void (*narrow)(const float* from, int64_t count, int64_t zeros, const Plain& a, int64_t row, int64_t column);
};

}  // namespace mixtral
