// SPDX-License-Identifier: MIT
/// @file prefill_tile.cuh
/// What one piece of prefill work is: some tokens of a chunk, the keys they see, where those lie.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/tensor_core.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/step_state.cuh"
#include "headwise/core/tensor_view.hpp"

namespace headwise::inline v0::cuda {

/// One layer's chunks as a kernel's parameters.
struct PrefillArgs {
  DeviceStep step;                    ///< the open step and the pages
  LayerHeads heads;                   ///< those to attend; others are not touched
  TensorView<const std::uint16_t> q;  ///< [rows, num_qo_heads, dim]
  TensorView<const std::uint16_t> k;  ///< [rows, num_kv_heads, dim] the step's own
  TensorView<const std::uint16_t> v;  ///< [rows, num_kv_heads, dim]
  TensorView<std::uint16_t> out;      ///< [rows, num_qo_heads, dim]
  unsigned* next_tile = nullptr;      ///< one counter, 0 between launches
  std::int32_t group_size = 1;        ///< query heads per KV head
  float scale_log2 = 1.0F;            ///< softmax scale x log2(e)
};

namespace detail {

/// The keys that some query of a tile sees, numbered in the order of their positions, which are two
/// intervals: [0, first_count), then those from second_pos on. Sinks and recent keys share blocks
/// that way, and every rule is a comparison of numbers.
struct KeyList {
  std::int32_t first_count = 0;
  std::int32_t second_pos = 0;
  std::int32_t count = 0;  ///< of both intervals

  __device__ int position(int index) const {
    return index < first_count ? index : index - first_count + second_pos;
  }
  /// How many keys have positions up to `pos`.
  __device__ int count_up_to(int pos) const {
    return max(min(pos + 1, first_count), 0) + max(pos + 1 - second_pos, 0);
  }
};

/// The keys of a list that one query sees: those below `sinks`, and [recent, end).
struct SeenKeys {
  std::int32_t sinks = 0;
  std::int32_t recent = 0;
  std::int32_t end = 0;

  SeenKeys() = default;
  __device__ SeenKeys(const KeyList& keys, const ClassState& rule, int query_pos)
      : recent(keys.count_up_to(query_pos - rule.recent)), end(keys.count_up_to(query_pos)) {
    sinks = min(keys.count_up_to(rule.sink - 1), end);
  }
  __device__ bool contains(int index) const {
    return (index < end) & ((index < sinks) | (index >= recent));  // no branches
  }
};

/// What the queries between two positions see alike.
class SeenByAll {
 public:
  SeenByAll() = default;
  __device__ SeenByAll(const KeyList& keys, const ClassState& rule, int oldest, int newest)
      : sinks_(SeenKeys(keys, rule, oldest).sinks),
        recent_(SeenKeys(keys, rule, newest).recent),
        end_(SeenKeys(keys, rule, oldest).end) {}
  /// Whether each query sees each key of [first, first + count).
  __device__ bool contains(int first, int count) const {
    return first + count <= end_ && (first + count <= sinks_ || recent_ <= max(first, sinks_));
  }

 private:
  std::int32_t sinks_ = 0;   // of the oldest query
  std::int32_t recent_ = 0;  // of the newest one
  std::int32_t end_ = 0;     // of the oldest one
};

/// Query rows of a tile are (token, query head of the group): row = token x size + head.
struct QueryGroup {
  std::int32_t size = 1;
  std::int32_t inverse = 0;  ///< 2^16 / size, rounded up: exact for row x size < 2^16

  __device__ explicit QueryGroup(int group_size)
      : size(group_size), inverse((1 << 16) / group_size + 1) {}
  __device__ int token_of(int row) const { return row * inverse >> 16; }
  __device__ int head_of(int row) const { return row - token_of(row) * size; }
};

/// Some tokens of one sequence's chunk and all query heads of one KV head.
struct PrefillTile {
  EntryState entry;
  ClassState state;
  KeyList keys;
  std::int32_t head = 0;  ///< in the launch's LayerHeads
  std::int32_t first_token = 0;
  std::int32_t num_tokens = 0;  ///< 0: there is no such tile

  /// The position of query row `row`; rows past the last one repeat its token.
  __device__ int pos_of(int row, const QueryGroup& group) const {
    return static_cast<int>(entry.length) + first_token + min(group.token_of(row), num_tokens - 1);
  }
};

/// Which chunk tile `index` is of, and the tile's number in it; one warp, all lanes alike.
struct ChunkTile {
  int entry = -1;
  int index = 0;
};
__device__ inline ChunkTile find_chunk(const DeviceStep& step, int index, int tile_tokens) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int base = 0; base < step.max_sequences; base += 32) {
    const int e = base + lane;
    // Read before num_entries is known: one latency less.
    const int tokens = e < step.max_sequences ? static_cast<int>(step.entries[e].num_tokens) : 0;
    const bool counts = e < step.header->num_entries && tokens > 1;
    int tiles = counts ? (tokens + tile_tokens - 1) / tile_tokens : 0;
    const int own = tiles;
    for (int d = 1; d < 32; d *= 2) {
      const int below = __shfl_up_sync(kWholeWarp, tiles, static_cast<unsigned>(d));
      if (lane >= d) tiles += below;
    }
    const unsigned behind = __ballot_sync(kWholeWarp, index < tiles);
    if (behind != 0) {
      const int found = __ffs(static_cast<int>(behind)) - 1;
      return {base + found, index - __shfl_sync(kWholeWarp, tiles - own, found)};
    }
    index -= __shfl_sync(kWholeWarp, tiles, 31);
  }
  return {};
}

