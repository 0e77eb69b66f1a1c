// SPDX-License-Identifier: MIT
/// @file work.cuh
/// Cuts one decode step into equal shares of unequal heads, on the device: a share a block, and in
/// it a share a worker.
///
/// An *item* is one KV head of one sequence and up to DecodeSize::rows query rows (token, head of
/// the group); it costs as many *tiles* of K and V rows as they see. All items of a size lie end to
/// end on a line, which is cut into one interval for each block of the grid. What an interval has
/// of an item is a *piece*. A *worker* is one warp, or a few that share what they read. A whole
/// item of no more than a worker's share is *narrow*: one worker does it and nobody merges, as
/// most streaming heads of a large batch. All other pieces are *wide*: the block's workers read
/// their tiles in turn, so that a block streams through one stretch of memory at a time. A worker
/// with narrow pieces does those first and joins in later.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/chunk_rule.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/step_state.cuh"

namespace headwise::inline v0::cuda {

/// Most workers of a decode block: those that stream rows.
inline constexpr int kMostWorkers = 12;
/// What an item costs a worker besides its tiles, in tiles: its queries' load and its output's
/// store.
inline constexpr int kItemOverhead = 1;

/// What one block has of one item.
///
/// The rows that its queries see are up to three runs of slots. The own row of a single token is in
/// one of them; those of several tokens are not, they come from the step's k and v. Positions count
/// from the step's first token: -1 is the newest row before the step, i the step's token i.
struct alignas(16) Piece {
  std::int64_t table = 0;           ///< page-table index of slot 0 of the class's first head
  std::int32_t head_stride = 0;     ///< page-table entries from one head of the class to the next
  std::int32_t query_row = 0;       ///< of the step's first token in q, k, v and out
  std::int16_t kv_head = 0;         ///< in the layer
  std::int16_t first_row = 0;       ///< of the item's query rows
  std::int16_t num_tokens = 0;      ///< of the sequence's step
  std::int16_t own_rows = 0;        ///< that come from k and v behind the runs: none, or num_tokens
  std::int32_t slot_begin[3] = {};  ///< of each run; all queries see the first one's rows
  std::int32_t slot_end[3] = {};    ///< one after the last of each
  std::int32_t position[2] = {};    ///< of the second and third run: position less slot
  std::int32_t recent = 0;          ///< newest positions that a query sees, its own counted
  std::int32_t sink_end = 0;        ///< positions before this one are always seen
  std::int32_t own_slot = 0;        ///< of the step's first row
  std::int32_t ring_begin = 0;      ///< slot that follows the one before ring_end
  std::int32_t ring_end = 0;        ///< where slots go round
  std::int32_t first_tile = 0;      ///< of the item's
  std::int32_t num_tiles = 0;       ///< 0: no piece
  // Blocks that share the item, numbered among those that have any work.
  std::int16_t block_rank = 0;  ///< this block's number
  std::int16_t first_rank = 0;  ///< that of the first block that shares the item
  std::int16_t num_blocks = 1;  ///< 1: nobody else
  std::int32_t length = 0;      ///< tokens before the step

