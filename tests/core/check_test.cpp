// SPDX-License-Identifier: MIT
#include "headwise/core/check.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>

namespace headwise {
namespace {

using ::testing::ThrowsMessage;

TEST(Check, FailJoinsStringsAndNumbers) {
  EXPECT_THAT([] { fail<ConfigError>("sink must be >= ", 0, ", got ", -3); },
              ThrowsMessage<ConfigError>("sink must be >= 0, got -3"));
  EXPECT_THAT([] { fail<FormatError>(std::string("a.tsv"), ":", 12U, ": ", 0.1, ' ' == ' '); },
              ThrowsMessage<FormatError>("a.tsv:12: 0.11"));
  EXPECT_THAT(
      [] { fail<ConfigError>(std::string_view("x"), std::numeric_limits<std::int64_t>::max()); },
      ThrowsMessage<ConfigError>("x9223372036854775807"));
}

TEST(Check, FloatsKeepEnoughDigitsToTellThemApart) {
  const float x = 0.1F;
  const float next = 0.100000009F;  // one unit in the last place up
  ASSERT_NE(x, next);
  const auto text = [](float value) {
    std::string out;
    detail::append_part(out, value);
    return out;
  };
  EXPECT_NE(text(x), text(next));
  EXPECT_EQ(text(std::numeric_limits<float>::quiet_NaN()), "nan");
}

TEST(Check, ErrorsAreRuntimeErrors) {
  EXPECT_THROW(fail<ConfigError>("x"), std::runtime_error);
  EXPECT_THROW(fail<FormatError>("x"), std::runtime_error);
}

TEST(Check, AssertionsStopHardenedBuildsOnly) {
  HEADWISE_ASSERT(1 + 1 == 2, "arithmetic");
#if HEADWISE_HARDENED
  EXPECT_DEATH(HEADWISE_ASSERT(1 + 1 == 3, "arithmetic"), "1 \\+ 1 == 3: arithmetic");
#else
  bool asked = false;
  HEADWISE_ASSERT((asked = true), "never evaluated");
  EXPECT_FALSE(asked);
#endif
}

}  // namespace
}  // namespace headwise
