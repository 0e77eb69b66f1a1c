// SPDX-License-Identifier: MIT
// Finding heads: against the training's own numbers, and against a forward in double.
#include "identify.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "double_forward.hpp"
#include "headwise/attention/stored_rows.hpp"
#include "headwise/core/executor.hpp"
#include "headwise/heads/tsv.hpp"
#include "random_model.hpp"
#include "safetensors.hpp"
#include "weights.hpp"

namespace needle_lm::testing {
namespace {

using FullPrecision = headwise::KvCache<headwise::f32>;

/// Runs a method and counts the texts that it reads.
FoundHeads identify(const Model& model, const SafeTensors* file, const IdentifyOptions& options) {
  headwise::SerialExecutor executor;
  std::size_t num_forwards = 0;
  const auto count = [&] { ++num_forwards; };
  using Method = Identify<FullPrecision, headwise::SerialExecutor, decltype(count)>;
  FoundHeads found = Method(model, file, options, executor, count).run();
  EXPECT_EQ(num_forwards, Method::num_forwards(options, found.scores.num_heads()));
  return found;
}

class IdentifyTest : public ::testing::Test {
 protected:
  static constexpr int kDocuments = 6;
  static constexpr int kLength = 80;
  static constexpr int kPrompt = 70;
  static constexpr int kAnswered = 8;

  /// Documents of random tokens; token 1 of each is its number.
  void SetUp() override {
    std::mt19937 random(3);
    std::string data;
    nlohmann::json header;
    const auto add = [&](const std::string& name, const std::string& dtype,
                         const std::vector<int>& shape, const std::string& bytes) {
      header[name] = {{"dtype", dtype},
                      {"shape", shape},
                      {"data_offsets", {data.size(), data.size() + bytes.size()}}};
      data += bytes;
    };
    const auto numbers = [](int number) {
      std::string bytes;
      for (int i = 0; i < kDocuments; ++i) {
        bytes.append(reinterpret_cast<const char*>(&number), sizeof number);
      }
      return bytes;
    };
    for (const std::string task : {"passkey", "cot"}) {
      std::string tokens;
      for (int i = 0; i < kDocuments * kLength; ++i) {
        tokens +=
            static_cast<char>(i % kLength == 1 ? i / kLength : static_cast<int>(random() % 41));
      }
      add(task + ".tokens", "U8", {kDocuments, kLength}, tokens);
      add(task + ".prompt_length", "I32", {kDocuments}, numbers(kPrompt));
      add(task + ".answer_length", "I32", {kDocuments}, numbers(kAnswered));
    }
    write_text(folder_.file("documents"), safetensors_bytes(header.dump(), data));
  }

  TemporaryFolder folder_;
  nlohmann::json config_ = small_config();
  NamedTensors weights_ = random_weights(config_, 23);
  Model model_ = load_model(write_model(folder_, config_, weights_));
};

TEST_F(IdentifyTest, ObserversSeeTheKeysThatTheCacheStores) {
  const headwise::ModelShape shape = model_.config.shape();
  headwise::SerialExecutor executor;
  FullPrecision cache(shape, headwise::HeadPlan(shape), {.max_context = 30});
  Decoder<FullPrecision, headwise::SerialExecutor> decoder(model_, 30, executor);
  std::vector<std::vector<float>> seen(3);  // [layer][token, KV head, dim]
  decoder.observe([&](int layer, headwise::TensorView<const float>,
                      headwise::TensorView<const float> k, std::int64_t num_tokens) {
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      for (int h = 0; h < 2; ++h) {
        auto& of = seen[static_cast<std::size_t>(layer)];
        of.insert(of.end(), k.row(t, h), k.row(t, h) + 16);
      }
    }
  });
  const auto sequence = cache.add_sequence().value();
  for (const int count : {20, 1, 9}) {
    Batch batch;
    batch.add(sequence, std::vector<Token>(static_cast<std::size_t>(count), Token{count}));
    decoder.forward(cache, batch);
  }
  headwise::StoredRows rows;
  for (int layer = 0; layer < 3; ++layer) {
    const auto& of = seen[static_cast<std::size_t>(layer)];
    ASSERT_EQ(of.size(), 30U * 2 * 16);
    for (int h = 0; h < 2; ++h) {
      rows.read(cache.stored(sequence, layer, h));
      const headwise::RowView keys = rows.keys();
      ASSERT_EQ(keys.count, 30);
      for (std::int64_t t = 0; t < 30; ++t) {
        EXPECT_TRUE(std::equal(keys.row(t), keys.row(t) + 16, of.data() + (t * 2 + h) * 16));
      }
    }
  }
}

std::set<Token> numbers_of(const std::vector<Document>& documents) {
  std::set<Token> numbers;
  for (const Document& document : documents) numbers.insert(document.tokens[1]);
  return numbers;
}

TEST_F(IdentifyTest, DrawsFromTheSecondHalf) {
  const SafeTensors file(folder_.file("documents"));
  const auto draw = [&](std::size_t count, std::uint64_t seed) {
    return numbers_of(calibration_documents(file, "cot", 2, count, seed, model_.config));
  };
  EXPECT_EQ(draw(3, 1), (std::set<Token>{3, 4, 5}));  // none twice, none of 0..2
  std::set<Token> firsts;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    EXPECT_EQ(draw(1, seed), draw(1, seed));
    firsts.merge(draw(1, seed));
  }
  EXPECT_EQ(firsts, (std::set<Token>{3, 4, 5}));
  EXPECT_THROW(draw(4, 1), headwise::ConfigError);
  EXPECT_THROW(draw(0, 1), headwise::ConfigError);
}

