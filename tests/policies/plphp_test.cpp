// SPDX-License-Identifier: MIT
#include "headwise/policies/plphp.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "support/errors.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using plphp::Span;
using test::KeptLists;

TokenScores image_scores(std::int64_t length, const std::vector<std::vector<float>>& heads) {
  TokenScores scores(length);
  for (const auto& head : heads) std::ranges::copy(head, scores.add_head().begin());
  return scores;
}
KeptLists pruned(const plphp::Policy& policy, double attention, const TokenScores& scores,
                 const std::vector<Span>& images) {
  KeptPositions kept;
  plphp::select(policy, attention, scores, images, kept);
  return test::lists_of(kept);
}

// policies-more, section 8.
TEST(Plphp, SetsTheRateByTheLayersAttention) {
  const plphp::Policy policy;
  EXPECT_EQ(policy.count(0.30, 10), 7);
  EXPECT_EQ(policy.count(0.20, 10), 4);
  EXPECT_EQ(policy.count(0.05, 10), 1);  // 0.4 - 0.3 is less than 0.1 in double
  EXPECT_EQ(policy.count(0.25, 10), 4);
  EXPECT_EQ(policy.count(0.10, 10), 4);
  EXPECT_EQ(policy.count(0.20, 9), 3);  // floor, not nearest: 3.6
  EXPECT_EQ(policy.count(0.20, 0), 0);
  const plphp::Policy wide{.rate = 0.8, .step = 0.9};
  EXPECT_EQ(wide.count(0.30, 10), 10);
  EXPECT_EQ(wide.count(0.05, 10), 0);
}

TEST(Plphp, KeepsEachHeadsOwnTokensOfAnImage) {
  const TokenScores scores = image_scores(5, {{.1F, .5F, .2F, .4F, .3F}, {.6F, .1F, .5F, .2F, 0}});
  EXPECT_EQ(pruned({}, 0.2, scores, {{0, 5}}), (KeptLists{{1, 3}, {0, 2}}));
}

TEST(Plphp, LeavesTextAndCountsImagesByThemselves) {
  // Text 0, 6, 7, 12; images of 5 and 4 tokens, of which 2 and 1 stay, though the second has more
  // attention than the first, and the text has none.
  const TokenScores scores =
      image_scores(13, {{0, .01F, .03F, .02F, .03F, .03F, 0, 0, .2F, .4F, .3F, .4F, 0}});
  EXPECT_EQ(pruned({}, 0.2, scores, {{1, 6}, {8, 12}}), (KeptLists{{0, 2, 4, 6, 7, 9, 12}}));
  EXPECT_EQ(pruned({}, 0.2, scores, {}), (KeptLists{{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}}));
  // One image behind the other.
  EXPECT_EQ(pruned({}, 0.2, scores, {{1, 6}, {6, 12}}), (KeptLists{{0, 2, 4, 9, 11, 12}}));
}

TEST(Plphp, KeepsTheSameWhenItSelectsAgain) {
  TokenScores scores(9);
  const std::vector<std::int32_t> left{0, 2, 3, 8};  // of an image [1, 8): 2 of 7 stayed
  std::ranges::copy(std::vector<float>{.1F, .3F, .2F, 0}, scores.add_head(left).begin());
  EXPECT_EQ(pruned({}, 0.2, scores, {{1, 8}}), (KeptLists{{0, 2, 3, 8}}));
  EXPECT_EQ(pruned({}, 0.05, scores, {{1, 8}}), (KeptLists{{0, 8}}));
}

TEST(Plphp, TakesWhatIsNotFiniteForTheLeast) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const TokenScores scores = image_scores(5, {{nan, .1F, inf, .2F, 0}});
  EXPECT_EQ(pruned({}, 0.2, scores, {{0, 5}}), (KeptLists{{1, 3}}));
}

/// Softmax of the last query of one query head over all 32 keys, in double.
std::vector<double> last_weights(const test::GoldenLayer& layer, int query_head) {
  std::vector<double> weights;
  double sum = 0.0;
  for (std::int64_t j = 0; j < 32; ++j) {
    double dot = 0.0;
    for (int d = 0; d < 8; ++d) {
      dot += static_cast<double>(layer.query_rows(query_head).row(31)[d]) *
             static_cast<double>(layer.keys(query_head / 2).row(j)[d]);
    }
    weights.push_back(std::exp(dot / std::sqrt(8.0)));
    sum += weights.back();
  }
  for (double& weight : weights) weight /= sum;
  return weights;
}

