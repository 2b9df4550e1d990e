// The kernels of gemm.h, compiled once for each instruction set with MIXTRAL_LEVEL (the namespace) and MIXTRAL_LANES.
//
// A vector holds MIXTRAL_LANES numbers of 32 bits, one for each row of a panel or of half a panel. All but the table is
// internal to this file: a copy made for wide registers must never serve a processor without them.
#include "mixtral/gemm.h"

#include "mixtral/half.h"

#ifdef MIXTRAL_X86
#include <immintrin.h>
#endif

namespace mixtral::MIXTRAL_LEVEL {
namespace {

// Loops over registers: unrolled whole, or the registers would live in memory.
#define UNROLL _Pragma("GCC unroll 8")

constexpr int kLanes = MIXTRAL_LANES, kParts = kPanel / kLanes, kBytes = 4 * kLanes;

typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef uint32_t Bits __attribute__((vector_size(kBytes)));
typedef float Floats __attribute__((vector_size(kBytes)));
typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
typedef uint16_t Words __attribute__((vector_size(kBytes)));

template <typename T>
inline T load(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline Ints all(int32_t value) { return value - Ints{}; }
inline Floats all(float value) { return value - Floats{}; }
inline Bytes bytes(uint8_t value) { return value - Bytes{}; }
inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

#if defined(MIXTRAL_X86) && MIXTRAL_LANES == 16

inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// The plain forms of these three make GCC 12 warn of an uninitialised value.
inline Ints widen(const uint8_t* from) {
  return (Ints)_mm512_maskz_cvtepu8_epi32(0xFFFF, _mm_loadu_si128((const __m128i*)from));
}
inline Ints widen_signed(const uint8_t* from) {
  return (Ints)_mm512_maskz_cvtepi8_epi32(0xFFFF, _mm_loadu_si128((const __m128i*)from));
}
inline Floats halves(const uint8_t* from) {
  return _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256((const __m256i*)from));
}

// The sum over 4N columns of quants (v) times activations (a), for every lane, on top of `sum`.
template <int N, int Width>
inline Ints dot(Ints sum, const Bytes* v, const int8_t* a) {
  __m512i total = (__m512i)sum;
  UNROLL for (int j = 0; j < N; ++j) {
    total = _mm512_dpbusd_epi32(total, (__m512i)v[j], _mm512_set1_epi32(load<int32_t>(a + 4 * j)));
  }
  return (Ints)total;
}

// Pairs of bytes (u8 [lanes, 2]) as pairs of words.
inline Words pairs(const uint8_t* from) { return (Words)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from)); }
// sum + pairs of words times one pair.
inline Ints add_pairs(Ints sum, Words pairs, int32_t by) {
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)pairs, _mm512_set1_epi32(by));
}

#elif defined(MIXTRAL_X86) && defined(__AVX2__)

inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats halves(const uint8_t* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
inline Ints widen(const uint8_t* from) { return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
inline Ints widen_signed(const uint8_t* from) { return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)); }

template <int N, int Width>
inline Ints dot(Ints sum, const Bytes* v, const int8_t* a) {
  const __m256i ones = _mm256_set1_epi16(1);
  // vpmaddubsw adds two products in 16 bits, and so many of its results can be added before they overflow.
  constexpr int kRun = Width == 4 ? 8 : Width == 5 ? 4 : 2;
  __m256i total = (__m256i)sum;
  UNROLL for (int j = 0; j < N; j += kRun) {
    __m256i words = _mm256_setzero_si256();
    for (int i = j; i < j + kRun && i < N; ++i) {
      const __m256i x = _mm256_set1_epi32(load<int32_t>(a + 4 * i));
      if constexpr (Width == 8) {
        // 255 * 127 * 2 does not fit: the highest bit goes by itself.
        const __m256i high = _mm256_and_si256((__m256i)v[i], _mm256_set1_epi8(-128));
        const __m256i low = _mm256_andnot_si256(_mm256_set1_epi8(-128), (__m256i)v[i]);
        total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), ones));
        total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones));
      } else {
        words = _mm256_add_epi16(words, _mm256_maddubs_epi16((__m256i)v[i], x));
      }
    }
    if constexpr (Width != 8) total = _mm256_add_epi32(total, _mm256_madd_epi16(words, ones));
  }
  return (Ints)total;
}

