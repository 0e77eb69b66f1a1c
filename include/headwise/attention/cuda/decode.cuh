// SPDX-License-Identifier: MIT
/// @file decode.cuh
/// Decode: one new token of many sequences over heads of unequal length, in one launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/decode_work.cuh"
#include "headwise/attention/cuda/head_dims.cuh"
#include "headwise/attention/cuda/tensor_core.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/device_cache.cuh"
#include "headwise/cache/cuda/step_state.cuh"
#include "headwise/core/tensor_view.hpp"

namespace headwise::inline v0::cuda {

/// Partial results between the blocks of a launch; free again when it ends, counters back at 0.
struct DecodeScratch {
  float* block_partials = nullptr;  ///< [2 num_blocks][detail::partial_floats(dim)]
  float* warp_partials = nullptr;   ///< [num_warps][detail::partial_floats(dim)]
  unsigned* arrived = nullptr;      ///< [num_blocks]
};

/// One layer's decode as a kernel's parameters.
struct DecodeArgs {
  DeviceStep step;                    ///< the open step and the pages
  DecodeWork work;                    ///< which warp does which part
  DecodeScratch scratch;              ///< between the blocks
  TensorView<const std::uint16_t> q;  ///< [rows, num_qo_heads, dim]
  TensorView<std::uint16_t> out;      ///< [rows, num_qo_heads, dim]
  std::int64_t table_offset = 0;      ///< of the layer's first entry in a sequence's share
  std::int32_t group_size = 1;        ///< query heads per KV head
  float scale_log2 = 1.0F;            ///< softmax scale x log2(e)
};

namespace detail {

/// Tiles of a warp between copy and use, one of them in use. Two on the way are 128 KiB a
/// multiprocessor with 8 warps of width 128; 4.6 TB/s x 1 us over 132 of them are 35 KiB.
inline constexpr int kDecodeStages = 3;

/// Most blocks of a launch: what a merge keeps in registers. An H200 has 132 multiprocessors.
inline constexpr int kMaxBlocks = 256;

template <int kDim>
inline constexpr int kDecodeTileElements = 2 * kTileRows* kPaddedDim<kDim>;  // K, then V

/// Warps of a block: as many as make the rings about equally large for every width.
constexpr int decode_max_warps(int dim) { return dim <= 64 ? 16 : dim <= 128 ? 8 : 4; }

constexpr std::size_t decode_warp_bytes(int dim) {
  return static_cast<std::size_t>(kDecodeStages) * 2 * kTileRows *
         static_cast<std::size_t>(dim + 8) * 2;
}

/// One partial result: (maximum, sum) of 8 queries, then 8 rows of unnormalised output.
__host__ __device__ constexpr int partial_floats(int dim) { return kItemQueries * (dim + 4 + 2); }

/// Where query `query`'s output begins in a partial result; 4 floats of padding a row keep the four
/// queries that lanes store at once in different banks.
template <int kDim>
__device__ constexpr int partial_row(int query) {
  return 2 * kItemQueries + query * (kDim + 4);
}

/// What the copying half of a warp needs to know of a tile: two registers, several are on their
/// way.
struct TileSource {
  std::int32_t page = 0;
  std::uint32_t bits = 0;

  /// @param low, high  rows [low, high) of the tile exist and are seen; none: nothing is copied.
  /// @param is_new  whether the step's own row is among them.
  static __device__ std::uint32_t pack(int tile_of_page, int low, int high, bool is_new) {
    return static_cast<std::uint32_t>(low | high << 5 | tile_of_page << 10 | (is_new ? kIsNew : 0) |
                                      kExists);
  }
  __device__ int low() const { return static_cast<int>(bits & 31U); }
  __device__ int high() const { return static_cast<int>(bits >> 5 & 31U); }
  __device__ int row_in_page() const { return static_cast<int>(bits >> 10 & 3U) * kTileRows; }
  __device__ bool has(int flag) const { return (bits & static_cast<unsigned>(flag)) != 0; }

