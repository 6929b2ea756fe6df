#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <functional>
#include <set>

#include "core/checkpoint.h"
#include "core/compressed_tensors.h"
#include "core/error.h"
#include "core/gptq_folder.h"
#include "core/notices.h"
#include "core/placement.h"
#include "core/shards.h"
#include "core/tensor_store.h"

// A piece is a file of its own under <work>/pieces, complete or absent:
//
//   data of its tensors | JSON index of its tensors | u64 length of that JSON
//
// Dense tensors lie there in their final dtype; codes as codes, scales, zeros, minima in the layout of QuantizedTensor.
// finish() reads pieces in canonical tensor order, so interruptions and the order of put leave no trace.

namespace pare {
namespace {

constexpr std::int64_t kChunk = 1 << 16;  // elements converted at a time

// Names of half-written temporaries that a killed process left (see AtomicFile).
bool is_stray(const std::string& name) {
  const auto at = name.rfind(".tmp-");
  if (at == std::string::npos || at + 5 == name.size()) return false;
  return std::all_of(name.begin() + static_cast<std::ptrdiff_t>(at) + 5, name.end(),
                     [](unsigned char c) { return std::isdigit(c) != 0; });
}

void remove_strays(const fs::path& folder) {
  if (!fs::exists(folder)) return;
  std::vector<fs::path> strays;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.is_regular_file() && is_stray(entry.path().filename().string())) strays.push_back(entry.path());
  for (const auto& path : strays) fs::remove(path);
}

DType storage_dtype(const std::string& dtype) {
  if (dtype == "float32") return DType::kF32;
  if (dtype == "float16") return DType::kF16;
  if (dtype == "bfloat16") return DType::kBF16;
  throw usage_error("dtype", "float32, float16 or bfloat16", "\"" + dtype + "\"");
}

template <class T>
std::span<const std::byte> bytes_of(const std::vector<T>& values) {
  return std::as_bytes(std::span<const T>(values));
}

struct Entry {
  bool dense = true;
  Codec codec;
  DType dtype = DType::kF32;  // of floats
  std::shared_ptr<MappedFile> file;
  std::uint64_t offset = 0, bytes = 0;
  std::span<const std::byte> data() const { return file->bytes().subspan(offset, bytes); }
};

}  // namespace

struct CheckpointWriter::State {
  fs::path work, pieces;
  ModelConfig config;
  std::string dtype_text;
  DType dtype = DType::kF32;
  std::vector<TensorSpec> specs;
  std::map<std::string, const TensorSpec*, std::less<>> spec_of;
  std::map<std::string, Entry, std::less<>> entries;
  std::set<std::string> names_of_pieces;
  std::set<std::string, std::less<>> put_here;  // by this writer, to catch a tensor put twice
  FolderForm form = FolderForm::kCompressedTensors;
  bool complete = false;                        // finish() had run before this writer was made
  std::unique_ptr<Checkpoint> reader;           // reads back what is complete; opened at the first need

  std::unique_ptr<AtomicFile> open;
  std::string open_name;
  std::vector<std::pair<std::string, Entry>> pending;

  fs::path piece_path(const std::string& piece) const { return pieces / (hash_bytes(as_bytes(piece)) + ".piece"); }

  const TensorSpec& spec(std::string_view name) const {
    const auto found = spec_of.find(name);
    if (found == spec_of.end()) throw std::logic_error("CheckpointWriter: no tensor " + std::string(name));
    return *found->second;
  }

