// SPDX-License-Identifier: MIT
// The way out that ModelShape names for widths that are no multiple of 16: zeros and sm_scale.
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "headwise/attention/single_sequence.hpp"
#include "support/attend_instances.hpp"

namespace headwise {
namespace {

constexpr int kHeads = 2;
constexpr int kPaddedGroup = 2;

/// Token `t`'s row of a head, of the model's own width.
std::vector<float> row_of(std::int64_t t, int head, int what, int dim) {
  std::vector<float> row;
  for (int d = 0; d < dim; ++d) {
    const double x = static_cast<double>((t + 1) * 37 + head * 11 + what * 101 + d * 7);
    row.push_back(static_cast<float>(std::sin(x)));
  }
  return row;
}

/// [tokens, heads, padded], zeros beyond `dim`.
std::vector<float> padded_rows(std::int64_t first, std::int64_t count, int heads, int what, int dim,
                               int padded) {
  std::vector<float> rows;
  for (std::int64_t t = first; t < first + count; ++t) {
    for (int head = 0; head < heads; ++head) {
      const std::vector<float> row = row_of(t, head, what, dim);
      rows.insert(rows.end(), row.begin(), row.end());
      rows.resize(rows.size() + static_cast<std::size_t>(padded - dim));
    }
  }
  return rows;
}

/// Plain attention at width `dim`, over the rows that the window lets the query see.
std::vector<double> attention_in_double(std::int64_t query, int head, int kv_head, int dim,
                                        Window window) {
  const std::vector<float> q = row_of(query, head, 1, dim);
  std::vector<double> out(static_cast<std::size_t>(dim));
  double sum = 0.0;
  for (std::int64_t t = 0; t <= query; ++t) {
    if (!window.sees(Pos{query}, Pos{t})) continue;
    const std::vector<float> k = row_of(t, kv_head, 2, dim);
    const std::vector<float> v = row_of(t, kv_head, 3, dim);
    double score = 0.0;
    for (std::size_t d = 0; d < q.size(); ++d) {
      score += static_cast<double>(q[d]) * static_cast<double>(k[d]);
    }
    const double weight = std::exp(score / std::sqrt(static_cast<double>(dim)));
    sum += weight;
    for (std::size_t d = 0; d < v.size(); ++d) out[d] += weight * static_cast<double>(v[d]);
  }
  for (double& x : out) x /= sum;
  return out;
}

void padding_equals_the_models_own_width(int dim) {
  const int padded = (dim + 15) / 16 * 16;
  const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
  const ModelShape shape({{kHeads, kPaddedGroup, padded, padded, scale}});
  HeadPlan plan(shape);
  const Window window{3, 20};
  plan.set(0, 1, KeepWindow{window});
  SingleSequence<f32> sequence(shape, plan, {.max_context = 200});
  for (const std::int64_t tokens : {70, 1, 3, 1}) {
    const std::int64_t first = sequence.length();
    const auto q = padded_rows(first, tokens, kHeads * kPaddedGroup, 1, dim, padded);
    const auto k = padded_rows(first, tokens, kHeads, 2, dim, padded);
    const auto v = padded_rows(first, tokens, kHeads, 3, dim, padded);
    std::vector<float> out(q.size(), 7.0F);
    ASSERT_EQ(sequence.begin(tokens), StepStatus::kOk);
    ASSERT_EQ(
        sequence.attend(0, TensorView<const float>::nhd(q.data(), kHeads * kPaddedGroup, padded),
                        TensorView<const float>::nhd(k.data(), kHeads, padded),
                        TensorView<const float>::nhd(v.data(), kHeads, padded),
                        TensorView<float>::nhd(out.data(), kHeads * kPaddedGroup, padded)),
        StepStatus::kOk);
    ASSERT_EQ(sequence.commit(), StepStatus::kOk);

    for (int head = 0; head < kHeads * kPaddedGroup; ++head) {
      for (std::int64_t i = 0; i < tokens; ++i) {
        const int kv_head = head / kPaddedGroup;
        const std::vector<double> exact =
            attention_in_double(first + i, head, kv_head, dim, kv_head == 1 ? window : Window{});
        const float* got = out.data() + (i * kHeads * kPaddedGroup + head) * padded;
        for (int d = 0; d < padded; ++d) {
          const double want = d < dim ? exact[static_cast<std::size_t>(d)] : 0.0;
          ASSERT_NEAR(static_cast<double>(got[d]), want, 5e-6)
              << "head " << head << ", query " << first + i << ", column " << d;
        }
      }
    }
  }
}

TEST(PaddedWidth, OfAnyModelEqualsAttentionAtItsOwnWidth) {
  for (const int dim : {100, 120, 59, 1}) {
    SCOPED_TRACE(dim);
    padding_equals_the_models_own_width(dim);
  }
}

}  // namespace
}  // namespace headwise
