// SPDX-License-Identifier: MIT
/// @file scores.hpp
/// HeadScores: one number for every KV head, and the named ways to get there from query heads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/head_grid.hpp"

namespace headwise::inline v0 {

/// Which heads of a layer a table has one value for.
enum class HeadAxis { kKv, kQuery };

/// A finite number for each head of each layer; layers may differ in their number of heads.
/// Query-head and KV-head tables are different types, so that nothing is selected from query heads
/// by mistake: reduce_max() and reduce_mean() lead from one to the other.
template <HeadAxis kAxis>
class HeadTable {
 public:
  /// Which heads the table is about.
  static constexpr HeadAxis kHeadAxis = kAxis;

  /// @param heads_per_layer  [num_layers], each >= 1.
  /// @param values  layer by layer, the sum of `heads_per_layer` in all; may lie outside [0, 1].
  /// @throws ConfigError for no layers, a layer without heads, more of either than kMaxLayers and
  ///   its sisters allow, another number of values, or a value that is NaN or infinite (with its
  ///   layer and head).
  HeadTable(std::span<const int> heads_per_layer, std::vector<double> values)
      : grid_(heads_per_layer, "a table of scores"), values_(std::move(values)) {
    if (values_.size() != num_heads()) {
      fail<ConfigError>("got ", values_.size(), " scores for ", num_heads(), " heads");
    }
    check_finite();
  }

  /// A table with `num_heads` heads in each of `num_layers` layers.
  /// @param values  [num_layers, num_heads], float or double.
  template <class Range>
  static HeadTable dense(int num_layers, int num_heads, const Range& values) {
    detail::checked_range(num_layers, 1, kMaxLayers, "num_layers");
    const std::vector<int> heads(static_cast<std::size_t>(num_layers), num_heads);
    return HeadTable(heads, std::vector<double>(std::begin(values), std::end(values)));
  }

  int num_layers() const { return grid_.num_layers(); }
  /// Heads of one layer, in [0, num_layers()).
  int num_heads(int layer) const { return grid_.num_heads(layer); }
  /// Heads of all layers.
  std::size_t num_heads() const { return grid_.num_heads(); }
  /// [num_layers()], as the constructor takes it.
  std::vector<int> heads_per_layer() const { return grid_.heads_per_layer(); }

  /// One head's value; finite.
  double value(int layer, int head) const { return values_[grid_.index(layer, head)]; }
  /// The values of one layer, [num_heads(layer)].
  std::span<const double> row(int layer) const& {
    return std::span(values_).subspan(grid_.first_of(layer),
                                      static_cast<std::size_t>(num_heads(layer)));
  }
  std::span<const double> row(int layer) const&& = delete;  ///< would outlive the table
  /// All values, layer by layer.
  std::span<const double> values() const& { return values_; }
  std::span<const double> values() const&& = delete;  ///< would outlive the table

  friend bool operator==(const HeadTable&, const HeadTable&) = default;

 private:
  void check_finite() const {
    for (int layer = 0; layer < num_layers(); ++layer) {
      for (int head = 0; head < num_heads(layer); ++head) {
        if (!is_finite(value(layer, head))) {
          fail<ConfigError>("layer ", layer, ", head ", head, ": a score must be finite, got ",
                            value(layer, head));
        }
      }
    }
  }

