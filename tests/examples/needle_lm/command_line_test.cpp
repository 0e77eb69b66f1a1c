// SPDX-License-Identifier: MIT
// The program as a user meets it: exit codes, messages, files that are whole or not there.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "random_model.hpp"

#ifdef NEEDLE_LM_PROGRAM

namespace needle_lm::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

struct Outcome {
  int exit_code = -1;
  std::string out;
  std::string err;
};

std::string text_of(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

class CommandLineTest : public ::testing::Test {
 protected:
  Outcome run(const std::string& arguments) {
    const std::string command = std::string(NEEDLE_LM_PROGRAM) + " " + arguments + " >" +
                                folder_.file("stdout") + " 2>" + folder_.file("stderr");
    const int status = std::system(command.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, text_of(folder_.file("stdout")),
            text_of(folder_.file("stderr"))};
  }

  /// Must be refused with exit code 2, one line of message, and nothing written.
  std::string refusal(const std::string& arguments) {
    const Outcome outcome = run(arguments);
    EXPECT_EQ(outcome.exit_code, 2) << arguments << "\n" << outcome.err;
    EXPECT_THAT(outcome.err, StartsWith("needle_lm: ")) << arguments;
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    for (const auto& entry : std::filesystem::directory_iterator(out_.file(""))) {
      ADD_FAILURE() << arguments << " left " << entry.path();
    }
    return outcome.err;
  }

  std::string logits_command(const std::string& more = "") {
    return "logits --model " + model_ + " --tokens " + folder_.file("ids.txt") + " --out " +
           out_.file("logits.tsv") + " " + more;
  }
  std::string evaluate_command(const std::string& more = "") {
    return "evaluate --model " + model_ + " --data " + folder_.file("documents") +
           " --documents 2 --csv " + out_.file("out.csv") + " " + more;
  }

  /// Two documents a task, of 2049 tokens as the example's own.
  void write_documents(int prompt_length = 100) {
    constexpr int kRows = 2;
    constexpr int kTokens = 2049;
    std::string data;
    nlohmann::json header;
    const auto add = [&](const std::string& name, const std::string& dtype,
                         const std::vector<int>& shape, const std::string& bytes) {
      header[name] = {{"dtype", dtype},
                      {"shape", shape},
                      {"data_offsets", {data.size(), data.size() + bytes.size()}}};
      data += bytes;
    };
    for (const std::string task : {"passkey", "cot"}) {
      std::string tokens;
      for (int i = 0; i < kRows * kTokens; ++i) tokens += static_cast<char>(3 + i * i % 37);
      std::string prompts;
      std::string answers;
      for (int i = 0; i < kRows; ++i) {
        const int prompt = prompt_length + i;
        const int answer = 5;
        prompts.append(reinterpret_cast<const char*>(&prompt), sizeof prompt);
        answers.append(reinterpret_cast<const char*>(&answer), sizeof answer);
      }
      add(task + ".tokens", "U8", {kRows, kTokens}, tokens);
      add(task + ".prompt_length", "I32", {kRows}, prompts);
      add(task + ".answer_length", "I32", {kRows}, answers);
    }
    write_text(folder_.file("documents"), safetensors_bytes(header.dump(), data));
  }

  void SetUp() override {
    model_ = write_model(folder_, small_config(), random_weights(small_config(), 2));
    write_text(folder_.file("ids.txt"), "1 2 3\n40\t5 6 7 8 9 10\n");
    write_text(folder_.file("scores.tsv"), "0.5\t0.25\n1\t0\n0.75\t0.125\n");
    write_documents();
  }

  TemporaryFolder folder_;
  TemporaryFolder out_;
  std::string model_;
};

TEST_F(CommandLineTest, WritesOneRowOfLogitsAPosition) {
  const Outcome outcome = run(logits_command("--prompt 6 --threads 2"));
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  std::istringstream lines(text_of(out_.file("logits.tsv")));
  std::string line;
  int num_lines = 0;
  while (std::getline(lines, line)) {
    ++num_lines;
    EXPECT_EQ(std::count(line.begin(), line.end(), '\t'), 40);
  }
  EXPECT_EQ(num_lines, 10);
  EXPECT_FALSE(std::filesystem::exists(out_.file("logits.tsv.partial")));
}

TEST_F(CommandLineTest, EvaluatesOnePlanIntoOneRow) {
  const std::string heads = "--heads " + folder_.file("scores.tsv");
  const std::string razor =
      "--policy razor_attention " + heads + " --echo " + folder_.file("scores.tsv");
  for (const std::string& plan :
       {std::string(), heads + " --sparsity 0.5 --sink 4 --recent 20", "--policy rlkv " + heads,
        razor, razor + " --compensation --prefill chunk_causal",
        std::string("--policy uniform --rows bf16 --chunk 33"),
        std::string("--policy random --seed 4 --rows f32 --threads 1 --batch 1")}) {
    const Outcome outcome = run(evaluate_command(plan));
    ASSERT_EQ(outcome.exit_code, 0) << plan << "\n" << outcome.err;
    const std::string csv = text_of(out_.file("out.csv"));
    EXPECT_THAT(csv, StartsWith("policy,retrieval_share,kv_bytes,kv_share,tokens_per_s,passkey_em,"
                                "cot_em,answer_em,mean_output_tokens\n"));
    EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 2) << csv;
    EXPECT_EQ(std::count(csv.begin(), csv.end(), ','), 16) << csv;
    std::istringstream table(outcome.out);
    for (std::string line; std::getline(table, line);) EXPECT_LE(line.size(), 80U) << line;
  }
}

