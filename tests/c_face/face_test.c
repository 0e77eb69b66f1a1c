// SPDX-License-Identifier: MIT
// The C face, used from C: steps beside plain attention in double, and arguments that are wrong in
// every way that C allows. Exits with 1 where something does not hold.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "headwise/headwise.h"

enum { kLayers = 2, kKvHeads = 2, kGroup = 2, kQoHeads = kKvHeads * kGroup, kMaxTokens = 400 };
static const int32_t kKDim[kLayers] = {32, 16};
static const int32_t kVDim[kLayers] = {16, 48};
enum { kWidest = 48, kSink = 4, kRecent = 28 };

static int num_failures = 0;
#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      ++num_failures;                                                      \
    }                                                                      \
  } while (0)
#define CHECK_STATUS(call, expected)                                                    \
  do {                                                                                  \
    const headwise_status got_ = (call);                                                \
    if (got_ != (expected)) {                                                           \
      printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, headwise_status_text(got_)); \
      ++num_failures;                                                                   \
    }                                                                                   \
  } while (0)

// A text and what a cache is told of it --------------------------------------------------------

typedef struct text {
  headwise_sequence id;
  int64_t length;
  uint32_t tokens[kMaxTokens];
} text;

static int streams(int layer, int kv_head) { return layer == 1 || kv_head == 1; }

// An activation in [-1, 1): of a token at a position, in one head. 0: q, 1: k, 2: v.
static float activation(uint32_t token, int64_t pos, int layer, int head, int dim, uint32_t what) {
  uint32_t x = token * 2654435761u + (uint32_t)pos * 40503u + what * 9176u;
  x ^= (uint32_t)((layer * 16 + head) * 256 + dim) * 2246822519u;
  x = (x ^ (x >> 15)) * 3266489917u;
  x ^= x >> 13;
  return (float)(x >> 8) / 8388608.0f - 1.0f;
}

// One element of plain attention in double over what the plan lets the query see.
static void plain_attention(const text* of, int64_t pos, int layer, int qo_head, double* out) {
  const int kv_head = qo_head / kGroup;
  double sum = 0.0;
  for (int d = 0; d < kVDim[layer]; ++d) out[d] = 0.0;
  for (int64_t key = 0; key <= pos; ++key) {
    if (streams(layer, kv_head) && key >= kSink && pos - key >= kRecent) continue;
    double dot = 0.0;
    for (int d = 0; d < kKDim[layer]; ++d) {
      dot += (double)activation(of->tokens[pos], pos, layer, qo_head, d, 0) *
             (double)activation(of->tokens[key], key, layer, kv_head, d, 1);
    }
    const double weight = exp(dot / sqrt((double)kKDim[layer]));
    sum += weight;
    for (int d = 0; d < kVDim[layer]; ++d) {
      out[d] += weight * (double)activation(of->tokens[key], key, layer, kv_head, d, 2);
    }
  }
  for (int d = 0; d < kVDim[layer]; ++d) out[d] /= sum;
}

// Steps ----------------------------------------------------------------------------------------

typedef struct work {
  text* of;
  int64_t num_tokens;
} work;

enum { kMaxRows = 200 };
static float q_rows[kMaxRows * kQoHeads * kWidest], k_rows[kMaxRows * kKvHeads * kWidest];
static float v_rows[kMaxRows * kKvHeads * kWidest], out_rows[kMaxRows * kQoHeads * kWidest];

static headwise_input input(const float* data, int64_t rows, int64_t heads, int64_t dim) {
  const headwise_input tensor = {data, rows, heads, dim, 0, 0, HEADWISE_FLOAT32};
  return tensor;
}

static uint32_t next_token = 1;

