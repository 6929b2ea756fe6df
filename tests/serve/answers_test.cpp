// What the server answers: the model's own continuation, streamed or not, alone or beside others.
#include <thread>

#include "core/tokenizer_text.h"
#include "eval/rows.h"
#include "tests/serve/running_server.h"

namespace pare {
namespace {

using namespace pare::testing;

class Answers : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    scratch_ = std::make_unique<ScratchFolder>();
    write_served_model(scratch_->path / "m.pare");
    write_served_model(scratch_->path / "plain.pare", false, false);
    running_ = std::make_unique<RunningServer>(scratch_->path / "m.pare");
  }
  static void TearDownTestSuite() {
    running_.reset();
    scratch_.reset();
  }
  static RunningServer& server() { return *running_; }
  static const Tokenizer& tokenizer() { return server().model.engine->tokenizer(); }
  // By the path of `pare run`.
  static Generation generated(const std::vector<std::int32_t>& prompt, std::int64_t limit,
                              SamplerOptions sampling = {}) {
    Sampler sampler(sampling);
    const auto& ends = server().model.ends;
    const auto continuation = continue_by(server().model.engine, sampler, ends);
    StreamDecoder decoder(tokenizer());
    for (const std::int32_t id : prompt) decoder.push(id);
    return generate(*continuation, decoder, prompt, limit, ends, [](const std::string&) {});
  }
  static Json choice(const Json& answer, std::size_t index = 0) { return answer.at("choices").at(index); }
  static std::vector<std::int32_t> encoded(const std::string& text) { return tokenizer().encode(text, true, true); }
  // The choices that the pieces of a stream add up to.
  static std::vector<Json> collected(const std::vector<Json>& pieces, std::size_t count, bool chat = false) {
    std::vector<Json> out(count, Json{{"text", ""}, {"finish_reason", nullptr}, {"logprobs", nullptr}});
    for (const Json& piece : pieces) {
      for (const Json& part : piece.at("choices")) {
        Json& to = out.at(part.at("index").get<std::size_t>());
        EXPECT_TRUE(to["finish_reason"].is_null()) << "a piece behind the last one";
        const Json& text = chat ? part.at("delta").value("content", Json("")) : part.at("text");
        to["text"] = to["text"].get<std::string>() + text.get<std::string>();
        to["finish_reason"] = part.at("finish_reason");
        if (part.at("logprobs").is_null()) continue;
        if (to["logprobs"].is_null()) to["logprobs"] = Json::object();
        for (const auto& [key, values] : part.at("logprobs").items())
          if (values.is_array())
            for (const Json& value : values) to["logprobs"][key].push_back(value);
      }
    }
    return out;
  }

  static std::unique_ptr<ScratchFolder> scratch_;
  static std::unique_ptr<RunningServer> running_;
};
std::unique_ptr<ScratchFolder> Answers::scratch_;
std::unique_ptr<RunningServer> Answers::running_;

TEST_F(Answers, HealthAndModels) {
  const auto health = server().client.Get("/health");
  ASSERT_TRUE(health);
  EXPECT_EQ(Json::parse(health->body).at("status"), "ok");
  const auto list = server().client.Get("/v1/models");
  ASSERT_TRUE(list);
  const Json models = Json::parse(list->body);
  EXPECT_EQ(models.at("data").at(0).at("id"), "tiny");
  const auto one = server().client.Get("/v1/models/tiny");
  ASSERT_TRUE(one);
  EXPECT_EQ(Json::parse(one->body), models.at("data").at(0));
  EXPECT_EQ(one->get_header_value("Content-Type"), "application/json");
}

TEST_F(Answers, AreWholeAndUnpacked) {
  const auto plain = server().client.Get("/v1/models");
  const httplib::Headers headers = {{"Range", "bytes=0-3"}, {"Accept-Encoding", "gzip, deflate, br"}};
  const auto asked = server().client.Get("/v1/models", headers);
  ASSERT_TRUE(plain && asked);
  EXPECT_EQ(asked->status, 200);
  EXPECT_EQ(asked->body, plain->body);
  EXPECT_FALSE(asked->has_header("Content-Encoding"));
  EXPECT_FALSE(asked->has_header("Content-Range"));
}