inline Words pairs(const uint8_t* from) { return (Words)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from)); }
inline Ints add_pairs(Ints sum, Words pairs, int32_t by) {
  return (Ints)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi32(by)));
}

#else

inline Ints widen(const uint8_t* from) {
  Ints wide{};
  for (int n = 0; n < kLanes; ++n) wide[n] = from[n];
  return wide;
}

inline Ints widen_signed(const uint8_t* from) {
  Ints wide{};
  for (int n = 0; n < kLanes; ++n) wide[n] = static_cast<int8_t>(from[n]);
  return wide;
}

inline Floats fma(Floats a, Floats b, Floats c) {
  for (int n = 0; n < kLanes; ++n) c[n] = __builtin_fmaf(a[n], b[n], c[n]);
  return c;
}

inline Floats halves(const uint8_t* from) {
  Floats wide{};
  for (int n = 0; n < kLanes; ++n) wide[n] = widen_half(load<uint16_t>(from + 2 * n));
  return wide;
}

template <int N, int Width>
inline Ints dot(Ints sum, const Bytes* v, const int8_t* a) {
  for (int j = 0; j < N; ++j) {
    for (int n = 0; n < kLanes; ++n) {
      for (int i = 0; i < 4; ++i) sum[n] += v[j][4 * n + i] * a[4 * j + i];
    }
  }
  return sum;
}

inline Words pairs(const uint8_t* from) {
  Words wide{};
  for (int n = 0; n < 2 * kLanes; ++n) wide[n] = from[n];
  return wide;
}

inline Ints add_pairs(Ints sum, Words pairs, int32_t by) {
  const int32_t first = static_cast<int16_t>(by & 0xFFFF), second = by >> 16;
  for (int n = 0; n < kLanes; ++n) sum[n] += pairs[2 * n] * first + pairs[2 * n + 1] * second;
  return sum;
}

#endif

// --- quants of a group of 32 columns ---------------------------------------------------------------------------------

// Bits of a quant, and whether 16 columns share a scale.
template <Kind K>
constexpr int kBits = K == Kind::q5_k ? 5 : K == Kind::q6_k ? 6 : K == Kind::g8 ? 8 : 4;
template <Kind K>
constexpr bool kSixteen = K == Kind::q2_k || K == Kind::q3_k || K == Kind::q6_k;
template <Kind K>
constexpr bool kMinimums = K == Kind::q2_k || K == Kind::q4_k || K == Kind::q5_k;

inline Bytes shifted(Bytes v, int right) {
  return right >= 0 ? (Bytes)((Words)v >> static_cast<uint16_t>(right)) : (Bytes)((Words)v << static_cast<uint16_t>(-right));
}

// The eight vectors of a group; `from` points to this part of the panel's lanes in the first one.
template <Kind K>
inline void unpack(const uint8_t* from, Bytes* v) {
  if constexpr (K == Kind::g8) {
    for (int j = 0; j < 8; ++j) v[j] = load<Bytes>(from + 64 * j);
    return;
  }
  if constexpr (K == Kind::q2_k) {
    for (int j = 0; j < 8; ++j) v[j] = shifted(load<Bytes>(from + j / 4 * 64), 2 * (j % 4)) & bytes(3);
    return;
  }
  if constexpr (K == Kind::q3_k) {
    const Bytes last = load<Bytes>(from + 128);
    for (int j = 0; j < 6; ++j) v[j] = shifted(load<Bytes>(from + j / 2 * 64), 3 * (j % 2)) & bytes(7);
    for (int j = 0; j < 2; ++j) {
      v[6 + j] = (shifted(load<Bytes>(from + j * 64), 6) & bytes(3)) | (shifted(last, 4 + j) & bytes(4));
    }
    return;
  }
  for (int j = 0; j < 4; ++j) {
    const Bytes both = load<Bytes>(from + 64 * j);
    v[2 * j] = both & bytes(15);
    v[2 * j + 1] = shifted(both, 4) & bytes(15);
  }
  if constexpr (K == Kind::q5_k) {
    const Bytes high = load<Bytes>(from + 256);
    for (int j = 0; j < 8; ++j) v[j] |= shifted(high, j - 4) & bytes(16);
  }
  if constexpr (K == Kind::q6_k) {
    for (int j = 0; j < 8; ++j) v[j] |= shifted(load<Bytes>(from + 256 + j / 4 * 64), 2 * (j % 4) - 4) & bytes(48);
  }
}

