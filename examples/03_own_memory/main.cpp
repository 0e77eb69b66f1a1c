// SPDX-License-Identifier: MIT
// An engine with KV memory of its own, laid out as llama2.c's: a plan says which rows each head
// reads, and Headwise attends over them where they lie. There is no KvCache, and nothing is copied.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "../stand_in/model.hpp"
#include "engine_memory.hpp"
#include "headwise/attention/cpu/decode.hpp"
#include "headwise/attention/cpu/prefill.hpp"
#include "headwise/core/scratch.hpp"
#include "headwise/policies/random_heads.hpp"

namespace {

using namespace headwise;
using Isa = simd::BestIsa;
using Rows = PlainRows<float>;

constexpr int kLayers = 2;
constexpr int kKvHeads = 4;
constexpr int kGroup = 2;  // query heads per KV head
constexpr int kDim = 64;
constexpr std::int64_t kSeqLen = 1100;

class Engine {
 public:
  void forward(std::int64_t num_tokens) {
    rows_.clear();
    stand_in::add_tokens(rows_, 7, length_, num_tokens);
    for (int layer = 0; layer < kLayers; ++layer) {
      model_.project(layer, rows_);
      for (int head = 0; head < kKvHeads; ++head) attend(layer, head, num_tokens);
      for (std::int64_t i = 0; i < num_tokens; ++i) {  // only now: kernels read the step's own rows
        memory_.append(layer, length_ + i, model_.k().row(i, 0), model_.v().row(i, 0));
      }
      error_ = std::max(error_, model_.error<float>(layer, rows_.size() - 1, rows_.back(), plan_));
    }
    length_ += num_tokens;
  }

  std::int64_t length() const { return length_; }
  std::int64_t rows_read() const { return rows_read_; }
  double error() const { return error_; }

 private:
  void attend(int layer, int head, std::int64_t num_tokens) {
    const auto* keep = std::get_if<KeepWindow>(&plan_.budget(layer, head));
    const Window window = keep != nullptr ? keep->window : Window::everything();
    const auto q = model_.q(), k = model_.k(), v = model_.v();
    const auto out = model_.out();
    const HeadProblem<Rows> problem{.past = visible(memory_.view(layer, head, length_), window),
                                    .window = window,
                                    .first_query = Pos{length_},
                                    .num_queries = num_tokens,
                                    .group_size = kGroup,
                                    .scale = model_.shape().layer(layer).scale(),
                                    .softmax = HeadSoftmax::of(model_.shape().layer(layer), head),
                                    .q = {q.row(0, head * kGroup), q.stride_n, q.stride_h},
                                    .own_k = {k.row(0, head), k.stride_n, k.stride_h},
                                    .own_v = {v.row(0, head), v.stride_n, v.stride_h},
                                    .out = {out.row(0, head * kGroup), out.stride_n, out.stride_h}};
    rows_read_ += problem.past.num_rows();
    if (num_tokens == 1) {
      decode(problem);
    } else {
      prefill(problem);
    }
  }

  /// Of a view over all rows, the two runs that a query from now on may see; slot = position.
  KvView<Rows> visible(KvView<Rows> view, Window window) const {
    const std::int64_t recent = window.oldest_recent(Pos{length_}).value;
    const std::int64_t sink = std::min(window.sink, recent);
    view.num_runs = 0;
    view.add_run({Slot{0}, Pos{0}, sink});
    view.add_run({Slot{recent}, Pos{recent}, length_ - recent});
    return view;
  }

  /// Tiles of queries; each could be another thread's, with scratch of its own.
  void prefill(const HeadProblem<Rows>& problem) {
    float* scratch = reserve(prefill_scratch_floats(kGroup, kDim, kDim));
    const std::int64_t tile = prefill_tile_queries(kGroup);
    for (std::int64_t first = 0; first < problem.num_queries; first += tile) {
      prefill_tile<Isa>(problem, first, std::min(first + tile, problem.num_queries), scratch);
    }
  }

  /// Splits of the past; each could be another thread's, with scratch of its own.
  void decode(const HeadProblem<Rows>& problem) {
    constexpr std::int64_t kSplit = 256;
    const std::int64_t past = problem.past.num_rows();
    const std::int64_t splits = std::max<std::int64_t>(1, (past + kSplit - 1) / kSplit);
    const std::size_t stride = decode_partial_floats(kGroup, kDim);
    const std::size_t scratch = decode_scratch_floats(kGroup, kDim, kDim);
    float* partials = reserve(scratch + static_cast<std::size_t>(splits) * stride) + scratch;
    for (std::int64_t s = 0; s < splits; ++s) {
      const DecodeSplit split{s * kSplit, std::min(past, (s + 1) * kSplit), s + 1 == splits};
      decode_split<Isa>(problem, split, partials + static_cast<std::size_t>(s) * stride,
                        partials - scratch);
    }
    merge_splits<Isa>(problem, partials, stride, splits);
  }

  float* reserve(std::size_t floats) {
    scratch_.reserve(floats * sizeof(float));
    return reinterpret_cast<float*>(scratch_.bytes());
  }

  stand_in::Model model_{kLayers, kKvHeads* kGroup, kKvHeads, kDim};
  HeadPlan plan_ = random_heads::Policy{.sparsity = 0.5, .window = {4, 124}}.plan(model_.shape());
  own_memory::EngineMemory memory_{kLayers, kSeqLen, kKvHeads, kDim};
  std::vector<stand_in::Token> rows_;
  std::int64_t length_ = 0;
  std::int64_t rows_read_ = 0;
  Scratch scratch_;  // 64-byte aligned, as the kernels want it
  double error_ = 0.0;
};

}  // namespace

int main() {
  Engine engine;
  std::int64_t dense = 0;
  for (const int chunk : {300, 500, 224}) engine.forward(chunk);
  const std::int64_t before = engine.rows_read();
  for (int i = 0; i < 16; ++i) {
    dense += engine.length() * kLayers * kKvHeads;
    engine.forward(1);
  }
  const std::int64_t read = engine.rows_read() - before;

  std::printf("%lld tokens; decode read %lld rows, %lld without a plan; largest error %.1e\n",
              static_cast<long long>(engine.length()), static_cast<long long>(read),
              static_cast<long long>(dense), engine.error());
  // 4 of 8 heads read everything, the others 4 sinks and the 123 rows before the current one.
  const bool right = engine.error() < 1e-5 && read == dense / 2 + std::int64_t{16} * 4 * (4 + 123);
  std::puts(right ? "ok" : "WRONG");
  return right ? 0 : 1;
}
