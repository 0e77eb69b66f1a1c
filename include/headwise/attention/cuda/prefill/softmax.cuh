// SPDX-License-Identifier: MIT
/// @file softmax.cuh
/// Softmax of 16 query rows in a warp's registers, block of keys by block of keys.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "headwise/attention/cuda/compensation.cuh"
#include "headwise/attention/cuda/prefill/exact.cuh"
#include "headwise/attention/cuda/prefill/tile.cuh"
#include "headwise/attention/cuda/ptx/tensor_core.cuh"
#include "headwise/attention/cuda/softmax_kind.cuh"
#include "headwise/cache/cuda/elements.cuh"

namespace headwise::inline v0::cuda::detail {

/// In place of a result that must not be used.
inline constexpr float kNoNumber = std::numeric_limits<float>::quiet_NaN();

/// A lane's two rows of a tile, `first` and first + 8: for what query heads have of their own.
struct LaneRows {
  const PrefillArgs& args;
  const PrefillTile& tile;
  const QueryGroup& group;
  int first = 0;

  __device__ __forceinline__ int head(int r) const {
    return query_head(args, tile, group, first + 8 * r);
  }
  __device__ __forceinline__ int pos(int r) const { return tile.pos_of(first + 8 * r, group); }
};

/// What a lane keeps of its two rows: lane 4g + t has rows g and g + 8 of the warp's 16, and of
/// each 8 keys those at 2t and 2t + 1. Scores are [keys / 8][row g: 2 keys, row g + 8: 2 keys].
template <class Row, SoftmaxKind Softmax>
class RowSoftmax {
 public:
  /// What add() must multiply scores by: nothing where shape() has done so.
  static __device__ __forceinline__ float scale_log2(const PrefillArgs& args) {
    return Softmax::kShapesScores ? 1.0F : args.scale_log2;
  }

  /// @param row  of the tile, the lane's first one.
  __device__ __forceinline__ void begin(const PrefillTile& tile, const QueryGroup& group, int row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      seen_[r] = SeenKeys(tile.keys, tile.state, tile.pos_of(row + 8 * r, group));
      max_[r] = kLowest;
      sum_[r] = 0.0F;
    }
  }

