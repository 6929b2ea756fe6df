// A server on a loopback socket with a tiny random model, and clients of it.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "runtime/serve/server.h"
#include "runtime/verbs/generate.h"
#include "tests/runtime/tiny_model.h"

namespace pare::testing {

constexpr const char* kTinyChat =
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

// With `ends`, <|im_end|> ends a text; without, nothing does.
inline fs::path write_served_model(const fs::path& path, bool ends = true, bool chat = true,
                                   std::optional<LongRope> rope = {}) {
  TokenizerTraining training;
  training.vocab_size = 290;
  training.special_tokens = {"<|begin|>", "<|im_start|>", "<|im_end|>"};
  const std::string tokenizer = train_tokenizer({"once upon a time there was a time, a t\xC3\xA9l\xC3\xA9"}, training);
  Json config = {{"bos_token", "<|begin|>"}, {"eos_token", "<|im_end|>"}};
  if (chat) config["chat_template"] = kTinyChat;
  ModelConfig shape = tiny_config(rope ? "phi3" : "llama", 32, 64, 4, 2, 8, 290, !rope);
  shape.rope_long = rope;
  shape.fused_qkv = shape.fused_gate_up = rope.has_value();
  shape.max_position_embeddings = 1 << 16;
  if (!ends) shape.eos_ids.clear();
  write_tiny_model(path, shape, {CodecKind::kQ8, 32}, 5,
                   {{"tokenizer.json", tokenizer}, {"tokenizer_config.json", config.dump()}});
  return path;
}

inline serve::ServedModel served_model(const fs::path& path, std::int64_t context = 0, int threads = 1) {
  serve::ServedModel model;
  EngineOptions options;
  options.threads = threads;
  model.engine = Engine::open(path, options);
  model.name = "tiny";
  model.context = context > 0 ? context : model.engine->config().max_position_embeddings;
  model.ends = model.engine->config().eos_ids;
  const auto file = [&](const std::string& name) { return model.engine->file().embedded(name); };
  if (ChatTemplate::source(file, "")) {
    model.chat = chat_template(*model.engine);
    model.chat_ends = model.ends;
  }
  return model;
}

struct RunningServer {
  explicit RunningServer(const fs::path& path, serve::ServerOptions options = {}, std::int64_t context = 400)
      : model(served_model(path, context)), server(model, with(options, context)), client("127.0.0.1", server.port()) {
    client.set_read_timeout(60);
  }
  static serve::ServerOptions with(serve::ServerOptions options, std::int64_t context) {
    options.scheduling.context = context;
    return options;
  }
  httplib::Result post(const Json& body, const char* path = "/v1/completions") {
    httplib::Client own("127.0.0.1", server.port());  // for use from any thread
    own.set_read_timeout(60);
    return own.Post(path, body.dump(), "application/json");
  }
  // The answer to what must succeed.
  Json ask(const Json& body, const char* path = "/v1/completions") {
    const httplib::Result result = post(body, path);
    if (!result) throw std::runtime_error("no answer: " + httplib::to_string(result.error()));
    EXPECT_EQ(result->status, 200) << result->body;
    return Json::parse(result->body);
  }
  // The objects of a stream; the last event must be [DONE].
  std::vector<Json> stream(Json body, const char* path = "/v1/completions") {
    body["stream"] = true;
    const httplib::Result result = post(body, path);
    if (!result) throw std::runtime_error("no answer: " + httplib::to_string(result.error()));
    EXPECT_EQ(result->get_header_value("Content-Type"), "text/event-stream");
    return events(result->body);
  }
  static std::vector<Json> events(const std::string& text) {
    std::vector<Json> out;
    bool done = false;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t end = text.find("\n\n", at);
      EXPECT_EQ(text.compare(at, 6, "data: "), 0) << text.substr(at, 40);
      const std::string data = text.substr(at + 6, end - at - 6);
      EXPECT_FALSE(done);
      if (data == "[DONE]") done = true;
      else out.push_back(Json::parse(data));
      at = end + 2;
    }
    EXPECT_TRUE(done);
    return out;
  }

  serve::ServedModel model;
  serve::Server server;
  httplib::Client client;
};

// A client that does not behave.
class RawClient {
 public:
  explicit RawClient(int port) : socket_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (::connect(socket_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0)
      throw std::runtime_error("connect");
  }
  ~RawClient() { close(); }
  void send(const std::string& text) const {
    ASSERT_EQ(::send(socket_, text.data(), text.size(), MSG_NOSIGNAL), std::ssize(text));
  }
  // As much as the server takes.
  void send_as_taken(const std::string& text) const {
    for (std::size_t sent = 0; sent < text.size();) {
      const ssize_t count = ::send(socket_, text.data() + sent, text.size() - sent, MSG_NOSIGNAL);
      if (count <= 0) return;
      sent += static_cast<std::size_t>(count);
    }
  }
  void end() const { ::shutdown(socket_, SHUT_WR); }
  void post(const Json& body, const char* path = "/v1/completions") const {
    const std::string text = body.dump();
    send(std::string("POST ") + path + " HTTP/1.1\r\nHost: localhost\r\nContent-Length: " +
         std::to_string(text.size()) + "\r\n\r\n" + text);
  }
  std::string receive(std::size_t most) const {
    std::string out(most, '\0');
    const ssize_t got = ::recv(socket_, out.data(), out.size(), 0);
    out.resize(got > 0 ? static_cast<std::size_t>(got) : 0);
    return out;
  }
  std::string receive_all() const {
    std::string out;
    for (std::string piece = receive(1 << 16); !piece.empty(); piece = receive(1 << 16)) out += piece;
    return out;
  }
  void close() {
    if (socket_ >= 0) ::close(socket_);
    socket_ = -1;
  }

 private:
  int socket_;
};

// True as soon as `holds` does, within ten seconds.
template <class Holds>
bool comes_true(Holds holds) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (!holds()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return true;
}

}  // namespace pare::testing
