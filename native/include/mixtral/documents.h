// Causal attention inside the documents of a training batch, forward and backward.
//
// The tokens of all documents follow each other; a token sees those of its document up to itself. Everything is computed
// in float32, whatever is stored. One key head of one document is a piece of work of its own, so results do not depend on
// the number of threads.
#pragma once

#include <cstdint>

namespace mixtral {

// Queries [tokens, queries, size], keys and values [tokens, keys, size], bfloat16 or float32.
struct Packed {
  int64_t queries, keys, size;
  bool bf16;
};

struct Piece {
  int64_t first, length, head;  // tokens [first, first + length) and a key head
};

struct Attended {
  const void *q, *k, *v;
  void* out;     // as q
  float* norms;  // [tokens, queries]: the log of the sum of exponentials of each query's scores
};

struct AttendedGrads {
  const void* out;  // gradient of the result, as q
  void *q, *k, *v;  // gradients, as these
};

struct DocumentTable {
  void (*forward)(const Packed& shape, const Piece& piece, const Attended& a);
  void (*backward)(const Packed& shape, const Piece& piece, const Attended& a, const AttendedGrads& grads);
};

}  // namespace mixtral
