// The search of src/mixtral/quant/search.py in vectors, a sub-block to a lane, bit for bit; for kquants.cpp alone.
//
// Every sum runs over the values of its sub-block in order. Everything is internal to the including file, as in
// vectors.h.
#pragma once

#include "mixtral/half.h"
#include "vectors.h"

namespace mixtral::MIXTRAL_LEVEL {
namespace {

constexpr int kSuper = 256;
constexpr float kFlat = 0x1p-10f, kHuge = 3.4028234663852886e38f;
constexpr float kNeighbours[] = {0.0f, 1.0f, -1.0f};

template <int Values_, int Top_, int Most_>
struct Affine {
  static constexpr int Values = Values_, Top = Top_, Most = Most_, Subs = kSuper / Values, Blocks = kLanes / Subs;
};

template <int Values_, int Half_, int Most_>
struct Symmetric {
  static constexpr int Values = Values_, Half = Half_, Most = Most_, Subs = kSuper / Values, Blocks = kLanes / Subs;
};

// 16 sub-blocks, of one super-block or of two, turned so that a row holds one value of each.
template <typename Form>
struct Tile {
  Row x[Form::Values], w[Form::Values], q[Form::Values];
  float unit[Form::Blocks];
  bool fits[Form::Blocks];
};

// Integers of every lane for one pair of common float16s, and the error they leave.
struct Choice {
  uint16_t d[2], dmin[2];
  Row scales, lows, error;
};

// Repeats the number of each super-block over its lanes.
template <typename Form>
inline void spread(const float* blocks, Row& lanes) {
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = blocks[lane / Form::Subs];
}

// --- scale and low ---------------------------------------------------------------------------------------------------

struct Fit {
  Vec error, scale, low;
};

struct Sums {
  Vec w, y, yy;
};

struct Products {
  Vec q, qq, qy;
};

// Keeps the least-squares fit of y = scale * q + shift if it is better; -floor - shift >= 0 is the low.
inline void improve(const Products& p, const Sums& s, Vec floor, Fit& best) {
  const Vec zero = all(0.0f);
  const Vec product = s.w * p.qq;
  const Vec determinant = product - p.q * p.q;
  Vec slope = divide(s.w * p.qy - p.q * s.y, determinant);
  Vec shift = divide(s.y - slope * p.q, s.w);
  const auto flat = determinant <= product * kFlat;
  const auto above = floor + shift > zero;
  shift = flat ? zero : (above ? -floor : shift);
  slope = (flat | above) ? divide(p.qy - shift * p.q, p.qq) : slope;
  const Vec error =
      s.yy + slope * (slope * p.qq - 2.0f * p.qy) + shift * (shift * s.w - 2.0f * s.y + 2.0f * (slope * p.q));
  const auto better = (slope > zero) & (error < best.error);
  best.error = better ? error : best.error;
  best.scale = better ? slope : best.scale;
  best.low = better ? -(floor + shift) : best.low;
}

// Sums with q = round((x - start) * inverse).
template <typename Form>
inline Products products(const Tile<Form>& t, int g, Vec floor, Vec start, Vec inverse) {
  Products p{Vec{}, Vec{}, Vec{}};
  for (int i = 0; i < Form::Values; ++i) {
    const Vec x = load(&t.x[i][g]), y = x - floor;
    const Vec q = round_to((x - start) * inverse, 0.0f, Form::Top);
    const Vec wq = load(&t.w[i][g]) * q;
    p.q = p.q + wq;
    p.qq = p.qq + wq * q;
    p.qy = p.qy + wq * y;
  }
  return p;
}

template <typename Form>
void search(const Tile<Form>& t, Row& scale, Row& low) {
  for (int g = 0; g < kLanes; g += kWidth) {
    Vec floor = all(0.0f), top = load(&t.x[0][g]);
    for (int i = 0; i < Form::Values; ++i) {
      floor = smaller(floor, load(&t.x[i][g]));
      top = larger(top, load(&t.x[i][g]));
    }
    Sums s{Vec{}, Vec{}, Vec{}};
    for (int i = 0; i < Form::Values; ++i) {
      const Vec w = load(&t.w[i][g]), y = load(&t.x[i][g]) - floor, wy = w * y;
      s.w = s.w + w;
      s.y = s.y + wy;
      s.yy = s.yy + wy * y;
    }
    const Vec span = top - floor;
    Fit best{all(kHuge), span / static_cast<float>(Form::Top), -floor};
    for (const float offset : kOffsets) {
      const Vec inverse = divide(all(Form::Top + offset), span);
      improve(products(t, g, floor, floor, inverse), s, floor, best);
    }
    improve(products(t, g, floor, -best.low, divide(all(1.0f), best.scale)), s, floor, best);
    store(&scale[g], best.scale);
    store(&low[g], best.low);
  }
}

inline Vec quantise_affine(Vec x, Vec low, Vec inverse, int top) {
  return round_to((x + low) * inverse, 0.0f, static_cast<float>(top));
}

template <typename Form>
void choose_integers(const Tile<Form>& t, Choice& c, const Row& scale_wanted, const Row& low_wanted) {
  float d_block[Form::Blocks], dmin_block[Form::Blocks];
  for (int b = 0; b < Form::Blocks; ++b) {
    d_block[b] = widen_half(c.d[b]) * t.unit[b];
    dmin_block[b] = widen_half(c.dmin[b]) * t.unit[b];
  }
  Row d_lane, dmin_lane;
  spread<Form>(d_block, d_lane);
  spread<Form>(dmin_block, dmin_lane);
  for (int g = 0; g < kLanes; g += kWidth) {
    const Vec d = load(&d_lane[g]), dmin = load(&dmin_lane[g]);
    const Vec scale_nearest = round_to(divide(load(&scale_wanted[g]), d), 0.0f, Form::Most);
    const Vec low_nearest = round_to(divide(load(&low_wanted[g]), dmin), 0.0f, Form::Most);
    Vec best = all(kHuge), scales = scale_nearest, lows = low_nearest;
    for (const float step : kNeighbours) {
      const Vec scale_int = round_to(scale_nearest + step, 0.0f, Form::Most);
      const Vec scale = d * scale_int, inverse = divide(all(1.0f), scale);
      for (const float low_step : kNeighbours) {
        const Vec low_int = round_to(low_nearest + low_step, 0.0f, Form::Most);
        const Vec low = dmin * low_int;
        Vec error{};
        for (int i = 0; i < Form::Values; ++i) {
          const Vec x = load(&t.x[i][g]);
          const Vec rest = x - (scale * quantise_affine(x, low, inverse, Form::Top) - low);
          error = error + load(&t.w[i][g]) * rest * rest;
        }
        const auto better = error < best;
        best = better ? error : best;
        scales = better ? scale_int : scales;
        lows = better ? low_int : lows;
      }
    }
    store(&c.scales[g], scales);
    store(&c.lows[g], lows);
    store(&c.error[g], best);
  }
}

// Scales and lows as numbers.
template <typename Form>
void stored_numbers(const Tile<Form>& t, const Choice& c, Row& scale, Row& low) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int b = lane / Form::Subs;
    scale[lane] = (widen_half(c.d[b]) * t.unit[b]) * c.scales[lane];
    low[lane] = (widen_half(c.dmin[b]) * t.unit[b]) * c.lows[lane];
  }
}

