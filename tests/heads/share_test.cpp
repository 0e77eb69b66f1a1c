// SPDX-License-Identifier: MIT
#include "headwise/heads/share.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using testing::message_of;

/// 100 heads, of which `retrieval` keep everything.
HeadPlan plan_of(int retrieval, const HeadBudget& streaming) {
  HeadPlan plan(std::vector<int>{100}, streaming);
  for (int head = 0; head < retrieval; ++head) plan.set(0, head, KeepEverything{});
  return plan;
}

TEST(KeptShare, IsDuoAttentionsMemoryFormula) {
  const KeepWindow streaming{{64, 256}};
  EXPECT_NEAR(kept_share(plan_of(50, streaming), 4096), .5391, 5e-5);
  EXPECT_NEAR(kept_share(plan_of(25, streaming), 4096), .3086, 5e-5);
  EXPECT_NEAR(kept_share(plan_of(50, streaming), 32000), .5050, 5e-5);
  EXPECT_NEAR(kept_share(plan_of(25, streaming), 32000), .2575, 5e-5);
  EXPECT_NEAR(kept_share(plan_of(50, streaming), 100000), .5016, 5e-5);
  EXPECT_NEAR(kept_share(plan_of(25, streaming), 100000), .2524, 5e-5);
  EXPECT_EQ(kept_share(plan_of(25, streaming), 320), 1.0);
}

TEST(KeptShare, IsRazorAttentionsMemoryFormula) {
  const HeadPlan plan = plan_of(15, KeepGrowingWindow{});
  EXPECT_EQ(kept_share(plan, 4000), 1.0);
  EXPECT_NEAR(kept_share(plan, 8192), .5656, 5e-5);
  EXPECT_NEAR(kept_share(plan, 20000), .32, 5e-4);  // 3.125 times smaller: the paper's figure
  EXPECT_NEAR(kept_share(plan, 1000000), .32, 5e-5);
}

TEST(KeptShare, BoundsTheSpeedUpAsRlkvComputesIt) {
  // W = 80, mean length 3000: RLKV's table of theoretical speed-ups.
  const KeepWindow streaming{{16, 64}};
  EXPECT_NEAR(1 / kept_share(plan_of(80, streaming), 3000), 1.2417, 5e-5);
  EXPECT_NEAR(1 / kept_share(plan_of(60, streaming), 3000), 1.6376, 5e-5);
  EXPECT_NEAR(1 / kept_share(plan_of(50, streaming), 3000), 1.9481, 5e-5);
  EXPECT_NEAR(1 / kept_share(plan_of(40, streaming), 3000), 2.4038, 5e-5);
  EXPECT_NEAR(1 / kept_share(plan_of(20, streaming), 3000), 4.5181, 5e-5);
}

TEST(NumKept, NeverExceedsTheContext) {
  for (const HeadBudget& budget :
       std::vector<HeadBudget>{KeepEverything{}, KeepWindow{{4, 60}}, KeepWindow{{0, 1}},
                               KeepWindow{{4, Window::kUnbounded}}, KeepGrowingWindow{4, 16, 5}}) {
    std::int64_t last = 0;
    for (std::int64_t n = 0; n < 500; ++n) {
      const std::int64_t kept = num_kept(budget, n);
      EXPECT_LE(kept, n);
      EXPECT_GE(kept, last);
      last = kept;
    }
  }
  EXPECT_EQ(num_kept(KeepWindow{{4, 60}}, 1000000), 64);
  // All of 16384 tokens, of which the last one's query is the last that sees everything.
  const KeepWindowFrom late{{{128, 256}}, 16384};
  EXPECT_EQ(num_kept(late, 16384), 16384);
  EXPECT_EQ(num_kept(late, 16385), 384);
}

TEST(NumKept, RefusesWhatWouldKeepLessThanNothing) {
  EXPECT_THROW((void)num_kept(KeepWindow{{-5, 4}}, 3), ConfigError);  // -1 by the formula
  EXPECT_THROW((void)num_kept(KeepWindow{{4, INT64_MIN}}, 3), ConfigError);
  EXPECT_THROW((void)num_kept(KeepGrowingWindow{.sink = INT64_MIN}, 3), ConfigError);
  EXPECT_THROW((void)num_kept(KeepGrowingWindow{.divisor = 0}, 3), ConfigError);
  EXPECT_THROW((void)num_kept(KeepSelected{-1}, 3), ConfigError);
  EXPECT_EQ(message_of<ConfigError>([] { (void)num_kept(KeepEverything{}, -1); }),
            "a context must be in [0, 1099511627776], got -1");
  EXPECT_THROW((void)num_kept(KeepWindow{{4, 60}}, INT64_MIN), ConfigError);
  EXPECT_THROW((void)num_kept(KeepGrowingWindow{}, INT64_MAX), ConfigError);
  EXPECT_EQ(num_kept(KeepWindow{{kMaxTokens, kMaxTokens}}, kMaxTokens), kMaxTokens);
  EXPECT_EQ(num_kept(KeepGrowingWindow{}, kMaxTokens), 4 + kMaxTokens / 5 + 1);
  EXPECT_EQ(num_kept(KeepSelected{}, 1000), 1000);  // nothing is forecast
  EXPECT_EQ(num_kept(KeepSelected{300}, 1000), 300);
  EXPECT_EQ(num_kept(KeepSelected{300}, 299), 299);
}

TEST(KeptShare, RefusesAContextOfNothing) {
  const HeadPlan plan(std::vector<int>{2});
  EXPECT_THROW((void)kept_share(plan, 0), ConfigError);
  EXPECT_THROW((void)kept_share(plan, -7), ConfigError);
}

}  // namespace
}  // namespace headwise
