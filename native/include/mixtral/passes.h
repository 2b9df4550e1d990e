// Passes over memory that training makes between its matrix products, forward and backward; rows of any length.
//
// Rows are bfloat16 or float32 as a flag says; all sums and products are float32. A pass is over the rows [begin, end).
#pragma once

#include <cstdint>

namespace mixtral {

// Rows of x divided by the root of their mean square, times the weight.
struct NormPass {
  int64_t columns;
  bool bf16;
  float eps;
  const void *x, *weight;
  void* out;
  float* scales;  // [rows]: 1 / root, for the backward pass
};
struct NormGrads {
  const void* out;  // gradient of the result
  void* x;          // gradients of the rows
  float* weight;    // [columns]: what these rows add to that of the weight
};

// Halves of every head turned by angles of its token; `back` turns the other way.
struct RotatePass {
  int64_t heads, size;
  bool bf16, back;
  const void* x;                // [tokens, heads, size]
  const float *cosines, *sines; // [tokens, size / 2]
  void* out;
};

// silu(gate) * up of rows [gate, up].
struct GatePass {
  int64_t hidden;
  bool bf16;
  const void* products;  // [rows, 2 * hidden]
  void* out;             // [rows, hidden]
};
struct GateGrads {
  const void* out;  // gradient of the result
  void* products;   // gradients of gate and up
};

// Rows sorted by expert and rows of tokens: `places` [tokens, choices] are sorted rows, `tokens` [sorted] tokens or -1.
struct SortPass {
  int64_t columns, choices;
  bool bf16;
  const int64_t* places;
  const int64_t* tokens;
};

// Scores [rows, columns], whose last column stands for several; with `train` they become gradients of the loss.
struct LossPass {
  int64_t columns;
  bool bf16, train;
  void* scores;
  const int64_t* labels;
  const float* weights;
  float log_copies;
  float* logprobs;  // [rows]
};

struct PassTable {
  void (*norm)(const NormPass& p, int64_t begin, int64_t end);
  void (*norm_back)(const NormPass& p, const NormGrads& grads, int64_t begin, int64_t end);
  void (*rotate)(const RotatePass& p, int64_t begin, int64_t end);
  void (*gate)(const GatePass& p, int64_t begin, int64_t end);
  // Also writes the result to p.out, which the gradient of the next matrix needs.
  void (*gate_back)(const GatePass& p, const GateGrads& grads, int64_t begin, int64_t end);
  // to[n] = from[tokens[n]], zeros for -1; n from begin to end.
  void (*sort)(const SortPass& p, const void* from, void* to, int64_t begin, int64_t end);
  // to[t] = the sum over choices of weights[t][a] * from[places[t][a]]; without weights they are 1.
  void (*combine)(const SortPass& p, const void* from, const float* weights, void* to, int64_t begin, int64_t end);
  // back[places[t][a]] = weights[t][a] * grad[t], grad_weights[t][a] = grad[t] . from[places[t][a]].
  void (*combine_back)(const SortPass& p, const void* from, const float* weights, const void* grad, void* back,
                       float* grad_weights, int64_t begin, int64_t end);
  void (*loss)(const LossPass& p, int64_t begin, int64_t end);
};

}  // namespace mixtral
