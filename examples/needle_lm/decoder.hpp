// SPDX-License-Identifier: MIT
/// @file decoder.hpp
/// A Llama-style decoder whose attention and KV cache are Headwise: what an engine has to write.
///
/// All that touches the library: `cache.begin` before the layers, `attend` in each, `cache.commit`
/// after them. The rest (norms, rotary positions, matrix products) is any engine's own business and
/// knows nothing of head plans.
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "headwise/attention/attend.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/executor.hpp"
#include "kernels.hpp"
#include "layers.hpp"
#include "rotary.hpp"
#include "weights.hpp"

namespace needle_lm {

using Token = std::int32_t;

/// The next tokens of some sequences, one sequence after the other.
struct Batch {
  std::vector<headwise::SequenceChunk> chunks;
  std::vector<Token> tokens;

  void add(headwise::SequenceId sequence, std::span<const Token> next) {
    chunks.push_back({sequence, static_cast<std::int64_t>(next.size())});
    tokens.insert(tokens.end(), next.begin(), next.end());
  }
  void clear() {
    chunks.clear();
    tokens.clear();
  }
};

/// Sees Q [tokens, num_qo_heads, head_dim] and K [tokens, num_kv_heads, head_dim] of a step's
/// tokens in a layer, after rotary positions: what attention is about to be given. Borrowed for the
/// call.
using Observer = std::function<void(int layer, headwise::TensorView<const float> q,
                                    headwise::TensorView<const float> k, std::int64_t num_tokens)>;

/// @tparam Cache  headwise::KvCache of f16, bf16 or f32 rows, or what has its calls: CudaCache.
template <class Cache, headwise::Executor E>
class Decoder {
 public:
  /// @param model, executor  borrowed; must outlive the decoder.
  /// @param max_context  longest sequence it will be given, in tokens.
  Decoder(const Model& model, std::int64_t max_context, E& executor)
      : model_(model),
        rotary_(model.config.head_dim, model.config.rope_theta, max_context),
        executor_(executor) {}

  /// Has every layer of every step from now on seen.
  void observe(Observer observer) { observer_ = std::move(observer); }

  /// Runs the batch through all layers and appends it to the cache.
  /// @return the last layer's normalised hidden states [hidden, tokens]; valid until the next call.
  const Matrix& forward(Cache& cache, const Batch& batch) {
    find_positions(cache, batch);  // before begin: a sequence's length is its next position
    require_ok(cache.begin(step_, batch.chunks));
    embed(batch.tokens);
    for (int layer = 0; layer < model_.config.num_layers; ++layer) {
      add_attention(cache, layer);
      add_mlp(model_.layers[static_cast<std::size_t>(layer)]);
    }
    require_ok(cache.commit(step_));
    normalise(model_.final_norm);
    return normed_;
  }

  /// Logits [vocab, tokens] of the last forward's tokens [first, first + count).
  Matrix logits(Eigen::Index first, Eigen::Index count) const {
    return model_.embedding * normed_.middleCols(first, count);
  }

 private:
  static void require_ok(headwise::StepStatus status) {
    if (status != headwise::StepStatus::kOk) {
      throw std::runtime_error(std::string("the cache refused a step: ") +
                               std::string(to_string(status)));
    }
  }

  void find_positions(const Cache& cache, const Batch& batch) {
    positions_.clear();
    for (const auto& [sequence, num_tokens, phase] : batch.chunks) {
      const std::int64_t length = cache.length(sequence);
      for (std::int64_t i = 0; i < num_tokens; ++i) positions_.push_back(length + i);
    }
  }

  void embed(std::span<const Token> tokens) {
    hidden_.resize(model_.config.hidden_size, static_cast<Eigen::Index>(tokens.size()));
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      hidden_.col(static_cast<Eigen::Index>(i)) = model_.embedding.row(tokens[i]).transpose();
    }
  }

  void add_attention(Cache& cache, int layer) {
    const ModelConfig& config = model_.config;
    const LayerWeights& weights = model_.layers[static_cast<std::size_t>(layer)];
    normalise(weights.attention_norm);
    multiply(executor_, weights.qkv, normed_, qkv_);
    for_each_token(executor_, hidden_.cols(), [&](Eigen::Index token) {
      rotary_.rotate(positions_[static_cast<std::size_t>(token)], qkv_.col(token).data(),
                     config.num_qo_heads + config.num_kv_heads);  // Q and K, not V
    });

    // Q, K and V are borrowed where the product left them: [tokens, heads, head_dim], strided.
    attended_.resize(config.q_size(), hidden_.cols());
    const auto heads_at = [&](int feature) {
      return headwise::TensorView<const float>{qkv_.data() + feature, qkv_.rows(), config.head_dim};
    };
    if (observer_) observer_(layer, heads_at(0), heads_at(config.q_size()), hidden_.cols());
    using headwise::attend;    // or the cache's own
    static_cast<void>(attend(  // what it refuses, commit refuses too
        cache, step_, layer, heads_at(0), heads_at(config.q_size()),
        heads_at(config.q_size() + config.kv_size()),
        headwise::TensorView<float>::nhd(attended_.data(), config.num_qo_heads, config.head_dim),
        executor_));

    multiply(executor_, weights.output, attended_, projected_);
    hidden_ += projected_;
  }

  /// SwiGLU: down(silu(gate(x)) * up(x)).
  void add_mlp(const LayerWeights& weights) {
    normalise(weights.mlp_norm);
    multiply(executor_, weights.gate_up, normed_, gate_up_);
    activate(executor_, gate_up_, activated_);
    multiply(executor_, weights.down, activated_, projected_);
    hidden_ += projected_;
  }

  /// normed_ = RMSNorm of every token of hidden_.
  void normalise(const Eigen::VectorXf& gain) {
    needle_lm::normalise(executor_, hidden_, gain, model_.config.norm_epsilon, normed_);
  }

  const Model& model_;
  Rotary rotary_;
  E& executor_;
  Observer observer_;    // empty: nobody looks
  headwise::Step step_;  // reused: a step allocates nothing after the first of its size

  std::vector<std::int64_t> positions_;  // [tokens]
  Matrix hidden_;                        // [hidden, tokens]: the residual stream
  Matrix normed_;                        // [hidden, tokens]
  Matrix qkv_;                           // [q_size + 2 kv_size, tokens]
  Matrix attended_;                      // [q_size, tokens]
  Matrix projected_;                     // [hidden, tokens]
  Matrix gate_up_;                       // [2 intermediate, tokens]
  Matrix activated_;                     // [intermediate, tokens]
};

}  // namespace needle_lm
