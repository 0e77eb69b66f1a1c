// SPDX-License-Identifier: MIT
/// @file books.hpp
/// Books: sequences, lengths, the open step, and who holds which page. Knows no kind of budget by
/// name, no rows and no device.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "headwise/cache/geometry.hpp"
#include "headwise/cache/keep/keep.hpp"
#include "headwise/cache/pages/page_pool.hpp"
#include "headwise/cache/pages/page_tables.hpp"
#include "headwise/cache/selected_rows.hpp"
#include "headwise/cache/selection_fault.hpp"
#include "headwise/cache/step.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/memory.hpp"
#include "headwise/core/rounding.hpp"
#include "headwise/heads/kept_positions.hpp"

namespace headwise::inline v0 {

/// One sequence's state. Everything else about it follows from the two lengths and what the keep
/// rules remember.
struct SequenceState {
  std::int64_t length = 0;           ///< tokens committed
  std::int64_t high_water = 0;       ///< the longest length committed
  std::int64_t pending_length = -1;  ///< after the open step; -1: in no open step
  std::int64_t base = 0;             ///< where checkpoints are counted from: that of the newest,
                                     ///< or where the sequence began
  std::int32_t checkpoint = -1;      ///< place of the newest checkpoint, of a checkpoint: of the
                                     ///< one before; -1: none
  bool has_new_checkpoint = false;   ///< begin made the newest one: a drop takes it back
  std::uint32_t generation = 0;      ///< of the sequence that lives here
  bool is_live = false;              ///< between add_sequence and release
  bool is_leaving = false;           ///< released while in the open step: goes when that ends
};

/// A place whose compensation rows are to equal another's.
struct SumsCopy {
  std::int32_t from = 0;  ///< place: of a sequence, or of a checkpoint
  std::int32_t to = 0;    ///< likewise
};

/// What bounds a fork at an earlier length.
enum class ReuseEnd : std::uint8_t {
  kAsAsked,        ///< nothing: all that was asked for can be reused
  kEndOfSequence,  ///< the sequence is no longer than this
  kRowsAreGone,    ///< windows have moved on since; this is the checkpoint before, or nothing
  kNoSequence,     ///< the id names nobody
};

/// How much of a sequence's beginning a fork may have.
struct ReuseLimit {
  std::int64_t length = 0;               ///< tokens
  ReuseEnd why = ReuseEnd::kNoSequence;  ///< why not more
  friend bool operator==(ReuseLimit, ReuseLimit) = default;
};

/// Where a cache's metadata lie in their one allocation; their sum is part of estimate().
struct BooksLayout {
  Sections sections;               ///< of the allocation
  PageTables::Shape tables;        ///< what the tables are built for
  std::size_t sequences;           ///< offset of SequenceState [places]
  std::size_t states;              ///< of AnyKeepState [places][classes]
  std::size_t free_sequences;      ///< of int32 [places]: of sequences, then of checkpoints
  std::size_t demand;              ///< of int64 [page sizes]
  std::size_t compensation_bytes;  ///< of a place's compensation rows; none where a device has them
  std::size_t compensation;        ///< of bytes [places][compensation_bytes]
  SelectedRows::Layout selected;   ///< of heads that are selected from
  PagePool::Layout pool;           ///< pages and slabs
  PageTables::Layout table;        ///< page tables

  /// @param keeps_log  whether changes of page tables are noted, for a device, which also has the
  ///   compensation rows.
  /// @throws ConfigError where something passes its width, or the pool holds no page.
  BooksLayout(const CacheGeometry& geometry, bool keeps_log)
      : tables(geometry.tables(keeps_log)),
        sequences(sections.add<SequenceState>(num_places(geometry))),
        states(sections.add<AnyKeepState>(
            detail::checked_mul(num_places(geometry), geometry.classes().size(), "states"))),
        free_sequences(sections.add<std::int32_t>(num_places(geometry))),
        demand(sections.add<std::int64_t>(geometry.pool().num_sizes())),
        compensation_bytes(keeps_log ? 0 : geometry.compensation_bytes()),
        compensation(sections.add<std::byte>(
            detail::checked_mul(num_places(geometry), compensation_bytes, "compensation rows"))),
        selected(sections, geometry),
        pool(sections, geometry.pool(), checked_slabs(geometry)),
        table(sections, tables) {}

