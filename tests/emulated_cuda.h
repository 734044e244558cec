// CUDA for a host compiler: as much of it as csrc/cuda uses, so that those files, compiled as they are with this header
// in front, run on the CPU. conftest.py builds them; `pytest --emulated-cuda` runs the tests with them.
//
// Blocks run one after the other, and those of a cooperative launch in turns. So do the threads of a block, each until
// it ends or waits for others. A thread that waits keeps its place as a fiber. Memory is the host's, so that an address
// sanitiser sees what a kernel does; shared memory is a block's own, of just the size that was asked for, and full of
// NaN before.
#pragma once

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

// What csrc registers for CUDA serves CPU tensors.
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, m) _TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)

// The runtime --------------------------------------------------------------------------------------------------------

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaError_t = int;
using cudaStream_t = void*;

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated_cuda {

constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr size_t kPage = 4096, kStack = 1 << 16;
constexpr unsigned kMostTurns = 1 << 20;  // that a thread waits for another block before the grid is taken to be stuck

// What a lane shows to its warp.
union Shown {
  double number;
  unsigned words[6];
};

// The threads of one block.
class Block {
 public:
  template <typename Body>
  Block(dim3 index, size_t shared, const Body& body)
      : index_(index), count_(blockDim.x * blockDim.y * blockDim.z), given_(&body) {
    TORCH_CHECK(count_ <= kMostThreads);
    body_ = [](const void* given) { (*static_cast<const Body*>(given))(); };
    if (shared > 0) std::memset((shared_ = memory(16, shared)).get(), 0xff, shared);
  }

  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }

  // Lets every thread go on until it ends or waits; false if all had ended.
  bool advance() {
    current() = this;
    blockIdx = index_;
    bool waiting = next_ < count_;
    // A fiber goes from thread to thread until one of them waits; then another takes over.
    while (next_ < count_) resume(start_fiber());
    for (auto& fiber : fibers_) {
      if (fiber->is_idle) continue;
      resume(*fiber);
      waiting = true;
    }
    current() = nullptr;
    if (error_) std::rethrow_exception(error_);
    return waiting;
  }

  // Waits for those threads of this one's warp whose bit is set, among which it must be; none may have ended, nor stay
  // away, nor wait for others meanwhile: those that wait for each other once always do.
  void wait_for(unsigned lanes) {
    const unsigned mine = running_, first = mine / kWarp * kWarp, end = std::min(first + kWarp, count_);
    TORCH_CHECK(lanes >> (mine - first) & 1, "emulated CUDA: thread ", mine, " waits in lanes that it is not among");
    const unsigned turn = ++waits_[mine];
    for (unsigned other = first; other < end; ++other) {
      while ((lanes >> (other - first) & 1) && waits_[other] < turn) {
        TORCH_CHECK(!ended_[other], "emulated CUDA: thread ", other, " ended while its warp waits for it");
        pause();
      }
    }
  }

  // Waits for all threads of the block.
  void wait_for_all() {
    const unsigned turn = ++syncs_[running_];
    for (unsigned other = 0; other < count_; ++other) {
      while (syncs_[other] < turn) {
        TORCH_CHECK(!ended_[other], "emulated CUDA: thread ", other, " ended while its block waits for it");
        pause();
      }
    }
  }

  // Lets the others go on, those of other blocks too.
  void pause() {
    Fiber& fiber = *active_;
    swapcontext(&fiber.context, &scheduler_);
    take(fiber.thread);
  }

  // What each lane of this thread's warp shows.
  Shown* lanes() { return &lanes_[running_ / kWarp * kWarp]; }
  unsigned lane() const { return running_ % kWarp; }
  char* shared() { return shared_.get(); }

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  using Memory = std::unique_ptr<char, Free>;

  static Memory memory(size_t alignment, size_t size) {
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, alignment, size) == 0, "emulated CUDA: out of memory");
    return Memory(static_cast<char*>(data));
  }

  struct Fiber {
    ucontext_t context;
    Memory stack = memory(kPage, kStack);  // an address sanitiser forgets what it knows of a stack's pages
    unsigned thread = 0;
    bool is_idle = true;
  };

  Fiber& start_fiber() {
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers_.back();
    fiber.is_idle = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, enter, 0);
    return fiber;
  }

  void resume(Fiber& fiber) {
    active_ = &fiber;
    take(fiber.thread);
    swapcontext(&scheduler_, &fiber.context);
  }

  void take(unsigned thread) {
    running_ = thread;
    threadIdx = dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y);
  }

  static void enter() {
    Block& block = *current();
    Fiber& fiber = *block.active_;
    while (block.next_ < block.count_) {
      block.take(fiber.thread = block.next_++);
      try {
        if (!block.error_) block.body_(block.given_);
      } catch (...) {
        block.error_ = std::current_exception();
      }
      block.ended_[fiber.thread] = true;
    }
    fiber.is_idle = true;
  }

  const dim3 index_;
  const unsigned count_;
  unsigned next_ = 0, running_ = 0;
  void (*body_)(const void*) = nullptr;
  const void* given_;
  Memory shared_;
  std::exception_ptr error_;
  ucontext_t scheduler_;
  Fiber* active_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::array<unsigned, kMostThreads> waits_{}, syncs_{};
  std::array<bool, kMostThreads> ended_{};
  std::array<Shown, kMostThreads> lanes_{};
};

