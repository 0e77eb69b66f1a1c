// SPDX-License-Identifier: MIT
// What a layer answers that is attended out of turn: again after an executor threw, twice, by too
// many threads, unplanned, in a step that is not open. And layers that share K and V.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <thread>
#include <unsupported/Eigen/CXX11/ThreadPool>
#include <utility>
#include <vector>

#include "headwise/attention/attend.hpp"
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
using test::Stopped;
using test::StopsAfter;

/// Two layers of unlike heads, and sequences long enough that heads are split: 3 + 1 parts in each.
/// In the second step heads are cut into tiles of queries.
struct LongModel {
  static constexpr std::int64_t kPast = 2 * kSplitRows + 300;
  ModelShape shape = ModelShape::uniform(2, 8, 2, 16);
  HeadPlan plan{shape};
  std::optional<Model> model;
  SequenceId id{};

  explicit LongModel(PrefillMode prefill = PrefillMode::kWindowed) {
    plan.set(0, 1, KeepWindow{{4, 60}});
    if (prefill == PrefillMode::kChunkCausal) plan.set(1, 0, KeepGrowingWindow{4, 30, 4});
    CacheOptions options = options_of(prefill);
    options.max_context = kPast + 1000;
    model.emplace(shape, plan, options);
    id = model->add();
    model->add_tokens(id, new_tokens(kPast), Phase::kPrompt);
  }
};

/// Runs tasks from the last to the first on a pool's threads and gives up after so many.
struct StopsBackwards {
  std::size_t num_tasks;
  static constexpr std::size_t num_threads() { return 1; }
  template <class Fn>
  void for_each(std::size_t count, Fn&& fn) {
    for (std::size_t i = 0; i < count; ++i) {
      if (i == num_tasks) throw Stopped{};
      fn(count - 1 - i, std::size_t{0});
    }
  }
};

TEST(AttendAgain, AfterAnExecutorThrewALayerAndThoseAfterItAreRight) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const std::int64_t tokens : {1, 4, 40, 120}) {
      LongModel disturbed(prefill);
      Model& model = *disturbed.model;
      const Chunks chunks{{disturbed.id, new_tokens(tokens)}};
      const auto expected = model.oracle(chunks, Phase::kPrompt);
      for (std::size_t stop = 0; stop < 7; ++stop) {
        ASSERT_EQ(model.begin(chunks, Phase::kPrompt), StepStatus::kOk);
        std::vector<Outputs> out;
        for (int l = 0; l < 2; ++l) {
          auto in = model.inputs_of(l, chunks);
          for (const bool backwards : {false, true, false}) {
            try {
              (void)(backwards ? model.attend_into(model.step, l, in, StopsBackwards{stop})
                               : model.attend_into(model.step, l, in, StopsAfter{stop}));
              // Fewer tasks than that: the layer is done.
              EXPECT_EQ(model.attend_into(model.step, l, in), StepStatus::kAttended);
              break;
            } catch (const Stopped&) {
              EXPECT_EQ(model.cache.commit(model.step), StepStatus::kIncomplete);
            }
          }
          if (!model.cache.is_attended(model.step, l)) {
            std::fill(in.out.begin(), in.out.end(), -7.0F);
            ASSERT_EQ(model.attend_into(model.step, l, in), StepStatus::kOk);
          }
          out.push_back(std::move(in.out));
        }
        ASSERT_LE(largest_difference(out, expected), kBound) << tokens << " tokens, stop " << stop;
        if (stop < 6) {
          ASSERT_EQ(model.cache.drop(model.step), StepStatus::kOk);
        }
      }
      ASSERT_EQ(model.commit(), StepStatus::kOk);
      ASSERT_TRUE(model.matches()) << "the rows are stored as if nothing had happened";
      ASSERT_NO_FATAL_FAILURE(
          model.run_and_check({{disturbed.id, new_tokens(1)}}, Phase::kDecode, kBound));
    }
  }
}

