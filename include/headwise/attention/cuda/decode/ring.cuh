// SPDX-License-Identifier: MIT
/// @file ring.cuh
/// The copying half of a decode warp: which tiles it reads, and their way to shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/decode/args.cuh"
#include "headwise/attention/cuda/decode/tile.cuh"
#include "headwise/attention/cuda/decode/work.cuh"
#include "headwise/attention/cuda/ptx/tensor_core.cuh"
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
/// next tiles and pieces need is copied asynchronously, together with rows, and is there with them.
struct WarpLists {
  /// Pieces copied ahead of the one that the walk opens: what is copied with one tile is there
  /// kDecodeStages - 1 tiles later.
  static constexpr int kPiecesAhead = kDecodeStages;
  /// Room for those and for the pieces whose tiles are on their way, 2 (kDecodeStages - 1) at most.
  static constexpr int kPieces = 8;
  static_assert(kPieces > 2 * (kDecodeStages - 1) + 1 + kPiecesAhead);
  /// Page numbers on their way or in use; a power of two.
  static constexpr int kPages = 2;
  static_assert(kPages >= kDecodeStages);
  static constexpr int kPieceChunks = sizeof(Piece) / 16;

  WarpWork work;
  Piece pieces[kPieces];       ///< the warp's piece i lies at i % kPieces
  std::int32_t pages[kPages];  ///< tile j's page lies at j % kPages

  __device__ const Piece& piece(int i) const { return pieces[i % kPieces]; }

  /// Reads the work and the first pieces; they are there for the whole warp on return.
  __device__ void load(const DecodeWork& lists, int warp_idx) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    constexpr int kWorkChunks = sizeof(WarpWork) / 16;
    static_assert(kWorkChunks <= 32 && kPiecesAhead * kPieceChunks <= 32);
    if (lane < kWorkChunks) {
      reinterpret_cast<uint4*>(&work)[lane] =
          reinterpret_cast<const uint4*>(lists.warps + warp_idx)[lane];
    }
    __syncwarp();
    const int first = lane / kPieceChunks;
    if (first < min(work.num_pieces(), kPiecesAhead)) {
      reinterpret_cast<uint4*>(pieces)[lane] =
          reinterpret_cast<const uint4*>(lists.pieces + place_of(first))[lane % kPieceChunks];
    }
    __syncwarp();
  }
  /// Starts to copy piece i, if there is one.
  __device__ void copy_piece(const DecodeWork& lists, int i) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (i < work.num_pieces() && lane < kPieceChunks) {
      copy_async_16(shared_address(pieces + i % kPieces) + lane * 16,
                    reinterpret_cast<const uint4*>(lists.pieces + place_of(i)) + lane);
    }
  }

 private:
  __device__ int place_of(int i) const {
    return i < work.num_narrow ? work.first_narrow + i : work.first_wide + (i - work.num_narrow);
  }
};

/// The tiles that fall to one warp of those that take turns: one to each, in rounds; a warp takes
/// part from its first round on. Tiles are numbered through all pieces.
class Turns {
 public:
  /// @param first_round  each lane's: that of warp `lane`; kNever where there is none.
  __device__ Turns(int first_round, int warp)
      : first_round_(first_round), lower_warps_((1U << warp) - 1) {
    round_ = __shfl_sync(kWholeWarp, first_round, warp);
    given_ = static_cast<int>(
        __reduce_add_sync(kWholeWarp, static_cast<unsigned>(max(round_ - first_round_, 0))));
    taking_part_ = __ballot_sync(kWholeWarp, first_round_ <= round_);
  }
  static constexpr int kNever = 0x7FFFFFFF;

  /// The warp's tile.
  __device__ int tile() const { return given_ + __popc(taking_part_ & lower_warps_); }
  /// On to the next round.
  __device__ void advance() {
    given_ += __popc(taking_part_);
    taking_part_ = __ballot_sync(kWholeWarp, first_round_ <= ++round_);
  }

 private:
  int first_round_;
  unsigned lower_warps_;
  int round_;
  int given_;  // tiles of all former rounds
  unsigned taking_part_;
};

/// Walks over a warp's tiles in order: its narrow pieces, then its turns in the wide ones.
class TileWalk {
 public:
  __device__ TileWalk(const DecodeArgs& args, WarpLists& lists)
      : args_(args),
        lists_(lists),
        first_round_(first_round_of_lane(args.work)),
        turns_(threadIdx.x % 32 == 0 ? 0 : Turns::kNever, 0) {  // a narrow piece's are all its own
    open_next();
  }

  /// A tile and where its page's number is; null for none.
  struct Place {
    TileSource tile;
    const std::int32_t* page = nullptr;
  };
  /// Where the warp has no tile of a piece, that is empty, too, and ends the piece.
  __device__ Place next() {
    Place place;
    if (opened_ > lists_.work.num_pieces()) return place;
    if (turns_.tile() < end_) {
      const int tiles0 = tiles_of(slot_begin_[0], slot_end_[0]);
      const int index = first_tile_ + turns_.tile();
      const bool second = index >= tiles0;
      const int begin = second ? slot_begin_[1] : slot_begin_[0];
      const int end = second ? slot_end_[1] : slot_end_[0];
      const int slot_tile = begin / kTileRows + (second ? index - tiles0 : index);
      const int first_slot = slot_tile * kTileRows;
      place.tile = TileSource::of(slot_tile % 4, max(begin - first_slot, 0),
                                  min(end - first_slot, kTileRows), slot_tile == new_tile_);
      place.page = table_ + first_slot / kPageTokens;
      turns_.advance();
    }
    if (turns_.tile() >= end_) {
      place.tile.bits |= TileSource::kEndsPiece;
      open_next();
    }
    return place;
  }

 private:
  static __device__ int first_round_of_lane(const DecodeWork& work) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return lane < num_workers()
               ? work.warps[static_cast<int>(blockIdx.x) * num_workers() + lane].first_round
               : Turns::kNever;
  }

  __device__ void open_next() {
    if (opened_ == lists_.work.num_narrow) {
      turns_ = Turns(first_round_, static_cast<int>(threadIdx.x / 32));
      end_ = 0;
    }
    if (opened_ < lists_.work.num_pieces()) {
      open(lists_.piece(opened_));
      lists_.copy_piece(args_.work, opened_ + WarpLists::kPiecesAhead);
    }
    ++opened_;
  }

  __device__ void open(const Piece& piece) {
    table_ = args_.step.page_table + piece.table +
             static_cast<std::int64_t>(args_.idx_in_class[piece.kv_head]) * piece.head_stride;
    for (int r = 0; r < 2; ++r) {
      slot_begin_[r] = piece.slot_begin[r];
      slot_end_[r] = piece.slot_end[r];
    }
    new_tile_ = piece.new_slot / kTileRows;
    first_tile_ = piece.first_tile - end_;
    end_ += piece.num_tiles;
  }

  const DecodeArgs& args_;
  WarpLists& lists_;
  int first_round_;  // of the warp that has the lane's number
  Turns turns_;
  const std::int32_t* table_ = nullptr;
  int slot_begin_[2] = {};
  int slot_end_[2] = {};
  int new_tile_ = 0;
  int first_tile_ = 0;  // of the piece, in the item, less the number that the turns give it
  int end_ = 0;         // the number after the piece's last tile
  int opened_ = 0;      // pieces; one more than there are at the end
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
                                                                        args_.step.page_stride) +
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
