// SPDX-License-Identifier: MIT
#include "headwise/attention/work.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "headwise/attention/attend.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "support/attend_models.hpp"

namespace headwise {
namespace {

using test::below;

TEST(HeadCut, DependsOnTheSequenceAlone) {
  EXPECT_EQ(HeadCut::of(0, 4, 100).num_parts(), 0) << "no new tokens, no tasks";
  EXPECT_EQ(HeadCut::of(1, 4, 0).num_parts(), 1) << "an empty past still has the token itself";
  EXPECT_EQ(HeadCut::of(1, 4, kSplitRows).num_parts(), 1);
  EXPECT_EQ(HeadCut::of(1, 4, kSplitRows + 1).num_parts(), 2);
  EXPECT_TRUE(HeadCut::of(kMaxDecodeRows / 4, 4, 10).decodes(4));
  EXPECT_FALSE(HeadCut::of(kMaxDecodeRows / 4 + 1, 4, 10).decodes(4));
}

TEST(HeadCut, LongPromptsAreTilesOfQueriesAlone) {
  const std::int64_t tile = prefill_tile_queries(4);
  const HeadCut cut = HeadCut::of(3 * tile + 1, 4, 1 << 20);
  EXPECT_EQ(cut.num_tiles, 4);
  EXPECT_EQ(cut.num_splits, 1) << "whatever the past";
}

TEST(HeadCut, NoHeadWithALongPastIsOneTask) {
  constexpr std::int64_t kPast = 32768;
  EXPECT_EQ(HeadCut::of(1, 71, kPast).num_parts(), 16) << "71 query heads on one KV head";
  EXPECT_EQ(HeadCut::of(2, 64, kPast).num_parts(), 16) << "two tokens of 64";
  EXPECT_EQ(HeadCut::of(8, 1, kPast).num_parts(), 16);
  EXPECT_EQ(HeadCut::of(8, 16, kPast).num_parts(), 16);
  for (const int group : {1, 2, 3, 4, 7, 8, 16, 64, 71, 100, 128}) {
    for (std::int64_t queries = 1; queries <= 2000; ++queries) {
      ASSERT_GE(HeadCut::of(queries, group, kPast).num_parts(), 3)
          << queries << " queries of " << group;
    }
  }
}

TEST(HeadCut, CoversEveryQueryAndEveryPastRowOnce) {
  std::mt19937 random(5);
  for (int round = 0; round < 20000; ++round) {
    const std::int64_t queries = 1 + below(random, std::int64_t{1} << below(random, 13));
    const int group = static_cast<int>(1 + below(random, round % 2 == 0 ? 8 : 500));
    const std::int64_t past = below(random, std::int64_t{1} << below(random, 24));
    const HeadCut cut = HeadCut::of(queries, group, past);
    ASSERT_GE(cut.num_tiles, 1);
    ASSERT_GE(cut.num_splits, 1);
    ASSERT_LT((cut.num_tiles - 1) * cut.tile_queries, queries) << "no tile is empty";
    ASSERT_GE(cut.num_tiles * cut.tile_queries, queries);
    ASSERT_LT((cut.num_splits - 1) * cut.split_rows, std::max<std::int64_t>(past, 1));
    ASSERT_GE(cut.num_splits * cut.split_rows, past);
    ASSERT_LE(cut.tile_queries, prefill_tile_queries(group)) << "what a thread's scratch holds";
    ASSERT_LE(cut.num_splits, kMaxSplits);
    if (cut.num_splits > 1) {
      ASSERT_LE(cut.num_splits * queries * group, kMaxPartialRows);
      ASSERT_GE(cut.split_rows, kSplitRows / 2) << "a split is worth its merge";
    }
  }
}

TEST(LargestCut, BoundsEveryCutAndIsReached) {
  for (const int group : {1, 3, 4, 8, 64, 71, 200, 500}) {
    for (const std::int64_t max_chunk : {1, 2, 3, 16, 17, 60, 700, 2500}) {
      for (const std::int64_t longest : {100, 2048, 2049, 4097, 30000, 140000, 1 << 20}) {
        const LayerShape layer{1, group, 16, 48};
        const LargestCut bound = LargestCut::of(layer, max_chunk, longest);
        std::int64_t parts = 0;
        std::int64_t floats = 0;
        for (std::int64_t queries = 1; queries <= max_chunk; ++queries) {
          for (const std::int64_t past : {longest, longest / 64 * 64, longest - 1, longest / 2}) {
            const HeadCut cut = HeadCut::of(queries, group, past);
            parts = std::max(parts, cut.num_parts());
            floats = std::max(floats, cut.partial_floats_of(queries, group, layer.v_dim));
          }
        }
        ASSERT_LE(parts, bound.num_parts) << group << " " << max_chunk << " " << longest;
        ASSERT_LE(floats, bound.partial_floats) << group << " " << max_chunk << " " << longest;
        ASSERT_GE(2 * parts, bound.num_parts);
        ASSERT_GE(2 * floats, bound.partial_floats) << group << " " << max_chunk << " " << longest;
      }
    }
  }
}

TEST(CacheGeometry, MostRowsSeenIsABoundAtEveryLength) {
  const ModelShape shape = ModelShape::uniform(1, 6, 6, 16);
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{4, 60}});
  plan.set(0, 5, KeepWindowFrom{{{4, 60}}, 500});
  plan.set(0, 2, KeepGrowingWindow{4, 40, 3});
  plan.set(0, 3, KeepGrowingWindow{20, 300, 7});
  plan.set(0, 4, KeepWindow{{0, 1}});
  for (const std::int64_t context : {30, 100, 2000}) {
    KvCache<f16> cache(
        shape, plan,
        {.page_tokens = 32, .max_context = context, .prefill = PrefillMode::kChunkCausal});
    for (int c = 0; c < 6; ++c) {
      std::int64_t most = 0;
      for (std::int64_t length = 0; length <= context; ++length) {
        most = std::max(
            most, cache.rows_seen(c, StepChunk{SequenceId{0, 0}, {length, length, length + 1}}));
      }
      EXPECT_LE(most, cache.geometry().most_rows_seen(c)) << "class " << c;
      EXPECT_GE(most + 32, cache.geometry().most_rows_seen(c)) << "class " << c;
    }
  }
}

