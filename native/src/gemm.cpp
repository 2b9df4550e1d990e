// The kernels of gemm.h, compiled once for each instruction set with MIXTRAL_LEVEL (the namespace) and MIXTRAL_LANES.
//
// A vector holds MIXTRAL_LANES numbers of 32 bits, one for each row of a panel or of a part of it. All but the table is
// internal to this file: a copy made for wide registers must never serve a processor without them.
#include "mixtral/gemm.h"

#include "quants.h"

namespace mixtral::MIXTRAL_LEVEL {
namespace {

// --- one part of one or two panels, a block of M activation rows -----------------------------------------------------

// How many bytes before their use quants are asked for that are in no cache: the processor itself reaches less far. With
// many rows more time passes between two requests, and memory takes long in answering when all of it is asked for.
template <int M>
constexpr int kAhead = M == 8 ? 8192 : 4096;

// A part of N neighbouring panels, which lie `apart` bytes from each other: where its lanes begin in the quants and in
// scales of one and two bytes. `first`: no other rows have read the panels before.
struct Part {
  int number;
  bool first;
  int64_t apart;

  // Always inlined, since GCC takes a call that returns and writes nothing for one that does nothing.
  template <Kind K, int N, int M>
  [[gnu::always_inline]] inline void prefetch(const uint8_t* group) const {
    // Where there is little to compute, the processor itself keeps the memory busy, and more requests only delay it.
    if constexpr (K == Kind::g8 && M <= 2) return;
    if (N * M == 8 && !first) return;  // with few rows a branch costs more than requests for what is there
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < quant_bytes_of(K); i += 64) __builtin_prefetch(group + n * apart + kAhead<N * M> + i);
    }
  }

  const uint8_t* quants(const uint8_t* panel) const { return panel + number * kBytes; }
  const uint8_t* ones(const uint8_t* run, int n) const { return run + n * apart + number * kLanes; }
  const uint8_t* twos(const uint8_t* run, int n) const { return run + n * apart + number * 2 * kLanes; }
};

template <int M>
using Rows = const RoundedBlock* [M];

// Adds the sums over the columns of vectors First to Last - 1 of a group (made by `vector`, of a panel and a place) times
// activations, from column `at` of each row's block on.
template <int Width, int First, int Last, int N, int M, typename Vector>
inline void add_dots(Ints (&sums)[N][M], const Vector& vector, const Rows<M>& x, int at) {
  if constexpr (kLanes == 16 && M >= 4) {
    // Across the rows, as a sum waits several cycles for the one before it, and no 16-bit sums are to be kept.
    UNROLL for (int j = First; j < Last; ++j) {
      Bytes v[N];
      UNROLL for (int n = 0; n < N; ++n) v[n] = vector(n, j);
      UNROLL for (int m = 0; m < M; ++m) {
        const int8_t* q = x[m]->q + at + 4 * (j - First);
        UNROLL for (int n = 0; n < N; ++n) sums[n][m] = dot<1, Width>(sums[n][m], v + n, q);
      }
    }
  } else {
    UNROLL for (int n = 0; n < N; ++n) {
      Bytes v[Last - First];
      UNROLL for (int j = First; j < Last; ++j) v[j - First] = vector(n, j);
      UNROLL for (int m = 0; m < M; ++m) sums[n][m] = dot<Last - First, Width>(sums[n][m], v, x[m]->q + at);
    }
  }
}

// The two float steps of a block.
template <Kind K, int N, int M>
inline void add_block(Part part, const uint8_t* run, const Rows<M>& x, const Ints (&sums)[N][M],
                      const Ints (&lows)[N][M], Floats (&total)[N][M]) {
  UNROLL for (int n = 0; n < N; ++n) {
    const Floats d = halves(part.twos(run + 256, n));
    UNROLL for (int m = 0; m < M; ++m) {
      const Floats step = all(x[m]->scale);
      total[n][m] = fma(to_floats(sums[n][m]), d * step, total[n][m]);
      if constexpr (kMinimums<K>) {
        const Floats dmin = halves(part.twos(run + 288, n));
        total[n][m] = fma(to_floats(lows[n][m]), -(dmin * step), total[n][m]);
      }
    }
  }
}

