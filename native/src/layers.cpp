// Whole layers out of the kernels of one instruction set: which thread computes which columns of which rows.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "mixtral/gemm.h"
#include "mixtral/pool.h"

namespace mixtral {

namespace baseline {
extern const GemmTable gemm;
}
namespace avx2 {
extern const GemmTable gemm;
}
namespace avx512vnni {
extern const GemmTable gemm;
}

const GemmTable* find_gemm(std::string_view level) {
#ifdef MIXTRAL_X86
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_vnni = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
  if (level == "avx512vnni" || (level.empty() && has_vnni)) return has_vnni ? &avx512vnni::gemm : nullptr;
  if (level == "avx2" || (level.empty() && has_avx2)) return has_avx2 ? &avx2::gemm : nullptr;
#endif
  return level == "baseline" || level.empty() ? &baseline::gemm : nullptr;
}

namespace {

constexpr int64_t kStrip = 4;  // panels of an item: 64 columns

// Memory of rounded rows.
class RoundedRows {
 public:
  RoundedRows(int64_t rows, int64_t columns) : view_{rows, columns, nullptr} {
    data_.reset(new RoundedBlock[static_cast<size_t>(rows * view_.blocks())]);
    view_.data = data_.get();
  }

  const Rounded& view() const { return view_; }

  void fill(const GemmTable& kernels, const float* x, int64_t rows, int threads) {
    const int64_t blocks = view_.blocks();
    const int64_t step = std::max<int64_t>(1, 64 / blocks);
    parallel((rows + step - 1) / step, threads, [&](int64_t item) {
      for (int64_t row = item * step; row < std::min(rows, (item + 1) * step); ++row) {
        for (int64_t b = 0; b < blocks; ++b) {
          const int count = static_cast<int>(std::min<int64_t>(kBlock, view_.columns - b * kBlock));
          kernels.round(x + row * view_.columns + b * kBlock, count, view_.at(row, b));
        }
      }
    });
  }

 private:
  std::unique_ptr<RoundedBlock[]> data_;
  Rounded view_;
};

// Scratch memory of one thread, which grows and stays.
float* scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats) memory.resize(static_cast<size_t>(floats));
  return memory.data();
}

// Columns [first, first + count) of a result [rows, width] from a strip of panels.
void write_strip(const GemmTable& kernels, const Panels& w, int64_t first_panel, const Rounded& a, const int32_t* rows,
                 int64_t count, float* out, int64_t width) {
  const int64_t last = std::min(first_panel + kStrip, w.count());
  for (int64_t p = first_panel; p < last; ++p) {
    const int64_t columns = std::min<int64_t>(kPanel, w.rows - p * kPanel);
    if (columns == kPanel) {
      kernels.panel(w, p, a, rows, count, out + p * kPanel, width);
      continue;
    }
    float* tile = scratch(count * kPanel);
    kernels.panel(w, p, a, rows, count, tile, kPanel);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(out + i * width + p * kPanel, tile + i * kPanel, static_cast<size_t>(columns) * sizeof(float));
    }
  }
}

}  // namespace

