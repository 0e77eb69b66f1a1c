// SPDX-License-Identifier: MIT
/// @file page_pool.hpp
/// PagePool: one span of bytes, cut into counted pages of one or several sizes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/config.hpp"
#include "headwise/core/memory.hpp"
#include "headwise/core/rounding.hpp"

namespace headwise::inline v0 {

/// How a pool of pages of these sizes is laid out.
///
/// A page is named by the multiple of `granule` bytes at which it begins, whatever its size: one
/// number addresses all of them. Pages of one size share slabs, which all have the same size and
/// change hands when they are empty, so that no size owns memory that another one lacks. With one
/// size of page the granule, the page and the slab are the same.
class PoolShape {
 public:
  /// Pages of the largest size in a slab, where there are several: what a slab's end cannot use is
  /// at most a sixteenth of it.
  static constexpr std::size_t kLargestPerSlab = 16;

  /// Of no pages.
  PoolShape() = default;
  /// @param page_bytes  the sizes, all different, multiples of a cache line; at least one.
  explicit PoolShape(std::vector<std::size_t> page_bytes) : page_bytes_(std::move(page_bytes)) {
    for (const std::size_t bytes : page_bytes_) {
      granule_ = std::gcd(granule_, bytes);
      slab_bytes_ = std::max(slab_bytes_, bytes);
    }
    if (page_bytes_.size() > 1) {
      slab_bytes_ = detail::checked_mul(slab_bytes_, kLargestPerSlab, "bytes of a slab");
    }
  }

  /// Sizes of pages.
  std::size_t num_sizes() const { return page_bytes_.size(); }
  /// Bytes of a page of size `size`.
  std::size_t page_bytes(std::size_t size) const { return page_bytes_[size]; }
  /// Bytes of a page of the smallest size.
  std::size_t smallest_page_bytes() const {
    return *std::min_element(page_bytes_.begin(), page_bytes_.end());
  }
  /// Bytes from one page number to the next.
  std::size_t granule() const { return granule_; }
  /// Bytes of a slab.
  std::size_t slab_bytes() const { return slab_bytes_; }
  /// Pages of size `size` in a slab.
  std::int64_t pages_per_slab(std::size_t size) const {
    return static_cast<std::int64_t>(slab_bytes_ / page_bytes_[size]);
  }
  /// Slabs that hold so many pages of each size.
  /// @throws ConfigError where they do not fit 64 bits.
  std::int64_t slabs_for(std::span<const std::int64_t> pages_of_size) const {
    std::int64_t slabs = 0;
    for (std::size_t size = 0; size < num_sizes(); ++size) {
      const std::int64_t per_slab = pages_per_slab(size);
      const std::int64_t pages = pages_of_size[size];
      slabs = detail::checked_add(slabs, ceil_div(pages, per_slab), "slabs");
    }
    return slabs;
  }

 private:
  std::vector<std::size_t> page_bytes_;
  std::size_t granule_ = 0;
  std::size_t slab_bytes_ = 0;
};

/// A page whose rows another page is to have, too.
struct PageCopy {
  std::int32_t from = 0;  ///< page number
  std::int32_t to = 0;    ///< page number
  std::size_t bytes = 0;  ///< of either
};

/// Hands out pages and counts who shares them; never touches a page's rows (hardened builds fill
/// taken and freed pages of the host with NaN).
class PagePool {
 public:
  /// What the pool remembers of a slab.
  struct Slab {               // left untouched until it is used
    std::int32_t size;        ///< of its pages
    std::int32_t num_used;    ///< pages that somebody holds
    std::int32_t first_free;  ///< page number, kNone: it is full
    std::int32_t next;        ///< in its size's list of slabs with free pages, or among the empty
    std::int32_t previous;    ///< in the list of its size
  };

  /// Where the pool's books lie among the cache's metadata.
  struct Layout {
    std::size_t holders = 0;  ///< of int32 [num_slabs * slab_bytes / granule]
    std::size_t slabs = 0;    ///< of Slab [num_slabs]
    std::size_t sizes = 0;    ///< of SizeState [num_sizes]

    /// @throws ConfigError for more pages than an int32 can name.
    Layout(Sections& sections, const PoolShape& shape, std::int64_t num_slabs)
        : holders(sections.add<std::int32_t>(num_granules(shape, num_slabs))),
          slabs(sections.add<Slab>(static_cast<std::size_t>(num_slabs))),
          sizes(sections.add<SizeState>(shape.num_sizes())) {}
  };

