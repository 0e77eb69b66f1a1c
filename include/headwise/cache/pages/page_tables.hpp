// SPDX-License-Identifier: MIT
/// @file page_tables.hpp
/// PageTables: which page each slot of each head lies in, in memory that follows use.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/memory.hpp"

namespace headwise::inline v0 {

/// The tables of one sequence that may hold a certain number of pages' tokens: class by class,
/// and in a class head by head.
struct TableLevel {
  std::int64_t capacity_pages = 0;     ///< the longest sequence, in pages of tokens
  std::vector<std::int64_t> first;     ///< [classes] entry of the class's first head
  std::vector<std::int64_t> per_head;  ///< [classes] entries of each of its heads
  std::int64_t num_entries = 0;        ///< of all heads
};

/// Page tables of all sequences in one arena of entries. A sequence has a block of it, one of a few
/// levels that each hold twice the tokens of the one before; one that outgrows its block moves.
///
/// Changes are noted by (sequence, class of heads), as the hull of what was written since the last
/// upload: whoever writes an entry says so, and a device is sent all changes in one way.
class PageTables {
 public:
  /// What changed in the tables of a class's heads: entries [first, last) of each.
  struct Change {
    std::int64_t first = 0;
    std::int64_t last = 0;  ///< at or below first: nothing
  };
  /// Free entries of the arena.
  struct Extent {
    std::int64_t begin = 0;
    std::int64_t end = 0;
  };
  /// A sequence's block.
  struct Block {
    std::int64_t begin = 0;
    std::int32_t level = -1;  ///< -1: it has none
    bool is_dirty = false;    ///< it is in the list of changed sequences
  };

  /// What the tables are built for.
  struct Shape {
    std::vector<TableLevel> levels;   ///< smallest first; not empty
    std::vector<std::int64_t> heads;  ///< [classes] heads of each class
    std::int64_t num_entries = 0;     ///< of the arena
    std::int64_t max_sequences = 0;   ///< that have tables at once
    bool keeps_log = false;           ///< whether changes are noted
  };

  /// Where the tables lie among the cache's metadata.
  struct Layout {
    std::size_t entries, blocks, extents, changes, dirty;  ///< of the sections
    /// Adds them.
    Layout(Sections& sections, const Shape& shape)
        : entries(sections.add<std::int32_t>(static_cast<std::size_t>(shape.num_entries))),
          blocks(sections.add<Block>(sequences(shape))),
          extents(sections.add<Extent>(sequences(shape) + 1)),
          changes(sections.add<Change>(logged(shape) * shape.heads.size())),
          dirty(sections.add<std::int32_t>(logged(shape))) {}
  };

  /// @param metadata  the allocation that `layout` is a part of.
  PageTables(Shape shape, const Allocation& metadata, const Layout& layout)
      : shape_(std::move(shape)),
        entries_(metadata.make_untouched<std::int32_t>(
            layout.entries, static_cast<std::size_t>(shape_.num_entries))),
        blocks_(metadata.make<Block>(layout.blocks, sequences(shape_))),
        extents_(metadata.make<Extent>(layout.extents, sequences(shape_) + 1)),
        changes_(metadata.make<Change>(layout.changes, logged(shape_) * shape_.heads.size())),
        dirty_(metadata.make<std::int32_t>(layout.dirty, logged(shape_))) {
    extents_[0] = {0, shape_.num_entries};
    num_extents_ = 1;
  }

