// SPDX-License-Identifier: MIT
/// @file policy.hpp
/// What a policy is: parameters of a published method that turn its evidence into a plan.
#pragma once

#include <concepts>
#include <cstdint>
#include <vector>

#include "headwise/heads/plan.hpp"
#include "headwise/heads/scores.hpp"

namespace headwise::inline v0 {

/// Decides once, at model load, what every KV head keeps. Never touches K or V.
/// @tparam Evidence  what it decides from: HeadScores, a ModelShape, another HeadPlan, ...
template <class P, class... Evidence>
concept HeadPolicy = requires(const P& policy, const Evidence&... evidence) {
  { policy.plan(evidence...) } -> std::same_as<HeadPlan>;
};

/// Decides once how many tokens every head may select; *which* ones is decided at run time.
/// The result lies layer by layer, one number a query head, observation window not counted.
template <class P>
concept CapacityPolicy = requires(const P& policy, const QueryHeadScores& scores) {
  { policy.capacities(scores) } -> std::same_as<std::vector<std::int64_t>>;
};

}  // namespace headwise::inline v0
