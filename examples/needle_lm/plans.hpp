// SPDX-License-Identifier: MIT
/// @file plans.hpp
/// From a policy's name and its scores to a head plan: all that this example knows of the papers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "headwise/core/shape.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/heads/select.hpp"
#include "headwise/heads/tsv.hpp"
#include "headwise/policies/duo_attention.hpp"
#include "headwise/policies/random_heads.hpp"
#include "headwise/policies/razor_attention.hpp"
#include "headwise/policies/rlkv.hpp"
#include "headwise/policies/streaming_llm.hpp"
#include "headwise/policies/uniform_budget.hpp"

namespace needle_lm {

inline const std::vector<std::string_view> kPolicies{
    "full", "duo_attention", "rlkv", "razor_attention", "uniform", "random"};

struct PlanOptions {
  std::string policy = "full";
  std::string heads = {};  ///< score file: gates, or RazorAttention's induction scores
  std::string echo = {};   ///< RazorAttention's echo scores
  double sparsity = 0.5;
  headwise::Window window{.sink = 4, .recent = 60};
  std::uint64_t seed = 1;     ///< of random heads
  bool compensation = false;  ///< RazorAttention's own budget instead of the window
};

namespace detail {

inline headwise::HeadScores load_scores(const std::string& path,
                                        const headwise::ModelShape& shape) {
  headwise::HeadScores scores = headwise::load_tsv(path);
  headwise::check_shape(scores, shape, path);
  return scores;
}

inline std::size_t num_retrieval(const headwise::HeadPlan& plan) {
  return static_cast<std::size_t>(
      std::count_if(plan.budgets().begin(), plan.budgets().end(), headwise::is_retrieval));
}

/// RazorAttention's choice of heads, as many as the other policies keep at this sparsity: the best
/// by echo and the best by induction, one to fourteen as in the paper, together.
inline headwise::HeadPlan razor_plan(const headwise::razor_attention::Scores& scores,
                                     const PlanOptions& options) {
  const std::size_t total = scores.induction.num_heads();
  const std::size_t wanted = total - headwise::num_streaming(total, options.sparsity);
  const std::size_t num_echo = wanted == 0 ? 0 : std::max<std::size_t>(1, (wanted + 7) / 15);
  const auto share = [&](std::size_t heads) {
    return static_cast<double>(heads) / static_cast<double>(total);
  };
  headwise::razor_attention::Policy policy{
      .induction_share = share(wanted - num_echo),
      .echo_share = share(num_echo),
      .budget = {.sink = options.window.sink, .min_recent = options.window.recent}};
  headwise::HeadPlan plan = policy.plan(scores);
  for (std::size_t i = wanted - num_echo; num_retrieval(plan) < wanted; ++i) {
    policy.induction_share = share(i + 1);  // an echo head was an induction head already
    plan = policy.plan(scores);
  }
  return plan;
}

/// The same heads with a plain window in place of a growing one and its compensation row.
inline headwise::HeadPlan with_plain_window(headwise::HeadPlan plan, headwise::Window window) {
  for (int layer = 0; layer < plan.num_layers(); ++layer) {
    for (int head = 0; head < plan.num_kv_heads(layer); ++head) {
      if (!headwise::is_retrieval(plan.budget(layer, head))) {
        plan.set(layer, head, headwise::KeepWindow{window});
      }
    }
  }
  return plan;
}

}  // namespace detail

/// @param options  `policy` is one of kPolicies.
/// @throws ConfigError or FormatError for a score file or a value that does not fit the model.
inline headwise::HeadPlan make_plan(const PlanOptions& options, const headwise::ModelShape& shape) {
  if (options.policy == "full") return headwise::uniform_budget::Policy{}.plan(shape);
  if (options.policy == "uniform")
    return headwise::streaming_llm::Policy{options.window}.plan(shape);
  if (options.policy == "random") {
    return headwise::random_heads::Policy{options.sparsity, options.window, options.seed}.plan(
        shape);
  }
  const headwise::HeadScores scores = detail::load_scores(options.heads, shape);
  if (options.policy == "duo_attention") {
    return headwise::duo_attention::Policy{options.sparsity, options.window}.plan(scores);
  }
  if (options.policy == "rlkv") {
    return headwise::rlkv::Policy{options.sparsity, options.window}.plan(scores);
  }
  const headwise::HeadPlan plan =
      detail::razor_plan({scores, detail::load_scores(options.echo, shape)}, options);
  return options.compensation ? plan : detail::with_plain_window(plan, options.window);
}

}  // namespace needle_lm
