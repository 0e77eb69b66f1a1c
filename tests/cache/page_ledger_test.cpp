// SPDX-License-Identifier: MIT
#include "headwise/cache/page_ledger.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "headwise/cache/geometry.hpp"
#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

const ModelShape& shape() {
  static const ModelShape two_layers({{2, 1, 16, 16}, {2, 1, 16, 16}});
  return two_layers;
}

CacheOptions options_of(int sequences) {
  CacheOptions options;
  options.page_tokens = 16;
  options.max_context = 600;
  options.max_rollback = 20;
  options.max_sequences = sequences;
  options.prefill = PrefillMode::kChunkCausal;
  return options;
}

HeadPlan plan() {
  HeadPlan heads(shape());
  heads.set(0, 1, KeepWindow{{4, 20}});
  heads.set(1, 0, KeepWindow{{17, 33}});
  heads.set(1, 1, KeepGrowingWindow{4, 24, 3});
  return heads;
}

CacheGeometry geometry_of(const CacheOptions& options) {
  return CacheGeometry(shape(), plan(), options, &PlainRows<f32>::page_bytes);
}

/// Says that every layer has been attended.
void attend_all(const Step& step) {
  for (const StepEntry& entry : step.entries()) {
    if (entry.num_tokens() == 0) continue;
    for (int l = 0; l < 2; ++l) {
      for (int h = 0; h < 2; ++h) step.note_head_done(l);
    }
  }
}

struct Ledger : ::testing::Test {
  PageLedger ledger{geometry_of(options_of(3))};
  Step step;

  StepStatus begin(std::initializer_list<SequenceChunk> chunks, Phase phase = Phase::kDecode) {
    return ledger.begin(step, std::span(chunks.begin(), chunks.size()), phase);
  }
  StepStatus advance(SequenceId id, std::int64_t tokens) {
    const StepStatus status = begin({{id, tokens}});
    if (status != StepStatus::kOk) return status;
    attend_all(step);
    return ledger.commit(step);
  }
};

/// Every page has one owner: an entry that some head of some sequence holds, or the free list.
void expect_pages_partitioned(const PageLedger& ledger, const std::vector<SequenceId>& live) {
  std::map<std::int32_t, int> owners;
  const CacheGeometry& geometry = ledger.geometry();
  for (const SequenceId id : live) {
    std::int64_t held = 0;
    for (const HeadPlace& head : geometry.heads()) {
      const auto class_idx = static_cast<std::size_t>(head.class_idx);
      const auto ranges = std::visit(
          [&](const auto& store) {
            return store.held(ledger.length(id), ledger.high_water(id), ledger.bank(id, class_idx));
          },
          geometry.classes()[class_idx].store);
      for (const EntryRange& range : ranges) {
        for (std::int64_t i = range.first; i < range.last; ++i, ++held) {
          const std::int32_t page = ledger.table(id, head)[i];
          ASSERT_GE(page, 0);
          ASSERT_LT(page, ledger.pool().num_pages());
          ASSERT_EQ(++owners[page], 1) << "page " << page << " has two owners";
        }
      }
    }
    ASSERT_EQ(held, ledger.pages_held(id));
  }
  ASSERT_EQ(static_cast<std::int64_t>(owners.size()) + ledger.pool().num_free(),
            ledger.pool().num_pages());
}

TEST_F(Ledger, CountsSequences) {
  std::vector<SequenceId> ids;
  for (int i = 0; i < 3; ++i) ids.push_back(ledger.add_sequence().value());
  EXPECT_EQ(ledger.add_sequence(), std::nullopt);
  for (const SequenceId id : ids) EXPECT_TRUE(ledger.is_live(id));
  EXPECT_FALSE(ledger.is_live(SequenceId{-1}));
  EXPECT_FALSE(ledger.is_live(SequenceId{3}));
  ledger.release(ids[1]);
  EXPECT_FALSE(ledger.is_live(ids[1]));
  EXPECT_EQ(ledger.add_sequence(), ids[1]);
  EXPECT_EQ(ledger.length(ids[1]), 0);
}

