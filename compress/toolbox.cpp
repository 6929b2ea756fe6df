// The real tools of the pipeline: LibTorch scores folders, the runtime scores compact files.
#include "compress/toolbox.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <span>

#include "compress/export/compact_export.h"
#include "compress/sample.h"
#include "core/checkpoint.h"
#include "core/compact.h"
#include "core/corpus.h"
#include "core/error.h"
#include "core/version.h"
#include "distill/distill.h"
#include "eval/divergence.h"
#include "eval/speed.h"
#include "model/logits.h"
#include "model/train.h"
#include "prune/prune.h"
#include "quantize/quantize.h"
#include "runtime/engine.h"

namespace pare {
namespace {

constexpr std::int64_t kCompareTokens = 2048;  // enough to see a wrong layout, little enough to be quick

std::optional<std::string> optional_text(const std::string& text) {
  return text.empty() ? std::nullopt : std::optional<std::string>(text);
}

std::vector<fs::path> paths(const std::vector<std::string>& names) { return {names.begin(), names.end()}; }

// Whole windows from the start until `max_tokens` predictions are reached; one window always stays.
std::vector<Window> windows_of(const MeasureRequest& request, const ModelConfig& config, std::int64_t max_tokens) {
  const Tokenizer tokenizer = Tokenizer::from_file(request.original / "tokenizer.json");
  std::int64_t context = request.context;
  if (config.max_position_embeddings > 0) context = std::min(context, config.max_position_embeddings);
  std::vector<Window> all =
      make_windows(tokenizer, read_documents(paths(request.text), optional_text(request.split)), context, false);
  if (all.empty()) throw input_error(request.text.front(), "text of at least one window", "too little text to score");
  std::vector<Window> taken;
  std::int64_t predictions = 0;
  for (auto& window : all) {
    predictions += static_cast<std::int64_t>(window.ids.size()) - window.first_scored;
    if (!taken.empty() && predictions > max_tokens) break;
    taken.push_back(std::move(window));
  }
  return taken;
}

std::uint64_t weight_file_bytes(const fs::path& folder) {
  std::uint64_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string extension = entry.path().extension().string();
    if (entry.is_regular_file() && (extension == ".safetensors" || extension == ".pare")) bytes += entry.file_size();
  }
  return bytes;
}

std::shared_ptr<const Engine> open_engine(const fs::path& file, int threads, bool int8_activations) {
  EngineOptions options;
  options.threads = threads;
  options.int8_activations = int8_activations;
  return Engine::open(file, options);
}

void add_speed(const std::shared_ptr<const Engine>& engine, std::span<const std::int32_t> ids, const std::string& stage,
               std::vector<ReportRow>& rows) {
  const ModelConfig& config = engine->config();
  SpeedOptions options;
  const std::int64_t positions = config.max_position_embeddings;
  if (options.prompt + options.warm_up + options.tokens > positions) {
    options.prompt = std::max<std::int64_t>(1, positions / 2);
    options.warm_up = std::min(options.warm_up, positions / 8);
    options.tokens = std::min(options.tokens, positions - options.prompt - options.warm_up);
  }
  Session session(engine);
  DecodeProbe probe;
  probe.vocab_size = config.vocab_size;
  probe.reset = [&] { session.reset(); };
  probe.feed = [&](std::span<const std::int32_t> fed, float* logits) {
    session.feed(fed);
    session.logits(static_cast<std::int64_t>(fed.size()) - 1, 1, logits);
  };
  Report report;
  add_rows(measure_speed(probe, ids, options), stage, report);
  for (const auto& row : report.rows()) rows.push_back(row);
}

std::vector<ReportRow> measure(const MeasureRequest& request, Context& context) {
  const Checkpoint original(request.original);
  const bool is_original = request.model == request.original;
  const bool is_file = !is_original && CompactFile::is_compact(request.model);
  const std::vector<Window> windows = windows_of(request, original.config(), request.max_tokens);
  const auto reference = torch_logits(original, request.device, context.threads);
  std::optional<Checkpoint> folder;
  std::shared_ptr<const Engine> engine;
  std::unique_ptr<LogitsSource> scored;
  if (is_file) {
    engine = open_engine(request.model, context.threads, true);
    scored = runtime_logits(engine);
  } else if (!is_original) {
    folder.emplace(request.model);
    scored = torch_logits(*folder, request.device, context.threads);
  }
  CompareOptions options;
  options.context = request.context;
  const DivergenceResult result = compare(*reference, scored.get(), windows, options, *context.progress);

  const std::string& stage = request.stage;
  std::vector<ReportRow> rows;
  const auto add = [&](const char* metric, double value, const char* unit, std::optional<double> error = {}) {
    rows.push_back({stage, metric, {}, value, unit, error, true});
  };
  Report scored_rows;
  add_rows(result, stage, scored_rows);
  for (const auto& row : scored_rows.rows())
    if (row.stage == stage) rows.push_back(row);  // the original has its own measurement
  const std::uint64_t tensor_bytes = is_file       ? engine->file().tensor_bytes()
                                     : is_original ? original.tensor_bytes()
                                                   : folder->tensor_bytes();
  const std::uint64_t file_bytes = is_file ? engine->file().file_bytes() : weight_file_bytes(request.model);
  const auto own = static_cast<double>(parameter_count(is_file       ? engine->config()
                                                       : is_original ? original.config()
                                                                     : folder->config()));
  add("file_bytes", static_cast<double>(file_bytes), "bytes");
  add("tensor_bytes", static_cast<double>(tensor_bytes), "bytes");
  add("parameters", own, "");
  add("bits_per_weight", 8.0 * static_cast<double>(tensor_bytes) / own, "bits");
  add("bits_per_original_weight",
      8.0 * static_cast<double>(tensor_bytes) / static_cast<double>(parameter_count(original.config())), "bits");
  if (result.compressed) {
    const double ratio = std::exp(result.log_perplexity_ratio.value);
    std::optional<double> error;
    if (result.log_perplexity_ratio.standard_error) error = ratio * *result.log_perplexity_ratio.standard_error;
    add("perplexity_ratio", ratio, "", error);
  }
  if (engine) add_speed(engine, windows.front().ids, stage, rows);
  return rows;
}

// The codes are the same on both sides, so with float activations only rounding may differ; a float codec narrower than
// the folder's rounds weights as well and is allowed what that costs. Where inputs are rounded to int8 a last digit
// decides which way and the choice travels on: half of what that rounding costs at all is allowed.
std::vector<ReportRow> compare_with_folder(const fs::path& file, const MeasureRequest& request, Context& context) {
  const Checkpoint folder(request.model);
  const auto engine = open_engine(file, context.threads, false);
  double allowed = 1e-5;
  bool int8_inputs = false;
  for (const auto& spec : folder.tensors()) {
    int8_inputs = int8_inputs || folder.codec(spec.name).int8_inputs;
    if (folder.is_quantized(spec.name)) continue;
    const CodecKind stored = engine->file().tensor(spec.name).codec.kind;
    if (stored == CodecKind::kF32) continue;
    const DType dtype = folder.dtype(spec.name);
    if (stored == CodecKind::kF16 && dtype != DType::kF16)
      allowed = std::max(allowed, dtype == DType::kBF16 ? 1e-5 : 1e-4);
    if (stored == CodecKind::kBf16 && dtype != DType::kBF16) allowed = std::max(allowed, 1e-2);
  }
  const auto expected = torch_logits(folder, request.device, context.threads);
  const auto found = runtime_logits(engine);
  CompareOptions options;
  options.context = request.context;
  const auto windows = windows_of(request, folder.config(), kCompareTokens);
  if (int8_inputs) {
    const auto unrounded = torch_logits(folder, request.device, context.threads, true);
    const DivergenceResult cost = pare::compare(*expected, unrounded.get(), windows, options, *context.progress);
    allowed = std::max(allowed, cost.kl.value / 2);
  }
  const DivergenceResult result = pare::compare(*expected, found.get(), windows, options, *context.progress);
  // Written so that NaN fails.
  if (!(result.kl.value <= allowed))
    throw failure(file.filename().string(),
                  "mean KL of at most " + Json(allowed).dump() + " nats between the model folder and the runtime",
                  Json(result.kl.value).dump(),
                  "the file does not compute what the folder says; nothing was left under the final name");
  return {{request.stage, "runtime_mean_kl", {}, result.kl.value, "nats", result.kl.standard_error, true},
          {request.stage, "runtime_max_kl", {}, result.kl_maximum, "nats", {}, true}};
}

ModelFacts inspect(const fs::path& model) {
  const Checkpoint checkpoint(model);
  const ModelConfig& c = checkpoint.config();
  ModelFacts facts;
  facts.family = c.family;
  facts.parameters = parameter_count(c);
  facts.tensor_bytes = checkpoint.tensor_bytes();
  facts.max_positions = c.max_position_embeddings;
  facts.planned = planned_model(checkpoint);
  facts.details = {{"layers", c.num_layers},
                   {"hidden_size", c.hidden_size},
                   {"intermediate_size", width_json(c, &BlockWidths::inner)},
                   {"heads", width_json(c, &BlockWidths::heads)},
                   {"kv_heads", width_json(c, &BlockWidths::kv_heads)},
                   {"vocab_size", c.vocab_size},
                   {"tied_embeddings", c.tie_word_embeddings},
                   {"dtype", checkpoint.float_dtype()}};
  Tokenizer::from_file(model / "tokenizer.json");
  return facts;
}

void sample(const SampleRequest& request, Context& context) {
  const fs::path file = request.scratch / "sampling.pare";
  struct Remove {
    fs::path file;
    ~Remove() {
      std::error_code ignored;
      fs::remove(file, ignored);
    }
  } remove{file};
  std::error_code ignored;
  fs::remove(file, ignored);
  export_compact_file({request.model, file, "f32", "", {}}, context);
  const auto engine = open_engine(file, 1, false);
  sample_text(engine, request.documents, request.context, request.seed, request.out, context.threads,
              *context.progress);
}

}  // namespace

Toolbox real_toolbox() {
  Toolbox tools;
  tools.version = kVersion;
  tools.stages = {train_command(), finetune_command(), distill_command(), prune_command(), quantize_command()};
  tools.inspect = inspect;
  tools.check_text = [](const std::vector<std::string>& text, const std::string& split) {
    read_documents(paths(text), optional_text(split));
  };
  tools.sample = sample;
  tools.measure = measure;
  tools.compare = compare_with_folder;
  tools.export_file = export_compact_file;
  tools.export_bytes = compact_bytes;
  return tools;
}

}  // namespace pare
