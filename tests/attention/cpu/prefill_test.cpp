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

template <class Types>
class CpuPrefill : public ::testing::Test {};
TYPED_TEST_SUITE(CpuPrefill, AllKernels, KernelNames);

TYPED_TEST(CpuPrefill, EqualsTheOracleOnEveryCase) {
  using Isa = typename TypeParam::Isa;
  for (const AttentionCase& c : attention_cases()) {
    PagedHead<typename TypeParam::Format> head(c);
    const auto problem = head.problem();
    prefill_in_tiles<Isa>(problem, prefill_tile_queries(c.group_size));
    EXPECT_LE(relative_error(head.out(), reference_attention(problem)), 1e-5) << c.name;
  }
}

TYPED_TEST(CpuPrefill, GivesTheSameForEveryTile) {
  using Isa = typename TypeParam::Isa;
  PagedHead<typename TypeParam::Format> head(
      {.name = "", .group_size = 4, .past = 70, .queries = 100, .window = {3, 50}});
  const auto problem = head.problem();
  const std::vector<double> truth = reference_attention(problem);
  for (const std::int64_t tile : {1, 2, 13, 48}) {
    prefill_in_tiles<Isa>(problem, tile);
    EXPECT_LE(relative_error(head.out(), truth), 1e-5) << tile;
  }
}

TEST(PrefillTileQueries, IsNeverZero) {
  EXPECT_EQ(prefill_tile_queries(4), 96);
  EXPECT_EQ(prefill_tile_queries(1), 384);
  EXPECT_EQ(prefill_tile_queries(1000), 1);
}

}  // namespace
}  // namespace headwise::test
