// SPDX-License-Identifier: MIT
// Hidden rows of any bits, scores at the end of the range, sums beyond it: both kernels, every ISA.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "headwise/attention/cpu/decode.hpp"
#include "headwise/attention/cpu/prefill.hpp"
#include "headwise/attention/state.hpp"
#include "support/attention_cases.hpp"
#include "support/run_kernels.hpp"

namespace headwise::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class Extremes : public ::testing::TestWithParam<KernelPair> {
 protected:
  static std::unique_ptr<KernelHead> make(const AttentionCase& c) { return GetParam().head(c); }

  /// Every output of both kernels, however the work is cut, is the oracle's where that is finite,
  /// and not finite elsewhere.
  static void expect_oracle(const AttentionCase& c, KernelHead& head, const std::string& what) {
    const std::vector<double> truth = head.truth();
    const std::int64_t rows = head.num_rows();
    const auto dim = static_cast<std::size_t>(c.v_dim);
    const auto compare = [&](const std::string& how) {
      for (std::size_t row = 0; row < truth.size(); row += dim) {
        double error = 0.0, norm = 0.0;
        for (std::size_t d = row; d < row + dim; ++d) {
          const auto x = static_cast<double>(head.out()[d]);
          ASSERT_EQ(std::isfinite(x), std::isfinite(truth[d]))
              << what << ", " << how << ", row " << row / dim << ": " << x << ", not " << truth[d];
          if (!std::isfinite(x)) continue;
          error += std::pow((x - truth[d]) * 1e-30, 2);  // V may be 1e38
          norm += std::pow(truth[d] * 1e-30, 2);
        }
        ASSERT_LE(std::sqrt(error), 1e-5 * std::sqrt(norm)) << what << ", " << how;
      }
    };
    head.decode();
    compare("decode");
    head.decode({0, rows / 3, rows / 3, rows / 2});
    compare("decode in splits");
    head.prefill(prefill_tile_queries(c.group_size));
    compare("prefill");
    head.prefill(5);
    compare("prefill in small tiles");
  }
};
INSTANTIATE_TEST_SUITE_P(AllKernels, Extremes, ::testing::ValuesIn(all_kernels()),
                         name_of_kernels<KernelPair>);

TEST_P(Extremes, ALaterRowOfTheStepContributesNothingWhateverItsBitsAre) {
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), kInfinity, 70000.0F}) {
    for (const std::int64_t queries : {2, 16, 40, 64, 65, 130}) {
      const AttentionCase c{
          .name = "", .k_dim = 16, .v_dim = 32, .group_size = 2, .past = 3, .queries = queries};
      for (const std::int64_t bad : {queries - 1, queries / 2}) {
        const auto in_v = make(c), in_both = make(c);
        in_v->set_row(c.past + bad, 0.5F, value);
        in_both->set_row(c.past + bad, value, value);
        expect_oracle(c, *in_v, "V");
        expect_oracle(c, *in_both, "K and V");
      }
    }
  }
}

TEST_P(Extremes, ARowThatTheWindowLeavesBehindContributesNothingWhateverItsBitsAre) {
  const AttentionCase cases[] = {
      {.name = "ring",
       .v_dim = 32,
       .past = 150,
       .queries = 70,
       .window = {4, 60},
       .kept = Kept::kRing},
      {.name = "dense",
       .v_dim = 32,
       .group_size = 3,
       .past = 150,
       .queries = 30,
       .window = {4, 60}},
      {.name = "own rows", .v_dim = 32, .past = 0, .queries = 120, .window = {2, 20}}};
  for (const AttentionCase& c : cases) {
    // Seen by the first queries and not by later ones, stored and of the step.
    for (const std::int64_t pos : {c.past - 59, c.past - 30, c.past + 1, c.past + 10}) {
      if (pos < c.window.sink) continue;
      for (const float value : {std::numeric_limits<float>::quiet_NaN(), kInfinity}) {
        const auto head = make(c);
        head->set_row(pos, 0.25F, value);
        expect_oracle(c, *head, c.name);
      }
    }
  }
}

