// The kernels of attention.h, compiled once for each instruction set with MIXTRAL_LEVEL, MIXTRAL_LANES, MIXTRAL_BF16.
#include "mixtral/attention.h"

#include "lanes.h"

namespace mixtral::MIXTRAL_LEVEL {
namespace {

constexpr float kNothing = -__builtin_inff();
// Vectors of tokens, or of columns, that are computed together for each row.
constexpr int kWide = kLanes == 16 ? 4 : 2;

inline int64_t value_start(const Heads& heads) {
  return heads.store == Store::int8 ? kPage * heads.padded() : kPage * heads.padded() * (heads.store == Store::f32 ? 4 : 2);
}
inline const float* scales(const Heads& heads, const uint8_t* block) {
  return reinterpret_cast<const float*>(block + 2 * kPage * heads.padded());
}

inline Floats exponential_below(Floats x) { return exponential(x < -87.0f ? all(-87.0f) : x); }

// --- rounding to 8 bits ----------------------------------------------------------------------------------------------

constexpr float kSmallest = 1e-30f;

// Rounds x [count] to -127 .. 127 with one scale, which is NaN if any is not finite.
inline float to_int8(const float* x, int64_t count, int8_t* to) {
  float most = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    const float size = __builtin_fabsf(x[i]);
    finite &= size <= 3.4028234663852886e38f;
    most = size > most ? size : most;
  }
  const bool something = finite && most >= kSmallest;
  const float inverse = something ? 127.0f / most : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float nearest = (x[i] * inverse + 12582912.0f) - 12582912.0f;
    to[i] = something ? static_cast<int8_t>(static_cast<int>(nearest)) : 0;
  }
  return finite ? (something ? most / 127.0f : 0.0f) : __builtin_nanf("");
}

// --- storing ---------------------------------------------------------------------------------------------------------

void append(const Heads& heads, const float* key, const float* value, uint8_t* block, int slot) {
  const int64_t size = heads.size, padded = heads.padded();
  if (heads.store == Store::f32) {
    float* keys = reinterpret_cast<float*>(block);
    float* values = reinterpret_cast<float*>(block + value_start(heads)) + slot * padded;
    for (int64_t i = 0; i < padded; ++i) keys[i * kPage + slot] = i < size ? key[i] : 0.0f;
    for (int64_t i = 0; i < padded; ++i) values[i] = i < size ? value[i] : 0.0f;
    return;
  }
  if (heads.store == Store::bf16) {
    uint16_t* keys = reinterpret_cast<uint16_t*>(block) + 2 * slot;
    uint16_t* values = reinterpret_cast<uint16_t*>(block + value_start(heads)) + slot / 2 * 2 * padded + slot % 2;
    for (int64_t i = 0; i < padded; ++i) keys[i / 2 * 2 * kPage + i % 2] = i < size ? to_bf16(key[i]) : 0;
    for (int64_t i = 0; i < padded; ++i) values[2 * i] = i < size ? to_bf16(value[i]) : 0;
    return;
  }
  int8_t rounded[1024];
  float* beside = const_cast<float*>(scales(heads, block));
  beside[slot] = to_int8(key, size, rounded);
  uint8_t* keys = block + 4 * slot;
  for (int64_t i = 0; i < padded; ++i) {
    keys[i / 4 * 4 * kPage + i % 4] = static_cast<uint8_t>((i < size ? rounded[i] : 0) + 128);
  }
  beside[kPage + slot] = to_int8(value, size, rounded);
  int8_t* values = reinterpret_cast<int8_t*>(block + value_start(heads)) + slot / 4 * 4 * padded + slot % 4;
  for (int64_t i = 0; i < padded; ++i) values[4 * i] = i < size ? rounded[i] : 0;
}

