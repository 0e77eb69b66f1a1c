// SPDX-License-Identifier: MIT
/// @file headwise_c.hpp
/// Definitions of headwise.h. Include it in one .cpp file of the engine, and link that.
#pragma once

#include "headwise/core/config.hpp"

#if __cplusplus >= 202002L  // else config.hpp has said what is wrong, once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "headwise/attention/attend.hpp"
#include "headwise/attention/scratch.hpp"
#include "headwise/cache/estimate.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/executor.hpp"
#include "headwise/core/io_view.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/fingerprint.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/heads/select.hpp"
#include "headwise/heads/tsv.hpp"
#include "headwise/headwise.h"

/// A plan of the C face.
struct headwise_plan {
  headwise::HeadPlan plan;  ///< what it is
};

namespace headwise::inline v0::detail {

/// A cache, its one step, and room for a step's chunks.
template <class Rows>
struct CCache {
  CCache(const ModelShape& shape, const HeadPlan& plan, const CacheOptions& options,
         std::size_t threads)
      : cache(shape, plan, options), num_threads(threads) {
    reserve_scratch(step, cache, threads);
    chunks.reserve(static_cast<std::size_t>(options.max_sequences));
  }

  KvCache<Rows> cache;
  Step step;
  std::vector<SequenceChunk> chunks;  // of the call in progress
  std::size_t num_threads;
};

}  // namespace headwise::inline v0::detail

/// A cache of the C face: one of the row formats that it names.
struct headwise_cache {
  /// Nothing while it is being built.
  std::variant<std::monostate, headwise::detail::CCache<headwise::f16>,
               headwise::detail::CCache<headwise::bf16>, headwise::detail::CCache<headwise::f32>,
               headwise::detail::CCache<headwise::Int8Rows>>
      of_rows;
};

