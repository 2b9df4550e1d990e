// Panels of 16 rows back into GGML rows and integers in groups: the inverse of pack.cpp, one number after the other.
#include <algorithm>
#include <cstring>

#include "kinds.h"
#include "mixtral/panels.h"
#include "mixtral/pool.h"

namespace mixtral {
namespace {

// Quants of one group of 32 columns and 16 rows, a byte each.
using Group = uint32_t[kPanel][kWords];

INLINE uint32_t word_at(const uint8_t* from) {
  uint32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

INLINE void set_word(uint8_t* to, uint32_t word) { std::memcpy(to, &word, sizeof word); }

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

INLINE void take_quants(Kind kind, const uint8_t* in, Group& q) {
  const int vectors = static_cast<int>(quant_bytes_of(kind) / 64);
  for (int n = 0; n < kPanel; ++n) {
    uint32_t words[kWords] = {};
    for (int j = 0; j < vectors; ++j) words[j] = word_at(in + 64 * j + 4 * n);
    take_row(kind, words, q[n]);
  }
}

// --- GGML super-blocks of 256 values ---------------------------------------------------------------------------------

INLINE void put_six_bit_pairs(const uint8_t* scales, const uint8_t* lows, uint8_t* out) {
  for (int i = 0; i < 4; ++i) {
    out[i] = static_cast<uint8_t>(scales[i] | scales[i + 4] >> 4 << 6);
    out[i + 4] = static_cast<uint8_t>(lows[i] | lows[i + 4] >> 4 << 6);
    out[i + 8] = static_cast<uint8_t>((scales[i + 4] & 15) | (lows[i + 4] & 15) << 4);
  }
}

INLINE void put_signed_scales(const uint8_t* scales, uint8_t* out) {
  for (int s = 0; s < 16; ++s) {
    const int code = scales[s] + 32;
    out[s % 8] |= static_cast<uint8_t>((code & 15) << (s / 8 * 4));
    out[8 + s % 4] |= static_cast<uint8_t>((code >> 4 & 3) << (s / 4 * 2));
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

}  // namespace

void unpack_blocks(const Panels& panels, uint8_t* blocks, int threads) {
  with_kind(panels.kind, [&](auto kind) {
    if constexpr (kind.value < Kind::g4) {
      parallel(panels.count(), threads, [&](int64_t panel) { unpack_panel<kind.value>(panels, blocks, panel); });
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
