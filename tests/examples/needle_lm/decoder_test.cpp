// SPDX-License-Identifier: MIT
// The decoder against an independent forward in double, on random weights.
#include "decoder.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "double_forward.hpp"
#include "generate.hpp"
#include "logits.hpp"
#include "random_model.hpp"

namespace needle_lm::testing {
namespace {

using headwise::HeadPlan;
using headwise::KeepWindow;
using headwise::Phase;
using headwise::PrefillMode;
using headwise::Window;

constexpr double kBound = 2e-3;
constexpr Window kWindow{.sink = 3, .recent = 10};

/// Which KV heads stream; layers 0, 1, 2 have one, both and none.
constexpr bool kStreams[3][2] = {{true, false}, {true, true}, {false, false}};

class DecoderTest : public ::testing::Test {
 protected:
  std::vector<Token> random_tokens(std::size_t count) {
    std::uniform_int_distribution<Token> token(0, model_.config.vocab_size - 1);
    std::vector<Token> tokens(count);
    for (Token& t : tokens) t = token(random_);
    return tokens;
  }

  HeadPlan hard_masked() const {
    HeadPlan plan(model_.config.shape());
    for (int layer = 0; layer < 3; ++layer) {
      for (int head = 0; head < 2; ++head) {
        if (kStreams[layer][head]) plan.set(layer, head, KeepWindow{kWindow});
      }
    }
    return plan;
  }

  Matrix logits(const HeadPlan& plan, const RunOptions& run, const std::vector<Token>& tokens,
                std::size_t prompt_length) {
    Matrix all(model_.config.vocab_size, static_cast<Eigen::Index>(tokens.size()));
    Eigen::Index done = 0;
    for_each_logits<headwise::f32>(model_, plan, run, tokens, prompt_length, executor_,
                                   [&](const Matrix& next) {
                                     all.middleCols(done, next.cols()) = next;
                                     done += next.cols();
                                   });
    EXPECT_EQ(done, all.cols());
    return all;
  }

  static double max_difference(const Matrix& logits, const Rows& expected) {
    double worst = 0.0;
    for (Eigen::Index t = 0; t < logits.cols(); ++t) {
      for (Eigen::Index i = 0; i < logits.rows(); ++i) {
        const double wanted = expected[static_cast<std::size_t>(t)][static_cast<std::size_t>(i)];
        const double difference = std::abs(static_cast<double>(logits(i, t)) - wanted);
        worst = difference <= worst ? worst : difference;  // NaN is not swallowed
      }
    }
    return worst;
  }

