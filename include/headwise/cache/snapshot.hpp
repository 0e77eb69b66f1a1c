// SPDX-License-Identifier: MIT
/// @file snapshot.hpp
/// The bytes of a sequence outside of its cache: their layout, and what is believed of them.
///
/// All numbers are little-endian. A snapshot of version 1:
///
/// | offset | bytes | what |
/// |---|---|---|
/// | 0 | 8 | "headwise" |
/// | 8 | 4 | version: 1 |
/// | 12 | 4 | byte order: 0x01020304 |
/// | 16 | 8 | bytes of the whole snapshot |
/// | 24 | 8 | checksum of the head: of bytes [32, H), with 32 zeros after byte 63 |
/// | 32 | 8 | checksum of the body: of bytes [H, end) |
/// | 40 | 16 | fingerprint of the plan, low word first |
/// | 56 | 24 | 0 |
/// | 80 | 4 | page_tokens |
/// | 84 | 4 | layers L |
/// | 88 | 8 | max_rollback |
/// | 96 | 8 | length |
/// | 104 | 8 | high water |
/// | 112 | 4 | classes of heads C |
/// | 116 | 4 | 0 |
/// | 120 | 8 | bytes of compensation rows S |
/// | 128 | 24 L | of each layer, see below |
/// | | 64 C | of each class, see below |
/// | | | zeros up to H, the next multiple of 64: here ends the head |
/// | H | S | compensation rows, as CacheGeometry counts them |
/// | | | zeros up to the next multiple of 64 |
/// | | | pages, whole: class by class, range by range of KeepRule::held(), head by head |
///
/// A layer: KV heads, k_dim, v_dim, the layer whose K and V it reads or -1 (4 bytes each), the
/// model's own sliding window (8). A class: what its keep rule remembers, KeepRule::to_word() (8),
/// and the name of its row format, zeros behind it (56). Checksums are core/checksum.hpp's.
///
/// There is none of a sequence from which a selection has dropped rows: what each of its heads has
/// left is not among the above.
///
/// Nothing in it depends on the cache's capacity. Rows of a page that the sequence has not written
/// are encoded zeros: no other sequence's rows leave the cache.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "headwise/cache/geometry.hpp"
#include "headwise/cache/keep/keep.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checksum.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/fingerprint.hpp"

namespace headwise::inline v0 {

/// What a snapshot says of its sequence.
struct SnapshotSequence {
  std::int64_t length = 0;           ///< tokens
  std::int64_t high_water = 0;       ///< the longest it ever was
  std::vector<AnyKeepState> states;  ///< [classes]
};

/// The head of a cache's snapshots: what there is to say of cache and sequence before the rows.
class SnapshotHead {
 public:
  /// @param formats  RowFormat::name() of each of the cache's formats.
  SnapshotHead(const CacheGeometry& geometry, std::vector<std::string_view> formats)
      : geometry_(geometry), formats_(std::move(formats)) {}

  /// Bytes of the head, H.
  std::size_t num_bytes() const {
    return padded(states_at() + kClass * geometry_.classes().size());
  }
  /// Where the first page lies.
  std::size_t first_page() const { return num_bytes() + padded(geometry_.compensation_bytes()); }
  /// Bytes of a whole snapshot.
  std::size_t snapshot_bytes(std::int64_t length, std::int64_t high_water,
                             std::span<const AnyKeepState> states) const {
    std::size_t bytes = first_page();
    for (std::size_t c = 0; c < states.size(); ++c) {
      const HeadClass& heads = geometry_.classes()[c];
      for (const EntryRange range : heads.rule.held(states[c], length, high_water)) {
        bytes += static_cast<std::size_t>(heads.num_heads * range.count()) *
                 geometry_.pool().page_bytes(heads.page_size);
      }
    }
    return bytes;
  }

