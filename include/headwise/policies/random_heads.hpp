// SPDX-License-Identifier: MIT
/// @file random_heads.hpp
/// Heads chosen by chance: the control that any finding about heads has to beat.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "headwise/core/shape.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/heads/select.hpp"
#include "headwise/heads/splitmix64.hpp"
#include "headwise/policies/policy.hpp"

namespace headwise::inline v0::random_heads {

/// Independent uniform scores in [0, 1): the same ones for a seed on every platform.
inline HeadScores scores(const ModelShape& shape, std::uint64_t seed) {
  SplitMix64 stream(seed);
  std::vector<int> heads;
  std::vector<double> values;
  for (const LayerShape& layer : shape.layers()) {
    heads.push_back(layer.num_kv_heads);
    for (int head = 0; head < layer.num_kv_heads; ++head) values.push_back(stream.next_unit());
  }
  return HeadScores(heads, std::move(values));
}

/// Random scores through the very selection the real ones go through: as many heads stream, and
/// for one seed the plans of two sparsities are nested.
struct Policy {
  double sparsity = 0.5;   ///< share of KV heads that stream
  Window window{};         ///< must be given: that of the policy it is compared with
  std::uint64_t seed = 0;  ///< of scores()

  /// select() over scores().
  /// @throws ConfigError for a sparsity outside [0, 1], or a window that was not given.
  HeadPlan plan(const ModelShape& shape) const {
    return select(scores(shape, seed), {.sparsity = sparsity, .window = window});
  }
};
static_assert(HeadPolicy<Policy, ModelShape>);

}  // namespace headwise::inline v0::random_heads
