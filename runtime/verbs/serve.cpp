// `pare serve`: a model behind OpenAI's interface (runtime/serve).
#include <fmt/format.h>

#include <chrono>
#include <cstdio>
#include <ctime>
#include <thread>

#include "core/error.h"
#include "runtime/serve/server.h"
#include "runtime/verbs/cli.h"
#include "runtime/verbs/generate.h"

namespace pare {
namespace {

serve::ServedModel served_model(const Options& options, const Context& context) {
  serve::ServedModel model;
  model.engine = Engine::open(options.get<std::string>("model"), engine_options(options, context));
  model.name = options.get_or<std::string>("name", model.engine->path().stem().string());
  const std::int64_t most = model.engine->config().max_position_embeddings;
  model.context = options.get_or<std::int64_t>("ctx", most);
  if (model.context > most)
    throw input_error("--ctx", fmt::format("at most the model's {} positions", most), std::to_string(model.context));
  model.ends = model.engine->config().eos_ids;
  model.engine->tokenizer();  // says what is wrong with it before anybody asks
  const auto file = [&](const std::string& name) { return model.engine->file().embedded(name); };
  if (ChatTemplate::source(file, "")) {
    model.chat = chat_template(*model.engine);
    model.chat_ends = chat_ends(*model.engine, *model.chat);
  }
  model.created = std::time(nullptr);
  return model;
}

Json run(const Options& options, Context& context) {
  serve::ServerOptions server_options;
  server_options.host = options.get<std::string>("host");
  server_options.port = static_cast<int>(options.get<std::int64_t>("port"));
  server_options.body_bytes = parse_bytes(options.get<std::string>("max-body"), "--max-body");
  server_options.seed = context.seed;
  server_options.scheduling.parallel = static_cast<int>(options.get<std::int64_t>("parallel"));
  server_options.scheduling.queue = static_cast<int>(options.get<std::int64_t>("queue"));
  server_options.scheduling.time_limit = std::chrono::seconds(options.get<std::int64_t>("timeout"));
  server_options.log = [&](const std::string& line) { context.progress->note(line); };
  serve::ServedModel model = served_model(options, context);
  server_options.scheduling.context = model.context;
  const std::string name = model.name;
  const bool chat = model.chat.has_value();

  serve::Server server(std::move(model), server_options);
  const std::string host = server_options.host.find(':') == std::string::npos ? server_options.host
                                                                              : "[" + server_options.host + "]";
  const std::string url = fmt::format("http://{}:{}/v1", host, server.port());
  const std::string line =
      fmt::format("{} at {} ({})", name, url, chat ? "completions, chat" : "completions; no chat template");
  context.print(line);
  if (context.json) std::fprintf(stderr, "%s\n", line.c_str());
  while (!interrupt_requested() && server.listening()) std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const bool died = !server.listening();
  const bool all = server.stop_after(std::chrono::seconds(options.get<std::int64_t>("grace")));
  if (died)
    throw failure(url, "a socket that listens", "one that failed", "start the server again; it answered what it had");
  if (!all)
    throw Error(ExitCode::kInterrupted, "serve", "requests that end within --grace",
                "some that did not; they were cancelled");
  const serve::Scheduler::Counts counts = server.counts();
  return {{"url", url}, {"model", name}, {"passes", counts.passes}, {"tokens", counts.tokens},
          {"most_together", counts.together}};
}

}  // namespace

Command serve_command() {
  Command command;
  command.name = "serve";
  command.summary = "Answer OpenAI's completions and chat completions over HTTP with a compact file or a GGUF file";
  command.options = {
      {.name = "model",
       .type = OptionType::kPath,
       .help = "compact file or GGUF file",
       .required = true,
       .positional = true},
      {.name = "host",
       .type = OptionType::kText,
       .help = "address to listen on; others than this machine's loopback are open to whoever reaches them",
       .default_value = "127.0.0.1"},
      {.name = "port",
       .type = OptionType::kInteger,
       .help = "port to listen on; 0: a free one, which is printed",
       .default_value = 8080,
       .minimum = 0,
       .maximum = 65535},
      {.name = "name",
       .type = OptionType::kText,
       .help = "the model's name in requests; default: the file's, without extension"},
      {.name = "parallel",
       .type = OptionType::kInteger,
       .help = "sequences computed together",
       .default_value = 4,
       .minimum = 1,
       .maximum = 128},
      {.name = "queue",
       .type = OptionType::kInteger,
       .help = "requests that may wait; one more is refused (429)",
       .default_value = 64,
       .minimum = 0,
       .maximum = 4096},
      {.name = "ctx",
       .type = OptionType::kInteger,
       .help = "tokens of a sequence at most; default: what the model takes",
       .minimum = 1},
      {.name = "timeout",
       .type = OptionType::kInteger,
       .help = "seconds that a request may take, waiting included",
       .default_value = 600,
       .minimum = 1,
       .maximum = 1e6},
      {.name = "grace",
       .type = OptionType::kInteger,
       .help = "seconds that requests have to end in when the server is stopped (SIGINT, SIGTERM)",
       .default_value = 10,
       .minimum = 0,
       .maximum = 1e6},
      {.name = "max-body",
       .type = OptionType::kText,
       .help = "size of a request's body at most, such as 512K or 8M",
       .default_value = "8M"},
      act_option(),
      kv_option(),
  };
  command.run = run;
  command.example =
      "pare serve model.pare --port 8080\n"
      "  curl http://127.0.0.1:8080/v1/completions -d '{\"prompt\": \"Once upon a time\", \"max_tokens\": 40}'";
  return command;
}

}  // namespace pare
