// SPDX-License-Identifier: MIT
// Attention over an engine's own page tables [kv_head, sequence, page], without a cache.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/device_model.cuh"

namespace headwise::test {
namespace {

constexpr int kTableDim = 128;
constexpr int kHeads = 3;
constexpr int kGroup = 4;
constexpr int kLayers = 2;

/// An engine: pages in any order, tables whose entries outside of windows name no page at all.
class Engine {
 public:
  Engine(std::vector<std::int32_t> lengths, const std::vector<std::vector<Window>>& windows,
         const SoftmaxOptions& softmax = {})
      : lengths_(std::move(lengths)),
        windows_(windows),
        max_pages_((*std::max_element(lengths_.begin(), lengths_.end()) + 63) / 64 + 1),
        layers_(kLayers, LayerShape{kHeads, kGroup, kTableDim, kTableDim, 0.0F, softmax}) {}

  template <class Softmax = cuda::PlainSoftmax>
  void check() {
    const auto num_sequences = static_cast<int>(lengths_.size());
    const auto shape = cuda::PageTableShape::dense(num_sequences, max_pages_);
    cuda::TableAttention<f16, cuda::TableDims, f16, Softmax> attention(layers_, windows_, shape);
    const cuda::DeviceMemory lengths = upload(lengths_);
    ASSERT_EQ(attention.plan_work(reinterpret_cast<const std::int32_t*>(lengths.data()),
                                  num_sequences, nullptr),
              cudaSuccess);
    for (int l = 0; l < kLayers; ++l) check_layer(attention, l);
  }

 private:
  template <class T>
  static cuda::DeviceMemory upload(const std::vector<T>& x) {
    cuda::DeviceMemory memory(x.size() * sizeof(T));
    cuda::require(cudaMemcpy(memory.data(), x.data(), memory.num_bytes(), cudaMemcpyHostToDevice),
                  "cudaMemcpy");
    return memory;
  }
  bool sees(int layer, int head, std::int64_t length, std::int64_t pos) const {
    const Window& window =
        windows_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(head)];
    return window.sees(Pos{length - 1}, Pos{pos});
  }

  template <class Attention>
  void check_layer(Attention& attention, int l) {
    const std::size_t num_pages = kHeads * lengths_.size() * static_cast<std::size_t>(max_pages_);
    constexpr std::size_t kPage = 2 * 64 * kTableDim;
    std::vector<std::int32_t> page_of(num_pages);
    std::iota(page_of.begin(), page_of.end(), 0);
    std::shuffle(page_of.begin(), page_of.end(), random_);
    std::normal_distribution<float> normal;
    std::vector<f16> pages(num_pages * kPage, f16{0x7E00});  // NaN where nobody stored a row
    std::vector<std::int32_t> table = page_of;
    for (int h = 0; h < kHeads; ++h) {
      for (std::size_t s = 0; s < lengths_.size(); ++s) {
        for (std::int64_t p = 0; p < max_pages_; ++p) {
          const std::size_t at =
              (static_cast<std::size_t>(h) * lengths_.size() + s) * max_pages_ + p;
          bool needed = false;
          for (std::int64_t pos = 64 * p; pos < 64 * p + 64 && pos < lengths_[s]; ++pos) {
            needed = needed || sees(l, h, lengths_[s], pos);
            for (int i = 0; i < 2 * kTableDim; ++i) {
              pages[static_cast<std::size_t>(page_of[at]) * kPage +
                    static_cast<std::size_t>((i / kTableDim * 64 + pos % 64) * kTableDim +
                                             i % kTableDim)] = from_float<f16>(normal(random_));
            }
          }
          if (!needed) table[at] = 0x7FFFFFFF;
        }
      }
    }
    std::vector<f16> q(lengths_.size() * kHeads * kGroup * kTableDim);
    for (f16& x : q) x = from_float<f16>(2.0F * normal(random_));
    const cuda::DeviceMemory on_device = upload(pages);
    const cuda::DeviceMemory device_table = upload(table);
    const cuda::DeviceMemory device_q = upload(q);
    const cuda::DeviceMemory device_out(q.size() * sizeof(f16));
    const cuda::PageTableView view{reinterpret_cast<const std::int32_t*>(device_table.data()),
                                   on_device.data(), kPage * sizeof(f16)};
    ASSERT_EQ(
        attention.decode(l, view,
                         TensorView<const f16>::nhd(reinterpret_cast<const f16*>(device_q.data()),
                                                    kHeads * kGroup, kTableDim),
                         TensorView<f16>::nhd(reinterpret_cast<f16*>(device_out.data()),
                                              kHeads * kGroup, kTableDim),
                         nullptr),
        cudaSuccess);
    std::vector<f16> out(q.size());
    ASSERT_EQ(
        cudaMemcpy(out.data(), device_out.data(), device_out.num_bytes(), cudaMemcpyDeviceToHost),
        cudaSuccess);
    for (std::size_t s = 0; s < lengths_.size(); ++s) {
      for (int head = 0; lengths_[s] > 0 && head < kHeads * kGroup; ++head) {
        const int h = head / kGroup;
        std::vector<float> k, v, query;
        for (std::int64_t pos = 0; pos < lengths_[s]; ++pos) {
          const std::size_t at =
              (static_cast<std::size_t>(h) * lengths_.size() + s) * max_pages_ + pos / 64;
          const f16* page = pages.data() + static_cast<std::size_t>(page_of[at]) * kPage;
          for (int d = 0; d < kTableDim; ++d) {
            k.push_back(to_float(page[pos % 64 * kTableDim + d]));
            v.push_back(to_float(page[(64 + pos % 64) * kTableDim + d]));
          }
        }
        const std::size_t first =
            (s * kHeads * kGroup + static_cast<std::size_t>(head)) * kTableDim;
        for (int d = 0; d < kTableDim; ++d) {
          query.push_back(to_float(q[first + static_cast<std::size_t>(d)]));
        }
        const SoftmaxOptions& all = layers_[static_cast<std::size_t>(l)].softmax;
        OracleSoftmax softmax;
        softmax.soft_cap = static_cast<double>(all.soft_cap);
        const auto qo_head = static_cast<std::size_t>(head);
        if (!all.sinks.empty()) softmax.sink = static_cast<double>(all.sinks[qo_head]);
        if (!all.alibi_slopes.empty()) {
          softmax.slope = static_cast<double>(all.alibi_slopes[qo_head]);
        }
        const std::vector<double> truth = oracle_row(
            query.data(), k.data(), v.data(), lengths_[s], kTableDim, kTableDim,
            1.0 / std::sqrt(kTableDim),
            [&](std::int64_t pos) { return sees(l, h, lengths_[s], pos); }, softmax);
        double error = 0.0;
        double norm = 0.0;
        for (int d = 0; d < kTableDim; ++d) {
          const double x = static_cast<double>(to_float(out[first + static_cast<std::size_t>(d)]));
          error += std::pow(x - truth[static_cast<std::size_t>(d)], 2);
          norm += std::pow(truth[static_cast<std::size_t>(d)], 2);
        }
        EXPECT_LE(std::sqrt(error / norm), kBound<f16>)
            << "layer " << l << ", sequence " << s << " of " << lengths_[s] << ", head " << head;
      }
    }
  }

