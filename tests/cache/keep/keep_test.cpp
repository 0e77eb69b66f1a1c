// SPDX-License-Identifier: MIT
// Promises that every kind of budget makes, whatever it keeps.
#include "headwise/cache/keep/keep.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "headwise/core/rounding.hpp"
#include "support/sight.hpp"

namespace headwise {
namespace {

using Entries = std::set<std::int64_t>;
constexpr std::int64_t kPage = 16;

struct RuleCase {
  HeadBudget budget;
  KeepLimits limits;
};

KeepLimits limits_of(std::int64_t rollback, PrefillMode prefill) {
  return {.page_tokens = kPage,
          .max_context = 400,
          .max_rollback = rollback,
          .max_chunk = 400,
          .prefill = prefill};
}

/// Rules of every kind with small windows, so that all boundaries come early.
std::vector<RuleCase> rule_cases() {
  std::vector<RuleCase> cases;
  for (const std::int64_t rollback : {0, 1, 7, 16, 40}) {
    for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
      const KeepLimits limits = limits_of(rollback, prefill);
      cases.push_back({KeepEverything{}, limits});
      cases.push_back({KeepSelected{}, limits});
      for (const KeepWindow keep :
           {KeepWindow{{0, 1}}, KeepWindow{{4, 12}}, KeepWindow{{16, 16}}, KeepWindow{{17, 30}},
            KeepWindow{{4, 12}, 29}, KeepWindow{{4, 29}, 12}, KeepWindow{Window::everything()}}) {
        cases.push_back({keep, limits});
      }
      for (const std::int64_t from : {1, 16, 39, 150, 1000}) {
        cases.push_back({KeepWindowFrom{{{4, 12}}, from}, limits});
        cases.push_back({KeepWindowFrom{{{17, 30}, 45}, from}, limits});
        cases.push_back({KeepWindowFrom{{{0, 20}, 1}, from}, limits});
      }
      if (prefill == PrefillMode::kWindowed) continue;
      for (const std::int64_t sink : {0, 4, 16, 20}) {
        cases.push_back({KeepGrowingWindow{sink, 40, 3}, limits});
      }
    }
  }
  return cases;
}

/// `check(rule, case)` for each of them.
template <class Check>
void for_each_rule(Check&& check) {
  for (const RuleCase& rule_case : rule_cases()) {
    AnyKeepRule::make(rule_case.budget, rule_case.limits)
        .visit({}, [&](const auto& rule, const auto&) { check(rule, rule_case); });
    if (::testing::Test::HasFatalFailure()) return;
  }
}

/// Every state that a sequence may be in.
template <class State>
std::vector<State> all_states() {
  if constexpr (std::is_empty_v<State> || std::is_same_v<State, SelectedRule::State>) {
    return {State{}};  // selected_test.cpp has the others, which go with some lengths only
  } else {
    return {State{0}, State{1}};
  }
}

Entries entries(const std::array<EntryRange, 2>& ranges) {
  Entries out;
  for (const EntryRange& range : ranges) {
    for (std::int64_t i = range.first; i < range.last; ++i) {
      EXPECT_TRUE(out.insert(i).second) << "held twice: " << i;
    }
  }
  return out;
}
Entries entries(const EntryRange& range) { return entries(std::array<EntryRange, 2>{range, {}}); }

TEST(KeepRules, ChangesLeadFromWhatIsHeldToWhatIsHeld) {
  for_each_rule([]<class Rule>(const Rule& rule, const RuleCase& rule_case) {
    for (std::int64_t length = 0; length <= 120; length += 3) {
      for (std::int64_t ahead = 0; ahead <= rule_case.limits.max_rollback; ahead += 5) {
        for (const std::int64_t tokens : {0, 1, 2, 15, 16, 17, 60, 200}) {
          for (const auto state : all_states<typename Rule::State>()) {
            const StepLengths step{length, length + ahead, length + tokens};
            const auto changes = rule.changes(state, step);
            Entries held = entries(rule.held(state, step.length, step.high_water));
            for (const std::int64_t i : entries(changes.take)) {
              ASSERT_TRUE(held.insert(i).second) << "taken though held: " << i;
            }
            for (const std::int64_t i : entries(changes.release)) {
              ASSERT_EQ(held.erase(i), 1U) << "released though not held: " << i;
            }
            ASSERT_EQ(held, entries(rule.held(changes.next, step.next, step.next_high_water())))
                << length << " of " << step.high_water << " to " << step.next;
          }
        }
      }
    }
  });
}

TEST(KeepRules, RollbackGivesBackExactlyWhatIsNoLongerHeld) {
  for_each_rule([]<class Rule>(const Rule& rule, const RuleCase& rule_case) {
    for (std::int64_t high_water = 0; high_water <= 120; high_water += 2) {
      const std::int64_t lowest =
          std::max<std::int64_t>(0, high_water - rule_case.limits.max_rollback);
      for (std::int64_t from = lowest; from <= high_water; from += 3) {
        for (std::int64_t to = lowest; to <= from; to += 3) {
          for (const auto state : all_states<typename Rule::State>()) {
            Entries held = entries(rule.held(state, from, high_water));
            for (const std::int64_t i : entries(rule.rolled_back(state, from, to))) {
              ASSERT_EQ(held.erase(i), 1U);
            }
            ASSERT_EQ(held, entries(rule.held(state, to, high_water)));
          }
        }
      }
    }
  });
}

TEST(KeepRules, HoldThePageOfEveryRowThatAnyPermittedLengthMaySee) {
  for_each_rule([]<class Rule>(const Rule& rule, const RuleCase& rule_case) {
    for (std::int64_t high_water = 0; high_water <= 220; ++high_water) {
      const std::int64_t lowest =
          std::max<std::int64_t>(0, high_water - rule_case.limits.max_rollback);
      for (std::int64_t length = lowest; length <= high_water; ++length) {
        for (const auto state : all_states<typename Rule::State>()) {
          const Entries held = entries(rule.held(state, length, high_water));
          const std::int64_t first_entry = rule.slots(state).first_entry;
          for (const Phase phase : {Phase::kPrompt, Phase::kDecode}) {
            for (const KvRun& run : rule.runs(state, length, phase).runs) {
              if (run.count <= 0) continue;
              for (std::int64_t i = run.first_slot.value / kPage;
                   i <= (run.first_slot.value + run.count - 1) / kPage; ++i) {
                ASSERT_TRUE(held.contains(first_entry + i))
                    << "length " << length << " of " << high_water;
              }
            }
          }
        }
      }
    }
  });
}

TEST(KeepRules, RunsAreOldestFirstAndEndAtTheLength) {
  for_each_rule([]<class Rule>(const Rule& rule, const RuleCase&) {
    for (std::int64_t length = 0; length <= 200; ++length) {
      for (const Phase phase : {Phase::kPrompt, Phase::kDecode}) {
        const StoredRuns stored = rule.runs({}, length, phase);
        std::int64_t next = 0;
        for (const KvRun& run : stored.runs) {
          if (run.count == 0) continue;
          ASSERT_GE(run.first_pos.value, next);
          next = run.first_pos.value + run.count;
        }
        ASSERT_LE(next, length);
        ASSERT_LE(stored.num_rows() + rule.folded({}, length).count, length);
      }
    }
  });
}

TEST(KeepRules, TablesNeverShrinkAsTheyHoldMoreTokens) {
  for_each_rule([]<class Rule>(const Rule& rule, const RuleCase& rule_case) {
    std::int64_t last = 0;
    for (std::int64_t pages = 1; pages <= ceil_div(rule_case.limits.max_context, kPage); ++pages) {
      ASSERT_GE(rule.table_entries(pages), last);
      last = rule.table_entries(pages);
    }
  });
}

TEST(KeepRules, NoStepHoldsMoreThanThePeakOfItsChunk) {
  for_each_rule([]<class Rule>(const Rule& rule, const RuleCase& rule_case) {
    std::set<std::int64_t> chunks{1, 2, kPage, 100, 399, 400};
    if constexpr (std::is_same_v<Rule, WindowRule>) {
      // Where a second ring begins to be needed.
      const std::int64_t slack =
          rule.turn() - rule_case.limits.max_rollback - rule.most_recent() + 1;
      for (const std::int64_t n : {slack - 1, slack, slack + 1}) {
        if (n >= 1 && n <= 400) chunks.insert(n);
      }
    }
    for (const std::int64_t max_chunk : chunks) {
      std::int64_t most = 0;
      for (std::int64_t high_water = 0; high_water <= 400; ++high_water) {
        const std::int64_t lowest =
            std::max<std::int64_t>(0, high_water - rule_case.limits.max_rollback);
        for (std::int64_t length = lowest; length <= high_water; ++length) {
          const auto held = rule.held({}, length, high_water);
          const std::int64_t n = std::min(max_chunk, 400 - length);  // a longer step takes no less
          most =
              std::max(most, held[0].count() + held[1].count() +
                                 rule.changes({}, {length, high_water, length + n}).take.count());
        }
      }
      ASSERT_LE(most, rule.peak_entries(max_chunk)) << "chunks of " << max_chunk;
      // And it is no wild guess: two ragged ends of a window that grows at most.
      const std::int64_t slack = std::is_same_v<Rule, GrowingWindowRule> ? 2 : 0;
      ASSERT_GE(most + slack, rule.peak_entries(max_chunk)) << "chunks of " << max_chunk;
    }
  });
}

TEST(KeepRules, ShowNoMoreRowsThanTheySayAndAsManyAtSomeLength) {
  for_each_rule([]<class Rule>(const Rule& rule, const RuleCase&) {
    std::int64_t most = 0;
    for (std::int64_t length = 0; length <= 400; ++length) {
      for (const Phase phase : {Phase::kPrompt, Phase::kDecode}) {
        most = std::max(most, rule.runs({}, length, phase).num_rows());
      }
    }
    ASSERT_LE(most, rule.most_rows());
    const std::int64_t slack = std::is_same_v<Rule, GrowingWindowRule> ? kPage : 0;
    ASSERT_GE(most + slack, rule.most_rows());
  });
}

TEST(KeepRules, ALongerStepTakesNoFewerPages) {
  for_each_rule([]<class Rule>(const Rule& rule, const RuleCase& rule_case) {
    for (std::int64_t high_water = 0; high_water <= 150; high_water += 3) {
      const std::int64_t lowest =
          std::max<std::int64_t>(0, high_water - rule_case.limits.max_rollback);
      for (std::int64_t length = lowest; length <= high_water; length += 2) {
        std::int64_t last = 0;
        for (std::int64_t next = length; next <= 400; ++next) {
          const std::int64_t taken = rule.changes({}, {length, high_water, next}).take.count();
          ASSERT_GE(taken, last);
          last = taken;
        }
      }
    }
  });
}

// One head of a cache, whose rows are their positions ---------------------------------------------

/// What a rule says is done, done to pages of positions: step by step, with drops, rollbacks and
/// pages that a fork shares.
template <class Rule>
class OneHead {
 public:
  OneHead(const Rule& rule, const RuleCase& rule_case) : rule_(rule), case_(rule_case) {}

