// SPDX-License-Identifier: MIT
/// @file export.hpp
/// Tables for kernels of an engine's own: which pages or rows of the cache each head is to read.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <variant>

#include "headwise/cache/kv_cache.hpp"
#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/cache/step.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/phase.hpp"
#include "headwise/core/rounding.hpp"
#include "headwise/core/window.hpp"

namespace headwise::inline v0 {

/// What the entries of an exported list are.
enum class ExportUnit : std::uint8_t {
  kPages,  ///< page numbers in slot order: slot s lies in entry s / page_tokens
  kRows,   ///< rows one by one, as a page size of 1: exactly those that the query sees
};

/// How the lists of the sequences and heads of a step follow each other.
enum class ExportOrder : std::uint8_t {
  kHeadsFirst,      ///< [heads][sequences]
  kSequencesFirst,  ///< [sequences][heads]
};

/// Where the rows that exported entries name lie. Strides and offsets are in elements.
template <RowElement E>
struct ExportedRows {
  const E* pages = nullptr;      ///< page 0 of the pool, an address of the cache's place
  std::int64_t page_stride = 0;  ///< from one page number to the next
  std::int64_t v_offset = 0;     ///< from a page's first K row to its first V row
  std::int64_t k_stride = 0;     ///< from one K row of a page to the next
  std::int64_t v_stride = 0;     ///< from one V row of a page to the next

  /// K of row `row` of page `page`, an entry of a list of pages.
  const E* k(std::int32_t page, std::int64_t row) const {
    return pages + page * page_stride + row * k_stride;
  }
  /// V of it.
  const E* v(std::int32_t page, std::int64_t row) const {
    return pages + v_offset + page * page_stride + row * v_stride;
  }
  /// K of an entry of a list of rows; V lies `v_offset` behind it.
  const E* k(std::int32_t row) const { return pages + row * k_stride; }
  /// V of it.
  const E* v(std::int32_t row) const { return pages + v_offset + row * v_stride; }
};

/// What an export takes.
struct ExportSize {
  std::int64_t num_lists = 0;  ///< sequences x heads
  std::int64_t longest = 0;    ///< entries of the longest list
  std::int64_t total = 0;      ///< entries of all lists
};

/// The slots that a query sees of one head, as two spans: the sinks with what wrapped around behind
/// them, and the rest of the window. The second is empty where the two touch.
struct SlotSpans {
  std::array<std::int32_t, 2> first{};  ///< slots, ascending
  std::array<std::int32_t, 2> count{};  ///< rows
  friend bool operator==(const SlotSpans&, const SlotSpans&) = default;
};

/// Memory for a rectangular table, [num_lists][columns].
struct ExportedTable {
  std::span<std::int32_t> entries;  ///< at least num_lists * columns
  std::int64_t columns = 0;         ///< at least ExportSize::longest; what is left over becomes 0
  std::span<std::int32_t> lengths;  ///< rows of each list, at least num_lists; empty: not wanted
  std::span<SlotSpans> spans;       ///< likewise, pages only
};

/// Memory for lists behind each other.
struct ExportedLists {
  std::span<std::int32_t> indptr;   ///< at least num_lists + 1: where each begins, and the end
  std::span<std::int32_t> entries;  ///< at least ExportSize::total
  /// Rows in the last page of each list (0 of an empty one), at least num_lists; pages only, empty:
  /// not wanted.
  std::span<std::int32_t> last_page_rows;
};

/// The KV heads of a layer, those that keep everything first, either group ascending: for engines
/// that launch a kernel for each of the two groups.
/// @param heads  [num_kv_heads] receives them
/// @return how many keep everything
inline int split_heads(const CacheGeometry& geometry, int layer, std::span<int> heads) {
  const int num_heads = geometry.layer(layer).shape.num_kv_heads;
  HEADWISE_ASSERT(heads.size() >= static_cast<std::size_t>(num_heads), "too few places for heads");
  const auto keeps_everything = [&](int h) {
    const auto class_idx = static_cast<std::size_t>(geometry.head(layer, h).class_idx);
    return geometry.classes()[class_idx].rule.keeps_everything();
  };
  std::size_t num_split = 0;
  for (int h = 0; h < num_heads; ++h) {
    if (keeps_everything(h)) heads[num_split++] = h;
  }
  const auto num_everything = static_cast<int>(num_split);
  for (int h = 0; h < num_heads; ++h) {
    if (!keeps_everything(h)) heads[num_split++] = h;
  }
  return num_everything;
}

/// Tables of some KV heads of one layer for kernels that are not the library's: paged attention
/// with a page size of `page_tokens` (unit kPages) or of 1 (kRows). A list belongs to one sequence
/// of the open step and one KV head, which such a kernel takes for a sequence of its own with one
/// KV head and group_size query heads.
///
/// A list says what the chunk's last query sees once the step's rows are stored, its own row
/// included. Earlier queries of a chunk see, of a head that keeps everything, so many rows fewer;
/// of a streaming head other rows, for which no table has words. A chunk without tokens says what
/// the sequence's newest query saw, so that an empty step exports between steps.
///
/// Whole pages round a window up. `lengths` and `last_page_rows` count every row that a streaming
/// head stores: its sinks and the newest of a whole ring, `rounded_window(i)`. Only a list's last
/// page is partial, and only while the ring is not full. After a rollback behind what the ring has
/// overwritten, some of its rows belong to nobody until the sequence is as long again: the answer
/// is kRolledBack. `spans` and rows (kRows) are exact, always.
///
/// Rows are plain and of f32, f16 or bf16, as foreign kernels read them; a cache of other formats
/// has no exporter, and heads with a compensation row (RazorAttention) and selected heads
/// (KeepSelected) are refused. Nothing here allocates. Cost: the entries.
///
/// @tparam E  elements of the rows
/// @tparam Place  of the cache: lists are made on the host, for pages anywhere.
template <RowElement E, CachePlace Place = HostPlace>
class LayerExporter {
 public:
  using Cache = KvCache<PlainRows<E>, Place>;

