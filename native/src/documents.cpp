// The kernels of documents.h, compiled once for each instruction set with MIXTRAL_LEVEL and MIXTRAL_LANES.
#include "mixtral/documents.h"

#include "blocks.h"

namespace mixtral::MIXTRAL_LEVEL {
namespace {

inline Floats exponential_below(Floats x) { return exponential(x < -87.0f ? all(-87.0f) : x); }

// What a piece of work has in float32.
struct Work : Block {
  float *keys, *values;        // [tokens][padded]
  float *keys_t, *values_t;    // [padded][tokens]
  float *q, *grad, *made;      // [rows][padded]
  float *scores, *shares;      // [rows][stride]
  float *grad_k, *grad_v;      // [tokens][padded]
  float *norms, *dots;         // [rows]
};

Work plan(const Packed& shape, const Piece& piece, bool backward, Scratch& scratch) {
  Work w{block_of(shape, piece, kLanes, piece.length), {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  const int64_t heads = w.tokens * w.padded, some = w.rows * w.padded, all_scores = w.rows * w.stride;
  const int64_t lines = up_to(w.rows, 16);
  Parts parts{scratch.take((backward ? 6 : 3) * heads + 3 * some + 2 * all_scores + 2 * lines)};
  w.keys_t = parts.next(heads), w.values = parts.next(heads), w.keys = parts.next(heads);
  w.q = parts.next(some), w.grad = parts.next(some), w.made = parts.next(some);
  w.scores = parts.next(all_scores), w.shares = parts.next(all_scores);
  w.norms = parts.next(lines), w.dots = parts.next(lines);
  if (backward) w.values_t = parts.next(heads), w.grad_k = parts.next(heads), w.grad_v = parts.next(heads);
  return w;
}

// A head of the document, with zeros behind it, as rows and as columns.
void read_head(const Work& w, const void* from, float* rows, float* columns) {
  const int64_t size = w.shape.size;
  for (int64_t j = 0; j < w.tokens; ++j) {
    float* to = rows + j * w.padded;
    const bool there = j < w.piece.length;
    if (there) read_row(from, ((w.piece.first + j) * w.shape.keys + w.piece.head) * size, size, w.shape.bf16, to);
    for (int64_t i = there ? size : 0; i < w.padded; ++i) to[i] = 0.0f;
  }
  if (columns == nullptr) return;
  for (int64_t j = 0; j < w.tokens; ++j) {
    for (int64_t i = 0; i < w.padded; ++i) columns[i * w.tokens + j] = rows[j * w.padded + i];
  }
}

// Rows of a block: all its queries of one head, then those of the next; behind them zeros.
void read_queries(const Work& w, const void* from, int64_t begin, int64_t count, float* to) {
  for (int64_t m = 0; m < w.rows; ++m) {
    float* row = to + m * w.padded;
    const bool there = m < count * w.together;
    if (there) read_row(from, query_at(w, begin + m % count, m / count), w.shape.size, w.shape.bf16, row);
    for (int64_t i = there ? w.shape.size : 0; i < w.padded; ++i) row[i] = 0.0f;
  }
}

// --- forward ---------------------------------------------------------------------------------------------------------

// Scores to exponentials of their distance to the largest; returns their sum, and the largest.
float soften(const Work& w, float* scores, int64_t seen, int64_t end, float& largest) {
  Floats most = all(-__builtin_inff());
  for (int64_t j = seen; j < up_to(seen, kLanes); ++j) scores[j] = -__builtin_inff();
  for (int64_t j = 0; j < seen; j += kLanes) most = larger(load<Floats>(scores + j), most);
  largest = most[0];
  for (int n = 1; n < kLanes; ++n) largest = most[n] > largest ? most[n] : largest;
  Floats sums = all(0.0f);
  for (int64_t j = 0; j < seen; j += kLanes) {
    Floats share = exponential_below((load<Floats>(scores + j) - largest) * w.scale);
    if (j + kLanes > seen) {
      for (int64_t n = seen - j; n < kLanes; ++n) share[n] = 0.0f;
    }
    store(scores + j, share);
    sums = sums + share;
  }
  for (int64_t j = up_to(seen, kLanes); j < end; ++j) scores[j] = 0.0f;
  float sum = 0.0f;
  for (int n = 0; n < kLanes; ++n) sum += sums[n];
  return sum;
}

thread_local Scratch memory;

void forward(const Packed& shape, const Piece& piece, const Attended& a) {
#ifdef MIXTRAL_BF16
  if (shape.bf16) return attend_pairs(shape, piece, a);
#endif
  const Work w = plan(shape, piece, false, memory);
  read_head(w, a.k, w.keys, w.keys_t);
  read_head(w, a.v, w.values, nullptr);
  for (int64_t begin = 0; begin < piece.length; begin += w.block) {
    const int64_t count = piece.length - begin < w.block ? piece.length - begin : w.block, seen = begin + count;
    const int64_t end = up_to(seen, kStrip), rows = up_to(count * w.together, kTall);
    read_queries(w, a.q, begin, count, w.q);
    multiply<false>(rows, end, w.padded, Strided<float>{w.q, w.padded, 1}, w.keys_t, w.tokens, w.scores, w.stride);
    for (int64_t m = 0; m < count * w.together; ++m) {
      float largest;
      const float sum = soften(w, w.scores + m * w.stride, begin + m % count + 1, end, largest);
      w.norms[m] = 1.0f / sum;
      const int64_t token = piece.first + begin + m % count, head = piece.head * w.together + m / count;
      a.norms[token * shape.queries + head] = largest * w.scale + __builtin_logf(sum);
    }
    multiply<false>(rows, w.padded, seen, Strided<float>{w.scores, w.stride, 1}, w.values, w.padded, w.made, w.padded);
    for (int64_t m = 0; m < count * w.together; ++m) {
      for (int64_t i = 0; i < w.padded; ++i) w.made[m * w.padded + i] *= w.norms[m];
    }
    write_queries(w, w.made, begin, count, a.out);
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

// Of one row: scores to shares, and what arrives at the shares to gradients of the scores.
void soften_back(const Work& w, float* scores, float* grads, int64_t seen, int64_t end, float norm, float dot) {
  for (int64_t j = 0; j < seen; j += kLanes) {
    Floats share = exponential_below(load<Floats>(scores + j) * w.scale - norm);
    if (j + kLanes > seen) {
      for (int64_t n = seen - j; n < kLanes; ++n) share[n] = 0.0f;
    }
    store(scores + j, share);
    store(grads + j, share * (load<Floats>(grads + j) - dot) * w.scale);
  }
  for (int64_t j = up_to(seen, kLanes); j < end; ++j) scores[j] = grads[j] = 0.0f;
}

// Norms of a block's queries, and the product of each result with its gradient; `made` holds the results.
void read_norms(const Work& w, const Attended& a, int64_t begin, int64_t count) {
  for (int64_t m = 0; m < count * w.together; ++m) {
    const int64_t token = w.piece.first + begin + m % count, head = w.piece.head * w.together + m / count;
    w.norms[m] = a.norms[token * w.shape.queries + head];
    float dot = 0.0f;
    for (int64_t i = 0; i < w.shape.size; ++i) dot += w.made[m * w.padded + i] * w.grad[m * w.padded + i];
    w.dots[m] = dot;
  }
}

void backward(const Packed& shape, const Piece& piece, const Attended& a, const AttendedGrads& grads) {
#ifdef MIXTRAL_BF16
  if (shape.bf16) return attend_pairs_back(shape, piece, a, grads);
#endif
  const Work w = plan(shape, piece, true, memory);
  read_head(w, a.k, w.keys, w.keys_t);
  read_head(w, a.v, w.values, w.values_t);
  for (int64_t i = 0; i < w.tokens * w.padded; ++i) w.grad_k[i] = w.grad_v[i] = 0.0f;
  for (int64_t begin = 0; begin < piece.length; begin += w.block) {
    const int64_t count = piece.length - begin < w.block ? piece.length - begin : w.block, seen = begin + count;
    const int64_t end = up_to(seen, kStrip), rows = up_to(count * w.together, kTall), used = count * w.together;
    read_queries(w, a.q, begin, count, w.q);
    read_queries(w, grads.out, begin, count, w.grad);
    read_queries(w, a.out, begin, count, w.made);
    read_norms(w, a, begin, count);
    multiply<false>(rows, end, w.padded, Strided<float>{w.q, w.padded, 1}, w.keys_t, w.tokens, w.scores, w.stride);
    multiply<false>(rows, end, w.padded, Strided<float>{w.grad, w.padded, 1}, w.values_t, w.tokens, w.shares, w.stride);
    for (int64_t m = 0; m < used; ++m) {
      // Tiles of keys end up to kTall - 1 columns behind the last one.
      soften_back(w, w.scores + m * w.stride, w.shares + m * w.stride, begin + m % count + 1, end + kTall, w.norms[m],
                  w.dots[m]);
    }
    const int64_t keys = up_to(seen, kTall);
    multiply<true>(keys, w.padded, used, Strided<float>{w.scores, 1, w.stride}, w.grad, w.padded, w.grad_v, w.padded);
    multiply<true>(keys, w.padded, used, Strided<float>{w.shares, 1, w.stride}, w.q, w.padded, w.grad_k, w.padded);
    multiply<false>(rows, w.padded, seen, Strided<float>{w.shares, w.stride, 1}, w.keys, w.padded, w.made, w.padded);
    write_queries(w, w.made, begin, count, grads.q);
  }
  for (int64_t j = 0; j < piece.length; ++j) {
    const int64_t at = ((piece.first + j) * shape.keys + piece.head) * shape.size;
    write_row(w.grad_k + j * w.padded, shape.size, shape.bf16, grads.k, at);
    write_row(w.grad_v + j * w.padded, shape.size, shape.bf16, grads.v, at);
  }
}

}  // namespace

extern const DocumentTable documents;
const DocumentTable documents = {forward, backward};

}  // namespace mixtral::MIXTRAL_LEVEL