TEST_F(Ledger, EveryPageHasOneOwnerOnARandomWalk) {
  std::mt19937 random(5);
  const auto below = [&](std::int64_t n) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
  };
  std::vector<SequenceId> live;
  for (int op = 0; op < 1500; ++op) {
    const std::int64_t kind = below(10);
    if (live.empty() || (kind == 0 && live.size() < 3)) {
      live.push_back(ledger.add_sequence().value());
    } else if (kind == 1) {
      const auto i = static_cast<std::size_t>(below(static_cast<std::int64_t>(live.size())));
      ledger.release(live[i]);
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(i));
    } else if (kind <= 3) {
      const SequenceId id = live[random() % live.size()];
      (void)ledger.rollback(id, ledger.length(id) - below(25));
    } else {
      std::vector<SequenceChunk> chunks;
      for (const SequenceId id : live) {
        if (below(3) != 0) chunks.push_back({id, below(2) != 0 ? 1 : below(80)});
      }
      if (ledger.begin(step, chunks, Phase::kPrompt) == StepStatus::kOk) {
        attend_all(step);
        if (below(4) == 0) {
          ASSERT_EQ(ledger.drop(step), StepStatus::kOk);
        } else {
          ASSERT_EQ(ledger.commit(step), StepStatus::kOk);
        }
      }
    }
    if (op % 3 != 0) continue;  // an open step's pages have owners that the check does not know
    ASSERT_NO_FATAL_FAILURE(expect_pages_partitioned(ledger, live)) << "after " << op;
  }
}

TEST_F(Ledger, BeginTakesPagesAndDropGivesThemBack) {
  const SequenceId id = ledger.add_sequence().value();
  const std::int64_t free = ledger.pool().num_free();
  ASSERT_EQ(begin({{id, 100}}), StepStatus::kOk);
  EXPECT_LT(ledger.pool().num_free(), free);
  EXPECT_EQ(ledger.length(id), 0);
  EXPECT_EQ(ledger.drop(step), StepStatus::kOk);
  EXPECT_EQ(ledger.pool().num_free(), free);
  EXPECT_EQ(ledger.drop(step), StepStatus::kStale);
}

TEST_F(Ledger, RefusesInvalidChunksWithoutATrace) {
  const SequenceId a = ledger.add_sequence().value();
  const SequenceId b = ledger.add_sequence().value();
  const std::int64_t free = ledger.pool().num_free();
  EXPECT_EQ(begin({{a, 5}, {SequenceId{2}, 1}}), StepStatus::kInvalidChunk);  // not added
  EXPECT_EQ(begin({{a, 5}, {SequenceId{-1}, 1}}), StepStatus::kInvalidChunk);
  EXPECT_EQ(begin({{a, 5}, {SequenceId{99}, 1}}), StepStatus::kInvalidChunk);
  EXPECT_EQ(begin({{a, 5}, {b, -1}}), StepStatus::kInvalidChunk);
  EXPECT_EQ(begin({{a, 5}, {b, 1}, {a, 1}}), StepStatus::kInvalidChunk);
  EXPECT_EQ(begin({{a, 5}, {b, 601}}), StepStatus::kContextTooLong);
  EXPECT_EQ(begin({{a, 5}, {b, std::numeric_limits<std::int64_t>::max()}}),
            StepStatus::kContextTooLong);
  EXPECT_EQ(ledger.pool().num_free(), free);
  EXPECT_FALSE(ledger.is_open(step));
  EXPECT_EQ(ledger.commit(step), StepStatus::kStale);
  EXPECT_EQ(begin({{a, 5}, {b, 1}}), StepStatus::kOk);  // neither is left pending
}

TEST_F(Ledger, RowsFollowTheOrderOfTheChunks) {
  const SequenceId a = ledger.add_sequence().value();
  const SequenceId b = ledger.add_sequence().value();
  const SequenceId c = ledger.add_sequence().value();
  ASSERT_EQ(begin({{c, 3}, {a, 0}, {b, 4}}), StepStatus::kOk);
  ASSERT_EQ(step.entries().size(), 3U);
  EXPECT_EQ(step.entries()[0].sequence, c);
  EXPECT_EQ(step.entries()[0].first_row, 0);
  EXPECT_EQ(step.entries()[1].first_row, 3);
  EXPECT_EQ(step.entries()[2].first_row, 3);
  EXPECT_EQ(step.num_rows(), 7);
  EXPECT_EQ(step.phase(), Phase::kDecode);
}

