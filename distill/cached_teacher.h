// A teacher read from the logit cache instead of run again at every step. Include only from .cpp files (LibTorch).
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/context.h"
#include "eval/logit_cache.h"
#include "model/data.h"
#include "model/decoder.h"

namespace pare {

class CachedTeacher {
 public:
  // Opens the cache of exactly these windows and this teacher, or makes it (one pass of the teacher over the text).
  // Errors: exit 3 when the file is of another text, teacher or context; exit 2 for weighted texts, which a fixed
  // set of windows cannot follow.
  CachedTeacher(const fs::path& file, const fs::path& teacher_folder, const std::vector<TextSpec>& specs,
                const std::optional<std::string>& split, const Tokenizer& tokenizer, Decoder& teacher,
                std::int64_t context, std::int64_t top_k, const torch::Device& device, Context& run);

  const TokenSource& source() const { return source_; }  // its windows are the cache's windows
  // index int64 and log_prob float, both [sequences * context, k]; rows without a target hold placeholders.
  std::pair<torch::Tensor, torch::Tensor> rows(const Batch& batch, const torch::Device& device);

 private:
  std::unique_ptr<LogitCacheReader> reader_;
  TokenSource source_;
};

}  // namespace pare
