// Products, router and experts: inputs are rounded once, then strips of columns are shared out to threads.
#include "mixtral/layers.h"

#include "activations.h"
#include "mixtral/pool.h"
#include "mixtral/processor.h"

namespace mixtral {

// The tables that an instruction set may have of its own.
#define TABLES(level)                    \
  namespace level {                      \
  extern const GemmTable gemm;           \
  extern const DenseTable dense;         \
  extern const RowTable rows;            \
  extern const AttentionTable attention; \
  extern const DocumentTable documents;  \
  extern const DecodeTable decode;       \
  extern const PassTable passes;         \
  extern const LimitTable limits;        \
  }

// Products of integers, products of bfloat16 and attention; rows are those of `other`.
#define KERNELS(level, tiles, integers, floats, other) \
  namespace level {                                    \
  const Kernels kernels = {#level, tiles, integers::gemm, level::dense, other::rows, floats::attention, \
                           floats::documents, floats::decode, floats::passes, level::limits};       \
  }

TABLES(baseline)
KERNELS(baseline, false, baseline, baseline, baseline)
#ifdef MIXTRAL_X86
TABLES(avx2)
TABLES(avx512vnni)
TABLES(avx512bf16)
TABLES(amx)
KERNELS(avx2, false, avx2, avx2, avx2)
KERNELS(avx512vnni, false, avx512vnni, avx512vnni, avx512vnni)
KERNELS(avx512bf16, false, avx512vnni, avx512bf16, avx512vnni)
KERNELS(amx, true, amx, avx512bf16, avx512vnni)
#endif

const Kernels* find_kernels(std::string_view level) {
#ifdef MIXTRAL_X86
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_vnni = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
  const bool has_bf16 = has_vnni && __builtin_cpu_supports("avx512bf16");
  // Asked only if it matters: the system is asked for permission.
  const bool has_tiles = (level == "amx" || level.empty()) && has_bf16 && has_amx();
  if (level == "amx" || has_tiles) return has_tiles ? &amx::kernels : nullptr;
  if (level == "avx512bf16" || (level.empty() && has_bf16)) return has_bf16 ? &avx512bf16::kernels : nullptr;
  if (level == "avx512vnni" || (level.empty() && has_vnni)) return has_vnni ? &avx512vnni::kernels : nullptr;
  if (level == "avx2" || (level.empty() && has_avx2)) return has_avx2 ? &avx2::kernels : nullptr;
#endif
  return level == "baseline" || level.empty() ? &baseline::kernels : nullptr;
}

namespace {

constexpr int64_t kWide = kStrip * kPanel;

// Item number k of `items`: they are cut into a run for each thread, and the runs are taken in turns, so that a thread
// mostly goes on where it stopped. Memory is fastest in long runs.
int64_t in_turn(int64_t k, int64_t items, int threads) {
  const int64_t runs = std::max<int64_t>(1, threads), run = k % runs;
  return run * (items / runs) + std::min(run, items % runs) + k / runs;
}

std::vector<int32_t> numbers(int64_t count) {
  std::vector<int32_t> all(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) all[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  return all;
}

// Calls work(row, values) with every row of the input, normed if it has a norm. Few rows stay on one thread: waking
// another one takes longer.
template <typename Work>
void each_row(const Kernels& kernels, const Input& input, int threads, const Work& work) {
  int64_t step = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, input.columns));
  // The rows of a tile share lines of memory.
  if (kernels.tiles) step = (step + kTile - 1) / kTile * kTile;
  const auto item = [&](int64_t number) {
    for (int64_t row = number * step; row < std::min(input.rows, (number + 1) * step); ++row) {
      const float* x = input.x + row * input.columns;
      if (input.norm != nullptr) {
        float* normed = scratch(0, input.columns);
        kernels.rows.norm(x, input.norm, input.eps, input.columns, normed);
        x = normed;
      }
      work(row, x);
    }
  };
  parallel((input.rows + step - 1) / step, threads, item);
}

// out [rows, stride] (+)= the product with panels [first, first + kStrip) of one matrix, whose column 0 is out's `left`.
void write_strip(const Kernels& kernels, const Weights& w, int64_t first, const Activations& a, const int32_t* rows,
                 int64_t count, const float* residual, float* out, int64_t stride) {
  const int64_t columns = std::min(kWide, w.rows() - first * kPanel), panels = (columns + kPanel - 1) / kPanel;
  if (residual == nullptr && columns % kPanel == 0) {
    a.multiply(kernels, w, first, panels, rows, count, out, stride);
    return;
  }
  float* tile = scratch(0, count * kWide);
  a.multiply(kernels, w, first, panels, rows, count, tile, kWide);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < columns; ++c) {
      const float found = tile[i * kWide + c];
      out[i * stride + c] = residual == nullptr ? found : residual[i * stride + c] + found;
    }
  }
}

}  // namespace

