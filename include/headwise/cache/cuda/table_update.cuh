// SPDX-License-Identifier: MIT
/// @file table_update.cuh
/// The kernels that follow the books: changed page-table entries, and pages that a fork copies.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/step_state.cuh"

namespace headwise::inline v0::cuda {

/// @param ranges  [num_ranges], the page ids behind them; both as they were sent.
/// @param tables  of all sequences, written.
template <class = void>  // inline does not hold for kernels
__global__ void __launch_bounds__(128)
    update_tables_kernel(const TableRange* ranges, int num_ranges, std::int32_t* tables) {
  const auto* ids = reinterpret_cast<const std::int32_t*>(ranges + num_ranges);
  for (int r = static_cast<int>(blockIdx.x); r < num_ranges; r += static_cast<int>(gridDim.x)) {
    const TableRange range = ranges[r];
    for (int i = static_cast<int>(threadIdx.x); i < range.num_heads * range.count;
         i += static_cast<int>(blockDim.x)) {
      const std::int64_t head = i / range.count;
      tables[range.first_entry + head * range.head_stride + i % range.count] =
          ids[range.first_id + i];
    }
  }
}

/// Launches nothing where nothing changed: most decode steps fill no page.
inline cudaError_t update_tables(const TableRange* ranges, int num_ranges, std::int32_t* tables,
                                 cudaStream_t stream) {
  if (num_ranges == 0) return cudaSuccess;
  update_tables_kernel<>
      <<<std::min(num_ranges, 1024), 128, 0, stream>>>(ranges, num_ranges, tables);
  return cudaGetLastError();
}

/// A page that another page is to equal.
struct PageMove {
  std::int32_t from = 0;   ///< page number
  std::int32_t to = 0;     ///< page number
  std::int64_t bytes = 0;  ///< of either, a multiple of 16
};

/// One block a page, in turns. Traffic: every byte is read once and written once.
template <class = void>  // inline does not hold for kernels
__global__ void __launch_bounds__(256)
    move_pages_kernel(const PageMove* moves, int num_moves, std::byte* pages,
                      std::size_t page_stride) {
  for (int m = static_cast<int>(blockIdx.x); m < num_moves; m += static_cast<int>(gridDim.x)) {
    const PageMove move = moves[m];
    const auto* from =
        reinterpret_cast<const uint4*>(pages + static_cast<std::size_t>(move.from) * page_stride);
    auto* to = reinterpret_cast<uint4*>(pages + static_cast<std::size_t>(move.to) * page_stride);
    for (std::int64_t i = threadIdx.x; i < move.bytes / 16; i += blockDim.x) to[i] = from[i];
  }
}

/// Copies pages, none of which is both read and written.
/// @param moves  [num_moves] on the device
inline cudaError_t move_pages(const PageMove* moves, int num_moves, std::byte* pages,
                              std::size_t page_stride, cudaStream_t stream) {
  if (num_moves == 0) return cudaSuccess;
  move_pages_kernel<>
      <<<std::min(num_moves, 2048), 256, 0, stream>>>(moves, num_moves, pages, page_stride);
  return cudaGetLastError();
}

}  // namespace headwise::inline v0::cuda
