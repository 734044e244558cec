// Matrix products for the time loops: packed panels of weights and one register-tile microkernel.
//
// c += a b, or c = a b, where
//   b  has been packed in panels of up to kTileVecs vectors of columns, each stored [K][width]   (PackedMatrix)
//   a  is read where it lies, rows of K values, a tile of up to kTileRows rows at a time; or, if it is given by its
//      columns, from tiles that have been packed, each stored [K][height]                        (LeftOperand)
// Operands are of the type of c, or of bfloat16: then pairs of neighbouring k stand in the place of single values
// (bfloat16.h), and where processors have tiles these multiply them (tiles.h).
// A step k of the microkernel loads `width` values of b and broadcasts `height` values of a into kTileRows * kTileVecs
// accumulators, which is what it takes to hide the latency of a fused multiply-add. For few rows it takes up to four
// panels at once instead, so that a matrix-vector product has enough accumulators too; for a narrow panel alone, more
// rows.
//
// Loop order: slice of k -> panel -> block of k -> tiles of rows. A block of a panel (kPanelBytes) stays in the
// first-level cache while all rows pass over it, and meanwhile the next block is fetched: weights of more than the
// second-level cache come from the third at every step, which without that costs a tenth to a quarter of the time (Zen
// 3, K 512 to 1150). A slice of the left operand (kSliceBytes) stays in the second-level cache while all panels pass.
//
// One Zen 4 core with AVX2, 20 to 64 rows, K 256 and 512, 1,024 columns: 95 to 97 % of the peak. With tiles of 6 rows
// and 2 vectors, which load more for each multiply-add, 89 to 92 %; with panels of 8 KB in the place of 24 and chains
// of 64 in the place of 128 1 to 3 % less; with the loop over k not unrolled 1 % less.
//
// Same bits: an element of c adds its products in the order k = 0, 1, ..., kChain of them at a time, whatever the tile
// that it is in, the number of rows or the number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "memory.h"
#include "vector.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

// Register tile: 12 of AVX2's 16 registers, 24 of AVX-512's 32 are accumulators. What is loaded for a multiply-add is
// least where rows and vectors are as many, and batches are more often multiples of 4 than of anything else.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileRows = 12, kTileVecs = 2;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kTileRows = 4, kTileVecs = 3;
#else
constexpr int kTileRows = 4, kTileVecs = 1;
#endif
constexpr int kMaxStrips = 4, kMaxTileRows = 12;
constexpr int64_t kPanelBytes = 24 * 1024;
constexpr int64_t kSliceBytes = 128 * 1024;
// Products that are added up in one accumulator before it is added to c: the error of a sum of K products grows with
// sqrt(kChain + K / kChain) rather than sqrt(K). Blocks of k are multiples of it.
constexpr int64_t kChain = 128;
constexpr int64_t kAhead = 16;
// Multiply-adds below which another thread costs more than it gives.
constexpr int64_t kMinWork = 1 << 17;
// Values that a thread packs at least.
constexpr int64_t kPackGrain = 1 << 15;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many of a call's threads some multiply-adds are worth.
inline int64_t threads_for(int64_t work, int64_t threads) { return std::clamp<int64_t>(work / kMinWork, 1, threads); }

// Distance of rows of `columns` values in a kernel's own memory: whole cache lines, an odd number of them. Rows a power
// of two apart would fall into the same few sets of the cache and drive each other out of it.
template <typename scalar>
constexpr int64_t row_stride(int64_t columns) {
  constexpr int64_t line = 64 / sizeof(scalar);
  return (ceil_div(columns, line) | 1) * line;
}

// `total` things cut into as few parts of at most `most` as there can be, whose sizes differ by at most one: then no
// tile is left with too few accumulators to hide a multiply-add's latency.
struct EvenParts {
  EvenParts(int64_t total, int64_t most)
      : count(ceil_div(total, most)), low(count ? total / count : 0), larger(count ? total % count : 0) {}
  int64_t count, low, larger;

  int64_t total() const { return begin(count); }
  int64_t size(int64_t part) const { return low + (part < larger); }
  int64_t begin(int64_t part) const { return part * low + std::min(part, larger); }
};

