// SPDX-License-Identifier: MIT
/// @file kv_cache.hpp
/// KvCache: every KV head's rows, kept by plan; one paged store for every policy and place.
#pragma once

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "headwise/cache/books.hpp"
#include "headwise/cache/geometry.hpp"
#include "headwise/cache/keep/keep.hpp"
#include "headwise/cache/place.hpp"
#include "headwise/cache/rows/format.hpp"
#include "headwise/cache/rows/int4_rows.hpp"
#include "headwise/cache/rows/int8_rows.hpp"
#include "headwise/cache/rows/kv_rows.hpp"
#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/cache/rows/rotated_rows.hpp"
#include "headwise/cache/rows/tiled_rows.hpp"
#include "headwise/cache/selection_fault.hpp"
#include "headwise/cache/snapshot.hpp"
#include "headwise/cache/step.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checksum.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/core/kv_view.hpp"
#include "headwise/core/phase.hpp"
#include "headwise/core/tensor_view.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/kept_positions.hpp"

namespace headwise::inline v0 {

/// The stored rows that a step's queries may see, and the rule that says which query sees which.
template <class Format>
struct SeenRows {
  KvView<Format> view;  ///< rows stored before the step
  Window window;        ///< Window::everything() where the view already says it all
};

/// K and V of many independent sequences, head by head as the plan says.
///
/// One step: `begin` takes pages, attend() (attention/attend.hpp) runs the layers, each once and in
/// any order, `commit` makes the new tokens part of their sequences. All calls that change the
/// cache are one thread's business; begin, commit, drop and rollback neither allocate (after the
/// first step) nor lock nor throw. A cache neither moves nor copies: steps and attention point to
/// it.
///
/// @tparam Row  a row format (cache/rows/), or an element type for its usual format: f32, f16,
/// bf16; or Formats<...> of a few of either, for classes of heads (CacheOptions::format_of).
/// @tparam Place  where the pages live (cache/place.hpp).
template <class Row = f16, CachePlace Place = HostPlace>
  requires(RowFormat<typename FormatList<Row>::Front>&& FormatList<Row>::kAreFormats)
class KvCache {
 public:
  using Format = typename FormatList<Row>::Front;  ///< the only one, or the first of a few
  using Stream = typename Place::Stream;

  /// @throws ConfigError when plan and shape differ or an option is out of range; says both values.
  ///   What the place throws where it cannot have the memory.
  KvCache(const ModelShape& shape, const HeadPlan& plan, const CacheOptions& options)
      : KvCache(CacheGeometry(shape, plan, options, FormatList<Row>::kPageBytes)) {}

  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  // Sequences -------------------------------------------------------------------------------------

