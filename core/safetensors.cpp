#include "core/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <set>

#include "core/codec.h"
#include "core/error.h"

namespace pare {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors data is little endian and read in place");

constexpr std::uint64_t kMaxHeader = 100'000'000;  // limit of the reference reader
constexpr std::uint64_t kDataAlignment = 64;

struct DTypeRow {
  const char* name;
  int bits;
};
// In the order of DType.
constexpr std::array<DTypeRow, 22> kDTypes = {{{"BOOL", 8},   {"U8", 8},          {"I8", 8},          {"F8_E5M2", 8},
                                               {"F8_E4M3", 8}, {"F8_E8M0", 8},     {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8},
                                               {"I16", 16},   {"U16", 16},        {"F16", 16},        {"BF16", 16},
                                               {"I32", 32},   {"U32", 32},        {"F32", 32},        {"F64", 64},
                                               {"I64", 64},   {"U64", 64},        {"C64", 64},        {"F4", 4},
                                               {"F6_E2M3", 6}, {"F6_E3M2", 6}}};
static_assert(static_cast<std::size_t>(DType::kF6E3M2) + 1 == kDTypes.size());

struct HeaderEntry {
  std::string name, dtype;
  std::vector<std::uint64_t> shape, offsets;
  bool has_dtype = false, has_shape = false, has_offsets = false;
};

// Reads the header grammar directly: an object of {dtype, shape, data_offsets} objects and one map of strings.
// Tensor counts reach hundreds of thousands, so no document tree is built.
class HeaderReader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderReader(std::string place) : place_(std::move(place)) {}

  std::vector<HeaderEntry> entries;
  std::map<std::string, std::string> metadata;

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_integer(number_integer_t value) override { return unexpected("the number " + std::to_string(value)); }
  bool number_float(number_float_t, const string_t& text) override { return unexpected("the number " + text); }
  bool binary(binary_t&) override { return unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (state_ == State::kShape) entries.back().shape.push_back(value);
    else if (state_ == State::kOffsets) entries.back().offsets.push_back(value);
    else return unexpected("the number " + std::to_string(value));
    return true;
  }

  bool string(string_t& value) override {
    if (state_ == State::kMetadata) {
      metadata[key_] = value;
    } else if (state_ == State::kTensor && key_ == "dtype") {
      entries.back().dtype = value;
    } else {
      return unexpected("the text \"" + value.substr(0, 60) + "\"");
    }
    return true;
  }

  bool start_object(std::size_t) override {
    if (state_ == State::kStart) {
      state_ = State::kRoot;
    } else if (state_ == State::kRoot && key_ == "__metadata__") {
      state_ = State::kMetadata;
    } else if (state_ == State::kRoot) {
      state_ = State::kTensor;
      entries.emplace_back();
      entries.back().name = key_;
    } else {
      return unexpected("an object");
    }
    return true;
  }

  bool key(string_t& value) override {
    key_ = value;
    if (state_ == State::kRoot) {
      if (!root_keys_.insert(value).second) duplicate(value);
    } else if (state_ == State::kMetadata) {
      if (metadata.contains(value)) duplicate(value);
    } else {
      HeaderEntry& entry = entries.back();
      bool* seen = value == "dtype"          ? &entry.has_dtype
                   : value == "shape"        ? &entry.has_shape
                   : value == "data_offsets" ? &entry.has_offsets
                                             : nullptr;
      if (seen == nullptr)
        throw input_error(place_ + ": tensor " + entry.name, "the keys dtype, shape and data_offsets",
                          "the key \"" + value.substr(0, 60) + "\"");
      if (*seen) duplicate(entry.name + "." + value);
      *seen = true;
    }
    return true;
  }

  bool end_object() override {
    if (state_ == State::kTensor) {
      const HeaderEntry& entry = entries.back();
      if (!entry.has_dtype || !entry.has_shape || !entry.has_offsets || entry.offsets.size() != 2)
        throw input_error(place_ + ": tensor " + entry.name, "dtype, shape and two data_offsets", "an incomplete entry");
      state_ = State::kRoot;
    } else if (state_ == State::kMetadata) {
      state_ = State::kRoot;
    } else {
      state_ = State::kEnd;
    }
    return true;
  }

