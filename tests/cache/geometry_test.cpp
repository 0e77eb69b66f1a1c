// SPDX-License-Identifier: MIT
#include "headwise/cache/geometry.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <variant>
#include <vector>

#include "headwise/cache/books.hpp"
#include "support/boundary_lengths.hpp"

namespace headwise {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

/// Rows of two bytes an element.
std::size_t half_bytes(const PageShape& page) {
  return static_cast<std::size_t>(page.page_tokens) *
         static_cast<std::size_t>(page.k_dim + page.v_dim) * 2;
}

std::int64_t sum(const std::vector<std::int64_t>& pages) {
  return std::accumulate(pages.begin(), pages.end(), std::int64_t{0});
}

constexpr std::int64_t pages_for(std::int64_t rows, std::int64_t page_tokens) {
  return rows / page_tokens + (rows % page_tokens != 0 ? 1 : 0);
}

/// Pages of one head, from the published rules and page by page.
std::int64_t closed_form(const HeadBudget& budget, const CacheOptions& options, std::int64_t length,
                         std::int64_t high_water) {
  const std::int64_t page_tokens = options.page_tokens;
  if (const auto* keep = std::get_if<KeepWindow>(&budget)) {
    const std::int64_t rows = keep->window.sink +
                              std::max(keep->window.recent, keep->prompt_recent) +
                              options.max_rollback;
    return std::min(pages_for(length, page_tokens), pages_for(rows, page_tokens));
  }
  std::int64_t pages = pages_for(length, page_tokens);
  if (const auto* growing = std::get_if<KeepGrowingWindow>(&budget)) {
    // A page stays while it has a sink or a row that the lowest permitted length still keeps.
    const std::int64_t lowest = std::max<std::int64_t>(0, high_water - options.max_rollback);
    const std::int64_t dropped = lowest - std::max(growing->min_recent, lowest / growing->divisor);
    for (std::int64_t page = pages - 1; page >= 0; --page) {
      const bool has_sink = page * page_tokens < growing->sink;
      const bool has_kept = (page + 1) * page_tokens > dropped;
      pages -= has_sink || has_kept ? 0 : 1;
    }
  }
  return pages;
}

/// Bytes of one sequence: every head's pages as wide as its own rows.
std::size_t closed_form_bytes(const ModelShape& shape, const HeadPlan& plan,
                              const CacheOptions& options, std::int64_t length,
                              std::int64_t high_water) {
  std::size_t bytes = 0;
  for (int l = 0; l < shape.num_layers(); ++l) {
    const LayerShape& layer = shape.layer(l);
    for (int h = 0; h < layer.num_kv_heads; ++h) {
      bytes +=
          static_cast<std::size_t>(closed_form(plan.budget(l, h), options, length, high_water)) *
          half_bytes({options.page_tokens, layer.k_dim, layer.v_dim});
    }
  }
  return bytes;
}

const ModelShape& shape_of_two_layers() {
  static const ModelShape shape({{3, 1, 32, 32}, {2, 1, 64, 48}});
  return shape;
}

CacheOptions small_options(PrefillMode prefill) {
  CacheOptions options;
  options.page_tokens = 16;
  options.max_context = 2000;
  options.max_rollback = 5;
  options.prefill = prefill;
  return options;
}

HeadPlan mixed_plan(bool with_growing) {
  HeadPlan plan(shape_of_two_layers());
  plan.set(0, 0, KeepWindow{{4, 28}});
  plan.set(0, 2, KeepWindow{{4, 28}});
  plan.set(1, 0, KeepWindow{{17, 40}, 60});
  if (with_growing) plan.set(1, 1, KeepGrowingWindow{4, 60, 4});
  return plan;
}

CacheGeometry mixed_geometry(const CacheOptions& options) {
  return CacheGeometry(shape_of_two_layers(),
                       mixed_plan(options.prefill == PrefillMode::kChunkCausal), options,
                       half_bytes);
}

/// Every size of the pool in bytes.
std::vector<std::size_t> page_sizes(const PoolShape& pool) {
  std::vector<std::size_t> sizes;
  for (std::size_t i = 0; i < pool.num_sizes(); ++i) sizes.push_back(pool.page_bytes(i));
  return sizes;
}

// Pages ------------------------------------------------------------------------------------------

TEST(CacheGeometry, BytesHeldEqualTheClosedForm) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    const CacheOptions options = small_options(prefill);
    const HeadPlan plan = mixed_plan(prefill == PrefillMode::kChunkCausal);
    const CacheGeometry geometry = mixed_geometry(options);
    std::vector<std::int64_t> lengths = test::boundary_lengths(4, 28, 48, 16);
    for (const std::int64_t length : test::boundary_lengths(17, 60, 96, 16)) {
      lengths.push_back(length);
    }
    for (const std::int64_t length : lengths) {
      for (std::int64_t ahead = 0; ahead <= 5; ++ahead) {
        EXPECT_EQ(geometry.bytes_held(length, length + ahead),
                  closed_form_bytes(shape_of_two_layers(), plan, options, length, length + ahead))
            << length << " of " << length + ahead;
      }
    }
  }
}

