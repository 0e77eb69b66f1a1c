// SPDX-License-Identifier: MIT
#include "headwise/policies/chunk_kv.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "headwise/policies/knorm.hpp"
#include "headwise/policies/snap_kv.hpp"
#include "support/errors.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using test::GoldenLayer;
using List = std::vector<std::int32_t>;

TEST(ChunkKv, KeepsTheChunksOfKvpress) {
  const GoldenLayer layer;
  const snap_kv::Policy snap{.window = 4, .kernel = 5};
  TokenScores by_attention(32);
  TokenScores by_norm(32);
  for (int h = 0; h < 2; ++h) {
    snap_kv::add_head(snap, layer.queries(h, 28, 32), layer.keys(h), layer.positions, by_attention);
    knorm::add_head(layer.keys(h), layer.positions, by_norm);
  }
  KeptPositions kept;
  chunk_kv::select_chunks({.chunk = 5}, by_attention, snap.protection(), 3, kept);
  const List expected{15, 16, 17, 18, 19, 25, 26, 27, 28, 29, 30, 31};
  EXPECT_EQ(test::lists_of(kept), (test::KeptLists{expected, expected}));
  kept.clear();
  chunk_kv::select_chunks({.chunk = 5}, by_norm, {}, 3, kept);
  List middle(15);
  std::iota(middle.begin(), middle.end(), 15);
  EXPECT_EQ(test::lists_of(kept), (test::KeptLists{middle, middle}));
}

TEST(ChunkKv, ProtectedChunksStayAndThoseThatAreNotFiniteGoFirst) {
  TokenScores scores(7);
  std::ranges::copy(std::vector<float>{1, 1, std::numeric_limits<float>::infinity(), 9, 5, 5, 0},
                    scores.add_head().begin());
  KeptPositions kept;
  chunk_kv::select_chunks({.chunk = 2}, scores, {0, 1}, 2, kept);
  EXPECT_EQ(test::lists_of(kept)[0], (List{4, 5, 6}));
  kept.clear();
  chunk_kv::select_chunks({.chunk = 2}, scores, {1, 1}, 0, kept);
  EXPECT_EQ(test::lists_of(kept)[0], (List{0, 1, 6}));
}

TEST(ChunkKv, RefusesHeadsWithoutCommonChunks) {
  TokenScores scores(7);
  (void)scores.add_head();
  (void)scores.add_head(List{0, 1});
  KeptPositions kept;
  EXPECT_EQ(
      testing::message_of<ConfigError>([&] { chunk_kv::select_chunks({}, scores, {}, 1, kept); }),
      "KV head 1 has stored other tokens than head 0: no common chunks");
  EXPECT_THROW(chunk_kv::select_chunks({.chunk = 0}, scores, {}, 1, kept), ConfigError);
  EXPECT_EQ(kept.num_heads(), 0);
}

}  // namespace
}  // namespace headwise
