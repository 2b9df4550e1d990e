// Python's view of the operations of training: checks every shape, releases the GIL, calls one operation.
#include "bind_training.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bind_weights.h"
#include "mixtral/training.h"

namespace {

// Float32, or the bits of bfloat16.
using Heads = nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Norms = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

struct Called {
  const mixtral::Kernels& kernels;
  mixtral::Packed shape;
};

void require_heads(const Heads& array, const char* name, const Heads& like, int64_t heads) {
  require(array.dtype() == like.dtype(), std::string(name) + " must have the type of q");
  require(array.shape(0) == like.shape(0) && static_cast<int64_t>(array.shape(1)) == heads &&
              array.shape(2) == like.shape(2),
          std::string(name) + " must have the tokens and the head size of q, and " + std::to_string(heads) + " heads");
  require(reinterpret_cast<uintptr_t>(array.data()) % (array.dtype().bits / 8) == 0, std::string(name) + " must be aligned");
}

Called check(const Heads& q, const Heads& k, const Heads& v, const Heads& out, const Norms& norms,
             const std::vector<int64_t>& lengths, int threads, const std::string& level) {
  const mixtral::Kernels* kernels = mixtral::find_kernels(level);
  require(kernels != nullptr, "this processor does not run the kernels '" + level + "'");
  const bool bf16 = q.dtype() == nb::dtype<uint16_t>();
  require(bf16 || q.dtype() == nb::dtype<float>(), "q must be float32 or the bits of bfloat16");
  const auto tokens = static_cast<int64_t>(q.shape(0)), queries = static_cast<int64_t>(q.shape(1));
  const auto keys = static_cast<int64_t>(k.shape(1)), size = static_cast<int64_t>(q.shape(2));
  require(keys > 0 && queries % keys == 0, "the heads of q must be a multiple of those of k");
  require(size > 0 && size <= 1024, "the head size must be 1 to 1024");
  require_heads(q, "q", q, queries);
  require_heads(k, "k", q, keys);
  require_heads(v, "v", q, keys);
  require_heads(out, "out", q, queries);
  require_shape(norms, "norms", tokens, queries);
  int64_t sum = 0;
  for (const int64_t length : lengths) {
    require(length > 0 && length <= tokens - sum, "lengths must be positive and add up to the tokens");
    sum += length;
  }
  require(sum == tokens, "lengths must be positive and add up to the tokens");
  require(threads >= 1 && threads <= 1024, "threads must be 1 to 1024");
  return {*kernels, {queries, keys, size, bf16}};
}

void forward(Heads q, Heads k, Heads v, const std::vector<int64_t>& lengths, Heads out, Norms norms, int threads,
             const std::string& level) {
  const Called called = check(q, k, v, out, norms, lengths, threads, level);
  const mixtral::Attended a{q.data(), k.data(), v.data(), out.data(), norms.data()};
  nb::gil_scoped_release release;
  mixtral::attend_documents(called.kernels, called.shape, lengths, a, nullptr, threads);
}

void backward(Heads q, Heads k, Heads v, const std::vector<int64_t>& lengths, Heads out, Norms norms, Heads grad_out,
              Heads grad_q, Heads grad_k, Heads grad_v, int threads, const std::string& level) {
  const Called called = check(q, k, v, out, norms, lengths, threads, level);
  require_heads(grad_out, "grad_out", q, called.shape.queries);
  require_heads(grad_q, "grad_q", q, called.shape.queries);
  require_heads(grad_k, "grad_k", q, called.shape.keys);
  require_heads(grad_v, "grad_v", q, called.shape.keys);
  const mixtral::Attended a{q.data(), k.data(), v.data(), out.data(), norms.data()};
  const mixtral::AttendedGrads grads{grad_out.data(), grad_q.data(), grad_k.data(), grad_v.data()};
  nb::gil_scoped_release release;
  mixtral::attend_documents(called.kernels, called.shape, lengths, a, &grads, threads);
}

// --- passes ----------------------------------------------------------------------------------------------------------

// Rows of float32, or of the bits of bfloat16.
using Rows = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ByteRows = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Line = nb::ndarray<nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats1 = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Integers1 = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Integers2 = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

int64_t size(const auto& array, size_t axis) { return static_cast<int64_t>(array.shape(axis)); }

const mixtral::Kernels& kernels_of(const std::string& level, int threads) {
  const mixtral::Kernels* found = mixtral::find_kernels(level);
  require(found != nullptr, "this processor does not run the kernels '" + level + "'");
  require(threads >= 1 && threads <= 1024, "threads must be 1 to 1024");
  return *found;
}

bool is_bf16(const auto& x) {
  const bool bf16 = x.dtype() == nb::dtype<uint16_t>();
  require(bf16 || x.dtype() == nb::dtype<float>(), "rows must be float32 or the bits of bfloat16");
  return bf16;
}

void require_rows(const Rows& array, const char* name, const Rows& like, int64_t rows, int64_t columns) {
  require(array.dtype() == like.dtype(), std::string(name) + " has another type than the other rows");
  require(size(array, 0) == rows && size(array, 1) == columns,
          std::string(name) + " must be [" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
  require(reinterpret_cast<uintptr_t>(array.data()) % (array.dtype().bits / 8) == 0, std::string(name) + " must be aligned");
}

void require_length(const auto& array, const char* name, int64_t length) {
  require(size(array, 0) == length, std::string(name) + " must have " + std::to_string(length) + " numbers");
}

mixtral::NormPass norm_of(const Rows& x, const Line& weight, double eps, const Floats1& scales) {
  require(weight.dtype() == x.dtype(), "weight must have the type of x");
  require_rows(x, "x", x, size(x, 0), size(x, 1));
  require_length(weight, "weight", size(x, 1));
  require_length(scales, "scales", size(x, 0));
  return {size(x, 1), is_bf16(x), static_cast<float>(eps), x.data(), weight.data(), nullptr, scales.data()};
}

void norm(Rows x, Line weight, double eps, Rows out, Floats1 scales, int threads, const std::string& level) {
  mixtral::NormPass p = norm_of(x, weight, eps, scales);
  require_rows(out, "out", x, size(x, 0), size(x, 1));
  p.out = out.data();
  const mixtral::Kernels& kernels = kernels_of(level, threads);
  nb::gil_scoped_release release;
  mixtral::norm(kernels, p, size(x, 0), threads);
}

void norm_back(Rows x, Line weight, Floats1 scales, Rows grad_out, Rows grad_x, Floats1 grad_weight, int threads,
               const std::string& level) {
  const mixtral::NormPass p = norm_of(x, weight, 0.0, scales);
  require_rows(grad_out, "grad_out", x, size(x, 0), size(x, 1));
  require_rows(grad_x, "grad_x", x, size(x, 0), size(x, 1));
  require_length(grad_weight, "grad_weight", size(x, 1));
  const mixtral::Kernels& kernels = kernels_of(level, threads);
  nb::gil_scoped_release release;
  mixtral::norm_back(kernels, p, {grad_out.data(), grad_x.data(), grad_weight.data()}, size(x, 0), threads);
}

void rotate(Heads x, Floats2 cosines, Floats2 sines, Heads out, bool back, int threads, const std::string& level) {
  const int64_t tokens = size(x, 0), heads = size(x, 1), width = size(x, 2);
  require(width % 2 == 0, "the head size must be even");
  require_heads(out, "out", x, heads);
  require_shape(cosines, "cosines", tokens, width / 2);
  require_shape(sines, "sines", tokens, width / 2);
  const mixtral::RotatePass p{heads, width, is_bf16(x), back, x.data(), cosines.data(), sines.data(), out.data()};
  const mixtral::Kernels& kernels = kernels_of(level, threads);
  nb::gil_scoped_release release;
  mixtral::rotate(kernels, p, tokens, threads);
}

mixtral::GatePass gate_of(const Rows& products, const Rows& out) {
  require_rows(products, "products", products, size(products, 0), size(products, 1));
  require_rows(out, "out", products, size(products, 0), size(products, 1) / 2);
  require(size(products, 1) % 2 == 0, "products must have gate and up");
  return {size(out, 1), is_bf16(products), products.data(), out.data()};
}

void gate(Rows products, Rows out, int threads, const std::string& level) {
  const mixtral::GatePass p = gate_of(products, out);
  const mixtral::Kernels& kernels = kernels_of(level, threads);
  nb::gil_scoped_release release;
  mixtral::gate(kernels, p, size(products, 0), threads);
}

void gate_back(Rows products, Rows grad_out, Rows out, Rows grad_products, int threads, const std::string& level) {
  const mixtral::GatePass p = gate_of(products, out);
  require_rows(grad_out, "grad_out", products, size(products, 0), p.hidden);
  require_rows(grad_products, "grad_products", products, size(products, 0), 2 * p.hidden);
  const mixtral::Kernels& kernels = kernels_of(level, threads);
  nb::gil_scoped_release release;
  mixtral::gate_back(kernels, p, {grad_out.data(), grad_products.data()}, size(products, 0), threads);
}

void sort_rows(Rows from, Integers1 tokens, Rows to, int threads, const std::string& level) {
  const int64_t sorted = size(tokens, 0), columns = size(from, 1);
  require_rows(from, "from", from, size(from, 0), columns);
  require_rows(to, "to", from, sorted, columns);
  for (int64_t i = 0; i < sorted; ++i) {
    require(tokens.data()[i] >= -1 && tokens.data()[i] < size(from, 0), "tokens name a row that is not there");
  }
  const mixtral::SortPass p{columns, 0, is_bf16(from), nullptr, tokens.data()};
  const mixtral::Kernels& kernels = kernels_of(level, threads);
  nb::gil_scoped_release release;
  mixtral::sort_rows(kernels, p, from.data(), to.data(), sorted, threads);
}

mixtral::SortPass places_of(const Rows& from, const Integers2& places) {
  for (int64_t i = 0; i < size(places, 0) * size(places, 1); ++i) {
    require(places.data()[i] >= 0 && places.data()[i] < size(from, 0), "places name a row that is not there");
  }
  require_rows(from, "from", from, size(from, 0), size(from, 1));
  return {size(from, 1), size(places, 1), is_bf16(from), places.data(), nullptr};
}

void combine(Rows from, Integers2 places, std::optional<Floats2> weights, Rows to, int threads,
             const std::string& level) {
  const mixtral::SortPass p = places_of(from, places);
  require_rows(to, "to", from, size(places, 0), p.columns);
  if (weights) require_shape(*weights, "weights", size(places, 0), p.choices);
  const float* own = weights ? weights->data() : nullptr;
  const mixtral::Kernels& kernels = kernels_of(level, threads);
  nb::gil_scoped_release release;
  mixtral::combine(kernels, p, from.data(), own, to.data(), size(places, 0), threads);
}

void combine_back(Rows from, Integers2 places, Floats2 weights, Rows grad, Rows back, Floats2 grad_weights, int threads,
                  const std::string& level) {
  const mixtral::SortPass p = places_of(from, places);
  require_rows(grad, "grad", from, size(places, 0), p.columns);
  require_rows(back, "back", from, size(from, 0), p.columns);
  require_shape(weights, "weights", size(places, 0), p.choices);
  require_shape(grad_weights, "grad_weights", size(places, 0), p.choices);
  const mixtral::Kernels& kernels = kernels_of(level, threads);
  nb::gil_scoped_release release;
  mixtral::combine_back(kernels, p, from.data(), weights.data(), grad.data(), back.data(), grad_weights.data(),
                        size(places, 0), threads);
}

void loss(Rows scores, Integers1 labels, Floats1 weights, double log_copies, Floats1 logprobs, bool train,
          int threads, const std::string& level) {
  const int64_t rows = size(scores, 0), columns = size(scores, 1);
  require(columns > 0, "scores must have columns");
  require_rows(scores, "scores", scores, rows, columns);
  require_length(labels, "labels", rows);
  require_length(weights, "weights", rows);
  require_length(logprobs, "logprobs", rows);
  for (int64_t i = 0; i < rows; ++i) {
    require(labels.data()[i] >= 0 && labels.data()[i] < columns, "labels name a column that is not there");
  }
  const auto copies = static_cast<float>(log_copies);
  const mixtral::LossPass p{columns, is_bf16(scores), train, scores.data(), labels.data(), weights.data(), copies,
                            logprobs.data()};
  const mixtral::Kernels& kernels = kernels_of(level, threads);
  nb::gil_scoped_release release;
  mixtral::loss(kernels, p, rows, threads);
}

// Rows in groups to numbers.
void decode_groups(ByteRows codes, int bits, Floats2 scales, std::optional<ByteRows> zeros, Rows out, int threads,
                   const std::string& level) {
  const int64_t rows = size(out, 0), columns = size(out, 1), groups = size(scales, 1);
  require(bits >= 1 && bits <= 8, "bits must be 1 to 8");
  require(groups > 0 && columns % groups == 0 && columns / groups % 8 == 0,
          "a row must be whole groups of a multiple of 8 columns");
  require_rows(out, "out", out, rows, columns);
  require_shape(codes, "codes", rows, columns / 8 * bits);
  require_shape(scales, "scales", rows, groups);
  if (zeros) require_shape(*zeros, "zeros", rows, groups);
  const uint8_t* own = zeros ? zeros->data() : nullptr;
  const mixtral::Grouped from{codes.data(), scales.data(), own, bits, columns, columns / groups};
  const bool bf16 = is_bf16(out);
  const mixtral::Kernels& kernels = kernels_of(level, threads);
  nb::gil_scoped_release release;
  if (bf16) return mixtral::decode(kernels, from, rows, static_cast<uint16_t*>(out.data()), threads);
  mixtral::decode(kernels, from, rows, static_cast<float*>(out.data()), threads);
}

}  // namespace

void bind_training(nb::module_& module) {
  module.def("document_attention", &forward, nb::arg("q").noconvert(), nb::arg("k").noconvert(),
             nb::arg("v").noconvert(), nb::arg("lengths"), nb::arg("out").noconvert(), nb::arg("norms").noconvert(),
             nb::arg("threads"), nb::arg("level") = "",
             "Causal attention inside documents of these lengths: q and out [tokens, heads, size], k and v [tokens, key "
             "heads, size], float32 or the bits of bfloat16; norms [tokens, heads] is kept for the backward pass.");
  module.def("document_attention_backward", &backward, nb::arg("q").noconvert(), nb::arg("k").noconvert(),
             nb::arg("v").noconvert(), nb::arg("lengths"), nb::arg("out").noconvert(), nb::arg("norms").noconvert(),
             nb::arg("grad_out").noconvert(), nb::arg("grad_q").noconvert(), nb::arg("grad_k").noconvert(),
             nb::arg("grad_v").noconvert(), nb::arg("threads"), nb::arg("level") = "",
             "Gradients of document_attention with respect to q, k and v, from that of its result.");
  module.def("train_norm", &norm, nb::arg("x").noconvert(), nb::arg("weight").noconvert(), nb::arg("eps"),
             nb::arg("out").noconvert(), nb::arg("scales").noconvert(), nb::arg("threads"), nb::arg("level") = "",
             "Root-mean-square norm of rows; scales [rows] is kept for the backward pass.");
  module.def("train_norm_back", &norm_back, nb::arg("x").noconvert(), nb::arg("weight").noconvert(),
             nb::arg("scales").noconvert(), nb::arg("grad_out").noconvert(), nb::arg("grad_x").noconvert(),
             nb::arg("grad_weight").noconvert(), nb::arg("threads"), nb::arg("level") = "", "Gradients of train_norm.");
  module.def("train_rotate", &rotate, nb::arg("x").noconvert(), nb::arg("cosines").noconvert(),
             nb::arg("sines").noconvert(), nb::arg("out").noconvert(), nb::arg("back"), nb::arg("threads"),
             nb::arg("level") = "", "Rotary positions of [tokens, heads, size], or with back the way back.");
  module.def("train_gate", &gate, nb::arg("products").noconvert(), nb::arg("out").noconvert(), nb::arg("threads"),
             nb::arg("level") = "", "silu(gate) * up of rows [gate, up].");
  module.def("train_gate_back", &gate_back, nb::arg("products").noconvert(), nb::arg("grad_out").noconvert(),
             nb::arg("out").noconvert(), nb::arg("grad_products").noconvert(), nb::arg("threads"),
             nb::arg("level") = "", "Gradients of train_gate, and its result again.");
  module.def("train_sort", &sort_rows, nb::arg("rows").noconvert(), nb::arg("tokens").noconvert(),
             nb::arg("to").noconvert(), nb::arg("threads"), nb::arg("level") = "",
             "to[n] = rows[tokens[n]]; zeros where that is -1.");
  module.def("train_combine", &combine, nb::arg("rows").noconvert(), nb::arg("places").noconvert(),
             nb::arg("weights").noconvert().none(), nb::arg("to").noconvert(), nb::arg("threads"),
             nb::arg("level") = "", "to[t] = the sum over a of weights[t, a] * rows[places[t, a]].");
  module.def("train_combine_back", &combine_back, nb::arg("rows").noconvert(), nb::arg("places").noconvert(),
             nb::arg("weights").noconvert(), nb::arg("grad").noconvert(), nb::arg("back").noconvert(),
             nb::arg("grad_weights").noconvert(), nb::arg("threads"), nb::arg("level") = "",
             "Gradients of train_combine; rows of back that no place names are left alone.");
  module.def("train_loss", &loss, nb::arg("scores").noconvert(), nb::arg("labels").noconvert(),
             nb::arg("weights").noconvert(), nb::arg("log_copies"), nb::arg("logprobs").noconvert(),
             nb::arg("train"), nb::arg("threads"), nb::arg("level") = "",
             "Log-probabilities of the labels; with train the scores become gradients of the weighted loss.");
  module.def("decode_groups", &decode_groups, nb::arg("codes").noconvert(), nb::arg("bits"),
             nb::arg("scales").noconvert(), nb::arg("zeros").noconvert().none(), nb::arg("out").noconvert(),
             nb::arg("threads"), nb::arg("level") = "",
             "Decode rows of integers in groups into out: (code - zero) * scale.");
}
