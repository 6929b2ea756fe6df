#include "runtime/verbs/eval.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <span>

#include "core/corpus.h"
#include "core/error.h"
#include "core/gguf_file.h"
#include "eval/divergence.h"
#include "eval/lm_eval_results.h"
#include "eval/speed.h"
#include "eval/tasks.h"
#include "runtime/engine.h"
#include "runtime/export.h"
#include "runtime/temporary_folder.h"
#include "runtime/verbs/cli.h"

namespace pare {
namespace {

// A compact file or a model folder, opened but not yet computed with.
class Subject {
 public:
  Subject(const fs::path& path, const Options& options, const Context& context) : path_(path) {
    if (fs::is_directory(path)) {
      folder_ = std::make_shared<Checkpoint>(path);
      for (const auto& entry : fs::directory_iterator(path)) {
        const std::string extension = entry.path().extension().string();
        if (entry.is_regular_file() && (extension == ".safetensors" || extension == ".pare"))
          file_bytes_ += entry.file_size();
      }
      return;
    }
    EngineOptions engine_options;
    engine_options.threads = context.threads;
    engine_options.int8_activations = options.get<std::string>("act") == "int8";
    engine_options.kv = options.get_or<std::string>("kv", "");
    engine_ = Engine::open(path, engine_options);
    file_bytes_ = engine_->file().file_bytes();
    if (!GgufFile::is_gguf(path)) return;
    const GgufFile gguf(path);
    file_bytes_ = gguf.file_bytes();
    gguf_bytes_ = gguf.tensor_bytes();
    hash_ = hash_file(path);
  }

  const fs::path& path() const { return path_; }
  std::string label() const {
    const fs::path clean = path_.lexically_normal();
    return (clean.has_filename() ? clean : clean.parent_path()).filename().string();
  }
  const std::shared_ptr<const Engine>& engine() const { return engine_; }
  const ModelConfig& config() const { return engine_ ? engine_->config() : folder_->config(); }
  std::uint64_t file_bytes() const { return file_bytes_; }
  std::uint64_t tensor_bytes() const {
    if (gguf_bytes_) return *gguf_bytes_;
    return engine_ ? engine_->file().tensor_bytes() : folder_->tensor_bytes();
  }
  std::string hash() const {
    if (!hash_.empty()) return hash_;
    return engine_ ? engine_->file().file_hash() : folder_->content_hash();
  }
  std::optional<std::string> tokenizer_text() const {
    if (engine_) return engine_->file().embedded("tokenizer.json");
    return tokenizer_json_text(path_);
  }
  std::optional<std::string> tokenizer_config() const {
    if (engine_) return engine_->file().embedded("tokenizer_config.json");
    const fs::path file = path_ / "tokenizer_config.json";
    return fs::is_regular_file(file) ? std::optional(read_text(file)) : std::nullopt;
  }
  LogitsSource& logits(const EvalBackend& backend, const std::string& device, Context& context) {
    if (!logits_) logits_ = engine_ ? runtime_logits(engine_) : backend.folder(*folder_, device, context);
    return *logits_;
  }

 private:
  fs::path path_;
  std::shared_ptr<const Checkpoint> folder_;
  std::shared_ptr<const Engine> engine_;
  std::optional<std::uint64_t> gguf_bytes_;  // of a GGUF file, which the engine has as a compact one
  std::string hash_;
  std::unique_ptr<LogitsSource> logits_;
  std::uint64_t file_bytes_ = 0;
};

class NamedLogits : public LogitsSource {
 public:
  NamedLogits(std::string name, std::unique_ptr<LogitsSource> inner)
      : name_(std::move(name)), inner_(std::move(inner)) {}
  std::string name() const override { return name_; }
  std::int64_t vocab_size() const override { return inner_->vocab_size(); }
  void begin(std::span<const std::int32_t> ids) override { inner_->begin(ids); }
  void logits(std::int64_t first, std::int64_t count, float* out) override { inner_->logits(first, count, out); }

