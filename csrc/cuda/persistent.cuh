// What a kernel of many steps is made of, whose weights stay in shared memory from the first step to the last: blocks
// that wait for one another, and products with tensor cores of the slice of a matrix that a block holds.
//
// A group of blocks works on some sequences of a batch; its blocks share the rows of the weights. A step of a block:
//   wait until the group's blocks have stored what they made in the step before (wait_acquire)
//   sums [rows of its slice, sequences] = its weights times the whole of what the group has made (Slice::multiply)
//   its cells; store their part of what the group makes; say so (add_release)
// The operand that changes hands lies in two buffers by turns. A block that is past the wait of step i knows that all
// have ended step i - 1, which read the buffer that it now writes: one wait a step is enough. Counters only count up.
// All blocks must be resident, or they would wait for ever: launches are cooperative, and ask first what fits.
//
// Warps share the sums over k, 32 columns in turn, and keep them in registers; a block then adds the parts of its warps
// up in their order. So every element of the operand is read once a block, from L2 to registers, without passing
// through shared memory, and an element's order of summation depends on nothing but the number of columns.
//
// What it should be worth, by count and not by measurement: it has not run on a GPU. A kernel a step reads all of W_hh
// anew, from L2 where it fits: 2 G H^2 bytes, 8.4 MB of an LSTM with H = 1024; here that happens once. Each step it
// launches two kernels, which here are one wait, two passes through L2 (what a block stores, another reads) and three
// __syncthreads; forward, a block reads 2 H bytes of h for each of its sequences, 64 KB of 32 sequences at H = 1024,
// and sums 2 G units H operations of each, by tensor cores; backward, 2 G H bytes of dgates, 256 KB, for twice to four
// times the units. Launches and waits bound both, and backward reads from L2, not operations: the fewer sequences, the
// more one kernel should win, and products of hundreds of sequences, which fill the device by themselves, should be
// left to cuBLAS: hence four passes at most (recurrent.cu, plan_sequence). Kernels of this sort have been measured at 2
// to 5 us a step on an H100 (cuDNN's 1.96 and FlashRNN's 4.8, of an LSTM with B = 16, H = 768; FlashRNN's notebook).
//
// What fits. A block takes bytes(chunks, tiles) of shared memory and a few for its states, and by its registers (195 to
// 228 of 256 threads) has a multiprocessor to itself. 128 blocks of 32 rows of an LSTM with H = 1024 take 101 KB each;
// backward, 64 blocks of 16 rows of W_hh^T, 150 KB. Sequences that fit, of one direction / of two; H in between fits as
// the larger one does:
//              sm_80: 108 multiprocessors, 163 KB         sm_90: 132 multiprocessors, 227 KB
//      H       256        512        1024     1536        256         512        1024     1536     2048
//      LSTM    768/384    384/128    128/0    0/0         1024/512    512/256    256/128  128/0    0/0
//      GRU     1024/512   512/256    128/0    0/0         1280/640    640/256    256/128  128/0    0/0
//      RNN     3456/1664  1248/576   384/128  256/128     4224/2048   2048/1024  768/384  512/256  256/128
//      and backward:
//      LSTM    1664/768   384/128    128/0    0/0         2048/1024   1024/512   256/128  128/0    0/0
//      GRU     1664/768   768/384    128/0    0/0         2048/1024   1024/512   256/128  128/0    128/0
//      RNN     1664/768   768/384    384/128  256/128     2048/1024   1024/512   512/256  256/128  256/128
// In float32 weights take twice the memory: of an LSTM with H = 512 256/128 forward and 384/128 backward on sm_80,
// 512/256 both ways on sm_90; with H = 1024 128/0 forward on sm_90, and not backward.
#pragma once

#include "common.cuh"

namespace nlpkernels {

#ifdef __CUDACC__  // tests/emulated_cuda.h has these for the CPU

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// Says that what this thread wrote, and what it knows that others of its block wrote, can be read.
__device__ __forceinline__ void add_release(unsigned* at) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(at) : "memory");
}

// Waits until *at is `least` or more. What was written before the additions can then be read. Blocks that wait for one
// another are a step apart; a wait of a quarter of a minute is a mistake, and ends as an error.
__device__ __forceinline__ void wait_acquire(const unsigned* at, unsigned least) {
  for (unsigned turn = 0; turn < 1u << 24; ++turn) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    if (value >= least) return;
  }
  __trap();
}

