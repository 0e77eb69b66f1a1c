// SPDX-License-Identifier: MIT
/// @file device_cache.cuh
/// DeviceCache: KvCache's contract over device pages; the host keeps the books, kernels the rows.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <optional>
#include <span>
#include <variant>

#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/step_state.cuh"
#include "headwise/cache/cuda/table_update.cuh"
#include "headwise/cache/geometry.hpp"
#include "headwise/cache/page_ledger.hpp"
#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/cache/step.hpp"
#include "headwise/core/dtype.hpp"

namespace headwise::inline v0::cuda {

/// What a device page can be made of: tensor cores multiply two-byte elements.
template <class Row>
concept DeviceRow = std::same_as<Row, f16> || std::same_as<Row, bf16>;

/// K and V of many sequences in device pages, head by head as the plan says.
///
/// As KvCache: begin, attend every layer (attention/cuda/attend.cuh), commit. `begin` gathers the
/// lengths and the page-table entries that changed and sends them in one asynchronous copy on the
/// caller's stream; all kernels of the cache run on that stream, or after it. Tables and lengths
/// lie at fixed addresses with a fixed stride for (max_sequences, max_context), so a captured graph
/// stays right while sequences grow, come and go; begin itself stays outside of the graph.
///
/// Everything is allocated by the constructor: `device_bytes()` says how much. Make the cache, or
/// the `page_memory` that it is given, before gigabytes of other device memory are freed: decode of
/// some shapes took 12 % longer over pages that were allocated after that (bench/results).
template <DeviceRow Row>
class DeviceCache {
 public:
  /// @throws ConfigError as KvCache; also for pages that are not 64 tokens, a context of 2^31
  /// tokens
  ///   or more, more than 128 KV heads in a layer, K and V of different widths, or a growing window
  ///   (RazorAttention's compensation rows exist on the CPU only in this version).
  /// @throws CudaError when memory cannot be allocated.
  DeviceCache(const ModelShape& shape, const HeadPlan& plan, const CacheOptions& options)
      : geometry_(checked(shape, CacheGeometry(shape, plan, options, &PlainRows<Row>::page_bytes))),
        pages_(options.page_memory.empty() ? pool_bytes() : 0),
        ledger_(CacheGeometry(shape, plan, with_pages(options), &PlainRows<Row>::page_bytes)),
        layout_(num_sequences(), geometry().classes().size(), most_ranges(), most_ids()),
        state_(layout_.total_bytes),
        tables_(num_sequences() * static_cast<std::size_t>(geometry().entries_per_sequence()) *
                sizeof(std::int32_t)),
        staging_{Staging{PinnedMemory(layout_.total_bytes), {}},
                 Staging{PinnedMemory(layout_.total_bytes), {}}} {
    require(cudaMemset(state_.data(), 0, layout_.classes), "cudaMemset");
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

  /// As KvCache::add_sequence().
  std::optional<SequenceId> add_sequence() { return ledger_.add_sequence(); }
  /// As KvCache::release().
  void release(SequenceId id) { ledger_.release(id); }
  /// Tokens committed; the position of the sequence's next token.
  std::int64_t length(SequenceId id) const { return ledger_.length(id); }
  /// The longest length ever committed.
  std::int64_t high_water(SequenceId id) const { return ledger_.high_water(id); }
  /// As KvCache: exact, all or nothing, down to high_water - max_rollback. Costs no device work.
  StepStatus rollback(SequenceId id, std::int64_t new_length) {
    return ledger_.rollback(id, new_length);
  }

  /// Opens a step and sends it to the device on `stream`: one copy, and one kernel where page-table
  /// entries changed. Waits only for the copy of the step before the last one.
  StepStatus begin(Step& step, std::span<const SequenceChunk> chunks, Phase phase,
                   cudaStream_t stream) {
    const StepStatus status = ledger_.begin(step, chunks, phase);
    if (status == StepStatus::kOk) note(send(step, stream));
    return status;
  }
  /// @copydoc begin
  StepStatus begin(Step& step, std::initializer_list<SequenceChunk> chunks, Phase phase,
                   cudaStream_t stream) {
    return begin(step, std::span<const SequenceChunk>{chunks.begin(), chunks.size()}, phase,
                 stream);
  }

  /// Makes the step's rows part of their sequences; kIncomplete unless every layer was attended.
  StepStatus commit(Step& step) { return ledger_.commit(step); }
  /// The same after a graph that attends every layer was launched: the host saw no layer pass.
  StepStatus commit_replayed(Step& step) {
    if (ledger_.is_open(step)) {
      for (int l = 0; l < static_cast<int>(geometry().layers().size()); ++l) {
        note_attended(step, l, std::numeric_limits<std::int32_t>::max());
      }
    }
    return ledger_.commit(step);
  }
  /// Closes the step without a trace.
  StepStatus drop(Step& step) { return ledger_.drop(step); }
  /// Whether `step` is the one that this cache has open.
  bool is_open(const Step& step) const { return ledger_.is_open(step); }

  /// Notes that `heads` of a layer's heads have their rows in their pages, for every sequence.
  void note_attended(const Step& step, int layer, int heads) const {
    std::int64_t growing = 0;
    for (const StepEntry& entry : step.entries()) growing += entry.num_tokens() > 0 ? 1 : 0;
    step.note_heads_done(layer, growing * heads);
  }

  /// The first error of a copy or launch that begin made; a step after it is not to be trusted.
  cudaError_t error() const { return error_; }

  /// Bytes of page memory that the sequence holds.
  std::size_t held_bytes(SequenceId id) const {
    return static_cast<std::size_t>(ledger_.pages_held(id)) * geometry().page_bytes();
  }
  /// Pages that the sequence holds, those of an open step not counted.
  std::int64_t pages_held(SequenceId id) const { return ledger_.pages_held(id); }
  /// Pages that nobody holds.
  std::int64_t free_pages() const { return ledger_.pool().num_free(); }
  /// What follows from shape, plan and options.
  const CacheGeometry& geometry() const { return ledger_.geometry(); }
  /// Device memory besides the pages: tables and the step.
  std::size_t device_bytes() const { return state_.num_bytes() + tables_.num_bytes(); }

  // For attention ---------------------------------------------------------------------------------

  /// The open step as kernels take it; the same for the cache's whole life.
  DeviceStep device_step() const {
    return {reinterpret_cast<const StepHeader*>(state_.data()),
            reinterpret_cast<const EntryState*>(state_.data() + layout_.entries),
            reinterpret_cast<const ClassState*>(state_.data() + layout_.classes),
            reinterpret_cast<const std::int32_t*>(tables_.data()),
            ledger_.pool().memory(),
            geometry().page_bytes(),
            static_cast<std::int32_t>(geometry().classes().size()),
            static_cast<std::int32_t>(num_sequences())};
  }

  /// The layer's heads that `wanted(HeadStore)` names, those that keep most first.
  template <class Wanted>
  LayerHeads layer_heads(int layer, Wanted wanted) const {
    LayerHeads heads;
    const LayerPlace& place = geometry().layers()[static_cast<std::size_t>(layer)];
    for (const int kv_head : place.task_order) {
      const HeadPlace& head = geometry().head(layer, kv_head);
      if (!wanted(geometry().classes()[static_cast<std::size_t>(head.class_idx)].store)) continue;
      const int i = heads.num_heads++;
      heads.table_offset[i] = static_cast<std::int32_t>(head.table_offset);
      heads.kv_head[i] = static_cast<std::int16_t>(kv_head);
      heads.class_idx[i] = static_cast<std::int16_t>(head.class_idx);
    }
    return heads;
  }
  /// All heads of the layer, those that keep most first.
  LayerHeads layer_heads(int layer) const {
    return layer_heads(layer, [](const HeadStore&) { return true; });
  }

  /// Most rows that one head stores in this step: the launch bound of append.
  std::int64_t most_appended_rows(const Step& step) const {
    std::int64_t most = 0;
    for (const StepEntry& entry : step.entries()) {
      most = std::max(most, entry.num_tokens());
      for (const HeadClass& heads : geometry().classes()) {
        if (const auto* ring = std::get_if<StreamingStore>(&heads.store)) {
          if (!ring->in_place(entry.lengths)) most = std::max(most, ring->ring.rows);
        }
      }
    }
    return most;
  }

 private:
  struct Staging {
    PinnedMemory memory;
    Event copied;
  };

  static CacheGeometry checked(const ModelShape& shape, CacheGeometry geometry) {
    const CacheOptions& options = geometry.options();
    if (options.page_tokens != kPageTokens) {
      fail<ConfigError>("device pages have ", kPageTokens, " tokens, asked for ",
                        options.page_tokens);
    }
    if (options.max_context > std::numeric_limits<std::int32_t>::max() - kPageTokens ||
        geometry.entries_per_sequence() > std::numeric_limits<std::int32_t>::max()) {
      fail<ConfigError>("max_context of a device cache must be below 2^31, got ",
                        options.max_context);
    }
    for (int l = 0; l < shape.num_layers(); ++l) {
      const LayerShape& layer = shape.layer(l);
      if (layer.num_kv_heads > kMaxHeads) {
        fail<ConfigError>("layer ", l, ": at most ", kMaxHeads, " KV heads, got ",
                          layer.num_kv_heads);
      }
      if (layer.k_dim != layer.v_dim) {
        fail<ConfigError>("layer ", l, ": K and V widths must be equal on a device, got ",
                          layer.k_dim, " and ", layer.v_dim);
      }
    }
    for (const HeadClass& heads : geometry.classes()) {
      if (std::holds_alternative<FoldingStore>(heads.store)) {
        fail<ConfigError>("growing windows (RazorAttention) are not on the device yet");
      }
    }
    return geometry;
  }

  CacheOptions with_pages(CacheOptions options) const {
    if (options.page_memory.empty()) options.page_memory = {pages_.data(), pages_.num_bytes()};
    options.page_memory_place = PageMemory::kDevice;
    return options;
  }
  std::size_t pool_bytes() const {
    return static_cast<std::size_t>(geometry_.num_pages()) * geometry_.page_bytes();
  }
  std::size_t num_sequences() const {
    return static_cast<std::size_t>(geometry_.options().max_sequences);
  }
  std::size_t most_ranges() const { return num_sequences() * geometry_.heads().size(); }
  std::size_t most_ids() const { return static_cast<std::size_t>(geometry_.num_pages()); }
  void note(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }

  /// Writes the step into pinned memory and sends it.
  cudaError_t send(const Step& step, cudaStream_t stream) {
    Staging& staging = staging_[next_staging_];
    next_staging_ = 1 - next_staging_;
    if (const cudaError_t e = cudaEventSynchronize(staging.copied.get()); e != cudaSuccess) {
      return e;
    }
    std::byte* block = staging.memory.data();
    auto* ranges = reinterpret_cast<TableRange*>(block + layout_.ranges);
    const std::size_t num_ranges = count_ranges(step);
    auto* ids = reinterpret_cast<std::int32_t*>(ranges + num_ranges);
    std::size_t range = 0;
    std::int32_t num_ids = 0;
    const std::size_t num_classes = geometry().classes().size();
    for (std::size_t e = 0; e < step.entries().size(); ++e) {
      const StepEntry& entry = step.entries()[e];
      const std::int64_t table_base =
          static_cast<std::int64_t>(entry.sequence) * geometry().entries_per_sequence();
      reinterpret_cast<EntryState*>(block + layout_.entries)[e] = {
          table_base, entry.first_row, entry.lengths.length, entry.num_tokens()};
      for (std::size_t c = 0; c < num_classes; ++c) {
        reinterpret_cast<ClassState*>(block + layout_.classes)[e * num_classes + c] =
            class_state(entry, c, step.phase());
        const EntryRange taken = taken_range(entry, c);
        if (taken.count() == 0) continue;
        for (const HeadPlace& head : geometry().heads()) {
          if (static_cast<std::size_t>(head.class_idx) != c) continue;
          ranges[range++] = {table_base + head.table_offset + taken.first, num_ids,
                             static_cast<std::int32_t>(taken.count())};
          std::copy_n(ledger_.table(entry.sequence, head) + taken.first, taken.count(),
                      ids + num_ids);
          num_ids += static_cast<std::int32_t>(taken.count());
        }
      }
    }
    *reinterpret_cast<StepHeader*>(block) = {static_cast<std::int32_t>(step.entries().size()),
                                             static_cast<std::int32_t>(num_ranges)};
    const std::size_t used =
        static_cast<std::size_t>(reinterpret_cast<std::byte*>(ids + num_ids) - block);
    if (const cudaError_t e =
            cudaMemcpyAsync(state_.data(), block, used, cudaMemcpyHostToDevice, stream);
        e != cudaSuccess) {
      return e;
    }
    if (const cudaError_t e = cudaEventRecord(staging.copied.get(), stream); e != cudaSuccess) {
      return e;
    }
    return update_tables(reinterpret_cast<const TableRange*>(state_.data() + layout_.ranges),
                         static_cast<int>(num_ranges),
                         reinterpret_cast<std::int32_t*>(tables_.data()), stream);
  }

  EntryRange taken_range(const StepEntry& entry, std::size_t c) const {
    const int bank = ledger_.bank(entry.sequence, c);
    return std::visit([&](const auto& store) { return store.changes(entry.lengths, bank).take; },
                      geometry().classes()[c].store);
  }

  std::size_t count_ranges(const Step& step) const {
    std::size_t count = 0;
    for (const StepEntry& entry : step.entries()) {
      for (std::size_t c = 0; c < geometry().classes().size(); ++c) {
        if (taken_range(entry, c).count() > 0) {
          count += static_cast<std::size_t>(geometry().classes()[c].num_heads);
        }
      }
    }
    return count;
  }

  ClassState class_state(const StepEntry& entry, std::size_t c, Phase phase) const {
    const bool chunk_causal =
        phase == Phase::kPrompt && geometry().options().prefill == PrefillMode::kChunkCausal;
    ClassState state;
    state.recent = std::numeric_limits<std::int32_t>::max();
    const auto i32 = [](std::int64_t x) { return static_cast<std::int32_t>(x); };
    const std::int64_t length = entry.lengths.length;
    const HeadStore& store = geometry().classes()[c].store;
    if (const auto* streaming = std::get_if<StreamingStore>(&store)) {
      const Ring& ring = streaming->ring;
      const int bank = ledger_.bank(entry.sequence, c);
      state.read_entry = i32(streaming->first_entry(bank));
      state.append_entry =
          i32(streaming->first_entry(streaming->in_place(entry.lengths) ? bank : 1 - bank));
      state.ring_sink = i32(ring.sink);
      state.ring_rows = i32(ring.rows);
      set_slots(ring, length, streaming->past(), state);
      const StoredRuns past = streaming->runs(length);
      state.first_count = i32(past.runs[0].count);
      state.older_pos = i32(past.runs[1].first_pos.value);
      state.older_slot = i32(past.runs[1].first_slot.value);
      state.older_count = i32(past.runs[1].count);
      state.newer_slot = i32(past.runs[2].first_slot.value);
      state.newer_count = i32(past.runs[2].count);
      if (!chunk_causal) {
        state.sink = i32(ring.sink);
        state.recent = i32(streaming->recent);
      }
    } else {
      state.slot_end[0] = i32(length + 1);
      state.first_count = i32(length);
    }
    return state;
  }

  /// The slots that the token at `length` sees, itself included: sinks and ring touch more often
  /// than not, and are one run then.
  static void set_slots(const Ring& ring, std::int64_t length, std::int64_t past,
                        ClassState& state) {
    const Pos oldest{std::max(ring.sink, length - past)};
    const auto [older, newer] = ring.runs(oldest, Pos{length + 1});
    std::array<std::array<std::int64_t, 2>, 3> runs{{
        {0, std::min(ring.sink, length + 1)},
        {newer.first_slot.value, newer.first_slot.value + newer.count},
        {older.first_slot.value, older.first_slot.value + older.count},
    }};
    int num_runs = 0;
    for (const auto& [begin, end] : runs) {
      if (begin >= end) continue;
      if (num_runs > 0 && state.slot_end[num_runs - 1] == begin) {
        state.slot_end[num_runs - 1] = static_cast<std::int32_t>(end);
      } else {
        state.slot_begin[num_runs] = static_cast<std::int32_t>(begin);
        state.slot_end[num_runs++] = static_cast<std::int32_t>(end);
      }
    }
  }

  CacheGeometry geometry_;  // for sizes, before the ledger has its pages
  DeviceMemory pages_;
  PageLedger ledger_;
  StepLayout layout_;
  DeviceMemory state_;
  DeviceMemory tables_;
  std::array<Staging, 2> staging_;  // the copy of one step may run while the next is written
  int next_staging_ = 0;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace headwise::inline v0::cuda