  std::int64_t length() const { return length_; }
  std::int64_t high_water() const { return high_water_; }
  std::int64_t lowest() const {
    return std::max<std::int64_t>(0, high_water_ - case_.limits.max_rollback);
  }

  void step(std::int64_t tokens, bool commit) {
    const StepLengths lengths{length_, high_water_, length_ + tokens};
    const auto changes = rule_.changes(state_, lengths);
    // A block of tables for so many tokens has every entry.
    const std::int64_t table =
        rule_.table_entries(ceil_div(std::max<std::int64_t>(1, lengths.next_high_water()), kPage));
    for (const std::int64_t i : entries(changes.take)) {
      ASSERT_LT(i, table);
      ASSERT_FALSE(pages_.contains(i));
      pages_[i].fill(kUnwritten);
    }
    append(lengths);
    // The step's other queries, and whoever comes after a drop, still see what they saw.
    check_sight();
    if (::testing::Test::HasFatalFailure()) return;
    if (!commit) {
      for (const std::int64_t i : entries(changes.take)) pages_.erase(i);
    } else {
      for (const std::int64_t i : entries(changes.release)) give_back(i);
      state_ = changes.next;
      length_ = lengths.next;
      high_water_ = lengths.next_high_water();
    }
    check();
  }

  void roll_back(std::int64_t to) {
    for (const std::int64_t i : entries(rule_.rolled_back(state_, length_, to))) give_back(i);
    length_ = to;
    check();
  }

