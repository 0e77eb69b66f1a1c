// SPDX-License-Identifier: MIT
// Promise: a snapshot is the whole sequence: restored anywhere, it goes on bit for bit as if it had
// never left; and no bytes whatever do harm.
#include "headwise/cache/snapshot.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/checksum.hpp"
#include "support/boundary_lengths.hpp"
#include "support/cache_model.hpp"
#include "support/errors.hpp"
#include "support/isa_types.hpp"

namespace headwise {
namespace {

using test::ModelledCache;
using test::new_tokens;
using testing::message_of;
using Model = ModelledCache<f16>;
using Bytes = std::vector<std::byte>;

CacheOptions options_of(PrefillMode prefill, std::int64_t rollback) {
  CacheOptions options = test::mixed_options(prefill, rollback);
  options.max_context = 700;
  return options;
}

/// Another capacity in every respect.
CacheOptions other_capacity(CacheOptions options) {
  options.max_sequences += 2;
  options.max_context = 900;
  options.max_chunk = 333;
  options.max_bytes = std::size_t{64} << 20;
  return options;
}

template <class T>
void put(Bytes& bytes, std::size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

/// A head's checksum made right again, as a forger would.
void forge(Bytes& bytes, const CacheGeometry& geometry) {
  const std::size_t head = SnapshotHead(geometry, {}).num_bytes();
  Checksum sum;
  Bytes first(64, std::byte{0});
  std::copy_n(bytes.begin() + 32, 32, first.begin());
  sum.add(first);
  sum.add(std::span(bytes).subspan(64, head - 64));
  put(bytes, 24, sum.value());
}

// Round trips ------------------------------------------------------------------------------------

template <class Format>
struct Snapshots : ::testing::Test {};
TYPED_TEST_SUITE(Snapshots, test::AllFormats, test::FormatNames);

TYPED_TEST(Snapshots, GoOnInAnotherCacheFromEveryBoundaryLength) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const std::int64_t rollback : {0, 19}) {
      const CacheOptions options = options_of(prefill, rollback);
      ModelledCache<TypeParam> from(test::mixed_shape(), test::mixed_plan(prefill), options);
      ModelledCache<TypeParam> to(test::mixed_shape(), test::mixed_plan(prefill),
                                  other_capacity(options));
      for (const std::int64_t length : test::boundary_lengths(17, 30, 64, 16)) {
        const SequenceId id = from.add();
        from.add_tokens(id, new_tokens(length / 3), Phase::kPrompt);  // rings change banks
        from.add_tokens(id, new_tokens(length - length / 3), Phase::kPrompt);
        const Bytes bytes = from.snapshot(id);
        const SequenceId there = to.restore(bytes, from.sequences.at(id)).value();
        ASSERT_TRUE(to.matches()) << length;
        ASSERT_EQ(to.cache.held_bytes(there), from.cache.held_bytes(id));
        ASSERT_EQ(to.cache.max_truncate(there), from.cache.max_truncate(id));
        ASSERT_EQ(to.snapshot(there), bytes) << "another snapshot of the same sequence";
        // Further, and back as far as before.
        if (length > rollback + 1) {
          ASSERT_EQ(to.rollback(there, length - rollback - 1), StepStatus::kTooFarBack);
          ASSERT_EQ(to.rollback(there, length - rollback), StepStatus::kOk);
          ASSERT_TRUE(to.matches()) << length;
        }
        for (const std::int64_t tokens : {1, 40}) {
          to.add_tokens(there, new_tokens(tokens), Phase::kPrompt);
          ASSERT_TRUE(to.matches()) << length << " and " << tokens;
        }
        ASSERT_TRUE(from.matches());  // the original is as it was
        from.release(id);
        to.release(there);
        ASSERT_EQ(to.cache.pages_in_use(), 0);
      }
    }
  }
}

