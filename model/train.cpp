#include "model/train.h"

#include <fmt/format.h>

#include <optional>

#include "core/checkpoint.h"
#include "core/error.h"
#include "core/model_card.h"
#include "model/decoder.h"
#include "model/fused.h"
#include "model/lora.h"
#include "model/losses.h"
#include "model/trainer.h"
#include "model/trainer_state.h"

namespace pare {
namespace {

std::vector<OptionDecl> options() {
  using enum OptionType;
  std::vector<OptionDecl> table = {
      {.name = "model", .type = kPath, .help = "model folder to continue from"},
      {.name = "config", .type = kPath, .help = "config.json of a new model, trained from scratch"},
      {.name = "tokenizer", .type = kPath, .help = "folder with tokenizer.json, for a new model"},
      {.name = "out", .type = kPath, .help = "model folder to write", .required = true},
      {.name = "dtype", .type = kText, .help = "stored weights; default: as the model, float32 for a new one",
       .choices = {"float32", "float16", "bfloat16"}},
  };
  for (OptionDecl& decl : trainer_options(1e-3, 1000)) table.push_back(std::move(decl));
  return table;
}

constexpr double kLoraRate = 2e-4, kFullRate = 2e-5;

std::vector<OptionDecl> finetune_options() {
  using enum OptionType;
  std::vector<OptionDecl> table = {
      {.name = "model", .type = kPath, .help = "model folder to tune", .required = true},
      {.name = "out", .type = kPath, .help = "model folder to write, adapters merged", .required = true},
      {.name = "dtype", .type = kText, .help = "stored weights; default: as the model",
       .choices = {"float32", "float16", "bfloat16"}},
      {.name = "epochs", .type = kNumber, .help = "passes over all examples, unless --steps or --tokens",
       .default_value = 3.0, .minimum = 1e-9},
      {.name = "lora-rank", .type = kInteger, .help = "rank of LoRA adapters; 0: all weights are trained",
       .default_value = 0, .minimum = 0},
      {.name = "lora-alpha", .type = kNumber, .help = "adapters count alpha / rank; default: twice the rank",
       .minimum = 1e-9},
      {.name = "lora-targets", .type = kTextList, .help = "linears that get adapters, such as q_proj; default: all"},
      {.name = "adapter", .type = kFlag, .help = "keep the adapters too, as PEFT loads them, in OUT/adapter",
       .default_value = false},
      {.name = "too-long", .type = kText,
       .help = "replies that the context does not hold: cut at its end, dropped, refused", .default_value = "cut",
       .choices = {"cut", "drop", "refuse"}},
      {.name = "replies", .type = kText, .help = "which replies of a conversation are learned", .default_value = "all",
       .choices = {"all", "last"}},
  };
  for (OptionDecl& decl : trainer_options(kFullRate, 0)) {
    if (decl.name == "text")
      decl.help = "examples: .jsonl of prompt and response, or of messages (the model's chat template), or text; path or "
                  "path=weight";
    if (decl.name == "held-out")
      decl.help = "examples never trained on, for the loss before and after and for --patience";
    if (decl.name == "steps") decl.default_value = nullptr;
    if (decl.name == "batch") decl.default_value = 8;
    if (decl.name == "weight-decay") decl.default_value = 0.0;
    if (decl.name == "warmup") decl.default_value = 0.05;
    if (decl.name == "eval-every")
      decl.help = "steps between held-out losses; 0: before and after, with --patience each epoch";
    if (decl.name == "lr") {
      decl.help = "peak learning rate; default 2e-5, with LoRA 2e-4";
      decl.default_value = nullptr;
    }
    table.push_back(std::move(decl));
  }
  return table;
}

struct Source {
  Decoder decoder = nullptr;
  fs::path like;        // tokenizer and side files
  std::string dtype;
};

Source open_source(const Options& o, std::uint64_t seed) {
  const bool fresh = o.has("config") || o.has("tokenizer");
  if (o.has("model") == fresh || (fresh && !(o.has("config") && o.has("tokenizer"))))
    throw usage_error("train", "either --model DIR, or --config FILE and --tokenizer DIR", "something else");
  Source source;
  if (o.has("model")) {
    const Checkpoint checkpoint(o.get<std::string>("model"));
    source.decoder = load_decoder(checkpoint, torch::kCPU);
    source.like = checkpoint.folder();
    source.dtype = checkpoint.float_dtype();
  } else {
    const fs::path config = o.get<std::string>("config");
    source.decoder = Decoder(parse_config(read_json(config), nullptr, config.string()));
    initialize(source.decoder, seed);
    source.like = o.get<std::string>("tokenizer");
    source.dtype = "float32";
  }
  source.dtype = o.get_or<std::string>("dtype", source.dtype);
  return source;
}

// What both verbs do once the model is open.
struct Training {
  const Options& o;
  Context& run;
  TrainingFolder folder;
  TrainingJob job;
  std::vector<TextSpec> specs;

