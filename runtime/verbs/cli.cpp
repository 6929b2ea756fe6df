#include "runtime/verbs/cli.h"

#include <fmt/format.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "core/error.h"
#include "core/file.h"
#include "core/version.h"

namespace pare {
namespace {

// What the command line gave one command, as raw text; turned into typed JSON after parsing.
struct Given {
  const Command* command = nullptr;
  CLI::App* app = nullptr;
  std::map<std::string, std::string> texts;
  std::map<std::string, std::vector<std::string>> lists;
  std::map<std::string, bool> flags;
};

struct Globals {
  bool json = false, quiet = false;
  int threads = 0;
  std::uint64_t seed = 0;
  bool seed_given = false;
};

std::string help_text(const OptionDecl& decl) {
  std::string text = decl.help;
  if (!decl.choices.empty()) {
    std::string all;
    for (const auto& choice : decl.choices) all += (all.empty() ? "" : "|") + choice;
    text += " {" + all + "}";
  }
  if (!decl.default_value.is_null() && decl.type != OptionType::kFlag && decl.default_value.dump() != "\"\"" &&
      !(decl.default_value.is_array() && decl.default_value.empty()))
    text += " [" +
            (decl.default_value.is_string() ? decl.default_value.get<std::string>() : decl.default_value.dump()) + "]";
  return text;
}

std::string value_name(const OptionDecl& decl) {
  switch (decl.type) {
    case OptionType::kInteger: return "N";
    case OptionType::kNumber: return "X";
    case OptionType::kPath: return "PATH";
    case OptionType::kTextList: return "LIST";
    default: return "TEXT";
  }
}

void declare(Given& given) {
  for (const auto& decl : given.command->options) {
    // Negative numbers and texts that begin with a dash belong to the option before them, so values are texts here.
    std::string names = decl.positional ? decl.name : "--" + decl.name;
    if (!decl.positional && !decl.short_name.empty()) names = "-" + decl.short_name + "," + names;
    CLI::Option* option = nullptr;
    if (decl.type == OptionType::kFlag) {
      // A flag that is on by default needs a way to be switched off.
      if (decl.default_value.is_boolean() && decl.default_value.get<bool>()) names += ",!--no-" + decl.name;
      option = given.app->add_flag(names, given.flags[decl.name], help_text(decl));
    } else if (decl.type == OptionType::kTextList) {
      option = given.app->add_option(names, given.lists[decl.name], help_text(decl))
                   ->delimiter(',')
                   ->type_name(value_name(decl));
      if (!decl.positional) option->expected(1, CLI::detail::expected_max_vector_size);
    } else {
      option = given.app->add_option(names, given.texts[decl.name], help_text(decl))->type_name(value_name(decl));
    }
    if (decl.positional && decl.required) option->required();
  }
}

// Understood before and after the verb.
void declare_globals(CLI::App& app, Globals& globals) {
  app.add_flag("--json", globals.json, "one JSON object on stdout, everything else on stderr")->group("Everywhere");
  app.add_flag("-q,--quiet", globals.quiet, "no progress on stderr")->group("Everywhere");
  app.add_option("--threads", globals.threads, "threads; 0: all cores [0]")
      ->check(CLI::Range(0, 1024))->type_name("N")->group("Everywhere");
  app.add_option_function<std::uint64_t>("--seed", [&globals](const std::uint64_t& seed) {
    globals.seed = seed;
    globals.seed_given = true;
  }, "seed of everything random [0]")->type_name("N")->group("Everywhere");
}

Json collect(const Given& given) {
  Json values = Json::object();
  for (const auto& decl : given.command->options) {
    const CLI::Option* option = given.app->get_option(decl.positional ? decl.name : "--" + decl.name);
    if (option->count() == 0) continue;
    const std::string flag = "--" + decl.name;
    switch (decl.type) {
      case OptionType::kFlag: values[decl.name] = given.flags.at(decl.name); break;
      case OptionType::kTextList: values[decl.name] = given.lists.at(decl.name); break;
      case OptionType::kInteger: {
        const std::string& text = given.texts.at(decl.name);
        std::size_t used = 0;
        std::int64_t number = 0;
        try {
          number = std::stoll(text, &used);
        } catch (const std::exception&) {
          used = 0;
        }
        if (used == 0 || used != text.size()) throw usage_error(flag, "a whole number", "\"" + text + "\"");
        values[decl.name] = number;
        break;
      }
      case OptionType::kNumber: {
        const std::string& text = given.texts.at(decl.name);
        std::size_t used = 0;
        double number = 0;
        try {
          number = std::stod(text, &used);
        } catch (const std::exception&) {
          used = 0;
        }
        if (used == 0 || used != text.size()) throw usage_error(flag, "a number", "\"" + text + "\"");
        values[decl.name] = number;
        break;
      }
      default: values[decl.name] = given.texts.at(decl.name); break;
    }
  }
  return values;
}

// "--temprature": the nearest flag of the command that was meant.
std::string unknown_flag_hint(const Given* given, const std::vector<std::string>& extras) {
  if (given == nullptr) return {};
  std::vector<std::string> names = {"--json", "--quiet", "--threads", "--seed", "--help"};
  for (const auto& decl : given->command->options)
    if (!decl.positional) names.push_back("--" + decl.name);
  std::string text;
  for (const auto& extra : extras) {
    const std::string name = extra.substr(0, extra.find('='));
    if (name.rfind("--", 0) != 0) continue;
    const std::string near = nearest_name(name, names);
    if (!near.empty()) text += (text.empty() ? "" : "; ") + name + ": did you mean " + near + "?";
  }
  return text;
}

void print_error(const Error& error, bool json, const std::string& command, int rank = 0) {
  const std::string who = rank > 0 ? " (rank " + std::to_string(rank) + ")" : "";
  std::fprintf(stderr, "pare%s%s%s: %s\n", command.empty() ? "" : " ", command.c_str(), who.c_str(), error.what());
  if (!json || rank > 0) return;
  const Json object = {
      {"command", command},
      {"ok", false},
      {"exit_code", static_cast<int>(error.code())},
      {"error",
       {{"place", error.place()}, {"expected", error.expected()}, {"found", error.found()}, {"hint", error.hint()}}}};
  std::printf("%s\n", object.dump(-1, ' ', false, Json::error_handler_t::replace).c_str());
}

int execute(const Given& given, const Globals& globals) {
  const Command& command = *given.command;
  Context context;
  const auto fail = [&](const Error& error) {
    print_error(error, globals.json, command.name, context.rank);
    return static_cast<int>(error.code());
  };
  try {
    const Options options(command.options, collect(given), "");
    Progress progress(globals.quiet);
    context.json = globals.json;
    context.quiet = globals.quiet;
    context.threads = globals.threads;
    context.seed = globals.seed;
    context.seed_given = globals.seed_given;
    context.progress = &progress;
#ifdef _OPENMP
    if (globals.threads > 0) omp_set_num_threads(globals.threads);
#endif
    install_interrupt_handler();
    if (command.is_stage)  // what it said stays with what it wrote
      context.before_commit = [&] {
        fs::path out = options.get<std::string>("out");
        if (!out.has_filename()) out = out.parent_path();  // as FolderTransaction reads it
        out += ".partial";
        write_text(out / "report.json", Json{{"command", command.name}, {"rows", context.report.to_json()}}.dump(1) + "\n");
      };
    const Json result = command.run(options, context);
    if (globals.json && context.rank == 0) {
      const Json object = {
          {"command", command.name}, {"ok", true}, {"result", result}, {"rows", context.report.to_json()}};
      std::printf("%s\n", object.dump(-1, ' ', false, Json::error_handler_t::replace).c_str());
    }
    // ferror: a write that failed earlier leaves nothing for the last flush to complain about.
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
      return fail(failure("standard output", "room to write the result", "write error"));
    return 0;
  } catch (const Error& error) {
    return fail(error);
  } catch (const std::bad_alloc&) {
    return fail(Error(ExitCode::kResources, command.name, "enough memory", "none left",
                      "use fewer samples or a smaller context"));
  } catch (const std::filesystem::filesystem_error& error) {
    return fail(failure(error.path1().string(), "", error.code().message()));
  } catch (const std::exception& error) {
    return fail(failure(command.name, "", error.what()));
  }
}

}  // namespace

int run_cli(int argc, char** argv, const std::vector<Command>& commands, const std::string& program_summary) {
  CLI::App app(program_summary, "pare");
  app.set_version_flag("--version", kVersion);
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  Globals globals;
  declare_globals(app, globals);
  std::vector<std::unique_ptr<Given>> all;
  std::vector<std::string> names;
  bool wants_json = false;
  for (int i = 1; i < argc; ++i) wants_json = wants_json || std::string_view(argv[i]) == "--json";
  for (const Command& command : commands) {
    auto given = std::make_unique<Given>();
    given->command = &command;
    given->app = app.add_subcommand(command.name, command.summary);
    if (!command.example.empty()) given->app->footer("Example:\n  " + command.example + "\n");
    declare(*given);
    declare_globals(*given->app, globals);
    names.push_back(command.name);
    all.push_back(std::move(given));
  }
  const auto chosen = [&]() -> const Given* {
    for (const auto& given : all)
      if (given->app->parsed()) return given.get();
    return nullptr;
  };
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& asked) {  // --help, --version
    return app.exit(asked) == 0 ? 0 : 1;
  } catch (const CLI::ParseError& problem) {
    const Given* given = chosen();
    std::string hint = unknown_flag_hint(given, given != nullptr ? given->app->remaining() : app.remaining());
    if (hint.empty() && given == nullptr && argc > 1 && argv[1][0] != '-') {
      const std::string near = nearest_name(argv[1], names);
      if (!near.empty()) hint = "did you mean `pare " + near + "`?";
    }
    if (hint.empty()) hint = given != nullptr ? "see pare " + given->command->name + " --help" : "see pare --help";
    const std::string name = given != nullptr ? given->command->name : "";
    print_error(usage_error("command line", "", problem.what(), hint), wants_json, name);
    return static_cast<int>(ExitCode::kUsage);
  }
  return execute(*chosen(), globals);
}

}  // namespace pare