TEST(Snapshot, OfARolledBackForkOfASequenceIsThatFork) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    const CacheOptions options = options_of(prefill, 19);
    Model from(test::mixed_shape(), test::mixed_plan(prefill), options);
    Model to(test::mixed_shape(), test::mixed_plan(prefill), other_capacity(options));
    for (std::int64_t length = 20; length < 300; length += 13) {
      const SequenceId parent = from.add();
      from.add_tokens(parent, new_tokens(length), Phase::kPrompt);
      const SequenceId child = from.fork(parent).value();
      ASSERT_EQ(from.rollback(child, length - 11), StepStatus::kOk);
      from.add_tokens(child, new_tokens(3), Phase::kDecode);  // below the high water
      const SequenceId there = to.restore(from.snapshot(child), from.sequences.at(child)).value();
      ASSERT_TRUE(to.matches()) << length;
      ASSERT_EQ(to.rollback(there, length - 19), StepStatus::kOk);
      ASSERT_TRUE(to.matches()) << length;
      to.add_tokens(there, new_tokens(60), Phase::kDecode);
      ASSERT_TRUE(to.matches()) << length;
      ASSERT_TRUE(from.matches()) << length;
      from.release(parent);
      from.release(child);
      to.release(there);
    }
  }
}

TEST(Snapshot, OfSeveralFormatsAndOfSharedLayersGoOn) {
  using Mixed = Formats<Int8Rows, f16>;
  const ModelShape shape(
      {{2, 1, 32, 32}, {.num_kv_heads = 2, .k_dim = 32, .v_dim = 32, .kv_layer = 0}});
  HeadPlan plan(shape);
  for (const int layer : {0, 1}) plan.set(layer, 1, KeepWindow{{4, 28}});
  CacheOptions options = options_of(PrefillMode::kWindowed, 5);
  options.format_of = [](const HeadBudget& budget) {
    return std::holds_alternative<KeepWindow>(budget) ? 1 : 0;
  };
  KvCache<Mixed> from(shape, plan, options);
  KvCache<Mixed> to(shape, plan, other_capacity(options));
  Step step;
  const std::vector<float> rows(90 * 32, 0.5F);
  const auto view = TensorView<const float>::nhd(rows.data(), 1, 32);
  SequenceId id = from.add_sequence().value();
  ASSERT_EQ(from.begin(step, {{id, 90}}), StepStatus::kOk);
  for (int l = 0; l < 2; ++l) {
    for (int h = 0; h < 2; ++h) {
      from.append<simd::BestIsa>(step, step.chunks()[0], l, h, view, view);
      step.note_head_done(l);
    }
  }
  ASSERT_EQ(from.commit(step), StepStatus::kOk);
  Bytes bytes(from.snapshot_bytes(id));
  ASSERT_EQ(from.snapshot(id, bytes), StepStatus::kOk);
  SequenceId there;
  ASSERT_EQ(to.restore(bytes, there), StepStatus::kOk);
  Bytes again(to.snapshot_bytes(there));
  ASSERT_EQ(to.snapshot(there, again), StepStatus::kOk);
  EXPECT_EQ(again, bytes);
  EXPECT_EQ(to.held_bytes(there), from.held_bytes(id));

  options.format_of = [](const HeadBudget&) { return 1; };
  KvCache<Mixed> other(shape, plan, options);
  EXPECT_THROW((void)other.restore(bytes, there), FormatError);
  EXPECT_EQ(other.pages_in_use(), 0);
}

TEST(Snapshot, GoesIntoAContextThatIsShorterThanAWindow) {
  const ModelShape shape = ModelShape::uniform(1, 2, 2, 16);
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{20, 100}});
  for (const auto& [from_context, to_context] : {std::pair{60, 900}, {900, 60}}) {
    CacheOptions options = options_of(PrefillMode::kWindowed, 5);
    options.max_context = from_context;
    Model from(shape, plan, options);
    options.max_context = to_context;
    Model to(shape, plan, options);
    const SequenceId id = from.add();
    from.add_tokens(id, new_tokens(50), Phase::kPrompt);
    const SequenceId there = to.restore(from.snapshot(id), from.sequences.at(id)).value();
    ASSERT_TRUE(to.matches());
    to.add_tokens(there, new_tokens(10), Phase::kDecode);
    ASSERT_TRUE(to.matches());
  }
}

