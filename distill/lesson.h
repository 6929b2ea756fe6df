// What a student learns at each step: from the teacher itself or its cache, from the text or from the student's own
// continuations, from the predictions alone or from hidden states too. Include only from .cpp files (LibTorch).
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "core/context.h"
#include "core/options.h"
#include "distill/cached_teacher.h"
#include "distill/matching.h"
#include "model/divergences.h"
#include "model/trainer.h"

namespace pare {

std::vector<OptionDecl> lesson_options();  // the objective's, --hidden-*, --attention-weight, --on-policy*, --cache*
// Combinations that cannot work, found before any weight is read. Errors: exit 2.
void check_lesson(const Options& options);

class Lesson {
 public:
  // vocab: the ids that both models share, the first of each head; predictions are compared over these. The teacher
  // takes no gradient from here on. settings: of the training. Errors: exit 2 for layers that do not exist.
  Lesson(const Options& options, Decoder teacher, Decoder student, std::int64_t vocab, const TrainerSettings& settings,
         std::uint64_t seed);
  // The training texts; where a cache is asked for, its windows, which are made first where the file is absent.
  std::vector<TokenSource> sources(const fs::path& teacher_folder, const std::vector<TextSpec>& specs,
                                   const TextForm& form, const Tokenizer& tokenizer, Context& run);
  // Sets the job's prepare, loss and companions, which hold on to this object.
  void give(TrainingJob& job);
  const CachedTeacher* cache() const { return cache_.get(); }  // nullptr: the teacher is run
  // KL(teacher || student) at temperature 1.
  MeanLoss divergence(const HeldOut& held_out, Ranks& ranks);

 private:
  OutputHead head(Decoder& decoder) const;
  torch::Tensor loss(const Batch& micro, double scale, LossSums& sums);
  const Options options_;
  Decoder teacher_, student_;
  const std::int64_t vocab_;
  const TrainerSettings settings_;
  const std::uint64_t seed_;
  const torch::Device device_;
  const DivergenceLoss objective_;
  std::unique_ptr<CachedTeacher> cache_;
  std::optional<HiddenMatch> match_, attention_match_;
  double hidden_weight_ = 0, attention_weight_ = 0, on_policy_ = 0;
  std::int64_t continuation_ = 0;  // ids sampled after each prompt
  bool sampled_ = false;           // this step learns from continuations
};

}  // namespace pare