TEST(AttendAgain, ALayerOfWhichAFewSharesWereAttendedIsRightOncePlannedAgain) {
  LongModel it;
  Model& model = *it.model;
  const Chunks chunks{{it.id, new_tokens(3)}};
  const auto expected = model.oracle(chunks, Phase::kDecode);
  ASSERT_EQ(model.begin(chunks, Phase::kDecode), StepStatus::kOk);
  ASSERT_EQ(plan_work(model.cache, model.step, 3), StepStatus::kOk);
  std::vector<Outputs> out;
  for (int l = 0; l < 2; ++l) {
    auto in = model.inputs_of(l, chunks);
    const auto share = [&](std::size_t ith, std::size_t nth) {
      return model.with_tensors(l, in, [&](auto... tensors) {
        return attend_share(model.cache, model.step, l, tensors..., ith, nth);
      });
    };
    EXPECT_EQ(share(0, 3), StepStatus::kOk);
    EXPECT_EQ(share(2, 3), StepStatus::kOk);  // and the thread of share 1 is gone
    ASSERT_EQ(plan_work(model.cache, model.step, 2), StepStatus::kOk);
    std::fill(in.out.begin(), in.out.end(), -7.0F);
    EXPECT_EQ(share(0, 2), StepStatus::kOk);
    EXPECT_EQ(model.cache.commit(model.step), StepStatus::kIncomplete);
    EXPECT_EQ(share(1, 2), StepStatus::kOk);
    EXPECT_TRUE(model.cache.is_attended(model.step, l));
    ASSERT_EQ(plan_work(model.cache, model.step, 3), StepStatus::kOk) << "keeps what is done";
    EXPECT_TRUE(model.cache.is_attended(model.step, l));
    out.push_back(std::move(in.out));
  }
  EXPECT_LE(largest_difference(out, expected), kBound);
  EXPECT_EQ(model.commit(), StepStatus::kOk);
  EXPECT_TRUE(model.matches());
}

TEST(AttendAgain, ALayerThatWasAttendedIsRefusedAndNothingIsWritten) {
  for (const std::int64_t tokens : {1, 60}) {
    LongModel it;
    Model& model = *it.model;
    const Chunks chunks{{it.id, new_tokens(tokens)}, {model.add(), {}}};
    ASSERT_EQ(model.begin(chunks, Phase::kPrompt), StepStatus::kOk);
    (void)model.attend_layer(0, chunks);
    auto wrong = model.inputs_of(1, chunks);  // of another layer
    const Outputs untouched = wrong.out;
    EXPECT_EQ(model.attend_into(model.step, 0, wrong), StepStatus::kAttended);
    ASSERT_EQ(plan_work(model.cache, model.step, 2), StepStatus::kOk);
    EXPECT_EQ(model.with_tensors(0, wrong,
                                 [&](auto... tensors) {
                                   return attend_share(model.cache, model.step, 0, tensors..., 0,
                                                       2);
                                 }),
              StepStatus::kAttended);
    EXPECT_EQ(wrong.out, untouched);
    EXPECT_EQ(model.cache.commit(model.step), StepStatus::kIncomplete) << "of the other layer";
    (void)model.attend_layer(1, chunks);
    EXPECT_EQ(model.commit(), StepStatus::kOk);
    EXPECT_TRUE(model.matches());
  }
}

TEST(AttendAgain, AStepWithoutNewTokensHasNothingToRefuse) {
  Model model = small_model(PrefillMode::kWindowed);
  const Chunks chunks{{model.add(), {}}};
  ASSERT_EQ(model.begin(chunks, Phase::kDecode), StepStatus::kOk);
  auto in = model.inputs_of(0, chunks);
  EXPECT_EQ(model.attend_into(model.step, 0, in), StepStatus::kOk);
  EXPECT_EQ(model.attend_into(model.step, 0, in), StepStatus::kOk);
  EXPECT_EQ(model.commit(), StepStatus::kOk);
}

