// SPDX-License-Identifier: MIT
/// @file step.hpp
/// Step: one pass of new tokens through all layers, from begin to commit.
#pragma once

#include <atomic>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "headwise/cache/keep/keep_rule.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/phase.hpp"
#include "headwise/core/scratch.hpp"

namespace headwise::inline v0 {

/// A sequence of one cache. A released sequence's id names nobody, also when its place is taken by
/// another one.
struct SequenceId {
  std::int32_t index = -1;       ///< place among the cache's sequences; -1: nobody
  std::uint32_t generation = 0;  ///< how many had the place before
  friend constexpr auto operator<=>(SequenceId, SequenceId) = default;
  friend constexpr bool operator==(SequenceId, SequenceId) = default;  // nvcc 13 does not derive it
};

/// New tokens of one sequence in a step.
struct SequenceChunk {
  SequenceId sequence{};         ///< live, named once a step
  std::int64_t num_tokens = 0;   ///< in [0, CacheOptions::max_chunk]
  Phase phase = Phase::kPrompt;  ///< kDecode: the window rule, also for several tokens
};

/// What a call in service answers. Anything but kOk has changed nothing, except that begin drops
/// the step that was open before it looks at the new one.
enum class [[nodiscard]] StepStatus : std::uint8_t{
    kOk,
    kOutOfPages,      ///< not every page that is needed is free: missing_bytes() says how many
    kOutOfTables,     ///< no block of page tables is free for a sequence of this length
    kOutOfSequences,  ///< max_sequences are in use
    kContextTooLong,  ///< a sequence would grow past max_context
    kChunkTooLong,    ///< more new tokens than max_chunk
    kInvalidChunk,    ///< unknown sequence, a sequence named twice, or a negative token count
    kInStep,          ///< the sequence takes part in the open step: commit or drop that first
    kStale,           ///< not the step that is open: dropped, superseded or committed already
    kIncomplete,      ///< commit before every layer was attended
    kTooFarBack,      ///< rollback below high_water - max_rollback, or forward
    kAttended,        ///< the layer was attended already
    kNotPlanned,      ///< a share of a layer before plan_work(), or a second time after it
    kTooManyThreads,  ///< a share of more threads than plan_work() was told
    kBadSelection,    ///< compact: kept positions that the sequence cannot keep; the fault says why
    kTooSmall,        ///< memory of the caller's is smaller than its size query says
    kRolledBack,      ///< export of whole pages: a ring holds rows of tokens rolled back
    kSelectedFrom,    ///< snapshot of a sequence from which a selection has dropped rows
    kDeviceError,     ///< a device refused a copy or a launch; its cache is of no more use
};

/// A few words for a log or a message.
constexpr const char* to_string(StepStatus status) {
  switch (status) {
    case StepStatus::kOk:
      return "ok";
    case StepStatus::kOutOfPages:
      return "out of pages";
    case StepStatus::kOutOfTables:
      return "out of page tables";
    case StepStatus::kOutOfSequences:
      return "max_sequences are in use";
    case StepStatus::kContextTooLong:
      return "longer than max_context";
    case StepStatus::kChunkTooLong:
      return "chunk longer than max_chunk";
    case StepStatus::kInvalidChunk:
      return "invalid chunk";
    case StepStatus::kInStep:
      return "the sequence is in the open step";
    case StepStatus::kStale:
      return "stale step";
    case StepStatus::kIncomplete:
      return "a layer was not attended";
    case StepStatus::kTooFarBack:
      return "rollback too far";
    case StepStatus::kAttended:
      return "the layer was attended already";
    case StepStatus::kNotPlanned:
      return "the step's work was not planned";
    case StepStatus::kTooManyThreads:
      return "more threads than planned for";
    case StepStatus::kBadSelection:
      return "kept positions that cannot be kept";
    case StepStatus::kTooSmall:
      return "the caller's memory is too small";
    case StepStatus::kRolledBack:
      return "whole pages hold rows of tokens rolled back";
    case StepStatus::kDeviceError:
      return "device error";
    case StepStatus::kSelectedFrom:
      return "no snapshot of a sequence that was selected from";
  }
  return "unknown";
}

/// One sequence's part of a step.
struct StepChunk {
  SequenceId sequence{};         ///< whose rows these are
  StepLengths lengths;           ///< before and after the step
  std::int64_t first_row = 0;    ///< of this sequence in q, k, v and out
  Phase phase = Phase::kPrompt;  ///< of its chunk
  /// New tokens.
  std::int64_t num_tokens() const { return lengths.next - lengths.length; }
};

/// A step's bookkeeping; reuse one object for all steps, its memory is kept.
class Step {
 public:
  Step() = default;
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  /// The sequences of the step, in the order of its chunks; empty after a refused begin.
  std::span<const StepChunk> chunks() const& { return chunks_; }
  std::span<const StepChunk> chunks() const&& = delete;
  /// Rows of q, k, v and out.
  std::int64_t num_rows() const {
    return chunks_.empty() ? 0 : chunks_.back().first_row + chunks_.back().num_tokens();
  }

