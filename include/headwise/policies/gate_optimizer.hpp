// SPDX-License-Identifier: MIT
/// @file gate_optimizer.hpp
/// GateOptimizer: the gates of all KV heads while they are trained: AdamW, the L1 term, clamping.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/head_grid.hpp"
#include "headwise/heads/scores.hpp"

namespace headwise::inline v0 {

/// Decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2); the defaults are
/// PyTorch's, but for the decay, which is DuoAttention's.
struct AdamW {
  double beta1 = 0.9;         ///< of the gradient's running mean, in [0, 1)
  double beta2 = 0.999;       ///< of its square's, in [0, 1)
  double epsilon = 1e-8;      ///< added to the root of the latter, > 0
  double weight_decay = 0.0;  ///< a step shrinks a gate by learning rate x this, >= 0
  /// Longest gradient of all gates together, by its Euclidean norm; longer ones are shortened to
  /// it. 0: any.
  double max_norm = 0.0;

  /// @throws ConfigError for a number out of its range.
  void check() const {
    const auto require = [](bool holds, const char* what, double value) {
      if (!holds) fail<ConfigError>("AdamW: ", what, ", got ", value);
    };
    require(beta1 >= 0.0 && beta1 < 1.0, "beta1 must be in [0, 1)", beta1);
    require(beta2 >= 0.0 && beta2 < 1.0, "beta2 must be in [0, 1)", beta2);
    require(is_finite(epsilon) && epsilon > 0.0, "epsilon must be positive", epsilon);
    require(is_finite(weight_decay) && weight_decay >= 0.0, "weight_decay must be at least 0",
            weight_decay);
    require(is_finite(max_norm) && max_norm >= 0.0, "max_norm must be at least 0", max_norm);
  }
};

/// Adds `weight` times the gradient of mean |gate| to `gradient`: DuoAttention's and RLKV's L1 term
/// as their code has it, a mean (the papers' is a sum: weight x number of gates). A gate of exactly
/// 0 is not pulled.
/// @return mean |gate|
/// @throws ConfigError for sizes that differ.
inline double add_l1(std::span<const double> gates, double weight, std::span<double> gradient) {
  if (gates.size() != gradient.size()) {
    fail<ConfigError>(gradient.size(), " gradients for ", gates.size(), " gates");
  }
  const auto count = static_cast<double>(gates.size());
  double sum = 0.0;
  for (std::size_t i = 0; i < gates.size(); ++i) {
    sum += std::fabs(gates[i]);
    if (!is_zero(gates[i])) gradient[i] += (gates[i] > 0.0 ? weight : -weight) / count;
  }
  return gates.empty() ? 0.0 : sum / count;
}

/// One gate for every KV head, layer by layer, and what AdamW remembers of each.
///
///     GateOptimizer optimizer(shape, settings);
///     while (...) {
///       optimizer.clamp();
///       // gradient of the loss by optimizer.gates(); add_l1(optimizer.gates(), weight, gradient)
///       optimizer.step(gradient, learning_rate);
///     }
///     HeadScores scores = optimizer.scores();
///
/// The published trainings keep gates in bf16, so that many of their values tie; here they are
/// doubles. As there, nothing clamps after the last step: values may end a little outside of [0,
/// 1].
class GateOptimizer {
 public:
  /// @param initial  of every gate; published: 1, the unchanged model
  /// @throws ConfigError for settings out of range or an initial gate that is not finite.
  GateOptimizer(const ModelShape& shape, const AdamW& settings, double initial = 1.0)
      : grid_(heads_of(shape), "gates"),
        settings_(settings),
        gates_(grid_.num_heads(), initial),
        mean_(gates_.size(), 0.0),
        square_(gates_.size(), 0.0) {
    settings.check();
    if (!is_finite(initial)) fail<ConfigError>("a gate must be finite, got ", initial);
  }

  /// All gates, layer by layer: [num_layers x num_kv_heads] where layers are alike.
  std::span<const double> gates() const& { return gates_; }
  std::span<const double> gates() const&& = delete;  ///< would outlive the optimizer
  /// The gates of one layer, as MixedAttention takes them.
  std::span<const double> layer(int i) const& {
    return std::span(gates_).subspan(grid_.first_of(i),
                                     static_cast<std::size_t>(grid_.num_heads(i)));
  }
  std::span<const double> layer(int i) const&& = delete;  ///< would outlive the optimizer
  /// What a policy plans from.
  HeadScores scores() const { return HeadScores(grid_.heads_per_layer(), gates_); }
  /// Steps so far.
  std::int64_t num_steps() const { return num_steps_; }

  /// Brings every gate into [0, 1]: before each step's forward pass.
  void clamp() {
    for (double& gate : gates_) gate = std::clamp(gate, 0.0, 1.0);
  }

  /// One step of AdamW.
  /// @param gradient  of the loss, in the order of gates()
  /// @throws ConfigError for another number of gradients, one that is not finite (no gate has
  ///   changed then), or a negative or infinite learning rate.
  void step(std::span<const double> gradient, double learning_rate) {
    if (gradient.size() != gates_.size()) {
      fail<ConfigError>(gradient.size(), " gradients for ", gates_.size(), " gates");
    }
    if (!is_finite(learning_rate) || learning_rate < 0.0) {
      fail<ConfigError>("a learning rate must be at least 0, got ", learning_rate);
    }
    double squares = 0.0;
    for (std::size_t i = 0; i < gradient.size(); ++i) {
      if (!is_finite(gradient[i])) {
        fail<ConfigError>("the gradient of gate ", i, " must be finite, got ", gradient[i]);
      }
      squares += gradient[i] * gradient[i];
    }
    // PyTorch's clip_grad_norm_, its 1e-6 included.
    const double shorten = settings_.max_norm > 0.0
                               ? std::min(1.0, settings_.max_norm / (std::sqrt(squares) + 1e-6))
                               : 1.0;
    ++num_steps_;
    const auto t = static_cast<double>(num_steps_);
    const double mean_share = 1.0 - std::pow(settings_.beta1, t);
    const double square_share = 1.0 - std::pow(settings_.beta2, t);
    for (std::size_t i = 0; i < gates_.size(); ++i) {
      const double g = shorten * gradient[i];
      mean_[i] = settings_.beta1 * mean_[i] + (1.0 - settings_.beta1) * g;
      square_[i] = settings_.beta2 * square_[i] + (1.0 - settings_.beta2) * g * g;
      gates_[i] *= 1.0 - learning_rate * settings_.weight_decay;
      gates_[i] -= learning_rate * (mean_[i] / mean_share) /
                   (std::sqrt(square_[i] / square_share) + settings_.epsilon);
    }
  }

 private:
  static std::vector<int> heads_of(const ModelShape& shape) {
    std::vector<int> heads;
    for (const LayerShape& layer : shape.layers()) heads.push_back(layer.num_kv_heads);
    return heads;
  }

  headwise::detail::HeadGrid grid_;
  AdamW settings_;
  std::vector<double> gates_;
  std::vector<double> mean_;    // of gradients
  std::vector<double> square_;  // of their squares
  std::int64_t num_steps_ = 0;
};

}  // namespace headwise::inline v0
