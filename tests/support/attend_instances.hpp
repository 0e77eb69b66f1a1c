// SPDX-License-Identifier: MIT
/// @file attend_instances.hpp
/// The kernels that several files of attention_test call, compiled once, in attend_instances.cpp:
/// the README's way to short builds.
#pragma once

#include "headwise/attention/tasks.hpp"
#include "headwise/cache/rows/int4_rows.hpp"
#include "headwise/cache/rows/int8_rows.hpp"
#include "headwise/cache/rows/kv_rows.hpp"
#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/cache/rows/tiled_rows.hpp"

namespace headwise {

extern template class AttendTasks<simd::BestIsa, f32>;
extern template class AttendTasks<simd::BestIsa, f16>;
extern template class AttendTasks<simd::BestIsa, PlainRows<f32>>;
extern template class AttendTasks<simd::BestIsa, TiledRows<f32>>;
extern template class AttendTasks<simd::BestIsa, PlainRows<f16>>;
extern template class AttendTasks<simd::BestIsa, TiledRows<f16>>;
extern template class AttendTasks<simd::BestIsa, PlainRows<bf16>>;
extern template class AttendTasks<simd::BestIsa, TiledRows<bf16>>;
extern template class AttendTasks<simd::BestIsa, Int8Rows>;
extern template class AttendTasks<simd::BestIsa, Int4Rows>;
extern template class AttendTasks<simd::BestIsa, KvRows<Int8Rows, Int4Rows>>;
extern template class AttendTasks<simd::BestIsa, KvRows<f16, Int8Rows>>;

}  // namespace headwise
