// Products of narrow numbers, for weights that stay as they are (frozen.cpp): int8, and bfloat16.
//
// A word of 32 bits holds neighbouring values of k: four of int8 or two of bfloat16. A product takes a word of a row of
// the left operand to 16 words of weights, of 16 neighbouring columns, and adds all products in a word up in its lane.
// That is one instruction where processors have it (VNNI, AVX512-BF16: written as such, for the compiler is told of
// older ones), and some shifts and older instructions elsewhere.
//
// Weights lie in one order on every machine, that in which a row of one is multiplied: groups of panels of 16 columns,
//   [group][word of k][panel of the group][gate][16]
// so that a group is read from its beginning to its end. Of int8 they are stored with 128 added: VNNI multiplies
// unsigned numbers with signed ones, and the other factor is a row of the left operand, whose sum tells what has to be
// taken off again. Weights are -127 to 127 times a scale of their row; so is a row of the left operand, of its largest
// magnitude. A row may have two digits: it is then two rows, the second one of 128ths of the first one's steps. States
// have two: with one, a GRU that spells words out said 12 of 2,000 in another way, with two 7, as with states that are
// not rounded; and the weights, which are what takes time, are read but once. Sums of int8 are exact, and so the same
// on every machine.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/irange.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string_view>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "gemm.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

constexpr int64_t kPanel = 16;
// Words of a row of 16 columns.
constexpr int64_t kPanelBytes16 = kPanel * 4;

// Vectors of words, and what is done with them.
#if defined(CPU_CAPABILITY_AVX512)
using Words = __m512i;
using Reals = __m512;
#elif defined(CPU_CAPABILITY_AVX2)
using Words = __m256i;
using Reals = __m256;
#else
struct Words {
  int32_t of[4];
};
struct Reals {
  float of[4];
};
#endif
constexpr int kLanes = sizeof(Words) / 4;
static_assert(kPanel % kLanes == 0);

// What the processor multiplies by one instruction, unless NLPKERNELS_CPU says that it is to be an older one.
struct Native {
  bool int8 = false, bfloat16 = false;

  static const Native& of_machine() {
    static const Native found = [] {
      Native native;
#if defined(__x86_64__) && (defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2))
      const char* told = std::getenv("NLPKERNELS_CPU");
      const std::string_view forced = told == nullptr ? "" : told;
      unsigned a = 0, b = 0, c = 0, d = 0, a1 = 0, b1 = 0, c1 = 0, d1 = 0;
      if (forced == "avx2" || forced == "avx512" || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return native;
      __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);
#if defined(CPU_CAPABILITY_AVX512)
      native.int8 = (c & (1u << 11)) != 0;      // AVX512-VNNI
      native.bfloat16 = (a1 & (1u << 5)) != 0;  // AVX512-BF16
#else
      native.int8 = (a1 & (1u << 4)) != 0;  // AVX-VNNI
#endif
#endif
      return native;
    }();
    return found;
  }
};

#if defined(CPU_CAPABILITY_AVX512)
NLPKERNELS_INLINE Words load_words(const void* p) { return _mm512_loadu_si512(p); }
NLPKERNELS_INLINE Words spread_word(int32_t word) { return _mm512_set1_epi32(word); }
#elif defined(CPU_CAPABILITY_AVX2)
NLPKERNELS_INLINE Words load_words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
NLPKERNELS_INLINE Words spread_word(int32_t word) { return _mm256_set1_epi32(word); }
#else
NLPKERNELS_INLINE Words load_words(const void* p) {
  Words words;
  std::memcpy(&words, p, sizeof(words));
  return words;
}
NLPKERNELS_INLINE Words spread_word(int32_t word) { return {word, word, word, word}; }
#endif

// The left operand: rows of words, each with what its products are to be multiplied with, and what is to be taken off
// them before.
struct NarrowRows {
  NarrowRows(int32_t* words, int64_t depth, float* scales, int32_t* offsets)
      : words(words), depth(depth), scales(scales), offsets(offsets) {}

