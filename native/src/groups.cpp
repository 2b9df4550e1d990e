// Int3 and int4 in groups with a float16 scale each, and Q4_0: the same numbers as groups.py, a group to a lane.
//
// Compiled once for each instruction set, as kquants.cpp. All but the table is internal to this file.
#include <cstdint>

#include "mixtral/half.h"
#include "mixtral/kernels.h"
#include "vectors.h"

namespace mixtral::MIXTRAL_LEVEL {
namespace {

constexpr int kRun = 32;  // values whose codes fill whole words of 32 bits, whatever their bits

// --- where a code lies: `place` is the bit at which code i of 32 starts ---------------------------------------------

// One after the other.
template <int Bits_, int Values_>
struct Stream {
  static constexpr int Bits = Bits_, Values = Values_;
  static constexpr int place(int i) { return i * Bits; }
};

// As in GGML's blocks: values i and i + 16 share a byte.
struct Halves {
  static constexpr int Bits = 4, Values = 32;
  static constexpr int place(int i) { return i < 16 ? i * 8 : (i - 16) * 8 + 4; }
};

// 16 groups, turned so that a row holds one value of each: values times `unit`, and the weights of their errors.
template <typename Form>
struct Tile {
  static constexpr int Words = Form::Values * Form::Bits / 32;
  Row x[Form::Values], w[Form::Values];
  Row unit, size, scale;
  int32_t words[Words][kLanes] __attribute__((aligned(64)));
};

// --- values in -------------------------------------------------------------------------------------------------------

// Brings the largest size of each group into [0.5, 1), or the whole group to zero; false if a value is not finite.
// `extreme` becomes the value of that size; where both signs have it, the positive one.
template <typename Form>
bool scale_values(Tile<Form>& t, int g, Vec& extreme) {
  Ints size{};
  Vec high = load(&t.x[0][g]);
  for (int i = 0; i < Form::Values; ++i) {
    // The order of these bits is that of the sizes, with NaN on top.
    const Vec x = load(&t.x[i][g]);
    const Ints bits = bits_of(x) & 0x7FFFFFFF;
    size = bits > size ? bits : size;
    high = larger(x, high);
  }
  Row factor;
  bool finite = true;
  store(&t.size[g], floats_of(size));
  for (int lane = 0; lane < kWidth; ++lane) {
    const uint32_t bits = static_cast<uint32_t>(size[lane]);
    finite &= bits < 0x7F800000u;
    const bool something = bits >= bits_of(kNothing) && bits < bits_of(kTooLarge);
    t.unit[g + lane] = something ? unit_for(bits) : 1.0f;
    factor[lane] = something ? t.unit[g + lane] : 0.0f;
  }
  const Vec by = load(&factor[0]), largest = floats_of(size);
  extreme = (high < largest ? -largest : largest) * by;
  for (int i = 0; i < Form::Values; ++i) store(&t.x[i][g], load(&t.x[i][g]) * by);
  return finite;
}

// Weights as in groups.py, times the importance in `w`.
template <typename Form>
void weigh(Tile<Form>& t, int g, bool with_importance) {
  Vec mean{};
  if constexpr (Form::Bits == 3) {
    for (int i = 0; i < Form::Values; ++i) mean = mean + load(&t.x[i][g]) * load(&t.x[i][g]);
    mean = mean / static_cast<float>(Form::Values);
  }
  for (int i = 0; i < Form::Values; ++i) {
    const Vec x = load(&t.x[i][g]), weight = x * x + mean;
    store(&t.w[i][g], with_importance ? weight * load(&t.w[i][g]) : weight);
  }
}

// --- the search ------------------------------------------------------------------------------------------------------

// The nearest float16 as a float, ties to even; from 65,520 on it is 65,536 or more.
inline Vec to_half(Vec v) {
  const Ints sign = bits_of(v) & static_cast<int32_t>(0x80000000), size = bits_of(v) ^ sign;
  const Ints normal = (size + 0xFFF + (size >> 13 & 1)) & ~0x1FFF;
  const Vec small = (floats_of(size) + 0.5f) - 0.5f;  // a whole number of 2^-24
  return floats_of(bits_of(floats_of(size) < 0x1p-14f ? small : floats_of(normal)) | sign);
}

struct Best {
  Vec gain, scale;
};

// Powers of two, so that their inverses are exact.
struct Units {
  Vec unit, inverse;
};

// Keeps the scale that is best for some integers, as float16 will hold it, if it saves more error than the best one.
inline void improve(Vec qx, Vec qq, const Units& unit, Best& best) {
  const Vec half = to_half(divide(qx, qq) * unit.inverse), scale = half * unit.unit;
  const Vec gain = scale * (2.0f * qx - scale * qq);
  const auto better = (gain > best.gain) & (size_of(half) < 0x1p16f);
  best.gain = better ? gain : best.gain;
  best.scale = better ? scale : best.scale;
}

// Rounded to an integer; `Low` and `High` say whether the range must be kept at that end.
template <int Half, bool Low, bool High>
inline Vec round_in(Vec v) {
  if constexpr (Low) v = larger(v, all(-Half));
  if constexpr (High) v = smaller(v, all(Half - 1));
  return nearest(v);
}

// Tries the scales that make the extreme value the most negative integer or the most positive one, plus kOffsets[K].
// `inverse` is that of the extreme value.
// No value is larger than the extreme one, so most of them cannot leave the range.
template <typename Form, int K>
inline void try_ends(const Tile<Form>& t, int g, Vec inverse, const Units& unit, Best& best) {
  constexpr int kHalf = 1 << (Form::Bits - 1);
  constexpr float kFar = kHalf + kOffsets[K], kNear = kHalf - 1 + kOffsets[K];
  const Vec far = inverse * -kFar, near = inverse * kNear;
  Vec far_qx{}, far_qq{}, near_qx{}, near_qq{};
  for (int i = 0; i < Form::Values; ++i) {
    const Vec x = load(&t.x[i][g]), w = load(&t.w[i][g]);
    const Vec p = round_in<kHalf, (kFar > kHalf + 0.5f), (kFar > kHalf - 0.5f)>(x * far), wp = w * p;
    const Vec q = round_in<kHalf, (kNear > kHalf + 0.5f), (kNear > kHalf - 0.5f)>(x * near), wq = w * q;
    far_qx = far_qx + wp * x;
    far_qq = far_qq + wp * p;
    near_qx = near_qx + wq * x;
    near_qq = near_qq + wq * q;
  }
  improve(far_qx, far_qq, unit, best);
  improve(near_qx, near_qq, unit, best);
}

template <typename Form, int... K>
inline void try_all(const Tile<Form>& t, int g, Vec inverse, const Units& unit, Best& best,
                    std::integer_sequence<int, K...>) {
  (try_ends<Form, K>(t, g, inverse, unit, best), ...);
}

// Tries the scale that is best for the integers that the best one so far gives.
template <typename Form>
inline void try_again(const Tile<Form>& t, int g, const Units& unit, Best& best) {
  constexpr int kHalf = 1 << (Form::Bits - 1);
  const Vec inverse = divide(all(1.0f), best.scale);
  Vec qx{}, qq{};
  for (int i = 0; i < Form::Values; ++i) {
    const Vec x = load(&t.x[i][g]), q = round_in<kHalf, true, true>(x * inverse), wq = load(&t.w[i][g]) * q;
    qx = qx + wq * x;
    qq = qq + wq * q;
  }
  improve(qx, qq, unit, best);
}

// The better of two scales by the weighted errors that they leave, from the differences: exact even where very small.
template <typename Form>
inline Vec better_of(const Tile<Form>& t, int g, Vec first, Vec second) {
  constexpr int kHalf = 1 << (Form::Bits - 1);
  const Vec a = divide(all(1.0f), first), b = divide(all(1.0f), second);
  Vec a_error{}, b_error{};
  for (int i = 0; i < Form::Values; ++i) {
    const Vec x = load(&t.x[i][g]), w = load(&t.w[i][g]);
    const Vec a_rest = x - first * round_in<kHalf, true, true>(x * a);
    const Vec b_rest = x - second * round_in<kHalf, true, true>(x * b);
    a_error = a_error + w * a_rest * a_rest;
    b_error = b_error + w * b_rest * b_rest;
  }
  return b_error < a_error ? second : first;
}

template <typename Form>
Vec search(const Tile<Form>& t, int g, Vec extreme) {
  const Vec one = all(1.0f), unit_of = load(&t.unit[g]);
  const Units unit{unit_of, one / unit_of};
  Best best{all(0.0f), all(0.0f)};
  try_all(t, g, divide(one, extreme), unit, best,
          std::make_integer_sequence<int, sizeof kOffsets / sizeof kOffsets[0]>());
  try_again(t, g, unit, best);
  // The plain scale comes last, so that no group is worse than it would be without a search.
  const Vec half = to_half(extreme / static_cast<float>(-(1 << (Form::Bits - 1))) * unit.inverse);
  const Vec plain = size_of(half) < 0x1p16f ? half * unit.unit : all(0.0f);
  return better_of(t, g, best.scale, plain);
}

// --- codes out -------------------------------------------------------------------------------------------------------

// The codes of 16 groups, rounded with their scales, as words: lane for lane, words of a group below one another.
template <typename Form>
inline void pack(Tile<Form>& t, int g, Vec scale) {
  constexpr int kHalf = 1 << (Form::Bits - 1), kMask = 2 * kHalf - 1;
  const Vec inverse = divide(all(1.0f), scale);
  for (int run = 0; run < Form::Values / kRun; ++run) {
    Ints words[Form::Bits] = {};
#pragma GCC unroll 32
    for (int i = 0; i < kRun; ++i) {
      const Vec v = load(&t.x[run * kRun + i][g]) * inverse;
      const Vec whole = smaller(larger(v, all(-kHalf)), all(kHalf - 1)) + (12582912.0f + kHalf);
      // The sum has no bits left for a fraction, and its lowest ones are the code.
      const Ints code = bits_of(whole) & kMask;
      const int word = Form::place(i) / 32, shift = Form::place(i) % 32;
      words[word] |= code << shift;
      if (shift + Form::Bits > 32) words[word + 1] |= code >> (32 - shift);
    }
    for (int k = 0; k < Form::Bits; ++k) __builtin_memcpy(&t.words[run * Form::Bits + k][g], &words[k], sizeof(Ints));
  }
}

inline void put_word(uint8_t* out, int32_t word) {
  for (int i = 0; i < 4; ++i) out[i] = static_cast<uint8_t>(static_cast<uint32_t>(word) >> (8 * i));
}

template <typename Form>
bool encode_tile(Tile<Form>& t, bool with_importance) {
  bool finite = true;
  Vec extreme[kLanes / kWidth];
  for (int g = 0; g < kLanes; g += kWidth) finite &= scale_values(t, g, extreme[g / kWidth]);
  if (!finite) return false;
  for (int g = 0; g < kLanes; g += kWidth) {
    weigh(t, g, with_importance);
    const Vec scale = search(t, g, extreme[g / kWidth]);
    store(&t.scale[g], scale);
    pack(t, g, scale);
  }
  return true;
}

Fault first_not_finite(const float* values, int64_t at) {
  while ((bits_of(values[at]) & 0x7F800000u) != 0x7F800000u) ++at;
  return {Problem::not_finite, at};
}

// Groups follow one another in `values`; their codes and scales are `Step` bytes apart.
template <typename Form, int CodeStep, int ScaleStep>
Fault encode(const float* values, const float* importance, uint8_t* codes, uint8_t* scales, int64_t begin, int64_t end,
             int64_t per_row) {
  Tile<Form> tile;
  Fault fault{Problem::none, 0};
  for (int64_t first = begin; first < end; first += kLanes) {
    const int count = end - first < kLanes ? static_cast<int>(end - first) : kLanes;
    const float *groups[kLanes], *weights[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      // Lanes are apart: where groups are missing, the first one does no harm.
      const int64_t group = first + (lane < count ? lane : 0);
      groups[lane] = values + group * Form::Values;
      weights[lane] = importance ? importance + group % per_row * Form::Values : nullptr;
    }
    turn(groups, Form::Values, tile.x);
    if (importance) turn(weights, Form::Values, tile.w);
    if (!encode_tile(tile, importance != nullptr)) return first_not_finite(values, first * Form::Values);
    for (int lane = 0; lane < count; ++lane) {
      const int64_t group = first + lane;
      // Without a scale the values are too small for any, which is well, or too large for all.
      if (tile.scale[lane] == 0.0f && tile.size[lane] >= 1.0f) {
        if (fault.problem == Problem::none) fault = {Problem::too_large, group * Form::Values};
        continue;
      }
      const uint16_t half = nearest_half(tile.scale[lane] / tile.unit[lane]);
      scales[group * ScaleStep] = static_cast<uint8_t>(half);
      scales[group * ScaleStep + 1] = static_cast<uint8_t>(half >> 8);
      for (int k = 0; k < Tile<Form>::Words; ++k) put_word(codes + group * CodeStep + 4 * k, tile.words[k][lane]);
    }
  }
  return fault;
}

template <int Bits, int Values>
constexpr GroupEncoder kIntegers = encode<Stream<Bits, Values>, Values * Bits / 8, 2>;

Fault encode_q4_0(const float* values, const float* importance, uint8_t* out, int64_t begin, int64_t end,
                  int64_t per_row) {
  return encode<Halves, 18, 18>(values, importance, out + 2, out, begin, end, per_row);
}

}  // namespace

extern const GroupTable groups;
const GroupTable groups = {
    encode_q4_0,
    {kIntegers<3, 32>, kIntegers<3, 64>, kIntegers<3, 128>},
    {kIntegers<4, 32>, kIntegers<4, 64>, kIntegers<4, 128>},
};

}  // namespace mixtral::MIXTRAL_LEVEL
