// SPDX-License-Identifier: MIT
#include "headwise/core/shape.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
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
  for (const int dim : {-16, 0, 8, 72}) {
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

}  // namespace
}  // namespace headwise
