// The kernels of gemm.h on tiles: for K-quants and wide groups from kFew rows on, otherwise those of AVX-512.
//
// A tile holds 64 columns of 16 activation rows, another one 64 columns of a panel, and their products are added up in a
// third one over the columns that share their float steps: a block of 256 columns, or a group. What a tile multiplies are
// bytes. Those of 4 to 6 bits times the scale of a sub-block need more, and become two planes of bytes:
//
//   q4_k, q5_k  quant * (scale % 8) and quant * (scale / 8), both below 256
//   q6_k        the low and the high byte of (quant - 32) * scale
//   q2_k, q3_k  quant * scale, and (quant - 4) * scale + 124: one plane
//   g4, g8      quants: one plane
//
// The sums are exact, as on the other levels, and the same float steps in the same order follow.
#include "mixtral/gemm.h"

#include "quants.h"
#include "tiles.h"

namespace mixtral {

namespace avx512vnni {
extern const GemmTable gemm;
}

namespace MIXTRAL_LEVEL {
namespace {

// With fewer rows AVX-512 takes less time: 12 rows of a block of Q4_K cost 616 cycles there, and some 570 here if nothing
// overlaps (8 products, 12 loads, 2 stores, 64 vectors of quants, 12 rows of float steps).
constexpr int64_t kFew = 12;
// Rows that share the planes of a panel.
constexpr int64_t kMost = 128;
// Bytes ahead of the quants that are asked for.
constexpr int kAhead = 4096;

template <Kind K>
constexpr int kPlanes = K == Kind::q4_k || K == Kind::q5_k || K == Kind::q6_k ? 2 : 1;
// Tiles of rows of a unit of work, and panels whose planes are there at a time: four sums in tiles, 16 KiB of planes.
template <Kind K>
constexpr int kSide = 4 / kPlanes<K>;

constexpr int kSteps = 4;                        // tiles of a plane of 256 columns
constexpr int kPlaneBytes = kSteps * kTileBytes;

struct alignas(64) Memory {
  uint8_t planes[4][kPlaneBytes];
  int32_t sums[4][kTileRows][16];
  float totals[4][kMost][16];  // of a panel
};

// --- planes ----------------------------------------------------------------------------------------------------------

// The low 16 bits of a lane as both of its words.
inline Words twice(Ints scale) { return (Words)(((Bits)scale & 0xFFFF) * 0x10001); }

// Q4_K and Q5_K: both bytes of a word times three bits of a scale, which carries nothing over.
template <Kind K>
inline void split_scales(const uint8_t* quants, const uint8_t* scales, uint8_t* low, uint8_t* high) {
  Bytes v[8];
  unpack<K>(quants, v);
  const Ints scale = widen(scales);
  const Words first = twice(scale & 7), second = twice(scale >> 3);
  for (int j = 0; j < 8; ++j) {
    store(low + 64 * j, (Words)v[j] * first);
    store(high + 64 * j, (Words)v[j] * second);
  }
}

// Q6_K: products as words, of even and of odd bytes; then their low and their high bytes.
inline void split_products(const uint8_t* quants, const uint8_t* scales, uint8_t* low, uint8_t* high) {
  Bytes v[8];
  unpack<Kind::q6_k>(quants, v);
  const Words odd_bytes = twice(all(0xFF00));
  for (int half = 0; half < 2; ++half) {
    const Ints scale = widen_signed(scales + half * kPanel);
    const __m512i even = (__m512i)twice(scale & 255), odd = (__m512i)twice(scale << 8);
    const Words zero = twice(scale << 5);
    for (int j = 4 * half; j < 4 * half + 4; ++j) {
      const Words first = (Words)_mm512_maddubs_epi16((__m512i)v[j], even) - zero;
      const Words second = (Words)_mm512_maddubs_epi16((__m512i)v[j], odd) - zero;
      store(low + 64 * j, (first & ~odd_bytes) | second << 8);
      store(high + 64 * j, first >> 8 | (second & odd_bytes));
    }
  }
}

// Where a panel keeps a span of columns.
struct Place {
  const uint8_t *quants, *run;
};

// Columns [64 step, 64 step + 64) of a span as tiles of every plane. Not inlined: what is around it needs the registers.
template <Kind K>
[[gnu::noinline]] void unpack_step(const Place& place, int step, uint8_t* planes) {
  if constexpr (K == Kind::g8) return;  // tiles already
  const uint8_t* run = place.run;
  for (int g = 2 * step; g < 2 * step + 2; ++g) {
    const uint8_t* from = place.quants + g * quant_bytes_of(K);
    uint8_t *low = planes + g * 512, *high = low + kPlaneBytes;
    for (int i = 0; i < quant_bytes_of(K); i += 64) __builtin_prefetch(from + kAhead + i);
    if constexpr (K == Kind::q4_k || K == Kind::q5_k) {
      split_scales<K>(from, run + g * kPanel, low, high);
    } else if constexpr (K == Kind::q6_k) {
      split_products(from, run + 2 * g * kPanel, low, high);
    } else {
      Bytes v[8];
      if constexpr (K == Kind::g4) {
        unpack<K>(from, v);
      } else {
        const uint8_t* scales = run + g * 2 * kPanel;
        products<K>(from, K == Kind::q2_k ? pairs(scales) : pairs_signed(scales), v);
      }
      for (int j = 0; j < 8; ++j) store(low + 64 * j, v[j]);
    }
  }
}

// --- float steps -----------------------------------------------------------------------------------------------------

// Rows whose sums are in memory and wait for their float steps.
struct Done {
  const uint8_t* run;     // scales of the span
  const RoundedBlock* x;  // the first row
  int column, width;      // of the span, in its block
  float (*totals)[16];
  int64_t rows;
};

// The exact sum of a row.
template <Kind K>
inline Ints sum_of(const Done& done, const Memory& memory, int64_t row) {
  const uint64_t tile = static_cast<uint64_t>(row) / kTileRows, at = static_cast<uint64_t>(row) % kTileRows;
  if constexpr (kPlanes<K> == 2) {
    const Ints low = load<Ints>(memory.sums[2 * tile][at]), high = load<Ints>(memory.sums[2 * tile + 1][at]);
    return low + (high << (K == Kind::q6_k ? 8 : 3));
  }
  const Ints sum = load<Ints>(memory.sums[tile][at]);
  const RoundedBlock& x = done.x[row];
  if constexpr (K == Kind::q3_k) return sum - all(kProduct * x.sum);
  if constexpr (K == Kind::g4 || K == Kind::g8) {
    int32_t all_of_them = x.sum;
    if (done.width < kBlock) {
      const int16_t* parts = x.sum32 + done.column / kGroup;
      all_of_them = parts[0] + parts[1] + parts[2] + parts[3];
    }
    return sum - widen(done.run + 32) * all(all_of_them);
  }
  return sum;
}

// Pairs of minimums, and the sums of activations that they are multiplied with.
template <Kind K>
constexpr int kPairs = K == Kind::q2_k ? 8 : 4;

template <Kind K>
inline Words minimums(const uint8_t* run, int pair) {
  if constexpr (K == Kind::q2_k) return pairs(run + pair * 2 * kPanel) >> 4;
  return pairs(run + 128 + pair * 2 * kPanel);
}

// The float steps of rows [from, to).
template <Kind K>
[[gnu::noinline]] void finish(const Done done, const Memory& memory, int64_t from, int64_t to) {
  const Floats d = halves(done.run + (K < Kind::g4 ? 256 : 0));
  Words lows[8] = {};
  Floats dmin{};
  if constexpr (kMinimums<K>) {
    dmin = halves(done.run + 288);
    for (int j = 0; j < kPairs<K>; ++j) lows[j] = minimums<K>(done.run, j);
  }
  for (int64_t row = from; row < to; ++row) {
    const RoundedBlock& x = done.x[row];
    const Floats step = all(x.scale);
    Floats total = load<Floats>(done.totals[row]);
    total = fma(to_floats(sum_of<K>(done, memory, row)), d * step, total);
    if constexpr (kMinimums<K>) {
      const int16_t* sums = K == Kind::q2_k ? x.sum16 : x.sum32;
      Ints low{};
      UNROLL for (int j = 0; j < kPairs<K>; ++j) low = add_pairs(low, lows[j], load<int32_t>(sums + 2 * j));
      total = fma(to_floats(low), -(dmin * step), total);
    }
    store(done.totals[row], total);
  }
}

// --- units of work ---------------------------------------------------------------------------------------------------

// The products of 64 columns: the rows from x on (`tiles` tiles of them) with one panel, whose tile in the first plane is
// `planes`. Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 the panel.
template <Kind K>
inline void multiply_step(const int8_t* x, int tiles, const uint8_t* planes) {
  constexpr int64_t kRow = sizeof(RoundedBlock), kTileOfRows = kTileRows * kRow;
  load_tile<4>(x, kRow);
  load_tile<6>(planes, 64);
  add_product_unsigned<0, 4, 6>();
  if (tiles > 1) load_tile<5>(x + kTileOfRows, kRow);
  if constexpr (kPlanes<K> == 2) {
    load_tile<7>(planes + kPlaneBytes, 64);
    if constexpr (K == Kind::q6_k) {
      add_product_signed<1, 4, 7>();
    } else {
      add_product_unsigned<1, 4, 7>();
    }
    if (tiles == 1) return;
    add_product_unsigned<2, 5, 6>();
    if constexpr (K == Kind::q6_k) {
      add_product_signed<3, 5, 7>();
    } else {
      add_product_unsigned<3, 5, 7>();
    }
  } else {
    if (tiles > 1) add_product_unsigned<1, 5, 6>();
    if (tiles > 2) load_tile<4>(x + 2 * kTileOfRows, kRow), add_product_unsigned<2, 4, 6>();
    if (tiles > 3) load_tile<5>(x + 3 * kTileOfRows, kRow), add_product_unsigned<3, 5, 6>();
  }
}

// Some panels and at most kMost rows, which are neighbours.
template <Kind K>
class Multiplication {
 public:
  Multiplication(const Panels& w, int64_t first, int panels, const Rounded& a, int64_t row, int64_t rows, Memory& memory)
      : w_(w), memory_(memory), x_(&a.at(row, 0)), block_rows_(a.rows), first_(first), rows_(rows), panels_(panels),
        width_(K < Kind::g4 ? kBlock : static_cast<int>(w.group)), steps_(width_ / 64) {}

