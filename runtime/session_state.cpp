#include "runtime/session_state.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/error.h"
#include "core/file.h"

namespace pare {
namespace {

constexpr char kMagic[8] = {'P', 'A', 'R', 'E', 'S', 'T', 'A', 'T'};
constexpr std::uint32_t kVersion = 1;
constexpr std::size_t kHashLength = 32;
constexpr std::int64_t kChunk = 64;  // positions that are gathered at a time

struct Header {
  char magic[8];
  std::uint32_t version, kv;
  char model_hash[kHashLength];
  std::int64_t layers, kv_heads, head_dim, hidden, vocab;
  std::int64_t positions, cached, has_row;
  std::int64_t zero[2];
};
static_assert(sizeof(Header) == 128 && std::endian::native == std::endian::little);

Header header_of(const StateShape& shape, const StateContent& content) {
  Header h{};
  std::copy_n(kMagic, sizeof kMagic, h.magic);
  h.version = kVersion;
  h.kv = static_cast<std::uint32_t>(shape.kv);
  std::copy_n(shape.model_hash.data(), std::min(kHashLength, shape.model_hash.size()), h.model_hash);
  h.layers = shape.layers;
  h.kv_heads = shape.kv_heads;
  h.head_dim = shape.head_dim;
  h.hidden = shape.hidden;
  h.vocab = shape.vocab;
  h.positions = static_cast<std::int64_t>(content.ids.size());
  h.cached = content.cached;
  h.has_row = content.row != nullptr ? 1 : 0;
  return h;
}

std::string shape_text(const Header& h) {
  return std::to_string(h.layers) + " layers, " + std::to_string(h.kv_heads) + " key/value heads of " +
         std::to_string(h.head_dim) + ", hidden size " + std::to_string(h.hidden) + ", vocabulary " +
         std::to_string(h.vocab);
}

std::string kv_text(std::uint32_t kv) {
  if (kv > static_cast<std::uint32_t>(KvType::kMixed)) return "kind " + std::to_string(kv);
  return kv_name(static_cast<KvType>(kv));
}

}  // namespace

std::uint64_t state_bytes(const StateShape& shape, const KvCache& cache, const StateContent& content) {
  std::int64_t bytes = static_cast<std::int64_t>(sizeof(Header) + content.ids.size_bytes() + kHashLength);
  if (content.row != nullptr) bytes += shape.hidden * 4;
  for (std::int64_t block = 0; block < shape.layers; ++block)
    bytes += (content.cached - cache.first_seen(block, content.cached)) * cache.record_bytes(block);
  return static_cast<std::uint64_t>(bytes);
}

void write_state(const StateShape& shape, KvCache& cache, const StateContent& content,
                 const std::function<void(std::span<const std::byte>)>& write) {
  Hasher hasher;
  const auto emit = [&](std::span<const std::byte> bytes) {
    hasher.update(bytes);
    write(bytes);
  };
  const Header header = header_of(shape, content);
  emit(std::as_bytes(std::span(&header, 1)));
  emit(std::as_bytes(content.ids));
  if (content.row != nullptr) emit(std::as_bytes(std::span(content.row, static_cast<std::size_t>(shape.hidden))));
  std::vector<std::byte> records;
  for (std::int64_t block = 0; block < shape.layers; ++block) {
    for (std::int64_t first = cache.first_seen(block, content.cached); first < content.cached; first += kChunk) {
      const std::int64_t count = std::min(kChunk, content.cached - first);
      records.resize(static_cast<std::size_t>(count * cache.record_bytes(block)));
      cache.copy_out(block, first, count, records.data());
      emit(records);
    }
  }
  write(as_bytes(hasher.hex()));
}

StateReader::StateReader(std::span<const std::byte> state, const StateShape& shape, const KvCache& cache,
                         std::string place)
    : layers_(shape.layers) {
  if (state.size() < sizeof(Header) + kHashLength || std::memcmp(state.data(), kMagic, sizeof kMagic) != 0)
    throw input_error(place, "the state of a session", "other bytes, or too few");
  Header h;
  std::memcpy(&h, state.data(), sizeof h);
  if (h.version != kVersion)
    throw input_error(place, "a state of version " + std::to_string(kVersion), "version " + std::to_string(h.version),
                      "this program is older or newer than the state");
  const Header own = header_of(shape, {});
  if (std::memcmp(h.model_hash, own.model_hash, kHashLength) != 0)
    throw input_error(place, "a state of the model with file hash " + std::string(own.model_hash, kHashLength),
                      "one of another model", "states belong to the file they were made with");
  if (shape_text(h) != shape_text(own)) throw input_error(place, shape_text(own), shape_text(h));
  if (h.kv != own.kv)
    throw input_error(place, "keys and values as " + kv_text(own.kv), kv_text(h.kv), "open the model with that cache");

  const std::string damaged = "cut short or changed";
  std::span<const std::byte> rest = state.subspan(sizeof h, state.size() - sizeof h - kHashLength);
  const auto take = [&](std::int64_t count, std::int64_t size) {
    if (count < 0 || count > static_cast<std::int64_t>(rest.size()) / size)
      throw input_error(place, "a whole state", damaged);
    const auto taken = rest.first(static_cast<std::size_t>(count * size));
    rest = rest.subspan(taken.size());
    return taken;
  };
  const auto ids = take(h.positions, 4);
  row_ = take(h.has_row != 0 ? shape.hidden : 0, 4);
  if (h.cached < 0 || h.cached > h.positions) throw input_error(place, "a whole state", damaged);
  cached_ = h.cached;
  records_ = rest;
  for (std::int64_t block = 0; block < layers_; ++block)
    take(cached_ - cache.first_seen(block, cached_), cache.record_bytes(block));
  const std::string hash = hash_bytes(state.first(state.size() - kHashLength));
  if (!rest.empty() || std::memcmp(state.data() + state.size() - kHashLength, hash.data(), kHashLength) != 0)
    throw input_error(place, "a whole state", damaged);

  ids_.resize(static_cast<std::size_t>(h.positions));
  if (!ids.empty()) std::memcpy(ids_.data(), ids.data(), ids.size());
  for (const std::int32_t id : ids_)
    if (id < 0 || id >= shape.vocab)
      throw input_error(place, "token ids from 0 to " + std::to_string(shape.vocab - 1), std::to_string(id));
}

void StateReader::row(float* out) const {
  std::memcpy(out, row_.data(), row_.size());
}

void StateReader::fill(KvCache& cache) const {
  cache.begin_copy(cached_);
  const std::byte* at = records_.data();
  for (std::int64_t block = 0; block < layers_; ++block) {
    const std::int64_t first = cache.first_seen(block, cached_);
    cache.copy_in(block, first, cached_ - first, at);
    at += (cached_ - first) * cache.record_bytes(block);
  }
}

}  // namespace pare
