// SPDX-License-Identifier: MIT
#include "headwise/heads/shard.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "headwise/heads/select.hpp"
#include "headwise/heads/share.hpp"
#include "headwise/heads/tsv.hpp"
#include "support/errors.hpp"
#include "support/published.hpp"

namespace headwise {
namespace {

using testing::message_of;
using testing::published;

constexpr KeepWindow kStreaming{{64, 256}};

/// Head `h` of layer `l` keeps a window of 100 l + h + 1.
HeadPlan numbered_plan(const std::vector<int>& heads) {
  HeadPlan plan(heads);
  for (int layer = 0; layer < plan.num_layers(); ++layer) {
    for (int head = 0; head < plan.num_kv_heads(layer); ++head) {
      plan.set(layer, head, KeepWindow{{0, 100 * layer + head + 1}});
    }
  }
  return plan;
}

template <class T>
std::vector<T> copy(std::span<const T> list) {
  return {list.begin(), list.end()};
}

/// Retrieval heads of each rank, in one layer or (-1) in all.
std::vector<int> retrieval_heads(const Sharding& sharding, const HeadPlan& plan, int layer = -1) {
  std::vector<int> count(static_cast<std::size_t>(sharding.num_ranks()), 0);
  for (int rank = 0; rank < sharding.num_ranks(); ++rank) {
    for (int l = 0; l < sharding.num_layers(); ++l) {
      if (layer >= 0 && l != layer) continue;
      for (const int head : sharding.kv_heads(l, rank)) {
        count[static_cast<std::size_t>(rank)] += is_retrieval(plan.budget(l, head)) ? 1 : 0;
      }
    }
  }
  return count;
}
int spread(const std::vector<int>& counts) {
  const auto [least, most] = std::minmax_element(counts.begin(), counts.end());
  return *most - *least;
}

/// Every head is on num_copies ranks, never twice on one, and all ranks have equally many.
void expect_shares_all(const Sharding& sharding, const HeadPlan& plan) {
  ASSERT_EQ(sharding.num_layers(), plan.num_layers());
  for (int l = 0; l < plan.num_layers(); ++l) {
    std::vector<int> holders(static_cast<std::size_t>(plan.num_kv_heads(l)), 0);
    std::vector<int> all;
    for (int rank = 0; rank < sharding.num_ranks(); ++rank) {
      const auto mine = sharding.kv_heads(l, rank);
      ASSERT_EQ(mine.size(), sharding.kv_heads(l, 0).size());
      ASSERT_TRUE(std::is_sorted(mine.begin(), mine.end()));
      ASSERT_EQ(std::adjacent_find(mine.begin(), mine.end()), mine.end());
      for (const int head : mine) ++holders.at(static_cast<std::size_t>(head));
      all.insert(all.end(), mine.begin(), mine.end());
    }
    ASSERT_EQ(copy(sharding.kv_heads(l)), all);
    for (const int count : holders) ASSERT_EQ(count, sharding.num_copies(l));
  }
}

TEST(Shard, WithoutCostsCutsTheColumnsOfEveryLayer) {
  const HeadPlan plan = numbered_plan({8, 4});
  const Sharding sharding = shard(plan, 2);
  EXPECT_EQ(copy(sharding.kv_heads(0, 1)), (std::vector<int>{4, 5, 6, 7}));
  EXPECT_EQ(copy(sharding.kv_heads(1, 0)), (std::vector<int>{0, 1}));
  const HeadPlan part = sharding.plan(plan, 1);
  EXPECT_EQ(part.num_layers(), 2);
  EXPECT_EQ(part.num_kv_heads(0), 4);
  EXPECT_EQ(part.num_kv_heads(1), 2);
  EXPECT_EQ(part.budget(0, 0), plan.budget(0, 4));
  EXPECT_EQ(part.budget(0, 3), plan.budget(0, 7));
  EXPECT_EQ(part.budget(1, 1), plan.budget(1, 3));
  EXPECT_EQ(shard(plan, 1).plan(plan, 0), plan);
  for (const int ranks : {1, 2, 4}) {
    const Sharding in_order = shard(plan, ranks);
    expect_shares_all(in_order, plan);
    for (int l = 0; l < 2; ++l) {
      const auto heads = in_order.kv_heads(l);
      EXPECT_TRUE(std::is_sorted(heads.begin(), heads.end()));
    }
  }
}

TEST(Shard, DealsCostsEvenlyAndSaysWhatTheOrderWouldHaveCost) {
  // All retrieval heads lie in the first half of either layer.
  HeadPlan plan(std::vector<int>{4, 4}, kStreaming);
  for (const int l : {0, 1}) {
    for (const int h : {0, 1}) plan.set(l, h, KeepEverything{});
  }
  const Sharding sharding = shard(plan, 2, rows_kept(plan, 3200));
  expect_shares_all(sharding, plan);
  EXPECT_EQ(copy(sharding.costs_in_order()), (std::vector<std::int64_t>{12800, 1280}));
  EXPECT_EQ(copy(sharding.costs()), (std::vector<std::int64_t>{7040, 7040}));
  EXPECT_DOUBLE_EQ(sharding.imbalance_in_order(), 12800.0 / 7040.0);
  EXPECT_DOUBLE_EQ(sharding.imbalance(), 1.0);
  EXPECT_EQ(retrieval_heads(sharding, plan, 0), (std::vector<int>{1, 1}));
}

TEST(Shard, RetrievalHeadsDifferByOneAtMostInEveryLayerAndInAll) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    const int ranks = 1 << (random() % 4);
    std::vector<int> heads;
    for (int l = 0; l < 12; ++l) heads.push_back(ranks * static_cast<int>(1 + random() % 3));
    HeadPlan plan(heads, kStreaming);
    for (int l = 0; l < 12; ++l) {
      for (int h = 0; h < heads[static_cast<std::size_t>(l)]; ++h) {
        if (random() % 3 == 0) plan.set(l, h, KeepEverything{});
      }
    }
    const Sharding sharding = shard(plan, ranks, rows_kept(plan, 100000));
    expect_shares_all(sharding, plan);
    EXPECT_LE(spread(retrieval_heads(sharding, plan)), 1);
    for (int l = 0; l < 12; ++l) EXPECT_LE(spread(retrieval_heads(sharding, plan, l)), 1);
    EXPECT_LE(sharding.imbalance(), sharding.imbalance_in_order());
  }
}

