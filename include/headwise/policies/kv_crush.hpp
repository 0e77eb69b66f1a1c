// SPDX-License-Identifier: MIT
/// @file kv_crush.hpp
/// KVCrush: of what a scorer drops, a few that stand for the others stay.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
#include <utility>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/heads/kept_positions.hpp"
#include "headwise/heads/splitmix64.hpp"
#include "headwise/heads/token_scores.hpp"

/// Jha et al., KVCrush: Key value cache size-reduction using similarity in head-behaviour,
/// arXiv:2503.00022. After any scorer, allocator and cut: a token is a bit a KV head, set where the
/// head ranks it in its upper half; dropped tokens are ordered by the Hamming distance of their
/// bits to an anchor's, and evenly spaced ones of that order stay, one for each bucket of alike
/// tokens.
///
///     kv_crush::Policy crush;
///     select_tokens(scores, protection, uniform_counts(scores, crush.by_score(320)), chosen);
///     kv_crush::add_representatives(crush, scores, protection, chosen, crush.num_blocks(320),
///     kept);
///
/// OpenVINO GenAI's form (da1db864) has one bit a token, of scores summed over the heads: give a
/// TokenScores of one head with those. Bits follow the positions, so heads may have stored
/// different tokens (a bit is 0 where a head has not); each head's dropped tokens are its own
/// candidates. Heads that store and keep the same tokens get the same representatives: one set a
/// layer, where its heads share pages.
namespace headwise::inline v0::kv_crush {

/// The bits that distances are taken to. A block's bits are its tokens' by position, each token's
/// its heads'.
enum class Anchor : std::uint8_t {
  kRandom,       ///< from the seed alone: the same in every layer and selection
  kZeros,        ///< unimportant everywhere
  kOnes,         ///< important everywhere
  kMean,         ///< set where more than half of the head's unprotected blocks have the bit
  kInverseMean,  ///< the opposite of kMean
  kAlternating,  ///< bit i is i mod 2
};

/// The published knobs.
struct Policy {
  double share = 0.25;              ///< of a capacity, for representatives; in [0, 1)
  std::int64_t block = 1;           ///< positions that stay together; a page's: no row moves
  Anchor anchor = Anchor::kRandom;  ///< see Anchor; OpenVINO's default
  std::uint64_t seed = 0;           ///< of kRandom, through SplitMix64 (published: mt19937)

  /// Blocks of representatives that a head's capacity has room for: floor(share capacity / block).
  /// @throws ConfigError for a share outside [0, 1), a block below 1 or a negative capacity.
  std::int64_t num_blocks(std::int64_t capacity) const {
    check();
    headwise::detail::checked_range(capacity, 0, kMaxTokens, "capacity");
    return static_cast<std::int64_t>(std::floor(share * static_cast<double>(capacity))) / block;
  }
  /// Tokens that are left to the scorer. @throws ConfigError as num_blocks().
  std::int64_t by_score(std::int64_t capacity) const {
    return capacity - num_blocks(capacity) * block;
  }
  /// @throws ConfigError for a share outside [0, 1) or a block below 1.
  void check() const {
    if (!is_finite(share) || share < 0.0 || share >= 1.0) {
      fail<ConfigError>("a share of representatives must be in [0, 1), got ", share);
    }
    headwise::detail::checked_range(block, 1, kMaxTokens, "block");
  }
};

namespace detail {

/// For each position below the length, a byte a head: 1 where the position is in the upper half
/// (floor) of the head's unprotected tokens. Ties: as a selection decides them.
inline std::vector<std::uint8_t> upper_halves(const TokenScores& layer,
                                              const Protection& protection) {
  const auto heads = static_cast<std::size_t>(layer.num_heads());
  std::vector<std::uint8_t> bits(static_cast<std::size_t>(layer.length()) * heads, 0);
  for (std::size_t h = 0; h < heads; ++h) {
    const auto head = static_cast<std::int64_t>(h);
    const auto positions = layer.positions(head);
    const std::int64_t forced = layer.num_protected(head, protection);
    const std::vector<std::int32_t> order = layer.order(head, protection);  // protected ones first
    const std::int64_t half = (std::ssize(order) - forced) / 2;
    for (std::int64_t i = forced; i < forced + half; ++i) {
      const auto token = static_cast<std::size_t>(order[static_cast<std::size_t>(i)]);
      bits[static_cast<std::size_t>(positions[token]) * heads + h] = 1;
    }
  }
  return bits;
}

/// The bits of one layer's blocks. Those of positions beyond the sequence's end are 0.
struct Signatures {
  const std::vector<std::uint8_t>& bits;  ///< of upper_halves()
  std::size_t width;                      ///< of a block: its positions x heads

