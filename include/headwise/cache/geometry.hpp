// SPDX-License-Identifier: MIT
/// @file geometry.hpp
/// CacheGeometry: everything about a cache that follows from shape, plan and options alone.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "headwise/cache/keep/keep.hpp"
#include "headwise/cache/options.hpp"
#include "headwise/cache/pages/page_pool.hpp"
#include "headwise/cache/pages/page_tables.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/page_shape.hpp"
#include "headwise/core/phase.hpp"
#include "headwise/core/rounding.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/fingerprint.hpp"
#include "headwise/heads/native_window.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise::inline v0 {

/// Heads with equal budgets, rows of one format and pages of one size behave alike: they are
/// counted, grown and cut together.
struct HeadClass {
  AnyKeepRule rule;            ///< what each of these heads keeps
  int format = 0;              ///< of their rows, in the cache's list
  std::size_t page_size = 0;   ///< of their pages, in the pool's sizes
  std::int64_t num_heads = 0;  ///< in all layers with K and V of their own
  /// Among all heads that are selected from, the class's first; -1: its rule selects none.
  std::int64_t first_selected = -1;
  /// [num_heads] rows that selections are to leave of each head; empty: its rule selects none.
  std::vector<std::int64_t> forecast;

  /// Whether its heads are selected from.
  bool selects() const { return rule.selects(); }
};

/// One KV head: its class and where its data lie among those of its class or sequence. Heads of a
/// layer that shares another's K and V have the places of that one's.
struct HeadGeometry {
  int class_idx = 0;                     ///< in CacheGeometry::classes()
  std::int64_t idx_in_class = 0;         ///< layer by layer
  std::int64_t compensation_offset = 0;  ///< bytes in a sequence's share
};

/// Neighbouring heads of one layer in task order (longest first) that share a class.
struct ClassRun {
  int class_idx = 0;  ///< in CacheGeometry::classes()
  int num_heads = 0;  ///< >= 1
  friend bool operator==(ClassRun, ClassRun) = default;
};

/// One layer: its page geometry, heads and the order in which they are attended.
struct LayerGeometry {
  LayerShape shape;             ///< as the model has it
  PageShape page;               ///< of this layer's rows
  std::int64_t first_head = 0;  ///< index of KV head 0 in heads()
  std::vector<int> task_order;  ///< KV heads, those that keep most first
  std::vector<ClassRun> runs;   ///< classes along task_order
  int kind = 0;  ///< in CacheGeometry::layer_kinds(): what steps' work in this layer depends on
};

/// Geometry of a cache: classes of heads, sizes of pages, tables. Shared by the cache itself and by
/// estimate(), so that the two cannot disagree.
class CacheGeometry {
 public:
  /// Bytes of a page of rows in some format.
  using PageBytes = std::size_t (*)(const PageShape&);

  /// Of a cache of one format.
  /// @param page_bytes  RowFormat::page_bytes of the cache's rows.
  CacheGeometry(const ModelShape& shape, const HeadPlan& plan, const CacheOptions& options,
                PageBytes page_bytes)
      : CacheGeometry(shape, plan, options, std::span<const PageBytes>(&page_bytes, 1)) {}

  /// @param page_bytes  RowFormat::page_bytes of each of the cache's formats.
  /// @throws ConfigError when shape and plan differ, a layer that shares another's K and V has
  ///   other budgets than that one (share_budgets()), a compensation row meets ALiBi, an option is
  ///   out of its range, or sizes pass 64 bits; says both values.
  CacheGeometry(const ModelShape& shape, const HeadPlan& plan, const CacheOptions& options,
                std::span<const PageBytes> page_bytes)
      : options_(checked(options)), fingerprint_(headwise::fingerprint(plan)) {
    check(shape, plan);
    std::vector<ClassKey> known;     // of each class
    std::vector<std::size_t> sizes;  // bytes of pages
    for (int l = 0; l < shape.num_layers(); ++l) {
      add_layer(shape.layer(l), plan, l, page_bytes, known, sizes);
    }
    pool_ = PoolShape(std::move(sizes));
    for (HeadClass& heads : classes_) {
      if (!heads.selects()) continue;
      heads.first_selected = num_selected_heads_;
      num_selected_heads_ += heads.num_heads;
    }
    add_table_levels();
  }