// Starts `to` with the common float16s that are best for the integers of `old`.
template <typename Form>
void refit(const Tile<Form>& t, const Choice& old, const Row& scale, const Row& low, Choice& to) {
  Row s_qq, s_q, s_w, s_qx, s_wx;
  for (int g = 0; g < kLanes; g += kWidth) {
    const Vec inverse = divide(all(1.0f), load(&scale[g])), from = load(&low[g]);
    Vec qq{}, q1{}, w1{}, qx{}, wx{};
    for (int i = 0; i < Form::Values; ++i) {
      const Vec x = load(&t.x[i][g]), w = load(&t.w[i][g]), q = quantise_affine(x, from, inverse, Form::Top);
      const Vec wq = w * q;
      qq = qq + wq * q;
      q1 = q1 + wq;
      w1 = w1 + w;
      qx = qx + wq * x;
      wx = wx + w * x;
    }
    store(&s_qq[g], qq);
    store(&s_q[g], q1);
    store(&s_w[g], w1);
    store(&s_qx[g], qx);
    store(&s_wx[g], wx);
  }
  for (int b = 0; b < Form::Blocks; ++b) {
    float aa = 0, ab = 0, bb = 0, ax = 0, bx = 0;
    for (int lane = b * Form::Subs; lane < (b + 1) * Form::Subs; ++lane) {
      const float s = old.scales[lane], m = old.lows[lane];
      aa += s * s * s_qq[lane];
      ab += s * m * s_q[lane];
      bb += m * m * s_w[lane];
      ax += s * s_qx[lane];
      bx += m * s_wx[lane];
    }
    const float determinant = aa * bb - ab * ab;
    const float d = bb > 0.0f ? divide(ax * bb - bx * ab, determinant) : divide(ax, aa);
    const float dmin = bb > 0.0f ? divide(ax * ab - bx * aa, determinant) : 0.0f;
    const uint16_t d_half = nearest_half(d / t.unit[b]), dmin_half = nearest_half(dmin / t.unit[b]);
    const bool usable = widen_half(d_half) > 0.0f && d_half < kInfiniteHalf && widen_half(dmin_half) >= 0.0f &&
                        dmin_half < kInfiniteHalf;
    to.d[b] = usable ? d_half : old.d[b];
    to.dmin[b] = usable ? dmin_half : old.dmin[b];
  }
}

