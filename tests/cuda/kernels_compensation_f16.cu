// SPDX-License-Identifier: MIT
#include "cuda/kernels.cuh"

namespace headwise::inline v0::cuda {

HEADWISE_SOFTMAX_KERNELS(template, f16, ShapedDims<f16>, CompensatedSoftmax);

}  // namespace headwise::inline v0::cuda
