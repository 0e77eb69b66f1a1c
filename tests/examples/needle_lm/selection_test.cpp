// SPDX-License-Identifier: MIT
// Run-time selection in the example: who keeps what, what is read for it, and the rows it makes.
#include "selection.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "evaluate.hpp"
#include "evaluate_selections.hpp"
#include "prompt_reader.hpp"
#include "random_model.hpp"
#include "reconstruction.hpp"
#include "tasks.hpp"
#include "weights.hpp"

namespace needle_lm::testing {
namespace {

using headwise::HeadPlan;
using headwise::KeepSelected;
using headwise::KeepWindow;
using headwise::KeptPositions;
using headwise::TokenScores;
using SelectionExecutor = headwise::SerialExecutor;
using FloatCache = headwise::KvCache<headwise::f32>;

constexpr SelectionMethod kEveryMethod[] = {
    SelectionMethod::kSnapKv,    SelectionMethod::kAdaKv,
    SelectionMethod::kPyramidKv, SelectionMethod::kExpectedAttention,
    SelectionMethod::kKvZip,     SelectionMethod::kTriAttention};

// ---- Scores to kept positions
// ---------------------------------------------------------------------

/// Scores of 4 layers of 2 heads over 400 tokens: head 0's lie above head 1's, and in both later
/// tokens score more; only of heads that `plan` selects from.
PromptScores rising_scores(const HeadPlan& plan, std::int64_t length) {
  PromptScores scores;
  scores.length = length;
  scores.question = 3;
  TokenScores model(length);
  for (int layer = 0; layer < plan.num_layers(); ++layer) {
    TokenScores group(length);
    for (int head = 0; head < 2; ++head) {
      if (!is_selected(plan.budget(layer, head))) continue;
      for (TokenScores* to : {&group, &model}) {
        const auto of_head = to->add_head();
        for (std::size_t j = 0; j < of_head.size(); ++j) {
          of_head[j] = static_cast<float>(j) + (head == 0 ? 1000.0F : 0.0F) -
                       (layer == 3 && to == &model ? 5000.0F : 0.0F);
        }
      }
    }
    for (auto* groups : {&scores.snap_kv, &scores.expected_attention, &scores.tri_attention}) {
      groups->push_back(group);
    }
  }
  scores.kv_zip.push_back(model);
  return scores;
}

class SelectTest : public ::testing::Test {
 protected:
  static constexpr std::int64_t kLength = 400;

  KeptPositions kept_by(SelectionMethod method, double share, const HeadPlan& plan) {
    return select(policies_, plan, rising_scores(plan, kLength), {method, share});
  }
  static std::vector<std::int64_t> counts(const KeptPositions& kept) {
    std::vector<std::int64_t> all;
    for (std::int64_t h = 0; h < kept.num_heads(); ++h) all.push_back(std::ssize(kept.of_head(h)));
    return all;
  }