// begin, attend, compare, commit. `num_shares` 0: headwise_attend.
static void run_step(headwise_cache* cache, const work* chunks, int32_t num_chunks, int32_t phase,
                     int32_t num_shares, double tolerance) {
  headwise_chunk named[4];
  int64_t rows = 0;
  for (int32_t c = 0; c < num_chunks; ++c) {
    text* of = chunks[c].of;
    for (int64_t i = 0; i < chunks[c].num_tokens; ++i) of->tokens[of->length + i] = next_token++;
    named[c].sequence = of->id;
    named[c].num_tokens = chunks[c].num_tokens;
    named[c].phase = phase;
    rows += chunks[c].num_tokens;
  }
  CHECK_STATUS(headwise_begin(cache, named, num_chunks), HEADWISE_OK);
  for (int layer = 0; layer < kLayers; ++layer) {
    const int k_dim = kKDim[layer], v_dim = kVDim[layer];
    int64_t row = 0;
    for (int32_t c = 0; c < num_chunks; ++c) {
      const text* of = chunks[c].of;
      for (int64_t i = 0; i < chunks[c].num_tokens; ++i, ++row) {
        const int64_t pos = of->length + i;
        const uint32_t token = of->tokens[pos];
        for (int h = 0; h < kQoHeads; ++h) {
          for (int d = 0; d < k_dim; ++d) {
            q_rows[(row * kQoHeads + h) * k_dim + d] = activation(token, pos, layer, h, d, 0);
          }
        }
        for (int h = 0; h < kKvHeads; ++h) {
          for (int d = 0; d < k_dim; ++d) {
            k_rows[(row * kKvHeads + h) * k_dim + d] = activation(token, pos, layer, h, d, 1);
          }
          for (int d = 0; d < v_dim; ++d) {
            v_rows[(row * kKvHeads + h) * v_dim + d] = activation(token, pos, layer, h, d, 2);
          }
        }
      }
    }
    const headwise_input q = input(q_rows, rows, kQoHeads, k_dim);
    const headwise_input k = input(k_rows, rows, kKvHeads, k_dim);
    const headwise_input v = input(v_rows, rows, kKvHeads, v_dim);
    // Heads first: [heads][rows][dim], as some engines have their outputs.
    const headwise_output out = {out_rows, rows,         kQoHeads,        v_dim,
                                 v_dim,    rows * v_dim, HEADWISE_FLOAT32};
    if (num_shares == 0) {
      CHECK_STATUS(headwise_attend(cache, layer, &q, &k, &v, &out), HEADWISE_OK);
      CHECK_STATUS(headwise_attend(cache, layer, &q, &k, &v, &out), HEADWISE_ATTENDED);
    }
    for (int32_t ith = num_shares; ith-- > 0;) {
      CHECK_STATUS(headwise_attend_share(cache, layer, &q, &k, &v, &out, ith, num_shares),
                   HEADWISE_OK);
    }
    row = 0;
    double worst = 0.0;
    for (int32_t c = 0; c < num_chunks; ++c) {
      for (int64_t i = 0; i < chunks[c].num_tokens; ++i, ++row) {
        for (int h = 0; h < kQoHeads; ++h) {
          double wanted[kWidest];
          plain_attention(chunks[c].of, chunks[c].of->length + i, layer, h, wanted);
          for (int d = 0; d < v_dim; ++d) {
            const double got = (double)out_rows[(h * rows + row) * v_dim + d];
            worst = fmax(worst, fabs(got - wanted[d]));
            if (!(fabs(got - wanted[d]) <= tolerance)) worst = HUGE_VAL;
          }
        }
      }
    }
    CHECK(worst <= tolerance);
  }
  CHECK_STATUS(headwise_commit(cache), HEADWISE_OK);
  for (int32_t c = 0; c < num_chunks; ++c) {
    chunks[c].of->length += chunks[c].num_tokens;
    CHECK(headwise_length(cache, chunks[c].of->id) == chunks[c].of->length);
  }
}

// What is built --------------------------------------------------------------------------------

static const headwise_layer kModel[kLayers] = {{kKvHeads, kGroup, 32, 16, 0.0f},
                                               {kKvHeads, kGroup, 16, 48, 0.0f}};

static headwise_plan* new_plan(void) {
  const int32_t heads[kLayers] = {kKvHeads, kKvHeads};
  headwise_error error;
  headwise_plan* plan = headwise_plan_create(heads, kLayers, &error);
  CHECK(plan != NULL && error.status == HEADWISE_OK && error.text[0] == '\0');
  for (int layer = 0; layer < kLayers; ++layer) {
    for (int head = 0; head < kKvHeads; ++head) {
      if (!streams(layer, head)) continue;
      CHECK_STATUS(headwise_plan_keep_window(plan, layer, head, kSink, kRecent), HEADWISE_OK);
    }
  }
  return plan;
}

static headwise_options new_options(int32_t rows) {
  headwise_options options;
  memset(&options, 0, sizeof options);
  options.max_context = kMaxTokens;
  options.max_chunk = kMaxRows;
  options.max_rollback = 8;
  options.max_sequences = 3;
  options.page_tokens = 16;
  options.num_threads = 3;
  options.rows = rows;
  return options;
}

static text new_text(headwise_cache* cache) {
  text fresh;
  memset(&fresh, 0, sizeof fresh);
  CHECK_STATUS(headwise_add_sequence(cache, &fresh.id), HEADWISE_OK);
  return fresh;
}