TEST(Snapshot, HasNoRowsOfFormerSequences) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    const CacheOptions options = options_of(prefill, 7);
    Model used(test::mixed_shape(), test::mixed_plan(prefill), options);
    for (int i = 0; i < 3; ++i) used.add_tokens(used.add(), new_tokens(600), Phase::kPrompt);
    while (!used.sequences.empty()) used.release(used.sequences.begin()->first);
    for (const std::int64_t length : {0, 1, 15, 16, 17, 36, 40, 90, 200}) {
      Model fresh(test::mixed_shape(), test::mixed_plan(prefill), options);
      const auto tokens = new_tokens(length);
      const SequenceId a = used.add();
      const SequenceId b = fresh.add();
      used.add_tokens(a, tokens, Phase::kPrompt);
      fresh.add_tokens(b, tokens, Phase::kPrompt);
      if (length > 20) {  // 36, 29, 33: a page is given back, and taken anew in part
        const auto more = new_tokens(4);
        ASSERT_EQ(used.rollback(a, length - 7), StepStatus::kOk);
        ASSERT_EQ(fresh.rollback(b, length - 7), StepStatus::kOk);
        used.add_tokens(a, more, Phase::kDecode);
        fresh.add_tokens(b, more, Phase::kDecode);
      }
      ASSERT_EQ(used.snapshot(a), fresh.snapshot(b)) << length;
      used.release(a);
    }
  }
}

TEST(Snapshot, LiesAsItsPageSays) {
  const ModelShape shape = ModelShape::uniform(1, 2, 2, 16);
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{4, 12}});
  CacheOptions options = options_of(PrefillMode::kWindowed, 3);
  Model model(shape, plan, options);
  const SequenceId id = model.add();
  model.add_tokens(id, new_tokens(20), Phase::kPrompt);
  const Bytes bytes = model.snapshot(id);
  ASSERT_EQ(bytes.size(), 320U + 4 * 16 * 32 * 2);  // H, then two pages a head
  const auto at = [&]<class T>(std::size_t offset, T expected) {
    T value;
    std::memcpy(&value, bytes.data() + offset, sizeof value);
    EXPECT_EQ(value, expected) << "offset " << offset;
  };
  EXPECT_EQ(std::memcmp(bytes.data(), "headwise\1\0\0\0\4\3\2\1", 16), 0);
  at(16, std::uint64_t{bytes.size()});
  at(40, fingerprint(plan).low);
  at(48, fingerprint(plan).high);
  at(80, std::uint32_t{16});
  at(84, std::uint32_t{1});
  at(88, std::int64_t{3});
  at(96, std::int64_t{20});
  at(104, std::int64_t{20});
  at(112, std::uint32_t{2});
  at(120, std::uint64_t{0});
  at(128, std::uint32_t{2});
  at(132, std::uint32_t{16});
  at(136, std::uint32_t{16});
  at(140, std::int32_t{-1});
  at(144, std::int64_t{0});
  for (const std::size_t of_class : {152U, 216U}) {
    at(of_class, std::uint64_t{0});
    EXPECT_STREQ(reinterpret_cast<const char*>(bytes.data() + of_class + 8), FormatOf<f16>::name());
  }
  std::vector<float> k(16), v(16);
  FormatOf<f16>::read_row(bytes.data() + 320, {16, 16, 16}, 0, k.data(), v.data());
  EXPECT_EQ(k, test::stored_row<FormatOf<f16>>(model.sequences.at(id).tokens[0], 0, 0, 0,
                                               test::Side::kK, 16));
}

