// SPDX-License-Identifier: MIT
// The memory beside llama.cpp's own, in one process: which of them a context has is chosen before
// it is made. Built and run by examples/llama_cpp/memory, which has a llama.cpp with the hooks.
#include "memory.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "context.hpp"
#include "distance.hpp"
#include "tiny_gguf.hpp"

namespace in_llama::test {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

constexpr int kMaxRows = 64;
constexpr int kThreads = 2;

using LoadedModel = std::unique_ptr<llama_model, decltype(&llama_model_free)>;

LoadedModel load(const std::string& path) {
  llama_model_params params = llama_model_default_params();
  params.n_gpu_layers = 0;
  return {llama_model_load_from_file(path.c_str(), params), &llama_model_free};
}

/// The variables that name a plan, for as long as this lives.
class Environment {
 public:
  explicit Environment(std::vector<std::pair<const char*, const char*>> values)
      : values_(std::move(values)) {
    for (const auto& [name, value] : values_) ::setenv(name, value, 1);
  }
  ~Environment() {
    for (const auto& [name, value] : values_) ::unsetenv(name);
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  std::vector<std::pair<const char*, const char*>> values_;
};

ContextOptions options(int max_sequences = 3) {
  return {.num_cells = 512,
          .max_rows = kMaxRows,
          .max_sequences = max_sequences,
          .num_threads = kThreads};
}

/// A context whose memory is llama.cpp's own.
class StockContext {
 public:
  explicit StockContext(llama_model* model)
      : maker_(std::exchange(llama_make_memory, nullptr)), context_(model, options()) {
    llama_make_memory = maker_;
  }
  Context* operator->() { return &context_; }

