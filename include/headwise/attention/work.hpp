// SPDX-License-Identifier: MIT
/// @file work.hpp
/// StepWork: how every head of every sequence of a step is cut into tasks. Made once a step, looked
/// up by the tasks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <new>

#include "headwise/attention/cpu/decode.hpp"
#include "headwise/attention/cpu/prefill.hpp"
#include "headwise/cache/geometry.hpp"
#include "headwise/cache/step.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/memory.hpp"
#include "headwise/core/rounding.hpp"
#include "headwise/core/scratch.hpp"

namespace headwise::inline v0 {

/// Past rows that make a split worth its merge: long enough that a merge of partial results is
/// noise beside it, short enough that heads of unequal length spread evenly over a few threads.
inline constexpr std::int64_t kSplitRows = 2048;

/// Splits of one head, however long it is.
inline constexpr std::int64_t kMaxSplits = 64;

/// Partial rows of one head: splits x query rows. It bounds their memory, 1 MiB a head of width
/// 128, and their share of its work.
inline constexpr std::int64_t kMaxPartialRows = 2048;

/// Query rows (tokens x group) up to which stored rows are read in place, by all of them at once;
/// more share blocks that are packed to floats, in tiles of queries.
inline constexpr std::int64_t kMaxDecodeRows = 64;

/// How one head of one sequence is cut, into tiles of queries times splits of the past: a function
/// of that sequence's step alone, never of the threads or of the other sequences, so that neither
/// changes a result's bits.
///
/// Few queries over a long past are one tile and many splits (decode); many queries are many tiles
/// and one split (prefill); what lies between has both, so that no long head is one task.
struct HeadCut {
  std::int64_t num_tiles = 0;     ///< 0 for a sequence without new tokens
  std::int64_t tile_queries = 0;  ///< queries of each tile but the last
  std::int64_t num_splits = 0;    ///< 1: a tile's task writes its output itself
  std::int64_t split_rows = 0;    ///< past rows of each split but the last

  /// @param past_rows  stored rows that some query of the step may see
  static constexpr HeadCut of(std::int64_t num_queries, int group_size, std::int64_t past_rows) {
    if (num_queries == 0) return {};
    HeadCut cut;
    cut.tile_queries = largest_tile(num_queries, group_size);
    cut.num_tiles = ceil_div(num_queries, cut.tile_queries);
    const std::int64_t splits = most_splits(num_queries * group_size, past_rows);
    cut.split_rows =
        std::max(round_up(ceil_div(past_rows, splits), kSplitMultiple), kSplitMultiple);
    cut.num_splits = std::max<std::int64_t>(1, ceil_div(past_rows, cut.split_rows));
    return cut;
  }

  /// Tasks of the head.
  constexpr std::int64_t num_parts() const { return num_tiles * num_splits; }
  /// Whether stored rows are read in place.
  constexpr bool decodes(int group_size) const {
    return num_tiles == 1 && tile_queries * group_size <= kMaxDecodeRows;
  }
  /// Queries of a tile of a step of `num_queries`.
  constexpr std::int64_t queries_of(std::int64_t tile, std::int64_t num_queries) const {
    return std::min(tile_queries, num_queries - tile * tile_queries);
  }
  /// Floats of the partial results of the first `tiles` tiles, split by split; the last of them is
  /// as large as the others.
  constexpr std::int64_t partial_floats(std::int64_t tiles, int group_size, int v_dim) const {
    return tiles * num_splits *
           static_cast<std::int64_t>(decode_partial_floats(tile_queries * group_size, v_dim));
  }
  /// Floats of all partial results of a head of `num_queries`.
  constexpr std::int64_t partial_floats_of(std::int64_t num_queries, int group_size,
                                           int v_dim) const {
    if (num_splits <= 1) return 0;
    const std::int64_t last = queries_of(num_tiles - 1, num_queries) * group_size;
    return partial_floats(num_tiles - 1, group_size, v_dim) +
           num_splits * static_cast<std::int64_t>(decode_partial_floats(last, v_dim));
  }

  /// Queries of the tiles that `num_queries` are cut into.
  static constexpr std::int64_t largest_tile(std::int64_t num_queries, int group_size) {
    return std::min(num_queries, prefill_tile_queries(group_size));
  }
  /// The most splits of a head with so many query rows and at most so many past rows.
  static constexpr std::int64_t most_splits(std::int64_t query_rows, std::int64_t past_rows) {
    return std::max<std::int64_t>(
        1, std::min({ceil_div(past_rows, kSplitRows), kMaxSplits, kMaxPartialRows / query_rows}));
  }

