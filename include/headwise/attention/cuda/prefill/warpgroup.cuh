// SPDX-License-Identifier: MIT
/// @file warpgroup.cuh
/// The prefill kernel of warpgroup products (wgmma): head widths 64 and 128, code for sm_90a.
///
/// A block stays on its multiprocessor and draws tiles until there are none. One warpgroup copies:
/// it runs ahead through a ring of key blocks, into the next tile where this one's keys have all
/// been fetched. Two warpgroups multiply, 64 query rows each; the scores of the next keys are under
/// way while a warpgroup turns the present ones into weights. Queries stay in shared memory, where
/// products read them; a tile's outputs leave by their place.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/prefill/softmax.cuh"
#include "headwise/attention/cuda/prefill/tile.cuh"
#include "headwise/attention/cuda/ptx/barrier.cuh"
#include "headwise/attention/cuda/ptx/tensor_core.cuh"
#include "headwise/attention/cuda/ptx/warpgroup.cuh"
#include "headwise/cache/cuda/elements.cuh"

namespace headwise::inline v0::cuda::detail {

/// Whether the kernel exists for a head width: operands are whole rows of 64 elements, and width
/// 256 leaves no registers for scores.
__host__ __device__ constexpr bool has_warpgroup_kernel(int dim) { return dim == 64 || dim == 128; }

/// Keys handled at once: scores of 128 take the registers that queries leave, which stay in shared
/// memory. 64 double the instructions, waits and shuffles around the products.
inline constexpr int kGroupKeys = 128;
/// Runs of keys or of values under way: five of 128 rows of width 128 are 160 KiB. Two are being
/// multiplied.
inline constexpr unsigned kGroupSlots = 5;
inline constexpr int kGroupRows = 128;               // of queries: two warpgroups' 64
inline constexpr int kGroupThreads = 384;            // those two and the one that copies
inline constexpr int kGroupWarps = kGroupRows / 16;  // that multiply
/// Eight swizzled rows, which begin at a multiple of this.
inline constexpr std::uint32_t kSwizzleBytes = 1024;
/// Tiles that are described at a time: one that is written, one whose scores have begun, one that
/// is copied, the next.
inline constexpr int kGroupTiles = 4;
/// A warp's rows of a slot, each warp of the copying warpgroup a quarter: a lane knows one.
inline constexpr int kGroupShare = kGroupKeys / 4;

__host__ __device__ constexpr std::size_t group_bytes(int dim) {
  const auto row = static_cast<std::size_t>(dim) * 2;
  return kSwizzleBytes + (kGroupSlots * kGroupKeys + 2 * kGroupRows) * row;
}

/// A tile's partial results, 16 bytes a piece: for each multiplying thread its softmax, then what
/// it has of each eight columns.
__host__ __device__ constexpr int part_float4s(int dim) { return kGroupWarps * 32 * (dim / 8 + 1); }

/// The address of 8 elements of swizzled rows: [dim / 64] times [kRows] rows of 64.
template <int kRows>
__device__ __forceinline__ std::uint32_t swizzled_chunk(int row, int chunk) {
  return static_cast<std::uint32_t>(chunk / 8 * kRows * 128) + swizzled(row, chunk % 8);
}

/// What the copying warps and the multiplying ones hand each other. Slots hold kGroupKeys swizzled
/// rows, of keys and of values in turn.
struct KeyRing {
  std::uint64_t full[kGroupSlots];   ///< each copying thread's copies, and thread 0 itself
  std::uint64_t empty[kGroupSlots];  ///< arrivals of the multiplying warps
  std::uint64_t written[2];  ///< the multiplying threads: outputs have left the queries' place
  std::uint32_t again[2][kGroupWarps];  ///< rows of a written tile that have become no numbers
  std::uint32_t tile_again[2];          ///< the last tile that has such rows
};

/// More than a block draws, and not the numbers before 0.
inline constexpr std::uint32_t kNoTile = 0x7FFFFFFF;

/// A place in the ring.
struct RingSlot {
  unsigned slot = 0;
  unsigned parity = 0;  ///< of the rounds so far

