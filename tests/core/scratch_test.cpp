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
}

TEST(Scratch, IsAlignedToACacheLine) {
  Scratch scratch;
  for (const std::size_t bytes : {1U, 63U, 64U, 4097U}) {
    scratch.reserve(bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(scratch.bytes()) % 64, 0U) << bytes;
    scratch.bytes()[bytes - 1] = std::byte{1};  // the sanitizer's business
  }
}

TEST(Scratch, KeepsItsMemoryWhileItIsEnough) {
  Scratch scratch;
  scratch.reserve(1000);
  const std::byte* bytes = scratch.bytes();
  scratch.reserve(1000);
  scratch.reserve(10);
  EXPECT_EQ(scratch.bytes(), bytes);
  EXPECT_EQ(scratch.num_bytes(), 1000U);
}

}  // namespace
}  // namespace headwise
