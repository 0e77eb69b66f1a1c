// SPDX-License-Identifier: MIT
/// @file keep.hpp
/// The kinds of budget that a cache keeps: the one place that lists them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>
#include <variant>

#include "headwise/cache/keep/everything.hpp"
#include "headwise/cache/keep/growing_window.hpp"
#include "headwise/cache/keep/keep_rule.hpp"
#include "headwise/cache/keep/selected.hpp"
#include "headwise/cache/keep/window.hpp"
#include "headwise/cache/keep/window_from.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/phase.hpp"
#include "headwise/heads/budget.hpp"

namespace headwise::inline v0 {

/// Every kind there is. A new one is one more type here.
using KeepRules =
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

template <class Rule, class Rules>
constexpr bool kIsOneOf = false;
template <class Rule, class... Rules>
constexpr bool kIsOneOf<Rule, std::variant<Rules...>> = (std::is_same_v<Rule, Rules> || ...);

}  // namespace detail

/// Where a step's rows of one head go.
struct AppendSlots {
  SlotMap from;     ///< of the rows that are there
  SlotMap to;       ///< of all rows once the step's are; where first entries differ, others move
  EntryRange held;  ///< table entries of what would move
};

/// The rule of a class of heads, of whatever kind: itself a rule, whose answers are that kind's.
/// What uses it is compiled once, and not once a kind.
class AnyKeepRule {
 public:
  using Budget = HeadBudget;
  /// The alternative of the rule's kind; a default one belongs to an empty sequence of any.
  using State = detail::StatesOf<KeepRules>::type;

 private:
  template <class Rule>
  static constexpr typename Rule::State as_state_of(const State& state) {
    const auto* kept = std::get_if<typename Rule::State>(&state);
    HEADWISE_ASSERT(kept != nullptr || state == State{}, "a state of another kind of rule");
    return kept != nullptr ? *kept : typename Rule::State{};
  }
  /// std::visit's tables of functions take compilers seconds, and are no faster.
  template <std::size_t kIdx = 0, class Fn>
  constexpr decltype(auto) ask(Fn&& fn) const {
    if constexpr (kIdx + 1 < std::variant_size_v<KeepRules>) {
      if (kind_.index() != kIdx) return ask<kIdx + 1>(fn);
    }
    return fn(*std::get_if<kIdx>(&kind_));
  }
  /// `fn(std::type_identity<Rule>, budget)` with the budget as what it is, and its rule's type.
  template <class Fn>
  static decltype(auto) ask_kind(const Budget& budget, Fn&& fn) {
    return std::visit(
        [&]<class Kind>(const Kind& of_kind) {
          return fn(std::type_identity<typename detail::RuleFor<Kind, KeepRules>::type>{}, of_kind);
        },
        budget);
  }

 public:
  /// A rule of one kind.
  template <class Rule>
    requires detail::kIsOneOf<Rule, KeepRules>
  constexpr AnyKeepRule(const Rule& rule) : kind_(rule) {}

  /// The rule that keeps a budget.
  /// @throws ConfigError as the kind's make().
  static AnyKeepRule make(const Budget& budget, const KeepLimits& limits) {
    return ask_kind(budget,
                    [&]<class Rule>(std::type_identity<Rule>, const auto& of_kind) -> AnyKeepRule {
                      return Rule::make(of_kind, limits);
                    });
  }

  /// Of the rule that keeps a budget, as KeepRule says: kKeepsEverything.
  static bool keeps_everything(const Budget& budget) {
    return ask_kind(budget, []<class Rule>(std::type_identity<Rule>, const auto&) {
      return Rule::kKeepsEverything;
    });
  }
  /// Likewise: what its class is known by.
  static Budget class_budget(const Budget& budget) {
    return ask_kind(budget,
                    []<class Rule>(std::type_identity<Rule>, const auto& of_kind) -> Budget {
                      return Rule::class_budget(of_kind);
                    });
  }
  /// Likewise: rows that selections are to leave.
  /// @return 0 too where nothing is selected.
  static std::int64_t forecast(const Budget& budget) {
    return ask_kind(
        budget, []<class Rule>(std::type_identity<Rule>, const auto& of_kind) -> std::int64_t {
          if constexpr (SelectsRows<Rule>) {
            return Rule::forecast(of_kind);
          } else {
            static_assert(!Rule::kSelects, "a rule that selects answers as SelectsRows says");
            return 0;
          }
        });
  }

  /// The rule as this kind; null if it is of another.
  template <class Rule>
  constexpr const Rule* get_if() const {
    return std::get_if<Rule>(&kind_);
  }
  /// `fn(rule, state)` with both as what they are.
  template <class Fn>
  constexpr decltype(auto) visit(const State& state, Fn&& fn) const {
    return ask([&]<class Rule>(const Rule& rule) -> decltype(auto) {
      return fn(rule, as_state_of<Rule>(state));
    });
  }

