// The kernels of gemm.h, compiled once for each instruction set with MIXTRAL_LEVEL (the namespace) and MIXTRAL_LANES.
//
// A vector holds MIXTRAL_LANES numbers of 32 bits, one for each row of a panel or of a part of it. All but the table is
// internal to this file: a copy made for wide registers must never serve a processor without them.
#include "mixtral/gemm.h"

#include "quants.h"

namespace mixtral::MIXTRAL_LEVEL {
namespace {

// --- one part of a panel, a block of M activation rows ---------------------------------------------------------------

// How many bytes before their use quants are asked for that are in no cache: the processor itself reaches less far.
constexpr int kAhead = 4096;

// A part of a panel: where its lanes begin in the quants and in scales of one and two bytes. `ahead` is kAhead for the
// first to read the panel, 0 for the others.
struct Part {
  int number, ahead;

  // Always inlined, since GCC takes a call that returns and writes nothing for one that does nothing.
  template <Kind K, int M>
  [[gnu::always_inline]] inline void prefetch(const uint8_t* group) const {
    // Where there is little to compute, the processor itself keeps the memory busy, and more requests only delay it.
    if constexpr ((K == Kind::g8 && M <= 2) || (K == Kind::q4_k && M == 1)) return;
    if (M == 8 && ahead == 0) return;  // with few rows a branch costs more than requests for what is there
    for (int i = 0; i < quant_bytes_of(K); i += 64) __builtin_prefetch(group + ahead + i);
  }