TEST_F(Answers, ContinuesAsRunDoes) {
  const std::string prompt = "once upon a";
  const auto ids = encoded(prompt);
  for (const double temperature : {0.0, 0.9}) {
    const Generation want = generated(ids, 24, {.temperature = temperature, .top_p = 0.95, .seed = 7});
    const Json body = {{"model", "tiny"},  {"prompt", prompt}, {"max_tokens", 24},
                       {"temperature", temperature}, {"top_p", 0.95},    {"seed", 7}};
    const Json answer = server().ask(body);
    EXPECT_EQ(choice(answer).at("text"), want.text);
    EXPECT_EQ(answer.at("object"), "text_completion");
    EXPECT_EQ(choice(answer).at("finish_reason"), std::string(want.stop) == "eos" ? "stop" : "length");
    EXPECT_TRUE(choice(answer).at("logprobs").is_null());
    EXPECT_EQ(answer.at("usage"), (Json{{"prompt_tokens", ids.size()},
                                        {"completion_tokens", want.ids.size()},
                                        {"total_tokens", ids.size() + want.ids.size()}}));
    Json by_ids = body;
    by_ids["prompt"] = ids;
    EXPECT_EQ(choice(server().ask(by_ids)).at("text"), want.text);
  }
}

TEST_F(Answers, EveryFormOfPrompt) {
  const std::vector<std::string> texts = {"once", "upon a time", "there"};
  Json lists = Json::array(), singles = Json::array();
  for (const std::string& text : texts) {
    lists.push_back(encoded(text));
    singles.push_back(choice(server().ask({{"prompt", text}, {"temperature", 0}, {"max_tokens", 9}})).at("text"));
  }
  for (const Json& prompt : {Json(texts), lists}) {
    const Json answer = server().ask({{"prompt", prompt}, {"temperature", 0}, {"max_tokens", 9}});
    ASSERT_EQ(answer.at("choices").size(), texts.size());
    for (std::size_t i = 0; i < texts.size(); ++i) {
      EXPECT_EQ(choice(answer, i).at("index"), i);
      EXPECT_EQ(choice(answer, i).at("text"), singles[i]);
    }
  }
}

TEST_F(Answers, EchoedLogProbabilitiesAreTheEvaluators) {
  const std::string prompt = "once upon a time there was t\xC3\xA9l\xC3\xA9 \xE2\x82\xAC and a long time, " +
                             std::string(300, 'x') + " upon a time";  // more than one pass of the prompt
  const auto ids = encoded(prompt);
  ASSERT_GT(ids.size(), static_cast<std::size_t>(Session::kMostFedTogether));
  const Json answer =
      server().ask({{"prompt", prompt}, {"max_tokens", 1}, {"temperature", 0}, {"logprobs", 3}, {"echo", true}});
  const Json scores = choice(answer).at("logprobs");
  const auto source = runtime_logits(server().model.engine);
  source->begin(ids);
  const auto vocab = static_cast<std::size_t>(source->vocab_size());
  std::vector<float> row(vocab);
  ASSERT_EQ(scores.at("token_logprobs").size(), ids.size() + 1);
  EXPECT_TRUE(scores.at("token_logprobs")[0].is_null());
  EXPECT_TRUE(scores.at("top_logprobs")[0].is_null());
  for (std::size_t t = 0; t < ids.size(); ++t) {
    source->logits(static_cast<std::int64_t>(t), 1, row.data());
    RowSoftmax softmax;
    ASSERT_TRUE(row_softmax(row.data(), static_cast<std::int64_t>(vocab), softmax));
    const std::int32_t next = t + 1 < ids.size() ? ids[t + 1] : softmax.argmax;
    EXPECT_EQ(scores.at("token_logprobs")[t + 1].get<double>(), softmax.log_prob(row.data(), next)) << t;
    double best = -INFINITY;
    for (const auto& [token, log_prob] : scores.at("top_logprobs")[t + 1].items())
      best = std::max(best, log_prob.get<double>());
    EXPECT_EQ(best, softmax.log_prob(row.data(), softmax.argmax)) << t;
    EXPECT_GE(scores.at("top_logprobs")[t + 1].size(), 3u);
  }
  // Offsets count characters of the text, and the tokens spell it.
  const std::string text = choice(answer).at("text");
  EXPECT_EQ(text.substr(0, prompt.size()), prompt);
  std::int64_t before = -1, euro_parts = 0;
  for (std::size_t i = 0; i < scores.at("tokens").size(); ++i) {
    EXPECT_GE(scores.at("text_offset")[i].get<std::int64_t>(), before);
    before = scores.at("text_offset")[i].get<std::int64_t>();
    euro_parts += scores.at("tokens")[i].get<std::string>().starts_with("bytes:\\x");
  }
  EXPECT_GE(euro_parts, 2);
  const Json only = server().ask({{"prompt", prompt}, {"max_tokens", 0}, {"logprobs", 3}, {"echo", true}});
  EXPECT_EQ(choice(only).at("text"), prompt);
  EXPECT_EQ(choice(only).at("logprobs").at("token_logprobs").size(), ids.size());
  EXPECT_EQ(choice(only).at("logprobs").at("token_logprobs").back(), scores.at("token_logprobs")[ids.size() - 1]);
  EXPECT_EQ(only.at("usage").at("completion_tokens"), 0);
}