  /// As if another sequence held the pages that a fork shares from here on.
  void fork() {
    for (const std::int64_t i : entries(rule_.held(state_, length_, high_water_))) {
      if (i < rule_.frozen(state_, high_water_)) shared_.insert(i);
    }
  }
  bool has_shared() const { return !shared_.empty(); }

 private:
  static constexpr std::int64_t kUnwritten = -1;

  void give_back(std::int64_t entry) {
    ASSERT_EQ(pages_.erase(entry), 1U);
    shared_.erase(entry);
  }

  std::array<std::int64_t, kPage>& page_to_write(std::int64_t entry) {
    EXPECT_TRUE(pages_.contains(entry)) << "writes entry " << entry << " without a page";
    EXPECT_FALSE(shared_.contains(entry)) << "writes a shared page";
    return pages_[entry];
  }

  void append(const StepLengths& lengths) {
    const SlotMap from = rule_.slots(state_);
    const SlotMap to = rule_.append_slots(state_, lengths);
    if (from.first_entry != to.first_entry) {
      const EntryRange held = rule_.held(state_, lengths.length, lengths.high_water)[0];
      for (std::int64_t i = 0; i < held.count(); ++i) {
        page_to_write(to.first_entry + i) = pages_.at(held.first + i);
      }
    }
    for (std::int64_t pos = lengths.length; pos < lengths.next; ++pos) {
      if (!to.keeps(Pos{pos}, lengths.next)) continue;
      const std::int64_t slot = to.slot(Pos{pos}).value;
      page_to_write(to.first_entry + slot / kPage)[static_cast<std::size_t>(slot % kPage)] = pos;
    }
  }

