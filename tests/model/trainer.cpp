#include "model/trainer.h"

#include <cmath>
#include <cstring>
#include <sstream>

#include "model/fused.h"
#include "model/train.h"
#include "model/trainer_state.h"
#include "tests/model/models.h"

namespace pare {
namespace {

using testing::Folder;
using testing::QuietRun;

struct Workplace {
  Folder folder;
  explicit Workplace(const std::string& name) : folder(name) {
    testing::write_tokenizer(folder / "tok");
    testing::write_file(folder / "text.txt", testing::sample_text());
    testing::write_file(folder / "held.txt", testing::sample_text().substr(0, 3000));
    testing::write_file(folder / "config.json", write_config(testing::small_config(), "float32").dump());
  }
  Json base(const std::string& out) const {
    return Json{{"config", (folder / "config.json").string()}, {"tokenizer", (folder / "tok").string()},
                {"out", (folder / out).string()}, {"text", Json::array({(folder / "text.txt").string()})},
                {"held-out", Json::array({(folder / "held.txt").string()})}, {"steps", 12}, {"batch", 4},
                {"context", 32}, {"lr", 0.01}};
  }
  Json run(const Json& given, std::uint64_t seed = 7) const {
    QuietRun r;
    r.context.seed = seed;
    const Command command = train_command();
    return command.run(Options(command.options, given, "test"), r.context);
  }
  std::string weights(const std::string& out) const { return testing::bytes_of(folder / out / "model.safetensors"); }
};

TEST(Train, LearnsAndWritesTheSameBytesAgain) {
  const Workplace w("same");
  Json given = w.base("a");
  given["steps"] = 60;
  const Json result = w.run(given);
  const Json& held = result.at("held_out").at("held.txt");
  const double before = held.at("before").at("loss"), after = held.at("after").at("loss");
  EXPECT_NEAR(before, std::log(300.0), 0.2);
  EXPECT_LT(after, before - 1.5);
  EXPECT_GT(held.at("after").at("standard_error").get<double>(), 0);
  given["out"] = (w.folder / "b").string();
  w.run(given);
  EXPECT_EQ(w.weights("a"), w.weights("b"));
  EXPECT_EQ(testing::curve_of(w.folder / "a"), testing::curve_of(w.folder / "b"));
  EXPECT_FALSE(fs::exists(w.folder / "a" / "training_state.safetensors"));
  EXPECT_TRUE(fs::exists(w.folder / "a" / "tokenizer.json"));
  given["out"] = (w.folder / "c").string();
  w.run(given, 8);
  EXPECT_NE(w.weights("a"), w.weights("c"));
}

TEST(Train, RecomputingWhatLiesInsideBlocksGivesTheSameBytes) {
  for (const char* precision : {"f32", "bf16"}) {
    const Workplace w(std::string("recompute-") + precision);
    Json given = w.base("kept");
    given["precision"] = precision;
    given["micro-batch"] = 2;
    w.run(given);
    given["out"] = (w.folder / "again").string();
    given["activation-checkpointing"] = true;
    w.run(given);
    EXPECT_EQ(w.weights("kept"), w.weights("again")) << precision;
    EXPECT_EQ(testing::curve_of(w.folder / "kept"), testing::curve_of(w.folder / "again"));
  }
}

TEST(Train, ABlockThatIsRecomputedKeepsItsInputAlone) {
  Decoder decoder = testing::small_decoder(4);
  const torch::Tensor ids = torch::randint(0, 300, {2, 9}, torch::kLong);
  const auto keeps_input_alone = [&](bool recompute) {
    decoder->recompute_blocks(recompute);
    decoder->zero_grad();
    const RopeTables rope = decoder->rope(9);
    const torch::Tensor out = decoder->through_block(1, decoder->embed(ids), rope);
    const bool alone = out.grad_fn()->name().find("Recomputed") != std::string::npos;
    out.square().sum().backward();
    EXPECT_TRUE(decoder->block(1)->weight("mlp.down_proj").grad().defined());
    EXPECT_TRUE(decoder->tensor("model.embed_tokens.weight").grad().defined());
    return alone;
  };
  EXPECT_FALSE(keeps_input_alone(false));
  const torch::Tensor kept = decoder->tensor("model.embed_tokens.weight").grad().clone();
  EXPECT_TRUE(keeps_input_alone(true));
  EXPECT_TRUE(torch::equal(kept, decoder->tensor("model.embed_tokens.weight").grad()));
  {
    const torch::NoGradGuard no_grad;  // nothing to keep: nothing special
    EXPECT_FALSE(decoder->through_block(1, decoder->embed(ids), decoder->rope(9)).requires_grad());
  }
}

TEST(Train, AnInterruptedRunContinuesToTheSameBytes) {
  for (const char* precision : {"f32", "bf16"}) {
    const Workplace w(std::string("resume-") + precision);
    Json given = w.base("whole");
    given["precision"] = precision;
    given["eval-every"] = 5;
    given["checkpoint-minutes"] = 0.0;
    w.run(given);

    // The same job through the library, stopped by an error inside step 8.
    given["out"] = (w.folder / "broken").string();
    QuietRun r;
    const Command command = train_command();
    const Options options(command.options, given, "test");
    const fs::path work = w.folder / "broken.partial";
    fs::create_directories(work);
    Decoder decoder(parse_config(read_json(w.folder / "config.json"), nullptr, "config"));
    initialize(decoder, 7);
    const Tokenizer tokenizer = Tokenizer::from_file(w.folder / "tok" / "tokenizer.json");
    TrainingJob job;
    job.settings = trainer_settings(options, decoder->config());
    BatchStream data(read_sources({{w.folder / "text.txt", std::nullopt}}, TextForm{.context = 32}, tokenizer, r.context), 32, 7);
    job.stage = "train";
    job.decoder = decoder;
    job.data = &data;
    job.held_out = read_held_out({(w.folder / "held.txt").string()}, TextForm{.context = 32}, tokenizer);
    job.echo = deciding_options(options, 7);
    job.work = work;
    int calls = 0;
    job.loss = [&](const Batch& micro, double scale, LossSums& sums) {
      if (++calls == 8) throw std::runtime_error("power cut");
      const auto hidden = decoder->hidden(micro.ids);
      return cross_entropy_loss(hidden.view({-1, 32}), decoder->head_weight(), micro.targets.view(-1), scale, &sums);
    };
    EXPECT_THROW(run_training(job, "float32", r.context), std::runtime_error);
    ASSERT_TRUE(fs::exists(work / "training_state.safetensors"));

    Json other = given;
    other["lr"] = 0.02;
    try {
      w.run(other);
      FAIL() << "a state of other options was continued";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage);
      EXPECT_NE(error.found().find("lr"), std::string::npos);
    }
    w.run(given);
    EXPECT_EQ(w.weights("whole"), w.weights("broken"));
    EXPECT_EQ(testing::curve_of(w.folder / "whole"), testing::curve_of(w.folder / "broken"));
  }
}

TEST(Train, AccumulationGivesTheGradientOfTheWholeBatch) {
  const Workplace w("accumulate");
  Json given = w.base("whole");
  given["steps"] = 3;
  given["micro-batch"] = 4;
  w.run(given);
  given["micro-batch"] = 1;
  given["out"] = (w.folder / "parts").string();
  w.run(given);
  const Checkpoint a(w.folder / "whole"), b(w.folder / "parts");
  for (const TensorSpec& spec : a.tensors()) {
    const torch::Tensor x = load_tensor(a, spec.name, torch::kCPU), y = load_tensor(b, spec.name, torch::kCPU);
    // Adam turns a gradient near zero into a step of any sign: compare in the mean.
    EXPECT_LT((x - y).abs().mean().item<double>(), 1e-4) << spec.name;
  }
}

TEST(Train, FineTuningTakesModelAndDtypeFromTheFolder) {
  const Workplace w("tune");
  Json given = w.base("base");
  given["dtype"] = "bfloat16";
  w.run(given);
  EXPECT_EQ(Checkpoint(w.folder / "base").float_dtype(), "bfloat16");
  testing::write_file(w.folder / "chat.jsonl", "{\"prompt\": \"the compiler \", \"response\": \"keeps a linker\"}\n");
  Json tune{{"model", (w.folder / "base").string()}, {"out", (w.folder / "tuned").string()},
            {"text", Json::array({(w.folder / "chat.jsonl").string()})}, {"steps", 30}, {"batch", 2}, {"context", 32}, {"lr", 0.005}};
  w.run(tune);
  std::istringstream curve(testing::bytes_of(w.folder / "tuned" / "train.jsonl"));
  std::string line, last;
  while (std::getline(curve, line)) last = line;
  EXPECT_LT(parse_json(last, "curve").at("loss").get<double>(), 2.5);  // from 4 and more
  EXPECT_EQ(Checkpoint(w.folder / "tuned").float_dtype(), "bfloat16");
}

TEST(Train, PrunedZerosStayZero) {
  const Workplace w("zeros");
  testing::write_tokenizer(w.folder / "like");
  Decoder decoder = testing::small_decoder(2, testing::small_config(), 1);
  const std::string half = "model.layers.1.mlp.up_proj.weight", few = "model.layers.0.mlp.up_proj.weight";
  torch::Tensor mask = torch::rand({48, 32}) < 0.5;
  {
    const torch::NoGradGuard no_grad;
    decoder->tensor(half).masked_fill_(mask, 0);
    decoder->tensor(few)[0][0] = 0;
  }
  save_decoder(decoder, "float32", w.folder / "like", w.folder / "pruned");
  for (const char* keep : {"auto", "on", "off"}) {
    Json given = w.base(std::string("out-") + keep);
    given.erase("config");
    given.erase("tokenizer");
    given["model"] = (w.folder / "pruned").string();
    given["keep-zeros"] = keep;
    w.run(given);
    const Checkpoint out(w.folder / (std::string("out-") + keep));
    const torch::Tensor a = load_tensor(out, half, torch::kCPU), b = load_tensor(out, few, torch::kCPU);
    const bool kept = std::string(keep) != "off";
    EXPECT_EQ((a.masked_select(mask) == 0).all().item<bool>(), kept) << keep;
    EXPECT_FALSE((a.masked_select(mask.logical_not()) == 0).any().item<bool>());
    EXPECT_EQ(b[0][0].item<float>() == 0, std::string(keep) == "on") << keep;
  }
}

TEST(Train, ALossThatIsNotFiniteStopsWithItsName) {
  const Workplace w("nan");
  Decoder decoder = testing::small_decoder(2);
  { const torch::NoGradGuard no_grad; decoder->tensor("model.norm.weight")[0] = std::nanf(""); }
  QuietRun r;
  TokenSource source;
  source.name = "s";
  source.ids.assign(200, 3);
  BatchStream data({source}, 16, 1);
  TrainingJob job;
  job.stage = "train";
  job.decoder = decoder;
  job.data = &data;
  job.settings.steps = 2;
  job.settings.context = 16;
  job.work = w.folder / "work";
  fs::create_directories(job.work);
  job.loss = [&](const Batch& micro, double scale, LossSums& sums) {
    const auto hidden = decoder->hidden(micro.ids);
    return cross_entropy_loss(hidden.view({-1, 32}), decoder->head_weight(), micro.targets.view(-1), scale, &sums);
  };
  try {
    run_training(job, "float32", r.context);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kFailure);
    EXPECT_NE(error.found().find("nan"), std::string::npos);
  }
}