  SelectionPolicies policies_{10000.0};
  HeadPlan plan_ = with_selection(HeadPlan(headwise::ModelShape::uniform(4, 4, 2, 16)));
};

TEST_F(SelectTest, SharesTokensAsEachMethodDoes) {
  using Counts = std::vector<std::int64_t>;
  const Counts even(8, 100);
  for (const auto method : {SelectionMethod::kSnapKv, SelectionMethod::kExpectedAttention,
                            SelectionMethod::kTriAttention}) {
    EXPECT_EQ(counts(kept_by(method, 0.25, plan_)), even);
  }
  // The safeguard of a fifth, all others to the head that scores more.
  EXPECT_EQ(counts(kept_by(SelectionMethod::kAdaKv, 0.25, plan_)),
            (Counts{180, 20, 180, 20, 180, 20, 180, 20}));
  // A line from 2 * 100 - 5 to 5, where that leaves no window of 8: flat. At half: 390 to 10.
  EXPECT_EQ(counts(kept_by(SelectionMethod::kPyramidKv, 0.25, plan_)), even);
  EXPECT_EQ(counts(kept_by(SelectionMethod::kPyramidKv, 0.5, plan_)),
            (Counts{390, 390, 263, 263, 137, 137, 10, 10}));
  // One cut over the model: layer 3 is left with `<s>` and the question.
  const Counts zip = counts(kept_by(SelectionMethod::kKvZip, 0.25, plan_));
  EXPECT_EQ(std::accumulate(zip.begin(), zip.end(), std::int64_t{0}), 800);
  EXPECT_EQ(zip[6], 4);
  EXPECT_EQ(zip[7], 4);
  EXPECT_GT(zip[0], zip[1]);
}

TEST_F(SelectTest, KeepsTheQuestionAndWhatTheMethodProtects) {
  const std::map<SelectionMethod, std::int64_t> sinks{{SelectionMethod::kExpectedAttention, 4},
                                                      {SelectionMethod::kKvZip, 1}};
  for (const SelectionMethod method : kEveryMethod) {
    PromptScores scores = rising_scores(plan_, kLength);
    for (auto* groups :
         {&scores.snap_kv, &scores.expected_attention, &scores.tri_attention, &scores.kv_zip}) {
      for (TokenScores& group : *groups) {
        for (std::int64_t h = 0; h < group.num_heads(); ++h) {
          std::ranges::reverse(group.scores(h));  // the last tokens score least
        }
      }
    }
    const KeptPositions kept = select(policies_, plan_, scores, {method, 0.1});
    for (std::int64_t h = 0; h < kept.num_heads(); ++h) {
      const auto positions = kept.of_head(h);
      for (std::int32_t last = kLength - 3; last < kLength; ++last) {
        EXPECT_TRUE(std::ranges::binary_search(positions, last)) << id_of(method);
      }
      if (sinks.contains(method)) {
        EXPECT_EQ(positions[0], 0) << id_of(method);
      }
    }
  }
}

TEST_F(SelectTest, LeavesStreamingHeadsAlone) {
  HeadPlan base(headwise::ModelShape::uniform(4, 4, 2, 16));
  base.set(0, 0, KeepWindow{{4, 60}});
  for (const int head : {0, 1}) base.set(2, head, KeepWindow{{4, 60}});
  const HeadPlan plan = with_selection(base);
  EXPECT_EQ(plan.budget(0, 0), base.budget(0, 0));
  EXPECT_EQ(plan.budget(0, 1), headwise::HeadBudget(KeepSelected{}));
  for (const SelectionMethod method : kEveryMethod) {
    const KeptPositions kept = kept_by(method, 0.5, plan);
    ASSERT_EQ(kept.num_heads(), 8);
    for (std::int64_t h = 0; h < 8; ++h) {
      EXPECT_EQ(kept.of_head(h).empty(), h == 0 || h == 4 || h == 5) << id_of(method) << " " << h;
    }
  }
}

TEST_F(SelectTest, RefusesAShareBelowWhatIsProtected) {
  EXPECT_THROW(static_cast<void>(kept_by(SelectionMethod::kSnapKv, 0.01, plan_)),
               headwise::ConfigError);
}

TEST(QuestionLength, IsFromTheLastQuestionMarkOn) {
  const auto length = [](std::vector<Token> prompt) { return question_length(prompt); };
  EXPECT_EQ(length({1, 70, 5, 96}), 2U);
  EXPECT_EQ(length({1, 5, 70, 5, 32, 13}), 3U);
  EXPECT_EQ(length({1, 5, 70, 71, 72}), 0U);
  EXPECT_EQ(length({5}), 1U);
  EXPECT_EQ(length({}), 0U);
}

// ---- What is read
// ---------------------------------------------------------------------------------

class PromptReaderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    model_ = load_model(write_model(folder_, small_config(), random_weights(small_config(), 11)));
    plan_ = with_selection(HeadPlan(model_.config.shape()));
  }

  std::vector<Token> random_prompt(std::size_t length) {
    std::uniform_int_distribution<Token> token(6, model_.config.vocab_size - 1);
    std::vector<Token> tokens(length);
    for (Token& t : tokens) t = token(random_);
    tokens[length - 3] = kQuestion;
    return tokens;
  }

