// SPDX-License-Identifier: MIT
/// @file arguments.hpp
/// Command-line options `--name value`, each checked against what the command knows.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "headwise/core/check.hpp"

namespace needle_lm {

class Arguments {
 public:
  /// @param known  options that take a value.
  /// @param flags  options that take none.
  /// @throws ConfigError for any other option, one without its value, or one given twice.
  Arguments(std::span<const char* const> words, const std::vector<std::string_view>& known,
            const std::vector<std::string_view>& flags = {}) {
    for (std::size_t i = 0; i < words.size(); ++i) {
      const std::string word = words[i];
      std::string value;
      if (std::ranges::find(known, word) != known.end()) {
        if (++i == words.size()) fail(word, " needs a value");
        value = words[i];
      } else if (std::ranges::find(flags, word) == flags.end()) {
        fail("unknown option ", word, "; this command knows ", joined(known, flags));
      }
      if (!values_.emplace(word, value).second) fail(word, " is given twice");
    }
  }

  bool has(const std::string& name) const { return values_.contains(name); }

  std::string text(const std::string& name, const std::string& otherwise) const {
    const auto found = values_.find(name);
    return found == values_.end() ? otherwise : found->second;
  }

  std::string required_text(const std::string& name) const {
    if (!has(name)) fail(name, " is required");
    return values_.at(name);
  }

  /// One of `choices`.
  std::string choice(const std::string& name, const std::string& otherwise,
                     const std::vector<std::string_view>& choices) const {
    const std::string value = text(name, otherwise);
    if (std::ranges::find(choices, value) == choices.end()) {
      fail(name, " ", value, ": expected one of ", joined(choices, {}));
    }
    return value;
  }

  std::int64_t integer(const std::string& name, std::int64_t otherwise, std::int64_t lowest,
                       std::int64_t highest) const {
    return number(name, otherwise, lowest, highest, "an integer");
  }

  double real(const std::string& name, double otherwise, double lowest, double highest) const {
    return number(name, otherwise, lowest, highest, "a number");
  }

 private:
  template <class... Parts>
  [[noreturn]] static void fail(const Parts&... parts) {
    headwise::fail<headwise::ConfigError>(parts...);
  }

  static std::string joined(const std::vector<std::string_view>& some,
                            const std::vector<std::string_view>& more) {
    std::string text;
    for (const auto* names : {&some, &more}) {
      for (const auto name : *names) text += (text.empty() ? "" : ", ") + std::string(name);
    }
    return text;
  }

  template <class Number>
  Number number(const std::string& name, Number otherwise, Number lowest, Number highest,
                const char* kind) const {
    if (!has(name)) return otherwise;
    const std::string& word = values_.at(name);
    Number value{};
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
    const bool is_number = error == std::errc{} && end == word.data() + word.size();
    if (!is_number || !(value >= lowest && value <= highest)) {  // NaN is out of every range
      fail(name, " ", word, ": expected ", kind, " in ", lowest, "..", highest);
    }
    return value;
  }

  std::map<std::string, std::string> values_;
};

}  // namespace needle_lm