static void attends_as_plain_attention_does(int32_t rows, double tolerance) {
  headwise_plan* plan = new_plan();
  const headwise_options options = new_options(rows);
  headwise_error error;
  headwise_estimate estimate;
  CHECK_STATUS(headwise_estimate_cache(kModel, kLayers, plan, &options, &estimate, &error),
               HEADWISE_OK);
  CHECK(estimate.resident_bytes < estimate.dense_bytes && estimate.scratch_bytes > 0);
  headwise_cache* cache = headwise_cache_create(kModel, kLayers, plan, &options, &error);
  headwise_plan_destroy(plan);  // the cache has a copy
  CHECK(cache != NULL && error.status == HEADWISE_OK);
  if (cache == NULL) return;
  const size_t all = headwise_free_bytes(cache);
  CHECK(all == estimate.pool_bytes);

  text a = new_text(cache), b = new_text(cache);
  const work prompts[2] = {{&a, 100}, {&b, 37}};
  run_step(cache, prompts, 2, HEADWISE_PROMPT, 0, tolerance);
  const work unequal[2] = {{&b, 61}, {&a, 1}};
  run_step(cache, unequal, 2, HEADWISE_PROMPT, 3, tolerance);
  for (int i = 0; i < 40; ++i) {
    const work both[2] = {{&a, 1}, {&b, 1}};
    run_step(cache, both, 2, HEADWISE_DECODE, i % 4, tolerance);
  }
  CHECK(headwise_num_overflows(cache) == 0);

  const work drafts[1] = {{&a, 6}};
  run_step(cache, drafts, 1, HEADWISE_DECODE, 2, tolerance);
  CHECK_STATUS(headwise_rollback(cache, a.id, a.length - 9), HEADWISE_TOO_FAR_BACK);
  CHECK_STATUS(headwise_rollback(cache, a.id, a.length + 1), HEADWISE_TOO_FAR_BACK);
  CHECK_STATUS(headwise_rollback(cache, a.id, a.length - 4), HEADWISE_OK);
  CHECK(headwise_high_water(cache, a.id) == a.length);
  a.length -= 4;
  text child = a;
  CHECK_STATUS(headwise_fork(cache, a.id, &child.id), HEADWISE_OK);
  headwise_sequence none = {-7, 7};
  CHECK_STATUS(headwise_fork(cache, a.id, &none), HEADWISE_OUT_OF_SEQUENCES);
  CHECK_STATUS(headwise_add_sequence(cache, &none), HEADWISE_OUT_OF_SEQUENCES);
  CHECK(none.index == -7 && none.generation == 7);
  for (int i = 0; i < 5; ++i) {
    const work three[3] = {{&child, 1 + i}, {&a, 2}, {&b, 1}};
    run_step(cache, three, 3, HEADWISE_DECODE, 3, tolerance);
  }
  CHECK(headwise_held_bytes(cache, a.id) > 0);
  CHECK(headwise_longest_chunk(cache, a.id) == kMaxRows);
  CHECK_STATUS(headwise_clear(cache, a.id), HEADWISE_OK);
  a.length = 0;
  const work again[1] = {{&a, 50}};
  run_step(cache, again, 1, HEADWISE_PROMPT, 0, tolerance);

  const headwise_chunk chunk = {a.id, 1, HEADWISE_DECODE};
  CHECK_STATUS(headwise_begin(cache, &chunk, 1), HEADWISE_OK);
  CHECK_STATUS(headwise_clear(cache, a.id), HEADWISE_IN_STEP);
  CHECK_STATUS(headwise_commit(cache), HEADWISE_INCOMPLETE);
  CHECK_STATUS(headwise_drop(cache), HEADWISE_OK);
  CHECK_STATUS(headwise_drop(cache), HEADWISE_STALE);
  CHECK_STATUS(headwise_commit(cache), HEADWISE_STALE);
  run_step(cache, again, 1, HEADWISE_PROMPT, 2, tolerance);
  CHECK_STATUS(headwise_release(cache, a.id), HEADWISE_OK);
  CHECK_STATUS(headwise_release(cache, a.id), HEADWISE_INVALID_CHUNK);
  CHECK_STATUS(headwise_release(cache, b.id), HEADWISE_OK);
  CHECK_STATUS(headwise_release(cache, child.id), HEADWISE_OK);
  CHECK(headwise_free_bytes(cache) == all);
  headwise_cache_destroy(cache);
}

// Hostile arguments ----------------------------------------------------------------------------

