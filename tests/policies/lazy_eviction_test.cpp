// SPDX-License-Identifier: MIT
#include "headwise/policies/lazy_eviction.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "headwise/heads/select_tokens.hpp"
#include "support/errors.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using lazy_eviction::Formula;
using Positions = std::vector<std::int32_t>;
using Weights = std::vector<float>;

/// Key j is the unit vector j, and a query the logarithms of the weights that it is to give.
struct LookedAt {
  static constexpr int kDim = 12;

  LookedAt() : unit(kDim * kDim, 0.0F), positions(kDim) {
    for (std::size_t j = 0; j < kDim; ++j) unit[j * kDim + j] = 1.0F;
    std::iota(positions.begin(), positions.end(), 0);
  }
  /// Notes one query at position `weights.size() - 1` for each query head; keys are those stored.
  void add(const std::vector<Weights>& heads) {
    const std::size_t length = heads.front().size();
    std::vector<float> q(heads.size() * kDim, -100.0F);
    for (std::size_t g = 0; g < heads.size(); ++g) {
      for (std::size_t j = 0; j < length; ++j) q[g * kDim + j] = std::log(heads[g][j]);
    }
    stored.push_back(static_cast<std::int32_t>(length - 1));
    std::vector<float> rows;
    for (const std::int32_t pos : stored) {
      const auto from = unit.begin() + pos * kDim;
      rows.insert(rows.end(), from, from + kDim);
    }
    const ObservedQueries queries{{q.data(), kDim, kDim},
                                  std::span(&stored.back(), 1),
                                  static_cast<int>(heads.size()),
                                  kDim,
                                  1.0F};
    record.add(policy, queries, RowView::dense(rows.data(), std::ssize(stored), kDim), stored);
  }
  void cut(const Positions& kept) {
    record.keep(kept);
    stored = kept;
  }

  lazy_eviction::Policy policy{.budget = 5, .window = 2, .alpha = 0.1F};
  lazy_eviction::Record record;
  Positions stored{0, 1, 2, 3};  ///< the prompt
  std::vector<float> unit;       ///< [kDim][kDim]
  Positions positions;
};

/// policies-more, section 6: 4 prompt keys, alpha 0.1, the weights of 4 steps.
const std::vector<Weights>& golden_steps() {
  static const std::vector<Weights> steps{{.3F, .05F, .2F, .05F, .4F},
                                          {.05F, .05F, .3F, .05F, .05F, .5F},
                                          {.05F, .15F, .05F, .05F, .05F, .05F, .6F},
                                          {.3F, .05F, .05F, .05F, .05F, .05F, .05F, .4F}};
  return steps;
}
LookedAt after_golden_steps() {
  LookedAt walk;
  for (const Weights& weights : golden_steps()) walk.add({weights});
  return walk;
}
Positions list_of(std::span<const std::int32_t> values, std::int32_t minus = 0) {
  Positions list;
  for (const std::int32_t value : values) list.push_back(value - minus);
  return list;
}

// The specification counts steps from 1; the record has positions, of which step 1 is 4.
TEST(LazyEviction, TracksLastLooksAndLongestGaps) {
  const LookedAt walk = after_golden_steps();
  EXPECT_EQ(list_of(walk.record.last_important(), 3), (Positions{4, 3, 2, 0, 1, 2, 3, 4}));
  EXPECT_EQ(list_of(walk.record.longest_gaps()), (Positions{3, 3, 1, 0, 1, 1, 1, 1}));
  EXPECT_EQ(walk.record.newest(), 7);
}

TEST(LazyEviction, ScoresAndKeepsAsThePaperAndAsTheReleasedCode) {
  const LookedAt walk = after_golden_steps();
  for (const auto& [formula, golden, kept] :
       {std::tuple{
            Formula::kPaper,
            std::vector{1.238406, 1.073265, 1.238406, 0.0, 1.094852, 1.238406, 1.537883, 2.0},
            Positions{0, 2, 5, 6, 7}},
        std::tuple{
            Formula::kReleased,
            std::vector{.776289, .655623, 1.094854, 0.0, 1.035973, 1.094854, 1.238408, 1.537883},
            Positions{2, 4, 5, 6, 7}}}) {
    lazy_eviction::Policy policy = walk.policy;
    policy.formula = formula;
    TokenScores scores(8);
    lazy_eviction::add_head(policy, walk.record, scores);
    for (std::size_t j = 0; j < golden.size(); ++j) {
      EXPECT_NEAR(scores.scores(0)[j], golden[j], 1e-6) << j;
    }
    EXPECT_EQ(test::lists_of(select_tokens(scores, policy.protection(),
                                           uniform_counts(scores, policy.budget))),
              (test::KeptLists{kept}));
  }
}

