// SPDX-License-Identifier: MIT
#include "headwise/attention/cpu/visibility.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <set>

namespace headwise::test {
namespace {

const Window kWindows[] = {Window::everything(),
                           {0, 1},
                           {0, 3},
                           {2, 1},
                           {2, 3},
                           {5, 4},
                           {9, 2},
                           {2, 3, 7},
                           {0, 1, 5},
                           {4, 2, 20}};

TEST(VisibleRows, AreThoseOfTheWindowRule) {
  for (const Window& window : kWindows) {
    for (std::int64_t query = 0; query < 14; ++query) {
      for (std::int64_t row0 = -3; row0 < 12; ++row0) {
        for (int first = row0 < 0 ? 3 : 0; first < 6; ++first) {
          for (int last = first; last < 8; ++last) {
            const auto rows = detail::visible_rows(window, Pos{query}, Pos{row0}, first, last);
            int count = 0;
            for (int row = first; row < last; ++row) {
              const bool sees = window.sees(Pos{query}, Pos{row0 + row});
              const bool claimed = (row >= rows.first && row < rows.hole_first) ||
                                   (row >= rows.hole_last && row < rows.last);
              ASSERT_EQ(sees, claimed) << query << ' ' << row0 << ' ' << row;
              count += sees;
            }
            ASSERT_EQ(rows.count(), count);
          }
        }
      }
    }
  }
}

TEST(ForEachSeen, CoversEveryVisibleRowOnceAndInOrder) {
  for (const Window& window : kWindows) {
    for (std::int64_t oldest = 0; oldest < 12; ++oldest) {
      for (std::int64_t newest = oldest; newest < 14; ++newest) {
        for (std::int64_t first = 0; first < 10; ++first) {
          std::int64_t before = 0;
          std::set<std::int64_t> rows;
          detail::for_each_seen(window, Pos{oldest}, Pos{newest}, Pos{first}, 9,
                                [&](std::int64_t begin, std::int64_t end) {
                                  ASSERT_LE(before, begin);
                                  ASSERT_LT(begin, end);
                                  before = end;
                                  for (; begin < end; ++begin) rows.insert(begin);
                                });
          ASSERT_LE(before, 9);
          for (std::int64_t row = 0; row < 9; ++row) {
            bool seen = false;
            for (std::int64_t q = oldest; q <= newest; ++q) {
              seen |= window.sees(Pos{q}, Pos{first + row});
            }
            ASSERT_TRUE(!seen || rows.contains(row));
          }
        }
      }
    }
  }
}

TEST(ForEachSeen, LeavesOutWhatNoQuerySees) {
  std::int64_t rows = 0;
  detail::for_each_seen({64, 256}, Pos{100000}, Pos{100095}, Pos{0}, 100096,
                        [&](std::int64_t begin, std::int64_t end) { rows += end - begin; });
  EXPECT_EQ(rows, 64 + 255 + 96);
}

TEST(SeeingQueries, AreExactlyThoseThatSeeARow) {
  for (const Window& window : kWindows) {
    for (std::int64_t first_query = 0; first_query < 8; ++first_query) {
      for (std::int64_t oldest = 0; oldest < 12; ++oldest) {
        for (std::int64_t newest = oldest; newest < 14; ++newest) {
          const auto queries =
              detail::seeing_queries(window, Pos{first_query}, 6, Pos{oldest}, Pos{newest});
          for (int i = 0; i < 6; ++i) {
            bool sees = false;
            for (std::int64_t key = oldest; key <= newest; ++key) {
              sees |= window.sees(Pos{first_query + i}, Pos{key});
            }
            ASSERT_EQ(sees, i >= queries.first && i < queries.last);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace headwise::test
