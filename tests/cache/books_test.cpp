// SPDX-License-Identifier: MIT
#include "headwise/cache/books.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "headwise/cache/geometry.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

/// Rows of four bytes an element.
std::size_t page_bytes(const PageShape& page) {
  return static_cast<std::size_t>(page.page_tokens * (page.k_dim + page.v_dim)) * 4;
}

/// Two layers of unlike widths, whose pages share slabs.
const ModelShape& shape() {
  static const ModelShape two_layers({{2, 1, 16, 16}, {2, 1, 32, 16}});
  return two_layers;
}

CacheOptions options_of(int sequences) {
  CacheOptions options;
  options.page_tokens = 16;
  options.max_context = 600;
  options.max_rollback = 20;
  options.max_sequences = sequences;
  options.prefill = PrefillMode::kChunkCausal;
  return options;
}

HeadPlan plan() {
  HeadPlan heads(shape());
  heads.set(0, 1, KeepWindow{{4, 20}});
  heads.set(1, 0, KeepWindow{{17, 33}});
  heads.set(1, 1, KeepGrowingWindow{4, 24, 3});
  return heads;
}

CacheGeometry geometry_of(const CacheOptions& options) {
  return CacheGeometry(shape(), plan(), options, page_bytes);
}

std::size_t slab_bytes_of(const CacheOptions& options) {
  const CacheGeometry geometry = geometry_of(options);
  return geometry.pool().slab_bytes();
}

/// Says that every layer has been attended.
void attend_all(const Step& step) {
  for (const StepChunk& chunk : step.chunks()) {
    if (chunk.num_tokens() == 0) continue;
    for (int l = 0; l < 2; ++l) {
      for (int h = 0; h < 2; ++h) step.note_head_done(l);
    }
  }
}

/// Books of pages on a device: nobody writes to them, so that they need no memory.
struct BooksOf {
  explicit BooksOf(const CacheOptions& options) : books(geometry_of(options), nullptr, false) {}

  Books books;
  Step step;
  std::vector<PageCopy> copies;

  StepStatus begin(std::initializer_list<SequenceChunk> chunks) {
    copies.clear();
    return books.begin(step, std::span(chunks.begin(), chunks.size()),
                       [&](const PageCopy& copy) { copies.push_back(copy); });
  }
  StepStatus commit() {
    attend_all(step);
    return books.commit(step);
  }
  StepStatus advance(SequenceId id, std::int64_t tokens) {
    const StepStatus status = begin({{id, tokens}});
    return status == StepStatus::kOk ? commit() : status;
  }
  SequenceId add() { return books.add_sequence().value(); }
  StepStatus fork(SequenceId id, SequenceId& child) { return fork(id, books.length(id), child); }
  StepStatus fork(SequenceId id, std::int64_t length, SequenceId& child) {
    copies.clear();
    return books.fork(id, length, child, [&](const PageCopy& copy) { copies.push_back(copy); });
  }
  std::int64_t used() const { return books.pool().num_used(); }
  /// Pages that one sequence names.
  std::int64_t held(SequenceId id) const {
    std::int64_t pages = 0;
    for (const std::int64_t of_size :
         books.geometry().pages_held(books.length(id), books.high_water(id))) {
      pages += of_size;
    }
    return pages;
  }
};

struct BooksTest : ::testing::Test, BooksOf {
  BooksTest() : BooksOf(options_of(4)) {}
};

/// Every page has as many holders as entries of live sequences name it.
void expect_holders_counted(const Books& books, const std::vector<SequenceId>& live) {
  std::map<std::int32_t, int> named;
  std::map<std::int32_t, std::size_t> size_of;
  const CacheGeometry& geometry = books.geometry();
  for (const SequenceId id : live) {
    for (const HeadGeometry& head : geometry.heads()) {
      const auto c = static_cast<std::size_t>(head.class_idx);
      const auto ranges = geometry.classes()[c].rule.held(books.keep_state(id.index, c),
                                                          books.length(id), books.high_water(id));
      for (const EntryRange& range : ranges) {
        for (std::int64_t i = range.first; i < range.last; ++i) {
          const std::int32_t page = books.tables().head(id.index, c, head.idx_in_class)[i];
          ASSERT_GE(page, 0);
          ++named[page];
          const auto [size, is_new] = size_of.insert({page, geometry.classes()[c].page_size});
          ASSERT_EQ(size->second, geometry.classes()[c].page_size) << "of two sizes";
        }
      }
    }
  }
  for (const auto& [page, count] : named) ASSERT_EQ(books.pool().num_holders(page), count);
  ASSERT_EQ(books.pool().num_used(), static_cast<std::int64_t>(named.size()));
}

// Sequences --------------------------------------------------------------------------------------

TEST_F(BooksTest, CountSequences) {
  std::vector<SequenceId> ids;
  for (int i = 0; i < 4; ++i) ids.push_back(add());
  EXPECT_EQ(books.add_sequence(), std::nullopt);
  for (const SequenceId id : ids) EXPECT_TRUE(books.is_live(id));
  books.release(ids[1]);
  EXPECT_FALSE(books.is_live(ids[1]));
  const SequenceId again = add();
  EXPECT_EQ(again.index, ids[1].index);
  EXPECT_NE(again, ids[1]);
  EXPECT_EQ(books.length(again), 0);
}

