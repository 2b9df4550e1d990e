// Integers in groups to numbers: (code - zero) * scale in float32, rounded once where the result is bfloat16.
#pragma once

#include <cstdint>

namespace mixtral {

// Rows of integers of `bits` (1 to 8) in groups of `group` columns, a multiple of 8: codes [rows, columns * bits / 8], the
// lowest bit first; scales f32 [rows, columns / group], finite; zeros u8 of the same shape, or null where all are half of
// the range.
struct Grouped {
  const uint8_t* codes;
  const float* scales;
  const uint8_t* zeros;
  int bits;
  int64_t columns, group;
};

// The numbers of the rows from begin to end, at their places in `out` [rows, columns].
struct DecodeTable {
  void (*halves)(const Grouped& from, int64_t begin, int64_t end, uint16_t* out);
  void (*floats)(const Grouped& from, int64_t begin, int64_t end, float* out);
};

}  // namespace mixtral
