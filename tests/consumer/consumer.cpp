// SPDX-License-Identifier: MIT
// What an engine does with Headwise, small: a plan, a cache, a prompt, decode steps, a rollback.
// It checks itself against plain attention. Its text must be the same under all flags
// (tests/flags), so it prints integers and answers, and no float in full.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "headwise/headwise.hpp"

namespace {

constexpr int kLayers = 2;
constexpr int kQoHeads = 4;
constexpr int kKvHeads = 2;
constexpr int kDim = 64;
constexpr headwise::Window kWindow{4, 12};

bool streams(int layer, int kv_head) { return layer == 1 && kv_head == 1; }

/// Any fixed number in [-1, 1) will do as an activation.
float activation(std::int64_t pos, int layer, int head, int dim, std::uint32_t what) {
  std::uint32_t x = static_cast<std::uint32_t>(pos) * 2654435761U + what * 40503U;
  x ^= static_cast<std::uint32_t>((layer * 16 + head) * 256 + dim) * 2246822519U;
  x = (x ^ (x >> 15U)) * 3266489917U;
  return static_cast<float>(x >> 8U) / 8388608.0F - 1.0F;
}

std::vector<float> activations(std::int64_t first, std::int64_t tokens, int layer, int heads,
                               std::uint32_t what) {
  std::vector<float> values;
  for (std::int64_t pos = first; pos < first + tokens; ++pos) {
    for (int head = 0; head < heads; ++head) {
      for (int dim = 0; dim < kDim; ++dim) {
        values.push_back(activation(pos, layer, head, dim, what));
      }
    }
  }
  return values;
}

/// One element of plain attention in double, over the keys that the plan lets the query see.
double plain_attention(std::int64_t pos, int layer, int qo_head, int dim) {
  const int kv_head = qo_head / (kQoHeads / kKvHeads);
  double sum = 0.0;
  double out = 0.0;
  for (std::int64_t key = 0; key <= pos; ++key) {
    if (streams(layer, kv_head) && !kWindow.sees({pos}, {key})) continue;
    double dot = 0.0;
    for (int d = 0; d < kDim; ++d) {
      dot += static_cast<double>(activation(pos, layer, qo_head, d, 1)) *
             static_cast<double>(activation(key, layer, kv_head, d, 2));
    }
    const double weight = std::exp(dot / 8.0);  // sqrt(kDim)
    sum += weight;
    out += weight * static_cast<double>(activation(key, layer, kv_head, dim, 3));
  }
  return out / sum;
}

class Engine {
 public:
  explicit Engine(const headwise::HeadPlan& plan)
      : cache_(shape(), plan,
               {.page_tokens = 16, .max_sequences = 1, .max_context = 256, .max_rollback = 4}),
        sequence_(cache_.add_sequence().value()) {}

  static headwise::ModelShape shape() {
    return headwise::ModelShape::uniform(kLayers, kQoHeads, kKvHeads, kDim);
  }

  headwise::StepStatus forward(std::int64_t tokens, headwise::Phase phase) {
    const std::int64_t first = cache_.length(sequence_);
    const auto status = cache_.begin(step_, {{sequence_, tokens, phase}});
    if (status != headwise::StepStatus::kOk) return status;
    for (int layer = 0; layer < kLayers; ++layer) {
      const auto attended = attend(layer, first, tokens);
      if (attended != headwise::StepStatus::kOk) return attended;
    }
    return cache_.commit(step_);
  }

  headwise::StepStatus rollback(std::int64_t length) { return cache_.rollback(sequence_, length); }
  long long length() const { return cache_.length(sequence_); }
  long long bytes() const { return static_cast<long long>(cache_.held_bytes(sequence_)); }
  double worst_error() const { return worst_error_; }

