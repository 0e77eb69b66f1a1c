// SPDX-License-Identifier: MIT
// The README's snippet, running. What lies between the [README] marks is its text, word for word.
// [README]
#include <headwise/headwise.hpp>
using namespace headwise;
// [end]

#include <algorithm>
#include <cstdio>
#include <vector>

namespace {

int retry_later(StepStatus status) {
  std::printf("not now: %s\n", to_string(status));
  return 1;
}

}  // namespace

int main() {
  // What the engine has: its threads, a prompt, and activations. All keys are alike here, so that
  // every token gets the same weight, and the weights of all must sum to 1.
  SerialExecutor executor;
  const int num_tokens = 100;
  const std::vector<float> queries(std::size_t{num_tokens} * 32 * 128, 0.5F);
  const std::vector<float> keys(std::size_t{num_tokens} * 8 * 128, 0.25F);
  const std::vector<float> values(std::size_t{num_tokens} * 8 * 128, 1.0F);
  std::vector<float> outputs(queries.size());

  // [README]
  // Which heads keep everything: published gates. Half of the heads stream: 64 sinks + 256 recent.
  HeadScores scores = duo_attention::load("full_attention_heads.tsv");
  HeadPlan plan = select(scores, {.sparsity = 0.5, .window = {.sink = 64, .recent = 256}});

  // 32 layers, 32 query heads, 8 KV heads, head_dim 128; rows in f16, 1 GiB of them.
  ModelShape shape = ModelShape::uniform(32, 32, 8, 128);
  KvCache<f16> cache(shape, plan,
                     {.max_bytes = std::size_t{1} << 30,
                      .max_sequences = 16,
                      .max_context = 131072,
                      .max_rollback = 8});
  SequenceId chat = *cache.add_sequence();

  // One step of any number of tokens and sequences: all pages that it needs, or none.
  Step step;
  StepStatus status = cache.begin(step, {{chat, num_tokens}});
  if (status != StepStatus::kOk) return retry_later(status);
  for (int layer = 0; layer < 32; ++layer) {
    // ... your projections and RoPE, into your own floats [num_tokens, heads, 128] ...
    auto q = TensorView<const float>::nhd(queries.data(), 32, 128);
    auto k = TensorView<const float>::nhd(keys.data(), 8, 128);
    auto v = TensorView<const float>::nhd(values.data(), 8, 128);
    auto out = TensorView<float>::nhd(outputs.data(), 32, 128);
    status = attend(cache, step, layer, q, k, v, out, executor);
    if (status != StepStatus::kOk) return retry_later(status);
  }
  status = cache.commit(step);
  if (status != StepStatus::kOk) return retry_later(status);
  // [end]

  const CacheOptions& options = cache.geometry().options();
  const auto mib = [&](const HeadPlan& of, std::int64_t tokens) {
    return static_cast<double>(sequence_bytes(shape, of, options, tokens)) / (1 << 20);
  };
  std::printf("%lld tokens hold %.1f MiB; 131072 will hold %.0f MiB, of %.0f for a full cache\n",
              static_cast<long long>(cache.length(chat)), mib(plan, cache.length(chat)),
              mib(plan, 131072), mib(HeadPlan(shape), 131072));
  const auto [low, high] = std::minmax_element(outputs.begin(), outputs.end());
  const bool right = *low > 0.9999F && *high < 1.0001F && cache.length(chat) == num_tokens;
  std::puts(right ? "ok" : "WRONG");
  return right ? 0 : 1;
}