  /// An empty sequence, or nothing when max_sequences are in use.
  std::optional<SequenceId> add_sequence() { return books_.add_sequence(); }
  /// The sequence is no more. Its pages are free at once, or when the open step that it takes part
  /// in has ended; the step's other sequences are not disturbed.
  void release(SequenceId id) { books_.release(id); }
  /// Back to an empty sequence under the same id, whatever max_rollback says.
  /// @return kInStep where it takes part in the open step.
  StepStatus clear(SequenceId id) { return books_.clear(id); }
  /// Back to `new_length` tokens in all layers and heads, exactly, down to high_water -
  /// max_rollback, but not behind a selection, or to 0, which is clear(); more is refused
  /// (kTooFarBack) and changes nothing.
  StepStatus rollback(SequenceId id, std::int64_t new_length) {
    return books_.rollback(id, new_length);
  }
  /// Most tokens that rollback() may take back now; a sequence may also be cleared.
  std::int64_t max_truncate(SequenceId id) const { return books_.max_truncate(id); }
  /// Another sequence with the same past, from which both go their own ways. Full pages that no
  /// append and no permitted rollback of either can reach are shared, rings, tails and compensation
  /// rows are copied now; a step never copies. Costs O(window) bytes a head, and O(length) table
  /// entries; allocates nothing.
  /// @param child  the new sequence; untouched unless kOk is returned.
  /// @return kOutOfSequences, kOutOfPages, kOutOfTables or kInStep change nothing.
  StepStatus fork(SequenceId id, SequenceId& child, Stream stream = {}) {
    return fork(id, books_.length(id), child, stream);
  }
  /// The same with the first `length` tokens of `id` only, as reuse_limit() permits: as far as
  /// rollback reaches, or from a checkpoint (CacheOptions::checkpoint_tokens). The parent stays as
  /// it is. Where rollback of the parent would reach that far, the child may be rolled back as far
  /// as the parent; from a checkpoint, as far as the parent could when it had that length.
  /// @return additionally kTooFarBack, which changes nothing.
  StepStatus fork(SequenceId id, std::int64_t length, SequenceId& child, Stream stream = {}) {
    SequenceId forked;
    StepStatus copied = StepStatus::kOk;
    const StepStatus status = books_.fork(id, length, forked, copier(copied, stream));
    if (status != StepStatus::kOk) return status;
    send_copies(copied, stream);
    if (copied == StepStatus::kOk) {
      child = forked;
    } else {
      books_.release(forked);
    }
    return copied;
  }
  /// How much of the first `length` tokens of `id` a fork may begin with, and why not more.
  ReuseLimit reuse_limit(SequenceId id, std::int64_t length) const {
    return books_.reuse_limit(id, length);
  }
  /// Whether `id` was added and not released since.
  bool is_live(SequenceId id) const { return books_.is_live(id); }
  /// Tokens committed; the position of the sequence's next token. 0 where the id names nobody.
  std::int64_t length(SequenceId id) const { return books_.length(id); }
  /// The longest length ever committed.
  std::int64_t high_water(SequenceId id) const { return books_.high_water(id); }

  // Snapshots: of a cache whose pages the host can read -------------------------------------------

  /// Bytes of the sequence's snapshot; 0 where the id names nobody, or a sequence that has none:
  /// see snapshot().
  std::size_t snapshot_bytes(SequenceId id) const requires(Place::kOnHost) {
    if (!is_live(id) || books_.is_selected_from(id.index)) return 0;
    return snapshot_head().snapshot_bytes(length(id), high_water(id), books_.keep_states(id.index));
  }
  /// Writes the sequence, without its checkpoints, as cache/snapshot.hpp says: versioned,
  /// checksummed, little-endian. The sequence stays as it is.
  /// @param to  snapshot_bytes() of them are written; any alignment.
  /// @return kInvalidChunk, kInStep (it takes part in the open step), kSelectedFrom (compact()
  ///   dropped rows of it, of which a snapshot says nothing yet) or kTooSmall wrote nothing.
  StepStatus snapshot(SequenceId id, std::span<std::byte> to) requires(Place::kOnHost) {
    static_assert(std::endian::native == std::endian::little, "rows are written as they lie");
    if (!is_live(id)) return StepStatus::kInvalidChunk;
    if (books_.is_in_step(id)) return StepStatus::kInStep;
    if (books_.is_selected_from(id.index)) return StepStatus::kSelectedFrom;
    const std::size_t bytes = snapshot_bytes(id);
    if (to.size() < bytes) return StepStatus::kTooSmall;
    to = to.first(bytes);
    clear_unwritten_rows(id);
    const SnapshotHead head = snapshot_head();
    Checksum sum;
    std::size_t at = head.num_bytes();
    std::memset(to.data() + at, 0, head.first_page() - at);
    const std::size_t sums = geometry().compensation_bytes();
    if (sums > 0) std::memcpy(to.data() + at, books_.compensation(id.index), sums);
    sum.add(to.subspan(at, head.first_page() - at));
    at = head.first_page();
    books_.for_each_page(id, [&](std::int32_t page, std::size_t page_bytes) {
      std::memcpy(to.data() + at, books_.pool().address(page), page_bytes);
      sum.add(to.subspan(at, page_bytes));  // while it is near
      at += page_bytes;
    });
    head.write(to, length(id), high_water(id), books_.keep_states(id.index), sum.value());
    return StepStatus::kOk;
  }
  /// A new sequence that goes on where the one of the snapshot was, rolled back as far as that one
  /// could be. The cache that made it may have had any capacity (max_sequences, max_context,
  /// max_bytes, max_chunk), and must have had this one's shape, row format, plan, page_tokens and
  /// max_rollback. Takes all pages or none.
  /// @param id  the new sequence; untouched unless kOk is returned.
  /// @return kOutOfSequences, kOutOfPages, kOutOfTables, or kContextTooLong for a sequence that was
  ///   ever longer than max_context; they change nothing.
  /// @throws FormatError where the bytes are no such snapshot, with what is wrong and both values;
  ///   the cache is then as before, whatever the bytes are.
  StepStatus restore(std::span<const std::byte> from, SequenceId& id) requires(Place::kOnHost) {
    static_assert(std::endian::native == std::endian::little, "rows are read as they lie");
    const SnapshotHead head = snapshot_head();
    const SnapshotSequence sequence = head.read(from);
    if (sequence.high_water > geometry().options().max_context) return StepStatus::kContextTooLong;
    SequenceId restored;
    const StepStatus status =
        books_.add_sequence(sequence.length, sequence.high_water, sequence.states, restored);
    if (status != StepStatus::kOk) return status;
    Checksum sum;
    std::size_t at = head.num_bytes();
    const std::size_t sums = geometry().compensation_bytes();
    if (sums > 0) std::memcpy(books_.compensation(restored.index), from.data() + at, sums);
    sum.add(from.subspan(at, head.first_page() - at));
    at = head.first_page();
    books_.for_each_page(restored, [&](std::int32_t page, std::size_t page_bytes) {
      std::byte* to = books_.pool().address(page);
      std::memcpy(to, from.data() + at, page_bytes);
      sum.add({to, page_bytes});
      at += page_bytes;
    });
    if (sum.value() != SnapshotHead::body_checksum(from)) {
      books_.release(restored);
      fail<FormatError>("snapshot: the checksum of its rows is wrong: it is damaged");
    }
    id = restored;
    return StepStatus::kOk;
  }

