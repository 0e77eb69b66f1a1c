// SPDX-License-Identifier: MIT
// The trained model against the golden logits of an independent float64 forward.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "evaluate.hpp"
#include "headwise/core/executor.hpp"
#include "logits.hpp"
#include "plans.hpp"
#include "safetensors.hpp"
#include "tasks.hpp"
#include "weights.hpp"

#ifdef NEEDLE_LM_DIR

namespace needle_lm::testing {
namespace {

using headwise::HeadPlan;
using headwise::PrefillMode;

constexpr double kGoldenBound = 2e-3;
const std::string kFolder = NEEDLE_LM_DIR;

class GoldenTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    const std::string model = kFolder + "/model/model.safetensors";
    const std::string golden = kFolder + "/data/golden.safetensors";
    if (!std::filesystem::exists(model) || !std::filesystem::exists(golden)) return;
    model_ = new Model(load_model(model));
    golden_ = new SafeTensors(golden);
  }
  static void TearDownTestSuite() {
    delete model_;
    delete golden_;
  }
  void SetUp() override {
    if (model_ == nullptr) GTEST_SKIP() << "no trained model in " << kFolder;
  }

  static std::vector<Token> tokens_of(const std::string& document) {
    const std::string name = document + ".tokens";
    return golden_->integers(name, golden_->shape(name));
  }

  template <class Row>
  static Matrix logits(const HeadPlan& plan, const RunOptions& run,
                       const std::vector<Token>& tokens, std::size_t prompt_length) {
    headwise::SerialExecutor executor;
    Matrix all(model_->config.vocab_size, static_cast<Eigen::Index>(tokens.size()));
    Eigen::Index done = 0;
    for_each_logits<Row>(*model_, plan, run, tokens, prompt_length, executor,
                         [&](const Matrix& next) {
                           all.middleCols(done, next.cols()) = next;
                           done += next.cols();
                         });
    return all;
  }

  /// The largest difference between the rows named and the golden tensor.
  static double difference(const Matrix& got, const std::string& name,
                           const std::vector<std::int32_t>& rows) {
    const auto num_rows = static_cast<Eigen::Index>(rows.size());
    const std::vector<float> golden =
        golden_->floats(name, {num_rows, static_cast<std::int64_t>(got.rows())});
    double worst = 0.0;
    for (Eigen::Index i = 0; i < num_rows; ++i) {
      const Eigen::Map<const Eigen::VectorXf> expected(golden.data() + i * got.rows(), got.rows());
      const float error =
          (got.col(rows[static_cast<std::size_t>(i)]) - expected).cwiseAbs().maxCoeff();
      worst = static_cast<double>(error) <= worst ? worst : static_cast<double>(error);
    }
    return worst;
  }

  static Model* model_;
  static SafeTensors* golden_;
};
Model* GoldenTest::model_ = nullptr;
SafeTensors* GoldenTest::golden_ = nullptr;

TEST_F(GoldenTest, FullCacheEqualsTheFloat64Forward) {
  const HeadPlan plan(model_->config.shape());
  for (const std::string document : {"passkey", "program", "echo", "filler"}) {
    const std::vector<Token> tokens = tokens_of(document);
    std::vector<std::int32_t> rows(tokens.size());
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<std::int32_t>(i);
    for (const std::size_t prompt : {tokens.size(), tokens.size() / 2}) {
      const Matrix got = logits<headwise::f32>(plan, {.chunk = 100}, tokens, prompt);
      const double worst = difference(got, document + ".logits.full", rows);
      EXPECT_LE(worst, kGoldenBound) << document << ", prompt " << prompt;
      std::printf("%s, prompt of %zu: %.1e\n", document.c_str(), prompt, worst);
    }
  }
}

TEST_F(GoldenTest, HardMasksEqualTheFloat64ForwardInBothPrefillModes) {
  for (const std::string document : {"passkey", "program"}) {
    const std::vector<Token> tokens = tokens_of(document);
    const auto prompt =
        static_cast<std::size_t>(golden_->integers(document + ".prompt_length", {1})[0]);
    const auto rows = golden_->integers(document + ".rows", golden_->shape(document + ".rows"));
    for (const std::string policy : {"rlkv", "duo"}) {
      const std::string name = policy + "12";
      const PlanOptions options{
          .policy = policy == "duo" ? "duo_attention" : policy,
          .heads = kFolder + "/heads/" + (policy == "duo" ? "duo_attention" : policy) + ".tsv",
          .sparsity = 0.5};
      const HeadPlan plan = make_plan(options, model_->config.shape());
      const auto mask = golden_->integers(document + ".mask." + name, {6, 4});
      for (int head = 0; head < 24; ++head) {
        ASSERT_EQ(headwise::is_retrieval(plan.budget(head / 4, head % 4)),
                  mask[static_cast<std::size_t>(head)] == 1)
            << name << ", layer " << head / 4 << ", KV head " << head % 4;
      }
      const auto expect_equal = [&](const std::string& mode, const RunOptions& run,
                                    std::size_t prompt_length) {
        const Matrix got = logits<headwise::f32>(plan, run, tokens, prompt_length);
        const double worst = difference(got, document + ".logits." + name + "." + mode, rows);
        EXPECT_LE(worst, kGoldenBound) << document << ", " << name << ", " << mode << ", chunk "
                                       << run.chunk << ", prompt " << prompt_length;
        std::printf("%s, %s, %s: %.1e\n", document.c_str(), name.c_str(), mode.c_str(), worst);
      };
      expect_equal("windowed", {.chunk = 512}, prompt);
      expect_equal("windowed", {.chunk = 33}, tokens.size());
      expect_equal("chunk_causal", {PrefillMode::kChunkCausal, 128}, prompt);
    }
  }
}

TEST_F(GoldenTest, FullCacheAnswersHeldOutDocuments) {
  const SafeTensors documents(kFolder + "/data/documents.safetensors");
  const Tasks tasks{load_task(documents, "passkey", kEndOfNeedle, 1, model_->config),
                    load_task(documents, "cot", kEndOfSequence, 1, model_->config)};
  headwise::SerialExecutor executor;
  std::size_t num_finished = 0;
  const Result result =
      evaluate<headwise::f16>(*model_, tasks, {"full", "", HeadPlan(model_->config.shape())}, {},
                              executor, [&] { ++num_finished; });
  EXPECT_EQ(num_finished, 2U);
  EXPECT_EQ(result.passkey_exact, result.num_documents);
  EXPECT_EQ(result.cot_exact, result.num_documents);
  EXPECT_EQ(result.answer_exact, result.num_documents);
  EXPECT_EQ(result.mean_output_tokens, 164.0);
  EXPECT_EQ(result.kv_bytes, 24U * 2048 * 2 * 32 * 2);  // heads, tokens, K and V, width, f16
}

}  // namespace
}  // namespace needle_lm::testing

#endif
