// What this machine can reach at best, to hold the kernels against: the rate of fused multiply-adds and of copies.
// Plain C++ behind a C interface, compiled at run time for the processor at hand and called through ctypes.
#include <chrono>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

// A multiply-add takes 4 or 5 cycles and two start in each: 12 independent chains keep both units busy.
constexpr int kChains = 12;
constexpr long kSteps = 1 << 16;

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs work(i) on each of n threads, all at once.
static void on_threads(int n, const std::function<void(int)>& work) {
  std::vector<std::thread> threads;
  for (int i = 1; i < n; ++i) threads.emplace_back(work, i);
  work(0);
  for (auto& thread : threads) thread.join();
}

// Every loop over the chains is unrolled: an array that is indexed anywhere stays in memory, and then it is loads and
// stores that are measured.
static float chains_of_fma(long steps) {
  Vector chain[kChains];
  Vector scale = Vector{} + 0.999f, shift = Vector{} + 0.001f;
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) chain[i] = Vector{} + static_cast<float>(i);
  for (long step = 0; step < steps; ++step) {
    // Unknown to the optimiser from step to step, or it would fold the chains.
    __asm__ volatile("" : "+m"(scale), "+m"(shift));
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * scale + shift;
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * scale + shift;
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * scale + shift;
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * scale + shift;
  }
  Vector sum{};
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum += chain[i];
  return sum[0];
}

#ifdef __AMX_BF16__
// Products of tiles of 16 x 32 and 32 x 16, four sums in turn.
static void products_of_tiles(long steps) {
  static const struct {  // static, as GCC does not know that all of it is read
    unsigned char palette = 1, start_row = 0, reserved[14] = {};
    unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16};
  } shapes;
  _tile_loadconfig(&shapes);  // which sets all tiles to zero
  for (long step = 0; step < steps; ++step) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_release();
}
#endif

// The best rate within `seconds` of work(i) on each of n threads, of `operations` each.
static double best_rate(int threads, double seconds, double operations, const std::function<void(int)>& work) {
  double best = 0;
  for (const double begin = now(); now() - begin < seconds;) {
    const double start = now();
    on_threads(threads, work);
    const double rate = operations * threads / (now() - start);
    if (rate > best) best = rate;
  }
  return best;
}

extern "C" {

// Floating-point operations per second of float32 multiply-adds: the best of several short runs within `seconds`.
double fma_rate(int threads, double seconds) {
  std::vector<float> sink(threads * 16);
  return best_rate(threads, seconds, 2.0 * 4 * kChains * kLanes * kSteps,
                   [&](int i) { sink[i * 16] = chains_of_fma(kSteps); });
}

// The same of bfloat16 products that are summed in float32, where the processor multiplies tiles of them; else 0.
double tile_rate([[maybe_unused]] int threads, [[maybe_unused]] double seconds) {
#ifdef __AMX_BF16__
  constexpr int kAskForFeature = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, ...)
  if (syscall(SYS_arch_prctl, kAskForFeature, kTileData) != 0) return 0;
  return best_rate(threads, seconds, 2.0 * 4 * 16 * 16 * 32 * kSteps, [](int) { products_of_tiles(kSteps); });
#else
  return 0;
#endif
}

// Bytes per second, read plus written, of a copy whose two sides together take `bytes`.
double copy_rate(int threads, long bytes, double seconds) {
  const long half = bytes / 2 / threads;
  std::vector<std::vector<char>> from(threads), to(threads);
  on_threads(threads, [&](int i) {  // each thread touches its own pages first
    from[i].assign(half, 1);
    to[i].assign(half, 2);
  });
  const long repeats = 1 + (128L << 20) / bytes;  // enough that starting threads costs nothing
  return best_rate(threads, seconds, 2.0 * half * repeats, [&](int i) {
    for (long r = 0; r < repeats; ++r) {
      std::memcpy(to[i].data(), from[i].data(), half);
      __asm__ volatile("" ::"r"(to[i].data()) : "memory");  // or the repeats would be dropped
    }
  });
}
}