  void load_piece(const fs::path& path) {
    auto file = std::make_shared<MappedFile>(path);
    const auto bytes = file->bytes();
    std::uint64_t length = 0;
    if (bytes.size() >= 8) std::memcpy(&length, bytes.data() + bytes.size() - 8, 8);
    if (bytes.size() < 8 || length > bytes.size() - 8)
      throw input_error(path.string(), "a complete piece", "a damaged one", "remove " + work.string() + " and start again");
    const auto text = bytes.subspan(bytes.size() - 8 - length, length);
    try {
      const auto index = nlohmann::json::parse(reinterpret_cast<const char*>(text.data()),
                                               reinterpret_cast<const char*>(text.data()) + text.size());
      for (const auto& row : index.at("tensors")) {
        Entry entry;
        const auto codec = row.at("codec").get<std::string>();
        entry.dense = codec.empty();
        if (!entry.dense) entry.codec = Codec::parse(codec, path.string());
        entry.dtype = row.contains("dtype") ? parse_dtype(row["dtype"].get<std::string>(), path.string()) : dtype;
        entry.file = file;
        entry.offset = row.at("offset").get<std::uint64_t>();
        entry.bytes = row.at("bytes").get<std::uint64_t>();
        if (entry.offset > bytes.size() || entry.bytes > bytes.size() - entry.offset)
          throw input_error(path.string(), "tensors inside the piece", "one beyond its end");
        entries[row.at("name").get<std::string>()] = entry;
      }
      names_of_pieces.insert(index.at("piece").get<std::string>());
    } catch (const nlohmann::json::exception& problem) {
      throw input_error(path.string(), "a complete piece", problem.what(), "remove " + work.string() + " and start again");
    }
  }

  // Work after a finished state starts over: whoever puts again means new weights.
  void reopen() {
    if (!complete) return;
    complete = false;
    reader.reset();
    for (const auto& entry : fs::directory_iterator(work)) {
      const std::string name = entry.path().filename().string();
      if (name == "config.json" || name == "quantize_config.json" || name == "codes.pare" || name.starts_with("model.safetensors") ||
          (name.starts_with("model-") && name.ends_with(".safetensors")))
        fs::remove(entry.path());
    }
    prepare_pieces();
  }

  void prepare_pieces() {
    fs::create_directories(pieces);
    const fs::path plan = pieces / "plan.json";
    const std::string text = write_config(config, dtype_text).dump(2);
    if (fs::exists(plan)) {
      if (read_text(plan) != text)
        throw usage_error(work.string(), "the unfinished output of the same run", "one with another configuration",
                          "remove it or choose another --out");
    } else {
      write_text(plan, text);
    }
  }

  void begin(const std::string& piece) {
    if (open) throw std::logic_error("CheckpointWriter: piece " + open_name + " is still open");
    reopen();
    open = std::make_unique<AtomicFile>(piece_path(piece));
    open_name = piece;
    pending.clear();
  }

  void end() {
    if (!open) throw std::logic_error("CheckpointWriter: no piece is open");
    nlohmann::json index = {{"piece", open_name}, {"tensors", nlohmann::json::array()}};
    for (const auto& [name, entry] : pending) {
      index["tensors"].push_back({{"name", name},
                                  {"codec", entry.dense ? "" : entry.codec.name()},
                                  {"offset", entry.offset},
                                  {"bytes", entry.bytes}});
      if (entry.dense && entry.dtype != dtype) index["tensors"].back()["dtype"] = dtype_name(entry.dtype);
    }
    const std::string text = index.dump();
    const std::uint64_t length = text.size();
    open->write(std::string_view(text));
    open->write(std::as_bytes(std::span(&length, 1)));
    open->commit();
    open.reset();
    load_piece(piece_path(open_name));
    pending.clear();
  }

  // Runs `write` inside the open piece, or inside one of its own.
  void put(std::string_view name, Entry entry, const std::function<void(AtomicFile&)>& write) {
    const bool alone = !open;
    if (alone) begin("tensor " + std::string(name));
    if (!put_here.emplace(name).second) throw std::logic_error("CheckpointWriter: " + std::string(name) + " put twice");
    try {
      entry.offset = open->size();
      write(*open);
      entry.bytes = open->size() - entry.offset;
      pending.emplace_back(name, entry);
      if (alone) end();
    } catch (...) {
      open.reset();
      throw;
    }
  }

  QuantizedTensor codes(const TensorSpec& spec, const Entry& entry) const {
    QuantizedTensor tensor = code_rows(spec, entry, 0, spec.shape[0]);
    entry.file->release(entry.offset, entry.bytes);
    return tensor;
  }

