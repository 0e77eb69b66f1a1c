// SPDX-License-Identifier: MIT
#include "headwise/cache/keep/page_by_page.hpp"

#include <gtest/gtest.h>

namespace headwise {
namespace {

TEST(PageByPage, CountsPagesOfTokens) {
  static_assert(PageByPage{16, 100, 0}.pages_of(0) == 0);
  static_assert(PageByPage{16, 100, 0}.pages_of(33) == 3);
  static_assert(PageByPage{16, 100, 0}.table_entries(5) == 5);
}

TEST(PageByPage, AForkCopiesWhatRollbackReaches) {
  static_assert(PageByPage{16, 100, 0}.fork_entries() == 1);  // the page that is not full
  static_assert(PageByPage{16, 100, 1}.fork_entries() == 1);  // its last row, or a full page's
  static_assert(PageByPage{16, 100, 2}.fork_entries() == 2);  // a row of the page before, too
  static_assert(PageByPage{16, 100, 17}.fork_entries() == 2);
  static_assert(PageByPage{16, 100, 18}.fork_entries() == 3);
  static_assert(PageByPage{16, 20, 20}.fork_entries() == 2);  // never more than the context
}

}  // namespace
}  // namespace headwise
