// pare verify: recomputes what can be recomputed and names every tensor that does not agree.
#include <cmath>

#include "core/checkpoint.h"
#include "core/compact.h"
#include "core/error.h"
#include "core/gguf_file.h"
#include "runtime/verbs/cli.h"

namespace pare {
namespace {

// A folder has no hashes; its floats can be checked to be finite, its codes to be in range and, where codes.pare
// stands beside an unpacked copy, the two to agree bit for bit.
std::vector<std::string> damaged_tensors(const fs::path& folder, std::int64_t& checked) {
  const Checkpoint model(folder);
  std::unique_ptr<ShardedTensors> shards;
  std::vector<std::string> damaged;
  for (const TensorSpec& spec : model.tensors()) {
    ++checked;
    std::vector<float> values;
    try {
      values = model.read_f32(spec.name);  // validates codes
    } catch (const Error& problem) {
      damaged.push_back(spec.name + " (" + problem.expected() + ", found " + problem.found() + ")");
      continue;
    }
    bool intact = true;
    for (const float value : values) intact = intact && std::isfinite(value);
    if (model.is_quantized(spec.name)) {
      if (!shards) shards = std::make_unique<ShardedTensors>(folder);
      if (const TensorView* dense = shards->find(spec.name)) {
        std::vector<float> copy(values.size());
        to_f32(*dense, 0, static_cast<std::int64_t>(copy.size()), copy.data());
        intact = intact && copy == values;
      }
    }
    if (!intact) damaged.push_back(spec.name);
    model.release(spec.name);
  }
  return damaged;
}

}  // namespace

Command verify_command() {
  Command command;
  command.name = "verify";
  command.summary = "Check every hash of a compact file, or every number of a model folder";
  command.example = "pare verify model.pare";
  command.options = {{.name = "path", .type = OptionType::kPath, .help = "compact file or model folder",
                      .required = true, .positional = true}};
  command.run = [](const Options& options, Context& context) {
    const fs::path path = options.get<std::string>("path");
    std::vector<std::string> damaged;
    std::int64_t checked = 0;
    std::string hash;
    if (fs::is_directory(path)) {
      damaged = damaged_tensors(path, checked);
    } else {
      if (!fs::exists(path)) throw input_error(path.string(), "a compact file or a model folder", "nothing there");
      if (GgufFile::is_gguf(path))
        throw input_error(path.string(), "a compact file or a model folder", "a GGUF file, which has no hashes",
                          "pare export --to compact makes a file that has them");
      const CompactFile file(path);
      damaged = file.verify();
      checked = static_cast<std::int64_t>(file.tensors().size());
      hash = file.file_hash();
    }
    if (!damaged.empty()) {
      std::string names;
      for (const std::string& name : damaged) names += (names.empty() ? "" : ", ") + name;
      throw input_error(path.string(), "intact bytes", "damage in " + names, "copy or make the file again");
    }
    context.print(path.string() + ": intact, " + std::to_string(checked) + " tensors" +
                  (hash.empty() ? "" : ", file hash " + hash));
    return Json{{"path", path.string()},
                {"intact", true},
                {"tensors", checked},
                {"file_hash", hash.empty() ? Json(nullptr) : Json(hash)}};
  };
  return command;
}

}  // namespace pare
