// The two forward passes compute the same: LibTorch on a folder against the runtime on the file exported from it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "core/corpus.h"
#include "eval/divergence.h"
#include "fake_tools.h"
#include "model/logits.h"
#include "runtime/engine.h"
#include "runtime/export.h"
#include "tests/runtime/stories.h"

namespace pare {
namespace {

using testing::Scratch;

struct Fixture {
  const char* name;
  fs::path folder;
  std::vector<Document> documents;
};

// Trained models: their logits have the size and the spread that users will see.
std::vector<Fixture> fixtures() {
  const fs::path source = PARE_SOURCE_DIR;
  std::vector<Fixture> all;
  all.push_back({"teacher", source / "examples/teacher", read_documents({source / "CONTRIBUTING.md"}, std::nullopt)});
  const auto stories = testing::stories_folder();
  const fs::path text = testing::shared_folder() / "data/text/tinystories_sample.txt";
  if (stories && fs::exists(text)) {
    all.push_back({"stories260K", *stories, read_documents({text}, "<|endoftext|>")});
    all.back().documents.resize(4);
  } else {
    std::puts("SKIPPED: ../shared is absent, so stories260K is not among the fixtures");
  }
  return all;
}

std::vector<Window> windows_of(const Checkpoint& model, const Fixture& fixture, std::int64_t count) {
  const Tokenizer tokenizer = Tokenizer::from_file(model.folder() / "tokenizer.json");
  auto windows = make_windows(tokenizer, fixture.documents, 192, false);
  windows.resize(std::min<std::size_t>(windows.size(), static_cast<std::size_t>(count)));
  return windows;
}

fs::path exported(const Checkpoint& model, const fs::path& out, const std::string& codec) {
  Context context;
  Progress progress(true);
  context.progress = &progress;
  export_compact(model, {.out = out, .codec = codec}, context);
  return out;
}

std::shared_ptr<const Engine> engine(const fs::path& file, bool int8_activations) {
  return Engine::open(file, {.threads = 1, .kernels = "", .int8_activations = int8_activations});
}

TEST(TwoForwards, FloatLogitsDifferByLessThanAThousandth) {
  for (const Fixture& fixture : fixtures()) {
    const Scratch scratch;
    const Checkpoint model(fixture.folder);
    const auto torch = torch_logits(model, "cpu");
    const auto runtime = runtime_logits(engine(exported(model, scratch.path() / "f32.pare", "f32"), false));
    double worst = 0;
    for (const Window& window : windows_of(model, fixture, 2)) {
      const auto rows = static_cast<std::int64_t>(window.ids.size());
      std::vector<float> want(static_cast<std::size_t>(rows * torch->vocab_size())), got(want.size());
      torch->begin(window.ids);
      runtime->begin(window.ids);
      torch->logits(0, rows, want.data());
      runtime->logits(0, rows, got.data());
      for (std::size_t i = 0; i < want.size(); ++i)
        worst = std::max(worst, std::abs(static_cast<double>(want[i]) - static_cast<double>(got[i])));
    }
    EXPECT_GT(worst, 0) << "two different implementations never agree to the last bit";
    EXPECT_LE(worst, 1e-3) << fixture.name;
    std::printf("%s: largest difference of a logit %.2e\n", fixture.name, worst);
  }
}

class PackedForwards : public ::testing::TestWithParam<const char*> {};

// The folder holds codes; LibTorch computes with their unpacked floats, the runtime with the packed bytes.
TEST_P(PackedForwards, RuntimeOnPackedCodesAgreesWithLibTorchOnUnpackedOnes) {
  const Codec wanted = Codec::parse(GetParam(), "test");
  for (const Fixture& fixture : fixtures()) {
    const Scratch scratch;
    const Checkpoint original(fixture.folder);
    std::int64_t packed = 0;
    FolderTransaction folder(scratch.path() / "quantized");
    CheckpointWriter writer(folder.work(), original.config(), original.float_dtype());
    for (const TensorSpec& spec : original.tensors()) {
      const auto values = original.read_f32(spec.name);
      if (spec.shape.size() == 2) {
        Codec codec = wanted.fits(spec.shape[1]) ? wanted : Codec{CodecKind::kQ8, Codec::kPerRow};
        if (spec.role == TensorRole::kEmbedding) codec = codec.layout();
        writer.put_codes(spec.name, testing::round_to_nearest(codec, spec.shape[0], spec.shape[1], values.data()));
        packed += codec == wanted;
      } else {
        writer.put(spec.name, values.data());
      }
    }
    writer.copy_side_files(fixture.folder);
    writer.finish();
    folder.commit();
    const bool too_narrow = wanted.group > 64 && fixture.name == std::string("stories260K");
    if (too_narrow) continue;
    ASSERT_GT(packed, 20) << fixture.name;

    const Checkpoint model(scratch.path() / "quantized");
    const auto windows = windows_of(model, fixture, 2);
    const auto torch = torch_logits(model, "cpu");
    const fs::path file = exported(model, scratch.path() / "packed.pare", "keep");
    Progress progress(true);
    const auto kl = [&](bool int8) {
      const auto runtime = runtime_logits(engine(file, int8));
      return compare(*torch, runtime.get(), windows, {}, progress).kl.value;
    };
    const double exact = kl(false), int8 = kl(true);
    if (wanted.int8_inputs) {
      // A value at the boundary of two codes may fall to either side; still far nearer than without that rounding.
      const auto unrounded = torch_logits(model, "cpu", 0, true);
      const double cost = compare(*torch, unrounded.get(), windows, {}, progress).kl.value;
      EXPECT_GT(cost, 1e-4) << fixture.name << ": LibTorch did not round the inputs";
      EXPECT_LE(exact, 0.3 * cost) << fixture.name;
    } else {
      EXPECT_LE(exact, 1e-5) << fixture.name;
      EXPECT_GT(int8, exact) << fixture.name << ": the runtime did not round its activations";
    }
    EXPECT_LE(int8, wanted.bits() > 2 ? 3e-3 : 0.1) << fixture.name;  // plain rounding to 2 bits leaves a wild model
    std::printf("%s %s: mean KL %.1e with float activations, %.1e with int8 ones\n", fixture.name, GetParam(), exact,
                int8);
  }
}

INSTANTIATE_TEST_SUITE_P(Codecs, PackedForwards,
                         ::testing::Values("q4g32", "q4g64", "q4g128", "q4ag32", "q4mg32", "q8", "q8c", "q3g32", "q3g128",
                                           "q2g32", "w8a8"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace pare
