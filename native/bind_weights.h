// Packed and plain weights as Python holds them: memory of an array, and the shape of what lies there.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>
#include <vector>

#include "mixtral/layers.h"

namespace nb = nanobind;

using Plane = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

inline void require(bool condition, const std::string& message) {
  if (!condition) throw nb::value_error(message.c_str());
}

template <typename Array>
void require_shape(const Array& array, const std::string& name, int64_t rows, int64_t columns) {
  require(static_cast<int64_t>(array.shape(0)) == rows && static_cast<int64_t>(array.shape(1)) == columns,
          name + " must be [" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
}

// A matrix [rows, columns] of either kind.
class Matrix {
 public:
  const mixtral::Weights& weights() const { return weights_; }

 protected:
  Matrix(const mixtral::Weights& weights, Plane data) : weights_(weights), data_(data) {}

  mixtral::Weights weights_;
  Plane data_;
};

// The experts of a layer; they refer to matrices that Python keeps alive beside them.
class ExpertSet {
 public:
  ExpertSet(const std::vector<Matrix*>& gate, const std::vector<Matrix*>& up, const std::vector<Matrix*>& down);

  mixtral::Experts view() const {
    return {gate_.data(), up_.data(), down_.data(), static_cast<int64_t>(gate_.size())};
  }
  int64_t width() const { return gate_[0].columns(); }

 private:
  std::vector<mixtral::Weights> gate_, up_, down_;
};

void bind_weights(nb::module_& module);
