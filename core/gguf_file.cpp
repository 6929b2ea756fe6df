#include "core/gguf_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "core/error.h"
#include "core/tokenizer_text.h"

namespace pare {
namespace {

constexpr std::string_view kMagic = "GGUF";
constexpr std::uint64_t kDefaultAlignment = 32, kMostAlignment = 1 << 20;
constexpr std::uint64_t kLongestKey = 65535, kMostDimensions = 4;
constexpr std::size_t kLongestName = 63;
// Of the smallest entry, with names of one byte: what the rest of a file can hold.
constexpr std::uint64_t kLeastPair = 8 + 1 + 4 + 1, kLeastTensor = 8 + 1 + 4 + 8 + 4 + 8;

enum ValueType : std::uint32_t {
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64,
  kTypes
};
constexpr std::uint64_t kBytes[kTypes] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

std::uint64_t aligned(std::uint64_t at, std::uint64_t alignment) {
  return (at + alignment - 1) / alignment * alignment;
}

template <class T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// nullopt: not a whole number, or one above 2^62.
std::optional<std::int64_t> whole(std::uint32_t type, const std::byte* at) {
  switch (type) {
    case kUint8:
      return load<std::uint8_t>(at);
    case kInt8:
      return load<std::int8_t>(at);
    case kUint16:
      return load<std::uint16_t>(at);
    case kInt16:
      return load<std::int16_t>(at);
    case kUint32:
      return load<std::uint32_t>(at);
    case kInt32:
      return load<std::int32_t>(at);
    case kInt64:
      return load<std::int64_t>(at);
    case kUint64: {
      const auto value = load<std::uint64_t>(at);
      if (value > 1ull << 62) return std::nullopt;
      return static_cast<std::int64_t>(value);
    }
    default:
      return std::nullopt;
  }
}

// The first 80 bytes, less what would be a part of a character.
std::string cut(std::string_view text) {
  constexpr std::size_t kShown = 80;
  if (text.size() <= kShown) return std::string(text);
  std::size_t end = kShown;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
  return std::string(text.substr(0, end)) + "...";
}

}  // namespace

double shortest_double(float value) {
  if (!std::isfinite(value)) return static_cast<double>(value);
  // strtod, unlike stod, takes numbers so small that a double holds them with fewer digits.
  const double out = std::strtod(fmt::format("{}", value).c_str(), nullptr);
  return static_cast<float>(out) == value ? out : static_cast<double>(value);
}

std::int64_t GgufView::elements() const {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count *= size;
  return count;
}

// Walks over the header; every step is checked against what is left.
class GgufFile::Reader {
 public:
  Reader(std::span<const std::byte> bytes, std::string place) : bytes_(bytes), place_(std::move(place)) {}

  template <class T>
  T number(const char* what) {
    return load<T>(take(sizeof(T), what));
  }
  // A text of at most `longest` bytes.
  std::string text(const char* what, std::uint64_t longest) {
    const std::uint64_t length = text_length(what);
    if (length > longest)
      fail(std::string(what) + " of at most " + std::to_string(longest) + " bytes", std::to_string(length) + " bytes");
    const auto* from = reinterpret_cast<const char*>(take(length, what));
    std::string out(from, length);
    if (!tok::is_valid_utf8(out)) fail(std::string(what) + " in UTF-8", "other bytes");
    return out;
  }
  void skip_text(const char* what) { take(text_length(what), what); }
  const std::byte* take(std::uint64_t length, const char* what) {
    if (length > left())
      fail(std::to_string(length) + " bytes of " + what, std::to_string(left()) + " until the end of the file",
           "the file is cut off or damaged");
    at_ += length;
    return bytes_.data() + (at_ - length);
  }
  std::uint64_t at() const { return at_; }
  std::uint64_t left() const { return bytes_.size() - at_; }
  [[noreturn]] void fail(const std::string& expected, const std::string& found, const std::string& hint = "") const {
    throw input_error(place_ + ": byte " + std::to_string(at_), expected, found, hint);
  }