  static constexpr int kIsNew = 1 << 12;
  static constexpr int kExists = 1 << 13;
  static constexpr int kEndsPiece = 1 << 14;
};
static_assert(kPageTokens / kTileRows == 4);

/// Walks over a warp's tiles in order: the part at its head, whole items, the part at its tail.
class TileWalk {
 public:
  /// @param work  in shared memory.
  __device__ TileWalk(const DecodeArgs& args, const WarpWork& work) : args_(args), work_(work) {
    fetch_next();
    open_next();
  }

  __device__ TileSource next() {
    TileSource tile;
    if (left_ == 0) return tile;
    const int offset = round_ * width_ + column_;
    const int tiles0 = tiles_of(slot_begin_[0], slot_end_[0]);
    const int index = base_ + offset;
    const bool second = index >= tiles0;
    const int begin = second ? slot_begin_[1] : slot_begin_[0];
    const int end = second ? slot_end_[1] : slot_end_[0];
    const int slot_tile = begin / kTileRows + (second ? index - tiles0 : index);
    const int first_slot = slot_tile * kTileRows;
    tile.bits = TileSource::pack(0, 0, 0, false);
    if (offset < tiles_) {
      tile.bits = TileSource::pack(slot_tile % 4, max(begin - first_slot, 0),
                                   min(end - first_slot, kTileRows), slot_tile == new_tile_);
      tile.page = args_.step.page_table[table_ + first_slot / kPageTokens];
    }
    if (--left_ == 0) tile.bits |= TileSource::kEndsPiece;
    if (left_ == 0) {
      open_next();
    } else if (++column_ >= columns_end()) {
      do {
        ++round_;
        // Between the end of the second column's part and the start of the first one's: nothing.
        if (last_column_ == first_column_ + 1 && round_ >= last_round_ && round_ < first_round_) {
          round_ = first_round_;
        }
        column_ = columns_begin();
      } while (column_ >= columns_end());
    }
    return tile;
  }

 private:
  // In each round a piece has the columns from its first position's on, less that one before the
  // first position's round; likewise up to its last position's.
  __device__ int columns_begin() const { return first_column_ + (round_ < first_round_ ? 1 : 0); }
  __device__ int columns_end() const { return last_column_ + (round_ < last_round_ ? 1 : 0); }

  /// The next piece that is not empty, if there is one.
  __device__ void open_next() {
    const int step = step_++;  // 0: the head, then the whole items, then the tail
    if (step == 0 && work_.head.count > 0) {
      open(work_.head);
      return;
    }
    if (opened_ < work_.num_whole) {
      open(next_);
      ++opened_;
      fetch_next();
    } else if (opened_ == work_.num_whole && work_.tail.count > 0) {
      ++opened_;
      open(work_.tail);
    }
  }

  /// Reads the next whole item, long before it is opened.
  __device__ void fetch_next() {
    if (opened_ < work_.num_whole) next_ = args_.work.items[work_.first_whole + opened_];
  }

  __device__ void open(const Piece& piece) {
    table_ = piece.table + args_.table_offset;
    for (int r = 0; r < 2; ++r) {
      slot_begin_[r] = piece.slot_begin[r];
      slot_end_[r] = piece.slot_end[r];
    }
    new_tile_ = piece.new_slot / kTileRows;
    base_ = piece.base;
    tiles_ = piece.tiles;
    width_ = piece.width;
    left_ = piece.count;
    first_column_ = piece.first / piece.rounds;
    first_round_ = piece.first % piece.rounds;
    last_column_ = (piece.first + piece.count) / piece.rounds;
    last_round_ = (piece.first + piece.count) % piece.rounds;
    round_ = 0;
    if (last_column_ == first_column_ || (last_column_ == first_column_ + 1 && last_round_ == 0)) {
      round_ = first_round_;
    }
    column_ = columns_begin();
  }

  const DecodeArgs& args_;
  const WarpWork& work_;
  std::int64_t table_ = 0;
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
  int step_ = 0;
  int opened_ = 0;  // whole items, and the tail
  Piece next_;
};

/// A warp's ring of tiles: copies run kDecodeStages - 1 tiles ahead, page numbers kAhead further.
///
/// Copies begin while the stream's former kernel still runs: rows of former steps are there. A tile
/// with the step's own row is copied only after that kernel, which may be the one that appends it.
template <int kDim>
class TileRing {
 public:
  __device__ TileRing(const DecodeArgs& args, const WarpWork& work, std::uint16_t* memory)
      : args_(args), walk_(args, work), memory_(memory) {
#pragma unroll
    for (TileSource& tile : ahead_) tile = walk_.next();
#pragma unroll
    for (int i = 0; i < kDecodeStages - 1; ++i) copy_next(i);
  }