TEST(Shard, CostsOfRanksAreThoseOfTheirHeads) {
  std::mt19937 random(2);
  for (int round = 0; round < 100; ++round) {
    const std::vector<int> heads{8, 16, 4, 8};
    const HeadPlan plan = numbered_plan(heads);
    std::vector<std::int64_t> costs(plan.num_heads());
    for (std::int64_t& cost : costs) cost = static_cast<std::int64_t>(random() % 1000);
    const Sharding sharding = shard(plan, 4, costs);
    expect_shares_all(sharding, plan);
    const std::vector<std::int64_t> firsts{0, 8, 24, 28};
    for (int rank = 0; rank < 4; ++rank) {
      std::int64_t sum = 0;
      for (int l = 0; l < 4; ++l) {
        for (const int head : sharding.kv_heads(l, rank)) {
          sum += costs[static_cast<std::size_t>(firsts[static_cast<std::size_t>(l)] + head)];
        }
      }
      EXPECT_EQ(sharding.costs()[static_cast<std::size_t>(rank)], sum);
    }
    // No rank is further from another than one head of each kind: here, the costliest.
    const auto [least, most] =
        std::minmax_element(sharding.costs().begin(), sharding.costs().end());
    EXPECT_LE(*most - *least, 4 * 1000);
  }
}

TEST(Shard, QueryHeadsGoWithTheirKvHead) {
  HeadPlan plan(std::vector<int>{4}, kStreaming);
  plan.set(0, 0, KeepEverything{});
  plan.set(0, 1, KeepEverything{});
  const Sharding sharding = shard(plan, 2, rows_kept(plan, 10000));
  EXPECT_EQ(copy(sharding.kv_heads(0)), (std::vector<int>{0, 2, 1, 3}));
  EXPECT_EQ(sharding.query_heads(0, 3), (std::vector<int>{0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11}));
}

