// SPDX-License-Identifier: MIT
/// @file softmax_kind.cuh
/// What a kernel's softmax has besides a scale: a choice of who compiles it, so that nobody pays
/// for what his models do not have.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <vector>

#include "headwise/attention/cuda/ptx/tensor_core.cuh"
#include "headwise/cache/cuda/fold_state.cuh"
#include "headwise/core/check.hpp"
#include "headwise/core/shape.hpp"

namespace headwise::inline v0::cuda {

/// A scale alone.
struct PlainSoftmax {
  static constexpr bool kHasSinks = false;         ///< SoftmaxOptions::sinks
  static constexpr bool kShapesScores = false;     ///< SoftmaxOptions::soft_cap and alibi_slopes
  static constexpr bool kHasCompensation = false;  ///< KeepGrowingWindow's row
};
/// Learned sink logits (gpt-oss), which cost something where a row ends, and nothing for its keys.
struct SinkSoftmax {
  static constexpr bool kHasSinks = true;          ///< SoftmaxOptions::sinks
  static constexpr bool kShapesScores = false;     ///< SoftmaxOptions::soft_cap and alibi_slopes
  static constexpr bool kHasCompensation = false;  ///< KeepGrowingWindow's row
};
/// All that SoftmaxOptions can say: soft-cap (Gemma 2), ALiBi, sinks, each if a layer has it.
struct ShapedSoftmax {
  static constexpr bool kHasSinks = true;          ///< SoftmaxOptions::sinks
  static constexpr bool kShapesScores = true;      ///< SoftmaxOptions::soft_cap and alibi_slopes
  static constexpr bool kHasCompensation = false;  ///< KeepGrowingWindow's row
};
/// All of that, and growing windows (RazorAttention), whose compensation row costs something where
/// a row ends.
struct CompensatedSoftmax {
  static constexpr bool kHasSinks = true;         ///< SoftmaxOptions::sinks
  static constexpr bool kShapesScores = true;     ///< SoftmaxOptions::soft_cap and alibi_slopes
  static constexpr bool kHasCompensation = true;  ///< KeepGrowingWindow's row
};

/// One of the four above.
template <class T>
concept SoftmaxKind = std::same_as<T, PlainSoftmax> || std::same_as<T, SinkSoftmax> ||
    std::same_as<T, ShapedSoftmax> || std::same_as<T, CompensatedSoftmax>;

/// A layer's SoftmaxOptions as kernels read them: in powers of two, as scores are there.
struct SoftmaxArgs {
  float cap = 0.0F;                     ///< soft_cap x log2(e); 0: none
  float inverse_cap = 0.0F;             ///< 1 / cap
  const float* sinks = nullptr;         ///< [num_qo_heads] x log2(e), on the device; null: none
  const float* alibi_slopes = nullptr;  ///< likewise
  FoldedHeads folded;                   ///< the layer's compensation rows

  /// The same for a launch whose query head 0 is the layer's `head`.
  SoftmaxArgs from_head(std::int64_t head) const {
    SoftmaxArgs args = *this;
    if (sinks != nullptr) args.sinks += head;
    if (alibi_slopes != nullptr) args.alibi_slopes += head;
    return args;
  }

#ifdef __CUDACC__
  /// soft_cap * tanh(score / soft_cap).
  /// @pre cap > 0
  __host__ __device__ float capped(float score) const { return cap * tanhf(score * inverse_cap); }
  /// A query head's sink as a weight like those of its keys, which are 2^(logit - offset).
  __device__ __forceinline__ float sink_weight(int head, float offset) const {
    return sinks == nullptr ? 0.0F : exp2_fast(__ldg(sinks + head) - offset);
  }
#endif  // __CUDACC__
};

namespace detail {

/// x log2(e), as far as f32 reaches.
inline float in_log2(float x) {
  constexpr double kLog2EInDouble = 1.4426950408889634;
  constexpr double kMost = std::numeric_limits<float>::max();
  return static_cast<float>(std::clamp(static_cast<double>(x) * kLog2EInDouble, -kMost, kMost));
}
/// Likewise, one by one.
inline std::vector<float> in_log2(const std::vector<float>& values) {
  std::vector<float> result;
  for (const float x : values) result.push_back(in_log2(x));
  return result;
}

/// @throws ConfigError where the layer's softmax has more than kernels of this kind.
/// @param has_compensation  whether some head of it keeps a growing window.
template <SoftmaxKind Softmax>
void check_softmax_kind(const SoftmaxOptions& softmax, bool has_compensation, int layer) {
  if (!Softmax::kHasCompensation && has_compensation) {
    fail<ConfigError>("layer ", layer,
                      ": growing windows (RazorAttention) need device kernels of "
                      "CompensatedSoftmax");
  }
  if (!Softmax::kShapesScores && softmax.soft_cap != 0.0F) {
    fail<ConfigError>("layer ", layer, ": soft_cap ", softmax.soft_cap,
                      " needs device kernels of ShapedSoftmax");
  }
  if (!Softmax::kShapesScores && !softmax.alibi_slopes.empty()) {
    fail<ConfigError>("layer ", layer, ": ", softmax.alibi_slopes.size(),
                      " alibi_slopes need device kernels of ShapedSoftmax");
  }
  if (!Softmax::kHasSinks && !softmax.sinks.empty()) {
    fail<ConfigError>("layer ", layer, ": ", softmax.sinks.size(),
                      " sinks need device kernels of SinkSoftmax or ShapedSoftmax");
  }
}

}  // namespace detail
}  // namespace headwise::inline v0::cuda
