// SPDX-License-Identifier: MIT
// Which chunks decode attends, in items of which size.
#include <gtest/gtest.h>

#include <cstdint>

#include "headwise/attention/cuda/chunk_rule.cuh"

namespace headwise::test {
namespace {

using cuda::ChunkRule;
using cuda::DecodeSize;

TEST(CudaChunkRule, ChoosesTheSmallestItemsThatHoldAllRows) {
  for (int group = 1; group <= cuda::kMostGroup; ++group) {
    const ChunkRule rule{group};
    for (std::int64_t tokens = 1; tokens <= 70; ++tokens) {
      const std::int64_t rows = tokens * group;
      const int size = rule.decode_size(tokens);
      if (tokens > 1 && rows > 64) {
        EXPECT_EQ(size, ChunkRule::kNone) << group << " " << tokens;
        EXPECT_TRUE(cuda::is_prefilled(tokens, group));
        continue;
      }
      EXPECT_FALSE(cuda::is_prefilled(tokens, group));
      ASSERT_GE(size, tokens == 1 ? 0 : 1);  // the first size knows no chunks
      EXPECT_GE(DecodeSize(size).rows * rule.items_a_head(size), rows);
      if (size > 1 || (size == 1 && tokens == 1)) EXPECT_GT(rows, DecodeSize(size - 1).rows);
      if (rows <= 64) EXPECT_LE(rows, DecodeSize(size).rows) << "K and V are read once";
    }
  }
}

TEST(CudaChunkRule, CutsIntoSmallerItemsWhereADeviceHasNoRoomForLargeOnes) {
  for (int largest = 1; largest < DecodeSize::kCount; ++largest) {
    const ChunkRule rule{4, largest};
    for (const std::int64_t tokens : {1, 2, 4, 5, 8, 16}) {
      const int size = rule.decode_size(tokens);
      ASSERT_LE(size, largest);
      EXPECT_GE(DecodeSize(size).rows * rule.items_a_head(size), tokens * 4);
    }
    EXPECT_EQ(rule.decode_size(17), ChunkRule::kNone) << "whatever the device";
  }
}

TEST(CudaChunkRule, NoTokensAreNobodys) {
  EXPECT_EQ(ChunkRule{4}.decode_size(0), ChunkRule::kNone);
  EXPECT_FALSE(cuda::is_prefilled(0, 4));
}

}  // namespace
}  // namespace headwise::test