 private:
  std::string name_;
  std::unique_ptr<LogitsSource> inner_;
};

std::vector<fs::path> task_files(const std::vector<std::string>& names) {
  std::vector<fs::path> files;
  for (const fs::path name : names) {
    if (!fs::is_directory(name)) {
      files.push_back(name);
      continue;
    }
    std::vector<fs::path> inside;
    for (const auto& entry : fs::directory_iterator(name)) {
      if (entry.is_regular_file() && entry.path().extension() == ".jsonl") inside.push_back(entry.path());
    }
    if (inside.empty()) throw input_error(name.string(), "a folder with .jsonl files", "none of them");
    std::sort(inside.begin(), inside.end());
    files.insert(files.end(), inside.begin(), inside.end());
  }
  return files;
}

class Evaluation {
 public:
  Evaluation(const EvalBackend& backend, const Options& options, Context& context)
      : backend_(backend), options_(options), context_(context) {
    if (backend.has_devices) device_ = options.get<std::string>("device");
    if (options.has("limit")) limit_ = options.get<std::int64_t>("limit");
  }

  Json run() {
    const bool text = options_.has("text"), tasks = options_.has("tasks");
    if (!text && !tasks) throw usage_error("eval", "--text or --tasks", "neither");
    const bool caches = backend_.open_cache && options_.has("cache");
    if (caches && !(text && options_.has("against")))
      throw usage_error("--cache", "--against and --text with it", "not both");
    refuse_unused_options(text, caches);
    const bool as_lm_eval = options_.get<std::string>("output-format") == "lm-eval";
    if (as_lm_eval && !tasks) throw usage_error("--output-format lm-eval", "--tasks with it", "none");
    if (as_lm_eval && (text || options_.has("against")))
      throw usage_error("--output-format lm-eval", "--tasks of one model alone", text ? "--text" : "--against",
                        "that form has no place for it; --output-format pare has");
    if (options_.has("output")) refuse_output(options_.get<std::string>("output"), as_lm_eval);
    begun_ = std::chrono::system_clock::now();
    model_.emplace(options_.get<std::string>("model"), options_, context_);
    if (options_.has("against")) original_.emplace(options_.get<std::string>("against"), options_, context_);
    choose_tokenizer();
    choose_context();
    std::vector<Task> task_list;
    if (tasks) {
      for (const fs::path& file : task_files(options_.get<std::vector<std::string>>("tasks"))) {
        task_list.push_back(read_task(file, limit_));
        for (const Task& other : std::span(task_list).first(task_list.size() - 1))
          if (other.name == task_list.back().name)
            throw usage_error("--tasks", "files of different names, by which results are told apart",
                              other.file.string() + " and " + file.string());
      }
    }
    if (text) make_text_windows();
    result_ = {{"model", model_->path().string()}};
    if (original_) result_["against"] = original_->path().string();
    // First, while nothing else is resident, so that the peak belongs to this file.
    if (model_->engine() && options_.get<bool>("speed")) measure_decoding();
    add_sizes();
    if (text) score_text();
    if (tasks) score_tasks(task_list);
    context_.print(context_.report.table());
    result_["report"] = context_.report.to_json();
    if (options_.has("output")) write_output(options_.get<std::string>("output"), as_lm_eval);
    return std::move(result_);
  }

 private:
  void refuse_unused_options(bool text, bool caches) const {
    if (!text)
      refuse_unused(options_, {"split", "score", "documents", "one-window-per-document", "per"}, "without --text",
                    "pare eval");
    if (!options_.has("output")) refuse_unused(options_, {"output-format"}, "without --output", "pare eval");
    if (backend_.open_cache && !caches) refuse_unused(options_, {"top-k"}, "without --cache", "pare eval");
    bool folders = false, files = false;
    for (const char* name : {"model", "against"}) {
      if (!options_.has(name)) continue;
      (fs::is_directory(options_.get<std::string>(name)) ? folders : files) = true;
    }
    if (!files) refuse_unused(options_, {"act", "kv"}, "without a compact file", "pare eval");
    if (backend_.has_devices && !folders) refuse_unused(options_, {"device"}, "without a model folder", "pare eval");
  }