 private:
  static std::size_t num_places(const CacheGeometry& geometry) {
    return static_cast<std::size_t>(geometry.num_places());
  }
  static std::int64_t checked_slabs(const CacheGeometry& geometry) {
    if (geometry.num_slabs() < 1) {
      fail<ConfigError>("max_bytes (", geometry.options().max_bytes, ") holds no page of ",
                        geometry.pool().slab_bytes(), " bytes");
    }
    return geometry.num_slabs();
  }
};

/// Sequences, page tables and the open step of a cache. One thread calls what is not const; reading
/// is free for all between begin and commit.
class Books {
 public:
  /// @param pages  memory of the pool, `geometry.pool_bytes()` of it.
  /// @param pages_on_host  whether the host may write to it; if not, table changes are logged.
  Books(CacheGeometry geometry, std::byte* pages, bool pages_on_host)
      : geometry_(std::move(geometry)),
        layout_(geometry_, !pages_on_host),
        metadata_(geometry_.options().resource, layout_.sections.total_bytes(), kCacheLine),
        pool_(geometry_.pool(), geometry_.num_slabs(), pages, metadata_, layout_.pool,
              pages_on_host),
        tables_(layout_.tables, metadata_, layout_.table),
        selected_(geometry_, pool_, tables_, metadata_, layout_.selected),
        sequences_(metadata_.make<SequenceState>(layout_.sequences, num_places())),
        states_(metadata_.make<AnyKeepState>(layout_.states,
                                             num_places() * geometry_.classes().size())),
        free_sequences_(metadata_.make<std::int32_t>(layout_.free_sequences, num_places())),
        demand_(metadata_.make<std::int64_t>(layout_.demand, geometry_.pool().num_sizes())) {
    for (std::size_t i = 0; i < num_places(); ++i) {
      const std::size_t end = i < num_sequences() ? num_sequences() - 1 : num_places() - 1;
      const std::size_t first = i < num_sequences() ? 0 : num_sequences();
      free_sequences_[i] = static_cast<std::int32_t>(end - (i - first));
      forget(static_cast<std::int32_t>(i));  // each state is its rule's, also of nobody
    }
    num_free_sequences_ = num_sequences();
    num_free_checkpoints_ = num_places() - num_sequences();
    open_chunks_.reserve(num_sequences());
    // One step's checkpoints, or one fork.
    if (!pages_on_host && geometry_.compensation_bytes() > 0) sums_copies_.reserve(num_places());
  }

  Books(const Books&) = delete;
  Books& operator=(const Books&) = delete;

  /// What follows from shape, plan and options.
  const CacheGeometry& geometry() const& { return geometry_; }
  /// The pages and who holds them.
  const PagePool& pool() const& { return pool_; }
  /// Where they are named.
  const PageTables& tables() const& { return tables_; }
  /// @copydoc tables()
  PageTables& tables() & { return tables_; }
  const CacheGeometry& geometry() const&& = delete;
  const PagePool& pool() const&& = delete;
  const PageTables& tables() const&& = delete;

  // Sequences -------------------------------------------------------------------------------------

  /// An empty sequence, or nothing when max_sequences are in use.
  std::optional<SequenceId> add_sequence() {
    if (num_free_sequences_ == 0) return std::nullopt;
    const std::int32_t index = free_sequences_[--num_free_sequences_];
    SequenceState& sequence = sequences_[static_cast<std::size_t>(index)];
    sequence = SequenceState{.generation = sequence.generation, .is_live = true};
    forget(index);
    // No sum of a former sequence is left to be seen, or to leave with a snapshot.
    std::memset(compensation(index), 0, layout_.compensation_bytes);
    return SequenceId{index, sequence.generation};
  }

  /// The sequence is no more; its pages are free at once, or when the open step that it takes part
  /// in has ended. An id that names nobody is ignored.
  void release(SequenceId id) {
    if (!is_live(id)) return;
    SequenceState& sequence = state(id);
    sequence.is_live = false;
    ++sequence.generation;
    if (sequence.pending_length >= 0) {
      sequence.is_leaving = true;
    } else {
      vacate(id.index);
    }
  }

  /// Back to an empty sequence under the same id; nothing can be rolled back afterwards.
  StepStatus clear(SequenceId id) {
    if (!is_live(id)) return StepStatus::kInvalidChunk;
    SequenceState& sequence = state(id);
    if (sequence.pending_length >= 0) return StepStatus::kInStep;
    drop_checkpoints(id.index, 0);
    give_back_all(id.index);
    tables_.release(id.index);
    sequence.length = sequence.high_water = sequence.base = 0;
    forget(id.index);
    std::memset(compensation(id.index), 0, layout_.compensation_bytes);
    return StepStatus::kOk;
  }

  /// Another sequence with the same past up to `length`: the sequence itself, or what one of its
  /// checkpoints has. Pages that no append and no permitted rollback of either can reach are shared
  /// from now on, all others are to be copied.
  /// @param copy  copy(PageCopy) for each of them.
  /// @return kOutOfSequences, kOutOfPages, kOutOfTables, kInStep or kTooFarBack change nothing.
  template <class Copy>
  StepStatus fork(SequenceId id, std::int64_t length, SequenceId& child, Copy&& copy) {
    if (!is_live(id)) return StepStatus::kInvalidChunk;
    if (state(id).pending_length >= 0) return StepStatus::kInStep;
    const std::optional<Past> past = past_at(id.index, length);
    if (!past) return StepStatus::kTooFarBack;
    if (num_free_sequences_ == 0) return StepStatus::kOutOfSequences;
    std::fill(demand_.begin(), demand_.end(), 0);
    add_demand(*past);
    if (pool_.missing_bytes(demand_) != 0) return StepStatus::kOutOfPages;
    const std::int32_t index = free_sequences_[num_free_sequences_ - 1];
    if (!reserve_tables(index, past->high_water)) return StepStatus::kOutOfTables;
    --num_free_sequences_;
    become(index, *past, copy);
    SequenceState& sequence = sequences_[static_cast<std::size_t>(index)];
    sequence.is_live = true;
    child = {index, sequence.generation};
    return StepStatus::kOk;
  }