 private:
  std::uint64_t text_length(const char* what) {
    const auto length = number<std::uint64_t>(what);
    if (length > left())
      fail(std::to_string(length) + " bytes of " + what, std::to_string(left()) + " until the end of the file",
           "the file is cut off or damaged");
    return length;
  }
  std::span<const std::byte> bytes_;
  std::string place_;
  std::uint64_t at_ = 0;
};

bool GgufFile::is_gguf(const fs::path& path) {
  std::error_code none;
  if (!fs::is_regular_file(path, none)) return false;
  const MappedFile file(path);
  return file.bytes().size() >= kMagic.size() && std::memcmp(file.bytes().data(), kMagic.data(), kMagic.size()) == 0;
}

GgufFile::GgufFile(const fs::path& path) : file_(path) {
  const auto bytes = file_.bytes();
  Reader in(bytes, path.string());
  if (std::memcmp(in.take(4, "the magic number"), kMagic.data(), 4) != 0)
    in.fail("a file that begins with GGUF", "other bytes", "this is not a GGUF file");
  const auto version = in.number<std::uint32_t>("the version");
  if (version != 2 && version != 3)
    in.fail("version 2 or 3", (version & 0xffffu) == 0 ? "a big-endian file" : "version " + std::to_string(version));
  version_ = static_cast<int>(version);
  const auto tensor_count = in.number<std::uint64_t>("the number of tensors");
  const auto pair_count = in.number<std::uint64_t>("the number of keys");
  if (tensor_count > in.left() / kLeastTensor)
    in.fail("at most " + std::to_string(in.left() / kLeastTensor) + " tensors in the rest of the file",
            std::to_string(tensor_count));
  if (pair_count > in.left() / kLeastPair)
    in.fail("at most " + std::to_string(in.left() / kLeastPair) + " keys in the rest of the file",
            std::to_string(pair_count));

  for (std::uint64_t i = 0; i < pair_count; ++i) {
    const std::string key = in.text("a key", kLongestKey);
    if (key.empty()) in.fail("a key that has a name", "an empty one");
    Value value;
    value.type = in.number<std::uint32_t>("a type");
    if (value.type >= kTypes)
      in.fail("a type of values from 0 to " + std::to_string(kTypes - 1),
              std::to_string(value.type) + " for the key " + key);
    if (value.type == kArray) {
      value.element = in.number<std::uint32_t>("a type");
      if (value.element >= kTypes || value.element == kArray)
        in.fail("an array of numbers or texts", "elements of type " + std::to_string(value.element) + " for " + key);
      value.count = in.number<std::uint64_t>("a length");
      const std::uint64_t least = value.element == kString ? 8 : kBytes[value.element];
      if (value.count > in.left() / least)
        in.fail("at most " + std::to_string(in.left() / least) + " elements in the rest of the file",
                std::to_string(value.count) + " for the key " + key);
    }
    value.begin = in.at();
    const std::uint32_t kind = value.type == kArray ? value.element : value.type;
    if (kind == kString)
      for (std::uint64_t e = 0; e < value.count; ++e) in.skip_text("a text");
    else
      in.take(value.count * kBytes[kind], "a value");
    if (kind == kBool)
      for (std::uint64_t e = 0; e < value.count; ++e)
        if (std::to_integer<int>(bytes[value.begin + e]) > 1) in.fail("0 or 1", "another byte for the key " + key);
    if (!values_.emplace(key, value).second) in.fail("every key once", "\"" + key + "\" twice");
    keys_.push_back(key);
  }

  std::uint64_t alignment = kDefaultAlignment;
  if (const Value* given = value("general.alignment")) {
    if (given->type != kUint32) wrong("general.alignment", "a 32-bit number without sign");
    alignment = load<std::uint32_t>(bytes.data() + given->begin);
    if (alignment == 0 || alignment > kMostAlignment || (alignment & (alignment - 1)) != 0)
      throw input_error(place("general.alignment"), "a power of two up to " + std::to_string(kMostAlignment),
                        std::to_string(alignment));
  }

  std::vector<std::uint64_t> offsets;
  for (std::uint64_t i = 0; i < tensor_count; ++i) {
    GgufView tensor;
    tensor.name = in.text("the name of a tensor", kLongestName);
    if (tensor.name.empty()) in.fail("a tensor that has a name", "an empty one");
    if (!by_name_.emplace(tensor.name, tensors_.size()).second)
      in.fail("every tensor once", "\"" + tensor.name + "\" twice");
    const auto dimensions = in.number<std::uint32_t>("a number of dimensions");
    if (dimensions == 0 || dimensions > kMostDimensions)
      in.fail("1 to 4 dimensions", std::to_string(dimensions) + " of " + tensor.name);
    tensor.shape.resize(dimensions);
    std::int64_t elements = 1;
    for (std::uint32_t d = 0; d < dimensions; ++d) {
      const auto size = in.number<std::int64_t>("a dimension");
      tensor.shape[dimensions - 1 - d] = size;
      if (size <= 0) in.fail("dimensions above 0", std::to_string(size) + " of " + tensor.name);
      if (__builtin_mul_overflow(elements, size, &elements) || elements > std::int64_t{1} << 56)
        in.fail("a tensor of at most 2^56 elements", "more of " + tensor.name);
    }
    const auto type = in.number<std::uint32_t>("a type");
    if (!is_ggml_type(type))
      in.fail("one of the types " + ggml_type_names(), "type " + std::to_string(type) + " of " + tensor.name,
              "llama-quantize makes a file of one of these types");
    tensor.type = static_cast<GgmlType>(type);
    if (tensor.shape.back() % ggml_block_values(tensor.type) != 0)
      in.fail("rows of whole blocks of " + std::to_string(ggml_block_values(tensor.type)),
              std::to_string(tensor.shape.back()) + " of " + tensor.name);
    offsets.push_back(in.number<std::uint64_t>("an offset"));
    tensors_.push_back(std::move(tensor));
  }

  // As ggml demands: tensors follow each other in the order of the header, each padded to the alignment.
  const std::uint64_t begin = aligned(in.at(), alignment);
  std::uint64_t offset = 0, end = tensors_.empty() ? in.at() : begin;
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    GgufView& tensor = tensors_[i];
    const std::string at = path.string() + ": " + tensor.name;
    if (offsets[i] != offset)
      throw input_error(at, "an offset of " + std::to_string(offset) + ", where the tensor before it ends",
                        std::to_string(offsets[i]), "tensors that overlap or leave gaps are refused");
    const std::uint64_t size = ggml_bytes(tensor.type, tensor.elements());
    if (begin > bytes.size() || offset > bytes.size() - begin || size > bytes.size() - begin - offset)
      throw input_error(at, std::to_string(size) + " bytes from byte " + std::to_string(begin + offset),
                        "a file of " + std::to_string(bytes.size()), "the file is cut off");
    tensor.data = bytes.subspan(begin + offset, size);
    end = begin + offset + size;
    offset += aligned(size, alignment);
  }
  if (bytes.size() - end >= alignment)
    throw input_error(path.string(), "a file that ends with its last tensor, at byte " + std::to_string(end),
                      std::to_string(bytes.size()) + " bytes");
}

