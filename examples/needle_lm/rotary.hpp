// SPDX-License-Identifier: MIT
/// @file rotary.hpp
/// Rotary position embedding, half-split as in HuggingFace's Llama.
#pragma once

#include <Eigen/Core>
#include <cmath>
#include <cstdint>

namespace needle_lm {

/// Rotates dimension i of a head's first half and of its second half, as one pair, by the angle
/// pos * theta^(-2i / head_dim): [x1 c - x2 s, x2 c + x1 s].
class Rotary {
 public:
  Rotary(int head_dim, double theta, std::int64_t max_context)
      : cos_(head_dim / 2, max_context), sin_(head_dim / 2, max_context) {
    for (Eigen::Index pos = 0; pos < max_context; ++pos) {
      for (Eigen::Index i = 0; i < head_dim / 2; ++i) {
        const double exponent = -2.0 * static_cast<double>(i) / head_dim;
        const double angle = static_cast<double>(pos) * std::pow(theta, exponent);
        cos_(i, pos) = static_cast<float>(std::cos(angle));
        sin_(i, pos) = static_cast<float>(std::sin(angle));
      }
    }
  }

  /// Rotates `num_heads` consecutive heads in place; `pos` < max_context.
  void rotate(std::int64_t pos, float* heads, int num_heads) const {
    turn(pos, heads, num_heads, 1.0F);
  }
  /// Undoes it, and so takes a gradient back: a rotation's inverse is its transpose.
  void rotate_back(std::int64_t pos, float* heads, int num_heads) const {
    turn(pos, heads, num_heads, -1.0F);
  }

 private:
  void turn(std::int64_t pos, float* heads, int num_heads, float sign) const {
    const Eigen::Index half = cos_.rows();
    const auto c = cos_.col(pos).array();
    const auto s = sign * sin_.col(pos).array();
    for (Eigen::Index head = 0; head < num_heads; ++head) {
      Eigen::Map<Eigen::ArrayXf> x1(heads + head * 2 * half, half);
      Eigen::Map<Eigen::ArrayXf> x2(heads + head * 2 * half + half, half);
      for (Eigen::Index i = 0; i < half; ++i) {
        const float a = x1(i);
        x1(i) = a * c(i) - x2(i) * s(i);
        x2(i) = x2(i) * c(i) + a * s(i);
      }
    }
  }

  Eigen::MatrixXf cos_;  // [head_dim / 2, max_context]
  Eigen::MatrixXf sin_;
};

}  // namespace needle_lm
