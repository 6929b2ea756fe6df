#include "distill/cached_teacher.h"

#include <algorithm>
#include <cmath>

#include "core/checkpoint.h"
#include "core/error.h"
#include "model/ranks.h"

namespace pare {
namespace {

// Ranks take turns with the windows; rank 0 writes what all of them give it, in order.
void make_cache(const fs::path& file, const LogitCacheInfo& info, const std::vector<Window>& windows, Decoder& teacher,
                const torch::Device& device, Context& run) {
  const torch::NoGradGuard no_grad;
  Ranks& ranks = ranks_of(run);
  teacher->set_matmul_dtype(torch::kFloat);
  std::optional<LogitCacheWriter> writer;
  std::size_t done = 0;
  ranks.first_does([&] {
    writer.emplace(file, info, /*resumable=*/true);
    done = static_cast<std::size_t>(writer->windows_done());
  });
  if (ranks.any(!fs::exists(LogitCacheReader::partial_path(file))))
    throw usage_error("--cache", "a path that every rank sees: rank 0 writes the file and all read it",
                      "ranks that do not see " + LogitCacheReader::partial_path(file).string(),
                      "put the cache on a disk that the machines share");
  done = std::stoull(ranks.broadcast(std::to_string(done)));
  if (done > 0) run.progress->note("continuing the cache from window " + std::to_string(done));
  run.progress->begin("cache the teacher's logits", static_cast<std::int64_t>(windows.size()));
  const auto size = static_cast<std::size_t>(ranks.size());
  std::uint64_t first_id = 0;
  CachedWindow mine;
  for (std::size_t w = 0; w < windows.size(); ++w) {
    if (w >= done && (w - done) % size == 0)
      ranks.throw_if_interrupted("cache the teacher's logits", "run the same command again to continue");
    const auto& ids = windows[w].ids;
    const std::size_t turn = w < done ? 0 : (w - done) % size;
    if (w >= done && turn == static_cast<std::size_t>(ranks.rank())) {
      const auto count = static_cast<std::int64_t>(ids.size());
      const torch::Tensor row = torch::tensor(std::vector<std::int64_t>(ids.begin(), ids.end()), torch::kLong);
      const torch::Tensor logits = teacher->forward(row.view({1, count}).to(device)).narrow(-1, 0, info.vocab_size);
      const torch::Tensor host = logits.to(torch::kCPU).contiguous();
      mine = cached_window(info, ids, host.data_ptr<float>(), first_id);
    }
    first_id += ids.size();
    if (w >= done && (turn + 1 == size || w + 1 == windows.size())) {
      const std::vector<std::string> all = ranks.alone() ? std::vector<std::string>() : ranks.gather(packed(mine));
      if (ranks.alone()) writer->append(mine);
      if (writer && !ranks.alone())
        for (std::size_t r = 0; r <= turn; ++r) writer->append(unpacked_window(all[r]));
      run.progress->update(static_cast<std::int64_t>(w + 1));
    }
  }
  ranks.first_does([&] { writer->finish(); });
  run.progress->end(file.string());
}

}  // namespace

CachedTeacher::CachedTeacher(const fs::path& file, LogitCacheInfo kept, const fs::path& teacher_folder,
                             const std::vector<TextSpec>& specs, const TextForm& form, const Tokenizer& tokenizer,
                             Decoder& teacher, const torch::Device& device, Context& run) {
  std::vector<Window> windows;
  TextForm whole = form;  // an example is a window of its own, of which every id has a row
  whole.context = kept.context - 1;
  for (const TextSpec& spec : specs) {
    if (spec.weight)
      throw usage_error("--cache", "texts without weights: the windows of a cache are fixed", spec.name());
    const auto documents = read_documents({spec.path}, form.split, /*conversations=*/true);
    if (auto examples = read_examples(documents, whole, tokenizer, source_.counts)) {
      for (Example& example : *examples) {
        source_.scored.resize(source_.ids.size(), 1);  // of the streams before
        source_.scored.insert(source_.scored.end(), example.scored.begin(), example.scored.end());
        add_window({std::move(example.ids), source_.documents++, 1}, windows);
      }
      continue;
    }
    const std::int64_t first = source_.documents;
    for (Window& window : make_windows(tokenizer, documents, kept.context, false)) {
      window.document += first;
      add_window(std::move(window), windows);
    }
    source_.documents += static_cast<std::int64_t>(documents.size());
  }
  if (windows.empty()) throw input_error("--text", "something to learn within the context", "nothing", "raise --context");
  if (!source_.scored.empty()) source_.scored.resize(source_.ids.size(), 1);
  kept.corpus_hash = windows_hash(windows);
  kept.model_hash = Checkpoint(teacher_folder).content_hash();
  if (const auto text = tokenizer_json_text(teacher_folder)) kept.tokenizer_hash = hash_bytes(as_bytes(*text));
  Ranks& ranks = ranks_of(run);
  ranks.agree("what the cache is of",
              Json{{"windows", windows.size()}, {"corpus", kept.corpus_hash}, {"model", kept.model_hash},
                   {"tokenizer", kept.tokenizer_hash}, {"cache-top-k", kept.top_k}, {"cache-samples", kept.samples},
                   {"tau", kept.temperature}, {"seed", kept.seed}, {"context", kept.context}});
  file_ = file;
  written_ = ranks.broadcast(fs::exists(file) ? "there" : "absent") == "absent";
  if (written_) make_cache(file, kept, windows, teacher, device, run);
  reader_ = std::make_unique<LogitCacheReader>(file, kept);
  source_.name = file.filename();
}

void CachedTeacher::add_window(Window window, std::vector<Window>& windows) {
  source_.window_begin.push_back(static_cast<std::int64_t>(source_.ids.size()));
  source_.ids.insert(source_.ids.end(), window.ids.begin(), window.ids.end());
  windows.push_back(std::move(window));
}

Json CachedTeacher::summary() const {
  const auto ids = static_cast<std::int64_t>(source_.ids.size());
  return {{"file", file_.string()},
          {"state", written_ ? "written" : "reused"},
          {"top_k", reader_->info().top_k},
          {"samples", reader_->info().samples},
          {"ids", ids},
          {"bytes_per_id",
           static_cast<double>(fs::file_size(file_)) / static_cast<double>(std::max<std::int64_t>(ids, 1))}};
}

std::pair<torch::Tensor, torch::Tensor> CachedTeacher::listed_rows(const Batch& batch) {
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
  return {index, log_prob};
}

// The listed ids have their own probabilities, which half precision leaves a little off: they are made to fill what the
// tail leaves. The ids drawn share the tail as often as they were drawn.
SparseTeacher CachedTeacher::sparse_rows(const Batch& batch) {
  const std::int64_t context = batch.ids.size(1), sequences = batch.ids.size(0);
  const auto k = static_cast<std::size_t>(reader_->info().top_k), n = static_cast<std::size_t>(reader_->info().samples);
  const auto width = static_cast<std::int64_t>(k + n);
  SparseTeacher teacher{torch::zeros({sequences * context, width}, torch::kLong),
                        torch::zeros({sequences * context, width}), torch::zeros({sequences * context})};
  for (std::int64_t s = 0; s < sequences; ++s) {
    const CachedWindow window = reader_->read(batch.windows[static_cast<std::size_t>(s)]);
    for (std::size_t t = 0; t < window.ids.size(); ++t) {
      const std::int64_t row = s * context + static_cast<std::int64_t>(t);
      std::int64_t* index = teacher.index.data_ptr<std::int64_t>() + row * width;
      float* probability = teacher.probability.data_ptr<float>() + row * width;
      teacher.entropy.data_ptr<float>()[row] = window.entropy[t];
      float listed = 0;
      for (std::size_t i = 0; i < k; ++i) {
        index[i] = window.index[t * k + i];
        listed += probability[i] = std::exp(window.log_prob[t * k + i]);
      }
      const float tail = k > 0 ? window.tail[t] : 1.0f;
      for (std::size_t i = 0; i < k; ++i) probability[i] *= (1 - tail) / listed;
      for (std::size_t i = 0; i < n; ++i) {
        index[k + i] = window.sample_index[t * n + i];
        probability[k + i] = tail * static_cast<float>(window.sample_count[t * n + i]) / static_cast<float>(n);
      }
    }
  }
  return teacher;
}

torch::Tensor CachedTeacher::loss(const torch::Tensor& rows, const OutputHead& head, const Batch& batch,
                                  const DistillLoss& weights, double scale, LossSums* sums) {
  const torch::Tensor targets = batch.targets.view(-1);
  if (reader_->info().samples > 0) {
    const SparseTeacher t = sparse_rows(batch);
    const SparseTeacher there{t.index.to(rows.device()), t.probability.to(rows.device()), t.entropy.to(rows.device())};
    return sparse_distill_loss(rows, head, there, targets, weights, scale, sums);
  }
  const auto [index, log_prob] = listed_rows(batch);
  return topk_distill_loss(rows, head, index.to(rows.device()), log_prob.to(rows.device()), targets, weights, scale,
                           sums);
}

}  // namespace pare