// Takes from `second`, super-block by super-block, what leaves a smaller error.
template <typename Form>
void keep_smaller(Choice& first, const Choice& second) {
  for (int b = 0; b < Form::Blocks; ++b) {
    float before = 0, after = 0;
    for (int lane = b * Form::Subs; lane < (b + 1) * Form::Subs; ++lane) {
      before += first.error[lane];
      after += second.error[lane];
    }
    if (!(after < before)) continue;
    first.d[b] = second.d[b];
    first.dmin[b] = second.dmin[b];
    for (int lane = b * Form::Subs; lane < (b + 1) * Form::Subs; ++lane) {
      first.scales[lane] = second.scales[lane];
      first.lows[lane] = second.lows[lane];
    }
  }
}

template <int Values, int Top, int Most>
void encode_tile(Tile<Affine<Values, Top, Most>>& t, Choice& chosen) {
  using Form = Affine<Values, Top, Most>;
  Row scale, low;
  search(t, scale, low);
  for (int b = 0; b < Form::Blocks; ++b) {
    float scale_most = scale[b * Form::Subs], low_most = low[b * Form::Subs];
    for (int lane = b * Form::Subs; lane < (b + 1) * Form::Subs; ++lane) {
      scale_most = scale[lane] > scale_most ? scale[lane] : scale_most;
      low_most = low[lane] > low_most ? low[lane] : low_most;
    }
    chosen.d[b] = half_above(scale_most / static_cast<float>(Most) / t.unit[b]);
    chosen.dmin[b] = half_above(low_most / static_cast<float>(Most) / t.unit[b]);
    t.fits[b] = chosen.d[b] < kInfiniteHalf && chosen.dmin[b] < kInfiniteHalf;
    if (!t.fits[b]) chosen.d[b] = chosen.dmin[b] = 0;
  }
  choose_integers(t, chosen, scale, low);
  stored_numbers(t, chosen, scale, low);
  Choice second;
  refit(t, chosen, scale, low, second);
  choose_integers(t, second, scale, low);
  keep_smaller<Form>(chosen, second);
  stored_numbers(t, chosen, scale, low);
  for (int g = 0; g < kLanes; g += kWidth) {
    const Vec inverse = divide(all(1.0f), load(&scale[g])), from = load(&low[g]);
    for (int i = 0; i < Values; ++i) store(&t.q[i][g], quantise_affine(load(&t.x[i][g]), from, inverse, Top));
  }
}

// --- scale alone -----------------------------------------------------------------------------------------------------

template <typename Form>
inline Vec quantise_symmetric(Vec x, Vec inverse) {
  return round_to(x * inverse, -Form::Half, Form::Half - 1);
}

template <typename Form>
void search_symmetric(const Tile<Form>& t, Row& result) {
  for (int g = 0; g < kLanes; g += kWidth) {
    Vec high = load(&t.x[0][g]), low = high;
    for (int i = 1; i < Form::Values; ++i) {
      high = larger(high, load(&t.x[i][g]));
      low = smaller(low, load(&t.x[i][g]));
    }
    const Vec extreme = high > -low ? high : low;
    Vec best = all(0.0f), scale = extreme / static_cast<float>(-Form::Half);
    for (const float offset : kOffsets) {
      // The extreme value may become the most negative integer, or the most positive one.
      const float ends[] = {-(Form::Half + offset), Form::Half - 1 + offset};
      for (const float steps : ends) {
        const Vec inverse = divide(all(steps), extreme);
        Vec qx{}, qq{};
        for (int i = 0; i < Form::Values; ++i) {
          const Vec x = load(&t.x[i][g]), q = quantise_symmetric<Form>(x, inverse), wq = load(&t.w[i][g]) * q;
          qx = qx + wq * x;
          qq = qq + wq * q;
        }
        const Vec slope = divide(qx, qq), gain = slope * qx;
        const auto better = gain > best;
        best = better ? gain : best;
        scale = better ? slope : scale;
      }
    }
    store(&result[g], scale);
  }
}

