// SPDX-License-Identifier: MIT
/// @file tsv.hpp
/// Reader and writer of the published score tables: one line a layer, one number a head.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/heads/text_file.hpp"

namespace headwise::inline v0::detail {

/// Where in a file an error is: "name:line: ".
struct TsvPlace {
  std::string_view name;
  int line = 0;

  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    fail<FormatError>(name, ":", line, ": ", parts...);
  }
};

inline double parse_tsv_value(std::string_view token, const TsvPlace& place) {
  double value = 0.0;
  const char* end = token.data() + token.size();
  const auto [stop, error] = std::from_chars(token.data(), end, value);
  if (error == std::errc::result_out_of_range) {
    place.refuse(excerpt(token), " does not fit a double");
  }
  if (error != std::errc{} || stop != end) place.refuse(excerpt(token), " is not a number");
  if (!is_finite(value)) place.refuse(excerpt(token), " is not a finite number");
  return value;
}

/// Appends the numbers of one line, separated by one tab or by spaces.
inline void parse_tsv_line(std::string_view line, const TsvPlace& place,
                           std::vector<double>& values) {
  for (bool first = true; !line.empty(); first = false) {
    const std::string_view gap = line.substr(0, line.find_first_not_of(" \t"));
    if (std::count(gap.begin(), gap.end(), '\t') > (first ? 0 : 1) || gap.size() == line.size()) {
      place.refuse("a value is missing beside a tab");
    }
    line.remove_prefix(gap.size());
    const std::string_view token = line.substr(0, line.find_first_of(" \t"));
    if (values.size() == kMaxScores) {
      place.refuse("more than the limit of ", kMaxScores, " values");
    }
    values.push_back(parse_tsv_value(token, place));
    line.remove_prefix(token.size());
  }
}

/// `text` without the given characters at its end.
inline std::string_view trim_end(std::string_view text, std::string_view characters) {
  return text.substr(0, text.find_last_not_of(characters) + 1);
}

}  // namespace headwise::inline v0::detail

namespace headwise::inline v0 {

/// Reads `L` lines of `H` numbers each, separated by a tab or by spaces; LF or CRLF. Values outside
/// [0, 1] are kept as they are (published gates hold -1.06e-2 and 1.0078): selection clips.
/// @tparam Scores  HeadScores, or QueryHeadScores for a table over query heads.
/// @param name  what errors call the text.
/// @throws FormatError with file, line and value for what is not a finite number, a row that is
///   longer or shorter than the first, no rows, more than 2^16 lines, 2^16 values in one or 2^20
///   in all.
/// @see DuoAttention's full_attention_heads.tsv and RLKV's adapter_weights.tsv.
template <class Scores = HeadScores>
Scores parse_tsv(std::string_view text, std::string_view name) {
  detail::TsvPlace place{name, 1};
  std::vector<double> values;
  std::size_t num_heads = 0;
  text = detail::trim_end(text, "\r\n ");
  if (text.empty()) place.refuse("no values, expected a line for every layer");
  for (;; ++place.line) {
    const std::size_t end = text.find('\n');
    const std::size_t before = values.size();
    detail::parse_tsv_line(detail::trim_end(text.substr(0, end), "\r "), place, values);
    const std::size_t got = values.size() - before;
    if (place.line == 1) num_heads = got;
    if (place.line > kMaxLayers) place.refuse("more than the limit of ", kMaxLayers, " lines");
    if (got > kMaxHeads) place.refuse(got, " values, more than the limit of ", kMaxHeads);
    if (got == 0) place.refuse("an empty line, expected one for every layer");
    if (got != num_heads) place.refuse(got, " values, expected ", num_heads, " as in line 1");
    if (end == std::string_view::npos) break;
    text.remove_prefix(end + 1);
  }
  return Scores::dense(place.line, static_cast<int>(num_heads), values);
}

/// parse_tsv() of a file.
/// @throws ConfigError additionally when the file cannot be read.
template <class Scores = HeadScores>
Scores load_tsv(const std::string& path) {
  return parse_tsv<Scores>(detail::load_text(path), path);
}

/// The published layout: tab-separated `%.18e`, LF, a final newline. Reads back bit for bit.
/// @throws ConfigError for layers of unequal length, which the format cannot tell from a damaged
///   file.
template <HeadAxis kAxis>
std::string to_tsv(const HeadTable<kAxis>& scores) {
  std::string text;
  for (int layer = 0; layer < scores.num_layers(); ++layer) {
    if (scores.num_heads(layer) != scores.num_heads(0)) {
      fail<ConfigError>("layer ", layer, " has ", scores.num_heads(layer),
                        " heads, a TSV needs as many as in layer 0: ", scores.num_heads(0));
    }
    for (const double value : scores.row(layer)) {
      char digits[32];  // sign, 1.18 digits, exponent: at most 26
      char* const end = digits + sizeof digits;
      text.append(digits, std::to_chars(digits, end, value, std::chars_format::scientific, 18).ptr);
      text += '\t';
    }
    text.back() = '\n';
  }
  return text;
}

/// to_tsv() into a file.
/// @throws ConfigError additionally when the file cannot be written.
template <HeadAxis kAxis>
void save_tsv(const HeadTable<kAxis>& scores, const std::string& path) {
  detail::save_text(path, to_tsv(scores));
}

}  // namespace headwise::inline v0
