// SPDX-License-Identifier: MIT
/// @file double_forward.hpp
/// The same model once more: plain loops in double, no cache, an explicit mask. Shares no code with
/// the example or the library.
#pragma once

#include <cmath>
#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "random_model.hpp"

namespace needle_lm::testing {

using Rows = std::vector<std::vector<double>>;  ///< [tokens][features]

/// Whether the query at `i` of a layer's KV head sees the key at `j`, for j <= i.
using Sees = std::function<bool(int layer, int kv_head, int i, int j)>;

/// One of the softmaxes that a layer's attention is made of, and its share in each KV head.
struct Half {
  Sees sees;
  std::function<double(int layer, int kv_head)> share;
};

class DoubleForward {
 public:
  DoubleForward(const nlohmann::json& config, const NamedTensors& weights)
      : config_(config), weights_(weights) {}

  /// Logits [tokens][vocab].
  Rows logits(const std::vector<int>& tokens, const Sees& sees) const {
    return times(states(tokens, {{sees, [](int, int) { return 1.0; }}}), "model.embed_tokens");
  }

  /// Last hidden states [tokens][hidden], after the final norm.
  Rows states(const std::vector<int>& tokens, const std::vector<Half>& halves) const {
    const NamedTensor& embedding = weights_.at("model.embed_tokens.weight");
    const std::size_t hidden = size("hidden_size");
    Rows x;
    for (const int token : tokens) {
      const auto row = embedding.values.begin() +
                       static_cast<std::ptrdiff_t>(token) * static_cast<std::ptrdiff_t>(hidden);
      x.emplace_back(row, row + static_cast<std::ptrdiff_t>(hidden));
    }
    for (int layer = 0; layer < static_cast<int>(size("num_hidden_layers")); ++layer) {
      const std::string name = "model.layers." + std::to_string(layer) + ".";
      add(x, attention(norm(x, name + "input_layernorm"), layer, halves));
      add(x, mlp(norm(x, name + "post_attention_layernorm"), name + "mlp."));
    }
    return norm(x, "model.norm");
  }

 private:
  std::size_t size(const char* key) const { return config_.at(key).get<std::size_t>(); }

  static void add(Rows& x, const Rows& y) {
    for (std::size_t t = 0; t < x.size(); ++t) {
      for (std::size_t i = 0; i < x[t].size(); ++i) x[t][i] += y[t][i];
    }
  }

  Rows norm(const Rows& x, const std::string& name) const {
    const auto& gain = weights_.at(name + ".weight").values;
    Rows out = x;
    for (auto& row : out) {
      double sum = 0.0;
      for (const double value : row) sum += value * value;
      const double root = std::sqrt(sum / static_cast<double>(row.size()) +
                                    config_.at("rms_norm_eps").get<double>());
      for (std::size_t i = 0; i < row.size(); ++i) row[i] *= static_cast<double>(gain[i]) / root;
    }
    return out;
  }

  /// x * weight^T
  Rows times(const Rows& x, const std::string& name) const {
    const NamedTensor& weight = weights_.at(name + ".weight");
    const auto rows = static_cast<std::size_t>(weight.shape[0]);
    const auto columns = static_cast<std::size_t>(weight.shape[1]);
    Rows out(x.size(), std::vector<double>(rows, 0.0));
    for (std::size_t t = 0; t < x.size(); ++t) {
      for (std::size_t r = 0; r < rows; ++r) {
        for (std::size_t c = 0; c < columns; ++c) {
          out[t][r] += static_cast<double>(weight.values[r * columns + c]) * x[t][c];
        }
      }
    }
    return out;
  }

  void rotate(Rows& x, std::size_t heads) const {
    const std::size_t dim = size("head_dim");
    const double theta = config_.at("rope_theta").get<double>();
    for (std::size_t t = 0; t < x.size(); ++t) {
      for (std::size_t head = 0; head < heads; ++head) {
        for (std::size_t i = 0; i < dim / 2; ++i) {
          const double angle =
              static_cast<double>(t) /
              std::pow(theta, 2.0 * static_cast<double>(i) / static_cast<double>(dim));
          double& first = x[t][head * dim + i];
          double& second = x[t][head * dim + dim / 2 + i];
          const double a = first;
          const double b = second;
          first = a * std::cos(angle) - b * std::sin(angle);
          second = b * std::cos(angle) + a * std::sin(angle);
        }
      }
    }
  }

  Rows attention(const Rows& x, int layer, const std::vector<Half>& halves) const {
    const std::string name = "model.layers." + std::to_string(layer) + ".self_attn.";
    const std::size_t dim = size("head_dim");
    const std::size_t num_qo = size("num_attention_heads");
    const std::size_t num_kv = size("num_key_value_heads");
    Rows q = times(x, name + "q_proj");
    Rows k = times(x, name + "k_proj");
    const Rows v = times(x, name + "v_proj");
    rotate(q, num_qo);
    rotate(k, num_kv);
    Rows out(x.size(), std::vector<double>(num_qo * dim, 0.0));
    for (std::size_t i = 0; i < x.size(); ++i) {
      for (std::size_t head = 0; head < num_qo; ++head) {
        const std::size_t kv_head = head / (num_qo / num_kv);
        for (const Half& half : halves) {
          double sum = 0.0;
          std::vector<double> mean(dim, 0.0);
          for (std::size_t j = 0; j <= i; ++j) {
            if (!half.sees(layer, static_cast<int>(kv_head), static_cast<int>(i),
                           static_cast<int>(j))) {
              continue;
            }
            double dot = 0.0;
            for (std::size_t d = 0; d < dim; ++d) {
              dot += q[i][head * dim + d] * k[j][kv_head * dim + d];
            }
            const double weight = std::exp(dot / std::sqrt(static_cast<double>(dim)));
            sum += weight;
            for (std::size_t d = 0; d < dim; ++d) mean[d] += weight * v[j][kv_head * dim + d];
          }
          const double share = half.share(layer, static_cast<int>(kv_head)) / sum;
          for (std::size_t d = 0; d < dim; ++d) out[i][head * dim + d] += share * mean[d];
        }
      }
    }
    return times(out, name + "o_proj");
  }

  Rows mlp(const Rows& x, const std::string& name) const {
    Rows gate = times(x, name + "gate_proj");
    const Rows up = times(x, name + "up_proj");
    for (std::size_t t = 0; t < gate.size(); ++t) {
      for (std::size_t i = 0; i < gate[t].size(); ++i) {
        gate[t][i] *= up[t][i] / (1.0 + std::exp(-gate[t][i]));
      }
    }
    return times(gate, name + "down_proj");
  }

  const nlohmann::json& config_;
  const NamedTensors& weights_;
};

}  // namespace needle_lm::testing
