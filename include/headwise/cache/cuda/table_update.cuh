// SPDX-License-Identifier: MIT
/// @file table_update.cuh
/// The kernel that puts a step's new page-table entries where they belong.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/step_state.cuh"

namespace headwise::inline v0::cuda {

/// @param ranges  [num_ranges], the page ids behind them; both as begin sent them.
/// @param tables  [max_sequences][entries_per_sequence], written.
template <class = void>  // inline does not hold for kernels
__global__ void __launch_bounds__(128)
    update_tables_kernel(const TableRange* ranges, int num_ranges, std::int32_t* tables) {
  const auto* ids = reinterpret_cast<const std::int32_t*>(ranges + num_ranges);
  for (int r = static_cast<int>(blockIdx.x); r < num_ranges; r += static_cast<int>(gridDim.x)) {
    const TableRange range = ranges[r];
    for (int i = static_cast<int>(threadIdx.x); i < range.count;
         i += static_cast<int>(blockDim.x)) {
      tables[range.first_entry + i] = ids[range.first_id + i];
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

}  // namespace headwise::inline v0::cuda