  __device__ __forceinline__ void advance(unsigned count) {
    slot += count;
    if (slot >= kGroupSlots) {
      slot -= kGroupSlots;
      parity ^= 1;
    }
  }
};

/// A block's tiles, one after the other: its own number is that of the first, the others are drawn.
/// Each block draws once in vain, after which the counter is 0 again. One warp.
template <bool kCut>
class TileDraw {
 public:
  __device__ TileDraw(const PrefillArgs& args, unsigned num_tiles)
      : args_(args), num_tiles_(num_tiles), number_(blockIdx.x) {
    if constexpr (kCut) num_shares_ = *args.work.num_shares;
  }

  /// Describes the block's first tile. What that needs of the step's first chunk, most often its
  /// own, is read before it is known whose it is: a kernel's start is one latency after another.
  __device__ void describe_first(PrefillTile& tile) {
    const auto head = static_cast<int>(number_ / num_tiles_);
    const int likely = min(head, args_.heads.num_heads - 1);
    const ChunkState chunk = args_.step.chunks[0];
    const ClassState state = args_.step.classes[args_.heads.class_idx[likely]];
    find(number_);
    if (is_first_lane()) {
      tile.chunk = chunk;
      tile.state = state;
      tile.head = likely;
      tile.piece.chunk = 0;
    }
    describe_found(tile, tile);
  }
  /// Asks for a number; describe_next() needs the answer, which takes a while.
  __device__ void ask() {
    if ((kCut && goes_on_) || !is_first_lane()) return;
    number_ = gridDim.x + atomicInc(args_.next_tile, count() - 1);
  }
  /// Describes the next tile, or that there is none.
  /// @param former  one that has been described; what is alike need not be read again.
  __device__ void describe_next(PrefillTile& tile, const PrefillTile& former) {
    find(__shfl_sync(kWholeWarp, number_, 0));
    describe_found(tile, former);
  }

 private:
  __device__ static bool is_first_lane() { return threadIdx.x % 32 == 0; }
  __device__ unsigned count() const {
    return kCut && num_shares_ > 0 ? static_cast<unsigned>(num_shares_)
                                   : num_tiles_ * static_cast<unsigned>(args_.heads.num_heads);
  }

  /// Finds what the number stands for, or goes on with the block's share.
  __device__ void find(unsigned number) {
    if (kCut && num_shares_ > 0) {
      is_found_ = goes_on_ || number < count();
      if (!is_found_) return;
      piece_ = goes_on_ ? piece_ + 1 : args_.work.first_piece[number];
      goes_on_ = args_.work.pieces[piece_].goes_on != 0;
      return;
    }
    is_found_ = number < count();
    if (!is_found_) return;
    // Head by head, the last tokens first, as they see most.
    head_ = static_cast<int>(number / num_tiles_);
    index_ = static_cast<int>(num_tiles_ - 1 - number % num_tiles_);
    if (index_ >= chunk_begin_ && index_ < chunk_begin_ + chunk_.num_tiles) return;
    chunk_ = find_chunk(args_.step, index_, kGroupRows / args_.group_size, args_.group_size);
    chunk_begin_ = index_ - chunk_.index;
    is_found_ = chunk_.chunk >= 0;
  }
  __device__ void describe_found(PrefillTile& tile, const PrefillTile& former) const {
    if (!is_first_lane()) return;
    const int tile_tokens = kGroupRows / args_.group_size;
    if (!is_found_) {
      tile.num_tokens = 0;
      return;
    }
    TilePiece piece;
    piece.chunk = chunk_.chunk;
    piece.tile = index_ - chunk_begin_;
    piece.head = head_;
    if (kCut && num_shares_ > 0) piece = args_.work.pieces[piece_];
    describe(args_, piece, tile_tokens, former, tile);
  }

