// SPDX-License-Identifier: MIT
/// @file prefill.cuh
/// Prefill: chunks of many sequences, every head under its own window rule.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/chunk_rule.cuh"
#include "headwise/attention/cuda/head_dims.cuh"
#include "headwise/attention/cuda/prefill/mma.cuh"
#include "headwise/attention/cuda/prefill/tile.cuh"
#include "headwise/attention/cuda/prefill/warpgroup.cuh"
#include "headwise/attention/cuda/softmax_kind.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/elements.cuh"

namespace headwise::inline v0::cuda {

/// How a head width is attended on the current device; found once, at set-up.
///
/// The kernel goes by its address: where two translation units instantiate it, each may have its
/// own copy (nvcc's -static-global-template-stub), and only one has been prepared.
struct PrefillKernel {
  /// The kernel.
  void (*function)(PrefillArgs, unsigned num_tiles) = nullptr;
  /// The same for work that has been cut, see work.cuh; none where tiles are never cut.
  void (*cut_function)(PrefillArgs, unsigned num_tiles) = nullptr;
  int tile_rows = 0;           ///< query rows (token, query head of a group) of a tile
  int num_threads = 0;         ///< of a block
  std::size_t smem_bytes = 0;  ///< of a block
  bool draws_tiles = false;    ///< blocks stay and draw tiles; else one block a tile and head

  /// Tiles of a chunk, if it is not decode's.
  std::int64_t num_tiles(std::int64_t num_tokens, int group_size) const {
    const std::int64_t tokens = tile_rows / group_size;
    return is_prefilled(num_tokens, group_size) ? (num_tokens + tokens - 1) / tokens : 0;
  }
};

/// Finds the kernel for `dim` and lets it use its shared memory; once, at set-up.
/// @return cudaErrorInvalidValue where `dim` is not one of Dims.
template <DeviceRow Row, class Dims = AllHeadDims, SoftmaxKind Softmax = PlainSoftmax>
cudaError_t prepare_prefill(int dim, PrefillKernel& kernel) {
  return with_head_dim(Dims{}, dim, [&](auto d) {
    constexpr int kDim = decltype(d)::value;
    kernel = {detail::prefill_mma_kernel<Row, kDim, Softmax>,
              nullptr,
              detail::mma_rows(kDim),
              detail::kMmaWarps * 32,
              detail::mma_bytes(kDim),
              false};
    if constexpr (detail::has_warpgroup_kernel(kDim)) {
      const PrefillKernel drawing = {detail::prefill_warpgroup_kernel<Row, kDim, false, Softmax>,
                                     detail::prefill_warpgroup_kernel<Row, kDim, true, Softmax>,
                                     detail::kGroupRows,
                                     detail::kGroupThreads,
                                     detail::group_bytes(kDim),
                                     true};
      if (detail::has_warpgroup_code(drawing.function)) kernel = drawing;
    }
    if (kernel.cut_function != nullptr) {
      const cudaError_t e =
          cudaFuncSetAttribute(kernel.cut_function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kernel.smem_bytes));
      if (e != cudaSuccess) return e;
    }
    return cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(kernel.smem_bytes));
  });
}

/// Attends one layer's chunks, whichever prefill mode the step was begun in, over the rows stored
/// before the step and the step's own.
/// @param num_tiles  the sum of PrefillKernel::num_tiles() over the step's chunks.
/// @param num_sms  multiprocessors of the device.
/// @pre group_size <= 64; q, k, v and out are 16-byte aligned, their strides multiples of 8
/// elements.
inline cudaError_t prefill(const PrefillArgs& args, const PrefillKernel& kernel,
                           std::int64_t num_tiles, int num_sms, cudaStream_t stream) {
  if (num_tiles == 0 || args.heads.num_heads == 0) return cudaSuccess;
  const auto tiles = static_cast<unsigned>(num_tiles);
  const auto heads = static_cast<unsigned>(args.heads.num_heads);
  const bool is_cut = args.work.num_shares != nullptr;  // into how much, the device knows
  const auto blocks = static_cast<unsigned>(num_sms);
  const dim3 grid = !kernel.draws_tiles ? dim3(tiles, heads)
                    : is_cut            ? dim3(blocks)
                                        : dim3(std::min(blocks, tiles * heads));
  return launch_chained(is_cut ? kernel.cut_function : kernel.function, grid,
                        dim3(static_cast<unsigned>(kernel.num_threads)), kernel.smem_bytes, stream,
                        false, args, tiles);
}

}  // namespace headwise::inline v0::cuda