  /// Finite elements of the step's K and V that the row format made infinite, so far: f16 ends at
  /// 65504. Queries see them as infinite keys and values, also those of a token that its chunk
  /// pushes out of the window before it ends. A layer that is attended again counts again. Reset by
  /// begin.
  std::int64_t num_overflows() const { return num_overflows_.load(std::memory_order_relaxed); }

  /// Memory that attention keeps between the step's tasks; reserve_scratch() sizes it.
  const Scratch& scratch() const& { return scratch_; }
  const Scratch& scratch() const&& = delete;
  /// Grows the scratch to at least `bytes`. Where it grows, planned work is gone.
  void reserve_scratch_bytes(std::size_t bytes) {
    if (bytes <= scratch_.num_bytes()) return;
    planned_threads_ = 0;
    scratch_.reserve(bytes);
  }

  /// Threads that plan_work() cut the step for; 0: not since begin.
  std::size_t planned_threads() const { return planned_threads_; }
  /// Notes that the scratch holds the step's work, cut for so many threads. Layers that were
  /// attended in part begin anew.
  /// @param heads_of  KV heads of a layer
  template <class HeadsOf>
  void note_planned(std::size_t num_threads, HeadsOf&& heads_of) {
    planned_threads_ = num_threads;
    for (int l = 0; l < static_cast<int>(num_layers_); ++l) {
      if (!is_attended(l, heads_of(l))) heads_done(l).store(0, std::memory_order_relaxed);
    }
  }

  /// Whether every head of a layer of `num_kv_heads` has the rows of all chunks in its pages.
  /// False where there are none.
  bool is_attended(int layer, int num_kv_heads) const {
    const std::int64_t wanted = num_growing_ * num_kv_heads;
    return wanted > 0 && heads_done(layer).load(std::memory_order_acquire) >= wanted;
  }
  /// Begins a layer, perhaps anew after an executor threw: none of its heads is done.
  /// @return a number that no other attempt since begin has; not 0
  std::uint32_t start_layer(int layer) {
    heads_done(layer).store(0, std::memory_order_relaxed);
    return next_attempt();
  }
  /// As start_layer(), for work that finishes no head.
  std::uint32_t next_attempt() {
    if (++last_attempt_ == 0) ++last_attempt_;
    return last_attempt_;
  }

  /// Notes that one more of `layer`'s heads has its rows in their pages. Any thread.
  void note_head_done(int layer) const { note_heads_done(layer, 1); }
  /// Notes `heads` of them, counted once for each sequence with new tokens.
  void note_heads_done(int layer, std::int64_t heads) const {
    heads_done(layer).fetch_add(heads, std::memory_order_release);
  }

  /// Counts elements that became infinite. Any thread.
  void note_overflows(std::int64_t elements) const {
    if (elements != 0) num_overflows_.fetch_add(elements, std::memory_order_relaxed);
  }

 private:
  friend class Books;

  std::atomic<std::int64_t>& heads_done(int layer) const {
    HEADWISE_ASSERT(layer >= 0 && static_cast<std::size_t>(layer) < num_layers_,
                    "layer out of range, or a step that was never begun");
    return heads_done_[static_cast<std::size_t>(layer)];
  }

  std::vector<StepChunk> chunks_;
  const void* books_ = nullptr;   // whose begin filled it
  std::uint64_t epoch_ = 0;       // of that begin; 0: never
  std::int64_t num_growing_ = 0;  // chunks with new tokens
  std::size_t planned_threads_ = 0;
  std::uint32_t last_attempt_ = 0;
  std::size_t num_layers_ = 0;
  std::unique_ptr<std::atomic<std::int64_t>[]> heads_done_;  // [num_layers], over all chunks
  mutable std::atomic<std::int64_t> num_overflows_{0};
  Scratch scratch_;
};

}  // namespace headwise::inline v0
