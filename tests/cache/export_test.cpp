// SPDX-License-Identifier: MIT
// What a plain gather reads by the exported tables is what the rules let the query see.
#include "headwise/cache/export.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "headwise/core/rounding.hpp"
#include "support/boundary_lengths.hpp"
#include "support/cache_model.hpp"
#include "support/errors.hpp"

namespace headwise::test {
namespace {

using testing::message_of;

constexpr std::int64_t kRollback = 5;
constexpr float kRoundings = 4.0F;  // of a stored element, that an output may be off by

/// mixed_plan() with a ring wherever a head streams from a length on: that has no list of pages.
HeadPlan mixed_rings(PrefillMode prefill) {
  HeadPlan plan = mixed_plan(prefill);
  for (int l = 0; l < plan.num_layers(); ++l) {
    for (int h = 0; h < plan.num_kv_heads(l); ++h) {
      const HeadBudget budget = plan.budget(l, h);
      if (const auto* from = std::get_if<KeepWindowFrom>(&budget)) plan.set(l, h, from->keep);
      if (std::holds_alternative<KeepSelected>(budget)) plan.set(l, h, KeepEverything{});
    }
  }
  return plan;
}

/// Heads of both kinds, two sequences and a third, in pages of 16 that begin as NaN.
template <class E>
struct Exported {
  using Format = PlainRows<E>;

  std::vector<std::byte> memory = std::vector<std::byte>((std::size_t{2} << 20) + 64);
  CacheOptions options = options_over(memory);
  HeadPlan plan = mixed_rings(PrefillMode::kWindowed);
  ModelledCache<Format> model{mixed_shape(), plan, options};

  static CacheOptions options_over(std::vector<std::byte>& memory) {
    std::fill(memory.begin(), memory.end(), std::byte{0xFF});
    CacheOptions options = mixed_options(PrefillMode::kWindowed, kRollback);
    const auto misaligned = reinterpret_cast<std::uintptr_t>(memory.data()) % 64;
    options.page_memory = std::span(memory).subspan(64 - misaligned, std::size_t{2} << 20);
    options.max_bytes = options.page_memory.size();
    return options;
  }

  /// Opens a step of so many new tokens for each sequence, and stores their rows.
  void open(std::vector<std::pair<SequenceId, std::int64_t>> chunks) {
    std::vector<std::pair<SequenceId, std::vector<Token>>> tokens;
    for (const auto& [id, count] : chunks) {
      tokens.emplace_back(id, new_tokens(count));
      before[id] = model.sequences.at(id).tokens;
      auto& all = after[id] = before[id];
      all.insert(all.end(), tokens.back().second.begin(), tokens.back().second.end());
    }
    ASSERT_EQ(model.begin(std::move(tokens), Phase::kDecode), StepStatus::kOk);
    model.append();
  }

