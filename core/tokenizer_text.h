// Unicode text as the tokenizer sees it: valid UTF-8, walked by code point.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace pare::tok {

// Code point at byte i of valid UTF-8; moves i behind it.
inline char32_t next_char(std::string_view text, std::size_t& i) {
  const auto byte = [&](std::size_t k) { return static_cast<unsigned char>(text[k]); };
  const unsigned char lead = byte(i);
  if (lead < 0x80) return static_cast<char32_t>(text[i++]);
  if (lead < 0xE0) {
    i += 2;
    return ((lead & 0x1Fu) << 6) | (byte(i - 1) & 0x3Fu);
  }
  if (lead < 0xF0) {
    i += 3;
    return ((lead & 0x0Fu) << 12) | ((byte(i - 2) & 0x3Fu) << 6) | (byte(i - 1) & 0x3Fu);
  }
  i += 4;
  return ((lead & 0x07u) << 18) | ((byte(i - 3) & 0x3Fu) << 12) | ((byte(i - 2) & 0x3Fu) << 6) | (byte(i - 1) & 0x3Fu);
}

// Bytes of the UTF-8 sequence that `lead` begins.
inline std::size_t char_length(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

void append_char(std::string& out, char32_t code);

bool is_valid_utf8(std::string_view text);
// Each maximal ill-formed subpart becomes one U+FFFD (Unicode 15 section 3.9, as Python and Rust do).
std::string replace_invalid_utf8(std::string_view text);
// Bytes at the end that may still become one valid character when more bytes follow (0..3).
std::size_t incomplete_tail(std::string_view text);

bool is_whitespace(char32_t code);  // property White_Space
bool is_numeric(char32_t code);     // Nd, Nl, No
bool is_mark(char32_t code);        // Mn, Mc, Me
bool is_punctuation(char32_t code); // ASCII punctuation or category P*
bool is_word(char32_t code);        // \w of Unicode regular expressions (UTS 18 annex C)

// GPT-2's printable stand-in of each byte, as UTF-8, and back (-1: not one of the 256).
std::string_view byte_to_piece(unsigned char byte);
int char_to_byte(char32_t code);

}  // namespace pare::tok
