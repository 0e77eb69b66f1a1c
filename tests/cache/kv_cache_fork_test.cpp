// SPDX-License-Identifier: MIT
// Promise: a fork has its parent's past, shares the pages that nobody will write again, and from
// then on both go their own ways, bit for bit as if neither had the other.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "headwise/cache/kv_cache.hpp"
#include "support/boundary_lengths.hpp"
#include "support/cache_model.hpp"

namespace headwise {
namespace {

using test::ModelledCache;
using test::new_tokens;
using test::Token;
using Model = ModelledCache<f16>;

CacheOptions options_of(PrefillMode prefill, std::int64_t rollback, int sequences) {
  CacheOptions options = test::mixed_options(prefill, rollback);
  options.max_sequences = sequences;
  options.max_context = 700;
  return options;
}

TEST(KvCacheFork, CopiesRingsAndTailsAndSharesEverythingElse) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const std::int64_t rollback : {0, 7, 19}) {
      const CacheOptions options = options_of(prefill, rollback, 2);
      Model model(test::mixed_shape(), test::mixed_plan(prefill), options);
      for (const std::int64_t length : test::boundary_lengths(17, 30, 64, 16)) {
        const SequenceId id = model.add();
        model.add_tokens(id, new_tokens(length), Phase::kPrompt);
        const std::int64_t before = model.cache.pages_in_use();
        const SequenceId child = model.fork(id).value();
        ASSERT_EQ(model.cache.pages_in_use() - before,
                  test::copied_pages(model.plan(), options, length))
            << length << ", rollback " << rollback;
        ASSERT_EQ(model.cache.held_bytes(child), model.cache.held_bytes(id));  // shared, in full
        model.release(id);
        ASSERT_TRUE(model.matches());
        model.release(child);
        ASSERT_EQ(model.cache.pages_in_use(), 0);
      }
    }
  }
}

TEST(KvCacheFork, BothGoTheirOwnWaysFromEveryBoundaryLength) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const std::int64_t rollback : {0, 7, 33}) {
      Model model(test::mixed_shape(), test::mixed_plan(prefill), options_of(prefill, rollback, 2));
      for (const std::int64_t length : test::boundary_lengths(4, 29, 48, 16)) {
        const SequenceId parent = model.add();
        // In chunks, so that rings have changed banks.
        model.add_tokens(parent, new_tokens(length / 2), Phase::kPrompt);
        model.add_tokens(parent, new_tokens(length - length / 2), Phase::kPrompt);
        const SequenceId child = model.fork(parent).value();
        ASSERT_TRUE(model.matches());
        for (const std::int64_t tokens : {1, 3, 40}) {
          model.add_tokens(child, new_tokens(tokens), Phase::kPrompt);
          ASSERT_TRUE(model.matches()) << "forked at " << length;
          model.add_tokens(parent, new_tokens(tokens + 1), Phase::kDecode);
          ASSERT_TRUE(model.matches()) << "forked at " << length;
        }
        for (const SequenceId id : {parent, child}) {
          ASSERT_EQ(test::seen_by_next(model.cache, id, Phase::kDecode),
                    model.never_seen(id, Phase::kDecode));
        }
        model.release(length % 2 == 0 ? parent : child);
        ASSERT_TRUE(model.matches());
        model.release(length % 2 == 0 ? child : parent);
      }
    }
  }
}

TEST(KvCacheFork, BothRollBackAsFarAsTheParentCould) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const std::int64_t rollback : {1, 16, 33}) {
      Model model(test::mixed_shape(), test::mixed_plan(prefill), options_of(prefill, rollback, 2));
      for (std::int64_t length = rollback + 1; length < 150; length += 7) {
        const SequenceId parent = model.add();
        model.add_tokens(parent, new_tokens(length), Phase::kPrompt);
        // From the high water, also where the parent was rolled back before.
        ASSERT_EQ(model.rollback(parent, length - rollback / 2), StepStatus::kOk);
        const SequenceId child = model.fork(parent).value();
        ASSERT_EQ(model.cache.high_water(child), length);
        if (length - rollback > 1) {
          ASSERT_EQ(model.rollback(child, length - rollback - 1), StepStatus::kTooFarBack);
        }
        ASSERT_EQ(model.rollback(child, length - rollback), StepStatus::kOk);
        ASSERT_TRUE(model.matches());
        model.add_tokens(child, new_tokens(rollback + 2), Phase::kDecode);
        ASSERT_TRUE(model.matches());
        ASSERT_EQ(model.rollback(parent, length - rollback), StepStatus::kOk);
        model.add_tokens(parent, new_tokens(2), Phase::kPrompt);
        ASSERT_TRUE(model.matches());
        model.release(parent);
        model.release(child);
      }
    }
  }
}