  /// Waits for the stream's former kernel, once.
  __device__ void start_after_append() {
    if (!waited_) wait_for_previous();
    waited_ = true;
  }

  /// The next tile, as the warp that copied it sees it: K rows, then V rows, padded.
  struct Tile {
    std::uint32_t k = 0;  ///< shared-memory address
    int low = 0;
    int high = 0;
    bool ends_piece = false;
  };
  __device__ Tile take() {
    wait_copies<kDecodeStages - 2>();
    __syncwarp();  // every lane's copies have landed, and the tile before is no longer read
    const int use = stage_;
    stage_ = stage_ + 1 == kDecodeStages ? 0 : stage_ + 1;
    const Tile tile{shared_address(memory_ + use * kDecodeTileElements<kDim>), info_[0].low(),
                    info_[0].high(), info_[0].has(TileSource::kEndsPiece)};
#pragma unroll
    for (int i = 0; i + 1 < kDecodeStages - 1; ++i) info_[i] = info_[i + 1];
    copy_next(kDecodeStages - 2, use == 0 ? kDecodeStages - 1 : use - 1);
    return tile;
  }

 private:
  /// Page numbers on their way: they queue behind the rows, and so take as long as two tiles.
  static constexpr int kAhead = 4;

  __device__ void copy_next(int i) { copy_next(i, i); }

  /// Starts the copy of the tile after the last one into `stage`; rows that do not exist are read
  /// from one that does, so that what is multiplied by zero is a number.
  __device__ void copy_next(int info_at, int stage) {
    const TileSource tile = ahead_[0];
#pragma unroll
    for (int i = 0; i + 1 < kAhead; ++i) ahead_[i] = ahead_[i + 1];
    ahead_[kAhead - 1] = walk_.next();
    info_[info_at] = tile;
    if (tile.low() < tile.high()) {
      if (tile.has(TileSource::kIsNew)) start_after_append();
      const auto* k_rows =
          reinterpret_cast<const std::uint16_t*>(
              args_.step.pages + static_cast<std::size_t>(tile.page) * args_.step.page_bytes) +
          tile.row_in_page() * kDim;
      const std::uint32_t to = shared_address(memory_ + stage * kDecodeTileElements<kDim>);
      if (tile.low() == 0 && tile.high() == kTileRows) {
        copy_rows(k_rows, to, [](int row) { return row; });
      } else {
        copy_rows(k_rows, to, [&](int row) { return min(max(row, tile.low()), tile.high() - 1); });
      }
    }
    commit_copies();
  }

  /// Row `row` of the tile comes from row `source(row)`.
  template <class Source>
  __device__ void copy_rows(const std::uint16_t* k_rows, std::uint32_t to, Source source) {
    constexpr int kChunks = kDim / 8;  // of 16 bytes in a row
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kTileRows * kChunks / 32; ++i) {
      const int chunk = lane + 32 * i;
      const int row = chunk / kChunks;
      const int column = chunk % kChunks * 8;
      const std::uint16_t* from = k_rows + source(row) * kDim + column;
      const std::uint32_t at = to + (row * kPaddedDim<kDim> + column) * 2;
      copy_async_16(at, from);
      copy_async_16(at + kTileRows * kPaddedDim<kDim> * 2, from + kPageTokens * kDim);
    }
  }

