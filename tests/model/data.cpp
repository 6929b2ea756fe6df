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
  auto sources = read_sources({{folder / "chat.jsonl", std::nullopt}}, TextForm{.context = 64}, tokenizer, run.context);
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

TEST(Data, ExamplesArePackedWholeAndKnowWhereTheyBegin) {
  std::vector<Example> examples;
  std::int32_t id = 100;
  for (const std::size_t size : {6u, 5u, 11u, 7u, 3u}) {
    Example example;
    for (std::size_t i = 0; i < size; ++i) example.ids.push_back(id++);
    example.scored.assign(size, 1);
    example.scored[0] = 0;
    examples.push_back(example);
  }
  TokenSource source;
  source.name = "s";
  source.weight = 1;
  pack_examples(source, examples, 10);  // windows of 11 ids: 11; 7 and 3; 6 and 5
  EXPECT_EQ(source.window_begin, (std::vector<std::int64_t>{0, 11, 21}));
  EXPECT_EQ(source.document_begin, (std::vector<std::int64_t>{0, 11, 18, 21, 27}));
  EXPECT_EQ(source.ids.size(), 32u);
  BatchStream data({source}, 10, 5);
  EXPECT_EQ(data.sequences(1), 3);
  EXPECT_EQ(data.sequences(2.5), 8);
  std::multiset<std::int64_t> learned;
  const Batch batch = data.next(3);
  ASSERT_TRUE(batch.starts.defined());
  for (std::int64_t s = 0; s < 3; ++s)
    for (std::int64_t t = 0; t < 10; ++t) {
      const auto own = batch.ids[s][t].item<std::int64_t>(), target = batch.targets[s][t].item<std::int64_t>();
      const auto start = batch.starts[s][t].item<std::int64_t>();
      EXPECT_LE(start, t);
      if (own >= 100) {  // the document begins where one of the examples does, and no other lies in between
        const auto first = batch.ids[s][start].item<std::int64_t>();
        EXPECT_TRUE(first == 100 || first == 106 || first == 111 || first == 122 || first == 129) << first;
        EXPECT_EQ(own - first, t - start);
      }
      if (target >= 0) {
        EXPECT_EQ(target, own + 1);
        learned.insert(target);
      }
    }
  EXPECT_EQ(batch.counted, 32 - 5);  // the first id of an example has nothing before it
  EXPECT_EQ(std::set<std::int64_t>(learned.begin(), learned.end()).size(), learned.size());
  BatchStream plain({stream(100, 1)}, 10, 1);
  EXPECT_FALSE(plain.next(2).starts.defined());
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