TEST_F(BooksTest, AnIdThatNamesNobodyIsRefusedEverywhere) {
  const SequenceId living = add();
  ASSERT_EQ(advance(living, 30), StepStatus::kOk);
  const SequenceId stale = add();
  ASSERT_EQ(advance(stale, 50), StepStatus::kOk);
  books.release(stale);
  const SequenceId heir = add();  // lives where the stale one did
  ASSERT_EQ(heir.index, stale.index);
  ASSERT_EQ(advance(heir, 40), StepStatus::kOk);
  const std::int64_t before = used();
  for (const SequenceId nobody :
       {stale, SequenceId{}, SequenceId{-1, 0}, SequenceId{3, 0}, SequenceId{4, 0},
        SequenceId{std::numeric_limits<std::int32_t>::max(), 0},
        SequenceId{std::numeric_limits<std::int32_t>::min(), 0}, SequenceId{living.index, 99}}) {
    EXPECT_FALSE(books.is_live(nobody));
    EXPECT_EQ(books.length(nobody), 0);
    EXPECT_EQ(books.high_water(nobody), 0);
    EXPECT_EQ(begin({{living, 1}, {nobody, 1}}), StepStatus::kInvalidChunk);
    EXPECT_EQ(books.rollback(nobody, 0), StepStatus::kInvalidChunk);
    EXPECT_EQ(books.rollback(nobody, 39), StepStatus::kInvalidChunk);
    EXPECT_EQ(books.clear(nobody), StepStatus::kInvalidChunk);
    SequenceId child{77, 77};
    EXPECT_EQ(fork(nobody, child), StepStatus::kInvalidChunk);
    EXPECT_EQ(child, (SequenceId{77, 77}));
    EXPECT_EQ(books.longest_chunk(nobody), 0);
    const SequenceChunk chunk{nobody, 500};
    EXPECT_EQ(books.missing_bytes({&chunk, 1}), 0U);
    books.release(nobody);
  }
  EXPECT_EQ(books.length(heir), 40);
  EXPECT_EQ(books.length(living), 30);
  EXPECT_EQ(used(), before);
}

TEST(Books, EveryPageHasAsManyHoldersAsEntriesNameItOnARandomWalk) {
  for (unsigned seed = 1; seed <= 4; ++seed) {
    // A pool that is often too small, so that refusals are part of the walk.
    CacheOptions options = options_of(6);
    options.max_bytes = 7 * slab_bytes_of(options);
    BooksOf own(options);
    Books& books = own.books;
    std::mt19937 random(seed);
    const auto below = [&](std::int64_t n) {
      return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
    };
    std::map<std::int32_t, std::pair<SequenceId, std::int64_t>> live;  // with its length
    const auto any = [&]() -> std::pair<SequenceId, std::int64_t>& {
      return std::next(live.begin(), below(static_cast<std::int64_t>(live.size())))->second;
    };
    std::map<StepStatus, int> answers;
    for (int op = 0; op < 3000; ++op) {
      const std::int64_t kind = below(16);
      if (live.empty() || (kind == 0 && live.size() < 6)) {
        const SequenceId id = own.add();
        live[id.index] = {id, 0};
      } else if (kind == 1) {
        const SequenceId id = any().first;
        books.release(id);
        live.erase(id.index);
      } else if (kind == 2) {
        auto& [id, length] = any();
        ASSERT_EQ(books.clear(id), StepStatus::kOk);
        length = 0;
      } else if (kind <= 4) {
        auto& [id, length] = any();
        const std::int64_t to = length - below(25);
        const StepStatus status = books.rollback(id, to);
        ++answers[status];
        if (status == StepStatus::kOk) length = to;
      } else if (kind <= 6) {
        const auto [id, length] = any();
        SequenceId child;
        const std::int64_t before = own.used();
        const StepStatus status = own.fork(id, child);
        ++answers[status];
        if (status == StepStatus::kOk) {
          ASSERT_EQ(books.length(child), length);
          ASSERT_EQ(own.used(), before + static_cast<std::int64_t>(own.copies.size()));
          live[child.index] = {child, length};
        } else {
          ASSERT_EQ(own.used(), before);
        }
      } else {
        std::vector<SequenceChunk> chunks;
        for (const auto& [index, sequence] : live) {
          if (below(3) != 0) chunks.push_back({sequence.first, below(2) != 0 ? 1 : below(80)});
        }
        const std::size_t missing = books.missing_bytes(chunks);
        const StepStatus status = books.begin(own.step, chunks);
        ++answers[status];
        if (status == StepStatus::kOutOfPages) {
          ASSERT_GT(missing, 0U);
        } else if (status == StepStatus::kOk) {
          ASSERT_EQ(missing, 0U);
          // Some leave while the step is open, whatever becomes of it.
          std::vector<SequenceId> leaving;
          for (const SequenceChunk& chunk : chunks) {
            if (below(8) == 0) leaving.push_back(chunk.sequence);
          }
          for (const SequenceId id : leaving) {
            books.release(id);
            live.erase(id.index);
          }
          if (below(4) == 0) {
            ASSERT_EQ(books.drop(own.step), StepStatus::kOk);
          } else {
            ASSERT_EQ(own.commit(), StepStatus::kOk);
            for (const SequenceChunk& chunk : chunks) {
              const auto found = live.find(chunk.sequence.index);
              if (found != live.end()) found->second.second += chunk.num_tokens;
            }
          }
        }
      }
      std::vector<SequenceId> ids;
      for (const auto& [index, sequence] : live) {
        ids.push_back(sequence.first);
        ASSERT_EQ(books.length(sequence.first), sequence.second);
      }
      if (op % 3 != 0) continue;
      ASSERT_NO_FATAL_FAILURE(expect_holders_counted(books, ids)) << "after " << op;
    }
    for (const StepStatus status : {StepStatus::kOk, StepStatus::kOutOfPages,
                                    StepStatus::kOutOfSequences, StepStatus::kTooFarBack}) {
      EXPECT_GT(answers[status], 0) << to_string(status);
    }
    EXPECT_EQ(answers[StepStatus::kOutOfTables], 0);
    for (const auto& [index, sequence] : live) books.release(sequence.first);
    EXPECT_EQ(own.used(), 0);
  }
}

TEST_F(BooksTest, AClearedSequenceIsAnEmptyOneUnderTheSameId) {
  const SequenceId id = add();
  ASSERT_EQ(advance(id, 300), StepStatus::kOk);
  ASSERT_EQ(advance(id, 100), StepStatus::kOk);  // rings are in their second bank by now
  EXPECT_EQ(books.clear(id), StepStatus::kOk);
  EXPECT_TRUE(books.is_live(id));
  EXPECT_EQ(books.length(id), 0);
  EXPECT_EQ(books.high_water(id), 0);
  EXPECT_EQ(used(), 0);
  for (std::size_t c = 0; c < books.geometry().classes().size(); ++c) {
    EXPECT_EQ(books.keep_state(id.index, c), AnyKeepState{});
  }
  EXPECT_EQ(books.clear(id), StepStatus::kOk);  // twice is once
  ASSERT_EQ(advance(id, 10), StepStatus::kOk);
  EXPECT_EQ(books.rollback(id, 9), StepStatus::kOk);
}