  const PrefillArgs& args_;
  unsigned num_tiles_;
  unsigned number_;  // lane 0's
  int num_shares_ = 0;
  bool is_found_ = false;  // whether there is a tile
  // A whole one: the chunk found last, the number of its first tile, the tile's, and the head.
  ChunkTile chunk_;
  int chunk_begin_ = 0;
  int index_ = 0;
  int head_ = 0;
  // Of a share: the piece, and whether the next one is of the same share.
  int piece_ = 0;
  bool goes_on_ = false;
};

/// A multiplying warp's weights and results.
template <class Row, int kDim, SoftmaxKind Softmax>
class GroupRows {
 public:
  using Scores = float[kGroupKeys / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[n][i] = 0.0F;
    }
  }

  /// Starts score = queries x keys.
  /// @param queries  of the warpgroup's first row.
  static __device__ __forceinline__ void multiply_keys(std::uint32_t queries, std::uint32_t keys,
                                                       Scores& score) {
    const std::uint64_t a = operand(queries);
    const std::uint64_t b = operand(keys);
    begin_products();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      // Column 16 k of rows of 64 elements.
      const int column = k % 4 * 32;
      WarpgroupCore<Row>::multiply_keys(
          score, a + static_cast<unsigned>(k / 4 * kGroupRows * 128 + column) / 16,
          b + static_cast<unsigned>(k / 4 * kGroupKeys * 128 + column) / 16, k > 0 ? 1 : 0);
    }
    commit_products();
  }

  /// Takes the scores as the next weights.
  __device__ __forceinline__ void set_weights(const Scores& score) {
#pragma unroll
    for (int k = 0; k < kGroupKeys / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &score[2 * k + i / 2][i % 2 * 2];
        weight_[k][i] = Pair<Row>::pack(pair[0], pair[1]);
      }
    }
  }

  /// Starts results += weights x values.
  __device__ __forceinline__ void multiply_values(std::uint32_t values) {
    const std::uint64_t b = operand<kGroupKeys * 128>(values);
    begin_products();
#pragma unroll
    for (int k = 0; k < kGroupKeys / 16; ++k) {
      WarpgroupCore<Row>::multiply_values(out_, weight_[k], b + k * 16 * 128 / 16);
    }
    commit_products();
  }
  /// Waits for the results.
  __device__ __forceinline__ void wait() {
    wait_products<0>();
    pin_registers(out_);
  }
  __device__ __forceinline__ void scale(const float (&factor)[2]) { scale_rows(factor, out_); }

  /// Writes the warp's results and softmax as a part of its tile's; 16 bytes a lane at a time.
  /// @param part  of the whole tile, see part_float4s().
  __device__ __forceinline__ void write_part(const RowSoftmax<Row, Softmax>& softmax,
                                             float4* part) const {
    part += threadIdx.x;
    __stcg(part, softmax.part());
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      __stcg(part + (n + 1) * kGroupWarps * 32,
             make_float4(out_[n][0], out_[n][1], out_[n][2], out_[n][3]));
    }
  }
  /// Takes the sum of all parts, in their order, in place of the warp's results.
  __device__ __forceinline__ void read_parts(const float4* parts, int count, float scale_log2,
                                             RowSoftmax<Row, Softmax>& softmax) {
    constexpr int kPart = part_float4s(kDim);
    parts += threadIdx.x;
    softmax.begin_parts();
    for (int p = 0; p < count; ++p) softmax.raise(__ldcg(parts + p * kPart));
    clear();
#pragma unroll 1
    for (int p = 0; p < count; ++p, parts += kPart) {
      float factor[2];
      softmax.add_part(__ldcg(parts), scale_log2, factor);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const float4 x = __ldcg(parts + (n + 1) * kGroupWarps * 32);
        out_[n][0] = fmaf(x.x, factor[0], out_[n][0]);
        out_[n][1] = fmaf(x.y, factor[0], out_[n][1]);
        out_[n][2] = fmaf(x.z, factor[1], out_[n][2]);
        out_[n][3] = fmaf(x.w, factor[1], out_[n][3]);
      }
    }
  }

  /// Adds what stands for dropped rows; after the last keys.
  __device__ __forceinline__ void add_compensation(const LaneRows& lane_rows,
                                                   RowSoftmax<Row, Softmax>& softmax) {
    softmax.add_compensation(lane_rows, out_);
  }

  /// Divides by the sums of weights and writes the warp's rows, swizzled.
  /// @param first_row  the warp's, of kGroupRows at `rows`.
  /// @return the rows that have become no numbers, see named_rows().
  __device__ __forceinline__ unsigned store(const LaneRows& lane_rows,
                                            const RowSoftmax<Row, Softmax>& softmax,
                                            std::uint32_t rows, int first_row) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const float inverse[2] = {softmax.inverse_sum(lane_rows, 0), softmax.inverse_sum(lane_rows, 1)};
    std::uint32_t zeros[2] = {};
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      std::uint32_t m[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &out_[2 * k + i / 2][i % 2 * 2];
        m[i] = Pair<Row>::pack(pair[0] * inverse[i % 2], pair[1] * inverse[i % 2]);
        TensorCore<Row>::note(m[i], zeros[i % 2]);
      }
      store_matrices(m,
                     rows + swizzled_chunk<kGroupRows>(first_row + lane % 16, 2 * k + lane / 16));
    }
    return named_rows(!are_zeros(zeros[0]), !are_zeros(zeros[1]));
  }

 private:
  std::uint32_t weight_[kGroupKeys / 16][4];
  float out_[kDim / 8][4];
};

