// SPDX-License-Identifier: MIT
/// @file headwise.hpp
/// Everything for the CPU. JSON readers (heads/json.hpp) and CUDA (headwise.cuh) are included by
/// name.
#pragma once

#include "headwise/core/config.hpp"

#if __cplusplus >= 202002L  // else config.hpp has said what is wrong: once, and not once a line
#include "headwise/attention/attend.hpp"
#include "headwise/attention/reference.hpp"
#include "headwise/attention/single_sequence.hpp"
#include "headwise/cache/estimate.hpp"
#include "headwise/cache/export.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/alibi.hpp"
#include "headwise/core/executor.hpp"
#include "headwise/core/version.hpp"
#include "headwise/heads/fingerprint.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/heads/select.hpp"
#include "headwise/heads/shard.hpp"
#include "headwise/heads/share.hpp"
#include "headwise/heads/tsv.hpp"
#include "headwise/policies/duo_attention.hpp"
#include "headwise/policies/head_kv.hpp"
#include "headwise/policies/pinned.hpp"
#include "headwise/policies/policy.hpp"
#include "headwise/policies/random_heads.hpp"
#include "headwise/policies/razor_attention.hpp"
#include "headwise/policies/retrieval_head.hpp"
#include "headwise/policies/rlkv.hpp"
#include "headwise/policies/streaming_llm.hpp"
#include "headwise/policies/uniform_budget.hpp"
#endif