  /// @param cache  borrowed
  /// @param heads  KV heads of the layer, in the order of the lists, borrowed; empty: all
  /// @throws ConfigError for a layer or head out of range, a head with a compensation row, a
  ///   selected head, for kPages a KeepWindowFrom head, whose pages have gaps, and for kRows where
  ///   K and V rows differ in width, pages are no whole number of rows apart, or rows are more than
  ///   an int32 can name.
  LayerExporter(const Cache& cache, int layer, ExportUnit unit, std::span<const int> heads = {})
      : cache_(&cache), layer_(layer), unit_(unit), heads_(heads) {
    const CacheGeometry& geometry = cache.geometry();
    detail::checked_range(layer, 0, static_cast<int>(geometry.layers().size()) - 1, "layer");
    const LayerShape& shape = geometry.layer(layer).shape;
    for (const int head : heads) detail::checked_range(head, 0, shape.num_kv_heads - 1, "KV head");
    for (int i = 0; i < num_heads(); ++i) {
      if (rule_of(i).compensation_rows() > 0) {
        fail<ConfigError>("layer ", layer, ", KV head ", head_of(i),
                          ": a compensation row (RazorAttention) is no row of a page table");
      }
      if (rule_of(i).selects()) {
        fail<ConfigError>("layer ", layer, ", KV head ", head_of(i),
                          ": rows of a selected head (KeepSelected) begin where its last selection "
                          "put them, which no list says");
      }
    }
    if (unit == ExportUnit::kRows) check_rows(geometry, shape);
    for (int i = 0; i < num_heads(); ++i) {
      if (unit == ExportUnit::kPages && releases_pages_between(i)) {
        fail<ConfigError>("layer ", layer, ", KV head ", head_of(i),
                          ": pages between its sinks and its window are released once it streams "
                          "(KeepWindowFrom); kRows names the others' rows");
      }
    }
  }

