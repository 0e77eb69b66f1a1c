// SPDX-License-Identifier: MIT
/// @file reconstruction.hpp
/// KVzip's second pass: the model reads its context once more, and what it looks at is noted.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "decoder.hpp"
#include "headwise/attention/observed_queries.hpp"
#include "headwise/attention/stored_rows.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/policies/kv_zip.hpp"
#include "selection.hpp"

namespace needle_lm {

/// Context tokens that are repeated at a time; the paper's 2048 are as long as these contexts.
inline constexpr std::size_t kRepeated = 512;
/// Tokens before them that are repeated too, as in the released code: they say what comes next.
inline constexpr std::size_t kCue = 8;

/// For each chunk of the context: a fork of its sequence reads the chunk again. The published
/// instruction to repeat is left out, this model knows none: it continues what it has seen before.
/// @tparam Cache  headwise::KvCache with a sequence to spare, and kRepeated + kCue tokens.
template <class Cache, headwise::Executor E>
class Reconstruction {
 public:
  Reconstruction(const headwise::ModelShape& shape, const headwise::HeadPlan& plan,
                 Decoder<Cache, E>& decoder, Cache& cache, E& executor)
      : shape_(shape), decoder_(decoder), cache_(cache), executor_(executor) {
    for (int layer = 0; layer < plan.num_layers(); ++layer) {
      for (int head = 0; head < plan.num_kv_heads(layer); ++head) {
        if (is_selected(plan.budget(layer, head))) heads_.push_back({layer, head});
      }
    }
    queries_.resize(static_cast<std::size_t>(plan.num_layers()));
  }

  /// @param sequence  has read `context`, and nothing more
  /// @param prefix  first tokens, which every query of the pass sees, and which are not repeated
  /// @param length  of the prompt, of which the context is the beginning
  /// @return of each head that is selected from, layer by layer
  std::vector<headwise::kv_zip::Maxima> run(headwise::SequenceId sequence,
                                            std::span<const Token> context, std::size_t prefix,
                                            std::int64_t length) {
    std::vector<headwise::kv_zip::Maxima> maxima(heads_.size(), headwise::kv_zip::Maxima(length));
    for (std::size_t first = prefix; first < context.size(); first += kRepeated) {
      const std::size_t count = std::min(kRepeated, context.size() - first);
      const std::size_t cue = first == prefix ? 0 : kCue;
      headwise::SequenceId fork;
      require_ok(cache_.fork(sequence, fork));
      read(fork, context.subspan(first - cue, cue + count));
      executor_.for_each(heads_.size(), [&](std::size_t head, std::size_t /*thread*/) {
        note(fork, heads_[head], context.size(), cue + count, prefix, first, count, maxima[head]);
      });
      cache_.release(fork);
    }
    return maxima;
  }

 private:
  using View = headwise::TensorView<const float>;
  struct Head {
    int layer;
    int kv_head;
  };

  static void require_ok(headwise::StepStatus status) {
    if (status != headwise::StepStatus::kOk) {
      throw std::runtime_error(std::string("the cache refused a fork: ") +
                               std::string(to_string(status)));
    }
  }

  /// One step, whose queries are copied: [tokens, num_qo_heads, head_dim] of each layer.
  void read(headwise::SequenceId fork, std::span<const Token> tokens) {
    decoder_.observe([&](int layer, View q, View, std::int64_t num_tokens) {
      const headwise::LayerShape& of = shape_.layer(layer);
      std::vector<float>& copy = queries_[static_cast<std::size_t>(layer)];
      copy.clear();
      for (std::int64_t i = 0; i < num_tokens; ++i) {
        copy.insert(copy.end(), q.row(i, 0), q.row(i, 0) + of.num_qo_heads() * of.k_dim);
      }
    });
    Batch batch;
    batch.add(fork, tokens);
    decoder_.forward(cache_, batch);
    decoder_.observe({});
  }

  void note(headwise::SequenceId fork, Head head, std::size_t context, std::size_t repeated,
            std::size_t prefix, std::size_t first, std::size_t count,
            headwise::kv_zip::Maxima& maxima) const {
    const headwise::LayerShape& of = shape_.layer(head.layer);
    headwise::StoredRows rows;
    rows.read(cache_.stored(fork, head.layer, head.kv_head));
    std::vector<float> keys;
    const auto append = [&](std::size_t from, std::size_t to) {
      const float* data = rows.keys().data;
      const auto dim = static_cast<std::size_t>(of.k_dim);
      keys.insert(keys.end(), data + from * dim, data + to * dim);
    };
    append(0, prefix);
    append(first, first + count);
    append(context, context + repeated);

    std::vector<std::int32_t> positions(repeated);
    std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(context));
    const View all = View::nhd(queries_[static_cast<std::size_t>(head.layer)].data(),
                               of.num_qo_heads(), of.k_dim);
    const headwise::ObservedQueries queries{
        {all.row(0, head.kv_head * of.group_size), all.stride_n, all.stride_h},
        positions,
        of.group_size,
        of.k_dim,
        of.scale()};
    maxima.add_chunk(
        queries,
        headwise::RowView::dense(keys.data(), static_cast<std::int64_t>(prefix + count + repeated),
                                 of.k_dim),
        static_cast<std::int64_t>(prefix), static_cast<std::int64_t>(first),
        static_cast<std::int64_t>(count));
  }

  const headwise::ModelShape& shape_;
  Decoder<Cache, E>& decoder_;
  Cache& cache_;
  E& executor_;
  std::vector<Head> heads_;
  std::vector<std::vector<float>> queries_;  // [layers]
};

}  // namespace needle_lm
