// SPDX-License-Identifier: MIT
/// @file ring.cuh
/// The copying half of a decode worker: which tiles it reads, and their way to shared memory.
#pragma once

#include <cuda_runtime.h>

#include <concepts>
#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/decode/args.cuh"
#include "headwise/attention/cuda/decode/tile.cuh"
#include "headwise/attention/cuda/decode/work.cuh"
#include "headwise/attention/cuda/ptx/tensor_core.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/elements.cuh"
#include "headwise/cache/cuda/step_state.cuh"

namespace headwise::inline v0::cuda::detail {

/// What a worker needs to know of a tile: one register, several tiles are on their way.
struct TileSource {
  std::uint32_t bits = 0;  ///< 0: there is no such tile

  /// @param low, high  rows [low, high) of the tile exist and are seen; none: nothing is copied.
  static __device__ TileSource of(int low, int high) {
    return {static_cast<std::uint32_t>(low | high << 7)};
  }
  /// @param first_slot  of the tile's row 0
  static __device__ TileSource of_slots(int low, int high, int first_slot) {
    return {of(low, high).bits | static_cast<std::uint32_t>(first_slot % kPageTokens / 16)
                                     << kPageShift};
  }
  __device__ int low() const { return static_cast<int>(bits & 127U); }
  __device__ int high() const { return static_cast<int>(bits >> 7 & 127U); }
  __device__ bool is_empty() const { return low() >= high(); }
  /// Of the tile's row 0.
  __device__ int row_in_page() const { return static_cast<int>(bits >> 14 & 3U) * 16; }
  __device__ bool has(std::uint32_t flag) const { return (bits & flag) != 0; }

  static constexpr int kPageShift = 14;
  static constexpr std::uint32_t kIsNew = 1U << 16;      ///< the step's own row is among them
  static constexpr std::uint32_t kEndsPiece = 1U << 17;  ///< of the worker's tiles the last
  static constexpr std::uint32_t kOwn = 1U << 18;     ///< rows of the step's k and v, not of a page
  static constexpr std::uint32_t kRagged = 1U << 19;  ///< queries see different rows
  static constexpr std::uint32_t kSlots = 1U << 20;  ///< the position of row 0 is given as its slot
};
static_assert(kPageTokens == 64);

/// The tiles that fall to one worker of those that take turns: one to each, in rounds; a worker
/// takes part from its first round on. Tiles are numbered through all pieces. What a lane knows is
/// the first round of the worker that has its number.
struct Turns {
  static constexpr int kNever = 0x7FFFFFFF;

  /// In DecodeWork; kNever where the block has no such worker.
  static __device__ int first_round_of(const DecodeWork& work, int worker, int num_workers) {
    return worker < num_workers
               ? work.workers[static_cast<int>(blockIdx.x) * num_workers + worker].first_round
               : kNever;
  }
  /// @param first_round  each lane's
  static __device__ Turns of(int first_round, int worker) {
    Turns turns;
    turns.round = __shfl_sync(kWholeWarp, first_round, worker);
    turns.given = static_cast<int>(
        __reduce_add_sync(kWholeWarp, static_cast<unsigned>(max(turns.round - first_round, 0))));
    turns.taking_part = __ballot_sync(kWholeWarp, first_round <= turns.round);
    return turns;
  }

  /// The worker's tile.
  __device__ int tile(int worker) const {
    return given + __popc(taking_part & ((1U << worker) - 1));
  }
  /// On to the next round.
  __device__ void advance(int first_round) {
    given += __popc(taking_part);
    taking_part = __ballot_sync(kWholeWarp, first_round <= ++round);
  }