 private:
  llama_memory_maker maker_;
  Context context_;
};

std::vector<llama_token> random_tokens(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<llama_token> tokens(count);
  for (llama_token& token : tokens) token = static_cast<llama_token>(random() % TinyGguf::kVocab);
  return tokens;
}

std::vector<Row> rows_of(std::span<const llama_token> tokens, llama_pos first, llama_seq_id seq) {
  std::vector<Row> rows;
  for (const llama_token token : tokens) rows.push_back({token, first++, seq, true});
  return rows;
}

/// Decodes a text in pieces of unlike lengths behind what the sequence has.
/// @return logits [tokens][vocabulary]
std::vector<std::vector<float>> decode(Context& context, std::span<const llama_token> tokens,
                                       llama_seq_id seq = 0) {
  std::vector<std::vector<float>> logits;
  const std::size_t lengths[] = {40, 1, 17, 64, 3};
  for (std::size_t i = 0; !tokens.empty(); ++i) {
    const std::size_t length = std::min(lengths[i % std::size(lengths)], tokens.size());
    const llama_pos first = llama_memory_seq_pos_max(context.memory(), seq) + 1;
    EXPECT_TRUE(context.decode(rows_of(tokens.first(length), first, seq)));
    for (std::size_t row = 0; row < length; ++row) {
      const auto of_row = context.logits(row);
      logits.emplace_back(of_row.begin(), of_row.end());
    }
    tokens = tokens.subspan(length);
  }
  return logits;
}

double nmse_to_stock(llama_model* model) {
  const std::vector<llama_token> tokens = random_tokens(300, 1);
  StockContext stock(model);
  Context ours(model, options());
  const auto expected = decode(*stock.operator->(), tokens);
  const auto got = decode(ours, tokens);
  Distance distance;
  for (std::size_t i = 0; i < expected.size(); ++i) distance.add(expected[i], got[i]);
  return distance.nmse();
}

const char* kStreams = "random";

TEST(LlamaMemory, GivesStocksLogitsWhereEverythingIsKept) {
  const LoadedModel model = load(tiny_llama());
  EXPECT_LE(nmse_to_stock(model.get()), 1e-5);
}

TEST(LlamaMemory, APlanChangesLogits) {
  const Environment plan({{"HEADWISE_HEADS", kStreams}, {"HEADWISE_WINDOW", "2+10"}});
  const LoadedModel model = load(tiny_llama());
  EXPECT_GT(nmse_to_stock(model.get()), 1e-3);
}

TEST(LlamaMemory, GivesStocksLogitsOfAModelWithWindowsAndASoftCap) {
  TinyGguf gguf("gemma2");
  gguf.add_gemma2(24);
  const LoadedModel model = load(gguf.write("gemma2"));
  ASSERT_NE(model, nullptr);
  EXPECT_EQ(shape_of(*model).layer(0).sliding_window, 24);
  EXPECT_EQ(shape_of(*model).layer(1).sliding_window, 0);
  EXPECT_LE(nmse_to_stock(model.get()), 1e-4);
}

TEST(LlamaMemory, GivesStocksLogitsOfAModelWithALiBi) {
  TinyGguf gguf("bloom");
  gguf.add_bloom();
  const LoadedModel model = load(gguf.write("bloom"));
  EXPECT_LE(nmse_to_stock(model.get()), 1e-4);
}

TEST(LlamaMemory, SequencesOfABatchHaveTheBitsOfEachAlone) {
  const Environment plan({{"HEADWISE_HEADS", kStreams}, {"HEADWISE_WINDOW", "2+10"}});
  const LoadedModel model = load(tiny_llama());
  const std::vector<llama_token> a = random_tokens(50, 2);
  const std::vector<llama_token> b = random_tokens(20, 3);
  Context alone(model.get(), options());
  const auto of_a = decode(alone, a, 0);
  const auto of_b = decode(alone, b, 1);
  Context together(model.get(), options());
  (void)decode(together, std::span(a).first(40), 0);
  std::vector<Row> rows = rows_of(std::span(a).subspan(40), 40, 0);
  const std::vector<Row> more = rows_of(b, 0, 2);
  rows.insert(rows.end(), more.begin(), more.end());
  ASSERT_TRUE(together.decode(rows));
  Distance distance;
  for (std::size_t i = 0; i < 10; ++i) distance.add(of_a[40 + i], together.logits(i));
  for (std::size_t i = 0; i < b.size(); ++i) distance.add(of_b[i], together.logits(10 + i));
  EXPECT_LE(distance.nmse(), 1e-9);  // products of another size may round otherwise
}

TEST(LlamaMemory, CopiesAreForks) {
  const LoadedModel model = load(tiny_llama());
  const std::vector<llama_token> tokens = random_tokens(90, 4);
  Context context(model.get(), options());
  const auto expected = decode(context, tokens, 0);
  ASSERT_TRUE(llama_memory_seq_rm(context.memory(), 0, 57, -1));  // 40 + 1 + 16 of the pieces
  llama_memory_seq_cp(context.memory(), 0, 1, -1, -1);
  llama_memory_seq_cp(context.memory(), 0, 2, 0, 41);
  EXPECT_EQ(llama_memory_seq_pos_max(context.memory(), 1), 56);
  EXPECT_EQ(llama_memory_seq_pos_max(context.memory(), 2), 40);
  (void)decode(context, random_tokens(20, 5), 0);  // the parent goes its own way
  ASSERT_TRUE(context.decode(rows_of(std::span(tokens).subspan(57, 1), 57, 1)));
  Distance distance;
  distance.add(expected[57], context.logits(0));
  ASSERT_TRUE(context.decode(rows_of(std::span(tokens).subspan(41, 17), 41, 2)));
  for (std::size_t i = 0; i < 17; ++i) distance.add(expected[41 + i], context.logits(i));
  EXPECT_LE(distance.nmse(), 1e-9);
}

TEST(LlamaMemory, StatesContinueInAnotherContext) {
  const Environment plan({{"HEADWISE_HEADS", kStreams}, {"HEADWISE_WINDOW", "2+10"}});
  const LoadedModel model = load(tiny_llama());
  const std::vector<llama_token> tokens = random_tokens(60, 6);
  Context context(model.get(), options());
  (void)decode(context, tokens, 1);
  std::vector<std::uint8_t> state(llama_state_seq_get_size(context.get(), 1));
  ASSERT_EQ(llama_state_seq_get_data(context.get(), state.data(), state.size(), 1), state.size());
  Context other(model.get(), options());
  ASSERT_EQ(llama_state_seq_set_data(other.get(), state.data(), state.size(), 2), state.size());
  EXPECT_EQ(llama_memory_seq_pos_max(other.memory(), 2), 59);
  const std::vector<llama_token> more = random_tokens(5, 7);
  const auto expected = decode(context, more, 1);
  const auto got = decode(other, more, 2);
  for (std::size_t i = 0; i < more.size(); ++i) EXPECT_THAT(got[i], ElementsAreArray(expected[i]));

  for (std::size_t at = 0; at < state.size(); at += 97) {  // no byte of it is believed
    std::vector<std::uint8_t> damaged = state;
    damaged[at] ^= 0x40;
    (void)llama_state_seq_set_data(other.get(), damaged.data(), damaged.size(), 0);
  }
  EXPECT_EQ(llama_state_seq_set_data(other.get(), state.data(), state.size() / 2, 0), 0U);
  EXPECT_EQ(llama_memory_seq_pos_max(other.memory(), 0), -1);
  EXPECT_EQ(llama_memory_seq_pos_max(other.memory(), 2), 64);
}

TEST(LlamaMemory, SaysHowFarBackASequenceGoes) {
  const Environment plan(
      {{"HEADWISE_HEADS", kStreams}, {"HEADWISE_WINDOW", "2+10"}, {"HEADWISE_ROLLBACK", "8"}});
  const LoadedModel model = load(tiny_llama());
  const std::vector<llama_token> tokens = random_tokens(60, 8);
  Context context(model.get(), options());
  llama_memory_t memory = context.memory();
  EXPECT_EQ(llama_memory_seq_pos_min(memory, 0), -1);
  const auto expected = decode(context, tokens);
  EXPECT_EQ(llama_memory_seq_pos_min(memory, 0), 60 - 8 - 1);
  EXPECT_FALSE(llama_memory_seq_rm(memory, 0, 51, -1));
  EXPECT_FALSE(llama_memory_seq_rm(memory, 0, 10, 20));  // a hole
  EXPECT_EQ(llama_memory_seq_pos_max(memory, 0), 59);
  ASSERT_TRUE(llama_memory_seq_rm(memory, 0, 58, -1));
  ASSERT_TRUE(context.decode(rows_of(std::span(tokens).subspan(58), 58, 0)));
  Distance distance;
  for (std::size_t i = 0; i < 2; ++i) distance.add(expected[58 + i], context.logits(i));
  EXPECT_LE(distance.nmse(), 1e-9);
  EXPECT_TRUE(llama_memory_seq_rm(memory, 0, -1, -1));
  EXPECT_EQ(llama_memory_seq_pos_max(memory, 0), -1);
  EXPECT_FALSE(llama_memory_can_shift(memory));
}

TEST(LlamaMemory, RefusesWhatAPlanCannotGive) {
  const LoadedModel model = load(tiny_llama());
  Context context(model.get(), options());
  (void)decode(context, random_tokens(10, 9));
  EXPECT_FALSE(context.decode(rows_of(random_tokens(1, 1), 12, 0)));  // a gap
  EXPECT_FALSE(context.decode(rows_of(random_tokens(1, 1), 5, 0)));   // a second past
  EXPECT_TRUE(context.decode(rows_of(random_tokens(1, 1), 10, 0)));
  EXPECT_EQ(llama_memory_seq_pos_max(context.memory(), 0), 10);
}

TEST(LlamaMemory, ASequenceEndsAtTheContext) {
  const LoadedModel model = load(tiny_llama());
  Context context(model.get(), options());
  const auto length = static_cast<std::size_t>(llama_n_ctx_seq(context.get()));
  (void)decode(context, random_tokens(length, 10));
  EXPECT_FALSE(context.decode(rows_of(random_tokens(1, 1), static_cast<llama_pos>(length), 0)));
  EXPECT_EQ(llama_memory_seq_pos_max(context.memory(), 0), static_cast<llama_pos>(length) - 1);
}

TEST(LlamaMemory, SaysWhatIsWrongWithAPlan) {
  const LoadedModel model = load(tiny_llama());
  const auto is_refused = [&](const char* name, const char* value) {
    const Environment plan({{"HEADWISE_HEADS", kStreams}, {name, value}});
    EXPECT_THROW(Context(model.get(), options()), headwise::ConfigError) << name << value;
  };
  is_refused("HEADWISE_SPARSITY", "much");
  is_refused("HEADWISE_SPARSITY", "1.5");
  is_refused("HEADWISE_WINDOW", "64");
  is_refused("HEADWISE_WINDOW", "64+");
  is_refused("HEADWISE_WINDOW", "64+x");
  is_refused("HEADWISE_ROLLBACK", "-1");
  is_refused("HEADWISE_HEADS", "/no/such.tsv");
}

TEST(LlamaMemory, RefusesModelsWithoutRowsToPlanFor) {
  TinyGguf gguf("mamba");
  gguf.set("ssm.conv_kernel", 4);
  gguf.set("ssm.inner_size", 256);
  gguf.set("ssm.state_size", 16);
  gguf.set("ssm.time_step_rank", 8);
  llama_model_params params = llama_model_default_params();
  params.vocab_only = true;
  const LoadedModel model(llama_model_load_from_file(gguf.write("mamba").c_str(), params),
                          &llama_model_free);
  ASSERT_NE(model, nullptr);
  try {
    (void)shape_of(*model);
    FAIL() << "a model without K and V has a shape";
  } catch (const headwise::ConfigError& error) {
    EXPECT_THAT(error.what(), HasSubstr("recurrent state"));
  }
}

}  // namespace
}  // namespace in_llama::test
