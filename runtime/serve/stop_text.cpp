#include "runtime/serve/stop_text.h"

#include <algorithm>

namespace pare::serve {

void StopText::push(const std::string& piece) {
  if (stopped_) return;
  const std::size_t from = settled_ - taken_;  // no stop string begins before
  held_ += piece;
  std::size_t first = std::string::npos;
  for (const std::string& stop : stops_) first = std::min(first, held_.find(stop, from));
  if (first != std::string::npos) {
    held_.resize(first);
    stopped_ = true;
    settled_ = length();
    return;
  }
  std::size_t open = 0;  // bytes at the end with which a stop string may begin
  for (const std::string& stop : stops_) {
    const std::string_view tail = std::string_view(held_).substr(from);
    for (std::size_t n = std::min(stop.size() - 1, tail.size()); n > open; --n)
      if (tail.ends_with(std::string_view(stop).substr(0, n))) open = n;
  }
  settled_ = length() - open;
}

void StopText::pass(const std::string& piece) {
  held_ += piece;
  settled_ = length();
}

void StopText::finish() {
  settled_ = length();
}

std::string StopText::take() {
  const std::size_t count = settled_ - taken_;
  std::string out = held_.substr(0, count);
  held_.erase(0, count);
  taken_ = settled_;
  return out;
}

}  // namespace pare::serve