  /// Would outlive the cache.
  LayerExporter(const Cache&& cache, int layer, ExportUnit unit,
                std::span<const int> heads = {}) = delete;

  /// KV heads that are exported.
  int num_heads() const {
    return heads_.empty() ? cache_->geometry().layer(layer_).shape.num_kv_heads
                          : static_cast<int>(heads_.size());
  }

  /// Where entries point.
  ExportedRows<E> rows() const {
    const PageShape& page = page_shape();
    return {reinterpret_cast<const E*>(cache_->place().pages()),
            static_cast<std::int64_t>(cache_->geometry().pool().granule() / sizeof(E)),
            std::int64_t{page.page_tokens} * page.k_dim, page.k_dim, page.v_dim};
  }

  /// What whole pages show of the i-th exported head.
  Window rounded_window(int i) const {
    const SlotMap slots = rule_of(i).slots({});
    return slots.turn == 0 ? Window::everything() : Window{slots.sink, slots.turn};
  }

  /// What the open step's export takes; of another step nothing.
  ExportSize size(const Step& step) const noexcept {
    ExportSize size;
    if (!cache_->is_open(step)) return size;
    for (const StepChunk& chunk : step.chunks()) {
      for (int i = 0; i < num_heads(); ++i) {
        const std::int64_t entries = entries_of(head_rows(chunk, i));
        ++size.num_lists;
        size.longest = std::max(size.longest, entries);
        size.total += entries;
      }
    }
    return size;
  }
  /// What no step's export exceeds: for memory that is reserved once, and captured graphs.
  ExportSize largest() const {
    const CacheOptions& options = cache_->geometry().options();
    ExportSize size;
    for (int i = 0; i < num_heads(); ++i) {
      const std::int64_t longest = options.max_context;
      const std::int64_t entries = unit_ == ExportUnit::kPages
                                       ? rule_of(i).held({}, longest, longest)[0].count()
                                       : std::min(rule_of(i).most_rows() + 1, longest);
      size.num_lists += options.max_sequences;
      size.longest = std::max(size.longest, entries);
      size.total += entries * options.max_sequences;
    }
    return size;
  }

  /// A row of the table for each list: [heads][sequences][columns] or [sequences][heads][columns].
  /// @return kStale for a step that is not open, kTooSmall for memory that is, kRolledBack where
  ///   whole pages cannot be said (with `lengths` only): nothing is written then.
  StepStatus table(const Step& step, ExportOrder order, const ExportedTable& to) const noexcept {
    if (!cache_->is_open(step)) return StepStatus::kStale;
    const ExportSize needed = size(step);
    const auto lists = static_cast<std::size_t>(needed.num_lists);
    if (to.columns < needed.longest ||
        (lists != 0 && to.entries.size() / lists < static_cast<std::size_t>(to.columns)) ||
        (!to.lengths.empty() && to.lengths.size() < lists) ||
        (!to.spans.empty() && (to.spans.size() < lists || unit_ == ExportUnit::kRows))) {
      return StepStatus::kTooSmall;
    }
    if (!to.lengths.empty() && !has_whole_pages(step)) return StepStatus::kRolledBack;
    for_each_list(step, order, [&](std::size_t list, const HeadRows& head) {
      const auto columns = static_cast<std::size_t>(to.columns);
      const std::span<std::int32_t> row = to.entries.subspan(list * columns, columns);
      std::fill(write(head, row.data()), row.data() + row.size(), 0);
      if (!to.lengths.empty()) to.lengths[list] = static_cast<std::int32_t>(length_of(head));
      if (!to.spans.empty()) to.spans[list] = head.spans;
    });
    return StepStatus::kOk;
  }