  // Steps -----------------------------------------------------------------------------------------

  /// Opens a step of `chunks[i].num_tokens` new tokens for each sequence named; q, k, v and out
  /// hold the sequences' rows in this order. Takes every page that the step needs, or none. The
  /// step that was open before, if any, is dropped. A step that begins checkpoint_tokens or more
  /// after a sequence's last checkpoint makes one first; its pages are the step's, a drop frees
  /// them.
  StepStatus begin(Step& step, std::span<const SequenceChunk> chunks, Stream stream = {}) {
    StepStatus copied = StepStatus::kOk;
    StepStatus status = books_.begin(step, chunks, copier(copied, stream));
    if (status != StepStatus::kOk) return status;
    send_copies(copied, stream);
    status = copied == StepStatus::kOk ? place_.send(books_, step, stream) : copied;
    if (status != StepStatus::kOk) (void)books_.drop(step);
    return status;
  }
  /// @copydoc begin
  StepStatus begin(Step& step, std::initializer_list<SequenceChunk> chunks, Stream stream = {}) {
    return begin(step, std::span<const SequenceChunk>{chunks.begin(), chunks.size()}, stream);
  }
  /// Makes the step's rows part of their sequences; kStale or kIncomplete changes nothing.
  StepStatus commit(Step& step) { return books_.commit(step); }
  /// Closes the step without a trace.
  StepStatus drop(const Step& step) { return books_.drop(step); }
  /// Whether `step` is the one that this cache has open.
  bool is_open(const Step& step) const { return books_.is_open(step); }
  /// Whether the step's layer was attended, all heads of it.
  bool is_attended(const Step& step, int layer) const {
    return step.is_attended(layer, geometry().layer(layer).shape.num_kv_heads);
  }

  // Selections ------------------------------------------------------------------------------------

