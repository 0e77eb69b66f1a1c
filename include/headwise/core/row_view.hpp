// SPDX-License-Identifier: MIT
/// @file row_view.hpp
/// RowView: rows of one head, borrowed: what scorers read.
#pragma once

#include <cstdint>

#include "headwise/core/check.hpp"

namespace headwise::inline v0 {

/// `count` rows of `dim` contiguous floats each.
struct RowView {
  const float* data = nullptr;  ///< row 0; borrowed
  std::int64_t stride = 0;      ///< floats from one row to the next
  std::int64_t count = 0;       ///< rows
  int dim = 0;                  ///< floats of a row

  /// Rows one after the other.
  static constexpr RowView dense(const float* data, std::int64_t count, int dim) {
    return {data, dim, count, dim};
  }
  /// The floats of one row.
  constexpr const float* row(std::int64_t i) const { return data + i * stride; }
  /// Rows [first, last).
  constexpr RowView rows(std::int64_t first, std::int64_t last) const {
    HEADWISE_ASSERT(0 <= first && first <= last && last <= count, "rows out of range");
    return {data + first * stride, stride, last - first, dim};
  }
};

}  // namespace headwise::inline v0
