// SPDX-License-Identifier: MIT
#include "headwise/policies/tri_attention.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "headwise/heads/select_tokens.hpp"
#include "support/errors.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using test::KeptLists;
using tri_attention::Combine;
using tri_attention::QueryCentre;

// Golden numbers: queries of the golden layer before RoPE, its keys as stored after it, distances
// 1, 2, 4, 8, 16 beyond length 32. They come from the released rule (score_keys_for_round_reference
// and compute_frequency_statistics_from_means in triattention/methods/pruning_utils.py, 092e4dc) in
// double in another language: keys turned back, phases by atan2, each distance by itself.

/// [query head] of the golden layer.
std::vector<QueryCentre> golden_centres() {
  const test::GoldenLayer layer;
  std::vector<QueryCentre> centres;
  for (int h = 0; h < test::GoldenLayer::kQueryHeads; ++h) {
    centres.emplace_back(8);
    // In two parts: a centre does not depend on how queries come.
    centres.back().add({}, layer.query_rows(h).rows(0, 5));
    centres.back().add({}, layer.query_rows(h).rows(5, 32));
  }
  return centres;
}
TokenScores tri_scores(const tri_attention::Policy& policy) {
  const test::GoldenLayer layer;
  const std::vector<QueryCentre> centres = golden_centres();
  TokenScores scores(32);
  for (std::size_t h = 0; h < 2; ++h) {
    tri_attention::add_head(policy, std::span(centres).subspan(2 * h, 2),
                            layer.keys(static_cast<int>(h)), layer.positions, scores);
  }
  return scores;
}
/// A head's scores of tokens 4, 5, 15 and 31, and what 16 tokens keep.
void expect_golden(const tri_attention::Policy& policy,
                   const std::array<std::array<double, 4>, 2>& golden, const KeptLists& kept) {
  const TokenScores scores = tri_scores(policy);
  constexpr std::array<std::size_t, 4> kTokens{4, 5, 15, 31};
  for (std::size_t h = 0; h < 2; ++h) {
    for (std::size_t i = 0; i < 4; ++i) {
      EXPECT_NEAR(scores.scores(static_cast<std::int64_t>(h))[kTokens[i]], golden[h][i], 3e-6)
          << h << ' ' << i;
    }
  }
  EXPECT_EQ(test::lists_of(select_tokens(scores, policy.protection(), uniform_counts(scores, 16))),
            kept);
}

TEST(TriAttention, ScoresByMeanDistanceAsTheReleasedRule) {
  expect_golden({.longest = 16, .normalize = false},
                {{{9.240931, 8.1201, 7.52517, 7.159986}, {5.538741, 4.789309, 7.21344, 6.931273}}},
                {{0, 3, 4, 6, 7, 8, 9, 12, 14, 17, 18, 20, 25, 26, 28, 30},
                 {0, 1, 2, 7, 8, 9, 10, 13, 14, 16, 20, 22, 24, 27, 29, 30}});
}

TEST(TriAttention, ScoresByTheBestDistanceAsTheReleasedRule) {
  expect_golden(
      {.longest = 16, .distances = Combine::kMax, .normalize = false},
      {{{9.343786, 8.228313, 8.142392, 8.153187}, {5.624899, 5.009919, 7.633402, 7.239031}}},
      {{0, 3, 4, 6, 7, 8, 9, 11, 12, 14, 17, 18, 20, 25, 28, 30},
       {0, 1, 2, 7, 8, 9, 10, 13, 14, 16, 20, 22, 24, 27, 29, 30}});
}

TEST(TriAttention, NormalizesOverWhatMayGoAndKeepsThePrompt) {
  expect_golden(
      {.prompt = 6, .longest = 16},
      {{{1.136819, .232352, .289177, -.007517}, {-1.788574, -2.307822, -.628251, -.695837}}},
      {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 17, 18, 25, 28, 30},
       {0, 1, 2, 3, 4, 5, 8, 9, 10, 14, 16, 20, 22, 27, 29, 30}});
}

