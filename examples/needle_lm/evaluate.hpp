// SPDX-License-Identifier: MIT
/// @file evaluate.hpp
/// One head plan over the held-out documents: memory, speed, and whether the answers are right.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "decoder.hpp"
#include "generate.hpp"
#include "headwise/cache/estimate.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/heads/plan.hpp"
#include "tasks.hpp"

namespace needle_lm {

/// A plan under the name that tables give it.
struct NamedPlan {
  std::string id;     ///< in the CSV: letters, digits, underscores
  std::string title;  ///< in the table
  headwise::HeadPlan plan;
};

/// How prompts are cut and how many sequences run at a time.
struct RunOptions {
  headwise::PrefillMode prefill = headwise::PrefillMode::kWindowed;
  std::size_t chunk = 512;  ///< prompt tokens in a step
  std::size_t batch = 32;   ///< sequences in the cache
};

struct Result {
  std::string id;
  std::string title;
  double retrieval_share = 0.0;     ///< of the KV heads
  std::size_t kv_bytes = 0;         ///< page bytes that one sequence of kMeasuredTokens holds
  double kv_share = 0.0;            ///< of what the full cache holds
  double tokens_per_s = 0.0;        ///< in decode steps, both tasks
  std::size_t num_documents = 0;    ///< of each task
  std::size_t passkey_exact = 0;    ///< documents whose output is right, token by token
  std::size_t cot_exact = 0;        ///< documents whose output is right, token by token
  std::size_t answer_exact = 0;     ///< chain-of-thought documents with the right value at the end
  double mean_output_tokens = 0.0;  ///< of chain-of-thought documents; they run on when lost
  std::vector<Token> passkey_output;  ///< of the first document
  std::vector<Token> cot_output;      ///< of the first document
};

/// The context at which resident bytes are compared.
inline constexpr std::int64_t kMeasuredTokens = 2048;
/// Tokens that an output may have beyond the right answer's.
inline constexpr std::size_t kOverlength = 32;

/// Both tasks, judged.
struct Tasks {
  Task passkey;
  Task cot;

  /// The longest sequence that generation can make of them.
  std::int64_t max_context() const {
    std::size_t longest = static_cast<std::size_t>(kMeasuredTokens);
    for (const Task* task : {&passkey, &cot}) {
      for (const Document& document : task->documents) {
        longest = std::max(longest, document.prompt_length + document.answer_length + kOverlength);
      }
    }
    return static_cast<std::int64_t>(longest);
  }
};

namespace detail {

/// @throws std::logic_error when headwise::estimate said anything else than the cache.
inline void require_estimated(std::size_t held, std::size_t estimated_bytes) {
  if (held != estimated_bytes) {
    throw std::logic_error("the cache holds " + std::to_string(held) + " bytes, estimated were " +
                           std::to_string(estimated_bytes));
  }
}

/// Page bytes that a sequence of kMeasuredTokens really holds in the cache.
/// @throws std::logic_error as require_estimated().
template <class Cache, headwise::Executor E>
std::size_t measure_kv_bytes(Decoder<Cache, E>& decoder, Cache& cache, std::size_t chunk,
                             std::size_t estimated_bytes) {
  const std::vector<Token> tokens(static_cast<std::size_t>(kMeasuredTokens), Token{0});
  const auto sequence = cache.add_sequence();
  prefill(decoder, cache, sequence.value(), std::span(tokens), chunk);
  const std::size_t held = cache.held_bytes(*sequence);
  cache.release(*sequence);
  require_estimated(held, estimated_bytes);
  return held;
}

/// What is asked of a task's documents.
inline std::vector<Request> requests_of(const Task& task) {
  std::vector<Request> requests;
  for (const Document& document : task.documents) {
    requests.push_back({document.prompt(), task.stop, document.answer_length + kOverlength});
  }
  return requests;
}

/// Documents of a task whose output the judge accepts.
template <class Judge>
std::size_t count(const std::vector<std::vector<Token>>& outputs, const Task& task, Judge judge) {
  std::size_t accepted = 0;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (judge(outputs[i], task.documents[i])) ++accepted;
  }
  return accepted;
}

/// Outputs of both tasks, a document each.
struct Outputs {
  std::vector<std::vector<Token>> passkeys;
  std::vector<std::vector<Token>> thoughts;
};

/// Fills in what outputs say of a plan.
inline void judge(const Tasks& tasks, const Outputs& outputs, const DecodeTime& time,
                  Result& result) {
  const auto& [passkeys, thoughts] = outputs;
  if (time.tokens > 0) result.tokens_per_s = static_cast<double>(time.tokens) / time.seconds;
  result.num_documents = thoughts.size();
  result.passkey_exact = count(passkeys, tasks.passkey, is_exact);
  result.cot_exact = count(thoughts, tasks.cot, is_exact);
  result.answer_exact = count(thoughts, tasks.cot, has_right_value);
  result.passkey_output = passkeys.front();
  result.cot_output = thoughts.front();
  for (const auto& output : thoughts) {
    result.mean_output_tokens +=
        static_cast<double>(output.size()) / static_cast<double>(thoughts.size());
  }
}

}  // namespace detail

/// @tparam Row    what the cache stores K and V as.
/// @tparam Cache  where: KvCache<Row>, or CudaCache<Row>.
/// @param on_finished  called after each document of either task.
template <class Row, class Cache = headwise::KvCache<Row>, headwise::Executor E, class OnFinished>
Result evaluate(const Model& model, const Tasks& tasks, const NamedPlan& named,
                const RunOptions& run, E& executor, OnFinished on_finished) {
  const headwise::ModelShape shape = model.config.shape();
  const headwise::CacheOptions options{.max_sequences = static_cast<int>(run.batch),
                                       .max_context = tasks.max_context(),
                                       .prefill = run.prefill};
  Cache cache(shape, named.plan, options);
  Decoder<Cache, E> decoder(model, tasks.max_context(), executor);

  const auto estimated = [&](const headwise::HeadPlan& plan) {
    return headwise::sequence_bytes<Row>(shape, plan, options, kMeasuredTokens);
  };
  Result result;
  result.id = named.id;
  result.title = named.title;
  result.retrieval_share = 1.0 - named.plan.sparsity();
  result.kv_bytes = detail::measure_kv_bytes(decoder, cache, run.chunk, estimated(named.plan));
  result.kv_share = static_cast<double>(result.kv_bytes) /
                    static_cast<double>(estimated(headwise::HeadPlan(shape)));

  DecodeTime time;
  const auto answer = [&](const Task& task) {
    return generate(decoder, cache, detail::requests_of(task), run.chunk, time, on_finished);
  };
  detail::Outputs outputs;
  outputs.passkeys = answer(tasks.passkey);
  outputs.thoughts = answer(tasks.cot);
  detail::judge(tasks, outputs, time, result);
  return result;
}

}  // namespace needle_lm
