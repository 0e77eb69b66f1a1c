// SPDX-License-Identifier: MIT
#include "support/attend_instances.hpp"

namespace headwise {

template class AttendTasks<simd::BestIsa, f32>;
template class AttendTasks<simd::BestIsa, f16>;
template class AttendTasks<simd::BestIsa, PlainRows<f32>>;
template class AttendTasks<simd::BestIsa, TiledRows<f32>>;
template class AttendTasks<simd::BestIsa, PlainRows<f16>>;
template class AttendTasks<simd::BestIsa, TiledRows<f16>>;
template class AttendTasks<simd::BestIsa, PlainRows<bf16>>;
template class AttendTasks<simd::BestIsa, TiledRows<bf16>>;
template class AttendTasks<simd::BestIsa, Int8Rows>;
template class AttendTasks<simd::BestIsa, Int4Rows>;
template class AttendTasks<simd::BestIsa, KvRows<Int8Rows, Int4Rows>>;
template class AttendTasks<simd::BestIsa, KvRows<f16, Int8Rows>>;

}  // namespace headwise
