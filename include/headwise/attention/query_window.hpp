// SPDX-License-Identifier: MIT
/// @file query_window.hpp
/// QueryWindow: the last queries of a sequence, recorded for the scorers that ask what they see.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/attention/observed_queries.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/core/tensor_view.hpp"

namespace headwise::inline v0 {

/// The last `window` queries of each query head of each layer, after RoPE, with their positions,
/// of one sequence. The engine notes each step's queries in it; a copy goes with a fork. It records
/// what it is told: after a rollback, forget() what is no longer there.
class QueryWindow {
 public:
  /// @throws ConfigError for a window below 1 or beyond kMaxTokens, or bytes that pass 64 bits.
  QueryWindow(const ModelShape& shape, std::int64_t window)
      : window_(detail::checked_range(window, 1, kMaxTokens, "window of queries")) {
    std::size_t floats = 0;
    for (int l = 0; l < shape.num_layers(); ++l) {
      const LayerShape& layer = shape.layer(l);
      layers_.push_back({layer, floats, {}});
      layers_.back().positions.reserve(static_cast<std::size_t>(window));
      floats = detail::checked_add(floats, layer_floats(layer, window_), "floats of queries");
    }
    queries_.resize(floats);
  }

  /// What one sequence's window takes: for an estimate.
  /// @throws ConfigError as the constructor.
  static std::size_t bytes(const ModelShape& shape, std::int64_t window) {
    detail::checked_range(window, 1, kMaxTokens, "window of queries");
    std::size_t floats = 0;
    for (int l = 0; l < shape.num_layers(); ++l) {
      // A position a query, beside its rows.
      const std::size_t layer = detail::checked_add(layer_floats(shape.layer(l), window),
                                                    static_cast<std::size_t>(window), "queries");
      floats = detail::checked_add(floats, layer, "floats of queries");
    }
    return detail::checked_mul(floats, sizeof(float), "bytes of queries");
  }

  /// Records a step's queries of one layer: only the last `window` of them are read.
  /// @param q  [num_tokens, num_qo_heads, k_dim], the sequence's rows, after RoPE
  /// @param first_position  of the first of them
  void note(int layer, TensorView<const float> q, std::int64_t first_position,
            std::int64_t num_tokens) {
    Layer& of = layers_[static_cast<std::size_t>(layer)];
    const int num_heads = of.shape.num_kv_heads * of.shape.group_size;
    for (std::int64_t i = std::max<std::int64_t>(0, num_tokens - window_); i < num_tokens; ++i) {
      if (std::ssize(of.positions) < window_) of.positions.push_back(-1);  // the oldest, to go
      const auto oldest = std::ranges::min_element(of.positions);
      *oldest = static_cast<std::int32_t>(first_position + i);
      const auto row = static_cast<std::size_t>(oldest - of.positions.begin());
      for (int h = 0; h < num_heads; ++h) {
        std::copy_n(q.row(i, h), of.shape.k_dim, queries_.data() + row_offset(of, h, row));
      }
    }
  }

  /// Drops queries at `length` and beyond: a rollback's. Those that they had pushed out are gone.
  void forget(std::int64_t length) {
    for (Layer& of : layers_) {
      std::size_t kept = 0;
      const int num_heads = of.shape.num_kv_heads * of.shape.group_size;
      for (std::size_t i = 0; i < of.positions.size(); ++i) {
        if (of.positions[i] >= length) continue;
        of.positions[kept] = of.positions[i];
        for (int h = 0; h < num_heads && kept != i; ++h) {
          std::copy_n(queries_.data() + row_offset(of, h, i), of.shape.k_dim,
                      queries_.data() + row_offset(of, h, kept));
        }
        ++kept;
      }
      of.positions.resize(kept);
    }
  }

  /// What is recorded for the query heads of one KV head; valid until the next note().
  ObservedQueries of_head(int layer, int kv_head) const& {
    const Layer& of = layers_[static_cast<std::size_t>(layer)];
    const LayerShape& shape = of.shape;
    const float* first = queries_.data() + row_offset(of, kv_head * shape.group_size, 0);
    return {{first, shape.k_dim, window_ * shape.k_dim},
            of.positions,
            shape.group_size,
            shape.k_dim,
            shape.scale()};
  }
  ObservedQueries of_head(int layer, int kv_head) const&& = delete;
  /// Queries kept of each head.
  std::int64_t window() const { return window_; }

 private:
  struct Layer {
    LayerShape shape;
    std::size_t first;                    // float of query head 0
    std::vector<std::int32_t> positions;  // of the rows in use, in any order
  };

  static std::size_t layer_floats(const LayerShape& layer, std::int64_t window) {
    const auto heads =
        static_cast<std::size_t>(layer.num_kv_heads) * static_cast<std::size_t>(layer.group_size);
    return detail::checked_mul(heads * static_cast<std::size_t>(layer.k_dim),
                               static_cast<std::size_t>(window), "floats of queries");
  }
  std::size_t row_offset(const Layer& of, int head, std::size_t row) const {
    return of.first + (static_cast<std::size_t>(head) * static_cast<std::size_t>(window_) + row) *
                          static_cast<std::size_t>(of.shape.k_dim);
  }

  std::int64_t window_;
  std::vector<Layer> layers_;
  std::vector<float> queries_;  // [layer][query head][window][k_dim]
};

}  // namespace headwise::inline v0
