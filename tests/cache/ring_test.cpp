// SPDX-License-Identifier: MIT
#include "headwise/cache/ring.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace headwise {
namespace {

TEST(Ring, RoundsToPages) {
  static_assert(ceil_div(0, 16) == 0 && ceil_div(1, 16) == 1 && ceil_div(16, 16) == 1);
  static_assert(round_up(0, 16) == 0 && round_up(1, 16) == 16 && round_up(17, 16) == 32);
}

TEST(Ring, FollowsThePublishedAddresses) {
  // RLKV's pool with S = 16, R = 64 (its base of 1 taken off): position 80 overwrites 16.
  constexpr Ring kRing{16, 80};
  static_assert(kRing.slot(Pos{15}) == Slot{15});
  static_assert(kRing.slot(Pos{16}) == Slot{16});
  static_assert(kRing.slot(Pos{79}) == Slot{79});
  static_assert(kRing.slot(Pos{80}) == Slot{16});
  static_assert(kRing.slot(Pos{143}) == Slot{79});
  static_assert(kRing.slot(Pos{144}) == Slot{16});
}

/// Writes positions into slots one after the other and asks who lies where.
class WrittenRing {
 public:
  explicit WrittenRing(Ring ring) : ring_(ring) {}
  void write(std::int64_t pos) { owner_[ring_.slot(Pos{pos}).value] = pos; }
  const std::map<std::int64_t, std::int64_t>& owners() const { return owner_; }

 private:
  Ring ring_;
  std::map<std::int64_t, std::int64_t> owner_;
};

TEST(Ring, RoundTripsAfterManyWraps) {
  for (std::int64_t sink = 0; sink <= 5; ++sink) {
    for (std::int64_t turn = 1; turn <= 9; ++turn) {
      const Ring ring{sink, sink + turn};
      WrittenRing written(ring);
      for (std::int64_t length = 1; length <= sink + 10 * turn + 3; ++length) {
        written.write(length - 1);
        // Exactly the sinks and the newest `turn` positions still have their row.
        std::vector<std::int64_t> kept;
        for (const auto& [slot, pos] : written.owners()) {
          ASSERT_GE(slot, 0);
          ASSERT_LT(slot, ring.rows);
          kept.push_back(pos);
        }
        ASSERT_EQ(static_cast<std::int64_t>(kept.size()), std::min(length, ring.rows));
        for (const std::int64_t pos : kept) {
          ASSERT_TRUE(pos < sink || pos >= ring.oldest_kept(length).value)
              << "sink " << sink << ", turn " << turn << ", length " << length;
        }
      }
    }
  }
}

TEST(Ring, RunsCoverExactlyThePositionsAskedFor) {
  for (std::int64_t sink = 0; sink <= 4; ++sink) {
    for (std::int64_t turn = 1; turn <= 8; ++turn) {
      const Ring ring{sink, sink + turn};
      WrittenRing written(ring);
      for (std::int64_t last = 0; last <= sink + 5 * turn; ++last) {
        for (std::int64_t first = ring.oldest_kept(last).value; first <= last; ++first) {
          std::int64_t next = first;
          for (const KvRun& run : ring.runs(Pos{first}, Pos{last})) {
            if (run.count == 0) continue;
            ASSERT_EQ(run.first_pos, Pos{next});
            ASSERT_LE(run.first_slot.value + run.count, ring.rows);
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

TEST(Ring, HasNoRunsOfNothing) {
  const Ring ring{4, 20};
  for (const std::int64_t first : {4, 5, 100}) {
    for (const KvRun& run : ring.runs(Pos{first}, Pos{first})) EXPECT_EQ(run.count, 0);
    for (const KvRun& run : ring.runs(Pos{first}, Pos{2})) EXPECT_EQ(run.count, 0);
  }
}

TEST(Ring, CountsBeyond32Bits) {
  const std::int64_t far = (std::int64_t{1} << 40) + 3;
  const Ring ring{16, 80};
  EXPECT_EQ(ring.slot(Pos{far}).value, 16 + (far - 16) % 64);
  EXPECT_EQ(ring.oldest_kept(far).value, far - 64);
  const auto [older, newer] = ring.runs(Pos{far - 64}, Pos{far});
  EXPECT_EQ(older.count + newer.count, 64);
  EXPECT_EQ(newer.first_pos.value, far - newer.count);
}

}  // namespace
}  // namespace headwise
