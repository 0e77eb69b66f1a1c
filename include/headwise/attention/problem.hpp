// SPDX-License-Identifier: MIT
/// @file problem.hpp
/// HeadProblem: everything a kernel may know about one KV head in one step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "headwise/core/io_view.hpp"
#include "headwise/core/kv_view.hpp"
#include "headwise/core/position.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/core/window.hpp"

namespace headwise::inline v0 {

/// A layer's SoftmaxOptions for the query heads of one KV head; pointers are borrowed.
struct HeadSoftmax {
  float soft_cap = 0.0F;                ///< 0: none
  const float* sinks = nullptr;         ///< [group_size] logits; null: none
  const float* alibi_slopes = nullptr;  ///< [group_size]; null: none

  /// Those of one KV head; valid as long as the layer's.
  static HeadSoftmax of(const LayerShape& layer, int kv_head) {
    const auto first =
        static_cast<std::size_t>(kv_head) * static_cast<std::size_t>(layer.group_size);
    const auto at = [&](const std::vector<float>& values) {
      return values.empty() ? nullptr : values.data() + first;
    };
    return {layer.softmax.soft_cap, at(layer.softmax.sinks), at(layer.softmax.alibi_slopes)};
  }
  static HeadSoftmax of(const LayerShape&& layer, int kv_head) = delete;  ///< would outlive it
};

/// Attention of a step's queries over one KV head, for all query heads of its group.
///
/// Query `i` (0-based in the step, at position `first_query + i`) sees
///  - every row of `past` whose position its `window` allows (the sinks and the recent ones),
///  - the compensation row, if there is one, with logit `capped(scale * q.k_mean) + ln(count)`,
///  - the step's own rows 0..i that the window allows, rounded by `Format` exactly as the cache
///    will store them.
/// The logit of a row at position `j` is `capped(scale * q.k) + slope * (j - i)` for a query at
/// `i`, where capped(s) is soft_cap * tanh(s / soft_cap) or s itself, and slope that of the query
/// head. A sink adds exp(sink) to the softmax's sum and has no value.
///
/// A query that sees nothing yields a zero row (log-sum-exp -inf, or its sink), and so does one
/// whose visible logits are all -inf: they are f32, so one below its range is. What a query does
/// not see contributes nothing whatever its bits are. Among what it does see, a logit of +inf or
/// NaN makes the row NaN, and an infinite or NaN V makes its element of the row infinite or NaN.
template <class Format>
struct HeadProblem {
  KvView<Format> past;  ///< rows stored before the step; none of them is at or after first_query
  Window window;        ///< Window::everything() where `past` already says it all

  Pos first_query;               ///< position of query 0 and of own row 0
  std::int64_t num_queries = 0;  ///< tokens of this sequence in the step
  int group_size = 1;            ///< query heads that share the KV head
  float scale = 1.0F;            ///< factor on q.k
  HeadSoftmax softmax = {};      ///< what the softmax has besides; no slopes with a compensation
                                 ///< row, which has no position

  InputView q;      ///< [num_queries, group_size, k_dim]
  InputView own_k;  ///< [num_queries, 1, k_dim]
  InputView own_v;  ///< [num_queries, 1, v_dim]
  OutputView out;   ///< [num_queries, group_size, v_dim]
};

}  // namespace headwise::inline v0