  QuantizedTensor code_rows(const TensorSpec& spec, const Entry& entry, std::int64_t first, std::int64_t count) const {
    QuantizedTensor tensor;
    tensor.codec = entry.codec;
    tensor.rows = count;
    tensor.cols = spec.shape[1];
    const auto cols = static_cast<std::size_t>(tensor.cols), all = static_cast<std::size_t>(spec.shape[0]);
    const auto groups = static_cast<std::size_t>(entry.codec.groups(tensor.cols)), skip = static_cast<std::size_t>(first);
    const std::byte* from = entry.data().data();
    const auto copy = [&](auto& out, std::size_t width, std::size_t element) {  // rows of `width` elements
      out.resize(static_cast<std::size_t>(count) * width);
      std::memcpy(out.data(), from + skip * width * element, out.size() * element);
      from += all * width * element;
    };
    copy(tensor.codes, cols, 1);
    copy(tensor.scales, groups, 2);
    if (entry.codec.kind == CodecKind::kQ4a) copy(tensor.zeros, groups, 1);
    if (entry.codec.kind == CodecKind::kQ4m) copy(tensor.minima, groups, 2);
    return tensor;
  }

  std::vector<std::byte> stored_floats(const StoredTensor& stored, DType to) const;
  QuantizedTensor stored_codes(const StoredTensor& stored) const;
  bool packs(const StoredTensor& stored) const;
  Codec gptq_codec() const;
  void put_gptq(const StoredTensor& stored, const std::string& module, const Codec& codec,
                std::vector<ShardTensor>& outputs) const;
  void assemble() const;
};

CheckpointWriter::CheckpointWriter(fs::path work_folder, ModelConfig config, std::string dtype)
    : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.work = std::move(work_folder);
  s.pieces = s.work / "pieces";
  s.dtype = storage_dtype(dtype);
  s.dtype_text = std::move(dtype);
  s.config = std::move(config);
  s.specs = expected_tensors(s.config);
  for (const TensorSpec& spec : s.specs) s.spec_of.emplace(spec.name, &spec);
  fs::remove_all(s.work / "pieces.old");
  remove_strays(s.work);
  remove_strays(s.pieces);
  if (fs::exists(s.work / "config.json") && !fs::exists(s.pieces)) {
    Json there = Checkpoint(s.work).config().source;
    there.erase("quantization_config");
    if (there != write_config(s.config, s.dtype_text))
      throw usage_error(s.work.string(), "the unfinished output of the same run", "one with another configuration",
                        "remove it or choose another --out");
    s.complete = true;
    return;
  }
  s.prepare_pieces();
  for (const auto& entry : fs::directory_iterator(s.pieces))
    if (entry.path().extension() == ".piece") s.load_piece(entry.path());
}

CheckpointWriter::~CheckpointWriter() = default;

bool CheckpointWriter::has(std::string_view name) const {
  if (state_->complete || state_->entries.find(name) != state_->entries.end())
    return state_->spec_of.find(name) != state_->spec_of.end();
  return std::any_of(state_->pending.begin(), state_->pending.end(), [&](const auto& row) { return row.first == name; });
}

void CheckpointWriter::put(std::string_view name, const float* values) {
  const TensorSpec& spec = state_->spec(name);
  const DType dtype = state_->dtype;
  std::int64_t count = 1;
  for (const std::int64_t size : spec.shape) count *= size;
  Entry entry;
  entry.dtype = dtype;
  state_->put(name, entry, [&](AtomicFile& out) {
    std::vector<std::uint16_t> chunk;
    for (std::int64_t first = 0; first < count; first += kChunk) {
      const auto n = static_cast<std::size_t>(std::min(kChunk, count - first));
      const float* from = values + first;
      if (dtype != DType::kF32) chunk.resize(n);
      for (std::size_t i = 0; i < n; ++i) {
        bool finite = std::isfinite(from[i]);
        if (finite && dtype == DType::kF16) finite = std::isfinite(f16_to_f32(chunk[i] = f32_to_f16(from[i])));
        if (finite && dtype == DType::kBF16) finite = std::isfinite(bf16_to_f32(chunk[i] = f32_to_bf16(from[i])));
        if (!finite)
          throw failure("tensor " + spec.name, "finite values that " + state_->dtype_text + " can hold",
                        std::to_string(from[i]) + " at element " + std::to_string(first + static_cast<std::int64_t>(i)));
      }
      if (dtype == DType::kF32) out.write(std::as_bytes(std::span(from, n)));
      else out.write(bytes_of(chunk));
    }
  });
}

