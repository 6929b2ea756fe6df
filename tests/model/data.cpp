#include "model/data.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "tests/model/models.h"

namespace pare {
namespace {

using testing::Folder;
using testing::QuietRun;

TokenSource stream(std::int64_t count, double weight, std::int32_t first = 0) {
  TokenSource source;
  source.name = "s";
  source.weight = weight;
  source.ids.resize(static_cast<std::size_t>(count));
  std::iota(source.ids.begin(), source.ids.end(), first);
  return source;
}

TEST(Data, TargetsAreTheNextIds) {
  BatchStream data({stream(1000, 1)}, 16, 1);
  const Batch batch = data.next(12);
  EXPECT_EQ(batch.counted, 12 * 16);
  EXPECT_TRUE(torch::equal(batch.ids + 1, batch.targets));
}

TEST(Data, AnEpochVisitsEachWindowOnceAndEpochsDiffer) {
  BatchStream data({stream(10 * 32 + 1, 1)}, 32, 3);
  std::vector<std::set<std::int64_t>> begins(2);
  for (auto& epoch : begins)
    for (int i = 0; i < 9; ++i) epoch.insert(data.next(1).ids[0][0].item<std::int64_t>());
  for (const auto& epoch : begins) {
    ASSERT_EQ(epoch.size(), 9u);  // 320 pairs leave 9 whole windows at any offset
    for (const std::int64_t begin : epoch) EXPECT_EQ((begin - *epoch.begin()) % 32, 0);
  }
  EXPECT_NE(begins[0], begins[1]);
}

TEST(Data, SharesFollowTheWeights) {
  BatchStream data({stream(2000, 3, 0), stream(2000, 1, 100000)}, 8, 1);
  const Batch batch = data.next(400);
  EXPECT_EQ((batch.ids.select(1, 0) < 100000).sum().item<std::int64_t>(), 300);
}

TEST(Data, RestoringTheCountersContinuesTheStream) {
  const auto make = [] { return BatchStream({stream(900, 2, 0), stream(500, 1, 5000)}, 16, 11); };
  BatchStream a = make(), b = make();
  for (int i = 0; i < 60; ++i) a.next(3);
  b.restore(a.taken());
  for (int i = 0; i < 40; ++i) EXPECT_TRUE(torch::equal(a.next(3).ids, b.next(3).ids)) << i;
  BatchStream c({stream(900, 2, 0), stream(500, 1, 5000)}, 16, 12);
  c.restore(a.taken());
  EXPECT_FALSE(torch::equal(a.next(3).ids, c.next(3).ids));
}

TEST(Data, TextShorterThanAWindowIsPadded) {
  BatchStream data({stream(5, 1, 10)}, 8, 1);
  const Batch batch = data.next(2);
  EXPECT_EQ(batch.counted, 8);
  EXPECT_EQ(batch.targets[1][3].item<std::int64_t>(), 14);
  EXPECT_EQ(batch.targets[1][4].item<std::int64_t>(), -1);
}

TEST(Data, OnlyTheResponseIsPredicted) {
  Folder folder("responses");
  testing::write_tokenizer(folder / "tok");
  testing::write_file(folder / "chat.jsonl",
                      "{\"prompt\": \"the compiler reads \", \"response\": \"a linker\"}\n"
                      "{\"prompt\": \"one small model \", \"response\": \"finds this folder.\"}\n");
  const Tokenizer tokenizer = Tokenizer::from_file(folder / "tok" / "tokenizer.json");
  QuietRun run;
  auto sources = read_sources({{folder / "chat.jsonl", std::nullopt}}, std::nullopt, tokenizer, 0, 64, run.context);
  std::vector<std::vector<std::int64_t>> responses;
  for (const char* text : {"a linker", "finds this folder."}) {
    const auto ids = tokenizer.encode(text, false, false);
    responses.emplace_back(ids.begin(), ids.end());
    responses.back().push_back(0);  // the end of the document is learnt
  }
  BatchStream data(std::move(sources), 64, 1);
  const Batch batch = data.next(1);
  std::vector<std::int64_t> learnt, expected;
  for (int i = 0; i < 64; ++i)
    if (const auto id = batch.targets[0][i].item<std::int64_t>(); id >= 0) learnt.push_back(id);
  for (const auto& response : responses) expected.insert(expected.end(), response.begin(), response.end());
  EXPECT_EQ(learnt, expected);
}

TEST(Data, ResponsesArePackedWholeAndOverlongOnesAreCut) {
  TokenSource source = stream(40, 1);
  source.scored.assign(40, 1);
  source.document_begin = {0, 6, 11, 33};  // lengths 6, 5, 22, 7; context 10 holds 11 ids
  BatchStream data({source}, 10, 5);
  std::set<std::int64_t> begins;
  std::int64_t counted = 0;
  for (int i = 0; i < 3; ++i) {
    const Batch batch = data.next(1);
    begins.insert(batch.ids[0][0].item<std::int64_t>());
    counted += batch.counted;
  }
  EXPECT_EQ(begins, (std::set<std::int64_t>{0, 11, 33}));
  EXPECT_EQ(counted, 10 + 10 + 6);
}

TEST(Data, Weights) {
  const auto specs = parse_text_specs({"a.txt=2", "b=0.5"}, "--text");
  EXPECT_EQ(specs[0].path, "a.txt");
  EXPECT_EQ(*specs[1].weight, 0.5);
  EXPECT_FALSE(parse_text_specs({"a", "b"}, "--text")[1].weight);
  for (const std::vector<std::string>& bad :
       {std::vector<std::string>{"a=0"}, {"a=-1"}, {"a=x"}, {"a="}, {"a=1", "b"}, {"a=nan"}, {"a=inf"}}) {
    try {
      parse_text_specs(bad, "--text");
      FAIL() << bad[0];
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage);
    }
  }
}

}  // namespace
}  // namespace pare
