// Every refusal: its status, the field it names, and OpenAI's form.
#include <fmt/format.h>

#include <map>
#include <random>

#include "core/error.h"
#include "tests/serve/running_server.h"

namespace pare {
namespace {

using namespace pare::testing;

class Errors : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    scratch_ = std::make_unique<ScratchFolder>();
    write_served_model(scratch_->path / "m.pare");
    serve::ServerOptions options;
    options.body_bytes = 20000;
    running_ = std::make_unique<RunningServer>(scratch_->path / "m.pare", options, 100);
  }
  static void TearDownTestSuite() {
    running_.reset();
    scratch_.reset();
  }
  static void expect(const httplib::Result& result, int status, const std::string& text, const Json& param = nullptr,
                     const Json& code = nullptr) {
    ASSERT_TRUE(result) << text;
    EXPECT_EQ(result->status, status) << result->body;
    EXPECT_EQ(result->get_header_value("Content-Type"), "application/json");
    const Json error = Json::parse(result->body).at("error");
    EXPECT_NE(error.at("message").get<std::string>().find(text), std::string::npos) << error.dump();
    EXPECT_EQ(error.at("type"), status < 500 && status != 429 ? "invalid_request_error" : "server_error");
    EXPECT_EQ(error.at("param"), param) << error.dump();
    EXPECT_EQ(error.at("code"), code) << error.dump();
  }
  static void refused(Json change, const std::string& text, const Json& param, const Json& code = nullptr) {
    Json body = {{"prompt", "once"}, {"max_tokens", 2}};
    body.update(change);
    expect(running_->post(body), 400, text, param, code);
  }
  static void chat_refused(Json change, const std::string& text, const Json& param, const Json& code = nullptr) {
    Json body = {{"messages", {{{"role", "user"}, {"content", "once"}}}}, {"max_tokens", 2}};
    body.update(change);
    expect(running_->post(body, "/v1/chat/completions"), 400, text, param, code);
  }
  static std::unique_ptr<ScratchFolder> scratch_;
  static std::unique_ptr<RunningServer> running_;
};
std::unique_ptr<ScratchFolder> Errors::scratch_;
std::unique_ptr<RunningServer> Errors::running_;

TEST_F(Errors, BodiesThatAreNoObject) {
  for (const char* body : {"", "{", "{\"prompt\": \"a\",}", "{\"prompt\": \"\xFF\"}", "{\"a\": 1, \"a\": 2}", "{} x"})
    expect(running_->client.Post("/v1/completions", body, "application/json"), 400, "body", nullptr, "invalid_json");
  expect(running_->client.Post("/v1/completions", std::string(1000, '['), "application/json"), 400, "nest", nullptr,
         "invalid_json");
  std::string many = "{\"\": 0";
  for (int i = 0; i < 400; ++i) many += fmt::format(",\"{}\":0", i);
  expect(running_->client.Post("/v1/completions", many + "}", "application/json"), 400, "keys in an object", nullptr,
         "invalid_json");
  for (const char* body : {"[]", "1", "null"})
    expect(running_->client.Post("/v1/completions", body, "application/json"), 400, "object");
  httplib::MultipartFormDataItems form = {{"prompt", "once", "", ""}};
  expect(running_->client.Post("/v1/completions", form), 400, "multipart");
}

