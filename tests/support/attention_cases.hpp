// SPDX-License-Identifier: MIT
/// @file attention_cases.hpp
/// One table of attention problems for kernels, oracle and benches, and what lays them out in
/// pages.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "headwise/attention/problem.hpp"
#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/cache/rows/tiled_rows.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/core/kv_view.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::test {

/// Floats that start on a cache line.
class AlignedFloats {
 public:
  explicit AlignedFloats(std::size_t count) : storage_(count + 16) {
    void* p = storage_.data();
    std::size_t space = storage_.size() * sizeof(float);
    data_ = static_cast<float*>(std::align(64, count * sizeof(float), p, space));
  }
  AlignedFloats(AlignedFloats&&) = default;
  AlignedFloats& operator=(AlignedFloats&&) = default;
  float* data() { return data_; }

 private:
  std::vector<float> storage_;
  float* data_;
};

/// Which rows of the past a head has kept.
enum class Kept {
  kAll,        ///< one run from slot 0, whatever the window
  kSecondRun,  ///< sinks, then a later part of the past from the middle of a page on
  kRing,       ///< the window rule: sinks and a ring, so up to three runs
};

struct AttentionCase {
  std::string name;
  int k_dim = 64;
  int v_dim = 64;
  int group_size = 1;
  std::int64_t past = 0;     ///< tokens before the step
  std::int64_t queries = 1;  ///< tokens of the step
  Window window = Window::everything();
  Kept kept = Kept::kAll;
  int page_tokens = 64;
  std::int64_t compensation = 0;  ///< rows that the compensation row stands for; 0: none
  float soft_cap = 0.0F;
  bool sinks = false;  ///< a logit for each query head
  bool alibi = false;  ///< a slope for each query head
};

