// Q8_0: blocks of 32 values with one float16 scale, rounded to nearest; the same bytes as ggml's reference.
#include <cmath>

#include "mixtral/half.h"
#include "mixtral/kernels.h"

namespace mixtral {
namespace {

constexpr int kValues = 32, kBytes = 34;
constexpr float kLargest = 3.4028234663852886e38f;

// The largest size of the block's values; false if a value is not finite.
bool find_largest(const float* x, float& size) {
  size = 0.0f;
  bool finite = true;
  for (int i = 0; i < kValues; ++i) {
    const float a = std::fabs(x[i]);
    finite &= a <= kLargest;
    size = a > size ? a : size;
  }
  return finite;
}

Fault first_not_finite(const float* values, int64_t block) {
  int64_t at = block * kValues;
  while (std::fabs(values[at]) <= kLargest) ++at;
  return {Problem::not_finite, at};
}

// 1 / d; 0 where that is infinite, because such a d is zero in float16.
float invert(float d) {
  const float inverse = d == 0.0f ? 0.0f : 1.0f / d;
  return std::fabs(inverse) <= kLargest ? inverse : 0.0f;
}

void pack(const float* x, float inverse, uint8_t* out) {
  for (int i = 0; i < kValues; ++i) {
    const float v = x[i] * inverse;
    const float size = std::fabs(v);
    const int whole = static_cast<int>(size);
    // Halves away from zero, as ggml rounds here.
    const int rounded = whole + static_cast<int>(2.0f * (size - static_cast<float>(whole)));
    out[i] = static_cast<uint8_t>(v < 0.0f ? -rounded : rounded);
  }
}

}  // namespace

Fault encode_q8_0(const float* values, const float*, uint8_t* out, int64_t begin, int64_t end, int64_t) {
  Fault fault{Problem::none, 0};
  for (int64_t block = begin; block < end; ++block) {
    const float* x = values + block * kValues;
    float size;
    if (!find_largest(x, size)) return first_not_finite(values, block);
    const float d = size / 127.0f;
    const uint16_t half = nearest_half(d);
    if (half >= kInfiniteHalf) {
      if (fault.problem == Problem::none) fault = {Problem::too_large, block * kValues};
      continue;
    }
    uint8_t* to = out + block * kBytes;
    to[0] = static_cast<uint8_t>(half);
    to[1] = static_cast<uint8_t>(half >> 8);
    pack(x, invert(d), to + 2);
  }
  return fault;
}

}  // namespace mixtral
