// SPDX-License-Identifier: MIT
#include "cuda/kernels.cuh"

namespace headwise::inline v0::cuda {

HEADWISE_SOFTMAX_KERNELS(template, bf16, ShapedDims<bf16>, ShapedSoftmax);
HEADWISE_SOFTMAX_KERNELS(template, bf16, SinkDims<bf16>, SinkSoftmax);

}  // namespace headwise::inline v0::cuda
