#include "runtime/compatibility.h"

#include <algorithm>
#include <map>

#include "core/error.h"
#include "core/gptq_folder.h"
#include "core/placement.h"
#include "core/transformers.h"
#include "runtime/gguf_export.h"

namespace pare {
namespace {

using Answer = Compatibility::Answer;

constexpr std::int64_t kMarlinOutputs = 64, kMarlinInputs = 128;
constexpr std::int64_t kKQuantRow = 256;

std::string linears(std::size_t count) {
  return std::to_string(count) + (count == 1 ? " linear" : " linears");
}

std::string matrices(std::size_t count) {
  return std::to_string(count) + (count == 1 ? " matrix" : " matrices");
}

// One matrix as vLLM multiplies it: linears that share their input are joined.
struct Joined {
  std::string name;  // of the first
  std::int64_t outputs = 0, inputs = 0;
  std::vector<Codec> codecs;
};

class Judge {
 public:
  explicit Judge(const Checkpoint& checkpoint)
      : checkpoint_(checkpoint), config_(checkpoint.config()), gptq_(checkpoint.is_gptq()) {
    std::map<std::string, std::size_t> known;
    for (const TensorSpec& spec : checkpoint.tensors()) {
      if (spec.role != TensorRole::kLinear) continue;
      Codec codec = checkpoint.codec(spec.name);
      if (!codec.is_float() && !gptq_ && !has_packed_form(config_, spec, codec)) {
        ++unpacked_[codec.name()];
        codec = {};  // what others find
      }
      if (const GptqLinear* stored = checkpoint.gptq(spec.name); stored != nullptr) {
        const GptqScheme& scheme = stored->scheme();
        const std::int64_t groups[] = {Codec::kPerRow, 32, 64, 128};  // what GPTQ's kernels are known to take
        const bool usual = std::find(std::begin(groups), std::end(groups), scheme.group) != std::end(groups);
        if (codec.is_float()) ++packed_, ++gptq_floats_;  // others find these codes, pare floats
        if ((codec.is_float() || !usual) && other_gptq_++ == 0)
          other_form_ = std::to_string(scheme.bits) + " bits, " +
                        (scheme.group < 0 ? "one group" : "groups of " + std::to_string(scheme.group)) +
                        (stored->reordered() ? ", inputs in another order (desc_act)" : "");
      }
      if (!codec.is_float()) {
        ++packed_;
        if (codec.bits() < 4) ++narrow_;
        if (codec.int8_inputs) ++int8_inputs_;
      }
      const std::string key = joined_key(spec);
      const auto [at, added] = known.emplace(key, joined_.size());
      if (added) joined_.push_back({spec.module, 0, spec.shape[1], {}});
      Joined& joined = joined_[at->second];
      joined.outputs += spec.shape[0];
      joined.codecs.push_back(codec);
    }
  }

  std::vector<Compatibility> all() const {
    std::vector<Compatibility> out;
    const Compatibility gguf = llama_cpp();
    out.push_back(gguf);
    out.push_back(ollama(gguf));
    out.push_back(transformers());
    out.push_back(marlin());
    out.push_back(vllm_cpu());
    out.push_back({.target = "pare", .how = "pare export --to compact", .reasons = {}});
    stand_as_floats(out.back());
    return out;
  }

 private:
  static std::string joined_key(const TensorSpec& spec) {
    const std::string block = std::to_string(spec.layer) + "." + std::to_string(spec.expert) + ".";
    const std::string part = spec.module.substr(spec.module.rfind('.') + 1);
    if (part == "q_proj" || part == "k_proj" || part == "v_proj") return block + "qkv";
    if (part == "gate_proj" || part == "up_proj") return block + "gate_up";
    return block + spec.module;
  }

