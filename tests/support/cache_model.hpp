// SPDX-License-Identifier: MIT
/// @file cache_model.hpp
/// A cache as the published rules describe it: every sequence kept whole, visibility by brute
/// force (sight.hpp). Knows no pages, rings or banks; the real cache is compared with it.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/simd/simd.hpp"
#include "support/sight.hpp"

namespace headwise::test {

// Rows -------------------------------------------------------------------------------------------

/// What a token is made of; its rows follow from it, its position and the head.
using Token = std::uint64_t;

constexpr std::uint64_t mixed(std::uint64_t x) {
  x ^= x >> 31;
  x *= 0x7FB5D329728EA185U;
  x ^= x >> 27;
  x *= 0x81DADEF4BC2DD44DU;
  return x ^ (x >> 33);
}

enum class Side : std::uint64_t { kK = 1, kV = 2, kQ = 3 };

/// The row of a token in one head: 24 random bits in [-1, 1), so that every format must round.
inline void fill_row(Token token, std::int64_t pos, int layer, int head, Side side,
                     std::span<float> row) {
  std::uint64_t state =
      mixed(token * 0x9E3779B97F4A7C15U + static_cast<std::uint64_t>(pos)) +
      mixed(static_cast<std::uint64_t>(layer * 1000 + head) * 4 + static_cast<std::uint64_t>(side));
  float* const end = row.data() + row.size();
  for (float* x = row.data(); x != end; ++x) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    *x = static_cast<float>(static_cast<std::int64_t>(state >> 40) - (std::int64_t{1} << 23)) *
         0x1p-23F;
  }
}

inline std::vector<float> row_of(Token token, std::int64_t pos, int layer, int head, Side side,
                                 int dim) {
  std::vector<float> row(static_cast<std::size_t>(dim));
  fill_row(token, pos, layer, head, side, row);
  return row;
}

/// The same as a row format keeps it.
template <class Format>
std::vector<float> stored_row(Token token, std::int64_t pos, int layer, int head, Side side,
                              int dim) {
  const std::vector<float> row = row_of(token, pos, layer, head, side, dim);
  std::vector<float> stored(row.size());
  const PageShape shape{.k_dim = side == Side::kK ? dim : 0, .v_dim = side == Side::kK ? 0 : dim};
  Format::round_row(shape, row.data(), row.data(), stored.data(), stored.data());
  return stored;
}

/// The layer whose K and V a layer reads.
inline int kv_layer(const ModelShape& shape, int layer) {
  return shape.layer(layer).owns_kv() ? layer : shape.layer(layer).kv_layer;
}

// What a cache shows -----------------------------------------------------------------------------

/// A deep copy of what seen() names for one head.
struct SeenCopy {
  std::vector<std::int64_t> positions;
  std::vector<float> rows;  ///< [k_dim] K then [v_dim] V of each
  std::int64_t folded = 0;
  std::vector<float> means;  ///< [k_dim] of K, then [v_dim] of V; empty where nothing is folded
  Window window;

  friend bool operator==(const SeenCopy&, const SeenCopy&) = default;
};

template <class Format>
SeenCopy copy_of(const SeenRows<Format>& seen) {
  const KvView<Format>& view = seen.view;
  SeenCopy copy;
  copy.window = seen.window;
  const auto k_dim = static_cast<std::size_t>(view.shape.k_dim);
  const auto v_dim = static_cast<std::size_t>(view.shape.v_dim);
  copy.rows.resize(static_cast<std::size_t>(view.num_rows()) * (k_dim + v_dim));
  float* to = copy.rows.data();
  for (const KvRun& run : view.runs()) {
    for (std::int64_t i = 0; i < run.count; ++i) {
      const Slot slot = run.first_slot + i;
      const auto row = static_cast<std::size_t>(slot.value % view.shape.page_tokens);
      copy.positions.push_back(run.first_pos.value + i);
      Format::read_row(view.page_of(slot), view.shape, row, to, to + k_dim);
      to += k_dim + v_dim;
    }
  }
  copy.folded = view.compensation.count;
  if (copy.folded != 0) {
    copy.means.assign(view.compensation.k_mean, view.compensation.k_mean + view.shape.k_dim);
    copy.means.insert(copy.means.end(), view.compensation.v_mean,
                      view.compensation.v_mean + view.shape.v_dim);
  }
  return copy;
}

