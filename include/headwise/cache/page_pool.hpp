// SPDX-License-Identifier: MIT
/// @file page_pool.hpp
/// PagePool: one span of bytes cut into equal pages, and the list of those that are free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory_resource>
#include <span>

#include "headwise/cache/options.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/config.hpp"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace headwise::inline v0 {

/// Hands out page numbers; never touches a page's rows (hardened builds fill freed pages with NaN).
class PagePool {
 public:
  /// Bytes of a huge page where ordinary ones have 4 KiB.
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;

  /// @param free_list  room for `num_pages` numbers, borrowed.
  PagePool(std::byte* memory, std::size_t page_bytes, std::span<std::int32_t> free_list,
           PageMemory place = PageMemory::kHost)
      : memory_(memory),
        page_bytes_(page_bytes),
        free_(free_list),
        num_free_(free_list.size()),
        place_(place) {
    // The lowest page is taken first: a fresh sequence's pages lie in address order.
    for (std::size_t i = 0; i < free_.size(); ++i) {
      free_[i] = static_cast<std::int32_t>(free_.size() - 1 - i);
    }
  }

  /// Page 0.
  std::byte* memory() const { return memory_; }
  /// From one page to the next.
  std::size_t page_bytes() const { return page_bytes_; }
  /// Pages, free or not.
  std::int64_t num_pages() const { return static_cast<std::int64_t>(free_.size()); }
  /// Pages that take() may still hand out.
  std::int64_t num_free() const { return static_cast<std::int64_t>(num_free_); }

  /// @pre num_free() > 0.
  std::int32_t take() {
    HEADWISE_ASSERT(num_free_ > 0, "no free page");
    const std::int32_t page = free_[--num_free_];
    poison(page);
    return page;
  }

  /// @param page  taken and not given back since.
  void give_back(std::int32_t page) {
    HEADWISE_ASSERT(num_free_ < free_.size(), "a page was given back twice");
    poison(page);
    free_[num_free_++] = page;
  }

 private:
  /// All bits set is a NaN in f32, f16 and bf16: a read of a freed or unwritten row shows.
  void poison([[maybe_unused]] std::int32_t page) {
#if HEADWISE_HARDENED
    if (place_ != PageMemory::kHost) return;
    std::memset(memory_ + static_cast<std::size_t>(page) * page_bytes_, 0xFF, page_bytes_);
#endif
  }

  std::byte* memory_;
  std::size_t page_bytes_;
  std::span<std::int32_t> free_;
  std::size_t num_free_;
  [[maybe_unused]] PageMemory place_;
};

/// One allocation of a std::pmr resource, given back on destruction.
class Allocation {
 public:
  /// Throws what the resource throws; asks for nothing where `bytes` is 0.
  Allocation(std::pmr::memory_resource* resource, std::size_t bytes, std::size_t alignment)
      : resource_(resource), bytes_(bytes), alignment_(alignment) {
    if (bytes_ != 0) data_ = static_cast<std::byte*>(resource_->allocate(bytes_, alignment_));
  }
  ~Allocation() {
    if (data_ != nullptr) resource_->deallocate(data_, bytes_, alignment_);
  }
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;

  /// The bytes; null where there are none.
  std::byte* data() const { return data_; }

  /// Asks the kernel for huge pages: attention streams through more 4 KiB pages than a TLB holds.
  void advise_huge_pages() const {
#ifdef __linux__
    if (bytes_ >= PagePool::kHugePage) madvise(data_, bytes_, MADV_HUGEPAGE);  // advice only
#endif
  }

 private:
  std::pmr::memory_resource* resource_;
  std::size_t bytes_;
  std::size_t alignment_;
  std::byte* data_ = nullptr;
};

}  // namespace headwise::inline v0
