#include <gtest/gtest.h>

#include <thread>

#include "runtime/forward.h"
#include "runtime/pare.h"
#include "tests/runtime/c_api_checks.h"
#include "tests/runtime/tiny_model.h"

namespace pare {
namespace {

using namespace pare::testing;

TEST(CApiTest, ServesACProgram) {
  const ScratchFolder scratch;
  TokenizerTraining training;
  training.vocab_size = 280;
  const std::string tokenizer =
      train_tokenizer({"once upon a time there was a time, once upon a hill", "a time upon a time"}, training);
  const fs::path path = scratch.path / "m.pare";
  write_tiny_model(path, tiny_config("llama", 32, 64, 4, 2, 8, 290, true), {CodecKind::kQ8, 32}, 5,
                   {{"tokenizer.json", tokenizer}});
  const std::string absent = (scratch.path / "absent.pare").string();
  const std::string state = (scratch.path / "state").string();
  EXPECT_EQ(c_api_checks(path.c_str(), absent.c_str(), state.c_str()), 0)
      << "failed check, line of c_api_checks.c; last error: " << pare_last_error();
}

TEST(CApiTest, ManySessionsAreAsManyAsAPassTakes) {
  EXPECT_EQ(PARE_MOST_SESSIONS, Forward::kBatch);
}

TEST(CApiTest, VerifyNamesWhatWasChanged) {
  const ScratchFolder scratch;
  const fs::path path = scratch.path / "m.pare";
  write_tiny_model(path, tiny_config("llama", 32, 64, 4, 2, 8, 290, true), {CodecKind::kQ8, 32}, 5);
  std::string bytes = read_text(path);
  bytes[bytes.find("{\"rows\"") - 5000] ^= 1;
  write_text(scratch.path / "changed.pare", bytes);
  pare_model* model = pare_open((scratch.path / "changed.pare").c_str(), nullptr);
  ASSERT_NE(model, nullptr) << pare_last_error();
  EXPECT_EQ(pare_verify(model), PARE_INPUT);
  EXPECT_NE(std::string(pare_last_error()).find(".weight"), std::string::npos) << pare_last_error();
  pare_close(model);
  EXPECT_EQ(pare_verify(nullptr), PARE_USAGE);
}

TEST(CApiTest, ErrorsBelongToTheirThread) {
  EXPECT_EQ(pare_open("/absent/one.pare", nullptr), nullptr);
  std::thread([] {
    EXPECT_STREQ(pare_last_error(), "");
    EXPECT_EQ(pare_open("/absent/two.pare", nullptr), nullptr);
    EXPECT_NE(std::string(pare_last_error()).find("two"), std::string::npos);
  }).join();
  EXPECT_NE(std::string(pare_last_error()).find("one"), std::string::npos);
}

}  // namespace
}  // namespace pare
