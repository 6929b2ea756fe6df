#include "core/compact.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <set>

#include "core/compact_size.h"
#include "core/error.h"

namespace pare {
namespace {

constexpr int kVersion = 1;
constexpr std::size_t kAlignment = 64, kHashLength = 32;
constexpr std::string_view kMagic = "{\"__metadata__\":{\"format\":\"pt\",\"pare\":\"";  // header bytes 8 .. 46
constexpr std::string_view kHashKey = "{\\\"file_hash\\\":\\\"";  // as escaped inside the header; the hash follows
constexpr std::string_view kEmbeddedPrefix = "pare.", kReportName = "pare.report";
constexpr std::int64_t kChunk = 1 << 16;
// The large pages of most machines. The page cache keeps a file in pieces as it was written; only whole, aligned ones
// can be mapped as large pages, from which the weights are read half as fast again (measured: 28 against 18 GB/s).
constexpr std::size_t kLargePage = std::size_t{2} << 20;

std::int64_t rows_of(const std::vector<std::int64_t>& shape) { return shape.size() == 2 ? shape[0] : 1; }
std::int64_t cols_of(const std::vector<std::int64_t>& shape) { return shape.empty() ? 1 : shape.back(); }

bool is_hash(const std::string& text) {
  return text.size() == kHashLength && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

// Offset of the 32 characters of the file hash, found at the fixed place behind the magic.
std::size_t file_hash_offset() { return 8 + kMagic.size() + kHashKey.size(); }

// Hash of everything before the report, the file hash itself read as 32 zeros.
std::string file_hash_of(std::span<const std::byte> before_report) {
  Hasher hasher;
  const std::size_t at = file_hash_offset();
  hasher.update(before_report.first(at));
  hasher.update(std::string(kHashLength, '0'));
  hasher.update(before_report.subspan(at + kHashLength));
  return hasher.hex();
}

bool has_magic(std::span<const std::byte> bytes) {
  const std::size_t at = 8 + kMagic.size();
  return bytes.size() >= at + kHashKey.size() + kHashLength && std::memcmp(bytes.data() + 8, kMagic.data(), kMagic.size()) == 0 &&
         std::memcmp(bytes.data() + at, kHashKey.data(), kHashKey.size()) == 0;
}

// Those that come with a GGUF file are told what to do with it.
std::shared_ptr<SafetensorsFile> open_safetensors(const fs::path& path) {
  if (fs::is_regular_file(path)) {
    char magic[4] = {};
    std::ifstream(path, std::ios::binary).read(magic, sizeof magic);
    if (std::string_view(magic, sizeof magic) == "GGUF")
      throw input_error(path.string(), "a compact file", "a GGUF file", "pare export FILE --out model.pare makes one of it");
  }
  return std::make_shared<SafetensorsFile>(path);
}

}  // namespace

bool CompactFile::is_compact(const fs::path& path) {
  if (!fs::is_regular_file(path)) return false;
  const MappedFile file(path);
  return file.bytes().size() >= 8 + kMagic.size() && std::memcmp(file.bytes().data() + 8, kMagic.data(), kMagic.size()) == 0;
}

CompactFile::CompactFile(const fs::path& path) : file_(open_safetensors(path)) {
  const std::string place = path.string();
  if (!has_magic(file_->file().bytes()))
    throw input_error(place, "a compact file", "a safetensors file without the pare header", "make one with pare export");
  // Where the file is not in memory yet it is to come in large pages; a refusal costs speed alone.
  if (const auto bytes = file_->file().bytes(); bytes.size() >= kLargePage)
    ::madvise(const_cast<std::byte*>(bytes.data()), bytes.size(), MADV_HUGEPAGE);
  // Sorted maps: large models have thousands of rows.
  nlohmann::json meta;
  try {
    meta = nlohmann::json::parse(file_->metadata().at("pare"));
    version_ = meta.at("version").get<int>();
    if (version_ != kVersion)
      throw input_error(place, "compact file version " + std::to_string(kVersion), "version " + std::to_string(version_),
                        "this program is older or newer than the file");
    file_hash_ = meta.at("file_hash").get<std::string>();
    report_hash_ = meta.at("report_hash").get<std::string>();
    if (!is_hash(file_hash_) || !is_hash(report_hash_)) throw input_error(place, "hashes of 32 hex digits", "other text");
    if (!meta.at("tensors").is_object()) throw input_error(place + ": tensors", "an object", meta["tensors"].type_name());
  } catch (const nlohmann::json::exception& problem) {
    throw input_error(place + ": metadata", "the description of a compact file", problem.what());
  }

  std::string problems;
  const auto complain = [&](const std::string& text) { problems += (problems.empty() ? "" : "; ") + text; };
  const auto& described = meta["tensors"];
  const std::byte* base = file_->file().bytes().data();
  for (const TensorView& view : file_->tensors()) {
    if (view.dtype != DType::kU8 || view.shape.size() != 1) {
      complain(view.name + " is not a row of bytes");
      continue;
    }
    if (view.name.starts_with(kEmbeddedPrefix)) {
      embedded_.emplace(view.name.substr(kEmbeddedPrefix.size()), view.data);
      continue;
    }
    const auto row = described.find(view.name);
    if (row == described.end()) {
      complain(view.name + " has no description");
      continue;
    }
    CompactTensor tensor;
    tensor.name = view.name;
    tensor.payload = view.data;
    try {
      tensor.codec = Codec::parse(row->at("codec").get<std::string>(), place + ": " + view.name);
      tensor.shape = row->at("shape").get<std::vector<std::int64_t>>();
      tensor.hash = row->at("hash").get<std::string>();
    } catch (const nlohmann::json::exception& problem) {
      throw input_error(place + ": " + view.name, "codec, shape and hash", problem.what());
    } catch (const Error& problem) {
      throw input_error(problem.place(), problem.expected(), problem.found());  // not the user's usage: the file's content
    }
    by_name_.emplace(tensor.name, tensors_.size());
    tensors_.push_back(std::move(tensor));
    if ((view.data.data() - base) % static_cast<std::ptrdiff_t>(kAlignment) != 0) complain(view.name + " does not start on 64 bytes");
  }
  for (const auto& [name, row] : described.items())
    if (by_name_.find(name) == by_name_.end()) complain(name + " is described and not there");
  if (file_->tensors().empty() || file_->tensors().back().name != kReportName) complain("the last tensor is not pare.report");

  const auto config_text = embedded("config.json");
  if (!config_text) throw input_error(place, "an embedded config.json", "none");
  const auto generation = embedded("generation_config.json");
  config_ = parse_config(parse_json(*config_text, place + ": config.json"),
                         generation ? parse_json(*generation, place + ": generation_config.json") : Json(nullptr),
                         place + ": config.json");
  std::set<std::string_view> expected;
  for (const TensorSpec& spec : expected_tensors(config_)) {
    const auto found = by_name_.find(spec.name);
    if (found == by_name_.end()) {
      complain(spec.name + " is missing");
      continue;
    }
    expected.insert(found->first);
    const CompactTensor& tensor = tensors_[found->second];
    const std::int64_t rows = rows_of(spec.shape), cols = cols_of(spec.shape);
    if (tensor.shape != spec.shape) complain(spec.name + " has another shape than the config");
    else if (spec.shape.size() == 1 && tensor.codec.kind != CodecKind::kF32) complain(spec.name + " is not f32");
    else if (!tensor.codec.fits(cols)) complain(spec.name + " has rows that " + tensor.codec.name() + " does not divide");
    else if (tensor.payload.size() != tensor.codec.payload_bytes(rows, cols))
      complain(spec.name + " has " + std::to_string(tensor.payload.size()) + " bytes instead of " +
               std::to_string(tensor.codec.payload_bytes(rows, cols)));
  }
  for (const CompactTensor& tensor : tensors_)
    if (!expected.contains(tensor.name)) complain(tensor.name + " is left over");
  if (!problems.empty()) throw input_error(place, "a well-formed compact file", problems);
}

const CompactTensor& CompactFile::tensor(std::string_view name) const {
  const auto found = by_name_.find(name);
  if (found == by_name_.end()) throw std::logic_error("CompactFile: no tensor " + std::string(name));
  return tensors_[found->second];
}

std::optional<std::string> CompactFile::embedded(const std::string& name) const {
  const auto found = embedded_.find(name);
  if (found == embedded_.end()) return std::nullopt;
  return std::string(reinterpret_cast<const char*>(found->second.data()), found->second.size());
}

std::vector<std::string> CompactFile::embedded_names() const {
  std::vector<std::string> names;
  for (const auto& [name, data] : embedded_) names.push_back(name);
  return names;
}

std::uint64_t CompactFile::file_bytes() const { return file_->file().bytes().size(); }

std::uint64_t CompactFile::tensor_bytes() const {
  std::uint64_t bytes = 0;
  for (const CompactTensor& tensor : tensors_) bytes += tensor.payload.size();
  return bytes;
}

void CompactFile::release(const CompactTensor& tensor) const {
  const auto bytes = file_->file().bytes();
  file_->file().release(static_cast<std::size_t>(tensor.payload.data() - bytes.data()), tensor.payload.size());
}

std::vector<std::string> CompactFile::verify() const {
  std::vector<std::string> damaged;
  for (const CompactTensor& tensor : tensors_)
    if (hash_bytes(tensor.payload) != tensor.hash) damaged.push_back(tensor.name);
  const auto report = file_->tensors().back().data;
  if (hash_bytes(report) != report_hash_) damaged.emplace_back(kReportName);
  const auto bytes = file_->file().bytes();
  if (file_hash_of(bytes.first(bytes.size() - report.size())) != file_hash_) damaged.emplace_back("file");
  return damaged;
}

const fs::path& CompactFile::path() const { return file_->file().path(); }

namespace {

using Plan = CompactWriter::Plan;

std::uint64_t payload_bytes(const Plan& tensor) {
  return tensor.codec.payload_bytes(rows_of(tensor.shape), cols_of(tensor.shape));
}

std::vector<TensorDecl> declared(const std::vector<Plan>& plan, const std::map<std::string, std::uint64_t>& embedded) {
  std::vector<TensorDecl> decls;
  for (const Plan& tensor : plan)
    decls.push_back({tensor.name, DType::kU8, {static_cast<std::int64_t>(payload_bytes(tensor))}});
  for (const auto& [name, bytes] : embedded)
    decls.push_back({std::string(kEmbeddedPrefix) + name, DType::kU8, {static_cast<std::int64_t>(bytes)}});
  decls.push_back({std::string(kReportName), DType::kU8, {0}});
  return decls;
}

std::map<std::string, std::string> metadata(const std::vector<Plan>& plan, const std::vector<std::string>& hashes,
                                            const std::string& file_hash, const std::string& report_hash) {
  nlohmann::json meta = {{"version", kVersion}, {"file_hash", file_hash}, {"report_hash", report_hash}, {"tensors", nlohmann::json::object()}};
  for (std::size_t i = 0; i < plan.size(); ++i)
    meta["tensors"][plan[i].name] = {{"codec", plan[i].codec.name()}, {"shape", plan[i].shape}, {"hash", hashes[i]}};
  return {{"format", "pt"}, {"pare", meta.dump()}};
}

// Room for the offsets of any report, so that the header keeps its size when the report arrives.
std::size_t header_room(const std::vector<Plan>& plan, std::vector<TensorDecl> decls) {
  const std::string none(kHashLength, '0');
  decls.back().shape = {1'000'000'000'000'000};
  return safetensors_header(decls, metadata(plan, std::vector<std::string>(plan.size(), none), none, none)).size() - 8;
}

}  // namespace

struct CompactWriter::State {
  State(const fs::path& file_path, std::vector<Plan> tensors, std::map<std::string, std::string> files)
      : path(file_path), plan(std::move(tensors)), embedded(std::move(files)) {
    if (fs::exists(fs::symlink_status(path)))
      throw usage_error(path.string(), "an output that does not exist yet", "an existing one",
                        "remove it or choose another --out");
    std::map<std::string, std::uint64_t> sizes;
    for (const auto& [name, text] : embedded) sizes[name] = text.size();
    decls = declared(plan, sizes);
    hashes.assign(plan.size(), std::string(kHashLength, '0'));
    reserve = header_room(plan, decls);
    file = std::make_unique<AtomicFile>(path);
    write(as_bytes(header(std::string(kHashLength, '0'), std::string(kHashLength, '0'))));
  }