// Steps ------------------------------------------------------------------------------------------

TEST_F(BooksTest, BeginTakesPagesAndDropGivesThemBack) {
  const SequenceId id = add();
  ASSERT_EQ(begin({{id, 100}}), StepStatus::kOk);
  EXPECT_GT(used(), 0);
  EXPECT_EQ(books.length(id), 0);
  EXPECT_EQ(books.drop(step), StepStatus::kOk);
  EXPECT_EQ(used(), 0);
  EXPECT_EQ(books.drop(step), StepStatus::kStale);
}

TEST_F(BooksTest, RefuseInvalidChunksWithoutATrace) {
  const SequenceId a = add();
  const SequenceId b = add();
  EXPECT_EQ(begin({{a, 5}, {b, -1}}), StepStatus::kInvalidChunk);
  EXPECT_EQ(begin({{a, 5}, {b, 1}, {a, 1}}), StepStatus::kInvalidChunk);
  EXPECT_EQ(begin({{a, 5}, {b, 601}}), StepStatus::kContextTooLong);
  EXPECT_EQ(begin({{a, 5}, {b, std::numeric_limits<std::int64_t>::max()}}),
            StepStatus::kContextTooLong);
  EXPECT_EQ(used(), 0);
  EXPECT_FALSE(books.is_open(step));
  EXPECT_TRUE(step.chunks().empty());
  EXPECT_EQ(books.commit(step), StepStatus::kStale);
  EXPECT_EQ(begin({{a, 5}, {b, 1}}), StepStatus::kOk);  // neither is left pending
}

TEST(Books, RefuseChunksLongerThanMaxChunk) {
  CacheOptions options = options_of(2);
  options.max_chunk = 32;
  BooksOf own(options);
  const SequenceId a = own.add();
  const SequenceId b = own.add();
  EXPECT_EQ(own.begin({{a, 5}, {b, 33}}), StepStatus::kChunkTooLong);
  EXPECT_EQ(own.used(), 0);
  EXPECT_EQ(own.advance(b, 32), StepStatus::kOk);
  EXPECT_EQ(own.books.longest_chunk(b), 32);
  EXPECT_EQ(own.begin({{b, 569}}), StepStatus::kContextTooLong);
}

TEST_F(BooksTest, RowsFollowTheOrderOfTheChunksAndPhasesAreTheirOwn) {
  const SequenceId a = add();
  const SequenceId b = add();
  const SequenceId c = add();
  ASSERT_EQ(begin({{c, 3}, {a, 0, Phase::kDecode}, {b, 4, Phase::kDecode}}), StepStatus::kOk);
  ASSERT_EQ(step.chunks().size(), 3U);
  EXPECT_EQ(step.chunks()[0].sequence, c);
  EXPECT_EQ(step.chunks()[0].first_row, 0);
  EXPECT_EQ(step.chunks()[1].first_row, 3);
  EXPECT_EQ(step.chunks()[2].first_row, 3);
  EXPECT_EQ(step.num_rows(), 7);
  EXPECT_EQ(step.chunks()[0].phase, Phase::kPrompt);
  EXPECT_EQ(step.chunks()[1].phase, Phase::kDecode);
  EXPECT_EQ(step.chunks()[2].phase, Phase::kDecode);
}

TEST_F(BooksTest, OpenStepsWithoutTokens) {
  const SequenceId id = add();
  ASSERT_EQ(begin({}), StepStatus::kOk);
  EXPECT_EQ(books.commit(step), StepStatus::kOk);  // nothing to attend
  ASSERT_EQ(begin({{id, 0}}), StepStatus::kOk);
  EXPECT_EQ(books.commit(step), StepStatus::kOk);
  EXPECT_EQ(books.length(id), 0);
}

TEST_F(BooksTest, CommitACompleteStepOnce) {
  const SequenceId id = add();
  ASSERT_EQ(begin({{id, 7}}), StepStatus::kOk);
  for (int heads_done = 0; heads_done < 4; ++heads_done) {
    EXPECT_EQ(books.commit(step), StepStatus::kIncomplete) << heads_done;
    EXPECT_EQ(books.length(id), 0);
    step.note_head_done(heads_done / 2);
  }
  EXPECT_EQ(books.commit(step), StepStatus::kOk);
  EXPECT_EQ(books.length(id), 7);
  EXPECT_EQ(books.commit(step), StepStatus::kStale);
  EXPECT_EQ(books.length(id), 7);
}

TEST_F(BooksTest, HeadsOfOneLayerDoNotCompleteAnother) {
  const SequenceId id = add();
  ASSERT_EQ(begin({{id, 7}}), StepStatus::kOk);
  for (int i = 0; i < 4; ++i) step.note_head_done(0);
  EXPECT_EQ(books.commit(step), StepStatus::kIncomplete);
}

TEST_F(BooksTest, ALaterBeginMakesTheFormerStepStale) {
  const SequenceId a = add();
  const SequenceId b = add();
  Step first;
  const SequenceChunk chunk{a, 50};
  ASSERT_EQ(books.begin(first, {&chunk, 1}), StepStatus::kOk);
  attend_all(first);
  ASSERT_EQ(begin({{b, 20}}), StepStatus::kOk);
  EXPECT_EQ(books.commit(first), StepStatus::kStale);
  EXPECT_EQ(books.drop(first), StepStatus::kStale);
  EXPECT_TRUE(books.is_open(step));  // the stale calls have not closed it
  EXPECT_EQ(commit(), StepStatus::kOk);
  EXPECT_EQ(books.length(a), 0);
  EXPECT_EQ(books.length(b), 20);
  EXPECT_EQ(used(), held(b));
}

