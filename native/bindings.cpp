// The Python module mixtral._native: checks shapes, releases the GIL, calls one operation.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "mixtral/encode.h"

namespace nb = nanobind;

namespace {

using Values = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Importance = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const std::string& message) {
  if (!condition) throw nb::value_error(message.c_str());
}

bool aligned(const float* data) { return reinterpret_cast<uintptr_t>(data) % alignof(float) == 0; }

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (std::string_view level : mixtral::levels()) names.emplace_back(level);
  return names;
}

std::tuple<int, int64_t, int64_t> encode(const std::string& name, Values values, std::optional<Importance> importance,
                                         Bytes out, int threads, const std::string& level) {
  const mixtral::Format format = mixtral::find_format(name, level);
  require(format.encoder != nullptr, "no encoder for format '" + name + "' with instruction set '" + level + "'");
  const int64_t rows = static_cast<int64_t>(values.shape(0)), width = static_cast<int64_t>(values.shape(1));
  require(width % format.values == 0,
          "rows of " + std::to_string(width) + " values are no multiple of " + std::to_string(format.values));
  const int64_t per_row = width / format.values;
  require(static_cast<int64_t>(out.shape(0)) == rows && static_cast<int64_t>(out.shape(1)) == per_row * format.bytes,
          "out must be [" + std::to_string(rows) + ", " + std::to_string(per_row * format.bytes) + "]");
  require(!importance || static_cast<int64_t>(importance->shape(0)) == width,
          "importance must hold one number for each of " + std::to_string(width) + " columns");
  require(threads >= 1, "threads must be at least 1");
  const float* from = values.data();
  const float* weights = importance ? importance->data() : nullptr;
  uint8_t* to = out.data();
  require(aligned(from) && aligned(weights), "values and importance must be aligned to 4 bytes");
  mixtral::Fault fault;
  {
    nb::gil_scoped_release release;
    fault = mixtral::encode(format, from, weights, to, rows * per_row, per_row, threads);
  }
  if (fault.problem == mixtral::Problem::none) return {0, 0, 0};
  return {static_cast<int>(fault.problem), fault.at / width, fault.at % width};
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "Compiled operations of mixtral; called through mixtral.quant.native.";
  module.def("levels", &levels, "Instruction sets that this processor runs, the fastest one last.");
  module.def("encode", &encode, nb::arg("name"), nb::arg("values").noconvert(),
             nb::arg("importance").noconvert().none(), nb::arg("out").noconvert(), nb::arg("threads"),
             nb::arg("level") = "",
             "Encode float32 rows into out. Returns (problem, row, column): problem 0 none, 1 a value is not finite, "
             "2 the scale of the block at column is beyond float16.");
}
