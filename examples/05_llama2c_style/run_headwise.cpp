// SPDX-License-Identifier: MIT
// A single-file engine for llama2.c's fp32 model files, one token at a time, greedy:
//     MODEL PROMPT COUNT ROPE_THETA
// PROMPT is a text file of token ids, COUNT new ones are printed. A model file does not say the
// base of its rotary angles: llama2.c has 10000 built in. A fifth argument names the scores of the
// heads (DuoAttention's format): half of them stream.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <span>
#include <vector>

#include "headwise/headwise.hpp"

using namespace headwise;

using Floats = std::vector<float>;
using Size = std::size_t;

[[noreturn]] void give_up(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

/// What a model file says: seven numbers of 32 bits, then the weights.
struct Model {
  Size dim, hidden_dim, num_layers, num_heads, num_kv_heads, vocab_size, seq_len, head_dim, kv_dim;
  /// Into `floats`, in the file's order; [layer][out][in].
  const float *embedding, *att_norm, *wq, *wk, *wv, *wo, *ffn_norm, *w1, *w2, *w3, *norm, *wcls;
  Floats floats;

  explicit Model(const char* path) {
    std::ifstream file(path, std::ios::binary);
    std::int32_t header[7];
    if (!file.read(reinterpret_cast<char*>(header), sizeof header)) give_up("no model file");
    for (float x; file.read(reinterpret_cast<char*>(&x), sizeof x);) floats.push_back(x);
    const bool shared = header[5] > 0;  // a negative vocab_size: the classifier is at the end
    Size* const sizes[] = {&dim,          &hidden_dim, &num_layers, &num_heads,
                           &num_kv_heads, &vocab_size, &seq_len};
    for (int i = 0; i < 7; ++i) *sizes[i] = static_cast<Size>(std::abs(header[i]));
    head_dim = dim / std::max<Size>(1, num_heads), kv_dim = head_dim * num_kv_heads;

    Size used = 0;
    const auto take = [&](Size size) { return floats.data() + (used += size) - size; };
    embedding = take(vocab_size * dim), att_norm = take(num_layers * dim);
    wq = take(num_layers * dim * dim), wk = take(num_layers * kv_dim * dim);
    wv = take(num_layers * kv_dim * dim), wo = take(num_layers * dim * dim);
    ffn_norm = take(num_layers * dim), w1 = take(num_layers * hidden_dim * dim);
    w2 = take(num_layers * dim * hidden_dim), w3 = take(num_layers * hidden_dim * dim);
    norm = take(dim);
    take(seq_len * head_dim);  // cosines and sines, for 10000: computed here instead
    wcls = shared ? embedding : take(vocab_size * dim);
    if (used != floats.size()) give_up("the model file is not of the size that it says");
  }
};

/// out = w x, of layer `layer` of w.
void multiply(std::span<float> out, const float* w, Size layer, const Floats& x) {
  w += layer * out.size() * x.size();
  for (float& sum : out) sum = std::inner_product(x.begin(), x.end(), w, 0.0F), w += x.size();
}

void normalise(Floats& out, const Floats& x, const float* gain) {
  const float squares = std::inner_product(x.begin(), x.end(), x.begin(), 0.0F);
  const float scale = 1.0F / std::sqrt(squares / static_cast<float>(x.size()) + 1e-5F);
  for (Size i = 0; i < x.size(); ++i) out[i] = gain[i] * x[i] * scale;
}

struct Engine {
  const Model& m;
  float theta;
  SingleSequence<f32> sequence;
  Size pos = 0;
  Floats k = Floats(m.kv_dim), v = k;
  Floats x = Floats(m.dim), xb = x, q = x, out = x, gate = Floats(m.hidden_dim), up = gate;
  Floats logits = Floats(m.vocab_size);

  /// Takes in one token. Returns the likeliest next one.
  Size forward(Size token) {
    if (token >= m.vocab_size) give_up("a token is not in the vocabulary");
    const StepStatus begun = sequence.begin(1);
    if (begun != StepStatus::kOk) give_up(to_string(begun));
    std::copy_n(m.embedding + token * m.dim, m.dim, x.data());
    for (Size layer = 0; layer < m.num_layers; ++layer) {
      normalise(xb, x, m.att_norm + layer * m.dim);
      multiply(q, m.wq, layer, xb), multiply(k, m.wk, layer, xb), multiply(v, m.wv, layer, xb);
      rotate(q), rotate(k);
      const StepStatus attended =
          sequence.attend(static_cast<int>(layer), heads(q), heads(k), heads(v), heads(out));
      if (attended != StepStatus::kOk) give_up(to_string(attended));
      multiply(xb, m.wo, layer, out);
      for (Size i = 0; i < m.dim; ++i) x[i] += xb[i];

      normalise(xb, x, m.ffn_norm + layer * m.dim);
      multiply(gate, m.w1, layer, xb), multiply(up, m.w3, layer, xb);
      for (Size i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1.0F + std::exp(-gate[i]));
      multiply(xb, m.w2, layer, gate);
      for (Size i = 0; i < m.dim; ++i) x[i] += xb[i];
    }
    if (sequence.commit() != StepStatus::kOk) give_up("the step was not whole");
    ++pos;
    normalise(xb, x, m.norm);
    multiply(logits, m.wcls, 0, xb);
    return static_cast<Size>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }

  /// Turns the pairs (2i, 2i + 1) of every head by pos * theta^(-2i / head_dim).
  void rotate(std::span<float> heads) const {
    for (Size i = 0; i < heads.size(); i += 2) {
      const float part = static_cast<float>(i % m.head_dim) / static_cast<float>(m.head_dim);
      const float angle = static_cast<float>(pos) * std::pow(theta, -part);
      const float a = heads[i], b = heads[i + 1];
      heads[i] = a * std::cos(angle) - b * std::sin(angle);
      heads[i + 1] = a * std::sin(angle) + b * std::cos(angle);
    }
  }

  /// One token's heads: [1, size / head_dim, head_dim].
  TensorView<float> heads(Floats& row) const {
    const auto num_heads = static_cast<std::int64_t>(row.size() / m.head_dim);
    return TensorView<float>::nhd(row.data(), num_heads, static_cast<std::int64_t>(m.head_dim));
  }
};

int main(int argc, char** argv) {
  if (argc < 5) give_up("arguments: MODEL PROMPT COUNT ROPE_THETA");
  const Model model(argv[1]);
  const auto shape = ModelShape::uniform(int(model.num_layers), int(model.num_heads),
                                         int(model.num_kv_heads), int(model.head_dim));
  const SelectOptions half{.sparsity = 0.5, .window = {.sink = 4, .recent = 60}};
  const HeadPlan plan = argc > 5 ? select(duo_attention::load(argv[5]), half) : HeadPlan(shape);
  const CacheOptions options{.max_context = static_cast<std::int64_t>(model.seq_len)};
  Engine engine{model, std::strtof(argv[4], nullptr), SingleSequence<f32>(shape, plan, options)};
  std::ifstream prompt(argv[2]);
  Size next = 0;
  for (Size token; prompt >> token;) next = engine.forward(token);
  for (int left = std::atoi(argv[3]); left > 0; --left) {
    std::printf("%zu%c", next, left > 1 ? ' ' : '\n');
    next = engine.forward(next);
  }
  std::fprintf(stderr, "KV cache: %zu KiB\n",
               engine.sequence.cache().held_bytes(engine.sequence.id()) / 1024);
}
