// SPDX-License-Identifier: MIT
/// @file prompt_reader.hpp
/// A prompt into a sequence, with all that scorers of its tokens ask for noted on the way.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "decoder.hpp"
#include "generate.hpp"
#include "headwise/attention/query_moments.hpp"
#include "headwise/attention/query_window.hpp"
#include "headwise/attention/stored_rows.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/policies/expected_attention.hpp"
#include "headwise/policies/snap_kv.hpp"
#include "headwise/policies/tri_attention.hpp"
#include "identify.hpp"
#include "reconstruction.hpp"
#include "selection.hpp"

namespace needle_lm {

/// Where the queries of each query head lie before rotary positions, [layers * num_qo_heads].
using QueryCentres = std::vector<headwise::tri_attention::QueryCentre>;

/// Documents of each task that centres are calibrated on.
inline constexpr std::size_t kCalibrated = 8;

namespace detail {

/// fn(query head, row) for each query of a step, turned back to what it was before rotary
/// positions: query heads are dealt to the threads.
template <headwise::Executor E, class Fn>
void for_each_plain_query(const ModelConfig& config, headwise::TensorView<const float> q,
                          std::int64_t first_position, std::int64_t num_tokens, E& executor,
                          Fn fn) {
  const headwise::Rope rope{.theta = config.rope_theta};
  const auto heads = static_cast<std::size_t>(config.num_qo_heads);
  executor.for_each(heads, [&](std::size_t head, std::size_t /*thread*/) {
    std::vector<float> row(static_cast<std::size_t>(config.head_dim));
    for (std::int64_t i = 0; i < num_tokens; ++i) {
      std::copy_n(q.row(i, static_cast<std::int64_t>(head)), config.head_dim, row.begin());
      rope.turn_back(row.data(), config.head_dim, first_position + i);
      fn(head, first_position + i, headwise::RowView::dense(row.data(), 1, config.head_dim));
    }
  });
}

}  // namespace detail

/// TriAttention's centres, over whole texts that the full cache reads.
template <class Cache, headwise::Executor E>
QueryCentres calibrated_centres(const Model& model, std::span<const Document> texts, E& executor) {
  const ModelConfig& config = model.config;
  const auto heads = static_cast<std::size_t>(config.num_qo_heads);
  QueryCentres centres(static_cast<std::size_t>(config.num_layers) * heads,
                       headwise::tri_attention::QueryCentre(config.head_dim));
  for (const Document& text : texts) {
    const auto num_tokens = static_cast<std::int64_t>(text.tokens.size());
    Cache cache(config.shape(), headwise::HeadPlan(config.shape()), {.max_context = num_tokens});
    Decoder<Cache, E> decoder(model, num_tokens, executor);
    decoder.observe([&](int layer, headwise::TensorView<const float> q,
                        headwise::TensorView<const float>, std::int64_t count) {
      detail::for_each_plain_query(
          config, q, 0, count, executor,
          [&](std::size_t head, std::int64_t, const headwise::RowView& query) {
            centres[static_cast<std::size_t>(layer) * heads + head].add(
                {.theta = config.rope_theta}, query);
          });
    });
    Batch batch;
    batch.add(cache.add_sequence().value(), text.tokens);
    decoder.forward(cache, batch);
  }
  return centres;
}

/// Texts for the above: of the file's second half, kCalibrated of each task or what there is.
inline std::vector<Document> centre_texts(const SafeTensors& file, const ModelConfig& config) {
  std::vector<Document> texts;
  for (const auto& [task, stop] :
       {std::pair{"passkey", kEndOfNeedle}, std::pair{"cot", kEndOfSequence}}) {
    const std::size_t all = num_documents(file, task);
    const std::size_t count = std::min(kCalibrated, all - all / 2);
    for (Document& text : calibration_documents(file, task, stop, count, 1, config)) {
      texts.push_back(std::move(text));
    }
  }
  return texts;
}

/// A prompt that a sequence has read, nothing dropped, and what scorers say of its tokens.
struct ScoredPrompt {
  Started started;
  PromptScores scores;
};

template <class Cache, headwise::Executor E>
class PromptReader {
 public:
  /// All borrowed; must outlive the reader.
  PromptReader(const ModelConfig& config, const headwise::HeadPlan& plan,
               const SelectionPolicies& policies, const QueryCentres& centres,
               Decoder<Cache, E>& decoder, Cache& cache, E& executor)
      : config_(config),
        shape_(config.shape()),
        plan_(plan),
        policies_(policies),
        centres_(centres),
        decoder_(decoder),
        cache_(cache),
        executor_(executor) {}

