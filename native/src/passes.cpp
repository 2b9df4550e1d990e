// The passes of passes.h, compiled once for each instruction set with MIXTRAL_LEVEL and MIXTRAL_LANES.
#include "mixtral/passes.h"

#include "lanes.h"

namespace mixtral::MIXTRAL_LEVEL {
namespace {

typedef uint16_t Narrow __attribute__((vector_size(2 * kLanes)));

template <bool B>
struct Stored {
  using Number = float;
};
template <>
struct Stored<true> {
  using Number = uint16_t;
};
template <bool B>
using Number = typename Stored<B>::Number;

// `count` numbers, at most kLanes; the rest of the vector is zero.
template <bool B>
inline Floats read(const Number<B>* from, int64_t count) {
  if constexpr (B) {
    Narrow bits{};
    if (count == kLanes) {
      bits = load<Narrow>(from);
    } else {
      for (int64_t n = 0; n < count; ++n) bits[n] = from[n];
    }
    return (Floats)(__builtin_convertvector(bits, Ints) << 16);
  } else {
    if (count == kLanes) return load<Floats>(from);
    Floats x{};
    for (int64_t n = 0; n < count; ++n) x[n] = from[n];
    return x;
  }
}

template <bool B>
inline void write(Number<B>* to, Floats x, int64_t count) {
  if constexpr (B) {
    const Narrow bits = __builtin_convertvector(to_bf16(x), Narrow);
    if (count == kLanes) return store(to, bits);
    for (int64_t n = 0; n < count; ++n) to[n] = bits[n];
  } else {
    if (count == kLanes) return store(to, x);
    for (int64_t n = 0; n < count; ++n) to[n] = x[n];
  }
}

inline float read_one(const float* x) { return *x; }
inline float read_one(const uint16_t* x) { return from_bf16(*x); }

// Calls work with where each vector of a row begins, and how many numbers it has.
template <typename Work>
inline void over(int64_t count, const Work& work) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) work(i, int64_t{kLanes});
  if (i < count) work(i, count - i);
}

inline float sum_of(Floats x) {
  float sum = 0.0f;
  for (int n = 0; n < kLanes; ++n) sum += x[n];
  return sum;
}

inline Floats exponential_of(Floats x) {
  x = x < -87.0f ? all(-87.0f) : x;
  return exponential(x > 87.0f ? all(87.0f) : x);
}

template <bool B>
inline const Number<B>* at(const void* data, int64_t place) {
  return static_cast<const Number<B>*>(data) + place;
}
template <bool B>
inline Number<B>* at(void* data, int64_t place) {
  return static_cast<Number<B>*>(data) + place;
}

// As it would be read again after it was stored.
template <bool B>
inline Floats rounded(Floats x) {
  return B ? (Floats)(to_bf16(x) << 16) : x;
}

// --- norms -----------------------------------------------------------------------------------------------------------

template <bool B>
void norm_rows(const NormPass& p, int64_t begin, int64_t end) {
  const auto* weight = at<B>(p.weight, 0);
  for (int64_t row = begin; row < end; ++row) {
    const auto* x = at<B>(p.x, row * p.columns);
    auto* out = at<B>(p.out, row * p.columns);
    Floats squares{};
    over(p.columns, [&](int64_t i, int64_t n) {
      const Floats v = read<B>(x + i, n);
      squares = squares + v * v;
    });
    const float scale = 1.0f / __builtin_sqrtf(sum_of(squares) / static_cast<float>(p.columns) + p.eps);
    p.scales[row] = scale;
    over(p.columns, [&](int64_t i, int64_t n) {
      write<B>(out + i, rounded<B>(read<B>(x + i, n) * scale) * read<B>(weight + i, n), n);
    });
  }
}

// With y = x * scale: grad x = scale * (g w - y * mean(g w y)), grad w = sum of g y.
template <bool B>
void norm_rows_back(const NormPass& p, const NormGrads& grads, int64_t begin, int64_t end) {
  const auto* weight = at<B>(p.weight, 0);
  for (int64_t row = begin; row < end; ++row) {
    const auto *x = at<B>(p.x, row * p.columns), *grad = at<B>(grads.out, row * p.columns);
    auto* made = at<B>(grads.x, row * p.columns);
    const float scale = p.scales[row];
    Floats products{};
    over(p.columns, [&](int64_t i, int64_t n) {
      const Floats y = rounded<B>(read<B>(x + i, n) * scale), g = read<B>(grad + i, n);
      products = products + y * g * read<B>(weight + i, n);
      write<false>(grads.weight + i, read<false>(grads.weight + i, n) + g * y, n);
    });
    const float mean = sum_of(products) / static_cast<float>(p.columns);
    over(p.columns, [&](int64_t i, int64_t n) {
      const Floats y = rounded<B>(read<B>(x + i, n) * scale), g = read<B>(grad + i, n) * read<B>(weight + i, n);
      write<B>(made + i, (g - y * mean) * scale, n);
    });
  }
}

