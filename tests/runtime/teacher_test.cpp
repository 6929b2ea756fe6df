// What the fast path costs on a trained model: the tiny teacher of examples/, rounded to int4, on text of its domain's
// kind. Float activations and a float cache on the same codes are the truth.
#include <gtest/gtest.h>

#include <cmath>

#include "runtime/engine.h"
#include "runtime/export.h"
#include "tests/runtime/stories.h"
#include "tests/runtime/tiny_model.h"

namespace pare {
namespace {

using namespace pare::testing;

// Mean over rows of KL(softmax(p) || softmax(q)) in nats.
double mean_kl(const std::vector<float>& p, const std::vector<float>& q, std::size_t vocab) {
  double total = 0;
  const std::size_t rows = p.size() / vocab;
  for (std::size_t r = 0; r < rows; ++r) {
    const float *a = p.data() + r * vocab, *b = q.data() + r * vocab;
    double sum_a = 0, sum_b = 0, difference = 0;
    const double top_a = *std::max_element(a, a + vocab), top_b = *std::max_element(b, b + vocab);
    for (std::size_t i = 0; i < vocab; ++i) {
      const double weight = std::exp(a[i] - top_a);
      sum_a += weight;
      sum_b += std::exp(b[i] - top_b);
      difference += weight * ((a[i] - top_a) - (b[i] - top_b));
    }
    total += difference / sum_a - std::log(sum_a) + std::log(sum_b);
  }
  return total / static_cast<double>(rows);
}

// Holds what float and int8 activations with every kind of cache cost below the bounds.
void check_costs(const fs::path& file, const std::string& text, double most_q8) {
  std::vector<std::int32_t> ids;
  const auto logits = [&](bool int8, const char* kv) {
    EngineOptions options;
    options.threads = 1;
    options.int8_activations = int8;
    options.kv = kv;
    const auto engine = Engine::open(file, options);
    if (ids.empty()) {
      ids = engine->tokenizer().encode(text);
      ids.resize(std::min<std::size_t>(ids.size(), 400));
    }
    Session session(engine);
    session.feed(ids);
    std::vector<float> out(ids.size() * static_cast<std::size_t>(engine->config().vocab_size));
    session.logits(0, static_cast<std::int64_t>(ids.size()), out.data());
    return out;
  };
  const auto exact = logits(false, "f32");
  const std::size_t vocab = exact.size() / ids.size();
  ASSERT_GE(ids.size(), 300u);
  for (const char* kv : {"f16", "mixed"}) {
    const double kl = mean_kl(exact, logits(false, kv), vocab);
    EXPECT_LT(kl, 1e-5) << kv;
    ::testing::Test::RecordProperty(std::string("mean_kl_float_") + kv, std::to_string(kl));
  }
  for (const char* kv : {"f32", "f16", "q8", "mixed"}) {
    const double kl = mean_kl(exact, logits(true, kv), vocab);
    EXPECT_GT(kl, 1e-7) << kv;  // they do round
    EXPECT_LT(kl, kv == std::string("q8") ? most_q8 : 1e-3) << kv;
    ::testing::Test::RecordProperty(std::string("mean_kl_") + kv, std::to_string(kl));
  }
}

TEST(TeacherTest, RoundedActivationsAndCachesCostLittle) {
  const ScratchFolder scratch;
  Progress progress(true);
  Context context;
  context.quiet = context.json = true;
  context.progress = &progress;
  ExportOptions to;
  to.out = scratch.path / "teacher.pare";
  to.codec = "q4";
  export_compact(Checkpoint(fs::path(PARE_SOURCE_DIR) / "examples" / "teacher"), to, context);
  check_costs(to.out, read_text(fs::path(PARE_SOURCE_DIR) / "CONTRIBUTING.md"), 1e-3);
}

TEST(TeacherTest, RoundedActivationsAndCachesCostLittleOnStories) {
  const auto folder = stories_folder();
  if (!folder) GTEST_SKIP() << "SKIPPED: ../shared/models/stories260K is not beside the checkout";
  const ScratchFolder scratch;
  write_stories(*folder, scratch.path / "stories.pare", {CodecKind::kQ8, 32});
  check_costs(scratch.path / "stories.pare", read_text(shared_folder() / "data" / "text" / "tinystories_sample.txt"),
              5e-3);  // a scale for 8 numbers, of keys that the softmax amplifies
}

}  // namespace
}  // namespace pare
