#include "model/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <map>
#include <numbers>

#include "core/error.h"
#include "model/fused.h"
#include "model/trainer_state.h"

namespace pare {
namespace {

using Clock = std::chrono::steady_clock;

constexpr const char* kStateFile = "training_state.safetensors";
constexpr const char* kCurveFile = "train.jsonl";

constexpr int kSpikes = 3;                  // in a row
constexpr std::int64_t kSpikesFrom = 50;    // steps; before that the mean says little

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::string format(const char* pattern, double value) {
  char text[64];
  std::snprintf(text, sizeof text, pattern, value);
  return text;
}

// Sequences per forward pass: about 4,096 tokens, which keeps the activations of a small model in cache.
std::int64_t fitting_micro_batch(const TrainerSettings& s, std::int64_t sequences) {
  if (s.micro_batch > 0) return std::min(s.micro_batch, sequences);
  return std::clamp<std::int64_t>(4096 / s.context, 1, sequences);
}

void write_curve(const fs::path& work, const Json& curve) {
  std::string lines;
  for (const Json& point : curve) lines += point.dump() + "\n";
  write_text(work / kCurveFile, lines);
}

// Of patience: the step with the least held-out loss, and how many held-out losses were measured since.
struct Best {
  std::int64_t step = 0;
  double loss = 0;
  std::int64_t since = 0;
};

double mean_of(const Json& losses) {
  double sum = 0;
  for (const Json& loss : losses) sum += loss.at("loss").get<double>();
  return sum / static_cast<double>(losses.size());
}

std::string weights_hash(Decoder& decoder) {
  Hasher hash;
  for (const TensorSpec& spec : expected_tensors(decoder->config())) {
    const torch::Tensor host = decoder->tensor(spec.name).detach().to(torch::kCPU).contiguous();
    hash.update(std::as_bytes(std::span(host.data_ptr<float>(), static_cast<std::size_t>(host.numel()))));
  }
  return hash.hex();
}

// Rounds the weights to the dtype they will be stored in.
void round_weights(Decoder& decoder, const std::string& dtype) {
  const torch::NoGradGuard no_grad;
  if (dtype == "float32") return;
  const auto type = dtype == "bfloat16" ? torch::kBFloat16 : torch::kHalf;
  for (torch::Tensor& parameter : decoder->parameters()) parameter.copy_(parameter.to(type).to(torch::kFloat));
}

std::int64_t summed(Ranks& ranks, std::int64_t value) {
  const torch::Tensor total = torch::full({1}, value, torch::kLong);
  ranks.sum(total);
  return total.item<std::int64_t>();
}

// Every list with its length, so that none runs into the next.
template <class T>
void add_list(Hasher& hash, const std::vector<T>& list) {
  hash.update(std::to_string(list.size()) + " ");
  hash.update(std::as_bytes(std::span(list)));
}

// What is learned and what is measured: ids, where windows and documents begin, which ids count.
std::string text_hash(const std::vector<TokenSource>& sources) {
  Hasher hash;
  for (const TokenSource& source : sources) {
    add_list(hash, source.ids);
    add_list(hash, source.scored);
    add_list(hash, source.document_begin);
    add_list(hash, source.window_begin);
  }
  return hash.hex();
}

std::string held_out_hash(const std::vector<HeldOut>& texts) {
  Hasher hash;
  for (const HeldOut& text : texts) {
    hash.update(text.name);
    for (const Window& window : text.windows) {
      add_list(hash, window.ids);
      hash.update(std::to_string(window.first_scored));
    }
    for (const auto& scored : text.scored) add_list(hash, scored);
  }
  return hash.hex();
}

}  // namespace

// Paths may differ from machine to machine; what lies behind them may not.
void agree_on_job(const TrainingJob& job, Context& run) {
  Ranks& ranks = ranks_of(run);
  if (ranks.alone()) return;
  Json options = job.echo;
  for (const char* path : {"model", "teacher", "config", "tokenizer", "out", "text", "held-out", "cache", "device"})
    options.erase(path);
  Json weights = Json::array();
  for (const TokenSource& source : job.data->sources()) weights.push_back(source.weight);
  ranks.agree("the program", Json{{"pare", PARE_VERSION}, {"LibTorch", TORCH_VERSION}});
  ranks.agree("the options", options);
  ranks.agree("what the ranks read", Json{{"text", text_hash(job.data->sources())}, {"text weights", weights},
                                          {"held-out text", held_out_hash(job.held_out)}});
}

double learning_rate(const TrainerSettings& s, std::int64_t step) {
  const double warm = std::max(1.0, s.warmup * static_cast<double>(s.steps));
  const double at = static_cast<double>(step);
  if (at + 1 < warm) return s.lr * (at + 1) / warm;
  const double rest = std::max(1.0, static_cast<double>(s.steps) - warm);
  const double progress = std::clamp((at + 1 - warm) / rest, 0.0, 1.0);
  return s.lr * (s.min_lr_ratio + (1 - s.min_lr_ratio) * 0.5 * (1 + std::cos(std::numbers::pi * progress)));
}

std::vector<OptionDecl> trainer_options(double lr, std::int64_t steps) {
  using enum OptionType;
  return {
      {.name = "text", .type = kTextList, .help = "training text: file or folder of .txt/.jsonl, path or path=weight",
       .required = true},
      {.name = "split", .type = kText, .help = "separator of the documents inside one text file"},
      {.name = "held-out", .type = kTextList, .help = "text never trained on, for the loss before and after"},
      {.name = "steps", .type = kInteger, .help = "optimizer steps", .default_value = steps, .minimum = 1},
      {.name = "tokens", .type = kInteger, .help = "tokens to train on; replaces --steps", .minimum = 1},
      {.name = "batch", .type = kInteger, .help = "sequences per step, of all ranks together", .default_value = 16, .minimum = 1},
      {.name = "micro-batch", .type = kInteger, .help = "sequences per forward pass; 0: fitting",
       .default_value = 0, .minimum = 0},
      {.name = "context", .type = kInteger, .help = "tokens per sequence", .default_value = 512, .minimum = 2},
      {.name = "lr", .type = kNumber, .help = "peak learning rate", .default_value = lr, .minimum = 0},
      {.name = "min-lr-ratio", .type = kNumber, .help = "last learning rate as a part of the peak",
       .default_value = 0.0, .minimum = 0, .maximum = 1},
      {.name = "warmup", .type = kNumber, .help = "part of the steps with rising learning rate", .default_value = 0.02,
       .minimum = 0, .maximum = 1},
      {.name = "weight-decay", .type = kNumber, .help = "decoupled decay of matrices", .default_value = 0.1, .minimum = 0},
      {.name = "beta1", .type = kNumber, .help = "AdamW first moment", .default_value = 0.9, .minimum = 0, .maximum = 1},
      {.name = "beta2", .type = kNumber, .help = "AdamW second moment", .default_value = 0.95, .minimum = 0, .maximum = 1},
      {.name = "clip", .type = kNumber, .help = "largest gradient norm; 0: no clipping", .default_value = 1.0, .minimum = 0},
      {.name = "eval-every", .type = kInteger, .help = "steps between held-out losses; 0: before and after only",
       .default_value = 0, .minimum = 0},
      {.name = "eval-tokens", .type = kInteger, .help = "held-out tokens per source in between", .default_value = 65536,
       .minimum = 1},
      {.name = "final-eval-tokens", .type = kInteger, .help = "held-out tokens per source before and after; 0: all",
       .default_value = 0, .minimum = 0},
      {.name = "patience", .type = kInteger, .help = "stop after so many held-out losses without a new least one, whose "
       "weights stay; 0: never", .default_value = 0, .minimum = 0},
      {.name = "checkpoint-minutes", .type = kNumber, .help = "minutes between saved states", .default_value = 5.0,
       .minimum = 0},
      {.name = "precision", .type = kText, .help = "inputs of matrix products; sums and weights stay f32",
       .default_value = "f32", .choices = {"f32", "bf16"}},
      {.name = "activation-checkpointing", .type = kFlag, .help = "keep only the input of each block and compute the rest "
       "again on the way back: less memory, a third more products, same bits", .default_value = false},
      {.name = "keep-zeros", .type = kText, .help = "pruned zeros of linear weights stay zero; auto: from 5 % on",
       .default_value = "auto", .choices = {"auto", "on", "off"}},
      {.name = "device", .type = kText, .help = "cpu, cuda or cuda:N", .default_value = "cpu"},
      {.name = "restart", .type = kFlag, .help = "discard the state of an interrupted run", .default_value = false},
  };
}

TrainerSettings trainer_settings(const Options& o, const ModelConfig& config) {
  if (o.has("tokens")) refuse_unused(o, {"steps"}, "with --tokens", "training");
  if (!o.has("held-out"))
    refuse_unused(o, {"eval-every", "eval-tokens", "final-eval-tokens", "patience"}, "without --held-out",
                  "training");
  else if (o.get<std::int64_t>("eval-every") == 0 && o.get<std::int64_t>("patience") == 0)
    refuse_unused(o, {"eval-tokens"}, "without --eval-every", "training");
  TrainerSettings s;
  s.batch = o.get<std::int64_t>("batch");
  s.micro_batch = o.get<std::int64_t>("micro-batch");
  s.context = o.get<std::int64_t>("context");
  s.steps = o.get_or<std::int64_t>("steps", 0);
  s.patience = o.get<std::int64_t>("patience");
  if (o.has("tokens")) {
    const std::int64_t per_step = s.batch * s.context;
    s.steps = (o.get<std::int64_t>("tokens") + per_step - 1) / per_step;
  }
  s.lr = o.get_or<double>("lr", 0);
  s.min_lr_ratio = o.get<double>("min-lr-ratio");
  s.warmup = o.get<double>("warmup");
  s.weight_decay = o.get<double>("weight-decay");
  s.beta1 = o.get<double>("beta1");
  s.beta2 = o.get<double>("beta2");
  s.clip = o.get<double>("clip");
  s.eval_every = o.get<std::int64_t>("eval-every");
  s.eval_tokens = o.get<std::int64_t>("eval-tokens");
  s.final_eval_tokens = o.get<std::int64_t>("final-eval-tokens");
  s.checkpoint_minutes = o.get<double>("checkpoint-minutes");
  s.precision = o.get<std::string>("precision");
  s.keep_zeros = o.get<std::string>("keep-zeros");
  s.recompute = o.get<bool>("activation-checkpointing");
  s.device = o.get<std::string>("device");
  if (config.max_position_embeddings > 0 && s.context > config.max_position_embeddings)
    throw usage_error("--context", "at most " + std::to_string(config.max_position_embeddings) + " (max_position_embeddings)",
                      std::to_string(s.context));
  return s;
}

void check_patience(const TrainerSettings& s) {
  if (s.patience > 0 && s.eval_every == 0)
    throw usage_error("--patience", "--eval-every N, the steps between held-out losses", "--eval-every 0");
}

std::vector<HeldOut> read_held_out(const std::vector<std::string>& paths, const TextForm& form,
                                   const Tokenizer& tokenizer) {
  std::vector<HeldOut> held_out;
  for (const TextSpec& spec : parse_text_specs(paths, "--held-out")) {
    if (spec.weight) throw usage_error("--held-out", "a path without a weight", spec.path.string());
    for (const HeldOut& other : held_out)
      if (other.name == spec.name())
        throw usage_error("--held-out", "texts of different names: each has its own report row", spec.name() + " twice");
    const auto documents = read_documents({spec.path}, form.split, /*conversations=*/true);
    HeldOut source{spec.name(), {}};
    if (auto examples = read_examples(documents, form, tokenizer, source.counts)) {
      if (examples->empty())
        throw input_error(spec.path.string(), "an example with something to learn within the context", "none",
                          "raise --context");
      for (Example& example : *examples) {
        const auto first = std::find(example.scored.begin(), example.scored.end(), std::uint8_t{1});
        source.windows.push_back({std::move(example.ids), static_cast<std::int64_t>(source.windows.size()),
                                  first - example.scored.begin()});
        source.scored.push_back(std::move(example.scored));
      }
    } else {
      source.windows = make_windows(tokenizer, documents, form.context, false);
    }
    held_out.push_back(std::move(source));
    if (held_out.back().windows.empty()) throw input_error(spec.path.string(), "at least two tokens of text", "fewer");
  }
  return held_out;
}

MeanLoss held_out_mean(const HeldOut& held_out, std::int64_t tokens, const torch::Device& device, const RowFn& rows,
                       bool stoppable, Ranks* ranks) {
  const torch::NoGradGuard no_grad;
  std::vector<const Window*> chosen;
  const auto counts = [&](const Window& window, std::int64_t t) {
    if (t < std::max<std::int64_t>(1, window.first_scored)) return false;
    return held_out.scored.empty() ||
           held_out.scored[static_cast<std::size_t>(&window - held_out.windows.data())][static_cast<std::size_t>(t)] != 0;
  };
  std::int64_t available = 0;
  for (const Window& window : held_out.windows) available += static_cast<std::int64_t>(window.ids.size());
  const double every = tokens > 0 ? std::max(1.0, static_cast<double>(available) / static_cast<double>(tokens)) : 1.0;
  for (double at = 0; at < static_cast<double>(held_out.windows.size()); at += every)
    chosen.push_back(&held_out.windows[static_cast<std::size_t>(at)]);

  struct Sum {
    double loss = 0;
    std::int64_t count = 0;
  };
  std::map<std::int64_t, Sum> documents;
  std::vector<Sum> windows(chosen.size());
  torch::Tensor sums = torch::zeros({static_cast<std::int64_t>(chosen.size()), 2}, torch::kDouble);
  constexpr std::size_t kAtOnce = 8;
  const std::size_t size = ranks != nullptr ? static_cast<std::size_t>(ranks->size()) : 1,
                    rank = ranks != nullptr ? static_cast<std::size_t>(ranks->rank()) : 0;
  for (std::size_t first = rank * kAtOnce; first < chosen.size(); first += size * kAtOnce) {
    if (stoppable && interrupt_requested()) break;
    std::size_t last = first;
    std::int64_t width = 0;
    while (last < chosen.size() && last - first < kAtOnce) {
      width = std::max(width, static_cast<std::int64_t>(chosen[last]->ids.size()) - 1);  // the last is only predicted
      ++last;
    }
    const auto count = static_cast<std::int64_t>(last - first);
    torch::Tensor ids = torch::zeros({count, width}, torch::kLong), targets = torch::full({count, width}, -1, torch::kLong);
    for (std::int64_t i = 0; i < count; ++i) {
      const Window& window = *chosen[first + static_cast<std::size_t>(i)];
      const auto size = static_cast<std::int64_t>(window.ids.size());
      for (std::int64_t t = 0; t < size; ++t) {
        if (t < width) ids.data_ptr<std::int64_t>()[i * width + t] = window.ids[static_cast<std::size_t>(t)];
        if (counts(window, t))
          targets.data_ptr<std::int64_t>()[i * width + t - 1] = window.ids[static_cast<std::size_t>(t)];
      }
    }
    const torch::Tensor losses =
        rows(ids.to(device), targets.to(device).view(-1)).to(torch::kCPU, torch::kDouble).contiguous();
    for (std::int64_t i = 0; i < count; ++i) {
      double* sum = sums.data_ptr<double>() + 2 * (static_cast<std::int64_t>(first) + i);
      for (std::int64_t t = 0; t < width; ++t) {
        if (targets.data_ptr<std::int64_t>()[i * width + t] < 0) continue;
        sum[0] += losses.data_ptr<double>()[i * width + t];
        ++sum[1];
      }
    }
  }
  if (ranks != nullptr) ranks->sum(sums);  // each window is one rank's, so these are its bits
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    const double* sum = sums.data_ptr<double>() + 2 * i;
    windows[i] = {sum[0], static_cast<std::int64_t>(sum[1])};
    Sum& document = documents[chosen[i]->document];
    document.loss += windows[i].loss;
    document.count += windows[i].count;
  }
  std::vector<Sum> units;
  if (documents.size() > 1)
    for (const auto& [index, sum] : documents) units.push_back(sum);
  else
    units = windows;
  MeanLoss result;
  double total = 0;
  for (const Sum& unit : units) {
    total += unit.loss;
    result.tokens += unit.count;
  }
  if (result.tokens == 0) return result;
  result.mean = total / static_cast<double>(result.tokens);
  double squares = 0;  // ratio estimator over units of unequal size
  for (const Sum& unit : units) {
    const double residual = unit.loss - result.mean * static_cast<double>(unit.count);
    squares += residual * residual;
  }
  const auto n = static_cast<double>(units.size());
  if (n > 1) result.standard_error = std::sqrt(squares * n / (n - 1)) / static_cast<double>(result.tokens);
  return result;
}