  /// As given, max_chunk within [1, max_context], max_rollback within [0, max_context].
  const CacheOptions& options() const& { return options_; }
  /// The plan's name.
  const Fingerprint& fingerprint() const& { return fingerprint_; }
  /// One for each budget, format and page size that the plan has, in order of appearance.
  const std::vector<HeadClass>& classes() const& { return classes_; }
  /// [num_layers]
  const std::vector<LayerGeometry>& layers() const& { return layers_; }
  /// The first layer of each kind: layers whose group size, widths and runs are equal.
  const std::vector<int>& layer_kinds() const& { return layer_kinds_; }
  /// One layer.
  const LayerGeometry& layer(int layer) const& {
    HEADWISE_ASSERT(layer >= 0 && static_cast<std::size_t>(layer) < layers_.size(),
                    "layer out of range");
    return layers_[static_cast<std::size_t>(layer)];
  }
  /// One head's place.
  const HeadGeometry& head(int l, int kv_head) const& {
    HEADWISE_ASSERT(kv_head >= 0 && kv_head < layer(l).shape.num_kv_heads, "KV head out of range");
    return heads_[static_cast<std::size_t>(layer(l).first_head + kv_head)];
  }
  /// All heads, layer by layer.
  const std::vector<HeadGeometry>& heads() const& { return heads_; }
  const CacheOptions& options() const&& = delete;
  const Fingerprint& fingerprint() const&& = delete;
  const std::vector<HeadClass>& classes() const&& = delete;
  const std::vector<LayerGeometry>& layers() const&& = delete;
  const std::vector<int>& layer_kinds() const&& = delete;
  const LayerGeometry& layer(int layer) const&& = delete;
  const HeadGeometry& head(int l, int kv_head) const&& = delete;
  const std::vector<HeadGeometry>& heads() const&& = delete;

  /// Sizes of pages and of the slabs that they share.
  const PoolShape& pool() const& { return pool_; }
  const PoolShape& pool() const&& = delete;
  /// Bytes of compensation rows of one sequence, all heads together.
  std::size_t compensation_bytes() const { return compensation_bytes_; }
  /// Heads that are selected from, in all layers.
  std::int64_t num_selected_heads() const { return num_selected_heads_; }
  /// KV heads of the layer that has most.
  int max_heads_per_layer() const { return max_heads_per_layer_; }

  /// Stored rows that a step's queries may see of one head of a class, at most, at any length.
  std::int64_t most_rows_seen(int class_idx) const {
    return classes_[static_cast<std::size_t>(class_idx)].rule.most_rows();
  }

  /// Pages of each size that one sequence of `length` tokens holds (`high_water`: the longest it
  /// ever was) which nothing was selected from.
  std::vector<std::int64_t> pages_held(std::int64_t length, std::int64_t high_water) const {
    std::vector<std::int64_t> pages(pool_.num_sizes(), 0);
    for (const HeadClass& heads : classes_) {
      pages[heads.page_size] += heads.num_heads * entries_held(heads, length, high_water);
    }
    return pages;
  }
  /// Their bytes.
  /// @throws ConfigError where they pass 64 bits, which no pool holds.
  std::size_t bytes_held(std::int64_t length, std::int64_t high_water) const {
    return bytes_of([&](const HeadClass& heads) {
      return heads.num_heads * entries_held(heads, length, high_water);
    });
  }
  /// The same once a selection at `length` has left what the budgets forecast.
  std::size_t bytes_selected(std::int64_t length, std::int64_t high_water) const {
    return bytes_of([&](const HeadClass& heads) {
      if (!heads.selects()) return heads.num_heads * entries_held(heads, length, high_water);
      std::int64_t pages = 0;
      heads.rule.visit_selecting({}, [&](const auto& rule, const auto&) {
        for (const std::int64_t tokens : heads.forecast) {
          const std::int64_t count = tokens == 0 ? length : std::min(tokens, length);
          const auto state = rule.after_selection(length, rule.first_after(length, count));
          pages += rule.held(state, length, high_water)[0].count();
        }
      });
      return pages;
    });
  }

