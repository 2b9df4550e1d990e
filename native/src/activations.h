// Inputs of products in the forms that weights ask for, and results of them in strips. For layers.cpp and others.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "mixtral/layers.h"

namespace mixtral {

constexpr int64_t kStrip = 4;  // panels of an item of work: 64 columns
constexpr int64_t kTile = 16;  // rows of a tile

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
  Activations(const Kernels& kernels, int64_t rows, int64_t columns, const Forms& forms)
      : forms_(forms), tiles_(kernels.tiles), rows_(rows), columns_(columns) {
    const int64_t padded = (columns + 31) / 32 * 32;
    if (forms.rounded) {
      rounded_ = {rows, columns, nullptr};
      // Tiles read a few more rows, and use nothing of them.
      blocks_ = make<RoundedBlock>(rows * rounded_.blocks() + (tiles_ ? kTile - 1 : 0));
      rounded_.data = blocks_.get();
    }
    if (forms.bf16) bf16_ = make<uint16_t>((tiles_ ? (rows + kTile - 1) / kTile * kTile : rows) * padded);
    if (forms.f32) f32_ = make<float>(rows * padded);
    plain_ = {padded, bf16_.get(), f32_.get()};
  }

  int64_t rows() const { return rows_; }
  int64_t blocks() const { return (columns_ + kBlock - 1) / kBlock; }

  // Writes block `block` of a row, from its values on.
  void fill_block(const Kernels& kernels, const float* values, int64_t row, int64_t block) const {
    const int64_t first = block * kBlock, count = std::min<int64_t>(kBlock, columns_ - first);
    if (forms_.rounded) kernels.gemm.round(values, static_cast<int>(count), rounded_.at(row, block));
    const int64_t at = row * plain_.padded + first;
    const int64_t zeros = first + count == columns_ ? plain_.padded - columns_ : 0;
    if (forms_.bf16) kernels.dense.narrow(values, count, zeros, plain_, row, first);
    if (forms_.f32) {
      std::memcpy(plain_.f32 + at, values, static_cast<size_t>(count) * sizeof(float));
      std::memset(plain_.f32 + at + count, 0, static_cast<size_t>(zeros) * sizeof(float));
    }
  }

  void fill_row(const Kernels& kernels, const float* x, int64_t row) const {
    for (int64_t b = 0; b < blocks(); ++b) fill_block(kernels, x + b * kBlock, row, b);
  }

  // Row `to` becomes row `from` of others, of the same forms and columns.
  void copy_row(const Activations& others, int64_t from, int64_t to) const {
    if (forms_.rounded) {
      for (int64_t b = 0; b < blocks(); ++b) rounded_.at(to, b) = others.rounded_.at(from, b);
    }
    if (forms_.bf16) {
      for (int64_t column = 0; column < plain_.padded; column += 2) {
        std::memcpy(plain_.bf16 + pair_at(to, column), others.plain_.bf16 + pair_at(from, column), 4);
      }
    }
    if (forms_.f32) {
      std::memcpy(plain_.f32 + to * plain_.padded, others.plain_.f32 + from * plain_.padded,
                  static_cast<size_t>(plain_.padded) * sizeof(float));
    }
  }

  // out[i * stride + n] for the weight rows n of the panels [first, first + panels). Of panels all 16 rows are written,
  // of plain weights those that there are.
  void multiply(const Kernels& kernels, const Weights& weights, int64_t first, int64_t panels, const int32_t* rows,
                int64_t count, float* out, int64_t stride) const {
    if (weights.in_panels) {
      kernels.gemm.multiply(weights.panels, first, panels, rounded_, rows, count, out, stride);
    } else {
      const int64_t row = first * kPanel, columns = std::min<int64_t>(panels * kPanel, weights.rows() - row);
      kernels.dense.multiply(weights.dense, row, columns, plain_, rows, count, out, stride);
    }
  }

 private:
  // Where a pair of columns lies in bf16.
  int64_t pair_at(int64_t row, int64_t column) const {
    if (!tiles_) return row * plain_.padded + column;
    return row / kTile * kTile * plain_.padded + column * kTile + row % kTile * 2;
  }

  template <typename T>
  static std::unique_ptr<T[]> make(int64_t count) {
    return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
  }

  Forms forms_;
  bool tiles_;
  int64_t rows_, columns_;
  std::unique_ptr<RoundedBlock[]> blocks_;
  std::unique_ptr<float[]> f32_;
  std::unique_ptr<uint16_t[]> bf16_;
  Rounded rounded_{};
  Plain plain_;
};

}  // namespace mixtral
