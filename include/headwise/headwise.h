// SPDX-License-Identifier: MIT
/// @file headwise.h
/// The library for engines in C: plans, caches, sequences, steps. C11, and C++.
///
/// One .cpp file of the engine includes headwise_c.hpp, which defines everything declared here;
/// that file alone is C++20, and decides with its flags (-march) which kernels there are.
///
///     headwise_plan* plan = headwise_plan_load_tsv("full_attention_heads.tsv", 0.5, 64, 256,
///     &error); headwise_cache* cache = headwise_cache_create(layers, num_layers, plan, &options,
///     &error); headwise_add_sequence(cache, &sequence); headwise_begin(cache, &chunk, 1); // one
///     thread headwise_attend(cache, layer, &q, &k, &v, &out);  // each layer once; or shares of it
///     headwise_commit(cache);
///
/// Nothing here throws or aborts. What a pointer says it points to must be there; all else is
/// checked: a null pointer, a negative number, a wrong shape, an id that names nobody are answered
/// with a status and change nothing. Structs that are set to zero mean the defaults; later versions
/// may add members at their ends.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Errors ------------------------------------------------------------------------------------------

/// What a call answers. Anything but HEADWISE_OK has changed nothing, except that headwise_begin
/// drops the step that was open before it looks at the new one.
typedef enum headwise_status {
  HEADWISE_OK = 0,
  HEADWISE_OUT_OF_PAGES = 1,       ///< headwise_missing_bytes says how many bytes
  HEADWISE_OUT_OF_TABLES = 2,      ///< no block of page tables is free for so long a sequence
  HEADWISE_OUT_OF_SEQUENCES = 3,   ///< max_sequences are in use
  HEADWISE_CONTEXT_TOO_LONG = 4,   ///< a sequence would grow past max_context
  HEADWISE_CHUNK_TOO_LONG = 5,     ///< more new tokens than max_chunk
  HEADWISE_INVALID_CHUNK = 6,      ///< unknown sequence, one named twice, a negative count
  HEADWISE_IN_STEP = 7,            ///< the sequence takes part in the open step
  HEADWISE_STALE = 8,              ///< no step is open
  HEADWISE_INCOMPLETE = 9,         ///< commit before every layer was attended
  HEADWISE_TOO_FAR_BACK = 10,      ///< rollback below high water - max_rollback, or forward
  HEADWISE_ATTENDED = 11,          ///< the layer was attended already
  HEADWISE_NOT_PLANNED = 12,       ///< a share that was attended already while others were not
  HEADWISE_TOO_MANY_THREADS = 13,  ///< more shares than headwise_options.num_threads
  HEADWISE_TOO_SMALL = 14,         ///< memory of the caller's is smaller than its size query says
  HEADWISE_ROLLED_BACK = 15,       ///< whole pages hold rows of tokens rolled back
  HEADWISE_DEVICE_ERROR = 16,      ///< a device refused a copy or a launch
  HEADWISE_BAD_SELECTION = 17,     ///< kept positions that a sequence cannot keep
  HEADWISE_SELECTED_FROM = 18,  ///< a sequence whose rows a selection has dropped has no snapshot

  HEADWISE_INVALID_ARGUMENT = 64,  ///< null, negative, out of range, or of another shape
  HEADWISE_CONFIG_ERROR = 65,      ///< a value at set-up; the text names value and limit
  HEADWISE_FORMAT_ERROR = 66,      ///< a file; the text names file, line and value
  HEADWISE_OUT_OF_MEMORY = 67,     ///< the allocator refused
  HEADWISE_FAILED = -1             ///< anything else that was thrown; the text says what
} headwise_status;

/// A few words for a log. Never null.
/// @param status  a headwise_status
const char* headwise_status_text(int status);

/// What went wrong at set-up, in the caller's memory. Every call that takes one writes it.
typedef struct headwise_error {
  headwise_status status;  ///< HEADWISE_OK where nothing did
  char text[256];  ///< names the value and its limit, the file and its line; never without end
} headwise_error;