TEST(KvCacheFork, AClearOrAReleaseOfOneLeavesTheOther) {
  for (const bool clears : {true, false}) {
    for (const bool of_parent : {true, false}) {
      Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kChunkCausal),
                  options_of(PrefillMode::kChunkCausal, 5, 3));
      const SequenceId parent = model.add();
      model.add_tokens(parent, new_tokens(200), Phase::kPrompt);
      const SequenceId child = model.fork(parent).value();
      const SequenceId gone = of_parent ? parent : child;
      if (clears) {
        ASSERT_EQ(model.clear(gone), StepStatus::kOk);
        model.add_tokens(gone, new_tokens(300), Phase::kPrompt);
      } else {
        model.release(gone);
        model.add_tokens(model.add(), new_tokens(300), Phase::kPrompt);  // takes what was freed
      }
      ASSERT_TRUE(model.matches());
    }
  }
}

/// A random walk of everything that sequences may do.
class Family {
 public:
  Family(PrefillMode prefill, std::int64_t rollback, unsigned seed)
      : model_(test::mixed_shape(), test::mixed_plan(prefill), options_of(prefill, rollback, 5)),
        rollback_(rollback),
        random_(seed) {}

  void walk(int steps) {
    for (int i = 0; i < steps; ++i) {
      const std::int64_t kind = model_.sequences.empty() ? 0 : below(16);
      if (kind == 0) {
        if (model_.sequences.size() < 5) (void)model_.add();
      } else if (kind < 5) {
        fork();
      } else if (kind == 5) {
        model_.release(any());
      } else if (kind == 6) {
        ASSERT_EQ(model_.clear(any()), StepStatus::kOk);
      } else if (kind < 9) {
        roll_back();
      } else {
        step();
      }
      ASSERT_TRUE(model_.matches()) << "after " << i << " (kind " << kind << ")";
      ASSERT_FALSE(::testing::Test::HasFailure());
    }
    EXPECT_GT(forks_, steps / 20);
    // In any order, all memory comes back.
    while (!model_.sequences.empty()) {
      const SequenceId id = any();
      for (const Phase phase : {Phase::kDecode, Phase::kPrompt}) {
        ASSERT_EQ(test::seen_by_next(model_.cache, id, phase), model_.never_seen(id, phase));
      }
      model_.release(id);
      ASSERT_TRUE(model_.matches());
    }
    EXPECT_EQ(model_.cache.pages_in_use(), 0);
  }

 private:
  std::int64_t below(std::int64_t n) {
    return static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(n));
  }
  SequenceId any() {
    return std::next(model_.sequences.begin(),
                     below(static_cast<std::int64_t>(model_.sequences.size())))
        ->first;
  }

  void fork() {
    if (model_.sequences.size() == 5) {
      (void)model_.fork(any(), StepStatus::kOutOfSequences);
    } else {
      (void)model_.fork(any());
      ++forks_;
    }
  }

  void roll_back() {
    const SequenceId id = any();
    const std::int64_t length = model_.cache.length(id);
    const std::int64_t low = std::max<std::int64_t>(0, model_.cache.high_water(id) - rollback_);
    const std::int64_t to = below(2) == 0 ? low : low + below(length - low + 1);
    ASSERT_EQ(model_.rollback(id, to), StepStatus::kOk);
  }

  void step() {
    std::vector<std::pair<SequenceId, std::vector<Token>>> chunks;
    const bool prompt = below(2) == 0;
    for (const auto& [id, sequence] : model_.sequences) {
      if (below(3) == 0) continue;
      const std::int64_t wanted = prompt ? below(70) : below(3) == 0 ? below(6) : 1;
      chunks.emplace_back(id, new_tokens(std::min(wanted, 500 - model_.cache.length(id))));
    }
    std::shuffle(chunks.begin(), chunks.end(), random_);
    std::vector<SequenceId> ids;
    for (const auto& chunk : chunks) ids.push_back(chunk.first);
    ASSERT_EQ(model_.begin(chunks, prompt ? Phase::kPrompt : Phase::kDecode), StepStatus::kOk);
    const bool leaves = !ids.empty() && below(8) == 0;
    if (leaves && below(2) == 0) model_.release(ids.front());
    if (below(4) == 0) {
      for (std::int64_t layer = below(4); layer < 3; ++layer) {
        model_.append_layer(static_cast<int>(layer));
      }
      ASSERT_EQ(model_.cache.drop(model_.step), StepStatus::kOk);
    } else {
      model_.append();
      if (leaves) model_.release(ids.back());
      ASSERT_EQ(model_.commit(), StepStatus::kOk);
    }
  }

  Model model_;
  std::int64_t rollback_;
  std::mt19937 random_;
  int forks_ = 0;
};

using WalkCase = std::tuple<PrefillMode, std::int64_t>;
class ForkedWalk : public ::testing::TestWithParam<WalkCase> {};

TEST_P(ForkedWalk, EqualsCachesThatNeverForked) {
  const auto [prefill, rollback] = GetParam();
  for (unsigned seed = 1; seed <= 2; ++seed) {
    ASSERT_NO_FATAL_FAILURE(Family(prefill, rollback, seed).walk(80));
  }
}