  /// Bytes of one head of a class.
  /// @throws ConfigError as bytes_held().
  std::size_t head_bytes_held(const HeadClass& heads, std::int64_t length,
                              std::int64_t high_water) const {
    return detail::checked_mul(static_cast<std::size_t>(entries_held(heads, length, high_water)),
                               pool_.page_bytes(heads.page_size), "bytes of a sequence");
  }

  /// Bytes of pages that one sequence holds while a step between these lengths is open.
  /// @throws ConfigError as bytes_held().
  std::size_t bytes_in_step(const StepLengths& lengths) const {
    std::size_t bytes = bytes_held(lengths.length, lengths.high_water);
    for (const HeadClass& heads : classes_) {
      const std::int64_t taken = heads.rule.changes({}, lengths).take.count();
      const std::size_t of_head = detail::checked_mul(
          static_cast<std::size_t>(taken), pool_.page_bytes(heads.page_size), "bytes of a step");
      bytes = detail::checked_add(bytes,
                                  detail::checked_mul(static_cast<std::size_t>(heads.num_heads),
                                                      of_head, "bytes of a step"),
                                  "bytes of a step");
    }
    return bytes;
  }

  /// Most pages of each size that sequences hold while a step of at most `max_chunk` tokens of each
  /// is open, at any length up to the longest.
  std::vector<std::int64_t> peak_pages(std::int64_t max_chunk,
                                       std::int64_t num_sequences = 1) const {
    return sum_of_heads(num_sequences,
                        [&](const AnyKeepRule& rule) { return rule.peak_entries(max_chunk); });
  }

  /// Checkpoints of one sequence at most: none lies nearer to the one before than
  /// `checkpoint_tokens`, and a step begins where each of them is.
  std::int64_t most_checkpoints() const {
    if (options_.checkpoint_tokens == 0) return 0;
    return (options_.max_context - 1) / options_.checkpoint_tokens;
  }
  /// Whether checkpoints of these options can be counted.
  static bool places_fit(const CacheOptions& options) {
    return options.checkpoint_tokens == 0 ||
           options.max_context / options.checkpoint_tokens < kMostPlaces / options.max_sequences;
  }
  /// Places of sequences: the caller's, then those of their checkpoints.
  std::int64_t num_places() const {
    return detail::checked_mul(std::int64_t{options_.max_sequences}, 1 + most_checkpoints(),
                               "sequences and checkpoints");
  }
  /// Most pages of each size that the checkpoints of sequences hold beside the sequences
  /// themselves: what each of them copied, and once what the sequence has given back since.
  std::vector<std::int64_t> checkpoint_pages(std::int64_t num_sequences = 1) const {
    const std::int64_t count = most_checkpoints();
    return sum_of_heads(num_sequences, [&](const auto& rule) {
      return count == 0 ? 0 : count * rule.fork_entries() + rule.released_entries();
    });
  }
  /// peak_pages() and checkpoint_pages().
  std::vector<std::int64_t> most_pages(std::int64_t max_chunk,
                                       std::int64_t num_sequences = 1) const {
    std::vector<std::int64_t> pages = peak_pages(max_chunk, num_sequences);
    const std::vector<std::int64_t> more = checkpoint_pages(num_sequences);
    for (std::size_t size = 0; size < pages.size(); ++size) {
      pages[size] = detail::checked_add(pages[size], more[size], "pages");
    }
    return pages;
  }

  /// Slabs of a pool in which `max_sequences` sequences may be in a step of `max_chunk` tokens
  /// each, with all their checkpoints.
  std::int64_t slabs_for_steps_of(std::int64_t max_chunk) const {
    return pool_.slabs_for(most_pages(max_chunk, options_.max_sequences));
  }