TEST_F(BooksTest, ARefusedBeginDropsTheOpenStepToo) {
  // Also when the refused begin reuses the open step's own object.
  const SequenceId id = add();
  ASSERT_EQ(begin({{id, 30}}), StepStatus::kOk);
  attend_all(step);
  ASSERT_EQ(begin({{id, 601}}), StepStatus::kContextTooLong);
  EXPECT_EQ(books.commit(step), StepStatus::kStale);
  EXPECT_EQ(used(), 0);
  EXPECT_EQ(books.length(id), 0);
}

TEST_F(BooksTest, ReleasingASequenceLeavesTheStepsOtherWork) {
  for (const bool commits : {true, false}) {
    for (const bool leaver_is_first : {true, false}) {
      const SequenceId a = add();
      const SequenceId b = add();
      ASSERT_EQ(advance(a, 140), StepStatus::kOk);
      ASSERT_EQ(advance(b, 140), StepStatus::kOk);
      const SequenceId leaver = leaver_is_first ? a : b;
      const SequenceId other = leaver_is_first ? b : a;
      ASSERT_EQ(begin({{a, 100}, {b, 70}}), StepStatus::kOk);
      const std::int64_t open = used();
      books.release(leaver);
      EXPECT_FALSE(books.is_live(leaver));
      EXPECT_EQ(books.length(leaver), 0);
      EXPECT_EQ(used(), open);  // the step's kernels may still read and write its pages
      EXPECT_TRUE(books.is_open(step));
      if (commits) {
        EXPECT_EQ(commit(), StepStatus::kOk);
        EXPECT_EQ(books.length(other), leaver_is_first ? 210 : 240);
      } else {
        EXPECT_EQ(books.drop(step), StepStatus::kOk);
        EXPECT_EQ(books.length(other), 140);
      }
      EXPECT_EQ(used(), held(other));
      ASSERT_NO_FATAL_FAILURE(expect_holders_counted(books, {other}));
      EXPECT_NE(add(), leaver);  // its place is free again, under another name
      ASSERT_EQ(advance(other, 1), StepStatus::kOk);
      books.release(other);
      for (std::int32_t i = 0; i < 4; ++i) {
        for (std::uint32_t generation = 0; generation < 20; ++generation) {
          books.release({i, generation});
        }
      }
      EXPECT_EQ(used(), 0);
    }
  }
}

TEST_F(BooksTest, APlaceIsNotFreeBeforeTheStepOfItsSequenceEnds) {
  std::vector<SequenceId> ids;
  for (int i = 0; i < 4; ++i) ids.push_back(add());
  ASSERT_EQ(begin({{ids[2], 5}}), StepStatus::kOk);
  books.release(ids[2]);
  EXPECT_EQ(books.add_sequence(), std::nullopt);
  books.release(ids[2]);  // again: it names nobody
  EXPECT_EQ(commit(), StepStatus::kOk);
  EXPECT_TRUE(books.add_sequence().has_value());
  EXPECT_EQ(books.add_sequence(), std::nullopt);
}

TEST_F(BooksTest, MembersOfTheOpenStepCannotBeRolledBackClearedOrForked) {
  const SequenceId id = add();
  ASSERT_EQ(advance(id, 40), StepStatus::kOk);
  ASSERT_EQ(begin({{id, 3}}), StepStatus::kOk);
  const std::int64_t open = used();
  SequenceId child;
  EXPECT_EQ(books.rollback(id, 39), StepStatus::kInStep);
  EXPECT_EQ(books.rollback(id, 0), StepStatus::kInStep);
  EXPECT_EQ(books.clear(id), StepStatus::kInStep);
  EXPECT_EQ(fork(id, child), StepStatus::kInStep);
  EXPECT_EQ(used(), open);
  EXPECT_EQ(commit(), StepStatus::kOk);
  EXPECT_EQ(books.length(id), 43);
  EXPECT_EQ(books.rollback(id, 39), StepStatus::kOk);
}

TEST_F(BooksTest, OtherSequencesMayComeAndGoWhileAStepIsOpen) {
  const SequenceId a = add();
  const SequenceId b = add();
  ASSERT_EQ(advance(b, 40), StepStatus::kOk);
  ASSERT_EQ(begin({{a, 30}}), StepStatus::kOk);
  EXPECT_EQ(books.rollback(b, 30), StepStatus::kOk);
  SequenceId child;
  EXPECT_EQ(fork(b, child), StepStatus::kOk);
  EXPECT_EQ(books.clear(b), StepStatus::kOk);
  books.release(b);
  (void)books.add_sequence();
  EXPECT_EQ(commit(), StepStatus::kOk);
  EXPECT_EQ(books.length(a), 30);
  EXPECT_EQ(books.length(child), 30);
  ASSERT_NO_FATAL_FAILURE(expect_holders_counted(books, {a, child}));
}

TEST_F(BooksTest, AStepOfOtherBooksIsStale) {
  BooksOf other(options_of(3));
  const SequenceId here = add();
  const SequenceId there = other.add();
  ASSERT_EQ(begin({{here, 5}}), StepStatus::kOk);
  attend_all(step);
  ASSERT_EQ(other.begin({{there, 5}}), StepStatus::kOk);
  EXPECT_EQ(other.books.commit(step), StepStatus::kStale);
  EXPECT_EQ(other.books.drop(step), StepStatus::kStale);
  EXPECT_EQ(books.commit(step), StepStatus::kOk);
}

TEST_F(BooksTest, AStepThatOtherBooksRefusedIsStaleHereAndCommitsNothing) {
  BooksOf other(options_of(3));
  const SequenceId here = add();
  ASSERT_EQ(begin({{here, 5}}), StepStatus::kOk);
  const SequenceChunk nobody{SequenceId{}, 5};
  ASSERT_EQ(other.books.begin(step, {&nobody, 1}), StepStatus::kInvalidChunk);
  EXPECT_FALSE(books.is_open(step));
  EXPECT_EQ(books.commit(step), StepStatus::kStale) << "no layer was attended";
  EXPECT_EQ(books.length(here), 0);
  EXPECT_EQ(advance(here, 5), StepStatus::kOk);
}

