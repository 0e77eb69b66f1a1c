// SPDX-License-Identifier: MIT
/// @file decode.cuh
/// Decode: one new token of many sequences over heads of unequal length, in one launch.
///
/// work.cuh has cut the step into shares. A warp copies its share's tiles (ring.cuh, tile.cuh) and
/// adds them up (state.cuh); other warps put parts together (merge.cuh).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/decode/args.cuh"
#include "headwise/attention/cuda/decode/merge.cuh"
#include "headwise/attention/cuda/decode/ring.cuh"
#include "headwise/attention/cuda/decode/state.cuh"
#include "headwise/attention/cuda/decode/tile.cuh"
#include "headwise/attention/cuda/decode/work.cuh"
#include "headwise/attention/cuda/head_dims.cuh"
#include "headwise/attention/cuda/ptx/tensor_core.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/elements.cuh"

namespace headwise::inline v0::cuda {
namespace detail {

/// One block a multiprocessor, all of them there for the whole launch. Each worker warp streams its
/// share of the rows. What workers have of a wide piece is merged meanwhile by the block's other
/// warps, that of the last one by the workers themselves.
///
/// Traffic: each K and V row that is seen once for every 8 query heads of its group, 4 bytes of
/// page table for 16 rows, partial results of at most two pieces a block. Aims at the time that
/// reading the rows takes.
template <DeviceRow Row, DeviceIo Io, int kDim>
__global__ void __launch_bounds__((decode_max_workers(kDim) + kMergeWarps) * 32, 1)
    decode_kernel(const __grid_constant__ DecodeArgs args) {
  extern __shared__ __align__(1024) std::byte ring_memory[];
  __shared__ alignas(16) std::byte list_memory[decode_max_workers(kDim) * sizeof(WarpLists)];
  __shared__ MergeMemory merge_memory;

  const int warp = static_cast<int>(threadIdx.x / 32);
  const int first_warp = static_cast<int>(blockIdx.x) * num_workers();
  const PartialMemory<kDim> partials(ring_memory);
  if (threadIdx.x == 0) merge_memory.begin();
  __syncthreads();
  if (warp >= num_workers()) {
    release_next();  // the workers wait before the block ends, see decode()
    merge_pieces<Io, kDim>(args, args.work.warps[first_warp], nullptr, partials, merge_memory);
    return;
  }

  WarpLists& lists = reinterpret_cast<WarpLists*>(list_memory)[warp];
  lists.load(args.work, first_warp + warp);
  const WarpWork& work = lists.work;
  TileRing<kDim> ring(args, lists, ring_memory + warp * TileLayout<kDim>::kRingBytes);
  DecodeState<Row, Io, kDim> state;
  int piece = -1;  // whose tiles are in use; before the first tile there is none
  bool starts = true;
#pragma unroll 1
  for (int i = -TileRing<kDim>::kLead;; ++i) {
    const auto [at, source] = ring.next();
    if (i < -1) continue;
    if (starts) {
      if (i >= 0) {
        state.start();
        ++piece;
        starts = false;
      }
      const bool has_next = piece + 1 < work.num_pieces();
      const PieceRows rows = has_next ? rows_of(args, lists.piece(piece + 1)) : PieceRows{};
      const Bits<Io>* q = query_at<Io>(args, rows.row, rows.first_head);
      if (i < 0) {
        ring.start_after_append();
        release_next();
        if (!has_next) return;
      }
      state.fetch(q, args.q.stride_h, rows.count);
      if (i < 0) continue;
    }
    if (!source.is_empty()) state.add(at, source.low(), source.high(), args.scale_log2);
    if (!source.ends_piece()) continue;
    starts = true;
    state.finish();
    const bool is_last = piece + 1 == work.num_pieces();
    const int wide = piece - work.num_narrow;
    if (wide < 0) {
      const PieceRows rows = rows_of(args, lists.piece(piece));
      state.store(output_at<Io>(args, rows.row, rows.first_head), args.out.stride_h, rows.count);
      if (is_last) return;
    } else if (!is_last) {
      merge_memory.wait_for_room(wide);
      state.store_partial(partials.of_warp(warp));
      merge_memory.hand_over();
    } else {
      wait_copies<0>();
      __syncwarp();
      state.store_partial(partials.last_of_warp(warp));
      break;
    }
  }
  merge_pieces<Io, kDim>(args, work, &lists.piece(piece), partials, merge_memory);
}

}  // namespace detail

/// How a head width is decoded on a device; found once, at set-up.
///
/// The kernel goes by its address: where two translation units instantiate it, each may have its
/// own copy (nvcc's -static-global-template-stub), and only one has been prepared.
struct DecodeKernel {
  /// The kernel.
  void (*function)(DecodeArgs) = nullptr;
  DecodeGrid grid;             ///< as many workers as the device holds at once
  std::size_t smem_bytes = 0;  ///< of a block
};

/// Says how a head width is decoded on a device: everything but the kernel.
/// @return cudaErrorInvalidValue where `dim` is not one of Dims.
template <class Dims = AllHeadDims>
cudaError_t shape_decode(int dim, const DeviceLimits& limits, DecodeKernel& kernel) {
  return with_head_dim(Dims{}, dim, [&](auto d) {
    constexpr int kDim = decltype(d)::value;
    constexpr int kWarpBytes = detail::PartialMemory<kDim>::kWarpBytes;
    // The kernel's own shared memory: lists, and what merging needs, padded to 1024.
    constexpr int kStaticBytes =
        detail::decode_max_workers(kDim) * static_cast<int>(sizeof(detail::WarpLists)) +
        static_cast<int>(sizeof(detail::MergeMemory)) + 1024;
    const int workers = std::min(detail::decode_max_workers(kDim),
                                 (limits.smem_per_block - kStaticBytes) / kWarpBytes);
    kernel = {nullptr,
              {std::min(limits.num_sms, detail::kCutThreads), workers},
              static_cast<std::size_t>(workers * kWarpBytes)};
    return cudaSuccess;
  });
}

/// Finds the kernel for `dim` and lets it use its shared memory; once, at set-up.
/// @return cudaErrorInvalidValue where `dim` is not one of Dims.
template <DeviceRow Row, class Dims = AllHeadDims, DeviceIo Io = Row>
cudaError_t prepare_decode(int dim, const DeviceLimits& limits, DecodeKernel& kernel) {
  return with_head_dim(Dims{}, dim, [&](auto d) {
    constexpr int kDim = decltype(d)::value;
    if (const cudaError_t e = shape_decode<Dims>(dim, limits, kernel); e != cudaSuccess) return e;
    kernel.function = detail::decode_kernel<Row, Io, kDim>;
    return cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(kernel.smem_bytes));
  });
}

/// Attends one layer's decode tokens over everything their heads keep; their own rows have been
/// appended before. Safe in a graph: lengths and work come from device memory.
///
/// The launch reads work, page tables and rows of former steps while the stream's last kernel still
/// runs. Where that one launches its own successors early (programmatic dependent launch), it does
/// so after it has waited for its predecessors, as append does. A decode launch may release its
/// successors before it has waited, but never ends before: who waits for it has waited for all.
/// @pre q and out are 16-byte aligned, their strides multiples of 16 bytes; args.work was cut for
///   `kernel.grid` since the step began.
inline cudaError_t decode(const DecodeArgs& args, const DecodeKernel& kernel, bool chains_launches,
                          cudaStream_t stream) {
  return launch_chained(
      kernel.function, dim3(static_cast<unsigned>(kernel.grid.num_blocks)),
      dim3(static_cast<unsigned>(kernel.grid.workers_per_block + detail::kMergeWarps) * 32),
      kernel.smem_bytes, stream, chains_launches, args);
}

}  // namespace headwise::inline v0::cuda