  // In whole large pages until drain().
  void write(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const std::size_t n = std::min(bytes.size(), kLargePage - pending.size());
      pending.insert(pending.end(), bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(n));
      bytes = bytes.subspan(n);
      if (pending.size() == kLargePage) drain();
    }
  }
  void drain() {
    file->write(pending);
    pending.clear();
  }

  std::string header(const std::string& file_hash, const std::string& report_hash) const {
    return safetensors_header(decls, metadata(plan, hashes, file_hash, report_hash), reserve);
  }

  const Plan& expect(bool quantized) {
    if (next == plan.size()) throw std::logic_error("CompactWriter: more tensors than planned");
    if (plan[next].codec.is_float() == quantized) throw std::logic_error("CompactWriter: " + plan[next].name + " is planned otherwise");
    return plan[next];
  }

  // Writes the header with true hashes for the bytes that stand in the file now.
  void patch_header(std::string_view report) {
    drain();
    const std::string report_hash = hash_bytes(as_bytes(report));
    file->write_at(0, as_bytes(header(std::string(kHashLength, '0'), report_hash)));
    const MappedFile written(file->temporary());
    const std::string file_hash = file_hash_of(written.bytes().first(written.bytes().size() - report.size()));
    file->write_at(0, as_bytes(header(file_hash, report_hash)));
  }