// --- one panel, M activation rows ------------------------------------------------------------------------------------

// This part of the panel's lanes, and where M activation rows begin.
template <int M>
struct Work {
  const uint8_t* quants;
  const uint8_t* scales;
  int half;
  const int8_t* q[M];
  const float* steps[M];
  const int32_t* low16[M];
  const int16_t* sum16[M];
  const int16_t* sum32[M];

  Work(const Panels& w, int64_t panel, int half_, const Rounded& a, const int32_t* rows)
      : quants(w.quants(panel) + half_ * kBytes), scales(w.scales(panel)), half(half_) {
    for (int m = 0; m < M; ++m) {
      const int64_t first = rows[m] * a.columns;
      q[m] = a.q + first;
      steps[m] = a.scales + rows[m] * a.blocks();
      low16[m] = a.low16 + first / 16;
      sum16[m] = a.sum16 + first / 16;
      sum32[m] = a.sum32 + first / kGroup;
    }
  }
};

// What the quants of 16 columns (number `i` of the row) start from: minus their zero times the activations.
template <Kind K, int M>
inline Ints start(const Work<M>& work, int m, int64_t i) {
  if constexpr (K == Kind::q6_k) return all(work.low16[m][i]);
  if constexpr (K == Kind::q3_k) return all(work.low16[m][i]) >> 3;
  return Ints{};
}

// Scales of the two halves of group `g` of a block; in Q2_K also their minimums, as pairs.
template <Kind K>
inline void half_scales(const uint8_t* run, int half, int g, Ints& first, Ints& second, Words& minimums) {
  if constexpr (K == Kind::q6_k) {
    first = widen_signed(run + 2 * g * kPanel + half * kLanes);
    second = widen_signed(run + (2 * g + 1) * kPanel + half * kLanes);
    return;
  }
  const Words both = pairs(run + g * 2 * kPanel + half * 2 * kLanes);
  if constexpr (K == Kind::q2_k) {
    minimums = both >> 4;
    first = (Ints)both & 15;
    second = ((Ints)both >> 16) & 15;
  } else {
    first = (Ints)both << 24 >> 24;
    second = (Ints)both << 8 >> 24;
  }
}

template <Kind K, int M>
inline void super_blocks(const Panels& w, const Work<M>& work, Floats (&total)[M]) {
  const int64_t blocks = w.columns / kBlock;
  for (int64_t b = 0; b < blocks; ++b) {
    const uint8_t* run = work.scales + b * scale_bytes_of(K);
    Ints sums[M] = {}, lows[M] = {};
    for (int64_t g = b * 8; g < b * 8 + 8; ++g) {
      Bytes v[8];
      unpack<K>(work.quants + g * quant_bytes_of(K), v);
      if constexpr (kSixteen<K>) {
        Ints first, second;
        Words minimums;
        half_scales<K>(run, work.half, static_cast<int>(g - b * 8), first, second, minimums);
        UNROLL for (int m = 0; m < M; ++m) {
          const int8_t* x = work.q[m] + g * kGroup;
          sums[m] += dot<4, kBits<K>>(start<K>(work, m, 2 * g), v, x) * first;
          sums[m] += dot<4, kBits<K>>(start<K>(work, m, 2 * g + 1), v + 4, x + 16) * second;
          if constexpr (K == Kind::q2_k) lows[m] = add_pairs(lows[m], minimums, load<int32_t>(work.sum16[m] + 2 * g));
        }
      } else {
        const Ints scale = widen(run + (g - b * 8) * kPanel + work.half * kLanes);
        UNROLL for (int m = 0; m < M; ++m) {
          sums[m] += dot<8, kBits<K>>(Ints{}, v, work.q[m] + g * kGroup) * scale;
        }
      }
    }
    const Floats d = halves(run + 256 + work.half * 2 * kLanes);
    if constexpr (!kMinimums<K>) {
      UNROLL for (int m = 0; m < M; ++m) total[m] = fma(to_floats(sums[m]), d * all(work.steps[m][b]), total[m]);
    } else {
      const Floats dmin = halves(run + 288 + work.half * 2 * kLanes);
      UNROLL for (int m = 0; m < M; ++m) {
        if constexpr (!kSixteen<K>) {
          UNROLL for (int j = 0; j < 4; ++j) {
            const int32_t pair = load<int32_t>(work.sum32[m] + b * 8 + 2 * j);
            lows[m] = add_pairs(lows[m], pairs(run + 128 + j * 2 * kPanel + work.half * 2 * kLanes), pair);
          }
        }
        const Floats step = all(work.steps[m][b]);
        total[m] = fma(to_floats(sums[m]), d * step, total[m]);
        total[m] = fma(to_floats(lows[m]), -(dmin * step), total[m]);
      }
    }
  }
}