  /// A layer-0 query of a token before rotary positions, by a product of our own in double.
  std::vector<double> plain_query(Token token, int query_head) const {
    const ModelConfig& config = model_.config;
    std::vector<double> x;
    double squares = 0.0;
    for (int i = 0; i < config.hidden_size; ++i) {
      x.push_back(static_cast<double>(model_.embedding(token, i)));
      squares += x.back() * x.back();
    }
    const double scale =
        1.0 / std::sqrt(squares / config.hidden_size + static_cast<double>(config.norm_epsilon));
    std::vector<double> q;
    for (int d = 0; d < config.head_dim; ++d) {
      double sum = 0.0;
      for (int i = 0; i < config.hidden_size; ++i) {
        sum += static_cast<double>(model_.layers[0].qkv(query_head * config.head_dim + d, i)) *
               x[static_cast<std::size_t>(i)] * scale *
               static_cast<double>(model_.layers[0].attention_norm(i));
      }
      q.push_back(sum);
    }
    return q;
  }

  /// Q and K of all layers of `tokens` in one step over the full cache.
  struct Observed {
    std::vector<std::vector<float>> q, k;  // [layers], [tokens, heads, head_dim]
  };
  Observed observed(const std::vector<Token>& tokens) {
    const ModelConfig& config = model_.config;
    const auto n = static_cast<std::int64_t>(tokens.size());
    FloatCache cache(config.shape(), HeadPlan(config.shape()), {.max_context = n});
    Decoder<FloatCache, SelectionExecutor> decoder(model_, n, executor_);
    Observed all;
    decoder.observe([&](int, headwise::TensorView<const float> q,
                        headwise::TensorView<const float> k, std::int64_t count) {
      all.q.emplace_back();
      all.k.emplace_back();
      for (std::int64_t i = 0; i < count; ++i) {
        all.q.back().insert(all.q.back().end(), q.row(i, 0), q.row(i, 0) + config.q_size());
        all.k.back().insert(all.k.back().end(), k.row(i, 0), k.row(i, 0) + config.kv_size());
      }
    });
    Batch batch;
    batch.add(cache.add_sequence().value(), tokens);
    decoder.forward(cache, batch);
    return all;
  }

  double logit(const Observed& of, std::size_t layer, std::size_t query, int query_head,
               std::size_t key) const {
    const ModelConfig& config = model_.config;
    const int group = config.num_qo_heads / config.num_kv_heads;
    const auto dim = static_cast<std::size_t>(config.head_dim);
    const float* q = of.q[layer].data() + query * static_cast<std::size_t>(config.q_size()) +
                     static_cast<std::size_t>(query_head) * dim;
    const float* k = of.k[layer].data() + key * static_cast<std::size_t>(config.kv_size()) +
                     static_cast<std::size_t>(query_head / group) * dim;
    double dot = 0.0;
    for (std::size_t d = 0; d < dim; ++d) {
      dot += static_cast<double>(q[d]) * static_cast<double>(k[d]);
    }
    return dot / std::sqrt(static_cast<double>(config.head_dim));
  }

  /// A query as it was before rotary positions.
  std::vector<float> turned_back(const Observed& of, std::size_t layer, std::size_t token,
                                 int query_head) const {
    const auto dim = static_cast<std::size_t>(model_.config.head_dim);
    const float* q = of.q[layer].data() + token * static_cast<std::size_t>(model_.config.q_size()) +
                     static_cast<std::size_t>(query_head) * dim;
    std::vector<float> plain(dim);
    for (std::size_t i = 0; i < dim / 2; ++i) {
      const double angle = static_cast<double>(token) *
                           std::pow(model_.config.rope_theta,
                                    -2.0 * static_cast<double>(i) / static_cast<double>(dim));
      const auto x = static_cast<double>(q[i]);
      const auto y = static_cast<double>(q[i + dim / 2]);
      plain[i] = static_cast<float>(x * std::cos(angle) + y * std::sin(angle));
      plain[i + dim / 2] = static_cast<float>(y * std::cos(angle) - x * std::sin(angle));
    }
    return plain;
  }

  QueryCentres centres(const std::vector<Document>& texts) {
    return calibrated_centres<FloatCache>(model_, texts, executor_);
  }

