// SPDX-License-Identifier: MIT
/// @file fold.cuh
/// Folds pages into compensation rows (RazorAttention): sums in double, which are right for a
/// million rows.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "headwise/cache/cuda/elements.cuh"
#include "headwise/cache/cuda/fold_state.cuh"
#include "headwise/cache/cuda/step_state.cuh"

namespace headwise::inline v0::cuda {

/// One block a sequence and head, a thread two columns at a time: nobody waits for anybody, and a
/// row's pages are added in their order. Traffic: every page that is folded is read once.
/// @param dim  of K and of V, an even number.
template <DeviceRow Row>
__global__ void __launch_bounds__(256)
    fold_kernel(const __grid_constant__ DeviceStep step, const __grid_constant__ LayerHeads heads,
                const __grid_constant__ FoldedHeads folded, int dim) {
  constexpr int kBatch = 16;  // loads on their way at once, of a thread
  const int h = static_cast<int>(blockIdx.x) % heads.num_heads;
  const std::int64_t e = static_cast<std::int64_t>(blockIdx.x) / heads.num_heads;
  if (e >= step.header->num_chunks) return;
  const FoldHead head = folded.heads[heads.kv_head[h]];
  if (head.offset < 0) return;
  const FoldState fold = folded.states[e * folded.num_classes + head.class_idx];
  if (fold.num_folds == 0) return;
  const ClassState state = step.classes[e * step.num_classes + head.class_idx];
  const std::int32_t* table = table_of(step, state, heads.idx_in_class[h]);
  std::byte* rows = folded.sums + static_cast<std::size_t>(fold.place) * folded.place_bytes +
                    static_cast<std::size_t>(head.offset);
  const std::size_t row_bytes =
      static_cast<std::size_t>(2 * dim) * (sizeof(double) + sizeof(float));
  const auto sums_of = [&](std::int32_t row) {
    return reinterpret_cast<double2*>(rows + static_cast<std::size_t>(row) * row_bytes);
  };
  for (int pair = static_cast<int>(threadIdx.x); pair < dim; pair += static_cast<int>(blockDim.x)) {
    const bool is_k = pair < dim / 2;
    // In 4-byte pairs: V's rows lie behind a page's K rows.
    const int in_page = is_k ? pair : kPageTokens * dim / 2 + pair - dim / 2;
    for (int f = 0; f < fold.num_folds; ++f) {
      const RowFold made = folded.folds[fold.first_fold + f];
      double2 sum = made.from < 0 ? make_double2(0.0, 0.0) : sums_of(made.from)[pair];
      int row = made.first_row;
      for (int entry = made.first_entry; entry < made.end_entry; ++entry, row = 0) {
        const auto* page =
            reinterpret_cast<const std::uint32_t*>(
                step.pages + static_cast<std::size_t>(table[entry]) * step.page_stride) +
            in_page;
        for (; row < kPageTokens; row += kBatch) {
          std::uint32_t x[kBatch];
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            x[i] = row + i < kPageTokens ? page[(row + i) * (dim / 2)] : 0U;
          }
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const float2 value = Pair<Row>::unpack(x[i]);
            sum.x += static_cast<double>(value.x);
            sum.y += static_cast<double>(value.y);
          }
        }
      }
      sums_of(made.to)[pair] = sum;
      reinterpret_cast<float2*>(sums_of(made.to) + dim)[pair] = make_float2(
          static_cast<float>(sum.x * made.share), static_cast<float>(sum.y * made.share));
    }
  }
}

/// Makes the compensation rows that the step asks for, of one layer, once its rows are stored: into
/// the bank that nobody reads before commit.
/// @param max_chunks  the most sequences that a replay of this launch may meet.
template <DeviceRow Row>
cudaError_t fold(const DeviceStep& step, const LayerHeads& heads, const FoldedHeads& folded,
                 int dim, std::int64_t max_chunks, cudaStream_t stream) {
  const std::int64_t moves = max_chunks * heads.num_heads;
  if (folded.heads == nullptr || moves == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(moves);
  const auto threads = static_cast<unsigned>(dim < 256 ? (dim + 31) / 32 * 32 : 256);
  fold_kernel<Row><<<blocks, threads, 0, stream>>>(step, heads, folded, dim);
  return cudaGetLastError();
}

}  // namespace headwise::inline v0::cuda
