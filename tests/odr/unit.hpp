// SPDX-License-Identifier: MIT
// What both units compute: everything of the library whose code depends on the instruction set.
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <vector>

#include "headwise/headwise.hpp"

/// The report of one unit, compiled for whatever that unit is.
std::string baseline_report();
std::string native_report();

namespace {  // each unit has its own: what may be merged is the library's, and nothing of the test

/// Any fixed number in [-1, 1).
float activation(std::uint32_t i, std::uint32_t what) {
  std::uint32_t x = i * 2654435761U + what * 40503U;
  x = (x ^ (x >> 15U)) * 3266489917U;
  return static_cast<float>(x >> 8U) / 8388608.0F - 1.0F;
}

/// FNV-1a over the bits of all attention outputs of a prompt and some decode steps.
template <class Row>
std::uint64_t output_bits(headwise::PrefillMode prefill) {
  using namespace headwise;
  constexpr int kLayers = 2, kQoHeads = 4, kKvHeads = 2, kDim = 48;
  const ModelShape shape = ModelShape::uniform(kLayers, kQoHeads, kKvHeads, kDim);
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{4, 28}});
  if (prefill == PrefillMode::kChunkCausal) plan.set(1, 0, KeepGrowingWindow{4, 16, 5});
  KvCache<Row> cache(shape, plan, {.page_tokens = 16, .max_context = 256, .prefill = prefill});
  const SequenceId sequence = cache.add_sequence().value();
  Step step;
  std::uint64_t hash = 14695981039346656037U;
  std::uint32_t next = 0;
  for (const int tokens : {100, 37, 5, 1, 1, 1, 1}) {
    const Phase phase = tokens > 10 ? Phase::kPrompt : Phase::kDecode;
    if (cache.begin(step, {{sequence, tokens, phase}}) != StepStatus::kOk) return 0;
    for (int layer = 0; layer < kLayers; ++layer) {
      const auto rows = [&](int heads, std::uint32_t what) {
        std::vector<float> values(static_cast<std::size_t>(tokens * heads * kDim));
        for (float& value : values) value = activation(next++, what);
        return values;
      };
      const auto q = rows(kQoHeads, 1), k = rows(kKvHeads, 2), v = rows(kKvHeads, 3);
      std::vector<float> out(q.size());
      using Input = TensorView<const float>;
      if (attend(cache, step, layer, Input::nhd(q.data(), kQoHeads, kDim),
                 Input::nhd(k.data(), kKvHeads, kDim), Input::nhd(v.data(), kKvHeads, kDim),
                 TensorView<float>::nhd(out.data(), kQoHeads, kDim)) != StepStatus::kOk) {
        return 0;
      }
      for (const float x : out) hash = (hash ^ std::bit_cast<std::uint32_t>(x)) * 1099511628211U;
    }
    if (cache.commit(step) != StepStatus::kOk) return 0;
  }
  return hash;
}

/// The unit's instruction set and the bits of its outputs, for every type of rows.
std::string report() {
  using headwise::PrefillMode;
  std::string text(headwise::simd::isa_name<headwise::simd::BestIsa>());
  for (const PrefillMode mode : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    text += " " + std::to_string(output_bits<headwise::f32>(mode));
    text += " " + std::to_string(output_bits<headwise::f16>(mode));
    text += " " + std::to_string(output_bits<headwise::bf16>(mode));
  }
  return text;
}

}  // namespace
