// SPDX-License-Identifier: MIT
/// @file memory.hpp
/// One allocation, and how it is cut into sections.
#pragma once

#include <cstddef>
#include <memory>
#include <memory_resource>
#include <span>
#include <type_traits>

#include "headwise/core/checked.hpp"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace headwise::inline v0 {

/// Sections start on cache lines, which are also AVX-512 registers.
inline constexpr std::size_t kCacheLine = 64;

/// Places sections one after the other; the sum is what is asked for.
class Sections {
 public:
  /// Offset of the next section, of `count` T.
  /// @throws ConfigError where the sum passes 64 bits.
  template <class T>
  std::size_t add(std::size_t count) {
    const std::size_t begin = total_bytes_;
    const std::size_t bytes = detail::checked_mul(count, sizeof(T), "bytes of a section");
    total_bytes_ = detail::checked_add(
        begin,
        detail::checked_add(bytes, kCacheLine - 1, "bytes of a section") / kCacheLine * kCacheLine,
        "bytes of all sections");
    return begin;
  }
  /// Of all sections so far.
  std::size_t total_bytes() const { return total_bytes_; }

 private:
  std::size_t total_bytes_ = 0;
};

/// One allocation of a std::pmr resource, given back on destruction.
class Allocation {
 public:
  /// Bytes of a huge page where ordinary ones have 4 KiB.
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;

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
  /// Bytes there are.
  std::size_t num_bytes() const { return bytes_; }

  /// `count` T at `offset`, value-initialised, which touches their memory.
  template <class T>
  std::span<T> make(std::size_t offset, std::size_t count) const {
    static_assert(std::is_trivially_destructible_v<T>);
    T* first = reinterpret_cast<T*>(data_ + offset);
    std::uninitialized_value_construct_n(first, count);
    return {first, count};
  }
  /// The same, left untouched: memory that the system commits when it is first written.
  template <class T>
  std::span<T> make_untouched(std::size_t offset, std::size_t count) const {
    static_assert(std::is_trivially_default_constructible_v<T>);
    T* first = reinterpret_cast<T*>(data_ + offset);
    std::uninitialized_default_construct_n(first, count);
    return {first, count};
  }

  /// Asks the kernel for huge pages: attention streams through more 4 KiB pages than a TLB holds.
  void advise_huge_pages() const {
#ifdef __linux__
    if (bytes_ >= kHugePage) madvise(data_, bytes_, MADV_HUGEPAGE);  // advice only
#endif
  }

 private:
  std::pmr::memory_resource* resource_;
  std::size_t bytes_;
  std::size_t alignment_;
  std::byte* data_ = nullptr;
};

}  // namespace headwise::inline v0
