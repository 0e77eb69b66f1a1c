// SPDX-License-Identifier: MIT
/// @file fingerprint.hpp
/// A stable 128-bit name for everything in a plan that changes what is stored.
#pragma once

#include <compare>
#include <cstdint>
#include <string>
#include <variant>

#include "headwise/core/shape.hpp"
#include "headwise/heads/native_window.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise::inline v0 {

/// 128 bits; equal plans have equal ones on every platform and in every run.
struct Fingerprint {
  std::uint64_t high = 0;  ///< bits 64 to 127
  std::uint64_t low = 0;   ///< bits 0 to 63

  /// 32 lower-case hexadecimal digits, the highest first.
  std::string to_string() const {
    std::string text;
    for (const std::uint64_t word : {high, low}) {
      for (int shift = 60; shift >= 0; shift -= 4) {
        text += "0123456789abcdef"[(word >> shift) & 0xFU];
      }
    }
    return text;
  }
  friend constexpr auto operator<=>(const Fingerprint&, const Fingerprint&) = default;
  friend constexpr bool operator==(const Fingerprint&,
                                   const Fingerprint&) = default;  // nvcc 13 does not derive it
};

}  // namespace headwise::inline v0

namespace headwise::inline v0::detail {

/// FNV-1a with 128 bits (Fowler, Noll, Vo; RFC 9923). Not cryptographic: it names plans, it does
/// not defend against forged ones.
class Fnv128 {
 public:
  constexpr void add_byte(std::uint8_t byte) {
    // hash * (2^88 + 0x13B) mod 2^128, in 32-bit halves as there is no portable 128-bit integer.
    constexpr std::uint64_t kPrimeLow = 0x13B;
    const std::uint64_t low = hash_.low ^ byte;
    const std::uint64_t product = (low & 0xFFFFFFFFU) * kPrimeLow;
    const std::uint64_t carry = (low >> 32) * kPrimeLow + (product >> 32);
    hash_.high = hash_.high * kPrimeLow + (carry >> 32) + (low << 24);
    hash_.low = (carry << 32) | (product & 0xFFFFFFFFU);
  }

  /// Two's complement, eight bytes, the lowest first.
  constexpr void add(std::int64_t value) {
    const auto bits = static_cast<std::uint64_t>(value);
    for (int shift = 0; shift < 64; shift += 8) {
      add_byte(static_cast<std::uint8_t>((bits >> shift) & 0xFFU));
    }
  }

  constexpr Fingerprint value() const { return hash_; }

 private:
  Fingerprint hash_{0x6C62272E07BB0142U, 0x62B821756295C58DU};  // the FNV offset basis
};

/// A budget as words: its kind, then its members. A new kind takes the next number.
struct AddBudget {
  Fnv128& hash;
  constexpr void operator()(KeepEverything) const { hash.add(0); }
  constexpr void operator()(const KeepWindow& keep) const {
    hash.add(keep.prompt_recent == 0 ? 1 : 3);
    hash.add(keep.window.sink);
    hash.add(keep.window.recent);
    if (keep.prompt_recent != 0) hash.add(keep.prompt_recent);
  }
  constexpr void operator()(const KeepGrowingWindow& keep) const {
    hash.add(2);
    hash.add(keep.sink);
    hash.add(keep.min_recent);
    hash.add(keep.divisor);
  }
  constexpr void operator()(const KeepWindowFrom& keep) const {
    hash.add(5);
    hash.add(keep.from);
    (*this)(keep.keep);
  }
  constexpr void operator()(KeepSelected keep) const {
    hash.add(4);
    hash.add(keep.tokens);
  }
};

}  // namespace headwise::inline v0::detail

namespace headwise::inline v0 {

/// Hash of the number of layers, then for every layer its number of KV heads and their budgets.
/// Engines salt prefix-cache keys with it: what was stored under one plan is not read under
/// another. Changes of this value between versions of the library are listed in the changelog.
inline Fingerprint fingerprint(const HeadPlan& plan) {
  detail::Fnv128 hash;
  hash.add(plan.num_layers());
  for (int layer = 0; layer < plan.num_layers(); ++layer) {
    hash.add(plan.num_kv_heads(layer));
    for (int head = 0; head < plan.num_kv_heads(layer); ++head) {
      std::visit(detail::AddBudget{hash}, plan.budget(layer, head));
    }
  }
  return hash.value();
}

/// The same for a model whose layers have windows or K and V of others: of what each head keeps
/// there (within_window()), and of who shares with whom. Where there is neither, fingerprint(plan).
/// @throws ConfigError where plan and shape differ in layers or KV heads, or as within_window().
inline Fingerprint fingerprint(const ModelShape& shape, const HeadPlan& plan) {
  const HeadPlan kept = share_budgets(plan, shape);
  detail::Fnv128 hash;
  hash.add(kept.num_layers());
  for (int l = 0; l < kept.num_layers(); ++l) {
    const LayerShape& layer = shape.layer(l);
    if (!layer.owns_kv()) {
      hash.add(-1);
      hash.add(layer.kv_layer);
      continue;
    }
    hash.add(layer.num_kv_heads);
    for (int h = 0; h < layer.num_kv_heads; ++h) {
      std::visit(detail::AddBudget{hash}, within_window(kept.budget(l, h), layer.sliding_window));
    }
  }
  return hash.value();
}

}  // namespace headwise::inline v0
