// SPDX-License-Identifier: MIT
#include "headwise/policies/uniform_budget.hpp"

#include <gtest/gtest.h>

namespace headwise {
namespace {

TEST(Uniform, IsTheFullCacheUnlessToldOtherwise) {
  const ModelShape shape = ModelShape::uniform(2, 8, 2, 64);
  EXPECT_EQ(uniform_budget::Policy{}.plan(shape), HeadPlan(shape));
  const KeepWindow window{{4, 60}};
  EXPECT_EQ(uniform_budget::Policy{window}.plan(shape), HeadPlan(shape, window));
}

TEST(Uniform, FollowsUnequalLayers) {
  const ModelShape shape({{.num_kv_heads = 2, .group_size = 2, .k_dim = 64, .v_dim = 64},
                          {.num_kv_heads = 5, .group_size = 1, .k_dim = 32, .v_dim = 48}});
  EXPECT_EQ(uniform_budget::Policy{}.plan(shape).num_kv_heads(1), 5);
}

}  // namespace
}  // namespace headwise