// Harnesses ask for one token behind an echoed prompt and leave out the last score.
TEST_F(Answers, TokensThatEndATextHaveScores) {
  const std::string prompt = "once upon a time";
  const auto ids = encoded(prompt);
  const Json body = {{"prompt", prompt}, {"max_tokens", 1}, {"temperature", 0}, {"logprobs", 1}, {"echo", true}};
  const Json endless = choice(server().ask(body)).at("logprobs");
  const Generation likeliest = generated(ids, 1);
  ASSERT_EQ(likeliest.ids.size(), 1u);
  serve::ServedModel model = server().model;
  model.ends = {likeliest.ids[0]};
  const serve::Server other(model, RunningServer::with({}, 400));
  httplib::Client client("127.0.0.1", other.port());
  const auto result = client.Post("/v1/completions", body.dump(), "application/json");
  ASSERT_TRUE(result);
  const Json answer = Json::parse(result->body);
  EXPECT_EQ(choice(answer).at("text"), prompt);
  EXPECT_EQ(choice(answer).at("finish_reason"), "stop");
  EXPECT_EQ(answer.at("usage").at("completion_tokens"), 0);
  EXPECT_EQ(choice(answer).at("logprobs"), endless);
  ASSERT_EQ(choice(answer).at("logprobs").at("tokens").size(), ids.size() + 1);
  EXPECT_EQ(choice(answer).at("logprobs").at("text_offset").back(), prompt.size());
}

TEST_F(Answers, StreamsAddUpToTheWholeAnswer) {
  std::vector<Json> bodies = {
      {{"prompt", "once"}, {"max_tokens", 30}, {"temperature", 0}},
      {{"prompt", "once"}, {"max_tokens", 30}, {"temperature", 1.2}, {"seed", 3}, {"logprobs", 2}},
      {{"prompt", {"once", "upon a"}}, {"max_tokens", 20}, {"temperature", 0}, {"echo", true}, {"logprobs", 0}},
      {{"prompt", "once"}, {"max_tokens", 0}, {"echo", true}},
  };
  for (const Json& body : bodies) {
    const Json whole = server().ask(body);
    const auto parts = collected(server().stream(body), whole.at("choices").size());
    for (std::size_t i = 0; i < parts.size(); ++i) {
      EXPECT_EQ(parts[i].at("text"), choice(whole, i).at("text")) << body.dump();
      EXPECT_EQ(parts[i].at("finish_reason"), choice(whole, i).at("finish_reason"));
      EXPECT_EQ(parts[i].at("logprobs"), choice(whole, i).at("logprobs")) << body.dump();
    }
  }
  Json body = bodies[0];
  body["stream_options"] = {{"include_usage", true}};
  const std::vector<Json> pieces = server().stream(body);
  EXPECT_EQ(pieces.back().at("usage"), server().ask(bodies[0]).at("usage"));
  EXPECT_TRUE(pieces.back().at("choices").empty());
  EXPECT_TRUE(pieces.front().at("usage").is_null());
  EXPECT_GT(pieces.size(), 5u);
}

