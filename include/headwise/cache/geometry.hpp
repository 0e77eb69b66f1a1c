// SPDX-License-Identifier: MIT
/// @file geometry.hpp
/// CacheGeometry: everything about a cache that follows from shape, plan and options alone.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <variant>
#include <vector>

#include "headwise/cache/head_store.hpp"
#include "headwise/cache/options.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/page_shape.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise::inline v0 {

/// Heads with equal budgets behave alike: they are counted, grown and cut together.
struct HeadClass {
  HeadStore store;             ///< how each of these heads lays its rows into pages
  std::int64_t num_heads = 0;  ///< in all layers
};

/// Floats of a compensation row an element: a sum in double, and the mean that attention reads.
inline constexpr std::int64_t kCompensationFloats = 3;

/// One KV head: its class and where its metadata lie in a sequence's share.
struct HeadPlace {
  int class_idx = 0;                     ///< in CacheGeometry::classes()
  std::int64_t table_offset = 0;         ///< int32 entries
  std::int64_t compensation_offset = 0;  ///< floats
};

/// Neighbouring heads of one layer in task order (longest first) that share a class.
struct ClassRun {
  int class_idx = 0;  ///< in CacheGeometry::classes()
  int num_heads = 0;  ///< >= 1
};

/// One layer: its page geometry, heads and the order in which they are attended.
struct LayerPlace {
  LayerShape shape;  ///< as the model has it
  PageShape page;    ///< of this layer's rows; the pool's pages are those of the widest layer
  std::int64_t first_head = 0;  ///< index of KV head 0 in heads()
  std::vector<int> task_order;  ///< KV heads, those that keep most first
  std::vector<ClassRun> runs;   ///< classes along task_order
};

/// Geometry of a cache: classes of heads, page size, table strides. Shared by the cache itself and
/// by estimate(), so that the two cannot disagree.
class CacheGeometry {
 public:
  /// Tokens of a sequence: no count of rows or pages of one comes near the end of 64 bits.
  static constexpr std::int64_t kLongestContext = std::int64_t{1} << 40;

  /// @param bytes_of  page bytes of the row format (cache/rows/format.hpp)
  /// @throws ConfigError when shape and plan differ, or an option is out of its range.
  CacheGeometry(const ModelShape& shape, const HeadPlan& plan, const CacheOptions& options,
                std::size_t (*bytes_of)(const PageShape&))
      : options_(options), bytes_of_(bytes_of) {
    check(shape, plan);
    std::vector<HeadBudget> budgets;  // budgets[c]: what the heads of class c keep
    for (int l = 0; l < shape.num_layers(); ++l) add_layer(shape.layer(l), plan, l, budgets);
  }

  /// As given.
  const CacheOptions& options() const { return options_; }
  /// One for each budget that the plan has, in order of appearance.
  const std::vector<HeadClass>& classes() const { return classes_; }
  /// [num_layers]
  const std::vector<LayerPlace>& layers() const { return layers_; }
  /// One head's place.
  const HeadPlace& head(int layer, int kv_head) const {
    return heads_[static_cast<std::size_t>(layers_[static_cast<std::size_t>(layer)].first_head +
                                           kv_head)];
  }
  /// All heads, layer by layer.
  const std::vector<HeadPlace>& heads() const { return heads_; }

  /// Bytes of a page: `page_tokens` rows of the widest layer, rounded up to a cache line.
  std::size_t page_bytes() const { return page_bytes_; }
  /// Page-table entries (int32) of one sequence, all heads together.
  std::int64_t entries_per_sequence() const { return entries_; }
  /// Floats of compensation rows of one sequence, all heads together.
  std::int64_t compensation_floats_per_sequence() const { return compensation_floats_; }
  /// KV heads of the layer that has most.
  int max_heads_per_layer() const { return max_heads_per_layer_; }

  /// Pages that one sequence of `length` tokens holds (`high_water`: the longest it ever was).
  std::int64_t pages_held(std::int64_t length, std::int64_t high_water) const {
    std::int64_t pages = 0;
    for (const HeadClass& heads : classes_) {
      const auto ranges = std::visit(
          [&](const auto& store) { return store.held(length, high_water, 0); }, heads.store);
      pages += heads.num_heads * (ranges[0].count() + ranges[1].count());
    }
    return pages;
  }

  /// Most pages that one sequence holds while a step of at most `max_chunk` tokens is open, at any
  /// length up to the longest.
  std::int64_t peak_pages(std::int64_t max_chunk) const {
    const std::int64_t context = options_.max_context;
    std::int64_t pages = 0;
    for (const HeadClass& heads : classes_) {
      std::int64_t peak = ceil_div(context, options_.page_tokens);
      if (const auto* ring = std::get_if<StreamingStore>(&heads.store)) {
        const bool may_switch = context > ring->ring.rows && max_chunk > 1;
        peak = ring->pages_per_bank() * (may_switch ? 2 : 1);
      } else if (const auto* folding = std::get_if<FoldingStore>(&heads.store)) {
        // Behind the sinks lie the buffer, what rollback may reach, the chunk, and two ragged ends.
        const std::int64_t tokens =
            folding->budget.recent(context) + options_.max_rollback + max_chunk;
        peak = std::min(peak, folding->sink_pages() + ceil_div(tokens, options_.page_tokens) + 2);
      }
      pages += heads.num_heads * peak;
    }
    return pages;
  }