  std::mt19937 random_{5};
  TemporaryFolder folder_;
  Model model_;
  HeadPlan plan_{headwise::ModelShape::uniform(3, 4, 2, 16)};
  SelectionExecutor executor_;
};

TEST_F(PromptReaderTest, CentresAreTheMeanOfQueriesBeforeRotaryPositions) {
  std::vector<Document> texts;
  for (const std::size_t length : {30U, 17U}) texts.push_back({random_prompt(length), 3, 3});
  const QueryCentres found = centres(texts);
  ASSERT_EQ(found.size(), 12U);
  for (int head = 0; head < 4; ++head) {
    std::vector<double> real(8, 0.0);
    std::vector<double> imaginary(8, 0.0);
    std::vector<double> length(8, 0.0);
    for (const Document& text : texts) {
      for (const Token token : text.tokens) {
        const std::vector<double> q = plain_query(token, head);
        for (std::size_t i = 0; i < 8; ++i) {
          real[i] += q[i] / 47.0;
          imaginary[i] += q[i + 8] / 47.0;
          length[i] += std::hypot(q[i], q[i + 8]) / 47.0;
        }
      }
    }
    const auto& centre = found[static_cast<std::size_t>(head)];
    EXPECT_EQ(centre.count(), 47);
    for (std::size_t i = 0; i < 8; ++i) {
      EXPECT_NEAR(centre.real(i), real[i], 1e-4);
      EXPECT_NEAR(centre.imaginary(i), imaginary[i], 1e-4);
      EXPECT_NEAR(centre.length(i), length[i], 1e-4);
    }
  }
}

TEST_F(PromptReaderTest, ScoresAsTheMethodsDoHoweverThePromptIsCut) {
  const std::vector<Token> prompt = random_prompt(90);
  const SelectionPolicies policies(model_.config.rope_theta);
  const QueryCentres calibrated = centres({{random_prompt(40), 3, 3}});
  const Observed of = observed(prompt);
  constexpr std::int64_t kLongest = 90 + kRepeated + kCue;
  for (const std::size_t chunk : {512U, 7U}) {
    FloatCache cache(model_.config.shape(), plan_, {.max_sequences = 2, .max_context = kLongest});
    Decoder<FloatCache, SelectionExecutor> decoder(model_, kLongest, executor_);
    PromptReader<FloatCache, SelectionExecutor> reader(model_.config, plan_, policies, calibrated,
                                                       decoder, cache, executor_);
    const ScoredPrompt read = reader.read(prompt, chunk);
    EXPECT_EQ(read.scores.length, 90);
    EXPECT_EQ(read.scores.question, 3);
    EXPECT_EQ(cache.length(read.started.sequence), 90);  // nothing of the pass is left

    // SnapKV, in double: the last 8 queries' weights, their mean over the group, pooled.
    for (std::size_t layer = 0; layer < 3; ++layer) {
      for (int head = 0; head < 2; ++head) {
        std::vector<double> mean(82, 0.0);
        for (int query_head = 2 * head; query_head < 2 * head + 2; ++query_head) {
          for (std::size_t i = 82; i < 90; ++i) {
            double sum = 0.0;
            for (std::size_t j = 0; j <= i; ++j)
              sum += std::exp(logit(of, layer, i, query_head, j));
            for (std::size_t j = 0; j < 82; ++j) {
              mean[j] += std::exp(logit(of, layer, i, query_head, j)) / sum / 16.0;
            }
          }
        }
        const auto scores = read.scores.snap_kv[layer].scores(head);
        for (std::size_t j = 0; j < 82; ++j) {
          const auto first = mean.begin() + static_cast<std::ptrdiff_t>(j < 3 ? 0 : j - 3);
          const auto last =
              mean.begin() + static_cast<std::ptrdiff_t>(std::min<std::size_t>(82, j + 4));
          EXPECT_NEAR(scores[j], *std::max_element(first, last), 1e-5) << layer << head << j;
        }
      }
    }

    // Expected Attention and TriAttention: moments of queries turned back, from the sinks on.
    headwise::StoredRows rows;
    for (int layer = 0; layer < 3; ++layer) {
      for (int head = 0; head < 2; ++head) {
        std::vector<headwise::QueryMoments> moments;
        for (int query_head = 2 * head; query_head < 2 * head + 2; ++query_head) {
          headwise::QueryMoments& of_head = moments.emplace_back(16);
          for (std::size_t i = 4; i < 90; ++i) {
            const auto row = turned_back(of, static_cast<std::size_t>(layer), i, query_head);
            of_head.add(headwise::RowView::dense(row.data(), 1, 16));
          }
        }
        rows.read(cache.stored(read.started.sequence, layer, head));
        const auto stored = cache.stored_positions(read.started.sequence, layer, head);
        TokenScores expected(90);
        headwise::expected_attention::add_head({.rope = {.theta = 1000.0}}, moments, rows.keys(),
                                               rows.values(), stored, expected);
        const auto first_centre = static_cast<std::size_t>(4 * layer + 2 * head);
        headwise::tri_attention::add_head({.recent = 3, .rope = {.theta = 1000.0}},
                                          std::span(calibrated).subspan(first_centre, 2),
                                          rows.keys(), stored, expected);
        const auto in_layer = static_cast<std::size_t>(layer);
        for (std::size_t j = 0; j < 90; ++j) {
          EXPECT_NEAR(read.scores.expected_attention[in_layer].scores(head)[j],
                      expected.scores(0)[j], 1e-5);
          EXPECT_NEAR(read.scores.tri_attention[in_layer].scores(head)[j], expected.scores(1)[j],
                      1e-4);
        }
      }
    }
  }
}