/// Group sizes, widths and lengths at their boundaries, each value at least once: not the product.
inline std::vector<AttentionCase> attention_cases() {
  std::vector<AttentionCase> cases;
  const auto add = [&](AttentionCase c) {
    c.name += "_d" + std::to_string(c.k_dim) + "_g" + std::to_string(c.group_size) + "_past" +
              std::to_string(c.past) + "_n" + std::to_string(c.queries);
    cases.push_back(c);
  };
  const int dims[] = {32, 64, 80, 96, 128, 256};
  const int groups[] = {1, 2, 4, 5, 7, 8};
  // Lengths around 0, a tile, a page and two; widths and groups take turns.
  const std::int64_t lengths[] = {0, 1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 130, 257};
  for (std::size_t i = 0; i < std::size(lengths); ++i) {
    const int dim = dims[i % 6];
    const int group = groups[(i * 5 + i / 6) % 6];
    add({.name = "dense", .k_dim = dim, .v_dim = dim, .group_size = group, .past = lengths[i]});
  }
  for (std::size_t i = 0; i < 6; ++i) {
    add({.name = "every_group", .k_dim = 128, .v_dim = 128, .group_size = groups[i], .past = 200});
    add({.name = "every_width", .k_dim = dims[i], .v_dim = dims[i], .group_size = 4, .past = 200});
  }
  add({.name = "wide_k", .k_dim = 192, .v_dim = 128, .group_size = 3, .past = 100});
  add({.name = "narrow_k", .k_dim = 16, .v_dim = 48, .group_size = 9, .past = 100});
  for (const int page : {16, 32, 128, 192}) {
    add({.name = "page" + std::to_string(page),
         .group_size = 2,
         .past = 300,
         .queries = 2,
         .page_tokens = page});
    add({.name = "ring_page" + std::to_string(page),
         .past = 700,
         .queries = 3,
         .window = {5, 40},
         .kept = Kept::kRing,
         .page_tokens = page});
  }
  add({.name = "second_run", .group_size = 4, .past = 333, .kept = Kept::kSecondRun});
  add({.name = "second_run",
       .group_size = 4,
       .past = 333,
       .queries = 40,
       .kept = Kept::kSecondRun});

  const Window window{4, 60};
  for (const std::int64_t past : {0, 1, 3, 4, 5, 59, 60, 61, 63, 64, 65, 127, 128, 129, 1000}) {
    add({.name = "ring",
         .k_dim = 32,
         .v_dim = 32,
         .group_size = 2,
         .past = past,
         .window = window,
         .kept = Kept::kRing});
    add({.name = "ring",
         .k_dim = 32,
         .v_dim = 32,
         .group_size = 2,
         .past = past,
         .queries = 7,
         .window = window,
         .kept = Kept::kRing});
  }
  add({.name = "no_sink", .past = 100, .queries = 5, .window = {0, 16}, .kept = Kept::kRing});
  add({.name = "only_itself", .past = 100, .queries = 5, .window = {0, 1}, .kept = Kept::kRing});
  add({.name = "no_recent_past", .past = 100, .queries = 5, .window = {8, 1}, .kept = Kept::kRing});
  add({.name = "window_over_all_rows", .past = 300, .queries = 70, .window = {3, 30}});

  for (const std::int64_t n : {2, 16, 63, 64, 65, 129, 300}) {
    add({.name = "prompt", .group_size = 4, .past = 0, .queries = n});
    add({.name = "chunk", .group_size = 7, .past = 150, .queries = n});
    add({.name = "window_prompt", .group_size = 2, .past = 0, .queries = n, .window = window});
    add({.name = "window_chunk",
         .group_size = 2,
         .past = 150,
         .queries = n,
         .window = window,
         .kept = Kept::kRing});
  }
  add({.name = "compensation", .past = 90, .kept = Kept::kSecondRun, .compensation = 33});
  add({.name = "compensation",
       .group_size = 5,
       .past = 90,
       .queries = 70,
       .kept = Kept::kSecondRun,
       .compensation = 33});
  add({.name = "only_compensation", .past = 0, .compensation = 9});

  // What a softmax has besides, alone and together, over every layout and around every boundary.
  for (const bool alibi : {false, true}) {
    for (const std::int64_t past : {0, 1, 15, 16, 63, 64, 65, 129, 200}) {
      for (const std::int64_t n : {1, 70}) {
        add({.name = alibi ? "alibi_dense" : "cap_and_sinks_dense",
             .k_dim = 32,
             .v_dim = 48,
             .group_size = 3,
             .past = past,
             .queries = n,
             .soft_cap = alibi ? 0.0F : 2.5F,
             .sinks = !alibi,
             .alibi = alibi});
      }
    }
  }
  for (const std::int64_t past : {0, 3, 4, 5, 59, 60, 61, 64, 65, 300}) {
    for (const std::int64_t n : {1, 7, 130}) {
      add({.name = "all_in_a_ring",
           .k_dim = 32,
           .v_dim = 32,
           .group_size = 2,
           .past = past,
           .queries = n,
           .window = window,
           .kept = Kept::kRing,
           .page_tokens = 32,
           .soft_cap = 30.0F,
           .sinks = true,
           .alibi = true});
    }
  }
  for (const std::int64_t n : {1, 40}) {
    add({.name = "alibi_second_run",
         .group_size = 4,
         .past = 333,
         .queries = n,
         .kept = Kept::kSecondRun,
         .alibi = true});
    add({.name = "cap", .group_size = 5, .past = 90, .queries = n, .soft_cap = 0.3F});
    add({.name = "wide_cap", .group_size = 5, .past = 90, .queries = n, .soft_cap = 1e6F});
    add({.name = "sinks", .group_size = 5, .past = 90, .queries = n, .sinks = true});
    add({.name = "compensation_cap_sinks",
         .group_size = 5,
         .past = 90,
         .queries = n,
         .kept = Kept::kSecondRun,
         .compensation = 33,
         .soft_cap = 1.5F,
         .sinks = true});
  }
  return cases;
}

/// K [n, k_dim] and V [n, v_dim] of a whole sequence.
struct DenseRows {
  std::vector<float> k;
  std::vector<float> v;
};