TEST_F(IdentifyTest, MeasuresWhatTheDoubleForwardLoses) {
  const SafeTensors file(folder_.file("documents"));
  const IdentifyOptions options{
      .method = "measured", .documents = 1, .seed = 5, .window = {.sink = 3, .recent = 10}};
  const FoundHeads found = identify(model_, &file, options);
  const DoubleForward oracle{config_, weights_};
  std::vector<Document> texts = calibration_documents(file, "passkey", 6, 1, 5, model_.config);
  texts.push_back(calibration_documents(file, "cot", 2, 1, 5, model_.config)[0]);
  const auto log_probability = [](const std::vector<double>& logits, std::size_t i) {
    double sum = 0.0;
    for (const double x : logits) sum += std::exp(x);
    return logits[i] - std::log(sum);
  };
  for (int layer = 0; layer < 3; ++layer) {
    for (int head = 0; head < 2; ++head) {
      double nats = 0.0;
      for (const Document& document : texts) {
        const Rows full = oracle.logits(document.tokens, [](int, int, int, int) { return true; });
        const Rows other = oracle.logits(document.tokens, [&](int l, int h, int i, int j) {
          return l != layer || h != head || j < 3 || i - j < 10;
        });
        // Row t is of the token after t: the answer's come after the last of the prompt.
        for (std::size_t t = kPrompt - 1; t < kPrompt - 1 + kAnswered; ++t) {
          for (std::size_t i = 0; i < full[t].size(); ++i) {
            const double log_p = log_probability(full[t], i);
            nats += std::exp(log_p) * (log_p - log_probability(other[t], i));
          }
        }
      }
      const double expected = nats / (2 * kAnswered);
      EXPECT_NEAR(found.scores.value(layer, head), expected, 1e-3 * expected + 1e-6);
    }
  }
  IdentifyOptions greedy = options;
  greedy.greedy = 3;
  const auto ranks = identify(model_, &file, greedy).scores;
  EXPECT_EQ(std::set<double>(ranks.values().begin(), ranks.values().end()).size(), 6U);
  // The first head to stream is the cheapest alone.
  EXPECT_EQ(std::ranges::min_element(ranks.values()) - ranks.values().begin(),
            std::ranges::min_element(found.scores.values()) - found.scores.values().begin());
}

TEST_F(IdentifyTest, ReadsEveryTextOnce) {
  const SafeTensors file(folder_.file("documents"));
  const FoundHeads local = identify(model_, &file, {.method = "on_the_fly", .documents = 3});
  EXPECT_GT(*std::ranges::min_element(local.scores.values()), 0.0);
  const FoundHeads razor = identify(model_, nullptr, {.method = "razor", .documents = 2});
  ASSERT_TRUE(razor.echo.has_value());
  EXPECT_NE(razor.scores, *razor.echo);
  // Random tokens have no needle.
  EXPECT_THROW(identify(model_, &file, {.method = "retrieval"}), headwise::ConfigError);
  EXPECT_THROW(identify(model_, &file, {.method = "retrieval", .documents = 1}),
               headwise::FormatError);
}

