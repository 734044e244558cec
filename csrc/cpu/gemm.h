// Matrix products for the time loops: packed operands and one register-tile microkernel.
//
// c += a b, where both operands have been packed so that the microkernel reads them in order:
//   b  in panels of kTileVecs vectors of columns, each stored [K][width]           (PackedMatrix)
//   a  in tiles of up to kTileRows rows, each stored [K][height]                   (RowTiles, pack_tiles)
// A step k of the microkernel loads `width` values of b and broadcasts `height` values of a into kTileRows * kTileVecs
// accumulators, which is what it takes to hide the latency of a fused multiply-add. For few rows it takes up to four
// panels at once instead, so that a matrix-vector product has enough accumulators too.
//
// Loop order: panel -> block of k -> tiles of rows, so that a block of a panel (kPanelBytes) stays in the first-level
// cache while all rows pass over it.
//
// Same bits: an element of c adds its products in the order k = 0, 1, ..., kChain of them at a time, whatever the tile
// that it is in, the number of rows or the number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "vector.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

// Register tile: 12 of AVX2's 16 registers, 24 of AVX-512's 32 are accumulators.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileRows = 12, kTileVecs = 2;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kTileRows = 6, kTileVecs = 2;
#else
constexpr int kTileRows = 4, kTileVecs = 1;
#endif
constexpr int kMaxStrips = 4;
constexpr int64_t kPanelBytes = 8 * 1024;
// Products that are added up in one accumulator before it is added to c: the error of a sum of K products grows with
// sqrt(kChain + K / kChain) rather than sqrt(K). Blocks of k are multiples of it.
constexpr int64_t kChain = 64;
// Values that a thread packs at least.
constexpr int64_t kPackGrain = 1 << 15;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Distance of rows of `columns` values in a kernel's own memory: whole cache lines, an odd number of them. Rows a power
// of two apart would fall into the same few sets of the cache and drive each other out of it.
template <typename scalar>
constexpr int64_t row_stride(int64_t columns) {
  constexpr int64_t line = 64 / sizeof(scalar);
  return (ceil_div(columns, line) | 1) * line;
}

// Memory for a kernel's own use, as aligned as a tensor's.
template <typename scalar>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : storage_(at::empty({count}, c10::CppTypeToScalarType<scalar>::value)),
        data_(storage_.template mutable_data_ptr<scalar>()) {}
  scalar* data() const { return data_; }

 private:
  Tensor storage_;
  scalar* data_;
};

// The columns of a matrix, or the units of a layer, cut into panels; the last is only as wide as the vectors it needs.
template <typename scalar>
struct Panels {
  static constexpr int64_t vector = Vectorized<scalar>::size();
  static constexpr int64_t full = kTileVecs * vector;
  int64_t columns;

  int64_t count() const { return ceil_div(columns, full); }
  int64_t begin(int64_t panel) const { return panel * full; }
  int64_t valid(int64_t panel) const { return std::min(full, columns - begin(panel)); }
  int64_t width(int64_t panel) const { return ceil_div(valid(panel), vector) * vector; }
  int64_t padded() const { return ceil_div(columns, vector) * vector; }
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

// dst[k][j] = src[j][k] for j < valid, 0 for the rest of width
template <typename scalar, typename T>
void pack_transposed(scalar* dst, int64_t width, int64_t valid, int64_t k, const T* src, int64_t ld) {
  if constexpr (std::is_same_v<scalar, T>) {
    at::vec::transpose_mxn<scalar>(src, ld, dst, width, static_cast<int>(valid), static_cast<int>(k));
  } else {
    for (const auto j : c10::irange(valid)) {
      for (const auto i : c10::irange(k)) dst[i * width + j] = static_cast<scalar>(src[j * ld + i]);
    }
  }
  if (valid < width) {
    for (const auto i : c10::irange(k)) std::fill(dst + i * width + valid, dst + (i + 1) * width, scalar(0));
  }
}

// The right operand, [K, columns] for each of `gates` gates. Storage: [panel][gate][K][width of the panel].
template <typename scalar>
class PackedMatrix {
 public:
  PackedMatrix(int64_t k, int64_t columns, int64_t gates = 1)
      : k(k), gates(gates), panels{columns}, storage_(gates * k * panels.padded()) {}

  const int64_t k, gates;
  const Panels<scalar> panels;

  scalar* strip(int64_t panel, int64_t gate) const {
    return storage_.data() + k * (gates * panels.begin(panel) + gate * panels.width(panel));
  }

