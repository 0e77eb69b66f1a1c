// SPDX-License-Identifier: MIT
/// @file selection_fault.hpp
/// Why a cache refused a selection.
#pragma once

#include <cstdint>
#include <string>

namespace headwise::inline v0 {

/// The first thing that is wrong with kept positions.
struct SelectionFault {
  /// What kind of thing.
  enum class Kind : std::uint8_t {
    kNone,      ///< nothing is wrong
    kNumHeads,  ///< value: heads given; limit: heads that the cache has
    /// value: positions given for a head that has no KeepSelected, or reads another layer's rows;
    /// limit: 0
    kNotSelectable,
    kOutOfRange,    ///< value: the position; limit: the sequence's length, 0 <= position < limit
    kNotAscending,  ///< value: the position; limit: the one before it, which must be less
    kNotStored,     ///< value: the position, which an earlier selection dropped; limit: that one's
                    ///< length
  };
  Kind kind = Kind::kNone;
  int layer = -1;          ///< of the head; -1: no head's
  int kv_head = -1;        ///< in the layer
  std::int64_t value = 0;  ///< see Kind
  std::int64_t limit = 0;  ///< see Kind

  /// A sentence with head, value and limit; empty for kNone.
  std::string to_string() const {
    const std::string given = std::to_string(value);
    const std::string bound = std::to_string(limit);
    const std::string head =
        "layer " + std::to_string(layer) + ", KV head " + std::to_string(kv_head) + ": ";
    switch (kind) {
      case Kind::kNone:
        return "";
      case Kind::kNumHeads:
        return "kept positions of " + given + " KV heads, the cache has " + bound;
      case Kind::kNotSelectable:
        return head + given + " kept positions, but nothing is selected from it";
      case Kind::kOutOfRange:
        return head + "position " + given + " is outside [0, " + bound + ")";
      case Kind::kNotAscending:
        return head + "position " + given + " follows " + bound + ": positions must ascend";
      case Kind::kNotStored:
        return head + "position " + given + " was dropped by the selection at length " + bound;
    }
    return "";
  }
};

}  // namespace headwise::inline v0
