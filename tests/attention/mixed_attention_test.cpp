// SPDX-License-Identifier: MIT
#include "headwise/attention/mixed_attention.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "headwise/core/executor.hpp"
#include "support/errors.hpp"
#include "support/mixed_oracle.hpp"

namespace headwise {
namespace {

using test::mixed_case;
using test::MixedCase;

/// Tasks in the reverse order, each with the next thread's scratch.
struct BackwardsExecutor {
  static constexpr std::size_t num_threads() { return 3; }
  template <class Fn>
  void for_each(std::size_t num_tasks, Fn&& fn) {
    for (std::size_t task = num_tasks; task > 0; --task) fn(task - 1, task % 3);
  }
};

/// Both passes, over tensors with room between their rows, which must stay as it is.
struct MixedRun {
  static constexpr std::int64_t kGap = 16;
  static constexpr float kUntouched = -7.5F;

  std::vector<float> out, d_q, d_k, d_v;  // dense
  std::vector<double> d_gates;
  bool touched_gaps = false;

  template <class E>
  MixedRun(const MixedCase& of, E&& executor) : d_gates(of.gates.size(), 99.0) {
    const LayerShape& layer = of.layer;
    const std::int64_t qo = layer.num_qo_heads();
    const auto spaced = [&](const std::vector<double>& x, std::int64_t heads, int dim) {
      std::vector<float> y(static_cast<std::size_t>(of.n * heads * (dim + kGap)), kUntouched);
      for (std::size_t i = 0; i < x.size(); ++i) {
        const std::size_t width = static_cast<std::size_t>(dim);
        y[i / width * (width + kGap) + i % width] = static_cast<float>(x[i]);
      }
      return y;
    };
    const auto room = [&](std::int64_t heads, int dim) {
      return std::vector<float>(static_cast<std::size_t>(of.n * heads * (dim + kGap)), kUntouched);
    };
    const auto view = [](auto& x, std::int64_t heads, int dim) {
      return TensorView<std::remove_reference_t<decltype(x[0])>>::nhd(x.data(), heads, dim + kGap);
    };
    const std::vector<float> q = spaced(of.q, qo, layer.k_dim);
    const std::vector<float> k = spaced(of.k, layer.num_kv_heads, layer.k_dim);
    const std::vector<float> v = spaced(of.v, layer.num_kv_heads, layer.v_dim);
    const std::vector<float> full = spaced(of.constant_full, qo, layer.v_dim);
    const std::vector<float> d_out = spaced(of.d_out, qo, layer.v_dim);
    std::vector<float> o = room(qo, layer.v_dim);
    std::vector<float> dq = room(qo, layer.k_dim);
    std::vector<float> dk = room(layer.num_kv_heads, layer.k_dim);
    std::vector<float> dv = room(layer.num_kv_heads, layer.v_dim);

    MixedAttention mixed{layer,
                         of.window,
                         of.gates,
                         of.n,
                         view(q, qo, layer.k_dim),
                         view(k, layer.num_kv_heads, layer.k_dim),
                         view(v, layer.num_kv_heads, layer.v_dim)};
    if (!of.constant_full.empty()) mixed.constant_full = view(full, qo, layer.v_dim);
    MixedTape tape;
    Scratch scratch;
    mixed_attention(mixed, view(o, qo, layer.v_dim), tape, scratch, executor);
    mixed_attention_backward(mixed, tape, view(d_out, qo, layer.v_dim),
                             {view(dq, qo, layer.k_dim), view(dk, layer.num_kv_heads, layer.k_dim),
                              view(dv, layer.num_kv_heads, layer.v_dim), d_gates},
                             scratch, executor);
    out = dense(o, layer.v_dim);
    d_q = dense(dq, layer.k_dim);
    d_k = dense(dk, layer.k_dim);
    d_v = dense(dv, layer.v_dim);
  }

