// SPDX-License-Identifier: MIT
#include "headwise/attention/attend.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <unsupported/Eigen/CXX11/ThreadPool>
#include <utility>
#include <vector>

#include "headwise/core/executor.hpp"
#include "support/attended_cache.hpp"
#include "support/boundary_lengths.hpp"
#include "support/count_allocations.hpp"

namespace headwise {
namespace {

using test::AttendedCache;
using test::Chunks;
using test::new_tokens;
using test::Outputs;
using test::Token;

/// Values lie in [-1, 1); what float32 accumulation over some hundred rows may cost.
constexpr double kBound = 5e-6;

std::int64_t below(std::mt19937& random, std::int64_t n) {
  return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
}

CacheOptions options_of(PrefillMode prefill, std::int64_t rollback = 4) {
  CacheOptions options = test::mixed_options(prefill, rollback);
  options.max_context = 700;
  return options;
}

/// A layer with a head of every kind, and one without a retrieval head.
ModelShape two_layers(int group, int k_dim, int v_dim) {
  return ModelShape({{3, group, k_dim, v_dim}, {2, group, k_dim, v_dim}});
}
HeadPlan every_kind(const ModelShape& shape, PrefillMode prefill) {
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{4, 12}});
  plan.set(1, 0, KeepWindow{{3, 33}});
  plan.set(1, 1, KeepWindow{{0, 1}});
  plan.set(0, 2, KeepWindow{{17, 30}});
  if (prefill == PrefillMode::kChunkCausal) plan.set(0, 2, KeepGrowingWindow{4, 24, 3});
  return plan;
}

// Every format, width and group ------------------------------------------------------------------

template <class RowT, class LayoutT>
struct RowAndLayout {
  using Row = RowT;
  using Layout = LayoutT;
};
using RowsAndLayouts =
    ::testing::Types<RowAndLayout<f32, PlainLayout>, RowAndLayout<f32, TiledLayout>,
                     RowAndLayout<f16, PlainLayout>, RowAndLayout<f16, TiledLayout>,
                     RowAndLayout<bf16, PlainLayout>, RowAndLayout<bf16, TiledLayout>>;
struct RowAndLayoutNames {
  template <class T>
  static std::string GetName(int) {
    const std::string row = std::is_same_v<typename T::Row, f32>   ? "f32"
                            : std::is_same_v<typename T::Row, f16> ? "f16"
                                                                   : "bf16";
    return row + (std::is_same_v<typename T::Layout, PlainLayout> ? "_plain" : "_tiled");
  }
};

template <class Types>
class AttendOn : public ::testing::Test {};
TYPED_TEST_SUITE(AttendOn, RowsAndLayouts, RowAndLayoutNames);

TYPED_TEST(AttendOn, EqualsTheOracleForEveryGroupAndWidth) {
  const struct Widths {
    int group, k_dim, v_dim;
  } shapes[] = {{1, 32, 32},   {2, 64, 64},  {4, 80, 80}, {5, 96, 96},
                {7, 128, 128}, {8, 256, 16}, {3, 48, 112}};
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const Widths& widths : shapes) {
      const ModelShape shape = two_layers(widths.group, widths.k_dim, widths.v_dim);
      AttendedCache<typename TypeParam::Row, typename TypeParam::Layout> model(
          shape, every_kind(shape, prefill), options_of(prefill));
      const SequenceId a = model.add();
      const SequenceId b = model.add();
      const auto check = [&](const Chunks& chunks, Phase phase) {
        ASSERT_NO_FATAL_FAILURE(model.run_and_check(chunks, phase, kBound))
            << "group " << widths.group << ", K " << widths.k_dim << ", V " << widths.v_dim;
      };
      check({{a, new_tokens(21)}}, Phase::kPrompt);
      check({{b, new_tokens(1)}, {a, new_tokens(30)}}, Phase::kPrompt);
      check({{a, new_tokens(1)}, {b, new_tokens(1)}}, Phase::kDecode);
      check({{a, new_tokens(3)}, {b, {}}}, Phase::kDecode);
      check({{b, new_tokens(17)}, {a, new_tokens(1)}}, Phase::kPrompt);
      ASSERT_TRUE(model.matches());
    }
  }
}