static void plans_refuse(void) {
  const int32_t heads[2] = {2, 2}, negative[2] = {2, -1};
  headwise_error error;
  CHECK(headwise_plan_create(NULL, 2, &error) == NULL && error.status == HEADWISE_CONFIG_ERROR);
  CHECK(strcmp(error.text, "kv_heads is null") == 0);
  CHECK(headwise_plan_create(heads, 0, &error) == NULL);
  CHECK(headwise_plan_create(heads, -1, &error) == NULL);
  CHECK(headwise_plan_create(heads, INT32_MAX, &error) == NULL);
  CHECK(headwise_plan_create(negative, 2, &error) == NULL);
  CHECK(headwise_plan_create(negative, 2, NULL) == NULL);
  CHECK(headwise_plan_load_tsv(NULL, 0.5, 4, 28, &error) == NULL);
  CHECK(headwise_plan_load_tsv("no such file", 0.5, 4, 28, &error) == NULL);
  CHECK(strstr(error.text, "no such file") != NULL);

  headwise_plan* plan = headwise_plan_create(heads, 2, NULL);
  CHECK_STATUS(headwise_plan_keep_window(NULL, 0, 0, 4, 28), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_plan_keep_window(plan, 2, 0, 4, 28), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_plan_keep_window(plan, -1, 0, 4, 28), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_plan_keep_window(plan, 0, 2, 4, 28), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_plan_keep_window(plan, 0, INT32_MIN, 4, 28), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_plan_keep_window(plan, 0, 0, -1, 28), HEADWISE_CONFIG_ERROR);
  CHECK_STATUS(headwise_plan_keep_window(plan, 0, 0, 4, 0), HEADWISE_CONFIG_ERROR);
  CHECK_STATUS(headwise_plan_keep_growing_window(plan, 0, 0, 4, 0, 5), HEADWISE_CONFIG_ERROR);
  CHECK_STATUS(headwise_plan_keep_everything(plan, 0, 9), HEADWISE_INVALID_ARGUMENT);
  CHECK(headwise_plan_is_retrieval(plan, 0, 0) == 1);
  CHECK(headwise_plan_is_retrieval(plan, 0, 5) == 0 && headwise_plan_is_retrieval(NULL, 0, 0) == 0);
  CHECK_STATUS(headwise_plan_keep_window(plan, 0, 0, 4, 28), HEADWISE_OK);
  CHECK(headwise_plan_is_retrieval(plan, 0, 0) == 0 && headwise_plan_sparsity(plan) == 0.25);
  uint64_t words[2] = {0, 0}, others[2] = {0, 0};
  CHECK_STATUS(headwise_plan_fingerprint(plan, words), HEADWISE_OK);
  CHECK_STATUS(headwise_plan_keep_everything(plan, 0, 0), HEADWISE_OK);
  CHECK_STATUS(headwise_plan_fingerprint(plan, others), HEADWISE_OK);
  CHECK(memcmp(words, others, sizeof words) != 0);
  CHECK_STATUS(headwise_plan_fingerprint(plan, NULL), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_plan_fingerprint(NULL, words), HEADWISE_INVALID_ARGUMENT);
  CHECK(headwise_plan_num_layers(plan) == 2 && headwise_plan_num_layers(NULL) == 0);
  CHECK(headwise_plan_num_kv_heads(plan, 1) == 2 && headwise_plan_num_kv_heads(plan, 2) == 0);
  headwise_plan_destroy(plan);
  headwise_plan_destroy(NULL);
}

static void plans_are_loaded(void) {
  const char* const path = "c_face_gates.tsv";
  FILE* file = fopen(path, "w");
  CHECK(file != NULL);
  if (file == NULL) return;
  fputs("0.9\t0.1\n0.2\t0.8\n", file);
  fclose(file);
  headwise_error error;
  headwise_plan* plan = headwise_plan_load_tsv(path, 0.5, 4, 28, &error);
  CHECK(plan != NULL && headwise_plan_sparsity(plan) == 0.5);
  CHECK(headwise_plan_is_retrieval(plan, 0, 0) == 1 && headwise_plan_is_retrieval(plan, 1, 1) == 1);
  headwise_plan_destroy(plan);
  CHECK(headwise_plan_load_tsv(path, 1.5, 4, 28, &error) == NULL);
  CHECK(error.status == HEADWISE_CONFIG_ERROR);
  CHECK(headwise_plan_load_tsv(path, (double)NAN, 4, 28, &error) == NULL);
  CHECK(headwise_plan_load_tsv(path, 0.5, 4, -3, &error) == NULL);
  file = fopen(path, "w");
  if (file == NULL) return;
  fputs("0.9\tnan\n", file);
  fclose(file);
  CHECK(headwise_plan_load_tsv(path, 0.5, 4, 28, &error) == NULL);
  CHECK(error.status == HEADWISE_FORMAT_ERROR && strstr(error.text, path) != NULL);
  remove(path);
}