TEST(CacheGeometry, EveryLayersPagesAreAsWideAsItsOwnRows) {
  const CacheGeometry mixed = mixed_geometry(small_options(PrefillMode::kWindowed));
  EXPECT_EQ(page_sizes(mixed.pool()), (std::vector<std::size_t>{16 * 64 * 2, 16 * 112 * 2}));
  // Layers that differ in nothing that a page shows share a size.
  const ModelShape mirrored({{1, 1, 32, 16}, {4, 2, 16, 32}, {1, 1, 32, 16}});
  const CacheGeometry geometry(mirrored, HeadPlan(mirrored), small_options(PrefillMode::kWindowed),
                               half_bytes);
  EXPECT_EQ(geometry.pool().num_sizes(), 1U);
  EXPECT_EQ(geometry.classes().size(), 1U);
}

/// The published shapes whose layers are most unlike.
struct UnlikeLayers {
  ModelShape shape;
  HeadPlan plan;
};
UnlikeLayers windows_of_256_beside_512() {
  std::vector<LayerShape> layers(50, LayerShape{16, 1, 256, 256});
  layers.insert(layers.end(), 10, LayerShape{4, 1, 512, 512});
  ModelShape shape(layers);
  HeadPlan plan(shape);
  for (int l = 0; l < 50; ++l) {
    for (int h = 0; h < 16; ++h) plan.set(l, h, KeepWindow{{0, 1024}});
  }
  return {shape, plan};
}
UnlikeLayers one_of_576_beside_64() {
  std::vector<LayerShape> layers(23, LayerShape{8, 1, 64, 64});
  layers.insert(layers.begin() + 11, LayerShape{1, 1, 576, 512});
  ModelShape shape(layers);
  return {shape, HeadPlan(shape)};
}

TEST(CacheGeometry, ShapesOfUnlikeWidthsHoldWhatTheirRowsNeedAndNoMore) {
  for (const UnlikeLayers& model : {windows_of_256_beside_512(), one_of_576_beside_64()}) {
    CacheOptions options;
    options.max_context = 131072;
    const CacheGeometry geometry(model.shape, model.plan, options, half_bytes);
    for (const std::int64_t length : {1, 64, 1000, 1024, 1025, 8192, 131072}) {
      std::size_t rows = 0;  // in whole pages of 64 tokens
      for (int l = 0; l < model.shape.num_layers(); ++l) {
        const LayerShape& layer = model.shape.layer(l);
        const bool is_window = !is_retrieval(model.plan.budget(l, 0));
        const std::int64_t kept =
            is_window ? std::min<std::int64_t>(length, 1024) : std::int64_t{length};
        rows += static_cast<std::size_t>(pages_for(kept, 64) * 64 * layer.num_kv_heads *
                                         (layer.k_dim + layer.v_dim) * 2);
      }
      EXPECT_EQ(geometry.bytes_held(length, length), rows) << length;
    }
    // And the pool for a decode of the longest is that, but for the ends of slabs.
    const std::size_t pool =
        static_cast<std::size_t>(geometry.slabs_for_steps_of(1)) * geometry.pool().slab_bytes();
    EXPECT_GE(pool, geometry.bytes_held(131072, 131072));
    EXPECT_LE(pool,
              geometry.bytes_held(131072, 131072) * 17 / 16 + 2 * geometry.pool().slab_bytes());
  }
}

