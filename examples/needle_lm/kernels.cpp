// SPDX-License-Identifier: MIT
#include "kernels.hpp"

namespace headwise {

template class AttendTasks<simd::BestIsa, f32>;
template class AttendTasks<simd::BestIsa, f16>;
template class AttendTasks<simd::BestIsa, bf16>;

}  // namespace headwise
