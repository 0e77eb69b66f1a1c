// SPDX-License-Identifier: MIT
#include "cuda/kernels.cuh"

namespace headwise::inline v0::cuda {

HEADWISE_DECODE_KERNELS(template, 3, bf16);

}  // namespace headwise::inline v0::cuda
