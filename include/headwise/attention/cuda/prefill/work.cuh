// SPDX-License-Identifier: MIT
/// @file work.cuh
/// Cuts the prefill work of a step with few long tiles into equal shares, on the device.
///
/// Whole tiles keep a device busy when there are many of them, or when the last to be drawn are
/// short. 512 tokens after 128k others are 64 long tiles where half of eight heads keep everything:
/// less than half of an H100's blocks. Then the tiles that are longer than an equal share of all
/// work give whole shares; what is left of them, and the short tiles, lie end to end on a line that
/// is cut into as many shares as there are blocks left. Shares of one tile begin and end where
/// those of the next one do: blocks that work side by side read the same keys, from the L2 cache.
///
/// The pieces of a tile write their sums to memory, and the last one that does puts all of them
/// together in the order of the pieces: the same batch gives the same bits.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/chunk_rule.cuh"
#include "headwise/attention/cuda/prefill/tile.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/step_state.cuh"

namespace headwise::inline v0::cuda {

/// Layers whose heads keep alike and whose tiles have as many tokens share one cut.
struct PrefillKind {
  std::int32_t num_heads = 0;              ///< KV heads
  std::int32_t tile_tokens = 0;            ///< of a tile; 0: nothing is cut
  std::int32_t group_size = 1;             ///< query heads per KV head
  std::int16_t class_idx[kMaxHeads] = {};  ///< [num_heads] in DeviceStep::classes
};

/// How much a cut makes at most, for a device of so many multiprocessors: a block on each.
struct PrefillCut {
  std::int32_t num_blocks = 0;  ///< multiprocessors
  /// Tiles of all heads; with more of them, whole ones keep the blocks busy.
  constexpr __host__ __device__ int most_tiles() const { return 4 * num_blocks; }
  /// Each cut of the line and each share of a long tile makes a piece more.
  constexpr __host__ __device__ int most_pieces() const { return most_tiles() + 2 * num_blocks; }
  /// Shares: tiles that stay whole, then one for each block.
  constexpr __host__ __device__ int most_shares() const { return most_pieces(); }
  /// Pieces of tiles that several blocks do.
  constexpr __host__ __device__ int most_parts() const { return 2 * num_blocks; }
};

namespace detail {

inline constexpr int kCutPrefillThreads = 512;
/// Keys of a piece, but for a tile's last one, are a multiple of this.
inline constexpr int kPieceKeys = 128;
/// What a piece costs besides its blocks of kPieceKeys keys, in such blocks: partial sums written
/// and read.
inline constexpr int kPieceOverhead = 2;
/// Blocks of keys that are worth a piece of their own.
inline constexpr int kLeastPiece = 4;
/// Blocks of keys that are worth a share of a tile: shorter tiles are not cut.
inline constexpr int kLeastShare = 8;

/// A piece while the cut is made.
struct CutPiece {
  std::int16_t tile;   // rank: the longest tile is 0
  std::int16_t part;   // of the tile's
  std::int16_t begin;  // in blocks of keys
  std::int16_t end;
};

/// A cut's numbers, in shared memory.
struct CutTile {
  std::int32_t chunk;
  std::int32_t tile;
};

/// Bytes of shared memory that cut_prefill_kernel() takes.
inline constexpr std::size_t cut_prefill_bytes(const PrefillCut& cut) {
  const auto tiles = static_cast<std::size_t>(cut.most_tiles());
  return tiles * (sizeof(CutTile) + 4 * sizeof(std::int32_t)) +
         static_cast<std::size_t>(cut.most_pieces()) * (sizeof(CutPiece) + 1) + 16;
}

/// Lists the tiles of the step's chunks, for one head; one warp.
/// @return how many, or -1 for more than `most`.
__device__ inline int list_tiles(const DeviceStep& step, int tile_tokens, int group_size, int most,
                                 CutTile* tiles) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int count = 0;
  for (int base = 0; base < step.header->num_chunks; base += 32) {
    const int e = base + lane;
    const int tokens =
        e < step.header->num_chunks ? static_cast<int>(step.chunks[e].num_tokens) : 0;
    const int own = is_prefilled(tokens, group_size) ? (tokens + tile_tokens - 1) / tile_tokens : 0;
    int behind = own;
    for (int d = 1; d < 32; d *= 2) {
      const int below = __shfl_up_sync(kWholeWarp, behind, static_cast<unsigned>(d));
      if (lane >= d) behind += below;
    }
    const int all = __shfl_sync(kWholeWarp, behind, 31);
    if (count + all > most) return -1;
    for (int i = 0; i < own; ++i) tiles[count + behind - own + i] = {e, i};
    count += all;
  }
  return count;
}

/// Makes the pieces of tiles of which the longest comes first; one thread.
class PieceCut {
 public:
  /// @param blocks  [num_tiles] of keys, in falling order
  /// @param pieces  [cut.most_pieces()] are made
  /// @param goes_on  [cut.most_pieces()] whether the next piece is the same share's
  /// @param parts  [num_tiles] pieces of each tile
  __device__ PieceCut(const PrefillCut& cut, const std::int32_t* blocks, int num_tiles,
                      CutPiece* pieces, std::uint8_t* goes_on, std::int32_t* parts)
      : cut_(cut),
        blocks_(blocks),
        num_tiles_(num_tiles),
        pieces_(pieces),
        goes_on_(goes_on),
        parts_(parts) {}

