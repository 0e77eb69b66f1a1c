// SPDX-License-Identifier: MIT
/// @file place.hpp
/// Where a cache's pages live: the host, or a device that says so itself (cache/cuda/).
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "headwise/cache/books.hpp"
#include "headwise/cache/geometry.hpp"
#include "headwise/cache/pages/page_pool.hpp"
#include "headwise/cache/step.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/memory.hpp"

namespace headwise::inline v0 {

/// A place owns the memory of a cache's pages and does to it what the books ask for.
///
/// - `Stream`: what work of the place is ordered by; an empty type where there is no choice.
/// - `kOnHost`: whether the host reads and writes pages.
/// - `pages()`: page 0, fixed for the cache's life.
/// - `copy_pages(copies, stream)`: makes pages equal others.
/// - `copy_sums(copies, stream)`: where the host has no pages, makes compensation rows equal
///   others; on the host they are the books'.
/// - `send(books, step, stream)`: after a begin: what kernels must know of the open step, and every
///   change of the page tables since the last call. Anything but kOk drops the step.
template <class P>
concept CachePlace = std::constructible_from<P, const CacheGeometry&> &&
    requires(P place, const P& fixed, Books& books, const Step& step,
             std::span<const PageCopy> copies, typename P::Stream stream) {
  { P::kOnHost } -> std::convertible_to<bool>;
  { fixed.pages() } -> std::same_as<std::byte*>;
  { place.copy_pages(copies, stream) } -> std::same_as<StepStatus>;
  { place.send(books, step, stream) } -> std::same_as<StepStatus>;
} &&(P::kOnHost || requires(P place, std::span<const SumsCopy> sums, typename P::Stream stream) {
  { place.copy_sums(sums, stream) } -> std::same_as<StepStatus>;
});

/// The host's memory: one std::pmr allocation, or the caller's bytes.
class HostPlace {
 public:
  /// The host does everything at once.
  struct Stream {};
  static constexpr bool kOnHost = true;

  /// @throws ConfigError for caller's memory that is too small or not 64-byte aligned.
  explicit HostPlace(const CacheGeometry& geometry)
      : granule_(geometry.pool().granule()),
        given_(checked(geometry)),
        owned_(
            geometry.options().resource, given_.empty() ? geometry.pool_bytes() : 0,
            geometry.pool_bytes() >= Allocation::kHugePage ? Allocation::kHugePage : kCacheLine) {
    owned_.advise_huge_pages();
  }

  std::byte* pages() const { return given_.empty() ? owned_.data() : given_.data(); }

  StepStatus copy_pages(std::span<const PageCopy> copies, Stream) const {
    for (const PageCopy& copy : copies) {
      std::memcpy(pages() + static_cast<std::size_t>(copy.to) * granule_,
                  pages() + static_cast<std::size_t>(copy.from) * granule_, copy.bytes);
    }
    return StepStatus::kOk;
  }
  StepStatus send(Books&, const Step&, Stream) const { return StepStatus::kOk; }

 private:
  static std::span<std::byte> checked(const CacheGeometry& geometry) {
    const std::span<std::byte> memory = geometry.options().page_memory;
    if (memory.empty()) return memory;
    if (memory.size() < geometry.pool_bytes()) {
      fail<ConfigError>("page_memory has ", memory.size(), " bytes, needed are ",
                        geometry.pool_bytes());
    }
    if (reinterpret_cast<std::uintptr_t>(memory.data()) % kCacheLine != 0) {
      fail<ConfigError>("page_memory must be aligned to ", kCacheLine, " bytes");
    }
    return memory;
  }

  std::size_t granule_;
  std::span<std::byte> given_;
  Allocation owned_;
};
static_assert(CachePlace<HostPlace>);

}  // namespace headwise::inline v0
