// SPDX-License-Identifier: MIT
/// @file checks.hpp
/// Is it right? Logits beside the engine's own and beside double; ragged batches; rollback.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "context.hpp"
#include "distance.hpp"
#include "naive.hpp"
#include "setup.hpp"

namespace in_llama {

/// Logits of every token of a text, five engines in step.
/// @return whether ours is as near to stock as stock's two attention paths are to each other, and a
///   plan's as near to double.
inline bool check_logits(const Setup& setup) {
  const std::vector<llama_token> tokens = setup.read(setup.tokens_or(2048));
  const auto count = static_cast<std::int64_t>(tokens.size());
  const auto stock = [&](bool flash) {
    return Context(setup.model.get(), {.num_cells = static_cast<int>(count + kChunk),
                                       .max_rows = kChunk,
                                       .num_threads = setup.num_threads,
                                       .flash_attention = flash});
  };
  Context flash_on = stock(true);
  Context flash_off = stock(false);
  Takeover full(setup.model, setup.full(), options_for(count), setup.num_threads);
  Takeover planned(setup.model, setup.plan(), options_for(count), setup.num_threads);
  Naive naive(setup.model, setup.plan(), kChunk, setup.num_threads);
  const headwise::SequenceId in_full = *full.cache().add_sequence();
  const headwise::SequenceId in_planned = *planned.cache().add_sequence();

  Distance stocks, ours, ours_off, plans, cost;
  for_each_chunk(tokens, [&](std::size_t first, std::span<const llama_token> chunk) {
    std::vector<Row> rows;
    for (const llama_token token : chunk) {
      rows.push_back({token, static_cast<llama_pos>(first + rows.size()), 0, true});
    }
    if (!flash_on.decode(rows) || !flash_off.decode(rows) || !naive.forward(chunk)) {
      headwise::fail<std::runtime_error>("llama.cpp gave up");
    }
    require(full.forward(
        std::vector<NewTokens>{{.sequence = in_full, .tokens = chunk, .wants_all_logits = true}}));
    require(planned.forward(std::vector<NewTokens>{
        {.sequence = in_planned, .tokens = chunk, .wants_all_logits = true}}));
    for (std::size_t i = 0; i < chunk.size(); ++i) {
      stocks.add(flash_on.logits(i), flash_off.logits(i));
      ours.add(flash_on.logits(i), full.logits(i));
      ours_off.add(flash_off.logits(i), full.logits(i));
      plans.add(naive.logits(i), planned.logits(i));
      cost.add(flash_on.logits(i), planned.logits(i));
    }
  });
  const auto print = [](const char* what, const Distance& distance) {
    std::printf("  %-58s NMSE %.1e  KL %.1e  same token %.2f %%\n", what, distance.nmse(),
                distance.mean_kl(), 100.0 * distance.alike());
  };
  std::printf("Logits of %lld tokens of %s\n", static_cast<long long>(count), setup.text.c_str());
  print("stock with flash attention, and without", stocks);
  print("stock with flash attention, and Headwise keeping everything", ours);
  print("stock without flash attention, and Headwise likewise", ours_off);
  print("the plan in naive double, and Headwise", plans);
  print("stock, and Headwise with the plan (what it costs)", cost);
  // What parts them all is the last bit of attention, made large where the next product rounds its
  // activations to 8 bits: that is chance, and so is a quarter of it.
  const auto within = [&](const Distance& distance) {
    return distance.nmse() <= 1.25 * stocks.nmse() && distance.mean_kl() <= 1.25 * stocks.mean_kl();
  };
  return within(ours) && within(plans);
}

/// Sequences of unlike lengths in one batch, and each alone.
inline bool check_ragged_batch(const Setup& setup) {
  constexpr std::size_t kLengths[] = {40, 130, 7, 60};
  constexpr std::size_t kSteps = 16;
  const std::vector<llama_token> text = setup.read(1024);
  const auto run = [&](const std::vector<std::size_t>& which) {
    Takeover engine(setup.model, setup.plan(), options_for(512, 4), setup.num_threads);
    std::vector<headwise::SequenceId> ids;
    for ([[maybe_unused]] const std::size_t _ : which)
      ids.push_back(*engine.cache().add_sequence());
    std::vector<std::vector<std::vector<float>>> logits(which.size());
    for (std::size_t step = 0; step <= kSteps; ++step) {
      std::vector<NewTokens> pieces;
      std::vector<std::size_t> last;
      std::size_t row = 0;
      for (std::size_t i = 0; i < which.size(); ++i) {
        const std::size_t prompt = kLengths[which[i]];
        const auto own = std::span(text).subspan(which[i] * 200, 200);
        pieces.push_back(
            {.sequence = ids[i],
             .tokens = step == 0 ? own.first(prompt) : own.subspan(prompt + step - 1, 1)});
        row += pieces.back().tokens.size();
        last.push_back(row - 1);
      }
      require(engine.forward(pieces));
      for (std::size_t i = 0; i < which.size(); ++i) {
        const auto of_row = engine.logits(last[i]);
        logits[i].emplace_back(of_row.begin(), of_row.end());
      }
    }
    return logits;
  };
  const auto together = run({0, 1, 2, 3});
  Distance distance;
  for (std::size_t i = 0; i < std::size(kLengths); ++i) {
    const auto alone = run({i});
    for (std::size_t step = 0; step <= kSteps; ++step)
      distance.add(alone[0][step], together[i][step]);
  }
  std::printf(
      "Prompts of 40, 130, 7 and 60 tokens in one batch, then 16 tokens each, beside each alone\n");
  std::printf("  %-58s NMSE %.1e  KL %.1e  same token %.2f %%\n", "", distance.nmse(),
              distance.mean_kl(), 100.0 * distance.alike());
  return distance.nmse() <= 1e-4;
}

/// Drafts that are taken back leave no bit behind.
inline bool check_rollback(const Setup& setup) {
  const std::vector<llama_token> text = setup.read(600);
  const auto run = [&](bool with_drafts) {
    Takeover engine(setup.model, setup.plan(), options_for(1024), setup.num_threads);
    const headwise::SequenceId id = *engine.cache().add_sequence();
    const auto forward = [&](std::span<const llama_token> tokens, headwise::Phase phase) {
      require(engine.forward(
          std::vector<NewTokens>{{.sequence = id, .tokens = tokens, .phase = phase}}));
    };
    const auto all = std::span<const llama_token>(text);
    for_each_chunk(all.first(500), [&](std::size_t, std::span<const llama_token> chunk) {
      forward(chunk, headwise::Phase::kPrompt);
    });
    if (with_drafts) {
      forward(all.first(20), headwise::Phase::kDecode);
      require(engine.cache().rollback(id, 500));
    }
    std::vector<float> logits;
    for (std::size_t i = 500; i < 510; ++i) {
      forward(all.subspan(i, 1), headwise::Phase::kDecode);
      logits.insert(logits.end(), engine.logits(0).begin(), engine.logits(0).end());
    }
    return logits;
  };
  const bool same = run(true) == run(false);
  std::printf("10 tokens after 20 drafted ones were taken back\n  %s bits\n",
              same ? "the same" : "OTHER");
  return same;
}

}  // namespace in_llama