  int32_t* words;
  int64_t depth;  // words of a row
  float* scales;
  int32_t* offsets;

  int32_t* row(int64_t r) const { return words + r * depth; }
  NarrowRows from(int64_t r) const { return {row(r), depth, scales + r, offsets + r}; }
};

struct Int8 {
  using Stored = uint8_t;
  using Sums = Words;
  static constexpr int64_t values = 4;  // in a word
  static constexpr bool has_scales = true;
  static bool is_native() { return Native::of_machine().int8; }
  static NLPKERNELS_INLINE Sums zero() { return spread_word(0); }

  // A word of a row: as it is, or the values at even and at odd places as 16 bits each.
  template <bool native>
  struct Left {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    std::array<Words, native ? 1 : 2> of;
#else
    std::array<int8_t, 4> of;
#endif
  };

#if defined(CPU_CAPABILITY_AVX512)
  template <bool native>
  static NLPKERNELS_INLINE Left<native> left(int32_t word) {
    const Words all = spread_word(word);
    if constexpr (native) {
      return {all};
    } else {
      return {_mm512_srai_epi16(_mm512_slli_epi16(all, 8), 8), _mm512_srai_epi16(all, 8)};
    }
  }
  template <bool native>
  static NLPKERNELS_INLINE void multiply_add(Sums& sums, const Words& weights, const Left<native>& a) {
    if constexpr (native) {
      asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(a.of[0]));
    } else {
      const Words even = _mm512_and_si512(weights, _mm512_set1_epi16(255)), odd = _mm512_srli_epi16(weights, 8);
      sums =
          _mm512_add_epi32(sums, _mm512_add_epi32(_mm512_madd_epi16(even, a.of[0]), _mm512_madd_epi16(odd, a.of[1])));
    }
  }
  static NLPKERNELS_INLINE void store(float* out, const Sums& sums, int32_t offset, float scale) {
    const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, _mm512_set1_epi32(offset)));
    _mm512_storeu_ps(out, _mm512_mul_ps(whole, _mm512_set1_ps(scale)));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  template <bool native>
  static NLPKERNELS_INLINE Left<native> left(int32_t word) {
    const Words all = spread_word(word);
    if constexpr (native) {
      return {all};
    } else {
      return {_mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), _mm256_srai_epi16(all, 8)};
    }
  }
  template <bool native>
  static NLPKERNELS_INLINE void multiply_add(Sums& sums, const Words& weights, const Left<native>& a) {
    if constexpr (native) {
      asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(weights), "x"(a.of[0]));
    } else {
      const Words even = _mm256_and_si256(weights, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(weights, 8);
      sums =
          _mm256_add_epi32(sums, _mm256_add_epi32(_mm256_madd_epi16(even, a.of[0]), _mm256_madd_epi16(odd, a.of[1])));
    }
  }
  static NLPKERNELS_INLINE void store(float* out, const Sums& sums, int32_t offset, float scale) {
    const __m256 whole = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_set1_epi32(offset)));
    _mm256_storeu_ps(out, _mm256_mul_ps(whole, _mm256_set1_ps(scale)));
  }
#else
  template <bool native>
  static NLPKERNELS_INLINE Left<native> left(int32_t word) {
    Left<native> a;
    std::memcpy(a.of.data(), &word, sizeof(word));
    return a;
  }
  template <bool native>
  static NLPKERNELS_INLINE void multiply_add(Sums& sums, const Words& weights, const Left<native>& a) {
    uint8_t values[16];
    std::memcpy(values, &weights, sizeof(values));
    for (int lane = 0; lane < 4; ++lane) {
      for (int i = 0; i < 4; ++i) sums.of[lane] += static_cast<int32_t>(values[4 * lane + i]) * a.of[i];
    }
  }
  static NLPKERNELS_INLINE void store(float* out, const Sums& sums, int32_t offset, float scale) {
    for (int lane = 0; lane < 4; ++lane) out[lane] = static_cast<float>(sums.of[lane] - offset) * scale;
  }