TEST(Books, AStepOfFormerBooksAtTheSameAddressIsStale) {
  std::optional<Books> books;
  books.emplace(geometry_of(options_of(1)), nullptr, false);
  Step old;
  const SequenceChunk chunk{books->add_sequence().value(), 5};
  ASSERT_EQ(books->begin(old, {&chunk, 1}), StepStatus::kOk);
  attend_all(old);
  books.emplace(geometry_of(options_of(1)), nullptr, false);
  (void)books->add_sequence();
  EXPECT_EQ(books->commit(old), StepStatus::kStale);
  Step current;
  ASSERT_EQ(books->begin(current, {&chunk, 1}), StepStatus::kOk);
  EXPECT_EQ(books->commit(old), StepStatus::kStale);
  EXPECT_EQ(books->drop(old), StepStatus::kStale);
}

TEST_F(BooksTest, TheStepObjectMayGoBeforeItsPagesDo) {
  const SequenceId id = add();
  {
    Step brief;
    const SequenceChunk chunk{id, 90};
    ASSERT_EQ(books.begin(brief, {&chunk, 1}), StepStatus::kOk);
  }
  ASSERT_EQ(begin({}), StepStatus::kOk);
  EXPECT_EQ(used(), 0);
}

// Rollback ---------------------------------------------------------------------------------------

TEST_F(BooksTest, RollBackToHighWaterLessMaxRollbackAndNoFurther) {
  const SequenceId id = add();
  ASSERT_EQ(advance(id, 50), StepStatus::kOk);
  EXPECT_EQ(books.rollback(id, 51), StepStatus::kTooFarBack);
  EXPECT_EQ(books.rollback(id, 29), StepStatus::kTooFarBack);
  EXPECT_EQ(books.rollback(id, 40), StepStatus::kOk);
  EXPECT_EQ(books.rollback(id, 45), StepStatus::kTooFarBack);  // forward
  EXPECT_EQ(books.high_water(id), 50);
  EXPECT_EQ(books.rollback(id, 29), StepStatus::kTooFarBack);  // from the high water, not from 40
  EXPECT_EQ(books.rollback(id, 30), StepStatus::kOk);
  ASSERT_EQ(advance(id, 5), StepStatus::kOk);
  EXPECT_EQ(books.high_water(id), 50);
  EXPECT_EQ(books.rollback(id, 29), StepStatus::kTooFarBack);
  EXPECT_EQ(books.rollback(id, 35), StepStatus::kOk);
  EXPECT_EQ(books.rollback(id, -1), StepStatus::kTooFarBack);
  EXPECT_EQ(books.length(id), 35);
}

TEST_F(BooksTest, RollbackToNothingIsAClearHoweverFarItIs) {
  const SequenceId id = add();
  ASSERT_EQ(advance(id, 500), StepStatus::kOk);
  EXPECT_EQ(books.rollback(id, 1), StepStatus::kTooFarBack);
  EXPECT_EQ(books.rollback(id, 0), StepStatus::kOk);
  EXPECT_EQ(books.high_water(id), 0);
  EXPECT_EQ(used(), 0);
}

// Fork -------------------------------------------------------------------------------------------

TEST_F(BooksTest, AForkSharesFrozenPagesAndCopiesTheOthers) {
  const SequenceId id = add();
  ASSERT_EQ(advance(id, 200), StepStatus::kOk);
  SequenceId child;
  ASSERT_EQ(fork(id, child), StepStatus::kOk);
  EXPECT_EQ(books.length(child), 200);
  EXPECT_EQ(books.high_water(child), 200);
  // Retrieval: pages below (200 - 20) / 16 = 11 are shared, 2 copied. Rings of (4 + 20 + 20) and
  // (17 + 33 + 20) rows: 3 and 5 copied. Growing: 180 - max(24, 60) = 120, page 7; of the sink's
  // page and 7 to 12 it shares those below 11, and copies 2.
  EXPECT_EQ(copies.size(), 2U + 3 + 5 + 2);
  EXPECT_EQ(used(), held(id) + 12);
  for (const PageCopy& copy : copies) {
    EXPECT_NE(copy.from, copy.to);
    EXPECT_EQ(books.pool().num_holders(copy.from), 1);
    EXPECT_EQ(books.pool().num_holders(copy.to), 1);
  }
  ASSERT_NO_FATAL_FAILURE(expect_holders_counted(books, {id, child}));
}

TEST_F(BooksTest, AForkTakesAllItsPagesOrNone) {
  const SequenceId id = add();
  ASSERT_EQ(advance(id, 200), StepStatus::kOk);
  const std::int64_t before = used();
  ASSERT_EQ(begin({{add(), 1}}), StepStatus::kOk);  // some of each size
  ASSERT_EQ(books.drop(step), StepStatus::kOk);
  // The smallest pool in which the fork succeeds, and the one with a slab less.
  for (std::size_t slabs = 4;; ++slabs) {
    ASSERT_LT(slabs, 40U);
    CacheOptions options = options_of(3);
    options.max_bytes = slabs * books.geometry().pool().slab_bytes();
    BooksOf own(options);
    const SequenceId parent = own.add();
    if (own.advance(parent, 200) != StepStatus::kOk) continue;
    ASSERT_EQ(own.used(), before);
    SequenceId child{5, 5};
    const StepStatus status = own.fork(parent, child);
    if (status == StepStatus::kOk) break;
    ASSERT_EQ(status, StepStatus::kOutOfPages);
    EXPECT_EQ(own.used(), before);
    EXPECT_EQ(child, (SequenceId{5, 5}));
    EXPECT_TRUE(own.copies.empty());
    EXPECT_EQ(own.books.rollback(parent, 190), StepStatus::kOk);
    ASSERT_NO_FATAL_FAILURE(expect_holders_counted(own.books, {parent}));
    EXPECT_TRUE(own.books.add_sequence().has_value());  // both places are still there
    EXPECT_TRUE(own.books.add_sequence().has_value());
  }
}