// A device of Hopper's shared memory and registers, of which a thread takes all that it can, with as many
// multiprocessors as a test wants.
constexpr int kMostSharedMemory = 227 << 10, kRegisters = 1 << 16, kMostRegisters = 256;
inline int multiprocessors() {
  const char* given = std::getenv("EMULATED_CUDA_MULTIPROCESSORS");
  return given != nullptr ? std::atoi(given) : 132;
}
inline int blocks_per_multiprocessor(int threads, size_t shared) {
  return std::min(kRegisters / kMostRegisters / threads,
                  static_cast<int>((kMostSharedMemory + 1024) / (shared + 1024)));
}

}  // namespace emulated_cuda

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  TORCH_CHECK(gridDim.y <= 65535 && gridDim.z <= 65535, "emulated CUDA: the grid is too large");
  const bool is_cooperative = config->numAttrs > 0 && config->attrs[0].val.cooperative;
  const auto body = [&] { kernel(arguments...); };
  std::vector<std::unique_ptr<emulated_cuda::Block>> together;
  for (unsigned z = 0; z < gridDim.z; ++z) {
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x; ++x) {
        auto block = std::make_unique<emulated_cuda::Block>(dim3(x, y, z), config->dynamicSmemBytes, body);
        if (is_cooperative) {
          together.push_back(std::move(block));
        } else {
          while (block->advance()) {
          }
        }
      }
    }
  }
  TORCH_CHECK(
      static_cast<int>(together.size()) <=
          emulated_cuda::multiprocessors() *
              emulated_cuda::blocks_per_multiprocessor(blockDim.x * blockDim.y * blockDim.z, config->dynamicSmemBytes),
      "emulated CUDA: a cooperative launch of more blocks than fit at once");
  std::minstd_rand random;  // nothing may depend on which block goes ahead
  for (bool waiting = true; waiting;) {
    waiting = false;
    std::shuffle(together.begin(), together.end(), random);
    for (auto& block : together) waiting |= block->advance();
  }
  return 0;
}

enum cudaDeviceAttr {
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const int values[] = {1, emulated_cuda::kMostSharedMemory, emulated_cuda::multiprocessors(), 9};
  *value = values[which];
  return 0;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int shared) {
  return shared > emulated_cuda::kMostSharedMemory;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads, size_t shared) {
  *blocks = emulated_cuda::blocks_per_multiprocessor(threads, shared);
  return 0;
}

inline void __syncthreads() { emulated_cuda::Block::current()->wait_for_all(); }
template <typename T>
T __ldcg(const T* from) {
  return *from;
}

inline cudaError_t cudaMemset2DAsync(void* data, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
  for (size_t row = 0; row < height; ++row) std::memset(static_cast<char*>(data) + row * pitch, value, width);
  return 0;
}

constexpr unsigned cudaHostAllocPortable = 1, cudaStreamCaptureModeRelaxed = 2;
inline cudaError_t cudaHostAlloc(void** data, size_t size, unsigned) { return (*data = std::malloc(size)) == nullptr; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return 0; }
inline void __threadfence_system() {}

