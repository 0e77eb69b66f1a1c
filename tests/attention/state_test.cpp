// SPDX-License-Identifier: MIT
#include "headwise/attention/state.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "support/isa_types.hpp"

namespace headwise::test {
namespace {

constexpr int kStateDim = 16;

/// A state with memory of its own.
struct Owned {
  std::array<float, kStateDim> out{};
  SoftmaxState state{kNoScore, 0.0F, nullptr};
  SoftmaxState& get() {
    state.out = out.data();
    return state;
  }
};

/// The state of one row.
Owned one_row(float score, float value) {
  Owned owned;
  owned.out.fill(value);
  owned.state.max = score;
  owned.state.sum = 1.0F;
  return owned;
}

template <class Isa>
class SoftmaxStateMerge : public ::testing::Test {};
TYPED_TEST_SUITE(SoftmaxStateMerge, AllIsas, IsaNames);

TYPED_TEST(SoftmaxStateMerge, IsOrderFree) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0.0F, 20.0F);
  std::vector<std::pair<float, float>> rows;
  for (int i = 0; i < 12; ++i) rows.emplace_back(normal(random), normal(random));

  double sum = 0.0, weighted = 0.0;
  for (const auto& [score, value] : rows) {
    sum += std::exp(static_cast<double>(score));
    weighted += std::exp(static_cast<double>(score)) * static_cast<double>(value);
  }
  for (int order = 0; order < 20; ++order) {
    std::shuffle(rows.begin(), rows.end(), random);
    Owned left, right;  // grouped as well as ordered
    for (std::size_t i = 0; i < rows.size(); ++i) {
      Owned row = one_row(rows[i].first, rows[i].second);
      merge<TypeParam>((i % 3 == 0 ? left : right).get(), row.get(), kStateDim);
    }
    merge<TypeParam>(left.get(), right.get(), kStateDim);
    write_output<TypeParam>(left.get(), left.out.data(), kStateDim);
    for (const float x : left.out) EXPECT_NEAR(static_cast<double>(x), weighted / sum, 1e-5);
    EXPECT_NEAR(static_cast<double>(left.state.lse()), std::log(sum), 1e-5);
  }
}

TYPED_TEST(SoftmaxStateMerge, LeavesAStateAloneWhenNothingIsAdded) {
  Owned row = one_row(-3.0F, 2.5F);
  Owned nothing;
  nothing.out.fill(std::numeric_limits<float>::quiet_NaN());  // never read
  merge<TypeParam>(row.get(), nothing.get(), kStateDim);
  EXPECT_EQ(row.state.max, -3.0F);
  EXPECT_EQ(row.state.sum, 1.0F);
  EXPECT_EQ(row.out[7], 2.5F);
}

TYPED_TEST(SoftmaxStateMerge, OfNothingIntoNothingIsEmpty) {
  Owned a, b;
  merge<TypeParam>(a.get(), b.get(), kStateDim);
  EXPECT_TRUE(a.state.empty());
  EXPECT_EQ(a.state.lse(), -std::numeric_limits<float>::infinity());
  write_output<TypeParam>(a.get(), a.out.data(), kStateDim);
  EXPECT_EQ(a.out[0], 0.0F);
}

TYPED_TEST(SoftmaxStateMerge, SurvivesScoresAtBothEndsOfTheRange) {
  Owned low = one_row(-1e30F, 1.0F);
  Owned high = one_row(1e30F, 2.0F);
  merge<TypeParam>(low.get(), high.get(), kStateDim);
  write_output<TypeParam>(low.get(), low.out.data(), kStateDim);
  EXPECT_EQ(low.out[0], 2.0F);
}

TYPED_TEST(SoftmaxStateMerge, OfOutputsAsLargeAsFloatsGetDoesNotOverflow) {
  Owned all = one_row(0.0F, 3e38F);
  for (int i = 0; i < 100; ++i) {
    Owned row = one_row(0.0F, 3e38F);
    merge<TypeParam>(all.get(), row.get(), kStateDim);
  }
  EXPECT_NEAR(static_cast<double>(all.out[3]) * 1e-38, 3.0, 1e-5);
  EXPECT_EQ(all.state.sum, 101.0F);
}

TYPED_TEST(SoftmaxStateMerge, KeepsANan) {
  Owned row = one_row(1.0F, 2.0F);
  Owned nan = one_row(std::numeric_limits<float>::infinity(), 1.0F);
  nan.state.sum = std::numeric_limits<float>::quiet_NaN();
  Owned into = one_row(1.0F, 2.0F);
  merge<TypeParam>(into.get(), nan.get(), kStateDim);
  EXPECT_TRUE(std::isnan(into.out[0]));
  merge<TypeParam>(nan.get(), row.get(), kStateDim);
  EXPECT_TRUE(std::isnan(nan.out[0]));
  EXPECT_FALSE(nan.state.empty());
}

}  // namespace
}  // namespace headwise::test