/// An AttentionCase with random rows, laid out in pages at random places. Every row that no run
/// names, and every page in no list, is NaN, and every stored row that the window hides from all
/// queries is infinite or NaN: a kernel that lets one of them through is caught.
template <class Format>
class PagedHead {
 public:
  explicit PagedHead(const AttentionCase& c, unsigned seed = 1) : case_(c), random_(seed) {
    const auto total = static_cast<std::size_t>(c.past + c.queries);
    k_ = random_rows(total, c.k_dim, 1.0F);
    v_ = random_rows(total, c.v_dim, 1.0F);
    const auto rows = static_cast<std::size_t>(c.queries) * static_cast<std::size_t>(c.group_size);
    q_ = random_rows(rows, c.k_dim, 2.0F);  // peaked, as attention is
    out_.assign(rows * static_cast<std::size_t>(c.v_dim), std::numeric_limits<float>::quiet_NaN());
    for (std::int64_t pos = 0; pos < c.past; ++pos) {
      bool seen = false;
      for (std::int64_t i = 0; i < c.queries; ++i) seen |= c.window.sees(Pos{c.past + i}, Pos{pos});
      if (!seen) fill(pos, kNotFinite[pos % 3], kNotFinite[(pos + 1) % 3]);
    }
    mean_ = random_rows(1, std::max(c.k_dim, c.v_dim), 0.2F);
    sinks_ = random_rows(1, c.group_size, 4.0F);
    slopes_ = random_rows(1, c.group_size, 0.2F);
    lay_out();
  }
  PagedHead(const PagedHead&) = delete;
  PagedHead& operator=(const PagedHead&) = delete;

  HeadProblem<Format> problem() {
    const AttentionCase& c = case_;
    HeadProblem<Format> p;
    p.past = view_;
    p.window = c.window;
    p.first_query = Pos{c.past};
    p.num_queries = c.queries;
    p.group_size = c.group_size;
    p.scale = 1.0F / std::sqrt(static_cast<float>(c.k_dim));
    p.softmax.soft_cap = c.soft_cap;
    if (c.sinks) p.softmax.sinks = sinks_.data();
    if (c.alibi) p.softmax.alibi_slopes = slopes_.data();
    p.q = TensorView<const float>::nhd(q_.data(), c.group_size, c.k_dim);
    p.own_k = TensorView<const float>::nhd(k_.data() + c.past * c.k_dim, 1, c.k_dim);
    p.own_v = TensorView<const float>::nhd(v_.data() + c.past * c.v_dim, 1, c.v_dim);
    p.out = TensorView<float>::nhd(out_.data(), c.group_size, c.v_dim);
    return p;
  }

  const std::vector<float>& out() const { return out_; }

  static constexpr float kNotFinite[] = {std::numeric_limits<float>::quiet_NaN(),
                                         std::numeric_limits<float>::infinity(),
                                         -std::numeric_limits<float>::infinity()};
  /// Gives all elements of one token's K and of its V a value.
  void set_row(std::int64_t pos, float k, float v) {
    fill(pos, k, v);
    view_ = {};
    lay_out();
  }
  /// Gives all elements of all q a value.
  void set_q(float q) { std::fill(q_.begin(), q_.end(), q); }

  /// Past and own rows, rounded to the row format.
  DenseRows dense_rows() const {
    DenseRows rows{k_, v_};
    for (std::int64_t pos = 0; pos < case_.past + case_.queries; ++pos) {
      Format::round_row(view_.shape, &k_[at(pos, case_.k_dim)], &v_[at(pos, case_.v_dim)],
                        &rows.k[at(pos, case_.k_dim)], &rows.v[at(pos, case_.v_dim)]);
    }
    return rows;
  }

 private:
  std::vector<float> random_rows(std::size_t rows, int dim, float sigma) {
    std::normal_distribution<float> normal(0.0F, sigma);
    std::vector<float> x(rows * static_cast<std::size_t>(dim));
    for (float& value : x) value = normal(random_);
    return x;
  }