  /// The position of what lies in `slot`: a row before the step, or a single token's own. Slots
  /// that the runs do not name have none.
  __host__ __device__ int position_in(int slot) const {
    if (slot < ring_begin) return slot - length;
    const int newest = own_rows > 0 ? own_slot - 1 : own_slot;
    return slot - own_slot - (slot > newest ? ring_end - ring_begin : 0);
  }
};
static_assert(sizeof(Piece) == 96);

/// What one worker does: its narrow pieces, then its tiles of the block's wide ones.
///
/// Those tiles are dealt in rounds, one to each worker that takes part, in their order.
struct alignas(16) WorkerWork {
  std::int32_t first_narrow = 0;  ///< in DecodeWork::pieces
  std::int32_t num_narrow = 0;    ///< the worker's own
  std::int32_t first_wide = 0;    ///< likewise
  std::int32_t num_wide = 0;      ///< the block's
  std::int32_t first_round = 0;   ///< in which the worker takes part
  /// Of both kinds.
  __host__ __device__ int num_pieces() const { return num_narrow + num_wide; }
};

/// The grid of a decode launch.
struct DecodeGrid {
  int num_blocks = 0;         ///< of the launch
  int workers_per_block = 0;  ///< those that stream rows; merging warps come on top
  /// Workers of the launch.
  constexpr __host__ __device__ int num_workers() const { return num_blocks * workers_per_block; }
};

/// One kind of layer and a size of items: layers whose heads keep alike, one by one, share one list
/// of work a size.
struct LayerKind {
  std::int32_t num_heads = 0;              ///< KV heads
  ChunkRule rule;                          ///< who attends which chunk
  std::int32_t size = 0;                   ///< of the items, see DecodeSize
  DecodeGrid grid;                         ///< of its launches
  std::int16_t class_idx[kMaxHeads] = {};  ///< [num_heads] in DeviceStep::classes
  std::int16_t kv_head[kMaxHeads] = {};    ///< [num_heads] in the layer
};

/// A kind's work list, at addresses that never move.
struct DecodeWork {
  Piece* items = nullptr;              ///< [most items] each item whole, in line order
  std::int32_t* item_begin = nullptr;  ///< [most items + 1] where each begins on the line
  Piece* pieces = nullptr;             ///< [most pieces] block by block: narrow ones, wide ones
  std::int32_t* places = nullptr;      ///< [most pieces] scratch of the cut
  WorkerWork* workers = nullptr;       ///< [num_workers]

