// SPDX-License-Identifier: MIT
#include "headwise/heads/scores.hpp"

#include <gtest/gtest.h>

#include <climits>
#include <limits>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using testing::message_of;

TEST(HeadScores, HoldsUnequalLayers) {
  const HeadScores scores(std::vector<int>{1, 3}, {.5, -.1, 1.2, 0});
  EXPECT_EQ(scores.num_layers(), 2);
  EXPECT_EQ(scores.num_heads(0), 1);
  EXPECT_EQ(scores.num_heads(1), 3);
  EXPECT_EQ(scores.num_heads(), 4U);
  EXPECT_EQ(scores.value(0, 0), .5);
  EXPECT_EQ(scores.value(1, 1), 1.2);
  EXPECT_EQ(scores.row(1).size(), 3U);
  EXPECT_EQ(scores.heads_per_layer(), (std::vector<int>{1, 3}));
}

TEST(HeadScores, TakesFloatsAndDoubles) {
  const HeadScores from_floats = HeadScores::dense(1, 2, std::vector<float>{.25F, .5F});
  EXPECT_EQ(from_floats, HeadScores::dense(1, 2, std::vector<double>{.25, .5}));
}

TEST(HeadScores, RefusesWhatIsNoTable) {
  EXPECT_EQ(message_of<ConfigError>([] { HeadScores(std::vector<int>{}, {}); }),
            "a table of scores needs at least 1 layer, got 0");
  EXPECT_EQ(message_of<ConfigError>([] {
              HeadScores(std::vector<int>{1, 0}, {.5});
            }),
            "layer 1: a table of scores needs at least 1 head, got 0");
  EXPECT_EQ(message_of<ConfigError>([] { HeadScores::dense(2, 2, std::vector<double>(3)); }),
            "got 3 scores for 4 heads");
  EXPECT_EQ(message_of<ConfigError>([] { HeadScores::dense(-1, 2, std::vector<double>(3)); }),
            "num_layers must be in [1, 65536], got -1");
}

TEST(HeadScores, RefusesShapesThatOverflow) {
  const std::vector<double> values(4);
  EXPECT_EQ(message_of<ConfigError>([&] { HeadScores::dense(INT_MAX, 2, values); }),
            "num_layers must be in [1, 65536], got 2147483647");
  EXPECT_EQ(message_of<ConfigError>([&] { HeadScores::dense(2, INT_MAX, values); }),
            "layer 0: at most 65536 heads, got 2147483647");
  EXPECT_EQ(message_of<ConfigError>([&] { QueryHeadScores::dense(1, -8, values); }),
            "layer 0: a table of scores needs at least 1 head, got -8");
}

TEST(HeadScores, HardenedBuildsStopAtALayerOrHeadOutOfRange) {
#if HEADWISE_HARDENED
  const HeadScores scores(std::vector<int>{1, 3}, {.5, -.1, 1.2, 0});
  const QueryHeadScores query(std::vector<int>{1, 3}, {.5, -.1, 1.2, 0});
  for (const int layer : {-1, 2, INT_MAX, INT_MIN}) {
    EXPECT_DEATH((void)scores.num_heads(layer), "layer out of range");
    EXPECT_DEATH((void)scores.row(layer), "layer out of range");
    EXPECT_DEATH((void)scores.value(layer, 0), "layer out of range");
    EXPECT_DEATH((void)query.num_heads(layer), "layer out of range");
  }
  for (const int head : {-1, 1, INT_MAX, INT_MIN}) {
    EXPECT_DEATH((void)scores.value(0, head), "head out of range");
    EXPECT_DEATH((void)query.value(0, head), "head out of range");
  }
#else
  GTEST_SKIP() << "release builds do not check";
#endif
}

TEST(HeadScores, RefusesNanAndInfinityWithTheirHead) {
  std::vector<double> values(6, .5);
  values[4] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(message_of<ConfigError>([&] { HeadScores::dense(2, 3, values); }),
            "layer 1, head 1: a score must be finite, got nan");
  values[4] = -std::numeric_limits<double>::infinity();
  EXPECT_EQ(message_of<ConfigError>([&] { HeadScores::dense(2, 3, values); }),
            "layer 1, head 1: a score must be finite, got -inf");
}