// Q4_K and Q5_K: a scale for each 32 columns.
template <Kind K, int N, int M>
inline void block_of_32(Part part, const uint8_t* quants, const uint8_t* run, const Rows<M>& x, Floats (&total)[N][M]) {
  Ints sums[N][M] = {}, lows[N][M] = {};
  for (int g = 0; g < 8; ++g) {
    const uint8_t* group = quants + g * quant_bytes_of(K);
    part.prefetch<K, N, M>(group);
    const auto vector = [&](int n, int j) { return quant<K>(group + n * part.apart, j); };
    Ints dots[N][M] = {}, more[N][M] = {};
    if constexpr (N == 2) {
      // Twice as many sums: eight are too few to keep both multipliers busy while each waits for the one before it.
      add_dots<kBits<K>, 0, 4>(dots, vector, x, g * kGroup);
      add_dots<kBits<K>, 4, 8>(more, vector, x, g * kGroup + 16);
    } else {
      add_dots<kBits<K>, 0, 8>(dots, vector, x, g * kGroup);
    }
    UNROLL for (int n = 0; n < N; ++n) {
      const Ints scale = widen(part.ones(run + g * kPanel, n));
      UNROLL for (int m = 0; m < M; ++m) sums[n][m] += (dots[n][m] + more[n][m]) * scale;
    }
  }
  UNROLL for (int j = 0; j < 4; ++j) {
    Words minimums[N];
    UNROLL for (int n = 0; n < N; ++n) minimums[n] = pairs(part.twos(run + 128 + j * 2 * kPanel, n));
    UNROLL for (int m = 0; m < M; ++m) {
      const int32_t by = load<int32_t>(x[m]->sum32 + 2 * j);
      UNROLL for (int n = 0; n < N; ++n) lows[n][m] = add_pairs(lows[n][m], minimums[n], by);
    }
  }
  add_block<K>(part, run, x, sums, lows, total);
}

// What the quants of 16 columns start from: minus their zero times the activations.
template <Kind K>
inline Ints start(const RoundedBlock& x, int i) {
  if constexpr (K == Kind::q6_k) return all(x.low16[i]);
  if constexpr (K == Kind::q3_k) return all(x.low16[i]) >> 3;
  return Ints{};
}

// The scales of the two halves of group g in Q2_K, Q3_K and Q6_K; the minimums of Q2_K as pairs.
template <Kind K>
inline void half_scales(Part part, const uint8_t* run, int n, int g, Ints (&scales)[2], Words& minimums) {
  if constexpr (K == Kind::q6_k) {
    for (int half = 0; half < 2; ++half) scales[half] = widen_signed(part.ones(run + (2 * g + half) * kPanel, n));
  } else {
    const Words both = pairs(part.twos(run + g * 2 * kPanel, n));
    scales[0] = K == Kind::q2_k ? (Ints)both & 15 : (Ints)both << 24 >> 24;
    scales[1] = K == Kind::q2_k ? (Ints)both >> 16 & 15 : (Ints)both << 8 >> 24;
    if constexpr (K == Kind::q2_k) minimums = both >> 4;
  }
}