TEST(CacheGeometry, LayersThatAreCutAlikeAreOneKind) {
  const ModelShape shape(
      {{4, 2, 32, 32}, {4, 2, 32, 32}, {4, 1, 32, 32}, {4, 2, 32, 32}, {4, 2, 32, 32}});
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{4, 60}});
  plan.set(1, 3, KeepWindow{{4, 60}});  // another head, the same work
  plan.set(4, 1, KeepWindow{{4, 61}});
  const KvCache<f16> cache(shape, plan, {.max_context = 100});
  const CacheGeometry& geometry = cache.geometry();
  std::vector<int> kinds;
  for (const LayerGeometry& layer : geometry.layers()) kinds.push_back(layer.kind);
  EXPECT_EQ(kinds, (std::vector<int>{0, 0, 1, 2, 3}));
  EXPECT_EQ(geometry.layer_kinds(), (std::vector<int>{0, 2, 3, 4}));
}

/// A step of random chunks over a model of random layers.
TEST(StepWork, NamesEveryPartOfEveryHeadOnce) {
  std::mt19937 random(11);
  for (int round = 0; round < 60; ++round) {
    std::vector<LayerShape> layers;
    for (std::int64_t l = 0; l < 1 + below(random, 4); ++l) {
      layers.push_back(
          {static_cast<int>(1 + below(random, 5)), static_cast<int>(1 + below(random, 9)), 16, 16});
    }
    const ModelShape shape(layers);
    HeadPlan plan(shape);
    for (int l = 0; l < shape.num_layers(); ++l) {
      for (int h = 0; h < shape.layer(l).num_kv_heads; ++h) {
        if (below(random, 2) == 0) plan.set(l, h, KeepWindow{{4, 50 + 2500 * below(random, 3)}});
      }
    }
    constexpr int kSequences = 4;
    KvCache<f16> cache(shape, plan, {.max_sequences = kSequences, .max_context = 9000});
    Step step;
    std::vector<SequenceChunk> chunks;
    for (int i = 0; i < kSequences; ++i)
      chunks.push_back({cache.add_sequence().value(), 1 + below(random, 7000)});
    ASSERT_EQ(cache.begin(step, chunks), StepStatus::kOk);
    for (int l = 0; l < shape.num_layers(); ++l) {
      step.note_heads_done(l, kSequences * shape.layer(l).num_kv_heads);
    }
    ASSERT_EQ(cache.commit(step), StepStatus::kOk);
    for (SequenceChunk& chunk : chunks) {
      chunk.num_tokens = below(random, 3) == 0 ? 1 : below(random, 800);
    }
    ASSERT_EQ(cache.begin(step, chunks), StepStatus::kOk);
    ASSERT_EQ(plan_work(cache, step, 3), StepStatus::kOk);
    EXPECT_EQ(step.planned_threads(), 3U);

    const StepWork& work = StepWork::in(step.scratch());
    const std::byte* const end = step.scratch().bytes() + step.scratch().num_bytes();
    for (const LayerGeometry& layer : cache.geometry().layers()) {
      const LayerWork& tasks = work.of_kind(layer.kind);
      // parts[e][h]: how often each part of head h of entry e is named.
      std::vector<std::vector<std::vector<int>>> parts(
          kSequences,
          std::vector<std::vector<int>>(static_cast<std::size_t>(layer.shape.num_kv_heads)));
      std::vector<std::pair<std::int64_t, std::int64_t>> partials;
      std::vector<std::int64_t> counters;
      for (std::int64_t t = 0; t < tasks.num_tasks; ++t) {
        const WorkItem& item = tasks.item(t);
        const std::int64_t of_head = item.cut.num_parts();
        const std::int64_t head = (t - item.first_task) / of_head;
        const std::int64_t part = (t - item.first_task) % of_head;
        ASSERT_GE(head, 0);
        const int kv_head = layer.task_order.at(static_cast<std::size_t>(item.first_head + head));
        const StepChunk& chunk = step.chunks()[static_cast<std::size_t>(item.chunk)];
        const HeadGeometry& place = cache.geometry().head(
            static_cast<int>(&layer - cache.geometry().layers().data()), kv_head);
        const HeadCut expected = HeadCut::of(chunk.num_tokens(), layer.shape.group_size,
                                             cache.rows_seen(place.class_idx, chunk));
        ASSERT_EQ(of_head, expected.num_parts());
        auto& named =
            parts[static_cast<std::size_t>(item.chunk)][static_cast<std::size_t>(kv_head)];
        named.resize(static_cast<std::size_t>(of_head));
        ++named[static_cast<std::size_t>(part)];
        if (part == 0 && of_head > 1) counters.push_back(item.first_counter + head);
        if (part == 0 && item.cut.num_splits > 1) {
          const std::int64_t floats = item.cut.partial_floats_of(
              chunk.num_tokens(), layer.shape.group_size, layer.shape.v_dim);
          const std::int64_t first = item.first_partial + head * floats;
          partials.emplace_back(first, first + floats);
          ASSERT_LE(reinterpret_cast<const std::byte*>(work.partials(first + floats)),
                    reinterpret_cast<const std::byte*>(work.thread_scratch(0)));
        }
      }
      for (std::size_t e = 0; e < kSequences; ++e) {
        for (const std::vector<int>& named : parts[e]) {
          EXPECT_EQ(named.empty(), chunks[e].num_tokens == 0);
          for (const int count : named) ASSERT_EQ(count, 1);
        }
      }
      std::sort(partials.begin(), partials.end());
      for (std::size_t i = 1; i < partials.size(); ++i) {
        ASSERT_LE(partials[i - 1].second, partials[i].first) << "partial results overlap";
      }
      std::sort(counters.begin(), counters.end());
      EXPECT_EQ(std::adjacent_find(counters.begin(), counters.end()), counters.end());
      const std::size_t floats =
          prefill_scratch_floats(layer.shape.group_size, layer.shape.k_dim, layer.shape.v_dim);
      EXPECT_LE(reinterpret_cast<const std::byte*>(work.thread_scratch(2) + floats), end);
    }
  }
}

TEST(StepWork, ArrivalsOfAnAttemptThatWasCutShortDoNotCount) {
  test::Model model = test::small_model(PrefillMode::kWindowed);
  const SequenceId id = model.add();
  ASSERT_EQ(model.cache.begin(model.step, {{id, 600}}), StepStatus::kOk);
  ASSERT_EQ(plan_work(model.cache, model.step, 1), StepStatus::kOk);
  const StepWork& work = StepWork::in(model.step.scratch());
  EXPECT_FALSE(work.arrives_last(0, 1, 3));
  EXPECT_FALSE(work.arrives_last(0, 1, 3));
  EXPECT_FALSE(work.arrives_last(0, 2, 3))
      << "the third of the first attempt is the second's first";
  EXPECT_FALSE(work.arrives_last(0, 2, 3));
  EXPECT_TRUE(work.arrives_last(0, 2, 3));
  EXPECT_FALSE(work.arrives_last(0, 2, 2)) << "the next layer begins at zero";
  EXPECT_TRUE(work.arrives_last(0, 2, 2));
}

}  // namespace
}  // namespace headwise