  /// How much of the first `length` tokens of a sequence a fork may begin with.
  ReuseLimit reuse_limit(SequenceId id, std::int64_t length) const {
    if (!is_live(id)) return {0, ReuseEnd::kNoSequence};
    const std::int64_t wanted = std::clamp<std::int64_t>(length, 0, state(id).length);
    const ReuseEnd end = length > wanted ? ReuseEnd::kEndOfSequence : ReuseEnd::kAsAsked;
    if (past_at(id.index, wanted)) return {wanted, end};
    std::int32_t at = state(id).checkpoint;  // newest first; none of those up to there is lost
    while (at >= 0 && place(at).length > wanted) at = place(at).checkpoint;
    return {at < 0 ? 0 : place(at).length, ReuseEnd::kRowsAreGone};
  }

  /// A sequence of these lengths and states with every page that it holds; their rows and the
  /// compensation rows are the caller's to fill in.
  /// @pre the states are what the rules' from_word() gave for this high water, and no selection's.
  /// @return kOutOfSequences, kOutOfPages or kOutOfTables change nothing.
  StepStatus add_sequence(std::int64_t length, std::int64_t high_water,
                          std::span<const AnyKeepState> states, SequenceId& id) {
    if (num_free_sequences_ == 0) return StepStatus::kOutOfSequences;
    std::fill(demand_.begin(), demand_.end(), 0);
    for_each_class(states, [&](std::size_t c, const AnyKeepRule& rule, const AnyKeepState& kept) {
      for (const EntryRange held : rule.held(kept, length, high_water)) {
        demand_of(c) += heads_of(c) * held.count();
      }
    });
    if (pool_.missing_bytes(demand_) != 0) return StepStatus::kOutOfPages;
    const std::int32_t index = free_sequences_[num_free_sequences_ - 1];
    if (!reserve_tables(index, high_water)) return StepStatus::kOutOfTables;
    id = *add_sequence();
    std::copy(states.begin(), states.end(), &state_of(index, 0));
    for_each_class(index, [&](std::size_t c, const AnyKeepRule& rule, const AnyKeepState& kept) {
      for (const EntryRange held : rule.held(kept, length, high_water)) take(index, c, held);
    });
    SequenceState& sequence = state(id);
    sequence.length = sequence.base = length;
    sequence.high_water = high_water;
    return StepStatus::kOk;
  }

  /// `fn(page number, bytes)` for every page that the sequence holds between steps: class by class,
  /// range by range, head by head.
  /// @pre !is_selected_from(): then each of a class's heads holds the same entries.
  template <class Fn>
  void for_each_page(SequenceId id, Fn&& fn) const {
    const SequenceState& sequence = state(id);
    for_each_class(id.index, [&](std::size_t c, const AnyKeepRule& rule, const AnyKeepState& kept) {
      for (const EntryRange held : rule.held(kept, sequence.length, sequence.high_water)) {
        for (std::int64_t h = 0; h < heads_of(c); ++h) {
          for (const std::int32_t page : tables_.entries(id.index, c, h, held.first, held.last)) {
            fn(page, geometry_.pool().page_bytes(size_of(c)));
          }
        }
      }
    });
  }

  /// Whether `id` was added and not released since.
  bool is_live(SequenceId id) const {
    return id.index >= 0 && id.index < geometry_.options().max_sequences && state(id).is_live &&
           state(id).generation == id.generation;
  }
  /// Whether it takes part in the open step.
  bool is_in_step(SequenceId id) const { return is_live(id) && state(id).pending_length >= 0; }
  /// Tokens committed; the position of the sequence's next token. 0 where the id names nobody.
  std::int64_t length(SequenceId id) const { return is_live(id) ? state(id).length : 0; }
  /// The longest length ever committed; 0 where the id names nobody.
  std::int64_t high_water(SequenceId id) const { return is_live(id) ? state(id).high_water : 0; }

  /// Most tokens that rollback() may take back now.
  std::int64_t max_truncate(SequenceId id) const {
    if (!is_live(id)) return 0;
    return state(id).length - lowest_rollback(id.index);
  }
  /// Takes the sequence back to `new_length` tokens in every layer and head, exactly; allowed down
  /// to high_water - max_rollback, but not behind a selection, and to nothing: see clear().
  /// Checkpoints beyond are gone.
  StepStatus rollback(SequenceId id, std::int64_t new_length) {
    if (!is_live(id)) return StepStatus::kInvalidChunk;
    if (new_length == 0) return clear(id);
    SequenceState& sequence = state(id);
    if (sequence.pending_length >= 0) return StepStatus::kInStep;
    if (new_length < lowest_rollback(id.index) || new_length > sequence.length) {
      return StepStatus::kTooFarBack;
    }
    drop_checkpoints(id.index, new_length);
    for_each_class(id.index, [&](std::size_t c, const AnyKeepRule& rule, const AnyKeepState& kept) {
      give_back(id.index, c, rule.rolled_back(kept, sequence.length, new_length));
    });
    sequence.length = new_length;
    return StepStatus::kOk;
  }

