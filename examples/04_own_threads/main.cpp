// SPDX-License-Identifier: MIT
// An engine whose threads all walk through the whole model together, as ggml's do: thread `ith` of
// `nth` takes its share of every operation, and a barrier of the engine stands between operations.
// Attention is one more operation: its tasks are dealt like rows, with no barrier inside.
#include <algorithm>
#include <barrier>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

#include "../stand_in/model.hpp"
#include "headwise/attention/attend.hpp"
#include "headwise/policies/random.hpp"

namespace {

using namespace headwise;

constexpr int kLayers = 2;
constexpr std::int64_t kLongest = 2300;
constexpr std::int64_t kChunk = 512;

class Engine {
 public:
  explicit Engine(std::size_t num_threads)
      : num_threads_(num_threads), barrier_(static_cast<std::ptrdiff_t>(num_threads)) {
    // Before the threads start: tasks only ever use what is there.
    reserve_scratch(step_, cache_, kChunk, num_threads);
  }

  /// Every float of attention output of a prompt and some decode steps.
  std::vector<float> run() {
    std::vector<std::thread> threads;
    for (std::size_t ith = 0; ith < num_threads_; ++ith) {
      threads.emplace_back([this, ith] { walk(ith); });
    }
    for (std::thread& thread : threads) thread.join();
    return outputs_;
  }

  double error() const { return error_; }

 private:
  /// What one thread does, from the first token to the last.
  void walk(std::size_t ith) {
    for (std::int64_t length = 0; length < kLongest;) {
      const bool prompt = length < kLongest - 20;
      const std::int64_t count = prompt ? std::min(kChunk, kLongest - 20 - length) : 1;
      if (ith == 0) begin(length, count, prompt ? Phase::kPrompt : Phase::kDecode);
      barrier_.arrive_and_wait();
      if (failed_) return;
      for (int layer = 0; layer < kLayers; ++layer) {
        for (std::size_t row = ith; row < rows_.size(); row += num_threads_) {
          model_.project(layer, row, rows_[row]);
        }
        barrier_.arrive_and_wait();  // q, k and v are whole
        attend_share(layer, ith);
        barrier_.arrive_and_wait();  // out is whole
        if (ith == 0) keep_output(layer);
        barrier_.arrive_and_wait();
      }
      if (ith == 0) failed_ = cache_.commit(step_) != StepStatus::kOk;
      barrier_.arrive_and_wait();
      length += count;
    }
  }

  /// The thread's tasks. Whichever thread ends a head's last task merges it and stores its rows.
  void attend_share(int layer, std::size_t ith) {
    const AttendTasks<simd::BestIsa, f16> tasks(cache_, step_, layer, model_.q(), model_.k(),
                                                model_.v(), model_.out());
    for (std::size_t task = ith; task < tasks.size(); task += num_threads_) tasks.run(task, ith);
  }

  void begin(std::int64_t length, std::int64_t count, Phase phase) {
    rows_.clear();
    stand_in::add_tokens(rows_, 1, length, count);
    model_.resize(rows_.size());
    failed_ = failed_ || cache_.begin(step_, {{sequence_, count}}, phase) != StepStatus::kOk;
  }

  void keep_output(int layer) {
    const auto out = model_.out_floats();
    outputs_.insert(outputs_.end(), out.begin(), out.end());
    if (step_.phase() == Phase::kPrompt) return;
    error_ = std::max(error_, model_.error(layer, rows_.size() - 1, rows_.back(), plan_));
  }

  std::size_t num_threads_;
  std::barrier<> barrier_;
  stand_in::Model model_{kLayers, 4, 2, 32};
  HeadPlan plan_ = random::Policy{.sparsity = 0.5, .window = {4, 60}}.plan(model_.shape());
  KvCache<f16> cache_{model_.shape(), plan_, {.page_tokens = 32, .max_context = kLongest}};
  SequenceId sequence_ = *cache_.add_sequence();
  Step step_;
  std::vector<stand_in::Token> rows_;
  std::vector<float> outputs_;
  double error_ = 0.0;
  bool failed_ = false;  // written by thread 0 before a barrier, read by all after it
};

}  // namespace

int main() {
  Engine alone(1);
  Engine team(3);
  const std::vector<float> expected = alone.run();
  const bool same = team.run() == expected;
  std::printf("3 threads and 1: %s bits in %zu outputs; largest error %.1e\n",
              same ? "the same" : "DIFFERENT", expected.size(), team.error());
  const auto all = static_cast<std::size_t>(kLongest) * kLayers * 4 * 32;
  const bool right = same && expected.size() == all && team.error() < 1e-5;
  std::puts(right ? "ok" : "WRONG");
  return right ? 0 : 1;
}
