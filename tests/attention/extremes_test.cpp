// SPDX-License-Identifier: MIT
// attend() on inputs at the end of the range, beside double over the raw rows that are seen.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "headwise/attention/attend.hpp"
#include "headwise/attention/reference.hpp"
#include "support/attend_instances.hpp"
#include "support/isa_types.hpp"

namespace headwise::test {
namespace {

constexpr int kDim = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// One head's tokens: every element of q, k and v of one has the same value.
struct Tokens {
  std::vector<float> q, k, v;
};

template <class Format>
class AttendExtremes : public ::testing::Test {
 protected:
  /// Element 0 of the outputs, the tokens coming in chunks of `chunk`.
  template <class Isa>
  static std::vector<float> attended(const Tokens& tokens, Window window, std::int64_t chunk) {
    const auto n = static_cast<std::int64_t>(tokens.k.size());
    const ModelShape shape = ModelShape::uniform(1, 1, 1, kDim);
    KvCache<Format> cache(shape, HeadPlan(shape, KeepWindow{window}), {.max_context = n});
    const SequenceId id = *cache.add_sequence();
    Step step;
    const auto spread = [](const std::vector<float>& x) {
      std::vector<float> rows;
      for (const float value : x) rows.insert(rows.end(), kDim, value);
      return rows;
    };
    const std::vector<float> q = spread(tokens.q), k = spread(tokens.k), v = spread(tokens.v);
    std::vector<float> out(q.size()), first;
    for (std::int64_t done = 0; done < n; done += chunk) {
      const std::int64_t count = std::min(chunk, n - done);
      EXPECT_EQ(cache.begin(step, {{id, count}}), StepStatus::kOk);
      const auto rows = [&](const std::vector<float>& x) {
        return TensorView<const float>::nhd(x.data() + done * kDim, 1, kDim);
      };
      EXPECT_EQ(attend<Isa>(cache, step, 0, rows(q), rows(k), rows(v),
                            TensorView<float>::nhd(out.data() + done * kDim, 1, kDim)),
                StepStatus::kOk);
      EXPECT_EQ(cache.commit(step), StepStatus::kOk);
    }
    for (std::size_t i = 0; i < out.size(); i += kDim) first.push_back(out[i]);
    return first;
  }

  /// Every way to cut the prompt gives the oracle's outputs where those are finite.
  static void expect_oracle(const Tokens& tokens, Window window) {
    const std::size_t n = tokens.k.size();
    std::vector<double> truth;
    std::vector<float> row(kDim, 0.0F), stored_k(kDim), stored_v(kDim);
    for (std::size_t i = 0; i < n; ++i) {
      const std::vector<float> q(kDim, tokens.q[i]);
      ReferenceRow query(q.data(), 0.25);
      for (std::size_t j = 0; j <= i; ++j) {
        if (!window.sees(Pos{static_cast<std::int64_t>(i)}, Pos{static_cast<std::int64_t>(j)})) {
          continue;
        }
        const std::vector<float> k(kDim, tokens.k[j]), v(kDim, tokens.v[j]);
        Format::round_row({.k_dim = kDim, .v_dim = kDim}, k.data(), v.data(), stored_k.data(),
                          stored_v.data());
        query.add(std::span<const float>(stored_k), std::span<const float>(stored_v));
      }
      truth.push_back(query.output(kDim)[0]);
    }
    const auto size = static_cast<std::int64_t>(n);
    for (const std::int64_t chunk :
         {size, std::int64_t{1}, std::int64_t{7}, std::int64_t{64}, std::int64_t{65}}) {
      const auto compare = [&](const std::vector<float>& out) {
        for (std::size_t i = 0; i < n; ++i) {
          ASSERT_EQ(std::isfinite(out[i]), std::isfinite(truth[i]))
              << "token " << i << ", chunks of " << chunk << ": " << out[i] << ", not " << truth[i];
          if (!std::isfinite(truth[i])) continue;
          ASSERT_NEAR(static_cast<double>(out[i]), truth[i], 1e-5 * (1.0 + std::fabs(truth[i])))
              << "token " << i << ", chunks of " << chunk;
        }
      };
      compare(attended<simd::BestIsa>(tokens, window, chunk));
      compare(attended<simd::Scalar>(tokens, window, chunk));
    }
  }

  static Tokens of(std::int64_t n, float q, float k) {
    Tokens tokens;
    for (std::int64_t i = 0; i < n; ++i) {
      tokens.q.push_back(q);
      tokens.k.push_back(k);
      tokens.v.push_back(static_cast<float>(i));
    }
    return tokens;
  }
};
using Formats = ::testing::Types<TiledRows<f16>, TiledRows<f32>, PlainRows<bf16>, Int8Rows>;
TYPED_TEST_SUITE(AttendExtremes, Formats, FormatNames);

TYPED_TEST(AttendExtremes, NoTokenSeesWhatALaterOneHolds) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), kInfinity, 70000.0F}) {
    for (const std::int64_t n : {2, 40, 120}) {
      Tokens tokens = this->of(n, 0.1F, 0.2F);
      tokens.v.back() = bad;
      this->expect_oracle(tokens, Window::everything());
      this->expect_oracle(tokens, {2, 30});
      tokens.v[static_cast<std::size_t>(n / 3)] = bad;  // and forgotten again
      this->expect_oracle(tokens, {0, 30});
    }
  }
}

TYPED_TEST(AttendExtremes, ATokenWhoseScoresAreAllMinusInfinityGetsZeros) {
  Tokens stored = this->of(16, -1.0F, 0.0F);  // beyond f16 when it is stored
  stored.k[0] = 70000.0F;
  this->expect_oracle(stored, Window::everything());
  this->expect_oracle(this->of(40, -1e20F, 1e20F), Window::everything());  // beyond f32 when added
  this->expect_oracle(this->of(40, -1e20F, 1e20F), {4, 9});
}

TYPED_TEST(AttendExtremes, AHugeNegativeScoreIsStillAScore) {
  // q is a power of two: scores of equal keys are equal whatever order they are rounded in, and at
  // this size one bit would be everything.
  this->expect_oracle(this->of(100, -0x1p50F, 1e4F), Window::everything());
  this->expect_oracle(this->of(100, -0x1p112F, 1e4F), Window::everything());  // -2.1e38
  this->expect_oracle(this->of(100, -0x1p112F, 1e4F), {4, 20});
}

}  // namespace
}  // namespace headwise::test
