// SPDX-License-Identifier: MIT
#include "headwise/core/tensor_view.hpp"

#include <gtest/gtest.h>

#include <concepts>
#include <cstdint>
#include <vector>

namespace headwise {
namespace {

TEST(TensorView, WalksTokensThenHeads) {
  std::vector<float> x(3 * 2 * 4);
  const auto view = TensorView<float>::nhd(x.data(), 2, 4);
  EXPECT_EQ(view.row(0, 0), x.data());
  EXPECT_EQ(view.row(0, 1), x.data() + 4);
  EXPECT_EQ(view.row(2, 1), x.data() + 2 * 8 + 4);
}

TEST(TensorView, TakesAnyStrides) {
  std::vector<float> x(3 * 2 * 4);
  const TensorView<float> heads_first{x.data(), 4, 3 * 4};  // HND
  EXPECT_EQ(heads_first.row(2, 1), x.data() + 12 + 8);
}

TEST(TensorView, BecomesReadOnlyButNotBack) {
  static_assert(std::convertible_to<TensorView<float>, TensorView<const float>>);
  static_assert(!std::convertible_to<TensorView<const float>, TensorView<float>>);
  float x[8] = {};
  const TensorView<const float> view = TensorView<float>::nhd(x, 2, 4);
  EXPECT_EQ(view.row(0, 1), x + 4);
}

TEST(TensorView, Addresses64Bits) {
  // No memory is touched: 2^25 tokens of 128 heads of 128 floats lie 2^41 bytes apart.
  auto* base = reinterpret_cast<float*>(std::uintptr_t{1} << 20);
  const auto view = TensorView<float>::nhd(base, 128, 128);
  const auto address = reinterpret_cast<std::uintptr_t>(view.row(std::int64_t{1} << 25, 127));
  EXPECT_EQ(address, (std::uintptr_t{1} << 20) + 4 * ((std::uintptr_t{1} << 39) + 127 * 128));
}

}  // namespace
}  // namespace headwise