TEST_F(BooksTest, AForkWithoutAFreePlaceIsRefused) {
  const SequenceId id = add();
  ASSERT_EQ(advance(id, 20), StepStatus::kOk);
  for (int i = 0; i < 3; ++i) (void)add();
  const std::int64_t before = used();
  SequenceId child;
  EXPECT_EQ(fork(id, child), StepStatus::kOutOfSequences);
  EXPECT_EQ(used(), before);
}

TEST_F(BooksTest, AnEmptySequenceForksIntoAnEmptyOne) {
  const SequenceId id = add();
  SequenceId child;
  ASSERT_EQ(fork(id, child), StepStatus::kOk);
  EXPECT_TRUE(copies.empty());
  EXPECT_EQ(books.length(child), 0);
  EXPECT_EQ(advance(child, 30), StepStatus::kOk);
  EXPECT_EQ(books.length(id), 0);
}

// Pages ------------------------------------------------------------------------------------------

TEST(Books, SayExactlyHowManyBytesAStepLacks) {
  std::mt19937 random(41);
  const auto below = [&](std::int64_t n) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
  };
  int begun = 0;
  int refused = 0;
  for (int round = 0; round < 60; ++round) {
    CacheOptions options = options_of(3);
    options.max_bytes = static_cast<std::size_t>(3 + below(12)) * slab_bytes_of(options);
    BooksOf own(options);
    std::vector<SequenceId> ids{own.add(), own.add(), own.add()};
    for (int i = 0; i < 40; ++i) {
      std::vector<SequenceChunk> chunks;
      for (const SequenceId id : ids) {
        if (below(3) == 0) continue;
        chunks.push_back(
            {id, below(2) == 0 ? below(4)
                               : below(std::min<std::int64_t>(200, 601 - own.books.length(id)))});
        chunks.back().num_tokens = std::min(chunks.back().num_tokens, 600 - own.books.length(id));
      }
      const std::size_t missing = own.books.missing_bytes(chunks);
      const StepStatus status = own.books.begin(own.step, chunks);
      ASSERT_EQ(status, missing == 0 ? StepStatus::kOk : StepStatus::kOutOfPages);
      if (status == StepStatus::kOk) {
        ++begun;
        ASSERT_EQ(own.commit(), StepStatus::kOk);
        continue;
      }
      ++refused;
      if (below(2) == 0) {
        const SequenceId id = ids[static_cast<std::size_t>(below(3))];
        ASSERT_EQ(own.books.clear(id), StepStatus::kOk);
      }
    }
  }
  EXPECT_GT(begun, 200);
  EXPECT_GT(refused, 200);
}

TEST(Books, APoolThatIsLargerByWhatWasMissingBeginsTheStep) {
  const SequenceChunk chunk{SequenceId{0, 0}, 500};
  const auto grown_to = [&](std::size_t bytes, std::size_t& missing) {
    CacheOptions options = options_of(1);
    options.max_bytes = bytes;
    BooksOf own(options);
    EXPECT_EQ(own.add(), chunk.sequence);
    EXPECT_EQ(own.advance(chunk.sequence, 60), StepStatus::kOk);
    missing = own.books.missing_bytes({&chunk, 1});
    return own.books.begin(own.step, {&chunk, 1});
  };
  const std::size_t slab = slab_bytes_of(options_of(1));
  std::size_t missing = 0;
  ASSERT_EQ(grown_to(3 * slab, missing), StepStatus::kOutOfPages);
  ASSERT_GT(missing, slab);
  const std::size_t enough = 3 * slab + missing;
  EXPECT_EQ(grown_to(enough, missing), StepStatus::kOk);
  EXPECT_EQ(grown_to(enough - slab, missing), StepStatus::kOutOfPages);
  EXPECT_EQ(missing, slab);
}

TEST(Books, WhatIsMissingForAChunkBeyondTheContextIsThatOfTheContext) {
  CacheOptions options = options_of(1);
  options.max_bytes = 3 * slab_bytes_of(options);
  BooksOf own(options);
  const SequenceId id = own.add();
  ASSERT_EQ(own.advance(id, 60), StepStatus::kOk);
  const auto missing = [&](std::int64_t tokens) {
    const SequenceChunk chunk{id, tokens};
    return own.books.missing_bytes({&chunk, 1});
  };
  EXPECT_GT(missing(540), 0U);
  EXPECT_EQ(missing(541), missing(540));
  EXPECT_EQ(missing(std::numeric_limits<std::int64_t>::max()), missing(540));
  EXPECT_EQ(missing(-1), 0U);
}

TEST(Books, TheLongestChunkBeginsAndOneTokenMoreDoesNot) {
  std::mt19937 random(43);
  int bounded_by_pages = 0;
  for (int round = 0; round < 80; ++round) {
    CacheOptions options = options_of(2);
    options.max_chunk = round % 2 == 0 ? 0 : 90;
    options.max_bytes = (3 + random() % 8) * slab_bytes_of(options);
    BooksOf own(options);
    const SequenceId ids[] = {own.add(), own.add()};
    for (int i = 0; i < 12; ++i) {
      const SequenceId id = ids[random() % 2];
      const std::int64_t length = own.books.length(id);
      const std::int64_t longest = own.books.longest_chunk(id);
      ASSERT_GE(longest, 0);
      ASSERT_EQ(own.begin({{id, longest}}), StepStatus::kOk);
      ASSERT_EQ(own.books.drop(own.step), StepStatus::kOk);
      const StepStatus longer = own.begin({{id, longest + 1}});
      if (length + longest == 600) {
        ASSERT_EQ(longer, StepStatus::kContextTooLong);
      } else if (options.max_chunk != 0 && longest == 90) {
        ASSERT_EQ(longer, StepStatus::kChunkTooLong);
      } else {
        ASSERT_EQ(longer, StepStatus::kOutOfPages);
        ++bounded_by_pages;
      }
      const auto count =
          static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(longest / 3 + 1));
      ASSERT_EQ(own.advance(id, count), StepStatus::kOk);
    }
  }
  EXPECT_GT(bounded_by_pages, 100);
}

