// SPDX-License-Identifier: MIT
/// @file shard.hpp
/// Tensor parallelism: which rank holds which KV heads, so that ranks keep equally much.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <queue>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise::inline v0 {

/// Which KV heads each tensor-parallel rank holds: in every layer equally many, so that all ranks
/// have weights of one shape. Made by shard().
class Sharding {
 public:
  int num_ranks() const { return num_ranks_; }
  int num_layers() const { return static_cast<int>(layers_.size()); }

  /// KV heads of a layer, rank after rank: new place -> the model's KV head. Rows of the K and V
  /// projections are to be gathered in this order. Where a layer has fewer KV heads than there are
  /// ranks, each stands there for every rank that holds it.
  std::span<const int> kv_heads(int layer) const& { return at(layer).kv_heads; }
  /// The part of one rank, ascending.
  std::span<const int> kv_heads(int layer, int rank) const& {
    HEADWISE_ASSERT(rank >= 0 && rank < num_ranks_, "rank out of range");
    const Layer& of = at(layer);
    const std::size_t per_rank = of.kv_heads.size() / static_cast<std::size_t>(num_ranks_);
    return std::span(of.kv_heads).subspan(static_cast<std::size_t>(rank) * per_rank, per_rank);
  }
  std::span<const int> kv_heads(int layer) const&& = delete;
  std::span<const int> kv_heads(int layer, int rank) const&& = delete;
  /// Ranks that hold each KV head of the layer; 1, unless it has fewer heads than there are ranks.
  int num_copies(int layer) const { return at(layer).num_copies; }

  /// Query heads of a layer, rank after rank: new place -> the model's query head. Rows of the Q
  /// projection and columns of the output projection are to be gathered in this order. Ranks that
  /// hold one KV head share its query heads.
  /// @throws ConfigError where they do not divide them.
  std::vector<int> query_heads(int layer, int group_size) const {
    const Layer& of = at(layer);
    const int share = share_of_group(layer, group_size);
    std::vector<int> heads;
    std::vector<int> copies(of.kv_heads.size(), 0);  // of the KV head, so far
    for (const int kv_head : of.kv_heads) {
      const int first = kv_head * group_size + copies[static_cast<std::size_t>(kv_head)]++ * share;
      for (int i = 0; i < share; ++i) heads.push_back(first + i);
    }
    return heads;
  }

  /// What a rank's heads keep.
  /// @param whole  the plan that was sharded
  /// @throws ConfigError for a rank out of range, or a plan of other heads.
  HeadPlan plan(const HeadPlan& whole, int rank) const {
    check_rank(rank);
    check_layers(whole.num_layers());
    std::vector<int> heads;
    for (int l = 0; l < num_layers(); ++l) {
      check_heads(l, whole.num_kv_heads(l));
      heads.push_back(static_cast<int>(kv_heads(l, rank).size()));
    }
    HeadPlan part(heads);
    for (int l = 0; l < num_layers(); ++l) {
      for (int h = 0; h < part.num_kv_heads(l); ++h) {
        part.set(l, h, whole.budget(l, kv_heads(l, rank)[static_cast<std::size_t>(h)]));
      }
    }
    return part;
  }

