#include "core/tokenizer_text.h"
#include "runtime/serve/served_model.h"

namespace pare::serve {
namespace {

int hexadecimal(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  return c >= 'A' && c <= 'F' ? c - 'A' + 10 : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

}  // namespace

std::string token_bytes(const Tokenizer& tokenizer, std::int32_t id) {
  const std::string piece = tokenizer.token(id);
  if (piece.empty() || tokenizer.is_special(id)) return piece;
  // Behind another token, as a decoder may change what begins a text. That one is given twice for the same reason.
  const std::int32_t before[] = {id, id, id};
  const std::string two = tokenizer.decode({before, 2}, false), three = tokenizer.decode(before, false);
  if (three.size() >= two.size() && three.find("\xEF\xBF\xBD") == std::string::npos) return three.substr(two.size());
  if (piece.size() == 6 && piece.starts_with("<0x") && hexadecimal(piece[3]) >= 0 && hexadecimal(piece[4]) >= 0)
    return {static_cast<char>(hexadecimal(piece[3]) * 16 + hexadecimal(piece[4]))};
  std::string bytes;
  for (std::size_t i = 0; i < piece.size();) {
    const int byte = tok::char_to_byte(tok::next_char(piece, i));
    if (byte < 0) return three.substr(std::min(two.size(), three.size()));
    bytes += static_cast<char>(byte);
  }
  return bytes;
}

}  // namespace pare::serve
