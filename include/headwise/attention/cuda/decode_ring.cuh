// SPDX-License-Identifier: MIT
/// @file decode_ring.cuh
/// The copying half of a decode warp: which tiles it reads, and their way to shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "headwise/attention/cuda/decode_args.cuh"
#include "headwise/attention/cuda/decode_tile.cuh"
#include "headwise/attention/cuda/decode_work.cuh"
#include "headwise/attention/cuda/tensor_core.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/step_state.cuh"

namespace headwise::inline v0::cuda::detail {

/// What a warp needs to know of a tile: one register, several tiles are on their way.
struct TileSource {
  std::uint32_t bits = 0;  ///< 0: there is no such tile

  /// @param low, high  rows [low, high) of the tile exist and are seen; none: nothing is copied.
  /// @param is_new  whether the step's own row is among them.
  static __device__ TileSource of(int tile_of_page, int low, int high, bool is_new) {
    return {
        static_cast<std::uint32_t>(low | high << 5 | tile_of_page << 10 | (is_new ? kIsNew : 0))};
  }
  __device__ int low() const { return static_cast<int>(bits & 31U); }
  __device__ int high() const { return static_cast<int>(bits >> 5 & 31U); }
  __device__ int row_in_page() const { return static_cast<int>(bits >> 10 & 3U) * kTileRows; }
  __device__ bool is_empty() const { return low() >= high(); }
  __device__ bool is_new() const { return (bits & kIsNew) != 0; }
  __device__ bool ends_piece() const { return (bits & kEndsPiece) != 0; }

  static constexpr unsigned kIsNew = 1U << 12;
  static constexpr unsigned kEndsPiece = 1U << 13;
};
static_assert(kPageTokens / kTileRows == 4);

/// A warp's work and what it reads ahead of it, in shared memory.
///
/// While all multiprocessors stream rows a load takes as long as a row: microseconds. So what the
/// next tiles and items need is copied asynchronously, together with rows, and is there with them.
struct WarpLists {
  /// Whole items copied ahead of the one that the walk opens: what is copied with one tile is there
  /// kDecodeStages - 1 tiles later.
  static constexpr int kItemsAhead = kDecodeStages;
  /// Room for those and for the items whose tiles are on their way, 2 (kDecodeStages - 1) at most.
  static constexpr int kItems = 8;
  static_assert(kItems > 2 * (kDecodeStages - 1) + 1 + kItemsAhead);
  /// Page numbers on their way or in use; a power of two.
  static constexpr int kPages = 2;
  static_assert(kPages >= kDecodeStages);
  static constexpr int kPieceChunks = sizeof(Piece) / 16;

  WarpWork work;
  Piece items[kItems];         ///< whole item i of the warp lies at i % kItems
  std::int32_t pages[kPages];  ///< tile j's page lies at j % kPages

  __device__ const Piece& item(int i) const { return items[i % kItems]; }

  /// Reads the work and its first items; they are there for the whole warp on return.
  __device__ void load(const DecodeWork& lists, int warp_idx) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    constexpr int kWorkChunks = sizeof(WarpWork) / 16;
    static_assert(kWorkChunks <= 32 && kItemsAhead * kPieceChunks <= 32);
    if (lane < kWorkChunks) {
      reinterpret_cast<uint4*>(&work)[lane] =
          reinterpret_cast<const uint4*>(lists.warps + warp_idx)[lane];
    }
    __syncwarp();
    if (lane < min(work.num_whole, kItemsAhead) * kPieceChunks) {
      reinterpret_cast<uint4*>(items)[lane] =
          reinterpret_cast<const uint4*>(lists.items + work.first_whole)[lane];
    }
    __syncwarp();
  }
  /// Starts to copy whole item i, if there is one.
  __device__ void copy_item(const DecodeWork& lists, int i) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (i < work.num_whole && lane < kPieceChunks) {
      copy_async_16(shared_address(items + i % kItems) + lane * 16,
                    reinterpret_cast<const uint4*>(lists.items + work.first_whole + i) + lane);
    }
  }
};

/// Walks over a warp's tiles in order: the part at its head, whole items, the part at its tail.
class TileWalk {
 public:
  __device__ TileWalk(const DecodeArgs& args, WarpLists& lists) : args_(args), lists_(lists) {
    open_next();
  }