TEST_P(Extremes, ALaterRowDoesNotCostEarlierQueriesDigitsOfTinyValues) {
  // Sums of 3e38 overflow and are done again scaled: for the queries that see the row alone.
  constexpr std::int64_t past = 5;
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), kInfinity, 3e38F}) {
    for (const std::int64_t queries : {2, 70}) {
      const AttentionCase c{.name = "", .k_dim = 16, .v_dim = 16, .past = past, .queries = queries};
      std::vector<float> outs[2];
      for (const bool large : {false, true}) {
        const auto head = make(c);
        for (std::int64_t pos = 0; pos < past + queries; ++pos) {
          head->set_row(pos, 0.1F, static_cast<float>(1 + pos % 7) * 1.3e-38F);
        }
        if (large) head->set_row(past + queries - 1, 0.1F, value);
        head->decode();
        std::vector<float>& out = outs[large ? 1 : 0];
        out.insert(out.end(), head->out().begin(), head->out().end() - 16);
        head->prefill(48);
        out.insert(out.end(), head->out().begin(), head->out().end() - 16);
      }
      EXPECT_EQ(outs[0], outs[1]) << value << ", " << queries << " queries";
    }
  }
}

TEST_P(Extremes, ScoresOfMinusInfinityAreNoRows) {
  // The first 20 tokens have scores of -inf, whichever way: stored as infinite, or out of range.
  const AttentionCase c{
      .name = "", .k_dim = 16, .v_dim = 16, .group_size = 2, .past = 9, .queries = 70};
  for (const float k : {kInfinity, 3e38F}) {
    const auto head = make(c);
    head->set_q(-1.0F);
    for (std::int64_t pos = 0; pos < c.past + c.queries; ++pos) {
      head->set_row(pos, pos < 20 ? k : 1.0F, static_cast<float>(pos % 50));
    }
    expect_oracle(c, *head, "minus infinity");
  }
}

TEST_P(Extremes, HugeNegativeScoresHideNothingButWhatIsHidden) {
  const AttentionCase c{.name = "", .k_dim = 16, .v_dim = 16, .past = 9, .queries = 70};
  for (const float k : {1e30F, 1e37F, 2.1e37F, 8.0e37F}) {
    const auto head = make(c);
    head->set_q(-1.0F);
    for (std::int64_t pos = 0; pos < c.past + c.queries; ++pos) {
      head->set_row(pos, k, static_cast<float>(pos % 50));
    }
    expect_oracle(c, *head, std::to_string(k));
  }
}

