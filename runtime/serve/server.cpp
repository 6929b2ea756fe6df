#include "runtime/serve/server.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <httplib.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <ctime>
#include <thread>

#include "core/error.h"
#include "core/json_limits.h"
#include "runtime/serve/answer.h"
#include "runtime/serve/connection.h"

namespace pare::serve {
namespace {

constexpr auto kLook = std::chrono::milliseconds(50);  // between two looks at whether the client is still there
constexpr int kSpareThreads = 16;      // for connections beyond the requests that are answered or wait
constexpr std::size_t kHeaderBytes = 64 << 10;
constexpr int kRetrySeconds = 1;
constexpr std::size_t kMostKeys = 256;  // of one object of a body

struct Route {
  const char* method;
  const char* path;
};
constexpr Route kRoutes[] = {
    {"GET", "/health"}, {"GET", "/v1/models"}, {"POST", "/v1/completions"}, {"POST", "/v1/chat/completions"}};
constexpr const char* kOneModel = "/v1/models/";

std::string dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

void set(httplib::Response& response, const ApiError& problem) {
  response.status = problem.status;
  if (problem.status == 429 || problem.status == 503)
    response.set_header("Retry-After", std::to_string(kRetrySeconds));
  response.set_content(dump(problem.body()), "application/json");
}

// Whether the client has gone; looks only now and then.
class Watch {
 public:
  bool client_gone() {
    if (Clock::now() < next_) return false;
    next_ = Clock::now() + kLook;
    return Connection::current()->client_gone();
  }

 private:
  Clock::time_point next_{};
};

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return out;
}

// Of "host", "host:port" or "[host]:port", in small letters.
std::string host_of(std::string_view authority) {
  if (authority.starts_with('[')) authority = authority.substr(1, authority.find(']') - 1);
  else authority = authority.substr(0, authority.find(':'));
  return lower(authority);
}

bool is_loopback(const std::string& host) {
  in_addr v4{};
  if (::inet_pton(AF_INET, host.c_str(), &v4) == 1) return (ntohl(v4.s_addr) >> 24) == 127;
  return host == "::1" || host == "localhost" || host.ends_with(".localhost");
}

// Names that a server on the loopback interface `bound` is asked by. Any other is that of a page elsewhere, which
// reaches this machine by way of its reader's browser.
bool is_own(const std::string& host, const std::string& bound) {
  return is_loopback(host) || host == bound;
}

// What is wrong with how the body is framed, or nothing. httplib takes numbers as strtoull does, the first of two
// lengths, and chunks over a length: a proxy may take the same bytes for another request (RFC 9112, 6.3).
std::string framing_problem(const httplib::Request& request) {
  const std::size_t lengths = request.get_header_value_count("Content-Length");
  const std::string length = request.get_header_value("Content-Length");
  const auto digit = [](char c) { return c >= '0' && c <= '9'; };
  if (lengths > 1) return "one Content-Length, found " + std::to_string(lengths);
  if (lengths == 1 && (length.empty() || length.size() > 19 || !std::all_of(length.begin(), length.end(), digit)))
    return "a Content-Length of at most 19 digits, found " + length.substr(0, 40);
  if (!request.has_header("Transfer-Encoding")) return "";
  if (lengths == 1) return "a Content-Length or a Transfer-Encoding, found both";
  const std::string coding = request.get_header_value("Transfer-Encoding");
  if (request.get_header_value_count("Transfer-Encoding") > 1 || lower(coding) != "chunked")
    return "the Transfer-Encoding chunked, found " + coding.substr(0, 40);
  return "";
}

// In one line, whatever the client sent.
std::string printable(const std::string& text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7F) out += fmt::format("\\x{:02x}", byte);
    else out += c;
  }
  return out;
}

std::string event(const Json& json) {
  return "data: " + dump(json) + "\n\n";
}

}  // namespace

// Apart from its owner: what answers requests must not begin to be destroyed while it does.
struct Server::Impl : httplib::Server {
  using Request = httplib::Request;
  using Response = httplib::Response;

