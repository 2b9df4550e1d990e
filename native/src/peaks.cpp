// The micro-kernels of limits.h, compiled once for each instruction set with MIXTRAL_LEVEL (the namespace) and
// MIXTRAL_LANES. All but the table is internal to this file.
#include "mixtral/limits.h"

#ifdef MIXTRAL_X86
#include <immintrin.h>
#endif

#ifdef MIXTRAL_AMX
#include "tiles.h"
#endif

namespace mixtral::MIXTRAL_LEVEL {
namespace {

#define UNROLL _Pragma("GCC unroll 16")

// Accumulators that do not depend on each other: enough for two products a cycle that take four cycles each.
constexpr int kLanes = MIXTRAL_LANES, kChains = 10;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint64_t Longs __attribute__((vector_size(4 * kLanes)));

// The compiler does not know what is in the register afterwards: it can neither compute ahead nor share results.
template <typename T>
inline void hide(T& value) {
#ifdef MIXTRAL_X86
  asm volatile("" : "+x"(value));
#else
  asm volatile("" : "+m"(value));
#endif
}

template <typename T>
inline void hide_all(T (&values)[kChains]) {
  UNROLL for (T& value : values) hide(value);
}

uint64_t read(const uint8_t* data, int64_t bytes) {
  constexpr int64_t kLine = 64, kLines = 4, kAhead = 2048;
  constexpr int64_t kParts = kLine / static_cast<int64_t>(sizeof(Longs));
  Longs sums[kLines] = {};
  for (int64_t at = 0; at < bytes; at += kLines * kLine) {
    UNROLL for (int64_t line = 0; line < kLines; ++line) {
      const uint8_t* from = data + at + line * kLine;
      // Past the end a prefetch does nothing.
      __builtin_prefetch(from + kAhead);
      UNROLL for (int64_t part = 0; part < kParts; ++part) {
        Longs value;
        __builtin_memcpy(&value, from + part * static_cast<int64_t>(sizeof value), sizeof value);
        sums[line] ^= value;
      }
    }
  }
  const Longs all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  uint64_t sum = 0;
  for (int n = 0; n < kLanes / 2; ++n) sum ^= all[n];
  return sum;
}

// Products of a vector's lanes, `each` of them in a lane, added up in every chain.
template <typename T, typename Step>
inline int64_t chains(int64_t rounds, int each, const Step& step) {
  T sums[kChains] = {};
  hide_all(sums);
  for (int64_t round = 0; round < rounds; ++round) {
    UNROLL for (T& sum : sums) step(sum);
  }
  hide_all(sums);
  return rounds * kChains * kLanes * each * 2;
}

int64_t fp32(int64_t rounds) {
  // sum = sum * a + b stays near 2.
  Floats a = Floats{} + 0.5f, b = Floats{} + 1.0f;
  hide(a);
  hide(b);
  return chains<Floats>(rounds, 1, [&](Floats& sum) {
#if defined(MIXTRAL_X86) && MIXTRAL_LANES == 16
    sum = _mm512_fmadd_ps(sum, a, b);
#elif defined(MIXTRAL_X86) && MIXTRAL_LANES == 8
    sum = _mm256_fmadd_ps(sum, a, b);
#else
    sum = sum * a + b;
#endif
  });
}

#ifdef MIXTRAL_AMX

// Six sums in tiles, which do not depend on each other, and the two tiles that are multiplied; `each` is columns of a row.
#define PRODUCTS(add, each)                                                                        \
  begin_tiles();                                                                                   \
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();                                  \
  zero_tile<4>(), zero_tile<5>(), zero_tile<6>(), zero_tile<7>();                                  \
  for (int64_t round = 0; round < rounds; ++round) {                                               \
    add<0, 6, 7>(), add<1, 6, 7>(), add<2, 6, 7>(), add<3, 6, 7>(), add<4, 6, 7>(), add<5, 6, 7>(); \
  }                                                                                                \
  end_tiles();                                                                                     \
  return rounds * 6 * kTileRows * kTileRows * each * 2

int64_t int8(int64_t rounds) { PRODUCTS(add_product_unsigned, 64); }

#elif defined(MIXTRAL_X86) && MIXTRAL_LANES == 16

int64_t int8(int64_t rounds) {
  __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-2);
  hide(a);
  hide(b);
  return chains<__m512i>(rounds, 4, [&](__m512i& sum) { sum = _mm512_dpbusd_epi32(sum, a, b); });
}

#elif defined(MIXTRAL_X86) && MIXTRAL_LANES == 8

// As the kernels do with quants of 4 bits: eight runs of products are added in 16 bits, then widened.
int64_t int8(int64_t rounds) {
  constexpr int kRun = 8;
  __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-2);
  const __m256i ones = _mm256_set1_epi16(1);
  hide(b);
  return chains<__m256i>(rounds, 4 * kRun, [&](__m256i& sum) {
    __m256i words = _mm256_setzero_si256();
    UNROLL for (int i = 0; i < kRun; ++i) {
      hide(a);
      words = _mm256_add_epi16(words, _mm256_maddubs_epi16(a, b));
    }
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(words, ones));
  });
}

#elif defined(MIXTRAL_X86)

// Two products of 16 bits in a lane are the widest that every x86-64 has.
int64_t int8(int64_t rounds) {
  __m128i a = _mm_set1_epi16(3), b = _mm_set1_epi16(-2);
  hide(b);
  return chains<__m128i>(rounds, 2, [&](__m128i& sum) {
    hide(a);
    sum = _mm_add_epi32(sum, _mm_madd_epi16(a, b));
  });
}

#else

int64_t int8(int64_t rounds) {
  Ints a = Ints{} + 3, b = Ints{} + 1;
  hide(a);
  hide(b);
  return chains<Ints>(rounds, 1, [&](Ints& sum) { sum = sum * a + b; });
}

#endif

#ifdef MIXTRAL_AMX

int64_t bf16(int64_t rounds) { PRODUCTS(add_product_pairs, 32); }

#elif defined(__AVX512BF16__)

int64_t bf16(int64_t rounds) {
  __m512i a = _mm512_set1_epi16(0x3F80), b = _mm512_setzero_si512();  // 1 and 0: the sums stay finite
  hide(a);
  hide(b);
  return chains<__m512>(rounds, 2, [&](__m512& sum) { sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); });
}

#else

constexpr int64_t (*bf16)(int64_t) = nullptr;

#endif

}  // namespace

extern const LimitTable limits;
const LimitTable limits = {read, int8, fp32, bf16};

}  // namespace mixtral::MIXTRAL_LEVEL
