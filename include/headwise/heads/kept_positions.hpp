// SPDX-License-Identifier: MIT
/// @file kept_positions.hpp
/// KeptPositions: which tokens each KV head is to keep, the outcome of a selection.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/core/config.hpp"

namespace headwise::inline v0 {

/// For each KV head, layer by layer, the positions of the tokens that it keeps, ascending. Heads
/// that are not selected from (retrieval, streaming) have none.
class KeptPositions {
 public:
  /// Appends the next head.
  void add_head(std::span<const std::int32_t> positions) {
    positions_.insert(positions_.end(), positions.begin(), positions.end());
    first_.push_back(positions_.size());
  }
  /// Heads so far.
  std::int64_t num_heads() const { return static_cast<std::int64_t>(first_.size()) - 1; }
  /// What head `head` keeps.
  /// @pre 0 <= head < num_heads()
  std::span<const std::int32_t> of_head(std::int64_t head) const& {
    const auto h = static_cast<std::size_t>(head);
    return std::span(positions_).subspan(first_[h], first_[h + 1] - first_[h]);
  }
  std::span<const std::int32_t> of_head(std::int64_t head) const&& = delete;
  /// Positions of all heads.
  std::int64_t num_positions() const { return static_cast<std::int64_t>(positions_.size()); }
  /// Forgets all heads; keeps the memory.
  void clear() {
    positions_.clear();
    first_.assign(1, 0);
  }

  friend bool operator==(const KeptPositions&, const KeptPositions&) = default;

 private:
  std::vector<std::int32_t> positions_;
  std::vector<std::size_t> first_{0};  // [heads + 1]
};

}  // namespace headwise::inline v0
