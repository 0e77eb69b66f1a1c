// SPDX-License-Identifier: MIT
/// @file page_ledger.hpp
/// PageLedger: which sequence holds which page; begin, commit, drop and rollback. Knows no rows.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "headwise/cache/geometry.hpp"
#include "headwise/cache/page_pool.hpp"
#include "headwise/cache/step.hpp"
#include "headwise/core/check.hpp"

namespace headwise::inline v0 {

/// Where the ledger's metadata lie in their one allocation; their sum is part of estimate().
struct MetadataLayout {
  std::size_t sequences = 0;       ///< offset of SequenceState [max_sequences]
  std::size_t tables = 0;          ///< of int32 [max_sequences][entries_per_sequence]
  std::size_t compensation = 0;    ///< of float [max_sequences][compensation_floats_per_sequence]
  std::size_t banks = 0;           ///< of uint8 [max_sequences][classes]
  std::size_t free_pages = 0;      ///< of int32 [num_pages]
  std::size_t free_sequences = 0;  ///< of int32 [max_sequences]
  std::size_t total_bytes = 0;     ///< of the allocation; sections start on cache lines

  /// The layout for a cache of this geometry.
  explicit MetadataLayout(const CacheGeometry& geometry);
};

/// One sequence's state. Everything else about it follows from the two lengths.
struct SequenceState {
  std::int64_t length = 0;           ///< tokens committed
  std::int64_t high_water = 0;       ///< the longest length committed
  std::int64_t pending_length = -1;  ///< after the open step; -1: in no open step
  bool live = false;                 ///< between add_sequence and release
};

inline MetadataLayout::MetadataLayout(const CacheGeometry& geometry) {
  const auto sequence_count = static_cast<std::size_t>(geometry.options().max_sequences);
  const auto section = [this](std::size_t bytes) {
    const std::size_t begin = total_bytes;
    total_bytes += (bytes + 63) / 64 * 64;
    return begin;
  };
  sequences = section(sequence_count * sizeof(SequenceState));
  tables = section(sequence_count * static_cast<std::size_t>(geometry.entries_per_sequence()) *
                   sizeof(std::int32_t));
  compensation = section(sequence_count *
                         static_cast<std::size_t>(geometry.compensation_floats_per_sequence()) *
                         sizeof(float));
  banks = section(sequence_count * geometry.classes().size());
  free_pages = section(static_cast<std::size_t>(geometry.num_pages()) * sizeof(std::int32_t));
  free_sequences = section(sequence_count * sizeof(std::int32_t));
}

/// Page tables, lengths and the open step of a cache. One thread calls begin, commit, drop,
/// rollback, add_sequence and release; reading is free for all between begin and commit.
class PageLedger {
 public:
  /// @throws ConfigError for a pool without a page or with more than 2^31 - 1, or caller's memory
  ///   that is too small or not 64-byte aligned.
  explicit PageLedger(CacheGeometry geometry)
      : geometry_(std::move(geometry)),
        layout_(checked(geometry_)),
        page_memory_(options().resource, options().page_memory.empty() ? pool_bytes() : 0,
                     pool_bytes() >= PagePool::kHugePage ? PagePool::kHugePage : kCacheLine),
        metadata_(options().resource, layout_.total_bytes, kCacheLine),
        pool_(options().page_memory.empty() ? page_memory_.data() : options().page_memory.data(),
              geometry_.page_bytes(), carve<std::int32_t>(layout_.free_pages, num_pages()),
              options().page_memory_place),
        sequences_(carve<SequenceState>(layout_.sequences, num_sequences())),
        tables_(carve<std::int32_t>(
            layout_.tables,
            num_sequences() * static_cast<std::size_t>(geometry_.entries_per_sequence()))),
        compensation_(carve<float>(
            layout_.compensation,
            num_sequences() *
                static_cast<std::size_t>(geometry_.compensation_floats_per_sequence()))),
        banks_(carve<std::uint8_t>(layout_.banks, num_sequences() * geometry_.classes().size())),
        free_sequences_(carve<std::int32_t>(layout_.free_sequences, num_sequences())) {
    page_memory_.advise_huge_pages();
    for (std::size_t i = 0; i < num_sequences(); ++i) {
      free_sequences_[i] = static_cast<std::int32_t>(num_sequences() - 1 - i);
    }
    num_free_sequences_ = num_sequences();
    open_entries_.reserve(num_sequences());
  }