// Statuses ---------------------------------------------------------------------------------------

TEST(Snapshot, IsRefusedByStatusWhereItCannotBe) {
  const CacheOptions options = options_of(PrefillMode::kWindowed, 3);
  Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed), options);
  const SequenceId id = model.add();
  model.add_tokens(id, new_tokens(50), Phase::kPrompt);
  Bytes bytes(model.cache.snapshot_bytes(id));
  EXPECT_EQ(model.cache.snapshot(id, std::span(bytes).first(bytes.size() - 1)),
            StepStatus::kTooSmall);
  EXPECT_EQ(model.cache.snapshot(SequenceId{}, bytes), StepStatus::kInvalidChunk);
  EXPECT_EQ(model.cache.snapshot_bytes(SequenceId{}), 0U);
  ASSERT_EQ(model.begin({{id, new_tokens(1)}}, Phase::kDecode), StepStatus::kOk);
  EXPECT_EQ(model.cache.snapshot(id, bytes), StepStatus::kInStep);
  EXPECT_TRUE(std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{}; }))
      << "a refusal writes nothing";
  ASSERT_EQ(model.cache.drop(model.step), StepStatus::kOk);
  EXPECT_EQ(model.cache.snapshot(id, bytes), StepStatus::kOk);
}

/// Keeps every third row of each selected head.
KeptPositions every_third(const Model& model, SequenceId id) {
  return model.selection(id, [](int, std::int64_t pos) { return pos % 3 == 0; });
}

TEST(Snapshot, IsRefusedOfASequenceThatWasSelectedFrom) {
  const CacheOptions options = options_of(PrefillMode::kWindowed, 3);
  Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed), options);
  const SequenceId id = model.add();
  model.add_tokens(id, new_tokens(50), Phase::kPrompt);
  const SequenceId whole = model.fork(id).value();
  Bytes bytes(model.cache.snapshot_bytes(id));
  ASSERT_EQ(model.compact(id, every_third(model, id)), StepStatus::kOk);
  const SequenceId child = model.fork(id).value();
  for (const SequenceId selected : {id, child}) {
    EXPECT_EQ(model.cache.snapshot_bytes(selected), 0U);
    EXPECT_EQ(model.cache.snapshot(selected, bytes), StepStatus::kSelectedFrom);
    EXPECT_EQ(model.cache.snapshot(selected, {}), StepStatus::kSelectedFrom);
  }
  EXPECT_TRUE(std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{}; }))
      << "a refusal writes nothing";
  EXPECT_TRUE(model.matches());
  // A fork from before has one, and so has the sequence when it begins anew.
  model.release(child);
  ASSERT_TRUE(model.restore(model.snapshot(whole), model.sequences.at(whole)).has_value());
  EXPECT_TRUE(model.matches());
  ASSERT_EQ(model.clear(id), StepStatus::kOk);
  model.add_tokens(id, new_tokens(20), Phase::kPrompt);
  model.release(whole);
  ASSERT_TRUE(model.restore(model.snapshot(id), model.sequences.at(id)).has_value());
  EXPECT_TRUE(model.matches());
}

TEST(Snapshot, OfAnotherSequenceMayComeAndGoWhileAStepIsOpen) {
  Model model(test::mixed_shape(), test::mixed_plan(PrefillMode::kWindowed),
              options_of(PrefillMode::kWindowed, 3));
  const SequenceId busy = model.add();
  const SequenceId idle = model.add();
  model.add_tokens(busy, new_tokens(90), Phase::kPrompt);
  model.add_tokens(idle, new_tokens(70), Phase::kPrompt);
  ASSERT_EQ(model.begin({{busy, new_tokens(30)}}, Phase::kPrompt), StepStatus::kOk);
  ASSERT_TRUE(model.restore(model.snapshot(idle), model.sequences.at(idle)).has_value());
  model.append();
  ASSERT_EQ(model.commit(), StepStatus::kOk);
  EXPECT_TRUE(model.matches());
}