// Plans -------------------------------------------------------------------------------------------

/// What every KV head of a model keeps.
typedef struct headwise_plan headwise_plan;

/// A plan in which every head keeps everything.
/// @param kv_heads  [num_layers] KV heads of each layer
/// @return null where that is no model; `error`, if not null, says why.
headwise_plan* headwise_plan_create(const int32_t* kv_heads, int32_t num_layers,
                                    headwise_error* error);
/// The published gates of DuoAttention or RLKV (a TSV, a line a layer): the lowest stream.
/// @param sparsity  share of the KV heads that stream, in [0, 1]
/// @param sink,recent  tokens that they keep; `recent` counts the current one
/// @return null where the file or a number is wrong; `error`, if not null, says why.
headwise_plan* headwise_plan_load_tsv(const char* path, double sparsity, int64_t sink,
                                      int64_t recent, headwise_error* error);
/// Ends a plan; null is fine. A cache has a copy of its own.
void headwise_plan_destroy(headwise_plan* plan);

/// The head keeps every token.
headwise_status headwise_plan_keep_everything(headwise_plan* plan, int32_t layer, int32_t kv_head);
/// The head keeps its first `sink` tokens and the newest `recent`, the current one counted.
headwise_status headwise_plan_keep_window(headwise_plan* plan, int32_t layer, int32_t kv_head,
                                          int64_t sink, int64_t recent);
/// The head keeps a window that grows with the context, and one row for all others
/// (RazorAttention); needs HEADWISE_CHUNK_CAUSAL.
headwise_status headwise_plan_keep_growing_window(headwise_plan* plan, int32_t layer,
                                                  int32_t kv_head, int64_t sink, int64_t min_recent,
                                                  int64_t divisor);

/// Layers of the plan; 0 for null.
int32_t headwise_plan_num_layers(const headwise_plan* plan);
/// KV heads of a layer; 0 where there is none.
int32_t headwise_plan_num_kv_heads(const headwise_plan* plan, int32_t layer);
/// 1 where the head keeps everything, 0 where it does not or there is none.
int32_t headwise_plan_is_retrieval(const headwise_plan* plan, int32_t layer, int32_t kv_head);
/// Share of KV heads that do not keep everything; 0 for null.
double headwise_plan_sparsity(const headwise_plan* plan);
/// 128 bits that name what the plan keeps: salt the keys of a prefix cache with them.
headwise_status headwise_plan_fingerprint(const headwise_plan* plan, uint64_t words[2]);

// Caches ------------------------------------------------------------------------------------------

/// One attention layer. Query head h reads KV head h / group_size.
typedef struct headwise_layer {
  int32_t num_kv_heads;
  int32_t group_size;  ///< query heads per KV head
  int32_t k_dim;       ///< width of a K row, a multiple of 16
  int32_t v_dim;       ///< width of a V row, a multiple of 16
  float sm_scale;      ///< factor on q.k; 0: 1 / sqrt(k_dim)
} headwise_layer;

/// What a row is stored as.
enum headwise_rows {
  HEADWISE_ROWS_F16 = 0,
  HEADWISE_ROWS_BF16 = 1,
  HEADWISE_ROWS_F32 = 2,
  HEADWISE_ROWS_INT8 = 3  ///< a byte an element, a scale a row
};

/// Which rows a prompt's queries see on a streaming head.
enum headwise_prefill {
  HEADWISE_WINDOWED = 0,     ///< the window rule, however the prompt is cut
  HEADWISE_CHUNK_CAUSAL = 1  ///< what the chunk's first query sees, and the chunk (DuoAttention)
};

/// Which rule a chunk's queries follow.
enum headwise_phase {
  HEADWISE_PROMPT = 0,  ///< headwise_options.prefill
  HEADWISE_DECODE = 1   ///< the window rule; any number of tokens (speculation)
};

