// Memory of large gradients, kept from step to step.
//
// A dense gradient is as large as its table and lives for one training step. New memory of that size comes from the
// system each time, which clears it page by page as it is first written: that takes longer than all else of the step,
// and several times as long where threads do it side by side, or where a virtual machine's host has to find huge pages
// anew. So a gradient's memory is kept when the gradient goes, and the next one's step starts with zeros written to it
// by all threads. As many blocks of a size are kept as there are tables of that size: keep_memory() says when one comes
// or goes, and what is too much is given back at once.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "memory.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

// Gradients of fewer bytes are the allocator's affair, which has memory of that size at hand. Of autograd.h too.
constexpr size_t kKeptBytes = size_t(1) << 20;

class KeptMemory {
 public:
  // A block that has been used before, or nullptr.
  static void* take(size_t bytes) {
    void* block = nullptr;
    with_sizes([&](Sizes& sizes) {
      const auto found = sizes.find(bytes);
      if (found == sizes.end() || found->second.blocks.empty()) return;
      block = found->second.blocks.back();
      found->second.blocks.pop_back();
    });
    return block;
  }

  static void give(void* block, size_t bytes) {
    bool is_kept = false;
    with_sizes([&](Sizes& sizes) {
      const auto found = sizes.find(bytes);
      if (found == sizes.end() || found->second.blocks.size() >= found->second.tables) return;
      found->second.blocks.push_back(block);  // for which there is room
      is_kept = true;
    });
    if (!is_kept) std::free(block);
  }

  // A table of so many bytes has come, or gone.
  static void count_table(size_t bytes, bool is_new) {
    std::vector<void*> too_many;
    with_sizes([&](Sizes& sizes) {
      OfSize& own = sizes[bytes];
      if (is_new) {
        own.blocks.reserve(++own.tables);
        return;
      }
      own.tables -= std::min<size_t>(own.tables, 1);
      while (own.blocks.size() > own.tables) {
        too_many.push_back(own.blocks.back());
        own.blocks.pop_back();
      }
      if (own.tables == 0) sizes.erase(bytes);
    });
    for (void* block : too_many) std::free(block);
  }

 private:
  struct OfSize {
    size_t tables = 0;
    std::vector<void*> blocks;
  };
  using Sizes = std::unordered_map<size_t, OfSize>;

  struct Kept {
    std::mutex mutex;
    Sizes sizes;
  };

  // A child of fork whose parent had the lock in another thread goes without.
  template <typename Body>
  static void with_sizes(const Body& body) {
    constexpr int kTries = 10'000;
    for (int i = 0; i < kTries; ++i, std::this_thread::yield()) {
      const std::unique_lock lock(kept_.mutex, std::try_to_lock);
      if (lock) return body(kept_.sizes);
    }
  }

  static inline Kept& kept_ = *new Kept();  // never destroyed: gradients may go after it would have been
};

// Zeros for a gradient.
inline at::Tensor gradient_zeros(at::IntArrayRef shape, const at::TensorOptions& options, int64_t threads) {
  constexpr size_t kAlign = 64, kPiece = size_t(1) << 18;
  const size_t bytes = at::detail::computeStorageNbytesContiguous(shape, options.dtype().itemsize());  // or an error
  if (bytes < kKeptBytes) return at::empty(shape, options).zero_();
  char* block = static_cast<char*>(KeptMemory::take(bytes));
  const bool is_new = block == nullptr;
  if (is_new) block = static_cast<char*>(std::aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign));
  TORCH_CHECK(block != nullptr, "embedding_bag_backward: no memory for a gradient of ", bytes, " bytes");
  at::Tensor zeros = at::for_blob(block, shape)
                         .deleter([bytes](void* data) { KeptMemory::give(data, bytes); })
                         .allocator(c10::GetCPUAllocator())
                         .resizeable_storage()
                         .options(options)
                         .make_tensor();
  // New pages by one thread, huge ones where they may be.
  if (is_new) advise_huge_pages(block, bytes);
  const int64_t pieces = (bytes + kPiece - 1) / kPiece;
  at::parallel_for(0, pieces, is_new || threads == 1 ? pieces : 1, [&](int64_t begin, int64_t end) {
    std::memset(block + begin * kPiece, 0, std::min(end * kPiece, bytes) - begin * kPiece);
  });
  return zeros;
}

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
