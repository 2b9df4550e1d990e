// Executes AMX instructions in a signal handler, as Intel's manual defines them (Software Developer's Manual, volume 2).
//
// Only built with MIXTRAL_EMULATE_AMX. The machine code of the kernels runs as it is: each tile instruction is a fault,
// the handler reads its bytes, does what it says on tiles of the thread, and lets the thread go on behind it.
#include "mixtral/emulator.h"

#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace mixtral::amx {
namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

// The tiles of a thread and their shapes. Palette 0: not configured.
struct State {
  int palette = 0, start_row = 0;
  int rows[kTiles] = {}, row_bytes[kTiles] = {};
  alignas(64) uint8_t data[kTiles][kRows][kRowBytes] = {};
};
thread_local State state;

[[noreturn]] void fault(const char* what) {
  std::fprintf(stderr, "AMX emulation: %s\n", what);
  std::abort();
}

void require(bool holds, const char* what) {
  if (!holds) fault(what);
}

// --- instructions as bytes -------------------------------------------------------------------------------------------

// An instruction of the map 0F38 with a three-byte VEX prefix.
struct Instruction {
  int opcode, prefix;         // prefix: 0 none, 1 66, 2 F3, 3 F2
  int reg, vvvv;              // operands in registers
  bool memory, has_sib, has_index;
  int rm;                     // the register, if not in memory
  const uint8_t* base;        // the address without the index
  int64_t index;              // times its scale; 0 if there is none
  int length;
};

// General registers by their numbers in instructions.
constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

int64_t read_number(const uint8_t* at, int bytes) {
  if (bytes == 1) return static_cast<int8_t>(*at);
  int32_t number;
  std::memcpy(&number, at, sizeof number);
  return number;
}

// Fills base, index and length of an operand in memory; `at` is behind the ModRM byte.
void decode_address(const uint8_t* start, const uint8_t* at, int mod, int rm, bool x, bool b, const greg_t* registers,
                    Instruction& found) {
  int64_t base = 0;
  bool has_base = true;
  int displacement = mod == 1 ? 1 : mod == 2 ? 4 : 0;
  found.has_sib = rm == 4;
  int base_number = rm;
  if (found.has_sib) {
    const int sib = *at++, index_number = (sib >> 3 & 7) | (x ? 8 : 0);
    base_number = sib & 7;
    found.has_index = index_number != 4;
    if (found.has_index) found.index = static_cast<int64_t>(static_cast<uint64_t>(registers[kRegisters[index_number]]) << (sib >> 6));
  }
  bool from_next = false;  // relative to the next instruction
  if (mod == 0 && base_number == 5) {
    has_base = false;
    from_next = !found.has_sib;
    displacement = 4;
  }
  if (has_base) base = registers[kRegisters[base_number | (b ? 8 : 0)]];
  if (displacement > 0) base += read_number(at, displacement);
  found.length = static_cast<int>(at + displacement - start);
  if (from_next) base += reinterpret_cast<int64_t>(start) + found.length;
  found.base = reinterpret_cast<const uint8_t*>(base);
}

// Reads an AMX instruction; false if it is another one.
bool decode(const uint8_t* start, const greg_t* registers, Instruction& found) {
  constexpr int kMap0F38 = 2;
  if (start[0] != 0xC4 || (start[1] & 31) != kMap0F38) return false;
  if ((start[2] & 0x84) != 0) return false;  // W or L
  found.opcode = start[3];
  if (found.opcode != 0x49 && found.opcode != 0x4B && found.opcode != 0x5C && found.opcode != 0x5E) return false;
  const bool r = (start[1] & 0x80) == 0, x = (start[1] & 0x40) == 0, b = (start[1] & 0x20) == 0;
  found.prefix = start[2] & 3;
  found.vvvv = ~(start[2] >> 3) & 15;
  const int modrm = start[4], mod = modrm >> 6;
  found.reg = (modrm >> 3 & 7) | (r ? 8 : 0);
  found.memory = mod != 3;
  found.rm = (modrm & 7) | (b && !found.memory ? 8 : 0);
  found.has_sib = found.has_index = false;
  found.index = 0;
  found.length = 5;
  if (found.memory) decode_address(start, start + 5, mod, modrm & 7, x, b, registers, found);
  return true;
}

// --- what they do ----------------------------------------------------------------------------------------------------

void release() { state = State{}; }

struct Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Configuration) == 64);

