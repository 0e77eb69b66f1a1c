// SPDX-License-Identifier: MIT
#include "headwise/cache/options.hpp"

#include <gtest/gtest.h>

#include <memory_resource>

namespace headwise {
namespace {

TEST(CacheOptions, DefaultsAreThePublishedPageAndNothingOptional) {
  const CacheOptions options;
  EXPECT_EQ(options.page_tokens, 64);
  EXPECT_EQ(options.max_bytes, 0U);
  EXPECT_EQ(options.max_sequences, 1);
  EXPECT_EQ(options.max_context, 0);  // there is no sensible default: CacheGeometry refuses it
  EXPECT_EQ(options.max_chunk, 0);    // as long as the context
  EXPECT_EQ(options.max_rollback, 0);
  EXPECT_EQ(options.prefill, PrefillMode::kWindowed);
  EXPECT_TRUE(options.page_memory.empty());
  EXPECT_EQ(options.resource, std::pmr::get_default_resource());
}

}  // namespace
}  // namespace headwise
