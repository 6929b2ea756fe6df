#include "distill/lesson.h"

#include <algorithm>

#include "core/error.h"
#include "distill/objective.h"
#include "distill/on_policy.h"

namespace pare {
namespace {

constexpr std::uint64_t kAttentionSeed = 0xa77e;  // its projections begin at other numbers than those of hidden states

}  // namespace

std::vector<OptionDecl> lesson_options() {
  using enum OptionType;
  std::vector<OptionDecl> table = objective_options();
  const std::vector<OptionDecl> more = {
      {.name = "hidden-weight",
       .type = kNumber,
       .help = "weight of matching hidden states through learned projections; 0: predictions alone",
       .default_value = 0.0,
       .minimum = 0},
      {.name = "attention-weight",
       .type = kNumber,
       .help = "weight of matching what attention adds to the hidden states, likewise",
       .default_value = 0.0,
       .minimum = 0},
      {.name = "hidden-layers",
       .type = kText,
       .help = "layers matched: even, or pairs STUDENT:TEACHER from 0 such as 0:1,2:5",
       .default_value = "even"},
      {.name = "on-policy",
       .type = kNumber,
       .help = "share of the steps that learn from continuations the student samples after prompts of the text",
       .default_value = 0.0,
       .minimum = 0,
       .maximum = 1},
      {.name = "on-policy-tokens",
       .type = kInteger,
       .help = "tokens sampled after each prompt, which is as long; each costs a pass of the student",
       .default_value = 64,
       .minimum = 1},
      {.name = "cache",
       .type = kPath,
       .help = "HDF5 file of the teacher's predictions on the text, read instead of running it; made when absent"},
      {.name = "cache-top-k",
       .type = kInteger,
       .help = "largest logits kept per token when the cache is made; default: 64, with --cache-samples 12",
       .minimum = 0},
      {.name = "cache-samples",
       .type = kInteger,
       .help =
           "ids drawn per token from what the largest leave out, which makes the cached loss unbiased; 12 is enough",
       .default_value = 0,
       .minimum = 0,
       .maximum = 255},
  };
  table.insert(table.end(), more.begin(), more.end());
  return table;
}

void check_lesson(const Options& o) {
  const DivergenceLoss loss = read_objective(o);
  const bool samples = o.get<std::int64_t>("cache-samples") > 0;
  if (o.get<double>("hidden-weight") == 0 && o.get<double>("attention-weight") == 0)
    refuse_unused(o, {"hidden-layers"}, "without --hidden-weight or --attention-weight", "pare distill");
  if (o.get<double>("on-policy") == 0)
    refuse_unused(o, {"on-policy-tokens"}, "without --on-policy", "pare distill");
  else if (o.get<std::int64_t>("on-policy-tokens") >= o.get<std::int64_t>("context"))
    throw usage_error("--on-policy-tokens", "fewer than --context " + o.resolved().at("context").dump(),
                      o.resolved().at("on-policy-tokens").dump());
  if (o.get<double>("on-policy") == 1 && loss.weights.ce_weight > 0)
    throw usage_error("--ce-weight", "0 with --on-policy 1: the student's own text has no next token to learn",
                      o.resolved().at("ce-weight").dump());
  if (loss.weights.kl_weight == 0) refuse_unused(o, {"cache", "on-policy"}, "with --kl-weight 0", "pare distill");
  if (!o.has("cache")) {
    refuse_unused(o, {"cache-top-k", "cache-samples"}, "without --cache", "pare distill");
    return;
  }
  if (loss.kind != Divergence::kForwardKl)
    throw usage_error("--cache", "--loss forward-kl: of the other losses a cache knows too little",
                      "--loss " + o.get<std::string>("loss"));
  refuse_unused(o, {"hidden-weight", "attention-weight", "on-policy"},
                "with --cache, which knows neither hidden states nor other texts", "pare distill");
  if (loss.weights.tau != 1 && !samples)
    throw usage_error("--cache",
                      "--tau 1, or --cache-samples: without them a cache knows too little of other temperatures",
                      "--tau " + o.resolved().at("tau").dump());
  if (o.has("cache-top-k") && o.get<std::int64_t>("cache-top-k") == 0 && !samples)
    throw usage_error("--cache-top-k", "at least 1 without --cache-samples", "0");
}

Lesson::Lesson(const Options& o, Decoder teacher, Decoder student, std::int64_t vocab, const TrainerSettings& settings,
               std::uint64_t seed)
    : options_(o),
      teacher_(std::move(teacher)),
      student_(std::move(student)),
      vocab_(vocab),
      settings_(settings),
      seed_(seed),
      device_(parse_device(settings.device)),
      objective_(read_objective(o)),
      hidden_weight_(o.get<double>("hidden-weight")),
      attention_weight_(o.get<double>("attention-weight")),
      on_policy_(o.get<double>("on-policy")),
      continuation_(o.get<std::int64_t>("on-policy-tokens")) {
  teacher_->to(device_);
  student_->to(device_);
  for (torch::Tensor& parameter : teacher_->parameters()) parameter.set_requires_grad(false);
  const ModelConfig &own = student_->config(), &taught = teacher_->config();
  if (hidden_weight_ > 0 || attention_weight_ > 0) {
    const LayerPairs pairs =
        parse_layer_pairs(o.get<std::string>("hidden-layers"), own.num_layers, taught.num_layers);
    if (hidden_weight_ > 0) match_.emplace(pairs, own.hidden_size, taught.hidden_size, seed, device_);
    if (attention_weight_ > 0)
      attention_match_.emplace(pairs, own.hidden_size, taught.hidden_size, seed ^ kAttentionSeed, device_);
  }
}

std::vector<TokenSource> Lesson::sources(const fs::path& teacher_folder, const std::vector<TextSpec>& specs,
                                         const TextForm& form, const Tokenizer& tokenizer, Context& run) {
  if (!options_.has("cache"))
    return read_sources(specs, form, tokenizer, run);
  LogitCacheInfo kept;
  kept.vocab_size = vocab_;
  kept.context = settings_.context;
  kept.samples = options_.get<std::int64_t>("cache-samples");
  kept.top_k = std::min(vocab_, options_.get_or<std::int64_t>("cache-top-k", kept.samples > 0 ? 12 : 64));
  kept.temperature = objective_.weights.tau;
  kept.seed = seed_;
  cache_ = std::make_unique<CachedTeacher>(options_.get<std::string>("cache"), kept, teacher_folder, specs, form, tokenizer,
                                           teacher_, device_, run);
  return {cache_->source()};
}

OutputHead Lesson::head(Decoder& decoder) const {
  OutputHead whole = decoder->output_head();
  if (whole.weight.size(0) > vocab_) whole.weight = whole.weight.narrow(0, 0, vocab_);
  return whole;
}

void Lesson::give(TrainingJob& job) {
  for (const auto* match : {&match_, &attention_match_})
    if (*match)
      job.companions.insert(job.companions.end(), (*match)->projections().begin(), (*match)->projections().end());
  if (on_policy_ > 0)
    job.prepare = [this](Batch& batch, std::int64_t step, std::int64_t first, std::int64_t of) {
      sampled_ = on_policy_step(on_policy_, step);
      if (!sampled_) return;
      const std::int64_t prompt = std::min(continuation_, settings_.context - continuation_);
      const std::int64_t micro = std::max<std::int64_t>(1, 8192 / (prompt + continuation_));
      continue_prompts(student_, batch, prompt, continuation_, vocab_, seed_,
                       static_cast<std::uint64_t>(step * of * continuation_ + first), micro, device_, of);
    };
  job.loss = [this](const Batch& micro, double scale, LossSums& sums) { return loss(micro, scale, sums); };
}

torch::Tensor Lesson::loss(const Batch& micro, double scale, LossSums& sums) {
  const auto none = [] { return std::vector<int>(); };
  const HiddenStates own = hidden_states(student_, micro.ids, match_ ? match_->student_layers() : none(), micro.starts,
                                         attention_match_ ? attention_match_->student_layers() : none());
  const torch::Tensor rows = own.last.view({-1, own.last.size(-1)}), targets = micro.targets.view(-1);
  if (cache_) return cache_->loss(rows, head(student_), micro, objective_.weights, scale, &sums);
  if (objective_.weights.kl_weight == 0 && !match_ && !attention_match_)  // nothing to ask the teacher
    return cross_entropy_loss(rows, head(student_), targets, scale * objective_.weights.ce_weight, &sums);
  HiddenStates taught;
  {
    const torch::NoGradGuard no_grad;
    teacher_->set_matmul_dtype(settings_.precision == "bf16" ? torch::kBFloat16 : torch::kFloat);
    taught = hidden_states(teacher_, micro.ids, match_ ? match_->teacher_layers() : none(), micro.starts,
                           attention_match_ ? attention_match_->teacher_layers() : none());
  }
  DivergenceLoss objective = objective_;
  if (sampled_) objective.weights.ce_weight = 0;  // the next token is the student's own
  torch::Tensor total = divergence_loss(rows, head(student_), taught.last.view({-1, taught.last.size(-1)}),
                                        head(teacher_), targets, objective, scale, &sums);
  if (match_) total = total + match_->loss(own.blocks, taught.blocks, targets, scale * hidden_weight_);
  if (attention_match_)
    total = total + attention_match_->loss(own.attention, taught.attention, targets, scale * attention_weight_);
  return total;
}

MeanLoss Lesson::divergence(const HeldOut& held_out, Ranks& ranks) {
  teacher_->set_matmul_dtype(torch::kFloat);
  student_->set_matmul_dtype(torch::kFloat);
  return held_out_mean(held_out, settings_.final_eval_tokens, device_,
                       [&](const torch::Tensor& ids, const torch::Tensor& targets) {
                         const torch::Tensor a = student_->hidden(ids), b = teacher_->hidden(ids);
                         return row_divergences(a.view({-1, a.size(-1)}), head(student_), b.view({-1, b.size(-1)}),
                                                head(teacher_), targets);
                       },
                       true, &ranks);
}

}  // namespace pare
