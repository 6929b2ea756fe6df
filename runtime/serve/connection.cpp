#include "runtime/serve/connection.h"

#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace pare::serve {
namespace {

thread_local Connection* serving = nullptr;

constexpr int kSliceMilliseconds = 50;  // between two looks at whether the server is being stopped
constexpr std::chrono::seconds kDrainTime{2};

void address_of(int (*ask)(int, sockaddr*, socklen_t*), int socket, std::string& ip, int& port) {
  sockaddr_storage address{};
  socklen_t size = sizeof(address);
  if (ask(socket, reinterpret_cast<sockaddr*>(&address), &size) != 0) return;
  char text[INET6_ADDRSTRLEN] = {};
  if (address.ss_family == AF_INET) {
    const auto* v4 = reinterpret_cast<const sockaddr_in*>(&address);
    inet_ntop(AF_INET, &v4->sin_addr, text, sizeof(text));
    port = ntohs(v4->sin_port);
  } else if (address.ss_family == AF_INET6) {
    const auto* v6 = reinterpret_cast<const sockaddr_in6*>(&address);
    inet_ntop(AF_INET6, &v6->sin6_addr, text, sizeof(text));
    port = ntohs(v6->sin6_port);
  }
  ip = text;
}

}  // namespace

Connection::Connection(socket_t socket, const ConnectionLimits& limits, const std::atomic<bool>& stopping)
    : socket_(socket), limits_(limits), stopping_(stopping), read_deadline_(Clock::now() + limits.read_time) {
  serving = this;
}

Connection::~Connection() {
  serving = nullptr;
  // Closed while bytes of the client are unread, the connection would be reset and the answer could be lost with it.
  ::shutdown(socket_, SHUT_WR);
  const auto deadline = Clock::now() + kDrainTime;
  while (wait_for(POLLIN, deadline) && ::recv(socket_, buffer_.data(), buffer_.size(), MSG_DONTWAIT) > 0) {
  }
  ::close(socket_);
}

Connection* Connection::current() {
  return serving;
}

bool Connection::client_gone() const {
  char byte;
  const ssize_t got = ::recv(socket_, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
  return got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
}

bool Connection::wait_for(short events, Clock::time_point deadline) const {
  while (!stopping_) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    if (left <= 0) return false;
    pollfd one{socket_, events, 0};
    const int ready = ::poll(&one, 1, static_cast<int>(std::min<std::int64_t>(left, kSliceMilliseconds)));
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) return false;
  }
  return false;
}

bool Connection::is_readable() const {
  return begin_ < end_ || wait_for(POLLIN, read_deadline_);
}

bool Connection::is_writable() const {
  return !client_gone() && wait_for(POLLOUT, Clock::now() + limits_.write_time);
}

ssize_t Connection::read(char* out, size_t size) {
  if (begin_ == end_) {
    if (received_ >= limits_.request_bytes || !wait_for(POLLIN, read_deadline_)) return -1;
    const std::size_t most = std::min(buffer_.size(), limits_.request_bytes - received_);
    const ssize_t got = ::recv(socket_, buffer_.data(), most, MSG_DONTWAIT);
    if (got <= 0) return got;
    received_ += static_cast<std::size_t>(got);
    begin_ = 0;
    end_ = static_cast<std::size_t>(got);
  }
  const std::size_t count = std::min(size, end_ - begin_);
  std::memcpy(out, buffer_.data() + begin_, count);
  begin_ += count;
  return static_cast<ssize_t>(count);
}

ssize_t Connection::write(const char* bytes, size_t size) {
  std::size_t sent = 0;
  while (sent < size) {
    if (!wait_for(POLLOUT, Clock::now() + limits_.write_time)) return -1;
    const ssize_t count = ::send(socket_, bytes + sent, size - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) continue;
    if (count <= 0) return -1;
    sent += static_cast<std::size_t>(count);
  }
  return static_cast<ssize_t>(sent);
}

void Connection::get_remote_ip_and_port(std::string& ip, int& port) const {
  address_of(::getpeername, socket_, ip, port);
}

void Connection::get_local_ip_and_port(std::string& ip, int& port) const {
  address_of(::getsockname, socket_, ip, port);
}

}  // namespace pare::serve
