// SPDX-License-Identifier: MIT
#include "headwise/policies/kv_crush.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "headwise/heads/select_tokens.hpp"
#include "headwise/policies/ada_kv.hpp"
#include "headwise/policies/snap_kv.hpp"
#include "support/errors.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using kv_crush::Anchor;
using test::KeptLists;
using Tokens = std::vector<std::int32_t>;

TokenScores scored_heads(std::int64_t length, const std::vector<std::vector<float>>& heads) {
  TokenScores scores(length);
  for (const auto& head : heads) std::ranges::copy(head, scores.add_head().begin());
  return scores;
}
KeptLists with_representatives(const kv_crush::Policy& policy, const TokenScores& scores,
                               const Protection& protection, const KeptPositions& chosen,
                               std::int64_t num_blocks) {
  KeptPositions kept;
  kv_crush::add_representatives(policy, scores, protection, chosen, num_blocks, kept);
  return test::lists_of(kept);
}

// policies-more, section 4: blocks 1010 0101 0000 1111, all dropped, two stay.
TEST(KvCrush, KeepsTheRepresentativesOfOpenVino) {
  const TokenScores scores = scored_heads(16, {{.9F, .1F, .8F, .2F, .3F, .7F, .05F, .6F, .01F, .02F,
                                                .03F, .04F, .5F, .55F, .45F, .4F}});
  const KeptPositions none = select_tokens(scores, {}, uniform_counts(scores, 0));
  const auto blocks = [&](Anchor anchor) {
    std::set<std::int32_t> ids;
    const auto kept = with_representatives({.block = 4, .anchor = anchor}, scores, {}, none, 2)[0];
    for (const std::int32_t position : kept) ids.insert(position / 4);
    EXPECT_EQ(kept.size(), 8U);
    EXPECT_TRUE(std::ranges::is_sorted(kept));
    return ids;
  };
  EXPECT_EQ(blocks(Anchor::kZeros), (std::set<std::int32_t>{1, 2}));
  EXPECT_EQ(blocks(Anchor::kOnes), (std::set<std::int32_t>{1, 3}));
  EXPECT_EQ(blocks(Anchor::kAlternating), (std::set<std::int32_t>{1, 3}));
  EXPECT_EQ(blocks(Anchor::kMean), blocks(Anchor::kZeros));  // exactly half is not more than half
  EXPECT_EQ(blocks(Anchor::kInverseMean), blocks(Anchor::kOnes));
}

/// By hand: upper halves {0, 1, 2, 3} and {1, 3, 5, 7}, so tokens 10 11 10 11 00 01 00 01.
TokenScores two_heads() {
  return scored_heads(8, {{8, 7, 6, 5, 4, 3, 2, 1}, {1, 8, 2, 7, 3, 6, 4, 5}});
}

TEST(KvCrush, HasABitAKvHeadAndEachHeadsOwnCandidates) {
  const TokenScores scores = two_heads();
  const KeptPositions chosen = select_tokens(scores, {}, uniform_counts(scores, 2));
  ASSERT_EQ(test::lists_of(chosen), (KeptLists{{0, 1}, {1, 3}}));
  // To 11: head 0 has 3 | 2 5 7 | 4 6, head 1 has 0 2 5 7 | 4 6; every third of them.
  EXPECT_EQ(with_representatives({.anchor = Anchor::kOnes}, scores, {}, chosen, 2),
            (KeptLists{{0, 1, 3, 7}, {0, 1, 3, 7}}));
  // To 01: head 0 has 5 7 | 3 4 6 | 2, head 1 has 5 7 | 4 6 | 0 2.
  EXPECT_EQ(with_representatives({.anchor = Anchor::kAlternating}, scores, {}, chosen, 3),
            (KeptLists{{0, 1, 3, 5, 6}, {0, 1, 3, 4, 5}}));
  // Nothing is taken twice, however many stay.
  for (std::int64_t n = 0; n <= 6; ++n) {
    for (const Tokens& head : with_representatives({}, scores, {}, chosen, n)) {
      EXPECT_EQ(std::set<std::int32_t>(head.begin(), head.end()).size(),
                static_cast<std::size_t>(2 + n));
    }
  }
}

TEST(KvCrush, LeavesTheChoiceWhereFewerWereDropped) {
  const TokenScores scores = two_heads();
  const KeptPositions chosen = select_tokens(scores, {}, uniform_counts(scores, 2));
  EXPECT_EQ(with_representatives({}, scores, {}, chosen, 7), test::lists_of(chosen));
  EXPECT_EQ(with_representatives({}, scores, {}, chosen, 0), test::lists_of(chosen));
}

TEST(KvCrush, RanksUnprotectedTokensOnly) {
  // Unprotected 1..6; a protected one with the highest score takes no place in the upper half.
  const TokenScores scores = scored_heads(8, {{9, 1, 2, 3, 4, 5, 6, 9}});
  const Protection ends{1, 1};
  const KeptPositions chosen = select_tokens(scores, ends, uniform_counts(scores, 2));
  ASSERT_EQ(test::lists_of(chosen), (KeptLists{{0, 7}}));
  // 4 5 6 are 1, to 1: 4 5 6 | 1 2 3.
  EXPECT_EQ(with_representatives({.anchor = Anchor::kOnes}, scores, ends, chosen, 2),
            (KeptLists{{0, 1, 4, 7}}));
  // Two blocks have a protected or chosen token, and are not taken again.
  EXPECT_EQ(with_representatives({.block = 2, .anchor = Anchor::kOnes}, scores, ends, chosen, 2),
            (KeptLists{{0, 2, 3, 4, 5, 7}}));
}

