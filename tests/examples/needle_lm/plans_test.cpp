// SPDX-License-Identifier: MIT
// From the command line's plan options to head plans.
#include "plans.hpp"

#include <gtest/gtest.h>

#include <string>
#include <variant>

#include "random_model.hpp"

namespace needle_lm::testing {
namespace {

using headwise::HeadPlan;
using headwise::ModelShape;

class PlansTest : public ::testing::Test {
 protected:
  PlansTest() {
    // 6 x 4 distinct scores: induction falls from layer 0 on, echo rises.
    std::string induction;
    std::string echo;
    for (int head = 0; head < 24; ++head) {
      const char* end = head % 4 == 3 ? "\n" : "\t";
      induction += std::to_string(1.0 - 0.04 * head) + end;
      echo += std::to_string(0.04 * head) + end;
    }
    write_text(folder_.file("falling"), induction);
    write_text(folder_.file("rising"), echo);
  }

  PlanOptions options(const std::string& policy, double sparsity) {
    return {.policy = policy,
            .heads = folder_.file("falling"),
            .echo = folder_.file("rising"),
            .sparsity = sparsity};
  }

  TemporaryFolder folder_;
  ModelShape shape_ = ModelShape::uniform(6, 8, 4, 32);
};

TEST_F(PlansTest, KeepsTheCountsOfTheTable) {
  for (const std::string policy : {"duo_attention", "rlkv", "razor_attention", "random"}) {
    EXPECT_EQ(detail::num_retrieval(make_plan(options(policy, 0.5), shape_)), 12U) << policy;
    EXPECT_EQ(detail::num_retrieval(make_plan(options(policy, 2.0 / 3.0), shape_)), 8U) << policy;
    EXPECT_EQ(detail::num_retrieval(make_plan(options(policy, 0.0), shape_)), 24U) << policy;
    EXPECT_EQ(detail::num_retrieval(make_plan(options(policy, 1.0), shape_)), 0U) << policy;
  }
  EXPECT_EQ(detail::num_retrieval(make_plan(options("full", 0.5), shape_)), 24U);
  EXPECT_EQ(detail::num_retrieval(make_plan(options("uniform", 0.5), shape_)), 0U);
}

TEST_F(PlansTest, GivesEveryOtherHeadTheWindow) {
  for (const std::string policy :
       {"duo_attention", "rlkv", "razor_attention", "random", "uniform"}) {
    const HeadPlan plan = make_plan(options(policy, 0.5), shape_);
    for (const headwise::HeadBudget& budget : plan.budgets()) {
      if (headwise::is_retrieval(budget)) continue;
      EXPECT_EQ(std::get<headwise::KeepWindow>(budget).window,
                (headwise::Window{.sink = 4, .recent = 60}));
    }
  }
}

TEST_F(PlansTest, TakesRazorsHeadsByEchoAndInduction) {
  const HeadPlan plan = make_plan(options("razor_attention", 0.5), shape_);
  for (int head = 0; head < 24; ++head) {
    const bool expected = head < 11 || head == 23;  // 11 by induction, one by echo
    EXPECT_EQ(headwise::is_retrieval(plan.budget(head / 4, head % 4)), expected) << head;
  }
  PlanOptions same = options("razor_attention", 0.5);
  same.echo = same.heads;  // the echo head is an induction head already
  EXPECT_EQ(detail::num_retrieval(make_plan(same, shape_)), 12U);

  PlanOptions compensated = options("razor_attention", 0.5);
  compensated.compensation = true;
  const HeadPlan grows = make_plan(compensated, shape_);
  EXPECT_EQ(std::get<headwise::KeepGrowingWindow>(grows.budget(4, 0)).min_recent, 60);
}

TEST_F(PlansTest, RefusesScoresOfAnotherModel) {
  EXPECT_THROW(make_plan(options("rlkv", 0.5), ModelShape::uniform(6, 8, 8, 32)),
               headwise::ConfigError);
  EXPECT_THROW(make_plan(options("rlkv", 0.5), ModelShape::uniform(5, 8, 4, 32)),
               headwise::ConfigError);
  PlanOptions absent = options("razor_attention", 0.5);
  absent.echo = folder_.file("absent");
  EXPECT_THROW(make_plan(absent, shape_), std::runtime_error);
}

}  // namespace
}  // namespace needle_lm::testing