 private:
  std::vector<float> dense(const std::vector<float>& spaced, int dim) {
    std::vector<float> x;
    const auto stride = static_cast<std::size_t>(dim + kGap);
    for (std::size_t i = 0; i < spaced.size(); ++i) {
      if (i % stride < static_cast<std::size_t>(dim)) {
        x.push_back(spaced[i]);
      } else {
        touched_gaps |= spaced[i] != kUntouched;
      }
    }
    return x;
  }
};

void expect_is_oracle(const MixedCase& of, const std::string& what) {
  SCOPED_TRACE(what);
  const MixedRun run(of, SerialExecutor{});
  const test::OracleGradients expected = test::oracle_gradients(of);
  EXPECT_LT(test::relative_error(run.out, test::oracle_mixed(of)), 2e-6);
  EXPECT_LT(test::relative_error(run.d_q, expected.q), 5e-6);
  EXPECT_LT(test::relative_error(run.d_k, expected.k), 5e-6);
  EXPECT_LT(test::relative_error(run.d_v, expected.v), 5e-6);
  EXPECT_LT(test::relative_error(run.d_gates, expected.gates), 1e-5);
  EXPECT_FALSE(run.touched_gaps);
}

std::string name_of(const MixedCase& of) {
  return "n " + std::to_string(of.n) + ", group " + std::to_string(of.layer.group_size) +
         ", widths " + std::to_string(of.layer.k_dim) + " and " + std::to_string(of.layer.v_dim);
}

/// Around sink, recent, both, and blocks of 64.
std::vector<std::int64_t> mixed_lengths(const Window& window) {
  std::set<std::int64_t> lengths{0, 1, 2};
  for (const std::int64_t middle : {window.sink, window.recent, window.sink + window.recent,
                                    std::int64_t{64}, std::int64_t{128}, std::int64_t{192}}) {
    for (const std::int64_t n : {middle - 1, middle, middle + 1}) {
      if (n >= 0) lengths.insert(n);
    }
  }
  return {lengths.begin(), lengths.end()};
}

/// Every coordinate of the oracle's gradients against central differences of its loss.
TEST(MixedOracle, HasTheGradientsOfFiniteDifferences) {
  for (const bool is_constant : {false, true}) {
    for (const std::int64_t n : {1, 3, 6}) {
      MixedCase of = mixed_case(2, 3, 16, 16, {1, 2}, n, 3);
      if (is_constant) of.constant_full = mixed_case(2, 3, 16, 16, {1, 2}, n, 4).d_out;
      const test::OracleGradients gradients = test::oracle_gradients(of);
      const auto check = [&](std::vector<double>& x, const std::vector<double>& gradient) {
        constexpr double kStep = 1e-5;
        for (std::size_t i = 0; i < x.size(); ++i) {
          const double at = x[i];
          x[i] = at + kStep;
          const double above = test::oracle_loss(of);
          x[i] = at - kStep;
          const double below = test::oracle_loss(of);
          x[i] = at;
          ASSERT_NEAR((above - below) / (2 * kStep), gradient[i], 1e-7) << i;
        }
      };
      check(of.q, gradients.q);
      check(of.k, gradients.k);
      check(of.v, gradients.v);
      check(of.gates, gradients.gates);
    }
  }
}

TEST(MixedAttention, IsTheOracleAtEveryBoundary) {
  const Window window{5, 20};
  for (const std::int64_t n : mixed_lengths(window)) {
    for (const int group : {1, 3, 8}) {
      const MixedCase of = mixed_case(2, group, 16, 16, window, n, 7);
      expect_is_oracle(of, name_of(of));
    }
  }
}

TEST(MixedAttention, IsTheOracleAtEveryWidth) {
  const Window window{4, 33};
  for (const std::int64_t n : {1, 37, 38, 65, 150}) {
    for (const auto& [k_dim, v_dim] :
         {std::pair{16, 64}, {64, 16}, {80, 80}, {80, 16}, {128, 64}}) {
      const MixedCase of = mixed_case(1, 3, k_dim, v_dim, window, n, 11);
      expect_is_oracle(of, name_of(of));
    }
  }
}

/// Longer than a tile of queries and than a cut, so that what is cut is added up again.
TEST(MixedAttention, IsTheOracleWhereHeadsAreCut) {
  for (const std::int64_t n : {511, 512, 513, 769}) {
    for (const int group : {1, 3}) {
      const MixedCase of = mixed_case(1, group, 16, 16, {16, 64}, n, 13);
      expect_is_oracle(of, name_of(of));
    }
  }
}

/// The derivative of the oracle's loss in a direction, beside the kernels' gradients in it.
TEST(MixedAttention, HasTheDirectionalDerivativesOfTheLoss) {
  const Window window{5, 20};
  std::mt19937 random(17);
  for (const std::int64_t n : {1, 5, 24, 25, 26, 64, 65, 129}) {
    for (const int width : {16, 64, 80}) {
      MixedCase of = mixed_case(2, 3, width, width, window, n, 19);
      SCOPED_TRACE(name_of(of));
      const MixedRun run(of, SerialExecutor{});
      const auto check = [&](std::vector<double>& x, const auto& gradient) {
        std::vector<double> direction(x.size());
        double expected = 0.0;
        double norm = 0.0;
        for (std::size_t i = 0; i < x.size(); ++i) {
          direction[i] = (random() & 1U) != 0 ? 1.0 : -1.0;
          expected += direction[i] * static_cast<double>(gradient[i]);
          norm += std::pow(static_cast<double>(gradient[i]), 2);
        }
        const std::vector<double> at = x;
        const auto loss_at = [&](double step) {
          for (std::size_t i = 0; i < x.size(); ++i) x[i] = at[i] + step * direction[i];
          return test::oracle_loss(of);
        };
        constexpr double kStep = 3e-6;
        const double slope = (loss_at(kStep) - loss_at(-kStep)) / (2 * kStep);
        x = at;
        EXPECT_NEAR(slope, expected, 2e-5 * (std::sqrt(norm) + 1.0));
      };
      check(of.q, run.d_q);
      check(of.k, run.d_k);
      check(of.v, run.d_v);
      check(of.gates, run.d_gates);
    }
  }
}

TEST(MixedAttention, TakesGatesAsTheyAre) {
  for (const std::int64_t n : {30, 150}) {
    MixedCase of = mixed_case(5, 2, 16, 16, {3, 9}, n, 23);
    of.gates = {0.0, 1.0, 1.25, -0.5, 0.5};
    expect_is_oracle(of, name_of(of));
  }
}

TEST(MixedAttention, HasAConstantFullHalf) {
  for (const std::int64_t n : {1, 30, 150, 600}) {
    MixedCase of = mixed_case(3, 2, 16, 32, {3, 9}, n, 29);
    of.gates = {0.25, 1.0, 0.0};
    of.constant_full = mixed_case(3, 2, 16, 32, {3, 9}, n, 31).d_out;
    expect_is_oracle(of, name_of(of));
  }
}

TEST(MixedAttention, WithAWindowThatHidesNothingIsAttention) {
  for (const Window window : {Window::everything(), Window{0, 90}, Window{89, 1}}) {
    MixedCase of = mixed_case(2, 2, 16, 16, window, 90, 37);
    of.gates = {0.3, -2.0};
    const MixedRun run(of, SerialExecutor{});
    MixedCase whole = of;
    whole.gates = {1.0, 1.0};
    EXPECT_LT(test::relative_error(run.out, test::oracle_mixed(whole)), 2e-6);
    for (const double gate : run.d_gates) EXPECT_NEAR(gate, 0.0, 1e-4);
  }
}

/// Logits of several hundred: a full softmax that has nothing left for what the window shows.
TEST(MixedAttention, KeepsTheHalvesApartWhereOneDwarfsTheOther) {
  MixedCase of = mixed_case(1, 2, 16, 16, {1, 4}, 80, 41);
  for (std::size_t d = 0; d < 16; ++d) {
    of.k[10 * 16 + d] = 40.0;  // of a token that the window forgets
    for (std::size_t row = 0; row < 160; ++row) {
      of.q[row * 16 + d] = static_cast<double>(std::fabs(static_cast<float>(of.q[row * 16 + d])));
    }
  }
  const MixedRun run(of, SerialExecutor{});
  const test::OracleGradients expected = test::oracle_gradients(of);
  EXPECT_LT(test::relative_error(run.out, test::oracle_mixed(of)), 1e-4);
  EXPECT_LT(test::relative_error(run.d_v, expected.v), 1e-4);
  EXPECT_LT(test::relative_error(run.d_gates, expected.gates), 1e-4);
  EXPECT_LT(test::relative_error(run.d_q, expected.q), 1e-4);
}

TEST(MixedAttention, GivesTheSameBitsOnAnyThreads) {
  const MixedCase of = mixed_case(2, 3, 16, 16, {5, 20}, 1100, 43);
  const MixedRun serial(of, SerialExecutor{});
  const MixedRun other(of, BackwardsExecutor{});
  EXPECT_EQ(serial.out, other.out);
  EXPECT_EQ(serial.d_q, other.d_q);
  EXPECT_EQ(serial.d_k, other.d_k);
  EXPECT_EQ(serial.d_v, other.d_v);
  EXPECT_EQ(serial.d_gates, other.d_gates);
}

/// Where the full half has no gradient, what only it sees is not read: O(n x window).
TEST(MixedAttention, VisitsOnlyTheWindowWhereTheFullHalfIsConstant) {
  const std::int64_t n = 300;
  MixedCase of = mixed_case(1, 1, 16, 16, {2, 8}, n, 47);
  of.constant_full = mixed_case(1, 1, 16, 16, {2, 8}, n, 48).d_out;
  const MixedRun before(of, SerialExecutor{});
  // Keys 2 to 9 are seen up to query 16; queries from 256 on are another tile.
  for (std::size_t x = 2 * 16; x < 10 * 16; ++x) {
    of.k[x] = of.v[x] = std::numeric_limits<double>::quiet_NaN();
  }
  const MixedRun after(of, SerialExecutor{});
  for (std::size_t x = 256 * 16; x < 300 * 16; ++x) {
    ASSERT_EQ(before.out[x], after.out[x]);
    ASSERT_EQ(before.d_q[x], after.d_q[x]);
  }
}

TEST(MixedAttention, RefusesWhatItDoesNotDifferentiate) {
  const auto message = [](const std::function<void(MixedAttention&)>& change) {
    const std::vector<double> gates{0.5, 0.5};
    MixedAttention of;
    of.layer = {2, 1, 16, 16};
    of.window = {4, 8};
    of.gates = gates;
    change(of);
    MixedTape tape;
    Scratch scratch;
    SerialExecutor serial;
    return testing::message_of<ConfigError>(
        [&] { mixed_attention(of, TensorView<float>{}, tape, scratch, serial); });
  };
  const std::vector<double> bad{0.5, std::nan("")};
  const std::string softmax =
      "mixed attention of a layer with a soft-cap, sinks, ALiBi slopes or a window of its own is "
      "not supported";
  EXPECT_EQ(message([](MixedAttention& of) { of.layer.softmax.soft_cap = 30.0F; }), softmax);
  EXPECT_EQ(message([](MixedAttention& of) { of.layer.softmax.sinks = {0, 0}; }), softmax);
  EXPECT_EQ(message([](MixedAttention& of) { of.layer.sliding_window = 8; }), softmax);
  EXPECT_EQ(message([&](MixedAttention& of) { of.gates = bad; }),
            "KV head 1: a gate must be finite, got nan");
  EXPECT_EQ(message([&](MixedAttention& of) { of.gates = of.gates.first(1); }),
            "got 1 gates for 2 KV heads");
  EXPECT_NE(message([](MixedAttention& of) { of.window.recent = 0; }).find("recent"),
            std::string::npos);
  EXPECT_NE(message([](MixedAttention& of) { of.layer.k_dim = 20; }).find("widths"),
            std::string::npos);
  EXPECT_NE(message([](MixedAttention& of) { of.num_tokens = -1; }).find("num_tokens"),
            std::string::npos);
}

TEST(MixedAttention, RefusesATapeOfAnotherPass) {
  const std::vector<double> gates{0.5};
  const std::vector<float> x(2 * 16, 1.0F);
  std::vector<float> to(2 * 16);
  std::vector<double> d_gates(1);
  const auto in = TensorView<const float>::nhd(x.data(), 1, 16);
  const auto out = TensorView<float>::nhd(to.data(), 1, 16);
  MixedAttention of{{1, 1, 16, 16}, {4, 8}, gates, 2, in, in, in};
  MixedTape tape;
  Scratch scratch;
  SerialExecutor serial;
  mixed_attention(of, out, tape, scratch, serial);
  of.num_tokens = 1;
  EXPECT_EQ(testing::message_of<ConfigError>([&] {
              mixed_attention_backward(of, tape, in, {out, out, out, d_gates}, scratch, serial);
            }),
            "the tape of another forward pass: 32 and 32 floats of its halves, wanted 16 and 16");
  of.num_tokens = 2;
  EXPECT_EQ(testing::message_of<ConfigError>([&] {
              mixed_attention_backward(of, tape, in, {out, out, out, {}}, scratch, serial);
            }),
            "got room for 0 gradients of 1 gates");
}

}  // namespace
}  // namespace headwise