  /// Slabs of the pool: what the options ask for, or enough for any step over all sequences.
  std::int64_t num_slabs() const {
    if (options_.max_bytes == 0) return slabs_for_steps_of(options_.max_chunk);
    return detail::checked_cast<std::int64_t>(options_.max_bytes / pool_.slab_bytes(),
                                              "slabs of max_bytes");
  }
  /// Bytes of the pool.
  std::size_t pool_bytes() const {
    return detail::checked_mul(static_cast<std::size_t>(num_slabs()), pool_.slab_bytes(),
                               "bytes of all pages");
  }

  /// What the page tables are built for.
  /// @param keeps_log  whether their changes are noted, for a device.
  PageTables::Shape tables(bool keeps_log) const {
    PageTables::Shape shape;
    shape.max_sequences = num_places();
    shape.keeps_log = keeps_log;
    for (const HeadClass& heads : classes_) shape.heads.push_back(heads.num_heads);
    // Tables of the longest context for every sequence, unless that is much more than a pool of
    // this size can fill: then blocks follow the sequences' lengths.
    const std::int64_t all =
        detail::checked_mul(num_places(), levels_.back().num_entries, "page-table entries");
    const std::int64_t by_use = entries_by_use();
    if (all <= by_use) {
      shape.levels = {levels_.back()};
      shape.num_entries = all;
    } else {
      shape.levels = levels_;
      shape.num_entries = by_use;
    }
    return shape;
  }

  /// Bytes of one compensation row: [k_dim + v_dim] sums in double, then as many means in float.
  static constexpr std::size_t compensation_row_bytes(const PageShape& page) {
    return static_cast<std::size_t>(page.k_dim + page.v_dim) * (sizeof(double) + sizeof(float));
  }

 private:
  /// Of sequences and checkpoints, where there are checkpoints: with it all that is computed from
  /// their number fits 64 bits.
  static constexpr std::int64_t kMostPlaces = std::int64_t{1} << 24;
  /// The smallest block of page tables: 64 pages of 64 tokens are a context of 4096.
  static constexpr std::int64_t kFirstLevelPages = 64;
  /// How much longer than the tables of sequences that fill the pool the arena is, where tables
  /// follow use: for forks, which share pages but not tables, and for gaps between blocks.
  static constexpr double kArenaSlack = 8.0;

  /// Bytes of so many pages of each class.
  template <class PagesOf>
  std::size_t bytes_of(PagesOf&& pages_of) const {
    std::size_t bytes = 0;
    for (const HeadClass& heads : classes_) {
      bytes = detail::checked_add(
          bytes,
          detail::checked_mul(static_cast<std::size_t>(pages_of(heads)),
                              pool_.page_bytes(heads.page_size), "bytes of a sequence"),
          "bytes of a sequence");
    }
    return bytes;
  }

  /// Most checkpoints of a sequence whose tables are of this level: they are forks of it, with
  /// tables no longer than its own.
  std::int64_t checkpoints_in(std::size_t level) const {
    if (options_.checkpoint_tokens == 0) return 0;
    const std::int64_t longest = levels_[level].capacity_pages * options_.page_tokens;
    return std::min(longest / options_.checkpoint_tokens, most_checkpoints());
  }