static headwise_status refusal(headwise_plan* plan, const headwise_options* options) {
  headwise_error error;
  headwise_cache* cache = headwise_cache_create(kModel, kLayers, plan, options, &error);
  headwise_estimate estimate;
  CHECK((cache == NULL) == (error.status != HEADWISE_OK));
  CHECK(headwise_estimate_cache(kModel, kLayers, plan, options, &estimate, NULL) == error.status);
  CHECK(error.status == HEADWISE_OK || error.text[0] != '\0');
  headwise_cache_destroy(cache);
  return error.status;
}

static void caches_refuse(void) {
  headwise_plan* plan = new_plan();
  headwise_options options = new_options(HEADWISE_ROWS_F16);
  headwise_error error;
  headwise_estimate estimate;
  CHECK(headwise_cache_create(NULL, kLayers, plan, &options, &error) == NULL);
  CHECK(headwise_cache_create(kModel, -1, plan, &options, &error) == NULL);
  CHECK(headwise_cache_create(kModel, 1, plan, &options, &error) == NULL);
  CHECK(strstr(error.text, "the plan has 2 layers, the model 1") != NULL);
  CHECK(headwise_cache_create(kModel, kLayers, NULL, &options, &error) == NULL);
  CHECK(headwise_cache_create(kModel, kLayers, plan, NULL, &error) == NULL);
  CHECK_STATUS(headwise_estimate_cache(kModel, kLayers, plan, &options, NULL, &error),
               HEADWISE_CONFIG_ERROR);
  CHECK_STATUS(headwise_estimate_cache(NULL, kLayers, plan, &options, &estimate, NULL),
               HEADWISE_CONFIG_ERROR);
  headwise_layer other[kLayers] = {kModel[0], kModel[1]};
  other[1].num_kv_heads = 4;
  CHECK(headwise_cache_create(other, kLayers, plan, &options, &error) == NULL);
  other[1] = kModel[1];
  other[0].k_dim = 20;
  CHECK(headwise_cache_create(other, kLayers, plan, &options, &error) == NULL);
  other[0].k_dim = INT32_MIN;
  CHECK(headwise_cache_create(other, kLayers, plan, &options, &error) == NULL);
  other[0] = kModel[0];
  other[0].sm_scale = NAN;
  CHECK(headwise_cache_create(other, kLayers, plan, &options, &error) == NULL);

  CHECK_STATUS(refusal(plan, &options), HEADWISE_OK);
#define REFUSED_WITH(member, value)                               \
  do {                                                            \
    options = new_options(HEADWISE_ROWS_F16);                     \
    options.member = value;                                       \
    CHECK_STATUS(refusal(plan, &options), HEADWISE_CONFIG_ERROR); \
  } while (0)
  REFUSED_WITH(max_context, 0);
  REFUSED_WITH(max_context, -1);
  REFUSED_WITH(max_context, INT64_MAX);
  REFUSED_WITH(max_chunk, -1);
  REFUSED_WITH(max_rollback, INT64_MIN);
  REFUSED_WITH(max_sequences, -1);
  REFUSED_WITH(page_tokens, -16);
  REFUSED_WITH(page_tokens, 24);
  REFUSED_WITH(num_threads, -1);
  REFUSED_WITH(rows, 4);
  REFUSED_WITH(rows, -1);
  REFUSED_WITH(prefill, 2);
  REFUSED_WITH(page_memory, &options);  // of no bytes
  REFUSED_WITH(max_bytes, 1);
  CHECK_STATUS(headwise_plan_keep_growing_window(plan, 0, 0, 4, 64, 5), HEADWISE_OK);
  options = new_options(HEADWISE_ROWS_F16);
  CHECK_STATUS(refusal(plan, &options), HEADWISE_CONFIG_ERROR);
  options.prefill = HEADWISE_CHUNK_CAUSAL;
  CHECK_STATUS(refusal(plan, &options), HEADWISE_OK);
  headwise_plan_destroy(plan);
}

