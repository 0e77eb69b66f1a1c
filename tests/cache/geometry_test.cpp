// SPDX-License-Identifier: MIT
#include "headwise/cache/geometry.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <variant>
#include <vector>

#include "headwise/cache/rows/plain_rows.hpp"
#include "support/boundary_lengths.hpp"

namespace headwise {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

constexpr std::int64_t pages_for(std::int64_t rows, std::int64_t page_tokens) {
  return rows / page_tokens + (rows % page_tokens != 0 ? 1 : 0);
}

/// Pages of one sequence, from the published rules and page by page.
std::int64_t closed_form(const HeadPlan& plan, const CacheOptions& options, std::int64_t length,
                         std::int64_t high_water) {
  const std::int64_t page_tokens = options.page_tokens;
  std::int64_t pages = 0;
  for (const HeadBudget& budget : plan.budgets()) {
    if (const auto* keep = std::get_if<KeepWindow>(&budget)) {
      const std::int64_t rows = keep->window.sink + keep->window.recent + options.max_rollback;
      pages += std::min(pages_for(length, page_tokens), pages_for(rows, page_tokens));
    } else if (const auto* growing = std::get_if<KeepGrowingWindow>(&budget)) {
      // A page stays while it has a sink or a row that the lowest permitted length still keeps.
      const std::int64_t lowest = std::max<std::int64_t>(0, high_water - options.max_rollback);
      const std::int64_t dropped =
          lowest - std::max(growing->min_recent, lowest / growing->divisor);
      for (std::int64_t page = 0; page < pages_for(length, page_tokens); ++page) {
        const bool has_sink = page * page_tokens < growing->sink;
        const bool has_kept = (page + 1) * page_tokens > dropped;
        pages += has_sink || has_kept ? 1 : 0;
      }
    } else {
      pages += pages_for(length, page_tokens);
    }
  }
  return pages;
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
  plan.set(1, 0, KeepWindow{{17, 40}});
  if (with_growing) plan.set(1, 1, KeepGrowingWindow{4, 60, 4});
  return plan;
}

TEST(CacheGeometry, PagesHeldEqualTheClosedForm) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    const CacheOptions options = small_options(prefill);
    const HeadPlan plan = mixed_plan(prefill == PrefillMode::kChunkCausal);
    const CacheGeometry geometry(shape_of_two_layers(), plan, options, &PlainRows<f16>::page_bytes);
    std::vector<std::int64_t> lengths = test::boundary_lengths(4, 28, 48, 16);
    for (const std::int64_t length : test::boundary_lengths(17, 40, 64, 16)) {
      lengths.push_back(length);
    }
    for (const std::int64_t length : lengths) {
      for (std::int64_t ahead = 0; ahead <= 5; ++ahead) {
        EXPECT_EQ(geometry.pages_held(length, length + ahead),
                  closed_form(plan, options, length, length + ahead))
            << length << " of " << length + ahead;
      }
    }
  }
}

TEST(CacheGeometry, PeakIsReachedByNoStepOfSmallerChunks) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    const CacheOptions options = small_options(prefill);
    const CacheGeometry geometry(shape_of_two_layers(),
                                 mixed_plan(prefill == PrefillMode::kChunkCausal), options,
                                 &PlainRows<f16>::page_bytes);
    for (const std::int64_t chunk : {1, 2, 16, 100, 700}) {
      std::int64_t most = 0;
      for (std::int64_t length = 0; length + chunk <= options.max_context; ++length) {
        const StepLengths step{length, length, length + chunk};
        std::int64_t pages = geometry.pages_held(length, length);
        for (const HeadClass& heads : geometry.classes()) {
          pages += heads.num_heads *
                   std::visit([&](const auto& s) { return s.changes(step, 0).take.count(); },
                              heads.store);
        }
        most = std::max(most, pages);
      }
      EXPECT_LE(most, geometry.peak_pages(chunk)) << chunk;
      // Not a wild guess either: a few pages a head above what is ever held.
      EXPECT_LE(geometry.peak_pages(chunk), most + 5 * 4) << chunk;
    }
  }
}

