// SPDX-License-Identifier: MIT
#include "headwise/policies/ems.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "headwise/heads/select_tokens.hpp"
#include "headwise/policies/h2o.hpp"
#include "support/errors.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using Positions = std::vector<std::int32_t>;

/// One head with rows of two elements each.
struct MergeCase {
  MergeCase(const std::vector<float>& weights, std::vector<float> keys, std::vector<float> values)
      : scores(std::ssize(weights)), k(std::move(keys)), v(std::move(values)) {
    std::ranges::copy(weights, scores.add_head().begin());
  }
  ems::Merged merged(const ems::Policy& policy, const Positions& kept) const {
    return ems::merge(policy, scores, 0, RowView::dense(k.data(), std::ssize(k) / 2, 2),
                      RowView::dense(v.data(), std::ssize(v) / 2, 2), kept);
  }
  TokenScores scores;
  std::vector<float> k, v;
};
constexpr ems::Policy kNoWindow{.window = 0};

// policies-more, section 3.
TEST(Ems, TakesTheLargerOfGlobalAndLocal) {
  const std::vector<float> global{.9F, .3F, .1F, .1F, .1F};
  const std::vector<float> local{0, .05F, .05F, .2F, .1F};
  TokenScores scores(5);
  ems::global_local(global, local, scores.add_head());
  const std::vector<float> expected{.24F, .08F, .05F, .2F, .1F};
  for (std::size_t j = 0; j < 5; ++j) EXPECT_NEAR(scores.scores(0)[j], expected[j], 1e-6);
  EXPECT_EQ(test::lists_of(select_tokens(scores, {}, uniform_counts(scores, 2))),
            (test::KeptLists{{0, 3}}));
  std::vector<float> out(5);
  ems::global_local(std::vector<float>(5, 0.0F), local, out);
  EXPECT_EQ(out, local);
}

TEST(Ems, ScoresByAllQueriesAndTheLast) {
  const test::GoldenLayer layer;
  for (int h = 0; h < 2; ++h) {
    h2o::Sums sums;
    sums.add(layer.queries(h, 0, 32), layer.keys(h), layer.positions);
    h2o::Sums last;  // the mean over the group, too
    last.add(layer.queries(h, 28, 32), layer.keys(h), layer.positions);
    TokenScores scores(32);
    ems::add_head(sums.sums(), layer.queries(h, 28, 32), layer.keys(h), layer.positions, scores);
    for (std::size_t j = 0; j < 32; ++j) {
      // All 32 rows sum to 1, and the last 4.
      EXPECT_NEAR(scores.scores(0)[j], std::max(sums.sums()[j] * 4.0F / 32.0F, last.sums()[j]),
                  1e-5);
    }
  }
}

TEST(Ems, MergesValuesAndDirectionsByScore) {
  const MergeCase one({.6F, .2F}, {2, 0, 1.6F, 1.2F}, {1, 0, .8F, .6F});
  const ems::Merged rows = one.merged(kNoWindow, {0});
  EXPECT_EQ(rows.num_merged, 1);
  ASSERT_EQ(rows.k.size(), 2U);
  EXPECT_NEAR(rows.k[0], 1.975526, 1e-5);
  EXPECT_NEAR(rows.k[1], .311925, 1e-5);
  EXPECT_NEAR(rows.v[0], .95, 1e-6);
  EXPECT_NEAR(rows.v[1], .15, 1e-6);
  // R is 0.64.
  EXPECT_EQ(one.merged({.window = 0, .threshold = 0.63}, {0}).num_merged, 1);
  EXPECT_EQ(one.merged({.window = 0, .threshold = 0.65}, {0}).num_merged, 0);
  // Norms are averaged by score: 0.75 x 2 + 0.25 x 6.
  const MergeCase longer({.6F, .2F}, {2, 0, 6, 0}, {1, 0, 1, 0});
  EXPECT_EQ(longer.merged(kNoWindow, {0}).k, (std::vector<float>{3, 0}));
}

