#include "distill/matching.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "core/error.h"
#include "core/uniform.h"

namespace pare {

using torch::Tensor;

LayerPairs parse_layer_pairs(const std::string& text, std::int64_t student_layers, std::int64_t teacher_layers) {
  LayerPairs pairs;
  if (text.empty() || text == "even") {
    for (std::int64_t i = 0; i < student_layers; ++i)
      pairs.push_back({static_cast<int>(i),
                       static_cast<int>(((i + 1) * teacher_layers + student_layers / 2) / student_layers) - 1});
    for (auto& [own, taught] : pairs) taught = std::max(taught, 0);
    return pairs;
  }
  const std::string expected = "even, or pairs STUDENT:TEACHER with student layers below " +
                               std::to_string(student_layers) + " and teacher layers below " +
                               std::to_string(teacher_layers) + ", such as 0:1,2:5";
  for (const char* at = text.data(); at <= text.data() + text.size();) {
    const char* end = std::find(at, text.data() + text.size(), ',');
    const char* colon = std::find(at, end, ':');
    int own = -1, taught = -1;
    const auto number = [](const char* first, const char* last, int& value) {
      const auto [stop, error] = std::from_chars(first, last, value);
      return error == std::errc() && stop == last && value >= 0;
    };
    if (colon == end || !number(at, colon, own) || !number(colon + 1, end, taught) || own >= student_layers ||
        taught >= teacher_layers)
      throw usage_error("--hidden-layers", expected, text);
    pairs.push_back({own, taught});
    at = end + 1;
  }
  return pairs;
}

HiddenStates hidden_states(Decoder& decoder, const Tensor& ids, const std::vector<int>& layers, const Tensor& starts,
                           const std::vector<int>& attention_layers) {
  HiddenStates states;
  states.blocks.resize(layers.size());
  states.attention.resize(attention_layers.size());
  const RopeTables tables = decoder->rope(ids.size(1), starts);
  Tensor x = decoder->embed(ids, starts);
  for (int l = 0; l < decoder->config().num_layers; ++l) {
    const bool heard = std::find(attention_layers.begin(), attention_layers.end(), l) != attention_layers.end();
    if (heard)
      decoder->block(l)->set_observer([&, l](BlockStage stage, const Tensor& output) {
        for (std::size_t i = 0; i < attention_layers.size(); ++i)
          if (stage == BlockStage::kO && attention_layers[i] == l) states.attention[i] = output;
      });
    x = decoder->through_block(l, x, tables);
    if (heard) decoder->block(l)->set_observer({});
    for (std::size_t i = 0; i < layers.size(); ++i)
      if (layers[i] == l) states.blocks[i] = x;
  }
  states.last = decoder->final_norm(x);
  return states;
}

HiddenMatch::HiddenMatch(LayerPairs pairs, std::int64_t student_width, std::int64_t teacher_width, std::uint64_t seed,
                         const torch::Device& device)
    : pairs_(std::move(pairs)) {
  for (std::size_t p = 0; p < pairs_.size(); ++p) {
    Tensor projection = torch::eye(teacher_width, student_width, torch::kFloat);
    if (teacher_width != student_width) {
      const double bound = std::sqrt(3.0 / static_cast<double>(student_width));  // variance 1 / width
      const auto first = static_cast<std::uint64_t>(p) * static_cast<std::uint64_t>(projection.numel());
      for (std::int64_t i = 0; i < projection.numel(); ++i)
        projection.data_ptr<float>()[i] =
            static_cast<float>(bound * (2 * uniform_at(seed, first + static_cast<std::uint64_t>(i)) - 1));
    }
    projections_.push_back(projection.to(device).requires_grad_());
  }
}

std::vector<int> HiddenMatch::student_layers() const {
  std::vector<int> layers;
  for (const auto& [own, taught] : pairs_) layers.push_back(own);
  return layers;
}

std::vector<int> HiddenMatch::teacher_layers() const {
  std::vector<int> layers;
  for (const auto& [own, taught] : pairs_) layers.push_back(taught);
  return layers;
}

Tensor HiddenMatch::loss(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher, const Tensor& targets,
                         double scale) const {
  Tensor total;
  const Tensor counted = (targets.reshape({-1}) >= 0).to(torch::kFloat);
  for (std::size_t p = 0; p < pairs_.size(); ++p) {
    const Tensor own = student[p].reshape({-1, student[p].size(-1)}).to(torch::kFloat);
    const Tensor taught = teacher[p].reshape({-1, teacher[p].size(-1)}).to(torch::kFloat);
    const Tensor missed = (torch::mm(own, projections_[p].t()) - taught).square().sum(1);
    const Tensor part = (missed / taught.square().sum(1).clamp_min(1e-12) * counted).sum();
    total = total.defined() ? total + part : part;
  }
  return total * (scale / static_cast<double>(pairs_.size()));
}

}  // namespace pare