  const DecodeArgs& args_;
  TileWalk walk_;
  std::uint16_t* memory_;
  TileSource ahead_[kAhead];
  TileSource info_[kDecodeStages - 1];
  int stage_ = 0;
  bool waited_ = false;
};

/// Attention of up to 8 queries over the tiles of one piece, transposed: scores are [keys,
/// queries], the output [dims, queries], so that 16 keys or dims fill a tensor core's rows and the
/// few queries of a group its 8 columns. Lane 4g + t has queries 2t and 2t + 1.
template <class Row, int kDim>
class DecodeState {
 public:
  /// Reads the queries that the next start() takes.
  /// @param q  the group's first query row of an item; `count` of them, `stride` elements apart.
  __device__ void fetch(const std::uint16_t* q, std::int64_t stride, int count) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int query = lane / 4;
    const std::uint16_t* row = q + query * stride + lane % 4 * 2;
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
      next_q_[b][0] = query < count ? *reinterpret_cast<const std::uint32_t*>(row + b * 16) : 0U;
      next_q_[b][1] =
          query < count ? *reinterpret_cast<const std::uint32_t*>(row + b * 16 + 8) : 0U;
    }
  }

  /// Begins an item with the queries fetched before.
  __device__ void start() {
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
      q_[b][0] = next_q_[b][0];
      q_[b][1] = next_q_[b][1];
    }
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[b][i] = 0.0F;
    }
    max_[0] = max_[1] = kMasked;
    sum_[0] = sum_[1] = 0.0F;
  }

  /// Adds the rows [low, high) of a tile at shared-memory address `k`.
  __device__ void add(std::uint32_t k, int low, int high, float scale_log2) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    constexpr int kRowBytes = kPaddedDim<kDim> * 2;
    const std::uint32_t k_at = k + (lane % 16) * kRowBytes + lane / 16 * 16;
    float even[4] = {};
    float odd[4] = {};  // two chains of products: half the latency
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
      std::uint32_t rows[4];
      load_matrices(rows, k_at + b * 32);
      TensorCore<Row>::multiply(b % 2 == 0 ? even : odd, rows, q_[b][0], q_[b][1]);
    }
    float score[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) score[i] = (even[i] + odd[i]) * scale_log2;
    if (low > 0 || high < kTileRows) {
      const int g = lane / 4;
      if (g < low || g >= high) score[0] = score[1] = kMasked;
      if (g + 8 < low || g + 8 >= high) score[2] = score[3] = kMasked;
    }

    float top[2] = {fmaxf(score[0], score[2]), fmaxf(score[1], score[3])};
#pragma unroll
    for (int d = 4; d < 32; d *= 2) {
      top[0] = fmaxf(top[0], __shfl_xor_sync(kWholeWarp, top[0], d));
      top[1] = fmaxf(top[1], __shfl_xor_sync(kWholeWarp, top[1], d));
    }
    top[0] = fmaxf(top[0], max_[0]);
    top[1] = fmaxf(top[1], max_[1]);
    if (__any_sync(kWholeWarp, top[0] > max_[0] || top[1] > max_[1])) rescale(top);

    const float p[4] = {exp2_fast(score[0] - max_[0]), exp2_fast(score[1] - max_[1]),
                        exp2_fast(score[2] - max_[0]), exp2_fast(score[3] - max_[1])};
    sum_[0] += p[0] + p[2];
    sum_[1] += p[1] + p[3];
    const std::uint32_t p0 = transposed(TensorCore<Row>::pack(p[0], p[1]));
    const std::uint32_t p1 = transposed(TensorCore<Row>::pack(p[2], p[3]));
    const std::uint32_t v_at =
        k + (kTileRows + lane % 8 + lane / 16 * 8) * kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
      std::uint32_t columns[4];
      load_matrices_transposed(columns, v_at + b * 32);
      TensorCore<Row>::multiply(out_[b], columns, p0, p1);
    }
  }

  /// Sums over the keys that other lanes have; after the last add().
  __device__ void finish() {
#pragma unroll
    for (int d = 4; d < 32; d *= 2) {
      sum_[0] += __shfl_xor_sync(kWholeWarp, sum_[0], d);
      sum_[1] += __shfl_xor_sync(kWholeWarp, sum_[1], d);
    }
  }

  /// The finished output of `count` queries, `stride` elements apart.
  __device__ void store(std::uint16_t* out, std::int64_t stride, int count) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const float inverse[2] = {sum_[0] > 0.0F ? 1.0F / sum_[0] : 0.0F,
                              sum_[1] > 0.0F ? 1.0F / sum_[1] : 0.0F};
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t pair = transposed(TensorCore<Row>::pack(
            out_[b][2 * half] * inverse[0], out_[b][2 * half + 1] * inverse[1]));
        if (lane / 4 < count) {
          *reinterpret_cast<std::uint32_t*>(out + lane / 4 * stride + b * 16 + half * 8 +
                                            lane % 4 * 2) = pair;
        }
      }
    }
  }

  /// The state itself, as partial_floats() lays it out.
  __device__ void store_partial(float* partial) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int g = lane / 4;
    const int t = lane % 4;
    if (g < 2) {
      *reinterpret_cast<float2*>(partial + 2 * (2 * t + g)) =
          g == 0 ? make_float2(max_[0], sum_[0]) : make_float2(max_[1], sum_[1]);
    }
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        partial[partial_row<kDim>(2 * t + i % 2) + b * 16 + g + i / 2 * 8] = out_[b][i];
      }
    }
  }

 private:
  __device__ void rescale(const float (&top)[2]) {
    const float factor[2] = {exp2_fast(max_[0] - top[0]), exp2_fast(max_[1] - top[1])};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      max_[i] = top[i];
      sum_[i] *= factor[i];
    }
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[b][i] *= factor[i % 2];
    }
  }

  std::uint32_t q_[kDim / 16][2];
  std::uint32_t next_q_[kDim / 16][2];
  float out_[kDim / 16][4];
  float max_[2];
  float sum_[2];
};

