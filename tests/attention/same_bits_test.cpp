// SPDX-License-Identifier: MIT
// A sequence's outputs are the same to the bit whatever runs the tasks, whoever shares its batch,
// and whatever was dropped or rolled back before.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <thread>
#include <unsupported/Eigen/CXX11/ThreadPool>
#include <utility>
#include <vector>

#include "headwise/attention/attend.hpp"
#include "headwise/core/executor.hpp"
#include "support/attend_models.hpp"

namespace headwise {
namespace {

using test::Chunks;
using test::kBound;
using test::largest_difference;
using test::Model;
using test::new_tokens;
using test::options_of;
using test::Outputs;
using test::small_model;
using test::Token;

/// A prompt, decode steps and a later chunk of two sequences; everything that came out.
template <class E>
std::vector<Outputs> outputs_with(PrefillMode prefill, E&& executor) {
  Model model = small_model(prefill);
  const SequenceId a = model.add();
  const SequenceId b = model.add();
  Token next = 1'000'000;
  const auto tokens = [&next](std::size_t count) {
    std::vector<Token> out(count);
    for (Token& token : out) token = ++next;
    return out;
  };
  std::vector<Outputs> all;
  const auto keep = [&](std::vector<Outputs> out) {
    std::move(out.begin(), out.end(), std::back_inserter(all));
  };
  keep(model.run({{a, tokens(150)}, {b, tokens(33)}}, Phase::kPrompt, executor));
  for (int i = 0; i < 6; ++i) {
    keep(model.run({{b, tokens(1)}, {a, tokens(1)}}, Phase::kDecode, executor));
  }
  keep(model.run({{a, tokens(70)}, {b, tokens(2)}}, Phase::kPrompt, executor));
  return all;
}

/// An engine that deals (ith, nth) to threads of its own.
struct IthOfNth {
  std::size_t nth;
  std::size_t num_threads() const { return nth; }
  template <class Fn>
  void for_each(std::size_t num_tasks, Fn&& fn) const {
    std::vector<std::thread> threads;
    for (std::size_t ith = 0; ith < nth; ++ith) {
      threads.emplace_back([&, ith] {
        for (std::size_t task = ith; task < num_tasks; task += nth) fn(task, ith);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

TEST(SameBits, BitsDoNotDependOnTheExecutor) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    const std::vector<Outputs> serial = outputs_with(prefill, SerialExecutor{});
    for (const std::size_t threads : {1U, 2U, 3U, 7U}) {
      EXPECT_EQ(outputs_with(prefill, IthOfNth{threads}), serial) << threads;
    }
    for (const int threads : {1, 3}) {
      Eigen::ThreadPool pool(threads);
      EXPECT_EQ(outputs_with(prefill, PoolExecutor(pool)), serial) << threads;
#ifdef _OPENMP
      EXPECT_EQ(outputs_with(prefill, OpenMpExecutor(threads)), serial) << threads;
#endif
    }
  }
}

TEST(SameBits, BitsOfHeadsThatAreCutDoNotDependOnTheExecutor) {
  // Long enough that a head's past is cut into splits, which the last thread to arrive merges.
  constexpr std::int64_t kPast = 3 * kSplitRows + 700;
  const ModelShape shape = ModelShape::uniform(1, 4, 2, 16);
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{4, kSplitRows + 100}});
  CacheOptions options = options_of(PrefillMode::kWindowed, 0);
  options.max_context = kPast + 10;
  Model model(shape, plan, options);
  const SequenceId a = model.add();
  const SequenceId b = model.add();
  model.add_tokens(a, new_tokens(kPast), Phase::kPrompt);
  model.add_tokens(b, new_tokens(kSplitRows + 1), Phase::kPrompt);
  const Chunks chunks{{a, new_tokens(2)}, {b, new_tokens(1)}};
  const auto attend_with = [&](auto&& executor) {
    EXPECT_EQ(model.begin(chunks, Phase::kDecode), StepStatus::kOk);
    const Outputs out = model.attend_layer(0, chunks, executor);
    EXPECT_EQ(model.cache.drop(model.step), StepStatus::kOk);
    return std::vector<Outputs>{out};
  };
  const std::vector<Outputs> serial = attend_with(SerialExecutor{});
  EXPECT_LE(largest_difference(serial, model.oracle(chunks, Phase::kDecode)), kBound);
  Eigen::ThreadPool pool(3);
  for (int round = 0; round < 20; ++round) {
    ASSERT_EQ(attend_with(IthOfNth{5}), serial);
    ASSERT_EQ(attend_with(PoolExecutor(pool)), serial);
#ifdef _OPENMP
    ASSERT_EQ(attend_with(OpenMpExecutor(4)), serial);
#endif
  }
}

TEST(SameBits, ASequencesBitsDoNotDependOnItsBatchMates) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    const std::vector<Token> prompt = new_tokens(90);
    const std::vector<Token> rest = new_tokens(30);
    const auto run = [&](bool with_others, bool first) {
      Model model = small_model(prefill);
      const SequenceId other = model.add();
      const SequenceId id = model.add();
      const SequenceId third = model.add();
      std::vector<Outputs> mine;
      const auto step = [&](std::vector<Token> tokens, Phase phase) {
        Chunks chunks{{id, tokens}};
        if (with_others) {
          const auto at = first ? chunks.end() : chunks.begin();
          chunks.insert(at, {other, new_tokens(static_cast<std::int64_t>(tokens.size()) + 3)});
          chunks.emplace_back(third, new_tokens(1));
        }
        const std::vector<Outputs> out = model.run(chunks, phase);
        for (std::size_t l = 0; l < out.size(); ++l) {
          std::int64_t row = 0;
          for (const StepChunk& chunk : model.step.chunks()) {
            if (chunk.sequence == id) row = chunk.first_row;
          }
          const auto width = static_cast<std::ptrdiff_t>(out[l].size()) / model.step.num_rows();
          const auto begin = out[l].begin() + row * width;
          mine.emplace_back(begin, begin + static_cast<std::ptrdiff_t>(tokens.size()) * width);
        }
      };
      step(prompt, Phase::kPrompt);
      for (const Token token : rest) step({token}, Phase::kDecode);
      return mine;
    };
    const auto alone = run(false, true);
    EXPECT_EQ(run(true, true), alone);
    EXPECT_EQ(run(true, false), alone);
  }
}

TEST(SameBits, AStepDroppedInMidLayerAndDoneAgainGivesTheSameBits) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    const std::vector<std::vector<Token>> steps = {new_tokens(40), new_tokens(1), new_tokens(70),
                                                   new_tokens(3), new_tokens(1)};
    Model calm = small_model(prefill);
    Model disturbed = small_model(prefill);
    const SequenceId id = calm.add();
    ASSERT_EQ(disturbed.add(), id);
    for (const std::vector<Token>& tokens : steps) {
      const Phase phase = tokens.size() < 5 ? Phase::kDecode : Phase::kPrompt;
      const std::vector<Outputs> expected = calm.run({{id, tokens}}, phase);

      // The first layer whole, of the second some tasks only; then something else, then nothing.
      const Chunks other{{id, new_tokens(static_cast<std::int64_t>(tokens.size()) + 9)}};
      ASSERT_EQ(disturbed.begin(other, Phase::kPrompt), StepStatus::kOk);
      (void)disturbed.attend_layer(0, other);
      auto in = disturbed.inputs_of(1, other);
      EXPECT_THROW((void)disturbed.attend_into(disturbed.step, 1, in, test::StopsAfter{1}),
                   test::Stopped);
      ASSERT_EQ(disturbed.cache.drop(disturbed.step), StepStatus::kOk);
      ASSERT_TRUE(disturbed.matches());

      EXPECT_EQ(disturbed.run({{id, tokens}}, phase), expected);
    }
  }
}