/// Describes a chunk's tile and the keys that it needs; one thread.
__device__ inline void describe(const PrefillArgs& args, const ChunkTile& chunk, int head,
                                int tile_tokens, PrefillTile& tile) {
  tile.num_tokens = 0;
  if (chunk.entry < 0) return;
  tile.entry = args.step.entries[chunk.entry];
  tile.state = args.step.classes[chunk.entry * args.step.num_classes + args.heads.class_idx[head]];
  tile.head = head;
  tile.first_token = chunk.index * tile_tokens;
  tile.num_tokens = min(tile_tokens, static_cast<int>(tile.entry.num_tokens) - tile.first_token);
  const ClassState& s = tile.state;
  const int length = static_cast<int>(tile.entry.length);
  const int oldest = length + tile.first_token;
  const int end = oldest + tile.num_tokens;
  // Sinks, or all that a chunk-causal head still has of the first rows, or a dense head's past;
  // then what the oldest query's window reaches, as far as it is stored or the step's own.
  const int stored = s.older_count + s.newer_count > 0 ? s.older_pos : length;
  KeyList& keys = tile.keys;
  keys.first_count = min(max(s.first_count, s.sink), end);
  keys.second_pos = max(max(keys.first_count, stored), oldest - s.recent + 1);
  keys.count = keys.first_count + max(end - keys.second_pos, 0);
}

/// One key's rows.
struct KeyRows {
  const std::uint16_t* k = nullptr;
  const std::uint16_t* v = nullptr;
};

/// Where key `index` of the tile's list lies: in a page, or among the step's own rows. Numbers past
/// the last repeat it, so that what is multiplied by zero is a number.
template <int kDim>
__device__ KeyRows find_key(const PrefillArgs& args, const PrefillTile& tile, int index) {
  const int pos = tile.keys.position(min(index, tile.keys.count - 1));
  const int length = static_cast<int>(tile.entry.length);
  if (pos >= length) {
    const std::int64_t row = tile.entry.first_row + (pos - length);
    const int kv_head = args.heads.kv_head[tile.head];
    return {row_at(args.k, row, kv_head), row_at(args.v, row, kv_head)};
  }
  const ClassState& s = tile.state;
  const int from_older = pos - s.older_pos;
  const int slot = pos < s.first_count          ? pos
                   : from_older < s.older_count ? s.older_slot + from_older
                                                : s.newer_slot + (from_older - s.older_count);
  const std::int32_t page =
      args.step.page_table[tile.entry.table_base + args.heads.table_offset[tile.head] +
                           s.read_entry + slot / kPageTokens];
  const auto* rows = reinterpret_cast<const std::uint16_t*>(
      args.step.pages + static_cast<std::size_t>(page) * args.step.page_bytes);
  rows += slot % kPageTokens * kDim;
  return {rows, rows + kPageTokens * kDim};
}

/// A warp starts to copy kRows rows, of which lane i knows the i-th.
/// @param place  the shared-memory address of 8 elements: place(row, chunk of 8).
template <int kDim, int kRows, class Place>
__device__ __forceinline__ void copy_rows(const std::uint16_t* row_of_lane, Place place) {
  constexpr int kChunks = kDim / 8;
  constexpr int kCopies = kRows * kChunks;
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll 4
  for (int first = 0; first < kCopies; first += 32) {
    const int i = first + lane;
    const int row = i / kChunks;
    const auto from = reinterpret_cast<const std::uint16_t*>(
        __shfl_sync(kWholeWarp, reinterpret_cast<std::uintptr_t>(row_of_lane), row % kRows));
    if (kCopies % 32 == 0 || i < kCopies) {
      copy_async_16(place(row, i % kChunks), from + i % kChunks * 8);
    }
  }
}

/// Starts to copy the tile's queries to padded rows: (token, query head of the group) each.
/// @param thread  of num_threads that share the work; rows past the last one become 0.
template <int kDim>
__device__ void copy_queries(const PrefillArgs& args, const PrefillTile& tile,
                             const QueryGroup& group, int num_rows, std::uint32_t to, int thread,
                             int num_threads) {
  constexpr int kChunks = kDim / 8;
  const std::int64_t first_row = tile.entry.first_row + tile.first_token;
  const int first_head = args.heads.kv_head[tile.head] * group.size;
  const int used_rows = tile.num_tokens * group.size;
  for (int i = thread; i < num_rows * kChunks; i += num_threads) {
    const int row = i / kChunks;
    const int column = i % kChunks * 8;
    const bool exists = row < used_rows;
    const int used = exists ? row : 0;
    copy_async_16(
        to + static_cast<std::uint32_t>(row * kPaddedDim<kDim> + column) * 2,
        row_at(args.q, first_row + group.token_of(used), first_head + group.head_of(used)) + column,
        exists);
  }
}

/// One warp writes its rows [first, first + count) of the tile from padded shared memory to `out`,
/// in 16-byte pieces.
template <int kDim>
__device__ void write_outputs(const PrefillArgs& args, const PrefillTile& tile,
                              const QueryGroup& group, const std::uint16_t* rows, int first,
                              int count) {
  constexpr int kChunks = kDim / 8;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t first_row = tile.entry.first_row + tile.first_token;
  const int first_head = args.heads.kv_head[tile.head] * group.size;
  const int last = min(count, tile.num_tokens * group.size - first);
  for (int i = lane; i < last * kChunks; i += 32) {
    const int row = i / kChunks;
    const int column = i % kChunks * 8;
    *reinterpret_cast<uint4*>(row_at(args.out, first_row + group.token_of(first + row),
                                     first_head + group.head_of(first + row)) +
                              column) =
        *reinterpret_cast<const uint4*>(rows + row * kPaddedDim<kDim> + column);
  }
}

}  // namespace detail
}  // namespace headwise::inline v0::cuda
