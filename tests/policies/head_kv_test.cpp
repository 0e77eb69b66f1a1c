// SPDX-License-Identifier: MIT
#include "headwise/policies/head_kv.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "headwise/heads/json.hpp"
#include "support/errors.hpp"
#include "support/published.hpp"

namespace headwise {
namespace {

using testing::message_of;
using testing::published;
using Capacities = std::vector<std::int64_t>;

std::int64_t sum_of(const Capacities& capacities) {
  return std::accumulate(capacities.begin(), capacities.end(), std::int64_t{0});
}

const QueryHeadScores kScores = QueryHeadScores::dense(1, 4, std::vector<double>{4, 3, 2, 1});

TEST(HeadKv, SharesThePoolAsPublished) {
  head_kv::Policy policy{.capacity = 128, .observation_window = 8, .beta = 2};
  EXPECT_EQ(policy.capacities(kScores), (Capacities{156, 132, 108, 84}));
  EXPECT_EQ(sum_of(policy.capacities(kScores)) + 4 * policy.observation_window, 512);
  policy.beta = 1.005;
  EXPECT_EQ(policy.capacities(kScores), (Capacities{191, 144, 96, 49}));
}

TEST(HeadKv, NormalisesImportanceOverAllLayers) {
  const auto scores = QueryHeadScores::dense(2, 2, std::vector<double>{4, 3, 2, 1});
  const QueryHeadScores shares = head_kv::importance(scores);
  EXPECT_DOUBLE_EQ(shares.value(0, 0), .4);
  EXPECT_DOUBLE_EQ(shares.value(1, 1), .1);
  const QueryHeadScores sharper = head_kv::importance(scores, 2.0);
  EXPECT_DOUBLE_EQ(sharper.value(0, 0), 16 / 30.0);
  EXPECT_DOUBLE_EQ(sharper.value(1, 1), 1 / 30.0);
}

TEST(HeadKv, ReducesToKvHeadsByTheMean) {
  EXPECT_EQ(head_kv::reduce_mean(Capacities{156, 132, 108, 84}, 2), (Capacities{144, 96}));
  EXPECT_EQ(head_kv::reduce_mean(Capacities{1, 2, 2, 3}, 2), (Capacities{2, 2}));  // halves to even
  EXPECT_EQ(message_of<ConfigError>([] {
              (void)head_kv::reduce_mean(Capacities{1, 2}, 3);
            }),
            "group_size 3 does not divide 2 capacities");
  EXPECT_EQ(message_of<ConfigError>([] {
              (void)head_kv::reduce_mean(Capacities{1, 2}, 0);
            }),
            "group_size 0 does not divide 2 capacities");
}

TEST(HeadKv, RefusesWhatCannotBeShared) {
  const auto importance = [](std::vector<double> values, double temperature = 1.0) {
    return message_of<ConfigError>(
        [&] { (void)head_kv::importance(QueryHeadScores::dense(1, 2, values), temperature); });
  };
  EXPECT_EQ(importance({1, -.5}), "layer 0, head 1: an importance must be >= 0, got -0.5");
  EXPECT_EQ(importance({0, 0}), "all importances are 0: there is nothing to share by");
  EXPECT_EQ(importance({1, 1}, 0), "temperature must be finite and > 0, got 0");
  const auto capacities = [](const head_kv::Policy& policy) {
    return message_of<ConfigError>([&] { (void)policy.capacities(kScores); });
  };
  EXPECT_EQ(capacities({.beta = 1}), "beta must be > 1, got 1");
  EXPECT_EQ(capacities({.capacity = 7}),
            "capacity must be in [8 (the observation window), 1099511627776], got 7");
  EXPECT_EQ(capacities({.observation_window = -1}), "observation_window must be >= 0, got -1");
}

TEST(HeadKv, HasThePublishedTablesOfLlama3) {
  const std::string folder = published("headkv/Meta-Llama-3-8B-Instruct/");
  HEADWISE_SKIP_WITHOUT(folder);
  const QueryHeadScores reason = load_head_runs(folder + "retrieval_reasoning_heads.json").mean;
  const auto at = [&](double beta) {
    return head_kv::Policy{.capacity = 128, .beta = beta}.capacities(reason);
  };
  Capacities capacities = at(1.005);
  EXPECT_EQ(sum_of(capacities), 122867);
  EXPECT_EQ(*std::max_element(capacities.begin(), capacities.end()), 1835);
  EXPECT_EQ(*std::min_element(capacities.begin(), capacities.end()), 1);
  EXPECT_EQ(capacities[15 * 32 + 30], 1835);
  capacities = at(2);
  EXPECT_EQ(sum_of(capacities), 122861);
  EXPECT_EQ(*std::max_element(capacities.begin(), capacities.end()), 985);
  EXPECT_EQ(*std::min_element(capacities.begin(), capacities.end()), 60);
  capacities = at(10);
  EXPECT_EQ(sum_of(capacities), 122846);
  EXPECT_EQ(*std::max_element(capacities.begin(), capacities.end()), 293);
  EXPECT_EQ(*std::min_element(capacities.begin(), capacities.end()), 108);

  capacities = head_kv::Policy{.capacity = 1024, .beta = 1.01}.capacities(reason);
  EXPECT_EQ(capacities[15 * 32 + 30], 15500);

  const QueryHeadScores copy = load_head_runs(folder + "retrieval_heads.json").mean;
  capacities = head_kv::Policy{.capacity = 128, .beta = 1.005}.capacities(copy);
  EXPECT_EQ(*std::max_element(capacities.begin(), capacities.end()), 6208);
  EXPECT_EQ(std::count_if(capacities.begin(), capacities.end(), [](auto c) { return c <= 2; }),
            728);
  capacities = head_kv::Policy{.capacity = 1024, .beta = 1.01}.capacities(copy);
  EXPECT_EQ(*std::max_element(capacities.begin(), capacities.end()), 52435);
}

}  // namespace
}  // namespace headwise
