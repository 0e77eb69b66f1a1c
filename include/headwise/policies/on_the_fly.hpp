// SPDX-License-Identifier: MIT
/// @file on_the_fly.hpp
/// DuoAttention "on the fly": how far a head's mean query looks over its mean key, without
/// training.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "headwise/attention/rope.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/core/tensor_view.hpp"
#include "headwise/heads/scores.hpp"

/// kvpress' training-free stand-in for DuoAttention's gates (DuoAttentionPress,
/// duo_attention_on_the_fly). Of each text, a layer's mean query and mean key before RoPE are put
/// at `length` positions, with RoPE, and the last query attends to all keys:
///
///     score = mean over positions of the cumulated attention = sum over j of A[j] (length - j) /
///     length
///
/// averaged over a KV head's query heads and over the texts (there: 50 chapters). Attention spread
/// evenly scores (length + 1) / (2 length), about a half; all of it on the last key 1 / length, on
/// the first 1. So heads that score low are local: they stream.
///
///     on_the_fly::Probe probe(shape, rope);
///     probe.add(layer, q, k, first_position, num_tokens);    // each layer of each step, after
///     RoPE probe.end_text();                                      // after each text HeadPlan plan
///     = duo_attention::Policy{.sparsity = 0.5}.plan(probe.scores());
///
/// It sees where a head looks on average, not what it looks for: cheap, and blind to heads that
/// find one token among thousands.
namespace headwise::inline v0::on_the_fly {

/// Means of queries and keys, and the scores that follow.
class Probe {
 public:
  /// @param rope  the model's, of all layers; what it borrows must outlive the probe
  /// @param length  positions of the mean key; published: 500
  /// @throws ConfigError for a rope that is not of a layer's width, or a length below 1.
  explicit Probe(const ModelShape& shape, const Rope& rope, std::int64_t length = 500)
      : shape_(shape),
        rope_(rope),
        length_(headwise::detail::checked_range(length, 1, kMaxTokens, "positions of a mean key")) {
    for (const LayerShape& layer : shape.layers()) {
      rope.check(layer.k_dim);
      const auto dim = static_cast<std::size_t>(layer.k_dim);
      layers_.push_back({std::vector<double>(static_cast<std::size_t>(layer.num_qo_heads()) * dim),
                         std::vector<double>(static_cast<std::size_t>(layer.num_kv_heads) * dim),
                         std::vector<double>(static_cast<std::size_t>(layer.num_kv_heads))});
    }
  }

  /// Adds a step's rows of one layer; different layers may be added on different threads. The same
  /// bits however a text is cut.
  /// @param q  [num_tokens, num_qo_heads, k_dim] after RoPE, which is undone here
  /// @param k  [num_tokens, num_kv_heads, k_dim] the step's own, as q
  /// @param first_position  of the step's first token
  /// Cost: k_dim / 2 sines and cosines a token, 4 multiply-adds an element.
  void add(int layer, TensorView<const float> q, TensorView<const float> k,
           std::int64_t first_position, std::int64_t num_tokens) {
    const LayerShape& shape = shape_.layer(layer);
    Layer& of = layers_[static_cast<std::size_t>(layer)];
    std::vector<Turn> back(static_cast<std::size_t>(shape.k_dim) / 2);
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      for (std::size_t i = 0; i < back.size(); ++i) {
        back[i] = turn(static_cast<int>(i), shape.k_dim, first_position + t);
      }
      for (int h = 0; h < shape.num_qo_heads(); ++h) add_row(q.row(t, h), back, of.queries, h);
      for (int h = 0; h < shape.num_kv_heads; ++h) add_row(k.row(t, h), back, of.keys, h);
    }
    of.num_tokens += num_tokens;
  }

  /// Ends a text: its scores join the mean, in layers that had tokens.
  /// Cost: length x k_dim multiply-adds a query head.
  void end_text() {
    for (int l = 0; l < shape_.num_layers(); ++l) {
      Layer& of = layers_[static_cast<std::size_t>(l)];
      if (of.num_tokens == 0) continue;
      add_scores(shape_.layer(l), of);
      std::ranges::fill(of.queries, 0.0);
      std::ranges::fill(of.keys, 0.0);
      of.num_tokens = 0;
      ++of.num_texts;
    }
  }

