// SPDX-License-Identifier: MIT
#include "headwise/policies/head_kv.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
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

struct FloorDivision {
  double base;
  double beta;
  double floor;  // python3 -c "print(base // beta)"
};

TEST(HeadKv, DividesThePoolAsPythonsFloorDivisionDoes) {
  // Where the rounded quotient is one more: of 348 such pairs below 4096 at twelve betas.
  const FloorDivision rounded_up[] = {{101, 1.01, 99},    {286, 1.1, 259},    {505, 1.01, 499},
                                      {1010, 1.01, 999},  {1071, 1.02, 1049}, {1479, 1.02, 1449},
                                      {1854, 1.03, 1799}, {2040, 1.02, 1999}, {2618, 1.1, 2379},
                                      {2739, 1.1, 2489},  {2871, 1.1, 2609},  {3333, 1.01, 3299}};
  for (const FloorDivision& x : rounded_up) {
    EXPECT_EQ(head_kv::floor_div(x.base, x.beta), x.floor) << x.base << " // " << x.beta;
  }
  const FloorDivision others[] = {{0, 1.5, 0},
                                  {1, 10, 0},
                                  {7, 1e300, 0},
                                  {120, 1.005, 119},
                                  {120, 1.01, 118},
                                  {1016, 1.2, 846},
                                  {2040, 1.1, 1854},
                                  {2040, 2, 1020},
                                  {3, 0.1, 29},
                                  {1099511627768, 1.01, 1088625374027},
                                  {1099511627776, 1.0000000000000002, 1099511627775}};
  for (const FloorDivision& x : others) {
    EXPECT_EQ(head_kv::floor_div(x.base, x.beta), x.floor) << x.base << " // " << x.beta;
  }
}

TEST(HeadKv, SharesAsManyEntriesAsTheReleasedCode) {
  // [round(score * pool * 4 + (base - pool)) for score in (.4, .3, .2, .1)], pool = base // beta
  const auto at = [](std::int64_t capacity, double beta) {
    return head_kv::Policy{.capacity = capacity, .beta = beta}.capacities(kScores);
  };
  EXPECT_EQ(at(2048, 1.02), (Capacities{3239, 2440, 1640, 841}));
  EXPECT_EQ(at(109, 1.01), (Capacities{160, 121, 81, 42}));
  EXPECT_EQ(at(513, 1.01), (Capacities{804, 605, 405, 206}));
  EXPECT_EQ(at(1018, 1.01), (Capacities{1609, 1210, 810, 411}));
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

TEST(HeadKv, RefusesCapacitiesThatOverflow) {
  const auto one_of_many = [] {
    std::vector<double> values(std::size_t{1} << 23);
    values.front() = 1.0;
    return QueryHeadScores::dense(1 << 9, 1 << 14, values);
  };
  EXPECT_EQ(message_of<ConfigError>([&] {
              (void)head_kv::Policy{.capacity = kMaxTokens, .beta = 1.5}.capacities(one_of_many());
            }),
            "capacity * heads: 1099511627776 * 8388608 does not fit 64 bits");
  EXPECT_EQ(message_of<ConfigError>([] {
              (void)head_kv::reduce_mean(Capacities{INT64_MAX, INT64_MAX}, 2);
            }),
            "a capacity must be in [0, 4611686018427387904], got 9223372036854775807");
  EXPECT_EQ(message_of<ConfigError>([] {
              (void)head_kv::reduce_mean(Capacities{-1, 2}, 2);
            }),
            "a capacity must be in [0, 4611686018427387904], got -1");
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