  detail::HeadGrid grid_;
  std::vector<double> values_;
};

/// [num_layers, num_kv_heads]: what selection works on.
using HeadScores = HeadTable<HeadAxis::kKv>;
/// [num_layers, num_qo_heads]: what attention weights are measured on.
using QueryHeadScores = HeadTable<HeadAxis::kQuery>;

/// Refuses scores that are not of this model; in particular query-head scores read as KV-head ones.
/// @param name  what the message begins with: the file the scores came from.
/// @throws ConfigError with both counts, and the way out where these are query-head scores.
template <HeadAxis kAxis>
void check_shape(const HeadTable<kAxis>& scores, const ModelShape& shape,
                 std::string_view name = "scores") {
  if (scores.num_layers() != shape.num_layers()) {
    fail<ConfigError>(name, ": ", scores.num_layers(), " layers, the model has ",
                      shape.num_layers());
  }
  for (int i = 0; i < shape.num_layers(); ++i) {
    const LayerShape& layer = shape.layer(i);
    const int expected = kAxis == HeadAxis::kKv ? layer.num_kv_heads : layer.num_qo_heads();
    if (scores.num_heads(i) == expected) continue;
    if (kAxis == HeadAxis::kKv && scores.num_heads(i) == layer.num_qo_heads()) {
      fail<ConfigError>(name, ": layer ", i, " has ", scores.num_heads(i),
                        " values, one for each query head, but the model has ", expected,
                        " KV heads: read them as QueryHeadScores and use reduce_max(scores, ",
                        layer.group_size, ")");
    }
    fail<ConfigError>(name, ": layer ", i, " has ", scores.num_heads(i), " values, the model has ",
                      expected, kAxis == HeadAxis::kKv ? " KV heads" : " query heads");
  }
}

}  // namespace headwise::inline v0

namespace headwise::inline v0::detail {

/// KV head `h` gets `combine` of its group: the contiguous query heads [h * g, (h + 1) * g).
/// @param group_of  layer -> its query heads per KV head
/// @param combine  span of a group's values -> their one value.
template <class GroupOf, class Combine>
HeadScores reduce(const QueryHeadScores& scores, GroupOf group_of, Combine combine) {
  std::vector<int> kv_heads;
  std::vector<double> values;
  for (int layer = 0; layer < scores.num_layers(); ++layer) {
    const int group_size = group_of(layer);
    if (group_size < 1) fail<ConfigError>("group_size must be at least 1, got ", group_size);
    if (scores.num_heads(layer) % group_size != 0) {
      fail<ConfigError>("layer ", layer, ": group_size ", group_size, " does not divide ",
                        scores.num_heads(layer), " query heads");
    }
    kv_heads.push_back(scores.num_heads(layer) / group_size);
    const auto group = static_cast<std::size_t>(group_size);
    for (std::size_t first = 0; first < scores.row(layer).size(); first += group) {
      values.push_back(combine(scores.row(layer).subspan(first, group)));
    }
  }
  return HeadScores(kv_heads, std::move(values));
}

inline double largest(std::span<const double> group) {
  return *std::max_element(group.begin(), group.end());
}

}  // namespace headwise::inline v0::detail

namespace headwise::inline v0 {

/// A KV head is worth what its best query head is worth: for "which heads keep everything"
/// decisions, as RazorAttention's released code does.
/// @param group_size  query heads per KV head; divides every layer's number of query heads.
/// @throws ConfigError where it does not.
inline HeadScores reduce_max(const QueryHeadScores& scores, int group_size) {
  return detail::reduce(
      scores, [=](int) { return group_size; }, detail::largest);
}
/// The same for a model, whose layers may differ in their groups.
/// @throws ConfigError where the scores are not of its query heads (check_shape()).
inline HeadScores reduce_max(const QueryHeadScores& scores, const ModelShape& shape) {
  check_shape(scores, shape);
  return detail::reduce(
      scores, [&](int layer) { return shape.layer(layer).group_size; }, detail::largest);
}

/// A KV head is worth the mean of its query heads: for tables of budgets, whose sum it keeps
/// (KVCache-Factory's default).
inline HeadScores reduce_mean(const QueryHeadScores& scores, int group_size) {
  return detail::reduce(
      scores, [=](int) { return group_size; },
      [](std::span<const double> group) {
        double sum = 0.0;
        for (const double value : group) sum += value;
        return sum / static_cast<double>(group.size());
      });
}

}  // namespace headwise::inline v0
