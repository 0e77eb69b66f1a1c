// SPDX-License-Identifier: MIT
/// @file plphp.hpp
/// PLPHP: layers that look at an image keep more of its tokens, and each head keeps its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/attention/observed_queries.hpp"
#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/heads/kept_positions.hpp"
#include "headwise/heads/token_scores.hpp"
#include "headwise/simd/simd.hpp"

/// Meng et al., PLPHP: Per-Layer Per-Head Vision Token Pruning for Efficient Large Vision-Language
/// Models, arXiv:2502.14504. Once, at the end of the prompt: the share of the last token's
/// attention that goes to images, mean over a layer's query heads, sets the layer's rate; each head
/// keeps that rate of each image's tokens, those that it looks at most. All text stays.
///
///     const std::vector<plphp::Span> images{{5, 581}, {600, 1176}};
///     double attention = 0.0;                                           // of one layer
///     for (each KV head) attention += plphp::add_head(newest, keys, positions, images, scores);
///     plphp::select(policy, attention / num_kv_heads, scores, images, kept);
///
/// A KV head's scores are the largest of its group (the paper has a set a query head). Without
/// released code, two things are read so: a rate is floored, and a threshold that is met exactly
/// changes nothing. A layer that is not to be pruned is given all of its positions.
namespace headwise::inline v0::plphp {

/// Tokens of one image: positions [begin, end).
struct Span {
  std::int64_t begin = 0;  ///< >= 0
  std::int64_t end = 0;    ///< > begin
};

/// The knobs; the abstract has no numbers, and these are not checked against the paper's tables.
struct Policy {
  double rate = 0.4;         ///< of an image's tokens that a layer between the thresholds keeps
  double step = 0.3;         ///< more in layers above, less in layers below
  double attentive = 0.25;   ///< a layer with more attention to images keeps rate + step
  double indifferent = 0.1;  ///< a layer with less keeps rate - step

