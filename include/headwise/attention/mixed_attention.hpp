// SPDX-License-Identifier: MIT
/// @file mixed_attention.hpp
/// Mixed attention, a gate's share full and the rest streaming, and its exact gradients: what the
/// training of head gates differentiates.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/attention/cpu/mixed_gradient.hpp"
#include "headwise/attention/cpu/prefill.hpp"
#include "headwise/attention/problem.hpp"
#include "headwise/attention/state.hpp"
#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/executor.hpp"
#include "headwise/core/scratch.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/core/tensor_view.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/budget.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0 {

/// One layer over one whole sequence, from position 0 on. With the gate a of a KV head, all its
/// query heads give
///
///     out = a full(q, k, v) + (1 - a) streaming(q, k, v),
///
/// two softmaxes: over all tokens up to the query, and over those that the window shows it
/// (DuoAttention, arXiv:2410.10819, section 3.2; RLKV, arXiv:2510.08525). Gates are used as they
/// are, also outside of [0, 1].
struct MixedAttention {
  LayerShape layer;               ///< without soft-cap, sinks, ALiBi and a window of its own
  Window window;                  ///< of the streaming half; `recent` counts the current token
  std::span<const double> gates;  ///< [num_kv_heads], finite

  std::int64_t num_tokens = 0;  ///< of the sequence; 0: nothing is read or written
  TensorView<const float> q;    ///< [num_tokens, num_qo_heads, k_dim] after RoPE
  TensorView<const float> k;    ///< [num_tokens, num_kv_heads, k_dim] likewise
  TensorView<const float> v;    ///< [num_tokens, num_kv_heads, v_dim]
  /// [num_tokens, num_qo_heads, v_dim], or without data: the full half as a constant, not made from
  /// q, k and v. So DuoAttention's released code has it: the output of the unchanged model, which
  /// runs beside the mixed one; it has no gradient, and the backward pass is O(n x window).
  TensorView<const float> constant_full = {};
};

/// What a forward pass leaves to its backward pass: 2 num_qo_heads (v_dim + 1) floats a token.
struct MixedTape {
  std::vector<float> full;           ///< [tokens, num_qo_heads, v_dim]; empty where it is constant
  std::vector<float> streaming;      ///< likewise
  std::vector<float> full_lse;       ///< [tokens, num_qo_heads] log-sum-exp of the logits
  std::vector<float> streaming_lse;  ///< likewise
};

/// The gradients of a loss by what went into mixed_attention(); all of them are written.
struct MixedGradients {
  TensorView<float> d_q;      ///< [num_tokens, num_qo_heads, k_dim]
  TensorView<float> d_k;      ///< [num_tokens, num_kv_heads, k_dim]
  TensorView<float> d_v;      ///< [num_tokens, num_kv_heads, v_dim]
  std::span<double> d_gates;  ///< [num_kv_heads]
};

