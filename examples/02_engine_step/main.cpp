// SPDX-License-Identifier: MIT
// A serving engine's loop: sequences of unequal length in one step, a prompt that waits for pages,
// speculation that is taken back, and pages that serve the next sequence at once.
#include <array>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "../stand_in/model.hpp"
#include "headwise/headwise.hpp"

namespace {

using namespace headwise;

constexpr std::size_t kThreads = 1;
const ModelShape kShape = ModelShape::uniform(2, 4, 2, 64);

/// Tokens of one request that go into the next step.
struct Work {
  SequenceId sequence;
  std::uint32_t text;
  std::int64_t num_tokens;
  std::int64_t num_wrong = 0;    ///< the last ones: a draft model's, of another text
  Phase phase = Phase::kPrompt;  ///< kDecode for several drafted tokens
};

/// KV head 1 of every layer keeps everything, the others stream.
HeadPlan make_plan(const ModelShape& shape) {
  HeadPlan plan(shape, KeepWindow{{.sink = 4, .recent = 60}});
  for (int layer = 0; layer < shape.num_layers(); ++layer) plan.set(layer, 1, KeepEverything{});
  return plan;
}

class Engine {
 public:
  explicit Engine(const CacheOptions& options) : cache_(model_.shape(), plan_, options) {
    reserve_scratch(step_, cache_, kThreads);  // once, so that no step allocates
  }

  /// All of the batch, or nothing of it.
  StepStatus forward(const std::vector<Work>& batch) {
    chunks_.clear();
    rows_.clear();
    checked_.clear();
    for (const auto& [sequence, text, num_tokens, num_wrong, phase] : batch) {
      chunks_.push_back({sequence, num_tokens, phase});
      // RoPE positions of new tokens: from the sequence's length on, whatever its heads keep.
      const std::int64_t first = cache_.length(sequence);
      stand_in::add_tokens(rows_, text, first, num_tokens - num_wrong);
      checked_.push_back(rows_.size() - 1);
      stand_in::add_tokens(rows_, text + 100, first + num_tokens - num_wrong, num_wrong);
    }
    const StepStatus begun = cache_.begin(step_, chunks_);
    if (begun != StepStatus::kOk) return begun;
    for (int layer = 0; layer < plan_.num_layers(); ++layer) {
      model_.project(layer, rows_);
      const StepStatus attended =
          attend(cache_, step_, layer, model_.q(), model_.k(), model_.v(), model_.out());
      if (attended != StepStatus::kOk) return attended;
      for (const std::size_t row : checked_) {
        const double error = model_.error(layer, row, rows_[row], plan_);
        worst_error_ = error <= worst_error_ ? worst_error_ : error;
      }
    }
    return cache_.commit(step_);
  }

  KvCache<f16>& cache() { return cache_; }
  double worst_error() const { return worst_error_; }

 private:
  stand_in::Model model_{kShape};
  HeadPlan plan_ = make_plan(model_.shape());
  KvCache<f16> cache_;
  Step step_;  // one object for all steps: its memory is kept
  std::vector<SequenceChunk> chunks_;
  std::vector<stand_in::Token> rows_;
  std::vector<std::size_t> checked_;  // the last right row of every sequence
  double worst_error_ = 0.0;
};

bool all_right = true;

void expect(const char* what, StepStatus got, StepStatus expected, const KvCache<f16>& cache) {
  std::printf("%-34s %-24s %6zu KiB free\n", what, to_string(got), cache.free_bytes() / 1024);
  all_right = all_right && got == expected;
}

}  // namespace

int main() {
  using enum StepStatus;
  // Before a cache is built: what it and its steps will allocate, and how far that would reach.
  const HeadPlan plan = make_plan(kShape);
  const CacheOptions options{.page_tokens = 16,
                             .max_bytes = 320 << 10,  // 80 pages of 16 x (64 + 64) x 2 bytes
                             .max_sequences = 4,
                             .max_context = 512,
                             .max_chunk = 300,
                             .max_rollback = 8};
  const Estimate cost = estimate(kShape, plan, options);
  const std::size_t scratch = scratch_bytes(kShape, plan, options, kThreads);
  const auto longest = longest_context(kShape, plan, options, cost.total_bytes());
  std::printf("%zu KiB: 4 texts of up to %lld tokens at any time, or longer ones beside shorter\n",
              (cost.total_bytes() + scratch) / 1024, static_cast<long long>(longest));
  const std::array<std::int64_t, 3> contexts{64, 256, 512};
  for (const ContextBytes& row : bytes_by_context(kShape, plan, options, contexts)) {
    std::printf("  %lld tokens hold %zu KiB, %zu more in a step, dense %zu: %s\n",
                static_cast<long long>(row.context), row.resident_bytes / 1024,
                row.transient_bytes / 1024, row.dense_bytes / 1024,
                row.gains() ? "gains" : "no gain");
  }

  Engine engine(options);
  KvCache<f16>& cache = engine.cache();
  const SequenceId a = *cache.add_sequence();
  const SequenceId b = *cache.add_sequence();
  const SequenceId c = *cache.add_sequence();

  // Ragged: 200 and 90 tokens of two prompts in one step, then a second chunk of the first.
  expect("prompts of 200 and 90 tokens", engine.forward({{a, 1, 200}, {b, 2, 90}}), kOk, cache);
  expect("100 more of the first", engine.forward({{a, 1, 100}}), kOk, cache);

  // Decode: one token of each sequence.
  for (int i = 0; i < 5; ++i) {
    expect("decode a and b", engine.forward({{a, 1, 1}, {b, 2, 1}}), kOk, cache);
  }

  // Speculation: 6 drafted tokens of a, beside b's next one; the model agrees with 2 of them.
  const std::int64_t before = cache.length(a);
  expect("6 drafted tokens of a", engine.forward({{a, 1, 6, 4, Phase::kDecode}, {b, 2, 1}}), kOk,
         cache);
  expect("4 of them taken back", cache.rollback(a, before + 2), kOk, cache);
  expect("decode a and b", engine.forward({{a, 1, 1}, {b, 2, 1}}), kOk, cache);
  expect("too far back", cache.rollback(a, before - 3), kTooFarBack, cache);

  // A prompt that finds no room leaves no trace; the engine ends or preempts another, and retries.
  expect("a prompt of 300 tokens", engine.forward({{c, 3, 300}}), kOutOfPages, cache);
  cache.release(a);
  expect("again, when a has ended", engine.forward({{c, 3, 300}}), kOk, cache);
  expect("decode b and c", engine.forward({{b, 2, 1}, {c, 3, 1}}), kOk, cache);
  expect("no room for so long a text", engine.forward({{c, 3, 300}}), kContextTooLong, cache);

  expect("one sequence twice", engine.forward({{b, 2, 1}, {b, 2, 1}}), kInvalidChunk, cache);

  // A step that fails half-way (an error elsewhere in the engine) is dropped, without a trace.
  Step step;
  expect("begin", cache.begin(step, {{b, 4}}), kOk, cache);
  expect("commit, no layer attended", cache.commit(step), kIncomplete, cache);
  expect("drop", cache.drop(step), kOk, cache);
  expect("commit a dropped step", cache.commit(step), kStale, cache);

  const bool exact = engine.worst_error() < 1e-5;
  std::printf("largest error against plain attention: %.1e\n", engine.worst_error());
  std::puts(exact && all_right ? "ok" : "WRONG");
  return exact && all_right ? 0 : 1;
}