// [0, total) cut likewise into slices of at most `most`, a multiple of `unit`; all but the last are whole units.
inline std::vector<Slice> even_slices(int64_t total, int64_t unit, int64_t most) {
  const EvenParts parts(ceil_div(total, unit), most / unit);
  std::vector<Slice> slices;
  for (const auto i : c10::irange(parts.count)) {
    slices.push_back({parts.begin(i) * unit, std::min(total, parts.begin(i + 1) * unit)});
  }
  return slices;
}

// The columns of a matrix, or the units of a layer, cut into panels of whole vectors.
template <typename scalar>
struct Panels {
  static constexpr int64_t vector = Vectorized<scalar>::size();
  static constexpr int64_t most = kTileVecs * vector;
  explicit Panels(int64_t columns) : columns(columns), vectors(ceil_div(columns, vector), kTileVecs) {}
  int64_t columns;
  EvenParts vectors;

  int64_t count() const { return vectors.count; }
  int64_t begin(int64_t panel) const { return vectors.begin(panel) * vector; }
  int64_t width(int64_t panel) const { return vectors.size(panel) * vector; }
  int64_t valid(int64_t panel) const { return std::min(width(panel), columns - begin(panel)); }
  int64_t padded() const { return vectors.total() * vector; }
  Slice all() const { return {0, count()}; }
};

// How operands of a type are packed and multiplied: as elements that hold `values` values of k each, `depth` of them
// for k. Of a left operand up to so many more rows are read than there are, and more values of a row.
template <typename Operand>
struct Packing {
  using Element = Operand;
  using V = Vectorized<Operand>;
  static constexpr int64_t values = 1, spare_rows = 0, spare_values = 0;
  static int64_t depth(int64_t k) { return k; }

  // V has an element in each lane: the same in all; packed ones; and the values of `count` rows, one above the other.
  static NLPKERNELS_INLINE V spread(const Element* p) { return V(*p); }
  static NLPKERNELS_INLINE V load(const Element* p) { return V::loadu(p); }
  static NLPKERNELS_INLINE V join(const Operand* row, int64_t /*ld*/, int64_t /*count*/) { return V::loadu(row); }
  // Or neighbours along k, from a row of T that is read as it lies: the first n values, and zeros.
  static constexpr int64_t row_step = V::size();
  template <typename T>
  static NLPKERNELS_INLINE V load_row(const T* p, int64_t n = row_step) {
    return load_vector(p, n);
  }
  static NLPKERNELS_INLINE V multiply_add(const V& a, const V& b, const V& sum) { return at::vec::fmadd(a, b, sum); }
};

template <typename Operand>
using Element = typename Packing<Operand>::Element;

// What products need of the thread that runs them, as long as it does.
template <typename Operand>
struct ProductScope {
  ProductScope() {}
};

// dst[k][j] = row(k)[j] for j < valid, 0 for the rest of width
template <typename scalar, typename Row>
void pack_copied(scalar* dst, int64_t width, int64_t valid, int64_t k, const Row& row) {
  constexpr int64_t vector = Vectorized<scalar>::size();
  for (const auto i : c10::irange(k)) {
    const auto* src = row(i);
    int64_t j = 0;
    for (; j + vector <= valid; j += vector) load_vector(src + j).store(dst + j);
    for (; j < valid; ++j) dst[j] = static_cast<scalar>(src[j]);
    for (; j < width; ++j) dst[j] = 0;
    dst += width;
  }
}

// dst[k][j] = src[j][k] for j < valid, 0 for the rest of width. A vector of columns at a time, along k: their rows of
// src come from the third-level cache or from further away, and are asked for ahead.
template <typename scalar, typename T>
void pack_transposed(scalar* dst, int64_t width, int64_t valid, int64_t k, const T* src, int64_t ld) {
  constexpr int block = Vectorized<scalar>::size();
  constexpr int64_t ahead = 256 / sizeof(T);
  const int64_t whole = valid / block * block, done = k / block * block;
  for (int64_t j = 0; j < whole; j += block) {
    for (int64_t i = 0; i < done; i += block) {
      const T* from = src + j * ld + i;
      for (int row = 0; row < block; ++row) __builtin_prefetch(from + row * ld + ahead);
      if constexpr (std::is_same_v<scalar, T>) {
        transpose_square(from, ld, dst + i * width + j, width);
      } else {
        alignas(64) scalar converted[block * block];
        for (int row = 0; row < block; ++row) load_vector(from + row * ld).store(converted + row * block);
        transpose_square(converted, block, dst + i * width + j, width);
      }
    }
  }
  for (const auto j : c10::irange(width)) {
    for (int64_t i = j < whole ? done : 0; i < k; ++i) {
      dst[i * width + j] = j < valid ? static_cast<scalar>(src[j * ld + i]) : scalar(0);
    }
  }
}