  bool bit(std::int64_t block, std::size_t i) const {
    const std::size_t at = static_cast<std::size_t>(block) * width + i;
    return at < bits.size() && bits[at] != 0;
  }
};

inline std::vector<std::uint8_t> anchor_of(const Policy& policy, const Signatures& signatures,
                                           std::span<const std::int64_t> blocks) {
  std::vector<std::uint8_t> anchor(signatures.width, policy.anchor == Anchor::kOnes ? 1 : 0);
  SplitMix64 random(policy.seed);
  for (std::size_t i = 0; i < anchor.size(); ++i) {
    if (policy.anchor == Anchor::kRandom)
      anchor[i] = static_cast<std::uint8_t>(random.next() >> 63);
    if (policy.anchor == Anchor::kAlternating) anchor[i] = i % 2;
    if (policy.anchor == Anchor::kMean || policy.anchor == Anchor::kInverseMean) {
      const std::int64_t set = std::ranges::count_if(
          blocks, [&](std::int64_t block) { return signatures.bit(block, i); });
      const bool most = 2 * set > std::ssize(blocks);
      anchor[i] = most == (policy.anchor == Anchor::kMean) ? 1 : 0;
    }
  }
  return anchor;
}

}  // namespace detail

/// Appends each head of a layer: what was chosen of it, and `num_blocks` blocks of which nothing
/// was, ascending. A head that dropped fewer blocks than that keeps what was chosen alone
/// (published). A block stays as far as it is stored.
/// @param layer  all KV heads of one layer
/// @param chosen  what select_tokens() made of the same heads
/// @throws ConfigError for another number of heads, chosen positions that are not stored, a policy
///   out of range or a negative number; nothing is appended.
/// Cost: a sort a head, and a comparison a dropped token and head; a byte a position and head.
inline void add_representatives(const Policy& policy, const TokenScores& layer,
                                const Protection& protection, const KeptPositions& chosen,
                                std::int64_t num_blocks, KeptPositions& kept) {
  policy.check();
  headwise::detail::checked_range(num_blocks, 0, kMaxTokens, "blocks of representatives");
  if (chosen.num_heads() != layer.num_heads()) {
    fail<ConfigError>("scores of ", layer.num_heads(), " KV heads, and a choice of ",
                      chosen.num_heads());
  }
  for (std::int64_t h = 0; h < layer.num_heads(); ++h) {
    if (!std::ranges::includes(layer.positions(h), chosen.of_head(h))) {
      fail<ConfigError>("KV head ", h, ": what was chosen is not all stored, or not ascending");
    }
  }
  const std::vector<std::uint8_t> bits = detail::upper_halves(layer, protection);
  // A block beyond the sequence's end has no more bits than the sequence.
  const std::int64_t block = std::min(policy.block, std::max<std::int64_t>(1, layer.length()));
  const detail::Signatures signatures{
      bits, static_cast<std::size_t>(block) * static_cast<std::size_t>(layer.num_heads())};
  std::vector<std::int32_t> positions;
  for (std::int64_t h = 0; h < layer.num_heads(); ++h) {
    const auto stored = layer.positions(h);
    const auto of_head = chosen.of_head(h);
    std::vector<std::int64_t> unprotected;  // blocks with such a token
    std::vector<std::int64_t> taken;        // blocks with a chosen token
    for (const std::int32_t position : stored) {
      const std::int64_t at = position / block;
      if (!protection.covers(position, layer.length()) &&
          (unprotected.empty() || unprotected.back() != at)) {
        unprotected.push_back(at);
      }
    }
    for (const std::int32_t position : of_head) {
      if (taken.empty() || taken.back() != position / block) taken.push_back(position / block);
    }
    std::vector<std::int64_t> dropped;
    std::ranges::set_difference(unprotected, taken, std::back_inserter(dropped));
    positions.assign(of_head.begin(), of_head.end());
    if (num_blocks > 0 && std::ssize(dropped) >= num_blocks) {
      const std::vector<std::uint8_t> anchor = detail::anchor_of(policy, signatures, unprotected);
      std::vector<std::pair<std::int64_t, std::int64_t>> by_distance;  // distance, block
      for (const std::int64_t candidate : dropped) {
        std::int64_t distance = 0;
        for (std::size_t i = 0; i < anchor.size(); ++i) {
          distance += signatures.bit(candidate, i) != (anchor[i] != 0);
        }
        by_distance.emplace_back(distance, candidate);
      }
      std::sort(by_distance.begin(), by_distance.end());  // equal distances: the lower position
      const std::int64_t step = std::ssize(by_distance) / num_blocks;
      for (std::int64_t i = 0; i < num_blocks; ++i) {
        const std::int64_t first = by_distance[static_cast<std::size_t>(i * step)].second * block;
        const auto from = std::ranges::lower_bound(stored, first);
        std::copy(from, std::ranges::lower_bound(stored, first + block),
                  std::back_inserter(positions));
      }
      std::sort(positions.begin(), positions.end());
    }
    kept.add_head(positions);
  }
}

}  // namespace headwise::inline v0::kv_crush