  /// The model as a rank sees it, with the sinks and slopes of its own query heads.
  /// @throws ConfigError for a rank out of range, a model of other heads, a group that its ranks do
  ///   not divide, or a layer whose heads were not dealt like those whose K and V it reads (give
  ///   both layers equal costs).
  ModelShape shape(const ModelShape& whole, int rank) const {
    check_rank(rank);
    check_layers(whole.num_layers());
    std::vector<LayerShape> part(whole.layers().begin(), whole.layers().end());
    for (int l = 0; l < num_layers(); ++l) {
      LayerShape& layer = part[static_cast<std::size_t>(l)];
      check_heads(l, layer.num_kv_heads);
      if (!layer.owns_kv() && !std::ranges::equal(kv_heads(l), kv_heads(layer.kv_layer))) {
        fail<ConfigError>("layer ", l, " reads K and V of layer ", layer.kv_layer,
                          ", whose heads were dealt otherwise");
      }
      const std::vector<int> queries = query_heads(l, layer.group_size);
      layer.num_kv_heads = static_cast<int>(kv_heads(l, rank).size());
      layer.group_size = share_of_group(l, layer.group_size);
      const auto count = static_cast<std::size_t>(layer.num_qo_heads());
      const auto mine = std::span(queries).subspan(static_cast<std::size_t>(rank) * count, count);
      for (std::vector<float>* of_query : {&layer.softmax.sinks, &layer.softmax.alibi_slopes}) {
        if (of_query->empty()) continue;
        std::vector<float> cut;
        for (const int head : mine) cut.push_back((*of_query)[static_cast<std::size_t>(head)]);
        *of_query = std::move(cut);
      }
    }
    return ModelShape(std::move(part));
  }

  /// What each rank keeps, [num_ranks], in the unit of the costs that shard() was given.
  std::span<const std::int64_t> costs() const& { return costs_; }
  /// The same if the heads were cut in the model's order.
  std::span<const std::int64_t> costs_in_order() const& { return costs_in_order_; }
  std::span<const std::int64_t> costs() const&& = delete;
  std::span<const std::int64_t> costs_in_order() const&& = delete;
  /// The fullest rank over the mean of all: 1 is even. Every rank needs the memory of the fullest.
  double imbalance() const { return imbalance_of(costs_); }
  /// The same if the heads were cut in the model's order.
  double imbalance_in_order() const { return imbalance_of(costs_in_order_); }

 private:
  friend Sharding shard(const HeadPlan& plan, int num_ranks, std::span<const std::int64_t> costs);

  struct Layer {
    std::vector<int> kv_heads;
    int num_heads = 0;
    int num_copies = 1;
  };

  const Layer& at(int layer) const {
    HEADWISE_ASSERT(layer >= 0 && layer < num_layers(), "layer out of range");
    return layers_[static_cast<std::size_t>(layer)];
  }
  void check_rank(int rank) const { detail::checked_range(rank, 0, num_ranks_ - 1, "rank"); }
  void check_layers(int layers) const {
    if (layers != num_layers()) {
      fail<ConfigError>("sharded were ", num_layers(), " layers, got ", layers);
    }
  }
  void check_heads(int layer, int heads) const {
    if (heads != at(layer).num_heads) {
      fail<ConfigError>("layer ", layer, ": sharded were ", at(layer).num_heads, " KV heads, got ",
                        heads);
    }
  }
  int share_of_group(int layer, int group_size) const {
    const int copies = at(layer).num_copies;
    if (group_size < 1 || group_size % copies != 0) {
      fail<ConfigError>("layer ", layer, ": ", copies,
                        " ranks hold each KV head and do not divide ", "its group of ", group_size,
                        " query heads");
    }
    return group_size / copies;
  }

  static double imbalance_of(std::span<const std::int64_t> costs) {
    const auto most = static_cast<double>(*std::max_element(costs.begin(), costs.end()));
    double sum = 0.0;
    for (const std::int64_t cost : costs) sum += static_cast<double>(cost);
    return sum == 0.0 ? 1.0 : most * static_cast<double>(costs.size()) / sum;
  }

  int num_ranks_ = 0;
  std::vector<Layer> layers_;
  std::vector<std::int64_t> costs_;           // [num_ranks]
  std::vector<std::int64_t> costs_in_order_;  // [num_ranks]
};

