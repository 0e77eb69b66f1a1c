// SPDX-License-Identifier: MIT
/// @file plan.hpp
/// HeadPlan: a budget for every KV head of a model.
#pragma once

#include <compare>
#include <cstddef>
#include <span>
#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/budget.hpp"
#include "headwise/heads/head_grid.hpp"

namespace headwise::inline v0 {

/// One KV head of a model.
struct HeadId {
  int layer = 0;    ///< from 0
  int kv_head = 0;  ///< from 0 in its layer
  friend constexpr auto operator<=>(HeadId, HeadId) = default;
  friend constexpr bool operator==(HeadId, HeadId) = default;  // nvcc 13 does not derive it
};

/// What every KV head keeps; layers may differ in their number of heads. Integers in, integers
/// out: knows neither memory nor kernels.
class HeadPlan {
 public:
  /// @param heads_per_layer  KV heads of each layer, all >= 1.
  /// @param budget  what every head starts with.
  /// @throws ConfigError for no layers, a layer without heads, more of either than kMaxLayers and
  ///   its sisters allow, or a budget out of range (check_budget()).
  explicit HeadPlan(std::span<const int> heads_per_layer, const HeadBudget& budget = {})
      : grid_(heads_per_layer, "a plan") {
    check_budget(budget);
    budgets_.assign(grid_.num_heads(), budget);
  }

  /// A plan for `shape` in which every head has the same budget.
  explicit HeadPlan(const ModelShape& shape, const HeadBudget& budget = {})
      : HeadPlan(heads_of(shape), budget) {}

  int num_layers() const { return grid_.num_layers(); }
  /// KV heads of one layer, in [0, num_layers()).
  int num_kv_heads(int layer) const { return grid_.num_heads(layer); }
  /// KV heads of all layers.
  std::size_t num_heads() const { return budgets_.size(); }

  /// What one head keeps.
  const HeadBudget& budget(int layer, int kv_head) const& {
    return budgets_[grid_.index(layer, kv_head)];
  }
  /// A copy: the plan is gone at the end of the expression.
  HeadBudget budget(int layer, int kv_head) const&& {
    return budgets_[grid_.index(layer, kv_head)];
  }
  /// All budgets, layer by layer.
  std::span<const HeadBudget> budgets() const& { return budgets_; }
  std::span<const HeadBudget> budgets() const&& = delete;  ///< would outlive the plan

  /// Changes what one head keeps.
  /// @throws ConfigError for a budget out of range (check_budget()).
  void set(int layer, int kv_head, const HeadBudget& budget) {
    check_budget(budget);
    budgets_[grid_.index(layer, kv_head)] = budget;
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

  detail::HeadGrid grid_;
  std::vector<HeadBudget> budgets_;
};

/// The plan with what shared layers keep: a layer that reads another's K and V
/// (LayerShape::kv_layer) has the budgets of that one.
/// @throws ConfigError where plan and shape differ in layers or KV heads.
inline HeadPlan share_budgets(HeadPlan plan, const ModelShape& shape) {
  if (plan.num_layers() != shape.num_layers()) {
    fail<ConfigError>("the plan has ", plan.num_layers(), " layers, the model ",
                      shape.num_layers());
  }
  for (int l = 0; l < shape.num_layers(); ++l) {
    const LayerShape& layer = shape.layer(l);
    if (plan.num_kv_heads(l) != layer.num_kv_heads) {
      fail<ConfigError>("layer ", l, ": the plan has ", plan.num_kv_heads(l),
                        " KV heads, the model ", layer.num_kv_heads);
    }
    for (int h = 0; !layer.owns_kv() && h < layer.num_kv_heads; ++h) {
      plan.set(l, h, HeadBudget(plan.budget(layer.kv_layer, h)));
    }
  }
  return plan;
}

}  // namespace headwise::inline v0