  void fill(std::int64_t pos, float k, float v) {
    std::fill_n(&k_[at(pos, case_.k_dim)], case_.k_dim, k);
    std::fill_n(&v_[at(pos, case_.v_dim)], case_.v_dim, v);
  }

  static std::size_t at(std::int64_t pos, int dim) { return static_cast<std::size_t>(pos * dim); }

  void lay_out() {
    const AttentionCase& c = case_;
    const PageShape shape{c.page_tokens, c.k_dim, c.v_dim};
    const std::int64_t slots = c.past + 3 * c.page_tokens;  // more than any of the layouts below
    const auto num_pages = static_cast<std::size_t>(slots / c.page_tokens + 1);

    table_.resize(num_pages);
    std::iota(table_.begin(), table_.end(), 1);  // page 0 is nobody's
    std::shuffle(table_.begin(), table_.end(), random_);
    page_bytes_ = Format::page_bytes(shape);
    storage_.assign((num_pages + 1) * page_bytes_ + 64, std::byte{0xFF});  // NaN in every format
    void* aligned = storage_.data();
    std::size_t space = storage_.size();
    pages_ = static_cast<std::byte*>(std::align(64, space - 64, aligned, space));
    view_ = KvView<Format>::over_pages(pages_, page_bytes_, table_.data(), shape);
    if (c.compensation > 0) view_.compensation = {mean_.data(), mean_.data(), c.compensation};

    if (c.kept == Kept::kAll) {
      store_run(0, 0, c.past);
    } else if (c.kept == Kept::kSecondRun) {
      store_run(0, 0, 5);
      store_run(c.page_tokens + 10, c.past / 2, c.past - c.past / 2);
    } else {
      store_ring();
    }
  }

  void store_ring() {
    const AttentionCase& c = case_;
    const std::int64_t sink = c.window.sink;
    const std::int64_t rows =
        (sink + c.window.recent + c.page_tokens - 1) / c.page_tokens * c.page_tokens;
    const auto slot = [&](std::int64_t pos) {
      return pos < sink ? pos : sink + (pos - sink) % (rows - sink);
    };
    store_run(0, 0, std::min(sink, c.past));
    std::int64_t pos = std::max(sink, c.past - c.window.recent + 1);
    while (pos < c.past) {
      const std::int64_t count = std::min(c.past - pos, rows - slot(pos));
      store_run(slot(pos), pos, count);
      pos += count;
    }
  }

  void store_run(std::int64_t slot, std::int64_t pos, std::int64_t count) {
    view_.add_run({Slot{slot}, Pos{pos}, count});
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t page = table_[static_cast<std::size_t>((slot + i) / case_.page_tokens)];
      Format::template encode<simd::Scalar>(
          pages_ + static_cast<std::size_t>(page) * page_bytes_, view_.shape,
          static_cast<std::size_t>((slot + i) % case_.page_tokens), &k_[at(pos + i, case_.k_dim)],
          &v_[at(pos + i, case_.v_dim)]);
    }
  }

  AttentionCase case_;
  std::mt19937 random_;
  std::vector<float> k_, v_, q_, out_, mean_, sinks_, slopes_;
  std::vector<std::int32_t> table_;
  std::vector<std::byte> storage_;
  std::byte* pages_ = nullptr;
  std::size_t page_bytes_ = 0;
  KvView<Format> view_;
};

/// |x - truth| / |truth| in the Euclidean norm; |x| where the truth is zero. NaN if any x is.
inline double relative_error(const std::vector<float>& x, const std::vector<double>& truth) {
  double error = 0.0;
  double norm = 0.0;
  for (std::size_t i = 0; i < truth.size(); ++i) {
    const double difference = static_cast<double>(x[i]) - truth[i];
    error += difference * difference;
    norm += truth[i] * truth[i];
  }
  return norm > 0.0 ? std::sqrt(error / norm) : std::sqrt(error);
}

}  // namespace headwise::test
