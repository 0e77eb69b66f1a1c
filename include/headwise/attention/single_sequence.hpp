// SPDX-License-Identifier: MIT
/// @file single_sequence.hpp
/// SingleSequence: the cache as an engine with one conversation sees it.
#pragma once

#include <cstdint>
#include <utility>

#include "headwise/attention/attend.hpp"
#include "headwise/cache/kv_cache.hpp"

namespace headwise::inline v0 {

/// One sequence in a KvCache of its own, and the step it is in. A face, not a mechanism: begin(),
/// attend() and commit() are the cache's.
///
///     SingleSequence<f16> sequence(shape, plan, {.max_context = 32768});
///     if (sequence.begin(num_tokens) != StepStatus::kOk) ...;
///     for (int layer = 0; ...) sequence.attend(layer, q, k, v, out);
///     if (sequence.commit() != StepStatus::kOk) ...;
template <class Rows = f16>
class SingleSequence {
 public:
  /// @throws ConfigError as KvCache, or when options.max_sequences is not 1.
  SingleSequence(const ModelShape& shape, const HeadPlan& plan, const CacheOptions& options)
      : cache_(shape, plan, checked(options)), id_(*cache_.add_sequence()) {}

  /// Opens a step of `num_tokens`: a prompt chunk where the sequence is empty or more than one
  /// token comes, else a decode step.
  StepStatus begin(std::int64_t num_tokens) {
    return begin(num_tokens, length() == 0 || num_tokens > 1 ? Phase::kPrompt : Phase::kDecode);
  }
  /// Opens a step of `num_tokens` in the phase given; see KvCache::begin().
  StepStatus begin(std::int64_t num_tokens, Phase phase) {
    return cache_.begin(step_, {{id_, num_tokens}}, phase);
  }

  /// attend() of attention/attend.hpp for this sequence's rows.
  template <class Isa = simd::BestIsa, Executor E = SerialExecutor>
  void attend(int layer, TensorView<const float> q, TensorView<const float> k,
              TensorView<const float> v, TensorView<float> out, E&& executor = E{}) {
    headwise::attend<Isa>(cache_, step_, layer, q, k, v, out, std::forward<E>(executor));
  }

  /// See KvCache::commit().
  StepStatus commit() { return cache_.commit(step_); }
  /// See KvCache::rollback().
  StepStatus rollback(std::int64_t new_length) { return cache_.rollback(id_, new_length); }

  /// Tokens committed; the position of the next one.
  std::int64_t length() const { return cache_.length(id_); }
  /// The cache behind the face.
  const KvCache<Rows>& cache() const { return cache_; }
  /// The sequence in cache().
  SequenceId id() const { return id_; }
  /// The step in use, open or not; reserve_scratch() takes it.
  Step& step() { return step_; }

 private:
  static const CacheOptions& checked(const CacheOptions& options) {
    if (options.max_sequences != 1) {
      fail<ConfigError>("a SingleSequence has max_sequences 1, got ", options.max_sequences);
    }
    return options;
  }

  KvCache<Rows> cache_;
  SequenceId id_;
  Step step_;
};

}  // namespace headwise::inline v0
