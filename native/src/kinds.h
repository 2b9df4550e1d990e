// What packing and unpacking share: the kind as a constant of the compiled loops, fields of words, places in a panel.
#pragma once

#include <cstdint>
#include <type_traits>

#include "mixtral/panels.h"

// With the kind known to the compiled loop; otherwise every word would ask for it anew.
#define INLINE [[gnu::always_inline]] inline

namespace mixtral {
namespace {

// Words of a group of 32 columns in which a quant has a byte; a word holds four columns that follow each other.
constexpr int kWords = kGroup / 4;

constexpr uint32_t kNibbles = 0x0F0F0F0F, kTriples = 0x07070707, kPairs = 0x03030303, kBits = 0x01010101;

// Quants of the 32 columns from k on, and the run of scales of a group, from the start of a panel.
INLINE int64_t quants_at(const Panels& w, int64_t k) {
  return k / kBlock * w.stride() + k % kBlock / kGroup * quant_bytes_of(w.kind);
}
INLINE int64_t run_at(const Panels& w, int64_t group) {
  const int64_t k = group * w.group;
  return k / kBlock * w.stride() + w.scales_at(k / kBlock) + k % kBlock / w.group * scale_bytes_of(w.kind);
}

// Calls work with the kind as a constant.
template <typename Work>
INLINE void with_kind(Kind kind, const Work& work) {
  switch (kind) {
    case Kind::q2_k:
      return work(std::integral_constant<Kind, Kind::q2_k>{});
    case Kind::q3_k:
      return work(std::integral_constant<Kind, Kind::q3_k>{});
    case Kind::q4_k:
      return work(std::integral_constant<Kind, Kind::q4_k>{});
    case Kind::q5_k:
      return work(std::integral_constant<Kind, Kind::q5_k>{});
    case Kind::q6_k:
      return work(std::integral_constant<Kind, Kind::q6_k>{});
    case Kind::g4:
      return work(std::integral_constant<Kind, Kind::g4>{});
    case Kind::g8:
      return work(std::integral_constant<Kind, Kind::g8>{});
  }
}

}  // namespace
}  // namespace mixtral