 private:
  static constexpr std::int64_t kSplitMultiple = 64;  // rows of a kernel's block
};

/// The most that any step of at most `max_chunk` tokens makes of one head.
struct LargestCut {
  std::int64_t num_parts = 0;       ///< tasks
  std::int64_t partial_floats = 0;  ///< of all its partial results

  /// @param past_rows  stored rows that a query may see, at most
  static constexpr LargestCut of(const LayerShape& layer, std::int64_t max_chunk,
                                 std::int64_t past_rows) {
    LargestCut largest{ceil_div(max_chunk, prefill_tile_queries(layer.group_size)), 0};
    const std::int64_t most = HeadCut::most_splits(layer.group_size, past_rows);
    for (std::int64_t splits = 2; splits <= most; ++splits) {
      // The most queries that are cut into so many splits; fewer take no more.
      const std::int64_t queries = std::min(max_chunk, kMaxPartialRows / splits / layer.group_size);
      const std::int64_t tile = HeadCut::largest_tile(queries, layer.group_size);
      const HeadCut cut{ceil_div(queries, tile), tile, splits, 0};
      largest.num_parts = std::max(largest.num_parts, cut.num_parts());
      largest.partial_floats = std::max(
          largest.partial_floats, cut.partial_floats_of(queries, layer.group_size, layer.v_dim));
    }
    return largest;
  }
};

/// The heads of one class of one sequence, in one layer: they are cut alike.
struct WorkItem {
  HeadCut cut;                     ///< of each of the heads
  std::int64_t first_task = 0;     ///< of all its heads' tasks, head by head, tile by tile
  std::int64_t first_partial = 0;  ///< float offset; where there are splits
  std::int64_t first_counter = 0;  ///< one a head; where a head has more than one part
  std::int32_t chunk = 0;          ///< in Step::chunks()
  std::int32_t first_head = 0;     ///< in LayerGeometry::task_order
};

/// The tasks of a layer.
struct LayerWork {
  std::int64_t num_tasks = 0;                  ///< of all items
  const WorkItem* items = nullptr;             ///< entry by entry, class by class
  const std::int32_t* item_of_task = nullptr;  ///< [num_tasks]

  /// The item of a task in [0, num_tasks).
  const WorkItem& item(std::int64_t task) const { return items[item_of_task[task]]; }
};

/// What a step's work takes up.
struct WorkSize {
  std::int64_t num_layers = 0;      ///< each thread's share of them is noted
  std::int64_t num_kinds = 0;       ///< of layers
  std::int64_t num_items = 0;       ///< in all kinds
  std::int64_t num_tasks = 0;       ///< in all kinds
  std::int64_t num_counters = 0;    ///< of the kind that has most: layers share them
  std::int64_t partial_floats = 0;  ///< of the kind that has most
  std::size_t thread_floats = 0;    ///< of each thread, in any kind

  /// Any step over all sequences of a cache.
  /// @throws ConfigError where tasks or partial results pass 64 bits.
  static WorkSize of_largest_step(const CacheGeometry& geometry) {
    const std::int64_t sequences = geometry.options().max_sequences;
    const std::int64_t chunk = geometry.options().max_chunk;
    WorkSize size;
    size.num_layers = std::ssize(geometry.layers());
    for (const int first : geometry.layer_kinds()) {
      const LayerGeometry& layer = geometry.layers()[static_cast<std::size_t>(first)];
      WorkSize kind;
      for (const ClassRun& run : layer.runs) {
        const LargestCut cut =
            LargestCut::of(layer.shape, chunk, geometry.most_rows_seen(run.class_idx));
        const std::int64_t heads = sequences * run.num_heads;  // at most 2^31 * 2^16
        const auto of_heads = [&](std::int64_t each, const char* what) {
          return detail::checked_mul(heads, each, what);
        };
        kind.num_items += sequences;
        kind.num_tasks =
            detail::checked_add(kind.num_tasks, of_heads(cut.num_parts, "tasks"), "tasks");
        kind.num_counters += heads;
        kind.partial_floats =
            detail::checked_add(kind.partial_floats,
                                of_heads(cut.partial_floats, "partial results"), "partial results");
      }
      size.add_kind(kind, layer.shape);
    }
    return size;
  }

