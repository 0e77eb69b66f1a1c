// SPDX-License-Identifier: MIT
/// @file page_by_page.hpp
/// What rules share whose slots are positions: a head's pages follow each other with its tokens.
#pragma once

#include <algorithm>
#include <cstdint>

#include "headwise/core/config.hpp"
#include "headwise/core/rounding.hpp"

namespace headwise::inline v0 {

/// The numbers of such a rule, and what follows from them alone; KeepRule says what
/// `table_entries` and `fork_entries` answer.
struct PageByPage {
  std::int64_t page_tokens = 0;
  std::int64_t max_context = 0;
  std::int64_t max_rollback = 0;

  /// Pages that hold so many tokens.
  constexpr std::int64_t pages_of(std::int64_t tokens) const {
    return ceil_div(tokens, page_tokens);
  }
  constexpr std::int64_t table_entries(std::int64_t pages) const { return pages; }
  /// The page in which the next token may come to lie, at the lowest, and those behind it.
  constexpr std::int64_t fork_entries() const {
    return std::min(pages_of(max_context),
                    pages_of(std::max<std::int64_t>(0, max_rollback - 1)) + 1);
  }

  friend constexpr bool operator==(const PageByPage&, const PageByPage&) = default;
};

}  // namespace headwise::inline v0
