// Attention inside documents of bfloat16, for instruction sets that add products of pairs of them to float32.
//
// Shares and gradients of scores are rounded to bfloat16 before they are multiplied, as other programs do; maxima, sums and
// exponentials are float32. A pair lies in one number of 32 bits: two neighbours of a row, or of a column.
#include "blocks.h"

namespace mixtral::MIXTRAL_LEVEL {
namespace {

constexpr int64_t kKeys = 256;  // whose scores the backward pass has at a time

typedef uint16_t Narrow __attribute__((vector_size(2 * kLanes)));

struct Work : Block {
  int32_t *keys, *values;         // [tokens / 2][padded]: pairs of tokens
  int32_t *keys_t, *values_t;     // [padded / 2][tokens]: pairs along the head
  int32_t *q, *grad, *results;    // [rows][padded / 2]: pairs along the head
  int32_t *q_rows, *grad_rows;    // [rows / 2][padded]: pairs of rows
  float *scores, *arrived, *made; // [rows][stride], of what arrives at the shares as well, and [rows][padded]
  int32_t* narrow;                // [rows][stride / 2]: pairs of keys
  int32_t *shares, *grads;        // [rows / 2][stride]: pairs of rows
  float *grad_k, *grad_v;         // [tokens][padded]
  float *norms, *dots;            // [rows]
};

Work plan(const Packed& shape, const Piece& piece, bool backward, Scratch& scratch) {
  Work w{block_of(shape, piece, 2 * kLanes, backward ? kKeys : piece.length),
         {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  const int64_t half = w.tokens * w.padded / 2, some = w.rows * w.padded, scores = w.rows * w.stride;
  const int64_t lines = up_to(w.rows, 16);
  Parts parts{scratch.take((backward ? 9 : 3) * half + 4 * some + 4 * scores + 2 * lines)};
  const auto pairs = [&parts](int64_t count) { return reinterpret_cast<int32_t*>(parts.next(count)); };
  w.keys = pairs(half), w.keys_t = pairs(half), w.values = pairs(half);
  w.q = pairs(some / 2), w.grad = pairs(some / 2), w.results = pairs(some / 2);
  w.q_rows = pairs(some / 2), w.grad_rows = pairs(some / 2), w.made = parts.next(some);
  w.scores = parts.next(scores), w.arrived = parts.next(scores);
  w.narrow = pairs(scores / 2), w.shares = pairs(scores / 2), w.grads = pairs(scores / 2);
  w.norms = parts.next(lines), w.dots = parts.next(lines);
  if (backward) w.values_t = pairs(half), w.grad_k = parts.next(2 * half), w.grad_v = parts.next(2 * half);
  return w;
}

// --- pairs -----------------------------------------------------------------------------------------------------------

// A row of bfloat16, and zeros up to `padded`.
inline void copy_row(const void* from, int64_t at, int64_t count, int64_t padded, int32_t* to) {
  const auto bytes = 2 * static_cast<size_t>(count);
  __builtin_memset(reinterpret_cast<char*>(to) + bytes, 0, 2 * static_cast<size_t>(padded) - bytes);
  __builtin_memcpy(to, static_cast<const uint16_t*>(from) + at, bytes);
}

inline Ints wide(const int32_t* from) { return __builtin_convertvector(load<Narrow>(from), Ints); }

// Rows [rows][padded / 2] as pairs of rows [rows / 2][padded].
void pair_rows(const int32_t* from, int64_t rows, int64_t padded, int32_t* to) {
  for (int64_t m = 0; m < rows; m += 2, from += padded, to += padded) {
    for (int64_t i = 0; i < padded; i += kLanes) {
      store(to + i, wide(from + i / 2) | wide(from + padded / 2 + i / 2) << 16);
    }
  }
}

// A head of the document, with zeros behind it: as pairs along the head, turned, and as pairs of tokens; either may be
// null. `lines` holds [tokens][padded / 2] meanwhile.
void read_head(const Work& w, const void* from, int32_t* lines, int32_t* turned, int32_t* tokens) {
  const int64_t size = w.shape.size, width = w.padded / 2;
  for (int64_t j = 0; j < w.piece.length; ++j) {
    copy_row(from, ((w.piece.first + j) * w.shape.keys + w.piece.head) * size, size, w.padded, lines + j * width);
  }
  const int64_t rest = (w.tokens - w.piece.length) * width;
  __builtin_memset(lines + w.piece.length * width, 0, 4 * static_cast<size_t>(rest));
  if (turned != nullptr) {
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t j = 0; j < w.tokens; ++j) turned[i * w.tokens + j] = lines[j * width + i];
    }
  }
  if (tokens != nullptr) pair_rows(lines, w.tokens, w.padded, tokens);
}

// Rows of a block: all its queries of one head, then those of the next; behind them zeros.
void read_queries(const Work& w, const void* from, int64_t begin, int64_t count, int32_t* to) {
  for (int64_t m = 0; m < w.rows; ++m) {
    const int64_t there = m < count * w.together ? w.shape.size : 0;
    copy_row(from, there ? query_at(w, begin + m % count, m / count) : 0, there, w.padded, to + m * w.padded / 2);
  }
}

// --- rows of scores --------------------------------------------------------------------------------------------------

// The first `count` numbers of a vector.
inline __mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xFFFF : count <= 0 ? 0 : (1 << count) - 1);
}

