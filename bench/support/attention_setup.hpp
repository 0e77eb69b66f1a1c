// SPDX-License-Identifier: MIT
/// @file attention_setup.hpp
/// The models and plans that attention is timed on, and a cache filled without running a model.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "headwise/attention/attend.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::bench {

/// Heads of one attention layer, all of width 128.
struct BenchShape {
  const char* name;
  int num_qo_heads;
  int num_kv_heads;
};
inline constexpr BenchShape kLlama3{"llama3_8b", 32, 8};
inline constexpr BenchShape kLlama2{"llama2_7b", 32, 32};
inline constexpr BenchShape kQwen2{"qwen2_7b", 28, 4};
inline constexpr BenchShape kGroup8{"g8", 64, 8};
inline constexpr int kHeadDim = 128;

/// Every second head streams with this window, or none does.
struct BenchPlan {
  const char* name;
  Window window;
  bool streams;
};
inline constexpr BenchPlan kDense{"dense", {}, false};
inline constexpr BenchPlan kDuo50{"duo50", {64, 256}, true};
inline constexpr BenchPlan kRlkv50{"rlkv50", {16, 64}, true};

template <class Row>
constexpr const char* format_name() {
  if constexpr (std::is_same_v<Row, f32>) {
    return "f32";
  } else if constexpr (std::is_same_v<Row, f16>) {
    return "f16";
  } else if constexpr (std::is_same_v<Row, bf16>) {
    return "bf16";
  } else {
    return Row::name();
  }
}

/// Bytes that a stored row of K and V takes, scales included.
template <class Row>
constexpr double row_bytes() {
  constexpr PageShape kPage{64, kHeadDim, kHeadDim};
  return static_cast<double>(FormatOf<Row>::page_bytes(kPage)) / kPage.page_tokens;
}

inline std::vector<float> random_floats(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& value : x) value = normal(random);
  return x;
}

/// One layer, one sequence, and tensors for steps of up to `max_tokens` tokens.
template <class Row>
class BenchLayer {
 public:
  BenchLayer(const BenchShape& shape, const BenchPlan& plan, std::int64_t context,
             std::int64_t max_tokens)
      : shape_(shape),
        cache_(model(shape), make_plan(shape, plan),
               {.max_context = context + max_tokens, .max_rollback = 8}),
        sequence_(*cache_.add_sequence()),
        q_(random_floats(floats(max_tokens, shape.num_qo_heads), 1)),
        k_(random_floats(floats(max_tokens, shape.num_kv_heads), 2)),
        v_(random_floats(floats(max_tokens, shape.num_kv_heads), 3)),
        out_(q_.size()) {
    fill(context);
  }

  /// One step of `tokens` tokens, dropped afterwards: every call finds the same cache.
  template <class Executor>
  void step(std::int64_t tokens, Phase phase, Executor& executor) {
    open(tokens, phase);
    require(attend(cache_, step_, 0,
                   TensorView<const float>::nhd(q_.data(), shape_.num_qo_heads, kHeadDim),
                   TensorView<const float>::nhd(k_.data(), shape_.num_kv_heads, kHeadDim),
                   TensorView<const float>::nhd(v_.data(), shape_.num_kv_heads, kHeadDim),
                   TensorView<float>::nhd(out_.data(), shape_.num_qo_heads, kHeadDim), executor));
    require(cache_.drop(step_));
  }

  /// Stored rows that a decode step of one token reads, over all heads.
  std::int64_t rows_read() {
    open(1, Phase::kDecode);
    std::int64_t rows = 0;
    for (int head = 0; head < shape_.num_kv_heads; ++head) {
      rows += cache_.seen(step_.chunks()[0], 0, head).view.num_rows();
    }
    require(cache_.drop(step_));
    return rows;
  }

 private:
  static std::size_t floats(std::int64_t tokens, int heads) {
    return static_cast<std::size_t>(tokens * heads * kHeadDim);
  }
  static ModelShape model(const BenchShape& shape) {
    return ModelShape::uniform(1, shape.num_qo_heads, shape.num_kv_heads, kHeadDim);
  }
  static HeadPlan make_plan(const BenchShape& shape, const BenchPlan& plan) {
    HeadPlan heads(model(shape));
    for (int head = 0; plan.streams && head < shape.num_kv_heads; head += 2) {
      heads.set(0, head, KeepWindow{plan.window});
    }
    return heads;
  }
  static void require(StepStatus status) {
    if (status != StepStatus::kOk) throw std::runtime_error(to_string(status));
  }

  void open(std::int64_t tokens, Phase phase) {
    require(cache_.begin(step_, {{sequence_, tokens, phase}}));
  }

  /// Stores random rows as a prompt's steps would, without attending.
  void fill(std::int64_t context) {
    constexpr std::int64_t kChunk = 4096;
    const std::vector<float> rows = random_floats(floats(2 * kChunk, 1), 4);
    for (std::int64_t done = 0; done < context; done += kChunk) {
      open(std::min(kChunk, context - done), Phase::kPrompt);
      for (int head = 0; head < shape_.num_kv_heads; ++head) {
        const float* start = rows.data() + head * kHeadDim;
        const auto view = TensorView<const float>::nhd(start, 1, kHeadDim);
        cache_.template append<simd::BestIsa>(step_, step_.chunks()[0], 0, head, view, view);
        step_.note_head_done(0);
      }
      require(cache_.commit(step_));
    }
  }

  BenchShape shape_;
  KvCache<Row> cache_;
  SequenceId sequence_;
  Step step_;
  std::vector<float> q_, k_, v_, out_;
};

}  // namespace headwise::bench
