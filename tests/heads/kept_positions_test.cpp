// SPDX-License-Identifier: MIT
#include "headwise/heads/kept_positions.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace headwise {
namespace {

TEST(KeptPositions, GiveBackWhatEachHeadWasGiven) {
  KeptPositions kept;
  EXPECT_EQ(kept.num_heads(), 0);
  const std::vector<std::int32_t> first{1, 5, 9};
  const std::vector<std::int32_t> third{0};
  kept.add_head(first);
  kept.add_head({});
  kept.add_head(third);
  ASSERT_EQ(kept.num_heads(), 3);
  EXPECT_EQ(kept.num_positions(), 4);
  EXPECT_TRUE(
      std::equal(first.begin(), first.end(), kept.of_head(0).begin(), kept.of_head(0).end()));
  EXPECT_TRUE(kept.of_head(1).empty());
  EXPECT_EQ(kept.of_head(2)[0], 0);
  const KeptPositions same = kept;
  EXPECT_EQ(same, kept);
  kept.clear();
  EXPECT_EQ(kept.num_heads(), 0);
  EXPECT_EQ(kept, KeptPositions{});
}

}  // namespace
}  // namespace headwise
