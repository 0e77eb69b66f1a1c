// SPDX-License-Identifier: MIT
// Promise: what a prompt begins with can be reused at stated lengths, long after windows have moved
// on; a checkpoint costs what its closed form says, and only the step that makes it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <variant>
#include <vector>

#include "headwise/cache/estimate.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "support/cache_model.hpp"

namespace headwise {
namespace {

using test::ModelledCache;
using test::new_tokens;
using Model = ModelledCache<f16>;

CacheOptions options_of(PrefillMode prefill, std::int64_t rollback, std::int64_t every) {
  CacheOptions options = test::mixed_options(prefill, rollback);
  options.max_context = 700;
  options.max_sequences = 4;
  options.checkpoint_tokens = every;
  return options;
}

/// Where checkpoints are after steps that began at these lengths.
std::vector<std::int64_t> expected_checkpoints(const std::vector<std::int64_t>& begins,
                                               std::int64_t every) {
  std::vector<std::int64_t> made;
  for (const std::int64_t at : begins) {
    if (at - (made.empty() ? 0 : made.back()) >= every) made.push_back(at);
  }
  return made;
}

/// Adds tokens in chunks; returns where each step began.
std::vector<std::int64_t> grow(Model& model, SequenceId id, std::int64_t to, std::int64_t chunk) {
  std::vector<std::int64_t> begins;
  while (model.cache.length(id) < to) {
    begins.push_back(model.cache.length(id));
    model.add_tokens(id, new_tokens(std::min(chunk, to - begins.back())), Phase::kPrompt);
  }
  return begins;
}

/// Pages of heads without rings that checkpoints hold and the sequence has given back, from the
/// published rules.
std::int64_t retained_pages(const HeadPlan& plan, const CacheOptions& options,
                            const std::vector<std::int64_t>& checkpoints, std::int64_t length) {
  const std::int64_t size = options.page_tokens;
  std::int64_t pages = 0;
  for (const HeadBudget& budget : plan.budgets()) {
    const auto* growing = std::get_if<KeepGrowingWindow>(&budget);
    const auto* late = std::get_if<KeepWindowFrom>(&budget);
    if (growing == nullptr && late == nullptr) continue;
    const std::int64_t sink = growing != nullptr ? growing->sink : late->keep.window.sink;
    // Whole pages behind the sinks that no length in reach of this one asks for.
    const auto released = [&](std::int64_t at, std::int64_t page) {
      const std::int64_t lowest = std::max<std::int64_t>(0, at - options.max_rollback);
      std::int64_t gone = 0;
      if (growing != nullptr) {
        gone = lowest - std::max(growing->min_recent, lowest / growing->divisor);
      } else if (lowest >= late->from) {
        gone = lowest - (std::max(late->keep.window.recent, late->keep.prompt_recent) - 1);
      }
      return page >= (sink + size - 1) / size && (page + 1) * size <= gone;
    };
    for (std::int64_t page = 0; page * size < length; ++page) {
      // Shared, not copied: below what rollback of the checkpoint may reach.
      const bool kept = std::any_of(checkpoints.begin(), checkpoints.end(), [&](std::int64_t at) {
        return (page + 1) * size <= at - options.max_rollback && !released(at, page);
      });
      if (released(length, page) && kept) ++pages;
    }
  }
  return pages;
}

TEST(KvCacheCheckpoint, HoldsTheClosedFormAtEveryLength) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const std::int64_t rollback : {0, 7, 33}) {
      for (const auto& [every, chunk] : {std::pair{64, 16}, {100, 7}, {30, 64}, {1, 90}}) {
        const CacheOptions options = options_of(prefill, rollback, every);
        Model model(test::mixed_shape(), test::mixed_plan(prefill), options);
        CacheOptions without = options;
        without.checkpoint_tokens = 0;
        Model plain(test::mixed_shape(), test::mixed_plan(prefill), without);
        const SequenceId id = model.add();
        const SequenceId other = plain.add();
        std::vector<std::int64_t> begins;
        while (model.cache.length(id) < 650) {
          begins.push_back(model.cache.length(id));
          const auto tokens = new_tokens(std::min<std::int64_t>(chunk, 650 - begins.back()));
          model.add_tokens(id, tokens, Phase::kPrompt);
          plain.add_tokens(other, tokens, Phase::kPrompt);
          const auto made = expected_checkpoints(begins, every);
          std::int64_t more = retained_pages(model.plan(), options, made, model.cache.length(id));
          for (const std::int64_t at : made) more += test::copied_pages(model.plan(), options, at);
          ASSERT_EQ(model.cache.pages_in_use(), plain.cache.pages_in_use() + more)
              << model.cache.length(id) << ", every " << every << ", rollback " << rollback;
          ASSERT_EQ(model.cache.held_bytes(id), plain.cache.held_bytes(other));
        }
        ASSERT_TRUE(model.matches());
        model.release(id);
        ASSERT_EQ(model.cache.pages_in_use(), 0);
      }
    }
  }
}