TEST(CacheGeometry, NoStepHoldsMorePagesThanItsPeak) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    const CacheOptions options = small_options(prefill);
    const CacheGeometry geometry = mixed_geometry(options);
    for (const std::int64_t chunk : {1, 2, 16, 100, 700}) {
      std::vector<std::int64_t> most(2, 0);
      for (std::int64_t length = 0; length + chunk <= options.max_context; ++length) {
        const StepLengths step{length, length, length + chunk};
        std::vector<std::int64_t> pages = geometry.pages_held(length, length);
        for (const HeadClass& heads : geometry.classes()) {
          pages[heads.page_size] += heads.num_heads * heads.rule.changes({}, step).take.count();
        }
        for (std::size_t size = 0; size < 2; ++size) most[size] = std::max(most[size], pages[size]);
      }
      const std::vector<std::int64_t> peak = geometry.peak_pages(chunk);
      for (std::size_t size = 0; size < 2; ++size) {
        EXPECT_LE(most[size], peak[size]) << chunk;
        EXPECT_GE(most[size] + 2, peak[size]) << chunk;  // a growing window's two ragged ends
      }
    }
  }
}

TEST(CacheGeometry, ShortChunksSaveSecondRings) {
  const HeadPlan plan(shape_of_two_layers(), KeepWindow{{16, 64}});
  CacheOptions options = small_options(PrefillMode::kWindowed);
  options.max_sequences = 7;
  const auto pool_bytes = [&](std::int64_t max_chunk) {
    options.max_chunk = max_chunk;
    return CacheGeometry(shape_of_two_layers(), plan, options, half_bytes).pool_bytes();
  };
  options.page_tokens = 16;
  // 16 + 64 + 5 of 96 rows: chunks of up to 12 tokens fit beside what may still be read.
  EXPECT_EQ(pool_bytes(1), pool_bytes(12));
  EXPECT_EQ(pool_bytes(13), pool_bytes(0));
  EXPECT_LE(pool_bytes(12), pool_bytes(0) / 2 + 2 * 16 * half_bytes({16, 64, 48}));
}

TEST(CacheGeometry, APoolIsLargeEnoughForEverySequenceAtItsLongest) {
  CacheOptions options = small_options(PrefillMode::kChunkCausal);
  options.max_sequences = 7;
  const CacheGeometry geometry = mixed_geometry(options);
  std::vector<std::int64_t> pages = geometry.peak_pages(options.max_context);
  for (std::int64_t& of_size : pages) of_size *= 7;
  EXPECT_EQ(geometry.num_slabs(), geometry.pool().slabs_for(pages));
  EXPECT_EQ(geometry.pool_bytes(),
            static_cast<std::size_t>(geometry.num_slabs()) * geometry.pool().slab_bytes());
  options.max_bytes = 10 * geometry.pool().slab_bytes() + 1;
  EXPECT_EQ(mixed_geometry(options).num_slabs(), 10);
}

// Heads ------------------------------------------------------------------------------------------

TEST(CacheGeometry, HeadsOfEqualBudgetsAndWidthsShareAClass) {
  const CacheGeometry geometry = mixed_geometry(small_options(PrefillMode::kWindowed));
  ASSERT_EQ(geometry.classes().size(), 4U);
  EXPECT_EQ(geometry.head(0, 0).class_idx, geometry.head(0, 2).class_idx);
  EXPECT_NE(geometry.head(0, 1).class_idx, geometry.head(1, 1).class_idx);  // of unlike widths
  EXPECT_NE(geometry.head(0, 0).class_idx, geometry.head(1, 0).class_idx);
  std::int64_t heads = 0;
  for (const HeadClass& head_class : geometry.classes()) heads += head_class.num_heads;
  EXPECT_EQ(heads, 5);
  EXPECT_EQ(geometry.max_heads_per_layer(), 3);
}

TEST(CacheGeometry, WindowsThatDifferOnlyWhileAPromptIsReadAreTwoClasses) {
  HeadPlan plan(shape_of_two_layers(), KeepWindow{{4, 28}});
  plan.set(0, 1, KeepWindow{{4, 28}, 29});
  const CacheGeometry geometry(shape_of_two_layers(), plan, small_options(PrefillMode::kWindowed),
                               half_bytes);
  EXPECT_NE(geometry.head(0, 0).class_idx, geometry.head(0, 1).class_idx);
}

