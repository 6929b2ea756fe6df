#include "quantize/policy.h"

#include <algorithm>

#include "core/error.h"
#include "core/fused_rows.h"
#include "core/options.h"

namespace pare {
namespace {

constexpr const char* kKeep = "keep";

// Empty: keep.
std::optional<Codec> parse_choice(const std::string& name, const std::string& place) {
  if (name == kKeep) return std::nullopt;
  const Codec codec = Codec::parse(name, place);
  if (codec.is_float()) {
    throw usage_error(place, "a codec that quantizes, or keep", "\"" + name + "\"",
                      "keep leaves a tensor in the floats it is stored in");
  }
  return codec;
}

std::string module_name(const TensorSpec& spec) { return spec.name.substr(0, spec.name.rfind('.')); }

bool is_matrix(const TensorSpec& spec) {
  return spec.role == TensorRole::kLinear || spec.role == TensorRole::kEmbedding || spec.role == TensorRole::kHead;
}

struct Rule {
  std::string text, pattern;
  std::optional<Codec> codec;
  bool matched = false;
};

}  // namespace

bool glob_match(std::string_view pattern, std::string_view text) {
  std::size_t p = 0, t = 0, star = std::string_view::npos, resume = 0;
  while (t < text.size()) {
    if (p < pattern.size() && (pattern[p] == '?' || (pattern[p] == text[t] && pattern[p] != '*'))) {
      ++p;
      ++t;
    } else if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = t;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      t = ++resume;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

std::string module_kind(const std::string& module) {
  constexpr std::string_view kExperts = ".experts.";
  const std::size_t begin = module.find(kExperts);
  if (begin == std::string::npos) return module;
  const std::size_t number = begin + kExperts.size();
  return module.substr(0, number) + "*" + module.substr(std::min(module.find('.', number), module.size()));
}

std::vector<TensorPlan> plan_codecs(const ModelConfig& config, const QuantizePolicy& policy) {
  std::vector<std::string> problems;
  const auto choice = [&](const std::string& name, const std::string& place) -> std::optional<Codec> {
    try {
      return parse_choice(name, place);
    } catch (const Error& error) {
      problems.push_back(error.what());
      return std::nullopt;
    }
  };
  const std::optional<Codec> linear = choice(policy.linear, "--codec");
  const std::optional<Codec> embedding = choice(policy.embedding, "--embedding-codec");
  const std::optional<Codec> head = choice(policy.head, "--head-codec");
  std::vector<Rule> rules;
  for (const std::string& text : policy.rules) {
    const std::size_t equals = text.rfind('=');
    if (equals == std::string::npos || equals == 0 || equals + 1 == text.size()) {
      problems.push_back("--policy: expected PATTERN=codec, found \"" + text + "\"");
      continue;
    }
    rules.push_back({text, text.substr(0, equals), choice(text.substr(equals + 1), "--policy " + text)});
  }

  std::vector<TensorPlan> plan;
  std::vector<std::string> names, misfits, split;
  for (const TensorSpec& spec : expected_tensors(config)) {
    TensorPlan tensor{spec, std::nullopt, {}};
    if (is_matrix(spec)) {
      tensor.codec = spec.role == TensorRole::kEmbedding ? embedding : spec.role == TensorRole::kHead ? head : linear;
      names.push_back(spec.name);
      for (Rule& rule : rules) {
        if (!glob_match(rule.pattern, spec.name) && !glob_match(rule.pattern, module_name(spec))) continue;
        rule.matched = true;
        tensor.codec = rule.codec;
      }
      if (tensor.codec) {
        tensor.asked = *tensor.codec;
        if (spec.role == TensorRole::kEmbedding && tensor.codec->int8_inputs)
          problems.push_back(spec.name + ": " + tensor.codec->name() + " rounds the inputs of linears, and rows of an "
                             "embedding are looked up; q8c has its layout");
        if (const auto why = not_splittable(config, spec)) split.push_back(spec.name + ": " + *why);
        const std::int64_t cols = spec.shape[1];
        if (!tensor.codec->fits(cols)) {
          misfits.push_back(spec.name + " (" + tensor.codec->name() + ", rows of " + std::to_string(cols) + ")");
          tensor.codec = tensor.codec->fitting(cols);
        }
      }
    }
    plan.push_back(std::move(tensor));
  }
  for (const Rule& rule : rules) {
    if (rule.matched) continue;
    const std::string near = nearest_name(rule.pattern, names);
    problems.push_back("--policy " + rule.text + ": no matrix of the model is called that" +
                       (near.empty() ? "" : "; nearest: " + near));
  }
  if (!problems.empty()) {
    std::string all;
    for (const std::string& problem : problems) all += (all.empty() ? "" : "\n  ") + problem;
    throw usage_error("quantize policy", "codecs and patterns that this model has", all);
  }
  if (!split.empty())
    throw input_error("quantize policy", "fused matrices whose parts begin at whole blocks of rows", split.front(),
                      "leave them float with --policy \"*.qkv_proj=keep\" or \"*.gate_up_proj=keep\"");
  if (!policy.fallback && !misfits.empty()) {
    std::string all;
    for (const std::string& misfit : misfits) all += (all.empty() ? "" : ", ") + misfit;
    throw input_error("quantize policy", "groups that divide the rows, as --fallback none demands", all,
                      "leave --fallback at its default, or name a codec for these tensors with --policy");
  }
  return plan;
}

std::vector<std::string> fallback_notes(const std::vector<TensorPlan>& plan) {
  std::vector<std::pair<std::string, std::int64_t>> counted;
  for (const TensorPlan& tensor : plan) {
    if (!tensor.fallback()) continue;
    const std::string line = ": " + tensor.asked.name() + " does not divide " + std::to_string(tensor.spec.shape[1]) +
                             " columns, " + tensor.codec->name() + " instead";
    const std::string key = module_kind(tensor.spec.module) + "\n" + line;
    const auto found = std::find_if(counted.begin(), counted.end(), [&](const auto& c) { return c.first == key; });
    if (found == counted.end()) {
      counted.emplace_back(key, 1);
    } else {
      ++found->second;
    }
  }
  std::vector<std::string> notes;
  for (const auto& [key, count] : counted) {
    const std::size_t at = key.find('\n');
    notes.push_back(key.substr(0, at) + " (" + std::to_string(count) + (count == 1 ? " tensor)" : " tensors)") +
                    key.substr(at + 1));
  }
  return notes;
}

void require_zeros(const std::vector<TensorPlan>& plan, const Sparsity& sparsity, const std::string& place) {
  for (const TensorPlan& tensor : plan) {
    if (tensor.spec.layer < 0 || tensor.spec.role != TensorRole::kLinear) continue;
    const std::int64_t cols = tensor.spec.shape[1];
    if (!tensor.codec || tensor.codec->kind == CodecKind::kQ4m)
      throw usage_error(place, "a codec with a code for exactly 0 in every linear of the blocks",
                        tensor.spec.name + (tensor.codec ? " as " + tensor.codec->name() : " kept as it is"));
    const std::int64_t unit = tensor.codec->group > 0 ? tensor.codec->group : cols;
    if (sparsity.n_of_m() && (cols % sparsity.of != 0 || unit % sparsity.of != 0))
      throw usage_error(place, "a pattern whose M divides the " + std::to_string(unit) + " weights of a scale in " +
                                   tensor.spec.name, sparsity.name(), "use --sparsity instead");
    if (sparsity.removed(cols) == 0)
      throw usage_error(place, "a fraction that removes at least one of the " + std::to_string(cols) + " inputs of " +
                                   tensor.spec.name, std::to_string(sparsity.fraction));
  }
}

}  // namespace pare
