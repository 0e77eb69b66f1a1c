// SPDX-License-Identifier: MIT
/// @file tile.cuh
/// What one piece of prefill work is: some tokens of a chunk, the keys they see, where those lie.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <limits>

#include "headwise/attention/cuda/chunk_rule.cuh"
#include "headwise/attention/cuda/ptx/tensor_core.cuh"
#include "headwise/attention/cuda/softmax_kind.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/step_state.cuh"
#include "headwise/core/tensor_view.hpp"

namespace headwise::inline v0::cuda {

/// The end of any list of keys.
inline constexpr std::int32_t kAllKeys = std::numeric_limits<std::int32_t>::max();

/// What a block does of a tile: a stretch of its keys. Written by the cut, see work.cuh.
struct alignas(16) TilePiece {
  std::int32_t chunk = 0;           ///< of the step
  std::int32_t tile = 0;            ///< of the chunk
  std::int32_t head = 0;            ///< in the launch's LayerHeads
  std::int32_t begin_key = 0;       ///< in the tile's list
  std::int32_t end_key = kAllKeys;  ///< one after the last, or beyond the tile's
  std::int32_t first_part = 0;      ///< of the tile's partial results
  std::int16_t part = 0;            ///< which of them this piece's is
  std::int16_t num_parts = 1;       ///< 1: nobody else has keys of the tile
  std::int32_t goes_on = 0;         ///< whether the next piece is the same block's
};
static_assert(sizeof(TilePiece) == 32);

/// A step's prefill work as it was cut for one kind of layer, at addresses that never move.
struct PrefillWork {
  std::int32_t* num_shares = nullptr;   ///< one; 0: tiles are drawn whole
  std::int32_t* first_piece = nullptr;  ///< [most shares] of each share, in the order of drawing
  TilePiece* pieces = nullptr;          ///< [most pieces] share by share
  float4* parts = nullptr;              ///< [most parts][part_float4s()] of tiles that are shared
  unsigned* arrived = nullptr;          ///< [most parts][warps] of the tile's pieces that are done
};

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
  PrefillWork work;                   ///< num_shares nullptr: tiles are drawn whole
  SoftmaxArgs softmax;                ///< what the softmax has besides a scale
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
  ChunkState chunk;
  ClassState state;
  KeyList keys;
  std::int64_t table = 0;  ///< page-table index of the head's slot 0
  std::int32_t head = 0;   ///< in the launch's LayerHeads
  std::int32_t first_token = 0;
  std::int32_t num_tokens = 0;  ///< 0: there is no such tile
  TilePiece piece;              ///< what of it the block does

  /// The position of query row `row`; rows past the last one repeat its token.
  __device__ int pos_of(int row, const QueryGroup& group) const {
    return static_cast<int>(chunk.length) + first_token + min(group.token_of(row), num_tokens - 1);
  }
};

/// The query head of the launch that query row `row` of a tile has.
__device__ __forceinline__ int query_head(const PrefillArgs& args, const PrefillTile& tile,
                                          const QueryGroup& group, int row) {
  return args.heads.kv_head[tile.head] * group.size + group.head_of(row);
}

/// Which chunk tile `index` is of, and the tile's number in it; one warp, all lanes alike.
struct ChunkTile {
  int chunk = -1;
  int index = 0;
  int num_tiles = 0;  // of the chunk
};
__device__ inline ChunkTile find_chunk(const DeviceStep& step, int index, int tile_tokens,
                                       int group_size) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int base = 0; base < step.max_sequences; base += 32) {
    const int e = base + lane;
    // Read before num_chunks is known: one latency less.
    const int tokens = e < step.max_sequences ? static_cast<int>(step.chunks[e].num_tokens) : 0;
    const bool counts = e < step.header->num_chunks && is_prefilled(tokens, group_size);
    int tiles = counts ? (tokens + tile_tokens - 1) / tile_tokens : 0;
    const int own = tiles;
    for (int d = 1; d < 32; d *= 2) {
      const int below = __shfl_up_sync(kWholeWarp, tiles, static_cast<unsigned>(d));
      if (lane >= d) tiles += below;
    }
    const unsigned behind = __ballot_sync(kWholeWarp, index < tiles);
    if (behind != 0) {
      const int found = __ffs(static_cast<int>(behind)) - 1;
      return {base + found, index - __shfl_sync(kWholeWarp, tiles - own, found),
              __shfl_sync(kWholeWarp, own, found)};
    }
    index -= __shfl_sync(kWholeWarp, tiles, 31);
  }
  return {};
}