TEST(CheckShape, AcceptsTheModelsOwn) {
  const ModelShape shape = ModelShape::uniform(2, 8, 2, 64);
  check_shape(HeadScores::dense(2, 2, std::vector<double>(4)), shape);
  check_shape(QueryHeadScores::dense(2, 8, std::vector<double>(16)), shape);
}

TEST(CheckShape, TellsQueryHeadsFromKvHeads) {
  const ModelShape shape = ModelShape::uniform(2, 8, 2, 64);
  const HeadScores scores = HeadScores::dense(2, 8, std::vector<double>(16));
  EXPECT_EQ(message_of<ConfigError>([&] { check_shape(scores, shape, "a.tsv"); }),
            "a.tsv: layer 0 has 8 values, one for each query head, but the model has 2 KV heads: "
            "read them as QueryHeadScores and use reduce_max(scores, 4)");
}

TEST(CheckShape, RefusesAnotherModel) {
  const ModelShape shape = ModelShape::uniform(2, 8, 2, 64);
  EXPECT_EQ(message_of<ConfigError>([&] {
              check_shape(HeadScores::dense(3, 2, std::vector<double>(6)), shape, "a.tsv");
            }),
            "a.tsv: 3 layers, the model has 2");
  EXPECT_EQ(message_of<ConfigError>([&] {
              check_shape(HeadScores::dense(2, 3, std::vector<double>(6)), shape, "a.tsv");
            }),
            "a.tsv: layer 0 has 3 values, the model has 2 KV heads");
  EXPECT_EQ(message_of<ConfigError>([&] {
              check_shape(QueryHeadScores::dense(2, 2, std::vector<double>(4)), shape, "a.json");
            }),
            "a.json: layer 0 has 2 values, the model has 8 query heads");
}

TEST(Reduce, TakesTheBestOrTheMeanOfEachContiguousGroup) {
  const QueryHeadScores scores =
      QueryHeadScores::dense(2, 4, std::vector<double>{1, 3, 5, 5, -2, -4, 0, 8});
  EXPECT_EQ(reduce_max(scores, 2), HeadScores::dense(2, 2, std::vector<double>{3, 5, -2, 8}));
  EXPECT_EQ(reduce_mean(scores, 2), HeadScores::dense(2, 2, std::vector<double>{2, 5, -3, 4}));
  EXPECT_EQ(reduce_max(scores, 4), HeadScores::dense(2, 1, std::vector<double>{5, 8}));
  EXPECT_EQ(reduce_mean(scores, 1).num_heads(), 8U);
}

TEST(Reduce, TakesTheGroupsOfAModelsLayers) {
  const ModelShape shape({{1, 2, 16, 16}, {2, 3, 16, 16}});
  const std::vector<int> heads{2, 6};
  const std::vector<int> kv_heads{1, 2};
  EXPECT_EQ(reduce_max(QueryHeadScores(heads, {1, 3, 5, 2, 4, -7, -8, -9}), shape),
            HeadScores(kv_heads, {3, 5, -7}));
  EXPECT_EQ(message_of<ConfigError>([&] {
              (void)reduce_max(QueryHeadScores(kv_heads, {1, 2, 3}), shape);
            }),
            "scores: layer 0 has 1 values, the model has 2 query heads");
}

TEST(Reduce, RefusesAGroupThatDoesNotDivide) {
  const QueryHeadScores scores = QueryHeadScores::dense(1, 4, std::vector<double>(4));
  EXPECT_EQ(message_of<ConfigError>([&] { (void)reduce_max(scores, 3); }),
            "layer 0: group_size 3 does not divide 4 query heads");
  EXPECT_EQ(message_of<ConfigError>([&] { (void)reduce_mean(scores, 0); }),
            "group_size must be at least 1, got 0");
}

}  // namespace
}  // namespace headwise
