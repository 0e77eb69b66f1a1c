// SPDX-License-Identifier: MIT
// A single-file engine for llama2.c's fp32 model files: one token at a time, greedy.
//
//     MODEL PROMPT COUNT [ROPE_THETA]
//
// PROMPT is a text file of token ids; COUNT new ones are printed. A model file does not say the
// base of its rotary angles: llama2.c has 10000 built in, which is the default here.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <numeric>
#include <span>
#include <vector>

namespace {

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
    const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
    std::int32_t header[7];
    if (bytes.size() < sizeof header) give_up("no model file");
    std::memcpy(header, bytes.data(), sizeof header);
    floats.resize((bytes.size() - sizeof header) / sizeof(float));
    std::memcpy(floats.data(), bytes.data() + sizeof header, floats.size() * sizeof(float));

    const bool shared = header[5] > 0;  // a negative vocab_size: the classifier is at the end
    Size* const sizes[] = {&dim,          &hidden_dim, &num_layers, &num_heads,
                           &num_kv_heads, &vocab_size, &seq_len};
    for (int i = 0; i < 7; ++i) *sizes[i] = static_cast<Size>(std::abs(header[i]));
    head_dim = dim / std::max<Size>(1, num_heads);
    kv_dim = head_dim * num_kv_heads;

    Size used = 0;
    const auto take = [&](Size size) { return floats.data() + (used += size) - size; };
    embedding = take(vocab_size * dim);
    att_norm = take(num_layers * dim);
    wq = take(num_layers * dim * dim);
    wk = take(num_layers * kv_dim * dim);
    wv = take(num_layers * kv_dim * dim);
    wo = take(num_layers * dim * dim);
    ffn_norm = take(num_layers * dim);
    w1 = take(num_layers * hidden_dim * dim);
    w2 = take(num_layers * dim * hidden_dim);
    w3 = take(num_layers * hidden_dim * dim);
    norm = take(dim);
    take(seq_len * head_dim);  // cosines and sines, for 10000: computed here instead
    wcls = shared ? embedding : take(vocab_size * dim);
    if (used != floats.size()) give_up("the model file is not of the size that it says");
  }
};

/// out = w x, of layer `layer` of w.
void multiply(std::span<float> out, const float* w, Size layer, const Floats& x) {
  w += layer * out.size() * x.size();
  for (float& sum : out) {
    sum = 0.0F;
    for (const float value : x) sum += *w++ * value;
  }
}

void normalise(Floats& out, const Floats& x, const float* gain) {
  float squares = 0.0F;
  for (const float value : x) squares += value * value;
  const float scale = 1.0F / std::sqrt(squares / static_cast<float>(x.size()) + 1e-5F);
  for (Size i = 0; i < x.size(); ++i) out[i] = gain[i] * x[i] * scale;
}

class Engine {
 public:
  Engine(const Model& model, float theta)
      : m_(model),
        theta_(theta),
        keys_(m_.num_layers * m_.seq_len * m_.kv_dim),
        values_(keys_.size()) {}

  /// Takes in one token. Returns the logits of the next one.
  const Floats& forward(Size token) {
    if (pos_ == m_.seq_len) give_up("the context is full");
    std::copy_n(m_.embedding + token * m_.dim, m_.dim, x_.data());
    for (Size layer = 0; layer < m_.num_layers; ++layer) {
      normalise(xb_, x_, m_.att_norm + layer * m_.dim);
      const std::span<float> k = row(keys_, layer, pos_), v = row(values_, layer, pos_);
      multiply(q_, m_.wq, layer, xb_);
      multiply(k, m_.wk, layer, xb_);
      multiply(v, m_.wv, layer, xb_);
      rotate(q_);
      rotate(k);
      for (Size head = 0; head < m_.num_heads; ++head) attend(layer, head);
      multiply(xb_, m_.wo, layer, out_);
      for (Size i = 0; i < m_.dim; ++i) x_[i] += xb_[i];

      normalise(xb_, x_, m_.ffn_norm + layer * m_.dim);
      multiply(gate_, m_.w1, layer, xb_);
      multiply(up_, m_.w3, layer, xb_);
      for (Size i = 0; i < gate_.size(); ++i) gate_[i] *= up_[i] / (1.0F + std::exp(-gate_[i]));
      multiply(xb_, m_.w2, layer, gate_);
      for (Size i = 0; i < m_.dim; ++i) x_[i] += xb_[i];
    }
    ++pos_;
    normalise(xb_, x_, m_.norm);
    multiply(logits_, m_.wcls, 0, xb_);
    return logits_;
  }