  /// @param memory  page 0; `num_slabs` slabs.
  /// @param metadata  the allocation that `layout` is a part of.
  /// @param poisons  whether the host may write to pages.
  PagePool(PoolShape shape, std::int64_t num_slabs, std::byte* memory, const Allocation& metadata,
           const Layout& layout, bool poisons)
      : shape_(std::move(shape)),
        memory_(memory),
        holders_(
            metadata.make_untouched<std::int32_t>(layout.holders, num_granules(shape_, num_slabs))),
        slabs_(metadata.make_untouched<Slab>(layout.slabs, static_cast<std::size_t>(num_slabs))),
        sizes_(metadata.make<SizeState>(layout.sizes, shape_.num_sizes())),
        granules_per_slab_(static_cast<std::int32_t>(shape_.slab_bytes() / shape_.granule())),
        num_free_slabs_(num_slabs),
        poisons_(poisons) {}

  /// Most slabs of a pool: their pages are named by an int32.
  static std::int64_t max_slabs(const PoolShape& shape) {
    return std::numeric_limits<std::int32_t>::max() /
           static_cast<std::int64_t>(shape.slab_bytes() / shape.granule());
  }

  /// Page 0.
  std::byte* memory() const { return memory_; }
  /// How it is laid out.
  const PoolShape& shape() const& { return shape_; }
  const PoolShape& shape() const&& = delete;
  /// Address of a page.
  std::byte* address(std::int32_t page) const {
    return memory_ + static_cast<std::size_t>(page) * shape_.granule();
  }

  /// Bytes of pages that nobody holds, those at the ends of slabs not counted.
  std::size_t free_bytes() const {
    std::size_t bytes = static_cast<std::size_t>(num_free_slabs_) * shape_.slab_bytes();
    for (std::size_t size = 0; size < sizes_.size(); ++size) {
      bytes += static_cast<std::size_t>(sizes_[size].num_free) * shape_.page_bytes(size);
    }
    return bytes;
  }
  /// Pages of all sizes that somebody holds, a shared one counted once.
  std::int64_t num_used() const { return num_used_; }
  /// Pages of size `size` that could be taken if no other size took any.
  std::int64_t num_free(std::size_t size) const {
    return sizes_[size].num_free + num_free_slabs_ * shape_.pages_per_slab(size);
  }
  /// Bytes that are missing for so many pages of each size at once, whole slabs; 0: they are there.
  std::size_t missing_bytes(std::span<const std::int64_t> pages_of_size) const {
    std::int64_t slabs = 0;
    for (std::size_t size = 0; size < sizes_.size(); ++size) {
      const std::int64_t more = pages_of_size[size] - sizes_[size].num_free;
      const std::int64_t per_slab = shape_.pages_per_slab(size);
      if (more > 0) slabs += (more + per_slab - 1) / per_slab;
    }
    return slabs <= num_free_slabs_
               ? 0
               : static_cast<std::size_t>(slabs - num_free_slabs_) * shape_.slab_bytes();
  }

  /// A page of size `size` with one holder. The lowest one that was never used comes first: a fresh
  /// sequence's pages lie in address order.
  /// @pre num_free(size) > 0.
  std::int32_t take(std::size_t size) {
    HEADWISE_ASSERT(num_free(size) > 0, "no free page");
    SizeState& state = sizes_[size];
    if (state.first_slab == kNone) open_slab(size);
    const std::int32_t slab_idx = state.first_slab;
    Slab& slab = slabs_[static_cast<std::size_t>(slab_idx)];
    const std::int32_t page = slab.first_free;
    slab.first_free = holder(page);
    ++slab.num_used;
    --state.num_free;
    ++num_used_;
    if (slab.first_free == kNone) unlink(state, slab);
    holder(page) = 1;
    poison(page, size);
    return page;
  }

  /// One more holder of a page that somebody holds.
  void share(std::int32_t page) {
    HEADWISE_ASSERT(holder(page) > 0, "a page that nobody holds was shared");
    ++holder(page);
  }

  /// One holder less; the last one frees the page.
  void give_back(std::int32_t page) {
    HEADWISE_ASSERT(holder(page) > 0, "a page was given back twice");
    if (--holder(page) > 0) return;
    const std::int32_t slab_idx = page / granules_per_slab_;
    Slab& slab = slabs_[static_cast<std::size_t>(slab_idx)];
    const auto size = static_cast<std::size_t>(slab.size);
    SizeState& state = sizes_[size];
    poison(page, size);
    if (slab.first_free == kNone) link(state, slab_idx);
    holder(page) = slab.first_free;
    slab.first_free = page;
    ++state.num_free;
    --num_used_;
    if (--slab.num_used == 0) close_slab(state, slab_idx);
  }