  /// Adds a kind, whose items, tasks, counters and partials are counted.
  void add_kind(const WorkSize& kind, const LayerShape& shape) {
    ++num_kinds;
    num_items += kind.num_items;
    num_tasks = detail::checked_add(num_tasks, kind.num_tasks, "tasks");
    num_counters = std::max(num_counters, kind.num_counters);
    partial_floats = std::max(partial_floats, kind.partial_floats);
    thread_floats =
        std::max(thread_floats, prefill_scratch_floats(shape.group_size, shape.k_dim, shape.v_dim));
  }
};

/// A step's work, in the step's scratch: items and tasks of every kind of layer, counters, partial
/// results and each thread's share. O(sequences x classes + tasks) to make, O(1) to look up.
class StepWork {
 public:
  /// Bytes of scratch that work of this size takes.
  static std::size_t num_bytes(const WorkSize& size, std::size_t num_threads) {
    return Offsets(size, num_threads).end;
  }

  /// Cuts an open step; grows its scratch where it is too small.
  template <class Cache>
  static void cut(const Cache& cache, Step& step, std::size_t num_threads) {
    const WorkSize size = size_of(cache, step);
    const Offsets offsets(size, num_threads);
    step.reserve_scratch_bytes(offsets.end);
    new (step.scratch().bytes()) StepWork(cache, step, size, offsets, num_threads);
    step.note_planned(num_threads, [&](int layer) {
      return cache.geometry().layers()[static_cast<std::size_t>(layer)].shape.num_kv_heads;
    });
  }
  /// The work that cut() left there.
  static const StepWork& in(const Scratch& scratch) {
    return *std::launder(reinterpret_cast<const StepWork*>(scratch.bytes()));
  }

  /// Of the layers of one kind.
  const LayerWork& of_kind(int kind) const { return kinds_[kind]; }
  /// Where a thread computes: the most that any kind of layer needs, on a cache line.
  float* thread_scratch(std::size_t thread) const { return threads_ + thread * thread_floats_; }
  /// Partial results, from a float offset on.
  float* partials(std::int64_t offset) const { return partials_ + offset; }

  /// Notes that a thread begins its share of a layer. Any thread.
  /// @return whether it had not before
  bool begins_share(int layer, std::size_t thread) const {
    return !shares_of(layer)[thread].exchange(true, std::memory_order_relaxed);
  }
  /// Notes that a layer is attended other than by shares: there is none left to begin.
  void take_shares(int layer) const {
    for (std::size_t thread = 0; thread < num_threads_; ++thread) begins_share(layer, thread);
  }

  /// Notes that one of a head's `num_parts` parts is done.
  /// @param attempt  parts of other attempts at a layer, which an exception cut short, do not count
  /// @return whether it was the last one; if so, what the others wrote is visible
  bool arrives_last(std::int64_t counter, std::uint32_t attempt, std::int64_t num_parts) const {
    std::atomic<std::uint64_t>& arrived = counters_[counter];
    std::uint64_t before = arrived.load(std::memory_order_relaxed);
    std::uint64_t after = 0;
    do {
      after = (before >> 32 == attempt ? before : std::uint64_t{attempt} << 32) + 1;
    } while (!arrived.compare_exchange_weak(before, after, std::memory_order_acq_rel,
                                            std::memory_order_relaxed));
    if ((after & 0xffffffffU) != static_cast<std::uint64_t>(num_parts)) return false;
    arrived.store(0, std::memory_order_relaxed);  // ready for the next layer
    return true;
  }

 private:
  std::atomic<bool>* shares_of(int layer) const {
    return shares_ + static_cast<std::size_t>(layer) * num_threads_;
  }

  /// Byte offsets, each on a cache line, and their end.
  struct Offsets {
    std::size_t kinds, items, tasks, counters, shares, partials, threads, end;

