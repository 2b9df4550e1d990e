// Python's view of the layers: checks every shape, releases the GIL, calls one operation.
#include "bind_layers.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <tuple>

#include "bind_weights.h"

namespace {

using Values = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Results = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using PicksIn = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using PicksOut = nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Pages = nb::ndarray<uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

const mixtral::Kernels& kernels_of(const std::string& level) {
  const mixtral::Kernels* found = mixtral::find_kernels(level);
  require(found != nullptr, "this processor does not run the kernels '" + level + "'");
  return *found;
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const char* name : mixtral::kLevels) {
    if (mixtral::find_kernels(name) != nullptr) names.emplace_back(name);
  }
  return names;
}

int64_t size(const auto& array, size_t axis) { return static_cast<int64_t>(array.shape(axis)); }

mixtral::Input input_of(const Values& x, const std::optional<Vector>& norm, double eps) {
  require_aligned(x, "x");
  require(!norm || norm->shape(0) == x.shape(1), "norm must have " + std::to_string(x.shape(1)) + " values");
  if (norm) require_aligned(*norm, "norm");
  return {x.data(), size(x, 0), size(x, 1), norm ? norm->data() : nullptr, static_cast<float>(eps)};
}

const float* residual_of(const std::optional<Values>& residual, const Results& out) {
  if (!residual) return nullptr;
  require_shape(*residual, "residual", size(out, 0), size(out, 1));
  return residual->data();
}

void project(Values x, const std::vector<Matrix*>& matrices, Results out, int threads, std::optional<Vector> norm,
             double eps, std::optional<Values> residual, const std::string& level) {
  const mixtral::Input input = input_of(x, norm, eps);
  std::vector<const mixtral::Weights*> weights;
  int64_t width = 0;
  for (const Matrix* matrix : matrices) {
    weights.push_back(&matrix->weights());
    require(weights.back()->columns() == input.columns, "x must have " + std::to_string(weights.back()->columns()) + " columns");
    width += weights.back()->rows();
  }
  require_shape(out, "out", input.rows, width);
  const float* beside = residual_of(residual, out);
  const mixtral::Kernels& kernels = kernels_of(level);
  nb::gil_scoped_release release;
  mixtral::project(kernels, input, weights.data(), static_cast<int64_t>(weights.size()), beside, out.data(), threads);
}

void experts(Values x, PicksIn picks, Values shares, const ExpertSet& weights, Results out, int threads,
             const std::string& level) {
  const mixtral::Input input = input_of(x, std::nullopt, 0.0);
  const int64_t choices = size(picks, 1);
  require_shape(x, "x", input.rows, weights.width());
  require_shape(out, "out", input.rows, weights.width());
  require_shape(picks, "picks", input.rows, choices);
  require_shape(shares, "shares", input.rows, choices);
  const mixtral::Experts view = weights.view();
  for (int64_t i = 0; i < input.rows * choices; ++i) {
    require(picks.data()[i] >= 0 && picks.data()[i] < view.count, "picks name an expert that is not there");
  }
  const mixtral::Kernels& kernels = kernels_of(level);
  nb::gil_scoped_release release;
  mixtral::experts(kernels, input, {picks.data(), shares.data(), choices}, view, nullptr, out.data(), threads);
}

void mixture(Values x, Values router, const ExpertSet& weights, Results out, Results logits, PicksOut picks,
             Results shares, int threads, std::optional<Vector> norm, double eps, std::optional<Values> residual,
             const std::string& level) {
  const mixtral::Input input = input_of(x, norm, eps);
  const mixtral::Experts view = weights.view();
  const int64_t choices = size(picks, 1);
  require_shape(x, "x", input.rows, weights.width());
  require_shape(out, "out", input.rows, weights.width());
  require_shape(router, "router", view.count, weights.width());
  require_shape(logits, "logits", input.rows, view.count);
  require_shape(picks, "picks", input.rows, choices);
  require_shape(shares, "shares", input.rows, choices);
  require(choices >= 1 && choices <= view.count, "more choices than experts");
  const float* beside = residual_of(residual, out);
  const mixtral::Kernels& kernels = kernels_of(level);
  nb::gil_scoped_release release;
  mixtral::mixture(kernels, input, {router.data(), choices, logits.data(), picks.data(), shares.data()}, view, beside,
                   out.data(), threads);
}

// The sequences of a batch, and how their heads are stored: what all layers share.
class Spans {
 public:
  using Each = std::tuple<std::vector<int32_t>, int64_t, int64_t>;

  explicit Spans(const std::vector<Each>& spans) {
    for (const auto& [pages, stored, count] : spans) {
      require(stored >= 0 && count > 0, "a sequence needs stored >= 0 and count > 0");
      const int64_t room = static_cast<int64_t>(pages.size()) * mixtral::kPage;
      require(count <= room && stored <= room - count, "a sequence has too few pages");
      for (const int32_t page : pages) {
        require(page >= 0, "a page has a negative number");
        most_ = std::max<int64_t>(most_, page);
      }
      spans_.push_back({pages, stored, count});
      tokens_ += count;
    }
  }

  const std::vector<mixtral::Span>& spans() const { return spans_; }
  int64_t most() const { return most_; }
  int64_t tokens() const { return tokens_; }

