// The parts of sentencepiece's protocol buffer that its library keeps to itself. Every length is checked before use.
#include <bit>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "core/tokenizer_file.h"
#include "core/tokenizer_sentencepiece.h"
#include "core/tokenizer_text.h"

namespace pare::tok {
namespace {

constexpr std::size_t kMaxPieceBytes = 1024;  // the longest in use have about 100

enum class Wire : std::uint32_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

// One message: a run of fields inside the file. Unknown fields are skipped, as protocol buffers want it.
class Message {
 public:
  Message(std::string_view bytes, std::size_t offset, const std::string& place)
      : bytes_(bytes), offset_(offset), place_(place) {}

  // Moves to the next field; false at the end. The accessors then give its value.
  bool next() {
    if (at_ == bytes_.size()) return false;
    field_at_ = at_;
    const std::uint64_t key = varint();
    number_ = key >> 3;
    wire_ = static_cast<Wire>(key & 7);
    if (number_ == 0 || number_ >= (1u << 29)) refuse("a field number", std::to_string(number_));
    switch (wire_) {
      case Wire::kVarint: value_ = varint(); break;
      case Wire::kFixed64: value_ = 0, take(8); break;
      case Wire::kFixed32: {
        std::uint32_t word = 0;
        std::memcpy(&word, take(4).data(), 4);
        value_ = word;
        break;
      }
      case Wire::kBytes: {
        const std::uint64_t length = varint();
        body_at_ = at_;
        body_ = take(length);
        break;
      }
      default: refuse("a wire type of protocol buffers (0, 1, 2, 5)", std::to_string(key & 7));
    }
    return true;
  }

  std::uint64_t number() const { return number_; }
  std::string_view body() const { return need(Wire::kBytes), body_; }
  Message message() const { return need(Wire::kBytes), Message(body_, offset_ + body_at_, place_); }
  std::uint64_t integer() const { return need(Wire::kVarint), value_; }
  bool flag() const { return integer() != 0; }
  float number_f32() const { return need(Wire::kFixed32), std::bit_cast<float>(static_cast<std::uint32_t>(value_)); }

  [[noreturn]] void refuse(const std::string& expected, const std::string& found) const {
    throw input_error(place_ + ": byte " + std::to_string(offset_ + field_at_), expected, found,
                      "the file is damaged or not a sentencepiece model");
  }

 private:
  void need(Wire wire) const {
    if (wire_ != wire)
      refuse("field " + std::to_string(number_) + " with wire type " + std::to_string(static_cast<int>(wire)),
             std::to_string(static_cast<int>(wire_)));
  }
  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 70; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      if (shift == 63 && byte > 1) break;
      value |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
    refuse("a number of at most 64 bits", "a longer one");
  }
  std::string_view take(std::uint64_t length) {
    if (length > bytes_.size() - at_)
      refuse(std::to_string(length) + " more bytes", "the end after " + std::to_string(bytes_.size() - at_));
    const std::string_view out = bytes_.substr(at_, static_cast<std::size_t>(length));
    at_ += static_cast<std::size_t>(length);
    return out;
  }

  std::string_view bytes_, body_;
  std::size_t offset_, at_ = 0, field_at_ = 0, body_at_ = 0;
  const std::string& place_;
  std::uint64_t number_ = 0, value_ = 0;
  Wire wire_ = Wire::kVarint;
};

template <class Enum>
Enum enumerator(const Message& field, std::uint64_t last, const char* what) {
  const std::uint64_t value = field.integer();
  if (value < 1 || value > last)
    field.refuse(std::string(what) + " from 1 to " + std::to_string(last), std::to_string(value));
  return static_cast<Enum>(value);
}

PieceType read_piece(Message piece, const Message& outer) {
  PieceType type = PieceType::kNormal;
  std::string_view text;
  while (piece.next()) {
    if (piece.number() == 1) text = piece.body();
    if (piece.number() == 2 && !std::isfinite(piece.number_f32())) piece.refuse("a finite score", "another value");
    if (piece.number() == 3) type = enumerator<PieceType>(piece, 6, "a type of piece");
  }
  if (text.empty()) outer.refuse("a piece of at least one character", "an empty one");
  if (text.size() > kMaxPieceBytes)
    outer.refuse("pieces of at most " + std::to_string(kMaxPieceBytes) + " bytes", std::to_string(text.size()));
  if (!is_valid_utf8(text)) outer.refuse("a piece in UTF-8", "other bytes");
  // The library's table of such symbols ends a key at its first zero.
  if (type == PieceType::kUserDefined && text.find('\0') != std::string_view::npos)
    outer.refuse("a user-defined symbol without the character 0", "one with it");
  return type;
}

void read_trainer(Message trainer, SpmSpec& spec) {
  while (trainer.next()) {
    if (trainer.number() == 3) spec.model_type = enumerator<SpmModelType>(trainer, 4, "a model type");
    if (trainer.number() == 24) spec.treat_whitespace_as_suffix = trainer.flag();
    if (trainer.number() == 35) spec.byte_fallback = trainer.flag();
  }
}

void read_normalizer(Message rules, SpmSpec& spec) {
  while (rules.next()) {
    if (rules.number() == 1) spec.normalizer_name = std::string(rules.body());
    if (rules.number() == 2) spec.charsmap_bytes = rules.body().size();
    if (rules.number() == 3) spec.add_dummy_prefix = rules.flag();
    if (rules.number() == 4) spec.remove_extra_whitespaces = rules.flag();
    if (rules.number() == 5) spec.escape_whitespaces = rules.flag();
  }
}

}  // namespace

SpmSpec read_spm_spec(std::string_view bytes, const std::string& place) {
  SpmSpec spec;
  Message model(bytes, 0, place);
  while (model.next()) {
    if (model.number() == 1) {
      if (spec.types.size() > static_cast<std::size_t>(kMaxId))
        model.refuse("at most " + std::to_string(kMaxId + 1) + " pieces", "more");
      spec.types.push_back(read_piece(model.message(), model));
    }
    if (model.number() == 2) read_trainer(model.message(), spec);
    if (model.number() == 3) read_normalizer(model.message(), spec);
    if (model.number() == 5) {
      Message rules = model.message();
      while (rules.next())
        if (rules.number() == 2) spec.denormalizer_bytes = rules.body().size();
    }
  }
  if (spec.types.empty()) throw input_error(place, "a sentencepiece model with pieces", "none in it");
  if (!is_valid_utf8(spec.normalizer_name)) spec.normalizer_name = replace_invalid_utf8(spec.normalizer_name);
  return spec;
}

}  // namespace pare::tok