namespace detail {

inline void check_mixed(const MixedAttention& of) {
  LayerShape layer = of.layer;
  layer.kv_layer = -1;  // K and V are here, whoever's they are
  ModelShape{std::vector<LayerShape>{layer}};
  if (layer.softmax != SoftmaxOptions{} || layer.sliding_window != 0) {
    fail<ConfigError>(
        "mixed attention of a layer with a soft-cap, sinks, ALiBi slopes or a window "
        "of its own is not supported");
  }
  check_budget(KeepWindow{of.window});
  checked_range(of.num_tokens, 0, kMaxTokens, "num_tokens");
  if (of.gates.size() != static_cast<std::size_t>(layer.num_kv_heads)) {
    fail<ConfigError>("got ", of.gates.size(), " gates for ", layer.num_kv_heads, " KV heads");
  }
  for (std::size_t h = 0; h < of.gates.size(); ++h) {
    if (!is_finite(of.gates[h])) {
      fail<ConfigError>("KV head ", h, ": a gate must be finite, got ", of.gates[h]);
    }
  }
}

inline std::size_t mixed_rows(const MixedAttention& of) {
  return static_cast<std::size_t>(of.num_tokens) *
         static_cast<std::size_t>(of.layer.num_qo_heads());
}

/// A [tokens, heads, dim] tensor from one head on.
template <class T>
TensorView<T> heads_from(const TensorView<T>& tensor, std::int64_t head) {
  return {tensor.row(0, head), tensor.stride_n, tensor.stride_h};
}

/// One of the halves, of queries [begin, end) of a KV head.
/// @param out,lse  of the head: [tokens, group_size, v_dim] and [tokens, group_size]
/// @param scratch  [prefill_scratch_floats]
template <class Isa>
void attend_half(const MixedAttention& of, int kv_head, const Window& window, std::int64_t begin,
                 std::int64_t end, const TensorView<float>& out, const TensorView<float>& lse,
                 float* scratch) noexcept {
  const int group = of.layer.group_size;
  HeadProblem<PlainRows<f32>> problem;
  problem.past.shape.k_dim = of.layer.k_dim;
  problem.past.shape.v_dim = of.layer.v_dim;
  problem.window = window;
  problem.num_queries = of.num_tokens;
  problem.group_size = group;
  problem.scale = of.layer.scale();
  problem.q = heads_from(of.q, std::int64_t{kv_head} * group);
  problem.own_k = heads_from(of.k, kv_head);
  problem.own_v = heads_from(of.v, kv_head);

  const auto rows = static_cast<std::size_t>(end - begin) * static_cast<std::size_t>(group);
  float* state = scratch + query_scratch_floats(rows, of.layer.k_dim);
  float* packed = state + query_state_floats(rows, of.layer.v_dim);
  QueryRows queries = load_queries<Isa>(problem, begin, end, scratch, state);
  attend_split<Isa>(
      problem, queries, {0, 0, true}, packed, [](const StoredRows&) {},
      [&](std::ptrdiff_t row) { return out.row(begin + row / group, row % group); });
  for (std::ptrdiff_t row = 0; row < queries.num_rows(); ++row) {
    *lse.row(begin + row / group, row % group) =
        SoftmaxState{queries.max[row], queries.sum[row]}.lse();
  }
}

/// The full half's output of all query heads, wherever it lies.
inline TensorView<const float> full_half(const MixedAttention& of, const MixedTape& tape) {
  if (of.constant_full.data != nullptr) return of.constant_full;
  return TensorView<const float>::nhd(tape.full.data(), of.layer.num_qo_heads(), of.layer.v_dim);
}

/// Tasks that a backward pass has at least, where it is long enough: heads are cut by their queries
/// until there are as many. A cut costs a d_k and a d_v of its own, so that all heads' take at most
/// this many times one head's, whatever the threads; bits do not depend on these.
inline constexpr std::int64_t kGradientTasks = 16;
/// Queries for which a cut is worth its price.
inline constexpr std::int64_t kGradientCutQueries = 256;

inline std::int64_t num_gradient_cuts(const MixedAttention& of) {
  const std::int64_t heads = of.layer.num_kv_heads;
  return std::clamp<std::int64_t>(of.num_tokens / kGradientCutQueries, 1,
                                  (kGradientTasks + heads - 1) / heads);
}

/// Where cut `cut` begins: cuts see about as many keys each.
inline std::int64_t gradient_cut(const MixedHead& head, std::int64_t num_tokens, std::int64_t cut,
                                 std::int64_t num_cuts) {
  const double share = static_cast<double>(cut) / static_cast<double>(num_cuts);
  const double at = is_zero(head.full_weight) ? share : std::sqrt(share);
  return cut == num_cuts ? num_tokens
                         : static_cast<std::int64_t>(at * static_cast<double>(num_tokens));
}

}  // namespace detail