  /// Scores of the texts that have ended, each in (0, 1]; 0 in a layer without any.
  HeadScores scores() const {
    std::vector<int> heads;
    std::vector<double> values;
    for (const Layer& of : layers_) {
      heads.push_back(static_cast<int>(of.scores.size()));
      const auto texts = static_cast<double>(std::max<std::int64_t>(1, of.num_texts));
      for (const double sum : of.scores) values.push_back(sum / texts);
    }
    return HeadScores(heads, std::move(values));
  }

 private:
  struct Layer {
    std::vector<double> queries;  // [query head][k_dim] sums before RoPE
    std::vector<double> keys;     // [KV head][k_dim]
    std::vector<double> scores;   // [KV head] sums over texts
    std::int64_t num_tokens = 0;  // of this text
    std::int64_t num_texts = 0;
  };
  struct Turn {
    double cos = 1.0;
    double sin = 0.0;
  };

  Turn turn(int pair, int dim, std::int64_t positions) const {
    const double angle = rope_.frequency(pair, dim) * static_cast<double>(positions);
    return {std::cos(angle), std::sin(angle)};
  }

  void add_row(const float* row, std::span<const Turn> back, std::vector<double>& sums,
               int head) const {
    const int dim = 2 * static_cast<int>(back.size());
    double* sum = sums.data() + static_cast<std::ptrdiff_t>(head) * dim;
    for (std::size_t i = 0; i < back.size(); ++i) {
      const auto [a, b] = rope_.pair(static_cast<int>(i), dim);
      const auto x = static_cast<double>(row[a]);
      const auto y = static_cast<double>(row[b]);
      sum[a] += x * back[i].cos + y * back[i].sin;
      sum[b] += y * back[i].cos - x * back[i].sin;
    }
  }

  void add_scores(const LayerShape& shape, Layer& of) const {
    const auto pairs = static_cast<std::size_t>(shape.k_dim) / 2;
    const auto length = static_cast<std::size_t>(length_);
    // The query stands at length - 1, so that logits[j] is of a key that is length - 1 - j back.
    std::vector<double> logits(static_cast<std::size_t>(shape.num_qo_heads()) * length, 0.0);
    const double scale = static_cast<double>(shape.scale()) /
                         (static_cast<double>(of.num_tokens) * static_cast<double>(of.num_tokens));
    for (std::size_t i = 0; i < pairs; ++i) {
      const auto [a, b] = rope_.pair(static_cast<int>(i), shape.k_dim);
      for (std::size_t j = 0; j < length; ++j) {
        const Turn away =
            turn(static_cast<int>(i), shape.k_dim, length_ - 1 - static_cast<std::int64_t>(j));
        for (int h = 0; h < shape.num_qo_heads(); ++h) {
          const double* q = of.queries.data() + static_cast<std::ptrdiff_t>(h) * shape.k_dim;
          const double* k =
              of.keys.data() + static_cast<std::ptrdiff_t>(h / shape.group_size) * shape.k_dim;
          logits[static_cast<std::size_t>(h) * length + j] +=
              scale *
              ((q[a] * k[a] + q[b] * k[b]) * away.cos + (q[a] * k[b] - q[b] * k[a]) * away.sin);
        }
      }
    }
    for (int h = 0; h < shape.num_qo_heads(); ++h) {
      of.scores[static_cast<std::size_t>(h / shape.group_size)] +=
          area(std::span(logits).subspan(static_cast<std::size_t>(h) * length, length)) /
          static_cast<double>(shape.group_size);
    }
  }

  /// Mean of the cumulated softmax.
  static double area(std::span<const double> logits) {
    const double max = *std::ranges::max_element(logits);
    double total = 0.0;
    double cumulated = 0.0;
    for (std::size_t j = 0; j < logits.size(); ++j) {
      const double weight = std::exp(logits[j] - max);
      total += weight;
      cumulated += weight * static_cast<double>(logits.size() - j);
    }
    return cumulated / (total * static_cast<double>(logits.size()));
  }

  ModelShape shape_;
  Rope rope_;
  std::int64_t length_;
  std::vector<Layer> layers_;
};

}  // namespace headwise::inline v0::on_the_fly
