// SPDX-License-Identifier: MIT
// Promise: memory is really freed, what is asked of the allocator is what the geometry says, and
// after the first step nothing is asked of it at all.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <variant>
#include <vector>

#include "headwise/cache/export.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "support/boundary_lengths.hpp"
#include "support/cache_model.hpp"
#include "support/count_allocations.hpp"

namespace headwise {
namespace {

using test::ModelledCache;
using test::new_tokens;
using Model = ModelledCache<f16>;

std::int64_t pages_held_for(std::int64_t rows, std::int64_t page_tokens) {
  return (rows + page_tokens - 1) / page_tokens;
}

/// Pages and their bytes that one sequence holds, from the published rules: `high_water` tokens at
/// most were ever there, and max_rollback of them may be asked back.
struct Held {
  std::int64_t pages = 0;
  std::size_t bytes = 0;
};
Held closed_form(const HeadPlan& plan, const CacheOptions& options, std::int64_t length,
                 std::int64_t high_water) {
  Held held;
  const std::int64_t size = options.page_tokens;
  const ModelShape& shape = test::mixed_shape();
  for (int l = 0; l < shape.num_layers(); ++l) {
    for (int h = 0; h < shape.layer(l).num_kv_heads; ++h) {
      std::int64_t pages = pages_held_for(length, size);
      const HeadBudget& budget = plan.budget(l, h);
      if (const auto* keep = std::get_if<KeepWindow>(&budget)) {
        const std::int64_t rows = keep->window.sink +
                                  std::max(keep->window.recent, keep->prompt_recent) +
                                  options.max_rollback;
        pages = std::min(pages, pages_held_for(rows, size));
      } else if (const auto* late = std::get_if<KeepWindowFrom>(&budget)) {
        const std::int64_t lowest = std::max<std::int64_t>(0, high_water - options.max_rollback);
        const KeepWindow& window = late->keep;
        const std::int64_t recent = std::max(window.window.recent, window.prompt_recent);
        const std::int64_t gone =
            lowest < late->from ? 0 : std::max<std::int64_t>(0, lowest - recent + 1) / size;
        pages -= std::max<std::int64_t>(0, gone - pages_held_for(window.window.sink, size));
      } else if (const auto* growing = std::get_if<KeepGrowingWindow>(&budget)) {
        const std::int64_t lowest = std::max<std::int64_t>(0, high_water - options.max_rollback);
        const std::int64_t gone =
            std::max<std::int64_t>(
                0, lowest - std::max(growing->min_recent, lowest / growing->divisor)) /
            size;
        pages -= std::max<std::int64_t>(0, gone - pages_held_for(growing->sink, size));
      }
      held.pages += pages;
      held.bytes +=
          static_cast<std::size_t>(pages * size * (shape.layer(l).k_dim + shape.layer(l).v_dim)) *
          sizeof(f16);
    }
  }
  return held;
}

/// What a cache of these would ask for, pages and metadata.
CacheGeometry geometry_of(const HeadPlan& plan, const CacheOptions& options) {
  return CacheGeometry(test::mixed_shape(), plan, options, &FormatOf<f16>::page_bytes);
}

TEST(KvCache, HoldsTheClosedFormAtEveryLength) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    Model model(test::mixed_shape(), test::mixed_plan(prefill), test::mixed_options(prefill, 7));
    const SequenceId id = model.add();
    for (std::int64_t length = 0; length <= 400; ++length) {
      const Held expected = closed_form(model.plan(), model.options(), length, length);
      ASSERT_EQ(model.cache.pages_in_use(), expected.pages) << length;
      ASSERT_EQ(model.cache.held_bytes(id), expected.bytes);
      model.add_tokens(id, new_tokens(1), Phase::kDecode);
    }
  }
}

