// SPDX-License-Identifier: MIT
/// @file select.hpp
/// Scores to plan: which heads keep everything and which stream.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/count_rule.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/heads/splitmix64.hpp"

namespace headwise::inline v0 {

/// All KV heads, the first to stream first: by clipped value, raw value, layer, head, ascending.
/// Values are clipped to [0, 1], as the loaders of the published gates do: training leaves them a
/// little outside.
/// @param jitter_seed  adds Uniform(0, 1e-6) to every clipped value, as DuoAttention's code does
///   (there unseeded). It decides ties at 0 and 1 by chance; without it the order does.
inline std::vector<HeadId> streaming_order(const HeadScores& scores,
                                           std::optional<std::uint64_t> jitter_seed = {}) {
  struct Entry {
    double clipped;
    double raw;
    HeadId head;
  };
  constexpr double kJitter = 1e-6;  // duo_attn/utils.py, sparsify_attention_heads
  SplitMix64 random(jitter_seed.value_or(0));
  std::vector<Entry> entries;
  entries.reserve(scores.num_heads());
  for (int layer = 0; layer < scores.num_layers(); ++layer) {
    for (int head = 0; head < scores.num_heads(layer); ++head) {
      const double raw = scores.value(layer, head);
      const double noise = jitter_seed ? kJitter * random.next_unit() : 0.0;
      entries.push_back({std::clamp(raw, 0.0, 1.0) + noise, raw, {layer, head}});
    }
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.clipped, a.raw, a.head) < std::tie(b.clipped, b.raw, b.head);
  });
  std::vector<HeadId> order;
  order.reserve(entries.size());
  for (const Entry& entry : entries) order.push_back(entry.head);
  return order;
}

/// The `num_retrieval` highest heads keep everything, the others `streaming`.
/// @throws ConfigError when there are fewer heads, or `streaming` is out of range (HeadPlan::set).
inline HeadPlan select_top(const HeadScores& scores, std::size_t num_retrieval,
                           const HeadBudget& streaming,
                           std::optional<std::uint64_t> jitter_seed = {}) {
  if (num_retrieval > scores.num_heads()) {
    fail<ConfigError>("cannot keep ", num_retrieval, " heads of ", scores.num_heads());
  }
  HeadPlan plan(scores.heads_per_layer(), streaming);
  const std::vector<HeadId> order = streaming_order(scores, jitter_seed);
  for (std::size_t i = order.size() - num_retrieval; i < order.size(); ++i) {
    plan.set(order[i].layer, order[i].kv_head, KeepEverything{});
  }
  return plan;
}

/// Heads whose raw score is at least `threshold` keep everything, the others `streaming`.
/// @throws ConfigError for a threshold that is not finite, or `streaming` out of range.
inline HeadPlan select_at_least(const HeadScores& scores, double threshold,
                                const HeadBudget& streaming) {
  if (!is_finite(threshold)) fail<ConfigError>("a threshold must be finite, got ", threshold);
  HeadPlan plan(scores.heads_per_layer(), streaming);
  for (int layer = 0; layer < scores.num_layers(); ++layer) {
    for (int head = 0; head < scores.num_heads(layer); ++head) {
      if (scores.value(layer, head) >= threshold) plan.set(layer, head, KeepEverything{});
    }
  }
  return plan;
}

/// What select() needs besides scores.
struct SelectOptions {
  double sparsity = 0.0;  ///< share of KV heads that stream, in [0, 1]
  Window window{};        ///< what a streaming head keeps; must be given, no score file says it
  std::int64_t prompt_recent = 0;               ///< KeepWindow::prompt_recent of a streaming head
  CountRule count_rule = CountRule::kQuantile;  ///< see num_streaming()
  std::optional<std::uint64_t> jitter_seed{};   ///< see streaming_order()
};

/// The lowest scores stream, over all layers together, as many as the count rule says: exactly that
/// many also when values tie. HeadPlan::sparsity() is the share achieved. Deterministic; a higher
/// sparsity never turns a streaming head back.
/// @throws ConfigError for a sparsity outside [0, 1], or a window that was not given.
/// @see DuoAttention, arXiv:2410.10819, eq. 4, and its released code, from which the count comes.
/// The paper's `>` and the code's `>=` against the quantile differ when values tie.
inline HeadPlan select(const HeadScores& scores, const SelectOptions& options) {
  const std::size_t streaming =
      num_streaming(scores.num_heads(), options.sparsity, options.count_rule);
  if (!options.window.bounded()) {
    fail<ConfigError>("select needs a window: the scores do not say what a streaming head keeps");
  }
  return select_top(scores, scores.num_heads() - streaming,
                    KeepWindow{options.window, options.prompt_recent}, options.jitter_seed);
}
/// KV heads are stored, so KV heads are selected: reduce_max() or reduce_mean() comes first.
HeadPlan select(const HeadTable<HeadAxis::kQuery>& scores, const SelectOptions& options) = delete;

}  // namespace headwise::inline v0