void project(const Kernels& kernels, const Input& input, const Weights* const* matrices, int64_t count,
             const float* residual, float* out, int threads) {
  if (input.rows == 0) return;
  Forms forms;
  int64_t width = 0;
  struct Strip {
    const Weights* weights;
    int64_t first, left;
  };
  std::vector<Strip> strips;
  for (int64_t i = 0; i < count; ++i) {
    forms.add(*matrices[i]);
    for (int64_t row = 0; row < matrices[i]->rows(); row += kWide) strips.push_back({matrices[i], row / kPanel, width + row});
    width += matrices[i]->rows();
  }
  const Activations activations(kernels, input.rows, input.columns, forms);
  each_row(kernels, input, threads, [&](int64_t row, const float* x) { activations.fill_row(kernels, x, row); });
  const std::vector<int32_t> all = numbers(input.rows);
  const int64_t items = static_cast<int64_t>(strips.size());
  parallel(items, threads, [&](int64_t number) {
    const Strip& strip = strips[static_cast<size_t>(in_turn(number, items, threads))];
    write_strip(kernels, *strip.weights, strip.first, activations, all.data(), input.rows,
                residual == nullptr ? nullptr : residual + strip.left, out + strip.left, width);
  });
}

namespace {

// The assignments of rows to experts, sorted by expert: where each expert's begin, a multiple of `step`, how many there
// are, and the row of each, -1 where none is.
struct Sorted {
  std::vector<int64_t> starts, counts;
  std::vector<int32_t> rows, places;  // place [rows, choices]: number of the assignment
  std::vector<int64_t> used;          // experts that have any
  int64_t total = 0;                  // numbers, those that are left out to the next multiple included

  Sorted(const Picks& picks, int64_t rows_, int64_t experts, int64_t step)
      : starts(static_cast<size_t>(experts)),
        counts(static_cast<size_t>(experts)),
        places(static_cast<size_t>(rows_ * picks.choices)) {
    const int64_t assigned = rows_ * picks.choices;
    for (int64_t i = 0; i < assigned; ++i) ++counts[static_cast<size_t>(picks.experts[i])];
    for (size_t e = 0; e < counts.size(); ++e) {
      if (counts[e] > 0) used.push_back(static_cast<int64_t>(e));
      starts[e] = total;
      total += (counts[e] + step - 1) / step * step;
    }
    rows.assign(static_cast<size_t>(total), -1);
    std::vector<int64_t> next = starts;
    for (int64_t i = 0; i < assigned; ++i) {
      const int64_t at = next[static_cast<size_t>(picks.experts[i])]++;
      rows[static_cast<size_t>(at)] = static_cast<int32_t>(i / picks.choices);
      places[static_cast<size_t>(i)] = static_cast<int32_t>(at);
    }
  }