TEST(KvCacheCheckpoint, AForkBeginsAtEveryLengthThatReuseLimitNamesAndAtNoOther) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const std::int64_t rollback : {0, 5, 19}) {
      const CacheOptions options = options_of(prefill, rollback, 90);
      Model model(test::mixed_shape(), test::mixed_plan(prefill), options);
      const SequenceId id = model.add();
      const auto begins = grow(model, id, 500, 50);
      const auto made = expected_checkpoints(begins, 90);  // at 100, 200, 300, 400
      ASSERT_EQ(made, (std::vector<std::int64_t>{100, 200, 300, 400}));
      for (std::int64_t length = 0; length <= 500; ++length) {
        std::int64_t reach = 0;
        for (const std::int64_t at : {std::int64_t{100}, std::int64_t{200}, std::int64_t{300},
                                      std::int64_t{400}, std::int64_t{500}}) {
          if (length >= at - rollback && length <= at) reach = length;
          if (at <= length) reach = std::max(reach, at);
        }
        const ReuseLimit limit = model.cache.reuse_limit(id, length);
        ASSERT_EQ(limit.length, reach) << length;
        ASSERT_EQ(limit.why, reach == length ? ReuseEnd::kAsAsked : ReuseEnd::kRowsAreGone);
        const auto child =
            model.fork(id, length, reach == length ? StepStatus::kOk : StepStatus::kTooFarBack);
        ASSERT_EQ(child.has_value(), reach == length) << length;
        if (!child) continue;
        ASSERT_TRUE(model.matches()) << length;
        ASSERT_EQ(test::seen_by_next(model.cache, *child, Phase::kDecode),
                  model.never_seen(*child, Phase::kDecode));
        model.add_tokens(*child, new_tokens(40), Phase::kPrompt);
        ASSERT_TRUE(model.matches()) << length;
        model.release(*child);
      }
      ASSERT_EQ(model.cache.reuse_limit(id, 501), (ReuseLimit{500, ReuseEnd::kEndOfSequence}));
      ASSERT_EQ(model.cache.reuse_limit({}, 5), (ReuseLimit{0, ReuseEnd::kNoSequence}));
      (void)model.fork(id, 501, StepStatus::kTooFarBack);
      (void)model.fork(id, -1, StepStatus::kTooFarBack);
    }
  }
}

TEST(KvCacheCheckpoint, AForkFromOneRollsBackAsFarAsTheParentCouldThere) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    const CacheOptions options = options_of(prefill, 19, 100);
    Model model(test::mixed_shape(), test::mixed_plan(prefill), options);
    const SequenceId id = model.add();
    grow(model, id, 450, 25);
    for (const std::int64_t at : {100, 200, 300}) {
      const SequenceId child = model.fork(id, at, StepStatus::kOk).value();
      ASSERT_EQ(model.cache.max_truncate(child), 19);
      ASSERT_EQ(model.rollback(child, at - 20), StepStatus::kTooFarBack);
      ASSERT_EQ(model.rollback(child, at - 19), StepStatus::kOk);
      ASSERT_TRUE(model.matches());
      grow(model, child, at + 130, 30);
      ASSERT_TRUE(model.matches());
      // The child has checkpoints of its own from there on, and none of its parent's.
      ASSERT_EQ(model.cache.reuse_limit(child, at - 19).length, 0);
      ASSERT_EQ(model.cache.reuse_limit(child, at + 129).why, ReuseEnd::kAsAsked);
      model.release(child);
    }
    model.release(id);
    ASSERT_EQ(model.cache.pages_in_use(), 0);
  }
}

TEST(KvCacheCheckpoint, WhereEveryHeadKeepsEverythingAnyLengthIsOne) {
  const ModelShape shape = ModelShape::uniform(2, 2, 2, 16);
  for (const std::int64_t rollback : {0, 7, 40}) {
    Model model(shape, HeadPlan(shape), options_of(PrefillMode::kWindowed, rollback, 0));
    const SequenceId id = model.add();
    grow(model, id, 150, 150);
    for (std::int64_t length = 0; length <= 150; length += 1) {
      ASSERT_EQ(model.cache.reuse_limit(id, length), (ReuseLimit{length, ReuseEnd::kAsAsked}));
      const SequenceId child = model.fork(id, length, StepStatus::kOk).value();
      ASSERT_TRUE(model.matches()) << length;
      model.add_tokens(child, new_tokens(20), Phase::kDecode);
      model.add_tokens(id, new_tokens(1), Phase::kDecode);
      ASSERT_TRUE(model.matches()) << length;
      model.release(child);
    }
    model.release(id);
    ASSERT_EQ(model.cache.pages_in_use(), 0);
  }
}