TEST(CacheGeometry, HeadsShareNoMetadata) {
  const CacheOptions options = small_options(PrefillMode::kChunkCausal);
  const CacheGeometry geometry = mixed_geometry(options);
  const PageTables::Shape tables = geometry.tables(false);
  for (const TableLevel& level : tables.levels) {
    std::vector<int> entries(static_cast<std::size_t>(level.num_entries));
    std::vector<int> bytes(geometry.compensation_bytes());
    for (int l = 0; l < 2; ++l) {
      const LayerGeometry& layer = geometry.layer(l);
      for (int h = 0; h < layer.shape.num_kv_heads; ++h) {
        const HeadGeometry& head = geometry.head(l, h);
        const auto c = static_cast<std::size_t>(head.class_idx);
        ASSERT_LT(head.idx_in_class, tables.heads[c]);
        for (std::int64_t i = 0; i < level.per_head[c]; ++i) {
          ++entries.at(
              static_cast<std::size_t>(level.first[c] + head.idx_in_class * level.per_head[c] + i));
        }
        const std::int64_t rows = geometry.classes()[c].rule.compensation_rows();
        const std::size_t size =
            static_cast<std::size_t>(rows) * CacheGeometry::compensation_row_bytes(layer.page);
        for (std::size_t i = 0; i < size; ++i) {
          ++bytes.at(static_cast<std::size_t>(head.compensation_offset) + i);
        }
      }
    }
    EXPECT_EQ(entries, std::vector<int>(entries.size(), 1));
    EXPECT_EQ(bytes, std::vector<int>(bytes.size(), 1));
  }
}

TEST(CacheGeometry, TaskOrderStartsWithTheHeadsThatKeepMost) {
  const CacheGeometry geometry = mixed_geometry(small_options(PrefillMode::kChunkCausal));
  EXPECT_EQ(geometry.layers()[0].task_order, (std::vector<int>{1, 0, 2}));
  EXPECT_EQ(geometry.layers()[1].task_order, (std::vector<int>{1, 0}));
  ASSERT_EQ(geometry.layers()[0].runs.size(), 2U);
  EXPECT_EQ(geometry.layers()[0].runs[0].num_heads, 1);
  EXPECT_EQ(geometry.layers()[0].runs[1].num_heads, 2);
}

