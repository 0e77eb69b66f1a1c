// SPDX-License-Identifier: MIT
#include "kernels.hpp"

namespace headwise {

template class AttendTasks<simd::BestIsa, f32>;
template class AttendTasks<simd::BestIsa, f16>;
template class AttendTasks<simd::BestIsa, bf16>;
template double mixed_gradient<simd::BestIsa>(const MixedHead&, std::int64_t, std::int64_t,
                                              float*) noexcept;

}  // namespace headwise
