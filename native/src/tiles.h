// Tile registers of AMX: their shape, and each instruction by itself.
//
// Written as assembly, since the compiler's own functions for loads do not say that they read memory (GCC 12): stores of
// what they load could come behind them. Everything is internal to the including file.
#pragma once

#include <cstdint>

namespace mixtral::MIXTRAL_LEVEL {
namespace {

constexpr int kTileRows = 16, kTileBytes = 1024;  // of a tile, whose rows have 64 bytes

struct alignas(64) TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// All eight tiles whole. Fewer rows would save little: rows that are not needed are computed and not used.
constexpr TileShapes kShapes = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Around every use of tiles by a thread. Others (torch) give them other shapes: none is expected to stay.
inline void begin_tiles() { asm volatile("ldtilecfg %0" : : "m"(kShapes)); }
inline void end_tiles() { asm volatile("tilerelease"); }

template <int N>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(N));
}
template <int N>
inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(N) : "memory");
}
template <int N>
inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(N) : "memory");
}

// Tile C += tile A times tile B: A with a sign, B without one or with one; pairs of bfloat16.
template <int C, int A, int B>
inline void add_product_unsigned() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
inline void add_product_signed() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
inline void add_product_pairs() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

}  // namespace
}  // namespace mixtral::MIXTRAL_LEVEL
