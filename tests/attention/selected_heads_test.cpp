// SPDX-License-Identifier: MIT
// Promise: attention over selected heads is dense attention over the rows that were kept, whatever
// each head kept, beside heads of every other kind.
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "headwise/attention/attend.hpp"
#include "support/attend_models.hpp"
#include "support/attended_cache.hpp"
#include "support/isa_types.hpp"

namespace headwise {
namespace {

using test::AttendedCache;
using test::below;
using test::kBound;
using test::new_tokens;

/// Heads of every kind, some selected from in each layer.
HeadPlan plan_of(const ModelShape& shape, PrefillMode prefill) {
  HeadPlan plan(shape);
  plan.set(0, 1, KeepSelected{});
  plan.set(0, 2,
           prefill == PrefillMode::kChunkCausal ? HeadBudget{KeepGrowingWindow{4, 24, 3}}
                                                : HeadBudget{KeepWindow{{4, 12}}});
  plan.set(0, 3, KeepSelected{40});
  plan.set(1, 0, KeepSelected{});
  return plan;
}

ModelShape shape_of(int group) { return ModelShape({{4, group, 32, 48}, {2, group, 32, 16}}); }

template <class Rows>
class SelectedHeadsOf : public ::testing::Test {};
TYPED_TEST_SUITE(SelectedHeadsOf, test::AllFormats, test::FormatNames);

TYPED_TEST(SelectedHeadsOf, AttendTheRowsThatWereKept) {
  std::mt19937 random(19);
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    const ModelShape shape = shape_of(2);
    CacheOptions options = test::options_of(prefill);
    AttendedCache<TypeParam> model(shape, plan_of(shape, prefill), options);
    const SequenceId first = model.add();
    const SequenceId second = model.add();
    for (int round = 0; round < 5; ++round) {
      // Unequal chunks in one step, of prompts and of decode.
      model.run_and_check(
          {{first, new_tokens(1 + below(random, 90))}, {second, new_tokens(1 + below(random, 17))}},
          Phase::kPrompt, kBound);
      for (const SequenceId id : {first, second}) {
        if (round == 2 && id == second) continue;
        const auto kept = model.selection(
            id, [&](int head, std::int64_t) { return below(random, 6) < (head == 1 ? 1 : 4); });
        ASSERT_EQ(model.compact(id, kept), StepStatus::kOk);
      }
      model.run_and_check({{second, new_tokens(1)}, {first, new_tokens(1)}}, Phase::kDecode,
                          kBound);
      model.run_and_check({{first, new_tokens(3)}}, Phase::kDecode, kBound);
      ASSERT_TRUE(model.matches());
    }
  }
}

TEST(SelectedHeads, OfVeryUnequalLengthsAreCutForTheLongest) {
  // Three splits for a head of 5000 rows, of which the others fill one, or none.
  const ModelShape shape({{3, 2, 16, 16}});
  HeadPlan plan(shape);
  for (int h = 0; h < 3; ++h) plan.set(0, h, KeepSelected{});
  CacheOptions options{.page_tokens = 64, .max_context = 8000};
  AttendedCache<f16> model(shape, plan, options);
  const SequenceId id = model.add();
  model.add_tokens(id, new_tokens(7000), Phase::kPrompt);
  const auto kept = model.selection(id, [](int head, std::int64_t pos) {
    return head == 0 ? pos % 7 < 5 : head == 1 && pos % 70 == 3;
  });
  ASSERT_EQ(kept.of_head(0).size(), 5000U);
  ASSERT_EQ(kept.of_head(1).size(), 100U);
  ASSERT_EQ(kept.of_head(2).size(), 0U);
  ASSERT_EQ(model.compact(id, kept), StepStatus::kOk);
  model.run_and_check({{id, new_tokens(1)}}, Phase::kDecode, kBound);
  model.run_and_check({{id, new_tokens(7)}}, Phase::kDecode, kBound);
  model.run_and_check({{id, new_tokens(150)}}, Phase::kPrompt, kBound);
}

TEST(SelectedHeads, DroppedRowsContributeNothingWhateverTheyAre) {
  const ModelShape shape({{1, 1, 16, 16}});
  HeadPlan plan(shape);
  plan.set(0, 0, KeepSelected{});
  constexpr std::int64_t kLength = 100;
  const auto kept_at = [](std::int64_t pos) { return pos % 3 == 0 && pos > 30; };
  for (const float hidden :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    KvCache<f32> cache(shape, plan, {.page_tokens = 16, .max_context = 200});
    KvCache<f32> clean(shape, HeadPlan(shape), {.page_tokens = 16, .max_context = 200});
    std::vector<float> rows(kLength * 16);
    std::vector<float> good;
    std::vector<std::int32_t> positions;
    for (std::int64_t pos = 0; pos < kLength; ++pos) {
      for (std::int64_t d = 0; d < 16; ++d) {
        float& x = rows[static_cast<std::size_t>(pos * 16 + d)];
        x = kept_at(pos) ? std::sin(static_cast<float>(pos * 16 + d)) : hidden;
        if (kept_at(pos)) good.push_back(x);
      }
      if (kept_at(pos)) positions.push_back(static_cast<std::int32_t>(pos));
    }
    Step step;
    const auto attend_rows = [&](auto& of, SequenceId id, const std::vector<float>& k) {
      const auto n = static_cast<std::int64_t>(k.size() / 16);
      std::vector<float> out(k.size());
      const auto view = TensorView<const float>::nhd(k.data(), 1, 16);
      EXPECT_EQ(of.begin(step, {{id, n}}), StepStatus::kOk);
      EXPECT_EQ(attend(of, step, 0, view, view, view, TensorView<float>::nhd(out.data(), 1, 16)),
                StepStatus::kOk);
      EXPECT_EQ(of.commit(step), StepStatus::kOk);
      return out;
    };
    const SequenceId id = cache.add_sequence().value();
    const SequenceId other = clean.add_sequence().value();
    (void)attend_rows(cache, id, rows);
    (void)attend_rows(clean, other, good);
    KeptPositions kept;
    kept.add_head(positions);
    ASSERT_EQ(cache.compact(id, kept), StepStatus::kOk);
    const std::vector<float> next(16, 0.5F);
    const std::vector<float> out = attend_rows(cache, id, next);
    const std::vector<float> expected = attend_rows(clean, other, next);
    for (std::size_t d = 0; d < out.size(); ++d) EXPECT_NEAR(out[d], expected[d], 1e-6);
  }
}

}  // namespace
}  // namespace headwise