  int64_t start(int64_t expert) const { return starts[static_cast<size_t>(expert)]; }
  int64_t count(int64_t expert) const { return counts[static_cast<size_t>(expert)]; }
};

// Columns [256 block, ...) of silu(gate) * up of one expert's rows, rounded at once: only this thread has them all.
// `places`: where in x the row of each assignment is.
void hidden_block(const Kernels& kernels, const Weights& gate, const Weights& up, const Activations& x,
                  const std::vector<int32_t>& places, const Sorted& sorted, int64_t expert, int64_t block,
                  const Activations& hidden) {
  // Of these columns at a time: the results stay in the cache. Tiles unpack the weights once for all of them.
  const int64_t kRows = kernels.tiles ? 128 : 64;
  const int64_t columns = std::min<int64_t>(kBlock, gate.rows() - block * kBlock);
  const int64_t panels = (columns + kPanel - 1) / kPanel, end = sorted.start(expert) + sorted.count(expert);
  float* g = scratch(0, 2 * kRows * kBlock);
  float* u = g + kRows * kBlock;
  for (int64_t at = sorted.start(expert); at < end; at += kRows) {
    const int64_t count = std::min(kRows, end - at);
    const int32_t* rows = places.data() + at;
    // First all of one matrix, then all of the other: memory is fastest in long runs.
    const int64_t first = block * (kBlock / kPanel);
    x.multiply(kernels, gate, first, panels, rows, count, g, kBlock);
    x.multiply(kernels, up, first, panels, rows, count, u, kBlock);
    for (int64_t i = 0; i < count; ++i) {
      kernels.gemm.swiglu(g + i * kBlock, u + i * kBlock, g + i * kBlock, panels * kPanel);
      hidden.fill_block(kernels, g + i * kBlock, at + i, block);
    }
  }
}

// A strip of the result: of all experts, so that the sum over a row's experts is made where their results are.
void down_strip(const Kernels& kernels, const Experts& weights, const Activations& hidden, const Sorted& sorted,
                const std::vector<int32_t>& all, const Picks& picks, int64_t rows, int64_t first, const float* residual,
                float* out) {
  const int64_t width = weights.down[0].rows(), columns = std::min(kWide, width - first * kPanel);
  float* parts = scratch(0, static_cast<int64_t>(all.size()) * kWide);
  for (const int64_t e : sorted.used) {
    const int64_t start = sorted.start(e);
    hidden.multiply(kernels, weights.down[e], first, (columns + kPanel - 1) / kPanel, all.data() + start, sorted.count(e),
                    parts + start * kWide, kWide);
  }
  for (int64_t row = 0; row < rows; ++row) {
    float sum[kWide] = {};
    for (int64_t choice = 0; choice < picks.choices; ++choice) {
      const size_t i = static_cast<size_t>(row * picks.choices + choice);
      const float* from = parts + static_cast<int64_t>(sorted.places[i]) * kWide;
      for (int64_t c = 0; c < columns; ++c) sum[c] += picks.shares[i] * from[c];
    }
    const int64_t at = row * width + first * kPanel;
    for (int64_t c = 0; c < columns; ++c) out[at + c] = residual == nullptr ? sum[c] : residual[at + c] + sum[c];
  }
}

Forms inputs_of(const Experts& weights) {
  Forms forms;
  for (int64_t e = 0; e < weights.count; ++e) forms.add(weights.gate[e]), forms.add(weights.up[e]);
  return forms;
}

// The experts of rows whose activations are there already. For tiles they are copied, so that those of an expert are
// neighbours.
void mix(const Kernels& kernels, const Activations& x, int64_t rows, const Picks& picks, const Experts& weights,
         const float* residual, float* out, int threads) {
  const Forms inputs = inputs_of(weights);
  Forms forms;
  for (int64_t e = 0; e < weights.count; ++e) forms.add(weights.down[e]);
  const Sorted sorted(picks, rows, weights.count, kernels.tiles && (inputs.bf16 || forms.bf16) ? kTile : 1);
  const std::vector<int32_t> all = numbers(sorted.total);
  const Activations gathered(kernels, kernels.tiles ? sorted.total : 0, weights.down[0].rows(), inputs);
  parallel((gathered.rows() + kTile - 1) / kTile, threads, [&](int64_t tile) {
    for (int64_t at = tile * kTile; at < std::min(gathered.rows(), (tile + 1) * kTile); ++at) {
      const int32_t row = sorted.rows[static_cast<size_t>(at)];
      if (row >= 0) gathered.copy_row(x, row, at);
    }
  });
  const Activations hidden(kernels, sorted.total, weights.down[0].columns(), forms);
  const int64_t blocks = hidden.blocks();
  const int64_t items = static_cast<int64_t>(sorted.used.size()) * blocks;
  parallel(items, threads, [&](int64_t number) {
    const int64_t item = in_turn(number, items, threads);
    const int64_t e = sorted.used[static_cast<size_t>(item / blocks)];
    hidden_block(kernels, weights.gate[e], weights.up[e], kernels.tiles ? gathered : x, kernels.tiles ? all : sorted.rows,
                 sorted, e, item % blocks, hidden);
  });
  const int64_t strips = (weights.down[0].rows() + kWide - 1) / kWide;
  parallel(strips, threads, [&](int64_t number) {
    const int64_t strip = in_turn(number, strips, threads);
    down_strip(kernels, weights, hidden, sorted, all, picks, rows, strip * kStrip, residual, out);
  });
}

// The largest logits of a row, in descending order, the lower expert first where two are equal; and their softmax.
void choose(const Kernels& kernels, const float* logits, int64_t count, int64_t choices, int64_t* picks, float* shares) {
  for (int64_t choice = 0; choice < choices; ++choice) {
    int64_t best = -1;
    for (int64_t e = 0; e < count; ++e) {
      if (std::find(picks, picks + choice, e) != picks + choice) continue;
      // The first one is taken without comparing: logits that are not numbers still pick somebody.
      if (best < 0 || logits[e] > logits[best]) best = e;
    }
    picks[choice] = best;
  }
  float sum = 0.0f;
  for (int64_t i = 0; i < choices; ++i) sum += shares[i] = kernels.rows.exponential(logits[picks[i]] - logits[picks[0]]);
  for (int64_t i = 0; i < choices; ++i) shares[i] /= sum;
}

}  // namespace

void experts(const Kernels& kernels, const Input& input, const Picks& picks, const Experts& weights,
             const float* residual, float* out, int threads) {
  if (input.rows == 0) return;
  const Activations activations(kernels, input.rows, input.columns, inputs_of(weights));
  each_row(kernels, input, threads, [&](int64_t row, const float* x) { activations.fill_row(kernels, x, row); });
  mix(kernels, activations, input.rows, picks, weights, residual, out, threads);
}

void mixture(const Kernels& kernels, const Input& input, const Routing& routing, const Experts& weights,
             const float* residual, float* out, int threads) {
  if (input.rows == 0) return;
  const Activations activations(kernels, input.rows, input.columns, inputs_of(weights));
  each_row(kernels, input, threads, [&](int64_t row, const float* x) {
    float* logits = routing.logits + row * weights.count;
    kernels.rows.scores(x, routing.router, weights.count, input.columns, logits);
    choose(kernels, logits, weights.count, routing.choices, routing.picks + row * routing.choices,
           routing.shares + row * routing.choices);
    activations.fill_row(kernels, x, row);
  });
  mix(kernels, activations, input.rows, {routing.picks, routing.shares, routing.choices}, weights, residual, out, threads);
}

}  // namespace mixtral
