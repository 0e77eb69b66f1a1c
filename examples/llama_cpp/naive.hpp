// SPDX-License-Identifier: MIT
/// @file naive.hpp
/// The same takeover with attention in double over every row ever seen: what ours is judged by.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <variant>
#include <vector>

#include "context.hpp"
#include "headwise/heads/plan.hpp"
#include "model.hpp"

namespace in_llama {

/// One sequence whose heads see what the plan's windows let them see.
class Naive {
 public:
  Naive(const Model& model, const headwise::HeadPlan& plan, int max_rows, int num_threads)
      : shape_(model.shape()),
        plan_(plan),
        keys_(static_cast<std::size_t>(shape_.num_layers())),
        values_(keys_.size()),
        context_(model.get(),
                 {.num_cells = max_rows, .max_rows = max_rows, .num_threads = num_threads},
                 [this](ggml_tensor& node) { return attend(context_.new_rows(node)); }) {}

  /// @param tokens  the next ones; logits of all of them
  bool forward(std::span<const llama_token> tokens) {
    std::vector<Row> rows;
    for (const llama_token token : tokens) {
      rows.push_back({token, static_cast<llama_pos>(length_ + std::ssize(rows)), 0, true});
    }
    const bool decoded = context_.decode(rows);
    llama_memory_clear(context_.memory(), false);
    length_ += std::ssize(tokens);
    return decoded;
  }
  std::span<const float> logits(std::size_t i) const { return context_.logits(i); }

 private:
  bool attend(const NewRows& rows) {
    const headwise::LayerShape& layer = shape_.layer(rows.layer);
    const auto idx = static_cast<std::size_t>(rows.layer);
    for (std::int64_t i = 0; i < rows.num_rows; ++i) {
      for (int head = 0; head < layer.num_kv_heads; ++head) {
        keys_[idx].insert(keys_[idx].end(), rows.k.row(i, head), rows.k.row(i, head) + layer.k_dim);
        values_[idx].insert(values_[idx].end(), rows.v.row(i, head),
                            rows.v.row(i, head) + layer.v_dim);
      }
    }
    for (int head = 0; head < layer.num_qo_heads(); ++head) {
      for (std::int64_t i = 0; i < rows.num_rows; ++i) {
        attend_row(layer, rows.layer, head, length_ + i, rows.q.row(i, head),
                   rows.out.row(i, head));
      }
    }
    return true;
  }

  void attend_row(const headwise::LayerShape& layer, int idx, int head, std::int64_t pos,
                  const float* q, float* out) {
    const headwise::SoftmaxOptions& softmax = layer.softmax;
    const auto of_head = static_cast<std::size_t>(head);
    const int kv_head = head / layer.group_size;
    const auto* keep = std::get_if<headwise::KeepWindow>(&plan_.budget(idx, kv_head));
    const headwise::Window window = keep != nullptr ? keep->window : headwise::Window::everything();
    const auto row = [&](const std::vector<std::vector<float>>& rows, std::int64_t j, int dim) {
      return rows[static_cast<std::size_t>(idx)].data() + (j * layer.num_kv_heads + kv_head) * dim;
    };
    logits_.clear();
    double max = -std::numeric_limits<double>::infinity();
    for (std::int64_t j = 0; j <= pos; ++j) {
      if (!window.sees(headwise::Pos{pos}, headwise::Pos{j})) continue;
      const float* k = row(keys_, j, layer.k_dim);
      double sum = 0.0;
      for (int d = 0; d < layer.k_dim; ++d)
        sum += static_cast<double>(q[d]) * static_cast<double>(k[d]);
      double logit = sum * static_cast<double>(layer.scale());
      if (softmax.soft_cap != 0.0F) {
        logit = static_cast<double>(softmax.soft_cap) *
                std::tanh(logit / static_cast<double>(softmax.soft_cap));
      }
      if (!softmax.alibi_slopes.empty()) {
        logit += static_cast<double>(softmax.alibi_slopes[of_head]) * static_cast<double>(j - pos);
      }
      logits_.push_back(logit);
      max = std::max(max, logit);
    }
    sums_.assign(static_cast<std::size_t>(layer.v_dim), 0.0);
    double total =
        softmax.sinks.empty() ? 0.0 : std::exp(static_cast<double>(softmax.sinks[of_head]) - max);
    auto logit = logits_.begin();
    for (std::int64_t j = 0; j <= pos; ++j) {
      if (!window.sees(headwise::Pos{pos}, headwise::Pos{j})) continue;
      const float* v = row(values_, j, layer.v_dim);
      const double weight = std::exp(*logit++ - max);
      total += weight;
      for (std::size_t d = 0; d < sums_.size(); ++d) sums_[d] += weight * static_cast<double>(v[d]);
    }
    for (std::size_t d = 0; d < sums_.size(); ++d) out[d] = static_cast<float>(sums_[d] / total);
  }

  const headwise::ModelShape& shape_;
  headwise::HeadPlan plan_;
  std::vector<std::vector<float>> keys_, values_;  // [layer][pos][kv head][dim]
  std::int64_t length_ = 0;
  std::vector<double> logits_, sums_;
  Context context_;
};

}  // namespace in_llama