/// What the next step of `num_tokens` tokens would see of a sequence, head by head.
template <class Rows>
std::vector<SeenCopy> seen_by_next(const KvCache<Rows>& cache, SequenceId id, Phase phase,
                                   std::int64_t num_tokens = 1) {
  const std::int64_t length = cache.length(id);
  const StepChunk chunk{id, {length, cache.high_water(id), length + num_tokens}, 0, phase};
  std::vector<SeenCopy> copies;
  const auto& layers = cache.geometry().layers();
  for (std::size_t l = 0; l < layers.size(); ++l) {
    for (int h = 0; h < layers[l].shape.num_kv_heads; ++h) {
      copies.push_back(copy_of(cache.seen(chunk, static_cast<int>(l), h)));
    }
  }
  return copies;
}

// The cache under test, and the model beside it --------------------------------------------------

/// A KvCache and, for each of its sequences, all of its tokens.
template <class Rows>
class ModelledCache {
  using Format = FormatOf<Rows>;

 public:
  struct Sequence {
    std::vector<Token> tokens;
    std::int64_t high_water = 0;
    std::int64_t settled = 0;                       ///< length at the last selection
    std::map<int, std::set<std::int64_t>> dropped;  ///< by selections, of each head of the model

    /// To its first `length` tokens; behind a selection they are those of a checkpoint, of which
    /// none was selected from.
    void cut(std::int64_t length) {
      tokens.resize(static_cast<std::size_t>(length));
      if (length >= settled) return;
      settled = 0;
      dropped.clear();
    }
  };

  ModelledCache(const ModelShape& shape, const HeadPlan& plan, const CacheOptions& options)
      : cache(shape, plan, options), shape_(shape), plan_(plan), options_(options) {}

  KvCache<Rows> cache;
  Step step;
  std::map<SequenceId, Sequence> sequences;

  /// Whether a selection dropped a position of a head, counted layer by layer.
  static bool is_dropped(const Sequence& sequence, int head, std::int64_t pos) {
    const auto found = sequence.dropped.find(head);
    return found != sequence.dropped.end() && found->second.contains(pos);
  }

  const CacheOptions& options() const { return options_; }
  const HeadPlan& plan() const { return plan_; }

  SequenceId add() {
    const std::optional<SequenceId> id = cache.add_sequence();
    EXPECT_TRUE(id.has_value());
    sequences[*id] = {};
    return *id;
  }
  void release(SequenceId id) {
    cache.release(id);
    sequences.erase(id);
  }

  /// Another sequence with the tokens of `id`; nothing where the cache refuses, which says why.
  std::optional<SequenceId> fork(SequenceId id, StepStatus expected = StepStatus::kOk) {
    SequenceId child;
    const StepStatus status = cache.fork(id, child);
    EXPECT_EQ(status, expected);
    if (status != StepStatus::kOk) return std::nullopt;
    EXPECT_FALSE(sequences.contains(child));
    sequences[child] = Sequence(sequences.at(id));
    return child;
  }
  /// Another sequence with the first `length` tokens of `id`.
  std::optional<SequenceId> fork(SequenceId id, std::int64_t length, StepStatus expected) {
    SequenceId child;
    const StepStatus status = cache.fork(id, length, child);
    EXPECT_EQ(status, expected);
    if (status != StepStatus::kOk) return std::nullopt;
    EXPECT_FALSE(sequences.contains(child));
    Sequence past(sequences.at(id));
    // From a checkpoint the child may be rolled back as far as the parent could there.
    EXPECT_GE(cache.high_water(child), length);
    EXPECT_LE(cache.high_water(child), std::min(past.high_water, length + options_.max_rollback));
    past.cut(length);
    past.high_water = cache.high_water(child);
    sequences[child] = std::move(past);
    return child;
  }

