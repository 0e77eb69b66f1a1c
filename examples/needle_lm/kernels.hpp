// SPDX-License-Identifier: MIT
/// @file kernels.hpp
/// The attention that all files of the program share is compiled once, in kernels.cpp.
#pragma once

#include <cstdint>

#include "headwise/attention/cpu/mixed_gradient.hpp"
#include "headwise/attention/tasks.hpp"

namespace headwise {

extern template class AttendTasks<simd::BestIsa, f32>;
extern template class AttendTasks<simd::BestIsa, f16>;
extern template class AttendTasks<simd::BestIsa, bf16>;
extern template double mixed_gradient<simd::BestIsa>(const MixedHead&, std::int64_t, std::int64_t,
                                                     float*) noexcept;

}  // namespace headwise
