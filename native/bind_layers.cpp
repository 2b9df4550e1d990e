// Python's view of packed weights and of the layers over them: checks every shape, releases the GIL, calls one operation.
#include "bind_layers.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "mixtral/gemm.h"
#include "mixtral/panels.h"

namespace nb = nanobind;

namespace {

using Plane = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ByteRows = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using HalfRows = nb::ndarray<uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Results = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Picks = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const std::string& message) {
  if (!condition) throw nb::value_error(message.c_str());
}

template <typename Array>
void require_shape(const Array& array, const std::string& name, int64_t rows, int64_t columns) {
  require(static_cast<int64_t>(array.shape(0)) == rows && static_cast<int64_t>(array.shape(1)) == columns,
          name + " must be [" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
}

const mixtral::GemmTable& table(const std::string& level) {
  const mixtral::GemmTable* found = mixtral::find_gemm(level);
  require(found != nullptr, "this processor does not run the kernels '" + level + "'");
  return *found;
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const char* name : {"baseline", "avx2", "avx512vnni"}) {
    if (mixtral::find_gemm(name) != nullptr) names.emplace_back(name);
  }
  return names;
}

// Packed weights in memory of Python's.
class Matrix {
 public:
  Matrix(int kind, int64_t rows, int64_t columns, int64_t group, Plane data)
      : data_(data), panels_(shape(kind, rows, columns, group)) {
    panels_.data = data.data();
    const int64_t size = panels_.count() * panels_.panel_bytes();
    require(static_cast<int64_t>(data.shape(0)) == size, "data must have " + std::to_string(size) + " bytes");
  }

  // Sizes that the kernels can work with, without data.
  static mixtral::Panels shape(int kind, int64_t rows, int64_t columns, int64_t group) {
    require(kind >= 0 && kind <= 6, "kind must be 0 to 6");
    constexpr int64_t kMost = int64_t{1} << 31;
    require(rows > 0 && columns > 0 && rows < kMost && columns < kMost, "sizes out of range");
    if (static_cast<mixtral::Kind>(kind) >= mixtral::Kind::g4) {
      const bool known = group == 32 || group == 64 || group == 128 || group == 256;
      require(known && columns % group == 0, "a group is 32, 64, 128 or 256 columns, and a row is whole groups");
    } else {
      require(columns % mixtral::kBlock == 0, "columns must be a multiple of 256");
    }
    return {static_cast<mixtral::Kind>(kind), rows, columns, group, nullptr};
  }
  const mixtral::Panels& panels() const { return panels_; }

  void pack_blocks(ByteRows blocks, int threads) {
    check_blocks(blocks);
    nb::gil_scoped_release release;
    mixtral::pack_blocks(panels_, blocks.data(), data_.data(), threads);
  }

  void unpack_blocks(ByteRows blocks, int threads) const {
    check_blocks(blocks);
    nb::gil_scoped_release release;
    mixtral::unpack_blocks(panels_, blocks.data(), threads);
  }

  void pack_groups(ByteRows codes, HalfRows scales, ByteRows zeros, int threads) {
    check_groups(codes, scales, zeros);
    nb::gil_scoped_release release;
    mixtral::pack_groups(panels_, codes.data(), scales.data(), zeros.data(), data_.data(), threads);
  }

  void unpack_groups(ByteRows codes, HalfRows scales, ByteRows zeros, int threads) const {
    check_groups(codes, scales, zeros);
    nb::gil_scoped_release release;
    mixtral::unpack_groups(panels_, codes.data(), scales.data(), zeros.data(), threads);
  }

 private:
  void check_blocks(const ByteRows& blocks) const {
    require(panels_.kind < mixtral::Kind::g4, "these weights are groups, not blocks");
    require_shape(blocks, "blocks", panels_.rows, panels_.columns / mixtral::kBlock * mixtral::block_bytes_of(panels_.kind));
  }

  void check_groups(const ByteRows& codes, const HalfRows& scales, const ByteRows& zeros) const {
    require(panels_.kind >= mixtral::Kind::g4, "these weights are blocks, not groups");
    require_shape(codes, "codes", panels_.rows, panels_.columns);
    require_shape(scales, "scales", panels_.rows, panels_.columns / panels_.group);
    require_shape(zeros, "zeros", panels_.rows, panels_.columns / panels_.group);
  }

  Plane data_;
  mixtral::Panels panels_;
};

void linear(Values x, const Matrix& weights, Results out, int threads, const std::string& level) {
  const int64_t rows = static_cast<int64_t>(x.shape(0));
  require_shape(x, "x", rows, weights.panels().columns);
  require_shape(out, "out", rows, weights.panels().rows);
  const mixtral::GemmTable& kernels = table(level);
  nb::gil_scoped_release release;
  mixtral::linear(kernels, x.data(), rows, weights.panels(), out.data(), threads);
}