TEST(KvCacheCheckpoint, BeforeAnyWindowIsFullAnyLengthIsOne) {
  Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kChunkCausal),
              options_of(PrefillMode::kChunkCausal, 3, 0));
  const SequenceId id = model.add();
  grow(model, id, 3, 3);  // {0, 1}, and 3 tokens that may be rolled back
  for (std::int64_t length = 0; length <= 3; ++length) {
    const SequenceId child = model.fork(id, length, StepStatus::kOk).value();
    model.add_tokens(child, new_tokens(100), Phase::kPrompt);
    ASSERT_TRUE(model.matches()) << length;
    model.release(child);
  }
  grow(model, id, 5, 5);
  EXPECT_EQ(model.cache.reuse_limit(id, 1), (ReuseLimit{0, ReuseEnd::kRowsAreGone}));
  EXPECT_EQ(model.cache.reuse_limit(id, 2), (ReuseLimit{2, ReuseEnd::kAsAsked}));
}

TEST(KvCacheCheckpoint, IsTheStepsOwnAllOrNothing) {
  const PrefillMode prefill = PrefillMode::kWindowed;
  CacheOptions options = options_of(prefill, 7, 100);
  Model roomy(test::mixed_shape(), test::mixed_plan(prefill), options);
  const SequenceId a = roomy.add();
  grow(roomy, a, 100, 100);
  const std::int64_t before = roomy.cache.pages_in_use();

  // A drop takes it back, with or without another begin; a commit keeps it.
  for (int i = 0; i < 3; ++i) {
    ASSERT_EQ(roomy.begin({{a, new_tokens(20)}}, Phase::kPrompt), StepStatus::kOk);
    ASSERT_GT(roomy.cache.pages_in_use(),
              before + test::copied_pages(roomy.plan(), options, 100) - 1);
    if (i == 1) continue;  // the next begin drops it
    ASSERT_EQ(roomy.cache.drop(roomy.step), StepStatus::kOk);
    ASSERT_EQ(roomy.cache.pages_in_use(), before);
  }
  ASSERT_EQ(roomy.begin({{a, {}}}, Phase::kPrompt), StepStatus::kOk);  // no tokens: none
  ASSERT_EQ(roomy.cache.pages_in_use(), before);
  ASSERT_EQ(roomy.cache.longest_chunk(a), 600);
  grow(roomy, a, 200, 20);
  ASSERT_EQ(roomy.cache.reuse_limit(a, 120), (ReuseLimit{100, ReuseEnd::kRowsAreGone}));

  // A pool that lacks the checkpoint's last page.
  bool began = false;
  for (std::size_t slabs = 1; !began; ++slabs) {
    options.max_bytes = slabs * roomy.cache.geometry().pool().slab_bytes();
    Model small(test::mixed_shape(), test::mixed_plan(prefill), options);
    const SequenceId id = small.add();
    if (small.cache.missing_bytes({{id, 100}}) != 0) continue;
    grow(small, id, 100, 100);
    const std::int64_t held = small.cache.pages_in_use();
    const bool lacks = small.cache.missing_bytes({{id, 1}}) != 0;
    const StepStatus status = small.begin({{id, new_tokens(1)}}, Phase::kDecode);
    ASSERT_EQ(status, lacks ? StepStatus::kOutOfPages : StepStatus::kOk) << slabs;
    began = status == StepStatus::kOk;
    if (began) continue;
    ASSERT_EQ(small.cache.longest_chunk(id), 0);
    ASSERT_EQ(small.cache.pages_in_use(), held);
    ASSERT_TRUE(small.matches());
    ASSERT_EQ(small.cache.reuse_limit(id, 50).length, 0);
  }
}

