// SPDX-License-Identifier: MIT
/// @file decode_work.cuh
/// Cuts one decode step into equal shares of unequal heads, one share a warp, on the device.
///
/// An *item* is one KV head of one sequence (for up to 8 query heads); it costs as many *tiles* of
/// 16 rows as it sees. All items lie end to end on a line, which is cut into one interval for each
/// warp of the grid. Items inside an interval are one warp's business and need no merge, as most
/// streaming heads of a large batch; only the two at an interval's ends may be shared.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/step_state.cuh"

namespace headwise::inline v0::cuda {

/// Rows of K and V that a warp handles at once: the M of mma.m16n8k16.
inline constexpr int kTileRows = 16;
/// Query heads of one item: the N of mma.m16n8k16. Larger groups are cut, and read K and V again.
inline constexpr int kItemQueries = 8;
/// What an item costs a warp besides its tiles, in tiles: its queries' load and its output's store.
inline constexpr int kItemOverhead = 1;

/// A part of one item, done by one warp.
///
/// A block's part of an item is `tiles` tiles from `base` on, in rounds of `width` tiles: in each
/// round the block's warps read neighbouring tiles. Positions are counted column by column, so that
/// [first, first + count) is one warp's column, or parts of two.
struct alignas(16) Piece {
  std::int64_t table = 0;       ///< page-table index of slot 0, the layer's first entry not counted
  std::int32_t query_row = 0;   ///< of q and out
  std::int16_t kv_head = 0;     ///< in the layer
  std::int16_t query_tile = 0;  ///< which 8 query heads of the group
  std::int32_t slot_begin[2] = {};  ///< the rows seen: two runs of slots
  std::int32_t slot_end[2] = {};    ///< one after the last of each
  std::int32_t base = 0;            ///< first tile of the block's part
  std::int32_t tiles = 0;           ///< of the block's part
  std::int32_t count = 0;           ///< positions of the warp; 0: no piece
  std::int32_t first_round = 0;     ///< where it begins: position first_column * rounds + this
  std::int32_t last_round = 0;      ///< likewise one after the last
  std::int16_t first_column = 0;    ///< see first_round
  std::int16_t last_column = 0;     ///< see last_round
  std::int32_t item = 0;            ///< in DecodeWork::items
  std::int32_t new_slot = 0;        ///< of the step's own row
  // Blocks that share the item, numbered among those that have any work.
  std::int16_t width = 1;       ///< warps of the block that have a part of the item
  std::int16_t block_rank = 0;  ///< this block's number
  std::int16_t first_rank = 0;  ///< that of the first block that shares the item
  std::int16_t num_blocks = 1;  ///< 1: nobody else
};
static_assert(sizeof(Piece) == 80);

/// What one warp does: a part of an item that began before it, whole items, and a part of an item
/// that goes on after it.
struct alignas(16) WarpWork {
  Piece head;                    ///< the end of an item that began before
  Piece tail;                    ///< the beginning of one that goes on
  std::int32_t first_whole = 0;  ///< in DecodeWork::items
  std::int32_t num_whole = 0;    ///< whole items between the two
};

/// The grid of a decode launch.
struct DecodeGrid {
  int num_blocks = 0;       ///< of the launch
  int warps_per_block = 0;  ///< of 32 threads
  /// Warps of the launch.
  constexpr __host__ __device__ int num_warps() const { return num_blocks * warps_per_block; }
};

/// One kind of layer: layers whose heads keep alike, one by one, share one list of work.
struct LayerKind {
  std::int32_t num_heads = 0;                 ///< KV heads
  std::int32_t query_tiles = 1;               ///< ceil(group_size / 8)
  DecodeGrid grid;                            ///< of its launches
  std::int16_t class_idx[kMaxHeads] = {};     ///< [num_heads] in CacheGeometry::classes()
  std::int16_t kv_head[kMaxHeads] = {};       ///< [num_heads] in the layer
  std::int32_t table_offset[kMaxHeads] = {};  ///< from the layer's first entry
};

/// A kind's work list, at addresses that never move.
struct DecodeWork {
  Piece* items = nullptr;              ///< [most items] each item whole, in line order
  std::int32_t* item_begin = nullptr;  ///< [most items + 1] where each begins on the line
  WarpWork* warps = nullptr;           ///< [num_warps]
};

namespace detail {

/// Threads of a cut, and most blocks of a decode launch: one thread numbers one block.
inline constexpr int kCutThreads = 1024;

__host__ __device__ constexpr int tiles_of(int begin, int end) {
  return begin < end ? (end + kTileRows - 1) / kTileRows - begin / kTileRows : 0;
}

/// Sums over a block of kCutThreads threads: what all lower threads hold, and the total.
struct BlockScan {
  int before = 0;
  int total = 0;
};
__device__ inline BlockScan block_scan(int value, int* warp_sums) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  int inclusive = value;
  for (int d = 1; d < 32; d *= 2) {
    const int below = __shfl_up_sync(0xFFFFFFFFU, inclusive, static_cast<unsigned>(d));
    if (lane >= d) inclusive += below;
  }
  __syncthreads();  // the former call's readers are done
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int sum = warp_sums[lane];  // kCutThreads / 32 == 32 warps
  for (int d = 1; d < 32; d *= 2) {
    const int below = __shfl_up_sync(0xFFFFFFFFU, sum, static_cast<unsigned>(d));
    if (lane >= d) sum += below;
  }
  const int lower_warps = __shfl_sync(0xFFFFFFFFU, sum, (warp + 31) % 32);
  return {inclusive - value + (warp > 0 ? lower_warps : 0), __shfl_sync(0xFFFFFFFFU, sum, 31)};
}

/// Item `i` of the step: sequence by sequence, head by head, query tile by query tile. Its count is
/// 0 where the sequence's chunk is not one token: such chunks are prefill's.
__device__ inline Piece whole_item(const DeviceStep& step, const LayerKind& kind, int i) {
  const int per_entry = kind.num_heads * kind.query_tiles;
  const int e = i / per_entry;
  const int head = i % per_entry / kind.query_tiles;
  const EntryState entry = step.entries[e];
  Piece piece;
  if (entry.num_tokens != 1) return piece;
  const ClassState state = step.classes[e * step.num_classes + kind.class_idx[head]];
  piece.table = entry.table_base + state.append_entry + kind.table_offset[head];
  piece.query_row = static_cast<std::int32_t>(entry.first_row);
  piece.kv_head = kind.kv_head[head];
  piece.query_tile = static_cast<std::int16_t>(i % kind.query_tiles);
  for (int r = 0; r < 2; ++r) {
    piece.slot_begin[r] = state.slot_begin[r];
    piece.slot_end[r] = state.slot_end[r];
    piece.count += tiles_of(state.slot_begin[r], state.slot_end[r]);
  }
  const std::int64_t turn = state.ring_rows - state.ring_sink;
  const bool in_ring = state.ring_rows > 0 && entry.length >= state.ring_sink;
  piece.new_slot = static_cast<std::int32_t>(
      in_ring ? state.ring_sink + (entry.length - state.ring_sink) % turn : entry.length);
  piece.tiles = piece.count;
  piece.last_column = 1;  // one warp's column, as many rounds as tiles
  return piece;
}

/// The last of `n` ascending numbers that is at most `x`; the first one is.
template <class Get>
__device__ int last_at_most(int n, int x, Get get) {
  int low = 0;
  int high = n;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (get(middle) <= x ? low : high) = middle;
  }
  return low;
}

}  // namespace detail