  /// Drops every stored row of the heads that are selected from (KeepSelected) but those of `kept`,
  /// in all layers and heads or in none, and frees the pages; the rows that stay are moved bit for
  /// bit. Between commit and the next begin, any number of times in a sequence's life. Nothing can
  /// be rolled back behind it afterwards. Where every head keeps all that it has, nothing changes.
  ///
  /// Rows move within the pages that the sequence holds; only of pages that a fork or a checkpoint
  /// shares new ones are taken. The sequence's checkpoints keep the rows as they were, and no more
  /// are made. Cost: O(stored rows) to check, and the kept rows' bytes to move.
  /// @param kept  positions of stored tokens, ascending, of every KV head of every layer; none for
  ///   heads that are not selected from.
  /// @param fault  where kBadSelection is returned, what is wrong, with value and limit.
  /// @return kInvalidChunk, kInStep, kOutOfPages and kBadSelection change nothing.
  StepStatus compact(SequenceId id, const KeptPositions& kept,
                     SelectionFault* fault = nullptr) requires(Place::kOnHost) {
    SelectionFault found;
    const StepStatus status = books_.compact(
        id, kept, found,
        [&](const PageCopy& copy) {
          std::memcpy(books_.pool().address(copy.to), books_.pool().address(copy.from), copy.bytes);
        },
        [&](int layer, int class_idx, std::int32_t from, std::span<const std::int32_t> rows,
            std::int32_t to, std::int64_t to_row) {
          const int format = geometry().classes()[static_cast<std::size_t>(class_idx)].format;
          FormatList<Row>::visit(format, [&]<class F>(std::type_identity<F>) {
            F::copy_rows(books_.pool().address(from), rows, books_.pool().address(to),
                         static_cast<std::size_t>(to_row), geometry().layer(layer).page);
          });
        });
    if (fault != nullptr) *fault = found;
    return status;
  }
  /// Positions of the rows that a head stores between steps, ascending; empty for a head that is
  /// not selected from, or an id that names nobody.
  std::vector<std::int32_t> stored_positions(SequenceId id, int layer, int kv_head) const {
    std::vector<std::int32_t> positions;
    if (!is_live(id)) return positions;
    const HeadGeometry& head = geometry().head(layer, kv_head);
    books_.for_each_position(id.index, static_cast<std::size_t>(head.class_idx), head.idx_in_class,
                             [&](std::int32_t position) { positions.push_back(position); });
    return positions;
  }
  /// The rows that a head stores between steps, for scorers: what a decode step would see.
  /// @pre is_live(id)
  /// @tparam F  the format of the head's rows: see visit_format()
  template <class F = Format>
  KvView<F> stored(SequenceId id, int layer, int kv_head) const& requires(Place::kOnHost) {
    const std::int64_t now = length(id);
    return seen<F>({id, {now, high_water(id), now}, 0, Phase::kDecode}, layer, kv_head).view;
  }
  template <class F = Format>
  KvView<F> stored(SequenceId id, int layer, int kv_head) const&& = delete;

  // Memory ----------------------------------------------------------------------------------------

  /// Bytes of page memory that the sequence holds, those of an open step not counted, shared pages
  /// in full.
  std::size_t held_bytes(SequenceId id) const { return books_.held_bytes(id); }
  /// Bytes of pages that nobody holds.
  std::size_t free_bytes() const { return books_.pool().free_bytes(); }
  /// Pages that somebody holds, a shared one counted once.
  std::int64_t pages_in_use() const { return books_.pool().num_used(); }
  /// Bytes of free pages that a step of these chunks lacks (an open step's count as taken); 0: it
  /// would begin, if nothing but pages is in its way.
  std::size_t missing_bytes(std::span<const SequenceChunk> chunks) {
    return books_.missing_bytes(chunks);
  }
  /// @copydoc missing_bytes
  std::size_t missing_bytes(std::initializer_list<SequenceChunk> chunks) {
    return books_.missing_bytes({chunks.begin(), chunks.size()});
  }
  /// Most new tokens that a step of this sequence alone could have now.
  std::int64_t longest_chunk(SequenceId id) { return books_.longest_chunk(id); }
  /// Bytes of everything but the pages.
  std::size_t metadata_bytes() const { return books_.metadata_bytes(); }

  /// What follows from shape, plan and options.
  const CacheGeometry& geometry() const& { return books_.geometry(); }
  const CacheGeometry& geometry() const&& = delete;
  /// Sequences, and the tables of their pages.
  const Books& books() const& { return books_; }
  const Books& books() const&& = delete;
  /// Where the pages live.
  const Place& place() const& { return place_; }
  const Place& place() const&& = delete;

