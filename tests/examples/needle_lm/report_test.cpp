// SPDX-License-Identifier: MIT
// What the demo says of a few documents, to somebody who has never seen it.
#include "report.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

namespace needle_lm::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

std::string printed(const std::function<void(std::FILE*)>& print) {
  std::FILE* const file = std::tmpfile();
  print(file);
  std::string text(static_cast<std::size_t>(std::ftell(file)), '\0');
  std::rewind(file);
  EXPECT_EQ(std::fread(text.data(), 1, text.size(), file), text.size());
  std::fclose(file);
  return text;
}

/// `# 00 01 02 ;` asked for; `[ a = 1 + 1 ; ]`, `? a THINK a = 1 1 + 1 1 = 2 ; ANS a 2 </s>`.
Tasks two_tasks() {
  Document passkey{{1, 4, 96, 97, 98, 6, 64, 5, 96, 97, 98, 6}, 9, 3};
  Document cot{{1,  11, 32, 7,  17, 8,  17, 6, 12, 5, 32, 13,  //
                32, 7,  17, 17, 8,  17, 17, 7, 18, 6, 14, 32, 18, 2},
               12,
               14};
  return {{"passkey", kEndOfNeedle, {passkey, passkey}}, {"cot", kEndOfSequence, {cot, cot}}};
}

Result one_of_two() {
  Result result;
  result.title = "a policy 50%";
  result.num_documents = 2;
  result.passkey_exact = 1;
  result.cot_exact = 0;
  result.answer_exact = 2;
  result.passkey_output = {97, 99, 6};
  result.cot_output = {32, 7, 17, 17, 9, 17, 17, 7, 16, 6, 14, 32, 18, 2};
  return result;
}

TEST(Report, SaysOneOfTwoAndNotAHalf) {
  const std::string table = printed([](std::FILE* out) { print_table({one_of_two()}, out); });
  EXPECT_THAT(table, AllOf(HasSubstr(" 1/2 "), HasSubstr(" 0/2 "), HasSubstr(" 2/2 "),
                           Not(HasSubstr("0.500"))));
}

TEST(Report, ShowsTheFirstQuestionOfEachTaskWithEveryAnswer) {
  const std::string text =
      printed([](std::FILE* out) { print_questions(two_tasks(), {one_of_two()}, out); });
  EXPECT_THAT(text, HasSubstr("One passkey, asked for after 9 words: ? 00\n"));
  EXPECT_THAT(text, ::testing::ContainsRegex("the document says +01 02 ; +right"));
  EXPECT_THAT(text, ::testing::ContainsRegex("a policy 50% +01 03 ; +wrong"));
  EXPECT_THAT(text, HasSubstr("One variable, asked for after 12 words: ? a THINK\n"));
  EXPECT_THAT(text, ::testing::ContainsRegex("document says +1/1 lines.*, ANS a 2 +right"));
  EXPECT_THAT(text, ::testing::ContainsRegex("a policy 50% +0/1 lines.*, ANS a 2 +right"));
}

TEST(Report, SurvivesAnswersThatBreakOff) {
  Result result = one_of_two();
  for (const std::vector<Token>& output : std::vector<std::vector<Token>>{{14}, {14, 32}, {7}}) {
    result.cot_output = output;
    result.passkey_output = output;
    const std::string text =
        printed([&](std::FILE* out) { print_questions(two_tasks(), {result}, out); });
    EXPECT_THAT(text, ::testing::ContainsRegex("0/1 lines.*wrong"));
  }
}

TEST(Report, ExplainsEveryColumn) {
  const std::string legend = printed([](std::FILE* out) { print_legend(two_tasks(), out); });
  for (const char* column : {"full heads", "KV MiB, share", "decode tok/s", "passkey right",
                             "chain right", "answer right", "words out"}) {
    EXPECT_THAT(legend, HasSubstr(column));
  }
}

TEST(Report, KeepsToEightyColumns) {
  Result wide = one_of_two();
  wide.title = "RazorAttention heads 50%";
  wide.num_documents = wide.passkey_exact = wide.cot_exact = wide.answer_exact = 256;
  wide.mean_output_tokens = 164.3;
  wide.tokens_per_s = 123456;
  const std::string text = printed([&](std::FILE* out) {
    print_table({wide}, out);
    print_legend(two_tasks(), out);
    print_selection_legend(out);
    print_questions(two_tasks(), {wide}, out);
  });
  std::size_t column = 0;
  for (const char c : text) {
    column = c == '\n' ? 0 : column + 1;
    ASSERT_LE(column, 80U);
  }
}

TEST(Words, AreWhatTheTrainingDataSays) {
  const std::vector<Token> tokens{4, 152, 6, 5, 16, 25, 32, 57, 64, 95, 96, 223, 7, 13, 14, 2};
  EXPECT_EQ(words(tokens), "# 38 ; ? 0 9 a z w0 w31 00 7f = THINK ANS </s>");
  EXPECT_EQ(word(-1) + word(15) + word(26) + word(224), "<-1><15><26><224>");
}

}  // namespace
}  // namespace needle_lm::testing