TEST_F(Errors, FieldsThatAreNotKnownOrNotOfTheirKind) {
  refused({{"max_token", 3}}, "did you mean max_tokens", "max_token", "unknown_field");
  refused({{"messages", Json::array()}}, "no such field", "messages", "unknown_field");
  refused({{"prompt", nullptr}}, "found none", "prompt");
  for (const Json& prompt : {Json(1), Json::array(), Json{{"a", 1}}, Json{"a", 1}, Json{{1}, "a"}, Json(true)})
    refused({{"prompt", prompt}}, "prompt", "prompt");
  refused({{"prompt", std::vector<std::string>(2049, "a")}}, "at most 2048", "prompt");
  refused({{"prompt", {1, 290}}}, "0 to 289", "prompt");
  refused({{"prompt", {1, -1}}}, "0 to 289", "prompt");
  refused({{"prompt", {1, 1.5}}}, "whole number", "prompt");
  refused({{"prompt", {{1}, Json::array()}}}, "at least one token", "prompt[1]");
  refused({{"max_tokens", -1}}, "whole number from 0", "max_tokens");
  refused({{"max_tokens", 2.5}}, "whole number", "max_tokens");
  refused({{"max_tokens", "2"}}, "whole number", "max_tokens");
  refused({{"max_tokens", 18446744073709551615u}}, "whole number", "max_tokens");
  refused({{"temperature", -0.1}}, "0 to 2", "temperature");
  refused({{"temperature", "hot"}}, "number", "temperature");
  refused({{"top_p", 1.1}}, "0 to 1", "top_p");
  refused({{"seed", 1.5}}, "whole number", "seed");
  refused({{"n", 2}}, "expected 1", "n");
  refused({{"best_of", 2}}, "expected 1", "best_of");
  refused({{"presence_penalty", 0.5}}, "expected 0", "presence_penalty");
  refused({{"frequency_penalty", 0.5}}, "expected 0", "frequency_penalty");
  refused({{"logit_bias", {{"5", 1}}}}, "expected {}", "logit_bias");
  refused({{"suffix", "x"}}, "expected none", "suffix");
  refused({{"echo", 1}}, "true or false", "echo");
  refused({{"stream", "yes"}}, "true or false", "stream");
  refused({{"logprobs", true}}, "whole number", "logprobs");
  refused({{"logprobs", 21}}, "0 to 20", "logprobs");
  refused({{"stop", ""}}, "none of them empty", "stop");
  refused({{"stop", {"a", 1}}}, "list", "stop");
  refused({{"stop", std::vector<std::string>(17, "a")}}, "at most 16", "stop");
  refused({{"stream_options", {{"include_usage", true}}}}, "only where stream", "stream_options");
  refused({{"stream", true}, {"stream_options", {{"usage", true}}}}, "no such field", "stream_options.usage",
          "unknown_field");
  refused({{"stream", true}, {"stream_options", 1}}, "object", "stream_options");
  refused({{"user", 5}}, "a text", "user");
  const Json many = std::vector<std::string>(2048, "a");  // each may have 100 tokens
  refused({{"prompt", many}, {"max_tokens", 1000}, {"logprobs", 20}}, "at most 4194304", "logprobs");
  // What asks for nothing is taken.
  EXPECT_EQ(running_->post({{"prompt", "once"}, {"max_tokens", 1}, {"n", 1}, {"best_of", 1}, {"presence_penalty", 0},
                            {"frequency_penalty", 0.0}, {"logit_bias", Json::object()}, {"suffix", nullptr},
                            {"user", "me"}, {"stop", nullptr}, {"logprobs", nullptr}, {"seed", nullptr}})
                ->status, 200);
}

TEST_F(Errors, Chats) {
  chat_refused({{"messages", nullptr}}, "at least one message", "messages");
  chat_refused({{"messages", Json::array()}}, "at least one message", "messages");
  chat_refused({{"messages", {"hello"}}}, "object", "messages[0]");
  chat_refused({{"messages", {{{"content", "x"}}}}}, "role", "messages[0].role");
  chat_refused({{"messages", {{{"role", "user"}, {"content", 5}}}}}, "text", "messages[0].content");
  chat_refused({{"messages", {{{"role", "user"}, {"content", {{{"type", "image_url"}, {"text", "x"}}}}}}}}, "text",
               "messages[0].content[0].type");
  chat_refused({{"messages", {{{"role", "user"}, {"tool_call_ids", nullptr}}}}}, "no such field",
               "messages[0].tool_call_ids", "unknown_field");
  chat_refused({{"messages", {{{"role", "user"}, {"tool_calls", {{{"id", "x"}}}}}}}}, "expected null",
               "messages[0].tool_calls");
  chat_refused({{"messages", {{{"role", "assistant"}, {"refusal", "no"}}}}}, "expected null", "messages[0].refusal");
  chat_refused({{"messages", {{{"role", "tool"}, {"content", "x"}}}}}, "no tools here", "messages");
  chat_refused({{"prompt", "x"}}, "no such field", "prompt", "unknown_field");
  chat_refused({{"echo", true}}, "no such field", "echo", "unknown_field");
  chat_refused({{"logprobs", 1}}, "true or false", "logprobs");
  chat_refused({{"top_logprobs", 2}}, "only where logprobs", "top_logprobs");
  chat_refused({{"tools", {{{"type", "function"}}}}}, "expected []", "tools");
  chat_refused({{"response_format", {{"type", "json_object"}}}}, "expected {", "response_format");
  chat_refused({{"max_completion_tokens", 3}}, "not beside", "max_tokens");
  write_served_model(scratch_->path / "plain.pare", true, false);
  RunningServer plain(scratch_->path / "plain.pare");
  expect(plain.post({{"messages", {{{"role", "user"}, {"content", "x"}}}}}, "/v1/chat/completions"), 400,
         "no chat template", nullptr, "no_chat_template");
}

