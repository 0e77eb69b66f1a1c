// SPDX-License-Identifier: MIT
#include "headwise/core/window.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <set>

#include "support/errors.hpp"

namespace headwise {
namespace {

using testing::message_of;

/// What a query at `i` sees, by keeping a list: the first `sink` tokens and the newest `recent`.
std::set<std::int64_t> seen_by_list(std::int64_t sink, std::int64_t recent, std::int64_t i) {
  std::set<std::int64_t> seen;
  for (std::int64_t j = 0; j < sink && j <= i; ++j) seen.insert(j);
  for (std::int64_t count = 0; count < recent && i - count >= 0; ++count) seen.insert(i - count);
  return seen;
}

std::set<std::int64_t> seen_by_window(const Window& window, std::int64_t i, std::int64_t keys) {
  std::set<std::int64_t> seen;
  for (std::int64_t j = 0; j < keys; ++j) {
    if (window.sees(Pos{i}, Pos{j})) seen.insert(j);
  }
  return seen;
}

TEST(Window, SeesExactlySinksAndRecentTokens) {
  for (std::int64_t sink = 0; sink <= 5; ++sink) {
    for (std::int64_t recent = 1; recent <= 7; ++recent) {
      for (std::int64_t i = 0; i < 24; ++i) {
        EXPECT_EQ(seen_by_window({sink, recent}, i, 24), seen_by_list(sink, recent, i))
            << "sink " << sink << ", recent " << recent << ", query " << i;
      }
    }
  }
}

TEST(Window, CountsTheCurrentTokenAsRecent) {
  EXPECT_EQ(seen_by_window({1, 2}, 16, 17), (std::set<std::int64_t>{0, 15, 16}));
  EXPECT_EQ(seen_by_window({0, 1}, 16, 17), (std::set<std::int64_t>{16}));
}

TEST(Window, FromExclusiveSeesOneMore) {
  // EXCL keeps a list too: the sinks, `past` tokens before the current one, and the current one.
  for (std::int64_t sink = 0; sink <= 4; ++sink) {
    for (std::int64_t past = 0; past <= 5; ++past) {
      const Window window = Window::from_exclusive(sink, past);
      EXPECT_EQ(window, (Window{sink, past + 1}));
      for (std::int64_t i = 0; i < 16; ++i) {
        std::set<std::int64_t> seen{i};
        for (std::int64_t j = 0; j < i; ++j) {
          if (j < sink || j >= i - past) seen.insert(j);
        }
        EXPECT_EQ(seen_by_window(window, i, 16), seen);
      }
    }
  }
  EXPECT_EQ(seen_by_window(Window::from_exclusive(1, 2), 16, 17),
            (std::set<std::int64_t>{0, 14, 15, 16}));  // DuoAttention's decode
}

TEST(Window, FromExclusiveRefusesWhatOverflows) {
  EXPECT_EQ(Window::from_exclusive(kMaxTokens, kMaxTokens - 1), (Window{kMaxTokens, kMaxTokens}));
  EXPECT_EQ(message_of<ConfigError>([] { (void)Window::from_exclusive(4, INT64_MAX); }),
            "past must be in [0, 1099511627775], got 9223372036854775807");
  EXPECT_THROW((void)Window::from_exclusive(4, Window::kUnbounded - 1), ConfigError);
  EXPECT_THROW((void)Window::from_exclusive(4, -1), ConfigError);
  EXPECT_THROW((void)Window::from_exclusive(-1, 4), ConfigError);
  EXPECT_THROW((void)Window::from_exclusive(INT64_MAX, 4), ConfigError);
}

TEST(Window, EverythingIsPlainCausality) {
  constexpr Window kAll = Window::everything();
  static_assert(!kAll.bounded() && Window{4, 60}.bounded());
  for (std::int64_t i = 0; i < 12; ++i) {
    for (std::int64_t j = 0; j < 12; ++j) EXPECT_EQ(kAll.sees(Pos{i}, Pos{j}), j <= i);
  }
  EXPECT_EQ(kAll, Window{});
}

TEST(Window, OldestRecentIsTheFirstSeenBehindTheSinks) {
  for (std::int64_t recent = 1; recent <= 6; ++recent) {
    for (std::int64_t i = 0; i < 20; ++i) {
      EXPECT_EQ((Window{0, recent}).oldest_recent(Pos{i}).value,
                *seen_by_list(0, recent, i).begin());
    }
  }
  EXPECT_EQ(Window::everything().oldest_recent(Pos{99}), Pos{0});
}

TEST(Window, HoldsFarBeyond32Bits) {
  const std::int64_t far = std::int64_t{1} << 40;
  const Window window{16, 64};
  EXPECT_TRUE(window.sees(Pos{far}, Pos{far - 63}));
  EXPECT_FALSE(window.sees(Pos{far}, Pos{far - 64}));
  EXPECT_TRUE(window.sees(Pos{far}, Pos{15}));
  EXPECT_FALSE(window.sees(Pos{far}, Pos{16}));
  EXPECT_FALSE(window.sees(Pos{far}, Pos{far + 1}));
  EXPECT_TRUE(Window::everything().sees(Pos{far}, Pos{0}));
}

TEST(Window, SeesEverythingBelowFrom) {
  constexpr Window kWindow{2, 3, 10};
  for (std::int64_t query = 0; query < 20; ++query) {
    for (std::int64_t key = 0; key < 20; ++key) {
      const bool windowed = key < 2 || query - key < 3;
      EXPECT_EQ(kWindow.sees(Pos{query}, Pos{key}), key <= query && (query < 10 || windowed));
    }
    EXPECT_EQ(kWindow.oldest_recent(Pos{query}), Pos{query < 10 ? 0 : query - 2}) << query;
  }
}

}  // namespace
}  // namespace headwise
