// SPDX-License-Identifier: MIT
/// @file attend_models.hpp
/// The modelled caches that the tests of attend share: small ones with a head of every kind.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "support/attended_cache.hpp"

namespace headwise::test {

/// Values lie in [-1, 1); what float32 accumulation over some hundred rows may cost.
inline constexpr double kBound = 5e-6;

/// Uniform in [0, n), nearly.
inline std::int64_t below(std::mt19937& random, std::int64_t n) {
  return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
}

/// Pages and rollback that put every boundary into a few hundred tokens.
inline CacheOptions options_of(PrefillMode prefill, std::int64_t rollback = 4) {
  CacheOptions options = mixed_options(prefill, rollback);
  options.max_context = 700;
  return options;
}

/// A layer with a head of every kind, and one without a retrieval head.
inline ModelShape two_layers(int group, int k_dim, int v_dim) {
  return ModelShape({{3, group, k_dim, v_dim}, {2, group, k_dim, v_dim}});
}
/// Everything, fixed windows, and where the mode has it a growing one.
inline HeadPlan every_kind(const ModelShape& shape, PrefillMode prefill) {
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{4, 12}});
  plan.set(1, 0, KeepWindow{{3, 33}});
  plan.set(1, 1, KeepWindow{{0, 1}});
  plan.set(0, 2, KeepWindow{{17, 30}});
  if (prefill == PrefillMode::kChunkCausal) plan.set(0, 2, KeepGrowingWindow{4, 24, 3});
  return plan;
}

/// For tests to which the row format does not matter.
using Model = AttendedCache<f16>;

/// two_layers() with every kind of head.
inline Model small_model(PrefillMode prefill, std::int64_t rollback = 4) {
  const ModelShape shape = two_layers(2, 32, 32);
  return {shape, every_kind(shape, prefill), options_of(prefill, rollback)};
}

/// The largest difference of two sets of outputs; infinite where their sizes differ or one is NaN.
template <class Expected>
double largest_difference(const std::vector<Outputs>& a, const std::vector<Expected>& b) {
  if (a.size() != b.size()) return std::numeric_limits<double>::infinity();
  double worst = 0.0;
  for (std::size_t l = 0; l < a.size(); ++l) {
    if (a[l].size() != b[l].size()) return std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < a[l].size(); ++i) {
      const double error = std::fabs(static_cast<double>(a[l][i]) - static_cast<double>(b[l][i]));
      if (!(error <= worst)) worst = error;  // NaN sticks out
      if (std::isnan(error)) return std::numeric_limits<double>::infinity();
    }
  }
  return worst;
}

}  // namespace headwise::test
