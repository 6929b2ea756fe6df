#include "model/train.h"

#include "core/checkpoint.h"
#include "core/error.h"
#include "model/decoder.h"
#include "model/fused.h"
#include "model/losses.h"
#include "model/trainer.h"

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

Json run_train(const Options& o, Context& run) {
  TrainingFolder folder(o.get<std::string>("out"), run);
  parse_device(o.get<std::string>("device"));
  const auto specs = parse_text_specs(o.get<std::vector<std::string>>("text"), "--text");
  Source source = open_source(o, run.seed);
  const ModelConfig& config = source.decoder->config();
  TrainingJob job;
  job.settings = trainer_settings(o, config);
  job.settings.device = rank_device(job.settings.device, run);
  const Tokenizer tokenizer = Tokenizer::from_file(source.like / "tokenizer.json");
  if (tokenizer.size() > config.vocab_size)
    throw input_error((source.like / "tokenizer.json").string(), "at most " + std::to_string(config.vocab_size) + " ids (vocab_size)",
                      std::to_string(tokenizer.size()));
  const auto split = o.has("split") ? std::optional(o.get<std::string>("split")) : std::nullopt;
  const std::int64_t context = job.settings.context;
  job.held_out = read_held_out(o.get_or<std::vector<std::string>>("held-out", {}), split, tokenizer, context);
  BatchStream data(read_sources(specs, split, tokenizer, end_of_text(tokenizer, config), context, run), context, run.seed);
  job.stage = "train";
  job.decoder = source.decoder;
  job.data = &data;
  job.echo = deciding_options(o, run.seed);
  job.work = folder.work();
  job.loss = [&](const Batch& micro, double scale, LossSums& sums) {
    const auto hidden = source.decoder->hidden(micro.ids);
    return cross_entropy_loss(hidden.view({-1, hidden.size(-1)}), source.decoder->output_head(), micro.targets.view(-1),
                              scale, &sums);
  };
  folder.claim(o.get<bool>("restart"));
  Json result = run_training(job, source.dtype, run);
  folder.finish([&] { write_decoder(source.decoder, source.dtype, source.like, folder.work()); });
  run.print(run.report.table());
  return result;
}

StagePlan plan_train(const Options& o, const PlannedModel& input) {
  const ModelConfig& config = input.config;
  const TrainerSettings s = trainer_settings(o, config);
  parse_device(s.device);
  const double parameters = static_cast<double>(parameter_count(config));
  const double tokens = static_cast<double>(s.steps * s.batch * s.context);
  const double per_token = static_cast<double>(config.num_layers * (20 * config.hidden_size + 8 * config.intermediate_size) * 4);
  const double peak = 20 * parameters + per_token * static_cast<double>(std::max<std::int64_t>(4096, s.context));
  constexpr double kFlops = 1.2e11;  // of two cores, measured on small models
  const PlannedModel result = planned_model(config, o.get_or<std::string>("dtype", input.dtype));
  return {6 * parameters * tokens / kFlops, static_cast<std::uint64_t>(peak), result.compact_bytes, {}, result};
}

}  // namespace

Command train_command() {
  Command command;
  command.name = "train";
  command.summary = "Train a model on text: from scratch, or continuing (fine-tuning) from a model folder";
  command.options = options();
  command.run = run_train;
  command.example = "pare train --model base --text chats.jsonl --held-out more.jsonl --steps 500 --lr 1e-4 --out tuned";
  command.is_stage = true;
  command.plan = plan_train;
  return ranked(std::move(command));
}

}  // namespace pare
