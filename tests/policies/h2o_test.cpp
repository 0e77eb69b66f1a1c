// SPDX-License-Identifier: MIT
#include "headwise/policies/h2o.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "headwise/heads/select_tokens.hpp"
#include "support/errors.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using test::GoldenLayer;
using test::KeptLists;
using List = std::vector<std::int32_t>;

/// One head of a sequence of 24 prompt tokens, cut to heavy 6 and recent 4 after the prompt and
/// after each of 6 steps.
struct Walk {
  /// @param query_head  of the group; -1: all of it
  Walk(int head, int query_head) {
    const GoldenLayer layer;
    const h2o::Policy policy{.heavy = 6, .recent = 4};
    List stored(layer.first(24).begin(), layer.first(24).end());
    for (std::int64_t length = 24; length <= 30; ++length) {
      const std::int64_t first = length == 24 ? 0 : length - 1;
      if (length > 24) stored.push_back(static_cast<std::int32_t>(length - 1));
      std::vector<float> rows;
      for (const std::int32_t pos : stored) {
        rows.insert(rows.end(), layer.keys(head).row(pos), layer.keys(head).row(pos) + 8);
      }
      ObservedQueries queries = layer.queries(head, first, length);
      if (query_head >= 0) {
        queries.q.data = queries.q.row(0, query_head);
        queries.group_size = 1;
      }
      sums.add(queries, RowView::dense(rows.data(), std::ssize(stored), 8), stored);
      TokenScores scores(length);
      sums.add_head(scores);
      const KeptPositions kept =
          select_tokens(scores, policy.protection(), uniform_counts(scores, policy.count()));
      stored.assign(kept.of_head(0).begin(), kept.of_head(0).end());
      sums.keep(stored);
      steps.push_back(stored);
    }
  }
  h2o::Sums sums;
  std::vector<List> steps;
};

TEST(H2o, AccumulatesAndEvictsAsTheReleasedCode) {
  const auto golden = test::golden("h2o_original_per_query_head");
  for (int query_head = 0; query_head < 4; ++query_head) {
    const Walk walk(query_head / 2, query_head % 2);
    if (query_head == 0) {
      EXPECT_EQ(walk.steps.back(), (List{0, 1, 3, 4, 5, 6, 26, 27, 28, 29}));
      EXPECT_NEAR(walk.sums.sums()[0], 3.916344, 2e-6);
      EXPECT_NEAR(walk.sums.sums()[1], 2.585823, 2e-6);
    }
    if (golden.empty()) continue;
    const auto at = static_cast<std::size_t>(query_head);
    EXPECT_EQ(walk.steps.front(), golden.at("after_prefill").at(at).get<List>());
    EXPECT_EQ(walk.steps.back(), golden.at("at_end").at(at).get<List>());
    for (std::size_t j = 0; j < 10; ++j) {
      EXPECT_NEAR(walk.sums.sums()[j], golden.at("sums_at_end").at(at).at(j).get<double>(), 3e-6);
    }
  }
}

TEST(H2o, TakesTheMeanOfAGroup) {
  const Walk first(0, -1);
  const Walk second(1, -1);
  EXPECT_EQ(first.steps.back(), (List{0, 1, 2, 3, 4, 5, 26, 27, 28, 29}));
  EXPECT_EQ(second.steps.back(), (List{0, 1, 2, 4, 6, 8, 26, 27, 28, 29}));
  EXPECT_NEAR(first.sums.sums()[0], 4.111137, 3e-6);
  EXPECT_NEAR(second.sums.sums()[0], 5.401048, 3e-6);
}

TokenScores prompt_scores(bool means) {
  const GoldenLayer layer;
  TokenScores scores(32);
  for (int h = 0; h < 2; ++h) {
    h2o::Sums sums;
    // In unequal chunks: sums do not depend on how a prompt is cut.
    for (const auto& [first, last] : {std::pair{0, 1}, std::pair{1, 20}, std::pair{20, 32}}) {
      sums.add(layer.queries(h, first, last), layer.keys(h).rows(0, last), layer.first(last));
    }
    means ? sums.add_head_of_means(scores) : sums.add_head(scores);
  }
  return scores;
}

TEST(H2o, ScoresAPromptAsKvCacheFactoryAndKvpress) {
  const TokenScores sums = prompt_scores(false);
  EXPECT_EQ(test::lists_of(select_tokens(sums, {0, 4}, uniform_counts(sums, 16))),
            (KeptLists{{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 14, 28, 29, 30, 31},
                       {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 28, 29, 30, 31}}));
  const TokenScores means = prompt_scores(true);
  test::expect_scores("observed_attention", means);
  EXPECT_EQ(test::lists_of(select_tokens(means, {}, uniform_counts(means, 16))),
            (KeptLists{{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 17, 18},
                       {0, 1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 14, 21, 22, 30}}));
}

TEST(H2o, RefusesRowsThatItDoesNotKnow) {
  const GoldenLayer layer;
  h2o::Sums sums;
  sums.add(layer.queries(0, 0, 8), layer.keys(0).rows(0, 8), layer.first(8));
  const List other{0, 2, 3};
  EXPECT_EQ(testing::message_of<ConfigError>(
                [&] { sums.add(layer.queries(0, 8, 9), layer.keys(0).rows(0, 3), other); }),
            "sums of 8 tokens do not go with 3 stored ones: was keep() forgotten?");
  sums.keep(other);
  EXPECT_EQ(sums.sums().size(), 3U);
  sums.forget(3);
  EXPECT_EQ(sums.sums().size(), 2U);
}

}  // namespace
}  // namespace headwise
