// SPDX-License-Identifier: MIT
#include "headwise/attention/cpu/prefill.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "headwise/attention/reference.hpp"
#include "support/attention_cases.hpp"
#include "support/isa_types.hpp"
#include "support/run_kernels.hpp"

namespace headwise::test {
namespace {

class CpuPrefill : public ::testing::TestWithParam<KernelPair> {};
INSTANTIATE_TEST_SUITE_P(AllKernels, CpuPrefill, ::testing::ValuesIn(all_kernels()),
                         name_of_kernels<KernelPair>);

class CpuPrefillOfFormat : public ::testing::TestWithParam<KernelFormat> {};
INSTANTIATE_TEST_SUITE_P(AllFormats, CpuPrefillOfFormat, ::testing::ValuesIn(all_formats()),
                         name_of_kernels<KernelFormat>);

TEST_P(CpuPrefillOfFormat, EqualsTheOracleOnEveryCaseAndIsa) {
  for (const AttentionCase& c : attention_cases()) {
    const std::vector<double> truth = GetParam().isas.front().head(c)->truth();
    for (const KernelPair& kernels : GetParam().isas) {
      const auto head = kernels.head(c);
      head->prefill(prefill_tile_queries(c.group_size));
      EXPECT_LE(relative_error(head->out(), truth), 1e-5) << kernels.name << ", " << c.name;
    }
  }
}

TEST_P(CpuPrefill, GivesTheSameForEveryTile) {
  const auto head =
      GetParam().head({.name = "", .group_size = 4, .past = 70, .queries = 100, .window = {3, 50}});
  const std::vector<double> truth = head->truth();
  for (const std::int64_t tile : {1, 2, 13, 48}) {
    head->prefill(tile);
    EXPECT_LE(relative_error(head->out(), truth), 1e-5) << tile;
  }
}

TEST(PrefillTileQueries, IsNeverZero) {
  EXPECT_EQ(prefill_tile_queries(4), 96);
  EXPECT_EQ(prefill_tile_queries(1), 384);
  EXPECT_EQ(prefill_tile_queries(1000), 1);
}

}  // namespace
}  // namespace headwise::test
