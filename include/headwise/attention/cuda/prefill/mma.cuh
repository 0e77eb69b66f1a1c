// SPDX-License-Identifier: MIT
/// @file mma.cuh
/// The prefill kernel of mma.sync: every head width, compute capability 8.0 and up.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/prefill/softmax.cuh"
#include "headwise/attention/cuda/prefill/tile.cuh"
#include "headwise/attention/cuda/ptx/tensor_core.cuh"
#include "headwise/cache/cuda/elements.cuh"

namespace headwise::inline v0::cuda::detail {

inline constexpr int kMmaWarps = 4;
/// Keys handled at once. With 32 tokens of 4 heads a tile, a window of 64 + 256 costs 11 blocks of
/// 32: 352 keys where 320 are seen; blocks of 64 would cost 384.
inline constexpr int kMmaKeys = 32;
inline constexpr int kMmaStages = 3;

/// Tiles of 16 query rows in a warp: two share each K and V fragment, which halves the reads of
/// shared memory; width 256 has no registers for it.
__host__ __device__ constexpr int mma_row_tiles(int dim) { return dim <= 128 ? 2 : 1; }
__host__ __device__ constexpr int mma_rows(int dim) { return kMmaWarps * 16 * mma_row_tiles(dim); }

__host__ __device__ constexpr std::size_t mma_bytes(int dim) {
  const auto row = static_cast<std::size_t>(dim + 8) * 2;
  return (static_cast<std::size_t>(mma_rows(dim)) + kMmaStages * 2 * kMmaKeys) * row;
}

/// A warp's query rows, their results and their softmax.
template <class Row, int kDim, SoftmaxKind Softmax>
class MmaRows {
 public:
  static constexpr int kTiles = mma_row_tiles(kDim);

  /// @param row  the warp's first row in the tile.
  __device__ MmaRows(const PrefillTile& tile, const QueryGroup& group, int row) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      softmax_[m].begin(tile, group, row + m * 16 + lane / 4);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[m][n][i] = 0.0F;
      }
    }
  }

  /// Adds keys [first, first + kMmaKeys) of the tile's list.
  /// @param lane_rows  the lane's first two rows of the warp's.
  /// @param q, k  shared-memory addresses of the warp's query rows and of the keys; V behind K.
  /// @param needs_mask  whether some row does not see some key.
  __device__ void add(const LaneRows& lane_rows, std::uint32_t q, std::uint32_t k, int first,
                      bool needs_mask) {
    Scores score = {};
    multiply_keys(q, k, score);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      softmax_[m].shape(at(lane_rows, m), first, score[m]);
      if (needs_mask) softmax_[m].mask(first, score[m]);
      float factor[2];
      const float scale_log2 = RowSoftmax<Row, Softmax>::scale_log2(lane_rows.args);
      if (softmax_[m].add(scale_log2, score[m], factor)) scale_rows(factor, out_[m]);
    }
    multiply_values(k + kMmaKeys * kRowBytes, score);
  }

  /// Adds what stands for dropped rows; after the last keys.
  __device__ void add_compensation(const LaneRows& lane_rows) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) softmax_[m].add_compensation(at(lane_rows, m), out_[m]);
  }

  /// Writes the rows' outputs over the warp's query rows in shared memory.
  /// @return bit r: row r of the warp has become no number.
  __device__ unsigned store(const LaneRows& lane_rows, std::uint16_t* rows) const {
    unsigned again = 0;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      again |= softmax_[m].template store<kDim>(at(lane_rows, m), out_[m],
                                                rows + m * 16 * kPaddedDim<kDim>)
               << (16 * m);
    }
    return again;
  }

 private:
  static constexpr int kRowBytes = kPaddedDim<kDim> * 2;
  using Scores = float[kTiles][kMmaKeys / 8][4];

  /// The lane's rows in tile `m`.
  static __device__ LaneRows at(const LaneRows& first, int m) {
    return {first.args, first.tile, first.group, first.first + m * 16};
  }
  __device__ void multiply_keys(std::uint32_t q, std::uint32_t k, Scores& score) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const std::uint32_t q_at = q + (lane % 16) * kRowBytes + lane / 16 * 16;
    const std::uint32_t k_at = k + (lane % 8 + lane / 16 * 8) * kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
      std::uint32_t rows[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) load_matrices(rows[m], q_at + m * 16 * kRowBytes + b * 32);
#pragma unroll
      for (int n = 0; n < kMmaKeys / 16; ++n) {
        std::uint32_t keys[4];
        load_matrices(keys, k_at + n * 16 * kRowBytes + b * 32);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          TensorCore<Row>::multiply(score[m][2 * n], rows[m], keys[0], keys[1]);
          TensorCore<Row>::multiply(score[m][2 * n + 1], rows[m], keys[2], keys[3]);
        }
      }
    }
  }

  __device__ void multiply_values(std::uint32_t v, const Scores& weight) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const std::uint32_t v_at = v + (lane % 16) * kRowBytes + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < kMmaKeys / 16; ++k) {
      std::uint32_t rows[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &weight[m][2 * k + i / 2][i % 2 * 2];
          rows[m][i] = Pair<Row>::pack(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        std::uint32_t values[4];
        load_matrices_transposed(values, v_at + k * 16 * kRowBytes + n * 32);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          TensorCore<Row>::multiply(out_[m][2 * n], rows[m], values[0], values[1]);
          TensorCore<Row>::multiply(out_[m][2 * n + 1], rows[m], values[2], values[3]);
        }
      }
    }
  }

  RowSoftmax<Row, Softmax> softmax_[kTiles];
  float out_[kTiles][kDim / 8][4];
};