INSTANTIATE_TEST_SUITE_P(KvCacheFork, ForkedWalk,
                         ::testing::Combine(::testing::Values(PrefillMode::kWindowed,
                                                              PrefillMode::kChunkCausal),
                                            ::testing::Values(0, 1, 16, 33)),
                         [](const auto& param) {
                           return std::string(std::get<0>(param.param) == PrefillMode::kWindowed
                                                  ? "Windowed"
                                                  : "ChunkCausal") +
                                  "Back" + std::to_string(std::get<1>(param.param));
                         });

TEST(KvCacheFork, TakesAllItsPagesOrNone) {
  const ModelShape shape = ModelShape::uniform(2, 2, 2, 16);  // of one width: a slab is a page
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{4, 40}});
  plan.set(1, 0, KeepGrowingWindow{4, 40, 3});
  CacheOptions options = options_of(PrefillMode::kChunkCausal, 6, 2);
  Model roomy(shape, plan, options);
  const SequenceId id = roomy.add();
  roomy.add_tokens(id, new_tokens(130), Phase::kPrompt);
  const std::int64_t held = roomy.cache.pages_in_use();
  (void)roomy.fork(id);
  const std::int64_t taken = roomy.cache.pages_in_use() - held;
  ASSERT_GT(taken, 4);
  for (std::int64_t missing = taken; missing >= 0; --missing) {
    // While the prompt is written it needs pages that it gives back at once.
    const std::int64_t pages = held + taken - missing;
    options.max_bytes =
        static_cast<std::size_t>(pages) * roomy.cache.geometry().pool().page_bytes(0);
    Model model(shape, plan, options);
    const SequenceId parent = model.add();
    for (int i = 0; i < 130; ++i) model.add_tokens(parent, new_tokens(1), Phase::kDecode);
    ASSERT_EQ(model.cache.pages_in_use(), held);
    const auto before = test::seen_by_next(model.cache, parent, Phase::kDecode);
    const auto child = model.fork(parent, missing == 0 ? StepStatus::kOk : StepStatus::kOutOfPages);
    ASSERT_EQ(child.has_value(), missing == 0);
    ASSERT_EQ(model.cache.pages_in_use(), missing == 0 ? pages : held);
    ASSERT_EQ(test::seen_by_next(model.cache, parent, Phase::kDecode), before);
    ASSERT_TRUE(model.matches());
    if (!child) {
      EXPECT_TRUE(model.cache.add_sequence().has_value());  // its place is still free
    }
  }
}

TEST(KvCacheFork, AStepAfterItTakesNoMorePagesThanWithoutIt) {
  // Nothing is copied when it is written: whoever writes has pages of its own already.
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    const CacheOptions options = options_of(prefill, 9, 2);
    for (const std::int64_t length : {30, 64, 100, 250}) {
      for (const std::int64_t tokens : {1, 5, 60}) {
        Model alone(test::mixed_shape(), test::mixed_plan(prefill), options);
        const SequenceId only = alone.add();
        alone.add_tokens(only, new_tokens(length), Phase::kPrompt);
        const std::int64_t before = alone.cache.pages_in_use();
        ASSERT_EQ(alone.begin({{only, new_tokens(tokens)}}, Phase::kPrompt), StepStatus::kOk);
        const std::int64_t expected = alone.cache.pages_in_use() - before;

        Model model(test::mixed_shape(), test::mixed_plan(prefill), options);
        const SequenceId parent = model.add();
        model.add_tokens(parent, new_tokens(length), Phase::kPrompt);
        const SequenceId child = model.fork(parent).value();
        for (const SequenceId id : {child, parent}) {
          const std::int64_t forked = model.cache.pages_in_use();
          ASSERT_EQ(model.begin({{id, new_tokens(tokens)}}, Phase::kPrompt), StepStatus::kOk);
          EXPECT_EQ(model.cache.pages_in_use() - forked, expected);
          ASSERT_EQ(model.cache.drop(model.step), StepStatus::kOk);
        }
      }
    }
  }
}

TEST(KvCacheFork, AnEmptySequenceAndAForkOfAForkAreSequencesLikeAny) {
  Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed),
              options_of(PrefillMode::kWindowed, 4, 4));
  const SequenceId a = model.add();
  const SequenceId b = model.fork(a).value();
  EXPECT_EQ(model.cache.pages_in_use(), 0);
  model.add_tokens(b, new_tokens(90), Phase::kPrompt);
  const SequenceId c = model.fork(b).value();
  const SequenceId d = model.fork(c).value();
  EXPECT_FALSE(model.fork(d, StepStatus::kOutOfSequences).has_value());
  model.release(b);
  for (const SequenceId id : {a, c, d}) model.add_tokens(id, new_tokens(33), Phase::kPrompt);
  EXPECT_TRUE(model.matches());
}

}  // namespace
}  // namespace headwise
