// Float16 as bits: conversions to and from float32, to nearest with ties to even.
#pragma once

#include <cstdint>

namespace mixtral {

constexpr uint16_t kInfiniteHalf = 0x7C00;

// Nearest float16 of a finite number; infinity beyond 65,504.
uint16_t nearest_half(float value);
// Smallest float16 that is not below value >= 0; infinity if there is none.
uint16_t half_above(float value);
float widen_half(uint16_t bits);

}  // namespace mixtral