  // As KeepRule says.
  constexpr bool selects() const {  // kSelects
    return ask([]<class Rule>(const Rule&) { return Rule::kSelects; });
  }
  constexpr bool keeps_everything() const {  // kKeepsEverything
    return ask([]<class Rule>(const Rule&) { return Rule::kKeepsEverything; });
  }
  constexpr std::int64_t table_entries(std::int64_t pages) const {
    return ask([&](const auto& rule) { return rule.table_entries(pages); });
  }
  constexpr std::array<EntryRange, 2> held(const State& state, std::int64_t length,
                                           std::int64_t high_water) const {
    return visit(state, [&](const auto& rule, const auto& kept) {
      return rule.held(kept, length, high_water);
    });
  }
  constexpr KeepChanges<State> changes(const State& state, const StepLengths& lengths) const {
    return visit(state, [&](const auto& rule, const auto& kept) -> KeepChanges<State> {
      const auto of_kind = rule.changes(kept, lengths);
      return {of_kind.take, of_kind.release, of_kind.next};
    });
  }
  constexpr EntryRange rolled_back(const State& state, std::int64_t from, std::int64_t to) const {
    return visit(state, [&](const auto& rule, const auto& kept) {
      return rule.rolled_back(kept, from, to);
    });
  }
  constexpr std::int64_t frozen(const State& state, std::int64_t high_water) const {
    return visit(state,
                 [&](const auto& rule, const auto& kept) { return rule.frozen(kept, high_water); });
  }
  constexpr std::int64_t peak_entries(std::int64_t max_chunk) const {
    return ask([&](const auto& rule) { return rule.peak_entries(max_chunk); });
  }
  constexpr std::int64_t most_rows() const {
    return ask([](const auto& rule) { return rule.most_rows(); });
  }
  constexpr std::int64_t lowest_kept(const State& state, std::int64_t high_water) const {
    return visit(state, [&](const auto& rule, const auto& kept) {
      return rule.lowest_kept(kept, high_water);
    });
  }
  constexpr std::int64_t fork_entries() const {
    return ask([](const auto& rule) { return rule.fork_entries(); });
  }
  constexpr std::int64_t released_entries() const {
    return ask([](const auto& rule) { return rule.released_entries(); });
  }
  constexpr std::int64_t slots_written(const State& state, std::int64_t length) const {
    return visit(state, [&](const auto& rule, const auto& kept) {
      return rule.slots_written(kept, length);
    });
  }
  constexpr std::uint64_t to_word(const State& state) const {
    return visit(state, [](const auto& rule, const auto& kept) { return rule.to_word(kept); });
  }
  constexpr std::optional<State> from_word(std::uint64_t word, std::int64_t high_water) const {
    return ask([&](const auto& rule) -> std::optional<State> {
      const auto of_kind = rule.from_word(word, high_water);
      return of_kind ? std::optional<State>(*of_kind) : std::nullopt;
    });
  }
  constexpr StoredRuns runs(const State& state, std::int64_t length, Phase phase) const {
    return visit(
        state, [&](const auto& rule, const auto& kept) { return rule.runs(kept, length, phase); });
  }
  constexpr FoldedRows folded(const State& state, std::int64_t length) const {
    return visit(state,
                 [&](const auto& rule, const auto& kept) { return rule.folded(kept, length); });
  }
  constexpr Window window(Phase phase) const {
    return ask([&](const auto& rule) { return rule.window(phase); });
  }
  constexpr SlotMap slots(const State& state) const {
    return visit(state, [](const auto& rule, const auto& kept) { return rule.slots(kept); });
  }
  constexpr SlotMap append_slots(const State& state, const StepLengths& lengths) const {
    return visit(state, [&](const auto& rule, const auto& kept) {
      return rule.append_slots(kept, lengths);
    });
  }
  /// slots(), append_slots() and the first of held() at once: a decode step stores one row a
  /// head, beside which three questions are a good part of the time.
  constexpr AppendSlots append(const State& state, const StepLengths& lengths) const {
    return visit(state, [&](const auto& rule, const auto& kept) -> AppendSlots {
      return {rule.slots(kept), rule.append_slots(kept, lengths),
              rule.held(kept, lengths.length, lengths.high_water)[0]};
    });
  }
  constexpr std::int64_t compensation_rows() const {
    return ask([](const auto& rule) { return rule.compensation_rows(); });
  }
  template <class Fn>
  constexpr void for_each_fold(const State& state, const StepLengths& lengths, Fn&& fn) const {
    visit(state,
          [&](const auto& rule, const auto& kept) { rule.for_each_fold(kept, lengths, fn); });
  }

  // As SelectsRows says; rules that select nothing are told apart by selects().
  /// `fn(rule, state)` as what they are.
  /// @pre selects()
  template <class Fn>
  constexpr void visit_selecting(const State& state, Fn&& fn) const {
    visit(state, [&]<class Rule>(const Rule& rule, const auto& kept) {
      if constexpr (Rule::kSelects) fn(rule, kept);
    });
  }
  /// The class's own state where heads do not differ.
  constexpr State of_head(const State& state, std::int64_t first) const {
    return visit(state, [&]<class Rule>(const Rule& rule, const auto& kept) -> State {
      if constexpr (Rule::kSelects) {
        return rule.of_head(kept, first);
      } else {
        return kept;
      }
    });
  }

  friend constexpr bool operator==(const AnyKeepRule&, const AnyKeepRule&) = default;

 private:
  KeepRules kind_;
};

/// What a rule remembers of one sequence: the alternative of its kind.
using AnyKeepState = AnyKeepRule::State;

}  // namespace headwise::inline v0