  Training(const char* stage, const Options& options, Context& context)
      : o(options), run(context), folder(o.get<std::string>("out"), context) {
    parse_device(o.get<std::string>("device"));
    specs = parse_text_specs(o.get<std::vector<std::string>>("text"), "--text");
    job.stage = stage;
  }

  // Before the run, when the settings are known. Sets the job's decoder, data, held-out texts and loss.
  BatchStream read(const Source& source, TextForm form) {
    const ModelConfig& config = source.decoder->config();
    const Tokenizer tokenizer = Tokenizer::from_file(source.like / "tokenizer.json");
    if (tokenizer.size() > config.vocab_size)
      throw input_error((source.like / "tokenizer.json").string(),
                        "at most " + std::to_string(config.vocab_size) + " ids (vocab_size)",
                        std::to_string(tokenizer.size()));
    form.split = o.has("split") ? std::optional(o.get<std::string>("split")) : std::nullopt;
    form.end_id = end_of_text(tokenizer, config);
    form.context = job.settings.context;
    form.chat_folder = source.like;
    job.held_out = read_held_out(o.get_or<std::vector<std::string>>("held-out", {}), form, tokenizer);
    for (const HeldOut& text : job.held_out)
      if (text.counts.cut > 0 || text.counts.dropped > 0)
        run.progress->note(text.name + ", held out: " + std::to_string(text.counts.cut) +
                           " examples longer than the context were cut, " + std::to_string(text.counts.dropped) + " dropped");
    return {read_sources(specs, form, tokenizer, run), form.context, run.seed};
  }

