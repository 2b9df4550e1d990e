// The kernels of documents.h, compiled once for each instruction set with MIXTRAL_LEVEL and MIXTRAL_LANES.
#include "mixtral/documents.h"

#include <cstdlib>

#include "lanes.h"

namespace mixtral::MIXTRAL_LEVEL {
namespace {

constexpr int kTall = 6;                        // rows of a tile of results
constexpr int kWide = kLanes == 16 ? 4 : 2;     // and its vectors
constexpr int64_t kStrip = kWide * kLanes;      // columns of the widest tile
constexpr int64_t kScores = 1 << 16;            // scores that are computed together
constexpr int64_t kMostRows = 96;

inline int64_t up_to(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Training promises no bits across instruction sets: where there is no fused instruction, a product and a sum do.
inline Floats add_product(Floats a, Floats b, Floats c) {
#ifdef __FMA__
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

// A matrix of which both strides may be anything.
struct Strided {
  const float* data;
  int64_t row, column;
};

// A tile of out [kTall][W vectors] = or += a [kTall][depth] times b [depth][W vectors].
template <int W, bool Adds>
inline void tile(const Strided& a, const float* b, int64_t stride, int64_t depth, float* out, int64_t out_stride) {
  Floats sums[kTall][W];
  UNROLL for (int m = 0; m < kTall; ++m) {
    UNROLL for (int w = 0; w < W; ++w) {
      sums[m][w] = Adds ? load<Floats>(out + m * out_stride + w * kLanes) : all(0.0f);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Floats columns[W];
    UNROLL for (int w = 0; w < W; ++w) columns[w] = load<Floats>(b + k * stride + w * kLanes);
    UNROLL for (int m = 0; m < kTall; ++m) {
      const Floats number = all(a.data[m * a.row + k * a.column]);
      UNROLL for (int w = 0; w < W; ++w) sums[m][w] = add_product(number, columns[w], sums[m][w]);
    }
  }
  UNROLL for (int m = 0; m < kTall; ++m) {
    UNROLL for (int w = 0; w < W; ++w) store(out + m * out_stride + w * kLanes, sums[m][w]);
  }
}

// out [rows][columns] = or += a [rows][depth] times b [depth][columns]; rows in tiles of kTall, columns of kLanes.
template <bool Adds>
void multiply(int64_t rows, int64_t columns, int64_t depth, const Strided& a, const float* b, int64_t stride, float* out,
              int64_t out_stride) {
  for (int64_t n = 0; n < columns;) {
    const int64_t left = columns - n;
    const int wide = left >= kStrip ? kWide : left >= 2 * kLanes ? 2 : 1;
    for (int64_t m = 0; m < rows; m += kTall) {
      const Strided part{a.data + m * a.row, a.row, a.column};
      float* to = out + m * out_stride + n;
      if (wide == kWide) {
        tile<kWide, Adds>(part, b + n, stride, depth, to, out_stride);
      } else if (wide == 2) {
        tile<2, Adds>(part, b + n, stride, depth, to, out_stride);
      } else {
        tile<1, Adds>(part, b + n, stride, depth, to, out_stride);
      }
    }
    n += wide * kLanes;
  }
}

inline Floats exponential_below(Floats x) { return exponential(x < -87.0f ? all(-87.0f) : x); }

// --- rows in and out -------------------------------------------------------------------------------------------------

inline void read_row(const void* from, int64_t at, int64_t count, bool bf16, float* to) {
  if (bf16) {
    const uint16_t* x = static_cast<const uint16_t*>(from) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = from_bf16(x[i]);
  } else {
    __builtin_memcpy(to, static_cast<const float*>(from) + at, sizeof(float) * static_cast<size_t>(count));
  }
}

inline void write_row(const float* from, int64_t count, bool bf16, void* to, int64_t at) {
  if (!bf16) {
    __builtin_memcpy(static_cast<float*>(to) + at, from, sizeof(float) * static_cast<size_t>(count));
    return;
  }
  uint16_t* y = static_cast<uint16_t*>(to) + at;
  typedef uint16_t Narrow __attribute__((vector_size(2 * kLanes)));
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(y + i, __builtin_convertvector(to_bf16(load<Floats>(from + i)), Narrow));
  }
  for (; i < count; ++i) y[i] = to_bf16(from[i]);
}

// Memory of one thread, which grows and is kept.
class Scratch {
 public:
  float* take(int64_t count) {
    if (count > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(up_to(4 * count, 64))));
      if (data_ == nullptr) std::abort();  // on a thread of others nobody could catch an exception
      size_ = count;
    }
    return data_;
  }
  ~Scratch() { std::free(data_); }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

// What a piece of work has in float32.
struct Work {
  const Packed& shape;
  const Piece& piece;
  int64_t padded, tokens;      // head size and tokens, rounded up
  int64_t together, block;     // query heads of a key head, queries of a block
  int64_t rows, stride;        // of a block's scores
  float scale;
  float *keys, *values;        // [tokens][padded]
  float *keys_t, *values_t;    // [padded][tokens]
  float *q, *grad, *made;      // [rows][padded]
  float *scores, *shares;      // [rows][stride]
  float *grad_k, *grad_v;      // [tokens][padded]
  float *norms, *dots;         // [rows]
};

Work plan(const Packed& shape, const Piece& piece, bool backward, Scratch& scratch) {
  Work w{shape, piece, up_to(shape.size, kLanes), up_to(piece.length, kStrip) + kStrip, shape.queries / shape.keys, 0, 0,
         0, 1.0f / __builtin_sqrtf(static_cast<float>(shape.size)), {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  w.stride = w.tokens;
  const int64_t most = kScores / w.stride;
  const int64_t rows = most < kTall ? kTall : most > kMostRows ? kMostRows : most;
  w.block = rows / w.together > 0 ? rows / w.together : 1;
  if (w.block > piece.length) w.block = piece.length;
  w.rows = up_to(w.block * w.together, kTall);
  const int64_t heads = w.tokens * w.padded, some = w.rows * w.padded, all_scores = w.rows * w.stride;
  const int64_t lines = up_to(w.rows, 16);
  float* at = scratch.take((backward ? 6 : 3) * heads + 3 * some + 2 * all_scores + 2 * lines);
  const auto next = [&at](int64_t count) {
    float* found = at;
    at += count;
    return found;
  };
  w.keys_t = next(heads), w.values = next(heads), w.keys = next(heads);
  w.q = next(some), w.grad = next(some), w.made = next(some);
  w.scores = next(all_scores), w.shares = next(all_scores);
  w.norms = next(lines), w.dots = next(lines);
  if (backward) w.values_t = next(heads), w.grad_k = next(heads), w.grad_v = next(heads);
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

// Where the row of a query begins, in what is stored like q.
inline int64_t query_at(const Work& w, int64_t query, int64_t head) {
  return ((w.piece.first + query) * w.shape.queries + w.piece.head * w.together + head) * w.shape.size;
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

void write_queries(const Work& w, const float* from, int64_t begin, int64_t count, void* to) {
  for (int64_t m = 0; m < count * w.together; ++m) {
    write_row(from + m * w.padded, w.shape.size, w.shape.bf16, to, query_at(w, begin + m % count, m / count));
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
  const Work w = plan(shape, piece, false, memory);
  read_head(w, a.k, w.keys, w.keys_t);
  read_head(w, a.v, w.values, nullptr);
  for (int64_t begin = 0; begin < piece.length; begin += w.block) {
    const int64_t count = piece.length - begin < w.block ? piece.length - begin : w.block, seen = begin + count;
    const int64_t end = up_to(seen, kStrip), rows = up_to(count * w.together, kTall);
    read_queries(w, a.q, begin, count, w.q);
    multiply<false>(rows, end, w.padded, {w.q, w.padded, 1}, w.keys_t, w.tokens, w.scores, w.stride);
    for (int64_t m = 0; m < count * w.together; ++m) {
      float largest;
      const float sum = soften(w, w.scores + m * w.stride, begin + m % count + 1, end, largest);
      w.norms[m] = 1.0f / sum;
      const int64_t token = piece.first + begin + m % count, head = piece.head * w.together + m / count;
      a.norms[token * shape.queries + head] = largest * w.scale + __builtin_logf(sum);
    }
    multiply<false>(rows, w.padded, seen, {w.scores, w.stride, 1}, w.values, w.padded, w.made, w.padded);
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
    multiply<false>(rows, end, w.padded, {w.q, w.padded, 1}, w.keys_t, w.tokens, w.scores, w.stride);
    multiply<false>(rows, end, w.padded, {w.grad, w.padded, 1}, w.values_t, w.tokens, w.shares, w.stride);
    for (int64_t m = 0; m < used; ++m) {
      // Tiles of keys end up to kTall - 1 columns behind the last one.
      soften_back(w, w.scores + m * w.stride, w.shares + m * w.stride, begin + m % count + 1, end + kTall, w.norms[m],
                  w.dots[m]);
    }
    const int64_t keys = up_to(seen, kTall);
    multiply<true>(keys, w.padded, used, {w.scores, 1, w.stride}, w.grad, w.padded, w.grad_v, w.padded);
    multiply<true>(keys, w.padded, used, {w.shares, 1, w.stride}, w.q, w.padded, w.grad_k, w.padded);
    multiply<false>(rows, w.padded, seen, {w.shares, w.stride, 1}, w.keys, w.padded, w.made, w.padded);
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
