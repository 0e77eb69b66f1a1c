// SPDX-License-Identifier: MIT
/// @file options.hpp
/// What a cache is built with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <span>

#include "headwise/core/phase.hpp"
#include "headwise/heads/budget.hpp"

namespace headwise::inline v0 {

/// What a cache is built with; max_context is the one option without a default that works.
struct CacheOptions {
  /// Rows of K and of V in a page; a multiple of 16. 64 x 128 x 2 bytes are 16 KiB each.
  int page_tokens = 64;
  /// Bytes of page memory, all layers and sequences together; rounded down to whole pages, or to
  /// whole slabs where layers differ in width (cache/pages/page_pool.hpp). 0: enough for any step
  /// over `max_sequences` sequences of `max_context` tokens.
  std::size_t max_bytes = 0;
  /// Sequences that may live at once; >= 1.
  int max_sequences = 1;
  /// Longest sequence in tokens.
  std::int64_t max_context = 0;
  /// Most new tokens of one sequence in a step; 0: as many as the context. An engine of short
  /// chunks saves the second rings that long ones need while they are open.
  std::int64_t max_chunk = 0;
  /// Tokens that rollback may take back below the longest length committed.
  std::int64_t max_rollback = 0;
  /// A checkpoint of every sequence each so many tokens, so that a fork may begin there when rings
  /// have long moved on (KvCache::fork at a length); 0: none. A step that begins at least so many
  /// tokens after the last one makes one where it begins; none once the sequence was selected from.
  std::int64_t checkpoint_tokens = 0;
  /// The rule of prompt chunks on streaming heads.
  PrefillMode prefill = PrefillMode::kWindowed;

  /// Which of a cache's formats (Formats<...>, by index) the heads of a budget have; null: the
  /// first where everything is kept, the last elsewhere.
  int (*format_of)(const HeadBudget&) = nullptr;

  /// Page memory given by the caller, of the cache's place, 64-byte aligned, at least `max_bytes`;
  /// empty: allocated.
  std::span<std::byte> page_memory = {};
  /// Where page memory (unless given, or a device's) and metadata come from, one allocation each.
  std::pmr::memory_resource* resource = std::pmr::get_default_resource();
};

}  // namespace headwise::inline v0
