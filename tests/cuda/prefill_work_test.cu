// SPDX-License-Identifier: MIT
// Prefill of few long tiles: how they are cut, and that the pieces' sums are the tiles'.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/device_model.cuh"

namespace headwise::test {
namespace {

using Chunks = std::vector<std::pair<std::int64_t, std::int64_t>>;  // stored and new tokens
constexpr cuda::PrefillCut kCut{132};

/// A class of heads as a step finds it: everything, or sinks and a window.
cuda::ClassState class_state(std::int64_t length, const Window& window) {
  cuda::ClassState state;
  state.recent = std::numeric_limits<std::int32_t>::max();
  state.first_count = static_cast<std::int32_t>(length);
  if (window.bounded()) {
    state.sink = static_cast<std::int32_t>(window.sink);
    state.recent = static_cast<std::int32_t>(window.recent);
    state.first_count = static_cast<std::int32_t>(std::min(length, window.sink));
    const std::int64_t older = std::max(window.sink, length - window.recent + 1);
    state.older_pos = static_cast<std::int32_t>(older);
    state.older_count = static_cast<std::int32_t>(std::max<std::int64_t>(0, length - older));
  }
  return state;
}

/// What the device makes of a step for one kind of layer.
struct Cut {
  /// @param dense, streaming  heads of either kind; those have 64 sinks and a window of 256
  Cut(const Chunks& chunks, int dense, int streaming, int tile_tokens) {
    cuda::PrefillKind kind;
    kind.num_heads = dense + streaming;
    kind.tile_tokens = tile_tokens;
    kind.group_size = cuda::detail::kGroupRows / tile_tokens;
    std::vector<cuda::ChunkState> states;
    std::vector<cuda::ClassState> classes;
    for (const auto& [length, tokens] : chunks) {
      states.push_back({0, length, tokens});
      classes.push_back(class_state(length, Window::everything()));
      classes.push_back(class_state(length, {64, 256}));
      if (!cuda::is_prefilled(tokens, kind.group_size)) continue;
      for (int h = 0; h < kind.num_heads; ++h) {
        for (std::int64_t i = 0; i * tile_tokens < tokens; ++i) {
          const std::int64_t end = length + std::min(tokens, (i + 1) * tile_tokens);
          const std::int64_t oldest = length + i * tile_tokens;
          const std::int64_t window = std::max<std::int64_t>(64, oldest - 255);
          all[{static_cast<int>(states.size()) - 1, static_cast<int>(i), h}] =
              h < dense ? end
                        : std::min<std::int64_t>(end, 64) + std::max<std::int64_t>(0, end - window);
        }
      }
    }
    for (int h = 0; h < kind.num_heads; ++h) {
      kind.class_idx[h] = static_cast<std::int16_t>(h < dense ? 0 : 1);
    }
    const cuda::StepHeader header{static_cast<std::int32_t>(chunks.size())};
    const auto upload = [](const auto* data, std::size_t count) {
      cuda::DeviceMemory memory(count * sizeof *data);
      cuda::require(cudaMemcpy(memory.data(), data, count * sizeof *data, cudaMemcpyHostToDevice),
                    "cudaMemcpy");
      return memory;
    };
    const cuda::DeviceMemory on_device[] = {
        upload(&header, 1), upload(states.data(), states.size()),
        upload(classes.data(), classes.size()), upload(&kind, 1)};
    cuda::DeviceMemory lists[] = {
        cuda::DeviceMemory(sizeof(std::int32_t)),
        cuda::DeviceMemory(static_cast<std::size_t>(kCut.most_shares()) * sizeof(std::int32_t)),
        cuda::DeviceMemory(static_cast<std::size_t>(kCut.most_pieces()) * sizeof(cuda::TilePiece))};
    const cuda::PrefillWork work{reinterpret_cast<std::int32_t*>(lists[0].data()),
                                 reinterpret_cast<std::int32_t*>(lists[1].data()),
                                 reinterpret_cast<cuda::TilePiece*>(lists[2].data()), nullptr,
                                 nullptr};
    const cuda::DeviceMemory device_work = upload(&work, 1);
    cuda::DeviceStep step;
    step.header = reinterpret_cast<const cuda::StepHeader*>(on_device[0].data());
    step.chunks = reinterpret_cast<const cuda::ChunkState*>(on_device[1].data());
    step.classes = reinterpret_cast<const cuda::ClassState*>(on_device[2].data());
    step.num_classes = 2;
    step.max_sequences = static_cast<std::int32_t>(chunks.size());
    cuda::cut_prefill_kernel<>
        <<<1, cuda::detail::kCutPrefillThreads, cuda::detail::cut_prefill_bytes(kCut)>>>(
            step, reinterpret_cast<const cuda::PrefillKind*>(on_device[3].data()),
            reinterpret_cast<const cuda::PrefillWork*>(device_work.data()), kCut);
    cuda::require(cudaDeviceSynchronize(), "cut_prefill_kernel");
    std::int32_t num_shares = 0;
    const auto download = [](auto* to, const cuda::DeviceMemory& from, std::size_t count) {
      cuda::require(cudaMemcpy(to, from.data(), count * sizeof *to, cudaMemcpyDeviceToHost),
                    "cudaMemcpy");
    };
    download(&num_shares, lists[0], 1);
    first_piece.resize(static_cast<std::size_t>(num_shares));
    download(first_piece.data(), lists[1], first_piece.size());
    pieces.resize(static_cast<std::size_t>(kCut.most_pieces()));
    download(pieces.data(), lists[2], pieces.size());
  }

