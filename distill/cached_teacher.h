// A teacher read from the logit cache instead of run again at every step. Include only from .cpp files (LibTorch).
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/context.h"
#include "eval/logit_cache.h"
#include "model/data.h"
#include "model/decoder.h"
#include "model/divergences.h"

namespace pare {

class CachedTeacher {
 public:
  // What is kept of each row: vocab_size (the ids that teacher and student share), context, top_k, samples,
  // temperature, seed. The hashes are filled in here. Opens the cache of exactly these windows and this teacher, or
  // makes it (one pass of the teacher over the text; a pass that was cut short goes on). Streams have the windows of
  // `pare eval`; of texts with responses each example is a window, of whose ids the responses alone are learned.
  // Errors: exit 3 when the file is of another text, teacher, tokenizer, temperature or context; exit 2 for weighted
  // texts, which a fixed set of windows cannot follow.
  CachedTeacher(const fs::path& file, LogitCacheInfo kept, const fs::path& teacher_folder,
                const std::vector<TextSpec>& specs, const TextForm& form, const Tokenizer& tokenizer, Decoder& teacher,
                const torch::Device& device, Context& run);

  Json summary() const;  // {"file", "state": "written" or "reused", "top_k", "samples", "ids", "bytes_per_id"}
  const TokenSource& source() const { return source_; }  // its windows are the cache's windows
  // sparse_distill_loss where the cache holds samples, else topk_distill_loss, of the rows of this batch.
  torch::Tensor loss(const torch::Tensor& rows, const OutputHead& head, const Batch& batch, const DistillLoss& weights,
                     double scale, LossSums* sums);

 private:
  void add_window(Window window, std::vector<Window>& windows);
  SparseTeacher sparse_rows(const Batch& batch);
  std::pair<torch::Tensor, torch::Tensor> listed_rows(const Batch& batch);  // index, log_prob [rows, k]
  fs::path file_;
  bool written_ = false;
  std::unique_ptr<LogitCacheReader> reader_;
  TokenSource source_;
};

}  // namespace pare
