// SPDX-License-Identifier: MIT
/// @file tensor_view.hpp
/// A borrowed [tokens, heads, dim] tensor: what an engine hands to attention.
#pragma once

#include <concepts>
#include <cstdint>

#include "headwise/core/config.hpp"

namespace headwise::inline v0 {

/// Rows of `dim` contiguous elements, one per (token, head); strides in elements.
template <class T>
struct TensorView {
  T* data = nullptr;          ///< row (0, 0); borrowed
  std::int64_t stride_n = 0;  ///< from one token to the next
  std::int64_t stride_h = 0;  ///< from one head to the next

  /// A dense [tokens, heads, dim] tensor (NHD).
  static constexpr TensorView nhd(T* data, std::int64_t heads, std::int64_t dim) {
    return {data, heads * dim, dim};
  }

  /// The `dim` elements of one token and head.
  constexpr T* row(std::int64_t token, std::int64_t head) const {
    return data + token * stride_n + head * stride_h;
  }

  /// The same tensor, read-only. A template, or nvcc warns where T is const already.
  template <class Const>
    requires(std::same_as<Const, const T> && !std::same_as<Const, T>)
  constexpr operator TensorView<Const>() const { return {data, stride_n, stride_h}; }
};

}  // namespace headwise::inline v0
