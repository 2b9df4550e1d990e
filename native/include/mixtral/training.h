// Operations of training over a whole batch: which thread computes which part.
#pragma once

#include <cstdint>
#include <vector>

#include "mixtral/layers.h"

namespace mixtral {

// Causal attention inside documents of these lengths, one after the other; with `grads` the backward pass, which reads
// what the forward pass has left in `a`.
void attend_documents(const Kernels& kernels, const Packed& shape, const std::vector<int64_t>& lengths,
                      const Attended& a, const AttendedGrads* grads, int threads);

// The passes of passes.h over all rows.
void norm(const Kernels& kernels, const NormPass& p, int64_t rows, int threads);
void norm_back(const Kernels& kernels, const NormPass& p, const NormGrads& grads, int64_t rows, int threads);
void rotate(const Kernels& kernels, const RotatePass& p, int64_t tokens, int threads);
void gate(const Kernels& kernels, const GatePass& p, int64_t rows, int threads);
void gate_back(const Kernels& kernels, const GatePass& p, const GateGrads& grads, int64_t rows, int threads);
void sort_rows(const Kernels& kernels, const SortPass& p, const void* from, void* to, int64_t sorted, int threads);
void combine(const Kernels& kernels, const SortPass& p, const void* from, const float* weights, void* to, int64_t tokens,
             int threads);
void combine_back(const Kernels& kernels, const SortPass& p, const void* from, const float* weights, const void* grad,
                  void* back, float* grad_weights, int64_t tokens, int threads);
void loss(const Kernels& kernels, const LossPass& p, int64_t rows, int threads);

// Rows of integers in groups as bfloat16 or float32; numbers below the smallest normal one are zero.
void decode(const Kernels& kernels, const Grouped& from, int64_t rows, uint16_t* out, int threads);
void decode(const Kernels& kernels, const Grouped& from, int64_t rows, float* out, int threads);

}  // namespace mixtral