TEST(CacheGeometry, HeadsWithEqualBudgetsShareAClass) {
  const CacheGeometry geometry(shape_of_two_layers(), mixed_plan(false),
                               small_options(PrefillMode::kWindowed), &PlainRows<f16>::page_bytes);
  ASSERT_EQ(geometry.classes().size(), 3U);
  EXPECT_EQ(geometry.head(0, 0).class_idx, geometry.head(0, 2).class_idx);
  EXPECT_EQ(geometry.head(0, 1).class_idx, geometry.head(1, 1).class_idx);
  EXPECT_NE(geometry.head(0, 0).class_idx, geometry.head(1, 0).class_idx);
  std::int64_t heads = 0;
  for (const HeadClass& head_class : geometry.classes()) heads += head_class.num_heads;
  EXPECT_EQ(heads, 5);
  EXPECT_EQ(geometry.max_heads_per_layer(), 3);
}

TEST(CacheGeometry, PageHoldsRowsOfTheWidestLayer) {
  const CacheOptions options = small_options(PrefillMode::kWindowed);
  EXPECT_EQ(
      CacheGeometry(shape_of_two_layers(), mixed_plan(false), options, &PlainRows<f16>::page_bytes)
          .page_bytes(),
      16U * (64 + 48) * 2);
  EXPECT_EQ(
      CacheGeometry(shape_of_two_layers(), mixed_plan(false), options, &PlainRows<f32>::page_bytes)
          .page_bytes(),
      16U * (64 + 48) * 4);
}

TEST(CacheGeometry, HeadsShareNoMetadata) {
  const CacheGeometry geometry(shape_of_two_layers(), mixed_plan(true),
                               small_options(PrefillMode::kChunkCausal),
                               &PlainRows<f16>::page_bytes);
  std::vector<int> entries(static_cast<std::size_t>(geometry.entries_per_sequence()));
  std::vector<int> floats(static_cast<std::size_t>(geometry.compensation_floats_per_sequence()));
  for (int l = 0; l < 2; ++l) {
    const LayerShape& layer = geometry.layers()[static_cast<std::size_t>(l)].shape;
    for (int h = 0; h < layer.num_kv_heads; ++h) {
      const HeadPlace& head = geometry.head(l, h);
      std::visit(
          [&](const auto& store) {
            for (std::int64_t i = 0; i < store.table_entries(); ++i) {
              ++entries.at(static_cast<std::size_t>(head.table_offset + i));
            }
            const std::int64_t width = kCompensationFloats * (layer.k_dim + layer.v_dim);
            for (std::int64_t i = 0; i < store.compensation_rows() * width; ++i) {
              ++floats.at(static_cast<std::size_t>(head.compensation_offset + i));
            }
          },
          geometry.classes()[static_cast<std::size_t>(head.class_idx)].store);
    }
  }
  EXPECT_EQ(entries, std::vector<int>(entries.size(), 1));
  EXPECT_EQ(floats, std::vector<int>(floats.size(), 1));
}

TEST(CacheGeometry, TaskOrderStartsWithTheHeadsThatKeepMost) {
  const CacheGeometry geometry(shape_of_two_layers(), mixed_plan(true),
                               small_options(PrefillMode::kChunkCausal),
                               &PlainRows<f16>::page_bytes);
  EXPECT_EQ(geometry.layers()[0].task_order, (std::vector<int>{1, 0, 2}));
  EXPECT_EQ(geometry.layers()[1].task_order, (std::vector<int>{1, 0}));
  ASSERT_EQ(geometry.layers()[0].runs.size(), 2U);
  EXPECT_EQ(geometry.layers()[0].runs[0].num_heads, 1);
  EXPECT_EQ(geometry.layers()[0].runs[1].num_heads, 2);
}

TEST(CacheGeometry, MetadataOfStreamingHeadsDoesNotGrowWithTheContext) {
  const HeadPlan plan(shape_of_two_layers(), KeepWindow{{16, 64}});
  CacheOptions options = small_options(PrefillMode::kWindowed);
  options.max_context = std::int64_t{1} << 33;
  const CacheGeometry geometry(shape_of_two_layers(), plan, options, &PlainRows<f16>::page_bytes);
  EXPECT_EQ(geometry.entries_per_sequence(), 5 * 2 * 6);
  EXPECT_EQ(geometry.pages_held(std::int64_t{1} << 33, std::int64_t{1} << 33), 5 * 6);
}