  void run() {
    for (int p = 0; p < panels_; ++p) {
      __builtin_memset(memory_.totals[p], 0, static_cast<size_t>(rows_) * sizeof memory_.totals[p][0]);
      now_[p] = place(p, 0);
      for (int step = 0; step < steps(); ++step) unpack_step<K>(now_[p], step, planes(p));
    }
    for (int64_t at = 0; at < w_.columns; at += width_) {
      const bool more = at + width_ < w_.columns;
      for (int p = 0; more && p < panels_; ++p) next_[p] = place(p, at + width_);
      for (int64_t row = 0; row < rows_; row += kUnit) {
        const bool unpacks = more && row + kUnit >= rows_;
        for (int p = 0; p < panels_; ++p) unit(p, at, row, unpacks);
      }
      for (int p = 0; p < panels_; ++p) now_[p] = next_[p];
    }
    finish<K>(waiting_, memory_, 0, waiting_.rows);
  }

 private:
  static constexpr int64_t kUnit = kSide<K> * kTileRows;

  int steps() const { return K < Kind::g4 ? kSteps : steps_; }

  Place place(int p, int64_t at) const {
    const int64_t block = at / kBlock, column = at % kBlock;
    const uint8_t* start = w_.panel(first_ + p) + block * w_.stride();
    return {start + column / kGroup * quant_bytes_of(K), start + w_.scales_at(block) + column / width_ * scale_bytes_of(K)};
  }
  uint8_t* planes(int p) const { return memory_.planes[p * kPlanes<K>]; }