  // For attention ---------------------------------------------------------------------------------

  /// Stored rows that some query of the entry may see of the head of this class that has most.
  std::int64_t rows_seen(int class_idx, const StepChunk& chunk) const {
    const auto c = static_cast<std::size_t>(class_idx);
    return geometry()
        .classes()[c]
        .rule.runs(books_.keep_state(chunk.sequence.index, c), chunk.lengths.length, chunk.phase)
        .num_rows();
  }

  /// `fn(std::type_identity<F>)` of the format of a head's rows.
  template <class Fn>
  decltype(auto) visit_format(int layer, int kv_head, Fn&& fn) const {
    const HeadGeometry& head = geometry().head(layer, kv_head);
    return FormatList<Row>::visit(class_of(head).format, fn);
  }

  /// What the chunk's queries may see of one head, as of the step's start. Any thread.
  /// @tparam F  the format of the head's rows: see visit_format()
  template <class F = Format>
  SeenRows<F> seen(const StepChunk& chunk, int layer, int kv_head) const& requires(Place::kOnHost) {
    const LayerGeometry& of_layer = geometry().layer(layer);
    const HeadGeometry& head = geometry().head(layer, kv_head);
    const AnyKeepRule& rule = class_of(head).rule;
    const AnyKeepState state = state_of(chunk, head);
    const std::int64_t length = chunk.lengths.length;
    SeenRows<F> seen{KvView<F>::over_pages(
                         place_.pages(), geometry().pool().granule(),
                         length == 0 ? nullptr : table(chunk, head) + rule.slots(state).first_entry,
                         of_layer.page),
                     rule.window(chunk.phase)};
    for (const KvRun& run : rule.runs(state, length, chunk.phase).runs) seen.view.add_run(run);
    if (const FoldedRows folded = rule.folded(state, length); folded.count > 0) {
      const Sums sums = sums_of(chunk, head, of_layer.page, folded.row);
      seen.view.compensation = {sums.k_mean, sums.v_mean, folded.count};
    }
    return seen;
  }
  template <class F = Format>
  SeenRows<F> seen(const StepChunk& chunk, int layer, int kv_head) const&& = delete;

  /// Stores the chunk's rows of one head, after everything that reads the rows they may overwrite.
  /// One call per head and step; heads may run at once on different threads. Elements that become
  /// infinite are counted in the step. A layer that shares another's K and V has no pages: nothing
  /// is stored there.
  /// @param k,v  [num_tokens, 1, k_dim] and [num_tokens, 1, v_dim]: TensorView<const float>, or
  ///   what has a row(token, 0) of floats, too, which is asked for one row at a time, and floats(),
  ///   the whole tensor if it is one.
  template <class Isa, class OwnRows>
  void append(const Step& step, const StepChunk& chunk, int layer, int kv_head, const OwnRows& k,
              const OwnRows& v) const requires(Place::kOnHost) {
    HEADWISE_ASSERT(is_open(step), "rows of a step that is not open");
    if (!geometry().layer(layer).shape.owns_kv()) return;
    const PageShape& page = geometry().layer(layer).page;
    const HeadGeometry& head = geometry().head(layer, kv_head);
    visit_format(layer, kv_head, [&]<class F>(std::type_identity<F>) {
      append_as<Isa, F>(step, chunk, head, page, k, v);
    });
  }

 private:
  static constexpr std::size_t kCopiesAtOnce = 1024;

  /// One compensation row.
  struct Sums {
    double* k_sum;  ///< [k_dim]
    double* v_sum;  ///< [v_dim]
    float* k_mean;  ///< [k_dim]
    float* v_mean;  ///< [v_dim]
  };

  explicit KvCache(CacheGeometry geometry)
      : place_(geometry), books_(std::move(geometry), place_.pages(), Place::kOnHost) {
    copies_.reserve(kCopiesAtOnce);
  }