// --- rotation --------------------------------------------------------------------------------------------------------

template <bool B>
void rotate_rows(const RotatePass& p, int64_t begin, int64_t end) {
  const int64_t half = p.size / 2;
  const float sign = p.back ? -1.0f : 1.0f;
  for (int64_t token = begin; token < end; ++token) {
    const float *cosines = p.cosines + token * half, *sines = p.sines + token * half;
    for (int64_t head = 0; head < p.heads; ++head) {
      const auto* x = at<B>(p.x, (token * p.heads + head) * p.size);
      auto* out = at<B>(p.out, (token * p.heads + head) * p.size);
      over(half, [&](int64_t i, int64_t n) {
        const Floats cos = read<false>(cosines + i, n), sin = read<false>(sines + i, n) * sign;
        const Floats first = read<B>(x + i, n), second = read<B>(x + half + i, n);
        write<B>(out + i, first * cos - second * sin, n);
        write<B>(out + half + i, second * cos + first * sin, n);
      });
    }
  }
}

// --- experts ---------------------------------------------------------------------------------------------------------

template <bool B>
void gate_rows(const GatePass& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const auto* gate = at<B>(p.products, 2 * row * p.hidden);
    auto* out = at<B>(p.out, row * p.hidden);
    over(p.hidden, [&](int64_t i, int64_t n) {
      const Floats g = read<B>(gate + i, n), up = read<B>(gate + p.hidden + i, n);
      write<B>(out + i, g / (exponential_of(-g) + 1.0f) * up, n);
    });
  }
}

template <bool B>
void gate_rows_back(const GatePass& p, const GateGrads& grads, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const auto* gate = at<B>(p.products, 2 * row * p.hidden);
    const auto* grad = at<B>(grads.out, row * p.hidden);
    auto* out = at<B>(p.out, row * p.hidden);
    auto* made = at<B>(grads.products, 2 * row * p.hidden);
    over(p.hidden, [&](int64_t i, int64_t n) {
      const Floats g = read<B>(gate + i, n), up = read<B>(gate + p.hidden + i, n), d = read<B>(grad + i, n);
      const Floats share = 1.0f / (exponential_of(-g) + 1.0f), active = g * share;
      write<B>(out + i, active * up, n);
      write<B>(made + i, d * up * (share + active * (1.0f - share)), n);
      write<B>(made + p.hidden + i, d * active, n);
    });
  }
}

template <bool B>
void sort_rows(const SortPass& p, const void* from, void* to, int64_t begin, int64_t end) {
  const auto bytes = static_cast<size_t>(p.columns) * sizeof(Number<B>);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = p.tokens[row];
    auto* out = at<B>(to, row * p.columns);
    if (token < 0) {
      __builtin_memset(out, 0, bytes);
    } else {
      __builtin_memcpy(out, at<B>(from, token * p.columns), bytes);
    }
  }
}

template <bool B>
void combine_rows(const SortPass& p, const void* from, const float* weights, void* to, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t* places = p.places + token * p.choices;
    const float* own = weights == nullptr ? nullptr : weights + token * p.choices;
    auto* out = at<B>(to, token * p.columns);
    over(p.columns, [&](int64_t i, int64_t n) {
      Floats sum{};
      for (int64_t a = 0; a < p.choices; ++a) {
        sum = sum + read<B>(at<B>(from, places[a] * p.columns + i), n) * (own == nullptr ? 1.0f : own[a]);
      }
      write<B>(out + i, sum, n);
    });
  }
}

template <bool B>
void combine_rows_back(const SortPass& p, const void* from, const float* weights, const void* grad, void* back,
                       float* grad_weights, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const auto* g = at<B>(grad, token * p.columns);
    for (int64_t a = 0; a < p.choices; ++a) {
      const int64_t one = token * p.choices + a, place = p.places[one] * p.columns;
      const auto* x = at<B>(from, place);
      auto* out = at<B>(back, place);
      Floats products{};
      over(p.columns, [&](int64_t i, int64_t n) {
        const Floats v = read<B>(g + i, n);
        products = products + v * read<B>(x + i, n);
        write<B>(out + i, v * weights[one], n);
      });
      grad_weights[one] = sum_of(products);
    }
  }
}

