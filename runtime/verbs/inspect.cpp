// pare inspect: what is inside a model folder, a safetensors file or a compact file.
#include <fmt/format.h>

#include <algorithm>

#include "core/checkpoint.h"
#include "core/compact.h"
#include "core/error.h"
#include "core/gguf_file.h"
#include "runtime/verbs/cli.h"

namespace pare {
namespace {

std::uint64_t elements_of(const std::vector<std::int64_t>& shape) {
  std::uint64_t count = 1;
  for (const std::int64_t size : shape) count *= static_cast<std::uint64_t>(size);
  return count;
}

Json tensor_row(const std::string& name, const std::string& codec, const std::vector<std::int64_t>& shape,
                std::uint64_t bytes) {
  const std::uint64_t elements = elements_of(shape);
  Json row = {{"name", name}, {"codec", codec}, {"shape", shape}, {"bytes", bytes}};
  row["bits_per_weight"] =
      elements == 0 ? Json(nullptr) : Json(8.0 * static_cast<double>(bytes) / static_cast<double>(elements));
  return row;
}

Json config_summary(const ModelConfig& config) {
  Json out = {{"family", config.family},
              {"parameters", parameter_count(config)},
              {"layers", config.num_layers},
              {"hidden_size", config.hidden_size},
              {"intermediate_size", width_json(config, &BlockWidths::inner)},
              {"heads", width_json(config, &BlockWidths::heads)},
              {"kv_heads", width_json(config, &BlockWidths::kv_heads)},
              {"head_dim", config.head_dim},
              {"vocab_size", config.vocab_size},
              {"max_position_embeddings", config.max_position_embeddings},
              {"tied", config.tie_word_embeddings},
              {"eos", config.eos_ids}};
  if (!config.learned_positions) out["rope_theta"] = config.rope_theta;
  if (config.rope_llama3) out["rope_scaling"] = fmt::format("llama3, factor {}", config.rope_llama3->factor);
  else if (config.rope_linear_factor != 1.0)
    out["rope_scaling"] = fmt::format("linear, factor {}", config.rope_linear_factor);
  return out;
}

Json inspect_folder(const fs::path& path) {
  const Checkpoint model(path);
  Json out = {{"kind", "folder"}, {"path", path.string()}, {"config", config_summary(model.config())}};
  Json rows = Json::array();
  for (const TensorSpec& spec : model.tensors()) {
    const Codec codec = model.codec(spec.name);
    const std::uint64_t elements = elements_of(spec.shape);
    std::uint64_t bytes = elements * static_cast<std::uint64_t>(codec.bits()) / 8;
    if (codec.is_float()) {
      bytes = elements * static_cast<std::uint64_t>(dtype_bits(model.dtype(spec.name))) / 8;
    } else {
      const auto scales = static_cast<std::uint64_t>(spec.shape[0] * codec.groups(spec.shape[1]));
      bytes += (scales * static_cast<std::uint64_t>(codec.group_bits()) + 7) / 8;
    }
    rows.push_back(
        tensor_row(spec.name, codec.is_float() ? dtype_name(model.dtype(spec.name)) : codec.name(), spec.shape, bytes));
  }
  Json files = Json::array();
  for (const std::string& name : side_file_names())
    if (fs::exists(path / name)) files.push_back(name);
  out["tensor_bytes"] = model.tensor_bytes();
  out["bits_per_weight"] =
      8.0 * static_cast<double>(model.tensor_bytes()) / static_cast<double>(parameter_count(model.config()));
  out["tensors"] = std::move(rows);
  out["files"] = std::move(files);
  return out;
}

Json inspect_compact(const fs::path& path) {
  const CompactFile file(path);
  Json out = {{"kind", "compact"},
              {"path", path.string()},
              {"version", file.version()},
              {"file_bytes", file.file_bytes()},
              {"file_hash", file.file_hash()},
              {"config", config_summary(file.config())},
              {"tensor_bytes", file.tensor_bytes()}};
  out["bits_per_weight"] =
      8.0 * static_cast<double>(file.tensor_bytes()) / static_cast<double>(parameter_count(file.config()));
  Json rows = Json::array();
  for (const CompactTensor& tensor : file.tensors())
    rows.push_back(tensor_row(tensor.name, tensor.codec.name(), tensor.shape, tensor.payload.size()));
  out["tensors"] = std::move(rows);
  out["files"] = file.embedded_names();
  const std::string report = file.embedded("report").value_or("");
  if (!report.empty()) out["report"] = parse_json(report, path.string() + ": report");
  return out;
}

// The container whatever the model; its configuration where it is one of ours.
Json inspect_gguf(const fs::path& path) {
  const GgufFile file(path);
  Json out = {{"kind", "gguf"}, {"path", path.string()}, {"version", file.version()}, {"file_bytes", file.file_bytes()}};
  try {
    out["config"] = config_summary(Checkpoint::open(path).config());
  } catch (const Error& error) {
    if (error.code() != ExitCode::kInput) throw;
    out["unsupported"] = error.what();
  }
  Json rows = Json::array();
  for (const GgufView& view : file.tensors())
    rows.push_back(tensor_row(view.name, ggml_type_name(view.type), view.shape, view.data.size()));
  out["tensor_bytes"] = file.tensor_bytes();
  out["metadata"] = Json::object();
  for (const std::string& key : file.keys()) out["metadata"][key] = file.shown(key);
  out["tensors"] = std::move(rows);
  return out;
}

Json inspect_safetensors(const fs::path& path) {
  const SafetensorsFile file(path);
  Json out = {{"kind", "safetensors"}, {"path", path.string()}, {"file_bytes", file.file().bytes().size()}};
  Json rows = Json::array();
  std::uint64_t bytes = 0;
  for (const TensorView& view : file.tensors()) {
    rows.push_back(tensor_row(view.name, dtype_name(view.dtype), view.shape, view.data.size()));
    bytes += view.data.size();
  }
  out["tensor_bytes"] = bytes;
  out["metadata"] = Json::object();
  for (const auto& [key, value] : file.metadata()) out["metadata"][key] = value;
  out["tensors"] = std::move(rows);
  return out;
}

std::string table(const Json& rows) {
  std::size_t name_width = 6, shape_width = 5;
  const auto shape_text = [](const Json& shape) {
    std::string text;
    for (const Json& size : shape) text += (text.empty() ? "" : " x ") + std::to_string(size.get<std::int64_t>());
    return text;
  };
  for (const Json& row : rows) {
    name_width = std::max(name_width, row["name"].get_ref<const std::string&>().size());
    shape_width = std::max(shape_width, shape_text(row["shape"]).size());
  }
  std::string text = fmt::format("{:<{}}  {:<8}  {:>{}}  {:>14}  {:>11}", "tensor", name_width, "codec", "shape",
                                 shape_width, "bytes", "bits/weight");
  for (const Json& row : rows)
    text += fmt::format(
        "\n{:<{}}  {:<8}  {:>{}}  {:>14}  {:>11}", row["name"].get<std::string>(), name_width,
        row["codec"].get<std::string>(), shape_text(row["shape"]), shape_width, row["bytes"].get<std::uint64_t>(),
        row["bits_per_weight"].is_null() ? "" : fmt::format("{:.3f}", row["bits_per_weight"].get<double>()));
  return text;
}

std::string human(const Json& result) {
  std::string text;
  for (const auto& [key, value] : result.items()) {
    if (key == "tensors" || key == "report") continue;
    if (value.is_object()) {
      for (const auto& [inner, field] : value.items())
        text += fmt::format("{:<24} {}\n", inner, field.is_string() ? field.get<std::string>() : field.dump());
    } else if (value.is_array()) {
      std::string list;
      for (const Json& item : value) list += (list.empty() ? "" : ", ") + item.get<std::string>();
      text += fmt::format("{:<24} {}\n", key, list);
    } else if (value.is_number_float()) {
      text += fmt::format("{:<24} {:.3f}\n", key, value.get<double>());
    } else {
      text += fmt::format("{:<24} {}\n", key, value.is_string() ? value.get<std::string>() : value.dump());
    }
  }
  text += "\n" + table(result["tensors"]);
  if (!result.contains("report") || result["report"].empty()) return text;
  const Json& report = result["report"];  // of a whole run: the rows beside its key
  const Json& rows = report.is_object() && report.contains("rows") ? report["rows"] : report;
  text += "\n\nreport\n" + Report::from_json(rows, "report").table();
  return text;
}

}  // namespace

Command inspect_command() {
  Command command;
  command.name = "inspect";
  command.summary = "Show what a model folder, a compact file, a GGUF file or a safetensors file holds";
  command.example = "pare inspect model.pare";
  command.options = {{.name = "path",
                      .type = OptionType::kPath,
                      .help = "model folder, compact file, GGUF file or safetensors file",
                      .required = true,
                      .positional = true}};
  command.run = [](const Options& options, Context& context) {
    const fs::path path = options.get<std::string>("path");
    if (!fs::exists(path)) throw input_error(path.string(), "a model folder or file", "nothing there");
    Json result = fs::is_directory(path)             ? inspect_folder(path)
                  : GgufFile::is_gguf(path)       ? inspect_gguf(path)
                  : CompactFile::is_compact(path) ? inspect_compact(path)
                                                  : inspect_safetensors(path);
    context.print(human(result));
    return result;
  };
  return command;
}

}  // namespace pare