  TemporaryFolder folder_;
  nlohmann::json config_ = small_config();
  NamedTensors weights_ = random_weights(config_, 17);
  Model model_ = load_model(write_model(folder_, config_, weights_));
  DoubleForward oracle_{config_, weights_};
  headwise::SerialExecutor executor_;
  std::mt19937 random_{5};
};

std::vector<std::size_t> sizes(std::vector<std::size_t> values) { return values; }

bool sees_everything(int, int, int, int) { return true; }

bool sees_window(int layer, int head, int i, int j) {
  return !kStreams[layer][head] || j < kWindow.sink || i - j < kWindow.recent;
}

TEST_F(DecoderTest, EqualsTheDoubleForwardWithTheFullCache) {
  const auto tokens = random_tokens(90);
  const Rows expected = oracle_.logits(tokens, sees_everything);
  const HeadPlan plan(model_.config.shape());
  for (const std::size_t chunk : sizes({1, 7, 64, 90})) {
    for (const std::size_t prompt : sizes({0, 1, 40, 90})) {
      EXPECT_LT(max_difference(logits(plan, {.chunk = chunk}, tokens, prompt), expected), kBound)
          << "chunk " << chunk << ", prompt " << prompt;
    }
  }
}

TEST_F(DecoderTest, EqualsTheDoubleForwardWindowedHoweverThePromptIsCut) {
  const auto tokens = random_tokens(90);
  const Rows expected = oracle_.logits(tokens, sees_window);
  for (const std::size_t chunk : sizes({1, 2, 3, 9, 13, 14, 63, 64, 65, 90})) {
    for (const std::size_t prompt : sizes({1, 50, 90})) {
      EXPECT_LT(max_difference(logits(hard_masked(), {.chunk = chunk}, tokens, prompt), expected),
                kBound)
          << "chunk " << chunk << ", prompt " << prompt;
    }
  }
}

TEST_F(DecoderTest, EqualsTheDoubleForwardChunkCausal) {
  const auto tokens = random_tokens(90);
  for (const int chunk : {1, 5, 13, 50, 80}) {
    for (const int prompt : {1, 50, 80}) {
      // What the chunk's first query sees, and the chunk itself; decode obeys the window.
      const auto sees = [&](int layer, int head, int i, int j) {
        const int start = i < prompt ? i / chunk * chunk : i;
        return !kStreams[layer][head] || j < kWindow.sink || start - j < kWindow.recent;
      };
      const RunOptions run{PrefillMode::kChunkCausal, static_cast<std::size_t>(chunk)};
      const Matrix got = logits(hard_masked(), run, tokens, static_cast<std::size_t>(prompt));
      EXPECT_LT(max_difference(got, oracle_.logits(tokens, sees)), kBound)
          << "chunk " << chunk << ", prompt " << prompt;
    }
  }
}

TEST_F(DecoderTest, TellsMasksApart) {  // or the bounds above would mean nothing
  const auto tokens = random_tokens(90);
  const Matrix windowed = logits(hard_masked(), {}, tokens, 90);
  EXPECT_GT(max_difference(windowed, oracle_.logits(tokens, sees_everything)), 20 * kBound);
}

TEST_F(DecoderTest, BatchesSequencesOfUnequalLengthAsIfEachWereAlone) {
  const std::vector<std::vector<Token>> prompts{random_tokens(3), random_tokens(70),
                                                random_tokens(31), random_tokens(1)};
  const HeadPlan plan = hard_masked();
  headwise::KvCache<headwise::f32> cache(model_.config.shape(), plan,
                                         {.max_sequences = 4, .max_context = 80});
  Decoder<headwise::KvCache<headwise::f32>, headwise::SerialExecutor> decoder(model_, 80,
                                                                              executor_);
  Batch batch;
  for (const auto& prompt : prompts) batch.add(cache.add_sequence().value(), prompt);
  decoder.forward(cache, batch);
  const auto num_rows = static_cast<Eigen::Index>(batch.tokens.size());
  const Matrix together = decoder.logits(0, num_rows);

  Eigen::Index row = 0;
  for (const auto& prompt : prompts) {
    const auto length = static_cast<Eigen::Index>(prompt.size());
    const Rows alone = oracle_.logits(prompt, sees_window);
    EXPECT_LT(max_difference(together.middleCols(row, length), alone), kBound);
    row += length;
  }
}

TEST_F(DecoderTest, GeneratesForMoreRequestsThanTheCacheHasSequences) {
  std::vector<std::vector<Token>> prompts;
  for (const std::size_t length : sizes({5, 40, 1, 22, 70}))
    prompts.push_back(random_tokens(length));
  constexpr std::size_t kMaxNew = 12;
  std::vector<Request> requests;
  for (const auto& prompt : prompts) requests.push_back({prompt, /*stop=*/-1, kMaxNew});
  const auto run = [&](int max_sequences) {
    headwise::KvCache<headwise::f32> cache(
        model_.config.shape(), hard_masked(),
        {.max_sequences = max_sequences, .max_context = 70 + kMaxNew});
    Decoder<headwise::KvCache<headwise::f32>, headwise::SerialExecutor> decoder(
        model_, 70 + kMaxNew, executor_);
    DecodeTime time;
    std::size_t num_finished = 0;
    const auto outputs = generate(decoder, cache, requests, 16, time, [&] { ++num_finished; });
    EXPECT_EQ(num_finished, requests.size());
    return outputs;
  };
  const auto unstopped = run(5);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    ASSERT_EQ(unstopped[i].size(), kMaxNew);
    std::vector<Token> tokens = prompts[i];
    tokens.insert(tokens.end(), unstopped[i].begin(), unstopped[i].end());
    const Rows logits = oracle_.logits(tokens, sees_window);
    for (std::size_t n = 0; n < kMaxNew; ++n) {  // greedy, up to near ties
      const auto& row = logits[prompts[i].size() + n - 1];
      EXPECT_GT(row[static_cast<std::size_t>(unstopped[i][n])],
                *std::max_element(row.begin(), row.end()) - 2 * kBound);
    }
  }
  EXPECT_EQ(run(1), unstopped);
  for (std::size_t i = 0; i < requests.size(); ++i) requests[i].stop = unstopped[i][2 * i];
  const auto stopped = run(2);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    ASSERT_LE(stopped[i].size(), 2 * i + 1);
    EXPECT_EQ(stopped[i].back(), requests[i].stop);
    EXPECT_TRUE(std::equal(stopped[i].begin(), stopped[i].end(), unstopped[i].begin()));
  }
}

}  // namespace
}  // namespace needle_lm::testing
