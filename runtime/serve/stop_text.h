// The text of one choice as it grows: given out as soon as no stop string can begin in it any more.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace pare::serve {

class StopText {
 public:
  explicit StopText(std::vector<std::string> stops) : stops_(std::move(stops)) {}
  // Appends whole characters; what the first stop string and everything behind it holds never comes out.
  void push(const std::string& piece);
  void pass(const std::string& piece);  // the same without a look for stop strings; only before the first push()
  void finish();  // nothing follows: what was held back comes out
  std::string take();
  bool stopped() const { return stopped_; }
  // Of the whole text, in bytes: what take() has given or would give, and all that was pushed.
  std::size_t settled() const { return settled_; }
  std::size_t length() const { return taken_ + held_.size(); }

 private:
  std::vector<std::string> stops_;
  std::string held_;         // not taken yet
  std::size_t taken_ = 0;    // bytes before held_
  std::size_t settled_ = 0;
  bool stopped_ = false;
};

}  // namespace pare::serve
