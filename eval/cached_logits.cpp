#include "eval/cached_logits.h"

namespace pare {

std::string windows_hash(std::span<const Window> windows) {
  Hasher hasher;
  for (const Window& window : windows) {
    const std::uint64_t n = window.ids.size();
    hasher.update(std::as_bytes(std::span(&n, 1)));
    hasher.update(std::as_bytes(std::span(window.ids)));
  }
  return hasher.hex();
}

}  // namespace pare