// The right operand, [K, columns] for each of `gates` gates. Storage: [panel][gate][depth][width of the panel]. A
// matrix that is multiplied with once only need not be stored: then a strip is packed when it is asked for, and stays
// until as many others have been as are multiplied with together.
template <typename Operand>
class PackedMatrix {
  using scalar = acc_t<Operand>;
  using Element = typename Packing<Operand>::Element;

 public:
  PackedMatrix(int64_t k, int64_t columns, int64_t gates = 1, bool is_stored = true)
      : k(k),
        gates(gates),
        panels(columns),
        is_stored_(is_stored),
        storage_(depth_ * (is_stored ? gates * panels.padded() : kPassing * Panels<scalar>::most)) {}

  const int64_t k, gates;
  const Panels<scalar> panels;

  const Element* strip(int64_t panel, int64_t gate) const {
    if (is_stored_) return stored(panel, gate);
    Element* passing = storage_.data() + (packed_++ % kPassing) * depth_ * Panels<scalar>::most;
    pack_strip(passing, panel, gate);
    return passing;
  }

  // From w [gates * columns, K] with rows ld apart: b = w^T.
  template <typename T>
  void pack_transpose_of(const T* w, int64_t ld) {
    pack_strip_ = [this, w, ld](Element* dst, int64_t panel, int64_t gate) {
      const T* src = w + (gate * panels.columns + panels.begin(panel)) * ld;
      pack_transposed(dst, panels.width(panel), panels.valid(panel), k, src, ld);
    };
    pack_stored();
  }

  // From w [K, columns] with rows ld apart: b = w, one gate.
  template <typename T>
  void pack(const T* w, int64_t ld) {
    pack_strip_ = [this, w, ld](Element* dst, int64_t panel, int64_t) {
      const T* src = w + panels.begin(panel);
      pack_copied(dst, panels.width(panel), panels.valid(panel), k, [&](int64_t i) { return src + i * ld; });
    };
    pack_stored();
  }

  // From row(k)[0 .. columns): b = those rows, one gate. Runs on the calling thread.
  template <typename Row>
  void pack_rows(const Row& row) const {
    constexpr int64_t values = Packing<Operand>::values;
    for (int64_t i = 0; i < k; i += values) {
      for (const auto panel : c10::irange(panels.count())) {
        const int64_t width = panels.width(panel);
        pack_copied(stored(panel, 0) + i / values * width, width, panels.valid(panel), std::min(values, k - i),
                    [&](int64_t next) { return row(i + next) + panels.begin(panel); });
      }
    }
    for (const auto panel : c10::irange(panels.count())) fill_up(stored(panel, 0), panel);
  }

  PackedMatrix(const PackedMatrix&) = delete;  // pack_strip_ points to this one

 private:
  static constexpr int64_t kPassing = kMaxStrips + 1;

  Element* stored(int64_t panel, int64_t gate) const {
    return storage_.data() + depth_ * (gates * panels.begin(panel) + gate * panels.width(panel));
  }

  void pack_strip(Element* dst, int64_t panel, int64_t gate) const {
    pack_strip_(dst, panel, gate);
    fill_up(dst, panel);
  }

  // Zeros for what elements hold beyond k.
  void fill_up(Element* strip, int64_t panel) const {
    const int64_t width = panels.width(panel), packed = ceil_div(k, Packing<Operand>::values);
    std::fill(strip + packed * width, strip + depth_ * width, Element());
  }

  void pack_stored() const {
    if (!is_stored_) return;
    const int64_t strip_size = std::max<int64_t>(1, k * Panels<scalar>::most);
    at::parallel_for(0, panels.count() * gates, ceil_div(kPackGrain, strip_size), [&](int64_t begin, int64_t end) {
      for (const auto i : c10::irange(begin, end)) {
        pack_strip(stored(i / gates, i % gates), i / gates, i % gates);
      }
    });
  }

