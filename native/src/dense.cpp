// The kernels of dense.h, compiled once for each instruction set with MIXTRAL_LEVEL, MIXTRAL_LANES and MIXTRAL_BF16.
#include "mixtral/dense.h"

#include "lanes.h"

namespace mixtral::MIXTRAL_LEVEL {
namespace {

// A tile of results is kRows activation rows by kOuts weight rows: as many sums as there are registers.
constexpr int kRows = kLanes == 16 ? 6 : 2, kOuts = kLanes == 16 ? 4 : 2;
// Columns of one pass, so that a tile's weights and activations stay in the first cache; and rows of one pass.
constexpr int64_t kDepth = 1024, kChunk = 24;

template <Float K>
constexpr int64_t kStep = K == Float::bf16 ? 32 : 16;  // columns that go into 16 sums at once
template <Float K>
constexpr int64_t kSize = K == Float::f32 ? 4 : 2;
template <Float K>
constexpr int64_t kInput = K == Float::bf16 ? 2 : 4;  // bytes of an activation

template <Float K>
inline Floats step(Floats sum, const uint8_t* w, const uint8_t* x) {
  if constexpr (K == Float::bf16) return bf16_pairs(sum, load<Ints>(w), load<Ints>(x));
  if constexpr (K == Float::f16) return fma(halves(w), load<Floats>(x), sum);
  return fma(load<Floats>(w), load<Floats>(x), sum);
}

template <Float K, int M, int N>
inline void run(const uint8_t* const (&w)[N], const uint8_t* const (&x)[M], int64_t from, int64_t to,
                Row16 (&sums)[M][N]) {
  for (int64_t k = from; k < to; k += kStep<K>) {
    UNROLL for (int n = 0; n < N; ++n) {
      UNROLL for (int m = 0; m < M; ++m) {
        UNROLL for (int part = 0; part < kParts; ++part) {
          const int64_t at = k + part * (kStep<K> / kParts);
          sums[m][n].part[part] = step<K>(sums[m][n].part[part], w[n] + at * kSize<K>, x[m] + at * kInput<K>);
        }
      }
    }
  }
}

// M activation rows and N weight rows over the columns [from, to); what is left of a row goes with zeros behind it.
template <Float K, int M, int N>
inline void tile(const Dense& weights, int64_t first, const uint8_t* const (&x)[M], int64_t from, int64_t to,
                 Row16 (&sums)[M][N]) {
  const uint8_t* w[N];
  for (int n = 0; n < N; ++n) w[n] = weights.data + (first + n) * weights.row_bytes();
  const int64_t whole = to - (to - from) % kStep<K>;
  run<K, M, N>(w, x, from, whole, sums);
  if (whole == to) return;
  uint8_t rest[N][64] = {};
  const uint8_t *last[N], *inputs[M];
  for (int n = 0; n < N; ++n) {
    __builtin_memcpy(rest[n], w[n] + whole * kSize<K>, static_cast<size_t>((to - whole) * kSize<K>));
    last[n] = rest[n];
  }
  for (int m = 0; m < M; ++m) inputs[m] = x[m] + whole * kInput<K>;
  run<K, M, N>(last, inputs, 0, kStep<K>, sums);
}

// Sums of a pass, kept while the next columns are far away: [rows][16 outputs].
typedef Row16 Sums[kChunk][16];

struct Pass {
  const Dense& weights;
  int64_t first, from, to;
  bool begins, ends;
  float* out;
  int64_t stride;
};

template <Float K, int M, int N>
inline void one_tile(const Pass& pass, int n, const Plain& a, const int32_t* rows, int64_t row, Sums& kept) {
  const uint8_t* x[M];
  for (int m = 0; m < M; ++m) {
    const int64_t at = rows[row + m] * a.padded;
    if constexpr (K == Float::bf16) {
      x[m] = reinterpret_cast<const uint8_t*>(a.bf16 + at);
    } else {
      x[m] = reinterpret_cast<const uint8_t*>(a.f32 + at);
    }
  }
  Row16 sums[M][N] = {};
  if (!pass.begins) {
    UNROLL for (int m = 0; m < M; ++m) UNROLL for (int i = 0; i < N; ++i) sums[m][i] = kept[row + m][n + i];
  }
  tile<K, M, N>(pass.weights, pass.first + n, x, pass.from, pass.to, sums);
  if (pass.ends) {
    for (int m = 0; m < M; ++m) {
      for (int i = 0; i < N; ++i) pass.out[(row + m) * pass.stride + n + i] = total(sums[m][i]);
    }
  } else {
    UNROLL for (int m = 0; m < M; ++m) UNROLL for (int i = 0; i < N; ++i) kept[row + m][n + i] = sums[m][i];
  }
}

template <Float K, int N>
void some_outputs(const Pass& pass, int n, const Plain& a, const int32_t* rows, int64_t count, Sums& kept) {
  int64_t row = 0;
  for (; row + kRows <= count; row += kRows) one_tile<K, kRows, N>(pass, n, a, rows, row, kept);
  if constexpr (kRows > 4) {
    for (; row + 4 <= count; row += 4) one_tile<K, 4, N>(pass, n, a, rows, row, kept);
    for (; row + 2 <= count; row += 2) one_tile<K, 2, N>(pass, n, a, rows, row, kept);
  }
  for (; row < count; ++row) one_tile<K, 1, N>(pass, n, a, rows, row, kept);
}

template <Float K>
void all_rows(const Dense& weights, int64_t first, int64_t columns, const Plain& a, const int32_t* rows, int64_t count,
              float* out, int64_t stride) {
  Sums kept;
  for (int64_t start = 0; start < count; start += kChunk) {
    const int64_t some = count - start < kChunk ? count - start : kChunk;
    const int64_t depth = some > kRows ? kDepth : weights.columns;
    for (int64_t from = 0; from < weights.columns; from += depth) {
      const int64_t to = from + depth < weights.columns ? from + depth : weights.columns;
      const Pass pass{weights, first, from, to, from == 0, to == weights.columns, out + start * stride, stride};
      int n = 0;
      for (; n + kOuts <= columns; n += kOuts) some_outputs<K, kOuts>(pass, n, a, rows + start, some, kept);
      for (; n < columns; ++n) some_outputs<K, 1>(pass, n, a, rows + start, some, kept);
    }
  }
}

void one_panel(const Dense& weights, int64_t first, int64_t columns, const Plain& a, const int32_t* rows, int64_t count,
               float* out, int64_t stride) {
  switch (weights.kind) {
    case Float::bf16:
      return all_rows<Float::bf16>(weights, first, columns, a, rows, count, out, stride);
    case Float::f16:
      return all_rows<Float::f16>(weights, first, columns, a, rows, count, out, stride);
    case Float::f32:
      return all_rows<Float::f32>(weights, first, columns, a, rows, count, out, stride);
  }
}

void multiply(const Dense& weights, int64_t first, int64_t columns, const Plain& a, const int32_t* rows, int64_t count,
              float* out, int64_t stride) {
  for (int64_t n = 0; n < columns; n += 16) {
    one_panel(weights, first + n, columns - n < 16 ? columns - n : 16, a, rows, count, out + n, stride);
  }
}

void narrow(const float* from, int64_t count, int64_t zeros, const Plain& a, int64_t row, int64_t column) {
  uint16_t* to = a.bf16 + row * a.padded + column;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    typedef uint16_t Narrow __attribute__((vector_size(2 * kLanes)));
    store(to + i, __builtin_convertvector(to_bf16(load<Floats>(from + i)), Narrow));
  }
  for (; i < count; ++i) to[i] = to_bf16(from[i]);
  for (; i < count + zeros; ++i) to[i] = 0;
}

}  // namespace

extern const DenseTable dense;
const DenseTable dense = {multiply, narrow};

}  // namespace mixtral::MIXTRAL_LEVEL