TEST(CacheGeometry, ABudgetOfItsOwnForEveryHeadIsNotQuadratic) {
  // 10,000 classes: minutes where each head looks at all of them, well below a second where not.
  const ModelShape shape({{5000, 1, 16, 16}, {5000, 1, 16, 32}});
  HeadPlan plan(shape);
  for (int l = 0; l < 2; ++l) {
    for (int h = 0; h < 5000; ++h) plan.set(l, h, KeepWindow{{4, 16 + h}});
  }
  CacheOptions options = small_options(PrefillMode::kWindowed);
  options.max_context = 6000;
  const CacheGeometry geometry(shape, plan, options, half_bytes);
  EXPECT_EQ(geometry.classes().size(), 10'000U);
  Books books(geometry, nullptr, false);
  const SequenceId id = books.add_sequence().value();
  Step step;
  for (int i = 0; i < 20; ++i) {
    const SequenceChunk chunk{id, 100};
    ASSERT_EQ(books.begin(step, {&chunk, 1}), StepStatus::kOk);
    step.note_heads_done(0, 5000);
    step.note_heads_done(1, 5000);
    ASSERT_EQ(books.commit(step), StepStatus::kOk);
  }
}

// Metadata ---------------------------------------------------------------------------------------

std::size_t metadata_bytes(const CacheGeometry& geometry) {
  return BooksLayout(geometry, true).sections.total_bytes();
}

TEST(CacheGeometry, TablesOfStreamingHeadsDoNotGrowWithTheContext) {
  const HeadPlan plan(shape_of_two_layers(), KeepWindow{{16, 64}});
  CacheOptions options = small_options(PrefillMode::kWindowed);
  options.max_context = std::int64_t{1} << 33;
  const CacheGeometry geometry(shape_of_two_layers(), plan, options, half_bytes);
  EXPECT_EQ(geometry.tables(false).num_entries, 5 * 2 * 6);
  EXPECT_EQ(sum(geometry.pages_held(std::int64_t{1} << 33, std::int64_t{1} << 33)), 5 * 6);
}

TEST(CacheGeometry, MemoryOfTablesFollowsUseWhereThePoolCannotFillThem) {
  // A model of 32 layers and 8 heads, of which half stream; 16 GiB of pages.
  const ModelShape shape = ModelShape::uniform(32, 32, 8, 128);
  for (const KeepWindow stream :
       {KeepWindow{{64, 256}}, KeepWindow{Window::everything()}, KeepWindow{{64, 9'000'000}}}) {
    HeadPlan plan(shape);
    for (int l = 0; l < 32; ++l) {
      for (int h = 0; h < 4; ++h) plan.set(l, h, stream);
    }
    CacheOptions options;
    options.max_context = 10'000'000;
    options.max_sequences = 64;
    options.max_bytes = std::size_t{16} << 30;
    const CacheGeometry geometry(shape, plan, options, half_bytes);
    EXPECT_LT(metadata_bytes(geometry), std::size_t{256} << 20);
    EXPECT_GT(geometry.tables(true).levels.size(), 5U);
    // Checkpoints are as many as the pool's tokens have, not the longest context's.
    options.checkpoint_tokens = 100'000;
    EXPECT_LT(metadata_bytes(CacheGeometry(shape, plan, options, half_bytes)),
              std::size_t{256} << 20);
  }
}

TEST(CacheGeometry, TablesAreOfOneLevelWhereThePoolCanFillThem) {
  const CacheGeometry geometry = mixed_geometry(small_options(PrefillMode::kChunkCausal));
  const PageTables::Shape tables = geometry.tables(false);
  ASSERT_EQ(tables.levels.size(), 1U);  // no block ever moves
  EXPECT_EQ(tables.levels[0].capacity_pages, 2000 / 16);
  EXPECT_EQ(tables.num_entries, tables.levels[0].num_entries);
}

TEST(CacheGeometry, LevelsDoubleUpToTheContext) {
  const ModelShape shape = ModelShape::uniform(1, 1, 1, 16);
  CacheOptions options = small_options(PrefillMode::kWindowed);
  options.max_context = 16 * 1000;
  options.max_sequences = 1000;
  options.max_bytes = 1000 * half_bytes({16, 16, 16});
  const CacheGeometry geometry(shape, HeadPlan(shape), options, half_bytes);
  const PageTables::Shape tables = geometry.tables(false);
  std::vector<std::int64_t> capacities;
  for (const TableLevel& level : tables.levels) capacities.push_back(level.capacity_pages);
  EXPECT_EQ(capacities, (std::vector<std::int64_t>{64, 128, 256, 512, 1000}));
}

// Refusals ---------------------------------------------------------------------------------------

TEST(CacheGeometry, ErrorsNameValueAndLimit) {
  const HeadPlan plan = mixed_plan(false);
  const auto refuses = [&](auto change, const std::string& name, const std::string& value) {
    CacheOptions options = small_options(PrefillMode::kWindowed);
    change(options);
    EXPECT_THAT([&] { CacheGeometry(shape_of_two_layers(), plan, options, half_bytes); },
                ThrowsMessage<ConfigError>(AllOf(HasSubstr(name), HasSubstr("got " + value))));
  };
  for (const int tokens : {-16, 0, 8, 24, 100}) {
    refuses([&](CacheOptions& o) { o.page_tokens = tokens; }, "page_tokens",
            std::to_string(tokens));
  }
  for (const int value : {std::numeric_limits<int>::min(), -1, 0}) {
    refuses([&](CacheOptions& o) { o.max_sequences = value; }, "max_sequences",
            std::to_string(value));
  }
  const std::int64_t endless = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t value : {-endless, std::int64_t{-1}, std::int64_t{0}, endless}) {
    refuses([&](CacheOptions& o) { o.max_context = value; }, "max_context", std::to_string(value));
    if (value == 0) continue;
    refuses([&](CacheOptions& o) { o.max_rollback = value; }, "max_rollback",
            std::to_string(value));
    refuses([&](CacheOptions& o) { o.max_chunk = value; }, "max_chunk", std::to_string(value));
  }
}

TEST(CacheGeometry, ANullResourceIsRefused) {
  CacheOptions options = small_options(PrefillMode::kWindowed);
  options.resource = nullptr;
  EXPECT_THAT([&] { mixed_geometry(options); }, ThrowsMessage<ConfigError>(HasSubstr("resource")));
}

