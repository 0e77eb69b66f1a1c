// SPDX-License-Identifier: MIT
#include "headwise/heads/head_grid.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using detail::HeadGrid;
using testing::message_of;

TEST(HeadGrid, NumbersTheHeadsOfUnequalLayersInOrder) {
  const std::vector<int> heads{2, 1, 3};
  const HeadGrid grid(heads, "a test");
  EXPECT_EQ(grid.num_layers(), 3);
  EXPECT_EQ(grid.num_heads(), 6U);
  EXPECT_EQ(grid.heads_per_layer(), heads);
  std::size_t next = 0;
  for (int layer = 0; layer < 3; ++layer) {
    EXPECT_EQ(grid.first_of(layer), next);
    for (int head = 0; head < grid.num_heads(layer); ++head) {
      EXPECT_EQ(grid.index(layer, head), next++);
    }
  }
}

TEST(HeadGrid, NamesItsOwnerAndTheLayerWithoutHeads) {
  EXPECT_EQ(message_of<ConfigError>([] { HeadGrid(std::vector<int>{}, "a test"); }),
            "a test needs at least 1 layer, got 0");
  EXPECT_EQ(message_of<ConfigError>([] {
              HeadGrid(std::vector<int>{1, -2}, "a test");
            }),
            "layer 1: a test needs at least 1 head, got -2");
}

}  // namespace
}  // namespace headwise
