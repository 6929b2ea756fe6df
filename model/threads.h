// Thread counts of LibTorch and of the BLAS behind it, which are set apart: OpenBLAS (Debian's LibTorch) keeps a pool of
// its own that LibTorch's setting does not reach. No LibTorch types here.
#pragma once

namespace pare {

// threads > 0; everything later in this process.
void set_library_threads(int threads);

// What at::get_num_threads() and blas_threads() said before.
void restore_library_threads(int torch, int blas);
// Threads of OpenBLAS, 0 where LibTorch uses another library.
int blas_threads();

// Both on one thread while it lives, whoever calls them, so that a result does not depend on the thread count; what was
// set before comes back.
class SingleThreadedTorch {
 public:
  SingleThreadedTorch();
  ~SingleThreadedTorch();
  SingleThreadedTorch(const SingleThreadedTorch&) = delete;
  SingleThreadedTorch& operator=(const SingleThreadedTorch&) = delete;

 private:
  int torch_before_, blas_before_;
};

}  // namespace pare
