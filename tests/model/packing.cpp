// Documents packed into one sequence are as if each were alone: logits, losses and gradients, in every family.
#include "model/data.h"

#include "core/uniform.h"
#include "tests/families.h"
#include "tests/model/models.h"

namespace pare {
namespace {

using testing::Folder;
using torch::Tensor;

Tensor random_ids(std::int64_t count, std::int64_t vocab, std::uint64_t seed) {
  std::vector<std::int64_t> ids;
  for (std::int64_t i = 0; i < count; ++i)
    ids.push_back(
        static_cast<std::int64_t>(uniform_at(seed, static_cast<std::uint64_t>(i)) * static_cast<double>(vocab)));
  return torch::tensor(ids, torch::kLong);
}

struct Packed {
  Tensor ids, starts;  // [2, n]
  std::vector<std::vector<Tensor>> documents;
};

// Two sequences of unequal documents, some shorter and some longer than a tile of the kernels; the rest is padding.
Packed packed(std::int64_t vocab, std::int64_t n) {
  Packed out{torch::zeros({2, n}, torch::kLong), torch::zeros({2, n}, torch::kLong), {{}, {}}};
  const std::vector<std::vector<std::int64_t>> sizes = {{3, n / 2, 1, n / 2 - 8}, {n - 6, 6}};
  std::uint64_t seed = 5;
  for (std::int64_t s = 0; s < 2; ++s) {
    std::int64_t at = 0;
    for (const std::int64_t size : sizes[static_cast<std::size_t>(s)]) {
      out.documents[static_cast<std::size_t>(s)].push_back(random_ids(size, vocab, ++seed));
      out.ids[s].narrow(0, at, size).copy_(out.documents[static_cast<std::size_t>(s)].back());
      out.starts[s].narrow(0, at, n - at).fill_(at);
      at += size;
    }
    if (at < n) out.starts[s].narrow(0, at, n - at).fill_(at);
  }
  return out;
}

class PackedFamily : public ::testing::TestWithParam<std::string> {};

TEST_P(PackedFamily, DocumentsHaveTheLogitsTheyHaveAlone) {
  const torch::NoGradGuard no_grad;
  const Folder folder("packed-" + GetParam());
  testing::make_family_folder(read_json(testing::golden_families() / (GetParam() + ".json")).at("config"),
                              folder / "m");
  const Checkpoint checkpoint(folder / "m");
  const ModelConfig& config = checkpoint.config();
  std::int64_t n = 56;
  if (config.rope_long) n = std::min(n, config.rope_long->original_max_position);
  const Packed p = packed(config.vocab_size, n);
  for (const bool exact : {true, false}) {
    Decoder decoder = load_decoder(checkpoint, torch::kCPU);
    if (exact) decoder->to(torch::kDouble);
    const double tolerance = exact ? 1e-10 : 2e-5;
    const Tensor together = decoder->head_logits(decoder->hidden(p.ids, p.starts));
    for (std::int64_t s = 0; s < 2; ++s) {
      std::int64_t at = 0;
      for (const Tensor& document : p.documents[static_cast<std::size_t>(s)]) {
        const Tensor alone = decoder->forward(document.unsqueeze(0))[0];
        const double difference = (together[s].narrow(0, at, document.numel()) - alone).abs().max().item<double>();
        EXPECT_LT(difference, tolerance) << "exact " << exact << ", sequence " << s << ", document at " << at;
        at += document.numel();
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Goldens, PackedFamily, ::testing::ValuesIn(testing::family_names()),
                         [](const auto& info) { return info.param; });

// Whatever the other documents of a sequence say, this one's hidden states keep their bits: nothing leaks at all.
TEST(Packing, OtherDocumentsChangeNoBit) {
  const torch::NoGradGuard no_grad;
  for (const auto dtype : {torch::kFloat, torch::kBFloat16}) {
    Decoder decoder = testing::small_decoder(3);
    decoder->set_matmul_dtype(dtype);
    const Packed p = packed(300, 64);
    const Tensor before = decoder->hidden(p.ids, p.starts);
    for (std::int64_t first = 0; first < 64; ++first) {
      if (p.starts[0][first].item<std::int64_t>() != first) continue;  // a document begins here
      Tensor ids = p.ids.clone();
      std::int64_t last = first;
      while (last < 64 && p.starts[0][last].item<std::int64_t>() == first) ++last;
      ids[0].narrow(0, first, last - first).add_(17).remainder_(300);
      const Tensor after = decoder->hidden(ids, p.starts);
      EXPECT_TRUE(torch::equal(before[1], after[1]));
      EXPECT_TRUE(torch::equal(before[0].narrow(0, 0, first), after[0].narrow(0, 0, first))) << first;
      EXPECT_TRUE(torch::equal(before[0].narrow(0, last, 64 - last), after[0].narrow(0, last, 64 - last))) << first;
      EXPECT_FALSE(torch::equal(before[0].narrow(0, first, last - first), after[0].narrow(0, first, last - first)));
      // Without the marks the later documents see the change: the test could fail.
      if (first == 3) {
        EXPECT_FALSE(
            torch::equal(decoder->hidden(p.ids)[0].narrow(0, last, 4), decoder->hidden(ids)[0].narrow(0, last, 4)));
      }
    }
  }
}

// Gradients of one packed batch are the sum of those of its documents, windows of attention included.
TEST(Packing, GradientsAreTheSumOverDocuments) {
  ModelConfig config = testing::small_config();
  config.sliding_window = 11;
  config.layer_slides = {1, 0, 1};
  const Packed p = packed(300, 64);
  Decoder together = testing::small_decoder(4, config), apart = testing::small_decoder(4, config);
  const auto loss = [](Decoder& decoder, const Tensor& ids, const Tensor& starts, const Tensor& targets) {
    const Tensor hidden = decoder->hidden(ids, starts);
    return cross_entropy_loss(hidden.view({-1, hidden.size(-1)}), decoder->output_head(), targets.view(-1), 0.01,
                              nullptr);
  };
  Tensor targets = torch::full({2, 64}, -1, torch::kLong);
  for (std::int64_t s = 0; s < 2; ++s) {
    std::int64_t at = 0;
    for (const Tensor& document : p.documents[static_cast<std::size_t>(s)]) {
      const std::int64_t size = document.numel();
      if (size > 1) {
        targets[s].narrow(0, at, size - 1).copy_(document.narrow(0, 1, size - 1));
        Tensor own = torch::full({1, size}, -1, torch::kLong);
        own[0].narrow(0, 0, size - 1).copy_(document.narrow(0, 1, size - 1));
        loss(apart, document.unsqueeze(0), Tensor(), own).backward();
      }
      at += size;
    }
  }
  loss(together, p.ids, p.starts, targets).backward();
  for (const auto& item : together->named_parameters()) {
    const Tensor a = item.value().grad(), b = apart->named_parameters()[item.key()].grad();
    EXPECT_LT((a - b).norm().item<double>(), 2e-4 * b.norm().item<double>() + 1e-6) << item.key();
  }
}

TEST(Packing, DocumentsOnBothSidesOfLongRopesSwitchAreRefused) {
  const Folder folder("packed-long");
  testing::make_family_folder(read_json(testing::golden_families() / "phi3_long.json").at("config"), folder / "m");
  Decoder decoder = load_decoder(Checkpoint(folder / "m"), torch::kCPU);
  const Packed p = packed(64, 40);
  try {
    decoder->hidden(p.ids, p.starts);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::kInput);
    EXPECT_NE(error.hint().find("--context"), std::string::npos);
  }
}

}  // namespace
}  // namespace pare
