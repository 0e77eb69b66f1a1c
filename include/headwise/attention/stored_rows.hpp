// SPDX-License-Identifier: MIT
/// @file stored_rows.hpp
/// StoredRows: one head's rows as floats, read out of a cache for scorers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "headwise/core/kv_view.hpp"
#include "headwise/core/row_view.hpp"

namespace headwise::inline v0 {

/// K and V of all rows of a view, as queries see them: rounded. One object serves head after head.
class StoredRows {
 public:
  /// Reads what a cache stores of a head: `rows.read(cache.stored(id, layer, kv_head))`. Views of
  /// before are no longer valid. Grows to 4 (k_dim + v_dim) bytes a row.
  template <class Format>
  void read(const KvView<Format>& view) {
    k_dim_ = view.shape.k_dim;
    v_dim_ = view.shape.v_dim;
    count_ = view.num_rows();
    k_.resize(static_cast<std::size_t>(count_ * k_dim_));
    v_.resize(static_cast<std::size_t>(count_ * v_dim_));
    float* k = k_.data();
    float* v = v_.data();
    for (const KvRun& run : view.runs()) {
      for (std::int64_t i = 0; i < run.count; ++i, k += k_dim_, v += v_dim_) {
        const Slot slot = run.first_slot + i;
        Format::read_row(view.page_of(slot), view.shape,
                         static_cast<std::size_t>(slot.value % view.shape.page_tokens), k, v);
      }
    }
  }

  /// [rows, k_dim], in the order of positions.
  RowView keys() const& { return RowView::dense(k_.data(), count_, k_dim_); }
  /// [rows, v_dim]
  RowView values() const& { return RowView::dense(v_.data(), count_, v_dim_); }
  RowView keys() const&& = delete;
  RowView values() const&& = delete;

 private:
  std::vector<float> k_, v_;
  std::int64_t count_ = 0;
  int k_dim_ = 0;
  int v_dim_ = 0;
};

}  // namespace headwise::inline v0
