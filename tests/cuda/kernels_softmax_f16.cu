// SPDX-License-Identifier: MIT
#include "cuda/kernels.cuh"

namespace headwise::inline v0::cuda {

HEADWISE_SOFTMAX_KERNELS(template, f16, ShapedDims<f16>, ShapedSoftmax);
template cudaError_t prepare_prefill<f16, HeadDims<64>, ShapedSoftmax>(int, PrefillKernel&);
HEADWISE_SOFTMAX_KERNELS(template, f16, SinkDims<f16>, SinkSoftmax);

}  // namespace headwise::inline v0::cuda