void CheckpointWriter::put_stored(std::string_view name, DType dtype, const float* values) {
  const TensorSpec& spec = state_->spec(name);
  std::size_t count = 1;
  for (const std::int64_t size : spec.shape) count *= static_cast<std::size_t>(size);
  const std::span all(values, count);
  if (!holds_exactly(dtype, all))
    throw std::logic_error("CheckpointWriter: " + std::string(dtype_name(dtype)) + " does not hold " + spec.name);
  Entry entry;
  entry.dtype = dtype;
  state_->put(name, entry, [&](AtomicFile& out) {
    if (dtype == DType::kF32) return out.write(std::as_bytes(all));
    std::vector<std::uint16_t> halves(count);
    std::transform(all.begin(), all.end(), halves.begin(), dtype == DType::kF16 ? f32_to_f16 : f32_to_bf16);
    out.write(bytes_of(halves));
  });
}

void CheckpointWriter::put_codes(std::string_view name, const QuantizedTensor& codes) {
  const TensorSpec& spec = state_->spec(name);
  codes.validate("tensor " + spec.name);
  if (spec.shape != std::vector<std::int64_t>{codes.rows, codes.cols})
    throw std::logic_error("CheckpointWriter: codes of another shape for " + spec.name);
  state_->put(name, {.dense = false, .codec = codes.codec, .dtype = DType::kF32, .file = nullptr}, [&](AtomicFile& out) {
    out.write(bytes_of(codes.codes));
    out.write(bytes_of(codes.scales));
    out.write(bytes_of(codes.zeros));
    out.write(bytes_of(codes.minima));
  });
}

void CheckpointWriter::begin_piece(const std::string& piece) { state_->begin(piece); }
void CheckpointWriter::end_piece() { state_->end(); }
bool CheckpointWriter::has_piece(const std::string& piece) const {
  return state_->complete || state_->names_of_pieces.contains(piece);
}

void CheckpointWriter::read_f32(std::string_view name, float* out) const {
  if (state_->complete) {
    if (!state_->reader) state_->reader = std::make_unique<Checkpoint>(state_->work);
    return state_->reader->read_f32(name, out);
  }
  read_rows_f32(name, 0, state_->spec(name).shape[0], out);
}

void CheckpointWriter::read_rows_f32(std::string_view name, std::int64_t first, std::int64_t count, float* out) const {
  const TensorSpec& spec = state_->spec(name);
  const auto found = state_->entries.find(name);
  if (found == state_->entries.end()) throw std::logic_error("CheckpointWriter: " + spec.name + " is not in a piece");
  const Entry& entry = found->second;
  if (!entry.dense) return state_->code_rows(spec, entry, first, count).unpack(out);
  const TensorView view{spec.name, entry.dtype, spec.shape, entry.data()};
  const std::int64_t cols = spec.shape.size() == 2 ? spec.shape[1] : 1;
  to_f32(view, first * cols, count * cols, out);
}

void CheckpointWriter::release(std::string_view name) const {
  if (const auto found = state_->entries.find(name); found != state_->entries.end())
    found->second.file->release(found->second.offset, found->second.bytes);
}

void CheckpointWriter::copy_side_files(const fs::path& from) {
  for (const std::string& name : side_file_names())
    if (fs::is_regular_file(from / name) && (!is_notice(name) || notice_obstacle(from, name).empty()))
      copy_file_durably(from / name, state_->work / name);
}

void CheckpointWriter::put_side_file(const std::string& name, std::string_view text) {
  write_text(state_->work / name, text);
}

