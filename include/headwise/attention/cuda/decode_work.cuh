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
struct alignas(16) Piece {
  std::int64_t table = 0;      ///< page-table index of slot 0, the head's own offset not counted
  std::int32_t query_row = 0;  ///< of q and out
  std::int16_t head = 0;       ///< in the layer's LayerHeads
  std::int16_t query_tile = 0;
  std::int32_t slot_begin[2] = {};
  std::int32_t slot_end[2] = {};
  // Tiles are counted column by column over `stripes` stripes of `stripe_tiles` tiles each: the
  // warps of a long head walk through its stripes side by side, and so through the same memory
  // at about the same time. One stripe: tiles in their order.
  std::int32_t first = 0;  ///< in that count
  std::int32_t count = 0;  ///< 0: no piece
  std::int32_t stripes = 1;
  std::int32_t stripe_tiles = 0;
  // Blocks that share the item, numbered among those that have any work.
  std::int32_t item = 0;
  std::int32_t block_rank = 0;
  std::int32_t first_rank = 0;
  std::int32_t num_blocks = 1;  ///< 1: nobody else
};
static_assert(sizeof(Piece) == 64);

/// What one warp does: a part of an item that began before it, whole items, and a part of an item
/// that goes on after it.
struct alignas(16) WarpWork {
  Piece head;
  Piece tail;
  std::int32_t first_whole = 0;  ///< in DecodeWork::items
  std::int32_t num_whole = 0;
};

/// The grid of a decode launch.
struct DecodeGrid {
  int num_blocks = 0;
  int warps_per_block = 0;
  constexpr __host__ __device__ int num_warps() const { return num_blocks * warps_per_block; }
};

/// One kind of layer: layers with equal kinds share one list of work.
struct LayerKind {
  std::int32_t num_heads = 0;
  std::int32_t query_tiles = 1;  ///< ceil(group_size / 8)
  DecodeGrid grid;
  std::int16_t class_idx[kMaxHeads] = {};
};

/// A kind's work list, at addresses that never move.
struct DecodeWork {
  Piece* items = nullptr;              ///< [most items] each item whole, in line order
  std::int32_t* item_begin = nullptr;  ///< [most items + 1] where each begins on the line
  WarpWork* warps = nullptr;           ///< [num_warps]
};

namespace detail {

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
  piece.table = entry.table_base + state.append_entry;
  piece.query_row = static_cast<std::int32_t>(entry.first_row);
  piece.head = static_cast<std::int16_t>(head);
  piece.query_tile = static_cast<std::int16_t>(i % kind.query_tiles);
  for (int r = 0; r < 2; ++r) {
    piece.slot_begin[r] = state.slot_begin[r];
    piece.slot_end[r] = state.slot_end[r];
    piece.count += tiles_of(state.slot_begin[r], state.slot_end[r]);
  }
  piece.stripe_tiles = piece.count;
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
/// @param max_stripes  at most 16 (see below).
/// Dynamic shared memory: (num_warps + 1 + num_blocks) x 4 bytes.
template <class = void>  // inline does not hold for kernels
__global__ void __launch_bounds__(detail::kCutThreads)
    cut_decode_kernel(const __grid_constant__ DeviceStep step, const LayerKind* kinds,
                      const DecodeWork* work, int max_stripes) {
  extern __shared__ int shared[];
  __shared__ int warp_sums[32];
  wait_for_previous();
  release_next();
  const LayerKind& kind = kinds[blockIdx.x];
  const DecodeGrid grid = kind.grid;
  const int num_warps = grid.num_warps();
  int* interval = shared;              // [num_warps + 1] where each warp's interval begins
  int* rank = shared + num_warps + 1;  // [num_blocks] among blocks that have any work
  const DecodeWork lists = work[blockIdx.x];
  const int thread = static_cast<int>(threadIdx.x);
  const int num_items = step.header->num_entries * kind.num_heads * kind.query_tiles;
  const int per_thread = (num_items + detail::kCutThreads - 1) / detail::kCutThreads;
  const int begin = min(num_items, thread * per_thread);
  const int end = min(num_items, begin + per_thread);

  // The mean share of a warp, in tiles; long items are those that take several blocks.
  int tiles = 0;
  for (int i = begin; i < end; ++i) {
    const int count = detail::whole_item(step, kind, i).count;
    tiles += count > 0 ? count + kItemOverhead : 0;
  }
  const int mean = max(1, detail::block_scan(tiles, warp_sums).total / num_warps);
  // A warp takes about a page of each stripe. A long item has more tiles in a stripe than there are
  // stripes (16 x 16 < 8 shares x 64), so that what rounds its length up lies in the last stripe.
  constexpr int kPageTiles = kPageTokens / kTileRows;
  const int long_stripes = max(1, min(mean / kPageTiles, max_stripes));
  const auto stripes_of = [&](int count) {
    return count >= 8 * mean && count >= 16 * long_stripes ? long_stripes : 1;
  };
  const auto line_tiles = [&](int count) {
    const int stripes = stripes_of(count);
    return (count + stripes - 1) / stripes * stripes;
  };

  // Every item on the line.
  tiles = 0;
  int present = 0;
  for (int i = begin; i < end; ++i) {
    const int count = detail::whole_item(step, kind, i).count;
    if (count == 0) continue;
    ++present;
    tiles += line_tiles(count) + kItemOverhead;
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
    lists.item_begin[item_at++] = line_at;
    line_at += line_tiles(item.count) + kItemOverhead;
  }
  const int num_present = item_scan.total;
  const int line_total = line_scan.total;
  if (thread == 0) lists.item_begin[num_present] = line_total;
  __syncthreads();

  // Equal intervals; a cut close to an item's end moves there, which saves a merge.
  const auto begin_of = [&](int k) { return lists.item_begin[k]; };
  const int snap = mean / 8;
  for (int w = thread; w <= num_warps; w += detail::kCutThreads) {
    int cut = static_cast<int>(static_cast<std::int64_t>(w) * line_total / num_warps);
    if (w > 0 && w < num_warps && num_present > 0) {
      const int k = detail::last_at_most(num_present, cut, begin_of);
      if (cut - begin_of(k) <= snap) {
        cut = begin_of(k);
      } else if (begin_of(k + 1) - cut <= snap) {
        cut = begin_of(k + 1);
      }
    }
    interval[w] = cut;
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
      const int item_begin = begin_of(k);
      Piece piece = lists.items[k];
      const int real = line_tiles(piece.count);
      const int first = max(from - item_begin, 0);
      const int last = min(to - item_begin, real);
      if (first >= last) continue;  // nothing but the overhead is left of it
      if (first == 0 && last == real) {
        if (warp.num_whole++ == 0) warp.first_whole = k;
        continue;
      }
      piece.stripes = stripes_of(piece.count);
      piece.stripe_tiles = real / piece.stripes;
      piece.first = first;
      piece.count = last - first;
      const int first_warp = detail::last_at_most(num_warps, item_begin, interval_at);
      const int last_warp = detail::last_at_most(num_warps, item_begin + real - 1, interval_at);
      piece.block_rank = rank[w / grid.warps_per_block];
      piece.first_rank = rank[first_warp / grid.warps_per_block];
      piece.num_blocks = rank[last_warp / grid.warps_per_block] - piece.first_rank + 1;
      (first > 0 ? warp.head : warp.tail) = piece;
    }
    lists.warps[w] = warp;
  }
}

}  // namespace headwise::inline v0::cuda
