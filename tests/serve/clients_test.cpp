// Clients that vanish, read slowly or come all at once, and a server that is stopped under them.
#include <csignal>
#include <fstream>
#include <sys/wait.h>
#include <thread>

#include "tests/serve/running_server.h"

namespace pare {
namespace {

using namespace pare::testing;

class Clients : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    scratch_ = std::make_unique<ScratchFolder>();
    write_served_model(scratch_->path / "endless.pare", false);
  }
  static void TearDownTestSuite() { scratch_.reset(); }
  static fs::path model() { return scratch_->path / "endless.pare"; }
  static Json endless(bool stream) { return {{"prompt", "once"}, {"max_tokens", 60000}, {"stream", stream}}; }
  static constexpr std::int64_t kContext = 1 << 16;
  static std::unique_ptr<ScratchFolder> scratch_;
};
std::unique_ptr<ScratchFolder> Clients::scratch_;

TEST_F(Clients, WhoVanishesIsNotComputedFor) {
  RunningServer running(model(), {}, kContext);
  for (const bool stream : {false, true}) {
    RawClient client(running.server.port());
    client.post(endless(stream));
    ASSERT_TRUE(comes_true([&] { return running.server.counts().running == 1; }));
    if (stream) {
      EXPECT_NE(client.receive(1000).find("200 OK"), std::string::npos);
    }
    client.close();
    EXPECT_TRUE(comes_true([&] { return running.server.counts().running == 0; })) << stream;
  }
  EXPECT_LT(running.server.counts().tokens, 60000);
  EXPECT_EQ(running.ask({{"prompt", "once"}, {"max_tokens", 3}}).at("usage").at("completion_tokens"), 3);
}

TEST_F(Clients, SlowReadersStandStillAlone) {
  RunningServer running(model(), {}, kContext);
  RawClient slow(running.server.port());
  Json body = endless(true);
  body["logprobs"] = 20;
  slow.post(body);
  // What the sockets hold is soon full; then nothing more is computed for this client.
  std::int64_t before = -1;
  ASSERT_TRUE(comes_true([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(150));
    const std::int64_t now = running.server.counts().tokens;
    return std::exchange(before, now) == now && now > 0;
  }));
  EXPECT_LT(before, 60000);
  EXPECT_EQ(running.server.counts().running, 1);
  for (int i = 0; i < 5; ++i)
    EXPECT_EQ(running.ask({{"prompt", "upon"}, {"max_tokens", 30}}).at("usage").at("completion_tokens"), 30);
  std::string text;  // and it goes on where the client does
  while (text.size() < 20u << 20 && running.server.counts().tokens == before + 5 * 31) {
    const std::string piece = slow.receive(1 << 16);
    ASSERT_FALSE(piece.empty());
    text += piece;
  }
  EXPECT_GT(running.server.counts().tokens, before);
}

TEST_F(Clients, ManyPromptsOfOneDoNotKeepOthersWaiting) {
  serve::ServerOptions options;
  options.scheduling.parallel = 2;
  RunningServer running(model(), options, kContext);
  std::thread many([&] {
    const Json prompts = std::vector<std::string>(20, "once");
    EXPECT_EQ(running.ask({{"prompt", prompts}, {"max_tokens", 400}}).at("choices").size(), 20u);
  });
  ASSERT_TRUE(comes_true([&] { return running.server.counts().running == 2; }));
  running.ask({{"prompt", "upon"}, {"max_tokens", 1}});
  EXPECT_LT(running.server.counts().tokens, 10 * 400);
  many.join();
}

TEST_F(Clients, LongPromptsBesideOthers) {
  serve::ServerOptions options;
  options.scheduling.parallel = 3;
  RunningServer running(model(), options, kContext);
  RawClient decoding(running.server.port());
  decoding.post(endless(true));
  ASSERT_TRUE(comes_true([&] { return running.server.counts().passes > 2; }));
  const Json body = {
      {"prompt", random_ids(900, 290, 3)}, {"max_tokens", 3}, {"temperature", 0}, {"logprobs", 0}, {"echo", true}};
  const Json beside = running.ask(body).at("choices");
  decoding.close();
  EXPECT_TRUE(comes_true([&] { return running.server.counts().running == 0; }));
  EXPECT_EQ(running.ask(body).at("choices"), beside);
}

