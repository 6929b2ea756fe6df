#include "model/logits.h"

#include <cstring>

#include "model/decoder.h"
#include "model/threads.h"

namespace pare {
namespace {

class TorchLogits final : public LogitsSource {
 public:
  TorchLogits(const Checkpoint& checkpoint, const std::string& device, bool float_inputs)
      : device_(parse_device(device)),
        decoder_(load_decoder(checkpoint, device_, float_inputs)),
        name_(checkpoint.folder().string()) {
    decoder_->eval();
  }

  std::string name() const override { return name_; }
  std::int64_t vocab_size() const override { return decoder_->config().vocab_size; }

  void begin(std::span<const std::int32_t> ids) override {
    const torch::NoGradGuard no_grad;
    const auto count = static_cast<std::int64_t>(ids.size());
    torch::Tensor window = torch::empty({1, count}, torch::kLong);
    for (std::int64_t i = 0; i < count; ++i) window.data_ptr<std::int64_t>()[i] = ids[static_cast<std::size_t>(i)];
    hidden_ = decoder_->hidden(window.to(device_)).squeeze(0);
  }

  void logits(std::int64_t first, std::int64_t count, float* out) override {
    const torch::NoGradGuard no_grad;
    const torch::Tensor rows = decoder_->head_logits(hidden_.narrow(0, first, count)).to(torch::kCPU).contiguous();
    std::memcpy(out, rows.data_ptr<float>(), static_cast<std::size_t>(rows.numel()) * sizeof(float));
  }

 private:
  torch::Device device_;
  Decoder decoder_;
  std::string name_;
  torch::Tensor hidden_;
};

}  // namespace

std::unique_ptr<LogitsSource> torch_logits(const Checkpoint& checkpoint, const std::string& device, int threads,
                                           bool float_inputs) {
  if (threads > 0) set_library_threads(threads);
  return std::make_unique<TorchLogits>(checkpoint, device, float_inputs);
}

}  // namespace pare
