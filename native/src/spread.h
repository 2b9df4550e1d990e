// Integers of any width, the lowest bit first, as bytes.
#pragma once
#include <cstdint>
#include <cstring>

#include "kinds.h"

namespace mixtral {

// Eight numbers of `bits` as a byte each.
template <int Bits>
INLINE uint64_t spread(const uint8_t* from) {
  uint64_t x = 0;
  std::memcpy(&x, from, Bits);
  if constexpr (Bits < 8) {
    constexpr uint64_t kFour = (uint64_t{1} << 4 * Bits) - 1, kTwo = (1 << 2 * Bits) - 1, kOne = (1 << Bits) - 1;
    x = (x & kFour) | (x >> 4 * Bits) << 32;
    x = (x & kTwo * 0x100000001) | (x >> 2 * Bits & kTwo * 0x100000001) << 16;
    x = (x & kOne * 0x1000100010001) | (x >> Bits & kOne * 0x1000100010001) << 8;
  }
  return x;
}

}  // namespace mixtral
