// Asks the processor for AMX, and the system for the permission to use it: without it a tile instruction is a fault.
#include "mixtral/processor.h"

#if defined(MIXTRAL_X86) && defined(__linux__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#ifdef MIXTRAL_EMULATE_AMX
#include "mixtral/emulator.h"
#endif

namespace mixtral {
namespace {

struct Leaf {
  uint32_t a, b, c, d;
};

// What CPUID says; zeros where there is no such leaf.
Leaf leaf(uint32_t number, uint32_t part) {
  Leaf found{};
  __get_cpuid_count(number, part, &found.a, &found.b, &found.c, &found.d);
  return found;
}

constexpr uint32_t bit(int number) { return uint32_t{1} << number; }

// Palette 1 has eight tiles of 16 rows of 64 bytes, and both kinds of products are there.
bool processor_has_tiles() {
  constexpr uint32_t kFeatures = bit(22) | bit(24) | bit(25);  // amx-bf16, amx-tile, amx-int8
  if ((leaf(7, 0).d & kFeatures) != kFeatures) return false;
  const Leaf palette = leaf(0x1D, 1);
  return palette.a == (8 * 1024 | 1024u << 16) && palette.b == (64 | 8u << 16) && (palette.c & 0xFFFF) == 16;
}

// The system saves the configuration and the data of tiles when it turns to another thread.
bool system_saves_tiles() {
  if ((leaf(1, 0).c & bit(27)) == 0) return false;  // XGETBV is not there
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr uint32_t kTiles = bit(17) | bit(18);
  return (low & kTiles) == kTiles;
}

// For all threads of the process, also those to come, and for its forked children. Refused by systems before Linux 5.16,
// and while a thread has a signal stack too small for the registers.
bool system_permits_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool ask() { return processor_has_tiles() && system_saves_tiles() && system_permits_tiles(); }

}  // namespace

bool has_amx() {
  static const bool found = ask();
#ifdef MIXTRAL_EMULATE_AMX
  if (!found) amx::emulate();
  return true;
#else
  return found;
#endif
}

}  // namespace mixtral

#else

namespace mixtral {

bool has_amx() { return false; }

}  // namespace mixtral

#endif
