// Python's view of the limits of this machine: checks arguments, releases the GIL, calls one measurement.
#include "bind_limits.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "bind_weights.h"

namespace {

using Memory = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const mixtral::LimitTable& table(const std::string& level, int threads, double seconds) {
  const mixtral::Kernels* found = mixtral::find_kernels(level);
  require(found != nullptr, "this processor does not run the kernels '" + level + "'");
  require(threads >= 1 && threads <= 1024, "threads must be 1 to 1024");
  require(seconds >= 0.0 && seconds <= 60.0, "seconds must be 0 to 60");
  return found->limits;
}

double read_speed(Memory memory, int threads, double seconds, const std::string& level) {
  const mixtral::LimitTable& found = table(level, threads, seconds);
  const uint8_t* data = memory.data();
  const int64_t bytes = static_cast<int64_t>(memory.shape(0));
  require(bytes > 0 && bytes % 256 == 0, "memory must be a multiple of 256 bytes");
  nb::gil_scoped_release release;
  return mixtral::read_speed(found, data, bytes, threads, seconds);
}

std::optional<double> peak_speed(const std::string& kind, int threads, double seconds, const std::string& level) {
  const mixtral::LimitTable& found = table(level, threads, seconds);
  require(kind == "int8" || kind == "fp32" || kind == "bf16", "kind must be int8, fp32 or bf16");
  const auto run = kind == "int8" ? found.int8 : kind == "fp32" ? found.fp32 : found.bf16;
  if (run == nullptr) return std::nullopt;
  nb::gil_scoped_release release;
  return mixtral::peak_speed(run, threads, seconds);
}

}  // namespace

void bind_limits(nb::module_& module) {
  module.def("read_speed", &read_speed, nb::arg("memory").noconvert(), nb::arg("threads"), nb::arg("seconds"),
             nb::arg("level") = "", "Bytes per second of the fastest pass over memory.");
  module.def("peak_speed", &peak_speed, nb::arg("kind"), nb::arg("threads"), nb::arg("seconds"), nb::arg("level") = "",
             "Operations per second of products from registers; None where there are none of that kind.");
}