  void check() {
    Entries held;
    for (const auto& [entry, page] : pages_) held.insert(entry);
    ASSERT_EQ(held, entries(rule_.held(state_, length_, high_water_)));
    check_sight();
    check_snapshot();
    check_forks();
  }

  /// What a snapshot writes of it: no slot that was never written, and a state that comes back.
  void check_snapshot() {
    const std::int64_t first_entry = rule_.slots(state_).first_entry;
    const std::int64_t written = rule_.slots_written(state_, length_);
    for (const auto& [entry, page] : pages_) {
      for (std::int64_t i = 0; i < kPage; ++i) {
        const std::int64_t slot = (entry - first_entry) * kPage + i;
        ASSERT_TRUE(slot >= written || page[static_cast<std::size_t>(i)] != kUnwritten) << slot;
      }
    }
    const std::uint64_t word = rule_.to_word(state_);
    ASSERT_EQ(rule_.from_word(word, high_water_), state_);
    for (const std::uint64_t other : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{2},
                                      std::uint64_t{256}, ~std::uint64_t{0}}) {
      const auto state = rule_.from_word(other, high_water_);
      if (!state) continue;
      ASSERT_EQ(rule_.to_word(*state), other);
      // Wherever it says that rows are, this sequence's tables have entries.
      for (const EntryRange range : rule_.held(*state, length_, high_water_)) {
        if (range.count() == 0) continue;
        ASSERT_LE(range.last, rule_.table_entries(ceil_div(high_water_, kPage)));
      }
    }
  }

