// A teacher, its tokenizer and text, and the distill command on them. Include only with LibTorch at hand.
#pragma once

#include "distill/distill.h"
#include "tests/model/models.h"

namespace pare::testing {

struct DistillWorkplace {
  Folder folder;
  explicit DistillWorkplace(const std::string& name) : folder("distill-" + name) {
    write_tokenizer(folder / "like");
    write_file(folder / "text.txt", sample_text());
    write_file(folder / "held.txt", sample_text().substr(0, 3000));
    Decoder teacher = small_decoder(1, small_config(), 3);
    save_decoder(teacher, "float32", folder / "like", folder / "teacher");
  }
  // A folder of the blocks `layers` of a teacher.
  std::string student(const std::vector<int>& layers, const std::string& of = "teacher",
                      const std::string& dtype = "float32") const {
    const torch::NoGradGuard no_grad;
    std::string name = "student-of-" + of;
    for (const int layer : layers) name += "-" + std::to_string(layer);
    if (fs::exists(folder / name)) return (folder / name).string();
    Decoder teacher = load_decoder(Checkpoint(folder / of), torch::kCPU);
    Decoder cut(with_layers(teacher->config(), layers));
    for (const TensorSpec& spec : expected_tensors(cut->config())) {
      const std::string prefix = "model.layers.";
      const std::string from =
          spec.layer < 0 ? spec.name
                         : prefix + std::to_string(layers[static_cast<std::size_t>(spec.layer)]) +
                               spec.name.substr(prefix.size() + std::to_string(spec.layer).size());
      cut->tensor(spec.name).copy_(teacher->tensor(from));
    }
    save_decoder(cut, dtype, folder / "like", folder / name);
    return (folder / name).string();
  }
  Json base(const std::string& out) const {
    return Json{{"teacher", (folder / "teacher").string()},
                {"out", (folder / out).string()},
                {"text", Json::array({(folder / "text.txt").string()})},
                {"held-out", Json::array({(folder / "held.txt").string()})},
                {"steps", 25},
                {"batch", 4},
                {"context", 32},
                {"lr", 0.003},
                {"weight-decay", 0.0}};
  }
  Json run(const Json& given) const {
    QuietRun r;
    const Command command = distill_command();
    return command.run(Options(command.options, given, "test"), r.context);
  }
  int code_of(const Json& given) const {
    try {
      run(given);
    } catch (const Error& error) {
      return static_cast<int>(error.code());
    }
    return 0;
  }
};

}  // namespace pare::testing