const GgufView* GgufFile::find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &tensors_[found->second];
}

std::uint64_t GgufFile::tensor_bytes() const {
  std::uint64_t bytes = 0;
  for (const GgufView& tensor : tensors_) bytes += tensor.data.size();
  return bytes;
}

std::vector<std::string> GgufFile::keys() const {
  return keys_;
}

const GgufFile::Value* GgufFile::value(std::string_view key) const {
  const auto found = values_.find(key);
  return found == values_.end() ? nullptr : &found->second;
}

std::string GgufFile::place(std::string_view key) const {
  return path().string() + ": " + std::string(key);
}

void GgufFile::wrong(std::string_view key, const char* wanted) const {
  static constexpr const char* kNames[kTypes] = {"uint8", "int8",   "uint16", "int16",  "uint32", "int32",  "float32",
                                                 "bool",  "string", "array",  "uint64", "int64",  "float64"};
  const Value& found = *value(key);
  throw input_error(place(key), wanted,
                    found.type == kArray ? std::string("an array of ") + kNames[found.element] : kNames[found.type]);
}

std::optional<std::int64_t> GgufFile::integer(std::string_view key) const {
  const Value* found = value(key);
  if (found == nullptr) return std::nullopt;
  const auto out = whole(found->type, file_.bytes().data() + found->begin);
  if (!out) wrong(key, "a whole number");
  return out;
}

std::optional<double> GgufFile::number(std::string_view key) const {
  const Value* found = value(key);
  if (found == nullptr) return std::nullopt;
  const std::byte* at = file_.bytes().data() + found->begin;
  double out = 0;
  if (found->type == kFloat64) {
    out = load<double>(at);
  } else if (found->type == kFloat32) {
    out = shortest_double(load<float>(at));
  } else {
    const auto integer_value = whole(found->type, at);
    if (!integer_value) wrong(key, "a number");
    out = static_cast<double>(*integer_value);
  }
  if (!std::isfinite(out)) throw input_error(place(key), "a finite number", std::to_string(out));
  return out;
}