// From here on the row format does not matter.
using Model = AttendedCache<f16, TiledLayout>;

Model small_model(PrefillMode prefill, std::int64_t rollback = 4) {
  const ModelShape shape = two_layers(2, 32, 32);
  return {shape, every_kind(shape, prefill), options_of(prefill, rollback)};
}

TEST(Attend, EveryRowOfPromptsOfBoundaryLengthsEqualsTheOracle) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    Model model = small_model(prefill);
    for (const std::int64_t length : test::boundary_lengths(4, 12, 32, 16)) {
      if (length > 260) continue;
      const SequenceId id = model.add();
      ASSERT_NO_FATAL_FAILURE(
          model.run_and_check({{id, new_tokens(length)}}, Phase::kPrompt, kBound));
      ASSERT_NO_FATAL_FAILURE(model.run_and_check({{id, new_tokens(1)}}, Phase::kDecode, kBound));
      ASSERT_NO_FATAL_FAILURE(model.run_and_check({{id, new_tokens(5)}}, Phase::kDecode, kBound));
      ASSERT_NO_FATAL_FAILURE(model.run_and_check({{id, new_tokens(40)}}, Phase::kPrompt, kBound));
      model.release(id);
    }
  }
}

TEST(Attend, EveryTokenOfALongDecodeEqualsTheOracle) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    Model model = small_model(prefill);
    const SequenceId id = model.add();
    for (int i = 0; i < 130; ++i) {
      ASSERT_NO_FATAL_FAILURE(model.run_and_check({{id, new_tokens(1)}}, Phase::kDecode, kBound));
    }
  }
}

TEST(Attend, RandomChunksInBothModesEqualTheOracle) {
  std::mt19937 random(29);
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const std::int64_t largest : {5, 20, 60, 110}) {
      Model model = small_model(prefill);
      const SequenceId a = model.add();
      const SequenceId b = model.add();
      const SequenceId c = model.add();
      while (model.cache.length(a) < 160 && !HasFatalFailure()) {
        Chunks chunks;
        for (const SequenceId id : {c, a, b}) {
          if (random() % 3 != 0) chunks.emplace_back(id, new_tokens(below(random, largest)));
        }
        if (model.cache.length(b) + model.cache.length(c) > 500) break;
        const Phase phase = random() % 3 == 0 ? Phase::kDecode : Phase::kPrompt;
        ASSERT_NO_FATAL_FAILURE(model.run_and_check(chunks, phase, kBound));
      }
      ASSERT_TRUE(model.matches());
    }
  }
}

TEST(Attend, TakesTensorsOfAnyStrides) {
  // Heads first, and rows that are wider than they need be: the same bits as dense tokens first.
  Model dense = small_model(PrefillMode::kWindowed);
  Model strided = small_model(PrefillMode::kWindowed);
  const SequenceId id = dense.add();
  ASSERT_EQ(strided.add(), id);
  for (const std::int64_t n : {50, 1, 3}) {
    const Chunks chunks{{id, new_tokens(n)}};
    const std::vector<Outputs> expected = dense.run(chunks, Phase::kPrompt);
    ASSERT_EQ(strided.begin(chunks, Phase::kPrompt), StepStatus::kOk);
    for (int l = 0; l < 2; ++l) {
      const int kv_heads = l == 0 ? 3 : 2;
      const auto in = strided.inputs_of(l, chunks);
      constexpr std::int64_t kStride = 40;  // rows of 32
      const auto heads_first = [&](const std::vector<float>& x, std::int64_t heads) {
        std::vector<float> y(static_cast<std::size_t>(n * heads * kStride), -9.0F);
        for (std::int64_t row = 0; row < n * heads; ++row) {
          const std::int64_t to = (row % heads) * n * kStride + row / heads * kStride;
          std::copy_n(x.begin() + row * 32, 32, y.begin() + to);
        }
        return y;
      };
      const std::vector<float> q = heads_first(in.q, 2 * kv_heads);
      const std::vector<float> k = heads_first(in.k, kv_heads);
      const std::vector<float> v = heads_first(in.v, kv_heads);
      std::vector<float> out(q.size(), -9.0F);
      attend(strided.cache, strided.step, l, {q.data(), kStride, n * kStride},
             {k.data(), kStride, n * kStride}, {v.data(), kStride, n * kStride},
             TensorView<float>{out.data(), kStride, n * kStride});
      EXPECT_EQ(out, heads_first(expected[static_cast<std::size_t>(l)], 2 * kv_heads));
    }
    ASSERT_EQ(strided.commit(), StepStatus::kOk);
  }
}

