// What the evaluator needs of a model: logits of one window, row blocks on demand. The runtime, a LibTorch model and
// a cache all implement it, so one evaluator scores them all and streams two models side by side.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace pare {

class LogitsSource {
 public:
  virtual ~LogitsSource() = default;
  virtual std::string name() const = 0;
  virtual std::int64_t vocab_size() const = 0;
  // Starts a window at position 0 (causal). Invalidates rows of the previous window.
  virtual void begin(std::span<const std::int32_t> ids) = 0;
  // Rows [first, first + count) of the window: out is [count, vocab_size], row-major; row t predicts id t + 1.
  virtual void logits(std::int64_t first, std::int64_t count, float* out) = 0;
};

}  // namespace pare
