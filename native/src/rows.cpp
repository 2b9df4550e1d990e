// The operations of rows.h, compiled once for each instruction set with MIXTRAL_LEVEL and MIXTRAL_LANES.
#include "mixtral/rows.h"

#include "lanes.h"

namespace mixtral::MIXTRAL_LEVEL {
namespace {

// The sum of a[i] * b[i] as 16 partial sums: number n takes the columns 16 i + n.
inline float dot(const float* a, const float* b, int64_t columns) {
  Row16 sums{};
  int64_t i = 0;
  for (; i + 16 <= columns; i += 16) {
    UNROLL for (int part = 0; part < kParts; ++part) {
      const int64_t at = i + part * kLanes;
      sums.part[part] = fma(load<Floats>(a + at), load<Floats>(b + at), sums.part[part]);
    }
  }
  float lanes[16];
  __builtin_memcpy(lanes, &sums, sizeof lanes);
  for (int n = 0; i + n < columns; ++n) lanes[n] = __builtin_fmaf(a[i + n], b[i + n], lanes[n]);
  return total(lanes);
}

void norm(const float* x, const float* weight, float eps, int64_t columns, float* out) {
  const float scale = 1.0f / __builtin_sqrtf(dot(x, x, columns) / static_cast<float>(columns) + eps);
  for (int64_t i = 0; i < columns; ++i) out[i] = x[i] * scale * weight[i];
}

void scores(const float* x, const float* weights, int64_t count, int64_t columns, float* out) {
  for (int64_t e = 0; e < count; ++e) out[e] = dot(weights + e * columns, x, columns);
}

void rotate(const float* x, const float* cosines, const float* sines, int64_t half, float* out) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    out[i] = first * cosines[i] - second * sines[i];
    out[i + half] = second * cosines[i] + first * sines[i];
  }
}

float exponential_of(float x) { return exponential(all(x < -87.0f ? -87.0f : x))[0]; }

}  // namespace

extern const RowTable rows;
const RowTable rows = {norm, scores, rotate, exponential_of};

}  // namespace mixtral::MIXTRAL_LEVEL
