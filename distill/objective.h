// Which divergence from the teacher is minimised, as options. Include only from .cpp files (LibTorch).
#pragma once

#include <vector>

#include "core/options.h"
#include "model/divergences.h"

namespace pare {

std::vector<OptionDecl> objective_options();  // --loss, --beta, --alpha, --tau, --kl-weight, --ce-weight
// Errors: exit 2 for a parameter that the chosen loss does not have, or no positive weight at all.
DivergenceLoss read_objective(const Options& options);

}  // namespace pare