TEST_F(CommandLineTest, ReportsTheBytesOfTheClosedForm) {
  ASSERT_EQ(run(evaluate_command("--heads " + folder_.file("scores.tsv"))).exit_code, 0);
  // Of 6 heads ceil(5 / 2) = 3 stream: one page; 3 keep 32 pages of 64 x (16 + 16) x 2 bytes.
  const std::string csv = text_of(out_.file("out.csv"));
  EXPECT_THAT(csv, HasSubstr("duo_attention,0.500000," +
                             std::to_string((3 * 32 + 3) * 64 * 32 * 2) + ",0.515625,"));
}

TEST_F(CommandLineTest, RefusesWrongUsage) {
  EXPECT_EQ(run("").exit_code, 2);
  EXPECT_EQ(run("sing").exit_code, 2);
  EXPECT_EQ(run("--help").exit_code, 0);
  EXPECT_THAT(refusal("demo --colour"), HasSubstr("unknown option --colour; this command knows"));
  EXPECT_THAT(refusal("demo stray"), HasSubstr("unknown option stray"));
  EXPECT_THAT(refusal("demo --documents"), HasSubstr("--documents needs a value"));
  EXPECT_THAT(refusal("demo --documents 2 --documents 3"), HasSubstr("given twice"));
  EXPECT_THAT(refusal("evaluate"), HasSubstr("--csv is required"));
  EXPECT_THAT(refusal("logits --out " + out_.file("x")), HasSubstr("--tokens is required"));
  EXPECT_THAT(refusal(evaluate_command("--policy best")), HasSubstr("--policy best: expected one"));
  EXPECT_THAT(refusal(evaluate_command("--prefill lazy")), HasSubstr("--prefill lazy"));
  EXPECT_THAT(refusal(evaluate_command("--rows f8")), HasSubstr("--rows f8"));
  EXPECT_THAT(refusal(evaluate_command("--device tpu")), HasSubstr("--device tpu"));
  EXPECT_THAT(refusal(evaluate_command("--sparsity 0.5")),
              HasSubstr("--sparsity needs a --policy"));
  EXPECT_THAT(refusal(evaluate_command("--compensation")), HasSubstr("--compensation belongs to"));
}

TEST_F(CommandLineTest, RefusesSelectionsThatCannotBe) {
  EXPECT_THAT(refusal("demo --selection --documents 2 --device cuda"),
              HasSubstr("--selection needs --device cpu, not cuda"));
  EXPECT_THAT(refusal("demo --selection --documents 129"),
              HasSubstr("--selection takes at most 128 documents of task passkey, got 129"));
  EXPECT_THAT(refusal("demo --selection --pool 8"), HasSubstr("--pool 8: expected an odd number"));
  EXPECT_THAT(refusal("demo --selection --pool 0"), HasSubstr("--pool 0: expected an integer"));
  write_documents(79);
  EXPECT_THAT(refusal("demo --selection --documents 1 --data " + folder_.file("documents")),
              HasSubstr("10 % of a prompt of 79 tokens are 7, SnapKV's window has 8"));
  EXPECT_THAT(refusal("demo --pool 7"), HasSubstr("--pool belongs to --selection"));
  EXPECT_THAT(refusal(evaluate_command("--selection")), HasSubstr("unknown option --selection"));
}