/// A copying warp starts to copy its rows of a slot, of which each lane knows one.
/// @param to  the shared-memory address of the first row, whose number is a multiple of eight.
template <int kDim>
__device__ __forceinline__ void copy_share(const std::uint16_t* row_of_lane, std::uint32_t to) {
  constexpr int kChunks = kDim / 8;
  constexpr int kRows = 32 / kChunks;  // that the warp copies at once
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int chunk = lane % kChunks;
  const int row = lane / kChunks;
  to += static_cast<std::uint32_t>(chunk / 8 * kGroupKeys * 128);
  const auto address = reinterpret_cast<std::uintptr_t>(row_of_lane);
  const std::uintptr_t first = __shfl_sync(kWholeWarp, address, 0);
  const std::uintptr_t step = __shfl_sync(kWholeWarp, address, 1) - first;
  const auto copy = [&](int in_eight, int eight, std::uintptr_t from) {
    copy_async_16(to + swizzled(row + in_eight, chunk % 8) + eight * kSwizzleBytes,
                  reinterpret_cast<const void*>(from));
  };
  // Rows of one page, or the step's own, lie at equal distances. To ask the other lanes for each
  // takes this warp longer than the products take.
  if (__all_sync(kWholeWarp, address == first + static_cast<unsigned>(lane) * step)) {
#pragma unroll
    for (int in_eight = 0; in_eight < 8; in_eight += kRows) {
      std::uintptr_t from = first + static_cast<unsigned>(row + in_eight) * step + chunk * 16;
#pragma unroll
      for (int eight = 0; eight < kGroupShare / 8; ++eight, from += 8 * step) {
        copy(in_eight, eight, from);
      }
    }
  } else {
#pragma unroll 1
    for (int eight = 0; eight < kGroupShare / 8; ++eight) {
#pragma unroll
      for (int in_eight = 0; in_eight < 8; in_eight += kRows) {
        copy(in_eight, eight,
             __shfl_sync(kWholeWarp, address, eight * 8 + in_eight + row) + chunk * 16);
      }
    }
  }
}