  /// A sequence's snapshot, which is as long as was said.
  std::vector<std::byte> snapshot(SequenceId id) {
    std::vector<std::byte> bytes(cache.snapshot_bytes(id) + 1, std::byte{0xA5});
    EXPECT_EQ(cache.snapshot(id, bytes), StepStatus::kOk);
    EXPECT_EQ(bytes.back(), std::byte{0xA5});
    bytes.pop_back();
    return bytes;
  }
  /// The sequence of a snapshot, which was `past`; nothing where the cache refuses.
  std::optional<SequenceId> restore(std::span<const std::byte> bytes, Sequence past,
                                    StepStatus expected = StepStatus::kOk) {
    SequenceId id{-7, 7};
    const StepStatus status = cache.restore(bytes, id);
    EXPECT_EQ(status, expected);
    if (status != StepStatus::kOk) {
      EXPECT_EQ(id, (SequenceId{-7, 7}));
      return std::nullopt;
    }
    EXPECT_FALSE(sequences.contains(id));
    sequences[id] = std::move(past);
    return id;
  }

  StepStatus clear(SequenceId id) {
    const StepStatus status = cache.clear(id);
    if (status == StepStatus::kOk) sequences[id] = {};
    return status;
  }

  /// What a selection that keeps `keeps(head, position)` of every stored row of a selected head
  /// gives the cache; heads are counted layer by layer.
  template <class Keeps>
  KeptPositions selection(SequenceId id, Keeps&& keeps) const {
    const Sequence& sequence = sequences.at(id);
    KeptPositions kept;
    for_each_head([&](int head, int layer, int kv_head) {
      std::vector<std::int32_t> positions;
      if (selects(layer, kv_head)) {
        for (std::int64_t pos = 0; pos < std::ssize(sequence.tokens); ++pos) {
          if (!is_dropped(sequence, head, pos) && keeps(head, pos)) {
            positions.push_back(static_cast<std::int32_t>(pos));
          }
        }
      }
      kept.add_head(positions);
    });
    return kept;
  }
  /// Keeps that alone.
  StepStatus compact(SequenceId id, const KeptPositions& kept, SelectionFault* fault = nullptr) {
    const StepStatus status = cache.compact(id, kept, fault);
    if (status != StepStatus::kOk) return status;
    Sequence& sequence = sequences.at(id);
    bool drops = false;
    for_each_head([&](int head, int layer, int kv_head) {
      if (!selects(layer, kv_head)) return;
      const auto positions = kept.of_head(head);
      const std::set<std::int64_t> stays(positions.begin(), positions.end());
      for (std::int64_t pos = 0; pos < std::ssize(sequence.tokens); ++pos) {
        if (!stays.contains(pos)) drops |= sequence.dropped[head].insert(pos).second;
      }
    });
    if (drops) sequence.settled = std::ssize(sequence.tokens);
    return status;
  }

  /// Opens the member `step` for `tokens[i]` of sequence `ids[i]`.
  StepStatus begin(std::vector<std::pair<SequenceId, std::vector<Token>>> chunks, Phase phase) {
    std::vector<SequenceChunk> counts;
    for (const auto& [id, tokens] : chunks) {
      counts.push_back({id, static_cast<std::int64_t>(tokens.size()), phase});
    }
    open_ = std::move(chunks);
    return cache.begin(step, counts);
  }

  /// Stores the open step's rows of one layer, as attention does after it has read what is seen.
  void append_layer(int layer) {
    const LayerShape& shape = shape_.layer(layer);
    for (std::size_t e = 0; e < open_.size(); ++e) {
      const StepChunk& chunk = step.chunks()[e];
      const std::vector<Token>& tokens = open_[e].second;
      if (tokens.empty()) continue;
      std::vector<float> k(tokens.size() * static_cast<std::size_t>(shape.k_dim));
      std::vector<float> v(tokens.size() * static_cast<std::size_t>(shape.v_dim));
      for (int h = 0; h < shape.num_kv_heads; ++h) {
        for (std::size_t i = 0; i < tokens.size(); ++i) {
          const std::int64_t pos = chunk.lengths.length + static_cast<std::int64_t>(i);
          const auto kd = static_cast<std::size_t>(shape.k_dim);
          const auto vd = static_cast<std::size_t>(shape.v_dim);
          const int kv = kv_layer(shape_, layer);
          fill_row(tokens[i], pos, kv, h, Side::kK, std::span(k).subspan(i * kd, kd));
          fill_row(tokens[i], pos, kv, h, Side::kV, std::span(v).subspan(i * vd, vd));
        }
        cache.template append<simd::BestIsa>(
            step, chunk, layer, h, TensorView<const float>::nhd(k.data(), 1, shape.k_dim),
            TensorView<const float>::nhd(v.data(), 1, shape.v_dim));
        step.note_head_done(layer);
      }
    }
  }
  void append() {
    for (int l = 0; l < shape_.num_layers(); ++l) append_layer(l);
  }

