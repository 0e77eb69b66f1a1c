// SPDX-License-Identifier: MIT
// A cache of several formats: each class of heads has one, and is attended as in a cache of it
// alone.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "headwise/attention/attend.hpp"
#include "headwise/attention/cpu/prefill.hpp"
#include "headwise/attention/reference.hpp"
#include "headwise/cache/estimate.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/check.hpp"
#include "headwise/heads/plan.hpp"
#include "support/attention_cases.hpp"

namespace headwise {
namespace {

constexpr int kKvHeads = 4, kGroup = 2, kDim = 64;

ModelShape model() { return ModelShape::uniform(2, kKvHeads * kGroup, kKvHeads, kDim); }

/// Heads 1 of layer 0 and 0, 3 of layer 1 stream.
HeadPlan plan() {
  HeadPlan plan(model());
  for (const auto& [layer, head] : {std::pair{0, 1}, {1, 0}, {1, 3}}) {
    plan.set(layer, head, KeepWindow{{4, 60}});
  }
  return plan;
}
bool streams(int layer, int head) {
  return std::holds_alternative<KeepWindow>(plan().budget(layer, head));
}

CacheOptions options() { return {.max_sequences = 2, .max_context = 400, .max_rollback = 4}; }

/// Outputs [layer][token][qo head][dim] of a prompt in two chunks, a rollback, and decode steps.
template <class Rows>
std::vector<float> attended(const CacheOptions& options) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  KvCache<Rows> cache(model(), plan(), options);
  const SequenceId id = *cache.add_sequence();
  Step step;
  std::vector<float> all;
  for (const std::int64_t n : {150, 3, 1, -2, 1, 100, 2, 1}) {
    if (n < 0) {
      EXPECT_EQ(cache.rollback(id, cache.length(id) + n), StepStatus::kOk);
      continue;
    }
    EXPECT_EQ(cache.begin(step, {{id, n}}), StepStatus::kOk);
    for (int layer = 0; layer < 2; ++layer) {
      const auto floats = [&](int heads) {
        std::vector<float> x(static_cast<std::size_t>(n * heads * kDim));
        for (float& value : x) value = normal(random);
        return x;
      };
      const std::vector<float> q = floats(kKvHeads * kGroup), k = floats(kKvHeads),
                               v = floats(kKvHeads);
      std::vector<float> out(q.size());
      EXPECT_EQ(attend(cache, step, layer,
                       TensorView<const float>::nhd(q.data(), kKvHeads * kGroup, kDim),
                       TensorView<const float>::nhd(k.data(), kKvHeads, kDim),
                       TensorView<const float>::nhd(v.data(), kKvHeads, kDim),
                       TensorView<float>::nhd(out.data(), kKvHeads * kGroup, kDim)),
                StepStatus::kOk);
      for (std::size_t i = 0; i < out.size(); ++i) {  // marked by layer and KV head
        const auto head = static_cast<int>(i / kDim) % (kKvHeads * kGroup) / kGroup;
        all.push_back(static_cast<float>(layer * kKvHeads + head));
        all.push_back(out[i]);
      }
    }
    EXPECT_EQ(cache.commit(step), StepStatus::kOk);
  }
  return all;
}

TEST(CacheOfFormats, AttendsEachHeadAsACacheOfItsFormatWould) {
  using Mixed = Formats<Int4Rows, f16>;
  const std::vector<float> mixed = attended<Mixed>(options());
  const std::vector<float> int4 = attended<Int4Rows>(options());
  const std::vector<float> half = attended<f16>(options());
  ASSERT_EQ(mixed.size(), int4.size());
  std::size_t differ = 0;
  for (std::size_t i = 0; i < mixed.size(); i += 2) {
    const auto head = static_cast<int>(mixed[i]);
    const bool is_half = streams(head / kKvHeads, head % kKvHeads);
    ASSERT_EQ(mixed[i + 1], (is_half ? half : int4)[i + 1]) << "head " << head << ", float " << i;
    differ += half[i + 1] != int4[i + 1];
  }
  EXPECT_GT(differ, mixed.size() / 3);  // the two formats can be told apart
}

TEST(CacheOfFormats, LetsTheEngineSayWhichBudgetHasWhich) {
  CacheOptions swapped = options();
  swapped.format_of = [](const HeadBudget& budget) {
    return std::holds_alternative<KeepWindow>(budget) ? 2 : 1;
  };
  const auto mixed = attended<Formats<f32, f16, KvRows<Int8Rows, Int4Rows>>>(swapped);
  const auto half = attended<f16>(options());
  const auto apart = attended<KvRows<Int8Rows, Int4Rows>>(options());
  for (std::size_t i = 0; i < mixed.size(); i += 2) {
    const auto head = static_cast<int>(mixed[i]);
    ASSERT_EQ(mixed[i + 1], (streams(head / kKvHeads, head % kKvHeads) ? apart : half)[i + 1]);
  }
}

/// The same of a plan with heads that are selected from: after the prompt every third row of theirs
/// stays.
template <class Rows>
std::vector<float> attended_after_selection(const CacheOptions& options) {
  HeadPlan selecting(model());
  for (int head = 0; head < kKvHeads; ++head) {
    if (head % 2 == 1) selecting.set(1, head, KeepSelected{});
  }
  KvCache<Rows> cache(model(), selecting, options);
  const SequenceId id = *cache.add_sequence();
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  Step step;
  std::vector<float> last;
  for (const std::int64_t n : {100, 1}) {
    EXPECT_EQ(cache.begin(step, {{id, n}}), StepStatus::kOk);
    for (int layer = 0; layer < 2; ++layer) {
      std::vector<float> q(static_cast<std::size_t>(n) * kKvHeads * kGroup * kDim);
      for (float& value : q) value = normal(random);
      last.resize(q.size());
      EXPECT_EQ(attend(cache, step, layer,
                       TensorView<const float>::nhd(q.data(), kKvHeads * kGroup, kDim),
                       TensorView<const float>::nhd(q.data(), kKvHeads, kDim),
                       TensorView<const float>::nhd(q.data(), kKvHeads, kDim),
                       TensorView<float>::nhd(last.data(), kKvHeads * kGroup, kDim)),
                StepStatus::kOk);
    }
    EXPECT_EQ(cache.commit(step), StepStatus::kOk);
    if (n == 1) break;
    KeptPositions kept;
    for (int head = 0; head < 2 * kKvHeads; ++head) {
      std::vector<std::int32_t> rows;
      for (std::int32_t row = 1; head > kKvHeads && head % 2 == 1 && row < n; row += 3) {
        rows.push_back(row);
      }
      kept.add_head(rows);
    }
    EXPECT_EQ(cache.compact(id, kept), StepStatus::kOk);
  }
  return last;
}

TEST(CacheOfFormats, MovesSelectedRowsAsTheFormatThatTheyHave) {
  CacheOptions selected_are_half = options();
  selected_are_half.format_of = [](const HeadBudget& budget) {
    return std::holds_alternative<KeepSelected>(budget) ? 1 : 0;
  };
  const auto mixed = attended_after_selection<Formats<f32, f16>>(selected_are_half);
  const auto half = attended_after_selection<f16>(options());
  const auto full = attended_after_selection<f32>(options());
  ASSERT_EQ(mixed.size(), half.size());
  for (std::size_t i = 0; i < mixed.size(); ++i) {
    const std::size_t head = i / kDim / kGroup;
    ASSERT_EQ(mixed[i], (head % 2 == 1 ? half : full)[i]) << "head " << head << ", float " << i;
  }
}

TEST(CacheOfFormats, HoldsTheBytesOfEachFormat) {
  using Mixed = Formats<Int4Rows, f16>;
  const std::size_t int4 = Int4Rows::page_bytes({64, kDim, kDim});
  const std::size_t half = TiledRows<f16>::page_bytes({64, kDim, kDim});
  // 300 tokens: 5 pages of 5 retrieval heads, rings of 128 rows (4 + 60 + 4) of 3.
  EXPECT_EQ(sequence_bytes<Mixed>(model(), plan(), options(), 300), 5 * 5 * int4 + 3 * 2 * half);

  KvCache<Mixed> cache(model(), plan(), options());
  EXPECT_EQ(cache.geometry().classes().size(), 2U);
  const Estimate estimated = estimate<Mixed>(model(), plan(), options());
  EXPECT_EQ(estimated.metadata_bytes, cache.metadata_bytes());
  EXPECT_EQ(estimated.resident_bytes, 2 * (5 * 7 * int4 + 3 * 2 * half));
  // Pages of both sizes are to be had, and come back.
  const std::size_t free = cache.free_bytes();
  const SequenceId id = *cache.add_sequence();
  Step step;
  ASSERT_EQ(cache.begin(step, {{id, 300}}), StepStatus::kOk);
  EXPECT_LT(cache.free_bytes(), free);
  ASSERT_EQ(cache.drop(step), StepStatus::kOk);
  EXPECT_EQ(cache.free_bytes(), free);
}

TEST(CacheOfFormats, RefusesAFormatThatItDoesNotHave) {
  for (const int bad : {0, 1}) {
    CacheOptions wrong = options();
    wrong.format_of =
        bad == 0 ? [](const HeadBudget&) { return -1; } : [](const HeadBudget&) { return 2; };
    try {
      KvCache<Formats<Int8Rows, f16>> cache(model(), plan(), wrong);
      FAIL();
    } catch (const ConfigError& error) {
      EXPECT_NE(std::string(error.what()).find("format of a head must be in [0, 1]"),
                std::string::npos);
    }
  }
}

template <class Isa, class Format>
void expect_oracle_of_rotated() {
  for (const test::AttentionCase& c : test::attention_cases()) {
    if (c.k_dim > 128) continue;
    test::PagedHead<Format> head(c);
    const auto problem = head.problem();
    const std::vector<double> truth = reference_attention(problem);
    const std::int64_t rows = c.queries * c.group_size;
    test::AlignedFloats partial(decode_partial_floats(rows, c.v_dim));
    test::AlignedFloats scratch(std::max(decode_scratch_floats(rows, c.k_dim, c.v_dim),
                                         prefill_scratch_floats(c.group_size, c.k_dim, c.v_dim)));
    decode_split<Isa>(problem, {0, problem.past.num_rows(), true}, partial.data(), scratch.data());
    merge_splits<Isa>(problem, partial.data(), 0, 1);
    EXPECT_LE(test::relative_error(head.out(), truth), 1e-5) << c.name;
    const std::int64_t tile = prefill_tile_queries(c.group_size);
    for (std::int64_t begin = 0; begin < c.queries; begin += tile) {
      prefill_tile<Isa>(problem, begin, std::min(begin + tile, c.queries), scratch.data());
    }
    EXPECT_LE(test::relative_error(head.out(), truth), 1e-5) << c.name;
  }
}

TEST(RotatedRows, AreAttendedLikeTheOracleOverRowsTurnedBack) {
  expect_oracle_of_rotated<simd::BestIsa, RotatedRows<KvRows<Int8Rows, f16>>>();
  expect_oracle_of_rotated<simd::Scalar, RotatedRows<Int4Rows>>();
}

}  // namespace
}  // namespace headwise