  Size cache_bytes() const { return (keys_.size() + values_.size()) * sizeof(float); }

 private:
  /// Turns the pairs (2i, 2i + 1) of every head by pos * theta^(-2i / head_dim).
  void rotate(std::span<float> heads) const {
    for (Size i = 0; i < heads.size(); i += 2) {
      const float part = static_cast<float>(i % m_.head_dim) / static_cast<float>(m_.head_dim);
      const float angle = static_cast<float>(pos_) * std::pow(theta_, -part);
      const float a = heads[i], b = heads[i + 1];
      heads[i] = a * std::cos(angle) - b * std::sin(angle);
      heads[i + 1] = a * std::sin(angle) + b * std::cos(angle);
    }
  }

  std::span<float> row(Floats& cache, Size layer, Size pos) const {
    return std::span(cache).subspan((layer * m_.seq_len + pos) * m_.kv_dim, m_.kv_dim);
  }

  /// Softmax attention of one query head over all tokens so far.
  void attend(Size layer, Size head) {
    const Size first = head * m_.head_dim;
    const Size kv_first = head / (m_.num_heads / m_.num_kv_heads) * m_.head_dim;
    float max = -1e30F, sum = 0.0F;
    Floats weights(pos_ + 1);
    for (Size t = 0; t <= pos_; ++t) {
      const float* k = &row(keys_, layer, t)[kv_first];
      const float dot = std::inner_product(k, k + m_.head_dim, &q_[first], 0.0F);
      max = std::max(max, weights[t] = dot / std::sqrt(static_cast<float>(m_.head_dim)));
    }
    for (float& weight : weights) sum += weight = std::exp(weight - max);
    std::fill_n(&out_[first], m_.head_dim, 0.0F);
    for (Size t = 0; t <= pos_; ++t) {
      const float* v = &row(values_, layer, t)[kv_first];
      for (Size d = 0; d < m_.head_dim; ++d) out_[first + d] += weights[t] / sum * v[d];
    }
  }

  const Model& m_;
  float theta_;
  Size pos_ = 0;
  Floats keys_, values_;  // [layer][seq_len][kv_dim]
  Floats x_ = Floats(m_.dim), xb_ = x_, q_ = x_, out_ = x_;
  Floats gate_ = Floats(m_.hidden_dim), up_ = gate_;
  Floats logits_ = Floats(m_.vocab_size);
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) give_up("arguments: MODEL PROMPT COUNT [ROPE_THETA]");
  const Model model(argv[1]);
  std::ifstream prompt(argv[2]);
  Engine engine(model, argc > 4 ? std::strtof(argv[4], nullptr) : 10000.0F);
  Size token = 0, next = 0;
  while (prompt >> token) {
    if (token >= model.vocab_size) give_up("a token is not in the vocabulary");
    const Floats& logits = engine.forward(token);
    next = static_cast<Size>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
  for (int i = std::atoi(argv[3]); i > 0; --i) {
    std::printf("%zu%c", next, i > 1 ? ' ' : '\n');
    const Floats& logits = engine.forward(next);
    next = static_cast<Size>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
  std::fprintf(stderr, "KV cache: %zu KiB\n", engine.cache_bytes() / 1024);
  return 0;
}
