// SPDX-License-Identifier: MIT
#include "headwise/core/memory.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory_resource>
#include <string>

#include "headwise/core/check.hpp"

namespace headwise {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

// Sections ---------------------------------------------------------------------------------------

TEST(Sections, LieInOrderOnCacheLinesWithLessThanALineBetweenThem) {
  Sections sections;
  EXPECT_EQ(sections.total_bytes(), 0U);
  const std::size_t bytes[] = {1, 64, 0, 63, 130, 3 * 8};
  std::size_t end = 0;
  for (const std::size_t count : bytes) {
    const std::size_t begin = sections.add<std::byte>(count);
    EXPECT_EQ(begin % kCacheLine, 0U);
    EXPECT_GE(begin, end);
    EXPECT_LT(begin, end + kCacheLine);
    end = begin + count;
  }
  EXPECT_GE(sections.total_bytes(), end);
  EXPECT_LT(sections.total_bytes(), end + kCacheLine);
}

TEST(Sections, CountElementsNotBytes) {
  Sections sections;
  EXPECT_EQ(sections.add<std::int64_t>(9), 0U);
  EXPECT_EQ(sections.add<std::int32_t>(16), 128U);
  EXPECT_EQ(sections.total_bytes(), 192U);
}

TEST(Sections, RefuseWhatDoesNotFit64BitsAndChangeNothing) {
  constexpr std::size_t kMost = std::numeric_limits<std::size_t>::max();
  Sections sections;
  (void)sections.add<std::byte>(64);
  const auto refuses = [&](auto add, const std::string& value) {
    EXPECT_THAT(add, ThrowsMessage<ConfigError>(AllOf(HasSubstr(value), HasSubstr("64 bits"))));
    EXPECT_EQ(sections.total_bytes(), 64U);
  };
  // The product, its rounding to a line, and the sum of all sections.
  refuses([&] { (void)sections.add<std::int64_t>(kMost / 8 + 1); }, std::to_string(kMost / 8 + 1));
  refuses([&] { (void)sections.add<std::byte>(kMost); }, std::to_string(kMost));
  refuses([&] { (void)sections.add<std::byte>(kMost - 63); }, "64 + ");
}

// Allocation -------------------------------------------------------------------------------------

/// Notes what is given back.
class NotingResource : public std::pmr::memory_resource {
 public:
  std::size_t taken = 0;
  std::size_t returned = 0;
  std::size_t alignment = 0;

 private:
  void* do_allocate(std::size_t bytes, std::size_t align) override {
    taken += bytes;
    alignment = align;
    return std::pmr::new_delete_resource()->allocate(bytes, align);
  }
  void do_deallocate(void* memory, std::size_t bytes, std::size_t align) override {
    returned += bytes;
    EXPECT_EQ(align, alignment);
    std::pmr::new_delete_resource()->deallocate(memory, bytes, align);
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override {
    return this == &other;
  }
};

TEST(Allocation, GivesBackWhatItTook) {
  NotingResource resource;
  {
    const Allocation allocation(&resource, 1000, 64);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(allocation.data()) % 64, 0U);
    EXPECT_EQ(allocation.num_bytes(), 1000U);
    EXPECT_EQ(resource.taken, 1000U);
    EXPECT_EQ(resource.returned, 0U);
    allocation.advise_huge_pages();  // too small: nothing happens
  }
  EXPECT_EQ(resource.returned, 1000U);
}

TEST(Allocation, OfNothingAsksForNothing) {
  NotingResource resource;
  {
    const Allocation allocation(&resource, 0, 64);
    EXPECT_EQ(allocation.data(), nullptr);
    allocation.advise_huge_pages();
  }
  EXPECT_EQ(resource.taken, 0U);
  EXPECT_EQ(resource.alignment, 0U);
}

TEST(Allocation, AdvisesHugePagesWithoutTouchingThem) {
  NotingResource resource;
  const Allocation allocation(&resource, 2 * Allocation::kHugePage, Allocation::kHugePage);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(allocation.data()) % Allocation::kHugePage, 0U);
  allocation.data()[Allocation::kHugePage] = std::byte{7};
  allocation.advise_huge_pages();
  EXPECT_EQ(allocation.data()[Allocation::kHugePage], std::byte{7});
}

TEST(Allocation, MakesElementsWhereTheSectionBegins) {
  NotingResource resource;
  Sections sections;
  const std::size_t first = sections.add<std::int32_t>(3);
  const std::size_t second = sections.add<std::int64_t>(5);
  const Allocation allocation(&resource, sections.total_bytes(), kCacheLine);
  const auto small = allocation.make<std::int32_t>(first, 3);
  const auto large = allocation.make<std::int64_t>(second, 5);
  EXPECT_EQ(static_cast<void*>(small.data()), allocation.data() + first);
  EXPECT_EQ(static_cast<void*>(large.data()), allocation.data() + second);
  for (const std::int32_t x : small) EXPECT_EQ(x, 0);
  for (const std::int64_t x : large) EXPECT_EQ(x, 0);
}

TEST(Allocation, LeavesMemoryUntouchedWhereAsked) {
  NotingResource resource;
  const Allocation allocation(&resource, 256, kCacheLine);
  allocation.data()[64] = std::byte{9};
  const auto bytes = allocation.make_untouched<std::uint8_t>(64, 100);
  EXPECT_EQ(bytes.size(), 100U);
  EXPECT_EQ(bytes[0], 9);
}

}  // namespace
}  // namespace headwise
