// SPDX-License-Identifier: MIT
/// @file selected_rows.hpp
/// SelectedRows: which positions the rows of heads that are selected from have, and how a selection
/// moves them. Knows no kind of budget by name, no rows and no device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
#include <utility>
#include <vector>

#include "headwise/cache/geometry.hpp"
#include "headwise/cache/keep/keep.hpp"
#include "headwise/cache/pages/page_pool.hpp"
#include "headwise/cache/pages/page_tables.hpp"
#include "headwise/cache/selection_fault.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/memory.hpp"
#include "headwise/core/rounding.hpp"
#include "headwise/heads/kept_positions.hpp"

namespace headwise::inline v0 {

/// The part of a cache's books that is about heads that are selected from: the first slot of each,
/// and the positions of the rows that selections have moved. A row behind the last selection has
/// its slot for its position, and nothing is noted of it.
///
/// One thread calls what is not const.
class SelectedRows {
 public:
  /// Where it lies among the cache's metadata; nothing where no head is selected from.
  struct Layout {
    std::size_t num_first_slots;  ///< [places][heads that are selected from]
    std::size_t num_positions;    ///< [pages][page_tokens], pages of the smallest size
    std::size_t first_slots;      ///< section of int32 [num_first_slots]
    std::size_t positions;        ///< section of int32 [num_positions]

    /// Adds the sections.
    /// @throws ConfigError where they pass 64 bits.
    Layout(Sections& sections, const CacheGeometry& geometry)
        : num_first_slots(detail::checked_mul(
              static_cast<std::size_t>(geometry.num_places()),
              static_cast<std::size_t>(geometry.num_selected_heads()), "first slots")),
          num_positions(num_first_slots == 0 ? 0 : positions_of_pool(geometry)),
          first_slots(sections.add<std::int32_t>(num_first_slots)),
          positions(sections.add<std::int32_t>(num_positions)) {}

   private:
    static std::size_t positions_of_pool(const CacheGeometry& geometry) {
      const std::size_t pages = geometry.pool_bytes() / geometry.pool().smallest_page_bytes() + 1;
      return detail::checked_mul(pages, static_cast<std::size_t>(geometry.options().page_tokens),
                                 "positions of rows");
    }
  };

  /// A sequence as the books have it between two steps.
  struct Sequence {
    std::int32_t index = 0;                ///< its place
    std::int64_t length = 0;               ///< tokens committed
    std::span<const AnyKeepState> states;  ///< [classes]
  };

  /// @param geometry, pool, tables  of the cache; borrowed.
  /// @param metadata  the allocation that `layout` is a part of.
  SelectedRows(const CacheGeometry& geometry, PagePool& pool, PageTables& tables,
               const Allocation& metadata, const Layout& layout)
      : geometry_(geometry),
        pool_(pool),
        tables_(tables),
        page_tokens_(geometry.options().page_tokens),
        num_heads_(static_cast<std::size_t>(geometry.num_selected_heads())),
        smallest_page_bytes_(geometry.pool().smallest_page_bytes()),
        first_slots_(metadata.make<std::int32_t>(layout.first_slots, layout.num_first_slots)),
        positions_(metadata.make_untouched<std::int32_t>(layout.positions, layout.num_positions)) {}

  /// Slot of the first row of a head.
  /// @param head  among all that are selected from: as HeadClass::first_selected counts.
  std::int32_t first_slot(std::int32_t index, std::int64_t head) const {
    return first_slots_[static_cast<std::size_t>(index) * num_heads_ +
                        static_cast<std::size_t>(head)];
  }
  /// Nothing was selected from the sequence of this place.
  void forget(std::int32_t index) { std::ranges::fill(first_slots_of(index), 0); }
  /// Place `to` has the same slots as place `from`.
  void copy_first_slots(std::int32_t from, std::int32_t to) {
    std::ranges::copy(first_slots_of(from), first_slots_of(to).begin());
  }
  /// The rows of page `to` will be those of page `from`.
  /// @pre their class selects
  void copy_positions(std::int32_t from, std::int32_t to) {
    std::copy_n(positions_of(from), page_tokens_, positions_of(to));
  }

