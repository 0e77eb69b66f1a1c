// SPDX-License-Identifier: MIT
#include "support/attend_instances.hpp"

namespace headwise {

template class AttendTasks<simd::BestIsa, f32>;
template class AttendTasks<simd::BestIsa, f16>;
template class AttendTasks<simd::BestIsa, TiledRows<f32>>;
template class AttendTasks<simd::BestIsa, TiledRows<f16>>;
template class AttendTasks<simd::BestIsa, PlainRows<bf16>>;
template class AttendTasks<simd::BestIsa, Int8Rows>;

}  // namespace headwise