  /// The question at the prompt's end is read after KVzip's pass, which does not know it; SnapKV's
  /// window and Expected Attention's moments have it.
  ScoredPrompt read(std::span<const Token> prompt, std::size_t chunk) {
    const auto length = static_cast<std::int64_t>(prompt.size());
    // The last token always: its logits begin the answer.
    const std::size_t question = std::max<std::size_t>(1, question_length(prompt));
    const auto context = prompt.first(prompt.size() - question);
    const headwise::SequenceId sequence = cache_.add_sequence().value();
    Notes notes(shape_, policies_.snap_kv.window);

    note_into(notes, 0);
    prefill(decoder_, cache_, sequence, context, chunk);
    decoder_.observe({});
    const auto maxima =
        Reconstruction<Cache, E>(shape_, plan_, decoder_, cache_, executor_)
            .run(sequence, context, static_cast<std::size_t>(policies_.kv_zip_prefix), length);
    note_into(notes, static_cast<std::int64_t>(context.size()));
    const Token first = read_prompt(decoder_, cache_, sequence, prompt.last(question), chunk);
    decoder_.observe({});

    ScoredPrompt read{{sequence, first}, {}};
    read.scores.length = length;
    read.scores.question = static_cast<std::int64_t>(question);
    score(sequence, notes, read.scores);
    headwise::TokenScores all(length);
    for (const headwise::kv_zip::Maxima& head : maxima) head.add_head(positions(length), all);
    read.scores.kv_zip.push_back(std::move(all));
    return read;
  }

 private:
  using View = headwise::TensorView<const float>;

  struct Notes {
    Notes(const headwise::ModelShape& shape, std::int64_t window_length)
        : window(shape, window_length) {
      for (const headwise::LayerShape& layer : shape.layers()) {
        for (int head = 0; head < layer.num_qo_heads(); ++head) moments.emplace_back(layer.k_dim);
      }
    }
    headwise::QueryWindow window;
    std::vector<headwise::QueryMoments> moments;  // [layers * num_qo_heads]
  };

  static std::vector<std::int32_t> positions(std::int64_t length) {
    std::vector<std::int32_t> all(static_cast<std::size_t>(length));
    std::iota(all.begin(), all.end(), 0);
    return all;
  }

  void note_into(Notes& notes, std::int64_t position) {
    decoder_.observe(
        [this, &notes, position](int layer, View q, View, std::int64_t num_tokens) mutable {
          notes.window.note(layer, q, position, num_tokens);
          const auto heads = static_cast<std::size_t>(config_.num_qo_heads);
          detail::for_each_plain_query(
              config_, q, position, num_tokens, executor_,
              [&](std::size_t head, std::int64_t at, const headwise::RowView& query) {
                if (at < policies_.expected_attention.sink) return;
                notes.moments[static_cast<std::size_t>(layer) * heads + head].add(query);
              });
          if (layer + 1 == config_.num_layers) position += num_tokens;
        });
  }

  /// A layer's heads are compared with each other; layers are dealt to the threads.
  void score(headwise::SequenceId sequence, const Notes& notes, PromptScores& scores) {
    const auto num_layers = static_cast<std::size_t>(config_.num_layers);
    for (auto* groups : {&scores.snap_kv, &scores.expected_attention, &scores.tri_attention}) {
      groups->assign(num_layers, headwise::TokenScores(scores.length));
    }
    headwise::tri_attention::Policy tri = policies_.tri_attention;
    tri.recent = scores.question;  // stays, so that it does not count in the scores' deviation
    const auto group = static_cast<std::size_t>(config_.num_qo_heads / config_.num_kv_heads);
    executor_.for_each(num_layers, [&](std::size_t i, std::size_t /*thread*/) {
      const auto layer = static_cast<int>(i);
      headwise::StoredRows rows;
      for (int head = 0; head < config_.num_kv_heads; ++head) {
        if (!is_selected(plan_.budget(layer, head))) continue;
        rows.read(cache_.stored(sequence, layer, head));
        const auto stored = cache_.stored_positions(sequence, layer, head);
        const std::size_t first_query_head = i * static_cast<std::size_t>(config_.num_qo_heads) +
                                             static_cast<std::size_t>(head) * group;
        headwise::snap_kv::add_head(policies_.snap_kv, notes.window.of_head(layer, head),
                                    rows.keys(), stored, scores.snap_kv[i]);
        headwise::expected_attention::add_head(
            policies_.expected_attention, std::span(notes.moments).subspan(first_query_head, group),
            rows.keys(), rows.values(), stored, scores.expected_attention[i]);
        headwise::tri_attention::add_head(tri, std::span(centres_).subspan(first_query_head, group),
                                          rows.keys(), stored, scores.tri_attention[i]);
      }
    });
  }

  const ModelConfig& config_;
  headwise::ModelShape shape_;
  const headwise::HeadPlan& plan_;
  const SelectionPolicies& policies_;
  const QueryCentres& centres_;
  Decoder<Cache, E>& decoder_;
  Cache& cache_;
  E& executor_;
};

}  // namespace needle_lm
