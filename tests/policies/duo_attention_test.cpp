// SPDX-License-Identifier: MIT
#include "headwise/policies/duo_attention.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "support/errors.hpp"
#include "support/published.hpp"

namespace headwise {
namespace {

using testing::message_of;
using testing::published;

const char* const kLlama3 = "duo_attention/Llama-3-8B-Instruct-Gradient-1048k";

struct Share {
  int streaming = 0;
  int retrieval = 0;
};

/// How the heads whose clipped value is `value` were divided.
Share share_at(const HeadPlan& plan, const HeadScores& scores, double value) {
  Share share;
  for (std::size_t i = 0; i < scores.num_heads(); ++i) {
    if (std::clamp(scores.values()[i], 0.0, 1.0) != value) continue;
    ++(is_retrieval(plan.budgets()[i]) ? share.retrieval : share.streaming);
  }
  return share;
}

TEST(DuoAttention, PlansAsInTheReadme) {
  const HeadScores scores = HeadScores::dense(1, 4, std::vector<double>{.9, .1, .8, .2});
  const HeadPlan plan = duo_attention::Policy{}.plan(scores);
  EXPECT_EQ(plan, select(scores, {.sparsity = .5, .window = {.sink = 64, .recent = 256}}));
  EXPECT_EQ(plan.sparsity(), .5);
}

TEST(DuoAttention, LoadsTheFileOrItsDirectory) {
  HEADWISE_SKIP_WITHOUT(published(kLlama3));
  const HeadScores scores = duo_attention::load(published(kLlama3));
  EXPECT_EQ(scores, duo_attention::load(published(kLlama3) + "/full_attention_heads.tsv"));
  EXPECT_EQ(scores.value(0, 0), .859375);
  EXPECT_EQ(scores.value(0, 4), -9.250640869140625e-05);
  check_shape(scores, ModelShape::uniform(32, 32, 8, 128));
}

TEST(DuoAttention, NamesTheFileThatIsMissing) {
  EXPECT_EQ(message_of<ConfigError>([] { (void)duo_attention::load("/no/such.tsv"); }),
            "cannot open /no/such.tsv: No such file or directory");
}

TEST(DuoAttention, DemotesTwoOfThreeTiedHeadsOfLlama3) {
  HEADWISE_SKIP_WITHOUT(published(kLlama3));
  const HeadScores scores = duo_attention::load(published(kLlama3));
  const HeadPlan plan = duo_attention::Policy{.sparsity = .5}.plan(scores);
  EXPECT_EQ(plan.sparsity(), .5);
  EXPECT_EQ(std::count_if(scores.values().begin(), scores.values().end(),
                          [](double x) { return x < .9609375; }),
            126);
  const Share tied = share_at(plan, scores, .9609375);
  EXPECT_EQ(tied.streaming, 2);
  EXPECT_EQ(tied.retrieval, 1);
}

TEST(DuoAttention, DecidesByOrderWhereThePublishedNoiseDecidedByChance) {
  HEADWISE_SKIP_WITHOUT(published(kLlama3));
  const HeadScores scores = duo_attention::load(published(kLlama3));
  const Share saturated = share_at(duo_attention::Policy{.sparsity = .75}.plan(scores), scores, 1);
  EXPECT_EQ(saturated.streaming, 18);
  EXPECT_EQ(saturated.retrieval, 64);

  const HeadScores mha = duo_attention::load(published("duo_attention/Llama-2-7B-32K-Instruct"));
  const HeadPlan plan = duo_attention::Policy{.sparsity = .25}.plan(mha);
  EXPECT_EQ(plan.sparsity(), .25);
  const Share zeros = share_at(plan, mha, 0);
  EXPECT_EQ(zeros.streaming, 256);
  EXPECT_EQ(zeros.retrieval, 18);
}

}  // namespace
}  // namespace headwise