TEST(Attend, ScalesScoresAsTheLayerSays) {
  const ModelShape shape({{2, 3, 32, 32, 0.4F}});
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{4, 12}});
  Model model(shape, plan, options_of(PrefillMode::kWindowed));
  const SequenceId id = model.add();
  for (const std::int64_t n : {40, 1, 4}) {
    ASSERT_NO_FATAL_FAILURE(model.run_and_check({{id, new_tokens(n)}}, Phase::kPrompt, kBound));
  }
}

// Chunkings --------------------------------------------------------------------------------------

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

template <class Expected>
double largest_difference(const std::vector<Outputs>& a, const std::vector<Expected>& b) {
  double worst = 0.0;
  for (std::size_t l = 0; l < a.size(); ++l) {
    if (a[l].size() != b[l].size()) return std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < a[l].size(); ++i) {
      const double error = std::fabs(static_cast<double>(a[l][i]) - static_cast<double>(b[l][i]));
      if (!(error <= worst)) worst = error;  // NaN sticks out
      if (std::isnan(error)) return std::numeric_limits<double>::infinity();
    }
  }
  return worst;
}

TEST(Attend, AllChunkingsOfTwelveTokensEqualTheOracleOfTheWholePrompt) {
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

TEST(Attend, RandomChunkingsOfALongPromptEqualTheOracleOfTheWholePrompt) {
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

TEST(Attend, PrefillAndDecodeOfTheSameTokensAgree) {
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

TEST(Attend, AWholePromptInOneCausalChunkIsDenseForEveryHead) {
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

// Causality and independence ---------------------------------------------------------------------

TEST(Attend, ChangingATokenChangesNothingBeforeIt) {
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

TEST(Attend, BitsDoNotDependOnTheExecutor) {
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

TEST(Attend, BitsOfHeadsThatAreCutDoNotDependOnTheExecutor) {
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

TEST(Attend, ASequencesBitsDoNotDependOnItsBatchMates) {
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
          for (const StepEntry& entry : model.step.entries()) {
            if (entry.sequence == id) row = entry.first_row;
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

// Dropped steps and rollback ---------------------------------------------------------------------

TEST(Attend, AStepDroppedInMidLayerAndDoneAgainGivesTheSameBits) {
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
      const AttendTasks<simd::BestIsa, f16, TiledLayout> tasks(
          disturbed.cache, disturbed.step, 1, TensorView<const float>::nhd(in.q.data(), 4, 32),
          TensorView<const float>::nhd(in.k.data(), 2, 32),
          TensorView<const float>::nhd(in.v.data(), 2, 32),
          TensorView<float>::nhd(in.out.data(), 4, 32));
      disturbed.step.scratch().reserve(tasks.scratch_bytes(1), tasks.num_counters());
      for (std::size_t task = 0; task < tasks.size() / 2 + 1; ++task) tasks.run(task, 0);
      ASSERT_EQ(disturbed.cache.drop(disturbed.step), StepStatus::kOk);
      ASSERT_TRUE(disturbed.matches());

      EXPECT_EQ(disturbed.run({{id, tokens}}, phase), expected);
    }
  }
}

TEST(Attend, AfterRollbackTheBitsAreThoseOfACacheThatNeverSawTheDetour) {
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

// Compensation -----------------------------------------------------------------------------------

TEST(Attend, FoldingIdenticalRowsLosesNothing) {
  // RazorAttention: where all dropped keys are alike, the compensation row stands for them exactly.
  const ModelShape shape = ModelShape::uniform(1, 4, 2, 32);
  HeadPlan plan(shape);
  plan.set(0, 1, KeepGrowingWindow{4, 20, 4});
  KvCache<f16> cache(shape, plan, options_of(PrefillMode::kChunkCausal));
  const SequenceId id = cache.add_sequence().value();
  Step step;
  std::mt19937 random(37);
  std::normal_distribution<float> normal;
  std::vector<float> k(150 * 2 * 32);
  std::vector<float> v(150 * 2 * 32);
  std::vector<float> q(150 * 4 * 32);
  for (float& x : q) x = 2.0F * normal(random);
  for (std::size_t i = 0; i < k.size(); ++i) {
    const bool middle = i / 64 >= 4 && i / 64 < 125;  // all that will be folded, and more
    k[i] = middle ? k[i % 64] : normal(random);
    v[i] = middle ? v[i % 64] : normal(random);
    if (i % 64 >= 32) {  // both heads alike
      k[i] = k[i - 32];
      v[i] = v[i - 32];
    }
  }
  for (std::size_t i = 0; i < q.size(); ++i) {
    if (i % 128 >= 64) q[i] = q[i - 64];
  }
  std::vector<float> out(q.size());
  const auto run = [&](std::int64_t first, std::int64_t count) {
    ASSERT_EQ(cache.begin(step, {{id, count}}, Phase::kPrompt), StepStatus::kOk);
    attend(cache, step, 0, TensorView<const float>::nhd(q.data() + first * 128, 4, 32),
           TensorView<const float>::nhd(k.data() + first * 64, 2, 32),
           TensorView<const float>::nhd(v.data() + first * 64, 2, 32),
           TensorView<float>::nhd(out.data() + first * 128, 4, 32));
    ASSERT_EQ(cache.commit(step), StepStatus::kOk);
  };
  run(0, 130);
  for (std::int64_t i = 130; i < 150; ++i) run(i, 1);
  EXPECT_GT(test::seen_by_next(cache, id, Phase::kDecode)[1].folded, 80);
  for (std::size_t i = 130 * 128; i < out.size(); ++i) {
    if (i % 128 < 64) {
      ASSERT_NEAR(out[i], out[i + 64], 1e-5) << i;
    }
  }
}

// Hot path ---------------------------------------------------------------------------------------

TEST(Attend, AllocatesNothingOnceScratchIsReserved) {
  Model model = small_model(PrefillMode::kChunkCausal);
  const SequenceId a = model.add();
  const SequenceId b = model.add();
  reserve_scratch(model.step, model.cache, 200, 1);
  model.add_tokens(a, new_tokens(1), Phase::kPrompt);
  std::vector<float> q(400 * 6 * 32, 0.25F);
  std::vector<float> out(400 * 6 * 32);
  bool all_ok = true;
  const auto run = [&](std::initializer_list<SequenceChunk> chunks, Phase phase) {
    all_ok &= model.cache.begin(model.step, chunks, phase) == StepStatus::kOk;
    for (int l = 0; l < 2; ++l) {
      const int heads = l == 0 ? 3 : 2;
      const auto kv = TensorView<const float>::nhd(q.data(), heads, 32);
      attend(model.cache, model.step, l, TensorView<const float>::nhd(q.data(), 2 * heads, 32), kv,
             kv, TensorView<float>::nhd(out.data(), 2 * heads, 32));
    }
    all_ok &= model.cache.commit(model.step) == StepStatus::kOk;
  };
  EXPECT_EQ(test::allocations_in([&] {
              run({{a, 200}, {b, 100}}, Phase::kPrompt);
              for (int i = 0; i < 40; ++i) run({{b, 1}, {a, 1}}, Phase::kDecode);
              run({{b, 60}}, Phase::kPrompt);
              run({{a, 4}, {b, 7}}, Phase::kDecode);
            }),
            0U);
  EXPECT_TRUE(all_ok);
}

}  // namespace
}  // namespace headwise
