// Matrix products with weights as they lie, row by row: for one step, which uses each weight once and would spend more
// on packing it (gemm.h) than on multiplying.
//
// out[m][n] = sum over terms of a[m] . w[n]
//
// A tile takes the dot products of 1 to 6 rows of a with 4 or 8 rows of weights at once: a vector of sums for each,
// whose lanes are added up at the end.
//
// One Zen 4 core with AVX2, against packing the weights: a GRU cell of 128 units and one sequence takes 15 us for 34,
// an LSTM cell of 256 and five 131 for 191, and with 256 sequences both run at 79 % of the peak. A tile of one row is
// bound by the second-level cache. Tiles of 4 rows and 3 columns were a tenth slower than 3 and 4, whose sums are
// stored by four; a prefetch for each row of weights cost more than all else.
//
// One Zen 5 core with AVX-512, which multiplies twice as fast but reads no faster: tiles of 4 rows, blocks of rows that
// stay in the first-level cache, and lanes of four vectors added together take 0.91 of the time of tiles of 3 without
// them for 256 sequences; all of 5 or 6 rows as one tile 0.78 and 0.9.
//
// Same bits: a dot product adds its terms one after the other, those of a vector's lane in the order of k, and then the
// lanes as a tree, whatever the tile that it is in.
//
// Of bfloat16, a lane holds a pair (bfloat16.h).
#pragma once

#include <memory>
#include <type_traits>

#include "gemm.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

// Rows of k values that a step multiplies with weights.
template <typename Operand>
struct StepRows {
  StepRows(int64_t k, int64_t rows) : k(k), rows_(rows) {}

  template <typename From>
  void set(const From* rows, int64_t distance) {
    if constexpr (std::is_same_v<From, Operand>) {
      a = rows, lda = distance;
    } else {
      copies_ = std::make_unique<OperandRows<Operand>>(rows_, k);
      for (const auto r : c10::irange(rows_)) copies_->copy(r, rows + r * distance);
      a = copies_->row(0), lda = copies_->stride;
    }
  }

  const int64_t k;
  const Operand* a = nullptr;
  int64_t lda = 0;

 private:
  const int64_t rows_;
  std::unique_ptr<OperandRows<Operand>> copies_;
};

// One term: rows a, and rows of weights w.
template <typename Operand, typename T>
struct DotTerm {
  const StepRows<Operand>* a;
  const T* w;
};

// Columns of a tile of 1, 2, 3, ... rows: enough sums to hide the latency of a multiply-add, as many as there are
// registers for, and four neighbours.
constexpr int kDotColumns[] = {8, 4, 4, 4, 4, 4};
// Rows of a tile, and as many as are taken as one if there are no more: then weights are read but once. And rows of the
// left operand that stay in the first-level cache while all columns pass.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kDotRows = 4, kDotRowsAlone = 6;
constexpr int64_t kDotBytes = 24 * 1024;
#else
constexpr int kDotRows = 3, kDotRowsAlone = 3;
constexpr int64_t kDotBytes = INT64_MAX;  // without gain
#endif

// The sums of four vectors' lanes, added as a tree. No pointers to the vectors: they would have to be in memory.
template <typename scalar>
NLPKERNELS_INLINE void add_lanes(const Vectorized<scalar>& a, const Vectorized<scalar>& b, const Vectorized<scalar>& c,
                                 const Vectorized<scalar>& d, scalar* sums) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<scalar, float>) {
#if defined(CPU_CAPABILITY_AVX512)
    const auto pairs = [](__m512 x, __m512 y) {
      return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)));
    };
    const __m512d ab = pairs(a, b), cd = pairs(c, d);
    const __m512 fours =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    const __m256 abcd = _mm256_add_ps(_mm512_castps512_ps256(fours), _mm512_extractf32x8_ps(fours, 1));
#else
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
#endif
    _mm_store_ps(sums, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
    return;
  }
#endif
  const auto add = [](const Vectorized<scalar>& vector) {
    constexpr int size = Vectorized<scalar>::size();
    alignas(64) scalar lanes[size];
    vector.store(lanes);
    for (int count = size / 2; count > 0; count /= 2) {
      for (int j = 0; j < count; ++j) lanes[j] = lanes[2 * j] + lanes[2 * j + 1];
    }
    return lanes[0];
  };
  sums[0] = add(a), sums[1] = add(b), sums[2] = add(c), sums[3] = add(d);
}

