// SPDX-License-Identifier: MIT
#include "headwise/policies/rlkv.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <vector>

#include "support/errors.hpp"
#include "support/published.hpp"

namespace headwise {
namespace {

using testing::message_of;
using testing::published;

TEST(Rlkv, HasAMaskWithoutTiesForLlama) {
  const std::string directory = published("rlkv/Llama-3.1-8B-R1");
  HEADWISE_SKIP_WITHOUT(directory);
  const HeadScores scores = rlkv::load(directory);
  EXPECT_EQ(scores.value(0, 0), .27734375);
  const HeadPlan plan = rlkv::Policy{.sparsity = .5}.plan(scores);
  EXPECT_EQ(plan.sparsity(), .5);
  for (std::size_t i = 0; i < scores.num_heads(); ++i) {  // tau lies between two values
    EXPECT_EQ(is_retrieval(plan.budgets()[i]), scores.values()[i] > .654297);
  }
}

TEST(Rlkv, PlansWithItsOwnWindow) {
  const HeadScores scores = HeadScores::dense(1, 2, std::vector<double>{-.01, 1.0078});
  const HeadPlan plan = rlkv::Policy{}.plan(scores);
  EXPECT_EQ(plan.budget(0, 0), HeadBudget{(KeepWindow{{.sink = 16, .recent = 64}})});
  EXPECT_TRUE(is_retrieval(plan.budget(0, 1)));
}

TEST(Rlkv, FallsBackToDuoAttentionsFileName) {
  namespace fs = std::filesystem;
  const fs::path directory = fs::path(::testing::TempDir()) / "headwise_rlkv_test";
  fs::create_directories(directory);
  const HeadScores duo = HeadScores::dense(1, 1, std::vector<double>{.5});
  const HeadScores adapter = HeadScores::dense(1, 1, std::vector<double>{.75});
  save_tsv(duo, (directory / "full_attention_heads.tsv").string());
  EXPECT_EQ(rlkv::load(directory.string()), duo);
  save_tsv(adapter, (directory / "adapter_weights.tsv").string());
  EXPECT_EQ(rlkv::load(directory.string()), adapter);
  EXPECT_EQ(rlkv::load((directory / "full_attention_heads.tsv").string()), duo);
  fs::remove_all(directory);
  EXPECT_NE(message_of<ConfigError>([&] { (void)rlkv::load(directory.string()); }), "");
}

TEST(Rlkv, PlansThePromptWindowOfTheReleasedServer) {
  // Its later prompt chunks see 64 past tokens and themselves, its decode 63 and the current one.
  const HeadScores gates = HeadScores::dense(1, 2, std::vector<double>{0.1, 0.9});
  const HeadPlan plan =
      rlkv::Policy{.sparsity = 0.5, .prompt_recent = rlkv::kPromptWindow.recent}.plan(gates);
  const auto& keep = std::get<KeepWindow>(plan.budgets()[0]);
  EXPECT_EQ(keep.window, rlkv::kDeployWindow);
  EXPECT_EQ(keep.prompt_window(), (Window{16, 65}));
  EXPECT_TRUE(keep.prompt_window().sees(Pos{100}, Pos{36}));
  EXPECT_FALSE(keep.prompt_window().sees(Pos{100}, Pos{35}));
  EXPECT_FALSE(keep.window.sees(Pos{100}, Pos{36}));
  EXPECT_TRUE(is_retrieval(plan.budgets()[1]));
}

TEST(Rlkv, SizesThePoolsOfItsReport) {
  // size_full = floor((T (Hf + Hc) - size_comp Hc) / Hf), size_comp = requests (sink + recent).
  struct Golden {
    double sparsity;
    std::size_t retrieval;
    double factor;
  };
  const double tokens = 100000;
  const double comp = 300 * 80;
  EXPECT_EQ(comp, 24000);
  for (const Golden& golden : {Golden{.2, 205, 1.189},
                               {.4, 154, 1.503},
                               {.5, 128, 1.76},
                               {.6, 103, 2.129},
                               {.8, 52, 3.982}}) {
    const std::size_t streaming = num_streaming(256, golden.sparsity);
    EXPECT_EQ(256 - streaming, golden.retrieval);
    const auto hc = static_cast<double>(streaming);
    const double full = std::floor((tokens * 256 - comp * hc) / (256 - hc));
    EXPECT_NEAR(full / tokens, golden.factor, 6e-4);
  }
}

}  // namespace
}  // namespace headwise
