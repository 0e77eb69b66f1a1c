// SPDX-License-Identifier: MIT
/// @file own_rows.hpp
/// FloatRows: a step's own K or V as the row formats take them, floats, whatever the engine has.
#pragma once

#include <cstddef>
#include <cstdint>

#include "headwise/core/io_view.hpp"
#include "headwise/core/tensor_view.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0::detail {

/// Rows of one KV head, converted one by one where they are no floats.
template <class Isa>
struct FloatRows {
  InputView view;         ///< [tokens, 1, dim]
  int dim = 0;            ///< a multiple of 16
  float* room = nullptr;  ///< [dim], where a converted row goes

  /// Row of one token; good until the next call.
  const float* row(std::int64_t token, std::int64_t head) const {
    if (view.type() == IoType::kF32) return view.row(token, head);
    copy(token, head, room);
    return room;
  }
  /// All rows where they lie, if they are floats.
  TensorView<const float> floats() const {
    return view.type() == IoType::kF32 ? view.floats() : TensorView<const float>{};
  }
  /// Writes the row's floats to `to`, [dim].
  void copy(std::int64_t token, std::int64_t head, float* to) const {
    using O = simd::Ops<Isa>;
    view.visit([&](auto tensor) {
      const auto* from = tensor.row(token, head);
      for (int d = 0; d < dim; d += O::kWidth) O::store(to + d, O::load(from + d));
    });
  }
};

/// `fn(rows, stride, first, count)` with floats of rows [begin, begin + count) of a tensor: in
/// place where they are floats, else as many at a time as `room` holds.
/// @param room  [kTile x dim] floats
/// @tparam kTile  rows at a time
template <class Isa, int kTile, class Fn>
void for_each_float_rows(const InputView& view, std::int64_t begin, int count, int dim, float* room,
                         Fn&& fn) {
  if (view.type() == IoType::kF32) {
    const auto tensor = view.floats();
    return fn(tensor.row(begin, 0), static_cast<std::ptrdiff_t>(tensor.stride_n), 0, count);
  }
  const FloatRows<Isa> rows{view, dim, room};
  for (int first = 0; first < count; first += kTile) {
    const int here = first + kTile < count ? kTile : count - first;
    for (int i = 0; i < here; ++i) rows.copy(begin + first + i, 0, room + std::ptrdiff_t{i} * dim);
    fn(room, std::ptrdiff_t{dim}, first, here);
  }
}

}  // namespace headwise::inline v0::detail
