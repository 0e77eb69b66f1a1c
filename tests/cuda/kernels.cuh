// SPDX-License-Identifier: MIT
/// @file kernels.cuh
/// The kernels of every width, which kernels_*.cu instantiate: nobody else compiles them again.
#pragma once

#include "headwise/attention/cuda/decode/decode.cuh"
#include "headwise/attention/cuda/prefill/prefill.cuh"

namespace headwise::inline v0::cuda {

extern template cudaError_t prepare_decode<f16>(int, const DeviceLimits&, DecodeKernel&);
extern template cudaError_t prepare_decode<bf16>(int, const DeviceLimits&, DecodeKernel&);
extern template cudaError_t prepare_prefill<f16>(int, PrefillKernel&);
extern template cudaError_t prepare_prefill<bf16>(int, PrefillKernel&);

}  // namespace headwise::inline v0::cuda
