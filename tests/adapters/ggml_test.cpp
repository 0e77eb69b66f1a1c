// SPDX-License-Identifier: MIT
#include "headwise/adapters/ggml.hpp"

#include <ggml-cpu.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "headwise/core/dtype.hpp"
#include "support/attend_models.hpp"
#include "support/count_allocations.hpp"
#include "support/errors.hpp"

namespace headwise::test {
namespace {

constexpr std::size_t kThreads = 3;

/// How an engine may have laid out q, k and v.
enum class Layout {
  kDense,       ///< three tensors
  kFused,       ///< views of one [tokens, q | k | v], as one product leaves them
  kHeadsOuter,  ///< [dim, tokens, heads], permuted
  kTransposed,  ///< [heads, tokens, dim], permuted: rows are not contiguous
  kHalf,        ///< k and v in f16, k a view with gaps
};

std::string name_of(const ::testing::TestParamInfo<Layout>& layout) {
  constexpr const char* kNames[] = {"Dense", "Fused", "HeadsOuter", "Transposed", "Half"};
  return kNames[static_cast<int>(layout.param)];
}

using Context = std::unique_ptr<ggml_context, decltype(&ggml_free)>;
Context new_context(bool no_alloc = false) {
  return {ggml_init({std::size_t{64} << 20, nullptr, no_alloc}), &ggml_free};
}

/// Writes [token][head][dim] floats into a ggml tensor of any strides, f32 or f16.
void write(ggml_tensor* to, const std::vector<float>& from) {
  ASSERT_EQ(static_cast<std::size_t>(ggml_nelements(to)), from.size());
  std::size_t next = 0;
  for (std::int64_t t = 0; t < to->ne[2]; ++t) {
    for (std::int64_t h = 0; h < to->ne[1]; ++h) {
      for (std::int64_t d = 0; d < to->ne[0]; ++d) {
        char* at = static_cast<char*>(to->data) + static_cast<std::size_t>(t) * to->nb[2] +
                   static_cast<std::size_t>(h) * to->nb[1] +
                   static_cast<std::size_t>(d) * to->nb[0];
        const float x = from[next++];
        const f16 half = from_float<f16>(x);
        if (to->type == GGML_TYPE_F32) std::memcpy(at, &x, sizeof x);
        if (to->type == GGML_TYPE_F16) std::memcpy(at, &half, sizeof half);
      }
    }
  }
}

std::vector<float> read(const ggml_tensor* from) {
  const auto* data = static_cast<const float*>(from->data);
  return {data, data + ggml_nelements(from)};
}

/// q, k, v and the adapter's node of each layer, for a fixed number of tokens.
struct Graph {
  struct Layer {
    ggml_tensor *q, *k, *v, *out;
  };
  Context ctx = new_context();
  ggml_cgraph* graph = ggml_new_graph(ctx.get());
  std::vector<Layer> layers;

  template <class Rows>
  Graph(GgmlAttention<Rows>& attention, const ModelShape& shape, std::int64_t tokens,
        Layout layout) {
    for (int l = 0; l < shape.num_layers(); ++l) {
      Layer layer = inputs(shape.layer(l), tokens, layout);
      layer.out = attention.attend(ctx.get(), l, layer.q, layer.k, layer.v,
                                   {.scale = shape.layer(l).scale()});
      ggml_build_forward_expand(graph, layer.out);
      layers.push_back(layer);
    }
  }

