// SPDX-License-Identifier: MIT
/// @file state.cuh
/// The computing half of a decode warp: online softmax over tiles, and its result in parts.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "headwise/attention/cuda/decode/tile.cuh"
#include "headwise/attention/cuda/decode/work.cuh"
#include "headwise/attention/cuda/ptx/tensor_core.cuh"
#include "headwise/cache/cuda/elements.cuh"

namespace headwise::inline v0::cuda::detail {

/// One partial result: (maximum, sum) of 8 queries, then 8 rows of unnormalised output.
__host__ __device__ constexpr int partial_floats(int dim) { return kItemQueries * (dim + 4 + 2); }

/// Where query `query`'s output begins in a partial result; 4 floats of padding a row keep the four
/// queries that lanes store at once in different banks.
template <int kDim>
__device__ constexpr int partial_row(int query) {
  return 2 * kItemQueries + query * (kDim + 4);
}

/// Attention of up to 8 queries over the tiles of one piece, transposed: scores are [keys,
/// queries], the output [dims, queries], so that 16 keys or dims fill a tensor core's rows and the
/// few queries of a group its 8 columns. Lane 4g + t has queries 2t and 2t + 1.
/// @tparam Io  of q and out. What q holds is rounded to Row, once; f32 outputs are not rounded.
template <DeviceRow Row, DeviceIo Io, int kDim>
class DecodeState {
 public:
  /// Reads the queries that the next start() takes.
  /// @param q  the first query row of a piece; `count` of them, `stride` elements apart.
  __device__ void fetch(const Bits<Io>* q, std::int64_t stride, int count) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int query = lane / 4;
    const Bits<Io>* row = q + query * stride + lane % 4 * 2;
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
      next_q_[b][0] = query < count ? load_pair<Row, Io>(row + b * 16) : 0U;
      next_q_[b][1] = query < count ? load_pair<Row, Io>(row + b * 16 + 8) : 0U;
    }
  }

  /// Begins a piece with the queries fetched before.
  __device__ void start() {
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
      q_[b][0] = next_q_[b][0];
      q_[b][1] = next_q_[b][1];
    }
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[b][i] = 0.0F;
    }
    max_[0] = max_[1] = kLowest;
    sum_[0] = sum_[1] = 0.0F;
  }

  /// Adds the rows [low, high) of a tile at shared-memory address `k`.
  __device__ void add(std::uint32_t k, int low, int high, float scale_log2) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    using Layout = TileLayout<kDim>;
    const std::uint32_t k_at = k + Layout::at(lane % 16, lane / 16);
    float even[4] = {};
    float odd[4] = {};  // two chains of products: half the latency
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
      std::uint32_t rows[4];
      load_matrices(rows, Layout::pairs_on(k_at, b));
      TensorCore<Row>::multiply(b % 2 == 0 ? even : odd, rows, q_[b][0], q_[b][1]);
    }
    float score[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) score[i] = (even[i] + odd[i]) * scale_log2;
    if (low > 0 || high < kTileRows) {
      const int g = lane / 4;
      if (g < low || g >= high) score[0] = score[1] = kHidden;
      if (g + 8 < low || g + 8 >= high) score[2] = score[3] = kHidden;
    }

    float top[2] = {fmaxf(score[0], score[2]), fmaxf(score[1], score[3])};
#pragma unroll
    for (int d = 4; d < 32; d *= 2) {
      top[0] = fmaxf(top[0], __shfl_xor_sync(kWholeWarp, top[0], d));
      top[1] = fmaxf(top[1], __shfl_xor_sync(kWholeWarp, top[1], d));
    }
    top[0] = fmaxf(top[0], max_[0]);
    top[1] = fmaxf(top[1], max_[1]);
    if (__any_sync(kWholeWarp, top[0] > max_[0] || top[1] > max_[1])) rescale(top);

    float p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      p[i] = exp2_fast(score[i] - max_[i % 2] - TensorCore<Row>::kHeadroom);
    sum_[0] += p[0] + p[2];
    sum_[1] += p[1] + p[3];
    const std::uint32_t p0 = transposed(Pair<Row>::pack(p[0], p[1]));
    const std::uint32_t p1 = transposed(Pair<Row>::pack(p[2], p[3]));
    const std::uint32_t v_at = k + Layout::at(kTileRows + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
      std::uint32_t columns[4];
      load_matrices_transposed(columns, Layout::pairs_on(v_at, b));
      TensorCore<Row>::multiply(out_[b], columns, p0, p1);
    }
  }

  /// Sums over the keys that other lanes have; after the last add().
  __device__ void finish() {
#pragma unroll
    for (int d = 4; d < 32; d *= 2) {
      sum_[0] += __shfl_xor_sync(kWholeWarp, sum_[0], d);
      sum_[1] += __shfl_xor_sync(kWholeWarp, sum_[1], d);
    }
  }

  /// The finished output of `count` queries, `stride` elements apart.
  __device__ void store(Bits<Io>* out, std::int64_t stride, int count) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const float inverse[2] = {sum_[0] > 0.0F ? 1.0F / sum_[0] : 0.0F,
                              sum_[1] > 0.0F ? 1.0F / sum_[1] : 0.0F};
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = out_[b][2 * half] * inverse[0];
        const float high = out_[b][2 * half + 1] * inverse[1];
        Bits<Io>* to = out + lane / 4 * stride + b * 16 + half * 8 + lane % 4 * 2;
        if constexpr (std::same_as<Io, f32>) {
          // Upper and lower halves of a float are two matrices of two-byte elements.
          const std::uint32_t bits[2] = {__float_as_uint(low), __float_as_uint(high)};
          const std::uint32_t upper = transposed(__byte_perm(bits[0], bits[1], 0x7632));
          const std::uint32_t lower = transposed(__byte_perm(bits[0], bits[1], 0x5410));
          if (lane / 4 < count) {
            *reinterpret_cast<float2*>(to) =
                make_float2(__uint_as_float(__byte_perm(lower, upper, 0x5410)),
                            __uint_as_float(__byte_perm(lower, upper, 0x7632)));
          }
        } else {
          const std::uint32_t pair = transposed(Pair<Io>::pack(low, high));
          if (lane / 4 < count) *reinterpret_cast<std::uint32_t*>(to) = pair;
        }
      }
    }
  }

  /// The state itself, as partial_floats() lays it out.
  __device__ void store_partial(float* partial) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int g = lane / 4;
    const int t = lane % 4;
    if (g < 2) {
      *reinterpret_cast<float2*>(partial + 2 * (2 * t + g)) =
          g == 0 ? make_float2(max_[0], sum_[0]) : make_float2(max_[1], sum_[1]);
    }
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        partial[partial_row<kDim>(2 * t + i % 2) + b * 16 + g + i / 2 * 8] = out_[b][i];
      }
    }
  }

 private:
  __device__ void rescale(const float (&top)[2]) {
    const float factor[2] = {exp2_fast(max_[0] - top[0]), exp2_fast(max_[1] - top[1])};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      max_[i] = top[i];
      sum_[i] *= factor[i];
    }
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[b][i] *= factor[i % 2];
    }
  }

  std::uint32_t q_[kDim / 16][2];
  std::uint32_t next_q_[kDim / 16][2];
  float out_[kDim / 16][4];
  float max_[2];
  float sum_[2];
};

}  // namespace headwise::inline v0::cuda::detail
