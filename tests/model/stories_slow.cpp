// stories260K through LibTorch against the loss that two independent implementations agree on (../shared).
#include "model/trainer.h"
#include "tests/model/models.h"

namespace pare {
namespace {

TEST(StoriesSlow, MeanLossOfTheFirst200Stories) {
  const fs::path shared = fs::path(PARE_SOURCE_DIR) / ".." / "shared";
  const fs::path model = shared / "models/stories260K", text = shared / "data/text/tinystories_sample.txt";
  if (!fs::exists(model) || !fs::exists(text)) GTEST_SKIP() << "SKIPPED: no " << model << " beside the source";
  const Checkpoint checkpoint(model);
  Decoder decoder = load_decoder(checkpoint, torch::kCPU);
  const Tokenizer tokenizer = Tokenizer::from_file(model / "tokenizer.json");
  auto documents = read_documents({text}, "<|endoftext|>");
  ASSERT_GE(documents.size(), 200u);
  documents.resize(200);
  const HeldOut held{"stories", make_windows(tokenizer, documents, 512, true)};
  const MeanLoss loss = held_out_loss(decoder, held, 0, torch::kCPU);
  EXPECT_EQ(loss.tokens, 79255);
  EXPECT_NEAR(loss.mean, 1.4779, 0.0005);
}

}  // namespace
}  // namespace pare