  /// Tokens that a layer keeps of an image: floor(rate tokens), a rate clamped to [0, 1].
  /// @param attention  share that goes to images, mean over the layer's query heads
  /// @throws ConfigError for a rate or step outside [0, 1], thresholds that are not 0 <=
  ///   indifferent <= attentive <= 1, a negative number of tokens or an attention that is not
  ///   finite.
  std::int64_t count(double attention, std::int64_t tokens) const {
    check();
    detail::checked_range(tokens, 0, kMaxTokens, "tokens of an image");
    if (!is_finite(attention)) fail<ConfigError>("attention must be finite, got ", attention);
    double of_layer = rate;
    if (attention > attentive) of_layer += step;
    if (attention < indifferent) of_layer -= step;
    // 1e-9: 10 (0.4 - 0.3) is 0.99.. in double and means 1.
    const double left = std::clamp(of_layer, 0.0, 1.0) * static_cast<double>(tokens) + 1e-9;
    return std::min(tokens, static_cast<std::int64_t>(std::floor(left)));
  }
  /// @throws ConfigError as count().
  void check() const {
    const auto in_unit = [](double x) { return is_finite(x) && x >= 0.0 && x <= 1.0; };
    if (!in_unit(rate) || !in_unit(step)) {
      fail<ConfigError>("a rate of ", rate, " and a step of ", step, " must be in [0, 1]");
    }
    if (!in_unit(attentive) || !in_unit(indifferent) || indifferent > attentive) {
      fail<ConfigError>("thresholds must be 0 <= indifferent <= attentive <= 1, got ", indifferent,
                        " and ", attentive);
    }
  }
};

/// Refuses spans that are not images of a sequence of `length` tokens.
/// @throws ConfigError for a span that is empty, not behind the one before it or beyond the length.
inline void check_spans(std::span<const Span> images, std::int64_t length) {
  std::int64_t last = 0;
  for (const Span& image : images) {
    if (image.begin < last || image.end <= image.begin || image.end > length) {
      fail<ConfigError>("an image at [", image.begin, ", ", image.end, ") must begin at ", last,
                        " or later, hold a token and end by ", length);
    }
    last = image.end;
  }
}

/// Appends one KV head to `scores`: the largest weight of its group to each stored token, mean over
/// the queries.
/// @param queries  of the last token (or of some last text tokens), after RoPE
/// @param keys  stored rows
/// @param stored  their positions, ascending
/// @return the share of the attention that goes to the images' tokens, mean over the group and the
///   queries: the layer's is the mean over its KV heads
/// @throws ConfigError for sizes that differ, no query, or what check_spans() refuses; nothing is
///   appended.
/// Cost: received_attention() of the queries.
template <class Isa = simd::BestIsa>
double add_head(const ObservedQueries& queries, const RowView& keys,
                std::span<const std::int32_t> stored, std::span<const Span> images,
                TokenScores& scores) {
  check_spans(images, scores.length());
  if (queries.count() < 1) fail<ConfigError>("attention to images needs at least one query");
  std::vector<float> largest(stored.size(), 0.0F);
  std::vector<float> received(stored.size());
  double to_images = 0.0;
  const auto rows = static_cast<float>(queries.count());
  for (int g = 0; g < queries.group_size; ++g) {
    std::fill(received.begin(), received.end(), 0.0F);
    received_attention<Isa>(queries, g, keys, stored, Received::kSum, received);
    auto image = images.begin();
    for (std::size_t j = 0; j < stored.size(); ++j) {
      const float weight = received[j] / rows;
      largest[j] = std::max(largest[j], weight);
      while (image != images.end() && image->end <= stored[j]) ++image;
      if (image != images.end() && image->begin <= stored[j]) {
        to_images += static_cast<double>(weight);
      }
    }
  }
  std::ranges::copy(largest, scores.add_head(stored).begin());
  return to_images / static_cast<double>(queries.group_size);
}

/// Appends each head of a layer: everything outside the images, and of each image the policy's
/// count of tokens with the highest scores (equal ones: the lower position). The count is of the
/// image, not of what is left of it, so that a second selection by the same attention keeps what
/// the first one kept.
/// @param attention  the layer's: mean of what add_head() returned
/// @param layer  all KV heads of one layer
/// @throws ConfigError for what Policy::count() or check_spans() refuses; nothing is appended.
inline void select(const Policy& policy, double attention, const TokenScores& layer,
                   std::span<const Span> images, KeptPositions& kept) {
  check_spans(images, layer.length());
  (void)policy.count(attention, 0);  // refuses before anything is appended
  std::vector<std::int32_t> tokens;
  for (std::int64_t h = 0; h < layer.num_heads(); ++h) {
    const auto stored = layer.positions(h);
    const auto index_of = [&](std::int64_t position) {
      return static_cast<std::int32_t>(std::ranges::lower_bound(stored, position) - stored.begin());
    };
    tokens.clear();
    std::int32_t next = 0;
    const auto keep_until = [&](std::int32_t end) {
      for (; next < end; ++next) tokens.push_back(next);
    };
    for (const Span& image : images) {
      keep_until(index_of(image.begin));
      const std::int32_t end = index_of(image.end);
      const std::size_t first = tokens.size();
      keep_until(end);
      const auto of_image = std::span(tokens).subspan(first);
      const std::int64_t count =
          std::min(std::ssize(of_image), policy.count(attention, image.end - image.begin));
      std::sort(of_image.begin(), of_image.end(),
                [&](std::int32_t a, std::int32_t b) { return layer.comes_first(h, a, h, b, {}); });
      std::sort(of_image.begin(), of_image.begin() + count);
      tokens.resize(first + static_cast<std::size_t>(count));
    }
    keep_until(static_cast<std::int32_t>(stored.size()));
    for (std::int32_t& token : tokens) token = stored[static_cast<std::size_t>(token)];
    kept.add_head(tokens);
  }
}

}  // namespace headwise::inline v0::plphp
