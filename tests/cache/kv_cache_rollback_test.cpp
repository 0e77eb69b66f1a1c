// SPDX-License-Identifier: MIT
// Promise: rollback is exact and all-or-nothing, across ring wraps and folds; a dropped step leaves
// no trace, a stale one is refused, a step without pages takes none.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "headwise/cache/kv_cache.hpp"
#include "support/cache_model.hpp"

namespace headwise {
namespace {

using test::ModelledCache;
using test::new_tokens;
using test::Token;
using Model = ModelledCache<f16>;

/// Everything that a step or a rollback might have left behind.
template <class Rows>
struct Trace {
  explicit Trace(const ModelledCache<Rows>& model) : free_pages(model.cache.free_pages()) {
    for (const auto& [id, sequence] : model.sequences) {
      lengths.push_back(model.cache.length(id));
      lengths.push_back(model.cache.high_water(id));
      lengths.push_back(model.cache.pages_held(id));
      for (const Phase phase : {Phase::kPrompt, Phase::kDecode}) {
        auto copies = test::seen_by_next(model.cache, id, phase);
        std::move(copies.begin(), copies.end(), std::back_inserter(seen));
      }
    }
  }
  std::int64_t free_pages;
  std::vector<std::int64_t> lengths;
  std::vector<test::SeenCopy> seen;
  friend bool operator==(const Trace&, const Trace&) = default;
};

// Walks ------------------------------------------------------------------------------------------

using WalkCase = std::tuple<PrefillMode, std::int64_t>;
class RandomWalk : public ::testing::TestWithParam<WalkCase> {};

template <class Rows>
class Walker {
 public:
  Walker(PrefillMode prefill, std::int64_t rollback, unsigned seed)
      : model_(test::mixed_shape(), test::mixed_plan(prefill),
               test::mixed_options(prefill, rollback)),
        rollback_(rollback),
        random_(seed) {
    for (int i = 0; i < 3; ++i) (void)model_.add();
  }

  void take_steps(int count) {
    for (int i = 0; i < count; ++i) {
      const std::int64_t kind = below(12);
      if (kind < 6) {
        step(/*commit=*/true);
      } else if (kind < 8) {
        step(/*commit=*/false);
      } else if (kind < 10) {
        roll_back();
      } else if (kind == 10) {
        refuse_rollback();
      } else if (below(4) == 0) {
        const SequenceId id = any();
        model_.release(id);
        (void)model_.add();
      }
      ASSERT_TRUE(model_.matches()) << "after " << i << " (kind " << kind << ")";
      ASSERT_FALSE(::testing::Test::HasFatalFailure());
    }
  }

 private:
  std::int64_t below(std::int64_t n) {
    return static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(n));
  }
  SequenceId any() { return std::next(model_.sequences.begin(), below(3))->first; }
  std::int64_t lowest(SequenceId id) const {
    return std::max<std::int64_t>(0, model_.cache.high_water(id) - rollback_);
  }

  void step(bool commit) {
    std::vector<SequenceId> ids;
    for (const auto& [id, sequence] : model_.sequences) ids.push_back(id);
    std::shuffle(ids.begin(), ids.end(), random_);
    std::vector<std::pair<SequenceId, std::vector<Token>>> chunks;
    const bool prompt = below(2) == 0;
    for (const SequenceId id : ids) {
      if (below(3) == 0) continue;
      const std::int64_t wanted = prompt ? below(70) : below(3) == 0 ? below(6) : 1;
      chunks.emplace_back(id, new_tokens(std::min(wanted, 400 - model_.cache.length(id))));
    }
    const Trace before(model_);
    ASSERT_EQ(model_.begin(chunks, prompt ? Phase::kPrompt : Phase::kDecode), StepStatus::kOk);
    if (commit) {
      model_.append();
      ASSERT_EQ(model_.commit(), StepStatus::kOk);
      ASSERT_EQ(model_.commit(), StepStatus::kStale);
      return;
    }
    const std::int64_t layers = below(4);
    for (int layer = 0; layer < layers; ++layer) model_.append_layer(layer);
    ASSERT_EQ(model_.cache.drop(model_.step), StepStatus::kOk);
    ASSERT_EQ(Trace(model_), before);
  }