  /// Makes sure that sequence `index` has tables for `pages` pages of tokens; what it has already
  /// is carried over.
  /// @return false where the arena has no such block free; then nothing has changed.
  bool reserve(std::int32_t index, std::int64_t pages) {
    Block& block = block_of(index);
    if (block.level >= 0 && level_of(block).capacity_pages >= pages) return true;
    const auto wanted =
        std::find_if(shape_.levels.begin(), shape_.levels.end(),
                     [&](const TableLevel& level) { return level.capacity_pages >= pages; });
    HEADWISE_ASSERT(wanted != shape_.levels.end(), "a sequence longer than max_context");
    const std::int64_t begin = take(wanted->num_entries);
    if (begin < 0) return false;
    const Block old = block;
    block.begin = begin;
    block.level = static_cast<std::int32_t>(wanted - shape_.levels.begin());
    if (old.level >= 0) {
      const TableLevel& level = level_of(old);
      for (std::size_t c = 0; c < shape_.heads.size(); ++c) {
        for (std::int64_t h = 0; h < shape_.heads[c]; ++h) {
          const std::int32_t* from =
              entries_.data() + old.begin + level.first[c] + h * level.per_head[c];
          std::copy_n(from, level.per_head[c], head(index, c, h));
        }
        note(index, c, 0, level.per_head[c]);
      }
      give_back({old.begin, old.begin + level.num_entries});
    }
    return true;
  }

  /// Makes the sequence's block as small as `pages` pages of tokens allow, where it stands; without
  /// pages it is released. What lies beyond is forgotten.
  void shrink(std::int32_t index, std::int64_t pages) {
    Block& block = block_of(index);
    if (block.level < 0) return;
    if (pages == 0) return release(index);
    const TableLevel& old = level_of(block);
    while (block.level > 0 &&
           shape_.levels[static_cast<std::size_t>(block.level) - 1].capacity_pages >= pages) {
      --block.level;
    }
    const TableLevel& level = level_of(block);
    if (&level == &old) return;
    for (std::size_t c = 0; c < shape_.heads.size(); ++c) {
      for (std::int64_t h = 0; h < shape_.heads[c];
           ++h) {  // ascending: none lies further than before
        const std::int32_t* from =
            entries_.data() + block.begin + old.first[c] + h * old.per_head[c];
        std::int32_t* to = head(index, c, h);
        if (to != from) std::copy_n(from, level.per_head[c], to);
      }
      note(index, c, 0, level.per_head[c]);
    }
    give_back({block.begin + level.num_entries, block.begin + old.num_entries});
  }

  /// The sequence's block is free again.
  void release(std::int32_t index) {
    Block& block = block_of(index);
    if (block.level < 0) return;
    give_back({block.begin, block.begin + level_of(block).num_entries});
    block.level = -1;
  }

  /// Table of head `h` of class `c`.
  /// @pre the sequence has a block.
  std::int32_t* head(std::int32_t index, std::size_t c, std::int64_t h) const {
    return entries_.data() + offset(index, c) + h * stride(index, c);
  }
  /// Entries [first, last) of that table; none, also without a block, where last is no higher.
  std::span<std::int32_t> entries(std::int32_t index, std::size_t c, std::int64_t h,
                                  std::int64_t first, std::int64_t last) const {
    if (first >= last) return {};
    return {head(index, c, h) + first, static_cast<std::size_t>(last - first)};
  }
  /// Where the class's first head begins in the arena.
  std::int64_t offset(std::int32_t index, std::size_t c) const {
    const Block& block = blocks_[static_cast<std::size_t>(index)];
    return block.begin + level_of(block).first[c];
  }
  /// Entries from one head of the class to the next.
  std::int64_t stride(std::int32_t index, std::size_t c) const {
    return level_of(blocks_[static_cast<std::size_t>(index)]).per_head[c];
  }
  /// Whether the sequence has tables.
  bool has_block(std::int32_t index) const {
    return blocks_[static_cast<std::size_t>(index)].level >= 0;
  }

  /// Notes that entries [first, last) of the class's heads were written.
  void note(std::int32_t index, std::size_t c, std::int64_t first, std::int64_t last) {
    if (!shape_.keeps_log || first >= last) return;
    Block& block = block_of(index);
    if (!block.is_dirty) {
      block.is_dirty = true;
      dirty_[num_dirty_++] = index;
    }
    Change& change = change_of(index, c);
    change = change.first >= change.last
                 ? Change{first, last}
                 : Change{std::min(change.first, first), std::max(change.last, last)};
  }