  Layer inputs(const LayerShape& s, std::int64_t tokens, Layout layout) {
    ggml_context* c = ctx.get();
    const std::int64_t qo = s.num_qo_heads();
    const std::int64_t kv = s.num_kv_heads;
    switch (layout) {
      case Layout::kDense:
        return {f32(s.k_dim, qo, tokens), f32(s.k_dim, kv, tokens), f32(s.v_dim, kv, tokens), {}};
      case Layout::kFused: {
        const std::int64_t widths[] = {qo * s.k_dim, kv * s.k_dim, kv * s.v_dim};
        ggml_tensor* all =
            ggml_new_tensor_2d(c, GGML_TYPE_F32, widths[0] + widths[1] + widths[2], tokens);
        const auto view = [&](std::int64_t dim, std::int64_t heads, std::int64_t first) {
          return ggml_view_3d(c, all, dim, heads, tokens, static_cast<std::size_t>(dim) * 4,
                              all->nb[1], static_cast<std::size_t>(first) * 4);
        };
        return {view(s.k_dim, qo, 0),
                view(s.k_dim, kv, widths[0]),
                view(s.v_dim, kv, widths[0] + widths[1]),
                {}};
      }
      case Layout::kHeadsOuter: {
        const auto permuted = [&](std::int64_t dim, std::int64_t heads) {
          return ggml_permute(c, f32(dim, tokens, heads), 0, 2, 1, 3);
        };
        return {permuted(s.k_dim, qo), permuted(s.k_dim, kv), permuted(s.v_dim, kv), {}};
      }
      case Layout::kTransposed: {
        const auto permuted = [&](std::int64_t dim, std::int64_t heads) {
          return ggml_permute(c, f32(heads, tokens, dim), 1, 2, 0, 3);
        };
        return {permuted(s.k_dim, qo), permuted(s.k_dim, kv), permuted(s.v_dim, kv), {}};
      }
      case Layout::kHalf: {
        ggml_tensor* k = ggml_new_tensor_3d(c, GGML_TYPE_F16, s.k_dim + 8, kv + 1, tokens);
        return {f32(s.k_dim, qo, tokens),
                ggml_view_3d(c, k, s.k_dim, kv, tokens, k->nb[1], k->nb[2], 16),
                ggml_new_tensor_3d(c, GGML_TYPE_F16, s.v_dim, kv, tokens),
                {}};
      }
    }
    return {};
  }
  ggml_tensor* f32(std::int64_t a, std::int64_t b, std::int64_t c) {
    return ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, a, b, c);
  }

  void compute(std::size_t num_threads) {
    ASSERT_EQ(ggml_graph_compute_with_ctx(ctx.get(), graph, static_cast<int>(num_threads)),
              GGML_STATUS_SUCCESS);
  }
};

/// The adapter beside the modelled cache, which knows the answers in double.
template <class Rows = f16>
class Beside {
 public:
  explicit Beside(const ModelShape& shape, PrefillMode prefill = PrefillMode::kWindowed,
                  std::size_t num_threads = kThreads)
      : shape_(shape),
        model(shape, every_kind(shape, prefill), options_of(prefill)),
        attention(shape, every_kind(shape, prefill), options_of(prefill), num_threads) {}

  /// A sequence of both; they are named alike.
  SequenceId add() {
    const SequenceId id = model.add();
    EXPECT_EQ(attention.cache().add_sequence(), id);
    return id;
  }

  static std::vector<SequenceChunk> counts(const Chunks& chunks, Phase phase) {
    std::vector<SequenceChunk> result;
    for (const auto& [id, tokens] : chunks) {
      result.push_back({id, static_cast<std::int64_t>(tokens.size()), phase});
    }
    return result;
  }
  static std::int64_t num_tokens(const Chunks& chunks) {
    std::int64_t sum = 0;
    for (const auto& [id, tokens] : chunks) sum += static_cast<std::int64_t>(tokens.size());
    return sum;
  }

  /// Opens the step in both and writes its q, k and v into the graph.
  void begin(Graph& graph, const Chunks& chunks, Phase phase) {
    expected = model.oracle(chunks, phase);
    ASSERT_EQ(model.begin(chunks, phase), StepStatus::kOk);
    ASSERT_EQ(attention.begin(counts(chunks, phase)), StepStatus::kOk);
    for (int l = 0; l < shape_.num_layers(); ++l) {
      const auto in = model.inputs_of(l, chunks);
      Graph::Layer& to = graph.layers[static_cast<std::size_t>(l)];
      write(to.q, in.q);
      write(to.k, in.k);
      write(to.v, in.v);
    }
  }
  void commit() {
    ASSERT_EQ(attention.commit(), StepStatus::kOk);
    model.append();
    ASSERT_EQ(model.commit(), StepStatus::kOk);
  }
  /// A whole step; how far its outputs are from the oracle's.
  double step(Graph& graph, const Chunks& chunks, Phase phase, std::size_t num_threads = kThreads) {
    begin(graph, chunks, phase);
    graph.compute(num_threads);
    commit();
    return largest_difference(outputs(graph), expected);
  }
  double step(const Chunks& chunks, Phase phase, Layout layout) {
    Graph graph(attention, shape_, num_tokens(chunks), layout);
    return step(graph, chunks, phase);
  }
  static std::vector<Outputs> outputs(const Graph& graph) {
    std::vector<Outputs> out;
    for (const Graph::Layer& layer : graph.layers) out.push_back(read(layer.out));
    return out;
  }