  void roll_back() {
    const SequenceId id = any();
    const std::int64_t length = model_.cache.length(id);
    const std::int64_t low = lowest(id);
    // Often as far as it goes: that is where the slack ends.
    const std::int64_t to = below(3) == 0 ? low : low + below(length - low + 1);
    ASSERT_EQ(model_.rollback(id, to), StepStatus::kOk);
    for (const Phase phase : {Phase::kPrompt, Phase::kDecode}) {
      ASSERT_EQ(test::seen_by_next(model_.cache, id, phase), model_.never_seen(id, phase))
          << "rolled back from " << length << " to " << to;
    }
  }

  void refuse_rollback() {
    const SequenceId id = any();
    const Trace before(model_);
    ASSERT_EQ(model_.rollback(id, lowest(id) - 1 - below(5)), StepStatus::kTooFarBack);
    ASSERT_EQ(model_.rollback(id, model_.cache.length(id) + 1), StepStatus::kTooFarBack);
    ASSERT_EQ(Trace(model_), before);
  }

  ModelledCache<Rows> model_;
  std::int64_t rollback_;
  std::mt19937 random_;
};

TEST_P(RandomWalk, EndsWhereACacheThatNeverSawTheDetourWouldBe) {
  const auto [prefill, rollback] = GetParam();
  for (unsigned seed = 1; seed <= 3; ++seed) {
    ASSERT_NO_FATAL_FAILURE((Walker<TiledRows<f16>>(prefill, rollback, seed).take_steps(50)));
  }
  ASSERT_NO_FATAL_FAILURE((Walker<PlainRows<f32>>(prefill, rollback, 9).take_steps(30)));
}

INSTANTIATE_TEST_SUITE_P(KvCache, RandomWalk,
                         ::testing::Combine(::testing::Values(PrefillMode::kWindowed,
                                                              PrefillMode::kChunkCausal),
                                            ::testing::Values(0, 1, 7, 16, 19, 33)),
                         [](const auto& param) {
                           return std::string(std::get<0>(param.param) == PrefillMode::kWindowed
                                                  ? "Windowed"
                                                  : "ChunkCausal") +
                                  "Back" + std::to_string(std::get<1>(param.param));
                         });

// Single cases -----------------------------------------------------------------------------------

TEST(KvCache, RollsBackAcrossAWrapAtEveryLengthAndDepth) {
  const ModelShape shape = ModelShape::uniform(1, 1, 1, 16);
  for (const Window window : {Window{4, 12}, Window{0, 16}, Window{3, 10}}) {
    for (const std::int64_t rollback : {1, 3, 16}) {
      Model model(shape, HeadPlan(shape, KeepWindow{window}),
                  test::mixed_options(PrefillMode::kWindowed, rollback));
      for (std::int64_t length = rollback; length < 70; ++length) {
        for (std::int64_t back = 0; back <= rollback; back += std::max<std::int64_t>(1, back)) {
          const SequenceId id = model.add();
          model.add_tokens(id, new_tokens(length), Phase::kPrompt);
          ASSERT_EQ(model.rollback(id, length - back), StepStatus::kOk);
          ASSERT_TRUE(model.matches());
          model.add_tokens(id, new_tokens(back + 2), Phase::kDecode);
          ASSERT_TRUE(model.matches());
          model.release(id);
        }
      }
    }
  }
}

TEST(KvCache, RollsBackAcrossFoldsAtEveryLength) {
  const ModelShape shape = ModelShape::uniform(1, 1, 1, 16);
  for (const std::int64_t rollback : {1, 16, 35}) {
    Model model(shape, HeadPlan(shape, KeepGrowingWindow{4, 36, 3}),
                test::mixed_options(PrefillMode::kChunkCausal, rollback));
    const SequenceId id = model.add();
    bool crossed = false;
    for (std::int64_t length = 1; length < 220; length += 3) {
      model.add_tokens(id, new_tokens(length - model.cache.length(id)), Phase::kDecode);
      const std::int64_t folded = test::seen_by_next(model.cache, id, Phase::kDecode)[0].folded;
      ASSERT_EQ(model.rollback(id, std::max<std::int64_t>(0, length - rollback)), StepStatus::kOk);
      ASSERT_TRUE(model.matches());
      ASSERT_EQ(test::seen_by_next(model.cache, id, Phase::kDecode),
                model.never_seen(id, Phase::kDecode));
      crossed |= test::seen_by_next(model.cache, id, Phase::kDecode)[0].folded < folded;
    }
    EXPECT_TRUE(crossed);
  }
}

TEST(KvCache, RefusesToRollBackFurtherInAnyLayer) {
  Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed),
              test::mixed_options(PrefillMode::kWindowed, 5));
  const SequenceId id = model.add();
  model.add_tokens(id, new_tokens(100), Phase::kPrompt);
  ASSERT_EQ(model.rollback(id, 97), StepStatus::kOk);
  const Trace before(model);
  for (const std::int64_t to : {94, 50, 0, -1, 98, 100, 101}) {
    EXPECT_EQ(model.rollback(id, to), StepStatus::kTooFarBack) << to;
    EXPECT_EQ(Trace(model), before);
  }
  EXPECT_EQ(model.rollback(id, 95), StepStatus::kOk);  // below the high water of 100, not of 97
  EXPECT_TRUE(model.matches());
}

