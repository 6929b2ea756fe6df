#include "model/threads.h"

#include <gtest/gtest.h>

#include <limits>

#include "model/fused.h"

namespace pare {
namespace {

// Half of the smallest normal number: 0 where denormal numbers are flushed.
float half_of_least() {
  volatile float least = std::numeric_limits<float>::min();
  volatile float half = least * 0.5f;
  return half;
}

TEST(Threads, OneThreadInsideAndTheFormerCountsAfterwards) {
  set_library_threads(2);
  const int blas = blas_threads();
  {
    const SingleThreadedTorch single;
    EXPECT_EQ(at::get_num_threads(), 1);
    EXPECT_LE(blas_threads(), 1);  // 0 without OpenBLAS
  }
  EXPECT_EQ(at::get_num_threads(), 2);
  EXPECT_EQ(blas_threads(), blas);
}

TEST(Threads, TrainingLeavesNoTraceInThisProcess) {
  set_library_threads(2);
  ASSERT_GT(half_of_least(), 0.0f);
  {
    const PreparedThreads prepared(1);
    EXPECT_EQ(at::get_num_threads(), 1);
    EXPECT_LE(blas_threads(), 1);
    EXPECT_EQ(half_of_least(), 0.0f);
  }
  EXPECT_EQ(at::get_num_threads(), 2);
  EXPECT_GT(half_of_least(), 0.0f);
}

}  // namespace
}  // namespace pare
