// SPDX-License-Identifier: MIT
#include "headwise/cache/pages/page_pool.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory_resource>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "headwise/core/config.hpp"
#include "headwise/core/dtype.hpp"

namespace headwise {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

/// A pool and the memory that it lies in.
class OwnPool {
 public:
  OwnPool(std::vector<std::size_t> page_bytes, std::int64_t num_slabs)
      : OwnPool(PoolShape(std::move(page_bytes)), num_slabs) {}

  PagePool* operator->() { return &pool_; }
  std::byte* memory() { return memory_.data(); }

 private:
  OwnPool(const PoolShape& shape, std::int64_t num_slabs)
      : layout_(sections_, shape, num_slabs),
        books_(std::pmr::new_delete_resource(), sections_.total_bytes(), kCacheLine),
        memory_(static_cast<std::size_t>(num_slabs) * shape.slab_bytes()),
        pool_(shape, num_slabs, memory_.data(), books_, layout_, true) {}

  Sections sections_;
  PagePool::Layout layout_;
  Allocation books_;
  std::vector<std::byte> memory_;
  PagePool pool_;
};

// The shape --------------------------------------------------------------------------------------

TEST(PoolShape, OneSizeOfPageIsGranuleAndSlabToo) {
  const PoolShape shape({16384});
  EXPECT_EQ(shape.num_sizes(), 1U);
  EXPECT_EQ(shape.granule(), 16384U);
  EXPECT_EQ(shape.slab_bytes(), 16384U);
  EXPECT_EQ(shape.pages_per_slab(0), 1);
}

TEST(PoolShape, SizesShareSlabsAndAreNamedByTheirCommonDivisor) {
  const PoolShape shape({64 * 6, 64 * 10});
  EXPECT_EQ(shape.granule(), 128U);
  EXPECT_EQ(shape.slab_bytes(), 16U * 640);
  EXPECT_EQ(shape.pages_per_slab(0), 16 * 640 / 384);
  EXPECT_EQ(shape.pages_per_slab(1), 16);
  EXPECT_EQ(shape.smallest_page_bytes(), 64U * 6);
  EXPECT_EQ(PoolShape({640, 256, 384}).smallest_page_bytes(), 256U);
}

TEST(PoolShape, ASlabsEndWastesAtMostASixteenth) {
  for (std::size_t small = 1; small <= 40; ++small) {
    const PoolShape shape({64 * small, 64 * 41});
    const std::size_t used =
        static_cast<std::size_t>(shape.pages_per_slab(0)) * shape.page_bytes(0);
    EXPECT_LE(shape.slab_bytes() - used, shape.slab_bytes() / 16);
  }
}

TEST(PoolShape, CountsSlabsInWholeOnesForEverySize) {
  const PoolShape shape({64, 128});  // 32 and 16 a slab
  const auto slabs = [&](std::int64_t small, std::int64_t large) {
    const std::int64_t pages[] = {small, large};
    return shape.slabs_for(pages);
  };
  EXPECT_EQ(slabs(0, 0), 0);
  EXPECT_EQ(slabs(1, 0), 1);
  EXPECT_EQ(slabs(32, 16), 2);
  EXPECT_EQ(slabs(33, 17), 4);
}

TEST(PoolShape, RefusesSlabsThatDoNotFit64Bits) {
  constexpr std::size_t kHuge = std::size_t{1} << 61;
  EXPECT_THAT([] { PoolShape({64, kHuge}); }, ThrowsMessage<ConfigError>(HasSubstr("slab")));
  const PoolShape shape({64, 128});
  const std::int64_t pages[] = {std::numeric_limits<std::int64_t>::max(),
                                std::numeric_limits<std::int64_t>::max()};
  EXPECT_NO_THROW((void)shape.slabs_for(pages));
}

// One size ---------------------------------------------------------------------------------------

TEST(PagePool, HandsOutEachPageOnceTheLowestFirst) {
  OwnPool pool({64}, 8);
  for (std::int32_t page = 0; page < 8; ++page) {
    EXPECT_EQ(pool->num_free(0), 8 - page);
    EXPECT_EQ(pool->num_used(), page);
    EXPECT_EQ(pool->take(0), page);
    EXPECT_EQ(pool->address(page), pool.memory() + 64 * page);
  }
  EXPECT_EQ(pool->num_free(0), 0);
  EXPECT_EQ(pool->free_bytes(), 0U);
}

TEST(PagePool, GivesReturnedPagesToTheNext) {
  OwnPool pool({64}, 8);
  for (int i = 0; i < 8; ++i) (void)pool->take(0);
  pool->give_back(5);
  pool->give_back(2);
  EXPECT_EQ(pool->num_free(0), 2);
  EXPECT_EQ(pool->free_bytes(), 128U);
  const std::set<std::int32_t> again{pool->take(0), pool->take(0)};
  EXPECT_EQ(again, (std::set<std::int32_t>{2, 5}));
}

TEST(PagePool, ASharedPageIsFreeWhenItsLastHolderGoes) {
  OwnPool pool({64}, 2);
  const std::int32_t page = pool->take(0);
  pool->share(page);
  pool->share(page);
  EXPECT_EQ(pool->num_holders(page), 3);
  EXPECT_EQ(pool->num_used(), 1);  // counted once
  pool->give_back(page);
  pool->give_back(page);
  EXPECT_EQ(pool->num_free(0), 1);
  pool->give_back(page);
  EXPECT_EQ(pool->num_free(0), 2);
  EXPECT_EQ(pool->num_used(), 0);
}

// Several sizes ----------------------------------------------------------------------------------

TEST(PagePool, PagesOfAFreshPoolLieInAddressOrderSizeBySize) {
  OwnPool pool({64, 128}, 3);
  for (std::int32_t i = 0; i < 32; ++i) EXPECT_EQ(pool->take(0), i);
  for (std::int32_t i = 0; i < 16; ++i) EXPECT_EQ(pool->take(1), 32 + 2 * i);
  EXPECT_EQ(pool->take(0), 64);
}

TEST(PagePool, AnEmptySlabServesAnotherSize) {
  OwnPool pool({64, 128}, 2);
  std::vector<std::int32_t> small;
  for (int i = 0; i < 64; ++i) small.push_back(pool->take(0));
  EXPECT_EQ(pool->num_free(1), 0);
  for (std::size_t i = 0; i < 32; ++i) {
    EXPECT_EQ(pool->num_free(1), 0);  // not before the last page of the slab is back
    pool->give_back(small[i]);
  }
  EXPECT_EQ(pool->num_free(1), 16);
  EXPECT_EQ(pool->num_free(0), 32);
  for (int i = 0; i < 16; ++i) (void)pool->take(1);
  EXPECT_EQ(pool->num_free(0), 0);
  EXPECT_EQ(pool->num_free(1), 0);
}

TEST(PagePool, SaysHowManyBytesAreMissingInWholeSlabs) {
  OwnPool pool({64, 128}, 2);
  const auto missing = [&](std::int64_t small, std::int64_t large) {
    const std::int64_t pages[] = {small, large};
    return pool->missing_bytes(pages);
  };
  EXPECT_EQ(missing(32, 16), 0U);
  EXPECT_EQ(missing(33, 16), 2048U);
  EXPECT_EQ(missing(64, 0), 0U);
  EXPECT_EQ(missing(64, 17), 2 * 2048U);
  (void)pool->take(0);
  EXPECT_EQ(missing(31, 16), 0U);
  EXPECT_EQ(missing(32, 16), 2048U);
}

/// A pool as it may be written down: which slab has which pages.
struct SlabModel {
  int size = -1;  // none
  std::set<std::int32_t> held;
};

TEST(PagePool, NoPageOverlapsAnotherAndNothingIsLostOnARandomWalk) {
  for (const std::vector<std::size_t>& sizes :
       {std::vector<std::size_t>{64}, {64, 128}, {384, 640}, {64, 192, 1024}, {448, 320, 64}}) {
    const PoolShape shape(sizes);
    constexpr std::int64_t kSlabs = 7;
    OwnPool pool(sizes, kSlabs);
    std::vector<SlabModel> slabs(kSlabs);
    std::map<std::int32_t, std::pair<std::size_t, int>> held;  // page -> size, holders
    std::mt19937 random(7);
    const auto granules_per_slab = static_cast<std::int32_t>(shape.slab_bytes() / shape.granule());

    // Brute force: whether so many pages more of each size fit, slab by slab.
    const auto missing_slabs = [&](const std::vector<std::int64_t>& wanted) {
      std::int64_t empty = 0;
      std::vector<std::int64_t> left = wanted;
      for (const SlabModel& slab : slabs) {
        if (slab.held.empty()) {
          ++empty;
        } else {
          const auto size = static_cast<std::size_t>(slab.size);
          left[size] -= shape.pages_per_slab(size) - static_cast<std::int64_t>(slab.held.size());
        }
      }
      for (std::size_t size = 0; size < sizes.size(); ++size) {
        while (left[size] > 0) {
          left[size] -= shape.pages_per_slab(size);
          --empty;
        }
      }
      return std::max<std::int64_t>(0, -empty);
    };

    for (int op = 0; op < 20'000; ++op) {
      const bool shrinks = op / 500 % 3 == 2;
      if (!held.empty() && random() % 10 < (shrinks ? 7 : 4)) {
        auto page = std::next(held.begin(), static_cast<std::ptrdiff_t>(random() % held.size()));
        if (random() % 5 == 0) {
          pool->share(page->first);
          ++page->second.second;
        } else {
          pool->give_back(page->first);
          if (--page->second.second == 0) {
            slabs[static_cast<std::size_t>(page->first / granules_per_slab)].held.erase(
                page->first);
            held.erase(page);
          }
        }
      } else {
        const std::size_t size = random() % sizes.size();
        std::vector<std::int64_t> one(sizes.size(), 0);
        one[size] = 1;
        ASSERT_EQ(pool->num_free(size) > 0, missing_slabs(one) == 0);
        if (pool->num_free(size) == 0) continue;
        const std::int32_t page = pool->take(size);
        const std::int32_t last =
            page + static_cast<std::int32_t>(sizes[size] / shape.granule()) - 1;
        // It lies in one slab, of its own size, and meets neither neighbour.
        ASSERT_EQ(page / granules_per_slab, last / granules_per_slab);
        SlabModel& slab = slabs.at(static_cast<std::size_t>(page / granules_per_slab));
        ASSERT_TRUE(slab.held.empty() || slab.size == static_cast<int>(size));
        slab.size = static_cast<int>(size);
        ASSERT_TRUE(slab.held.insert(page).second);
        const auto [at, is_new] = held.insert({page, {size, 1}});
        ASSERT_TRUE(is_new);
        if (const auto after = std::next(at); after != held.end()) {
          ASSERT_GT(after->first, last);
        }
        if (at != held.begin()) {
          const auto before = std::prev(at);
          ASSERT_GE(page, before->first + static_cast<std::int32_t>(sizes[before->second.first] /
                                                                    shape.granule()));
        }
      }
      ASSERT_EQ(pool->num_used(), static_cast<std::int64_t>(held.size()));
      if (op % 10 != 0) continue;
      for (const auto& [page, size_and_holders] : held) {
        ASSERT_EQ(pool->num_holders(page), size_and_holders.second);
      }
      std::vector<std::int64_t> wanted;
      for (std::size_t size = 0; size < sizes.size(); ++size) {
        wanted.push_back(static_cast<std::int64_t>(random() % 60));
        std::vector<std::int64_t> only(sizes.size(), 0);
        only[size] = pool->num_free(size);
        ASSERT_EQ(missing_slabs(only), 0);
        ++only[size];
        ASSERT_EQ(missing_slabs(only), 1);
      }
      ASSERT_EQ(pool->missing_bytes(wanted),
                static_cast<std::size_t>(missing_slabs(wanted)) * shape.slab_bytes());
    }
    while (!held.empty()) {
      const auto page = held.begin();
      for (int i = 0; i < page->second.second; ++i) pool->give_back(page->first);
      held.erase(page);
    }
    EXPECT_EQ(pool->free_bytes(), kSlabs * shape.slab_bytes());
    EXPECT_EQ(pool->num_used(), 0);
  }
}

TEST(PagePool, WhatSeveralSizesMissIsWhatTheyCannotTake) {
  std::mt19937 random(3);
  for (int round = 0; round < 300; ++round) {
    OwnPool pool({64, 192, 512}, 4);
    for (int i = 0; i < 60; ++i) {
      const std::size_t size = random() % 3;
      if (pool->num_free(size) > 0) (void)pool->take(size);
    }
    const std::int64_t wanted[] = {static_cast<std::int64_t>(random() % 200),
                                   static_cast<std::int64_t>(random() % 80),
                                   static_cast<std::int64_t>(random() % 30)};
    const bool fits = pool->missing_bytes(wanted) == 0;
    bool took_all = true;
    for (std::size_t size = 0; size < 3; ++size) {
      for (std::int64_t i = 0; i < wanted[size]; ++i) {
        if (pool->num_free(size) == 0) {
          took_all = false;
        } else {
          (void)pool->take(size);
        }
      }
    }
    ASSERT_EQ(fits, took_all);
  }
}

TEST(PagePool, ErrorsNameTheLimitOfPageNumbers) {
  Sections sections;
  const PoolShape shape({64});
  EXPECT_NO_THROW(PagePool::Layout(sections, shape, (std::int64_t{1} << 31) - 1));
  EXPECT_THAT([&] { PagePool::Layout(sections, shape, std::int64_t{1} << 31); },
              ThrowsMessage<ConfigError>(AllOf(HasSubstr("2^31 - 1"), HasSubstr("2147483648"))));
  EXPECT_THAT(
      [&] {
        PagePool::Layout(sections, PoolShape({64, 128}), std::int64_t{1} << 62);
      },
      ThrowsMessage<ConfigError>(HasSubstr("64 bits")));
}

// Hardened builds --------------------------------------------------------------------------------

#if HEADWISE_HARDENED
TEST(PagePool, PoisonsPagesOnReturnAndOnTake) {
  OwnPool pool({64}, 8);
  const std::int32_t page = pool->take(0);
  std::byte* bytes = pool->address(page);
  const auto is_poison = [&] {
    return std::all_of(bytes, bytes + 64, [](std::byte b) { return b == std::byte{0xFF}; });
  };
  EXPECT_TRUE(is_poison());
  std::fill_n(bytes, 64, std::byte{1});
  pool->share(page);
  pool->give_back(page);
  EXPECT_EQ(*bytes, std::byte{1});  // somebody still reads it
  pool->give_back(page);
  EXPECT_TRUE(is_poison());
  std::fill_n(bytes, 64, std::byte{1});  // somebody writes through a stale pointer
  ASSERT_EQ(pool->take(0), page);
  EXPECT_TRUE(is_poison());
  EXPECT_EQ(bytes[64], std::byte{0});  // the neighbours are left alone
}

TEST(PagePool, PoisonsAsManyBytesAsThePageHas) {
  OwnPool pool({64, 192}, 1);
  const std::int32_t page = pool->take(1);
  EXPECT_EQ(pool->address(page)[191], std::byte{0xFF});
  EXPECT_EQ(pool->address(page)[192], std::byte{0});
}

TEST(PagePool, PoisonIsNanInEveryElementType) {
  EXPECT_TRUE(std::isnan(to_float(f16{0xFFFF})));
  EXPECT_TRUE(std::isnan(to_float(bf16{0xFFFF})));
  EXPECT_TRUE(std::isnan(std::bit_cast<float>(0xFFFFFFFFU)));
}

TEST(PagePool, CatchesMisuse) {
  OwnPool pool({64}, 2);
  const std::int32_t first = pool->take(0);
  (void)pool->take(0);
  EXPECT_DEATH((void)pool->take(0), "no free page");
  pool->give_back(first);
  EXPECT_DEATH(pool->give_back(first), "twice");
  EXPECT_DEATH(pool->share(first), "nobody holds");
}
#endif

}  // namespace
}  // namespace headwise
