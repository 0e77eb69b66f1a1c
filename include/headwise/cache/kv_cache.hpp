// SPDX-License-Identifier: MIT
/// @file kv_cache.hpp
/// KvCache: every KV head's rows, kept by plan; one paged store for every policy.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <span>
#include <variant>

#include "headwise/cache/geometry.hpp"
#include "headwise/cache/page_ledger.hpp"
#include "headwise/cache/rows/format.hpp"
#include "headwise/cache/rows/int8_rows.hpp"
#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/cache/rows/tiled_rows.hpp"
#include "headwise/cache/step.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/core/kv_view.hpp"
#include "headwise/core/tensor_view.hpp"
#include "headwise/core/window.hpp"

namespace headwise::inline v0 {

/// The stored rows that a step's queries may see, and the rule that says which query sees which.
template <class Format>
struct SeenRows {
  KvView<Format> view;  ///< rows stored before the step
  Window window;        ///< Window::everything() where the view already says it all
};

/// K and V of many independent sequences, head by head as the plan says.
///
/// One step: `begin` takes pages, attend() (attention/attend.hpp) runs the layers, `commit` makes
/// the new tokens part of their sequences. begin, commit, drop, rollback, add_sequence and release
/// are one thread's business; they neither allocate (after the first step) nor lock nor throw.
///
/// @tparam Rows  what a stored row is: f32, f16 or bf16 in the order that the CPU kernels read
///   fastest, or a row format by name (cache/rows/): PlainRows<f16> for foreign kernels.
template <class Rows = f16>
  requires RowFormat<FormatOf<Rows>>
class KvCache {
 public:
  /// How pages hold rows.
  using Format = FormatOf<Rows>;

  /// @throws ConfigError when plan and shape differ or an option is out of range; says both values.
  KvCache(const ModelShape& shape, const HeadPlan& plan, const CacheOptions& options)
      : ledger_(CacheGeometry(shape, plan, options, &Format::page_bytes)) {}

  /// An empty sequence, or nothing when max_sequences are in use.
  std::optional<SequenceId> add_sequence() { return ledger_.add_sequence(); }
  /// Gives all pages of the sequence back at once.
  void release(SequenceId id) { ledger_.release(id); }
  /// Tokens committed; the position of the sequence's next token.
  std::int64_t length(SequenceId id) const { return ledger_.length(id); }
  /// The longest length ever committed.
  std::int64_t high_water(SequenceId id) const { return ledger_.high_water(id); }
  /// Back to `new_length` tokens in all layers and heads, exactly, down to high_water -
  /// max_rollback; more is refused (kTooFarBack) and changes nothing.
  StepStatus rollback(SequenceId id, std::int64_t new_length) {
    return ledger_.rollback(id, new_length);
  }

  /// Opens a step of `chunks[i].num_tokens` new tokens for each sequence named; q, k, v and out
  /// hold the sequences' rows in this order. Takes every page that the step needs, or none.
  StepStatus begin(Step& step, std::span<const SequenceChunk> chunks, Phase phase) {
    return ledger_.begin(step, chunks, phase);
  }
  /// @copydoc begin
  StepStatus begin(Step& step, std::initializer_list<SequenceChunk> chunks, Phase phase) {
    return ledger_.begin(step, {chunks.begin(), chunks.size()}, phase);
  }
  /// Makes the step's rows part of their sequences; kStale or kIncomplete changes nothing.
  StepStatus commit(Step& step) { return ledger_.commit(step); }
  /// Closes the step without a trace.
  StepStatus drop(Step& step) { return ledger_.drop(step); }
  /// Whether `step` is the one that this cache has open.
  bool is_open(const Step& step) const { return ledger_.is_open(step); }

  /// Bytes of page memory that the sequence holds.
  std::size_t held_bytes(SequenceId id) const {
    return static_cast<std::size_t>(ledger_.pages_held(id)) * geometry().page_bytes();
  }
  /// Pages that the sequence holds, those of an open step not counted.
  std::int64_t pages_held(SequenceId id) const { return ledger_.pages_held(id); }
  /// Pages that nobody holds.
  std::int64_t free_pages() const { return ledger_.pool().num_free(); }
  /// What follows from shape, plan and options.
  const CacheGeometry& geometry() const { return ledger_.geometry(); }

  // For attention ---------------------------------------------------------------------------------

  /// Stored rows that some query of the entry may see of a head with this store.
  std::int64_t rows_seen(const HeadStore& store, const StepEntry& entry) const {
    return std::visit([&](const auto& kind) { return kind.runs(entry.lengths.length).num_rows(); },
                      store);
  }

