// SPDX-License-Identifier: MIT
// q, k, v and out of two bytes: the kernels read what floats of the same values would say, and
// round their outputs once.
#include "headwise/attention/cpu/own_rows.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <vector>

#include "headwise/attention/reference.hpp"
#include "support/attention_cases.hpp"
#include "support/isa_types.hpp"
#include "support/run_kernels.hpp"

namespace headwise::test {
namespace {

/// A tensor of E and the floats that it stands for, in an engine's own strides: between rows lies
/// what must not be read, or written.
template <class E>
class Typed {
 public:
  /// @param like  [tokens, heads, dim]; its values are rounded to E
  Typed(const InputView& like, std::int64_t tokens, int heads, int dim)
      : tokens_(tokens), heads_(heads), dim_(dim) {
    elements_.assign(static_cast<std::size_t>(tokens * heads * stride()), from_float<E>(kGuard));
    floats_.assign(elements_.size(), kGuard);
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (int h = 0; h < heads; ++h) {
        for (int d = 0; d < dim; ++d) {
          const E element = from_float<E>(like.row(t, h)[d]);
          elements_[at(t, h) + static_cast<std::size_t>(d)] = element;
          floats_[at(t, h) + static_cast<std::size_t>(d)] = to_float(element);
        }
      }
    }
  }
  TensorView<E> elements() { return {elements_.data(), heads_ * stride(), stride()}; }
  TensorView<float> floats() { return {floats_.data(), heads_ * stride(), stride()}; }

  /// What the elements are, without the gaps.
  std::vector<float> values() const { return dense(elements_); }
  /// What the floats would be as elements.
  std::vector<float> rounded_floats() const { return dense(floats_); }
  bool gaps_are_whole() const {
    for (std::int64_t t = 0; t < tokens_; ++t) {
      for (int h = 0; h < heads_; ++h) {
        for (std::int64_t d = dim_; d < stride(); ++d) {
          if (to_float(elements_[at(t, h) + static_cast<std::size_t>(d)]) != kGuard) return false;
        }
      }
    }
    return true;
  }

 private:
  static constexpr float kGuard = 1024.0F;
  std::int64_t stride() const { return dim_ + 3; }
  std::size_t at(std::int64_t t, int h) const {
    return static_cast<std::size_t>((t * heads_ + h) * stride());
  }
  template <class T>
  std::vector<float> dense(const std::vector<T>& from) const {
    std::vector<float> to;
    for (std::int64_t t = 0; t < tokens_; ++t) {
      for (int h = 0; h < heads_; ++h) {
        for (int d = 0; d < dim_; ++d) {
          const float x = to_float(from[at(t, h) + static_cast<std::size_t>(d)]);
          to.push_back(to_float(from_float<E>(x)));
        }
      }
    }
    return to;
  }

  std::int64_t tokens_;
  int heads_, dim_;
  std::vector<E> elements_;
  std::vector<float> floats_;
};

template <class Types>
class OwnRowsTest : public ::testing::Test {};
TYPED_TEST_SUITE(OwnRowsTest, AllKernels, KernelNames);

/// Decode and prefill of every case: the bits that floats of the same values give, rounded once,
/// and the oracle's answer.
template <class Isa, class Format, class E>
void expect_as_floats(double bound) {
  // Types are read and written row by row: what a long history adds is the scalar kernels' time
  // under sanitizers.
  constexpr std::int64_t kMostProducts = 1 << 20;
  for (const AttentionCase& c : attention_cases()) {
    if (c.queries * c.group_size * c.k_dim * (c.past + c.queries) > kMostProducts) continue;
    PagedHead<Format> head(c);
    auto problem = head.problem();
    Typed<E> q(problem.q, c.queries, c.group_size, c.k_dim);
    Typed<E> k(problem.own_k, c.queries, 1, c.k_dim);
    Typed<E> v(problem.own_v, c.queries, 1, c.v_dim);
    std::vector<float> zeros(static_cast<std::size_t>(c.queries * c.group_size * c.v_dim));
    const InputView empty(zeros.data(), std::int64_t{c.group_size} * c.v_dim, c.v_dim);
    for (const bool decodes : {true, false}) {
      SCOPED_TRACE(c.name + (decodes ? ", decode" : ", prefill"));
      Typed<E> out(empty, c.queries, c.group_size, c.v_dim);
      const auto run = [&] {
        if (decodes) return decode_in_splits<Isa>(problem, {0, problem.past.num_rows() / 2});
        prefill_in_tiles<Isa>(problem, 17);
      };
      problem.q = q.floats();
      problem.own_k = k.floats();
      problem.own_v = v.floats();
      problem.out = out.floats();
      run();
      problem.q = q.elements();
      problem.own_k = k.elements();
      problem.own_v = v.elements();
      problem.out = out.elements();
      run();
      ASSERT_EQ(out.values(), out.rounded_floats());
      ASSERT_TRUE(out.gaps_are_whole());
      ASSERT_LE(relative_error(out.values(), reference_attention(problem)), bound);
    }
  }
}

TYPED_TEST(OwnRowsTest, AreWhatFloatsOfTheSameValuesAre) {
  expect_as_floats<typename TypeParam::Isa, typename TypeParam::Format, f16>(6e-4);
  expect_as_floats<typename TypeParam::Isa, typename TypeParam::Format, bf16>(5e-3);
}

TYPED_TEST(OwnRowsTest, MayAllBeOfUnlikeTypes) {
  using Isa = typename TypeParam::Isa;
  for (const std::int64_t n : {1, 16, 17, 64, 100}) {
    const AttentionCase c{
        .name = "", .k_dim = 48, .v_dim = 80, .group_size = 3, .past = 70, .queries = n};
    PagedHead<typename TypeParam::Format> head(c);
    auto problem = head.problem();
    Typed<bf16> q(problem.q, n, 3, 48);
    Typed<f16> k(problem.own_k, n, 1, 48);
    problem.q = q.elements();
    problem.own_k = k.elements();
    const std::vector<double> truth = reference_attention(problem);
    decode_in_splits<Isa>(problem);
    EXPECT_LE(relative_error(head.out(), truth), 1e-5) << n;
    prefill_in_tiles<Isa>(problem, 50);
    EXPECT_LE(relative_error(head.out(), truth), 1e-5) << n;
  }
}

}  // namespace
}  // namespace headwise::test