// --- loss ------------------------------------------------------------------------------------------------------------

template <bool B>
void loss_rows(const LossPass& p, int64_t begin, int64_t end) {
  const int64_t last = p.columns - 1;
  for (int64_t row = begin; row < end; ++row) {
    auto* scores = at<B>(p.scores, row * p.columns);
    const float end_score = read_one(scores + last) + p.log_copies;
    Floats most = all(-__builtin_inff());
    over(last, [&](int64_t i, int64_t n) {
      Floats x = read<B>(scores + i, n);
      for (int64_t k = n; k < kLanes; ++k) x[k] = -__builtin_inff();
      most = larger(x, most);
    });
    float largest = end_score;
    for (int n = 0; n < kLanes; ++n) largest = most[n] > largest ? most[n] : largest;
    Floats sums{};
    over(last, [&](int64_t i, int64_t n) {
      Floats x = exponential_of(read<B>(scores + i, n) - largest);
      for (int64_t k = n; k < kLanes; ++k) x[k] = 0.0f;
      sums = sums + x;
    });
    const float end_share = exponential_of(all(end_score - largest))[0];
    const float norm = largest + __builtin_logf(sum_of(sums) + end_share);
    const int64_t label = p.labels[row];
    p.logprobs[row] = (label == last ? end_score : read_one(scores + label)) - norm;
    if (!p.train) continue;
    const float weight = p.weights[row];
    over(last, [&](int64_t i, int64_t n) {
      write<B>(scores + i, exponential_of(read<B>(scores + i, n) - norm) * weight, n);
    });
    write<B>(scores + last, exponential_of(all(end_score - norm)) * weight, 1);
    write<B>(scores + label, all((exponential_of(all(p.logprobs[row]))[0] - 1.0f) * weight), 1);
  }
}

// --- by type ---------------------------------------------------------------------------------------------------------

void norm(const NormPass& p, int64_t begin, int64_t end) {
  return p.bf16 ? norm_rows<true>(p, begin, end) : norm_rows<false>(p, begin, end);
}
void norm_back(const NormPass& p, const NormGrads& grads, int64_t begin, int64_t end) {
  return p.bf16 ? norm_rows_back<true>(p, grads, begin, end) : norm_rows_back<false>(p, grads, begin, end);
}
void rotate(const RotatePass& p, int64_t begin, int64_t end) {
  return p.bf16 ? rotate_rows<true>(p, begin, end) : rotate_rows<false>(p, begin, end);
}
void gate(const GatePass& p, int64_t begin, int64_t end) {
  return p.bf16 ? gate_rows<true>(p, begin, end) : gate_rows<false>(p, begin, end);
}
void gate_back(const GatePass& p, const GateGrads& grads, int64_t begin, int64_t end) {
  return p.bf16 ? gate_rows_back<true>(p, grads, begin, end) : gate_rows_back<false>(p, grads, begin, end);
}
void sort(const SortPass& p, const void* from, void* to, int64_t begin, int64_t end) {
  return p.bf16 ? sort_rows<true>(p, from, to, begin, end) : sort_rows<false>(p, from, to, begin, end);
}
void combine(const SortPass& p, const void* from, const float* weights, void* to, int64_t begin, int64_t end) {
  return p.bf16 ? combine_rows<true>(p, from, weights, to, begin, end)
                : combine_rows<false>(p, from, weights, to, begin, end);
}
void combine_back(const SortPass& p, const void* from, const float* weights, const void* grad, void* back,
                  float* grad_weights, int64_t begin, int64_t end) {
  return p.bf16 ? combine_rows_back<true>(p, from, weights, grad, back, grad_weights, begin, end)
                : combine_rows_back<false>(p, from, weights, grad, back, grad_weights, begin, end);
}
void loss(const LossPass& p, int64_t begin, int64_t end) {
  return p.bf16 ? loss_rows<true>(p, begin, end) : loss_rows<false>(p, begin, end);
}

}  // namespace

extern const PassTable passes;
const PassTable passes = {norm, norm_back, rotate, gate, gate_back, sort, combine, combine_back, loss};

}  // namespace mixtral::MIXTRAL_LEVEL