/// The keys that some of the tokens [first_token, first_token + num_tokens) of a chunk sees.
__device__ inline KeyList list_keys(const ChunkState& chunk, const ClassState& s, int first_token,
                                    int num_tokens) {
  const int length = static_cast<int>(chunk.length);
  const int oldest = length + first_token;
  const int end = oldest + num_tokens;
  // Sinks, or all that a chunk-causal head still has of the first rows, or a dense head's past;
  // then what the oldest query's window reaches, as far as it is stored or the step's own.
  const int stored = s.older_count + s.newer_count > 0 ? s.older_pos : length;
  KeyList keys;
  keys.first_count = min(max(s.first_count, s.sink), end);
  keys.second_pos = max(max(keys.first_count, stored), oldest - s.recent + 1);
  keys.count = keys.first_count + max(end - keys.second_pos, 0);
  return keys;
}

/// Describes what a block does of a tile, and the keys that the tile needs; one thread.
/// @param former  a tile that has been described, `tile` itself perhaps: what is alike is not read
///   again
__device__ inline void describe(const PrefillArgs& args, const TilePiece& piece, int tile_tokens,
                                const PrefillTile& former, PrefillTile& tile) {
  const int class_idx = args.heads.class_idx[piece.head];
  if (former.piece.chunk == piece.chunk && args.heads.class_idx[former.head] == class_idx) {
    tile.chunk = former.chunk;
    tile.state = former.state;
  } else {
    tile.chunk = args.step.chunks[piece.chunk];
    tile.state = args.step.classes[piece.chunk * args.step.num_classes + class_idx];
  }
  tile.table =
      tile.state.table + tile.state.read_entry +
      static_cast<std::int64_t>(args.heads.idx_in_class[piece.head]) * tile.state.head_stride;
  tile.head = piece.head;
  tile.first_token = piece.tile * tile_tokens;
  tile.num_tokens = min(tile_tokens, static_cast<int>(tile.chunk.num_tokens) - tile.first_token);
  tile.keys = list_keys(tile.chunk, tile.state, tile.first_token, tile.num_tokens);
  tile.piece = piece;
  tile.piece.end_key = min(piece.end_key, tile.keys.count);
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
  const int length = static_cast<int>(tile.chunk.length);
  if (pos >= length) {
    const std::int64_t row = tile.chunk.first_row + (pos - length);
    const int kv_head = args.heads.kv_head[tile.head];
    return {row_at(args.k, row, kv_head), row_at(args.v, row, kv_head)};
  }
  const ClassState& s = tile.state;
  const int from_older = pos - s.older_pos;
  const int slot = pos < s.first_count          ? pos
                   : from_older < s.older_count ? s.older_slot + from_older
                                                : s.newer_slot + (from_older - s.older_count);
  const std::int32_t page = args.step.page_table[tile.table + slot / kPageTokens];
  const auto* rows = reinterpret_cast<const std::uint16_t*>(
      args.step.pages + static_cast<std::size_t>(page) * args.step.page_stride);
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

/// Where a query row lies; rows past the last one repeat it.
__device__ __forceinline__ const std::uint16_t* find_query(const PrefillArgs& args,
                                                           const PrefillTile& tile,
                                                           const QueryGroup& group, int row) {
  row = min(row, tile.num_tokens * group.size - 1);
  return row_at(args.q, tile.chunk.first_row + tile.first_token + group.token_of(row),
                args.heads.kv_head[tile.head] * group.size + group.head_of(row));
}

/// One warp writes its rows [first, first + kRows) of the tile from shared memory to `out`, in
/// 16-byte pieces.
/// @param place  where 8 elements lie: place(row of the warp's, chunk of 8).
template <int kDim, int kRows, class Place>
__device__ __forceinline__ void write_outputs(const PrefillArgs& args, const PrefillTile& tile,
                                              const QueryGroup& group, int first, Place place) {
  constexpr int kChunks = kDim / 8;
  static_assert(kRows * kChunks % 32 == 0 && kRows <= 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  // A lane finds one row for all: addresses are 64-bit products.
  const int row_of_lane = first + lane % kRows;
  std::uint16_t* to = nullptr;
  if (row_of_lane < tile.num_tokens * group.size) {
    to = row_at(args.out, tile.chunk.first_row + tile.first_token + group.token_of(row_of_lane),
                args.heads.kv_head[tile.head] * group.size + group.head_of(row_of_lane));
  }
#pragma unroll 8
  for (int i = lane; i < kRows * kChunks; i += 32) {
    const auto row = reinterpret_cast<std::uint16_t*>(
        __shfl_sync(kWholeWarp, reinterpret_cast<std::uintptr_t>(to), i / kChunks));
    if (row != nullptr) {
      *reinterpret_cast<uint4*>(row + i % kChunks * 8) = *place(i / kChunks, i % kChunks);
    }
  }
}

}  // namespace detail
}  // namespace headwise::inline v0::cuda
