// SPDX-License-Identifier: MIT
/// @file evaluate_selections.hpp
/// Selections over the held-out documents: each prompt is read and scored once, then cut by every
/// selection in a fork of its own, from which the answer is decoded.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "evaluate.hpp"
#include "generate.hpp"
#include "headwise/cache/estimate.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/heads/plan.hpp"
#include "prompt_reader.hpp"
#include "reconstruction.hpp"
#include "selection.hpp"
#include "tasks.hpp"

namespace needle_lm {

/// Every method at each share.
inline std::vector<Selection> all_selections(std::span<const double> shares) {
  std::vector<Selection> selections;
  for (std::size_t method = 0; method < kNumSelectionMethods; ++method) {
    for (const double share : shares) {
      selections.push_back({static_cast<SelectionMethod>(method), share});
    }
  }
  return selections;
}

/// The longest sequence of evaluate_selections(): with KVzip's repetition, or the answer.
inline std::int64_t max_selection_context(const Tasks& tasks) {
  return tasks.max_context() + static_cast<std::int64_t>(kRepeated + kCue);
}

namespace detail {

/// kMeasuredTokens of a document, from its beginning again where it is shorter: what selections
/// keep, and so some of their bytes, depends on what is read.
inline std::vector<Token> measured_tokens(const Document& document) {
  std::vector<Token> tokens;
  while (tokens.size() < static_cast<std::size_t>(kMeasuredTokens)) {
    tokens.push_back(document.tokens[tokens.size() % document.tokens.size()]);
  }
  return tokens;
}

/// What a sequence of kMeasuredTokens holds once it was selected from, as headwise::estimate says.
template <class Row>
std::size_t selected_bytes(const headwise::ModelShape& shape, headwise::HeadPlan plan,
                           const RunOptions& run, const headwise::KeptPositions& kept) {
  std::int64_t head_of_model = 0;
  for (int layer = 0; layer < plan.num_layers(); ++layer) {
    for (int head = 0; head < plan.num_kv_heads(layer); ++head, ++head_of_model) {
      if (!is_selected(plan.budget(layer, head))) continue;
      plan.set(layer, head, headwise::KeepSelected{std::ssize(kept.of_head(head_of_model))});
    }
  }
  return headwise::estimate<Row>(shape, plan,
                                 {.max_context = kMeasuredTokens, .prefill = run.prefill})
      .resident_bytes;
}

}  // namespace detail

/// @param named  whose retrieval heads are selected from, once, where the prompt ends; the others
///   stream from its first token on. Its id and title come before the selections', if any.
/// @param on_finished  called after each document of either task, of each selection.
/// @return a row a selection
/// @throws ConfigError for a share that is less than what a method must keep of a prompt.
template <class Row, headwise::Executor E, class OnFinished>
std::vector<Result> evaluate_selections(const Model& model, const Tasks& tasks,
                                        const NamedPlan& named, const SelectionPolicies& policies,
                                        std::span<const Selection> selections,
                                        const QueryCentres& centres, const RunOptions& run,
                                        E& executor, OnFinished on_finished) {
  using Cache = headwise::KvCache<Row>;
  const headwise::ModelShape shape = model.config.shape();
  const headwise::HeadPlan plan = with_selection(named.plan);
  const std::int64_t max_context = max_selection_context(tasks);
  // Prompts, as many forks of them, and that of KVzip's pass.
  Cache cache(shape, plan,
              {.max_sequences = static_cast<int>(2 * run.batch + 1),
               .max_context = max_context,
               .prefill = run.prefill});
  Decoder<Cache, E> decoder(model, max_context, executor);
  PromptReader<Cache, E> reader(model.config, plan, policies, centres, decoder, cache, executor);

  const auto require_ok = [](headwise::StepStatus status) {
    if (status != headwise::StepStatus::kOk) {
      throw std::runtime_error(std::string("the cache refused a selection: ") +
                               std::string(to_string(status)));
    }
  };
  const auto cut = [&](const ScoredPrompt& prompt, const headwise::KeptPositions& kept) {
    headwise::SequenceId fork;
    require_ok(cache.fork(prompt.started.sequence, fork));
    require_ok(cache.compact(fork, kept));
    return fork;
  };

  std::vector<Result> results;
  const ScoredPrompt measured =
      reader.read(detail::measured_tokens(tasks.passkey.documents.front()), run.chunk);
  const std::size_t full_bytes = headwise::sequence_bytes<Row>(
      shape, headwise::HeadPlan(shape), {.max_context = kMeasuredTokens}, kMeasuredTokens);
  for (const Selection& selection : selections) {
    const headwise::KeptPositions kept = select(policies, plan, measured.scores, selection);
    const headwise::SequenceId fork = cut(measured, kept);
    const std::string percent = std::to_string(std::lround(100.0 * selection.share));
    Result result;
    result.id = (named.id.empty() ? "" : named.id + "_") + id_of(selection.method) + "_" + percent;
    result.title = (named.title.empty() ? "" : named.title + " + ") + title_of(selection.method) +
                   " " + percent + "%";
    result.retrieval_share = 1.0 - plan.sparsity();
    result.kv_bytes = cache.held_bytes(fork);
    result.kv_share = static_cast<double>(result.kv_bytes) / static_cast<double>(full_bytes);
    detail::require_estimated(result.kv_bytes, detail::selected_bytes<Row>(shape, plan, run, kept));
    cache.release(fork);
    results.push_back(std::move(result));
  }
  cache.release(measured.started.sequence);

  std::vector<DecodeTime> times(selections.size());
  std::vector<detail::Outputs> outputs(selections.size());
  const auto answer = [&](const Task& task,
                          std::vector<std::vector<Token>> detail::Outputs::*of_task) {
    const std::vector<Request> requests = detail::requests_of(task);
    for (std::size_t first = 0; first < requests.size(); first += run.batch) {
      const auto group =
          std::span(requests).subspan(first, std::min(run.batch, requests.size() - first));
      std::vector<ScoredPrompt> prompts;
      for (const Request& request : group)
        prompts.push_back(reader.read(request.prompt, run.chunk));
      for (std::size_t i = 0; i < selections.size(); ++i) {
        const auto start = [&](std::size_t request) {
          const ScoredPrompt& prompt = prompts[request];
          return std::optional<Started>{
              {cut(prompt, select(policies, plan, prompt.scores, selections[i])),
               prompt.started.first}};
        };
        for (std::vector<Token>& output :
             generate_from(decoder, cache, group, times[i], start, on_finished)) {
          (outputs[i].*of_task).push_back(std::move(output));
        }
      }
      for (const ScoredPrompt& prompt : prompts) cache.release(prompt.started.sequence);
    }
  };
  answer(tasks.passkey, &detail::Outputs::passkeys);
  answer(tasks.cot, &detail::Outputs::thoughts);
  for (std::size_t i = 0; i < results.size(); ++i) {
    detail::judge(tasks, outputs[i], times[i], results[i]);
  }
  return results;
}

}  // namespace needle_lm
