#include <omp.h>

#include <algorithm>

#include "core/error.h"
#include "model/blocks.h"
#include "model/split_products.h"

namespace pare {

void MemoryPlan::add_note(std::vector<std::string>& notes) const {
  if (spill)
    notes.push_back(
        "activations of the calibration windows go to an HDF5 file: with them in memory the peak would be " +
        bytes_in_words(unspilled));
}

MemoryPlan plan_memory(const Options& options, const std::function<std::uint64_t(const fs::path& spill)>& peak,
                       const std::string& hint) {
  const std::uint64_t unspilled = peak({});
  MemoryPlan plan{unspilled, unspilled, false};
  if (!options.has("max-ram")) return plan;
  const std::uint64_t limit = parse_bytes(options.get<std::string>("max-ram"), "--max-ram");
  if (plan.peak <= limit) return plan;
  if (const std::uint64_t spilled = peak("file"); spilled < plan.peak) {
    plan.peak = spilled;
    plan.spill = true;
  }
  if (plan.peak > limit)
    throw Error(ExitCode::kResources, "--max-ram " + options.get<std::string>("max-ram"),
                bytes_in_words(plan.peak) + (plan.spill ? " with the activations in a file" : ""),
                bytes_in_words(limit), hint);
  return plan;
}

std::uint64_t block_work_bytes(const ModelConfig& config, std::int64_t rows) {
  const auto queries = config.num_heads * config.head_dim, keys = config.num_kv_heads * config.head_dim;
  // Hidden state, its normed form and the result; gate and up apart, joined and multiplied, or the same of q, k and v.
  return 4 * static_cast<std::uint64_t>(rows) *
         static_cast<std::uint64_t>(3 * config.hidden_size +
                                    std::max(5 * config.intermediate_size, 3 * queries + 4 * keys));
}

std::int64_t paired_stride(const ModelConfig& config, std::int64_t windows, std::int64_t length,
                           std::int64_t paired_tokens) {
  const std::int64_t widest =
      std::max({config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim});
  return std::clamp<std::int64_t>(windows * length / std::max(paired_tokens, kPairedTokensPerColumn * widest), 1,
                                  std::max<std::int64_t>(1, windows / kHeldOutEvery));
}

std::uint64_t walk_peak_bytes(const ModelConfig& config, std::int64_t windows, std::int64_t length,
                              const WalkOptions& options) {
  const auto hidden = static_cast<std::uint64_t>(config.hidden_size);
  const auto wide = static_cast<std::uint64_t>(
      std::max({config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim}));
  const auto tokens = static_cast<std::uint64_t>(windows * length);
  // The compressed stream and what is kept of it or what its experts add; the windows of the original stream.
  const auto stride = static_cast<std::uint64_t>(
      options.cross ? paired_stride(config, windows, length, options.paired_tokens) : 1);
  const std::uint64_t carried = 2 * tokens +
                                (options.original_stream || options.cross ? (tokens + stride - 1) / stride : 0);
  const auto attention = static_cast<std::uint64_t>(config.num_heads * config.head_dim) * 2 +
                         static_cast<std::uint64_t>(config.num_kv_heads * config.head_dim) * 2;
  const auto inner = static_cast<std::uint64_t>(config.intermediate_size);
  const std::uint64_t block = hidden * (attention + 3 * inner) * 4;  // one expert of several
  const std::uint64_t originals = hidden * std::max(attention, 2 * inner) * 4;
  const std::uint64_t inputs = static_cast<std::uint64_t>(std::min(windows, kShardWindows) * length) * wide * 4;
  const std::uint64_t square = wide * wide * (static_cast<std::int64_t>(wide) > options.widest_double ? 4 : 8);
  const auto threads = static_cast<std::uint64_t>(
      std::min<std::int64_t>({options.threads > 0 ? options.threads : omp_get_num_procs(), kShardWindows, windows}));
  const auto columns = static_cast<std::int64_t>(wide);
  const std::uint64_t packed = has_split_products() ? split_product_bytes(length, columns, columns) : 0;
  const std::uint64_t computing = threads * (block_work_bytes(config, length) + packed);
  const std::uint64_t walking = block * (options.cross ? 2 : 1) +
                                std::max(originals, 2 * inputs * (options.cross ? 2 : 1) + computing) +
                                (options.hessian ? square * (options.cross ? 2 : 1) : 0) +
                                (options.held_out ? 2 * wide * wide * 4 : 0) +
                                static_cast<std::uint64_t>(options.sample_tokens) * wide * 4;
  return (options.spill.empty() ? carried * hidden * 4 : 0) + walking;
}

}  // namespace pare
