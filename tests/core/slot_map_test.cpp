// SPDX-License-Identifier: MIT
#include "headwise/core/slot_map.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace headwise {
namespace {

TEST(SlotMap, WithoutATurnEveryPositionHasASlotOfItsOwn) {
  constexpr SlotMap kOwn{};
  for (const std::int64_t pos : {std::int64_t{0}, std::int64_t{5}, std::int64_t{1} << 40}) {
    EXPECT_EQ(kOwn.slot(Pos{pos}), Slot{pos});
    EXPECT_TRUE(kOwn.keeps(Pos{pos}, (std::int64_t{1} << 40) + 1));
  }
  const auto [all, none] = kOwn.runs(Pos{3}, Pos{100});
  EXPECT_EQ(all.first_slot, Slot{3});
  EXPECT_EQ(all.first_pos, Pos{3});
  EXPECT_EQ(all.count, 97);
  EXPECT_EQ(none.count, 0);
}

TEST(SlotMap, FollowsThePublishedAddresses) {
  // RLKV's pool with S = 16, R = 64 (its base of 1 taken off): position 80 overwrites 16.
  constexpr SlotMap kRing{0, 16, 64};
  static_assert(kRing.slot(Pos{15}) == Slot{15});
  static_assert(kRing.slot(Pos{16}) == Slot{16});
  static_assert(kRing.slot(Pos{79}) == Slot{79});
  static_assert(kRing.slot(Pos{80}) == Slot{16});
  static_assert(kRing.slot(Pos{143}) == Slot{79});
  static_assert(kRing.slot(Pos{144}) == Slot{16});
}

TEST(SlotMap, SlotsAreCountedFromItsFirstEntry) {
  constexpr SlotMap kFirstBank{0, 16, 64};
  constexpr SlotMap kSecondBank{5, 16, 64};
  static_assert(kFirstBank.slot(Pos{100}) == kSecondBank.slot(Pos{100}));
  EXPECT_NE(kFirstBank, kSecondBank);
}

/// Writes positions into slots one after the other and asks who lies where.
class WrittenSlots {
 public:
  explicit WrittenSlots(SlotMap map) : map_(map) {}
  void write(std::int64_t pos) { owner_[map_.slot(Pos{pos}).value] = pos; }
  const std::map<std::int64_t, std::int64_t>& owners() const { return owner_; }

 private:
  SlotMap map_;
  std::map<std::int64_t, std::int64_t> owner_;
};

TEST(SlotMap, KeepsExactlyThePositionsThatNobodyOverwrote) {
  for (std::int64_t sink = 0; sink <= 5; ++sink) {
    for (std::int64_t turn = 1; turn <= 9; ++turn) {
      const SlotMap map{0, sink, turn};
      WrittenSlots written(map);
      for (std::int64_t length = 1; length <= sink + 10 * turn + 3; ++length) {
        written.write(length - 1);
        std::vector<std::int64_t> still_there;
        for (const auto& [slot, pos] : written.owners()) {
          ASSERT_GE(slot, 0);
          ASSERT_LT(slot, sink + turn);
          still_there.push_back(pos);
        }
        std::sort(still_there.begin(), still_there.end());
        std::vector<std::int64_t> kept;
        for (std::int64_t pos = 0; pos < length; ++pos) {
          if (map.keeps(Pos{pos}, length)) kept.push_back(pos);
        }
        ASSERT_EQ(kept, still_there) << "sink " << sink << ", turn " << turn << ", " << length;
      }
    }
  }
}

TEST(SlotMap, SaysWhichPositionsLieInARow) {
  for (const SlotMap& map : {SlotMap{}, SlotMap{0, 0, 7}, SlotMap{0, 3, 5}, SlotMap{2, 20, 30}}) {
    for (std::int64_t first = 0; first < 90; ++first) {
      for (std::int64_t count = 1; count <= 40; ++count) {
        bool in_a_row = true;
        for (std::int64_t i = 1; i < count; ++i) {
          in_a_row = in_a_row && map.slot({first + i}).value == map.slot({first}).value + i;
        }
        // From a sink to a later turn's slots there may be a step of one, too: a row of its own.
        if (map.turn > 0 && first < map.sink && first + count > map.sink) in_a_row = false;
        EXPECT_EQ(map.in_a_row({first}, count), in_a_row) << first << " + " << count;
      }
    }
  }
}

TEST(SlotMap, RunsCoverExactlyThePositionsAskedFor) {
  for (std::int64_t sink = 0; sink <= 4; ++sink) {
    for (std::int64_t turn = 1; turn <= 8; ++turn) {
      const SlotMap map{0, sink, turn};
      WrittenSlots written(map);
      for (std::int64_t last = 0; last <= sink + 5 * turn; ++last) {
        for (std::int64_t first = std::max(sink, last - turn); first <= last; ++first) {
          std::int64_t next = first;
          for (const KvRun& run : map.runs(Pos{first}, Pos{last})) {
            if (run.count == 0) continue;
            ASSERT_EQ(run.first_pos, Pos{next});
            ASSERT_LE(run.first_slot.value + run.count, sink + turn);
            for (std::int64_t i = 0; i < run.count; ++i, ++next) {
              ASSERT_EQ(written.owners().at(run.first_slot.value + i), next)
                  << "sink " << sink << ", turn " << turn << ", [" << first << ", " << last << ")";
            }
          }
          ASSERT_EQ(next, last);
        }
        written.write(last);
      }
    }
  }
}

TEST(SlotMap, HasNoRunsOfNothing) {
  for (const SlotMap map : {SlotMap{0, 4, 16}, SlotMap{}}) {
    for (const std::int64_t first : {4, 5, 100}) {
      for (const KvRun& run : map.runs(Pos{first}, Pos{first})) EXPECT_EQ(run.count, 0);
      for (const KvRun& run : map.runs(Pos{first}, Pos{2})) EXPECT_EQ(run.count, 0);
    }
  }
}

TEST(SlotMap, CountsBeyond32Bits) {
  const std::int64_t far = (std::int64_t{1} << 40) + 3;
  const SlotMap map{0, 16, 64};
  EXPECT_EQ(map.slot(Pos{far}).value, 16 + (far - 16) % 64);
  EXPECT_TRUE(map.keeps(Pos{far - 64}, far));
  EXPECT_FALSE(map.keeps(Pos{far - 65}, far));
  const auto [older, newer] = map.runs(Pos{far - 64}, Pos{far});
  EXPECT_EQ(older.count + newer.count, 64);
  EXPECT_EQ(newer.first_pos.value, far - newer.count);
}

}  // namespace
}  // namespace headwise