TEST(LazyEviction, HasThePublishedImportance) {
  struct Case {
    std::int64_t gap, since;
    double paper, released;
  };
  // policies-more, section 6, single values.
  for (const Case& c : {Case{1, 0, 2.0, 1.537883}, Case{4, 2, .849933, .459703},
                        Case{10, 5, .755328, .365098}, Case{10, 50, .013632, .005192}}) {
    EXPECT_NEAR(lazy_eviction::importance(Formula::kPaper, c.since, c.gap), c.paper, 1e-6);
    EXPECT_NEAR(lazy_eviction::importance(Formula::kReleased, c.since, c.gap), c.released, 1e-6);
  }
  // Never important; and gaps beyond what an exponential holds.
  EXPECT_EQ(lazy_eviction::importance(Formula::kPaper, 0, 0), 1.0);
  EXPECT_EQ(lazy_eviction::importance(Formula::kPaper, 1, 0), 0.0);
  EXPECT_EQ(lazy_eviction::importance(Formula::kReleased, 1, 0), 0.0);
  EXPECT_NEAR(lazy_eviction::importance(Formula::kPaper, 1 << 30, 1), 1.0, 1e-12);
  EXPECT_NEAR(lazy_eviction::importance(Formula::kReleased, 0, 1 << 30), 0.537883, 1e-6);
}

TEST(LazyEviction, CountsGapsBeyondWhatBf16Holds) {
  LookedAt walk;
  walk.add({golden_steps()[0]});
  const std::int32_t later = 1000;  // a gap of 997: bf16 has multiples of 4 there
  std::vector<float> q(LookedAt::kDim, 0.0F);
  q[1] = 10.0F;
  const ObservedQueries queries{
      {q.data(), LookedAt::kDim, LookedAt::kDim}, std::span(&later, 1), 1, LookedAt::kDim, 1.0F};
  walk.record.add(walk.policy, queries, RowView::dense(walk.unit.data(), 5, LookedAt::kDim),
                  walk.stored);
  EXPECT_EQ(walk.record.longest_gaps()[1], 997);
}

TEST(LazyEviction, TakesTheLargestWeightOfAGroup) {
  LookedAt walk;
  walk.add({{.9F, .01F, .01F, .01F, .07F}, {.01F, .9F, .01F, .01F, .07F}});
  EXPECT_EQ(list_of(walk.record.longest_gaps()), (Positions{1, 1, 0, 0, 0}));
  // A mean of .135 at token 4 of 2 heads would count as .1 does; of one head at .15 and .05 it
  // does.
  LookedAt other;
  other.add({{.8F, .01F, .01F, .03F, .15F}, {.97F, .01F, .01F, .005F, .005F}});
  EXPECT_EQ(list_of(other.record.longest_gaps()), (Positions{1, 0, 0, 0, 1}));
}

TEST(LazyEviction, NotesAStepOfSeveralTokensAsItsTokensOneByOne) {
  const LookedAt one_by_one = after_golden_steps();
  LookedAt together;
  std::vector<float> q(4 * LookedAt::kDim, -100.0F);
  // Newest first: queries come in any order.
  for (std::size_t i = 0; i < 4; ++i) {
    const Weights& weights = golden_steps()[3 - i];
    for (std::size_t j = 0; j < weights.size(); ++j) {
      q[i * LookedAt::kDim + j] = std::log(weights[j]);
    }
  }
  // A token that a query cannot see yet would be the strongest.
  for (std::size_t i = 1; i < 4; ++i) q[i * LookedAt::kDim + 7] = 50.0F;
  const Positions at{7, 6, 5, 4};
  together.stored = {0, 1, 2, 3, 4, 5, 6, 7};
  together.record.add(together.policy,
                      {{q.data(), LookedAt::kDim, LookedAt::kDim}, at, 1, LookedAt::kDim, 1.0F},
                      RowView::dense(together.unit.data(), 8, LookedAt::kDim), together.stored);
  EXPECT_EQ(list_of(together.record.last_important()), list_of(one_by_one.record.last_important()));
  EXPECT_EQ(list_of(together.record.longest_gaps()), list_of(one_by_one.record.longest_gaps()));
}

TEST(LazyEviction, CutsAtMultiplesOfTheWindowOnly) {
  const lazy_eviction::Policy policy{.budget = 5, .window = 2};
  EXPECT_FALSE(policy.is_due(5, 2));  // within the budget
  EXPECT_TRUE(policy.is_due(6, 2));   // the specification's loop: n = 6 at t = 2
  EXPECT_FALSE(policy.is_due(6, 3));
  EXPECT_TRUE(policy.is_due(9, 5, 3));  // passed 4
  EXPECT_FALSE(policy.is_due(9, 3, 1));
  EXPECT_EQ(policy.target().most_rows(), 6);  // B + W - 1
  // A loop: what a head holds between steps.
  std::int64_t stored = 4;
  std::int64_t most = 0;
  for (std::int64_t t = 1; t <= 100; ++t) {
    ++stored;
    if (policy.is_due(stored, t)) stored = policy.budget;
    most = std::max(most, stored);
  }
  EXPECT_EQ(most, policy.target().most_rows());
}

