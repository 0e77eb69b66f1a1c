// SPDX-License-Identifier: MIT
#include "headwise/heads/decode_target.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "headwise/heads/select_tokens.hpp"
#include "headwise/policies/key_diff.hpp"
#include "headwise/policies/knorm.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using test::GoldenLayer;
using List = std::vector<std::int32_t>;

/// 16 tokens, then 16 steps of one, cut to 12 rows every 4 steps.
template <class AddHead>
List walk(int head, AddHead&& add_head) {
  const GoldenLayer layer;
  const DecodeTarget schedule{.target = 12, .interval = 4};
  List stored(layer.first(16).begin(), layer.first(16).end());
  std::int64_t since_cut = 0;
  std::int64_t most = 0;
  for (std::int32_t pos = 16; pos < 32; ++pos) {
    stored.push_back(pos);
    if (schedule.is_due(std::ssize(stored), ++since_cut, 1)) {
      std::vector<float> rows;
      for (const std::int32_t p : stored) {
        rows.insert(rows.end(), layer.keys(head).row(p), layer.keys(head).row(p) + 8);
      }
      TokenScores scores(pos + 1);
      add_head(RowView::dense(rows.data(), std::ssize(stored), 8), stored, scores);
      const KeptPositions kept = select_tokens(scores, {}, KeepCounts{schedule.target});
      stored.assign(kept.of_head(0).begin(), kept.of_head(0).end());
      since_cut = 0;
    }
    if (pos >= 20) most = std::max(most, static_cast<std::int64_t>(stored.size()));
  }
  EXPECT_EQ(most, schedule.most_rows());
  return stored;
}

TEST(DecodeTarget, CutsAsKvpressWhileDecoding) {
  const auto norms = [](const RowView& k, const List& s, TokenScores& t) {
    knorm::add_head(k, s, t);
  };
  EXPECT_EQ(walk(0, norms), (List{1, 5, 10, 15, 16, 19, 21, 23, 24, 27, 29, 31}));
  EXPECT_EQ(walk(1, norms), (List{2, 4, 5, 6, 7, 15, 17, 18, 23, 25, 28, 31}));
  const auto directions = [](const RowView& k, const List& s, TokenScores& t) {
    key_diff::add_head(k, s, t);
  };
  EXPECT_EQ(walk(0, directions), (List{7, 13, 15, 18, 19, 20, 24, 25, 26, 27, 28, 31}));
  EXPECT_EQ(walk(1, directions), (List{0, 1, 4, 11, 14, 17, 18, 20, 23, 29, 30, 31}));
}

TEST(DecodeTarget, CutsNothingThatIsNoLargerAndALargeStepAtOnce) {
  const DecodeTarget schedule{.target = 100, .interval = 10};
  EXPECT_FALSE(schedule.is_due(100, 50, 1));
  EXPECT_FALSE(schedule.is_due(101, 9, 1));
  EXPECT_TRUE(schedule.is_due(101, 10, 1));
  EXPECT_TRUE(schedule.is_due(150, 0, 100));
  EXPECT_FALSE(schedule.is_due(150, 0, 99));
  EXPECT_EQ(schedule.most_rows(), 109);
  EXPECT_THROW((void)DecodeTarget{.target = 0}.most_rows(), ConfigError);
  EXPECT_THROW((void)DecodeTarget{.interval = 0}.most_rows(), ConfigError);
}

}  // namespace
}  // namespace headwise
