// SPDX-License-Identifier: MIT
#include "headwise/core/kv_view.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/cache/rows/tiled_rows.hpp"
#include "headwise/core/dtype.hpp"

namespace headwise {
namespace {

using View = KvView<TiledRows<f16>>;

TEST(KvView, LeavesEmptyRunsOut) {
  View view;
  EXPECT_TRUE(view.runs().empty());
  EXPECT_EQ(view.num_rows(), 0);
  view.add_run({Slot{0}, Pos{0}, 0});
  view.add_run({Slot{4}, Pos{100}, 7});
  view.add_run({Slot{0}, Pos{0}, -1});
  view.add_run({Slot{0}, Pos{107}, 3});
  ASSERT_EQ(view.runs().size(), 2U);
  EXPECT_EQ(view.runs()[0].first_pos, Pos{100});
  EXPECT_EQ(view.runs()[1].first_slot, Slot{0});
  EXPECT_EQ(view.num_rows(), 10);
}

TEST(KvView, HasRoomForSinksAndTwoRunsOfARing) {
  View view;
  for (std::int64_t i = 0; i < 3; ++i) view.add_run({Slot{i * 10}, Pos{i * 10}, 10});
  EXPECT_EQ(view.num_rows(), 30);
}

TEST(KvView, FindsThePageOfASlot) {
  const std::vector<std::int32_t> table{5, 0, 3};
  std::vector<std::byte> pages(6 * 64);
  const View view = View::over_pages(pages.data(), 64, table.data(), {16, 16, 16});
  const auto page = [&](std::int64_t slot) {
    return (view.page_of(Slot{slot}) - pages.data()) / 64;
  };
  EXPECT_EQ(page(0), 5);
  EXPECT_EQ(page(15), 5);
  EXPECT_EQ(page(16), 0);
  EXPECT_EQ(page(47), 3);
}

TEST(KvView, IsOverAnEnginesOwnArrays) {
  // [token][kv_head][dim] of 2 heads of width 16, V of 3 heads of width 32, elsewhere.
  constexpr std::int64_t kTokens = 150;
  const std::vector<float> k(kTokens * 2 * 16), v(kTokens * 3 * 32);
  using Rows = KvView<PlainRows<float>>;
  const Rows view = Rows::over_rows(k.data() + 16, v.data() + 64, 32, 96, kTokens, 16, 32);
  EXPECT_EQ(view.num_rows(), kTokens);
  ASSERT_EQ(view.runs().size(), 1U);
  for (const std::int64_t pos : {0, 1, 63, 64, 149}) {
    const auto page = view.page_of(Slot{pos});
    const std::int64_t row = pos % view.shape.page_tokens;
    EXPECT_EQ(page.k + row * page.k_stride, k.data() + pos * 32 + 16);
    EXPECT_EQ(page.v + row * page.v_stride, v.data() + pos * 96 + 64);
  }
  EXPECT_EQ(Rows::over_rows(k.data(), v.data(), 32, 96, 0, 16, 32).num_runs, 0);
}

TEST(KvView, AddressesPagesBeyond32Bits) {
  // No memory is touched: the last page of the largest pool, 32 KiB a page, slots beyond 2^31.
  const std::int64_t page_tokens = 1 << 24;
  const std::int64_t slot = (std::int64_t{1} << 33) + 5;
  std::vector<std::int32_t> table(static_cast<std::size_t>(slot / page_tokens + 1), -1);
  table.back() = std::numeric_limits<std::int32_t>::max();
  View view = View::over_pages(reinterpret_cast<const std::byte*>(std::uintptr_t{1} << 20),
                               std::size_t{32} << 10, table.data(),
                               {static_cast<int>(page_tokens), 16, 16});
  EXPECT_EQ(
      reinterpret_cast<std::uintptr_t>(view.page_of(Slot{slot})),
      (std::uintptr_t{1} << 20) + ((std::uintptr_t{1} << 31) - 1) * (std::uintptr_t{32} << 10));

  view.add_run({Slot{0}, Pos{0}, slot});
  view.add_run({Slot{0}, Pos{slot}, slot});
  EXPECT_EQ(view.num_rows(), 2 * slot);
}

}  // namespace
}  // namespace headwise
