// SPDX-License-Identifier: MIT
#include "headwise/attention/cpu/query_rows.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "support/attention_cases.hpp"
#include "support/isa_types.hpp"

namespace headwise::test {
namespace {

/// softmax_row() with the sum that its lanes add up to.
template <class Isa>
float softmax_row(float* scores, const detail::VisibleRows& seen, int rows_end, float& max,
                  float& sum) {
  float lanes[detail::kTile] = {sum};
  const float shrink = detail::softmax_row<Isa>(scores, seen, rows_end, max, lanes);
  sum = simd::Ops<Isa>::reduce_add(simd::Ops<Isa>::load(lanes));
  return shrink;
}

template <class Isa>
class SoftmaxRow : public ::testing::Test {};
TYPED_TEST_SUITE(SoftmaxRow, AllIsas, IsaNames);

TYPED_TEST(SoftmaxRow, LetsNoNanOfAHiddenLaneThrough) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  AlignedFloats scores(detail::kBlockRows);
  std::fill_n(scores.data(), detail::kBlockRows, nan);
  // Rows 18, 19 and 40 of a block whose rows 18 to 40 exist.
  scores.data()[18] = 1.0F;
  scores.data()[19] = 3.0F;
  scores.data()[40] = 2.0F;
  float max = kNoScore, sum = 0.0F;
  softmax_row<TypeParam>(scores.data(), {18, 20, 40, 41}, 41, max, sum);
  EXPECT_EQ(max, 3.0F);
  EXPECT_NEAR(sum, std::exp(-2.0F) + 1.0F + std::exp(-1.0F), 1e-6F);
  for (int i = 18; i < 41; ++i) {
    const bool seen = i == 18 || i == 19 || i == 40;
    EXPECT_EQ(scores.data()[i] > 0.0F, seen) << i;
    EXPECT_TRUE(seen || scores.data()[i] == 0.0F) << i;
  }
}

TYPED_TEST(SoftmaxRow, LeavesAQueryThatSeesNothingAsItWas) {
  AlignedFloats scores(detail::kBlockRows);
  std::fill_n(scores.data(), detail::kBlockRows, std::numeric_limits<float>::quiet_NaN());
  float max = 0.25F, sum = 2.0F;
  EXPECT_EQ(softmax_row<TypeParam>(scores.data(), {3, 3, 3, 3}, 30, max, sum), 1.0F);
  EXPECT_EQ(max, 0.25F);
  EXPECT_EQ(sum, 2.0F);
  for (int i = 3; i < 30; ++i) EXPECT_EQ(scores.data()[i], 0.0F);
}

TYPED_TEST(SoftmaxRow, ShrinksEarlierSumsWhenTheMaxRises) {
  AlignedFloats scores(detail::kBlockRows);
  std::fill_n(scores.data(), 16, 5.0F);
  float max = 4.0F, sum = 2.0F;
  const float shrink = softmax_row<TypeParam>(scores.data(), {0, 0, 0, 16}, 16, max, sum);
  EXPECT_NEAR(shrink, std::exp(-1.0F), 1e-7F);
  EXPECT_NEAR(sum, 2.0F * shrink + 16.0F, 1e-5F);
}

TYPED_TEST(SoftmaxRow, IgnoresSumsOfNothing) {
  AlignedFloats scores(detail::kBlockRows);
  std::fill_n(scores.data(), 16, -40.0F);
  float max = kNoScore, sum = 0.0F;
  EXPECT_EQ(softmax_row<TypeParam>(scores.data(), {0, 0, 0, 16}, 16, max, sum), 0.0F);
  EXPECT_EQ(sum, 16.0F);
}

TEST(QueryScratch, HoldsWhatLoadQueriesLaysOut) {
  PagedHead<TiledRows<f16>> head({.name = "", .group_size = 5, .queries = 3});
  const auto problem = head.problem();
  AlignedFloats scratch(detail::query_scratch_floats(15, 64));
  AlignedFloats state(detail::query_state_floats(15, 64));
  const auto rows =
      detail::load_queries<simd::BestIsa>(problem, 0, 3, scratch.data(), state.data());
  EXPECT_EQ(rows.num_rows(), 15);
  EXPECT_EQ(rows.weight + 16, scratch.data() + detail::query_scratch_floats(15, 64));
  EXPECT_EQ(rows.out + 15 * 64, state.data() + detail::query_state_floats(15, 64));
  EXPECT_EQ(rows.q[64 * 7 + 3], problem.scale * problem.q.row(1, 2)[3]);
}

TEST(QueryScratch, LaysQOutInPanels) {
  PagedHead<TiledRows<f16>> head({.name = "", .k_dim = 80, .group_size = 5, .queries = 3});
  const auto problem = head.problem();
  AlignedFloats scratch(detail::query_scratch_floats(15, 80));
  AlignedFloats state(detail::query_state_floats(15, 64));
  const auto rows =
      detail::load_queries<simd::BestIsa>(problem, 0, 3, scratch.data(), state.data());
  EXPECT_EQ(rows.weight + 16, scratch.data() + detail::query_scratch_floats(15, 80));
  EXPECT_EQ(rows.q[64 * 7 + 3], problem.scale * problem.q.row(1, 2)[3]);
  EXPECT_EQ(rows.q[64 * (15 + 7) + 9], problem.scale * problem.q.row(1, 2)[64 + 9]);
}

}  // namespace
}  // namespace headwise::test
