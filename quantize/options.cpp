#include "quantize/options.h"

#include <string>

#include "model/blocks.h"
#include "quantize/quantize.h"

namespace pare {
namespace {

// --preset best
constexpr int kBestCodeSteps = 3000, kBestBatch = 4;
constexpr double kBestRate = 2e-3, kBestCodeRate = 7e-3;

}  // namespace

std::vector<OptionDecl> quantize_options() {
  return {
    {.name = "model", .type = OptionType::kPath, .help = "input model folder", .required = true},
    {.name = "out", .type = OptionType::kPath, .help = "output model folder", .required = true},
    {.name = "preset",
     .help = "fast: searched scales; balanced: GPTQ, re-targeted; best: that, token weights and tuning on the whole model. On "
             "the tiny teacher, int4, they remove 25, 64 and 84 % of Q4_0's KL in 5, 9 and 1,100 to 1,400 CPU seconds",
     .choices = {"fast", "balanced", "best"}},
    {.name = "codec",
     .help = "codec of the linears inside the blocks: q4 q4g64 q4g128 q4a q4ag64 q4ag128 q4m q4mg64 q4mg128 q3 "
             "q3g64 q3g128 q2 q2g64 q2g128 q8 q8c, w8a8 (q8c whose inputs are rounded to int8, one scale per token), or keep",
     .default_value = "q4"},
    {.name = "embedding-codec",
     .help = "codec of the embedding, of the head too where the two are tied",
     .default_value = "q8"},
    {.name = "head-codec", .help = "codec of an untied head", .default_value = "q8"},
    {.name = "policy",
     .type = OptionType::kTextList,
     .help = "PATTERN=codec for single tensors, * and ? in names; a later rule wins"},
    {.name = "fallback",
     .help = "where the group does not divide a row: smaller groups, at last q8c; or refuse",
     .default_value = "smaller",
     .choices = {"smaller", "none"}},
    {.name = "method",
     .help = "gptq; rtn: nearest codes, searched scales; rtn-absmax: nearest codes, absmax scales; rtn-q4_0, "
             "rtn-imatrix: q4 as llama.cpp rounds Q4_0, without and with the inputs' energies",
     .default_value = "gptq",
     .choices = {"gptq", "rtn", "rtn-absmax", "rtn-q4_0", "rtn-imatrix"}},
    {.name = "text",
     .type = OptionType::kTextList,
     .help = "calibration text: .txt or .jsonl files, or folders of them"},
    {.name = "split", .help = "separator between documents of .txt files, such as <|endoftext|>"},
    {.name = "random-tokens",
     .type = OptionType::kFlag,
     .help = "calibrate on uniform random tokens instead of text",
     .default_value = false},
    {.name = "samples",
     .type = OptionType::kInteger,
     .help = "calibration windows",
     .default_value = 128,
     .minimum = 1,
     .maximum = 1e6},
    {.name = "context",
     .type = OptionType::kInteger,
     .help = "tokens per window, a BOS included (default: 512, or the model's positions where those are fewer)",
     .minimum = 2,
     .maximum = 1e6},
    {.name = "equalize",
     .help = "before rounding, scale what linears read where that folds away (norms, rows of v and up), by the least output "
             "error on held-out windows: awq; for w8a8 smoothquant, or least-noise",
     .default_value = "none",
     .choices = {"none", "awq", "smoothquant", "least-noise"}},
    {.name = "damping",
     .type = OptionType::kNumber,
     .help = "GPTQ damping as a fraction of the mean Hessian diagonal",
     .default_value = 0.01,
     .minimum = 1e-9,
     .maximum = 10},
    {.name = "polish",
     .type = OptionType::kInteger,
     .help = "GPTQ: passes of coordinate descent over codes and scales after the sweep; 0: the sweep alone",
     .default_value = 2,
     .minimum = 0,
     .maximum = 100},
    {.name = "sparsity",
     .type = OptionType::kNumber,
     .help = "GPTQ: zero this fraction of every linear in the blocks in the same sweep (SparseGPT); the codes that stay "
             "make up for it",
     .minimum = 0.0,
     .maximum = 0.99},
    {.name = "pattern", .help = "the same with N:M, N weights kept of every M inputs, such as 2:4"},
    {.name = "retarget",
     .type = OptionType::kFlag,
     .help = "GPTQ: aim at the original's outputs from the inputs that the quantized model has (Qronos)",
     .default_value = false},
    {.name = "paired-tokens",
     .type = OptionType::kInteger,
     .help = "--retarget: calibration tokens that go through the original weights as well, evenly spaced windows; at least "
             "8 for each column of the widest linear",
     .default_value = kPairedTokens,
     .minimum = 1,
     .maximum = 1e12},
    {.name = "fisher",
     .type = OptionType::kFlag,
     .help = "weigh calibration tokens by how much the model's loss depends on them; one backward pass of the whole model",
     .default_value = false},
    {.name = "bits",
     .type = OptionType::kNumber,
     .help = "bits a weight of the blocks' linears, scales included: each gets the codec that its effect on the loss asks "
             "for, from q3 to q8",
     .minimum = 1,
     .maximum = 16},
    {.name = "kl",
     .type = OptionType::kNumber,
     .help = "instead of --bits: the fewest bits at which nearest codes are estimated to cost at most this, nats per token; "
             "GPTQ and tuning then leave less",
     .minimum = 1e-6,
     .maximum = 100},
    {.name = "tune-codes",
     .type = OptionType::kInteger,
     .help = "afterwards, steps in which codes, scales, norms and biases follow the KL to the original",
     .default_value = 0,
     .minimum = 0,
     .maximum = 1e6},
    {.name = "tune",
     .type = OptionType::kInteger,
     .help = "then, steps in which codes stay and scales, norms and biases follow it",
     .default_value = 0,
     .minimum = 0,
     .maximum = 1e6},
    {.name = "tune-text", .type = OptionType::kTextList, .help = "text to tune on (default: that of --text)"},
    {.name = "tune-batch",
     .type = OptionType::kInteger,
     .help = "windows per tuning step",
     .default_value = 16,
     .minimum = 1,
     .maximum = 65536},
    {.name = "tune-lr",
     .type = OptionType::kNumber,
     .help = "peak learning rate of the scales' logarithms, and relative to their size of norms and biases",
     .default_value = 1e-3,
     .minimum = 0,
     .maximum = 1},
    {.name = "tune-code-lr",
     .type = OptionType::kNumber,
     .help = "peak learning rate of the codes, in steps of the code",
     .default_value = 0.008,
     .minimum = 0,
     .maximum = 1},
    {.name = "expert-tokens",
     .type = OptionType::kInteger,
     .help = "experts that fewer calibration tokens chose than this are calibrated on all tokens",
     .default_value = kExpertTokens,
     .minimum = 1,
     .maximum = 1e9},
    {.name = "device", .help = "cpu, cuda or cuda:N for the calibration passes", .default_value = "cpu"},
    {.name = "max-ram",
     .help =
         "memory to stay below, such as 4G: activations go to a file where they do not fit; refused (exit 5) where "
         "that is not enough"},
  };
}

Options with_preset(const Options& given, const ModelConfig& config) {
  if (!given.has("preset")) return given;
  const auto preset = given.get<std::string>("preset");
  Json chosen = Json::object();
  for (const auto& [name, value] : given.resolved().items())
    if (given.changed(name)) chosen[name] = value;
  const auto add = [&](const char* name, const Json& value) {
    if (!chosen.contains(name)) chosen[name] = value;
  };
  if (preset == "fast") add("method", "rtn");
  const bool gptq = chosen.value("method", "gptq") == "gptq", experts = config.has_experts();
  if (preset != "fast" && gptq && !experts) add("retarget", true);
  if (preset == "best") {
    if (!experts) add("fisher", true);
    add("tune-codes", kBestCodeSteps);
    const bool codes = chosen.at("tune-codes") > 0;
    if (codes || chosen.value("tune", 0) > 0) {
      add("tune-batch", kBestBatch);
      add("tune-lr", kBestRate);
    }
    if (codes) add("tune-code-lr", kBestCodeRate);
  }
  return Options(quantize_command().options, chosen, "pare quantize --preset " + preset);  // --rank-timeout too
}

}  // namespace pare