  /// What the entry's queries may see of one head, as of the step's start. Any thread.
  SeenRows<Format> seen(const StepEntry& entry, Phase phase, int layer, int kv_head) const {
    const LayerPlace& place = geometry().layers()[static_cast<std::size_t>(layer)];
    const HeadPlace& head = geometry().head(layer, kv_head);
    const bool chunk_causal = is_chunk_causal(phase);
    SeenRows<Format> seen{view_of(entry.sequence, place, head), Window::everything()};
    std::visit(
        [&](const auto& store) {
          const StoredRuns stored = store.runs(entry.lengths.length);
          for (const KvRun& run : stored.runs) seen.view.add_run(run);
          attach(store, stored, entry, place, head, chunk_causal, seen);
        },
        store_of(head));
    return seen;
  }

  /// Stores the entry's rows of one head, after everything that reads the rows they may overwrite.
  /// One call per head and step; heads may run at once on different threads.
  /// @param k,v  [num_tokens, 1, k_dim] and [num_tokens, 1, v_dim].
  template <class Isa>
  void append(const StepEntry& entry, int layer, int kv_head, TensorView<const float> k,
              TensorView<const float> v) const {
    const LayerPlace& place = geometry().layers()[static_cast<std::size_t>(layer)];
    const HeadPlace& head = geometry().head(layer, kv_head);
    std::visit([&](const auto& store) { append_to<Isa>(store, entry, place, head, k, v); },
               store_of(head));
  }

 private:
  bool is_chunk_causal(Phase phase) const {
    return phase == Phase::kPrompt && geometry().options().prefill == PrefillMode::kChunkCausal;
  }
  const HeadStore& store_of(const HeadPlace& head) const {
    return geometry().classes()[static_cast<std::size_t>(head.class_idx)].store;
  }
  int bank_of(SequenceId id, const HeadPlace& head) const {
    return ledger_.bank(id, static_cast<std::size_t>(head.class_idx));
  }

  KvView<Format> view_of(SequenceId id, const LayerPlace& place, const HeadPlace& head) const {
    return KvView<Format>::over_pages(ledger_.pool().memory(), geometry().page_bytes(),
                                      ledger_.table(id, head), place.page);
  }

  std::byte* page_of(SequenceId id, const HeadPlace& head, std::int64_t table_entry) const {
    const std::int32_t page = ledger_.table(id, head)[table_entry];
    return ledger_.pool().memory() + static_cast<std::size_t>(page) * geometry().page_bytes();
  }

  // What a store adds to a view beyond its runs.

  void attach(const RetrievalStore&, const StoredRuns&, const StepEntry&, const LayerPlace&,
              const HeadPlace&, bool, SeenRows<Format>&) const {}

  void attach(const StreamingStore& store, const StoredRuns&, const StepEntry& entry,
              const LayerPlace&, const HeadPlace& head, bool chunk_causal,
              SeenRows<Format>& seen) const {
    seen.view.page_table += store.first_entry(bank_of(entry.sequence, head));
    if (!chunk_causal) seen.window = {store.ring.sink, store.recent};
  }

  void attach(const FoldingStore& store, const StoredRuns& stored, const StepEntry& entry,
              const LayerPlace& place, const HeadPlace& head, bool, SeenRows<Format>& seen) const {
    if (stored.folded == 0) return;
    const float* means =
        means_of(place, sums_of(store, entry.sequence, place, head, bank_of(entry.sequence, head),
                                store.fold(entry.lengths.length)));
    seen.view.compensation = {means, means + place.page.k_dim, stored.folded};
  }

  // Appending: which rows a store keeps, and where.

  template <class Isa>
  void append_to(const RetrievalStore&, const StepEntry& entry, const LayerPlace& place,
                 const HeadPlace& head, TensorView<const float> k,
                 TensorView<const float> v) const {
    for (std::int64_t i = 0; i < entry.num_tokens(); ++i) {
      encode<Isa>(entry.sequence, place, head, Slot{entry.lengths.length + i}, 0, k.row(i, 0),
                  v.row(i, 0));
    }
  }