TEST(KvCache, HoldsTheClosedFormAfterPromptsAndRollbacks) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    CacheOptions options = test::mixed_options(prefill, 7);
    options.max_context = 700;
    Model model(test::mixed_shape(), test::mixed_plan(prefill), options);
    const auto pages = [&](std::int64_t length, std::int64_t high_water) {
      return closed_form(model.plan(), options, length, high_water).pages;
    };
    for (const std::int64_t length : test::boundary_lengths(17, 30, 64, 16)) {
      const SequenceId id = model.add();
      model.add_tokens(id, new_tokens(length), Phase::kPrompt);
      ASSERT_EQ(model.cache.pages_in_use(), pages(length, length));
      for (const std::int64_t back : {1, 4, 7}) {
        if (back > length) continue;
        ASSERT_EQ(model.rollback(id, length - back), StepStatus::kOk);
        ASSERT_EQ(model.cache.pages_in_use(), pages(length - back, length));
      }
      model.release(id);
      ASSERT_EQ(model.cache.pages_in_use(), 0);
    }
  }
}

TEST(KvCache, AMillionTokensChangeOnlyTheRetrievalHeadsShare) {
  const ModelShape shape = ModelShape::uniform(1, 2, 2, 16);
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{16, 64}});
  CacheOptions options;
  options.page_tokens = 64;
  options.max_context = 1'000'500;
  options.max_rollback = 8;
  KvCache<f16> cache(shape, plan, options);
  const SequenceId id = cache.add_sequence().value();
  Step step;
  const std::vector<float> rows(4096 * 16, 0.25F);
  const auto view = TensorView<const float>::nhd(rows.data(), 1, 16);
  const auto add = [&](std::int64_t count) {
    ASSERT_EQ(cache.begin(step, {{id, count, Phase::kPrompt}}), StepStatus::kOk);
    for (int head = 0; head < 2; ++head) {
      cache.append<simd::BestIsa>(step, step.chunks()[0], 0, head, view, view);
      step.note_head_done(0);
    }
    ASSERT_EQ(cache.commit(step), StepStatus::kOk);
  };
  const auto in_use = [&] { return cache.pages_in_use(); };
  add(500);
  ASSERT_EQ(in_use(), 8 + 2);  // 500 rows, and 16 + 64 + 8 rows
  while (cache.length(id) < 1'000'000 && !HasFatalFailure()) {
    for (int i = 0; i < 3; ++i) add(1);
    add(std::min<std::int64_t>(4096, 1'000'500 - cache.length(id)));
    ASSERT_EQ(in_use(), pages_held_for(cache.length(id), 64) + 2);
  }
  EXPECT_GT(in_use(), 15'600);
  // The same plan without a retrieval head holds next to nothing.
  const HeadPlan streaming(shape, KeepWindow{{16, 64}});
  EXPECT_EQ(CacheGeometry(shape, streaming, options, &FormatOf<f16>::page_bytes)
                .bytes_held(1'000'000, 1'000'000),
            std::size_t{4} * 64 * 32 * sizeof(f16));
}

TEST(KvCache, FreedPagesServeOthersAtOnce) {
  // A pool for one long sequence: what it gives back is all that the next one can get.
  CacheOptions options = test::mixed_options(PrefillMode::kChunkCausal, 4);
  const HeadPlan plan = test::mixed_plan(PrefillMode::kChunkCausal);
  CacheOptions one = options;
  one.max_sequences = 1;
  options.max_bytes = geometry_of(plan, one).pool_bytes();
  Model model(test::mixed_shape(), plan, options);
  SequenceId a = model.add();
  for (int round = 0; round < 4; ++round) {
    model.add_tokens(a, new_tokens(480), Phase::kPrompt);
    const SequenceId b = model.add();
    ASSERT_EQ(model.begin({{b, new_tokens(480)}}, Phase::kPrompt), StepStatus::kOutOfPages);
    model.release(a);
    model.add_tokens(b, new_tokens(480), Phase::kPrompt);
    ASSERT_TRUE(model.matches());
    model.release(b);
    a = model.add();
  }
}

TEST(KvCache, FoldedPagesServeOthersAtOnce) {
  const ModelShape shape = ModelShape::uniform(1, 1, 1, 16);
  CacheOptions options = test::mixed_options(PrefillMode::kChunkCausal, 0);
  options.max_bytes = 8 * 16 * 32 * 2;  // eight pages
  Model model(shape, HeadPlan(shape, KeepGrowingWindow{4, 32, 50}), options);
  const SequenceId a = model.add();
  const SequenceId b = model.add();
  // Each needs the sink page and three or four more, however long it grows.
  for (int i = 0; i < 400; ++i) {
    model.add_tokens(a, new_tokens(1), Phase::kDecode);
    model.add_tokens(b, new_tokens(1), Phase::kDecode);
    ASSERT_LE(model.cache.pages_in_use(), 8);
  }
  ASSERT_TRUE(model.matches());
}

