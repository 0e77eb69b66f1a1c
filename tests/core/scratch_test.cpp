// SPDX-License-Identifier: MIT
#include "headwise/core/scratch.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>

namespace headwise {
namespace {

TEST(Scratch, StartsEmpty) {
  const Scratch scratch;
  EXPECT_EQ(scratch.bytes(), nullptr);
  EXPECT_EQ(scratch.num_bytes(), 0U);
  EXPECT_EQ(scratch.num_counters(), 0U);
}

TEST(Scratch, IsAlignedToACacheLine) {
  Scratch scratch;
  for (const std::size_t bytes : {1U, 63U, 64U, 4097U}) {
    scratch.reserve(bytes, 0);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(scratch.bytes()) % 64, 0U) << bytes;
    scratch.bytes()[bytes - 1] = std::byte{1};  // the sanitizer's business
  }
}

TEST(Scratch, KeepsItsMemoryWhileItIsEnough) {
  Scratch scratch;
  scratch.reserve(1000, 10);
  const std::byte* bytes = scratch.bytes();
  const auto* counter = &scratch.counter(0);
  scratch.reserve(1000, 10);
  scratch.reserve(10, 1);
  EXPECT_EQ(scratch.bytes(), bytes);
  EXPECT_EQ(&scratch.counter(0), counter);
  EXPECT_EQ(scratch.num_bytes(), 1000U);
  EXPECT_EQ(scratch.num_counters(), 10U);
  scratch.reserve(10, 11);  // one grows, the other stays
  EXPECT_EQ(scratch.bytes(), bytes);
  EXPECT_EQ(scratch.num_counters(), 11U);
}

TEST(Scratch, CountersStartAndClearAtZero) {
  Scratch scratch;
  scratch.reserve(0, 3);
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(scratch.counter(i).load(), 0);
  scratch.counter(1) = 7;
  scratch.clear_counters();
  EXPECT_EQ(scratch.counter(1).load(), 0);
}

}  // namespace
}  // namespace headwise
