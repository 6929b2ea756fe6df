// Several ranks of the program itself: equal losses, lost ranks, ranks that do not agree.
#include <cmath>

#include "core/checkpoint.h"
#include "eval/logit_cache.h"
#include "tests/ranks/programs.h"

namespace pare {
namespace {

using namespace testing;

class Ranks : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!program_has_ranks(scratch_)) GTEST_SKIP() << "this build has no c10d";
    TinyModel tiny;
    make_tiny_model(scratch_ / "model", tiny);
    write_text(scratch_ / "text.txt", tiny_text(3, 120));
    write_text(scratch_ / "held.txt", tiny_text(4, 20));
  }
  std::string path(const std::string& name) const { return (scratch_ / name).string(); }
  Arguments train(const std::string& out, const Arguments& more = {}) const {
    Arguments all{"train", "--model", path("model"), "--text", path("text.txt"), "--split", "<|endoftext|>", "--held-out",
                  path("held.txt"), "--steps", "12", "--batch", "6", "--context", "32", "--lr", "0.003", "--seed", "5",
                  "--out", path(out), "--json"};
    return with(all, more);
  }
  Arguments distill(const std::string& out, const Arguments& more = {}) const {
    Arguments all = train(out, {"--teacher", path("model"), "--keep-layers", "0"});
    all[0] = "distill";
    all.erase(all.begin() + 1, all.begin() + 3);
    return with(all, more);
  }
  void alone(const Arguments& arguments) {
    Program one(scratch_ / "one", arguments, {});
    ASSERT_EQ(one.wait(), 0) << one.errors();
  }
  // Losses of all steps, the held-out ones at the end and the weights of two folders.
  struct Difference {
    double loss = 0, held_out = 0, weights = 0;
  };
  Difference compare(const std::string& a, const std::string& b) const {
    Difference d;
    const auto x = curve_of(scratch_ / a), y = curve_of(scratch_ / b);
    EXPECT_EQ(x.size(), y.size());
    EXPECT_GT(x.size(), 12u);
    for (std::size_t i = 0; i + 1 < std::min(x.size(), y.size()); ++i)
      d.loss = std::max(d.loss, std::abs(x[i].at("loss").get<double>() - y[i].at("loss").get<double>()));
    const auto held = [](const Json& last) { return last.at("held_out").at("held.txt").at("loss").get<double>(); };
    d.held_out = std::abs(held(x.back()) - held(y.back()));
    const Checkpoint m(scratch_ / a), n(scratch_ / b);
    std::size_t count = 0;
    for (const TensorSpec& spec : m.tensors()) {
      const auto v = m.read_f32(spec.name), w = n.read_f32(spec.name);
      for (std::size_t i = 0; i < v.size(); ++i, ++count) d.weights += std::abs(static_cast<double>(v[i] - w[i]));
    }
    d.weights /= static_cast<double>(count);
    return d;
  }
  void two_equal_one(const Arguments& one, const std::string& a, const Arguments& two, const std::string& b, int size) {
    alone(one);
    Job job(scratch_ / "rank", size, two);
    ASSERT_EQ(job.wait(), std::vector<int>(static_cast<std::size_t>(size), 0)) << job.errors();
    const Difference d = compare(a, b);
    EXPECT_LT(d.loss, 2e-5);
    EXPECT_LT(d.held_out, 2e-5);
    EXPECT_LT(d.weights, 1e-5);  // in the mean: Adam turns a gradient near zero into a step of any sign
  }
  Scratch scratch_{"ranks"};
};

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
    return with({verb, "--model", path("wide"), "--text", path("text.txt"), "--split", "<|endoftext|>", "--samples", "44",
                 "--context", "32", "--out", path(out)}, more);
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
    EXPECT_EQ(hash_file(scratch_ / "one-out" / "model.safetensors"), hash_file(scratch_ / "many-out" / "model.safetensors"))
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
    EXPECT_EQ(read_text(scratch_ / name / "training_curve.jsonl"), read_text(scratch_ / "whole" / "training_curve.jsonl"));
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
                        Case{{"--text", path("other.txt")}, "text"}, Case{{"--held-out", path("other.txt")}, "held-out"}}) {
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

TEST_F(Ranks, TheirEnvironmentIsChecked) {
  const auto code_of = [&](const Variables& variables, const std::string& named) {
    Program one(scratch_ / "env", train("out"), variables);
    const int code = one.wait();
    EXPECT_NE(one.errors().find(named), std::string::npos) << one.errors();
    return code;
  };
  Variables v = rank_variables(2, 2, 1);
  EXPECT_EQ(code_of(v, "RANK"), 2);
  v = rank_variables(0, 2, 70000);
  EXPECT_EQ(code_of(v, "MASTER_PORT"), 2);
  v = rank_variables(0, 2, 1);
  v.erase("MASTER_ADDR");
  EXPECT_EQ(code_of(v, "MASTER_ADDR"), 2);
  EXPECT_EQ(code_of({{"RANK", "0"}}, "WORLD_SIZE"), 2);
  EXPECT_EQ(code_of({{"WORLD_SIZE", "two"}}, "WORLD_SIZE"), 2);
  EXPECT_EQ(code_of({{"OMPI_COMM_WORLD_SIZE", "2"}, {"OMPI_COMM_WORLD_RANK", "0"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "1"}},
                    "MASTER_ADDR"), 2);
  Program whole(scratch_ / "compress", {"compress", "--model", path("model"), "--out", path("out")},
                rank_variables(0, 2, free_port()));
  EXPECT_EQ(whole.wait(), 2);
  EXPECT_NE(whole.errors().find("WORLD_SIZE"), std::string::npos) << whole.errors();
}

TEST_F(Ranks, AreStartedByMpirunToo) {
  const std::string port = std::to_string(free_port());
  std::vector<std::unique_ptr<Program>> ranks;
  for (const char* rank : {"0", "1"})
    ranks.push_back(std::make_unique<Program>(
        scratch_ / rank, train("out", {"--steps", "2"}),
        Variables{{"OMPI_COMM_WORLD_SIZE", "2"}, {"OMPI_COMM_WORLD_RANK", rank}, {"OMPI_COMM_WORLD_LOCAL_RANK", rank},
                  {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}, {"MASTER_PORT", port}}));
  for (const auto& rank : ranks) EXPECT_EQ(rank->wait(), 0) << rank->errors();
  EXPECT_TRUE(fs::exists(scratch_ / "out"));
}

}  // namespace
}  // namespace pare