  const uint8_t* quants(const uint8_t* panel) const { return panel + number * kBytes; }
  const uint8_t* ones(const uint8_t* run) const { return run + number * kLanes; }
  const uint8_t* twos(const uint8_t* run) const { return run + number * 2 * kLanes; }
};

template <int M>
using Rows = const RoundedBlock* [M];

// Adds the sums over 4N columns of quants (v) times activations, from column `at` of each row's block on.
template <int N, int Width, int M>
inline void add_dots(Ints (&sums)[M], const Bytes* v, const Rows<M>& x, int at) {
  if constexpr (kLanes == 16 && M >= 4) {
    // Across the rows, as a sum waits several cycles for the one before it, and no 16-bit sums are to be kept.
    UNROLL for (int j = 0; j < N; ++j) {
      UNROLL for (int m = 0; m < M; ++m) sums[m] = dot<1, Width>(sums[m], v + j, x[m]->q + at + 4 * j);
    }
  } else {
    UNROLL for (int m = 0; m < M; ++m) sums[m] = dot<N, Width>(sums[m], v, x[m]->q + at);
  }
}

// The two float steps of a block.
template <Kind K, int M>
inline void add_block(Part part, const uint8_t* run, const Rows<M>& x, const Ints (&sums)[M], const Ints (&lows)[M],
                      Floats (&total)[M]) {
  const Floats d = halves(part.twos(run + 256));
  UNROLL for (int m = 0; m < M; ++m) {
    const Floats step = all(x[m]->scale);
    total[m] = fma(to_floats(sums[m]), d * step, total[m]);
    if constexpr (kMinimums<K>) {
      const Floats dmin = halves(part.twos(run + 288));
      total[m] = fma(to_floats(lows[m]), -(dmin * step), total[m]);
    }
  }
}

// Q4_K and Q5_K: a scale for each 32 columns.
template <Kind K, int M>
inline void block_of_32(Part part, const uint8_t* quants, const uint8_t* run, const Rows<M>& x, Floats (&total)[M]) {
  Ints sums[M] = {}, lows[M] = {};
  for (int g = 0; g < 8; ++g) {
    Bytes v[8];
    part.prefetch<K, M>(quants + g * quant_bytes_of(K));
    unpack<K>(quants + g * quant_bytes_of(K), v);
    const Ints scale = widen(part.ones(run + g * kPanel));
    Ints dots[M] = {};
    add_dots<8, kBits<K>>(dots, v, x, g * kGroup);
    UNROLL for (int m = 0; m < M; ++m) sums[m] += dots[m] * scale;
  }
  UNROLL for (int j = 0; j < 4; ++j) {
    const Words minimums = pairs(part.twos(run + 128 + j * 2 * kPanel));
    UNROLL for (int m = 0; m < M; ++m) lows[m] = add_pairs(lows[m], minimums, load<int32_t>(x[m]->sum32 + 2 * j));
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

// Q2_K, Q3_K and Q6_K: a scale for each 16 columns.
template <Kind K, int M>
inline void block_of_16(Part part, const uint8_t* quants, const uint8_t* run, const Rows<M>& x, Floats (&total)[M]) {
  Ints sums[M] = {}, lows[M] = {};
  for (int g = 0; g < 8; ++g) {
    Bytes v[8];
    part.prefetch<K, M>(quants + g * quant_bytes_of(K));
    unpack<K>(quants + g * quant_bytes_of(K), v);
    Ints first, second;
    if constexpr (K == Kind::q6_k) {
      first = widen_signed(part.ones(run + 2 * g * kPanel));
      second = widen_signed(part.ones(run + (2 * g + 1) * kPanel));
    } else {
      const Words both = pairs(part.twos(run + g * 2 * kPanel));
      first = K == Kind::q2_k ? (Ints)both & 15 : (Ints)both << 24 >> 24;
      second = K == Kind::q2_k ? (Ints)both >> 16 & 15 : (Ints)both << 8 >> 24;
      if constexpr (K == Kind::q2_k) {
        const Words minimums = both >> 4;
        UNROLL for (int m = 0; m < M; ++m) lows[m] = add_pairs(lows[m], minimums, load<int32_t>(x[m]->sum16 + 2 * g));
      }
    }
    UNROLL for (int m = 0; m < M; ++m) {
      const int8_t* q = x[m]->q + g * kGroup;
      sums[m] += dot<4, kBits<K>>(start<K>(*x[m], 2 * g), v, q) * first;
      sums[m] += dot<4, kBits<K>>(start<K>(*x[m], 2 * g + 1), v + 4, q + 16) * second;
    }
  }
  add_block<K>(part, run, x, sums, lows, total);
}

// Q2_K and Q3_K, where products of quants and scales fit in a byte: with enough rows it pays to multiply the weights.
template <Kind K, int M>
void block_of_products(Part part, const uint8_t* quants, const uint8_t* run, const Rows<M>& x, Floats (&total)[M]);

#if MIXTRAL_LANES == 16

template <Kind K, int M>
inline void block_of_products(Part part, const uint8_t* quants, const uint8_t* run, const Rows<M>& x, Floats (&total)[M]) {
  Ints sums[M] = {}, lows[M] = {};
  if constexpr (K == Kind::q3_k) {
    UNROLL for (int m = 0; m < M; ++m) sums[m] = all(-kProduct * x[m]->sum);
  }
  for (int g = 0; g < 8; ++g) {
    Bytes v[8];
    const uint8_t* scales = part.twos(run + g * 2 * kPanel);
    const Words both = K == Kind::q2_k ? pairs(scales) : pairs_signed(scales);
    part.prefetch<K, M>(quants + g * quant_bytes_of(K));
    products<K>(quants + g * quant_bytes_of(K), both, v);
    add_dots<8, 8>(sums, v, x, g * kGroup);
    if constexpr (K == Kind::q2_k) {
      const Words minimums = both >> 4;
      UNROLL for (int m = 0; m < M; ++m) lows[m] = add_pairs(lows[m], minimums, load<int32_t>(x[m]->sum16 + 2 * g));
    }
  }
  add_block<K>(part, run, x, sums, lows, total);
}

#endif

template <Kind K, int M>
inline void super_blocks(const Panels& w, int64_t panel, Part part, Rows<M>& x, int64_t next, Floats (&total)[M]) {
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

template <Kind K, int M>
inline void groups(const Panels& w, int64_t panel, Part part, Rows<M>& x, int64_t next, Floats (&total)[M]) {
  const uint8_t* block = w.panel(panel);
  const uint8_t *quants = part.quants(block), *run = block + w.scales_at(0);
  int64_t number = 0;
  const int64_t stride = w.stride();
  const int parts = static_cast<int>(w.group / kGroup);
  int at = 0;  // in the block, in groups of 32 columns
  for (int64_t g = 0; g < w.columns / w.group; ++g, run += scale_bytes_of(K)) {
    const Ints zero = widen(part.ones(run + 32));
    Ints sums[M] = {};
    for (int i = 0; i < parts; ++i, ++at, quants += quant_bytes_of(K)) {
      Bytes v[8];
      part.prefetch<K, M>(quants);
      unpack<K>(quants, v);
      // The zeros times one sum of a pair: of which one, its place says.
      const Words zeros = (Words)(at % 2 ? -zero << 16 : -zero & 0xFFFF);
      UNROLL for (int m = 0; m < M; ++m) sums[m] = add_pairs(sums[m], zeros, load<int32_t>(x[m]->sum32 + at / 2 * 2));
      if constexpr (M >= 4) {
        add_dots<8, kBits<K>>(sums, v, x, at * kGroup);
      } else {
        // Few sums at a time: do not wait for those of the columns before.
        Ints dots[M] = {};
        add_dots<8, kBits<K>>(dots, v, x, at * kGroup);
        UNROLL for (int m = 0; m < M; ++m) sums[m] += dots[m];
      }
    }
    const Floats d = halves(part.twos(run));
    UNROLL for (int m = 0; m < M; ++m) total[m] = fma(to_floats(sums[m]), d * all(x[m]->scale), total[m]);
    if (at == kBlock / kGroup) {
      at = 0;
      block += stride;
      quants = part.quants(block), run = block + w.scales_at(++number) - scale_bytes_of(K);
      for (int m = 0; m < M; ++m) x[m] += next;
    }
  }
}

template <Kind K, int M>
void some_rows(const Panels& w, int64_t panel, const Rounded& a, const int32_t* rows, bool first, float* out,
               int64_t stride) {
  for (int number = 0; number < kParts; ++number) {
    const Part part{number, first && number == 0 ? kAhead : 0};
    Rows<M> x;
    for (int m = 0; m < M; ++m) x[m] = &a.at(rows[m], 0);
    Floats total[M] = {};
    if constexpr (K < Kind::g4) {
      super_blocks<K, M>(w, panel, part, x, a.rows, total);
    } else {
      groups<K, M>(w, panel, part, x, a.rows, total);
    }
    for (int m = 0; m < M; ++m) __builtin_memcpy(out + m * stride + number * kLanes, &total[m], sizeof total[m]);
  }
}

template <Kind K>
void all_rows(const Panels& w, int64_t panel, const Rounded& a, const int32_t* rows, int64_t count, float* out,
              int64_t stride) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) some_rows<K, 8>(w, panel, a, rows + i, i == 0, out + i * stride, stride);
  if (count - i >= 4) some_rows<K, 4>(w, panel, a, rows + i, i == 0, out + i * stride, stride), i += 4;
  if (count - i >= 2) some_rows<K, 2>(w, panel, a, rows + i, i == 0, out + i * stride, stride), i += 2;
  if (count - i >= 1) some_rows<K, 1>(w, panel, a, rows + i, i == 0, out + i * stride, stride);
}

void one_panel(const Panels& w, int64_t number, const Rounded& a, const int32_t* rows, int64_t count, float* out,
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

void multiply(const Panels& w, int64_t first, int64_t panels, const Rounded& a, const int32_t* rows, int64_t count,
              float* out, int64_t stride) {
  for (int64_t p = 0; p < panels; ++p) one_panel(w, first + p, a, rows, count, out + p * kPanel, stride);
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
