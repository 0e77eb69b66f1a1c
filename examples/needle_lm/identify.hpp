// SPDX-License-Identifier: MIT
/// @file identify.hpp
/// Which heads keep everything, found on this model: by forwards alone, or by training gates.
///
/// Each method is the library's; here are the texts it reads and the model it looks into. A text is
/// one step, so that the step's own K are all keys so far.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "decoder.hpp"
#include "generate.hpp"
#include "headwise/attention/rope.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/heads/splitmix64.hpp"
#include "headwise/policies/duo_attention_training.hpp"
#include "headwise/policies/measured_cost.hpp"
#include "headwise/policies/on_the_fly.hpp"
#include "headwise/policies/razor_probe.hpp"
#include "headwise/policies/retrieval_probe.hpp"
#include "mixed_decoder.hpp"
#include "tasks.hpp"

namespace needle_lm {

inline const std::vector<std::string_view> kMethods{"razor", "retrieval", "on_the_fly", "measured",
                                                    "duo"};

struct IdentifyOptions {
  std::string method = "razor";  ///< one of kMethods
  std::size_t documents = 8;     ///< texts, of each task that the method reads
  std::uint64_t seed = 1;        ///< of random texts, and of which documents are drawn
  headwise::Window window{.sink = 4, .recent = 60};  ///< measured, duo: what a streaming head keeps
  std::size_t greedy = 0;    ///< measured: heads that stream one after the other; 0: each alone
  std::int64_t steps = 200;  ///< duo: of one text each
  double l1_weight = 0.05;   ///< duo: pull of all gates towards 0
};

/// Scores of KV heads; higher: keep everything.
struct FoundHeads {
  headwise::HeadScores scores;
  std::optional<headwise::HeadScores> echo = {};  ///< RazorAttention's second table
};

/// `count` documents of a task at random, of the second half of the file's: those that `demo` and
/// `evaluate` take first stay unseen.
/// @throws ConfigError where the half has fewer.
inline std::vector<Document> calibration_documents(const SafeTensors& file, const std::string& name,
                                                   Token stop, std::size_t count,
                                                   std::uint64_t seed, const ModelConfig& config) {
  const std::size_t all = std::max<std::size_t>(1, num_documents(file, name));
  std::vector<Document> left = load_task(file, name, stop, all, config).documents;
  left.erase(left.begin(), left.begin() + static_cast<std::ptrdiff_t>(all / 2));
  if (count < 1 || count > left.size()) {
    headwise::fail<headwise::ConfigError>("--documents ", count, ": the second half has ",
                                          left.size(), " of task ", name);
  }
  headwise::SplitMix64 random(seed);
  for (std::size_t i = 0; i < count; ++i) {
    const double rest = static_cast<double>(left.size() - i);
    std::swap(left[i], left[i + static_cast<std::size_t>(random.next_unit() * rest)]);
  }
  left.resize(count);
  return left;
}

/// Position of the needle that a passkey document asks for: behind `# key`, where `? key` ends the
/// prompt.
/// @throws FormatError where the answer is not there.
inline headwise::Pos needle_position(const Document& document) {
  const std::span<const Token> prompt = document.prompt();
  const std::span<const Token> answer = document.answer();
  for (std::size_t i = 0; i + 2 + answer.size() <= prompt.size(); ++i) {
    if (prompt[i] == kNeedle && prompt[i + 1] == prompt.back() &&
        std::ranges::equal(prompt.subspan(i + 2, answer.size()), answer)) {
      return {static_cast<std::int64_t>(i + 2)};
    }
  }
  headwise::fail<headwise::FormatError>("a passkey document without the needle it asks for");
}

/// One method over one model.
/// @tparam Cache  as Decoder's.
template <class Cache, headwise::Executor E, class OnForward>
class Identify {
 public:
  /// @param file  documents as `evaluate` reads them; razor needs none.
  /// @param on_forward  called after each text.
  Identify(const Model& model, const SafeTensors* file, const IdentifyOptions& options, E& executor,
           OnForward on_forward)
      : model_(model),
        shape_(model.config.shape()),
        file_(file),
        options_(options),
        executor_(executor),
        on_forward_(std::move(on_forward)) {}

  /// @throws ConfigError or FormatError for documents that are not there or not of their task.
  FoundHeads run() {
    if (options_.method == "razor") return razor();
    if (options_.method == "retrieval") return retrieval();
    if (options_.method == "on_the_fly") return on_the_fly();
    if (options_.method == "duo") return duo();
    return measured();
  }

  /// Texts that run() reads in all.
  static std::size_t num_forwards(const IdentifyOptions& options, std::size_t num_heads) {
    if (options.method == "on_the_fly") return 2 * options.documents;
    if (options.method == "duo") return static_cast<std::size_t>(options.steps);
    if (options.method != "measured") return options.documents;
    std::size_t passes = 1 + num_heads;
    for (std::size_t i = 0; i < std::min(options.greedy, num_heads); ++i) {
      passes += 1 + num_heads - i;
    }
    return 2 * options.documents * passes;
  }

  /// RazorAttention's prompt, shortened: its 10001 tokens do not fit into this model's context.
  static headwise::razor_attention::ProbePrompt razor_prompt(const ModelConfig& config) {
    return {.period = 192,
            .repeats = 4,
            .lowest = kFirstRandom,
            .highest = static_cast<Token>(config.vocab_size - 1)};
  }

 private:
  using View = headwise::TensorView<const float>;

  FoundHeads razor() {
    const auto prompt = razor_prompt(model_.config);
    headwise::razor_attention::Probe probe(shape_, prompt);
    for (std::size_t i = 0; i < options_.documents; ++i) {
      read(headwise::HeadPlan(shape_), prompt.tokens(kBeginOfSequence, options_.seed + i), 0,
           [&](int layer, View q, View k, std::int64_t n) { probe.add(layer, q, k, 0, n); });
    }
    headwise::razor_attention::Scores scores = probe.scores();
    return {std::move(scores.induction), std::move(scores.echo)};
  }

