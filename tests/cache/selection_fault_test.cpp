// SPDX-License-Identifier: MIT
#include "headwise/cache/selection_fault.hpp"

#include <gtest/gtest.h>

namespace headwise {
namespace {

using Kind = SelectionFault::Kind;

TEST(SelectionFault, SaysHeadValueAndLimit) {
  EXPECT_EQ(SelectionFault{}.to_string(), "");
  EXPECT_EQ((SelectionFault{Kind::kNumHeads, -1, -1, 7, 8}).to_string(),
            "kept positions of 7 KV heads, the cache has 8");
  EXPECT_EQ((SelectionFault{Kind::kNotSelectable, 2, 1, 5, 0}).to_string(),
            "layer 2, KV head 1: 5 kept positions, but nothing is selected from it");
  EXPECT_EQ((SelectionFault{Kind::kOutOfRange, 0, 3, -4, 100}).to_string(),
            "layer 0, KV head 3: position -4 is outside [0, 100)");
  EXPECT_EQ((SelectionFault{Kind::kNotAscending, 0, 3, 4, 4}).to_string(),
            "layer 0, KV head 3: position 4 follows 4: positions must ascend");
  EXPECT_EQ((SelectionFault{Kind::kNotStored, 0, 3, 4, 64}).to_string(),
            "layer 0, KV head 3: position 4 was dropped by the selection at length 64");
}

}  // namespace
}  // namespace headwise