Query query(const Heads& heads, const float* x, float scale, void* to) {
  const int64_t size = heads.size, padded = heads.padded();
  if (heads.store == Store::f32) {
    float* values = static_cast<float*>(to);
    for (int64_t i = 0; i < padded; ++i) values[i] = i < size ? x[i] : 0.0f;
    return {to, scale, 0};
  }
  if (heads.store == Store::bf16) {
    uint16_t* values = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < padded; ++i) values[i] = i < size ? to_bf16(x[i]) : 0;
    return {to, scale, 0};
  }
  int8_t* values = static_cast<int8_t*>(to);
  const float step = to_int8(x, size, values);
  int32_t sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += values[i];
  for (int64_t i = size; i < padded; ++i) values[i] = 0;
  return {to, step * scale, -128 * sum};
}

// --- one page --------------------------------------------------------------------------------------------------------

// Sums of products of `steps` entries of a table [steps][lanes] with one broadcast number of each row for every entry.
// `Shares`: of int8, the broadcast numbers have no sign and those of the table have one; for scores it is the other way.
template <Store S, bool Shares, int M, int W>
inline void products(const uint8_t* table, int64_t stride, int64_t steps, const uint8_t* const (&x)[M], Ints mask,
                     Ints (&sums)[M][W]) {
  for (int64_t j = 0; j < steps; ++j) {
    Ints columns[W];
    UNROLL for (int v = 0; v < W; ++v) columns[v] = load<Ints>(table + j * stride + v * kBytes) & mask;
    UNROLL for (int m = 0; m < M; ++m) {
      const Ints number = all(load<int32_t>(x[m] + 4 * j));
      UNROLL for (int v = 0; v < W; ++v) {
        if constexpr (S == Store::bf16) {
          sums[m][v] = (Ints)bf16_pairs((Floats)sums[m][v], columns[v], number);
        } else if constexpr (S == Store::f32) {
          sums[m][v] = (Ints)fma((Floats)columns[v], (Floats)number, (Floats)sums[m][v]);
        } else {
          sums[m][v] = Shares ? quads(sums[m][v], number, columns[v]) : quads(sums[m][v], columns[v], number);
        }
      }
    }
  }
}

typedef float Scores[kPage] __attribute__((aligned(64)));

// Scores of the page's tokens; tokens that are not seen have minus infinity.
template <Store S, int M>
inline void score(const Heads& heads, const uint8_t* block, int visible, const Query* queries, Scores* out) {
  constexpr int64_t kEach = S == Store::bf16 ? 2 : S == Store::f32 ? 1 : 4;  // columns in 32 bits
  const uint8_t* x[M];
  for (int m = 0; m < M; ++m) x[m] = static_cast<const uint8_t*>(queries[m].values);
  for (int t = 0; t < visible; t += kWide * kLanes) {
    Ints sums[M][kWide];
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < kWide; ++v) sums[m][v] = all(S == Store::int8 ? queries[m].offset : 0);
    }
    products<S, false>(block + 4 * t, 4 * kPage, heads.padded() / kEach, x, all(-1), sums);
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < kWide; ++v) {
        Floats found;
        if constexpr (S == Store::int8) {
          found = to_floats(sums[m][v]) * (all(queries[m].scale) * load<Floats>(scales(heads, block) + t + v * kLanes));
        } else {
          found = (Floats)sums[m][v] * queries[m].scale;
        }
        store(out[m] + t + v * kLanes, found);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int t = visible; t < kPage; ++t) out[m][t] = kNothing;
  }
}

// The sum of 64 numbers: four vectors of 16 on top of each other, then the tree of `total`.
inline float sum_of(const float* x) {
  float lanes[16];
  for (int n = 0; n < 16; ++n) lanes[n] = ((x[n] + x[n + 16]) + x[n + 32]) + x[n + 48];
  return total(lanes);
}