  /// From q.k to logits, in units of exp2: scale, soft-cap, then ALiBi's slope times the tokens
  /// from query to key. Before mask(): keys past the tile's last one have no position.
  /// @param first  of the keys, in the tile's list.
  template <int kBlocks>
  static __device__ __forceinline__ void shape(const LaneRows& rows, int first,
                                               float (&score)[kBlocks][4]) {
    if constexpr (Softmax::kShapesScores) {
      const SoftmaxArgs& softmax = rows.args.softmax;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[n][i] *= rows.args.scale_log2;
      }
      if (softmax.cap > 0.0F) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) score[n][i] = softmax.capped(score[n][i]);
        }
      }
      if (softmax.alibi_slopes == nullptr) return;
      first += static_cast<int>(threadIdx.x % 4) * 2;
      const KeyList keys = rows.tile.keys;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float slope = __ldg(softmax.alibi_slopes + rows.head(r));
        const int pos = rows.pos(r);
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& logit = score[n][2 * r + i];
            const int distance = keys.position(first + 8 * n + i) - pos;
            logit = fmaf(slope, static_cast<float>(distance), logit);
          }
        }
      }
    }
  }

  /// Takes out the keys [first, first + 8 kBlocks) that a row does not see.
  template <int kBlocks>
  __device__ __forceinline__ void mask(int first, float (&score)[kBlocks][4]) const {
    static_assert(kBlocks <= 16, "a bit for each of the lane's two keys of eight");
    first += static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned seen =
          keys_below(seen_[r].end - first) &
          (keys_below(seen_[r].sinks - first) | ~keys_below(seen_[r].recent - first));
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if ((seen >> (2 * n + i) & 1) == 0) score[n][2 * r + i] = kHidden;
        }
      }
    }
  }

  /// Scores become weights, in units of exp2 less the headroom, against the greatest score so far
  /// or one that is at most kSlack below.
  /// @param factor  what the two rows' earlier results must be multiplied by, if anything.
  /// @return whether they must: the warp's rows agree on it.
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
    const bool rises = __any_sync(kWholeWarp, (top[0] - max_[0]) * scale_log2 > kSlack ||
                                                  (top[1] - max_[1]) * scale_log2 > kSlack);
    if (rises) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        factor[r] = exp2_fast((max_[r] - top[r]) * scale_log2);
        max_[r] = top[r];
        sum_[r] *= factor[r];
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // A row that has seen nothing yet has no maximum to subtract: hidden keys have weight 0.
      const float offset = max_[r] == kLowest ? kHeadroom : fmaf(max_[r], scale_log2, kHeadroom);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          score[n][i] = exp2_fast(fmaf(score[n][i], scale_log2, -offset));
          sum_[r] += score[n][i];
        }
      }
      asm volatile("" : "+f"(sum_[r]));  // added up here, not behind the next wait
    }
    return rises;
  }

  /// The lane's state, for others: see add_part().
  __device__ __forceinline__ float4 part() const {
    return make_float4(max_[0], max_[1], sum_[0], sum_[1]);
  }
  /// Starts to put parts together: first raise() with each of them, then add_part() likewise.
  __device__ __forceinline__ void begin_parts() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      max_[r] = kLowest;
      sum_[r] = 0.0F;
    }
  }
  /// Takes note of a part's greatest scores.
  __device__ __forceinline__ void raise(const float4& part) {
    max_[0] = fmaxf(max_[0], part.x);
    max_[1] = fmaxf(max_[1], part.y);
  }
  /// Adds a part's sums of weights.
  /// @param factor  what its results must be multiplied by. 0 for a part in which a row sees
  /// nothing.
  __device__ __forceinline__ void add_part(const float4& part, float scale_log2,
                                           float (&factor)[2]) {
    factor[0] = exp2_fast((part.x - max_[0]) * scale_log2);
    factor[1] = exp2_fast((part.y - max_[1]) * scale_log2);
    sum_[0] = fmaf(part.z, factor[0], sum_[0]);
    sum_[1] = fmaf(part.w, factor[1], sum_[1]);
  }

  /// Adds the row that stands for those that the head has dropped, once a row's results are
  /// complete. Lanes that share a row divide its products among them.
  template <int kBlocks>
  __device__ __forceinline__ void add_compensation(const LaneRows& rows, float (&out)[kBlocks][4]) {
    if constexpr (Softmax::kHasCompensation) {
      const MeanRow mean = mean_row<kBlocks * 8>(rows.args, rows.tile);
      if (!mean.exists()) return;
      const int t = static_cast<int>(threadIdx.x % 4);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const std::uint16_t* q = find_query(rows.args, rows.tile, rows.group, rows.first + 8 * r);
        float dot = dot_with_mean<Row, Row>(q, mean.k, t, 4, kBlocks * 4);
        dot += __shfl_xor_sync(kWholeWarp, dot, 1);
        dot += __shfl_xor_sync(kWholeWarp, dot, 2);
        static_assert(Softmax::kShapesScores, "max_ has the scale in it");
        const JoiningRow joining(max_[r], mean.logit(dot, rows.args.scale_log2, rows.args.softmax),
                                 kHeadroom);
        max_[r] = joining.top;
        sum_[r] = sum_[r] * joining.factor + (t == 0 ? joining.weight : 0.0F);
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& x = out[n][2 * r + i];
            x = joining.joined(x, mean.v + n * 8 + 2 * t + i);
          }
        }
      }
    }
  }

  /// What a row's results must be multiplied by in the end; NaN where they are not to be used: the
  /// key with the greatest score has a weight of at least 2^-kHeadroom, so a smaller sum has lost
  /// it.
  /// @param r  0: row g, 1: row g + 8.
  __device__ __forceinline__ float inverse_sum(const LaneRows& rows, int r) const {
    float sum = sum_[r];
    sum += __shfl_xor_sync(kWholeWarp, sum, 1);
    sum += __shfl_xor_sync(kWholeWarp, sum, 2);
    constexpr float kLeast =
        1.0F / static_cast<float>(std::uint64_t{2} << static_cast<int>(kHeadroom));
    constexpr float kMost = 1e18F;
    float with_sink = sum;
    if constexpr (Softmax::kHasSinks) {
      const float offset = fmaf(max_[r], scale_log2(rows.args), kHeadroom);
      with_sink += rows.args.softmax.sink_weight(rows.head(r), offset);
    }
    return sum >= kLeast && sum <= kMost ? inverse_fast(with_sink) : kNoNumber;
  }

  /// Divides by the sums of weights and writes the 16 rows to padded shared memory.
  /// @return the rows that have become no numbers, see named_rows().
  template <int kDim>
  __device__ __forceinline__ unsigned store(const LaneRows& lane_rows,
                                            const float (&out)[kDim / 8][4],
                                            std::uint16_t* rows) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    std::uint32_t zeros[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float inverse = inverse_sum(lane_rows, r);
      std::uint16_t* row = rows + (lane / 4 + r * 8) * kPaddedDim<kDim> + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const std::uint32_t pair =
            Pair<Row>::pack(out[n][2 * r] * inverse, out[n][2 * r + 1] * inverse);
        TensorCore<Row>::note(pair, zeros[r]);
        *reinterpret_cast<std::uint32_t*>(row + n * 8) = pair;
      }
    }
    return named_rows(!are_zeros(zeros[0]), !are_zeros(zeros[1]));
  }

 private:
  static constexpr float kHeadroom = TensorCore<Row>::kHeadroom;
  /// Powers of two that weights may exceed 2^-kHeadroom by before results are rescaled: 2^8 is far
  /// from the end of f16 and of the sums, and after a row's first keys scores seldom rise by that
  /// much.
  static constexpr float kSlack = 8.0F;

  /// Of the keys 8n + i, i < 2, those below `key`: bit 2n + i each.
  static __device__ __forceinline__ unsigned keys_below(int key) {
    const int count = (key >> 3) * 2 + min(key & 7, 2);
    return count <= 0 ? 0U : count >= 32 ? ~0U : (1U << count) - 1U;
  }

  SeenKeys seen_[2];
  float max_[2];  // of the scores before scaling, but for kSlack
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