TEST(AttendStale, AStepThatIsNotTheOpenOneIsRefusedAndNothingIsWritten) {
  Model model = small_model(PrefillMode::kWindowed);
  Model other = small_model(PrefillMode::kWindowed);
  const SequenceId a = model.add();
  const SequenceId b = model.add();
  ASSERT_EQ(other.add(), a);
  model.add_tokens(a, new_tokens(40), Phase::kPrompt);
  model.add_tokens(b, new_tokens(50), Phase::kPrompt);
  const Chunks chunks{{a, new_tokens(20)}};
  Step step;
  const auto begin = [&] {
    const SequenceChunk chunk[] = {{a, 20}};
    ASSERT_EQ(model.cache.begin(step, chunk), StepStatus::kOk);
    ASSERT_EQ(plan_work(model.cache, step, 1), StepStatus::kOk);
  };
  const auto expect_refused = [&](const char* what) {
    SCOPED_TRACE(what);
    ASSERT_EQ(other.begin(chunks, Phase::kPrompt), StepStatus::kOk);  // inputs of the right shape
    for (int l = 0; l < 2; ++l) {
      auto in = other.inputs_of(l, chunks);
      const Outputs untouched = in.out;
      EXPECT_EQ(model.attend_into(step, l, in), StepStatus::kStale);
      model.with_tensors(l, in, [&](auto... tensors) {
        EXPECT_EQ(attend_share(model.cache, step, l, tensors..., 0, 1), StepStatus::kStale);
        EXPECT_EQ(attend_shared(model.cache, step, l, tensors...), StepStatus::kStale);
      });
      EXPECT_EQ(in.out, untouched);
    }
    EXPECT_EQ(plan_work(model.cache, step, 1), StepStatus::kStale);
    EXPECT_TRUE(model.matches());
  };

  expect_refused("never begun");
  begin();
  ASSERT_EQ(model.cache.drop(step), StepStatus::kOk);
  expect_refused("dropped");
  begin();
  ASSERT_EQ(model.begin({{b, new_tokens(3)}}, Phase::kDecode), StepStatus::kOk);
  expect_refused("superseded");
  const Chunks of_b{{b, new_tokens(3)}};
  ASSERT_EQ(model.begin(of_b, Phase::kDecode), StepStatus::kOk);
  for (int l = 0; l < 2; ++l) (void)model.attend_layer(l, of_b);
  ASSERT_EQ(model.commit(), StepStatus::kOk);
  expect_refused("superseded, and the other one is committed");

  begin();
  {
    auto in = [&](int l) {
      EXPECT_EQ(other.begin(chunks, Phase::kPrompt), StepStatus::kOk);
      return other.inputs_of(l, chunks);
    };
    for (int l = 0; l < 2; ++l) {
      auto tensors = in(l);
      ASSERT_EQ(model.attend_into(step, l, tensors), StepStatus::kOk);
    }
  }
  ASSERT_EQ(model.cache.commit(step), StepStatus::kOk);
  auto in = other.inputs_of(0, chunks);
  EXPECT_EQ(model.attend_into(step, 0, in), StepStatus::kStale) << "committed";
  EXPECT_EQ(model.attend_into(other.step, 0, in), StepStatus::kStale) << "another cache's";
}