TEST_F(CommandLineTest, IdentifiesHeadsIntoAScoreFile) {
  const std::string common = "identify --model " + model_ + " --data " + folder_.file("documents") +
                             " --documents 1 --out " + folder_.file("found.tsv");
  for (const std::string& method :
       {"razor --echo " + folder_.file("echo.tsv"), std::string("on_the_fly"),
        std::string("measured --sink 2 --recent 9 --greedy 1"),
        std::string("duo --sink 2 --recent 9 --steps 2 --l1 0.1")}) {
    const Outcome outcome = run(common + " --seed 7 --method " + method);
    ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
    const std::string found = text_of(folder_.file("found.tsv"));
    EXPECT_EQ(std::count(found.begin(), found.end(), '\n'), 3) << method;
    EXPECT_EQ(std::count(found.begin(), found.end(), '\t'), 3) << method;
    EXPECT_THAT(outcome.out, HasSubstr("--documents 1 --seed 7"));
    // The same command, the same file; and a file that evaluate takes.
    ASSERT_EQ(run(common + " --seed 7 --method " + method).exit_code, 0);
    EXPECT_EQ(text_of(folder_.file("found.tsv")), found);
    EXPECT_EQ(run(evaluate_command("--heads " + folder_.file("found.tsv"))).exit_code, 0);
    std::filesystem::remove(out_.file("out.csv"));
  }
  EXPECT_NE(text_of(folder_.file("echo.tsv")), "");
  EXPECT_THAT(run(common + " --method razor --echo " + folder_.file("echo.tsv")).out,
              HasSubstr("needle_lm identify --method razor --documents 1 --seed 1 --out " +
                        folder_.file("found.tsv") + " --echo " + folder_.file("echo.tsv")));

  const std::string refused =
      "identify --model " + model_ + " --data " + folder_.file("documents") + " --method ";
  const std::string out = " --out " + out_.file("found.tsv");
  EXPECT_THAT(refusal(refused + "best" + out), HasSubstr("--method best: expected one of razor"));
  EXPECT_THAT(refusal(refused + "razor"), HasSubstr("--out is required"));
  EXPECT_THAT(refusal("identify" + out), HasSubstr("--method is required"));
  EXPECT_THAT(refusal(refused + "razor --recent 9" + out),
              HasSubstr("--recent belongs to --method measured or duo, not razor"));
  EXPECT_THAT(refusal(refused + "measured --steps 9" + out),
              HasSubstr("--steps belongs to --method duo, not measured"));
  EXPECT_THAT(refusal(refused + "duo --l1 -1" + out), HasSubstr("--l1 -1: expected a number in"));
  EXPECT_THAT(refusal(refused + "duo --greedy 1" + out),
              HasSubstr("--greedy belongs to --method measured, not duo"));
  EXPECT_THAT(refusal(refused + "measured --echo x" + out), HasSubstr("--echo belongs to"));
  EXPECT_THAT(refusal(refused + "measured --greedy 7" + out), HasSubstr("an integer in 0..6"));
  EXPECT_THAT(refusal(refused + "on_the_fly --documents 2" + out),
              HasSubstr("the second half has 1 of task passkey"));
  EXPECT_THAT(refusal(refused + "retrieval --documents 1" + out), HasSubstr("without the needle"));
}

TEST_F(CommandLineTest, SaysWhyItCannotUseADevice) {
  // The model's head width has no kernel here; without CUDA, or a device, that is said first.
  const Outcome outcome = run(evaluate_command("--device cuda"));
  EXPECT_NE(outcome.exit_code, 0);
  EXPECT_THAT(outcome.err,
              ::testing::AnyOf(HasSubstr("CUDA"), HasSubstr("no device kernel for head width")));
}

