// SPDX-License-Identifier: MIT
/// @file mixed_decoder.hpp
/// The decoder with gates instead of a cache, and its backward pass: what the training of gates
/// asks of an engine.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "decoder.hpp"
#include "headwise/attention/mixed_attention.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/core/window.hpp"
#include "headwise/policies/duo_attention_training.hpp"
#include "layers.hpp"
#include "rotary.hpp"
#include "weights.hpp"

namespace needle_lm {

/// A duo_attention::Engine: weights are frozen, so that gradients pass through activations alone
/// and end in the gates. Both halves of mixed attention have the mixed pass's own hidden states, as
/// in the paper.
template <headwise::Executor E>
class MixedDecoder {
 public:
  using Text = headwise::duo_attention::LabelledText;

  /// @param model, executor  borrowed; must outlive the decoder.
  /// @param window  of the streaming halves
  /// @param max_context  longest text it will be given, in tokens.
  MixedDecoder(const Model& model, headwise::Window window, std::int64_t max_context, E& executor)
      : model_(model),
        window_(window),
        rotary_(model.config.head_dim, model.config.rope_theta, max_context),
        shape_(model.config.shape()),
        unchanged_(model, max_context, executor),
        executor_(executor),
        layers_(model.layers.size()) {}

  /// Last hidden states, after the final norm, at the labelled tokens, as the decoder has them.
  headwise::RowView full_states(const Text& text) {
    headwise::KvCache<headwise::f32> cache(shape_, headwise::HeadPlan(shape_),
                                           {.max_context = std::ssize(text.tokens)});
    Batch batch;
    batch.add(cache.add_sequence().value(), text.tokens);
    return gather(text, unchanged_.forward(cache, batch), full_states_);
  }

  /// The same with mixed attention.
  /// @param gates  layer by layer
  headwise::RowView mixed_states(const Text& text, std::span<const double> gates) {
    labelled_ = text.labelled;
    gates_.assign(gates.begin(), gates.end());
    Matrix hidden(model_.config.hidden_size, std::ssize(text.tokens));
    for (std::size_t i = 0; i < text.tokens.size(); ++i) {
      hidden.col(static_cast<Eigen::Index>(i)) = model_.embedding.row(text.tokens[i]).transpose();
    }
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      add_attention(i, hidden);
      add_mlp(i, hidden);
    }
    last_ = hidden;
    normalise(executor_, last_, model_.final_norm, epsilon(), normed_);
    return gather(text, normed_, mixed_states_);
  }

  /// @param d_states  [labelled tokens x hidden], gradient of a loss by the last mixed_states()
  /// @param d_gates  layer by layer; added to
  void backward(std::span<const float> d_states, std::span<double> d_gates) {
    Matrix d_normed = Matrix::Zero(last_.rows(), last_.cols());
    for (std::size_t i = 0; i < labelled_.size(); ++i) {
      d_normed.col(labelled_[i]) += Eigen::Map<const Eigen::VectorXf>(
          d_states.data() + static_cast<std::ptrdiff_t>(i) * last_.rows(), last_.rows());
    }
    Matrix d_hidden = Matrix::Zero(last_.rows(), last_.cols());
    normalise_back(executor_, last_, model_.final_norm, epsilon(), d_normed, d_hidden);
    for (std::size_t i = layers_.size(); i-- > 0;) {
      mlp_back(i, d_hidden);
      attention_back(i, d_hidden, d_gates);
    }
  }

 private:
  /// What a layer's forward pass leaves to its backward pass.
  struct LayerTape {
    Matrix before_attention;  // [hidden, tokens]
    Matrix qkv;               // [q_size + 2 kv_size, tokens] after rotary positions
    Matrix before_mlp;        // [hidden, tokens]
    Matrix gate_up;           // [2 intermediate, tokens]
    headwise::MixedTape attention;
  };

  float epsilon() const { return model_.config.norm_epsilon; }

  headwise::RowView gather(const Text& text, const Matrix& states, std::vector<float>& to) const {
    to.clear();
    for (const std::int64_t token : text.labelled) {
      const float* from = states.col(token).data();
      to.insert(to.end(), from, from + states.rows());
    }
    return headwise::RowView::dense(to.data(), std::ssize(text.labelled),
                                    static_cast<int>(states.rows()));
  }

  std::span<const double> gates_of(std::size_t layer) const {
    const auto heads = static_cast<std::size_t>(model_.config.num_kv_heads);
    return std::span(gates_).subspan(layer * heads, heads);
  }

  /// Q, K or V in place: [tokens, heads, head_dim], strided.
  headwise::TensorView<const float> heads_at(const Matrix& qkv, int feature) const {
    return {qkv.data() + feature, qkv.rows(), model_.config.head_dim};
  }
  headwise::TensorView<float> heads_at(Matrix& qkv, int feature) const {
    return {qkv.data() + feature, qkv.rows(), model_.config.head_dim};
  }

