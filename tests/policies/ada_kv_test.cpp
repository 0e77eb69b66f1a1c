// SPDX-License-Identifier: MIT
#include "headwise/policies/ada_kv.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "headwise/heads/select_tokens.hpp"
#include "headwise/policies/key_diff.hpp"
#include "headwise/policies/knorm.hpp"
#include "headwise/policies/snap_kv.hpp"
#include "support/errors.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using test::GoldenLayer;
using test::KeptLists;

TokenScores snap_scores(const snap_kv::Policy& policy) {
  const GoldenLayer layer;
  TokenScores scores(32);
  for (int h = 0; h < 2; ++h) {
    snap_kv::add_head(policy, layer.queries(h, 28, 32), layer.keys(h), layer.positions, scores);
  }
  return scores;
}

TEST(AdaKv, SharesSnapKvsScoresAsKvpress) {
  const snap_kv::Policy policy{.window = 4, .kernel = 5};
  const TokenScores scores = snap_scores(policy);
  const KeepCounts counts = ada_kv::Policy{}.counts(scores, policy.protection(), 16);
  EXPECT_EQ(counts, (KeepCounts{13, 19}));
  EXPECT_EQ(
      test::lists_of(select_tokens(scores, policy.protection(), counts)),
      (KeptLists{{5, 9, 12, 15, 16, 17, 18, 19, 20, 28, 29, 30, 31},
                 {7, 8, 10, 11, 13, 14, 15, 16, 17, 18, 20, 21, 22, 23, 24, 28, 29, 30, 31}}));
}

TEST(AdaKv, SharesScoresOfKeysAsKvpress) {
  const GoldenLayer layer;
  TokenScores by_norm(32);
  TokenScores by_direction(32);
  for (int h = 0; h < 2; ++h) {
    knorm::add_head(layer.keys(h), layer.positions, by_norm);
    key_diff::add_head(layer.keys(h), layer.positions, by_direction);
  }
  EXPECT_EQ(ada_kv::Policy{}.counts(by_norm, {}, 16), (KeepCounts{16, 16}));
  EXPECT_EQ(ada_kv::Policy{}.counts(by_direction, {}, 16), (KeepCounts{17, 15}));
  const auto expected = test::golden("adakv_keydiff");
  if (!expected.empty()) {
    EXPECT_EQ(test::lists_of(select_tokens(by_direction, {}, KeepCounts{17, 15})),
              expected.at("kept").get<KeptLists>());
  }
}

TEST(AdaKv, RoundsAsItsReleasedCode) {
  const snap_kv::Policy max_group{.window = 4, .kernel = 5, .reduce = snap_kv::Reduce::kMax};
  const TokenScores scores = snap_scores(max_group);
  const KeepCounts counts = ada_kv::ReleasedPolicy{}.counts(scores, max_group.protection(), 18);
  EXPECT_EQ(counts, (KeepCounts{12 + 4, 15 + 4}));  // 27 of 28
  const auto expected = test::golden("adakv_ffy0_max");
  if (!expected.empty()) {
    EXPECT_EQ(test::lists_of(select_tokens(scores, max_group.protection(), counts)),
              expected.at("kept").get<KeptLists>());
  }
  const snap_kv::Policy mean_group{.window = 4, .kernel = 5};
  EXPECT_EQ((ada_kv::ReleasedPolicy{.floor = 0.5, .normalize = true})
                .counts(snap_scores(mean_group), mean_group.protection(), 16),
            (KeepCounts{12 + 4, 12 + 4}));  // 12.5 and 11.5, halves to even
}

TEST(AdaKv, RoundsTheExamplesOfThePaper) {
  TokenScores scores(6);
  const std::vector<float> a{0.30F, 0.25F, 0.20F, 0.15F, 0.05F, 0.01F};
  const std::vector<float> b{0.40F, 0.10F, 0.05F, 0.04F, 0.03F, 0.02F};
  std::ranges::copy(a, scores.add_head().begin());
  std::ranges::copy(b, scores.add_head().begin());
  EXPECT_EQ((ada_kv::Policy{.floor = 0.0}.counts(scores, {}, 3)), (KeepCounts{4, 2}));
  // round(4 * .8 + int(.2 * 3)) and round(2 * .8): 5 of 6.
  EXPECT_EQ(ada_kv::ReleasedPolicy{}.counts(scores, {}, 3), (KeepCounts{3, 2}));
  EXPECT_EQ((ada_kv::ReleasedPolicy{.normalize = true}.counts(scores, {}, 3)), (KeepCounts{3, 2}));
}

TEST(AdaKv, SpendsItsBudgetExactlyAndKeepsItsSafeguards) {
  TokenScores scores(20);
  for (int h = 0; h < 3; ++h) {
    const auto out = scores.add_head();
    for (std::size_t j = 0; j < out.size(); ++j) {
      out[j] = h == 0 ? 1.0F + static_cast<float>(j) : 0.001F * static_cast<float>(j);
    }
  }
  const Protection protection{1, 2};
  for (std::int64_t mean = 3; mean <= 20; ++mean) {
    const KeepCounts counts = ada_kv::Policy{.floor = 0.5}.counts(scores, protection, mean);
    EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), std::int64_t{0}), 3 * mean);
    for (const std::int64_t count : counts) EXPECT_GE(count, std::max<std::int64_t>(3, mean / 2));
  }
  EXPECT_EQ((ada_kv::Policy{.floor = 0.0}.counts(scores, {}, 5)), (KeepCounts{15, 0, 0}));
  // Below what is protected: that is kept nevertheless.
  EXPECT_EQ(ada_kv::Policy{}.counts(scores, protection, 1), (KeepCounts{3, 3, 3}));
}

TEST(AdaKv, RefusesWhatIsOutOfRange) {
  TokenScores scores(4);
  (void)scores.add_head();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double floor : {-0.1, 1.1, nan}) {
    EXPECT_THROW((void)(ada_kv::Policy{floor}.counts(scores, {}, 2)), ConfigError);
    EXPECT_THROW((void)(ada_kv::ReleasedPolicy{floor}.counts(scores, {}, 2)), ConfigError);
  }
  EXPECT_THROW((void)ada_kv::Policy{}.counts(scores, {}, -1), ConfigError);
  EXPECT_EQ(testing::message_of<ConfigError>([&] {
              (void)ada_kv::ReleasedPolicy{}.counts(scores, {0, 3}, 2);
            }),
            "KV head 0: 2 tokens are to be kept, but 3 are protected");
}

}  // namespace
}  // namespace headwise
