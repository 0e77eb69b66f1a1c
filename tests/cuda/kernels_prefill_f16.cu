// SPDX-License-Identifier: MIT
#include "cuda/kernels.cuh"

namespace headwise::inline v0::cuda {

HEADWISE_PREFILL_KERNELS(template, f16);

}  // namespace headwise::inline v0::cuda
