// SPDX-License-Identifier: MIT
#include "headwise/cache/pages/page_tables.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory_resource>
#include <random>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

namespace headwise {
namespace {

/// Tables and the memory that they lie in.
class OwnTables {
 public:
  explicit OwnTables(const PageTables::Shape& shape)
      : layout_(sections_, shape),
        memory_(std::pmr::new_delete_resource(), sections_.total_bytes(), kCacheLine),
        tables_(shape, memory_, layout_) {}
  PageTables* operator->() { return &tables_; }

 private:
  Sections sections_;
  PageTables::Layout layout_;
  Allocation memory_;
  PageTables tables_;
};

/// Two classes: two heads whose tables grow with the pages, and one whose table is 4 at most.
PageTables::Shape shape_of(std::int64_t num_entries, std::int64_t sequences,
                           bool keeps_log = false) {
  PageTables::Shape shape;
  shape.heads = {2, 1};
  for (const std::int64_t pages : {2, 4, 8, 11}) {
    const std::int64_t ring = std::min<std::int64_t>(pages, 4);
    shape.levels.push_back({pages, {0, 2 * pages}, {pages, ring}, 2 * pages + ring});
  }
  shape.num_entries = num_entries;
  shape.max_sequences = sequences;
  shape.keeps_log = keeps_log;
  return shape;
}
constexpr std::int64_t kLevelEntries[] = {6, 12, 20, 26};

/// Everything that was noted since the last drain.
using Changes =
    std::map<std::pair<std::int32_t, std::size_t>, std::pair<std::int64_t, std::int64_t>>;
Changes drained(OwnTables& tables) {
  Changes changes;
  tables->drain_changes([&](std::int32_t index, std::size_t c, PageTables::Change change) {
    EXPECT_TRUE(changes.insert({{index, c}, {change.first, change.last}}).second) << "told twice";
  });
  return changes;
}

TEST(PageTables, ASequenceHasABlockOfTheSmallestLevelThatIsLongEnough) {
  OwnTables tables(shape_of(100, 2));
  EXPECT_FALSE(tables->has_block(0));
  for (const auto& [pages, per_head] : {std::pair<std::int64_t, std::int64_t>{1, 2},
                                        {2, 2},
                                        {3, 4},
                                        {4, 4},
                                        {5, 8},
                                        {9, 11},
                                        {11, 11}}) {
    tables->release(0);
    ASSERT_TRUE(tables->reserve(0, pages));
    EXPECT_TRUE(tables->has_block(0));
    EXPECT_EQ(tables->stride(0, 0), per_head) << pages;
  }
}

TEST(PageTables, ABlockThatIsLongEnoughStaysWhereItIs) {
  OwnTables tables(shape_of(100, 2));
  ASSERT_TRUE(tables->reserve(0, 7));
  const std::int32_t* table = tables->head(0, 1, 0);
  for (const std::int64_t pages : {1, 8, 3, 0}) {
    ASSERT_TRUE(tables->reserve(0, pages));
    EXPECT_EQ(tables->head(0, 1, 0), table);
  }
}

TEST(PageTables, EntriesOfARangeAreThoseOfTheTableAndNoneNeedNoBlock) {
  OwnTables tables(shape_of(100, 2));
  EXPECT_TRUE(tables->entries(0, 0, 0, 0, 0).empty());
  EXPECT_TRUE(tables->entries(0, 0, 0, 3, 1).empty());
  ASSERT_TRUE(tables->reserve(0, 4));
  const auto entries = tables->entries(0, 0, 1, 1, 4);
  EXPECT_EQ(entries.data(), tables->head(0, 0, 1) + 1);
  EXPECT_EQ(entries.size(), 3U);
}

TEST(PageTables, HeadsShareNoEntry) {
  OwnTables tables(shape_of(100, 2));
  ASSERT_TRUE(tables->reserve(0, 4));
  ASSERT_TRUE(tables->reserve(1, 2));
  std::set<const std::int32_t*> entries;
  for (const auto& [index, pages, ring] :
       {std::tuple{std::int32_t{0}, 4, 4}, {std::int32_t{1}, 2, 2}}) {
    for (const int h : {0, 1}) {
      for (int i = 0; i < pages; ++i) {
        EXPECT_TRUE(entries.insert(tables->head(index, 0, h) + i).second);
      }
    }
    for (int i = 0; i < ring; ++i) {
      EXPECT_TRUE(entries.insert(tables->head(index, 1, 0) + i).second);
    }
  }
  EXPECT_EQ(entries.size(), 12U + 6U);
  EXPECT_EQ(tables->entries().size(), 100U);
  for (const std::int32_t* chunk : entries) {
    EXPECT_LT(chunk - tables->entries().data(), 18);  // first fit
  }
}

TEST(PageTables, OffsetsNameWhatHeadsPointTo) {
  OwnTables tables(shape_of(100, 2));
  ASSERT_TRUE(tables->reserve(0, 3));
  ASSERT_TRUE(tables->reserve(1, 8));
  for (const std::int32_t index : {0, 1}) {
    for (const std::size_t c : {0U, 1U}) {
      for (std::int64_t h = 0; h < (c == 0 ? 2 : 1); ++h) {
        EXPECT_EQ(tables->head(index, c, h), tables->entries().data() + tables->offset(index, c) +
                                                 h * tables->stride(index, c));
      }
    }
  }
}

TEST(PageTables, ABlockMovesWithItsContents) {
  OwnTables tables(shape_of(100, 2));
  ASSERT_TRUE(tables->reserve(0, 2));
  for (int i = 0; i < 2; ++i) {
    tables->head(0, 0, 0)[i] = 10 + i;
    tables->head(0, 0, 1)[i] = 20 + i;
    tables->head(0, 1, 0)[i] = 30 + i;
  }
  const std::int32_t* before = tables->head(0, 0, 0);
  for (const std::int64_t pages : {3, 8, 11}) {
    ASSERT_TRUE(tables->reserve(0, pages));
    EXPECT_NE(tables->head(0, 0, 0), before);
    for (int i = 0; i < 2; ++i) {
      EXPECT_EQ(tables->head(0, 0, 0)[i], 10 + i);
      EXPECT_EQ(tables->head(0, 0, 1)[i], 20 + i);
      EXPECT_EQ(tables->head(0, 1, 0)[i], 30 + i);
    }
  }
}

TEST(PageTables, AnArenaWithoutRoomRefusesAndChangesNothing) {
  OwnTables tables(shape_of(6 + 12 + 5, 3));
  ASSERT_TRUE(tables->reserve(0, 2));
  ASSERT_TRUE(tables->reserve(1, 4));
  tables->head(0, 0, 1)[1] = 77;
  const std::int64_t offset = tables->offset(0, 0);
  EXPECT_FALSE(tables->reserve(0, 3));  // 12 more, while the 6 are still there
  EXPECT_FALSE(tables->reserve(2, 1));
  EXPECT_FALSE(tables->has_block(2));
  EXPECT_EQ(tables->offset(0, 0), offset);
  EXPECT_EQ(tables->stride(0, 0), 2);
  EXPECT_EQ(tables->head(0, 0, 1)[1], 77);
  tables->release(1);
  EXPECT_TRUE(tables->reserve(0, 3));
  EXPECT_EQ(tables->head(0, 0, 1)[1], 77);
  EXPECT_TRUE(tables->reserve(2, 1));
}

TEST(PageTables, AShrunkBlockKeepsItsFirstEntriesAndGivesBackTheRest) {
  for (const std::int64_t pages : {1, 2, 3, 4, 5, 8, 9}) {
    OwnTables tables(shape_of(26, 2, true));
    ASSERT_TRUE(tables->reserve(0, 11));
    const auto value = [](std::size_t c, std::int64_t h, std::int64_t i) {
      return static_cast<std::int32_t>(c * 1000) + static_cast<std::int32_t>(h * 100 + i);
    };
    const auto heads = shape_of(26, 2).heads;
    for (std::size_t c = 0; c < 2; ++c) {
      for (std::int64_t h = 0; h < heads[c]; ++h) {
        for (std::int64_t i = 0; i < tables->stride(0, c); ++i) {
          tables->head(0, c, h)[i] = value(c, h, i);
        }
      }
    }
    EXPECT_FALSE(tables->reserve(1, 1));
    (void)drained(tables);
    tables->shrink(0, pages);
    Changes expected;
    const std::size_t level = pages <= 2 ? 0 : pages <= 4 ? 1 : pages <= 8 ? 2 : 3;
    for (std::size_t c = 0; c < 2; ++c) {
      const std::int64_t per_head = shape_of(26, 2).levels[level].per_head[c];
      ASSERT_EQ(tables->stride(0, c), per_head) << pages << " pages";
      if (level < 3) expected[{0, c}] = {0, per_head};  // a device is told of the move
      for (std::int64_t h = 0; h < heads[c]; ++h) {
        for (std::int64_t i = 0; i < per_head; ++i) {
          ASSERT_EQ(tables->head(0, c, h)[i], value(c, h, i)) << pages << " pages";
        }
      }
    }
    EXPECT_EQ(drained(tables), expected);
    EXPECT_EQ(tables->reserve(1, 1), level < 3);
  }
  OwnTables tables(shape_of(26, 2));
  tables->shrink(0, 4);  // has none
  ASSERT_TRUE(tables->reserve(0, 11));
  tables->shrink(0, 0);
  EXPECT_FALSE(tables->has_block(0));
  EXPECT_TRUE(tables->reserve(1, 11));
}

#if HEADWISE_HARDENED && GTEST_HAS_DEATH_TEST
TEST(PageTables, TablesOfASequenceThatHasNoneAreABugOfTheCaller) {
  OwnTables tables(shape_of(26, 2));
  EXPECT_DEATH((void)tables->head(0, 0, 0), "has no page tables");
}
#endif

TEST(PageTables, ReleasedNeighboursBecomeOneRoom) {
  // In every order of release of three neighbours.
  std::vector<std::int32_t> order{0, 1, 2};
  do {
    OwnTables tables(shape_of(26, 4));
    for (const std::int32_t index : {0, 1, 2}) ASSERT_TRUE(tables->reserve(index, 2));
    ASSERT_TRUE(tables->reserve(3, 2));
    tables->release(3);
    for (const std::int32_t index : order) tables->release(index);
    EXPECT_TRUE(tables->reserve(3, 11));  // the whole arena
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(PageTables, ReleasingWhatHasNoBlockDoesNothing) {
  OwnTables tables(shape_of(26, 2));
  tables->release(1);
  ASSERT_TRUE(tables->reserve(0, 11));
  tables->release(0);
  tables->release(0);
  EXPECT_TRUE(tables->reserve(1, 11));
}

TEST(PageTables, BlocksNeverOverlapAndRoomIsNeverLostOnARandomWalk) {
  constexpr std::int64_t kEntries = 90;
  constexpr std::int32_t kSequences = 6;
  OwnTables tables(shape_of(kEntries, kSequences));
  const auto level_of = [](std::int64_t pages) -> std::size_t {
    return pages <= 2 ? 0 : pages <= 4 ? 1 : pages <= 8 ? 2 : 3;
  };
  std::map<std::int32_t, std::pair<std::int64_t, std::int64_t>> blocks;  // begin, entries
  std::map<std::int32_t, std::int64_t> pages_of;
  std::mt19937 random(13);
  int refused = 0;
  for (int op = 0; op < 30'000; ++op) {
    const auto index = static_cast<std::int32_t>(random() % kSequences);
    if (random() % 3 == 0) {
      tables->release(index);
      blocks.erase(index);
      pages_of.erase(index);
      continue;
    }
    const auto pages = static_cast<std::int64_t>(random() % 11 + 1);
    const bool stays = blocks.contains(index) && level_of(pages) <= level_of(pages_of[index]);
    // First fit, by brute force: whether some place is free for the new block beside the old ones.
    const std::int64_t wanted = kLevelEntries[level_of(pages)];
    std::int64_t place = -1;
    for (std::int64_t begin = 0; begin + wanted <= kEntries && place < 0; ++begin) {
      const bool is_free = std::all_of(blocks.begin(), blocks.end(), [&](const auto& block) {
        return block.second.first >= begin + wanted ||
               block.second.first + block.second.second <= begin;
      });
      if (is_free) place = begin;
    }
    const bool is_ok = tables->reserve(index, pages);
    if (stays) {
      ASSERT_TRUE(is_ok);
    } else {
      ASSERT_EQ(is_ok, place >= 0) << "after " << op;
      refused += is_ok ? 0 : 1;
      if (is_ok) {
        ASSERT_EQ(tables->offset(index, 0), place) << "after " << op;
        blocks[index] = {place, wanted};
        pages_of[index] = pages;
      }
    }
    for (const auto& [other, block] : blocks) ASSERT_EQ(tables->offset(other, 0), block.first);
  }
  EXPECT_GT(refused, 1000);
}

// The log ----------------------------------------------------------------------------------------

TEST(PageTables, ChangesAreToldOnceAsTheHullOfWhatWasWritten) {
  OwnTables tables(shape_of(100, 3, true));
  ASSERT_TRUE(tables->reserve(0, 8));
  ASSERT_TRUE(tables->reserve(2, 8));
  EXPECT_EQ(drained(tables), Changes{});  // a fresh block has nothing to tell
  tables->note(2, 0, 3, 5);
  tables->note(2, 0, 1, 2);
  tables->note(2, 1, 0, 4);
  tables->note(0, 1, 2, 3);
  EXPECT_EQ(drained(tables), (Changes{{{0, 1}, {2, 3}}, {{2, 0}, {1, 5}}, {{2, 1}, {0, 4}}}));
  EXPECT_EQ(drained(tables), Changes{});
  tables->note(2, 0, 6, 7);
  EXPECT_EQ(drained(tables), (Changes{{{2, 0}, {6, 7}}}));  // not from 1 on
}

TEST(PageTables, NothingWrittenIsNothingToTell) {
  OwnTables tables(shape_of(100, 3, true));
  ASSERT_TRUE(tables->reserve(0, 8));
  tables->note(0, 0, 4, 4);
  tables->note(0, 0, 5, 2);
  EXPECT_EQ(drained(tables), Changes{});
}

TEST(PageTables, AMoveIsToldAsAllThatItCarriedOver) {
  OwnTables tables(shape_of(100, 3, true));
  ASSERT_TRUE(tables->reserve(0, 2));
  tables->note(0, 0, 0, 1);
  (void)drained(tables);
  ASSERT_TRUE(tables->reserve(0, 5));
  EXPECT_EQ(drained(tables), (Changes{{{0, 0}, {0, 2}}, {{0, 1}, {0, 2}}}));
}

TEST(PageTables, ReleasedTablesAreNotTold) {
  OwnTables tables(shape_of(100, 3, true));
  ASSERT_TRUE(tables->reserve(0, 2));
  ASSERT_TRUE(tables->reserve(1, 2));
  tables->note(0, 0, 0, 2);
  tables->note(1, 0, 0, 2);
  tables->release(0);
  EXPECT_EQ(drained(tables), (Changes{{{1, 0}, {0, 2}}}));
  // Nor later, when the sequence has tables again.
  ASSERT_TRUE(tables->reserve(0, 2));
  EXPECT_EQ(drained(tables), Changes{});
}

TEST(PageTables, WhatIsToldOfASmallerBlockLiesInIt) {
  OwnTables tables(shape_of(100, 3, true));
  ASSERT_TRUE(tables->reserve(0, 11));
  tables->note(0, 0, 5, 11);
  tables->release(0);
  ASSERT_TRUE(tables->reserve(0, 4));
  tables->note(0, 0, 1, 2);
  const Changes changes = drained(tables);
  ASSERT_EQ(changes.size(), 1U);
  const auto [first, last] = changes.at({0, 0});
  EXPECT_LE(first, 1);
  EXPECT_GE(last, 2);
  EXPECT_LE(last, 4);
}

TEST(PageTables, EveryEntryIsToldThatADeviceHasNotSeenOnARandomWalk) {
  // A copy that is kept up to date by what is told alone.
  constexpr std::int32_t kSequences = 4;
  OwnTables tables(shape_of(120, kSequences, true));
  std::vector<std::int32_t> device(120, -1);
  std::map<std::int32_t, std::set<std::tuple<std::size_t, std::int64_t, std::int64_t>>> written;
  std::mt19937 random(31);
  std::int32_t next = 0;
  for (int op = 0; op < 20'000; ++op) {
    const auto index = static_cast<std::int32_t>(random() % kSequences);
    switch (random() % 6) {
      case 0:
        tables->release(index);
        written.erase(index);
        break;
      case 1:
      case 2:
        (void)tables->reserve(index, static_cast<std::int64_t>(random() % 11 + 1));
        break;
      case 3:
        tables->drain_changes([&](std::int32_t changed, std::size_t c, PageTables::Change change) {
          ASSERT_GE(change.first, 0);
          ASSERT_LE(change.last, tables->stride(changed, c));
          for (std::int64_t h = 0; h < (c == 0 ? 2 : 1); ++h) {
            for (std::int64_t i = change.first; i < change.last; ++i) {
              const std::int64_t at =
                  tables->offset(changed, c) + h * tables->stride(changed, c) + i;
              device[static_cast<std::size_t>(at)] =
                  tables->entries()[static_cast<std::size_t>(at)];
            }
          }
        });
        for (const auto& [known, entries] : written) {
          for (const auto& [c, h, i] : entries) {
            const std::int64_t at = tables->offset(known, c) + h * tables->stride(known, c) + i;
            ASSERT_EQ(device[static_cast<std::size_t>(at)], tables->head(known, c, h)[i])
                << "after " << op;
          }
        }
        break;
      default: {
        if (!tables->has_block(index)) break;
        const std::size_t c = random() % 2;
        const auto i = static_cast<std::int64_t>(random()) % tables->stride(index, c);
        for (std::int64_t h = 0; h < (c == 0 ? 2 : 1); ++h) {
          tables->head(index, c, h)[i] = next++;
          written[index].insert({c, h, i});
        }
        tables->note(index, c, i, i + 1);
      }
    }
  }
}

TEST(PageTables, WithoutALogNothingIsKeptOrTold) {
  Sections with;
  Sections without;
  (void)PageTables::Layout(with, shape_of(100, 50, true));
  (void)PageTables::Layout(without, shape_of(100, 50, false));
  EXPECT_GE(with.total_bytes(),
            without.total_bytes() + 50 * (2 * sizeof(PageTables::Change) + sizeof(std::int32_t)));
  OwnTables tables(shape_of(100, 3, false));
  ASSERT_TRUE(tables->reserve(0, 2));
  tables->note(0, 0, 0, 2);
  EXPECT_EQ(drained(tables), Changes{});
}

}  // namespace
}  // namespace headwise