TEST_F(Ledger, OpensStepsWithoutTokens) {
  const SequenceId id = ledger.add_sequence().value();
  ASSERT_EQ(begin({}), StepStatus::kOk);
  EXPECT_EQ(ledger.commit(step), StepStatus::kOk);  // nothing to attend
  ASSERT_EQ(begin({{id, 0}}), StepStatus::kOk);
  EXPECT_EQ(ledger.commit(step), StepStatus::kOk);
  EXPECT_EQ(ledger.length(id), 0);
}

TEST_F(Ledger, CommitsACompleteStepOnce) {
  const SequenceId id = ledger.add_sequence().value();
  ASSERT_EQ(begin({{id, 7}}), StepStatus::kOk);
  for (int heads_done = 0; heads_done < 4; ++heads_done) {
    EXPECT_EQ(ledger.commit(step), StepStatus::kIncomplete) << heads_done;
    EXPECT_EQ(ledger.length(id), 0);
    step.note_head_done(heads_done / 2);
  }
  EXPECT_EQ(ledger.commit(step), StepStatus::kOk);
  EXPECT_EQ(ledger.length(id), 7);
  EXPECT_EQ(ledger.commit(step), StepStatus::kStale);
  EXPECT_EQ(ledger.length(id), 7);
}

TEST_F(Ledger, HeadsOfOneLayerDoNotCompleteAnother) {
  const SequenceId id = ledger.add_sequence().value();
  ASSERT_EQ(begin({{id, 7}}), StepStatus::kOk);
  for (int i = 0; i < 4; ++i) step.note_head_done(0);
  EXPECT_EQ(ledger.commit(step), StepStatus::kIncomplete);
}

TEST_F(Ledger, ALaterBeginMakesTheFormerStepStale) {
  const SequenceId a = ledger.add_sequence().value();
  const SequenceId b = ledger.add_sequence().value();
  const std::int64_t free = ledger.pool().num_free();
  Step first;
  const SequenceChunk chunk{a, 50};
  ASSERT_EQ(ledger.begin(first, {&chunk, 1}, Phase::kPrompt), StepStatus::kOk);
  attend_all(first);
  ASSERT_EQ(begin({{b, 20}}), StepStatus::kOk);
  EXPECT_EQ(ledger.commit(first), StepStatus::kStale);
  EXPECT_EQ(ledger.drop(first), StepStatus::kStale);
  EXPECT_TRUE(ledger.is_open(step));  // the stale calls have not closed it
  attend_all(step);
  EXPECT_EQ(ledger.commit(step), StepStatus::kOk);
  EXPECT_EQ(ledger.length(a), 0);
  EXPECT_EQ(ledger.length(b), 20);
  EXPECT_EQ(ledger.pool().num_free(), free - ledger.pages_held(b));
}

TEST_F(Ledger, ARefusedBeginDropsTheOpenStepToo) {
  // Also when the refused begin reuses the open step's own object.
  const SequenceId id = ledger.add_sequence().value();
  const std::int64_t free = ledger.pool().num_free();
  ASSERT_EQ(begin({{id, 30}}), StepStatus::kOk);
  attend_all(step);
  ASSERT_EQ(begin({{id, 601}}), StepStatus::kContextTooLong);
  EXPECT_EQ(ledger.commit(step), StepStatus::kStale);
  EXPECT_EQ(ledger.pool().num_free(), free);
  EXPECT_EQ(ledger.length(id), 0);
}

