// SPDX-License-Identifier: MIT
/// @file decode.cuh
/// Decode: one new token, or a few, of many sequences over heads of unequal length, in one launch
/// for each size of items that the step has.
///
/// work.cuh has cut the step into shares. A worker copies its share's tiles (ring.cuh, tile.cuh)
/// and adds them up (state.cuh); other warps put parts together (merge.cuh).
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
#include "headwise/attention/cuda/softmax_kind.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/elements.cuh"

namespace headwise::inline v0::cuda {
namespace detail {

/// One block a multiprocessor, all of them there for the whole launch. Each worker streams its
/// share of the rows. What workers have of a wide piece is merged meanwhile by the block's other
/// warps, that of the last one by the workers themselves.
///
/// Traffic: each K and V row that is seen once for an item's query rows, 4 bytes of page table for
/// a tile, partial results of at most two pieces a block. Aims at the time that reading the rows
/// takes.
template <DeviceRow Row, DeviceIo Io, int kDim, class Size>
__global__ void __launch_bounds__((decode_max_warps(kDim) + Size::kMergeWarps) * 32, 1)
    decode_kernel(const __grid_constant__ DecodeArgs args) {
  constexpr int kMostWorkersHere = decode_max_workers(kDim, Size::kIndex);
  using Ring = TileRing<Row, Io, kDim, Size>;
  using Layout = typename Ring::Layout;
  extern __shared__ __align__(1024) std::byte ring_memory[];
  __shared__ alignas(16) std::byte list_memory[kMostWorkersHere * sizeof(WorkerLists<Size>)];
  __shared__ MergeMemory<Size> merge_memory;

  const int worker = Size::worker();
  const int first_worker = static_cast<int>(blockIdx.x) * Size::num_workers();
  const PartialMemory<kDim, Size> partials(ring_memory, args.scratch);
  if (threadIdx.x == 0) merge_memory.begin();
  __syncthreads();
  if (worker >= Size::num_workers()) {
    release_next();  // the workers wait before the block ends, see decode()
    merge_pieces<Row, Io, kDim, Size>(args, args.work.workers[first_worker], nullptr, partials,
                                      merge_memory);
    return;
  }

  WorkerLists<Size>& lists = reinterpret_cast<WorkerLists<Size>*>(list_memory)[worker];
  lists.load(args.work, first_worker + worker);
  const WorkerWork& work = lists.work;
  Ring ring(args, lists, ring_memory + worker * Layout::kRingBytes);
  DecodeState<Row, Io, kDim, Size> state;
  int piece = -1;  // whose tiles are in use; before the first tile there is none
  bool starts = true;
#pragma unroll 1
  for (;;) {
    const auto [at, source] = ring.next();
    const int i = ring.index();
    if (i < -1) continue;
    if (starts) {
      if (i >= 0) {
        ++piece;
        state.start(args, lists.piece(piece));
        starts = false;
      }
      const bool has_next = piece + 1 < work.num_pieces();
      const PieceRows rows = has_next ? rows_of<Size>(args, lists.piece(piece + 1)) : PieceRows{};
      if (i < 0) {
        ring.start_after_append();
        release_next();
        if (!has_next) return;
      }
      state.fetch(args, rows);
      if (i < 0) continue;
    }
#pragma unroll 1
    for (int first = 0; first < Size::kTileRows; first += 16) {
      TileRows rows{at + static_cast<std::uint32_t>(first * Layout::kRowBytes),
                    at + static_cast<std::uint32_t>(Layout::kValues + first * Layout::kRowBytes),
                    max(source.low() - first, 0), min(source.high() - first, 16)};
      if constexpr (Size::kChunks) {
        rows.is_ragged = source.has(TileSource::kRagged);
        rows.position = ring.position() + first;
        rows.piece = &lists.piece(piece);
        rows.group_size = args.group_size;
      }
      if constexpr (Size::Softmax::kShapesScores) {
        rows.position = ring.position() + first;
        rows.is_in_slots = source.has(TileSource::kSlots);
        rows.piece = &lists.piece(piece);
        rows.group_size = args.group_size;
      }
      if (rows.low < rows.high) state.add(rows, args.scale_log2, args.softmax);
    }
    if (!source.has(TileSource::kEndsPiece)) continue;
    starts = true;
    state.finish();
    const bool is_last = piece + 1 == work.num_pieces();
    const int wide = piece - work.num_narrow;
    if (wide < 0) {
      if constexpr (Size::Softmax::kHasCompensation) {
        state.add_compensation(args, lists.piece(piece));
      }
      state.store(args, rows_of<Size>(args, lists.piece(piece)));
      if (is_last) return;
    } else if (!is_last) {
      merge_memory.wait_for_room(wide);
      state.store_partial(partials.of_worker(worker));
      merge_memory.hand_over();
    } else {
      wait_copies<0>();
      Size::meet();
      state.store_partial(partials.last_of_worker(worker));
      break;
    }
  }
  merge_pieces<Row, Io, kDim, Size>(args, work, &lists.piece(piece), partials, merge_memory);
}

}  // namespace detail

/// How items of one size and a head width are decoded on a device; found once, at set-up.
///
/// The kernel goes by its address: where two translation units instantiate it, each may have its
/// own copy (nvcc's -static-global-template-stub), and only one has been prepared.
struct DecodeKernel {
  /// The kernel.
  void (*function)(DecodeArgs) = nullptr;
  DecodeGrid grid;             ///< as many workers as the device holds at once; none: no such size
  int num_threads = 0;         ///< of a block
  std::size_t smem_bytes = 0;  ///< of a block
};

/// Says how a head width is decoded on a device: everything but the kernel.
/// @return cudaErrorInvalidValue where `dim` is not one of Dims.
template <int kSize, class Dims = AllHeadDims>
cudaError_t shape_decode(int dim, const DeviceLimits& limits, DecodeKernel& kernel) {
  return with_head_dim(Dims{}, dim, [&](auto d) {
    constexpr int kDim = decltype(d)::value;
    using Size = detail::ItemSize<kSize>;
    constexpr int kMost = detail::decode_max_workers(kDim, kSize);
    constexpr int kWorkerBytes = detail::PartialMemory<kDim, Size>::kWorkerBytes;
    // The kernel's own shared memory: lists, and what merging needs, padded to 1024.
    constexpr int kStaticBytes = kMost * static_cast<int>(sizeof(detail::WorkerLists<Size>)) +
                                 static_cast<int>(sizeof(detail::MergeMemory<Size>)) + 1024;
    const int workers =
        std::max(0, std::min(kMost, (limits.smem_per_block - kStaticBytes) / kWorkerBytes));
    kernel = {nullptr,
              {std::min(limits.num_sms, detail::kCutThreads), workers},
              workers * Size::kThreads + Size::kMergeWarps * 32,
              static_cast<std::size_t>(workers * kWorkerBytes)};
    return cudaSuccess;
  });
}

/// Finds the kernel for `dim` and lets it use its shared memory; once, at set-up.
/// @return cudaErrorInvalidValue where `dim` is not one of Dims.
template <int kSize, DeviceRow Row, class Dims = AllHeadDims, DeviceIo Io = Row,
          SoftmaxKind Softmax = PlainSoftmax>
cudaError_t prepare_decode(int dim, const DeviceLimits& limits, DecodeKernel& kernel) {
  return with_head_dim(Dims{}, dim, [&](auto d) {
    constexpr int kDim = decltype(d)::value;
    if (const cudaError_t e = shape_decode<kSize, Dims>(dim, limits, kernel); e != cudaSuccess) {
      return e;
    }
    if (kernel.grid.workers_per_block == 0) return cudaSuccess;
    kernel.function = detail::decode_kernel<Row, Io, kDim, detail::ItemSize<kSize, Softmax>>;
    return cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(kernel.smem_bytes));
  });
}

/// Attends one layer's chunks of one size over everything their heads keep. The own row of a single
/// token has been appended before; those of several tokens come from args.k and args.v. Safe in a
/// graph: lengths and work come from device memory.
///
/// The launch reads work, page tables and rows of former steps while the stream's last kernel still
/// runs. Where that one launches its own successors early (programmatic dependent launch), it does
/// so after it has waited for its predecessors, as append does. A decode launch may release its
/// successors before it has waited, but never ends before: who waits for it has waited for all.
/// @pre q, k, v and out are 16-byte aligned, their strides multiples of 16 bytes; args.work was cut
/// for
///   `kernel.grid` since the step began.
inline cudaError_t decode(const DecodeArgs& args, const DecodeKernel& kernel, bool chains_launches,
                          cudaStream_t stream) {
  return launch_chained(kernel.function, dim3(static_cast<unsigned>(kernel.grid.num_blocks)),
                        dim3(static_cast<unsigned>(kernel.num_threads)), kernel.smem_bytes, stream,
                        chains_launches, args);
}

}  // namespace headwise::inline v0::cuda