TEST(Snapshot, IsRestoredWholeOrNotAtAll) {
  const PrefillMode prefill = PrefillMode::kChunkCausal;
  const CacheOptions options = options_of(prefill, 7);
  Model from(test::mixed_shape(), test::mixed_plan(prefill), options);
  const SequenceId id = from.add();
  from.add_tokens(id, new_tokens(300), Phase::kPrompt);
  const Bytes bytes = from.snapshot(id);

  // One slab after the other, until all pages are there.
  const std::size_t slab = from.cache.geometry().pool().slab_bytes();
  bool fits = false;
  for (std::size_t slabs = 1; !fits; ++slabs) {
    CacheOptions small = options;
    small.max_bytes = slabs * slab;
    Model to(test::mixed_shape(), test::mixed_plan(prefill), small);
    SequenceId there{-7, 7};
    const StepStatus status = to.cache.restore(bytes, there);
    fits = status == StepStatus::kOk;
    if (fits) {
      EXPECT_GE(to.cache.held_bytes(there), from.cache.held_bytes(id));
    } else {
      ASSERT_EQ(status, StepStatus::kOutOfPages);
      ASSERT_EQ(there, (SequenceId{-7, 7}));
      ASSERT_EQ(to.cache.pages_in_use(), 0);
    }
  }

  CacheOptions shorter = options;
  shorter.max_context = 299;
  Model too_short(test::mixed_shape(), test::mixed_plan(prefill), shorter);
  EXPECT_FALSE(too_short.restore(bytes, {}, StepStatus::kContextTooLong).has_value());
  EXPECT_EQ(too_short.cache.pages_in_use(), 0);

  while (from.cache.add_sequence()) {
  }
  EXPECT_FALSE(from.restore(bytes, {}, StepStatus::kOutOfSequences).has_value());
}

// Bytes that are no such snapshot ----------------------------------------------------------------

template <class Rows>
std::string refusal(KvCache<Rows>& cache, const Bytes& bytes) {
  SequenceId id{-7, 7};
  const std::int64_t used = cache.pages_in_use();
  std::string message =
      message_of<FormatError>([&] { EXPECT_NE(cache.restore(bytes, id), StepStatus::kOk); });
  EXPECT_EQ(id, (SequenceId{-7, 7}));
  EXPECT_EQ(cache.pages_in_use(), used);
  return message;
}

void expect_says(const std::string& message, std::initializer_list<const char*> words) {
  for (const char* word : words) EXPECT_NE(message.find(word), std::string::npos) << message;
}

