// SPDX-License-Identifier: MIT
#include "headwise/core/checked.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>

#include "support/errors.hpp"

namespace headwise {
namespace {

using detail::checked_add, detail::checked_cast, detail::checked_mul, detail::checked_range;
using headwise::testing::message_of;
using ::testing::AllOf, ::testing::HasSubstr;

// Every pair of 8-bit integers, beside int.
template <class T>
void holds_for_every_pair() {
  const int low = std::numeric_limits<T>::min();
  const int high = std::numeric_limits<T>::max();
  const auto expect = [&](int exact, auto checked, int a, int b, const char* sign) {
    if (exact >= low && exact <= high) {
      ASSERT_EQ(checked(static_cast<T>(a), static_cast<T>(b), "x"), exact) << a << sign << b;
    } else {
      ASSERT_THROW(checked(static_cast<T>(a), static_cast<T>(b), "x"), ConfigError)
          << a << sign << b;
    }
  };
  for (int a = low; a <= high; ++a) {
    for (int b = low; b <= high; ++b) {
      expect(a + b, checked_add<T>, a, b, " + ");
      expect(a * b, checked_mul<T>, a, b, " * ");
    }
  }
}

TEST(Checked, SumsAndProductsAreExactOrRefused) {
  holds_for_every_pair<std::int8_t>();
  holds_for_every_pair<std::uint8_t>();
}

TEST(Checked, OverflowsNameWhatAndBothValues) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  EXPECT_THAT(
      message_of<ConfigError>([] { checked_mul<std::int64_t>(kMost, 2, "pool bytes"); }),
      AllOf(HasSubstr("pool bytes"), HasSubstr("9223372036854775807 * 2"), HasSubstr("64 bits")));
  EXPECT_THAT(message_of<ConfigError>([] { checked_add<std::int64_t>(kMost, 1, "pool bytes"); }),
              AllOf(HasSubstr("pool bytes"), HasSubstr("9223372036854775807 + 1")));
}

TEST(Checked, CastsKeepTheNumberOrRefuse) {
  EXPECT_EQ(checked_cast<std::size_t>(std::int64_t{7}, "pages"), 7U);
  EXPECT_THAT(message_of<ConfigError>([] { checked_cast<std::size_t>(-1, "pages"); }),
              AllOf(HasSubstr("pages"), HasSubstr("got -1")));
  EXPECT_THROW(checked_cast<int>(std::int64_t{1} << 31, "heads"), ConfigError);
  EXPECT_THROW(checked_cast<std::int64_t>(std::numeric_limits<std::size_t>::max(), "bytes"),
               ConfigError);
}

TEST(Checked, RangesIncludeBothEnds) {
  EXPECT_EQ(checked_range(1, 1, 3, "rows"), 1);
  EXPECT_EQ(checked_range(3, 1, 3, "rows"), 3);
  EXPECT_THAT(message_of<ConfigError>([] { checked_range(4, 1, 3, "rows"); }),
              AllOf(HasSubstr("rows must be in [1, 3]"), HasSubstr("got 4")));
  EXPECT_THROW(checked_range(0, 1, 3, "rows"), ConfigError);
}

TEST(Checked, IsEvaluatedAtCompileTime) {
  static_assert(checked_mul<std::int64_t>(6, 7, "x") == 42);
  static_assert(checked_range(6, 0, 7, "x") == 6);
}

}  // namespace
}  // namespace headwise
