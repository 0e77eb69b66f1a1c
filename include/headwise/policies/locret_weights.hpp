// SPDX-License-Identifier: MIT
/// @file locret_weights.hpp
/// Reader of Locret's retaining heads from safetensors.
/// Not in headwise.hpp: include it by name where it is needed.
#pragma once

#if !__has_include(<nlohmann/json.hpp>)
#error "headwise/policies/locret_weights.hpp needs nlohmann/json (Debian: nlohmann-json3-dev)"
#endif

#include <bit>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/heads/bounded_json.hpp"
#include "headwise/heads/text_file.hpp"
#include "headwise/policies/locret.hpp"

namespace headwise::inline v0::locret {

/// The largest file of weights that is read: Llama-3.1-8B's in f32 have 770 MiB.
inline constexpr std::size_t kMaxWeightBytes = std::size_t{4} << 30;

namespace detail {

/// A matrix in a file: [rows, columns], row by row.
struct Matrix {
  std::size_t rows = 0;
  std::size_t columns = 0;
  std::vector<float> numbers;
};

/// Bytes as an unsigned little-endian number.
inline std::uint64_t little_endian(std::string_view bytes) {
  std::uint64_t number = 0;
  for (std::size_t i = bytes.size(); i-- > 0;) {
    number = number << 8U | static_cast<unsigned char>(bytes[i]);
  }
  return number;
}

/// A non-negative integer of a list of exactly two.
inline std::pair<std::uint64_t, std::uint64_t> two(const nlohmann::json& tensor, const char* key,
                                                   const std::string& what) {
  const auto list = tensor.find(key);
  if (list == tensor.end() || !list->is_array() || list->size() != 2 ||
      !list->at(0).is_number_unsigned() || !list->at(1).is_number_unsigned()) {
    fail<FormatError>(what, ": '", key, "' is not a list of two integers >= 0");
  }
  return {list->at(0).get<std::uint64_t>(), list->at(1).get<std::uint64_t>()};
}

/// @param data  the bytes behind the file's header
/// @param unread  how many of them no matrix has had so far: those of this one are taken off. One
///   byte read for many matrices would make a small file fill the memory.
inline Matrix read_matrix(const nlohmann::json& tensor, std::string_view data,
                          std::uint64_t& unread, const std::string& what) {
  if (!tensor.is_object()) fail<FormatError>(what, ": not an object");
  const auto type = tensor.find("dtype");
  const bool named = type != tensor.end() && type->is_string();
  const std::string dtype = named ? type->get<std::string>() : "";
  const std::size_t size = dtype == "F32" ? 4 : dtype == "F16" || dtype == "BF16" ? 2 : 0;
  if (size == 0) {
    fail<FormatError>(what, ": dtype ", headwise::detail::excerpt(dtype),
                      " is not F32, F16 or BF16");
  }
  const auto [rows, columns] = two(tensor, "shape", what);
  const auto [begin, end] = two(tensor, "data_offsets", what);
  if (begin > end || end > data.size()) {
    fail<FormatError>(what, ": bytes [", begin, ", ", end, ") of ", data.size());
  }
  if (end - begin > unread) {
    fail<FormatError>(what, ": bytes [", begin, ", ", end, ") of ", data.size(),
                      ", of which other tensors leave ", unread);
  }
  unread -= end - begin;
  const std::uint64_t count = (end - begin) / size;
  if (rows == 0 || columns == 0 || rows > count || columns > count || rows * columns != count ||
      (end - begin) % size != 0) {
    fail<FormatError>(what, ": ", end - begin, " bytes of ", rows, " x ", columns, " ", dtype);
  }
  Matrix matrix{static_cast<std::size_t>(rows), static_cast<std::size_t>(columns), {}};
  matrix.numbers.reserve(static_cast<std::size_t>(count));
  for (std::size_t at = begin; at < end; at += size) {
    const auto bits = static_cast<std::uint32_t>(little_endian(data.substr(at, size)));
    float number = 0.0F;
    if (dtype == "F32") number = std::bit_cast<float>(bits);
    if (dtype == "BF16") number = to_float(std::bit_cast<bf16>(static_cast<std::uint16_t>(bits)));
    if (dtype == "F16") {
      number = to_float(std::bit_cast<f16>(static_cast<std::uint16_t>(bits)));
    }
    if (!is_finite(number)) fail<FormatError>(what, ": a number is not finite");
    matrix.numbers.push_back(number);
  }
  return matrix;
}

/// The layer in `..layers.<layer>.<any>.<name>`, or -1 for the name of another tensor.
inline int layer_of(std::string_view key, std::string_view name) {
  constexpr std::string_view kLayers = "layers.";
  const std::size_t at = key.find(kLayers);
  if (at == key.npos || !key.ends_with(name)) return -1;
  const std::string_view digits = key.substr(at + kLayers.size());
  int layer = -1;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), layer);
  const bool whole = error == std::errc() && end != digits.data() + digits.size() && *end == '.';
  return whole && layer >= 0 ? layer : -1;
}

}  // namespace detail