TEST(Books, APoolForDecodeTakesLongerChunksAsFarAsItHasPages) {
  // Pages for every sequence at its longest, one token a step. Longer chunks take their second
  // rings from what the others have not needed yet.
  HeadPlan windows(shape(), KeepWindow{{4, 60}});
  windows.set(1, 1, KeepWindow{{4, 150}});
  for (const HeadPlan& heads : {plan(), windows}) {
    CacheOptions options = options_of(9);
    const CacheGeometry geometry(shape(), heads, options, page_bytes);
    options.max_bytes =
        static_cast<std::size_t>(geometry.slabs_for_steps_of(1)) * geometry.pool().slab_bytes();
    std::mt19937 random(47);
    for (int round = 0; round < 20; ++round) {
      Books books(CacheGeometry(shape(), heads, options, page_bytes), nullptr, false);
      Step step;
      std::vector<SequenceId> ids;
      for (int i = 0; i < 9; ++i) ids.push_back(books.add_sequence().value());
      while (!ids.empty()) {
        const std::size_t i = random() % ids.size();
        if (books.length(ids[i]) == 600) {
          ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(i));
          continue;
        }
        const std::int64_t longest = books.longest_chunk(ids[i]);
        ASSERT_GE(longest, 1) << "at " << books.length(ids[i]) << " of round " << round;
        const auto tokens =
            static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(longest)) + 1;
        const SequenceChunk chunk{ids[i], std::min<std::int64_t>(tokens, 130)};
        ASSERT_EQ(books.begin(step, {&chunk, 1}), StepStatus::kOk);
        attend_all(step);
        ASSERT_EQ(books.commit(step), StepStatus::kOk);
        if (random() % 40 == 0) {
          ASSERT_EQ(books.clear(ids[i]), StepStatus::kOk);
        }
      }
    }
  }
}

TEST(Books, RunOutOfPagesAllOrNothing) {
  const std::size_t slab = slab_bytes_of(options_of(2));
  int refused = 0;
  for (std::size_t slabs = 2;; ++slabs) {
    CacheOptions options = options_of(2);
    options.max_bytes = slabs * slab;
    BooksOf own(options);
    const SequenceId a = own.add();
    const SequenceId b = own.add();
    if (own.begin({{a, 33}, {b, 40}}) != StepStatus::kOk) continue;
    ASSERT_EQ(own.commit(), StepStatus::kOk);
    const std::int64_t before = own.used();
    const StepStatus status = own.begin({{a, 300}});
    if (status == StepStatus::kOk) break;
    ++refused;
    EXPECT_EQ(status, StepStatus::kOutOfPages);
    EXPECT_EQ(own.used(), before);
    EXPECT_EQ(own.books.length(a), 33);
    EXPECT_FALSE(own.books.is_open(own.step));
    ASSERT_NO_FATAL_FAILURE(expect_holders_counted(own.books, {a, b}));
    own.books.release(b);  // its pages serve the other at once
    EXPECT_EQ(own.used(), own.held(a));
  }
  EXPECT_GT(refused, 1);
}