TEST(LazyEviction, TakesItsRecordAlongWhenATokenIsDropped) {
  LookedAt walk = after_golden_steps();
  walk.cut({0, 2, 5, 6, 7});
  EXPECT_EQ(list_of(walk.record.positions()), (Positions{0, 2, 5, 6, 7}));
  // Step 5: token 2 again, 3 tokens after step 2; dropped keys have no weight.
  walk.add({{.05F, 1e-9F, .5F, 1e-9F, 1e-9F, .05F, .05F, .05F, .3F}});
  EXPECT_EQ(list_of(walk.record.last_important(), 3), (Positions{4, 5, 2, 3, 4, 5}));
  EXPECT_EQ(list_of(walk.record.longest_gaps()), (Positions{3, 3, 1, 1, 1, 1}));
  EXPECT_EQ(lazy_eviction::Record::bytes(7), 84U);
}

TEST(LazyEviction, ForgetsARollbackAndACopyIsExact) {
  LookedAt walk = after_golden_steps();
  const lazy_eviction::Record before = walk.record;
  walk.add({{.05F, .05F, .5F, .05F, .05F, .05F, .05F, .05F, .15F}});
  EXPECT_EQ(walk.record.last_important()[2], 8);
  EXPECT_EQ(before.last_important()[2], 5);  // a fork's copy goes its own way
  walk.record.forget(8);
  EXPECT_EQ(list_of(walk.record.positions()), (Positions{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(walk.record.newest(), 7);
  EXPECT_EQ(walk.record.last_important()[2], 7);  // never later than the newest query
  EXPECT_EQ(walk.record.longest_gaps()[2], 3);
  // The same token again.
  walk.stored.pop_back();
  walk.add({{.9F, .01F, .01F, .01F, .01F, .01F, .01F, .01F, .03F}});
  EXPECT_EQ(walk.record.newest(), 8);
  // Before the first query: as new.
  walk.record.forget(4);
  EXPECT_EQ(walk.record.newest(), -1);
  EXPECT_TRUE(walk.record.positions().empty());
}

TEST(LazyEviction, ALookOfAlphaItselfCounts) {
  LookedAt walk;
  walk.stored = {0, 1, 2};
  walk.policy.alpha = 0.25F;
  walk.add({{1.0F, 1.0F, 1.0F, 1.0F}});  // a quarter each, to the bit
  EXPECT_EQ(list_of(walk.record.longest_gaps()), (Positions{1, 1, 1, 1}));
}

TEST(LazyEviction, NoLookCountsWhereAWeightIsNotANumber) {
  LookedAt walk;
  walk.add({{std::numeric_limits<float>::quiet_NaN(), .5F, .2F, .2F, .1F}});
  EXPECT_EQ(list_of(walk.record.longest_gaps()), (Positions{0, 0, 0, 0, 0}));
}

TEST(LazyEviction, RefusesWhatWasNotRecorded) {
  using testing::message_of;
  const LookedAt walk = after_golden_steps();
  TokenScores early(9);
  EXPECT_EQ(
      message_of<ConfigError>([&] { lazy_eviction::add_head(walk.policy, walk.record, early); }),
      "a record up to position 7 of a sequence of 9 tokens");
  EXPECT_EQ(early.num_heads(), 0);
  EXPECT_THROW(lazy_eviction::add_head(walk.policy, lazy_eviction::Record(), early), ConfigError);

  LookedAt changed = walk;
  changed.stored = {0, 2, 5, 6, 7};
  EXPECT_EQ(message_of<ConfigError>([&] {
              changed.add({{.1F, .1F, .1F, .1F, .1F, .1F, .1F, .1F, .2F}});
            }),
            "a record of 8 tokens does not go with 6 stored ones: was keep() forgotten?");
  changed.stored = {0, 1, 2, 3, 4, 5, 6};
  changed.record = walk.record;
  EXPECT_EQ(message_of<ConfigError>([&] { changed.add({golden_steps()[3]}); }),
            "a query at 7 after one noted at 7");
  EXPECT_EQ(list_of(changed.record.longest_gaps()), list_of(walk.record.longest_gaps()));

  const lazy_eviction::Policy wide{.budget = 5, .window = 5};
  TokenScores scores(8);
  EXPECT_THROW(lazy_eviction::add_head(wide, walk.record, scores), ConfigError);
  EXPECT_THROW(static_cast<void>(wide.is_due(6, 5)), ConfigError);
  for (const float alpha : {0.0F, 1.5F, std::numeric_limits<float>::quiet_NaN()}) {
    LookedAt fresh;
    fresh.policy.alpha = alpha;
    EXPECT_THROW(fresh.add({golden_steps()[0]}), ConfigError) << alpha;
  }
}

}  // namespace
}  // namespace headwise
