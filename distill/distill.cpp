#include "distill/distill.h"

#include <numeric>

#include "core/checkpoint.h"
#include "core/error.h"
#include "core/tokenizer.h"
#include "distill/cached_teacher.h"
#include "distill/student.h"
#include "model/decoder.h"
#include "model/fused.h"
#include "model/losses.h"
#include "model/trainer.h"

namespace pare {
namespace {

std::vector<OptionDecl> options() {
  using enum OptionType;
  std::vector<OptionDecl> table = {
      {.name = "teacher", .type = kPath, .help = "model folder to learn from", .required = true},
      {.name = "model", .type = kPath, .help = "student folder; without it the student is cut from the teacher"},
      {.name = "keep-layers", .type = kText, .help = "layers of the teacher that the student keeps, such as 0,2,3"},
      {.name = "ffn", .type = kInteger, .help = "feed-forward neurons that the student keeps in each layer", .minimum = 1},
      {.name = "out", .type = kPath, .help = "model folder to write", .required = true},
      {.name = "dtype", .type = kText, .help = "stored weights; default: as the student or the teacher",
       .choices = {"float32", "float16", "bfloat16"}},
      {.name = "tau", .type = kNumber, .help = "temperature of both softmaxes", .default_value = 1.0, .minimum = 0.05,
       .maximum = 100},
      {.name = "kl-weight", .type = kNumber, .help = "weight of tau^2 KL(teacher || student)", .default_value = 1.0,
       .minimum = 0},
      {.name = "ce-weight", .type = kNumber, .help = "weight of the next-token loss", .default_value = 0.0, .minimum = 0},
      {.name = "cache", .type = kPath,
       .help = "HDF5 file of the teacher's largest logits on the text; made when absent (temperature 1 only)"},
      {.name = "cache-top-k", .type = kInteger, .help = "logits kept per token when the cache is made",
       .default_value = 64, .minimum = 1},
  };
  for (OptionDecl& decl : trainer_options(1e-4, 500)) table.push_back(std::move(decl));
  return table;
}

void check_same_ids(const fs::path& teacher, const fs::path& student) {
  const auto text = [](const fs::path& folder) {
    std::optional<std::string> found = tokenizer_json_text(folder);
    if (!found) throw input_error((folder / "tokenizer.json").string(), "a tokenizer", "nothing there");
    return *found;
  };
  if (text(teacher) != text(student))
    throw input_error((student / "tokenizer.json").string(), "the tokenizer of the teacher, byte for byte",
                      "another file",
                      "teacher and student must give every id the same meaning");
}

struct Pair {
  Decoder teacher = nullptr, student = nullptr;
  fs::path like;
  std::string dtype;
};

// Combinations that cannot work, found before any weight is read.
void check_options(const Options& o) {
  const bool cuts = o.has("keep-layers") || o.has("ffn");
  if (o.has("model") == cuts)
    throw usage_error("distill", "either --model STUDENT, or --keep-layers / --ffn to cut one from the teacher",
                      cuts ? "both" : "neither");
  if (o.get<double>("kl-weight") == 0 && o.get<double>("ce-weight") == 0)
    throw usage_error("--kl-weight", "a positive --kl-weight or --ce-weight", "both zero");
  if (o.has("cache") && o.get<double>("tau") != 1.0)
    throw usage_error("--cache", "--tau 1: the cache holds log-probabilities at temperature 1",
                      "--tau " + o.resolved().at("tau").dump());
  if (!o.has("cache")) refuse_unused(o, {"cache-top-k"}, "without --cache", "pare distill");
  if (o.get<double>("kl-weight") == 0) refuse_unused(o, {"tau", "cache"}, "with --kl-weight 0", "pare distill");
  parse_text_specs(o.get<std::vector<std::string>>("text"), "--text");
  parse_device(o.get<std::string>("device"));
}

Pair open_pair(const Options& o) {
  Pair pair;
  const Checkpoint teacher(o.get<std::string>("teacher"));
  pair.teacher = load_decoder(teacher, torch::kCPU);
  if (o.has("model")) {
    const Checkpoint student(o.get<std::string>("model"));
    if (student.config().vocab_size != teacher.config().vocab_size)
      throw input_error(student.folder().string(), "vocab_size " + std::to_string(teacher.config().vocab_size),
                        std::to_string(student.config().vocab_size));
    check_same_ids(teacher.folder(), student.folder());
    pair.student = load_decoder(student, torch::kCPU);
    pair.like = student.folder();
    pair.dtype = student.float_dtype();
  } else {
    const auto layers = o.has("keep-layers")
                            ? parse_layers(o.get<std::string>("keep-layers"), teacher.config().num_layers)
                            : std::vector<int>();
    pair.student = cut_student(pair.teacher, layers, o.get_or<std::int64_t>("ffn", 0));
    pair.like = teacher.folder();
    pair.dtype = teacher.float_dtype();
  }
  pair.dtype = o.get_or<std::string>("dtype", pair.dtype);
  return pair;
}

Json run_distill(const Options& o, Context& run) {
  check_options(o);
  FolderTransaction transaction(o.get<std::string>("out"));
  const EmptyFolderRemover cleaning(transaction.work());
  const torch::Device device = parse_device(o.get<std::string>("device"));
  const PreparedThreads prepared(run.threads);
  Pair pair = open_pair(o);
  pair.teacher->to(device);
  for (torch::Tensor& parameter : pair.teacher->parameters()) parameter.set_requires_grad(false);

  TrainingJob job;
  job.settings = trainer_settings(o, pair.student->config());
  const std::int64_t context = job.settings.context;
  const Tokenizer tokenizer = Tokenizer::from_file(pair.like / "tokenizer.json");
  if (tokenizer.size() > pair.student->config().vocab_size)
    throw input_error((pair.like / "tokenizer.json").string(),
                      "at most " + std::to_string(pair.student->config().vocab_size) + " ids (vocab_size)",
                      std::to_string(tokenizer.size()));
  const auto split = o.has("split") ? std::optional(o.get<std::string>("split")) : std::nullopt;
  const auto specs = parse_text_specs(o.get<std::vector<std::string>>("text"), "--text");
  job.held_out = read_held_out(o.get_or<std::vector<std::string>>("held-out", {}), split, tokenizer, context);

  std::unique_ptr<CachedTeacher> cache;
  std::vector<TokenSource> sources;
  if (o.has("cache")) {
    cache = std::make_unique<CachedTeacher>(o.get<std::string>("cache"), fs::path(o.get<std::string>("teacher")), specs,
                                            split, tokenizer, pair.teacher, context,
                                            o.get<std::int64_t>("cache-top-k"), device, run);
    sources.push_back(cache->source());
  } else {
    sources = read_sources(specs, split, tokenizer, end_of_text(tokenizer, pair.student->config()), context, run);
  }
  BatchStream data(std::move(sources), context, run.seed);
  const DistillLoss loss{o.get<double>("tau"), o.get<double>("kl-weight"), o.get<double>("ce-weight")};
  const auto matmul = job.settings.precision == "bf16" ? torch::kBFloat16 : torch::kFloat;
  job.stage = "distill";
  job.decoder = pair.student;
  job.data = &data;
  job.echo = deciding_options(o, run.seed);
  job.work = transaction.work();
  job.loss = [&](const Batch& micro, double scale, LossSums& sums) {
    const torch::Tensor hidden = pair.student->hidden(micro.ids), rows = hidden.view({-1, hidden.size(-1)});
    const torch::Tensor targets = micro.targets.view(-1);
    if (cache) {
      const auto [index, log_prob] = cache->rows(micro, device);
      return topk_distill_loss(rows, pair.student->output_head(), index, log_prob, targets, loss, scale, &sums);
    }
    torch::Tensor taught;
    {
      const torch::NoGradGuard no_grad;
      pair.teacher->set_matmul_dtype(matmul);
      taught = pair.teacher->hidden(micro.ids);
    }
    return distill_loss(rows, pair.student->output_head(), taught.view({-1, taught.size(-1)}),
                        pair.teacher->output_head(), targets, loss, scale, &sums);
  };

  const auto divergence = [&](const HeldOut& held_out) {
    pair.teacher->set_matmul_dtype(torch::kFloat);
    pair.student->set_matmul_dtype(torch::kFloat);
    return held_out_mean(held_out, job.settings.final_eval_tokens, device,
                         [&](const torch::Tensor& ids, const torch::Tensor& targets) {
                           const torch::Tensor a = pair.student->hidden(ids), b = pair.teacher->hidden(ids);
                           return row_divergences(a.view({-1, a.size(-1)}), pair.student->output_head(),
                                                  b.view({-1, b.size(-1)}), pair.teacher->output_head(), targets);
                         });
  };
  claim_training_folder(job.work, o.get<bool>("restart"));
  pair.student->to(device);
  std::vector<MeanLoss> before;
  for (const HeldOut& held_out : job.held_out) before.push_back(divergence(held_out));
  Json result = run_training(job, pair.dtype, run);
  for (std::size_t i = 0; i < job.held_out.size(); ++i) {
    const MeanLoss after = divergence(job.held_out[i]);
    const std::string& name = job.held_out[i].name;
    run.report.add({"distill", "held_out_kl[" + name + "]", before[i].mean, after.mean, "nats/token", after.standard_error});
    result["held_out"][name]["kl_before"] = before[i].mean;
    result["held_out"][name]["kl_after"] = after.mean;
    result["held_out"][name]["kl_standard_error"] = after.standard_error;
  }
  throw_if_interrupted("distill after its last step", "run the same command again to continue");
  write_decoder(pair.student, pair.dtype, pair.like, transaction.work());
  finish_training_folder(transaction.work());
  if (run.before_commit) run.before_commit();
  transaction.commit();
  run.print(run.report.table());
  return result;
}

// input: the student, or the teacher where one is cut from it.
StagePlan plan_distill(const Options& o, const PlannedModel& input) {
  check_options(o);
  const ModelConfig teacher = Checkpoint(o.get<std::string>("teacher")).config();
  ModelConfig student = input.config;
  if (o.has("keep-layers"))
    student = with_layers(student, parse_layers(o.get<std::string>("keep-layers"), teacher.num_layers));
  if (o.has("ffn")) require_one_mlp(teacher);
  if (o.has("ffn")) student.intermediate_size = std::min(o.get<std::int64_t>("ffn"), teacher.intermediate_size);
  const TrainerSettings s = trainer_settings(o, student);
  const double own = static_cast<double>(parameter_count(student)), taught = static_cast<double>(parameter_count(teacher));
  const double tokens = static_cast<double>(s.steps * s.batch * s.context);
  const double per_token =
      static_cast<double>(student.num_layers * (20 * student.hidden_size + 8 * student.intermediate_size) * 4);
  const double peak = 20 * own + 4 * taught + per_token * static_cast<double>(std::max<std::int64_t>(4096, s.context));
  constexpr double kFlops = 1.2e11;  // of two cores, measured on small models
  const PlannedModel result = planned_model(student, o.get_or<std::string>("dtype", input.dtype));
  return {(6 * own + 2 * taught) * tokens / kFlops, static_cast<std::uint64_t>(peak), result.compact_bytes, {}, result};
}

}  // namespace

Command distill_command() {
  Command command;
  command.name = "distill";
  command.summary = "Train a student on its teacher's predictions (forward KL on the logits)";
  command.options = options();
  command.run = run_distill;
  command.example = "pare distill --teacher big --keep-layers 0,2,3 --text corpus --held-out more.txt --steps 1000 --out small";
  command.is_stage = true;
  command.plan = plan_distill;
  return command;
}

}  // namespace pare