  const int64_t depth_ = Packing<Operand>::depth(k);
  const bool is_stored_;
  std::function<void(Element* dst, int64_t panel, int64_t gate)> pack_strip_;
  mutable int64_t packed_ = 0;
  Scratch<Element> storage_;
};

// Values between packed tiles, and behind a matrix that they are packed from: a vector of the widest kind.
constexpr int64_t kTilePadding = 16;

struct RowTiles : EvenParts {
  explicit RowTiles(int64_t rows, int64_t most = kTileRows) : EvenParts(rows, most) {}
};

// Where a packed tile of a left operand begins, of `depth` elements of k. The tiles lie a cache line more than their
// size apart, as those of a size that is a multiple of a power of two would share few sets of the cache.
inline int64_t packed_tile(const RowTiles& tiles, int64_t tile, int64_t depth) {
  return tiles.begin(tile) * depth + tile * kTilePadding;
}

// A left operand of k columns. Element (m, i) of a tile stands at tile(..., 0)[m * element_ld() + i], or at
// [i * height + m] if it is packed.
template <typename Operand>
struct LeftOperand {
  using Element = typename Packing<Operand>::Element;
  const Operand* data;
  int64_t k;
  int64_t ld;  // distance of rows, whole elements; 0 if packed

  bool is_packed() const { return ld == 0; }
  int64_t element_ld() const { return ld / Packing<Operand>::values; }
  const Element* tile(const RowTiles& tiles, int64_t tile, int64_t i) const {
    const auto* elements = reinterpret_cast<const Element*>(data);
    return is_packed() ? elements + packed_tile(tiles, tile, Packing<Operand>::depth(k)) + i * tiles.size(tile)
                       : elements + tiles.begin(tile) * element_ld() + i;
  }
};

// Rows of a left operand in a kernel's own memory, to be filled; behind each are zeros, as far as products read them.
template <typename Operand>
class OperandRows {
 public:
  OperandRows(int64_t rows, int64_t k)
      : k(k),
        stride(row_stride<Operand>(k + Packing<Operand>::spare_values)),
        storage_(rows > 0 ? (rows + Packing<Operand>::spare_rows) * stride + kTilePadding : 0) {
    if (Packing<Operand>::spare_values == 0) return;
    for (const auto r : c10::irange(rows)) std::fill(row(r) + k, row(r) + stride, Operand(0));
  }

  const int64_t k, stride;

  Operand* row(int64_t r) const { return storage_.data() + r * stride; }
  // From the row `first` on.
  LeftOperand<Operand> operand(int64_t first = 0) const { return {row(first), k, stride}; }

  template <typename From>
  void copy(int64_t r, const From* from) const {
    if constexpr (std::is_same_v<From, Operand>) {
      std::copy_n(from, k, row(r));
    } else {
      for_each_vector<From>(
          k, [&, to = row(r)](int64_t i, int64_t n) { store_operand(to + i, load_vector(from + i, n), n); });
    }
  }

 private:
  const Scratch<Operand> storage_;
};

// Packs the left operand whose columns stand in rows `ld` apart: dst[i][m] = rows[i][m] for each tile. Whole vectors
// are copied; what is too much is overwritten by the next column or falls into the padding, and a row must be readable
// for kTilePadding values more.
template <typename Operand>
void pack_tiles(Element<Operand>* dst, const RowTiles& tiles, int64_t k, const Operand* rows, int64_t ld) {
  using P = Packing<Operand>;
  constexpr int64_t lanes = P::V::size();
  const int64_t vectors = ceil_div(tiles.size(0), lanes), depth = P::depth(k);
  static_assert(lanes <= kTilePadding);
  constexpr int64_t ahead = 8;
  for (const auto i : c10::irange(depth)) {
    const Operand* src = rows + i * P::values * ld;
    const int64_t count = k - i * P::values;
    const auto copy = [&](int64_t begin, int64_t end, int64_t height) {
      auto* out = dst + packed_tile(tiles, begin, depth) + i * height;
      for (int64_t tile = begin; tile < end; ++tile) {
        __builtin_prefetch(src + ahead * ld);
        for (int64_t v = 0; v < vectors; ++v) P::join(src + v * lanes, ld, count).store(out + v * lanes);
        src += height;
        out += height * depth + kTilePadding;
      }
    };
    copy(0, tiles.larger, tiles.low + 1);
    copy(tiles.larger, tiles.count, tiles.low);
  }
}

