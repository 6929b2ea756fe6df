// The HTTP side of `pare serve`: routes, limits, answers whole or streamed. One request a connection.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "runtime/serve/scheduler.h"
#include "runtime/serve/served_model.h"

namespace pare::serve {

struct ServerOptions {
  std::string host = "127.0.0.1";
  int port = 0;                        // 0: one that is free
  std::size_t body_bytes = 8 << 20;    // of a request, at most
  SchedulerOptions scheduling;
  std::uint64_t seed = 0;              // of requests that name none: this one, then the next
  std::function<void(const std::string&)> log = [](const std::string&) {};  // a line for every request
};

class Server {
 public:
  // Listens as soon as it is made. Errors: exit 1 where host and port cannot be had.
  Server(ServedModel model, const ServerOptions& options);
  ~Server();  // as stop_after() without patience
  int port() const;
  bool listening() const;  // false: stopped, or its socket failed
  Scheduler::Counts counts() const;
  // Takes no more requests, waits for those that are being answered until their clients have the answer, at most so
  // long, and cancels the rest. True: none had to be.
  bool stop_after(std::chrono::milliseconds patience);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace pare::serve
