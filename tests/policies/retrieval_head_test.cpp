// SPDX-License-Identifier: MIT
#include "headwise/policies/retrieval_head.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "headwise/heads/json.hpp"
#include "support/errors.hpp"
#include "support/published.hpp"

namespace headwise {
namespace {

using testing::message_of;
using testing::published;

TEST(CopyScore, CountsHitsAsTheCodeAndAsThePaper) {
  const std::vector<std::int32_t> needle{5, 6, 7, 8};
  retrieval_head::CopyScore score(Pos{10}, needle);
  score.step(Pos{10}, 5);  // hit
  score.step(Pos{11}, 9);  // attends 6, generates 9
  score.step(Pos{0}, 7);   // a sink wins
  score.step(Pos{13}, 8);  // hit
  EXPECT_EQ(score.score(), .5);
  EXPECT_EQ(score.paper_score(), .5);
  for (int i = 0; i < 3; ++i) score.step(Pos{10}, 5);
  EXPECT_EQ(score.score(), 1.25);
  EXPECT_EQ(score.paper_score(), .5);
}

TEST(CopyScore, TakesAnyPositionForAMissAndRefusesANegativeNeedle) {
  const std::vector<std::int32_t> needle{5};
  retrieval_head::CopyScore score(Pos{10}, needle);
  for (const std::int64_t far : {INT64_MIN, std::int64_t{-1}, INT64_MAX}) score.step(Pos{far}, 5);
  EXPECT_EQ(score.score(), 0.0);
  EXPECT_THROW(retrieval_head::CopyScore(Pos{-1}, needle), ConfigError);
}

TEST(CopyScore, EndsWithTheNeedle) {
  const std::vector<std::int32_t> needle{5};
  retrieval_head::CopyScore score(Pos{10}, needle);
  score.step(Pos{9}, 5);
  score.step(Pos{11}, 5);
  EXPECT_EQ(score.score(), 0.0);
  EXPECT_EQ(message_of<ConfigError>([] { retrieval_head::CopyScore(Pos{0}, {}); }),
            "a needle needs at least 1 token, got 0");
}

TEST(RetrievalHead, KeepsAGroupWithOneRetrievalHead) {
  const auto scores = QueryHeadScores::dense(1, 6, std::vector<double>{0, .1, .09, 0, 1.88, 0});
  const retrieval_head::Policy policy{.group_size = 2, .window = {.sink = 4, .recent = 60}};
  const HeadPlan plan = policy.plan(scores);
  EXPECT_TRUE(is_retrieval(plan.budget(0, 0)));
  EXPECT_EQ(plan.budget(0, 1), HeadBudget{(KeepWindow{{4, 60}})});
  EXPECT_TRUE(is_retrieval(plan.budget(0, 2)));
  EXPECT_EQ(message_of<ConfigError>([&] { (void)retrieval_head::Policy{}.plan(scores); }),
            "retrieval_head needs a window: it publishes none");
}

TEST(RetrievalHead, FindsThe33HeadsOfLlama2) {
  const std::string path = published("retrieval_head/llama-2-7b-80k/head_score.json");
  HEADWISE_SKIP_WITHOUT(path);
  const retrieval_head::Policy policy{.group_size = 1, .window = {.sink = 64, .recent = 256}};
  const HeadPlan plan = policy.plan(load_head_runs(path).mean);
  EXPECT_DOUBLE_EQ(plan.sparsity(), 1 - 33 / 1024.0);
  EXPECT_TRUE(is_retrieval(plan.budget(16, 19)));
}

}  // namespace
}  // namespace headwise