  /// Bytes of pages that the sequence holds between steps, shared ones in full.
  std::size_t held_bytes(SequenceId id) const {
    if (!is_live(id)) return 0;
    const SequenceState& sequence = state(id);
    std::size_t bytes = 0;
    for_each_class(id.index, [&](std::size_t c, const AnyKeepRule& rule, const AnyKeepState& kept) {
      std::int64_t pages = 0;
      const auto count = [&](const AnyKeepState& of_head) {
        const auto held = rule.held(of_head, sequence.length, sequence.high_water);
        return held[0].count() + held[1].count();
      };
      if (rule.selects()) {
        for (std::int64_t h = 0; h < heads_of(c); ++h) pages += count(head_state(id.index, c, h));
      } else {
        pages = heads_of(c) * count(kept);
      }
      bytes += static_cast<std::size_t>(pages) * geometry_.pool().page_bytes(size_of(c));
    });
    return bytes;
  }

  // Selections ------------------------------------------------------------------------------------

  /// Drops, from the heads that are selected from, every stored row but those of `kept`, in all
  /// layers or none. A head's rows move within its own pages, so that none is taken unless a fork
  /// or a checkpoint shares it. Nothing can be rolled back behind it. Where every head keeps all
  /// that it has, nothing is changed.
  /// @param fault  says what is wrong where kBadSelection is returned.
  /// @param copy_page  copy_page(PageCopy): a page that somebody else holds, too, and rows move
  ///   into.
  /// @param copy_rows  copy_rows(layer, class_idx, page, rows, to page, to row): rows of one page
  ///   to as many of another or the same; in such an order that none is overwritten before it has
  ///   moved.
  /// @return kInStep, kOutOfPages or kBadSelection change nothing.
  template <class CopyPage, class CopyRows>
  StepStatus compact(SequenceId id, const KeptPositions& kept, SelectionFault& fault,
                     CopyPage&& copy_page, CopyRows&& copy_rows) {
    fault = {};
    if (!is_live(id)) return StepStatus::kInvalidChunk;
    if (state(id).pending_length >= 0) return StepStatus::kInStep;
    const SelectedRows::Sequence sequence = selected_sequence(id.index);
    fault = selected_.fault_in(sequence, kept);
    if (fault.kind != SelectionFault::Kind::kNone) return StepStatus::kBadSelection;
    std::fill(demand_.begin(), demand_.end(), 0);
    if (!selected_.add_demand(sequence, kept, demand_)) return StepStatus::kOk;
    if (pool_.missing_bytes(demand_) != 0) return StepStatus::kOutOfPages;
    selected_.select(sequence, kept, copy_page, copy_rows);
    for (std::size_t c = 0; c < geometry_.classes().size(); ++c) {
      state_of(id.index, c) = selected_.state_after(sequence, c);
    }
    return StepStatus::kOk;
  }

  /// `fn(position)` for every stored row of a head that is selected from, ascending.
  template <class Fn>
  void for_each_position(std::int32_t index, std::size_t c, std::int64_t h, Fn&& fn) const {
    selected_.for_each_position(selected_sequence(index), c, h, fn);
  }

  /// Whether a selection has dropped rows of the sequence: what is left of them is more than
  /// lengths and rules say. Such a sequence has no snapshot and makes no more checkpoints, between
  /// which each selection would leave a copy of every row that it moved.
  bool is_selected_from(std::int32_t index) const {
    bool is_selected = false;
    for_each_class(index, [&](std::size_t, const AnyKeepRule& rule, const AnyKeepState& kept) {
      rule.visit_selecting(kept, [&]<class State>(const auto&, const State& state) {
        is_selected |= state != State{};
      });
    });
    return is_selected;
  }

  // Steps -----------------------------------------------------------------------------------------

  /// Opens `step` over the chunks, in their order, and takes every page of all layers and heads
  /// that it and its checkpoints need, or none. One step is open at a time: the former one, if any,
  /// is dropped.
  /// @param copy  copy(PageCopy) for each page that a checkpoint does not share, before the step
  ///   writes to it.
  template <class Copy>
  StepStatus begin(Step& step, std::span<const SequenceChunk> chunks, Copy&& copy) {
    drop_open_step();
    reserve(step);
    const StepStatus status = enter(step, chunks);
    if (status != StepStatus::kOk) {
      for (const StepChunk& chunk : step.chunks_) {
        state(chunk.sequence).pending_length = -1;
        shrink_tables(chunk.sequence.index);
      }
      for (std::size_t i = 0; i < num_free_checkpoints_; ++i) {
        if (!tables_.has_block(free_checkpoint(i))) break;
        tables_.release(free_checkpoint(i));
      }
      step.chunks_.clear();
      return status;
    }
    for (const StepChunk& chunk : step.chunks_) {
      const std::int32_t index = chunk.sequence.index;
      if (needs_checkpoint(index, chunk.num_tokens())) make_checkpoint(index, copy);
      for_each_class(index, [&](std::size_t c, const AnyKeepRule& rule, const AnyKeepState& kept) {
        take(index, c, rule.changes(kept, chunk.lengths).take);
      });
    }
    step.books_ = this;
    step.epoch_ = open_epoch_ = ++last_epoch_;
    open_step_ = &step;
    open_chunks_ = step.chunks_;
    for (std::size_t l = 0; l < step.num_layers_; ++l) {
      step.heads_done_[l].store(0, std::memory_order_relaxed);
    }
    step.num_overflows_.store(0, std::memory_order_relaxed);
    return StepStatus::kOk;
  }