template <Kind K, int M>
inline void groups(const Panels& w, const Work<M>& work, Floats (&total)[M]) {
  const int64_t parts = w.group / kGroup;
  for (int64_t g = 0; g < w.columns / w.group; ++g) {
    const uint8_t* run = work.scales + g * 48;
    const Ints zero = widen(run + 32 + work.half * kLanes);
    Ints sums[M] = {};
    for (int64_t i = g * parts; i < g * parts + parts; ++i) {
      Bytes v[8];
      unpack<K>(work.quants + i * quant_bytes_of(K), v);
      UNROLL for (int m = 0; m < M; ++m) {
        sums[m] += dot<8, kBits<K>>(Ints{}, v, work.q[m] + i * kGroup) - zero * static_cast<int32_t>(work.sum32[m][i]);
      }
    }
    const Floats d = halves(run + work.half * 2 * kLanes);
    UNROLL for (int m = 0; m < M; ++m) {
      total[m] = fma(to_floats(sums[m]), d * all(work.steps[m][g * w.group / kBlock]), total[m]);
    }
  }
}

template <Kind K, int M>
void some_rows(const Panels& w, int64_t panel, const Rounded& a, const int32_t* rows, float* out, int64_t stride) {
  for (int half = 0; half < kParts; ++half) {
    const Work<M> work(w, panel, half, a, rows);
    Floats total[M] = {};
    if constexpr (K < Kind::g4) {
      super_blocks<K, M>(w, work, total);
    } else {
      groups<K, M>(w, work, total);
    }
    for (int m = 0; m < M; ++m) __builtin_memcpy(out + m * stride + half * kLanes, &total[m], sizeof total[m]);
  }
}

template <Kind K>
void all_rows(const Panels& w, int64_t panel, const Rounded& a, const int32_t* rows, int64_t count, float* out,
              int64_t stride) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) some_rows<K, 8>(w, panel, a, rows + i, out + i * stride, stride);
  if (count - i >= 4) some_rows<K, 4>(w, panel, a, rows + i, out + i * stride, stride), i += 4;
  if (count - i >= 2) some_rows<K, 2>(w, panel, a, rows + i, out + i * stride, stride), i += 2;
  if (count - i >= 1) some_rows<K, 1>(w, panel, a, rows + i, out + i * stride, stride);
}

void panel(const Panels& w, int64_t number, const Rounded& a, const int32_t* rows, int64_t count, float* out,
           int64_t stride) {
  switch (w.kind) {
    case Kind::q2_k:
      return all_rows<Kind::q2_k>(w, number, a, rows, count, out, stride);
    case Kind::q3_k:
      return all_rows<Kind::q3_k>(w, number, a, rows, count, out, stride);
    case Kind::q4_k:
      return all_rows<Kind::q4_k>(w, number, a, rows, count, out, stride);
    case Kind::q5_k:
      return all_rows<Kind::q5_k>(w, number, a, rows, count, out, stride);
    case Kind::q6_k:
      return all_rows<Kind::q6_k>(w, number, a, rows, count, out, stride);
    case Kind::g4:
      return all_rows<Kind::g4>(w, number, a, rows, count, out, stride);
    case Kind::g8:
      return all_rows<Kind::g8>(w, number, a, rows, count, out, stride);
  }
}

