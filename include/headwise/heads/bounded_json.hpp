// SPDX-License-Identifier: MIT
/// @file bounded_json.hpp
/// JSON from hostile files: bounded depth and memory, no key twice, every error with file and key.
/// Not in headwise.hpp: include it by name where it is needed.
#pragma once

#if !__has_include(<nlohmann/json.hpp>)
#error "headwise/heads/bounded_json.hpp needs nlohmann/json (Debian, Ubuntu: nlohmann-json3-dev)"
#endif

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/heads/text_file.hpp"

namespace headwise::inline v0::detail {

/// What the parser of nlohmann/json takes for the end of a text, whatever follows it.
/// @throws FormatError with the place of a NUL byte.
inline void refuse_nul(std::string_view text, std::string_view name) {
  const std::size_t nul = text.find('\0');
  if (nul != text.npos) fail<FormatError>(name, ": not JSON: a NUL at byte ", nul + 1);
}

/// Looks at a text token by token, without a tree: what nests too deeply would overflow the stack
/// later, and of two equal keys a tree silently keeps the last.
class JsonCheck : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit JsonCheck(std::string_view name) : name_(name) {}

  bool key(std::string& text) override {
    key_ = excerpt(text);
    if (!keys_.back().insert(text).second) refuse("the key is there twice");
    return true;
  }
  bool start_object(std::size_t) override { return descend(); }
  bool start_array(std::size_t) override { return descend(); }
  bool end_object() override { return keys_.pop_back(), true; }
  bool end_array() override { return keys_.pop_back(), true; }

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(std::int64_t) override { return true; }
  bool number_unsigned(std::uint64_t) override { return true; }
  bool number_float(double, const std::string&) override { return true; }
  bool string(std::string&) override { return true; }
  bool binary(nlohmann::json::binary_t&) override { return true; }
  bool parse_error(std::size_t byte, const std::string& token,
                   const nlohmann::detail::exception&) override {
    refuse("not JSON at byte ", byte, ", near ", excerpt(token));
  }

 private:
  /// Published files nest three deep.
  static constexpr std::size_t kMaxDepth = 32;

  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    if (key_.empty()) fail<FormatError>(name_, ": ", parts...);
    fail<FormatError>(name_, ": key ", key_, ": ", parts...);
  }

  bool descend() {
    if (keys_.size() == kMaxDepth) refuse("nested deeper than ", kMaxDepth);
    keys_.emplace_back();
    return true;
  }

  std::string_view name_;
  std::string key_;                          // the latest one, as a message shows it
  std::vector<std::set<std::string>> keys_;  // of the open objects; an array has none
};

}  // namespace headwise::inline v0::detail

namespace headwise::inline v0 {

/// The most that a JSON text whose tree is kept may hold; a tree takes up to 40 times its text.
inline constexpr std::size_t kMaxJsonBytes = std::size_t{4} << 20;

/// The tree of a JSON text.
/// @param name  what errors call the text.
/// @throws FormatError with file, place and key for what is larger than kMaxJsonBytes, not JSON,
/// has
///   a NUL, nests deeper than 32, or has a key twice in one object.
inline nlohmann::json parse_bounded_json(std::string_view text, std::string_view name) {
  if (text.size() > kMaxJsonBytes) {
    fail<FormatError>(name, ": larger than the limit of ", kMaxJsonBytes, " bytes");
  }
  detail::refuse_nul(text, name);
  detail::JsonCheck check(name);
  nlohmann::json::sax_parse(text, &check);
  return nlohmann::json::parse(text);
}

}  // namespace headwise::inline v0
