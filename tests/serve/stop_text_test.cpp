#include "runtime/serve/stop_text.h"

#include <gtest/gtest.h>

#include "runtime/serve/served_model.h"
#include "tests/serve/running_server.h"

namespace pare::serve {
namespace {

// What comes out after each piece, and after finish().
std::vector<std::string> outputs(StopText text, const std::vector<std::string>& pieces) {
  std::vector<std::string> out;
  for (const std::string& piece : pieces) {
    text.push(piece);
    out.push_back(text.take());
  }
  text.finish();
  out.push_back(text.take());
  return out;
}

TEST(StopText, HoldsBackOnlyWhatMayBeginAStop) {
  using Texts = std::vector<std::string>;
  EXPECT_EQ(outputs(StopText({}), {"a", "b"}), (Texts{"a", "b", ""}));
  EXPECT_EQ(outputs(StopText({"END"}), {"an E", "N", "OUGH"}), (Texts{"an ", "", "ENOUGH", ""}));
  EXPECT_EQ(outputs(StopText({"END"}), {"an E", "ND of it", "more"}), (Texts{"an ", "", "", ""}));
  EXPECT_EQ(outputs(StopText({"aab"}), {"a", "a", "a", "b"}), (Texts{"", "", "a", "", ""}));
  EXPECT_EQ(outputs(StopText({"xyz", "bc"}), {"abcxyz"}), (Texts{"a", ""}));  // the first in the text
  EXPECT_EQ(outputs(StopText({"\n\n"}), {"one\n", "two\n"}), (Texts{"one", "\ntwo", "\n"}));
}

TEST(StopText, PassedTextIsNotSearched) {
  StopText text({"stop"});
  text.pass("stop here, st");
  EXPECT_EQ(text.take(), "stop here, st");
  text.push("op");
  EXPECT_EQ(text.take(), "op");
  text.push(" sto");
  EXPECT_FALSE(text.stopped());
  EXPECT_EQ(text.take(), " ");
  EXPECT_EQ(text.length(), 19u);
  EXPECT_EQ(text.settled(), 16u);
  text.push("p");
  EXPECT_TRUE(text.stopped());
  EXPECT_EQ(text.length(), 16u);
}

TEST(TokenBytes, OfAllTokensMakeUpTheText) {
  const testing::ScratchFolder scratch;
  const ServedModel model = testing::served_model(testing::write_served_model(scratch.path / "m.pare"));
  const Tokenizer& tokenizer = model.engine->tokenizer();
  const std::string text = "a t\xC3\xA9l\xC3\xA9 \xE2\x82\xAC";
  std::string joined;
  bool parts_of_characters = false;
  for (const std::int32_t id : tokenizer.encode(text, false, false)) {
    joined += token_bytes(tokenizer, id);
    parts_of_characters = parts_of_characters || token_bytes(tokenizer, id) == "\xE2";
  }
  EXPECT_EQ(joined, text);
  EXPECT_TRUE(parts_of_characters);
  EXPECT_EQ(token_bytes(tokenizer, 1), "<|im_start|>");
}

}  // namespace
}  // namespace pare::serve