// c [16, 8] += a [16, 16] b [16, 8], of a whole warp. Lane 4 g + i has, in a0 to a3, columns 2i, 2i + 1 of rows g and
// g + 8, then columns 2i + 8, 2i + 9 of the same; in b0 and b1 the same of column g of b, along its rows; and in c
// columns 2i, 2i + 1 of row g, then of row g + 8. Of float, as TF32, half as many columns: i, then i + 4.
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                    unsigned b1) {
#if __CUDA_ARCH__ >= 800
#define NLPKERNELS_MMA(shape, dtype)                                    \
  asm("mma.sync.aligned." shape ".row.col.f32." dtype "." dtype         \
      ".f32 "                                                           \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                  \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, c10::Half>) {
    NLPKERNELS_MMA("m16n8k16", "f16");
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    NLPKERNELS_MMA("m16n8k16", "bf16");
  } else {
    static_assert(std::is_same_v<T, float>);
    NLPKERNELS_MMA("m16n8k8", "tf32");
  }
#undef NLPKERNELS_MMA
#else
  __trap();  // Residency says no
#endif
}

// To TF32, of which mma reads no more: what is beyond it would be cut off.
__device__ __forceinline__ float rounded_operand(float value) {
#if __CUDA_ARCH__ >= 800
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
#else
  return value;
#endif
}

#endif

// A value as an operand of mma.
template <typename T>
__device__ __forceinline__ T as_operand(T value) {
  if constexpr (std::is_same_v<T, float>) {
    return rounded_operand(value);
  } else {
    return value;
  }
}

// Rows of a matrix of weights in shared memory, as the tensor cores take them.
//
// Sums over k are taken by 32 columns, a chunk; of float, by 16. Of a chunk and 16 rows, a tile, lane 4 g + i keeps the
// i-th fourth of the columns of rows g and g + 8: 16 bytes each, read without conflicts of banks. Of the same columns
// of the operand it needs 16 bytes of column g. To two calls of mma these are the columns that it wants: which k is
// which does not matter as long as both operands agree.
template <typename T, int most_tiles>
struct Slice {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;
  static constexpr int kPacked = kPackOf16Bytes<T>;               // columns of a lane
  static constexpr int kColumns = 4 * kPacked, kRows = 16;        // of a chunk, of a tile
  static constexpr int kSequences = 32, kMostTiles = most_tiles;  // that a warp has sums of at once
  static constexpr int kSequenceTiles = kSequences / 8, kAhead = 4;

  uint4* weights;  // [chunks, tiles, 2, 32]
  float* parts;    // [warps, kSequences, stride]: their sums, of rows (along the stride) by sequences
  int chunks, tiles;

  __device__ Slice(char* memory, int chunks, int tiles)
      : weights(reinterpret_cast<uint4*>(memory)),
        parts(reinterpret_cast<float*>(memory + weight_bytes(chunks, tiles))),
        chunks(chunks),
        tiles(tiles) {}

  static __host__ __device__ size_t weight_bytes(int chunks, int tiles) {
    return sizeof(uint4) * chunks * tiles * 2 * kWarp;
  }
  static __host__ __device__ int stride(int tiles) { return tiles * kRows + 4; }  // + 4: no conflicts of banks
  static __host__ __device__ size_t bytes(int chunks, int tiles) {
    return weight_bytes(chunks, tiles) + sizeof(float) * kWarps * kSequences * stride(tiles);
  }

  // Fills the slice; row_at(row) is where a row of the slice begins, or nullptr for a row of zeros.
  template <typename RowAt>
  __device__ void load(int64_t columns, bool is_aligned, const RowAt& row_at) const {
    for (int i = threadIdx.x; i < chunks * tiles * 2 * kWarp; i += kThreads) {
      const int lane = i % kWarp, half = i / kWarp % 2, tile = i / kWarp / 2 % tiles, chunk = i / kWarp / 2 / tiles;
      const T* row = row_at(tile * kRows + half * 8 + lane / 4);
      const int64_t k = chunk * kColumns + lane % 4 * kPacked;
      Pack<T, kPacked> values;
      if (row != nullptr && is_aligned && k < columns) {
        values = load_pack<kPacked>(row + k);
      } else {
#pragma unroll
        for (int n = 0; n < kPacked; ++n) values.values[n] = row != nullptr && k + n < columns ? row[k + n] : T(0);
      }
#pragma unroll
      for (T& value : values.values) value = as_operand(value);
      *reinterpret_cast<Pack<T, kPacked>*>(weights + i) = values;
    }
  }

