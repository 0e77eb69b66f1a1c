// SPDX-License-Identifier: MIT
// Side by side with an installed ggml: the same K, V and q, in turns, in one process.
#include <benchmark/benchmark.h>
#include <ggml-cpu.h>
#include <ggml.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "headwise/attention/attend.hpp"
#include "headwise/attention/reference.hpp"
#include "headwise/heads/splitmix64.hpp"
#include "support/attention_setup.hpp"
#include "support/ceilings.hpp"
#include "support/pinned_threads.hpp"

namespace {

using namespace headwise;
using namespace headwise::bench;

/// `tokens` queries that end a context of `kv` rows.
struct Work {
  BenchShape shape;
  std::int64_t kv;
  std::int64_t tokens;

  float scale() const { return 1.0F / std::sqrt(static_cast<float>(kHeadDim)); }
  bool decodes() const { return tokens == 1; }
  std::size_t q_floats() const {
    return static_cast<std::size_t>(tokens * shape.num_qo_heads * kHeadDim);
  }
  friend bool operator==(const Work& a, const Work& b) {
    return a.shape.name == b.shape.name && a.kv == b.kv && a.tokens == b.tokens;
  }
};

/// Random rows of K or of V by head and position, without keeping them.
class RowSource {
 public:
  explicit RowSource(unsigned seed) : seed_(seed), floats_(random_floats(1 << 20, seed)) {}
  const float* row(std::int64_t head, std::int64_t pos) const {
    SplitMix64 random(seed_ + (static_cast<std::uint64_t>(head) << 40) +
                      static_cast<std::uint64_t>(pos));
    return floats_.data() + random.next() % (floats_.size() - kHeadDim);
  }

 private:
  std::uint64_t seed_;
  std::vector<float> floats_;
};

/// What both sides read. K and V as ggml likes them best: [head][position][dim] of f16.
struct Data {
  explicit Data(const Work& work)
      : q(random_floats(work.q_floats(), 1)),
        k_source(2),
        v_source(3),
        k(bytes(work)),
        v(bytes(work)) {
    for (int head = 0; head < work.shape.num_kv_heads; ++head) {
      for (std::int64_t pos = 0; pos < work.kv; ++pos) {
        const std::int64_t at = (head * work.kv + pos) * kHeadDim;
        store(k_source.row(head, pos), reinterpret_cast<f16*>(k.data()) + at);
        store(v_source.row(head, pos), reinterpret_cast<f16*>(v.data()) + at);
      }
    }
  }
  static std::size_t bytes(const Work& work) {
    return static_cast<std::size_t>(work.shape.num_kv_heads * work.kv * kHeadDim) * sizeof(f16);
  }
  static void store(const float* from, f16* to) {
    using O = simd::Ops<simd::BestIsa>;
    for (int d = 0; d < kHeadDim; d += O::kWidth) O::store(to + d, O::load(from + d));
  }

  std::vector<float> q;  // [token][head][dim]
  RowSource k_source, v_source;
  HugeBuffer k, v;
};

/// A cache that holds all but the step's own rows; one call stores those and attends.
class Headwise {
 public:
  Headwise(const Work& work, const Data& data)
      : work_(work),
        data_(data),
        cache_(model(work.shape), HeadPlan(model(work.shape)),
               {.max_context = work.kv, .max_rollback = 8}),
        sequence_(*cache_.add_sequence()),
        out(work.q_floats()) {
    const std::int64_t past = work.kv - work.tokens;
    constexpr std::int64_t kChunk = 4096;
    for (std::int64_t done = 0; done < past; done += kChunk) {
      const std::int64_t count = std::min(kChunk, past - done);
      load_rows(done, count);
      require(cache_.begin(step_, {{sequence_, count}}));
      for (int head = 0; head < work.shape.num_kv_heads; ++head) {
        const auto rows = [&](const std::vector<float>& all) {
          const auto view = TensorView<const float>::nhd(all.data(), heads(), kHeadDim);
          return TensorView<const float>{view.row(0, head), view.stride_n, view.stride_h};
        };
        cache_.append<simd::BestIsa>(step_, step_.chunks()[0], 0, head, rows(k_), rows(v_));
        step_.note_head_done(0);
      }
      require(cache_.commit(step_));
    }
    load_rows(past, work.tokens);
  }

  void step(PinnedThreads& threads) {
    const auto view = [](const std::vector<float>& x, int heads) {
      return TensorView<const float>::nhd(x.data(), heads, kHeadDim);
    };
    const Phase phase = work_.decodes() ? Phase::kDecode : Phase::kPrompt;
    require(cache_.begin(step_, {{sequence_, work_.tokens, phase}}));
    require(attend(cache_, step_, 0, view(data_.q, work_.shape.num_qo_heads), view(k_, heads()),
                   view(v_, heads()),
                   TensorView<float>::nhd(out.data(), work_.shape.num_qo_heads, kHeadDim),
                   threads));
    require(cache_.drop(step_));
  }

