// SPDX-License-Identifier: MIT
/// @file kernels.cuh
/// The kernels that tests ask for, which kernels_*.cu instantiate: nobody else compiles them again.
#pragma once

#include <concepts>
#include <type_traits>

#include "headwise/attention/cuda/decode/decode.cuh"
#include "headwise/attention/cuda/prefill/prefill.cuh"
#include "headwise/attention/cuda/softmax_kind.cuh"

/// A size's decode kernels of one type of rows: of every width, and of the widths of some tests.
/// @param how  extern template, where they are asked for; template, where they are made
#define HEADWISE_DECODE_KERNELS(how, size, row)                                                  \
  how cudaError_t prepare_decode<size, row>(int, const DeviceLimits&, DecodeKernel&);            \
  how cudaError_t prepare_decode<size, row, TableDims>(int, const DeviceLimits&, DecodeKernel&); \
  how cudaError_t prepare_decode<size, row, DemoDims>(int, const DeviceLimits&, DecodeKernel&)

/// One type of rows' prefill kernels, likewise.
#define HEADWISE_PREFILL_KERNELS(how, row)                              \
  how cudaError_t prepare_prefill<row>(int, PrefillKernel&);            \
  how cudaError_t prepare_prefill<row, IoDims>(int, PrefillKernel&);    \
  how cudaError_t prepare_prefill<row, TableDims>(int, PrefillKernel&); \
  how cudaError_t prepare_prefill<row, DemoDims>(int, PrefillKernel&)

/// Decode kernels whose queries and outputs are of another type than rows.
#define HEADWISE_IO_KERNELS(how, row, io)                                                      \
  how cudaError_t prepare_decode<0, row, IoDims, io>(int, const DeviceLimits&, DecodeKernel&); \
  how cudaError_t prepare_decode<1, row, IoDims, io>(int, const DeviceLimits&, DecodeKernel&); \
  how cudaError_t prepare_decode<2, row, IoDims, io>(int, const DeviceLimits&, DecodeKernel&); \
  how cudaError_t prepare_decode<3, row, IoDims, io>(int, const DeviceLimits&, DecodeKernel&)

/// All kernels of one type of rows, some widths and a softmax that has more than a scale.
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

using IoDims = HeadDims<64, 128>;
using TableDims = HeadDims<128>;
using DemoDims = HeadDims<32>;  ///< examples/needle_lm/cuda_cache.cu's

HEADWISE_DECODE_KERNELS(extern template, 0, f16);
HEADWISE_DECODE_KERNELS(extern template, 1, f16);
HEADWISE_DECODE_KERNELS(extern template, 2, f16);
HEADWISE_DECODE_KERNELS(extern template, 3, f16);
HEADWISE_DECODE_KERNELS(extern template, 0, bf16);
HEADWISE_DECODE_KERNELS(extern template, 1, bf16);
HEADWISE_DECODE_KERNELS(extern template, 2, bf16);
HEADWISE_DECODE_KERNELS(extern template, 3, bf16);
HEADWISE_PREFILL_KERNELS(extern template, f16);
HEADWISE_PREFILL_KERNELS(extern template, bf16);
HEADWISE_IO_KERNELS(extern template, f16, f32);
HEADWISE_IO_KERNELS(extern template, f16, bf16);
HEADWISE_IO_KERNELS(extern template, bf16, f32);

/// Widths that are tested, with one type of rows each: the first is of warpgroup prefill.
template <class Row>
using ShapedDims = std::conditional_t<std::same_as<Row, f16>, HeadDims<64, 80>, HeadDims<128, 256>>;
template <class Row>
using SinkDims = std::conditional_t<std::same_as<Row, f16>, HeadDims<64>, HeadDims<80>>;
HEADWISE_SOFTMAX_KERNELS(extern template, f16, ShapedDims<f16>, ShapedSoftmax);
extern template cudaError_t prepare_prefill<f16, HeadDims<64>, ShapedSoftmax>(int, PrefillKernel&);
HEADWISE_SOFTMAX_KERNELS(extern template, bf16, ShapedDims<bf16>, ShapedSoftmax);
HEADWISE_SOFTMAX_KERNELS(extern template, f16, SinkDims<f16>, SinkSoftmax);
HEADWISE_SOFTMAX_KERNELS(extern template, bf16, SinkDims<bf16>, SinkSoftmax);
HEADWISE_SOFTMAX_KERNELS(extern template, f16, ShapedDims<f16>, CompensatedSoftmax);
HEADWISE_SOFTMAX_KERNELS(extern template, bf16, ShapedDims<bf16>, CompensatedSoftmax);

}  // namespace headwise::inline v0::cuda