TEST(Snapshot, OfAnotherKindOfCacheIsRefusedWithBothValues) {
  const ModelShape shape = ModelShape::uniform(2, 4, 2, 32);
  const CacheOptions options = options_of(PrefillMode::kWindowed, 3);
  Model from(shape, HeadPlan(shape), options);
  const SequenceId id = from.add();
  from.add_tokens(id, new_tokens(40), Phase::kPrompt);
  const Bytes bytes = from.snapshot(id);

  const auto refused_by = [&](const ModelShape& other, const CacheOptions& with) {
    KvCache<f16> cache(other, HeadPlan(other), with);
    return refusal(cache, bytes);
  };
  expect_says(refused_by(ModelShape::uniform(3, 4, 2, 32), options), {"layers", "2", "3"});
  expect_says(refused_by(ModelShape::uniform(2, 4, 4, 32), options), {"KV heads", "2", "4"});
  expect_says(refused_by(ModelShape::uniform(2, 4, 2, 48), options), {"k_dim", "32", "48"});
  expect_says(refused_by(ModelShape({{2, 2, 32, 32}, {2, 2, 32, 64}}), options),
              {"layer 1", "v_dim", "32", "64"});
  LayerShape windowed = shape.layer(0);
  windowed.sliding_window = 99;
  expect_says(refused_by(ModelShape({windowed, windowed}), options), {"sliding window", "0", "99"});
  LayerShape shared = shape.layer(0);
  shared.kv_layer = 0;
  expect_says(refused_by(ModelShape({shape.layer(0), shared}), options), {"kv_layer", "-1", "0"});
  CacheOptions pages = options;
  pages.page_tokens = 32;
  expect_says(refused_by(shape, pages), {"page_tokens", "16", "32"});
  CacheOptions rollback = options;
  rollback.max_rollback = 4;
  expect_says(refused_by(shape, rollback), {"max_rollback", "3", "4"});

  KvCache<Int8Rows> int8(shape, HeadPlan(shape), options);
  expect_says(refusal(int8, bytes), {FormatOf<f16>::name(), Int8Rows::name()});
  HeadPlan plan(shape);
  for (int l = 0; l < 2; ++l) {
    for (int h = 0; h < 2; ++h) plan.set(l, h, KeepWindow{{4, 12}});
  }
  KvCache<f16> streaming(shape, plan, options);
  const std::string own = fingerprint(HeadPlan(shape)).to_string();
  expect_says(refusal(streaming, bytes), {own.c_str(), fingerprint(plan).to_string().c_str()});

  SequenceId again;
  EXPECT_EQ(from.cache.restore(bytes, again), StepStatus::kOk);
}

struct HostileSnapshots : ::testing::Test {
  static constexpr PrefillMode kPrefill = PrefillMode::kChunkCausal;
  Model model{test::mixed_shape(), test::mixed_plan(kPrefill), options_of(kPrefill, 7)};
  SequenceId id = model.add();
  Bytes bytes;

  void SetUp() override {
    model.add_tokens(id, new_tokens(100), Phase::kPrompt);
    model.add_tokens(id, new_tokens(60), Phase::kPrompt);
    bytes = model.snapshot(id);
  }
  void expect_unharmed() {
    EXPECT_TRUE(model.matches());
    const SequenceId again = model.restore(bytes, model.sequences.at(id)).value();
    EXPECT_TRUE(model.matches());
    model.release(again);
  }
};

TEST_F(HostileSnapshots, AnyShorterOrLongerOneIsRefused) {
  Bytes longer = bytes;
  longer.push_back(std::byte{0});
  refusal(model.cache, longer);
  for (std::size_t size = 0; size < bytes.size(); size += size < 600 ? 1 : 509) {
    const Bytes cut(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));
    ASSERT_FALSE(refusal(model.cache, cut).empty()) << size;
    if (size < 24) continue;
    Bytes resized = cut;  // that says it is as long as it is
    put(resized, 16, std::uint64_t{size});
    ASSERT_FALSE(refusal(model.cache, resized).empty()) << size;
  }
  expect_unharmed();
}

TEST_F(HostileSnapshots, AnyFlippedBitIsRefused) {
  const std::size_t head = SnapshotHead(model.cache.geometry(), {}).first_page();
  Bytes flipped = bytes;
  for (std::size_t at = 0; at < bytes.size(); at += at < head ? 1 : 331) {
    for (int bit = 0; bit < 8; bit += at < head ? 1 : 3) {
      flipped[at] ^= std::byte{1} << bit;
      ASSERT_FALSE(refusal(model.cache, flipped).empty()) << "byte " << at << ", bit " << bit;
      flipped[at] ^= std::byte{1} << bit;
    }
  }
  expect_unharmed();
}

TEST_F(HostileSnapshots, TheErrorNamesWhatIsWrong) {
  Bytes other = bytes;
  put(other, 8, std::uint32_t{2});
  expect_says(refusal(model.cache, other), {"version 2", "1"});
  other = bytes;
  std::reverse(other.begin() + 12, other.begin() + 16);
  expect_says(refusal(model.cache, other), {"byte order", "big-endian"});
  other = bytes;
  other.back() ^= std::byte{1};
  expect_says(refusal(model.cache, other), {"checksum", "rows"});
  other = bytes;
  other[96] ^= std::byte{1};
  expect_says(refusal(model.cache, other), {"checksum", "head"});
}