// c[s][m][n] (+)= sum_k a[m][k] b[s][k][n] for one tile of M rows, S strips of N vectors of columns. Meanwhile it
// fetches into the first-level cache: what stands at `next`, `next_step` values further at each k; or, where several
// strips show that rows are few and that each weight is used but once, the strips themselves, kAhead values of k ahead
// (by a tenth faster, one and two rows, H 128 to 512).
template <typename Operand, bool Packed, int M, int N, int S>
void multiply_tile(int64_t k, const Element<Operand>* a, int64_t lda, const Element<Operand>* const* b,
                   acc_t<Operand>* const* c, int64_t ldc, bool add, const Element<Operand>* next, int64_t next_step) {
  using P = Packing<Operand>;
  using scalar = acc_t<Operand>;
  using V = typename P::V;
  // Rows that are addressed from one pointer: with more, or one for each, addresses are more than there are registers.
  constexpr int kRows = 3;
  const Element<Operand>* strip[S];
  scalar* out[S];
  const char* rows[(M + kRows - 1) / kRows];
#pragma GCC unroll 16
  for (int m = 0; m < M; m += kRows) rows[m / kRows] = reinterpret_cast<const char*>(a + m * lda);
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
    strip[s] = b[s];
    out[s] = c[s];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) __builtin_prefetch(out[s] + m * ldc, 1);
  }
  for (; k > 0; k -= kChain) {
    union Sums {  // without V's constructor: GCC makes a loop of it, and then leaves the sums in memory
      Sums() {}
      V of[S][M][N];
    } sums;
    auto& sum = sums.of;
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) sum[s][m][n] = V(0);
      }
    }
#pragma GCC unroll 4
    for (int64_t i = std::min(k, kChain); i > 0; --i) {
      int64_t stride = lda * sizeof(Element<Operand>);
      asm("" : "+r"(stride));  // or GCC keeps the addresses of all rows, most of them in memory or vector registers
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
        V column[N];
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) column[n] = P::load(strip[s] + n * V::size());
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const char* row = rows[m / kRows] + m % kRows * stride;
          const V value = P::spread(Packed ? a + m : reinterpret_cast<const Element<Operand>*>(row));
#pragma GCC unroll 3
          for (int n = 0; n < N; ++n) sum[s][m][n] = P::multiply_add(value, column[n], sum[s][m][n]);
        }
        strip[s] += N * V::size();
      }
      if constexpr (S > 1) {
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
#pragma GCC unroll 3
          for (int n = 0; n < N; n += 64 / sizeof(V)) __builtin_prefetch(strip[s] + (kAhead * N + n) * V::size());
        }
      } else {
        __builtin_prefetch(next);
        next += next_step;
      }
      if constexpr (Packed) {
        a += M;
      } else {
#pragma GCC unroll 16
        for (int m = 0; m < M; m += kRows) rows[m / kRows] += sizeof(Element<Operand>);
      }
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) {
          scalar* to = out[s] + m * ldc + n * V::size();
          (add ? V::loadu(to) + sum[s][m][n] : sum[s][m][n]).store(to);
        }
      }
    }
    add = true;
  }
}

template <typename Operand>
using TileKernel = void (*)(int64_t k, const Element<Operand>* a, int64_t lda, const Element<Operand>* const* b,
                            acc_t<Operand>* const* c, int64_t ldc, bool add, const Element<Operand>* next,
                            int64_t next_step);

// Rows of a tile that S strips of N vectors leave accumulators for.
constexpr int max_rows(int N, int S = 1) { return std::min(kMaxTileRows, kTileRows * kTileVecs / (N * S)); }

// multiply_tile<Operand, is_packed, M, N, S> for M = 1 .. max_rows(N, S). Packed tiles, which are of many rows mostly,
// take one strip at a time.
template <typename Operand, int N, int S, int... M>
TileKernel<Operand> tile_kernel(bool is_packed, int64_t rows, std::integer_sequence<int, M...>) {
  if constexpr (S == 1) {
    static constexpr TileKernel<Operand> packed[] = {multiply_tile<Operand, true, M + 1, N, S>...};
    if (is_packed) return packed[rows - 1];
  }
  static constexpr TileKernel<Operand> unpacked[] = {multiply_tile<Operand, false, M + 1, N, S>...};
  return unpacked[rows - 1];
}