TEST(KvCache, AsksItsAllocatorOnceForWhatTheGeometrySays) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    test::CountingResource resource;
    CacheOptions options = test::mixed_options(prefill, 7);
    options.resource = &resource;
    const CacheGeometry geometry = geometry_of(test::mixed_plan(prefill), options);
    {
      Model model(test::mixed_shape(), test::mixed_plan(prefill), options);
      ASSERT_EQ(resource.requests.size(), 2U);
      EXPECT_EQ(resource.requests[0].bytes, geometry.pool_bytes());
      EXPECT_EQ(resource.requests[0].alignment % 64, 0U);
      EXPECT_EQ(resource.requests[1].bytes, BooksLayout(geometry, false).sections.total_bytes());
      EXPECT_EQ(resource.requests[1].alignment % 64, 0U);
      const SequenceId id = model.add();
      for (const std::int64_t chunk : {100, 1, 300, 1}) {
        model.add_tokens(id, new_tokens(chunk), Phase::kPrompt);
      }
      model.release(id);
      EXPECT_EQ(resource.requests.size(), 2U);
    }
    EXPECT_EQ(resource.live_bytes, 0U);
  }
}

TEST(KvCache, AsksForMetadataOnlyWherePageMemoryIsGiven) {
  test::CountingResource resource;
  CacheOptions options = test::mixed_options(PrefillMode::kWindowed, 7);
  options.resource = &resource;
  const HeadPlan plan = test::mixed_plan(PrefillMode::kWindowed);
  const CacheGeometry geometry = geometry_of(plan, options);
  const std::size_t bytes = geometry.pool_bytes();
  std::vector<std::byte> memory(bytes + 64);
  void* aligned = memory.data();
  std::size_t space = memory.size();
  std::align(64, bytes, aligned, space);
  options.page_memory = {static_cast<std::byte*>(aligned), bytes};
  Model model(test::mixed_shape(), plan, options);
  ASSERT_EQ(resource.requests.size(), 1U);
  EXPECT_EQ(resource.requests[0].bytes, BooksLayout(geometry, false).sections.total_bytes());
  const SequenceId id = model.add();
  model.add_tokens(id, new_tokens(100), Phase::kPrompt);
  EXPECT_TRUE(model.matches());
}

TEST(KvCache, ForksAndCheckpointsAllocateNothing) {
  const ModelShape& shape = test::mixed_shape();
  CacheOptions options = test::mixed_options(PrefillMode::kChunkCausal, 7);
  options.checkpoint_tokens = 32;
  KvCache<f16> cache(shape, test::mixed_plan(PrefillMode::kChunkCausal), options);
  Step step;
  const SequenceId id = cache.add_sequence().value();
  const SequenceChunk chunk[] = {{id, 16}};
  bool all_ok = cache.begin(step, chunk) == StepStatus::kOk;
  const std::size_t allocations = test::allocations_in([&] {
    for (int i = 0; i < 20; ++i) {
      for (int l = 0; l < shape.num_layers(); ++l) {
        step.note_heads_done(l, shape.layer(l).num_kv_heads);
      }
      all_ok &= cache.commit(step) == StepStatus::kOk;
      SequenceId child;
      all_ok &= cache.fork(id, child) == StepStatus::kOk;
      cache.release(child);
      all_ok &= cache.fork(id, cache.reuse_limit(id, 40).length, child) == StepStatus::kOk;
      cache.release(child);
      all_ok &= cache.begin(step, chunk) == StepStatus::kOk;
    }
  });
  EXPECT_TRUE(all_ok);
  EXPECT_GE(cache.reuse_limit(id, 300).length, 300 - 48);  // there were checkpoints
  EXPECT_EQ(allocations, 0U);
}