  std::map<SequenceId, std::vector<Token>> before, after;  // of the open step
};

template <class E>
double unit_roundoff() {
  if constexpr (std::is_same_v<E, f32>) return 0x1p-24;
  return std::is_same_v<E, f16> ? 0x1p-11 : 0x1p-8;
}

/// Softmax of q.k over rows [k, v], in double.
std::vector<double> attended(
    const std::vector<float>& q,
    const std::vector<std::pair<std::vector<float>, std::vector<float>>>& rows, std::size_t v_dim) {
  std::vector<double> out(v_dim);
  double sum = 0.0;
  for (const auto& [k, v] : rows) {
    double score = 0.0;
    for (std::size_t d = 0; d < q.size(); ++d)
      score += static_cast<double>(q[d]) * static_cast<double>(k[d]);
    const double weight = std::exp(score);  // of a few units: no maximum is needed
    sum += weight;
    for (std::size_t d = 0; d < v_dim; ++d) out[d] += weight * static_cast<double>(v[d]);
  }
  for (double& x : out) x /= rows.empty() ? 1.0 : sum;
  return out;
}

/// Whether gathered rows (K at .first, V at .second) are the sequence's tokens at `positions`, bit
/// for bit, and attention over them is that over the tokens' own rows.
template <class E>
void expect_rows(const std::vector<std::pair<const E*, const E*>>& gathered,
                 const std::vector<Token>& tokens, const std::vector<std::int64_t>& positions,
                 int layer, int head) {
  using Format = PlainRows<E>;
  const LayerShape& shape = mixed_shape().layer(layer);
  using Row = std::pair<std::vector<float>, std::vector<float>>;
  std::vector<Row> read;
  for (const auto& [k, v] : gathered) {
    Row row;
    for (int d = 0; d < shape.k_dim; ++d) row.first.push_back(to_float(k[d]));
    for (int d = 0; d < shape.v_dim; ++d) row.second.push_back(to_float(v[d]));
    read.push_back(std::move(row));
  }
  std::vector<Row> stored, raw;
  for (const std::int64_t pos : positions) {
    const Token token = tokens[static_cast<std::size_t>(pos)];
    const auto of = [&](Side side, int dim) {
      return std::pair(stored_row<Format>(token, pos, layer, head, side, dim),
                       row_of(token, pos, layer, head, side, dim));
    };
    auto [k, raw_k] = of(Side::kK, shape.k_dim);
    auto [v, raw_v] = of(Side::kV, shape.v_dim);
    stored.emplace_back(std::move(k), std::move(v));
    raw.emplace_back(std::move(raw_k), std::move(raw_v));
  }
  const auto q = row_of(1, 0, layer, head, Side::kQ, shape.k_dim);
  const auto wanted = attended(q, raw, static_cast<std::size_t>(shape.v_dim));
  const auto got = attended(q, read, static_cast<std::size_t>(shape.v_dim));
  for (std::size_t d = 0; d < wanted.size(); ++d) {
    const double bound =
        static_cast<double>(kRoundings) * unit_roundoff<E>() * (1.0 + std::sqrt(32.0));
    ASSERT_TRUE(std::fabs(got[d] - wanted[d]) <= bound) << got[d] << ", not " << wanted[d];
  }
  std::sort(read.begin(), read.end());
  std::sort(stored.begin(), stored.end());
  ASSERT_EQ(read.size(), stored.size());
  ASSERT_TRUE(read == stored) << "other rows";
}

/// Positions that the window shows to the newest of `n` tokens.
std::vector<std::int64_t> positions_in(const Window& window, std::int64_t n) {
  std::vector<std::int64_t> positions;
  for (std::int64_t pos = 0; pos < n; ++pos) {
    if (window.sees(Pos{n - 1}, Pos{pos})) positions.push_back(pos);
  }
  return positions;
}
Window window_of(const HeadBudget& budget) {
  const auto* keep = std::get_if<KeepWindow>(&budget);
  return keep != nullptr ? keep->window : Window::everything();
}

/// Where list (sequence e, exported head i) lies.
std::size_t list_of(ExportOrder order, std::size_t e, std::size_t i, std::size_t sequences,
                    std::size_t heads) {
  return order == ExportOrder::kHeadsFirst ? i * sequences + e : e * heads + i;
}

/// Every form of export of one layer of the open step.
/// @param whole_pages  what `lengths` and page lists are to answer
template <class E>
void expect_exports(const Exported<E>& exported, int layer, std::span<const int> heads,
                    StepStatus whole_pages = StepStatus::kOk) {
  const auto& cache = exported.model.cache;
  const Step& step = exported.model.step;
  const std::size_t sequences = step.chunks().size();
  const LayerExporter<E> pages(cache, layer, ExportUnit::kPages, heads);
  const auto num_heads = static_cast<std::size_t>(pages.num_heads());
  const ExportSize size = pages.size(step);
  ASSERT_EQ(size.num_lists, static_cast<std::int64_t>(sequences * num_heads));
  ASSERT_LE(size.longest, pages.largest().longest);
  ASSERT_LE(size.total, pages.largest().total);
  const ExportedRows<E> rows = pages.rows();
  const int page_tokens = exported.options.page_tokens;

  for (const ExportOrder order : {ExportOrder::kHeadsFirst, ExportOrder::kSequencesFirst}) {
    const auto columns = static_cast<std::size_t>(size.longest) + 2;
    std::vector<std::int32_t> table(sequences * num_heads * columns, -7);
    std::vector<std::int32_t> lengths(sequences * num_heads, -7);
    std::vector<SlotSpans> spans(sequences * num_heads);
    ASSERT_EQ(pages.table(step, order, {table, static_cast<std::int64_t>(columns), lengths, spans}),
              whole_pages);
    if (whole_pages != StepStatus::kOk) {
      ASSERT_EQ(std::count(table.begin(), table.end(), -7), std::ssize(table));
      ASSERT_EQ(pages.table(step, order, {table, static_cast<std::int64_t>(columns), {}, spans}),
                StepStatus::kOk);
    }
    std::vector<std::int32_t> indptr(sequences * num_heads + 1);
    std::vector<std::int32_t> entries(static_cast<std::size_t>(size.total));
    std::vector<std::int32_t> last(sequences * num_heads);
    ASSERT_EQ(pages.lists(step, order, {indptr, entries, last}), whole_pages);

    for (std::size_t e = 0; e < sequences; ++e) {
      const std::vector<Token>& tokens = exported.after.at(step.chunks()[e].sequence);
      const std::int64_t n = std::ssize(tokens);
      for (std::size_t i = 0; i < num_heads; ++i) {
        const int head = heads.empty() ? static_cast<int>(i) : heads[i];
        SCOPED_TRACE(::testing::Message() << "layer " << layer << ", head " << head << ", " << n
                                          << " tokens, list " << e << ", " << i);
        const std::size_t list = list_of(order, e, i, sequences, num_heads);
        const std::int32_t* row = table.data() + list * columns;
        std::vector<std::pair<const E*, const E*>> gathered;
        const auto gather = [&](std::int32_t page, std::int64_t r) {
          gathered.emplace_back(rows.k(page, r), rows.v(page, r));
        };
        const Window window = window_of(exported.plan.budget(layer, head));
        for (std::size_t s = 0; s < 2; ++s) {
          for (std::int32_t r = 0; r < spans[list].count[s]; ++r) {
            const std::int32_t slot = spans[list].first[s] + r;
            gather(row[slot / page_tokens], slot % page_tokens);
          }
        }
        expect_rows(gathered, tokens, positions_in(window, n), layer, head);
        if (whole_pages != StepStatus::kOk) continue;

        const Window rounded = pages.rounded_window(static_cast<int>(i));
        ASSERT_GE(rounded.recent, window.recent);
        ASSERT_EQ(rounded.sink, window.bounded() ? window.sink : 0);
        gathered.clear();
        for (std::int32_t r = 0; r < lengths[list]; ++r)
          gather(row[r / page_tokens], r % page_tokens);
        expect_rows(gathered, tokens, positions_in(rounded, n), layer, head);
        for (auto c = static_cast<std::size_t>(ceil_div(lengths[list], page_tokens)); c < columns;
             ++c) {
          ASSERT_EQ(row[c], 0) << "left over";
        }

        gathered.clear();
        for (std::int32_t p = indptr[list]; p < indptr[list + 1]; ++p) {
          const std::int32_t here = p + 1 < indptr[list + 1] ? page_tokens : last[list];
          for (std::int32_t r = 0; r < here; ++r) gather(entries[static_cast<std::size_t>(p)], r);
        }
        expect_rows(gathered, tokens, positions_in(rounded, n), layer, head);
        ASSERT_TRUE(n != 0 || last[list] == 0);
      }
    }
  }
}

/// The same with a page size of 1.
template <class E>
void expect_row_exports(const Exported<E>& exported, int layer, std::span<const int> heads) {
  const Step& step = exported.model.step;
  const std::size_t sequences = step.chunks().size();
  const LayerExporter<E> exporter(exported.model.cache, layer, ExportUnit::kRows, heads);
  const auto num_heads = static_cast<std::size_t>(exporter.num_heads());
  const ExportSize size = exporter.size(step);
  ASSERT_LE(size.longest, exporter.largest().longest);
  ASSERT_LE(size.total, exporter.largest().total);
  const ExportedRows<E> rows = exporter.rows();
  for (const ExportOrder order : {ExportOrder::kHeadsFirst, ExportOrder::kSequencesFirst}) {
    const auto columns = static_cast<std::size_t>(size.longest);
    std::vector<std::int32_t> table(sequences * num_heads * columns);
    std::vector<std::int32_t> lengths(sequences * num_heads);
    ASSERT_EQ(exporter.table(step, order, {table, size.longest, lengths, {}}), StepStatus::kOk);
    std::vector<std::int32_t> indptr(sequences * num_heads + 1);
    std::vector<std::int32_t> entries(static_cast<std::size_t>(size.total));
    ASSERT_EQ(exporter.lists(step, order, {indptr, entries, {}}), StepStatus::kOk);
    ASSERT_EQ(indptr.back(), size.total);
    for (std::size_t e = 0; e < sequences; ++e) {
      const std::vector<Token>& tokens = exported.after.at(step.chunks()[e].sequence);
      for (std::size_t i = 0; i < num_heads; ++i) {
        const int head = heads.empty() ? static_cast<int>(i) : heads[i];
        const std::size_t list = list_of(order, e, i, sequences, num_heads);
        const auto length = static_cast<std::size_t>(lengths[list]);
        const auto listed = std::span(table).subspan(list * columns, length);
        std::vector<std::pair<const E*, const E*>> gathered;
        for (const std::int32_t r : listed) gathered.emplace_back(rows.k(r), rows.v(r));
        const Window window = window_of(exported.plan.budget(layer, head));
        expect_rows(gathered, tokens, positions_in(window, std::ssize(tokens)), layer, head);
        ASSERT_EQ(indptr[list + 1] - indptr[list], lengths[list]);
        ASSERT_TRUE(std::equal(listed.begin(), listed.end(), entries.begin() + indptr[list]));
      }
    }
  }
}

template <class E>
class ExportTest : public ::testing::Test {};
using Elements = ::testing::Types<f32, f16, bf16>;
TYPED_TEST_SUITE(ExportTest, Elements);

TYPED_TEST(ExportTest, AGatherReadsWhatTheRulesShow) {
  const std::vector<int> two{3, 1};
  for (const std::int64_t n : boundary_lengths(17, 30, 64, 16)) {
    if (n == 0 || n + 8 > 500) continue;
    Exported<TypeParam> exported;
    const SequenceId a = exported.model.add();
    const SequenceId b = exported.model.add();
    const SequenceId empty = exported.model.add();
    if (n > 1) exported.model.add_tokens(a, new_tokens(n - 1), Phase::kPrompt);
    exported.model.add_tokens(b, new_tokens(n / 2 + 1), Phase::kPrompt);
    exported.open({{b, 1}, {empty, 0}, {a, 1}});
    for (const int layer : {0, 1, 2}) expect_exports<TypeParam>(exported, layer, {});
    expect_exports<TypeParam>(exported, 0, two);
    expect_row_exports<TypeParam>(exported, 1, {});
    ASSERT_EQ(exported.model.commit(), StepStatus::kOk);
    // Between steps: what the newest query saw; and a step of unequal chunks.
    exported.open({{a, 0}, {b, 0}});
    expect_exports<TypeParam>(exported, 0, {});
    exported.open({{a, 3}, {b, 7}, {empty, 2}});
    for (const int layer : {0, 1, 2}) expect_exports<TypeParam>(exported, layer, {});
    expect_row_exports<TypeParam>(exported, 1, {});
  }
}

TYPED_TEST(ExportTest, ALongChunksRowsAreThoseOfTheSecondRing) {
  Exported<TypeParam> exported;
  const SequenceId a = exported.model.add();
  exported.model.add_tokens(a, new_tokens(150), Phase::kPrompt);
  exported.open({{a, 60}});
  for (const int layer : {0, 1, 2}) expect_exports<TypeParam>(exported, layer, {});
  expect_row_exports<TypeParam>(exported, 1, {});
}

TYPED_TEST(ExportTest, AfterARollbackRowsAndSpansAreExactAndWholePagesWaitOrSaySo) {
  Exported<TypeParam> exported;
  const SequenceId a = exported.model.add();
  exported.model.add_tokens(a, new_tokens(100), Phase::kPrompt);
  ASSERT_EQ(exported.model.rollback(a, 97), StepStatus::kOk);
  for (int i = 0; i < 4; ++i) {
    exported.open({{a, 1}});
    const bool is_dead = 97 + i + 1 < 100;
    expect_row_exports<TypeParam>(exported, 1, {});
    expect_exports<TypeParam>(exported, 1, {}, is_dead ? StepStatus::kRolledBack : StepStatus::kOk);
    expect_exports<TypeParam>(exported, 2, {});  // keeps everything
    ASSERT_EQ(exported.model.commit(), StepStatus::kOk);
  }
  // A ring that was never full has no such rows.
  const SequenceId b = exported.model.add();
  exported.model.add_tokens(b, new_tokens(14), Phase::kPrompt);
  ASSERT_EQ(exported.model.rollback(b, 10), StepStatus::kOk);
  exported.open({{b, 1}});
  expect_exports<TypeParam>(exported, 0, {});
}

TEST(Export, SplitsHeadsIntoTwoGroupsWhoseListsAreThoseOfAll) {
  Exported<f16> exported;
  std::vector<int> heads(5);
  ASSERT_EQ(split_heads(exported.model.cache.geometry(), 0, heads), 2);
  EXPECT_EQ(heads, (std::vector<int>{0, 4, 1, 2, 3}));
  HeadPlan plan(mixed_shape());
  plan.set(0, 0, KeepWindow{{4, 12}});
  plan.set(0, 2, KeepWindow{{4, 12}});
  const KvCache<PlainRows<f16>> other(mixed_shape(), plan,
                                      mixed_options(PrefillMode::kWindowed, 0));
  ASSERT_EQ(split_heads(other.geometry(), 0, heads), 3);
  EXPECT_EQ(heads, (std::vector<int>{1, 3, 4, 0, 2}));
  ASSERT_EQ(split_heads(other.geometry(), 2, heads), 1);
}

TEST(Export, SaysHowFarWholePagesRoundAWindowUp) {
  const Exported<f16> exported;
  const LayerExporter<f16> exporter(exported.model.cache, 0, ExportUnit::kPages);
  EXPECT_EQ(exporter.rounded_window(0), Window::everything());
  EXPECT_EQ(exporter.rounded_window(1), (Window{4, 28}));   // 4 + 12 + 5 in 32 rows
  EXPECT_EQ(exporter.rounded_window(2), (Window{0, 16}));   // 1 + 5 in 16
  EXPECT_EQ(exporter.rounded_window(3), (Window{17, 47}));  // 17 + 30 + 5 in 64
}

TEST(Export, RefusesWhatNoTableCanSay) {
  const HeadPlan razor = mixed_rings(PrefillMode::kChunkCausal);
  const KvCache<PlainRows<f16>> cache(mixed_shape(), razor,
                                      mixed_options(PrefillMode::kChunkCausal, 0));
  const auto refused = [&](int layer, ExportUnit unit, std::vector<int> heads) {
    return message_of<ConfigError>([&] { (void)LayerExporter<f16>(cache, layer, unit, heads); });
  };
  EXPECT_EQ(refused(0, ExportUnit::kPages, {}),
            "layer 0, KV head 3: a compensation row (RazorAttention) is no row of a page table");
  EXPECT_NO_THROW((void)LayerExporter<f16>(cache, 0, ExportUnit::kPages, std::vector<int>{0, 1}));
  EXPECT_EQ(refused(2, ExportUnit::kRows, {}),
            "rows of K and V are named by one index and must be of one width, got 16 and 48");
  EXPECT_EQ(refused(3, ExportUnit::kPages, {}), "layer must be in [0, 2], got 3");
  EXPECT_EQ(refused(-1, ExportUnit::kPages, {}), "layer must be in [0, 2], got -1");
  EXPECT_EQ(refused(1, ExportUnit::kPages, {5}), "KV head must be in [0, 4], got 5");
  EXPECT_EQ(refused(1, ExportUnit::kPages, {0, -1}), "KV head must be in [0, 4], got -1");
}

TEST(Export, RefusesSelectedHeads) {
  const ModelShape shape = ModelShape::uniform(1, 2, 2, 16);
  HeadPlan plan(shape);
  plan.set(0, 1, KeepSelected{});
  const KvCache<PlainRows<f16>> cache(shape, plan, {.max_context = 100});
  for (const ExportUnit unit : {ExportUnit::kPages, ExportUnit::kRows}) {
    EXPECT_EQ(message_of<ConfigError>([&] { (void)LayerExporter<f16>(cache, 0, unit); }),
              "layer 0, KV head 1: rows of a selected head (KeepSelected) begin where its last "
              "selection put them, which no list says");
  }
}

TEST(Export, RowsAreExactWhereAHeadStreamsFromALengthOn) {
  // Heads whose pages between the sinks and the window are gone.
  const ModelShape shape({{2, 1, 16, 16}});
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindowFrom{{{4, 20}}, 50});
  CacheOptions options = mixed_options(PrefillMode::kWindowed, 3);
  ModelledCache<PlainRows<f16>> model(shape, plan, options);
  const SequenceId id = model.add();
  for (const std::int64_t n : {30, 18, 1, 1, 1, 1, 100, 1, 1}) {
    ASSERT_EQ(model.begin({{id, new_tokens(n)}}, Phase::kDecode), StepStatus::kOk);
    model.append();
    const LayerExporter<f16> exporter(model.cache, 0, ExportUnit::kRows);
    const ExportSize size = exporter.size(model.step);
    ASSERT_LE(size.longest, exporter.largest().longest);
    std::vector<std::int32_t> indptr(3), entries(static_cast<std::size_t>(size.total));
    ASSERT_EQ(exporter.lists(model.step, ExportOrder::kHeadsFirst, {indptr, entries, {}}),
              StepStatus::kOk);
    ASSERT_EQ(model.commit(), StepStatus::kOk);
    const std::vector<Token>& tokens = model.sequences.at(id).tokens;
    const auto total = std::ssize(tokens);
    std::vector<std::int64_t> seen;  // by the newest token
    for (std::int64_t pos = 0; pos < total; ++pos) {
      if (total - 1 < 50 || pos < 4 || total - 1 - pos < 20) seen.push_back(pos);
    }
    ASSERT_EQ(indptr[1], total);
    ASSERT_EQ(indptr[2] - indptr[1], std::ssize(seen));
    for (std::size_t i = 0; i < seen.size(); ++i) {
      const std::int32_t row = entries[static_cast<std::size_t>(indptr[1]) + i];
      const auto pos = seen[i];
      const Token token = tokens[static_cast<std::size_t>(pos)];
      ASSERT_EQ(to_float(exporter.rows().k(row)[0]),
                stored_row<PlainRows<f16>>(token, pos, 0, 1, Side::kK, 16)[0]);
      ASSERT_EQ(to_float(exporter.rows().v(row)[15]),
                stored_row<PlainRows<f16>>(token, pos, 0, 1, Side::kV, 16)[15]);
    }
  }
  EXPECT_EQ(message_of<ConfigError>(
                [&] { (void)LayerExporter<f16>(model.cache, 0, ExportUnit::kPages); }),
            "layer 0, KV head 1: pages between its sinks and its window are released once it "
            "streams (KeepWindowFrom); kRows names the others' rows");
  EXPECT_NO_THROW(
      (void)LayerExporter<f16>(model.cache, 0, ExportUnit::kPages, std::vector<int>{0}));
}

TEST(Export, PagesThatAreNoWholeRowsApartHaveNoRowNumbers) {
  // Pages of 16 x (48 + 48) and 16 x (16 + 48) rows of two bytes: 1024 bytes apart, rows of 96.
  const ModelShape shape({{1, 1, 48, 48}, {1, 1, 16, 48}});
  const KvCache<PlainRows<f16>> cache(shape, HeadPlan(shape),
                                      mixed_options(PrefillMode::kWindowed, 0));
  EXPECT_EQ(message_of<ConfigError>([&] { (void)LayerExporter<f16>(cache, 0, ExportUnit::kRows); }),
            "pages lie at multiples of 1024 bytes, which is no whole number of rows of 96");
}

TEST(Export, AnswersTooSmallMemoryAndStaleStepsAndWritesNothing) {
  Exported<f16> exported;
  const SequenceId a = exported.model.add();
  exported.model.add_tokens(a, new_tokens(40), Phase::kPrompt);
  exported.open({{a, 1}});
  Step& step = exported.model.step;
  const std::vector<int> three{0, 1, 2};
  const LayerExporter<f16> exporter(exported.model.cache, 1, ExportUnit::kPages, three);
  const ExportSize size = exporter.size(step);
  ASSERT_EQ(size.num_lists, 3);
  ASSERT_EQ(size.longest, 3);
  std::vector<std::int32_t> entries(9, -7), few(8, -7), lengths(3, -7), two(2, -7), indptr(4, -7);
  std::vector<SlotSpans> spans(3), two_spans(2);
  const auto table = [&](ExportedTable to) {
    return exporter.table(step, ExportOrder::kHeadsFirst, to);
  };
  EXPECT_EQ(table({few, 3, lengths, spans}), StepStatus::kTooSmall);
  EXPECT_EQ(table({entries, 2, lengths, spans}), StepStatus::kTooSmall);
  EXPECT_EQ(table({entries, 4, lengths, spans}), StepStatus::kTooSmall);
  EXPECT_EQ(table({entries, -1, lengths, spans}), StepStatus::kTooSmall);
  EXPECT_EQ(table({entries, 3, two, spans}), StepStatus::kTooSmall);
  EXPECT_EQ(table({entries, 3, lengths, two_spans}), StepStatus::kTooSmall);
  const auto lists = [&](ExportedLists to) {
    return exporter.lists(step, ExportOrder::kHeadsFirst, to);
  };
  ASSERT_EQ(size.total, 9);
  EXPECT_EQ(lists({lengths, entries, lengths}), StepStatus::kTooSmall);
  EXPECT_EQ(lists({indptr, few, lengths}), StepStatus::kTooSmall);
  EXPECT_EQ(lists({indptr, entries, two}), StepStatus::kTooSmall);
  const LayerExporter<f16> rows(exported.model.cache, 1, ExportUnit::kRows, three);
  std::vector<std::int32_t> many(1000, -7);
  EXPECT_EQ(rows.table(step, ExportOrder::kHeadsFirst, {many, 50, lengths, spans}),
            StepStatus::kTooSmall)
      << "rows have no spans";
  EXPECT_EQ(rows.lists(step, ExportOrder::kHeadsFirst, {indptr, many, lengths}),
            StepStatus::kTooSmall)
      << "nor last pages";
  ASSERT_EQ(exported.model.commit(), StepStatus::kOk);
  EXPECT_EQ(table({entries, 3, lengths, spans}), StepStatus::kStale);
  EXPECT_EQ(lists({indptr, entries, lengths}), StepStatus::kStale);
  EXPECT_EQ(exporter.size(step).num_lists, 0);
  for (const auto& untouched : {entries, few, lengths, two, indptr, many}) {
    EXPECT_EQ(std::count(untouched.begin(), untouched.end(), -7), std::ssize(untouched));
  }
}

}  // namespace
}  // namespace headwise::test
