// Products of bfloat16 with AMX, tiles of 16 rows at a time.
//
// An instruction multiplies a tile of a, 16 rows of 16 pairs as they lie, with a tile of b, 16 pairs of 16 columns, and
// adds the products to a tile of 16 x 16 floats. b is packed in panels like float's, [depth][width], but of pairs: that
// is what a tile of it looks like in memory.
//
// Two tiles of rows and two of columns make four sums, for which four tiles are loaded: an Intel core, which
// can multiply 3.1 TFLOP/s, then reaches 2.9 with both operands in the first-level cache and 2.5 with b in the second.
// A tile takes as long with fewer rows; what is in the rows that are too many is dropped.
//
// Same bits: an element of c adds its products in the order of k, wherever in a tile it stands.
#pragma once

#ifdef __AMX_BF16__

#include <array>
#include <memory>

#include "bfloat16.h"
#include "dots.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

// How many tiles of pairs ahead b is fetched into the first-level cache.
constexpr int64_t kFetch = 2;

// A block of a left operand that is given by its columns, turned into rows.
template <>
struct LeftBlock<BFloat16> {
  static constexpr int64_t most_k = 512, most_m = 192;

  LeftOperand<BFloat16> pack(const RowTiles& tiles, int64_t k, const BFloat16* columns, int64_t ld) const {
    alignas(64) float square[kTile * kTile];
    for (int64_t m = 0; m < tiles.total(); m += kTile) {
      for (int64_t i = 0; i < k; i += 2 * kTile) {
        for (int64_t pair = 0; pair < kTile; ++pair) {
          const BFloat16* even = columns + (i + 2 * pair) * ld + m;
          const int64_t left = k - i - 2 * pair;
          _mm512_store_si512(square + pair * kTile, left <= 0
                                                        ? _mm512_setzero_si512()
                                                        : load_pairs(even, left > 1 ? even + ld : nullptr, kTile));
        }
        transpose_square(square, kTile, reinterpret_cast<float*>(storage_.data() + m * kStride + i), kStride / 2);
      }
    }
    return {storage_.data(), k, kStride};
  }

 private:
  static constexpr int64_t kStride = row_stride<BFloat16>(most_k);
  const Scratch<BFloat16> storage_{most_m * kStride};
};