  /// A tile and where its page's number is; null for none.
  struct Place {
    TileSource tile;
    const std::int32_t* page = nullptr;
  };
  __device__ Place next() {
    Place place;
    if (left_ == 0) return place;
    const int offset = round_ * width_ + column_;
    if (offset < tiles_) {
      const int tiles0 = tiles_of(slot_begin_[0], slot_end_[0]);
      const int index = base_ + offset;
      const bool second = index >= tiles0;
      const int begin = second ? slot_begin_[1] : slot_begin_[0];
      const int end = second ? slot_end_[1] : slot_end_[0];
      const int slot_tile = begin / kTileRows + (second ? index - tiles0 : index);
      const int first_slot = slot_tile * kTileRows;
      place.tile = TileSource::of(slot_tile % 4, max(begin - first_slot, 0),
                                  min(end - first_slot, kTileRows), slot_tile == new_tile_);
      place.page = table_ + first_slot / kPageTokens;
    }
    if (--left_ == 0) {
      place.tile.bits |= TileSource::kEndsPiece;
      open_next();
    } else if (++column_ >= columns_end()) {
      to_round(round_ + 1);
    }
    return place;
  }

 private:
  // In each round a piece has the columns from its first position's on, less that one before the
  // first position's round; likewise up to its last position's.
  __device__ int columns_begin() const { return first_column_ + (round_ < first_round_ ? 1 : 0); }
  __device__ int columns_end() const { return last_column_ + (round_ < last_round_ ? 1 : 0); }

  /// The next piece that is not empty, if there is one.
  __device__ void open_next() {
    const WarpWork& work = lists_.work;
    const Piece* piece = &work.head;
    if (began_ || work.head.count == 0) {
      if (opened_ > work.num_whole) return;
      piece = opened_ < work.num_whole ? &lists_.item(opened_) : &work.tail;
      lists_.copy_item(args_.work, opened_ + WarpLists::kItemsAhead);
      ++opened_;
    }
    began_ = true;
    open(*piece);
  }

  __device__ void open(const Piece& piece) {
    table_ = args_.step.page_table + piece.table + args_.table_offset;
    for (int r = 0; r < 2; ++r) {
      slot_begin_[r] = piece.slot_begin[r];
      slot_end_[r] = piece.slot_end[r];
    }
    new_tile_ = piece.new_slot / kTileRows;
    base_ = piece.base;
    tiles_ = piece.tiles;
    width_ = piece.width;
    left_ = piece.count;
    first_column_ = piece.first_column;
    first_round_ = piece.first_round;
    last_column_ = piece.last_column;
    last_round_ = piece.last_round;
    to_round(0);
  }

  /// Goes to the first round from `round` on in which the warp has a tile.
  __device__ void to_round(int round) {
    // In one column none is before its first position; with two, none is between the end of the
    // second one's part and the start of the first one's.
    const bool one_column = last_column_ == first_column_;
    const bool two_columns = last_column_ == first_column_ + 1;
    if (one_column || (two_columns && round >= last_round_)) round = max(round, first_round_);
    round_ = round;
    column_ = columns_begin();
  }

  const DecodeArgs& args_;
  WarpLists& lists_;
  const std::int32_t* table_ = nullptr;
  int slot_begin_[2] = {};
  int slot_end_[2] = {};
  int new_tile_ = 0;
  int base_ = 0;
  int tiles_ = 0;
  int width_ = 1;
  int first_column_ = 0;
  int first_round_ = 0;
  int last_column_ = 0;
  int last_round_ = 0;
  int round_ = 0;
  int column_ = 0;
  int left_ = 0;
  bool began_ = false;
  int opened_ = 0;  // whole items, and the tail
};

/// A warp's ring of tiles. The number of a tile's page is copied kAhead tiles before its rows, and
/// these kAhead tiles before their use.
///
/// Copies begin while the stream's former kernel still runs: rows of former steps are there. A tile
/// with the step's own row is copied only after that kernel, which may be the one that appends it.
template <int kDim>
class TileRing {
 public:
  static constexpr int kAhead = kDecodeStages - 1;
  /// Calls of next() before the first tile.
  static constexpr int kLead = 2 * kAhead;

