// SPDX-License-Identifier: MIT
#include "headwise/heads/json.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "headwise/heads/plan.hpp"
#include "support/errors.hpp"
#include "support/published.hpp"

namespace headwise {
namespace {

using testing::message_of;
using testing::published;
using ::testing::StartsWith;

struct Hostile {
  const char* text;
  const char* message;
};

TEST(HeadRuns, AreAveragedByKeyNotByOrder) {
  const HeadRuns runs = parse_head_runs(
      R"({"1-1": [4, 4], "0-0": [0, 1], "1-0": [1.5, 0.5], "0-1": [-1, 1e0]})", "f.json");
  EXPECT_EQ(runs.num_runs, 2U);
  EXPECT_EQ(runs.mean, QueryHeadScores::dense(2, 2, std::vector<double>{.5, 0, 1, 4}));
}

TEST(HeadRuns, RefuseDamagedFilesWithFileKeyAndValue) {
  const Hostile cases[] = {
      {"", "f.json: not a JSON number or list at byte 1"},
      {"{}", "f.json: no heads"},
      {"[]", "f.json: a list where {\"layer-head\": [run, ...]} has none"},
      {"3", "f.json: 3 where a list of runs was expected"},
      {R"({"0-0": 3})", "f.json: key '0-0': 3 where a list of runs was expected"},
      {R"({"0-0": {"a": 1}})", "f.json: key '0-0': an object where runs were expected"},
      {R"({"0-0": [[1]]})",
       "f.json: key '0-0': a list where {\"layer-head\": [run, ...]} has none"},
      {R"({"0-0": []})", "f.json: key '0-0': no runs, expected at least 1"},
      {R"({"0-0": [1], "0-1": [1, 2]})",
       "f.json: key '0-1': 2 runs, expected 1 as for the first key"},
      {R"({"0-0": [1], "0-0": [1]})", "f.json: key '0-0': the key is there twice"},
      {R"({"0-0": [1], "0\u002d0": [1]})", "f.json: key '0-0': the key is there twice"},
      {R"({"0-0": [1], "00-0": [1]})", "f.json: key '00-0': not of the form \"layer-head\""},
      {R"({"0-00": [1]})", "f.json: key '0-00': not of the form \"layer-head\""},
      {R"({"-0-0": [1]})", "f.json: key '-0-0': not of the form \"layer-head\""},
      {R"({"0--0": [1]})", "f.json: key '0--0': not of the form \"layer-head\""},
      {R"({"+0-0": [1]})", "f.json: key '+0-0': not of the form \"layer-head\""},
      {R"({" 0-0": [1]})", "f.json: key ' 0-0': not of the form \"layer-head\""},
      {R"({"0-0-0": [1]})", "f.json: key '0-0-0': not of the form \"layer-head\""},
      {R"({"0x1-0": [1]})", "f.json: key '0x1-0': not of the form \"layer-head\""},
      {R"({"0-0\u0000": [1]})", "f.json: key '0-0#': not of the form \"layer-head\""},
      {R"({"0-0": [1e308, 1e308]})",
       "f.json: key '0-0': the sum of the runs does not fit a double at 1e+308"},
      {R"({"0-0": [1], "0-1": [-1.7e308, -1.7e308]})",
       "f.json: key '0-1': the sum of the runs does not fit a double at -1.7e+308"},
      {R"({"0-0": [Infinity]})", "f.json: key '0-0': not a JSON number or list at byte 10"},
      {R"({"0-0": [+1]})", "f.json: key '0-0': not a JSON number or list at byte 10"},
      {R"({"0-0": [01]})", "f.json: key '0-0': not a JSON number or list at byte 11"},
      {R"({"0-0": [1],})", "f.json: key '0-0': not a JSON number or list at byte 13"},
      {R"({"0-0": [1]} {})", "f.json: key '0-0': not a JSON number or list at byte 14"},
      {"// no comments\n{}", "f.json: not a JSON number or list at byte 1"},
      {"\xff\xfe{", "f.json: not a JSON number or list at byte 1"},
      {R"({"0-0": [1], "1-1": [1]})", "f.json: key \"0-1\" is missing of 2 layers x 2 heads"},
      {R"({"1-0": [1]})", "f.json: key \"0-0\" is missing of 2 layers x 1 heads"},
      {R"({"0-1": [1], "4095-4095": [1]})",
       "f.json: key \"0-0\" is missing of 4096 layers x 4096 heads"},
      {R"({"0-4096": [1]})", "f.json: key '0-4096': index 4096 is not in [0, 4095]"},
      {R"({"-1-0": [1]})", "f.json: key '-1-0': not of the form \"layer-head\""},
      {R"({"0--1": [1]})", "f.json: key '0--1': not of the form \"layer-head\""},
      {R"({"99999999999-0": [1]})",
       "f.json: key '99999999999-0': index 99999999999 is not in [0, 4095]"},
      {R"({"": [1]})", "f.json: key '': not of the form \"layer-head\""},
      {R"({"0": [1]})", "f.json: key '0': not of the form \"layer-head\""},
      {R"({"0-": [1]})", "f.json: key '0-': not of the form \"layer-head\""},
      {R"({"0-0 ": [1]})", "f.json: key '0-0 ': not of the form \"layer-head\""},
      {R"({"0-0": ["1"]})", "f.json: key '0-0': '1' is not a number"},
      {R"({"0-0": [null]})", "f.json: key '0-0': null is not a number"},
      {R"({"0-0": [true]})", "f.json: key '0-0': a boolean is not a number"},
      {R"({"0-0": [NaN]})", "f.json: key '0-0': not a JSON number or list at byte 10"},
      {R"({"0-0": [1e999]})", "f.json: key '0-0': not a JSON number or list at byte 14"},
      {R"({"0-0": [1], "0-1": [1)", "f.json: key '0-1': not a JSON number or list at byte 23"},
      {R"({"0-0": [1]} x)", "f.json: key '0-0': not a JSON number or list at byte 14"},
  };
  for (const Hostile& hostile : cases) {
    EXPECT_THAT(message_of<FormatError>([&] { (void)parse_head_runs(hostile.text, "f.json"); }),
                StartsWith(hostile.message))  // ", near '...'" differs between parser versions
        << hostile.text;
  }
}

TEST(HeadRuns, SurviveDeepNestingAndEveryTruncation) {
  const std::string deep = "{\"0-0\": " + std::string(100000, '[');
  EXPECT_THROW((void)parse_head_runs(deep, "f.json"), FormatError);
  const std::string whole = R"({"0-0": [0.5, 1], "0-1": [1e-3, 2]})";
  for (std::size_t i = 0; i < whole.size(); ++i) {
    EXPECT_THROW((void)parse_head_runs(whole.substr(0, i), "f.json"), FormatError);
  }
}

TEST(HeadRuns, RefuseTextAfterANul) {
  const std::string text("{\"0-0\": [1]}\0 and more", 22);
  EXPECT_EQ(message_of<FormatError>([&] { (void)parse_head_runs(text, "f.json"); }),
            "f.json: not JSON: a NUL at byte 13");
}

TEST(HeadRuns, StopAtTooManyHeads) {
  std::string text = "{";
  for (std::size_t i = 0; i <= detail::kMaxScores; ++i) {
    text += '"' + std::to_string(i / 4096) + '-' + std::to_string(i % 4096) + "\":[1],";
  }
  text.back() = '}';
  EXPECT_EQ(message_of<FormatError>([&] { (void)parse_head_runs(text, "f.json"); }),
            "f.json: key '256-0': more than the limit of 1048576 heads");
}

struct Published {
  const char* file;
  std::size_t num_runs;
  int at_least_a_tenth;
  int above_zero;
  double sum;
  std::vector<std::pair<HeadId, double>> top;
};

TEST(HeadRuns, HaveThePublishedStatistics) {
  const Published files[] = {
      {"retrieval_head/llama-2-7b-80k/head_score.json",
       586,
       33,
       305,
       -1,
       {{{16, 19}, .943}, {{11, 15}, .920}, {{8, 26}, .800}, {{6, 9}, .618}, {{7, 12}, .614}}},
      {"headkv/Meta-Llama-3-8B-Instruct/retrieval_heads.json", 107, 50, 296, 19.80, {}},
      {"headkv/Meta-Llama-3-8B-Instruct/retrieval_reasoning_heads.json",
       74,
       70,
       1022,
       22.87,
       {{{15, 30}, .344}, {{8, 11}, .329}, {{16, 1}, .301}}},
  };
  for (const Published& expected : files) {
    const std::string path = published(expected.file);
    HEADWISE_SKIP_WITHOUT(path);
    const HeadRuns runs = load_head_runs(path);
    EXPECT_EQ(runs.num_runs, expected.num_runs);
    EXPECT_EQ(runs.mean.heads_per_layer(), std::vector<int>(32, 32));
    std::vector<double> means(runs.mean.values().begin(), runs.mean.values().end());
    EXPECT_EQ(std::count_if(means.begin(), means.end(), [](double x) { return x >= .1; }),
              expected.at_least_a_tenth);
    EXPECT_EQ(std::count_if(means.begin(), means.end(), [](double x) { return x > 0; }),
              expected.above_zero);
    double sum = 0;
    for (const double mean : means) sum += mean;
    if (expected.sum > 0) {  // published for HeadKV only
      EXPECT_NEAR(sum, expected.sum, 5e-3);
    }
    std::sort(means.rbegin(), means.rend());
    for (std::size_t i = 0; i < expected.top.size(); ++i) {
      const auto& [head, mean] = expected.top[i];
      EXPECT_NEAR(runs.mean.value(head.layer, head.kv_head), mean, 5e-4);
      EXPECT_EQ(runs.mean.value(head.layer, head.kv_head), means[i]);
    }
  }
}

TEST(WindowConfig, ReadsTheTwoSizesOrNothing) {
  EXPECT_EQ(parse_window_config(R"({"sink_size": 128, "recent_size": 256, "lr": 0.02})", "c"),
            (Window{128, 256}));
  EXPECT_EQ(parse_window_config(R"({"sink_size": null, "recent_size": null})", "c"), std::nullopt);
  EXPECT_EQ(parse_window_config("{}", "c"), std::nullopt);
  EXPECT_EQ(load_window_config(::testing::TempDir() + "headwise_no_such_dir"), std::nullopt);
}

TEST(WindowConfig, RefusesSizesThatMeanNothing) {
  const Hostile cases[] = {
      {"[1]", "c.json: not a JSON object"},
      {R"({"sink_size": 128})",
       "c.json: key 'recent_size': missing or null, expected both sizes or none"},
      {R"({"sink_size": null, "recent_size": 256})",
       "c.json: key 'sink_size': missing or null, expected both sizes or none"},
      {R"({"sink_size": -1, "recent_size": 256})",
       "c.json: key 'sink_size': '-1' is not an integer in [0, 1099511627776]"},
      {R"({"sink_size": 0, "recent_size": 0})",
       "c.json: key 'recent_size': '0' is not an integer in [1, 1099511627776]"},
      {R"({"sink_size": 1.5, "recent_size": 256})",
       "c.json: key 'sink_size': '1.5' is not an integer in [0, 1099511627776]"},
      {R"({"sink_size": "64", "recent_size": 256})",
       "c.json: key 'sink_size': '\"64\"' is not an integer in [0, 1099511627776]"},
      {R"({"sink_size": 64, "recent_size": 18446744073709551615})",
       "c.json: key 'recent_size': '18446744073709551615' is not an integer in [1, 1099511627776]"},
  };
  for (const Hostile& hostile : cases) {
    EXPECT_EQ(message_of<FormatError>([&] { (void)parse_window_config(hostile.text, "c.json"); }),
              hostile.message)
        << hostile.text;
  }
}

TEST(WindowConfig, RefusesWhatNoParserShouldTake) {
  const auto refusal = [](const std::string& text) {
    return message_of<FormatError>([&] { (void)parse_window_config(text, "c.json"); });
  };
  const std::string deep(200000, '[');
  EXPECT_EQ(refusal("{\"sink_size\": " + deep), "c.json: key 'sink_size': nested deeper than 32");
  EXPECT_EQ(refusal("{\"sink_size\": " + deep + std::string(200000, ']') + "}"),
            "c.json: key 'sink_size': nested deeper than 32");
  EXPECT_EQ(refusal(R"({"sink_size": [[1, 2], [3]], "recent_size": 256})"),
            "c.json: key 'sink_size': 'array' is not an integer in [0, 1099511627776]");
  EXPECT_EQ(refusal(R"({"sink_size": 4, "recent_size": 60, "sink_size": 64})"),
            "c.json: key 'sink_size': the key is there twice");
  EXPECT_THAT(refusal(R"({"sink_size": 4, "recent_size": 1e999})"),
              StartsWith("c.json: key 'recent_size': not JSON at byte 37"));
  EXPECT_EQ(refusal(std::string(kMaxJsonBytes + 1, '[')),
            "c.json: larger than the limit of 4194304 bytes");
}

TEST(WindowConfig, IsReadFromNoFileBeyondTheLimit) {
  const std::string path = ::testing::TempDir() + "headwise_big_config.json";
  detail::save_text(path, std::string(kMaxJsonBytes + 1, ' '));
  EXPECT_EQ(message_of<FormatError>([&] { (void)load_window_config(path); }),
            path + ": larger than the limit of 4194304 bytes");
  std::remove(path.c_str());
}

TEST(WindowConfig, ReadsThePublishedFileOrItsDirectory) {
  const std::string directory = published("duo_attention/Meta-Llama-3.1-8B-Instruct");
  HEADWISE_SKIP_WITHOUT(directory);
  EXPECT_EQ(load_window_config(directory), (Window{128, 256}));
  EXPECT_EQ(load_window_config(directory + "/config.json"), (Window{128, 256}));
  EXPECT_EQ(load_window_config(published("rlkv/Llama-3.1-8B-R1")), std::nullopt);
}

}  // namespace
}  // namespace headwise
