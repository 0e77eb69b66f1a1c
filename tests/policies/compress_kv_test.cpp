// SPDX-License-Identifier: MIT
#include "headwise/policies/compress_kv.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <numeric>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using Counts = std::vector<std::int64_t>;

TEST(CompressKv, SharesTokensAmongLayersAsTheReleasedCode) {
  const compress_kv::Policy policy;
  EXPECT_EQ(policy.counts(std::vector{0.1, 0.2, 0.3, 0.4}, 64), (Counts{45, 58, 70, 83}));
  EXPECT_EQ(policy.counts(std::vector{0.05, 0.05, 0.1, 0.8}, 64), (Counts{38, 38, 45, 135}));
  std::vector<double> one(8, 0.1 / 7.0);
  one[0] = 0.9;
  EXPECT_EQ(policy.counts(one, 64), (Counts{192, 46, 46, 46, 46, 46, 45, 45}));
}

TEST(CompressKv, SpendsTheMeanExactly) {
  const std::vector<double> importance{.0184, .019,  .0363, .0281, .028,  .0368, .0261, .0307,
                                       .0442, .0426, .0439, .0395, .0182, .043,  .0374, .0377,
                                       .0303, .0354, .0346, .0362, .042,  .0252, .0346, .0376,
                                       .034,  .0289, .0284, .0319, .0222, .0182, .0234, .0071};
  const Counts counts = compress_kv::Policy{}.counts(importance, 256);
  EXPECT_EQ(counts, (Counts{164, 168, 292, 233, 233, 296, 219, 252, 349, 337, 347,
                            315, 162, 340, 300, 302, 249, 286, 280, 292, 333, 213,
                            280, 302, 276, 239, 236, 261, 191, 162, 200, 83}));
  for (const std::int64_t mean : {0, 1, 20, 31, 32, 33, 1000}) {
    const Counts other = compress_kv::Policy{}.counts(importance, mean);
    EXPECT_EQ(std::accumulate(other.begin(), other.end(), std::int64_t{0}), 32 * mean);
  }
}

TEST(CompressKv, RefusesWhatIsOutOfRange) {
  const compress_kv::Policy policy;
  EXPECT_THROW((void)policy.counts({}, 64), ConfigError);
  EXPECT_THROW((void)policy.counts(std::vector{1.0}, -1), ConfigError);
  EXPECT_THROW((void)policy.counts(std::vector{0.0, 0.0}, 64), ConfigError);
  EXPECT_EQ(testing::message_of<ConfigError>([&] {
              (void)policy.counts(std::vector{0.5, -0.5}, 64);
            }),
            "layer 1: an importance must be finite and >= 0, got -0.5");
}

}  // namespace
}  // namespace headwise
