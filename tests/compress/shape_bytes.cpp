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

}  // namespace
}  // namespace pare
