#include "distill/distill.h"

#include "core/checkpoint.h"
#include "core/error.h"
#include "core/model_card.h"
#include "core/tokenizer.h"
#include "distill/lesson.h"
#include "distill/same_ids.h"
#include "model/decoder.h"
#include "model/fused.h"
#include "model/trainer.h"

namespace pare {
namespace {

std::vector<OptionDecl> options() {
  using enum OptionType;
  std::vector<OptionDecl> table = {
      {.name = "teacher", .type = kPath, .help = "model folder to learn from", .required = true},
      {.name = "model", .type = kPath, .help = "student folder, such as prune --method shape writes", .required = true},
      {.name = "out", .type = kPath, .help = "model folder to write", .required = true},
      {.name = "dtype", .type = kText, .help = "stored weights; default: as the student",
       .choices = {"float32", "float16", "bfloat16"}},
  };
  for (OptionDecl& decl : lesson_options()) table.push_back(std::move(decl));
  for (OptionDecl& decl : trainer_options(1e-4, 500)) table.push_back(std::move(decl));
  return table;
}

struct Pair {
  Decoder teacher = nullptr, student = nullptr;
  fs::path like;
  std::string dtype;
  std::optional<Tokenizer> tokenizer = {};
  std::int64_t vocab = 0;  // ids that both have
};

// Combinations that cannot work, found before any weight is read.
void check_options(const Options& o) {
  check_lesson(o);
  parse_text_specs(o.get<std::vector<std::string>>("text"), "--text");
  parse_device(o.get<std::string>("device"));
}

Pair open_pair(const Options& o) {
  Pair pair;
  const Checkpoint teacher(o.get<std::string>("teacher"));
  pair.teacher = load_decoder(teacher, torch::kCPU);
  const Checkpoint student(o.get<std::string>("model"));
  pair.tokenizer = shared_tokenizer(teacher.folder(), student.folder());
  pair.student = load_decoder(student, torch::kCPU);
  pair.like = student.folder();
  pair.dtype = o.get_or<std::string>("dtype", student.float_dtype());
  pair.vocab = shared_vocabulary(*pair.tokenizer, teacher.folder(), teacher.config().vocab_size, pair.like,
                                 pair.student->config().vocab_size);
  return pair;
}

Json run_distill(const Options& o, Context& run) {
  check_options(o);
  Ranks& ranks = ranks_of(run);
  TrainingFolder folder(o.get<std::string>("out"), run);
  const PreparedThreads prepared(run.threads);
  Pair pair = open_pair(o);

  TrainingJob job;
  job.settings = trainer_settings(o, pair.student->config());
  check_patience(job.settings);
  job.settings.device = rank_device(job.settings.device, run);
  if (!ranks.alone()) ranks.agree("--teacher", Checkpoint(o.get<std::string>("teacher")).content_hash());
  const Tokenizer& tokenizer = *pair.tokenizer;
  TextForm form;
  form.split = o.has("split") ? std::optional(o.get<std::string>("split")) : std::nullopt;
  form.end_id = end_of_text(tokenizer, pair.student->config());
  form.context = job.settings.context;
  form.chat_folder = pair.like;
  const auto specs = parse_text_specs(o.get<std::vector<std::string>>("text"), "--text");
  job.held_out = read_held_out(o.get_or<std::vector<std::string>>("held-out", {}), form, tokenizer);

  Lesson lesson(o, pair.teacher, pair.student, pair.vocab, job.settings, run.seed);
  BatchStream data(lesson.sources(fs::path(o.get<std::string>("teacher")), specs, form, tokenizer, run),
                   job.settings.context, run.seed);
  job.stage = "distill";
  job.decoder = pair.student;
  job.data = &data;
  job.echo = deciding_options(o, run.seed);
  job.work = folder.work();
  lesson.give(job);
  agree_on_job(job, run);
  folder.claim(o.get<bool>("restart"));
  std::vector<MeanLoss> before;
  for (const HeldOut& held_out : job.held_out) before.push_back(lesson.divergence(held_out, ranks));
  Json result = run_training(job, pair.dtype, run);
  for (std::size_t i = 0; i < job.held_out.size(); ++i) {
    const MeanLoss after = lesson.divergence(job.held_out[i], ranks);
    const std::string& name = job.held_out[i].name;
    run.report.add({"distill", "held_out_kl[" + name + "]", before[i].mean, after.mean, "nats/token", after.standard_error});
    result["held_out"][name]["kl_before"] = before[i].mean;
    result["held_out"][name]["kl_after"] = after.mean;
    result["held_out"][name]["kl_standard_error"] = after.standard_error;
  }
  if (lesson.cache() != nullptr) result["cache"] = lesson.cache()->summary();
  ranks.throw_if_interrupted("distill after its last step", "run the same command again to continue");
  folder.finish([&] {
    write_decoder(pair.student, pair.dtype, pair.like, folder.work());
    write_model_card(folder.work(), {pair.like, command_of("distill", o), run.report, {}});
  });
  run.print(run.report.table());
  return result;
}

StagePlan plan_distill(const Options& o, const PlannedModel& input) {
  check_options(o);
  const ModelConfig teacher = Checkpoint(o.get<std::string>("teacher")).config();
  const ModelConfig& student = input.config;
  const TrainerSettings s = trainer_settings(o, student);
  check_patience(s);
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
  command.summary = "Train a student on its teacher's predictions";
  command.options = options();
  command.run = run_distill;
  command.example = "pare distill --teacher big --model small --text corpus --held-out more.txt --steps 1000 --out student";
  command.is_stage = true;
  command.plan = plan_distill;
  return ranked(std::move(command));
}

}  // namespace pare
