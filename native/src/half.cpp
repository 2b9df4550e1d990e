// Conversions between float16 and float32 in integer arithmetic, the same on every machine.
#include "mixtral/half.h"

#include <bit>

namespace mixtral {

uint16_t nearest_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t size = bits & 0x7FFFFFFFu;
  if (size < 0x38800000u) {  // below 2^-14: a whole number of 2^-24
    const float scaled = std::bit_cast<float>(size) * 16777216.0f;
    const float rounded = (scaled + 12582912.0f) - 12582912.0f;
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(rounded));
  }
  if (size >= 0x47800000u) return static_cast<uint16_t>(sign | kInfiniteHalf);  // 65,536 and up
  size += 0xFFFu + (size >> 13 & 1u);
  return static_cast<uint16_t>(sign | (size - 0x38000000u) >> 13);
}

uint16_t half_above(float value) {
  const uint16_t bits = nearest_half(value) & 0x7FFF;  // -0.0 too
  return bits < kInfiniteHalf && widen_half(bits) < value ? static_cast<uint16_t>(bits + 1) : bits;
}

float widen_half(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t size = bits & 0x7FFFu;
  if (size >= kInfiniteHalf) return std::bit_cast<float>(sign | 0x7F800000u | (size & 0x3FFu) << 13);
  if (size < 0x400u) {
    const float value = static_cast<float>(size) * 5.9604644775390625e-8f;  // 2^-24
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
  }
  return std::bit_cast<float>(sign | ((size << 13) + 0x38000000u));
}

}  // namespace mixtral