inline float sum_of(Floats x) {
  float sum = 0.0f;
  for (int n = 0; n < kLanes; ++n) sum += x[n];
  return sum;
}

inline Floats quick_exponential(Floats x) {
  x = larger(all(-87.0f), x);
  const Floats n = _mm512_maskz_roundscale_ps(0xFFFF, x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Floats r = fma(n, all(-1.42860677e-6f), fma(n, all(-0.693145752f), x));
  Floats p = all(kPowers[0]);
  for (int i = 1; i < 6; ++i) p = fma(p, r, all(kPowers[i]));
  return _mm512_maskz_scalef_ps(0xFFFF, p, n);
}

// Scores to exponentials of their distance to the largest, as bfloat16; zeros behind those that are seen. Returns their
// sum, and the largest.
float soften(float scale, const float* scores, int64_t seen, int64_t end, int32_t* narrow, float& largest) {
  Floats most = all(-__builtin_inff());
  for (int64_t j = 0; j < seen; j += kLanes) {
    most = _mm512_mask_max_ps(most, first(seen - j), load<Floats>(scores + j), most);
  }
  largest = most[0];
  for (int n = 1; n < kLanes; ++n) largest = most[n] > largest ? most[n] : largest;
  Floats sums = all(0.0f);
  for (int64_t j = 0; j < end; j += kLanes) {
    Floats share = all(0.0f);
    if (j < seen) {
      const Floats x = (load<Floats>(scores + j) - largest) * scale;
      share = _mm512_maskz_mov_ps(first(seen - j), quick_exponential(x));
    }
    sums = sums + share;
    store(narrow + j / 2, _mm512_cvtneps_pbh(share));
  }
  return sum_of(sums);
}

// Of two rows, the first `seen` keys: shares from their scores, and what arrives at them to gradients of the scores.
struct TwoRows {
  const float *scores, *arrived;
  int64_t seen[2];
  float norm[2], dot[2];
};

void soften_back(const Work& w, const TwoRows& rows, int64_t end, int32_t* shares, int32_t* grads, int32_t* narrow) {
  // Words of the lower and of the upper half, in turns.
  constexpr Ints kOrder = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                           0x180008, 0x190009, 0x1A000A, 0x1B000B, 0x1C000C, 0x1D000D, 0x1E000E, 0x1F000F};
  const int64_t most = rows.seen[0] > rows.seen[1] ? rows.seen[0] : rows.seen[1];
  for (int64_t j = 0; j < end; j += kLanes) {
    if (j >= most) {
      store(shares + j, Ints{}), store(grads + j, Ints{});
      store(narrow + j / 2, Narrow{}), store(narrow + (w.stride + j) / 2, Narrow{});
      continue;
    }
    Floats share[2], grad[2];
    UNROLL for (int r = 0; r < 2; ++r) {
      const int64_t at = r * w.stride + j;
      const Floats x = fma(load<Floats>(rows.scores + at), all(w.scale), all(-rows.norm[r]));
      share[r] = _mm512_maskz_mov_ps(first(rows.seen[r] - j), quick_exponential(x));
      const Floats arrived = _mm512_maskz_mov_ps(first(rows.seen[r] - j), load<Floats>(rows.arrived + at));
      grad[r] = share[r] * (arrived - rows.dot[r]) * w.scale;
    }
    const Ints halves = (Ints)_mm512_cvtne2ps_pbh(grad[1], grad[0]);
    store(shares + j, _mm512_permutexvar_epi16((__m512i)kOrder, (__m512i)_mm512_cvtne2ps_pbh(share[1], share[0])));
    store(grads + j, _mm512_permutexvar_epi16((__m512i)kOrder, (__m512i)halves));
    store(narrow + j / 2, _mm512_maskz_extracti32x8_epi32(0xFF, (__m512i)halves, 0));
    store(narrow + (w.stride + j) / 2, _mm512_maskz_extracti32x8_epi32(0xFF, (__m512i)halves, 1));
  }
}