// --- rounding of activations -----------------------------------------------------------------------------------------

constexpr float kSmallest = 1e-30f;  // below it the reciprocal is not finite; the block counts as zeros

inline int32_t bits_of(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline int32_t sum_of_16(const int8_t* q) {
#ifdef MIXTRAL_X86
  const __m128i above = _mm_xor_si128(_mm_loadu_si128((const __m128i*)q), _mm_set1_epi8(-128));  // q + 128
  const __m128i sums = _mm_sad_epu8(above, _mm_setzero_si128());
  return _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_srli_si128(sums, 8))) - 16 * 128;
#else
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += q[i];
  return sum;
#endif
}

// Simple loops, which the compiler turns into vector code.
void round(const float* values, int count, const Rounded& to, int64_t row, int64_t block) {
  const int64_t at = row * to.columns + block * kBlock;
  // As integers, sizes are in the same order, and infinity and NaN above all others.
  int32_t size = 0;
  for (int i = 0; i < count; ++i) {
    const int32_t bits = bits_of(values[i]) & 0x7FFFFFFF;
    size = bits > size ? bits : size;
  }
  float largest;
  __builtin_memcpy(&largest, &size, sizeof largest);
  const bool finite = size < 0x7F800000, something = finite && largest >= kSmallest;
  to.scales[row * to.blocks() + block] = finite ? (something ? largest / 127.0f : 0.0f) : __builtin_nanf("");
  int8_t* q = to.q + at;
  if (something) {
    const float inverse = 127.0f / largest;
    // The nearest integer, ties to even: a sum of this size has no bits left for a fraction, and its last byte is it.
    for (int i = 0; i < count; ++i) q[i] = static_cast<int8_t>(bits_of(values[i] * inverse + 12582912.0f));
  } else {
    for (int i = 0; i < count; ++i) q[i] = 0;
  }
  for (int g = 0; g < count / 16; ++g) {
    const int32_t sum = sum_of_16(q + 16 * g);
    to.low16[at / 16 + g] = -32 * sum;
    to.sum16[at / 16 + g] = static_cast<int16_t>(sum);
  }
  for (int g = 0; g < count / kGroup; ++g) {
    to.sum32[at / kGroup + g] = static_cast<int16_t>(to.sum16[at / 16 + 2 * g] + to.sum16[at / 16 + 2 * g + 1]);
  }
}

// --- silu(gate) * up -------------------------------------------------------------------------------------------------

// 1 / 5! down to 1 / 0!.
constexpr float kPowers[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};

// exp(x) for |x| <= 87, relative error below 2^-22: 2^n times a polynomial in the rest; products and sums only.
inline Floats exponential(Floats x) {
  const Floats sum = x * 1.44269504f + 12582912.0f, n = sum - 12582912.0f;
  const Floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Floats p = all(1.0f / 720);
  for (const float c : kPowers) p = p * r + c;
  // The lowest bits of the sum are n. What is not a number has made p one that is none, whatever it is multiplied by.
  return p * (Floats)(((Bits)sum + 127) << 23);
}

void swiglu(const float* gate, const float* up, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats g = load<Floats>(gate + i);
    Floats x = -g;
    x = x > 87.0f ? all(87.0f) : x;
    x = x < -87.0f ? all(-87.0f) : x;
    // Not a number stays one: neither comparison holds for it.
    const Floats y = g / (1.0f + exponential(x)) * load<Floats>(up + i);
    __builtin_memcpy(out + i, &y, sizeof y);
  }
}

}  // namespace

extern const GemmTable gemm;
const GemmTable gemm = {round, panel, swiglu};

}  // namespace mixtral::MIXTRAL_LEVEL
