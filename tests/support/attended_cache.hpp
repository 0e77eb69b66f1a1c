// SPDX-License-Identifier: MIT
/// @file attended_cache.hpp
/// A modelled cache whose steps are attended, and the oracle over its dense history.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "headwise/attention/attend.hpp"
#include "headwise/core/executor.hpp"
#include "support/attend_instances.hpp"
#include "support/cache_model.hpp"

namespace headwise::test {

/// Outputs of one layer of a step: [rows, num_qo_heads, v_dim].
using Outputs = std::vector<float>;

/// Some sequences' new tokens, in a step's order.
using Chunks = std::vector<std::pair<SequenceId, std::vector<Token>>>;

template <class Rows>
class AttendedCache : public ModelledCache<Rows> {
  using Base = ModelledCache<Rows>;

 public:
  AttendedCache(const ModelShape& shape, const HeadPlan& plan, const CacheOptions& options)
      : Base(shape, plan, options), shape_(shape) {}

  /// q, k and v of one layer of the open step, made of its tokens.
  struct Inputs {
    std::vector<float> q, k, v;
    Outputs out;
  };
  Inputs inputs_of(int layer, const Chunks& chunks) const {
    const LayerShape& shape = shape_.layer(layer);
    Inputs in;
    for (std::size_t e = 0; e < chunks.size(); ++e) {
      const std::int64_t start = this->step.chunks()[e].lengths.length;
      for (std::size_t i = 0; i < chunks[e].second.size(); ++i) {
        const Token token = chunks[e].second[i];
        const std::int64_t pos = start + static_cast<std::int64_t>(i);
        for (int h = 0; h < shape.num_qo_heads(); ++h) push(in.q, query(token, pos, layer, h));
        for (int h = 0; h < shape.num_kv_heads; ++h) {
          const int kv = kv_layer(shape_, layer);
          push(in.k, row_of(token, pos, kv, h, Side::kK, shape.k_dim));
          push(in.v, row_of(token, pos, kv, h, Side::kV, shape.v_dim));
        }
      }
    }
    in.out.assign(
        in.q.size() / static_cast<std::size_t>(shape.k_dim) * static_cast<std::size_t>(shape.v_dim),
        -7.0F);
    return in;
  }

  /// Calls `fn(q, k, v, out)` with one layer's tensors over `in`.
  template <class Fn>
  auto with_tensors(int layer, Inputs& in, Fn&& fn) const {
    const LayerShape& shape = shape_.layer(layer);
    return fn(TensorView<const float>::nhd(in.q.data(), shape.num_qo_heads(), shape.k_dim),
              TensorView<const float>::nhd(in.k.data(), shape.num_kv_heads, shape.k_dim),
              TensorView<const float>::nhd(in.v.data(), shape.num_kv_heads, shape.v_dim),
              TensorView<float>::nhd(in.out.data(), shape.num_qo_heads(), shape.v_dim));
  }

  /// attend() of any step over `in`, whatever its status.
  template <class E = SerialExecutor>
  StepStatus attend_into(Step& of, int layer, Inputs& in, E&& executor = E{}) const {
    return with_tensors(layer, in, [&](auto... tensors) {
      return headwise::attend(this->cache, of, layer, tensors..., executor);
    });
  }

  /// attend() for one layer of the open step.
  template <class E = SerialExecutor>
  Outputs attend_layer(int layer, const Chunks& chunks, E&& executor = E{}) {
    Inputs in = inputs_of(layer, chunks);
    EXPECT_EQ(attend_into(this->step, layer, in, executor), StepStatus::kOk);
    return std::move(in.out);
  }

  /// begin, attend every layer, commit.
  template <class E = SerialExecutor>
  std::vector<Outputs> run(const Chunks& chunks, Phase phase, E&& executor = E{}) {
    EXPECT_EQ(this->begin(chunks, phase), StepStatus::kOk);
    std::vector<Outputs> out;
    for (int l = 0; l < shape_.num_layers(); ++l) out.push_back(attend_layer(l, chunks, executor));
    EXPECT_EQ(this->commit(), StepStatus::kOk);
    return out;
  }

  /// What run() must return, by the published rules over all tokens, in double.
  std::vector<std::vector<double>> oracle(const Chunks& chunks, Phase phase) const {
    std::vector<std::vector<double>> out(static_cast<std::size_t>(shape_.num_layers()));
    int first_head = 0;
    for (int l = 0; l < shape_.num_layers(); first_head += shape_.layer(l++).num_kv_heads) {
      const LayerShape& shape = shape_.layer(l);
      for (const auto& [id, tokens] : chunks) {
        const auto& sequence = this->sequences.at(id);
        std::vector<Token> all = sequence.tokens;
        const auto start = static_cast<std::int64_t>(all.size());
        all.insert(all.end(), tokens.begin(), tokens.end());
        std::vector<std::vector<double>> by_head;
        for (int h = 0; h < shape.num_kv_heads; ++h) {
          const auto is_dropped = [&](std::int64_t pos) {
            return Base::is_dropped(sequence, first_head + h, pos);
          };
          by_head.push_back(oracle_of(all, start, phase, l, h, is_dropped));
        }
        const auto group = static_cast<std::size_t>(shape.group_size * shape.v_dim);
        for (std::size_t i = 0; i < tokens.size(); ++i) {
          for (const std::vector<double>& head : by_head) {
            const auto first = head.begin() + static_cast<std::ptrdiff_t>(i * group);
            auto& to = out[static_cast<std::size_t>(l)];
            to.insert(to.end(), first, first + static_cast<std::ptrdiff_t>(group));
          }
        }
      }
    }
    return out;
  }