TEST(KvCache, AllocatesNothingAfterTheFirstStep) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    const ModelShape& shape = test::mixed_shape();
    KvCache<f16> cache(shape, test::mixed_plan(prefill), test::mixed_options(prefill, 7));
    Step step;
    const std::vector<float> rows(130 * 48, 0.5F);
    const auto run = [&](std::span<const SequenceChunk> chunks) {
      if (cache.begin(step, chunks) != StepStatus::kOk) return false;
      for (int layer = 0; layer < shape.num_layers(); ++layer) {
        const auto view = TensorView<const float>::nhd(rows.data(), 1, 48);
        for (const StepChunk& chunk : step.chunks()) {
          for (int head = 0; head < shape.layer(layer).num_kv_heads; ++head) {
            if (chunk.num_tokens() == 0) continue;
            cache.append<simd::BestIsa>(step, chunk, layer, head, view, view);
            step.note_head_done(layer);
          }
        }
      }
      return cache.commit(step) == StepStatus::kOk;
    };
    const SequenceId a = cache.add_sequence().value();
    const SequenceChunk one[] = {{a, 1, Phase::kDecode}};
    ASSERT_TRUE(run(one));  // the first step: its bookkeeping is made here

    bool all_ok = true;
    const std::size_t allocations = test::allocations_in([&] {
      const SequenceId b = cache.add_sequence().value();
      const SequenceId c = cache.add_sequence().value();
      const SequenceChunk prompt[] = {{a, 100}, {b, 17}, {c, 0}};
      const SequenceChunk decode[] = {
          {c, 1, Phase::kDecode}, {a, 1, Phase::kDecode}, {b, 1, Phase::kDecode}};
      const SequenceChunk too_long[] = {{a, 1000}};
      all_ok &= run(prompt);
      for (int i = 0; i < 50; ++i) {
        all_ok &= run(decode);
        if (i % 10 != 0) continue;
        all_ok &= run(prompt) || i > 0;
        all_ok &= cache.rollback(a, cache.length(a) - 7) == StepStatus::kOk;
        all_ok &= cache.rollback(a, 1) == StepStatus::kTooFarBack;
        all_ok &= cache.missing_bytes(prompt) == 0 && cache.longest_chunk(a) >= 0;
        all_ok &= cache.begin(step, too_long) == StepStatus::kContextTooLong;
        all_ok &= cache.begin(step, decode) == StepStatus::kOk;
        all_ok &= cache.commit(step) == StepStatus::kIncomplete;
        all_ok &= cache.drop(step) == StepStatus::kOk;
      }
      all_ok &= cache.begin(step, decode) == StepStatus::kOk;
      cache.release(b);
      all_ok &= cache.drop(step) == StepStatus::kOk;
      all_ok &= cache.clear(a) == StepStatus::kOk;
      all_ok &= cache.add_sequence().has_value();
    });
    EXPECT_TRUE(all_ok);
    EXPECT_EQ(allocations, 0U);
  }
}

TEST(CountAllocations, Counts) {
  EXPECT_EQ(test::allocations_in([] {
              int* volatile one = new int(1);  // volatile: the pair may not be elided
              int* volatile many = new int[100];
              delete one;
              delete[] many;
            }),
            2U);
}

TEST(LayerExporter, AllocatesNothing) {
  ModelledCache<PlainRows<f16>> model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed),
                                      test::mixed_options(PrefillMode::kWindowed, 7));
  ASSERT_EQ(model.begin({{model.add(), new_tokens(90)}}, Phase::kPrompt), StepStatus::kOk);
  for (const ExportUnit unit : {ExportUnit::kPages, ExportUnit::kRows}) {
    const std::vector<int> heads{0, 1, 2};
    const LayerExporter<f16> exporter(model.cache, 1, unit, heads);
    const ExportSize most = exporter.largest();
    std::vector<std::int32_t> entries(static_cast<std::size_t>(most.num_lists * most.longest));
    std::vector<std::int32_t> indptr(static_cast<std::size_t>(most.num_lists) + 1);
    StepStatus table = StepStatus::kStale, lists = StepStatus::kStale;
    EXPECT_EQ(test::allocations_in([&] {
                table = exporter.table(model.step, ExportOrder::kHeadsFirst,
                                       {entries, most.longest, {}, {}});
                lists = exporter.lists(model.step, ExportOrder::kHeadsFirst, {indptr, entries, {}});
              }),
              0U);
    EXPECT_EQ(table, StepStatus::kOk);
    EXPECT_EQ(lists, StepStatus::kOk);
  }
}

}  // namespace
}  // namespace headwise
