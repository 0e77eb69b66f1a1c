// SPDX-License-Identifier: MIT
/// @file page_shape.hpp
/// PageShape: how many rows of which widths a page holds.
#pragma once

#include "headwise/core/config.hpp"

namespace headwise::inline v0 {

/// One page: `page_tokens` rows of K and as many of V. What a row is and where its elements lie is
/// the row format's business (cache/rows/).
struct PageShape {
  int page_tokens = 64;  ///< rows of K and of V, a multiple of 16
  int k_dim = 0;         ///< width of a K row, a multiple of 16
  int v_dim = 0;         ///< width of a V row, a multiple of 16

  friend constexpr bool operator==(PageShape, PageShape) = default;
};

}  // namespace headwise::inline v0