 private:
  headwise::StepStatus attend(int layer, std::int64_t first, std::int64_t tokens) {
    const auto q = activations(first, tokens, layer, kQoHeads, 1);
    const auto k = activations(first, tokens, layer, kKvHeads, 2);
    const auto v = activations(first, tokens, layer, kKvHeads, 3);
    std::vector<float> out(q.size());
    using Input = headwise::TensorView<const float>;
    const auto status =
        headwise::attend(cache_, step_, layer, Input::nhd(q.data(), kQoHeads, kDim),
                         Input::nhd(k.data(), kKvHeads, kDim), Input::nhd(v.data(), kKvHeads, kDim),
                         headwise::TensorView<float>::nhd(out.data(), kQoHeads, kDim), executor_);
    for (std::int64_t token = 0; token < tokens; ++token) {
      for (int head = 0; head < kQoHeads; ++head) {
        const int dim = static_cast<int>(token) % kDim;  // one element a row is proof enough
        const auto at = static_cast<std::size_t>((token * kQoHeads + head) * kDim + dim);
        const double error =
            static_cast<double>(out[at]) - plain_attention(first + token, layer, head, dim);
        worst_error_ = std::max(worst_error_, std::abs(error));
      }
    }
    return status;
  }

  headwise::KvCache<> cache_;
  headwise::Step step_;
  headwise::SerialExecutor executor_;
  headwise::SequenceId sequence_;
  double worst_error_ = 0.0;
};

/// Whether of two tokens, of which the second's key or value has this element, the first one's
/// output is as ever and the second one's NaN or infinite.
bool spoils_only_its_own_row(std::uint32_t k_bits, std::uint32_t v_bits, float soft_cap = 0.0F) {
  constexpr int kWidth = 16;
  const headwise::ModelShape shape({{.num_kv_heads = 1,
                                     .group_size = 1,
                                     .k_dim = kWidth,
                                     .v_dim = kWidth,
                                     .softmax = {.soft_cap = soft_cap}}});
  headwise::KvCache<float> cache(shape, headwise::HeadPlan(shape), {.max_context = 16});
  headwise::Step step;
  if (cache.begin(step, {{cache.add_sequence().value(), 2}}) != headwise::StepStatus::kOk) {
    return false;
  }
  std::vector<float> q(2 * kWidth, 1.0F), k = q, v = q, out = q;
  k.back() = std::bit_cast<float>(k_bits);
  v.back() = std::bit_cast<float>(v_bits);
  const auto rows = [](const std::vector<float>& x) {
    return headwise::TensorView<const float>::nhd(x.data(), 1, kWidth);
  };
  const auto status = headwise::attend(cache, step, 0, rows(q), rows(k), rows(v),
                                       headwise::TensorView<float>::nhd(out.data(), 1, kWidth));
  const float first = out[kWidth - 1];  // sees nothing but ones
  return status == headwise::StepStatus::kOk && headwise::is_finite(first) &&
         std::lround(first * 1000.0F) == 1000 && !headwise::is_finite(out.back());
}

}  // namespace

int main() {
  headwise::HeadPlan plan(Engine::shape());
  plan.set(1, 1, headwise::KeepWindow{kWindow});
  std::printf("sparsity %d/4\n", static_cast<int>(std::lround(plan.sparsity() * 4)));

  Engine engine(plan);
  const auto report = [&](const char* what, headwise::StepStatus status) {
    std::printf("%s: %s, %lld tokens, %lld bytes\n", what, headwise::to_string(status),
                engine.length(), engine.bytes());
  };
  report("prompt", engine.forward(40, headwise::Phase::kPrompt));
  for (int i = 0; i < 30; ++i) {
    const auto status = engine.forward(1, headwise::Phase::kDecode);
    if (i % 10 == 9) report("10 decode steps", status);
  }
  report("rollback", engine.rollback(67));
  report("rollback too far", engine.rollback(60));
  report("3 tokens at once", engine.forward(3, headwise::Phase::kDecode));
  report("too long", engine.forward(1000, headwise::Phase::kPrompt));

  constexpr std::uint32_t kOne = 0x3F800000U;
  constexpr std::uint32_t kInfinity = 0x7F800000U;
  constexpr std::uint32_t kNan = 0x7FC00000U;
  const bool spoils =
      spoils_only_its_own_row(kNan, kOne) && spoils_only_its_own_row(kInfinity, kOne) &&
      spoils_only_its_own_row(kOne, kNan) && spoils_only_its_own_row(kOne, kInfinity) &&
      spoils_only_its_own_row(kNan, kOne, 30.0F) && spoils_only_its_own_row(kOne, kNan, 30.0F);
  std::printf("what is not finite %s\n", spoils ? "stays so" : "is LOST or LEAKS");

  const bool right = engine.worst_error() < 2e-3;  // rows are stored in f16
  std::printf("%s plain attention\n", right ? "equals" : "DIFFERS from");
  return right && spoils ? 0 : 1;
}