MeanLoss held_out_loss(Decoder& decoder, const HeldOut& held_out, std::int64_t tokens, const torch::Device& device,
                       bool stoppable, Ranks* ranks) {
  const RowFn rows = [&](const torch::Tensor& ids, const torch::Tensor& targets) {
    const torch::Tensor hidden = decoder->hidden(ids);
    return row_losses(hidden.view({-1, hidden.size(-1)}), decoder->output_head(), targets);
  };
  return held_out_mean(held_out, tokens, device, rows, stoppable, ranks);
}

Json deciding_options(const Options& options, std::uint64_t seed) {
  Json echo = options.resolved();
  for (const char* key : {"checkpoint-minutes", "restart", "rank-timeout", "activation-checkpointing"}) echo.erase(key);
  echo["seed"] = seed;
  return echo;
}

Json run_training(TrainingJob& job, const std::string& output_dtype, Context& run) {
  TrainerSettings& s = job.settings;
  Ranks& ranks = ranks_of(run);
  check_patience(s);
  if (s.batch < ranks.size())
    throw usage_error("--batch", "at least one sequence for each of " + std::to_string(ranks.size()) + " ranks",
                      std::to_string(s.batch));
  const torch::Device device = parse_device(s.device);
  const PreparedThreads prepared(run.threads);
  job.decoder->to(device);
  job.decoder->recompute_blocks(s.recompute);
  FlatParameters flat(job.decoder, job.frozen ? "off" : s.keep_zeros, device, job.companions, job.frozen);
  if (flat.kept_zeros() > 0)
    run.progress->note("keeping " + std::to_string(flat.kept_zeros()) + " pruned zeros at zero");
  const auto matmul = s.precision == "bf16" ? torch::kBFloat16 : torch::kFloat;
  const fs::path state_file = job.work / kStateFile;
  const std::string kept_in = ranks.first() ? job.work.string() : "the unfinished output of rank 0";
  const std::string resume_hint = "run the same command again to continue, or add --restart to begin anew";

  // What paths cannot tell: the weights before the first step and the texts.
  const Json contents{{"model", flat.hash() + (job.frozen ? "+" + weights_hash(job.decoder) : "")},
                      {"text", text_hash(job.data->sources())},
                      {"held-out text", held_out_hash(job.held_out)}};
  agree_on_job(job, run);
  ranks.agree("what the ranks read", Json{{"model", contents.at("model")}});
  Json curve = Json::array(), before = Json::object();
  std::int64_t step = 0, tokens = 0;
  double smoothed = 0;
  Best best;
  Json meta, pending;  // the point of the curve of a step that is done, until its held-out losses are known
  ranks.first_does([&] {
    if (!fs::exists(state_file)) return;
    meta = flat.read(state_file);
    if (meta.at("options") != job.echo) {
      Json both = meta.at("options");
      both.update(job.echo);
      std::string differ;
      for (const auto& [key, value] : both.items())
        if (meta.at("options").value(key, Json()) != job.echo.value(key, Json())) differ += (differ.empty() ? "" : ", ") + key;
      throw usage_error(state_file.string(), "the options of the interrupted run", "other values of: " + differ,
                        "repeat the command with the same options, or add --restart to begin anew");
    }
    if (meta.at("contents") != contents)
      throw usage_error(state_file.string(), "the model and the texts of the interrupted run", "others under the same names",
                        "bring them back, or add --restart to begin anew");
  });
  meta = parse_json(ranks.broadcast(meta.dump()), "rank 0");
  if (!meta.is_null()) {
    flat.share(ranks);
    step = meta.at("step").get<std::int64_t>();
    tokens = meta.at("tokens").get<std::int64_t>();
    smoothed = meta.at("smoothed_loss").get<double>();
    curve = meta.at("curve");
    before = meta.at("before");
    pending = meta.value("pending", Json());
    if (meta.contains("best"))
      best = {meta.at("best").at("step").get<std::int64_t>(), meta.at("best").at("loss").get<double>(),
              meta.at("best").at("since").get<std::int64_t>()};
    job.data->restore(meta.at("taken").get<std::vector<std::int64_t>>());
    run.progress->note("continuing from step " + std::to_string(step));
  }
  std::vector<std::int64_t> taken = job.data->taken();  // by the steps that are done
  const auto save_state = [&] {
    if (!ranks.first()) return;
    flat.write(state_file,
               Json{{"options", job.echo}, {"contents", contents}, {"step", step}, {"tokens", tokens},
                    {"smoothed_loss", smoothed}, {"taken", taken}, {"before", before}, {"curve", curve},
                    {"pending", pending}, {"best", Json{{"step", best.step}, {"loss", best.loss}, {"since", best.since}}}});
    write_curve(job.work, curve);
  };
  const auto evaluate = [&](std::int64_t limit, bool stoppable) {
    Json losses = Json::object();
    job.decoder->set_matmul_dtype(torch::kFloat);
    for (const HeldOut& held_out : job.held_out) {
      const MeanLoss loss = held_out_loss(job.decoder, held_out, limit, device, stoppable, &ranks);
      losses[held_out.name] = Json{{"loss", loss.mean}, {"standard_error", loss.standard_error}, {"tokens", loss.tokens}};
    }
    return losses;
  };
  if (before.empty() && !job.held_out.empty()) {
    before = evaluate(s.final_eval_tokens, true);
    ranks.throw_if_interrupted(job.stage, "nothing was done yet; run the same command again");
  }

  run.progress->begin(job.stage, s.steps);
  // This rank's part of each batch.
  const std::int64_t begin = s.batch * ranks.rank() / ranks.size(),
                     share = s.batch * (ranks.rank() + 1) / ranks.size() - begin;
  const std::int64_t micro = fitting_micro_batch(s, share), log_every = std::max<std::int64_t>(1, s.steps / 500);
  const auto start = Clock::now();
  auto last_save = start, last_rate = start;
  const std::int64_t tokens_before = tokens;
  std::int64_t rate_tokens = 0;
  double rate = 0;
  std::string latest;
  int spikes = 0;
  const auto patient = [&] { return s.patience == 0 || best.since < s.patience; };
  if (s.patience > 0 && step == 0 && !flat.has_best()) {  // what one begins with may be the best
    const Json losses = evaluate(s.eval_tokens, false);
    best.loss = mean_of(losses);
    flat.keep_best();
  }
  bool stop = ranks.any(interrupt_requested());
  // What hears from the others: where one is lost, the steps that are done are saved.
  const auto with_others = [&](const auto& work) {
    try {
      work();
    } catch (const RankLost& lost) {
      run.progress->end();
      save_state();
      throw RankLost(lost.code(), job.stage + " after step " + std::to_string(step), lost.expected(), lost.found(),
                     (ranks.first() ? "that state is kept in " + job.work.string() : "rank 0 keeps its last state") +
                         "; " + resume_hint);
    }
  };
  const auto measure = [&] {  // seconds: a saved state lacks this point only where a rank was lost on the way
    Json losses;
    with_others([&] { losses = evaluate(s.eval_tokens, false); });
    Json means = Json::object();
    latest.clear();
    for (const auto& [name, value] : losses.items()) {
      means[name] = value.at("loss");
      latest += ", " + name + format(" %.4f", value.at("loss").get<double>());
    }
    pending["held_out"] = means;
    if (s.patience == 0) return;
    const double mean = mean_of(losses);
    ++best.since;
    if (mean < best.loss) {
      best = {step, mean, 0};
      flat.keep_best();
    }
  };
  if (!pending.is_null()) {
    measure();
    curve.push_back(std::exchange(pending, Json()));
  }
  while (step < s.steps && patient()) {
    if (stop || (ranks.alone() && interrupt_requested())) {
      save_state();
      run.progress->end();
      throw Error(ExitCode::kInterrupted, job.stage + " at step " + std::to_string(step), "", "interrupted",
                  resume_hint);
    }
    job.decoder->set_matmul_dtype(matmul);
    Batch batch = job.data->next(s.batch);
    const std::int64_t step_tokens = batch.ids.numel();
    if (!ranks.alone())
      batch = {batch.ids.narrow(0, begin, share), batch.targets.narrow(0, begin, share), batch.counted,
               {batch.windows.begin() + begin, batch.windows.begin() + begin + share},
               batch.starts.defined() ? batch.starts.narrow(0, begin, share) : torch::Tensor()};
    if (job.prepare) {
      if (!ranks.alone()) batch.counted = (batch.targets >= 0).sum().item<std::int64_t>();
      job.prepare(batch, step, begin, s.batch);
      with_others([&] { batch.counted = summed(ranks, batch.counted); });
    }
    LossSums sums;
    double loss = 0;
    flat.clear_gradients();
    for (std::int64_t first = 0; batch.counted > 0 && first < share; first += micro) {
      const std::int64_t count = std::min(micro, share - first);
      const Batch part{batch.ids.narrow(0, first, count).to(device), batch.targets.narrow(0, first, count).to(device), 0,
                       {batch.windows.begin() + first, batch.windows.begin() + first + count},
                       batch.starts.defined() ? batch.starts.narrow(0, first, count).to(device) : torch::Tensor()};
      torch::Tensor value = job.loss(part, 1.0 / static_cast<double>(batch.counted), sums);
      loss += value.item<double>();
      value.backward();
    }
    bool save_now = seconds_since(last_save) > 60 * s.checkpoint_minutes;
    if (!ranks.alone()) {
      const torch::Tensor told = torch::tensor({loss, interrupt_requested() ? 1.0 : 0.0,
                                                ranks.first() && save_now ? 1.0 : 0.0}, torch::kDouble);
      with_others([&] {
        ranks.sum(told);
        flat.sum_gradients(ranks);
      });
      loss = told[0].item<double>();
      stop = told[1].item<double>() > 0;
      save_now = told[2].item<double>() > 0;
    }
    const double norm = flat.gradient_norm();
    if (!std::isfinite(loss) || !std::isfinite(norm))
      throw failure(job.stage + " at step " + std::to_string(step + 1), "a finite loss",
                    std::isfinite(loss) ? "a gradient that is not finite" : "loss " + format("%g", loss),
                    "lower --lr or lengthen --warmup; the last saved state is kept in " + kept_in);
    // Single bad batches are clipped and forgotten; what stays this far above the mean of the last 50 steps is lost.
    spikes = step >= kSpikesFrom && loss > 3 * smoothed + 2 ? spikes + 1 : 0;
    if (spikes == kSpikes)
      throw failure(job.stage + " at step " + std::to_string(step + 1), "a loss near " + format("%.3g", smoothed),
                    format("%.3g", loss) + ", and far above it for " + std::to_string(kSpikes) + " steps: it diverges",
                    "lower --lr or lengthen --warmup; the last saved state is kept in " + kept_in);
    const double lr = learning_rate(s, step);
    const double clip = s.clip > 0 && norm > s.clip ? s.clip / norm : 1.0;
    flat.step(lr, s.beta1, s.beta2, s.weight_decay, clip, step + 1);
    ++step;
    tokens += step_tokens;
    taken = job.data->taken();
    rate_tokens += step_tokens;
    smoothed = step == 1 ? loss : 0.98 * smoothed + 0.02 * loss;
    if (const double elapsed = seconds_since(last_rate); elapsed > 2) {
      rate = static_cast<double>(rate_tokens) / elapsed;
      rate_tokens = 0;
      last_rate = Clock::now();
    }
    run.progress->update(step, "loss " + format("%.4f", smoothed) + latest + format(", %.0f tokens/s", rate));

    const bool eval_now = s.eval_every > 0 && !job.held_out.empty() &&
                          (step % s.eval_every == 0 ? step < s.steps || s.patience > 0 : s.patience > 0 && step == s.steps);
    if (step % log_every == 0 || step == 1 || step == s.steps || eval_now) {
      Json point{{"step", step}, {"tokens", tokens}, {"lr", lr}, {"loss", loss}, {"gradient_norm", norm}};
      if (rate > 0) point["tokens_per_second"] = std::round(rate);
      point["resident_bytes"] = resident_bytes();
      pending = std::move(point);
      if (eval_now) measure();
      curve.push_back(std::exchange(pending, Json()));
    }
    if (step < s.steps && save_now) {
      with_others([&] { flat.share(ranks); });  // ranks on unlike processors round apart
      save_state();
      last_save = Clock::now();
    }
  }
  const double seconds = seconds_since(start);
  save_state();  // an interrupted final evaluation or write begins here again
  if (s.patience > 0) {
    flat.take_best();
    run.progress->note("held-out loss was least at step " + std::to_string(best.step) + " of " + std::to_string(step) +
                       format(" (%.4f); those weights stay", best.loss));
  }
  if (job.finish) job.finish();
  round_weights(job.decoder, output_dtype);
  const Json after = evaluate(s.final_eval_tokens, true);
  ranks.throw_if_interrupted(job.stage + " after its last step", resume_hint);
  run.progress->end("loss " + format("%.4f", smoothed));

  Json result{{"steps", step}, {"tokens", tokens}, {"train_loss", smoothed}, {"held_out", Json::object()},
              {"seconds", seconds},  // of this process's steps, held-out losses between them included
              {"tokens_per_second", static_cast<double>(tokens - tokens_before) / std::max(seconds, 1e-9)}};
  if (s.patience > 0) result["best_step"] = best.step;
  run.report.add({job.stage, "tokens", std::nullopt, static_cast<double>(tokens), "tokens", std::nullopt});
  run.report.add({job.stage, "train_loss", curve.empty() ? std::nullopt : std::optional(curve[0].at("loss").get<double>()),
                  smoothed, "nats/token", std::nullopt});
  Json last{{"step", step}, {"tokens", tokens}, {"final", true}, {"dtype", output_dtype}, {"held_out", Json::object()}};
  for (const auto& [name, value] : after.items()) {
    const double mean = value.at("loss").get<double>(), error = value.at("standard_error").get<double>();
    run.report.add({job.stage, "held_out_loss[" + name + "]", before.at(name).at("loss").get<double>(), mean, "nats/token",
                    error});
    result["held_out"][name] = Json{{"before", before.at(name)}, {"after", value}};
    last["held_out"][name] = Json{{"loss", mean}, {"standard_error", error}, {"tokens", value.at("tokens")}};
  }
  if (!after.empty()) curve.push_back(std::move(last));
  if (ranks.first()) write_curve(job.work, curve);
  return result;
}

