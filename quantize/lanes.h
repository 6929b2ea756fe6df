// Rows of one group that are searched together, one a lane. Include only from .cpp files.
#pragma once

namespace pare {
namespace {

typedef double Double8 __attribute__((vector_size(64)));
constexpr int kLanes = 16, kVectors = kLanes / 8;
constexpr double kF16Max = 65504.0;

struct Lanes {
  double at[kLanes] = {};
};

}  // namespace
}  // namespace pare
