// at::vec::Vectorized with what the kernels need beside it: the elementary functions of cells.h, and loads and stores
// that convert. Arithmetic is in float for bfloat16 and float16, and in the tensor's own type otherwise (acc_t).
//
// Everything below csrc/cpu is compiled once per instruction set, with CPU_CAPABILITY naming it; the inline namespace
// keeps the copies apart.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../cells.h"

namespace nlpkernels {

template <typename T>
struct Math<at::vec::Vectorized<T>> {
  using V = at::vec::Vectorized<T>;
  static NLPKERNELS_INLINE V tanh(const V& x) {
    if constexpr (std::is_same_v<T, float>) {
      // (exp(2x) - 1) / (exp(2x) + 1), from exp(2x) - 1 = scale rest + (scale - 1), which keeps its digits where x is
      // small. Within 3 units in the last place (tested).
      const auto [rest, scale] = split_exp(at::vec::clamp(x + x, V(-87.f), V(40.f)));
      const V minus_one = at::vec::fmadd(scale, rest, scale - V(1));
      return minus_one / (minus_one + V(2));
    } else {
      return x.tanh();
    }
  }
  static NLPKERNELS_INLINE V sigmoid(const V& x) { return V(1) / (V(1) + exp(x.neg())); }
  static NLPKERNELS_INLINE V sqrt(const V& x) { return x.sqrt(); }
  static NLPKERNELS_INLINE V exp(const V& x) {
    if constexpr (std::is_same_v<T, float>) {
      // Within one unit in the last place from -87 to 88; infinite above, and below tanh and sigmoid have saturated.
      const auto [rest, scale] = split_exp(at::vec::clamp(x, V(-87.f), V(89.f)));
      return (rest + V(1)) * scale;
    } else {
      return x.exp();
    }
  }
  static NLPKERNELS_INLINE V relu(const V& x) { return at::vec::maximum(x, V(0)); }
  static NLPKERNELS_INLINE V where_positive(const V& x, const V& y) { return V::blendv(y, V(0), x <= V(0)); }

 private:
  // exp(x) = (1 + rest) scale with scale = 2^n, n = round(x / ln 2), and rest = exp(r) - 1 = r + r^2 q(r) for
  // |r| <= ln 2 / 2, q fitted for the least relative error of exp, 3e-9. x is where 2^n is a normal number or infinite.
  // Inline, so that several run side by side, unlike x.exp().
  struct SplitExp {
    V rest, scale;
  };
  static NLPKERNELS_INLINE SplitExp split_exp(const V& x) {
    // 1.5 * 2^23 + 127: the low bits of a sum with it are a whole number and 2^n's exponent
    const V shift(12583039.f);
    const V shifted = at::vec::fmadd(x, V(1.44269504f), shift), n = shifted - shift;
    const V r = at::vec::fmadd(n, V(2.12194440e-4f), at::vec::fmadd(n, V(-0.693359375f), x));  // ln 2 in halves
    V q(0.00138145383f);
    q = at::vec::fmadd(q, r, V(0.00836874545f));
    q = at::vec::fmadd(q, r, V(0.041668389f));
    q = at::vec::fmadd(q, r, V(0.166665211f));
    q = at::vec::fmadd(q, r, V(0.49999994f));
    const auto exponent = at::vec::cast<int32_t>(shifted) << at::vec::Vectorized<int32_t>(23);
    return {at::vec::fmadd(q, r * r, r), at::vec::cast<float>(exponent)};
  }
};

// N vectors as one value. The functions of a cell wait for one another, those of its neighbours do not: with several
// side by side the processor always finds one to go on with.
template <typename V, int N>
struct Several {
  V v[N];

  Several() = default;
  NLPKERNELS_INLINE Several(typename V::value_type value) {
    for (V& part : v) part = V(value);
  }
  // function(i) for each of the N
  template <typename Function>
  static NLPKERNELS_INLINE Several each(const Function& function) {
    Several result;
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) result.v[i] = function(i);
    return result;
  }
  NLPKERNELS_INLINE Several operator+(const Several& y) const {
    return each([&](int i) { return v[i] + y.v[i]; });
  }
  NLPKERNELS_INLINE Several operator-(const Several& y) const {
    return each([&](int i) { return v[i] - y.v[i]; });
  }
  NLPKERNELS_INLINE Several operator*(const Several& y) const {
    return each([&](int i) { return v[i] * y.v[i]; });
  }
};