// As many values of k as let the left operand's rows take kSliceBytes.
template <typename Operand>
int64_t slice_depth(const RowTiles& tiles) {
  constexpr int64_t unit = kChain * Packing<Operand>::values;
  const int64_t unit_bytes = std::max<int64_t>(1, tiles.total()) * unit * sizeof(Operand);
  return std::max<int64_t>(1, kSliceBytes / unit_bytes) * unit;
}

template <typename Operand, int N, int S>
void multiply_strips(const RowTiles& rows, const LeftOperand<Operand>& a, Slice slice, const Element<Operand>* const* b,
                     acc_t<Operand>* const* c, int64_t ldc, bool add) {
  using P = Packing<Operand>;
  // A narrow strip alone takes taller tiles, unless they are packed.
  const RowTiles tiles = S > 1 || a.is_packed() ? rows : RowTiles(rows.total(), max_rows(N));
  constexpr int64_t width = N * P::V::size();
  constexpr int64_t block = kPanelBytes / (width * sizeof(Element<Operand>)) / kChain * kChain;
  static_assert(block > 0);
  // The tiles together fetch the block after the one that they multiply, be it of the same strip or of the next.
  const int64_t next_step = ceil_div(width, tiles.count), end = ceil_div(slice.end, P::values);
  for (int64_t begin = slice.begin / P::values; begin < end;) {
    const int64_t count = tiles.count > 1 ? std::min(block, end - begin) : end - begin;
    const Element<Operand>* next =
        b[S - 1] + (begin + count < end ? begin + count : P::depth(a.k) + slice.begin / P::values) * width;
    for (const auto tile : c10::irange(tiles.count)) {
      const int64_t height = tiles.size(tile), first = tiles.begin(tile);
      const Element<Operand>* b_block[S];
      acc_t<Operand>* c_tile[S];
      for (int s = 0; s < S; ++s) {
        b_block[s] = b[s] + begin * width;
        c_tile[s] = c[s] + first * ldc;
      }
      const auto kernel =
          tile_kernel<Operand, N, S>(a.is_packed(), height, std::make_integer_sequence<int, max_rows(N, S)>());
      kernel(count, a.tile(tiles, tile, begin), a.element_ld(), b_block, c_tile, ldc, add, next, next_step);
      next += count * next_step;
    }
    add = true;
    begin += count;
  }
}

// Up to kMaxStrips strips of one width that the same rows are multiplied with, taken together as far as the
// accumulators reach.
template <typename Operand>
class StripGroup {
 public:
  StripGroup(const RowTiles& tiles, const LeftOperand<Operand>& a, Slice slice, int64_t ldc, bool add)
      : tiles_(tiles), a_(a), slice_(slice), ldc_(ldc), add_(add) {}

  void add(const Element<Operand>* b, acc_t<Operand>* c, int64_t width) {
    if (count_ == kMaxStrips || width != width_) flush();
    width_ = width;
    b_[count_] = b;
    c_[count_++] = c;
  }

  void flush() {
    if (count_ > 0 && tiles_.count > 0) {
      static_assert(kTileVecs <= 3);
      const int64_t vectors = width_ / Packing<Operand>::V::size();
      if (vectors == 1) {
        multiply<1>();
      } else if (vectors == kTileVecs) {
        multiply<kTileVecs>();
      } else {
        multiply<2>();
      }
    }
    count_ = 0;
  }

 private:
  template <int N>
  void multiply() {
    const int64_t height = tiles_.size(0);
    int done = 0;
    const auto run = [&](auto strips) {
      constexpr int S = decltype(strips)::value;
      if constexpr (max_rows(N, S) > 0) {
        while (height <= max_rows(N, S) && count_ - done >= S && (S == 1 || !a_.is_packed())) {
          multiply_strips<Operand, N, S>(tiles_, a_, slice_, b_ + done, c_ + done, ldc_, add_);
          done += S;
        }
      }
    };
    run(std::integral_constant<int, 4>());
    run(std::integral_constant<int, 3>());
    run(std::integral_constant<int, 2>());
    run(std::integral_constant<int, 1>());
  }