// One spike is passed over, a loss that stays far above its mean ends the run by name.
TEST(Train, ALossThatDivergesStopsWithItsName) {
  for (const int bad : {2, 3}) {
    const Workplace w("spike" + std::to_string(bad));
    Decoder decoder = testing::small_decoder(2);
    QuietRun r;
    TokenSource source;
    source.name = "s";
    source.ids.assign(200, 3);
    BatchStream data({source}, 16, 1);
    TrainingJob job;
    job.stage = "train";
    job.decoder = decoder;
    job.data = &data;
    job.settings.steps = 70;
    job.settings.batch = 1;
    job.settings.context = 16;
    job.settings.lr = 0;
    job.work = w.folder / "work";
    fs::create_directories(job.work);
    int calls = 0;
    job.loss = [&](const Batch& micro, double scale, LossSums& sums) {
      const auto hidden = decoder->hidden(micro.ids);
      const torch::Tensor loss =
          cross_entropy_loss(hidden.view({-1, 32}), decoder->head_weight(), micro.targets.view(-1), scale, &sums);
      ++calls;
      return calls > 60 && calls <= 60 + bad ? loss * 4 + 20 : loss;
    };
    std::string found;
    try {
      run_training(job, "float32", r.context);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kFailure);
      found = error.place() + " " + error.found();
    }
    EXPECT_EQ(found.find("step 63") != std::string::npos && found.find("diverges") != std::string::npos, bad == 3) << found;
    EXPECT_EQ(calls, bad == 3 ? 63 : 70);
  }
}

