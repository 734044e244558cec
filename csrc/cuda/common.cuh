// How the kernels of this folder are launched, and the few things that they share.
//
// A kernel works on rows of columns. A block is kThreads threads in groups of 1 to 32, each group on its own row:
// neighbouring threads of a group take neighbouring columns, so that a warp reads whole sectors of memory, and narrow
// rows share a warp. Rows run along grid.x, which is the long dimension of a grid; columns along grid.y.
//
// tests/emulated_cuda.h runs all of this on the CPU: what is new here must be declared there, too.
//
// These kernels have never run on a GPU: nlpkernels loads them only when told to.
#pragma once

#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace nlpkernels {

// What a kernel computes in: float for float and what is narrower, double for double.
template <typename T>
using acc_t = at::opmath_type<T>;

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr unsigned kMaxGridY = 65535;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Shape {
  dim3 grid, block;
};

// A group of threads for each row, a thread for each `vector` columns. Groups are no wider than a row needs, or of
// `group` threads if given.
inline Shape rows_by_columns(int64_t rows, int64_t columns, int vector = 1, int group = 0) {
  const int64_t wanted = ceil_div(columns, vector);
  unsigned threads = group > 0 ? group : 1;
  while (group == 0 && threads < kWarp && threads < wanted) threads *= 2;
  const unsigned groups = kThreads / threads;
  const auto grid_x = static_cast<unsigned>(ceil_div(rows, groups));
  const auto grid_y = static_cast<unsigned>(std::min<int64_t>(ceil_div(wanted, threads), kMaxGridY));
  return {dim3(grid_x, grid_y), dim3(threads, groups)};
}

__device__ __forceinline__ int64_t row_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

// A thread's columns: for (column = first_column<vector>(); column < columns; column += column_step<vector>())
template <int vector = 1>
__device__ __forceinline__ int64_t first_column() {
  return (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * vector;
}
template <int vector = 1>
__device__ __forceinline__ int64_t column_step() {
  return static_cast<int64_t>(gridDim.y) * blockDim.x * vector;
}

// The lanes of a thread's group in its warp. All of them must take part in what follows, however the rest of the warp
// goes; groups are of 1, 2, 4, ... or 32 threads, and so never in two warps.
__device__ __forceinline__ unsigned lanes_of_group() {
  const unsigned lanes = blockDim.x == kWarp ? 0xffffffffu : (1u << blockDim.x) - 1;
  return lanes << (threadIdx.y * blockDim.x % kWarp);
}
template <typename T>
__device__ __forceinline__ T sum_of_group(T value) {
  for (unsigned distance = blockDim.x / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(lanes_of_group(), value, distance);
  }
  return value;
}
template <typename T>
__device__ __forceinline__ T from_first_of_group(T value) {
  return __shfl_sync(lanes_of_group(), value, 0, blockDim.x);
}

// Runs a kernel on the caller's stream; an empty shape is no launch.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, const Arguments&... arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Neighbouring values, read and written at once.
template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T values[count];
};

template <typename T>
constexpr int kPackOf16Bytes = 16 / sizeof(T);

template <int count, typename T>
__device__ __forceinline__ Pack<T, count> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, count>*>(from);
}
#ifdef __CUDACC__  // tests/emulated_cuda.h has it for the CPU
__device__ __forceinline__ void store_words(uint4* to, const uint4& words) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}
#endif

// By 16 bytes where there are as many: nvcc takes assignments apart where it likes, into as many stores as values.
template <int count, typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, count>& values) {
  constexpr size_t wide = sizeof(values) / sizeof(uint4);
  if constexpr (wide > 0) {
    static_assert(sizeof(values) % sizeof(uint4) == 0);
    uint4 words[wide];
    std::memcpy(words, &values, sizeof(values));
#pragma unroll
    for (size_t i = 0; i < wide; ++i) store_words(reinterpret_cast<uint4*>(to) + i, words[i]);
  } else {
    *reinterpret_cast<Pack<T, count>*>(to) = values;
  }
}

// Whether all rows of a contiguous tensor [*, columns], if there is one, are whole packs of `count` that can be read.
template <int count, typename T>
bool has_aligned_rows(const T* data, int64_t columns) {
  return columns % count == 0 && reinterpret_cast<uintptr_t>(data) % sizeof(Pack<T, count>) == 0;
}

}  // namespace nlpkernels