  // The parts of sums[row, b] = sum over k of weights[row, k] operand[b, k], for b < count <= kSequences. Rows of the
  // operand are chunks * kColumns long. The block must wait before it reads the parts, and before it calls this again.
  __device__ void multiply(const T* operand, int count) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = lane / 4, quarter = lane % 4;
    float sums[kMostTiles][kSequenceTiles][4] = {};
    const int64_t columns = chunks * kColumns;
    const T* from = operand + group * columns + quarter * kPacked;
    for (int first = warp; first < chunks; first += kAhead * kWarps) {
      uint4 b[kAhead][kSequenceTiles];
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int chunk = first + ahead * kWarps;
#pragma unroll
        for (int n = 0; n < kSequenceTiles; ++n) {
          const bool is_there = chunk < chunks && n * 8 + group < count;
          const T* at = from + n * 8 * columns + chunk * kColumns;
          b[ahead][n] = is_there ? __ldcg(reinterpret_cast<const uint4*>(at)) : uint4{};
        }
      }
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int chunk = first + ahead * kWarps;
        if (chunk >= chunks) break;
#pragma unroll
        for (int tile = 0; tile < kMostTiles; ++tile) {
          if (tile >= tiles) break;
          const uint4* a = weights + (chunk * tiles + tile) * 2 * kWarp + lane;
          const uint4 top = a[0], bottom = a[kWarp];
#pragma unroll
          for (int n = 0; n < kSequenceTiles; ++n) {
            if (n * 8 >= count) break;
            mma<T>(sums[tile][n], top.x, bottom.x, top.y, bottom.y, b[ahead][n].x, b[ahead][n].y);
            mma<T>(sums[tile][n], top.z, bottom.z, top.w, bottom.w, b[ahead][n].z, b[ahead][n].w);
          }
        }
      }
    }
    if (warp >= chunks) return;
#pragma unroll
    for (int tile = 0; tile < kMostTiles; ++tile) {
      if (tile >= tiles) break;
#pragma unroll
      for (int n = 0; n < kSequenceTiles; ++n) {
        if (n * 8 >= count) break;
        float* to = parts + (warp * kSequences + n * 8 + quarter * 2) * stride(tiles) + tile * kRows + group;
        to[0] = sums[tile][n][0];
        to[stride(tiles)] = sums[tile][n][1];
        to[8] = sums[tile][n][2];
        to[stride(tiles) + 8] = sums[tile][n][3];
      }
    }
  }

  // Adds the warps' parts up.
  __device__ float sum(int row, int b) const {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      if (warp < chunks) sum += parts[(warp * kSequences + b) * stride(tiles) + row];
    }
    return sum;
  }
};

// What the current device offers to kernels whose blocks wait for one another.
struct Residency {
  int multiprocessors = 0, most_shared = 0;
  bool is_possible = false;

  Residency() {
    const int device = c10::cuda::current_device();
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
      return value;
    };
    multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
    most_shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    is_possible = attribute(cudaDevAttrCooperativeLaunch) != 0 && attribute(cudaDevAttrComputeCapabilityMajor) >= 8;
  }

  // How many blocks of a kernel can be resident at once.
  template <typename... Parameters>
  int64_t blocks(void (*kernel)(Parameters...), int threads, size_t shared) const {
    if (!is_possible || shared > static_cast<size_t>(most_shared)) return 0;
    // To all that there is, not to `shared`: another thread may be about to launch the same kernel with more.
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared));
    int blocks = 0;
    C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared));
    return static_cast<int64_t>(blocks) * multiprocessors;
  }
};

// Runs a kernel on the caller's stream, all blocks at once: Residency was asked whether they fit.
template <typename... Parameters, typename... Arguments>
void launch_together(void (*kernel)(Parameters...), const Shape& shape, size_t shared, const Arguments&... arguments) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shared;
  config.stream = c10::cuda::getCurrentCUDAStream();
  config.attrs = &together;
  config.numAttrs = 1;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace nlpkernels
