// SPDX-License-Identifier: MIT
// An engine with KV memory of its own: a plan says which of its blocks it may free, and Headwise
// attends over the others where they lie. There is no KvCache here, and nothing is copied.
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

constexpr int kLayers = 2;
constexpr int kKvHeads = 4;
constexpr int kGroup = 2;  // query heads per KV head
constexpr int kDim = own_memory::kDim;

class Engine {
 public:
  void forward(std::int64_t num_tokens) {
    rows_.clear();
    stand_in::add_tokens(rows_, 7, length_, num_tokens);
    for (int layer = 0; layer < kLayers; ++layer) {
      model_.project(layer, rows_);
      for (int head = 0; head < kKvHeads; ++head) attend(layer, head, num_tokens);
      error_ = std::max(error_, model_.error(layer, rows_.size() - 1, rows_.back(), plan_));
    }
    length_ += num_tokens;
  }

  std::int64_t length() const { return length_; }
  const HeadPlan& plan() const { return plan_; }
  const own_memory::EngineMemory& memory() const { return memory_; }
  double error() const { return error_; }

 private:
  void attend(int layer, int head, std::int64_t num_tokens) {
    const auto* keep = std::get_if<KeepWindow>(&plan_.budget(layer, head));
    const Window window = keep != nullptr ? keep->window : Window::everything();
    const auto q = model_.q(), k = model_.k(), v = model_.v();
    const auto out = model_.out();
    const int table = layer * kKvHeads + head;
    const HeadProblem<PlainRows<f16>> problem{
        .past = memory_.view(table, window, Pos{length_}),
        .window = window,
        .first_query = Pos{length_},
        .num_queries = num_tokens,
        .group_size = kGroup,
        .scale = model_.shape().layer(layer).scale(),
        .q = {q.row(0, head * kGroup), q.stride_n, q.stride_h},
        .own_k = {k.row(0, head), k.stride_n, k.stride_h},
        .own_v = {v.row(0, head), v.stride_n, v.stride_h},
        .out = {out.row(0, head * kGroup), out.stride_n, out.stride_h}};
    if (num_tokens == 1) {
      decode(problem);
    } else {
      prefill(problem);
    }
    for (std::int64_t i = 0; i < num_tokens;
         ++i) {  // only now: the kernels saw the step's own rows
      memory_.append(table, Pos{length_ + i}, k.row(i, head), v.row(i, head));
    }
    memory_.free_unseen(table, window, Pos{length_ + num_tokens});
  }

  /// Tiles of queries; each could be another thread's, with scratch of its own.
  void prefill(const HeadProblem<PlainRows<f16>>& problem) {
    float* scratch = reserve(prefill_scratch_floats(kGroup, kDim, kDim));
    const std::int64_t tile = prefill_tile_queries(kGroup);
    for (std::int64_t first = 0; first < problem.num_queries; first += tile) {
      prefill_tile<Isa>(problem, first, std::min(first + tile, problem.num_queries), scratch);
    }
  }

  /// Splits of the past; each could be another thread's, with scratch of its own.
  void decode(const HeadProblem<PlainRows<f16>>& problem) {
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
  own_memory::EngineMemory memory_{400, std::size_t{kLayers} * kKvHeads};
  std::vector<stand_in::Token> rows_;
  std::int64_t length_ = 0;
  Scratch scratch_;  // 64-byte aligned, as the kernels want it
  double error_ = 0.0;
};

}  // namespace

int main() {
  Engine engine;
  for (const int chunk : {300, 500, 224}) engine.forward(chunk);
  for (int i = 0; i < 16; ++i) engine.forward(1);

  // 1040 tokens: 33 blocks for each of 4 retrieval heads; 1 of the sinks and 4 or 5 recent ones for
  // each of 4 streaming heads.
  const std::size_t dense = std::size_t{33} * kLayers * kKvHeads;
  std::printf("%lld tokens in %zu blocks, %zu without a plan; largest error %.1e\n",
              static_cast<long long>(engine.length()), engine.memory().num_used(), dense,
              engine.error());
  const std::size_t used = engine.memory().num_used();
  const bool right = engine.error() < 1e-5 && used >= 4 * (33 + 5) && used <= 4 * (33 + 6);
  std::puts(right ? "ok" : "WRONG");
  return right ? 0 : 1;
}