TEST(TriAttention, TakesTheMeanOfAGroup) {
  expect_golden(
      {.longest = 16, .group = Combine::kMean, .normalize = false},
      {{{8.904709, 6.91308, 7.482313, 7.142509}, {5.038227, 4.597533, 6.908048, 6.590166}}},
      {{0, 3, 4, 6, 7, 8, 9, 11, 14, 15, 18, 20, 25, 26, 28, 30},
       {0, 1, 2, 8, 9, 10, 13, 14, 16, 19, 20, 22, 24, 27, 29, 30}});
}

TEST(TriAttention, HasTheCentreOfItsQueries) {
  const QueryCentre centre = golden_centres()[0];
  EXPECT_EQ(centre.count(), 32);
  EXPECT_NEAR(centre.real(0), -.1640625, 1e-12);
  EXPECT_NEAR(centre.imaginary(0), -.00537109375, 1e-12);
  EXPECT_NEAR(centre.length(0), 1.380565, 1e-6);
  EXPECT_NEAR(centre.length(3), 1.645402, 1e-6);
}

TEST(TriAttention, ReadsCalibratedCentresAndScaledFrequencies) {
  // Pairs m (2, 0) and (0, 1), a 2.5 and 1, k (1, 0) and (.6, .8) before RoPE; frequencies .5 and
  // .125, length 3, position 1, distances 1, 2, 4; by the released rule.
  const std::array<double, 2> frequencies{.5, .125};
  const std::array<double, 2> real{2, 0}, imaginary{0, 1}, lengths{2.5, 1.0};
  for (const RopePairs pairs : {RopePairs::kHalves, RopePairs::kNeighbours}) {
    tri_attention::Policy policy{.longest = 4, .normalize = false};
    policy.rope = {.pairs = pairs, .frequencies = frequencies};
    const QueryCentre centre(real, imaginary, lengths);
    std::array<float, 4> key{};  // turned to position 1
    for (const auto& [i, x, y] : {std::tuple{0, 1.0, 0.0}, std::tuple{1, .6, .8}}) {
      const double angle = frequencies[static_cast<std::size_t>(i)];
      const auto [a, b] = policy.rope.pair(i, 4);
      key[a] = static_cast<float>(x * std::cos(angle) - y * std::sin(angle));
      key[b] = static_cast<float>(y * std::cos(angle) + x * std::sin(angle));
    }
    const std::vector<std::int32_t> stored{1};
    TokenScores scores(3);
    tri_attention::add_head(policy, std::span(&centre, 1), RowView::dense(key.data(), 1, 4), stored,
                            scores);
    policy.distances = Combine::kMax;
    tri_attention::add_head(policy, std::span(&centre, 1), RowView::dense(key.data(), 1, 4), stored,
                            scores);
    EXPECT_NEAR(scores.scores(0)[0], -0.018461, 1e-5);
    EXPECT_NEAR(scores.scores(1)[0], 1.166117, 1e-5);
  }
}

TEST(TriAttention, FollowsPositionsAndNotRows) {
  const test::GoldenLayer layer;
  const std::vector<QueryCentre> centres = golden_centres();
  const tri_attention::Policy policy{.longest = 16, .normalize = false};
  const TokenScores all = tri_scores(policy);
  const std::vector<std::int32_t> stored{2, 9, 30};
  std::vector<float> rows;
  for (const std::int32_t pos : stored) {
    rows.insert(rows.end(), layer.keys(0).row(pos), layer.keys(0).row(pos) + 8);
  }
  TokenScores some(32);
  tri_attention::add_head(policy, std::span(centres).first(2), RowView::dense(rows.data(), 3, 8),
                          stored, some);
  for (std::size_t j = 0; j < 3; ++j) {
    EXPECT_EQ(some.scores(0)[j], all.scores(0)[static_cast<std::size_t>(stored[j])]);
  }
}

TEST(TriAttention, ARowThatIsNotANumberSpoilsNoOther) {
  const test::GoldenLayer layer;
  const std::vector<QueryCentre> centres = golden_centres();
  std::vector<float> rows(layer.keys(0).row(0), layer.keys(0).row(0) + 32 * 8);
  rows[3 * 8 + 1] = std::numeric_limits<float>::quiet_NaN();
  for (const Combine group : {Combine::kMax, Combine::kMean}) {
    TokenScores scores(32);
    tri_attention::add_head({.group = group}, std::span(centres).first(2),
                            RowView::dense(rows.data(), 32, 8), layer.positions, scores);
    for (std::size_t j = 0; j < 32; ++j) EXPECT_EQ(is_finite(scores.scores(0)[j]), j != 3) << j;
  }
}

