// The one optimiser loop: schedule, accumulation, clipping, checkpoints, resume, held-out loss. What is minimised is
// passed in. Include only from .cpp files (LibTorch headers).
#pragma once

#include <torch/torch.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/context.h"
#include "core/options.h"
#include "model/data.h"
#include "model/decoder.h"
#include "model/losses.h"

namespace pare {

// AdamW (Loshchilov & Hutter 2019), linear warm-up, cosine to min_lr_ratio * lr at the last step.
struct TrainerSettings {
  std::int64_t steps = 0, batch = 16, micro_batch = 0, context = 512;  // batch in sequences; micro_batch 0: fitting
  double lr = 1e-3, min_lr_ratio = 0.0, warmup = 0.02, weight_decay = 0.1, beta1 = 0.9, beta2 = 0.95, clip = 1.0;
  std::int64_t eval_every = 0, eval_tokens = 65536;  // 0: only before and after
  std::int64_t final_eval_tokens = 0;                // 0: all held-out text
  std::int64_t patience = 0;                         // see TrainingJob::held_out; 0: all steps are taken
  double checkpoint_minutes = 5;
  std::string precision = "f32";   // "f32" | "bf16": inputs of products
  std::string keep_zeros = "auto"; // "auto" | "on" | "off"
  std::string device = "cpu";
};
double learning_rate(const TrainerSettings& settings, std::int64_t step);  // step counts from 0

// The options that train and distill share, and their reading.
std::vector<OptionDecl> trainer_options(double lr, std::int64_t steps);
TrainerSettings trainer_settings(const Options& options, const ModelConfig& config);
// Errors: exit 2 for patience without held-out losses in between.
void check_patience(const TrainerSettings& settings);
// What decides the result, for the state file: every option but those that only pace the run, and the seed.
Json deciding_options(const Options& options, std::uint64_t seed);

struct HeldOut {
  std::string name;
  std::vector<Window> windows;
  std::vector<std::vector<std::uint8_t>> scored = {};  // of examples, of each window: the ids that count
};
// Streams in windows of the context; examples each in a window of its own, where what is learned of them counts.
std::vector<HeldOut> read_held_out(const std::vector<std::string>& paths, const TextForm& form,
                                   const Tokenizer& tokenizer);

// Mean of -log p over scored ids, nats per token, in float32; the standard error is over documents (over windows where
// there is one document only). `tokens` > 0: evenly spaced windows up to about that many.
struct MeanLoss {
  double mean = 0, standard_error = 0;
  std::int64_t tokens = 0;
};
// rows(ids [n, width], targets [n * width]) -> one value for each target, 0 where the target is -1.
using RowFn = std::function<torch::Tensor(const torch::Tensor& ids, const torch::Tensor& targets)>;
// stoppable: an interrupt ends it early, with a result of no use.
MeanLoss held_out_mean(const HeldOut& held_out, std::int64_t tokens, const torch::Device& device, const RowFn& rows,
                       bool stoppable = true);
MeanLoss held_out_loss(Decoder& decoder, const HeldOut& held_out, std::int64_t tokens, const torch::Device& device,
                       bool stoppable = true);

// loss(ids, targets, scale, sums): differentiable scale * sum over counted rows; adds to sums.
using LossFn = std::function<torch::Tensor(const Batch& micro, double scale, LossSums& sums)>;

struct TrainingJob {
  std::string stage;                // "train" or "distill": report rows and messages
  Decoder decoder = nullptr;
  BatchStream* data = nullptr;
  // With patience p > 0 the weights that had the least loss (mean over the sources) stay, and training ends after p
  // held-out losses in a row that were not the least.
  std::vector<HeldOut> held_out;
  TrainerSettings settings;
  std::function<void(Batch& batch, std::int64_t step)> prepare = {};  // may change what a step learns from
  LossFn loss;
  // Trained with the decoder, decayed as its matrices, in the state file but not in the decoder: the loss holds them.
  std::vector<torch::Tensor> companions = {};
  bool frozen = false;              // the companions alone are trained, the decoder's own weights stay
  std::function<void()> finish = {};  // after the last step, before the weights are rounded and measured
  Json echo;                        // what a resumed run must agree with
  fs::path work;                    // state file, curve
};

// Trains job.decoder in place and adds the rows held_out_loss[name] (before, after), train_loss, tokens. Continues from
// work/training_state.safetensors when it is there: the same bytes as an uninterrupted run at the same thread count.
// `output_dtype`: weights are rounded to it before the last held-out loss, which is thus of what is written.
// Errors: exit 130 after an interrupt with the state saved; exit 1 when the loss is not finite, or from step 50 on three
// times in a row above 3 times its mean plus 2; exit 2 when the state belongs to other options. Returns
// {"steps", "tokens", "train_loss", "held_out": {..}}, with patience "best_step" too.
Json run_training(TrainingJob& job, const std::string& output_dtype, Context& run);

// Removes the work folder again when a run ends before it has saved anything. Declare after the transaction.
struct EmptyFolderRemover {
  fs::path folder;
  explicit EmptyFolderRemover(fs::path path) : folder(std::move(path)) {}
  EmptyFolderRemover(const EmptyFolderRemover&) = delete;
  EmptyFolderRemover& operator=(const EmptyFolderRemover&) = delete;
  ~EmptyFolderRemover() {
    std::error_code not_empty;
    fs::remove(folder, not_empty);
  }
};

// Before run_training, when everything else is known to fit. restart: empties the folder. Error: exit 2 when it holds the
// unfinished work of another command.
void claim_training_folder(const fs::path& work, bool restart);
// Removes what resuming needed; the curve stays. After the commit: killed before it, a run has lost nothing.
void finish_training_folder(const fs::path& folder);

}  // namespace pare
