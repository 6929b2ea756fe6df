#include "distill/distill.h"

#include "eval/logit_cache.h"
#include "tests/distill/workplace.h"

namespace pare {
namespace {

using Workplace = testing::DistillWorkplace;

TEST(Distill, BringsTheStudentNearerToItsTeacher) {
  const Workplace w("near");
  Json given = w.base("student");
  given["model"] = w.student({0, 2});
  given["steps"] = 80;
  const Json held = w.run(given).at("held_out").at("held.txt");
  EXPECT_LT(held.at("kl_after").get<double>(), 0.6 * held.at("kl_before").get<double>());
  const Checkpoint student(w.folder / "student");
  EXPECT_EQ(student.config().num_layers, 2);
  given["out"] = (w.folder / "again").string();
  w.run(given);
  EXPECT_EQ(testing::bytes_of(w.folder / "student" / "model.safetensors"), testing::bytes_of(w.folder / "again" / "model.safetensors"));
}

TEST(Distill, EveryLossBringsTheStudentNearer) {
  const Workplace w("losses");
  for (const char* loss : {"reverse-kl", "jsd", "skew-kl", "skew-reverse-kl", "adaptive-kl"}) {
    Json given = w.base(loss);
    given["model"] = w.student({0, 2});
    given["loss"] = loss;
    given["steps"] = 60;
    const Json held = w.run(given).at("held_out").at("held.txt");
    EXPECT_LT(held.at("kl_after").get<double>(), 0.75 * held.at("kl_before").get<double>()) << loss;
  }
}

TEST(Distill, AStudentEqualToTheTeacherHasNoDivergence) {
  const Workplace w("equal");
  Json given = w.base("copy");
  given["model"] = w.student({0, 1, 2});
  given["steps"] = 3;
  given["lr"] = 1e-5;
  given["tau"] = 2.0;
  const Json held = w.run(given).at("held_out").at("held.txt");
  EXPECT_NEAR(held.at("kl_before").get<double>(), 0, 1e-6);
  EXPECT_NEAR(held.at("kl_after").get<double>(), 0, 1e-4);
}

TEST(Distill, TheCacheTeachesWhatTheTeacherTeaches) {
  const Workplace w("cache");
  Json given = w.base("cached");
  given["model"] = w.student({0, 1});
  given["cache"] = (w.folder / "teacher.h5").string();
  given["cache-top-k"] = 64;
  given["steps"] = 60;
  const Json first = w.run(given).at("held_out").at("held.txt");
  EXPECT_LT(first.at("kl_after").get<double>(), 0.6 * first.at("kl_before").get<double>());
  ASSERT_TRUE(fs::exists(w.folder / "teacher.h5"));
  const auto written = fs::last_write_time(w.folder / "teacher.h5");
  given["out"] = (w.folder / "again").string();
  w.run(given);
  EXPECT_EQ(written, fs::last_write_time(w.folder / "teacher.h5"));
  EXPECT_EQ(testing::bytes_of(w.folder / "cached" / "model.safetensors"), testing::bytes_of(w.folder / "again" / "model.safetensors"));
  given["out"] = (w.folder / "other").string();
  given["context"] = 16;  // the cache is of other windows
  EXPECT_EQ(w.code_of(given), 3);
}

// Samples of the tail teach what the live teacher does, at other temperatures too. The teacher is sure of itself, as
// trained ones are: of a flat one a dozen ids say little.
TEST(Distill, ASampledCacheTeachesAsTheTeacherItself) {
  const Workplace w("samples");
  {
    const torch::NoGradGuard no_grad;
    Decoder teacher = testing::small_decoder(1, testing::small_config(), 3);
    teacher->tensor("model.norm.weight").mul_(5);
    fs::remove_all(w.folder / "teacher");
    save_decoder(teacher, "float32", w.folder / "like", w.folder / "teacher");
  }
  for (const double tau : {1.0, 2.0}) {
    Json given = w.base("live" + std::to_string(tau));
    given["model"] = w.student({0, 1});
    given["steps"] = 120;
    given["tau"] = tau;
    const double live = w.run(given).at("held_out").at("held.txt").at("kl_after").get<double>();
    given["out"] = (w.folder / ("cached" + std::to_string(tau))).string();
    given["cache"] = (w.folder / ("teacher" + std::to_string(tau) + ".h5")).string();
    const int draws = tau == 1 ? 12 : 120;  // the heavier tail of the higher temperature is noisier
    given["cache-samples"] = draws;
    const Json held = w.run(given).at("held_out").at("held.txt");
    EXPECT_LT(held.at("kl_after").get<double>(), (tau == 1 ? 1.2 : 1.5) * live) << tau;
    EXPECT_LT(held.at("kl_after").get<double>(), 0.6 * held.at("kl_before").get<double>()) << tau;
    LogitCacheReader reader(given["cache"].get<std::string>());
    EXPECT_EQ(reader.info().samples, draws);
    EXPECT_EQ(reader.info().top_k, 12);
    EXPECT_EQ(reader.info().temperature, tau);
    given["tau"] = 1.5;
    given["out"] = (w.folder / "x").string();
    EXPECT_EQ(w.code_of(given), 3);  // a cache of another temperature
  }
  // Samples alone, and a cache that has none where they are asked for.
  Json given = w.base("alone");
  given["model"] = w.student({0, 1});
  given["cache"] = (w.folder / "alone.h5").string();
  given["cache-samples"] = 24;
  given["cache-top-k"] = 0;
  given["steps"] = 80;
  const Json held = w.run(given).at("held_out").at("held.txt");
  EXPECT_LT(held.at("kl_after").get<double>(), 0.7 * held.at("kl_before").get<double>());
  given["out"] = (w.folder / "x").string();
  given["cache"] = (w.folder / "none.h5").string();
  given["steps"] = 2;
  given.erase("cache-samples");
  given["cache-top-k"] = 8;
  w.run(given);
  given["out"] = (w.folder / "y").string();
  given["cache-samples"] = 12;
  EXPECT_EQ(w.code_of(given), 3);
}

// A cache that was cut short is continued, and is then what it would have been.
TEST(Distill, ACacheCutShortIsContinued) {
  const Workplace w("cut");
  Json given = w.base("whole");
  given["model"] = w.student({0, 1});
  given["steps"] = 3;
  given["cache"] = (w.folder / "whole.h5").string();
  given["cache-samples"] = 5;
  w.run(given);
  LogitCacheReader whole(w.folder / "whole.h5");
  {
    LogitCacheWriter writer(w.folder / "cut.h5", whole.info(), true);
    const std::int64_t vocab = whole.info().vocab_size;
    Decoder teacher = load_decoder(Checkpoint(w.folder / "teacher"), torch::kCPU);
    const torch::NoGradGuard no_grad;
    for (std::int64_t i = 0; i < 10; ++i) {
      const auto ids = whole.read(i).ids;
      const torch::Tensor row = torch::tensor(std::vector<std::int64_t>(ids.begin(), ids.end()), torch::kLong);
      const torch::Tensor logits = teacher->forward(row.view({1, -1})).contiguous();
      ASSERT_EQ(logits.size(2), vocab);
      writer.append(ids, logits.data_ptr<float>());
    }
  }
  ASSERT_EQ(LogitCacheReader::of_partial(w.folder / "cut.h5").windows(), 10);
  given["cache"] = (w.folder / "cut.h5").string();
  given["out"] = (w.folder / "cut").string();
  w.run(given);
  LogitCacheReader continued(w.folder / "cut.h5");
  ASSERT_EQ(continued.windows(), whole.windows());
  for (std::int64_t i = 0; i < whole.windows(); ++i) {
    const CachedWindow a = whole.read(i), b = continued.read(i);
    ASSERT_TRUE(a.index == b.index && a.sample_index == b.sample_index && a.sample_count == b.sample_count) << i;
  }
  EXPECT_EQ(testing::bytes_of(w.folder / "whole" / "model.safetensors"), testing::bytes_of(w.folder / "cut" / "model.safetensors"));
}

TEST(Distill, ATeacherInBfloat16Teaches) {
  const Workplace w("bf16");
  Decoder teacher = testing::small_decoder(1, testing::small_config(), 3);
  save_decoder(teacher, "bfloat16", w.folder / "like", w.folder / "half");
  Json given = w.base("student");
  given["teacher"] = (w.folder / "half").string();
  given["model"] = w.student({0, 2}, "half", "bfloat16");
  given["steps"] = 60;
  const Json held = w.run(given).at("held_out").at("held.txt");
  EXPECT_LT(held.at("kl_after").get<double>(), 0.7 * held.at("kl_before").get<double>());
  EXPECT_EQ(Checkpoint(w.folder / "student").float_dtype(), "bfloat16");
}

// Padding rows say nothing: a teacher or a student with more of them teaches and learns the same.
TEST(Distill, VocabulariesMayDifferInTheirPadding) {
  const Workplace w("padding");
  const auto padded = [&](const std::string& from, const std::string& to) {
    const torch::NoGradGuard no_grad;
    Decoder plain = load_decoder(Checkpoint(w.folder / from), torch::kCPU);
    ModelConfig config = plain->config();
    config.vocab_size += 20;
    Decoder wide = testing::small_decoder(9, config);  // its further rows are noise that would be seen
    for (const TensorSpec& spec : expected_tensors(plain->config())) {
      const torch::Tensor& values = plain->tensor(spec.name);
      wide->tensor(spec.name).narrow(0, 0, values.size(0)).copy_(values);
    }
    save_decoder(wide, "float32", w.folder / "like", w.folder / to);
  };
  Decoder student = testing::small_decoder(2, testing::small_config(), 3);
  save_decoder(student, "float32", w.folder / "like", w.folder / "student");
  padded("teacher", "wide-teacher");
  padded("student", "wide-student");
  Json results;
  for (const auto& [teacher, own] :
       {std::pair{"teacher", "student"}, {"wide-teacher", "student"}, {"teacher", "wide-student"}}) {
    for (const bool cached : {false, true}) {
      const std::string name = std::string(teacher) + own + (cached ? "c" : "");
      Json given = w.base("out-" + name);
      given["teacher"] = (w.folder / teacher).string();
      given["model"] = (w.folder / own).string();
      given["steps"] = 10;
      if (cached) {
        given["cache"] = (w.folder / (name + ".h5")).string();
        given["cache-samples"] = 6;
      } else {
        given["loss"] = "jsd";
      }
      const Json held = w.run(given).at("held_out").at("held.txt");
      if (results[cached].is_null()) results[cached] = held;
      for (const char* key : {"kl_before", "kl_after"})
        EXPECT_NEAR(held.at(key).get<double>(), results[cached].at(key).get<double>(),
                    1e-4 * results[cached].at(key).get<double>()) << name << key;
    }
  }
}

TEST(Distill, TokenizersAreComparedByMeaning) {
  const Workplace w("tokenizers");
  const auto with_tokenizer = [&](const std::string& name, const std::string& json) {
    fs::copy(w.folder / "teacher", w.folder / name, fs::copy_options::recursive);
    testing::write_file(w.folder / name / "tokenizer.json", json);
    Json given = w.base("out-" + name);
    given["model"] = (w.folder / name).string();
    given["steps"] = 1;
    return given;
  };
  const Json own = parse_json(testing::bytes_of(w.folder / "teacher" / "tokenizer.json"), "tokenizer");
  EXPECT_EQ(w.code_of(with_tokenizer("indented", own.dump(4))), 0);  // other bytes, the same ids
  TokenizerTraining training;
  training.vocab_size = 300;
  const std::string zoo = "zebra zinc zoo quartz quiz " + testing::sample_text().substr(0, 300);
  EXPECT_EQ(w.code_of(with_tokenizer("other-text", train_tokenizer({zoo}, training))), 3);
  Json merges = own;  // the same pieces, put together in another order
  ASSERT_GT(merges["model"]["merges"].size(), 10u);
  std::reverse(merges["model"]["merges"].begin(), merges["model"]["merges"].end());
  EXPECT_EQ(w.code_of(with_tokenizer("merges", merges.dump())), 3);
  Json larger = own;
  larger["added_tokens"].push_back({{"id", 300}, {"content", "<|more|>"}, {"single_word", false}, {"lstrip", false},
                                    {"rstrip", false}, {"normalized", false}, {"special", true}});
  EXPECT_EQ(w.code_of(with_tokenizer("larger", larger.dump())), 3);  // an id that the models lack
}

TEST(Distill, ACacheLearnsResponsesAlone) {
  const Workplace w("responses");
  std::string lines;
  for (int i = 0; i < 12; ++i)
    lines += "{\"prompt\": \"the compiler reads " + std::to_string(i) + ", \", \"response\": \"it keeps this folder\"}\n";
  testing::write_file(w.folder / "pairs.jsonl", lines);
  Json given = w.base("live");
  given["model"] = w.student({0, 2});
  given["text"] = Json::array({(w.folder / "pairs.jsonl").string()});
  given["held-out"] = given["text"];
  given["steps"] = 1;
  given["batch"] = 12;  // every example, once
  given["lr"] = 0.0;
  given["ce-weight"] = 1.0;
  given["kl-weight"] = 1e-9;
  const auto loss = [&](const Json& options) { return w.run(options).at("train_loss").get<double>(); };
  const double live = loss(given);
  given["out"] = (w.folder / "cached").string();
  given["cache"] = (w.folder / "c.h5").string();
  EXPECT_NEAR(loss(given), live, 2e-2 * live);
}

TEST(Distill, BadUseIsRefused) {
  const Workplace w("bad");
  EXPECT_EQ(w.code_of(w.base("x")), 2);  // no student named
  const std::string student = w.student({0, 2});
  Json given = w.base("x");
  given["model"] = student;
  given["tau"] = 2.0;
  given["cache"] = (w.folder / "c.h5").string();
  EXPECT_EQ(w.code_of(given), 2);
  given = w.base("x");
  given["model"] = student;
  given["kl-weight"] = 0.0;
  EXPECT_EQ(w.code_of(given), 2);
  for (const Json& more : {Json{{"beta", 0.3}}, Json{{"loss", "jsd"}, {"alpha", 0.3}}, Json{{"loss", "jsd"}, {"beta", 1.0}},
                           Json{{"loss", "skew-kl"}, {"beta", 0.3}}, Json{{"loss", "kl"}},
                           Json{{"loss", "reverse-kl"}, {"cache", (w.folder / "c.h5").string()}},
                           Json{{"loss", "reverse-kl"}, {"kl-weight", 0.0}, {"ce-weight", 1.0}},
                           Json{{"cache-samples", 3}}, Json{{"cache", "c.h5"}, {"cache-top-k", 0}},
                           Json{{"cache", "c.h5"}, {"cache-samples", 256}}, Json{{"cache", "c.h5"}, {"hidden-weight", 1.0}},
                           Json{{"cache", "c.h5"}, {"on-policy", 0.5}}, Json{{"on-policy-tokens", 4}},
                           Json{{"on-policy", 1.0}, {"ce-weight", 0.5}},
                           Json{{"on-policy", 0.5}, {"on-policy-tokens", 32}}, Json{{"on-policy", 1.5}},
                           Json{{"on-policy", 0.5}, {"on-policy-tokens", 8}, {"kl-weight", 0.0}, {"ce-weight", 1.0}},
                           Json{{"hidden-layers", "0:1"}}, Json{{"hidden-weight", 1.0}, {"hidden-layers", "0:3"}},
                           Json{{"patience", 2}}, Json{{"cache", "c.h5"}, {"attention-weight", 1.0}}}) {
    given = w.base("x");
    given["model"] = student;
    given.update(more);
    EXPECT_EQ(w.code_of(given), 2) << more;
  }
  EXPECT_FALSE(fs::exists(w.folder / "x"));
}

}  // namespace
}  // namespace pare
