// SPDX-License-Identifier: MIT
/// @file args.cuh
/// What every part of the decode kernel is told: the step, the work, the scratch, q and out.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "headwise/attention/cuda/decode/work.cuh"
#include "headwise/cache/cuda/elements.cuh"
#include "headwise/cache/cuda/step_state.cuh"

namespace headwise::inline v0::cuda {

/// Partial results between the blocks of a launch; free again when it ends, counters back at 0.
struct DecodeScratch {
  float* block_partials = nullptr;  ///< [2 num_blocks][detail::partial_floats(dim)]
  unsigned* arrived = nullptr;      ///< [num_blocks]
};

/// One layer's decode as a kernel's parameters.
struct DecodeArgs {
  DeviceStep step;              ///< the open step and the pages
  DecodeWork work;              ///< which warp does which part
  DecodeScratch scratch;        ///< between the blocks
  RowsAt<const void*> q;        ///< [rows, num_qo_heads, dim] of the kernel's Io
  RowsAt<void*> out;            ///< [rows, num_qo_heads, dim] of the kernel's Io
  std::int32_t group_size = 1;  ///< query heads per KV head
  float scale_log2 = 1.0F;      ///< softmax scale x log2(e)
  /// [num_kv_heads] which table of its class's each KV head has.
  std::int32_t idx_in_class[kMaxHeads] = {};
};

namespace detail {

/// Warps of a block that stream rows. With 12 or 8 of them, and 4 that merge, there are 128 and 168
/// registers a thread, which the kernel needs at widths up to 64 and up to 128.
__host__ __device__ constexpr int decode_max_workers(int dim) {
  return dim <= 64 ? 12 : dim <= 128 ? 8 : 4;
}
static_assert(decode_max_workers(1) <= kMostWorkers);  // the narrowest width has most
/// Warps of a block that merge what the others have of one wide piece while those stream the next.
inline constexpr int kMergeWarps = 4;

/// A decode block's warps that stream rows; the merging ones come after them.
__device__ inline int num_workers() { return static_cast<int>(blockDim.x / 32) - kMergeWarps; }

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

/// Where a piece's queries and output are.
struct PieceRows {
  std::int64_t row = 0;
  int first_head = 0;
  int count = 0;
};
__device__ inline PieceRows rows_of(const DecodeArgs& args, const Piece& piece) {
  const int first = piece.query_tile * kItemQueries;
  return {piece.query_row, piece.kv_head * args.group_size + first,
          min(args.group_size - first, kItemQueries)};
}

}  // namespace detail
}  // namespace headwise::inline v0::cuda