// Keeps the compiler from reading a value from memory at each use of it: that takes one more load for each.
#if defined(CPU_CAPABILITY_AVX512)
using Floats = __m512;
using Doubles = __m512d;
#elif defined(CPU_CAPABILITY_AVX2)
using Floats = __m256;
using Doubles = __m256d;
#endif
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
NLPKERNELS_INLINE Vectorized<float> kept(Floats value) {
  asm("" : "+v"(value));
  return value;
}
NLPKERNELS_INLINE Vectorized<double> kept(Doubles value) {
  asm("" : "+v"(value));
  return value;
}
#else
template <typename V>
V kept(const V& value) {
  return value;
}
#endif

// The dot products of M rows of a, from `row` on, with `columns` rows of weights, from `column` on, at most
// kDotColumns[M - 1].
template <int M, typename Operand, typename T>
void dot_tile(const DotTerm<Operand, T>* terms, int64_t count, int64_t row, int64_t column, int64_t columns,
              acc_t<Operand>* __restrict out, int64_t ldo) {
  using P = Packing<Operand>;
  using V = typename P::V;
  constexpr int N = kDotColumns[M - 1];
  union Sums {  // without V's constructor, as in multiply_tile
    Sums() {}
    V of[M][N];
  } all_sums;
  auto& sum = all_sums.of;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[m][n] = V(0);
  }
  for (const auto* term = terms; term != terms + count; ++term) {
    const int64_t k = term->a->k, lda = term->a->lda;
    const Operand* a = term->a->a + row * lda;
    const T* w[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) w[n] = term->w + (column + std::min<int64_t>(n, columns - 1)) * k;
    // Always inline: GCC leaves the sums in memory where it makes this a call.
    const auto multiply = [&](int64_t i, const auto& load) __attribute__((always_inline)) {
      V left[M];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) left[m] = load(a + m * lda + i);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const V right = M > 1 ? kept(load(w[n] + i)) : load(w[n] + i);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sum[m][n] = P::multiply_add(left[m], right, sum[m][n]);
      }
    };
    int64_t i = 0;
    for (; i + P::row_step <= k; i += P::row_step) multiply(i, [](const auto* p) { return P::load_row(p); });
    if (i < k) multiply(i, [&](const auto* p) { return P::load_row(p, k - i); });
  }
  alignas(16) acc_t<Operand> dots[M * N];
  const V* sums = &sum[0][0];
#pragma GCC unroll 4
  for (int i = 0; i < M * N; i += 4) add_lanes(sums[i], sums[i + 1], sums[i + 2], sums[i + 3], dots + i);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    if (columns == N) {
      for (int n = 0; n < N; ++n) out[m * ldo + n] = dots[m * N + n];
    } else {
      for (int64_t n = 0; n < columns; ++n) out[m * ldo + n] = dots[m * N + n];
    }
  }
}

// For `rows` rows of a and `columns` rows of weights.
template <typename Operand, typename T>
void multiply_rows(const DotTerm<Operand, T>* terms, int64_t count, int64_t rows, int64_t columns, acc_t<Operand>* out,
                   int64_t ldo) {
  const RowTiles tiles(rows, rows <= kDotRowsAlone ? kDotRowsAlone : kDotRows);
  int64_t block = tiles.count;
  if (kDotBytes < INT64_MAX && tiles.count > 1) {
    int64_t tile_bytes = 0;
    for (const auto* term = terms; term != terms + count; ++term) tile_bytes += term->a->k * kDotRows * sizeof(Operand);
    block = std::max<int64_t>(1, kDotBytes / std::max<int64_t>(1, tile_bytes));
  }
  const auto run = [&]<int M>(int64_t begin, int64_t end) {
    constexpr int N = kDotColumns[M - 1];
    for (int64_t first = begin; first < end; first += block) {
      const int64_t last = std::min(first + block, end);
      for (int64_t n = 0; n < columns; n += N) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t m = tiles.begin(i);
          dot_tile<M>(terms, count, m, n, std::min<int64_t>(N, columns - n), out + m * ldo + n, ldo);
        }
      }
    }
  };
  const auto run_all = [&]<int... M>(std::integer_sequence<int, M...>, int64_t size, int64_t first, int64_t last) {
    ((size == M + 1 ? run.template operator()<M + 1>(first, last) : void()), ...);
  };
  constexpr std::make_integer_sequence<int, kDotRowsAlone> sizes;
  run_all(sizes, tiles.low + 1, 0, tiles.larger);
  run_all(sizes, tiles.low, tiles.larger, tiles.count);
}

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