/// What a cache is built with; max_context is the one member without a default that works.
typedef struct headwise_options {
  int64_t max_context;    ///< longest sequence in tokens
  int64_t max_chunk;      ///< most new tokens of a sequence in a step; 0: as many as the context
  int64_t max_rollback;   ///< tokens that rollback may take back below the longest length
  size_t max_bytes;       ///< of page memory; 0: enough for all sequences at their longest
  void* page_memory;      ///< the caller's, 64-byte aligned, max_bytes of it; null: allocated
  int32_t max_sequences;  ///< that live at once; 0: 1
  int32_t page_tokens;    ///< rows of a page, a multiple of 16; 0: 64
  int32_t num_threads;    ///< that share a layer, at most; 0: 1
  int32_t rows;           ///< enum headwise_rows
  int32_t prefill;        ///< enum headwise_prefill
} headwise_options;

/// Bytes of a cache before it is built, for all sequences and layers together.
typedef struct headwise_estimate {
  size_t resident_bytes;   ///< pages held by max_sequences sequences of max_context tokens
  size_t transient_bytes;  ///< more pages while a step of max_chunk tokens each is open
  size_t pool_bytes;       ///< page memory that is allocated
  size_t metadata_bytes;   ///< tables, lengths, compensation rows
  size_t scratch_bytes;    ///< what attention keeps between the step's shares
  size_t dense_bytes;      ///< resident_bytes if every head kept everything
} headwise_estimate;

/// K and V of many sequences, and the one step that is open. begin, commit, drop and what names a
/// sequence are one thread's business at a time; shares of a layer may run at once in between.
typedef struct headwise_cache headwise_cache;

/// What headwise_cache_create will allocate.
/// @return HEADWISE_CONFIG_ERROR as that; `error`, if not null, says why.
headwise_status headwise_estimate_cache(const headwise_layer* layers, int32_t num_layers,
                                        const headwise_plan* plan, const headwise_options* options,
                                        headwise_estimate* estimate, headwise_error* error);
/// Allocates everything; no later call does.
/// @param layers  [num_layers]; as many layers and KV heads as the plan has
/// @return null where that is no cache; `error`, if not null, says why.
headwise_cache* headwise_cache_create(const headwise_layer* layers, int32_t num_layers,
                                      const headwise_plan* plan, const headwise_options* options,
                                      headwise_error* error);
/// Ends a cache; null is fine.
void headwise_cache_destroy(headwise_cache* cache);

// Sequences ---------------------------------------------------------------------------------------

/// Names a sequence of one cache until it is released, and nobody afterwards.
typedef struct headwise_sequence {
  int32_t index;
  uint32_t generation;
} headwise_sequence;

/// An empty sequence; HEADWISE_OUT_OF_SEQUENCES where max_sequences are in use.
headwise_status headwise_add_sequence(headwise_cache* cache, headwise_sequence* sequence);
/// The sequence is no more; its pages are free at once, or when the open step that it takes part in
/// has ended. HEADWISE_INVALID_CHUNK for nobody.
headwise_status headwise_release(headwise_cache* cache, headwise_sequence sequence);
/// Back to an empty sequence.
headwise_status headwise_clear(headwise_cache* cache, headwise_sequence sequence);
/// Back to `new_length` tokens in all layers and heads, exactly.
headwise_status headwise_rollback(headwise_cache* cache, headwise_sequence sequence,
                                  int64_t new_length);
/// Another sequence with the same past.
/// @param child  written where HEADWISE_OK is returned
headwise_status headwise_fork(headwise_cache* cache, headwise_sequence sequence,
                              headwise_sequence* child);
/// Tokens committed: the position of the next one. 0 where there is no such sequence.
int64_t headwise_length(const headwise_cache* cache, headwise_sequence sequence);
/// The longest length ever committed. 0 where there is no such sequence.
int64_t headwise_high_water(const headwise_cache* cache, headwise_sequence sequence);

// Steps -------------------------------------------------------------------------------------------

