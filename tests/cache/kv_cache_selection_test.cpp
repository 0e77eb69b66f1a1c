// SPDX-License-Identifier: MIT
// Promise: a selection keeps the rows that it names, bit for bit, frees the pages of the others at
// once, and is all or nothing; everything else that a cache does goes on as before.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "headwise/cache/estimate.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "support/boundary_lengths.hpp"
#include "support/cache_model.hpp"
#include "support/isa_types.hpp"

namespace headwise {
namespace {

using test::ModelledCache;
using test::new_tokens;
using test::Token;
using Model = ModelledCache<f16>;
using Kind = SelectionFault::Kind;

constexpr std::int64_t kSelectionPage = 16;

/// Heads of mixed_plan that are selected from, counted layer by layer.
constexpr std::array<int, 2> kSelected{4, 9};

/// Every head another count: each row with a chance of its own.
auto at_random(std::mt19937& random) {
  return [&random](int head, std::int64_t) {
    return random() % 8 < static_cast<unsigned>(head == kSelected[0] ? 2 : 5);
  };
}

std::int64_t ceil_pages(std::int64_t tokens) {
  return (tokens + kSelectionPage - 1) / kSelectionPage;
}

// What is kept -----------------------------------------------------------------------------------

template <class Rows>
class SelectionOfFormat : public ::testing::Test {};
TYPED_TEST_SUITE(SelectionOfFormat, test::AllFormats, test::FormatNames);

TYPED_TEST(SelectionOfFormat, KeepsNamedRowsBitForBitAtEveryBoundaryLength) {
  std::mt19937 random(3);
  CacheOptions options = test::mixed_options(PrefillMode::kWindowed, 0);
  options.max_context = 700;
  ModelledCache<TypeParam> model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed),
                                 options);
  for (const std::int64_t length : test::boundary_lengths(4, 29, 48, kSelectionPage)) {
    const SequenceId id = model.add();
    model.add_tokens(id, new_tokens(length), Phase::kPrompt);
    for (int round = 0; round < 3; ++round) {
      ASSERT_EQ(model.compact(id, model.selection(id, at_random(random))), StepStatus::kOk);
      ASSERT_TRUE(model.matches()) << length << ", round " << round;
      model.add_tokens(id, new_tokens(round == 1 ? 37 : 1), Phase::kDecode);
      ASSERT_TRUE(model.matches()) << length << ", round " << round;
    }
    model.release(id);
    ASSERT_EQ(model.cache.pages_in_use(), 0);
  }
}

TEST(KvCacheSelection, KeepsNothingOrOneRowOrTheLastRows) {
  for (const std::int64_t length : {1, 15, 16, 17, 32, 50}) {
    for (const std::int64_t count : {0, 1, 5, 16, 17}) {
      Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed),
                  test::mixed_options(PrefillMode::kWindowed, 3));
      const SequenceId id = model.add();
      model.add_tokens(id, new_tokens(length), Phase::kPrompt);
      // The first rows in one head, the last ones in the other: all move, and none.
      const KeptPositions kept = model.selection(id, [&](int head, std::int64_t pos) {
        return head == kSelected[0] ? pos < count : pos >= length - count;
      });
      ASSERT_EQ(model.compact(id, kept), StepStatus::kOk);
      ASSERT_TRUE(model.matches()) << length << ", " << count;
      model.add_tokens(id, new_tokens(20), Phase::kPrompt);
      ASSERT_TRUE(model.matches()) << length << ", " << count;
    }
  }
}

TEST(KvCacheSelection, ChangesNothingWhereEveryRowIsKept) {
  Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed),
              test::mixed_options(PrefillMode::kWindowed, 5));
  std::mt19937 random(5);
  const SequenceId id = model.add();
  model.add_tokens(id, new_tokens(50), Phase::kPrompt);
  const auto everything = [](int, std::int64_t) { return true; };
  ASSERT_EQ(model.compact(id, model.selection(id, everything)), StepStatus::kOk);
  ASSERT_EQ(model.rollback(id, 46), StepStatus::kOk);  // no selection stands in its way
  ASSERT_EQ(model.compact(id, model.selection(id, at_random(random))), StepStatus::kOk);
  const std::int64_t pages = model.cache.pages_in_use();
  ASSERT_EQ(model.compact(id, model.selection(id, everything)), StepStatus::kOk);
  EXPECT_EQ(model.cache.pages_in_use(), pages);
  EXPECT_TRUE(model.matches());
}