 private:
  ModelShape shape_;

 public:
  AttendedCache<Rows> model;
  GgmlAttention<Rows> attention;
  std::vector<std::vector<double>> expected;
};

class GgmlLayouts : public ::testing::TestWithParam<Layout> {};
INSTANTIATE_TEST_SUITE_P(All, GgmlLayouts,
                         ::testing::Values(Layout::kDense, Layout::kFused, Layout::kHeadsOuter,
                                           Layout::kTransposed, Layout::kHalf),
                         name_of);

TEST_P(GgmlLayouts, GiveTheOraclesAnswersOverRaggedSequences) {
  Beside<> both(two_layers(2, 32, 48));
  const SequenceId a = both.add();
  const SequenceId b = both.add();
  const SequenceId c = both.add();
  const auto check = [&](const Chunks& chunks, Phase phase) {
    EXPECT_LE(both.step(chunks, phase, GetParam()), kBound);
  };
  check({{a, new_tokens(70)}, {b, new_tokens(1)}, {c, new_tokens(17)}}, Phase::kPrompt);
  check({{c, new_tokens(1)}, {a, new_tokens(1)}, {b, new_tokens(1)}}, Phase::kDecode);
  check({{b, new_tokens(33)}, {a, new_tokens(0)}, {c, new_tokens(1)}}, Phase::kPrompt);
  check({{a, new_tokens(3)}}, Phase::kDecode);
  check({{b, new_tokens(1)}, {a, new_tokens(120)}}, Phase::kPrompt);
  check({{a, new_tokens(1)}, {b, new_tokens(1)}}, Phase::kDecode);
}

TEST(GgmlAttention, AnswersAtEveryBoundaryOfAWindow) {
  // sink +- 1, sink + recent +- 1, page +- 1, and past two windows.
  Beside<> both(two_layers(3, 16, 16));
  const SequenceId a = both.add();
  Graph one(both.attention, two_layers(3, 16, 16), 1, Layout::kFused);
  for (int length = 0; length < 110; ++length) {
    ASSERT_LE(both.step(one, {{a, new_tokens(1)}}, Phase::kDecode), kBound) << length;
  }
}

TEST(GgmlAttention, FollowsTheCachesPrefillMode) {
  Beside<> both(two_layers(2, 32, 32), PrefillMode::kChunkCausal);
  const SequenceId a = both.add();
  for (const std::int64_t tokens : {90, 40, 1, 64}) {
    EXPECT_LE(both.step({{a, new_tokens(tokens)}}, Phase::kPrompt, Layout::kFused), kBound);
  }
}

TEST(GgmlAttention, StoresRowsInTheFormatAsked) {
  Beside<f32> exact(two_layers(2, 32, 32));
  const SequenceId a = exact.add();
  EXPECT_LE(exact.step({{a, new_tokens(50)}}, Phase::kPrompt, Layout::kFused), kBound);
  EXPECT_LE(exact.step({{a, new_tokens(1)}}, Phase::kDecode, Layout::kDense), kBound);
}

TEST(GgmlAttention, OneDecodeGraphServesEveryStep) {
  const ModelShape shape = two_layers(2, 32, 32);
  Beside<> reused(shape);
  Beside<> rebuilt(shape);
  const SequenceId a = reused.add();
  const SequenceId b = reused.add();
  rebuilt.add();
  rebuilt.add();
  Graph prompt(reused.attention, shape, 41, Layout::kFused);
  Graph decode(reused.attention, shape, 2, Layout::kFused);
  const auto step = [&](Graph& graph, const Chunks& chunks, Phase phase) {
    EXPECT_LE(reused.step(graph, chunks, phase), kBound);
    Graph fresh(rebuilt.attention, shape, Beside<>::num_tokens(chunks), Layout::kFused);
    EXPECT_LE(rebuilt.step(fresh, chunks, phase), kBound);
    EXPECT_EQ(Beside<>::outputs(graph), Beside<>::outputs(fresh));
  };
  step(prompt, {{a, new_tokens(40)}, {b, new_tokens(1)}}, Phase::kPrompt);
  for (int i = 0; i < 30; ++i) {
    step(decode, {{a, new_tokens(1)}, {b, new_tokens(1)}}, Phase::kDecode);
  }
  step(prompt, {{a, new_tokens(1)}, {b, new_tokens(40)}}, Phase::kPrompt);
  step(decode, {{b, new_tokens(1)}, {a, new_tokens(1)}}, Phase::kDecode);
}

TEST(GgmlAttention, AnyNumberOfThreadsUpToThatReservedGivesTheSameBits) {
  const ModelShape shape = two_layers(2, 32, 32);
  std::vector<std::vector<Outputs>> by_threads;
  const std::vector<Token> tokens = new_tokens(130);
  for (const std::size_t num_threads : {std::size_t{1}, std::size_t{2}, std::size_t{5}}) {
    Beside<> both(shape, PrefillMode::kWindowed, 5);
    const SequenceId a = both.add();
    Graph graph(both.attention, shape, 65, Layout::kDense);
    for (const auto first : {tokens.begin(), tokens.begin() + 65}) {
      EXPECT_LE(both.step(graph, {{a, {first, first + 65}}}, Phase::kPrompt, num_threads), kBound);
      by_threads.push_back({Beside<>::outputs(graph)});
    }
  }
  for (std::size_t i = 2; i < by_threads.size(); ++i) EXPECT_EQ(by_threads[i], by_threads[i % 2]);
}

// Every softmax that ggml has ---------------------------------------------------------------------

/// How far the adapter's node is from ggml_flash_attn_ext() of the same q, k, v and softmax.
double distance_to_ggml(const LayerShape& layer, float max_bias) {
  constexpr std::int64_t kTokens = 60;
  const ModelShape shape({layer});
  const SoftmaxOptions& softmax = layer.softmax;
  GgmlAttention<f16> attention(shape, HeadPlan(shape), {.max_context = 64}, kThreads);
  const SequenceId a = *attention.cache().add_sequence();
  const Context context = new_context();
  ggml_context* c = context.get();
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0.0F, 1.5F);
  const auto filled = [&](std::int64_t heads) {
    ggml_tensor* tensor = ggml_new_tensor_3d(c, GGML_TYPE_F32, layer.k_dim, heads, kTokens);
    std::vector<float> values(static_cast<std::size_t>(ggml_nelements(tensor)));
    for (float& x : values) x = to_float(from_float<f16>(normal(random)));
    write(tensor, values);
    return tensor;
  };
  ggml_tensor* q = filled(layer.num_qo_heads());
  ggml_tensor* k = filled(layer.num_kv_heads);
  ggml_tensor* v = filled(layer.num_kv_heads);
  ggml_tensor* sinks = nullptr;
  if (!softmax.sinks.empty()) {
    sinks = ggml_new_tensor_1d(c, GGML_TYPE_F32, layer.num_qo_heads());
    write(sinks, softmax.sinks);
  }
  // ggml multiplies the mask by a head's slope.
  ggml_tensor* mask = ggml_new_tensor_2d(c, GGML_TYPE_F16, kTokens, kTokens);
  std::vector<float> distances;
  for (std::int64_t i = 0; i < kTokens; ++i) {
    for (std::int64_t j = 0; j < kTokens; ++j) {
      const auto bias = max_bias != 0.0F ? static_cast<float>(j - i) : 0.0F;
      distances.push_back(j <= i ? bias : -std::numeric_limits<float>::infinity());
    }
  }
  write(mask, distances);
  const auto heads_outer = [&](ggml_tensor* x) { return ggml_permute(c, x, 0, 2, 1, 3); };
  ggml_tensor* theirs =
      ggml_flash_attn_ext(c, heads_outer(q), heads_outer(ggml_cast(c, k, GGML_TYPE_F16)),
                          heads_outer(v), mask, layer.scale(), max_bias, softmax.soft_cap);
  if (sinks != nullptr) ggml_flash_attn_ext_add_sinks(theirs, sinks);
  ggml_tensor* ours = attention.attend(c, 0, q, k, v,
                                       {.scale = layer.scale(),
                                        .max_bias = max_bias,
                                        .logit_softcap = softmax.soft_cap,
                                        .sinks = sinks});
  ggml_cgraph* graph = ggml_new_graph(c);
  ggml_build_forward_expand(graph, ours);
  ggml_build_forward_expand(graph, theirs);
  EXPECT_EQ(attention.begin({{a, kTokens}}), StepStatus::kOk);
  EXPECT_EQ(ggml_graph_compute_with_ctx(c, graph, kThreads), GGML_STATUS_SUCCESS);
  EXPECT_EQ(attention.commit(), StepStatus::kOk);
  return largest_difference({read(ours)}, std::vector<Outputs>{read(theirs)});
}

