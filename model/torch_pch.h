// The precompiled header of every source that sees LibTorch.
#pragma once

#include <torch/torch.h>