  StepStatus commit() {
    const StepStatus status = cache.commit(step);
    if (status == StepStatus::kOk) {
      for (const auto& [id, tokens] : open_) {
        if (!sequences.contains(id)) continue;  // released meanwhile
        Sequence& sequence = sequences[id];
        sequence.tokens.insert(sequence.tokens.end(), tokens.begin(), tokens.end());
        sequence.high_water =
            std::max(sequence.high_water, static_cast<std::int64_t>(sequence.tokens.size()));
      }
    }
    return status;
  }

  /// begin, append, commit.
  void add_tokens(SequenceId id, std::vector<Token> tokens, Phase phase) {
    ASSERT_EQ(begin({{id, std::move(tokens)}}, phase), StepStatus::kOk);
    append();
    ASSERT_EQ(commit(), StepStatus::kOk);
  }

  StepStatus rollback(SequenceId id, std::int64_t length) {
    const StepStatus status = cache.rollback(id, length);
    if (status == StepStatus::kOk) {
      sequences[id].tokens.resize(static_cast<std::size_t>(length));
      if (length == 0) sequences[id] = {};  // a clear
    }
    return status;
  }

  /// Compares lengths, and for every head what the sequence's next step of `num_tokens` tokens
  /// would see, with the rules: positions, the bits of the rows, the compensation row's mean, and
  /// which query of the step sees which row.
  ::testing::AssertionResult matches(SequenceId id, Phase phase, std::int64_t num_tokens) const {
    const Sequence& sequence = sequences.at(id);
    const auto start = static_cast<std::int64_t>(sequence.tokens.size());
    if (cache.length(id) != start) {
      return ::testing::AssertionFailure() << "length " << cache.length(id) << ", not " << start;
    }
    if (cache.high_water(id) != sequence.high_water) {
      return ::testing::AssertionFailure() << "high water " << cache.high_water(id);
    }
    const std::vector<SeenCopy> copies = seen_by_next(cache, id, phase, num_tokens);
    std::size_t next = 0;
    for (int l = 0; l < shape_.num_layers(); ++l) {
      for (int h = 0; h < shape_.layer(l).num_kv_heads; ++h) {
        std::string fault = fault_in(copies[next], sequence, l, h, static_cast<int>(next), phase,
                                     num_tokens, cache.stored_positions(id, l, h));
        ++next;
        if (!fault.empty()) {
          return ::testing::AssertionFailure() << "layer " << l << ", head " << h << ", step of "
                                               << num_tokens << " at " << start << ": " << fault;
        }
      }
    }
    return ::testing::AssertionSuccess();
  }

  /// All sequences, as seen by decode steps and by prompt chunks.
  ::testing::AssertionResult matches() const {
    for (const auto& [id, sequence] : sequences) {
      for (const Phase phase : {Phase::kDecode, Phase::kPrompt}) {
        if (auto result = matches(id, phase, phase == Phase::kDecode ? 1 : 3); !result) {
          return result;
        }
      }
    }
    return ::testing::AssertionSuccess();
  }

  /// What a cache that never saw anything but the sequence's surviving tokens would show.
  std::vector<SeenCopy> never_seen(SequenceId id, Phase phase) const {
    CacheOptions options = options_;
    options.max_sequences = 1;
    options.max_bytes = 0;
    ModelledCache fresh(shape_, plan_, options);
    const SequenceId only = fresh.add();
    fresh.add_tokens(only, sequences.at(id).tokens, Phase::kPrompt);
    return seen_by_next(fresh.cache, only, phase);
  }

 private:
  bool selects(int layer, int kv_head) const {
    return std::holds_alternative<KeepSelected>(plan_.budget(layer, kv_head));
  }
  template <class Fn>
  void for_each_head(Fn&& fn) const {
    int head = 0;
    for (int l = 0; l < shape_.num_layers(); ++l) {
      for (int h = 0; h < shape_.layer(l).num_kv_heads; ++h) fn(head++, l, h);
    }
  }