/// What the copying warpgroup does: it copies tiles, and attends again what the others could not.
template <class Row, int kDim, bool kCut, SoftmaxKind Softmax>
__device__ __forceinline__ void copy_tiles(const PrefillArgs& args, unsigned num_tiles,
                                           KeyRing& ring, PrefillTile (&tiles)[kGroupTiles],
                                           std::uint32_t slots, std::uint32_t queries) {
  constexpr std::uint32_t kSlotBytes = kGroupKeys * kDim * 2;
  constexpr std::uint32_t kQueryBytes = kGroupRows * kDim * 2;
  static_assert(kGroupRows == kGroupKeys, "queries are copied as a slot's rows are");
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  const int warp = thread / 32;
  const int own = warp * kGroupShare + thread % 32;  // the lane's row of a slot
  const std::uint32_t own_rows = static_cast<std::uint32_t>(warp * kGroupShare) * 128;
  const QueryGroup group(args.group_size);
  RingSlot next;
  const auto acquire = [&] {  // a fresh ring is empty
    wait_for(shared_address(&ring.empty[next.slot]), next.parity ^ 1);
  };
  const auto hand_over = [&] {
    arrive_after_copies(shared_address(&ring.full[next.slot]));
    // Copies do not take other writes with them: the tile's description.
    if (thread == 0) arrive(shared_address(&ring.full[next.slot]));
    next.advance(1);
  };
  // Waits until tile t - 2 is written, and finishes it; of tiles before the first nothing is left.
  const auto finish_before = [&](unsigned t) {
    wait_for(shared_address(&ring.written[t % 2]), (t / 2 + 1) % 2);
    if (ring.tile_again[t % 2] != t - 2) return;
#pragma unroll 1
    for (int w = warp; w < kGroupWarps; w += 4) {
      const unsigned rows = ring.again[t % 2][w];
      attend_exactly<Row, kDim, Softmax>(args, tiles[(t - 2) % kGroupTiles], group, w * 16, rows);
    }
  };
  TileDraw<kCut> draw(args, num_tiles);
  if (warp == 0) draw.describe_first(tiles[0]);
  bool is_end = false;
#pragma unroll 1
  for (unsigned t = 0;; ++t) {
    finish_before(t);
    if (is_end) break;
    meet_warpgroup(1);  // the first warp has described the tile
    const PrefillTile& tile = tiles[t % kGroupTiles];
    if (tile.num_tokens == 0) {  // keys of a tile without tokens: the end
      acquire();
      hand_over();
      is_end = true;
      continue;
    }
    const TilePiece& piece = tile.piece;
    // Late, so that a tile goes to a block that is nearly free; and early enough for the ring to
    // stay full while its first keys are found.
    const int num_blocks = (piece.end_key - piece.begin_key + kGroupKeys - 1) / kGroupKeys;
    const int draw_at = piece.begin_key + max(num_blocks - 4, 0) * kGroupKeys;
    copy_share<kDim>(find_query(args, tile, group, own), queries + t % 2 * kQueryBytes + own_rows);
    for (int first = piece.begin_key; first < piece.end_key; first += kGroupKeys) {
      const bool draws = warp == 0 && first == draw_at;
      if (draws) draw.ask();
      const KeyRows rows = find_key<kDim>(args, tile, first + own);
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        acquire();
        copy_share<kDim>(i == 0 ? rows.k : rows.v, slots + next.slot * kSlotBytes + own_rows);
        hand_over();
      }
      // While the others copy on. Tile t - 2 has been written: this description replaces that of
      // tile t - 3.
      if (draws) draw.describe_next(tiles[(t + 1) % kGroupTiles], tile);
    }
  }
}