  bool start_array(std::size_t) override {
    if (state_ == State::kTensor && key_ == "shape") state_ = State::kShape;
    else if (state_ == State::kTensor && key_ == "data_offsets") state_ = State::kOffsets;
    else return unexpected("a list");
    return true;
  }
  bool end_array() override {
    state_ = State::kTensor;
    return true;
  }

  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& problem) override {
    throw input_error(place_, "a header of valid JSON", problem.what());
  }

 private:
  enum class State { kStart, kRoot, kTensor, kShape, kOffsets, kMetadata, kEnd };

  [[noreturn]] bool unexpected(const std::string& found) const {
    std::string where = place_ + ": header";
    std::string expected = "an object of tensors";
    if (state_ == State::kMetadata) {
      where += " __metadata__." + key_;
      expected = "a text";
    } else if (state_ == State::kTensor || state_ == State::kShape || state_ == State::kOffsets) {
      where += " " + entries.back().name + "." + key_;
      expected = key_ == "dtype" ? "a dtype name" : "a list of whole numbers";
    } else if (state_ == State::kRoot) {
      where += " " + key_;
      expected = "an object";
    }
    throw input_error(where, expected, found);
  }
  [[noreturn]] void duplicate(const std::string& key) const {
    throw input_error(place_, "every key once", "\"" + key + "\" twice in the header",
                      "the file is ambiguous; write it again with its own tool");
  }

  std::string place_, key_;
  State state_ = State::kStart;
  std::set<std::string> root_keys_;
};

// False on overflow.
bool multiply(std::uint64_t a, std::uint64_t b, std::uint64_t& product) {
  return !__builtin_mul_overflow(a, b, &product);
}

std::string range_text(std::uint64_t begin, std::uint64_t end) {
  return "[" + std::to_string(begin) + ", " + std::to_string(end) + ")";
}

std::string json_text(const std::string& text, const std::string& place) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    throw input_error(place, "valid UTF-8", "other bytes in a tensor name or metadata text");
  }
}

}  // namespace

int dtype_bits(DType dtype) { return kDTypes[static_cast<std::size_t>(dtype)].bits; }
const char* dtype_name(DType dtype) { return kDTypes[static_cast<std::size_t>(dtype)].name; }

DType parse_dtype(std::string_view name, const std::string& place) {
  for (std::size_t i = 0; i < kDTypes.size(); ++i)
    if (name == kDTypes[i].name) return static_cast<DType>(i);
  throw input_error(place, "a safetensors dtype such as F32, F16 or BF16", "\"" + std::string(name) + "\"");
}