TEST_P(Extremes, PlusInfinityOrNanAmongVisibleScoresIsNan) {
  for (const float k : {kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
    const AttentionCase c{.name = "", .k_dim = 16, .v_dim = 16, .past = 70, .queries = 20};
    const auto head = make(c);
    head->set_q(1.0F);
    head->set_row(80, k, 1.0F);
    expect_oracle(c, *head, "visible");
  }
}

TEST_P(Extremes, TheMeanOfHugeValuesIsTheMean) {
  // In the row format's own range: 6e4 fits f16.
  const float largest = 1e38F;
  const float huge = is_finite(make({.name = ""})->stored(largest)) ? largest : 6e4F;
  for (const std::int64_t queries : {1, 90}) {
    const AttentionCase c{
        .name = "", .k_dim = 16, .v_dim = 16, .past = 300, .queries = queries, .compensation = 10};
    const auto head = make(c);
    head->set_q(0.0F);
    for (std::int64_t pos = 0; pos < 300 + queries; ++pos) {
      head->set_row(pos, 1.0F, pos % 4 == 0 ? huge / 2.0F : huge);
    }
    expect_oracle(c, *head, "huge");
  }
}

TEST_P(Extremes, ACompensationRowOfMinusInfinityIsNone) {
  const AttentionCase c{.name = "", .k_dim = 16, .v_dim = 16, .past = 5, .queries = 70};
  const auto head = make(c);
  const std::vector<float> k(16, 3e38F), v(16, 5.0F);
  head->set_compensation({k.data(), v.data(), 10});
  head->set_q(-10.0F);
  const std::vector<double> truth = head->truth();
  head->decode();
  EXPECT_LE(relative_error(head->out(), truth), 1e-5);
  head->prefill(48);
  EXPECT_LE(relative_error(head->out(), truth), 1e-5);
}

TEST_P(Extremes, APartialOfScoresOfMinusInfinityIsEmpty) {
  const AttentionCase c{.name = "", .k_dim = 16, .v_dim = 16, .past = 5};
  const auto head = make(c);
  head->set_q(-1.0F);  // -inf, rounded or in the sum
  for (std::int64_t pos = 0; pos < 6; ++pos) head->set_row(pos, 3e38F, 2.0F);
  AlignedFloats partial(decode_partial_floats(1, 16));
  AlignedFloats scratch(decode_scratch_floats(1, 16, 16));
  head->decode_one_split({0, 5, true}, partial.data(), scratch.data());
  const SoftmaxState state{partial.data()[0], partial.data()[16], partial.data() + 32};
  EXPECT_TRUE(state.empty());
  EXPECT_EQ(state.lse(), -kInfinity);
  EXPECT_EQ(state.out[0], 0.0F);
}

TEST_P(Extremes, HiddenRowsContributeNothingToCappedScoresWithSlopesAndSinks) {
  const AttentionCase cases[] = {
      {.name = "ring",
       .v_dim = 32,
       .group_size = 2,
       .past = 150,
       .queries = 70,
       .window = {4, 60},
       .kept = Kept::kRing,
       .soft_cap = 20.0F,
       .sinks = true,
       .alibi = true},
      {.name = "dense", .v_dim = 32, .past = 3, .queries = 65, .soft_cap = 2.0F, .sinks = true},
      {.name = "slopes", .v_dim = 32, .past = 3, .queries = 65, .alibi = true}};
  for (const AttentionCase& c : cases) {
    for (const float value : {std::numeric_limits<float>::quiet_NaN(), kInfinity, -kInfinity}) {
      for (const std::int64_t pos : {c.past + c.queries - 1, c.past + 30}) {
        const auto head = make(c);
        head->set_row(pos, value, value);
        if (c.soft_cap > 0.0F && !std::isnan(value)) head->set_q(0.5F);  // no infinity - infinity
        expect_oracle(c, *head, c.name);
      }
    }
  }
}

TEST_P(Extremes, ACapMakesInfiniteScoresFiniteAndLeavesNan) {
  for (const float k : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
    for (const std::int64_t queries : {1, 20}) {
      const AttentionCase c{
          .name = "", .k_dim = 16, .v_dim = 16, .past = 70, .queries = queries, .soft_cap = 4.0F};
      const auto head = make(c);
      head->set_q(1.0F);
      head->set_row(7, k, 1.0F);
      expect_oracle(c, *head, "past");
      head->set_row(70, k, 1.0F);
      expect_oracle(c, *head, "own");
    }
  }
}

TEST_P(Extremes, ASinkBesideScoresOfMinusInfinityTakesAll) {
  for (const std::int64_t queries : {1, 70}) {
    const AttentionCase c{.name = "",
                          .k_dim = 16,
                          .v_dim = 16,
                          .group_size = 2,
                          .past = 300,
                          .queries = queries,
                          .sinks = true};
    const auto head = make(c);
    head->set_q(-1.0F);
    for (std::int64_t pos = 0; pos < 300 + queries; ++pos) head->set_row(pos, 3e38F, 2.0F);
    expect_oracle(c, *head, "sink");
    EXPECT_EQ(head->out()[0], 0.0F);
  }
}

TEST_P(Extremes, SinksFarAboveAndBelowTheScoresAreAddedOnce) {
  for (const float sink : {-3e38F, -60.0F, 0.0F, 60.0F, 3e38F}) {
    for (const std::int64_t queries : {1, 70}) {
      const AttentionCase c{.name = "", .past = 200, .queries = queries};
      const auto head = make(c);
      head->set_sinks(&sink);
      const std::vector<double> truth = head->truth();
      head->decode({0, 10, 100, 150});
      EXPECT_LE(relative_error(head->out(), truth), 1e-5) << sink;
      head->prefill(48);
      EXPECT_LE(relative_error(head->out(), truth), 1e-5) << sink;
    }
  }
}

}  // namespace
}  // namespace headwise::test
