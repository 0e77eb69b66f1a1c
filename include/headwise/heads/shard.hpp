// SPDX-License-Identifier: MIT
/// @file shard.hpp
/// The part of a plan that one tensor-parallel rank holds.
#pragma once

#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise::inline v0 {

/// KV heads [rank * H / num_ranks, (rank + 1) * H / num_ranks) of every layer, as in RLKV's serving
/// code. The plan is made once, for the whole model, and then cut: ranks may hold different numbers
/// of retrieval heads.
/// @throws ConfigError when `rank` is not in [0, num_ranks), or `num_ranks` does not divide the
///   number of KV heads of a layer.
inline HeadPlan shard(const HeadPlan& plan, int rank, int num_ranks) {
  if (num_ranks < 1) fail<ConfigError>("num_ranks must be at least 1, got ", num_ranks);
  if (rank < 0 || rank >= num_ranks) {
    fail<ConfigError>("rank must be in [0, ", num_ranks, "), got ", rank);
  }
  std::vector<int> heads;
  for (int layer = 0; layer < plan.num_layers(); ++layer) {
    if (plan.num_kv_heads(layer) % num_ranks != 0) {
      fail<ConfigError>("layer ", layer, ": ", num_ranks, " ranks do not divide ",
                        plan.num_kv_heads(layer), " KV heads");
    }
    heads.push_back(plan.num_kv_heads(layer) / num_ranks);
  }
  HeadPlan part(heads);
  for (int layer = 0; layer < part.num_layers(); ++layer) {
    const int first = rank * part.num_kv_heads(layer);
    for (int head = 0; head < part.num_kv_heads(layer); ++head) {
      part.set(layer, head, plan.budget(layer, first + head));
    }
  }
  return part;
}

}  // namespace headwise::inline v0
