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

#include "bind_layers.h"
#include "bind_limits.h"
#include "bind_training.h"
#include "mixtral/encode.h"

namespace nb = nanobind;

namespace {

using Values = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Importance = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Scales = nb::ndarray<uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Result = std::tuple<int, int64_t, int64_t>;

void require(bool condition, const std::string& message) {
  if (!condition) throw nb::value_error(message.c_str());
}

bool aligned(const float* data) { return reinterpret_cast<uintptr_t>(data) % alignof(float) == 0; }

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (std::string_view level : mixtral::levels()) names.emplace_back(level);
  return names;
}

int64_t size(const auto& array, size_t axis) { return static_cast<int64_t>(array.shape(axis)); }

Result result(const mixtral::Fault& fault, int64_t width) {
  if (fault.problem == mixtral::Problem::none) return {0, 0, 0};
  return {static_cast<int>(fault.problem), fault.at / width, fault.at % width};
}

// What every encoder asks of its input.
void require_rows(const Values& values, const std::optional<Importance>& importance, int64_t block, int threads) {
  const int64_t width = size(values, 1);
  require(width % block == 0,
          "rows of " + std::to_string(width) + " values are no multiple of " + std::to_string(block));
  require(!importance || size(*importance, 0) == width,
          "importance must hold one number for each of " + std::to_string(width) + " columns");
  require(threads >= 1, "threads must be at least 1");
  require(aligned(values.data()) && (!importance || aligned(importance->data())),
          "values and importance must be aligned to 4 bytes");
}

Result encode(const std::string& name, Values values, std::optional<Importance> importance, Bytes out, int threads,
              const std::string& level) {
  const mixtral::Format format = mixtral::find_format(name, level);
  require(format.encoder != nullptr, "no encoder for format '" + name + "' with instruction set '" + level + "'");
  require_rows(values, importance, format.values, threads);
  const int64_t rows = size(values, 0), width = size(values, 1), per_row = width / format.values;
  require(size(out, 0) == rows && size(out, 1) == per_row * format.bytes,
          "out must be [" + std::to_string(rows) + ", " + std::to_string(per_row * format.bytes) + "]");
  const float* from = values.data();
  const float* weights = importance ? importance->data() : nullptr;
  uint8_t* to = out.data();
  mixtral::Fault fault;
  {
    nb::gil_scoped_release release;
    fault = mixtral::encode(format, from, weights, to, rows * per_row, per_row, threads);
  }
  return result(fault, width);
}

Result encode_groups(Values values, int bits, int64_t group, std::optional<Importance> importance, Bytes codes,
                     Scales scales, int threads, const std::string& level) {
  const mixtral::GroupEncoder encoder = mixtral::find_integers(bits, group, level);
  require(encoder != nullptr, "no encoder for " + std::to_string(bits) + " bits in groups of " + std::to_string(group) +
                                  " with instruction set '" + level + "'");
  require_rows(values, importance, group, threads);
  const int64_t rows = size(values, 0), width = size(values, 1), per_row = width / group;
  require(size(codes, 0) == rows && size(codes, 1) == width / 8 * bits && size(scales, 0) == rows &&
              size(scales, 1) == per_row,
          "codes and scales must be [" + std::to_string(rows) + ", " + std::to_string(width / 8 * bits) + "] and [" +
              std::to_string(rows) + ", " + std::to_string(per_row) + "]");
  const float* from = values.data();
  const float* weights = importance ? importance->data() : nullptr;
  uint8_t *to = codes.data(), *beside = reinterpret_cast<uint8_t*>(scales.data());
  mixtral::Fault fault;
  {
    nb::gil_scoped_release release;
    fault = mixtral::encode_groups(encoder, group, from, weights, to, beside, rows * per_row, per_row, threads);
  }
  return result(fault, width);
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "Compiled operations of mixtral; called through mixtral.quant.native.";
  bind_layers(module);
  bind_limits(module);
  bind_training(module);
  module.def("levels", &levels, "Instruction sets that this processor runs, the fastest one last.");
  module.def("encode", &encode, nb::arg("name"), nb::arg("values").noconvert(),
             nb::arg("importance").noconvert().none(), nb::arg("out").noconvert(), nb::arg("threads"),
             nb::arg("level") = "",
             "Encode float32 rows into out. Returns (problem, row, column): problem 0 none, 1 a value is not finite, "
             "2 the scale of the block at column is beyond float16.");
  module.def("encode_groups", &encode_groups, nb::arg("values").noconvert(), nb::arg("bits"), nb::arg("group"),
             nb::arg("importance").noconvert().none(), nb::arg("codes").noconvert(), nb::arg("scales").noconvert(),
             nb::arg("threads"), nb::arg("level") = "",
             "Encode float32 rows as integers of 3 or 4 bits into codes, and their float16 scales, as bits, into "
             "scales. Importance is scaled already. Returns what encode returns.");
}