std::optional<bool> GgufFile::flag(std::string_view key) const {
  const Value* found = value(key);
  if (found == nullptr) return std::nullopt;
  if (found->type != kBool) wrong(key, "true or false");
  return std::to_integer<int>(file_.bytes()[found->begin]) != 0;
}

std::optional<std::string> GgufFile::text(std::string_view key) const {
  const Value* found = value(key);
  if (found == nullptr) return std::nullopt;
  if (found->type != kString) wrong(key, "a text");
  const std::byte* at = file_.bytes().data() + found->begin;
  std::string out(reinterpret_cast<const char*>(at + 8), load<std::uint64_t>(at));
  if (!tok::is_valid_utf8(out)) throw input_error(place(key), "a text in UTF-8", "other bytes");
  return out;
}

std::optional<std::vector<std::string>> GgufFile::texts(std::string_view key) const {
  const Value* found = value(key);
  if (found == nullptr) return std::nullopt;
  if (found->type != kArray || found->element != kString) wrong(key, "an array of texts");
  std::vector<std::string> out;
  out.reserve(found->count);
  const std::byte* at = file_.bytes().data() + found->begin;
  for (std::uint64_t i = 0; i < found->count; ++i) {
    const auto length = load<std::uint64_t>(at);
    out.emplace_back(reinterpret_cast<const char*>(at + 8), length);
    if (!tok::is_valid_utf8(out.back()))
      throw input_error(place(key), "texts in UTF-8", "other bytes in element " + std::to_string(i));
    at += 8 + length;
  }
  return out;
}

std::optional<std::vector<std::int64_t>> GgufFile::integers(std::string_view key) const {
  const Value* found = value(key);
  if (found == nullptr) return std::nullopt;
  if (found->type != kArray) wrong(key, "an array of whole numbers");
  std::vector<std::int64_t> out;
  out.reserve(found->count);
  const std::byte* at = file_.bytes().data() + found->begin;
  for (std::uint64_t i = 0; i < found->count; ++i) {
    const auto element = whole(found->element, at + i * kBytes[found->element]);
    if (!element) wrong(key, "an array of whole numbers");
    out.push_back(*element);
  }
  return out;
}

std::optional<std::vector<float>> GgufFile::numbers(std::string_view key) const {
  const Value* found = value(key);
  if (found == nullptr) return std::nullopt;
  if (found->type != kArray || found->element != kFloat32) wrong(key, "an array of float32");
  std::vector<float> out(found->count);
  if (!out.empty()) std::memcpy(out.data(), file_.bytes().data() + found->begin, out.size() * sizeof(float));
  return out;
}

bool GgufFile::is_array(std::string_view key) const {
  const Value* found = value(key);
  return found != nullptr && found->type == kArray;
}

std::uint64_t GgufFile::array_size(std::string_view key) const {
  return is_array(key) ? value(key)->count : 0;
}

Json GgufFile::shown(std::string_view key) const {
  constexpr std::uint64_t kFirst = 8;
  const Value* found = value(key);
  if (found == nullptr) return nullptr;
  const std::byte* at = file_.bytes().data() + found->begin;
  const auto element = [&](std::uint32_t type) -> Json {
    if (type == kString) {
      const auto length = load<std::uint64_t>(at);
      const std::string text = cut({reinterpret_cast<const char*>(at + 8), length});
      at += 8 + length;
      return tok::is_valid_utf8(text) ? Json(text) : Json("(" + std::to_string(length) + " bytes)");
    }
    const std::byte* here = at;
    at += kBytes[type];
    if (type == kBool) return std::to_integer<int>(*here) != 0;
    if (type == kFloat32) return shortest_double(load<float>(here));
    if (type == kFloat64) return load<double>(here);
    const auto out = whole(type, here);
    return out ? Json(*out) : Json(load<std::uint64_t>(here));
  };
  if (found->type != kArray) return element(found->type);
  Json first = Json::array();
  for (std::uint64_t i = 0; i < std::min(found->count, kFirst); ++i) first.push_back(element(found->element));
  return {{"elements", found->count}, {"first", std::move(first)}};
}

}  // namespace pare