TEST_F(Ledger, ReleasingOrRollingBackAMemberDropsTheStep) {
  const SequenceId a = ledger.add_sequence().value();
  const SequenceId b = ledger.add_sequence().value();
  ASSERT_EQ(advance(a, 40), StepStatus::kOk);
  ASSERT_EQ(advance(b, 40), StepStatus::kOk);
  const std::int64_t free = ledger.pool().num_free();

  ASSERT_EQ(begin({{a, 100}, {b, 100}}), StepStatus::kOk);
  attend_all(step);
  EXPECT_EQ(ledger.rollback(a, 39), StepStatus::kOk);
  EXPECT_EQ(ledger.commit(step), StepStatus::kStale);
  EXPECT_EQ(ledger.length(b), 40);
  EXPECT_EQ(ledger.pool().num_free(), free);

  ASSERT_EQ(begin({{a, 100}, {b, 100}}), StepStatus::kOk);
  attend_all(step);
  ledger.release(a);
  EXPECT_EQ(ledger.commit(step), StepStatus::kStale);
  EXPECT_EQ(ledger.length(b), 40);
  EXPECT_EQ(ledger.pool().num_free(), ledger.pool().num_pages() - ledger.pages_held(b));
}

TEST_F(Ledger, ARefusedRollbackLeavesTheOpenStepOpen) {
  const SequenceId id = ledger.add_sequence().value();
  ASSERT_EQ(advance(id, 40), StepStatus::kOk);
  ASSERT_EQ(begin({{id, 3}}), StepStatus::kOk);
  attend_all(step);
  EXPECT_EQ(ledger.rollback(id, 19), StepStatus::kTooFarBack);
  EXPECT_EQ(ledger.commit(step), StepStatus::kOk);
  EXPECT_EQ(ledger.length(id), 43);
}

TEST_F(Ledger, OtherSequencesMayComeAndGoWhileAStepIsOpen) {
  const SequenceId a = ledger.add_sequence().value();
  const SequenceId b = ledger.add_sequence().value();
  ASSERT_EQ(advance(b, 40), StepStatus::kOk);
  ASSERT_EQ(begin({{a, 30}}), StepStatus::kOk);
  attend_all(step);
  EXPECT_EQ(ledger.rollback(b, 30), StepStatus::kOk);
  ledger.release(b);
  (void)ledger.add_sequence();
  EXPECT_EQ(ledger.commit(step), StepStatus::kOk);
  EXPECT_EQ(ledger.length(a), 30);
}

TEST_F(Ledger, AStepOfAnotherLedgerIsStale) {
  PageLedger other(geometry_of(options_of(3)));
  const SequenceId here = ledger.add_sequence().value();
  const SequenceId there = other.add_sequence().value();
  ASSERT_EQ(begin({{here, 5}}), StepStatus::kOk);
  attend_all(step);
  Step foreign;
  const SequenceChunk chunk{there, 5};
  ASSERT_EQ(other.begin(foreign, {&chunk, 1}, Phase::kDecode), StepStatus::kOk);
  EXPECT_EQ(other.commit(step), StepStatus::kStale);
  EXPECT_EQ(other.drop(step), StepStatus::kStale);
  EXPECT_EQ(ledger.commit(step), StepStatus::kOk);
}

TEST(PageLedger, AStepOfAFormerLedgerAtTheSameAddressIsStale) {
  std::optional<PageLedger> ledger;
  ledger.emplace(geometry_of(options_of(1)));
  Step old;
  const SequenceChunk chunk{ledger->add_sequence().value(), 5};
  ASSERT_EQ(ledger->begin(old, {&chunk, 1}, Phase::kDecode), StepStatus::kOk);
  attend_all(old);
  ledger.emplace(geometry_of(options_of(1)));
  (void)ledger->add_sequence();
  EXPECT_EQ(ledger->commit(old), StepStatus::kStale);
  Step current;
  ASSERT_EQ(ledger->begin(current, {&chunk, 1}, Phase::kDecode), StepStatus::kOk);
  EXPECT_EQ(ledger->commit(old), StepStatus::kStale);
  EXPECT_EQ(ledger->drop(old), StepStatus::kStale);
}

TEST_F(Ledger, TheStepObjectMayGoBeforeItsPagesDo) {
  const SequenceId id = ledger.add_sequence().value();
  const std::int64_t free = ledger.pool().num_free();
  {
    Step brief;
    const SequenceChunk chunk{id, 90};
    ASSERT_EQ(ledger.begin(brief, {&chunk, 1}, Phase::kPrompt), StepStatus::kOk);
  }
  ASSERT_EQ(begin({}), StepStatus::kOk);
  EXPECT_EQ(ledger.pool().num_free(), free);
}