// Scores to shares of the page, unscaled, in place; returns the factor for what was found before.
inline float soften(float* scores, int visible, float& largest, float& sum, bool round_shares) {
  Floats most = all(kNothing);
  for (int t = 0; t < kPage; t += kLanes) most = larger(load<Floats>(scores + t), most);
  float next = largest;
  for (int n = 0; n < kLanes; ++n) next = most[n] > next ? most[n] : next;
  for (int t = 0; t < kPage; t += kLanes) {
    const Floats share = exponential_below(load<Floats>(scores + t) - next);
    store(scores + t, round_shares ? (Floats)(to_bf16(share) << 16) : share);
  }
  for (int t = visible; t < kPage; ++t) scores[t] = 0.0f;
  const float before = largest == kNothing ? 0.0f : exponential_below(all(largest - next))[0];
  sum = __builtin_fmaf(sum, before, sum_of(scores));
  largest = next;
  return before;
}

// Shares as the values ask for them: pairs of bfloat16, float32, or 8 bits without sign and their step.
template <Store S>
inline float weigh(const Heads& heads, const uint8_t* block, int visible, const float* shares, uint8_t* to) {
  if constexpr (S == Store::bf16) {
    for (int t = 0; t < kPage; ++t) store(to + 2 * t, to_bf16(shares[t]));
    return 1.0f;
  }
  if constexpr (S == Store::f32) {
    __builtin_memcpy(to, shares, sizeof(float) * kPage);
    return 1.0f;
  }
  // The scale of each value goes to its share.
  const float* steps = scales(heads, block) + kPage;
  float scaled[kPage], most = 0.0f;
  bool finite = true;
  for (int t = 0; t < visible; ++t) {
    scaled[t] = shares[t] * steps[t];
    finite &= scaled[t] <= 3.4028234663852886e38f;
    most = scaled[t] > most ? scaled[t] : most;
  }
  const bool something = finite && most >= kSmallest;
  const float inverse = something ? 255.0f / most : 0.0f;
  for (int t = 0; t < kPage; ++t) {
    const float nearest = t < visible && something ? (scaled[t] * inverse + 12582912.0f) - 12582912.0f : 0.0f;
    to[t] = static_cast<uint8_t>(static_cast<int>(nearest));
  }
  return finite ? (something ? most / 255.0f : 0.0f) : __builtin_nanf("");
}

// rows.values = rows.values * before + shares times values, for W vectors of columns from number c on.
template <Store S, int M, int W>
inline void add_values(const uint8_t* values, int64_t padded, int64_t c, int visible, const uint8_t* const (&shares)[M],
                       const float (&before)[M], const float (&steps)[M], float* out) {
  constexpr int kEach = S == Store::bf16 ? 2 : S == Store::f32 ? 1 : 4;  // tokens in 32 bits
  const int64_t whole = visible / kEach;
  Ints sums[M][W] = {};
  products<S, true>(values + 4 * c, 4 * padded, whole, shares, all(-1), sums);
  if (visible % kEach) {
    // Tokens that are not seen may be anything; of bfloat16 also not a number, and that times 0 is not 0.
    const uint8_t* rest[M];
    for (int m = 0; m < M; ++m) rest[m] = shares[m] + 4 * whole;
    products<S, true>(values + 4 * (c + whole * padded), 0, 1, rest, all(S == Store::bf16 ? 0xFFFF : -1), sums);
  }
  UNROLL for (int m = 0; m < M; ++m) {
    UNROLL for (int v = 0; v < W; ++v) {
      float* to = out + m * padded + c + v * kLanes;
      Floats found;
      if constexpr (S == Store::int8) {
        found = to_floats(sums[m][v]) * steps[m];
      } else {
        found = (Floats)sums[m][v];
      }
      store(to, fma(load<Floats>(to), all(before[m]), found));
    }
  }
}