  /// Entries of an arena for as many sequences as the pool can hold. A sequence that needs a block
  /// of some level has outgrown the level before, and so holds a known number of bytes at least.
  std::int64_t entries_by_use() const {
    const std::size_t bytes = pool_bytes();
    const std::int64_t page_tokens = options_.page_tokens;
    double entries_per_byte =
        0.0;  // most of any level, those of the sequence's checkpoints with it
    std::int64_t largest = levels_.front().num_entries;  // blocks beside each other: one moves
    for (std::size_t l = 1; l < levels_.size(); ++l) {
      const std::int64_t longest = levels_[l - 1].capacity_pages * page_tokens + 1;
      const std::int64_t rolled_back = std::max<std::int64_t>(1, longest - options_.max_rollback);
      // A head that streams from a length on has more before it than ever after, and so has one
      // that is selected from.
      const std::size_t held = std::max<std::size_t>(
          1, std::min(bytes_selected(rolled_back, longest),
                      bytes_held(options_.max_context, options_.max_context)));
      if (held > bytes) break;  // no pool of this size has such a sequence
      largest = levels_[l].num_entries + levels_[l - 1].num_entries;
      // Checkpoints are shorter than their sequence: beside it they need no slack of their own.
      const double blocks = kArenaSlack + static_cast<double>(checkpoints_in(l));
      entries_per_byte =
          std::max(entries_per_byte, blocks * static_cast<double>(levels_[l].num_entries) /
                                         static_cast<double>(held));
    }
    const double used = entries_per_byte * static_cast<double>(bytes);
    constexpr double kMost = 0x1p62;  // more than any table has
    const std::int64_t smallest =
        detail::checked_mul(detail::checked_mul(std::int64_t{options_.max_sequences},
                                                1 + checkpoints_in(0), "sequences and checkpoints"),
                            levels_.front().num_entries, "page-table entries");
    return detail::checked_add(smallest,
                               std::max(largest, static_cast<std::int64_t>(std::min(used, kMost))),
                               "page-table entries");
  }

  static CacheOptions checked(CacheOptions options) {
    if (options.page_tokens < 16 || options.page_tokens % 16 != 0) {
      fail<ConfigError>("page_tokens must be a positive multiple of 16, got ", options.page_tokens);
    }
    detail::checked_range(options.max_context, 1, kMaxTokens, "max_context");
    detail::checked_range(options.max_rollback, 0, kMaxTokens, "max_rollback");
    detail::checked_range(options.max_chunk, 0, kMaxTokens, "max_chunk");
    detail::checked_range(options.checkpoint_tokens, 0, kMaxTokens, "checkpoint_tokens");
    if (options.max_sequences < 1) {
      fail<ConfigError>("max_sequences must be at least 1, got ", options.max_sequences);
    }
    if (options.resource == nullptr) fail<ConfigError>("resource must not be null");
    if (options.max_chunk == 0) options.max_chunk = options.max_context;
    options.max_chunk = std::min(options.max_chunk, options.max_context);
    options.max_rollback = std::min(options.max_rollback, options.max_context);
    if (!places_fit(options)) {
      fail<ConfigError>(options.max_sequences, " sequences of ", options.max_context,
                        " tokens have more than ", kMostPlaces,
                        " checkpoints together, one each checkpoint_tokens (",
                        options.checkpoint_tokens, ")");
    }
    return options;
  }

  static void check(const ModelShape& shape, const HeadPlan& plan) {
    if (plan.num_layers() != shape.num_layers()) {
      fail<ConfigError>("the plan has ", plan.num_layers(), " layers, the model ",
                        shape.num_layers());
    }
    for (int l = 0; l < shape.num_layers(); ++l) {
      const LayerShape& layer = shape.layer(l);
      if (plan.num_kv_heads(l) != layer.num_kv_heads) {
        fail<ConfigError>("layer ", l, ": the plan has ", plan.num_kv_heads(l),
                          " KV heads, the model ", layer.num_kv_heads);
      }
      for (int h = 0; !layer.owns_kv() && h < layer.num_kv_heads; ++h) {
        if (plan.budget(l, h) != plan.budget(layer.kv_layer, h)) {
          fail<ConfigError>("layer ", l, ", KV head ", h, ": the budget must be that of layer ",
                            layer.kv_layer, ", whose K and V it reads (share_budgets() sets it)");
        }
      }
    }
  }

  /// Rows that a chunk of either phase may see at `length`.
  static std::int64_t rows_at(const AnyKeepRule& rule, std::int64_t length) {
    return std::max(rule.runs({}, length, Phase::kDecode).num_rows(),
                    rule.runs({}, length, Phase::kPrompt).num_rows());
  }

