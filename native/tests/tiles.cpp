// AMX instructions, emulated or real, against products computed by hand (`make test-amx`).
//
// tiles    every check; the first wrong number ends it
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>

#include "mixtral/processor.h"

namespace {

int checks = 0;

void check(bool holds, const std::string& what) {
  ++checks;
  if (holds) return;
  std::fprintf(stderr, "tiles: %s\n", what.c_str());
  std::_Exit(1);
}

struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

Shapes shapes(std::initializer_list<std::pair<int, int>> sizes) {  // rows and bytes of tiles 0, 1, ...
  Shapes made;
  int t = 0;
  for (const auto& [rows, bytes] : sizes) made.rows[t] = static_cast<uint8_t>(rows), made.row_bytes[t++] = static_cast<uint16_t>(bytes);
  return made;
}

void configure(const Shapes& wanted) { asm volatile("ldtilecfg %0" : : "m"(wanted) : "memory"); }

struct alignas(64) Tile {
  uint8_t bytes[16][64] = {};
};

// As assembly, with the numbers of tiles as text.
#define LOAD(number, from) asm volatile("tileloadd (%0,%1,1), %%tmm" #number : : "r"(from), "r"(int64_t{64}) : "memory")
#define STORE(number, to) asm volatile("tilestored %%tmm" #number ", (%0,%1,1)" : : "r"(to), "r"(int64_t{64}) : "memory")
#define RUN(instruction) asm volatile(instruction : : : "memory")

template <typename T>
T number(const Tile& tile, int row, int at) {
  T found;
  std::memcpy(&found, tile.bytes[row] + at * static_cast<int>(sizeof found), sizeof found);
  return found;
}
template <typename T>
void put(Tile& tile, int row, int at, T value) {
  std::memcpy(tile.bytes[row] + at * static_cast<int>(sizeof value), &value, sizeof value);
}

// --- shapes, loads, stores -------------------------------------------------------------------------------------------

Tile counted() {
  Tile made;
  for (int i = 0; i < 1024; ++i) made.bytes[i / 64][i % 64] = static_cast<uint8_t>(i * 7 + 3);
  return made;
}

// Only what the shape has is stored; what is loaded into fewer rows or bytes leaves the others zero.
void check_shapes() {
  const Tile from = counted();
  Tile to, whole;
  std::memset(to.bytes, 0xEE, sizeof to.bytes);
  configure(shapes({{5, 24}, {16, 64}, {3, 12}}));
  LOAD(0, &from);
  STORE(0, &to);
  for (int row = 0; row < 16; ++row) {
    for (int at = 0; at < 64; ++at) {
      check(to.bytes[row][at] == (row < 5 && at < 24 ? from.bytes[row][at] : 0xEE), "a store has another shape than its tile");
    }
  }
  LOAD(1, &from);
  STORE(1, &whole);
  check(std::memcmp(&whole, &from, sizeof from) == 0, "a whole tile is not what was loaded");
  RUN("tilezero %%tmm1");
  STORE(1, &whole);
  for (int i = 0; i < 1024; ++i) check(whole.bytes[i / 64][i % 64] == 0, "tilezero leaves something");
  Shapes now;
  asm volatile("sttilecfg %0" : "=m"(now));
  check(now.palette == 1 && now.rows[0] == 5 && now.row_bytes[0] == 24 && now.rows[2] == 3 && now.rows[3] == 0,
        "sttilecfg tells another configuration");
  // A new configuration begins with zeros.
  LOAD(1, &from);
  configure(shapes({{16, 64}, {16, 64}}));
  STORE(1, &whole);
  for (int i = 0; i < 1024; ++i) check(whole.bytes[i / 64][i % 64] == 0, "a tile has outlived its configuration");
  // A load that begins at a later row keeps those before it.
  Shapes late = shapes({{16, 64}});
  late.start_row = 4;
  configure(late);
  LOAD(0, &from);
  STORE(0, &whole);
  for (int row = 0; row < 16; ++row) {
    check((std::memcmp(whole.bytes[row], from.bytes[row], 64) == 0) == (row >= 4), "a load does not begin at its row");
  }
  RUN("tilerelease");
  asm volatile("sttilecfg %0" : "=m"(now));
  check(now.palette == 0 && now.rows[0] == 0, "tilerelease leaves a configuration");
}

// Every way to write an address: the registers are those that the encoding treats apart.
void check_addresses() {
  constexpr int64_t kMiddle = 1 << 16;
  constexpr uintptr_t kLow = 0x20000000;
  void* made = mmap(reinterpret_cast<void*>(kLow), 2 * kMiddle, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  check(made == reinterpret_cast<void*>(kLow), "no memory at a low address");
  uint8_t* data = static_cast<uint8_t*>(made) + kMiddle;
  const Tile from = counted();
  Tile to;
  configure(shapes({{4, 64}}));
  const auto expect = [&](const char* what, int64_t offset, int64_t stride) {
    STORE(0, &to);
    for (int row = 0; row < 4; ++row) {
      check(std::memcmp(to.bytes[row], data + offset + row * stride, 64) == 0, std::string("wrong address: ") + what);
    }
    RUN("tilezero %%tmm0");
  };
  for (int i = 0; i < 16; ++i) std::memcpy(data + 64 * i - 512, from.bytes[i], 64);
#define ADDRESS(text, base, index, offset, by, stride)                                                        \
  asm volatile("mov %0, %%" base "\n mov %1, %%" index "\n tileloadd " text ", %%tmm0"                        \
               : : "r"(data - (offset)), "r"(int64_t{(stride) / (by)}) : base, index, "memory");              \
  expect(text, 0, stride)
  ADDRESS("(%%rax,%%rbx,1)", "rax", "rbx", 0, 1, 64);
  ADDRESS("0x1234(%%r13,%%r12,2)", "r13", "r12", 0x1234, 2, -64);
  ADDRESS("-64(%%r8,%%r15,8)", "r8", "r15", -64, 8, 128);
  ADDRESS("(%%r13,%%rdx,4)", "r13", "rdx", 0, 4, -128);
  ADDRESS("127(%%r12,%%r8,1)", "r12", "r8", 127, 1, 3);
  ADDRESS("-0x4000(%%rcx,%%rsi,2)", "rcx", "rsi", -0x4000, 2, 64);
  ADDRESS("(%%r9,%%rdi,1)", "r9", "rdi", 0, 1, -1);
  ADDRESS("8(%%r10,%%r11,1)", "r10", "r11", 8, 1, 5);
  ADDRESS("(%%r14,%%r13,1)", "r14", "r13", 0, 1, 64);
  // The address of the table alone, and no index: all rows are the same one.
  asm volatile("tileloadd (%0), %%tmm0" : : "r"(data) : "memory");
  expect("(base)", 0, 0);
  asm volatile("tileloadd 0x20010000(,%0,1), %%tmm0" : : "r"(int64_t{64}) : "memory");
  expect("number(,index)", 0, 64);
  // The frame and the stack as base; a signal's frame then lies below, in the same memory.
  asm volatile("push %%rbp\n mov %0, %%rbp\n tileloadd (%%rbp,%1,1), %%tmm0\n pop %%rbp"
               : : "a"(data), "c"(int64_t{64}) : "memory");
  expect("(rbp,index)", 0, 64);
  asm volatile("mov %%rsp, %%rbx\n mov %0, %%rsp\n tileloadd -64(%%rsp,%1,1), %%tmm0\n mov %%rbx, %%rsp"
               : : "a"(data + 128), "c"(int64_t{64}) : "rbx", "memory");
  expect("(rsp,index)", 64, 64);
  // The other load, and a store with another distance.
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm0" : : "r"(data), "r"(int64_t{64}) : "memory");
  asm volatile("tilestored %%tmm0, 5(%0,%1,4)" : : "r"(to.bytes), "r"(int64_t{16}) : "memory");
  check(std::memcmp(to.bytes[2] + 5, data + 128, 59) == 0, "tileloaddt1, or a store with a number");
  // Configurations beside the program, and from a table.
  static const Shapes beside = shapes({{7, 8}});
  Shapes table[3] = {}, now;
  table[2] = shapes({{9, 8}});
  asm volatile("ldtilecfg %0\n sttilecfg %1" : : "m"(beside), "m"(now) : "memory");
  check(now.rows[0] == 7, "ldtilecfg relative to the program");
  asm volatile("ldtilecfg 64(%0,%1,8)\n sttilecfg (%2)" : : "r"(table), "r"(int64_t{8}), "r"(&now) : "memory");
  check(now.rows[0] == 9, "ldtilecfg with an index");
  munmap(made, 2 * kMiddle);
}

// --- products --------------------------------------------------------------------------------------------------------

// 128 or -128 times 255 or -1, and a sum over the four bytes of a dword and over two dwords.
void check_bytes() {
  Tile a, b, c, to;
  configure(shapes({{2, 12}, {2, 8}, {2, 12}}));  // C 2 x 3, A 2 x 2 dwords, B 2 dwords x 3
  put<uint8_t>(a, 0, 0, 0x80);
  put<uint8_t>(b, 0, 0, 0xFF);
  for (int i = 0; i < 8; ++i) put<uint8_t>(a, 1, i, static_cast<uint8_t>(i + 1));  // 1 to 8
  for (int k = 0; k < 2; ++k) {
    for (int i = 0; i < 4; ++i) put<uint8_t>(b, k, 4 + i, static_cast<uint8_t>(10 * k + i));  // column 1: 0 1 2 3, 10 11 12 13
  }
  put<uint8_t>(b, 1, 11, 100);  // column 2, the last byte
  put<int32_t>(c, 0, 0, 1000);
  put<int32_t>(c, 1, 2, std::numeric_limits<int32_t>::max());
  const int32_t dot = 0 + 2 + 6 + 12 + 50 + 66 + 84 + 104;
  const auto expect = [&](const char* name, int32_t first, int32_t below) {
    STORE(0, &to);
    check(number<int32_t>(to, 0, 0) == 1000 + first, std::string(name) + ": signs");
    check(number<int32_t>(to, 0, 1) == 0 && number<int32_t>(to, 0, 2) == 0, std::string(name) + ": zeros");
    check(number<int32_t>(to, 1, 0) == below, std::string(name) + ": the second row");
    check(number<int32_t>(to, 1, 1) == dot, std::string(name) + ": a sum of eight");
    check(number<uint32_t>(to, 1, 2) == 0x7FFFFFFFu + 800, std::string(name) + ": sums wrap around");
  };
#define PRODUCT(name, first, below)           \
  LOAD(0, &c);                                \
  LOAD(1, &a);                                \
  LOAD(2, &b);                                \
  RUN(name " %%tmm2, %%tmm1, %%tmm0");        \
  expect(name, first, below)
  PRODUCT("tdpbuud", 128 * 255, 255);
  PRODUCT("tdpbusd", 128 * -1, -1);
  PRODUCT("tdpbsud", -128 * 255, 255);
  PRODUCT("tdpbssd", -128 * -1, -1);
}

uint16_t bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

// One row and one column of pairs: a[0] b[0] + a[1] b[1] + ..., on top of c.
float sum_of_pairs(float c, std::initializer_list<std::pair<float, float>> products) {
  Tile a, b, sum, to;
  const int depth = (static_cast<int>(products.size()) + 1) / 2;
  configure(shapes({{1, 4}, {1, 4 * depth}, {depth, 4}}));
  int i = 0;
  for (const auto& [x, y] : products) put(a, 0, i, bf16(x)), put(b, i / 2, i % 2, bf16(y)), ++i;
  put(sum, 0, 0, c);
  LOAD(0, &sum);
  LOAD(1, &a);
  LOAD(2, &b);
  RUN("tdpbf16ps %%tmm2, %%tmm1, %%tmm0");
  STORE(0, &to);
  return number<float>(to, 0, 0);
}

void check_pairs() {
  constexpr float kBig = 16777216.0f, kTiny = 0x1p-127f, kSmall = 0x1p-126f;  // 2^24; subnormal; the smallest normal one
  check(sum_of_pairs(0.5f, {{1, 2}, {3, 4}, {5, 6}, {7, 8}}) == 100.5f, "pairs: a plain sum");
  // Even numbers: 2^24 + 1 is 2^24, ties to even; odd ones: -2^24 + 1 holds. In the order of their columns: 2.
  check(sum_of_pairs(0, {{kBig, 1}, {-kBig, 1}, {1, 1}, {1, 1}}) == 1.0f, "pairs: even and odd chains");
  // The chains first, then what was there: 2^24 + (1 + 1), not (2^24 + 1) + 1.
  check(sum_of_pairs(kBig, {{1, 1}, {1, 1}}) == kBig + 2, "pairs: the sum of both chains comes first");
  // A chain begins at zero, not at what was there.
  check(sum_of_pairs(-kBig, {{kBig, 1}, {0, 1}, {1, 1}, {0, 1}}) == 0.0f, "pairs: chains begin at zero");
  check(sum_of_pairs(0, {{kTiny, 1}}) == 0.0f, "pairs: a subnormal number is zero");
  check(sum_of_pairs(0, {{kSmall, 0.5f}}) == 0.0f, "pairs: a subnormal product is zero");
  check(sum_of_pairs(0, {{kSmall, 1.0f}}) == kSmall, "pairs: the smallest normal number");
  check(sum_of_pairs(0, {{kSmall, 1.5f}, {-kSmall, 1}}) == 0.0f, "pairs: a subnormal sum is zero");
  check(sum_of_pairs(kTiny, {{0, 1}}) == 0.0f, "pairs: what was there is subnormal");
  // Products are exact: (1 + 2^-7)^2 = 1 + 2^-6 + 2^-14.
  check(sum_of_pairs(0, {{-1.015625f, 1}, {0, 0}, {1.0078125f, 1.0078125f}, {0, 0}}) == 0x1p-14f, "pairs: exact products");
  const float infinite = std::numeric_limits<float>::infinity();
  check(sum_of_pairs(0, {{infinite, 1}}) == infinite, "pairs: infinity");
  const float none = sum_of_pairs(0, {{infinite, 0}});
  check(none != none, "pairs: infinity times zero");
}

// A product with whole tiles, number by number; the control register has no say.
void check_whole_tiles() {
  Tile a = counted(), b = counted(), c = counted(), to;
  for (int i = 0; i < 1024; ++i) b.bytes[i / 64][i % 64] = static_cast<uint8_t>(i * i + 5 * i);
  configure(shapes({{16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}, {16, 64}}));
  LOAD(7, &c);
  LOAD(3, &a);
  LOAD(5, &b);
  RUN("tdpbsud %%tmm5, %%tmm3, %%tmm7");
  STORE(7, &to);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      int64_t sum = number<int32_t>(c, m, n);
      for (int k = 0; k < 64; ++k) sum += static_cast<int8_t>(a.bytes[m][k]) * b.bytes[k / 4][4 * n + k % 4];
      check(number<int32_t>(to, m, n) == static_cast<int32_t>(sum), "a product of whole tiles");
    }
  }
}