TEST(GgmlAttention, HasEverySoftmaxThatGgmlHas) {
  constexpr double kNear = 1e-4;  // V goes to ggml as f32: it sums f16 ones in f16
  const auto distance = [](int num_kv_heads, int group, SoftmaxOptions softmax, float max_bias) {
    LayerShape layer{num_kv_heads, group, 32, 32};
    softmax.alibi_slopes = alibi_slopes_of(max_bias, num_kv_heads * group);
    layer.softmax = std::move(softmax);
    return distance_to_ggml(layer, max_bias);
  };
  EXPECT_LE(distance(2, 3, {}, 0.0F), kNear);
  EXPECT_LE(distance(2, 3, {.soft_cap = 1.5F}, 0.0F), kNear);
  EXPECT_LE(distance(2, 3, {.sinks = {2.0F, -1.0F, 0.0F, 4.0F, 1.0F, 3.0F}}, 0.0F), kNear);
  EXPECT_LE(distance(4, 2, {}, 8.0F), kNear);
  EXPECT_LE(distance(2, 3, {}, 8.0F), kNear);  // 6 heads are no power of two
  EXPECT_LE(distance(2, 3, {.soft_cap = 2.0F, .sinks = std::vector<float>(6, 1.0F)}, 4.0F), kNear);
}