  PageLedger(const PageLedger&) = delete;
  PageLedger& operator=(const PageLedger&) = delete;

  /// What follows from shape, plan and options.
  const CacheGeometry& geometry() const { return geometry_; }
  /// As given.
  const CacheOptions& options() const { return geometry_.options(); }
  /// The pages and how many are free.
  const PagePool& pool() const { return pool_; }

  // Sequences -------------------------------------------------------------------------------------

  /// An empty sequence, or nothing when max_sequences are in use.
  std::optional<SequenceId> add_sequence() {
    if (num_free_sequences_ == 0) return std::nullopt;
    const std::int32_t id = free_sequences_[--num_free_sequences_];
    sequences_[static_cast<std::size_t>(id)] = {0, 0, -1, true};
    std::fill_n(banks_of(SequenceId{id}), geometry_.classes().size(), std::uint8_t{0});
    return SequenceId{id};
  }

  /// Gives all pages of the sequence back; an open step that it takes part in is dropped.
  void release(SequenceId id) {
    HEADWISE_ASSERT(is_live(id), "release of an unknown sequence");
    if (!is_live(id)) return;
    if (state(id).pending_length >= 0) drop_open_step();
    const SequenceState& sequence = state(id);
    for_each_class([&](std::size_t c, const auto& store) {
      for (const EntryRange range : store.held(sequence.length, sequence.high_water, bank(id, c))) {
        give_back(id, c, range);
      }
    });
    state(id) = {};
    free_sequences_[num_free_sequences_++] = static_cast<std::int32_t>(id);
  }

  /// Whether `id` was added and not released since.
  bool is_live(SequenceId id) const {
    const auto i = static_cast<std::int64_t>(id);
    return i >= 0 && i < options().max_sequences && state(id).live;
  }
  /// Tokens committed; the position of the sequence's next token.
  std::int64_t length(SequenceId id) const { return state(id).length; }
  /// The longest length ever committed.
  std::int64_t high_water(SequenceId id) const { return state(id).high_water; }

  /// Pages that the sequence holds, those of an open step not counted.
  std::int64_t pages_held(SequenceId id) const {
    return geometry_.pages_held(state(id).length, state(id).high_water);
  }

  /// Takes the sequence back to `new_length` tokens in every layer and head, exactly; allowed down
  /// to high_water - max_rollback. An open step that it takes part in is dropped.
  StepStatus rollback(SequenceId id, std::int64_t new_length) {
    if (!is_live(id)) return StepStatus::kInvalidChunk;
    SequenceState& sequence = state(id);
    const std::int64_t lowest =
        std::max<std::int64_t>(0, sequence.high_water - options().max_rollback);
    if (new_length < lowest || new_length > sequence.length) return StepStatus::kTooFarBack;
    if (sequence.pending_length >= 0) drop_open_step();
    for_each_class([&](std::size_t c, const auto& store) {
      give_back(id, c, store.rolled_back(sequence.length, new_length, bank(id, c)));
    });
    sequence.length = new_length;
    return StepStatus::kOk;
  }

  // Steps -----------------------------------------------------------------------------------------

  /// Opens `step` over the chunks, in their order, and takes every page of all layers and heads
  /// that it needs, or none. One step is open at a time: the former one, if any, is dropped.
  StepStatus begin(Step& step, std::span<const SequenceChunk> chunks, Phase phase) {
    drop_open_step();
    reserve(step);
    const StepStatus status = enter(step, chunks, phase);
    if (status != StepStatus::kOk) {
      leave(step.entries_);
      step.entries_.clear();
      return status;
    }
    for (const StepEntry& entry : step.entries_) {
      for_each_class([&](std::size_t c, const auto& store) {
        take(entry.sequence, c, store.changes(entry.lengths, bank(entry.sequence, c)).take);
      });
    }
    step.ledger_ = this;
    step.epoch_ = open_epoch_ = ++last_epoch_;
    open_step_ = &step;
    open_entries_ = step.entries_;
    for (std::size_t l = 0; l < step.num_layers_; ++l) {
      step.heads_done_[l].store(0, std::memory_order_relaxed);
    }
    return StepStatus::kOk;
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
    for (const StepEntry& entry : step.entries_) {
      for_each_class([&](std::size_t c, const auto& store) {
        const PageChanges changes = store.changes(entry.lengths, bank(entry.sequence, c));
        give_back(entry.sequence, c, changes.release);
        if (changes.flips_bank) banks_of(entry.sequence)[c] ^= 1U;
      });
      SequenceState& sequence = state(entry.sequence);
      sequence.length = entry.lengths.next;
      sequence.high_water = entry.lengths.next_high_water();
    }
    leave(open_entries_);
    return StepStatus::kOk;
  }

