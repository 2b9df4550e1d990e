// The kernels of dense.h on tiles: bfloat16 for every number of rows, other weights as AVX-512 does them.
//
// A tile holds 32 columns of 16 weight rows, as they lie in the file; another one the same columns of 16 activation rows,
// whose pairs lie side by side (Plain). Their products are added up in a third one over all columns: a sum that waits in
// memory meanwhile has the same bits. So a result has one order, whatever the number of rows.
#include "mixtral/dense.h"

#include "lanes.h"
#include "tiles.h"

namespace mixtral {

namespace avx512bf16 {
extern const DenseTable dense;
}

namespace MIXTRAL_LEVEL {
namespace {

constexpr int64_t kColumns = 32;  // of a tile
constexpr int64_t kSteps = 16;    // tiles of a pass: the weights of two panels stay in the first cache
constexpr int64_t kMost = 128;    // rows that share them
// Bytes ahead of the weights of a row that are asked for.
constexpr int64_t kAhead = 512;

struct alignas(64) Memory {
  uint8_t weights[2][kSteps][kTileBytes];
  float sums[kMost / kTileRows][2][kTileRows][16];  // [tile of rows][panel][weight row][row]
};

// Up to two panels of weight rows, and where the pairs of some tiles of activation rows begin.
struct Part {
  const Dense& weights;
  int64_t first, rows;  // weight rows, at most 32
  const Plain& a;
  const uint16_t* x;