// The experts of a layer; they refer to matrices that Python keeps alive beside them.
class ExpertSet {
 public:
  ExpertSet(const std::vector<Matrix*>& gate, const std::vector<Matrix*>& up, const std::vector<Matrix*>& down) {
    require(!gate.empty() && gate.size() == up.size() && gate.size() == down.size(), "experts: three lists of one length");
    const int64_t wide = gate[0]->panels().rows, width = gate[0]->panels().columns;
    for (size_t e = 0; e < gate.size(); ++e) {
      require(fits(*gate[e], wide, width) && fits(*up[e], wide, width) && fits(*down[e], width, wide),
              "expert " + std::to_string(e) + ": gate and up must be [F, D], down [D, F]");
      gate_.push_back(gate[e]->panels());
      up_.push_back(up[e]->panels());
      down_.push_back(down[e]->panels());
    }
  }

  mixtral::Experts view() const {
    return {gate_.data(), up_.data(), down_.data(), static_cast<int64_t>(gate_.size())};
  }

  int64_t width() const { return gate_[0].columns; }

 private:
  static bool fits(const Matrix& matrix, int64_t rows, int64_t columns) {
    return matrix.panels().rows == rows && matrix.panels().columns == columns;
  }

  std::vector<mixtral::Panels> gate_, up_, down_;
};

void experts(Values x, Picks picks, Values shares, const ExpertSet& weights, Results out, int threads,
             const std::string& level) {
  const int64_t tokens = static_cast<int64_t>(x.shape(0)), choices = static_cast<int64_t>(picks.shape(1));
  require_shape(x, "x", tokens, weights.width());
  require_shape(out, "out", tokens, weights.width());
  require_shape(picks, "picks", tokens, choices);
  require_shape(shares, "shares", tokens, choices);
  const mixtral::Experts view = weights.view();
  for (int64_t i = 0; i < tokens * choices; ++i) {
    require(picks.data()[i] >= 0 && picks.data()[i] < view.count, "picks name an expert that is not there");
  }
  const mixtral::GemmTable& kernels = table(level);
  nb::gil_scoped_release release;
  mixtral::experts(kernels, x.data(), tokens, picks.data(), shares.data(), choices, view, out.data(), threads);
}

}  // namespace

void bind_layers(nb::module_& module) {
  module.def("kernel_levels", &levels, "Instruction sets whose kernels this processor runs, the fastest one last.");
  module.def(
      "panel_bytes",
      [](int kind, int64_t rows, int64_t columns, int64_t group) {
        const mixtral::Panels shape = Matrix::shape(kind, rows, columns, group);
        return shape.count() * shape.panel_bytes();
      },
      nb::arg("kind"), nb::arg("rows"), nb::arg("columns"), nb::arg("group"), "Bytes of packed weights.");
  nb::class_<Matrix>(module, "Matrix", "Packed weights in the memory of an array.")
      .def(nb::init<int, int64_t, int64_t, int64_t, Plane>(), nb::arg("kind"), nb::arg("rows"), nb::arg("columns"),
           nb::arg("group"), nb::arg("data").noconvert())
      .def("pack_blocks", &Matrix::pack_blocks, nb::arg("blocks").noconvert(), nb::arg("threads"))
      .def("unpack_blocks", &Matrix::unpack_blocks, nb::arg("blocks").noconvert(), nb::arg("threads"))
      .def("pack_groups", &Matrix::pack_groups, nb::arg("codes").noconvert(), nb::arg("scales").noconvert(),
           nb::arg("zeros").noconvert(), nb::arg("threads"))
      .def("unpack_groups", &Matrix::unpack_groups, nb::arg("codes").noconvert(), nb::arg("scales").noconvert(),
           nb::arg("zeros").noconvert(), nb::arg("threads"));
  nb::class_<ExpertSet>(module, "ExpertSet", "The experts of a layer.")
      .def(nb::init<std::vector<Matrix*>, std::vector<Matrix*>, std::vector<Matrix*>>(), nb::arg("gate"), nb::arg("up"),
           nb::arg("down"), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>());
  module.def("linear", &linear, nb::arg("x").noconvert(), nb::arg("weights"), nb::arg("out").noconvert(),
             nb::arg("threads"), nb::arg("level") = "", "out = x times the weights transposed, float32.");
  module.def("experts", &experts, nb::arg("x").noconvert(), nb::arg("picks").noconvert(), nb::arg("shares").noconvert(),
             nb::arg("weights"), nb::arg("out").noconvert(), nb::arg("threads"), nb::arg("level") = "",
             "out = the sum of the chosen experts of each row of x, float32.");
}
