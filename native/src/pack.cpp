// Panels of 16 rows from GGML rows and from integers in groups: bytes change their places, no value changes.
//
// Words of four rows are turned, so that a vector of four numbers holds one word of each row; then everything is done to
// four rows at once, and what comes out is stored as it lies in the panel.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "kinds.h"
#include "mixtral/panels.h"
#include "mixtral/pool.h"
#include "spread.h"

namespace mixtral {
namespace {

constexpr int kRows = 4, kParts = kPanel / kRows;

typedef uint32_t Words __attribute__((vector_size(16)));  // a word of each of four rows
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint64_t Longs __attribute__((vector_size(16)));

INLINE Words load(const uint8_t* from, size_t bytes = sizeof(Words)) {
  Words words = {};
  std::memcpy(&words, from, bytes);
  return words;
}
template <typename Vector>
INLINE void store(uint8_t* to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

// Lane n of vector i becomes lane i of vector n.
INLINE void turn(Words (&w)[kRows]) {
  const auto a = (Longs)__builtin_shufflevector(w[0], w[1], 0, 4, 1, 5), b = (Longs)__builtin_shufflevector(w[0], w[1], 2, 6, 3, 7);
  const auto c = (Longs)__builtin_shufflevector(w[2], w[3], 0, 4, 1, 5), d = (Longs)__builtin_shufflevector(w[2], w[3], 2, 6, 3, 7);
  w[0] = (Words)__builtin_shufflevector(a, c, 0, 2);
  w[1] = (Words)__builtin_shufflevector(a, c, 1, 3);
  w[2] = (Words)__builtin_shufflevector(b, d, 0, 2);
  w[3] = (Words)__builtin_shufflevector(b, d, 1, 3);
}

// Four words of each of four rows, or as many bytes of them.
INLINE void take_words(const uint8_t* const* rows, int64_t at, Words* to, size_t bytes = sizeof(Words)) {
  Words square[kRows];
  for (int n = 0; n < kRows; ++n) square[n] = load(rows[n] + at, bytes);
  turn(square);
  std::copy_n(square, kRows, to);
}

// A word of every vector of a group's quant plane, from the quants of eight times four columns.
INLINE void put_words(Kind kind, const Words* q, Words* words) {
  switch (kind) {
    case Kind::q2_k:
      for (int i = 0; i < 2; ++i) words[i] = q[4 * i] | q[4 * i + 1] << 2 | q[4 * i + 2] << 4 | q[4 * i + 3] << 6;
      return;
    case Kind::q3_k:
      for (int i = 0; i < 3; ++i) words[i] = q[2 * i] | q[2 * i + 1] << 3;
      for (int i = 0; i < 2; ++i) {
        words[i] |= (q[6 + i] & kPairs) << 6;
        words[2] |= (q[6 + i] >> 2 & kBits) << (6 + i);
      }
      return;
    case Kind::g8:
      std::copy_n(q, kWords, words);
      return;
    default:
      for (int i = 0; i < 4; ++i) words[i] = (q[2 * i] & kNibbles) | (q[2 * i + 1] & kNibbles) << 4;
  }
  if (kind == Kind::q5_k) {
    words[4] = q[0] >> 4 & kBits;
    for (int j = 1; j < kWords; ++j) words[4] |= (q[j] >> 4 & kBits) << j;
  }
  if (kind == Kind::q6_k) {
    for (int i = 0; i < 2; ++i) {
      words[4 + i] = q[4 * i] >> 4 & kPairs;
      for (int j = 1; j < 4; ++j) words[4 + i] |= (q[4 * i + j] >> 4 & kPairs) << (2 * j);
    }
  }
}

// The quants of 32 columns of four rows to their place; `out` is the group's quant plane.
INLINE void put_quants(Kind kind, const Words* q, uint8_t* out, int part) {
  Words words[kWords];
  put_words(kind, q, words);
  const int vectors = static_cast<int>(quant_bytes_of(kind) / 64);
  for (int j = 0; j < vectors; ++j) store(out + 64 * j + 16 * part, words[j]);
}

// --- GGML super-blocks of 256 values ---------------------------------------------------------------------------------

// Where the quants of a block begin, and how many words they are.
constexpr int quants_of(Kind kind) { return kind == Kind::q3_k || kind == Kind::q6_k ? 0 : 16; }
constexpr int quant_words_of(Kind kind) {
  constexpr int kCounts[] = {16, 24, 32, 40, 48};
  return kCounts[static_cast<int>(kind)];
}

// The quants of group `g` (32 columns) out of the words of a block's quants.
INLINE void take_quants(Kind kind, const Words* w, int g, Words* q) {
  for (int j = 0; j < kWords; ++j) {
    switch (kind) {
      case Kind::q2_k:
        q[j] = w[g / 4 * 8 + j] >> (2 * (g % 4)) & kPairs;
        break;
      case Kind::q3_k:
        q[j] = (w[8 + g / 4 * 8 + j] >> (2 * (g % 4)) & kPairs) | (w[j] >> g & kBits) << 2;
        break;
      case Kind::q5_k:
        q[j] = (w[8 + g / 2 * 8 + j] >> (g % 2 * 4) & kNibbles) | (w[j] >> g & kBits) << 4;
        break;
      case Kind::q6_k:
        q[j] = (w[g / 4 * 16 + g % 2 * 8 + j] >> (g % 4 / 2 * 4) & kNibbles) | (w[32 + g / 4 * 8 + j] >> (2 * (g % 4)) & kPairs) << 4;
        break;
      default:
        q[j] = w[g / 2 * 8 + j] >> (g % 2 * 4) & kNibbles;
    }
  }
}

// --- scales: of every row a word with a byte each, or two halves, to runs of 16 lanes --------------------------------

using Column = Words[kParts];  // a word of each of the 16 rows

// Four bytes of each row as four runs of bytes. Every step moves the upper half of the 64 bytes between the lower one.
INLINE void put_bytes(const Column& from, uint8_t* run) {
  Bytes v[kParts];
  for (int i = 0; i < kParts; ++i) v[i] = (Bytes)from[i];
  for (int step = 0; step < 4; ++step) {
    const Bytes a = v[0], b = v[1], c = v[2], d = v[3];
    v[0] = __builtin_shufflevector(a, c, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    v[1] = __builtin_shufflevector(a, c, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    v[2] = __builtin_shufflevector(b, d, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    v[3] = __builtin_shufflevector(b, d, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
  for (int i = 0; i < kParts; ++i) store(run + 16 * i, v[i]);
}

// Two halves of each row as two runs of halves.
INLINE void put_halves(const Column& from, uint8_t* run) {
  for (int i = 0; i < 2; ++i) {
    const auto a = (Halves)from[2 * i], b = (Halves)from[2 * i + 1];
    store(run + 16 * i, __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14));
    store(run + 32 + 16 * i, __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15));
  }
}

// A half of each row, the lower one of a word, as one run.
INLINE void put_half(const Column& from, uint8_t* run) {
  for (int i = 0; i < 2; ++i) {
    store(run + 16 * i, __builtin_shufflevector((Halves)from[2 * i], (Halves)from[2 * i + 1], 0, 2, 4, 6, 8, 10, 12, 14));
  }
}

// The words with scales of a block, of four rows: those of `put_scales`. `there` is all ones where there is a row.
INLINE void take_scales(Kind kind, const uint8_t* const* rows, Words there, int part, Column* to) {
  Words w[2 * kRows];
  take_words(rows, quants_of(kind) == 16 ? 0 : kind == Kind::q3_k ? 96 : 192, w, kind == Kind::q3_k ? 14 : 16);
  if (kind == Kind::q2_k || kind == Kind::q6_k) take_words(rows, kind == Kind::q2_k ? 80 : 208, w + kRows, kind == Kind::q2_k ? 4 : 2);
  if (kind == Kind::q4_k || kind == Kind::q5_k) {
    // Eight scales and eight minimums of 6 bits in three words.
    const Words first = w[1], second = w[2], third = w[3];
    w[1] = first & 0x3F3F3F3F;
    w[2] = (third & kNibbles) | (first >> 6 & kPairs) << 4;
    w[3] = second & 0x3F3F3F3F;
    w[4] = (third >> 4 & kNibbles) | (second >> 6 & kPairs) << 4;
  }
  if (kind == Kind::q3_k) {
    const Words low[] = {w[0] & kNibbles, w[1] & kNibbles, w[0] >> 4 & kNibbles, w[1] >> 4 & kNibbles}, high = w[2];
    w[4] = w[3];
    for (int i = 0; i < 4; ++i) {
      w[i] = (Words)((Bytes)(low[i] | (high >> (2 * i) & kPairs) << 4) - (Bytes)(there & 0x20202020));
    }
  }
  for (int i = 0; i < 5; ++i) to[i][part] = w[i];
}

// Scales of 16 rows to a run.
INLINE void put_scales(Kind kind, const Column* w, uint8_t* run) {
  if (kind == Kind::q4_k || kind == Kind::q5_k) {
    put_bytes(w[1], run);
    put_bytes(w[2], run + 64);
    put_halves(w[3], run + 128);
    put_halves(w[4], run + 192);
    put_halves(w[0], run + 256);
    return;
  }
  for (int i = 0; i < 4; ++i) kind == Kind::q6_k ? put_bytes(w[i], run + 64 * i) : put_halves(w[i], run + 64 * i);
  kind == Kind::q2_k ? put_halves(w[4], run + 256) : put_half(w[4], run + 256);
}

// Whether the halves that scale a block are finite: of 16 rows, among the words of `take_scales`, where an upper half of
// no meaning is 0.
INLINE bool finite_scales(Kind kind, const Column* w) {
  const Column& halves = w[kind == Kind::q4_k || kind == Kind::q5_k ? 0 : 4];
  const Halves exponent = (Halves)(Words{} + 0x7C007C00);
  Longs damaged = {};
  for (int part = 0; part < kParts; ++part) damaged |= (Longs)(((Halves)halves[part] & exponent) == exponent);
  return (damaged[0] | damaged[1]) == 0;
}

// Rows beyond the last one: what makes quants and scales of zero.
template <Kind K>
struct Nothing {
  uint8_t block[block_bytes_of(K)];
  Nothing() { std::memset(block, K == Kind::g8 ? 0x80 : 0, sizeof block); }
};

// The rows of a panel, with zeros in place of those that are not there. `step` is what lies between blocks of a row.
struct Rows {
  const uint8_t* at[kPanel];
  Words there[kParts];
  int64_t count;

  Rows(const Panels& shape, const uint8_t* first, int64_t panel, int64_t row_bytes, const uint8_t* nothing)
      : count(std::min<int64_t>(kPanel, shape.rows - panel * kPanel)) {
    for (int64_t n = 0; n < kPanel; ++n) {
      at[n] = n < count ? first + (panel * kPanel + n) * row_bytes : nothing;
      there[n / kRows][n % kRows] = n < count ? ~uint32_t{0} : 0;
    }
  }
  INLINE void advance(int64_t bytes) {
    for (int64_t n = 0; n < count; ++n) at[n] += bytes;
  }
};

// False if a scale is not finite.
template <Kind K>
bool pack_panel(const Panels& shape, const uint8_t* blocks, uint8_t* out, int64_t panel) {
  const Nothing<K> nothing;
  const int64_t per_row = shape.columns / kBlock;
  Rows rows(shape, blocks, panel, per_row * block_bytes_of(K), nothing.block);
  uint8_t* quants = out + panel * shape.panel_bytes();
  bool finite = true;
  for (int64_t b = 0; b < per_row; ++b, quants += shape.stride(), rows.advance(block_bytes_of(K))) {
    Column scales[5];
    for (int part = 0; part < kParts; ++part) {
      const uint8_t* const* four = rows.at + kRows * part;
      Words w[quant_words_of(K)], q[kWords];
      for (int i = 0; i < quant_words_of(K); i += kRows) take_words(four, quants_of(K) + 4 * i, w + i);
#pragma GCC unroll 8
      for (int g = 0; g < kBlock / kGroup; ++g) {
        take_quants(K, w, g, q);
        put_quants(K, q, quants + g * quant_bytes_of(K), part);
      }
      take_scales(K, four, rows.there[part], part, scales);
    }
    finite &= finite_scales(K, scales);
    uint8_t* run = quants + shape.scales_at(b);
    put_scales(K, scales, run);
    std::memset(run + scale_bytes_of(K), 0, static_cast<size_t>(shape.stride() - shape.scales_at(b) - scale_bytes_of(K)));
  }
  return finite;
}

// --- groups ----------------------------------------------------------------------------------------------------------

// The 32 codes of a block of Q4_0 or Q8_0 of four rows.
template <Kind K>
INLINE void take_block_codes(const uint8_t* const* rows, Words* q) {
  take_words(rows, 2, q);
  if constexpr (K == Kind::g8) {
    take_words(rows, 18, q + kRows);
    for (int j = 0; j < kWords; ++j) q[j] ^= 0x80808080;
  } else {
    for (int j = 0; j < kRows; ++j) q[kRows + j] = q[j] >> 4;
  }
}

// Q4_0 and Q8_0; false if a scale is not finite.
template <Kind K>
bool pack_block_groups(const Panels& shape, const uint8_t* blocks, uint8_t* out, int64_t panel) {
  const Nothing<K> nothing;
  const int64_t per_row = shape.columns / kGroup;
  Rows rows(shape, blocks, panel, per_row * block_bytes_of(K), nothing.block);
  uint8_t* start = out + panel * shape.panel_bytes();
  bool finite = true;
  for (int64_t g = 0; g < per_row; ++g, rows.advance(block_bytes_of(K))) {
    for (int part = 0; part < kParts; ++part) {
      Words q[kWords];
      take_block_codes<K>(rows.at + kRows * part, q);
      put_quants(K, q, start + quants_at(shape, g * kGroup), part);
    }
    uint8_t* run = start + run_at(shape, g);
    std::memset(run, 0, static_cast<size_t>(scale_bytes_of(K)));
    for (int64_t n = 0; n < rows.count; ++n) {
      uint16_t scale;
      std::memcpy(&scale, rows.at[n], 2);
      finite = finite && (scale & 0x7C00) != 0x7C00;
      std::memcpy(run + 2 * n, &scale, 2);
      run[32 + n] = K == Kind::g8 ? 128 : 8;
    }
  }
  return finite;
}

template <Kind K, int Bits>
void pack_codes(const Panels& shape, const uint8_t* codes, uint8_t* start, int64_t panel) {
  const int64_t row_bytes = shape.columns / 8 * Bits;
  const int64_t count = std::min<int64_t>(kPanel, shape.rows - panel * kPanel);
  alignas(16) uint8_t group[kPanel][kGroup] = {};
  const uint8_t* rows[kPanel];
  for (int n = 0; n < kPanel; ++n) rows[n] = group[n];
  for (int64_t k = 0; k < shape.columns; k += kGroup) {
    for (int64_t n = 0; n < count; ++n) {
      const uint8_t* from = codes + (panel * kPanel + n) * row_bytes + k / 8 * Bits;
      for (int i = 0; i < 4; ++i) {
        const uint64_t eight = spread<Bits>(from + i * Bits);
        std::memcpy(group[n] + 8 * i, &eight, 8);
      }
    }
    for (int part = 0; part < kParts; ++part) {
      Words q[kWords];
      take_words(rows + kRows * part, 0, q);
      take_words(rows + kRows * part, 16, q + kRows);
      put_quants(K, q, start + quants_at(shape, k), part);
    }
  }
}

template <Kind K>
void pack_codes(const Panels& shape, int bits, const uint8_t* codes, uint8_t* start, int64_t panel) {
  switch (bits) {
    case 1: return pack_codes<K, 1>(shape, codes, start, panel);
    case 2: return pack_codes<K, 2>(shape, codes, start, panel);
    case 3: return pack_codes<K, 3>(shape, codes, start, panel);
    case 4: return pack_codes<K, 4>(shape, codes, start, panel);
    case 5: return pack_codes<K, 5>(shape, codes, start, panel);
    case 6: return pack_codes<K, 6>(shape, codes, start, panel);
    case 7: return pack_codes<K, 7>(shape, codes, start, panel);
    default: return pack_codes<K, 8>(shape, codes, start, panel);
  }
}

void pack_group_scales(const Panels& shape, const Coded& from, uint8_t* start, int64_t panel) {
  const int64_t groups = shape.columns / shape.group, times = from.group / shape.group, per_row = groups / times;
  const int64_t count = std::min<int64_t>(kPanel, shape.rows - panel * kPanel);
  for (int64_t g = 0; g < groups; ++g) {
    uint8_t* run = start + run_at(shape, g);
    std::memset(run, 0, static_cast<size_t>(scale_bytes_of(shape.kind)));
    for (int64_t n = 0; n < count; ++n) {
      const int64_t at = (panel * kPanel + n) * per_row + g / times;
      std::memcpy(run + 2 * n, from.scales + at, 2);
      run[32 + n] = from.zeros != nullptr ? from.zeros[at] : static_cast<uint8_t>(1 << (from.bits - 1));
    }
  }
}

// Blocks of a panel are multiples of 64 bytes: what is left after the last scale.
void clear_rest(const Panels& shape, uint8_t* start) {
  const int64_t per_block = kBlock / shape.group * scale_bytes_of(shape.kind);
  for (int64_t b = 0; b < shape.blocks(); ++b) {
    const int64_t width = std::min<int64_t>(kBlock, shape.columns - b * kBlock);
    const int64_t used = shape.scales_at(b) + (width == kBlock ? per_block : width / shape.group * scale_bytes_of(shape.kind));
    std::memset(start + b * shape.stride() + used, 0, static_cast<size_t>(shape.block_bytes(width) - used));
  }
}

}  // namespace

bool pack_blocks(const Panels& shape, const uint8_t* blocks, uint8_t* out, int threads) {
  std::atomic<bool> finite{true};
  with_kind(shape.kind, [&](auto kind) {
    parallel(shape.count(), threads, [&](int64_t panel) {
      bool good;
      if constexpr (kind.value < Kind::g4) {
        good = pack_panel<kind.value>(shape, blocks, out, panel);
      } else {
        good = pack_block_groups<kind.value>(shape, blocks, out, panel);
        clear_rest(shape, out + panel * shape.panel_bytes());
      }
      if (!good) finite.store(false, std::memory_order_relaxed);
    });
  });
  return finite.load();
}

void pack_groups(const Panels& shape, const Coded& from, uint8_t* out, int threads) {
  parallel(shape.count(), threads, [&](int64_t panel) {
    uint8_t* start = out + panel * shape.panel_bytes();
    shape.kind == Kind::g4 ? pack_codes<Kind::g4>(shape, from.bits, from.codes, start, panel)
                           : pack_codes<Kind::g8>(shape, from.bits, from.codes, start, panel);
    pack_group_scales(shape, from, start, panel);
    clear_rest(shape, start);
  });
}

}  // namespace mixtral