static void everything_refuses_null(void) {
  const headwise_sequence nobody = {0, 0};
  headwise_sequence id;
  const headwise_chunk chunk = {nobody, 1, HEADWISE_PROMPT};
  const headwise_input in = input(q_rows, 1, 1, 16);
  const headwise_output out = {out_rows, 1, 1, 16, 0, 0, 0};
  CHECK_STATUS(headwise_add_sequence(NULL, &id), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_release(NULL, nobody), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_clear(NULL, nobody), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_rollback(NULL, nobody, 0), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_fork(NULL, nobody, &id), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_begin(NULL, &chunk, 1), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_attend(NULL, 0, &in, &in, &in, &out), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_attend_share(NULL, 0, &in, &in, &in, &out, 0, 1),
               HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_commit(NULL), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_drop(NULL), HEADWISE_INVALID_ARGUMENT);
  CHECK(headwise_length(NULL, nobody) == 0 && headwise_high_water(NULL, nobody) == 0);
  CHECK(headwise_held_bytes(NULL, nobody) == 0 && headwise_free_bytes(NULL) == 0);
  CHECK(headwise_missing_bytes(NULL, &chunk, 1) == SIZE_MAX);
  CHECK(headwise_longest_chunk(NULL, nobody) == 0 && headwise_num_overflows(NULL) == 0);
  headwise_cache_destroy(NULL);
  for (int status = -3; status < 200; ++status) CHECK(headwise_status_text(status)[0] != '\0');
  CHECK(strcmp(headwise_status_text(HEADWISE_OK), "ok") == 0);
  CHECK(strcmp(headwise_status_text(HEADWISE_DEVICE_ERROR), "device error") == 0);
  CHECK(strcmp(headwise_status_text(INT32_MAX), "unknown") == 0);
}

