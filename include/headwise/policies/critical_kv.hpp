// SPDX-License-Identifier: MIT
/// @file critical_kv.hpp
/// CriticalKV: what a value becomes behind the output projection counts beside its attention.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/heads/kept_positions.hpp"
#include "headwise/heads/select_tokens.hpp"
#include "headwise/heads/token_scores.hpp"

/// Feng et al., Identify Critical KV Cache in LLM Inference from an Output Perturbation
/// Perspective, arXiv:2502.03805. A second stage over a scorer that is never negative (SnapKV):
/// half of the count goes by its scores, the rest by score x norm of the projected value.
///
/// Protected tokens stay in both stages (in the published code a window token beyond the first
/// stage competes). A negative score would turn the product around and is refused.
namespace headwise::inline v0::critical_kv {

/// The published knobs.
struct Policy {
  double first_stage = 0.5;  ///< share of the count that goes by the base score alone
  double epsilon = 1e-4;     ///< added to the score before the product
};

/// Mean over a KV head's group of ||Wo_h v||_1, for each stored value.
/// @param projections  [group_size] of each query head: `hidden` rows of v_dim
/// @param out  [values.count]
/// @throws ConfigError for sizes that differ.
/// Cost: 2 hidden v_dim flop a value and query head: of the order of the layer's attention.
inline void projected_norms(std::span<const RowView> projections, const RowView& values,
                            std::span<float> out) {
  if (std::ssize(out) != values.count || projections.empty()) {
    fail<ConfigError>(out.size(), " norms of ", values.count, " values, ", projections.size(),
                      " projections");
  }
  for (std::size_t j = 0; j < out.size(); ++j) {
    const float* value = values.row(static_cast<std::int64_t>(j));
    double sum = 0.0;
    for (const RowView& wo : projections) {
      if (wo.dim != values.dim) {
        fail<ConfigError>("a projection of width ", wo.dim, " over values of width ", values.dim);
      }
      for (std::int64_t o = 0; o < wo.count; ++o) {
        double dot = 0.0;
        for (int d = 0; d < wo.dim; ++d) {
          dot += static_cast<double>(wo.row(o)[d]) * static_cast<double>(value[d]);
        }
        sum += std::fabs(dot);
      }
    }
    out[j] = static_cast<float>(sum / static_cast<double>(projections.size()));
  }
}

/// Appends the heads of `base`, each with `counts` tokens: those of the first stage, then those
/// with the highest product.
/// @param norms  [heads] projected_norms() of each head's stored tokens
/// @throws ConfigError for a negative score, sizes that differ, a share outside [0, 1], and what
///   select_tokens() refuses; nothing is appended.
inline void select(const Policy& policy, const TokenScores& base,
                   std::span<const std::vector<float>> norms, const Protection& protection,
                   std::span<const std::int64_t> counts, KeptPositions& kept) {
  if (!is_finite(policy.first_stage) || policy.first_stage < 0.0 || policy.first_stage > 1.0) {
    fail<ConfigError>("first_stage must be in [0, 1], got ", policy.first_stage);
  }
  if (std::ssize(norms) != base.num_heads() || std::ssize(counts) != base.num_heads()) {
    fail<ConfigError>(norms.size(), " heads' norms and ", counts.size(), " counts for ",
                      base.num_heads(), " KV heads");
  }
  // Both stages as one order: which stage a token is of decides, then its product.
  KeptPositions selected;
  for (std::int64_t h = 0; h < base.num_heads(); ++h) {
    const auto scores = base.scores(h);
    const auto& norm = norms[static_cast<std::size_t>(h)];
    const std::int64_t count = counts[static_cast<std::size_t>(h)];
    if (norm.size() != scores.size()) {
      fail<ConfigError>("KV head ", h, ": ", norm.size(), " norms for ", scores.size(), " tokens");
    }
    TokenScores products(base.length());
    const auto product = products.add_head(base.positions(h));
    float largest = 0.0F;
    for (std::size_t j = 0; j < scores.size(); ++j) {
      if (is_finite(scores[j]) && scores[j] < 0.0F) {
        fail<ConfigError>("KV head ", h, ": a base score must be >= 0, got ", scores[j]);
      }
      product[j] = (scores[j] + static_cast<float>(policy.epsilon)) * norm[j];
      if (is_finite(product[j])) largest = std::max(largest, product[j]);
    }
    const std::vector<std::int32_t> order = base.order(h, protection);
    const auto first =
        std::min(std::ssize(order),
                 static_cast<std::ptrdiff_t>(
                     policy.first_stage * static_cast<double>(std::max<std::int64_t>(0, count))));
    for (std::ptrdiff_t i = 0; i < first; ++i) {
      product[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])] = 2.0F * largest + 1.0F;
    }
    select_tokens(products, protection, {&count, 1}, selected);
  }
  for (std::int64_t h = 0; h < selected.num_heads(); ++h) kept.add_head(selected.of_head(h));
}

}  // namespace headwise::inline v0::critical_kv
