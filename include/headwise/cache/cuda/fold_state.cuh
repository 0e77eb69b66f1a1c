// SPDX-License-Identifier: MIT
/// @file fold_state.cuh
/// Compensation rows (RazorAttention) of an open step as kernels read and make them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "headwise/cache/cuda/step_state.cuh"
#include "headwise/cache/keep/keep_rule.hpp"
#include "headwise/core/check.hpp"

namespace headwise::inline v0::cuda {

/// What one class of heads has folded of one sequence of the step, and what the step folds.
struct FoldState {
  std::int32_t place = 0;       ///< of the sequence, in the sums
  std::int32_t seen_row = -1;   ///< compensation row that the step's queries see; -1: none
  float log2_count = 0.0F;      ///< of the tokens that it stands for
  std::int32_t first_fold = 0;  ///< in FoldedHeads::folds
  std::int32_t num_folds = 0;   ///< rows that the step makes
};

/// A compensation row that a step makes: another one, and the rows of some pages more.
struct RowFold {
  double share = 0.0;            ///< 1 / tokens that the row stands for
  std::int32_t from = -1;        ///< row to begin with; -1: zero
  std::int32_t to = 0;           ///< row that is made
  std::int32_t first_entry = 0;  ///< table entries [first_entry, end_entry) of the pages to add
  std::int32_t end_entry = 0;    ///< see above
  std::int32_t first_row = 0;    ///< of the first page; of the others, all are added
};

/// One KV head's compensation rows.
struct FoldHead {
  std::int64_t offset = -1;    ///< bytes in a sequence's share of the sums; -1: it has none
  std::int32_t class_idx = 0;  ///< in FoldedHeads::states
};

/// The compensation rows of a layer as a kernel's parameters; every pointer is fixed for a cache's
/// life. A row is [2 x dim] sums in double, K's, then V's, and as many means in float, as
/// CacheGeometry::compensation_row_bytes() counts.
struct FoldedHeads {
  const FoldState* states = nullptr;  ///< [max_sequences][num_classes]
  const RowFold* folds = nullptr;     ///< of all states
  const FoldHead* heads = nullptr;    ///< [num_kv_heads]; null: no head of the layer has any
  std::byte* sums = nullptr;          ///< [places][place_bytes]
  std::size_t place_bytes = 0;        ///< of one sequence
  std::int32_t num_classes = 0;       ///< of heads with equal budgets
};

/// Lists the rows that a step makes. Of a row that a long chunk makes several times over only the
/// last one is made: it takes the pages of those before it.
/// @param folds  [most], as many as a bank has rows
/// @return how many there are
template <class Rule>
std::int32_t list_folds(const Rule& rule, const typename Rule::State& kept,
                        const StepLengths& lengths, RowFold* folds, std::int32_t most) {
  std::int32_t count = 0;
  rule.for_each_fold(kept, lengths, [&](const FoldMove& move) {
    const auto entry = static_cast<std::int32_t>(move.entry);
    const bool has_page = move.first_row < move.end_row;
    HEADWISE_ASSERT(!has_page || move.end_row == kPageTokens, "pages are folded to their ends");
    RowFold next{1.0 / static_cast<double>(move.count),
                 move.from ? static_cast<std::int32_t>(*move.from) : -1,
                 static_cast<std::int32_t>(move.to),
                 entry,
                 entry + (has_page ? 1 : 0),
                 static_cast<std::int32_t>(move.first_row)};
    if (count == most) {
      const RowFold oldest = folds[0];
      RowFold& heir = count > 1 ? folds[1] : next;
      HEADWISE_ASSERT(oldest.to == next.to && heir.from == oldest.to,
                      "rows of a bank are made in turn, each from the one before");
      heir.from = oldest.from;
      if (oldest.first_entry < oldest.end_entry) {
        HEADWISE_ASSERT(heir.first_entry == oldest.end_entry, "pages are folded in their order");
        heir.first_entry = oldest.first_entry;
        heir.first_row = oldest.first_row;
      }
      std::copy(folds + 1, folds + count, folds);
      --count;
    }
    folds[count++] = next;
  });
  return count;
}

/// What the step's queries see of a class's compensation rows, and which rows the step makes.
/// @param place  the sequence's
/// @param folds  of all states; those of this one begin at `first_fold`, `most` at the most
template <class Rule>
FoldState fold_state(const Rule& rule, const typename Rule::State& kept, const StepLengths& lengths,
                     std::int32_t place, RowFold* folds, std::int32_t first_fold,
                     std::int32_t most) {
  FoldState state{place, -1, 0.0F, first_fold, 0};
  if (const FoldedRows seen = rule.folded(kept, lengths.length); seen.count > 0) {
    state.seen_row = static_cast<std::int32_t>(seen.row);
    state.log2_count = static_cast<float>(std::log2(static_cast<double>(seen.count)));
  }
  state.num_folds = list_folds(rule, kept, lengths, folds + first_fold, most);
  return state;
}

}  // namespace headwise::inline v0::cuda