TEST(KvCache, ADroppedStepLeavesNoTraceAndMayBeDoneAgain) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    Model model(test::mixed_shape(), test::mixed_plan(prefill), test::mixed_options(prefill, 6));
    const SequenceId a = model.add();
    const SequenceId b = model.add();
    for (const std::int64_t chunk : {9, 1, 50, 2, 1, 120, 1}) {
      // Every layer, the first only, or none appended; other tokens each time.
      for (const int layers : {3, 1, 0}) {
        const Trace before(model);
        ASSERT_EQ(model.begin({{b, new_tokens(chunk)}, {a, new_tokens(1)}}, Phase::kPrompt),
                  StepStatus::kOk);
        for (int layer = 0; layer < layers; ++layer) model.append_layer(layer);
        ASSERT_EQ(model.cache.drop(model.step), StepStatus::kOk);
        ASSERT_EQ(Trace(model), before) << "chunk " << chunk << ", layers " << layers;
        ASSERT_EQ(model.commit(), StepStatus::kStale);
        ASSERT_EQ(Trace(model), before);
      }
      ASSERT_EQ(model.begin({{b, new_tokens(chunk)}, {a, new_tokens(1)}}, Phase::kPrompt),
                StepStatus::kOk);
      model.append();
      ASSERT_EQ(model.commit(), StepStatus::kOk);
      ASSERT_TRUE(model.matches());
    }
  }
}

TEST(KvCache, AnIncompleteStepIsRefusedAndMayBeCompleted) {
  Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed),
              test::mixed_options(PrefillMode::kWindowed, 6));
  const SequenceId id = model.add();
  ASSERT_EQ(model.begin({{id, new_tokens(30)}}, Phase::kPrompt), StepStatus::kOk);
  for (int layer = 0; layer < 3; ++layer) {
    EXPECT_EQ(model.commit(), StepStatus::kIncomplete);
    EXPECT_EQ(model.cache.length(id), 0);
    model.append_layer(layer);
  }
  EXPECT_EQ(model.commit(), StepStatus::kOk);
  EXPECT_TRUE(model.matches());
}