TEST(KvCrush, TakesWhatIsNotFiniteForTheLeast) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const TokenScores scores = scored_heads(4, {{inf, nan, 1, 2}});
  const KeptPositions none = select_tokens(scores, {}, uniform_counts(scores, 0));
  EXPECT_EQ(with_representatives({.anchor = Anchor::kOnes}, scores, {}, none, 1), (KeptLists{{2}}));
}

TEST(KvCrush, FollowsPositionsWhereHeadsHaveStoredDifferentTokens) {
  TokenScores scores(10);
  std::ranges::copy(std::vector<float>{4, 3, 2, 1}, scores.add_head(Tokens{0, 3, 6, 9}).begin());
  std::ranges::copy(std::vector<float>{1, 2, 3, 4}, scores.add_head(Tokens{0, 1, 3, 9}).begin());
  const KeptPositions none = select_tokens(scores, {}, uniform_counts(scores, 0));
  // 0: 10, 1: -0, 3: 11, 6: 0-, 9: 01. To 11: 3 | 0 9 | 6, and 3 | 0 9 | 1.
  EXPECT_EQ(with_representatives({.anchor = Anchor::kOnes}, scores, {}, none, 2),
            (KeptLists{{3, 9}, {3, 9}}));
  // Blocks of 4 hold what is stored of them.
  EXPECT_EQ(with_representatives({.block = 4, .anchor = Anchor::kOnes}, scores, {}, none, 1),
            (KeptLists{{0, 3}, {0, 1, 3}}));
  EXPECT_EQ(with_representatives({.block = kMaxTokens}, scores, {}, none, 1),
            (KeptLists{{0, 3, 6, 9}, {0, 1, 3, 9}}));
}

TEST(KvCrush, IsTheSameForTheSameSeed) {
  const test::GoldenLayer layer;
  TokenScores scores(32);
  for (int h = 0; h < 2; ++h) {
    snap_kv::add_head({.window = 4}, layer.queries(h, 28, 32), layer.keys(h), layer.positions,
                      scores);
  }
  // Heads that keep the same tokens get the same representatives.
  KeptPositions same;
  same.add_head(Tokens{0, 28, 29, 30, 31});
  same.add_head(Tokens{0, 28, 29, 30, 31});
  std::set<KeptLists> seen;
  for (std::uint64_t seed = 0; seed < 16; ++seed) {
    const kv_crush::Policy policy{.block = 2, .seed = seed};
    const KeptLists kept = with_representatives(policy, scores, {0, 4}, same, 3);
    EXPECT_EQ(kept, with_representatives(policy, scores, {0, 4}, same, 3));
    EXPECT_EQ(kept[0], kept[1]);
    seen.insert(kept);
  }
  EXPECT_GT(seen.size(), 1U);
}

TEST(KvCrush, ComposesWithScorerAndAllocator) {
  const test::GoldenLayer layer;
  const snap_kv::Policy snap{.window = 4};
  TokenScores scores(32);
  for (int h = 0; h < 2; ++h) {
    snap_kv::add_head(snap, layer.queries(h, 28, 32), layer.keys(h), layer.positions, scores);
  }
  const kv_crush::Policy crush;
  EXPECT_EQ(crush.num_blocks(16), 4);
  EXPECT_EQ(crush.by_score(16), 12);
  KeptPositions chosen;
  KeptPositions kept;
  kept.add_head(Tokens{5});  // of a layer before
  select_tokens(scores, snap.protection(),
                ada_kv::Policy{}.counts(scores, snap.protection(), crush.by_score(16)), chosen);
  kv_crush::add_representatives(crush, scores, snap.protection(), chosen, crush.num_blocks(16),
                                kept);
  ASSERT_EQ(kept.num_heads(), 3);
  EXPECT_EQ(kept.num_positions(), 1 + 2 * 16);
  for (std::int64_t h = 0; h < 2; ++h) {
    EXPECT_TRUE(std::ranges::includes(kept.of_head(h + 1), chosen.of_head(h)));
  }
  // The port's 320 tokens: a quarter in blocks of 16.
  const kv_crush::Policy port{.block = 16};
  EXPECT_EQ(port.num_blocks(320), 5);
  EXPECT_EQ(port.by_score(320), 240);
  EXPECT_EQ(port.by_score(50), 50);  // no block fits: all are the scorer's
}

TEST(KvCrush, RefusesWhatDoesNotGoTogether) {
  using testing::message_of;
  const TokenScores scores = two_heads();
  KeptPositions chosen;
  chosen.add_head(Tokens{0, 1});
  KeptPositions kept;
  const auto refused = [&](const kv_crush::Policy& policy, std::int64_t num_blocks) {
    return message_of<ConfigError>(
        [&] { kv_crush::add_representatives(policy, scores, {}, chosen, num_blocks, kept); });
  };
  EXPECT_EQ(refused({}, 1), "scores of 2 KV heads, and a choice of 1");
  chosen.add_head(Tokens{1, 8});
  EXPECT_EQ(refused({}, 1), "KV head 1: what was chosen is not all stored, or not ascending");
  chosen.clear();
  chosen.add_head(Tokens{0});
  chosen.add_head(Tokens{0});
  EXPECT_THAT(refused({}, -1), ::testing::HasSubstr("-1"));
  EXPECT_THAT(refused({.block = 0}, 1), ::testing::HasSubstr("block"));
  EXPECT_EQ(refused({.share = 1.0}, 1), "a share of representatives must be in [0, 1), got 1");
  EXPECT_EQ(kept.num_heads(), 0);
}

}  // namespace
}  // namespace headwise
