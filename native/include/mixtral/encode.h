// Weight encoders over whole arrays: choice of instruction set, threads, the first fault.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "mixtral/kernels.h"

namespace mixtral {

// One GGML format: its name, values and bytes of a block, its encoder.
struct Format {
  std::string_view name;
  int64_t values;
  int64_t bytes;
  Encoder encoder;
};

// Instruction sets that this build holds and this processor runs, the fastest one last.
std::vector<std::string_view> levels();
// The format called `name` with the encoder of instruction set `level` (empty: the fastest one); a null encoder if
// either is unknown.
Format find_format(std::string_view name, std::string_view level);
// Encodes `blocks` blocks on `threads` threads, the calling one included; the bytes do not depend on how many.
Fault encode(const Format& format, const float* values, const float* importance, uint8_t* out, int64_t blocks,
             int64_t per_row, int threads);

// The encoder of symmetric integers of `bits` in groups of `group` values; null if there is none, or no such level.
GroupEncoder find_integers(int bits, int64_t group, std::string_view level);
// As `encode`, for groups.
Fault encode_groups(GroupEncoder encoder, int64_t group, const float* values, const float* importance, uint8_t* codes,
                    uint8_t* scales, int64_t groups, int64_t per_row, int threads);

}  // namespace mixtral
