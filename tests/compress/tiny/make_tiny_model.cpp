// What the shell tests need besides the program itself:
//   make_tiny_model OUT [layers] [intermediate] [seed]     a random model folder
//   make_tiny_model --text FILE [documents] [seed]         text for it
//   make_tiny_model --json-object FILE                     exit 0 if the file is exactly one JSON object
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "core/json.h"
#include "tests/compress/tiny_model.h"

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fputs(
        "usage: make_tiny_model OUT [layers] [intermediate] [seed] | --text FILE [documents] [seed] | --json-object "
        "FILE\n",
        stderr);
    return 2;
  }
  const auto number = [&](int i, long long fallback) { return argc > i ? std::atoll(argv[i]) : fallback; };
  try {
    if (std::string(argv[1]) == "--text" && argc > 2) {
      pare::write_text(
          argv[2], pare::testing::tiny_text(static_cast<std::uint64_t>(number(4, 3)), static_cast<int>(number(3, 40))));
      return 0;
    }
    if (std::string(argv[1]) == "--json-object" && argc > 2) return pare::read_json(argv[2]).is_object() ? 0 : 1;
    pare::testing::TinyModel model;
    model.layers = number(2, 2);
    model.intermediate = number(3, 128);
    model.seed = static_cast<std::uint64_t>(number(4, 1));
    pare::testing::make_tiny_model(argv[1], model);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
