#include "model/ranks.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <charconv>
#include <cstdlib>
#include <optional>

namespace pare {
namespace {

std::optional<std::string> variable(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  return value;
}

int number(const char* name, int least, int most) {
  const auto text = variable(name);
  if (!text) throw usage_error(name, "set by the program that starts the ranks", "not set");
  int value = 0;
  const auto [end, problem] = std::from_chars(text->data(), text->data() + text->size(), value);
  if (problem != std::errc() || end != text->data() + text->size() || value < least || value > most)
    throw usage_error(name, fmt::format("a whole number from {} to {}", least, most), "\"" + *text + "\"");
  return value;
}

}  // namespace

RankPlace rank_place() {
  constexpr int kMost = 1 << 16, kDefaultPort = 29500;
  RankPlace place;
  const bool torchrun = variable("WORLD_SIZE") || variable("RANK");
  if (!torchrun && !variable("OMPI_COMM_WORLD_SIZE")) return place;
  const char *size = torchrun ? "WORLD_SIZE" : "OMPI_COMM_WORLD_SIZE",
             *rank = torchrun ? "RANK" : "OMPI_COMM_WORLD_RANK",
             *local = torchrun ? "LOCAL_RANK" : "OMPI_COMM_WORLD_LOCAL_RANK";
  place.size = number(size, 1, kMost);
  if (place.size == 1) return place;
  place.rank = number(rank, 0, place.size - 1);
  if (variable(local)) place.local = number(local, 0, place.size - 1);
  const auto address = variable("MASTER_ADDR");
  const bool one_machine = !torchrun && variable("OMPI_COMM_WORLD_LOCAL_SIZE") == variable("OMPI_COMM_WORLD_SIZE");
  if (!address && !one_machine)
    throw usage_error("MASTER_ADDR", "the address of rank 0", "not set",
                      "torchrun sets it; mpirun -x MASTER_ADDR=HOST");
  place.address = address.value_or("127.0.0.1");
  place.port = variable("MASTER_PORT") || torchrun ? number("MASTER_PORT", 1, 65535) : kDefaultPort;
  // torchrun keeps a store of its own release's protocol on that port.
  if (variable("TORCHELASTIC_USE_AGENT_STORE") == "True") place.port += place.port < 65535 ? 1 : -1;
  return place;
}

bool Ranks::any(bool flag) {
  if (alone()) return flag;
  at::Tensor count = at::zeros({1}, at::kLong);
  count.fill_(flag ? 1 : 0);
  sum(count);
  return count.item<std::int64_t>() > 0;
}

void Ranks::agree(const std::string& what, const Json& mine) {
  if (alone()) return;
  const std::vector<std::string> all = gather(mine.dump());
  const Json first = parse_json(all[0], "rank 0");
  for (std::size_t r = 1; r < all.size(); ++r) {
    const Json other = parse_json(all[r], "rank " + std::to_string(r));
    if (other == first) continue;
    std::string place = what, expected = first.dump(), found = other.dump();
    if (first.is_object() && other.is_object()) {
      Json both = first;
      both.update(other);
      for (const auto& [key, value] : both.items()) {
        const Json a = first.value(key, Json()), b = other.value(key, Json());
        if (a == b) continue;
        place += ": " + key;
        expected = a.dump();
        found = b.dump();
        break;
      }
    }
    throw usage_error(place, expected + " as on rank 0", found + " on rank " + std::to_string(r),
                      "start the same command on every rank, with the same model and texts");
  }
}

void Ranks::first_does(const std::function<void()>& work) {
  if (alone()) return work();
  Json outcome;
  std::exception_ptr own;
  if (first()) {
    try {
      work();
    } catch (const RankLost&) {
      throw;
    } catch (const Error& error) {
      own = std::current_exception();
      outcome = Json{{"code", static_cast<int>(error.code())}, {"place", error.place()},
                     {"expected", error.expected()}, {"found", error.found()}, {"hint", error.hint()}};
    } catch (const std::exception& error) {
      own = std::current_exception();
      outcome = Json{{"code", 1}, {"place", "rank 0"}, {"expected", ""}, {"found", error.what()}, {"hint", ""}};
    }
  }
  const Json result = parse_json(
      broadcast(outcome.dump(-1, ' ', false, Json::error_handler_t::replace)), "rank 0");
  if (own) std::rethrow_exception(own);
  if (result.is_null()) return;
  throw Error(static_cast<ExitCode>(result.at("code").get<int>()), result.at("place").get<std::string>(),
              result.at("expected").get<std::string>(), result.at("found").get<std::string>(),
              result.at("hint").get<std::string>());
}

void Ranks::throw_if_interrupted(const std::string& place, const std::string& how_to_resume) {
  if (any(interrupt_requested())) throw Error(ExitCode::kInterrupted, place, "", "interrupted", how_to_resume);
}

Ranks& ranks_of(const Context& run) {
  static Ranks alone;
  return run.ranks != nullptr ? *run.ranks : alone;
}

std::string rank_device(const std::string& name, const Context& run) {
  const Ranks& ranks = ranks_of(run);
  if (name != "cuda" || ranks.alone()) return name;
  if (ranks.local() < 0)
    throw usage_error("LOCAL_RANK", "this rank's number among those of its machine, to choose its GPU", "not set",
                      "torchrun sets it; or give each rank --device cuda:N");
  return "cuda:" + std::to_string(ranks.local());
}

Command ranked(Command command, int timeout) {
  command.options.push_back({.name = "rank-timeout",
                             .type = OptionType::kInteger,
                             .help = "seconds that ranks wait for each other (torchrun, mpirun: RANK, WORLD_SIZE, ...)",
                             .default_value = timeout,
                             .minimum = 1,
                             .maximum = 1e6});
  command.run = [run = command.run](const Options& options, Context& context) -> Json {
    const RankPlace place = rank_place();
    if (place.size == 1) return run(options, context);
    context.rank = place.rank;
    Ranks ranks(place, std::chrono::seconds(options.get<std::int64_t>("rank-timeout")));
    struct Given {
      Context& context;
      Progress* before;
      ~Given() {
        context.ranks = nullptr;
        context.progress = before;
      }
    } const given{context, context.progress};
    Progress silent(true);
    context.ranks = &ranks;
    if (!ranks.first()) context.progress = &silent;
    context.progress->note(fmt::format("{} ranks, joined at {}:{}", place.size, place.address, place.port));
    try {
      return run(options, context);
    } catch (const RankLost&) {  // the others know
      throw;
    } catch (const std::exception& error) {
      ranks.leave(error.what());
      throw;
    }
  };
  return command;
}

void refuse_ranks(const std::string& command, const std::string& hint) {
  const RankPlace place = rank_place();
  if (place.size > 1)
    throw usage_error("WORLD_SIZE", "1: `pare " + command + "` is one process", std::to_string(place.size), hint);
}

}  // namespace pare
