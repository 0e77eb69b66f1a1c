// SPDX-License-Identifier: MIT
/// @file exact.cuh
/// Query rows whose result is no number, attended once more: in double, key by key, and only over
/// the keys that the row sees.
///
/// A tile's rows see different keys, and the tensor cores multiply all of a block's values with all
/// of its rows: a key that a row does not see has the weight 0 there, and 0 times infinity is NaN.
/// To keep such values away from the products would cost every tile; to look at the results costs
/// two instructions for every eight outputs. Here, too, end rows whose sums overflow, and those
/// whose visible scores are all -infinity or so large that f32 has no place for their differences.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "headwise/attention/cuda/compensation.cuh"
#include "headwise/attention/cuda/prefill/tile.cuh"
#include "headwise/attention/cuda/ptx/tensor_core.cuh"
#include "headwise/attention/cuda/softmax_kind.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/elements.cuh"

namespace headwise::inline v0::cuda::detail {

/// Which of a warp's 16 rows some lane names: lane 4g + t speaks for row g (`first`) and for row
/// g + 8 (`second`). Bit r: row r.
__device__ __forceinline__ unsigned named_rows(bool first, bool second) {
  const unsigned low = __ballot_sync(kWholeWarp, first);
  const unsigned high = __ballot_sync(kWholeWarp, second);
  unsigned rows = 0;
  if ((low | high) == 0) return rows;
#pragma unroll 1
  for (int g = 0; g < 8; ++g) {
    if ((low >> (4 * g) & 15U) != 0) rows |= 1U << g;
    if ((high >> (4 * g) & 15U) != 0) rows |= 256U << g;
  }
  return rows;
}

/// As the score of an f32: what is beyond its range is infinite.
__device__ __forceinline__ double in_f32_range(double score) {
  constexpr auto kMost = -static_cast<double>(kLowest);
  constexpr auto kInfinite = -static_cast<double>(kHidden);
  return fabs(score) > kMost ? copysign(kInfinite, score) : score;
}
/// From scale x q.k to a logit, in powers of two: soft-cap, then ALiBi.
/// @param distance  tokens from query to key, not positive
__device__ __forceinline__ double shaped_exactly(const SoftmaxArgs& softmax, double score, int head,
                                                 int distance) {
  score = in_f32_range(score);
  const auto cap = static_cast<double>(softmax.cap);
  if (cap > 0.0) score = cap * tanh(score / cap);
  if (softmax.alibi_slopes == nullptr) return score;
  return in_f32_range(score + static_cast<double>(__ldg(softmax.alibi_slopes + head)) * distance);
}

/// The row that stands for those that a tile's head has dropped.
template <int kDim>
__device__ __forceinline__ MeanRow mean_row(const PrefillArgs& args, const PrefillTile& tile) {
  return {args.softmax.folded, tile.piece.chunk, args.heads.kv_head[tile.head], kDim};
}

/// One warp attends rows of a tile over the keys that they see and writes them to `out`. A row
/// whose visible scores are all -infinity gives zeros.
/// @param rows  bit r: row first_row + r. Rows past the tile's last one are left alone.
///
/// Cost: hundreds of times that of the products. A row that has become NaN altogether stops there.
template <class Row, int kDim, SoftmaxKind Softmax>
__device__ __forceinline__ void attend_exactly(const PrefillArgs& args, const PrefillTile& tile,
                                               const QueryGroup& group, int first_row,
                                               unsigned rows) {
  constexpr int kPairs = kDim / 2;  // of elements
  constexpr int kOwn = (kPairs + 31) / 32;
  constexpr double kNone = kHidden;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto pair_at = [](const std::uint16_t* row, int pair) {
    return Pair<Row>::unpack(reinterpret_cast<const std::uint32_t*>(row)[pair]);
  };
#pragma unroll 1
  for (; rows != 0; rows &= rows - 1) {
    const int row = first_row + __ffs(static_cast<int>(rows)) - 1;
    if (row >= tile.num_tokens * group.size) break;
    const SeenKeys seen(tile.keys, tile.state, tile.pos_of(row, group));
    const std::uint16_t* q = find_query(args, tile, group, row);
    double top = kNone;
    double sum = 0.0;  // of the lane's keys
    double out[kOwn][2] = {};
#pragma unroll 1
    for (int first = 0; first < seen.end; first += 32) {
      const int index = first + lane;
      const bool sees = index < seen.end && (index < seen.sinks || index >= seen.recent);
      const KeyRows key = find_key<kDim>(args, tile, index);
      double score = kNone;
      if (sees) {
        score = 0.0;
#pragma unroll 1
        for (int i = 0; i < kPairs; ++i) {
          const float2 a = pair_at(q, i);
          const float2 b = pair_at(key.k, i);
          score += static_cast<double>(a.x) * static_cast<double>(b.x);
          score += static_cast<double>(a.y) * static_cast<double>(b.y);
        }
        score *= static_cast<double>(args.scale_log2);
        if constexpr (Softmax::kShapesScores) {
          score = shaped_exactly(args.softmax, score, query_head(args, tile, group, row),
                                 tile.keys.position(index) - tile.pos_of(row, group));
        }
      }
      double new_top = fmax(top, score);
      for (int d = 1; d < 32; d *= 2) {
        new_top = fmax(new_top, __shfl_xor_sync(kWholeWarp, new_top, d));
      }
      const double factor = top == new_top ? 1.0 : exp2(top - new_top);
      const double weight = score == kNone ? 0.0 : exp2(score - new_top);
      top = new_top;
      sum = sum * factor + weight;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        out[i][0] *= factor;
        out[i][1] *= factor;
      }
#pragma unroll 1
      for (int j = 0; j < 32; ++j) {
        const double w = __shfl_sync(kWholeWarp, weight, j);
        const auto v = reinterpret_cast<const std::uint16_t*>(
            __shfl_sync(kWholeWarp, reinterpret_cast<std::uintptr_t>(key.v), j));
        if (w == 0.0) continue;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          if (lane + 32 * i >= kPairs) break;
          const float2 x = pair_at(v, lane + 32 * i);
          out[i][0] += w * static_cast<double>(x.x);
          out[i][1] += w * static_cast<double>(x.y);
        }
      }
      bool is_nan = true;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (lane + 32 * i < kPairs) is_nan = is_nan && isnan(out[i][0]) && isnan(out[i][1]);
      }
      if (__all_sync(kWholeWarp, is_nan)) break;
    }
    for (int d = 1; d < 32; d *= 2) sum += __shfl_xor_sync(kWholeWarp, sum, d);
    if constexpr (Softmax::kHasCompensation) {
      if (const MeanRow mean = mean_row<kDim>(args, tile); mean.exists()) {
        double score = 0.0;
#pragma unroll 1
        for (int i = lane; i < kPairs; i += 32) {
          const float2 x = pair_at(q, i);
          score += static_cast<double>(x.x) * static_cast<double>(mean.k[2 * i]);
          score += static_cast<double>(x.y) * static_cast<double>(mean.k[2 * i + 1]);
        }
        for (int d = 1; d < 32; d *= 2) score += __shfl_xor_sync(kWholeWarp, score, d);
        score = shaped_exactly(args.softmax, score * static_cast<double>(args.scale_log2),
                               query_head(args, tile, group, row), 0) +
                static_cast<double>(mean.log2_count);
        if (score != kNone) {
          const double new_top = fmax(top, score);
          const double factor = top == new_top ? 1.0 : exp2(top - new_top);
          const double weight = exp2(score - new_top);
          top = new_top;
          sum = sum * factor + weight;
#pragma unroll
          for (int i = 0; i < kOwn; ++i) {
            if (lane + 32 * i >= kPairs) break;
            const float* v = mean.v + 2 * (lane + 32 * i);
            out[i][0] *= factor;
            out[i][1] *= factor;
            if (weight == 0.0) continue;
            out[i][0] += weight * static_cast<double>(v[0]);
            out[i][1] += weight * static_cast<double>(v[1]);
          }
        }
      }
    }
    if constexpr (Softmax::kHasSinks) {
      if (sum != 0.0 && args.softmax.sinks != nullptr) {
        const float sink = __ldg(args.softmax.sinks + query_head(args, tile, group, row));
        sum += exp2(static_cast<double>(sink) - top);
      }
    }
    const double inverse = sum == 0.0 ? 0.0 : 1.0 / sum;
    std::uint16_t* to =
        row_at(args.out, tile.chunk.first_row + tile.first_token + group.token_of(row),
               args.heads.kv_head[tile.head] * group.size + group.head_of(row));
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (lane + 32 * i >= kPairs) break;
      reinterpret_cast<std::uint32_t*>(to)[lane + 32 * i] = Pair<Row>::pack(
          static_cast<float>(out[i][0] * inverse), static_cast<float>(out[i][1] * inverse));
    }
  }
}

}  // namespace headwise::inline v0::cuda::detail
