// SPDX-License-Identifier: MIT
/// @file device_place.cuh
/// DevicePlace: a cache's pages on a CUDA device. The host keeps the books, kernels the rows.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <variant>
#include <vector>

#include "headwise/cache/books.hpp"
#include "headwise/cache/cuda/class_state.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/fold_state.cuh"
#include "headwise/cache/cuda/step_state.cuh"
#include "headwise/cache/cuda/table_update.cuh"
#include "headwise/cache/geometry.hpp"
#include "headwise/cache/keep/keep.hpp"
#include "headwise/cache/place.hpp"
#include "headwise/cache/step.hpp"
#include "headwise/core/slot_map.hpp"

namespace headwise::inline v0::cuda {

namespace detail {

/// Which kinds of heads a device keeps; a kind without a case does not compile.
struct CheckOnDevice {
  void operator()(const EverythingRule&) const {}
  void operator()(const WindowRule&) const {}
  void operator()(const WindowFromRule& late) const {
    fail<ConfigError>("heads that stream from a length on (KeepWindowFrom), here from ", late.from,
                      " tokens on, are not on the device yet");
  }
  void operator()(const GrowingWindowRule&) const {}
  void operator()(const SelectedRule&) const {
    fail<ConfigError>("selected heads (KeepSelected) are not on the device yet");
  }
};

}  // namespace detail

/// The place of a KvCache whose rows are on a device: KvCache<PlainRows<f16>, DevicePlace>.
///
/// `begin` gathers the lengths and every page-table entry that changed since the last one (by a
/// step, a fork, a clear) and sends them in one asynchronous copy on the caller's stream; all
/// kernels of the cache run on that stream, or after it. Tables, lengths and pages lie at fixed
/// addresses, so a captured graph stays right while sequences grow, come and go; begin itself stays
/// outside of the graph.
///
/// Everything is allocated by the constructor: `bytes()` says how much before there is one. Make
/// the cache, or the `page_memory` that it is given, before gigabytes of other device memory are
/// freed: decode of some shapes took 12 % longer over pages that were allocated after that
/// (bench/results).
class DevicePlace {
 public:
  /// What everything is ordered by.
  using Stream = cudaStream_t;
  static constexpr bool kOnHost = false;  ///< the host neither reads nor writes pages

  /// What a place of this geometry allocates.
  struct Bytes {
    std::size_t pages = 0;   ///< on the device; none where the caller gives page memory
    std::size_t device = 0;  ///< besides the pages: tables, the step, compensation rows
    std::size_t pinned = 0;  ///< page-locked on the host
  };
  /// @throws ConfigError as the constructor.
  static Bytes bytes(const CacheGeometry& geometry) {
    check(geometry);
    const StepLayout layout = layout_of(geometry);
    return {geometry.options().page_memory.empty() ? geometry.pool_bytes() : 0,
            layout.total_bytes + table_bytes(geometry) + sums_bytes(geometry) +
                fold_heads(geometry).size() * sizeof(FoldHead),
            2 * layout.total_bytes};
  }

