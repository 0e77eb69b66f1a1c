// SPDX-License-Identifier: MIT
// Documents and how answers are judged.
#include "tasks.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "random_model.hpp"

namespace needle_lm::testing {
namespace {

using ::testing::HasSubstr;

constexpr Token kX = 55;      // a variable
constexpr Token kThree = 19;  // digits
constexpr Token kFour = 20;

TEST(TasksTest, JudgesOutputsTokenByToken) {
  const Document document{{9, 9, kX, kThree, kAnswer, kX, kThree, kEndOfSequence, 0}, 2, 6};
  const std::vector<Token> right{kX, kThree, kAnswer, kX, kThree, kEndOfSequence};
  EXPECT_EQ(document.prompt().size(), 2U);
  EXPECT_TRUE(is_exact(right, document));
  EXPECT_TRUE(has_right_value(right, document));

  std::vector<Token> longer = right;
  longer.push_back(kX);
  EXPECT_FALSE(is_exact(longer, document));
  EXPECT_FALSE(is_exact(std::span(right).first(5), document));

  const std::vector<Token> wrong_thought{kX, kFour, kAnswer, kX, kThree, kEndOfSequence};
  EXPECT_FALSE(is_exact(wrong_thought, document));
  EXPECT_TRUE(has_right_value(wrong_thought, document));
}

TEST(TasksTest, TakesTheValueAfterTheFirstAnswer) {
  EXPECT_EQ(final_value(std::vector<Token>{kX, kAnswer, kX, kThree, kAnswer, kX, kFour}), kThree);
  EXPECT_EQ(final_value(std::vector<Token>{kX, kAnswer, kX}), std::nullopt);
  EXPECT_EQ(final_value(std::vector<Token>{kAnswer}), std::nullopt);
  EXPECT_EQ(final_value(std::vector<Token>{kX, kX, kX}), std::nullopt);
  EXPECT_EQ(final_value(std::vector<Token>{}), std::nullopt);
  const Document document{{9, kAnswer, kX, kThree}, 1, 3};
  EXPECT_FALSE(has_right_value(std::vector<Token>{}, document));
}

class TaskFileTest : public ::testing::Test {
 protected:
  std::string refusal(int prompt, int answer, int token, std::size_t count = 1) {
    std::string data(4, '\1');
    data[2] = static_cast<char>(token);
    for (const int number : {prompt, answer}) {
      data.append(reinterpret_cast<const char*>(&number), sizeof number);
    }
    write_text(folder_.file("d"), safetensors_bytes(
                                      R"({"t.tokens": {"dtype": "U8", "shape": [1, 4],
                                          "data_offsets": [0, 4]},
                                          "t.prompt_length": {"dtype": "I32", "shape": [1],
                                          "data_offsets": [4, 8]},
                                          "t.answer_length": {"dtype": "I32", "shape": [1],
                                          "data_offsets": [8, 12]}})",
                                      data));
    try {
      ModelConfig config;
      config.vocab_size = 200;
      load_task(SafeTensors(folder_.file("d")), "t", kEndOfSequence, count, config);
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "accepted";
  }

  TemporaryFolder folder_;
};

TEST_F(TaskFileTest, RefusesWhatDoesNotFit) {
  EXPECT_EQ(refusal(2, 2, 199), "accepted");
  EXPECT_THAT(refusal(2, 2, 200), HasSubstr("token 200, the vocabulary has 200"));
  EXPECT_THAT(refusal(2, 3, 7), HasSubstr("prompt of 2 and answer of 3 in 4 tokens"));
  EXPECT_THAT(refusal(0, 2, 7), HasSubstr("prompt of 0"));
  EXPECT_THAT(refusal(-1, 2, 7), HasSubstr("prompt of -1"));
  EXPECT_THAT(refusal(2, 0, 7), HasSubstr("answer of 0"));
  EXPECT_THAT(refusal(2147483647, 2, 7), HasSubstr("prompt of 2147483647"));
  EXPECT_THAT(refusal(2, -2147483647, 7), HasSubstr("answer of -2147483647"));
  EXPECT_THAT(refusal(2, 2, 7, 2), HasSubstr("--documents 2: there are 1"));
}

}  // namespace
}  // namespace needle_lm::testing
