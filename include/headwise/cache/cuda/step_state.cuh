// SPDX-License-Identifier: MIT
/// @file step_state.cuh
/// An open step as kernels read it: lengths, slots and table places, at addresses that never move.
#pragma once

#include <cstddef>
#include <cstdint>

#include "headwise/core/slot_map.hpp"

namespace headwise::inline v0::cuda {

/// Tokens of a page on a device. A 16-row tile never crosses a page; 64 x 128 x 2 bytes are 16 KiB.
inline constexpr int kPageTokens = 64;

/// Most KV heads of a layer: what fits a kernel's parameters.
inline constexpr int kMaxHeads = 128;

/// How much of the arrays behind it is in use.
struct StepHeader {
  std::int32_t num_chunks = 0;  ///< sequences of the step
};

/// One sequence's part of the step.
struct ChunkState {
  std::int64_t first_row = 0;   ///< of this sequence in q, k, v and out
  std::int64_t length = 0;      ///< tokens before the step
  std::int64_t num_tokens = 0;  ///< of the step
};

/// What the heads of one class (equal budgets) have stored for one sequence of the step: whatever a
/// keep rule says, in the one shape that kernels know. A head that keeps everything is a window
/// that never forgets; slots and positions fit 32 bits (DevicePlace checks).
struct ClassState {
  // Where rows lie.
  std::int64_t table = 0;         ///< page-table index of the class's first head, entry 0
  std::int32_t head_stride = 0;   ///< table entries from one head of the class to the next
  std::int32_t read_entry = 0;    ///< table entry of slot 0 among the rows before the step
  std::int32_t append_entry = 0;  ///< the same where the step's rows go; differs on a second ring
  std::int32_t sink_slots = 0;    ///< first positions, which keep their slots
  std::int32_t turn = 0;          ///< slots that all others share in turn; 0: slot == pos
  // The rows that a single new token sees, its own included, once they are appended: at most two
  // runs of slots.
  std::int32_t slot_begin[2] = {};  ///< of each run
  std::int32_t slot_end[2] = {};    ///< one after the last of each run
  // The rows before the step that some query of a chunk may see: positions [0, first_count) in as
  // many slots, then older_count and newer_count rows, positions following one another.
  std::int32_t first_count = 0;  ///< see above
  std::int32_t older_pos = 0;    ///< position of the first older row
  std::int32_t older_slot = 0;   ///< its slot
  std::int32_t older_count = 0;  ///< rows up to the ring's end
  std::int32_t newer_slot = 0;   ///< slot of the row after them
  std::int32_t newer_count = 0;  ///< rows from the ring's begin on
  // The window rule of the step's queries; recent is INT32_MAX where nothing is forgotten.
  std::int32_t sink = 0;    ///< first positions, always seen
  std::int32_t recent = 0;  ///< newest ones seen, the query's own counted
};
static_assert(sizeof(ClassState) == 80);

/// Changed page-table entries of some heads of one class: as many of each, taken head by head from
/// the list of ids.
struct TableRange {
  std::int64_t first_entry = 0;  ///< of the first head, in the tables of all sequences
  std::int32_t head_stride = 0;  ///< entries from one head to the next
  std::int32_t num_heads = 0;    ///< heads
  std::int32_t count = 0;        ///< entries of each
  std::int32_t first_id = 0;     ///< in the list of page ids
};

/// Where the parts of a step lie in the one block of bytes that is copied to the device.
struct StepLayout {
  std::size_t chunks = 0;       ///< [max_sequences] ChunkState, behind the StepHeader
  std::size_t classes = 0;      ///< [max_sequences][num_classes] ClassState
  std::size_t folds = 0;        ///< compensation rows, see FoldState; no bytes where there are none
  std::size_t ranges = 0;       ///< [num_ranges] TableRange, then the page ids, packed
  std::size_t total_bytes = 0;  ///< of the block

  /// @param most_ranges, most_ids  the most that one copy takes; more changes take several.
  /// @param fold_bytes  that compensation rows take.
  StepLayout(std::size_t max_sequences, std::size_t num_classes, std::size_t most_ranges,
             std::size_t most_ids, std::size_t fold_bytes = 0) {
    const auto aligned = [](std::size_t bytes) { return (bytes + 63) / 64 * 64; };
    chunks = aligned(sizeof(StepHeader));
    classes = chunks + aligned(max_sequences * sizeof(ChunkState));
    folds = classes + max_sequences * num_classes * sizeof(ClassState);
    if (fold_bytes > 0) folds = aligned(folds);
    ranges = folds + aligned(fold_bytes);
    total_bytes =
        ranges + aligned(most_ranges * sizeof(TableRange)) + most_ids * sizeof(std::int32_t);
  }
};

/// The step and the pages as a kernel's parameters; every pointer is fixed for a cache's life.
struct DeviceStep {
  const StepHeader* header = nullptr;        ///< one
  const ChunkState* chunks = nullptr;        ///< [max_sequences]
  const ClassState* classes = nullptr;       ///< [max_sequences][num_classes]
  const std::int32_t* page_table = nullptr;  ///< of all sequences; ClassState says where
  std::byte* pages = nullptr;                ///< page 0
  std::size_t page_stride = 0;               ///< bytes from one page number to the next
  std::int32_t num_classes = 0;              ///< of heads with equal budgets
  std::int32_t max_sequences = 0;            ///< CacheOptions::max_sequences
};

/// Some KV heads of one layer, by value in a kernel's parameters.
struct LayerHeads {
  std::int32_t num_heads = 0;                 ///< at most kMaxHeads
  std::int32_t idx_in_class[kMaxHeads] = {};  ///< [num_heads] which table of its class's
  std::int16_t kv_head[kMaxHeads] = {};       ///< [num_heads] in the layer
  std::int16_t class_idx[kMaxHeads] = {};     ///< [num_heads] in DeviceStep::classes
};

#ifdef __CUDACC__

/// Where the step's rows of a head go.
__device__ __forceinline__ SlotMap append_map(const ClassState& state) {
  return {state.append_entry, state.sink_slots, state.turn};
}
/// The page table of a head, of which ClassState's entries count.
__device__ __forceinline__ const std::int32_t* table_of(const DeviceStep& step,
                                                        const ClassState& state,
                                                        std::int32_t idx_in_class) {
  return step.page_table + state.table +
         static_cast<std::int64_t>(idx_in_class) * state.head_stride;
}

#endif  // __CUDACC__

}  // namespace headwise::inline v0::cuda