static void steps_refuse(void) {
  headwise_plan* plan = new_plan();
  const headwise_options options = new_options(HEADWISE_ROWS_F32);
  headwise_cache* cache = headwise_cache_create(kModel, kLayers, plan, &options, NULL);
  headwise_plan_destroy(plan);
  CHECK(cache != NULL);
  if (cache == NULL) return;
  const text a = new_text(cache);
  CHECK_STATUS(headwise_add_sequence(cache, NULL), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_fork(cache, a.id, NULL), HEADWISE_INVALID_ARGUMENT);

  // Ids that name nobody, in any way.
  const headwise_sequence strangers[5] = {
      {a.id.index, a.id.generation + 1}, {-1, 0}, {3, 0}, {INT32_MAX, 0}, {INT32_MIN, UINT32_MAX}};
  for (int i = 0; i < 5; ++i) {
    const headwise_sequence id = strangers[i];
    headwise_sequence child = {-7, 7};
    const headwise_chunk chunk = {id, 1, HEADWISE_PROMPT};
    CHECK_STATUS(headwise_begin(cache, &chunk, 1), HEADWISE_INVALID_CHUNK);
    CHECK_STATUS(headwise_rollback(cache, id, 0), HEADWISE_INVALID_CHUNK);
    CHECK_STATUS(headwise_clear(cache, id), HEADWISE_INVALID_CHUNK);
    CHECK_STATUS(headwise_release(cache, id), HEADWISE_INVALID_CHUNK);
    CHECK_STATUS(headwise_fork(cache, id, &child), HEADWISE_INVALID_CHUNK);
    CHECK(child.index == -7);
    CHECK(headwise_length(cache, id) == 0 && headwise_held_bytes(cache, id) == 0);
    CHECK(headwise_longest_chunk(cache, id) == 0);
    CHECK(headwise_missing_bytes(cache, &chunk, 1) == 0);
  }

  // Chunks.
  headwise_chunk chunks[4] = {{a.id, 3, HEADWISE_PROMPT}, {a.id, 1, HEADWISE_PROMPT}};
  CHECK_STATUS(headwise_begin(cache, NULL, 1), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_begin(cache, chunks, -1), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_begin(cache, chunks, INT32_MAX), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_begin(cache, chunks, 2), HEADWISE_INVALID_CHUNK);  // one named twice
  CHECK(headwise_missing_bytes(cache, NULL, 1) == SIZE_MAX);
  CHECK(headwise_missing_bytes(cache, chunks, -1) == SIZE_MAX);
  chunks[0].phase = 2;
  CHECK_STATUS(headwise_begin(cache, chunks, 1), HEADWISE_INVALID_ARGUMENT);
  chunks[0].phase = -1;
  CHECK_STATUS(headwise_begin(cache, chunks, 1), HEADWISE_INVALID_ARGUMENT);
  chunks[0].phase = HEADWISE_DECODE;
  chunks[0].num_tokens = -1;
  CHECK_STATUS(headwise_begin(cache, chunks, 1), HEADWISE_INVALID_CHUNK);
  chunks[0].num_tokens = INT64_MIN;
  CHECK_STATUS(headwise_begin(cache, chunks, 1), HEADWISE_INVALID_CHUNK);
  chunks[0].num_tokens = INT64_MAX;
  CHECK_STATUS(headwise_begin(cache, chunks, 1), HEADWISE_CONTEXT_TOO_LONG);
  CHECK(headwise_missing_bytes(cache, chunks, 1) == 0);
  chunks[0].num_tokens = kMaxRows + 1;
  CHECK_STATUS(headwise_begin(cache, chunks, 1), HEADWISE_CHUNK_TOO_LONG);
  CHECK_STATUS(headwise_begin(cache, NULL, 0), HEADWISE_OK);  // a step of nobody
  CHECK_STATUS(headwise_commit(cache), HEADWISE_OK);

  // Tensors.
  const headwise_input q = input(q_rows, 3, kQoHeads, 32), k = input(k_rows, 3, kKvHeads, 32);
  const headwise_input v = input(v_rows, 3, kKvHeads, 16);
  const headwise_output out = {out_rows, 3, kQoHeads, 16, 0, 0, 0};
  CHECK_STATUS(headwise_attend(cache, 0, &q, &k, &v, &out), HEADWISE_STALE);
  chunks[0].num_tokens = 3;
  CHECK_STATUS(headwise_begin(cache, chunks, 1), HEADWISE_OK);
  memset(out_rows, 0, sizeof out_rows);
#define REFUSED_TENSOR(tensor, member, value)                                                 \
  do {                                                                                        \
    headwise_input wq = q, wk = k, wv = v;                                                    \
    headwise_output wout = out;                                                               \
    tensor.member = value;                                                                    \
    CHECK_STATUS(headwise_attend(cache, 0, &wq, &wk, &wv, &wout), HEADWISE_INVALID_ARGUMENT); \
    CHECK_STATUS(headwise_attend_share(cache, 0, &wq, &wk, &wv, &wout, 0, 1),                 \
                 HEADWISE_INVALID_ARGUMENT);                                                  \
  } while (0)
#define REFUSED_TENSORS(member, value)   \
  do {                                   \
    REFUSED_TENSOR(wq, member, value);   \
    REFUSED_TENSOR(wk, member, value);   \
    REFUSED_TENSOR(wv, member, value);   \
    REFUSED_TENSOR(wout, member, value); \
  } while (0)
  REFUSED_TENSORS(data, NULL);
  REFUSED_TENSOR(wq, data, (const char*)q_rows + 1);
  REFUSED_TENSOR(wout, data, (char*)out_rows + 2);
  REFUSED_TENSORS(type, 3);
  REFUSED_TENSORS(type, -1);
  REFUSED_TENSORS(num_rows, 2);
  REFUSED_TENSORS(num_rows, -3);
  REFUSED_TENSORS(num_heads, 3);
  REFUSED_TENSORS(num_heads, 0);
  REFUSED_TENSORS(dim, 48);
  REFUSED_TENSORS(dim, INT64_MIN);
  REFUSED_TENSORS(row_stride, -1);
  REFUSED_TENSORS(row_stride, 15);
  REFUSED_TENSORS(row_stride, INT64_MAX);
  REFUSED_TENSORS(head_stride, -16);
  REFUSED_TENSORS(head_stride, 15);
  REFUSED_TENSORS(head_stride, INT64_MAX);
  REFUSED_TENSOR(wout, row_stride, 48);  // rows of 4 heads of 16 overlap
  CHECK_STATUS(headwise_attend(cache, 0, NULL, &k, &v, &out), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_attend(cache, 0, &q, NULL, &v, &out), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_attend(cache, 0, &q, &k, NULL, &out), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_attend(cache, 0, &q, &k, &v, NULL), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_attend(cache, -1, &q, &k, &v, &out), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_attend(cache, kLayers, &q, &k, &v, &out), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_attend(cache, 1, &q, &k, &v, &out), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_attend_share(cache, 0, &q, &k, &v, &out, -1, 2), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_attend_share(cache, 0, &q, &k, &v, &out, 2, 2), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_attend_share(cache, 0, &q, &k, &v, &out, 0, 0), HEADWISE_INVALID_ARGUMENT);
  CHECK_STATUS(headwise_attend_share(cache, 0, &q, &k, &v, &out, 0, INT32_MAX),
               HEADWISE_TOO_MANY_THREADS);
  for (size_t i = 0; i < sizeof out_rows / sizeof out_rows[0]; ++i) CHECK(out_rows[i] == 0.0f);
  CHECK_STATUS(headwise_commit(cache), HEADWISE_INCOMPLETE);  // all of that attended nothing
  CHECK_STATUS(headwise_attend(cache, 0, &q, &k, &v, &out), HEADWISE_OK);
  CHECK_STATUS(headwise_rollback(cache, a.id, -1), HEADWISE_IN_STEP);
  CHECK_STATUS(headwise_drop(cache), HEADWISE_OK);
  CHECK_STATUS(headwise_rollback(cache, a.id, -1), HEADWISE_TOO_FAR_BACK);
  CHECK_STATUS(headwise_rollback(cache, a.id, INT64_MAX), HEADWISE_TOO_FAR_BACK);
  CHECK(headwise_length(cache, a.id) == 0);
  headwise_cache_destroy(cache);
}