TEST_F(PromptReaderTest, KeepsTheQuestionFromKvZipAlone) {
  std::vector<Token> prompt = random_prompt(60);
  const SelectionPolicies policies(model_.config.rope_theta);
  const QueryCentres calibrated = centres({{random_prompt(40), 3, 3}});
  constexpr std::int64_t kLongest = 60 + kRepeated + kCue;
  FloatCache cache(model_.config.shape(), plan_, {.max_sequences = 3, .max_context = kLongest});
  Decoder<FloatCache, SelectionExecutor> decoder(model_, kLongest, executor_);
  PromptReader<FloatCache, SelectionExecutor> reader(model_.config, plan_, policies, calibrated,
                                                     decoder, cache, executor_);
  const ScoredPrompt one = reader.read(prompt, 512);
  prompt[59] = prompt[59] == 20 ? 21 : 20;
  const ScoredPrompt other = reader.read(prompt, 512);
  const auto scores = [](const std::vector<TokenScores>& group, std::int64_t head) {
    const auto all = group.back().scores(head);
    return std::vector<float>(all.begin(), all.begin() + 57);
  };
  EXPECT_EQ(scores(one.scores.kv_zip, 5), scores(other.scores.kv_zip, 5));
  EXPECT_NE(scores(one.scores.snap_kv, 1), scores(other.scores.snap_kv, 1));
  EXPECT_NE(scores(one.scores.expected_attention, 1), scores(other.scores.expected_attention, 1));
  EXPECT_EQ(scores(one.scores.tri_attention, 1), scores(other.scores.tri_attention, 1));
}