  /// A fork at each length from lowest_kept() on has all that its next query asks for.
  void check_forks() {
    std::int64_t copied = 0;
    for (const std::int64_t i : entries(rule_.held(state_, length_, high_water_))) {
      if (i >= rule_.frozen(state_, high_water_)) ++copied;
    }
    ASSERT_LE(copied, rule_.fork_entries());
    const std::int64_t length = std::exchange(length_, 0);
    const std::int64_t high_water = high_water_;
    const std::int64_t lowest = rule_.lowest_kept(state_, high_water);
    for (length_ = std::max<std::int64_t>(1, lowest); length_ <= length; length_ += 7) {
      high_water_ = length_ >= high_water - case_.limits.max_rollback ? high_water : length_;
      for (const std::int64_t i : entries(rule_.held(state_, length_, high_water_))) {
        ASSERT_TRUE(pages_.contains(i)) << "a fork at " << length_ << " asks for entry " << i;
      }
      check_sight();
    }
    length_ = length;
    high_water_ = high_water;
  }

  void check_sight() {
    for (const Phase phase : {Phase::kPrompt, Phase::kDecode}) {
      std::vector<std::int64_t> expected;
      for (std::int64_t key = 0; key < length_; ++key) {
        if (test::sight(case_.budget, case_.limits.prefill, kPage, phase, length_, length_, key) ==
            test::Sight::kAsRow) {
          expected.push_back(key);
        }
      }
      std::vector<std::int64_t> seen;
      const std::int64_t first_entry = rule_.slots(state_).first_entry;
      for (const KvRun& run : rule_.runs(state_, length_, phase).runs) {
        for (std::int64_t i = 0; i < run.count; ++i) {
          const std::int64_t slot = run.first_slot.value + i;
          const auto page = pages_.find(first_entry + slot / kPage);
          ASSERT_NE(page, pages_.end());
          seen.push_back(page->second[static_cast<std::size_t>(slot % kPage)]);
          ASSERT_EQ(seen.back(), run.first_pos.value + i);
        }
      }
      ASSERT_EQ(seen, expected);
    }
  }

  Rule rule_;
  RuleCase case_;
  typename Rule::State state_{};
  std::int64_t length_ = 0;
  std::int64_t high_water_ = 0;
  std::map<std::int64_t, std::array<std::int64_t, kPage>> pages_;
  Entries shared_;
};

TEST(KeepRules, ReleaseAsManyEntriesAsTheySay) {
  for_each_rule([]<class Rule>(const Rule& rule, const RuleCase& rule_case) {
    if (Rule::kSelects) return;  // selections release: see selected_test
    std::int64_t released = 0;   // and not taken again in another place
    for (std::int64_t n = 0; n < 400; ++n) {
      released += rule.changes({}, {n, n, n + 1}).release.count();
    }
    ASSERT_EQ(released, rule.released_entries()) << rule_case.limits.max_rollback;
  });
}

TEST(KeepRules, ForksCopyNoMoreThanTheySayAndOnceSoMuch) {
  for_each_rule([]<class Rule>(const Rule& rule, const RuleCase&) {
    std::int64_t most = 0;
    for (std::int64_t high_water = 0; high_water <= 400; ++high_water) {
      std::int64_t copied = 0;
      for (const std::int64_t i : entries(rule.held({}, high_water, high_water))) {
        if (i >= rule.frozen({}, high_water)) ++copied;
      }
      most = std::max(most, copied);
    }
    ASSERT_EQ(most, rule.fork_entries());
  });
}