  Compatibility llama_cpp() const {
    Compatibility answer{.target = "llama.cpp", .how = "pare export --to gguf", .reasons = {}};
    GgufPlan plan;
    try {
      plan = plan_gguf(checkpoint_, {});
    } catch (const Error& error) {
      answer.loads = answer.fast = Answer::kNo;
      answer.reasons.push_back(error.what());
      return answer;
    }
    std::size_t floats = 0;
    std::string first;
    for (std::size_t i = 0; i < plan.tensors.size(); ++i) {
      if (plan.tensors[i].type != GgmlType::kF32 || plan.sources[i].parts.empty()) continue;
      if (!checkpoint_.is_quantized(plan.sources[i].parts[0]->name)) continue;
      if (floats++ == 0) first = plan.tensors[i].name;
    }
    if (floats > 0) {
      answer.fast = Answer::kNo;
      answer.reasons.push_back(matrices(floats) + " of codes would stand in F32, the first is " + first);
    }
    stand_as_floats(answer);
    std::size_t narrow = 0, all = 0;
    for (const TensorSpec& spec : checkpoint_.tensors()) {
      if (spec.role != TensorRole::kLinear) continue;
      ++all;
      narrow += spec.shape[1] % kKQuantRow != 0;
    }
    if (packed_ == 0 && unpacked_.empty() && narrow > 0)
      answer.reasons.push_back("K-quants (--codec q4_k) need rows of multiples of 256, which " + std::to_string(narrow) +
                               " of " + linears(all) + " have not: those go into finer blocks of 32; q4 and q8 take all");
    answer.reasons.insert(answer.reasons.end(), plan.notes.begin(), plan.notes.end());
    return answer;
  }

  Compatibility ollama(const Compatibility& gguf) const {
    Compatibility answer = gguf;
    answer.target = "Ollama";
    answer.how = "pare export --to gguf, then FROM in a Modelfile";
    answer.reasons.clear();
    if (gguf.loads == Answer::kNo) answer.reasons.push_back("it runs llama.cpp's files");
    if (gguf.loads == Answer::kYes && !has_chat_template())
      answer.reasons.push_back("no chat template in the model: the Modelfile has to bring a TEMPLATE to chat with it");
    return answer;
  }

  bool has_chat_template() const {
    if (checkpoint_.side_file("chat_template.jinja")) return true;
    const auto text = checkpoint_.side_file("tokenizer_config.json");
    return text && text->find("\"chat_template\"") != std::string::npos;
  }

  std::string folder_first() const { return checkpoint_.is_file() ? "pare export --to folder" : "the folder"; }

  // Codes that the folder form has no packed form for, which other loaders find as floats.
  void add_unpacked(Compatibility& answer) const {
    for (const auto& [codec, count] : unpacked_) {
      answer.fast = Answer::kNo;
      answer.reasons.push_back(linears(count) + " in " + codec +
                               ": no form in compressed-tensors, other loaders find the same weights as floats");
    }
  }

  // Forms of GPTQ of which it was not checked who takes them.
  void add_other_gptq(Compatibility& answer) const {
    if (other_gptq_ == 0) return;
    answer.loads = std::min(answer.loads, Answer::kPerhaps);
    answer.fast = std::min(answer.fast, Answer::kPerhaps);
    answer.reasons.push_back(linears(other_gptq_) + " of GPTQ, the first of " + other_form_ +
                             ": which kernels take them was not checked");
  }

  void stand_as_floats(Compatibility& answer) const {
    if (gptq_floats_ == 0) return;
    answer.fast = Answer::kNo;
    answer.reasons.push_back(linears(gptq_floats_) + " of GPTQ that no codec holds: the same weights as F32");
  }

  bool refuse_own_widths(Compatibility& answer) const {
    const auto why = own_widths_obstacle(config_);
    if (!why) return false;
    answer.loads = answer.fast = Answer::kNo;
    answer.reasons.push_back(*why);
    return true;
  }

  Compatibility transformers() const {
    Compatibility answer{.target = "transformers", .how = folder_first(), .reasons = {}};
    if (refuse_own_widths(answer)) return answer;
    if (const auto why = transformers_obstacle(config_)) {
      answer.loads = answer.fast = Answer::kNo;
      answer.reasons.push_back(*why);
    }
    add_unpacked(answer);
    add_other_gptq(answer);
    if (gptq_) answer.reasons.push_back("pip install gptqmodel optimum");
    else if (packed_ > 0) answer.reasons.push_back("pip install compressed-tensors");
    if (narrow_ > 0)
      answer.reasons.push_back(linears(narrow_) +
                               " of 3 or 2 bits: fewer bits on disk, no kernel that multiplies them packed");
    if (!checkpoint_.tokenizer_text()) answer.reasons.push_back("the model has no tokenizer: token ids only");
    return answer;
  }

