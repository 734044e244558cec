// Operands of bfloat16 (gemm.h, dots.h), on processors that multiply it themselves.
//
// An element is a pair of neighbouring values of k, as large as a float. One instruction multiplies the 16 pairs of a
// vector with those of another and adds both products to the sum in each lane: twice the products of a multiply-add of
// floats, of as many bytes. So products of bfloat16 are those of float32, with pairs in the place of values. The left
// operand's rows are read as they lie: a pair is two neighbours. Where k is odd the last pair has a value too many,
// which meets a zero in the right operand and has to be finite itself.
//
// Subnormal numbers count as 0, and sums are rounded to the nearest.
#pragma once

#ifdef __AVX512BF16__

#include <immintrin.h>

#include <cstring>

#include "gemm.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

using at::BFloat16;

// Two neighbouring values of k.
struct Pair {
  BFloat16 even{}, odd{};
};

// Rows of a tile, and pairs in a row of one (tiles.h); without tiles pairs are multiplied one at a time.
#ifdef __AMX_BF16__
constexpr int64_t kTile = 16;
#else
constexpr int64_t kTile = 1;
#endif

// The first of `size` lanes that there are n values for, as a mask.
template <typename Mask, int size>
Mask lanes(int64_t n) {
  return n >= size ? static_cast<Mask>(~Mask(0)) : n > 0 ? static_cast<Mask>((Mask(1) << n) - 1) : Mask(0);
}

// 16 pairs: the first n values of two rows, the second of which there may not be.
NLPKERNELS_INLINE __m512i load_pairs(const BFloat16* even, const BFloat16* odd, int64_t n) {
  const auto mask = lanes<__mmask16, 16>(n);
  const auto load = [mask](const BFloat16* p) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)); };
  return odd == nullptr ? load(even) : _mm512_or_si512(load(even), _mm512_slli_epi32(load(odd), 16));
}

template <>
struct Packing<BFloat16> {
  using Element = Pair;
  using V = Vectorized<float>;  // a pair in each lane, or a sum
  static constexpr int64_t values = 2, spare_rows = kTile - 1, spare_values = values * kTile - 1;
  static int64_t depth(int64_t k) { return ceil_div(k, values * kTile) * kTile; }

  static NLPKERNELS_INLINE V spread(const Pair* p) {
    int32_t bits;
    std::memcpy(&bits, p, sizeof(bits));
    return _mm512_castsi512_ps(_mm512_set1_epi32(bits));
  }
  static NLPKERNELS_INLINE V load(const Pair* p) { return V::loadu(p); }
  static NLPKERNELS_INLINE V join(const BFloat16* rows, int64_t ld, int64_t count) {
    return _mm512_castsi512_ps(load_pairs(rows, count > 1 ? rows + ld : nullptr, V::size()));
  }
  static constexpr int64_t row_step = values * V::size();
  static NLPKERNELS_INLINE V load_row(const BFloat16* p, int64_t n = row_step) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(lanes<__mmask32, row_step>(n), p));
  }
  static NLPKERNELS_INLINE V multiply_add(const V& a, const V& b, const V& sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(__m512(a)), reinterpret_cast<__m512bh>(__m512(b)));
  }
};

template <typename Row>
void pack_copied(Pair* dst, int64_t width, int64_t valid, int64_t k, const Row& row) {
  for (int64_t i = 0; i < k; i += 2) {
    const BFloat16 *even = row(i), *odd = i + 1 < k ? row(i + 1) : nullptr;
    for (int64_t j = 0; j < width; j += 16) {
      _mm512_storeu_si512(dst + j, load_pairs(even + j, odd == nullptr ? nullptr : odd + j, valid - j));
    }
    dst += width;
  }
}

inline void pack_transposed(Pair* dst, int64_t width, int64_t valid, int64_t k, const BFloat16* src, int64_t ld) {
  constexpr int64_t size = 16;
  alignas(64) float square[size * size], turned[size * size];
  const int64_t pairs = ceil_div(k, 2);
  for (int64_t j = 0; j < width; j += size) {
    for (int64_t i = 0; i < pairs; i += size) {
      for (int64_t row = 0; row < size; ++row) {
        const auto mask = lanes<__mmask32, 2 * size>(j + row < valid ? k - 2 * i : 0);
        _mm512_store_si512(square + row * size, _mm512_maskz_loadu_epi16(mask, src + (j + row) * ld + 2 * i));
      }
      transpose_square(square, size, turned, size);
      for (int64_t row = 0; row < std::min(size, pairs - i); ++row) {
        _mm512_storeu_ps(dst + (i + row) * width + j, _mm512_load_ps(turned + row * size));
      }
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels

#endif
