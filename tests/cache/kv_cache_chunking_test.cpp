// SPDX-License-Identifier: MIT
// Promise: the same prompt leaves the same rows, however it is cut; every chunk sees what the rule
// says at its start.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "headwise/cache/kv_cache.hpp"
#include "support/cache_model.hpp"

namespace headwise {
namespace {

using test::ModelledCache;
using test::Token;
using Model = ModelledCache<f16>;

/// Sizes of the chunks that bit mask `cuts` makes of `n` tokens: bit i cuts after token i.
std::vector<std::int64_t> chunks_of(std::uint32_t cuts, std::int64_t n) {
  std::vector<std::int64_t> chunks{1};
  for (std::int64_t i = 1; i < n; ++i) {
    if ((cuts >> (i - 1)) & 1U) {
      chunks.push_back(1);
    } else {
      ++chunks.back();
    }
  }
  return chunks;
}

class AllChunkings : public ::testing::TestWithParam<PrefillMode> {};

TEST_P(AllChunkings, OfTwelveTokensLeaveTheSameRows) {
  // After prefixes that put the twelve tokens before, across and after a ring's first wraps.
  const PrefillMode prefill = GetParam();
  const ModelShape shape({{2, 1, 16, 16}, {2, 1, 16, 16}});
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{1, 2}});
  plan.set(1, 0, KeepWindow{{4, 12}});
  plan.set(1, 1, KeepWindow{{3, 5}});
  if (prefill == PrefillMode::kChunkCausal) plan.set(0, 1, KeepGrowingWindow{2, 6, 4});
  for (const std::int64_t prefix : {0, 8, 27}) {
    const std::vector<Token> before = test::new_tokens(prefix);
    const std::vector<Token> prompt = test::new_tokens(12);
    CacheOptions options = test::mixed_options(prefill, 2);
    options.max_context = 100;
    Model model(shape, plan, options);
    std::vector<test::SeenCopy> expected;
    for (std::uint32_t cuts = 0; cuts < (1U << 11); ++cuts) {
      const SequenceId id = model.add();
      model.add_tokens(id, before, Phase::kPrompt);
      std::size_t next = 0;
      for (const std::int64_t count : chunks_of(cuts, 12)) {
        ASSERT_TRUE(model.matches(id, Phase::kPrompt, count)) << "cuts " << cuts;
        const auto first = prompt.begin() + static_cast<std::ptrdiff_t>(next);
        model.add_tokens(id, {first, first + static_cast<std::ptrdiff_t>(count)}, Phase::kPrompt);
        next += static_cast<std::size_t>(count);
      }
      const auto seen = test::seen_by_next(model.cache, id, Phase::kDecode);
      if (cuts == 0) {
        ASSERT_TRUE(model.matches());
        expected = seen;
      }
      ASSERT_EQ(seen, expected) << "cuts " << cuts << " after " << prefix;
      model.release(id);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(KvCache, AllChunkings,
                         ::testing::Values(PrefillMode::kWindowed, PrefillMode::kChunkCausal),
                         [](const auto& param) {
                           return std::string(
                               param.param == PrefillMode::kWindowed ? "Windowed" : "ChunkCausal");
                         });

/// 10,000 tokens of K and V for two heads, made once.
class LongPrompt {
 public:
  static constexpr std::int64_t kTokens = 10'000;
  static constexpr int kHeads = 3;
  static constexpr int kDim = 16;

  LongPrompt() {
    for (int head = 0; head < kHeads; ++head) {
      for (const test::Side side : {test::Side::kK, test::Side::kV}) {
        std::vector<float>& rows =
            rows_[static_cast<std::size_t>(2 * head + (side == test::Side::kV))];
        rows.resize(kTokens * kDim);
        for (std::int64_t pos = 0; pos < kTokens; ++pos) {
          test::fill_row(static_cast<Token>(pos), pos, 0, head, side,
                         std::span(rows).subspan(static_cast<std::size_t>(pos * kDim), kDim));
        }
      }
    }
  }
  TensorView<const float> from(std::int64_t pos, int head, test::Side side) const {
    const auto& rows = rows_[static_cast<std::size_t>(2 * head + (side == test::Side::kV))];
    return TensorView<const float>::nhd(rows.data() + pos * kDim, 1, kDim);
  }

 private:
  std::vector<float> rows_[2 * kHeads];
};

TEST(KvCache, TwoHundredChunkingsOfALongPromptLeaveTheSameBits) {
  const LongPrompt prompt;
  const ModelShape shape = ModelShape::uniform(1, LongPrompt::kHeads, LongPrompt::kHeads, 16);
  const Window windows[] = {Window::everything(), {4, 60}, {17, 200}};
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{windows[1]});
  plan.set(0, 2, KeepWindow{windows[2]});
  CacheOptions options;
  options.page_tokens = 64;
  options.max_context = LongPrompt::kTokens;
  options.max_rollback = 8;
  KvCache<f16> cache(shape, plan, options);
  Step step;

  // One chunk of everything and token by token, then random ones: small, large, and mixed.
  std::mt19937 random(3);
  std::vector<test::SeenCopy> expected;
  for (int round = 0; round < 202; ++round) {
    const std::int64_t largest = round == 0   ? LongPrompt::kTokens
                                 : round == 1 ? 1
                                              : (std::int64_t{64} << (random() % 7));
    const SequenceId id = cache.add_sequence().value();
    bool first = true;
    for (std::int64_t pos = 0; pos < LongPrompt::kTokens;) {
      std::int64_t count =
          std::min(LongPrompt::kTokens - pos, static_cast<std::int64_t>(random()) % largest + 1);
      if (round == 0) count = LongPrompt::kTokens;
      if (round % 4 == 1 && first) count = 1;  // split at 1
      first = false;
      ASSERT_EQ(cache.begin(step, {{id, count, Phase::kPrompt}}), StepStatus::kOk);
      for (int head = 0; head < LongPrompt::kHeads; ++head) {
        const StepChunk& chunk = step.chunks()[0];
        if (head > 0 && (round < 12 || random() % 16 == 0)) {
          // The window rule at the chunk's start, to the bit.
          const auto seen = test::copy_of(cache.seen(chunk, 0, head));
          const Window& window = windows[head];
          std::size_t next = 0;
          for (std::int64_t key = 0; key < pos; ++key) {
            if (key == window.sink) key = std::max(key, pos - window.recent + 1);
            if (key >= pos) break;
            ASSERT_LT(next, seen.positions.size());
            ASSERT_EQ(seen.positions[next], key) << "at " << pos << " of round " << round;
            ASSERT_EQ(seen.rows[next * 32 + 5],
                      to_float(from_float<f16>(prompt.from(key, head, test::Side::kK).data[5])));
            ASSERT_EQ(seen.rows[next * 32 + 16 + 9],
                      to_float(from_float<f16>(prompt.from(key, head, test::Side::kV).data[9])));
            ++next;
          }
          ASSERT_EQ(next, seen.positions.size());
        }
        cache.append<simd::BestIsa>(step, chunk, 0, head, prompt.from(pos, head, test::Side::kK),
                                    prompt.from(pos, head, test::Side::kV));
        step.note_head_done(0);
      }
      ASSERT_EQ(cache.commit(step), StepStatus::kOk);
      pos += count;
    }
    auto seen = test::seen_by_next(cache, id, Phase::kDecode);
    if (round == 0) {
      expected = std::move(seen);
    } else {
      ASSERT_EQ(seen, expected) << "round " << round;
    }
    cache.release(id);
  }
  ASSERT_EQ(expected[0].positions.size(), static_cast<std::size_t>(LongPrompt::kTokens));
  ASSERT_EQ(expected[1].positions.size(), 4U + 59U);
}

TEST(KvCache, ChunksSeeExactlyTheRuleInBothModes) {
  std::mt19937 random(17);
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const std::int64_t rollback : {0, 9}) {
      for (int round = 0; round < 6; ++round) {
        Model model(test::mixed_shape(), test::mixed_plan(prefill),
                    test::mixed_options(prefill, rollback));
        const SequenceId id = model.add();
        const std::uint32_t largest = 8U << round;
        while (model.cache.length(id) < 300 && !HasFatalFailure()) {
          const auto count = static_cast<std::int64_t>(random() % largest);
          ASSERT_TRUE(model.matches(id, Phase::kPrompt, count));
          ASSERT_TRUE(model.matches(id, Phase::kDecode, count));  // speculation: a decode of many
          model.add_tokens(id, test::new_tokens(std::min<std::int64_t>(count, 300)),
                           Phase::kPrompt);
        }
      }
    }
  }
}

