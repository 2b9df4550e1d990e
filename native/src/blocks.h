// What the two kinds of kernels for attention inside documents share: how a piece of work is cut into blocks, and memory.
#pragma once

#include <cstdlib>

#include "lanes.h"
#include "mixtral/documents.h"

namespace mixtral::MIXTRAL_LEVEL {

#ifdef MIXTRAL_BF16
// Of bfloat16, with its own instruction: products of scores are rounded to bfloat16.
void attend_pairs(const Packed& shape, const Piece& piece, const Attended& a);
void attend_pairs_back(const Packed& shape, const Piece& piece, const Attended& a, const AttendedGrads& grads);
#endif

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

#ifdef MIXTRAL_BF16
inline Floats add_product(Ints a, Ints b, Floats c) { return bf16_pairs(c, a, b); }
#endif

// A matrix of which both strides may be anything: of float32, or of pairs of bfloat16 along the sum.
template <typename Number>
struct Strided {
  const Number* data;
  int64_t row, column;
};

// A tile of out [kTall][W vectors] = or += a [kTall][depth] times b [depth][W vectors].
template <int W, bool Adds, typename Number>
inline void tile(const Strided<Number>& a, const Number* b, int64_t stride, int64_t depth, float* out,
                 int64_t out_stride) {
  using Vector = decltype(all(Number{}));
  Floats sums[kTall][W];
  UNROLL for (int m = 0; m < kTall; ++m) {
    UNROLL for (int w = 0; w < W; ++w) {
      sums[m][w] = Adds ? load<Floats>(out + m * out_stride + w * kLanes) : all(0.0f);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector columns[W];
    UNROLL for (int w = 0; w < W; ++w) columns[w] = load<Vector>(b + k * stride + w * kLanes);
    UNROLL for (int m = 0; m < kTall; ++m) {
      const Vector number = all(a.data[m * a.row + k * a.column]);
      UNROLL for (int w = 0; w < W; ++w) sums[m][w] = add_product(number, columns[w], sums[m][w]);
    }
  }
  UNROLL for (int m = 0; m < kTall; ++m) {
    UNROLL for (int w = 0; w < W; ++w) store(out + m * out_stride + w * kLanes, sums[m][w]);
  }
}

// out [rows][columns] = or += a [rows][depth] times b [depth][columns]; rows in tiles of kTall, columns of kLanes.
template <bool Adds, typename Number>
void multiply(int64_t rows, int64_t columns, int64_t depth, const Strided<Number>& a, const Number* b, int64_t stride,
              float* out, int64_t out_stride) {
  for (int64_t n = 0; n < columns;) {
    const int64_t left = columns - n;
    const int wide = left >= kStrip ? kWide : left >= 2 * kLanes ? 2 : 1;
    for (int64_t m = 0; m < rows; m += kTall) {
      const Strided<Number> part{a.data + m * a.row, a.row, a.column};
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

// Hands out the parts of a memory one after the other.
struct Parts {
  float* at;
  float* next(int64_t count) {
    float* found = at;
    at += count;
    return found;
  }
};

// How a piece of work is cut: all query heads of its key head, some queries at a time.
struct Block {
  const Packed& shape;
  const Piece& piece;
  int64_t padded, tokens;   // head size and tokens, rounded up
  int64_t together, block;  // query heads of a key head, queries of a block
  int64_t rows, stride;     // of a block's scores
  float scale;
};

// With heads of whole `parts`, and all keys or at most so many at a time.
inline Block block_of(const Packed& shape, const Piece& piece, int64_t parts, int64_t keys) {
  Block w{shape, piece, up_to(shape.size, parts), up_to(piece.length, kStrip) + kStrip, shape.queries / shape.keys, 0,
          0, 0, 1.0f / __builtin_sqrtf(static_cast<float>(shape.size))};
  w.stride = up_to(keys < piece.length ? keys : piece.length, kStrip) + kStrip;
  const int64_t most = kScores / w.stride;
  const int64_t rows = most < kTall ? kTall : most > kMostRows ? kMostRows : most;
  w.block = rows / w.together > 0 ? rows / w.together : 1;
  if (w.block > piece.length) w.block = piece.length;
  w.rows = up_to(w.block * w.together, kTall);
  return w;
}

// Where the row of a query begins, in what is stored like q.
inline int64_t query_at(const Block& w, int64_t query, int64_t head) {
  return ((w.piece.first + query) * w.shape.queries + w.piece.head * w.together + head) * w.shape.size;
}

inline void write_queries(const Block& w, const float* from, int64_t begin, int64_t count, void* to) {
  for (int64_t m = 0; m < count * w.together; ++m) {
    write_row(from + m * w.padded, w.shape.size, w.shape.bf16, to, query_at(w, begin + m % count, m / count));
  }
}

}  // namespace
}  // namespace mixtral::MIXTRAL_LEVEL
