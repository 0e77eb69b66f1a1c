// SPDX-License-Identifier: MIT
/// @file single_sequence.hpp
/// SingleSequence: the cache as an engine with one conversation sees it.
#pragma once

#include <cstdint>
#include <utility>

#include "headwise/attention/attend.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/phase.hpp"

namespace headwise::inline v0 {

/// One sequence in a KvCache of its own, and the step it is in. A face, not a mechanism: begin(),
/// attend() and commit() are the cache's. It neither moves nor copies.
///
///     SingleSequence<f16> sequence(shape, plan, {.max_context = 32768});
///     if (sequence.begin(num_tokens) != StepStatus::kOk) ...;
///     for (int layer = 0; ...) {
///       if (sequence.attend(layer, q, k, v, out) != StepStatus::kOk) ...;
///     }
///     if (sequence.commit() != StepStatus::kOk) ...;
template <class Rows = f16>
class SingleSequence {
 public:
  /// @throws ConfigError as KvCache, or when options.max_sequences is not 1.
  SingleSequence(const ModelShape& shape, const HeadPlan& plan, const CacheOptions& options)
      : cache_(shape, plan, checked(options)), id_(*cache_.add_sequence()) {}

  /// Opens a step of `num_tokens`; kDecode for several tokens of speculation. See
  /// KvCache::begin().
  StepStatus begin(std::int64_t num_tokens, Phase phase = Phase::kPrompt) {
    return cache_.begin(step_, {{id_, num_tokens, phase}});
  }

  /// attend() of attention/attend.hpp for this sequence's rows.
  template <class Isa = simd::BestIsa, Executor E = SerialExecutor>
  StepStatus attend(int layer, InputView q, InputView k, InputView v, OutputView out,
                    E&& executor = E{}) {
    return headwise::attend<Isa>(cache_, step_, layer, q, k, v, out, std::forward<E>(executor));
  }

  /// See KvCache::commit().
  StepStatus commit() { return cache_.commit(step_); }
  /// See KvCache::clear().
  StepStatus clear() { return cache_.clear(id_); }
  /// See KvCache::rollback().
  StepStatus rollback(std::int64_t new_length) { return cache_.rollback(id_, new_length); }

  /// Tokens committed; the position of the next one.
  std::int64_t length() const { return cache_.length(id_); }
  /// The cache behind the face.
  const KvCache<Rows>& cache() const& { return cache_; }
  const KvCache<Rows>& cache() const&& = delete;
  /// The sequence in cache().
  SequenceId id() const { return id_; }
  /// The step in use, open or not; reserve_scratch() takes it.
  Step& step() & { return step_; }
  Step& step() && = delete;

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
