// SPDX-License-Identifier: MIT
/// @file args.cuh
/// What every part of the decode kernel is told: the step, the work, the scratch, q and out.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "headwise/attention/cuda/decode/work.cuh"
#include "headwise/attention/cuda/softmax_kind.cuh"
#include "headwise/cache/cuda/elements.cuh"
#include "headwise/cache/cuda/step_state.cuh"

namespace headwise::inline v0::cuda {

/// Counters of an item that blocks share: those that arrived, slices of its merge that were
/// claimed, blocks that left.
inline constexpr int kItemCounters = 3;

/// Partial results between the blocks of a launch; free again when it ends, counters back at 0.
struct DecodeScratch {
  float* block_partials = nullptr;  ///< [2 num_blocks][detail::partial_floats(dim, rows)]
  unsigned* arrived = nullptr;      ///< [num_blocks][kItemCounters], of each item's first block
  /// [num_blocks][workers_per_block][detail::partial_floats(dim, rows)], but for the first size.
  float* worker_partials = nullptr;
};

/// One layer's decode as a kernel's parameters.
struct DecodeArgs {
  DeviceStep step;              ///< the open step and the pages
  DecodeWork work;              ///< which warp does which part
  DecodeScratch scratch;        ///< between the blocks
  RowsAt<const void*> q;        ///< [rows, num_qo_heads, dim] of the kernel's Io
  RowsAt<const void*> k;        ///< [rows, num_kv_heads, dim] likewise: the step's own rows
  RowsAt<const void*> v;        ///< [rows, num_kv_heads, dim] likewise; null: they are stored
  RowsAt<void*> out;            ///< [rows, num_qo_heads, dim] of the kernel's Io
  std::int32_t group_size = 1;  ///< query heads per KV head
  float scale_log2 = 1.0F;      ///< softmax scale x log2(e)
  bool stores = false;          ///< whether the launch stores k and v in their pages
  /// Counts elements that were finite in k or v and are infinite as stored.
  unsigned long long* overflows = nullptr;
  /// [num_kv_heads] which table of its class's each KV head has.
  std::int32_t idx_in_class[kMaxHeads] = {};
  SoftmaxArgs softmax;  ///< what the softmax has besides a scale
};

namespace detail {

/// Warps of a block that stream rows. With 12 or 8 of them, and 4 that merge, there are 128 and 168
/// registers a thread, which the kernel needs at widths up to 64 and up to 128. What is used for
/// every tile may not be spilled: while all multiprocessors stream rows, a load that misses the
/// little L1 cache beside the rings takes microseconds.
__host__ __device__ constexpr int decode_max_warps(int dim) {
  return dim <= 64 ? 12 : dim <= 128 ? 8 : 4;
}
/// Workers of a block: warps, or as many together as share a tile.
__host__ __device__ constexpr int decode_max_workers(int dim, int size) {
  return decode_max_warps(dim) / DecodeSize(size).warps;
}
static_assert(decode_max_workers(1, 0) <= kMostWorkers);  // the narrowest width has most
/// A kernel's size of items, what their softmax has, and who does what in its blocks. The merging
/// warps come last.
template <int kSizeIndex, SoftmaxKind SoftmaxOfItems = PlainSoftmax>
struct ItemSize {
  using Softmax = SoftmaxOfItems;
  static constexpr int kIndex = kSizeIndex;
  static constexpr int kRows = DecodeSize(kIndex).rows;
  static constexpr int kWarps = DecodeSize(kIndex).warps;  ///< of a worker
  static constexpr int kThreads = kWarps * 32;             ///< of a worker
  static constexpr int kTileRows = DecodeSize(kIndex).tile_rows();
  static constexpr int kColumns = kRows / kWarps / 8;  ///< 8 query rows each, of a warp
  /// Whether all blocks of an item merge it, see SharedItem.
  static constexpr bool kSharesMerges = kIndex > 0;
  /// Warps of a block that merge what the others have of one wide piece while those stream the
  /// next.
  static constexpr int kMergeWarps = 4;
  static constexpr bool kChunks = kIndex > 0;  ///< of several tokens come, too

  static __device__ int num_worker_threads() {
    return static_cast<int>(blockDim.x) - kMergeWarps * 32;
  }
  static __device__ int num_workers() { return num_worker_threads() / kThreads; }
  static __device__ int worker() { return static_cast<int>(threadIdx.x) / kThreads; }
  /// In the worker.
  static __device__ int thread() { return static_cast<int>(threadIdx.x) % kThreads; }
  static __device__ int warp() { return thread() / 32; }
  static __device__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  /// The worker's threads meet.
  static __device__ void meet() {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {  // barrier 0 is __syncthreads'
      asm volatile("bar.sync %0, %1;" ::"r"(1 + worker()), "n"(kThreads) : "memory");
    }
  }
};

/// A query's row.
template <DeviceIo Io>
__device__ __forceinline__ const Bits<Io>* query_at(const DecodeArgs& args, std::int64_t row,
                                                    int head) {
  return static_cast<const Bits<Io>*>(args.q.data) + row * args.q.stride_n + head * args.q.stride_h;
}
/// An output's row.
template <DeviceIo Io>
__device__ __forceinline__ Bits<Io>* output_at(const DecodeArgs& args, std::int64_t row, int head) {
  return static_cast<Bits<Io>*>(args.out.data) + row * args.out.stride_n + head * args.out.stride_h;
}

/// A piece's query rows: (token, query head of the group).
struct PieceRows {
  int query_row = 0;   ///< of the step's first token in q and out
  int first_head = 0;  ///< of the KV head's group
  int first = 0;       ///< of the KV head's rows
  int count = 0;
  int group_size = 1;

  __device__ int token_of(int row) const { return (first + row) / group_size; }
  /// The layer's query head.
  __device__ int head_of(int row) const {
    return first_head + first + row - token_of(row) * group_size;
  }
  template <DeviceIo Io>
  __device__ const Bits<Io>* query(const DecodeArgs& args, int row) const {
    const int token = token_of(row);
    return query_at<Io>(args, query_row + token, first_head + first + row - token * group_size);
  }
  template <DeviceIo Io>
  __device__ Bits<Io>* output(const DecodeArgs& args, int row) const {
    const int token = token_of(row);
    return output_at<Io>(args, query_row + token, first_head + first + row - token * group_size);
  }
};
template <class Size>
__device__ PieceRows rows_of(const DecodeArgs& args, const Piece& piece) {
  const int rows = piece.num_tokens * args.group_size - piece.first_row;
  return {piece.query_row, piece.kv_head * args.group_size, piece.first_row, min(rows, Size::kRows),
          args.group_size};
}

}  // namespace detail
}  // namespace headwise::inline v0::cuda
