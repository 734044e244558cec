// Weighted sums of a table's rows, in registers: what pools bags, and adds up the gradients of a row.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "vector.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

// Rows that are added up together, and vectors of columns in a block.
constexpr int kGroup = 64, kBlock = 8;
// Vectors of columns of rows that are added whole, at most: 128 columns with AVX2, 320 with AVX-512, as many as there
// are registers for. For each number of them all loops are compiled anew, which takes the compiler minutes if it is
// done for every type.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kWholeFloats = 20;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kWholeFloats = 16;
#else
constexpr int kWholeFloats = 0;
#endif
template <typename T>
constexpr int kWhole = std::is_same_v<T, float> ? kWholeFloats : 0;
// Calls body with the whole number n, from 1 to kMost, as a constant.
template <int kMost, typename Body>
NLPKERNELS_INLINE void with_constant(int64_t n, const Body& body) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_constant<kMost - 1>(n, body);
  }
  body(std::integral_constant<int, kMost>());
}

// n zeros, of which none is set in a loop: GCC keeps what a loop of more than 16 turns goes over in memory.
template <typename V, int... each>
NLPKERNELS_INLINE std::array<V, sizeof...(each)> zeros(std::integer_sequence<int, each...>) {
  return {(static_cast<void>(each), V(0))...};
}

// Sums of rows of `columns` values, each times a factor, added one after the other, in registers: kVectors are all
// vectors of the columns, or 0 where these are more than kWhole. Of such rows, kGroup are added before the next block
// of columns has its turn.
//
// The last vector may begin before the one in front of it ends, so that every load is of a whole vector: what both hold
// is the same, added in the same order.
template <typename T, int kVectors>
class RowSum {
 public:
  using scalar = acc_t<T>;
  using V = Vec<T>;
  static constexpr int64_t kSize = V::size();

  // A row and its factor; a row that is nullptr does not count.
  struct Term {
    const T* row;
    scalar factor;
  };

  // Takes room for what more rows than kGroup add up to so far: scratch_size(columns) values.
  RowSum(int64_t columns, scalar* scratch) : columns_(columns), slots_(slots(columns)), sums_(scratch) {}

  // How many vectors hold the columns.
  static int64_t slots(int64_t columns) { return std::max<int64_t>(1, (columns + kSize - 1) / kSize); }
  static int64_t scratch_size(int64_t columns) { return slots(columns) * kSize; }

  // The sum or mean of the terms begin to end to out; returns how many counted. Asks for term(i) once, which
  // is to be inlined always: wide rows ask in several places, and a call for each row of 512 bytes took a tenth of the
  // time.
  template <typename Out, typename TermOf>
  NLPKERNELS_INLINE int64_t operator()(int64_t begin, int64_t end, const TermOf& term, bool is_mean, Out* out) {
    int64_t counted = 0;
    for (int64_t first = begin; first == begin || first < end; first += kGroup) {
      const int64_t last = std::min(first + kGroup, end);
      const Part part{first == begin, last == end, is_mean};
      if constexpr (kVectors > 0) {
        const auto each = [&](const auto& add) {
          for (int64_t i = first; i < last; ++i) {
            const Term next = term(i);
            if (next.row == nullptr) continue;
            ++counted;
            add(next);
          }
        };
        add_block<kVectors>(part, 0, each, counted, out);
      } else {
        int64_t slot = 0, count = 0;
        const auto each = [&](const auto& add) {
          if (slot > 0) {
            for (int64_t i = 0; i < count; ++i) add(terms_[i]);
            return;
          }
          for (int64_t i = first; i < last; ++i) {
            const Term next = term(i);
            if (next.row == nullptr) continue;
            terms_[count++] = next;  // for the blocks to come
            add(next);
          }
          counted += count;
        };
        for (int64_t blocks = (slots_ + kBlock - 1) / kBlock; blocks > 0; --blocks) {
          const int64_t vectors = (slots_ - slot + blocks - 1) / blocks;
          with_constant<kBlock>(vectors, [&](auto n) { add_block<n>(part, slot, each, counted, out); });
          slot += vectors;
        }
      }
    }
    return counted;
  }

 private:
  struct Part {
    bool begins, ends, is_mean;
  };

  // Adds what each(add) calls add with, in the n vectors of columns from slot on.
  template <int n, typename Out, typename Each>
  NLPKERNELS_INLINE void add_block(const Part& part, int64_t slot, const Each& each, const int64_t& counted, Out* out) {
    scalar* sum = sums_ + slot * kSize;
    const int64_t size = n == 1 ? std::min(columns_, kSize) : kSize;  // of rows shorter than a vector
    const int64_t begin = slot * kSize, end = std::min(begin + (n - 1) * kSize, columns_ - size);
    const auto column = [&](int v) { return v == n - 1 ? end : begin + v * kSize; };
    auto total = zeros<V>(std::make_integer_sequence<int, n>());
    // Always inline: as a call, from two places, it would have the sums in memory.
    each([&](const Term& next) __attribute__((always_inline)) {
      const T *row = next.row + begin, *row_end = next.row + end;
      const V factor(next.factor);
#pragma GCC unroll 32
      for (int v = 0; v < n - 1; ++v) total[v] = at::vec::fmadd(load_vector(row + v * kSize), factor, total[v]);
      total[n - 1] = at::vec::fmadd(load_vector(row_end, size), factor, total[n - 1]);
    });
    if (!part.begins) {
#pragma GCC unroll 32
      for (int v = 0; v < n; ++v) total[v] = V::loadu(sum + v * kSize) + total[v];
    }
    if (!part.ends) {
#pragma GCC unroll 32
      for (int v = 0; v < n; ++v) total[v].store(sum + v * kSize);
      return;
    }
    if (part.is_mean) {
      const V divisor(static_cast<scalar>(std::max<int64_t>(1, counted)));
#pragma GCC unroll 32
      for (int v = 0; v < n; ++v) total[v] = total[v] / divisor;
    }
#pragma GCC unroll 32
    for (int v = 0; v < n; ++v) store_vector(out + column(v), total[v], size);
  }

  const int64_t columns_, slots_;
  scalar* const sums_;
  std::array<Term, (kVectors > 0 ? 0 : kGroup)> terms_;
};

// Calls body with a RowSum for rows of so many columns.
template <typename T, typename Body>
void with_row_sum(int64_t columns, acc_t<T>* scratch, const Body& body) {
  const int64_t slots = RowSum<T, 0>::slots(columns);
  if constexpr (kWhole<T> > 0) {
    if (slots <= kWhole<T>) {
      return with_constant<kWhole<T>>(slots, [&](auto n) { body(RowSum<T, n>(columns, scratch)); });
    }
  }
  body(RowSum<T, 0>(columns, scratch));
}

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