  __device__ TileRing(const DecodeArgs& args, WarpLists& lists, std::byte* memory)
      : args_(args), lists_(lists), walk_(args, lists), memory_(shared_address(memory)) {}

  /// Waits for the stream's former kernel, once.
  __device__ void start_after_append() {
    if (!waited_) wait_for_previous();
    waited_ = true;
  }

  /// The next tile, as the warp that copied it sees it. The first kLead of them are empty.
  struct Tile {
    std::uint32_t at = 0;  ///< shared-memory address of TileLayout's rows
    TileSource source;
  };
  __device__ Tile next() {
    wait_copies<kAhead - 1>();
    __syncwarp();  // every lane's copies have landed, and the tile before is no longer read
    const Tile tile{memory_ + static_cast<std::uint32_t>(stage_ * TileLayout<kDim>::kBytes),
                    sources_[0]};
    const int free_stage = stage_ == 0 ? kDecodeStages - 1 : stage_ - 1;
    stage_ = stage_ + 1 == kDecodeStages ? 0 : stage_ + 1;
#pragma unroll
    for (int i = 0; i + 1 < kLead; ++i) sources_[i] = sources_[i + 1];
    const std::int32_t page =
        lists_.pages[(count_ + WarpLists::kPages - kAhead) % WarpLists::kPages];
    copy(sources_[kAhead - 1], page, free_stage);
    const TileWalk::Place chosen = walk_.next();
    sources_[kLead - 1] = chosen.tile;
    if (chosen.page != nullptr && threadIdx.x % 32 == 0) {
      copy_async_4(shared_address(lists_.pages + count_ % WarpLists::kPages), chosen.page);
    }
    commit_copies();
    ++count_;
    return tile;
  }

 private:
  /// Starts the copy of a tile into `stage`; rows that do not exist are read from one that does, so
  /// that what is multiplied by zero is a number.
  __device__ void copy(TileSource tile, std::int32_t page, int stage) {
    if (!tile.is_empty()) {
      if (tile.is_new()) start_after_append();
      const auto* k_rows =
          reinterpret_cast<const std::uint16_t*>(args_.step.pages + static_cast<std::size_t>(page) *
                                                                        args_.step.page_bytes) +
          tile.row_in_page() * kDim;
      const std::uint32_t to =
          memory_ + static_cast<std::uint32_t>(stage * TileLayout<kDim>::kBytes);
      if (tile.low() == 0 && tile.high() == kTileRows) {
        copy_rows<true>(k_rows, to, tile);
      } else {
        copy_rows<false>(k_rows, to, tile);
      }
    }
  }

  template <bool kWhole>
  __device__ void copy_rows(const std::uint16_t* k_rows, std::uint32_t to, TileSource tile) {
    constexpr int kChunks = kDim / 8;  // of 16 bytes in a row
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int low = tile.low();
    const int last = tile.high() - 1;
#pragma unroll(kWhole ? kTileRows : 1)  // partial tiles are rare
    for (int i = 0; i < kTileRows * kChunks / 32; ++i) {
      const int row = (lane + 32 * i) / kChunks;
      const int chunk = (lane + 32 * i) % kChunks;
      const int from_row = kWhole ? row : min(max(row, low), last);
      const std::uint16_t* from = k_rows + from_row * kDim + chunk * 8;
      const std::uint32_t at = to + TileLayout<kDim>::at(row, chunk);
      copy_async_16_once(at, from, read_once_);
      copy_async_16_once(at + kTileRows * TileLayout<kDim>::kRowBytes, from + kPageTokens * kDim,
                         read_once_);
    }
  }

  const DecodeArgs& args_;
  WarpLists& lists_;
  TileWalk walk_;
  std::uint32_t memory_;
  std::uint64_t read_once_ = read_once_policy();
  TileSource sources_[kLead];  // tiles not used yet, the first half of them copied
  int stage_ = (kDecodeStages - kLead % kDecodeStages) % kDecodeStages;  // tile 0 in stage 0
  int count_ = 0;
  bool waited_ = false;
};

}  // namespace headwise::inline v0::cuda::detail