TEST(Books, RunOutOfTablesAllOrNothing) {
  // Many long forks: pages are shared, tables are not.
  CacheOptions options = options_of(64);
  options.max_context = 400'000;
  options.max_bytes = 800 * slab_bytes_of(options);
  BooksOf own(options);
  const SequenceId id = own.add();
  ASSERT_EQ(own.advance(id, 100'000), StepStatus::kOk);
  std::vector<SequenceId> live{id};
  StepStatus status = StepStatus::kOk;
  std::int64_t before = 0;
  while (status == StepStatus::kOk) {
    before = own.used();
    SequenceId child{9, 9};
    status = own.fork(id, child);
    if (status == StepStatus::kOk) {
      live.push_back(child);
    } else {
      EXPECT_EQ(child, (SequenceId{9, 9}));
    }
  }
  ASSERT_EQ(status, StepStatus::kOutOfTables);
  EXPECT_EQ(own.used(), before);
  EXPECT_GT(live.size(), 3U);
  ASSERT_NO_FATAL_FAILURE(expect_holders_counted(own.books, live));
  own.books.release(live.back());
  SequenceId child;
  EXPECT_EQ(own.fork(id, child), StepStatus::kOk);
}

TEST(Books, TablesNeverRunOutBeforePagesWithoutForks) {
  std::mt19937 random(53);
  CacheOptions options = options_of(24);
  options.max_context = 100'000;
  options.max_bytes = 80 * slab_bytes_of(options);
  ASSERT_GT(geometry_of(options).tables(true).levels.size(), 1U);
  BooksOf own(options);
  std::vector<SequenceId> live;
  int refused = 0;
  for (int op = 0; op < 6000; ++op) {
    if (live.size() < 24 && random() % 4 == 0) live.push_back(own.add());
    if (live.empty()) continue;
    const std::size_t i = random() % live.size();
    if (random() % 12 == 0) {
      own.books.release(live[i]);
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(i));
      continue;
    }
    const auto tokens =
        static_cast<std::int64_t>(random() % 20 == 0 ? random() % 20'000 : random() % 300);
    const StepStatus status = own.begin({{live[i], tokens}});
    ASSERT_NE(status, StepStatus::kOutOfTables) << "after " << op;
    if (status == StepStatus::kOk) {
      ASSERT_EQ(own.commit(), StepStatus::kOk);
    } else if (status == StepStatus::kOutOfPages) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 50);
}

TEST(Books, TablesNeverRunOutBeforePagesWithCheckpoints) {
  for (const std::int64_t tokens : {40, 500, 3000}) {
    SCOPED_TRACE(tokens);
    CacheOptions options = options_of(3);
    options.max_context = 1'000'000;
    options.max_bytes = 400 * slab_bytes_of(options);
    options.checkpoint_tokens = tokens;
    ASSERT_GT(geometry_of(options).tables(true).levels.size(), 1U);
    BooksOf own(options);
    const SequenceId a = own.add();  // alone at first, later one of three
    const SequenceId b = own.add();
    const SequenceId c = own.add();
    StepStatus status = StepStatus::kOk;
    for (int op = 0; status == StepStatus::kOk; ++op) {
      const SequenceId id = op < 100 ? a : op < 150 ? b : op % 2 == 0 ? a : c;
      status = own.begin({{id, 40}});
      if (status == StepStatus::kOk) {
        ASSERT_EQ(own.commit(), StepStatus::kOk);
      }
    }
    EXPECT_EQ(status, StepStatus::kOutOfPages) << to_string(status);
    EXPECT_GT(own.books.length(a), 4000);
  }
}

TEST(Books, StepsThatCameToNothingLeaveTheTablesToOthers) {
  CacheOptions options = options_of(64);
  options.max_context = 400'000;
  options.max_bytes = 800 * slab_bytes_of(options);
  BooksOf own(options);
  std::vector<SequenceId> ids;
  for (int i = 0; i < 64; ++i) {
    ids.push_back(own.add());
    if (i % 2 == 0) {
      ASSERT_EQ(own.advance(ids.back(), 100), StepStatus::kOk);
    }
    ASSERT_EQ(own.begin({{ids.back(), 50'000}}), StepStatus::kOk) << "sequence " << i;
    if (i % 3 != 0) {
      ASSERT_EQ(own.books.drop(own.step), StepStatus::kOk);
    }  // else the next begin drops it
  }
  (void)own.begin({});
  ASSERT_NO_FATAL_FAILURE(expect_holders_counted(own.books, ids));
}

TEST(Books, AStepWithoutTablesLeavesThoseOfItsSequencesAsTheyWere) {
  // One of the two has room for long tables, not both: many forks hold the others.
  CacheOptions options = options_of(64);
  options.max_context = 400'000;
  options.max_bytes = 800 * slab_bytes_of(options);
  BooksOf own(options);
  const SequenceId a = own.add();
  const SequenceId b = own.add();
  const SequenceId parent = own.add();
  ASSERT_EQ(own.advance(parent, 33'000), StepStatus::kOk);
  SequenceId child;
  SequenceId last;
  while (own.fork(parent, child) == StepStatus::kOk) last = child;
  own.books.release(last);
  ASSERT_EQ(own.begin({{a, 33'000}, {b, 33'000}}), StepStatus::kOutOfTables);
  EXPECT_FALSE(own.books.tables().has_block(a.index));
  EXPECT_EQ(own.fork(parent, child), StepStatus::kOk);
}

TEST(Books, ASequenceGrowsToTheLongestContextWhateverItsHeadsKeep) {
  // Tables of a growing window are as long as the context, its pages few.
  HeadPlan windows(shape(), KeepGrowingWindow{4, 24, 1000});
  windows.set(0, 0, KeepWindow{{4, 20}});
  for (const int sequences : {1, 5}) {
    CacheOptions options = options_of(sequences);
    options.max_context = 300'000;
    options.max_chunk = 700;
    Books books(CacheGeometry(shape(), windows, options, page_bytes), nullptr, false);
    std::vector<SequenceId> ids;
    for (int i = 0; i < sequences; ++i) ids.push_back(books.add_sequence().value());
    Step step;
    while (books.length(ids.back()) < options.max_context) {
      for (const SequenceId id : ids) {
        const SequenceChunk chunk{
            id, std::min(options.max_chunk, options.max_context - books.length(id))};
        ASSERT_EQ(books.begin(step, {&chunk, 1}), StepStatus::kOk) << books.length(id);
        attend_all(step);
        ASSERT_EQ(books.commit(step), StepStatus::kOk);
      }
    }
  }
}

TEST(Books, ErrorsNameThePoolsLimits) {
  CacheOptions options = options_of(1);
  const std::size_t slab = slab_bytes_of(options);
  options.max_bytes = slab - 1;
  EXPECT_THAT([&] { BooksOf{options}; },
              ThrowsMessage<ConfigError>(
                  AllOf(HasSubstr(std::to_string(slab - 1)), HasSubstr(std::to_string(slab)))));
  options.max_bytes = 0;
  options.max_context = std::int64_t{1} << 36;  // 2^32 pages for every head that grows
  EXPECT_THAT([&] { BooksOf{options}; }, ThrowsMessage<ConfigError>(HasSubstr("2^31 - 1")));
}

TEST(Books, CountTokensBeyond32Bits) {
  // Streaming heads only, so that the tables stay small; no rows are stored.
  const HeadPlan streaming(shape(), KeepWindow{{4, 20}});
  CacheOptions options = options_of(1);
  options.max_context = std::int64_t{1} << 40;
  Books books(CacheGeometry(shape(), streaming, options, page_bytes), nullptr, false);
  const SequenceId id = books.add_sequence().value();
  Step step;
  for (const std::int64_t tokens : {std::int64_t{1} << 33, std::int64_t{1} << 39}) {
    const SequenceChunk chunk{id, tokens};
    ASSERT_EQ(books.begin(step, {&chunk, 1}), StepStatus::kOk);
    attend_all(step);
    ASSERT_EQ(books.commit(step), StepStatus::kOk);
  }
  EXPECT_EQ(books.length(id), (std::int64_t{1} << 33) + (std::int64_t{1} << 39));
  EXPECT_EQ(books.pool().num_used(), 4 * 3);  // 4 + 20 + 20 rows
  EXPECT_EQ(books.rollback(id, books.length(id) - 20), StepStatus::kOk);
}

TEST(Books, PagesOfTheHostArePoisonedInHardenedBuildsAndNeverElsewhere) {
  const CacheOptions options = options_of(1);
  std::vector<std::byte> memory(geometry_of(options).pool_bytes(), std::byte{1});
  Books books(geometry_of(options), memory.data(), true);
  EXPECT_EQ(books.pool().memory(), memory.data());
  Step step;
  const SequenceChunk chunk{books.add_sequence().value(), 5};
  ASSERT_EQ(books.begin(step, {&chunk, 1}), StepStatus::kOk);
  EXPECT_EQ(memory[0], HEADWISE_HARDENED ? std::byte{0xFF} : std::byte{1});
}

}  // namespace
}  // namespace headwise