// What a node refuses, commit says ----------------------------------------------------------------

/// Poisons the outputs, computes, and tells whether any of them was written.
bool writes(Graph& graph, std::size_t num_threads) {
  for (Graph::Layer& layer : graph.layers) {
    ggml_set_f32(layer.out, -7.0F);
  }
  graph.compute(num_threads);
  for (const Outputs& out : Beside<>::outputs(graph)) {
    for (const float x : out) {
      if (x != -7.0F) return true;
    }
  }
  return false;
}

TEST(GgmlAttention, RefusesMoreThreadsThanReservedAndGoesOn) {
  const ModelShape shape = two_layers(2, 32, 32);
  Beside<> both(shape, PrefillMode::kWindowed, 2);
  const SequenceId a = both.add();
  Graph graph(both.attention, shape, 20, Layout::kFused);
  const Chunks chunks{{a, new_tokens(20)}};

  both.begin(graph, chunks, Phase::kPrompt);
  EXPECT_FALSE(writes(graph, 3));
  EXPECT_EQ(both.attention.commit(), StepStatus::kTooManyThreads);
  EXPECT_EQ(both.attention.cache().length(a), 0);
  EXPECT_EQ(both.attention.drop(), StepStatus::kOk);
  EXPECT_LE(both.step(graph, chunks, Phase::kPrompt, 2), kBound);
}