  fs::path path;
  std::vector<Plan> plan;
  std::map<std::string, std::string> embedded;
  std::vector<TensorDecl> decls;
  std::vector<std::string> hashes;
  std::size_t next = 0, reserve = 0;
  bool payload_done = false, sealed = false;
  std::unique_ptr<AtomicFile> file;
  std::vector<std::byte> pending;  // not in the file yet
};

CompactWriter::CompactWriter(fs::path path, std::vector<Plan> plan, std::map<std::string, std::string> embedded)
    : state_(std::make_unique<State>(path, std::move(plan), std::move(embedded))) {}

CompactWriter::~CompactWriter() = default;

std::uint64_t compact_overhead(const std::vector<CompactWriter::Plan>& plan,
                               const std::map<std::string, std::uint64_t>& embedded) {
  std::uint64_t bytes = 8 + header_room(plan, declared(plan, embedded));
  for (const auto& [name, size] : embedded) bytes += size;
  return bytes;
}

void CompactWriter::add(const QuantizedTensor& tensor) {
  State& s = *state_;
  const Plan& plan = s.expect(true);
  if (tensor.codec != plan.codec || plan.shape != std::vector<std::int64_t>{tensor.rows, tensor.cols})
    throw std::logic_error("CompactWriter: " + plan.name + " has another codec or shape than planned");
  tensor.validate("tensor " + plan.name);
  const std::vector<std::byte> payload = pack_payload(tensor);
  s.hashes[s.next++] = hash_bytes(payload);
  s.write(payload);
}

void CompactWriter::add(const float* values, bool as_stored) {
  State& s = *state_;
  const Plan& plan = s.expect(false);
  const std::int64_t count = rows_of(plan.shape) * cols_of(plan.shape);
  const CodecKind kind = plan.codec.kind;
  Hasher hasher;
  std::uint64_t written = 0;
  const auto emit = [&](std::span<const std::byte> bytes) {
    hasher.update(bytes);
    s.write(bytes);
    written += bytes.size();
  };
  std::vector<std::uint16_t> half;
  for (std::int64_t first = 0; first < count; first += kChunk) {
    const auto n = static_cast<std::size_t>(std::min(kChunk, count - first));
    const float* from = values + first;
    half.resize(n);
    for (std::size_t i = 0; i < n; ++i) {
      float stored = from[i];
      if (kind == CodecKind::kF16) stored = f16_to_f32(half[i] = f32_to_f16(from[i]));
      if (kind == CodecKind::kBf16) stored = bf16_to_f32(half[i] = f32_to_bf16(from[i]));
      if (!std::isfinite(stored) && !as_stored)
        throw failure("tensor " + plan.name, "finite values that " + plan.codec.name() + " can hold",
                      std::to_string(from[i]) + " at element " + std::to_string(first + static_cast<std::int64_t>(i)));
    }
    emit(kind == CodecKind::kF32 ? std::as_bytes(std::span(from, n)) : std::as_bytes(std::span(half)));
  }
  const std::vector<std::byte> padding(payload_bytes(plan) - written);
  emit(padding);
  s.hashes[s.next++] = hasher.hex();
}

const fs::path& CompactWriter::finish_payload() {
  State& s = *state_;
  if (s.payload_done) return s.file->temporary();
  if (s.next != s.plan.size()) throw std::logic_error("CompactWriter: fewer tensors than planned");
  for (const auto& [name, text] : s.embedded) s.write(as_bytes(text));
  s.patch_header({});
  s.file->flush();
  const CompactFile reopened(s.file->temporary());
  s.payload_done = true;
  return s.file->temporary();
}

void CompactWriter::seal(const std::string& report_json) {
  State& s = *state_;
  if (s.sealed) throw std::logic_error("CompactWriter: sealed twice");
  finish_payload();
  s.decls.back().shape = {static_cast<std::int64_t>(report_json.size())};
  s.write(as_bytes(report_json));
  s.patch_header(report_json);
  {
    const CompactFile reopened(s.file->temporary());
    if (const auto damaged = reopened.verify(); !damaged.empty())
      throw failure(s.path.string(), "the bytes that were written", "others in " + damaged.front(), "the disk or memory is faulty");
  }
  if (fs::exists(fs::symlink_status(s.path)))
    throw usage_error(s.path.string(), "an output that does not exist yet", "one that appeared meanwhile");
  s.file->commit();
  s.sealed = true;
}

}  // namespace pare