template <typename Form>
void choose_integers_symmetric(const Tile<Form>& t, Choice& c, const Row& wanted) {
  float d_block[Form::Blocks];
  for (int b = 0; b < Form::Blocks; ++b) d_block[b] = widen_half(c.d[b]) * t.unit[b];
  Row d_lane;
  spread<Form>(d_block, d_lane);
  for (int g = 0; g < kLanes; g += kWidth) {
    const Vec d = load(&d_lane[g]);
    const Vec nearest = round_to(divide(load(&wanted[g]), d), -Form::Most, Form::Most - 1);
    Vec best = all(kHuge), scales = nearest;
    for (const float step : kNeighbours) {
      const Vec scale_int = round_to(nearest + step, -Form::Most, Form::Most - 1);
      const Vec scale = d * scale_int, inverse = divide(all(1.0f), scale);
      Vec error{};
      for (int i = 0; i < Form::Values; ++i) {
        const Vec x = load(&t.x[i][g]), rest = x - scale * quantise_symmetric<Form>(x, inverse);
        error = error + load(&t.w[i][g]) * rest * rest;
      }
      const auto better = error < best;
      best = better ? error : best;
      scales = better ? scale_int : scales;
    }
    store(&c.scales[g], scales);
    store(&c.lows[g], Vec{});
    store(&c.error[g], best);
  }
}

// The common float16 that is best for the integers of `old`, whose scales as numbers are `scale`.
template <typename Form>
void refit_symmetric(const Tile<Form>& t, const Choice& old, const Row& scale, Choice& to) {
  Row s_qx, s_qq;
  for (int g = 0; g < kLanes; g += kWidth) {
    const Vec inverse = divide(all(1.0f), load(&scale[g]));
    Vec qx{}, qq{};
    for (int i = 0; i < Form::Values; ++i) {
      const Vec x = load(&t.x[i][g]), q = quantise_symmetric<Form>(x, inverse), wq = load(&t.w[i][g]) * q;
      qx = qx + wq * x;
      qq = qq + wq * q;
    }
    store(&s_qx[g], qx);
    store(&s_qq[g], qq);
  }
  for (int b = 0; b < Form::Blocks; ++b) {
    float ax = 0, aa = 0;
    for (int lane = b * Form::Subs; lane < (b + 1) * Form::Subs; ++lane) {
      ax += old.scales[lane] * s_qx[lane];
      aa += old.scales[lane] * old.scales[lane] * s_qq[lane];
    }
    const uint16_t half = nearest_half(divide(ax, aa) / t.unit[b]);
    const int size = half & 0x7FFF;
    to.d[b] = size > 0 && size < kInfiniteHalf ? half : old.d[b];
    to.dmin[b] = 0;
  }
}

template <int Values, int Half, int Most>
void encode_tile(Tile<Symmetric<Values, Half, Most>>& t, Choice& chosen) {
  using Form = Symmetric<Values, Half, Most>;
  Row scale, unused;
  search_symmetric(t, scale);
  for (int b = 0; b < Form::Blocks; ++b) {
    float high = scale[b * Form::Subs], low = high;
    for (int lane = b * Form::Subs; lane < (b + 1) * Form::Subs; ++lane) {
      high = scale[lane] > high ? scale[lane] : high;
      low = scale[lane] < low ? scale[lane] : low;
    }
    const float extreme = high > -low ? high : low;
    const float size = extreme < 0.0f ? -extreme : extreme;
    const uint16_t half = half_above(size / static_cast<float>(Most) / t.unit[b]);
    t.fits[b] = half < kInfiniteHalf;
    // The largest scale is to become the most negative integer.
    const uint16_t sign = half > 0 && extreme > 0.0f ? 0x8000 : 0;
    chosen.d[b] = t.fits[b] ? static_cast<uint16_t>(half | sign) : 0;
    chosen.dmin[b] = 0;
  }
  choose_integers_symmetric(t, chosen, scale);
  stored_numbers(t, chosen, scale, unused);
  Choice second;
  refit_symmetric(t, chosen, scale, second);
  choose_integers_symmetric(t, second, scale);
  keep_smaller<Form>(chosen, second);
  stored_numbers(t, chosen, scale, unused);
  for (int g = 0; g < kLanes; g += kWidth) {
    const Vec inverse = divide(all(1.0f), load(&scale[g]));
    for (int i = 0; i < Values; ++i) store(&t.q[i][g], quantise_symmetric<Form>(load(&t.x[i][g]), inverse));
  }
}

}  // namespace
}  // namespace mixtral::MIXTRAL_LEVEL
