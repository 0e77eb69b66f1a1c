// SPDX-License-Identifier: MIT
/// @file plan.hpp
/// HeadPlan: a budget for every KV head of a model.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/budget.hpp"

namespace headwise::inline v0 {

/// One KV head of a model.
struct HeadId {
  int layer = 0;    ///< from 0
  int kv_head = 0;  ///< from 0 in its layer
  friend constexpr auto operator<=>(HeadId, HeadId) = default;
};

/// What every KV head keeps; layers may differ in their number of heads. Integers in, integers
/// out: knows neither memory nor kernels.
class HeadPlan {
 public:
  /// @param heads_per_layer  KV heads of each layer, all >= 1.
  /// @param budget  what every head starts with.
  /// @throws ConfigError for no layers, a layer without heads, or a budget out of range (set()).
  explicit HeadPlan(std::span<const int> heads_per_layer, const HeadBudget& budget = {}) {
    if (heads_per_layer.empty()) fail<ConfigError>("a plan needs at least one layer, got 0");
    first_.push_back(0);
    for (const int heads : heads_per_layer) {
      if (heads < 1) {
        fail<ConfigError>("layer ", first_.size() - 1, ": a plan needs at least 1 KV head, got ",
                          heads);
      }
      first_.push_back(first_.back() + static_cast<std::size_t>(heads));
    }
    check(budget);
    budgets_.assign(first_.back(), budget);
  }

  /// A plan for `shape` in which every head has the same budget.
  explicit HeadPlan(const ModelShape& shape, const HeadBudget& budget = {})
      : HeadPlan(heads_of(shape), budget) {}

  /// Layers of the model.
  int num_layers() const { return static_cast<int>(first_.size()) - 1; }
  /// KV heads of one layer.
  int num_kv_heads(int layer) const {
    const auto l = static_cast<std::size_t>(layer);
    return static_cast<int>(first_[l + 1] - first_[l]);
  }
  /// KV heads of all layers.
  std::size_t num_heads() const { return budgets_.size(); }

  /// What one head keeps.
  const HeadBudget& budget(int layer, int kv_head) const { return budgets_[index(layer, kv_head)]; }
  /// All budgets, layer by layer.
  std::span<const HeadBudget> budgets() const { return budgets_; }

  /// @throws ConfigError when a window has sink < 0 or recent < 1, or a growing one divisor < 1.
  void set(int layer, int kv_head, const HeadBudget& budget) {
    check(budget);
    budgets_[index(layer, kv_head)] = budget;
  }

  /// Share of KV heads that do not keep everything.
  double sparsity() const {
    std::size_t streaming = 0;
    for (const HeadBudget& budget : budgets_) streaming += is_retrieval(budget) ? 0U : 1U;
    return static_cast<double>(streaming) / static_cast<double>(num_heads());
  }

  friend bool operator==(const HeadPlan&, const HeadPlan&) = default;

 private:
  static std::vector<int> heads_of(const ModelShape& shape) {
    std::vector<int> heads;
    for (const LayerShape& layer : shape.layers()) heads.push_back(layer.num_kv_heads);
    return heads;
  }

  static void check(const HeadBudget& budget) {
    if (const auto* keep = std::get_if<KeepWindow>(&budget)) {
      if (keep->window.sink < 0) fail<ConfigError>("sink must be >= 0, got ", keep->window.sink);
      if (keep->window.recent < 1) {
        fail<ConfigError>("recent counts the current token and must be >= 1, got ",
                          keep->window.recent);
      }
    } else if (const auto* growing = std::get_if<KeepGrowingWindow>(&budget)) {
      if (growing->sink < 0) fail<ConfigError>("sink must be >= 0, got ", growing->sink);
      if (growing->min_recent < 1) {
        fail<ConfigError>("min_recent must be >= 1, got ", growing->min_recent);
      }
      if (growing->divisor < 1) fail<ConfigError>("divisor must be >= 1, got ", growing->divisor);
    }
  }

  std::size_t index(int layer, int kv_head) const {
    HEADWISE_ASSERT(layer >= 0 && layer < num_layers(), "layer out of range");
    HEADWISE_ASSERT(kv_head >= 0 && kv_head < num_kv_heads(layer), "KV head out of range");
    return first_[static_cast<std::size_t>(layer)] + static_cast<std::size_t>(kv_head);
  }

  std::vector<std::size_t> first_;  // first_[l]: index of layer l's head 0; one more at the end
  std::vector<HeadBudget> budgets_;
};

}  // namespace headwise::inline v0