TEST_F(CommandLineTest, RefusesNumbersOutOfRange) {
  const std::string random = "--policy random ";
  for (const std::string value : {"1.5", "-0.1", "nan", "inf", "half", "0.5x", "\"\""}) {
    EXPECT_THAT(refusal(evaluate_command(random + "--sparsity " + value)),
                HasSubstr("expected a number in 0..1"));
  }
  EXPECT_THAT(refusal(evaluate_command(random + "--sink -1")), HasSubstr("--sink -1: expected"));
  EXPECT_THAT(refusal(evaluate_command(random + "--recent 0")), HasSubstr("an integer in 1.."));
  EXPECT_THAT(refusal(evaluate_command(random + "--recent 99999999999999999999")),
              HasSubstr("--recent 99999999999999999999"));
  EXPECT_THAT(refusal(evaluate_command("--chunk 0")), HasSubstr("--chunk 0"));
  EXPECT_THAT(refusal(evaluate_command("--threads 0")), HasSubstr("--threads 0"));
  EXPECT_THAT(refusal(evaluate_command("--batch 1e3")), HasSubstr("--batch 1e3"));
  EXPECT_THAT(refusal(logits_command("--prompt 11")),
              HasSubstr("--prompt 11: expected an integer in 0..10"));
  EXPECT_THAT(
      refusal("demo --model " + model_ + " --data " + folder_.file("documents") + " --documents 3"),
      HasSubstr("--documents 3: there are 2"));
}

TEST_F(CommandLineTest, RefusesFilesThatAreAbsentOrDamaged) {
  EXPECT_THAT(refusal("demo --model " + folder_.file("none")), HasSubstr("no such file"));
  EXPECT_THAT(refusal(evaluate_command("--heads " + folder_.file("none"))), HasSubstr("none"));
  EXPECT_THAT(refusal(evaluate_command("--policy rlkv --heads " + folder_.file("ids.txt"))),
              HasSubstr("ids.txt"));
  EXPECT_THAT(refusal("logits --model " + model_ + " --tokens " + folder_.file("ids.txt") +
                      " --out /no/such/folder/out.tsv"),
              HasSubstr("/no/such/folder/out.tsv: cannot be written"));
  for (const std::string ids : {"1 2 41", "1 -2", "1 two", "1 99999999999", "", "1 2.5"}) {
    write_text(folder_.file("ids.txt"), ids);
    EXPECT_THAT(refusal(logits_command()), HasSubstr("ids.txt: ")) << ids;
  }
  std::string many = "0";
  for (int i = 0; i < 4096; ++i) many += " 0";
  write_text(folder_.file("ids.txt"), many);
  EXPECT_THAT(refusal(logits_command()), HasSubstr("4097 tokens, the model knows positions up to"));
  write_text(folder_.file("documents"), "12345678");
  EXPECT_THAT(refusal(evaluate_command()), HasSubstr("documents: header of"));
  write_text(model_, text_of(model_).substr(0, 5000));
  EXPECT_THAT(refusal(evaluate_command()), HasSubstr("model.safetensors: "));
  write_text(folder_.file("config.json"), "{}");
  EXPECT_THAT(refusal(evaluate_command()), HasSubstr("config.json: no \"vocab_size\""));
}

TEST_F(CommandLineTest, LeavesAnOldFileAloneWhenItFails) {
  write_text(folder_.file("old.csv"), "old");
  EXPECT_EQ(run("evaluate --model " + folder_.file("none") + " --csv " + folder_.file("old.csv"))
                .exit_code,
            2);
  EXPECT_EQ(text_of(folder_.file("old.csv")), "old");
  EXPECT_FALSE(std::filesystem::exists(folder_.file("old.csv.partial")));
}

TEST_F(CommandLineTest, WritesThroughLinksAndDevices) {
  std::filesystem::create_symlink(folder_.file("real.csv"), folder_.file("link.csv"));
  const std::string evaluate = "evaluate --model " + model_ + " --data " +
                               folder_.file("documents") + " --documents 1 --csv ";
  ASSERT_EQ(run(evaluate + folder_.file("link.csv")).exit_code, 0);
  EXPECT_TRUE(std::filesystem::is_symlink(folder_.file("link.csv")));
  EXPECT_THAT(text_of(folder_.file("real.csv")), StartsWith("policy,"));
  ASSERT_EQ(run(evaluate + "/dev/null").exit_code, 0);
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/null"));
}

}  // namespace
}  // namespace needle_lm::testing

#endif