#endif

  // Of a row of the left operand that is a state: rows that it is stored as.
  static constexpr int64_t digits_of_state = 2;

  // A row as whole numbers and their scale, of one digit as row r, or of two as rows r and r + 1. One with a value that
  // is not finite makes all of its products NaN; one of values next to nothing is zeros.
  template <int64_t digits>
  static void put_row(const NarrowRows& rows, int64_t r, const float* row, int64_t k) {
    using V = Vectorized<float>;
    constexpr float kLeast = 1e-30f, kMost = digits == 2 ? 127 * 128 : 127;
    V largest(0);
    for_each_vector<float>(
        k, [&](int64_t i, int64_t n) { largest = at::vec::maximum(largest, load_vector(row + i, n).abs()); });
    alignas(64) float lanes[V::size()];
    largest.store(lanes);
    float most = 0;
    for (const float lane : lanes) most = lane > most || lane != lane ? lane : most;
    int8_t* out[digits];
    int32_t sums[digits] = {};
    for (int64_t digit = 0; digit < digits; ++digit) {
      out[digit] = reinterpret_cast<int8_t*>(rows.row(r + digit));
      rows.scales[r + digit] = most / (digit == 0 ? 127 : 127 * 128);
      rows.offsets[r + digit] = 0;
    }
    if (!(most >= kLeast && most <= std::numeric_limits<float>::max())) {
      for (int64_t digit = 0; digit < digits; ++digit) {
        std::memset(out[digit], 0, rows.depth * sizeof(int32_t));
        rows.scales[r + digit] = most < kLeast ? 0.f : std::numeric_limits<float>::quiet_NaN();
      }
      return;
    }
    const float factor = kMost / most;
#if defined(CPU_CAPABILITY_AVX512)
    __m512i all[digits] = {};
    for_each_vector<float>(k, [&](int64_t i, int64_t n) {
      __m512i whole = _mm512_cvtps_epi32(load_vector(row + i, n) * V(factor));
      const auto mask = static_cast<__mmask16>((1u << std::min<int64_t>(16, (n + 3) / 4 * 4)) - 1);
      if constexpr (digits == 2) {
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(64)), 7);
        whole = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 7));
        all[0] = _mm512_add_epi32(all[0], high);
        _mm_mask_storeu_epi8(out[0] + i, mask, _mm512_cvtepi32_epi8(high));
      }
      all[digits - 1] = _mm512_add_epi32(all[digits - 1], whole);
      _mm_mask_storeu_epi8(out[digits - 1] + i, mask, _mm512_cvtepi32_epi8(whole));
    });
    for (int64_t digit = 0; digit < digits; ++digit) sums[digit] = _mm512_reduce_add_epi32(all[digit]);
#else
    for_each_vector<float>(k, [&](int64_t i, int64_t n) {
      (load_vector(row + i, n) * V(factor)).round().store(lanes);
      int8_t stored[digits][V::size()];
      for (int j = 0; j < V::size(); ++j) {
        int32_t whole = static_cast<int32_t>(lanes[j]);
        if constexpr (digits == 2) {
          const int32_t high = (whole + 64) >> 7;
          whole -= high * 128;
          stored[0][j] = static_cast<int8_t>(high);
          sums[0] += high;
        }
        stored[digits - 1][j] = static_cast<int8_t>(whole);
        sums[digits - 1] += whole;
      }
      for (int64_t digit = 0; digit < digits; ++digit) {
        std::memcpy(out[digit] + i, stored[digit], std::min<int64_t>(V::size(), (n + 3) / 4 * 4));
      }
    });
#endif
    for (int64_t digit = 0; digit < digits; ++digit) rows.offsets[r + digit] = 128 * sums[digit];
  }
};

struct Brain {
  using Stored = int16_t;
  using Sums = Reals;
  static constexpr int64_t values = 2;
  static constexpr bool has_scales = false;
  static bool is_native() { return Native::of_machine().bfloat16; }