TEST_F(PromptReaderTest, RepeatsTheContextAndNotesWhatIsLookedAt) {
  constexpr std::size_t kContext = 600;  // two chunks after `<s>`: 512, and 87 behind a cue of 8
  const std::vector<Token> context = random_prompt(kContext);
  constexpr std::int64_t kLongest = kContext + kRepeated + kCue;
  FloatCache cache(model_.config.shape(), plan_, {.max_sequences = 2, .max_context = kLongest});
  Decoder<FloatCache, SelectionExecutor> decoder(model_, kLongest, executor_);
  const auto sequence = cache.add_sequence().value();
  prefill(decoder, cache, sequence, std::span(context), 512);
  const auto maxima = Reconstruction<FloatCache, SelectionExecutor>(model_.config.shape(), plan_,
                                                                    decoder, cache, executor_)
                          .run(sequence, context, 1, kContext + 3);
  ASSERT_EQ(maxima.size(), 6U);
  EXPECT_EQ(cache.length(sequence), static_cast<std::int64_t>(kContext));

  struct Chunk {
    std::size_t first, last, cue;
  };
  for (const auto& [first, last, cue] : {Chunk{1, 513, 0}, Chunk{513, 600, 8}}) {
    std::vector<Token> twice = context;
    twice.insert(twice.end(), context.begin() + static_cast<std::ptrdiff_t>(first - cue),
                 context.begin() + static_cast<std::ptrdiff_t>(last));
    const Observed of = observed(twice);
    for (const std::size_t layer : {0U, 2U}) {
      std::vector<double> largest(last - first, 0.0);
      for (const int query_head : {2, 3}) {
        for (std::size_t i = kContext; i < twice.size(); ++i) {
          double sum = std::exp(logit(of, layer, i, query_head, 0));
          std::vector<double> weights;
          for (std::size_t j = first; j < last; ++j) {
            weights.push_back(std::exp(logit(of, layer, i, query_head, j)));
            sum += weights.back();
          }
          for (std::size_t j = kContext; j <= i; ++j) {
            sum += std::exp(logit(of, layer, i, query_head, j));
          }
          for (std::size_t j = 0; j < weights.size(); ++j) {
            largest[j] = std::max(largest[j], weights[j] / sum);
          }
        }
      }
      TokenScores scores(kContext + 3);
      std::vector<std::int32_t> stored(kContext + 3);
      std::iota(stored.begin(), stored.end(), 0);
      maxima[2 * layer + 1].add_head(stored, scores);
      for (std::size_t j = first; j < last; ++j) {
        ASSERT_NEAR(scores.scores(0)[j], largest[j - first], 1e-4) << layer << " " << j;
      }
      EXPECT_EQ(scores.scores(0)[0], 0.0F);
      EXPECT_EQ(scores.scores(0)[kContext], 0.0F);
    }
  }
}

// ---- Rows
// -----------------------------------------------------------------------------------------

class SelectionRowsTest : public PromptReaderTest {
 protected:
  void SetUp() override {
    PromptReaderTest::SetUp();
    const auto documents = [&](std::size_t count) {
      std::vector<Document> all;
      for (std::size_t i = 0; i < count; ++i) all.push_back({random_prompt(150), 120 + 3 * i, 5});
      return all;
    };
    tasks_ = {{"passkey", kEndOfNeedle, documents(3)}, {"cot", kEndOfSequence, documents(3)}};
    centres_ = centres({tasks_.cot.documents[2]});
    streaming_ = HeadPlan(model_.config.shape());
    for (const int layer : {0, 2}) streaming_.set(layer, 1, KeepWindow{{4, 60}});
  }

  std::vector<Result> rows(const NamedPlan& named, const std::vector<Selection>& selections,
                           RunOptions run = {}) {
    std::size_t finished = 0;
    const SelectionPolicies policies(model_.config.rope_theta);
    auto results = evaluate_selections<headwise::f16>(
        model_, tasks_, named, policies, selections, centres_, run, executor_, [&] { ++finished; });
    EXPECT_EQ(finished, 6 * selections.size());
    return results;
  }
  Result whole(const HeadPlan& plan) {
    return evaluate<headwise::f16>(model_, tasks_, {"", "", plan}, {}, executor_, [] {});
  }
  std::vector<Selection> at_share(double share) {
    const double shares[] = {share};
    return all_selections(shares);
  }

  Tasks tasks_;
  QueryCentres centres_;
  HeadPlan streaming_{headwise::ModelShape::uniform(3, 4, 2, 16)};
};

TEST_F(SelectionRowsTest, AreThePlansOwnWhereEverythingIsKept) {
  for (const HeadPlan& plan : {HeadPlan(model_.config.shape()), streaming_}) {
    for (std::size_t first = 0; first < 3;
         ++first) {  // each document once in front, where it shows
      const Result expected = whole(plan);
      for (const Result& row : rows({"", "", plan}, at_share(1.0))) {
        EXPECT_EQ(row.passkey_output, expected.passkey_output) << row.id;
        EXPECT_EQ(row.cot_output, expected.cot_output) << row.id;
        EXPECT_EQ(row.mean_output_tokens, expected.mean_output_tokens) << row.id;
        EXPECT_EQ(row.kv_bytes, expected.kv_bytes) << row.id;
        EXPECT_EQ(row.kv_share, expected.kv_share) << row.id;
        EXPECT_EQ(row.num_documents, 3U);
      }
      for (Task* task : {&tasks_.passkey, &tasks_.cot}) {
        std::rotate(task->documents.begin(), task->documents.begin() + 1, task->documents.end());
      }
    }
  }
}