  /// @throws ConfigError for pages that are not 64 tokens, a context of 2^31 tokens or more, more
  ///   than 128 KV heads in a layer, K and V of different widths, a layer that reads another's, a
  ///   length to stream from or selected heads (which exist on the CPU only in this version), or
  ///   page memory that is too small.
  /// @throws CudaError when memory cannot be allocated.
  explicit DevicePlace(const CacheGeometry& geometry)
      : layout_(checked_layout(geometry)),
        num_sequences_(static_cast<std::size_t>(geometry.options().max_sequences)),
        num_classes_(geometry.classes().size()),
        most_ids_(most_ids(geometry)),
        page_stride_(geometry.pool().granule()),
        given_(checked_memory(geometry)),
        pages_(given_.empty() ? geometry.pool_bytes() : 0),
        state_(layout_.total_bytes),
        tables_(table_bytes(geometry)),
        place_bytes_(geometry.compensation_bytes()),
        sums_(sums_bytes(geometry)),
        fold_heads_(fold_heads(geometry).size() * sizeof(FoldHead)),
        staging_{Staging{PinnedMemory(layout_.total_bytes), {}},
                 Staging{PinnedMemory(layout_.total_bytes), {}}} {
    changes_.reserve(num_sequences_ * num_classes_);
    std::size_t num_heads = 0;
    for (const HeadClass& heads : geometry.classes()) {
      const SlotMap slots = heads.rule.slots({});
      if (slots.turn > 0) most_rows_moved_ = std::max(most_rows_moved_, slots.sink + slots.turn);
    }
    for (const LayerGeometry& layer : geometry.layers()) {
      first_fold_head_.push_back(num_heads);
      num_heads += static_cast<std::size_t>(layer.shape.num_kv_heads);
    }
    for (const HeadClass& heads : geometry.classes()) {
      folds_of_class_.push_back(static_cast<std::int32_t>(most_folds(heads)));
    }
    if (const std::vector<FoldHead> heads = fold_heads(geometry); !heads.empty()) {
      require(cudaMemcpy(fold_heads_.data(), heads.data(), heads.size() * sizeof(FoldHead),
                         cudaMemcpyHostToDevice),
              "cudaMemcpy");
    }
    require(cudaMemset(state_.data(), 0, layout_.ranges), "cudaMemset");
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

  /// Page 0, a device address.
  std::byte* pages() const { return given_.empty() ? pages_.data() : given_.data(); }

  /// Makes pages equal others, in the order of the stream: a fork's.
  StepStatus copy_pages(std::span<const PageCopy> copies, Stream stream) {
    while (!copies.empty()) {
      const std::size_t count =
          std::min(copies.size(), (layout_.total_bytes - layout_.ranges) / sizeof(PageMove));
      std::byte* block = nullptr;
      if (!keep(next_staging(block))) return StepStatus::kDeviceError;
      auto* moves = reinterpret_cast<PageMove*>(block + layout_.ranges);
      for (std::size_t i = 0; i < count; ++i) {
        moves[i] = {copies[i].from, copies[i].to, static_cast<std::int64_t>(copies[i].bytes)};
      }
      if (!keep(copy_staging(block, layout_.ranges, count * sizeof(PageMove), stream)) ||
          !keep(move_pages(reinterpret_cast<const PageMove*>(state_.data() + layout_.ranges),
                           static_cast<int>(count), pages(), page_stride_, stream))) {
        return StepStatus::kDeviceError;
      }
      copies = copies.subspan(count);
    }
    return StepStatus::kOk;
  }

  /// Makes compensation rows of places equal others', in the order of the stream: a fork's.
  StepStatus copy_sums(std::span<const SumsCopy> copies, Stream stream) {
    const auto place = [&](std::int32_t index) {
      return sums_.data() + static_cast<std::size_t>(index) * place_bytes_;
    };
    for (const SumsCopy& copy : copies) {
      if (!keep(cudaMemcpyAsync(place(copy.to), place(copy.from), place_bytes_,
                                cudaMemcpyDeviceToDevice, stream))) {
        return StepStatus::kDeviceError;
      }
    }
    return StepStatus::kOk;
  }

  /// Sends the open step and all changed page-table entries: one copy, and one kernel where entries
  /// changed (more of both after a very long prompt). Waits only for the copy before the last one.
  /// @return kDeviceError where CUDA refused; error() says why, and the cache is of no more use.
  StepStatus send(Books& books, const Step& step, Stream stream) {
    ++num_sent_;
    changes_.clear();
    books.tables().drain_changes(
        [&](std::int32_t index, std::size_t c, const PageTables::Change& change) {
          const std::int64_t heads = books.geometry().classes()[c].num_heads;
          for (std::int64_t h = 0; h < heads;) {
            // So many heads that their entries fit one copy; one head's always do.
            const std::int64_t most = std::max<std::int64_t>(
                1, static_cast<std::int64_t>(most_ids_) / (change.last - change.first));
            const std::int64_t count = std::min(heads - h, most);
            changes_.push_back({index, c, h, count, change.first, change.last - change.first});
            h += count;
          }
        });
    std::size_t next = 0;
    do {
      std::byte* block = nullptr;
      if (!keep(next_staging(block))) return StepStatus::kDeviceError;
      write_step(books, step, block);
      const std::size_t end = changes_that_fit(next);
      const std::size_t used = write_changes(books.tables(), next, end, block);
      if (!keep(copy_staging(block, 0, used, stream)) ||
          !keep(update_tables(reinterpret_cast<const TableRange*>(state_.data() + layout_.ranges),
                              static_cast<int>(end - next),
                              reinterpret_cast<std::int32_t*>(tables_.data()), stream))) {
        return StepStatus::kDeviceError;
      }
      next = end;
    } while (next < changes_.size());
    return StepStatus::kOk;
  }

  /// What CUDA answered to the first call that failed.
  cudaError_t error() const { return error_; }

  // For attention ---------------------------------------------------------------------------------

  /// The open step as kernels take it; the same for the cache's whole life.
  DeviceStep step() const {
    return {reinterpret_cast<const StepHeader*>(state_.data()),
            reinterpret_cast<const ChunkState*>(state_.data() + layout_.chunks),
            reinterpret_cast<const ClassState*>(state_.data() + layout_.classes),
            reinterpret_cast<const std::int32_t*>(tables_.data()),
            pages(),
            page_stride_,
            static_cast<std::int32_t>(num_classes_),
            static_cast<std::int32_t>(num_sequences_)};
  }
  /// A layer's compensation rows as kernels take them; the same for the cache's whole life.
  FoldedHeads folded(int layer) const {
    const std::byte* states = state_.data() + layout_.folds;
    return {reinterpret_cast<const FoldState*>(states),
            reinterpret_cast<const RowFold*>(states + fold_state_bytes()),
            reinterpret_cast<const FoldHead*>(fold_heads_.data()) +
                first_fold_head_[static_cast<std::size_t>(layer)],
            sums_.data(),
            place_bytes_,
            static_cast<std::int32_t>(num_classes_)};
  }
  /// Whether the open step makes compensation rows.
  bool folds() const { return folds_; }
  /// Steps sent so far: work that was cut for another one is not this step's.
  std::uint64_t num_sent() const { return num_sent_; }
  /// Most rows that one head of one sequence stores in the open step.
  std::int64_t most_rows_stored() const { return most_rows_stored_; }
  /// Whether some head of the open step carries rows over to a second ring.
  bool moves_rows() const { return moves_rows_; }
  /// Most rows that one head stores in any step that moves a ring: every slot, once.
  std::int64_t most_rows_moved() const { return most_rows_moved_; }

 private:
  struct Staging {
    PinnedMemory memory;
    Event copied;
  };
  /// Entries [first, first + count) of heads [first_head, first_head + num_heads) of a class.
  struct Change {
    std::int32_t index;
    std::size_t class_idx;
    std::int64_t first_head, num_heads, first, count;
  };

  static void check(const CacheGeometry& geometry) {
    const CacheOptions& options = geometry.options();
    if (options.page_tokens != kPageTokens) {
      fail<ConfigError>("device pages have ", kPageTokens, " tokens, asked for ",
                        options.page_tokens);
    }
    if (options.max_context > std::numeric_limits<std::int32_t>::max() - kPageTokens) {
      fail<ConfigError>("max_context of a device cache must be below 2^31, got ",
                        options.max_context);
    }
    for (std::size_t l = 0; l < geometry.layers().size(); ++l) {
      const LayerShape& layer = geometry.layers()[l].shape;
      if (layer.num_kv_heads > kMaxHeads) {
        fail<ConfigError>("layer ", l, ": at most ", kMaxHeads, " KV heads, got ",
                          layer.num_kv_heads);
      }
      if (layer.k_dim != layer.v_dim) {
        fail<ConfigError>("layer ", l, ": K and V widths must be equal on a device, got ",
                          layer.k_dim, " and ", layer.v_dim);
      }
      if (!layer.owns_kv()) {
        fail<ConfigError>("layer ", l, ": layers that read another's K and V (kv_layer), here of ",
                          "layer ", layer.kv_layer, ", are not on the device yet");
      }
    }
    for (const HeadClass& heads : geometry.classes()) {
      heads.rule.visit({}, [](const auto& rule, const auto&) { detail::CheckOnDevice{}(rule); });
    }
  }
  static StepLayout checked_layout(const CacheGeometry& geometry) {
    check(geometry);
    return layout_of(geometry);
  }
  static std::span<std::byte> checked_memory(const CacheGeometry& geometry) {
    const std::span<std::byte> memory = geometry.options().page_memory;
    if (!memory.empty() && memory.size() < geometry.pool_bytes()) {
      fail<ConfigError>("page_memory has ", memory.size(), " bytes, needed are ",
                        geometry.pool_bytes());
    }
    return memory;
  }
  static std::size_t table_bytes(const CacheGeometry& geometry) {
    return static_cast<std::size_t>(geometry.tables(true).num_entries) * sizeof(std::int32_t);
  }
  /// Of compensation rows of all places, checkpoints too.
  static std::size_t sums_bytes(const CacheGeometry& geometry) {
    return headwise::detail::checked_mul(static_cast<std::size_t>(geometry.num_places()),
                                         geometry.compensation_bytes(), "compensation rows");
  }
  /// Rows that a step makes of a head, at the most: one bank's.
  static std::size_t most_folds(const HeadClass& heads) {
    return static_cast<std::size_t>(heads.rule.compensation_rows() / 2);
  }
  /// Of all layers' KV heads; none where nobody has compensation rows.
  static std::vector<FoldHead> fold_heads(const CacheGeometry& geometry) {
    std::vector<FoldHead> all;
    if (geometry.compensation_bytes() == 0) return all;
    for (std::size_t l = 0; l < geometry.layers().size(); ++l) {
      for (int h = 0; h < geometry.layers()[l].shape.num_kv_heads; ++h) {
        const HeadGeometry& head = geometry.head(static_cast<int>(l), h);
        const HeadClass& heads = geometry.classes()[static_cast<std::size_t>(head.class_idx)];
        all.push_back({heads.rule.compensation_rows() > 0 ? head.compensation_offset : -1,
                       static_cast<std::int32_t>(head.class_idx)});
      }
    }
    return all;
  }
  std::size_t fold_state_bytes() const { return fold_state_bytes(num_sequences_, num_classes_); }
  /// Rounded up: what is listed behind them holds doubles.
  static std::size_t fold_state_bytes(std::size_t sequences, std::size_t classes) {
    return (sequences * classes * sizeof(FoldState) + 63) / 64 * 64;
  }
  /// Page ids of one copy: 256 KiB of them, and always those of one whole head.
  static std::size_t most_ids(const CacheGeometry& geometry) {
    const PageTables::Shape tables = geometry.tables(true);
    const std::vector<std::int64_t>& per_head = tables.levels.back().per_head;
    const std::int64_t longest = *std::max_element(per_head.begin(), per_head.end());
    return std::max<std::size_t>(std::size_t{1} << 16, static_cast<std::size_t>(longest));
  }
  static StepLayout layout_of(const CacheGeometry& geometry) {
    const auto sequences = static_cast<std::size_t>(geometry.options().max_sequences);
    const std::size_t classes = geometry.classes().size();
    std::size_t fold_bytes = 0;
    if (geometry.compensation_bytes() > 0) {
      std::size_t folds = 0;
      for (const HeadClass& heads : geometry.classes()) folds += most_folds(heads);
      fold_bytes = fold_state_bytes(sequences, classes) + sequences * folds * sizeof(RowFold);
    }
    return {sequences, classes, sequences * classes, most_ids(geometry), fold_bytes};
  }

  bool keep(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
    return error == cudaSuccess;
  }
  /// A block of pinned memory whose last copy is done.
  cudaError_t next_staging(std::byte*& block) {
    Staging& staging = staging_[next_staging_];
    block = staging.memory.data();
    return cudaEventSynchronize(staging.copied.get());
  }
  /// Sends a part of that block to the same place on the device.
  cudaError_t copy_staging(const std::byte* block, std::size_t offset, std::size_t bytes,
                           cudaStream_t stream) {
    Staging& staging = staging_[next_staging_];
    next_staging_ = 1 - next_staging_;
    if (const cudaError_t e = cudaMemcpyAsync(state_.data() + offset, block + offset, bytes,
                                              cudaMemcpyHostToDevice, stream);
        e != cudaSuccess) {
      return e;
    }
    return cudaEventRecord(staging.copied.get(), stream);
  }

  void write_step(const Books& books, const Step& step, std::byte* block) {
    most_rows_stored_ = 0;
    moves_rows_ = false;
    folds_ = false;
    std::int32_t num_folds = 0;
    auto* chunks = reinterpret_cast<ChunkState*>(block + layout_.chunks);
    auto* classes = reinterpret_cast<ClassState*>(block + layout_.classes);
    for (std::size_t e = 0; e < step.chunks().size(); ++e) {
      const StepChunk& chunk = step.chunks()[e];
      const std::int32_t index = chunk.sequence.index;
      chunks[e] = {chunk.first_row, chunk.lengths.length, chunk.num_tokens()};
      for (std::size_t c = 0; c < num_classes_; ++c) {
        ClassState& state = classes[e * num_classes_ + c];
        state = books.geometry().classes()[c].rule.visit(
            books.keep_state(index, c), [&](const auto& rule, const auto& kept) {
              most_rows_stored_ =
                  std::max(most_rows_stored_, cuda::most_rows_stored(rule, kept, chunk.lengths));
              return class_state(rule, kept, chunk.lengths, chunk.phase);
            });
        if (place_bytes_ > 0) write_folds(books, chunk, e, c, num_folds, block);
        moves_rows_ =
            moves_rows_ || (chunk.num_tokens() > 0 && state.append_entry != state.read_entry);
        if (!books.tables().has_block(index)) continue;  // an empty sequence without new tokens
        state.table = books.tables().offset(index, c);
        state.head_stride = static_cast<std::int32_t>(books.tables().stride(index, c));
      }
    }
    *reinterpret_cast<StepHeader*>(block) = {static_cast<std::int32_t>(step.chunks().size())};
  }

  /// What a class of the chunk's sequence has folded, and folds in this step.
  /// @param num_folds  listed so far
  void write_folds(const Books& books, const StepChunk& chunk, std::size_t e, std::size_t c,
                   std::int32_t& num_folds, std::byte* block) {
    FoldState& state = reinterpret_cast<FoldState*>(block + layout_.folds)[e * num_classes_ + c];
    auto* folds = reinterpret_cast<RowFold*>(block + layout_.folds + fold_state_bytes());
    const std::int32_t index = chunk.sequence.index;
    state = books.geometry().classes()[c].rule.visit(
        books.keep_state(index, c), [&]<class Rule>(const Rule& rule, const auto& kept) {
          return fold_state(rule, kept, chunk.lengths, index, folds, num_folds, folds_of_class_[c]);
        });
    num_folds += state.num_folds;
    folds_ = folds_ || state.num_folds > 0;
  }

  /// One after the last change that goes into a copy with change `next`.
  std::size_t changes_that_fit(std::size_t next) const {
    const std::size_t most_ranges = num_sequences_ * num_classes_;
    std::size_t ids = 0;
    std::size_t end = next;
    while (end < changes_.size() && end - next < most_ranges) {
      ids += static_cast<std::size_t>(changes_[end].num_heads * changes_[end].count);
      if (ids > most_ids_) break;
      ++end;
    }
    return end;
  }
  /// @return bytes of the block that are in use.
  std::size_t write_changes(const PageTables& tables, std::size_t next, std::size_t end,
                            std::byte* block) const {
    auto* range = reinterpret_cast<TableRange*>(block + layout_.ranges);
    auto* const ids = reinterpret_cast<std::int32_t*>(range + (end - next));
    std::size_t num_ids = 0;
    for (; next < end; ++next, ++range) {
      const Change& change = changes_[next];
      const std::int64_t stride = tables.stride(change.index, change.class_idx);
      *range = {
          tables.offset(change.index, change.class_idx) + change.first_head * stride + change.first,
          static_cast<std::int32_t>(stride), static_cast<std::int32_t>(change.num_heads),
          static_cast<std::int32_t>(change.count), static_cast<std::int32_t>(num_ids)};
      for (std::int64_t h = 0; h < change.num_heads; ++h) {
        const std::int32_t* from =
            tables.head(change.index, change.class_idx, change.first_head + h) + change.first;
        std::copy_n(from, change.count, ids + num_ids);
        num_ids += static_cast<std::size_t>(change.count);
      }
    }
    return static_cast<std::size_t>(reinterpret_cast<std::byte*>(ids + num_ids) - block);
  }

  StepLayout layout_;
  std::size_t num_sequences_;
  std::size_t num_classes_;
  std::size_t most_ids_;
  std::size_t page_stride_;
  std::span<std::byte> given_;
  DeviceMemory pages_;
  DeviceMemory state_;
  DeviceMemory tables_;
  std::size_t place_bytes_;  // of a place's compensation rows
  DeviceMemory sums_;        // [places][place_bytes_]
  DeviceMemory fold_heads_;  // of all layers
  std::vector<std::size_t> first_fold_head_;
  std::vector<std::int32_t> folds_of_class_;
  std::array<Staging, 2> staging_;  // one copy may run while the next is written
  std::size_t next_staging_ = 0;
  std::vector<Change> changes_;
  std::uint64_t num_sent_ = 0;
  std::int64_t most_rows_stored_ = 0;
  std::int64_t most_rows_moved_ = 0;
  bool moves_rows_ = false;
  bool folds_ = false;
  cudaError_t error_ = cudaSuccess;
};
static_assert(CachePlace<DevicePlace>);

}  // namespace headwise::inline v0::cuda
