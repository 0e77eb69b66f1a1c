// SPDX-License-Identifier: MIT
#include "headwise/core/checksum.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <set>
#include <span>
#include <utility>
#include <vector>

namespace headwise {
namespace {

std::vector<std::byte> some_bytes(std::size_t count) {
  std::vector<std::byte> bytes;
  for (std::size_t i = 0; i < count; ++i) bytes.push_back(static_cast<std::byte>(i * 37 + i / 64));
  return bytes;
}

std::uint64_t sum_of(std::span<const std::byte> bytes) {
  Checksum sum;
  sum.add(bytes);
  return sum.value();
}

TEST(Checksum, IsTheSameHoweverTheBytesAreCut) {
  const std::vector<std::byte> bytes = some_bytes(640);
  for (std::size_t cut = 0; cut <= bytes.size(); cut += 64) {
    Checksum sum;
    sum.add(std::span(bytes).first(cut));
    sum.add(std::span(bytes).subspan(cut));
    EXPECT_EQ(sum.value(), sum_of(bytes)) << cut;
  }
}

TEST(Checksum, IsTheSameInEveryVersion) {
  // Worked out apart from the library (Python, big integers): snapshots of old are to be read.
  EXPECT_EQ(sum_of({}), 0x7473F8EA11B0F837U);
  EXPECT_EQ(sum_of(some_bytes(128)), 0x13954462A2505A61U);
}

TEST(Checksum, SeesEveryFlippedBitAndEveryPairOfHighestBits) {
  std::vector<std::byte> bytes = some_bytes(192);
  std::set<std::uint64_t> sums{sum_of(bytes)};
  for (std::size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_TRUE(sums.insert(sum_of(bytes)).second) << bit;
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
  }
  // A product alone keeps a word's highest bit where it is, and two of a lane undo each other.
  for (int bit = 0; bit < 64; ++bit) {
    std::vector<std::byte> other = bytes;
    other[7] ^= std::byte{0x80};
    other[static_cast<std::size_t>(64 + bit / 8)] ^= std::byte{1} << (bit % 8);
    EXPECT_NE(sum_of(other), sum_of(bytes)) << bit;
  }
}

TEST(Checksum, SeesBlocksAndWordsThatChangedPlaces) {
  std::vector<std::byte> bytes = some_bytes(256);
  const std::uint64_t before = sum_of(bytes);
  for (const auto& [from, to] : {std::pair{0, 8}, {0, 64}, {8, 72}, {64, 128}}) {
    std::vector<std::byte> other = bytes;
    for (int i = 0; i < 8; ++i) {
      std::swap(other[static_cast<std::size_t>(from + i)], other[static_cast<std::size_t>(to + i)]);
    }
    EXPECT_NE(sum_of(other), before) << from << " and " << to;
  }
  EXPECT_NE(sum_of(std::span(bytes).first(192)), before);
}

}  // namespace
}  // namespace headwise
