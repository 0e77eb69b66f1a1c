// SPDX-License-Identifier: MIT
/// @file uniform_budget.hpp
/// The same budget for every head: the full cache, or a baseline without head scores.
#pragma once

#include "headwise/core/shape.hpp"
#include "headwise/heads/budget.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/policies/policy.hpp"

namespace headwise::inline v0::uniform_budget {

/// One budget for every head.
struct Policy {
  HeadBudget budget = KeepEverything{};  ///< what every head keeps

  /// @throws ConfigError when the budget is out of range (HeadPlan::set()).
  HeadPlan plan(const ModelShape& shape) const { return HeadPlan(shape, budget); }
};
static_assert(HeadPolicy<Policy, ModelShape>);

}  // namespace headwise::inline v0::uniform_budget