std::int64_t TensorView::elements() const {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count *= size;
  return count;
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

void to_f32(const TensorView& view, std::int64_t first, std::int64_t count, float* out) {
  if (first < 0 || count < 0 || first + count > view.elements())
    throw std::logic_error("to_f32: range outside of " + view.name);
  if (count == 0) return;
  const auto width = static_cast<std::size_t>(dtype_bits(view.dtype)) / 8;
  const std::byte* from = view.data.data() + static_cast<std::size_t>(first) * width;
  const auto n = static_cast<std::size_t>(count);
  switch (view.dtype) {
    case DType::kF32:
      std::memcpy(out, from, n * sizeof(float));
      return;
    case DType::kF64:
      for (std::size_t i = 0; i < n; ++i) {
        double value;
        std::memcpy(&value, from + i * sizeof value, sizeof value);
        out[i] = static_cast<float>(value);
      }
      return;
    case DType::kF16:
    case DType::kBF16: {
      const bool half = view.dtype == DType::kF16;
      for (std::size_t i = 0; i < n; ++i) {
        std::uint16_t bits;
        std::memcpy(&bits, from + i * sizeof bits, sizeof bits);
        out[i] = half ? f16_to_f32(bits) : bf16_to_f32(bits);
      }
      return;
    }
    default:
      throw input_error("tensor " + view.name, "F32, F16, BF16 or F64", dtype_name(view.dtype));
  }
}

SafetensorsFile::SafetensorsFile(const fs::path& path) : file_(path) {
  const std::string place = path.string();
  const auto bytes = file_.bytes();
  if (bytes.size() < 8)
    throw input_error(place, "a safetensors file", std::to_string(bytes.size()) + " bytes", "the file is cut off");
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  if (length > kMaxHeader)
    throw input_error(place, "a header of at most 100000000 bytes", std::to_string(length) + " bytes",
                      "this is not a safetensors file");
  if (length > bytes.size() - 8)
    throw input_error(place, "a header of " + std::to_string(length) + " bytes",
                      std::to_string(bytes.size() - 8) + " bytes after the length", "the file is cut off");
  const char* text = reinterpret_cast<const char*>(bytes.data()) + 8;
  if (length == 0 || text[0] != '{')
    throw input_error(place, "a header that begins with {", length == 0 ? "an empty header" : "something else",
                      "this is not a safetensors file");

  HeaderReader reader(place);
  nlohmann::json::sax_parse(text, text + length, &reader);
  metadata_ = std::move(reader.metadata);
  auto& entries = reader.entries;
  std::stable_sort(entries.begin(), entries.end(),
                   [](const HeaderEntry& a, const HeaderEntry& b) { return a.offsets < b.offsets; });

  data_begin_ = 8 + length;
  const std::uint64_t available = bytes.size() - data_begin_;
  std::uint64_t position = 0;
  tensors_.reserve(entries.size());
  for (auto& entry : entries) {
    const std::string where = place + ": tensor " + entry.name;
    const std::uint64_t begin = entry.offsets[0], end = entry.offsets[1];
    if (begin != position)
      throw input_error(where, "data_offsets that begin at " + std::to_string(position), range_text(begin, end),
                        begin < position ? "two tensors overlap" : "there is a hole between tensors");
    if (end < begin) throw input_error(where, "data_offsets with begin <= end", range_text(begin, end));
    const DType dtype = parse_dtype(entry.dtype, where);
    TensorView view;
    std::uint64_t elements = 1, bits = 0;
    bool fits = true;
    for (const std::uint64_t size : entry.shape) {
      fits = fits && size <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()) &&
             multiply(elements, size, elements);
      view.shape.push_back(static_cast<std::int64_t>(size));
    }
    if (!fits || !multiply(elements, static_cast<std::uint64_t>(dtype_bits(dtype)), bits))
      throw input_error(where, "a shape whose size fits 64 bits", "an overflowing one");
    if (bits % 8 != 0)
      throw input_error(where, "whole bytes", std::to_string(bits) + " bits of " + entry.dtype);
    if (end - begin != bits / 8)
      throw input_error(where, std::to_string(bits / 8) + " bytes for its shape and dtype",
                        std::to_string(end - begin) + " bytes in data_offsets");
    if (end > available)
      throw input_error(where, "data up to byte " + std::to_string(end),
                        std::to_string(available) + " bytes of data in the file", "the file is cut off");
    view.name = std::move(entry.name);
    view.dtype = dtype;
    view.data = bytes.subspan(data_begin_ + begin, end - begin);
    by_name_.emplace(view.name, tensors_.size());
    tensors_.push_back(std::move(view));
    position = end;
  }
  if (position != available)
    throw input_error(place, std::to_string(position) + " bytes of data as the header says",
                      std::to_string(available) + " bytes",
                      position < available ? "bytes follow the last tensor" : "the file is cut off");
}

const TensorView* SafetensorsFile::find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &tensors_[found->second];
}

std::uint64_t TensorDecl::bytes() const {
  std::uint64_t count = 1;
  for (const std::int64_t size : shape) count *= static_cast<std::uint64_t>(size);
  return count * static_cast<std::uint64_t>(dtype_bits(dtype)) / 8;
}

std::string safetensors_header(const std::vector<TensorDecl>& tensors, const std::map<std::string, std::string>& metadata,
                               std::size_t reserve) {
  std::string json = "{";
  if (!metadata.empty()) {
    json += "\"__metadata__\":{";
    bool first = true;
    for (const auto& [key, value] : metadata) {
      if (!first) json += ',';
      first = false;
      json += json_text(key, "__metadata__") + ":" + json_text(value, "__metadata__." + key);
    }
    json += '}';
  }
  std::uint64_t position = 0;
  for (const TensorDecl& tensor : tensors) {
    if (json.size() > 1) json += ',';
    json += json_text(tensor.name, "tensor") + ":{\"dtype\":\"" + dtype_name(tensor.dtype) + "\",\"shape\":[";
    for (std::size_t i = 0; i < tensor.shape.size(); ++i)
      json += (i == 0 ? "" : ",") + std::to_string(tensor.shape[i]);
    const std::uint64_t end = position + tensor.bytes();
    json += "],\"data_offsets\":[" + std::to_string(position) + "," + std::to_string(end) + "]}";
    position = end;
  }
  json += '}';
  const std::size_t least = std::max(json.size(), reserve) + 8;
  json.append((least + kDataAlignment - 1) / kDataAlignment * kDataAlignment - 8 - json.size(), ' ');
  if (json.size() > kMaxHeader)
    throw failure("safetensors header", "at most 100000000 bytes", std::to_string(json.size()) + " bytes");
  const std::uint64_t length = json.size();
  std::string header(8, '\0');
  std::memcpy(header.data(), &length, 8);
  return header + json;
}