  int panels() const { return rows > kTileRows ? 2 : 1; }
  // Weight rows of a panel.
  int64_t height(int p) const { return rows - p * kTileRows < kTileRows ? rows - p * kTileRows : kTileRows; }
  const uint8_t* row(int p, int64_t n) const { return weights.data + (first + p * kTileRows + n) * weights.row_bytes(); }
  const uint16_t* pairs(int64_t tile, int64_t column) const { return x + tile * kTileRows * a.padded + column * kTileRows; }
};

// A tile of weights as a copy: zeros stand for rows and columns that are not there.
inline void copy_tile(const Part& part, int p, int64_t column, uint8_t* to) {
  const int64_t left = part.weights.columns - column, width = left < kColumns ? left : kColumns;
  for (int64_t n = 0; n < part.height(p); ++n) {
    const uint8_t* from = part.row(p, n) + 2 * column;
    if (width == kColumns) {
      __builtin_memcpy(to + 64 * n, from, 64);
    } else {
      __builtin_memset(to + 64 * n, 0, 64);
      __builtin_memcpy(to + 64 * n, from, static_cast<size_t>(2 * width));
    }
  }
  for (int64_t n = part.height(p); n < kTileRows; ++n) __builtin_memset(to + 64 * n, 0, 64);
}

// Loads a tile of weights from where it lies, if it is whole.
template <int N>
inline void load_weights(const Part& part, int p, int64_t column, Memory& memory) {
  if (part.height(p) == kTileRows && column + kColumns <= part.weights.columns) {
    const uint8_t* from = part.row(p, 0) + 2 * column;
    for (int64_t n = 0; n < kTileRows; ++n) __builtin_prefetch(from + n * part.weights.row_bytes() + kAhead);
    load_tile<N>(from, part.weights.row_bytes());
  } else {
    copy_tile(part, p, column, memory.weights[p][0]);
    load_tile<N>(memory.weights[p][0], 64);
  }
}

// One tile of rows: every weight is used once. Tiles 0 and 1 are sums, 4 and 5 weights, 6 the rows.
void one_tile(const Part& part, Memory& memory) {
  zero_tile<0>();
  zero_tile<1>();
  for (int64_t column = 0; column < part.a.padded; column += kColumns) {
    load_tile<6>(part.pairs(0, column), 64);
    load_weights<4>(part, 0, column, memory);
    add_product_pairs<0, 4, 6>();
    if (part.panels() == 2) {
      load_weights<5>(part, 1, column, memory);
      add_product_pairs<1, 5, 6>();
    }
  }
  store_tile<0>(memory.sums[0][0], 64);
  store_tile<1>(memory.sums[0][1], 64);
}

// Tiles of rows `t` and, if `both`, `t + 1`, over the steps of a pass that begins at `column`. Tiles 0 to 3 are sums, of
// the first rows and of the second, with each panel.
inline void two_tiles(const Part& part, int64_t t, bool both, int64_t column, int64_t steps, Memory& memory) {
  if (column == 0) {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
  } else {
    load_tile<0>(memory.sums[t][0], 64);
    load_tile<1>(memory.sums[t][1], 64);
    if (both) load_tile<2>(memory.sums[t + 1][0], 64), load_tile<3>(memory.sums[t + 1][1], 64);
  }
  const bool second = part.panels() == 2;
  for (int64_t step = 0; step < steps; ++step) {
    load_tile<4>(memory.weights[0][step], 64);
    load_tile<6>(part.pairs(t, column + step * kColumns), 64);
    add_product_pairs<0, 4, 6>();
    if (second) load_tile<5>(memory.weights[1][step], 64), add_product_pairs<1, 5, 6>();
    if (both) load_tile<7>(part.pairs(t + 1, column + step * kColumns), 64), add_product_pairs<2, 4, 7>();
    if (both && second) add_product_pairs<3, 5, 7>();
  }
  store_tile<0>(memory.sums[t][0], 64);
  store_tile<1>(memory.sums[t][1], 64);
  if (both) store_tile<2>(memory.sums[t + 1][0], 64), store_tile<3>(memory.sums[t + 1][1], 64);
}

void many_tiles(const Part& part, int64_t tiles, Memory& memory) {
  for (int64_t column = 0; column < part.a.padded; column += kSteps * kColumns) {
    const int64_t left = (part.a.padded - column) / kColumns, steps = left < kSteps ? left : kSteps;
    for (int p = 0; p < part.panels(); ++p) {
      for (int64_t step = 0; step < steps; ++step) copy_tile(part, p, column + step * kColumns, memory.weights[p][step]);
    }
    for (int64_t t = 0; t < tiles; t += 2) two_tiles(part, t, t + 1 < tiles, column, steps, memory);
  }
}

void write(const Part& part, const Memory& memory, int64_t count, float* out, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t n = 0; n < part.rows; ++n) {
      out[i * stride + n] = memory.sums[i / kTileRows][n / kTileRows][n % kTileRows][i % kTileRows];
    }
  }
}

void pairs_on_tiles(const Dense& weights, int64_t first, int64_t columns, const Plain& a, int64_t row, int64_t count,
                    float* out, int64_t stride) {
  Memory memory;
  begin_tiles();
  for (int64_t n = 0; n < columns; n += 2 * kTileRows) {
    const int64_t rows = columns - n < 2 * kTileRows ? columns - n : 2 * kTileRows;
    const Part part{weights, first + n, rows, a, a.bf16 + row * a.padded};
    if (count <= kTileRows) {
      one_tile(part, memory);
    } else {
      many_tiles(part, (count + kTileRows - 1) / kTileRows, memory);
    }
    write(part, memory, count, out + n, stride);
  }
  end_tiles();
}

void multiply(const Dense& weights, int64_t first, int64_t columns, const Plain& a, const int32_t* rows, int64_t count,
              float* out, int64_t stride) {
  if (weights.kind != Float::bf16) {
    return avx512bf16::dense.multiply(weights, first, columns, a, rows, count, out, stride);
  }
  for (int64_t i = 0; i < count; i += kMost) {
    const int64_t some = count - i < kMost ? count - i : kMost;
    // Neighbours from the first row of a tile on: see Kernels::tiles.
    if (rows[i] % kTileRows != 0 || rows[i + some - 1] != rows[i] + some - 1) __builtin_trap();
    pairs_on_tiles(weights, first, columns, a, rows[i], some, out + i * stride, stride);
  }
}

void narrow(const float* from, int64_t count, int64_t zeros, const Plain& a, int64_t row, int64_t column) {
  uint16_t* to = a.bf16 + row / kTileRows * kTileRows * a.padded + column * kTileRows + row % kTileRows * 2;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    typedef uint16_t Narrow __attribute__((vector_size(2 * kLanes)));
    uint16_t narrowed[kLanes];
    store(narrowed, __builtin_convertvector(to_bf16(load<Floats>(from + i)), Narrow));
    for (int n = 0; n < kLanes; n += 2) __builtin_memcpy(to + (i + n) * kTileRows, narrowed + n, 4);
  }
  for (; i < count + zeros; ++i) to[i / 2 * 2 * kTileRows + i % 2] = i < count ? to_bf16(from[i]) : uint16_t{0};
}

}  // namespace

extern const DenseTable dense;
const DenseTable dense = {multiply, narrow};

}  // namespace MIXTRAL_LEVEL
}  // namespace mixtral
