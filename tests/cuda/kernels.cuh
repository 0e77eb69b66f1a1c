// SPDX-License-Identifier: MIT
/// @file kernels.cuh
/// The kernels of every width, which kernels_*.cu instantiate: nobody else compiles them again.
#pragma once

#include "headwise/attention/cuda/decode/decode.cuh"
#include "headwise/attention/cuda/prefill/prefill.cuh"

/// A size's decode kernels of one type of rows, as they are asked for and as they are made.
#define HEADWISE_DECODE_KERNELS(size, row) \
  template cudaError_t prepare_decode<size, row>(int, const DeviceLimits&, DecodeKernel&)

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

}  // namespace headwise::inline v0::cuda
