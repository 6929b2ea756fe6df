#include "prune/speed.h"

#include <Eigen/Core>
#include <Eigen/QR>
#include <algorithm>
#include <array>
#include <chrono>
#include <limits>
#include <thread>

#include "core/arch/arch.h"
#include "core/compact.h"
#include "core/error.h"
#include "core/processor.h"
#include "core/random_weights.h"
#include "runtime/engine.h"
#include "runtime/kernels.h"
#include "runtime/round_to_nearest.h"

namespace pare {
namespace {

constexpr int kDecoded = 32, kRounds = 5;  // tokens of a round; the first round warms up
constexpr int kTerms = 5;                  // of DecodeTimes

// Speed depends on the layout, not on the values: rows of one block of random numbers, over and over.
void write_random_file(const ModelConfig& config, const StoredAs& stored, const fs::path& out) {
  std::vector<CompactWriter::Plan> plan;
  std::uint64_t bytes = 0;
  for (const TensorSpec& spec : expected_tensors(config)) {
    const Codec codec = spec.shape.size() == 2 ? stored.of(spec) : Codec{CodecKind::kF32, 0};
    bytes += codec.payload_bytes(spec.shape.size() == 2 ? spec.shape[0] : 1, spec.shape.back());
    plan.push_back({spec.name, codec, spec.shape});
  }
  const std::uint64_t room = fs::space(out.parent_path()).available;
  if (bytes > room)
    throw Error(ExitCode::kResources, out.string(), "room for " + std::to_string(bytes) + " bytes to measure speed with",
                std::to_string(room), "free some, or ask for --max-bytes");
  CompactWriter writer(out, plan, {{"config.json", write_config(config, "float32").dump() + "\n"}});
  std::vector<float> values, some(4096);
  random_normals(1, "speed", 0, static_cast<std::int64_t>(some.size()), some.data());
  for (const CompactWriter::Plan& tensor : plan) {
    throw_if_interrupted("prune", "run the same command again");
    std::size_t count = 1;
    for (const std::int64_t size : tensor.shape) count *= static_cast<std::size_t>(size);
    values.resize(count);
    for (std::size_t i = 0; i < count; ++i) values[i] = 0.02f * some[i % some.size()];
    if (tensor.codec.is_float()) writer.add(values.data());
    else writer.add(round_to_nearest(tensor.codec, tensor.shape[0], tensor.shape[1], values.data(), tensor.name));
  }
  writer.finish_payload();
  writer.seal("[]\n");
}

std::vector<double> terms(const ModelConfig& config, const StoredAs& stored, const Shape& shape) {
  const PartSizes outer = outer_sizes(config, shape.hidden, &stored);
  const PartSizes block =
      block_sizes(config, shape.hidden, {shape.heads, shape.kv_heads, shape.ffn}, shape.experts, &stored);
  const auto layers = static_cast<double>(shape.layers);
  return {1, outer.head, layers, layers * block.attention, layers * block.mlp_read};
}

}  // namespace

double seconds_per_token(const ModelConfig& config, const StoredAs& stored, int threads, const fs::path& scratch) {
  fs::remove(scratch);
  write_random_file(config, stored, scratch);
  EngineOptions options;
  options.threads = threads;
  std::vector<double> seconds;
  {
    Session session(Engine::open_compact(scratch, options));
    std::vector<float> logits(static_cast<std::size_t>(config.vocab_size));
    const std::int64_t tokens = std::min<std::int64_t>(kDecoded, config.max_position_embeddings);
    for (int round = 0; round < kRounds; ++round) {
      throw_if_interrupted("prune", "run the same command again");
      session.reset();
      for (std::int64_t i = 0; i < tokens; ++i) {
        const auto id = static_cast<std::int32_t>(i * 31 % config.vocab_size);
        const auto begun = std::chrono::steady_clock::now();
        session.feed({&id, 1});
        session.logits(0, 1, logits.data());
        if (round > 0)
          seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count());
      }
    }
  }
  fs::remove(scratch);
  std::nth_element(seconds.begin(), seconds.begin() + static_cast<std::ptrdiff_t>(seconds.size() / 2), seconds.end());
  return seconds[seconds.size() / 2];
}

