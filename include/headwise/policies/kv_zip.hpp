// SPDX-License-Identifier: MIT
/// @file kv_zip.hpp
/// KVzip: what a model looks at when it repeats its context is what any question will need.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "headwise/attention/observed_queries.hpp"
#include "headwise/attention/received.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/heads/token_scores.hpp"
#include "headwise/simd/simd.hpp"

/// Kim et al., KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction,
/// arXiv:2505.23416. After the prompt the engine runs a second pass over a fork of the sequence:
/// for each chunk of the context (2048 tokens) an instruction to repeat it, and the chunk. A
/// token's score is the largest weight that any query of the pass gives its key, among the prefix,
/// the chunk's keys and the pass's own. Scores lie in [0, 1] and are compared over all layers and
/// heads (shared_counts over one TokenScores), or within a layer.
///
/// The prefix (system prompt and template) always stays, as in the authors' code; kvpress loses
/// parts of it.
namespace headwise::inline v0::kv_zip {

/// Largest weights of one KV head's context tokens over a reconstruction pass.
class Maxima {
 public:
  /// @param length  tokens of the context, prefix included
  /// @throws ConfigError for a length outside [0, kMaxTokens].
  explicit Maxima(std::int64_t length)
      : maxima_(static_cast<std::size_t>(
            detail::checked_range(length, 0, kMaxTokens, "length of a context"))) {}

  /// Takes the pass over context tokens [first, first + chunk).
  /// @param queries  of the pass's tokens, in their order, after RoPE
  /// @param keys  of the first `num_sinks` tokens of the context, of the chunk, and of the pass's
  ///   tokens, in this order
  /// @throws ConfigError for counts that do not add up, or a chunk outside the context.
  template <class Isa = simd::BestIsa>
  void add_chunk(const ObservedQueries& queries, const RowView& keys, std::int64_t num_sinks,
                 std::int64_t first, std::int64_t chunk) {
    if (num_sinks < 0 || chunk < 0 || num_sinks + chunk + queries.count() != keys.count) {
      fail<ConfigError>(num_sinks, " sinks, a chunk of ", chunk, " and ", queries.count(),
                        " tokens of the pass, but ", keys.count, " keys");
    }
    if (first < 0 || first + chunk > std::ssize(maxima_)) {
      fail<ConfigError>("chunk [", first, ", ", first + chunk, ") of a context of ",
                        maxima_.size());
    }
    std::vector<std::int64_t> visible(static_cast<std::size_t>(queries.count()));
    std::iota(visible.begin(), visible.end(), num_sinks + chunk + 1);
    std::vector<float> received(static_cast<std::size_t>(keys.count), 0.0F);
    for (int g = 0; g < queries.group_size; ++g) {
      received_attention<Isa>(queries.of(g), visible, keys, queries.scale, Received::kMax,
                              received);
    }
    for (std::int64_t j = 0; j < chunk; ++j) {
      float& score = maxima_[static_cast<std::size_t>(first + j)];
      score = std::max(score, received[static_cast<std::size_t>(num_sinks + j)]);
    }
  }

  /// Appends the head to `scores`, whose length is the context's.
  /// @param stored  positions of the rows that the head stores
  /// @throws ConfigError for scores of another length.
  void add_head(std::span<const std::int32_t> stored, TokenScores& scores) const {
    if (scores.length() != std::ssize(maxima_)) {
      fail<ConfigError>("scores of a sequence of ", scores.length(), " tokens, a context of ",
                        maxima_.size());
    }
    const auto out = scores.add_head(stored);
    for (std::size_t j = 0; j < out.size(); ++j) {
      out[j] = maxima_[static_cast<std::size_t>(stored[j])];
    }
  }
  /// Of a head: for an estimate.
  static constexpr std::size_t bytes(std::int64_t length) {
    return static_cast<std::size_t>(length) * sizeof(float);
  }

 private:
  std::vector<float> maxima_;  // [length]
};

}  // namespace headwise::inline v0::kv_zip