TEST_F(HostileSnapshots, ForgedLengthsAndStatesAreRefused) {
  const CacheGeometry& geometry = model.cache.geometry();
  const auto forged = [&](std::initializer_list<std::pair<std::size_t, std::int64_t>> words) {
    Bytes other = bytes;
    for (const auto& [at, word] : words) put(other, at, word);
    forge(other, geometry);
    SequenceId there{-7, 7};
    StepStatus status = StepStatus::kOutOfPages;
    try {
      status = model.cache.restore(other, there);
    } catch (const FormatError&) {
    }
    EXPECT_NE(status, StepStatus::kOk);
    EXPECT_EQ(there, (SequenceId{-7, 7}));
    return status;
  };
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t length : {std::int64_t{-1}, kMost, -kMost, std::int64_t{1} << 40,
                                    std::int64_t{0}, std::int64_t{100}, std::int64_t{300}}) {
    (void)forged({{96, length}});
    (void)forged({{104, length}});
    (void)forged({{96, length}, {104, length}});
  }
  EXPECT_EQ(forged({{96, 701}, {104, 701}}), StepStatus::kContextTooLong);
  const std::size_t states = 128 + 24 * geometry.layers().size();
  for (std::size_t c = 0; c < geometry.classes().size(); ++c) {
    for (const std::int64_t word : {std::int64_t{2}, std::int64_t{-1}, std::int64_t{256}}) {
      (void)forged({{states + 64 * c, word}});
    }
  }
  // States of a selection, of whose rows nothing is said: those that a rule would count with, too.
  int num_selected = 0;
  for (std::size_t c = 0; c < geometry.classes().size(); ++c) {
    if (!geometry.classes()[c].selects()) continue;
    ++num_selected;
    for (const std::uint64_t word : {std::uint64_t{50}, std::uint64_t{32} << 32 | 50}) {
      Bytes other = bytes;
      put(other, states + 64 * c, word);
      forge(other, geometry);
      expect_says(refusal(model.cache, other), {"selected at length 50", "version 1"});
    }
  }
  EXPECT_GT(num_selected, 0);
  // The second bank of a ring that was never full: it lies beyond the table.
  Model small(test::mixed_shape(), test::mixed_plan(kPrefill), options_of(kPrefill, 7));
  const SequenceId one = small.add();
  small.add_tokens(one, new_tokens(1), Phase::kPrompt);
  const Bytes short_one = small.snapshot(one);
  for (std::size_t c = 0; c < geometry.classes().size(); ++c) {
    if (geometry.classes()[c].rule.get_if<WindowRule>() == nullptr) continue;
    Bytes other = short_one;
    put(other, states + 64 * c, std::uint64_t{1});
    forge(other, geometry);
    EXPECT_FALSE(refusal(small.cache, other).empty());
  }
  expect_unharmed();
}

TEST_F(HostileSnapshots, NoisyOnesNeverDoHarm) {
  std::mt19937 random(7);
  for (int i = 0; i < 2000; ++i) {
    Bytes other = bytes;
    const std::size_t head = SnapshotHead(model.cache.geometry(), {}).num_bytes();
    for (int n = static_cast<int>(random() % 4) + 1; n > 0; --n) {
      other[random() % head] = static_cast<std::byte>(random());
    }
    if (i % 2 == 0) forge(other, model.cache.geometry());
    SequenceId there;
    try {
      if (model.cache.restore(other, there) == StepStatus::kOk) model.cache.release(there);
    } catch (const FormatError&) {
    }
  }
  expect_unharmed();
}

}  // namespace
}  // namespace headwise