  /// Closes the step without a trace: its pages are free again, lengths are as before begin.
  StepStatus drop(Step& step) {
    if (!is_open(step)) return StepStatus::kStale;
    drop_open_step();
    return StepStatus::kOk;
  }

  /// Whether `step` is the one that this ledger has open.
  bool is_open(const Step& step) const {
    return open_epoch_ != 0 && open_step_ == &step && step.ledger_ == this &&
           step.epoch_ == open_epoch_;
  }

  // What views and appends read -------------------------------------------------------------------

  /// Page table of one head: [table_entries()] of its store.
  const std::int32_t* table(SequenceId id, const HeadPlace& head) const {
    return tables_.data() + static_cast<std::int64_t>(id) * geometry_.entries_per_sequence() +
           head.table_offset;
  }
  /// Sums of one head: [compensation_rows()] rows of k_dim + v_dim floats.
  float* compensation(SequenceId id, const HeadPlace& head) const {
    return compensation_.data() +
           static_cast<std::int64_t>(id) * geometry_.compensation_floats_per_sequence() +
           head.compensation_offset;
  }
  /// Which bank of a class holds the committed rows: 0 or 1.
  int bank(SequenceId id, std::size_t class_idx) const { return banks_of(id)[class_idx]; }

 private:
  static constexpr std::size_t kCacheLine = 64;

  static const CacheGeometry& checked(const CacheGeometry& geometry) {
    const CacheOptions& options = geometry.options();
    const std::int64_t pages = geometry.num_pages();
    if (pages < 1) {
      fail<ConfigError>("max_bytes (", options.max_bytes, ") holds no page of ",
                        geometry.page_bytes(), " bytes");
    }
    if (pages > std::numeric_limits<std::int32_t>::max()) {
      fail<ConfigError>("a pool has at most 2^31 - 1 pages, asked for ", pages);
    }
    if (options.page_memory.empty() && options.page_memory_place == PageMemory::kDevice) {
      fail<ConfigError>("device pages must be given in page_memory");
    }
    if (!options.page_memory.empty()) {
      const std::size_t needed = static_cast<std::size_t>(pages) * geometry.page_bytes();
      if (options.page_memory.size() < needed) {
        fail<ConfigError>("page_memory has ", options.page_memory.size(), " bytes, needed are ",
                          needed);
      }
      if (reinterpret_cast<std::uintptr_t>(options.page_memory.data()) % kCacheLine != 0) {
        fail<ConfigError>("page_memory must be aligned to ", kCacheLine, " bytes");
      }
    }
    return geometry;
  }

  std::size_t num_pages() const { return static_cast<std::size_t>(geometry_.num_pages()); }
  std::size_t num_sequences() const { return static_cast<std::size_t>(options().max_sequences); }
  std::size_t pool_bytes() const { return num_pages() * geometry_.page_bytes(); }

  template <class T>
  std::span<T> carve(std::size_t offset, std::size_t count) {
    static_assert(std::is_trivially_destructible_v<T>);
    T* first = reinterpret_cast<T*>(metadata_.data() + offset);
    std::uninitialized_value_construct_n(first, count);
    return {first, count};
  }

  SequenceState& state(SequenceId id) { return sequences_[static_cast<std::size_t>(id)]; }
  const SequenceState& state(SequenceId id) const {
    return sequences_[static_cast<std::size_t>(id)];
  }
  std::uint8_t* banks_of(SequenceId id) const {
    return banks_.data() + static_cast<std::size_t>(id) * geometry_.classes().size();
  }

  template <class Fn>
  void for_each_class(Fn&& fn) const {
    for (std::size_t c = 0; c < geometry_.classes().size(); ++c) {
      std::visit([&](const auto& store) { fn(c, store); }, geometry_.classes()[c].store);
    }
  }