  /// `fn(position)` for every stored row of a head, ascending; of a head that is not selected from
  /// none.
  template <class Fn>
  void for_each_position(const Sequence& sequence, std::size_t c, std::int64_t h, Fn&& fn) const {
    const Head head{sequence.index, sequence.length, c, h};
    visit_head(sequence, head, [&](const auto& rule, const auto& was) {
      walk(head, rule, was, [&](std::int64_t, std::int32_t position) {
        fn(position);
        return true;
      });
    });
  }

  // A selection, in this order --------------------------------------------------------------------

  /// What is wrong with kept positions.
  SelectionFault fault_in(const Sequence& sequence, const KeptPositions& kept) const {
    using Kind = SelectionFault::Kind;
    const auto num_heads = static_cast<std::int64_t>(geometry_.heads().size());
    if (kept.num_heads() != num_heads) {
      return {Kind::kNumHeads, -1, -1, kept.num_heads(), num_heads};
    }
    SelectionFault fault;
    for_each_head(
        sequence, kept, [&](int layer, int kv_head, const Head& head, Positions positions) {
          const auto refuse = [&](Kind kind, std::int64_t value, std::int64_t limit) {
            fault = {kind, layer, kv_head, value, limit};
            return false;
          };
          if (!is_selected_from(layer, head)) {
            return positions.empty() || refuse(Kind::kNotSelectable, std::ssize(positions), 0);
          }
          std::int64_t last = -1;
          for (const std::int32_t position : positions) {
            if (position < 0 || position >= sequence.length) {
              return refuse(Kind::kOutOfRange, position, sequence.length);
            }
            if (position <= last) return refuse(Kind::kNotAscending, position, last);
            last = position;
          }
          auto next = positions.begin();
          visit_head(sequence, head, [&](const auto& rule, const auto& was) {
            walk(head, rule, was, [&](std::int64_t, std::int32_t stored) {
              if (next != positions.end() && *next == stored) ++next;
              return next != positions.end() && *next > stored;
            });
            if (next != positions.end()) refuse(Kind::kNotStored, *next, was.selected);
          });
          return next == positions.end();
        });
    return fault;
  }

  /// Adds the pages that a selection takes: of its own for those that somebody shares and rows move
  /// into.
  /// @param demand  [page sizes]
  /// @return whether it drops any row.
  bool add_demand(const Sequence& sequence, const KeptPositions& kept,
                  std::span<std::int64_t> demand) {
    bool drops = false;
    for_each_move(sequence, kept, [&](int, const Head& head, const Moves& moves, Positions) {
      drops |= moves.first != moves.former_first;
      for (const std::int32_t page : entries(head, moves.written)) {
        if (pool_.num_holders(page) > 1) ++demand[size_of(head)];
      }
    });
    return drops;
  }

  /// Moves the rows that stay, head by head, and gives the pages before them back. The states of
  /// the classes are to become state_after().
  /// @param copy_page, copy_rows  as Books::compact() says.
  /// @pre fault_in() finds nothing, and the pool has what add_demand() says.
  template <class CopyPage, class CopyRows>
  void select(const Sequence& sequence, const KeptPositions& kept, CopyPage&& copy_page,
              CopyRows&& copy_rows) {
    for_each_move(
        sequence, kept, [&](int layer, const Head& head, const Moves& moves, Positions positions) {
          unshare(head, moves.written, copy_page);
          move_rows(layer, head, moves, copy_rows);
          note_positions(head, moves.first, positions);
          const EntryRange left{moves.former_first / page_tokens_, moves.first / page_tokens_};
          for (const std::int32_t page : entries(head, left)) pool_.give_back(page);
          first_slots_of(head.index)[static_cast<std::size_t>(first_selected(head.c) + head.h)] =
              static_cast<std::int32_t>(moves.first);
        });
  }

  /// What a class's rule remembers once select() is done; of a class that selects none, what it
  /// did.
  AnyKeepState state_after(const Sequence& sequence, std::size_t c) const {
    const HeadClass& heads = geometry_.classes()[c];
    AnyKeepState after = sequence.states[c];
    heads.rule.visit_selecting(sequence.states[c], [&](const auto& rule, const auto&) {
      std::int32_t first = first_slot(sequence.index, heads.first_selected);
      for (std::int64_t h = 1; h < heads.num_heads; ++h) {
        first = std::min(first, first_slot(sequence.index, heads.first_selected + h));
      }
      after = rule.after_selection(sequence.length, first);
    });
    return after;
  }

