#include "runtime/export.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>

#include "core/compact_size.h"
#include "core/error.h"
#include "core/fused_rows.h"
#include "core/gptq_folder.h"
#include "core/model_card.h"
#include "core/placement.h"
#include "core/tensor_store.h"
#include "core/tokenizer.h"
#include "runtime/export_size.h"
#include "runtime/round_to_nearest.h"

namespace pare {
namespace {

constexpr const char* kEmbeddedFiles[] = {"tokenizer.json", "tokenizer_config.json", "generation_config.json",
                                          "special_tokens_map.json", "chat_template.jinja", "LICENSE", "LICENSE.txt",
                                          "LICENSE.md", "NOTICE", "README.md"};

std::optional<std::string> tokenizer_or_note(const std::function<std::optional<std::string>()>& read,
                                             std::vector<std::string>* notes) {
  constexpr const char* kConsequence = "the file can be measured but not given text: ";
  try {
    auto text = read();
    if (!text && notes) notes->push_back(std::string(kConsequence) + "the model has no tokenizer");
    return text;
  } catch (const Error& error) {
    if (error.code() != ExitCode::kInput) throw;
    if (notes) notes->push_back(std::string(kConsequence) + error.what());
    return std::nullopt;
  }
}

void note_doubles(const Checkpoint& checkpoint, std::vector<std::string>& notes) {
  const auto count = std::count_if(checkpoint.tensors().begin(), checkpoint.tensors().end(), [&](const TensorSpec& spec) {
    return checkpoint.dtype(spec.name) == DType::kF64;
  });
  if (count > 0) notes.push_back(std::to_string(count) + " tensors of F64: stored in F32");
}

// Types of vectors, which a compact file holds in f32, where they are not what its reader would take them for.
std::optional<std::string> vector_types(const Checkpoint& checkpoint, const ExportPlan& plan) {
  VectorTypes types({}, "");
  types.set_fallback(checkpoint.float_dtype());
  for (const CompactWriter::Plan& tensor : plan.tensors)
    if (tensor.shape.size() == 2 && tensor.codec.is_float())
      types.count_matrix(float_dtype(tensor.codec.kind), tensor.shape[0] * tensor.shape[1]);
  for (const TensorSpec& spec : checkpoint.tensors())
    if (spec.shape.size() == 1 && checkpoint.dtype(spec.name) != DType::kF64)
      types.expect(spec.name, checkpoint.dtype(spec.name), checkpoint.read_f32(spec.name));
  return types.exceptions();
}

}  // namespace

std::optional<std::string> embedded_tokenizer(const fs::path& folder, std::vector<std::string>* notes) {
  return tokenizer_or_note([&] { return tokenizer_json_text(folder); }, notes);
}

std::optional<std::string> embedded_tokenizer(const Checkpoint& checkpoint, std::vector<std::string>* notes) {
  return tokenizer_or_note([&] { return checkpoint.tokenizer_text(); }, notes);
}

std::uint64_t compact_bytes_beside(const fs::path& folder, const ModelConfig& config,
                                   const std::vector<CompactWriter::Plan>& tensors) {
  constexpr std::uint64_t kCardAndReport = std::uint64_t{16} << 10;
  std::map<std::string, std::uint64_t> embedded = {
      {"config.json", write_config(config, "float32").dump(2).size() + 1}, {"README.md", kCardAndReport}};
  for (const char* name : kEmbeddedFiles)
    if (!embedded.contains(name) && fs::is_regular_file(folder / name)) embedded[name] = fs::file_size(folder / name);
  if (!embedded.contains("tokenizer.json"))
    if (const auto text = embedded_tokenizer(folder)) embedded["tokenizer.json"] = text->size();
  return compact_overhead(tensors, embedded);
}

ExportPlan plan_export(const Checkpoint& checkpoint, const ExportOptions& options) {
  ExportPlan plan;
  plan.notes = checkpoint.notes();
  const bool keep = options.codec == "keep";
  if (keep) note_doubles(checkpoint, plan.notes);
  const Codec wanted = keep ? Codec{} : Codec::parse(options.codec, "--codec");
  for (const TensorSpec& spec : checkpoint.tensors()) {
    Codec codec{CodecKind::kF32, 0};  // norms and biases
    if (checkpoint.is_quantized(spec.name)) {
      codec = checkpoint.codec(spec.name);
    } else if (spec.shape.size() == 2) {
      // A router decides by small differences and is tiny: it stays as it is.
      codec = keep || spec.role == TensorRole::kRouter ? float_codec(checkpoint.dtype(spec.name)) : wanted;
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
  embedded_tokenizer(checkpoint, &plan.notes);
  return plan;
}

std::unique_ptr<CompactWriter> begin_export(const Checkpoint& checkpoint, const ExportOptions& options, Context& context) {
  const ExportPlan plan = plan_export(checkpoint, options);
  for (const std::string& note : plan.notes)
    if (context.progress != nullptr) context.progress->note(note);
  std::map<std::string, std::string> embedded;
  for (const char* name : kEmbeddedFiles) {
    if (name == std::string_view("tokenizer.json")) continue;
    if (auto text = checkpoint.side_file(name)) embedded[name] = std::move(*text);
  }
  if (auto text = embedded_tokenizer(checkpoint)) embedded["tokenizer.json"] = std::move(*text);
  if (options.codec == "keep")
    if (auto types = vector_types(checkpoint, plan)) embedded["dtypes"] = std::move(*types);
  embedded["config.json"] = write_config(checkpoint.config(), checkpoint.float_dtype()).dump(2) + "\n";
  if (!options.recipe.empty()) embedded["recipe"] = options.recipe;
  // A folder's own name says nothing for sure, and equal models give equal files.
  if (const ModelOrigin origin = origin_of(checkpoint.folder(), false);
      options.origin && !(origin.base.empty() && origin.licence.empty()))
    embedded[kOriginFile] = origin_record(origin);

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
      const bool as_stored = options.codec == "keep" && checkpoint.dtype(tensor.name) != DType::kF64;
      if (tensor.codec.is_float()) writer->add(values.data(), as_stored);
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

void export_temporary(const Checkpoint& checkpoint, const fs::path& out, Context context) {
  ExportOptions options;
  options.out = out;
  options.origin = false;
  const std::uint64_t bytes = plan_export(checkpoint, options).payload_bytes;
  std::error_code problem;
  const fs::space_info space = fs::space(out.parent_path(), problem);
  if (!problem && bytes > space.available)
    throw Error(ExitCode::kResources, out.parent_path().parent_path().string(),
                std::to_string(bytes) + " bytes for a temporary compact file",
                std::to_string(space.available) + " free",
                "set TMPDIR to a place with room, or export the model once and use that file");
  export_compact(checkpoint, options, context);
}

namespace {

void write_folder_weights(const Checkpoint& checkpoint, CheckpointWriter& writer, const fs::path& out,
                          Context& context) {
  if (context.progress != nullptr)
    context.progress->begin("export " + out.filename().string(), static_cast<std::int64_t>(checkpoint.tensors().size()));
  std::int64_t done = 0;
  writer.begin_piece("weights");
  for (const TensorSpec& spec : checkpoint.tensors()) {
    throw_if_interrupted(out.string(), "nothing was written; run the same command again");
    if (checkpoint.is_quantized(spec.name)) {
      writer.put_codes(spec.name, checkpoint.codes(spec.name));
    } else {
      const std::vector<float> values = checkpoint.read_f32(spec.name);
      if (checkpoint.dtype(spec.name) == DType::kF64)
        for (const float value : values)
          if (!std::isfinite(value))
            throw input_error("tensor " + spec.name, "finite values that F32 can hold", std::to_string(value));
      writer.put_stored(spec.name, float_dtype(checkpoint.codec(spec.name).kind), values.data());
    }
    checkpoint.release(spec.name);
    if (context.progress != nullptr) context.progress->update(++done);
  }
  writer.end_piece();
  if (context.progress != nullptr) context.progress->end();
}

const char* form_name(FolderForm form) {
  return form == FolderForm::kGptq ? "gptq" : form == FolderForm::kGptqV2 ? "gptq_v2" : "folder";
}

// One codec for all linears of codes, each of them a module that GPTQ knows; other tensors of codes become floats.
// Reads the zero points where there are any and version 1 is to hold them (`less_one`).
void plan_gptq_folder(const Checkpoint& checkpoint, bool less_one, std::vector<std::string>& notes) {
  const std::string place = checkpoint.folder().string();
  const std::vector<StoredTensor> tensors = stored_tensors(checkpoint.config(), checkpoint.tensors());
  const TensorSpec* first = nullptr;
  std::size_t floats = 0, unpacked = 0;
  for (const StoredTensor& stored : tensors) {
    const auto of_floats = [&](const TensorSpec* part) { return checkpoint.codec(part->name).is_float(); };
    const auto floating = std::count_if(stored.parts.begin(), stored.parts.end(), of_floats);
    for (const TensorSpec* part : stored.parts) {
      const Codec codec = checkpoint.codec(part->name);
      if (part->role != TensorRole::kLinear) {
        unpacked += codec.is_float() || (part->role == TensorRole::kHead && first != nullptr &&
                                         codec == checkpoint.codec(first->name)) ? 0 : 1;
        continue;
      }
      if (floating == static_cast<std::ptrdiff_t>(stored.parts.size())) {
        ++floats;
        continue;
      }
      const auto refuse = [&](const std::string& expected, const std::string& why) {
        throw input_error(place, expected, part->name + ": " + why,
                          "--to folder writes these codes as compressed-tensors, --to gguf and compact as files");
      };
      if (codec.is_float())  // the whole would be written as floats
        refuse("one codec for all linears, as GPTQ says it once", "floats among codes in " + stored.name);
      if (first == nullptr) first = part;
      const Codec wanted = checkpoint.codec(first->name);
      if (!is_module(checkpoint.config(), *part)) refuse("linears that GPTQ knows", "no Linear module in transformers");
      if (codec != wanted)
        refuse("one codec for all linears, as GPTQ says it once",
               codec.name() + " where " + first->name + " has " + wanted.name());
      if (const std::string why = gptq_obstacle(codec, stored.shape[0], stored.shape[1]); !why.empty())
        refuse("codes that GPTQ holds", why);
      if (!less_one || codec.kind != CodecKind::kQ4a) continue;
      const std::vector<std::uint8_t> zeros = checkpoint.codes(part->name).zeros;
      checkpoint.release(part->name);
      if (std::find(zeros.begin(), zeros.end(), 0) != zeros.end())
        throw input_error(place, "zero points from 1 to 15, of which version 1 stores one less",
                          part->name + ": 0", "--to gptq_v2 stores them as they are");
    }
  }
  if (first == nullptr)
    throw input_error(place, "linears of codes", "floats alone", "pare quantize --codec q4 makes codes of them");
  if (floats > 0)
    notes.push_back(std::to_string(floats) + " linears of floats: they stay so, quantization_config names them");
  if (unpacked > 0)
    notes.push_back(std::to_string(unpacked) +
                    " tensors of codes beside the linears, which GPTQ has none for: the same weights, as F32");
}

}  // namespace

std::vector<std::string> plan_folder(const Checkpoint& checkpoint, FolderForm form) {
  std::vector<std::string> notes = checkpoint.notes();
  note_doubles(checkpoint, notes);
  if (form != FolderForm::kCompressedTensors) plan_gptq_folder(checkpoint, form == FolderForm::kGptq, notes);
  return notes;
}

std::vector<std::string> export_folder(const Checkpoint& checkpoint, const fs::path& out, Context& context,
                                       FolderForm form) {
  std::vector<std::string> notes = plan_folder(checkpoint, form);
  std::map<std::string, std::string> side_files;
  for (const std::string& name : side_file_names()) {
    auto text = name == "tokenizer.json" ? embedded_tokenizer(checkpoint, &notes) : checkpoint.side_file(name);
    if (text) side_files.emplace(name, std::move(*text));
  }
  if (context.progress != nullptr)
    for (const std::string& note : notes) context.progress->note(note);
  FolderTransaction folder(out);
  if (!fs::is_empty(folder.work()))  // a stage could go on from there, an export cannot
    throw usage_error(folder.work().string(), "no unfinished work of another command", "a folder that is not empty",
                      "let that command finish, remove the folder or choose another --out");
  try {
    CheckpointWriter writer(folder.work(), checkpoint.config(), checkpoint.float_dtype());
    for (const auto& [name, text] : side_files) writer.put_side_file(name, text);
    write_folder_weights(checkpoint, writer, out, context);
    writer.set_form(form);
    writer.finish();
    write_model_card(folder.work(), {checkpoint.folder(), std::string("pare export --to ") + form_name(form), {}, {}});
  } catch (...) {
    folder.discard();
    throw;
  }
  folder.commit();
  return notes;
}

}  // namespace pare