// A file of which prompts with token 5, and they alone, give logits that are not finite.
void write_spoiled_model(const fs::path& path) {
  ModelConfig shape = tiny_config("llama", 32, 64, 4, 2, 8, 290, false);
  shape.max_position_embeddings = 1 << 16;
  shape.eos_ids.clear();
  TokenizerTraining training;
  training.vocab_size = 290;
  write_tiny_model(path, shape, {CodecKind::kF16}, 5,
                   {{"tokenizer.json", train_tokenizer({"once upon a time there was a time"}, training)}});
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  std::uint64_t size = 0;
  file.read(reinterpret_cast<char*>(&size), sizeof(size));
  std::string header(size, '\0');
  file.read(header.data(), static_cast<std::streamsize>(size));
  const std::uint64_t begin = Json::parse(header).at("model.embed_tokens.weight").at("data_offsets")[0];
  file.seekp(static_cast<std::streamoff>(8 + size + begin + 5 * 32 * 2));
  for (int i = 0; i < 32; ++i) file.write("\x00\x7E", 2);
}

TEST_F(Clients, WhoFailsFailsAlone) {
  write_spoiled_model(scratch_->path / "spoiled.pare");
  RunningServer running(scratch_->path / "spoiled.pare", {}, kContext);
  RawClient decoding(running.server.port());
  decoding.post({{"prompt", {7, 8}}, {"max_tokens", 60000}, {"stream", true}, {"temperature", 0}});  // never 5
  ASSERT_TRUE(comes_true([&] { return running.server.counts().passes > 2; }));
  for (const int max_tokens : {1, 0}) {
    const auto failed = running.post(
        {{"prompt", {5, 6, 7}}, {"max_tokens", max_tokens}, {"logprobs", 0}, {"echo", true}});
    ASSERT_TRUE(failed);
    EXPECT_EQ(failed->status, 500) << failed->body;
    EXPECT_NE(failed->body.find("not finite"), std::string::npos) << failed->body;
    // The answer leaves before its sequence does.
    EXPECT_TRUE(comes_true([&] { return running.server.counts().running == 1; }));
  }
  const std::int64_t before = running.server.counts().passes;
  EXPECT_TRUE(comes_true([&] { return running.server.counts().passes > before + 5; }));
}

TEST_F(Clients, StoppingWaitsForAnswersThatAreRead) {
  const std::vector<std::vector<std::int32_t>> prompts(300, random_ids(30, 290, 3));  // more than the sockets hold
  const Json body = {{"prompt", prompts}, {"max_tokens", 0}, {"logprobs", 20}, {"echo", true}};
  const auto computed = [](const RunningServer& running) {
    return comes_true([&] {
      const serve::Scheduler::Counts counts = running.server.counts();
      return counts.tokens == 300 * 30 && counts.running == 0;
    });
  };
  RunningServer running(model(), {}, kContext);
  RawClient slow(running.server.port());
  slow.post(body);
  ASSERT_TRUE(computed(running));
  std::string answer;
  std::thread reading([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(1500));
    answer = slow.receive_all();
  });
  EXPECT_TRUE(running.server.stop_after(std::chrono::seconds(60)));
  reading.join();
  EXPECT_EQ(Json::parse(answer.substr(answer.find("\r\n\r\n") + 4)).at("choices").size(), 300u);
  RunningServer other(model(), {}, kContext);
  RawClient deaf(other.server.port());
  deaf.post(body);
  ASSERT_TRUE(computed(other));
  EXPECT_FALSE(other.server.stop_after(std::chrono::milliseconds(10)));  // nobody took the answer
}

TEST_F(Clients, TheEndOfTheSocketIsSeen) {
  RunningServer running(model());
  EXPECT_TRUE(running.server.listening());
  for (int file = 3; file < 1024; ++file) {  // the one that listens on the port
    int listens = 0;
    socklen_t size = sizeof(listens);
    sockaddr_in address{};
    socklen_t length = sizeof(address);
    if (::getsockopt(file, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) == 0 && listens != 0 &&
        ::getsockname(file, reinterpret_cast<sockaddr*>(&address), &length) == 0 &&
        ntohs(address.sin_port) == running.server.port())
      ::shutdown(file, SHUT_RDWR);
  }
  EXPECT_TRUE(comes_true([&] { return !running.server.listening(); }));
  EXPECT_TRUE(running.server.stop_after(std::chrono::seconds(1)));
}

