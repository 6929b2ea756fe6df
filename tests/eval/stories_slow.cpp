// The recorded loss of stories260K: 1.4779 nats per token over exactly 79,255 predictions, with the verb's own options.
#include <gtest/gtest.h>

#include "core/options.h"
#include "runtime/verbs/cli.h"
#include "tests/runtime/stories.h"

namespace pare {
namespace {

TEST(Stories, RecordedLossOverTwoHundredStories) {
  const auto folder = testing::stories_folder();
  const fs::path text = testing::shared_folder() / "data" / "text" / "tinystories_sample.txt";
  if (!folder || !fs::exists(text)) GTEST_SKIP() << "SKIPPED: no ../shared with stories260K and its text beside the checkout";
  const testing::ScratchFolder scratch;
  const fs::path file = scratch.path / "stories.f32.pare";
  testing::write_stories(*folder, file, Codec{});
  Progress quiet(true);
  Context context;
  context.quiet = context.json = true;
  context.progress = &quiet;
  const Command command = eval_command_runtime();
  const Json result = command.run(Options(command.options,
                                          {{"model", file.string()},
                                           {"text", {text.string()}},
                                           {"split", "<|endoftext|>"},
                                           {"ctx", 512},
                                           {"documents", 200},
                                           {"one-window-per-document", true},
                                           {"speed", false}},
                                          "eval"),
                                  context);
  EXPECT_EQ(result["text"]["predictions"].get<std::int64_t>(), 79255);
  EXPECT_NEAR(result["text"]["original"]["loss"]["value"].get<double>(), 1.4779, 0.0005);
}

}  // namespace
}  // namespace pare
