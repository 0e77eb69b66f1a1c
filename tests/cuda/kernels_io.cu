// SPDX-License-Identifier: MIT
#include "cuda/kernels.cuh"

namespace headwise::inline v0::cuda {

HEADWISE_IO_KERNELS(template, f16, f32);
HEADWISE_IO_KERNELS(template, f16, bf16);
HEADWISE_IO_KERNELS(template, bf16, f32);

}  // namespace headwise::inline v0::cuda
