// SPDX-License-Identifier: MIT
/// @file json.hpp
/// Readers of published JSON: Retrieval-Head and HeadKV scores, DuoAttention's config.json.
/// Not in headwise.hpp: include it by name where it is needed.
#pragma once

#if !__has_include(<nlohmann/json.hpp>)
#error "headwise/heads/json.hpp needs nlohmann/json (Debian and Ubuntu: nlohmann-json3-dev)"
#endif

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/bounded_json.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/heads/text_file.hpp"

namespace headwise::inline v0 {

/// What a Retrieval-Head or HeadKV file says.
struct HeadRuns {
  QueryHeadScores mean;      ///< [num_layers, num_qo_heads], mean over the runs
  std::size_t num_runs = 0;  ///< runs that contributed, the same for every head
};

}  // namespace headwise::inline v0

namespace headwise::inline v0::detail {

/// Takes `{"layer-head": [run, run, ...], ...}` token by token: a document tree would silently keep
/// the last of two equal keys, and cost ten times the file.
class HeadRunsReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeadRunsReader(std::string_view name) : name_(name) {}

  bool key(std::string& text) override {
    key_ = excerpt(text);
    const auto [place, is_new] = heads_.try_emplace(parse_key(text));
    if (!is_new) refuse("the key is there twice");
    if (heads_.size() > kMaxScores) refuse("more than the limit of ", kMaxScores, " heads");
    head_ = &place->second;
    return true;
  }
  bool start_object(std::size_t) override {
    if (depth_++ != 0) refuse("an object where runs were expected");
    return true;
  }
  bool end_object() override { return --depth_, true; }
  bool start_array(std::size_t) override {
    if (depth_++ != 1) refuse("a list where {\"layer-head\": [run, ...]} has none");
    return true;
  }
  bool end_array() override {
    if (head_->num_runs == 0) refuse("no runs, expected at least 1");
    if (num_runs_ == 0) num_runs_ = head_->num_runs;
    if (head_->num_runs != num_runs_) {
      refuse(head_->num_runs, " runs, expected ", num_runs_, " as for the first key");
    }
    return --depth_, true;
  }

  bool number_integer(std::int64_t x) override { return add(static_cast<double>(x)); }
  bool number_unsigned(std::uint64_t x) override { return add(static_cast<double>(x)); }
  bool number_float(double x, const std::string&) override { return add(x); }

  bool null() override { refuse("null is not a number"); }
  bool boolean(bool) override { refuse("a boolean is not a number"); }
  bool string(std::string& text) override { refuse(excerpt(text), " is not a number"); }
  bool binary(nlohmann::json::binary_t&) override { refuse("binary is not a number"); }
  bool parse_error(std::size_t byte, const std::string& token,
                   const nlohmann::detail::exception&) override {
    refuse("not a JSON number or list at byte ", byte, ", near ", excerpt(token));
  }

  /// After the last token: every head of the grid must have been there.
  HeadRuns finish() const {
    if (heads_.empty()) fail<FormatError>(name_, ": no heads");
    const int num_layers = heads_.rbegin()->first.first + 1;
    int num_heads = 0;
    for (const auto& [key, head] : heads_) num_heads = std::max(num_heads, key.second + 1);
    std::vector<double> means;
    auto next = heads_.begin();  // in row-major order, whatever the file's
    for (int layer = 0; layer < num_layers; ++layer) {
      for (int head = 0; head < num_heads; ++head, ++next) {
        if (next == heads_.end() || next->first != std::pair(layer, head)) {
          fail<FormatError>(name_, ": key \"", layer, "-", head, "\" is missing of ", num_layers,
                            " layers x ", num_heads, " heads");
        }
        means.push_back(next->second.sum / static_cast<double>(num_runs_));
      }
    }
    return {QueryHeadScores::dense(num_layers, num_heads, means), num_runs_};
  }

 private:
  /// Far above the largest open models (126 layers, 128 query heads).
  static constexpr int kMaxIndex = 4095;

