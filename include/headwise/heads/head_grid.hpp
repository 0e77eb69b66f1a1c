// SPDX-License-Identifier: MIT
/// @file head_grid.hpp
/// The heads of a model, layer by layer, as one list: what scores and plans are laid out by.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>
#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/shape.hpp"

namespace headwise::inline v0::detail {

/// Layers may differ in their number of heads.
class HeadGrid {
 public:
  /// @param owner  what a message says needs heads: "a plan".
  /// @throws ConfigError for no layers, a layer without heads, and what lies beyond kMaxLayers,
  ///   kMaxHeads and kMaxModelHeads.
  HeadGrid(std::span<const int> heads_per_layer, std::string_view owner) {
    if (heads_per_layer.empty()) fail<ConfigError>(owner, " needs at least 1 layer, got 0");
    checked_range(heads_per_layer.size(), 1, kMaxLayers, "num_layers");
    for (const int heads : heads_per_layer) {
      const int layer = num_layers();
      if (heads < 1) {
        fail<ConfigError>("layer ", layer, ": ", owner, " needs at least 1 head, got ", heads);
      }
      if (heads > kMaxHeads) {
        fail<ConfigError>("layer ", layer, ": at most ", kMaxHeads, " heads, got ", heads);
      }
      first_.push_back(first_.back() + static_cast<std::size_t>(heads));
    }
    checked_range(num_heads(), 1, kMaxModelHeads, "heads of all layers");
  }

  int num_layers() const { return static_cast<int>(first_.size()) - 1; }
  std::size_t num_heads() const { return first_.back(); }
  int num_heads(int layer) const {
    const std::size_t first = first_of(layer);
    return static_cast<int>(first_[static_cast<std::size_t>(layer) + 1] - first);
  }
  std::vector<int> heads_per_layer() const {
    std::vector<int> heads;
    heads.reserve(first_.size() - 1);
    for (int layer = 0; layer < num_layers(); ++layer) heads.push_back(num_heads(layer));
    return heads;
  }

  /// Where a layer's head 0 lies in the list of all heads.
  std::size_t first_of(int layer) const {
    HEADWISE_ASSERT(layer >= 0 && layer < num_layers(), "layer out of range");
    return first_[static_cast<std::size_t>(layer)];
  }
  std::size_t index(int layer, int head) const {
    const std::size_t first = first_of(layer);
    HEADWISE_ASSERT(head >= 0 && head < num_heads(layer), "head out of range");
    return first + static_cast<std::size_t>(head);
  }

  friend bool operator==(const HeadGrid&, const HeadGrid&) = default;

 private:
  std::vector<std::size_t> first_{0};  // one more than layers
};

}  // namespace headwise::inline v0::detail
