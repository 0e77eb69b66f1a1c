// SPDX-License-Identifier: MIT
#include "headwise/cache/page_pool.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <set>
#include <vector>

#include "headwise/core/config.hpp"
#include "headwise/core/dtype.hpp"

namespace headwise {
namespace {

struct PoolOf : ::testing::Test {
  std::vector<std::byte> memory = std::vector<std::byte>(8 * 64);
  std::vector<std::int32_t> free_list = std::vector<std::int32_t>(8);
  PagePool pool{memory.data(), 64, free_list};
};

TEST_F(PoolOf, HandsOutEachPageOnce) {
  EXPECT_EQ(pool.num_pages(), 8);
  std::set<std::int32_t> pages;
  for (std::int64_t left = 8; left > 0; --left) {
    EXPECT_EQ(pool.num_free(), left);
    pages.insert(pool.take());
  }
  EXPECT_EQ(pool.num_free(), 0);
  EXPECT_EQ(pages.size(), 8U);
  EXPECT_EQ(*pages.begin(), 0);
  EXPECT_EQ(*pages.rbegin(), 7);
}

TEST_F(PoolOf, StartsWithTheLowestPages) {
  for (std::int32_t page = 0; page < 8; ++page) EXPECT_EQ(pool.take(), page);
}

TEST_F(PoolOf, GivesReturnedPagesToTheNext) {
  for (int i = 0; i < 8; ++i) (void)pool.take();
  pool.give_back(5);
  pool.give_back(2);
  EXPECT_EQ(pool.num_free(), 2);
  const std::set<std::int32_t> again{pool.take(), pool.take()};
  EXPECT_EQ(again, (std::set<std::int32_t>{2, 5}));
}

#if HEADWISE_HARDENED
TEST_F(PoolOf, PoisonsPagesOnReturnAndOnTake) {
  const std::int32_t page = pool.take();
  auto* bytes = memory.data() + 64 * page;
  const auto is_poison = [&] {
    return std::all_of(bytes, bytes + 64, [](std::byte b) { return b == std::byte{0xFF}; });
  };
  EXPECT_TRUE(is_poison());
  std::fill_n(bytes, 64, std::byte{1});
  pool.give_back(page);
  EXPECT_TRUE(is_poison());
  std::fill_n(bytes, 64, std::byte{1});  // somebody writes through a stale pointer
  ASSERT_EQ(pool.take(), page);
  EXPECT_TRUE(is_poison());
  // The neighbours are left alone.
  EXPECT_EQ(memory[static_cast<std::size_t>(64 * (page + 1))], std::byte{0});
}

TEST(PagePool, PoisonIsNanInEveryRowFormat) {
  EXPECT_TRUE(std::isnan(to_float(f16{0xFFFF})));
  EXPECT_TRUE(std::isnan(to_float(bf16{0xFFFF})));
  EXPECT_TRUE(std::isnan(std::bit_cast<float>(0xFFFFFFFFU)));
}

TEST_F(PoolOf, CatchesMisuse) {
  EXPECT_DEATH(pool.give_back(0), "twice");
  for (int i = 0; i < 8; ++i) (void)pool.take();
  EXPECT_DEATH((void)pool.take(), "no free page");
}
#endif

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
  const Allocation allocation(&resource, 2 * PagePool::kHugePage, PagePool::kHugePage);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(allocation.data()) % PagePool::kHugePage, 0U);
  allocation.data()[PagePool::kHugePage] = std::byte{7};
  allocation.advise_huge_pages();
  EXPECT_EQ(allocation.data()[PagePool::kHugePage], std::byte{7});
}

}  // namespace
}  // namespace headwise