 private:
  std::vector<mixtral::Span> spans_;
  int64_t most_ = -1, tokens_ = 0;
};

mixtral::Heads heads_of(int64_t queries, int64_t keys, int64_t head_size, int store) {
  require(store >= 0 && store <= 2, "store must be 0 to 2");
  require(keys >= 1 && queries >= 1 && queries % keys == 0, "query heads must be a multiple of key heads");
  require(head_size >= 2 && head_size <= 1024 && head_size % 2 == 0, "the head size must be even, 2 to 1024");
  return {queries, keys, head_size, static_cast<mixtral::Store>(store)};
}

void attend(Values qkv, Values cosines, Values sines, const Spans& spans, Pages store, Results out, int64_t head_size,
            int kind, int threads, const std::string& level) {
  require(head_size > 0 && out.shape(1) % static_cast<size_t>(head_size) == 0, "out must be whole heads");
  const mixtral::Heads heads = heads_of(size(out, 1) / head_size, size(store, 1), head_size, kind);
  const int64_t tokens = spans.tokens();
  require_shape(qkv, "qkv", tokens, (heads.queries + 2 * heads.keys) * head_size);
  require_shape(out, "out", tokens, heads.queries * head_size);
  require_shape(cosines, "cosines", tokens, head_size / 2);
  require_shape(sines, "sines", tokens, head_size / 2);
  require(size(store, 2) == heads.block_bytes(), "store must have blocks of " + std::to_string(heads.block_bytes()) + " bytes");
  require_aligned(store, "store", alignof(float));
  require(spans.most() < size(store, 0), "a page is not in the store");
  const mixtral::Kernels& kernels = kernels_of(level);
  nb::gil_scoped_release release;
  mixtral::attend(kernels, heads, qkv.data(), cosines.data(), sines.data(), spans.spans(), store.data(), out.data(),
                  threads);
}

void norm_rows(Values x, Vector weight, double eps, Results out, const std::string& level) {
  require_aligned(x, "x");
  require_aligned(weight, "weight");
  require_shape(out, "out", size(x, 0), size(x, 1));
  require(weight.shape(0) == x.shape(1), "weight must have " + std::to_string(x.shape(1)) + " values");
  const mixtral::Kernels& kernels = kernels_of(level);
  for (int64_t row = 0; row < size(x, 0); ++row) {
    const int64_t at = row * size(x, 1);
    kernels.rows.norm(x.data() + at, weight.data(), static_cast<float>(eps), size(x, 1), out.data() + at);
  }
}

}  // namespace

void bind_layers(nb::module_& module) {
  bind_weights(module);
  module.def("kernel_levels", &levels, "Instruction sets whose kernels this processor runs, the fastest one last.");
  module.def("project", &project, nb::arg("x").noconvert(), nb::arg("matrices"), nb::arg("out").noconvert(),
             nb::arg("threads"), nb::arg("norm").noconvert().none() = nb::none(), nb::arg("eps") = 0.0,
             nb::arg("residual").noconvert().none() = nb::none(), nb::arg("level") = "",
             "out = (residual +) (normed) x times every matrix transposed, side by side; float32.");
  module.def("experts", &experts, nb::arg("x").noconvert(), nb::arg("picks").noconvert(), nb::arg("shares").noconvert(),
             nb::arg("weights"), nb::arg("out").noconvert(), nb::arg("threads"), nb::arg("level") = "",
             "out = the sum of the chosen experts of each row of x, float32.");
  module.def("mixture", &mixture, nb::arg("x").noconvert(), nb::arg("router").noconvert(), nb::arg("weights"),
             nb::arg("out").noconvert(), nb::arg("logits").noconvert(), nb::arg("picks").noconvert(),
             nb::arg("shares").noconvert(), nb::arg("threads"), nb::arg("norm").noconvert().none() = nb::none(),
             nb::arg("eps") = 0.0, nb::arg("residual").noconvert().none() = nb::none(), nb::arg("level") = "",
             "Router and experts: out = (residual +) the mixture for each row of (normed) x; writes the routing.");
  nb::class_<Spans>(module, "Spans", "Pages, stored tokens and new tokens of every sequence of a batch.")
      .def(nb::init<std::vector<Spans::Each>>(), nb::arg("spans"));
  module.def(
      "block_bytes",
      [](int64_t head_size, int kind) { return heads_of(1, 1, head_size, kind).block_bytes(); },
      nb::arg("head_size"), nb::arg("kind"), "Bytes of the keys and values of 64 tokens of one key head.");
  module.def("attend", &attend, nb::arg("qkv").noconvert(), nb::arg("cosines").noconvert(),
             nb::arg("sines").noconvert(), nb::arg("spans"), nb::arg("store").noconvert(), nb::arg("out").noconvert(),
             nb::arg("head_size"), nb::arg("kind"), nb::arg("threads"), nb::arg("level") = "",
             "Rotates, stores, and attends: out [tokens, query heads * head size].");
  module.def("norm", &norm_rows, nb::arg("x").noconvert(), nb::arg("weight").noconvert(), nb::arg("eps"),
             nb::arg("out").noconvert(), nb::arg("level") = "", "out = the root-mean-square norm of every row of x.");
}
