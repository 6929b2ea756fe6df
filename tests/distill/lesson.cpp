// Hidden states matched through projections, and learning from the student's own continuations.
#include "distill/lesson.h"

#include <cmath>
#include <map>

#include "distill/on_policy.h"
#include "tests/distill/workplace.h"

namespace pare {
namespace {

using torch::Tensor;
using Workplace = testing::DistillWorkplace;

TEST(Matching, LayersPairEvenlyOrAsTold) {
  EXPECT_EQ(parse_layer_pairs("even", 3, 3), (LayerPairs{{0, 0}, {1, 1}, {2, 2}}));
  EXPECT_EQ(parse_layer_pairs("", 2, 4), (LayerPairs{{0, 1}, {1, 3}}));
  EXPECT_EQ(parse_layer_pairs("even", 3, 4), (LayerPairs{{0, 0}, {1, 2}, {2, 3}}));
  EXPECT_EQ(parse_layer_pairs("even", 4, 2), (LayerPairs{{0, 0}, {1, 0}, {2, 1}, {3, 1}}));
  EXPECT_EQ(parse_layer_pairs("0:1,2:5", 3, 6), (LayerPairs{{0, 1}, {2, 5}}));
  for (const char* bad : {"0", "0:", ":1", "0:6", "3:1", "-1:1", "0:1,", "0:1;1:2", "odd", "0:1 "})
    EXPECT_THROW(parse_layer_pairs(bad, 3, 6), Error) << bad;
}

TEST(Matching, TheLossIsTheMissedPartOfTheTeachersState) {
  torch::manual_seed(3);
  const HiddenMatch match({{0, 1}, {1, 2}}, 5, 7, 11, torch::kCPU);
  const Tensor targets = torch::tensor({3, -1, 4, 2}, torch::kLong).view({2, 2});
  const std::vector<Tensor> own = {torch::randn({2, 2, 5}), torch::randn({2, 2, 5})};
  const std::vector<Tensor> taught = {torch::randn({2, 2, 7}), torch::randn({2, 2, 7})};
  double expected = 0;
  for (std::size_t p = 0; p < 2; ++p)
    for (int b = 0; b < 2; ++b)
      for (int t = 0; t < 2; ++t) {
        if (targets[b][t].item<std::int64_t>() < 0) continue;
        double missed = 0, all = 0;
        for (int i = 0; i < 7; ++i) {
          double mapped = 0;
          for (int j = 0; j < 5; ++j)
            mapped += match.projections()[p][i][j].item<double>() * own[p][b][t][j].item<double>();
          const auto y = taught[p][b][t][i].item<double>();
          missed += (mapped - y) * (mapped - y);
          all += y * y;
        }
        expected += missed / all / 2;
      }
  EXPECT_NEAR(match.loss(own, taught, targets, 0.25).item<double>(), 0.25 * expected, 1e-5 * expected);
  // Equal widths begin as equals.
  const HiddenMatch same({{0, 0}}, 7, 7, 11, torch::kCPU);
  EXPECT_EQ(same.loss({taught[0]}, {taught[0]}, targets, 1).item<double>(), 0);
}

TEST(Matching, StatesAreThoseOfTheDecoder) {
  const torch::NoGradGuard no_grad;
  Decoder decoder = testing::small_decoder(4);
  const Tensor ids = torch::randint(0, 300, {2, 9}, torch::kLong);
  const HiddenStates states = hidden_states(decoder, ids, {2, 0});
  EXPECT_TRUE(torch::equal(states.last, decoder->hidden(ids)));
  EXPECT_TRUE(torch::equal(decoder->final_norm(states.blocks[0]), states.last));
  EXPECT_TRUE(torch::equal(states.blocks[1], decoder->block(0)->forward(decoder->embed(ids), decoder->rope(9))));

  const HiddenStates heard = hidden_states(decoder, ids, {0}, {}, {1, 0});
  EXPECT_TRUE(torch::equal(heard.last, states.last));
  DecoderBlock second = decoder->block(1);
  const Tensor x = heard.blocks[0];
  const Tensor mix = second->attention_mix(second->attention_input(x), decoder->rope(9));
  EXPECT_TRUE(torch::allclose(second->attention_output(x, mix) - x, heard.attention[0], 1e-5, 1e-6));
  EXPECT_EQ(heard.attention[1].sizes(), x.sizes());
  EXPECT_FALSE(decoder->block(0)->is_observed());
}

TEST(Matching, BringsHiddenStatesNearerAndWritesNoProjection) {
  const Workplace w("hidden");
  ModelConfig narrow = testing::small_config();
  narrow.hidden_size = 24;
  narrow.num_layers = 2;
  Decoder student = testing::small_decoder(5, narrow, 3);
  save_decoder(student, "float32", w.folder / "like", w.folder / "narrow");
  Json given = w.base("matched");
  given["model"] = (w.folder / "narrow").string();
  given["hidden-weight"] = 3.0;
  given["steps"] = 60;
  const Json held = w.run(given).at("held_out").at("held.txt");
  EXPECT_LT(held.at("kl_after").get<double>(), held.at("kl_before").get<double>());
  const Checkpoint written(w.folder / "matched");
  EXPECT_EQ(written.tensors().size(), Checkpoint(w.folder / "narrow").tensors().size());

  // What a linear map of the student's states leaves of the teacher's, by least squares.
  const auto unexplained = [&](const fs::path& folder) {
    const torch::NoGradGuard no_grad;
    Decoder own = load_decoder(Checkpoint(folder), torch::kCPU),
            teacher = load_decoder(Checkpoint(w.folder / "teacher"), torch::kCPU);
    const Tensor ids = torch::tensor(
                           [&] {
                             const auto encoded = Tokenizer::from_file(w.folder / "like" / "tokenizer.json")
                                                      .encode(testing::sample_text().substr(0, 4000));
                             return std::vector<std::int64_t>(encoded.begin(), encoded.begin() + 640);
                           }(),
                           torch::kLong)
                           .view({20, 32});
    const Tensor x = hidden_states(own, ids, {1}).blocks[0].view({640, 24}).to(torch::kDouble);
    const Tensor y = hidden_states(teacher, ids, {2}).blocks[0].view({640, 32}).to(torch::kDouble);
    const Tensor map =
        torch::linalg_solve(torch::mm(x.t(), x) + torch::eye(24, torch::kDouble) * 1e-6, torch::mm(x.t(), y));
    return ((torch::mm(x, map) - y).square().sum() / y.square().sum()).item<double>();
  };
  given["out"] = (w.folder / "plain").string();
  given["hidden-weight"] = 0.0;
  w.run(given);
  EXPECT_LT(unexplained(w.folder / "matched"), 0.9 * unexplained(w.folder / "plain"));
}

TEST(Matching, BringsWhatAttentionAddsNearer) {
  const Workplace w("attention");
  Json given = w.base("matched");
  given["model"] = w.student({0, 2});
  given["steps"] = 40;
  given["attention-weight"] = 3.0;
  given["hidden-layers"] = "0:0,1:2";
  w.run(given);
  given["out"] = (w.folder / "again").string();
  given["activation-checkpointing"] = true;
  w.run(given);
  EXPECT_EQ(testing::bytes_of(w.folder / "matched" / "model.safetensors"),
            testing::bytes_of(w.folder / "again" / "model.safetensors"));
  given["out"] = (w.folder / "plain").string();
  given["attention-weight"] = 0.0;
  given.erase("hidden-layers");
  w.run(given);
  const auto missed = [&](const fs::path& folder) {
    const torch::NoGradGuard no_grad;
    Decoder own = load_decoder(Checkpoint(folder), torch::kCPU),
            teacher = load_decoder(Checkpoint(w.folder / "teacher"), torch::kCPU);
    torch::manual_seed(5);
    const Tensor ids = torch::randint(0, 300, {8, 32}, torch::kLong);
    const Tensor a = hidden_states(own, ids, {}, {}, {1}).attention[0],
                 b = hidden_states(teacher, ids, {}, {}, {2}).attention[0];
    return ((a - b).square().sum() / b.square().sum()).item<double>();
  };
  EXPECT_LT(missed(w.folder / "matched"), 0.9 * missed(w.folder / "plain"));
}

TEST(OnPolicy, StepsAreSpreadEvenly) {
  for (const double share : {0.0, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0}) {
    int taken = 0;
    for (int step = 0; step < 1000; ++step) {
      taken += on_policy_step(share, step);
      EXPECT_NEAR(taken, share * (step + 1), 1) << share;
    }
    EXPECT_EQ(taken, static_cast<int>(std::lround(share * 1000)));
  }
}

Batch some_batch(std::int64_t sequences, std::int64_t context) {
  torch::manual_seed(8);
  Batch batch{torch::randint(1, 300, {sequences, context}, torch::kLong),
              torch::randint(1, 300, {sequences, context}, torch::kLong),
              sequences * context,
              {}};
  batch.windows.assign(static_cast<std::size_t>(sequences), -1);
  return batch;
}

TEST(OnPolicy, ContinuationsAreTheStudentsOwnAndRepeatable) {
  Decoder student = testing::small_decoder(4);
  const auto sampled = [&](std::uint64_t seed, std::int64_t micro, std::int64_t vocab = 300) {
    Batch batch = some_batch(6, 20);
    batch.targets[2].fill_(-1);  // shorter than the prompt
    continue_prompts(student, batch, 5, 7, vocab, seed, 1000, micro, torch::kCPU);
    return batch;
  };
  const Batch a = sampled(1, 6);
  EXPECT_EQ(a.ids.sizes(), (std::vector<std::int64_t>{6, 12}));
  EXPECT_TRUE(torch::equal(a.ids.narrow(1, 0, 5), some_batch(6, 20).ids.narrow(1, 0, 5)));
  EXPECT_TRUE(torch::equal(sampled(1, 4).ids, a.ids));
  EXPECT_FALSE(torch::equal(sampled(2, 6).ids, a.ids));
  EXPECT_LT(sampled(1, 6, 40).ids.narrow(1, 5, 7).max().item<std::int64_t>(), 40);
  std::int64_t counted = 0;
  for (int s = 0; s < 6; ++s)
    for (int t = 0; t < 12; ++t) {
      const auto target = a.targets[s][t].item<std::int64_t>();
      if (target < 0) continue;
      ++counted;
      EXPECT_GE(t, 4);
      EXPECT_NE(s, 2);
      EXPECT_EQ(target, a.ids[s][t + 1].item<std::int64_t>());
    }
  EXPECT_EQ(counted, a.counted);
  EXPECT_GE(counted, 30);
}

// Each draw follows the student's distribution after what it has said so far: counts of the first two draws against
// expectation, with the distribution after the prompt alone as the wrong rule for the second.
TEST(OnPolicy, DrawsFollowTheStudentsDistribution) {
  const torch::NoGradGuard no_grad;
  ModelConfig config = testing::small_config();
  config.vocab_size = 6;
  config.eos_ids = {5};
  Decoder student = testing::small_decoder(3, config, 12);
  constexpr std::int64_t kRows = 3000;
  Batch batch = some_batch(kRows, 8);
  batch.ids = torch::tensor({1, 3, 2, 1}, torch::kLong).repeat({kRows, 2});
  batch.targets = batch.ids.clone();
  continue_prompts(student, batch, 4, 2, 6, 5, 0, kRows, torch::kCPU);
  const auto after = [&](std::vector<std::int64_t> ids) {
    const Tensor logits = student->forward(torch::tensor(ids, torch::kLong).view({1, -1}))[0][-1].to(torch::kDouble);
    return torch::softmax(logits, 0);
  };
  const auto chi_square = [&](const std::map<std::int64_t, double>& counts, double total, const Tensor& p) {
    double sum = 0;
    for (std::int64_t i = 0; i < 6; ++i) {
      const double expected = total * p[i].item<double>(), found = counts.contains(i) ? counts.at(i) : 0;
      sum += (found - expected) * (found - expected) / expected;
    }
    return sum;
  };
  std::map<std::int64_t, double> first;
  std::map<std::int64_t, std::map<std::int64_t, double>> second;
  std::int64_t ended = 0;
  for (std::int64_t s = 0; s < kRows; ++s) {
    const auto a = batch.ids[s][4].item<std::int64_t>(), b = batch.ids[s][5].item<std::int64_t>();
    ++first[a];
    ++second[a][b];
    ended += a == 5;
    EXPECT_EQ(batch.targets[s][4].item<std::int64_t>(), a == 5 ? -1 : b);  // nothing after the end of text
  }
  EXPECT_EQ(batch.counted, 2 * kRows - ended);
  const Tensor p = after({1, 3, 2, 1});
  EXPECT_LT(chi_square(first, kRows, p), 25);  // 5 degrees of freedom: 1 in 7,000
  const auto most = std::max_element(first.begin(), first.end(), [](auto& x, auto& y) { return x.second < y.second; });
  EXPECT_LT(chi_square(second[most->first], most->second, after({1, 3, 2, 1, most->first})), 25);
  EXPECT_GT(chi_square(second[most->first], most->second, p), 60);
}

TEST(OnPolicy, AnInterruptedRunContinuesToTheSameBytes) {
  const Workplace w("on-policy");
  Json given = w.base("whole");
  given["model"] = w.student({0, 2});
  given["loss"] = "jsd";
  given["on-policy"] = 0.5;
  given["on-policy-tokens"] = 8;
  given["hidden-weight"] = 0.5;
  given["steps"] = 12;
  given["checkpoint-minutes"] = 0.0;
  const Json held = w.run(given).at("held_out").at("held.txt");
  EXPECT_LT(held.at("kl_after").get<double>(), held.at("kl_before").get<double>());

  // The same job through the library, stopped by an error inside step 8, which is one of the student's own.
  given["out"] = (w.folder / "broken").string();
  testing::QuietRun r;
  const Command command = distill_command();
  const Options options(command.options, given, "test");
  const fs::path work = w.folder / "broken.partial";
  fs::create_directories(work);
  Decoder teacher = load_decoder(Checkpoint(w.folder / "teacher"), torch::kCPU);
  Decoder student = load_decoder(Checkpoint(given["model"].get<std::string>()), torch::kCPU);
  const Tokenizer tokenizer = Tokenizer::from_file(w.folder / "like" / "tokenizer.json");
  TrainingJob job;
  job.settings = trainer_settings(options, student->config());
  Lesson lesson(options, teacher, student, 300, job.settings, 7);
  BatchStream data(
      lesson.sources(w.folder / "teacher", {{w.folder / "text.txt", std::nullopt}}, TextForm{.context = 32}, tokenizer, r.context),
      32, 7);
  job.stage = "distill";
  job.decoder = student;
  job.data = &data;
  job.held_out = read_held_out({(w.folder / "held.txt").string()}, TextForm{.context = 32}, tokenizer);
  job.echo = deciding_options(options, 7);
  job.work = work;
  lesson.give(job);
  ASSERT_TRUE(on_policy_step(0.5, 7));
  int calls = 0;
  const LossFn whole = job.loss;
  job.loss = [&](const Batch& micro, double scale, LossSums& sums) {
    if (++calls == 8) throw std::runtime_error("power cut");
    return whole(micro, scale, sums);
  };
  EXPECT_THROW(run_training(job, "float32", r.context), std::runtime_error);
  ASSERT_TRUE(fs::exists(work / "training_state.safetensors"));
  w.run(given);
  EXPECT_EQ(testing::bytes_of(w.folder / "whole" / "model.safetensors"),
            testing::bytes_of(w.folder / "broken" / "model.safetensors"));
  // Without continuations it is another student.
  given["out"] = (w.folder / "off").string();
  given["on-policy"] = 0.0;
  given.erase("on-policy-tokens");
  w.run(given);
  EXPECT_NE(testing::bytes_of(w.folder / "whole" / "model.safetensors"),
            testing::bytes_of(w.folder / "off" / "model.safetensors"));
}

}  // namespace
}  // namespace pare
