// SPDX-License-Identifier: MIT
/// @file decode.cuh
/// Decode: one new token of many sequences over heads of unequal length, in one launch.
///
/// decode_work.cuh has cut the step into shares. A warp copies its share's tiles (decode_ring.cuh,
/// decode_tile.cuh) and adds them up (decode_state.cuh); decode_merge.cuh puts parts together.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/decode_args.cuh"
#include "headwise/attention/cuda/decode_merge.cuh"
#include "headwise/attention/cuda/decode_ring.cuh"
#include "headwise/attention/cuda/decode_state.cuh"
#include "headwise/attention/cuda/decode_tile.cuh"
#include "headwise/attention/cuda/decode_work.cuh"
#include "headwise/attention/cuda/head_dims.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/device_cache.cuh"

namespace headwise::inline v0::cuda {
namespace detail {

/// One block a multiprocessor, all of them there for the whole launch; each warp streams its share
/// of the rows and the block merges once, at the end.
///
/// Traffic: each K and V row that is seen once for every 8 query heads of its group, 4 bytes of
/// page table for 16 rows, partial results of at most two items a block. Aims at the time that
/// reading the rows takes.
template <class Row, int kDim>
__global__ void __launch_bounds__(decode_max_warps(kDim) * 32, 1)
    decode_kernel(const __grid_constant__ DecodeArgs args) {
  extern __shared__ __align__(1024) std::byte ring_memory[];
  __shared__ alignas(16) std::byte list_memory[decode_max_warps(kDim) * sizeof(WarpLists)];
  __shared__ BlockParts parts;

  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp_idx = static_cast<int>(blockIdx.x * (blockDim.x / 32)) + warp;
  WarpLists& lists = reinterpret_cast<WarpLists*>(list_memory)[warp];
  std::byte* memory = ring_memory + warp * TileLayout<kDim>::kRingBytes;
  if (lane < 2) parts.clear(2 * warp + lane);
  lists.load(args.work, warp_idx);
  const WarpWork& work = lists.work;

  TileRing<kDim> ring(args, lists, memory);
  DecodeState<Row, kDim> state;
  const int last_step = work.num_whole + 1;
  const auto piece_at = [&](int step) -> const Piece& {
    return step == 0 ? work.head : step == last_step ? work.tail : lists.item(step - 1);
  };
  // The first piece from `step` on that is not empty; last_step + 1: none.
  const auto piece_from = [&](int step) {
    if (step == 0 && work.head.count == 0) ++step;
    if (step == last_step && work.tail.count == 0) ++step;
    return step;
  };
  int step = -1;  // the piece whose tiles are in use; before the first tile there is none
  int next = piece_from(0);
  bool starts = true;
#pragma unroll 1
  for (int i = -TileRing<kDim>::kLead;; ++i) {
    const auto [at, source] = ring.next();
    if (i < -1) continue;
    if (starts) {
      if (i >= 0) {
        state.start();
        step = next;
        next = piece_from(step + 1);
        starts = false;
      }
      const ItemRows rows = next <= last_step ? rows_of(args, piece_at(next)) : ItemRows{};
      const std::uint16_t* q = row_at(args.q, rows.row, rows.first_head);
      if (i < 0) {
        ring.start_after_append();
        release_next();
        if (next > last_step) break;
      }
      state.fetch(q, args.q.stride_h, rows.count);
      if (i < 0) continue;
    }
    if (!source.is_empty()) state.add(at, source.low(), source.high(), args.scale_log2);
    if (!source.ends_piece()) continue;
    state.finish();
    const Piece& piece = piece_at(step);
    if (step > 0 && step < last_step) {
      const ItemRows rows = rows_of(args, piece);
      state.store(row_at(args.out, rows.row, rows.first_head), args.out.stride_h, rows.count);
    } else {
      // The ring is still in use where more work follows.
      float* partial =
          args.scratch.warp_partials + static_cast<std::int64_t>(warp_idx) * partial_floats(kDim);
      if (next > last_step) {
        wait_copies<0>();
        __syncwarp();
        partial = reinterpret_cast<float*>(memory);
      }
      state.store_partial(partial);
      if (lane == 0) parts.set(2 * warp + (step == 0 ? 0 : 1), piece, partial);
    }
    if (next > last_step) break;
    starts = true;
  }
  __syncthreads();
  merge_warps<Row, kDim>(args, parts, reinterpret_cast<float*>(ring_memory));
}

}  // namespace detail

/// How a head width is decoded on a device; found once, at set-up.
///
/// The kernel goes by its address: where two translation units instantiate it, each may have its
/// own copy (nvcc's -static-global-template-stub), and only one has been prepared.
struct DecodeKernel {
  /// The kernel.
  void (*function)(DecodeArgs) = nullptr;
  DecodeGrid grid;             ///< as many warps as the device holds at once
  std::size_t smem_bytes = 0;  ///< of a block
};

/// Finds the kernel for `dim` and lets it use its shared memory; once, at set-up.
/// @return cudaErrorInvalidValue where `dim` is not one of Dims.
template <DeviceRow Row, class Dims = AllHeadDims>
cudaError_t prepare_decode(int dim, const DeviceLimits& limits, DecodeKernel& kernel) {
  return with_head_dim(Dims{}, dim, [&](auto d) {
    constexpr int kDim = decltype(d)::value;
    constexpr int kRingBytes = detail::TileLayout<kDim>::kRingBytes;
    // The kernel's own shared memory: lists, parts and two flags, each aligned.
    constexpr int kStaticBytes =
        detail::decode_max_warps(kDim) * static_cast<int>(sizeof(detail::WarpLists)) +
        static_cast<int>(sizeof(detail::BlockParts)) + 1024;
    const int warps = std::min(detail::decode_max_warps(kDim),
                               (limits.smem_per_block - kStaticBytes) / kRingBytes);
    kernel = {detail::decode_kernel<Row, kDim>,
              {std::min(limits.num_sms, detail::kCutThreads), warps},
              static_cast<std::size_t>(warps * kRingBytes)};
    return cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(kernel.smem_bytes));
  });
}

/// Attends one layer's decode tokens over everything their heads keep; their own rows have been
/// appended before. Safe in a graph: lengths and work come from device memory.
///
/// The launch reads work, page tables and rows of former steps while the stream's last kernel still
/// runs. Where that one launches its own successors early (programmatic dependent launch), it does
/// so after it has waited for its predecessors, as every kernel here does; others need no care.
/// @pre q and out are 16-byte aligned, their strides multiples of 8 elements; args.work was cut for
///   `kernel.grid` since the step began.
inline cudaError_t decode(const DecodeArgs& args, const DecodeKernel& kernel, bool chains_launches,
                          cudaStream_t stream) {
  return launch_chained(kernel.function, dim3(static_cast<unsigned>(kernel.grid.num_blocks)),
                        dim3(static_cast<unsigned>(kernel.grid.warps_per_block) * 32),
                        kernel.smem_bytes, stream, chains_launches, args);
}

}  // namespace headwise::inline v0::cuda