template <Store S, int M>
void one_page(const Heads& heads, const uint8_t* block, int visible, const Query* queries, const Rows& rows) {
  Scores scores[M];
  uint8_t shares[M][4 * kPage] __attribute__((aligned(64)));
  float before[M], steps[M];
  const uint8_t* x[M];
  score<S, M>(heads, block, visible, queries, scores);
  for (int m = 0; m < M; ++m) {
    before[m] = soften(scores[m], visible, rows.largest[m], rows.sums[m], S == Store::bf16);
    steps[m] = weigh<S>(heads, block, visible, scores[m], shares[m]);
    x[m] = shares[m];
  }
  const int64_t padded = heads.padded();
  const uint8_t* values = block + value_start(heads);
  int64_t c = 0;
  for (; c + kWide * kLanes <= padded; c += kWide * kLanes) {
    add_values<S, M, kWide>(values, padded, c, visible, x, before, steps, rows.values);
  }
  for (; c < padded; c += kLanes) add_values<S, M, 1>(values, padded, c, visible, x, before, steps, rows.values);
}

template <Store S>
void some_rows(const Heads& heads, const uint8_t* block, int visible, const Query* queries, int count,
               const Rows& rows) {
  switch (count) {
    case 1:
      return one_page<S, 1>(heads, block, visible, queries, rows);
    case 2:
      return one_page<S, 2>(heads, block, visible, queries, rows);
    case 3:
      return one_page<S, 3>(heads, block, visible, queries, rows);
    case 4:
      return one_page<S, 4>(heads, block, visible, queries, rows);
    case 5:
      return one_page<S, 5>(heads, block, visible, queries, rows);
    default:
      return one_page<S, 6>(heads, block, visible, queries, rows);
  }
}

void page(const Heads& heads, const uint8_t* block, int visible, const Query* queries, int count, const Rows& rows) {
  switch (heads.store) {
    case Store::bf16:
      return some_rows<Store::bf16>(heads, block, visible, queries, count, rows);
    case Store::f32:
      return some_rows<Store::f32>(heads, block, visible, queries, count, rows);
    case Store::int8:
      return some_rows<Store::int8>(heads, block, visible, queries, count, rows);
  }
}

// --- segments --------------------------------------------------------------------------------------------------------

void begin(const Heads& heads, int count, const Rows& rows) {
  for (int m = 0; m < count; ++m) rows.largest[m] = kNothing, rows.sums[m] = 0.0f;
  for (int64_t i = 0; i < count * heads.padded(); ++i) rows.values[i] = 0.0f;
}

void add(const Heads& heads, int count, const Rows& segment, const Rows& rows) {
  const int64_t padded = heads.padded();
  for (int m = 0; m < count; ++m) {
    if (segment.largest[m] == kNothing && segment.sums[m] == 0.0f) continue;  // it saw nothing
    const float most = segment.largest[m] > rows.largest[m] ? segment.largest[m] : rows.largest[m];
    const float before = rows.largest[m] == kNothing ? 0.0f : exponential_below(all(rows.largest[m] - most))[0];
    const float now = segment.largest[m] == kNothing ? 0.0f : exponential_below(all(segment.largest[m] - most))[0];
    rows.sums[m] = __builtin_fmaf(rows.sums[m], before, segment.sums[m] * now);
    rows.largest[m] = most;
    for (int64_t i = m * padded; i < (m + 1) * padded; i += kLanes) {
      const Floats found = load<Floats>(segment.values + i) * now;
      store(rows.values + i, fma(load<Floats>(rows.values + i), all(before), found));
    }
  }
}

void finish(const Heads& heads, int count, const Rows& rows, float* out) {
  const int64_t padded = heads.padded();
  for (int m = 0; m < count; ++m) {
    for (int64_t i = 0; i < heads.size; ++i) out[m * heads.size + i] = rows.values[m * padded + i] / rows.sums[m];
  }
}

}  // namespace

extern const AttentionTable attention;
const AttentionTable attention = {append, query, page, begin, add, finish};

}  // namespace mixtral::MIXTRAL_LEVEL
