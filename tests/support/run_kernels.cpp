// SPDX-License-Identifier: MIT
#include "support/run_kernels.hpp"

#include <algorithm>
#include <cstddef>
#include <optional>
#include <tuple>
#include <utility>

#include "headwise/attention/cpu/prefill.hpp"
#include "headwise/attention/reference.hpp"
#include "support/attention_cases.hpp"
#include "support/isa_types.hpp"

namespace headwise::test {
namespace {

template <class Isa, class Format>
void run_decode(const HeadProblem<Format>& problem, std::vector<std::int64_t> cuts) {
  const auto& past = problem.past;
  const std::int64_t rows = problem.num_queries * problem.group_size;
  const std::size_t stride = decode_partial_floats(rows, past.shape.v_dim);
  AlignedFloats partials(stride * cuts.size());
  AlignedFloats scratch(decode_scratch_floats(rows, past.shape.k_dim, past.shape.v_dim));
  cuts.push_back(past.num_rows());
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    decode_split<Isa>(problem, {cuts[i], cuts[i + 1], i + 2 == cuts.size()},
                      partials.data() + i * stride, scratch.data());
  }
  merge_splits<Isa>(problem, partials.data(), stride, static_cast<std::int64_t>(cuts.size()) - 1);
}

template <class Isa, class Format>
void run_prefill(const HeadProblem<Format>& problem, std::int64_t tile) {
  AlignedFloats scratch(prefill_scratch_floats(problem.group_size, problem.past.shape.k_dim,
                                               problem.past.shape.v_dim));
  for (std::int64_t begin = 0; begin < problem.num_queries; begin += tile) {
    prefill_tile<Isa>(problem, begin, std::min(begin + tile, problem.num_queries), scratch.data());
  }
}

template <class Format, class... Isas>
Kernels<Format> find(std::string_view isa, std::tuple<Isas...>) {
  Kernels<Format> found;
  const auto look_at = [&]<class Isa>(Isa) {
    if (simd::isa_name<Isa>() == isa)
      found = {&run_decode<Isa, Format>, &run_prefill<Isa, Format>, &decode_split<Isa, Format>};
  };
  (look_at(Isas{}), ...);
  return found;
}

template <class Format>
class HeadOf : public KernelHead {
 public:
  HeadOf(Kernels<Format> kernels, const AttentionCase& c) : kernels_(kernels), head_(c) {}

  void decode(std::vector<std::int64_t> cuts) override {
    kernels_.decode_in_splits(problem(), std::move(cuts));
  }
  void decode_one_split(DecodeSplit split, float* partial, float* scratch) override {
    kernels_.decode_one_split(problem(), split, partial, scratch);
  }
  void prefill(std::int64_t tile) override { kernels_.prefill_in_tiles(problem(), tile); }
  std::vector<double> truth() override { return reference_attention(problem()); }
  const std::vector<float>& out() const override { return head_.out(); }
  std::int64_t num_rows() override { return problem().past.num_rows(); }

  void set_row(std::int64_t pos, float k, float v) override { head_.set_row(pos, k, v); }
  void set_q(float q) override { head_.set_q(q); }
  void set_compensation(CompensationRow row) override { compensation_ = row; }
  void set_sinks(const float* sinks) override { sinks_ = sinks; }
  float stored(float v) const override {
    float rounded = 0.0F;
    Format::round_row({.k_dim = 0, .v_dim = 1}, nullptr, &v, nullptr, &rounded);
    return rounded;
  }

 private:
  HeadProblem<Format> problem() {
    HeadProblem<Format> p = head_.problem();
    if (compensation_) p.past.compensation = *compensation_;
    if (sinks_ != nullptr) p.softmax.sinks = sinks_;
    return p;
  }

  Kernels<Format> kernels_;
  PagedHead<Format> head_;
  std::optional<CompensationRow> compensation_;
  const float* sinks_ = nullptr;
};

template <class Isa, class Format>
KernelPair pair_of() {
  return {std::string(simd::isa_name<Isa>()) + "_" + Format::name(),
          [](const AttentionCase& c) -> std::unique_ptr<KernelHead> {
            return std::make_unique<HeadOf<Format>>(kernels_on<Format>(simd::isa_name<Isa>()), c);
          }};
}

template <class Format, class... Isas>
KernelFormat format_of(std::tuple<Isas...>) {
  return {Format::name(), {pair_of<Isas, Format>()...}};
}

template <class... Formats>
std::vector<KernelFormat> formats_of(::testing::Types<Formats...>) {
  return {format_of<Formats>(type_lists::Isas{})...};
}

}  // namespace

std::vector<KernelFormat> all_formats() { return formats_of(AllFormats{}); }

std::vector<KernelPair> all_kernels() {
  std::vector<KernelPair> pairs;
  for (KernelFormat& format : all_formats()) {
    for (KernelPair& pair : format.isas) pairs.push_back(std::move(pair));
  }
  return pairs;
}

template <class Format>
Kernels<Format> kernels_on(std::string_view isa) {
  return find<Format>(isa, type_lists::Isas{});
}

// AllFormats; one that is not here does not link.
template Kernels<PlainRows<f32>> kernels_on(std::string_view);
template Kernels<TiledRows<f32>> kernels_on(std::string_view);
template Kernels<PlainRows<f16>> kernels_on(std::string_view);
template Kernels<TiledRows<f16>> kernels_on(std::string_view);
template Kernels<PlainRows<bf16>> kernels_on(std::string_view);
template Kernels<TiledRows<bf16>> kernels_on(std::string_view);
template Kernels<Int8Rows> kernels_on(std::string_view);
template Kernels<Int4Rows> kernels_on(std::string_view);
template Kernels<KvRows<Int8Rows, Int4Rows>> kernels_on(std::string_view);
template Kernels<KvRows<f16, Int8Rows>> kernels_on(std::string_view);

}  // namespace headwise::test