/// What a multiplying warp does: one pipeline through the key blocks of all its tiles. While block
/// b's values are multiplied, the scores of block b + 1 are, too, and become weights; b + 1 may be
/// the first of the next tile.
template <class Row, int kDim, bool kCut, SoftmaxKind Softmax>
__device__ __forceinline__ void multiply_tiles(const PrefillArgs& args, KeyRing& ring,
                                               const PrefillTile (&tiles)[kGroupTiles],
                                               std::uint32_t slots, std::uint32_t queries) {
  constexpr std::uint32_t kSlotBytes = kGroupKeys * kDim * 2;
  constexpr std::uint32_t kQueryBytes = kGroupRows * kDim * 2;
  constexpr int kPart = part_float4s(kDim);
  const QueryGroup group(args.group_size);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int first_row = static_cast<int>(threadIdx.x / 32) * 16;
  // The same in all lanes, which the compiler cannot know of a quotient.
  const unsigned warpgroup = __shfl_sync(kWholeWarp, threadIdx.x / kWarpgroupThreads, 0);
  const auto wait_full = [&](const RingSlot& at) {
    wait_for(shared_address(&ring.full[at.slot]), at.parity);
    fence_for_products();  // whose copies these were could not, before they had landed
  };
  const auto release = [&](const RingSlot& at) {
    if (lane == 0) arrive(shared_address(&ring.empty[at.slot]));
  };
  const auto address_of = [&](const RingSlot& at) { return slots + at.slot * kSlotBytes; };
  const auto queries_of = [&](unsigned t) { return queries + t % 2 * kQueryBytes; };
  GroupRows<Row, kDim, Softmax> rows;
  RowSoftmax<Row, Softmax> softmax;
  SeenByAll seen_by_all;
  int first = 0;  // of the block's keys in the tile's list
  int end = 0;    // of the piece's keys there
  const auto begin = [&](const PrefillTile& tile) {
    first = tile.piece.begin_key;
    end = tile.piece.end_key;
    softmax.begin(tile, group, first_row + lane / 4);
    seen_by_all = SeenByAll(tile.keys, tile.state, tile.pos_of(first_row, group),
                            tile.pos_of(first_row + 15, group));
  };
  const auto multiply_keys = [&](unsigned t, const RingSlot& keys, auto& score) {
    rows.multiply_keys(queries_of(t) + warpgroup * (64 * 128), address_of(keys), score);
  };
  const auto lane_rows = [&](const PrefillTile& tile) {
    return LaneRows{args, tile, group, first_row + lane / 4};
  };
  // Whether this warp, which has its rows of a piece, has those of the whole tile now.
  const auto has_all = [&](const TilePiece& piece, RowSoftmax<Row, Softmax>& done) {
    float4* parts = args.work.parts + static_cast<std::int64_t>(piece.first_part) * kPart;
    rows.write_part(done, parts + piece.part * kPart);
    __syncwarp();
    unsigned before = 0;
    if (lane == 0) {
      unsigned* arrived = args.work.arrived + piece.first_part * kGroupWarps + first_row / 16;
      __threadfence();
      before = atomicInc(arrived, static_cast<unsigned>(piece.num_parts - 1));
      __threadfence();
    }
    before = __shfl_sync(kWholeWarp, before, 0);
    if (before + 1 < static_cast<unsigned>(piece.num_parts)) return false;
    rows.read_parts(parts, piece.num_parts, done.scale_log2(args), done);
    return true;
  };
  // Outputs leave in 16-byte pieces, by way of the place of the tile's queries.
  const auto write = [&](unsigned t, RowSoftmax<Row, Softmax> done) {
    const std::uint32_t place = queries_of(t);
    const PrefillTile& tile = tiles[t % kGroupTiles];
    meet_warpgroup(2 + warpgroup);  // none of its products reads queries any more
    unsigned again = 0;
    if (!kCut || tile.piece.num_parts == 1 || has_all(tile.piece, done)) {
      if constexpr (Softmax::kHasCompensation) rows.add_compensation(lane_rows(tile), done);
      again = rows.store(lane_rows(tile), done, place, first_row);
      __syncwarp();
      write_outputs<kDim, 16>(args, tile, group, first_row, [&](int row, int chunk) {
        return shared_pointer<const uint4>(place +
                                           swizzled_chunk<kGroupRows>(first_row + row, chunk));
      });
    }
    if (lane == 0) {
      ring.again[t % 2][first_row / 16] = again;
      if (again != 0) atomicExch(&ring.tile_again[t % 2], t);  // other warps may, too
    }
    arrive(shared_address(&ring.written[t % 2]));
  };

  unsigned t = 0;
  RingSlot keys;
  RingSlot values;
  wait_full(keys);  // and the tile's description, and its queries
  if (tiles[t].num_tokens == 0) return;
  typename GroupRows<Row, kDim, Softmax>::Scores score = {};
  float factor[2];
  multiply_keys(t, keys, score);
  begin(tiles[t]);
  wait_products<0>();
  pin_registers(score);
  release(keys);
  keys.advance(2);
  values.advance(1);
  softmax.shape(lane_rows(tiles[t]), first, score);
  if (!seen_by_all.contains(first, kGroupKeys)) softmax.mask(first, score);
  (void)softmax.add(softmax.scale_log2(args), score, factor);
  rows.set_weights(score);
  rows.clear();
  while (true) {
    const RowSoftmax<Row, Softmax> done = softmax;
    first += kGroupKeys;
    const bool is_last = first >= end;
    wait_full(keys);
    if (is_last && tiles[(t + 1) % kGroupTiles].num_tokens == 0) break;
    multiply_keys(is_last ? t + 1 : t, keys, score);
    wait_full(values);
    rows.multiply_values(address_of(values));
    if (is_last) begin(tiles[(t + 1) % kGroupTiles]);
    const bool all_seen = seen_by_all.contains(first, kGroupKeys);
    wait_products<1>();
    pin_registers(score);
    release(keys);
    keys.advance(2);
    softmax.shape(lane_rows(tiles[(is_last ? t + 1 : t) % kGroupTiles]), first, score);
    if (!all_seen) softmax.mask(first, score);
    const bool rises = softmax.add(softmax.scale_log2(args), score, factor);
    rows.wait();
    release(values);
    values.advance(2);
    if (is_last) {
      write(t, done);
      rows.clear();
      ++t;
    } else if (rises) {
      rows.scale(factor);
    }
    rows.set_weights(score);
  }
  wait_full(values);
  rows.multiply_values(address_of(values));
  rows.wait();
  write(t, softmax);
}

