// SPDX-License-Identifier: MIT
/// @file kv_view.hpp
/// KvView: the stored rows of one KV head as attention sees them, whatever policy keeps them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "headwise/core/page_shape.hpp"
#include "headwise/core/position.hpp"

namespace headwise::inline v0 {

/// Consecutive positions in consecutive slots. Log weight 0.
struct KvRun {
  Slot first_slot;         ///< of the first row
  Pos first_pos;           ///< of the first row
  std::int64_t count = 0;  ///< rows; 0: an empty run
};

/// One f32 row that stands for `count` rows: their mean K, their mean V and a log weight of
/// ln(count) (RazorAttention's compensation row).
struct CompensationRow {
  const float* k_mean = nullptr;  ///< [k_dim]
  const float* v_mean = nullptr;  ///< [v_dim]
  std::int64_t count = 0;         ///< 0: absent
};

/// Memory of a format whose rows may lie anywhere, K and V apart.
template <class Memory, class Element>
concept AddressesRows = requires(const Element* rows, std::ptrdiff_t stride, PageShape shape) {
  Memory::over_rows(rows, rows, stride, stride, shape);
};

/// The stored rows of one KV head: a few runs over a list of pages, and perhaps a compensation row.
/// Pages may be the library's or an engine's own.
/// @tparam Format  what a row is and how a page holds it (cache/rows/).
template <class Format>
struct KvView {
  /// Sinks and at most two runs of a ring.
  static constexpr std::size_t kMaxRuns = 3;

  typename Format::Memory memory{};           ///< where page 0 lies and how far the next one
  const std::int32_t* page_table = nullptr;   ///< [slot / page_tokens] -> page; null: in order
  PageShape shape{};                          ///< of every page
  std::array<KvRun, kMaxRuns> run_storage{};  ///< the first num_runs are in use
  int num_runs = 0;                           ///< none of them empty, if add_run() made them
  CompensationRow compensation{};             ///< count 0: there is none

  /// A view without runs over pages as Format lays them out.
  /// @param pages  page 0; 64-byte aligned
  /// @param page_stride  bytes from page i to page i + 1, a multiple of 64; a page that spans
  ///   several numbers is fine
  /// @param page_table  [slot / page_tokens] -> page, borrowed
  static KvView over_pages(const std::byte* pages, std::size_t page_stride,
                           const std::int32_t* page_table, const PageShape& shape) {
    KvView view;
    view.memory = Format::Memory::over_pages(pages, page_stride, shape);
    view.page_table = page_table;
    view.shape = shape;
    return view;
  }

  /// A view over one head's rows in an engine's own arrays, K and V apart, as [token][kv_head][dim]
  /// keeps them: token `i` is slot `i` at position `i`. Plain formats only.
  /// @param k,v  the head's row of token 0; elements of a row are contiguous, and aligned as their
  ///   type is
  /// @param k_stride,v_stride  elements from one token's row to the next's
  /// @param num_rows  tokens stored, all of them in the view's one run
  template <class Element>
    requires AddressesRows<typename Format::Memory, Element>
  static KvView over_rows(const Element* k, const Element* v, std::int64_t k_stride,
                          std::int64_t v_stride, std::int64_t num_rows, int k_dim, int v_dim) {
    KvView view;
    view.shape = {.k_dim = k_dim, .v_dim = v_dim};
    view.memory = Format::Memory::over_rows(k, v, k_stride, v_stride, view.shape);
    view.add_run({Slot{0}, Pos{0}, num_rows});
    return view;
  }

  /// The runs in use.
  std::span<const KvRun> runs() const& {
    return {run_storage.data(), static_cast<std::size_t>(num_runs)};
  }
  std::span<const KvRun> runs() const&& = delete;  ///< would outlive the view

  /// Appends a run unless it is empty; kMaxRuns at most.
  void add_run(KvRun run) {
    if (run.count > 0) run_storage[static_cast<std::size_t>(num_runs++)] = run;
  }

  /// Rows in all runs, the compensation row not counted.
  std::int64_t num_rows() const {
    std::int64_t rows = 0;
    for (const KvRun& run : runs()) rows += run.count;
    return rows;
  }

  /// The page that holds `slot`, as row `slot % page_tokens`.
  typename Format::Page page_of(Slot slot) const {
    const std::int64_t index = slot.value / shape.page_tokens;
    return memory.page(page_table != nullptr ? page_table[index] : index);
  }
};

}  // namespace headwise::inline v0