TEST(TriAttention, CutsAnIntervalBeyondTheBudget) {
  const tri_attention::Policy policy{.budget = 10, .interval = 4};
  EXPECT_FALSE(policy.is_due(13));
  EXPECT_TRUE(policy.is_due(14));
  EXPECT_TRUE(policy.is_due(15));  // a step of several tokens
  EXPECT_EQ(policy.target().most_rows(), 13);
  EXPECT_EQ((tri_attention::Policy{.prompt = 7, .recent = 2}.protection()), (Protection{7, 2}));
}

TEST(TriAttention, SharesTokensAmongLayersByTheirMean) {
  TokenScores model(2);
  for (const auto& [a, b] : {std::pair{1.0F, 2.0F}, std::pair{5.0F, 6.0F}, std::pair{3.0F, 1.0F},
                             std::pair{7.0F, std::numeric_limits<float>::infinity()}}) {
    const auto out = model.add_head();
    out[0] = a;
    out[1] = b;
  }
  TokenScores shared(2);
  tri_attention::add_layer_means(model, 2, shared);
  ASSERT_EQ(shared.num_heads(), 4);
  for (const std::int64_t layer : {0, 1}) {
    EXPECT_EQ(shared.scores(2 * layer)[0], 2.0F);
    EXPECT_EQ(shared.scores(2 * layer)[1], 1.5F);
    EXPECT_EQ(shared.scores(2 * layer + 1)[0], 6.0F);
    EXPECT_FALSE(is_finite(shared.scores(2 * layer + 1)[1]));
  }
  EXPECT_EQ(
      testing::message_of<ConfigError>([&] { tri_attention::add_layer_means(model, 3, shared); }),
      "4 KV heads are not layers of 3");
  const std::vector<std::int32_t> one{1};
  (void)model.add_head(one);
  (void)model.add_head();
  EXPECT_EQ(
      testing::message_of<ConfigError>([&] { tri_attention::add_layer_means(model, 2, shared); }),
      "KV head 0 of layer 2 has stored other tokens than in layer 0");
  EXPECT_EQ(shared.num_heads(), 4);
}

TEST(TriAttention, RefusesCentresThatWereNotFound) {
  using testing::message_of;
  const test::GoldenLayer layer;
  TokenScores scores(32);
  const auto refused = [&](const tri_attention::Policy& policy,
                           const std::vector<QueryCentre>& centres) {
    return message_of<ConfigError>(
        [&] { tri_attention::add_head(policy, centres, layer.keys(0), layer.positions, scores); });
  };
  EXPECT_EQ(refused({}, {}), "a KV head without centres of query heads");
  EXPECT_EQ(refused({}, {QueryCentre(8)}), "a centre of 0 queries of width 8 over keys of width 8");
  const std::array<double, 2> two{1, 1};
  EXPECT_EQ(refused({}, {QueryCentre(two, two, two)}),
            "a centre of 1 queries of width 4 over keys of width 8");
  EXPECT_NE(refused({.longest = 0}, golden_centres()), "");
  EXPECT_EQ(refused({.rope = {.frequencies = two}}, golden_centres()),
            "2 frequencies for a width of 8");
  EXPECT_EQ(scores.num_heads(), 0);
  EXPECT_EQ(message_of<ConfigError>([] { QueryCentre(7); }),
            "a centre is of an even width of at least 2, got 7");
  const std::array<double, 2> bad{1, -1};
  EXPECT_EQ(message_of<ConfigError>([&] { QueryCentre(two, two, bad); }),
            "pair 1: a mean of (1, 1) and a length of -1");
  EXPECT_EQ(message_of<ConfigError>([&] { QueryCentre(two, two, std::span(bad).first(1)); }),
            "a mean of 2 and 2 numbers beside 1 lengths");
}

}  // namespace
}  // namespace headwise