/// One block a kind of layer. Costs a few microseconds once a step, not once a layer.
/// @param kinds, work  [gridDim.x]
/// @param most_items  room for so many items' places in shared memory; 0: they lie in `work`.
/// Dynamic shared memory: cut_decode_bytes().
template <class = void>  // inline does not hold for kernels
__global__ void __launch_bounds__(detail::kCutThreads)
    cut_decode_kernel(const __grid_constant__ DeviceStep step, const LayerKind* kinds,
                      const DecodeWork* work, int most_items) {
  extern __shared__ int shared[];
  __shared__ int warp_sums[32];
  wait_for_previous();  // and no early release: decode reads this work before it waits
  const LayerKind& kind = kinds[blockIdx.x];
  const DecodeGrid grid = kind.grid;
  const int num_warps = grid.num_warps();
  int* interval = shared;              // [num_warps + 1] where each warp's interval begins
  int* rank = shared + num_warps + 1;  // [num_blocks] among blocks that have any work
  const DecodeWork lists = work[blockIdx.x];
  int* item_begin = most_items > 0 ? rank + grid.num_blocks : lists.item_begin;
  const int thread = static_cast<int>(threadIdx.x);
  const int num_items = step.header->num_entries * kind.num_heads * kind.query_tiles;
  const int per_thread = (num_items + detail::kCutThreads - 1) / detail::kCutThreads;
  const int begin = min(num_items, thread * per_thread);
  const int end = min(num_items, begin + per_thread);

  // Every item on the line.
  int present = 0;
  int tiles = 0;
  for (int i = begin; i < end; ++i) {
    const int count = detail::whole_item(step, kind, i).count;
    present += count > 0 ? 1 : 0;
    tiles += count > 0 ? count + kItemOverhead : 0;
  }
  const detail::BlockScan item_scan = detail::block_scan(present, warp_sums);
  const detail::BlockScan line_scan = detail::block_scan(tiles, warp_sums);
  int item_at = item_scan.before;
  int line_at = line_scan.before;
  for (int i = begin; i < end; ++i) {
    Piece item = detail::whole_item(step, kind, i);
    if (item.count == 0) continue;
    item.item = item_at;
    lists.items[item_at] = item;
    item_begin[item_at++] = line_at;
    line_at += item.count + kItemOverhead;
  }
  const int num_present = item_scan.total;
  const int line_total = line_scan.total;
  if (thread == 0) item_begin[num_present] = line_total;
  __syncthreads();

  // Equal intervals; a cut close to an item's end moves there, which saves a merge: a microsecond
  // or two. Every warp waits for the one with the longest interval: between blocks a cut moves by
  // one tile a warp at most, between the warps of a block by two tiles.
  const auto begin_of = [&](int k) { return item_begin[k]; };
  const auto snapped = [&](int cut, int most) {
    if (num_present == 0) return cut;
    const int k = detail::last_at_most(num_present, cut, begin_of);
    const int back = cut - begin_of(k);
    const int ahead = begin_of(k + 1) - cut;
    if (min(back, ahead) > most) return cut;
    return back <= ahead ? begin_of(k) : begin_of(k + 1);
  };
  const int block_most = min(line_total / grid.num_blocks / 2, grid.warps_per_block);
  const int warp_most = min(line_total / num_warps / 8, 2);
  const auto block_cut = [&](int b) {
    const int cut = static_cast<int>(static_cast<std::int64_t>(b) * line_total / grid.num_blocks);
    return b > 0 && b < grid.num_blocks ? snapped(cut, block_most) : cut;
  };
  for (int w = thread; w <= num_warps; w += detail::kCutThreads) {
    const int begin_cut = block_cut(w / grid.warps_per_block);
    const int of_block = w % grid.warps_per_block;
    if (of_block == 0) {
      interval[w] = begin_cut;
    } else {
      const int end_cut = block_cut(w / grid.warps_per_block + 1);
      const int cut = begin_cut + (end_cut - begin_cut) * of_block / grid.warps_per_block;
      interval[w] = min(max(snapped(cut, warp_most), begin_cut), end_cut);
    }
  }
  __syncthreads();
  const int busy = thread < grid.num_blocks && interval[thread * grid.warps_per_block] <
                                                   interval[(thread + 1) * grid.warps_per_block];
  const detail::BlockScan rank_scan = detail::block_scan(busy, warp_sums);
  if (thread < grid.num_blocks) rank[thread] = rank_scan.before;
  __syncthreads();

  const auto interval_at = [&](int w) { return interval[w]; };
  for (int w = thread; w < num_warps; w += detail::kCutThreads) {
    WarpWork warp;
    const int from = interval[w];
    const int to = interval[w + 1];
    int k = from < to ? detail::last_at_most(num_present, from, begin_of) : num_present;
    warp.first_whole = num_present;
    for (; k < num_present && begin_of(k) < to; ++k) {
      const int at = begin_of(k);
      const int count = begin_of(k + 1) - at - kItemOverhead;
      const int first = max(from - at, 0);
      const int last = min(to - at, count);
      if (first >= last) continue;  // nothing but the overhead is left of it
      if (first == 0 && last == count) {
        if (warp.num_whole++ == 0) warp.first_whole = k;
        continue;
      }
      Piece piece = lists.items[k];
      const int block = w / grid.warps_per_block;
      const int block_warp = block * grid.warps_per_block;
      piece.base = max(interval[block_warp] - at, 0);
      piece.tiles = min(interval[block_warp + grid.warps_per_block] - at, count) - piece.base;
      int width = 0;  // the block's warps that have a part of the item
      for (int i = block_warp; i < block_warp + grid.warps_per_block; ++i) {
        width += max(interval[i] - at, 0) < min(interval[i + 1] - at, count) ? 1 : 0;
      }
      piece.width = static_cast<std::int16_t>(width);
      const int rounds = (piece.tiles + width - 1) / width;
      // Shares of whole rounds; the few positions too many lie behind the last tile and are empty.
      const auto position = [&](int tile) {
        return static_cast<int>(static_cast<std::int64_t>(tile - piece.base) * rounds * width /
                                piece.tiles);
      };
      const int first_position = position(first);
      const int last_position = position(last);
      piece.count = last_position - first_position;
      piece.first_round = first_position % rounds;
      piece.last_round = last_position % rounds;
      piece.first_column = static_cast<std::int16_t>(first_position / rounds);
      piece.last_column = static_cast<std::int16_t>(last_position / rounds);
      const int first_warp = detail::last_at_most(num_warps, at, interval_at);
      const int last_warp = detail::last_at_most(num_warps, at + count - 1, interval_at);
      const int first_rank = rank[first_warp / grid.warps_per_block];
      piece.block_rank = static_cast<std::int16_t>(rank[block]);
      piece.first_rank = static_cast<std::int16_t>(first_rank);
      piece.num_blocks =
          static_cast<std::int16_t>(rank[last_warp / grid.warps_per_block] - first_rank + 1);
      (first > 0 ? warp.head : warp.tail) = piece;
    }
    lists.warps[w] = warp;
  }
}

/// Shared memory of cut_decode_kernel for at most `most_items` items (0: in `work`).
constexpr std::size_t cut_decode_bytes(const DecodeGrid& grid, int most_items) {
  return sizeof(int) * static_cast<std::size_t>(grid.num_warps() + 1 + grid.num_blocks +
                                                (most_items > 0 ? most_items + 1 : 0));
}

}  // namespace headwise::inline v0::cuda
