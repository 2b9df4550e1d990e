// Python's view of weights: checks their shape, packs and unpacks them.
#include "bind_weights.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

namespace {

using ByteRows = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using HalfRows = nb::ndarray<uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Packed weights in memory of Python's.
class PackedMatrix : public Matrix {
 public:
  PackedMatrix(int kind, int64_t rows, int64_t columns, int64_t group, Plane data)
      : Matrix({true, shape(kind, rows, columns, group), {}}, data), panels_(weights_.panels) {
    panels_.data = data.data();
    const int64_t size = panels_.count() * panels_.panel_bytes();
    require(static_cast<int64_t>(data.shape(0)) == size, "data must have " + std::to_string(size) + " bytes");
  }

  // Sizes that the kernels can work with, without data.
  static mixtral::Panels shape(int kind, int64_t rows, int64_t columns, int64_t group) {
    require(kind >= 0 && kind <= 6, "kind must be 0 to 6");
    require_sizes(rows, columns);
    if (static_cast<mixtral::Kind>(kind) >= mixtral::Kind::g4) {
      const bool known = group == 32 || group == 64 || group == 128 || group == 256;
      require(known && columns % group == 0, "a group is 32, 64, 128 or 256 columns, and a row is whole groups");
    } else {
      require(columns % mixtral::kBlock == 0, "columns must be a multiple of 256");
    }
    return {static_cast<mixtral::Kind>(kind), rows, columns, group, nullptr};
  }
  bool pack_blocks(ByteRows blocks, int threads) {
    require(panels_.kind < mixtral::Kind::g4 || panels_.group == mixtral::kGroup, "blocks are made into groups of 32");
    check_blocks(blocks);
    nb::gil_scoped_release release;
    return mixtral::pack_blocks(panels_, blocks.data(), data_.data(), threads);
  }

  void unpack_blocks(ByteRows blocks, int threads) const {
    require(panels_.kind < mixtral::Kind::g4, "these weights are groups, not blocks");
    check_blocks(blocks);
    nb::gil_scoped_release release;
    mixtral::unpack_blocks(panels_, blocks.data(), threads);
  }

  void pack_groups(ByteRows codes, int bits, HalfRows scales, std::optional<ByteRows> zeros, int threads) {
    require(panels_.kind >= mixtral::Kind::g4, "these weights are blocks, not groups");
    require(bits >= 1 && bits <= (panels_.kind == mixtral::Kind::g4 ? 4 : 8), "bits must be 1 to 8, in g4 1 to 4");
    require_shape(codes, "codes", panels_.rows, panels_.columns / 8 * bits);
    const int64_t groups = static_cast<int64_t>(scales.shape(1));
    require(groups > 0 && panels_.columns / panels_.group % groups == 0, "scales must be for whole groups of the panels");
    require_shape(scales, "scales", panels_.rows, groups);
    if (zeros) require_shape(*zeros, "zeros", panels_.rows, groups);
    const mixtral::Coded coded{codes.data(), scales.data(), zeros ? zeros->data() : nullptr, bits, panels_.columns / groups};
    nb::gil_scoped_release release;
    mixtral::pack_groups(panels_, coded, data_.data(), threads);
  }

  void unpack_groups(ByteRows codes, HalfRows scales, ByteRows zeros, int threads) const {
    check_groups(codes, scales, zeros);
    nb::gil_scoped_release release;
    mixtral::unpack_groups(panels_, codes.data(), scales.data(), zeros.data(), threads);
  }

 private:
  void check_blocks(const ByteRows& blocks) const {
    const int64_t per_row = panels_.columns / mixtral::block_values_of(panels_.kind);
    require_shape(blocks, "blocks", panels_.rows, per_row * mixtral::block_bytes_of(panels_.kind));
  }

  void check_groups(const ByteRows& codes, const HalfRows& scales, const ByteRows& zeros) const {
    require(panels_.kind >= mixtral::Kind::g4, "these weights are blocks, not groups");
    require_shape(codes, "codes", panels_.rows, panels_.columns);
    require_shape(scales, "scales", panels_.rows, panels_.columns / panels_.group);
    require_shape(zeros, "zeros", panels_.rows, panels_.columns / panels_.group);
  }

