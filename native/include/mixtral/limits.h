// What this machine can do at best: bytes read from memory, and products with operands in registers. For benchmarks.
#pragma once

#include <cstdint>

namespace mixtral {

// One instruction set. Rounds are repetitions of a fixed run of products; each returns the operations of one thread, where
// a product and its addition count as two.
struct LimitTable {
  // Reads `bytes` bytes, a multiple of 256, from an address that is a multiple of 64; the result depends on all of them.
  uint64_t (*read)(const uint8_t* data, int64_t bytes);
  int64_t (*int8)(int64_t rounds);  // int8 times uint8, summed in int32
  int64_t (*fp32)(int64_t rounds);
  int64_t (*bf16)(int64_t rounds);  // bfloat16, summed in float32; null where the processor has no such products
};

// Bytes per second of the fastest of the passes over `data` that fit into about `seconds`; at least one.
double read_speed(const LimitTable& table, const uint8_t* data, int64_t bytes, int threads, double seconds);

// Operations per second, likewise; `run` is one of a table's three.
double peak_speed(int64_t (*run)(int64_t rounds), int threads, double seconds);

}  // namespace mixtral