  SnapshotHead snapshot_head() const {
    std::vector<std::string_view> formats;
    for (int i = 0; i < FormatList<Row>::kCount; ++i) {
      formats.push_back(FormatList<Row>::visit(
          i, []<class F>(std::type_identity<F>) { return std::string_view(F::name()); }));
    }
    return {geometry(), std::move(formats)};
  }
  /// Takes a fork's copies and sends them on in portions, so that it needs no memory of its own.
  auto copier(StepStatus& copied, Stream stream) {
    return [this, &copied, stream](const PageCopy& copy) {
      copies_.push_back(copy);
      if (copies_.size() == kCopiesAtOnce) send_copies(copied, stream);
    };
  }
  void send_copies(StepStatus& copied, Stream stream) {
    if (copied == StepStatus::kOk && !copies_.empty()) copied = place_.copy_pages(copies_, stream);
    copies_.clear();
    if constexpr (!Place::kOnHost) {
      if (copied == StepStatus::kOk && !books_.sums_copies().empty()) {
        copied = place_.copy_sums(books_.sums_copies(), stream);
      }
      books_.clear_sums_copies();
    }
  }

  const HeadClass& class_of(const HeadGeometry& head) const {
    return geometry().classes()[static_cast<std::size_t>(head.class_idx)];
  }
  /// What the head's rule remembers of the chunk's sequence.
  AnyKeepState state_of(const StepChunk& chunk, const HeadGeometry& head) const {
    return books_.head_state(chunk.sequence.index, static_cast<std::size_t>(head.class_idx),
                             head.idx_in_class);
  }
  const std::int32_t* table(const StepChunk& chunk, const HeadGeometry& head) const {
    return books_.tables().head(chunk.sequence.index, static_cast<std::size_t>(head.class_idx),
                                head.idx_in_class);
  }
  std::byte* page_of(const StepChunk& chunk, const HeadGeometry& head, std::int64_t at) const {
    return books_.pool().address(table(chunk, head)[at]);
  }
  Sums sums_of(const StepChunk& chunk, const HeadGeometry& head, const PageShape& page,
               std::int64_t row) const {
    std::byte* begin = books_.compensation(chunk.sequence.index) + head.compensation_offset +
                       static_cast<std::size_t>(row) * CacheGeometry::compensation_row_bytes(page);
    auto* sums = reinterpret_cast<double*>(begin);
    auto* means = reinterpret_cast<float*>(sums + page.k_dim + page.v_dim);
    return {sums, sums + page.k_dim, means, means + page.k_dim};
  }

  /// The rows where they lie, if they are floats.
  template <class OwnRows>
  static TensorView<const float> floats_of(const OwnRows& rows) {
    if constexpr (std::same_as<OwnRows, TensorView<const float>>) {
      return rows;
    } else {
      return rows.floats();
    }
  }

  /// append() of a head whose rows are F's.
  template <class Isa, class F, class OwnRows>
  void append_as(const Step& step, const StepChunk& chunk, const HeadGeometry& head,
                 const PageShape& page, const OwnRows& k, const OwnRows& v) const {
    const AnyKeepRule& rule = class_of(head).rule;
    const AnyKeepState state = state_of(chunk, head);
    const auto [from, to, held] = rule.append(state, chunk.lengths);
    if (from.first_entry != to.first_entry) carry_over(to, held, chunk, head);
    const TensorView<const float> k_floats = floats_of(k);
    const TensorView<const float> v_floats = floats_of(v);
    const bool are_floats = k_floats.data != nullptr && v_floats.data != nullptr;
    std::int64_t overflows = 0;
    for (std::int64_t i = 0; i < chunk.num_tokens();) {
      const Pos pos{chunk.lengths.length + i};
      if (!to.keeps(pos, chunk.lengths.next)) {  // gone before the chunk ends
        overflows += F::template count_overflows<Isa>(page, k.row(i, 0), v.row(i, 0));
        ++i;
        continue;
      }
      const Slot slot = to.slot(pos);
      std::byte* const begin = page_of(chunk, head, to.first_entry + slot.value / page.page_tokens);
      const auto row = static_cast<std::size_t>(slot.value % page.page_tokens);
      if constexpr (EncodesTiles<F>) {
        if (are_floats && row % detail::kTile == 0 && chunk.num_tokens() - i >= detail::kTile &&
            to.in_a_row(pos, detail::kTile)) {
          overflows +=
              F::template encode_tile<Isa>(begin, page, row, k_floats.row(i, 0), k_floats.stride_n,
                                           v_floats.row(i, 0), v_floats.stride_n);
          i += detail::kTile;
          continue;
        }
      }
      overflows += F::template encode<Isa>(begin, page, row, k.row(i, 0), v.row(i, 0));
      ++i;
    }
    step.note_overflows(overflows);
    if (rule.compensation_rows() == 0) return;
    rule.for_each_fold(state, chunk.lengths,
                       [&](const FoldMove& move) { fold<Isa, F>(move, chunk, head, page); });
  }