// Norms of a block's queries, and the product of each result with its gradient.
void read_norms(const Work& w, const Attended& a, int64_t begin, int64_t count) {
  const int64_t width = w.padded / 2;
  for (int64_t m = 0; m < count * w.together; ++m) {
    const int64_t token = w.piece.first + begin + m % count, head = w.piece.head * w.together + m / count;
    w.norms[m] = a.norms[token * w.shape.queries + head];
    Floats dot = all(0.0f);
    for (int64_t i = 0; i < width; i += kLanes) {
      dot = bf16_pairs(dot, load<Ints>(w.results + m * width + i), load<Ints>(w.grad + m * width + i));
    }
    w.dots[m] = sum_of(dot);
  }
}

using Pairs = Strided<int32_t>;

// The block's queries from `begin` on, and the keys [from, from + keys): adds to the gradients of all three.
void add_grads(const Work& w, int64_t begin, int64_t count, int64_t from, int64_t keys) {
  const int64_t used = count * w.together, rows = up_to(used, kTall), width = w.padded / 2;
  multiply<false>(rows, keys, width, Pairs{w.q, width, 1}, w.keys_t + from, w.tokens, w.scores, w.stride);
  multiply<false>(rows, keys, width, Pairs{w.grad, width, 1}, w.values_t + from, w.tokens, w.arrived, w.stride);
  for (int64_t m = 0; m < rows; m += 2) {
    TwoRows two{w.scores + m * w.stride, w.arrived + m * w.stride, {0, 0}, {0, 0}, {0, 0}};
    for (int r = 0; r < 2 && m + r < used; ++r) {
      const int64_t seen = begin + (m + r) % count + 1 - from;
      two.seen[r] = seen < keys ? seen : keys;
      two.norm[r] = w.norms[m + r], two.dot[r] = w.dots[m + r];
    }
    // Tiles of keys end up to kTall - 1 columns behind the last one.
    soften_back(w, two, keys + kLanes, w.shares + m / 2 * w.stride, w.grads + m / 2 * w.stride,
                w.narrow + m * w.stride / 2);
  }
  const int64_t tall = up_to(keys, kTall), at = from * w.padded;
  multiply<true>(tall, w.padded, rows / 2, Pairs{w.shares, 1, w.stride}, w.grad_rows, w.padded, w.grad_v + at, w.padded);
  multiply<true>(tall, w.padded, rows / 2, Pairs{w.grads, 1, w.stride}, w.q_rows, w.padded, w.grad_k + at, w.padded);
  multiply<true>(rows, w.padded, keys / 2, Pairs{w.narrow, w.stride / 2, 1}, w.keys + at / 2, w.padded, w.made,
                 w.padded);
}