TEST_F(Answers, StopStringsEndTheText) {
  const Json body = {{"prompt", "once"}, {"max_tokens", 40}, {"temperature", 1.1}, {"seed", 11}, {"logprobs", 0}};
  const std::string text = choice(server().ask(body)).at("text");
  // A text that is somewhere behind the beginning; whatever else the numbers of this machine's kernels say.
  std::string stop;
  for (std::size_t at = 1; at < text.size() && (stop.empty() || text.find(stop) == 0); ++at) {
    if ((static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) continue;
    std::size_t end = std::min(at + 4, text.size());
    while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) ++end;
    stop = text.substr(at, end - at);
  }
  ASSERT_GT(text.find(stop), 0u) << text;
  Json with_stop = body;
  with_stop["stop"] = {"never said", stop};
  const Json answer = server().ask(with_stop);
  const std::string cut = choice(answer).at("text");
  EXPECT_EQ(cut, text.substr(0, text.find(stop)));
  EXPECT_EQ(choice(answer).at("finish_reason"), "stop");
  EXPECT_EQ(collected(server().stream(with_stop), 1)[0].at("text"), cut);
  const Json offsets = choice(answer).at("logprobs").at("text_offset");
  ASSERT_FALSE(offsets.empty());
  const auto cut_characters = std::count_if(
      cut.begin(), cut.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
  EXPECT_LT(offsets.back().get<std::int64_t>(), cut_characters);
  with_stop["stop"] = stop;  // a text in place of a list
  EXPECT_EQ(choice(server().ask(with_stop)).at("text"), cut);
  // The prompt may hold what ends a text.
  const Json echoed = server().ask({{"prompt", "once"}, {"stop", "once"}, {"max_tokens", 0}, {"echo", true}});
  EXPECT_EQ(choice(echoed).at("text"), "once");
}

TEST_F(Answers, EndsWhereTheContextDoes) {
  RunningServer small(scratch_->path / "plain.pare", {}, 20);
  const std::vector<std::int32_t> prompt(15, 7);
  const Json answer = small.ask({{"prompt", prompt}, {"max_tokens", 100}});
  EXPECT_EQ(answer.at("usage").at("completion_tokens"), 6);  // the last one needs no position of its own
  EXPECT_EQ(choice(answer).at("finish_reason"), "length");
  EXPECT_EQ(small.ask({{"prompt", std::vector<std::int32_t>(20, 7)}}).at("usage").at("completion_tokens"), 1);
}

TEST_F(Answers, ChatUsesTheModelsTemplate) {
  const Json messages = {{{"role", "system"}, {"content", "Be brief."}}, {{"role", "user"}, {"content", "once?"}}};
  const std::string rendered =
      "<|begin|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nonce?<|im_end|>\n<|im_start|>assistant\n";
  const auto ids = tokenizer().encode(rendered, false, true);
  const Generation want = generated(ids, 20);
  const Json body = {{"messages", messages}, {"max_tokens", 20}, {"temperature", 0}};
  const char* path = "/v1/chat/completions";
  const Json answer = server().ask(body, path);
  EXPECT_EQ(answer.at("object"), "chat.completion");
  EXPECT_EQ(choice(answer).at("message").at("role"), "assistant");
  EXPECT_EQ(choice(answer).at("message").at("content"), want.text);
  EXPECT_EQ(answer.at("usage").at("prompt_tokens"), ids.size());
  Json parts = body;
  parts["messages"][1]["content"] = {{{"type", "text"}, {"text", "once?"}}};
  EXPECT_EQ(choice(server().ask(parts, path)), choice(answer));

  Json scored = body;
  scored["logprobs"] = true;
  scored["top_logprobs"] = 2;
  const Json with_scores = server().ask(scored, path);
  const Json content = choice(with_scores).at("logprobs").at("content");
  ASSERT_EQ(content.size(), want.ids.size());
  std::string bytes;
  for (const Json& token : content) {
    EXPECT_EQ(token.at("top_logprobs").size(), 2u);
    EXPECT_EQ(token.at("logprob"), token.at("top_logprobs")[0].at("logprob"));  // greedy
    for (const Json& byte : token.at("bytes")) bytes += static_cast<char>(byte.get<int>());
  }
  EXPECT_EQ(tok::replace_invalid_utf8(bytes), want.text);

  const std::vector<Json> pieces = server().stream(scored, path);
  EXPECT_EQ(choice(pieces.front()).at("delta"), (Json{{"role", "assistant"}, {"content", ""}}));
  const Json all = collected(pieces, 1, true)[0];
  EXPECT_EQ(all.at("text"), want.text);
  EXPECT_EQ(all.at("logprobs").at("content"), content);
  EXPECT_EQ(all.at("finish_reason"), choice(with_scores).at("finish_reason"));
}

// As OpenAI's client gives back the message it was given.
TEST_F(Answers, ChatsGoOnWithTheAnswer) {
  const char* path = "/v1/chat/completions";
  Json body = {{"messages", {{{"role", "user"}, {"content", "once?"}}}}, {"max_tokens", 5}, {"temperature", 0}};
  const Json message = choice(server().ask(body, path)).at("message");
  const Json question = {{"role", "user"}, {"content", "upon?"}};
  Json plain = body, given_back = body;
  plain["messages"].push_back({{"role", "assistant"}, {"content", message.at("content")}});
  plain["messages"].push_back(question);
  Json dumped = message;
  for (const char* key : {"annotations", "audio", "function_call"}) dumped[key] = nullptr;
  dumped["tool_calls"] = Json::array();
  given_back["messages"].push_back(dumped);
  given_back["messages"].push_back(question);
  EXPECT_EQ(choice(server().ask(given_back, path)), choice(server().ask(plain, path)));
}

TEST_F(Answers, BesideOthersAsAlone) {
  constexpr std::size_t kClients = 24;
  std::vector<Json> bodies, alone(kClients), together(kClients);
  for (std::size_t i = 0; i < kClients; ++i) {
    bodies.push_back({{"prompt", random_ids(static_cast<std::int64_t>(1 + 15 * i), 290, static_cast<std::uint32_t>(i))},
                      {"max_tokens", 10 + i},
                      {"temperature", i % 2 == 0 ? 0.0 : 1.0},
                      {"seed", i},
                      {"echo", i % 3 == 0}});
    if (i % 4 == 0) bodies.back()["logprobs"] = 1;
    alone[i] = choice(server().ask(bodies[i]));
  }
  serve::ServerOptions options;
  options.scheduling.parallel = 7;  // fewer than clients: some wait
  RunningServer busy(scratch_->path / "m.pare", options);
  std::vector<std::thread> clients;
  for (std::size_t i = 0; i < kClients; ++i)
    clients.emplace_back([&, i] { together[i] = choice(busy.ask(bodies[i])); });
  for (std::thread& client : clients) client.join();
  for (std::size_t i = 0; i < kClients; ++i) EXPECT_EQ(together[i], alone[i]) << i;
  EXPECT_GT(busy.server.counts().together, 1);
  EXPECT_TRUE(comes_true([&] { return busy.server.counts().running + busy.server.counts().waiting == 0; }));
}

// A prompt that is longer than the switch is turned by its whole length, in however many passes others are computed.
TEST_F(Answers, LongRopesSwitch) {
  LongRope rope;
  rope.short_factor = {1, 1, 1, 1};
  rope.long_factor = {1.5, 2, 3, 4};
  rope.original_max_position = 300;
  write_served_model(scratch_->path / "phi.pare", true, false, rope);
  RunningServer turned(scratch_->path / "phi.pare", {}, 1000);
  const auto source = runtime_logits(turned.model.engine);
  for (const std::int64_t length : {290, 301, 700}) {  // the first one crosses it while it is continued
    const auto ids = random_ids(length, 290, 8);
    Json body = {{"prompt", {random_ids(500, 290, 9), ids}}, {"max_tokens", 20}, {"temperature", 0}, {"logprobs", 0},
                 {"echo", true}};
    const Json scores = choice(turned.ask(body), 1).at("logprobs").at("token_logprobs");
    source->begin(ids);
    std::vector<float> row(290);
    for (std::size_t t = 0; t + 1 < ids.size(); ++t) {
      source->logits(static_cast<std::int64_t>(t), 1, row.data());
      RowSoftmax softmax;
      ASSERT_TRUE(row_softmax(row.data(), 290, softmax));
      ASSERT_EQ(scores[t + 1].get<double>(), softmax.log_prob(row.data(), ids[t + 1])) << length << " " << t;
    }
    body["prompt"] = ids;
    EXPECT_EQ(choice(turned.ask(body)).at("logprobs").at("token_logprobs"), scores) << length;
  }
}

TEST_F(Answers, SeedsDecide) {
  Json body = {{"prompt", "once"}, {"max_tokens", 16}, {"seed", -5}};
  const Json one = choice(server().ask(body)).at("text");
  EXPECT_EQ(choice(server().ask(body)).at("text"), one);
  body["seed"] = 6;
  EXPECT_NE(choice(server().ask(body)).at("text"), one);
  body.erase("seed");
  EXPECT_NE(choice(server().ask(body)).at("text"), choice(server().ask(body)).at("text"));
  body["top_p"] = 0;
  const Json likeliest = choice(server().ask({{"prompt", "once"}, {"max_tokens", 16}, {"temperature", 0}})).at("text");
  EXPECT_EQ(choice(server().ask(body)).at("text"), likeliest);
}

}  // namespace
}  // namespace pare
