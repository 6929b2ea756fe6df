// Figures of torch in float64 (tests/golden/eval_golden.py) on the same logits.
#include <gtest/gtest.h>

#include "core/json.h"
#include "eval/divergence.h"

namespace pare {
namespace {

class StoredLogits : public LogitsSource {
 public:
  StoredLogits(const Json& windows, std::string key) : windows_(windows), key_(std::move(key)) {}
  std::string name() const override { return key_; }
  std::int64_t vocab_size() const override { return static_cast<std::int64_t>(windows_[0][key_][0].size()); }
  void begin(std::span<const std::int32_t>) override { ++window_; }
  void logits(std::int64_t first, std::int64_t count, float* out) override {
    for (std::int64_t t = first; t < first + count; ++t) {
      for (const Json& value : windows_[static_cast<std::size_t>(window_)][key_][static_cast<std::size_t>(t)]) *out++ = value.get<float>();
    }
  }

 private:
  const Json& windows_;
  std::string key_;
  std::int64_t window_ = -1;
};

TEST(EvalGolden, TorchAgrees) {
  const Json golden = read_json(std::filesystem::path(PARE_SOURCE_DIR) / "tests/golden/eval_golden.json");
  std::vector<Window> windows;
  for (const Json& stored : golden["windows"]) {
    Window window;
    window.ids = stored["ids"].get<std::vector<std::int32_t>>();
    window.document = stored["document"].get<std::int64_t>();
    windows.push_back(window);
  }
  StoredLogits original(golden["windows"], "original"), compressed(golden["windows"], "compressed");
  Progress quiet(true);
  const DivergenceResult r = compare(original, &compressed, windows, {}, quiet);
  const Json& expected = golden["expected"];
  EXPECT_EQ(r.predictions, expected["predictions"].get<std::int64_t>());
  EXPECT_NEAR(r.kl.value, expected["mean_kl"].get<double>(), 1e-12);
  EXPECT_NEAR(r.kl_median, expected["median_kl"].get<double>(), 1e-12);
  EXPECT_NEAR(r.kl_99, expected["p99_kl"].get<double>(), 1e-12);
  EXPECT_NEAR(r.kl_999, expected["p999_kl"].get<double>(), 1e-12);
  EXPECT_NEAR(r.kl_maximum, expected["max_kl"].get<double>(), 1e-12);
  EXPECT_NEAR(r.top1.value, expected["top1"].get<double>(), 1e-12);
  EXPECT_NEAR(r.original.perplexity.value, expected["perplexity_original"].get<double>(), 1e-10);
  EXPECT_NEAR(r.compressed->perplexity.value, expected["perplexity_compressed"].get<double>(), 1e-10);
}

}  // namespace
}  // namespace pare