TEST(KvCacheCheckpoint, GoesWithARollbackBelowItWithAClearAndWithARelease) {
  const CacheOptions options = options_of(PrefillMode::kWindowed, 30, 100);
  Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed), options);
  const SequenceId id = model.add();
  grow(model, id, 220, 20);  // at 100 and 200
  ASSERT_EQ(model.rollback(id, 200), StepStatus::kOk);
  const std::int64_t with = model.cache.pages_in_use();
  ASSERT_EQ(model.rollback(id, 199), StepStatus::kOk);
  EXPECT_EQ(with - model.cache.pages_in_use(),
            test::copied_pages(model.plan(), options, 200) +
                retained_pages(model.plan(), options, {100, 200}, 220) -
                retained_pages(model.plan(), options, {100}, 220));
  ASSERT_TRUE(model.matches());
  EXPECT_EQ(model.cache.reuse_limit(id, 150).length, 100);
  // What is made next is of the new past.
  grow(model, id, 260, 20);
  const SequenceId child = model.fork(id, 219, StepStatus::kOk).value();
  ASSERT_TRUE(model.matches());
  ASSERT_EQ(model.clear(id), StepStatus::kOk);
  ASSERT_EQ(model.cache.reuse_limit(id, 0), (ReuseLimit{0, ReuseEnd::kAsAsked}));
  model.release(child);
  EXPECT_EQ(model.cache.pages_in_use(), 0);

  // A release in the middle of a step that made one.
  grow(model, id, 100, 100);
  for (const bool commits : {false, true}) {
    ASSERT_EQ(model.begin({{id, new_tokens(5)}}, Phase::kDecode), StepStatus::kOk);
    if (!commits) {
      ASSERT_EQ(model.cache.drop(model.step), StepStatus::kOk);
      continue;
    }
    model.release(id);
    model.append();
    ASSERT_EQ(model.commit(), StepStatus::kOk);
  }
  EXPECT_EQ(model.cache.pages_in_use(), 0);
}

TEST(KvCacheCheckpoint, APoolOfTheEstimateHoldsAllOfThem) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const std::int64_t rollback : {0, 19}) {
      CacheOptions options = options_of(prefill, rollback, 40);
      options.max_chunk = 50;
      const HeadPlan plan = test::mixed_plan(prefill);
      const Estimate estimate = headwise::estimate<f16>(test::mixed_shape(), plan, options);
      Model model(test::mixed_shape(), plan, options);
      EXPECT_EQ(estimate.metadata_bytes, model.cache.metadata_bytes());
      EXPECT_EQ(estimate.pool_bytes, model.cache.geometry().pool_bytes());
      std::vector<SequenceId> ids;
      for (int i = 0; i < options.max_sequences; ++i) ids.push_back(model.add());
      for (std::int64_t length = 0; length < 700; length += 10) {
        std::vector<std::pair<SequenceId, std::vector<test::Token>>> chunks;
        for (const SequenceId id : ids) chunks.push_back({id, new_tokens(10)});
        ASSERT_EQ(model.begin(chunks, Phase::kPrompt), StepStatus::kOk) << length;
        model.append();
        ASSERT_EQ(model.commit(), StepStatus::kOk);
      }
      ASSERT_TRUE(model.matches());
      for (const SequenceId id : ids) EXPECT_EQ(model.cache.reuse_limit(id, 659).length, 640);

      CacheOptions without = options;
      without.checkpoint_tokens = 0;
      const Estimate less = headwise::estimate<f16>(test::mixed_shape(), plan, without);
      EXPECT_EQ(less.checkpoint_bytes, 0U);
      EXPECT_EQ(less.resident_bytes, estimate.resident_bytes);
      EXPECT_EQ(less.transient_bytes, estimate.transient_bytes);
      EXPECT_GT(estimate.checkpoint_bytes, 0U);
    }
  }
}

// Selections -------------------------------------------------------------------------------------

