// SPDX-License-Identifier: MIT
/// @file kernels.cuh
/// The kernels of every width, which kernels_*.cu instantiate: nobody else compiles them again.
#pragma once

#include <concepts>
#include <type_traits>

#include "headwise/attention/cuda/decode/decode.cuh"
#include "headwise/attention/cuda/prefill/prefill.cuh"
#include "headwise/attention/cuda/softmax_kind.cuh"

/// A size's decode kernels of one type of rows, as they are asked for and as they are made.
#define HEADWISE_DECODE_KERNELS(size, row) \
  template cudaError_t prepare_decode<size, row>(int, const DeviceLimits&, DecodeKernel&)

/// All kernels of one type of rows, some widths and a softmax that has more than a scale.
/// @param how  extern template, where they are asked for; template, where they are made
#define HEADWISE_SOFTMAX_KERNELS(how, row, dims, kind)                              \
  how cudaError_t prepare_decode<0, row, dims, row, kind>(int, const DeviceLimits&, \
                                                          DecodeKernel&);           \
  how cudaError_t prepare_decode<1, row, dims, row, kind>(int, const DeviceLimits&, \
                                                          DecodeKernel&);           \
  how cudaError_t prepare_decode<2, row, dims, row, kind>(int, const DeviceLimits&, \
                                                          DecodeKernel&);           \
  how cudaError_t prepare_decode<3, row, dims, row, kind>(int, const DeviceLimits&, \
                                                          DecodeKernel&);           \
  how cudaError_t prepare_prefill<row, dims, kind>(int, PrefillKernel&)

namespace headwise::inline v0::cuda {

extern HEADWISE_DECODE_KERNELS(0, f16);
extern HEADWISE_DECODE_KERNELS(1, f16);
extern HEADWISE_DECODE_KERNELS(2, f16);
extern HEADWISE_DECODE_KERNELS(3, f16);
extern HEADWISE_DECODE_KERNELS(0, bf16);
extern HEADWISE_DECODE_KERNELS(1, bf16);
extern HEADWISE_DECODE_KERNELS(2, bf16);
extern HEADWISE_DECODE_KERNELS(3, bf16);
extern template cudaError_t prepare_prefill<f16>(int, PrefillKernel&);
extern template cudaError_t prepare_prefill<bf16>(int, PrefillKernel&);

/// Widths that are tested, with one type of rows each: the first is of warpgroup prefill.
template <class Row>
using ShapedDims = std::conditional_t<std::same_as<Row, f16>, HeadDims<64, 80>, HeadDims<128, 256>>;
template <class Row>
using SinkDims = std::conditional_t<std::same_as<Row, f16>, HeadDims<64>, HeadDims<80>>;
HEADWISE_SOFTMAX_KERNELS(extern template, f16, ShapedDims<f16>, ShapedSoftmax);
HEADWISE_SOFTMAX_KERNELS(extern template, bf16, ShapedDims<bf16>, ShapedSoftmax);
HEADWISE_SOFTMAX_KERNELS(extern template, f16, SinkDims<f16>, SinkSoftmax);
HEADWISE_SOFTMAX_KERNELS(extern template, bf16, SinkDims<bf16>, SinkSoftmax);
HEADWISE_SOFTMAX_KERNELS(extern template, f16, ShapedDims<f16>, CompensatedSoftmax);
HEADWISE_SOFTMAX_KERNELS(extern template, bf16, ShapedDims<bf16>, CompensatedSoftmax);

}  // namespace headwise::inline v0::cuda
