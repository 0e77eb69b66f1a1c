// SPDX-License-Identifier: MIT
/// @file phase.hpp
/// What a chunk of tokens is to a streaming head: part of a prompt, or decode.
#pragma once

#include <cstdint>

namespace headwise::inline v0 {

/// Which rule a chunk's queries follow. It matters to chunks of several tokens on streaming heads,
/// and where a budget has a prompt window of its own.
enum class Phase : std::uint8_t {
  kPrompt,  ///< streaming heads follow CacheOptions::prefill
  kDecode,  ///< streaming heads follow the window rule; any number of tokens (speculation)
};

/// Which rows a prompt's queries see on a streaming head. Decode chunks are always windowed.
enum class PrefillMode : std::uint8_t {
  /// Every query obeys the window rule, however the prompt is cut into chunks.
  kWindowed,
  /// A query sees the rows that its chunk's first query sees plus its own chunk up to itself
  /// (DuoAttention, arXiv:2410.10819, section 2.4); a prompt in one chunk is dense attention.
  kChunkCausal,
};

}  // namespace headwise::inline v0