  /// Holders of a page that somebody holds.
  std::int32_t num_holders(std::int32_t page) const {
    return holders_[static_cast<std::size_t>(page)];
  }

 private:
  static constexpr std::int32_t kNone = -1;

  struct SizeState {
    std::int64_t num_free = 0;        ///< pages in this size's own slabs
    std::int32_t first_slab = kNone;  ///< with a free page
  };

  static std::size_t num_granules(const PoolShape& shape, std::int64_t num_slabs) {
    const auto per_slab = static_cast<std::int64_t>(shape.slab_bytes() / shape.granule());
    const std::int64_t granules = detail::checked_mul(num_slabs, per_slab, "pages of a pool");
    if (num_slabs > max_slabs(shape)) {
      fail<ConfigError>("a pool has at most 2^31 - 1 pages of ", shape.granule(),
                        " bytes, asked for ", granules);
    }
    return static_cast<std::size_t>(granules);
  }

  /// Of a page in use: how many hold it; of a free one: the next free one of its slab.
  std::int32_t& holder(std::int32_t page) { return holders_[static_cast<std::size_t>(page)]; }
  std::int32_t holder(std::int32_t page) const { return holders_[static_cast<std::size_t>(page)]; }

  void open_slab(std::size_t size) {
    std::int32_t slab_idx = first_empty_;
    if (slab_idx != kNone) {
      first_empty_ = slabs_[static_cast<std::size_t>(slab_idx)].next;
    } else {
      slab_idx = num_touched_++;
    }
    --num_free_slabs_;
    const std::int32_t first = slab_idx * granules_per_slab_;
    const auto step = static_cast<std::int32_t>(shape_.page_bytes(size) / shape_.granule());
    const auto pages = static_cast<std::int32_t>(shape_.pages_per_slab(size));
    for (std::int32_t i = 0; i < pages; ++i) {
      holder(first + i * step) = i + 1 < pages ? first + (i + 1) * step : kNone;
    }
    slabs_[static_cast<std::size_t>(slab_idx)] = {static_cast<std::int32_t>(size), 0, first, kNone,
                                                  kNone};
    sizes_[size].num_free += pages;
    link(sizes_[size], slab_idx);
  }

  void close_slab(SizeState& state, std::int32_t slab_idx) {
    Slab& slab = slabs_[static_cast<std::size_t>(slab_idx)];
    state.num_free -= shape_.pages_per_slab(static_cast<std::size_t>(slab.size));
    unlink(state, slab);
    slab.next = first_empty_;
    first_empty_ = slab_idx;
    ++num_free_slabs_;
  }

  void link(SizeState& state, std::int32_t slab_idx) {
    Slab& slab = slabs_[static_cast<std::size_t>(slab_idx)];
    slab.previous = kNone;
    slab.next = state.first_slab;
    if (slab.next != kNone) slabs_[static_cast<std::size_t>(slab.next)].previous = slab_idx;
    state.first_slab = slab_idx;
  }

  void unlink(SizeState& state, const Slab& slab) {
    if (slab.next != kNone) slabs_[static_cast<std::size_t>(slab.next)].previous = slab.previous;
    if (slab.previous != kNone) {
      slabs_[static_cast<std::size_t>(slab.previous)].next = slab.next;
    } else {
      state.first_slab = slab.next;
    }
  }

  /// All bits set is a NaN in f32, f16 and bf16: a read of a freed or unwritten row shows.
  void poison([[maybe_unused]] std::int32_t page, [[maybe_unused]] std::size_t size) {
#if HEADWISE_HARDENED
    if (poisons_) std::memset(address(page), 0xFF, shape_.page_bytes(size));
#endif
  }

  PoolShape shape_;
  std::byte* memory_;
  std::span<std::int32_t> holders_;
  std::span<Slab> slabs_;
  std::span<SizeState> sizes_;
  std::int32_t granules_per_slab_;
  std::int64_t num_free_slabs_;
  std::int32_t num_touched_ = 0;      // slabs above were never used: their books lie untouched
  std::int32_t first_empty_ = kNone;  // slabs that were used and are empty again
  std::int64_t num_used_ = 0;
  [[maybe_unused]] bool poisons_;
};

}  // namespace headwise::inline v0
