// SPDX-License-Identifier: MIT
#include "headwise/policies/tova.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "headwise/heads/select_tokens.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using test::GoldenLayer;
using test::KeptLists;

TEST(Tova, ScoresAndKeepsAsKvpress) {
  const GoldenLayer layer;
  const std::array queries{layer.queries(0, 31, 32), layer.queries(1, 31, 32)};
  const std::array keys{layer.keys(0), layer.keys(1)};
  TokenScores scores(32);
  tova::add_layer(queries, keys, layer.positions, scores);
  const tova::Policy policy;
  test::expect_scores("tova", scores, policy.protection());
  const std::vector<std::int32_t> expected{1,  5,  9,  12, 14, 15, 16, 17,
                                           18, 19, 20, 21, 22, 28, 30, 31};
  EXPECT_EQ(test::lists_of(select_tokens(scores, policy.protection(), uniform_counts(scores, 16))),
            (KeptLists{expected, expected}));
}

/// The released code: after the prompt and after every step, 16 tokens, the newest competing.
TEST(Tova, DropsTheNewestTokenInItsOwnStepAsTheReleasedCode) {
  const GoldenLayer layer;
  const tova::Policy policy{.newest_competes = true};
  std::vector<std::int32_t> stored(layer.first(24).begin(), layer.first(24).end());
  std::vector<std::int32_t> dropped_at_once;
  for (std::int32_t length = 24; length <= 32; ++length) {
    if (length > 24) stored.push_back(length - 1);
    std::array<std::vector<float>, 2> rows;
    std::array<RowView, 2> keys;
    std::array<ObservedQueries, 2> queries;
    for (int h = 0; h < 2; ++h) {
      const auto at = static_cast<std::size_t>(h);
      for (const std::int32_t pos : stored) {
        rows[at].insert(rows[at].end(), layer.keys(h).row(pos), layer.keys(h).row(pos) + 8);
      }
      keys[at] = RowView::dense(rows[at].data(), std::ssize(stored), 8);
      queries[at] = layer.queries(h, length - 1, length);
    }
    TokenScores scores(length);
    tova::add_layer(queries, keys, stored, scores);
    const KeptPositions kept =
        select_tokens(scores, policy.protection(), uniform_counts(scores, 16));
    stored.assign(kept.of_head(0).begin(), kept.of_head(0).end());
    if (length == 24) {
      EXPECT_EQ(stored, (std::vector<std::int32_t>{1, 2, 3, 6, 7, 8, 10, 11, 13, 14, 17, 18, 19, 20,
                                                   21, 22}));
    } else if (stored.back() != length - 1) {
      dropped_at_once.push_back(length - 1);
    }
  }
  EXPECT_EQ(dropped_at_once, (std::vector<std::int32_t>{27}));
  EXPECT_EQ(stored,
            (std::vector<std::int32_t>{1, 2, 3, 7, 8, 10, 11, 14, 17, 19, 22, 25, 26, 29, 30, 31}));
}

}  // namespace
}  // namespace headwise