TEST(GgmlAttention, RefusesAGraphOfAnotherNumberOfTokens) {
  const ModelShape shape = two_layers(2, 32, 32);
  Beside<> both(shape);
  const SequenceId a = both.add();
  Graph shorter(both.attention, shape, 19, Layout::kFused);
  Graph longer(both.attention, shape, 21, Layout::kFused);
  for (Graph* graph : {&shorter, &longer}) {
    ASSERT_EQ(both.attention.begin({{a, 20}}), StepStatus::kOk);
    EXPECT_FALSE(writes(*graph, kThreads));
    EXPECT_EQ(both.attention.commit(), StepStatus::kInvalidChunk);
  }
  EXPECT_LE(both.step({{a, new_tokens(20)}}, Phase::kPrompt, Layout::kFused), kBound);
}

TEST(GgmlAttention, RefusesAGraphWithoutAStepAndAStepWithoutAGraph) {
  const ModelShape shape = two_layers(2, 32, 32);
  Beside<> both(shape);
  const SequenceId a = both.add();
  Graph graph(both.attention, shape, 4, Layout::kFused);
  EXPECT_FALSE(writes(graph, kThreads));
  EXPECT_EQ(both.attention.commit(), StepStatus::kStale);
  ASSERT_EQ(both.attention.begin({{a, 4}}), StepStatus::kOk);
  EXPECT_EQ(both.attention.commit(), StepStatus::kIncomplete);
  EXPECT_EQ(both.attention.drop(), StepStatus::kOk);
  EXPECT_EQ(both.attention.drop(), StepStatus::kStale);
}

TEST(GgmlAttention, RefusesToComputeAStepTwice) {
  const ModelShape shape = two_layers(2, 32, 32);
  Beside<> both(shape);
  const SequenceId a = both.add();
  Graph graph(both.attention, shape, 20, Layout::kFused);
  const Chunks chunks{{a, new_tokens(20)}};
  both.begin(graph, chunks, Phase::kPrompt);
  graph.compute(kThreads);
  EXPECT_FALSE(writes(graph, kThreads));
  EXPECT_NE(both.attention.commit(), StepStatus::kOk);
  EXPECT_EQ(both.attention.cache().length(a), 0);
  EXPECT_EQ(both.attention.drop(), StepStatus::kOk);
  EXPECT_LE(both.step(graph, chunks, Phase::kPrompt), kBound);
}

TEST(GgmlAttention, WhatBeginRefusesIsTheCaches) {
  const ModelShape shape = two_layers(2, 32, 32);
  GgmlAttention<f16> attention(shape, HeadPlan(shape), {.max_context = 64, .max_chunk = 16}, 1);
  const SequenceId a = *attention.cache().add_sequence();
  EXPECT_EQ(attention.begin({{a, 17}}), StepStatus::kChunkTooLong);
  EXPECT_EQ(attention.begin({{SequenceId{}, 1}}), StepStatus::kInvalidChunk);
}

TEST(GgmlAttention, ADroppedStepLeavesNoTrace) {
  const ModelShape shape = two_layers(2, 32, 32);
  Beside<> both(shape);
  const SequenceId a = both.add();
  EXPECT_LE(both.step({{a, new_tokens(60)}}, Phase::kPrompt, Layout::kFused), kBound);
  const std::size_t held = both.attention.cache().held_bytes(a);
  Graph graph(both.attention, shape, 9, Layout::kFused);
  ASSERT_EQ(both.attention.begin({{a, 9}}), StepStatus::kOk);
  for (Graph::Layer& layer : graph.layers) {
    for (ggml_tensor* tensor : {layer.q, layer.k, layer.v}) {
      write(tensor, std::vector<float>(static_cast<std::size_t>(ggml_nelements(tensor)),
                                       std::numeric_limits<float>::quiet_NaN()));
    }
  }
  graph.compute(kThreads);
  EXPECT_EQ(both.attention.drop(), StepStatus::kOk);
  EXPECT_EQ(both.attention.cache().held_bytes(a), held);
  EXPECT_LE(both.step({{a, new_tokens(9)}}, Phase::kDecode, Layout::kFused), kBound);
}

