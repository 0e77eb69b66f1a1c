// SPDX-License-Identifier: MIT
#include "headwise/attention/tasks.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "headwise/attention/attend.hpp"

namespace headwise {
namespace {

using Tasks = AttendTasks<simd::BestIsa, f16>;

TEST(HeadCut, DependsOnTheSequenceAlone) {
  EXPECT_EQ(HeadCut::of(0, 4, 100).num_parts, 0) << "no new tokens, no tasks";
  EXPECT_EQ(HeadCut::of(1, 4, 0).num_parts, 1) << "an empty past still has the token itself";
  EXPECT_EQ(HeadCut::of(1, 4, kSplitRows).num_parts, 1);
  EXPECT_EQ(HeadCut::of(1, 4, kSplitRows + 1).num_parts, 2);
  EXPECT_TRUE(HeadCut::of(kMaxDecodeRows / 4, 4, 10).splits_past);
  EXPECT_FALSE(HeadCut::of(kMaxDecodeRows / 4 + 1, 4, 10).splits_past);
  const std::int64_t tile = prefill_tile_queries(4);
  EXPECT_EQ(HeadCut::of(3 * tile + 1, 4, 1 << 20).num_parts, 4) << "tiles of queries, any past";
}

/// One layer of unequal heads over two sequences, 5000 and 40 tokens long, ready for a decode step.
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
    ASSERT_EQ(cache_->begin(step_, chunks, Phase::kPrompt), StepStatus::kOk);
    for (const StepEntry& entry : step_.entries()) {
      for (int head = 0; head < kHeads; ++head) {
        const TensorView<const float> rows{k().row(entry.first_row, head), kHeads * kDim, kDim};
        cache_->append<simd::BestIsa>(entry, 0, head, rows, rows);
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

  ModelShape shape_ = ModelShape::uniform(1, 2 * kHeads, kHeads, kDim);
  HeadPlan plan_{shape_};
  std::optional<KvCache<f16>> cache_;
  std::vector<SequenceId> ids_;
  Step step_;
  std::vector<float> q_, k_;
};

TEST_F(DecodeStep, CutsLongHeadsAndLeavesShortOnesWhole) {
  ASSERT_EQ(cache_->begin(step_, {{ids_[0], 1}, {ids_[1], 1}}, Phase::kDecode), StepStatus::kOk);
  std::vector<float> out(2 * 2 * kHeads * kDim);
  const Tasks tasks(*cache_, step_, 0, q(), k(), k(),
                    TensorView<float>::nhd(out.data(), 2 * kHeads, kDim));
  // 5000 rows twice in 3 parts, 3003 in 2, 63 in 1; the short sequence's four heads in one each.
  EXPECT_EQ(tasks.size(), 2U * 3 + 2 + 1 + 4);
}

TEST_F(DecodeStep, AnyOrderAndAnyThreadGivesTheSameBits) {
  const std::size_t size = 2 * 2 * kHeads * kDim;
  std::vector<float> expected;
  std::mt19937 random(3);
  for (int round = 0; round < 20; ++round) {
    ASSERT_EQ(cache_->begin(step_, {{ids_[0], 1}, {ids_[1], 1}}, Phase::kDecode), StepStatus::kOk);
    std::vector<float> out(size, -1.0F);
    const Tasks tasks(*cache_, step_, 0, q(), k(), k(),
                      TensorView<float>::nhd(out.data(), 2 * kHeads, kDim));
    step_.scratch().reserve(tasks.scratch_bytes(3), tasks.num_counters());
    std::vector<std::size_t> order(tasks.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    if (round > 0) std::shuffle(order.begin(), order.end(), random);
    for (const std::size_t task : order) tasks.run(task, static_cast<std::size_t>(random() % 3));
    if (round == 0) expected = out;
    EXPECT_EQ(out, expected) << "round " << round;
    ASSERT_EQ(cache_->drop(step_), StepStatus::kOk);  // the next round sees the same past
  }
}

TEST_F(DecodeStep, ASequencesBitsDoNotDependOnItsBatch) {
  const std::size_t row = 2 * kHeads * kDim;
  std::vector<float> alone(row);
  std::vector<float> batched(2 * row);
  ASSERT_EQ(cache_->begin(step_, {{ids_[0], 1}}, Phase::kDecode), StepStatus::kOk);
  attend(*cache_, step_, 0, q(), k(), k(), TensorView<float>::nhd(alone.data(), 2 * kHeads, kDim));
  ASSERT_EQ(cache_->drop(step_), StepStatus::kOk);
  ASSERT_EQ(cache_->begin(step_, {{ids_[0], 1}, {ids_[1], 1}}, Phase::kDecode), StepStatus::kOk);
  attend(*cache_, step_, 0, q(), k(), k(),
         TensorView<float>::nhd(batched.data(), 2 * kHeads, kDim));
  EXPECT_TRUE(std::equal(alone.begin(), alone.end(), batched.begin()));
}

TEST_F(DecodeStep, CommitWaitsForEveryTask) {
  ASSERT_EQ(cache_->begin(step_, {{ids_[0], 1}}, Phase::kDecode), StepStatus::kOk);
  std::vector<float> out(2 * kHeads * kDim);
  const Tasks tasks(*cache_, step_, 0, q(), k(), k(),
                    TensorView<float>::nhd(out.data(), 2 * kHeads, kDim));
  step_.scratch().reserve(tasks.scratch_bytes(1), tasks.num_counters());
  for (std::size_t task = 0; task + 1 < tasks.size(); ++task) tasks.run(task, 0);
  EXPECT_EQ(cache_->commit(step_), StepStatus::kIncomplete);
  tasks.run(tasks.size() - 1, 0);
  EXPECT_EQ(cache_->commit(step_), StepStatus::kOk);
  EXPECT_EQ(cache_->length(ids_[0]), 5001);
}

}  // namespace
}  // namespace headwise