  /// @return how many pieces, or 0 where whole tiles do as well.
  __device__ int make() {
    // As many long tiles as there are blocks: one each, and again.
    int num_long = 0;
    while (num_long < num_tiles_ && 2 * blocks_[num_long] > blocks_[0]) ++num_long;
    const int whole = num_long / cut_.num_blocks * cut_.num_blocks;
    if (whole == num_tiles_) return 0;
    if (!choose_share(whole)) return 0;
    for (int i = 0; i < num_tiles_; ++i) parts_[i] = 0;
    for (int i = 0; i < whole; ++i) add(i, 0, blocks_[i], false);
    int shares = 0;
    for (int i = whole; i < num_tiles_ && blocks_[i] > share_; ++i) {
      const int full = shares_of(blocks_[i]);
      for (int k = 0; k < full; ++k) {
        const bool takes_rest = k + 1 == full && rest_of(blocks_[i]) == 0;
        add(i, k * length(), takes_rest ? blocks_[i] : (k + 1) * length(), false);
      }
      shares += full;
    }
    lay_rests(whole, cut_.num_blocks - shares);
    return num_pieces_;
  }

 private:
  /// Blocks of keys in a share that is one piece.
  __device__ int length() const { return share_ - kPieceOverhead; }
  /// Whole shares that a tile longer than one gives.
  __device__ int shares_of(int blocks) const { return blocks / length(); }
  /// What is left of it for the line; too little for a piece stays with its last share.
  __device__ int rest_of(int blocks) const {
    const int rest = blocks % length();
    return rest < kLeastPiece ? 0 : rest;
  }

  /// The equal share of all tiles from the `whole`th on.
  /// @return whether a tile is longer, and by so much that to cut it pays.
  __device__ bool choose_share(int whole) {
    int sum = 0;
    for (int i = whole; i < num_tiles_; ++i) sum += blocks_[i];
    int pieces = num_tiles_ - whole;
    for (int round = 0; round < 3; ++round) {  // shorter shares make more pieces
      share_ = max((sum + pieces * kPieceOverhead) / cut_.num_blocks + 1, kLeastShare);
      pieces = num_tiles_ - whole;
      for (int i = whole; i < num_tiles_ && blocks_[i] > share_; ++i) {
        pieces += shares_of(blocks_[i]) + (rest_of(blocks_[i]) > 0 ? 1 : 0) - 1;
      }
    }
    return blocks_[whole] > share_ + share_ / 64 + kPieceOverhead;
  }

  /// Lays on the line what no share has, and cuts it into `shares`; the last takes what is left.
  __device__ void lay_rests(int whole, int shares) {
    int left = share_;
    for (int i = whole; i < num_tiles_; ++i) {
      int begin = 0;
      if (blocks_[i] > share_) {
        const int rest = rest_of(blocks_[i]);
        if (rest == 0) continue;
        begin = blocks_[i] - rest;
      }
      while (begin < blocks_[i]) {
        if (left < kPieceOverhead + kLeastPiece && shares > 1) {
          goes_on_[num_pieces_ - 1] = 0;
          --shares;
          left = share_;
        }
        int end = shares > 1 ? min(blocks_[i], begin + left - kPieceOverhead) : blocks_[i];
        if (blocks_[i] - end < kLeastPiece) end = blocks_[i];
        left -= end - begin + kPieceOverhead;
        add(i, begin, end, true);
        begin = end;
      }
    }
    if (num_pieces_ > 0) goes_on_[num_pieces_ - 1] = 0;
  }

  __device__ void add(int tile, int begin, int end, bool goes_on) {
    pieces_[num_pieces_] = {static_cast<std::int16_t>(tile),
                            static_cast<std::int16_t>(parts_[tile]++),
                            static_cast<std::int16_t>(begin), static_cast<std::int16_t>(end)};
    goes_on_[num_pieces_++] = goes_on ? 1 : 0;
  }

  PrefillCut cut_;
  const std::int32_t* blocks_;
  int num_tiles_;
  CutPiece* pieces_;
  std::uint8_t* goes_on_;
  std::int32_t* parts_;
  int share_ = 0;  ///< blocks of keys, kPieceOverhead for each piece included
  int num_pieces_ = 0;
};

}  // namespace detail

