// SPDX-License-Identifier: MIT
#include "headwise/attention/tasks.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <vector>

#include "headwise/attention/attend.hpp"
#include "support/attend_instances.hpp"

namespace headwise {
namespace {

using Tasks = AttendTasks<simd::BestIsa, f16>;

/// One layer of unequal heads over two sequences, 5000 and 40 tokens long,
/// ready for a decode step.
class DecodeStep : public ::testing::Test {
 protected:
  static constexpr int kHeads = 4;
  static constexpr int kDim = 32;

  DecodeStep() {
    plan_.set(0, 1, KeepWindow{{4, 60}});
    plan_.set(0, 2, KeepWindow{{4, 3000}});
    cache_.emplace(shape_, plan_, CacheOptions{.max_sequences = 2, .max_context = 6000});
    for (std::size_t i = 0; i < 2; ++i) ids_.push_back(*cache_->add_sequence());
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    q_.resize(5040 * 2 * kHeads * kDim);
    k_.resize(5040 * kHeads * kDim);
    for (float& x : q_) x = normal(random);
    for (float& x : k_) x = normal(random);
    store({{ids_[0], 5000}, {ids_[1], 40}});
  }

  /// Appends rows without attending them: this is about what comes after.
  void store(std::initializer_list<SequenceChunk> chunks) {
    ASSERT_EQ(cache_->begin(step_, chunks), StepStatus::kOk);
    for (const StepChunk& chunk : step_.chunks()) {
      for (int head = 0; head < kHeads; ++head) {
        const TensorView<const float> rows{k().row(chunk.first_row, head), kHeads * kDim, kDim};
        cache_->append<simd::BestIsa>(step_, chunk, 0, head, rows, rows);
        step_.note_head_done(0);
      }
    }
    ASSERT_EQ(cache_->commit(step_), StepStatus::kOk);
  }

  TensorView<const float> q() const {
    return TensorView<const float>::nhd(q_.data(), 2 * kHeads, kDim);
  }
  TensorView<const float> k() const {
    return TensorView<const float>::nhd(k_.data(), kHeads, kDim);
  }

  static TensorView<float> rows(std::vector<float>& out) {
    return TensorView<float>::nhd(out.data(), 2 * kHeads, kDim);
  }
  Tasks tasks(std::vector<float>& out) const {
    return {*cache_, step_, 0, q(), k(), k(), rows(out), OwnRows::kStored, 0};
  }

  ModelShape shape_ = ModelShape::uniform(1, 2 * kHeads, kHeads, kDim);
  HeadPlan plan_{shape_};
  std::optional<KvCache<f16>> cache_;
  std::vector<SequenceId> ids_;
  Step step_;
  std::vector<float> q_, k_;
};

TEST_F(DecodeStep, CutsLongHeadsAndLeavesShortOnesWhole) {
  ASSERT_EQ(cache_->begin(step_, {{ids_[0], 1}, {ids_[1], 1}}), StepStatus::kOk);
  ASSERT_EQ(plan_work(*cache_, step_, 1), StepStatus::kOk);
  std::vector<float> out(2 * 2 * kHeads * kDim);
  // 5000 rows twice in 3 parts, 3003 in 2, 63 in 1; the short sequence's four
  // heads in one each.
  EXPECT_EQ(tasks(out).size(), 2U * 3 + 2 + 1 + 4);
}

TEST_F(DecodeStep, AnyOrderAndAnyThreadGivesTheSameBits) {
  const std::size_t size = 2 * 2 * kHeads * kDim;
  std::vector<float> expected;
  std::mt19937 random(3);
  for (int round = 0; round < 20; ++round) {
    ASSERT_EQ(cache_->begin(step_, {{ids_[0], 1}, {ids_[1], 1}}), StepStatus::kOk);
    ASSERT_EQ(plan_work(*cache_, step_, 3), StepStatus::kOk);
    std::vector<float> out(size, -1.0F);
    const Tasks cut = tasks(out);
    std::vector<std::size_t> order(cut.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    if (round > 0) std::shuffle(order.begin(), order.end(), random);
    for (const std::size_t task : order) cut.run(task, static_cast<std::size_t>(random() % 3));
    if (round == 0) expected = out;
    EXPECT_EQ(out, expected) << "round " << round;
    ASSERT_EQ(cache_->drop(step_),
              StepStatus::kOk);  // the next round sees the same past
  }
}

TEST_F(DecodeStep, ASequencesBitsDoNotDependOnItsBatch) {
  const std::size_t row = 2 * kHeads * kDim;
  std::vector<float> alone(row);
  std::vector<float> batched(2 * row);
  ASSERT_EQ(cache_->begin(step_, {{ids_[0], 1}}), StepStatus::kOk);
  ASSERT_EQ(attend(*cache_, step_, 0, q(), k(), k(), rows(alone)), StepStatus::kOk);
  ASSERT_EQ(cache_->drop(step_), StepStatus::kOk);
  ASSERT_EQ(cache_->begin(step_, {{ids_[0], 1}, {ids_[1], 1}}), StepStatus::kOk);
  ASSERT_EQ(attend(*cache_, step_, 0, q(), k(), k(), rows(batched)), StepStatus::kOk);
  EXPECT_TRUE(std::equal(alone.begin(), alone.end(), batched.begin()));
}

TEST_F(DecodeStep, CommitWaitsForEveryTask) {
  ASSERT_EQ(cache_->begin(step_, {{ids_[0], 1}}), StepStatus::kOk);
  ASSERT_EQ(plan_work(*cache_, step_, 1), StepStatus::kOk);
  std::vector<float> out(2 * kHeads * kDim);
  const Tasks cut = tasks(out);
  for (std::size_t task = 0; task + 1 < cut.size(); ++task) cut.run(task, 0);
  EXPECT_EQ(cache_->commit(step_), StepStatus::kIncomplete);
  cut.run(cut.size() - 1, 0);
  EXPECT_EQ(cache_->commit(step_), StepStatus::kOk);
  EXPECT_EQ(cache_->length(ids_[0]), 5001);
}

}  // namespace
}  // namespace headwise
