// Inputs of products in the forms that weights ask for, and results of them in strips. For layers.cpp and others.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "mixtral/layers.h"

namespace mixtral {

constexpr int64_t kStrip = 4;  // panels of an item of work: 64 columns

// Scratch memory of one thread, which grows and stays; `slot` tells memory of one caller from that of its callees.
inline float* scratch(int slot, int64_t floats) {
  thread_local std::vector<float> memory[3];
  std::vector<float>& own = memory[slot];
  if (static_cast<int64_t>(own.size()) < floats) own.resize(static_cast<size_t>(floats));
  return own.data();
}

// The forms of activations that some weights need.
struct Forms {
  bool rounded = false, bf16 = false, f32 = false;

  void add(const Weights& weights) {
    if (weights.in_panels) {
      rounded = true;
    } else {
      (weights.dense.kind == Float::bf16 ? bf16 : f32) = true;
    }
  }
};

// Rows of activations: int8 in blocks, bfloat16, float32, or several of these.
class Activations {
 public:
  Activations(int64_t rows, int64_t columns, const Forms& forms) : forms_(forms), columns_(columns) {
    const int64_t padded = (columns + 31) / 32 * 32;
    if (forms.rounded) {
      rounded_ = {rows, columns, nullptr};
      blocks_ = make<RoundedBlock>(rows * rounded_.blocks());
      rounded_.data = blocks_.get();
    }
    if (forms.bf16) bf16_ = make<uint16_t>(rows * padded);
    if (forms.f32) f32_ = make<float>(rows * padded);
    plain_ = {padded, bf16_.get(), f32_.get()};
  }

  int64_t blocks() const { return (columns_ + kBlock - 1) / kBlock; }

  // Writes block `block` of a row, from its values on.
  void fill_block(const Kernels& kernels, const float* values, int64_t row, int64_t block) const {
    const int64_t first = block * kBlock, count = std::min<int64_t>(kBlock, columns_ - first);
    if (forms_.rounded) kernels.gemm.round(values, static_cast<int>(count), rounded_.at(row, block));
    const int64_t at = row * plain_.padded + first;
    const int64_t zeros = first + count == columns_ ? plain_.padded - columns_ : 0;
    if (forms_.bf16) {
      kernels.dense.narrow(values, count, plain_.bf16 + at);
      std::memset(plain_.bf16 + at + count, 0, static_cast<size_t>(zeros) * sizeof(uint16_t));
    }
    if (forms_.f32) {
      std::memcpy(plain_.f32 + at, values, static_cast<size_t>(count) * sizeof(float));
      std::memset(plain_.f32 + at + count, 0, static_cast<size_t>(zeros) * sizeof(float));
    }
  }

  void fill_row(const Kernels& kernels, const float* x, int64_t row) const {
    for (int64_t b = 0; b < blocks(); ++b) fill_block(kernels, x + b * kBlock, row, b);
  }

  // out[i * stride + n] for the 16 `number` weight rows n of neighbouring panels, from `first` on. 16 are written for each
  // panel if the weights are in panels, else those that there are.
  void multiply(const Kernels& kernels, const Weights& weights, int64_t first, int64_t number, const int32_t* rows,
                int64_t count, float* out, int64_t stride) const {
    if (weights.in_panels) {
      kernels.gemm.panels(weights.panels, first, number, rounded_, rows, count, out, stride);
      return;
    }
    for (int64_t p = 0; p < number; ++p) {
      const int64_t row = (first + p) * kPanel, columns = std::min<int64_t>(kPanel, weights.rows() - row);
      kernels.dense.panel(weights.dense, row, columns, plain_, rows, count, out + p * kPanel, stride);
    }
  }

 private:
  template <typename T>
  static std::unique_ptr<T[]> make(int64_t count) {
    return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
  }

  Forms forms_;
  int64_t columns_;
  std::unique_ptr<RoundedBlock[]> blocks_;
  std::unique_ptr<float[]> f32_;
  std::unique_ptr<uint16_t[]> bf16_;
  Rounded rounded_{};
  Plain plain_;
};

}  // namespace mixtral
