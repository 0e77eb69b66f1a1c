// SPDX-License-Identifier: MIT
#include "headwise/attention/cuda/prefill/prefill.cuh"

namespace headwise::inline v0::cuda {

template cudaError_t prepare_prefill<f16>(int, PrefillKernel&);

}  // namespace headwise::inline v0::cuda