template <typename V, int N>
struct Math<Several<V, N>> {
  using S = Several<V, N>;
  static NLPKERNELS_INLINE S tanh(const S& x) {
    return S::each([&](int i) __attribute__((always_inline)) { return Math<V>::tanh(x.v[i]); });
  }
  static NLPKERNELS_INLINE S sigmoid(const S& x) {
    return S::each([&](int i) __attribute__((always_inline)) { return Math<V>::sigmoid(x.v[i]); });
  }
  static NLPKERNELS_INLINE S relu(const S& x) {
    return S::each([&](int i) { return Math<V>::relu(x.v[i]); });
  }
  static NLPKERNELS_INLINE S where_positive(const S& x, const S& y) {
    return S::each([&](int i) { return Math<V>::where_positive(x.v[i], y.v[i]); });
  }
};

inline namespace CPU_CAPABILITY {

using at::vec::Vectorized;

// The things [begin, end).
struct Slice {
  int64_t begin, end;
};

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
using Vec = Vectorized<acc_t<T>>;

NLPKERNELS_INLINE void load_as_float(const at::BFloat16* p, Vectorized<float>& v) {
  at::vec::load_fp32_from_bf16(p, v);
}
NLPKERNELS_INLINE void load_as_float(const at::Half* p, Vectorized<float>& v) { at::vec::load_fp32_from_fp16(p, v); }

// The first n values from p, and zeros.
template <typename T>
NLPKERNELS_INLINE Vec<T> load_vector(const T* p, int64_t n = Vec<T>::size()) {
  constexpr int size = Vec<T>::size();
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    if (n == size) return Vec<T>::loadu(p);
    // Many times as fast as loadu, which goes by memory; but an address sanitiser does not see what is read.
#if defined(CPU_CAPABILITY_AVX2) && !defined(__SANITIZE_ADDRESS__)
    if constexpr (std::is_same_v<T, float>) {
      alignas(32) static constexpr int32_t kMask[2 * size] = {-1, -1, -1, -1, -1, -1, -1, -1};
      return _mm256_maskload_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + size - n)));
    }
#endif
    return Vec<T>::loadu(p, n);
  } else {
    Vec<T> v;
    if (n == size) {
      load_as_float(p, v);
    } else {
      T values[size] = {};
      std::copy_n(p, n, values);
      load_as_float(values, v);
    }
    return v;
  }
}

// The first n values of v to p, rounded to the nearest, ties to even.
template <typename T>
NLPKERNELS_INLINE void store_vector(T* p, const Vec<T>& v, int64_t n = Vec<T>::size()) {
  constexpr int size = Vec<T>::size();
  const Vectorized<T> rounded = at::vec::convert<T>(v);
  if (n == size) {
    rounded.store(p, size);
  } else {
    rounded.store(p, static_cast<int>(n));
  }
}

// The same where a subnormal number of bfloat16 may become 0, which is what products of bfloat16 take it for.
template <typename T>
NLPKERNELS_INLINE void store_operand(T* p, const Vec<T>& v, int64_t n = Vec<T>::size()) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const auto mask = static_cast<__mmask16>(n >= Vec<T>::size() ? 0xffff : (1 << n) - 1);
    return _mm256_mask_storeu_epi16(p, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }
#endif
  store_vector(p, v, n);
}

// The sum of a vector's values.
template <typename scalar>
NLPKERNELS_INLINE scalar sum_of_lanes(const Vectorized<scalar>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<scalar, float>) return _mm512_reduce_add_ps(v);
  if constexpr (std::is_same_v<scalar, double>) return _mm512_reduce_add_pd(v);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<scalar, float>) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
  }
#endif
  alignas(64) scalar lanes[Vectorized<scalar>::size()], sum = 0;
  v.store(lanes);
  for (const scalar lane : lanes) sum += lane;
  return sum;
}

