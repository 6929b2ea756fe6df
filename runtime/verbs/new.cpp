// pare new: a folder with the true shape of a published model and random weights, for measuring and planning.
#include "core/arch/arch.h"
#include "core/checkpoint.h"
#include "core/error.h"
#include "core/random_weights.h"
#include "core/shapes.h"
#include "core/tokenizer.h"
#include "runtime/verbs/cli.h"

namespace pare {
namespace {

constexpr const char* kMark = "random-weights";  // in the work folder of this command

std::string known_shapes() {
  std::string names;
  for (const PublishedShape& shape : shapes()) names += (names.empty() ? "" : ", ") + std::string(shape.name);
  return names;
}

Json shape_config(const std::string& name) {
  if (const PublishedShape* shape = find_shape(name)) return parse_json(shape->config, shape->name);
  if (fs::is_regular_file(name)) return read_json(name);
  std::vector<std::string> names;
  for (const PublishedShape& shape : shapes()) names.emplace_back(shape.name);
  const std::string nearest = nearest_name(name, names);
  throw usage_error("pare new", "a known shape (" + known_shapes() + ") or the path of a config.json",
                    "\"" + name + "\"", nearest.empty() ? "" : "did you mean " + nearest + "?");
}

// The lists that name every layer are cut, or continued from their beginning.
void set_layers(Json& config, const std::string& place, std::int64_t layers) {
  const FamilyKeys& keys = find_family(parse_config(config, nullptr, place).family)->keys;
  config[keys.layers] = layers;
  for (const char* key : {"layer_types", "no_rope_layers", keys.inner, keys.heads, "num_key_value_heads"}) {
    const auto found = config.find(key);
    if (found == config.end() || !found->is_array() || found->empty()) continue;
    Json list = Json::array();
    for (std::int64_t i = 0; i < layers; ++i) list.push_back((*found)[static_cast<std::size_t>(i) % found->size()]);
    *found = list;
  }
}

// Copies the tokenizer files; the model must have a row for each of its tokens.
void take_tokenizer(const fs::path& from, const ModelConfig& config, const fs::path& to) {
  const std::int64_t tokens = Tokenizer::from_file(from / "tokenizer.json").size();
  if (tokens > config.vocab_size)
    throw input_error((from / "tokenizer.json").string(),
                      "at most " + std::to_string(config.vocab_size) + " tokens, the rows of the embedding",
                      std::to_string(tokens), "choose a tokenizer of this model's family");
  for (const std::string& name : side_file_names())
    if (name != "generation_config.json" && fs::is_regular_file(from / name)) copy_file_durably(from / name, to / name);
}

Json run(const Options& options, Context& context) {
  const std::string name = options.get<std::string>("shape"), tokenizer = options.get<std::string>("tokenizer");
  const fs::path out = options.get<std::string>("out");
  Json json = shape_config(name);
  if (options.has("layers")) set_layers(json, name, options.get<std::int64_t>("layers"));
  const ModelConfig config = parse_config(json, nullptr, name);
  if (fs::exists(fs::symlink_status(out)))
    throw usage_error(out.string(), "an output that does not exist yet", "an existing one",
                      "remove it or choose another --out");

  FolderTransaction folder(out);
  // What a killed run of this command left is made anew; anything else under that name is not ours to remove.
  const fs::path mark = folder.work() / kMark;
  if (!fs::is_empty(folder.work()) && !fs::exists(mark))
    throw usage_error(folder.work().string(), "no unfinished work of another command", "some",
                      "remove that folder, or finish the command it belongs to");
  for (const auto& entry : fs::directory_iterator(folder.work())) fs::remove_all(entry.path());
  write_text(mark, "");
  try {
    if (tokenizer != "none") take_tokenizer(tokenizer, config, folder.work());
    write_random_model(folder.work(), config, context.seed, context);
    const Checkpoint written(folder.work());
    fs::remove(mark);
  } catch (...) {
    folder.discard();  // nothing here is worth resuming
    throw;
  }
  folder.commit();
  const std::int64_t parameters = parameter_count(config);
  context.print(out.string() + ": " + std::to_string(config.num_layers) + " layers, " + std::to_string(parameters) +
                " random parameters, bfloat16\n");
  return {{"out", out.string()}, {"family", config.family}, {"layers", config.num_layers}, {"parameters", parameters}};
}

}  // namespace

Command new_command() {
  Command command;
  command.name = "new";
  command.summary = "Write a model folder of a published shape with random weights, to measure and plan with";
  command.options = {
      {.name = "shape",
       .type = OptionType::kText,
       .help = known_shapes() + ", or a config.json",
       .required = true,
       .positional = true},
      {.name = "out", .type = OptionType::kPath, .help = "folder to write", .required = true},
      {.name = "layers",
       .type = OptionType::kInteger,
       .help = "decoder blocks instead of the shape's own",
       .minimum = 1,
       .maximum = 10000},
      {.name = "tokenizer",
       .type = OptionType::kPath,
       .help = "folder to copy the tokenizer from, or none",
       .default_value = "none"},
  };
  command.run = run;
  command.example = "pare new Llama-3.2-1B --layers 4 --out llama-1b-4";
  return command;
}

}  // namespace pare