  int round = 0;
  int given = 0;  ///< tiles of all former rounds
  unsigned taking_part = 0;
};

/// Where a walk is.
struct WalkState {
  const std::int32_t* table = nullptr;  ///< of the piece's head
  Turns turns;
  std::int32_t own_tile = -1;   ///< of slots, with a single token's own row
  std::int32_t first_tile = 0;  ///< of the piece, in the item, less the number the turns give it
  std::int32_t end = 0;         ///< the number after the piece's last tile
  std::int32_t opened = 0;      ///< pieces; one more than there are at the end
};

/// A worker's work and what it reads ahead of it, in shared memory.
///
/// While all multiprocessors stream rows a load takes as long as a row: microseconds. So what the
/// next tiles and pieces need is copied asynchronously, together with rows, and is there with them.
template <class Size>
struct WorkerLists {
  /// Pieces copied ahead of the one that the walk opens: what is copied with one tile is there
  /// kDecodeStages - 1 tiles later.
  static constexpr int kPiecesAhead = kDecodeStages;
  /// Room for those and for the pieces whose tiles are on their way, 2 (kDecodeStages - 1) at most.
  static constexpr int kPieces = 8;
  static_assert(kPieces > 2 * (kDecodeStages - 1) + 1 + kPiecesAhead);
  /// Page numbers on their way or in use; a power of two.
  static constexpr int kPages = 2;
  static_assert(kPages >= kDecodeStages);
  /// Tiles chosen and not used yet; a power of two.
  static constexpr int kTiles = 4;
  static_assert(kTiles > 2 * (kDecodeStages - 1));
  static constexpr int kPieceChunks = sizeof(Piece) / 16;

  WorkerWork work;
  Piece pieces[kPieces];          ///< the worker's piece i lies at i % kPieces
  std::int32_t pages[kPages];     ///< tile j's page lies at j % kPages
  std::int32_t piece_of[kPages];  ///< and the piece of one with own rows
  // Where chunks come, registers are scarce: what only the walk and the copies need lies here.
  TileSource tiles[kTiles];                 ///< tile j at j % kTiles
  std::int32_t positions[kTiles];           ///< of tile j's row 0, likewise, see Place
  WalkState walk;                           ///< of the walk, between two tiles
  std::int32_t first_rounds[kMostWorkers];  ///< of the block's workers

  __device__ const Piece& piece(int i) const { return pieces[i % kPieces]; }

