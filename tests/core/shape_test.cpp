// SPDX-License-Identifier: MIT
#include "headwise/core/shape.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <climits>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace headwise {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

TEST(ModelShape, UniformSharesKvHeadsAmongGroups) {
  const ModelShape shape = ModelShape::uniform(3, 28, 4, 128);
  EXPECT_EQ(shape.num_layers(), 3);
  for (const LayerShape& layer : shape.layers()) {
    EXPECT_EQ(layer.num_kv_heads, 4);
    EXPECT_EQ(layer.group_size, 7);
    EXPECT_EQ(layer.num_qo_heads(), 28);
    EXPECT_EQ(layer.k_dim, 128);
    EXPECT_EQ(layer.v_dim, 128);
  }
}

TEST(ModelShape, LayersNeedNotBeAlike) {
  const ModelShape shape({{.num_kv_heads = 8, .group_size = 4, .k_dim = 128, .v_dim = 128},
                          {.num_kv_heads = 2, .group_size = 5, .k_dim = 192, .v_dim = 128}});
  EXPECT_EQ(shape.layer(1).num_qo_heads(), 10);
  EXPECT_EQ(shape.layer(1).k_dim, 192);
  EXPECT_NE(shape, ModelShape::uniform(2, 32, 8, 128));
  EXPECT_EQ(ModelShape::uniform(2, 32, 8, 128), ModelShape::uniform(2, 32, 8, 128));
}

TEST(ModelShape, ScaleDefaultsToTheInverseRootOfTheWidth) {
  EXPECT_FLOAT_EQ((LayerShape{1, 1, 64, 64}.scale()), 0.125F);
  EXPECT_FLOAT_EQ((LayerShape{1, 1, 64, 64, 0.5F}.scale()), 0.5F);
}

TEST(ModelShape, AcceptsTheUsualWidths) {
  for (const int dim : {16, 32, 64, 80, 96, 128, 192, 256}) {
    EXPECT_NO_THROW(ModelShape::uniform(1, 1, 1, dim)) << dim;
  }
}

TEST(ModelShape, ErrorsNameLayerValueAndLimit) {
  EXPECT_THAT([] { ModelShape(std::vector<LayerShape>{}); },
              ThrowsMessage<ConfigError>(HasSubstr("at least one layer, got 0")));
  EXPECT_THAT(
      [] {
        ModelShape({{1, 1, 16, 16}, {0, 1, 16, 16}});
      },
      ThrowsMessage<ConfigError>(
          AllOf(HasSubstr("layer 1"), HasSubstr("got 0"), HasSubstr("latent"))));
  EXPECT_THAT(
      [] {
        ModelShape({{1, 0, 16, 16}});
      },
      ThrowsMessage<ConfigError>(AllOf(HasSubstr("group_size"), HasSubstr("got 0"))));
  for (const int dim : {-16, 0, 8, 72, INT_MAX - 15}) {
    const std::string got = "got " + std::to_string(dim);
    EXPECT_THAT(
        [dim] {
          ModelShape({{1, 1, dim, 16}});
        },
        ThrowsMessage<ConfigError>(AllOf(HasSubstr("16"), HasSubstr(got))));
    EXPECT_THAT(
        [dim] {
          ModelShape({{1, 1, 16, dim}});
        },
        ThrowsMessage<ConfigError>(AllOf(HasSubstr("16"), HasSubstr(got))));
  }
  EXPECT_THAT([] { ModelShape::uniform(0, 8, 8, 64); },
              ThrowsMessage<ConfigError>(AllOf(HasSubstr("num_layers"), HasSubstr("got 0"))));
  EXPECT_THAT([] { ModelShape::uniform(1, 10, 4, 64); },
              ThrowsMessage<ConfigError>(AllOf(HasSubstr("4"), HasSubstr("10"))));
  EXPECT_THAT([] { ModelShape::uniform(1, 8, 0, 64); }, ThrowsMessage<ConfigError>(HasSubstr("0")));
  EXPECT_THROW(ModelShape::uniform(1, 0, 4, 64), ConfigError);  // 0 is a multiple, but no group
}