  std::vector<std::int32_t> lengths_;
  std::vector<std::vector<Window>> windows_;
  std::int64_t max_pages_;
  std::vector<LayerShape> layers_;
  std::mt19937 random_{7};
};

TEST(CudaOwnTables, DecodesRaggedSequencesEachHeadWithinItsWindow) {
  HEADWISE_NEEDS_DEVICE();
  const std::vector<std::vector<Window>> windows{
      {Window::everything(), Window{4, 60}, Window{64, 256}},
      {Window{0, 64}, Window{16, 1}, Window::everything()}};
  Engine({1, 0, 63, 64, 65, 129, 321, 5000}, windows).check();
}

TEST(CudaOwnTables, DecodesWithASoftmaxThatHasMoreThanAScale) {
  HEADWISE_NEEDS_DEVICE();
  SoftmaxOptions softmax{.soft_cap = 3.0F, .alibi_slopes = alibi_slopes(kHeads * kGroup)};
  for (int h = 0; h < kHeads * kGroup; ++h)
    softmax.sinks.push_back(3.0F + static_cast<float>(h % 4));
  const std::vector<std::vector<Window>> windows{
      {Window::everything(), Window{4, 60}, Window{64, 256}},
      {Window{0, 64}, Window{16, 1}, Window::everything()}};
  Engine({1, 0, 63, 64, 65, 129, 321, 5000}, windows, softmax).check<cuda::ShapedSoftmax>();
}

TEST(CudaOwnTables, RefusesWindowsThatAreNotOneAHeadAndTablesBeyond31Bits) {
  const std::vector<LayerShape> layers{{kHeads, kGroup, kTableDim, kTableDim}};
  const std::vector<std::vector<Window>> two{{Window::everything(), Window::everything()}};
  using Attention = cuda::TableAttention<f16, cuda::TableDims>;
  EXPECT_THROW(Attention(layers, two, cuda::PageTableShape::dense(1, 1)), ConfigError);
  EXPECT_THROW(cuda::PageTableShape::dense(64, std::int64_t{1} << 25), ConfigError);
}

}  // namespace
}  // namespace headwise::test
