// LoRA against PEFT: tests/golden/make_lora.py recorded masked loss, gradients, one step of AdamW and merged logits.
#include "model/lora.h"

#include <cmath>

#include "core/safetensors.h"
#include "model/trainer_state.h"
#include "tests/families.h"
#include "tests/model/models.h"

namespace pare {
namespace {

using testing::Folder;
using torch::Tensor;

Tensor formula(const std::string& name, const Tensor& like, double divisor) {
  const TensorSpec spec{name, like.sizes().vec(), TensorRole::kLinear, -1, {}};
  StoredTensor stored{name, like.sizes().vec(), false, {&spec}, {}};
  return torch::tensor(testing::formula_values(stored, false)).view(like.sizes()) / divisor;
}

TEST(Lora, LossGradientsStepAndMergeAreThoseOfPeft) {
  const Json golden = read_json(fs::path(PARE_SOURCE_DIR) / "tests/golden/lora.json");
  const Folder folder("lora-golden");
  const std::string family = golden["family"];
  testing::make_family_folder(read_json(testing::golden_families() / (family + ".json")).at("config"), folder / "m");
  Decoder decoder = load_decoder(Checkpoint(folder / "m"), torch::kCPU);
  Lora lora(decoder, {golden["rank"], golden["alpha"], {}}, 1, torch::kCPU);
  FlatParameters flat(decoder, "off", torch::kCPU, lora.parameters(), /*frozen=*/true);
  EXPECT_EQ(lora.linears(), static_cast<std::int64_t>(golden["gradients"].size()) / 2);
  // The golden's names are PEFT's, which are in the order of the modules, as ours.
  std::vector<std::string> names;
  for (const auto& [name, gradient] : golden["gradients"].items()) names.push_back(name);
  ASSERT_EQ(names.size(), lora.parameters().size());
  {
    const torch::NoGradGuard no_grad;
    for (std::size_t i = 0; i < names.size(); ++i) {
      Tensor parameter = lora.parameters()[i];
      parameter.copy_(formula(names[i], parameter, i % 2 == 0 ? 8 : 16));
    }
  }
  const auto rows = golden["ids"].get<std::vector<std::vector<std::int64_t>>>();
  const auto learned = golden["learned"].get<std::vector<std::vector<int>>>();
  // Both rows packed into one sequence: PEFT saw them as two rows.
  std::vector<std::int64_t> ids, starts, targets;
  std::int64_t counted = 0;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const auto begin = static_cast<std::int64_t>(ids.size());
    for (std::size_t t = 0; t < rows[r].size(); ++t) {
      ids.push_back(rows[r][t]);
      starts.push_back(begin);
      const bool counts = t + 1 < rows[r].size() && learned[r][t + 1] != 0;
      targets.push_back(counts ? rows[r][t + 1] : -1);
      counted += counts;
    }
  }
  const auto loss = [&] {
    const Tensor hidden = decoder->hidden(torch::tensor(ids).unsqueeze(0), torch::tensor(starts).unsqueeze(0));
    return cross_entropy_loss(hidden.view({-1, hidden.size(-1)}), decoder->output_head(), torch::tensor(targets),
                              1.0 / static_cast<double>(counted), nullptr);
  };
  flat.clear_gradients();
  const Tensor value = loss();
  EXPECT_NEAR(value.item<double>(), golden["loss"].get<double>(), 2e-6 * golden["loss"].get<double>());
  value.backward();
  for (std::size_t i = 0; i < names.size(); ++i) {
    const Json& expected = golden["gradients"][names[i]];
    const Tensor gradient = lora.parameters()[i].grad().to(torch::kDouble);
    const double norm = std::sqrt(expected["squares"].get<double>());
    EXPECT_NEAR(gradient.norm().item<double>(), norm, 1e-5 * norm) << names[i];
    EXPECT_NEAR(gradient.sum().item<double>(), expected["sum"].get<double>(), 2e-5 * norm) << names[i];
    for (std::int64_t k = 0; k < 4; ++k)
      EXPECT_NEAR(gradient.flatten()[k].item<double>(), expected["first"][static_cast<std::size_t>(k)].get<double>(),
                  2e-5 * norm)
          << names[i] << " " << k;
  }
  for (Tensor& parameter : decoder->parameters()) EXPECT_FALSE(parameter.grad().defined());
  flat.step(golden["rate"], 0.9, 0.95, 0, 1, 1);
  const double after = golden["loss_after"];
  EXPECT_NEAR(loss().item<double>(), after, 1e-5 * after);
  lora.merge();
  EXPECT_NEAR(loss().item<double>(), after, 1e-5 * after);
  const torch::NoGradGuard no_grad;
  const Tensor logits = decoder->forward(torch::tensor(rows[0]).unsqueeze(0))[0][-1];
  for (std::int64_t v = 0; v < logits.numel(); ++v)
    EXPECT_NEAR(logits[v].item<double>(), golden["merged_logits"][static_cast<std::size_t>(v)].get<double>(), 2e-4)
        << v;
}

TEST(Lora, NothingChangesBeforeTheFirstStepAndMergingChangesNoLogits) {
  for (const char* family : {"llama_gqa", "phi3_window", "gpt2", "mixtral", "gemma2"}) {
    const Folder folder(std::string("lora-") + family);
    testing::make_family_folder(read_json(testing::golden_families() / (std::string(family) + ".json")).at("config"),
                                folder / "m");
    const torch::NoGradGuard no_grad;
    Decoder decoder = load_decoder(Checkpoint(folder / "m"), torch::kCPU);
    const Tensor ids = torch::arange(24).unsqueeze(0), before = decoder->forward(ids);
    Lora lora(decoder, {4, 8, {}}, 3, torch::kCPU);
    // Linears that share an input are one product without adapters: other sums, other last bits.
    EXPECT_LT((decoder->forward(ids) - before).abs().max().item<double>(), 1e-6) << family;
    for (std::size_t i = 1; i < lora.parameters().size(); i += 2) {
      Tensor b = lora.parameters()[i];
      b.copy_(torch::randn(b.sizes()) * 0.05);
    }
    const Tensor adapted = decoder->forward(ids);
    EXPECT_GT((adapted - before).abs().max().item<double>(), 1e-2) << family;
    lora.merge();
    EXPECT_LT((decoder->forward(ids) - adapted).abs().max().item<double>(), 2e-4) << family;
  }
}

TEST(Lora, TargetsByNameAndUnknownOnesRefused) {
  Decoder decoder = testing::small_decoder(1);
  const Lora two(decoder, {2, 4, {"q_proj", "mlp.down_proj"}}, 3, torch::kCPU);
  EXPECT_EQ(two.linears(), 6);
  EXPECT_EQ(two.parameter_count(), 3 * (2 * (32 + 40) + 2 * (48 + 32)));
  try {
    Lora(decoder, {2, 4, {"query"}}, 3, torch::kCPU);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    EXPECT_NE(error.expected().find("q_proj"), std::string::npos);
  }
}

TEST(Lora, AdaptersAreWrittenAsPeftNamesThem) {
  const Json golden = read_json(fs::path(PARE_SOURCE_DIR) / "tests/golden/lora.json");
  const Folder folder("lora-peft");
  testing::make_family_folder(read_json(testing::golden_families() / "llama_gqa.json").at("config"), folder / "m");
  Decoder decoder = load_decoder(Checkpoint(folder / "m"), torch::kCPU);
  const Lora lora(decoder, {3, 5, {}}, 1, torch::kCPU);
  fs::create_directories(folder / "adapter");
  write_peft_adapter(lora, folder / "adapter", "base");
  const SafetensorsFile file(folder / "adapter" / "adapter_model.safetensors");
  for (auto [name, gradient] : golden["gradients"].items()) {
    std::string stored = name;
    stored.erase(stored.find(".default"), 8);  // PEFT leaves the adapter's name out of the file
    const TensorView* view = file.find(stored);
    ASSERT_NE(view, nullptr) << stored;
  }
  const Json config = read_json(folder / "adapter" / "adapter_config.json");
  EXPECT_EQ(config["r"], 3);
  EXPECT_EQ(config["lora_alpha"], 5.0);
  EXPECT_EQ(config["target_modules"].size(), 7u);
  EXPECT_NO_THROW(check_peft_names(decoder->config()));
  for (const char* family : {"gpt2", "mixtral"})
    EXPECT_THROW(
        check_peft_names(parse_config(
            read_json(testing::golden_families() / (std::string(family) + ".json")).at("config"), nullptr, "c")),
        Error);
}

}  // namespace
}  // namespace pare