TEST(AttendShare, IsRefusedUnlessTheStepWasPlannedForSoManyThreads) {
  LongModel it;
  Model& model = *it.model;
  const Chunks chunks{{it.id, new_tokens(2)}};
  const auto expected = model.oracle(chunks, Phase::kDecode);
  ASSERT_EQ(model.begin(chunks, Phase::kDecode), StepStatus::kOk);
  reserve_scratch(model.step, model.cache, 8);  // memory is not a plan
  auto in = model.inputs_of(0, chunks);
  const Outputs untouched = in.out;
  const auto share = [&](std::size_t ith, std::size_t nth) {
    return model.with_tensors(0, in, [&](auto... tensors) {
      return attend_share(model.cache, model.step, 0, tensors..., ith, nth);
    });
  };
  EXPECT_EQ(share(0, 1), StepStatus::kNotPlanned);
  ASSERT_EQ(plan_work(model.cache, model.step, 2), StepStatus::kOk);
  EXPECT_EQ(share(0, 3), StepStatus::kTooManyThreads);
  EXPECT_EQ(share(2, 3), StepStatus::kTooManyThreads);
  EXPECT_EQ(share(2, 2), StepStatus::kTooManyThreads) << "there is no third of two";
  reserve_scratch(model.step, model.cache, 50);  // it grows: what was planned is gone
  EXPECT_EQ(share(0, 1), StepStatus::kNotPlanned);
  ASSERT_EQ(model.begin(chunks, Phase::kDecode), StepStatus::kOk);
  EXPECT_EQ(share(0, 1), StepStatus::kNotPlanned) << "a plan is its step's alone";
  EXPECT_EQ(in.out, untouched);

  ASSERT_EQ(plan_work(model.cache, model.step, 7), StepStatus::kOk);
  std::vector<Outputs> out;
  for (int l = 0; l < 2; ++l) {
    in = model.inputs_of(l, chunks);
    std::vector<std::thread> threads;
    for (std::size_t ith = 0; ith < 5; ++ith) {  // more threads than tasks, fewer than planned
      threads.emplace_back([&, ith] {
        model.with_tensors(l, in, [&](auto... tensors) {
          EXPECT_EQ(attend_share(model.cache, model.step, l, tensors..., ith, 5), StepStatus::kOk);
        });
      });
    }
    for (std::thread& thread : threads) thread.join();
    out.push_back(std::move(in.out));
  }
  EXPECT_EQ(model.commit(), StepStatus::kOk);
  EXPECT_LE(largest_difference(out, expected), kBound);
  EXPECT_TRUE(model.matches());
}

TEST(AttendShare, AttendedTwiceIsRefusedAndDoesNotStandInForTheOthers) {
  LongModel it;
  Model& model = *it.model;
  const Chunks chunks{{it.id, new_tokens(1)}};
  const auto expected = model.oracle(chunks, Phase::kDecode);
  ASSERT_EQ(model.begin(chunks, Phase::kDecode), StepStatus::kOk);
  ASSERT_EQ(plan_work(model.cache, model.step, 2), StepStatus::kOk);
  std::vector<Outputs> out;
  for (int l = 0; l < 2; ++l) {
    auto in = model.inputs_of(l, chunks);
    const auto share = [&](std::size_t ith) {
      return model.with_tensors(l, in, [&](auto... tensors) {
        return attend_share(model.cache, model.step, l, tensors..., ith, 2);
      });
    };
    EXPECT_EQ(share(0), StepStatus::kOk);
    const Outputs half = in.out;
    for (int i = 0; i < 3; ++i) EXPECT_EQ(share(0), StepStatus::kNotPlanned);
    EXPECT_EQ(in.out, half);
    EXPECT_FALSE(model.cache.is_attended(model.step, l));
    EXPECT_EQ(model.cache.commit(model.step), StepStatus::kIncomplete);
    EXPECT_EQ(share(1), StepStatus::kOk);
    EXPECT_EQ(share(0), StepStatus::kAttended);
    out.push_back(std::move(in.out));
  }
  EXPECT_LE(largest_difference(out, expected), kBound);
  EXPECT_EQ(model.commit(), StepStatus::kOk);
  EXPECT_TRUE(model.matches());
}