TEST(Shard, FewerKvHeadsThanRanksAreOnSeveralWhichShareTheirQueryHeads) {
  HeadPlan plan(std::vector<int>{2, 8}, kStreaming);
  plan.set(0, 1, KeepEverything{});
  const ModelShape shape({{2, 8, 64, 64}, {8, 2, 64, 64}});
  const Sharding sharding = shard(plan, 4, rows_kept(plan, 10000));
  expect_shares_all(sharding, plan);
  EXPECT_EQ(sharding.num_copies(0), 2);
  EXPECT_EQ(sharding.num_copies(1), 1);
  // Each rank has one KV head of layer 0 and 4 of its 8 query heads, each of them once.
  std::vector<int> queries = sharding.query_heads(0, 8);
  ASSERT_EQ(queries.size(), 16U);
  for (std::size_t i = 0; i < queries.size(); ++i) {
    EXPECT_EQ(queries[i] / 8, sharding.kv_heads(0)[i / 4]);
  }
  std::sort(queries.begin(), queries.end());
  std::vector<int> all(16);
  std::iota(all.begin(), all.end(), 0);
  EXPECT_EQ(queries, all);
  const ModelShape part = sharding.shape(shape, 0);
  EXPECT_EQ(part, ModelShape({{1, 4, 64, 64}, {2, 2, 64, 64}}));
  EXPECT_EQ(sharding.plan(plan, 0).num_kv_heads(0), 1);

  const Sharding in_order = shard(plan, 4);
  EXPECT_EQ(copy(in_order.kv_heads(0)), (std::vector<int>{0, 0, 1, 1}));
}

TEST(Shard, TakesNoLongerForEachRankWhereRanksAreMany) {  // minutes where it does
  const HeadPlan plan(ModelShape::uniform(4, 4, 2, 64));
  const std::vector<std::int64_t> costs{5, 1, 1, 5, 3, 3, 0, 9};
  const Sharding sharding = shard(plan, kMaxHeads, costs);
  EXPECT_EQ(sharding.num_copies(0), kMaxHeads / 2);
  EXPECT_EQ(sharding.plan(plan, kMaxHeads - 1).num_heads(), 4U);
}

TEST(Shard, SinksAndSlopesGoWithTheirQueryHeads) {
  HeadPlan plan(std::vector<int>{4, 4}, kStreaming);
  plan.set(0, 0, KeepEverything{});
  plan.set(0, 1, KeepEverything{});
  LayerShape first{4, 2, 64, 64};
  first.softmax.sinks = {0, 1, 2, 3, 4, 5, 6, 7};
  LayerShape second{4, 2, 64, 64};
  second.softmax.alibi_slopes = {0, 1, 2, 3, 4, 5, 6, 7};
  const Sharding sharding = shard(plan, 2, rows_kept(plan, 10000));
  ASSERT_EQ(copy(sharding.kv_heads(0)), (std::vector<int>{0, 2, 1, 3}));
  const ModelShape part = sharding.shape(ModelShape({first, second}), 1);
  EXPECT_EQ(part.layer(0).softmax.sinks, (std::vector<float>{2, 3, 6, 7}));
  std::vector<float> slopes;
  for (const int head : sharding.kv_heads(1, 1)) {
    slopes.insert(slopes.end(),
                  {2.0F * static_cast<float>(head), 2.0F * static_cast<float>(head) + 1.0F});
  }
  EXPECT_EQ(part.layer(1).softmax.alibi_slopes, slopes);
  EXPECT_EQ(part.layer(0).num_qo_heads(), 4);
}

TEST(Shard, LayersThatShareKAndVAreDealtAlikeOrRefused) {
  HeadPlan plan(std::vector<int>{4, 4}, kStreaming);
  for (const int l : {0, 1}) plan.set(l, 0, KeepEverything{});
  LayerShape shares{4, 2, 64, 64};
  shares.kv_layer = 0;
  const ModelShape shape({{4, 2, 64, 64}, shares});
  EXPECT_EQ(shard(plan, 2).shape(shape, 1).layer(1).kv_layer, 0);
  const std::vector<std::int64_t> unlike{9, 1, 1, 1, 1, 1, 1, 9};
  EXPECT_EQ(message_of<ConfigError>([&] { (void)shard(plan, 2, unlike).shape(shape, 0); }),
            "layer 1 reads K and V of layer 0, whose heads were dealt otherwise");
}