  std::string fault_in(SeenCopy seen, const Sequence& sequence, int layer, int head,
                       int head_of_model, Phase phase, std::int64_t num_tokens,
                       const std::vector<std::int32_t>& stored) const {
    const auto start = static_cast<std::int64_t>(sequence.tokens.size());
    const auto how = [&](std::int64_t query, std::int64_t key) {
      return sight(shape_.layer(layer), plan_.budget(layer, head), options_.prefill,
                   options_.page_tokens, phase, start, query, key);
    };
    std::vector<std::int64_t> as_rows;
    std::vector<std::int64_t> folded;
    for (std::int64_t key = 0; key < start; ++key) {
      if (is_dropped(sequence, head_of_model, key)) continue;
      if (how(start, key) == Sight::kAsRow) as_rows.push_back(key);
      if (how(start, key) == Sight::kFolded) folded.push_back(key);
    }
    if (selects(layer, head)) {  // kernels take slots for positions: all older than any query
      if (seen.positions.size() != stored.size()) return "sees other rows than it stores";
      for (std::size_t i = 0; i < stored.size(); ++i) {
        if (seen.positions[i] < stored[i] || seen.positions[i] >= start) return "wrong slots";
      }
      seen.positions.assign(stored.begin(), stored.end());
    }
    if (seen.positions != as_rows) {
      return "sees positions " + text(seen.positions) + ", not " + text(as_rows);
    }
    const std::string rows = fault_in_rows(seen, sequence, layer, head);
    if (!rows.empty()) return rows;
    if (seen.folded != static_cast<std::int64_t>(folded.size())) {
      return "compensation stands for " + std::to_string(seen.folded) + " rows, not " +
             std::to_string(folded.size());
    }
    const std::string mean = fault_in_mean(seen, sequence, folded, layer, head);
    if (!mean.empty()) return mean;

    std::set<std::int64_t> queries{0, 1, 2, num_tokens / 2, num_tokens - 2, num_tokens - 1};
    for (const std::int64_t i : queries) {
      if (i < 0 || i >= num_tokens) continue;
      const std::int64_t query = start + i;
      const auto check = [&](std::int64_t key) {
        return seen.window.sees(Pos{query}, Pos{key}) == (how(query, key) == Sight::kAsRow);
      };
      for (const std::int64_t key : seen.positions) {
        if (!check(key)) return "query " + std::to_string(query) + ", key " + std::to_string(key);
      }
      for (std::int64_t own = start; own < start + num_tokens; ++own) {
        if (!check(own)) return "query " + std::to_string(query) + ", own " + std::to_string(own);
      }
    }
    return "";
  }

  std::string fault_in_rows(const SeenCopy& seen, const Sequence& sequence, int layer,
                            int head) const {
    const float* stored = seen.rows.data();
    for (const std::int64_t pos : seen.positions) {
      const Token token = sequence.tokens[static_cast<std::size_t>(pos)];
      for (const Side side : {Side::kK, Side::kV}) {
        const LayerShape& shape = shape_.layer(layer);
        const int dim = side == Side::kK ? shape.k_dim : shape.v_dim;
        const int kv = kv_layer(shape_, layer);
        for (const float x : stored_row<Format>(token, pos, kv, head, side, dim)) {
          if (!(*stored++ == x)) return "wrong row at position " + std::to_string(pos);
        }
      }
    }
    return "";
  }