  const RowTiles& tiles_;
  const LeftOperand<Operand>& a_;
  const Slice slice_;
  const int64_t ldc_;
  const bool add_;
  int count_ = 0;
  int64_t width_ = 0;
  const Element<Operand>* b_[kMaxStrips];
  acc_t<Operand>* c_[kMaxStrips];
};

// c += a b, or c = a b unless `add`, for some panels of b and one slice of k. A row of c holds, from the first panel
// on, `slots` strips as wide as the panel; gate g adds to strip slot_of(g). With one gate and one slot that is an
// ordinary row of columns.
template <typename Operand, typename SlotOf>
void multiply_panels(const RowTiles& tiles, const LeftOperand<Operand>& a, const PackedMatrix<Operand>& b, Slice panels,
                     Slice slice, acc_t<Operand>* c, int64_t ldc, int64_t slots, const SlotOf& slot_of,
                     bool add = true) {
  StripGroup<Operand> group(tiles, a, slice, ldc, add);
  for (const auto panel : c10::irange(panels.begin, panels.end)) {
    const int64_t width = b.panels.width(panel);
    acc_t<Operand>* c_panel = c + (b.panels.begin(panel) - b.panels.begin(panels.begin)) * slots;
    for (const auto gate : c10::irange(b.gates)) {
      group.add(b.strip(panel, gate), c_panel + slot_of(gate) * width, width);
    }
  }
  group.flush();
}

// Where the last slice of K values of k begins.
template <typename Operand>
int64_t last_slice(const RowTiles& tiles, int64_t k) {
  const int64_t depth = slice_depth<Operand>(tiles);
  return k > depth ? (k - 1) / depth * depth : 0;
}

// The same for the slices of k before `end`, which is the begin of a slice or K.
template <typename Operand, typename SlotOf>
void multiply_slices(const RowTiles& tiles, const LeftOperand<Operand>& a, const PackedMatrix<Operand>& b, Slice panels,
                     int64_t end, acc_t<Operand>* c, int64_t ldc, int64_t slots, const SlotOf& slot_of,
                     bool add = true) {
  const int64_t depth = slice_depth<Operand>(tiles);
  for (int64_t begin = 0; begin < end; begin += depth) {
    multiply_panels(tiles, a, b, panels, {begin, std::min(begin + depth, b.k)}, c, ldc, slots, slot_of,
                    add || begin > 0);
  }
}

// c += a b, or c = a b unless `add`, for some panels of b, the first of which c begins with
template <typename Operand>
void multiply(const RowTiles& tiles, const LeftOperand<Operand>& a, const PackedMatrix<Operand>& b, Slice panels,
              acc_t<Operand>* c, int64_t ldc, bool add) {
  if (b.k == 0 && !add) {
    const int64_t columns = std::min(b.panels.columns, b.panels.begin(panels.end)) - b.panels.begin(panels.begin);
    for (const auto r : c10::irange(tiles.total())) std::fill_n(c + r * ldc, columns, acc_t<Operand>(0));
  }
  multiply_slices(tiles, a, b, panels, b.k, c, ldc, 1, [](int64_t) { return 0; }, add);
}

// A block of k of a left operand that is given by its columns, for run_products.
template <typename Operand>
struct LeftBlock {
  static constexpr int64_t most_k = kChain * Packing<Operand>::values, most_m = 192;

  // Of the rows of `tiles`; the columns stand in rows `ld` apart.
  LeftOperand<Operand> pack(const RowTiles& tiles, int64_t k, const Operand* columns, int64_t ld) const {
    pack_tiles(storage_.data(), tiles, k, columns, ld);
    return {reinterpret_cast<const Operand*>(storage_.data()), k, 0};
  }

 private:
  const Scratch<Element<Operand>> storage_{packed_tile(RowTiles(most_m), ceil_div(most_m, kTileRows), kChain)};
};

// A product over all rows of data, out [m, n] = a^T b, for the gradients of weights: a(k) and b(k) point to the k-th
// row.
template <typename Operand, typename In, typename Out>
struct TransposedProduct {
  int64_t m, n, k;
  const Operand* a;  // row k at a + k * lda; kTilePadding more values must be readable behind the last one
  int64_t lda;
  const In* const* b;
  Out* out;  // rows ldo apart
  int64_t ldo;
};