  /// All lists behind each other, with the places where they begin.
  /// @return as table()
  StepStatus lists(const Step& step, ExportOrder order, const ExportedLists& to) const noexcept {
    if (!cache_->is_open(step)) return StepStatus::kStale;
    const ExportSize needed = size(step);
    const auto lists = static_cast<std::size_t>(needed.num_lists);
    if (to.indptr.size() < lists + 1 ||
        to.entries.size() < static_cast<std::size_t>(needed.total) ||
        needed.total > std::numeric_limits<std::int32_t>::max() ||
        (!to.last_page_rows.empty() &&
         (to.last_page_rows.size() < lists || unit_ == ExportUnit::kRows))) {
      return StepStatus::kTooSmall;
    }
    if (unit_ == ExportUnit::kPages && !has_whole_pages(step)) return StepStatus::kRolledBack;
    std::int32_t* next = to.entries.data();
    for_each_list(step, order, [&](std::size_t list, const HeadRows& head) {
      to.indptr[list] = static_cast<std::int32_t>(next - to.entries.data());
      next = write(head, next);
      if (!to.last_page_rows.empty()) {
        const std::int64_t in_pages = head.stored - 1;
        to.last_page_rows[list] =
            head.stored == 0 ? 0
                             : static_cast<std::int32_t>(in_pages % page_shape().page_tokens + 1);
      }
    });
    to.indptr[lists] = static_cast<std::int32_t>(next - to.entries.data());
    return StepStatus::kOk;
  }

 private:
  /// One head's rows once the step's are stored.
  struct HeadRows {
    const std::int32_t* pages = nullptr;  ///< of slot 0
    std::int64_t stored = 0;              ///< slots in use, from 0
    bool has_dead_rows = false;           ///< some of them belong to tokens rolled back
    SlotSpans spans;                      ///< what the last query sees
  };

  const PageShape& page_shape() const { return cache_->geometry().layer(layer_).page; }
  int head_of(int i) const { return heads_.empty() ? i : heads_[static_cast<std::size_t>(i)]; }
  const AnyKeepRule& rule_of(int i) const {
    const CacheGeometry& geometry = cache_->geometry();
    const int class_idx = geometry.head(layer_, head_of(i)).class_idx;
    return geometry.classes()[static_cast<std::size_t>(class_idx)].rule;
  }

  /// Whether a head whose slots are positions forgets some: then its list of pages has holes.
  bool releases_pages_between(int i) const {
    return rule_of(i).slots({}).turn == 0 && rule_of(i).window(Phase::kDecode).bounded();
  }

  static void check_rows(const CacheGeometry& geometry, const LayerShape& shape) {
    const std::size_t row_bytes = static_cast<std::size_t>(shape.k_dim) * sizeof(E);
    if (shape.k_dim != shape.v_dim) {
      fail<ConfigError>("rows of K and V are named by one index and must be of one width, got ",
                        shape.k_dim, " and ", shape.v_dim);
    }
    if (geometry.pool().granule() % row_bytes != 0) {
      fail<ConfigError>("pages lie at multiples of ", geometry.pool().granule(),
                        " bytes, which is no whole number of rows of ", row_bytes);
    }
    detail::checked_cast<std::int32_t>(geometry.pool_bytes() / row_bytes, "rows of the pool");
  }