TEST(Ems, LeavesACentreAloneWhoseCandidateIsOfTheZeroClass) {
  const float odd = 0.1F;
  const auto copied = [&](const std::vector<float>& k, const std::vector<float>& v) {
    const MergeCase one({.6F, .2F}, {odd, 0, k[0], k[1]}, {odd, 0, v[0], v[1]});
    const ems::Merged rows = one.merged({.window = 0, .threshold = 0.0}, {0});
    EXPECT_EQ(rows.num_merged, 0);
    return rows.k == std::vector<float>{odd, 0} && rows.v == std::vector<float>{odd, 0};
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(copied({0, 1}, {1, 0}));
  EXPECT_TRUE(copied({1, 0}, {0, 1}));
  EXPECT_TRUE(copied({-1, 0}, {-1, 0}));  // opposite twice is not alike
  EXPECT_TRUE(copied({0, 0}, {1, 0}));
  EXPECT_TRUE(copied({1, 0}, {0, 0}));
  EXPECT_TRUE(copied({nan, 0}, {1, 0}));
}

TEST(Ems, GivesEachCandidateToTheCentreMostLikeIt) {
  // Centres 0 and 3, at right angles; 1 is like 3, 2 like 0, 4 like both but nearer 0.
  const MergeCase five({.9F, .4F, .3F, .8F, .2F}, {1, 0, .1F, 1, 1, .1F, 0, 1, 1, .3F},
                       {1, 0, 0, 1, 1, 0, 0, 1, 1, 0});
  const ems::Policy policy{.window = 0, .merged = 1.5};
  EXPECT_EQ(five.merged(policy, {0, 3}).num_merged, 3);
  // Best first, as many as there are centres: token 4 is dropped unseen; ceil(0.25 x 2) is 1.
  EXPECT_EQ(five.merged(kNoWindow, {0, 3}).num_merged, 2);
  EXPECT_EQ(five.merged({.window = 0, .merged = 0.25}, {0, 3}).num_merged, 1);
  EXPECT_EQ(five.merged({.window = 0, .merged = 0.0}, {0, 3}).num_merged, 0);
  const ems::Merged rows = five.merged(kNoWindow, {0, 3});
  EXPECT_GT(rows.k[1], 0.0F);  // a little of 2, and nothing of 1
  EXPECT_LT(rows.k[1], 0.1F);
  EXPECT_EQ(rows.v, (std::vector<float>{1, 0, 0, 1}));
  // The better of two: candidate 1 is a little like 0 and the same as 2.
  const MergeCase near({.9F, .4F, .8F}, {1, 0, .6F, .8F, .6F, .8F}, {1, 0, 1, 0, 1, 0});
  EXPECT_EQ(near.merged({.window = 0, .threshold = 0.5}, {0, 2}).k[1], 0.0F);
  const MergeCase first({.9F, .4F, .8F}, {.6F, .8F, .6F, .8F, 1, 0}, {1, 0, 1, 0, 1, 0});
  EXPECT_EQ(first.merged({.window = 0, .threshold = 0.5}, {0, 2}).k[3], 0.0F);
}

TEST(Ems, RefusesWhatDoesNotGoTogether) {
  using testing::message_of;
  const MergeCase one({.6F, .2F}, {1, 0, 1, 0}, {1, 0, 1, 0});
  const auto refused = [&](const ems::Policy& policy, const Positions& kept) {
    return message_of<ConfigError>([&] { (void)one.merged(policy, kept); });
  };
  EXPECT_EQ(refused({}, {2}), "KV head 0: kept position 2 is not stored, or not ascending");
  EXPECT_THAT(refused({}, {1, 0}), ::testing::HasSubstr("position 0"));
  EXPECT_THAT(refused({.merged = -1.0}, {0}), ::testing::HasSubstr("-1"));
  EXPECT_THAT(refused({.threshold = 1.0}, {0}), ::testing::HasSubstr("[0, 1)"));
  EXPECT_THROW((void)ems::merge({}, one.scores, 1, {}, {}, {}), ConfigError);
  EXPECT_THROW((void)ems::merge({}, one.scores, 0, {}, {}, {}), ConfigError);
  EXPECT_THROW((void)MergeCase({-1, 0}, {1, 0, 1, 0}, {1, 0, 1, 0}).merged({}, {0}), ConfigError);
  std::vector<float> out(2);
  EXPECT_THROW(ems::global_local(std::vector<float>(3), std::vector<float>(2), out), ConfigError);
}

}  // namespace
}  // namespace headwise
