#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <map>

#include "core/error.h"
#include "runtime/engine.h"
#include "runtime/forward.h"
#include "runtime/kernels.h"
#include "tests/runtime/tiny_model.h"

namespace pare {
namespace {

using namespace pare::testing;

struct Shape {
  const char* name;
  ModelConfig config;
};

std::vector<Shape> shapes() {
  std::vector<Shape> all;
  all.push_back({"gqa, tied, ragged widths", tiny_config("llama", 60, 172, 10, 5, 6, 61, true)});
  {
    ModelConfig c = tiny_config("llama", 64, 96, 4, 2, 24, 83, false);
    c.qkv_bias = c.o_bias = c.mlp_bias = true;
    c.rope_llama3 = Llama3Rope{8, 1, 4, 64};
    c.max_position_embeddings = 512;
    all.push_back({"head_dim of its own, all biases, llama3 rope, untied", c});
  }
  {
    ModelConfig c = tiny_config("qwen2", 96, 160, 6, 2, 16, 70, true);
    c.rope_linear_factor = 2.5;
    all.push_back({"qkv bias, linear rope, tied", c});
  }
  all.push_back({"one head for each key head", tiny_config("mistral", 128, 256, 4, 4, 32, 64, false)});
  return all;
}

std::vector<Codec> codecs() {
  const auto q4 = CodecKind::kQ4, q4a = CodecKind::kQ4a;
  return {{CodecKind::kF32, 0},
          {CodecKind::kF16, 0},
          {CodecKind::kBf16, 0},
          {CodecKind::kQ8, 32},
          {CodecKind::kQ8, Codec::kPerRow},
          {q4, 32},
          {q4, 64},
          {q4, 128},
          {q4a, 32},
          {q4a, 64},
          {q4a, 128},
          {CodecKind::kQ4m, 32},
          {CodecKind::kQ4m, 64},
          {CodecKind::kQ4m, 128},
          {CodecKind::kQ3, 32},
          {CodecKind::kQ3, 64},
          {CodecKind::kQ3, 128},
          {CodecKind::kQ2, 32},
          {CodecKind::kQ2, 64},
          {CodecKind::kQ2, 128},
          {CodecKind::kQ8, Codec::kPerRow, true}};
}

bool fits(const ModelConfig& c, const Codec& codec) {
  return codec.fits(c.hidden_size) && codec.fits(c.intermediate_size) && codec.fits(c.num_heads * c.head_dim);
}

std::vector<float> all_logits(Session& session, std::int64_t rows, std::int64_t vocab) {
  std::vector<float> out(static_cast<std::size_t>(rows * vocab));
  session.logits(0, rows, out.data());
  return out;
}

EngineOptions engine_options(const std::string& kernels, bool int8, int threads) {
  EngineOptions options;
  options.kernels = kernels;
  options.int8_activations = int8;
  options.threads = threads;
  return options;
}

// Root mean square of the difference over that of the wanted logits.
double relative_error(const std::vector<float>& got, const std::vector<std::vector<double>>& want) {
  double difference = 0, power = 0;
  std::size_t i = 0;
  for (const auto& row : want) {
    for (const double v : row) {
      difference += (got[i] - v) * (got[i] - v);
      power += v * v;
      ++i;
    }
  }
  return std::sqrt(difference / power);
}

TEST(ForwardTest, EveryIngredientCodecAndInstructionSetMatchesDoubles) {
  const ScratchFolder scratch;
  int checked = 0;
  for (const Shape& shape : shapes()) {
    for (const Codec& codec : codecs()) {
      if (!fits(shape.config, codec)) continue;
      const fs::path path = scratch.path / ("m" + std::to_string(checked) + ".pare");
      const TinyModel model = write_tiny_model(path, shape.config, codec, static_cast<std::uint32_t>(++checked));
      const auto ids = random_ids(20, shape.config.vocab_size, 7);
      const auto exact = BruteForce(model, false, false).logits(ids);
      const auto with_int8 = codec.is_float() ? exact : BruteForce(model, true).logits(ids);
      const auto tokens_rounded = codec.int8_inputs ? BruteForce(model, false).logits(ids) : exact;
      for (const std::string& kernels : available_kernels()) {
        for (const bool int8 : {false, true}) {
          if (int8 && codec.is_float()) continue;
          EngineOptions options = engine_options(kernels, int8, 1);
          options.kv = "f32";  // the roundings of linears' inputs alone
          Session session(Engine::open(path, options));
          session.feed(ids);
          const auto got = all_logits(session, 20, shape.config.vocab_size);
          const std::string what =
              std::string(shape.name) + ", " + codec.name() + ", " + kernels + (int8 ? ", int8" : ", float");
          if (int8 || codec.int8_inputs) {
            const auto& rounded = int8 ? with_int8 : tokens_rounded;
            // A value next to a rounding boundary may fall to the other side and shift what follows a little, but far
            // less than int8 activations differ from float ones.
            EXPECT_LT(relative_error(got, rounded), 1e-2) << what;
            EXPECT_LT(relative_error(got, rounded), 0.6 * relative_error(got, exact)) << what;
          } else {
            EXPECT_LT(relative_error(got, exact), 3e-6) << what;
          }
        }
      }
    }
  }
  EXPECT_GT(checked, 20);
}

TEST(ForwardTest, LongSequencesCrossPagesAndBatches) {
  const ScratchFolder scratch;
  const fs::path path = scratch.path / "m.pare";
  ModelConfig config = tiny_config("llama", 32, 64, 4, 2, 8, 40, true);
  const TinyModel model = write_tiny_model(path, config, {CodecKind::kF32, 0}, 5);
  const auto ids = random_ids(290, 40, 3);
  const auto want = BruteForce(model, false).logits(ids);
  for (const std::string& kernels : available_kernels()) {
    Session session(Engine::open(path, engine_options(kernels, false, 2)));
    session.feed(ids);
    EXPECT_LT(relative_error(all_logits(session, 290, 40), want), 3e-6) << kernels;
  }
}

TEST(ForwardTest, CallsForOneTextHaveAboutAsManyTokens) {
  for (std::int64_t count = 1; count < 5 * Forward::kBatch; ++count) {
    const std::int64_t size = Forward::call_size(count), calls = (count + size - 1) / size;
    ASSERT_LE(size, Forward::kBatch) << count;
    ASSERT_EQ(calls, (count + Forward::kBatch - 1) / Forward::kBatch) << count;
    ASSERT_TRUE(calls == 1 || size % Forward::kTiles == 0) << count;
    ASSERT_LT(size, (count + calls - 1) / calls + Forward::kTiles) << count;
  }
  EXPECT_EQ(Forward::call_size(512), 288);
  EXPECT_EQ(Forward::call_size(600), 240);
}

TEST(ForwardTest, IncrementalDecodingAndAnyThreadCountGiveTheBitsOfOnePrefill) {
  const ScratchFolder scratch;
  int file = 0;
  std::vector<Shape> some = shapes();
  some.resize(2);
  for (const Shape& shape : some) {
    for (const Codec& codec : {Codec{CodecKind::kF32, 0}, Codec{CodecKind::kQ8, 32}, Codec{CodecKind::kQ4, 32},
                               Codec{CodecKind::kQ4a, 32}, Codec{CodecKind::kQ4m, 32}, Codec{CodecKind::kQ3, 32},
                               Codec{CodecKind::kQ8, Codec::kPerRow, true}}) {
      if (!fits(shape.config, codec)) continue;
      const fs::path path = scratch.path / (std::to_string(file++) + ".pare");
      write_tiny_model(path, shape.config, codec, 11);
      const std::int64_t vocab = shape.config.vocab_size, count = 133;
      const auto ids = random_ids(count, vocab, 4);
      for (const std::string& kernels : available_kernels()) {
        for (const bool int8 : {false, true}) {
          const auto engine = Engine::open(path, engine_options(kernels, int8, 1));
          Session whole(engine);
          whole.feed(ids);
          const auto want = all_logits(whole, count, vocab);

          Session threads(Engine::open(path, engine_options(kernels, int8, 2)));
          threads.feed(ids);
          EXPECT_EQ(want, all_logits(threads, count, vocab))
              << shape.name << ", " << codec.name() << ", " << kernels << ", 2 threads";

          // Pieces of 1, 2, 3, ... tokens, after a reset that must leave nothing behind.
          Session pieces(engine);
          pieces.feed(random_ids(50, vocab, 99));
          pieces.reset();
          std::vector<float> got;
          std::int64_t at = 0;
          for (std::int64_t step = 1; at < count; ++step) {
            const std::int64_t n = std::min(step, count - at);
            pieces.feed({ids.data() + at, static_cast<std::size_t>(n)});
            const auto part = all_logits(pieces, n, vocab);
            got.insert(got.end(), part.begin(), part.end());
            at += n;
          }
          EXPECT_EQ(want, got) << shape.name << ", " << codec.name() << ", " << kernels << ", pieces";
        }
      }
    }
  }
}

// Tokens are parted where threads have 96 each: two with a rest, and two or three evenly.
TEST(ForwardTest, CallsPartedAmongThreadsGiveTheBitsOfOne) {
  const ScratchFolder scratch;
  const ModelConfig config = tiny_config("llama", 64, 96, 4, 2, 16, 40, true);
  const std::int64_t vocab = config.vocab_size, rest = 205;
  const auto ids = random_ids(Forward::kBatch, vocab, 4);
  int file = 0;
  for (const Codec& codec : {Codec{CodecKind::kF32, 0}, Codec{CodecKind::kQ4, 32}, Codec{CodecKind::kQ4m, 32},
                             Codec{CodecKind::kQ8, Codec::kPerRow, true}}) {
    const fs::path path = scratch.path / (std::to_string(file++) + ".pare");
    write_tiny_model(path, config, codec, 11);
    for (const std::string& kernels : available_kernels()) {
      Session alone(Engine::open(path, engine_options(kernels, true, 1)));
      alone.feed(ids);
      const auto want = all_logits(alone, Forward::kBatch, vocab);
      const std::vector<float> first(want.begin(), want.begin() + rest * vocab);
      for (const int threads : {2, 3}) {
        Session team(Engine::open(path, engine_options(kernels, true, threads)));
        team.feed(ids);
        EXPECT_EQ(want, all_logits(team, Forward::kBatch, vocab)) << codec.name() << ", " << kernels << ", " << threads;
        team.reset();
        team.feed(std::span(ids).first(static_cast<std::size_t>(rest)));
        EXPECT_EQ(first, all_logits(team, rest, vocab)) << codec.name() << ", " << kernels << ", " << threads;
      }
    }
  }
}

// More heads than are multiplied together, down to the last one alone, and more than one call of the kernels takes.
TEST(ForwardTest, ManyHeadsMayReadOneKeyHead) {
  const ScratchFolder scratch;
  constexpr std::int64_t kVocab = 40, kCount = 90;
  const auto ids = random_ids(kCount, kVocab, 4);
  for (const auto& [heads, kv_heads] : std::vector<std::pair<std::int64_t, std::int64_t>>{{14, 2}, {7, 1}, {20, 1}, {70, 1}}) {
    const ModelConfig config = tiny_config("llama", 32, 32, heads, kv_heads, 8, kVocab, true);
    const fs::path path = scratch.path / (std::to_string(heads) + ".pare");
    const TinyModel model = write_tiny_model(path, config, {CodecKind::kF32, 0}, 5);
    const auto want = BruteForce(model, false).logits(ids);
    for (const std::string& kernels : available_kernels()) {
      for (const char* kv : {"f32", "mixed"}) {
        EngineOptions options = engine_options(kernels, false, 2);
        options.kv = kv;
        Session whole(Engine::open(path, options));
        whole.feed(ids);
        const auto got = all_logits(whole, kCount, kVocab);
        EXPECT_LT(relative_error(got, want), kv == std::string("f32") ? 3e-6 : 4e-3) << heads << ", " << kernels;
        for (const int threads : {1, 9}) {
          options.threads = threads;
          Session pieces(Engine::open(path, options));
          std::vector<float> rows;
          for (std::int64_t at = 0, n = 1; at < kCount; at += n, n = std::min<std::int64_t>(n + 3, kCount - at)) {
            pieces.feed({ids.data() + at, static_cast<std::size_t>(n)});
            const auto part = all_logits(pieces, n, kVocab);
            rows.insert(rows.end(), part.begin(), part.end());
          }
          EXPECT_EQ(got, rows) << heads << ", " << kernels << ", " << kv << ", " << threads;
        }
      }
    }
  }
}

TEST(ForwardTest, EveryKeyValueCacheGivesTheBitsOfOnePrefill) {
  const ScratchFolder scratch;
  ModelConfig config = shapes()[1].config;
  const std::int64_t vocab = config.vocab_size, count = 300;
  const TinyModel model = write_tiny_model(scratch.path / "m.pare", config, {CodecKind::kQ4, 32}, 3);
  const auto ids = random_ids(count, vocab, 4);
  const auto exact = BruteForce(model, false).logits(ids);
  for (const std::string& kernels : available_kernels()) {
    for (const char* kv : {"f32", "f16", "q8", "mixed"}) {
      EngineOptions options = engine_options(kernels, false, 2);
      options.kv = kv;
      Session whole(Engine::open(scratch.path / "m.pare", options));
      whole.feed(ids);
      const auto want = all_logits(whole, count, vocab);
      const std::map<std::string, double> bounds = {{"f32", 3e-6}, {"f16", 1e-3}, {"mixed", 4e-3}, {"q8", 2e-2}};
      EXPECT_LT(relative_error(want, exact), bounds.at(kv)) << kernels << ", " << kv;
      options.threads = 1;
      Session pieces(Engine::open(scratch.path / "m.pare", options));
      std::vector<float> got;
      for (std::int64_t at = 0, n = 1; at < count; at += n, n = std::min<std::int64_t>(n + 5, count - at)) {
        pieces.feed({ids.data() + at, static_cast<std::size_t>(n)});
        const auto part = all_logits(pieces, n, vocab);
        got.insert(got.end(), part.begin(), part.end());
      }
      EXPECT_EQ(want, got) << kernels << ", " << kv;
    }
  }
  EngineOptions options = engine_options("", true, 1);
  EXPECT_EQ(Engine::open(scratch.path / "m.pare", options)->options().kv, "mixed");
  options.int8_activations = false;
  EXPECT_EQ(Engine::open(scratch.path / "m.pare", options)->options().kv, "f32");
  write_tiny_model(scratch.path / "floats.pare", config, {CodecKind::kF16, 0}, 3);
  EXPECT_EQ(Engine::open(scratch.path / "floats.pare", engine_options("", true, 1))->options().kv, "f32");
  options.kv = "f8";
  EXPECT_THROW(Engine::open(scratch.path / "m.pare", options), Error);
}

TEST(ForwardTest, SessionsFedTogetherHaveTheBitsOfEachAlone) {
  const ScratchFolder scratch;
  const ModelConfig config = shapes()[1].config;
  const std::int64_t vocab = config.vocab_size;
  write_tiny_model(scratch.path / "m.pare", config, {CodecKind::kQ8, 32}, 9);
  for (const std::string& kernels : available_kernels()) {
    for (const int threads : {1, 2}) {
      const auto engine = Engine::open(scratch.path / "m.pare", engine_options(kernels, true, threads));
      constexpr std::size_t kSessions = 14;  // more than one tile of tokens
      std::vector<Session> together, alone;
      std::vector<Session*> all;
      for (std::size_t i = 0; i < kSessions; ++i) {
        together.emplace_back(engine);
        alone.emplace_back(engine);
        const auto prompt = random_ids(static_cast<std::int64_t>(1 + 11 * i), vocab, static_cast<std::uint32_t>(i));
        together[i].feed(prompt);
        alone[i].feed(prompt);
      }
      for (Session& session : together) all.push_back(&session);
      for (std::uint32_t step = 0; step < 3; ++step) {
        const auto ids = random_ids(kSessions, vocab, 70 + step);
        Session::feed_each(all, ids);
        std::vector<float> got(kSessions * static_cast<std::size_t>(vocab)), want;
        Session::logits_each(all, got.data());
        for (std::size_t i = 0; i < kSessions; ++i) {
          alone[i].feed({&ids[i], 1});
          const auto row = all_logits(alone[i], 1, vocab);
          want.insert(want.end(), row.begin(), row.end());
          EXPECT_EQ(together[i].position(), alone[i].position());
        }
        EXPECT_EQ(got, want) << kernels << ", step " << step;
      }
      // Texts of several lengths, one token among them.
      std::vector<std::vector<std::int32_t>> texts;
      for (std::size_t i = 0; i < kSessions; ++i)
        texts.push_back(
            random_ids(static_cast<std::int64_t>(1 + 5 * i % 31), vocab, static_cast<std::uint32_t>(90 + i)));
      Session::feed_each(all, std::vector<std::span<const std::int32_t>>(texts.begin(), texts.end()));
      for (std::size_t i = 0; i < kSessions; ++i) {
        alone[i].feed(texts[i]);
        const auto rows = std::ssize(texts[i]);
        EXPECT_EQ(together[i].rows(), rows);
        EXPECT_EQ(all_logits(together[i], rows, vocab), all_logits(alone[i], rows, vocab)) << kernels << ", text " << i;
        EXPECT_EQ(std::vector(together[i].ids().begin(), together[i].ids().end()),
                  std::vector(alone[i].ids().begin(), alone[i].ids().end()));
      }
    }
  }
  const auto engine = Engine::open(scratch.path / "m.pare"), other = Engine::open(scratch.path / "m.pare");
  Session a(engine, 2), b(engine), c(other);
  const std::int32_t ids[] = {1, 2};
  std::vector<float> out(static_cast<std::size_t>(2 * vocab));
  const auto refuse = [&](std::vector<Session*> sessions, std::span<const std::int32_t> given) {
    EXPECT_THROW(Session::feed_each(sessions, given), Error);
  };
  refuse({&a, &a}, ids);
  refuse({&a, &c}, ids);
  refuse({&a}, ids);
  refuse({&b, &a}, std::vector<std::int32_t>{1, static_cast<std::int32_t>(vocab)});
  a.feed(ids);
  const std::vector<std::int32_t> many(static_cast<std::size_t>(Session::kMostFedTogether), 1);
  Session* const pair[] = {&b, &a};
  const std::vector<std::span<const std::int32_t>> too_many = {many, {many.data(), 1}}, none = {{many.data(), 1}, {}};
  EXPECT_THROW(Session::feed_each(pair, too_many), Error);
  EXPECT_THROW(Session::feed_each(pair, none), Error);
  refuse({&b, &a}, ids);  // the context of one is full: nothing is appended to the other
  EXPECT_EQ(b.position(), 0);
  std::vector<Session*> unfed{&b};
  EXPECT_THROW(Session::logits_each(unfed, out.data()), Error);
}

TEST(ForwardTest, LogitsOfAnyRowsAndRefusals) {
  const ScratchFolder scratch;
  const fs::path path = scratch.path / "m.pare";
  const ModelConfig config = tiny_config("llama", 32, 64, 4, 2, 8, 40, true);
  write_tiny_model(path, config, {CodecKind::kQ4, 32}, 5);
  const auto engine = Engine::open(path);
  Session session(engine, 30);
  const auto ids = random_ids(25, 40, 1);
  session.feed(ids);
  const auto all = all_logits(session, 25, 40);
  for (const auto& [first, count] : {std::pair{0, 1}, {24, 1}, {7, 13}, {3, 0}}) {
    std::vector<float> some(static_cast<std::size_t>(count * 40));
    session.logits(first, count, some.data());
    EXPECT_TRUE(std::equal(some.begin(), some.end(), all.begin() + first * 40));
  }
  std::vector<float> out(80);
  EXPECT_THROW(session.logits(24, 2, out.data()), Error);
  EXPECT_THROW(session.logits(-1, 1, out.data()), Error);

  // A refused call changes nothing.
  const auto refused = [&](const std::vector<std::int32_t>& bad) {
    try {
      session.feed(bad);
      ADD_FAILURE() << "accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kInput);
    }
    EXPECT_EQ(session.position(), 25);
    EXPECT_EQ(all_logits(session, 25, 40), all);
  };
  refused(random_ids(6, 40, 2));
  refused({1, 40});
  refused({-1});
  session.feed(random_ids(5, 40, 2));
  EXPECT_EQ(session.position(), 30);
  EXPECT_THROW(session.feed(std::vector<std::int32_t>{1}), Error);
  session.reset();
  session.feed(ids);
  EXPECT_EQ(all_logits(session, 25, 40), all);
}

TEST(ForwardTest, LogitsSourceRestartsAtEachWindow) {
  const ScratchFolder scratch;
  const fs::path path = scratch.path / "m.pare";
  write_tiny_model(path, tiny_config("llama", 32, 64, 4, 2, 8, 40, true), {CodecKind::kQ8, 32}, 5);
  const auto engine = Engine::open(path);
  const auto source = runtime_logits(engine);
  EXPECT_EQ(source->vocab_size(), 40);
  const auto ids = random_ids(20, 40, 1);
  Session session(engine);
  session.feed(ids);
  const auto want = all_logits(session, 20, 40);
  std::vector<float> got(want.size());
  for (int round = 0; round < 2; ++round) {
    source->begin(random_ids(9, 40, 8));
    source->begin(ids);
    source->logits(0, 20, got.data());
    EXPECT_EQ(got, want);
  }
}

// Damaged files: an error or a working model, never a crash, and the same for every length of a cut file.
class DamagedFiles : public ::testing::TestWithParam<const char*> {};

TEST_P(DamagedFiles, NeverCrash) {
  const ScratchFolder scratch;
  const fs::path path = scratch.path / "m.pare", bad = scratch.path / "bad.pare";
  write_tiny_model(path, tiny_config("llama", 32, 64, 4, 2, 8, 40, true), Codec::parse(GetParam(), ""), 5);
  const std::string good = read_text(path);
  const auto try_file = [&](const std::string& bytes) {
    {
      std::ofstream out(bad, std::ios::binary | std::ios::trunc);
      out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    }
    try {
      Session session(Engine::open(bad, engine_options("", true, 1)));
      session.feed(std::vector<std::int32_t>{1, 2, 3});
      std::vector<float> out(static_cast<std::size_t>(3 * 40));
      session.logits(0, 3, out.data());
      return true;
    } catch (const Error& e) {
      EXPECT_STRNE(e.what(), "");
      return false;
    }
  };
  ASSERT_TRUE(try_file(good));
  for (std::size_t length = 0; length < good.size(); length += length < 64 ? 1 : 97) {
    EXPECT_FALSE(try_file(good.substr(0, length))) << length;
  }
  std::uint64_t header = 0;
  std::memcpy(&header, good.data(), 8);
  ASSERT_LT(header, good.size());
  std::mt19937 rng(1);
  int refused = 0;
  for (int round = 0; round < 250; ++round) {
    std::string bytes = good;
    for (std::uint32_t flips = 1 + rng() % 3; flips > 0; --flips) {
      const std::size_t at = rng() % (8 + header);
      bytes[at] = static_cast<char>(bytes[at] ^ (1 << rng() % 8));
    }
    refused += !try_file(bytes);
  }
  EXPECT_GT(refused, 60);
  for (int round = 0; round < 100; ++round) {  // damaged weights: numbers change, nothing else may
    std::string bytes = good;
    bytes[8 + header + rng() % (good.size() - 8 - header)] ^= static_cast<char>(1 << rng() % 8);
    try_file(bytes);
  }
}

INSTANTIATE_TEST_SUITE_P(Codecs, DamagedFiles, ::testing::Values("q4ag32", "q4mg32", "q3g32", "q2g32", "w8a8"),
                         [](const auto& given) { return std::string(given.param); });

// Rows that are looked up have no inputs to round; a file that says otherwise is refused.
TEST(EngineTest, TablesCannotRoundInputs) {
  const ScratchFolder scratch;
  const ModelConfig config = tiny_config("llama", 32, 64, 4, 2, 8, 40, false);
  const Codec rounded = Codec::parse("w8a8", "");
  for (const bool embedding : {true, false}) {
    std::vector<CompactWriter::Plan> plan;
    for (const TensorSpec& spec : expected_tensors(config)) {
      const TensorRole wanted = embedding ? TensorRole::kEmbedding : TensorRole::kHead;
      plan.push_back({spec.name, spec.role == wanted ? rounded : Codec{}, spec.shape});
    }
    const fs::path path = scratch.path / (embedding ? "embedding.pare" : "head.pare");
    CompactWriter writer(path, plan, {{"config.json", write_config(config, "float32").dump()}});
    for (const CompactWriter::Plan& tensor : plan) {
      const std::int64_t rows = tensor.shape[0], cols = tensor.shape.size() == 2 ? tensor.shape[1] : 1;
      const std::vector<float> values(static_cast<std::size_t>(rows * cols), 0.5f);
      if (tensor.codec.is_float()) writer.add(values.data());
      else writer.add(testing::round_to_nearest(tensor.codec, rows, cols, values.data()));
    }
    writer.seal("[]");
    if (!embedding) {
      EXPECT_NO_THROW(Engine::open(path));
      continue;
    }
    try {
      Engine::open(path);
      FAIL() << "accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kInput);
      EXPECT_NE(std::string(error.what()).find("embed_tokens"), std::string::npos) << error.what();
    }
  }
}

TEST(EngineTest, OptionsAreResolvedAndChecked) {
  const ScratchFolder scratch;
  const fs::path path = scratch.path / "m.pare";
  write_tiny_model(path, tiny_config("llama", 32, 64, 4, 2, 8, 40, true), {CodecKind::kQ4, 32}, 5);
  EXPECT_GT(Engine::open(path)->options().threads, 0);
  EXPECT_EQ(Engine::open(path, engine_options("plain", true, 3))->options().kernels, "plain");
  EXPECT_EQ(Engine::open(path, engine_options("plain", true, 3))->options().threads, 3);
  EXPECT_THROW(Engine::open(path, engine_options("mmx", true, 1)), Error);
  EXPECT_THROW(Engine::open(path, engine_options("", true, -1)), Error);
  EXPECT_THROW(Engine::open(scratch.path / "absent.pare"), Error);
  EXPECT_THROW(Engine::open(path)->tokenizer(), Error);  // none inside
}

}  // namespace
}  // namespace pare
