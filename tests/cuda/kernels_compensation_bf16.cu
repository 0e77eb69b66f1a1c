// SPDX-License-Identifier: MIT
#include "cuda/kernels.cuh"

namespace headwise::inline v0::cuda {

HEADWISE_SOFTMAX_KERNELS(template, bf16, ShapedDims<bf16>, CompensatedSoftmax);

}  // namespace headwise::inline v0::cuda
