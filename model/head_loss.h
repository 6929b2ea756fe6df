// How every loss on logits walks over the rows: what losses.cpp and divergences.cpp share. Include only from .cpp files
// (LibTorch).
#pragma once

#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <functional>

#include "model/losses.h"

namespace pare {

// logits [count, vocab] of rows begin .. begin + count - 1 become d(result)/d(logits) in place.
using LogitRows = std::function<double(std::int64_t begin, std::int64_t count, torch::Tensor& logits)>;

// The sum of what `rows` returns over chunks of rows, as a scalar that is differentiable in hidden [rows, width] and in
// the head. About 4 Mi logits exist at a time, whatever the vocabulary.
torch::Tensor loss_over_head(const torch::Tensor& hidden, const OutputHead& head, const LogitRows& rows);

// The logits of a chunk without gradient.
torch::Tensor head_rows(const torch::Tensor& hidden, const OutputHead& head, std::int64_t begin, std::int64_t count);
std::int64_t chunk_rows(std::int64_t vocab);  // rows of a chunk

// Turns logits into scale * d(-log p[target])/d(logits) in place and returns the losses of the rows.
torch::Tensor cross_entropy_rows(torch::Tensor& logits, const torch::Tensor& targets, double scale);

// Counts the rows and checks that every target is an id of the head. Error: exit 3.
void begin_loss(const torch::Tensor& targets, const OutputHead& head, LossSums* sums);
double sum_in_order(const torch::Tensor& values);  // the same bits at any thread count

// What the row kernels take: float or bfloat16 on the CPU. Everything else is computed with LibTorch's own operations.
inline bool has_kernel(const torch::Tensor& t) {
  return t.device().is_cpu() && (t.scalar_type() == torch::kFloat || t.scalar_type() == torch::kBFloat16);
}
constexpr std::int64_t kRowShard = 16;
template <class F>
void for_shards(std::int64_t rows, F&& f) {
  at::parallel_for(0, (rows + kRowShard - 1) / kRowShard, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) f(i * kRowShard, std::min(rows, (i + 1) * kRowShard));
  });
}
template <class T>
T* storage(const torch::Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace pare