TEST(KvCache, FoldedSumsAreTheSameBitsForEveryChunking) {
  const ModelShape shape = ModelShape::uniform(1, 2, 2, 32);
  HeadPlan plan(shape, KeepGrowingWindow{4, 30, 4});
  plan.set(0, 1, KeepGrowingWindow{20, 33, 2});
  const std::vector<Token> tokens = test::new_tokens(400);
  std::mt19937 random(23);
  std::vector<test::SeenCopy> expected;
  for (int round = 0; round < 30; ++round) {
    Model model(shape, plan, test::mixed_options(PrefillMode::kChunkCausal, 30));
    const SequenceId id = model.add();
    for (std::size_t pos = 0; pos < tokens.size();) {
      const std::size_t wanted = round == 0 ? 1 : round == 1 ? 400 : random() % 90 + 1;
      const std::size_t count = std::min(wanted, tokens.size() - pos);
      const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(pos);
      model.add_tokens(id, {first, first + static_cast<std::ptrdiff_t>(count)}, Phase::kPrompt);
      pos += count;
    }
    ASSERT_TRUE(model.matches());
    const auto seen = test::seen_by_next(model.cache, id, Phase::kDecode);
    ASSERT_GT(seen[0].folded, 0);
    if (round == 0) expected = seen;
    ASSERT_EQ(seen, expected) << "round " << round;
  }
}

}  // namespace
}  // namespace headwise