SafetensorsWriter::SafetensorsWriter(fs::path path, std::vector<TensorDecl> tensors,
                                     const std::map<std::string, std::string>& metadata)
    : file_(path), path_(std::move(path)) {
  std::set<std::string_view> names;
  for (const TensorDecl& tensor : tensors)
    if (!names.insert(tensor.name).second) throw std::logic_error("SafetensorsWriter: " + tensor.name + " twice");
  file_.write(std::string_view(safetensors_header(tensors, metadata)));
  expected_ = file_.size();
  for (const TensorDecl& tensor : tensors) expected_ += tensor.bytes();
}

void SafetensorsWriter::write(std::span<const std::byte> bytes) {
  if (bytes.size() > expected_ - file_.size())
    throw std::logic_error("SafetensorsWriter: more data than declared for " + path_.string());
  file_.write(bytes);
}

void SafetensorsWriter::finish() {
  if (file_.size() != expected_)
    throw std::logic_error("SafetensorsWriter: less data than declared for " + path_.string());
  file_.commit();
}

ShardedTensors::ShardedTensors(const fs::path& folder) {
  const fs::path single = folder / "model.safetensors";
  const fs::path index_path = folder / "model.safetensors.index.json";
  if (fs::exists(single)) {
    files_.push_back(std::make_shared<SafetensorsFile>(single));
    for (const TensorView& view : files_.back()->tensors()) by_name_.emplace(view.name, &view);
    return;
  }
  const std::string place = index_path.string();
  if (!fs::exists(index_path))
    throw input_error(folder.string(), "model.safetensors or model.safetensors.index.json", "neither",
                      "weights in other formats (.bin, .gguf) have to be saved as safetensors first");

  // Parsed into a sorted map: the ordered one looks keys up linearly.
  nlohmann::json weight_map;
  {
    const std::string text = read_text(index_path);
    std::vector<std::set<std::string>> keys;
    const auto strict = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
      using Event = nlohmann::json::parse_event_t;
      if ((event == Event::object_start || event == Event::array_start) && depth > 8)
        throw input_error(place, "an index of shards", "deeper nesting");
      if (event == Event::object_start) keys.emplace_back();
      else if (event == Event::object_end) keys.pop_back();
      else if (event == Event::key && !keys.back().insert(parsed.get<std::string>()).second)
        throw input_error(place, "every key once", "\"" + parsed.get<std::string>() + "\" twice");
      return true;
    };
    try {
      const auto index = nlohmann::json::parse(text, strict);
      if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object())
        throw input_error(place, "an object with weight_map", "something else");
      weight_map = index["weight_map"];
    } catch (const nlohmann::json::exception& problem) {
      throw input_error(place, "valid JSON", problem.what());
    }
  }

  std::map<std::string, std::shared_ptr<SafetensorsFile>> shards;
  std::map<std::string, const SafetensorsFile*> of_name;
  std::string problems;
  for (const auto& [name, file] : weight_map.items()) {
    if (!file.is_string())
      throw input_error(place + ": weight_map." + name, "a file name", file.type_name());
    const auto text = file.get<std::string>();
    if (text.empty() || text.find_first_of("/\\") != std::string::npos || text.find('\0') != std::string::npos ||
        text == "." || text == "..")
      throw input_error(place + ": weight_map." + name, "a plain file name inside the folder", "\"" + text + "\"");
    auto& shard = shards[text];
    if (!shard) {
      if (!fs::exists(folder / text)) {
        throw input_error(place, "the shard " + text, "no such file", "the download is incomplete");
      }
      shard = std::make_shared<SafetensorsFile>(folder / text);
    }
    const TensorView* view = shard->find(name);
    if (view == nullptr) {
      problems += (problems.empty() ? "" : "; ") + name + " is not in " + text;
      continue;
    }
    by_name_.emplace(name, view);
    of_name.emplace(name, shard.get());
  }
  for (const auto& [text, shard] : shards) {
    for (const TensorView& view : shard->tensors()) {
      const auto found = of_name.find(view.name);
      if (found == of_name.end()) problems += (problems.empty() ? "" : "; ") + view.name + " of " + text + " is not in the index";
      else if (found->second != shard.get()) problems += (problems.empty() ? "" : "; ") + view.name + " is also in " + text;
    }
    files_.push_back(shard);
  }
  if (!problems.empty()) throw input_error(place, "an index that agrees with its shards", problems);
}

const TensorView* ShardedTensors::find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : found->second;
}

std::vector<std::string> ShardedTensors::names() const {
  std::vector<std::string> names;
  names.reserve(by_name_.size());
  for (const auto& [name, view] : by_name_) names.push_back(name);
  return names;
}

}  // namespace pare