template <typename T>
T atomicCAS(T* at, T expected, T value) {
  const T before = *at;
  if (before == expected) *at = value;
  return before;
}

// The value of another lane of the warp, one of `lanes`.
template <typename T>
T value_of_lane(unsigned lanes, T value, unsigned lane) {
  TORCH_CHECK(lanes >> lane & 1, "emulated CUDA: a value of lane ", lane, ", which takes no part");
  emulated_cuda::Block& block = *emulated_cuda::Block::current();
  block.lanes()[block.lane()].number = value;
  block.wait_for(lanes);
  const T other = static_cast<T>(block.lanes()[lane].number);
  block.wait_for(lanes);
  return other;
}

template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, unsigned distance) {
  return value_of_lane(lanes, value, emulated_cuda::Block::current()->lane() ^ distance);
}

template <typename T>
T __shfl_sync(unsigned lanes, T value, unsigned lane, unsigned width) {
  return value_of_lane(lanes, value, emulated_cuda::Block::current()->lane() / width * width + lane % width);
}

// What csrc/cuda has in PTX.
namespace nlpkernels {

inline void store_words(uint4* to, const uint4& words) {
  TORCH_CHECK(reinterpret_cast<uintptr_t>(to) % sizeof(words) == 0, "emulated CUDA: 16 bytes at an odd address");
  std::memcpy(static_cast<void*>(to), &words, sizeof(words));
}

inline char* shared_memory() { return emulated_cuda::Block::current()->shared(); }

inline void add_release(unsigned* at) { ++*at; }

inline void wait_acquire(const unsigned* at, unsigned least) {
  for (unsigned turn = 0; *at < least; ++turn) {
    TORCH_CHECK(turn < emulated_cuda::kMostTurns, "emulated CUDA: a block waits for ", least, " arrivals, got ", *at);
    emulated_cuda::Block::current()->pause();
  }
}

// Half of 13 bits and more away from 0, as cvt.rna.tf32 does.
inline float rounded_operand(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isfinite(value)) bits = (bits + 0x1000) & ~0x1fffu;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

// mma.m16n8k16, or of float m16n8k8 of TF32, by the layout of its fragments in the manual of PTX: c [16, 8] += a [16,
// k] b [k, 8]. A lane is thread `lane % 4` of group `lane / 4`, and words hold two neighbouring values of a row of a,
// or of a column of b; of float, one, of which the last 13 bits are not read.
template <typename T>
void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  constexpr unsigned each = sizeof(unsigned) / sizeof(T), half = 4 * each;
  emulated_cuda::Block& block = *emulated_cuda::Block::current();
  const unsigned lane = block.lane(), words[6] = {a0, a1, a2, a3, b0, b1};
  std::copy(words, words + 6, block.lanes()[lane].words);
  block.wait_for(~0u);
  const auto value = [&](unsigned from, unsigned word, unsigned k) {
    const unsigned bits = block.lanes()[from].words[word] & (each == 1 ? ~0x1fffu : ~0u);
    T values[each];
    std::memcpy(values, &bits, sizeof(values));
    return static_cast<float>(values[k % each]);
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 2 * half; ++k) {
      const unsigned thread = k % half / each;
      c[i] += value(row % 8 * 4 + thread, row / 8 + k / half * 2, k) * value(column * 4 + thread, 4 + k / half, k);
    }
  }
  block.wait_for(~0u);
}

}  // namespace nlpkernels

// torch's part -------------------------------------------------------------------------------------------------------

#define C10_COMPILE_TIME_MAX_GPUS 1
#define C10_CUDA_CHECK(expression) TORCH_CHECK((expression) == 0)

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device /*device*/) {}
};
inline int current_device() { return 0; }
inline cudaStream_t getCurrentCUDAStream() { return nullptr; }
struct CUDAStreamCaptureModeGuard {
  explicit CUDAStreamCaptureModeGuard(unsigned /*mode*/) {}
  ~CUDAStreamCaptureModeGuard() {}  // not trivial: its variable is used
};
enum class CaptureStatus { None };
inline CaptureStatus currentStreamCaptureStatusMayInitCtx() { return CaptureStatus::None; }
}  // namespace c10::cuda

