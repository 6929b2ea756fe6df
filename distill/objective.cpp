#include "distill/objective.h"

#include "core/error.h"

namespace pare {
namespace {

const std::pair<const char*, Divergence> kLosses[] = {{"forward-kl", Divergence::kForwardKl},
                                                      {"reverse-kl", Divergence::kReverseKl},
                                                      {"jsd", Divergence::kJsd},
                                                      {"skew-kl", Divergence::kSkewKl},
                                                      {"skew-reverse-kl", Divergence::kSkewReverseKl},
                                                      {"adaptive-kl", Divergence::kAdaptiveKl}};

}  // namespace

std::vector<OptionDecl> objective_options() {
  using enum OptionType;
  std::vector<std::string> names;
  for (const auto& [name, kind] : kLosses) names.push_back(name);
  return {
      {.name = "loss",
       .type = kText,
       .help = "divergence from the teacher; jsd mixes both directions, the skewed ones stay finite where KL does not",
       .default_value = "forward-kl",
       .choices = names},
      {.name = "beta",
       .type = kNumber,
       .help = "jsd: the teacher's part in the mixture; near 0 forward, near 1 reverse KL",
       .default_value = 0.5,
       .minimum = 0.001,
       .maximum = 0.999},
      {.name = "alpha",
       .type = kNumber,
       .help = "skew-kl, skew-reverse-kl: part of the other model mixed in",
       .default_value = 0.1,
       .minimum = 0,
       .maximum = 0.999},
      {.name = "tau",
       .type = kNumber,
       .help = "temperature of both softmaxes",
       .default_value = 1.0,
       .minimum = 0.05,
       .maximum = 100},
      {.name = "kl-weight",
       .type = kNumber,
       .help = "weight of tau^2 times the divergence",
       .default_value = 1.0,
       .minimum = 0},
      {.name = "ce-weight",
       .type = kNumber,
       .help = "weight of the next-token loss",
       .default_value = 0.0,
       .minimum = 0},
  };
}

DivergenceLoss read_objective(const Options& o) {
  DivergenceLoss loss;
  const auto name = o.get<std::string>("loss");
  for (const auto& [known, kind] : kLosses)
    if (name == known) loss.kind = kind;
  const bool skewed = loss.kind == Divergence::kSkewKl || loss.kind == Divergence::kSkewReverseKl;
  if (loss.kind != Divergence::kJsd) refuse_unused(o, {"beta"}, "with --loss " + name, "pare distill");
  if (!skewed) refuse_unused(o, {"alpha"}, "with --loss " + name, "pare distill");
  if (loss.kind == Divergence::kJsd) loss.parameter = o.get<double>("beta");
  if (skewed) loss.parameter = o.get<double>("alpha");
  loss.weights = {o.get<double>("tau"), o.get<double>("kl-weight"), o.get<double>("ce-weight")};
  if (loss.weights.kl_weight == 0 && loss.weights.ce_weight == 0)
    throw usage_error("--kl-weight", "a positive --kl-weight or --ce-weight", "both zero");
  if (loss.weights.kl_weight == 0) refuse_unused(o, {"loss", "tau"}, "with --kl-weight 0", "pare distill");
  return loss;
}

}  // namespace pare