TEST(KvCache, AStaleStepChangesNothing) {
  Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed),
              test::mixed_options(PrefillMode::kWindowed, 6));
  const SequenceId a = model.add();
  const SequenceId b = model.add();
  model.add_tokens(a, new_tokens(45), Phase::kPrompt);
  model.add_tokens(b, new_tokens(20), Phase::kPrompt);

  const auto open = [&] {
    ASSERT_EQ(model.begin({{a, new_tokens(60)}, {b, new_tokens(1)}}, Phase::kPrompt),
              StepStatus::kOk);
    model.append();
  };
  open();
  ASSERT_EQ(model.commit(), StepStatus::kOk);
  Trace before(model);
  EXPECT_EQ(model.cache.commit(model.step), StepStatus::kStale);  // twice
  EXPECT_EQ(Trace(model), before);

  open();
  {
    Step other;
    ASSERT_EQ(model.cache.begin(other, {{b, 3}}, Phase::kDecode), StepStatus::kOk);
    EXPECT_EQ(model.cache.commit(model.step), StepStatus::kStale);  // superseded
    ASSERT_EQ(model.cache.drop(other), StepStatus::kOk);
  }
  EXPECT_EQ(Trace(model), before);

  open();
  ASSERT_EQ(model.rollback(b, 21 - 2), StepStatus::kOk);
  before = Trace(model);
  EXPECT_EQ(model.cache.commit(model.step), StepStatus::kStale);  // a member was rolled back
  EXPECT_EQ(Trace(model), before);
  EXPECT_TRUE(model.matches());

  open();
  model.release(a);
  before = Trace(model);
  EXPECT_EQ(model.cache.commit(model.step), StepStatus::kStale);  // a member is gone
  EXPECT_EQ(Trace(model), before);
  const SequenceId again = model.add();
  EXPECT_EQ(again, a);
  EXPECT_EQ(model.cache.commit(model.step), StepStatus::kStale);  // also under its old name
  EXPECT_EQ(model.cache.length(again), 0);
  EXPECT_TRUE(model.matches());
}

TEST(KvCache, AStepThatLacksItsLastPageTakesNone) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    const CacheOptions options = test::mixed_options(prefill, 6);
    const HeadPlan plan = test::mixed_plan(prefill);
    Model roomy(test::mixed_shape(), plan, options);
    const std::int64_t lengths[] = {30, 61};
    const auto fill = [&](Model& model) {
      for (const std::int64_t length : lengths) {
        model.add_tokens(model.add(), new_tokens(length), Phase::kPrompt);
      }
    };
    fill(roomy);
    const std::int64_t before_step = roomy.cache.free_pages();
    ASSERT_EQ(roomy.begin({{SequenceId{0}, new_tokens(90)}, {SequenceId{1}, new_tokens(9)}},
                          Phase::kPrompt),
              StepStatus::kOk);
    const std::int64_t held = roomy.cache.geometry().num_pages() - before_step;
    const std::int64_t taken = before_step - roomy.cache.free_pages();
    ASSERT_GT(taken, 8);
    for (std::int64_t missing = 1; missing <= taken; ++missing) {
      CacheOptions tight = options;
      tight.max_bytes =
          static_cast<std::size_t>(held + taken - missing) * roomy.cache.geometry().page_bytes();
      Model model(test::mixed_shape(), plan, tight);
      fill(model);
      const Trace before(model);
      ASSERT_EQ(model.begin({{SequenceId{0}, new_tokens(90)}, {SequenceId{1}, new_tokens(9)}},
                            Phase::kPrompt),
                StepStatus::kOutOfPages);
      ASSERT_EQ(Trace(model), before);
      ASSERT_TRUE(model.matches());
      // A smaller step goes on; both sequences are free for it.
      if (missing < taken) {
        ASSERT_EQ(model.begin({{SequenceId{1}, new_tokens(1)}}, Phase::kDecode), StepStatus::kOk);
      }
    }
  }
}

TEST(KvCache, EmptyChunksChangeNothing) {
  Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed),
              test::mixed_options(PrefillMode::kWindowed, 6));
  const SequenceId a = model.add();
  const SequenceId b = model.add();
  for (int round = 0; round < 3; ++round) {
    const Trace before(model);
    ASSERT_EQ(model.begin({{a, {}}, {b, {}}}, Phase::kPrompt), StepStatus::kOk);
    ASSERT_EQ(model.commit(), StepStatus::kOk);
    ASSERT_EQ(model.begin({}, Phase::kDecode), StepStatus::kOk);
    ASSERT_EQ(model.commit(), StepStatus::kOk);
    ASSERT_EQ(Trace(model), before);
    ASSERT_EQ(model.begin({{a, {}}, {b, new_tokens(40)}}, Phase::kPrompt), StepStatus::kOk);
    model.append();
    ASSERT_EQ(model.commit(), StepStatus::kOk);
    ASSERT_TRUE(model.matches());
  }
}

}  // namespace
}  // namespace headwise
