// SPDX-License-Identifier: MIT
// However a prompt is cut into chunks, each token's output is what the rule of the whole prompt
// says.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "support/attend_models.hpp"

namespace headwise {
namespace {

using test::below;
using test::every_kind;
using test::kBound;
using test::largest_difference;
using test::Model;
using test::new_tokens;
using test::options_of;
using test::Outputs;
using test::small_model;
using test::Token;
using test::two_layers;

/// Outputs of a prompt, row by row, however it was cut: [layer][row * width].
std::vector<Outputs> run_in_chunks(Model& model, SequenceId id, const std::vector<Token>& prompt,
                                   const std::vector<std::int64_t>& counts, Phase phase) {
  std::vector<Outputs> all(2);
  auto next = prompt.begin();
  for (const std::int64_t count : counts) {
    const std::vector<Outputs> out = model.run({{id, {next, next + count}}}, phase);
    next += count;
    for (std::size_t l = 0; l < all.size(); ++l) {
      all[l].insert(all[l].end(), out[l].begin(), out[l].end());
    }
  }
  return all;
}

TEST(Chunkings, AllChunkingsOfTwelveTokensEqualTheOracleOfTheWholePrompt) {
  const ModelShape shape = two_layers(1, 16, 16);
  HeadPlan plan(shape, KeepWindow{{1, 2}});
  plan.set(0, 0, KeepEverything{});
  plan.set(0, 1, KeepWindow{{4, 12}});
  plan.set(1, 0, KeepWindow{{3, 5}});
  Model model(shape, plan, options_of(PrefillMode::kWindowed, 2));
  for (const std::int64_t prefix : {0, 27}) {
    const std::vector<Token> before = new_tokens(prefix);
    const std::vector<Token> prompt = new_tokens(12);
    std::vector<std::vector<double>> expected;
    for (std::uint32_t cuts = 0; cuts < (1U << 11); ++cuts) {
      std::vector<std::int64_t> counts{1};
      for (int i = 0; i < 11; ++i) {
        if ((cuts >> i) & 1U) {
          counts.push_back(1);
        } else {
          ++counts.back();
        }
      }
      const SequenceId id = model.add();
      model.add_tokens(id, before, Phase::kPrompt);
      if (cuts == 0) expected = model.oracle({{id, prompt}}, Phase::kPrompt);
      const auto out = run_in_chunks(model, id, prompt, counts, Phase::kPrompt);
      ASSERT_LE(largest_difference(out, expected), kBound) << "cuts " << cuts;
      model.release(id);
    }
  }
}

TEST(Chunkings, RandomChunkingsOfALongPromptEqualTheOracleOfTheWholePrompt) {
  constexpr std::int64_t kTokens = 650;
  const ModelShape shape = two_layers(1, 32, 32);
  HeadPlan plan = every_kind(shape, PrefillMode::kWindowed);
  plan.set(1, 1, KeepWindow{{4, 200}});
  Model model(shape, plan, options_of(PrefillMode::kWindowed));
  const std::vector<Token> prompt = new_tokens(kTokens);
  std::vector<std::vector<double>> expected;
  std::mt19937 random(41);
  for (int round = 0; round < 12; ++round) {
    std::vector<std::int64_t> counts;
    for (std::int64_t left = kTokens; left > 0; left -= counts.back()) {
      counts.push_back(std::min(left, 1 + below(random, 1 << round)));
    }
    if (round == 11) counts = {1, kTokens - 1};
    const SequenceId id = model.add();
    if (round == 0) expected = model.oracle({{id, prompt}}, Phase::kPrompt);
    const auto out = run_in_chunks(model, id, prompt, counts, Phase::kPrompt);
    ASSERT_LE(largest_difference(out, expected), kBound) << "round " << round;
    ASSERT_TRUE(model.matches());
    model.release(id);
  }
}

TEST(Chunkings, PrefillAndDecodeOfTheSameTokensAgree) {
  const std::vector<Token> prompt = new_tokens(200);
  for (int round = 0; round < 3; ++round) {
    Model model = small_model(PrefillMode::kWindowed);
    const SequenceId whole = model.add();
    const SequenceId single = model.add();
    const SequenceId speculated = model.add();
    const auto out = run_in_chunks(model, whole, prompt, {200}, Phase::kPrompt);
    const auto one_by_one =
        run_in_chunks(model, single, prompt, std::vector<std::int64_t>(200, 1), Phase::kDecode);
    const auto by_fives =
        run_in_chunks(model, speculated, prompt, std::vector<std::int64_t>(40, 5), Phase::kDecode);
    EXPECT_LE(largest_difference(one_by_one, out), kBound);
    EXPECT_LE(largest_difference(by_fives, out), kBound);
  }
}

TEST(Chunkings, AWholePromptInOneCausalChunkIsDenseForEveryHead) {
  const ModelShape shape = two_layers(2, 32, 32);
  Model model(shape, every_kind(shape, PrefillMode::kChunkCausal),
              options_of(PrefillMode::kChunkCausal));
  Model dense(shape, HeadPlan(shape), options_of(PrefillMode::kChunkCausal));
  const std::vector<Token> prompt = new_tokens(150);
  const SequenceId id = model.add();
  ASSERT_EQ(dense.add(), id);
  EXPECT_LE(largest_difference(model.run({{id, prompt}}, Phase::kPrompt),
                               dense.oracle({{id, prompt}}, Phase::kPrompt)),
            kBound);
}

TEST(Chunkings, ChangingATokenChangesNothingBeforeIt) {
  const std::vector<Token> prompt = new_tokens(120);
  std::mt19937 random(31);
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (int round = 0; round < 12; ++round) {
      std::vector<std::int64_t> counts;
      for (std::int64_t left = 120; left > 0; left -= counts.back()) {
        counts.push_back(std::min<std::int64_t>(left, 1 + below(random, 4 << (round % 6))));
      }
      const auto changed_at = static_cast<std::size_t>(below(random, 120));
      std::vector<Token> changed = prompt;
      changed[changed_at] = new_tokens(1).front();

      Model model = small_model(prefill);
      const SequenceId a = model.add();
      const SequenceId b = model.add();
      const auto out = run_in_chunks(model, a, prompt, counts, Phase::kPrompt);
      const auto other = run_in_chunks(model, b, changed, counts, Phase::kPrompt);
      for (std::size_t l = 0; l < 2; ++l) {
        const std::size_t row = out[l].size() / 120;
        const auto before = static_cast<std::ptrdiff_t>(changed_at * row);
        ASSERT_TRUE(std::equal(out[l].begin(), out[l].begin() + before, other[l].begin()))
            << "token " << changed_at;
        ASSERT_FALSE(std::equal(out[l].begin() + before,
                                out[l].begin() + before + static_cast<std::ptrdiff_t>(row),
                                other[l].begin() + before))
            << "the token itself must not look the same";
      }
    }
  }
}

}  // namespace
}  // namespace headwise
