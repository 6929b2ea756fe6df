#include "core/gguf.h"

#include <bit>
#include <cstring>
#include <set>
#include <stdexcept>

#include "core/error.h"

namespace pare {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr std::uint64_t kAlignment = 32;  // the format's default, so it needs no key
constexpr std::int64_t kBlock = 32;
constexpr std::size_t kLongestName = 63;

// Type numbers of key-value pairs.
enum ValueType : std::int32_t { kUint32 = 4, kInt32 = 5, kFloat32 = 6, kBool = 7, kString = 8, kArray = 9 };

class Bytes {
 public:
  template <class T>
  void number(T value) {
    const auto* from = reinterpret_cast<const char*>(&value);
    text_.append(from, sizeof value);
  }
  void string(std::string_view text) {
    number(static_cast<std::uint64_t>(text.size()));
    text_.append(text);
  }
  void pad() { text_.append((kAlignment - text_.size() % kAlignment) % kAlignment, '\0'); }
  const std::string& text() const { return text_; }

  void operator()(std::uint32_t v) { number<std::int32_t>(kUint32), number(v); }
  void operator()(std::int32_t v) { number<std::int32_t>(kInt32), number(v); }
  void operator()(float v) { number<std::int32_t>(kFloat32), number(v); }
  void operator()(bool v) { number<std::int32_t>(kBool), number<std::uint8_t>(v ? 1 : 0); }
  void operator()(const std::string& v) { number<std::int32_t>(kString), string(v); }
  void operator()(const std::vector<std::string>& v) {
    array(kString, v.size());
    for (const std::string& text : v) string(text);
  }
  void operator()(const std::vector<std::int32_t>& v) {
    array(kInt32, v.size());
    for (const std::int32_t number_ : v) number(number_);
  }
  void operator()(const std::vector<float>& v) {
    array(kFloat32, v.size());
    for (const float number_ : v) number(number_);
  }

 private:
  void array(ValueType type, std::size_t count) {
    number<std::int32_t>(kArray), number<std::int32_t>(type), number(static_cast<std::uint64_t>(count));
  }
  std::string text_;
};

std::uint64_t aligned(std::uint64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

float minimum(const QuantizedTensor& tensor, std::size_t group) {
  if (!tensor.minima.empty()) return f16_to_f32(tensor.minima[group]);
  return -static_cast<float>(tensor.zeros[group]) * f16_to_f32(tensor.scales[group]);
}

}  // namespace

std::uint64_t GgufTensor::bytes() const {
  std::int64_t values = 1;
  for (const std::int64_t size : shape) values *= size;
  return ggml_bytes(type, values);
}

GgufWriter::GgufWriter(fs::path path, const std::vector<std::pair<std::string, GgufValue>>& metadata,
                       std::vector<GgufTensor> tensors)
    : path_(std::move(path)), file_(path_), tensors_(std::move(tensors)) {
  Bytes header;
  header.number<std::uint32_t>(0x46554747);  // "GGUF"
  header.number<std::uint32_t>(3);
  header.number(static_cast<std::int64_t>(tensors_.size()));
  header.number(static_cast<std::int64_t>(metadata.size()));
  std::set<std::string> names;
  for (const auto& [key, value] : metadata) {
    if (key.empty() || !names.insert(key).second) throw std::logic_error("GGUF key " + key);
    header.string(key);
    std::visit(header, value);
  }
  names.clear();
  std::uint64_t offset = 0;
  for (const GgufTensor& tensor : tensors_) {
    if (tensor.name.size() > kLongestName || !names.insert(tensor.name).second || tensor.shape.empty() ||
        tensor.shape.size() > 4 || tensor.shape.back() % ggml_block_values(tensor.type) != 0)
      throw std::logic_error("GGUF tensor " + tensor.name);
    header.string(tensor.name);
    header.number(static_cast<std::uint32_t>(tensor.shape.size()));
    for (auto size = tensor.shape.rbegin(); size != tensor.shape.rend(); ++size) header.number(*size);
    header.number(static_cast<std::uint32_t>(tensor.type));
    header.number(offset);
    offset += aligned(tensor.bytes());
  }
  header.pad();
  file_.write(header.text());
}

void GgufWriter::pad() {
  static constexpr std::byte kZeros[kAlignment] = {};
  file_.write(std::span(kZeros).first(aligned(in_tensor_) - in_tensor_));
}

void GgufWriter::write(std::span<const std::byte> bytes) {
  if (current_ == tensors_.size() || in_tensor_ + bytes.size() > tensors_[current_].bytes())
    throw std::logic_error("GgufWriter: more bytes than the tensors declare");
  file_.write(bytes);
  in_tensor_ += bytes.size();
  if (in_tensor_ < tensors_[current_].bytes()) return;
  pad();
  in_tensor_ = 0;
  ++current_;
}

void GgufWriter::finish() {
  if (current_ != tensors_.size())
    throw std::logic_error("GgufWriter: bytes of " + tensors_[current_].name + " are missing");
  if (fs::exists(fs::symlink_status(path_)))
    throw usage_error(path_.string(), "an output that does not exist yet", "one that appeared meanwhile");
  file_.commit();
}

bool minima_are_halves(const QuantizedTensor& tensor) {
  for (std::size_t i = 0; i < tensor.zeros.size(); ++i) {
    const float value = minimum(tensor, i);
    if (f16_to_f32(f32_to_f16(value)) != value) return false;
  }
  return true;
}

void pack_ggml_row(GgmlType type, const QuantizedTensor& tensor, std::int64_t row, std::byte* out) {
  const std::int64_t groups = tensor.codec.groups(tensor.cols), width = tensor.cols / groups;
  const auto half = [&](std::uint16_t bits) {
    std::memcpy(out, &bits, 2);
    out += 2;
  };
  for (std::int64_t first = 0; first < tensor.cols; first += kBlock) {
    const std::int8_t* codes = tensor.codes.data() + row * tensor.cols + first;
    const auto group = static_cast<std::size_t>(row * groups + first / width);
    half(tensor.scales[group]);
    if (type == GgmlType::kQ8_0) {
      std::memcpy(out, codes, kBlock);
      out += kBlock;
      continue;
    }
    if (type == GgmlType::kQ4_1) half(f32_to_f16(minimum(tensor, group)));
    const int shift = type == GgmlType::kQ4_0 ? 8 : 0;
    for (std::int64_t i = 0; i < kBlock / 2; ++i)
      *out++ = static_cast<std::byte>((codes[i] + shift) | ((codes[i + kBlock / 2] + shift) << 4));
  }
}

}  // namespace pare
