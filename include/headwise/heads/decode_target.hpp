// SPDX-License-Identifier: MIT
/// @file decode_target.hpp
/// DecodeTarget: when a sequence that goes on is selected from again.
#pragma once

#include <cstdint>

#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"

namespace headwise::inline v0 {

/// Cuts back to `target` rows every `interval` tokens: a head holds at most target + interval - 1
/// rows between steps of one token.
struct DecodeTarget {
  std::int64_t target = 2048;   ///< rows that a cut leaves; >= 1
  std::int64_t interval = 512;  ///< tokens from one cut to the next; >= 1

  /// Whether a cut is due after a step.
  /// @param stored  rows of the head that has most
  /// @param since_cut  tokens since the last cut, or since the prompt
  /// @param in_step  tokens of the step
  constexpr bool is_due(std::int64_t stored, std::int64_t since_cut, std::int64_t in_step) const {
    return stored > target && (since_cut >= interval || in_step >= target);
  }
  /// Most rows of a head between steps of one token: for an estimate.
  /// @throws ConfigError for what is below 1.
  constexpr std::int64_t most_rows() const {
    detail::checked_range(target, 1, kMaxTokens, "target");
    detail::checked_range(interval, 1, kMaxTokens, "interval");
    return target + interval - 1;
  }
};

}  // namespace headwise::inline v0
