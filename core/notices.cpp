#include "core/notices.h"

#include <algorithm>
#include <cstdint>

namespace pare {
namespace {

constexpr std::uintmax_t kMostBytes = 1 << 20;

bool within(const fs::path& path, const fs::path& folder) {
  const auto [at, unused] = std::mismatch(folder.begin(), folder.end(), path.begin(), path.end());
  return at == folder.end();
}

}  // namespace

const std::vector<std::string>& licence_file_names() {
  static const std::vector<std::string> kNames = {"LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"};
  return kNames;
}

bool is_notice(const std::string& name) {
  const auto& licences = licence_file_names();
  return name == kModelCard || std::find(licences.begin(), licences.end(), name) != licences.end();
}

std::string notice_obstacle(const fs::path& folder, const std::string& name) {
  std::error_code problem;
  const fs::path file = folder / name;
  if (!fs::exists(fs::symlink_status(file, problem)) || fs::is_directory(file, problem)) return "";
  if (fs::is_symlink(file, problem)) {
    const fs::path home = fs::canonical(folder, problem), target = fs::canonical(file, problem);
    if (problem) return "a link that leads nowhere";
    const bool cached =
        !cached_model_name(home).empty() && within(target, home.parent_path().parent_path() / "blobs");
    if (!within(target, home) && !cached) return "a link that leaves the folder";
  }
  if (!fs::is_regular_file(file, problem)) return "no regular file";
  if (fs::file_size(file, problem) > kMostBytes || problem) return "more than 1 MiB";
  return "";
}

std::optional<std::string> read_notice(const fs::path& folder, const std::string& name) {
  if (!fs::is_regular_file(folder / name) || !notice_obstacle(folder, name).empty()) return std::nullopt;
  return read_text(folder / name);
}

std::string cached_model_name(const fs::path& folder) {
  const fs::path whole = fs::absolute(folder).lexically_normal();
  const fs::path snapshots = (whole.has_filename() ? whole : whole.parent_path()).parent_path();
  const std::string repository = snapshots.parent_path().filename().string();
  constexpr std::string_view kModels = "models--";
  if (snapshots.filename() != "snapshots" || !repository.starts_with(kModels)) return "";
  std::string name = repository.substr(kModels.size());
  if (const std::size_t at = name.find("--"); at != std::string::npos) name.replace(at, 2, "/");
  return name;
}

}  // namespace pare
