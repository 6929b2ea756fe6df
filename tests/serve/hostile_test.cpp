// One crafted request for every class of attack on HTTP servers and on what parses their bodies: refused with a status
// and a reason, or the connection closed; the server goes on as before.
#include <algorithm>

#include "tests/serve/running_server.h"

namespace pare {
namespace {

using namespace pare::testing;

std::string from_hex(const std::string& hex) {
  std::string out;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2)
    out += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return out;
}

// 300 kB of a prompt, packed by gzip.
std::string bomb() {
  return from_hex("1f8b0800000000000203edc1510d00100005c02af66268238031f367baeb61777732d7e873a79634" +
                  std::string(580, '0') + "f848ee03072e2c14ee930400");
}

std::string posted(const std::string& headers, const std::string& body, const char* path = "/v1/completions") {
  return std::string("POST ") + path + " HTTP/1.1\r\nHost: localhost\r\n" + headers + "\r\n" + body;
}
std::string json_of(const std::string& body) {
  return posted("Content-Length: " + std::to_string(body.size()) + "\r\n", body);
}
std::string chat_of(const std::string& body) {
  return posted("Content-Length: " + std::to_string(body.size()) + "\r\n", body, "/v1/chat/completions");
}
std::string asked(const std::string& line, const std::string& headers = "") {
  return line + " HTTP/1.1\r\nHost: localhost\r\n" + headers + "\r\n";
}

struct Crafted {
  const char* name;
  std::string bytes;
  std::vector<int> statuses;  // one of these; 0: closed without an answer
  const char* says = "";      // part of the answer
  bool ends = false;          // the client says that no more comes
};

const std::vector<Crafted>& crafted() {
  static const std::vector<Crafted> kCases = {
      // ---- the protocol
      {"TlsOnAPlainPort", from_hex("16030100a5010000a10303") + std::string(160, '\x5a') + "\n", {400}, "no request"},
      {"PrefaceOfHttp2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 404}, "error"},
      {"LineWithoutVersion", "GET /health\r\n\r\n", {400}, "no request"},
      {"MethodOfNobody", asked("BREW /v1/completions"), {400}, "no request"},
      {"Tunnel", asked("CONNECT example.com:443"), {400, 404, 405}, "error"},
      {"Trace", asked("TRACE /v1/completions"), {400, 404, 405}, "error"},
      {"AddressOfAnotherServer", asked("GET http://example.com/health"), {400, 403, 404}, "error"},
      {"AddressTooLong", asked("GET /" + std::string(20000, 'a')), {400, 414}, "error"},
      {"PathUpwards", asked("GET /../../../../etc/passwd"), {404}, "no such path"},
      {"PathUpwardsInPercents", asked("GET /v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd"), {404}, "does not exist"},
      {"PathWithAZeroByte", asked("GET /health%00.txt"), {404}, "no such path"},
      {"LineBreaksInAPath", asked("GET /v1/models/x%0d%0aSet-Cookie:%20a=b"), {404}, "does not exist"},
      {"HeaderTooLong", asked("GET /health", "X: " + std::string(60000, 'x') + "\r\n"), {400, 0}},
      {"HeadersWithoutEnd", asked("GET /health", [] {
         std::string all;
         for (int i = 0; i < 20000; ++i) all += "X" + std::to_string(i) + ": 1\r\n";
         return all;
       }()), {400, 0}},
      {"LengthBelowNothing", posted("Content-Length: -1\r\n", "{}"), {400}, "Content-Length"},
      {"LengthThatIsNoNumber", posted("Content-Length: 0x2\r\n", "{}"), {400}, "Content-Length"},
      {"LengthBeyondNumbers", posted("Content-Length: 99999999999999999999\r\n", "{}"), {400}, "Content-Length"},
      {"LengthBeyondMemory", posted("Content-Length: 9223372036854775807\r\n", "{}"), {413}, "too_large"},
      {"TwoLengths", posted("Content-Length: 2\r\nContent-Length: 30\r\n", "{}"), {400}, "Content-Length"},
      {"LengthAndChunks", posted("Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", "2\r\n{}\r\n0\r\n\r\n"), {400},
       "Transfer-Encoding"},
      {"ChunkBelowNothing", posted("Transfer-Encoding: chunked\r\n", "-1\r\n{}\r\n0\r\n\r\n"), {400}, "body"},
      {"ChunkBeyondMemory", posted("Transfer-Encoding: chunked\r\n", "ffffffffffffffff\r\n{}\r\n0\r\n\r\n"), {400, 413},
       "body"},
      {"ChunkBeyondNumbers", posted("Transfer-Encoding: chunked\r\n", std::string(400, 'f') + "\r\n{}\r\n0\r\n\r\n"),
       {400, 413}, "body"},
      {"ChunkThatIsNoNumber", posted("Transfer-Encoding: chunked\r\n", "zz\r\n{}\r\n0\r\n\r\n"), {400}, "body"},
      {"CodingOfNobody", posted("Transfer-Encoding: identity, xz\r\n", "{}"), {400}, "Transfer-Encoding"},
      {"BodyThatEndsEarly", posted("Content-Length: 100\r\n", "{\"prompt\": "), {400, 0}, "ended early", true},
      {"PackedBomb", posted("Content-Encoding: gzip\r\nContent-Length: " + std::to_string(bomb().size()) + "\r\n",
                            bomb()), {413, 415}, "error"},
      {"PackedDamage", posted("Content-Encoding: gzip\r\nContent-Length: 30\r\n", std::string(30, '\x1f')), {400, 415},
       "error"},
      {"FormOfFiles", posted("Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 60\r\n",
                             "--b\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n" + std::string(9, 'x')),
       {400}, "multipart"},
      {"RebindingOfNames", "GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", {403}, "foreign_host"},
      {"PageOfAnotherOrigin", asked("GET /health", "Origin: https://evil.example\r\n"), {403}, "foreign_origin"},
      // ---- the body
      {"Nesting", json_of("{\"prompt\":" + std::string(9000, '[') + "}"), {400}, "nest"},
      {"TwiceTheSameKey", json_of(R"({"prompt":"a","max_tokens":1,"max_tokens":100})"), {400}, "twice"},
      {"ManyKeys", json_of([] {
         std::string all = "{\"prompt\":\"a\"";
         for (int i = 0; i < 1000; ++i) all += ",\"k" + std::to_string(i) + "\":0";
         return all + "}";
       }()), {400}, "keys in an object"},
      {"NumberBeyondNumbers", json_of(R"({"prompt":"a","temperature":1e999})"), {400}, "invalid_json"},
      {"NotANumber", json_of(R"({"prompt":"a","temperature":NaN})"), {400}, "invalid_json"},
      {"HalfACharacter", json_of(R"({"prompt":"\ud800"})"), {400}, "invalid_json"},
      {"NoUtf8", json_of("{\"prompt\":\"\xc0\x80\"}"), {400}, "invalid_json"},
      {"TokenBelowNothing", json_of(R"({"prompt":[-1]})"), {400}, "0 to 289"},
      {"TokenBeyondTheVocabulary", json_of(R"({"prompt":[4294967297]})"), {400}, "0 to 289"},
      {"MoreTokensThanThereAre", json_of(R"({"prompt":"a","max_tokens":18446744073709551615})"), {400}, "max_tokens"},
      {"MoreAnswersThanMemory", json_of(R"({"prompt":"a","n":1000000000})"), {400}, "expected 1"},
      {"PromptBeyondTheContext", json_of("{\"prompt\":\"" + std::string(9000, 'b') + "\"}"), {400}, "context"},
      {"RoleThatTheTemplateRefuses", chat_of(R"({"messages":[{"role":"tool","content":"x"}]})"), {400}, "no tools"},
      {"FileToFetch", chat_of(R"({"messages":[{"role":"user","content":[{"type":"image_url",)"
                              R"("image_url":{"url":"file:///etc/passwd"}}]}]})"), {400}, "no such field"},
  };
  return kCases;
}

class HostileRequest : public ::testing::TestWithParam<std::size_t> {
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
  static std::unique_ptr<ScratchFolder> scratch_;
  static std::unique_ptr<RunningServer> running_;
};
std::unique_ptr<ScratchFolder> HostileRequest::scratch_;
std::unique_ptr<RunningServer> HostileRequest::running_;

TEST_P(HostileRequest, IsRefusedWithStatusAndReason) {
  const Crafted& given = crafted()[GetParam()];
  std::string answer;
  {
    RawClient client(running_->server.port());
    client.send_as_taken(given.bytes);
    if (given.ends) client.end();
    answer = client.receive_all();
  }
  int status = 0;
  if (answer.starts_with("HTTP/1.1 ") && answer.size() > 12) status = std::stoi(answer.substr(9, 3));
  EXPECT_NE(std::find(given.statuses.begin(), given.statuses.end(), status), given.statuses.end()) << answer;
  EXPECT_EQ(answer.find("\nSet-Cookie:"), std::string::npos) << answer;
  EXPECT_EQ(answer.find("root:"), std::string::npos) << answer;
  if (status == 0) EXPECT_EQ(answer, "");
  else EXPECT_NE(answer.find(given.says), std::string::npos) << answer;
  const auto health = running_->client.Get("/health");
  ASSERT_TRUE(health);
  EXPECT_EQ(health->status, 200);
  EXPECT_EQ(Json::parse(health->body).at("running"), 0);
}

INSTANTIATE_TEST_SUITE_P(Classes, HostileRequest, ::testing::Range<std::size_t>(0, crafted().size()),
                         [](const auto& given) { return std::string(crafted()[given.param].name); });

// What a prompt says is text: the model's template does not run it.
TEST_F(HostileRequest, TemplatesInMessagesAreText) {
  const auto tokens = [&](const std::string& content) {
    const Json body = {{"messages", {{{"role", "user"}, {"content", content}}}}, {"max_tokens", 1}};
    return running_->ask(body, "/v1/chat/completions").at("usage").at("prompt_tokens").get<int>();
  };
  EXPECT_GT(tokens("{{ 7 * 7 }}"), tokens("49"));
}

}  // namespace
}  // namespace pare
