// SPDX-License-Identifier: MIT
/// @file layers.hpp
/// What a layer does besides attention, dealt to the engine's threads: RMSNorm, matrix products,
/// SwiGLU; and what a gradient becomes on its way back through them, weights being frozen.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>

#include "headwise/core/executor.hpp"
#include "weights.hpp"

namespace needle_lm {

using Matrix = Eigen::MatrixXf;  ///< [features, tokens]: one token's features are contiguous

/// fn(first, count) over [0, total) in pieces of at most `piece`, on the engine's threads: the same
/// executor that attention uses.
template <headwise::Executor E, class Fn>
void deal(E& executor, Eigen::Index total, Eigen::Index piece, Fn fn) {
  const auto num_tasks = static_cast<std::size_t>((total + piece - 1) / piece);
  executor.for_each(num_tasks, [&](std::size_t task, std::size_t /*thread*/) {
    const Eigen::Index first = static_cast<Eigen::Index>(task) * piece;
    fn(first, std::min(piece, total - first));
  });
}

/// fn(token) for every token.
template <headwise::Executor E, class Fn>
void for_each_token(E& executor, Eigen::Index num_tokens, Fn fn) {
  constexpr Eigen::Index kTokensPerTask = 64;
  deal(executor, num_tokens, kTokensPerTask, [&](Eigen::Index first, Eigen::Index count) {
    for (Eigen::Index token = first; token < first + count; ++token) fn(token);
  });
}

/// out = weight * x for all tokens at once; the weight's rows are dealt to the threads.
/// @param weight  [out, in]; its transpose takes a gradient back
template <headwise::Executor E, class SomeWeight>
void multiply(E& executor, const SomeWeight& weight, const Matrix& x, Matrix& out) {
  constexpr Eigen::Index kLeastRows = 64;  // fewer are not worth waking a thread
  out.resize(weight.rows(), x.cols());
  // One piece a thread: every piece packs all of x for the product's inner loop.
  const auto threads = static_cast<Eigen::Index>(executor.num_threads());
  const Eigen::Index piece = std::max(kLeastRows, (weight.rows() + threads - 1) / threads);
  deal(executor, weight.rows(), piece, [&](Eigen::Index first, Eigen::Index count) {
    out.middleRows(first, count).noalias() = weight.middleRows(first, count) * x;
  });
}

/// RMSNorm of every token.
template <headwise::Executor E>
void normalise(E& executor, const Matrix& x, const Eigen::VectorXf& gain, float epsilon,
               Matrix& out) {
  out.resize(x.rows(), x.cols());
  for_each_token(executor, x.cols(), [&](Eigen::Index token) {
    const auto from = x.col(token);
    const float mean_square = from.squaredNorm() / static_cast<float>(from.size());
    const float scale = 1.0F / std::sqrt(mean_square + epsilon);
    out.col(token) = from.cwiseProduct(gain) * scale;
  });
}

/// Adds to d_x what the gradient by RMSNorm's output gives its input: s (g dy) - x s^3 mean(g dy x)
/// with s = 1 / sqrt(mean(x^2) + epsilon).
template <headwise::Executor E>
void normalise_back(E& executor, const Matrix& x, const Eigen::VectorXf& gain, float epsilon,
                    const Matrix& d_out, Matrix& d_x) {
  for_each_token(executor, x.cols(), [&](Eigen::Index token) {
    const auto from = x.col(token);
    const auto size = static_cast<float>(from.size());
    const float scale = 1.0F / std::sqrt(from.squaredNorm() / size + epsilon);
    const Eigen::VectorXf scaled = d_out.col(token).cwiseProduct(gain);
    const float along = scaled.dot(from) / size * scale * scale;
    d_x.col(token) += scale * (scaled - along * from);
  });
}

/// silu(gate) * up of every token.
/// @param gate_up  [2 intermediate, tokens]: gate, then up
template <headwise::Executor E>
void activate(E& executor, const Matrix& gate_up, Matrix& out) {
  const Eigen::Index size = gate_up.rows() / 2;
  out.resize(size, gate_up.cols());
  for_each_token(executor, gate_up.cols(), [&](Eigen::Index token) {
    const auto gate = gate_up.col(token).head(size).array();
    const auto up = gate_up.col(token).tail(size).array();
    out.col(token) = gate / (1.0F + (-gate).exp()) * up;
  });
}

/// The gradient by gate_up of one by activate()'s output.
template <headwise::Executor E>
void activate_back(E& executor, const Matrix& gate_up, const Matrix& d_out, Matrix& d_gate_up) {
  const Eigen::Index size = gate_up.rows() / 2;
  d_gate_up.resize(gate_up.rows(), gate_up.cols());
  for_each_token(executor, gate_up.cols(), [&](Eigen::Index token) {
    const auto gate = gate_up.col(token).head(size).array();
    const auto up = gate_up.col(token).tail(size).array();
    const auto d = d_out.col(token).array();
    const Eigen::ArrayXf sigmoid = 1.0F / (1.0F + (-gate).exp());
    d_gate_up.col(token).head(size) = d * up * sigmoid * (1.0F + gate * (1.0F - sigmoid));
    d_gate_up.col(token).tail(size) = d * gate * sigmoid;
  });
}

}  // namespace needle_lm