// Q2_K, Q3_K and Q6_K: a scale for each 16 columns.
template <Kind K, int N, int M>
inline void block_of_16(Part part, const uint8_t* quants, const uint8_t* run, const Rows<M>& x, Floats (&total)[N][M]) {
  Ints sums[N][M] = {}, lows[N][M] = {};
  for (int g = 0; g < 8; ++g) {
    const uint8_t* group = quants + g * quant_bytes_of(K);
    part.prefetch<K, N, M>(group);
    Ints scales[N][2];
    UNROLL for (int n = 0; n < N; ++n) {
      Words minimums{};
      half_scales<K>(part, run, n, g, scales[n], minimums);
      if constexpr (K == Kind::q2_k) {
        UNROLL for (int m = 0; m < M; ++m) lows[n][m] = add_pairs(lows[n][m], minimums, load<int32_t>(x[m]->sum16 + 2 * g));
      }
    }
    const auto vector = [&](int n, int j) { return quant<K>(group + n * part.apart, j); };
    Ints dots[2][N][M];
    UNROLL for (int m = 0; m < M; ++m) {
      UNROLL for (int n = 0; n < N; ++n) dots[0][n][m] = start<K>(*x[m], 2 * g), dots[1][n][m] = start<K>(*x[m], 2 * g + 1);
    }
    add_dots<kBits<K>, 0, 4>(dots[0], vector, x, g * kGroup);
    UNROLL for (int n = 0; n < N; ++n) {
      UNROLL for (int m = 0; m < M; ++m) sums[n][m] += dots[0][n][m] * scales[n][0];
    }
    add_dots<kBits<K>, 4, 8>(dots[1], vector, x, g * kGroup + 16);
    UNROLL for (int n = 0; n < N; ++n) {
      UNROLL for (int m = 0; m < M; ++m) sums[n][m] += dots[1][n][m] * scales[n][1];
    }
  }
  add_block<K>(part, run, x, sums, lows, total);
}

// Q2_K and Q3_K, where products of quants and scales fit in a byte: with enough rows it pays to multiply the weights.
template <Kind K, int N, int M>
void block_of_products(Part part, const uint8_t* quants, const uint8_t* run, const Rows<M>& x, Floats (&total)[N][M]);

#if MIXTRAL_LANES == 16

template <Kind K, int N, int M>
inline void block_of_products(Part part, const uint8_t* quants, const uint8_t* run, const Rows<M>& x,
                              Floats (&total)[N][M]) {
  static_assert(N == 1);  // registers for one panel
  Ints sums[N][M] = {}, lows[N][M] = {};
  if constexpr (K == Kind::q3_k) {
    UNROLL for (int m = 0; m < M; ++m) sums[0][m] = all(-kProduct * x[m]->sum);
  }
  for (int g = 0; g < 8; ++g) {
    const uint8_t *scales = part.twos(run + g * 2 * kPanel, 0), *group = quants + g * quant_bytes_of(K);
    const Words both = K == Kind::q2_k ? pairs(scales) : pairs_signed(scales);
    part.prefetch<K, N, M>(group);
    const Products<K> products(both);
    add_dots<8, 0, 8>(sums, [&](int, int j) { return products(group, j); }, x, g * kGroup);
    if constexpr (K == Kind::q2_k) {
      const Words minimums = both >> 4;
      UNROLL for (int m = 0; m < M; ++m) lows[0][m] = add_pairs(lows[0][m], minimums, load<int32_t>(x[m]->sum16 + 2 * g));
    }
  }
  add_block<K>(part, run, x, sums, lows, total);
}

#endif

template <Kind K, int N, int M>
inline void super_blocks(const Panels& w, int64_t panel, Part part, Rows<M>& x, int64_t next, Floats (&total)[N][M]) {
  constexpr int64_t kRun = 8 * quant_bytes_of(K), kStride = (kRun + scale_bytes_of(K) + 63) / 64 * 64;
  const uint8_t* block = w.panel(panel);
  for (int64_t b = 0; b < w.columns / kBlock; ++b, block += kStride) {
    const uint8_t *quants = part.quants(block), *run = block + kRun;
    if constexpr (kLanes == 16 && M >= 4 && (K == Kind::q2_k || K == Kind::q3_k)) {
      block_of_products<K>(part, quants, run, x, total);
    } else if constexpr (kSixteen<K>) {
      block_of_16<K>(part, quants, run, x, total);
    } else {
      block_of_32<K>(part, quants, run, x, total);
    }
    for (int m = 0; m < M; ++m) x[m] += next;
  }
}