  HeadRows head_rows(const StepChunk& chunk, int i) const {
    const std::int64_t next = chunk.lengths.next;
    if (next == 0) return {};
    const HeadGeometry& head = cache_->geometry().head(layer_, head_of(i));
    const auto c = static_cast<std::size_t>(head.class_idx);
    const Books& books = cache_->books();
    const std::int32_t index = chunk.sequence.index;
    const AnyKeepRule& rule = rule_of(i);
    const AnyKeepState after = rule.changes(books.keep_state(index, c), chunk.lengths).next;
    const SlotMap slots = rule.slots(after);
    const std::int64_t own = slots.slot(Pos{next - 1}).value;
    HeadRows rows;
    rows.pages = books.tables().head(index, c, head.idx_in_class) + slots.first_entry;
    const std::int64_t ring = slots.sink + slots.turn;
    rows.stored = slots.turn == 0 ? own + 1 : std::min(next, ring);
    const std::int64_t written = chunk.lengths.next_high_water();
    rows.has_dead_rows = slots.turn != 0 && written > next && written > ring;
    StoredRuns seen = rule.runs(after, next - 1, chunk.phase);
    rows.spans = spans_of({seen.runs[0], seen.runs[1], seen.runs[2], {Slot{own}, {}, 1}});
    return rows;
  }
  /// Runs as spans. A ring's two runs end where the ring does and begin where the sinks end, so
  /// that there are never more than two.
  static SlotSpans spans_of(std::array<KvRun, 4> runs) {
    std::sort(runs.begin(), runs.end(),
              [](const KvRun& a, const KvRun& b) { return a.first_slot < b.first_slot; });
    SlotSpans spans;
    std::size_t last = 0;
    for (const KvRun& run : runs) {
      if (run.count == 0) continue;
      const auto first = static_cast<std::int32_t>(run.first_slot.value);
      if (spans.count[last] != 0 && spans.first[last] + spans.count[last] != first) {
        HEADWISE_ASSERT(last == 0, "more than two spans");
        ++last;
      }
      if (spans.count[last] == 0) spans.first[last] = first;
      spans.count[last] += static_cast<std::int32_t>(run.count);
    }
    return spans;
  }

  std::int64_t entries_of(const HeadRows& head) const {
    return unit_ == ExportUnit::kPages ? ceil_div(head.stored, page_shape().page_tokens)
                                       : length_of(head);
  }
  std::int64_t length_of(const HeadRows& head) const {
    if (unit_ == ExportUnit::kPages) return head.stored;
    return std::int64_t{head.spans.count[0]} + head.spans.count[1];
  }
  bool has_whole_pages(const Step& step) const {
    if (unit_ == ExportUnit::kRows) return true;
    for (const StepChunk& chunk : step.chunks()) {
      for (int i = 0; i < num_heads(); ++i) {
        if (head_rows(chunk, i).has_dead_rows) return false;
      }
    }
    return true;
  }

  /// `fn(list, rows)` in the order of the lists.
  template <class Fn>
  void for_each_list(const Step& step, ExportOrder order, Fn&& fn) const {
    const std::size_t sequences = step.chunks().size();
    const auto heads = static_cast<std::size_t>(num_heads());
    for (std::size_t list = 0; list < sequences * heads; ++list) {
      const bool by_head = order == ExportOrder::kHeadsFirst;
      const std::size_t sequence = by_head ? list % sequences : list / heads;
      const std::size_t head = by_head ? list / sequences : list % heads;
      fn(list, head_rows(step.chunks()[sequence], static_cast<int>(head)));
    }
  }

  /// @return behind the last entry
  std::int32_t* write(const HeadRows& head, std::int32_t* to) const {
    if (unit_ == ExportUnit::kPages) return std::copy_n(head.pages, entries_of(head), to);
    const std::int32_t page_tokens = page_shape().page_tokens;
    const auto rows_apart =
        static_cast<std::int32_t>(cache_->geometry().pool().granule() /
                                  (static_cast<std::size_t>(page_shape().k_dim) * sizeof(E)));
    for (std::size_t s = 0; s < head.spans.count.size(); ++s) {
      for (std::int32_t r = 0; r < head.spans.count[s]; ++r) {
        const std::int32_t slot = head.spans.first[s] + r;
        *to++ = head.pages[slot / page_tokens] * rows_apart + slot % page_tokens;
      }
    }
    return to;
  }

  const Cache* cache_;
  int layer_;
  ExportUnit unit_;
  std::span<const int> heads_;
};

}  // namespace headwise::inline v0