namespace headwise::inline v0::detail {

/// C's name for a status.
constexpr headwise_status to_c(StepStatus status) {
  switch (status) {
    case StepStatus::kOk:
      return HEADWISE_OK;
    case StepStatus::kOutOfPages:
      return HEADWISE_OUT_OF_PAGES;
    case StepStatus::kOutOfTables:
      return HEADWISE_OUT_OF_TABLES;
    case StepStatus::kOutOfSequences:
      return HEADWISE_OUT_OF_SEQUENCES;
    case StepStatus::kContextTooLong:
      return HEADWISE_CONTEXT_TOO_LONG;
    case StepStatus::kChunkTooLong:
      return HEADWISE_CHUNK_TOO_LONG;
    case StepStatus::kInvalidChunk:
      return HEADWISE_INVALID_CHUNK;
    case StepStatus::kInStep:
      return HEADWISE_IN_STEP;
    case StepStatus::kStale:
      return HEADWISE_STALE;
    case StepStatus::kIncomplete:
      return HEADWISE_INCOMPLETE;
    case StepStatus::kTooFarBack:
      return HEADWISE_TOO_FAR_BACK;
    case StepStatus::kAttended:
      return HEADWISE_ATTENDED;
    case StepStatus::kNotPlanned:
      return HEADWISE_NOT_PLANNED;
    case StepStatus::kTooManyThreads:
      return HEADWISE_TOO_MANY_THREADS;
    case StepStatus::kBadSelection:
      return HEADWISE_BAD_SELECTION;
    case StepStatus::kSelectedFrom:
      return HEADWISE_SELECTED_FROM;
    case StepStatus::kTooSmall:
      return HEADWISE_TOO_SMALL;
    case StepStatus::kRolledBack:
      return HEADWISE_ROLLED_BACK;
    case StepStatus::kDeviceError:
      return HEADWISE_DEVICE_ERROR;
  }
  return HEADWISE_FAILED;
}

/// Notes what went wrong, as much of it as fits.
inline headwise_status c_error(headwise_error* error, headwise_status status, const char* text) {
  if (error == nullptr) return status;
  error->status = status;
  std::size_t i = 0;
  for (; i + 1 < sizeof error->text && text[i] != '\0'; ++i) error->text[i] = text[i];
  error->text[i] = '\0';
  return status;
}

/// What `call` answers; what it throws becomes a status and a text. Without exceptions an error at
/// set-up ends in HEADWISE_FATAL, as in C++.
template <class Call>
headwise_status c_call(headwise_error* error, Call&& call) {
#if HEADWISE_HAS_EXCEPTIONS
  try {
    return c_error(error, call(), "");
  } catch (const ConfigError& thrown) {
    return c_error(error, HEADWISE_CONFIG_ERROR, thrown.what());
  } catch (const FormatError& thrown) {
    return c_error(error, HEADWISE_FORMAT_ERROR, thrown.what());
  } catch (const std::bad_alloc&) {
    return c_error(error, HEADWISE_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& thrown) {
    return c_error(error, HEADWISE_FAILED, thrown.what());
  } catch (...) {
    return c_error(error, HEADWISE_FAILED, "unknown exception");
  }
#else
  return c_error(error, call(), "");
#endif
}

/// Whether the plan has such a head.
inline bool c_has_head(const headwise_plan* plan, std::int32_t layer, std::int32_t kv_head) {
  return plan != nullptr && layer >= 0 && layer < plan->plan.num_layers() && kv_head >= 0 &&
         kv_head < plan->plan.num_kv_heads(layer);
}

/// Gives one head a budget.
inline headwise_status c_set_budget(headwise_plan* plan, std::int32_t layer, std::int32_t kv_head,
                                    const HeadBudget& budget) {
  return c_call(nullptr, [&] {
    if (!c_has_head(plan, layer, kv_head)) return HEADWISE_INVALID_ARGUMENT;
    plan->plan.set(layer, kv_head, budget);
    return HEADWISE_OK;
  });
}

/// `fn(of_rows)` of a cache that is one.
/// @return `otherwise` where it is null
template <class Cache, class Result, class Fn>
Result c_visit(Cache* cache, Result otherwise, Fn&& fn) {
  if (cache == nullptr) return otherwise;
  return std::visit(
      [&]<class Of>(Of& of) -> Result {
        if constexpr (std::is_same_v<std::remove_const_t<Of>, std::monostate>) {
          return otherwise;
        } else {
          return fn(of);
        }
      },
      cache->of_rows);
}
/// The same for calls that answer a status.
template <class Fn>
headwise_status c_cache_call(headwise_cache* cache, Fn&& fn) {
  return c_call(nullptr, [&] { return c_visit(cache, HEADWISE_INVALID_ARGUMENT, fn); });
}

/// A sequence's C name, and back.
inline SequenceId from_c(headwise_sequence sequence) {
  return {sequence.index, sequence.generation};
}
/// @copydoc from_c
inline headwise_sequence to_c(SequenceId id) { return {id.index, id.generation}; }

/// Copies chunks to `to`, which has room for max_sequences: more would name one twice.
inline bool c_chunks(const headwise_chunk* chunks, std::int32_t num_chunks,
                     std::vector<SequenceChunk>& to) {
  to.clear();
  if (num_chunks < 0 || static_cast<std::size_t>(num_chunks) > to.capacity() ||
      (chunks == nullptr && num_chunks > 0)) {
    return false;
  }
  for (std::int32_t i = 0; i < num_chunks; ++i) {
    const std::int32_t phase = chunks[i].phase;
    if (phase != HEADWISE_PROMPT && phase != HEADWISE_DECODE) return false;
    to.push_back({from_c(chunks[i].sequence), chunks[i].num_tokens,
                  phase == HEADWISE_PROMPT ? Phase::kPrompt : Phase::kDecode});
  }
  return true;
}

/// A tensor as a view, if it has this shape and lies where a machine can address it.
/// @param is_written  rows must not overlap each other
/// @tparam View  InputView or OutputView
template <class View, class Tensor>
std::optional<View> c_view(const Tensor* tensor, std::int64_t rows, std::int64_t heads,
                           std::int64_t dim, bool is_written) {
  if (tensor == nullptr || tensor->num_rows != rows || tensor->num_heads != heads ||
      tensor->dim != dim) {
    return std::nullopt;
  }
  // Rows, heads and widths are within their limits: 2^40 x 2^16 x 2^16 may pass 64 bits.
  constexpr std::int64_t kMost = std::numeric_limits<std::ptrdiff_t>::max() / sizeof(f32) / 4;
  const std::int64_t head_stride = tensor->head_stride == 0 ? dim : tensor->head_stride;
  const std::int64_t row_stride = tensor->row_stride == 0 ? heads * dim : tensor->row_stride;
  if (head_stride < dim || row_stride < dim || head_stride > kMost / heads ||
      (rows > 0 && row_stride > kMost / rows)) {
    return std::nullopt;
  }
  if (is_written && rows > 1 && heads > 1 && row_stride < (heads - 1) * head_stride + dim &&
      head_stride < (rows - 1) * row_stride + dim) {
    return std::nullopt;
  }
  const auto of = [&]<class E>() -> std::optional<View> {
    if (rows > 0 && (tensor->data == nullptr ||
                     reinterpret_cast<std::uintptr_t>(tensor->data) % alignof(E) != 0)) {
      return std::nullopt;
    }
    using Data = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(tensor->data)>>,
                                    const E, E>;
    return View(static_cast<Data*>(tensor->data), row_stride, head_stride);
  };
  switch (tensor->type) {
    case HEADWISE_FLOAT32:
      return of.template operator()<f32>();
    case HEADWISE_FLOAT16:
      return of.template operator()<f16>();
    case HEADWISE_BFLOAT16:
      return of.template operator()<bf16>();
    default:
      return std::nullopt;
  }
}

/// `run(of, q, k, v, out)` for tensors that are the open step's and the layer's.
template <class Run>
headwise_status c_attend(headwise_cache* cache, std::int32_t layer, const headwise_input* q,
                         const headwise_input* k, const headwise_input* v,
                         const headwise_output* out, Run&& run) {
  return c_cache_call(cache, [&](auto& of) {
    if (!of.cache.is_open(of.step)) return HEADWISE_STALE;
    const auto& layers = of.cache.geometry().layers();
    if (layer < 0 || static_cast<std::size_t>(layer) >= layers.size()) {
      return HEADWISE_INVALID_ARGUMENT;
    }
    const LayerShape& shape = layers[static_cast<std::size_t>(layer)].shape;
    const std::int64_t rows = of.step.num_rows();
    const auto q_view = c_view<InputView>(q, rows, shape.num_qo_heads(), shape.k_dim, false);
    const auto k_view = c_view<InputView>(k, rows, shape.num_kv_heads, shape.k_dim, false);
    const auto v_view = c_view<InputView>(v, rows, shape.num_kv_heads, shape.v_dim, false);
    const auto out_view = c_view<OutputView>(out, rows, shape.num_qo_heads(), shape.v_dim, true);
    if (!q_view || !k_view || !v_view || !out_view) return HEADWISE_INVALID_ARGUMENT;
    return to_c(run(of, *q_view, *k_view, *v_view, *out_view));
  });
}

/// Shape, plan and options as C++ has them.
struct CSetUp {
  ModelShape shape;
  CacheOptions options;
  std::size_t num_threads;
};
/// @throws ConfigError for what headwise.h does not allow; the cache checks the rest.
inline CSetUp c_set_up(const headwise_layer* layers, std::int32_t num_layers,
                       const headwise_plan* plan, const headwise_options* options) {
  if (layers == nullptr) fail<ConfigError>("layers is null");
  if (plan == nullptr) fail<ConfigError>("plan is null");
  if (options == nullptr) fail<ConfigError>("options is null");
  checked_range(num_layers, 1, kMaxLayers, "num_layers");
  std::vector<LayerShape> shapes;
  for (const headwise_layer& layer : std::span(layers, static_cast<std::size_t>(num_layers))) {
    shapes.push_back(
        {layer.num_kv_heads, layer.group_size, layer.k_dim, layer.v_dim, layer.sm_scale});
  }
  CacheOptions result;
  if (options->page_tokens != 0) result.page_tokens = options->page_tokens;
  if (options->max_sequences != 0) result.max_sequences = options->max_sequences;
  result.max_bytes = options->max_bytes;
  result.max_context = options->max_context;
  result.max_chunk = options->max_chunk;
  result.max_rollback = options->max_rollback;
  checked_range(options->prefill, HEADWISE_WINDOWED, HEADWISE_CHUNK_CAUSAL, "prefill");
  result.prefill =
      options->prefill == HEADWISE_WINDOWED ? PrefillMode::kWindowed : PrefillMode::kChunkCausal;
  if (options->page_memory != nullptr) {
    if (options->max_bytes == 0) fail<ConfigError>("page_memory needs max_bytes, got 0");
    result.page_memory = {static_cast<std::byte*>(options->page_memory), options->max_bytes};
  }
  constexpr std::int32_t kMostThreads = 1 << 16;
  checked_range(options->num_threads, 0, kMostThreads, "num_threads");
  return {ModelShape(std::move(shapes)), result,
          static_cast<std::size_t>(std::max(1, options->num_threads))};
}

/// `fn.operator()<Rows>()` of the rows that the options name.
template <class Fn>
void c_with_rows(std::int32_t rows, Fn&& fn) {
  switch (rows) {
    case HEADWISE_ROWS_F16:
      return fn.template operator()<f16>();
    case HEADWISE_ROWS_BF16:
      return fn.template operator()<bf16>();
    case HEADWISE_ROWS_F32:
      return fn.template operator()<f32>();
    case HEADWISE_ROWS_INT8:
      return fn.template operator()<Int8Rows>();
    default:
      fail<ConfigError>("rows must be in [", int{HEADWISE_ROWS_F16}, ", ", int{HEADWISE_ROWS_INT8},
                        "], got ", rows);
  }
}

}  // namespace headwise::inline v0::detail

extern "C" {

const char* headwise_status_text(int status) {
  using namespace headwise;
  switch (status) {
    case HEADWISE_INVALID_ARGUMENT:
      return "invalid argument";
    case HEADWISE_CONFIG_ERROR:
      return "a value at set-up is out of its range";
    case HEADWISE_FORMAT_ERROR:
      return "the file is not what its format says";
    case HEADWISE_OUT_OF_MEMORY:
      return "out of memory";
    case HEADWISE_FAILED:
      return "failed";
    default:
      break;
  }
  for (int value = 0; value <= static_cast<int>(StepStatus::kDeviceError); ++value) {
    const auto of_step = static_cast<StepStatus>(value);
    if (detail::to_c(of_step) == status) return to_string(of_step);
  }
  return "unknown";
}

// Plans -------------------------------------------------------------------------------------------

headwise_plan* headwise_plan_create(const int32_t* kv_heads, int32_t num_layers,
                                    headwise_error* error) {
  using namespace headwise;
  headwise_plan* plan = nullptr;
  (void)detail::c_call(error, [&] {
    if (kv_heads == nullptr) fail<ConfigError>("kv_heads is null");
    detail::checked_range(num_layers, 1, kMaxLayers, "num_layers");
    const std::vector<int> heads(kv_heads, kv_heads + num_layers);
    plan = new headwise_plan{HeadPlan(heads)};
    return HEADWISE_OK;
  });
  return plan;
}

headwise_plan* headwise_plan_load_tsv(const char* path, double sparsity, int64_t sink,
                                      int64_t recent, headwise_error* error) {
  using namespace headwise;
  headwise_plan* plan = nullptr;
  (void)detail::c_call(error, [&] {
    if (path == nullptr) fail<ConfigError>("path is null");
    plan =
        new headwise_plan{select(load_tsv(path), {.sparsity = sparsity, .window = {sink, recent}})};
    return HEADWISE_OK;
  });
  return plan;
}

void headwise_plan_destroy(headwise_plan* plan) { delete plan; }

headwise_status headwise_plan_keep_everything(headwise_plan* plan, int32_t layer, int32_t kv_head) {
  return headwise::detail::c_set_budget(plan, layer, kv_head, headwise::KeepEverything{});
}

headwise_status headwise_plan_keep_window(headwise_plan* plan, int32_t layer, int32_t kv_head,
                                          int64_t sink, int64_t recent) {
  return headwise::detail::c_set_budget(plan, layer, kv_head, headwise::KeepWindow{{sink, recent}});
}

headwise_status headwise_plan_keep_growing_window(headwise_plan* plan, int32_t layer,
                                                  int32_t kv_head, int64_t sink, int64_t min_recent,
                                                  int64_t divisor) {
  return headwise::detail::c_set_budget(plan, layer, kv_head,
                                        headwise::KeepGrowingWindow{sink, min_recent, divisor});
}

int32_t headwise_plan_num_layers(const headwise_plan* plan) {
  return plan == nullptr ? 0 : plan->plan.num_layers();
}

int32_t headwise_plan_num_kv_heads(const headwise_plan* plan, int32_t layer) {
  return headwise::detail::c_has_head(plan, layer, 0) ? plan->plan.num_kv_heads(layer) : 0;
}

int32_t headwise_plan_is_retrieval(const headwise_plan* plan, int32_t layer, int32_t kv_head) {
  return headwise::detail::c_has_head(plan, layer, kv_head) &&
                 headwise::is_retrieval(plan->plan.budget(layer, kv_head))
             ? 1
             : 0;
}

double headwise_plan_sparsity(const headwise_plan* plan) {
  return plan == nullptr ? 0.0 : plan->plan.sparsity();
}

headwise_status headwise_plan_fingerprint(const headwise_plan* plan, uint64_t words[2]) {
  if (plan == nullptr || words == nullptr) return HEADWISE_INVALID_ARGUMENT;
  const headwise::Fingerprint fingerprint = headwise::fingerprint(plan->plan);
  words[0] = fingerprint.high;
  words[1] = fingerprint.low;
  return HEADWISE_OK;
}

// Caches ------------------------------------------------------------------------------------------

headwise_status headwise_estimate_cache(const headwise_layer* layers, int32_t num_layers,
                                        const headwise_plan* plan, const headwise_options* options,
                                        headwise_estimate* estimate, headwise_error* error) {
  using namespace headwise;
  return detail::c_call(error, [&] {
    if (estimate == nullptr) fail<ConfigError>("estimate is null");
    const detail::CSetUp set_up = detail::c_set_up(layers, num_layers, plan, options);
    detail::c_with_rows(options->rows, [&]<class Rows>() {
      const Estimate e = headwise::estimate<Rows>(set_up.shape, plan->plan, set_up.options);
      *estimate = {
          e.resident_bytes,
          e.transient_bytes,
          e.pool_bytes,
          e.metadata_bytes,
          scratch_bytes<Rows>(set_up.shape, plan->plan, set_up.options, set_up.num_threads),
          e.dense_bytes};
    });
    return HEADWISE_OK;
  });
}

headwise_cache* headwise_cache_create(const headwise_layer* layers, int32_t num_layers,
                                      const headwise_plan* plan, const headwise_options* options,
                                      headwise_error* error) {
  using namespace headwise;
  std::unique_ptr<headwise_cache> cache;
  const headwise_status status = detail::c_call(error, [&] {
    const detail::CSetUp set_up = detail::c_set_up(layers, num_layers, plan, options);
    cache = std::make_unique<headwise_cache>();
    detail::c_with_rows(options->rows, [&]<class Rows>() {
      cache->of_rows.template emplace<detail::CCache<Rows>>(set_up.shape, plan->plan,
                                                            set_up.options, set_up.num_threads);
    });
    return HEADWISE_OK;
  });
  return status == HEADWISE_OK ? cache.release() : nullptr;
}

void headwise_cache_destroy(headwise_cache* cache) { delete cache; }

// Sequences ---------------------------------------------------------------------------------------

headwise_status headwise_add_sequence(headwise_cache* cache, headwise_sequence* sequence) {
  using namespace headwise;
  if (sequence == nullptr) return HEADWISE_INVALID_ARGUMENT;
  return detail::c_cache_call(cache, [&](auto& of) {
    const std::optional<SequenceId> id = of.cache.add_sequence();
    if (!id) return HEADWISE_OUT_OF_SEQUENCES;
    *sequence = detail::to_c(*id);
    return HEADWISE_OK;
  });
}

headwise_status headwise_release(headwise_cache* cache, headwise_sequence sequence) {
  using namespace headwise;
  return detail::c_cache_call(cache, [&](auto& of) {
    if (!of.cache.is_live(detail::from_c(sequence))) return HEADWISE_INVALID_CHUNK;
    of.cache.release(detail::from_c(sequence));
    return HEADWISE_OK;
  });
}

headwise_status headwise_clear(headwise_cache* cache, headwise_sequence sequence) {
  using namespace headwise;
  return detail::c_cache_call(
      cache, [&](auto& of) { return detail::to_c(of.cache.clear(detail::from_c(sequence))); });
}

headwise_status headwise_rollback(headwise_cache* cache, headwise_sequence sequence,
                                  int64_t new_length) {
  using namespace headwise;
  return detail::c_cache_call(cache, [&](auto& of) {
    return detail::to_c(of.cache.rollback(detail::from_c(sequence), new_length));
  });
}

headwise_status headwise_fork(headwise_cache* cache, headwise_sequence sequence,
                              headwise_sequence* child) {
  using namespace headwise;
  if (child == nullptr) return HEADWISE_INVALID_ARGUMENT;
  return detail::c_cache_call(cache, [&](auto& of) {
    SequenceId forked;
    const StepStatus status = of.cache.fork(detail::from_c(sequence), forked);
    if (status == StepStatus::kOk) *child = detail::to_c(forked);
    return detail::to_c(status);
  });
}

int64_t headwise_length(const headwise_cache* cache, headwise_sequence sequence) {
  using namespace headwise;
  return detail::c_visit(cache, int64_t{0},
                         [&](const auto& of) { return of.cache.length(detail::from_c(sequence)); });
}

int64_t headwise_high_water(const headwise_cache* cache, headwise_sequence sequence) {
  using namespace headwise;
  return detail::c_visit(cache, int64_t{0}, [&](const auto& of) {
    return of.cache.high_water(detail::from_c(sequence));
  });
}

// Steps -------------------------------------------------------------------------------------------

headwise_status headwise_begin(headwise_cache* cache, const headwise_chunk* chunks,
                               int32_t num_chunks) {
  using namespace headwise;
  return detail::c_cache_call(cache, [&](auto& of) {
    if (!detail::c_chunks(chunks, num_chunks, of.chunks)) return HEADWISE_INVALID_ARGUMENT;
    const StepStatus status = of.cache.begin(of.step, of.chunks);
    if (status != StepStatus::kOk) return detail::to_c(status);
    return detail::to_c(plan_work(of.cache, of.step, of.num_threads));
  });
}

headwise_status headwise_attend(headwise_cache* cache, int32_t layer, const headwise_input* q,
                                const headwise_input* k, const headwise_input* v,
                                const headwise_output* out) {
  using namespace headwise;
  return detail::c_attend(cache, layer, q, k, v, out,
                          [&](auto& of, auto q_view, auto k_view, auto v_view, auto out_view) {
                            return attend(of.cache, of.step, layer, q_view, k_view, v_view,
                                          out_view);
                          });
}

headwise_status headwise_attend_share(headwise_cache* cache, int32_t layer, const headwise_input* q,
                                      const headwise_input* k, const headwise_input* v,
                                      const headwise_output* out, int32_t ith, int32_t nth) {
  using namespace headwise;
  if (ith < 0 || nth < 1 || ith >= nth) return HEADWISE_INVALID_ARGUMENT;
  return detail::c_attend(cache, layer, q, k, v, out,
                          [&](auto& of, auto q_view, auto k_view, auto v_view, auto out_view) {
                            return attend_share(of.cache, of.step, layer, q_view, k_view, v_view,
                                                out_view, static_cast<std::size_t>(ith),
                                                static_cast<std::size_t>(nth));
                          });
}

headwise_status headwise_commit(headwise_cache* cache) {
  using namespace headwise;
  return detail::c_cache_call(cache,
                              [&](auto& of) { return detail::to_c(of.cache.commit(of.step)); });
}

headwise_status headwise_drop(headwise_cache* cache) {
  using namespace headwise;
  return detail::c_cache_call(cache,
                              [&](auto& of) { return detail::to_c(of.cache.drop(of.step)); });
}

int64_t headwise_num_overflows(const headwise_cache* cache) {
  return headwise::detail::c_visit(cache, int64_t{0},
                                   [&](const auto& of) { return of.step.num_overflows(); });
}

// Bytes -------------------------------------------------------------------------------------------

size_t headwise_held_bytes(const headwise_cache* cache, headwise_sequence sequence) {
  using namespace headwise;
  return detail::c_visit(cache, std::size_t{0}, [&](const auto& of) {
    return of.cache.held_bytes(detail::from_c(sequence));
  });
}

size_t headwise_free_bytes(const headwise_cache* cache) {
  return headwise::detail::c_visit(cache, std::size_t{0},
                                   [&](const auto& of) { return of.cache.free_bytes(); });
}

size_t headwise_missing_bytes(headwise_cache* cache, const headwise_chunk* chunks,
                              int32_t num_chunks) {
  using namespace headwise;
  constexpr std::size_t kInvalid = std::numeric_limits<std::size_t>::max();
  return detail::c_visit(cache, kInvalid, [&](auto& of) {
    return detail::c_chunks(chunks, num_chunks, of.chunks) ? of.cache.missing_bytes(of.chunks)
                                                           : kInvalid;
  });
}

int64_t headwise_longest_chunk(headwise_cache* cache, headwise_sequence sequence) {
  using namespace headwise;
  return detail::c_visit(cache, int64_t{0}, [&](auto& of) {
    return of.cache.longest_chunk(detail::from_c(sequence));
  });
}

}  // extern "C"
#endif
