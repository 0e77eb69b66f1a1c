// SPDX-License-Identifier: MIT
/// @file kv_view.hpp
/// KvView: the stored rows of one KV head as attention sees them, whatever policy keeps them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "headwise/core/position.hpp"

namespace headwise::inline v0 {

/// Consecutive positions in consecutive slots. Log weight 0.
struct KvRun {
  Slot first_slot;         ///< of the first row
  Pos first_pos;           ///< of the first row
  std::int64_t count = 0;  ///< rows; 0: an empty run
};

/// One f32 row that stands for `count` rows: mean K, mean V and a log weight of ln(count)
/// (RazorAttention's compensation row). Sums are kept, so that a mean is one multiplication away.
struct CompensationRow {
  const float* k_sum = nullptr;  ///< [k_dim]
  const float* v_sum = nullptr;  ///< [v_dim]
  std::int64_t count = 0;        ///< 0: absent
};

/// The stored rows of one KV head: a few runs over a list of pages, and perhaps a compensation row.
/// Pages may be the library's or an engine's own.
/// @tparam Row  element type of the stored rows (core/dtype.hpp).
/// @tparam Layout  where elements lie inside a page (cache/page_layout.hpp).
template <class Row, class Layout>
struct KvView {
  /// Sinks and at most two runs of a ring.
  static constexpr std::size_t kMaxRuns = 3;

  const std::byte* pages = nullptr;           ///< page 0; 64-byte aligned
  std::size_t page_bytes = 0;                 ///< from one page to the next
  const std::int32_t* page_table = nullptr;   ///< [slot / page_tokens] -> page
  int page_tokens = 0;                        ///< rows in a page, a multiple of 16
  int k_dim = 0;                              ///< width of a K row, a multiple of 16
  int v_dim = 0;                              ///< width of a V row, a multiple of 16
  std::array<KvRun, kMaxRuns> run_storage{};  ///< the first num_runs are in use
  int num_runs = 0;                           ///< none of them empty, if add_run() made them
  CompensationRow compensation{};             ///< count 0: there is none

  /// The runs in use.
  std::span<const KvRun> runs() const {
    return {run_storage.data(), static_cast<std::size_t>(num_runs)};
  }

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

  /// First element of the page that holds `slot`.
  const Row* page_of(Slot slot) const {
    const std::int64_t page = page_table[slot.value / page_tokens];
    return reinterpret_cast<const Row*>(pages + static_cast<std::size_t>(page) * page_bytes);
  }
};

}  // namespace headwise::inline v0