  /// `entries(rule)` of every head, by size of page.
  template <class Entries>
  std::vector<std::int64_t> sum_of_heads(std::int64_t num_sequences, Entries&& entries) const {
    std::vector<std::int64_t> pages(pool_.num_sizes(), 0);
    for (const HeadClass& heads : classes_) {
      const std::int64_t of_head = entries(heads.rule);
      const std::int64_t num_heads = detail::checked_mul(heads.num_heads, num_sequences, "pages");
      std::int64_t& sum = pages[heads.page_size];
      sum = detail::checked_add(sum, detail::checked_mul(num_heads, of_head, "pages"), "pages");
    }
    return pages;
  }

  static std::int64_t entries_held(const HeadClass& heads, std::int64_t length,
                                   std::int64_t high_water) {
    const auto ranges = heads.rule.held({}, length, high_water);
    return ranges[0].count() + ranges[1].count();
  }

  /// What makes two heads of one class: budget, format, page size, rule of prompt chunks.
  using ClassKey = std::tuple<HeadBudget, int, std::size_t, PrefillMode>;

  /// What a head of a layer keeps. The model's own window matters where the context passes it; its
  /// prompts are windowed, as the model reads them.
  ClassKey class_key(const LayerShape& layer, const HeadBudget& budget, int format,
                     std::size_t page_size) const {
    if (layer.sliding_window == 0 || layer.sliding_window >= options_.max_context) {
      return {budget, format, page_size, options_.prefill};
    }
    return {within_window(budget, layer.sliding_window), format, page_size, PrefillMode::kWindowed};
  }

  int class_of(const ClassKey& key, std::vector<ClassKey>& known) {
    const auto found = std::find(known.begin(), known.end(), key);
    const auto class_idx = static_cast<int>(found - known.begin());
    if (found == known.end()) {
      known.push_back(key);
      const auto& [budget, format, page_size, prefill] = key;
      const KeepLimits limits{options_.page_tokens, options_.max_context, options_.max_rollback,
                              options_.max_chunk, prefill};
      classes_.push_back({AnyKeepRule::make(budget, limits), format, page_size, 0, -1, {}});
    }
    return class_idx;
  }

  /// One more head with K and V of its own.
  void add_head(int class_idx, const PageShape& page) {
    HeadClass& heads = classes_[static_cast<std::size_t>(class_idx)];
    heads_.push_back(
        {class_idx, heads.num_heads++, static_cast<std::int64_t>(compensation_bytes_)});
    const auto rows = static_cast<std::size_t>(heads.rule.compensation_rows());
    compensation_bytes_ = detail::checked_add(
        compensation_bytes_,
        detail::checked_mul(rows, compensation_row_bytes(page), "bytes of compensation rows"),
        "bytes of compensation rows");
  }

  /// The format of a budget's heads.
  int format_of(const HeadBudget& budget, int num_formats) const {
    if (options_.format_of == nullptr) {
      return AnyKeepRule::keeps_everything(budget) ? 0 : num_formats - 1;
    }
    return detail::checked_range(options_.format_of(budget), 0, num_formats - 1,
                                 "format of a head");
  }