// Tiles 0 to 3 are sums, [row tile][column tile], 4 and 5 of a, 6 and 7 of b: all of 16 rows of 64 bytes.
template <>
struct ProductScope<BFloat16> {
  ProductScope() {
    static constexpr struct {  // static, as GCC does not know that all of it is read
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    _tile_loadconfig(&shapes);
  }
  ~ProductScope() { _tile_release(); }
  ProductScope(const ProductScope&) = delete;
};

// c[m][n] (+)= sum_k a[m][k] b[k][n] for M tiles of rows and N tiles of columns, `depth` pairs of k. b's rows are
// `width` pairs.
template <int M, int N>
void multiply_tiles(int64_t depth, const BFloat16* a, int64_t lda, const Pair* b, int64_t width, float* c, int64_t ldc,
                    bool add) {
  const int64_t c_bytes = ldc * sizeof(float), a_bytes = lda * sizeof(BFloat16), b_bytes = width * sizeof(Pair);
  asm volatile(
      "" ::
          : "memory");  // GCC does not know that tiles are read from memory: what is written before has to be there
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (N > 1) _tile_loadd(1, c + kTile, c_bytes);
    if constexpr (M > 1) _tile_loadd(2, c + kTile * ldc, c_bytes);
    if constexpr (M > 1 && N > 1) _tile_loadd(3, c + kTile * ldc + kTile, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (M > 1) _tile_zero(2);
    if constexpr (M > 1 && N > 1) _tile_zero(3);
  }
  for (; depth > 0; depth -= kTile) {
    for (int64_t i = kFetch * kTile; i < (kFetch + 1) * kTile; ++i) {
      for (int n = 0; n < N; ++n) _mm_prefetch(reinterpret_cast<const char*>(b + i * width + n * kTile), _MM_HINT_T0);
    }
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(7, b + kTile, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M > 1) {
      _tile_loadd(5, a + kTile * lda, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
    }
    a += 2 * kTile;
    b += kTile * width;
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (N > 1) _tile_stored(1, c + kTile, c_bytes);
  if constexpr (M > 1) _tile_stored(2, c + kTile * ldc, c_bytes);
  if constexpr (M > 1 && N > 1) _tile_stored(3, c + kTile * ldc + kTile, c_bytes);
}

// A left operand is read faster anew from the second-level cache than sums are.
template <>
inline int64_t slice_depth<BFloat16>(const RowTiles&) {
  return int64_t(1) << 40;
}

// The left operand has room for rows up to a whole tile, and each row finite values up to a whole tile of k.
template <>
class StripGroup<BFloat16> {
 public:
  StripGroup(const RowTiles& tiles, const LeftOperand<BFloat16>& a, Slice slice, int64_t ldc, bool add)
      : rows_(tiles.total()), a_(a), slice_(slice), ldc_(ldc), add_(add) {}

  void add(const Pair* b, float* c, int64_t width) const {
    if (width == kTile) {
      multiply<1>(b, c);
    } else {
      multiply<2>(b, c);
    }
  }
  void flush() const {}

 private:
  template <int N>
  void multiply(const Pair* b, float* c) const {
    constexpr int64_t width = N * kTile;
    static_assert(N <= kTileVecs && kTileVecs == 2);
    const int64_t depth = Packing<BFloat16>::depth(slice_.end - slice_.begin);
    b += slice_.begin / 2 * width;
    for (int64_t m = 0; m < rows_; m += 2 * kTile) {
      const int64_t rows = std::min(2 * kTile, rows_ - m);
      const BFloat16* a = a_.data + m * a_.ld + slice_.begin;
      float* out = c + m * ldc_;
      const auto run = [&](float* to, int64_t ld) {
        if (rows > kTile) {
          multiply_tiles<2, N>(depth, a, a_.ld, b, width, to, ld, add_);
        } else {
          multiply_tiles<1, N>(depth, a, a_.ld, b, width, to, ld, add_);
        }
      };
      if (rows % kTile == 0) {
        run(out, ldc_);
        continue;
      }
      alignas(64) float sums[2 * kTile * width];
      const auto copy = [&](float* to, int64_t ld_to, const float* from, int64_t ld_from) {
        for (int64_t r = 0; r < rows; ++r) {
          for (int n = 0; n < N; ++n) {
            _mm512_storeu_ps(to + r * ld_to + n * kTile, _mm512_loadu_ps(from + r * ld_from + n * kTile));
          }
        }
      };
      if (add_) copy(sums, width, out, ldc_);
      run(sums, width);
      copy(out, ldc_, sums, width);
    }
  }

  const int64_t rows_;
  const LeftOperand<BFloat16>& a_;
  const Slice slice_;
  const int64_t ldc_;
  const bool add_;
};

// Rows that one step multiplies with weights, as a right operand: weights are the left one, as they lie.
template <>
struct StepRows<BFloat16> {
  StepRows(int64_t k, int64_t rows) : k(k), packed(k, rows) {}

  void set(const BFloat16* rows, int64_t distance) { packed.pack_transpose_of(rows, distance); }
  void set(const float* rows, int64_t distance) {
    const OperandRows<BFloat16> copies(packed.panels.columns, k);
    for (const auto r : c10::irange(packed.panels.columns)) copies.copy(r, rows + r * distance);
    set(copies.row(0), copies.stride);
  }

  const int64_t k;
  PackedMatrix<BFloat16> packed;
};

// As in dots.h. Products stand in their tiles [column][row], and are turned as they go to `out`.
inline void multiply_rows(const DotTerm<BFloat16, BFloat16>* terms, int64_t count, int64_t /*rows*/, int64_t columns,
                          float* out, int64_t ldo) {
  constexpr int64_t most = 2 * kTile;
  for (int64_t n = 0; n < columns; n += most) {
    const int64_t height = std::min(most, columns - n);
    // Weights whose rows do not fill tiles: a tile reads no others in their place.
    std::array<std::unique_ptr<OperandRows<BFloat16>>, 2> copies;
    std::array<LeftOperand<BFloat16>, 2> left;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = terms[i].a->k;
      const BFloat16* w = terms[i].w + n * k;
      left[i] = {w, k, k};
      if (height % kTile == 0 && k % most == 0) continue;
      copies[i] = std::make_unique<OperandRows<BFloat16>>(height, k);
      for (const auto row : c10::irange(height)) copies[i]->copy(row, w + row * k);
      left[i] = copies[i]->operand();
    }
    const Panels<float>& panels = terms->a->packed.panels;
    for (const auto panel : c10::irange(panels.count())) {
      alignas(64) float products[most * most], turned[kTile * kTile];
      const int64_t first = panels.begin(panel), width = panels.width(panel), valid = panels.valid(panel);
      for (int64_t i = 0; i < count; ++i) {
        StripGroup<BFloat16>(RowTiles(ceil_div(height, kTile) * kTile), left[i], {0, left[i].k}, width, i > 0)
            .add(terms[i].a->packed.strip(panel, 0), products, width);
      }
      for (int64_t column = 0; column < height; column += kTile) {
        const auto mask = lanes<__mmask16, 16>(height - column);
        for (int64_t row = 0; row < valid; row += kTile) {
          transpose_square(products + column * width + row, width, turned, kTile);
          for (int64_t r = 0; r < std::min(kTile, valid - row); ++r) {
            _mm512_mask_storeu_ps(out + (first + row + r) * ldo + n + column, mask, _mm512_load_ps(turned + r * kTile));
          }
        }
      }
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels

#endif