TEST(SameBits, AfterRollbackTheBitsAreThoseOfACacheThatNeverSawTheDetour) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    Model straight = small_model(prefill, 20);
    Model detoured = small_model(prefill, 20);
    const SequenceId id = straight.add();
    ASSERT_EQ(detoured.add(), id);
    for (int round = 0; round < 12; ++round) {
      const Chunks kept{{id, new_tokens(7 + 5 * (round % 4))}};
      EXPECT_EQ(detoured.run(kept, Phase::kPrompt), straight.run(kept, Phase::kPrompt)) << round;
      (void)detoured.run({{id, new_tokens(20)}}, round % 2 == 0 ? Phase::kPrompt : Phase::kDecode);
      ASSERT_EQ(detoured.rollback(id, straight.cache.length(id)), StepStatus::kOk);
      const Chunks decode{{id, new_tokens(1)}};
      EXPECT_EQ(detoured.run(decode, Phase::kDecode), straight.run(decode, Phase::kDecode))
          << round;
    }
  }
}

TEST(SameBits, AfterASnapshotTheBitsInACacheOfAnotherCapacityAreThoseOfTheOriginal) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    const ModelShape shape = test::two_layers(2, 32, 32);
    CacheOptions roomy = options_of(prefill, 20);
    roomy.max_context = 9000;
    roomy.max_sequences = 7;
    roomy.max_chunk = 100;
    Model stayed = small_model(prefill, 20);
    Model moved(shape, test::every_kind(shape, prefill), roomy);
    const SequenceId here = stayed.add();
    (void)moved.add();  // somebody has the first place
    for (const std::int64_t tokens : {0, 1, 15, 40, 90, 3, 64}) {
      (void)stayed.run({{here, new_tokens(tokens)}}, Phase::kPrompt);
      const SequenceId there =
          moved.restore(stayed.snapshot(here), stayed.sequences.at(here)).value();
      for (const Phase phase : {Phase::kDecode, Phase::kPrompt}) {
        const std::vector<Token> next = new_tokens(phase == Phase::kDecode ? 1 : 17);
        EXPECT_EQ(moved.run({{there, next}}, phase), stayed.run({{here, next}}, phase)) << tokens;
      }
      moved.release(there);
    }
  }
}

}  // namespace
}  // namespace headwise