  Json finish(Source& source, BatchStream& data, const std::function<void()>& before_commit = {}) {
    job.decoder = source.decoder;
    job.data = &data;
    job.echo = deciding_options(o, run.seed);
    job.work = folder.work();
    job.loss = [&source](const Batch& micro, double scale, LossSums& sums) {
      const auto hidden = source.decoder->hidden(micro.ids, micro.starts);
      return cross_entropy_loss(hidden.view({-1, hidden.size(-1)}), source.decoder->output_head(),
                                micro.targets.view(-1), scale, &sums);
    };
    folder.claim(o.get<bool>("restart"));
    Json result = run_training(job, source.dtype, run);
    folder.finish([&] {
      write_decoder(source.decoder, source.dtype, source.like, job.work);
      if (before_commit) before_commit();
      write_model_card(job.work, {o.has("model") ? source.like : fs::path(), command_of(job.stage, o), run.report, {}});
    });
    run.print(run.report.table());
    return result;
  }
};

Json run_train(const Options& o, Context& run) {
  Training training("train", o, run);
  Source source = open_source(o, run.seed);
  training.job.settings = trainer_settings(o, source.decoder->config());
  training.job.settings.device = rank_device(training.job.settings.device, run);
  check_patience(training.job.settings);
  BatchStream data = training.read(source, {});
  return training.finish(source, data);
}

LoraSettings lora_settings(const Options& o) {
  LoraSettings settings;
  settings.rank = o.get<std::int64_t>("lora-rank");
  settings.alpha = o.get_or<double>("lora-alpha", 2.0 * static_cast<double>(settings.rank));
  settings.targets = o.get_or<std::vector<std::string>>("lora-targets", {});
  return settings;
}

// Also what the plan needs to know before there is any text: steps 0 until then, where epochs count.
TrainerSettings finetune_settings(const Options& o, const ModelConfig& config) {
  if (o.has("steps") || o.has("tokens")) refuse_unused(o, {"epochs"}, "with --steps or --tokens", "pare finetune");
  if (o.has("steps") && o.has("tokens")) throw usage_error("pare finetune", "--steps or --tokens", "both");
  const bool lora = o.get<std::int64_t>("lora-rank") > 0;
  if (!lora) refuse_unused(o, {"lora-alpha", "lora-targets", "adapter"}, "without --lora-rank", "pare finetune");
  if (o.get<bool>("adapter")) check_peft_names(config);
  TrainerSettings settings = trainer_settings(o, config);
  settings.lr = o.get_or<double>("lr", lora ? kLoraRate : kFullRate);
  return settings;
}

std::string in_memory(double bytes) { return bytes_in_words(static_cast<std::uint64_t>(bytes)); }

Json run_finetune(const Options& o, Context& run) {
  Training training("finetune", o, run);
  TrainingJob& job = training.job;
  const fs::path folder = o.get<std::string>("model");
  const Checkpoint checkpoint(folder);
  job.settings = finetune_settings(o, checkpoint.config());
  job.settings.device = rank_device(job.settings.device, run);
  Source source{load_decoder(checkpoint, torch::kCPU), checkpoint.folder(),
                o.get_or<std::string>("dtype", checkpoint.float_dtype())};
  TextForm form;
  form.always_examples = true;
  form.too_long = o.get<std::string>("too-long") == "cut"    ? TooLong::kCut
                  : o.get<std::string>("too-long") == "drop" ? TooLong::kDrop
                                                             : TooLong::kRefuse;
  form.last_reply_only = o.get<std::string>("replies") == "last";
  BatchStream data = training.read(source, form);
  TrainerSettings& s = job.settings;
  const auto steps_of = [&](double passes) {
    return std::max<std::int64_t>(1, (data.sequences(passes) + s.batch - 1) / s.batch);
  };
  if (s.steps == 0) s.steps = steps_of(o.get<double>("epochs"));
  if (s.patience > 0 && s.eval_every == 0) s.eval_every = steps_of(1);
  check_patience(s);

  const double all = static_cast<double>(parameter_count(checkpoint.config()));
  double trained = all;
  std::optional<Lora> lora;
  if (o.get<std::int64_t>("lora-rank") > 0) {
    lora.emplace(source.decoder, lora_settings(o), run.seed, parse_device(s.device));
    const std::string keep = o.get<std::string>("keep-zeros");
    if (const auto [module, share] = lora->most_zeros();
        (keep == "auto" && share > kPrunedShare) || (keep == "on" && share > 0))
      throw usage_error("--lora-rank", "linears that are not pruned: merging adapters fills their zeros",
                        fmt::format("{:.3g} % zeros in {}", 100 * share, module),
                        "train all weights (zeros are kept), or add --keep-zeros off");
    job.companions = lora->parameters();
    job.frozen = true;
    job.finish = [&] { lora->merge(); };
    trained = static_cast<double>(lora->parameter_count());
  }
  run.progress->note((lora ? "LoRA of rank " + std::to_string(o.get<std::int64_t>("lora-rank")) + " on " +
                                 std::to_string(lora->linears()) + " linears: "
                           : std::string("all weights: ")) +
                     std::to_string(static_cast<std::int64_t>(trained)) + " of " +
                     std::to_string(static_cast<std::int64_t>(all)) + " parameters are trained; weights " +
                     in_memory(4 * (all + (lora ? trained : 0))) + ", gradients and moments " + in_memory(12 * trained));
  Json result = training.finish(source, data, [&] {
    if (!o.get<bool>("adapter")) return;
    fs::create_directories(job.work / "adapter");
    write_peft_adapter(*lora, job.work / "adapter", folder.string());
  });
  result["trained_parameters"] = static_cast<std::int64_t>(trained);
  Json examples = Json::object();
  for (const TokenSource& text : data.sources())
    examples[examples.contains(text.name) ? text.name + " (" + std::to_string(examples.size() + 1) + ")" : text.name] =
                          {{"examples", text.counts.documents},
                           {"cut", text.counts.cut},
                           {"dropped", text.counts.dropped},
                           {"windows", text.window_begin.size()},
                           {"learned_ids", text.counts.learned}};
  result["text"] = examples;
  return result;
}

StagePlan plan_of(const Options& o, const PlannedModel& input, const TrainerSettings& s, double tokens) {
  const ModelConfig& config = input.config;
  const double parameters = static_cast<double>(parameter_count(config));
  const double per_token = static_cast<double>(config.num_layers * (20 * config.hidden_size + 8 * config.intermediate_size) * 4);
  const double peak = 20 * parameters + per_token * static_cast<double>(std::max<std::int64_t>(4096, s.context));
  constexpr double kFlops = 1.2e11;  // of two cores, measured on small models
  const PlannedModel result = planned_model(config, o.get_or<std::string>("dtype", input.dtype));
  return {6 * parameters * tokens / kFlops, static_cast<std::uint64_t>(peak), result.compact_bytes, {}, result};
}

StagePlan plan_train(const Options& o, const PlannedModel& input) {
  const TrainerSettings s = trainer_settings(o, input.config);
  check_patience(s);
  parse_device(s.device);
  return plan_of(o, input, s, static_cast<double>(s.steps * s.batch * s.context));
}

// Of the texts as they stand on disk; 0 where they are not there yet.
double text_bytes(const Options& o) {
  double bytes = 0;
  std::error_code absent;
  for (const TextSpec& spec : parse_text_specs(o.get<std::vector<std::string>>("text"), "--text")) {
    if (!fs::is_directory(spec.path, absent)) {
      if (const auto size = fs::file_size(spec.path, absent); !absent) bytes += static_cast<double>(size);
      continue;
    }
    for (const auto& entry : fs::directory_iterator(spec.path, absent))
      if (entry.is_regular_file(absent)) bytes += static_cast<double>(entry.file_size(absent));
  }
  return bytes;
}

StagePlan plan_finetune(const Options& o, const PlannedModel& input) {
  const TrainerSettings s = finetune_settings(o, input.config);
  parse_device(s.device);
  constexpr double kBytesOfToken = 4;  // of English, about
  const double tokens = s.steps > 0 ? static_cast<double>(s.steps * s.batch * s.context)
                                    : o.get<double>("epochs") * text_bytes(o) / kBytesOfToken;
  StagePlan plan = plan_of(o, input, s, tokens);
  if (o.get<std::int64_t>("lora-rank") == 0) return plan;
  plan.seconds *= 2.0 / 3.0;  // no gradient of the frozen weights
  plan.peak_bytes -= static_cast<std::uint64_t>(12 * static_cast<double>(parameter_count(input.config)));
  plan.notes.push_back("gradients and moments of the adapters alone");
  return plan;
}

}  // namespace

Command finetune_command() {
  Command command;
  command.name = "finetune";
  command.summary = "Tune a model on examples (responses, conversations, documents): all weights, or LoRA, merged";
  command.options = finetune_options();
  command.run = run_finetune;
  command.example =
      "pare finetune --model base --text chats.jsonl --held-out more.jsonl --lora-rank 16 --patience 2 --out tuned";
  command.is_stage = true;
  command.plan = plan_finetune;
  return ranked(std::move(command));
}

Command train_command() {
  Command command;
  command.name = "train";
  command.summary = "Train a model on running text: from scratch, or continuing from a model folder";
  command.options = options();
  command.run = run_train;
  command.example = "pare train --config config.json --tokenizer tok --text novels --held-out more --tokens 20000000 --out new";
  command.is_stage = true;
  command.plan = plan_train;
  return ranked(std::move(command));
}

}  // namespace pare
