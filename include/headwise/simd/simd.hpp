// SPDX-License-Identifier: MIT
/// @file simd.hpp
/// Every instruction set that this translation unit is compiled for, and the best of them.
#pragma once

#include <type_traits>

#include "headwise/simd/avx2.hpp"
#include "headwise/simd/avx512.hpp"
#include "headwise/simd/isa.hpp"
#include "headwise/simd/neon.hpp"
#include "headwise/simd/scalar.hpp"

namespace headwise::inline v0::simd {

/// The widest instruction set of this translation unit. Use it as a template argument, not inside
/// an inline function of another name (see isa.hpp).
using BestIsa =
    std::conditional_t<CompiledIsa<Avx512>, Avx512,
                       std::conditional_t<CompiledIsa<Avx2>, Avx2,
                                          std::conditional_t<CompiledIsa<Neon>, Neon, Scalar>>>;

}  // namespace headwise::inline v0::simd