 private:
  static void require(StepStatus status) {
    if (status != StepStatus::kOk) throw std::runtime_error(to_string(status));
  }
  static ModelShape model(const BenchShape& shape) {
    return ModelShape::uniform(1, shape.num_qo_heads, shape.num_kv_heads, kHeadDim);
  }
  int heads() const { return work_.shape.num_kv_heads; }

  /// Rows of `count` positions from `begin` on, [position][head][dim] as a model computes them.
  void load_rows(std::int64_t begin, std::int64_t count) {
    k_.clear();
    v_.clear();
    for (std::int64_t pos = begin; pos < begin + count; ++pos) {
      for (int head = 0; head < heads(); ++head) {
        const float* k = data_.k_source.row(head, pos);
        const float* v = data_.v_source.row(head, pos);
        k_.insert(k_.end(), k, k + kHeadDim);
        v_.insert(v_.end(), v, v + kHeadDim);
      }
    }
  }

  Work work_;
  const Data& data_;
  KvCache<f16> cache_;
  SequenceId sequence_;
  Step step_;
  std::vector<float> k_, v_;

 public:
  std::vector<float> out;  // [token][head][dim]
};

/// One ggml_flash_attn_ext over the rows where they lie; nothing is stored.
class Ggml {
 public:
  Ggml(const Work& work, Data& data) : out(work.q_floats()) {
    context_.reset(ggml_init({ggml_tensor_overhead() * 16 + ggml_graph_overhead(), nullptr, true}));
    ggml_context* c = context_.get();
    const auto tensor = [&](ggml_type type, std::int64_t a, std::int64_t b, std::int64_t heads,
                            void* memory) {
      ggml_tensor* t = ggml_new_tensor_3d(c, type, a, b, heads);
      t->data = memory;
      return t;
    };
    const BenchShape& shape = work.shape;
    ggml_tensor* q =
        tensor(GGML_TYPE_F32, kHeadDim, shape.num_qo_heads, work.tokens, data.q.data());
    ggml_tensor* k = tensor(GGML_TYPE_F16, kHeadDim, work.kv, shape.num_kv_heads, data.k.data());
    ggml_tensor* v = tensor(GGML_TYPE_F16, kHeadDim, work.kv, shape.num_kv_heads, data.v.data());
    ggml_tensor* mask = nullptr;  // a single query sees all
    if (!work.decodes()) {
      for (std::int64_t i = 0; i < work.tokens; ++i) {
        for (std::int64_t j = 0; j < work.kv; ++j) {
          const bool sees = j <= work.kv - work.tokens + i;
          mask_.push_back(ggml_fp32_to_fp16(sees ? 0.0F : -INFINITY));
        }
      }
      mask = tensor(GGML_TYPE_F16, work.kv, work.tokens, 1, mask_.data());
    }
    ggml_tensor* result = ggml_flash_attn_ext(c, ggml_permute(c, q, 0, 2, 1, 3), k, v, mask,
                                              work.scale(), 0.0F, 0.0F);
    result->data = out.data();
    graph_ = ggml_new_graph(c);
    ggml_build_forward_expand(graph_, result);
  }

  /// From now on on CPUs 0, 1, ..., as PinnedThreads does.
  void use_threads(std::size_t num_threads) {
    ggml_threadpool_params params = ggml_threadpool_params_default(static_cast<int>(num_threads));
    params.strict_cpu = true;
    std::fill_n(params.cpumask, num_threads, true);
    pool_.reset(ggml_threadpool_new(&params));
    plan_ = ggml_graph_plan(graph_, static_cast<int>(num_threads), pool_.get());
    work_data_.resize(plan_.work_size);
    plan_.work_data = work_data_.data();
  }

  void step() {
    if (ggml_graph_compute(graph_, &plan_) != GGML_STATUS_SUCCESS) {
      throw std::runtime_error("ggml_graph_compute failed");
    }
  }

 private:
  struct Free {
    void operator()(ggml_context* c) const { ggml_free(c); }
    void operator()(ggml_threadpool* pool) const { ggml_threadpool_free(pool); }
  };
  std::unique_ptr<ggml_context, Free> context_;
  std::unique_ptr<ggml_threadpool, Free> pool_;
  std::vector<ggml_fp16_t> mask_;
  std::vector<std::uint8_t> work_data_;
  ggml_cgraph* graph_ = nullptr;
  ggml_cplan plan_{};

 public:
  std::vector<float> out;  // [token][head][dim]
};

struct SideBySide {
  explicit SideBySide(const Work& w) : work(w), data(w), headwise(w, data), ggml(w, data) {}