/// Mixed attention of one layer.
///
/// Each half is what prefill is: blocked, O(n) memory, the streaming one O(n x window). What a
/// query does not see contributes nothing whatever its bits are.
/// @param out  [num_tokens, num_qo_heads, v_dim], written
/// @param tape  grown as needed; for mixed_attention_backward()
/// @param scratch  grown as needed
/// @throws ConfigError for a layer with more than a scale in its softmax, or a window of its own; a
///   window that no budget may have; another number of gates than KV heads, or one that is not
///   finite.
template <class Isa = simd::BestIsa, Executor E>
void mixed_attention(const MixedAttention& of, TensorView<float> out, MixedTape& tape,
                     Scratch& scratch, E& executor) {
  using O = simd::Ops<Isa>;
  detail::check_mixed(of);
  const LayerShape& layer = of.layer;
  const std::size_t rows = detail::mixed_rows(of);
  const std::size_t floats = rows * static_cast<std::size_t>(layer.v_dim);
  const bool is_constant = of.constant_full.data != nullptr;
  tape.full.resize(is_constant ? 0 : floats);
  tape.full_lse.resize(is_constant ? 0 : rows);
  tape.streaming.resize(floats);
  tape.streaming_lse.resize(rows);
  if (rows == 0) return;

  const std::size_t per_thread =
      prefill_scratch_floats(layer.group_size, layer.k_dim, layer.v_dim) / 16 * 16 + 16;
  scratch.reserve(executor.num_threads() * per_thread * sizeof(float));
  auto* const floats_of_threads = reinterpret_cast<float*>(scratch.bytes());

  const int qo_heads = layer.num_qo_heads();
  const auto full = TensorView<float>::nhd(tape.full.data(), qo_heads, layer.v_dim);
  const auto full_lse = TensorView<float>::nhd(tape.full_lse.data(), qo_heads, 1);
  const auto streaming = TensorView<float>::nhd(tape.streaming.data(), qo_heads, layer.v_dim);
  const auto streaming_lse = TensorView<float>::nhd(tape.streaming_lse.data(), qo_heads, 1);
  const TensorView<const float> full_output = detail::full_half(of, tape);

  const std::int64_t step = prefill_tile_queries(layer.group_size);
  const std::int64_t tiles = (of.num_tokens + step - 1) / step;
  const auto heads = static_cast<std::size_t>(layer.num_kv_heads);
  executor.for_each(static_cast<std::size_t>(tiles) * heads, [&](std::size_t task,
                                                                 std::size_t thread) {
    const int kv_head = static_cast<int>(task % heads);
    const std::int64_t first_head = std::int64_t{kv_head} * layer.group_size;
    // The last queries see most: first, so that no thread is left alone with them.
    const std::int64_t tile = tiles - 1 - static_cast<std::int64_t>(task / heads);
    const std::int64_t begin = tile * step;
    const std::int64_t end = std::min(begin + step, of.num_tokens);
    float* room = floats_of_threads + thread * per_thread;
    const auto attend = [&](const Window& window, const TensorView<float>& to,
                            const TensorView<float>& lse) {
      detail::attend_half<Isa>(of, kv_head, window, begin, end, detail::heads_from(to, first_head),
                               detail::heads_from(lse, first_head), room);
    };
    if (!is_constant) attend(Window::everything(), full, full_lse);
    attend(of.window, streaming, streaming_lse);

    const double gate = of.gates[static_cast<std::size_t>(kv_head)];
    const auto a = O::broadcast(static_cast<float>(gate));
    const auto b = O::broadcast(static_cast<float>(1.0 - gate));
    for (std::int64_t i = begin; i < end; ++i) {
      for (std::int64_t h = first_head; h < first_head + layer.group_size; ++h) {
        for (int d = 0; d < layer.v_dim; d += O::kWidth) {
          const auto rest = O::mul(b, O::load(streaming.row(i, h) + d));
          O::store(out.row(i, h) + d, O::fma(a, O::load(full_output.row(i, h) + d), rest));
        }
      }
    }
  });
}