TEST(KvCacheSelection, AnEmptySequenceHasNothingToSelectFrom) {
  Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed),
              test::mixed_options(PrefillMode::kWindowed, 5));
  const SequenceId id = model.add();
  EXPECT_EQ(model.compact(id, model.selection(id, [](int, std::int64_t) { return true; })),
            StepStatus::kOk);
  EXPECT_TRUE(model.cache.stored_positions(id, 0, 4).empty());
}

// Memory -----------------------------------------------------------------------------------------

TEST(KvCacheSelection, HoldsItsClosedFormAndFreesTheRestAtOnce) {
  ModelShape shape({{3, 1, 16, 16}});
  HeadPlan plan(shape);
  for (const int h : {0, 1}) plan.set(0, h, KeepSelected{});
  CacheOptions options{.page_tokens = 16, .max_sequences = 2, .max_context = 400};
  Model model(shape, plan, options);
  std::mt19937 random(7);
  const std::size_t page = model.cache.geometry().pool().page_bytes(0);
  for (const std::int64_t n : {1, 16, 47, 48, 49, 200}) {
    const SequenceId id = model.add();
    model.add_tokens(id, new_tokens(n), Phase::kPrompt);
    ASSERT_EQ(model.cache.pages_in_use(), 3 * ceil_pages(n));
    const KeptPositions kept = model.selection(id, at_random(random));
    ASSERT_EQ(model.compact(id, kept), StepStatus::kOk);
    for (std::int64_t length = n; length < n + 40; ++length) {
      std::int64_t pages = ceil_pages(length);  // the retrieval head
      for (const int h : {0, 1}) {
        pages += ceil_pages(length) - (n - std::ssize(kept.of_head(h))) / kSelectionPage;
      }
      ASSERT_EQ(model.cache.pages_in_use(), pages) << n << " to " << length;
      ASSERT_EQ(model.cache.held_bytes(id), static_cast<std::size_t>(pages) * page);
      model.add_tokens(id, new_tokens(1), Phase::kDecode);
    }
    model.release(id);
    ASSERT_EQ(model.cache.pages_in_use(), 0);
  }
}

TEST(KvCacheSelection, NeedsNoFreePageAndFreedOnesServeOthers) {
  ModelShape shape({{2, 1, 16, 16}});
  HeadPlan plan(shape);
  for (const int h : {0, 1}) plan.set(0, h, KeepSelected{});
  CacheOptions options{.page_tokens = 16, .max_sequences = 2, .max_context = 400};
  options.max_bytes = 2 * 4 * 1024;  // of 64 tokens: nothing is left over
  Model model(shape, plan, options);
  const SequenceId first = model.add();
  const SequenceId second = model.add();
  model.add_tokens(first, new_tokens(64), Phase::kPrompt);
  ASSERT_EQ(model.cache.free_bytes(), 0U);
  ASSERT_EQ(model.begin({{second, new_tokens(1)}}, Phase::kPrompt), StepStatus::kOutOfPages);
  const KeptPositions kept =
      model.selection(first, [](int, std::int64_t pos) { return pos % 4 == 1; });
  ASSERT_EQ(model.compact(first, kept), StepStatus::kOk);
  model.add_tokens(second, new_tokens(48), Phase::kPrompt);
  EXPECT_EQ(model.cache.free_bytes(), 0U);
  EXPECT_TRUE(model.matches());
}

TEST(KvCacheSelection, IsInTheEstimate) {
  ModelShape shape({{4, 1, 16, 16}});
  HeadPlan plan(shape);
  plan.set(0, 1, KeepSelected{32});
  plan.set(0, 2, KeepSelected{100});
  plan.set(0, 3, KeepSelected{});
  CacheOptions options{.page_tokens = 16, .max_sequences = 3, .max_context = 400};
  const Estimate said = estimate<f16>(shape, plan, options);
  const KvCache<f16> cache(shape, plan, options);
  const std::size_t page = cache.geometry().pool().page_bytes(0);
  // 400 tokens are 25 pages; 100 rows end at 400 and so begin at 300, in the 19th page.
  EXPECT_EQ(said.resident_bytes, 3 * page * (25 + 2 + (25 - 18) + 25));
  EXPECT_EQ(said.resident_bytes + said.transient_bytes, 3 * page * 100);
  EXPECT_EQ(said.pool_bytes, 3 * page * 100);
  EXPECT_EQ(said.metadata_bytes, cache.metadata_bytes());
  EXPECT_EQ(cache.geometry().classes().size(), 2U);  // whatever each head is to keep
}