  Impl(ServedModel model, const ServerOptions& options);
  bool stop_after(std::chrono::milliseconds patience);
  bool process_and_close_socket(socket_t socket) override;
  void add_routes();
  HandlerResponse before_routing(const Request& request, Response& response);
  ApiError body_too_large() const;
  std::string read_body(const Request& request, const httplib::ContentReader& reader) const;
  void answer(bool chat, const Request& request, Response& response, const httplib::ContentReader& reader);
  void answer_whole(std::shared_ptr<Ticket> ticket, Answer& answer, Response& response) const;
  void answer_in_pieces(std::shared_ptr<Ticket> ticket, std::shared_ptr<Answer> answer, bool usage,
                        Response& response) const;
  Json health() const;
  Json model_entry() const;

  const ServedModel model_;
  const ServerOptions options_;
  const ConnectionLimits limits_;
  Scheduler scheduler_;
  std::atomic<bool> stopping_{false};
  std::atomic<int> connections_{0};  // whose request has begun
  std::atomic<std::uint64_t> requests_{0};
  int port_ = 0;
  std::thread thread_;
};

Server::Server(ServedModel model, const ServerOptions& options)
    : impl_(std::make_unique<Impl>(std::move(model), options)) {}

Server::~Server() {
  stop_after({});
}

bool Server::listening() const {
  return impl_->is_running();
}

int Server::port() const {
  return impl_->port_;
}

Scheduler::Counts Server::counts() const {
  return impl_->scheduler_.counts();
}

bool Server::stop_after(std::chrono::milliseconds patience) {
  return impl_->stop_after(patience);
}