// Calls body(i, n) for the vectors of [0, count): n is a vector's size, but for the last what is left.
template <typename T, typename Body>
NLPKERNELS_INLINE void for_each_vector(int64_t count, const Body& body) {
  constexpr int64_t size = Vec<T>::size();
  int64_t i = 0;
  for (; i + size <= count; i += size) body(i, size);
  if (i < count) body(i, count - i);
}

// N vectors from p, all whole but for one alone, of which the first n values.
template <int N, typename T>
NLPKERNELS_INLINE Several<Vec<T>, N> load_several(const T* p, int64_t n = Vec<T>::size()) {
  return Several<Vec<T>, N>::each([&](int i) { return load_vector(p + i * Vec<T>::size(), n); });
}

template <int N, typename T>
NLPKERNELS_INLINE void store_several(T* p, const Several<Vec<T>, N>& values, int64_t n = Vec<T>::size()) {
  for (int i = 0; i < N; ++i) store_operand(p + i * Vec<T>::size(), values.v[i], n);
}

// Calls body<M>(i, n) for groups of M vectors that together are [0, count), M = N as long as there are so many: n is a
// vector's size, but for the last one, which comes alone if it is not whole, what is left.
template <typename T, int N, typename Body>
NLPKERNELS_INLINE void for_each_several(int64_t count, const Body& body, int64_t i = 0) {
  constexpr int64_t size = N * Vec<T>::size();
  for (; i + size <= count; i += size) body.template operator()<N>(i, Vec<T>::size());
  if constexpr (N > 1) {
    for_each_several<T, N - 1>(count, body, i);
  } else if (i < count) {
    body.template operator()<1>(i, count - i);
  }
}

// dst[i][j] = src[j][i] for a square as wide as a vector, rows ld and ldd apart. Vectors of float are put together from
// quarters of rows as they are loaded, which spares half of the shuffles.
template <typename scalar>
NLPKERNELS_INLINE void transpose_square(const scalar* src, int64_t ld, scalar* dst, int64_t ldd) {
  constexpr int size = Vectorized<scalar>::size();
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#if defined(CPU_CAPABILITY_AVX512)
#define MM(operation) _mm512_##operation
#else
#define MM(operation) _mm256_##operation
#endif
  if constexpr (std::is_same_v<scalar, float>) {
#pragma GCC unroll 4
    for (int column = 0; column < size; column += 4) {
      // Four columns of the rows row, row + 4, row + 8, ...
      const auto load = [&](int row) __attribute__((always_inline)) {
        const float* p = src + row * ld + column;
#if defined(CPU_CAPABILITY_AVX512)
        __m512 rows = _mm512_castps128_ps512(_mm_loadu_ps(p));
        rows = _mm512_insertf32x4(rows, _mm_loadu_ps(p + 4 * ld), 1);
        rows = _mm512_insertf32x4(rows, _mm_loadu_ps(p + 8 * ld), 2);
        return _mm512_insertf32x4(rows, _mm_loadu_ps(p + 12 * ld), 3);
#else
        return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * ld), 1);
#endif
      };
      const auto a = load(0), b = load(1), c = load(2), d = load(3);
      const auto ab_low = MM(castps_pd)(MM(unpacklo_ps)(a, b)), ab_high = MM(castps_pd)(MM(unpackhi_ps)(a, b)),
                 cd_low = MM(castps_pd)(MM(unpacklo_ps)(c, d)), cd_high = MM(castps_pd)(MM(unpackhi_ps)(c, d));
      float* to = dst + column * ldd;
      MM(storeu_ps)(to, MM(castpd_ps)(MM(unpacklo_pd)(ab_low, cd_low)));
      MM(storeu_ps)(to + ldd, MM(castpd_ps)(MM(unpackhi_pd)(ab_low, cd_low)));
      MM(storeu_ps)(to + 2 * ldd, MM(castpd_ps)(MM(unpacklo_pd)(ab_high, cd_high)));
      MM(storeu_ps)(to + 3 * ldd, MM(castpd_ps)(MM(unpackhi_pd)(ab_high, cd_high)));
    }
    return;
  }
#undef MM
#endif
  at::vec::transpose_mxn<scalar, size, size>(src, ld, dst, ldd);
}

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