  // From w [gates * columns, K] with rows ld apart: b = w^T.
  template <typename T>
  void pack_transpose_of(const T* w, int64_t ld) const {
    for_each_strip([&](int64_t panel, int64_t gate) {
      const T* src = w + (gate * panels.columns + panels.begin(panel)) * ld;
      pack_transposed(strip(panel, gate), panels.width(panel), panels.valid(panel), k, src, ld);
    });
  }

  // From row(k)[0 .. columns): b = those rows, one gate. Runs on the calling thread.
  template <typename Row>
  void pack_rows(const Row& row) const {
    for (const auto i : c10::irange(k)) {
      const auto* src = row(i);
      for (const auto panel : c10::irange(panels.count())) {
        const int64_t width = panels.width(panel);
        pack_copied(strip(panel, 0) + i * width, width, panels.valid(panel), 1,
                    [&](int64_t) { return src + panels.begin(panel); });
      }
    }
  }

  // From w [K, columns] with rows ld apart: b = w, one gate.
  template <typename T>
  void pack(const T* w, int64_t ld) const {
    for_each_strip([&](int64_t panel, int64_t gate) {
      const T* src = w + panels.begin(panel);
      pack_copied(strip(panel, gate), panels.width(panel), panels.valid(panel), k,
                  [&](int64_t i) { return src + i * ld; });
    });
  }

 private:
  template <typename Body>
  void for_each_strip(const Body& body) const {
    const int64_t strip_size = std::max<int64_t>(1, k * Panels<scalar>::full);
    at::parallel_for(0, panels.count() * gates, ceil_div(kPackGrain, strip_size), [&](int64_t begin, int64_t end) {
      for (const auto i : c10::irange(begin, end)) body(i / gates, i % gates);
    });
  }

  Scratch<scalar> storage_;
};

// Rows cut into tiles whose heights differ by at most one, so that no tile is left with too few accumulators.
struct RowTiles {
  explicit RowTiles(int64_t rows)
      : count(ceil_div(rows, kTileRows)), low(count ? rows / count : 0), taller(count ? rows % count : 0) {}
  int64_t count, low, taller;

  int64_t height(int64_t tile) const { return low + (tile < taller); }
  int64_t begin(int64_t tile) const { return tile * low + std::min(tile, taller); }
};

// Values behind a left operand that pack_tiles_copied may read: a vector of the widest kind.
constexpr int64_t kTilePadding = 16;

// The left operand: dst = row(r)[0 .. k) for all rows, tile by tile, each [k][height]. Rows that lie evenly apart are
// transposed by vectors.
template <typename scalar, typename Row>
void pack_tiles(scalar* dst, const RowTiles& tiles, int64_t k, const Row& row) {
  for (const auto tile : c10::irange(tiles.count)) {
    const int64_t height = tiles.height(tile), first = tiles.begin(tile);
    scalar* out = dst + first * k;
    const auto* src = row(first);
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(src)>>;
    if constexpr (std::is_same_v<scalar, T>) {
      const int64_t ld = height > 1 ? row(first + 1) - src : k;
      bool even = ld >= k;
      for (int64_t m = 2; m < height && even; ++m) even = row(first + m) - src == m * ld;
      if (even) {
        at::vec::transpose_mxn<scalar>(src, ld, out, height, static_cast<int>(height), static_cast<int>(k));
        continue;
      }
    }
    for (const auto m : c10::irange(height)) {
      const auto* values = row(first + m);
      for (const auto i : c10::irange(k)) out[i * height + m] = static_cast<scalar>(values[i]);
    }
  }
}

// The same for a matrix that is given by its rows along k: dst[i][m] = row(i)[m]. Copies whole vectors where what is
// too much stays in the tile and is overwritten by the rows after it, so a row(i) must be readable for a vector more.
template <typename scalar, typename Row>
void pack_tiles_copied(scalar* dst, const RowTiles& tiles, int64_t k, const Row& row) {
  constexpr int64_t vector = Vectorized<scalar>::size();
  for (const auto i : c10::irange(k)) {
    const scalar* src = row(i);
    for (const auto tile : c10::irange(tiles.count)) {
      const int64_t height = tiles.height(tile), first = tiles.begin(tile);
      scalar* out = dst + first * k + i * height;
      if (ceil_div(height, vector) * vector <= (k - i) * height) {
        for (int64_t m = 0; m < height; m += vector) Vectorized<scalar>::loadu(src + first + m).store(out + m);
      } else {
        std::copy_n(src + first, height, out);
      }
    }
  }
}

// c[s][m][n] += sum_k a[k][m] b[s][k][n] for one tile of M rows, S strips of N vectors of columns
template <typename scalar, int M, int N, int S>
void multiply_tile(int64_t k, const scalar* a, const scalar* const* b, scalar* const* c, int64_t ldc) {
  using V = Vectorized<scalar>;
  const scalar* strip[S];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) strip[s] = b[s];
  for (; k > 0; k -= kChain) {
    V sum[S][M][N];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sum[s][m][n] = V(0);
      }
    }
    for (int64_t i = std::min(k, kChain); i > 0; --i) {
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
        V column[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) column[n] = V::loadu(strip[s] + n * V::size());
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const V value(a[m]);
#pragma GCC unroll 2
          for (int n = 0; n < N; ++n) sum[s][m][n] = at::vec::fmadd(value, column[n], sum[s][m][n]);
        }
        strip[s] += N * V::size();
      }
      a += M;
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
          scalar* to = c[s] + m * ldc + n * V::size();
          (V::loadu(to) + sum[s][m][n]).store(to);
        }
      }
    }
  }
}

