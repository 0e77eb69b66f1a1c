// SPDX-License-Identifier: MIT
/// @file safetensors.hpp
/// Reads a safetensors file: 8 bytes of header length, a JSON header, then the tensors' bytes.
///
/// The file is taken for hostile: every length and offset is checked against the file before use.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "files.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/heads/bounded_json.hpp"
#include "headwise/heads/text_file.hpp"

namespace needle_lm {

static_assert(std::endian::native == std::endian::little, "safetensors bytes are little-endian");

class SafeTensors {
 public:
  using Shape = std::vector<std::int64_t>;
  /// Far above what a model of this size has; read as a whole.
  static constexpr std::uint64_t kMaxBytes = std::uint64_t{1} << 32;

  /// @throws FormatError naming the file, the value and the limit.
  explicit SafeTensors(const std::string& path) : path_(path), file_(read_file(path, kMaxBytes)) {
    constexpr std::uint64_t kLengthBytes = sizeof(std::uint64_t);
    if (file_.size() < kLengthBytes) {
      fail("a safetensors file has at least 8 bytes, this one ", file_.size());
    }
    std::uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, file_.data(), kLengthBytes);
    if (header_bytes > file_.size() - kLengthBytes) {
      fail("header of ", header_bytes, " bytes in a file of ", file_.size());
    }
    const std::string_view header(file_.data() + kLengthBytes, header_bytes);
    data_ = std::span(file_).subspan(kLengthBytes + header_bytes);
    read_header(header);
  }

  bool contains(const std::string& name) const { return tensors_.contains(name); }

  /// @throws FormatError when there is no such tensor.
  Shape shape(const std::string& name) const { return find(name).shape; }

  /// @throws FormatError when there is no such tensor, or it has another shape.
  void require_shape(const std::string& name, const Shape& shape) const {
    const Tensor& tensor = find(name);
    if (tensor.shape != shape) {
      fail(name, ": shape ", to_text(tensor.shape), ", expected ", to_text(shape));
    }
  }

  /// All elements of a tensor that must have this shape, widened to float.
  /// @throws FormatError for another shape or a dtype other than F32, F16, BF16.
  std::vector<float> floats(const std::string& name, const Shape& shape) const {
    require_shape(name, shape);
    const Tensor& tensor = find(name);
    if (tensor.dtype == "F32") return convert<float>(tensor);
    if (tensor.dtype == "F16") return convert<float, headwise::f16>(tensor);
    if (tensor.dtype == "BF16") return convert<float, headwise::bf16>(tensor);
    fail(name, ": dtype ", tensor.dtype, ", expected F32, F16 or BF16");
  }

  /// All elements of a tensor of integers that must have this shape.
  /// @throws FormatError for another shape or a dtype other than U8, I32.
  std::vector<std::int32_t> integers(const std::string& name, const Shape& shape) const {
    require_shape(name, shape);
    const Tensor& tensor = find(name);
    if (tensor.dtype == "I32") return convert<std::int32_t>(tensor);
    if (tensor.dtype == "U8") return convert<std::int32_t, std::uint8_t>(tensor);
    fail(name, ": dtype ", tensor.dtype, ", expected I32 or U8");
  }

 private:
  struct Tensor {
    std::string dtype;
    Shape shape;
    std::span<const char> bytes;
  };

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    headwise::fail<headwise::FormatError>(path_, ": ", parts...);
  }

  static std::uint64_t element_bytes(const std::string& dtype) {
    static const std::map<std::string, std::uint64_t> kBytes{
        {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
        {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},
        {"U32", 4},  {"F32", 4}, {"I64", 8}, {"U64", 8},     {"F64", 8}};
    const auto found = kBytes.find(dtype);
    return found == kBytes.end() ? 0 : found->second;
  }

  void read_header(std::string_view text) {
    const auto header = headwise::parse_bounded_json(text, path_ + ": header");
    if (!header.is_object()) fail("the header is no JSON object");
    std::size_t unread = data_.size();  // bytes that no tensor has had so far
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__") continue;
      const Tensor tensor = read_entry(name, entry);
      if (tensor.bytes.size() > unread) {  // a small file would fill the memory
        fail(headwise::detail::excerpt(name), ": ", tensor.bytes.size(), " bytes of ", data_.size(),
             ", of which other tensors leave ", unread);
      }
      unread -= tensor.bytes.size();
      tensors_.emplace(name, tensor);
    }
  }

  Tensor read_entry(const std::string& name, const nlohmann::json& entry) const {
    const std::string shown = headwise::detail::excerpt(name);  // as long and wild as it likes
    const auto is_length = [](const nlohmann::json& value) { return value.is_number_unsigned(); };
    if (!entry.is_object() || !entry.contains("dtype") || !entry["dtype"].is_string() ||
        !entry.contains("shape") || !entry["shape"].is_array() || !entry.contains("data_offsets") ||
        !entry["data_offsets"].is_array() || entry["data_offsets"].size() != 2 ||
        !is_length(entry["data_offsets"][0]) || !is_length(entry["data_offsets"][1])) {
      fail(shown, ": expected {dtype: text, shape: [...], data_offsets: [begin, end]}");
    }
    const auto dtype = entry["dtype"].get<std::string>();
    std::uint64_t bytes = element_bytes(dtype);
    if (bytes == 0) fail(shown, ": unknown dtype ", headwise::detail::excerpt(dtype));

    const auto begin = entry["data_offsets"][0].get<std::uint64_t>();
    const auto end = entry["data_offsets"][1].get<std::uint64_t>();
    if (begin > end || end > data_.size()) {
      fail(shown, ": offsets [", begin, ", ", end, ") in ", data_.size(), " bytes of data");
    }
    Shape shape;
    for (const auto& dim : entry["shape"]) {
      if (!is_length(dim)) fail(shown, ": dimension ", brief(dim), " is no natural number");
      const auto size = dim.get<std::uint64_t>();
      if (size > data_.size() || (size != 0 && bytes > data_.size() / size)) {
        fail(shown, ": dimension ", size, " leads beyond ", data_.size(), " bytes of data");
      }
      bytes *= size;
      shape.push_back(static_cast<std::int64_t>(size));
    }
    if (bytes != end - begin) {
      fail(shown, ": shape and dtype need ", bytes, " bytes, offsets give ", end - begin);
    }
    return {dtype, std::move(shape), data_.subspan(begin, end - begin)};
  }

  const Tensor& find(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) fail("no tensor named ", name);
    return found->second;
  }

  static std::string to_text(const Shape& shape) {
    constexpr std::size_t kShown = 8;
    std::string text = "[";
    for (std::size_t i = 0; i < std::min(shape.size(), kShown); ++i) {
      text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    }
    return text + (shape.size() > kShown ? ", ...]" : "]");
  }

  template <class To, class From = To>
  static std::vector<To> convert(const Tensor& tensor) {
    std::vector<To> values(tensor.bytes.size() / sizeof(From));
    for (std::size_t i = 0; i < values.size(); ++i) {
      From value;
      std::memcpy(&value, tensor.bytes.data() + i * sizeof(From), sizeof(From));
      if constexpr (std::is_same_v<To, float>) {
        values[i] = headwise::to_float(value);
      } else {
        values[i] = static_cast<To>(value);
      }
    }
    return values;
  }

  std::string path_;
  std::vector<char> file_;
  std::span<const char> data_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace needle_lm