/// Where an item's queries and output are.
struct ItemRows {
  std::int64_t row = 0;
  int first_head = 0;
  int count = 0;
};
__device__ inline ItemRows rows_of(const DecodeArgs& args, const Piece& piece) {
  const int first = piece.query_tile * kItemQueries;
  return {piece.query_row, piece.kv_head * args.group_size + first,
          min(args.group_size - first, kItemQueries)};
}

/// A block's warps: their work, and what each leaves over at its two ends. In shared memory.
struct BlockWork {
  WarpWork warps[16];     // 16: the most warps of a block
  const float* part[32];  ///< [2 x warps] partial results, in line order
  std::int32_t item[32];  ///< -1: none

  __device__ const Piece& piece(int slot) const {
    return slot % 2 == 0 ? warps[slot / 2].head : warps[slot / 2].tail;
  }
};

template <class Row>
__device__ void store_row(std::uint16_t* to, float sum, const float4& x) {
  const float inverse = sum > 0.0F ? 1.0F / sum : 0.0F;
  *reinterpret_cast<uint2*>(to) = make_uint2(TensorCore<Row>::pack(x.x * inverse, x.y * inverse),
                                             TensorCore<Row>::pack(x.z * inverse, x.w * inverse));
}

/// Merges an item whose `num_blocks` partial results all lie in block_partials. The first of them
/// is in its block's second place, all others in their block's first.
template <class Row, int kDim>
__device__ void merge_blocks(const DecodeArgs& args, const Piece& piece, float* shared) {
  constexpr int kVectors = kDim / 4;
  // Loads on their way at once: 33 blocks share one of 4 long heads on 132 multiprocessors, and two
  // halves of the block merge 17 of them each.
  constexpr int kBatch = 17;
  constexpr int kMostParts = kMaxBlocks / 32;
  const ItemRows rows = rows_of(args, piece);
  const int num_threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  const int count = piece.num_blocks;
  const int first_rank = piece.first_rank;
  const auto partial = [&](int p) {
    const int place = p == 0 ? 2 * first_rank + 1 : 2 * (first_rank + p);
    return args.scratch.block_partials + static_cast<std::int64_t>(place) * partial_floats(kDim);
  };
  float* weights = shared;                      // [count][8]
  float* sums = shared + count * kItemQueries;  // of the threads' parts
  const int vectors = rows.count * kVectors;
  const int num_parts = max(1, min(num_threads / vectors, count));
  const int part = num_parts > 1 ? thread / vectors : 0;

  const int warp = thread / 32;
  const int lane = thread % 32;
  for (int query = warp; query < rows.count; query += num_threads / 32) {
    float2 state[kMostParts];
#pragma unroll
    for (int i = 0; i < kMostParts; ++i) {
      const int p = lane + 32 * i;
      state[i] = p < count ? __ldcg(reinterpret_cast<const float2*>(partial(p)) + query)
                           : make_float2(kMasked, 0.0F);
    }
    float top = kMasked;
#pragma unroll
    for (int i = 0; i < kMostParts; ++i) top = fmaxf(top, state[i].x);
#pragma unroll
    for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(kWholeWarp, top, d));
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kMostParts; ++i) sum += exp2_fast(state[i].x - top) * state[i].y;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, d);
    const float inverse = sum > 0.0F ? 1.0F / sum : 0.0F;