void load_configuration(const uint8_t* from) {
  Configuration wanted;
  std::memcpy(&wanted, from, sizeof wanted);
  if (wanted.palette == 0) return release();
  require(wanted.palette == 1, "ldtilecfg: the palette is neither 0 nor 1");
  for (const uint8_t byte : wanted.reserved) require(byte == 0, "ldtilecfg: a reserved byte is not 0");
  State next{};
  next.palette = 1;
  next.start_row = wanted.start_row;
  for (int t = 0; t < 16; ++t) {
    const int rows = wanted.rows[t], bytes = wanted.row_bytes[t];
    require(t < kTiles || (rows == 0 && bytes == 0), "ldtilecfg: a tile beyond the eighth has a shape");
    require(rows <= kRows && bytes <= kRowBytes, "ldtilecfg: a tile has more than 16 rows or 64 bytes in a row");
    require((rows == 0) == (bytes == 0), "ldtilecfg: a tile has rows without bytes, or bytes without rows");
    if (t < kTiles) next.rows[t] = rows, next.row_bytes[t] = bytes;
  }
  state = next;
}

void store_configuration(uint8_t* to) {
  Configuration now{};
  now.palette = static_cast<uint8_t>(state.palette);
  now.start_row = static_cast<uint8_t>(state.start_row);
  for (int t = 0; t < kTiles; ++t) {
    now.rows[t] = static_cast<uint8_t>(state.rows[t]);
    now.row_bytes[t] = static_cast<uint16_t>(state.row_bytes[t]);
  }
  std::memcpy(to, &now, sizeof now);
}

void require_tile(int tile) {
  require(state.palette == 1, "a tile instruction before ldtilecfg");
  require(tile < kTiles && state.rows[tile] > 0, "a tile that the configuration has not");
}

void zero_rows(int tile, int from) { std::memset(state.data[tile][from], 0, static_cast<size_t>(kRows - from) * kRowBytes); }

void zero_tile(const Instruction& it) {
  require_tile(it.reg);
  zero_rows(it.reg, 0);
  state.start_row = 0;
}

void load_tile(const Instruction& it) {
  require(it.memory && it.has_sib, "tileloadd without a SIB byte");
  require_tile(it.reg);
  const int rows = state.rows[it.reg], bytes = state.row_bytes[it.reg];
  require(state.start_row < rows, "tileloadd: the first row is beyond the tile");
  if (state.start_row == 0) zero_rows(it.reg, 0);
  for (int row = state.start_row; row < rows; ++row) {
    uint8_t* to = state.data[it.reg][row];
    std::memcpy(to, it.base + row * it.index, static_cast<size_t>(bytes));
    std::memset(to + bytes, 0, static_cast<size_t>(kRowBytes - bytes));
  }
  zero_rows(it.reg, rows);
  state.start_row = 0;
}

void store_tile(const Instruction& it) {
  require(it.memory && it.has_sib, "tilestored without a SIB byte");
  require_tile(it.reg);
  require(state.start_row < state.rows[it.reg], "tilestored: the first row is beyond the tile");
  for (int row = state.start_row; row < state.rows[it.reg]; ++row) {
    std::memcpy(const_cast<uint8_t*>(it.base) + row * it.index, state.data[it.reg][row],
                static_cast<size_t>(state.row_bytes[it.reg]));
  }
  state.start_row = 0;
}

// The three tiles of a product: C [rows, columns] += A [rows, depth] times B [depth, columns], four bytes each.
struct Product {
  int c, a, b, rows, columns, depth;
};

Product product_of(const Instruction& it) {
  require(!it.memory, "a product of tiles with an operand in memory");
  for (const int tile : {it.reg, it.rm, it.vvvv}) require_tile(tile);
  require(it.reg != it.rm && it.reg != it.vvvv && it.rm != it.vvvv, "a product of tiles names one of them twice");
  const int *rows = state.rows, *bytes = state.row_bytes;
  for (const int tile : {it.reg, it.rm, it.vvvv}) require(bytes[tile] % 4 == 0, "a row of a product is not whole dwords");
  require(rows[it.reg] == rows[it.rm], "a product: C and A have different numbers of rows");
  require(bytes[it.rm] / 4 == rows[it.vvvv], "a product: B has not the rows that A has columns for");
  require(bytes[it.reg] == bytes[it.vvvv], "a product: C and B have different numbers of columns");
  return {it.reg, it.rm, it.vvvv, rows[it.reg], bytes[it.reg] / 4, bytes[it.rm] / 4};
}

template <typename T>
T number_at(int tile, int row, int at) {
  T number;
  std::memcpy(&number, state.data[tile][row] + at * static_cast<int>(sizeof number), sizeof number);
  return number;
}

// Sums and what else the rows of C hold are as wide as the tile; columns that are not configured stay 0.
template <typename T>
void keep(const Product& p, const T (&sums)[kRows][16]) {
  for (int m = 0; m < p.rows; ++m) {
    std::memset(state.data[p.c][m], 0, kRowBytes);
    std::memcpy(state.data[p.c][m], sums[m], static_cast<size_t>(p.columns) * 4);
  }
  zero_rows(p.c, p.rows);
  state.start_row = 0;
}

