// Work in shards on several threads, results taken in the order of the shards: sums have the same bits at any thread
// count as long as each shard's own work runs on one thread (SingleThreadedTorch). No LibTorch types.
#pragma once

#include <cstdint>
#include <exception>

namespace pare {

// take(shard, work(shard)) for every shard; work runs on several threads, take on one at a time and in order. The first
// exception of either is thrown after all threads have ended.
template <class Work, class Take>
void in_order(std::int64_t shards, int threads, const Work& work, const Take& take) {
  std::exception_ptr problem;
#pragma omp parallel for ordered schedule(static, 1) num_threads(threads)
  for (std::int64_t shard = 0; shard < shards; ++shard) {
    decltype(work(shard)) result{};
    std::exception_ptr own;
    try {
      result = work(shard);
    } catch (...) {
      own = std::current_exception();
    }
#pragma omp ordered
    {
      try {
        if (own && !problem) problem = own;
        if (!problem) take(shard, std::move(result));
      } catch (...) {
        problem = std::current_exception();
      }
    }
  }
  if (problem) std::rethrow_exception(problem);
}

}  // namespace pare
