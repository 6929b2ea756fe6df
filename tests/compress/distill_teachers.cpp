// A teacher that is itself quantized: what it teaches are the weights that its codes stand for.
#include <gtest/gtest.h>

#include "core/checkpoint.h"
#include "distill/distill.h"
#include "quantize/quantize.h"
#include "tests/compress/run_stage.h"
#include "tests/compress/tiny_model.h"
#include "tests/scratch.h"

namespace pare {
namespace {

TEST(DistillTeachers, AFolderOfInt4CodesTeaches) {
  const testing::Scratch scratch;
  const fs::path model = scratch / "model", small = scratch / "small", text = scratch / "text.txt";
  testing::make_tiny_model(model, {.hidden = 64, .intermediate = 128, .layers = 2, .vocab = 400});
  write_text(text, testing::tiny_text(3, 30));
  testing::run_stage(quantize_command(),
                     {{"model", model.string()}, {"out", small.string()}, {"codec", "q4"}, {"method", "rtn"}});
  ASSERT_EQ(Checkpoint(small).codec("model.layers.0.mlp.up_proj.weight").kind, CodecKind::kQ4);
  const auto distill = [&](const fs::path& student, const std::string& out, double lr) {
    Json given = {{"teacher", small.string()},
                  {"model", student.string()},
                  {"out", (scratch / out).string()},
                  {"text", {text.string()}},
                  {"held-out", {text.string()}},
                  {"context", 32},
                  {"batch", 4},
                  {"steps", 20},
                  {"lr", lr},
                  {"dtype", "float32"}};
    return testing::run_stage(distill_command(), given).at("held_out").at("text.txt");
  };
  // The quantized folder as student too: the same weights on both sides.
  const Json same = distill(small, "same", 0.0);
  EXPECT_NEAR(same.at("kl_before").get<double>(), 0, 1e-6);
  // The float model is another one, and comes nearer.
  const Json other = distill(model, "other", 1e-3);
  EXPECT_GT(other.at("kl_before").get<double>(), 1e-4);
  EXPECT_LT(other.at("kl_after").get<double>(), 0.9 * other.at("kl_before").get<double>());
}

}  // namespace
}  // namespace pare
