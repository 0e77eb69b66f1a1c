// SPDX-License-Identifier: MIT
#include "headwise/policies/razor_attention.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using testing::message_of;

std::size_t num_retrieval(const HeadPlan& plan) {
  std::size_t count = 0;
  for (const HeadBudget& budget : plan.budgets()) count += is_retrieval(budget) ? 1U : 0U;
  return count;
}

/// 256 heads; induction rises with the index, echo falls.
razor_attention::Scores opposite_scores() {
  std::vector<double> rising(256);
  for (std::size_t i = 0; i < 256; ++i) rising[i] = static_cast<double>(i) / 256;
  const std::vector<double> falling(rising.rbegin(), rising.rend());
  return {HeadScores::dense(32, 8, rising), HeadScores::dense(32, 8, falling)};
}

TEST(RazorAttention, KeepsTheUnionOfInductionAndEchoHeads) {
  const HeadPlan plan = razor_attention::Policy{}.plan(opposite_scores());
  EXPECT_EQ(num_retrieval(plan), 36U + 3U);  // round(35.84), round(2.56)
  EXPECT_TRUE(is_retrieval(plan.budget(31, 7)));
  EXPECT_TRUE(is_retrieval(plan.budgets()[256 - 36]));
  EXPECT_TRUE(is_retrieval(plan.budgets()[2]));
  EXPECT_EQ(plan.budgets()[3], HeadBudget{KeepGrowingWindow{}});
  EXPECT_EQ(plan.budgets()[256 - 37], HeadBudget{KeepGrowingWindow{}});
}

TEST(RazorAttention, CountsAHeadOfBothKindsOnce) {
  razor_attention::Scores scores = opposite_scores();
  scores.echo = scores.induction;
  EXPECT_EQ(num_retrieval(razor_attention::Policy{}.plan(scores)), 36U);
}

TEST(RazorAttention, RoundsHalvesToEvenAndMayHaveNoEchoHead) {
  const auto flat = HeadScores::dense(1, 50, std::vector<double>(50, .5));
  EXPECT_EQ(num_retrieval(razor_attention::Policy{.induction_share = 0}.plan({flat, flat})), 0U);
  EXPECT_EQ(num_retrieval(razor_attention::Policy{.induction_share = .05, .echo_share = 0}.plan(
                {flat, flat})),
            2U);  // 2.5
}

TEST(RazorAttention, HasExactCountsWhenScoresTie) {
  const auto flat = HeadScores::dense(10, 10, std::vector<double>(100, .5));
  EXPECT_EQ(num_retrieval(razor_attention::Policy{}.plan({flat, flat})), 14U);
}

TEST(RazorAttention, ScoresAKvHeadByItsBestQueryHead) {
  std::vector<double> values(16, 0.0);
  values[5] = .9;  // query head 5: KV head 1 of groups of 4
  const HeadScores induction = reduce_max(QueryHeadScores::dense(1, 16, values), 4);
  const HeadPlan plan = razor_attention::Policy{.induction_share = .25}.plan(
      {induction, HeadScores::dense(1, 4, std::vector<double>(4))});
  EXPECT_TRUE(is_retrieval(plan.budget(0, 1)));
  EXPECT_EQ(num_retrieval(plan), 1U);
}

TEST(RazorAttention, TakesAnotherBudget) {
  const razor_attention::Policy policy{.budget = {.sink = 4, .min_recent = 60, .divisor = 8}};
  EXPECT_EQ(policy.plan(opposite_scores()).budget(16, 0),
            HeadBudget{(KeepGrowingWindow{4, 60, 8})});
}

TEST(RazorAttention, RefusesSharesAndShapesThatDoNotFit) {
  const razor_attention::Scores scores = opposite_scores();
  EXPECT_EQ(message_of<ConfigError>(
                [&] { (void)razor_attention::Policy{.induction_share = 14}.plan(scores); }),
            "a share of heads must be in [0, 1], got 14");
  EXPECT_EQ(message_of<ConfigError>([&] {
              (void)razor_attention::Policy{}.plan(
                  {scores.induction, HeadScores::dense(1, 2, std::vector<double>(2))});
            }),
            "induction and echo scores differ in shape: 256 and 2 heads");
}

}  // namespace
}  // namespace headwise