/// Cuts the step's prefill work for each kind of layer; a block a kind.
template <class = void>  // inline does not hold for kernels
__global__ void __launch_bounds__(detail::kCutPrefillThreads)
    cut_prefill_kernel(const __grid_constant__ DeviceStep step, const PrefillKind* kinds,
                       const PrefillWork* all_work, PrefillCut cut) {
  using namespace detail;
  extern __shared__ __align__(16) std::byte cut_memory[];
  __shared__ int num_listed;
  __shared__ int num_pieces;
  const int most = cut.most_tiles();
  auto* tiles = reinterpret_cast<CutTile*>(cut_memory);          // [most] of one head
  auto* blocks = reinterpret_cast<std::int32_t*>(tiles + most);  // [most] of each tile and head
  auto* order = blocks + most;                                   // [most] the longest first
  auto* in_order = order + most;                                 // [most] their blocks
  auto* parts = in_order + most;                                 // [most] in that order
  auto* pieces = reinterpret_cast<CutPiece*>(parts + most);      // [most_pieces]
  auto* goes_on = reinterpret_cast<std::uint8_t*>(pieces + cut.most_pieces());
  wait_for_previous();
  const PrefillKind& kind = kinds[blockIdx.x];
  const PrefillWork work = all_work[blockIdx.x];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 32) {
    const int listed = kind.tile_tokens > 0 ? list_tiles(step, kind.tile_tokens, kind.group_size,
                                                         most / kind.num_heads, tiles)
                                            : -1;
    if (thread == 0) num_listed = listed;
  }
  __syncthreads();
  const int of_head = num_listed;
  const int num_tiles = of_head * kind.num_heads;
  if (num_tiles <= 0) {
    if (thread == 0) *work.num_shares = 0;
    return;
  }
  int longest = 0;
  for (int i = thread; i < num_tiles; i += kCutPrefillThreads) {
    // The last tokens first, as they see most.
    const CutTile tile = tiles[of_head - 1 - i % of_head];
    const ChunkState chunk = step.chunks[tile.chunk];
    const ClassState state =
        step.classes[tile.chunk * step.num_classes + kind.class_idx[i / of_head]];
    const int first = tile.tile * kind.tile_tokens;
    const KeyList keys = list_keys(
        chunk, state, first, min(kind.tile_tokens, static_cast<int>(chunk.num_tokens) - first));
    blocks[i] = (keys.count + kPieceKeys - 1) / kPieceKeys;
    longest = max(longest, blocks[i]);
  }
  // A piece's ends are 16-bit numbers: 4 million keys.
  if (__syncthreads_or(longest > kLeastShare) == 0 || __syncthreads_or(longest > 32000) != 0) {
    if (thread == 0) *work.num_shares = 0;
    return;
  }
  for (int i = thread; i < num_tiles; i += kCutPrefillThreads) {
    int rank = 0;
    for (int j = 0; j < num_tiles; ++j) {
      rank += blocks[j] > blocks[i] || (blocks[j] == blocks[i] && j < i) ? 1 : 0;
    }
    order[rank] = i;
    in_order[rank] = blocks[i];
  }
  __syncthreads();
  if (thread == 0) {
    num_pieces = PieceCut(cut, in_order, num_tiles, pieces, goes_on, parts).make();
    // Where the tiles' parts begin takes the place of their blocks, which are in order now.
    int first_part = 0;
    for (int i = 0; i < num_tiles; ++i) {
      blocks[i] = first_part;
      if (num_pieces > 0 && parts[i] > 1) first_part += parts[i];
    }
    int shares = 0;
    if (first_part > cut.most_parts()) num_pieces = 0;
    for (int p = 0; p < num_pieces; ++p) {
      if (p == 0 || goes_on[p - 1] == 0) work.first_piece[shares++] = p;
    }
    *work.num_shares = shares;
  }
  __syncthreads();
  for (int p = thread; p < num_pieces; p += kCutPrefillThreads) {
    const CutPiece of_tile = pieces[p];
    const int i = order[of_tile.tile];
    const CutTile tile = tiles[of_head - 1 - i % of_head];
    TilePiece piece;
    piece.chunk = tile.chunk;
    piece.tile = tile.tile;
    piece.head = i / of_head;
    piece.begin_key = of_tile.begin * kPieceKeys;
    piece.end_key = of_tile.end * kPieceKeys;  // the tile's keys end before, perhaps
    piece.first_part = blocks[of_tile.tile];
    piece.part = of_tile.part;
    piece.num_parts = static_cast<std::int16_t>(parts[of_tile.tile]);
    piece.goes_on = goes_on[p];
    work.pieces[p] = piece;
  }
}

}  // namespace headwise::inline v0::cuda