TEST(Plphp, ScoresByTheLargestWeightOfTheGroupAndMeansTheShares) {
  const test::GoldenLayer layer;
  const std::vector<Span> images{{3, 9}, {20, 30}};
  TokenScores scores(32);
  for (int h = 0; h < 2; ++h) {
    const double attention =
        plphp::add_head(layer.queries(h, 31, 32), layer.keys(h), layer.positions, images, scores);
    const auto a = last_weights(layer, 2 * h);
    const auto b = last_weights(layer, 2 * h + 1);
    double expected = 0.0;
    for (std::size_t j = 0; j < 32; ++j) {
      EXPECT_NEAR(scores.scores(h)[j], std::max(a[j], b[j]), 1e-6);
      if ((j >= 3 && j < 9) || (j >= 20 && j < 30)) expected += (a[j] + b[j]) / 2.0;
    }
    EXPECT_NEAR(attention, expected, 1e-6);
    EXPECT_GT(attention, 0.05);
    EXPECT_LT(attention, 0.95);
  }
  // Of several queries the mean: a share stays one.
  TokenScores more(32);
  const std::vector<Span> everything{{0, 32}};
  EXPECT_NEAR(
      plphp::add_head(layer.queries(0, 28, 32), layer.keys(0), layer.positions, everything, more),
      1.0, 1e-5);
  EXPECT_LT(*std::ranges::max_element(more.scores(0)), 1.0F);
}

TEST(Plphp, HidesFromTheSharesARowThatIsNotFinite) {
  const test::GoldenLayer layer;
  std::vector<float> keys(layer.k.begin(), layer.k.begin() + 32 * 8);
  keys[5 * 8] = std::numeric_limits<float>::quiet_NaN();
  TokenScores scores(32);
  const std::vector<Span> images{{0, 32}};
  const double attention =
      plphp::add_head(layer.queries(0, 31, 32), RowView::dense(keys.data(), 32, 8), layer.positions,
                      images, scores);
  EXPECT_TRUE(is_finite(attention));
}

TEST(Plphp, RefusesWhatDoesNotGoTogether) {
  using testing::message_of;
  const TokenScores scores = image_scores(5, {{1, 2, 3, 4, 5}});
  KeptPositions kept;
  const auto refused = [&](const plphp::Policy& policy, double attention,
                           const std::vector<Span>& images) {
    return message_of<ConfigError>([&] { plphp::select(policy, attention, scores, images, kept); });
  };
  EXPECT_EQ(refused({}, 0.2, {{0, 6}}),
            "an image at [0, 6) must begin at 0 or later, hold a token and end by 5");
  EXPECT_THAT(refused({}, 0.2, {{0, 3}, {2, 4}}), ::testing::HasSubstr("begin at 3"));
  EXPECT_THAT(refused({}, 0.2, {{2, 2}}), ::testing::HasSubstr("[2, 2)"));
  EXPECT_THAT(refused({}, 0.2, {{-1, 2}}), ::testing::HasSubstr("[-1, 2)"));
  EXPECT_THAT(refused({.rate = 1.5}, 0.2, {}), ::testing::HasSubstr("1.5"));
  EXPECT_THAT(refused({.step = -0.1}, 0.2, {}), ::testing::HasSubstr("-0.1"));
  EXPECT_THAT(refused({.attentive = 0.1, .indifferent = 0.2}, 0.2, {}),
              ::testing::HasSubstr("got 0.2 and 0.1"));
  EXPECT_THAT(refused({}, std::numeric_limits<double>::quiet_NaN(), {}),
              ::testing::HasSubstr("finite"));
  EXPECT_EQ(kept.num_heads(), 0);
  const test::GoldenLayer layer;
  TokenScores none(32);
  EXPECT_THROW((void)plphp::add_head(layer.queries(0, 31, 31), layer.keys(0), layer.positions,
                                     std::span<const Span>{}, none),
               ConfigError);
  EXPECT_EQ(none.num_heads(), 0);
}

}  // namespace
}  // namespace headwise
