#include "runtime/export.h"

#include "core/error.h"
#include "core/fused_rows.h"
#include "core/tokenizer.h"
#include "runtime/round_to_nearest.h"

namespace pare {
namespace {

constexpr const char* kEmbeddedFiles[] = {"tokenizer.json", "tokenizer_config.json", "generation_config.json",
                                          "special_tokens_map.json", "chat_template.jinja"};

Codec kept_float(DType dtype) {
  if (dtype == DType::kF16) return {CodecKind::kF16, 0};
  if (dtype == DType::kBF16) return {CodecKind::kBf16, 0};
  return {CodecKind::kF32, 0};
}

}  // namespace

std::optional<std::string> embedded_tokenizer(const fs::path& folder, std::vector<std::string>* notes) {
  constexpr const char* kConsequence = "the file can be measured but not given text: ";
  try {
    auto text = tokenizer_json_text(folder);
    if (!text && notes) notes->push_back(std::string(kConsequence) + "the folder has no tokenizer");
    return text;
  } catch (const Error& error) {
    if (error.code() != ExitCode::kInput) throw;
    if (notes) notes->push_back(std::string(kConsequence) + error.what());
    return std::nullopt;
  }
}

ExportPlan plan_export(const Checkpoint& checkpoint, const ExportOptions& options) {
  ExportPlan plan;
  const bool keep = options.codec == "keep";
  const Codec wanted = keep ? Codec{} : Codec::parse(options.codec, "--codec");
  for (const TensorSpec& spec : checkpoint.tensors()) {
    Codec codec{CodecKind::kF32, 0};  // norms and biases
    if (checkpoint.is_quantized(spec.name)) {
      codec = checkpoint.codec(spec.name);
    } else if (spec.shape.size() == 2) {
      // A router decides by small differences and is tiny: it stays as it is.
      codec = keep || spec.role == TensorRole::kRouter ? kept_float(checkpoint.dtype(spec.name)) : wanted;
      if (spec.role == TensorRole::kEmbedding) codec = codec.layout();
      // Small beside the rest, and one row is added to every token: no codes, but no more than 16 bits with them.
      if (spec.role == TensorRole::kPosition && !codec.is_float()) codec = Codec{CodecKind::kF16, 0};
      if (const auto why = not_splittable(checkpoint.config(), spec); why && !codec.is_float()) {
        if (!options.fallback)
          throw input_error(checkpoint.folder().string(), "fused matrices whose parts begin at whole blocks of rows",
                            spec.name + ": " + *why, "leave out --no-fallback to store such tensors as f16");
        plan.notes.push_back(spec.name + ": " + *why + "; stored as f16");
        codec = Codec{CodecKind::kF16, 0};
      }
      if (!codec.fits(spec.shape[1])) {
        const std::string why = spec.name + ": rows of " + std::to_string(spec.shape[1]) + " are not divided by the groups of " + codec.name();
        if (!options.fallback)
          throw input_error(checkpoint.folder().string(), "rows that " + codec.name() + " divides", why,
                            "leave out --no-fallback to store such tensors as q8c");
        plan.notes.push_back(why + "; stored as q8c");
        codec = Codec{CodecKind::kQ8, Codec::kPerRow};
      }
    }
    plan.payload_bytes += codec.payload_bytes(spec.shape.size() == 2 ? spec.shape[0] : 1, spec.shape.back());
    plan.tensors.push_back({spec.name, codec, spec.shape});
  }
  embedded_tokenizer(checkpoint.folder(), &plan.notes);
  return plan;
}

std::unique_ptr<CompactWriter> begin_export(const Checkpoint& checkpoint, const ExportOptions& options, Context& context) {
  const ExportPlan plan = plan_export(checkpoint, options);
  for (const std::string& note : plan.notes)
    if (context.progress != nullptr) context.progress->note(note);
  std::map<std::string, std::string> embedded;
  for (const char* name : kEmbeddedFiles)
    if (fs::is_regular_file(checkpoint.folder() / name)) embedded[name] = read_text(checkpoint.folder() / name);
  if (auto text = embedded_tokenizer(checkpoint.folder())) embedded["tokenizer.json"] = std::move(*text);
  embedded["config.json"] = write_config(checkpoint.config(), checkpoint.float_dtype()).dump(2) + "\n";
  if (!options.recipe.empty()) embedded["recipe"] = options.recipe;

  auto writer = std::make_unique<CompactWriter>(options.out, plan.tensors, std::move(embedded));
  if (context.progress != nullptr)
    context.progress->begin("export " + options.out.filename().string(), static_cast<std::int64_t>(plan.tensors.size()));
  std::int64_t done = 0;
  for (const CompactWriter::Plan& tensor : plan.tensors) {
    throw_if_interrupted(options.out.string(), "nothing was written; run the same command again");
    if (checkpoint.is_quantized(tensor.name)) {
      writer->add(checkpoint.codes(tensor.name));
    } else {
      const std::vector<float> values = checkpoint.read_f32(tensor.name);
      if (tensor.codec.is_float()) writer->add(values.data());
      else writer->add(round_to_nearest(tensor.codec, tensor.shape[0], tensor.shape[1], values.data(), "tensor " + tensor.name));
    }
    checkpoint.release(tensor.name);
    if (context.progress != nullptr) context.progress->update(++done);
  }
  writer->finish_payload();
  if (context.progress != nullptr) context.progress->end();
  return writer;
}

void export_compact(const Checkpoint& checkpoint, const ExportOptions& options, Context& context) {
  const auto writer = begin_export(checkpoint, options, context);
  const CompactFile file(writer->finish_payload());
  const auto before = static_cast<double>(checkpoint.tensor_bytes());
  context.report.add({.stage = "compact", .metric = "tensor_bytes", .before = before,
                      .after = static_cast<double>(file.tensor_bytes()), .unit = "bytes", .standard_error = {}});
  writer->seal(context.report.to_json(true).dump(2) + "\n");
  context.report.add({.stage = "compact", .metric = "file_bytes", .before = {},
                      .after = static_cast<double>(fs::file_size(options.out)), .unit = "bytes", .standard_error = {}});
}

}  // namespace pare
