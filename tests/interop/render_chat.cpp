// Renders chat templates for tests/interop/chat_templates.py: one request a line on stdin,
// {"template": text, "variables": {"messages": [...], ...}}, one answer a line, {"text": ...} or {"error": ...}.
#include <iostream>

#include "core/chat_template.h"
#include "core/error.h"
#include "tests/chat_moment.h"

int main() {
  const std::tm now = pare::testing::chat_moment();
  for (std::string line; std::getline(std::cin, line);) {
    pare::Json answer;
    try {
      const pare::Json request = pare::parse_json(line, "stdin");
      const pare::Json& variables = request.at("variables");
      const auto chat = pare::ChatTemplate::parse(request.at("template").get<std::string>(), "template");
      answer["text"] = chat.render(variables.at("messages"), variables.value("add_generation_prompt", false), now,
                                   variables);
    } catch (const pare::Error& problem) {
      answer["error"] = problem.what();
    }
    std::cout << answer.dump(-1, ' ', false, pare::Json::error_handler_t::replace) << "\n" << std::flush;
  }
}