template <Kind K, int N, int M>
inline void groups(const Panels& w, int64_t panel, Part part, Rows<M>& x, int64_t next, Floats (&total)[N][M]) {
  const uint8_t* block = w.panel(panel);
  const uint8_t *quants = part.quants(block), *run = block + w.scales_at(0);
  int64_t number = 0;
  const int64_t stride = w.stride();
  const int parts = static_cast<int>(w.group / kGroup);
  int at = 0;  // in the block, in groups of 32 columns
  for (int64_t g = 0; g < w.columns / w.group; ++g, run += scale_bytes_of(K)) {
    Ints sums[N][M] = {}, zero[N];
    UNROLL for (int n = 0; n < N; ++n) zero[n] = widen(part.ones(run + 32, n));
    for (int i = 0; i < parts; ++i, ++at, quants += quant_bytes_of(K)) {
      part.prefetch<K, N, M>(quants);
      // The zeros times one sum of a pair: of which one, its place says.
      UNROLL for (int n = 0; n < N; ++n) {
        const Words zeros = (Words)(at % 2 ? -zero[n] << 16 : -zero[n] & 0xFFFF);
        UNROLL for (int m = 0; m < M; ++m) {
          sums[n][m] = add_pairs(sums[n][m], zeros, load<int32_t>(x[m]->sum32 + at / 2 * 2));
        }
      }
      const auto vector = [&](int n, int j) { return quant<K>(quants + n * part.apart, j); };
      if constexpr (M >= 4) {
        add_dots<kBits<K>, 0, 8>(sums, vector, x, at * kGroup);
      } else {
        // Few sums at a time: do not wait for those of the columns before.
        Ints dots[N][M] = {};
        add_dots<kBits<K>, 0, 8>(dots, vector, x, at * kGroup);
        UNROLL for (int n = 0; n < N; ++n) {
          UNROLL for (int m = 0; m < M; ++m) sums[n][m] += dots[n][m];
        }
      }
    }
    UNROLL for (int n = 0; n < N; ++n) {
      const Floats d = halves(part.twos(run, n));
      UNROLL for (int m = 0; m < M; ++m) total[n][m] = fma(to_floats(sums[n][m]), d * all(x[m]->scale), total[n][m]);
    }
    if (at == kBlock / kGroup) {
      at = 0;
      block += stride;
      quants = part.quants(block), run = block + w.scales_at(++number) - scale_bytes_of(K);
      for (int m = 0; m < M; ++m) x[m] += next;
    }
  }
}

template <Kind K, int N, int M>
void some_rows(const Panels& w, int64_t panel, const Rounded& a, const int32_t* rows, bool first, float* out,
               int64_t stride) {
  for (int number = 0; number < kParts; ++number) {
    const Part part{number, first && number == 0, w.panel_bytes()};
    Rows<M> x;
    for (int m = 0; m < M; ++m) x[m] = &a.at(rows[m], 0);
    Floats total[N][M] = {};
    if constexpr (K < Kind::g4) {
      super_blocks<K, N, M>(w, panel, part, x, a.rows, total);
    } else {
      groups<K, N, M>(w, panel, part, x, a.rows, total);
    }
    for (int n = 0; n < N; ++n) {
      for (int m = 0; m < M; ++m) store(out + m * stride + n * kPanel + number * kLanes, total[n][m]);
    }
  }
}

// From how many rows on two panels and four rows at a time are faster than one panel and eight, as an activation is then
// loaded for both panels. With fewer rows reading memory decides, and that is fastest in one run.
template <Kind K>
constexpr int64_t kPairs = kLanes == 16 && (K == Kind::q4_k || K == Kind::q6_k || K >= Kind::g4) ? 16 : 0;

template <Kind K>
void one_panel(const Panels& w, int64_t panel, const Rounded& a, const int32_t* rows, int64_t count, bool first, float* out,
               int64_t stride) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) some_rows<K, 1, 8>(w, panel, a, rows + i, first && i == 0, out + i * stride, stride);
  if (count - i >= 4) some_rows<K, 1, 4>(w, panel, a, rows + i, first && i == 0, out + i * stride, stride), i += 4;
  if (count - i >= 2) some_rows<K, 1, 2>(w, panel, a, rows + i, first && i == 0, out + i * stride, stride), i += 2;
  if (count - i >= 1) some_rows<K, 1, 1>(w, panel, a, rows + i, first && i == 0, out + i * stride, stride);
}

