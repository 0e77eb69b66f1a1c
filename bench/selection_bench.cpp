// SPDX-License-Identifier: MIT
// Run-time selection: what scoring, compaction and decode over selected rows cost, each beside what
// it is measured by, in turns in one process.
#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "headwise/attention/attend.hpp"
#include "headwise/attention/query_window.hpp"
#include "headwise/attention/stored_rows.hpp"
#include "headwise/heads/select_tokens.hpp"
#include "headwise/policies/snap_kv.hpp"
#include "support/attention_setup.hpp"
#include "support/ceilings.hpp"

namespace {

using namespace headwise;
using bench::kHeadDim;
using bench::random_floats;
using bench::seconds_of;

/// A KV cache of one layer and one sequence, its heads all of one budget.
template <class Row>
struct Layer {
  Layer(int heads, int group, const HeadBudget& budget, std::int64_t tokens, std::int64_t context)
      : shape(ModelShape::uniform(1, heads * group, heads, kHeadDim)),
        cache(shape, plan_of(shape, budget), {.max_context = context}),
        id(*cache.add_sequence()) {
    std::vector<float> rows = random_floats(static_cast<std::size_t>(heads * kHeadDim) * 64, 5);
    const TensorView<const float> view = TensorView<const float>::nhd(rows.data(), heads, kHeadDim);
    while (cache.length(id) < tokens) {
      const std::int64_t count = std::min<std::int64_t>(64, tokens - cache.length(id));
      check(cache.begin(step, {{id, count}}));
      for (int h = 0; h < heads; ++h) {
        const TensorView<const float> head{view.row(0, h), view.stride_n, view.stride_h};
        cache.template append<simd::BestIsa>(step, step.chunks()[0], 0, h, head, head);
        step.note_head_done(0);
      }
      check(cache.commit(step));
    }
  }
  static HeadPlan plan_of(const ModelShape& shape, const HeadBudget& budget) {
    HeadPlan plan(shape);
    for (int h = 0; h < shape.layer(0).num_kv_heads; ++h) plan.set(0, h, budget);
    return plan;
  }
  static void check(StepStatus status) {
    if (status != StepStatus::kOk) throw std::runtime_error(to_string(status));
  }
  /// Seconds of a step of `tokens`, dropped afterwards.
  double attend_seconds(std::int64_t tokens, Phase phase) {
    const LayerShape& layer = shape.layer(0);
    if (q.empty()) {
      q = random_floats(static_cast<std::size_t>(tokens * layer.num_qo_heads()) * kHeadDim, 6);
      k = random_floats(static_cast<std::size_t>(tokens * layer.num_kv_heads) * kHeadDim, 7);
      out.resize(q.size());
    }
    check(cache.begin(step, {{id, tokens, phase}}));
    const auto kv = TensorView<const float>::nhd(k.data(), layer.num_kv_heads, kHeadDim);
    const double seconds = seconds_of([&] {
      check(attend(cache, step, 0,
                   TensorView<const float>::nhd(q.data(), layer.num_qo_heads(), kHeadDim), kv, kv,
                   TensorView<float>::nhd(out.data(), layer.num_qo_heads(), kHeadDim)));
    });
    check(cache.drop(step));
    return seconds;
  }
  /// Every head keeps `count` rows, spread at random.
  KeptPositions spread(std::int64_t count, unsigned seed) const {
    std::mt19937 random(seed);
    KeptPositions kept;
    const std::int64_t length = cache.length(id);
    for (int h = 0; h < shape.layer(0).num_kv_heads; ++h) {
      std::vector<std::int32_t> positions;
      std::int64_t left = count;
      for (std::int64_t pos = 0; pos < length; ++pos) {
        const auto others = static_cast<std::uint64_t>(length - pos);
        if (random() % others >= static_cast<std::uint64_t>(left)) continue;
        positions.push_back(static_cast<std::int32_t>(pos));
        --left;
      }
      kept.add_head(positions);
    }
    return kept;
  }

