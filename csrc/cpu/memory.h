// Memory: large pieces in huge pages, and what a kernel takes for its own use.
#pragma once

#include <c10/core/CPUAllocator.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

// Asks for huge pages where new memory is large: fewer page faults when it is first written, and rows that are far
// apart stay within reach of the address cache.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(page - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Memory for a kernel's own use, as aligned as a tensor's.
template <typename scalar>
class Scratch {
 public:
  explicit Scratch(int64_t count) : storage_(c10::GetCPUAllocator()->allocate(count * sizeof(scalar))) {
    advise_huge_pages(storage_.get(), count * sizeof(scalar));
  }
  scalar* data() const { return static_cast<scalar*>(storage_.get()); }

 private:
  c10::DataPtr storage_;
};

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