  /// Writes the head; the body is there already.
  /// @param to  the whole snapshot.
  void write(std::span<std::byte> to, std::int64_t length, std::int64_t high_water,
             std::span<const AnyKeepState> states, std::uint64_t body_checksum) const {
    std::memset(to.data(), 0, num_bytes());
    std::memcpy(to.data(), kMagic.data(), kMagic.size());
    put<std::uint32_t>(to, 8, kVersion);
    put<std::uint32_t>(to, 12, kByteOrder);
    put<std::uint64_t>(to, 16, to.size());
    put<std::uint64_t>(to, 32, body_checksum);
    put<std::uint64_t>(to, 40, geometry_.fingerprint().low);
    put<std::uint64_t>(to, 48, geometry_.fingerprint().high);
    put<std::uint32_t>(to, 80, static_cast<std::uint32_t>(geometry_.options().page_tokens));
    put<std::uint32_t>(to, 84, static_cast<std::uint32_t>(geometry_.layers().size()));
    put<std::int64_t>(to, 88, geometry_.options().max_rollback);
    put<std::int64_t>(to, 96, length);
    put<std::int64_t>(to, 104, high_water);
    put<std::uint32_t>(to, 112, static_cast<std::uint32_t>(geometry_.classes().size()));
    put<std::uint64_t>(to, 120, geometry_.compensation_bytes());
    std::size_t at = kLayers;
    for (const LayerGeometry& layer : geometry_.layers()) {
      put<std::int32_t>(to, at, layer.shape.num_kv_heads);
      put<std::int32_t>(to, at + 4, layer.shape.k_dim);
      put<std::int32_t>(to, at + 8, layer.shape.v_dim);
      put<std::int32_t>(to, at + 12, layer.shape.kv_layer);
      put<std::int64_t>(to, at + 16, layer.shape.sliding_window);
      at += kLayer;
    }
    for (std::size_t c = 0; c < states.size(); ++c, at += kClass) {
      const std::string_view format = format_of(c);
      std::memcpy(to.data() + at + 8, format.data(), format.size());
      put<std::uint64_t>(to, at, geometry_.classes()[c].rule.to_word(states[c]));
    }
    put<std::uint64_t>(to, 24, checksum(to));
  }

  /// What a snapshot says, all of it checked but the body's checksum. What it was made with is
  /// compared first, so that an error names the difference and both values.
  /// @throws FormatError for what is no snapshot of this cache's shape, row format, plan,
  ///   page_tokens and max_rollback, or is damaged.
  SnapshotSequence read(std::span<const std::byte> from) const {
    check_stream(from);
    check_cache(from);
    if (get<std::uint64_t>(from, 24) != checksum(from)) {
      fail<FormatError>("snapshot: the checksum of its head is wrong: it is damaged");
    }
    SnapshotSequence sequence;
    sequence.length = get<std::int64_t>(from, 96);
    sequence.high_water = get<std::int64_t>(from, 104);
    check_lengths(sequence);
    std::size_t at = states_at();
    for (const HeadClass& heads : geometry_.classes()) {
      sequence.states.push_back(state_of(heads, get<std::uint64_t>(from, at), sequence));
      at += kClass;
    }
    // A sequence longer than this cache's is somebody's good snapshot: the cache says so.
    if (sequence.high_water <= geometry_.options().max_context) {
      check_same("bytes", from.size(),
                 snapshot_bytes(sequence.length, sequence.high_water, sequence.states));
    }
    return sequence;
  }
  /// The checksum that the body must have.
  static std::uint64_t body_checksum(std::span<const std::byte> from) {
    return get<std::uint64_t>(from, 32);
  }

 private:
  static constexpr std::string_view kMagic = "headwise";
  static constexpr std::uint32_t kVersion = 1;
  static constexpr std::uint32_t kByteOrder = 0x01020304U;
  static constexpr std::uint32_t kOtherByteOrder = 0x04030201U;
  static constexpr std::size_t kLayer = 24;  // bytes of a layer
  static constexpr std::size_t kClass = 64;  // bytes of a class
  static constexpr std::size_t kLayers = 128;

  static std::size_t padded(std::size_t bytes) {
    return (bytes + Checksum::kBlock - 1) / Checksum::kBlock * Checksum::kBlock;
  }
  std::size_t states_at() const { return kLayers + kLayer * geometry_.layers().size(); }
  std::string_view format_of(std::size_t c) const {
    const auto format = static_cast<std::size_t>(geometry_.classes()[c].format);
    return formats_[format].substr(0, kClass - 8);
  }
  template <class T>
  static void put(std::span<std::byte> to, std::size_t at, T value) {
    std::memcpy(to.data() + at, &value, sizeof value);
  }
  template <class T>
  static T get(std::span<const std::byte> from, std::size_t at) {
    T value;
    std::memcpy(&value, from.data() + at, sizeof value);
    return value;
  }
  /// @pre `all` has at least the head.
  std::uint64_t checksum(std::span<const std::byte> all) const {
    Checksum sum;
    std::array<std::byte, Checksum::kBlock> first{};  // bytes [32, 64), then zeros
    std::memcpy(first.data(), all.data() + 32, 32);
    sum.add(first);
    sum.add(all.subspan(Checksum::kBlock, num_bytes() - Checksum::kBlock));
    return sum.value();
  }
  template <class Number>
  static void check_same(std::string_view what, Number snapshot, Number cache) {
    if (snapshot != cache) {
      fail<FormatError>("snapshot: ", what, ": ", snapshot, " in the snapshot, ", cache,
                        " in the cache");
    }
  }