TrainingFolder::TrainingFolder(const fs::path& out, Context& run) : run_(run), out_(out) {
  ranks_of(run).first_does([&] {
    transaction_.emplace(out);
    work_ = transaction_->work();
  });
}

TrainingFolder::~TrainingFolder() {
  std::error_code not_empty;
  if (transaction_) fs::remove(work_, not_empty);
}

void TrainingFolder::claim(bool restart) {
  ranks_of(run_).first_does([&] {
    if (restart)
      for (const auto& entry : fs::directory_iterator(work_)) fs::remove_all(entry.path());
    if (fs::exists(work_ / kStateFile) || fs::exists(work_ / kCurveFile)) return;
    for (const auto& entry : fs::directory_iterator(work_)) {
      const std::string name = entry.path().filename().string();
      if (name.find(".tmp-") == std::string::npos)  // else a state on the way to its name
        throw usage_error(work_.string(), "an unfinished run of this very command",
                          "one of another command (" + name + ")",
                          "finish the command it belongs to, or add --restart to remove it");
    }
  });
}

void TrainingFolder::finish(const std::function<void()>& write) {
  bool committed = false;
  try {
    ranks_of(run_).first_does([&] {
      write();
      if (run_.before_commit) run_.before_commit();
      transaction_->commit();
      committed = true;
      fs::remove(out_ / kStateFile);  // only now: killed before, a run has lost nothing
    });
  } catch (const RankLost& lost) {
    if (!committed) throw;
    run_.progress->note(std::string(lost.what()) + "; the result is complete");
  }
}

}  // namespace pare