TEST(Train, BadUseIsRefusedBeforeAnythingIsWritten) {
  const Workplace w("bad");
  const auto code_of = [&](Json given) {
    try {
      w.run(given);
    } catch (const Error& error) {
      return static_cast<int>(error.code());
    }
    return 0;
  };
  fs::create_directories(w.folder / "taken");
  EXPECT_EQ(code_of(w.base("taken")), 2);
  Json given = w.base("x");
  given["model"] = (w.folder / "taken").string();
  EXPECT_EQ(code_of(given), 2);
  given = w.base("x");
  given.erase("tokenizer");
  EXPECT_EQ(code_of(given), 2);
  given = w.base("x");
  given["context"] = 65;  // max_position_embeddings is 64
  EXPECT_EQ(code_of(given), 2);
  given = w.base("x");
  given["device"] = "abacus";
  EXPECT_EQ(code_of(given), 2);
  given = w.base("x");
  given["text"] = Json::array({(w.folder / "absent.txt").string()});
  EXPECT_EQ(code_of(given), 3);
  EXPECT_FALSE(fs::exists(w.folder / "x"));
  EXPECT_FALSE(fs::exists(w.folder / "x.partial"));
}

TEST(Train, UnfinishedWorkOfAnotherCommandStays) {
  const Workplace w("foreign");
  testing::write_file(w.folder / "x.partial" / "quantize.json", "{}");
  Json given = w.base("x");
  EXPECT_THROW(w.run(given), Error);
  EXPECT_TRUE(fs::exists(w.folder / "x.partial" / "quantize.json"));
  given["restart"] = true;
  given["context"] = 65;  // refused before anything is removed
  EXPECT_THROW(w.run(given), Error);
  EXPECT_TRUE(fs::exists(w.folder / "x.partial" / "quantize.json"));
  given["context"] = 32;
  w.run(given);
  EXPECT_FALSE(fs::exists(w.folder / "x" / "quantize.json"));
}