TEST_F(SelectionRowsTest, AnswerFromWhatIsLeft) {
  const Result full = whole(HeadPlan(model_.config.shape()));
  std::set<std::vector<Token>> outputs;
  for (const Result& row : rows({"", "", HeadPlan(model_.config.shape())}, at_share(0.1))) {
    EXPECT_NE(row.cot_output, full.cot_output) << row.id;
    EXPECT_EQ(row.cot_output.front(), full.cot_output.front());  // made of the whole prompt
    outputs.insert(row.cot_output);
  }
  EXPECT_GE(outputs.size(), 4U);  // methods differ
}

TEST_F(SelectionRowsTest, AreTheSameHoweverManyRunAtATime) {
  const NamedPlan named{"", "", streaming_};
  const auto together = rows(named, at_share(0.25));
  const auto by_two = rows(named, at_share(0.25), {.batch = 2});
  for (std::size_t i = 0; i < together.size(); ++i) {
    EXPECT_EQ(together[i].passkey_output, by_two[i].passkey_output) << together[i].id;
    EXPECT_EQ(together[i].mean_output_tokens, by_two[i].mean_output_tokens);
  }
}

TEST_F(SelectionRowsTest, HoldTheBytesOfTheClosedForm) {
  constexpr std::size_t kPage = 64 * 32 * 2;  // 64 tokens, 16 + 16 elements of f16
  const std::map<double, std::size_t> pages{
      {0.5, 16},  // slots [1024, 2048)
      {0.25, 8},  // [1536, 2048)
      {0.1, 4}};  // [1844, 2048): 204 tokens, from within the fourth page from the end on
  for (const auto& [share, of_head] : pages) {
    for (const Result& row : rows({"", "", HeadPlan(model_.config.shape())}, at_share(share))) {
      if (row.id.starts_with("ada_kv") || row.id.starts_with("kv_zip") ||
          row.id.starts_with("pyramid_kv")) {
        // The same tokens, otherwise shared: a page a head more at most, and none fewer in all.
        EXPECT_LE(row.kv_bytes, 6 * (of_head + 1) * kPage) << row.id;
        EXPECT_GE(row.kv_bytes, 6 * (of_head - 1) * kPage) << row.id;
      } else {
        EXPECT_EQ(row.kv_bytes, 6 * of_head * kPage) << row.id;
      }
      EXPECT_DOUBLE_EQ(row.kv_share,
                       static_cast<double>(row.kv_bytes) / static_cast<double>(6 * 32 * kPage));
    }
    for (const Result& row : rows({"", "", streaming_}, {{SelectionMethod::kSnapKv, share}})) {
      EXPECT_EQ(row.kv_bytes, (4 * of_head + 2) * kPage);
    }
  }
}

TEST_F(SelectionRowsTest, AreThereForEachMethodAndShare) {
  const double shares[] = {0.5, 0.25, 0.1};
  const auto ids = [&](const NamedPlan& named) {
    std::vector<std::string> all;
    for (const Result& row : rows(named, all_selections(shares))) {
      EXPECT_LE(row.title.size(), 24U) << row.title;  // the table's column
      all.push_back(row.id);
    }
    return all;
  };
  std::vector<std::string> expected;
  for (const std::string plan : {"", "rlkv_"}) {
    for (const std::string method :
         {"snap_kv", "ada_kv", "pyramid_kv", "expected_attention", "kv_zip", "tri_attention"}) {
      for (const std::string share : {"_50", "_25", "_10"})
        expected.push_back(plan + method + share);
    }
  }
  std::vector<std::string> all = ids({"", "", HeadPlan(model_.config.shape())});
  for (std::string& id : ids({"rlkv", "RLKV", streaming_})) all.push_back(std::move(id));
  EXPECT_EQ(all, expected);
}

}  // namespace
}  // namespace needle_lm::testing