Server::Impl::Impl(ServedModel model, const ServerOptions& options)
    : model_(std::move(model)),
      options_(options),
      limits_{options.body_bytes + kHeaderBytes, ConnectionLimits{}.read_time, ConnectionLimits{}.write_time},
      scheduler_(model_.engine, options.scheduling) {
  add_routes();
  set_payload_max_length(options_.body_bytes);
  set_tcp_nodelay(true);
  // httplib would let a second server have the same port.
  set_socket_options([](socket_t socket) {
    const int yes = 1;
    ::setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  });
  const int threads = options_.scheduling.parallel + options_.scheduling.queue + kSpareThreads;
  new_task_queue = [threads] { return new httplib::ThreadPool(static_cast<std::size_t>(threads)); };
  port_ = options_.port == 0                               ? bind_to_any_port(options_.host)
          : bind_to_port(options_.host, options_.port) ? options_.port
                                                           : -1;
  if (port_ < 0)
    throw failure(fmt::format("{}:{}", options_.host, options_.port), "an address that can be listened on",
                  "one that is in use or not of this machine", "choose another --port, or 0 for a free one");
  // httplib lets 5 connections wait; more that come at once would be reset.
  ::listen(svr_sock_, SOMAXCONN);
  thread_ = std::thread([this] { listen_after_bind(); });
  while (!is_running()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

bool Server::Impl::stop_after(std::chrono::milliseconds patience) {
  if (!thread_.joinable()) return true;
  const auto patient_until = Clock::now() + patience;
  scheduler_.close();
  const bool computed = scheduler_.wait_until_idle(patient_until);
  scheduler_.abort();
  // Answers that are complete, and refusals, are still sent.
  scheduler_.wait_until_idle(Clock::now() + std::chrono::seconds(2));
  const auto deadline = std::max(patient_until, Clock::now() + std::chrono::seconds(1));
  while (connections_ > 0 && Clock::now() < deadline) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const bool sent = connections_ == 0;
  stopping_ = true;
  stop();
  thread_.join();
  return computed && sent && scheduler_.counts().cut_off == 0;
}

bool Server::Impl::process_and_close_socket(socket_t socket) {
  Connection connection(socket, limits_, stopping_);
  bool closed = false, begun = false;
  const bool answered = process_request(connection, true, closed, [&](Request& request) {
    begun = true;
    ++connections_;
    // Answers are given whole and as they are, not in the parts or packings that httplib knows.
    request.ranges.clear();
    request.headers.erase("Accept-Encoding");
  });
  if (begun) --connections_;
  return answered;
}

void Server::Impl::add_routes() {
  const auto give = [](const std::function<Json()>& make) {
    return [make](const Request&, Response& response) { response.set_content(dump(make()), "application/json"); };
  };
  Get("/health", give([this] { return health(); }));
  Get("/v1/models", give([this]() -> Json {
        return {{"object", "list"}, {"data", Json::array({model_entry()})}};
      }));
  Get("/v1/models/.+", give([this] { return model_entry(); }));
  for (const bool chat : {false, true}) {
    Post(chat ? "/v1/chat/completions" : "/v1/completions",
         [this, chat](const Request& request, Response& response, const httplib::ContentReader& reader) {
           answer(chat, request, response, reader);
         });
  }
  set_pre_routing_handler([this](const Request& request, Response& response) {
    return before_routing(request, response);
  });
  set_logger([this](const Request& request, const Response& response) {
    options_.log(fmt::format("{} {} {}", printable(request.method), printable(request.path), response.status));
  });
  // What httplib itself refuses.
  set_error_handler([](const Request&, Response& response) {
    if (!response.body.empty()) return;
    const char* why = response.status == 413   ? "the body is too large"
                      : response.status == 414 ? "the address is too long"
                      : response.status == 400 ? "no request that HTTP knows"
                                               : "the request cannot be answered";
    set(response, ApiError(response.status, why));
  });
  set_exception_handler([](const Request&, Response& response, std::exception_ptr problem) {
    try {
      std::rethrow_exception(problem);
    } catch (const ApiError& refusal) {
      set(response, refusal);
    } catch (const std::exception& other) {
      set(response, ApiError(500, other.what()));
    }
  });
}

httplib::Server::HandlerResponse Server::Impl::before_routing(const Request& request, Response& response) {
  const auto refuse = [&](const ApiError& problem) {
    set(response, problem);
    return HandlerResponse::Handled;
  };
  if (const std::string bound = lower(options_.host); is_loopback(bound)) {
    const std::string host = request.get_header_value("Host"), origin = request.get_header_value("Origin");
    if (!host.empty() && !is_own(host_of(host), bound))
      return refuse(ApiError(403, fmt::format("this server is asked as {} or localhost, not as {}", options_.host,
                                              host), {}, "foreign_host"));
    const std::size_t scheme = origin.find("://");
    if (!origin.empty() && (scheme == std::string::npos || !is_own(host_of(origin.substr(scheme + 3)), bound)))
      return refuse(ApiError(403, fmt::format("this server does not answer pages of {}", origin), {},
                             "foreign_origin"));
  }
  const bool one_model = request.path.starts_with(kOneModel);
  const char* method = one_model ? "GET" : nullptr;
  for (const Route& route : kRoutes)
    if (request.path == route.path) method = route.method;
  if (method == nullptr)
    return refuse(ApiError(404, fmt::format("no such path: {}; this server has /health, /v1/models, /v1/completions "
                                            "and /v1/chat/completions", request.path), {}, "unknown_path"));
  if (request.method != method) {
    response.set_header("Allow", method);
    return refuse(ApiError(405, fmt::format("{} is asked with {}, not with {}", request.path, method, request.method),
                           {}, "method_not_allowed"));
  }
  if (one_model && request.path.substr(std::string_view(kOneModel).size()) != model_.name)
    return refuse(ApiError(404, fmt::format("the model `{}` does not exist; this server has `{}`",
                                            request.path.substr(std::string_view(kOneModel).size()), model_.name),
                           "model", "model_not_found"));
  if (const std::string problem = framing_problem(request); !problem.empty())
    return refuse(ApiError(400, "body: expected " + problem, {}, "invalid_framing"));
  // httplib would first wait for all of it.
  if (request.get_header_value<std::uint64_t>("Content-Length") > options_.body_bytes) return refuse(body_too_large());
  if (request.method == "POST" && !request.has_header("Content-Length") && !request.has_header("Transfer-Encoding"))
    return refuse(ApiError(411, "body: expected a Content-Length, found none", {}, "length_required"));
  return HandlerResponse::Unhandled;
}

Json Server::Impl::health() const {
  const Scheduler::Counts counts = scheduler_.counts();
  return {{"status", counts.closed ? "stopping" : "ok"}, {"running", counts.running}, {"waiting", counts.waiting},
          {"passes", counts.passes},                 {"tokens", counts.tokens},   {"most_together", counts.together}};
}

Json Server::Impl::model_entry() const {
  return {{"id", model_.name},
          {"object", "model"},
          {"created", model_.created},
          {"owned_by", "pare"},
          {"max_model_len", model_.context}};
}

ApiError Server::Impl::body_too_large() const {
  return ApiError(413, fmt::format("body: expected at most {} bytes, found more", options_.body_bytes), {},
                  "body_too_large");
}

std::string Server::Impl::read_body(const Request& request, const httplib::ContentReader& reader) const {
  if (request.is_multipart_form_data()) throw ApiError(400, "body: expected a JSON object, found a multipart form");
  std::string body;
  bool fits = true;
  const bool whole = reader([&](const char* bytes, std::size_t count) {
    fits = body.size() + count <= options_.body_bytes;
    if (fits) body.append(bytes, count);
    return fits;
  });
  if (!fits) throw body_too_large();
  if (!whole) throw ApiError(400, "body: it ended early, or did not arrive in time");
  return body;
}

void Server::Impl::answer(bool chat, const Request& request, Response& response, const httplib::ContentReader& reader) {
  const std::uint64_t number = requests_++;
  const std::string text = read_body(request, reader);
  Json body;
  try {
    body = parse_json(text, "body", kMostKeys);
  } catch (const std::exception& problem) {
    throw ApiError(400, problem.what(), {}, "invalid_json");
  }
  const std::uint64_t seed = options_.seed + number;
  Asked asked = chat ? read_chat(body, model_, seed) : read_completion(body, model_, seed);
  const std::int64_t now = std::time(nullptr);
  AnswerForm form{fmt::format("{}-{:x}-{}", chat ? "chatcmpl" : "cmpl", now, number), now, chat};
  auto result = std::make_shared<Answer>(model_, asked, std::move(form));
  const bool stream = asked.stream, usage = asked.usage_in_stream;
  auto ticket = scheduler_.submit(std::move(asked.work));
  if (stream) return answer_in_pieces(std::move(ticket), std::move(result), usage, response);
  answer_whole(std::move(ticket), *result, response);
}

void Server::Impl::answer_whole(std::shared_ptr<Ticket> ticket, Answer& answer, Response& response) const {
  for (Watch watch; !answer.finished();) {
    if (const std::optional<Delta> delta = ticket->next(kLook)) answer.add(*delta);
    if (!watch.client_gone()) continue;
    ticket->cancel();
    throw ApiError(499, "the client has gone");
  }
  response.set_content(dump(answer.whole()), "application/json");
}

void Server::Impl::answer_in_pieces(std::shared_ptr<Ticket> ticket, std::shared_ptr<Answer> answer, bool usage,
                              Response& response) const {
  response.set_header("Cache-Control", "no-cache");
  const auto send = [ticket, answer, usage](std::size_t, httplib::DataSink& sink) {
    const auto give = [&](const std::string& text) { return sink.write(text.data(), text.size()); };
    try {
      for (Watch watch; !answer->finished();) {
        const std::optional<Delta> delta = ticket->next(kLook);
        if (watch.client_gone()) return false;
        if (!delta) continue;
        answer->add(*delta);
        for (const Json& piece : answer->pieces(*delta))
          if (!give(event(piece))) return false;
      }
      if (usage && !give(event(answer->usage_piece()))) return false;
      if (!give("data: [DONE]\n\n")) return false;
    } catch (const ApiError& problem) {
      if (!give(event(problem.body()))) return false;
    } catch (const std::exception& problem) {
      if (!give(event(ApiError(500, problem.what()).body()))) return false;
    }
    sink.done();
    return true;
  };
  response.set_chunked_content_provider("text/event-stream", send, [ticket](bool) { ticket->cancel(); });
}

}  // namespace pare::serve
