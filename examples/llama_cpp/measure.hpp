// SPDX-License-Identifier: MIT
/// @file measure.hpp
/// What it costs: perplexity over a long text, bytes, and tokens a second beside stock.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <span>
#include <vector>

#include "context.hpp"
#include "headwise/cache/estimate.hpp"
#include "setup.hpp"

namespace in_llama {

/// Bytes of this process in memory.
inline std::size_t resident_bytes() {
  std::size_t pages_of_all = 0;
  std::size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages_of_all >> pages;
  return pages * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

inline double mib(std::size_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

/// Reads a text under the plan: perplexity, bytes held and bytes resident as it grows.
inline bool read_text(const Setup& setup) {
  const std::int64_t count = setup.tokens_or(8192);
  const std::vector<llama_token> tokens = setup.read(count);
  Takeover engine(setup.model, setup.plan(), options_for(count), setup.num_threads);
  const headwise::SequenceId id = *engine.cache().add_sequence();
  double nats = 0.0;
  std::size_t last = 0;
  std::printf("tokens   perplexity since the last row   held, MiB   resident, MiB\n");
  for_each_chunk(tokens, [&](std::size_t first, std::span<const llama_token> chunk) {
    require(engine.forward(
        std::vector<NewTokens>{{.sequence = id, .tokens = chunk, .wants_all_logits = true}}));
    for (std::size_t i = 0; i < chunk.size() && first + i + 1 < tokens.size(); ++i) {
      const std::span<const float> logits = engine.logits(i);
      const auto max = static_cast<double>(*std::ranges::max_element(logits));
      double sum = 0.0;
      for (const float x : logits) sum += std::exp(static_cast<double>(x) - max);
      nats += max + std::log(sum) -
              static_cast<double>(logits[static_cast<std::size_t>(tokens[first + i + 1])]);
    }
    const std::size_t end = first + chunk.size();
    if (end % 1024 != 0 && end != tokens.size()) return;
    std::printf("%6zu   %29.3f   %9.1f   %13.1f\n", end,
                std::exp(nats / static_cast<double>(end - last)),
                mib(engine.cache().held_bytes(id)), mib(resident_bytes()));
    nats = 0.0;
    last = end;
  });
  return true;
}

/// A cache filled to `count` tokens: what was estimated, what is held, what the process grew by.
inline bool check_memory(const Setup& setup, std::int64_t count) {
  const std::vector<llama_token> chunk = setup.read(kChunk);
  const headwise::CacheOptions options = options_for(count);
  const headwise::HeadPlan plan = setup.plan();
  Takeover engine(setup.model, plan, options, setup.num_threads);
  const headwise::SequenceId id = *engine.cache().add_sequence();
  require(engine.fill(id, chunk, kChunk));  // llama.cpp's own buffers are touched by now
  const std::size_t held_before = engine.cache().held_bytes(id);
  const std::size_t before = resident_bytes();
  require(engine.fill(id, chunk, count));
  const std::size_t held = engine.cache().held_bytes(id);
  const std::size_t estimated =
      headwise::estimate(setup.model.shape(), plan, options).resident_bytes;
  const std::size_t dense =
      headwise::sequence_bytes(setup.model.shape(), setup.full(), options, count);
  const double grew = static_cast<double>(resident_bytes()) - static_cast<double>(before);
  const double by_cache = static_cast<double>(held - held_before);
  std::printf(
      "Memory at %lld tokens, %.0f %% of the heads streaming\n  estimated %zu bytes, held %zu "
      "(%.1f MiB; every head keeping everything: %.1f)\n  since token %lld: held grew by %.1f MiB, "
      "the process by %.1f (%+.1f %%)\n",
      static_cast<long long>(count), 100.0 * plan.sparsity(), estimated, held, mib(held),
      mib(dense), static_cast<long long>(kChunk), by_cache / (1 << 20), grew / (1 << 20),
      100.0 * (grew / by_cache - 1.0));
  return held == estimated && std::fabs(grew / by_cache - 1.0) <= 0.05;
}

/// As Takeover::fill(): the chunk's state is given to sequence 0 again and again, moved behind what
/// it has. The context has two sequences.
/// @param length  a multiple of the chunk's
inline void fill(Context& stock, std::span<const llama_token> chunk, std::int64_t length) {
  std::vector<Row> rows;
  for (const llama_token token : chunk) {
    rows.push_back({token, static_cast<llama_pos>(rows.size()), 1, false});
  }
  if (!stock.decode(rows)) headwise::fail<std::runtime_error>("llama.cpp gave up");
  std::vector<std::uint8_t> state(llama_state_seq_get_size(stock.get(), 1));
  llama_state_seq_get_data(stock.get(), state.data(), state.size(), 1);
  llama_memory_seq_rm(stock.memory(), 1, -1, -1);
  for (std::int64_t at = 0; at < length; at += std::ssize(chunk)) {
    if (llama_state_seq_set_data(stock.get(), state.data(), state.size(), 1) == 0) {
      headwise::fail<std::runtime_error>("llama.cpp does not take its own state");
    }
    llama_memory_seq_add(stock.memory(), 1, -1, -1, static_cast<llama_pos>(at));
    llama_memory_seq_cp(stock.memory(), 1, 0, -1, -1);
    llama_memory_seq_rm(stock.memory(), 1, -1, -1);
  }
}

/// Single tokens at a length, stock and ours in turns.
/// @param length  a multiple of kChunk
inline bool measure_speed(const Setup& setup, std::int64_t length) {
  using Clock = std::chrono::steady_clock;
  const std::int64_t num_turns = 24;
  const std::vector<llama_token> tokens = setup.read(length + num_turns);
  Context stock(setup.model.get(), {.num_cells = static_cast<int>(length + kChunk),
                                    .max_rows = kChunk,
                                    .max_sequences = 2,
                                    .num_threads = setup.num_threads});
  Takeover full(setup.model, setup.full(), options_for(length + kChunk), setup.num_threads);
  Takeover planned(setup.model, setup.plan(), options_for(length + kChunk), setup.num_threads);
  const headwise::SequenceId in_full = *full.cache().add_sequence();
  const headwise::SequenceId in_planned = *planned.cache().add_sequence();

  const auto chunk = std::span(tokens).first(kChunk);
  fill(stock, chunk, length);
  require(full.fill(in_full, chunk, length));
  require(planned.fill(in_planned, chunk, length));

  std::vector<double> ms[3];
  const auto timed = [&](std::size_t which, auto&& forward) {
    const auto start = Clock::now();
    forward();
    ms[which].push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  };
  for (std::int64_t i = 0; i < num_turns; ++i) {
    const auto token = std::span(tokens).subspan(static_cast<std::size_t>(length + i), 1);
    timed(0, [&] {
      const Row row{token[0], static_cast<llama_pos>(length + i), 0, true};
      if (!stock.decode({&row, 1})) headwise::fail<std::runtime_error>("llama.cpp gave up");
    });
    timed(1, [&] {
      require(full.forward(std::vector<NewTokens>{{.sequence = in_full, .tokens = token}}));
    });
    timed(2, [&] {
      require(planned.forward(std::vector<NewTokens>{{.sequence = in_planned, .tokens = token}}));
    });
  }
  for (auto& times : ms) std::ranges::sort(times);
  const auto median = [&](std::size_t which) { return ms[which][ms[which].size() / 2]; };
  std::printf(
      "One token at %lld, %d threads, median of %lld turns: stock %.2f ms (%.1f tokens/s), "
      "everything kept %.2f ms (%.1f; %.2f x stock), %.0f %% streaming %.2f ms (%.1f; %.2f x "
      "everything)\n",
      static_cast<long long>(length), setup.num_threads, static_cast<long long>(num_turns),
      median(0), 1e3 / median(0), median(1), 1e3 / median(1), median(0) / median(1),
      100.0 * setup.plan().sparsity(), median(2), 1e3 / median(2), median(1) / median(2));
  return true;
}

}  // namespace in_llama
