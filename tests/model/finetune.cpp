// The finetune stage: what it learns, what it writes, how it goes on after a kill, when it stops.
#include <cmath>

#include "model/lora.h"
#include "model/train.h"
#include "model/trainer.h"
#include "tests/model/models.h"

namespace pare {
namespace {

using testing::Folder;
using testing::QuietRun;

using torch::Tensor;

std::vector<float> weights_of(Decoder& decoder) {
  std::vector<float> all;
  for (const Tensor& weight : decoder->parameters()) {
    const Tensor flat = weight.detach().contiguous().view({-1});
    all.insert(all.end(), flat.data_ptr<float>(), flat.data_ptr<float>() + flat.numel());
  }
  return all;
}

struct Workplace {
  Folder folder;
  explicit Workplace(const std::string& name) : folder("finetune-" + name) {
    testing::write_tokenizer(folder / "like");
    Decoder decoder = testing::small_decoder(2, testing::small_config(), 2);
    save_decoder(decoder, "bfloat16", folder / "like", folder / "base");
    testing::write_file(folder / "train.jsonl", lines(0, 40));
    testing::write_file(folder / "held.jsonl", lines(40, 52));
  }
  static std::string lines(int from, int to) {
    const char* subjects[] = {"the compiler", "a linker", "one small model", "every target", "this folder"};
    std::string out;
    for (int i = from; i < to; ++i)
      out += std::string("{\"prompt\": \"") + subjects[i % 5] + " reads " + subjects[(i / 5) % 5] +
             ". \", \"response\": \"" + (i % 2 == 0 ? "it keeps this folder" : "it finds every target") + "\"}\n";
    return out;
  }
  Json base(const std::string& out) const {
    return Json{{"model", (folder / "base").string()},
                {"out", (folder / out).string()},
                {"text", Json::array({(folder / "train.jsonl").string()})},
                {"held-out", Json::array({(folder / "held.jsonl").string()})},
                {"batch", 2},
                {"context", 48},
                {"lr", 0.01},
                {"epochs", 4}};
  }
  Json run(const Json& given) const {
    QuietRun r;
    const Command command = finetune_command();
    return command.run(Options(command.options, given, "test"), r.context);
  }
  std::string weights(const std::string& out) const { return testing::bytes_of(folder / out / "model.safetensors"); }
  int code_of(const Json& given, std::string* message = nullptr) const {
    try {
      run(given);
    } catch (const Error& error) {
      if (message != nullptr) *message = error.what();
      return static_cast<int>(error.code());
    }
    return 0;
  }
};

TEST(Finetune, FullAndLoraLearnTheResponses) {
  const Workplace w("learn");
  for (const int rank : {0, 4}) {
    Json given = w.base("out" + std::to_string(rank));
    given["lora-rank"] = rank;
    if (rank > 0) given["adapter"] = true;
    const Json result = w.run(given);
    const Json& held = result.at("held_out").at("held.jsonl");
    // Around a random embedding, which stays as it is, adapters find less.
    const double share = rank > 0 ? 0.9 : 0.5;
    EXPECT_LT(held.at("after").at("loss").get<double>(), share * held.at("before").at("loss").get<double>()) << rank;
    const Json& text = result.at("text").at("train.jsonl");
    EXPECT_EQ(text.at("examples"), 40);
    EXPECT_EQ(text.at("cut").get<int>() + text.at("dropped").get<int>(), 0);
    EXPECT_EQ(result.at("steps").get<std::int64_t>(), (4 * text.at("windows").get<std::int64_t>() + 1) / 2);
    const Checkpoint out(w.folder / ("out" + std::to_string(rank)));
    EXPECT_EQ(out.float_dtype(), "bfloat16");
    // LoRA changes linears alone.
    const bool norms = out.read_f32("model.norm.weight") != Checkpoint(w.folder / "base").read_f32("model.norm.weight");
    EXPECT_EQ(norms, rank == 0);
    EXPECT_EQ(fs::exists(w.folder / ("out" + std::to_string(rank)) / "adapter" / "adapter_model.safetensors"),
              rank > 0);
  }
}

// The held-out loss counts what is learned, one example at a time: by hand.
TEST(Finetune, HeldOutLossIsOfTheResponsesAlone) {
  const Workplace w("held");
  const Tokenizer tokenizer = Tokenizer::from_file(w.folder / "like" / "tokenizer.json");
  Decoder decoder = load_decoder(Checkpoint(w.folder / "base"), torch::kCPU);
  const auto held = read_held_out({(w.folder / "held.jsonl").string()}, TextForm{.context = 48}, tokenizer);
  const MeanLoss loss = held_out_loss(decoder, held[0], 0, torch::kCPU);
  double sum = 0;
  std::int64_t counted = 0;
  const torch::NoGradGuard no_grad;
  for (const Document& document : read_documents({w.folder / "held.jsonl"}, std::nullopt)) {
    const auto prompt = tokenizer.encode(document.text.substr(0, document.response_begin), false, false);
    auto ids = tokenizer.encode(document.text, false, false);
    ids.push_back(0);
    const torch::Tensor row = torch::tensor(std::vector<std::int64_t>(ids.begin(), ids.end()));
    const torch::Tensor log_p = torch::log_softmax(decoder->forward(row.unsqueeze(0))[0].to(torch::kDouble), -1);
    for (auto t = static_cast<std::int64_t>(prompt.size()); t < row.numel(); ++t, ++counted)
      sum -= log_p[t - 1][row[t].item<std::int64_t>()].item<double>();
  }
  EXPECT_EQ(loss.tokens, counted);
  EXPECT_NEAR(loss.mean, sum / static_cast<double>(counted), 1e-5);
}

TEST(Finetune, AnInterruptedRunContinuesToTheSameBytes) {
  for (const int rank : {0, 4}) {
    const Workplace w("resume" + std::to_string(rank));
    Json given = w.base("whole");
    given["lora-rank"] = rank;
    given["patience"] = 3;
    given["checkpoint-minutes"] = 0.0;
    w.run(given);
    given["out"] = (w.folder / "broken").string();
    QuietRun r;
    const Command command = finetune_command();
    const Options options(command.options, given, "test");
    const fs::path work = w.folder / "broken.partial";
    fs::create_directories(work);
    Context& context = r.context;
    int calls = 0;
    // The same job through the library, stopped by an error inside a later step.
    Decoder decoder = load_decoder(Checkpoint(w.folder / "base"), torch::kCPU);
    const Tokenizer tokenizer = Tokenizer::from_file(w.folder / "base" / "tokenizer.json");
    TextForm form{.context = 48, .always_examples = true, .chat_folder = w.folder / "base"};
    TrainingJob job;
    job.settings = trainer_settings(options, decoder->config());
    BatchStream data(read_sources({{w.folder / "train.jsonl", std::nullopt}}, form, tokenizer, context), 48, 7);
    job.settings.lr = 0.01;
    job.settings.steps = (data.sequences(4) + 1) / 2;
    job.settings.eval_every = (data.sequences(1) + 1) / 2;
    job.stage = "finetune";
    job.decoder = decoder;
    job.data = &data;
    job.held_out = read_held_out({(w.folder / "held.jsonl").string()}, form, tokenizer);
    job.echo = deciding_options(options, 7);
    job.work = work;
    std::optional<Lora> lora;
    if (rank > 0) {
      lora.emplace(decoder, LoraSettings{rank, 2.0 * rank, {}}, 7, torch::kCPU);
      job.companions = lora->parameters();
      job.frozen = true;
    }
    job.loss = [&](const Batch& micro, double scale, LossSums& sums) {
      if (++calls == 12) throw std::runtime_error("power cut");
      const auto hidden = decoder->hidden(micro.ids, micro.starts);
      return cross_entropy_loss(hidden.view({-1, 32}), decoder->output_head(), micro.targets.view(-1), scale, &sums);
    };
    EXPECT_THROW(run_training(job, "bfloat16", context), std::runtime_error);
    ASSERT_TRUE(fs::exists(work / "training_state.safetensors"));
    w.run(given);
    EXPECT_EQ(w.weights("whole"), w.weights("broken")) << rank;
    EXPECT_EQ(testing::curve_of(w.folder / "whole"), testing::curve_of(w.folder / "broken"));
  }
}

TEST(Finetune, RecomputingWhatLiesInsideBlocksGivesTheSameBytes) {
  const Workplace w("recompute");  // adapters: the first block's input takes no gradient
  Json given = w.base("kept");
  given["lora-rank"] = 4;
  w.run(given);
  given["out"] = (w.folder / "again").string();
  given["activation-checkpointing"] = true;
  w.run(given);
  EXPECT_EQ(w.weights("kept"), w.weights("again"));
}

TEST(Finetune, PatienceStopsAndTheBestWeightsStay) {
  const Workplace w("patience");
  // Learning to say the opposite of what the held-out examples say: their loss can only rise after a while.
  std::string wrong = Workplace::lines(0, 40);
  for (std::size_t at; (at = wrong.find("it keeps this folder")) != std::string::npos;)
    wrong.replace(at, 20, "one small model reads");
  for (std::size_t at; (at = wrong.find("it finds every target")) != std::string::npos;)
    wrong.replace(at, 21, "a linker writes");
  testing::write_file(w.folder / "wrong.jsonl", wrong);
  Json given = w.base("out");
  given["text"] = Json::array({(w.folder / "wrong.jsonl").string()});
  given["epochs"] = 40;
  given["patience"] = 2;
  given["eval-every"] = 2;
  const Json result = w.run(given);
  const auto steps = result.at("steps").get<std::int64_t>(), best = result.at("best_step").get<std::int64_t>();
  EXPECT_EQ(steps, best + 4);
  // What is written has the least loss of the curve, but for rounding to bfloat16.
  std::istringstream curve(testing::curve_of(w.folder / "out"));
  std::string line;
  double least = result.at("held_out").at("held.jsonl").at("before").at("loss");
  while (std::getline(curve, line)) {
    const Json point = parse_json(line, "curve");
    if (point.contains("held_out") && !point.contains("final"))
      least = std::min(least, point.at("held_out").at("held.jsonl").get<double>());
  }
  EXPECT_NEAR(result.at("held_out").at("held.jsonl").at("after").at("loss").get<double>(), least, 0.02);
}

TEST(Finetune, BadUseAndBadLinesAreRefusedBeforeAnythingIsWritten) {
  const Workplace w("bad");
  std::string message;
  Json given = w.base("x");
  testing::write_file(w.folder / "bad.jsonl", Workplace::lines(0, 2) + "{\"prompt\": \"a\", \"response\": \"\"}\n");
  given["text"] = Json::array({(w.folder / "bad.jsonl").string()});
  EXPECT_EQ(w.code_of(given, &message), 3);
  EXPECT_NE(message.find("bad.jsonl:3"), std::string::npos) << message;
  testing::write_file(w.folder / "chat.jsonl", "{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\"}]}\n");
  given["text"] = Json::array({(w.folder / "chat.jsonl").string()});
  EXPECT_EQ(w.code_of(given, &message), 3);  // the folder has no template
  EXPECT_NE(message.find("chat.jsonl:1"), std::string::npos) << message;
  const std::vector<std::pair<const char*, Json>> wrong = {
      {"lora-alpha", 3.0}, {"adapter", true}, {"context", 65}, {"too-long", "often"}};
  for (const auto& [key, value] : wrong) {
    given = w.base("x");
    given[key] = value;
    EXPECT_EQ(w.code_of(given), 2) << key;
  }
  given = w.base("x");
  given["steps"] = 3;  // with --epochs
  EXPECT_EQ(w.code_of(given), 2);
  given = w.base("x");
  given["lora-rank"] = 2;
  given["lora-targets"] = Json::array({"query"});
  EXPECT_EQ(w.code_of(given), 2);
  given = w.base("x");
  given.erase("held-out");
  given["patience"] = 2;
  EXPECT_EQ(w.code_of(given), 2);
  given = w.base("x");
  given["context"] = 4;
  given["too-long"] = "refuse";
  EXPECT_EQ(w.code_of(given, &message), 3);
  EXPECT_NE(message.find(".jsonl:1"), std::string::npos) << message;
  EXPECT_FALSE(fs::exists(w.folder / "x"));
  EXPECT_FALSE(fs::exists(w.folder / "x.partial"));
}

TEST(Finetune, AdaptersDoNotFillPrunedZeros) {
  const Workplace w("zeros");
  Decoder decoder = load_decoder(Checkpoint(w.folder / "base"), torch::kCPU);
  {
    const torch::NoGradGuard no_grad;
    for (int layer = 0; layer < 3; ++layer) {
      torch::Tensor weight = decoder->block(layer)->weight("mlp.up_proj");
      weight.masked_fill_(torch::rand(weight.sizes()) < 0.5, 0);
    }
  }
  save_decoder(decoder, "float32", w.folder / "like", w.folder / "pruned");
  Json given = w.base("x");
  given["model"] = (w.folder / "pruned").string();
  given["lora-rank"] = 2;
  EXPECT_EQ(w.code_of(given), 2);
  given["keep-zeros"] = "off";
  EXPECT_EQ(w.code_of(given), 0);
}

TEST(Finetune, OnePrunedLinearAmongManyIsNotFilledEither) {
  const Workplace w("one-pruned");
  Decoder decoder = load_decoder(Checkpoint(w.folder / "base"), torch::kCPU);
  {
    const torch::NoGradGuard no_grad;
    Tensor weight = decoder->block(1)->weight("self_attn.k_proj");
    weight.masked_fill_(torch::rand(weight.sizes()) < 0.3, 0);
  }
  save_decoder(decoder, "float32", w.folder / "like", w.folder / "pruned");
  Json given = w.base("x");
  given["model"] = (w.folder / "pruned").string();
  given["lora-rank"] = 2;
  std::string message;
  EXPECT_EQ(w.code_of(given, &message), 2);
  EXPECT_NE(message.find("model.layers.1.self_attn.k_proj"), std::string::npos) << message;
  {
    const torch::NoGradGuard no_grad;  // a single zero: no pruning, but --keep-zeros on is a promise
    Decoder one = load_decoder(Checkpoint(w.folder / "base"), torch::kCPU);
    one->block(1)->weight("self_attn.k_proj")[0][0] = 0;
    save_decoder(one, "float32", w.folder / "like", w.folder / "one-zero");
  }
  given["model"] = (w.folder / "one-zero").string();
  given["keep-zeros"] = "on";
  EXPECT_EQ(w.code_of(given), 2);
  given["keep-zeros"] = "auto";
  EXPECT_EQ(w.code_of(given), 0);
}

TEST(Finetune, APassDrawsEverySourceOnce) {
  const Workplace w("passes");
  const auto lines = [](const char* reply) {
    std::string all;
    for (int i = 0; i < 6; ++i) all += std::string("{\"prompt\": \"a\", \"response\": \"") + reply + "\"}\n";
    return all;
  };
  std::string longer;
  for (int i = 0; i < 12; ++i) longer += "the compiler ";
  testing::write_file(w.folder / "short.jsonl", lines("the linker reads the linker"));
  testing::write_file(w.folder / "long.jsonl", lines(longer.c_str()));
  QuietRun r;
  const Tokenizer tokenizer = Tokenizer::from_file(w.folder / "base" / "tokenizer.json");
  TextForm form{.context = 48, .always_examples = true};
  auto sources = read_sources({{w.folder / "short.jsonl", std::nullopt}, {w.folder / "long.jsonl", std::nullopt}}, form,
                              tokenizer, r.context);
  const std::vector<std::int64_t> windows{static_cast<std::int64_t>(sources[0].window_begin.size()),
                                          static_cast<std::int64_t>(sources[1].window_begin.size())};
  ASSERT_LT(windows[0], windows[1]);
  BatchStream data(std::move(sources), 48, 7);
  data.next(data.sequences(1));
  EXPECT_EQ(data.taken(), windows);
}

TEST(Finetune, HeldOutExamplesFitWhereTrainingFits) {
  std::vector<std::int32_t> ids(9, 5);
  const HeldOut held_out{"h", {{ids, 0, 1}}, {std::vector<std::uint8_t>(9, 1)}};
  const MeanLoss loss = held_out_mean(held_out, 0, torch::kCPU, [](const Tensor& batch, const Tensor& targets) {
    EXPECT_EQ(batch.sizes(), (std::vector<std::int64_t>{1, 8}));  // the last id is only predicted
    EXPECT_EQ(targets.numel(), 8);
    return torch::ones({8});
  });
  EXPECT_EQ(loss.tokens, 8);
}

TEST(Finetune, AnUnfinishedRunGoesOnWithTheSameMasksAndHeldOutTextsAlone) {
  const Workplace w("other-texts");
  Json given = w.base("out");
  given["checkpoint-minutes"] = 0.0;
  given["eval-every"] = 4;
  const std::string train = Workplace::lines(0, 40);
  std::string moved = train;  // the same ids, another mask
  for (std::size_t at; (at = moved.find(". \", \"response\": \"it ")) != std::string::npos;)
    moved.replace(at, 21, ". it \", \"response\": \"");
  ASSERT_NE(moved, train);
  Decoder decoder = load_decoder(Checkpoint(w.folder / "base"), torch::kCPU);
  const Tokenizer tokenizer = Tokenizer::from_file(w.folder / "base" / "tokenizer.json");
  const fs::path work = w.folder / "out.partial";
  fs::create_directories(work);
  QuietRun r;
  const Command command = finetune_command();
  const Options options(command.options, given, "test");
  TextForm form{.context = 48, .always_examples = true, .chat_folder = w.folder / "base"};
  const auto run = [&](bool fails) {
    TrainingJob job;
    job.settings = trainer_settings(options, decoder->config());
    job.settings.lr = 0.01;
    job.settings.steps = 12;
    job.stage = "finetune";
    job.decoder = load_decoder(Checkpoint(w.folder / "base"), torch::kCPU);
    BatchStream data(read_sources({{w.folder / "train.jsonl", std::nullopt}}, form, tokenizer, r.context), 48, 7);
    job.data = &data;
    job.held_out = read_held_out({(w.folder / "held.jsonl").string()}, form, tokenizer);
    job.echo = Json::object();
    job.work = work;
    int calls = 0;
    job.loss = [&](const Batch& micro, double scale, LossSums& sums) {
      if (fails && ++calls == 6) throw std::runtime_error("power cut");
      const auto hidden = job.decoder->hidden(micro.ids, micro.starts);
      return cross_entropy_loss(hidden.view({-1, 32}), job.decoder->output_head(), micro.targets.view(-1), scale, &sums);
    };
    return run_training(job, "bfloat16", r.context);
  };
  EXPECT_THROW(run(true), std::runtime_error);
  testing::write_file(w.folder / "train.jsonl", moved);
  EXPECT_THROW(run(false), Error);
  testing::write_file(w.folder / "train.jsonl", train);
  testing::write_file(w.folder / "held.jsonl", Workplace::lines(41, 53));
  EXPECT_THROW(run(false), Error);
  testing::write_file(w.folder / "held.jsonl", Workplace::lines(40, 52));
  EXPECT_EQ(run(false).at("steps"), 12);
}

// Where another rank is lost while the held-out losses are measured, the step before stays and its point follows.
TEST(Finetune, AStepWhoseHeldOutLossesWereCutShortIsMeasuredAgain) {
  const Workplace w("cut-short");
  const Tokenizer tokenizer = Tokenizer::from_file(w.folder / "base" / "tokenizer.json");
  TextForm form{.context = 48, .always_examples = true, .chat_folder = w.folder / "base"};
  QuietRun r;
  const Command command = finetune_command();
  const auto run = [&](const std::string& name, int lost_at) {
    Json given = w.base(name);
    given["checkpoint-minutes"] = 60.0;
    given["eval-every"] = 3;
    given["patience"] = 9;
    const Options options(command.options, given, "test");
    TrainingJob job;
    job.settings = trainer_settings(options, load_decoder(Checkpoint(w.folder / "base"), torch::kCPU)->config());
    job.settings.lr = 0.01;
    job.settings.steps = 12;
    job.settings.eval_every = 3;
    job.stage = "finetune";
    job.decoder = load_decoder(Checkpoint(w.folder / "base"), torch::kCPU);
    int measured = 0;
    job.decoder->block(0)->set_observer([&](BlockStage stage, const Tensor&) {
      if (stage != BlockStage::kO || torch::GradMode::is_enabled()) return;
      if (++measured == lost_at) throw RankLost(ExitCode::kFailure, "rank 0 of 2", "", "rank 1 ended", "");
    });
    BatchStream data(read_sources({{w.folder / "train.jsonl", std::nullopt}}, form, tokenizer, r.context), 48, 7);
    job.data = &data;
    job.held_out = read_held_out({(w.folder / "held.jsonl").string()}, form, tokenizer);
    job.echo = Json::object();
    job.work = w.folder / name;
    fs::create_directories(job.work);
    job.loss = [&](const Batch& micro, double scale, LossSums& sums) {
      const auto hidden = job.decoder->hidden(micro.ids, micro.starts);
      return cross_entropy_loss(hidden.view({-1, 32}), job.decoder->output_head(), micro.targets.view(-1), scale, &sums);
    };
    const Json result = run_training(job, "bfloat16", r.context);
    return std::pair(weights_of(job.decoder), result.at("best_step"));
  };
  const auto whole = run("whole", 0);
  // 12 examples are two batches of held-out text; before the run, at step 0 for the best weights, then at step 3.
  EXPECT_THROW(run("lost", 6), RankLost);
  ASSERT_TRUE(fs::exists(w.folder / "lost" / "training_state.safetensors"));
  EXPECT_EQ(run("lost", 0), whole);
  EXPECT_EQ(testing::curve_of(w.folder / "lost"), testing::curve_of(w.folder / "whole"));
}

}  // namespace
}  // namespace pare
