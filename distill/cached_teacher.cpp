#include "distill/cached_teacher.h"

#include "core/checkpoint.h"
#include "core/error.h"

namespace pare {
namespace {

void make_cache(const fs::path& file, const LogitCacheInfo& info, const std::vector<Window>& windows, Decoder& teacher,
                const torch::Device& device, Context& run) {
  const torch::NoGradGuard no_grad;
  teacher->set_matmul_dtype(torch::kFloat);
  LogitCacheWriter writer(file, info);
  run.progress->begin("cache the teacher's logits", static_cast<std::int64_t>(windows.size()));
  for (std::size_t w = 0; w < windows.size(); ++w) {
    throw_if_interrupted("cache the teacher's logits", "the cache was not written; run the same command again");
    const auto& ids = windows[w].ids;
    const auto count = static_cast<std::int64_t>(ids.size());
    const torch::Tensor row = torch::tensor(std::vector<std::int64_t>(ids.begin(), ids.end()), torch::kLong);
    const torch::Tensor logits = teacher->forward(row.view({1, count}).to(device)).to(torch::kCPU).contiguous();
    writer.append(ids, logits.data_ptr<float>());
    run.progress->update(static_cast<std::int64_t>(w + 1));
  }
  writer.finish();
  run.progress->end(file.string());
}

}  // namespace

CachedTeacher::CachedTeacher(const fs::path& file, const fs::path& teacher_folder, const std::vector<TextSpec>& specs,
                             const std::optional<std::string>& split, const Tokenizer& tokenizer, Decoder& teacher,
                             std::int64_t context, std::int64_t top_k, const torch::Device& device, Context& run) {
  std::vector<fs::path> paths;
  for (const TextSpec& spec : specs) {
    if (spec.weight) throw usage_error("--cache", "texts without weights: the windows of a cache are fixed", spec.name());
    paths.push_back(spec.path);
  }
  const auto documents = read_documents(paths, split);
  const auto windows = make_windows(tokenizer, documents, context, false);
  LogitCacheInfo info;
  info.vocab_size = teacher->config().vocab_size;
  info.context = context;
  info.top_k = std::min(top_k, info.vocab_size);
  info.corpus_hash = windows_hash(windows);
  info.model_hash = Checkpoint(teacher_folder).content_hash();
  if (!fs::exists(file)) make_cache(file, info, windows, teacher, device, run);
  reader_ = std::make_unique<LogitCacheReader>(file, info);
  source_.name = file.filename();
  source_.documents = static_cast<std::int64_t>(documents.size());
  for (const Window& window : windows) {
    source_.window_begin.push_back(static_cast<std::int64_t>(source_.ids.size()));
    source_.ids.insert(source_.ids.end(), window.ids.begin(), window.ids.end());
  }
}

std::pair<torch::Tensor, torch::Tensor> CachedTeacher::rows(const Batch& batch, const torch::Device& device) {
  const std::int64_t context = batch.ids.size(1), k = reader_->info().top_k;
  const std::int64_t sequences = batch.ids.size(0);
  torch::Tensor index = torch::arange(k, torch::kLong).repeat({sequences * context, 1});
  torch::Tensor log_prob = torch::full({sequences * context, k}, -std::log(static_cast<float>(k)));
  for (std::int64_t s = 0; s < sequences; ++s) {
    const CachedWindow window = reader_->read(batch.windows[static_cast<std::size_t>(s)]);
    for (std::size_t i = 0; i < window.index.size(); ++i) {
      index.data_ptr<std::int64_t>()[s * context * k + static_cast<std::int64_t>(i)] = window.index[i];
      log_prob.data_ptr<float>()[s * context * k + static_cast<std::int64_t>(i)] = window.log_prob[i];
    }
  }
  return {index.to(device), log_prob.to(device)};
}

}  // namespace pare
