// SPDX-License-Identifier: MIT
/// @file head_dims.cuh
/// Which head widths kernels are compiled for, and the way from a number to one of them.
#pragma once

#include <cuda_runtime.h>

namespace headwise::inline v0::cuda {

/// A list of head widths. Each costs a kernel: name only what a model needs to compile faster.
template <int... kDims>
struct HeadDims {
  /// Whether a kernel is compiled for the width.
  static constexpr bool contains(int dim) { return ((dim == kDims) || ...); }
};

/// Every width that kernels exist for.
using AllHeadDims = HeadDims<32, 64, 80, 96, 128, 256>;

/// A width as a type.
template <int kValue>
struct HeadDim {
  static constexpr int value = kValue;  ///< the width
};

/// `fn(HeadDim<dim>{})`, or cudaErrorInvalidValue where `dim` is not in the list.
template <int... kDims, class Fn>
cudaError_t with_head_dim(HeadDims<kDims...>, int dim, Fn&& fn) {
  cudaError_t result = cudaErrorInvalidValue;
  (void)((dim == kDims && (result = fn(HeadDim<kDims>{}), true)) || ...);
  return result;
}

}  // namespace headwise::inline v0::cuda