  template <bool native>
  struct Left {
#if defined(CPU_CAPABILITY_AVX512)
    std::array<Words, native ? 1 : 2> of;
#elif defined(CPU_CAPABILITY_AVX2)
    std::array<Words, 2> of;
#else
    std::array<float, 2> of;
#endif
  };

#if defined(CPU_CAPABILITY_AVX512)
  static NLPKERNELS_INLINE Sums zero() { return _mm512_setzero_ps(); }
  static NLPKERNELS_INLINE Words high_half(const Words& words) {
    return _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000)));
  }
  template <bool native>
  static NLPKERNELS_INLINE Left<native> left(int32_t word) {
    const Words all = spread_word(word);
    if constexpr (native) {
      return {all};
    } else {
      return {_mm512_slli_epi32(all, 16), high_half(all)};
    }
  }
  template <bool native>
  static NLPKERNELS_INLINE void multiply_add(Sums& sums, const Words& weights, const Left<native>& a) {
    if constexpr (native) {
      asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(a.of[0]));
    } else {
      sums = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(weights, 16)), _mm512_castsi512_ps(a.of[0]), sums);
      sums = _mm512_fmadd_ps(_mm512_castsi512_ps(high_half(weights)), _mm512_castsi512_ps(a.of[1]), sums);
    }
  }
  static NLPKERNELS_INLINE void store(float* out, const Sums& sums, int32_t, float) { _mm512_storeu_ps(out, sums); }
#elif defined(CPU_CAPABILITY_AVX2)
  static NLPKERNELS_INLINE Sums zero() { return _mm256_setzero_ps(); }
  static NLPKERNELS_INLINE Words high_half(const Words& words) {
    return _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000)));
  }
  template <bool native>
  static NLPKERNELS_INLINE Left<native> left(int32_t word) {
    const Words all = spread_word(word);
    return {_mm256_slli_epi32(all, 16), high_half(all)};
  }
  template <bool native>
  static NLPKERNELS_INLINE void multiply_add(Sums& sums, const Words& weights, const Left<native>& a) {
    sums = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(weights, 16)), _mm256_castsi256_ps(a.of[0]), sums);
    sums = _mm256_fmadd_ps(_mm256_castsi256_ps(high_half(weights)), _mm256_castsi256_ps(a.of[1]), sums);
  }
  static NLPKERNELS_INLINE void store(float* out, const Sums& sums, int32_t, float) { _mm256_storeu_ps(out, sums); }
#else
  static NLPKERNELS_INLINE Sums zero() { return {}; }
  template <bool native>
  static NLPKERNELS_INLINE Left<native> left(int32_t word) {
    at::BFloat16 pair[2];
    std::memcpy(pair, &word, sizeof(word));
    return {static_cast<float>(pair[0]), static_cast<float>(pair[1])};
  }
  template <bool native>
  static NLPKERNELS_INLINE void multiply_add(Sums& sums, const Words& weights, const Left<native>& a) {
    at::BFloat16 pairs[8];
    std::memcpy(pairs, &weights, sizeof(weights));
    for (int lane = 0; lane < 4; ++lane) {
      for (int i = 0; i < 2; ++i) sums.of[lane] += static_cast<float>(pairs[2 * lane + i]) * a.of[i];
    }
  }
  static NLPKERNELS_INLINE void store(float* out, const Sums& sums, int32_t, float) {
    std::memcpy(out, &sums, sizeof(sums));
  }
#endif

  static constexpr int64_t digits_of_state = 1;

  // A row rounded to bfloat16.
  template <int64_t digits>
  static void put_row(const NarrowRows& rows, int64_t r, const float* row, int64_t k) {
    auto* const out = reinterpret_cast<at::BFloat16*>(rows.row(r));
    for_each_vector<float>(k, [&](int64_t i, int64_t n) { store_vector(out + i, load_vector(row + i, n), n); });
    if (k % 2 != 0) out[k] = at::BFloat16(0.f);
  }
};

// Words that k values take.
template <typename Numbers>
constexpr int64_t words_of(int64_t k) {
  return ceil_div(k, Numbers::values);
}

