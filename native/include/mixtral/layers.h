// Whole layers out of the kernels of one instruction set: which thread computes which columns of which rows.
//
// Every result depends on its own row alone: not on other rows, on how rows are grouped, or on the number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "mixtral/attention.h"
#include "mixtral/decode.h"
#include "mixtral/dense.h"
#include "mixtral/documents.h"
#include "mixtral/gemm.h"
#include "mixtral/limits.h"
#include "mixtral/passes.h"
#include "mixtral/rows.h"

namespace mixtral {

struct Kernels {
  const char* level;
  // Whether products are made in tiles of 16 rows: then rows that are multiplied together must be neighbours, those of
  // bfloat16 from a multiple of 16 on.
  bool tiles;
  const GemmTable& gemm;
  const DenseTable& dense;
  const RowTable& rows;
  const AttentionTable& attention;
  const DocumentTable& documents;
  const DecodeTable& decode;
  const PassTable& passes;
  const LimitTable& limits;
};

// Those of an instruction set (kLevels; empty: the fastest one); null if it is unknown or cannot run here.
constexpr const char* kLevels[] = {"baseline", "avx2", "avx512vnni", "avx512bf16", "amx"};
const Kernels* find_kernels(std::string_view level);

// A matrix [rows, columns], in panels or as it is in a file.
struct Weights {
  bool in_panels;
  Panels panels;
  Dense dense;

  int64_t rows() const { return in_panels ? panels.rows : dense.rows; }
  int64_t columns() const { return in_panels ? panels.columns : dense.columns; }
};

// Rows [rows, columns], normed before use if there is a norm.
struct Input {
  const float* x;
  int64_t rows, columns;
  const float* norm;  // weight [columns], or null
  float eps;
};

// out [rows, sum of the matrices' rows] = x times every matrix transposed, side by side, plus `residual` unless null.
void project(const Kernels& kernels, const Input& input, const Weights* const* matrices, int64_t count,
             const float* residual, float* out, int threads);

// Experts of a layer.
struct Experts {
  const Weights* gate;
  const Weights* up;
  const Weights* down;
  int64_t count;
};

// Which experts each row goes to, [rows, choices] each.
struct Picks {
  const int64_t* experts;
  const float* shares;
  int64_t choices;
};

// out [rows, columns] = the sum, in the order of choice, of share * down(silu(gate(x)) * up(x)), plus `residual`.
void experts(const Kernels& kernels, const Input& input, const Picks& picks, const Experts& weights,
             const float* residual, float* out, int threads);

// Router and experts: as above with the `choices` experts of the largest logits (ties: the lower one first), shares from
// the softmax over these. logits [rows, experts], picks and shares [rows, choices] are written.
struct Routing {
  const float* router;  // [experts, columns]
  int64_t choices;
  float* logits;
  int64_t* picks;
  float* shares;
};
void mixture(const Kernels& kernels, const Input& input, const Routing& routing, const Experts& weights,
             const float* residual, float* out, int threads);

// New tokens of several sequences: their rows follow each other, and each has the pages that hold all of its tokens.
struct Span {
  std::vector<int32_t> pages;
  int64_t stored, count;
};

// qkv [tokens, (query heads + 2 key heads) * size]; cosines and sines [tokens, size / 2]; store [pages, key heads, block].
// Rotates queries and keys, stores keys and values, and attends: out [tokens, query heads * size].
void attend(const Kernels& kernels, const Heads& heads, const float* qkv, const float* cosines, const float* sines,
            const std::vector<Span>& spans, uint8_t* store, float* out, int threads);

}  // namespace mixtral