TEST_F(Clients, StoppingWaitsForWhatEndsSoon) {
  RunningServer running(model(), {}, kContext);
  Json answer;
  std::thread client([&] { answer = running.ask({{"prompt", "once"}, {"max_tokens", 4000}}); });
  ASSERT_TRUE(comes_true([&] { return running.server.counts().running == 1; }));
  EXPECT_TRUE(running.server.stop_after(std::chrono::seconds(30)));
  client.join();
  EXPECT_EQ(answer.at("usage").at("completion_tokens"), 4000);
  EXPECT_FALSE(running.post({{"prompt", "once"}}));  // nobody listens
}

TEST_F(Clients, StoppingCancelsWhatDoesNotEnd) {
  serve::ServerOptions options;
  options.scheduling.parallel = 1;
  RunningServer running(model(), options, kContext);
  RawClient streamed(running.server.port()), waiting(running.server.port());
  streamed.post(endless(true));
  ASSERT_TRUE(comes_true([&] { return running.server.counts().running == 1; }));
  waiting.post(endless(false));
  ASSERT_TRUE(comes_true([&] { return running.server.counts().waiting == 1; }));
  std::string stream, refusal;
  std::thread reading([&] { stream = streamed.receive_all(); });
  std::thread reading_too([&] { refusal = waiting.receive_all(); });
  EXPECT_FALSE(running.server.stop_after(std::chrono::milliseconds(100)));
  reading.join();
  reading_too.join();
  EXPECT_NE(stream.find("\"code\":\"shutting_down\""), std::string::npos) << stream.substr(stream.size() - 300);
  EXPECT_EQ(stream.find("[DONE]"), std::string::npos);
  EXPECT_NE(refusal.find(" 503 "), std::string::npos) << refusal;
  EXPECT_NE(refusal.find("Retry-After: 1"), std::string::npos);
}

// The program itself, and how it ends.
struct Program {
  explicit Program(const std::vector<std::string>& more) : out(scratch.path / "out") {
    std::vector<std::string> arguments = {PARE_BINARY_DIR "/pare-edge", "serve"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    pid = ::fork();
    if (pid != 0) return;
    std::vector<char*> pointers;
    for (std::string& argument : arguments) pointers.push_back(argument.data());
    pointers.push_back(nullptr);
    if (std::freopen(out.c_str(), "w", stdout) == nullptr) ::_exit(99);
    ::execv(pointers[0], pointers.data());
    ::_exit(99);
  }
  ~Program() {
    if (pid > 0) ::kill(pid, SIGKILL);
    if (pid > 0) ::waitpid(pid, nullptr, 0);
  }
  std::string said() const {
    std::ifstream in(out);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  int port() const {
    const std::string marker = "127.0.0.1:";
    EXPECT_TRUE(comes_true([&] { return said().find("/v1") != std::string::npos; })) << said();
    return std::stoi(said().substr(said().find(marker) + marker.size()));
  }
  int end(int signal) {
    ::kill(pid, signal);
    int status = 0;
    ::waitpid(pid, &status, 0);
    pid = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  ScratchFolder scratch;
  fs::path out;
  pid_t pid = 0;
};

TEST_F(Clients, TheProgramEndsOnSignals) {
  for (const int signal : {SIGTERM, SIGINT}) {
    Program idle({model().string(), "--port", "0", "--quiet", "--name", "mine"});
    httplib::Client client("127.0.0.1", idle.port());
    EXPECT_NE(client.Get("/v1/models")->body.find("\"mine\""), std::string::npos);
    EXPECT_EQ(idle.end(signal), 0);
  }
  Program busy({model().string(), "--port", "0", "--quiet", "--grace", "0"});
  RawClient client(busy.port());
  client.post(endless(true));
  EXPECT_NE(client.receive(1000).find("200 OK"), std::string::npos);
  EXPECT_EQ(busy.end(SIGTERM), 130);
}

}  // namespace
}  // namespace pare
