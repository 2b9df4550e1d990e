// Panels of 16 rows from GGML rows and from integers in groups, and back: bytes change their places, no value changes.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "mixtral/panels.h"
#include "mixtral/pool.h"

namespace mixtral {
namespace {

// With the kind known to the compiled loop; otherwise every word would ask for it anew.
#define INLINE [[gnu::always_inline]] inline

// Quants of one group of 32 columns and 16 rows, a byte each; a word holds those of four columns that follow each other.
constexpr int kWords = kGroup / 4;
using Group = uint32_t[kPanel][kWords];

constexpr uint32_t kNibbles = 0x0F0F0F0F, kTriples = 0x07070707, kPairs = 0x03030303, kBits = 0x01010101;

INLINE uint32_t word_at(const uint8_t* from) {
  uint32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

INLINE void set_word(uint8_t* to, uint32_t word) { std::memcpy(to, &word, sizeof word); }

// One row's word of each vector of a group's quant plane.
INLINE void put_row(Kind kind, const uint32_t* q, uint32_t* words) {
  switch (kind) {
    case Kind::q2_k:
      for (int j = 0; j < kWords; ++j) words[j / 4] |= q[j] << (2 * (j % 4));
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
      for (int j = 0; j < kWords; ++j) words[j / 2] |= (q[j] & kNibbles) << (4 * (j % 2));
  }
  for (int j = 0; j < kWords; ++j) {
    if (kind == Kind::q5_k) words[4] |= (q[j] >> 4 & kBits) << j;
    if (kind == Kind::q6_k) words[4 + j / 4] |= (q[j] >> 4 & kPairs) << (2 * (j % 4));
  }
}

INLINE void take_row(Kind kind, const uint32_t* words, uint32_t* q) {
  switch (kind) {
    case Kind::q2_k:
      for (int j = 0; j < kWords; ++j) q[j] = words[j / 4] >> (2 * (j % 4)) & kPairs;
      return;
    case Kind::q3_k:
      for (int j = 0; j < 6; ++j) q[j] = words[j / 2] >> (3 * (j % 2)) & kTriples;
      for (int i = 0; i < 2; ++i) q[6 + i] = (words[i] >> 6 & kPairs) | (words[2] >> (6 + i) & kBits) << 2;
      return;
    case Kind::g8:
      std::copy_n(words, kWords, q);
      return;
    default:
      for (int j = 0; j < kWords; ++j) q[j] = words[j / 2] >> (4 * (j % 2)) & kNibbles;
  }
  for (int j = 0; j < kWords; ++j) {
    if (kind == Kind::q5_k) q[j] |= (words[4] >> j & kBits) << 4;
    if (kind == Kind::q6_k) q[j] |= (words[4 + j / 4] >> (2 * (j % 4)) & kPairs) << 4;
  }
}

INLINE void put_quants(Kind kind, const Group& q, uint8_t* out) {
  const int vectors = static_cast<int>(quant_bytes_of(kind) / 64);
  for (int n = 0; n < kPanel; ++n) {
    uint32_t words[kWords] = {};
    put_row(kind, q[n], words);
    for (int j = 0; j < vectors; ++j) set_word(out + 64 * j + 4 * n, words[j]);
  }
}

INLINE void take_quants(Kind kind, const uint8_t* in, Group& q) {
  const int vectors = static_cast<int>(quant_bytes_of(kind) / 64);
  for (int n = 0; n < kPanel; ++n) {
    uint32_t words[kWords] = {};
    for (int j = 0; j < vectors; ++j) words[j] = word_at(in + 64 * j + 4 * n);
    take_row(kind, words, q[n]);
  }
}

// --- GGML super-blocks of 256 values ---------------------------------------------------------------------------------

// The eight pairs of 6-bit numbers in the 12 bytes of Q4_K and Q5_K.
INLINE void take_six_bit_pairs(const uint8_t* in, uint8_t* scales, uint8_t* lows) {
  for (int i = 0; i < 4; ++i) {
    scales[i] = in[i] & 63;
    lows[i] = in[i + 4] & 63;
    scales[i + 4] = static_cast<uint8_t>((in[i + 8] & 15) | in[i] >> 6 << 4);
    lows[i + 4] = static_cast<uint8_t>(in[i + 8] >> 4 | in[i + 4] >> 6 << 4);
  }
}

INLINE void put_six_bit_pairs(const uint8_t* scales, const uint8_t* lows, uint8_t* out) {
  for (int i = 0; i < 4; ++i) {
    out[i] = static_cast<uint8_t>(scales[i] | scales[i + 4] >> 4 << 6);
    out[i + 4] = static_cast<uint8_t>(lows[i] | lows[i + 4] >> 4 << 6);
    out[i + 8] = static_cast<uint8_t>((scales[i + 4] & 15) | (lows[i + 4] & 15) << 4);
  }
}

// The sixteen 6-bit scales of Q3_K, as signed bytes.
INLINE void take_signed_scales(const uint8_t* in, uint8_t* scales) {
  for (int s = 0; s < 16; ++s) {
    const int low = in[s % 8] >> (s / 8 * 4) & 15, high = in[8 + s % 4] >> (s / 4 * 2) & 3;
    scales[s] = static_cast<uint8_t>((low | high << 4) - 32);
  }
}

INLINE void put_signed_scales(const uint8_t* scales, uint8_t* out) {
  for (int s = 0; s < 16; ++s) {
    const int code = scales[s] + 32;
    out[s % 8] |= static_cast<uint8_t>((code & 15) << (s / 8 * 4));
    out[8 + s % 4] |= static_cast<uint8_t>((code >> 4 & 3) << (s / 4 * 2));
  }
}

// The quants of group `g` (32 columns) of a block, four to a word.
INLINE void take_block_quants(Kind kind, const uint8_t* block, int g, uint32_t* q) {
  for (int j = 0; j < kWords; ++j) {
    if (kind == Kind::q2_k || kind == Kind::q3_k) {
      const int low = kind == Kind::q2_k ? 16 : 32;
      q[j] = word_at(block + low + g / 4 * 32 + 4 * j) >> (2 * (g % 4)) & kPairs;
      if (kind == Kind::q3_k) q[j] |= (word_at(block + 4 * j) >> g & kBits) << 2;
      continue;
    }
    if (kind == Kind::q6_k) {
      const int part = g % 4;
      const uint32_t low = word_at(block + g / 4 * 64 + part % 2 * 32 + 4 * j) >> (part / 2 * 4) & kNibbles;
      q[j] = low | (word_at(block + 128 + g / 4 * 32 + 4 * j) >> (2 * part) & kPairs) << 4;
      continue;
    }
    q[j] = word_at(block + (kind == Kind::q4_k ? 16 : 48) + g / 2 * 32 + 4 * j) >> (g % 2 * 4) & kNibbles;
    if (kind == Kind::q5_k) q[j] |= (word_at(block + 16 + 4 * j) >> g & kBits) << 4;
  }
}

INLINE void add_word(uint8_t* to, uint32_t bits) { set_word(to, word_at(to) | bits); }

INLINE void put_block_quants(Kind kind, const uint32_t* q, int g, uint8_t* block) {
  for (int j = 0; j < kWords; ++j) {
    if (kind == Kind::q2_k || kind == Kind::q3_k) {
      add_word(block + (kind == Kind::q2_k ? 16 : 32) + g / 4 * 32 + 4 * j, (q[j] & kPairs) << (2 * (g % 4)));
      if (kind == Kind::q3_k) add_word(block + 4 * j, (q[j] >> 2 & kBits) << g);
      continue;
    }
    const uint32_t low = q[j] & kNibbles, high = q[j] >> 4 & kNibbles;
    if (kind == Kind::q6_k) {
      const int part = g % 4;
      add_word(block + g / 4 * 64 + part % 2 * 32 + 4 * j, low << (part / 2 * 4));
      add_word(block + 128 + g / 4 * 32 + 4 * j, high << (2 * part));
      continue;
    }
    add_word(block + (kind == Kind::q4_k ? 16 : 48) + g / 2 * 32 + 4 * j, low << (g % 2 * 4));
    if (kind == Kind::q5_k) add_word(block + 16 + 4 * j, high << g);
  }
}

// Where lane `lane` of a run of pairs keeps number `s`.
INLINE int pair_at(int s, int lane) { return s / 2 * 32 + lane * 2 + s % 2; }

// Scales of one row's block to its lane of a run of scales, and back.
INLINE void put_block_scales(Kind kind, const uint8_t* block, uint8_t* run, int lane) {
  if (kind == Kind::q2_k) {
    for (int s = 0; s < 16; ++s) run[pair_at(s, lane)] = block[s];
    std::memcpy(run + 256 + 2 * lane, block + 80, 2);
    std::memcpy(run + 288 + 2 * lane, block + 82, 2);
    return;
  }
  if (kind == Kind::q3_k) {
    uint8_t scales[16];
    take_signed_scales(block + 96, scales);
    for (int s = 0; s < 16; ++s) run[pair_at(s, lane)] = scales[s];
    std::memcpy(run + 256 + 2 * lane, block + 108, 2);
    return;
  }
  if (kind == Kind::q6_k) {
    for (int s = 0; s < 16; ++s) run[s * kPanel + lane] = block[192 + s];
    std::memcpy(run + 256 + 2 * lane, block + 208, 2);
    return;
  }
  uint8_t scales[8], lows[8];
  take_six_bit_pairs(block + 4, scales, lows);
  for (int s = 0; s < 8; ++s) {
    run[s * kPanel + lane] = scales[s];
    run[128 + pair_at(s, lane)] = lows[s];
  }
  std::memcpy(run + 256 + 2 * lane, block, 2);
  std::memcpy(run + 288 + 2 * lane, block + 2, 2);
}

INLINE void take_block_scales(Kind kind, const uint8_t* run, int lane, uint8_t* block) {
  if (kind == Kind::q2_k) {
    for (int s = 0; s < 16; ++s) block[s] = run[pair_at(s, lane)];
    std::memcpy(block + 80, run + 256 + 2 * lane, 2);
    std::memcpy(block + 82, run + 288 + 2 * lane, 2);
    return;
  }
  if (kind == Kind::q3_k) {
    uint8_t scales[16];
    for (int s = 0; s < 16; ++s) scales[s] = run[pair_at(s, lane)];
    put_signed_scales(scales, block + 96);
    std::memcpy(block + 108, run + 256 + 2 * lane, 2);
    return;
  }
  if (kind == Kind::q6_k) {
    for (int s = 0; s < 16; ++s) block[192 + s] = run[s * kPanel + lane];
    std::memcpy(block + 208, run + 256 + 2 * lane, 2);
    return;
  }
  uint8_t scales[8], lows[8];
  for (int s = 0; s < 8; ++s) {
    scales[s] = run[s * kPanel + lane];
    lows[s] = run[128 + pair_at(s, lane)];
  }
  put_six_bit_pairs(scales, lows, block + 4);
  std::memcpy(block, run + 256 + 2 * lane, 2);
  std::memcpy(block + 2, run + 288 + 2 * lane, 2);
}

template <Kind K>
void pack_panel(const Panels& shape, const uint8_t* blocks, uint8_t* out, int64_t panel) {
  constexpr int64_t kSize = block_bytes_of(K);
  const int64_t per_row = shape.columns / kBlock, stride = per_row * kSize;
  uint8_t* quants = out + panel * shape.panel_bytes();
  const int64_t rows = std::min<int64_t>(kPanel, shape.rows - panel * kPanel);
  for (int64_t b = 0; b < per_row; ++b, quants += shape.stride()) {
    const uint8_t* first = blocks + (panel * kPanel * per_row + b) * kSize;
    uint8_t* run = quants + shape.scales_at(b);
    std::memset(run, 0, static_cast<size_t>(shape.stride() - shape.scales_at(b)));
    for (int n = 0; n < rows; ++n) put_block_scales(K, first + n * stride, run, n);
    for (int g = 0; g < kBlock / kGroup; ++g) {
      Group q;
      for (int n = 0; n < rows; ++n) take_block_quants(K, first + n * stride, g, q[n]);
      for (int64_t n = rows; n < kPanel; ++n) std::memset(q[n], 0, sizeof q[n]);
      put_quants(K, q, quants + g * quant_bytes_of(K));
    }
  }
}

template <Kind K>
void unpack_panel(const Panels& panels, uint8_t* blocks, int64_t panel) {
  constexpr int64_t kSize = block_bytes_of(K);
  const int64_t per_row = panels.columns / kBlock, stride = per_row * kSize;
  const int64_t rows = std::min<int64_t>(kPanel, panels.rows - panel * kPanel);
  for (int64_t b = 0; b < per_row; ++b) {
    uint8_t* first = blocks + (panel * kPanel * per_row + b) * kSize;
    const uint8_t* from = panels.panel(panel) + b * panels.stride();
    for (int n = 0; n < rows; ++n) {
      std::memset(first + n * stride, 0, static_cast<size_t>(kSize));
      take_block_scales(K, from + panels.scales_at(b), n, first + n * stride);
    }
    for (int g = 0; g < kBlock / kGroup; ++g) {
      Group q;
      take_quants(K, from + g * quant_bytes_of(K), q);
      for (int n = 0; n < rows; ++n) put_block_quants(K, q[n], g, first + n * stride);
    }
  }
}

// Calls work with the kind of blocks as a constant; other kinds are groups.
template <typename Work>
void with_kind(Kind kind, const Work& work) {
  switch (kind) {
    case Kind::q2_k:
      return work(std::integral_constant<Kind, Kind::q2_k>{});
    case Kind::q3_k:
      return work(std::integral_constant<Kind, Kind::q3_k>{});
    case Kind::q4_k:
      return work(std::integral_constant<Kind, Kind::q4_k>{});
    case Kind::q5_k:
      return work(std::integral_constant<Kind, Kind::q5_k>{});
    case Kind::q6_k:
      return work(std::integral_constant<Kind, Kind::q6_k>{});
    default:
      return;
  }
}

}  // namespace

void pack_blocks(const Panels& shape, const uint8_t* blocks, uint8_t* out, int threads) {
  with_kind(shape.kind, [&](auto kind) {
    parallel(shape.count(), threads, [&](int64_t panel) { pack_panel<kind.value>(shape, blocks, out, panel); });
  });
}

void unpack_blocks(const Panels& panels, uint8_t* blocks, int threads) {
  with_kind(panels.kind, [&](auto kind) {
    parallel(panels.count(), threads, [&](int64_t panel) { unpack_panel<kind.value>(panels, blocks, panel); });
  });
}

namespace {

// Quants of the 32 columns from k on, and the run of scales of a group, from the start of a panel.
int64_t quants_at(const Panels& w, int64_t k) { return k / kBlock * w.stride() + k % kBlock / kGroup * quant_bytes_of(w.kind); }
int64_t run_at(const Panels& w, int64_t group) {
  const int64_t k = group * w.group;
  return k / kBlock * w.stride() + w.scales_at(k / kBlock) + k % kBlock / w.group * scale_bytes_of(w.kind);
}

}  // namespace

void pack_groups(const Panels& shape, const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, uint8_t* out,
                 int threads) {
  const int64_t groups = shape.columns / shape.group;
  parallel(shape.count(), threads, [&](int64_t panel) {
    uint8_t* start = out + panel * shape.panel_bytes();
    const int64_t rows = std::min<int64_t>(kPanel, shape.rows - panel * kPanel);
    std::memset(start, 0, static_cast<size_t>(shape.panel_bytes()));
    for (int64_t k = 0; k < shape.columns; k += kGroup) {
      Group q = {};
      for (int n = 0; n < rows; ++n) std::memcpy(q[n], codes + (panel * kPanel + n) * shape.columns + k, kGroup);
      uint8_t* to = start + quants_at(shape, k);
      shape.kind == Kind::g4 ? put_quants(Kind::g4, q, to) : put_quants(Kind::g8, q, to);
    }
    for (int n = 0; n < rows; ++n) {
      for (int64_t g = 0; g < groups; ++g) {
        uint8_t* run = start + run_at(shape, g);
        const int64_t at = (panel * kPanel + n) * groups + g;
        std::memcpy(run + 2 * n, scales + at, 2);
        run[32 + n] = zeros[at];
      }
    }
  });
}

void unpack_groups(const Panels& panels, uint8_t* codes, uint16_t* scales, uint8_t* zeros, int threads) {
  const int64_t groups = panels.columns / panels.group;
  parallel(panels.count(), threads, [&](int64_t panel) {
    const int64_t rows = std::min<int64_t>(kPanel, panels.rows - panel * kPanel);
    for (int64_t k = 0; k < panels.columns; k += kGroup) {
      Group q;
      const uint8_t* from = panels.panel(panel) + quants_at(panels, k);
      panels.kind == Kind::g4 ? take_quants(Kind::g4, from, q) : take_quants(Kind::g8, from, q);
      for (int n = 0; n < rows; ++n) std::memcpy(codes + (panel * kPanel + n) * panels.columns + k, q[n], kGroup);
    }
    for (int n = 0; n < rows; ++n) {
      for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* run = panels.panel(panel) + run_at(panels, g);
        const int64_t at = (panel * kPanel + n) * groups + g;
        std::memcpy(scales + at, run + 2 * n, 2);
        zeros[at] = run[32 + n];
      }
    }
  });
}

}  // namespace mixtral
