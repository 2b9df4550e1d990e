// Packed and plain weights as Python holds them: memory of an array, and the shape of what lies there.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>
#include <vector>

#include "mixtral/layers.h"

namespace nb = nanobind;

using Plane = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

inline void require(bool condition, const char* message) {
  if (!condition) throw nb::value_error(message);
}
inline void require(bool condition, const std::string& message) { require(condition, message.c_str()); }

// Kernels read numbers at addresses that are multiples of their size; arrays may begin anywhere.
template <typename Array>
void require_aligned(const Array& array, const char* name, size_t bytes = alignof(typename Array::Scalar)) {
  if (reinterpret_cast<uintptr_t>(array.data()) % bytes != 0) {
    require(false, std::string(name) + " must be aligned to " + std::to_string(bytes) + " bytes");
  }
}

template <typename Array>
void require_shape(const Array& array, const char* name, int64_t rows, int64_t columns) {
  if (static_cast<int64_t>(array.shape(0)) != rows || static_cast<int64_t>(array.shape(1)) != columns) {
    require(false, std::string(name) + " must be [" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
  }
  require_aligned(array, name);
}

// Numbers of rows and columns that the kernels can count with.
inline void require_sizes(int64_t rows, int64_t columns) {
  constexpr int64_t kMost = int64_t{1} << 31, kMostNumbers = int64_t{1} << 56;
  require(rows > 0 && columns > 0 && rows < kMost && columns < kMost && rows * columns < kMostNumbers, "sizes out of range");
}

// A matrix [rows, columns] of either kind.
class Matrix {
 public:
  const mixtral::Weights& weights() const { return weights_; }
  const Plane& data() const { return data_; }

 protected:
  Matrix(const mixtral::Weights& weights, Plane data) : weights_(weights), data_(data) {}

  mixtral::Weights weights_;
  Plane data_;
};

// The experts of a layer.
class ExpertSet {
 public:
  ExpertSet(const std::vector<Matrix*>& gate, const std::vector<Matrix*>& up, const std::vector<Matrix*>& down);

  mixtral::Experts view() const {
    return {gate_.data(), up_.data(), down_.data(), static_cast<int64_t>(gate_.size())};
  }
  int64_t width() const { return gate_[0].columns(); }

 private:
  std::vector<mixtral::Weights> gate_, up_, down_;
  std::vector<Plane> memory_;  // keeps alive what these refer to
};

void bind_weights(nb::module_& module);