  /// Reads the work and the first pieces; they are there for the whole worker on return.
  __device__ void load(const DecodeWork& lists, int worker_idx) {
    const int lane = Size::thread();
    constexpr int kWorkChunks = sizeof(WorkerWork) / 16;
    static_assert(kWorkChunks <= 32 && kPiecesAhead * kPieceChunks <= 32);
    if (lane < kWorkChunks) {
      reinterpret_cast<uint4*>(&work)[lane] =
          reinterpret_cast<const uint4*>(lists.workers + worker_idx)[lane];
    }
    if constexpr (Size::kChunks) {
      if (lane < kTiles) tiles[lane] = {};
      if (lane < kMostWorkers) {
        first_rounds[lane] = Turns::first_round_of(lists, lane, Size::num_workers());
      }
    }
    Size::meet();
    const int first = lane / kPieceChunks;
    if (first < min(work.num_pieces(), kPiecesAhead)) {
      reinterpret_cast<uint4*>(pieces)[lane] =
          reinterpret_cast<const uint4*>(lists.pieces + place_of(first))[lane % kPieceChunks];
    }
    Size::meet();
  }
  /// Starts to copy piece i, if there is one.
  /// @param lane  of the one warp that does so
  __device__ void copy_piece(const DecodeWork& lists, int i, int lane) {
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

/// Walks over a worker's tiles in order: its narrow pieces, then its turns in the wide ones. All
/// threads that walk do so alike.
template <class Size>
class TileWalk {
 public:
  using Lists = WorkerLists<Size>;

  /// A tile and where its page's number is; null for none.
  struct Place {
    TileSource tile;
    const std::int32_t* page = nullptr;
    std::int32_t piece = 0;     ///< of a tile with own rows
    std::int32_t position = 0;  ///< of a ragged tile's row 0; of any tile's where scores need it
  };

  /// From the beginning.
  /// @param first_round  Turns' of the lane
  __device__ TileWalk(const DecodeArgs& args, Lists& lists, int first_round)
      : args_(args), lists_(lists), first_round_(first_round) {
    at_.turns = Turns::of(round_of_lane(), 0);
    open_next();
  }
  /// From where another one was.
  __device__ TileWalk(const DecodeArgs& args, Lists& lists, int first_round, const WalkState& at)
      : args_(args), lists_(lists), first_round_(first_round), at_(at) {
    if constexpr (!Size::kChunks) open_runs(lists_.piece(at_.opened - 1));
  }
  __device__ const WalkState& state() const { return at_; }

  /// Where the worker has no tile of a piece, that is empty, too, and ends the piece.
  __device__ Place next() {
    Place place;
    if (at_.opened > lists_.work.num_pieces()) return place;
    if (tile() < at_.end) {
      const int index = at_.first_tile + tile();
      if constexpr (Size::kChunks) {
        choose_of_chunk(index, place);
      } else {
        choose(index, place);
      }
      at_.turns.advance(round_of_lane());
    }
    if (tile() >= at_.end) {
      place.tile.bits |= TileSource::kEndsPiece;
      open_next();
    }
    return place;
  }

 private:
  static constexpr int kTileRows = Size::kTileRows;
  static constexpr bool kNeedsPositions = Size::Softmax::kShapesScores;  // of all tiles
  static constexpr std::uint32_t kSlots = kNeedsPositions ? TileSource::kSlots : 0;

  /// Whether the open piece is wide: a narrow one's tiles are all its worker's.
  __device__ bool is_wide() const { return at_.opened > lists_.work.num_narrow; }
  __device__ int round_of_lane() const {
    return is_wide() ? first_round_ : threadIdx.x % 32 == 0 ? 0 : Turns::kNever;
  }
  __device__ int tile() const { return at_.turns.tile(is_wide() ? Size::worker() : 0); }

  /// Tile `index` of the rows that a single token sees.
  __device__ void choose(int index, Place& place) const {
    const int tiles0 = tiles_of(slot_begin_[0], slot_end_[0], kTileRows);
    const bool second = index >= tiles0;
    place.position =
        choose_slots(second ? slot_begin_[1] : slot_begin_[0], second ? slot_end_[1] : slot_end_[0],
                     second ? index - tiles0 : index, place);
    place.tile.bits |= kSlots;
  }
  /// Tile `index` of the rows that some of several tokens see.
  __device__ void choose_of_chunk(int index, Place& place) const {
    const Piece& piece = lists_.piece(at_.opened - 1);
#pragma unroll
    for (int r = 0; r < 3; ++r) {
      const int tiles = tiles_of(piece.slot_begin[r], piece.slot_end[r], kTileRows);
      if (index < tiles) {
        const int first_slot = choose_slots(piece.slot_begin[r], piece.slot_end[r], index, place);
        if constexpr (kNeedsPositions) {
          if (r == 0 || piece.own_rows == 0) {
            place.position = first_slot;
            place.tile.bits |= kSlots;
            return;
          }
        }
        if (r == 0) return;
        place.position = first_slot + piece.position[r - 1];
        if (place.position + place.tile.low() < piece.num_tokens - piece.recent) {
          place.tile.bits |= TileSource::kRagged;  // the last token does not see all of it
        }
        return;
      }
      index -= tiles;
    }
    const int first = index * kTileRows;
    place.tile = TileSource::of(0, min(piece.own_rows - first, kTileRows));
    place.tile.bits |= TileSource::kOwn | TileSource::kRagged;
    place.position = first;
    place.piece = at_.opened - 1;
  }
  /// Tile `index` of a run of slots.
  /// @return the slot of the tile's row 0.
  __device__ int choose_slots(int begin, int end, int index, Place& place) const {
    const int slot_tile = begin / kTileRows + index;
    const int first_slot = slot_tile * kTileRows;
    place.tile = TileSource::of_slots(max(begin - first_slot, 0), min(end - first_slot, kTileRows),
                                      first_slot);
    if (slot_tile == at_.own_tile) {
      place.tile.bits |= TileSource::kIsNew;
      place.piece = at_.opened - 1;
    }
    place.page = at_.table + first_slot / kPageTokens;
    return first_slot;
  }

  __device__ void open_next() {
    const int next = at_.opened++;
    if (next == lists_.work.num_narrow) {
      at_.turns = Turns::of(first_round_, Size::worker());
      at_.end = 0;
    }
    if (next >= lists_.work.num_pieces()) return;
    const Piece& piece = lists_.piece(next);
    at_.table = args_.step.page_table + piece.table +
                static_cast<std::int64_t>(args_.idx_in_class[piece.kv_head]) * piece.head_stride;
    at_.own_tile = piece.own_rows > 0 ? -1 : piece.own_slot / kTileRows;
    at_.first_tile = piece.first_tile - at_.end;
    at_.end += piece.num_tiles;
    if constexpr (!Size::kChunks) open_runs(piece);
    lists_.copy_piece(args_.work, next + Lists::kPiecesAhead, Size::lane());
  }
  __device__ void open_runs(const Piece& piece) {
    for (int r = 0; r < 2; ++r) {
      slot_begin_[r] = piece.slot_begin[r];
      slot_end_[r] = piece.slot_end[r];
    }
  }

  const DecodeArgs& args_;
  Lists& lists_;
  int first_round_;
  WalkState at_;
  int slot_begin_[2] = {};  // of a single token's piece
  int slot_end_[2] = {};
};

/// Chooses a worker's tiles one by one and keeps them until they are used: in registers, all
/// threads alike, or where chunks come in shared memory, the first warp for all.
template <class Size>
class TileChooser {
 public:
  using Lists = WorkerLists<Size>;

  __device__ TileChooser(const DecodeArgs& args, Lists& lists)
      : walk_(args, lists,
              Turns::first_round_of(args.work, static_cast<int>(threadIdx.x % 32),
                                    Size::num_workers())) {}

  /// The tile chosen `ago` calls of choose() ago, `count` calls in all; one that was not is empty.
  __device__ TileSource source(const Lists&, int, int ago) const { return tiles_[kKept - ago]; }
  /// Chooses the next tile and starts to copy its page's number.
  __device__ void choose(const DecodeArgs&, Lists& lists, int count) {
    const typename TileWalk<Size>::Place chosen = walk_.next();
#pragma unroll
    for (int i = 0; i + 1 < kKept; ++i) tiles_[i] = tiles_[i + 1];
    tiles_[kKept - 1] = chosen.tile;
    if (chosen.page != nullptr && Size::thread() == 0) {
      copy_async_4(shared_address(lists.pages + count % Lists::kPages), chosen.page);
      if (chosen.tile.has(TileSource::kIsNew)) lists.piece_of[count % Lists::kPages] = chosen.piece;
    }
    if constexpr (Size::Softmax::kShapesScores) {
      if (Size::thread() == 0) {
        lists.positions[static_cast<unsigned>(count) % Lists::kTiles] = chosen.position;
      }
    }
  }

 private:
  static constexpr int kKept = 2 * (kDecodeStages - 1);

  TileWalk<Size> walk_;
  TileSource tiles_[kKept];  // not used yet, the first half of them copied
};
template <class Size>
requires Size::kChunks class TileChooser<Size> {
 public:
  using Lists = WorkerLists<Size>;

  __device__ TileChooser(const DecodeArgs& args, Lists& lists) {
    if (Size::warp() > 0) return;
    const TileWalk<Size> walk(args, lists, first_round(lists));
    __syncwarp();
    if (Size::thread() == 0) lists.walk = walk.state();
    __syncwarp();
  }

  __device__ TileSource source(const Lists& lists, int count, int ago) const {
    return lists.tiles[static_cast<unsigned>(count - ago) % Lists::kTiles];
  }
  __device__ void choose(const DecodeArgs& args, Lists& lists, int count) {
    if (Size::warp() != count % Size::kWarps) return;
    TileWalk<Size> walk(args, lists, first_round(lists), lists.walk);
    const typename TileWalk<Size>::Place chosen = walk.next();
    __syncwarp();  // all have read
    if (Size::lane() == 0) {
      lists.walk = walk.state();
      lists.tiles[static_cast<unsigned>(count) % Lists::kTiles] = chosen.tile;
      lists.positions[static_cast<unsigned>(count) % Lists::kTiles] = chosen.position;
      lists.piece_of[count % Lists::kPages] = chosen.piece;
      if (chosen.page != nullptr) {
        copy_async_4(shared_address(lists.pages + count % Lists::kPages), chosen.page);
      }
    }
    __syncwarp();
  }

 private:
  static __device__ int first_round(const Lists& lists) {
    const auto lane = static_cast<int>(threadIdx.x % 32);
    return lane < kMostWorkers ? lists.first_rounds[lane] : Turns::kNever;
  }
};

/// A worker's ring of tiles. The number of a tile's page is copied kAhead tiles before its rows,
/// and these kAhead tiles before their use.
///
/// Copies begin while the stream's former kernel still runs: rows of former steps are there. A tile
/// with the step's own rows is copied only after that kernel, which may be the one that makes them.
template <DeviceRow Row, DeviceIo Io, int kDim, class Size>
class TileRing {
 public:
  using Layout = TileLayout<kDim, Size::kTileRows>;
  using Lists = WorkerLists<Size>;
  static constexpr int kAhead = kDecodeStages - 1;
  /// Calls of next() before the first tile.
  static constexpr int kLead = 2 * kAhead;

  __device__ TileRing(const DecodeArgs& args, WorkerLists<Size>& lists, std::byte* memory)
      : args_(args), lists_(lists), memory_(shared_address(memory)), chooser_(args, lists) {}

  /// Waits for the stream's former kernel; the second time takes none.
  __device__ static void start_after_append() { wait_for_previous(); }

  /// The next tile, as the worker that copied it sees it. The first kLead of them are empty.
  struct Tile {
    std::uint32_t at = 0;  ///< shared-memory address of TileLayout's rows
    TileSource source;
  };
  /// Of the tile that next() gave last.
  __device__ int index() const { return count_ - 1 - kLead; }
  /// Of the row 0 of the tile that next() gave last, where it is ragged or scores need it.
  __device__ std::int32_t position() const {
    return lists_.positions[static_cast<unsigned>(count_ - 1 - kLead) % Lists::kTiles];
  }
  __device__ Tile next() {
    wait_copies<kAhead - 1>();
    Size::meet();  // every thread's copies have landed, and the tile before is no longer read
    const Tile tile{memory_ + static_cast<std::uint32_t>(stage_ * Layout::kBytes),
                    chooser_.source(lists_, count_, kLead)};
    const int free_stage = stage_ == 0 ? kDecodeStages - 1 : stage_ - 1;
    stage_ = stage_ + 1 == kDecodeStages ? 0 : stage_ + 1;
    copy(chooser_.source(lists_, count_, kAhead), free_stage);
    chooser_.choose(args_, lists_, count_);
    commit_copies();
    ++count_;
    return tile;
  }

 private:
  /// Starts the copy of a tile into `stage`; rows that do not exist are read from one that does, so
  /// that what is multiplied by zero is a number.
  __device__ void copy(TileSource tile, int stage) {
    if (tile.is_empty()) return;
    const std::uint32_t to = memory_ + static_cast<std::uint32_t>(stage * Layout::kBytes);
    const int at = (count_ + Lists::kPages - kAhead) % Lists::kPages;
    if constexpr (Size::kChunks) {
      if (tile.has(TileSource::kOwn)) {
        start_after_append();
        const int first = lists_.positions[static_cast<unsigned>(count_ - kAhead) % Lists::kTiles];
        copy_own_rows(lists_.piece(lists_.piece_of[at]), first, tile.high(), 0, Size::kTileRows,
                      to);
        return;
      }
    }
    const auto* k_rows = page_rows(lists_.pages[at]) + tile.row_in_page() * kDim;
    if (tile.has(TileSource::kIsNew)) {
      start_after_append();
      int own_row = -1;
      if (args_.k.data != nullptr) {
        const Piece& piece = lists_.piece(lists_.piece_of[at]);
        own_row = piece.own_slot % Size::kTileRows;
        copy_own_rows(piece, 0, 1, own_row == tile.low() ? 0 : own_row,
                      own_row + 1 == tile.high() ? Size::kTileRows : own_row + 1, to);
      }
      copy_rows<false>(k_rows, to, tile, own_row);
    } else if (tile.low() == 0 && tile.high() == Size::kTileRows) {
      copy_rows<true>(k_rows, to, tile, -1);
    } else {
      copy_rows<false>(k_rows, to, tile, -1);
    }
  }
  __device__ std::uint16_t* page_rows(std::int32_t page) const {
    return reinterpret_cast<std::uint16_t*>(args_.step.pages + static_cast<std::size_t>(page) *
                                                                   args_.step.page_stride);
  }

  static constexpr int kChunks = kDim / 8;  // of 16 bytes in a row
  static constexpr int kCopies = Size::kTileRows * kChunks / Size::kThreads;

  template <bool kWhole>
  __device__ void copy_rows(const std::uint16_t* k_rows, std::uint32_t to, TileSource tile,
                            int own_row) {
    const int thread = Size::thread();
    const int low = tile.low();
    const int last = tile.high() - 1;
    const std::uint64_t read_once = read_once_policy();
    const std::uint32_t first = to + Layout::at(thread / kChunks, thread % kChunks);
#pragma unroll(kWhole ? kCopies : 1)  // partial tiles are rare
    for (int i = 0; i < kCopies; ++i) {
      const int row = (thread + Size::kThreads * i) / kChunks;
      const int chunk = (thread + Size::kThreads * i) % kChunks;
      const int from_row = kWhole ? row : min(max(row, low), last);
      if (!kWhole && from_row == own_row) continue;
      const std::uint16_t* from = k_rows + from_row * kDim + chunk * 8;
      std::uint32_t at = to + Layout::at(row, chunk);
      if constexpr (Layout::kPermuted) at = Layout::rows_on(first, Size::kThreads / kChunks * i);
      copy_async_16_once(at, from, read_once);
      copy_async_16_once(at + Layout::kValues, from + kPageTokens * kDim, read_once);
    }
  }
  /// The step's own rows [first, first + count) become the tile's rows [begin, end), as they are
  /// stored; the launch may be the one that stores them. Where there are more, the last one
  /// repeats.
  __device__ void copy_own_rows(const Piece& piece, int first, int count, int begin, int end,
                                std::uint32_t to) const {
    const bool stores = args_.stores && piece.first_row == 0;
    int lost = 0;
#pragma unroll 1
    for (int i = Size::thread(); i < (end - begin) * kChunks; i += Size::kThreads) {
      const int own = min(i / kChunks, count - 1);
      const int chunk = i % kChunks;
      const std::uint32_t at = to + Layout::at(begin + i / kChunks, chunk);
      const auto own_at = [&](const RowsAt<const void*>& all) {
        return static_cast<const Bits<Io>*>(all.data) +
               (piece.query_row + first + own) * all.stride_n + piece.kv_head * all.stride_h +
               chunk * 8;
      };
      const auto copy = [&](const Bits<Io>* from, std::uint32_t place) {
        if constexpr (std::same_as<Row, Io>) {
          copy_async_16(place, from);
        } else {
          copy_eight<Row, Io>(shared_pointer<std::uint16_t>(place), from);
        }
      };
      const Bits<Io>* k = own_at(args_.k);
      const Bits<Io>* v = own_at(args_.v);
      copy(k, at);
      copy(v, at + Layout::kValues);
      if (!stores || i / kChunks >= count) continue;
      std::int32_t slot = piece.own_slot + first + own;
      if (slot >= piece.ring_end) slot += piece.ring_begin - piece.ring_end;
      const std::int64_t entry =
          piece.table +
          static_cast<std::int64_t>(args_.idx_in_class[piece.kv_head]) * piece.head_stride +
          slot / kPageTokens;
      std::uint16_t* page = page_rows(args_.step.page_table[entry]) + slot % kPageTokens * kDim;
      lost += copy_eight<Row, Io>(page + chunk * 8, k);
      lost += copy_eight<Row, Io>(page + kPageTokens * kDim + chunk * 8, v);
    }
    if (lost > 0) atomicAdd(args_.overflows, static_cast<unsigned long long>(lost));
  }

  const DecodeArgs& args_;
  WorkerLists<Size>& lists_;
  std::uint32_t memory_;
  TileChooser<Size> chooser_;
  int stage_ = (kDecodeStages - kLead % kDecodeStages) % kDecodeStages;  // tile 0 in stage 0
  int count_ = 0;
};

}  // namespace headwise::inline v0::cuda::detail