  headwise::MixedAttention attention_of(std::size_t layer) const {
    const ModelConfig& config = model_.config;
    const Matrix& qkv = layers_[layer].qkv;
    headwise::MixedAttention of;
    of.layer = shape_.layer(static_cast<int>(layer));
    of.window = window_;
    of.gates = gates_of(layer);
    of.num_tokens = qkv.cols();
    of.q = heads_at(qkv, 0);
    of.k = heads_at(qkv, config.q_size());
    of.v = heads_at(qkv, config.q_size() + config.kv_size());
    return of;
  }

  void add_attention(std::size_t layer, Matrix& hidden) {
    const ModelConfig& config = model_.config;
    const LayerWeights& weights = model_.layers[layer];
    LayerTape& tape = layers_[layer];
    tape.before_attention = hidden;
    normalise(executor_, hidden, weights.attention_norm, epsilon(), normed_);
    multiply(executor_, weights.qkv, normed_, tape.qkv);
    for_each_token(executor_, hidden.cols(), [&](Eigen::Index token) {
      rotary_.rotate(token, tape.qkv.col(token).data(), config.num_qo_heads + config.num_kv_heads);
    });
    attended_.resize(config.q_size(), hidden.cols());
    headwise::mixed_attention(attention_of(layer), heads_at(attended_, 0), tape.attention, scratch_,
                              executor_);
    multiply(executor_, weights.output, attended_, projected_);
    hidden += projected_;
  }

  void add_mlp(std::size_t layer, Matrix& hidden) {
    const LayerWeights& weights = model_.layers[layer];
    LayerTape& tape = layers_[layer];
    tape.before_mlp = hidden;
    normalise(executor_, hidden, weights.mlp_norm, epsilon(), normed_);
    multiply(executor_, weights.gate_up, normed_, tape.gate_up);
    activate(executor_, tape.gate_up, activated_);
    multiply(executor_, weights.down, activated_, projected_);
    hidden += projected_;
  }

  /// d_hidden: by the layer's output, then by what came into its MLP.
  void mlp_back(std::size_t layer, Matrix& d_hidden) {
    const LayerWeights& weights = model_.layers[layer];
    const LayerTape& tape = layers_[layer];
    multiply(executor_, weights.down.transpose(), d_hidden, activated_);
    activate_back(executor_, tape.gate_up, activated_, d_gate_up_);
    multiply(executor_, weights.gate_up.transpose(), d_gate_up_, normed_);
    normalise_back(executor_, tape.before_mlp, weights.mlp_norm, epsilon(), normed_, d_hidden);
  }

  /// d_hidden: by what comes into the MLP, then by what came into the layer.
  void attention_back(std::size_t layer, Matrix& d_hidden, std::span<double> d_gates) {
    const ModelConfig& config = model_.config;
    const LayerWeights& weights = model_.layers[layer];
    const LayerTape& tape = layers_[layer];
    multiply(executor_, weights.output.transpose(), d_hidden, attended_);
    d_qkv_.resize(tape.qkv.rows(), tape.qkv.cols());
    std::vector<double> of_layer(static_cast<std::size_t>(config.num_kv_heads));
    headwise::mixed_attention_backward(
        attention_of(layer), tape.attention, heads_at(attended_, 0),
        {heads_at(d_qkv_, 0), heads_at(d_qkv_, config.q_size()),
         heads_at(d_qkv_, config.q_size() + config.kv_size()), of_layer},
        scratch_, executor_);
    for (std::size_t h = 0; h < of_layer.size(); ++h) {
      d_gates[layer * of_layer.size() + h] += of_layer[h];
    }
    for_each_token(executor_, d_qkv_.cols(), [&](Eigen::Index token) {
      rotary_.rotate_back(token, d_qkv_.col(token).data(),
                          config.num_qo_heads + config.num_kv_heads);
    });
    multiply(executor_, weights.qkv.transpose(), d_qkv_, normed_);
    normalise_back(executor_, tape.before_attention, weights.attention_norm, epsilon(), normed_,
                   d_hidden);
  }

  const Model& model_;
  headwise::Window window_;
  Rotary rotary_;
  headwise::ModelShape shape_;
  Decoder<headwise::KvCache<headwise::f32>, E> unchanged_;
  E& executor_;
  headwise::Scratch scratch_;

  std::vector<LayerTape> layers_;
  std::vector<std::int64_t> labelled_;
  std::vector<double> gates_;
  std::vector<float> full_states_, mixed_states_;  // [labelled tokens, hidden]
  Matrix last_;                                    // [hidden, tokens] before the final norm
  Matrix normed_, attended_, projected_, activated_, d_gate_up_, d_qkv_;
};

}  // namespace needle_lm
