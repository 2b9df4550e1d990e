// The tables of encoders that every instruction set fills.
#pragma once

#include <cstdint>

namespace mixtral {

enum class Problem : int { none = 0, not_finite = 1, too_large = 2 };

// What is wrong, and the index of the value (not_finite) or of the first value of the block (too_large).
struct Fault {
  Problem problem;
  int64_t at;
};

// Encodes blocks [begin, end) of an array of rows. `values` and `out` point to block 0; `importance` is one number for
// each column or null; a row is `per_row` blocks. Returns the first value that is not finite, else the first block
// whose scale float16 cannot hold; the bytes of a block with a fault are undefined.
using Encoder = Fault (*)(const float* values, const float* importance, uint8_t* out, int64_t begin, int64_t end,
                          int64_t per_row);

// The same for symmetric integers: a block is a group, its integers go to `codes`, its float16 to `scales`.
using GroupEncoder = Fault (*)(const float* values, const float* importance, uint8_t* codes, uint8_t* scales,
                               int64_t begin, int64_t end, int64_t per_row);

struct KernelTable {
  Encoder q2_k, q3_k, q4_k, q5_k, q6_k;
};

struct GroupTable {
  Encoder q4_0;
  GroupEncoder int3[3], int4[3];  // groups of 32, 64, 128
};

// Two per instruction set, defined by src/kquants.cpp and src/groups.cpp, compiled once for each.
namespace baseline {
extern const KernelTable table;
extern const GroupTable groups;
}  // namespace baseline
namespace avx2 {
extern const KernelTable table;
extern const GroupTable groups;
}  // namespace avx2
namespace avx512 {
extern const KernelTable table;
extern const GroupTable groups;
}  // namespace avx512

// Round to nearest, the same for every instruction set (src/round.cpp). `importance` is ignored.
Fault encode_q8_0(const float* values, const float* importance, uint8_t* out, int64_t begin, int64_t end,
                  int64_t per_row);

}  // namespace mixtral
