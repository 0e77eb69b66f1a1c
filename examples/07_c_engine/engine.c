// SPDX-License-Identifier: MIT
// An engine in C: a prompt, a fork, both go their own ways, drafts that are taken back. Half of the
// heads stream. What a fork and a rollback restore is checked bit for bit.
#include <stdio.h>
#include <string.h>

#include "headwise/headwise.h"

enum { kLayers = 4, kKvHeads = 4, kGroup = 2, kDim = 64, kMaxRows = 256, kThreads = 2 };
static float q[kMaxRows * kKvHeads * kGroup * kDim], out[kMaxRows * kKvHeads * kGroup * kDim];
static float k[kMaxRows * kKvHeads * kDim], v[kMaxRows * kKvHeads * kDim];

// Stands for the projections and RoPE: numbers that follow from token, position and layer.
static void project(float* rows, int64_t first_pos, int64_t num_tokens, int layer, int heads,
                    uint32_t token) {
  for (int64_t i = 0; i < num_tokens * heads * kDim; ++i) {
    const uint32_t pos = (uint32_t)(first_pos + i / (heads * kDim));
    uint32_t x = (token * 977u + pos) * 2654435761u + (uint32_t)(layer * 7919 + i % (heads * kDim));
    x = (x ^ (x >> 15)) * 2246822519u;
    rows[i] = (float)((x ^ (x >> 13)) >> 8) / 8388608.0f - 1.0f;
  }
}

// One step of one sequence; serving engines name several. `token` stands for the text.
static headwise_status forward(headwise_cache* cache, headwise_sequence sequence,
                               int64_t num_tokens, int32_t phase, uint32_t token) {
  const int64_t first = headwise_length(cache, sequence);
  const headwise_chunk chunk = {sequence, num_tokens, phase};
  headwise_status status = headwise_begin(cache, &chunk, 1);
  for (int layer = 0; layer < kLayers && status == HEADWISE_OK; ++layer) {
    project(q, first, num_tokens, layer, kKvHeads * kGroup, token);
    project(k, first, num_tokens, layer, kKvHeads, token + 1);
    project(v, first, num_tokens, layer, kKvHeads, token + 2);
    const headwise_input queries = {q, num_tokens, kKvHeads * kGroup, kDim, 0, 0, HEADWISE_FLOAT32};
    const headwise_input keys = {k, num_tokens, kKvHeads, kDim, 0, 0, HEADWISE_FLOAT32};
    const headwise_input values = {v, num_tokens, kKvHeads, kDim, 0, 0, HEADWISE_FLOAT32};
    const headwise_output outputs = {out, num_tokens, kKvHeads * kGroup, kDim,
                                     0,   0,          HEADWISE_FLOAT32};
    // Each of the engine's threads takes a share; here one thread takes them all.
    for (int32_t ith = 0; ith < kThreads && status == HEADWISE_OK; ++ith) {
      status =
          headwise_attend_share(cache, layer, &queries, &keys, &values, &outputs, ith, kThreads);
    }
  }
  return status == HEADWISE_OK ? headwise_commit(cache) : status;
}

int main(void) {
  headwise_layer layers[kLayers];
  int32_t kv_heads[kLayers];
  for (int layer = 0; layer < kLayers; ++layer) {
    layers[layer] = (headwise_layer){kKvHeads, kGroup, kDim, kDim, 0.0f};
    kv_heads[layer] = kKvHeads;
  }
  headwise_error error;
  headwise_plan* plan = headwise_plan_create(kv_heads, kLayers, &error);
  for (int layer = 0; layer < kLayers; ++layer) {  // or headwise_plan_load_tsv: published heads
    for (int head = 0; head < kKvHeads; head += 2) {
      if (headwise_plan_keep_window(plan, layer, head, 4, 60) != HEADWISE_OK) return 1;
    }
  }
  const headwise_options options = {.max_context = 4096,
                                    .max_chunk = kMaxRows,
                                    .max_rollback = 8,
                                    .max_sequences = 2,
                                    .num_threads = kThreads};
  headwise_estimate bytes;
  if (headwise_estimate_cache(layers, kLayers, plan, &options, &bytes, &error) != HEADWISE_OK) {
    printf("%s\n", error.text);
    return 1;
  }
  printf("%zu KiB, dense %zu KiB\n", bytes.resident_bytes / 1024, bytes.dense_bytes / 1024);
  headwise_cache* cache = headwise_cache_create(layers, kLayers, plan, &options, &error);
  headwise_plan_destroy(plan);
  if (cache == NULL) {
    printf("%s\n", error.text);
    return 1;
  }

  headwise_sequence chat, other;
  headwise_status status = headwise_add_sequence(cache, &chat);
  for (int i = 0; i < 4 && status == HEADWISE_OK; ++i) {
    status = forward(cache, chat, kMaxRows, HEADWISE_PROMPT, 1);
  }
  if (status == HEADWISE_OK) status = headwise_fork(cache, chat, &other);
  static float first[sizeof out / sizeof out[0]];
  if (status == HEADWISE_OK) status = forward(cache, chat, 1, HEADWISE_DECODE, 5);
  memcpy(first, out, sizeof out);
  if (status == HEADWISE_OK) status = forward(cache, other, 1, HEADWISE_DECODE, 5);
  const int forks = memcmp(first, out, kKvHeads * kGroup * kDim * sizeof out[0]) == 0;

  // Six drafted tokens, taken back, and drafted again.
  const int64_t length = headwise_length(cache, chat);
  if (status == HEADWISE_OK) status = forward(cache, chat, 6, HEADWISE_DECODE, 9);
  memcpy(first, out, sizeof out);
  if (status == HEADWISE_OK) status = headwise_rollback(cache, chat, length);
  if (status == HEADWISE_OK) status = forward(cache, chat, 6, HEADWISE_DECODE, 9);
  const int rolls_back = memcmp(first, out, 6 * kKvHeads * kGroup * kDim * sizeof out[0]) == 0;

  printf("%s; a fork goes on alike: %s; a rollback restores: %s; %zu KiB held\n",
         headwise_status_text(status), forks ? "yes" : "no", rolls_back ? "yes" : "no",
         headwise_held_bytes(cache, chat) / 1024);
  headwise_cache_destroy(cache);
  return status == HEADWISE_OK && forks && rolls_back ? 0 : 1;
}
