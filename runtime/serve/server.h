// The HTTP side of `pare serve`: routes, limits, answers whole or streamed. One request a connection.
#pragma once

#include <httplib.h>

#include <atomic>
#include <functional>
#include <string>
#include <thread>

#include "runtime/serve/answer.h"
#include "runtime/serve/connection.h"

namespace pare::serve {

struct ServerOptions {
  std::string host = "127.0.0.1";
  int port = 0;                        // 0: one that is free
  std::size_t body_bytes = 8 << 20;    // of a request, at most
  SchedulerOptions scheduling;
  std::uint64_t seed = 0;              // of requests that name none: this one, then the next
  std::function<void(const std::string&)> log = [](const std::string&) {};  // a line for every request
};

class Server : httplib::Server {
 public:
  // Listens as soon as it is made. Errors: exit 1 where host and port cannot be had.
  Server(ServedModel model, const ServerOptions& options);
  ~Server() override;
  int port() const { return port_; }
  Scheduler::Counts counts() const { return scheduler_.counts(); }
  // Takes no more requests, waits for those that are being answered, at most so long, and cancels the rest. True: none
  // had to be.
  bool stop_after(std::chrono::milliseconds patience);

 private:
  using Request = httplib::Request;
  using Response = httplib::Response;

  bool process_and_close_socket(socket_t socket) override;
  void add_routes();
  HandlerResponse before_routing(const Request& request, Response& response);
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
  std::atomic<int> connections_{0};  // that are being answered
  std::atomic<std::uint64_t> requests_{0};
  int port_ = 0;
  std::thread thread_;
};

}  // namespace pare::serve