TEST(KvCacheCheckpoint, OfBeforeASelectionKeepsEveryRowAndNoneIsMadeAfterwards) {
  for (const std::int64_t rollback : {0, 19}) {
    const CacheOptions options = options_of(PrefillMode::kWindowed, rollback, 64);
    Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed), options);
    const SequenceId id = model.add();
    (void)grow(model, id, 200, 32);  // checkpoints at 64, 128 and 192
    const auto keeps = [](int head, std::int64_t pos) { return pos % (head == 4 ? 3 : 7) == 0; };
    ASSERT_EQ(model.compact(id, model.selection(id, keeps)), StepStatus::kOk);
    ASSERT_TRUE(model.matches());
    EXPECT_EQ(model.cache.max_truncate(id), 0);
    EXPECT_EQ(model.cache.reuse_limit(id, 199), (ReuseLimit{192, ReuseEnd::kRowsAreGone}));
    EXPECT_EQ(model.cache.reuse_limit(id, 200), (ReuseLimit{200, ReuseEnd::kAsAsked}));

    // Each of them goes on with all rows, and so does what is forked from the selected sequence.
    for (const std::int64_t length : {64, 128, 192, 200}) {
      const SequenceId child = model.fork(id, length, StepStatus::kOk).value();
      ASSERT_TRUE(model.matches()) << length;
      model.add_tokens(child, new_tokens(40), Phase::kPrompt);
      ASSERT_TRUE(model.matches()) << length;
      model.release(child);
    }
    ASSERT_FALSE(model.fork(id, 199, StepStatus::kTooFarBack).has_value());

    // 400 tokens and a second selection later the checkpoints are the same.
    (void)grow(model, id, 600, 32);
    const auto keeps_more = [](int, std::int64_t pos) { return pos % 2 == 0; };
    ASSERT_EQ(model.compact(id, model.selection(id, keeps_more)), StepStatus::kOk);
    EXPECT_EQ(model.cache.reuse_limit(id, 599), (ReuseLimit{192, ReuseEnd::kRowsAreGone}));
    const SequenceId child = model.fork(id, 128, StepStatus::kOk).value();
    ASSERT_TRUE(model.matches());
    // A child that was not selected from makes its own again.
    (void)grow(model, child, 300, 64);
    EXPECT_EQ(model.cache.reuse_limit(child, 270).length, 256);
    ASSERT_TRUE(model.matches());
    model.release(child);
    model.release(id);
    EXPECT_EQ(model.cache.pages_in_use(), 0);
  }
}

TEST(KvCacheCheckpoint, APoolOfTheEstimateHoldsThemWhateverIsSelected) {
  for (const std::int64_t rollback : {0, 19}) {
    CacheOptions options = options_of(PrefillMode::kWindowed, rollback, 40);
    options.max_chunk = 50;
    Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed), options);
    std::vector<SequenceId> ids;
    for (int i = 0; i < options.max_sequences; ++i) ids.push_back(model.add());
    for (std::int64_t length = 10; length <= 700; length += 10) {
      std::vector<std::pair<SequenceId, std::vector<test::Token>>> chunks;
      for (const SequenceId id : ids) chunks.push_back({id, new_tokens(10)});
      ASSERT_EQ(model.begin(chunks, Phase::kPrompt), StepStatus::kOk) << length;
      model.append();
      ASSERT_EQ(model.commit(), StepStatus::kOk);
      // Every 100 tokens, from another length on in each sequence: all rows but one move.
      for (std::size_t i = 0; length % 100 == 0 && i < ids.size(); ++i) {
        if (length < 200 + 100 * static_cast<std::int64_t>(i)) continue;
        const auto keeps = [&](int, std::int64_t pos) { return pos != length - 1; };
        ASSERT_EQ(model.compact(ids[i], model.selection(ids[i], keeps)), StepStatus::kOk) << length;
      }
    }
    ASSERT_TRUE(model.matches());
  }
}

TEST(KvCacheCheckpoint, CostsOfAWindowDoNotGrowWithTheContext) {
  const ModelShape shape = ModelShape::uniform(1, 2, 2, 16);
  HeadPlan plan(shape);
  plan.set(0, 0, KeepWindow{{4, 12}});
  plan.set(0, 1, KeepWindow{{16, 48}});
  CacheOptions options = options_of(PrefillMode::kWindowed, 0, 200);
  options.max_context = 4000;
  options.max_chunk = 20;
  Model model(shape, plan, options);
  const SequenceId id = model.add();
  std::vector<std::int64_t> begins;
  for (std::int64_t length = 500; length <= 4000; length += 500) {
    for (const std::int64_t at : grow(model, id, length, 20)) begins.push_back(at);
    // Rings of 1 and 4 pages, once for the sequence and once for each checkpoint.
    const auto made = static_cast<std::int64_t>(expected_checkpoints(begins, 200).size());
    ASSERT_EQ(model.cache.pages_in_use(), 5 * (1 + made)) << length;
  }
}

TEST(KvCacheCheckpoint, OptionsThatCannotBeCountedAreRefused) {
  const ModelShape shape = ModelShape::uniform(1, 1, 1, 16);
  CacheOptions options = options_of(PrefillMode::kWindowed, 0, -1);
  EXPECT_THROW(KvCache<f16>(shape, HeadPlan(shape), options), ConfigError);
  options.checkpoint_tokens = 1;
  options.max_context = std::int64_t{1} << 30;
  EXPECT_THROW(KvCache<f16>(shape, HeadPlan(shape), options), ConfigError);
  options.checkpoint_tokens = 1000;  // the inverse answers whatever the options are
  EXPECT_GT(longest_context(shape, HeadPlan(shape), options, std::size_t{1} << 30), 0);
}

}  // namespace
}  // namespace headwise
