// SPDX-License-Identifier: MIT
/// @file compensation.cuh
/// The compensation row of a growing window (RazorAttention) as attention reads it: one key with
/// logit capped(scale * q.k_mean) + ln(count) and value v_mean, for all queries of a step alike.
///
/// It comes last: to a sum that holds thousands of rows' weight, and began with it, each further
/// row would be a few bits.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/ptx/tensor_core.cuh"
#include "headwise/attention/cuda/softmax_kind.cuh"
#include "headwise/cache/cuda/elements.cuh"
#include "headwise/cache/cuda/fold_state.cuh"
#include "headwise/cache/cuda/step_state.cuh"

namespace headwise::inline v0::cuda::detail {

/// What stands for the rows that a head has dropped.
struct MeanRow {
  const float* k = nullptr;  ///< [dim]; null: there is no such row
  const float* v = nullptr;  ///< [dim]
  float log2_count = 0.0F;   ///< of the rows that it stands for

  MeanRow() = default;
  /// @param chunk  of the step.
  __device__ MeanRow(const FoldedHeads& folded, std::int64_t chunk, int kv_head, int dim) {
    if (folded.heads == nullptr) return;
    const FoldHead head = folded.heads[kv_head];
    if (head.offset < 0) return;
    const FoldState state = folded.states[chunk * folded.num_classes + head.class_idx];
    if (state.seen_row < 0) return;
    const std::size_t row_bytes =
        static_cast<std::size_t>(2 * dim) * (sizeof(double) + sizeof(float));
    const std::byte* row = folded.sums +
                           static_cast<std::size_t>(state.place) * folded.place_bytes +
                           static_cast<std::size_t>(head.offset) +
                           static_cast<std::size_t>(state.seen_row) * row_bytes;
    k = reinterpret_cast<const float*>(row + static_cast<std::size_t>(2 * dim) * sizeof(double));
    v = k + dim;
    log2_count = state.log2_count;
  }
  __device__ bool exists() const { return k != nullptr; }

  /// The logit of a query, in powers of two.
  /// @param dot  q.k_mean
  __device__ float logit(float dot, float scale_log2, const SoftmaxArgs& softmax) const {
    const float score = dot * scale_log2;
    return (softmax.cap > 0.0F ? softmax.capped(score) : score) + log2_count;
  }
};

/// Elements 2i and 2i + 1 of q and k_mean, multiplied, for i = first, first + step, ..., below
/// `pairs`.
/// @tparam Row  what queries are rounded to.
template <DeviceRow Row, DeviceIo Io>
__device__ __forceinline__ float dot_with_mean(const Bits<Io>* q, const float* k_mean, int first,
                                               int step, int pairs) {
  float sum[2] = {};
#pragma unroll 8
  for (int i = first; i < pairs; i += step) {
    const float2 x = Pair<Row>::unpack(load_pair<Row, Io>(q + 2 * i));
    const float2 y = __ldg(reinterpret_cast<const float2*>(k_mean) + i);
    sum[0] = fmaf(x.x, y.x, sum[0]);
    sum[1] = fmaf(x.y, y.y, sum[1]);
  }
  return sum[0] + sum[1];
}

/// How a row joins a softmax whose weights are 2^(logit - top - headroom): its weight, and what all
/// else must be multiplied by, which is 1 unless the row is the greatest.
struct JoiningRow {
  float top = kLowest;
  float factor = 1.0F;
  float weight = 0.0F;  ///< 0: a row of minus infinity, which is none

  __device__ JoiningRow(float former_top, float logit, float headroom) : top(former_top) {
    if (logit == kHidden) return;
    top = fmaxf(former_top, logit);
    factor = exp2_fast(former_top - top);
    weight = exp2_fast(logit - top - headroom);
  }
  /// What a value becomes.
  __device__ float joined(float out, const float* value) const {
    return weight == 0.0F ? out * factor : fmaf(weight, __ldg(value), out * factor);
  }
};

/// Which chunk of the step begins at `row` of q.
__device__ inline std::int64_t chunk_at(const DeviceStep& step, std::int64_t row) {
  int low = 0;  // the last chunk that begins no later: those without tokens come before
  int high = step.header->num_chunks;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (step.chunks[middle].first_row <= row ? low : high) = middle;
  }
  return low;
}

}  // namespace headwise::inline v0::cuda::detail