  // The sums of panel `p` and the rows from `row` on, over the span from column `at` on. Beside its products the vector
  // units do what others have left: the float steps of the unit before this one and, once a tile of the planes has been
  // used for the last time, the same tile of the next span.
  void unit(int p, int64_t at, int64_t row, bool unpacks) {
    const int64_t left = rows_ - row, rows = left < kUnit ? left : kUnit;
    const int tiles = static_cast<int>((rows + kTileRows - 1) / kTileRows), column = static_cast<int>(at % kBlock);
    const RoundedBlock* x = x_ + at / kBlock * block_rows_ + row;
    const int8_t* columns = x->q + column;
    const uint8_t* from = K == Kind::g8 ? now_[p].quants : planes(p);
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    const int64_t part = kUnit / steps();
    for (int step = 0; step < steps(); ++step) {
      multiply_step<K>(columns + 64 * step, tiles, from + step * kTileBytes);
      const int64_t done = step * part, to = done + part < waiting_.rows ? done + part : waiting_.rows;
      if (done < to) finish<K>(waiting_, memory_, done, to);
      if (unpacks) unpack_step<K>(next_[p], step, planes(p));
    }
    store_tile<0>(memory_.sums[0], 64);
    store_tile<1>(memory_.sums[1], 64);
    if (kPlanes<K> == 2 ? tiles > 1 : tiles > 2) {
      store_tile<2>(memory_.sums[2], 64);
      store_tile<3>(memory_.sums[3], 64);
    }
    waiting_ = {now_[p].run, x, column, width_, memory_.totals[p] + row, rows};
  }

