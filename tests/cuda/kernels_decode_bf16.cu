// SPDX-License-Identifier: MIT
#include "headwise/attention/cuda/decode/decode.cuh"

namespace headwise::inline v0::cuda {

template cudaError_t prepare_decode<bf16>(int, const DeviceLimits&, DecodeKernel&);

}  // namespace headwise::inline v0::cuda