template <Kind K>
void all_rows(const Panels& w, int64_t panel, int64_t panels, const Rounded& a, const int32_t* rows, int64_t count,
              float* out, int64_t stride) {
  if constexpr (kPairs<K> > 0) {
    const int64_t fours = count / 4 * 4;
    for (; panels >= 2 && count >= kPairs<K>; panels -= 2, panel += 2, out += 2 * kPanel) {
      for (int64_t i = 0; i < fours; i += 4) some_rows<K, 2, 4>(w, panel, a, rows + i, i == 0, out + i * stride, stride);
      for (int64_t p = 0; p < 2 && fours < count; ++p) {
        one_panel<K>(w, panel + p, a, rows + fours, count - fours, false, out + fours * stride + p * kPanel, stride);
      }
    }
  }
  for (; panels > 0; --panels, ++panel, out += kPanel) one_panel<K>(w, panel, a, rows, count, true, out, stride);
}

void multiply(const Panels& w, int64_t first, int64_t panels, const Rounded& a, const int32_t* rows, int64_t count,
            float* out, int64_t stride) {
  switch (w.kind) {
    case Kind::q2_k:
      return all_rows<Kind::q2_k>(w, first, panels, a, rows, count, out, stride);
    case Kind::q3_k:
      return all_rows<Kind::q3_k>(w, first, panels, a, rows, count, out, stride);
    case Kind::q4_k:
      return all_rows<Kind::q4_k>(w, first, panels, a, rows, count, out, stride);
    case Kind::q5_k:
      return all_rows<Kind::q5_k>(w, first, panels, a, rows, count, out, stride);
    case Kind::q6_k:
      return all_rows<Kind::q6_k>(w, first, panels, a, rows, count, out, stride);
    case Kind::g4:
      return all_rows<Kind::g4>(w, first, panels, a, rows, count, out, stride);
    case Kind::g8:
      return all_rows<Kind::g8>(w, first, panels, a, rows, count, out, stride);
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
void round(const float* values, int count, RoundedBlock& to) {
  // As integers, sizes are in the same order, and infinity and NaN above all others.
  int32_t size = 0;
  for (int i = 0; i < count; ++i) {
    const int32_t bits = bits_of(values[i]) & 0x7FFFFFFF;
    size = bits > size ? bits : size;
  }
  float largest;
  __builtin_memcpy(&largest, &size, sizeof largest);
  const bool finite = size < 0x7F800000, something = finite && largest >= kSmallest;
  to.scale = finite ? (something ? largest / 127.0f : 0.0f) : __builtin_nanf("");
  const int used = something ? count : 0;
  const float inverse = 127.0f / largest;
  // The nearest integer, ties to even: a sum of this size has no bits left for a fraction, and its last byte is it.
  for (int i = 0; i < used; ++i) to.q[i] = static_cast<int8_t>(bits_of(values[i] * inverse + 12582912.0f));
  for (int i = used; i < kBlock; ++i) to.q[i] = 0;
  to.sum = 0;
  for (int g = 0; g < kBlock / 16; ++g) {
    const int32_t sum = sum_of_16(to.q + 16 * g);
    to.low16[g] = -32 * sum;
    to.sum16[g] = static_cast<int16_t>(sum);
    to.sum += sum;
  }
  for (int g = 0; g < kBlock / kGroup; ++g) to.sum32[g] = static_cast<int16_t>(to.sum16[2 * g] + to.sum16[2 * g + 1]);
}

// --- silu(gate) * up -------------------------------------------------------------------------------------------------

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
const GemmTable gemm = {round, multiply, swiglu};

}  // namespace mixtral::MIXTRAL_LEVEL