  const Panels& w_;
  Memory& memory_;
  const RoundedBlock* const x_;
  const int64_t block_rows_, first_, rows_;
  const int panels_, width_, steps_;
  Place now_[4] = {}, next_[4] = {};
  Done waiting_{};
};

template <Kind K>
void on_tiles(const Panels& w, int64_t first, int64_t panels, const Rounded& a, int64_t row, int64_t rows, float* out,
              int64_t stride) {
  Memory memory;
  begin_tiles();
  for (int64_t p = 0; p < panels; p += kSide<K>) {
    const int some = static_cast<int>(panels - p < kSide<K> ? panels - p : kSide<K>);
    Multiplication<K>(w, first + p, some, a, row, rows, memory).run();
    for (int64_t i = 0; i < rows; ++i) {
      for (int n = 0; n < some; ++n) store(out + i * stride + (p + n) * kPanel, load<Floats>(memory.totals[n][i]));
    }
  }
  end_tiles();
}

void some_rows(const Panels& w, int64_t first, int64_t panels, const Rounded& a, int64_t row, int64_t rows, float* out,
               int64_t stride) {
  switch (w.kind) {
    case Kind::q2_k:
      return on_tiles<Kind::q2_k>(w, first, panels, a, row, rows, out, stride);
    case Kind::q3_k:
      return on_tiles<Kind::q3_k>(w, first, panels, a, row, rows, out, stride);
    case Kind::q4_k:
      return on_tiles<Kind::q4_k>(w, first, panels, a, row, rows, out, stride);
    case Kind::q5_k:
      return on_tiles<Kind::q5_k>(w, first, panels, a, row, rows, out, stride);
    case Kind::q6_k:
      return on_tiles<Kind::q6_k>(w, first, panels, a, row, rows, out, stride);
    case Kind::g4:
      return on_tiles<Kind::g4>(w, first, panels, a, row, rows, out, stride);
    case Kind::g8:
      return on_tiles<Kind::g8>(w, first, panels, a, row, rows, out, stride);
  }
}

// One store of tiles for every 32 or 64 columns would take longer than the products.
bool fits_tiles(const Panels& w) { return w.kind < Kind::g4 || w.group >= 128; }

void multiply(const Panels& w, int64_t first, int64_t panels, const Rounded& a, const int32_t* rows, int64_t count,
              float* out, int64_t stride) {
  for (int64_t i = 0; i < count; i += kMost) {
    const int64_t some = count - i < kMost ? count - i : kMost;
    if (some < kFew || !fits_tiles(w)) {
      avx512vnni::gemm.multiply(w, first, panels, a, rows + i, some, out + i * stride, stride);
    } else {
      if (rows[i + some - 1] != rows[i] + some - 1) __builtin_trap();  // not neighbours: see Kernels::tiles
      some_rows(w, first, panels, a, rows[i], some, out + i * stride, stride);
    }
  }
}

void round(const float* values, int count, RoundedBlock& to) { avx512vnni::gemm.round(values, count, to); }

void swiglu(const float* gate, const float* up, float* out, int64_t count) {
  avx512vnni::gemm.swiglu(gate, up, out, count);
}

}  // namespace

extern const GemmTable gemm;
const GemmTable gemm = {round, multiply, swiglu};

}  // namespace MIXTRAL_LEVEL
}  // namespace mixtral
