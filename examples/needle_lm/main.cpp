// SPDX-License-Identifier: MIT
// needle_lm: a trained model answers from head-aware KV caches.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <unsupported/Eigen/CXX11/ThreadPool>
#include <vector>

#include "arguments.hpp"
#include "cuda_cache.hpp"
#include "evaluate.hpp"
#include "evaluate_selections.hpp"
#include "files.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/executor.hpp"
#include "headwise/heads/token_counts.hpp"
#include "headwise/heads/tsv.hpp"
#include "identify.hpp"
#include "logits.hpp"
#include "plans.hpp"
#include "prompt_reader.hpp"
#include "report.hpp"
#include "tasks.hpp"
#include "weights.hpp"

namespace needle_lm {
namespace {

constexpr const char* kUsage = R"(usage:
  needle_lm demo [--documents N] [--csv OUT] [--selection]
      every policy over held-out documents, as a table
      --selection   also methods that select a prompt's tokens, at 50, 25 and 10 % of
                    them, alone and on the heads that RLKV keeps   (cpu)
      --pool N      of these, SnapKV's pooling: neighbours that stay together, odd   (7)
  needle_lm evaluate --csv OUT [plan] [--documents N] [--batch B] [--data D.safetensors]
      one plan over held-out documents of 2048 tokens, generating greedily
  needle_lm logits --tokens IDS.txt --out OUT.tsv [plan] [--prompt N]
      logits of every position; the first N tokens are the prompt, the rest decode steps
  needle_lm identify --method razor|retrieval|on_the_fly|measured|duo --out SCORES.tsv [--seed K]
      which heads keep everything, as a score file for --heads
      --documents N  texts, of each task from the file's second half   (8)
      --echo OUT.tsv   razor: the second file
      --sink A --recent B   measured, duo: what a streaming head keeps   (4, 60)
      --greedy H   measured: ranks H heads as they stream one after the other
      --steps N --l1 W   duo: of the gates' training, of one text each   (200, 0.05)
plan:
  --policy full|duo_attention|rlkv|razor_attention|uniform|random   (full)
  --heads SCORES.tsv       (the policy's own file beside the model)
  --echo SCORES.tsv        RazorAttention's second file
  --sparsity S             share of KV heads that stream, 0..1   (0.5)
  --sink A --recent B      what a streaming head keeps   (4, 60)
  --seed K                 of random heads   (1)
  --compensation           RazorAttention's growing window and compensation row
  --prefill windowed|chunk_causal   (windowed)
  --chunk N                prompt tokens in a step   (512; chunk_causal: all of them)
for all commands:
  --model M.safetensors    with config.json beside it   (the trained one of this example)
  --rows f16|bf16|f32      how the cache stores K and V   (f16; logits: f32)
  --threads N              (all of the machine's)
  --device cpu|cuda        where cache and attention are   (cpu)
)";

using Pool = Eigen::ThreadPool;
using PoolExecutor = headwise::PoolExecutor<Pool>;

std::string in_example(const std::string& path) { return std::string(NEEDLE_LM_DIR) + "/" + path; }

const std::vector<std::string_view> kCommonOptions{"--model", "--rows", "--threads", "--device"};
const std::vector<std::string_view> kPlanOptions{"--policy",   "--heads",   "--echo",
                                                 "--sparsity", "--sink",    "--recent",
                                                 "--seed",     "--prefill", "--chunk"};

std::vector<std::string_view> operator+(std::vector<std::string_view> some,
                                        const std::vector<std::string_view>& more) {
  some.insert(some.end(), more.begin(), more.end());
  return some;
}

int thread_count(const Arguments& arguments) {
  const std::int64_t machine = std::max(1U, std::thread::hardware_concurrency());
  return static_cast<int>(arguments.integer("--threads", machine, 1, 1024));
}

/// What every command starts with.
struct Engine {
  explicit Engine(const Arguments& arguments)
      : num_threads(thread_count(arguments)),
        model(load_model(arguments.text("--model", in_example("model/model.safetensors")))),
        pool(num_threads - 1),  // the calling thread works too
        executor(pool) {}

  int num_threads;
  Model model;
  Pool pool;
  PoolExecutor executor;
};

/// Calls fn.template operator()<Row, Cache>() for the rows that --rows names, where --device says.
template <class Fn>
auto with_cache(const Arguments& arguments, const char* otherwise, Fn fn) {
  using headwise::bf16, headwise::f16, headwise::f32, headwise::KvCache;
  if (arguments.choice("--device", "cpu", {"cpu", "cuda"}) == "cuda") {
#ifdef NEEDLE_LM_CUDA
    const std::string rows = arguments.choice("--rows", "f16", {"f16", "bf16"});
    if (rows == "bf16") return fn.template operator()<bf16, CudaCache<bf16>>();
    return fn.template operator()<f16, CudaCache<f16>>();
#else
    headwise::fail<headwise::ConfigError>("--device cuda: built without CUDA (HEADWISE_CUDA)");
#endif
  }
  const std::string rows = arguments.choice("--rows", otherwise, {"f16", "bf16", "f32"});
  if (rows == "f32") return fn.template operator()<f32, KvCache<f32>>();
  if (rows == "bf16") return fn.template operator()<bf16, KvCache<bf16>>();
  return fn.template operator()<f16, KvCache<f16>>();
}

PlanOptions plan_options(const Arguments& arguments) {
  constexpr std::int64_t kLongest = 1 << 20;
  PlanOptions options;
  options.policy =
      arguments.choice("--policy", arguments.has("--heads") ? "duo_attention" : "full", kPolicies);
  for (const char* name : {"--heads", "--echo", "--sparsity", "--sink", "--recent", "--seed"}) {
    if (options.policy == "full" && arguments.has(name)) {
      headwise::fail<headwise::ConfigError>(name,
                                            " needs a --policy; the full cache has no use for it");
    }
  }
  options.sparsity = arguments.real("--sparsity", options.sparsity, 0.0, 1.0);
  options.window.sink = arguments.integer("--sink", options.window.sink, 0, kLongest);
  options.window.recent = arguments.integer("--recent", options.window.recent, 1, kLongest);
  options.seed = static_cast<std::uint64_t>(
      arguments.integer("--seed", 1, 0, std::numeric_limits<std::int64_t>::max()));
  options.compensation = arguments.has("--compensation");
  if (options.compensation && options.policy != "razor_attention") {
    headwise::fail<headwise::ConfigError>(
        "--compensation belongs to --policy razor_attention, not ", options.policy);
  }
  const bool is_razor = options.policy == "razor_attention";
  options.heads = arguments.text(
      "--heads", in_example("heads/" + (is_razor ? "razor_induction" : options.policy) + ".tsv"));
  options.echo = arguments.text("--echo", in_example("heads/razor_echo.tsv"));
  return options;
}

RunOptions run_options(const Arguments& arguments) {
  constexpr auto kWholePrompt = std::numeric_limits<std::int64_t>::max();
  RunOptions run;
  auto chunk = static_cast<std::int64_t>(run.chunk);
  if (arguments.choice("--prefill", "windowed", {"windowed", "chunk_causal"}) == "chunk_causal") {
    run.prefill = headwise::PrefillMode::kChunkCausal;
    chunk = kWholePrompt;  // in one chunk: dense prefill, as the papers have it
  }
  run.chunk = static_cast<std::size_t>(arguments.integer("--chunk", chunk, 1, kWholePrompt));
  run.batch = static_cast<std::size_t>(
      arguments.integer("--batch", static_cast<std::int64_t>(run.batch), 1, 4096));
  return run;
}

void require_context(std::int64_t num_tokens, const ModelConfig& config) {
  if (num_tokens > config.max_context) {
    headwise::fail<headwise::ConfigError>("a sequence of ", num_tokens,
                                          " tokens, the model knows positions up to ",
                                          config.max_context);
  }
}

Tasks load_tasks(const Arguments& arguments, const ModelConfig& config) {
  const SafeTensors file(arguments.text("--data", in_example("data/documents.safetensors")));
  const auto count = static_cast<std::size_t>(arguments.integer("--documents", 32, 1, 1 << 20));
  Tasks tasks{load_task(file, "passkey", kEndOfNeedle, count, config),
              load_task(file, "cot", kEndOfSequence, count, config)};
  require_context(tasks.max_context(), config);
  return tasks;
}

/// Runs the plans one after the other.
std::vector<Result> evaluate_all(Engine& engine, const Tasks& tasks, const RunOptions& run,
                                 const std::vector<NamedPlan>& plans, const Arguments& arguments,
                                 Progress& progress) {
  std::vector<Result> results;
  for (const NamedPlan& plan : plans) {
    progress.start(plan.title);
    results.push_back(with_cache(arguments, "f16", [&]<class Row, class Cache>() {
      return evaluate<Row, Cache>(engine.model, tasks, plan, run, engine.executor,
                                  [&] { progress.step(); });
    }));
    progress.finish_plan();
  }
  return results;
}

/// The table, what it means, and how it was made.
void print_report(const Engine& engine, const Tasks& tasks, const RunOptions& run,
                  const std::vector<Result>& results, const Arguments& arguments) {
  print_table(results, stdout);
  print_legend(tasks, stdout);
  if (arguments.has("--selection")) print_selection_legend(stdout);
  print_questions(tasks, results, stdout);
  std::printf(
      "\n%zu documents a task, %zu at a time, %s prefill, %s rows;\ndevice %s, %d threads.\n",
      tasks.cot.documents.size(), run.batch, arguments.text("--prefill", "windowed").c_str(),
      arguments.text("--rows", "f16").c_str(), arguments.text("--device", "cpu").c_str(),
      engine.num_threads);
}

/// Documents that both tasks have.
std::size_t documents_of(const Tasks& tasks) {
  return tasks.passkey.documents.size() + tasks.cot.documents.size();
}

/// The table's rows: each policy at 50 % and at 33 % retrieval heads, all with the same window.
std::vector<NamedPlan> demo_plans(const headwise::ModelShape& shape) {
  std::vector<NamedPlan> plans;
  const auto add = [&](const std::string& title, const PlanOptions& options) {
    const std::string seed = options.policy == "random" ? "_" + std::to_string(options.seed) : "";
    plans.push_back({options.policy + seed, title, make_plan(options, shape)});
  };
  const auto add_both_shares = [&](const std::string& title, PlanOptions options) {
    options.sparsity = 1.0 / 2.0;
    add(title + " 50%", options);
    options.sparsity = 2.0 / 3.0;
    add(title + " 33%", options);
  };
  const auto scores = [](const std::string& name) { return in_example("heads/" + name + ".tsv"); };

  add("full cache", {.policy = "full"});
  add_both_shares("DuoAttention", {.policy = "duo_attention", .heads = scores("duo_attention")});
  add_both_shares("RLKV", {.policy = "rlkv", .heads = scores("rlkv")});
  add_both_shares("RazorAttention heads", {.policy = "razor_attention",
                                           .heads = scores("razor_induction"),
                                           .echo = scores("razor_echo")});
  for (const std::uint64_t seed : {1U, 2U, 3U}) {
    add_both_shares("random heads, " + std::to_string(seed), {.policy = "random", .seed = seed});
  }
  add("all heads stream", {.policy = "uniform"});
  return plans;
}

/// What --selection adds to the table: a document is read once for all selections of a plan.
class SelectionRows {
 public:
  static constexpr std::array kShares{0.5, 0.25, 0.1};

  /// @throws ConfigError for a device, documents that centres are calibrated on, prompts that are
  ///   too short, or a model whose positions do not reach as far as KVzip's pass.
  SelectionRows(const Arguments& arguments, const Tasks& tasks, const ModelConfig& config)
      : policies_(config.rope_theta,
                  static_cast<int>(arguments.integer("--pool", kPublishedPool, 1, 4095))),
        selections_(all_selections(kShares)) {
    if (arguments.text("--device", "cpu") != "cpu") {
      headwise::fail<headwise::ConfigError>("--selection needs --device cpu, not ",
                                            arguments.text("--device", "cpu"),
                                            ": scores are made of a host's rows");
    }
    if (policies_.snap_kv.kernel % 2 == 0) {
      headwise::fail<headwise::ConfigError>("--pool ", policies_.snap_kv.kernel,
                                            ": expected an odd number");
    }
    const SafeTensors file(arguments.text("--data", in_example("data/documents.safetensors")));
    for (const Task* task : {&tasks.passkey, &tasks.cot}) {
      const std::size_t unseen = num_documents(file, task->name) / 2;
      if (task->documents.size() > unseen) {
        headwise::fail<headwise::ConfigError>(
            "--selection takes at most ", unseen, " documents of task ", task->name, ", got ",
            task->documents.size(), ": TriAttention is calibrated on the others");
      }
      for (const Document& document : task->documents) require_prompt(document);
    }
    require_context(max_selection_context(tasks), config);
    texts_ = centre_texts(file, config);
  }

  /// Alone, and on the heads that RLKV keeps at 50 %.
  std::vector<NamedPlan> plans(const headwise::ModelShape& shape) const {
    return {{"", "", headwise::HeadPlan(shape)},
            {"rlkv", "RLKV",
             make_plan({.policy = "rlkv", .heads = in_example("heads/rlkv.tsv")}, shape)}};
  }

  std::size_t num_rows() const { return 2 * selections_.size(); }

  /// Adds their rows.
  void evaluate(Engine& engine, const Tasks& tasks, const RunOptions& run,
                const Arguments& arguments, Progress& progress,
                std::vector<Result>& results) const {
    with_cache(arguments, "f16", [&]<class Row, class Cache>() {
      if constexpr (std::is_same_v<Cache, headwise::KvCache<Row>>) {
        const QueryCentres centres =
            calibrated_centres<Cache>(engine.model, texts_, engine.executor);
        for (const NamedPlan& plan : plans(engine.model.config.shape())) {
          progress.start(plan.title + (plan.title.empty() ? "selections" : " + selections"));
          const auto rows =
              evaluate_selections<Row>(engine.model, tasks, plan, policies_, selections_, centres,
                                       run, engine.executor, [&] { progress.step(); });
          results.insert(results.end(), rows.begin(), rows.end());
          progress.finish_plan();
        }
      }
    });
  }

 private:
  /// At the smallest share a head keeps SnapKV's window, the most that a method protects.
  void require_prompt(const Document& document) const {
    const auto length = static_cast<std::int64_t>(document.prompt_length);
    const std::int64_t kept = headwise::tokens_left(length, 1.0 - kShares.back());
    if (kept < policies_.snap_kv.window) {
      headwise::fail<headwise::ConfigError>("--selection: 10 % of a prompt of ", length,
                                            " tokens are ", kept, ", SnapKV's window has ",
                                            policies_.snap_kv.window);
    }
  }

  SelectionPolicies policies_;
  std::vector<Selection> selections_;
  std::vector<Document> texts_;
};

void run_demo(const Arguments& arguments) {
  Engine engine(arguments);
  const RunOptions run = run_options(arguments);
  const Tasks tasks = load_tasks(arguments, engine.model.config);
  const std::vector<NamedPlan> plans = demo_plans(engine.model.config.shape());
  std::optional<SelectionRows> selections;
  if (arguments.has("--selection")) selections.emplace(arguments, tasks, engine.model.config);
  if (arguments.has("--pool") && !selections) {
    headwise::fail<headwise::ConfigError>("--pool belongs to --selection");
  }
  std::optional<OutputFile> csv;
  if (arguments.has("--csv")) csv.emplace(arguments.required_text("--csv"));
  const std::size_t num_rows = plans.size() + (selections ? selections->num_rows() : 0);
  Progress progress(num_rows * documents_of(tasks));
  std::vector<Result> results = evaluate_all(engine, tasks, run, plans, arguments, progress);
  if (selections) selections->evaluate(engine, tasks, run, arguments, progress, results);
  print_report(engine, tasks, run, results, arguments);
  if (csv) {
    write_csv(csv->stream(), results);
    csv->finish();
  }
}

void run_evaluate(const Arguments& arguments) {
  OutputFile csv(arguments.required_text("--csv"));
  const PlanOptions options = plan_options(arguments);
  const RunOptions run = run_options(arguments);
  Engine engine(arguments);
  const Tasks tasks = load_tasks(arguments, engine.model.config);
  const NamedPlan plan{options.policy, options.policy,
                       make_plan(options, engine.model.config.shape())};
  Progress progress(documents_of(tasks));
  const auto results = evaluate_all(engine, tasks, run, {plan}, arguments, progress);
  print_report(engine, tasks, run, results, arguments);
  write_csv(csv.stream(), results);
  csv.finish();
}

void run_logits(const Arguments& arguments) {
  const std::string tokens_path = arguments.required_text("--tokens");
  OutputFile out(arguments.required_text("--out"));
  const PlanOptions options = plan_options(arguments);
  const RunOptions run = run_options(arguments);
  Engine engine(arguments);
  const ModelConfig& config = engine.model.config;
  const std::vector<Token> tokens = read_tokens(tokens_path, config.vocab_size);
  const auto num_tokens = static_cast<std::int64_t>(tokens.size());
  require_context(num_tokens, config);
  const auto prompt =
      static_cast<std::size_t>(arguments.integer("--prompt", num_tokens, 0, num_tokens));
  const headwise::HeadPlan plan = make_plan(options, config.shape());
  with_cache(arguments, "f32", [&]<class Row, class Cache>() {
    for_each_logits<Row, Cache>(engine.model, plan, run, tokens, prompt, engine.executor,
                                [&](const Matrix& logits) { write_logits(out.stream(), logits); });
  });
  out.finish();
}

/// Every layer's scores, and the command that makes them again.
void print_found(const FoundHeads& found, const IdentifyOptions& options, const std::string& out,
                 const std::string& echo) {
  const auto print = [](const char* name, const headwise::HeadScores& scores) {
    for (int layer = 0; layer < scores.num_layers(); ++layer) {
      std::printf("%-10s layer %2d", name, layer);
      for (const double value : scores.row(layer)) std::printf("  %.6f", value);
      std::printf("\n");
    }
  };
  print(options.method == "razor" ? "induction" : options.method.c_str(), found.scores);
  if (found.echo) print("echo", *found.echo);
  std::printf("\nneedle_lm identify --method %s --documents %zu --seed %llu",
              options.method.c_str(), options.documents,
              static_cast<unsigned long long>(options.seed));
  if (options.method == "measured" || options.method == "duo") {
    std::printf(" --sink %lld --recent %lld", static_cast<long long>(options.window.sink),
                static_cast<long long>(options.window.recent));
    if (options.greedy > 0) std::printf(" --greedy %zu", options.greedy);
  }
  if (options.method == "duo") {
    std::printf(" --steps %lld --l1 %g", static_cast<long long>(options.steps), options.l1_weight);
  }
  std::printf(" --out %s", out.c_str());
  if (!echo.empty()) std::printf(" --echo %s", echo.c_str());
  std::printf("\n");
}

IdentifyOptions identify_options(const Arguments& arguments, std::size_t num_heads) {
  constexpr std::int64_t kLongest = 1 << 20;
  IdentifyOptions options;
  options.method = arguments.choice("--method", options.method, kMethods);
  const auto belongs_to = [&](const char* name, const char* method, const char* other = nullptr) {
    const bool belongs = options.method == method || (other != nullptr && options.method == other);
    if (!arguments.has(name) || belongs) return;
    headwise::fail<headwise::ConfigError>(name, " belongs to --method ", method,
                                          other != nullptr ? " or " : "",
                                          other != nullptr ? other : "", ", not ", options.method);
  };
  belongs_to("--echo", "razor");
  belongs_to("--greedy", "measured");
  for (const char* name : {"--sink", "--recent"}) belongs_to(name, "measured", "duo");
  for (const char* name : {"--steps", "--l1"}) belongs_to(name, "duo");
  options.documents = static_cast<std::size_t>(arguments.integer("--documents", 8, 1, 1 << 20));
  options.seed = static_cast<std::uint64_t>(
      arguments.integer("--seed", 1, 0, std::numeric_limits<std::int64_t>::max()));
  options.window.sink = arguments.integer("--sink", options.window.sink, 0, kLongest);
  options.window.recent = arguments.integer("--recent", options.window.recent, 1, kLongest);
  options.greedy = static_cast<std::size_t>(
      arguments.integer("--greedy", 0, 0, static_cast<std::int64_t>(num_heads)));
  options.steps = arguments.integer("--steps", options.steps, 1, kLongest);
  options.l1_weight = arguments.real("--l1", options.l1_weight, 0.0, 1e6);
  return options;
}

void run_identify(const Arguments& arguments) {
  static_cast<void>(arguments.required_text("--method"));
  const std::string path = arguments.required_text("--out");
  Engine engine(arguments);
  const auto num_heads = headwise::HeadPlan(engine.model.config.shape()).num_heads();
  const IdentifyOptions options = identify_options(arguments, num_heads);
  OutputFile out(path);
  std::optional<OutputFile> echo;
  if (arguments.has("--echo")) echo.emplace(arguments.required_text("--echo"));
  std::optional<SafeTensors> file;
  if (options.method != "razor") {
    file.emplace(arguments.text("--data", in_example("data/documents.safetensors")));
  }
  const FoundHeads found = with_cache(arguments, "f32", [&]<class Row, class Cache>() {
    std::optional<Progress> progress;
    const auto step = [&] { progress->step(); };
    using Method = Identify<Cache, PoolExecutor, decltype(step)>;
    progress.emplace(Method::num_forwards(options, num_heads), "texts");
    progress->start(options.method);
    FoundHeads heads =
        Method(engine.model, file ? &*file : nullptr, options, engine.executor, step).run();
    progress->finish_plan();
    return heads;
  });
  out.stream() << headwise::to_tsv(found.scores);
  if (echo) echo->stream() << headwise::to_tsv(*found.echo);
  out.finish();
  if (echo) echo->finish();
  print_found(found, options, path, arguments.text("--echo", ""));
}

int run(std::span<const char* const> words) {
  const std::string_view command = words.empty() ? "" : words.front();
  if (command == "--help" || command == "-h" || command == "help") {
    std::fputs(kUsage, stdout);
    return 0;
  }
  const std::vector<std::string_view> tasks{"--documents", "--data", "--batch", "--csv"};
  const std::vector<std::string_view> flags{"--compensation"};
  const auto options = words.empty() ? words : words.subspan(1);
  if (command == "demo") {
    run_demo(Arguments(options, kCommonOptions + tasks + std::vector<std::string_view>{"--pool"},
                       {"--selection"}));
  } else if (command == "evaluate") {
    run_evaluate(Arguments(options, kCommonOptions + kPlanOptions + tasks, flags));
  } else if (command == "logits") {
    run_logits(Arguments(options,
                         kCommonOptions + kPlanOptions +
                             std::vector<std::string_view>{"--tokens", "--out", "--prompt"},
                         flags));
  } else if (command == "identify") {
    run_identify(Arguments(
        options,
        kCommonOptions + std::vector<std::string_view>{"--method", "--out", "--echo", "--seed",
                                                       "--documents", "--data", "--sink",
                                                       "--recent", "--greedy", "--steps", "--l1"}));
  } else {
    std::fputs(kUsage, stderr);
    return 2;
  }
  return 0;
}

}  // namespace
}  // namespace needle_lm

int main(int argc, char** argv) {
  try {
    return needle_lm::run(
        std::span<const char* const>(argv, static_cast<std::size_t>(argc)).subspan(1));
  } catch (const headwise::ConfigError& error) {
    std::fprintf(stderr, "needle_lm: %s\n", error.what());
    return 2;
  } catch (const headwise::FormatError& error) {
    std::fprintf(stderr, "needle_lm: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "needle_lm: %s\n", error.what());
    return 1;
  }
}