  /// The answers are read, not generated one by one: where the likeliest tokens are the answer's,
  /// that is the same.
  FoundHeads retrieval() {
    headwise::retrieval_head::Probe probe(shape_);
    for (const Document& document : documents("passkey", kEndOfNeedle)) {
      probe.begin(needle_position(document), document.answer());
      const auto first = static_cast<std::int64_t>(document.prompt_length) - 1;
      const Matrix logits = read(headwise::HeadPlan(shape_), answered(document), first,
                                 [&](int layer, View q, View k, std::int64_t n) {
                                   q.data = q.row(first, 0);
                                   probe.add(layer, q, k, first, n - first);
                                 });
      std::vector<Token> generated;
      for (Eigen::Index i = 0; i < logits.cols(); ++i) generated.push_back(likeliest(logits, i));
      probe.step(generated);
      probe.end();
    }
    if (probe.num_runs() == 0) {
      headwise::fail<headwise::ConfigError>("no document was answered, of ", options_.documents);
    }
    return {headwise::reduce_max(probe.mean(), shape_)};
  }

  FoundHeads on_the_fly() {
    headwise::on_the_fly::Probe probe(shape_, {.theta = model_.config.rope_theta});
    for (const Document& document : both_tasks()) {
      read(headwise::HeadPlan(shape_), document.tokens, 0,
           [&](int layer, View q, View k, std::int64_t n) { probe.add(layer, q, k, 0, n); });
      probe.end_text();
    }
    return {probe.scores()};
  }

  /// DuoAttention's training, in as few steps as this model's gates need. What counts are the
  /// states that passkeys are predicted from.
  FoundHeads duo() {
    const std::vector<Document> texts = documents("passkey", kEndOfNeedle);
    std::int64_t longest = 0;
    for (const Document& text : texts) longest = std::max(longest, std::ssize(text.tokens));
    MixedDecoder<E> engine(model_, options_.window, longest, executor_);
    const auto next_text = [&](std::int64_t step) {
      const Document& document = texts[static_cast<std::size_t>(step) % texts.size()];
      const std::span<const Token> tokens = answered(document);
      headwise::duo_attention::LabelledText text{{tokens.begin(), tokens.end()}, {}};
      for (std::size_t i = document.prompt_length - 1; i < tokens.size(); ++i) {
        text.labelled.push_back(static_cast<std::int64_t>(i));
      }
      return text;
    };
    return {headwise::duo_attention::train(
        shape_, {.num_steps = options_.steps, .l1_weight = options_.l1_weight}, engine, next_text,
        [&](const headwise::duo_attention::Progress&) { on_forward_(); })};
  }

  /// Distributions of the answers' tokens, streaming heads from the first prompt token on.
  FoundHeads measured() {
    const std::vector<Document> texts = both_tasks();
    const headwise::measured_cost::Options options{
        .streaming = headwise::KeepWindow{options_.window},
        .num_texts = static_cast<std::int64_t>(texts.size())};
    const auto run = [&](const headwise::HeadPlan& plan, std::int64_t text,
                         headwise::measured_cost::Pass& pass) {
      const Document& document = texts[static_cast<std::size_t>(text)];
      const auto first = static_cast<std::int64_t>(document.prompt_length) - 1;
      const Matrix logits = read(plan, answered(document), first, {});
      for (Eigen::Index i = 0; i < logits.cols(); ++i) {
        pass.token({logits.col(i).data(), static_cast<std::size_t>(logits.rows())});
      }
    };
    headwise::HeadScores alone = headwise::measured_cost::measure(shape_, options, run);
    if (options_.greedy == 0) return {std::move(alone)};
    return {headwise::measured_cost::greedy(shape_, alone, options,
                                            {.num_streaming = options_.greedy}, run)
                .scores};
  }

  /// Prompt and answer but for its last token, after which nothing is generated.
  static std::span<const Token> answered(const Document& document) {
    return std::span(document.tokens).first(document.prompt_length + document.answer_length - 1);
  }

  std::vector<Document> documents(const std::string& task, Token stop) const {
    return calibration_documents(*file_, task, stop, options_.documents, options_.seed,
                                 model_.config);
  }
  std::vector<Document> both_tasks() const {
    std::vector<Document> texts = documents("passkey", kEndOfNeedle);
    for (Document& document : documents("cot", kEndOfSequence))
      texts.push_back(std::move(document));
    return texts;
  }

  /// Logits [vocab, tokens - first] of a text's tokens from `first` on.
  Matrix read(const headwise::HeadPlan& plan, std::span<const Token> tokens, std::int64_t first,
              Observer observer) {
    const auto num_tokens = static_cast<std::int64_t>(tokens.size());
    if (num_tokens > model_.config.max_context) {
      headwise::fail<headwise::ConfigError>("a text of ", num_tokens,
                                            " tokens, the model knows positions up to ",
                                            model_.config.max_context);
    }
    Cache cache(shape_, plan,
                {.max_context = num_tokens, .prefill = headwise::PrefillMode::kWindowed});
    Decoder<Cache, E> decoder(model_, num_tokens, executor_);
    decoder.observe(std::move(observer));
    Batch batch;
    batch.add(cache.add_sequence().value(), tokens);
    decoder.forward(cache, batch);
    on_forward_();
    return decoder.logits(first, num_tokens - first);
  }

  const Model& model_;
  headwise::ModelShape shape_;
  const SafeTensors* file_;
  IdentifyOptions options_;
  E& executor_;
  OnForward on_forward_;
};

}  // namespace needle_lm
