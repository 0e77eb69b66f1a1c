// SPDX-License-Identifier: MIT
/// @file streaming_llm.hpp
/// StreamingLLM: every head keeps the first tokens and the recent ones.
#pragma once

#include "headwise/core/shape.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/policies/policy.hpp"

/// Xiao et al., StreamingLLM, arXiv:2309.17453, section 3.2. The first few tokens collect attention
/// that has nowhere else to go ("attention sinks"); a window without them fails at once.
///
/// Positions: the paper caches keys before RoPE and rotates them by their index in the cache, so
/// that a model may run past its trained length. Here keys stay at their absolute positions, as in
/// kvpress' StreamingLLMPress: memory is bounded, the trained length is not stretched.
namespace headwise::inline v0::streaming_llm {

/// The paper's 4 + 1020 cached tokens (table 1). A step attends these and its own token, which our
/// `recent` counts: 1021.
inline constexpr Window kWindow = Window::from_exclusive(4, 1020);

/// One window for every head.
struct Policy {
  Window window = kWindow;  ///< what every head keeps

  /// @throws ConfigError when the window is out of range (HeadPlan::set()).
  HeadPlan plan(const ModelShape& shape) const { return HeadPlan(shape, KeepWindow{window}); }
};
static_assert(HeadPolicy<Policy, ModelShape>);

}  // namespace headwise::inline v0::streaming_llm
