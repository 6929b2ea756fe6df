#include "core/corpus.h"

#include <gtest/gtest.h>

#include <fstream>

#include "core/error.h"

namespace pare {
namespace {

class Corpus : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("pare_corpus_" + std::to_string(::getpid()) + "_" +
                                           ::testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  fs::path file(const std::string& name, const std::string& content) {
    std::ofstream(folder_ / name, std::ios::binary) << content;
    return folder_ / name;
  }
  static std::vector<std::string> texts(const std::vector<Document>& documents) {
    std::vector<std::string> out;
    for (const auto& document : documents) out.push_back(document.text);
    return out;
  }
  static std::string message(const std::vector<fs::path>& paths, const std::optional<std::string>& split = {}) {
    try {
      read_documents(paths, split);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput);
      return error.what();
    }
    return "no error";
  }
  fs::path folder_;
};

using Texts = std::vector<std::string>;
using Ids = std::vector<std::int32_t>;

TEST_F(Corpus, PlainText) {
  const fs::path path = file("a.txt", "\n one \n<end>\n\n<end>two<end>");
  EXPECT_EQ(texts(read_documents({path}, "<end>")), (Texts{"one", "two"}));
  EXPECT_EQ(texts(read_documents({path}, {})), Texts{"\n one \n<end>\n\n<end>two<end>"});
}

TEST_F(Corpus, Jsonl) {
  const fs::path path = file("a.jsonl", "{\"text\": \"x\\ny\"}\r\n\n{\"prompt\": \"Q: \", \"response\": \"A\", \"id\": 3}\n{\"text\": \"\"}");
  const auto documents = read_documents({path}, "y");
  ASSERT_EQ(texts(documents), (Texts{"x\ny", "Q: A"}));
  EXPECT_EQ(documents[0].response_begin, 0u);
  EXPECT_EQ(documents[1].response_begin, 3u);
}

TEST_F(Corpus, FoldersSortedByName) {
  file("b.txt", "second");
  file("a.jsonl", "{\"text\": \"first\"}");
  file("c.md", "not read");
  EXPECT_EQ(texts(read_documents({folder_}, {})), (Texts{"first", "second"}));
}

TEST_F(Corpus, ErrorsNameFileAndLine) {
  EXPECT_NE(message({file("a.jsonl", "{\"text\": \"x\"}\n\n{\"text\": 3}\n")}).find("a.jsonl:3"), std::string::npos);
  EXPECT_NE(message({file("b.jsonl", "{\"text\": ")}).find("b.jsonl:1"), std::string::npos);
  EXPECT_NE(message({file("c.jsonl", "{\"prompt\": \"x\"}")}).find("c.jsonl:1"), std::string::npos);
  EXPECT_NE(message({file("d.jsonl", "[]")}).find("d.jsonl:1"), std::string::npos);
  EXPECT_NE(message({file("e.jsonl", "{\"text\": \"\xFF\"}")}).find("e.jsonl:1"), std::string::npos);
  EXPECT_NE(message({file("f.txt", " \n")}, "x").find("f.txt"), std::string::npos);
  EXPECT_NE(message({folder_ / "none.txt"}).find("none.txt"), std::string::npos);
  fs::create_directories(folder_ / "empty");
  EXPECT_NE(message({folder_ / "empty"}).find("empty"), std::string::npos);
}

// llama3.json puts <s> (1) before each text; gpt2.json puts nothing.
Tokenizer golden(const char* name) {
  return Tokenizer::from_file(fs::path(PARE_SOURCE_DIR) / "tests/golden/tokenizers" / name);
}

TEST_F(Corpus, DocumentsKeepSpecialTextAsText) {
  const Tokenizer tokenizer = golden("llama3.json");
  const Ids ids = encode_document(tokenizer, {"a<s>", 0});
  ASSERT_GT(ids.size(), 3u);
  EXPECT_EQ(ids[0], 1);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 1), 1);
}

TEST_F(Corpus, WindowsWithPrefixScoreEveryToken) {
  const Tokenizer tokenizer = golden("llama3.json");
  const std::vector<Document> documents = {{"zqxzqxzqx", 0}, {"", 0}, {"zq", 0}};
  const Ids body = tokenizer.encode("zqxzqxzqx", false);
  ASSERT_EQ(body.size(), 9u);
  const auto windows = make_windows(tokenizer, documents, 5, false);
  ASSERT_EQ(windows.size(), 4u);  // 4 + 4 + 1 tokens, and 2
  Ids joined;
  for (const Window& window : windows) {
    EXPECT_LE(window.ids.size(), 5u);
    EXPECT_EQ(window.ids[0], 1);
    EXPECT_EQ(window.first_scored, 1);
    if (window.document == 0) joined.insert(joined.end(), window.ids.begin() + 1, window.ids.end());
  }
  EXPECT_EQ(joined, body);
  EXPECT_EQ(windows[3].document, 2);
  const auto cut = make_windows(tokenizer, documents, 5, true);
  ASSERT_EQ(cut.size(), 2u);
  EXPECT_EQ(cut[0].ids.size(), 5u);
  EXPECT_THROW(make_windows(tokenizer, documents, 1, true), Error);
}

TEST_F(Corpus, WindowsWithoutPrefix) {
  const Tokenizer tokenizer = golden("gpt2.json");
  const auto windows = make_windows(tokenizer, {{"zqxzqxzqx", 0}}, 4, false);
  ASSERT_EQ(windows.size(), 2u);  // 4 + 4; the lone ninth token would predict nothing
  EXPECT_EQ(windows[0].first_scored, 1);
  EXPECT_EQ(windows[1].ids.size(), 4u);
}

// The recipe that shared/README.md states for this model: 79,255 predictions.
TEST_F(Corpus, CountOfTheRecordedEvaluation) {
  const fs::path shared = fs::path(PARE_SOURCE_DIR) / ".." / "shared";
  if (!fs::exists(shared / "models/stories260K")) GTEST_SKIP() << "no model in " << shared;
  const Tokenizer tokenizer = Tokenizer::from_file(shared / "models/stories260K/tokenizer.json");
  auto documents = read_documents({shared / "data/text/tinystories_sample.txt"}, "<|endoftext|>");
  documents.resize(200);
  std::size_t predictions = 0;
  for (const Window& window : make_windows(tokenizer, documents, 512, true))
    predictions += window.ids.size() - static_cast<std::size_t>(window.first_scored);
  EXPECT_EQ(predictions, 79255u);
}

}  // namespace
}  // namespace pare