#pragma unroll
    for (int i = 0; i < kMostParts; ++i) {
      const int p = lane + 32 * i;
      if (p < count) weights[p * kItemQueries + query] = exp2_fast(state[i].x - top) * inverse;
    }
  }

  // Each part of the threads takes every num_parts-th partial; their sums are added in order.
  for (int first = 0; first < vectors; first += num_threads) {
    const int i = first + thread % min(vectors, num_threads);
    const int query = i / kVectors;
    const int column = i % kVectors * 4;
    const bool works = i < vectors && part < num_parts;
    float4 out = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    float4 x[kBatch];
    int begin = part;
    const auto load = [&] {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int p = begin + b * num_parts;
        x[b] = works && p < count ? __ldcg(reinterpret_cast<const float4*>(
                                        partial(p) + partial_row<kDim>(query) + column))
                                  : make_float4(0.0F, 0.0F, 0.0F, 0.0F);
      }
    };
    load();
    if (first == 0) __syncthreads();  // the weights are there
    while (true) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int p = begin + b * num_parts;
        const float weight = works && p < count ? weights[p * kItemQueries + query] : 0.0F;
        out.x += weight * x[b].x;
        out.y += weight * x[b].y;
        out.z += weight * x[b].z;
        out.w += weight * x[b].w;
      }
      begin += kBatch * num_parts;
      if (begin >= count) break;
      load();
    }
    if (works && part > 0) {
      *reinterpret_cast<float4*>(sums + ((part - 1) * vectors + i) * 4) = out;
    }
    __syncthreads();
    if (works && part == 0) {
      for (int p = 1; p < num_parts; ++p) {
        const float4 x = *reinterpret_cast<const float4*>(sums + ((p - 1) * vectors + i) * 4);
        out.x += x.x;
        out.y += x.y;
        out.z += x.z;
        out.w += x.w;
      }
      store_row<Row>(row_at(args.out, rows.row, rows.first_head + query) + column, 1.0F, out);
    }
    __syncthreads();
  }
}

/// Merges the parts in `slots` of one item that the block's warps left over: into the output, or
/// into block_partials where other blocks share the item.
template <class Row, int kDim>
__device__ void merge_parts(const DecodeArgs& args, const BlockWork& block, unsigned slots) {
  constexpr int kVectors = kDim / 4;
  const Piece& piece = block.piece(__ffs(static_cast<int>(slots)) - 1);
  const ItemRows rows = rows_of(args, piece);
  const int num_blocks = piece.num_blocks;
  const int place = 2 * piece.block_rank + (piece.block_rank == piece.first_rank ? 1 : 0);
  float* to = args.scratch.block_partials + static_cast<std::int64_t>(place) * partial_floats(kDim);
  for (int i = static_cast<int>(threadIdx.x); i < rows.count * kVectors;
       i += static_cast<int>(blockDim.x)) {
    const int query = i / kVectors;
    const int column = i % kVectors * 4;
    float top = kMasked;
    float sum = 0.0F;
    float4 out = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    for (unsigned left = slots; left != 0; left &= left - 1) {
      const float* partial = block.part[__ffs(static_cast<int>(left)) - 1];
      const float2 state = *reinterpret_cast<const float2*>(partial + 2 * query);
      const float4 x =
          *reinterpret_cast<const float4*>(partial + partial_row<kDim>(query) + column);
      const float next = fmaxf(top, state.x);
      const float old_weight = exp2_fast(top - next);
      const float weight = exp2_fast(state.x - next);
      top = next;
      sum = sum * old_weight + state.y * weight;
      out.x = out.x * old_weight + x.x * weight;
      out.y = out.y * old_weight + x.y * weight;
      out.z = out.z * old_weight + x.z * weight;
      out.w = out.w * old_weight + x.w * weight;
    }
    if (num_blocks == 1) {
      store_row<Row>(row_at(args.out, rows.row, rows.first_head + query) + column, sum, out);
    } else {
      if (column == 0) *reinterpret_cast<float2*>(to + 2 * query) = make_float2(top, sum);
      *reinterpret_cast<float4*>(to + partial_row<kDim>(query) + column) = out;
    }
  }
}