// Runs the products side by side. A task is a block of one product's output, which no other task writes. It walks
// through k in blocks: one of b is packed once, one of a in parts that stay in the second-level cache with it.
template <typename Operand, typename In, typename Out>
void run_products(const std::vector<TransposedProduct<Operand, In, Out>>& products, int64_t threads_of_call) {
  using scalar = acc_t<Operand>;
  using Product = TransposedProduct<Operand, In, Out>;
  constexpr int64_t block_k = LeftBlock<Operand>::most_k, part_m = LeftBlock<Operand>::most_m;
  constexpr int64_t block_n = 528, max_block_m = 4 * part_m, small_k = 4 * kChain;
  struct Task {
    const Product* product;
    Slice m, n;
  };
  int64_t total = 0, work = 0;
  for (const auto& product : products) {
    total += product.m * product.n;
    work += product.m * product.n * product.k;
  }
  const int64_t threads = threads_for(work, threads_of_call);
  // At least four tasks a thread, where that leaves blocks of a sensible size. With little of k there is little to be
  // gained from a larger one than the second-level cache holds.
  const int64_t share = ceil_div(total, 4 * threads * block_n);
  const auto block_m_of = [&](const Product& product) {
    if (product.k <= small_k) return part_m / 2;
    if (threads == 1) return max_block_m;
    return std::clamp<int64_t>(ceil_div(share, part_m) * part_m, part_m, max_block_m);
  };
  std::vector<Task> tasks;
  int64_t most_m = 0;
  for (const auto& product : products) {
    const auto rows = even_slices(product.m, kTileRows, block_m_of(product));
    for (const Slice columns : even_slices(product.n, Panels<scalar>::vector, block_n)) {
      for (const Slice block : rows) tasks.push_back({&product, block, columns});
    }
    if (!rows.empty()) most_m = std::max(most_m, rows.front().end);
  }
  // A thread takes the next task when it is through with one: they are of unequal size.
  std::atomic<size_t> next{0};
  at::parallel_for(0, std::min<int64_t>(threads, tasks.size()), 1, [&](int64_t, int64_t) {
    const ProductScope<Operand> scope;
    const LeftBlock<Operand> a;
    const Scratch<scalar> c(most_m * row_stride<scalar>(block_n));
    for (size_t i; (i = next.fetch_add(1)) < tasks.size();) {
      const auto& product = *tasks[i].product;
      const Slice m = tasks[i].m, n = tasks[i].n;
      const int64_t m_count = m.end - m.begin, n_count = n.end - n.begin;
      Out* const out = product.out + m.begin * product.ldo + n.begin;
      // With little of k it goes straight to the output, if whole vectors may be written there.
      scalar* to = c.data();
      int64_t ldc = row_stride<scalar>(n_count);
      if constexpr (std::is_same_v<scalar, Out>) {
        if (product.k > 0 && product.k <= small_k && n_count % Panels<scalar>::vector == 0) to = out, ldc = product.ldo;
      }
      const auto multiply_block = [&](const PackedMatrix<Operand>& b, int64_t k) {
        b.pack_rows([&](int64_t r) { return product.b[k + r] + n.begin; });
        for (const Slice part : even_slices(m_count, kTileRows, part_m)) {
          const RowTiles tiles(part.end - part.begin, max_rows(b.panels.vectors.size(0)));
          const Operand* columns = product.a + k * product.lda + m.begin + part.begin;
          multiply(tiles, a.pack(tiles, b.k, columns, product.lda), b, b.panels.all(), to + part.begin * ldc, ldc,
                   k > 0);
        }
      };
      const int64_t blocks = product.k / block_k;
      const PackedMatrix<Operand> block(blocks > 0 ? block_k : 0, n_count), rest(product.k % block_k, n_count);
      for (const auto k : c10::irange(blocks)) multiply_block(block, k * block_k);
      if (rest.k > 0) multiply_block(rest, blocks * block_k);
      if (static_cast<const void*>(to) == out) continue;
      for (const auto row : c10::irange(m_count)) {
        for_each_vector<Out>(n_count, [&](int64_t column, int64_t n) {
          const Vec<Out> sums = product.k > 0 ? Vec<Out>::loadu(to + row * ldc + column) : Vec<Out>(0);
          store_vector(out + row * product.ldo + column, sums, n);
        });
      }
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