std::string timed_on(int threads) {
  const unsigned all = std::thread::hardware_concurrency();
  return processor_name() + ", " + choose_kernels("").name + ", " +
         std::to_string(threads > 0 ? static_cast<unsigned>(threads) : all) + " threads";
}

std::vector<Timing> measure_shapes(const ModelConfig& config, const TokenTimer& timer, Context& context) {
  const Shape own = shape_of(config);
  const bool tied = find_family(config.family)->heads_share_width;
  std::vector<Shape> shapes = {own};
  const auto add = [&](auto change) {
    Shape shape = own;
    change(shape);
    if (shape == own) return;
    shapes.push_back(shape);
  };
  const auto half = [](std::int64_t value, std::int64_t step) {
    return std::max<std::int64_t>(step, value / 2 / step * step);
  };
  add([&](Shape& s) { s.layers = half(own.layers, 1); });
  add([&](Shape& s) { s.ffn = half(own.ffn, std::min<std::int64_t>(32, own.ffn)); });
  const auto halve_heads = [&](Shape& s) {
    if (own.kv_heads < 2) return;
    s.kv_heads = own.kv_heads / 2;
    s.heads = s.kv_heads * (own.heads / own.kv_heads);
    if (tied) s.hidden = s.heads * config.head_dim;
  };
  add(halve_heads);
  if (!tied) add([&](Shape& s) { s.hidden = half(own.hidden, std::min<std::int64_t>(32, own.hidden)); });
  std::vector<Timing> timings;
  context.progress->begin("decoding speed", static_cast<std::int64_t>(shapes.size()));
  for (const Shape& shape : shapes) {
    timings.push_back({shape, timer(cut_config(config, shape))});
    context.progress->update(static_cast<std::int64_t>(timings.size()));
  }
  context.progress->end();
  return timings;
}

DecodeTimes fit_times(const ModelConfig& config, const StoredAs& stored, const std::vector<Timing>& timings) {
  const auto rows = static_cast<Eigen::Index>(timings.size());
  Eigen::MatrixXd a(rows, kTerms);
  for (Eigen::Index i = 0; i < rows; ++i) {
    const Timing& timing = timings[static_cast<std::size_t>(i)];
    const auto row = terms(config, stored, timing.shape);
    for (int j = 0; j < kTerms; ++j) a(i, j) = row[static_cast<std::size_t>(j)] / timing.seconds;
  }
  const Eigen::VectorXd ones = Eigen::VectorXd::Ones(rows);
  const Eigen::VectorXd scale = a.cwiseAbs().colwise().maxCoeff().transpose().cwiseMax(1e-300);
  const Eigen::MatrixXd scaled = a * scale.cwiseInverse().asDiagonal();
  // Of all sets of terms the one whose least squares are not negative and fit best; of equal fits the one of more terms.
  Eigen::VectorXd best = Eigen::VectorXd::Zero(kTerms);
  double least = std::numeric_limits<double>::infinity();
  for (int set = (1 << kTerms) - 1; set > 0; --set) {
    std::vector<int> chosen;
    for (int j = 0; j < kTerms; ++j)
      if ((set >> j & 1) != 0) chosen.push_back(j);
    Eigen::MatrixXd part(rows, static_cast<Eigen::Index>(chosen.size()));
    for (std::size_t j = 0; j < chosen.size(); ++j) part.col(static_cast<Eigen::Index>(j)) = scaled.col(chosen[j]);
    const Eigen::VectorXd x = part.completeOrthogonalDecomposition().solve(ones);
    if (x.minCoeff() < 0) continue;
    const double error = (part * x - ones).squaredNorm();
    if (error >= least - 1e-12) continue;
    least = error;
    best.setZero();
    for (std::size_t j = 0; j < chosen.size(); ++j) best(chosen[j]) = x(static_cast<Eigen::Index>(j));
  }
  best = best.cwiseQuotient(scale);
  return {best(0), best(1), best(2), best(3), best(4)};
}

}  // namespace pare