  struct Runs {
    double sum = 0.0;
    std::size_t num_runs = 0;
  };

  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    if (key_.empty()) fail<FormatError>(name_, ": ", parts...);
    fail<FormatError>(name_, ": key ", key_, ": ", parts...);
  }

  std::pair<int, int> parse_key(std::string_view text) const {
    const std::size_t dash = text.find('-');
    if (dash == text.npos) refuse("not of the form \"layer-head\"");
    return {parse_index(text.substr(0, dash)), parse_index(text.substr(dash + 1))};
  }

  /// Digits and nothing else: no sign, no blank, no 0 before another digit.
  int parse_index(std::string_view digits) const {
    const bool is_number = !digits.empty() && digits.find_first_not_of("0123456789") == digits.npos;
    if (!is_number || (digits.size() > 1 && digits.front() == '0')) {
      refuse("not of the form \"layer-head\"");
    }
    int index = kMaxIndex + 1;  // and so for what does not fit an int
    std::from_chars(digits.data(), digits.data() + digits.size(), index);
    if (index > kMaxIndex)
      refuse("index ", digits.substr(0, 20), " is not in [0, ", kMaxIndex, "]");
    return index;
  }

  bool add(double value) {
    if (depth_ != 2) refuse(value, " where a list of runs was expected");
    if (!is_finite(value)) refuse(value, " is not finite");
    head_->sum += value;
    if (!is_finite(head_->sum)) refuse("the sum of the runs does not fit a double at ", value);
    ++head_->num_runs;
    return true;
  }

  std::string_view name_;
  std::string key_;  // the latest one, as a message shows it; empty before the first
  std::map<std::pair<int, int>, Runs> heads_;
  Runs* head_ = nullptr;
  std::size_t num_runs_ = 0;
  int depth_ = 0;
};

/// A size in a config.json, or nothing where it is null or not there.
inline std::optional<std::int64_t> parse_size(const nlohmann::json& config, const char* key,
                                              std::int64_t least, std::string_view name) {
  const auto entry = config.find(key);
  if (entry == config.end() || entry->is_null()) return {};
  // Beyond int64 it wraps to a negative number, and is refused as such.
  const auto size = entry->is_number_integer() ? entry->get<std::int64_t>() : std::int64_t{-1};
  if (size < least || size > kMaxTokens) {
    // A list or an object may be long; what it is says enough.
    const std::string text =
        entry->is_primitive() ? entry->dump(-1, ' ', true) : entry->type_name();
    fail<FormatError>(name, ": key '", key, "': ", excerpt(text), " is not an integer in [", least,
                      ", ", kMaxTokens, "]");
  }
  return size;
}

}  // namespace headwise::inline v0::detail

namespace headwise::inline v0 {

/// Scores of query heads from `{"layer-head": [one number a run], ...}`: mean over the runs, by key
/// and not by order. Reduce them with reduce_max() or reduce_mean(); check_shape() tells another
/// model's file.
/// @param name  what errors call the text.
/// @throws FormatError with file, key and value for what is not JSON, not a finite number, a key
///   that is malformed, twice there, missing or out of range, more than 2^20 heads, and lists of
///   unequal length.
/// @see Retrieval Head, arXiv:2404.15574 (head_score/); HeadKV, arXiv:2410.19258
///   (Important_Head/head_score/).
inline HeadRuns parse_head_runs(std::string_view text, std::string_view name) {
  detail::refuse_nul(text, name);
  detail::HeadRunsReader reader(name);
  nlohmann::json::sax_parse(text, &reader);
  return reader.finish();
}

/// parse_head_runs() of a file.
/// @throws ConfigError additionally when the file cannot be read.
inline HeadRuns load_head_runs(const std::string& path) {
  return parse_head_runs(detail::load_text(path), path);
}

/// `sink_size` and `recent_size` of the config.json that DuoAttention's training writes beside its
/// TSV, or nothing where neither is there or both are null. These are the *training* windows
/// (128/256 in the published files; their mask counts the current token, as ours does); papers and
/// code deploy with others: duo_attention::kDeployWindow.
/// @throws FormatError with file, key and value for what is not a JSON object, parse_bounded_json()
///   refuses, a size that is not an integer or out of range, or only one of the two.
inline std::optional<Window> parse_window_config(std::string_view text, std::string_view name) {
  const nlohmann::json config = parse_bounded_json(text, name);
  if (!config.is_object()) fail<FormatError>(name, ": not a JSON object");
  const auto sink = detail::parse_size(config, "sink_size", 0, name);
  const auto recent = detail::parse_size(config, "recent_size", 1, name);
  if (sink.has_value() != recent.has_value()) {
    fail<FormatError>(name, ": key '", sink ? "recent_size" : "sink_size",
                      "': missing or null, expected both sizes or none");
  }
  if (!sink) return {};
  return Window{*sink, *recent};
}

/// parse_window_config() of a file, or of the config.json in a directory; nothing where there is no
/// such file (RLKV's folders have none).
/// @throws ConfigError additionally when a file that is there cannot be read.
inline std::optional<Window> load_window_config(const std::string& path) {
  for (const std::string& candidate : {path + "/config.json", path}) {
    if (detail::can_open(candidate)) {
      return parse_window_config(detail::load_text(candidate, kMaxJsonBytes), candidate);
    }
  }
  return {};
}

}  // namespace headwise::inline v0
