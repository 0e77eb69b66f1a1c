// SPDX-License-Identifier: MIT
#include "headwise/attention/scratch.hpp"

#include <gtest/gtest.h>

#include "headwise/cache/rows/plain_rows.hpp"

namespace headwise {
namespace {

CacheGeometry geometry(int max_sequences, std::int64_t max_context, std::size_t max_bytes = 0) {
  const ModelShape shape = ModelShape::uniform(2, 32, 8, 128);
  return {shape, HeadPlan(shape),
          CacheOptions{
              .max_bytes = max_bytes, .max_sequences = max_sequences, .max_context = max_context},
          &PlainRows<f16>::page_bytes};
}

TEST(ScratchSize, GrowsWithThreadsAndChunksOnly) {
  const CacheGeometry small = geometry(1, 4096);
  const std::size_t one = scratch_size(small, 1, 1).num_bytes;
  const std::size_t two = scratch_size(small, 1, 2).num_bytes;
  EXPECT_EQ(two - one, thread_scratch_floats(small.layers()[0].shape) * sizeof(float));
  EXPECT_GT(scratch_size(small, 8, 1).num_bytes, one) << "more query rows, larger partials";
  EXPECT_EQ(scratch_size(small, 16, 1).num_bytes, scratch_size(small, 4096, 1).num_bytes)
      << "beyond 64 query rows tiles of queries need no partials";
}

TEST(ScratchSize, IsBoundedByThePool) {
  // 64 sequences that could be 1 M tokens long share a pool of 1 GiB: there are never more full
  // splits than the pool has rows for.
  const std::size_t pooled =
      scratch_size(geometry(64, 1 << 20, std::size_t{1} << 30), 1, 1).num_bytes;
  const std::size_t unbounded = scratch_size(geometry(64, 1 << 20), 1, 1).num_bytes;
  EXPECT_LT(pooled, unbounded / 20);
}

TEST(ScratchSize, HasACounterForEveryHeadOfEverySequence) {
  EXPECT_EQ(scratch_size(geometry(5, 100), 1, 1).num_counters, 40U);
}

}  // namespace
}  // namespace headwise