TEST(ModelShape, RefusesAnotherWidthWithTheWayOut) {
  for (const auto& [dim, padded] : {std::pair{100, "112"}, {120, "128"}, {59, "64"}, {1, "16"}}) {
    EXPECT_THAT([dim = dim] { ModelShape::uniform(1, 1, 1, dim); },
                ThrowsMessage<ConfigError>(AllOf(
                    HasSubstr("got " + std::to_string(dim)),
                    HasSubstr("pad rows with zeros to " + std::string(padded)),
                    HasSubstr("sm_scale"), HasSubstr("1 / sqrt(" + std::to_string(dim) + ")"))));
  }
}

TEST(ModelShape, RefusesNumbersThatOverflow) {
  EXPECT_THAT([] { ModelShape::uniform(INT_MAX, 8, 8, 64); },
              ThrowsMessage<ConfigError>(AllOf(HasSubstr("num_layers"), HasSubstr("2147483647"),
                                               HasSubstr(std::to_string(kMaxLayers)))));
  EXPECT_THAT([] { ModelShape::uniform(2, -8, 2, 64); },
              ThrowsMessage<ConfigError>(AllOf(HasSubstr("num_qo_heads"), HasSubstr("got -8"))));
  EXPECT_THAT([] { ModelShape::uniform(1, INT_MAX, 1, 64); },
              ThrowsMessage<ConfigError>(AllOf(HasSubstr("num_qo_heads"), HasSubstr("65536"))));
  for (const LayerShape& layer : std::initializer_list<LayerShape>{
           {.num_kv_heads = 1 << 16, .group_size = 1 << 16, .k_dim = 16, .v_dim = 16},
           {.num_kv_heads = INT_MAX, .group_size = 2, .k_dim = 16, .v_dim = 16},
           {.num_kv_heads = 1, .group_size = INT_MAX, .k_dim = 16, .v_dim = 16},
           {.num_kv_heads = 1, .group_size = 1, .k_dim = 1 << 30, .v_dim = 1 << 30},
           {.num_kv_heads = 1, .group_size = 1, .k_dim = 16, .v_dim = INT_MAX - 15}}) {
    EXPECT_THROW(ModelShape({layer}), ConfigError);
  }
  const LayerShape most{kMaxHeads, 1, 16, 16};
  EXPECT_THAT([&] { ModelShape(std::vector<LayerShape>(257, most)); },
              ThrowsMessage<ConfigError>(AllOf(HasSubstr("all layers"), HasSubstr("16842752"))));
  EXPECT_NO_THROW(ModelShape({{kMaxHeads, 1, kMaxDim, kMaxDim}}));
}

TEST(ModelShape, RefusesScalesThatAreNotFinite) {
  for (const float scale :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    EXPECT_THAT(
        [&] {
          ModelShape({{1, 1, 16, 16, scale}});
        },
        ThrowsMessage<ConfigError>(HasSubstr("sm_scale must be finite")));
  }
}

TEST(ModelShape, HardenedBuildsStopAtALayerOutOfRange) {
#if HEADWISE_HARDENED
  const ModelShape shape = ModelShape::uniform(3, 8, 2, 64);
  for (const int layer : {-1, 3, INT_MAX, INT_MIN}) {
    EXPECT_DEATH((void)shape.layer(layer), "layer out of range");
  }
#else
  GTEST_SKIP() << "release builds do not check";
#endif
}

/// A layer of 2 KV heads, 3 query heads each.
LayerShape six_heads() { return {.num_kv_heads = 2, .group_size = 3, .k_dim = 16, .v_dim = 32}; }

TEST(ModelShape, TakesWhatASoftmaxHasBesides) {
  LayerShape layer = six_heads();
  layer.softmax = {.soft_cap = 50.0F,
                   .sinks = {0.0F, -3.0F, 1.0F, 2.0F, 0.5F, 90.0F},
                   .alibi_slopes = {1.0F, 0.5F, 0.25F, 0.0F, -1.0F, 2.0F}};
  const ModelShape shape({layer, six_heads()});
  EXPECT_EQ(shape.layer(0).softmax.sinks[5], 90.0F);
  EXPECT_NE(shape, ModelShape({six_heads(), six_heads()}));
}

