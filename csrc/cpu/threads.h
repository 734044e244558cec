// How many threads a call may use.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

// To be asked once, at the beginning of a call, and handed down: torch.set_num_threads in another thread, and the first
// question in each thread, which takes over what was set elsewhere, change the answer at any moment. Work is cut by it;
// whether so many threads come is at::parallel_for's affair.
inline int64_t threads_of_call() {
  at::internal::lazy_init_num_threads();
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
