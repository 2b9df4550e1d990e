// Attention of a batch of tokens over keys and values in pages of 64 tokens.
//
// One query head of one token is a row. Its pages are taken in ascending order; a page is one step of the softmax; after
// 16 pages (a segment) a row begins anew, and the segments are added in ascending order. So a row has the same bits
// whatever else is in the batch, in whatever chunks its prompt was read, and on any number of threads.
//
// Storage [pages, key heads, bytes of a block]; a block holds the keys and values of 64 tokens of one key head. P is the
// head size rounded up to 16; what is added is zeros.
//   bf16   keys [P / 2][64][2], values [32][P][2], bfloat16
//   f32    keys [P][64], values [64][P], float32
//   int8   keys + 128 [P / 4][64][4], values [16][P][4], 8 bits; scales of keys [64] and of values [64], float32
#pragma once

#include <cstdint>

#include "mixtral/inline.h"

namespace mixtral {

enum class Store : int { bf16 = 0, f32 = 1, int8 = 2 };

constexpr int kPage = 64, kSegment = 16, kMostTogether = 6;

struct Heads {
  int64_t queries, keys, size;  // query heads, key heads, head size
  Store store;

  MIXTRAL_INLINE int64_t padded() const { return (size + 15) / 16 * 16; }
  MIXTRAL_INLINE int64_t together() const { return queries / keys; }
  MIXTRAL_INLINE int64_t block_bytes() const {
    constexpr int64_t kSizes[] = {4, 8, 2};
    return kPage * padded() * kSizes[static_cast<int>(store)] + (store == Store::int8 ? 2 * kPage * 4 : 0);
  }
};

// The state of a row: the largest score, the sum of shares, and the sum of values, not yet divided.
struct Rows {
  float* largest;
  float* sums;
  float* values;  // [row][padded]
};

// One query as the kernels read it: of bf16, f32 or int8, with zeros up to `padded`; int8 has a scale.
struct Query {
  const void* values;
  float scale;
  int32_t offset;  // int8: -128 times the sum of the values
};

struct AttentionTable {
  // Writes a token's key and value (float32) of one head into a block, as token number `slot`.
  void (*append)(const Heads& heads, const float* key, const float* value, uint8_t* block, int slot);
  // Rounds a query to what the store asks for; returns scale and offset. `scale` is that of the scores.
  Query (*query)(const Heads& heads, const float* x, float scale, void* to);
  // One page for `count` <= 6 queries of one token: `visible` of its tokens are seen. `rows` has been begun.
  void (*page)(const Heads& heads, const uint8_t* block, int visible, const Query* queries, int count,
               const Rows& rows);
  // rows = nothing seen yet.
  void (*begin)(const Heads& heads, int count, const Rows& rows);
  // Adds what a segment found to what the earlier ones have found.
  void (*add)(const Heads& heads, int count, const Rows& segment, const Rows& rows);
  // out [count][size] = values divided by their sum.
  void (*finish)(const Heads& heads, int count, const Rows& rows, float* out);
};

}  // namespace mixtral