  // Before anything is scored: what could not be written.
  static void refuse_output(const fs::path& output, bool as_lm_eval) {
    if (as_lm_eval && output.extension() != ".json") return;  // a folder, which is made
    if (fs::is_directory(output)) throw usage_error("--output", "a file", output.string() + ", a folder");
    const fs::path folder = output.parent_path();
    if (!folder.empty() && !fs::is_directory(folder))
      throw usage_error("--output", "a file in a folder that exists", output.string(),
                        "mkdir -p " + folder.string());
  }

  const Subject& reference() const { return original_ ? *original_ : *model_; }

  void choose_tokenizer() {
    const std::optional<std::string> first = reference().tokenizer_text(), own = model_->tokenizer_text();
    const std::optional<std::string>& text = first ? first : own;
    if (!text && reference().engine()) reference().engine()->tokenizer();  // says why there is none
    if (!text) throw input_error(reference().path().string(), "a tokenizer.json", "none");
    tokenizer_.emplace(
        Tokenizer::from_text(*text, (first ? reference() : *model_).path().string() + ": tokenizer.json"));
    if (first && own && *first != *own) {
      other_tokenizer_.emplace(Tokenizer::from_text(*own, model_->path().string() + ": tokenizer.json"));
      refuse_other_pieces();
    }
    const std::int64_t mine = model_->config().vocab_size, theirs = reference().config().vocab_size;
    if (mine == theirs) return;
    // Padding rows may differ; rows that stand for tokens may not.
    if (std::min(mine, theirs) < tokenizer_->size()) {
      throw input_error(model_->path().string(),
                        "a vocabulary of at least the tokenizer's " + std::to_string(tokenizer_->size()),
                        std::to_string(mine) + " against " + std::to_string(theirs));
    }
    vocab_ = std::min(mine, theirs);
    context_.progress->note(
        fmt::format("vocabularies of {} and {}: comparing the common {} ids", theirs, mine, vocab_));
  }

  void refuse_other_pieces() const {
    const std::string place = model_->path().string() + ": tokenizer.json";
    if (tokenizer_->size() != other_tokenizer_->size()) {
      throw input_error(place, "the original's " + std::to_string(tokenizer_->size()) + " tokens",
                        std::to_string(other_tokenizer_->size()), "models are compared token by token");
    }
    for (std::int32_t id = 0; id < tokenizer_->size(); ++id) {
      if (tokenizer_->token(id) != other_tokenizer_->token(id)) {
        throw input_error(place,
                          "token " + std::to_string(id) + " as in the original, \"" + tokenizer_->token(id) + "\"",
                          "\"" + other_tokenizer_->token(id) + "\"", "models are compared token by token");
      }
    }
  }

  void choose_context() {
    most_positions_ = std::min(model_->config().max_position_embeddings, reference().config().max_position_embeddings);
    length_ = options_.has("ctx") ? options_.get<std::int64_t>("ctx") : std::min<std::int64_t>(512, most_positions_);
    if (length_ > most_positions_) {
      throw input_error("--ctx", "at most the models' " + std::to_string(most_positions_) + " positions",
                        std::to_string(length_));
    }
  }