TEST(CacheGeometry, PoolIsLargeEnoughForEverySequenceAtItsLongest) {
  CacheOptions options = small_options(PrefillMode::kChunkCausal);
  options.max_sequences = 7;
  const CacheGeometry geometry(shape_of_two_layers(), mixed_plan(true), options,
                               &PlainRows<f16>::page_bytes);
  EXPECT_EQ(geometry.num_pages(), 7 * geometry.peak_pages(options.max_context));
  options.max_bytes = 10 * geometry.page_bytes() + 1;
  EXPECT_EQ(
      CacheGeometry(shape_of_two_layers(), mixed_plan(true), options, &PlainRows<f16>::page_bytes)
          .num_pages(),
      10);
}

TEST(CacheGeometry, ErrorsNameValueAndLimit) {
  const HeadPlan plan = mixed_plan(false);
  const auto refuses = [&](auto change, const std::string& name, const std::string& value) {
    CacheOptions options = small_options(PrefillMode::kWindowed);
    change(options);
    EXPECT_THAT(
        [&] { CacheGeometry(shape_of_two_layers(), plan, options, &PlainRows<f16>::page_bytes); },
        ThrowsMessage<ConfigError>(AllOf(HasSubstr(name), HasSubstr("got " + value))));
  };
  for (const int tokens : {-16, 0, 8, 24, 100}) {
    refuses([&](CacheOptions& o) { o.page_tokens = tokens; }, "page_tokens",
            std::to_string(tokens));
  }
  refuses([](CacheOptions& o) { o.max_context = 0; }, "max_context", "0");
  refuses([](CacheOptions& o) { o.max_sequences = 0; }, "max_sequences", "0");
  refuses([](CacheOptions& o) { o.max_rollback = -1; }, "max_rollback", "-1");
  const std::int64_t endless = std::numeric_limits<std::int64_t>::max();
  refuses([&](CacheOptions& o) { o.max_context = endless; }, "max_context",
          std::to_string(endless));
  refuses([&](CacheOptions& o) { o.max_rollback = endless; }, "max_rollback",
          std::to_string(endless));
}

TEST(CacheGeometry, WindowsMayBeEndless) {
  const std::int64_t endless = std::numeric_limits<std::int64_t>::max();
  const CacheOptions options = small_options(PrefillMode::kChunkCausal);
  const std::int64_t dense = CacheGeometry(shape_of_two_layers(), HeadPlan(shape_of_two_layers()),
                                           options, &PlainRows<f16>::page_bytes)
                                 .pages_held(2000, 2000);
  for (const HeadBudget& budget :
       {HeadBudget(KeepWindow{{endless, endless}}), HeadBudget(KeepWindow{{0, endless}}),
        HeadBudget(KeepGrowingWindow{endless, endless, endless}),
        HeadBudget(KeepGrowingWindow{endless, 5, 2}),
        HeadBudget(KeepGrowingWindow{4, endless, 1})}) {
    const CacheGeometry geometry(shape_of_two_layers(), HeadPlan(shape_of_two_layers(), budget),
                                 options, &PlainRows<f16>::page_bytes);
    EXPECT_EQ(geometry.pages_held(2000, 2000), dense) << budget.index();
    EXPECT_GE(geometry.peak_pages(2000), dense);
    EXPECT_LE(geometry.peak_pages(2000), dense + 5 * 2);
  }
}

TEST(CacheGeometry, RefusesAPlanOfAnotherShape) {
  const CacheOptions options = small_options(PrefillMode::kWindowed);
  EXPECT_THAT(
      [&] {
        CacheGeometry(shape_of_two_layers(), HeadPlan(std::vector<int>{3}), options,
                      &PlainRows<f16>::page_bytes);
      },
      ThrowsMessage<ConfigError>(AllOf(HasSubstr("1 layers"), HasSubstr("the model 2"))));
  EXPECT_THAT(
      [&] {
        CacheGeometry(shape_of_two_layers(), HeadPlan(std::vector<int>{3, 4}), options,
                      &PlainRows<f16>::page_bytes);
      },
      ThrowsMessage<ConfigError>(
          AllOf(HasSubstr("layer 1"), HasSubstr("4 KV heads"), HasSubstr("the model 2"))));
}

TEST(CacheGeometry, GrowingWindowsPrefillChunkCausalOnly) {
  EXPECT_THAT(
      [] {
        CacheGeometry(shape_of_two_layers(), mixed_plan(true),
                      small_options(PrefillMode::kWindowed), &PlainRows<f16>::page_bytes);
      },
      ThrowsMessage<ConfigError>(HasSubstr("kChunkCausal")));
}

}  // namespace
}  // namespace headwise