TEST_F(Ledger, RollsBackToHighWaterLessMaxRollbackAndNoFurther) {
  const SequenceId id = ledger.add_sequence().value();
  ASSERT_EQ(advance(id, 50), StepStatus::kOk);
  EXPECT_EQ(ledger.rollback(id, 51), StepStatus::kTooFarBack);
  EXPECT_EQ(ledger.rollback(id, 29), StepStatus::kTooFarBack);
  EXPECT_EQ(ledger.rollback(id, 40), StepStatus::kOk);
  EXPECT_EQ(ledger.rollback(id, 45), StepStatus::kTooFarBack);  // forward
  EXPECT_EQ(ledger.high_water(id), 50);
  EXPECT_EQ(ledger.rollback(id, 29), StepStatus::kTooFarBack);  // from the high water, not from 40
  EXPECT_EQ(ledger.rollback(id, 30), StepStatus::kOk);
  ASSERT_EQ(advance(id, 5), StepStatus::kOk);
  EXPECT_EQ(ledger.high_water(id), 50);
  EXPECT_EQ(ledger.rollback(id, 29), StepStatus::kTooFarBack);
  EXPECT_EQ(ledger.rollback(id, 35), StepStatus::kOk);
  EXPECT_EQ(ledger.rollback(id, -1), StepStatus::kTooFarBack);
  EXPECT_EQ(ledger.rollback(SequenceId{2}, 0), StepStatus::kInvalidChunk);
}

TEST_F(Ledger, AShortSequenceRollsBackToNothing) {
  const SequenceId id = ledger.add_sequence().value();
  ASSERT_EQ(advance(id, 20), StepStatus::kOk);
  EXPECT_EQ(ledger.rollback(id, 0), StepStatus::kOk);
  EXPECT_EQ(ledger.pages_held(id), 0);
  EXPECT_EQ(ledger.pool().num_free(), ledger.pool().num_pages());
}

TEST(PageLedger, RunsOutOfPagesAllOrNothing) {
  const SequenceChunk both[] = {{SequenceId{0}, 33}, {SequenceId{1}, 40}};
  const SequenceChunk rest[] = {{SequenceId{0}, 67}};
  Step step;
  const auto prepare = [&](PageLedger& ledger) {
    ASSERT_EQ(ledger.add_sequence(), SequenceId{0});
    ASSERT_EQ(ledger.add_sequence(), SequenceId{1});
    ASSERT_EQ(ledger.begin(step, both, Phase::kPrompt), StepStatus::kOk);
    attend_all(step);
    ASSERT_EQ(ledger.commit(step), StepStatus::kOk);
  };
  PageLedger roomy(geometry_of(options_of(2)));
  prepare(roomy);
  ASSERT_EQ(roomy.begin(step, rest, Phase::kPrompt), StepStatus::kOk);
  const std::int64_t needed = roomy.pool().num_pages() - roomy.pool().num_free();

  // One page less than the step needs: the last head of the last layer would go without.
  for (const std::int64_t missing : {0, 1, 2, 5}) {
    CacheOptions options = options_of(2);
    options.max_bytes = static_cast<std::size_t>(needed - missing) * roomy.geometry().page_bytes();
    PageLedger ledger(geometry_of(options));
    prepare(ledger);
    const std::int64_t free = ledger.pool().num_free();
    const StepStatus status = ledger.begin(step, rest, Phase::kPrompt);
    if (missing == 0) {
      EXPECT_EQ(status, StepStatus::kOk);
      EXPECT_EQ(ledger.pool().num_free(), 0);
      continue;
    }
    EXPECT_EQ(status, StepStatus::kOutOfPages);
    EXPECT_EQ(ledger.pool().num_free(), free);
    EXPECT_EQ(ledger.length(SequenceId{0}), 33);
    EXPECT_FALSE(ledger.is_open(step));
    expect_pages_partitioned(ledger, {SequenceId{0}, SequenceId{1}});
    ledger.release(SequenceId{1});  // its pages serve the other at once
    EXPECT_EQ(ledger.begin(step, rest, Phase::kPrompt), StepStatus::kOk);
  }
}

