#include "prune/shape.h"

#include <algorithm>
#include <iterator>
#include <numeric>

#include "core/arch/arch.h"
#include "core/error.h"

namespace pare {
namespace {

constexpr std::int64_t kDefaultMultiple = 32;
constexpr const char* kWidthOptions[] = {"heads", "kv-heads", "ffn", "hidden"};

std::string number(std::int64_t value) { return std::to_string(value); }

}  // namespace

std::int64_t multiple_of(const Options& options) {
  return options.get_or<std::int64_t>("multiple-of", kDefaultMultiple);
}

std::string Shape::in_words() const {
  return number(layers) + " blocks of " + number(heads) + " heads (" + number(kv_heads) + " of keys and values), " +
         (experts > 0 ? number(experts) + " experts of " : "") + number(ffn) + " neurons, " + number(hidden) +
         " channels";
}

Shape shape_of(const ModelConfig& config) {
  return {config.num_layers, config.num_heads, config.num_kv_heads, config.intermediate_size, config.hidden_size,
          config.experts.count};
}

std::vector<std::string> shape_problems(const ModelConfig& config, const Shape& shape, std::int64_t multiple) {
  std::vector<std::string> problems;
  const Shape own = shape_of(config);
  const Family* family = find_family(config.family);
  const std::int64_t width = config.head_dim;
  if (shape.heads % shape.kv_heads != 0)
    problems.push_back(number(shape.heads) + " heads are no multiple of " + number(shape.kv_heads) +
                       " heads of keys and values");
  else if (shape.heads / shape.kv_heads > own.heads / own.kv_heads)
    problems.push_back("each head of keys and values has " + number(own.heads / own.kv_heads) + " query heads, not " +
                       number(shape.heads / shape.kv_heads));
  if (shape.heads != own.heads && own.heads * width % multiple == 0 && shape.heads * width % multiple != 0)
    problems.push_back(number(shape.heads) + " heads of " + number(width) + " are no multiple of --multiple-of " +
                       number(multiple) + ", which o_proj reads");
  if (family->heads_share_width && shape.hidden != shape.heads * width)
    problems.push_back("config.json of " + config.family + " has no width of a head: it is --hidden over --heads, so " +
                       number(shape.heads) + " heads of " + number(width) + " need --hidden " +
                       number(shape.heads * width));
  else if (family->heads_divide_width && shape.hidden % shape.heads != 0 && own.hidden % own.heads == 0)
    problems.push_back("transformers loads " + config.family + " only where --hidden is a multiple of --heads: " +
                       number(shape.hidden) + " and " + number(shape.heads));
  if (shape.experts < config.experts.per_token)
    problems.push_back("each token chooses " + number(config.experts.per_token) + " of " + number(shape.experts) +
                       " experts");
  return problems;
}

Shape asked_shape(const ModelConfig& config, const Options& options) {
  const Shape own = shape_of(config);
  Shape shape = own;
  std::vector<std::string> problems;
  const std::int64_t multiple = multiple_of(options);
  bool any = false;
  const auto take = [&](const char* option, std::int64_t have, bool rounded, const char* what) {
    if (!options.has(option)) return have;
    any = true;
    const auto asked = options.get<std::int64_t>(option);
    const std::int64_t value = rounded ? (asked + multiple - 1) / multiple * multiple : asked;
    if (value >= have)
      problems.push_back("--" + std::string(option) + " " + number(asked) +
                         (value != asked ? " is " + number(value) + ", rounded up to a multiple of " + number(multiple)
                                         : "") +
                         ", where the model has " + number(have) + " " + what);
    return value;
  };
  shape.layers = take("layers", own.layers, false, "blocks");
  shape.kv_heads = take("kv-heads", own.kv_heads, false, "heads of keys and values");
  shape.heads = take("heads", own.heads, false, "heads");
  if (!options.has("heads")) shape.heads = shape.kv_heads * (own.heads / own.kv_heads);      // whole groups
  if (!options.has("kv-heads") && own.heads == own.kv_heads) shape.kv_heads = shape.heads;  // every head has its own
  shape.ffn = take("ffn", own.ffn, true, "neurons");
  shape.hidden = take("hidden", own.hidden, true, "channels");
  if (options.has("experts") && !config.has_experts()) problems.push_back("--experts: the model has none");
  else shape.experts = take("experts", own.experts, false, "experts");
  if (!any)
    problems.push_back("needs --layers, --heads, --kv-heads, --ffn, --hidden, --experts, --max-params, --max-bytes or "
                       "--min-tokens-per-second");
  const bool widths = std::any_of(std::begin(kWidthOptions), std::end(kWidthOptions),
                                  [&](const char* option) { return options.has(option); });
  if (any && !widths && options.has("multiple-of"))
    problems.push_back("has no use for --multiple-of without --heads, --kv-heads, --ffn or --hidden: no width changes");
  if (problems.empty()) problems = shape_problems(config, shape, multiple);
  if (problems.empty()) return shape;
  std::string all;
  for (const std::string& problem : problems) all += (all.empty() ? "" : "; ") + problem;
  throw usage_error("--method shape", "a smaller shape that the model can have", all);
}

void check_per_layer(const ModelConfig& config, const Shape& shape) {
  const Shape own = shape_of(config);
  const auto refuse = [](const std::string& expected, const std::string& found) {
    throw usage_error("--per-layer", expected, found);
  };
  const bool heads = shape.heads < own.heads, ffn = shape.ffn < own.ffn;
  if (!heads && !ffn) refuse("--ffn or --kv-heads, which blocks may differ in, or a budget", "neither");
  if (heads && find_family(config.family)->heads_share_width)
    refuse("a family whose config.json says how wide a head is", config.family + " with fewer heads");
  if (heads && shape.heads / shape.kv_heads != own.heads / own.kv_heads)
    refuse("--kv-heads with all their query heads",
           number(shape.heads / shape.kv_heads) + " of " + number(own.heads / own.kv_heads) + " query heads of each");
  if (ffn && config.has_experts()) refuse("--kv-heads: experts are as wide in every block", "--ffn");
}

ModelConfig cut_config(const ModelConfig& config, const Shape& shape, const std::vector<int>& layers,
                       const std::vector<BlockWidths>& widths) {
  ModelConfig out = with_layers(config, layers);
  out.num_heads = shape.heads;
  out.num_kv_heads = shape.kv_heads;
  out.intermediate_size = shape.ffn;
  out.hidden_size = shape.hidden;
  out.experts.count = shape.experts;
  if (!widths.empty()) out.set_widths(widths);
  ModelConfig read = parse_config(write_config(out, "float32"), nullptr, "config.json of the cut model");
  read.eos_ids = config.eos_ids;
  read.source = out.source;
  return read;
}

ModelConfig cut_config(const ModelConfig& config, const Shape& shape) {
  std::vector<int> first(static_cast<std::size_t>(shape.layers));
  std::iota(first.begin(), first.end(), 0);
  return cut_config(config, shape, first);
}

}  // namespace pare
