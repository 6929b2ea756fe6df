// Row kernels of the divergences beside forward KL. Arithmetic is float32; chosen once per process for this CPU.
#pragma once

#include <cstdint>

#include "model/fused_kernels.h"

namespace pare {

enum class Divergence { kForwardKl, kReverseKl, kJsd, kSkewKl, kSkewReverseKl, kAdaptiveKl };

struct DivergenceStep {
  Divergence kind = Divergence::kReverseKl;  // not kForwardKl, which RowKernels has
  float parameter = 0;                       // beta of kJsd, alpha of the skewed ones, neither 0
  float tau = 1, weight = 1, ce_weight = 0, scale = 1;
};

constexpr float kAdaptiveHead = 0.5f;  // mass of the teacher that counts as head in kAdaptiveKl

// student [rows, vocab] becomes scale * d/d(student) of weight * tau^2 * D(softmax(teacher / tau), softmax(student /
// tau)) + ce_weight * CE(target). Rows with target < 0 become 0 (and count nothing). value, ce [rows]. T: float, Bf16.
template <class T>
using DivergenceKernel = void (*)(const DivergenceStep& step, T* student, const T* teacher, const std::int64_t* targets,
                                  std::int64_t rows, std::int64_t vocab, float* value, float* ce);
template <class T>
DivergenceKernel<T> divergence_kernel();

}  // namespace pare
