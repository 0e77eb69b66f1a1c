// SPDX-License-Identifier: MIT
/// @file keep.hpp
/// The kinds of budget that a cache keeps: the one place that lists them.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>
#include <variant>

#include "headwise/cache/keep/everything.hpp"
#include "headwise/cache/keep/growing_window.hpp"
#include "headwise/cache/keep/keep_rule.hpp"
#include "headwise/cache/keep/selected.hpp"
#include "headwise/cache/keep/window.hpp"
#include "headwise/cache/keep/window_from.hpp"
#include "headwise/heads/budget.hpp"

namespace headwise::inline v0 {

/// The rule of a class of heads. A new kind is one more type here.
using AnyKeepRule =
    std::variant<EverythingRule, WindowRule, GrowingWindowRule, WindowFromRule, SelectedRule>;

namespace detail {

template <class Rules>
struct StatesOf;
template <KeepRule... Rules>
struct StatesOf<std::variant<Rules...>> {
  using type = std::variant<typename Rules::State...>;
};

/// The rule whose Budget this is; a budget that no rule keeps does not compile.
template <class Budget, class Rules>
struct RuleFor;
template <class Budget, class First, class... Rest>
struct RuleFor<Budget, std::variant<First, Rest...>> {
  using type = typename std::conditional_t<std::is_same_v<Budget, typename First::Budget>,
                                           std::type_identity<First>,
                                           RuleFor<Budget, std::variant<Rest...>>>::type;
};

}  // namespace detail

/// What a rule remembers of one sequence: the alternative of its rule.
using AnyKeepState = detail::StatesOf<AnyKeepRule>::type;

/// The rule that keeps a budget.
/// @throws ConfigError as the rule's make().
inline AnyKeepRule make_rule(const HeadBudget& budget, const KeepLimits& limits) {
  return std::visit(
      [&]<class Budget>(const Budget& kind) -> AnyKeepRule {
        return detail::RuleFor<Budget, AnyKeepRule>::type::make(kind, limits);
      },
      budget);
}

/// The state of an empty sequence under this rule.
inline AnyKeepState empty_state(const AnyKeepRule& rule) {
  return std::visit([]<class Rule>(const Rule&) -> AnyKeepState { return typename Rule::State{}; },
                    rule);
}

/// `fn(rule, state)` with both as what they are.
/// @pre `state` is this rule's.
template <class Fn>
decltype(auto) visit_rule(const AnyKeepRule& rule, const AnyKeepState& state, Fn&& fn) {
  return std::visit(
      [&]<class Rule>(const Rule& kind) -> decltype(auto) {
        return fn(kind, *std::get_if<typename Rule::State>(&state));
      },
      rule);
}

}  // namespace headwise::inline v0