TEST(ModelShape, RefusesSoftmaxOptionsOutOfTheirRange) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const auto refuses = [](const SoftmaxOptions& softmax, const std::string& text,
                          const std::string& value) {
    LayerShape layer = six_heads();
    layer.softmax = softmax;
    EXPECT_THAT(
        [&] {
          ModelShape({six_heads(), layer});
        },
        ThrowsMessage<ConfigError>(
            AllOf(HasSubstr("layer 1"), HasSubstr(text), HasSubstr("got " + value))));
  };
  refuses({.soft_cap = -1.0F}, "soft_cap must be 0 or a finite number of at least 1.17", "-1");
  refuses({.soft_cap = 1e-40F}, "soft_cap", "9.99994");
  refuses({.soft_cap = nan}, "soft_cap", "");
  refuses({.soft_cap = inf}, "soft_cap", "inf");
  refuses({.sinks = {1.0F, 2.0F}}, "sinks must be empty or one for each of 6 query heads", "2");
  refuses({.sinks = std::vector<float>(7)}, "sinks", "7");
  refuses({.sinks = {0, 0, 0, -inf, 0, 0}}, "sinks must be finite", "-inf for query head 3");
  refuses({.alibi_slopes = std::vector<float>(2)}, "alibi_slopes", "2");
  refuses({.alibi_slopes = {0, 0, 0, 0, nan, 0}}, "alibi_slopes must be finite", "");
}

TEST(ModelShape, RefusesWindowsOutOfRangeAndChunkedAttentionByName) {
  const auto refuses = [](std::int64_t window, std::int64_t chunk, const char* name,
                          const char* value) {
    LayerShape layer = six_heads();
    layer.sliding_window = window;
    layer.attention_chunk = chunk;
    EXPECT_THAT([&] { ModelShape({layer}); },
                ThrowsMessage<ConfigError>(AllOf(HasSubstr(name), HasSubstr(value))));
  };
  refuses(-1, 0, "sliding_window", "got -1");
  refuses(kMaxTokens + 1, 0, "sliding_window", "got 1099511627777");
  refuses(0, 8192, "Llama 4", "8192");
  refuses(128, -1, "attention_chunk", "-1");
}

TEST(ModelShape, RefusesSharedLayersThatCannotShare) {
  const auto refuses = [](const std::vector<LayerShape>& layers, const char* text,
                          const char* value) {
    EXPECT_THAT([&] { ModelShape{layers}; },
                ThrowsMessage<ConfigError>(AllOf(HasSubstr(text), HasSubstr(value))));
  };
  const auto of = [](int kv_layer) {
    LayerShape layer = six_heads();
    layer.kv_layer = kv_layer;
    return layer;
  };
  LayerShape other_group = of(0);  // queries are each layer's own
  other_group.group_size = 5;
  EXPECT_NO_THROW(ModelShape({of(-1), of(0), other_group, of(-1), of(3)}));
  refuses({of(0)}, "layer 0: kv_layer must be -1 or an earlier layer", "got 0");
  refuses({of(-1), of(2), of(-1)}, "layer 1: kv_layer", "got 2");
  refuses({of(-1), of(-2)}, "layer 1: kv_layer", "got -2");
  refuses({of(-1), of(0), of(1)}, "layer 2: kv_layer 1 has no K and V of its own", "layer 0");
  for (const auto change :
       {+[](LayerShape& l) { l.num_kv_heads = 1; }, +[](LayerShape& l) { l.k_dim = 32; },
        +[](LayerShape& l) { l.v_dim = 16; }, +[](LayerShape& l) { l.sliding_window = 8; }}) {
    LayerShape layer = of(0);
    change(layer);
    refuses({of(-1), layer}, "must be that of layer 0, whose K and V it reads", "got ");
  }
}

}  // namespace
}  // namespace headwise