template <typename scalar>
using TileKernel = void (*)(int64_t k, const scalar* a, const scalar* const* b, scalar* const* c, int64_t ldc);

// multiply_tile<scalar, M, N, S> for M = 1 .. kTileRows / S
template <typename scalar, int N, int S, int... M>
TileKernel<scalar> tile_kernel(int64_t rows, std::integer_sequence<int, M...>) {
  static constexpr TileKernel<scalar> kernels[] = {multiply_tile<scalar, M + 1, N, S>...};
  return kernels[rows - 1];
}

template <typename scalar, int N, int S>
void multiply_strips(const RowTiles& tiles, int64_t k, const scalar* a, const scalar* const* b, scalar* const* c,
                     int64_t ldc) {
  constexpr int64_t width = N * Vectorized<scalar>::size();
  constexpr int64_t block = kPanelBytes / (width * sizeof(scalar));
  static_assert(block % kChain == 0);
  const auto kernel = [](int64_t rows) {
    return tile_kernel<scalar, N, S>(rows, std::make_integer_sequence<int, kTileRows / S>());
  };
  for (int64_t begin = 0; begin < k; begin += block) {
    const int64_t count = tiles.count > 1 ? std::min(block, k - begin) : k;
    for (const auto tile : c10::irange(tiles.count)) {
      const int64_t height = tiles.height(tile), first = tiles.begin(tile);
      const scalar* b_block[S];
      scalar* c_tile[S];
      for (int s = 0; s < S; ++s) {
        b_block[s] = b[s] + begin * width;
        c_tile[s] = c[s] + first * ldc;
      }
      kernel(height)(count, a + first * k + begin * height, b_block, c_tile, ldc);
    }
    if (count == k) break;
  }
}

// Up to kMaxStrips strips of one width that the same rows are multiplied with, taken together as far as the
// accumulators reach.
template <typename scalar>
class StripGroup {
 public:
  StripGroup(const RowTiles& tiles, int64_t k, const scalar* a, int64_t ldc) : tiles_(tiles), k_(k), a_(a), ldc_(ldc) {}

  void add(const scalar* b, scalar* c, int64_t width) {
    if (count_ == kMaxStrips || width != width_) flush();
    width_ = width;
    b_[count_] = b;
    c_[count_++] = c;
  }

  void flush() {
    if (count_ > 0 && tiles_.count > 0) {
      static_assert(kTileVecs <= 2);
      if (width_ == Vectorized<scalar>::size()) {
        multiply<1>();
      } else {
        multiply<kTileVecs>();
      }
    }
    count_ = 0;
  }

 private:
  template <int N>
  void multiply() {
    const int64_t height = tiles_.height(0);
    int done = 0;
    const auto run = [&](auto strips) {
      constexpr int S = decltype(strips)::value;
      if constexpr (S <= kTileRows) {
        while (height * S <= kTileRows && count_ - done >= S) {
          multiply_strips<scalar, N, S>(tiles_, k_, a_, b_ + done, c_ + done, ldc_);
          done += S;
        }
      }
    };
    run(std::integral_constant<int, 4>());
    run(std::integral_constant<int, 2>());
    run(std::integral_constant<int, 1>());
  }

  const RowTiles& tiles_;
  const int64_t k_;
  const scalar* a_;
  const int64_t ldc_;
  int count_ = 0;
  int64_t width_ = 0;
  const scalar* b_[kMaxStrips];
  scalar* c_[kMaxStrips];
};