  mixtral::Panels& panels_;
};

// Rows as a file has them, of 2 or 4 bytes a number.
class DenseMatrix : public Matrix {
 public:
  DenseMatrix(int kind, int64_t rows, int64_t columns, Plane data) : Matrix(shape(kind, rows, columns, data), data) {}

 private:
  static mixtral::Weights shape(int kind, int64_t rows, int64_t columns, const Plane& data) {
    require(kind >= 0 && kind <= 2, "kind must be 0 to 2");
    require_sizes(rows, columns);
    const mixtral::Dense dense{static_cast<mixtral::Float>(kind), rows, columns, data.data()};
    const int64_t size = rows * dense.row_bytes();
    require(static_cast<int64_t>(data.shape(0)) == size, "data must have " + std::to_string(size) + " bytes");
    return {false, {}, dense};
  }
};

}  // namespace

ExpertSet::ExpertSet(const std::vector<Matrix*>& gate, const std::vector<Matrix*>& up, const std::vector<Matrix*>& down) {
  require(!gate.empty() && gate.size() == up.size() && gate.size() == down.size(), "experts: three lists of one length");
  const auto fits = [](const Matrix& matrix, int64_t rows, int64_t columns) {
    return matrix.weights().rows() == rows && matrix.weights().columns() == columns;
  };
  const int64_t wide = gate[0]->weights().rows(), width = gate[0]->weights().columns();
  for (size_t e = 0; e < gate.size(); ++e) {
    require(fits(*gate[e], wide, width) && fits(*up[e], wide, width) && fits(*down[e], width, wide),
            "expert " + std::to_string(e) + ": gate and up must be [F, D], down [D, F]");
    gate_.push_back(gate[e]->weights());
    up_.push_back(up[e]->weights());
    down_.push_back(down[e]->weights());
    for (const Matrix* matrix : {gate[e], up[e], down[e]}) memory_.push_back(matrix->data());
  }
}

void bind_weights(nb::module_& module) {
  module.def(
      "panel_bytes",
      [](int kind, int64_t rows, int64_t columns, int64_t group) {
        const mixtral::Panels shape = PackedMatrix::shape(kind, rows, columns, group);
        return shape.count() * shape.panel_bytes();
      },
      nb::arg("kind"), nb::arg("rows"), nb::arg("columns"), nb::arg("group"), "Bytes of packed weights.");
  nb::class_<Matrix>(module, "Matrix", "Weights in the memory of an array.");
  nb::class_<DenseMatrix, Matrix>(module, "DenseMatrix", "Weights as a file has them: bfloat16, float16, float32.")
      .def(nb::init<int, int64_t, int64_t, Plane>(), nb::arg("kind"), nb::arg("rows"), nb::arg("columns"),
           nb::arg("data").noconvert());
  nb::class_<PackedMatrix, Matrix>(module, "PackedMatrix", "Packed weights.")
      .def(nb::init<int, int64_t, int64_t, int64_t, Plane>(), nb::arg("kind"), nb::arg("rows"), nb::arg("columns"),
           nb::arg("group"), nb::arg("data").noconvert())
      .def("pack_blocks", &PackedMatrix::pack_blocks, nb::arg("blocks").noconvert(), nb::arg("threads"))
      .def("unpack_blocks", &PackedMatrix::unpack_blocks, nb::arg("blocks").noconvert(), nb::arg("threads"))
      .def("pack_groups", &PackedMatrix::pack_groups, nb::arg("codes").noconvert(), nb::arg("bits"),
           nb::arg("scales").noconvert(), nb::arg("zeros").noconvert().none(), nb::arg("threads"))
      .def("unpack_groups", &PackedMatrix::unpack_groups, nb::arg("codes").noconvert(), nb::arg("scales").noconvert(),
           nb::arg("zeros").noconvert(), nb::arg("threads"));
  nb::class_<ExpertSet>(module, "ExpertSet", "The experts of a layer.")
      .def(nb::init<std::vector<Matrix*>, std::vector<Matrix*>, std::vector<Matrix*>>(), nb::arg("gate"), nb::arg("up"),
           nb::arg("down"));
}
