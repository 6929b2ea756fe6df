#include "distill/on_policy.h"

#include <algorithm>
#include <cmath>

#include "model/sampled_labels.h"

namespace pare {

bool on_policy_step(double share, std::int64_t step) {
  const auto due = [share](std::int64_t steps) { return std::floor(static_cast<double>(steps) * share + 1e-9); };
  return due(step + 1) > due(step);
}

void continue_prompts(Decoder& student, Batch& batch, std::int64_t prompt, std::int64_t tokens, std::int64_t vocab,
                      std::uint64_t seed, std::uint64_t place, std::int64_t micro, const torch::Device& device,
                      std::int64_t stride) {
  const torch::NoGradGuard no_grad;
  const std::int64_t sequences = batch.ids.size(0), width = prompt + tokens;
  torch::Tensor ids = torch::zeros({sequences, width}, torch::kLong);
  ids.narrow(1, 0, prompt).copy_(batch.ids.narrow(1, 0, prompt));
  if (batch.starts.defined())  // the document that the prompt ends in goes on
    batch.starts = torch::cat({batch.starts.narrow(1, 0, prompt),
                               batch.starts.narrow(1, prompt - 1, 1).expand({sequences, tokens})}, 1);
  for (std::int64_t first = 0; first < sequences; first += micro) {
    const std::int64_t count = std::min(micro, sequences - first);
    const torch::Tensor part = ids.narrow(0, first, count);
    torch::Tensor there = part.to(device);
    const torch::Tensor starts =
        batch.starts.defined() ? batch.starts.narrow(0, first, count).to(device) : torch::Tensor();
    for (std::int64_t t = 0; t < tokens; ++t) {
      const torch::Tensor own = starts.defined() ? starts.narrow(1, 0, prompt + t) : starts;
      const torch::Tensor hidden = student->hidden(there.narrow(1, 0, prompt + t), own).select(1, prompt + t - 1);
      const auto drawn = static_cast<std::uint64_t>(t * (stride > 0 ? stride : sequences) + first);
      there.select(1, prompt + t).copy_(sampled_labels(student, hidden, seed, place + drawn, vocab));
    }
    part.copy_(there);
  }
  torch::Tensor targets = torch::full({sequences, width}, -1, torch::kLong);
  const torch::Tensor text = batch.targets.contiguous();
  const auto& ends = student->config().eos_ids;
  batch.counted = 0;
  for (std::int64_t s = 0; s < sequences; ++s) {
    const std::int64_t* known = text.data_ptr<std::int64_t>() + s * text.size(1);
    if (std::all_of(known + prompt - 1, known + text.size(1), [](std::int64_t target) { return target < 0; })) continue;
    const std::int64_t* row = ids.data_ptr<std::int64_t>() + s * width;
    for (std::int64_t t = prompt; t < width; ++t) {
      targets.data_ptr<std::int64_t>()[s * width + t - 1] = row[t];
      ++batch.counted;
      if (std::find(ends.begin(), ends.end(), row[t]) != ends.end()) break;
    }
  }
  batch.ids = ids;
  batch.targets = targets;
}

}  // namespace pare