  /// |x - truth| / |truth| of both sides, over the last two query rows of four heads.
  void measure_errors() {
    double truth2 = 0.0, headwise2 = 0.0, ggml2 = 0.0;
    const int group = work.shape.num_qo_heads / work.shape.num_kv_heads;
    for (int i = 0; i < 4; ++i) {
      const int head = i * (work.shape.num_qo_heads - 1) / 3;
      const std::size_t begin = static_cast<std::size_t>(head / group * work.kv * kHeadDim);
      const std::vector<float> k = floats_of(data.k, begin);
      const std::vector<float> v = floats_of(data.v, begin);
      for (std::int64_t t = std::max<std::int64_t>(0, work.tokens - 2); t < work.tokens; ++t) {
        const std::int64_t row = (t * work.shape.num_qo_heads + head) * kHeadDim;
        const std::int64_t newest = work.kv - work.tokens + t;
        const std::vector<double> truth =
            reference_attention(data.q.data() + row, k.data(), v.data(), work.kv, kHeadDim,
                                kHeadDim, work.scale(), [&](auto j) { return j <= newest; });
        for (std::size_t d = 0; d < truth.size(); ++d) {
          const std::size_t at = static_cast<std::size_t>(row) + d;
          truth2 += truth[d] * truth[d];
          headwise2 += std::pow(static_cast<double>(headwise.out[at]) - truth[d], 2);
          ggml2 += std::pow(static_cast<double>(ggml.out[at]) - truth[d], 2);
        }
      }
    }
    headwise_error = std::sqrt(headwise2 / truth2);
    ggml_error = std::sqrt(ggml2 / truth2);
  }

  Work work;
  Data data;
  Headwise headwise;
  Ggml ggml;
  double headwise_error = 0.0;
  double ggml_error = 0.0;

 private:
  std::vector<float> floats_of(HugeBuffer& rows, std::size_t begin) const {
    const f16* from = reinterpret_cast<const f16*>(rows.data()) + begin;
    std::vector<float> to(static_cast<std::size_t>(work.kv * kHeadDim));
    std::transform(from, from + to.size(), to.begin(), [](f16 x) { return to_float(x); });
    return to;
  }
};

/// Those of the row before, where only the number of threads differs.
SideBySide& sides_of(const Work& work) {
  static std::unique_ptr<SideBySide> sides;
  if (sides == nullptr || !(sides->work == work)) {
    sides.reset();
    sides = std::make_unique<SideBySide>(work);
  }
  return *sides;
}

double process_seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

/// Wall and CPU time of one side.
struct Timings {
  template <class Fn>
  void add(Fn&& step) {
    // A pool's threads may spin for a while after its work; the other side is not to pay for that.
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    const double before = process_seconds();
    wall.add([&] { return seconds_of(step); });
    const double used = process_seconds() - before;
    cpu.add([&] { return used; });
  }
  Samples wall, cpu;
};

void compare(benchmark::State& state, Work work, std::size_t num_threads) {
  SideBySide& sides = sides_of(work);
  PinnedThreads threads(num_threads);
  sides.ggml.use_threads(num_threads);
  sides.headwise.step(threads);  // first touch
  sides.ggml.step();
  sides.measure_errors();

  Timings headwise, ggml;
  for (auto _ : state) {
    headwise.add([&] { sides.headwise.step(threads); });
    ggml.add([&] { sides.ggml.step(); });
  }
  state.counters["headwise_ms"] = headwise.wall.median() * 1e3;
  state.counters["ggml_ms"] = ggml.wall.median() * 1e3;
  state.counters["ggml/headwise"] = ggml.wall.median() / headwise.wall.median();
  state.counters["cpu_ggml/headwise"] = ggml.cpu.median() / headwise.cpu.median();
  state.counters["clean"] = std::min(headwise.wall.num_clean(), ggml.wall.num_clean());
  state.counters["headwise_error"] = sides.headwise_error;
  state.counters["ggml_error"] = sides.ggml_error;
}

void add_rows(const std::string& name, const Work& work) {
  for (const std::size_t threads : {std::size_t{1}, std::size_t{2}}) {
    const std::string row = "compare_ggml/" + name + "/threads=" + std::to_string(threads);
    benchmark::RegisterBenchmark(row.c_str(), compare, work, threads)
        ->Unit(benchmark::kMillisecond)
        ->MinTime(3.0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  for (const BenchShape& shape : {kLlama3, kLlama2}) {
    for (const std::int64_t kv : {16384, 65536}) {
      add_rows(std::string("decode/") + shape.name + "/f16/kv=" + std::to_string(kv),
               {shape, kv, 1});
    }
  }
  add_rows("prefill/llama3_8b/f16/n=2048", {kLlama3, 2048, 2048});

  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("isa", std::string(simd::isa_name<simd::BestIsa>()));
  benchmark::AddCustomContext("ggml", std::string(ggml_version()) + ' ' + ggml_commit());
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
