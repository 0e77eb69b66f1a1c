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
#include <system_error>
#include <utility>
#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/numbers.hpp"
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
    std::pair<int, int> head;
    const char* end = text.data() + text.size();
    const auto layer = std::from_chars(text.data(), end, head.first);
    const bool has_dash = layer.ec == std::errc{} && layer.ptr != end && *layer.ptr == '-';
    const auto tail = has_dash ? std::from_chars(layer.ptr + 1, end, head.second) : layer;
    if (!has_dash || tail.ec != std::errc{} || tail.ptr != end) {
      refuse("not of the form \"layer-head\"");
    }
    for (const int index : {head.first, head.second}) {
      if (index < 0 || index > kMaxIndex) {
        refuse("index ", index, " is not in [0, ", kMaxIndex, "]");
      }
    }
    return head;
  }

  bool add(double value) {
    if (depth_ != 2) refuse(value, " where a list of runs was expected");
    if (!is_finite(value)) refuse(value, " is not finite");
    head_->sum += value;
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
  constexpr std::int64_t kMost = std::int64_t{1} << 40;  // no context is longer
  const auto entry = config.find(key);
  if (entry == config.end() || entry->is_null()) return {};
  // Beyond int64 it wraps to a negative number, and is refused as such.
  const auto size = entry->is_number_integer() ? entry->get<std::int64_t>() : std::int64_t{-1};
  if (size < least || size > kMost) {
    const auto text = entry->dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
    fail<FormatError>(name, ": key '", key, "': ", excerpt(text), " is not an integer in [", least,
                      ", ", kMost, "]");
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
///   that is malformed, twice there, missing or out of range, and lists of unequal length.
/// @see Retrieval Head, arXiv:2404.15574 (head_score/); HeadKV, arXiv:2410.19258
///   (Important_Head/head_score/).
inline HeadRuns parse_head_runs(std::string_view text, std::string_view name) {
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
/// @throws FormatError with file, key and value for what is not a JSON object, a size that is not
///   an integer or out of range, or only one of the two.
inline std::optional<Window> parse_window_config(std::string_view text, std::string_view name) {
  const auto config = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
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
inline std::optional<Window> load_window_config(const std::string& path) {
  for (const std::string& candidate : {path + "/config.json", path}) {
    if (detail::can_open(candidate)) {
      return parse_window_config(detail::load_text(candidate), candidate);
    }
  }
  return {};
}

}  // namespace headwise::inline v0