 private:
  using Positions = std::span<const std::int32_t>;

  /// One head of a sequence.
  struct Head {
    std::int32_t index;   // of the sequence
    std::int64_t length;  // likewise
    std::size_t c;        // class
    std::int64_t h;       // in it
  };
  /// What a selection does to a head's rows, of which the first was in slot `former_first`: those
  /// that stay end in slots [first, length), of which the ones from `still` on are there already.
  struct Moves {
    std::int64_t former_first;
    std::int64_t first;
    std::int64_t still;
    EntryRange written;  // of the pages that rows move into
  };

  std::size_t size_of(const Head& head) const { return geometry_.classes()[head.c].page_size; }
  std::span<std::int32_t> first_slots_of(std::int32_t index) {
    return first_slots_.subspan(static_cast<std::size_t>(index) * num_heads_, num_heads_);
  }
  std::int64_t first_selected(std::size_t c) const { return geometry_.classes()[c].first_selected; }
  /// Positions of a page's rows, where they are noted. No two pages begin within the smallest page.
  std::int32_t* positions_of(std::int32_t page) const {
    const std::size_t begin = static_cast<std::size_t>(page) * geometry_.pool().granule();
    return positions_.data() +
           begin / smallest_page_bytes_ * static_cast<std::size_t>(page_tokens_);
  }
  std::int32_t* table(const Head& head) const { return tables_.head(head.index, head.c, head.h); }
  std::span<std::int32_t> entries(const Head& head, EntryRange range) const {
    return tables_.entries(head.index, head.c, head.h, range.first, range.last);
  }

  /// `fn(rule, state)` of a head that is selected from.
  template <class Fn>
  void visit_head(const Sequence& sequence, const Head& head, Fn&& fn) const {
    const AnyKeepRule& any = geometry_.classes()[head.c].rule;
    any.visit_selecting(sequence.states[head.c], [&](const auto& rule, const auto& of_class) {
      fn(rule, rule.of_head(of_class, first_slot(head.index, first_selected(head.c) + head.h)));
    });
  }
  /// `fn(slot, position)` for every stored row of a head, ascending, until it says false.
  template <class Rule, class Fn>
  void walk(const Head& head, const Rule& rule, const typename Rule::State& kept, Fn&& fn) const {
    for (std::int64_t slot = kept.first; slot < head.length;) {
      const std::int64_t entry = slot / page_tokens_;
      const std::int64_t end = std::min(head.length, (entry + 1) * page_tokens_);
      const std::int32_t* noted = positions_of(table(head)[entry]) - entry * page_tokens_;
      for (; slot < end; ++slot) {
        if (!fn(slot, rule.position_is_slot(kept, slot) ? static_cast<std::int32_t>(slot)
                                                        : noted[slot])) {
          return;
        }
      }
    }
  }
  /// Whether the rows of a layer's head are selected from: where layers share rows, in one of them.
  bool is_selected_from(int layer, const Head& head) const {
    return geometry_.classes()[head.c].selects() && geometry_.layer(layer).shape.owns_kv();
  }
  /// `fn(layer, kv_head, head, kept positions)` for every head, layer by layer, until it says
  /// false.
  template <class Fn>
  void for_each_head(const Sequence& sequence, const KeptPositions& kept, Fn&& fn) const {
    std::int64_t at = 0;
    for (int l = 0; l < static_cast<int>(geometry_.layers().size()); ++l) {
      for (int h = 0; h < geometry_.layer(l).shape.num_kv_heads; ++h) {
        const HeadGeometry& place = geometry_.head(l, h);
        const Head head{sequence.index, sequence.length, static_cast<std::size_t>(place.class_idx),
                        place.idx_in_class};
        if (!fn(l, h, head, kept.of_head(at++))) return;
      }
    }
  }
  /// `fn(layer, head, moves, kept positions)` for every head that is selected from; where the rows
  /// are that stay is in from_slots_ then.
  template <class Fn>
  void for_each_move(const Sequence& sequence, const KeptPositions& kept, Fn&& fn) {
    for_each_head(sequence, kept, [&](int layer, int, const Head& head, Positions positions) {
      if (is_selected_from(layer, head)) {
        visit_head(sequence, head, [&](const auto& rule, const auto& was) {
          fn(layer, head, plan_moves(head, rule, was, positions), positions);
        });
      }
      return true;
    });
  }