  /// run(), compared with the oracle.
  void run_and_check(const Chunks& chunks, Phase phase, double bound) {
    const std::vector<std::vector<double>> expected = oracle(chunks, phase);
    const std::vector<Outputs> out = run(chunks, phase);
    for (std::size_t l = 0; l < out.size(); ++l) {
      ASSERT_EQ(out[l].size(), expected[l].size());
      double worst = 0.0;
      for (std::size_t i = 0; i < out[l].size(); ++i) {
        const double error = std::fabs(static_cast<double>(out[l][i]) - expected[l][i]);
        ASSERT_FALSE(std::isnan(out[l][i])) << "layer " << l << ", element " << i;
        worst = std::max(worst, error);
      }
      ASSERT_LE(worst, bound) << "layer " << l << ", " << chunks.size() << " sequences";
    }
  }

 private:
  static void push(std::vector<float>& to, const std::vector<float>& row) {
    to.insert(to.end(), row.begin(), row.end());
  }

  /// Queries are longer than keys, so that the softmax is peaked as in trained models.
  std::vector<float> query(Token token, std::int64_t pos, int layer, int qo_head) const {
    std::vector<float> row =
        row_of(token, pos, layer, qo_head, Side::kQ, shape_.layer(layer).k_dim);
    for (float& x : row) x *= 6.0F;
    return row;
  }

  static std::vector<double> stored(Token token, std::int64_t pos, int layer, int head, Side side,
                                    int dim) {
    const std::vector<float> row = stored_row<FormatOf<Rows>>(token, pos, layer, head, side, dim);
    return {row.begin(), row.end()};
  }

  /// [tokens from start on, group_size, v_dim] of one KV head.
  template <class IsDropped>
  std::vector<double> oracle_of(const std::vector<Token>& all, std::int64_t start, Phase phase,
                                int layer, int head, IsDropped&& is_dropped) const {
    const LayerShape& shape = shape_.layer(layer);
    std::vector<std::vector<double>> keys;
    std::vector<std::vector<double>> values;
    for (std::size_t pos = 0; pos < all.size(); ++pos) {
      const auto p = static_cast<std::int64_t>(pos);
      const int kv = kv_layer(shape_, layer);
      keys.push_back(stored(all[pos], p, kv, head, Side::kK, shape.k_dim));
      values.push_back(stored(all[pos], p, kv, head, Side::kV, shape.v_dim));
    }
    const auto n = static_cast<std::int64_t>(all.size());
    std::vector<double> out;
    for (std::int64_t i = start; i < n; ++i) {
      std::vector<std::size_t> seen;
      std::vector<double> mean_k(static_cast<std::size_t>(shape.k_dim), 0.0);
      std::vector<double> mean_v(static_cast<std::size_t>(shape.v_dim), 0.0);
      double folded = 0.0;
      for (std::int64_t j = 0; j <= i; ++j) {
        const Sight how = sight(shape, this->plan().budget(layer, head), this->options().prefill,
                                this->options().page_tokens, phase, start, i, j);
        const auto key = static_cast<std::size_t>(j);
        if (is_dropped(j)) continue;
        if (how == Sight::kAsRow) seen.push_back(key);
        if (how != Sight::kFolded) continue;
        folded += 1.0;
        for (std::size_t d = 0; d < mean_k.size(); ++d) mean_k[d] += keys[key][d];
        for (std::size_t d = 0; d < mean_v.size(); ++d) mean_v[d] += values[key][d];
      }
      for (double& x : mean_k) x /= std::max(1.0, folded);
      for (double& x : mean_v) x /= std::max(1.0, folded);

      for (int g = 0; g < shape.group_size; ++g) {
        const int qo_head = head * shape.group_size + g;
        const std::vector<float> q = query(all[static_cast<std::size_t>(i)], i, layer, qo_head);
        const auto of_head = [&](const std::vector<float>& of_heads) {
          return static_cast<double>(of_heads[static_cast<std::size_t>(qo_head)]);
        };
        const SoftmaxOptions& softmax = shape.softmax;
        const auto score = [&](const std::vector<double>& k) {
          double sum = 0.0;
          for (std::size_t d = 0; d < k.size(); ++d) sum += static_cast<double>(q[d]) * k[d];
          sum *= static_cast<double>(shape.scale());
          const auto cap = static_cast<double>(softmax.soft_cap);
          return cap > 0.0 ? cap * std::tanh(sum / cap) : sum;
        };
        std::vector<double> row(mean_v.size(), 0.0);
        double total = 0.0;
        const auto add = [&](double logit, const std::vector<double>& v) {
          const double weight = std::exp(logit);  // logits are small: no maximum is needed
          total += weight;
          for (std::size_t d = 0; d < row.size(); ++d) row[d] += weight * v[d];
        };
        if (!softmax.sinks.empty()) total += std::exp(of_head(softmax.sinks));
        for (const std::size_t key : seen) {
          const auto away = static_cast<double>(i) - static_cast<double>(key);
          const double bias =
              softmax.alibi_slopes.empty() ? 0.0 : -of_head(softmax.alibi_slopes) * away;
          add(score(keys[key]) + bias, values[key]);
        }
        if (folded > 0.0) add(score(mean_k) + std::log(folded), mean_v);
        for (double& x : row) x /= total;
        out.insert(out.end(), row.begin(), row.end());
      }
    }
    return out;
  }

  ModelShape shape_;
};

}  // namespace headwise::test
