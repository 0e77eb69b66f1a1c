// SPDX-License-Identifier: MIT
#include "headwise/policies/pyramid_kv.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <numeric>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using Counts = std::vector<std::int64_t>;
std::int64_t sum(const Counts& counts) {
  return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
}

TEST(PyramidKv, HasTheCountsOfKvpress) {
  const pyramid_kv::Policy policy;
  EXPECT_EQ(policy.counts(4, 1000, 500, 8), (Counts{975, 658, 342, 25}));
  EXPECT_EQ(policy.counts(4, 32, 16, 4), (Counts{28, 20, 12, 4}));
  const Counts long_prompt = policy.counts(32, 4096, 2048, 64);
  EXPECT_EQ(long_prompt.front(), 3994);
  EXPECT_EQ(long_prompt[1], 3868);
  EXPECT_EQ(long_prompt[30], 228);
  EXPECT_EQ(long_prompt.back(), 102);
  EXPECT_EQ(sum(long_prompt), 65536);
}

TEST(PyramidKv, IsFlatBelowTwentyWindows) {
  const pyramid_kv::Policy policy;
  EXPECT_EQ(policy.counts(32, 4096, 1024, 64), Counts(32, 1024));  // 25 % of 4096
  EXPECT_EQ(policy.counts(8, 400, 50, 16), Counts(8, 50));
  EXPECT_EQ(policy.counts(8, 100, 10, 64), Counts(8, 10));
  for (std::int64_t mean = 1; mean < 20 * 64; ++mean) {
    EXPECT_EQ(policy.counts(4, 100000, mean, 64), Counts(4, mean));
  }
  EXPECT_NE(policy.counts(4, 100000, 20 * 64, 64), Counts(4, 20 * 64));
}

TEST(PyramidKv, HasTheIntegersOfKvCacheFactory) {
  const pyramid_kv::Policy policy;
  EXPECT_EQ(policy.integer_counts(4, 32, 12, 4), (Counts{20, 15, 10, 5}));  // 50 where flat is 48
  const Counts counts = policy.integer_counts(32, 4000, 128, 8);
  EXPECT_EQ(counts.front(), 234 + 8);
  EXPECT_EQ(counts[1], 227 + 8);
  EXPECT_EQ(counts.back(), 17 + 8);
  EXPECT_EQ(sum(counts), 4016 + 32 * 8);
  EXPECT_EQ(policy.integer_counts(4, 150, 128, 8), Counts(4, 128));
}

TEST(PyramidKv, OneLayerKeepsTheMeanAndNoneMoreThanThereIs) {
  const pyramid_kv::Policy policy;
  EXPECT_EQ(policy.counts(1, 1000, 500, 8), Counts{500});
  EXPECT_EQ(policy.integer_counts(1, 1000, 500, 8), Counts{500});
  EXPECT_EQ(policy.counts(3, 10, 500, 8), Counts(3, 10));
  for (const std::int64_t count : policy.integer_counts(3, 10, 500, 8)) EXPECT_LE(count, 10);
}

TEST(PyramidKv, RefusesWhatIsOutOfRange) {
  const pyramid_kv::Policy policy;
  EXPECT_THROW((void)policy.counts(0, 10, 5, 1), ConfigError);
  EXPECT_THROW((void)policy.counts(2, -1, 5, 1), ConfigError);
  EXPECT_THROW((void)policy.counts(2, 10, -5, 1), ConfigError);
  EXPECT_THROW((void)policy.counts(2, 10, 5, -1), ConfigError);
  EXPECT_THROW((void)pyramid_kv::Policy{.beta = 1}.counts(2, 10, 5, 1), ConfigError);
  EXPECT_EQ(testing::message_of<ConfigError>([&] { (void)policy.integer_counts(2, 10, 5, 8); }),
            "mean must be at least the window 8, got 5");
}

}  // namespace
}  // namespace headwise
