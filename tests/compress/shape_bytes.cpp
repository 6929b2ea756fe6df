// What the search of a shape takes for bytes, against files.
#include <gtest/gtest.h>

#include "core/compact.h"
#include "prune/costs.h"
#include "quantize/quantize.h"
#include "runtime/export.h"
#include "tests/prune/small_model.h"

namespace pare {
namespace {

using testing::Folder;
using testing::make_model;
using testing::SmallModel;

// Bytes are those of the file that quantize and export make of the model.
const SmallModel kExperts{.architecture = "MixtralForCausalLM", .type = "mixtral", .hidden = 64, .layers = 3};

TEST(ShapeCosts, BytesAreThoseOfTheExportedFile) {
  const Folder folder("bytes");
  make_model(folder / "dense", {.hidden = 64, .intermediate = 100, .dtype = "bfloat16"});
  make_model(folder / "experts", kExperts);
  Progress progress(true);
  Context context;
  context.progress = &progress;
  context.quiet = context.json = true;
  const Command quantize = quantize_command();
  for (const std::string name : {"dense", "experts"}) {
    const Checkpoint model(folder / name);
    ShapeCosts floats(model.config(), Unit::kBytes, stored_as("", model.float_dtype()));
    EXPECT_EQ(floats.of(model.config()), static_cast<double>(model.tensor_bytes()));
    for (const std::string codec : {"q4", "q4g64", "q8c"}) {
      const fs::path out = folder / (name + codec);
      quantize.run(Options(quantize.options, {{"model", (folder / name).string()}, {"out", out.string()},
                                              {"codec", codec}, {"method", "rtn"}}, "test"), context);
      export_compact(Checkpoint(out), {.out = out.string() + ".pare"}, context);
      ShapeCosts costs(model.config(), Unit::kBytes, stored_as(codec, model.float_dtype()));
      EXPECT_EQ(costs.of(model.config()), static_cast<double>(CompactFile(out.string() + ".pare").tensor_bytes()))
          << name << codec;
    }
  }
}

// With a codec of codes the budget is the file's, tokenizer and header included; the room for card and report is small.
TEST(ShapeCosts, ABudgetOfBytesHoldsForTheExportedFile) {
  const Folder folder("file");
  make_model(folder / "m", {.hidden = 256, .intermediate = 768, .layers = 3, .heads = 8, .kv_heads = 4});
  Progress progress(true);
  Context context;
  context.progress = &progress;
  context.quiet = context.json = true;
  const Command quantize = quantize_command();
  for (const bool per_layer : {false, true}) {
    constexpr std::uint64_t kBudget = 900'000;
    const std::string name = per_layer ? "widths" : "uniform";
    Json given = testing::with_text(testing::base(folder / "m", folder / name, "shape"), folder / "text.txt");
    given.update({{"max-bytes", std::to_string(kBudget)}, {"codec", "q4"}, {"samples", 2}, {"rank-by", "weights"},
                  {"no-correction", true}, {"per-layer", per_layer}});
    testing::run_prune(given, 2);
    const fs::path out = folder / (name + "-q4");
    quantize.run(Options(quantize.options, {{"model", (folder / name).string()}, {"out", out.string()},
                                            {"method", "rtn"}}, "test"), context);
    export_compact(Checkpoint(out), {.out = out.string() + ".pare"}, context);
    EXPECT_LE(fs::file_size(out.string() + ".pare"), kBudget) << name;
    EXPECT_GE(fs::file_size(out.string() + ".pare"), 6 * kBudget / 10) << name;
  }
}

}  // namespace
}  // namespace pare