/// Shares the KV heads of every layer among ranks, equally many for each.
///
/// Without costs the heads stay in the model's order: rank r holds [r H / num_ranks, (r + 1) H /
/// num_ranks), as in RLKV's serving code, and no weight moves. With costs, which add up, they are
/// dealt so that ranks keep equally much: layer by layer, costly heads first, each to the rank that
/// has least of the layer, then least of all so far. Where all streaming heads cost the same the
/// ranks' numbers of retrieval heads differ by one at most, in every layer and in all together.
///
/// A layer of fewer KV heads than ranks has each of them on several ranks.
/// @param costs  of each head, layer by layer, >= 0: rows_kept() (heads/share.hpp), or the bytes of
///   head_bytes() (cache/estimate.hpp); empty: keep the order
/// @throws ConfigError for num_ranks < 1, ranks that do not divide a layer's KV heads and are no
///   multiple of them, or costs that are not one for each head, negative, or past 64 bits.
inline Sharding shard(const HeadPlan& plan, int num_ranks,
                      std::span<const std::int64_t> costs = {}) {
  detail::checked_range(num_ranks, 1, kMaxHeads, "num_ranks");
  if (!costs.empty() && costs.size() != plan.num_heads()) {
    fail<ConfigError>("the plan has ", plan.num_heads(), " KV heads, got ", costs.size(), " costs");
  }
  Sharding result;
  result.num_ranks_ = num_ranks;
  const auto ranks = static_cast<std::size_t>(num_ranks);
  result.costs_.assign(ranks, 0);
  result.costs_in_order_.assign(ranks, 0);
  const auto add = [](std::int64_t& sum, std::int64_t cost) {
    sum = detail::checked_add(sum, cost, "costs of a rank");
  };

  std::size_t first = 0;  // of the layer, among all heads
  for (int l = 0; l < plan.num_layers(); ++l) {
    const int heads = plan.num_kv_heads(l);
    if (heads % num_ranks != 0 && num_ranks % heads != 0) {
      fail<ConfigError>("layer ", l, ": ", num_ranks, " ranks do not divide ", heads,
                        " KV heads, nor do these divide the ranks");
    }
    const auto cost_of = [&](int head) {
      if (costs.empty()) return std::int64_t{0};
      const std::int64_t cost = costs[first + static_cast<std::size_t>(head)];
      return detail::checked_range(cost, 0, std::numeric_limits<std::int64_t>::max(),
                                   "the cost of a head");
    };
    const int copies = std::max(1, num_ranks / heads);
    const auto per_rank = static_cast<std::size_t>(std::max(1, heads / num_ranks));
    std::vector<int> dealt;  // each head as often as ranks hold it
    for (int h = 0; h < heads; ++h) dealt.insert(dealt.end(), static_cast<std::size_t>(copies), h);
    for (std::size_t i = 0; i < dealt.size(); ++i) {
      add(result.costs_in_order_[i / per_rank], cost_of(dealt[i]));
    }
    std::sort(dealt.begin(), dealt.end(), [&](int a, int b) {
      return std::tuple(-cost_of(a), a) < std::tuple(-cost_of(b), b);
    });

    // Ranks that have room, the one first that has least of the layer, then of all so far. Without
    // costs that is the model's order.
    using Load = std::tuple<std::int64_t, std::int64_t, std::size_t>;  // both, and the rank
    std::priority_queue<Load, std::vector<Load>, std::greater<>> loads;
    for (std::size_t r = 0; r < ranks; ++r) loads.emplace(0, result.costs_[r], r);
    std::vector<std::vector<int>> of_rank(ranks);
    for (const int head : dealt) {
      auto [of_layer, of_all, to] = loads.top();
      loads.pop();
      of_rank[to].push_back(head);
      add(of_layer, cost_of(head));
      add(result.costs_[to], cost_of(head));
      if (of_rank[to].size() < per_rank) loads.emplace(of_layer, result.costs_[to], to);
    }
    Sharding::Layer layer{{}, heads, copies};
    for (std::vector<int>& mine : of_rank) {
      std::sort(mine.begin(), mine.end());
      layer.kv_heads.insert(layer.kv_heads.end(), mine.begin(), mine.end());
    }
    result.layers_.push_back(std::move(layer));
    first += static_cast<std::size_t>(heads);
  }
  return result;
}

}  // namespace headwise::inline v0