  /// Rows of held pages beyond the sequence become zeros: their bytes may be another sequence's.
  /// Nobody shares such a page.
  void clear_unwritten_rows(SequenceId id) {
    std::vector<float> zeros;
    const StepChunk chunk{id, {length(id), high_water(id), length(id)}};
    for (int l = 0; l < static_cast<int>(geometry().layers().size()); ++l) {
      const LayerGeometry& layer = geometry().layer(l);
      if (!layer.shape.owns_kv()) continue;
      zeros.resize(static_cast<std::size_t>(std::max(layer.page.k_dim, layer.page.v_dim)), 0.0F);
      for (int h = 0; h < layer.shape.num_kv_heads; ++h) {
        const HeadGeometry& head = geometry().head(l, h);
        const AnyKeepRule& rule = class_of(head).rule;
        const AnyKeepState state = state_of(chunk, head);
        const std::int64_t written = rule.slots_written(state, length(id));
        const std::int64_t entry = rule.slots(state).first_entry + written / layer.page.page_tokens;
        for (const EntryRange held : rule.held(state, length(id), high_water(id))) {
          if (entry < held.first || entry >= held.last) continue;
          visit_format(l, h, [&]<class F>(std::type_identity<F>) {
            for (std::int64_t row = written % layer.page.page_tokens; row < layer.page.page_tokens;
                 ++row) {
              (void)F::template encode<simd::Scalar>(page_of(chunk, head, entry), layer.page,
                                                     static_cast<std::size_t>(row), zeros.data(),
                                                     zeros.data());
            }
          });
        }
      }
    }
  }

  /// Where a step's rows go to other pages, those begin as what the head holds.
  void carry_over(const SlotMap& to, EntryRange held, const StepChunk& chunk,
                  const HeadGeometry& head) const {
    const HeadClass& heads = class_of(head);
    const std::int32_t* entries = table(chunk, head);
    for (std::int64_t i = 0; i < held.count(); ++i) {
      std::memcpy(books_.pool().address(entries[to.first_entry + i]),
                  books_.pool().address(entries[held.first + i]),
                  geometry().pool().page_bytes(heads.page_size));
    }
  }

  /// Makes one compensation row: sums in double, so that they are right for a million rows, and
  /// their means as attention reads them.
  template <class Isa, class F>
  void fold(const FoldMove& move, const StepChunk& chunk, const HeadGeometry& head,
            const PageShape& page) const {
    const Sums to = sums_of(chunk, head, page, move.to);
    const std::int64_t width = page.k_dim + page.v_dim;
    if (!move.from) {
      std::fill_n(to.k_sum, width, 0.0);
    } else if (*move.from != move.to) {
      std::copy_n(sums_of(chunk, head, page, *move.from).k_sum, width, to.k_sum);
    }
    if (move.first_row < move.end_row) {
      F::template add_rows<Isa>(page_of(chunk, head, move.entry), page,
                                static_cast<std::size_t>(move.first_row),
                                static_cast<std::size_t>(move.end_row), to.k_sum, to.v_sum);
    }
    const double share = 1.0 / static_cast<double>(move.count);
    for (std::int64_t d = 0; d < width; ++d) {
      to.k_mean[d] = static_cast<float>(to.k_sum[d] * share);
    }
  }

  Place place_;
  Books books_;
  std::vector<PageCopy> copies_;  // of the fork in progress, never more than kCopiesAtOnce
};

}  // namespace headwise::inline v0
