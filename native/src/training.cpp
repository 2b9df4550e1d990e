// Attention inside documents, the longest ones first, so that no thread is left with one of them at the end; and passes
// over rows, in parts of a size that does not depend on the number of threads.
#include "mixtral/training.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>

#include "mixtral/pool.h"

namespace mixtral {
namespace {

constexpr int64_t kPart = 1 << 15;  // numbers

// Between these operations torch computes with threads of OpenMP, which wait for their next work busily. A pool of our
// own would share the cores with them, so theirs is used where there is one: the entry that compilers call for a parallel
// region (GCC's libgomp, and LLVM's under the same name), looked for among the libraries of the process.
using Region = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

Region region_of_torch() {
  static const auto found = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

template <typename Work>
void share_out(int64_t items, int threads, const Work& work) {
  const Region region = region_of_torch();
  if (region == nullptr || threads == 1 || items <= 1) return parallel(items, threads, work);
  struct Job {
    const Work& work;
    const int64_t items;
    std::atomic<int64_t> next;
  } job{work, items, 0};
  const auto body = [](void* data) {
    Job& own = *static_cast<Job*>(data);
    for (int64_t i; (i = own.next.fetch_add(1, std::memory_order_relaxed)) < own.items;) own.work(i);
  };
  region(body, &job, static_cast<unsigned>(std::min<int64_t>(threads, items)), 0);
}

// Calls work(begin, end) for parts of rows of `columns` numbers.
template <typename Work>
void over_rows(int64_t rows, int64_t columns, int threads, const Work& work) {
  const int64_t some = std::max<int64_t>(1, kPart / columns);
  share_out((rows + some - 1) / some, threads, [&](int64_t i) { work(i * some, std::min(rows, (i + 1) * some)); });
}

template <typename Rows, typename Number>
void decode_with(Rows rows_of, const Grouped& from, int64_t rows, Number* out, int threads) {
  over_rows(rows, from.columns, threads, [&](int64_t begin, int64_t end) {
    const FloatMode mode;
    rows_of(from, begin, end, out);
  });
}

}  // namespace

void attend_documents(const Kernels& kernels, const Packed& shape, const std::vector<int64_t>& lengths,
                      const Attended& a, const AttendedGrads* grads, int threads) {
  std::vector<Piece> pieces;
  int64_t first = 0;
  for (const int64_t length : lengths) {
    for (int64_t head = 0; head < shape.keys; ++head) pieces.push_back({first, length, head});
    first += length;
  }
  std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& x, const Piece& y) { return x.length > y.length; });
  share_out(static_cast<int64_t>(pieces.size()), threads, [&](int64_t i) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    if (grads == nullptr) {
      kernels.documents.forward(shape, piece, a);
    } else {
      kernels.documents.backward(shape, piece, a, *grads);
    }
  });
}

void norm(const Kernels& kernels, const NormPass& p, int64_t rows, int threads) {
  over_rows(rows, p.columns, threads, [&](int64_t begin, int64_t end) { kernels.passes.norm(p, begin, end); });
}

void norm_back(const Kernels& kernels, const NormPass& p, const NormGrads& grads, int64_t rows, int threads) {
  // Every part has sums of its own, which are added in one order.
  constexpr int64_t kParts = 64;
  const int64_t some = (rows + kParts - 1) / kParts, parts = some == 0 ? 0 : (rows + some - 1) / some;
  std::vector<float> sums(static_cast<size_t>(parts * p.columns), 0.0f);
  share_out(parts, threads, [&](int64_t i) {
    const NormGrads own{grads.out, grads.x, sums.data() + i * p.columns};
    kernels.passes.norm_back(p, own, i * some, std::min(rows, (i + 1) * some));
  });
  std::fill(grads.weight, grads.weight + p.columns, 0.0f);
  for (int64_t i = 0; i < parts; ++i) {
    for (int64_t k = 0; k < p.columns; ++k) grads.weight[k] += sums[static_cast<size_t>(i * p.columns + k)];
  }
}

void rotate(const Kernels& kernels, const RotatePass& p, int64_t tokens, int threads) {
  over_rows(tokens, p.heads * p.size, threads,
            [&](int64_t begin, int64_t end) { kernels.passes.rotate(p, begin, end); });
}

void gate(const Kernels& kernels, const GatePass& p, int64_t rows, int threads) {
  over_rows(rows, p.hidden, threads, [&](int64_t begin, int64_t end) { kernels.passes.gate(p, begin, end); });
}

void gate_back(const Kernels& kernels, const GatePass& p, const GateGrads& grads, int64_t rows, int threads) {
  over_rows(rows, p.hidden, threads,
            [&](int64_t begin, int64_t end) { kernels.passes.gate_back(p, grads, begin, end); });
}

void sort_rows(const Kernels& kernels, const SortPass& p, const void* from, void* to, int64_t sorted, int threads) {
  over_rows(sorted, p.columns, threads,
            [&](int64_t begin, int64_t end) { kernels.passes.sort(p, from, to, begin, end); });
}

void combine(const Kernels& kernels, const SortPass& p, const void* from, const float* weights, void* to, int64_t tokens,
             int threads) {
  over_rows(tokens, p.columns, threads,
            [&](int64_t begin, int64_t end) { kernels.passes.combine(p, from, weights, to, begin, end); });
}

void combine_back(const Kernels& kernels, const SortPass& p, const void* from, const float* weights, const void* grad,
                  void* back, float* grad_weights, int64_t tokens, int threads) {
  over_rows(tokens, p.columns, threads, [&](int64_t begin, int64_t end) {
    kernels.passes.combine_back(p, from, weights, grad, back, grad_weights, begin, end);
  });
}

void loss(const Kernels& kernels, const LossPass& p, int64_t rows, int threads) {
  over_rows(rows, p.columns, threads, [&](int64_t begin, int64_t end) { kernels.passes.loss(p, begin, end); });
}

void decode(const Kernels& kernels, const Grouped& from, int64_t rows, uint16_t* out, int threads) {
  decode_with(kernels.decode.halves, from, rows, out, threads);
}

void decode(const Kernels& kernels, const Grouped& from, int64_t rows, float* out, int threads) {
  decode_with(kernels.decode.floats, from, rows, out, threads);
}

}  // namespace mixtral