TEST(GgmlAttention, RollsBackBetweenGraphs) {
  Beside<> both(two_layers(2, 32, 32));
  const SequenceId a = both.add();
  EXPECT_LE(both.step({{a, new_tokens(80)}}, Phase::kPrompt, Layout::kFused), kBound);
  EXPECT_LE(both.step({{a, new_tokens(4)}}, Phase::kDecode, Layout::kFused), kBound);
  ASSERT_EQ(both.attention.cache().rollback(a, 81), StepStatus::kOk);
  ASSERT_EQ(both.model.rollback(a, 81), StepStatus::kOk);
  EXPECT_LE(both.step({{a, new_tokens(2)}}, Phase::kDecode, Layout::kFused), kBound);
}

TEST(GgmlAttention, HiddenRowsMayBeAnything) {
  const ModelShape shape = ModelShape::uniform(1, 2, 1, 32);
  HeadPlan plan(shape);
  plan.set(0, 0, KeepWindow{{0, 2}});
  GgmlAttention<f16> attention(shape, plan, {.page_tokens = 16, .max_context = 100}, 1);
  const SequenceId a = *attention.cache().add_sequence();
  Graph graph(attention, shape, 1, Layout::kDense);
  for (int i = 0; i < 40; ++i) {
    const float bad = i < 30 ? std::numeric_limits<float>::infinity() : 1.0F;
    write(graph.layers[0].q, std::vector<float>(64, 0.5F));
    write(graph.layers[0].k, std::vector<float>(32, bad));
    write(graph.layers[0].v, std::vector<float>(32, i < 30 ? bad - bad : 1.0F));
    ASSERT_EQ(attention.begin({{a, 1}}), StepStatus::kOk);
    graph.compute(1);
    ASSERT_EQ(attention.commit(), StepStatus::kOk);
  }
  for (const float x : read(graph.layers[0].out)) EXPECT_EQ(x, 1.0F);
}

TEST(GgmlAttention, AllocatesNothingInAStep) {
  const ModelShape shape = two_layers(2, 32, 32);
  Beside<> both(shape, PrefillMode::kWindowed, 1);
  const SequenceId a = both.add();
  Graph graph(both.attention, shape, 50, Layout::kFused);
  EXPECT_LE(both.step(graph, {{a, new_tokens(50)}}, Phase::kPrompt, 1), kBound);
  // ggml allocates for a graph; its nodes do not: they are run here as its threads run them.
  EXPECT_EQ(allocations_in([&] {
              ASSERT_EQ(both.attention.begin({{a, 50}}), StepStatus::kOk);
              for (const Graph::Layer& layer : graph.layers) {
                struct {
                  ggml_custom_op_t fun;
                  int n_tasks;
                  void* userdata;
                } op;
                static_assert(sizeof op <= sizeof layer.out->op_params);
                std::memcpy(&op, layer.out->op_params, sizeof op);
                op.fun(layer.out, 0, 1, op.userdata);
              }
              ASSERT_EQ(both.attention.commit(), StepStatus::kOk);
            }),
            0U);
}

// What building a graph refuses -------------------------------------------------------------------

class GgmlRefusals : public ::testing::Test {
 protected:
  std::string refusal(const std::function<void(Graph::Layer&)>& change, GgmlSoftmax wanted = {},
                      int layer = 0) {
    Graph::Layer of = graph.inputs(shape.layer(0), 5, Layout::kDense);
    if (change) change(of);
    return testing::message_of<ConfigError>(
        [&] { attention.attend(graph.ctx.get(), layer, of.q, of.k, of.v, wanted); });
  }
  ggml_tensor* tensor(ggml_type type, std::int64_t a, std::int64_t b, std::int64_t c,
                      std::int64_t d = 1) {
    return ggml_new_tensor_4d(graph.ctx.get(), type, a, b, c, d);
  }

  const ModelShape shape{{{2, 3, 32, 48}}};
  GgmlAttention<f16> attention{shape, HeadPlan(shape), {.max_context = 64}, 1};
  Graph graph{attention, shape, 5, Layout::kDense};
};

