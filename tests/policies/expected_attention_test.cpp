// SPDX-License-Identifier: MIT
#include "headwise/policies/expected_attention.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "headwise/heads/select_tokens.hpp"
#include "headwise/policies/ada_kv.hpp"
#include "support/errors.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using expected_attention::Pairs;
using expected_attention::Policy;
using test::GoldenLayer;
using test::KeptLists;

std::vector<QueryMoments> moments_of(const GoldenLayer& layer, int head, std::int64_t sink) {
  std::vector<QueryMoments> moments;
  for (int g = 0; g < GoldenLayer::kGroup; ++g) {
    moments.emplace_back(GoldenLayer::kDim);
    moments.back().add(layer.query_rows(head * GoldenLayer::kGroup + g).rows(sink, layer.n));
  }
  return moments;
}

TokenScores scores_of(const Policy& policy) {
  const GoldenLayer layer;
  TokenScores scores(32);
  for (int h = 0; h < 2; ++h) {
    expected_attention::add_head(policy, moments_of(layer, h, policy.sink), layer.keys(h),
                                 layer.values(h), layer.positions, scores);
  }
  return scores;
}
KeptLists kept_of(const Policy& policy) {
  const TokenScores scores = scores_of(policy);
  return test::lists_of(select_tokens(scores, policy.protection(), uniform_counts(scores, 16)));
}

TEST(ExpectedAttention, ScoresAndKeepsAsKvpress) {
  const Policy policy{.future = 16};
  const TokenScores scores = scores_of(policy);
  EXPECT_NEAR(scores.scores(0)[4], 0.167831, 1e-6);
  EXPECT_NEAR(scores.scores(0)[5], 0.101463, 1e-6);
  test::expect_scores("expected_attention", scores, policy.protection());
  EXPECT_EQ(kept_of(policy),
            (KeptLists{{0, 1, 2, 3, 4, 6, 7, 12, 13, 18, 20, 21, 24, 25, 29, 30},
                       {0, 1, 2, 3, 9, 10, 11, 13, 16, 17, 19, 21, 25, 26, 27, 30}}));
}

TEST(ExpectedAttention, ScoresByTheMeanAloneAsKvpress) {
  const Policy policy{.future = 16, .epsilon = 0.01, .use_covariance = false};
  test::expect_scores("expected_attention_mean_eps", scores_of(policy), policy.protection());
  EXPECT_EQ(kept_of(policy)[0],
            (std::vector<std::int32_t>{0, 1, 2, 3, 4, 7, 11, 13, 17, 20, 21, 23, 25, 29, 30, 31}));
}

TEST(ExpectedAttention, ScoresWithoutValuesAsKvpress) {
  const Policy policy{.future = 16, .use_values = false};
  test::expect_scores("expected_attention_no_vnorm", scores_of(policy), policy.protection());
  EXPECT_EQ(kept_of(policy)[1],
            (std::vector<std::int32_t>{0, 1, 2, 3, 7, 8, 9, 10, 11, 13, 14, 16, 19, 20, 21, 27}));
}

TEST(ExpectedAttention, IsSharedByAdaKvAsKvpress) {
  const Policy policy{.future = 16, .epsilon = 0.01};
  EXPECT_EQ(ada_kv::Policy{}.counts(scores_of(policy), policy.protection(), 16),
            (KeepCounts{18, 14}));
}

TEST(ExpectedAttention, TurnsQueriesBackToWhatTheyWere) {
  for (const Pairs pairs : {Pairs::kHalves, Pairs::kNeighbours}) {
    const expected_attention::Rope rope{10000.0, pairs};
    std::vector<float> row{1, 2, 3, 4, 5, 6, 7, 8};
    std::vector<double> turned(row.begin(), row.end());
    const auto turns = expected_attention::detail::mean_rotation(rope, 8, 37, 1);
    expected_attention::detail::turn(rope, turns, turned.data(), 1);
    std::vector<float> back(turned.begin(), turned.end());
    EXPECT_GT(std::fabs(back[0] - row[0]), 0.1F);
    rope.turn_back(back.data(), 8, 37);
    for (std::size_t d = 0; d < 8; ++d) EXPECT_NEAR(back[d], row[d], 1e-5);
  }
}

TEST(ExpectedAttention, RefusesWhatIsOutOfRange) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW((void)scores_of({.future = 0}), ConfigError);
  EXPECT_THROW((void)scores_of({.epsilon = -1.0}), ConfigError);
  EXPECT_THROW((void)scores_of({.epsilon = nan}), ConfigError);
  const GoldenLayer layer;
  TokenScores scores(32);
  const std::vector<QueryMoments> narrow{QueryMoments(4)};
  EXPECT_EQ(testing::message_of<ConfigError>([&] {
              expected_attention::add_head({}, narrow, layer.keys(0), layer.values(0),
                                           layer.positions, scores);
            }),
            "moments of width 4 over keys of width 8");
}

}  // namespace
}  // namespace headwise
