// SPDX-License-Identifier: MIT
#include "headwise/policies/key_diff.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "headwise/heads/select_tokens.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using test::GoldenLayer;
using test::KeptLists;
using List = std::vector<std::int32_t>;

TEST(KeyDiff, ScoresAndKeepsAsKvpress) {
  const GoldenLayer layer;
  TokenScores scores(32);
  for (int h = 0; h < 2; ++h) key_diff::add_head(layer.keys(h), layer.positions, scores);
  EXPECT_NEAR(scores.scores(0)[15], -0.09172, 1e-6);
  test::expect_scores("keydiff", scores);
  EXPECT_EQ(test::lists_of(select_tokens(scores, {}, uniform_counts(scores, 16))),
            (KeptLists{{1, 2, 6, 9, 13, 14, 15, 16, 18, 19, 20, 23, 24, 25, 28, 31},
                       {0, 1, 4, 8, 11, 12, 14, 17, 18, 20, 21, 22, 26, 27, 29, 31}}));
}

/// The paper's streaming prefill: what is kept so far and the next block, cut again and again.
TEST(KeyDiff, KeepsOtherTokensBlockByBlock) {
  const GoldenLayer layer;
  const KeptLists expected{{2, 8, 9, 10, 14, 15, 16, 18, 19, 20, 21, 23, 25, 28, 30, 31},
                           {0, 4, 8, 9, 11, 12, 14, 17, 18, 20, 21, 22, 24, 27, 29, 31}};
  for (int h = 0; h < 2; ++h) {
    List stored(layer.first(16).begin(), layer.first(16).end());
    for (std::int32_t block = 16; block < 32; block += 8) {
      for (std::int32_t pos = block; pos < block + 8; ++pos) stored.push_back(pos);
      std::vector<float> rows;
      for (const std::int32_t pos : stored) {
        rows.insert(rows.end(), layer.keys(h).row(pos), layer.keys(h).row(pos) + 8);
      }
      TokenScores scores(block + 8);
      key_diff::add_head(RowView::dense(rows.data(), std::ssize(stored), 8), stored, scores);
      const KeptPositions kept = select_tokens(scores, {}, KeepCounts{16});
      stored.assign(kept.of_head(0).begin(), kept.of_head(0).end());
    }
    EXPECT_EQ(stored, expected[static_cast<std::size_t>(h)]);
  }
}

TEST(KeyDiff, AKeyWithoutADirectionScoresZeroAndOneThatIsNotFiniteGoes) {
  std::vector<float> rows(4 * 8, 0.0F);
  rows[0] = 1.0F;
  rows[8] = 2.0F;
  rows[16] = std::numeric_limits<float>::quiet_NaN();
  const List stored{0, 1, 2, 3};
  TokenScores scores(4);
  key_diff::add_head(RowView::dense(rows.data(), 4, 8), stored, scores);
  EXPECT_NEAR(scores.scores(0)[0], -1.0F, 1e-6);
  EXPECT_NEAR(scores.scores(0)[1], -1.0F, 1e-6);
  EXPECT_EQ(scores.scores(0)[3], 0.0F);
  EXPECT_EQ(scores.order(0, {}).back(), 2);
}

}  // namespace
}  // namespace headwise
