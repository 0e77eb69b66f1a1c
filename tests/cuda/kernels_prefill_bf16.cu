// SPDX-License-Identifier: MIT
#include "cuda/kernels.cuh"

namespace headwise::inline v0::cuda {

HEADWISE_PREFILL_KERNELS(template, bf16);

}  // namespace headwise::inline v0::cuda