thread_local Scratch memory;

}  // namespace

void attend_pairs(const Packed& shape, const Piece& piece, const Attended& a) {
  const Work w = plan(shape, piece, false, memory);
  const int64_t width = w.padded / 2;
  read_head(w, a.k, w.keys, w.keys_t, nullptr);
  read_head(w, a.v, w.keys, nullptr, w.values);
  for (int64_t begin = 0; begin < piece.length; begin += w.block) {
    const int64_t count = piece.length - begin < w.block ? piece.length - begin : w.block, seen = begin + count;
    const int64_t end = up_to(seen, kStrip), used = count * w.together, rows = up_to(used, kTall);
    read_queries(w, a.q, begin, count, w.q);
    multiply<false>(rows, end, width, Pairs{w.q, width, 1}, w.keys_t, w.tokens, w.scores, w.stride);
    for (int64_t m = 0; m < rows; ++m) {
      int32_t* narrow = w.narrow + m * w.stride / 2;
      if (m >= used) {
        __builtin_memset(narrow, 0, 2 * static_cast<size_t>(end));
        continue;
      }
      float largest;
      const float sum = soften(w.scale, w.scores + m * w.stride, begin + m % count + 1, end, narrow, largest);
      w.norms[m] = 1.0f / sum;
      const int64_t token = piece.first + begin + m % count, head = piece.head * w.together + m / count;
      a.norms[token * shape.queries + head] = largest * w.scale + __builtin_logf(sum);
    }
    const Pairs shares{w.narrow, w.stride / 2, 1};
    multiply<false>(rows, w.padded, up_to(seen, 2) / 2, shares, w.values, w.padded, w.made, w.padded);
    for (int64_t m = 0; m < used; ++m) {
      for (int64_t i = 0; i < w.padded; ++i) w.made[m * w.padded + i] *= w.norms[m];
    }
    write_queries(w, w.made, begin, count, a.out);
  }
}

void attend_pairs_back(const Packed& shape, const Piece& piece, const Attended& a, const AttendedGrads& grads) {
  const Work w = plan(shape, piece, true, memory);
  int32_t* lines = reinterpret_cast<int32_t*>(w.grad_k);  // not yet needed
  read_head(w, a.k, lines, w.keys_t, w.keys);
  read_head(w, a.v, lines, w.values_t, nullptr);
  for (int64_t i = 0; i < w.tokens * w.padded; ++i) w.grad_k[i] = w.grad_v[i] = 0.0f;
  for (int64_t begin = 0; begin < piece.length; begin += w.block) {
    const int64_t count = piece.length - begin < w.block ? piece.length - begin : w.block;
    const int64_t end = up_to(begin + count, kStrip), used = count * w.together, rows = up_to(used, kTall);
    read_queries(w, a.q, begin, count, w.q);
    read_queries(w, grads.out, begin, count, w.grad);
    read_queries(w, a.out, begin, count, w.results);
    pair_rows(w.q, rows, w.padded, w.q_rows);
    pair_rows(w.grad, rows, w.padded, w.grad_rows);
    read_norms(w, a, begin, count);
    for (int64_t i = 0; i < rows * w.padded; ++i) w.made[i] = 0.0f;
    for (int64_t from = 0; from < end; from += kKeys) {
      add_grads(w, begin, count, from, end - from < kKeys ? end - from : kKeys);
    }
    write_queries(w, w.made, begin, count, grads.q);
  }
  for (int64_t j = 0; j < piece.length; ++j) {
    const int64_t at = ((piece.first + j) * shape.keys + piece.head) * shape.size;
    write_row(w.grad_k + j * w.padded, shape.size, shape.bf16, grads.k, at);
    write_row(w.grad_v + j * w.padded, shape.size, shape.bf16, grads.v, at);
  }
}

}  // namespace mixtral::MIXTRAL_LEVEL