// The floats of a stored tensor, from those of its parts, in `to`; codes are unpacked.
std::vector<std::byte> CheckpointWriter::State::stored_floats(const StoredTensor& stored, DType to) const {
  const auto size = static_cast<std::size_t>(dtype_bits(to)) / 8;
  std::size_t elements = 1;
  for (const std::int64_t n : stored.shape) elements *= static_cast<std::size_t>(n);
  std::vector<std::byte> bytes(elements * size);
  for (std::size_t i = 0; i < stored.parts.size(); ++i) {
    const TensorSpec& spec = *stored.parts[i];
    const Entry& entry = entries.find(spec.name)->second;
    if (entry.dense && to == entry.dtype) {
      put_into(stored.places[i], spec, entry.data().data(), size, bytes.data());
      entry.file->release(entry.offset, entry.bytes);
      continue;
    }
    std::vector<float> values(static_cast<std::size_t>(spec.shape[0] * (spec.shape.size() == 2 ? spec.shape[1] : 1)));
    if (entry.dense)
      to_f32({spec.name, entry.dtype, spec.shape, entry.data()}, 0, static_cast<std::int64_t>(values.size()), values.data());
    else
      codes(spec, entry).unpack(values.data());
    put_into(stored.places[i], spec, bytes_of(values).data(), size, bytes.data());
  }
  return bytes;
}

// The codes of all parts, rows where the stored tensor has them.
QuantizedTensor CheckpointWriter::State::stored_codes(const StoredTensor& stored) const {
  if (stored.whole()) return codes(*stored.parts[0], entries.find(stored.parts[0]->name)->second);
  QuantizedTensor joined;
  for (std::size_t i = 0; i < stored.parts.size(); ++i) {
    const QuantizedTensor part = codes(*stored.parts[i], entries.find(stored.parts[i]->name)->second);
    if (i == 0) {
      joined.codec = part.codec;
      joined.rows = stored.shape[0];
      joined.cols = part.cols;
      joined.codes.resize(static_cast<std::size_t>(joined.rows * joined.cols));
      joined.scales.resize(static_cast<std::size_t>(joined.rows * joined.codec.groups(joined.cols)));
    }
    const auto copy = [&](const auto& from, auto& to, std::int64_t width) {
      for (std::int64_t r = 0; r < part.rows; ++r)
        std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(r * width), width,
                    to.begin() + static_cast<std::ptrdiff_t>(stored.places[i].row(r) * width));
    };
    copy(part.codes, joined.codes, joined.cols);
    copy(part.scales, joined.scales, joined.codec.groups(joined.cols));
    if (part.zeros.empty()) continue;
    joined.zeros.resize(joined.scales.size());
    copy(part.zeros, joined.zeros, joined.codec.groups(joined.cols));
  }
  return joined;
}

// All rows of the stored tensor must have the one codec that the form has for a module.
bool CheckpointWriter::State::packs(const StoredTensor& stored) const {
  const TensorSpec& spec = *stored.parts[0];
  const Entry& first = entries.find(spec.name)->second;
  if (first.dense) return false;
  if (form == FolderForm::kCompressedTensors) {
    if (!has_packed_form(config, spec, first.codec)) return false;
  } else {
    if (!is_module(config, spec) || !gptq_obstacle(first.codec, stored.shape[0], stored.shape[1]).empty()) return false;
    if (first.codec != gptq_codec()) return false;
  }
  return std::all_of(stored.parts.begin(), stored.parts.end(), [&](const TensorSpec* part) {
    const Entry& entry = entries.find(part->name)->second;
    return !entry.dense && entry.codec == first.codec;
  });
}

// The codec of the linears of a GPTQ folder, which says it once: the first that has codes.
Codec CheckpointWriter::State::gptq_codec() const {
  for (const TensorSpec& spec : specs)
    if (const Entry& entry = entries.find(spec.name)->second; spec.role == TensorRole::kLinear && !entry.dense)
      return entry.codec;
  return {};
}

