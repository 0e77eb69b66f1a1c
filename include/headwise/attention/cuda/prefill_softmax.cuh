// SPDX-License-Identifier: MIT
/// @file prefill_softmax.cuh
/// Softmax of 16 query rows in a warp's registers, block of keys by block of keys.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "headwise/attention/cuda/prefill_tile.cuh"
#include "headwise/attention/cuda/tensor_core.cuh"

namespace headwise::inline v0::cuda::detail {

/// What a lane keeps of its two rows: lane 4g + t has rows g and g + 8 of the warp's 16, and of
/// each 8 keys those at 2t and 2t + 1. Scores are [keys / 8][row g: 2 keys, row g + 8: 2 keys].
class RowSoftmax {
 public:
  /// @param row  of the tile, the lane's first one.
  __device__ __forceinline__ void begin(const PrefillTile& tile, const QueryGroup& group, int row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      seen_[r] = SeenKeys(tile.keys, tile.state, tile.pos_of(row + 8 * r, group));
      max_[r] = kMasked;
      sum_[r] = 0.0F;
    }
  }

  /// Takes out the keys [first, first + 8 kBlocks) that a row does not see.
  template <int kBlocks>
  __device__ __forceinline__ void mask(int first, float (&score)[kBlocks][4]) const {
    first += static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!seen_[r].contains(first + n * 8 + i)) score[n][2 * r + i] = kMasked;
        }
      }
    }
  }

  /// Scores become weights, in units of exp2.
  /// @param factor  what the two rows' earlier results must be multiplied by.
  /// @return whether a factor of the warp differs from 1.
  template <int kBlocks>
  __device__ __forceinline__ bool add(float scale_log2, float (&score)[kBlocks][4],
                                      float (&factor)[2]) {
    float top[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = max_[r];
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        top[r] = fmaxf(top[r], fmaxf(score[n][2 * r], score[n][2 * r + 1]));
      }
      top[r] = fmaxf(top[r], __shfl_xor_sync(kWholeWarp, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(kWholeWarp, top[r], 2));
    }
    const bool changed = __any_sync(kWholeWarp, top[0] > max_[0] || top[1] > max_[1]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      factor[r] = exp2_fast((max_[r] - top[r]) * scale_log2);
      max_[r] = top[r];
      // A row that has seen nothing yet must not take masked keys for its maximum: weight 0.
      const float offset = top[r] <= kMasked ? 0.0F : top[r] * scale_log2;
      float sum = 0.0F;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          score[n][i] = exp2_fast(fmaf(score[n][i], scale_log2, -offset));
          sum += score[n][i];
        }
      }
      sum_[r] = fmaf(sum_[r], factor[r], sum);
    }
    return changed;
  }

  /// Divides by the sums of weights and writes the 16 rows to padded shared memory.
  template <class Row, int kDim>
  __device__ __forceinline__ void store(const float (&out)[kDim / 8][4],
                                        std::uint16_t* rows) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = sum_[r];
      sum += __shfl_xor_sync(kWholeWarp, sum, 1);
      sum += __shfl_xor_sync(kWholeWarp, sum, 2);
      const float inverse = sum > 0.0F ? 1.0F / sum : 0.0F;
      std::uint16_t* row = rows + (lane / 4 + r * 8) * kPaddedDim<kDim> + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        *reinterpret_cast<std::uint32_t*>(row + n * 8) =
            TensorCore<Row>::pack(out[n][2 * r] * inverse, out[n][2 * r + 1] * inverse);
      }
    }
  }

 private:
  SeenKeys seen_[2];
  float max_[2];  // of the scores before scaling
  float sum_[2];
};

/// Multiplies a warp's 16 rows of results by their rows' factors.
template <int kBlocks>
__device__ __forceinline__ void scale_rows(const float (&factor)[2], float (&out)[kBlocks][4]) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[n][i] *= factor[i / 2];
  }
}

}  // namespace headwise::inline v0::cuda::detail