TEST(AttendShare, OfALayerWhoseExecutorThrewWantsTheStepPlannedAgain) {
  LongModel it;
  Model& model = *it.model;
  const Chunks chunks{{it.id, new_tokens(1)}};
  const auto expected = model.oracle(chunks, Phase::kDecode);
  ASSERT_EQ(model.begin(chunks, Phase::kDecode), StepStatus::kOk);
  ASSERT_EQ(plan_work(model.cache, model.step, 2), StepStatus::kOk);
  std::vector<Outputs> out;
  for (int l = 0; l < 2; ++l) {
    auto in = model.inputs_of(l, chunks);
    const auto share = [&](std::size_t ith) {
      return model.with_tensors(l, in, [&](auto... tensors) {
        return attend_share(model.cache, model.step, l, tensors..., ith, 2);
      });
    };
    const std::size_t last = l == 0 ? 2 : 1;
    EXPECT_THROW((void)model.attend_into(model.step, l, in, StopsAfter{last}), Stopped);
    std::fill(in.out.begin(), in.out.end(), -7.0F);
    EXPECT_EQ(share(0), StepStatus::kNotPlanned);
    EXPECT_EQ(share(1), StepStatus::kNotPlanned);
    ASSERT_EQ(plan_work(model.cache, model.step, 2), StepStatus::kOk);
    EXPECT_EQ(share(0), StepStatus::kOk);
    EXPECT_EQ(model.cache.commit(model.step), StepStatus::kIncomplete);
    EXPECT_EQ(share(1), StepStatus::kOk);
    out.push_back(std::move(in.out));
  }
  EXPECT_LE(largest_difference(out, expected), kBound);
  EXPECT_EQ(model.commit(), StepStatus::kOk);
  EXPECT_TRUE(model.matches());
}

TEST(AttendShare, DeducesEverythingAndTakesAnIsa) {
  Model model = small_model(PrefillMode::kWindowed);
  const Chunks chunks{{model.add(), new_tokens(30)}};
  const auto expected = model.oracle(chunks, Phase::kPrompt);
  ASSERT_EQ(model.begin(chunks, Phase::kPrompt), StepStatus::kOk);
  ASSERT_EQ(plan_work(model.cache, model.step, 1), StepStatus::kOk);
  std::vector<Outputs> out;
  for (int l = 0; l < 2; ++l) {
    auto in = model.inputs_of(l, chunks);
    model.with_tensors(l, in, [&](auto... tensors) {
      EXPECT_EQ(attend_share<simd::Scalar>(model.cache, model.step, l, tensors..., 0, 1),
                StepStatus::kOk);
    });
    out.push_back(std::move(in.out));
  }
  EXPECT_LE(largest_difference(out, expected), kBound);
}

TEST(AttendShared, GivesWhatAttendGivesAndStoresNothing) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const std::int64_t tokens : {1, 4, 70}) {
      LongModel it(prefill);
      Model& model = *it.model;
      const Chunks chunks{{it.id, new_tokens(tokens)}};
      ASSERT_EQ(model.begin(chunks, Phase::kPrompt), StepStatus::kOk);
      const auto shared = [&](int layer, auto&& executor) {
        auto in = model.inputs_of(layer, chunks);
        EXPECT_EQ(model.with_tensors(layer, in,
                                     [&](auto... tensors) {
                                       return attend_shared(model.cache, model.step, layer,
                                                            tensors..., executor);
                                     }),
                  StepStatus::kOk);
        return std::move(in.out);
      };
      for (int l = 0; l < 2; ++l) {
        const Outputs before = shared(l, SerialExecutor{});
        EXPECT_FALSE(model.cache.is_attended(model.step, l));
        EXPECT_EQ(model.cache.commit(model.step), StepStatus::kIncomplete);
        EXPECT_THROW((void)shared(l, StopsAfter{1}), Stopped);
        const Outputs own = model.attend_layer(l, chunks);
        EXPECT_EQ(before, own) << "the same bits";
        Eigen::ThreadPool pool(2);
        EXPECT_EQ(shared(l, PoolExecutor(pool)), own) << "and after the rows were stored";
        EXPECT_TRUE(model.cache.is_attended(model.step, l));
      }
      EXPECT_EQ(model.commit(), StepStatus::kOk);
      EXPECT_TRUE(model.matches());
    }
  }
}

}  // namespace
}  // namespace headwise