/// One block a tile of tokens and KV head: grid [tiles of all chunks, heads].
///
/// Cost: a tile reads the keys that any of its tokens sees, so a streaming head costs O(n x
/// window). Aims at mma.sync's rate; published kernels of this class run 260-350 TFLOP/s on an
/// H200.
template <class Row, int kDim, SoftmaxKind Softmax = PlainSoftmax>
__global__ void __launch_bounds__(kMmaWarps * 32, kDim <= 128 ? 2 : 1)
    prefill_mma_kernel(const __grid_constant__ PrefillArgs args,
                       unsigned /*num_tiles: the grid's*/) {
  extern __shared__ __align__(128) std::uint16_t memory[];
  __shared__ PrefillTile tile;
  constexpr int kRowsPerWarp = 16 * mma_row_tiles(kDim);
  constexpr int kRows = mma_rows(kDim);
  constexpr int kRowBytes = kPaddedDim<kDim> * 2;
  constexpr int kStageBytes = 2 * kMmaKeys * kRowBytes;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const QueryGroup group(args.group_size);
  if (warp == 0) {
    const int tile_tokens = kRows / group.size;
    // The last tokens see most: they start first.
    const ChunkTile chunk = find_chunk(args.step, static_cast<int>(gridDim.x - 1 - blockIdx.x),
                                       tile_tokens, args.group_size);
    if (threadIdx.x == 0) {
      tile.num_tokens = 0;
      tile.piece.chunk = -1;  // nothing has been described yet
      TilePiece piece;
      piece.chunk = chunk.chunk;
      piece.tile = chunk.index;
      piece.head = static_cast<int>(blockIdx.y);
      if (chunk.chunk >= 0) describe(args, piece, tile_tokens, tile, tile);
    }
  }
  __syncthreads();
  if (tile.num_tokens == 0) return;

  std::uint16_t* q_rows = memory;
  const std::uint32_t stages = shared_address(memory) + kRows * kRowBytes;
  const std::uint32_t queries = shared_address(q_rows + warp * kRowsPerWarp * kPaddedDim<kDim>);
  copy_rows<kDim, kRowsPerWarp>(
      find_query(args, tile, group,
                 warp * kRowsPerWarp + static_cast<int>(threadIdx.x % kRowsPerWarp)),
      [&](int row, int chunk) { return queries + row * kRowBytes + chunk * 16; });
  int copied = 0;
  const auto copy_next = [&](int stage) {
    if (copied < tile.keys.count) {
      constexpr int kShare = kMmaKeys / kMmaWarps;
      const int lane = static_cast<int>(threadIdx.x % 32);
      const KeyRows rows = find_key<kDim>(args, tile, copied + warp * kShare + lane % kShare);
      const std::uint32_t to =
          stages + static_cast<std::uint32_t>(stage * kStageBytes + warp * kShare * kRowBytes);
      copy_rows<kDim, kShare>(
          rows.k, [&](int row, int chunk) { return to + row * kRowBytes + chunk * 16; });
      copy_rows<kDim, kShare>(rows.v, [&](int row, int chunk) {
        return to + (kMmaKeys + row) * kRowBytes + chunk * 16;
      });
      copied += kMmaKeys;
    }
    commit_copies();
  };
  for (int i = 0; i < kMmaStages - 1; ++i) copy_next(i);

  const int warp_row = warp * kRowsPerWarp;
  const int oldest = tile.pos_of(warp_row, group);
  const int newest = tile.pos_of(warp_row + kRowsPerWarp - 1, group);
  const SeenByAll seen_by_all(tile.keys, tile.state, oldest, newest);
  const SeenKeys seen_first(tile.keys, tile.state, oldest);
  const SeenKeys seen_last(tile.keys, tile.state, newest);
  MmaRows<Row, kDim, Softmax> rows(tile, group, warp_row);
  const LaneRows lane_rows{args, tile, group, warp_row + static_cast<int>(threadIdx.x % 32) / 4};
  const std::uint32_t q_at = shared_address(q_rows + warp_row * kPaddedDim<kDim>);
  int stage = 0;
  for (int first = 0; first < tile.keys.count; first += kMmaKeys) {
    wait_copies<kMmaStages - 2>();
    __syncthreads();  // all threads' copies have landed; the stage before is no longer read
    copy_next(stage == 0 ? kMmaStages - 1 : stage - 1);
    // Whether any row of this warp sees any of the keys.
    const bool some_seen =
        first < seen_last.end && (first < seen_last.sinks || first + kMmaKeys > seen_first.recent);
    if (some_seen) {
      rows.add(lane_rows, q_at, stages + static_cast<std::uint32_t>(stage * kStageBytes), first,
               !seen_by_all.contains(first, kMmaKeys));
    }
    stage = stage + 1 == kMmaStages ? 0 : stage + 1;
  }

  // Through shared memory, so that rows leave in 16-byte pieces.
  std::uint16_t* own_rows = q_rows + warp_row * kPaddedDim<kDim>;
  __syncwarp();
  if constexpr (Softmax::kHasCompensation) rows.add_compensation(lane_rows);
  const unsigned again = rows.store(lane_rows, own_rows);
  __syncwarp();
  write_outputs<kDim, kRowsPerWarp>(args, tile, group, warp_row, [&](int row, int chunk) {
    return reinterpret_cast<const uint4*>(own_rows + row * kPaddedDim<kDim> + chunk * 8);
  });
  __syncwarp();
  attend_exactly<Row, kDim, Softmax>(args, tile, group, warp_row, again);
}

}  // namespace headwise::inline v0::cuda::detail
