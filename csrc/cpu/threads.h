// How many threads a call may use.
#pragma once

#include <ATen/Parallel.h>

// Without OpenMP in the compiler (macOS), at::parallel_for is a loop, whatever torch has.
#if AT_PARALLEL_OPENMP && defined(_OPENMP)
#define NLPKERNELS_OPENMP 1
#include <omp.h>
#else
#define NLPKERNELS_OPENMP 0
#endif
#if NLPKERNELS_OPENMP && defined(__linux__)
#include <dirent.h>
#include <pthread.h>
#endif

#include <cstdint>

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

// A fork takes along the thread that called it alone. If OpenMP had others for that one, it waits for them in the
// child, for ever; whether it had, it does not say. So the child's first thread works alone if its parent had any
// other.
class Forked {
 public:
  static bool has_lost_threads() { return has_lost_; }

 private:
#if NLPKERNELS_OPENMP && defined(__linux__)
  static void before() {
    int tasks = 0;
    if (DIR* all = opendir("/proc/self/task")) {
      while (const dirent* task = readdir(all)) tasks += task->d_name[0] != '.';
      closedir(all);
    }
    had_others_ = tasks != 1;
  }
  static void in_child() { has_lost_ |= had_others_; }
  static inline const int registered_ = pthread_atfork(before, nullptr, in_child);
  static inline thread_local bool had_others_ = false;
#endif
  static inline thread_local bool has_lost_ = false;
};

// The number of threads of a call. To be asked for once, at its beginning, and handed down: torch.set_num_threads in
// another thread, and the first question in each thread, which takes over what was set elsewhere, change the answer at
// any moment. Work is cut by it; whether so many threads come is at::parallel_for's affair.
inline int64_t threads_of_call() {
  at::internal::lazy_init_num_threads();
  if (at::in_parallel_region()) return 1;
#if NLPKERNELS_OPENMP
  if (Forked::has_lost_threads())
    omp_set_num_threads(1);  // of this thread, whatever is to come: torch's layers hang too
#endif
#ifdef INTRA_OP_PARALLEL
  return at::get_num_threads();
#else
  return 1;
#endif
}

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
