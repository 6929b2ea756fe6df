// c10d: the connections of the ranks.
#include <torch/torch.h>

#ifdef PARE_C10D
#ifndef USE_C10D_GLOO
#define USE_C10D_GLOO  // the package files of LibTorch may not say so
#endif
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#endif

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <thread>

#include "model/ranks.h"

namespace pare {

#ifdef PARE_C10D

namespace {

using std::chrono::milliseconds;
constexpr std::chrono::hours kLongWait{7 * 24};
constexpr milliseconds kLastWords{3000};  // how long ranks listen to each other when something went wrong

// The first line of what LibTorch says, without its stack.
std::string first_line(const std::exception& error) {
  const auto* c10_error = dynamic_cast<const c10::Error*>(&error);
  const std::string text = c10_error != nullptr ? c10_error->what_without_backtrace() : error.what();
  return text.substr(0, text.find('\n'));
}

// This machine's address on the way to rank 0: what others can reach it by. Empty where there is no way.
std::string own_address(const std::string& host, int port) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_DGRAM;
  if (getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) return {};
  std::string own;
  for (const addrinfo* each = found; each != nullptr && own.empty(); each = each->ai_next) {
    const int fd = ::socket(each->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0) continue;
    sockaddr_storage bound{};
    socklen_t size = sizeof bound;
    char text[NI_MAXHOST];
    if (::connect(fd, each->ai_addr, each->ai_addrlen) == 0 &&
        getsockname(fd, reinterpret_cast<sockaddr*>(&bound), &size) == 0 &&
        getnameinfo(reinterpret_cast<const sockaddr*>(&bound), size, text, sizeof text, nullptr, 0,
                    NI_NUMERICHOST) == 0)
      own = text;
    ::close(fd);
  }
  freeaddrinfo(found);
  return own;
}

std::vector<std::uint8_t> bytes(const std::string& text) { return {text.begin(), text.end()}; }
std::string ended_key(int rank) { return "pare/ended/" + std::to_string(rank); }

}  // namespace

struct Ranks::Group {
  c10::intrusive_ptr<c10d::TCPStore> store;
  c10::intrusive_ptr<c10d::ProcessGroupGloo> gloo, patient;  // the second for broadcast_late
  std::function<c10::intrusive_ptr<c10d::ProcessGroupGloo>(const char* name, milliseconds timeout)> connect;

  // What is known of the ranks that ended, after one of them was missed. `mine`: this rank's key says so too.
  std::string reason(int rank, int size, const std::string& mine) {
    try {
      store->set(ended_key(rank), bytes("~" + mine));
      const auto until = std::chrono::steady_clock::now() + kLastWords;
      for (;;) {
        int silent = 0, last_silent = -1;
        for (int r = 0; r < size; ++r) {
          if (!store->check({ended_key(r)})) {
            ++silent;
            last_silent = r;
            continue;
          }
          const auto told = store->get(ended_key(r));
          if (!told.empty() && told[0] != '~')
            return "rank " + std::to_string(r) + " ended: " + std::string(told.begin(), told.end());
        }
        if (silent == 1 || (silent > 1 && std::chrono::steady_clock::now() > until))
          return (silent == 1 ? "rank " + std::to_string(last_silent) : std::to_string(silent) + " ranks") +
                 " ended without a word or cannot be reached";
        if (silent == 0) return "a connection broke";
        std::this_thread::sleep_for(milliseconds(100));
      }
    } catch (const std::exception&) {  // the store is rank 0's
      return "rank 0 ended without a word or cannot be reached";
    }
  }
};

Ranks::Ranks() = default;

