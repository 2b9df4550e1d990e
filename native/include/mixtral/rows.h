// Operations on one row of float32: each result depends on that row alone, with the same bits on every instruction set.
#pragma once

#include <cstdint>

namespace mixtral {

struct RowTable {
  // out = x / sqrt(mean of squares + eps) * weight.
  void (*norm)(const float* x, const float* weight, float eps, int64_t columns, float* out);
  // out[e] = weights[e] times x, e < count.
  void (*scores)(const float* x, const float* weights, int64_t count, int64_t columns, float* out);
  // Rotates the halves of a head of 2 * half numbers: element i pairs with i + half.
  void (*rotate)(const float* x, const float* cosines, const float* sines, int64_t half, float* out);
  // exp(x) of one number, at most 0 (below -87: as at -87).
  float (*exponential)(float x);
};

}  // namespace mixtral