/// Counts an arrival, wrapping to 0 with the last of them: what this block wrote is visible to the
/// last one, and what the others wrote is visible to this block if it is the last.
__device__ inline bool arrives_last(unsigned* arrived, unsigned num_blocks) {
  __threadfence();
  const unsigned before = atomicInc(arrived, num_blocks - 1);
  __threadfence();
  return before == num_blocks - 1;
}

/// Merges what the block's warps left over, and finishes what other blocks have left to it.
template <class Row, int kDim>
__device__ void merge_warps(const DecodeArgs& args, const BlockWork& block, float* shared) {
  __shared__ bool finishes[2];
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int num_slots = 2 * static_cast<int>(blockDim.x / 32);
  const int item = lane < num_slots ? block.item[lane] : -1;
  int handed_on[2] = {-1, -1};  // slots: only a block's first and last items can be shared
  for (unsigned left = __ballot_sync(kWholeWarp, item >= 0); left != 0;) {
    const int slot = __ffs(static_cast<int>(left)) - 1;
    const unsigned parts =
        __ballot_sync(kWholeWarp, item == __shfl_sync(kWholeWarp, item, slot)) & left;
    merge_parts<Row, kDim>(args, block, parts);
    if (block.piece(slot).num_blocks > 1) (handed_on[0] < 0 ? handed_on[0] : handed_on[1]) = slot;
    left &= ~parts;
  }
  if (handed_on[0] < 0) return;

  __syncthreads();  // the block's partials are written, its shared memory is free
  const int mine = threadIdx.x == 0 ? handed_on[0] : threadIdx.x == 1 ? handed_on[1] : -1;
  if (mine >= 0) {
    const Piece& piece = block.piece(mine);
    finishes[threadIdx.x] = arrives_last(args.scratch.arrived + piece.first_rank,
                                         static_cast<unsigned>(piece.num_blocks));
  }
  __syncthreads();
  if (finishes[0]) merge_blocks<Row, kDim>(args, block.piece(handed_on[0]), shared);
  if (handed_on[1] >= 0 && finishes[1]) {
    merge_blocks<Row, kDim>(args, block.piece(handed_on[1]), shared);
  }
}