  void add_layer(const LayerShape& shape, const HeadPlan& plan, int l,
                 std::span<const PageBytes> page_bytes, std::vector<ClassKey>& known,
                 std::vector<std::size_t>& sizes) {
    LayerGeometry layer{shape,
                        {options_.page_tokens, shape.k_dim, shape.v_dim},
                        static_cast<std::int64_t>(heads_.size()),
                        {},
                        {}};
    max_heads_per_layer_ = std::max(max_heads_per_layer_, shape.num_kv_heads);

    for (int h = 0; h < shape.num_kv_heads; ++h) {
      const HeadBudget& budget = plan.budget(l, h);
      if (shape.owns_kv()) {
        const int format = format_of(budget, static_cast<int>(page_bytes.size()));
        const std::size_t bytes = page_bytes[static_cast<std::size_t>(format)](layer.page);
        const auto found = std::find(sizes.begin(), sizes.end(), bytes);
        const auto page_size = static_cast<std::size_t>(found - sizes.begin());
        if (found == sizes.end()) sizes.push_back(bytes);
        add_head(
            class_of(class_key(shape, AnyKeepRule::class_budget(budget), format, page_size), known),
            layer.page);
      } else {
        heads_.push_back(HeadGeometry(head(shape.kv_layer, h)));
      }
      HeadClass& heads = classes_[static_cast<std::size_t>(heads_.back().class_idx)];
      if (heads.selects() && shape.owns_kv()) {
        heads.forecast.push_back(AnyKeepRule::forecast(budget));
      }
      if (heads.rule.compensation_rows() > 0 && !shape.softmax.alibi_slopes.empty()) {
        fail<ConfigError>("layer ", l, ", KV head ", h,
                          ": a compensation row has no position, and so no place in a layer with "
                          "alibi_slopes");
      }
      if (heads.selects() && !shape.softmax.alibi_slopes.empty()) {
        fail<ConfigError>("layer ", l, ", KV head ", h,
                          ": kernels take slots of selected rows for positions, which a layer with "
                          "alibi_slopes does not allow");
      }
      layer.task_order.push_back(h);
    }
    const auto class_idx_of = [&](int h) {
      return heads_[static_cast<std::size_t>(layer.first_head + h)].class_idx;
    };
    std::vector<std::int64_t> rows_kept;  // [kv_head] at the longest context
    for (int h = 0; h < shape.num_kv_heads; ++h) {
      const HeadClass& heads = classes_[static_cast<std::size_t>(class_idx_of(h))];
      rows_kept.push_back(rows_at(heads.rule, options_.max_context));
    }
    std::sort(layer.task_order.begin(), layer.task_order.end(), [&](int a, int b) {
      return std::tuple(-rows_kept[static_cast<std::size_t>(a)], class_idx_of(a), a) <
             std::tuple(-rows_kept[static_cast<std::size_t>(b)], class_idx_of(b), b);
    });
    for (const int h : layer.task_order) {
      if (layer.runs.empty() || layer.runs.back().class_idx != class_idx_of(h)) {
        layer.runs.push_back({class_idx_of(h), 0});
      }
      ++layer.runs.back().num_heads;
    }
    layer.kind = kind_of(layer);
    if (layer.kind == static_cast<int>(layer_kinds_.size())) layer_kinds_.push_back(l);
    layers_.push_back(std::move(layer));
  }

  /// The kind of a layer that is yet to be added.
  int kind_of(const LayerGeometry& layer) const {
    const auto found = std::find_if(layer_kinds_.begin(), layer_kinds_.end(), [&](int first) {
      const LayerGeometry& other = layers_[static_cast<std::size_t>(first)];
      return other.shape.group_size == layer.shape.group_size && other.page == layer.page &&
             other.runs == layer.runs;
    });
    return static_cast<int>(found - layer_kinds_.begin());
  }

  void add_table_levels() {
    const std::int64_t most = ceil_div(options_.max_context, std::int64_t{options_.page_tokens});
    for (std::int64_t pages = std::min(kFirstLevelPages, most);;
         pages = std::min(2 * pages, most)) {
      TableLevel level;
      level.capacity_pages = pages;
      for (const HeadClass& heads : classes_) {
        level.first.push_back(level.num_entries);
        level.per_head.push_back(heads.rule.table_entries(pages));
        level.num_entries = detail::checked_add(
            level.num_entries,
            detail::checked_mul(heads.num_heads, level.per_head.back(), "page-table entries"),
            "page-table entries");
      }
      levels_.push_back(std::move(level));
      if (pages == most) break;
    }
  }

  CacheOptions options_;
  Fingerprint fingerprint_;
  std::size_t compensation_bytes_ = 0;
  int max_heads_per_layer_ = 0;
  std::int64_t num_selected_heads_ = 0;
  std::vector<HeadClass> classes_;
  std::vector<HeadGeometry> heads_;
  std::vector<LayerGeometry> layers_;
  std::vector<int> layer_kinds_;
  std::vector<TableLevel> levels_;
  PoolShape pool_;
};

}  // namespace headwise::inline v0