// Panels of a group: as many as their gates fill eight vectors of AVX-512, sums enough to hide a product's latency.
constexpr int64_t panels_of_group(int64_t gates) { return std::max<int64_t>(1, 8 / gates); }

// A matrix of weights: the rows of `gates` gates of some units, by k values.
template <typename Numbers>
struct NarrowMatrix {
  const char* data;
  int64_t units, k, gates;

  static int64_t words(int64_t units, int64_t k, int64_t gates) {
    return ceil_div(units, kPanel) * kPanel * gates * words_of<Numbers>(k);
  }
  int64_t depth() const { return words_of<Numbers>(k); }
  int64_t panels() const { return ceil_div(units, kPanel); }
  // Panels, vectors of 16 words, of a group, and where it lies.
  int64_t panels_in(int64_t group) const {
    return std::min(panels_of_group(gates), panels() - group * panels_of_group(gates));
  }
  const char* of_group(int64_t group) const {
    return data + group * panels_of_group(gates) * gates * depth() * kPanelBytes16;
  }
};

// Rows and vectors of a tile: as many sums as there are registers for.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kNarrowRows = 4;
constexpr int narrow_vectors(int rows) { return rows < 4 ? 8 : 4; }
#else
constexpr int kNarrowRows = 2;
constexpr int narrow_vectors(int rows) { return rows == 1 ? 8 : 4; }
#endif

// out[r][vector] for R rows and C vectors of words that lie `step` bytes apart from one word of k to the next.
template <typename Numbers, bool native, int R, int C>
void narrow_tile(const NarrowRows& a, const char* weights, int64_t step, float* out, int64_t ldo) {
  typename Numbers::Sums sums[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[r][c] = Numbers::zero();
  }
  const int32_t* row[R];
  for (int r = 0; r < R; ++r) row[r] = a.row(r);
  for (int64_t i = 0; i < a.depth; ++i, weights += step) {
    typename Numbers::template Left<native> left[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) left[r] = Numbers::template left<native>(row[r][i]);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Words words = load_words(weights + c * sizeof(Words));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) Numbers::template multiply_add<native>(sums[r][c], words, left[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      Numbers::store(out + r * ldo + c * kLanes, sums[r][c], a.offsets[r], a.scales[r]);
    }
  }
}

// The products of `count` rows, at most kNarrowRows, with a group: out [row][panel][gate][16].
template <typename Numbers, bool native>
void multiply_group_by(const NarrowRows& a, int64_t count, const NarrowMatrix<Numbers>& b, int64_t group, float* out,
                       int64_t ldo) {
  const int64_t vectors = b.panels_in(group) * b.gates * kPanel / kLanes, step = vectors * sizeof(Words);
  const char* weights = b.of_group(group);
  const auto run = [&]<int R>() {
    constexpr int most = narrow_vectors(R);
    for (int64_t c = 0; c < vectors; c += most) {
      const int64_t here = std::min<int64_t>(most, vectors - c);
      const auto run_width = [&]<int... C>(std::integer_sequence<int, C...>) {
        ((here == C + 1
              ? narrow_tile<Numbers, native, R, C + 1>(a, weights + c * sizeof(Words), step, out + c * kLanes, ldo)
              : void()),
         ...);
      };
      run_width(std::make_integer_sequence<int, most>());
    }
  };
  if (count == 1) return run.template operator()<1>();
  if (count == 2) return run.template operator()<2>();
  if constexpr (kNarrowRows == 4) {
    if (count == 3) return run.template operator()<3>();
    run.template operator()<4>();
  }
}

template <typename Numbers>
void multiply_group(const NarrowRows& a, int64_t count, const NarrowMatrix<Numbers>& b, int64_t group, float* out,
                    int64_t ldo) {
  if (Numbers::is_native()) {
    multiply_group_by<Numbers, true>(a, count, b, group, out, ldo);
  } else {
    multiply_group_by<Numbers, false>(a, count, b, group, out, ldo);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