/// The gradients of a loss whose gradient by the layer's out is `d_out`.
///
/// Exact, and deterministic: the same bits whatever the executor. Blocked, with O(n) memory:
/// `scratch` grows by up to 16 times one head's K and V. A head whose full half has no gradient (a
/// gate of 0, or a constant full half) costs O(n x window). All numbers must be finite.
/// @param of,tape  as the forward pass had and left them
/// @param d_out  [num_tokens, num_qo_heads, v_dim]
/// @throws ConfigError as mixed_attention(), for another number of d_gates than KV heads, or a tape
///   that is of another forward pass.
template <class Isa = simd::BestIsa, Executor E>
void mixed_attention_backward(const MixedAttention& of, const MixedTape& tape,
                              TensorView<const float> d_out, const MixedGradients& to,
                              Scratch& scratch, E& executor) {
  detail::check_mixed(of);
  const LayerShape& layer = of.layer;
  const auto heads = static_cast<std::size_t>(layer.num_kv_heads);
  const std::size_t rows = detail::mixed_rows(of);
  const std::size_t floats = rows * static_cast<std::size_t>(layer.v_dim);
  const bool is_constant = of.constant_full.data != nullptr;
  if (to.d_gates.size() != heads) {
    fail<ConfigError>("got room for ", to.d_gates.size(), " gradients of ", heads, " gates");
  }
  if (tape.streaming.size() != floats || tape.full.size() != (is_constant ? 0 : floats)) {
    fail<ConfigError>("the tape of another forward pass: ", tape.full.size(), " and ",
                      tape.streaming.size(), " floats of its halves, wanted ",
                      is_constant ? 0 : floats, " and ", floats);
  }
  std::ranges::fill(to.d_gates, 0.0);
  if (rows == 0) return;

  const int qo_heads = layer.num_qo_heads();
  const auto tape_view = [&](const std::vector<float>& part, int dim) {
    return TensorView<const float>::nhd(part.data(), qo_heads, dim);
  };
  const auto problem_of = [&](std::size_t kv_head) {
    const auto h = static_cast<std::int64_t>(kv_head);
    const std::int64_t first_head = h * layer.group_size;
    const double gate = of.gates[kv_head];
    MixedHead head;
    head.window = of.window;
    head.full_weight = is_constant ? 0.0F : static_cast<float>(gate);
    head.streaming_weight = static_cast<float>(1.0 - gate);
    head.group_size = layer.group_size;
    head.k_dim = layer.k_dim;
    head.v_dim = layer.v_dim;
    head.scale = layer.scale();
    head.q = detail::heads_from(of.q, first_head);
    head.k = detail::heads_from(of.k, h);
    head.v = detail::heads_from(of.v, h);
    head.full = detail::heads_from(detail::full_half(of, tape), first_head);
    head.streaming = detail::heads_from(tape_view(tape.streaming, layer.v_dim), first_head);
    if (!is_constant) head.full_lse = detail::heads_from(tape_view(tape.full_lse, 1), first_head);
    head.streaming_lse = detail::heads_from(tape_view(tape.streaming_lse, 1), first_head);
    head.d_out = detail::heads_from(d_out, first_head);
    head.d_q = detail::heads_from(to.d_q, first_head);
    head.d_k = detail::heads_from(to.d_k, h);
    head.d_v = detail::heads_from(to.d_v, h);
    return head;
  };

  const std::int64_t cuts = detail::num_gradient_cuts(of);
  const std::size_t per_thread =
      mixed_gradient_scratch_floats(layer.group_size, layer.k_dim, layer.v_dim);
  // The last cut of a head sees all keys and has the caller's d_k and d_v, others have their own.
  const std::size_t per_part =
      static_cast<std::size_t>(of.num_tokens) * static_cast<std::size_t>(layer.k_dim + layer.v_dim);
  const std::size_t num_parts = heads * static_cast<std::size_t>(cuts - 1);
  scratch.reserve((executor.num_threads() * per_thread + num_parts * per_part) * sizeof(float));
  auto* const floats_of_threads = reinterpret_cast<float*>(scratch.bytes());
  float* const parts = floats_of_threads + executor.num_threads() * per_thread;
  const auto part_of = [&](std::size_t kv_head, std::int64_t cut) {
    return parts + (kv_head * static_cast<std::size_t>(cuts - 1) + static_cast<std::size_t>(cut)) *
                       per_part;
  };
  const auto part_v = [&](float* part) { return part + of.num_tokens * layer.k_dim; };

  std::vector<double> gates(heads * static_cast<std::size_t>(cuts));
  executor.for_each(gates.size(), [&](std::size_t task, std::size_t thread) {
    const std::size_t kv_head = task % heads;
    const auto cut = cuts - 1 - static_cast<std::int64_t>(task / heads);
    MixedHead head = problem_of(kv_head);
    const std::int64_t begin = detail::gradient_cut(head, of.num_tokens, cut, cuts);
    const std::int64_t end = detail::gradient_cut(head, of.num_tokens, cut + 1, cuts);
    if (cut < cuts - 1) {
      float* const part = part_of(kv_head, cut);
      head.d_k = TensorView<float>::nhd(part, 1, layer.k_dim);
      head.d_v = TensorView<float>::nhd(part_v(part), 1, layer.v_dim);
    }
    for (std::int64_t j = 0; j < end; ++j) {
      std::fill_n(head.d_k.row(j, 0), layer.k_dim, 0.0F);
      std::fill_n(head.d_v.row(j, 0), layer.v_dim, 0.0F);
    }
    gates[task] = mixed_gradient<Isa>(head, begin, end, floats_of_threads + thread * per_thread);
  });
  for (std::size_t task = 0; task < gates.size(); ++task) to.d_gates[task % heads] += gates[task];
  if (cuts == 1) return;
  executor.for_each(heads, [&](std::size_t kv_head, std::size_t) {
    const MixedHead head = problem_of(kv_head);
    const auto add = [](const float* from, int dim, float* row) {
      using O = simd::Ops<Isa>;
      for (int d = 0; d < dim; d += O::kWidth) {
        O::store(row + d, O::add(O::load(row + d), O::load(from + d)));
      }
    };
    for (std::int64_t cut = 0; cut < cuts - 1; ++cut) {
      float* const part = part_of(kv_head, cut);
      const std::int64_t end = detail::gradient_cut(head, of.num_tokens, cut + 1, cuts);
      for (std::int64_t j = 0; j < end; ++j) {
        add(part + j * layer.k_dim, layer.k_dim, head.d_k.row(j, 0));
        add(part_v(part) + j * layer.v_dim, layer.v_dim, head.d_v.row(j, 0));
      }
    }
  });
}

}  // namespace headwise::inline v0
