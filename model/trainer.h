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
#include "model/ranks.h"

namespace pare {

// AdamW (Loshchilov & Hutter 2019), linear warm-up, cosine to min_lr_ratio * lr at the last step.
struct TrainerSettings {
  // batch in sequences, of all ranks together; micro_batch 0: fitting
  std::int64_t steps = 0, batch = 16, micro_batch = 0, context = 512;
  double lr = 1e-3, min_lr_ratio = 0.0, warmup = 0.02, weight_decay = 0.1, beta1 = 0.9, beta2 = 0.95, clip = 1.0;
  std::int64_t eval_every = 0, eval_tokens = 65536;  // 0: only before and after
  std::int64_t final_eval_tokens = 0;                // 0: all held-out text
  std::int64_t patience = 0;                         // see TrainingJob::held_out; 0: all steps are taken
  double checkpoint_minutes = 5;
  std::string precision = "f32";   // "f32" | "bf16": inputs of products
  std::string keep_zeros = "auto"; // "auto" | "on" | "off"
  bool recompute = false;          // Decoder::recompute_blocks
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
  ExampleCounts counts = {};                           // of examples
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
// stoppable: an interrupt ends it early, with a result of no use. Ranks share the windows; the bits are those of one.
MeanLoss held_out_mean(const HeldOut& held_out, std::int64_t tokens, const torch::Device& device, const RowFn& rows,
                       bool stoppable = true, Ranks* ranks = nullptr);
MeanLoss held_out_loss(Decoder& decoder, const HeldOut& held_out, std::int64_t tokens, const torch::Device& device,
                       bool stoppable = true, Ranks* ranks = nullptr);

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
  // May change what a step learns from. `batch` holds the sequences from `first` on of a step that has `of`.
  std::function<void(Batch& batch, std::int64_t step, std::int64_t first, std::int64_t of)> prepare = {};
  LossFn loss;
  // Trained with the decoder, decayed as its matrices, in the state file but not in the decoder: the loss holds them.
  std::vector<torch::Tensor> companions = {};
  bool frozen = false;              // the companions alone are trained, the decoder's own weights stay
  std::function<void()> finish = {};  // after the last step, before the weights are rounded and measured
  Json echo;                        // what a resumed run must agree with
  fs::path work;                    // state file, curve
};

// Refuses (exit 2 on every rank) programs, options and texts that differ between ranks; run_training asks too. For what
// talks before that.
void agree_on_job(const TrainingJob& job, Context& run);

// Trains job.decoder in place and adds the rows held_out_loss[name] (before, after), train_loss, tokens. Continues from
// work/training_state.safetensors when it is there: the same bytes as an uninterrupted run at the same thread count.
// Ranks share each batch, hold equal weights and read their own copies of model and texts; rank 0 alone writes. Where
// one is lost, rank 0 saves the last whole step before it ends with RankLost.
// `output_dtype`: weights are rounded to it before the last held-out loss, which is thus of what is written.
// Errors: exit 130 after an interrupt with the state saved; exit 1 when the loss is not finite, or from step 50 on
// three times in a row above 3 times its mean plus 2; exit 2 when the state belongs to other options, and for patience
// without held-out losses in between. Returns
// {"steps", "tokens", "train_loss", "held_out": {..}, "seconds", "tokens_per_second"}, with patience "best_step" too.
Json run_training(TrainingJob& job, const std::string& output_dtype, Context& run);

// The output folder of a training run on its way to its name: rank 0's alone, whose failures are every rank's.
// Removed again when a run ends before it has saved anything.
class TrainingFolder {
 public:
  TrainingFolder(const fs::path& out, Context& run);
  ~TrainingFolder();
  TrainingFolder(const TrainingFolder&) = delete;
  TrainingFolder& operator=(const TrainingFolder&) = delete;
  const fs::path& work() const { return work_; }
  // Before run_training, when everything else is known to fit. restart: empties the folder. Error: exit 2 when it
  // holds the unfinished work of another command.
  void claim(bool restart);
  // write() completes the folder; what resuming needed goes after the commit, the curve stays.
  void finish(const std::function<void()>& write);

 private:
  Context& run_;
  fs::path out_;
  std::optional<FolderTransaction> transaction_;  // rank 0's
  fs::path work_;
};

}  // namespace pare