  ModelShape shape;
  KvCache<Row> cache;
  SequenceId id;
  Step step;
  std::vector<float> q, k, out;
};

/// SnapKV's scores of one KV head over a prompt, read out of the cache and cut, over the prefill of
/// the prompt: that of its last 256 tokens, times the visible rows of all over theirs.
void score(benchmark::State& state) {
  const std::int64_t tokens = state.range(0);
  constexpr int kGroup = 4;
  constexpr std::int64_t kChunk = 256;
  Layer<f16> layer(1, kGroup, KeepSelected{}, tokens, tokens + kChunk);
  const snap_kv::Policy policy;
  QueryWindow window(layer.shape, policy.window);
  const std::vector<float> q =
      random_floats(static_cast<std::size_t>(policy.window * kGroup * kHeadDim), 8);
  window.note(0, TensorView<const float>::nhd(q.data(), kGroup, kHeadDim), tokens - policy.window,
              policy.window);
  const double visible = 0.5 * static_cast<double>(tokens) * static_cast<double>(tokens);
  const double seen = static_cast<double>(kChunk) * (static_cast<double>(tokens) + kChunk / 2.0);
  bench::Samples scoring, prefill;
  StoredRows rows;
  for (auto _ : state) {
    scoring.add([&] {
      return seconds_of([&] {
        rows.read(layer.cache.stored(layer.id, 0, 0));
        TokenScores scores(tokens);
        snap_kv::add_head(policy, window.of_head(0, 0), rows.keys(),
                          layer.cache.stored_positions(layer.id, 0, 0), scores);
        benchmark::DoNotOptimize(
            select_tokens(scores, policy.protection(), uniform_counts(scores, 2048)));
      });
    });
    prefill.add([&] { return layer.attend_seconds(kChunk, Phase::kPrompt) * visible / seen; });
  }
  state.counters["ms"] = scoring.median() * 1e3;
  state.counters["clean"] = scoring.num_clean();
  state.counters["prefill_ms"] = prefill.median() * 1e3;
  state.counters["of_prefill"] = scoring.median() / prefill.median();
}
BENCHMARK(score)->Name("select/snap_kv/group4/n")->Arg(32768)->Unit(benchmark::kMillisecond);

/// compact() of 8 heads, a quarter of the rows kept, beside a memcpy of as many bytes.
template <class Row>
void compact(benchmark::State& state) {
  const std::int64_t tokens = state.range(0);
  const std::int64_t count = tokens / 4;
  constexpr int kHeads = 8;
  const auto bytes = static_cast<std::size_t>(count) * kHeads * 2 * kHeadDim * sizeof(f16);
  std::vector<std::byte> from(bytes, std::byte{1});
  std::vector<std::byte> to(bytes);
  bench::Samples moving, copying;
  unsigned seed = 0;
  for (auto _ : state) {
    state.PauseTiming();
    Layer<Row> layer(kHeads, 1, KeepSelected{}, tokens, tokens);
    const KeptPositions kept = layer.spread(count, ++seed);
    state.ResumeTiming();
    moving.add(
        [&] { return seconds_of([&] { layer.check(layer.cache.compact(layer.id, kept)); }); });
    copying.add([&] {
      return seconds_of([&] {
        std::memcpy(to.data(), from.data(), bytes);
        benchmark::ClobberMemory();
      });
    });
  }
  state.counters["ms"] = moving.median() * 1e3;
  state.counters["clean"] = moving.num_clean();
  state.counters["GB/s"] = static_cast<double>(bytes) / moving.median() * 1e-9;
  state.counters["of_copy"] = copying.median() / moving.median();
}
BENCHMARK(compact<f16>)->Name("compact/f16_tiled/n")->Arg(16384)->Iterations(40);
BENCHMARK(compact<PlainRows<f16>>)->Name("compact/f16_plain/n")->Arg(16384)->Iterations(40);

/// A token over selected rows beside one over a retrieval head of as many.
void decode(benchmark::State& state) {
  const std::int64_t count = state.range(0);
  Layer<f16> selected(8, 4, KeepSelected{}, 2 * count, 2 * count + 64);
  Layer<f16> retrieval(8, 4, KeepEverything{}, count, count + 64);
  selected.check(selected.cache.compact(selected.id, selected.spread(count - 5, 3)));
  bench::Samples over_selected, over_retrieval;
  for (auto _ : state) {
    over_selected.add([&] { return selected.attend_seconds(1, Phase::kDecode); });
    over_retrieval.add([&] { return retrieval.attend_seconds(1, Phase::kDecode); });
  }
  state.counters["ms"] = over_selected.median() * 1e3;
  state.counters["clean"] = over_selected.num_clean();
  state.counters["over_retrieval"] = over_selected.median() / over_retrieval.median();
}
BENCHMARK(decode)->Name("decode_selected/llama3_8b/f16/rows")->Arg(4096)->Arg(16384);

}  // namespace

BENCHMARK_MAIN();
