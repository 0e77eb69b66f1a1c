// SPDX-License-Identifier: MIT
#include "headwise/core/io_view.hpp"

#include <gtest/gtest.h>

#include <concepts>
#include <type_traits>
#include <vector>

namespace headwise {
namespace {

template <class E>
class IoViewTest : public ::testing::Test {};
using Elements = ::testing::Types<f32, f16, bf16>;
TYPED_TEST_SUITE(IoViewTest, Elements);

TYPED_TEST(IoViewTest, IsTheTensorThatItWasMadeOf) {
  std::vector<TypeParam> data(3 * 40);
  const TensorView<TypeParam> tensor{data.data(), 40, 12};
  const InputView in = TensorView<const TypeParam>(tensor);
  const InputView also = tensor;
  const OutputView out = tensor;
  for (int token : {0, 2}) {
    for (int head : {0, 1, 2}) {
      const auto row_of = [&](auto view) {
        return view.visit([&](auto t) -> const void* {
          static_assert(
              std::same_as<std::remove_const_t<std::remove_pointer_t<decltype(t.data)>>, f32> ||
              sizeof(*t.data) == 2);
          return t.row(token, head);
        });
      };
      const void* wanted = tensor.row(token, head);
      EXPECT_EQ(row_of(in), wanted);
      EXPECT_EQ(row_of(also), wanted);
      EXPECT_EQ(row_of(out), wanted);
      const auto begins = in.from(token, head).visit([](auto t) -> const void* { return t.data; });
      EXPECT_EQ(begins, wanted);
    }
  }
  bool is_same = false;
  out.visit(
      [&]<class E>(TensorView<E> t) { is_same = std::same_as<E, TypeParam> && t.stride_n == 40; });
  EXPECT_TRUE(is_same);
}

TEST(IoView, KnowsItsType) {
  f32 single{};
  f16 half{};
  bf16 brain{};
  EXPECT_EQ(InputView(&single, 1, 1).type(), IoType::kF32);
  EXPECT_EQ(InputView(&half, 1, 1).type(), IoType::kF16);
  EXPECT_EQ(OutputView(&brain, 1, 1).type(), IoType::kBf16);
  EXPECT_EQ(InputView(&single, 1, 1).row(0, 0), &single);
}

TEST(IoView, WritesNothingThatIsConstAndReadsNoOtherTypes) {
  static_assert(std::convertible_to<TensorView<const f16>, InputView>);
  static_assert(std::convertible_to<TensorView<f16>, InputView>);
  static_assert(!std::convertible_to<TensorView<const f16>, OutputView>);
  static_assert(std::convertible_to<TensorView<f16>, OutputView>);
  static_assert(!std::convertible_to<TensorView<const double>, InputView>);
  static_assert(!std::convertible_to<TensorView<const int>, InputView>);
}

}  // namespace
}  // namespace headwise