  void make_text_windows() {
    const auto names = options_.get<std::vector<std::string>>("text");
    const std::optional<std::string> split =
        options_.has("split") ? std::optional(options_.get<std::string>("split")) : std::nullopt;
    std::vector<Document> documents = read_documents({names.begin(), names.end()}, split);
    if (options_.has("documents")) {
      documents.resize(std::min(documents.size(), static_cast<std::size_t>(options_.get<std::int64_t>("documents"))));
    }
    const bool one = options_.get<bool>("one-window-per-document");
    windows_ = make_windows(*tokenizer_, documents, length_, one);
    if (other_tokenizer_ &&
        windows_hash(make_windows(*other_tokenizer_, documents, length_, one)) != windows_hash(windows_)) {
      throw input_error(model_->path().string() + ": tokenizer.json",
                        "the ids that the original's tokenizer gives this text", "other ids",
                        "models are compared token by token");
    }
    if (limit_ > 0 && windows_.size() > static_cast<std::size_t>(limit_))
      windows_.resize(static_cast<std::size_t>(limit_));
    if (windows_.empty()) throw input_error(names.front(), "text of at least two tokens", "too little text to score");
  }

  void measure_decoding() {
    const std::shared_ptr<const Engine>& engine = model_->engine();
    const std::int64_t most = engine->config().max_position_embeddings;
    SpeedOptions speed;
    speed.tokens = std::min<std::int64_t>(speed.tokens, most / 2);
    speed.prompt = std::min<std::int64_t>(speed.prompt, most - speed.tokens);
    speed.warm_up = std::min<std::int64_t>(speed.warm_up, most);
    if (speed.tokens < 1 || speed.prompt < 1) return;
    std::vector<std::int32_t> prompt;
    if (!windows_.empty()) prompt = windows_.front().ids;
    if (prompt.empty()) prompt = {0};
    Session session(engine);
    DecodeProbe probe;
    probe.vocab_size = engine->config().vocab_size;
    probe.reset = [&] { session.reset(); };
    probe.feed = [&](std::span<const std::int32_t> ids, float* out) {
      session.feed(ids);
      session.logits(static_cast<std::int64_t>(ids.size()) - 1, 1, out);
    };
    const SpeedResult speed_result = measure_speed(probe, prompt, speed);
    add_rows(speed_result, stage(), context_.report);
    result_["speed"] = to_json(speed_result);
    result_["speed"]["threads"] = engine->options().threads;
    result_["speed"]["kernels"] = engine->options().kernels;
  }

  std::string stage() const { return model_->label(); }

  void add_sizes() {
    const double own = static_cast<double>(parameter_count(model_->config()));
    const double theirs = static_cast<double>(parameter_count(reference().config()));
    const auto add = [&](const char* metric, double after, double before, const char* unit) {
      const std::optional<double> was = original_ ? std::optional<double>(before) : std::nullopt;
      context_.report.add({stage(), metric, was, after, unit, std::nullopt});
      result_["size"][metric] = after;
      if (was) result_["original_size"][metric] = *was;
    };
    const auto bits = [](const Subject& subject, double parameters) {
      return 8.0 * static_cast<double>(subject.tensor_bytes()) / parameters;
    };
    add("file_bytes", static_cast<double>(model_->file_bytes()), static_cast<double>(reference().file_bytes()),
        "bytes");
    add("tensor_bytes", static_cast<double>(model_->tensor_bytes()), static_cast<double>(reference().tensor_bytes()),
        "bytes");
    add("parameters", own, theirs, "");
    add("bits_per_weight", bits(*model_, own), bits(reference(), theirs), "bits");
    if (original_) add("bits_per_original_weight", bits(*model_, theirs), bits(reference(), theirs), "bits");
  }