TEST(KvCacheSelection, CostsNothingWhereNoHeadIsSelectedFrom) {
  ModelShape shape({{2, 1, 16, 16}});
  CacheOptions options{.page_tokens = 16, .max_sequences = 3, .max_context = 400};
  HeadPlan plan(shape);
  const std::size_t without = estimate<f16>(shape, plan, options).metadata_bytes;
  plan.set(0, 1, KeepSelected{});
  const std::size_t with = estimate<f16>(shape, plan, options).metadata_bytes;
  EXPECT_GE(with, without + 3 * 2 * 400 * sizeof(std::int32_t));  // a position for each row
}

// What is refused --------------------------------------------------------------------------------

class RefusedSelection : public ::testing::Test {
 protected:
  RefusedSelection()
      : model_(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed),
               test::mixed_options(PrefillMode::kWindowed, 7)),
        id_(model_.add()) {
    model_.add_tokens(id_, new_tokens(50), Phase::kPrompt);
    // Odd positions are gone.
    EXPECT_EQ(
        model_.compact(id_, model_.selection(id_, [](int, auto pos) { return pos % 2 == 0; })),
        StepStatus::kOk);
    model_.add_tokens(id_, new_tokens(10), Phase::kPrompt);
  }

  /// Positions that are fine in every other head.
  SelectionFault fault_of(int head, std::vector<std::int32_t> positions) {
    KeptPositions kept;
    const KeptPositions good = model_.selection(id_, [](int, auto) { return true; });
    for (int h = 0; h < good.num_heads(); ++h) {
      kept.add_head(
          h == head ? positions
                    : std::vector<std::int32_t>(good.of_head(h).begin(), good.of_head(h).end()));
    }
    SelectionFault fault;
    const std::int64_t pages = model_.cache.pages_in_use();
    EXPECT_EQ(model_.compact(id_, kept, &fault), StepStatus::kBadSelection);
    EXPECT_EQ(model_.cache.pages_in_use(), pages);
    EXPECT_TRUE(model_.matches());
    return fault;
  }

  Model model_;
  SequenceId id_;
};

TEST_F(RefusedSelection, SaysValueAndLimitAndChangesNothing) {
  EXPECT_EQ(fault_of(4, {0, 2, 60}).to_string(),
            "layer 0, KV head 4: position 60 is outside [0, 60)");
  EXPECT_EQ(fault_of(9, {-1, 2}).to_string(), "layer 1, KV head 4: position -1 is outside [0, 60)");
  EXPECT_EQ(fault_of(4, {4, 2}).to_string(),
            "layer 0, KV head 4: position 2 follows 4: positions must ascend");
  EXPECT_EQ(fault_of(9, {4, 4}).to_string(),
            "layer 1, KV head 4: position 4 follows 4: positions must ascend");
  EXPECT_EQ(fault_of(4, {4, 7, 8}).to_string(),
            "layer 0, KV head 4: position 7 was dropped by the selection at length 50");
  EXPECT_EQ(fault_of(4, {49}).kind, Kind::kNotStored);
  EXPECT_EQ(fault_of(0, {1}).to_string(),
            "layer 0, KV head 0: 1 kept positions, but nothing is selected from it");
  EXPECT_EQ(fault_of(1, {1, 2}).kind, Kind::kNotSelectable);  // a window
}

TEST_F(RefusedSelection, OfAnotherNumberOfHeads) {
  KeptPositions kept;
  SelectionFault fault;
  EXPECT_EQ(model_.compact(id_, kept, &fault), StepStatus::kBadSelection);
  EXPECT_EQ(fault.to_string(), "kept positions of 0 KV heads, the cache has 11");
}