/// One block a multiprocessor; see the top of the file.
/// @tparam kCut  whether there may be pieces of tiles, see work.cuh; what they take slows down
/// whole
///   ones by a hundredth or two.
/// @param num_tiles  of all chunks, for one head.
///
/// Cost: a tile reads the keys that any of its tokens sees, so a streaming head costs O(n x
/// window). Its code is there in builds for sm_90a alone; elsewhere the kernel is empty and has no
/// static shared memory, by which has_warpgroup_code() knows. Aims at cuDNN's 600 TFLOP/s on an
/// H200, and reaches it (bench/results).
template <class Row, int kDim, bool kCut, SoftmaxKind Softmax = PlainSoftmax>
__global__ void __launch_bounds__(kGroupThreads, 1)
    prefill_warpgroup_kernel(const __grid_constant__ PrefillArgs args, unsigned num_tiles) {
  if constexpr (kWarpgroupCode) {
    extern __shared__ __align__(16) std::uint16_t group_memory[];
    __shared__ KeyRing ring;
    __shared__ PrefillTile tiles[kGroupTiles];
    // What begins behind static memory is less aligned than swizzling asks.
    const std::uint32_t begin = shared_address(group_memory);
    const std::uint32_t slots = (begin + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
    const std::uint32_t queries = slots + kGroupSlots * kGroupKeys * kDim * 2;
    if (threadIdx.x == 0) {
      for (std::uint64_t& barrier : ring.full) {
        begin_barrier(shared_address(&barrier), kWarpgroupThreads + 1);
      }
      for (std::uint64_t& barrier : ring.empty) {
        begin_barrier(shared_address(&barrier), kGroupWarps);
      }
      for (std::uint64_t& barrier : ring.written) {
        begin_barrier(shared_address(&barrier), kGroupWarps * 32);
      }
      for (std::uint32_t& tile : ring.tile_again) tile = kNoTile;
    }
    __syncthreads();
    // Of 384 x 168 registers: 2 x 128 threads with 208, 128 with 88.
    if (threadIdx.x >= kGroupThreads - kWarpgroupThreads) {
      give_up_registers<88>();
      copy_tiles<Row, kDim, kCut, Softmax>(args, num_tiles, ring, tiles, slots, queries);
    } else {
      take_registers<208>();
      multiply_tiles<Row, kDim, kCut, Softmax>(args, ring, tiles, slots, queries);
    }
  }
}

/// Whether the build has the kernel's code for the current device.
inline bool has_warpgroup_code(void (*kernel)(PrefillArgs, unsigned)) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
         attributes.sharedSizeBytes > 0;
}

}  // namespace headwise::inline v0::cuda::detail