/// Where all gates are 1 the passes are the same: the first step is the pull's alone. The second
/// texts' states pull back where they depend on what the window hides.
TEST_F(IdentifyTest, TrainsGatesOnTheTextsOfTheTask) {
  const SafeTensors file(folder_.file("documents"));
  IdentifyOptions options{
      .method = "duo", .documents = 2, .window = {.sink = 2, .recent = 9}, .steps = 1};
  const auto first = identify(model_, &file, options).scores;
  for (const double gate : first.values()) EXPECT_NEAR(gate, 0.98, 1e-4);
  options.steps = 40;
  options.l1_weight = 1000.0;  // whatever it costs
  const auto pulled = identify(model_, &file, options).scores;
  for (const double gate : pulled.values()) {
    EXPECT_NEAR(gate, 0.34, 0.01);  // as far as the schedule goes: the sum of its rates is 0.66
  }
  options.l1_weight = 1e-4;
  const auto gates = identify(model_, &file, options).scores;
  EXPECT_GT(*std::ranges::max_element(gates.values()), 0.95);
}

TEST(NeedlePosition, IsThatOfTheKeyThatIsAskedFor) {
  // # 9 1 2 ; twice, the second time under the key that the end asks for.
  const Document document{{1, 4, 9, 7, 8, 6, 4, 3, 7, 8, 6, 50, 5, 3, 7, 8, 6}, 14, 3};
  EXPECT_EQ(needle_position(document), headwise::Pos{8});
  Document other = document;
  other.tokens[8] = 9;
  EXPECT_THROW((void)needle_position(other), headwise::FormatError);
}

#ifdef NEEDLE_LM_DIR

class IdentifyTrainedTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(in("model/model.safetensors"))) GTEST_SKIP() << "no trained model";
    model_ = load_model(in("model/model.safetensors"));
  }
  static std::string in(const std::string& path) { return std::string(NEEDLE_LM_DIR) + "/" + path; }
  /// Scores that the training wrote, of other random prompts.
  static void expect_near(const headwise::HeadScores& scores, const std::string& path) {
    const headwise::HeadScores trained = headwise::load_tsv(in(path));
    for (int layer = 0; layer < 6; ++layer) {
      for (int head = 0; head < 4; ++head) {
        EXPECT_NEAR(scores.value(layer, head), trained.value(layer, head), 0.02)
            << path << ", head " << layer << "." << head;
      }
    }
  }

  Model model_;
};

TEST_F(IdentifyTrainedTest, FindsTheRazorScoresOfTheTraining) {
  const FoundHeads found = identify(model_, nullptr, {.method = "razor", .documents = 2});
  expect_near(found.scores, "heads/razor_induction.tsv");
  expect_near(found.echo.value(), "heads/razor_echo.tsv");
}

TEST_F(IdentifyTrainedTest, TrainsTheLastLayerToLookBack) {
  const SafeTensors file(in("data/documents.safetensors"));
  const auto gates = identify(model_, &file, {.method = "duo", .documents = 2, .steps = 3}).scores;
  for (int layer = 0; layer < 6; ++layer) {
    for (int head = 0; head < 4; ++head) {
      EXPECT_EQ(gates.value(layer, head) > 0.97, layer == 5) << layer << "." << head;
    }
  }
}

TEST_F(IdentifyTrainedTest, FindsThatTheLastLayerCopies) {
  const SafeTensors file(in("data/documents.safetensors"));
  const FoundHeads found = identify(model_, &file, {.method = "retrieval", .documents = 1});
  for (int layer = 0; layer < 6; ++layer) {
    for (int head = 0; head < 4; ++head) {
      const double score = found.scores.value(layer, head);
      EXPECT_TRUE(layer == 5 ? score > 0.8 : score < 0.2) << layer << "." << head;
    }
  }
}

#endif

}  // namespace
}  // namespace needle_lm::testing
