// SPDX-License-Identifier: MIT
/// @file rounding.hpp
/// Quotients rounded up: how many pages, tiles or blocks hold so many tokens.
#pragma once

#include <cstdint>

namespace headwise::inline v0 {

/// a / b rounded up, for a >= 0 and b > 0.
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }
/// The least multiple of b that is no less than a, for a >= 0 and b > 0.
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

}  // namespace headwise::inline v0