TEST_F(GgmlRefusals, NameTheSoftmaxThatTheShapeHasNot) {
  const auto none = nullptr;
  EXPECT_EQ(refusal(none, {.scale = 0.125F}),
            "layer 0: the model scales q.k by 0.125, the shape by 0.176776692 "
            "(LayerShape::sm_scale)");
  EXPECT_EQ(refusal(none, {.max_bias = 8.0F}),
            "layer 0: the model has ALiBi's max_bias 8 (0: none), the shape no slopes "
            "(SoftmaxOptions::alibi_slopes)");
  EXPECT_EQ(refusal(none, {.logit_softcap = 50.0F}),
            "layer 0: the model caps logits at 50, the shape at 0 (SoftmaxOptions::soft_cap; 0: "
            "not)");
  EXPECT_EQ(refusal(none, {.sinks = tensor(GGML_TYPE_F32, 6, 1, 1)}),
            "layer 0: the model has 6 learned sink logits, the shape 0 (SoftmaxOptions::sinks)");
}

TEST_F(GgmlRefusals, NameTheSoftmaxThatTheModelHasNot) {
  LayerShape layer = shape.layer(0);
  layer.softmax = {.soft_cap = 30.0F,
                   .sinks = std::vector<float>(6, 0.5F),
                   .alibi_slopes = alibi_slopes_of(8.0F, 6)};
  const ModelShape all({layer});
  GgmlAttention<f16> of_all(all, HeadPlan(all), {.max_context = 64}, 1);
  const Graph::Layer of = graph.inputs(layer, 5, Layout::kDense);
  const auto attend = [&](GgmlSoftmax wanted) {
    of_all.attend(graph.ctx.get(), 0, of.q, of.k, of.v, wanted);
  };
  const GgmlSoftmax right{
      .max_bias = 8.0F, .logit_softcap = 30.0F, .sinks = tensor(GGML_TYPE_F32, 6, 1, 1)};
  EXPECT_NO_THROW(attend(right));
  for (int wrong = 0; wrong < 4; ++wrong) {
    GgmlSoftmax wanted = right;
    if (wrong == 0) wanted.max_bias = 0.0F;
    if (wrong == 1) wanted.max_bias = 4.0F;
    if (wrong == 2) wanted.logit_softcap = 0.0F;
    if (wrong == 3) wanted.sinks = nullptr;
    EXPECT_THROW(attend(wanted), ConfigError) << wrong;
  }
}

TEST_F(GgmlRefusals, NameTheTensorThatDoesNotFit) {
  EXPECT_EQ(refusal([&](auto& x) { x.q = tensor(GGML_TYPE_F32, 32, 2, 5); }),
            "layer 0: q must be [32, 6, 5], got [32, 2, 5, 1]");
  EXPECT_EQ(refusal([&](auto& x) { x.k = tensor(GGML_TYPE_F32, 48, 2, 5); }),
            "layer 0: k must be [32, 2, 5], got [48, 2, 5, 1]");
  EXPECT_EQ(refusal([&](auto& x) { x.v = tensor(GGML_TYPE_F32, 48, 2, 4); }),
            "layer 0: v must be [48, 2, 5], got [48, 2, 4, 1]");
  EXPECT_EQ(refusal([&](auto& x) { x.v = tensor(GGML_TYPE_F32, 48, 2, 5, 2); }),
            "layer 0: v must be [48, 2, 5], got [48, 2, 5, 2]");
  EXPECT_EQ(refusal([&](auto& x) { x.k = tensor(GGML_TYPE_Q8_0, 32, 2, 5); }),
            "layer 0: k must be of f32, f16 or bf16, got q8_0");
  EXPECT_EQ(refusal(nullptr, {}, 1), "layer must be in [0, 0], got 1");
}

TEST_F(GgmlRefusals, AreNoneForTheShapesOwn) {
  Graph::Layer of = graph.inputs(shape.layer(0), 5, Layout::kDense);
  for (const float scale :
       {0.0F, shape.layer(0).scale(), std::nextafter(shape.layer(0).scale(), 1.0F)}) {
    EXPECT_NO_THROW(attention.attend(graph.ctx.get(), 0, of.q, of.k, of.v, {.scale = scale}));
  }
}

TEST(GgmlAttention, RefusesNoThreads) {
  const ModelShape shape = two_layers(1, 16, 16);
  EXPECT_THROW(GgmlAttention<f16>(shape, HeadPlan(shape), {.max_context = 8}, 0), ConfigError);
}

}  // namespace
}  // namespace headwise::test
