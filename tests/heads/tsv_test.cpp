// SPDX-License-Identifier: MIT
#include "headwise/heads/tsv.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "headwise/heads/select.hpp"
#include "support/errors.hpp"
#include "support/published.hpp"

namespace headwise {
namespace {

using testing::message_of;
using testing::published;

std::vector<double> numbers(const HeadScores& scores) {
  return {scores.values().begin(), scores.values().end()};
}

TEST(Tsv, ReadsTabsSpacesAndBothLineEnds) {
  const HeadScores expected = HeadScores::dense(2, 2, std::vector<double>{.5, -1e-3, 1.0078, 0});
  EXPECT_EQ(parse_tsv("0.5\t-1e-3\n1.0078\t0\n", "t"), expected);
  EXPECT_EQ(parse_tsv("0.5\t-1e-3\r\n1.0078\t0\r\n", "t"), expected);
  EXPECT_EQ(parse_tsv("0.5 -1e-3\n 1.0078   0", "t"), expected);
  EXPECT_EQ(parse_tsv("0.5 \t -1e-3\n1.0078\t0 \n\n \r\n", "t"), expected);
  EXPECT_EQ(parse_tsv("7", "t"), HeadScores::dense(1, 1, std::vector<double>{7}));
}

TEST(Tsv, KeepsValuesOutsideTheUnitInterval) {
  EXPECT_EQ(numbers(parse_tsv("-1.06e-2\t1.0078125\n", "t")),
            (std::vector<double>{-1.06e-2, 1.0078125}));
}

TEST(Tsv, ReadsQueryHeadTablesAsSuch) {
  const auto scores = parse_tsv<QueryHeadScores>("1\t2\t3\t4\n", "t");
  EXPECT_EQ(reduce_max(scores, 2), HeadScores::dense(1, 2, std::vector<double>{2, 4}));
}

struct HostileTable {
  std::string text;
  const char* message;
};

TEST(Tsv, RefusesDamagedFilesWithFileLineAndValue) {
  const std::string nul("1\t2\n3\t\0\n", 8);
  const std::string many_lines = std::string(1 << 20, '\n').append("1");
  const std::string many_tabs = std::string(1 << 20, '\t').append("1");
  const std::string many_digits = std::string(100, '9').append("z");
  const HostileTable cases[] = {
      {"", "f.tsv:1: no values, expected a line for every layer"},
      {" \r\n\n", "f.tsv:1: no values, expected a line for every layer"},
      {"\n1\t2\n", "f.tsv:1: an empty line, expected one for every layer"},
      {"1\t2\n\n3\t4\n", "f.tsv:2: an empty line, expected one for every layer"},
      {"1\t2\n3\n", "f.tsv:2: 1 values, expected 2 as in line 1"},
      {"1\t2\n3\t4\t5\n", "f.tsv:2: 3 values, expected 2 as in line 1"},
      {"1\t2\n3\tnan\n", "f.tsv:2: 'nan' is not a finite number"},
      {"1\t-inf\n", "f.tsv:1: '-inf' is not a finite number"},
      {"1\t1e999\n", "f.tsv:1: '1e999' does not fit a double"},
      {"1\tx2\n", "f.tsv:1: 'x2' is not a number"},
      {"1\t2x\n", "f.tsv:1: '2x' is not a number"},
      {"1,2\n", "f.tsv:1: '1,2' is not a number"},
      {"+1\t2\n", "f.tsv:1: '+1' is not a number"},
      {"1\tInfinity\n", "f.tsv:1: 'Infinity' is not a finite number"},
      {"1\t2\n3\t4\nx", "f.tsv:3: 'x' is not a number"},
      {std::string("1\t2\n\0 3", 7), "f.tsv:2: '#' is not a number"},
      {std::string("1\t2\n\0", 5), "f.tsv:2: '#' is not a number"},
      {many_lines, "f.tsv:1: an empty line, expected one for every layer"},
      {many_tabs, "f.tsv:1: a value is missing beside a tab"},
      {"0x10\t1\n", "f.tsv:1: '0x10' is not a number"},
      {"1\t\t2\n", "f.tsv:1: a value is missing beside a tab"},
      {"1\t \t2\n", "f.tsv:1: a value is missing beside a tab"},
      {"\t1\n", "f.tsv:1: a value is missing beside a tab"},
      {"1\t2\t\n", "f.tsv:1: a value is missing beside a tab"},
      {"1\r2\n", "f.tsv:1: '1#2' is not a number"},
      {"\xEF\xBB\xBF"
       "1\t2\n",
       "f.tsv:1: '###1' is not a number"},
      {nul, "f.tsv:2: '#' is not a number"},
      {"layer0\n", "f.tsv:1: 'layer0' is not a number"},
      {many_digits, "f.tsv:1: '9999999999999999999999999999999999999999...' is not a number"},
  };
  for (const HostileTable& hostile : cases) {
    EXPECT_EQ(message_of<FormatError>([&] { (void)parse_tsv(hostile.text, "f.tsv"); }),
              hostile.message);
  }
}

/// What is said of `lines` lines of `values` values each.
std::string refusal_of_table(int lines, int values) {
  std::string line;
  for (int i = 0; i < values; ++i) line += "1\t";
  line.back() = '\n';
  std::string text;
  for (int i = 0; i < lines; ++i) text += line;
  return message_of<FormatError>([&] { (void)parse_tsv(text, "f.tsv"); });
}

TEST(Tsv, StopsAtTooManyValuesOrLines) {
  EXPECT_EQ(refusal_of_table(kMaxLayers + 1, 1), "f.tsv:65537: more than the limit of 65536 lines");
  EXPECT_EQ(refusal_of_table(1, kMaxHeads + 1),
            "f.tsv:1: 65537 values, more than the limit of 65536");
  EXPECT_EQ(refusal_of_table(33, 1 << 15), "f.tsv:33: more than the limit of 1048576 values");
  EXPECT_EQ(refusal_of_table(1, 2 << 20), "f.tsv:1: more than the limit of 1048576 values");
}

TEST(Tsv, ReadsBackTheLargestTableItTakes) {
  const HeadScores scores =
      HeadScores::dense(16, kMaxHeads, std::vector<double>(detail::kMaxScores, -1.0 / 3));
  const std::string text = to_tsv(scores);
  EXPECT_LE(text.size(), detail::kMaxFileBytes);
  EXPECT_EQ(parse_tsv(text, "t"), scores);
}

TEST(Tsv, SurvivesEveryTruncationAndEveryFlippedByte) {
  const std::string whole =
      to_tsv(HeadScores::dense(2, 3, std::vector<double>{.5, 1, 0, -.1, 2, 3}));
  for (std::size_t i = 0; i < whole.size(); ++i) {
    for (const char c : {'\0', '\t', '\n', '\r', '-', 'e', '9', '\xff'}) {
      std::string damaged = whole;
      damaged[i] = c;
      for (const std::string& text : {damaged, whole.substr(0, i)}) {
        try {
          EXPECT_GE(parse_tsv(text, "t").num_heads(), 1U);
        } catch (const FormatError&) {
        }
      }
    }
  }
}

TEST(Tsv, WritesThePublishedLayout) {
  EXPECT_EQ(
      to_tsv(HeadScores::dense(2, 2, std::vector<double>{.859375, -9.250640869140625e-05, 1, 0})),
      "8.593750000000000000e-01\t-9.250640869140625000e-05\n"
      "1.000000000000000000e+00\t0.000000000000000000e+00\n");
}

TEST(Tsv, ReadsBackEveryDoubleBitForBit) {
  SplitMix64 random(11);
  std::vector<double> values{0.0,
                             -0.0,
                             0.1,
                             1.0 / 3,
                             std::numeric_limits<double>::max(),
                             std::numeric_limits<double>::min(),
                             std::numeric_limits<double>::denorm_min()};
  while (values.size() < 1000) {
    const double value = std::bit_cast<double>(random.next());
    if (is_finite(value)) values.push_back(value);
  }
  const HeadScores scores = HeadScores::dense(100, 10, values);
  const HeadScores back = parse_tsv(to_tsv(scores), "t");
  for (std::size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(std::bit_cast<std::uint64_t>(back.values()[i]),
              std::bit_cast<std::uint64_t>(values[i]));
  }
}

TEST(Tsv, SavesAndLoads) {
  const std::string path = ::testing::TempDir() + "headwise_tsv_test.tsv";
  const HeadScores scores = HeadScores::dense(1, 2, std::vector<double>{.25, 1});
  save_tsv(scores, path);
  EXPECT_EQ(load_tsv(path), scores);
  std::remove(path.c_str());
  EXPECT_EQ(message_of<ConfigError>([&] { (void)load_tsv(path); }),
            "cannot open " + path + ": No such file or directory");
}

TEST(Tsv, NamesThePathThatIsNoFile) {
  EXPECT_EQ(message_of<ConfigError>([] { (void)load_tsv(::testing::TempDir()); }),
            "cannot read " + ::testing::TempDir() + ": Is a directory");
  EXPECT_THAT(message_of<ConfigError>([] { (void)load_tsv(""); }),
              ::testing::StartsWith("cannot open "));
  EXPECT_EQ(message_of<FormatError>([] { (void)load_tsv("/dev/zero"); }),
            "/dev/zero: larger than the limit of 33554432 bytes");
}

TEST(Tsv, RefusesToWriteUnequalLayers) {
  EXPECT_EQ(message_of<ConfigError>([] {
              (void)to_tsv(HeadScores(std::vector<int>{1, 2}, {1, 2, 3}));
            }),
            "layer 1 has 2 heads, a TSV needs as many as in layer 0: 1");
}

// What was measured on the published files: range and mean of the raw values, then counts of the
// clipped ones.
struct PublishedTable {
  const char* file;
  int num_layers;
  int num_heads;
  double min;
  double max;
  double mean;
  int zeros;
  int ones;
  int above_half;
};

class PublishedTsv : public ::testing::TestWithParam<PublishedTable> {};

TEST_P(PublishedTsv, HasTheMeasuredStatistics) {
  const PublishedTable& expected = GetParam();
  const std::string path = published(expected.file);
  HEADWISE_SKIP_WITHOUT(path);
  const HeadScores scores = load_tsv(path);
  EXPECT_EQ(scores.num_layers(), expected.num_layers);
  EXPECT_EQ(scores.num_heads(0), expected.num_heads);
  std::vector<double> values = numbers(scores);
  const auto [min, max] = std::minmax_element(values.begin(), values.end());
  EXPECT_NEAR(*min, expected.min, std::abs(expected.min) * .05);
  EXPECT_NEAR(*max, expected.max, 5e-5);
  double sum = 0;
  for (const double value : values) sum += value;
  EXPECT_NEAR(sum / static_cast<double>(values.size()), expected.mean, 5e-5);
  for (double& value : values) value = std::clamp(value, 0.0, 1.0);
  EXPECT_EQ(std::count(values.begin(), values.end(), 0.0), expected.zeros);
  EXPECT_EQ(std::count(values.begin(), values.end(), 1.0), expected.ones);
  EXPECT_EQ(std::count_if(values.begin(), values.end(), [](double value) { return value > .5; }),
            expected.above_half);
}

TEST_P(PublishedTsv, IsWrittenBackByteForByte) {
  const std::string path = published(GetParam().file);
  HEADWISE_SKIP_WITHOUT(path);
  EXPECT_EQ(to_tsv(load_tsv(path)), detail::load_text(path));
}

INSTANTIATE_TEST_SUITE_P(
    Files, PublishedTsv,
    ::testing::Values(
        PublishedTable{"duo_attention/Llama-2-7B-32K-Instruct/full_attention_heads.tsv", 32, 32,
                       -1.40e-3, 1, .4189, 274, 145, 444},
        PublishedTable{"duo_attention/Llama-3-8B-Instruct-Gradient-1048k/full_attention_heads.tsv",
                       32, 8, -2.4e-4, 1, .7689, 18, 82, 207},
        PublishedTable{"duo_attention/Meta-Llama-3.1-8B-Instruct/full_attention_heads.tsv", 32, 8,
                       0, 1, .8518, 7, 57, 234},
        PublishedTable{"duo_attention/Mistral-7B-Instruct-v0.2/full_attention_heads.tsv", 32, 8,
                       -1.2e-4, 1, .9231, 5, 110, 244},
        PublishedTable{"duo_attention/Qwen-2.5-7B-R1/full_attention_heads.tsv", 28, 4, .4453, 1,
                       .9642, 0, 32, 111},
        PublishedTable{"rlkv/Llama-3.1-8B-R1/adapter_weights.tsv", 32, 8, -4.8e-3, 1, .5822, 18, 7,
                       166},
        PublishedTable{"rlkv/Qwen-2.5-7B-R1/adapter_weights.tsv", 28, 4, .1152, 1.0078, .7747, 0, 6,
                       100}),
    [](const auto& test) {
      std::string name = test.param.file;
      name = name.substr(0, name.rfind('/'));
      std::replace_if(
          name.begin(), name.end(), [](unsigned char c) { return !std::isalnum(c); }, '_');
      return name;
    });

}  // namespace
}  // namespace headwise