  std::string fault_in_mean(const SeenCopy& seen, const Sequence& sequence,
                            const std::vector<std::int64_t>& folded, int layer, int head) const {
    if (folded.empty()) return "";
    const int k_dim = shape_.layer(layer).k_dim;
    std::vector<double> sums(seen.means.size(), 0.0);
    for (const std::int64_t pos : folded) {
      const Token token = sequence.tokens[static_cast<std::size_t>(pos)];
      std::size_t d = 0;
      for (const Side side : {Side::kK, Side::kV}) {
        const int dim = side == Side::kK ? k_dim : shape_.layer(layer).v_dim;
        const int kv = kv_layer(shape_, layer);
        for (const float x : stored_row<Format>(token, pos, kv, head, side, dim)) {
          sums[d++] += static_cast<double>(x);
        }
      }
    }
    const auto count = static_cast<double>(folded.size());
    for (std::size_t d = 0; d < sums.size(); ++d) {
      const auto mean = static_cast<double>(seen.means[d]);
      // Sums are in double; the mean, of values in [-1, 1), is rounded to a float once.
      if (!(std::fabs(mean - sums[d] / count) <= 0x1p-24)) {
        return "compensation mean " + std::to_string(mean) + ", not " +
               std::to_string(sums[d] / count) + " in dimension " + std::to_string(d);
      }
    }
    return "";
  }

  static std::string text(const std::vector<std::int64_t>& numbers) {
    std::string out = "{";
    for (std::size_t i = 0; i < numbers.size();) {  // runs as first-last
      std::size_t end = i + 1;
      while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
      out += (i == 0 ? "" : " ") + std::to_string(numbers[i]);
      if (end > i + 1) out += "-" + std::to_string(numbers[end - 1]);
      i = end;
    }
    return out + "}";
  }

  ModelShape shape_;
  HeadPlan plan_;
  CacheOptions options_;
  std::vector<std::pair<SequenceId, std::vector<Token>>> open_;
};

// Cases ------------------------------------------------------------------------------------------

/// Three layers of unlike widths; the second will have no retrieval head, the third no other.
inline const ModelShape& mixed_shape() {
  static const ModelShape shape({{5, 1, 32, 16}, {5, 1, 16, 16}, {1, 1, 16, 48}});
  return shape;
}

/// Heads of every kind that the prefill mode allows, with small windows around a page of 16.
inline HeadPlan mixed_plan(PrefillMode prefill) {
  HeadPlan plan(mixed_shape());
  plan.set(0, 1, KeepWindow{{4, 12}});
  plan.set(0, 2, KeepWindow{{0, 1}});
  plan.set(0, 3, KeepWindow{{17, 30}});
  plan.set(1, 0, KeepWindow{{3, 33}});
  plan.set(1, 1, KeepWindow{{4, 12}, 29});
  plan.set(1, 2, KeepWindow{{16, 16}});
  plan.set(1, 3, KeepWindowFrom{{{4, 12}, 20}, 70});
  plan.set(0, 4, KeepSelected{20});
  plan.set(1, 4, KeepSelected{});
  if (prefill == PrefillMode::kChunkCausal) {
    plan.set(0, 3, KeepGrowingWindow{4, 40, 3});
    plan.set(1, 2, KeepGrowingWindow{20, 36, 2});
  }
  return plan;
}

inline CacheOptions mixed_options(PrefillMode prefill, std::int64_t max_rollback) {
  CacheOptions options;
  options.page_tokens = 16;
  options.max_sequences = 3;
  options.max_context = 500;
  options.max_rollback = max_rollback;
  options.prefill = prefill;
  return options;
}

/// Pages that a fork at this length copies, from the published rules: those of rings, and those
/// that an append or a permitted rollback may still reach.
inline std::int64_t copied_pages(const HeadPlan& plan, const CacheOptions& options,
                                 std::int64_t length) {
  const std::int64_t size = options.page_tokens;
  const std::int64_t all = (length + size - 1) / size;
  const std::int64_t lowest = std::max<std::int64_t>(0, length - options.max_rollback);
  std::int64_t pages = 0;
  for (const HeadBudget& budget : plan.budgets()) {
    if (const auto* keep = std::get_if<KeepWindow>(&budget)) {
      const std::int64_t rows = keep->window.sink +
                                std::max(keep->window.recent, keep->prompt_recent) +
                                options.max_rollback;
      pages += std::min(all, (rows + size - 1) / size);
    } else {
      pages += all - lowest / size;  // a growing window holds all of these, too
    }
  }
  return pages;
}

/// `count` tokens that no other call has returned.
inline std::vector<Token> new_tokens(std::int64_t count) {
  static Token next = 0;
  std::vector<Token> tokens;
  for (std::int64_t i = 0; i < count; ++i) tokens.push_back(++next);
  return tokens;
}

}  // namespace headwise::test