  void score_text() {
    CompareOptions compare_options;
    compare_options.score = parse_score_rule(options_.get<std::string>("score"));
    compare_options.context = length_;
    compare_options.vocab = vocab_;
    if (options_.has("per")) compare_options.per = parse_unit(options_.get<std::string>("per"));
    DivergenceResult result;
    if (!original_) {
      result =
          compare(model_->logits(backend_, device_, context_), nullptr, windows_, compare_options, *context_.progress);
    } else if (backend_.open_cache && options_.has("cache")) {
      result = score_with_cache(options_.get<std::string>("cache"), compare_options);
    } else {
      result = compare(original_->logits(backend_, device_, context_), &model_->logits(backend_, device_, context_),
                       windows_, compare_options, *context_.progress);
    }
    Json json = to_json(result);
    json["context"] = length_;
    json["score"] = options_.get<std::string>("score");
    std::int64_t ids = 0;
    for (const Window& window : windows_) ids += static_cast<std::int64_t>(window.ids.size());
    const auto rate = [&](const char* who, const ModelScore& score) {
      if (score.seconds > 0) json[who]["scoring_tokens_per_second"] = static_cast<double>(ids) / score.seconds;
    };
    if (!result.from_cache) rate("original", result.original);
    if (result.compressed) rate("compressed", *result.compressed);
    result_["text"] = std::move(json);
    add_rows(result, stage(), context_.report);
    context_.print(
        fmt::format("{} predictions in {} windows of {} documents, context {}, scored: {}; standard errors over {}\n",
                    result.predictions, result.windows, result.documents, length_, options_.get<std::string>("score"),
                    result.clusters));
    if (result.from_cache) {
      context_.print(
          fmt::format("KL against the {} most likely ids and one bucket for the rest: a lower bound\n", result.top_k));
    }
  }

  DivergenceResult score_with_cache(const fs::path& file, CompareOptions compare_options) {
    LogitCacheInfo info;
    info.vocab_size = original_->config().vocab_size;
    info.context = length_;
    info.top_k = options_.get<std::int64_t>("top-k");
    info.corpus_hash = windows_hash(windows_);
    info.model_hash = original_->hash();
    LogitsSource& compressed = model_->logits(backend_, device_, context_);
    if (fs::exists(file)) {
      const std::unique_ptr<CachedLogits> cached = backend_.open_cache(file, info);
      if (options_.changed("top-k") && std::min(info.top_k, info.vocab_size) != cached->info().top_k) {
        throw usage_error("--top-k", std::to_string(cached->info().top_k) + ", as in the existing " + file.string(),
                          std::to_string(info.top_k), "leave it out, or write another cache");
      }
      result_["cache"] = {{"file", file.string()}, {"state", "reused"}};
      return compare_cached(*cached, original_->label() + " (cache)", compressed, windows_, compare_options,
                            *context_.progress);
    }
    if (vocab_ != 0) throw input_error("--cache", "models with the same vocabulary size", "different ones");
    const std::unique_ptr<LogitsSink> sink = backend_.create_cache(file, info);
    compare_options.record = sink.get();
    DivergenceResult result = compare(original_->logits(backend_, device_, context_), &compressed, windows_,
                                      compare_options, *context_.progress);
    sink->finish();
    result_["cache"] = {{"file", file.string()}, {"state", "written"}};
    return result;
  }

  // What the harness predicts the first token of a text from: the tokenizer's BOS, else its EOS.
  std::vector<std::int32_t> text_beginning() const {
    if (const std::optional<std::string> text = reference().tokenizer_config()) {
      const Json config = parse_json(*text, reference().path().string() + ": tokenizer_config.json");
      for (const char* key : {"bos_token", "eos_token"}) {
        const Json token = config.is_object() ? config.value(key, Json(nullptr)) : Json(nullptr);
        const Json content = token.is_object() ? token.value("content", Json(nullptr)) : token;
        if (!content.is_string()) continue;
        if (const std::int32_t id = tokenizer_->id(content.get<std::string>()); id >= 0) return {id};
      }
    }
    if (std::vector<std::int32_t> ids = tokenizer_->prefix_ids(); !ids.empty()) return ids;
    const std::vector<std::int64_t>& ends = reference().config().eos_ids;
    if (ends.empty()) return {};
    return {static_cast<std::int32_t>(ends.front())};
  }