TEST(KeepRules, ShowWhatTheBudgetSaysAndWriteNoSharedPageOnARandomWalk) {
  std::mt19937 random(29);
  const auto below = [&](std::int64_t n) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
  };
  for_each_rule([&]<class Rule>(const Rule& rule, const RuleCase& rule_case) {
    OneHead<Rule> head(rule, rule_case);
    bool has_shared = false;
    for (int op = 0; op < 150; ++op) {
      if (op % 20 == 10) head.fork();
      has_shared |= head.has_shared();
      if (below(3) == 0) {
        const std::int64_t lowest = std::max<std::int64_t>(1, head.lowest());  // 0 is a clear
        if (head.length() > lowest) {
          head.roll_back(below(2) == 0 ? lowest : lowest + below(head.length() - lowest));
        }
      } else {
        const std::int64_t tokens = below(3) == 0 ? below(70) : below(4);
        // One token less than the context, so that there is a next query.
        head.step(std::min(tokens, 399 - head.length()), below(4) != 0);
      }
      ASSERT_FALSE(::testing::Test::HasFailure()) << "budget " << rule_case.budget.index()
                                                  << ", rollback " << rule_case.limits.max_rollback;
    }
    EXPECT_EQ(has_shared, (!std::is_same_v<Rule, WindowRule>));
  });
}

// The list of kinds ------------------------------------------------------------------------------

TEST(KeepRules, EachBudgetHasTheRuleThatNamesIt) {
  const KeepLimits limits = limits_of(0, PrefillMode::kChunkCausal);
  EXPECT_TRUE(AnyKeepRule::make(KeepEverything{}, limits).get_if<EverythingRule>() != nullptr);
  EXPECT_TRUE(AnyKeepRule::make(KeepWindow{{4, 8}}, limits).get_if<WindowRule>() != nullptr);
  EXPECT_TRUE(AnyKeepRule::make(KeepGrowingWindow{4, 8, 2}, limits).get_if<GrowingWindowRule>() !=
              nullptr);
  EXPECT_TRUE(AnyKeepRule::make(KeepWindowFrom{{{4, 8}}, 2}, limits).get_if<WindowFromRule>() !=
              nullptr);
  EXPECT_TRUE(AnyKeepRule::make(KeepSelected{}, limits).get_if<SelectedRule>() != nullptr);
  static_assert(std::variant_size_v<KeepRules> == std::variant_size_v<HeadBudget>);
}

TEST(KeepRules, ABudgetIsAskedThroughItsRule) {
  const std::vector<HeadBudget> others{KeepEverything{}, KeepWindow{{4, 8}},
                                       KeepGrowingWindow{4, 8, 2}, KeepWindowFrom{{{4, 8}}, 2}};
  const KeepLimits limits = limits_of(0, PrefillMode::kChunkCausal);
  for (const HeadBudget& budget : others) {
    EXPECT_EQ(AnyKeepRule::class_budget(budget), budget);
    EXPECT_EQ(AnyKeepRule::forecast(budget), 0);
    EXPECT_EQ(AnyKeepRule::keeps_everything(budget), budget.index() == 0);
    EXPECT_EQ(AnyKeepRule::make(budget, limits).keeps_everything(), budget.index() == 0);
  }
  const HeadBudget selected = KeepSelected{30};
  EXPECT_EQ(AnyKeepRule::class_budget(selected), HeadBudget(KeepSelected{0}));
  EXPECT_EQ(AnyKeepRule::forecast(selected), 30);
  EXPECT_FALSE(AnyKeepRule::keeps_everything(selected));
  EXPECT_FALSE(AnyKeepRule::make(selected, limits).keeps_everything());
}