  /// The same of books without checkpoints.
  StepStatus begin(Step& step, std::span<const SequenceChunk> chunks) {
    return begin(step, chunks, [](const PageCopy&) {
      HEADWISE_ASSERT(false, "the pages of a checkpoint are to be copied");
    });
  }

  /// Makes the step's rows part of their sequences; refused unless it is the open step and every
  /// layer was attended.
  StepStatus commit(Step& step) {
    if (!is_open(step)) return StepStatus::kStale;
    for (std::size_t l = 0; step.num_growing_ > 0 && l < step.num_layers_; ++l) {
      if (!step.is_attended(static_cast<int>(l), geometry_.layers()[l].shape.num_kv_heads)) {
        return StepStatus::kIncomplete;
      }
    }
    for (const StepChunk& chunk : open_chunks_) {
      const std::int32_t index = chunk.sequence.index;
      for_each_class(index, [&](std::size_t c, const AnyKeepRule& rule, const AnyKeepState& kept) {
        const auto changes = rule.changes(kept, chunk.lengths);
        give_back(index, c, changes.release);
        state_of(index, c) = changes.next;
      });
      SequenceState& sequence = state(chunk.sequence);
      sequence.has_new_checkpoint = false;
      sequence.length = chunk.lengths.next;
      sequence.high_water = chunk.lengths.next_high_water();
    }
    close_step();
    return StepStatus::kOk;
  }

  /// Closes the step without a trace: its pages are free again, lengths are as before begin.
  StepStatus drop(const Step& step) {
    if (!is_open(step)) return StepStatus::kStale;
    drop_open_step();
    return StepStatus::kOk;
  }

  /// Whether `step` is the one that these books have open.
  bool is_open(const Step& step) const {
    return open_epoch_ != 0 && open_step_ == &step && step.books_ == this &&
           step.epoch_ == open_epoch_;
  }

  /// Bytes that the pool lacks for a step of these chunks, whole slabs; 0: it would begin, if
  /// nothing but pages is in its way. Pages of an open step count as taken, a chunk that passes
  /// max_context as one that ends there.
  std::size_t missing_bytes(std::span<const SequenceChunk> chunks) {
    std::fill(demand_.begin(), demand_.end(), 0);
    for (SequenceChunk chunk : chunks) {
      if (!is_live(chunk.sequence) || chunk.num_tokens < 0) continue;
      const std::int64_t room = geometry_.options().max_context - state(chunk.sequence).length;
      chunk.num_tokens = std::min(chunk.num_tokens, room);
      add_demand(chunk);
    }
    return pool_.missing_bytes(demand_);
  }