// --- faults ----------------------------------------------------------------------------------------------------------

// What must end the process; what is said goes nowhere.
template <typename Run>
void check_fault(const char* what, const Run& run) {
  const pid_t child = fork();
  check(child >= 0, "fork failed");
  if (child == 0) {
    if (std::freopen("/dev/null", "w", stderr) == nullptr) std::_Exit(2);
    run();
    std::_Exit(0);
  }
  int status = 0;
  check(waitpid(child, &status, 0) == child && WIFSIGNALED(status), std::string("no fault: ") + what);
}

void check_faults() {
  Tile tile;
  const auto refused = [&](const char* what, const Shapes& wanted) { check_fault(what, [&] { configure(wanted); }); };
  const auto product = [&](const char* what, const Shapes& wanted) {
    check_fault(what, [&] { configure(wanted); RUN("tdpbssd %%tmm2, %%tmm1, %%tmm0"); });
  };
  RUN("tilerelease");
  check_fault("no configuration", [&] { LOAD(0, &tile); });
  refused("17 rows", shapes({{17, 64}}));
  refused("65 bytes", shapes({{16, 65}}));
  refused("no bytes", shapes({{16, 0}}));
  Shapes odd = shapes({{16, 64}});
  odd.palette = 2;
  refused("palette 2", odd);
  odd.palette = 1, odd.reserved[5] = 1;
  refused("a reserved byte", odd);
  odd.reserved[5] = 0, odd.rows[9] = 1, odd.row_bytes[9] = 4;
  refused("a tenth tile", odd);
  check_fault("a tile without a shape", [&] { configure(shapes({{16, 64}})); LOAD(1, &tile); });
  Shapes late = shapes({{4, 64}});
  late.start_row = 4;
  check_fault("a first row beyond", [&] { configure(late); LOAD(0, &tile); });
  product("rows of C and A", shapes({{3, 8}, {2, 8}, {2, 8}}));
  product("columns of A, rows of B", shapes({{2, 8}, {2, 8}, {3, 8}}));
  product("columns of C and B", shapes({{2, 8}, {2, 8}, {2, 12}}));
  product("no whole dwords", shapes({{2, 6}, {2, 8}, {2, 6}}));
  check_fault("one tile twice", [&] {
    configure(shapes({{16, 64}, {16, 64}}));
    RUN(".byte 0xC4, 0xE2, 0x7B, 0x5E, 0xC1");  // tdpbssd tmm0, tmm1, tmm0
  });
  check_fault("another instruction", [&] { RUN("ud2"); });
}

}  // namespace

int main() {
  if (!mixtral::has_amx()) {
    std::puts("this processor has no AMX, and nothing is emulated");
    return 1;
  }
  check_shapes();
  check_addresses();
  check_bytes();
  check_pairs();
  check_whole_tiles();
  check_faults();
  std::printf("tiles: %d checks\n", checks);
  return 0;
}
