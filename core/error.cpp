#include "core/error.h"

namespace pare {
namespace {

std::string compose(const std::string& place, const std::string& expected, const std::string& found,
                    const std::string& hint) {
  std::string text = place;
  if (!expected.empty()) text += (text.empty() ? "expected " : ": expected ") + expected;
  if (!found.empty()) text += (expected.empty() ? ": " : ", found ") + found;
  if (!hint.empty()) text += "\n  hint: " + hint;
  return text;
}

}  // namespace

Error::Error(ExitCode code, std::string place, std::string expected, std::string found, std::string hint)
    : std::runtime_error(compose(place, expected, found, hint)),
      code_(code),
      place_(std::move(place)),
      expected_(std::move(expected)),
      found_(std::move(found)),
      hint_(std::move(hint)) {}

Error input_error(std::string place, std::string expected, std::string found, std::string hint) {
  return {ExitCode::kInput, std::move(place), std::move(expected), std::move(found), std::move(hint)};
}
Error usage_error(std::string place, std::string expected, std::string found, std::string hint) {
  return {ExitCode::kUsage, std::move(place), std::move(expected), std::move(found), std::move(hint)};
}
Error failure(std::string place, std::string expected, std::string found, std::string hint) {
  return {ExitCode::kFailure, std::move(place), std::move(expected), std::move(found), std::move(hint)};
}

}  // namespace pare
