// SPDX-License-Identifier: MIT
// Promise: rows that a selection keeps end at the sequence's length, in the order of their
// positions, which are told again; nobody who shares a page sees any of it. Rows are stood for by
// numbers here; whole caches are in kv_cache_selection_test.cpp.
#include "headwise/cache/selected_rows.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory_resource>
#include <span>
#include <vector>

#include "headwise/core/rounding.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using Numbers = std::vector<std::int32_t>;
using FaultKind = SelectionFault::Kind;

constexpr std::int64_t kRowsOfPage = 16;

/// One layer of three KV heads, of which the last two are selected from.
CacheGeometry three_heads() {
  ModelShape shape({{3, 1, 16, 16}});
  HeadPlan plan(shape);
  for (const int h : {1, 2}) plan.set(0, h, KeepSelected{});
  const CacheOptions options{.page_tokens = kRowsOfPage, .max_sequences = 2, .max_context = 160};
  return CacheGeometry(shape, plan, options, [](const PageShape&) { return std::size_t{2048}; });
}

KeptPositions kept_of(const std::vector<Numbers>& heads) {
  KeptPositions kept;
  for (const Numbers& positions : heads) kept.add_head(positions);
  return kept;
}

/// Two sequences, and for each row of a page the token that lies there.
class SelectedRowsTest : public ::testing::Test {
 protected:
  SelectedRowsTest()
      : geometry_(three_heads()),
        layout_(sections_, geometry_),
        pool_layout_(sections_, geometry_.pool(), geometry_.num_slabs()),
        tables_layout_(sections_, geometry_.tables(false)),
        memory_(std::pmr::new_delete_resource(), sections_.total_bytes(), kCacheLine),
        pool_(geometry_.pool(), geometry_.num_slabs(), nullptr, memory_, pool_layout_, false),
        tables_(geometry_.tables(false), memory_, tables_layout_),
        rows_(geometry_, pool_, tables_, memory_, layout_),
        states_(2, std::vector<AnyKeepState>(geometry_.classes().size())) {}

  /// Class and place of one of the two heads that are selected from.
  const HeadGeometry& head(int h) const { return geometry_.head(0, h); }
  std::size_t class_of(int h) const { return static_cast<std::size_t>(head(h).class_idx); }
  std::int32_t* table(std::int32_t index, int h) {
    return tables_.head(index, class_of(h), head(h).idx_in_class);
  }
  SelectedRows::Sequence sequence(std::int32_t index, std::int64_t length) const {
    return {index, length, states_[static_cast<std::size_t>(index)]};
  }
  std::int64_t first_slot(std::int32_t index, int h) const {
    const HeadClass& heads = geometry_.classes()[class_of(h)];
    return rows_.first_slot(index, heads.first_selected + head(h).idx_in_class);
  }
  /// Tokens [from, to) of a sequence, appended: slot == pos.
  void append(std::int32_t index, std::int64_t from, std::int64_t to) {
    ASSERT_TRUE(tables_.reserve(index, ceil_div(to, kRowsOfPage)));
    for (const int h : {0, 1, 2}) {
      for (std::int64_t pos = from; pos < to; ++pos) {
        std::int32_t& page = table(index, h)[pos / kRowsOfPage];
        if (pos % kRowsOfPage == 0) page = pool_.take(0);
        token_of_[page].resize(kRowsOfPage);
        token_of_[page][static_cast<std::size_t>(pos % kRowsOfPage)] =
            static_cast<std::int32_t>(pos);
      }
    }
  }
  std::int64_t select(std::int32_t index, std::int64_t length, const KeptPositions& kept) {
    const auto before = sequence(index, length);
    std::vector<std::int64_t> demand(1, 0);
    if (!rows_.add_demand(before, kept, demand)) return -1;
    rows_.select(
        before, kept, [&](const PageCopy& copy) { token_of_[copy.to] = token_of_[copy.from]; },
        [&](int, int, std::int32_t from, std::span<const std::int32_t> rows, std::int32_t to,
            std::int64_t to_row) {
          // As formats do: one after the other, the last first.
          for (std::size_t i = rows.size(); i-- > 0;) {
            token_of_[to][static_cast<std::size_t>(to_row) + i] =
                token_of_[from][static_cast<std::size_t>(rows[i])];
          }
        });
    std::vector<AnyKeepState> after;
    for (std::size_t c = 0; c < geometry_.classes().size(); ++c) {
      after.push_back(rows_.state_after(before, c));
    }
    states_[static_cast<std::size_t>(index)] = after;
    return demand[0];
  }
  /// Tokens in a head's slots, from its first one on.
  Numbers stored(std::int32_t index, int h, std::int64_t length) {
    Numbers tokens;
    for (std::int64_t slot = first_slot(index, h); slot < length; ++slot) {
      tokens.push_back(token_of_[table(index, h)[slot / kRowsOfPage]]
                                [static_cast<std::size_t>(slot % kRowsOfPage)]);
    }
    return tokens;
  }
  Numbers told(std::int32_t index, int h, std::int64_t length) const {
    Numbers positions;
    rows_.for_each_position(sequence(index, length), class_of(h), head(h).idx_in_class,
                            [&](std::int32_t position) { positions.push_back(position); });
    return positions;
  }
  /// Another sequence with the first `shared` pages of sequence 0 and the same states.
  void share(std::int64_t shared) {
    ASSERT_TRUE(tables_.reserve(1, shared));
    for (const int h : {0, 1, 2}) {
      for (std::int64_t i = 0; i < shared; ++i) {
        pool_.share(table(1, h)[i] = table(0, h)[i]);
      }
    }
    states_[1] = states_[0];
    rows_.copy_first_slots(0, 1);
  }