  /// Only an item that goes on in the next block makes a piece more.
  static constexpr int most_pieces(int most_items, const DecodeGrid& grid) {
    return most_items + grid.num_blocks;
  }
};

namespace detail {

/// Threads of a cut, and most blocks of a decode launch: one thread numbers one block.
inline constexpr int kCutThreads = 1024;

/// Tiles of `tile_rows` slots that a run of slots touches.
__host__ __device__ constexpr int tiles_of(int begin, int end, int tile_rows) {
  return begin < end ? (end + tile_rows - 1) / tile_rows - begin / tile_rows : 0;
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

/// The rows before the step that some of several tokens see. What touches becomes one run where all
/// of them see it: sinks and ring do more often than not.
__device__ inline void set_past(const ClassState& state, const ChunkState& chunk, Piece& piece) {
  const auto length = static_cast<std::int32_t>(chunk.length);
  const std::int32_t first[2] = {state.older_pos - length,
                                 state.older_pos - length + state.older_count};
  const std::int32_t slot[2] = {state.older_slot, state.newer_slot};
  const std::int32_t count[2] = {state.older_count, state.newer_count};
  // What the last token sees, all see.
  const std::int32_t seen_by_all = static_cast<std::int32_t>(chunk.num_tokens) - state.recent;
  piece.slot_end[0] = state.first_count;
#pragma unroll
  for (int r = 1; r >= 0; --r) {  // rather what wrapped around
    if (count[r] > 0 && first[r] >= seen_by_all && slot[r] == piece.slot_end[0]) {
      piece.slot_end[0] += count[r];
    } else {
      piece.slot_begin[r + 1] = slot[r];
      piece.slot_end[r + 1] = slot[r] + count[r];
      piece.position[r] = first[r] - slot[r];
    }
  }
  piece.recent = state.recent;
  piece.sink_end = state.sink - length;
}

/// Item `i` of the step: sequence by sequence, head by head, query rows by query rows. It has no
/// tiles where the sequence's chunk is not of the kind's size.
__device__ inline Piece whole_item(const DeviceStep& step, const LayerKind& kind, int i) {
  const DecodeSize size(kind.size);
  const int items_a_head = kind.rule.items_a_head(kind.size);
  const int per_entry = kind.num_heads * items_a_head;
  const int e = i / per_entry;
  const int head = i % per_entry / items_a_head;
  const ChunkState chunk = step.chunks[e];
  Piece piece;
  const int first_row = i % items_a_head * size.rows;
  if (kind.rule.decode_size(chunk.num_tokens) != kind.size ||
      first_row >= chunk.num_tokens * kind.rule.group_size) {
    return piece;
  }
  const ClassState state = step.classes[e * step.num_classes + kind.class_idx[head]];
  piece.head_stride = state.head_stride;
  piece.query_row = static_cast<std::int32_t>(chunk.first_row);
  piece.kv_head = kind.kv_head[head];
  piece.first_row = static_cast<std::int16_t>(first_row);
  piece.num_tokens = static_cast<std::int16_t>(chunk.num_tokens);
  piece.length = static_cast<std::int32_t>(chunk.length);
  piece.own_slot = static_cast<std::int32_t>(append_map(state).slot(Pos{chunk.length}).value);
  piece.ring_begin = state.sink_slots;
  piece.ring_end = state.turn > 0 ? state.sink_slots + state.turn : 0x7FFFFFFF;
  if (chunk.num_tokens == 1) {
    piece.recent = 0x7FFFFFFF;  // it sees all that its runs have
    piece.table = state.table + state.append_entry;
    for (int r = 0; r < 2; ++r) {
      piece.slot_begin[r] = state.slot_begin[r];
      piece.slot_end[r] = state.slot_end[r];
    }
  } else {
    piece.table = state.table + state.read_entry;
    piece.own_rows = piece.num_tokens;
    set_past(state, chunk, piece);
  }
  for (int r = 0; r < 3; ++r) {
    piece.num_tiles += tiles_of(piece.slot_begin[r], piece.slot_end[r], size.tile_rows());
  }
  piece.num_tiles += tiles_of(0, piece.own_rows, size.tile_rows());
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

/// A cut's numbers, in shared memory; those of items and pieces in `work` where they do not fit.
struct CutMemory {
  int* cut;          ///< [num_blocks + 1] where each block's interval begins on the line
  int* rank;         ///< [num_blocks] among blocks that have any work
  int* first_item;   ///< [num_blocks] of which a block has a piece
  int* first_piece;  ///< [num_blocks + 1] of each block, in line order
  int* item_begin;   ///< [num_items + 1] where each item begins on the line
  int* places;       ///< [num_pieces] in DecodeWork::pieces; see BlockDeal

  __device__ CutMemory(int* shared, const DecodeWork& work, const DecodeGrid& grid, int most_items)
      : cut(shared),
        rank(cut + grid.num_blocks + 1),
        first_item(rank + grid.num_blocks),
        first_piece(first_item + grid.num_blocks),
        item_begin(most_items > 0 ? first_piece + grid.num_blocks + 1 : work.item_begin),
        places(most_items > 0 ? item_begin + most_items + 1 : work.places) {}
};

/// A block's pieces, dealt to its workers; one thread.
class BlockDeal {
 public:
  /// @param places  [num_pieces] in line order; the worker of a narrow piece, then its place.
  __device__ BlockDeal(int num_workers, int* places, int num_pieces)
      : num_workers_(num_workers), places_(places), num_pieces_(num_pieces) {}

  /// @param num_tiles  of the i-th piece
  /// @param is_narrow  whether one worker may do it
  template <class NumTiles, class IsNarrow>
  __device__ void deal(NumTiles num_tiles, IsNarrow is_narrow) {
    for (int i = 0; i < num_pieces_; ++i) {
      int worker = kWide;
      if (is_narrow(i)) {
        worker = 0;
        for (int w = 1; w < num_workers_; ++w) {
          if (load_[w] < load_[worker]) worker = w;
        }
        load_[worker] += num_tiles(i) + kItemOverhead;
      } else {
        wide_tiles_ += num_tiles(i);
      }
      places_[i] = worker;
    }
    // No worker may have more than its share: the wide tiles must fill all others' time.
    for (int i = num_pieces_ - 1; room_beside_narrow() > wide_tiles_; --i) {
      const int worker = places_[i];
      if (worker == kWide) continue;
      load_[worker] -= num_tiles(i) + kItemOverhead;
      wide_tiles_ += num_tiles(i);
      places_[i] = kWide;
    }
  }

  /// Lays the pieces out from `first_piece` on, the narrow ones worker by worker, then the wide
  /// ones.
  __device__ void lay_out(int first_piece, WorkerWork* workers) {
    int next[kMostWorkers + 1] = {};  // the last one: wide
    for (int i = 0; i < num_pieces_; ++i) ++next[index_of(places_[i])];
    int place = first_piece;
    for (int w = 0; w <= num_workers_; ++w) {
      const int index = w < num_workers_ ? w : kMostWorkers;
      const int count = next[index];
      next[index] = place;
      if (w < num_workers_) {
        workers[w].first_narrow = place;
        workers[w].num_narrow = count;
      }
      place += count;
    }
    const int spare = wide_tiles_ - room_beside_narrow();
    const auto rounds_of = [&](int w) {
      return most_load() - load_[w] + spare / num_workers_ + (w < spare % num_workers_ ? 1 : 0);
    };
    int rounds = 0;
    for (int w = 0; w < num_workers_; ++w) rounds = max(rounds, rounds_of(w));
    for (int w = 0; w < num_workers_; ++w) {
      workers[w].first_wide = next[kMostWorkers];
      workers[w].num_wide = place - next[kMostWorkers];
      workers[w].first_round = rounds - rounds_of(w);
    }
    for (int i = 0; i < num_pieces_; ++i) places_[i] = next[index_of(places_[i])]++;
  }

 private:
  static constexpr int kWide = -1;
  static __device__ int index_of(int worker) { return worker == kWide ? kMostWorkers : worker; }

  __device__ int most_load() const {
    int most = 0;
    for (int w = 0; w < num_workers_; ++w) most = max(most, load_[w]);
    return most;
  }
  /// Tiles that the other workers have time for while the busiest one does its narrow pieces.
  __device__ int room_beside_narrow() const {
    const int most = most_load();
    int room = 0;
    for (int w = 0; w < num_workers_; ++w) room += most - load_[w];
    return room;
  }

  int num_workers_;
  int* places_;
  int num_pieces_;
  int load_[kMostWorkers] = {};  // narrow tiles of each worker, and overhead
  int wide_tiles_ = 0;
};

}  // namespace detail

/// One block a kind of layer and size. Costs tens of microseconds once a step, nothing a layer.
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
  const DecodeWork lists = work[blockIdx.x];
  const detail::CutMemory memory(shared, lists, grid, most_items);
  const int thread = static_cast<int>(threadIdx.x);
  const int num_items =
      step.header->num_chunks * kind.num_heads * kind.rule.items_a_head(kind.size);
  const int per_thread = (num_items + detail::kCutThreads - 1) / detail::kCutThreads;
  const int begin = min(num_items, thread * per_thread);
  const int end = min(num_items, begin + per_thread);

  // Every item on the line.
  int present = 0;
  int tiles = 0;
  for (int i = begin; i < end; ++i) {
    const int count = detail::whole_item(step, kind, i).num_tiles;
    present += count > 0 ? 1 : 0;
    tiles += count > 0 ? count + kItemOverhead : 0;
  }
  const detail::BlockScan item_scan = detail::block_scan(present, warp_sums);
  const detail::BlockScan line_scan = detail::block_scan(tiles, warp_sums);
  int item_at = item_scan.before;
  int line_at = line_scan.before;
  for (int i = begin; i < end; ++i) {
    const Piece item = detail::whole_item(step, kind, i);
    if (item.num_tiles == 0) continue;
    lists.items[item_at] = item;
    memory.item_begin[item_at++] = line_at;
    line_at += item.num_tiles + kItemOverhead;
  }
  const int num_present = item_scan.total;
  const int line_total = line_scan.total;
  if (thread == 0) memory.item_begin[num_present] = line_total;
  __syncthreads();

  // Equal intervals; a cut close to an item's end moves there, which saves a merge: a microsecond
  // or two. Every block waits for the one with the longest interval: a cut moves by one tile a
  // worker at most.
  const auto begin_of = [&](int k) { return memory.item_begin[k]; };
  const auto tiles_of_item = [&](int k) { return begin_of(k + 1) - begin_of(k) - kItemOverhead; };
  const auto item_at_cut = [&](int cut) {
    return detail::last_at_most(num_present, cut, begin_of);
  };
  const int most = min(line_total / grid.num_blocks / 2, grid.workers_per_block);
  for (int b = thread; b <= grid.num_blocks; b += detail::kCutThreads) {
    int cut = static_cast<int>(static_cast<std::int64_t>(b) * line_total / grid.num_blocks);
    if (num_present > 0 && b > 0 && b < grid.num_blocks) {
      const int k = item_at_cut(cut);
      const int back = cut - begin_of(k);
      const int ahead = begin_of(k + 1) - cut;
      if (min(back, ahead) <= most) cut = back <= ahead ? begin_of(k) : begin_of(k + 1);
    }
    memory.cut[b] = cut;
  }
  __syncthreads();

  // Every block's pieces, dealt to its workers.
  const bool has_block = thread < grid.num_blocks;
  const int cut_begin = has_block ? memory.cut[thread] : 0;
  const int cut_end = has_block ? memory.cut[thread + 1] : 0;
  const auto piece_begin = [&](int k, int from) { return max(from - begin_of(k), 0); };
  const auto piece_end = [&](int k, int to) { return min(to - begin_of(k), tiles_of_item(k)); };
  int first_item = 0;
  int num_pieces = 0;
  if (cut_begin < cut_end) {
    first_item = item_at_cut(cut_begin);
    // Nothing but the overhead may be left of it.
    if (piece_begin(first_item, cut_begin) >= tiles_of_item(first_item)) ++first_item;
    if (first_item < num_present && begin_of(first_item) < cut_end) {
      num_pieces = item_at_cut(cut_end - 1) - first_item + 1;
    }
  }
  const detail::BlockScan rank_scan = detail::block_scan(num_pieces > 0 ? 1 : 0, warp_sums);
  const detail::BlockScan piece_scan = detail::block_scan(num_pieces, warp_sums);
  if (has_block) {
    memory.rank[thread] = rank_scan.before;
    memory.first_item[thread] = first_item;
    memory.first_piece[thread] = piece_scan.before;
    const auto num_tiles = [&](int i) {
      return piece_end(first_item + i, cut_end) - piece_begin(first_item + i, cut_begin);
    };
    detail::BlockDeal deal(grid.workers_per_block, memory.places + piece_scan.before, num_pieces);
    // A worker's share: what wide tiles cannot level out becomes wide, too, see deal().
    const int most_narrow = line_total / grid.num_workers();
    deal.deal(num_tiles, [&](int i) {
      return num_tiles(i) == tiles_of_item(first_item + i) && num_tiles(i) <= most_narrow;
    });
    deal.lay_out(piece_scan.before, lists.workers + thread * grid.workers_per_block);
  }
  __syncthreads();

  const auto block_at = [&](int at) {
    return detail::last_at_most(grid.num_blocks, at, [&](int b) { return memory.cut[b]; });
  };
  for (int i = thread; i < piece_scan.total; i += detail::kCutThreads) {
    const int block =
        detail::last_at_most(grid.num_blocks, i, [&](int b) { return memory.first_piece[b]; });
    const int k = memory.first_item[block] + i - memory.first_piece[block];
    Piece piece = lists.items[k];
    piece.first_tile = piece_begin(k, memory.cut[block]);
    piece.num_tiles = piece_end(k, memory.cut[block + 1]) - piece.first_tile;
    const int first_rank = memory.rank[block_at(begin_of(k))];
    const int last_rank = memory.rank[block_at(begin_of(k) + tiles_of_item(k) - 1)];
    piece.block_rank = static_cast<std::int16_t>(memory.rank[block]);
    piece.first_rank = static_cast<std::int16_t>(first_rank);
    piece.num_blocks = static_cast<std::int16_t>(last_rank - first_rank + 1);
    lists.pieces[memory.places[i]] = piece;
  }
}

/// Shared memory of cut_decode_kernel for at most `most_items` items (0: in `work`).
constexpr std::size_t cut_decode_bytes(const DecodeGrid& grid, int most_items) {
  const int of_items =
      most_items > 0 ? most_items + 1 + DecodeWork::most_pieces(most_items, grid) : 0;
  return sizeof(int) * static_cast<std::size_t>(4 * grid.num_blocks + 2 + of_items);
}

}  // namespace headwise::inline v0::cuda