// c += a b for the panels [begin, end) of b. A row of c holds, panel after panel, `slots` strips as wide as the panel;
// gate g adds to strip slot_of(g). With one gate and one slot that is an ordinary row of columns.
template <typename scalar, typename SlotOf>
void multiply_panels(const RowTiles& tiles, const scalar* a, const PackedMatrix<scalar>& b, int64_t begin, int64_t end,
                     scalar* c, int64_t ldc, int64_t slots, const SlotOf& slot_of) {
  StripGroup<scalar> group(tiles, b.k, a, ldc);
  for (const auto panel : c10::irange(begin, end)) {
    const int64_t width = b.panels.width(panel);
    scalar* c_panel = c + b.panels.begin(panel) * slots;
    for (const auto gate : c10::irange(b.gates)) {
      group.add(b.strip(panel, gate), c_panel + slot_of(gate) * width, width);
    }
  }
  group.flush();
}

template <typename scalar>
void multiply(const RowTiles& tiles, const scalar* a, const PackedMatrix<scalar>& b, scalar* c, int64_t ldc) {
  multiply_panels(tiles, a, b, 0, b.panels.count(), c, ldc, 1, [](int64_t) { return 0; });
}

// A product over all rows of data, out [m, n] = a^T b, for the gradients of weights: a(k) and b(k) point to the k-th
// row.
template <typename scalar, typename T>
struct TransposedProduct {
  int64_t m, n, k;
  const scalar* a;  // row k at a + k * lda; kTilePadding more values must be readable behind the last one
  int64_t lda;
  const T* const* b;
  T* out;  // rows ldo apart
  int64_t ldo;
};

// Runs the products side by side. A task is a block of one product's output, which no other task writes. It walks
// through k in blocks: one of b is packed once, one of a in parts that stay in the second-level cache with it.
template <typename scalar, typename T>
void run_products(const std::vector<TransposedProduct<scalar, T>>& products) {
  constexpr int64_t block_k = 2 * kChain, block_n = 256, part_m = 16 * kTileRows, max_block_m = 8 * part_m;
  struct Task {
    const TransposedProduct<scalar, T>* product;
    int64_t m, m_count, n, n_count;
  };
  int64_t total = 0;
  for (const auto& product : products) total += product.m * product.n;
  // At least four tasks a thread, where that leaves blocks of a sensible size.
  const int64_t share = ceil_div(total, 4 * at::get_num_threads() * block_n);
  const int64_t block_m = at::get_num_threads() == 1
                              ? max_block_m
                              : std::clamp<int64_t>(ceil_div(share, part_m) * part_m, part_m, max_block_m);
  std::vector<Task> tasks;
  for (const auto& product : products) {
    for (int64_t n = 0; n < product.n; n += block_n) {
      for (int64_t m = 0; m < product.m; m += block_m) {
        tasks.push_back({&product, m, std::min(block_m, product.m - m), n, std::min(block_n, product.n - n)});
      }
    }
  }
  at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    const Scratch<scalar> a(part_m * block_k), c(block_m * row_stride<scalar>(block_n));
    for (const auto i : c10::irange(begin, end)) {
      const Task& task = tasks[i];
      const auto& product = *task.product;
      const int64_t ldc = row_stride<scalar>(task.n_count);
      std::fill(c.data(), c.data() + task.m_count * ldc, scalar(0));
      const auto multiply_block = [&](const PackedMatrix<scalar>& b, int64_t k) {
        b.pack_rows([&](int64_t r) { return product.b[k + r] + task.n; });
        for (int64_t m = 0; m < task.m_count; m += part_m) {
          const RowTiles tiles(std::min(part_m, task.m_count - m));
          pack_tiles_copied(a.data(), tiles, b.k,
                            [&](int64_t r) { return product.a + (k + r) * product.lda + task.m + m; });
          multiply(tiles, a.data(), b, c.data() + m * ldc, ldc);
        }
      };
      const PackedMatrix<scalar> block(block_k, task.n_count), rest(product.k % block_k, task.n_count);
      int64_t k = 0;
      for (; k + block_k <= product.k; k += block_k) multiply_block(block, k);
      if (rest.k > 0) multiply_block(rest, k);
      for (const auto m : c10::irange(task.m_count)) {
        T* out = product.out + (task.m + m) * product.ldo + task.n;
        for (const auto n : c10::irange(task.n_count)) out[n] = static_cast<T>(c.data()[m * ldc + n]);
      }
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