  CacheGeometry geometry_;
  Sections sections_;
  SelectedRows::Layout layout_;
  PagePool::Layout pool_layout_;
  PageTables::Layout tables_layout_;
  Allocation memory_;
  PagePool pool_;
  PageTables tables_;
  SelectedRows rows_;
  std::vector<std::vector<AnyKeepState>> states_;  ///< [sequences][classes]
  std::map<std::int32_t, Numbers> token_of_;       ///< [pages][kRowsOfPage]
};

TEST_F(SelectedRowsTest, EndAtTheLengthInTheOrderOfTheirPositions) {
  append(0, 0, 70);
  const Numbers few{0, 3, 17, 40, 69};
  Numbers many;
  for (std::int32_t pos = 1; pos < 70; pos += 2) many.push_back(pos);
  EXPECT_EQ(select(0, 70, kept_of({{}, few, many})), 0);  // nobody shares a page
  EXPECT_EQ(first_slot(0, 1), 65);
  EXPECT_EQ(first_slot(0, 2), 35);
  EXPECT_EQ(stored(0, 1, 70), few);
  EXPECT_EQ(told(0, 1, 70), few);
  EXPECT_EQ(stored(0, 2, 70), many);
  EXPECT_EQ(told(0, 2, 70), many);
  EXPECT_THAT(told(0, 0, 70), IsEmpty());  // nothing is selected from it
  // 5 pages of the first head; the one that has slots [65, 70), and those that have [35, 70).
  EXPECT_EQ(pool_.num_used(), 5 + 1 + 3);
  // The class is what its longest head is.
  EXPECT_EQ(states_[0][class_of(1)], AnyKeepState(SelectedRule::State{70, 35}));
  EXPECT_EQ(states_[0][class_of(0)], AnyKeepState(EverythingRule::State{}));
}

TEST_F(SelectedRowsTest, AreSelectedFromAgainWithWhatWasAppended) {
  append(0, 0, 50);
  ASSERT_EQ(select(0, 50, kept_of({{}, {2, 9, 30, 49}, {}})), 0);
  append(0, 50, 66);
  EXPECT_THAT(told(0, 2, 66),
              ElementsAre(50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64, 65));
  ASSERT_EQ(select(0, 66, kept_of({{}, {9, 49, 50, 65}, {65}})), 0);
  EXPECT_THAT(stored(0, 1, 66), ElementsAre(9, 49, 50, 65));
  EXPECT_THAT(told(0, 1, 66), ElementsAre(9, 49, 50, 65));
  EXPECT_THAT(stored(0, 2, 66), ElementsAre(65));
}

TEST_F(SelectedRowsTest, TakePagesOfTheirOwnOnlyWhereRowsMoveIntoSharedOnes) {
  append(0, 0, 64);
  share(4);
  const std::int64_t used = pool_.num_used();
  // Slots [44, 64): the rows of [58, 64) stay, those before move into entries 2 and 3.
  Numbers moved{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 58, 59, 60, 61, 62, 63};
  // Slots [60, 64): all of them are there already.
  const Numbers tail{60, 61, 62, 63};
  EXPECT_EQ(select(0, 64, kept_of({{}, moved, tail})), 2);
  EXPECT_EQ(pool_.num_used(), used + 2);
  EXPECT_EQ(stored(0, 1, 64), moved);
  EXPECT_EQ(stored(0, 2, 64), tail);
  EXPECT_EQ(told(0, 2, 64), tail);
  for (const int h : {1, 2}) {  // the other has what it had
    const Numbers all = stored(1, h, 64);
    EXPECT_EQ(all.size(), 64U);
    EXPECT_TRUE(std::ranges::is_sorted(all));
    EXPECT_EQ(told(1, h, 64), all);
  }
  // A selection of the other then moves into what is no longer shared.
  EXPECT_EQ(select(1, 64, kept_of({{}, moved, {0}})), 1);
  EXPECT_EQ(stored(0, 2, 64), tail);
  EXPECT_EQ(stored(1, 1, 64), moved);
}