void CheckpointWriter::State::put_gptq(const StoredTensor& stored, const std::string& module, const Codec& codec,
                                       std::vector<ShardTensor>& outputs) const {
  const std::int64_t rows = stored.shape[0], cols = stored.shape[1], groups = codec.groups(cols);
  const std::int64_t per_word = 32 / codec.bits();
  const bool less_one = form == FolderForm::kGptq;
  outputs.push_back({{module + "." + kGptqWeight, DType::kI32, {cols / per_word, rows}},
                     [&, this](SafetensorsWriter& out) { out.write(bytes_of(pack_gptq_weight(stored_codes(stored)))); }});
  outputs.push_back({{module + "." + kGptqZeros, DType::kI32, {groups, rows / per_word}},
                     [&, this, module, less_one](SafetensorsWriter& out) {
                       const QuantizedTensor tensor = stored_codes(stored);
                       if (less_one && std::find(tensor.zeros.begin(), tensor.zeros.end(), 0) != tensor.zeros.end())
                         throw input_error(module, "zero points from 1 to 15, of which version 1 stores one less", "0",
                                           "choose --to gptq_v2, which stores them as they are");
                       out.write(bytes_of(pack_gptq_zeros(tensor, less_one)));
                     }});
  outputs.push_back({{module + "." + kGptqScales, DType::kF16, {groups, rows}},
                     [&, this](SafetensorsWriter& out) { out.write(bytes_of(pack_gptq_scales(stored_codes(stored)))); }});
  outputs.push_back({{module + "." + kGptqOrder, DType::kI32, {cols}},
                     [codec, cols](SafetensorsWriter& out) { out.write(bytes_of(gptq_order(codec, cols))); }});
}