TEST(PageLedger, TakesTheCallersMemory) {
  CacheOptions options = options_of(1);
  const CacheGeometry geometry = geometry_of(options);
  const std::size_t bytes = static_cast<std::size_t>(geometry.num_pages()) * geometry.page_bytes();
  std::vector<std::byte> memory(bytes + 128);
  void* aligned = memory.data();
  std::size_t space = memory.size();
  std::align(64, bytes, aligned, space);
  auto* first = static_cast<std::byte*>(aligned);

  options.page_memory = {first, bytes};
  const PageLedger ledger(geometry_of(options));
  EXPECT_EQ(ledger.pool().memory(), first);

  options.page_memory = {first, bytes - 1};
  EXPECT_THAT([&] { PageLedger{geometry_of(options)}; },
              ThrowsMessage<ConfigError>(
                  AllOf(HasSubstr(std::to_string(bytes - 1)), HasSubstr(std::to_string(bytes)))));
  options.page_memory = {first + 32, bytes};
  EXPECT_THAT([&] { PageLedger{geometry_of(options)}; },
              ThrowsMessage<ConfigError>(HasSubstr("aligned to 64")));
}

TEST(PageLedger, ErrorsNameThePoolsLimits) {
  CacheOptions options = options_of(1);
  const std::size_t page = geometry_of(options).page_bytes();
  options.max_bytes = page - 1;
  EXPECT_THAT([&] { PageLedger{geometry_of(options)}; },
              ThrowsMessage<ConfigError>(
                  AllOf(HasSubstr(std::to_string(page - 1)), HasSubstr(std::to_string(page)))));
  options.max_bytes = 0;
  options.max_context = std::int64_t{1} << 36;  // 2^32 pages for every head that grows
  EXPECT_THAT([&] { PageLedger{geometry_of(options)}; },
              ThrowsMessage<ConfigError>(HasSubstr("2^31 - 1")));
}

TEST(PageLedger, MetadataSectionsLieInOrderOnCacheLines) {
  const CacheGeometry geometry = geometry_of(options_of(3));
  const MetadataLayout layout(geometry);
  const auto entries = static_cast<std::size_t>(geometry.entries_per_sequence());
  const auto floats = static_cast<std::size_t>(geometry.compensation_floats_per_sequence());
  const std::size_t begins[] = {layout.sequences,  layout.tables,     layout.compensation,
                                layout.banks,      layout.free_pages, layout.free_sequences,
                                layout.total_bytes};
  const std::size_t sizes[] = {3 * sizeof(SequenceState),
                               3 * entries * 4,
                               3 * floats * 4,
                               3 * geometry.classes().size(),
                               static_cast<std::size_t>(geometry.num_pages()) * 4,
                               3 * 4};
  for (std::size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(begins[i] % 64, 0U);
    EXPECT_GE(begins[i + 1], begins[i] + sizes[i]);
    EXPECT_LT(begins[i + 1], begins[i] + sizes[i] + 64);
  }
}

TEST(PageLedger, CountsTokensBeyond32Bits) {
  // Streaming heads only, so that the tables stay small; no rows are stored.
  const HeadPlan streaming(shape(), KeepWindow{{4, 20}});
  CacheOptions options = options_of(1);
  options.max_context = std::int64_t{1} << 40;
  PageLedger ledger(CacheGeometry(shape(), streaming, options, &PlainRows<f32>::page_bytes));
  const SequenceId id = ledger.add_sequence().value();
  Step step;
  for (const std::int64_t tokens : {std::int64_t{1} << 33, std::int64_t{1} << 39}) {
    const SequenceChunk chunk{id, tokens};
    ASSERT_EQ(ledger.begin(step, {&chunk, 1}, Phase::kPrompt), StepStatus::kOk);
    attend_all(step);
    ASSERT_EQ(ledger.commit(step), StepStatus::kOk);
  }
  EXPECT_EQ(ledger.length(id), (std::int64_t{1} << 33) + (std::int64_t{1} << 39));
  EXPECT_EQ(ledger.pages_held(id), 4 * 3);  // 4 + 20 + 1 + 20 rows
  EXPECT_EQ(ledger.rollback(id, ledger.length(id) - 20), StepStatus::kOk);
}

}  // namespace
}  // namespace headwise
