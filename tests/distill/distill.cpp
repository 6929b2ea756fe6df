#include "distill/distill.h"

#include <cmath>

#include "distill/cached_teacher.h"
#include "distill/student.h"
#include "model/losses.h"
#include "model/train.h"
#include "tests/model/models.h"

namespace pare {
namespace {

using testing::Folder;
using testing::QuietRun;

struct Workplace {
  Folder folder;
  explicit Workplace(const std::string& name) : folder("distill-" + name) {
    testing::write_tokenizer(folder / "like");
    testing::write_file(folder / "text.txt", testing::sample_text());
    testing::write_file(folder / "held.txt", testing::sample_text().substr(0, 3000));
    Decoder teacher = testing::small_decoder(1, testing::small_config(), 3);
    save_decoder(teacher, "float32", folder / "like", folder / "teacher");
  }
  Json base(const std::string& out) const {
    return Json{{"teacher", (folder / "teacher").string()}, {"out", (folder / out).string()},
                {"text", Json::array({(folder / "text.txt").string()})},
                {"held-out", Json::array({(folder / "held.txt").string()})}, {"steps", 25}, {"batch", 4}, {"context", 32},
                {"lr", 0.003}, {"weight-decay", 0.0}};
  }
  Json run(const Json& given) const {
    QuietRun r;
    const Command command = distill_command();
    return command.run(Options(command.options, given, "test"), r.context);
  }
  int code_of(const Json& given) const {
    try {
      run(given);
    } catch (const Error& error) {
      return static_cast<int>(error.code());
    }
    return 0;
  }
};

TEST(Student, KeepsTheChosenLayersAndTheStrongestNeurons) {
  const torch::NoGradGuard no_grad;
  Decoder teacher = testing::small_decoder(6);
  // Neurons 3 and 7 of layer 2 are made too weak to keep.
  for (const int neuron : {3, 7}) teacher->tensor("model.layers.2.mlp.up_proj.weight")[neuron].mul_(1e-3);
  Decoder student = cut_student(teacher, {0, 2}, 46);
  EXPECT_EQ(student->config().num_layers, 2);
  EXPECT_EQ(student->config().intermediate_size, 46);
  EXPECT_TRUE(torch::equal(student->tensor("model.layers.1.self_attn.q_proj.weight"),
                           teacher->tensor("model.layers.2.self_attn.q_proj.weight")));
  std::vector<std::int64_t> kept;
  for (std::int64_t i = 0; i < 48; ++i)
    if (i != 3 && i != 7) kept.push_back(i);
  const torch::Tensor index = torch::tensor(kept, torch::kLong);
  EXPECT_TRUE(torch::equal(student->tensor("model.layers.1.mlp.gate_proj.weight"),
                           teacher->tensor("model.layers.2.mlp.gate_proj.weight").index_select(0, index)));
  EXPECT_TRUE(torch::equal(student->tensor("model.layers.1.mlp.down_proj.weight"),
                           teacher->tensor("model.layers.2.mlp.down_proj.weight").index_select(1, index)));
  // Nothing cut: the same function.
  const torch::Tensor ids = torch::randint(0, 300, {1, 20}, torch::kLong);
  EXPECT_TRUE(torch::equal(cut_student(teacher, {}, 0)->forward(ids), teacher->forward(ids)));
}

TEST(Student, LayerListsAreChecked) {
  EXPECT_EQ(parse_layers("0,2,3", 4), (std::vector<int>{0, 2, 3}));
  EXPECT_EQ(parse_layers("1", 4), (std::vector<int>{1}));
  for (const char* bad : {"", "4", "2,1", "1,1", "a", "0,", "-1", "0;1", "0 ,1"})
    EXPECT_THROW(parse_layers(bad, 4), Error) << bad;
}

TEST(Distill, BringsTheStudentNearerToItsTeacher) {
  const Workplace w("near");
  Json given = w.base("student");
  given["keep-layers"] = "0,2";
  given["ffn"] = 40;
  given["steps"] = 80;
  const Json held = w.run(given).at("held_out").at("held.txt");
  EXPECT_LT(held.at("kl_after").get<double>(), 0.6 * held.at("kl_before").get<double>());
  const Checkpoint student(w.folder / "student");
  EXPECT_EQ(student.config().num_layers, 2);
  EXPECT_EQ(student.config().intermediate_size, 40);
  given["out"] = (w.folder / "again").string();
  w.run(given);
  EXPECT_EQ(testing::bytes_of(w.folder / "student" / "model.safetensors"), testing::bytes_of(w.folder / "again" / "model.safetensors"));
}

TEST(Distill, AStudentEqualToTheTeacherHasNoDivergence) {
  const Workplace w("equal");
  Json given = w.base("copy");
  given["keep-layers"] = "0,1,2";
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
  given["keep-layers"] = "0,1";
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

TEST(Distill, BadUseIsRefused) {
  const Workplace w("bad");
  EXPECT_EQ(w.code_of(w.base("x")), 2);  // no student named
  Json given = w.base("x");
  given["keep-layers"] = "0,9";
  EXPECT_EQ(w.code_of(given), 2);
  given = w.base("x");
  given["ffn"] = 49;
  EXPECT_EQ(w.code_of(given), 2);
  given = w.base("x");
  given["ffn"] = 40;
  given["model"] = (w.folder / "teacher").string();
  EXPECT_EQ(w.code_of(given), 2);
  given = w.base("x");
  given["ffn"] = 40;
  given["tau"] = 2.0;
  given["cache"] = (w.folder / "c.h5").string();
  EXPECT_EQ(w.code_of(given), 2);
  given = w.base("x");
  given["ffn"] = 40;
  given["kl-weight"] = 0.0;
  EXPECT_EQ(w.code_of(given), 2);
  // A student with another tokenizer.
  fs::copy(w.folder / "teacher", w.folder / "foreign", fs::copy_options::recursive);
  testing::write_file(w.folder / "foreign" / "tokenizer.json", testing::bytes_of(w.folder / "teacher" / "tokenizer.json") + "\n");
  given = w.base("x");
  given["model"] = (w.folder / "foreign").string();
  EXPECT_EQ(w.code_of(given), 3);
  EXPECT_FALSE(fs::exists(w.folder / "x"));
}

}  // namespace
}  // namespace pare