  /// Most new tokens that a step of this sequence alone could have now: bounded by max_context,
  /// max_chunk and the free pages (those of an open step count as taken).
  std::int64_t longest_chunk(SequenceId id) {
    if (!is_live(id)) return 0;
    const CacheOptions& options = geometry_.options();
    std::int64_t low = 0;
    std::int64_t high = std::min(options.max_chunk, options.max_context - state(id).length);
    while (low < high) {  // more tokens never need fewer pages
      const std::int64_t middle = low + (high - low + 1) / 2;
      const SequenceChunk chunk{id, middle};
      if (missing_bytes({&chunk, 1}) == 0) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

  // What views and appends read -------------------------------------------------------------------

  /// What the rule of class `c` remembers of a sequence.
  const AnyKeepState& keep_state(std::int32_t index, std::size_t c) const {
    HEADWISE_ASSERT(index >= 0 && index < geometry_.num_places(), "a chunk of no sequence");
    HEADWISE_ASSERT(c < geometry_.classes().size(), "class out of range");
    return states_[static_cast<std::size_t>(index) * geometry_.classes().size() + c];
  }
  /// What the rules of all classes remember of a sequence.
  std::span<const AnyKeepState> keep_states(std::int32_t index) const {
    return {&keep_state(index, 0), geometry_.classes().size()};
  }
  /// The same of head `h` of the class.
  AnyKeepState head_state(std::int32_t index, std::size_t c, std::int64_t h) const {
    const HeadClass& heads = geometry_.classes()[c];
    const AnyKeepState& kept = keep_state(index, c);
    return heads.selects()
               ? heads.rule.of_head(kept, selected_.first_slot(index, heads.first_selected + h))
               : kept;
  }
  /// Compensation rows of one sequence on the host, as HeadGeometry::compensation_offset counts.
  std::byte* compensation(std::int32_t index) const {
    return metadata_.data() + layout_.compensation +
           static_cast<std::size_t>(index) * layout_.compensation_bytes;
  }
  /// Copies of compensation rows that a device owes since the last call: a fork's or a begin's.
  std::span<const SumsCopy> sums_copies() const { return sums_copies_; }
  /// They are made, or nobody wants them.
  void clear_sums_copies() { sums_copies_.clear(); }
  /// Bytes of everything but the pages.
  std::size_t metadata_bytes() const { return metadata_.num_bytes(); }

 private:
  /// What a fork begins with: the tokens of a place up to `length`.
  struct Past {
    std::int32_t index;
    std::int64_t length;
    std::int64_t high_water;  ///< of the fork
  };

  std::size_t num_sequences() const {
    return static_cast<std::size_t>(geometry_.options().max_sequences);
  }
  std::size_t num_places() const { return static_cast<std::size_t>(geometry_.num_places()); }
  SequenceState& place(std::int32_t index) { return sequences_[static_cast<std::size_t>(index)]; }
  const SequenceState& place(std::int32_t index) const {
    return sequences_[static_cast<std::size_t>(index)];
  }
  SequenceState& state(SequenceId id) { return place(id.index); }
  const SequenceState& state(SequenceId id) const { return place(id.index); }
  AnyKeepState& state_of(std::int32_t index, std::size_t c) {
    return states_[static_cast<std::size_t>(index) * geometry_.classes().size() + c];
  }
  SelectedRows::Sequence selected_sequence(std::int32_t index) const {
    return {index, place(index).length, keep_states(index)};
  }
  std::int64_t heads_of(std::size_t c) const { return geometry_.classes()[c].num_heads; }
  std::size_t size_of(std::size_t c) const { return geometry_.classes()[c].page_size; }
  std::int64_t& demand_of(std::size_t c) { return demand_[size_of(c)]; }
  std::int64_t pages_of(std::int64_t tokens) const {
    return ceil_div(tokens, geometry_.options().page_tokens);
  }

  /// `fn(class, rule, state)` for every class of heads.
  template <class Fn>
  void for_each_class(std::span<const AnyKeepState> states, Fn&& fn) const {
    for (std::size_t c = 0; c < geometry_.classes().size(); ++c) {
      fn(c, geometry_.classes()[c].rule, states[c]);
    }
  }
  /// The same with a sequence's states.
  template <class Fn>
  void for_each_class(std::int32_t index, Fn&& fn) const {
    for_each_class(keep_states(index), fn);
  }

  /// `fn(class, head, rule, state)` for every head, class by class.
  template <class Fn>
  void for_each_head(std::int32_t index, Fn&& fn) const {
    for (std::size_t c = 0; c < geometry_.classes().size(); ++c) {
      for (std::int64_t h = 0; h < heads_of(c); ++h) {
        fn(c, h, geometry_.classes()[c].rule, head_state(index, c, h));
      }
    }
  }

  /// `fn(entry)` for the table entries `range` of every head of class `c`, head by head: a prompt's
  /// pages lie in a row for each head, which a device reads 2 to 3 % faster than pages dealt to all
  /// heads in turn (bench/results).
  template <class Fn>
  void for_each_entry(std::int32_t index, std::size_t c, EntryRange range, Fn&& fn) {
    if (range.count() == 0) return;  // nearly every decode step: no head of the class moves
    for (std::int64_t h = 0; h < heads_of(c); ++h) {
      std::int32_t* entries = tables_.head(index, c, h);
      for (std::int64_t i = range.first; i < range.last; ++i) fn(entries[i]);
    }
  }
  void take(std::int32_t index, std::size_t c, EntryRange range) {
    for_each_entry(index, c, range, [&](std::int32_t& entry) { entry = pool_.take(size_of(c)); });
    tables_.note(index, c, range.first, range.last);
  }
  void give_back(std::int32_t index, std::size_t c, EntryRange range) {
    for_each_entry(index, c, range, [&](std::int32_t& entry) { pool_.give_back(entry); });
  }
  void give_back_all(std::int32_t index) {
    const SequenceState& sequence = sequences_[static_cast<std::size_t>(index)];
    for_each_head(index, [&](std::size_t c, std::int64_t h, const AnyKeepRule& rule,
                             const AnyKeepState& kept) {
      for (const EntryRange held : rule.held(kept, sequence.length, sequence.high_water)) {
        for (const std::int32_t page : tables_.entries(index, c, h, held.first, held.last)) {
          pool_.give_back(page);
        }
      }
    });
  }
  /// The rules remember an empty sequence.
  void forget(std::int32_t index) {
    std::fill_n(&state_of(index, 0), geometry_.classes().size(), AnyKeepState{});
    selected_.forget(index);
  }
  void vacate(std::int32_t index) {
    drop_checkpoints(index, 0);
    give_back_all(index);
    tables_.release(index);
    place(index) = SequenceState{.generation = place(index).generation};
    free_sequences_[num_free_sequences_++] = index;
  }

  // Forks and checkpoints -------------------------------------------------------------------------

  std::int64_t lowest_kept(std::int32_t index) const {
    std::int64_t lowest = 0;
    for_each_class(index, [&](std::size_t, const AnyKeepRule& rule, const AnyKeepState& kept) {
      lowest = std::max(lowest, rule.lowest_kept(kept, place(index).high_water));
    });
    return lowest;
  }
  std::int64_t lowest_rollback(std::int32_t index) const {
    return std::max(place(index).high_water - geometry_.options().max_rollback, lowest_kept(index));
  }
  /// Where a fork of this length finds what it needs: in the sequence, or in a checkpoint.
  std::optional<Past> past_at(std::int32_t index, std::int64_t length) const {
    if (length < 0) return std::nullopt;
    for (; index >= 0 && place(index).length >= length; index = place(index).checkpoint) {
      const std::int64_t high_water = place(index).high_water;
      if (length == 0) return Past{index, 0, 0};
      if (length < lowest_kept(index)) continue;
      const bool in_reach = length >= high_water - geometry_.options().max_rollback;
      return Past{index, length, in_reach ? high_water : length};
    }
    return std::nullopt;
  }
  /// Adds the pages that a fork takes to the demand.
  void add_demand(const Past& past) {
    for_each_head(past.index, [&](std::size_t c, std::int64_t, const AnyKeepRule& rule,
                                  const AnyKeepState& kept) {
      const std::int64_t frozen = rule.frozen(kept, past.high_water);
      for (const EntryRange held : rule.held(kept, past.length, past.high_water)) {
        demand_of(c) += EntryRange{std::max(held.first, frozen), held.last}.count();
      }
    });
  }
  bool reserve_tables(std::int32_t index, std::int64_t high_water) {
    return high_water == 0 || tables_.reserve(index, pages_of(high_water));
  }
  /// Makes place `index` a fork; pages and tables are there.
  template <class Copy>
  void become(std::int32_t index, const Past& past, Copy&& copy) {
    SequenceState& sequence = place(index);
    sequence = SequenceState{.length = past.length,
                             .high_water = past.high_water,
                             .base = past.length,
                             .generation = sequence.generation};
    if (past.length == 0) {
      forget(index);
      std::memset(compensation(index), 0, layout_.compensation_bytes);
      return;
    }
    const bool is_named = static_cast<std::size_t>(index) < num_sequences();  // by a device's steps
    std::copy_n(&state_of(past.index, 0), geometry_.classes().size(), &state_of(index, 0));
    std::memcpy(compensation(index), compensation(past.index), layout_.compensation_bytes);
    if (layout_.compensation_bytes < geometry_.compensation_bytes()) {
      sums_copies_.push_back({past.index, index});
    }
    selected_.copy_first_slots(past.index, index);
    for_each_head(index, [&](std::size_t c, std::int64_t h, const AnyKeepRule& rule,
                             const AnyKeepState& kept) {
      const std::int64_t frozen = rule.frozen(kept, past.high_water);
      for (const EntryRange held : rule.held(kept, past.length, past.high_water)) {
        if (held.count() == 0) continue;
        const std::int32_t* from = tables_.head(past.index, c, h);
        std::int32_t* to = tables_.head(index, c, h);
        for (std::int64_t i = held.first; i < held.last; ++i) {
          if (i < frozen) {
            pool_.share(to[i] = from[i]);
          } else {
            to[i] = pool_.take(size_of(c));
            if (rule.selects()) selected_.copy_positions(from[i], to[i]);
            copy(PageCopy{from[i], to[i], geometry_.pool().page_bytes(size_of(c))});
          }
        }
        if (is_named) tables_.note(index, c, held.first, held.last);
      }
    });
  }

  std::int32_t free_checkpoint(std::size_t nth) const {
    return free_sequences_[num_sequences() + num_free_checkpoints_ - 1 - nth];
  }
  bool needs_checkpoint(std::int32_t index, std::int64_t num_tokens) const {
    const std::int64_t every = geometry_.options().checkpoint_tokens;
    return every > 0 && num_tokens > 0 && place(index).length - place(index).base >= every &&
           !is_selected_from(index);
  }
  Past as_it_is(std::int32_t index) const {
    return {index, place(index).length, place(index).high_water};
  }
  /// A fork that only the books know of. There is a place for it: a sequence has never more than
  /// most_checkpoints().
  template <class Copy>
  void make_checkpoint(std::int32_t index, Copy&& copy) {
    const std::int32_t at = free_checkpoint(0);
    --num_free_checkpoints_;
    become(at, as_it_is(index), copy);
    SequenceState& sequence = place(index);
    place(at).checkpoint = std::exchange(sequence.checkpoint, at);
    place(at).base = std::exchange(sequence.base, sequence.length);
    sequence.has_new_checkpoint = true;
  }
  void drop_newest_checkpoint(SequenceState& sequence) {
    const std::int32_t at = sequence.checkpoint;
    sequence.checkpoint = place(at).checkpoint;
    sequence.base = place(at).base;
    give_back_all(at);
    tables_.release(at);
    place(at) = SequenceState{};
    free_sequences_[num_sequences() + num_free_checkpoints_++] = at;
  }
  /// Checkpoints of more than `length` tokens are no more.
  void drop_checkpoints(std::int32_t index, std::int64_t length) {
    SequenceState& sequence = place(index);
    while (sequence.checkpoint >= 0 && place(sequence.checkpoint).length > length) {
      drop_newest_checkpoint(sequence);
    }
    sequence.base = std::min(sequence.base, length);
  }

  /// Tables are as large as the committed tokens need: a step that came to nothing leaves no block
  /// that its pages do not pay for.
  void shrink_tables(std::int32_t index) {
    tables_.shrink(index, pages_of(sequences_[static_cast<std::size_t>(index)].high_water));
  }

  void reserve(Step& step) const {
    step.books_ = nullptr;  // what it was elsewhere it is no more, also where begin refuses
    step.epoch_ = 0;
    step.chunks_.clear();
    step.num_growing_ = 0;
    step.planned_threads_ = 0;
    step.chunks_.reserve(num_sequences());
    if (step.num_layers_ != geometry_.layers().size()) {
      step.num_layers_ = geometry_.layers().size();
      step.heads_done_ = std::make_unique<std::atomic<std::int64_t>[]>(step.num_layers_);
    }
  }

  void add_demand(const SequenceChunk& chunk) {
    const SequenceState& sequence = state(chunk.sequence);
    const StepLengths lengths{sequence.length, sequence.high_water,
                              sequence.length + chunk.num_tokens};
    for_each_class(chunk.sequence.index,
                   [&](std::size_t c, const AnyKeepRule& rule, const AnyKeepState& kept) {
                     demand_of(c) += heads_of(c) * rule.changes(kept, lengths).take.count();
                   });
    if (needs_checkpoint(chunk.sequence.index, chunk.num_tokens)) {
      add_demand(as_it_is(chunk.sequence.index));
    }
  }

  /// Fills the step's entries and counts pages; marks the sequences as pending.
  StepStatus enter(Step& step, std::span<const SequenceChunk> chunks) {
    const CacheOptions& options = geometry_.options();
    std::int64_t first_row = 0;
    std::fill(demand_.begin(), demand_.end(), 0);
    for (const SequenceChunk& chunk : chunks) {
      if (!is_live(chunk.sequence) || chunk.num_tokens < 0) return StepStatus::kInvalidChunk;
      SequenceState& sequence = state(chunk.sequence);
      if (sequence.pending_length >= 0) return StepStatus::kInvalidChunk;
      if (chunk.num_tokens > options.max_context - sequence.length) {
        return StepStatus::kContextTooLong;
      }
      if (chunk.num_tokens > options.max_chunk) return StepStatus::kChunkTooLong;
      add_demand(chunk);
      sequence.pending_length = sequence.length + chunk.num_tokens;
      step.chunks_.push_back({chunk.sequence,
                              {sequence.length, sequence.high_water, sequence.pending_length},
                              first_row,
                              chunk.phase});
      first_row += chunk.num_tokens;
      if (chunk.num_tokens > 0) ++step.num_growing_;
    }
    if (pool_.missing_bytes(demand_) != 0) return StepStatus::kOutOfPages;
    std::size_t num_checkpoints = 0;
    for (const StepChunk& chunk : step.chunks_) {
      const std::int32_t index = chunk.sequence.index;
      if (!reserve_tables(index, chunk.lengths.next_high_water())) return StepStatus::kOutOfTables;
      if (needs_checkpoint(index, chunk.num_tokens()) &&
          !reserve_tables(free_checkpoint(num_checkpoints++), chunk.lengths.high_water)) {
        return StepStatus::kOutOfTables;
      }
    }
    return StepStatus::kOk;
  }

  /// No step is open; sequences that were released meanwhile are gone now.
  void close_step() {
    open_epoch_ = 0;
    for (const StepChunk& chunk : open_chunks_) {
      SequenceState& sequence = state(chunk.sequence);
      sequence.pending_length = -1;
      if (sequence.is_leaving) vacate(chunk.sequence.index);
    }
  }

  void drop_open_step() {
    if (open_epoch_ == 0) return;
    for (const StepChunk& chunk : open_chunks_) {
      const std::int32_t index = chunk.sequence.index;
      for_each_class(index, [&](std::size_t c, const AnyKeepRule& rule, const AnyKeepState& kept) {
        give_back(index, c, rule.changes(kept, chunk.lengths).take);
      });
      if (std::exchange(place(index).has_new_checkpoint, false)) {
        drop_newest_checkpoint(place(index));
      }
      shrink_tables(index);
    }
    close_step();
  }

  CacheGeometry geometry_;
  BooksLayout layout_;
  Allocation metadata_;
  PagePool pool_;
  PageTables tables_;
  SelectedRows selected_;
  std::span<SequenceState> sequences_;
  std::span<AnyKeepState> states_;
  std::span<std::int32_t> free_sequences_;
  std::span<std::int64_t> demand_;  // pages of each size: of the call in progress
  std::size_t num_free_sequences_ = 0;
  std::size_t num_free_checkpoints_ = 0;
  std::vector<SumsCopy> sums_copies_;   // a device's, never more than places
  std::vector<StepChunk> open_chunks_;  // a copy: the engine's Step may be gone before a drop
  std::uint64_t last_epoch_ = 0;
  std::uint64_t open_epoch_ = 0;     // 0: no step is open
  const Step* open_step_ = nullptr;  // never read through: a former cache's step may bear our epoch
};

}  // namespace headwise::inline v0