TEST_F(Errors, PromptsBeyondTheContext) {
  const Json long_prompt = std::vector<int>(101, 5);
  refused({{"prompt", long_prompt}}, "at most 100 tokens fit into the context of this model, found 101", "prompt",
          "context_length_exceeded");
  refused({{"prompt", {{1}, long_prompt}}}, "found 101", "prompt", "context_length_exceeded");
  Json body = {{"messages", {{{"role", "user"}, {"content", std::string(400, 'y')}}}}};
  expect(running_->post(body, "/v1/chat/completions"), 400, "at most 100", "messages", "context_length_exceeded");
}

TEST_F(Errors, ModelsPathsAndMethods) {
  expect(running_->post({{"prompt", "a"}, {"model", "gpt-4"}}), 404, "`gpt-4` does not exist", "model",
         "model_not_found");
  expect(running_->client.Get("/v1/models/other"), 404, "`other`", "model", "model_not_found");
  expect(running_->client.Get("/"), 404, "no such path", nullptr, "unknown_path");
  expect(running_->client.Post("/v1/embeddings", "{}", "application/json"), 404, "/v1/completions", nullptr,
         "unknown_path");
  const auto get = running_->client.Get("/v1/completions");
  expect(get, 405, "asked with POST, not with GET", nullptr, "method_not_allowed");
  EXPECT_EQ(get->get_header_value("Allow"), "POST");
  expect(running_->client.Post("/health", "", "text/plain"), 405, "asked with GET", nullptr, "method_not_allowed");
  expect(running_->client.Delete("/v1/models"), 405, "DELETE", nullptr, "method_not_allowed");
  expect(running_->client.Get(("/" + std::string(9000, 'x')).c_str()), 414, "too long");
  const Json named = {{"prompt", "once"}, {"max_tokens", 1}, {"model", (scratch_->path / "m.pare").string()}};
  EXPECT_EQ(running_->post(named)->status, 200);  // the file's path is a name too
}

TEST_F(Errors, BodiesThatAreTooLarge) {
  const std::string body = Json{{"prompt", std::string(30000, 'x')}}.dump();
  expect(running_->client.Post("/v1/completions", body, "application/json"), 413, "20000", nullptr, "body_too_large");
  // Without a length in advance.
  std::size_t sent = 0;
  const auto provider = [&](std::size_t, httplib::DataSink& sink) {
    const bool ok = sink.write(body.data(), 1000);
    if ((sent += 1000) >= 50000) sink.done();
    return ok;
  };
  expect(running_->client.Post("/v1/completions", provider, "application/json"), 413, "20000", nullptr,
         "body_too_large");
  // Headers without end.
  RawClient client(running_->server.port());
  client.send("POST /v1/completions HTTP/1.1\r\n");
  const std::string header = "X: " + std::string(4000, 'y') + "\r\n";
  for (int i = 0; i < 30; ++i) client.send(header);
  const std::string answer = client.receive_all();
  EXPECT_TRUE(answer.empty() || answer.find(" 400 ") != std::string::npos) << answer;
  EXPECT_EQ(running_->client.Get("/health")->status, 200);
}

// A page elsewhere that its reader's browser leads here.
TEST_F(Errors, ForeignHostsAndOrigins) {
  const int port = running_->server.port();
  for (const char* host : {"example.com", "127.example.com", "example.com:80", "10.0.0.1", "[::2]:80", "localhost.x"})
    expect(running_->client.Get("/health", {{"Host", host}}), 403, host, nullptr, "foreign_host");
  for (const char* origin : {"http://example.com", "null", "https://127.0.0.1.example.com:443"})
    expect(running_->client.Get("/health", {{"Origin", origin}}), 403, origin, nullptr, "foreign_origin");
  for (const std::string host : {"localhost", "LocalHost:80", "127.0.0.2", "[::1]:80"}) {
    EXPECT_EQ(running_->client.Get("/health", {{"Host", host}})->status, 200) << host;
    EXPECT_EQ(running_->client.Get("/health", {{"Origin", "http://" + host}})->status, 200) << host;
  }
  RawClient without(port);
  without.send("GET /health HTTP/1.0\r\n\r\n");
  EXPECT_NE(without.receive(1000).find(" 200 "), std::string::npos);
}

TEST_F(Errors, LinesOfTheLogStayLines) {
  std::mutex mutex;
  std::vector<std::string> lines;
  serve::ServerOptions options;
  options.log = [&](const std::string& line) {
    const std::lock_guard lock(mutex);
    lines.push_back(line);
  };
  {
    RunningServer logging(scratch_->path / "m.pare", options);
    EXPECT_EQ(logging.client.Get("/a%0Ab%1B[31m%7F")->status, 404);
  }
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_EQ(lines[0], "GET /a\\x0ab\\x1b[31m\\x7f 404");
}