TEST_F(RefusedSelection, InAnOpenStepAndOfNobody) {
  const KeptPositions kept = model_.selection(id_, [](int, auto pos) { return pos > 20; });
  ASSERT_EQ(model_.begin({{id_, new_tokens(2)}}, Phase::kDecode), StepStatus::kOk);
  EXPECT_EQ(model_.compact(id_, kept), StepStatus::kInStep);
  model_.append();
  EXPECT_EQ(model_.compact(id_, kept), StepStatus::kInStep);
  ASSERT_EQ(model_.cache.drop(model_.step), StepStatus::kOk);
  EXPECT_TRUE(model_.matches());
  EXPECT_EQ(model_.compact(id_, kept), StepStatus::kOk);
  EXPECT_TRUE(model_.matches());
  EXPECT_EQ(model_.cache.compact(SequenceId{}, kept), StepStatus::kInvalidChunk);
}

TEST(KvCacheSelection, IsOfTheLayerThatOwnsRowsWhereLayersShareThem) {
  const ModelShape shape({{1, 1, 16, 16}, {1, 1, 16, 16, 0.0F, {}, 0, 0, 0}});
  HeadPlan plan(shape);
  for (const int l : {0, 1}) plan.set(l, 0, KeepSelected{});
  KvCache<f16> cache(shape, plan, {.page_tokens = 16, .max_context = 100});
  const SequenceId id = cache.add_sequence().value();
  const std::vector<std::int32_t> none;
  const std::vector<std::int32_t> first{0};
  KeptPositions kept;
  kept.add_head(none);
  kept.add_head(first);
  SelectionFault fault;
  EXPECT_EQ(cache.compact(id, kept, &fault), StepStatus::kBadSelection);
  EXPECT_EQ(fault.to_string(),
            "layer 1, KV head 0: 1 kept positions, but nothing is selected from it");
}

TEST(KvCacheSelection, IsRefusedWhereKernelsNeedPositions) {
  LayerShape layer{2, 1, 16, 16};
  layer.softmax.alibi_slopes = {0.5F, 0.25F};
  const ModelShape shape({layer});
  HeadPlan plan(shape);
  plan.set(0, 1, KeepSelected{});
  EXPECT_THAT([&] { KvCache<f16>(shape, plan, {.page_tokens = 16, .max_context = 100}); },
              ::testing::ThrowsMessage<ConfigError>(::testing::HasSubstr("alibi_slopes")));
  // In a layer with a window of its own it is that window's.
  const ModelShape local({{1, 1, 16, 16, 0.0F, {}, 32}});
  HeadPlan of_local(local);
  of_local.set(0, 0, KeepSelected{});
  const KvCache<f16> cache(local, of_local, {.page_tokens = 16, .max_context = 100});
  EXPECT_FALSE(cache.geometry().classes()[0].selects());
}

TEST(KvCacheSelection, NothingIsRolledBackBehindIt) {
  Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed),
              test::mixed_options(PrefillMode::kWindowed, 9));
  std::mt19937 random(11);
  const SequenceId id = model.add();
  model.add_tokens(id, new_tokens(50), Phase::kPrompt);
  ASSERT_EQ(model.rollback(id, 47), StepStatus::kOk);
  ASSERT_EQ(model.compact(id, model.selection(id, at_random(random))), StepStatus::kOk);
  EXPECT_EQ(model.rollback(id, 46), StepStatus::kTooFarBack);
  model.add_tokens(id, new_tokens(4), Phase::kDecode);
  EXPECT_EQ(model.rollback(id, 46), StepStatus::kTooFarBack);
  ASSERT_TRUE(model.matches());
  ASSERT_EQ(model.rollback(id, 47), StepStatus::kOk);
  ASSERT_TRUE(model.matches());
  ASSERT_EQ(model.rollback(id, 0), StepStatus::kOk);  // a clear
  model.add_tokens(id, new_tokens(30), Phase::kPrompt);
  EXPECT_EQ(model.rollback(id, 25), StepStatus::kOk);
  EXPECT_TRUE(model.matches());
}

// Forks ------------------------------------------------------------------------------------------