Ranks::Ranks(const RankPlace& place, std::chrono::seconds timeout) : place_(place), timeout_(timeout) {
  if (alone()) return;
  setenv("TORCH_CPP_LOG_LEVEL", "ERROR", 0);  // else every attempt to connect is a line on stderr
  const std::string where = fmt::format("rank {} of {}", rank(), size());
  const std::string at = fmt::format("{}:{}", place_.address, place_.port);
  group_ = std::make_unique<Group>();
  try {
    c10d::TCPStoreOptions options;
    options.port = static_cast<std::uint16_t>(place_.port);
    options.isServer = first();
    options.numWorkers = static_cast<std::size_t>(size());
    options.waitWorkers = false;  // below, where those that are missing are counted
    options.timeout = timeout_;
    group_->store = c10::make_intrusive<c10d::TCPStore>(place_.address, options);
    const auto until = std::chrono::steady_clock::now() + timeout_;
    group_->store->add("pare/joined", 1);
    for (std::int64_t joined = 0; (joined = group_->store->add("pare/joined", 0)) < size();) {
      if (std::chrono::steady_clock::now() > until)
        throw std::runtime_error(fmt::format("{} of them", joined));
      std::this_thread::sleep_for(milliseconds(20));
    }
  } catch (const std::exception& error) {
    throw failure(where,
                  fmt::format("{} ranks at {} within {} s", size(), at, timeout_.count()),
                  first_line(error),
                  "start all ranks with the same MASTER_ADDR and MASTER_PORT, which rank 0's machine has and no other"
                  " program uses; --rank-timeout waits longer");
  }
  const auto interface = std::getenv("GLOO_SOCKET_IFNAME");
  const std::string address = own_address(place_.address, place_.port);
  const std::string name = interface != nullptr ? interface : "";
  group_->connect = [this, name, address](const char* prefix, milliseconds longest) {
    auto options = c10d::ProcessGroupGloo::Options::create(longest);
    options->devices.push_back(!name.empty()      ? c10d::ProcessGroupGloo::createDeviceForInterface(name)
                               : !address.empty() ? c10d::ProcessGroupGloo::createDeviceForHostname(address)
                                                  : c10d::ProcessGroupGloo::createDefaultDevice());
    options->threads = 1;  // one collective at a time
    const auto store = c10::make_intrusive<c10d::PrefixStore>(prefix, group_->store);
    return c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank(), size(), options);
  };
  try {
    group_->gloo = group_->connect("pare/now", timeout_);
  } catch (const std::exception& error) {
    throw failure(where,
                  fmt::format("connections between the {} ranks of {} within {} s", size(), at, timeout_.count()),
                  first_line(error) + " (this rank is reached at " +
                      (interface != nullptr ? std::string("interface ") + interface : address) + ")",
                  "GLOO_SOCKET_IFNAME names the network interface to use");
  }
}

Ranks::~Ranks() {
  if (!group_) return;
  try {
    group_->patient.reset();
    group_->gloo.reset();
    group_->store->add("pare/gone", 1);
    const auto until = std::chrono::steady_clock::now() + kLastWords;
    while (first() && group_->store->add("pare/gone", 0) < size() && std::chrono::steady_clock::now() < until)
      std::this_thread::sleep_for(milliseconds(5));
  } catch (const std::exception&) {  // rank 0 was sooner
  }
}

void Ranks::leave(const std::string& reason) noexcept {
  if (!group_) return;
  try {
    group_->store->set(ended_key(rank()), bytes(reason.empty() ? "no reason given" : reason));
  } catch (const std::exception&) {
  }
}

namespace {

// work(bucket) for the elements in pieces, so that no single wait grows with the model, on the host.
template <class Work>
void in_buckets(const at::Tensor& values, bool written, const Work& work) {
  constexpr std::int64_t kBucket = 1 << 22;
  const at::NoGradGuard no_grad;
  const at::Tensor host = values.to(at::kCPU).contiguous().view({-1});
  for (std::int64_t begin = 0; begin < host.numel(); begin += kBucket) {
    std::vector<at::Tensor> bucket{host.narrow(0, begin, std::min(kBucket, host.numel() - begin))};
    work(bucket);
  }
  if (written && host.data_ptr() != values.data_ptr()) values.copy_(host.view(values.sizes()));
}

}  // namespace

template <class Talk>
void Ranks::talk(const Talk& work, bool late) {
  try {
    work(late ? *group_->patient : *group_->gloo);
  } catch (const std::exception& error) {
    const std::string own = first_line(error);
    throw RankLost(ExitCode::kFailure, fmt::format("rank {} of {}", rank(), size()),
                   fmt::format("every rank to answer within {} s", timeout_.count()),
                   group_->reason(rank(), size(), own) + " (" + own + ")",
                   "start all ranks again: what rank 0 has saved is continued");
  }
}

void Ranks::sum(const at::Tensor& values) {
  if (alone()) return;
  in_buckets(values, true, [&](std::vector<at::Tensor>& bucket) {
    talk([&](c10d::ProcessGroupGloo& gloo) { gloo.allreduce(bucket)->wait(); });
  });
}