TEST_F(Errors, BodiesWithoutALength) {
  RawClient client(running_->server.port());
  client.send("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n");
  const std::string answer = client.receive_all();
  EXPECT_NE(answer.find(" 411 "), std::string::npos) << answer;
  EXPECT_NE(answer.find("length_required"), std::string::npos) << answer;
}

TEST_F(Errors, FullQueuesAndLimitsOfTime) {
  write_served_model(scratch_->path / "endless.pare", false);
  serve::ServerOptions options;
  options.scheduling.parallel = 1;
  options.scheduling.queue = 1;
  RunningServer small(scratch_->path / "endless.pare", options, 1 << 16);
  const Json endless = {{"prompt", "once"}, {"max_tokens", 60000}, {"stream", true}};
  RawClient running(small.server.port()), waiting(small.server.port());
  running.post(endless);
  ASSERT_TRUE(comes_true([&] { return small.server.counts().running == 1; }));
  waiting.post(endless);
  ASSERT_TRUE(comes_true([&] { return small.server.counts().waiting == 1; }));
  const auto refusal = small.post({{"prompt", "once"}});
  expect(refusal, 429, "2 requests", nullptr, "queue_full");
  EXPECT_EQ(refusal->get_header_value("Retry-After"), "1");
  EXPECT_EQ(small.client.Get("/health")->status, 200);
  running.close();
  waiting.close();
  EXPECT_TRUE(comes_true([&] { return small.post({{"prompt", "once"}, {"max_tokens", 1}})->status == 200; }));

  options.scheduling.time_limit = std::chrono::milliseconds(200);
  RunningServer hasty(scratch_->path / "endless.pare", options, 1 << 16);
  expect(hasty.post({{"prompt", "once"}, {"max_tokens", 60000}}), 504, "0.2 seconds", nullptr, "timeout");
  RawClient client(hasty.server.port());  // a stream says it in an event, and is not [DONE]
  client.post({{"prompt", "once"}, {"max_tokens", 60000}, {"stream", true}});
  const std::string text = client.receive_all();
  EXPECT_NE(text.find("\"code\":\"timeout\""), std::string::npos);
  EXPECT_EQ(text.find("[DONE]"), std::string::npos);
}

TEST_F(Errors, AnAnsweredRequestMakesRoomAtOnce) {
  serve::ServerOptions options;
  options.scheduling.parallel = 1;
  options.scheduling.queue = 0;
  RunningServer small(scratch_->path / "m.pare", options);
  for (int i = 0; i < 60; ++i) {
    const auto answer = small.post({{"prompt", {"once", "upon"}}, {"max_tokens", 1 + i % 3}, {"stream", i % 2 == 0}});
    ASSERT_TRUE(answer);
    ASSERT_EQ(answer->status, 200) << answer->body;
  }
}

// Random damage: an answer or a refusal of OpenAI's form; never a crash, never silence.
TEST_F(Errors, DamagedBodiesAreAnswered) {
  const std::string good = Json{{"prompt", {"once", "upon"}}, {"max_tokens", 2},  {"temperature", 0.5}, {"stop", {"a"}},
                                {"logprobs", 1},              {"echo", true},     {"seed", 3},          {"n", 1}}
                               .dump();
  std::mt19937_64 random(4);
  std::map<int, int> statuses;
  for (int round = 0; round < 300; ++round) {
    std::string body = good;
    for (std::uint64_t edits = 1 + random() % 3; edits > 0; --edits) {
      const std::size_t at = random() % body.size();
      switch (random() % 3) {
        case 0: body[at] = static_cast<char>(random()); break;
        case 1: body.erase(at, 1 + random() % 5); break;
        default: body.insert(at, 1, "{}[]\",:0-9e\\"[random() % 12]); break;
      }
      if (body.empty()) body = "x";
    }
    const auto result = running_->client.Post("/v1/completions", body, "application/json");
    ASSERT_TRUE(result) << body;
    ++statuses[result->status];
    ASSERT_TRUE(result->status == 200 || Json::parse(result->body).contains("error")) << body;
  }
  EXPECT_GT(statuses[400], 100);
  EXPECT_EQ(statuses[500], 0);
}

TEST_F(Errors, AddressesThatCannotBeHad) {
  serve::ServerOptions options;
  options.port = running_->server.port();
  EXPECT_THROW(RunningServer(scratch_->path / "m.pare", options), Error);
  options.port = 0;
  options.host = "203.0.113.7";
  EXPECT_THROW(RunningServer(scratch_->path / "m.pare", options), Error);
}

}  // namespace
}  // namespace pare
