#include "model/threads.h"

#include <ATen/Parallel.h>
#include <dlfcn.h>

namespace pare {
namespace {

// Looked up in what is loaded: which BLAS LibTorch brings is known only then.
template <class F>
F* loaded(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_DEFAULT, name));
}

void set_blas_threads(int threads) {
  static auto* const set = loaded<void(int)>("openblas_set_num_threads");
  if (set != nullptr && threads > 0) set(threads);
}

}  // namespace

int blas_threads() {
  static auto* const get = loaded<int()>("openblas_get_num_threads");
  return get != nullptr ? get() : 0;
}

void set_library_threads(int threads) {
  at::set_num_threads(threads);
  set_blas_threads(threads);
}

void restore_library_threads(int torch, int blas) {
  at::set_num_threads(torch);
  set_blas_threads(blas);
}

SingleThreadedTorch::SingleThreadedTorch() : torch_before_(at::get_num_threads()), blas_before_(blas_threads()) {
  set_library_threads(1);
}

SingleThreadedTorch::~SingleThreadedTorch() { restore_library_threads(torch_before_, blas_before_); }

}  // namespace pare
