// SPDX-License-Identifier: MIT
/// @file model.hpp
/// Stands in for a model in the examples: makes up q, k and v, and knows the right answer to them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <variant>
#include <vector>

#include "headwise/attention/reference.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/core/tensor_view.hpp"
#include "headwise/heads/plan.hpp"

namespace stand_in {

/// One row of a step: the token at `pos` of a text.
struct Token {
  std::uint32_t text = 0;
  std::int64_t pos = 0;
};

/// Tokens [first, first + count) of a text, added to `rows`.
inline void add_tokens(std::vector<Token>& rows, std::uint32_t text, std::int64_t first,
                       std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) rows.push_back({text, first + i});
}

/// Layers of equal shape whose q, k and v depend on text, position, layer and head alone, as those
/// of a model do that has read the text up to there.
class Model {
 public:
  Model(int num_layers, int num_qo_heads, int num_kv_heads, int head_dim)
      : Model(headwise::ModelShape::uniform(num_layers, num_qo_heads, num_kv_heads, head_dim)) {}
  explicit Model(headwise::ModelShape shape) : shape_(std::move(shape)) {}

  const headwise::ModelShape& shape() const { return shape_; }

  /// Makes room for the rows of a step; one thread, before any project().
  void resize(std::size_t num_rows) {
    const auto dim = static_cast<std::size_t>(layer().k_dim);
    q_.resize(num_rows * static_cast<std::size_t>(layer().num_qo_heads()) * dim);
    k_.resize(num_rows * static_cast<std::size_t>(layer().num_kv_heads) * dim);
    v_.resize(k_.size());
    out_.assign(q_.size(), 0.0F);
  }

  /// What a layer's projections and RoPE would leave in one row of q, k and v.
  void project(int layer_idx, std::size_t row, Token token) {
    fill(&q_[row * width(layer().num_qo_heads())], layer().num_qo_heads(), kQuery, layer_idx,
         token);
    fill(&k_[row * width(layer().num_kv_heads)], layer().num_kv_heads, kKey, layer_idx, token);
    fill(&v_[row * width(layer().num_kv_heads)], layer().num_kv_heads, kValue, layer_idx, token);
  }
  void project(int layer_idx, std::span<const Token> rows) {
    resize(rows.size());
    for (std::size_t row = 0; row < rows.size(); ++row) project(layer_idx, row, rows[row]);
  }

  using Input = headwise::TensorView<const float>;
  using Output = headwise::TensorView<float>;
  Input q() const { return Input::nhd(q_.data(), layer().num_qo_heads(), layer().k_dim); }
  Input k() const { return Input::nhd(k_.data(), layer().num_kv_heads, layer().k_dim); }
  Input v() const { return Input::nhd(v_.data(), layer().num_kv_heads, layer().v_dim); }
  Output out() { return Output::nhd(out_.data(), layer().num_qo_heads(), layer().v_dim); }
  std::span<const float> out_floats() const { return out_; }

  /// Largest difference between one row of out and attention in double over the text's whole
  /// history, of which each KV head sees what the plan's window lets it see.
  /// @tparam Row  what K and V are stored as.
  template <headwise::RowElement Row = headwise::f16>
  double error(int layer_idx, std::size_t row, Token token, const headwise::HeadPlan& plan) const {
    double worst = 0.0;
    const auto n = static_cast<std::size_t>(token.pos) + 1;
    for (int head = 0; head < layer().num_qo_heads(); ++head) {
      const int kv_head = head / layer().group_size;
      const std::vector<float> k = history<Row>(kKey, layer_idx, kv_head, token.text, n);
      const std::vector<float> v = history<Row>(kValue, layer_idx, kv_head, token.text, n);
      const auto* keep = std::get_if<headwise::KeepWindow>(&plan.budget(layer_idx, kv_head));
      const auto window = keep != nullptr ? keep->window : headwise::Window::everything();
      const std::vector<double> expected = headwise::reference_attention(
          q().row(static_cast<std::int64_t>(row), head), k.data(), v.data(), token.pos + 1,
          layer().k_dim, layer().v_dim, layer().scale(),
          [&](std::int64_t j) { return window.sees(headwise::Pos{token.pos}, headwise::Pos{j}); });
      const float* got = &out_[row * width(layer().num_qo_heads())] + head * layer().v_dim;
      for (std::size_t d = 0; d < expected.size(); ++d) {
        const double difference = std::abs(static_cast<double>(got[d]) - expected[d]);
        worst = difference <= worst ? worst : difference;  // a NaN is kept
      }
    }
    return worst;
  }

 private:
  enum What : std::uint32_t { kQuery = 1, kKey = 2, kValue = 3 };

  const headwise::LayerShape& layer() const { return shape_.layer(0); }
  std::size_t width(int heads) const { return static_cast<std::size_t>(heads * layer().k_dim); }

  /// Any fixed number in [-1, 1) will do as an activation.
  static float value(What what, int layer, int head, Token token, int dim) {
    std::uint32_t x = static_cast<std::uint32_t>(token.pos) * 2654435761U + what * 40503U;
    x ^= (token.text * 64 + static_cast<std::uint32_t>(layer)) * 2246822519U;
    x ^= static_cast<std::uint32_t>(head * 256 + dim) * 3266489917U;
    x = (x ^ (x >> 15U)) * 2246822519U;
    x = (x ^ (x >> 13U)) * 3266489917U;
    return static_cast<float>(x >> 8U) / 8388608.0F - 1.0F;
  }

  void fill(float* to, int heads, What what, int layer_idx, Token token) const {
    for (int head = 0; head < heads; ++head) {
      for (int d = 0; d < layer().k_dim; ++d) *to++ = value(what, layer_idx, head, token, d);
    }
  }

  /// [n, head_dim] of one KV head, as rows keep it.
  template <headwise::RowElement Row>
  std::vector<float> history(What what, int layer_idx, int kv_head, std::uint32_t text,
                             std::size_t n) const {
    std::vector<float> rows;
    for (std::size_t pos = 0; pos < n; ++pos) {
      for (int d = 0; d < layer().k_dim; ++d) {
        const float x = value(what, layer_idx, kv_head, {text, static_cast<std::int64_t>(pos)}, d);
        rows.push_back(headwise::to_float(headwise::from_float<Row>(x)));
      }
    }
    return rows;
  }

  headwise::ModelShape shape_;
  std::vector<float> q_, k_, v_, out_;  // [rows, heads, head_dim]
};

}  // namespace stand_in