template <typename A, typename B>
void multiply_bytes(const Product& p) {
  uint32_t sums[kRows][16] = {};  // they wrap around
  for (int m = 0; m < p.rows; ++m) std::memcpy(sums[m], state.data[p.c][m], static_cast<size_t>(p.columns) * 4);
  for (int k = 0; k < p.depth; ++k) {
    for (int i = 0; i < 4; ++i) {
      int32_t b[16] = {};
      for (int n = 0; n < p.columns; ++n) b[n] = number_at<B>(p.b, k, 4 * n + i);
      for (int m = 0; m < p.rows; ++m) {
        const int32_t a = number_at<A>(p.a, m, 4 * k + i);
        for (int n = 0; n < 16; ++n) sums[m][n] += static_cast<uint32_t>(a * b[n]);
      }
    }
  }
  keep(p, sums);
}

float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float number;
  std::memcpy(&number, &wide, sizeof number);
  return number;
}

// Rounds to nearest, subnormal inputs and results are zero, whatever the control register says: the caller sets it.
[[gnu::noinline]] void multiply_bf16(const Product& p, float (&sums)[kRows][16]) {
  float chains[2][kRows][16] = {};  // of the even and of the odd numbers of pairs
  for (int k = 0; k < p.depth; ++k) {
    for (int odd = 0; odd < 2; ++odd) {
      float b[16] = {};
      for (int n = 0; n < p.columns; ++n) b[n] = widen(number_at<uint16_t>(p.b, k, 2 * n + odd));
      for (int m = 0; m < p.rows; ++m) {
        const float a = widen(number_at<uint16_t>(p.a, m, 2 * k + odd));
        for (int n = 0; n < 16; ++n) chains[odd][m][n] = __builtin_fmaf(a, b[n], chains[odd][m][n]);
      }
    }
  }
  for (int m = 0; m < p.rows; ++m) {
    std::memcpy(sums[m], state.data[p.c][m], static_cast<size_t>(p.columns) * 4);
    for (int n = 0; n < p.columns; ++n) sums[m][n] += chains[0][m][n] + chains[1][m][n];
  }
}

void multiply_pairs(const Product& p) {
  constexpr unsigned kNearestWithoutSubnormals = 0x9FC0;
  float sums[kRows][16] = {};
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kNearestWithoutSubnormals);
  multiply_bf16(p, sums);
  _mm_setcsr(before);
  keep(p, sums);
}

void configure(const Instruction& it) {
  require(it.vvvv == 0, "ldtilecfg and others name a register that they have not");
  if (it.memory) {
    require(it.reg == 0 && (it.prefix == 0 || it.prefix == 1), "no such instruction in memory");
    uint8_t* at = const_cast<uint8_t*>(it.base) + it.index;
    return it.prefix == 0 ? load_configuration(at) : store_configuration(at);
  }
  if (it.prefix == 0 && it.reg == 0 && it.rm == 0) return release();
  require(it.prefix == 3 && it.rm == 0, "no such instruction in registers");
  zero_tile(it);
}

void execute(const Instruction& it) {
  switch (it.opcode) {
    case 0x49:
      return configure(it);
    case 0x4B:
      require(it.vvvv == 0 && it.prefix != 0, "no such load or store");
      return it.prefix == 2 ? store_tile(it) : load_tile(it);
    case 0x5C:
      require(it.prefix == 2, "no such product of pairs");
      return multiply_pairs(product_of(it));
    default:
      break;
  }
  const Product product = product_of(it);
  if (it.prefix == 0) return multiply_bytes<uint8_t, uint8_t>(product);
  if (it.prefix == 1) return multiply_bytes<uint8_t, int8_t>(product);
  if (it.prefix == 2) return multiply_bytes<int8_t, uint8_t>(product);
  multiply_bytes<int8_t, int8_t>(product);
}

// --- the signal ------------------------------------------------------------------------------------------------------

struct sigaction before;

void handle(int signal, siginfo_t*, void* context) {
  mcontext_t& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
  Instruction found;
  const uint8_t* at = reinterpret_cast<const uint8_t*>(machine.gregs[REG_RIP]);
  if (!decode(at, machine.gregs, found)) {
    sigaction(signal, &before, nullptr);  // it happens again, and goes to whoever was there before
    return;
  }
  execute(found);
  machine.gregs[REG_RIP] += found.length;
}

}  // namespace

void emulate() {
  struct sigaction now;
  sigaction(SIGILL, nullptr, &now);
  if ((now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == handle) return;
  before = now;
  struct sigaction own = {};
  own.sa_sigaction = handle;
  own.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigemptyset(&own.sa_mask);
  sigaction(SIGILL, &own, nullptr);
}

}  // namespace mixtral::amx
