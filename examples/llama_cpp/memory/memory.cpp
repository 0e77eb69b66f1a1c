// SPDX-License-Identifier: MIT
/// @file memory.cpp
/// libheadwise_memory: once it is loaded (LD_PRELOAD), every context that llama.cpp makes keeps its
/// rows by the plan that the environment names.
///
/// | variable | |
/// |---|---|
/// | HEADWISE_HEADS | a score file, or "random"; unset: every head keeps everything |
/// | HEADWISE_SPARSITY | share of the KV heads that stream; unset: 0.5 |
/// | HEADWISE_WINDOW | sink+recent tokens of a head that streams; unset: 64+256 |
/// | HEADWISE_ROLLBACK | tokens that can be taken back; unset: 64 |
#include "memory.hpp"

#include <cstdint>
#include <cstdlib>
#include <string>

#include "headwise/core/check.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/heads/select.hpp"
#include "headwise/heads/tsv.hpp"
#include "headwise/policies/random_heads.hpp"
#include "headwise/policies/uniform_budget.hpp"

namespace {

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::string() : std::string(value);
}

/// All of the text as a number.
template <class Number, class Parse>
Number number(const char* name, const std::string& text, Parse parse) {
  char* end = nullptr;
  const auto value = static_cast<Number>(parse(text.c_str(), &end));
  if (text.empty() || *end != '\0') {
    headwise::fail<headwise::ConfigError>(name, " must be a number, got \"", text, "\"");
  }
  return value;
}
std::int64_t whole(const char* name, const std::string& text) {
  return number<std::int64_t>(
      name, text, [](const char* from, char** end) { return std::strtoll(from, end, 10); });
}

headwise::Window window() {
  const std::string text = variable("HEADWISE_WINDOW");
  if (text.empty()) return {.sink = 64, .recent = 256};
  const std::size_t plus = text.find('+');
  if (plus == std::string::npos) {
    headwise::fail<headwise::ConfigError>("HEADWISE_WINDOW must be sink+recent, as 64+256, got \"",
                                          text, "\"");
  }
  return {.sink = whole("HEADWISE_WINDOW", text.substr(0, plus)),
          .recent = whole("HEADWISE_WINDOW", text.substr(plus + 1))};
}

headwise::HeadPlan plan_for(const headwise::ModelShape& shape) {
  const std::string heads = variable("HEADWISE_HEADS");
  if (heads.empty()) return headwise::uniform_budget::Policy{}.plan(shape);
  const std::string text = variable("HEADWISE_SPARSITY");
  const double sparsity =
      text.empty() ? 0.5
                   : number<double>("HEADWISE_SPARSITY", text, [](const char* from, char** end) {
                       return std::strtod(from, end);
                     });
  if (heads == "random") {
    return headwise::random_heads::Policy{.sparsity = sparsity, .window = window()}.plan(shape);
  }
  const headwise::HeadScores scores = headwise::load_tsv(heads);
  headwise::check_shape(scores, shape, heads);
  return headwise::select(scores, {.sparsity = sparsity, .window = window()});
}

/// What it throws, llama.cpp says: the context is not made.
llama_memory_i* make(const llama_model& model, const llama_memory_params&,
                     const llama_cparams& cparams) {
  const headwise::HeadPlan plan = plan_for(in_llama::shape_of(model));
  const std::string rollback = variable("HEADWISE_ROLLBACK");
  auto memory = std::make_unique<in_llama::Memory>(
      model, plan, cparams, rollback.empty() ? 64 : whole("HEADWISE_ROLLBACK", rollback));
  LLAMA_LOG_INFO("headwise: %.0f %% of the KV heads stream, %.1f MiB at most\n",
                 100.0 * plan.sparsity(),
                 static_cast<double>(memory->memory_breakdown().begin()->second) / (1 << 20));
  return memory.release();
}

const bool is_set = (llama_make_memory = &make) != nullptr;

}  // namespace