TEST(Shard, RefusesWhatDoesNotGoInto) {
  const HeadPlan plan = numbered_plan({8, 4});
  EXPECT_EQ(message_of<ConfigError>([&] {
              (void)shard(numbered_plan({8, 6}), 4);
            }),
            "layer 1: 4 ranks do not divide 6 KV heads, nor do these divide the ranks");
  EXPECT_EQ(message_of<ConfigError>([&] { (void)shard(plan, 6); }),
            "layer 0: 6 ranks do not divide 8 KV heads, nor do these divide the ranks");
  EXPECT_EQ(message_of<ConfigError>([&] { (void)shard(plan, 0); }),
            "num_ranks must be in [1, 65536], got 0");
  const std::vector<std::int64_t> few(11, 1);
  EXPECT_EQ(message_of<ConfigError>([&] { (void)shard(plan, 2, few); }),
            "the plan has 12 KV heads, got 11 costs");
  std::vector<std::int64_t> costs(12, 1);
  costs[7] = -1;
  EXPECT_THROW((void)shard(plan, 2, costs), ConfigError);
  costs.assign(12, std::numeric_limits<std::int64_t>::max());
  EXPECT_THROW((void)shard(plan, 2, costs), ConfigError) << "sums pass 64 bits";

  const Sharding sharding = shard(plan, 8);
  EXPECT_EQ(message_of<ConfigError>([&] { (void)sharding.query_heads(1, 7); }),
            "layer 1: 2 ranks hold each KV head and do not divide its group of 7 query heads");
  EXPECT_THROW((void)sharding.shape(ModelShape({{8, 7, 64, 64}, {4, 7, 64, 64}}), 0), ConfigError);
  EXPECT_EQ(message_of<ConfigError>([&] { (void)sharding.plan(plan, 8); }),
            "rank must be in [0, 7], got 8");
  EXPECT_EQ(message_of<ConfigError>([&] { (void)sharding.plan(plan, -1); }),
            "rank must be in [0, 7], got -1");
  EXPECT_EQ(message_of<ConfigError>([&] { (void)sharding.plan(numbered_plan({8}), 0); }),
            "sharded were 2 layers, got 1");
  EXPECT_EQ(message_of<ConfigError>([&] {
              (void)sharding.plan(numbered_plan({8, 8}), 0);
            }),
            "layer 1: sharded were 4 KV heads, got 8");
}

TEST(Shard, EvensOutPublishedHeads) {
  const std::string gradient =
      "duo_attention/Llama-3-8B-Instruct-Gradient-1048k/full_attention_heads.tsv";
  HEADWISE_SKIP_WITHOUT(published(gradient));
  const HeadPlan llama3 =
      select(load_tsv(published(gradient)), {.sparsity = 0.5, .window = kStreaming.window});
  for (const auto& [ranks, in_order] : {std::pair{2, 1.092}, {4, 1.123}, {8, 1.306}}) {
    EXPECT_NEAR(shard(llama3, ranks, rows_kept(llama3, 32768)).imbalance_in_order(), in_order,
                5e-4);
  }
  const std::string names[] = {
      "duo_attention/Llama-3-8B-Instruct-Gradient-1048k/full_attention_heads.tsv",
      "duo_attention/Meta-Llama-3.1-8B-Instruct/full_attention_heads.tsv",
      "duo_attention/Mistral-7B-Instruct-v0.2/full_attention_heads.tsv",
      "duo_attention/Llama-2-7B-32K-Instruct/full_attention_heads.tsv",
      "rlkv/Llama-3.1-8B-R1/adapter_weights.tsv",
      "rlkv/Qwen-2.5-7B-R1/adapter_weights.tsv",
  };
  for (const std::string& name : names) {
    HEADWISE_SKIP_WITHOUT(published(name));
    const HeadScores scores = load_tsv(published(name));
    const HeadPlan plan = select(scores, {.sparsity = 0.5, .window = kStreaming.window});
    for (const int ranks : {2, 4, 8}) {
      SCOPED_TRACE(::testing::Message() << name << " on " << ranks);
      const Sharding sharding = shard(plan, ranks, rows_kept(plan, 32768));
      expect_shares_all(sharding, plan);
      EXPECT_LE(sharding.imbalance(), sharding.imbalance_in_order());
      if (sharding.num_copies(0) == 1) {
        EXPECT_LE(spread(retrieval_heads(sharding, plan)), 1);
        EXPECT_LE(sharding.imbalance(), 1.02);
      }
    }
  }
}

}  // namespace
}  // namespace headwise