  template <class Isa>
  void append_to(const StreamingStore& store, const StepEntry& entry, const LayerPlace& place,
                 const HeadPlace& head, TensorView<const float> k,
                 TensorView<const float> v) const {
    const StepLengths& lengths = entry.lengths;
    int bank = bank_of(entry.sequence, head);
    if (!store.in_place(lengths)) {
      const std::int64_t old_first = store.first_entry(bank);
      const std::int64_t held = store.end_entry(lengths.length, bank) - old_first;
      bank = 1 - bank;
      for (std::int64_t page = 0; page < held; ++page) {
        std::memcpy(page_of(entry.sequence, head, store.first_entry(bank) + page),
                    page_of(entry.sequence, head, old_first + page), geometry().page_bytes());
      }
    }
    const Pos oldest = store.ring.oldest_kept(lengths.next);
    for (std::int64_t i = 0; i < entry.num_tokens(); ++i) {
      const Pos pos{lengths.length + i};
      if (pos.value >= store.ring.sink && pos < oldest) continue;  // gone before the chunk ends
      encode<Isa>(entry.sequence, place, head, store.ring.slot(pos), store.first_entry(bank),
                  k.row(i, 0), v.row(i, 0));
    }
  }

  template <class Isa>
  void append_to(const FoldingStore& store, const StepEntry& entry, const LayerPlace& place,
                 const HeadPlace& head, TensorView<const float> k,
                 TensorView<const float> v) const {
    append_to<Isa>(RetrievalStore{store.page_tokens, store.max_context}, entry, place, head, k, v);
    const int bank = bank_of(entry.sequence, head);
    if (store.changes(entry.lengths, bank).flips_bank) {
      fold_pages<Isa>(store, entry, place, head, bank);
    }
  }

  /// Fills the other bank with every row of sums that a length in reach after commit may ask for:
  /// known ones are carried over, each new one is the one before it plus the rows of one page.
  template <class Isa>
  void fold_pages(const FoldingStore& store, const StepEntry& entry, const LayerPlace& place,
                  const HeadPlace& head, int bank) const {
    const std::int64_t width = place.page.k_dim + place.page.v_dim;
    const auto sums = [&](int in_bank, std::int64_t fold) {
      return sums_of(store, entry.sequence, place, head, in_bank, fold);
    };
    const auto carry = [&](const double* from, double* to) {  // sums, and the means behind them
      if (from != to) std::memcpy(to, from, compensation_bytes(place));
    };
    const std::int64_t known = store.fold(entry.lengths.high_water);
    const std::int64_t last = store.fold(entry.lengths.next_high_water());
    std::int64_t fold = std::min(known, store.settled_fold(entry.lengths.next_high_water()));
    if (fold != 0) carry(sums(bank, fold), sums(1 - bank, fold));
    while (fold < last) {
      const std::int64_t next = store.next_fold(fold);
      double* to = sums(1 - bank, next);
      if (next <= known) {
        carry(sums(bank, next), to);
      } else {
        const std::int64_t first = fold == 0 ? store.budget.sink : fold;
        if (fold == 0) {
          std::fill_n(to, width, 0.0);
        } else {
          carry(sums(1 - bank, fold), to);
        }
        const std::int64_t page = first / store.page_tokens;
        Format::template add_rows<Isa>(page_of(entry.sequence, head, page), place.page,
                                       static_cast<std::size_t>(first % store.page_tokens),
                                       static_cast<std::size_t>(store.page_tokens), to,
                                       to + place.page.k_dim);
        const auto count = static_cast<double>(next - store.budget.sink);
        float* means = means_of(place, to);
        for (std::int64_t i = 0; i < width; ++i) means[i] = static_cast<float>(to[i] / count);
      }
      fold = next;
    }
  }

  static std::size_t compensation_bytes(const LayerPlace& place) {
    return static_cast<std::size_t>(kCompensationFloats * (place.page.k_dim + place.page.v_dim)) *
           sizeof(float);
  }
  /// [k_dim] sums of K, then [v_dim] sums of V, over the positions [sink, fold).
  double* sums_of(const FoldingStore& store, SequenceId id, const LayerPlace& place,
                  const HeadPlace& head, int bank, std::int64_t fold) const {
    const auto row = static_cast<std::size_t>(bank * store.versions() + store.version_index(fold));
    auto* first = reinterpret_cast<std::byte*>(ledger_.compensation(id, head));
    return reinterpret_cast<double*>(first + row * compensation_bytes(place));
  }
  /// The means that belong to a row of sums, in the same order.
  static float* means_of(const LayerPlace& place, double* sums) {
    return reinterpret_cast<float*>(sums + place.page.k_dim + place.page.v_dim);
  }

  template <class Isa>
  void encode(SequenceId id, const LayerPlace& place, const HeadPlace& head, Slot slot,
              std::int64_t first_entry, const float* k, const float* v) const {
    const std::int64_t page_tokens = place.page.page_tokens;
    Format::template encode<Isa>(page_of(id, head, first_entry + slot.value / page_tokens),
                                 place.page, static_cast<std::size_t>(slot.value % page_tokens), k,
                                 v);
  }

  PageLedger ledger_;
};

}  // namespace headwise::inline v0
