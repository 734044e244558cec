// AMX's instructions in software, for a processor that multiplies vectors of bfloat16 but has no tiles:
// csrc/cpu/tiles.h is compiled after this. A tile is 16 rows of 64 bytes, the only shape that is configured there.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps

namespace emulated {

constexpr int kRows = 16, kRowBytes = 64;

inline thread_local bool is_configured = false;
alignas(64) inline thread_local float tiles[8][kRows][kRowBytes / sizeof(float)];

inline float (&tile(int number)) [kRows][kRowBytes / sizeof(float)] {
  if (!is_configured) std::abort();  // a processor would end the process, too
  return tiles[number];
}

inline void load(int number, const void* from, int64_t stride) {
  for (int row = 0; row < kRows; ++row) {
    std::memcpy(tile(number)[row], static_cast<const char*>(from) + row * stride, kRowBytes);
  }
}

inline void store(int number, void* to, int64_t stride) {
  for (int row = 0; row < kRows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, tile(number)[row], kRowBytes);
  }
}

// c[m][n] += sum_k a[m][k] b[k][n] over pairs of bfloat16
inline void multiply(int c, int a, int b) {
  for (int m = 0; m < kRows; ++m) {
    __m512 sum = _mm512_load_ps(tile(c)[m]);
    for (int k = 0; k < kRows; ++k) {
      int32_t pair;
      std::memcpy(&pair, &tile(a)[m][k], sizeof(pair));
      sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)),
                             reinterpret_cast<__m512bh>(_mm512_load_ps(tile(b)[k])));
    }
    _mm512_store_ps(tile(c)[m], sum);
  }
}

}  // namespace emulated

#define _tile_loadconfig(shapes) (static_cast<void>(shapes), emulated::is_configured = true)
#define _tile_release() (emulated::is_configured = false)
#define _tile_loadd(number, from, stride) emulated::load(number, from, stride)
#define _tile_stored(number, to, stride) emulated::store(number, to, stride)
#define _tile_zero(number) std::memset(emulated::tile(number), 0, sizeof(emulated::tile(number)))
#define _tile_dpbf16ps(c, a, b) emulated::multiply(c, a, b)
