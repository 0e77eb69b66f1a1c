// SPDX-License-Identifier: MIT
// An engine with a loop of its own in plain ggml: needle_lm's trained model, two conversations a
// step. What the engine has to write for Headwise is in Graph's constructor and between begin and
// commit.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "headwise/policies/duo_attention.hpp"
#include "llama_graph.hpp"

namespace {

using namespace headwise;

void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

/// Two conversations read the same document at different speeds; do both answer as it ends?
bool answers(Model& model, const HeadPlan& plan, std::span<const int> document, int prompt) {
  GgmlAttention<f16> attention(model.config.shape(), plan,
                               {.max_sequences = 2, .max_context = 2048, .max_chunk = 64},
                               kThreads);
  const SequenceId ids[] = {*attention.cache().add_sequence(), *attention.cache().add_sequence()};
  const auto question = document.first(static_cast<std::size_t>(prompt));
  std::vector<int> texts[2] = {{question.begin(), question.end()},
                               {question.begin(), question.end()}};
  std::map<std::size_t, Graph> graphs;  // by number of tokens
  int num_steps = 0;
  for (; std::min(texts[0].size(), texts[1].size()) < document.size(); ++num_steps) {
    std::vector<SequenceChunk> chunks;
    std::vector<int> tokens, positions;
    for (const int i : {0, 1}) {
      const std::int64_t first = attention.cache().length(ids[i]);
      const std::int64_t end = std::min(first + (i == 0 ? 64 : 50), std::ssize(texts[i]));
      chunks.push_back({ids[i], end - first});
      tokens.insert(tokens.end(), texts[i].begin() + first, texts[i].begin() + end);
      for (std::int64_t pos = first; pos < end; ++pos) positions.push_back(static_cast<int>(pos));
    }
    const auto graph = graphs.try_emplace(tokens.size(), model, attention, tokens.size()).first;
    require(attention.begin(chunks) == StepStatus::kOk, "the step was refused");
    const int* next = graph->second.compute(tokens, positions);
    require(attention.commit() == StepStatus::kOk, "the graph's attention was refused");
    for (const int i : {0, 1}) {
      next += chunks[static_cast<std::size_t>(i)].num_tokens;
      if (attention.cache().length(ids[i]) == std::ssize(texts[i])) texts[i].push_back(next[-1]);
    }
  }
  const auto is_right = [&](const auto& text) {
    return std::ranges::equal(document, std::span(text).first(document.size()));
  };
  const bool right = std::ranges::all_of(texts, is_right);
  std::printf("%2.0f %% of the heads stream: %s, %zu KiB a sequence, %d steps of %zu graphs\n",
              100.0 * plan.sparsity(), right ? "both right" : "WRONG",
              attention.cache().held_bytes(ids[0]) >> 10, num_steps, graphs.size());
  return right;
}

}  // namespace

int main(int argc, char** argv) try {
  require(argc == 2, "usage: example_06_ggml NEEDLE_LM_FOLDER");
  const std::string folder = argv[1];
  Model model{needle_lm::load_config(folder + "/model/config.json"),
              needle_lm::SafeTensors(folder + "/model/model.safetensors")};
  const needle_lm::SafeTensors golden(folder + "/data/golden.safetensors");
  const auto tokens = golden.integers("passkey.tokens", golden.shape("passkey.tokens"));
  const int prompt = golden.integers("passkey.prompt_length", {1})[0];
  const int answer = golden.integers("passkey.answer_length", {1})[0];
  const auto document = std::span(tokens).first(static_cast<std::size_t>(prompt + answer));
  const HeadScores gates = duo_attention::load(folder + "/heads/duo_attention.tsv");
  const auto plan = [&](double sparsity) {
    return duo_attention::Policy{sparsity, {.sink = 4, .recent = 60}}.plan(gates);
  };
  const bool right = answers(model, plan(0.0), document, prompt);
  return answers(model, plan(0.5), document, prompt) && right ? 0 : 1;
} catch (const std::exception& error) {
  return std::fprintf(stderr, "%s\n", error.what()), 1;
}