void CheckpointWriter::State::assemble() const {
  std::vector<ShardTensor> outputs, side;
  std::map<std::string, Codec> modules;
  std::vector<std::string> ignored;
  const bool gptq = form != FolderForm::kCompressedTensors;
  Json side_codecs = Json::object();
  const std::vector<StoredTensor> tensors = stored_tensors(config, specs);

  for (const StoredTensor& stored : tensors) {
    const TensorSpec& spec = *stored.parts[0];
    const Entry& entry = entries.find(spec.name)->second;
    const bool linear = (spec.role == TensorRole::kLinear || spec.role == TensorRole::kHead) && !stored.transposed;
    const std::string module = stored.name.substr(0, stored.name.rfind('.'));
    const bool dense = std::all_of(stored.parts.begin(), stored.parts.end(), [&](const TensorSpec* part) {
      return entries.find(part->name)->second.dense;
    });
    if (dense) {
      if (linear) ignored.push_back(module);
      // Parts of one tensor that differ in type, which no folder of origin has, meet in F32.
      const bool alike = std::all_of(stored.parts.begin(), stored.parts.end(), [&](const TensorSpec* part) {
        return entries.find(part->name)->second.dtype == entry.dtype;
      });
      const DType type = alike ? entry.dtype : DType::kF32;
      outputs.push_back({{stored.name, type, stored.shape}, [&, type](SafetensorsWriter& out) {
                           if (!stored.whole()) return out.write(stored_floats(stored, type));
                           out.write(entry.data());
                           entry.file->release(entry.offset, entry.bytes);
                         }});
      continue;
    }
    if (packs(stored)) {
      const std::int64_t rows = stored.shape[0], cols = stored.shape[1], groups = entry.codec.groups(cols);
      modules.emplace(module, entry.codec);
      if (gptq) {
        put_gptq(stored, module, entry.codec, outputs);
        continue;
      }
      const bool bytes = entry.codec.int8_inputs;
      if (bytes) {
        outputs.push_back({{stored.name, DType::kI8, {rows, cols}},
                           [&](SafetensorsWriter& out) { out.write(bytes_of(stored_codes(stored).codes)); }});
      } else {
        outputs.push_back({{module + "." + kPackedSuffix, DType::kI32, {rows, packed_words(cols, entry.codec.bits())}},
                           [&](SafetensorsWriter& out) { out.write(bytes_of(pack_weight(stored_codes(stored)))); }});
      }
      outputs.push_back({{module + "." + kScaleSuffix, DType::kF32, {rows, groups}}, [&](SafetensorsWriter& out) {
                           const QuantizedTensor tensor = stored_codes(stored);
                           std::vector<float> scales(tensor.scales.size());
                           std::transform(tensor.scales.begin(), tensor.scales.end(), scales.begin(), f16_to_f32);
                           out.write(bytes_of(scales));
                         }});
      if (!bytes)
        outputs.push_back({{module + "." + kShapeSuffix, DType::kI64, {2}},
                           [&](SafetensorsWriter& out) { out.write(bytes_of(stored.shape)); }});
      continue;
    }
    if (linear) ignored.push_back(module);
    outputs.push_back({{stored.name, DType::kF32, stored.shape}, [&](SafetensorsWriter& out) {
                         if (!stored.whole()) return out.write(stored_floats(stored, DType::kF32));
                         const QuantizedTensor tensor = codes(spec, entry);
                         std::vector<float> row(static_cast<std::size_t>(tensor.cols));
                         for (std::int64_t r = 0; r < tensor.rows; ++r) {
                           tensor.unpack_row(r, row.data());
                           out.write(bytes_of(row));
                         }
                       }});
    for (const TensorSpec* part : stored.parts) {
      const Entry& own = entries.find(part->name)->second;
      if (own.dense || gptq) continue;
      const std::int64_t rows = part->shape[0], cols = part->shape[1], groups = own.codec.groups(cols);
      side_codecs[part->name] = own.codec.name();
      side.push_back({{part->name + ".codes", DType::kI8, {rows, cols}},
                      [this, part, &own](SafetensorsWriter& out) { out.write(bytes_of(codes(*part, own).codes)); }});
      side.push_back({{part->name + ".scales", DType::kF16, {rows, groups}},
                      [this, part, &own](SafetensorsWriter& out) { out.write(bytes_of(codes(*part, own).scales)); }});
      if (own.codec.kind == CodecKind::kQ4a)
        side.push_back({{part->name + ".zeros", DType::kU8, {rows, groups}},
                        [this, part, &own](SafetensorsWriter& out) { out.write(bytes_of(codes(*part, own).zeros)); }});
      if (own.codec.kind == CodecKind::kQ4m)
        side.push_back({{part->name + ".minima", DType::kF16, {rows, groups}},
                        [this, part, &own](SafetensorsWriter& out) { out.write(bytes_of(codes(*part, own).minima)); }});
    }
  }

  write_shards(work, outputs);
  if (!side.empty()) write_tensors(work / "codes.pare", side, {{"format", "pt"}, {"pare.codecs", side_codecs.dump()}});

  Json out = write_config(config, dtype_text);
  if (!modules.empty() && gptq) {
    const bool head = modules.contains("lm_head");
    std::erase(ignored, "lm_head");
    out["quantization_config"] = gptq_config(gptq_codec(), form == FolderForm::kGptq, head, ignored);
    write_text(work / "quantize_config.json", out["quantization_config"].dump(2) + "\n");
  } else if (!modules.empty()) {
    out["quantization_config"] = quantization_config(modules, ignored);
  }
  write_text(work / "config.json", out.dump(2) + "\n");
}

void CheckpointWriter::set_form(FolderForm form) { state_->form = form; }

void CheckpointWriter::finish() {
  State& s = *state_;
  if (s.complete) return;
  if (s.open) throw std::logic_error("CheckpointWriter: piece " + s.open_name + " is still open");
  for (const TensorSpec& spec : s.specs)
    if (!s.entries.contains(spec.name)) throw std::logic_error("CheckpointWriter: " + spec.name + " was never put");
  s.assemble();
  const Checkpoint reopened(s.work);  // what was written has to pass our own reader before the pieces go
  s.entries.clear();
  // Renamed first: an interrupted removal must not look like unfinished work.
  const fs::path leaving = s.work / "pieces.old";
  fs::remove_all(leaving);
  fs::rename(s.pieces, leaving);
  fs::remove_all(leaving);
  s.complete = true;
}

}  // namespace pare