/// All that a rule answers about one step of a sequence.
template <class Rule>
auto answers(const Rule& rule, const typename Rule::State& state, const StepLengths& step) {
  const auto range = [](EntryRange of) { return std::pair(of.first, of.last); };
  const auto map = [](const SlotMap& of) { return std::tuple(of.first_entry, of.sink, of.turn); };
  const auto held = rule.held(state, step.length, step.high_water);
  const auto changes = rule.changes(state, step);
  const FoldedRows folded = rule.folded(state, step.length);
  std::vector<std::int64_t> seen;
  for (const Phase phase : {Phase::kPrompt, Phase::kDecode}) {
    for (const KvRun& run : rule.runs(state, step.length, phase).runs) {
      seen.insert(seen.end(), {run.first_slot.value, run.first_pos.value, run.count});
    }
    seen.insert(seen.end(), {rule.window(phase).sink, rule.window(phase).recent});
  }
  std::vector<std::int64_t> folds;
  rule.for_each_fold(state, step, [&](const FoldMove& move) {
    folds.insert(folds.end(), {move.from.value_or(-1), move.to, move.entry, move.first_row,
                               move.end_row, move.count});
  });
  return std::tuple(
      std::tuple(rule.table_entries(9), rule.peak_entries(20), rule.most_rows(),
                 rule.fork_entries(), rule.released_entries(), rule.compensation_rows()),
      std::tuple(range(held[0]), range(held[1]), range(changes.take), range(changes.release),
                 range(rule.rolled_back(state, step.next, step.length))),
      std::tuple(rule.frozen(state, step.high_water), rule.lowest_kept(state, step.high_water),
                 rule.slots_written(state, step.length), rule.to_word(state)),
      std::tuple(map(rule.slots(state)), map(rule.append_slots(state, step)), folded.row,
                 folded.count),
      seen, folds);
}

TEST(KeepRules, ARuleOfAnyKindAnswersAsItsKind) {
  for (const RuleCase& rule_case : rule_cases()) {
    const AnyKeepRule any = AnyKeepRule::make(rule_case.budget, rule_case.limits);
    any.visit({}, [&]<class Rule>(const Rule& rule, const typename Rule::State&) {
      ASSERT_EQ(*any.get_if<Rule>(), rule);
      ASSERT_EQ(any.selects(), Rule::kSelects);
      for (const auto state : all_states<typename Rule::State>()) {
        for (const std::int64_t length : {0, 1, 33, 100, 250}) {
          const StepLengths step{length, length + rule_case.limits.max_rollback, length + 21};
          ASSERT_EQ(answers(any, state, step), answers(rule, state, step));
          ASSERT_EQ(any.changes(state, step).next, AnyKeepState(rule.changes(state, step).next));
          for (const std::uint64_t word : {rule.to_word(state), ~std::uint64_t{0}}) {
            const auto of_kind = rule.from_word(word, length);
            const auto of_any = any.from_word(word, length);
            ASSERT_EQ(of_any.has_value(), of_kind.has_value());
            if (of_any) {
              ASSERT_EQ(*of_any, AnyKeepState(*of_kind));
            }
          }
        }
      }
    });
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST(KeepRules, ADefaultStateIsAnEmptySequencesOfEveryKind) {
  for (const RuleCase& rule_case : rule_cases()) {
    const AnyKeepRule any = AnyKeepRule::make(rule_case.budget, rule_case.limits);
    any.visit(AnyKeepState{}, [](const auto&, const auto& state) {
      ASSERT_EQ(state, std::remove_cvref_t<decltype(state)>{});
    });
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST(KeepRules, OnlySelectedHeadsAreOneByOne) {
  const KeepLimits limits = limits_of(0, PrefillMode::kWindowed);
  const AnyKeepState before = SelectedRule::State{100, 7};
  EXPECT_EQ(AnyKeepRule::make(KeepSelected{}, limits).of_head(before, 40),
            AnyKeepState(SelectedRule::State{100, 40}));
  EXPECT_EQ(AnyKeepRule::make(KeepWindow{{4, 8}}, limits).of_head(WindowRule::State{1}, 40),
            AnyKeepState(WindowRule::State{1}));
}

TEST(KeepRules, StatesOfUnlikeRulesAreUnlike) {
  // Two kinds may both have a bank; a state must still say whose it is.
  static_assert(!std::is_same_v<WindowRule::State, GrowingWindowRule::State>);
  static_assert(std::is_trivially_copyable_v<AnyKeepState>);
  static_assert(sizeof(AnyKeepState) <= 12);  // one for each class of every sequence
}

}  // namespace
}  // namespace headwise