  /// `fn(index, class, change)` for everything noted since the last call, which is then forgotten.
  /// Tables that were released meanwhile are left out.
  template <class Fn>
  void drain_changes(Fn&& fn) {
    for (std::size_t i = 0; i < num_dirty_; ++i) {
      const std::int32_t index = dirty_[i];
      Block& block = block_of(index);
      for (std::size_t c = 0; c < shape_.heads.size(); ++c) {
        const Change change = std::exchange(change_of(index, c), Change{});
        if (block.level >= 0 && change.first < change.last) {
          // A block that was released and taken anew may be smaller than what was noted before.
          const Change kept{change.first, std::min(change.last, level_of(block).per_head[c])};
          if (kept.first < kept.last) fn(index, c, kept);
        }
      }
      block.is_dirty = false;
    }
    num_dirty_ = 0;
  }

  /// What the tables were built for.
  const Shape& shape() const& { return shape_; }
  const Shape& shape() const&& = delete;
  /// All entries, as offset() counts them.
  std::span<const std::int32_t> entries() const { return entries_; }

 private:
  static std::size_t sequences(const Shape& shape) {
    return static_cast<std::size_t>(shape.max_sequences);
  }
  static std::size_t logged(const Shape& shape) { return shape.keeps_log ? sequences(shape) : 0; }

  Block& block_of(std::int32_t index) { return blocks_[static_cast<std::size_t>(index)]; }
  const TableLevel& level_of(const Block& block) const {
    HEADWISE_ASSERT(block.level >= 0, "the sequence has no page tables: empty, or released");
    return shape_.levels[static_cast<std::size_t>(block.level)];
  }
  Change& change_of(std::int32_t index, std::size_t c) {
    return changes_[static_cast<std::size_t>(index) * shape_.heads.size() + c];
  }

  /// First fit. There are at most as many gaps as blocks, and a sequence takes few blocks in its
  /// life, each twice as long as the one before.
  std::int64_t take(std::int64_t entries) {
    for (std::size_t i = 0; i < num_extents_; ++i) {
      Extent& extent = extents_[i];
      if (extent.end - extent.begin < entries) continue;
      const std::int64_t begin = extent.begin;
      extent.begin += entries;
      if (extent.begin == extent.end) {
        std::move(extents_.begin() + static_cast<std::ptrdiff_t>(i) + 1,
                  extents_.begin() + static_cast<std::ptrdiff_t>(num_extents_),
                  extents_.begin() + static_cast<std::ptrdiff_t>(i));
        --num_extents_;
      }
      return begin;
    }
    return -1;
  }

  /// Extents lie in order and never touch.
  void give_back(Extent freed) {
    const auto begin = extents_.begin();
    const auto end = begin + static_cast<std::ptrdiff_t>(num_extents_);
    const auto after =
        std::find_if(begin, end, [&](const Extent& extent) { return extent.begin >= freed.end; });
    const bool joins_after = after != end && after->begin == freed.end;
    const bool joins_before = after != begin && (after - 1)->end == freed.begin;
    if (joins_before && joins_after) {
      (after - 1)->end = after->end;
      std::move(after + 1, end, after);
      --num_extents_;
    } else if (joins_before) {
      (after - 1)->end = freed.end;
    } else if (joins_after) {
      after->begin = freed.begin;
    } else {
      std::move_backward(after, end, end + 1);
      *after = freed;
      ++num_extents_;
    }
  }

  Shape shape_;
  std::span<std::int32_t> entries_;
  std::span<Block> blocks_;
  std::span<Extent> extents_;
  std::span<Change> changes_;
  std::span<std::int32_t> dirty_;
  std::size_t num_extents_ = 0;
  std::size_t num_dirty_ = 0;
};

}  // namespace headwise::inline v0
