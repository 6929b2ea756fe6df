// Several ranks of the program itself: equal losses and bits, lost ranks, ranks that do not agree.
#include "eval/logit_cache.h"
#include "tests/ranks/programs.h"

namespace pare {
namespace {

using namespace testing;

TEST_F(Ranks, HaveTheLossesOfOneRankWithTheWholeBatch) {
  two_equal_one(train("a"), "a", train("b"), "b", 2);
  alone(train("half", {"--batch", "3"}));  // what a rank that heard nothing of the other would have
  EXPECT_GT(compare("a", "half").loss, 0.01);
  Job again(scratch_ / "again", 2, train("c"));
  ASSERT_EQ(again.wait(), std::vector<int>(2, 0)) << again.errors();
  EXPECT_EQ(hash_file(scratch_ / "b" / "model.safetensors"), hash_file(scratch_ / "c" / "model.safetensors"));
  EXPECT_TRUE(parse_json(again.ranks[0]->out(), "rank 0").at("ok").get<bool>());
  EXPECT_EQ(again.ranks[1]->out() + again.ranks[1]->errors(), "");  // one voice
}

TEST_F(Ranks, ShareABatchThatTheyDoNotDivide) {
  two_equal_one(train("a", {"--batch", "7", "--eval-every", "4"}), "a",
                train("b", {"--batch", "7", "--eval-every", "4", "--micro-batch", "2"}), "b", 3);
}

TEST_F(Ranks, FinetunePackedExamplesAsOneRank) {
  for (const Arguments& more : {Arguments{}, {"--lora-rank", "4", "--lr", "0.01"}}) {
    const auto tuned = [&](const std::string& out) {
      Arguments all = train(out + std::to_string(more.size()), {"--eval-every", "3", "--patience", "9"});
      all[0] = "finetune";
      return testing::with(all, more);
    };
    const std::string a = "a" + std::to_string(more.size()), b = "b" + std::to_string(more.size());
    two_equal_one(tuned("a"), a, tuned("b"), b, 2);
  }
}

TEST_F(Ranks, FinetuneResponsesAndStopEarlyAsOneRank) {
  std::string lines;
  for (int i = 0; i < 40; ++i)
    lines += "{\"prompt\": \"" + tiny_text(static_cast<unsigned>(i), 1).substr(0, 20 + i % 7) + "\", \"response\": \"" +
             tiny_text(static_cast<unsigned>(100 + i), 1).substr(0, 10 + i % 11) + "\"}\n";
  write_text(scratch_ / "pairs.jsonl", lines);
  const auto tuned = [&](const std::string& out) {
    return Arguments{"finetune", "--model", path("model"), "--text", path("pairs.jsonl"), "--held-out", path("held.txt"),
                     "--split", "<|endoftext|>", "--context", "32", "--batch", "3", "--steps", "60", "--lr", "0.01",
                     "--eval-every", "3", "--patience", "1", "--json", "--quiet", "--out", path(out)};
  };
  two_equal_one(tuned("a"), "a", tuned("b"), "b", 2);
  EXPECT_LT(curve_of(scratch_ / "b").back().at("step").get<int>(), 60);
}

TEST_F(Ranks, DistillAsOneRank) {
  two_equal_one(distill("a"), "a", distill("b"), "b", 2);
}

TEST_F(Ranks, DistillOnPolicyAsOneRank) {
  const Arguments more{"--on-policy", "0.5", "--on-policy-tokens", "6", "--loss", "jsd", "--hidden-weight", "0.1"};
  two_equal_one(distill("a", more), "a", distill("b", more), "b", 2);
}

TEST_F(Ranks, MakeTheCacheOfOneRankAndLearnFromIt) {
  const auto with = [&](const std::string& file) {
    return Arguments{"--cache", path(file), "--cache-samples", "4", "--cache-top-k", "4"};
  };
  two_equal_one(distill("a", with("one.h5")), "a", distill("b", with("two.h5")), "b", 2);
  LogitCacheReader one(scratch_ / "one.h5"), two(scratch_ / "two.h5");
  ASSERT_EQ(one.windows(), two.windows());
  ASSERT_GT(one.windows(), 20);
  for (std::int64_t w = 0; w < one.windows(); ++w) EXPECT_EQ(packed(one.read(w)), packed(two.read(w))) << w;
}

// Windows of 32 tokens: 44 of them are six shards, which neither two nor three ranks share evenly with the last one.
TEST_F(Ranks, CalibrateWithTheBitsOfOneRank) {
  TinyModel untied;
  untied.tied = false;
  make_tiny_model(scratch_ / "wide", untied);
  const auto stage = [&](const std::string& verb, const std::string& out, const Arguments& more) {
    return with({verb, "--model", path("wide"), "--text", path("text.txt"), "--split", "<|endoftext|>",
                 "--samples", "44", "--context", "32", "--out", path(out)}, more);
  };
  struct Case {
    const char* verb;
    Arguments more;
    int size;
    bool fisher = false;
  };
  for (const Case& c : {Case{"quantize", {"--method", "gptq"}, 2}, Case{"quantize", {"--preset", "balanced"}, 3},
                        Case{"quantize", {"--equalize", "awq", "--codec", "q4"}, 2},
                        Case{"quantize", {"--method", "gptq"}, 2, true},
                        Case{"prune", {"--method", "wanda", "--sparsity", "0.5"}, 2},
                        Case{"prune", {"--method", "sparsegpt", "--pattern", "2:4"}, 3}}) {
    fs::remove_all(scratch_ / "one-out");
    fs::remove_all(scratch_ / "many-out");
    Arguments one = stage(c.verb, "one-out", c.more), many = stage(c.verb, "many-out", c.more);
    if (c.fisher)
      for (Arguments* arguments : {&one, &many}) arguments->push_back("--fisher");
    alone(one);
    Job job(scratch_ / "rank", c.size, many);
    ASSERT_EQ(job.wait(), std::vector<int>(static_cast<std::size_t>(c.size), 0)) << c.more[1] << job.errors();
    EXPECT_EQ(hash_file(scratch_ / "one-out" / "model.safetensors"),
              hash_file(scratch_ / "many-out" / "model.safetensors"))
        << c.verb << " " << c.more[1];
    EXPECT_EQ(job.ranks[1]->out(), "");
  }
}

TEST_F(Ranks, ALostRankEndsCalibration) {
  write_text(scratch_ / "long.txt", tiny_text(3, 2000));
  const Arguments command{"quantize", "--model", path("model"), "--text", path("long.txt"), "--samples", "256",
                          "--context", "256", "--method", "gptq", "--out", path("q")};
  Job job(scratch_ / "rank", 2, command);
  for (int i = 0; i < 4000 && !fs::exists(scratch_ / "q.partial"); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  job.ranks[1]->kill(SIGKILL);
  EXPECT_EQ(job.ranks[0]->wait(20), 1) << job.errors();
  EXPECT_NE(job.ranks[0]->errors().find("rank 1 ended without a word"), std::string::npos) << job.errors();
  EXPECT_FALSE(fs::exists(scratch_ / "q"));
  Job again(scratch_ / "again", 2, command);
  EXPECT_EQ(again.wait(), std::vector<int>(2, 0)) << again.errors();
  EXPECT_TRUE(fs::exists(scratch_ / "q"));
}

TEST_F(Ranks, ALostRankEndsAllAndLeavesAStateThatContinues) {
  const Arguments long_run = {"--steps", "60", "--checkpoint-minutes", "0"};
  Job whole(scratch_ / "whole", 2, train("whole", long_run));
  ASSERT_EQ(whole.wait(), std::vector<int>(2, 0)) << whole.errors();
  for (const std::size_t victim : {1u, 0u}) {
    const std::string name = "lost" + std::to_string(victim);
    Job job(scratch_ / name, 2, train(name, long_run));
    const fs::path state = scratch_ / (name + ".partial") / "training_state.safetensors";
    for (int i = 0; i < 4000 && !fs::exists(state); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    ASSERT_TRUE(fs::exists(state)) << job.errors();
    job.ranks[victim]->kill(SIGKILL);
    EXPECT_EQ(job.ranks[victim]->wait(), 128 + SIGKILL);
    const std::size_t other = 1 - victim;
    ASSERT_EQ(job.ranks[other]->wait(10), 1);
    const std::string said = job.ranks[other]->errors();
    EXPECT_NE(said.find("rank " + std::to_string(victim) + " ended without a word"), std::string::npos) << said;
    EXPECT_NE(said.find("run the same command again"), std::string::npos) << said;
    EXPECT_FALSE(fs::exists(scratch_ / name));
    Job resumed(scratch_ / name, 2, train(name, long_run));
    ASSERT_EQ(resumed.wait(), std::vector<int>(2, 0)) << resumed.errors();
    EXPECT_EQ(hash_file(scratch_ / name / "model.safetensors"), hash_file(scratch_ / "whole" / "model.safetensors"));
    EXPECT_EQ(curve_of(scratch_ / name), curve_of(scratch_ / "whole"));
  }
}

TEST_F(Ranks, AnInterruptOfOneRankStopsAllAndOneRankContinues) {
  const Arguments long_run = {"--steps", "400", "--checkpoint-minutes", "0"};
  Job job(scratch_ / "stop", 2, train("out", long_run));
  const fs::path state = scratch_ / "out.partial" / "training_state.safetensors";
  for (int i = 0; i < 4000 && !fs::exists(state); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  job.ranks[1]->kill(SIGTERM);
  ASSERT_EQ(job.wait(), std::vector<int>(2, 130)) << job.errors();
  ASSERT_TRUE(fs::exists(state));
  EXPECT_EQ(parse_json(job.ranks[0]->out(), "rank 0").at("exit_code"), 130);
  Program one(scratch_ / "one", train("out", long_run), {});
  EXPECT_EQ(one.wait(), 0) << one.errors();
  EXPECT_NE(one.errors().find("continuing from step"), std::string::npos);
}

TEST_F(Ranks, RefuseWhatTheyDoNotAgreeOn) {
  write_text(scratch_ / "other.txt", tiny_text(9, 120));
  struct Case {
    Arguments more;
    const char* named;
  };
  for (const Case& c : {Case{{"--lr", "0.1"}, "lr"}, Case{{"--steps", "9"}, "steps"}, Case{{"--seed", "6"}, "seed"},
                        Case{{"--text", path("other.txt")}, "text"},
                        Case{{"--held-out", path("other.txt")}, "held-out"}}) {
    Job job(scratch_ / "mismatch", 2, train("out"), c.more);
    EXPECT_EQ(job.wait(), std::vector<int>(2, 2)) << c.named << job.errors();
    for (const auto& rank : job.ranks) {
      EXPECT_NE(rank->errors().find(c.named), std::string::npos) << rank->errors();
      EXPECT_NE(rank->errors().find("on rank 1"), std::string::npos) << rank->errors();
    }
    EXPECT_FALSE(fs::exists(scratch_ / "out"));
    EXPECT_FALSE(fs::exists(scratch_ / "out.partial"));
  }
}

TEST_F(Ranks, RefuseToDistillWhatTheyDoNotAgreeOn) {
  write_text(scratch_ / "other.txt", tiny_text(9, 120));
  struct Case {
    Arguments all, more;
    const char* named;
  };
  const Arguments cache{"--cache", path("c.h5"), "--cache-top-k", "4"};
  for (const Case& c : {Case{{}, {"--held-out", path("other.txt")}, "held-out"},
                        Case{cache, {"--text", path("other.txt")}, "what the cache is of"}}) {
    Job job(scratch_ / "mismatch", 2, distill("out", c.all), c.more);
    EXPECT_EQ(job.wait(), std::vector<int>(2, 2)) << c.named << job.errors();
    for (const auto& rank : job.ranks) EXPECT_NE(rank->errors().find(c.named), std::string::npos) << rank->errors();
    EXPECT_FALSE(fs::exists(scratch_ / "out"));
    EXPECT_FALSE(fs::exists(scratch_ / "c.h5"));
  }
}

// Rank 0 tunes alone for longer than ranks wait for each other's answers.
TEST_F(Ranks, WaitWhileRankZeroWorksAlone) {
  const Arguments stage{"quantize", "--model", path("model"), "--text", path("text.txt"), "--split", "<|endoftext|>",
                        "--samples", "16", "--context", "32", "--method", "gptq", "--tune", "800",
                        "--rank-timeout", "4"};
  alone(with(stage, {"--out", path("one")}));
  Job job(scratch_ / "rank", 2, with(stage, {"--out", path("two")}));
  ASSERT_EQ(job.wait(), std::vector<int>(2, 0)) << job.errors();
  EXPECT_EQ(hash_file(scratch_ / "one" / "model.safetensors"), hash_file(scratch_ / "two" / "model.safetensors"));
}

TEST_F(Ranks, EndTogetherWhereOneCannotBegin) {
  Job job(scratch_ / "fails", 2, train("out"), {"--text", path("absent.txt")});
  const auto codes = job.wait();
  EXPECT_EQ(codes, (std::vector<int>{1, 3})) << job.errors();
  EXPECT_NE(job.ranks[0]->errors().find("rank 1 ended: "), std::string::npos) << job.errors();
  EXPECT_NE(job.ranks[0]->errors().find("absent.txt"), std::string::npos) << job.errors();
  fs::create_directories(scratch_ / "taken");
  Job taken(scratch_ / "taken-log", 2, train("taken"));
  EXPECT_EQ(taken.wait(), std::vector<int>(2, 2)) << taken.errors();
  Job small(scratch_ / "small", 3, train("out", {"--batch", "2"}));
  EXPECT_EQ(small.wait(), std::vector<int>(3, 2)) << small.errors();
}

TEST_F(Ranks, NameTheAddressThatDoesNotAnswer) {
  const int port = free_port();
  const std::string place = "127.0.0.1:" + std::to_string(port);
  for (const int rank : {0, 1}) {
    Program one(scratch_ / "waits", train("out", {"--rank-timeout", "1"}), rank_variables(rank, 2, port));
    EXPECT_EQ(one.wait(30), 1);
    EXPECT_NE(one.errors().find(place), std::string::npos) << one.errors();
    EXPECT_NE(one.errors().find("within 1 s"), std::string::npos) << one.errors();
    EXPECT_FALSE(fs::exists(scratch_ / "out.partial"));
  }
}

}  // namespace
}  // namespace pare
