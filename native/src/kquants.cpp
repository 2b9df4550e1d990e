// K-quant encoders, Q2_K to Q6_K: weighs the values, calls the search, packs the bits; the same bytes as kencode.py.
//
// Compiled once for each instruction set with MIXTRAL_LEVEL (the namespace) and MIXTRAL_WIDTH (floats in a vector).
// All but the table is internal to this file.
#include <cstdint>

#include "mixtral/half.h"
#include "mixtral/kernels.h"
#include "search.h"

namespace mixtral::MIXTRAL_LEVEL {
namespace {

constexpr float kLeastImportance = 0x1p-20f, kNoImportance = 0x1p-100f;

// --- values in -------------------------------------------------------------------------------------------------------

// The largest size among 256 values, as bits without the sign: their order is that of the sizes, NaN on top.
inline uint32_t largest_bits(const float* values) {
  int32_t largest = 0;
  for (int i = 0; i < kSuper; ++i) {
    const int32_t size = static_cast<int32_t>(bits_of(values[i]) & 0x7FFFFFFFu);
    largest = size > largest ? size : largest;
  }
  return static_cast<uint32_t>(largest);
}

template <typename Form>
void turn_block(const float* values, float factor, Row* rows, int lane) {
  for (int i = 0; i < Form::Values; ++i) {
    for (int s = 0; s < Form::Subs; ++s) rows[i][lane + s] = values[s * Form::Values + i] * factor;
  }
}

template <typename Form>
void turn_importance(const float* importance, Row* rows, int lane) {
  const uint32_t peak = largest_bits(importance);
  float factor = 0.0f, more = 1.0f;
  if (peak >= bits_of(kNoImportance)) {
    // From 2^126 on the power of two is not a normal number: it takes two steps.
    const bool top = peak >= bits_of(0x1p126f);
    factor = top ? 0x1p-64f : unit_for(peak);
    if (top) more = peak >= bits_of(0x1p127f) ? 0x1p-64f : 0x1p-63f;
  }
  for (int i = 0; i < Form::Values; ++i) {
    for (int s = 0; s < Form::Subs; ++s) {
      const float scaled = importance[s * Form::Values + i] * factor * more;
      rows[i][lane + s] = scaled > kLeastImportance ? scaled : kLeastImportance;
    }
  }
}

template <typename Form>
void default_weights(Tile<Form>& t) {
  for (int g = 0; g < kLanes; g += kWidth) {
    Vec squares{};
    for (int i = 0; i < Form::Values; ++i) squares = squares + load(&t.x[i][g]) * load(&t.x[i][g]);
    Row root;
    store(&root[0], squares / static_cast<float>(Form::Values));
    for (int lane = 0; lane < kWidth; ++lane) root[lane] = 0.125f * __builtin_sqrtf(root[lane]);
    for (int i = 0; i < Form::Values; ++i) store(&t.w[i][g], load(&root[0]) + size_of(load(&t.x[i][g])));
  }
}

// What a super-block stores, in the order of the row.
struct Block {
  uint8_t q[kSuper];
  int scales[kLanes], lows[kLanes];
  uint16_t d, dmin;
};

template <typename Form>
void read_block(const Tile<Form>& t, const Choice& c, int b, int offset, Block& block) {
  const int lane = b * Form::Subs;
  for (int s = 0; s < Form::Subs; ++s) {
    for (int i = 0; i < Form::Values; ++i) {
      block.q[s * Form::Values + i] = static_cast<uint8_t>(static_cast<int>(t.q[i][lane + s]) + offset);
    }
    block.scales[s] = static_cast<int>(c.scales[lane + s]);
    block.lows[s] = static_cast<int>(c.lows[lane + s]);
  }
  block.d = c.d[b];
  block.dmin = c.dmin[b];
}

// --- bits out: the layouts of ggml-common.h --------------------------------------------------------------------------

inline uint8_t* put_half(uint8_t* out, uint16_t half) {
  out[0] = static_cast<uint8_t>(half);
  out[1] = static_cast<uint8_t>(half >> 8);
  return out + 2;
}

// Joins runs of `Run` values: the k-th of 8 / Bits neighbouring runs takes bits k * Bits and up of the bytes. Of each
// value, bits Shift and up count.
template <int Run, int Bits, int Shift>
inline uint8_t* interleave(uint8_t* out, const uint8_t* q) {
  constexpr int kParts = 8 / Bits, kMask = (1 << Bits) - 1;
  for (int base = 0; base < kSuper; base += Run * kParts, out += Run) {
    for (int j = 0; j < Run; ++j) {
      unsigned joined = 0;
      for (int k = 0; k < kParts; ++k) joined |= ((q[base + k * Run + j] >> Shift) & kMask) << (k * Bits);
      out[j] = static_cast<uint8_t>(joined);
    }
  }
  return out;
}

// 8 scales and 8 lows of 6 bits in 12 bytes: four whole ones each, whose top bits hold those of the other four.
inline uint8_t* put_six_bit_pairs(uint8_t* out, const Block& b) {
  for (int i = 0; i < 4; ++i) {
    out[i] = static_cast<uint8_t>(b.scales[i] | b.scales[i + 4] >> 4 << 6);
    out[i + 4] = static_cast<uint8_t>(b.lows[i] | b.lows[i + 4] >> 4 << 6);
    out[i + 8] = static_cast<uint8_t>((b.scales[i + 4] & 15) | (b.lows[i + 4] & 15) << 4);
  }
  return out + 12;
}

struct Q2 {
  using Form = Affine<16, 3, 15>;
  static constexpr int kBytes = 84, kOffset = 0;
  static void pack(const Block& b, uint8_t* out) {
    for (int s = 0; s < 16; ++s) out[s] = static_cast<uint8_t>(b.scales[s] | b.lows[s] << 4);
    put_half(put_half(interleave<32, 2, 0>(out + 16, b.q), b.d), b.dmin);
  }
};

struct Q3 {
  using Form = Symmetric<16, 4, 32>;
  static constexpr int kBytes = 110, kOffset = 4;
  static void pack(const Block& b, uint8_t* out) {
    out = interleave<32, 2, 0>(interleave<32, 1, 2>(out, b.q), b.q);
    int scales[16];
    for (int s = 0; s < 16; ++s) scales[s] = b.scales[s] + 32;
    for (int s = 0; s < 8; ++s) *out++ = static_cast<uint8_t>((scales[s] & 15) | (scales[s + 8] & 15) << 4);
    for (int s = 0; s < 4; ++s) {
      *out++ = static_cast<uint8_t>(scales[s] >> 4 | scales[s + 4] >> 4 << 2 | scales[s + 8] >> 4 << 4 |
                                    scales[s + 12] >> 4 << 6);
    }
    put_half(out, b.d);
  }
};

struct Q4 {
  using Form = Affine<32, 15, 63>;
  static constexpr int kBytes = 144, kOffset = 0;
  static void pack(const Block& b, uint8_t* out) {
    interleave<32, 4, 0>(put_six_bit_pairs(put_half(put_half(out, b.d), b.dmin), b), b.q);
  }
};

struct Q5 {
  using Form = Affine<32, 31, 63>;
  static constexpr int kBytes = 176, kOffset = 0;
  static void pack(const Block& b, uint8_t* out) {
    out = put_six_bit_pairs(put_half(put_half(out, b.d), b.dmin), b);
    interleave<32, 4, 0>(interleave<32, 1, 4>(out, b.q), b.q);
  }
};

struct Q6 {
  using Form = Symmetric<16, 32, 128>;
  static constexpr int kBytes = 210, kOffset = 32;
  static void pack(const Block& b, uint8_t* out) {
    out = interleave<32, 2, 4>(interleave<64, 4, 0>(out, b.q), b.q);
    for (int s = 0; s < 16; ++s) *out++ = static_cast<uint8_t>(b.scales[s]);
    put_half(out, b.d);
  }
};

template <typename Kind>
Fault encode(const float* values, const float* importance, uint8_t* out, int64_t begin, int64_t end, int64_t per_row) {
  using Form = typename Kind::Form;
  Tile<Form> tile = {};
  Fault fault{Problem::none, 0};
  for (int64_t first = begin; first < end; first += Form::Blocks) {
    const int count = end - first < Form::Blocks ? static_cast<int>(end - first) : Form::Blocks;
    bool reachable[Form::Blocks] = {};
    for (int b = 0; b < count; ++b) {
      const float* x = values + (first + b) * kSuper;
      const uint32_t largest = largest_bits(x);
      if (largest >= 0x7F800000u) {
        int64_t at = (first + b) * kSuper;
        while ((bits_of(values[at]) & 0x7F800000u) != 0x7F800000u) ++at;
        return {Problem::not_finite, at};
      }
      reachable[b] = largest < bits_of(kTooLarge);
      const bool something = reachable[b] && largest >= bits_of(kNothing);
      tile.unit[b] = something ? unit_for(largest) : 1.0f;
      turn_block<Form>(x, something ? tile.unit[b] : 0.0f, tile.x, b * Form::Subs);
      if (importance) turn_importance<Form>(importance + (first + b) % per_row * kSuper, tile.w, b * Form::Subs);
    }
    // The second half of the last tile may be missing: lanes are apart, so whatever it holds does no harm.
    for (int b = count; b < Form::Blocks; ++b) tile.unit[b] = 1.0f;
    if (!importance) default_weights(tile);
    Choice chosen;
    encode_tile(tile, chosen);
    for (int b = 0; b < count; ++b) {
      if (!reachable[b] || !tile.fits[b]) {
        if (fault.problem == Problem::none) fault = {Problem::too_large, (first + b) * kSuper};
        continue;
      }
      Block block;
      read_block(tile, chosen, b, Kind::kOffset, block);
      Kind::pack(block, out + (first + b) * Kind::kBytes);
    }
  }
  return fault;
}

}  // namespace

extern const KernelTable table;
const KernelTable table = {encode<Q2>, encode<Q3>, encode<Q4>, encode<Q5>, encode<Q6>};

}  // namespace mixtral::MIXTRAL_LEVEL