TEST(KvCacheSelection, OfAForkLeavesTheOtherAsItWas) {
  for (const std::int64_t length : {5, 16, 40, 64, 100}) {
    Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed),
                test::mixed_options(PrefillMode::kWindowed, 3));
    std::mt19937 random(13);
    const SequenceId parent = model.add();
    model.add_tokens(parent, new_tokens(length), Phase::kPrompt);
    const SequenceId child = model.fork(parent).value();
    ASSERT_EQ(model.compact(child, model.selection(child, at_random(random))), StepStatus::kOk);
    ASSERT_TRUE(model.matches());
    const SequenceId grandchild = model.fork(child).value();  // with positions of its own
    ASSERT_TRUE(model.matches());
    for (const SequenceId id : {parent, child, grandchild}) {
      ASSERT_EQ(model.compact(id, model.selection(id, at_random(random))), StepStatus::kOk);
      model.add_tokens(id, new_tokens(20), Phase::kDecode);
      ASSERT_TRUE(model.matches());
    }
    for (const SequenceId id : {parent, child, grandchild}) model.release(id);
    ASSERT_EQ(model.cache.pages_in_use(), 0);
  }
}

TEST(KvCacheSelection, ThatLacksAPageOfItsOwnChangesNothing) {
  ModelShape shape({{2, 1, 16, 16}});
  HeadPlan plan(shape);
  for (const int h : {0, 1}) plan.set(0, h, KeepSelected{});
  CacheOptions options{.page_tokens = 16, .max_sequences = 2, .max_context = 400};
  options.max_bytes = 2 * 4 * 1024 + 1024;  // of 64 tokens, and one page more
  Model model(shape, plan, options);
  const SequenceId parent = model.add();
  model.add_tokens(parent, new_tokens(64), Phase::kPrompt);
  const SequenceId child = model.fork(parent).value();
  // Both heads move rows into one shared page each.
  const KeptPositions kept = model.selection(child, [](int, std::int64_t pos) { return pos < 10; });
  ASSERT_EQ(model.compact(child, kept), StepStatus::kOutOfPages);
  ASSERT_TRUE(model.matches());
  model.release(parent);
  ASSERT_EQ(model.compact(child, kept), StepStatus::kOk);
  ASSERT_TRUE(model.matches());
  EXPECT_EQ(model.cache.pages_in_use(), 2);
}

// A walk -----------------------------------------------------------------------------------------

TYPED_TEST(SelectionOfFormat, EverythingElseGoesOnBetweenSelectionsAtRandomMoments) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const std::int64_t rollback : {0, 7, 21}) {
      CacheOptions options = test::mixed_options(prefill, rollback);
      options.max_sequences = 4;
      ModelledCache<TypeParam> model(test::mixed_shape(), test::mixed_plan(prefill), options);
      std::mt19937 random(static_cast<unsigned>(17 + rollback));
      const auto below = [&](std::int64_t n) {
        return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
      };
      (void)model.add();
      for (int i = 0; i < 70; ++i) {
        const auto at = std::next(model.sequences.begin(),
                                  below(static_cast<std::int64_t>(model.sequences.size())));
        const SequenceId id = at->first;
        const std::int64_t length = model.cache.length(id);
        const std::int64_t kind = below(10);
        if (kind < 4) {
          const bool prompt = below(2) == 0;
          const std::int64_t tokens = std::min(prompt ? below(70) : 1 + below(3), 400 - length);
          ASSERT_EQ(
              model.begin({{id, new_tokens(tokens)}}, prompt ? Phase::kPrompt : Phase::kDecode),
              StepStatus::kOk);
          if (below(4) == 0) {
            model.append_layer(0);
            ASSERT_EQ(model.cache.drop(model.step), StepStatus::kOk);
          } else {
            model.append();
            ASSERT_EQ(model.commit(), StepStatus::kOk);
          }
        } else if (kind < 7) {
          ASSERT_EQ(model.compact(id, model.selection(id, at_random(random))), StepStatus::kOk);
        } else if (kind == 7) {
          const std::int64_t lowest =
              std::max({std::int64_t{1}, at->second.settled, at->second.high_water - rollback});
          if (length > lowest) {
            ASSERT_EQ(model.rollback(id, lowest + below(length - lowest)), StepStatus::kOk);
          }
        } else if (model.sequences.size() < 4) {
          (void)model.fork(id);
        } else {
          model.release(id);
        }
        ASSERT_TRUE(model.matches())
            << "after " << i << " (kind " << kind << "), rollback " << rollback;
      }
      while (!model.sequences.empty()) model.release(model.sequences.begin()->first);
      ASSERT_EQ(model.cache.pages_in_use(), 0);
    }
  }
}

}  // namespace
}  // namespace headwise
