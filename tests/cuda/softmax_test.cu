// SPDX-License-Identifier: MIT
// Softmaxes that have more than a scale: soft-cap, ALiBi and learned sinks, alone and together, in
// every kernel.
#include <gtest/gtest.h>

#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "cuda/device_model.cuh"
#include "headwise/cache/cuda/class_state.cuh"
#include "headwise/cache/keep/keep.hpp"

namespace headwise::test {
namespace {

template <class Row>
using ShapedModel = DeviceModel<Row, cuda::ShapedDims<Row>, Row, cuda::ShapedSoftmax>;
template <class Row>
using SinkModel = DeviceModel<Row, cuda::SinkDims<Row>, Row, cuda::SinkSoftmax>;

/// The two widths of ShapedDims: of warpgroup prefill, and not.
template <class Row>
constexpr int kWide = std::same_as<Row, f16> ? 64 : 128;
template <class Row>
constexpr int kOther = std::same_as<Row, f16> ? 80 : 256;
template <class Row>
constexpr int kSinkWidth = std::same_as<Row, f16> ? 64 : 80;

/// About as large as the logarithm of a long row's sum, so that a sink left out or added twice is
/// seen; different from head to head.
const std::vector<float> kSinkLogits{6.0F, 3.5F, 8.0F};
/// Little more than scores' standard deviation: most of them are bent.
constexpr float kSoftCap = 3.0F;

/// Each option alone, and all of them.
std::vector<DeviceModelOptions> with_each_option(DeviceModelOptions base) {
  std::vector<DeviceModelOptions> all(4, base);
  for (const std::size_t i : {0, 3}) all[i].soft_cap = kSoftCap;
  for (const std::size_t i : {1, 3}) all[i].alibi = true;
  for (const std::size_t i : {2, 3}) all[i].sinks = kSinkLogits;
  return all;
}
DeviceModelOptions with_all(DeviceModelOptions base) { return with_each_option(base).back(); }
std::string name_of(const DeviceModelOptions& o) {
  return "width " + std::to_string(o.dim) + " group " + std::to_string(o.group_size) + " cap " +
         std::to_string(o.soft_cap) + (o.alibi ? " ALiBi" : "") + (o.sinks.empty() ? "" : " sinks");
}

template <class Row>
class CudaSoftmax : public ::testing::Test {};
TYPED_TEST_SUITE(CudaSoftmax, DeviceRows);

/// One worker's rows and a block's, in place and around the ring.
TYPED_TEST(CudaSoftmax, DecodesAtEveryBoundaryLength) {
  for (const DeviceModelOptions& options : with_each_option(
           {.dim = kWide<TypeParam>, .group_size = 4, .max_context = 300, .max_rollback = 3})) {
    SCOPED_TRACE(name_of(options));
    ShapedModel<TypeParam> model(options);
    if (!has_device()) continue;
    const SequenceId id = model.add();
    for (int i = 0; i < 300; ++i) model.step({{id, 1}}, Phase::kDecode);
  }
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaSoftmax, EveryGroupAndWidthEqualsTheOracle) {
  for (const int dim : {kWide<TypeParam>, kOther<TypeParam>}) {
    for (const int group : {1, 3, 8, 9, 16, 17, 33, 64}) {
      for (const DeviceModelOptions& options :
           with_each_option({.dim = dim, .group_size = group, .max_context = 1024})) {
        SCOPED_TRACE(name_of(options));
        ShapedModel<TypeParam> model(options);
        if (!has_device()) continue;
        const SequenceId id = model.add();
        model.step({{id, 333}}, Phase::kPrompt, 3);
        for (const std::int64_t n : {1, 2, 4, 7}) model.step({{id, n}}, Phase::kDecode);
        model.step({{id, 70}}, Phase::kPrompt, 6);
      }
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

/// Two items a KV head in decode, shares of its heads in prefill.
TYPED_TEST(CudaSoftmax, LargeGroupsHaveEachHeadsOwn) {
  for (const int group : {65, 100, 127, 128}) {
    const DeviceModelOptions options =
        with_all({.dim = kWide<TypeParam>, .group_size = group, .max_context = 1024});
    SCOPED_TRACE(name_of(options));
    ShapedModel<TypeParam> model(options);
    if (!has_device()) continue;
    const SequenceId id = model.add();
    model.step({{id, 333}}, Phase::kPrompt, 3);
    model.step({{id, 1}}, Phase::kDecode);
    model.step({{id, 4}}, Phase::kDecode);
    model.step({{id, 1}}, Phase::kDecode);
  }
  HEADWISE_NEEDS_DEVICE();
}

/// Slots in every order around sinks, windows, pages and a second ring: ALiBi needs positions.
TYPED_TEST(CudaSoftmax, SeveralTokensAtEveryBoundaryLengthEqualTheOracle) {
  for (const Window window : {Window{4, 60}, Window{60, 4}, Window{0, 65}, Window{64, 1}}) {
    for (const std::int64_t rollback : {0, 16}) {
      for (const int group : {1, 4}) {
        const PrefillMode mode = group == 1 ? PrefillMode::kWindowed : PrefillMode::kChunkCausal;
        SCOPED_TRACE(std::to_string(window.sink) + "+" + std::to_string(window.recent) +
                     " rollback " + std::to_string(rollback) + " group " + std::to_string(group));
        ShapedModel<TypeParam> model(with_all({.dim = kWide<TypeParam>,
                                               .group_size = group,
                                               .window = window,
                                               .max_context = 512,
                                               .max_rollback = rollback,
                                               .prefill = mode}));
        if (!has_device()) continue;
        for (const std::int64_t past : {0, 1, 3, 4, 5, 59, 63, 64, 65, 66, 127, 128, 129, 131}) {
          for (const std::int64_t n : {2, 5, 16}) {
            SCOPED_TRACE(past);
            const SequenceId id = model.add();
            if (past > 0) model.step({{id, past}}, Phase::kPrompt, 1);
            model.step({{id, n}}, n == 5 ? Phase::kPrompt : Phase::kDecode);
            model.step({{id, n}}, Phase::kDecode, 3);
            model.step({{id, 1}}, Phase::kDecode);
            model.release(id);
          }
        }
      }
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaSoftmax, EveryChunkingOfAPromptEqualsTheOracle) {
  for (const int dim : {kWide<TypeParam>, kOther<TypeParam>}) {
    for (const PrefillMode mode : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
      for (const std::int64_t chunk : {33, 64, 100, 128, 200, 517}) {
        const DeviceModelOptions options = with_all(
            {.dim = dim, .group_size = 2, .window = {16, 100}, .max_rollback = 5, .prefill = mode});
        SCOPED_TRACE(name_of(options) + " chunk " + std::to_string(chunk));
        ShapedModel<TypeParam> model(options);
        if (!has_device()) continue;
        const SequenceId id = model.add();
        for (int i = 0; i < 3; ++i) model.step({{id, chunk}}, Phase::kPrompt, 12);
        model.step({{id, 1}}, Phase::kPrompt);
      }
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

/// Items that all blocks share, merged by the last of them or in slices, and cut prefill tiles: a
/// sink is added once.
TYPED_TEST(CudaSoftmax, SharedRowsHaveOneSink) {
  for (const int group : {1, 4, 8}) {
    DeviceModelOptions options = with_all(
        {.dim = kWide<TypeParam>, .group_size = group, .window = {64, 256}, .max_context = 40000});
    for (const bool alibi : {false, true}) {  // without it all of a long row counts
      options.alibi = alibi;
      SCOPED_TRACE(name_of(options));
      ShapedModel<TypeParam> model(options);
      if (!has_device()) continue;
      const SequenceId id = model.add();
      for (int i = 0; i < 3; ++i) model.step({{id, 10007}}, Phase::kPrompt, 1);
      for (const std::int64_t n : {1, 2, 4, 8}) model.step({{id, n}}, Phase::kDecode, 2);
      model.step({{id, 512}}, Phase::kPrompt, 2);
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

/// Items of one worker each.
TYPED_TEST(CudaSoftmax, LargeBatchesEqualTheOracle) {
  for (const int group : {4, 9, 32, 64}) {
    const DeviceModelOptions options = with_all({.dim = kWide<TypeParam>,
                                                 .group_size = group,
                                                 .num_kv_heads = 2,
                                                 .window = {16, 500},
                                                 .max_context = 2100,
                                                 .max_sequences = 24});
    SCOPED_TRACE(name_of(options));
    ShapedModel<TypeParam> model(options);
    if (!has_device()) continue;
    std::vector<SequenceChunk> prompts;
    std::vector<SequenceChunk> tokens;
    for (int i = 0; i < 24; ++i) {
      const SequenceId id = model.add();
      prompts.push_back({id, 600 + i * 397 % 1400});
      tokens.push_back({id, group == 4 ? 1 + i % 16 : 1});
    }
    model.step(prompts, Phase::kPrompt, 1);
    model.step(tokens, Phase::kDecode, 1);
  }
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaSoftmax, ShortSequencesOfEveryLengthEqualTheOracle) {
  const DeviceModelOptions options = with_all({.dim = kWide<TypeParam>,
                                               .group_size = 2,
                                               .num_kv_heads = 8,
                                               .window = {16, 64},
                                               .max_context = 256,
                                               .max_sequences = 96});
  ShapedModel<TypeParam> model(options);
  HEADWISE_NEEDS_DEVICE();
  std::vector<SequenceChunk> prompts;
  std::vector<SequenceChunk> tokens;
  for (int i = 0; i < 96; ++i) {
    const SequenceId id = model.add();
    prompts.push_back({id, 1 + i * 37 % 200});
    tokens.push_back({id, 1 + i * 5 % 32});
  }
  model.step(prompts, Phase::kPrompt, 1);
  model.step(tokens, Phase::kDecode, 4);
}

/// Two layers of different kinds of heads share the launches' lists of work, not their logits.
TYPED_TEST(CudaSoftmax, MixedStepsOfTwoLayersEqualTheOracle) {
  for (const DeviceModelOptions& options : with_each_option({.dim = kWide<TypeParam>,
                                           .group_size = 4,
                                           .num_kv_heads = 4,
                                           .num_layers = 2,
                                           .window = {16, 100},
                                           .max_context = 3000,
                                           .max_sequences = 7})) {
    SCOPED_TRACE(name_of(options));
    ShapedModel<TypeParam> model(options);
    if (!has_device()) continue;
    std::vector<SequenceId> ids;
    std::vector<SequenceChunk> chunks;
    for (const std::int64_t n : {1, 15, 16, 200, 1500, 2500, 64}) {
      ids.push_back(model.add());
      chunks.push_back({ids.back(), n});
    }
    model.step(chunks, Phase::kPrompt, 2);
    model.step({{ids[0], 1}, {ids[5], 3}, {ids[1], 8}, {ids[2], 0}, {ids[3], 16}, {ids[4], 40}},
               Phase::kDecode, 16);
    model.step({{ids[6], 2}, {ids[5], 16}, {ids[0], 7}, {ids[4], 4}, {ids[3], 1}}, Phase::kDecode);
  }
  HEADWISE_NEEDS_DEVICE();
}

/// Among them rows of prefill tiles that are attended once more, in double.
TYPED_TEST(CudaSoftmax, HiddenRowsContributeNothing) {
  for (const int dim : {kWide<TypeParam>, kOther<TypeParam>}) {
    for (const float value : {kInf, -kInf, kNan}) {
      const DeviceModelOptions options =
          with_all({.dim = dim, .group_size = 4, .max_context = 512, .max_rollback = 9});
      SCOPED_TRACE(name_of(options) + " value " + std::to_string(value));
      ShapedModel<TypeParam> model(options);
      if (!has_device()) continue;
      const SequenceId id = model.add();
      model.plant_v(72, value);  // the last token's
      model.plant_k(71, kNan);
      model.plant_v(7, value);  // leaves the window
      model.step({{id, 73}}, Phase::kPrompt);
      model.plant_v(15, value);
      model.step({{id, 16}}, Phase::kDecode);
      model.plant_k(9, value);
      model.step({{id, 10}}, Phase::kDecode);
      for (int i = 0; i < 3; ++i) model.step({{id, 1}}, Phase::kDecode);
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

/// Zeros, with a sink or without one; capped, they are scores like others.
TYPED_TEST(CudaSoftmax, ScoresThatAreAllMinusInfinity) {
  for (DeviceModelOptions options :
       with_each_option({.dim = kWide<TypeParam>, .group_size = 4, .max_context = 512})) {
    for (const int dim : {kWide<TypeParam>, kOther<TypeParam>}) {
      options.dim = dim;
      SCOPED_TRACE(name_of(options));
      ShapedModel<TypeParam> model(options);
      if (!has_device()) continue;
      const SequenceId id = model.add();
      for (const std::int64_t n : {16, 70, 3, 16, 1}) {
        for (std::int64_t row = 0; row < n; ++row) {
          model.plant_q(row, -1.0F);
          model.plant_k(row, kInf);
        }
        model.step({{id, n}}, Phase::kDecode);
      }
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaSoftmax, SinksFarFromAllScoresEqualTheOracle) {
  constexpr float kMost = std::numeric_limits<float>::max();
  for (const float sink : {-kMost, -1e6F, 1e6F, kMost}) {
    SCOPED_TRACE(sink);
    ShapedModel<TypeParam> model(
        {.dim = kWide<TypeParam>, .group_size = 4, .max_context = 512, .sinks = {sink}});
    if (!has_device()) continue;
    const SequenceId id = model.add();
    for (const std::int64_t n : {1, 100, 7, 1}) model.step({{id, n}}, Phase::kDecode);
  }
  HEADWISE_NEEDS_DEVICE();
}

/// From a cap that all scores end at to one that none feels.
TYPED_TEST(CudaSoftmax, CapsOfAnySizeEqualTheOracle) {
  constexpr float kMost = std::numeric_limits<float>::max();
  constexpr float kLeast = std::numeric_limits<float>::min();
  for (const float cap : {kLeast, 0.1F, 1.0F, 50.0F, 1e6F, kMost}) {
    SCOPED_TRACE(cap);
    ShapedModel<TypeParam> model(
        {.dim = kWide<TypeParam>, .group_size = 4, .max_context = 512, .soft_cap = cap});
    if (!has_device()) continue;
    const SequenceId id = model.add();
    for (const std::int64_t n : {1, 100, 7, 1}) model.step({{id, n}}, Phase::kDecode);
  }
  HEADWISE_NEEDS_DEVICE();
}

/// Whoever can shape scores attends layers that have nothing to shape.
TYPED_TEST(CudaSoftmax, LayersWithAScaleAloneEqualTheOracle) {
  ShapedModel<TypeParam> model({.dim = kWide<TypeParam>, .group_size = 4, .max_context = 512});
  SinkModel<TypeParam> other({.dim = kSinkWidth<TypeParam>, .group_size = 4, .max_context = 512});
  HEADWISE_NEEDS_DEVICE();
  const auto walk = [](auto& m) {
    const SequenceId id = m.add();
    for (const std::int64_t n : {1, 100, 7, 1}) m.step({{id, n}}, Phase::kDecode);
  };
  walk(model);
  walk(other);
}

TYPED_TEST(CudaSoftmax, KernelsWithSinksAloneEqualTheOracle) {
  for (const int group : {1, 8, 16, 64}) {
    const DeviceModelOptions options{.dim = kSinkWidth<TypeParam>,
                                     .group_size = group,
                                     .window = {4, 124},
                                     .max_context = 24000,
                                     .sinks = kSinkLogits};
    SCOPED_TRACE(name_of(options));
    SinkModel<TypeParam> model(options);
    if (!has_device()) continue;
    const SequenceId id = model.add();
    for (const std::int64_t n : {1, 2, 5, 333}) model.step({{id, n}}, Phase::kDecode, 9);
    for (int i = 0; i < 2; ++i) model.step({{id, 10007}}, Phase::kPrompt, 1);
    for (const std::int64_t n : {1, 4, 512, 1}) model.step({{id, n}}, Phase::kDecode, 1);
  }
  HEADWISE_NEEDS_DEVICE();
}

TEST(CudaSoftmaxIo, FloatsAreTakenAndGiven) {
  DeviceModel<f16, cuda::HeadDims<64>, f32, cuda::ShapedSoftmax> model(
      with_all({.group_size = 4, .max_context = 512, .max_converted_rows = 128}));
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  model.step({{id, 100}}, Phase::kPrompt, 2);
  for (const std::int64_t n : {1, 2, 4, 7, 16}) model.step({{id, n}}, Phase::kDecode);
}

TEST(CudaSoftmaxKind, RefusesWhatItsKernelsHaveNot) {
  const cuda::DeviceLimits limits{132, 232448, true};
  const auto refuses = [&]<class Kind>(Kind, const SoftmaxOptions& softmax) {
    const ModelShape shape({{2, 1, 64, 64, 0.0F, softmax}});
    try {
      (void)cuda::estimate_device<f16, cuda::HeadDims<64>, Kind>(shape, HeadPlan(shape),
                                                                 {.max_context = 100}, limits);
    } catch (const ConfigError&) {
      return true;
    }
    return false;
  };
  const SoftmaxOptions cap{.soft_cap = 50.0F};
  const SoftmaxOptions sinks{.sinks = {0.0F, 0.0F}};
  const SoftmaxOptions alibi{.alibi_slopes = {0.5F, 0.25F}};
  for (const SoftmaxOptions& softmax : {cap, sinks, alibi}) {
    EXPECT_TRUE(refuses(cuda::PlainSoftmax{}, softmax));
    EXPECT_FALSE(refuses(cuda::ShapedSoftmax{}, softmax));
  }
  EXPECT_TRUE(refuses(cuda::SinkSoftmax{}, cap));
  EXPECT_FALSE(refuses(cuda::SinkSoftmax{}, sinks));
  EXPECT_TRUE(refuses(cuda::SinkSoftmax{}, alibi));
  EXPECT_FALSE(refuses(cuda::PlainSoftmax{}, {}));
}

TEST(CudaSoftmaxKind, CapsAsDoubleDoes) {
  for (const float soft_cap : {std::numeric_limits<float>::min(), 0.5F, 30.0F, 50.0F, 1e6F,
                               std::numeric_limits<float>::max()}) {
    cuda::SoftmaxArgs args;
    args.cap = cuda::detail::in_log2(soft_cap);
    args.inverse_cap = 1.0F / args.cap;
    for (float x = -1000.0F; x <= 1000.0F; x += 0.37F) {
      const double cap = static_cast<double>(soft_cap) * 1.4426950408889634;
      const double wanted = cap * std::tanh(static_cast<double>(x) / cap);
      EXPECT_NEAR(args.capped(x), wanted, 1e-6 * std::fabs(wanted) + 1e-6)
          << soft_cap << " of " << x;
    }
    EXPECT_EQ(args.capped(-kInf), -args.cap);
    EXPECT_TRUE(std::isnan(args.capped(kNan)));
  }
}

/// A chunk's rows before it, and a single token's own: where the rule has stored position p, the
/// piece says p.
TEST(CudaSoftmaxKind, APieceKnowsThePositionsOfItsSlots) {
  const auto check = [](const auto& rule, std::int64_t length, std::int64_t num_tokens) {
    const auto state =
        cuda::class_state(rule, {}, {length, length, length + num_tokens}, Phase::kDecode);
    const SlotMap map{state.append_entry, state.sink_slots, state.turn};
    cuda::Piece piece;
    piece.length = static_cast<std::int32_t>(length);
    piece.own_rows = static_cast<std::int16_t>(num_tokens == 1 ? 0 : num_tokens);
    piece.own_slot = static_cast<std::int32_t>(map.slot(Pos{length}).value);
    piece.ring_begin = state.sink_slots;
    piece.ring_end = state.turn > 0 ? state.sink_slots + state.turn : 0x7FFFFFFF;
    for (std::int64_t p = 0; p < length + (num_tokens == 1 ? 1 : 0); ++p) {
      if (!map.keeps(Pos{p}, length + (num_tokens == 1 ? 1 : 0))) continue;
      const auto slot = static_cast<int>(map.slot(Pos{p}).value);
      ASSERT_EQ(piece.position_in(slot), p - length) << p << " of " << length;
    }
  };
  for (const Window window : {Window{4, 60}, Window{0, 64}, Window{64, 256}, Window{3, 1}}) {
    for (const std::int64_t rollback : {0, 7}) {
      const WindowRule rule =
          WindowRule::make(KeepWindow{window}, {64, 2000, rollback, 2000, PrefillMode::kWindowed});
      for (std::int64_t n = 0; n < 1000; ++n) {
        check(rule, n, 1);
        check(rule, n, 5);
      }
    }
  }
  const EverythingRule all = EverythingRule::make({}, {64, 2000, 0, 2000, PrefillMode::kWindowed});
  for (const std::int64_t n : {0, 1, 63, 64, 1000}) {
    check(all, n, 1);
    check(all, n, 5);
  }
}

}  // namespace
}  // namespace headwise::test