void Ranks::broadcast(const at::Tensor& values, int from) {
  if (alone()) return;
  in_buckets(values, rank() != from, [&](std::vector<at::Tensor>& bucket) {
    c10d::BroadcastOptions options;
    options.rootRank = from;
    talk([&](c10d::ProcessGroupGloo& gloo) { gloo.broadcast(bucket, options)->wait(); });
  });
}

void Ranks::move(const at::Tensor& values, int from, int to) {
  if (from == to || (rank() != from && rank() != to)) return;
  in_buckets(values, rank() == to, [&](std::vector<at::Tensor>& bucket) {
    talk([&](c10d::ProcessGroupGloo& gloo) {
      (rank() == from ? gloo.send(bucket, to, 0) : gloo.recv(bucket, from, 0))->wait();
    });
  });
}

std::string Ranks::broadcast(const std::string& text) {
  if (alone()) return text;
  const at::Tensor size_of = torch::full({1}, static_cast<std::int64_t>(text.size()), torch::kLong);
  broadcast(size_of);
  at::Tensor all = torch::zeros({size_of.item<std::int64_t>()}, torch::kByte);
  if (first()) std::memcpy(all.data_ptr<std::uint8_t>(), text.data(), text.size());
  broadcast(all);
  return {reinterpret_cast<const char*>(all.data_ptr<std::uint8_t>()), static_cast<std::size_t>(all.numel())};
}

void Ranks::wait_long() {
  if (alone() || group_->patient) return;
  talk([&](c10d::ProcessGroupGloo&) { group_->patient = group_->connect("pare/late", kLongWait); });
}

std::string Ranks::broadcast_late(const std::string& text) {
  if (alone()) return text;
  std::vector<at::Tensor> word{torch::zeros({1}, torch::kByte)};
  talk([&](c10d::ProcessGroupGloo& gloo) { gloo.broadcast(word)->wait(); }, true);
  return broadcast(text);
}

std::vector<std::string> Ranks::gather(const std::string& text) {
  if (alone()) return {text};
  at::Tensor sizes = torch::zeros({size()}, torch::kLong);
  sizes[rank()] = static_cast<std::int64_t>(text.size());
  sum(sizes);
  const auto widest = sizes.max().item<std::int64_t>();
  std::vector<at::Tensor> mine{torch::zeros({std::max<std::int64_t>(widest, 1)}, torch::kByte)};
  std::memcpy(mine[0].data_ptr<std::uint8_t>(), text.data(), text.size());
  std::vector<std::vector<at::Tensor>> all(1);
  for (int r = 0; r < size(); ++r) all[0].push_back(torch::zeros_like(mine[0]));
  talk([&](c10d::ProcessGroupGloo& gloo) { gloo.allgather(all, mine)->wait(); });
  std::vector<std::string> texts;
  for (int r = 0; r < size(); ++r)
    texts.emplace_back(reinterpret_cast<const char*>(all[0][static_cast<std::size_t>(r)].data_ptr<std::uint8_t>()),
                       static_cast<std::size_t>(sizes[r].item<std::int64_t>()));
  return texts;
}

std::string rank_backend() { return "gloo"; }

#else

struct Ranks::Group {};
Ranks::Ranks() = default;
Ranks::Ranks(const RankPlace& place, std::chrono::seconds timeout) : place_(place), timeout_(timeout) {
  if (!alone())
    throw Error(ExitCode::kResources, fmt::format("rank {} of {}", rank(), size()), "a program with c10d and Gloo",
                "this build has no c10d: LibTorch or the Gloo headers (Debian: libgloo-dev) lack it",
                "configure again with -DPARE_DISTRIBUTED=ON, which says what is missing");
}
Ranks::~Ranks() = default;
void Ranks::leave(const std::string&) noexcept {}
void Ranks::sum(const at::Tensor&) {}
void Ranks::broadcast(const at::Tensor&, int) {}
void Ranks::move(const at::Tensor&, int, int) {}
std::string Ranks::broadcast(const std::string& text) { return text; }
void Ranks::wait_long() {}
std::string Ranks::broadcast_late(const std::string& text) { return text; }
std::vector<std::string> Ranks::gather(const std::string& text) { return {text}; }
std::string rank_backend() { return "none: more than one rank is refused"; }

#endif

}  // namespace pare