  /// @return the longest share of those that are no whole tile, over the mean one of all blocks.
  double check() {
    std::map<std::tuple<int, int, int>, std::vector<cuda::TilePiece>> of_tile;
    int longest = 0;
    int sum = 0;
    for (const std::int32_t first : first_piece) {
      int blocks = 0;
      bool is_whole = true;
      for (std::int32_t p = first;; ++p) {
        const cuda::TilePiece& piece = pieces.at(static_cast<std::size_t>(p));
        of_tile[{piece.chunk, piece.tile, piece.head}].push_back(piece);
        blocks += (piece.end_key - piece.begin_key) / cuda::detail::kPieceKeys +
                  cuda::detail::kPieceOverhead;
        is_whole = is_whole && piece.num_parts == 1;
        if (piece.goes_on == 0) break;
      }
      if (is_whole) continue;
      longest = std::max(longest, blocks);
      sum += blocks;
    }
    EXPECT_EQ(of_tile.size(), all.size());
    std::vector<int> used(static_cast<std::size_t>(kCut.most_parts()), 0);
    for (auto& [tile, parts] : of_tile) {
      std::sort(parts.begin(), parts.end(),
                [](const auto& a, const auto& b) { return a.begin_key < b.begin_key; });
      std::int64_t end = 0;
      std::vector<int> numbers;
      for (const cuda::TilePiece& piece : parts) {
        EXPECT_EQ(piece.begin_key, end);
        EXPECT_LT(piece.begin_key, piece.end_key);
        EXPECT_EQ(piece.num_parts, static_cast<int>(parts.size()));
        EXPECT_EQ(piece.first_part, parts[0].first_part);
        end = piece.end_key;
        numbers.push_back(piece.part);
        if (parts.size() > 1) ++used.at(static_cast<std::size_t>(piece.first_part + piece.part));
      }
      std::sort(numbers.begin(), numbers.end());
      for (std::size_t i = 0; i < numbers.size(); ++i) EXPECT_EQ(numbers[i], static_cast<int>(i));
      EXPECT_GE(end, all.at(tile));
      EXPECT_LT(end - cuda::detail::kPieceKeys, all.at(tile));
    }
    EXPECT_LE(*std::max_element(used.begin(), used.end()), 1);
    return static_cast<double>(longest) * kCut.num_blocks / sum;
  }