void linear(const GemmTable& kernels, const float* x, int64_t rows, const Panels& weights, float* out, int threads) {
  if (rows == 0) return;
  RoundedRows rounded(rows, weights.columns);
  rounded.fill(kernels, x, rows, threads);
  std::vector<int32_t> numbers(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) numbers[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  parallel((weights.count() + kStrip - 1) / kStrip, threads, [&](int64_t item) {
    write_strip(kernels, weights, item * kStrip, rounded.view(), numbers.data(), rows, out, weights.rows);
  });
}

namespace {

// The assignments of tokens to experts, sorted by expert: where each expert's begin, and token and slot of each.
struct Sorted {
  std::vector<int64_t> starts;
  std::vector<int32_t> tokens, places;  // place [tokens, choices]: number of the assignment

  Sorted(const int32_t* picks, int64_t tokens_, int64_t choices, int64_t experts)
      : starts(static_cast<size_t>(experts + 1)),
        tokens(static_cast<size_t>(tokens_ * choices)),
        places(static_cast<size_t>(tokens_ * choices)) {
    for (int64_t i = 0; i < tokens_ * choices; ++i) ++starts[static_cast<size_t>(picks[i] + 1)];
    for (size_t e = 1; e < starts.size(); ++e) starts[e] += starts[e - 1];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < tokens_ * choices; ++i) {
      const int64_t at = next[static_cast<size_t>(picks[i])]++;
      tokens[static_cast<size_t>(at)] = static_cast<int32_t>(i / choices);
      places[static_cast<size_t>(i)] = static_cast<int32_t>(at);
    }
  }
};

// Columns [256 block, ...) of silu(gate) * up of one expert's rows, rounded at once: only this thread has them all.
void hidden_block(const GemmTable& kernels, const Panels& gate, const Panels& up, const Rounded& x,
                  const Sorted& sorted, int64_t expert, int64_t block, const Rounded& hidden) {
  constexpr int64_t kRows = 64;  // of these columns at a time: the results stay in the cache
  const int64_t columns = std::min<int64_t>(kBlock, gate.rows - block * kBlock);
  const int64_t end = sorted.starts[static_cast<size_t>(expert + 1)];
  float* g = scratch(2 * kRows * kBlock);
  float* u = g + kRows * kBlock;
  for (int64_t at = sorted.starts[static_cast<size_t>(expert)]; at < end; at += kRows) {
    const int64_t count = std::min(kRows, end - at);
    const int32_t* rows = sorted.tokens.data() + at;
    for (int64_t p = 0; p < (columns + kPanel - 1) / kPanel; ++p) {
      kernels.panel(gate, block * (kBlock / kPanel) + p, x, rows, count, g + p * kPanel, kBlock);
      kernels.panel(up, block * (kBlock / kPanel) + p, x, rows, count, u + p * kPanel, kBlock);
    }
    for (int64_t i = 0; i < count; ++i) {
      kernels.swiglu(g + i * kBlock, u + i * kBlock, g + i * kBlock, (columns + kPanel - 1) / kPanel * kPanel);
      kernels.round(g + i * kBlock, static_cast<int>(columns), hidden.at(at + i, block));
    }
  }
}

}  // namespace

void experts(const GemmTable& kernels, const float* x, int64_t tokens, const int32_t* picks, const float* shares,
             int64_t choices, const Experts& weights, float* out, int threads) {
  if (tokens == 0) return;
  const int64_t width = weights.gate[0].columns, wide = weights.gate[0].rows, assigned = tokens * choices;
  RoundedRows rounded(tokens, width), hidden(assigned, wide);
  rounded.fill(kernels, x, tokens, threads);
  const Sorted sorted(picks, tokens, choices, weights.count);
  std::vector<int32_t> used;
  for (int64_t e = 0; e < weights.count; ++e) {
    if (sorted.starts[static_cast<size_t>(e + 1)] > sorted.starts[static_cast<size_t>(e)]) {
      used.push_back(static_cast<int32_t>(e));
    }
  }
  const int64_t blocks = hidden.view().blocks();
  parallel(static_cast<int64_t>(used.size()) * blocks, threads, [&](int64_t item) {
    const int64_t e = used[static_cast<size_t>(item / blocks)];
    hidden_block(kernels, weights.gate[e], weights.up[e], rounded.view(), sorted, e, item % blocks, hidden.view());
  });
  std::vector<int32_t> numbers(static_cast<size_t>(assigned));
  for (int64_t i = 0; i < assigned; ++i) numbers[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  const int64_t strips = (weights.down[0].count() + kStrip - 1) / kStrip;
  parallel(strips, threads, [&](int64_t strip) {
    constexpr int64_t kWide = kStrip * kPanel;
    // A strip of all experts, so that the sum over a token's experts is made where their results are.
    float* parts = scratch(assigned * kWide);
    const int64_t first = strip * kStrip, last = std::min(first + kStrip, weights.down[0].count());
    for (const int32_t e : used) {
      const int64_t start = sorted.starts[static_cast<size_t>(e)], end = sorted.starts[static_cast<size_t>(e + 1)];
      for (int64_t p = first; p < last; ++p) {
        kernels.panel(weights.down[e], p, hidden.view(), numbers.data() + start, end - start,
                      parts + start * kWide + (p - first) * kPanel, kWide);
      }
    }
    const int64_t columns = std::min<int64_t>(kWide, width - first * kPanel);
    for (int64_t t = 0; t < tokens; ++t) {
      float* to = out + t * width + first * kPanel;
      for (int64_t c = 0; c < columns; ++c) to[c] = 0.0f;
      for (int64_t choice = 0; choice < choices; ++choice) {
        const float* from = parts + static_cast<int64_t>(sorted.places[static_cast<size_t>(t * choices + choice)]) * kWide;
        const float share = shares[t * choices + choice];
        for (int64_t c = 0; c < columns; ++c) to[c] += share * from[c];
      }
    }
  });
}

}  // namespace mixtral