/// Retaining heads of all layers from the bytes of a safetensors file: tensors named
/// `..layers.N...retaining_head_w1.weight` [hidden, features] and
/// `..retaining_head_w2.weight` [num_kv_heads, hidden], of F32, F16 or BF16; others are passed
/// over.
/// @param name  what errors call the bytes
/// @return one a layer, from layer 0
/// @throws FormatError with file, tensor and value for what is no such file, a layer that lacks one
///   of the two, is missing or twice there, tensors that share bytes, and numbers that are not
///   finite.
inline std::vector<RetainingHead> parse_weights(std::string_view bytes, std::string_view name) {
  constexpr std::size_t kLengthBytes = 8;
  if (bytes.size() < kLengthBytes) fail<FormatError>(name, ": ", bytes.size(), " bytes");
  const std::uint64_t length = detail::little_endian(bytes.substr(0, kLengthBytes));
  if (length > bytes.size() - kLengthBytes) {
    fail<FormatError>(name, ": a header of ", length, " bytes in a file of ", bytes.size());
  }
  const auto header_bytes = static_cast<std::size_t>(length);
  const nlohmann::json header = parse_bounded_json(bytes.substr(kLengthBytes, header_bytes), name);
  if (!header.is_object()) fail<FormatError>(name, ": the header is not a JSON object");
  const std::string_view data = bytes.substr(kLengthBytes + header_bytes);
  std::map<int, const nlohmann::json*> first, second;
  for (const auto& [key, tensor] : header.items()) {
    for (auto* of : {&first, &second}) {
      const int layer = detail::layer_of(
          key, of == &first ? ".retaining_head_w1.weight" : ".retaining_head_w2.weight");
      if (layer >= 0 && !of->try_emplace(layer, &tensor).second) {
        fail<FormatError>(name, ": layer ", layer, " is there twice");
      }
    }
  }
  if (first.empty() || first.size() != second.size()) {
    fail<FormatError>(name, ": ", first.size(), " retaining_head_w1 and ", second.size(),
                      " retaining_head_w2");
  }
  std::vector<RetainingHead> heads;
  std::uint64_t unread = data.size();
  for (int layer = 0; std::ssize(heads) < std::ssize(first); ++layer) {
    if (!first.contains(layer) || !second.contains(layer)) {
      fail<FormatError>(name, ": layer ", layer, " lacks a retaining head");
    }
    const std::string what = std::string(name) + ": layer " + std::to_string(layer);
    detail::Matrix w1 = detail::read_matrix(*first[layer], data, unread, what + " w1");
    detail::Matrix w2 = detail::read_matrix(*second[layer], data, unread, what + " w2");
    constexpr std::size_t kMost = std::size_t{1} << 24;
    if (w1.rows != w2.columns || w1.columns > kMost || w2.rows > kMost) {
      fail<FormatError>(what, ": w1 of ", w1.rows, " x ", w1.columns, " and w2 of ", w2.rows, " x ",
                        w2.columns);
    }
    heads.emplace_back(std::move(w1.numbers), std::move(w2.numbers), static_cast<int>(w1.columns),
                       static_cast<int>(w2.rows));
  }
  return heads;
}

/// parse_weights() of a file.
/// @throws ConfigError additionally when the file cannot be read.
inline std::vector<RetainingHead> load_weights(const std::string& path) {
  return parse_weights(headwise::detail::load_text(path, kMaxWeightBytes), path);
}

}  // namespace headwise::inline v0::locret
