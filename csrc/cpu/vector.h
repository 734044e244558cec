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
      // For x^2 < 0.4 an odd polynomial, fitted for the least relative error, 5e-9; beyond, 1 - 2 / (exp(2x) + 1),
      // which saturates by itself. Within 3 units in the last place (tested).
      const V one(1), square = x * x;
      V sum(-0.00566078909f);
      sum = at::vec::fmadd(sum, square, V(0.0206020083f));
      sum = at::vec::fmadd(sum, square, V(-0.0537292287f));
      sum = at::vec::fmadd(sum, square, V(0.133313283f));
      sum = at::vec::fmadd(sum, square, V(-0.333332777f));
      const V small = at::vec::fmadd(x * square, sum, x);
      const V large = one - V(2) / (exp(x + x) + one);
      return V::blendv(large, small, square < V(0.4f));
    } else {
      return x.tanh();
    }
  }
  static NLPKERNELS_INLINE V sigmoid(const V& x) { return V(1) / (V(1) + exp(x.neg())); }
  static NLPKERNELS_INLINE V sqrt(const V& x) { return x.sqrt(); }
  static NLPKERNELS_INLINE V exp(const V& x) {
    if constexpr (std::is_same_v<T, float>) {
      // exp(x) = 2^n exp(r) with n = round(x / ln 2), |r| <= ln 2 / 2, and exp(r) = 1 + r + r^2 q(r), q fitted for the
      // least relative error, 3e-9. Within one unit in the last place from -87 to 88, where 2^n is a normal number;
      // infinite above, and below tanh and sigmoid have saturated. Inline, so that several run side by side, unlike
      // x.exp().
      const V shift(
          12583039.f);  // 1.5 * 2^23 + 127: the low bits of a sum with it are a whole number and 2^n's exponent
      const V bounded = at::vec::clamp(x, V(-87.f), V(89.f));
      const V shifted = at::vec::fmadd(bounded, V(1.44269504f), shift), n = shifted - shift;
      const V r = at::vec::fmadd(n, V(2.12194440e-4f), at::vec::fmadd(n, V(-0.693359375f), bounded));  // ln 2 in halves
      V q(0.00138145383f);
      q = at::vec::fmadd(q, r, V(0.00836874545f));
      q = at::vec::fmadd(q, r, V(0.041668389f));
      q = at::vec::fmadd(q, r, V(0.166665211f));
      q = at::vec::fmadd(q, r, V(0.49999994f));
      const auto exponent = at::vec::cast<int32_t>(shifted) << at::vec::Vectorized<int32_t>(23);
      return (at::vec::fmadd(q, r * r, r) + V(1)) * at::vec::cast<float>(exponent);
    } else {
      return x.exp();
    }
  }
  static NLPKERNELS_INLINE V relu(const V& x) { return at::vec::maximum(x, V(0)); }
  static NLPKERNELS_INLINE V where_positive(const V& x, const V& y) { return V::blendv(V(0), y, x > V(0)); }
};

inline namespace CPU_CAPABILITY {

using at::vec::Vectorized;

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
using Vec = Vectorized<acc_t<T>>;

NLPKERNELS_INLINE void load_as_float(const at::BFloat16* p, Vectorized<float>& v) {
  at::vec::load_fp32_from_bf16(p, v);
}
NLPKERNELS_INLINE void load_as_float(const at::Half* p, Vectorized<float>& v) { at::vec::load_fp32_from_fp16(p, v); }

// The first n values from p; the rest is unspecified.
template <typename T>
NLPKERNELS_INLINE Vec<T> load_vector(const T* p, int64_t n = Vec<T>::size()) {
  constexpr int size = Vec<T>::size();
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return n == size ? Vec<T>::loadu(p) : Vec<T>::loadu(p, n);
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

// Calls body(i, n) for the vectors of [0, count): n is a vector's size, but for the last what is left.
template <typename T, typename Body>
NLPKERNELS_INLINE void for_each_vector(int64_t count, const Body& body) {
  constexpr int64_t size = Vec<T>::size();
  int64_t i = 0;
  for (; i + size <= count; i += size) body(i, size);
  if (i < count) body(i, count - i);
}

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
