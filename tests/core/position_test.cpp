// SPDX-License-Identifier: MIT
#include "headwise/core/position.hpp"

#include <gtest/gtest.h>

#include <concepts>
#include <cstdint>
#include <type_traits>

namespace headwise {
namespace {

template <class A, class B>
concept Comparable = requires(A a, B b) {
  a < b;
};
template <class A, class B>
concept Subtractable = requires(A a, B b) {
  a - b;
};

TEST(Position, OrdersAndMovesByTokens) {
  static_assert(Pos{3} < Pos{4} && Pos{4} == Pos{4});
  static_assert(Pos{3} + 4 == Pos{7} && Pos{7} - Pos{3} == 4);
  static_assert(Slot{3} < Slot{4} && Slot{3} + 4 == Slot{7});
}

TEST(Position, NeverMixesPosAndSlot) {
  static_assert(!std::convertible_to<Slot, Pos> && !std::convertible_to<Pos, Slot>);
  static_assert(!Comparable<Pos, Slot> && !Subtractable<Pos, Slot>);
  static_assert(!std::convertible_to<std::int64_t, Pos>);
}

TEST(Position, Counts64Bits) {
  const std::int64_t far = std::int64_t{1} << 40;
  EXPECT_EQ((Pos{far} + far).value, std::int64_t{1} << 41);
  EXPECT_EQ(Pos{far} - Pos{1}, far - 1);
  EXPECT_EQ((Slot{far} + 1).value, far + 1);
}

}  // namespace
}  // namespace headwise