  /// Pages in the pool: what the options ask for, or enough for any step over all sequences.
  std::int64_t num_pages() const {
    if (options_.max_bytes != 0) return static_cast<std::int64_t>(options_.max_bytes / page_bytes_);
    return options_.max_sequences * peak_pages(options_.max_context);
  }

 private:
  void check(const ModelShape& shape, const HeadPlan& plan) const {
    if (plan.num_layers() != shape.num_layers()) {
      fail<ConfigError>("the plan has ", plan.num_layers(), " layers, the model ",
                        shape.num_layers());
    }
    for (int l = 0; l < shape.num_layers(); ++l) {
      if (plan.num_kv_heads(l) != shape.layer(l).num_kv_heads) {
        fail<ConfigError>("layer ", l, ": the plan has ", plan.num_kv_heads(l),
                          " KV heads, the model ", shape.layer(l).num_kv_heads);
      }
    }
    if (options_.page_tokens < 16 || options_.page_tokens % 16 != 0) {
      fail<ConfigError>("page_tokens must be a positive multiple of 16, got ",
                        options_.page_tokens);
    }
    if (options_.max_context < 1) {
      fail<ConfigError>("max_context must be at least 1, got ", options_.max_context);
    }
    if (options_.max_context > kLongestContext) {
      fail<ConfigError>("max_context must be at most 2^40, got ", options_.max_context);
    }
    if (options_.max_sequences < 1) {
      fail<ConfigError>("max_sequences must be at least 1, got ", options_.max_sequences);
    }
    if (options_.max_rollback < 0) {
      fail<ConfigError>("max_rollback must be at least 0, got ", options_.max_rollback);
    }
    if (options_.max_rollback > kLongestContext) {
      fail<ConfigError>("max_rollback must be at most 2^40, got ", options_.max_rollback);
    }
    for (const HeadBudget& budget : plan.budgets()) {
      if (std::holds_alternative<KeepGrowingWindow>(budget) &&
          options_.prefill == PrefillMode::kWindowed) {
        fail<ConfigError>(
            "a growing window (RazorAttention) prefills chunk_causal only: set "
            "CacheOptions::prefill to kChunkCausal");
      }
    }
  }

  int class_of(const HeadBudget& budget, std::vector<HeadBudget>& budgets) {
    const auto found = std::find(budgets.begin(), budgets.end(), budget);
    if (found != budgets.end()) return static_cast<int>(found - budgets.begin());
    budgets.push_back(budget);
    classes_.push_back({make_store(budget, options_), 0});
    return static_cast<int>(budgets.size()) - 1;
  }

  void add_layer(const LayerShape& shape, const HeadPlan& plan, int l,
                 std::vector<HeadBudget>& budgets) {
    LayerPlace layer{shape,
                     {options_.page_tokens, shape.k_dim, shape.v_dim},
                     static_cast<std::int64_t>(heads_.size()),
                     {},
                     {}};
    page_bytes_ = std::max(page_bytes_, bytes_of_(layer.page));
    max_heads_per_layer_ = std::max(max_heads_per_layer_, shape.num_kv_heads);

    for (int h = 0; h < shape.num_kv_heads; ++h) {
      const int class_idx = class_of(plan.budget(l, h), budgets);
      HeadClass& heads = classes_[static_cast<std::size_t>(class_idx)];
      ++heads.num_heads;
      heads_.push_back({class_idx, entries_, compensation_floats_});
      std::visit(
          [&](const auto& store) {
            entries_ += store.table_entries();
            compensation_floats_ +=
                store.compensation_rows() * kCompensationFloats * (shape.k_dim + shape.v_dim);
          },
          heads.store);
      layer.task_order.push_back(h);
    }
    const auto rows_kept = [&](int h) {
      const int class_idx = heads_[static_cast<std::size_t>(layer.first_head + h)].class_idx;
      return std::visit(
          [&](const auto& store) { return store.runs(options_.max_context).num_rows(); },
          classes_[static_cast<std::size_t>(class_idx)].store);
    };
    std::sort(layer.task_order.begin(), layer.task_order.end(), [&](int a, int b) {
      return std::pair(-rows_kept(a), a) < std::pair(-rows_kept(b), b);
    });
    for (const int h : layer.task_order) {
      const int class_idx = heads_[static_cast<std::size_t>(layer.first_head + h)].class_idx;
      if (layer.runs.empty() || layer.runs.back().class_idx != class_idx) {
        layer.runs.push_back({class_idx, 0});
      }
      ++layer.runs.back().num_heads;
    }
    layers_.push_back(std::move(layer));
  }

  CacheOptions options_;
  std::size_t (*bytes_of_)(const PageShape&);
  std::size_t page_bytes_ = 0;
  std::int64_t entries_ = 0;
  std::int64_t compensation_floats_ = 0;
  int max_heads_per_layer_ = 0;
  std::vector<HeadClass> classes_;
  std::vector<HeadPlace> heads_;
  std::vector<LayerPlace> layers_;
};

}  // namespace headwise::inline v0
