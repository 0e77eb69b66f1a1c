// SPDX-License-Identifier: MIT
#include "headwise/policies/locret.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "headwise/heads/select_tokens.hpp"
#include "support/errors.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using Kept = std::vector<std::int32_t>;

// policies-more, section 7.
TEST(Locret, CutsAPromptAsItRuns) {
  const locret::Policy policy{.budget = 4, .chunk = 3, .stabilizers = 2, .local = 2};
  const std::vector<float> given{.9F, .1F, .5F, .2F, .8F, .3F, .6F, .05F, .4F, 0, 0};
  locret::Scores of_head;
  std::vector<Kept> cuts;
  std::vector<std::int64_t> steps;
  for (std::int64_t done = 0; done < 11;) {
    const std::int64_t step = policy.next_step(done, 11);
    of_head.add(done, std::span(given).subspan(static_cast<std::size_t>(done),
                                               static_cast<std::size_t>(step)));
    steps.push_back(step);
    done += step;
    if (!policy.cuts_at(done, 11)) continue;
    TokenScores scores(done);
    of_head.add_head(scores);
    const KeptPositions kept =
        select_tokens(scores, policy.protection(done, 11), uniform_counts(scores, policy.budget));
    of_head.keep(kept.of_head(0));
    cuts.push_back(test::lists_of(kept)[0]);
  }
  EXPECT_EQ(steps, (std::vector<std::int64_t>{3, 3, 3, 2}));
  EXPECT_EQ(cuts, (std::vector<Kept>{{0, 1, 2}, {0, 2, 4, 5}, {0, 2, 4, 6}}));
  TokenScores end(11);
  of_head.add_head(end);
  EXPECT_EQ(Kept(end.positions(0).begin(), end.positions(0).end()), (Kept{0, 2, 4, 6, 9, 10}));
  EXPECT_EQ(end.scores(0)[3], .6F);
  of_head.forget(6);
  TokenScores before(6);
  of_head.add_head(before);
  EXPECT_EQ(before.num_tokens(0), 3);
}

TEST(Locret, RunsAShortPromptWithoutACut) {
  const locret::Policy policy;
  EXPECT_EQ(policy.next_step(0, 100), 100);
  EXPECT_FALSE(policy.cuts_at(100, 100));
  EXPECT_EQ(policy.next_step(0, 101), 1);
  EXPECT_TRUE(policy.cuts_at(1, 101));
  EXPECT_FALSE(policy.cuts_at(101, 101));
  EXPECT_EQ(policy.next_step(0, 10'000), 3072);
  EXPECT_EQ(policy.next_step(9'216, 10'000), 684);  // up to the last 100
  EXPECT_EQ(policy.protection(9'216, 10'000), (Protection{0, 2500}));
  EXPECT_EQ(policy.protection(9'900, 10'000), (Protection{0, 0}));
}

TEST(Locret, ScoresATokenByTheNetwork) {
  constexpr int kFeatures = 19;
  constexpr int kHidden = 13;
  std::vector<float> w1, w2, x;
  const auto value = [](std::uint32_t salt, int i, int j) {
    return test::golden_value(salt, 0, static_cast<std::uint32_t>(i),
                              static_cast<std::uint32_t>(j));
  };
  for (int o = 0; o < kHidden; ++o) {
    for (int j = 0; j < kFeatures; ++j) w1.push_back(value(7, o, j));
  }
  for (int h = 0; h < 2; ++h) {
    for (int o = 0; o < kHidden; ++o) w2.push_back(value(8, h, o));
  }
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < kFeatures; ++j) x.push_back(value(9, i, j));
  }
  const locret::RetainingHead head(w1, w2, kFeatures, 2);
  EXPECT_EQ(head.num_kv_heads(), 2);
  std::vector<float> out(6);
  head.score(RowView::dense(x.data(), 3, kFeatures), out);
  for (int i = 0; i < 3; ++i) {
    for (int h = 0; h < 2; ++h) {
      double expected = 0.0;
      for (int o = 0; o < kHidden; ++o) {
        double z = 0.0;
        for (int j = 0; j < kFeatures; ++j) {
          z += static_cast<double>(value(7, o, j)) * static_cast<double>(value(9, i, j));
        }
        expected += static_cast<double>(value(8, h, o)) * z / (1.0 + std::exp(-z));
      }
      EXPECT_NEAR(out[static_cast<std::size_t>(3 * h + i)], expected, 1e-4);
    }
  }
  // Far below zero silu is 0, not NaN.
  const locret::RetainingHead one({1.0F}, {1.0F}, 1, 1);
  const std::vector<float> low{-1000.0F};
  one.score(RowView::dense(low.data(), 1, 1), std::span(out).first(1));
  EXPECT_NEAR(out[0], 0.0, 1e-6);
}

TEST(Locret, RefusesWhatDoesNotGoTogether) {
  using testing::message_of;
  EXPECT_THAT(
      message_of<ConfigError>([] { (void)locret::Policy{.budget = 2500}.next_step(0, 10); }),
      ::testing::HasSubstr("stabilizers must be in [0, 2499], got 2500"));
  EXPECT_THROW((void)locret::Policy{.chunk = 0}.cuts_at(1, 200), ConfigError);
  EXPECT_THROW((void)locret::Policy{.local = -1}.protection(1, 200), ConfigError);
  EXPECT_THROW(locret::RetainingHead({1, 2, 3}, {1}, 2, 1), ConfigError);
  EXPECT_THROW(locret::RetainingHead({1, 2}, {1, 2}, 2, 1), ConfigError);
  EXPECT_THROW(locret::RetainingHead({}, {}, 2, 1), ConfigError);
  EXPECT_THROW(locret::RetainingHead({1}, {1}, 0, 1), ConfigError);
  const locret::RetainingHead head({1, 2}, {1}, 2, 1);
  const std::vector<float> x{1, 2, 3};
  std::vector<float> out(1);
  EXPECT_THROW(head.score(RowView::dense(x.data(), 1, 3), out), ConfigError);
  EXPECT_THROW(head.score(RowView::dense(x.data(), 0, 2), out), ConfigError);
  locret::Scores scores;
  scores.add(3, x);
  EXPECT_THROW(scores.add(5, x), ConfigError);
  EXPECT_THROW(scores.add(0x7FFFFFFE, x), ConfigError);
}

}  // namespace
}  // namespace headwise
