// SPDX-License-Identifier: MIT
/// @file mixed_oracle.hpp
/// Mixed attention in double and plain loops, and its gradients by the chain rule, one softmax at a
/// time: what the blocked kernels are held to. Finite differences hold the gradients.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "headwise/attention/mixed_attention.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/core/window.hpp"

namespace headwise::test {

/// One layer over one sequence; tensors are dense [tokens, heads, dim].
struct MixedCase {
  LayerShape layer;
  Window window;
  std::int64_t n = 0;
  std::vector<double> gates;
  std::vector<double> q, k, v;
  std::vector<double> constant_full;  ///< empty: made from q, k and v
  std::vector<double> d_out;          ///< the loss is sum of d_out * out

  std::size_t qo_heads() const { return static_cast<std::size_t>(layer.num_qo_heads()); }
  std::size_t kv_heads() const { return static_cast<std::size_t>(layer.num_kv_heads); }
  std::size_t group() const { return static_cast<std::size_t>(layer.group_size); }
  std::size_t k_dim() const { return static_cast<std::size_t>(layer.k_dim); }
  std::size_t v_dim() const { return static_cast<std::size_t>(layer.v_dim); }
  std::size_t tokens() const { return static_cast<std::size_t>(n); }
};

/// Floats in doubles, so that float kernels have the very same inputs. Logits have a deviation of
/// about 2.
inline MixedCase mixed_case(int kv_heads, int group, int k_dim, int v_dim, Window window,
                            std::int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const auto fill = [&](std::size_t count, float scale) {
    std::vector<double> x(count);
    for (double& value : x) value = static_cast<double>(scale * normal(random));
    return x;
  };
  MixedCase of;
  of.layer = {kv_heads, group, k_dim, v_dim};
  of.window = window;
  of.n = n;
  const float spread = std::sqrt(2.0F);
  of.q = fill(of.tokens() * of.qo_heads() * of.k_dim(), spread);
  of.k = fill(of.tokens() * of.kv_heads() * of.k_dim(), spread);
  of.v = fill(of.tokens() * of.kv_heads() * of.v_dim(), 1.0F);
  of.d_out = fill(of.tokens() * of.qo_heads() * of.v_dim(), 1.0F);
  for (int h = 0; h < kv_heads; ++h) of.gates.push_back(0.25 + 0.5 * h / kv_heads);
  return of;
}

/// What a pass has of each half.
struct MixedHalf {
  std::vector<double> out;      ///< [n, qo_heads, v_dim]
  std::vector<double> lse;      ///< [n, qo_heads]
  std::vector<double> weights;  ///< [n, qo_heads, n], 0 where nothing is seen
};

inline MixedHalf oracle_half(const MixedCase& of, const Window& window) {
  MixedHalf half;
  half.out.resize(of.tokens() * of.qo_heads() * of.v_dim());
  half.lse.resize(of.tokens() * of.qo_heads());
  half.weights.resize(of.tokens() * of.qo_heads() * of.tokens());
  const auto scale = static_cast<double>(of.layer.scale());
  for (std::size_t i = 0; i < of.tokens(); ++i) {
    for (std::size_t h = 0; h < of.qo_heads(); ++h) {
      const std::size_t row = i * of.qo_heads() + h;
      double* weights = half.weights.data() + row * of.tokens();
      double sum = 0.0;
      for (std::size_t j = 0; j <= i; ++j) {
        const bool sees = j < static_cast<std::size_t>(window.sink) || !window.bounded() ||
                          i - j < static_cast<std::size_t>(window.recent);
        if (!sees) continue;
        double dot = 0.0;
        for (std::size_t d = 0; d < of.k_dim(); ++d) {
          dot += of.q[row * of.k_dim() + d] *
                 of.k[(j * of.kv_heads() + h / of.group()) * of.k_dim() + d];
        }
        weights[j] = std::exp(dot * scale);
        sum += weights[j];
      }
      half.lse[row] = std::log(sum);
      for (std::size_t j = 0; j <= i; ++j) {
        weights[j] /= sum;
        for (std::size_t d = 0; d < of.v_dim(); ++d) {
          half.out[row * of.v_dim() + d] +=
              weights[j] * of.v[(j * of.kv_heads() + h / of.group()) * of.v_dim() + d];
        }
      }
    }
  }
  return half;
}

inline std::vector<double> oracle_mixed(const MixedCase& of, const MixedHalf& full,
                                        const MixedHalf& streaming) {
  const std::vector<double>& f = of.constant_full.empty() ? full.out : of.constant_full;
  std::vector<double> out(f.size());
  for (std::size_t x = 0; x < out.size(); ++x) {
    const double gate = of.gates[x / of.v_dim() % of.qo_heads() / of.group()];
    out[x] = gate * f[x] + (1.0 - gate) * streaming.out[x];
  }
  return out;
}

inline std::vector<double> oracle_mixed(const MixedCase& of) {
  return oracle_mixed(of, oracle_half(of, Window::everything()), oracle_half(of, of.window));
}

inline double oracle_loss(const MixedCase& of) {
  const std::vector<double> out = oracle_mixed(of);
  double loss = 0.0;
  for (std::size_t x = 0; x < out.size(); ++x) loss += of.d_out[x] * out[x];
  return loss;
}

struct OracleGradients {
  std::vector<double> q, k, v, gates;
};

/// Through the weights of each half apart: d_w = d_out . v, then the Jacobian of a softmax.
inline OracleGradients oracle_gradients(const MixedCase& of) {
  OracleGradients to;
  to.q.resize(of.q.size());
  to.k.resize(of.k.size());
  to.v.resize(of.v.size());
  to.gates.resize(of.gates.size());
  const MixedHalf full = oracle_half(of, Window::everything());
  const MixedHalf streaming = oracle_half(of, of.window);
  const bool is_constant = !of.constant_full.empty();
  const std::vector<double>& full_out = is_constant ? of.constant_full : full.out;
  const auto scale = static_cast<double>(of.layer.scale());
  const auto add_half = [&](const MixedHalf& half, std::size_t i, std::size_t h, double share) {
    const std::size_t row = i * of.qo_heads() + h;
    const double* weights = half.weights.data() + row * of.tokens();
    std::vector<double> d_weights(i + 1, 0.0);
    double mean = 0.0;
    for (std::size_t j = 0; j <= i; ++j) {
      const std::size_t key = j * of.kv_heads() + h / of.group();
      for (std::size_t d = 0; d < of.v_dim(); ++d) {
        const double x = share * of.d_out[row * of.v_dim() + d];
        d_weights[j] += x * of.v[key * of.v_dim() + d];
        to.v[key * of.v_dim() + d] += weights[j] * x;
      }
      mean += weights[j] * d_weights[j];
    }
    for (std::size_t j = 0; j <= i; ++j) {
      const std::size_t key = j * of.kv_heads() + h / of.group();
      const double d_logit = scale * weights[j] * (d_weights[j] - mean);
      for (std::size_t d = 0; d < of.k_dim(); ++d) {
        to.q[row * of.k_dim() + d] += d_logit * of.k[key * of.k_dim() + d];
        to.k[key * of.k_dim() + d] += d_logit * of.q[row * of.k_dim() + d];
      }
    }
  };
  for (std::size_t i = 0; i < of.tokens(); ++i) {
    for (std::size_t h = 0; h < of.qo_heads(); ++h) {
      const double gate = of.gates[h / of.group()];
      if (!is_constant) add_half(full, i, h, gate);
      add_half(streaming, i, h, 1.0 - gate);
      for (std::size_t d = 0; d < of.v_dim(); ++d) {
        const std::size_t x = (i * of.qo_heads() + h) * of.v_dim() + d;
        to.gates[h / of.group()] += of.d_out[x] * (full_out[x] - streaming.out[x]);
      }
    }
  }
  return to;
}

inline std::vector<float> as_floats(const std::vector<double>& x) { return {x.begin(), x.end()}; }

/// The Euclidean norm of the difference over that of `expected`; the former alone below 1, so that
/// a gradient that is 0 may be a rounding.
template <class T>
double relative_error(const std::vector<T>& x, const std::vector<double>& expected) {
  double difference = 0.0;
  double norm = 0.0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    difference += std::pow(static_cast<double>(x[i]) - expected[i], 2);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference) / std::max(std::sqrt(norm), 1.0);
}

}  // namespace headwise::test