/// One block a multiprocessor, all of them there for the whole launch; each warp streams its share
/// of the rows and the block merges once, at the end.
///
/// Traffic: each K and V row that is seen once for every 8 query heads of its group, 4 bytes of
/// page table for 16 rows, partial results of at most two items a block. Aims at the time that
/// reading the rows takes.
template <class Row, int kDim>
__global__ void __launch_bounds__(decode_max_warps(kDim) * 32, 1)
    decode_kernel(const __grid_constant__ DecodeArgs args) {
  extern __shared__ __align__(128) std::uint16_t ring_memory[];
  __shared__ BlockWork block;

  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp_idx = static_cast<int>(blockIdx.x * (blockDim.x / 32)) + warp;
  WarpWork& work = block.warps[warp];
  constexpr int kWorkVectors = sizeof(WarpWork) / sizeof(uint4);
  static_assert(kWorkVectors <= 32);
  if (lane < kWorkVectors) {
    reinterpret_cast<uint4*>(&work)[lane] =
        reinterpret_cast<const uint4*>(args.work.warps + warp_idx)[lane];
  }
  if (lane < 2) block.item[2 * warp + lane] = -1;
  __syncwarp();

  std::uint16_t* memory = ring_memory + warp * kDecodeStages * kDecodeTileElements<kDim>;
  TileRing<kDim> ring(args, work, memory);
  ring.start_after_append();
  release_next();
  DecodeState<Row, kDim> state;
  const int last_step = work.num_whole + 1;
  const bool has_more = work.num_whole > 0 || work.tail.count > 0;
  const auto piece_at = [&](int step) -> const Piece& {
    return step == 0           ? work.head
           : step == last_step ? work.tail
                               : args.work.items[work.first_whole + step - 1];
  };
  // The first piece from `step` on that is not empty; last_step + 1: none.
  const auto piece_from = [&](int step) {
    if (step == 0 && work.head.count == 0) ++step;
    if (step == last_step && work.tail.count == 0) ++step;
    return step;
  };
  const auto fetch = [&](int step) {
    if (step > last_step) return;
    const ItemRows rows = rows_of(args, piece_at(step));
    state.fetch(row_at(args.q, rows.row, rows.first_head), args.q.stride_h, rows.count);
  };
  int next = piece_from(0);
  fetch(next);
  while (next <= last_step) {
    const int step = next;
    const Piece& piece = piece_at(step);
    const ItemRows rows = rows_of(args, piece);
    state.start();
    next = piece_from(step + 1);
    fetch(next);
    for (bool more = true; more;) {
      const auto tile = ring.take();
      if (tile.low < tile.high) state.add(tile.k, tile.low, tile.high, args.scale_log2);
      more = !tile.ends_piece;
    }
    state.finish();
    if (step > 0 && step < last_step) {
      state.store(row_at(args.out, rows.row, rows.first_head), args.out.stride_h, rows.count);
      continue;
    }
    // The ring is still in use behind the part at the head of more work.
    float* partial =
        args.scratch.warp_partials + static_cast<std::int64_t>(warp_idx) * partial_floats(kDim);
    if (step == last_step || !has_more) {
      wait_copies<0>();
      __syncwarp();
      partial = reinterpret_cast<float*>(memory);
    }
    state.store_partial(partial);
    if (lane == 0) {
      const int slot = 2 * warp + (step == 0 ? 0 : 1);
      block.part[slot] = partial;
      block.item[slot] = piece.item;
    }
  }
  __syncthreads();
  merge_warps<Row, kDim>(args, block, reinterpret_cast<float*>(ring_memory));
}

}  // namespace detail

/// Warps of a decode block for rows of `dim` elements on a device of these limits.
inline int decode_warps_per_block(int dim, const DeviceLimits& limits) {
  constexpr std::size_t kStaticBytes = 4096;  // of the kernel, with room to spare
  const std::size_t fit = (static_cast<std::size_t>(limits.smem_per_block) - kStaticBytes) /
                          detail::decode_warp_bytes(dim);
  return std::min(detail::decode_max_warps(dim), static_cast<int>(fit));
}

/// Lets the kernel for `dim` use its shared memory; once, at set-up.
/// @return cudaErrorInvalidValue where `dim` is not one of Dims.
template <DeviceRow Row, class Dims = AllHeadDims>
cudaError_t prepare_decode(int dim, int warps_per_block) {
  return with_head_dim(Dims{}, dim, [&](auto d) {
    constexpr int kDim = decltype(d)::value;
    return cudaFuncSetAttribute(detail::decode_kernel<Row, kDim>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(static_cast<std::size_t>(warps_per_block) *
                                                 detail::decode_warp_bytes(kDim)));
  });
}

/// Attends one layer's decode tokens over everything their heads keep; their own rows have been
/// appended before. Safe in a graph: lengths and work come from device memory.
///
/// The launch reads work, page tables and rows of former steps while the stream's last kernel still
/// runs. Where that one launches its own successors early (programmatic dependent launch), it does
/// so after it has waited for its predecessors, as every kernel here does; others need no care.
/// @pre q and out are 16-byte aligned, their strides multiples of 8 elements; args.work was cut for
///   `grid` since the step began.
template <DeviceRow Row, class Dims = AllHeadDims>
cudaError_t decode(const DecodeArgs& args, int dim, DecodeGrid grid, bool chains_launches,
                   cudaStream_t stream) {
  return with_head_dim(Dims{}, dim, [&](auto d) {
    constexpr int kDim = decltype(d)::value;
    return launch_chained(
        detail::decode_kernel<Row, kDim>, dim3(static_cast<unsigned>(grid.num_blocks)),
        dim3(static_cast<unsigned>(grid.warps_per_block) * 32),
        static_cast<std::size_t>(grid.warps_per_block) * detail::decode_warp_bytes(kDim), stream,
        chains_launches, args);
  });
}

}  // namespace headwise::inline v0::cuda