    Offsets(const WorkSize& size, std::size_t num_threads) {
      Sections sections;
      const auto count = [](std::int64_t n) { return static_cast<std::size_t>(n); };
      sections.add<StepWork>(1);
      kinds = sections.add<LayerWork>(count(size.num_kinds));
      items = sections.add<WorkItem>(count(size.num_items));
      tasks = sections.add<std::int32_t>(count(size.num_tasks));
      counters = sections.add<std::atomic<std::uint64_t>>(count(size.num_counters));
      shares = sections.add<std::atomic<bool>>(
          detail::checked_mul(count(size.num_layers), num_threads, "layers of all threads"));
      partials = sections.add<float>(count(size.partial_floats));
      threads = sections.add<float>(
          detail::checked_mul(num_threads, size.thread_floats, "floats of all threads"));
      end = sections.total_bytes();
    }
  };
  static_assert(kCacheLine == Scratch::kAlignment);

  /// Calls `fn(item, num_heads)` for each item of a layer with the numbers that cutting them up to
  /// here gives it; afterwards `fn`'s layer counts stand in the size that is returned.
  template <class Cache, class Fn>
  static WorkSize for_each_item(const Cache& cache, const Step& step, const LayerGeometry& layer,
                                Fn&& fn) {
    WorkSize size;
    std::int32_t chunk_idx = 0;
    for (const StepChunk& chunk : step.chunks()) {
      std::int32_t first_head = 0;
      for (const ClassRun& run : layer.runs) {
        const HeadCut cut = HeadCut::of(chunk.num_tokens(), layer.shape.group_size,
                                        cache.rows_seen(run.class_idx, chunk));
        if (cut.num_parts() > 0) {
          fn(WorkItem{cut, size.num_tasks, size.partial_floats, size.num_counters, chunk_idx,
                      first_head},
             run.num_heads);
          ++size.num_items;
          size.num_tasks += run.num_heads * cut.num_parts();
          if (cut.num_parts() > 1) size.num_counters += run.num_heads;
          size.partial_floats +=
              run.num_heads *
              cut.partial_floats_of(chunk.num_tokens(), layer.shape.group_size, layer.shape.v_dim);
        }
        first_head += run.num_heads;
      }
      ++chunk_idx;
    }
    return size;
  }

  template <class Cache>
  static WorkSize size_of(const Cache& cache, const Step& step) {
    WorkSize size;
    size.num_layers = std::ssize(cache.geometry().layers());
    for (const int first : cache.geometry().layer_kinds()) {
      const LayerGeometry& layer = cache.geometry().layers()[static_cast<std::size_t>(first)];
      size.add_kind(for_each_item(cache, step, layer, [](const WorkItem&, int) {}), layer.shape);
    }
    return size;
  }

  template <class Cache>
  StepWork(const Cache& cache, const Step& step, const WorkSize& size, const Offsets& offsets,
           std::size_t num_threads)
      : num_threads_(num_threads), thread_floats_(size.thread_floats) {
    std::byte* const base = step.scratch().bytes();
    kinds_ = reinterpret_cast<LayerWork*>(base + offsets.kinds);
    counters_ = reinterpret_cast<std::atomic<std::uint64_t>*>(base + offsets.counters);
    partials_ = reinterpret_cast<float*>(base + offsets.partials);
    threads_ = reinterpret_cast<float*>(base + offsets.threads);
    std::uninitialized_value_construct_n(counters_, size.num_counters);
    shares_ = reinterpret_cast<std::atomic<bool>*>(base + offsets.shares);
    std::uninitialized_value_construct_n(shares_,
                                         static_cast<std::size_t>(size.num_layers) * num_threads);

    auto* item = reinterpret_cast<WorkItem*>(base + offsets.items);
    auto* task = reinterpret_cast<std::int32_t*>(base + offsets.tasks);
    LayerWork* kind = kinds_;
    for (const int first : cache.geometry().layer_kinds()) {
      const LayerGeometry& layer = cache.geometry().layers()[static_cast<std::size_t>(first)];
      const WorkItem* const items = item;
      const std::int32_t* const item_of_task = task;
      const WorkSize kind_size =
          for_each_item(cache, step, layer, [&](const WorkItem& cut, int num_heads) {
            task = std::fill_n(task, num_heads * cut.cut.num_parts(),
                               static_cast<std::int32_t>(item - items));
            new (item++) WorkItem(cut);
          });
      new (kind++) LayerWork{kind_size.num_tasks, items, item_of_task};
    }
  }

  LayerWork* kinds_;
  std::atomic<std::uint64_t>* counters_;
  std::atomic<bool>* shares_;  // [layers][num_threads_]: begun
  float* partials_;
  float* threads_;
  std::size_t num_threads_;
  std::size_t thread_floats_;
};

}  // namespace headwise::inline v0