  static void check_stream(std::span<const std::byte> from) {
    if (from.size() < kLayers) {
      fail<FormatError>("snapshot: it has at least ", kLayers, " bytes, got ", from.size());
    }
    if (std::memcmp(from.data(), kMagic.data(), kMagic.size()) != 0) {
      fail<FormatError>("snapshot: it does not begin with \"", kMagic, "\"");
    }
    const auto order = get<std::uint32_t>(from, 12);
    if (order == kOtherByteOrder) fail<FormatError>("snapshot: its byte order is big-endian");
    if (order != kByteOrder) fail<FormatError>("snapshot: its byte order mark is ", order);
    if (const auto version = get<std::uint32_t>(from, 8); version != kVersion) {
      fail<FormatError>("snapshot: version ", version, ", readable is ", kVersion);
    }
    if (const auto bytes = get<std::uint64_t>(from, 16); bytes != from.size()) {
      fail<FormatError>("snapshot: it has ", bytes, " bytes, given are ", from.size());
    }
  }

  void check_cache(std::span<const std::byte> from) const {
    check_same("layers", std::size_t{get<std::uint32_t>(from, 84)}, geometry_.layers().size());
    if (from.size() < kLayers + kLayer * geometry_.layers().size()) {
      fail<FormatError>("snapshot: it ends within its layers, after ", from.size(), " bytes");
    }
    for (std::size_t l = 0; l < geometry_.layers().size(); ++l) {
      const LayerShape& shape = geometry_.layers()[l].shape;
      const std::array<int, 4> own{shape.num_kv_heads, shape.k_dim, shape.v_dim, shape.kv_layer};
      const std::array<const char*, 4> names{"KV heads", "k_dim", "v_dim", "kv_layer"};
      for (std::size_t i = 0; i < own.size(); ++i) {
        const int value = get<std::int32_t>(from, kLayers + kLayer * l + 4 * i);
        if (value != own[i]) {
          fail<FormatError>("snapshot: layer ", l, ": ", value, " ", names[i], " in the snapshot, ",
                            own[i], " in the cache");
        }
      }
      check_same("sliding window", get<std::int64_t>(from, kLayers + kLayer * l + 16),
                 shape.sliding_window);
    }
    const Fingerprint plan{get<std::uint64_t>(from, 48), get<std::uint64_t>(from, 40)};
    if (plan != geometry_.fingerprint()) {
      fail<FormatError>("snapshot: plan ", plan.to_string(), " in the snapshot, ",
                        geometry_.fingerprint().to_string(), " in the cache");
    }
    check_same("page_tokens", std::int64_t{get<std::uint32_t>(from, 80)},
               std::int64_t{geometry_.options().page_tokens});
    check_same("max_rollback", get<std::int64_t>(from, 88), geometry_.options().max_rollback);
    check_same("classes of heads", std::size_t{get<std::uint32_t>(from, 112)},
               geometry_.classes().size());
    check_same("bytes of compensation rows", std::size_t{get<std::uint64_t>(from, 120)},
               geometry_.compensation_bytes());
    if (from.size() < num_bytes()) {
      fail<FormatError>("snapshot: it ends within its head, after ", from.size(), " of ",
                        num_bytes(), " bytes");
    }
    for (std::size_t c = 0; c < geometry_.classes().size(); ++c) {
      std::array<char, kClass> name{};  // ends with a zero whatever the bytes are
      std::memcpy(name.data(), from.data() + states_at() + kClass * c + 8, kClass - 8);
      if (std::string_view(name.data()) != format_of(c)) {
        fail<FormatError>("snapshot: rows of class ", c, ": ", name.data(), " in the snapshot, ",
                          format_of(c), " in the cache");
      }
    }
  }

  /// Lengths that a sequence can have; what passes this cannot make a rule count wrong.
  void check_lengths(const SnapshotSequence& sequence) const {
    const auto [length, high_water, states] = sequence;
    if (length < 0 || high_water < length || high_water > kMaxTokens ||
        (length == 0) != (high_water == 0) ||
        length < high_water - geometry_.options().max_rollback) {
      fail<FormatError>("snapshot: no sequence of at most ", kMaxTokens, " tokens has length ",
                        length, " and high water ", high_water, " where max_rollback is ",
                        geometry_.options().max_rollback);
    }
  }

  static AnyKeepState state_of(const HeadClass& heads, std::uint64_t word,
                               const SnapshotSequence& sequence) {
    const std::optional<AnyKeepState> state = heads.rule.from_word(word, sequence.high_water);
    if (!state) {
      fail<FormatError>("snapshot: no class of heads has state ", word, " at high water ",
                        sequence.high_water);
    }
    heads.rule.visit_selecting(*state, []<class State>(const auto&, const State& selected) {
      if (selected != State{}) {
        fail<FormatError>("snapshot: rows of its sequence were selected at length ",
                          selected.selected, ", of which version ", kVersion,
                          " says too little to restore it");
      }
    });
    return *state;
  }

  const CacheGeometry& geometry_;
  std::vector<std::string_view> formats_;
};

}  // namespace headwise::inline v0