  /// `fn(entry)` for the table entries `range` of every head of class `c`, head by head: a prompt's
  /// pages lie in a row for each head, which a device reads 2 to 3 % faster than pages dealt to all
  /// heads in turn (bench/results).
  template <class Fn>
  void for_each_entry(SequenceId id, std::size_t c, EntryRange range, Fn&& fn) {
    if (range.count() == 0) return;  // nearly every decode step: no head of the class moves
    for (const HeadPlace& head : geometry_.heads()) {
      if (static_cast<std::size_t>(head.class_idx) != c) continue;
      std::int32_t* entries = const_cast<std::int32_t*>(table(id, head));
      for (std::int64_t i = range.first; i < range.last; ++i) fn(entries[i]);
    }
  }
  void take(SequenceId id, std::size_t c, EntryRange range) {
    for_each_entry(id, c, range, [&](std::int32_t& entry) { entry = pool_.take(); });
  }
  void give_back(SequenceId id, std::size_t c, EntryRange range) {
    for_each_entry(id, c, range, [&](std::int32_t& entry) { pool_.give_back(entry); });
  }

  void reserve(Step& step) const {
    step.entries_.clear();
    step.num_growing_ = 0;
    step.planned_threads_ = 0;
    step.entries_.reserve(num_sequences());
    if (step.num_layers_ != geometry_.layers().size()) {
      step.num_layers_ = geometry_.layers().size();
      step.heads_done_ = std::make_unique<std::atomic<std::int64_t>[]>(step.num_layers_);
    }
  }

  /// Fills the step's entries and counts pages; marks the sequences as pending.
  StepStatus enter(Step& step, std::span<const SequenceChunk> chunks, Phase phase) {
    step.phase_ = phase;
    std::int64_t first_row = 0;
    std::int64_t pages = 0;
    for (const SequenceChunk& chunk : chunks) {
      if (!is_live(chunk.sequence) || chunk.num_tokens < 0 ||
          state(chunk.sequence).pending_length >= 0) {
        return StepStatus::kInvalidChunk;
      }
      SequenceState& sequence = state(chunk.sequence);
      if (chunk.num_tokens > options().max_context - sequence.length) {
        return StepStatus::kContextTooLong;
      }
      sequence.pending_length = sequence.length + chunk.num_tokens;
      step.entries_.push_back({chunk.sequence,
                               {sequence.length, sequence.high_water, sequence.pending_length},
                               first_row});
      first_row += chunk.num_tokens;
      if (chunk.num_tokens > 0) ++step.num_growing_;
      for_each_class([&](std::size_t c, const auto& store) {
        const PageChanges changes =
            store.changes(step.entries_.back().lengths, bank(chunk.sequence, c));
        pages += geometry_.classes()[c].num_heads * changes.take.count();
      });
    }
    return pages <= pool_.num_free() ? StepStatus::kOk : StepStatus::kOutOfPages;
  }

  /// The entries' sequences are free for the next step; no step is open.
  void leave(std::span<const StepEntry> entries) {
    for (const StepEntry& entry : entries) state(entry.sequence).pending_length = -1;
    open_epoch_ = 0;
  }

  void drop_open_step() {
    if (open_epoch_ == 0) return;
    for (const StepEntry& entry : open_entries_) {
      for_each_class([&](std::size_t c, const auto& store) {
        give_back(entry.sequence, c, store.changes(entry.lengths, bank(entry.sequence, c)).take);
      });
    }
    leave(open_entries_);
  }

  CacheGeometry geometry_;
  MetadataLayout layout_;
  Allocation page_memory_;
  Allocation metadata_;
  PagePool pool_;
  std::span<SequenceState> sequences_;
  std::span<std::int32_t> tables_;
  std::span<float> compensation_;
  std::span<std::uint8_t> banks_;
  std::span<std::int32_t> free_sequences_;
  std::size_t num_free_sequences_ = 0;
  std::vector<StepEntry> open_entries_;  // a copy: the engine's Step may be gone before a drop
  std::uint64_t last_epoch_ = 0;
  std::uint64_t open_epoch_ = 0;  // 0: no step is open
  const Step* open_step_ =
      nullptr;  // never read through: a former ledger's step may bear our epoch
};

}  // namespace headwise::inline v0