TEST(CacheGeometry, MaxChunkIsTheContextUnlessItIsLess) {
  CacheOptions options = small_options(PrefillMode::kWindowed);
  for (const auto& [asked, is] :
       {std::pair<std::int64_t, std::int64_t>{0, 2000}, {1, 1}, {2000, 2000}, {2001, 2000}}) {
    options.max_chunk = asked;
    const CacheGeometry geometry = mixed_geometry(options);
    EXPECT_EQ(geometry.options().max_chunk, is);
  }
}

TEST(CacheGeometry, WhatDoesNotFit64BitsIsRefusedNotWrapped) {
  const ModelShape shape = ModelShape::uniform(2, 2, 2, 128);
  const auto refuses = [&](auto change, auto page_bytes) {
    CacheOptions options;
    options.max_context = kMaxTokens;
    change(options);
    EXPECT_THAT(
        [&] {
          const CacheGeometry geometry(shape, HeadPlan(shape), options, page_bytes);
          (void)geometry.pool_bytes();
          (void)BooksLayout(geometry, false);
        },
        ThrowsMessage<ConfigError>(HasSubstr("bits")));
  };
  constexpr int kMost = std::numeric_limits<int>::max();
  // Sequences times pages, with and without a pool of one's own.
  refuses([](CacheOptions& o) { o.max_sequences = kMost; }, half_bytes);
  refuses(
      [](CacheOptions& o) {
        o.max_sequences = kMost;
        o.max_bytes = std::size_t{1} << 20;
      },
      half_bytes);
  // Pages of absurd size: their sum and the slab that they share.
  refuses([](CacheOptions&) {}, [](const PageShape&) { return std::size_t{1} << 60; });
}

TEST(CacheGeometry, WindowsMayBeEndless) {
  constexpr std::int64_t kEndless = kMaxTokens;
  const CacheOptions options = small_options(PrefillMode::kChunkCausal);
  const std::size_t dense =
      CacheGeometry(shape_of_two_layers(), HeadPlan(shape_of_two_layers()), options, half_bytes)
          .bytes_held(2000, 2000);
  for (const HeadBudget& budget :
       {HeadBudget(KeepWindow{{kEndless, kEndless}}), HeadBudget(KeepWindow{{0, kEndless}}),
        HeadBudget(KeepWindow{Window::everything()}), HeadBudget(KeepWindow{{0, 4}, kEndless}),
        HeadBudget(KeepGrowingWindow{kEndless, kEndless, kEndless}),
        HeadBudget(KeepGrowingWindow{kEndless, 5, 2}),
        HeadBudget(KeepGrowingWindow{4, kEndless, 1})}) {
    const CacheGeometry geometry(shape_of_two_layers(), HeadPlan(shape_of_two_layers(), budget),
                                 options, half_bytes);
    EXPECT_EQ(geometry.bytes_held(2000, 2000), dense) << budget.index();
    EXPECT_EQ(sum(geometry.peak_pages(2000)), 5 * 125);
  }
}

TEST(CacheGeometry, RefusesAPlanOfAnotherShape) {
  const CacheOptions options = small_options(PrefillMode::kWindowed);
  EXPECT_THAT(
      [&] {
        CacheGeometry(shape_of_two_layers(), HeadPlan(std::vector<int>{3}), options, half_bytes);
      },
      ThrowsMessage<ConfigError>(AllOf(HasSubstr("1 layers"), HasSubstr("the model 2"))));
  EXPECT_THAT(
      [&] {
        CacheGeometry(shape_of_two_layers(), HeadPlan(std::vector<int>{3, 4}), options, half_bytes);
      },
      ThrowsMessage<ConfigError>(
          AllOf(HasSubstr("layer 1"), HasSubstr("4 KV heads"), HasSubstr("the model 2"))));
}

TEST(CacheGeometry, GrowingWindowsPrefillChunkCausalOnly) {
  EXPECT_THAT(
      [] {
        CacheGeometry(shape_of_two_layers(), mixed_plan(true),
                      small_options(PrefillMode::kWindowed), half_bytes);
      },
      ThrowsMessage<ConfigError>(HasSubstr("kChunkCausal")));
}

}  // namespace
}  // namespace headwise