  std::string marlin_obstacle(const Joined& matrix) const {
    const Codec& codec = matrix.codecs[0];
    if (std::any_of(matrix.codecs.begin(), matrix.codecs.end(), [&](const Codec& c) { return !(c == codec); }))
      return "linears that are joined have different codecs";
    if (!codec.is_float()) {
      if (codec.kind != CodecKind::kQ4 && codec.kind != CodecKind::kQ8) return codec.name() + " is no int4 or int8";
      if (codec.int8_inputs) return "";  // a kernel of its own, see marlin()
    }
    if (matrix.inputs % kMarlinInputs != 0)
      return std::to_string(matrix.inputs) + " inputs are no multiple of " + std::to_string(kMarlinInputs);
    if (matrix.outputs % kMarlinOutputs != 0)
      return std::to_string(matrix.outputs) + " outputs are no multiple of " + std::to_string(kMarlinOutputs);
    return "";
  }

  Compatibility marlin() const {
    Compatibility answer{.target = "vLLM (Marlin)", .how = folder_first(), .reasons = {}};
    if (refuse_own_widths(answer)) return answer;
    std::size_t misfits = 0;
    std::string first;
    for (const Joined& matrix : joined_) {
      const std::string obstacle = marlin_obstacle(matrix);
      if (!obstacle.empty() && misfits++ == 0) first = matrix.name + ": " + obstacle;
    }
    add_unpacked(answer);
    if (packed_ == 0) {
      answer.reasons.push_back("float weights: loads as they are, Marlin multiplies codes");
      if (misfits > 0)
        answer.reasons.push_back("quantized it would not take " + matrices(misfits) + ": " + first);
      answer.fast = misfits > 0 ? Answer::kNo : std::min(answer.fast, Answer::kPerhaps);
      return answer;
    }
    add_other_gptq(answer);
    if (misfits > 0) {
      answer.loads = Answer::kPerhaps;
      answer.fast = Answer::kNo;
      answer.reasons.push_back("other kernels, where the machine has any, have to multiply " + matrices(misfits) +
                               " that Marlin does not take: " + first);
    }
    if (int8_inputs_ > 0)
      answer.reasons.push_back(linears(int8_inputs_) + " with int8 inputs: multiplied by CUTLASS, not Marlin");
    if (config_.has_experts()) {
      answer.fast = std::min(answer.fast, Answer::kPerhaps);
      answer.reasons.push_back("experts have kernels with rules of their own, which are not checked");
    }
    return answer;
  }

  Compatibility vllm_cpu() const {
    Compatibility answer{.target = "vLLM (CPU)", .how = folder_first(), .reasons = {}};
    if (refuse_own_widths(answer)) return answer;
    std::size_t other = 0;
    std::string first;
    for (const Joined& matrix : joined_)
      for (const Codec& codec : matrix.codecs) {
        if (codec.is_float() || codec.kind == CodecKind::kQ4 || codec.int8_inputs) continue;
        if (other++ == 0) first = matrix.name + " in " + codec.name();
      }
    if (other > 0) {
      answer.loads = Answer::kPerhaps;
      answer.fast = Answer::kNo;
      answer.reasons.push_back("its kernels are for 4 bits, and for 8 with int8 inputs (w8a8); " +
                               linears(other) + " of another kind, the first is " + first);
    }
    add_unpacked(answer);
    add_other_gptq(answer);
    return answer;
  }

  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  const bool gptq_;
  std::vector<Joined> joined_;
  std::map<std::string, std::size_t> unpacked_;
  std::size_t packed_ = 0, narrow_ = 0, int8_inputs_ = 0, other_gptq_ = 0, gptq_floats_ = 0;
  std::string other_form_;
};

}  // namespace

const char* answer_name(Compatibility::Answer answer) {
  return answer == Answer::kYes ? "yes" : answer == Answer::kNo ? "no" : "perhaps";
}

std::vector<Compatibility> compatibility(const Checkpoint& checkpoint) {
  return Judge(checkpoint).all();
}

}  // namespace pare