namespace at::cuda::cub {
inline int get_num_bits(uint64_t most) {
  int bits = 1;
  while (most >>= 1) ++bits;
  return bits;
}

// Stable, by the bits from `first` up to `end`.
template <typename K, typename V>
void radix_sort_pairs(const K* keys_in, K* keys_out, const V* values_in, V* values_out, int64_t count, bool descending,
                      int64_t first, int64_t end) {
  TORCH_CHECK(!descending && count > 0);
  const auto digits = [&](K key) { return static_cast<uint64_t>(key) >> first & ((uint64_t(1) << (end - first)) - 1); };
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return digits(keys_in[a]) < digits(keys_in[b]); });
  for (int64_t i = 0; i < count; ++i) {
    keys_out[i] = keys_in[order[i]];
    values_out[i] = values_in[order[i]];
  }
}
}  // namespace at::cuda::cub

// cuBLAS -------------------------------------------------------------------------------------------------------------

using cublasHandle_t = void*;
using cublasStatus_t = int;
enum cublasMath_t { CUBLAS_DEFAULT_MATH, CUBLAS_TF32_TENSOR_OP_MATH, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F };
enum cudaDataType_t { CUDA_R_64F, CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF };
constexpr int CUBLAS_STATUS_SUCCESS = 0, CUBLAS_GEMM_DEFAULT = 0;

inline cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
inline const char* cublasGetStatusString(cublasStatus_t) { return ""; }

namespace at::cuda {
inline cublasHandle_t getCurrentCUDABlasHandle() { return nullptr; }
}  // namespace at::cuda

// C = alpha op(A) op(B) + beta C, with op(A) [m, k], op(B) [k, n] and C [m, n], all in columns of ld.
inline cublasStatus_t cublasGemmStridedBatchedEx_64(cublasHandle_t, cublasOperation_t op_a, cublasOperation_t op_b,
                                                    int64_t m, int64_t n, int64_t k, const void* alpha, const void* a,
                                                    cudaDataType_t type_a, int64_t lda, int64_t stride_a, const void* b,
                                                    cudaDataType_t type_b, int64_t ldb, int64_t stride_b,
                                                    const void* beta, void* c, cudaDataType_t type_c, int64_t ldc,
                                                    int64_t stride_c, int64_t batch, cublasComputeType_t compute, int) {
  const auto matrices = [&](const void* data, cudaDataType_t type, int64_t rows, int64_t columns, int64_t ld,
                            int64_t stride) {
    TORCH_CHECK(rows > 0 && columns > 0 && batch > 0 && ld >= rows, "emulated cuBLAS: invalid value");
    const at::ScalarType dtypes[] = {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16};
    return at::from_blob(const_cast<void*>(data), {batch, rows, columns}, {stride, 1, ld},
                         at::TensorOptions(dtypes[type]));
  };
  const auto operand = [&](const at::Tensor& matrix, cublasOperation_t op) {
    return op == CUBLAS_OP_T ? matrix.transpose(1, 2) : matrix;
  };
  const bool is_double = compute == CUBLAS_COMPUTE_64F;
  const auto scalar = [&](const void* value) {
    return is_double ? *static_cast<const double*>(value) : *static_cast<const float*>(value);
  };
  const auto wide = is_double ? at::kDouble : at::kFloat;
  const at::Tensor left = operand(
      op_a == CUBLAS_OP_T ? matrices(a, type_a, k, m, lda, stride_a) : matrices(a, type_a, m, k, lda, stride_a), op_a);
  const at::Tensor right = operand(
      op_b == CUBLAS_OP_T ? matrices(b, type_b, n, k, ldb, stride_b) : matrices(b, type_b, k, n, ldb, stride_b), op_b);
  const at::Tensor out = matrices(c, type_c, m, n, ldc, stride_c);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // of which cuBLAS knows nothing
  at::Tensor product = at::bmm(left.to(wide), right.to(wide)).mul(scalar(alpha));
  if (scalar(beta) != 0) product = product.add(out.to(wide), scalar(beta));
  out.copy_(product);
  return CUBLAS_STATUS_SUCCESS;
}