  template <class Rule>
  Moves plan_moves(const Head& head, const Rule& rule, const typename Rule::State& was,
                   Positions kept) {
    from_slots_.clear();
    walk(head, rule, was, [&](std::int64_t slot, std::int32_t position) {
      if (from_slots_.size() < kept.size() && kept[from_slots_.size()] == position) {
        from_slots_.push_back(slot);
      }
      return from_slots_.size() < kept.size();
    });
    Moves moves{was.first, rule.first_after(head.length, std::ssize(kept)), head.length, {}};
    for (std::size_t i = kept.size(); i > 0 && from_slots_[i - 1] == moves.still - 1; --i) {
      --moves.still;
    }
    if (moves.first < moves.still) {
      moves.written = {moves.first / page_tokens_, ceil_div(moves.still, page_tokens_)};
    }
    return moves;
  }
  /// Pages of its own for a head, with the rows that it shared.
  template <class CopyPage>
  void unshare(const Head& head, EntryRange range, CopyPage&& copy_page) {
    for (std::int64_t i = range.first; i < range.last; ++i) {
      std::int32_t& page = table(head)[i];
      if (pool_.num_holders(page) <= 1) continue;
      const std::int32_t own = pool_.take(size_of(head));
      copy_positions(page, own);
      copy_page(PageCopy{page, own, geometry_.pool().page_bytes(size_of(head))});
      pool_.give_back(std::exchange(page, own));
      tables_.note(head.index, head.c, i, i + 1);
    }
  }
  /// Moves rows from from_slots_ to their slots, page by page and the newest first: none goes to a
  /// lower slot, and so none is overwritten that has yet to move.
  template <class CopyRows>
  void move_rows(int layer, const Head& head, const Moves& moves, CopyRows&& copy_rows) {
    const auto from_of = [&](std::int64_t to) {
      return from_slots_[static_cast<std::size_t>(to - moves.first)];
    };
    for (std::int64_t to_end = moves.still; to_end > moves.first;) {
      // As many rows as come from one page and go to one.
      const std::int64_t from_entry = from_of(to_end - 1) / page_tokens_;
      const std::int64_t to_entry = (to_end - 1) / page_tokens_;
      const std::int64_t lowest = std::max(moves.first, to_entry * page_tokens_);
      std::int64_t to = to_end;
      while (to > lowest && from_of(to - 1) >= from_entry * page_tokens_) --to;
      rows_.clear();
      for (std::int64_t slot = to; slot < to_end; ++slot) {
        rows_.push_back(static_cast<std::int32_t>(from_of(slot) - from_entry * page_tokens_));
      }
      const std::int32_t* pages = table(head);
      copy_rows(layer, static_cast<int>(head.c), pages[from_entry], Positions(rows_),
                pages[to_entry], to - to_entry * page_tokens_);
      to_end = to;
    }
  }
  /// Writes down whose rows now lie in the slots of a head, from `first` to its length.
  void note_positions(const Head& head, std::int64_t first, Positions kept) {
    for (std::int64_t slot = first; slot < head.length;) {
      const std::int64_t entry = slot / page_tokens_;
      const std::int64_t end = std::min(head.length, (entry + 1) * page_tokens_);
      std::copy_n(kept.begin() + (slot - first), end - slot,
                  positions_of(table(head)[entry]) + (slot - entry * page_tokens_));
      slot = end;
    }
  }

  const CacheGeometry& geometry_;
  PagePool& pool_;
  PageTables& tables_;
  std::int64_t page_tokens_;
  std::size_t num_heads_;  // that are selected from
  std::size_t smallest_page_bytes_;
  std::span<std::int32_t> first_slots_;   // [places][num_heads_]
  std::span<std::int32_t> positions_;     // [pages][page_tokens_]
  std::vector<std::int64_t> from_slots_;  // of the selection in progress: one head's kept rows
  std::vector<std::int32_t> rows_;        // of one page
};

}  // namespace headwise::inline v0