TEST_F(SelectedRowsTest, PositionsGoWithACopiedPage) {
  append(0, 0, 20);
  ASSERT_EQ(select(0, 20, kept_of({{}, {3, 8, 13}, {0}})), 0);
  ASSERT_TRUE(tables_.reserve(1, 2));
  for (const int h : {1, 2}) {
    const std::int32_t own = table(1, h)[1] = pool_.take(0);
    rows_.copy_positions(table(0, h)[1], own);
  }
  states_[1] = states_[0];
  rows_.copy_first_slots(0, 1);
  EXPECT_THAT(told(1, 1, 20), ElementsAre(3, 8, 13));
  rows_.forget(1);
  EXPECT_EQ(first_slot(1, 1), 0);
  EXPECT_EQ(first_slot(0, 1), 17);
}

TEST_F(SelectedRowsTest, NothingIsDroppedWhereEveryRowIsKept) {
  append(0, 0, 3);
  const KeptPositions all = kept_of({{}, {0, 1, 2}, {0, 1, 2}});
  EXPECT_EQ(rows_.fault_in(sequence(0, 3), all).kind, FaultKind::kNone);
  EXPECT_EQ(select(0, 3, all), -1);
  EXPECT_EQ(select(1, 0, kept_of({{}, {}, {}})), -1);         // an empty sequence, without tables
  EXPECT_EQ(select(0, 3, kept_of({{}, {1}, {0, 1, 2}})), 0);  // one head's rows are enough
  EXPECT_THAT(told(0, 1, 3), ElementsAre(1));
  EXPECT_THAT(told(0, 2, 3), ElementsAre(0, 1, 2));
}

TEST_F(SelectedRowsTest, TheFirstFaultIsFoundWithValueAndLimit) {
  append(0, 0, 20);
  ASSERT_EQ(select(0, 20, kept_of({{}, {3, 8, 19}, {0}})), 0);
  append(0, 20, 24);
  const auto expect_fault = [&](const std::vector<Numbers>& heads, FaultKind kind, int kv_head,
                                std::int64_t value, std::int64_t limit) {
    const SelectionFault fault = rows_.fault_in(sequence(0, 24), kept_of(heads));
    EXPECT_EQ(fault.kind, kind) << fault.to_string();
    EXPECT_EQ(fault.kv_head, kv_head) << fault.to_string();
    EXPECT_EQ(fault.value, value);
    EXPECT_EQ(fault.limit, limit);
  };
  expect_fault({{}, {3, 8, 19, 20, 23}, {0, 21}}, FaultKind::kNone, -1, 0, 0);
  expect_fault({{}, {}}, FaultKind::kNumHeads, -1, 2, 3);
  expect_fault({{1, 2}, {24}, {}}, FaultKind::kNotSelectable, 0, 2, 0);
  expect_fault({{}, {3, 24}, {}}, FaultKind::kOutOfRange, 1, 24, 24);
  expect_fault({{}, {-1}, {}}, FaultKind::kOutOfRange, 1, -1, 24);
  expect_fault({{}, {}, {22, 22}}, FaultKind::kNotAscending, 2, 22, 22);
  expect_fault({{}, {3, 9, 19}, {4}}, FaultKind::kNotStored, 1, 9, 20);
  expect_fault({{}, {}, {3, 20}}, FaultKind::kNotStored, 2, 3, 20);
}

TEST(SelectedRows, TakeNoMemoryWhereNoHeadIsSelectedFrom) {
  ModelShape shape({{2, 1, 16, 16}});
  const CacheOptions options{.page_tokens = 16, .max_context = 160};
  const CacheGeometry geometry(shape, HeadPlan(shape), options,
                               [](const PageShape&) { return std::size_t{2048}; });
  Sections sections;
  const SelectedRows::Layout layout(sections, geometry);
  EXPECT_EQ(sections.total_bytes(), 0U);
  EXPECT_EQ(layout.num_positions, 0U);
}

}  // namespace
}  // namespace headwise
