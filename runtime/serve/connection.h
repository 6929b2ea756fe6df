// One client's connection: what it may send and how long it may take are bounded, and whoever answers can see whether
// the client is still there.
#pragma once

#include <httplib.h>

#include <array>
#include <atomic>
#include <chrono>

namespace pare::serve {

struct ConnectionLimits {
  std::size_t request_bytes = 0;         // in all, headers included
  std::chrono::seconds read_time{30};    // for the whole request
  std::chrono::seconds write_time{30};   // without a byte taken by the client
};

class Connection : public httplib::Stream {
 public:
  // `stopping`: reads and writes that wait end when it is set.
  Connection(socket_t socket, const ConnectionLimits& limits, const std::atomic<bool>& stopping);
  // Tells the client that nothing follows, takes what it may still be sending, and closes.
  ~Connection() override;

  // The one that this thread serves; null outside.
  static Connection* current();

  bool client_gone() const;  // closed from the other side

  bool is_readable() const override;
  bool is_writable() const override;
  ssize_t read(char* out, size_t size) override;
  ssize_t write(const char* bytes, size_t size) override;
  void get_remote_ip_and_port(std::string& ip, int& port) const override;
  void get_local_ip_and_port(std::string& ip, int& port) const override;
  socket_t socket() const override { return socket_; }

 private:
  using Clock = std::chrono::steady_clock;
  bool wait_for(short events, Clock::time_point deadline) const;

  const socket_t socket_;
  const ConnectionLimits limits_;
  const std::atomic<bool>& stopping_;
  const Clock::time_point read_deadline_;
  std::size_t received_ = 0;
  std::array<char, 4096> buffer_;  // httplib reads lines byte by byte
  std::size_t begin_ = 0, end_ = 0;
};

}  // namespace pare::serve