// Two-byte tensors: all zeros and ones, which every type has exactly.
static void tensors_of_two_bytes(void) {
  headwise_plan* plan = new_plan();
  const headwise_options options = new_options(HEADWISE_ROWS_F16);
  headwise_cache* cache = headwise_cache_create(kModel, kLayers, plan, &options, NULL);
  headwise_plan_destroy(plan);
  const text a = new_text(cache);
  const headwise_chunk chunk = {a.id, 2, HEADWISE_PROMPT};
  CHECK_STATUS(headwise_begin(cache, &chunk, 1), HEADWISE_OK);
  static uint16_t queries[2 * kQoHeads * kWidest], keys[2 * kKvHeads * kWidest];
  static uint16_t values[2 * kKvHeads * kWidest], outputs[2 * kQoHeads * kWidest + 1];
  for (int layer = 0; layer < kLayers; ++layer) {
    for (int i = 0; i < 2 * kKvHeads * kWidest; ++i) values[i] = 0x3F80;  // 1 as bf16
    memset(outputs, 0x77, sizeof outputs);
    headwise_input q = input(NULL, 2, kQoHeads, kKDim[layer]);
    headwise_input k = input(NULL, 2, kKvHeads, kKDim[layer]);
    headwise_input v = input(NULL, 2, kKvHeads, kVDim[layer]);
    q.data = queries;
    k.data = keys;
    v.data = values;
    q.type = k.type = HEADWISE_FLOAT16;
    v.type = HEADWISE_BFLOAT16;
    const headwise_output out = {outputs, 2, kQoHeads, kVDim[layer], 0, 0, HEADWISE_FLOAT16};
    CHECK_STATUS(headwise_attend(cache, layer, &q, &k, &v, &out), HEADWISE_OK);
    const int written = 2 * kQoHeads * kVDim[layer];
    for (int i = 0; i < written; ++i) CHECK(outputs[i] == 0x3C00);  // 1 as f16
    CHECK(outputs[written] == 0x7777);
  }
  CHECK_STATUS(headwise_commit(cache), HEADWISE_OK);
  headwise_cache_destroy(cache);
}

static void pages_run_out(void) {
  static _Alignas(64) unsigned char memory[1 << 16];
  headwise_plan* plan = new_plan();
  headwise_options options = new_options(HEADWISE_ROWS_BF16);
  options.page_memory = memory;
  options.max_bytes = sizeof memory;
  headwise_cache* cache = headwise_cache_create(kModel, kLayers, plan, &options, NULL);
  CHECK(cache != NULL);
  if (cache != NULL) {
    const text a = new_text(cache);
    headwise_chunk chunk = {a.id, kMaxRows, HEADWISE_PROMPT};
    const size_t missing = headwise_missing_bytes(cache, &chunk, 1);
    CHECK((missing > 0) == (headwise_begin(cache, &chunk, 1) == HEADWISE_OUT_OF_PAGES));
    chunk.num_tokens = headwise_longest_chunk(cache, a.id);
    CHECK(chunk.num_tokens > 0 && headwise_missing_bytes(cache, &chunk, 1) == 0);
    CHECK_STATUS(headwise_begin(cache, &chunk, 1), HEADWISE_OK);
    headwise_cache_destroy(cache);  // with a step open
  }
  options.page_memory = memory + 1;
  options.max_bytes = sizeof memory - 64;
  CHECK(headwise_cache_create(kModel, kLayers, plan, &options, NULL) == NULL);
  headwise_plan_destroy(plan);
}

int main(void) {
  attends_as_plain_attention_does(HEADWISE_ROWS_F32, 1e-5);
  attends_as_plain_attention_does(HEADWISE_ROWS_F16, 4e-3);
  attends_as_plain_attention_does(HEADWISE_ROWS_BF16, 3e-2);
  attends_as_plain_attention_does(HEADWISE_ROWS_INT8, 4e-2);
  plans_refuse();
  plans_are_loaded();
  caches_refuse();
  everything_refuses_null();
  steps_refuse();
  tensors_of_two_bytes();
  pages_run_out();
  if (num_failures == 0) printf("the C face holds\n");
  return num_failures == 0 ? 0 : 1;
}