/// New tokens of one sequence in a step.
typedef struct headwise_chunk {
  headwise_sequence sequence;  ///< named once a step
  int64_t num_tokens;          ///< in [0, max_chunk]
  int32_t phase;               ///< enum headwise_phase
} headwise_chunk;

/// What a tensor is made of, whatever the cache's rows are.
enum headwise_type { HEADWISE_FLOAT32 = 0, HEADWISE_FLOAT16 = 1, HEADWISE_BFLOAT16 = 2 };

/// Rows that are read: element (row, head, i) is data[row * row_stride + head * head_stride + i].
typedef struct headwise_input {
  const void* data;
  int64_t num_rows;     ///< all rows of the step
  int64_t num_heads;    ///< query heads for q, KV heads for k and v
  int64_t dim;          ///< k_dim for q and k, v_dim for v
  int64_t row_stride;   ///< in elements; 0: num_heads * dim
  int64_t head_stride;  ///< in elements; 0: dim
  int32_t type;         ///< enum headwise_type
} headwise_input;

/// Rows that are written; no two of them, nor of an input, may overlap.
typedef struct headwise_output {
  void* data;
  int64_t num_rows;     ///< all rows of the step
  int64_t num_heads;    ///< query heads
  int64_t dim;          ///< v_dim
  int64_t row_stride;   ///< in elements; 0: num_heads * dim
  int64_t head_stride;  ///< in elements; 0: dim
  int32_t type;         ///< enum headwise_type
} headwise_output;

/// Opens a step: takes every page that it needs, or none, and cuts its work. The step that was open
/// before, if any, is dropped (not where an argument is invalid). Rows of q, k, v and out follow
/// the order of the chunks.
/// @param chunks  [num_chunks], at most max_sequences
headwise_status headwise_begin(headwise_cache* cache, const headwise_chunk* chunks,
                               int32_t num_chunks);
/// Attends the step's queries over what each head may see, and stores the step's K and V, on the
/// calling thread. Each layer once, in any order.
/// @param q,k,v,out  keys after RoPE at the tokens' absolute positions
/// @return HEADWISE_INVALID_ARGUMENT for a tensor that is not the step's and the layer's
headwise_status headwise_attend(headwise_cache* cache, int32_t layer, const headwise_input* q,
                                const headwise_input* k, const headwise_input* v,
                                const headwise_output* out);
/// Share `ith` of `nth` of the same, for the engine's own threads: all call it, with the same
/// arguments but `ith`; the layer is done behind the engine's next barrier. nth <= num_threads.
headwise_status headwise_attend_share(headwise_cache* cache, int32_t layer, const headwise_input* q,
                                      const headwise_input* k, const headwise_input* v,
                                      const headwise_output* out, int32_t ith, int32_t nth);
/// Makes the step's tokens part of their sequences. HEADWISE_STALE without a step,
/// HEADWISE_INCOMPLETE before every layer was attended.
headwise_status headwise_commit(headwise_cache* cache);
/// Closes the step without a trace. HEADWISE_STALE without a step.
headwise_status headwise_drop(headwise_cache* cache);
/// Finite elements of the step's K and V that storing made infinite (f16 ends at 65504), so far.
int64_t headwise_num_overflows(const headwise_cache* cache);

// Bytes -------------------------------------------------------------------------------------------

/// Page memory that the sequence holds between steps, shared pages in full.
size_t headwise_held_bytes(const headwise_cache* cache, headwise_sequence sequence);
/// Page memory that nobody holds.
size_t headwise_free_bytes(const headwise_cache* cache);
/// Page memory that a step of these chunks lacks; 0: it would begin, if nothing but pages is in its
/// way. SIZE_MAX for invalid arguments.
size_t headwise_missing_bytes(headwise_cache* cache, const headwise_chunk* chunks,
                              int32_t num_chunks);
/// Most new tokens that a step of this sequence alone could have now.
int64_t headwise_longest_chunk(headwise_cache* cache, headwise_sequence sequence);

#ifdef __cplusplus
}  // extern "C"
#endif