  std::map<std::tuple<int, int, int>, std::int64_t> all;  // keys of each chunk's tile and head
  std::vector<std::int32_t> first_piece;
  std::vector<cuda::TilePiece> pieces;
};

TEST(CudaPrefillWork, ManyTilesAndShortOnesStayWhole) {
  if (!has_device()) GTEST_SKIP() << "no CUDA device";
  EXPECT_TRUE(Cut({{0, 1024}}, 4, 4, 32).first_piece.empty());  // nothing is longer than 8 blocks
  EXPECT_TRUE(Cut({{131072, 8192}}, 4, 4, 32).first_piece.empty());   // 2048 tiles
  EXPECT_TRUE(Cut({{131072, 1}}, 4, 4, 32).first_piece.empty());      // decode's
  EXPECT_TRUE(Cut({{9000, 32 * 33}}, 4, 0, 32).first_piece.empty());  // 132 equal ones
}

TEST(CudaPrefillWork, EveryKeyIsInOnePieceAndSharesAreEqual) {
  if (!has_device()) GTEST_SKIP() << "no CUDA device";
  for (const std::int64_t past : {1024, 1025, 4095, 4096, 20000, 131072}) {
    for (const std::int64_t tokens : {2, 31, 33, 100, 512, 1000, 2048}) {
      for (const auto& [dense, streaming] : {std::pair{4, 4}, {8, 0}, {1, 0}, {1, 7}}) {
        SCOPED_TRACE(std::to_string(past) + "+" + std::to_string(tokens) + ", heads " +
                     std::to_string(dense) + "+" + std::to_string(streaming));
        Cut cut({{past, tokens}}, dense, streaming, 32);
        if (cut.first_piece.empty()) continue;
        const double longest = cut.check();
        if (dense * tokens > 400 && past > 20000) EXPECT_LT(longest, 1.06);
      }
    }
  }
}

TEST(CudaPrefillWork, UnequalChunksAreAllThere) {
  if (!has_device()) GTEST_SKIP() << "no CUDA device";
  for (const Chunks& chunks :
       {Chunks{{60000, 64}, {0, 300}, {5000, 1}, {1500, 2}},
        Chunks{{0, 2}, {131072, 33}, {131000, 1}, {131072, 33}},
        Chunks{{3000, 16}, {3000, 17}, {3000, 32}, {3000, 31}, {3000, 33}}}) {
    Cut cut(chunks, 2, 2, 32);
    EXPECT_FALSE(cut.first_piece.empty());
    cut.check();
  }
  Chunks many(300, {100, 1});
  many[7] = {40000, 40};
  many[250] = {30000, 17};
  many[251] = {30000, 16};  // decode's
  Cut cut(many, 1, 1, 32);
  EXPECT_FALSE(cut.first_piece.empty());
  cut.check();
}

template <class Row>
class CudaCutTiles : public ::testing::Test {};
TYPED_TEST_SUITE(CudaCutTiles, DeviceRows);

DeviceModelOptions long_options(int dim, int group_size) {
  return {.dim = dim, .group_size = group_size, .window = {64, 256}, .max_context = 8192};
}

/// 32 blocks of keys beside 132 multiprocessors: shares are of the least length.
TYPED_TEST(CudaCutTiles, GiveWhatWholeOnesGive) {
  for (const int dim : {64, 128}) {
    for (const int group : {1, 4, 12}) {
      for (const std::int64_t past : {1023, 1024, 1025, 2303, 2304, 2305, 4100}) {
        SCOPED_TRACE("width " + std::to_string(dim) + ", group " + std::to_string(group) +
                     ", past " + std::to_string(past));
        DeviceModel<TypeParam> model(long_options(dim, group));
        if (!has_device()) continue;
        const SequenceId id = model.add();
        model.step({{id, past}}, Phase::kPrompt, 1);
        for (const std::int64_t n : {2, 128 / group - 1, 128 / group + 1, 150}) {
          model.step({{id, n}}, Phase::kPrompt, 3);
        }
      }
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaCutTiles, WindowsOfManyBlocksEndWhereTheyShould) {
  for (const PrefillMode mode : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const Window window : {Window{0, 1500}, Window{1, 2047}, Window{200, 2048}}) {
      DeviceModelOptions options = long_options(128, 4);
      options.window = window;
      options.prefill = mode;
      DeviceModel<TypeParam> model(options);
      if (!has_device()) continue;
      const SequenceId id = model.add();
      model.step({{id, 2500}}, Phase::kPrompt, 1);
      for (const std::int64_t n : {33, 64, 65, 700}) model.step({{id, n}}, Phase::kPrompt, 5);
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaCutTiles, OfUnequalChunksBesideDecodingSequences) {
  DeviceModel<TypeParam> model(long_options(128, 4));
  HEADWISE_NEEDS_DEVICE();
  const SequenceId a = model.add(), b = model.add(), c = model.add(), d = model.add();
  model.step({{a, 5000}, {b, 1500}, {d, 3000}}, Phase::kPrompt, 1);
  model.step({{a, 33}, {b, 2}, {c, 300}, {d, 1}}, Phase::kPrompt, 9);
  model.step({{a, 1}, {b, 70}, {c, 1}, {d, 100}}, Phase::kPrompt, 9);
}

/// 160 tiles of 132 multiprocessors: one each stays whole, the others are cut.
TYPED_TEST(CudaCutTiles, BesideWholeOnes) {
  DeviceModelOptions options = long_options(64, 4);
  options.num_kv_heads = 16;
  options.num_layers = 2;
  DeviceModel<TypeParam> model(options);
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  model.step({{id, 2000}}, Phase::kPrompt, 1);
  model.step({{id, 640}}, Phase::kPrompt, 4);
}

TYPED_TEST(CudaCutTiles, HiddenRowsReachNobody) {
  for (const float value :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    DeviceModelOptions options = long_options(128, 4);
    options.window = {64, 2000};
    DeviceModel<TypeParam> model(options);
    if (!has_device()) continue;
    const SequenceId id = model.add();
    model.plant_v(1020, value);  // leaves the window while the next chunk is attended
    model.step({{id, 3000}}, Phase::kPrompt, 1);
    model.plant_v(39, value);
    model.plant_k(39, value);
    model.step({{id, 40}}, Phase::kPrompt, 20);
  }
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaCutTiles, GiveTheSameBitsAgain) {
  std::vector<std::uint16_t> first;
  for (int i = 0; i < 6; ++i) {
    DeviceModel<TypeParam> model(long_options(128, 4));
    HEADWISE_NEEDS_DEVICE();
    const SequenceId id = model.add();
    model.step({{id, 4000}}, Phase::kPrompt, 1);
    model.step({{id, 100}}, Phase::kPrompt, 1);
    std::vector<std::uint16_t> bits(100 * 2 * 4 * 128);
    ASSERT_EQ(cudaMemcpy(bits.data(), model.out(0).data, bits.size() * 2, cudaMemcpyDeviceToHost),
              cudaSuccess);
    if (i == 0) first = bits;
    EXPECT_EQ(std::memcmp(first.data(), bits.data(), bits.size() * 2), 0);
  }
}

TYPED_TEST(CudaCutTiles, AreNotNeeded) {
  DeviceModel<TypeParam> model(long_options(128, 4));
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  model.step({{id, 3000}}, Phase::kPrompt, 1);
  const std::vector<SequenceChunk> chunks{{id, 50}};
  model.begin(chunks, Phase::kPrompt);
  ASSERT_EQ(model.attend(0), StepStatus::kOk);  // nobody has planned
  ASSERT_EQ(cudaStreamSynchronize(model.stream()), cudaSuccess);
  model.check(chunks, Phase::kPrompt, 5);
}

}  // namespace
}  // namespace headwise::test