TEST(Train, ScheduleRisesThenFallsToItsFloor) {
  TrainerSettings s;
  s.steps = 1000;
  s.lr = 2;
  s.warmup = 0.1;
  s.min_lr_ratio = 0.05;
  EXPECT_NEAR(learning_rate(s, 0), 0.02, 1e-12);
  EXPECT_NEAR(learning_rate(s, 49), 1.0, 1e-12);
  EXPECT_NEAR(learning_rate(s, 99), 2.0, 1e-12);
  EXPECT_NEAR(learning_rate(s, 549), 2 * (0.05 + 0.95 * 0.5), 1e-12);
  EXPECT_NEAR(learning_rate(s, 999), 0.1, 1e-12);
}

TEST(Train, HeldOutLossAndItsStandardErrorByHand) {
  Decoder decoder = testing::small_decoder(5);
  HeldOut held{"h", {}};
  torch::manual_seed(3);
  for (int d = 0; d < 3; ++d)
    for (int part = 0; part < 2; ++part) {
      Window window;
      window.document = d;
      window.first_scored = part == 0 ? 3 : 1;
      for (int i = 0; i < 9 + 4 * d; ++i) window.ids.push_back(torch::randint(0, 300, {1}, torch::kLong).item<std::int64_t>());
      held.windows.push_back(window);
    }
  std::vector<double> sums(3), counts(3);
  for (const Window& window : held.windows) {
    const torch::Tensor ids = torch::tensor(std::vector<std::int64_t>(window.ids.begin(), window.ids.end()), torch::kLong);
    const torch::NoGradGuard no_grad;
    const torch::Tensor log_p = torch::log_softmax(decoder->forward(ids.unsqueeze(0))[0].to(torch::kDouble), -1);
    for (auto t = static_cast<std::int64_t>(window.first_scored); t < ids.numel(); ++t) {
      sums[static_cast<std::size_t>(window.document)] -= log_p[t - 1][ids[t].item<std::int64_t>()].item<double>();
      ++counts[static_cast<std::size_t>(window.document)];
    }
  }
  const double n = counts[0] + counts[1] + counts[2], mean = (sums[0] + sums[1] + sums[2]) / n;
  double squares = 0;
  for (std::size_t d = 0; d < 3; ++d) squares += std::pow(sums[d] - mean * counts[d], 2);
  const MeanLoss loss = held_out_loss(decoder, held, 0, torch::kCPU);
  EXPECT_EQ(loss.tokens, static_cast<std::int64_t>(n));
  EXPECT_NEAR(loss.mean, mean, 1e-5);
  EXPECT_NEAR(loss.standard_error, std::sqrt(squares * 3 / 2) / n, 1e-5);
}

}  // namespace
}  // namespace pare
