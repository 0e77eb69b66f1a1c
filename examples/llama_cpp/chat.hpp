// SPDX-License-Identifier: MIT
/// @file chat.hpp
/// A conversation that outgrows the stock cache many times over.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "context.hpp"
#include "setup.hpp"

namespace in_llama {

/// Feeds tokens and gives the logits after the last.
using Feed = std::function<std::span<const float>(std::span<const llama_token>)>;

/// The model's own format of one turn, ready to be answered.
inline std::vector<llama_token> turn(const Model& model, const std::string& text) {
  const llama_chat_message message{"user", text.c_str()};
  std::string formatted(text.size() + 512, '\0');
  const int length =
      llama_chat_apply_template(llama_model_chat_template(model.get(), nullptr), &message, 1, true,
                                formatted.data(), static_cast<std::int32_t>(formatted.size()));
  if (length < 0)
    headwise::fail<headwise::ConfigError>("the model has no chat format that llama.cpp knows");
  formatted.resize(static_cast<std::size_t>(length));
  return model.tokens(formatted, /*special=*/true);
}

/// What was said in a conversation, and how often the likeliest token was said.
struct Said {
  std::vector<llama_token> tokens;
  std::size_t num_likeliest = 0;
};

/// Greedy answers to each turn, or those of `script`.
inline Said converse(const Model& model, const std::vector<std::string>& turns, const Feed& feed,
                     const std::vector<llama_token>* script = nullptr) {
  constexpr std::size_t kLongest = 40;
  Said said;
  for (const std::string& text : turns) {
    std::span<const float> logits;
    const std::vector<llama_token> asked = turn(model, text);
    for_each_chunk(asked,
                   [&](std::size_t, std::span<const llama_token> chunk) { logits = feed(chunk); });
    for (std::size_t i = 0; i < kLongest; ++i) {
      const auto likeliest =
          static_cast<llama_token>(std::ranges::max_element(logits) - logits.begin());
      const llama_token token = script != nullptr ? (*script)[said.tokens.size()] : likeliest;
      said.tokens.push_back(token);
      said.num_likeliest += token == likeliest;
      logits = feed(std::span(&token, 1));  // also the end of the turn
      if (model.ends_text(token)) break;
    }
  }
  return said;
}

/// The same conversation in stock and in ours.
/// @return whether ours, keeping everything, would say what stock said, but for a few tokens: such
///   as lie so near to each other that stock's two attention paths part there too
inline bool check_chat(const Setup& setup) {
  const Model& model = setup.model;
  const std::int64_t longest = setup.tokens_or(2048);
  std::string pasted;
  for (const llama_token token : setup.read(longest - 300)) pasted += model.text(token);
  const std::vector<std::string> turns{
      "My name is Ada. I live in Lisbon.",
      "Here is a text:\n" + pasted + "\nWhat is it about? Answer in one sentence.",
      "What is a license?"};

  const std::int64_t cells = longest + 2 * kChunk;
  Context stock(
      model.get(),
      {.num_cells = static_cast<int>(cells), .max_rows = kChunk, .num_threads = setup.num_threads});
  llama_pos pos = 0;
  const Said expected = converse(model, turns, [&](std::span<const llama_token> tokens) {
    std::vector<Row> rows;
    for (const llama_token token : tokens)
      rows.push_back({token, pos++, 0, rows.size() + 1 == tokens.size()});
    if (!stock.decode(rows)) headwise::fail<std::runtime_error>("llama.cpp gave up");
    return stock.logits(rows.size() - 1);
  });
  std::printf("A chat of %lld tokens\n", static_cast<long long>(pos));
  const auto print = [&](const char* who, const Said& said, std::int64_t num_cells,
                         std::size_t held) {
    std::string text;
    for (const llama_token token : said.tokens)
      text += model.ends_text(token) ? "\n      " : model.text(token);
    std::printf("  %s, a stock cache of %lld cells and %.1f MiB in ours:\n      %s\n", who,
                static_cast<long long>(num_cells), static_cast<double>(held) / (1 << 20),
                text.c_str());
  };
  print("stock", expected, cells, 0);
  const auto with = [&](const char* who, const headwise::HeadPlan& plan,
                        const std::vector<llama_token>* script) {
    Takeover engine(model, plan, options_for(cells), setup.num_threads);
    const headwise::SequenceId id = *engine.cache().add_sequence();
    Said said = converse(
        model, turns,
        [&](std::span<const llama_token> tokens) {
          require(engine.forward(std::vector<NewTokens>{{.sequence = id, .tokens = tokens}}));
          return engine.logits(tokens.size() - 1);
        },
        script);
    if (script == nullptr) print(who, said, kChunk, engine.cache().held_bytes(id));
    return said;
  };
  const Said full = with("", setup.full(), &expected.tokens);
  with("the plan", setup.plan(), nullptr);
  std::printf(
      "  everything kept, a stock cache of %lld cells: stock's token is the likeliest at %zu of "
      "%zu\n",
      static_cast<long long>(kChunk), full.num_likeliest, full.tokens.size());
  return full.num_likeliest * 10 >= full.tokens.size() * 9;
}

}  // namespace in_llama