  void write_output(const fs::path& where, bool as_lm_eval) {
    fs::path file = where;
    Json json = result_;
    for (std::size_t i = 0; i < task_results_.size(); ++i)  // item by item, for paired differences between models
      if (!task_results_[i].picks.empty()) json["tasks"][i]["picks"] = task_results_[i].picks;
    if (as_lm_eval) {
      LmEvalRun run;
      run.model = model_->path().string();
      run.model_args = {{"pretrained", run.model}};
      if (model_->engine()) {
        run.model_args["act"] = options_.get<std::string>("act");
        run.model_args["kv"] = model_->engine()->options().kv;
      }
      run.limit = limit_;
      run.context = task_context();
      const std::chrono::duration<double> since = begun_.time_since_epoch();
      run.begun = since.count();
      run.seconds = std::chrono::duration<double>(std::chrono::system_clock::now() - begun_).count();
      file = lm_eval_file(where, run);
      if (file != where) fs::create_directories(file.parent_path());
      json = lm_eval_results(task_results_, run);
    }
    write_text(file, json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
    result_["output"] = file.string();
    context_.progress->note("written: " + file.string());
  }

  std::int64_t task_context() const { return options_.has("ctx") ? length_ : most_positions_; }

  void score_tasks(const std::vector<Task>& tasks) {
    TaskOptions task_options;
    task_options.context = task_context();
    task_options.prefix_ids = text_beginning();
    Json list = Json::array();
    double sum = 0, original_sum = 0;
    int with_accuracy = 0;
    for (const Task& task : tasks) {
      TaskResult result =
          score_task(model_->logits(backend_, device_, context_), *tokenizer_, task, task_options, *context_.progress);
      std::optional<TaskResult> before;
      if (original_) {
        before = score_task(original_->logits(backend_, device_, context_), *tokenizer_, task, task_options,
                            *context_.progress);
        set_agreement(result, *before);
        if (before->accuracy) original_sum += before->accuracy->value;
      }
      task_results_.push_back(result);
      if (result.accuracy) sum += result.accuracy->value;
      with_accuracy += result.accuracy.has_value();
      add_rows(result, before ? &*before : nullptr, stage(), context_.report);
      Json json = to_json(result);
      if (before) json["original"] = to_json(*before);
      list.push_back(std::move(json));
    }
    result_["tasks"] = std::move(list);
    if (with_accuracy < 2) return;
    const double n = with_accuracy;
    const std::optional<double> was = original_ ? std::optional<double>(original_sum / n) : std::nullopt;
    context_.report.add({stage(), "mean of tasks acc", was, sum / n, "share", std::nullopt});
    result_["mean_acc"] = sum / n;
  }

  const EvalBackend& backend_;
  const Options& options_;
  Context& context_;
  std::string device_;
  std::optional<Subject> model_, original_;
  std::optional<Tokenizer> tokenizer_, other_tokenizer_;
  std::vector<Window> windows_;
  std::vector<TaskResult> task_results_;
  std::chrono::system_clock::time_point begun_;
  std::int64_t limit_ = 0, length_ = 0, most_positions_ = 0, vocab_ = 0;
  Json result_;
};

}  // namespace

std::unique_ptr<LogitsSource> folder_logits_by_runtime(const Checkpoint& checkpoint, Context& context) {
  const TemporaryFolder folder;
  const fs::path file = folder.path() / "model.pare";
  Context quiet;
  quiet.threads = context.threads;
  quiet.quiet = true;
  quiet.progress = context.progress;
  export_temporary(checkpoint, file, quiet);
  EngineOptions engine_options;
  engine_options.threads = context.threads;
  engine_options.int8_activations = false;
  // The mapping outlives the name.
  return std::make_unique<NamedLogits>(checkpoint.folder().filename().string() + " (folder, by the runtime)",
                                       runtime_logits(Engine::open(file, engine_options)));
}

Command make_eval_command(EvalBackend backend) {
  Command command;
  command.name = "eval";
  command.summary = "Measure how close a model is to its original: KL, top-1, perplexity, tasks, size, speed";
  command.example = "pare eval model.pare --against original/ --text held_out.txt --split '<|endoftext|>'";
  command.options = {
      {.name = "model",
       .type = OptionType::kPath,
       .help = backend.has_devices
                   ? "compact file, GGUF file or model folder"
                   : "compact file, GGUF file, or model folder (scored through a temporary compact file in TMPDIR)",
       .required = true,
       .positional = true},
      {.name = "against",
       .type = OptionType::kPath,
       .help = "the original: folder, compact file or GGUF file; without it, perplexity only"},
      {.name = "text",
       .type = OptionType::kTextList,
       .help = "text to score: .txt or .jsonl files, or folders of them"},
      {.name = "split", .type = OptionType::kText, .help = "separator between documents of a .txt file"},
      {.name = "ctx",
       .type = OptionType::kInteger,
       .help = "tokens per window, BOS included; default: 512 or what the models take",
       .minimum = 2},
      {.name = "score",
       .type = OptionType::kText,
       .help = "all: every token after the BOS; second-half: llama.cpp's rule, whole windows only",
       .default_value = "all",
       .choices = {"all", "second-half"}},
      {.name = "documents", .type = OptionType::kInteger, .help = "only the first documents", .minimum = 1},
      {.name = "one-window-per-document",
       .type = OptionType::kFlag,
       .help = "cut each document at one window",
       .default_value = false},
      {.name = "per",
       .type = OptionType::kText,
       .help = "with --json: the sums of every document or window as well, for paired comparisons",
       .choices = {"document", "window"}},
      {.name = "limit",
       .type = OptionType::kInteger,
       .help = "only the first windows, and items of each task",
       .minimum = 1},
      {.name = "tasks",
       .type = OptionType::kTextList,
       .help = "task files (.jsonl): query/choices/gold, context/continuation, sentence_good/sentence_bad or "
               "sentence/option1/option2/label, text; or folders"},
      {.name = "output", .type = OptionType::kPath, .help = "file to write the result to, as JSON"},
      {.name = "output-format",
       .type = OptionType::kText,
       .help = "pare: the object of --json; lm-eval: the results of lm-evaluation-harness, into the file if it ends in "
               ".json, else into a folder as the harness names it",
       .default_value = "pare",
       .choices = {"pare", "lm-eval"}},
      {.name = "act",
       .type = OptionType::kText,
       .help = "activations that meet quantized weights of a compact file; w8a8 linears round theirs either way",
       .default_value = "int8",
       .choices = {"int8", "float"}},
      kv_option(),
      {.name = "speed",
       .type = OptionType::kFlag,
       .help = "time the decoding of a compact file",
       .default_value = true},
  };
  if (backend.has_devices) {
    command.options.push_back({.name = "device",
                               .type = OptionType::kText,
                               .help = "where folders are scored: cpu, cuda, cuda:1",
                               .default_value = "cpu"});
  }
  if (backend.open_cache) {
    command.options.push_back(
        {.name = "cache",
         .type = OptionType::kPath,
         .help = "HDF5 file with the original's top-k log-probabilities: reused if it stands, else written"});
    command.options.push_back({.name = "top-k",
                               .type = OptionType::kInteger,
                               .help = "ids per position in a cache to be written",
                               .default_value = 64,
                               .minimum = 1,
                               .maximum = 65536});
  }
  command.run = [backend = std::move(backend)](const Options& options, Context& context) {
    return Evaluation(backend, options, context).run();
  };
  return command;
}

Command eval_command_runtime() {
  EvalBackend backend;
  backend.folder = [](const Checkpoint& checkpoint, const std::string&, Context& context) {
    return folder_logits_by_runtime(checkpoint, context);
  };
  return make_eval_command(std::move(backend));
}

}  // namespace pare
