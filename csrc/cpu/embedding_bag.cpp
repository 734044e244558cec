// Embedding-bag pooling on the CPU: forward, backward, and backward with the optimizer's step in it.
//
// Forward: a thread takes whole bags, reads each index, checks it, skips it if it is the padding, and adds its row to
// sums that are in registers: kGroup rows, all their columns or, of wide ones, up to kBlock vectors at a time. The
// error of a sum of n rows thus grows with sqrt(kGroup + n / kGroup). The loop over bags is compiled for every number
// of vectors, so that the next bag's rows are on their way while a short bag's end (12,800 rows of 256 bytes, in bags
// of 25: 0.8 of the time). The row that comes some indices later, in whichever bag, is asked for (Ahead). Only its
// first bytes: of rows that are in a cache already, as frequent words' are, every line asked for costs time.
//
// Backward: uses are sorted by row (radix sort of keys of 4 or 8 bytes, as many bits as the table needs, frequent words
// first; the bag stands in the key, so that neither a table of bags nor a division is needed), and a thread takes whole
// rows. Every gradient row is written once, by one thread, its terms added in the order of the indices: no atomics, and
// the same bits for any number of threads. The sorted rows are the coalesced sparse gradient as they are, and what an
// optimizer's step fused into backward (embedding_bag_update) goes over: rows of the table are asked for as in the
// forward pass, but to be written, which takes them from the other cores' caches, and kTogether at a time.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "memory.h"
#include "vector.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {
namespace {

// Rows that are added up together, vectors of columns in a block, and rows that an update asks for together.
constexpr int kGroup = 64, kBlock = 8, kTogether = 16;
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
// How many rows ahead a row is asked for to be written.
constexpr int64_t kAhead = 32;
// A gradient of more bytes is taken not to be in a cache: its rows are asked for so many bytes before they are written.
constexpr int64_t kCached = 12 << 20, kBytesAhead = 12 << 10;
// Values that a thread takes at least.
constexpr int64_t kGrain = 1 << 14;

// Rows of a table worth one thread's while, when each is `size` values.
int64_t grain(int64_t size) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size)); }

// How many rows ahead a row is asked for, how many of its bytes (the hardware goes on from there), and whether it is to
// come into the first-level cache or the second. More lines can be on their way to the second, and Zen 4 needs that:
// 400,000 random rows of 256 bytes take two thirds of the time. Zen 5 does not: with AVX-512 and with AVX2, 51,200
// random rows of 512 bytes take half of the time, with two threads a third, if they come into the first, and rows that
// are in a cache already 0.75 to 0.9. On an Intel Xeon with AMX, cold rows of 256 to 512 bytes take 0.75 to 1.0 of the
// time if they come into the second, but warm ones 1.1 to 1.4; if fewer bytes of them are asked for, cold ones 0.86 to
// 0.95 and warm ones 0.98 to 1.04. Zen 3 has Zen 4's caches, others of family 6 are taken to be like that Xeon, and all
// that is left like Zen 5.
struct Ahead {
  int64_t rows, bytes;
  bool near;

  static Ahead of_this_processor() {
#ifdef __x86_64__
    unsigned a = 0, b, c, d;
    const bool is_known = __get_cpuid(1, &a, &b, &c, &d);
    const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff);
    if (is_known && family == 0x19) return {32, 512, false};  // Zen 3 and 4
    if (is_known && family == 6) return {24, 128, true};      // Intel
#endif
    return {24, 256, true};
  }
};

// Asks for the first lines of a row. Always inline: GCC drops calls that do nothing but this.
template <typename T>
NLPKERNELS_INLINE void prefetch_row(const T* row, int64_t columns, const Ahead& ahead) {
  const char* line = reinterpret_cast<const char*>(row);
  const char* end = line + std::min<int64_t>(columns * sizeof(T), ahead.bytes);
  if (ahead.near) {
    for (; line < end; line += 64) __builtin_prefetch(line, 0, 3);
  } else {
    for (; line < end; line += 64) __builtin_prefetch(line, 0, 2);
  }
}

// Asks for a row that will be changed: the other cores' caches give it up.
template <typename T>
NLPKERNELS_INLINE void prefetch_row_to_write(const T* row, int64_t columns) {
  const char* end = reinterpret_cast<const char*>(row + columns);
  for (const char* line = reinterpret_cast<const char*>(row); line < end; line += 64) {
#ifdef __x86_64__
    asm volatile("prefetchw %0" : : "m"(*line));  // what the builtin makes only where a flag of the compiler says so
#else
    __builtin_prefetch(line, 1, 2);
#endif
  }
}

// Where each bag begins and ends in the flattened indices.
class Bags {
 public:
  Bags(const char* op, const Tensor& indices, const OptionalTensor& offsets, bool include_last_offset) {
    if (!offsets) {
      count_ = indices.size(0);
      length_ = indices.size(1);
      return;
    }
    starts_ = offsets->to(at::kLong).contiguous();
    data_ = starts_.const_data_ptr<int64_t>();
    given_ = starts_.numel();
    end_ = indices.numel();
    count_ = given_ - (include_last_offset ? 1 : 0);
    TORCH_CHECK_VALUE(given_ == 0 || data_[0] == 0, op, ": expected offsets[0] to be 0, got ", data_[0]);
    for (const auto i : c10::irange(given_)) {
      const int64_t least = i == 0 ? 0 : data_[i - 1];
      TORCH_CHECK_VALUE(data_[i] >= least && data_[i] <= end_, op, ": expected offsets[", i, "] between ", least,
                        " (the offset before it) and ", end_, " (the number of indices), got ", data_[i]);
    }
  }

  int64_t count() const { return count_; }
  int64_t begin(int64_t bag) const { return data_ == nullptr ? bag * length_ : data_[bag]; }
  int64_t end(int64_t bag) const {
    if (data_ == nullptr) return (bag + 1) * length_;
    return bag + 1 < given_ ? data_[bag + 1] : end_;
  }
  // Indices that are in a bag; with include_last_offset there may be more.
  int64_t total() const { return count_ == 0 ? 0 : end(count_ - 1); }
  // The length of every bag, or -1.
  int64_t length() const { return data_ == nullptr ? length_ : -1; }

 private:
  int64_t count_ = 0, length_ = 0, given_ = 0, end_ = 0;
  Tensor starts_;
  const int64_t* data_ = nullptr;
};

// indices, contiguous, as the caller wrote them; every index is checked before it is used. To be copied into a loop:
// what stands in a copy stays in registers.
template <typename index_t>
class Indices {
 public:
  Indices(const char* op, const Tensor& indices, int64_t rows)
      : op_(op), tensor_(&indices), data_(indices.const_data_ptr<index_t>()), rows_(rows), count_(indices.numel()) {
    static const Ahead ahead = Ahead::of_this_processor();
    ahead_ = ahead;
  }

  NLPKERNELS_INLINE int64_t operator[](int64_t position) const {
    const int64_t index = data_[position];
    if (C10_UNLIKELY(index < 0 || index >= rows_)) fail(op_, *tensor_, position, index, rows_);
    return index;
  }

  // Asks for the row of a table that will be used some indices after `position`, if there is one.
  template <typename T>
  NLPKERNELS_INLINE void prefetch_after(const T* table, int64_t columns, int64_t position) const {
    position += ahead_.rows;
    if (position >= count_) return;
    const int64_t index = data_[position];
    if (C10_UNLIKELY(index < 0 || index >= rows_)) return;
    prefetch_row(table + index * columns, columns, ahead_);
  }

 private:
  [[noreturn]] static void fail(const char* op, const Tensor& indices, int64_t position, int64_t index, int64_t rows) {
    // A single column may be what is left of any shape: a lookup's.
    const int64_t columns = indices.dim() == 2 ? indices.size(1) : 0;
    const std::string where =
        columns == 0   ? "indices[" + std::to_string(position)
        : columns == 1 ? "flattened indices[" + std::to_string(position)
                       : "indices[" + std::to_string(position / columns) + "][" + std::to_string(position % columns);
    TORCH_CHECK_INDEX(false, op, ": ", where, "] is ", index, ", expected a row from 0 to ", rows - 1,
                      " of a table of ", rows);
  }

  const char* op_;
  const Tensor* tensor_;
  const index_t* data_;
  int64_t rows_, count_;
  Ahead ahead_;
};

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

  explicit RowSum(int64_t columns) : columns_(columns), slots_(slots(columns)), sums_(slots_ * kSize) {}

  // How many vectors hold the columns.
  static int64_t slots(int64_t columns) { return std::max<int64_t>(1, (columns + kSize - 1) / kSize); }

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
    scalar* sum = sums_.data() + slot * kSize;
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
  std::vector<scalar> sums_;
  std::array<Term, (kVectors > 0 ? 0 : kGroup)> terms_;
};

// Calls body with a RowSum for rows of so many columns.
template <typename T, typename Body>
void with_row_sum(int64_t columns, const Body& body) {
  const int64_t slots = RowSum<T, 0>::slots(columns);
  if constexpr (kWhole<T> > 0) {
    if (slots <= kWhole<T>) return with_constant<kWhole<T>>(slots, [&](auto n) { body(RowSum<T, n>(columns)); });
  }
  body(RowSum<T, 0>(columns));
}

// Forward ------------------------------------------------------------------------------------------------------------

template <bool kWeighted, typename T, typename index_t>
void pool(const Tensor& weight, const Indices<index_t>& indices, const Bags& bags, const T* factors, Mode mode,
          int64_t padding_idx, const Tensor& out, const Tensor& aux) {
  using scalar = acc_t<T>;
  const int64_t columns = weight.size(1);
  const T* table = weight.const_data_ptr<T>();
  T* out_data = out.mutable_data_ptr<T>();
  int64_t* aux_data = aux.mutable_data_ptr<int64_t>();
  const int64_t length = bags.count() == 0 ? 0 : bags.total() / bags.count();

  at::parallel_for(0, bags.count(), grain((length + 1) * columns), [&](int64_t first, int64_t last) {
    if (mode == Mode::lookup) {
      for (const auto bag : c10::irange(first, last)) {
        indices.prefetch_after(table, columns, bag);
        std::copy_n(table + indices[bag] * columns, columns, out_data + bag * columns);
      }
      return;
    }
    if (mode == Mode::max) {
      std::vector<scalar> best(columns);
      for (const auto bag : c10::irange(first, last)) {
        int64_t* winner = aux_data + bag * columns;
        std::fill_n(winner, columns, -1);
        std::fill(best.begin(), best.end(), scalar(0));
        for (const auto i : c10::irange(bags.begin(bag), bags.end(bag))) {
          const int64_t index = indices[i];
          indices.prefetch_after(table, columns, i);
          if (index == padding_idx) continue;
          const T* row = table + index * columns;
          for (const auto j : c10::irange(columns)) {
            const scalar value = static_cast<scalar>(row[j]);
            const bool wins = winner[j] < 0 || value > best[j];
            best[j] = wins ? value : best[j];
            winner[j] = wins ? i : winner[j];
          }
        }
        for (const auto j : c10::irange(columns)) out_data[bag * columns + j] = static_cast<T>(best[j]);
      }
      return;
    }
    with_row_sum<T>(columns, [&](auto sum) {
      const auto term = [=](int64_t i) __attribute__((always_inline)) -> typename decltype(sum)::Term {
        const int64_t index = indices[i];
        indices.prefetch_after(table, columns, i);
        if (index == padding_idx) return {nullptr, 0};
        return {table + index * columns, kWeighted ? static_cast<scalar>(factors[i]) : scalar(1)};
      };
      for (const auto bag : c10::irange(first, last)) {
        const bool is_mean = mode == Mode::mean;
        const int64_t count = sum(bags.begin(bag), bags.end(bag), term, is_mean, out_data + bag * columns);
        if (is_mean) aux_data[bag] = count;
      }
    });
  });
}

std::tuple<Tensor, Tensor> embedding_bag(const Tensor& weight, const Tensor& indices, const OptionalTensor& offsets,
                                         const OptionalTensor& per_sample_weights, c10::string_view mode_name,
                                         int64_t padding_idx, bool include_last_offset, bool /*scale_grad_by_freq*/,
                                         bool /*sparse*/) {
  const Mode mode = parse_mode(mode_name);
  const char* op = mode == Mode::lookup ? "embedding" : "embedding_bag";
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": expected 2-D weight, got ", weight.sizes());
  check_embedding_bag(op, weight, indices, offsets, per_sample_weights, mode, include_last_offset);
  const Bags bags(op, indices, offsets, include_last_offset);
  const Tensor table = weight.contiguous(), ids = indices.contiguous();
  const OptionalTensor factors = contiguous(per_sample_weights);
  const Tensor out = at::empty({bags.count(), weight.size(1)}, weight.options());
  const auto integers = weight.options().dtype(at::kLong);
  const Tensor aux = mode == Mode::mean  ? at::empty({bags.count()}, integers)
                     : mode == Mode::max ? at::empty({bags.count(), weight.size(1)}, integers)
                                         : at::empty({0}, integers);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight.scalar_type(), "embedding_bag", [&] {
    AT_DISPATCH_INDEX_TYPES(indices.scalar_type(), "embedding_bag", [&] {
      const Indices<index_t> checked(op, ids, weight.size(0));
      if (factors) {
        pool<true>(table, checked, bags, factors->const_data_ptr<scalar_t>(), mode, padding_idx, out, aux);
      } else {
        pool<false, scalar_t>(table, checked, bags, nullptr, mode, padding_idx, out, aux);
      }
    });
  });
  return {out, aux};
}

// Backward -----------------------------------------------------------------------------------------------------------

// The bits that hold 0 .. count - 1.
int bits(int64_t count) {
  int needed = 0;
  while (count - 1 > 0 && (count - 1) >> needed > 0) ++needed;
  return needed;
}

// Room for values that are written before they are read.
template <typename T>
std::unique_ptr<T[]> room(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

// All uses of rows, but of the padding's, sorted by row and then by position in the flattened indices.
class SortedUses {
 public:
  // Positions are kept only if they are wanted: without them a use's bag is at hand.
  SortedUses(const char* op, const Tensor& indices, const Bags& bags, int64_t rows, int64_t padding_idx,
             bool wants_positions)
      : wants_positions_(wants_positions),
        row_bits_(bits(rows)),
        shift_(bits(wants_positions ? bags.total() : bags.count())) {
    TORCH_CHECK_VALUE(row_bits_ + shift_ <= 64 && bags.total() < int64_t(1) << 32, op, ": a table of ", rows,
                      " rows and ", indices.numel(), " indices are too many together");
    const Tensor ids = indices.contiguous();
    AT_DISPATCH_INDEX_TYPES(indices.scalar_type(), "embedding_bag_backward", [&] {
      const Indices<index_t> checked(op, ids, rows);
      if (row_bits_ + shift_ < 32) {
        sort<uint32_t>(checked, bags, padding_idx);
      } else {
        sort<uint64_t>(checked, bags, padding_idx);
      }
    });
  }

  int64_t uses() const { return uses_; }
  // Rows in use; the i-th one's uses are [start(i), start(i + 1)).
  int64_t rows() const { return count_; }
  int64_t start(int64_t i) const { return start_[i]; }
  int64_t row(int64_t i) const { return rows_[i]; }
  const int64_t* rows_begin() const { return rows_.get(); }
  // Where uses are. To be copied into a loop, like Indices.
  struct Places {
    const uint32_t *low, *bag_of;

    int64_t position(int64_t use) const { return low[use]; }  // if positions are wanted
    NLPKERNELS_INLINE int64_t bag(int64_t use) const { return bag_of != nullptr ? bag_of[low[use]] : low[use]; }
  };
  Places places() const { return {low_.get(), bag_of_.get()}; }

  // What a gradient of all rows before the i-th one takes: to write a row takes as long as to read some.
  int64_t work(int64_t i) const { return start_[i] + 3 * i; }
  // The first row before which there is so much work, or rows().
  int64_t row_from(int64_t work_before) const {
    int64_t first = 0, last = count_;
    while (first < last) {
      const int64_t middle = (first + last) / 2;
      if (work(middle) < work_before) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    return first;
  }

 private:
  static constexpr int kDigit = 11;           // bits, at most
  static constexpr int64_t kShare = 1 << 12;  // keys that a thread takes at least
  static constexpr int64_t kFewKeys = 64;     // too few for counters
  // Keys that are sorted in the time that it takes to count with one more digit.
  static constexpr double kKeysOfDigit = 1;

  template <typename Key>
  struct Share {  // of a thread
    Key *keys, *end;
    // Of both halves, each with counters of its own: a frequent digit's next key would wait for its counter.
    std::array<std::array<uint32_t, 2>, (1 << kDigit) + 1> place;

    // Calls body(key, place[digit_of(key)]), by value, as what they hold stays in registers then.
    template <typename Digit, typename Body>
    NLPKERNELS_INLINE void for_each_key(Digit digit_of, Body body) {
      const int64_t half = (end - keys) / 2;
      const Key *const one = keys, *const other = keys + half;
      for (int64_t i = 0; i < half; ++i) {
        body(one[i], place[digit_of(one[i])][0]);
        body(other[i], place[digit_of(other[i])][1]);
      }
      if (other + half < end) body(other[half], place[digit_of(other[half])][1]);
    }
  };

  // Keys of a row and its use, in the order of the rows.
  template <typename Key, typename Checked>
  void sort(const Checked& checked, const Bags& bags, int64_t padding_idx) {
    const int64_t total = bags.total();
    auto keys = room<Key>(total), buffer = room<Key>(total);
    if (wants_positions_) bag_of_ = room<uint32_t>(total);
    std::vector<Share<Key>> shares(std::clamp<int64_t>(total / kShare, 1, at::get_num_threads()));
    const auto for_each_share = [&](const auto& body) {
      at::parallel_for(0, shares.size(), 1, [&](int64_t first, int64_t last) {
        for (const auto i : c10::irange(first, last)) body(i, shares[i]);
      });
    };
    const int64_t count = shares.size();
    const int shift = shift_;
    for_each_share([&](int64_t i, Share<Key>& share) {
      const int64_t first = bags.count() * i / count, last = bags.count() * (i + 1) / count;
      share.keys = keys.get() + (first < bags.count() ? bags.begin(first) : total);
      share.end = bag_of_ == nullptr ? add_keys<false>(checked, bags, first, last, padding_idx, share.keys)
                                     : add_keys<true>(checked, bags, first, last, padding_idx, share.keys);
    });
    for (const Share<Key>& share : shares) uses_ += share.end - share.keys;
    low_ = room<uint32_t>(uses_);
    start_ = room<uint32_t>(uses_ + 1);
    rows_ = room<int64_t>(uses_ + 1);
    start_[0] = 0;

    // The keys rise as they come but for the rows, so that any sort of them is stable.
    if (total < kFewKeys) {
      std::sort(shares[0].keys, shares[0].end);
      return add_sorted(keys.get(), keys.get() + uses_);
    }
    // Sorts the shares' keys by a digit, which is below `digits`, to the places that they have in buffer from `begin`
    // on, and makes that the keys. Returns where those of the last digit begin.
    const auto sort_by = [&](int64_t begin, Key digits, const auto& digit_of) {
      for_each_share([&](int64_t, Share<Key>& share) {
        std::fill_n(share.place.begin(), digits, std::array<uint32_t, 2>{});
        share.for_each_key(digit_of, [](Key, uint32_t& counter) { ++counter; });
      });
      uint32_t before = begin, begin_of_last = begin;
      for (Key digit = 0; digit < digits; ++digit) {
        begin_of_last = before;
        for (Share<Key>& share : shares) {
          for (uint32_t& counter : share.place[digit]) before += std::exchange(counter, before);
        }
      }
      for_each_share([&](int64_t, Share<Key>& share) {
        share.for_each_key(digit_of, [to = buffer.get()](Key key, uint32_t& next) { to[next++] = key; });
      });
      keys.swap(buffer);
      return begin_of_last;
    };
    const auto share_out = [&](int64_t begin) {
      for (const auto i : c10::irange(count)) {
        shares[i].keys = keys.get() + begin + (uses_ - begin) * i / count;
        shares[i].end = keys.get() + begin + (uses_ - begin) * (i + 1) / count;
      }
    };
    // Words are numbered by frequency, so that most uses may be of a table's first rows. One pass sorts these, each row
    // being a digit of its own, and all other rows the last: 12,800 uses of two million words take 0.6 of the time.
    int64_t begin = 0;
    const int counted_bits = std::min(kDigit, bits(uses_) - 2);
    if (row_bits_ > counted_bits && most_are_below(shares, Key(1) << (counted_bits + shift))) {
      const Key rest = Key(1) << counted_bits;
      begin = sort_by(0, rest + 1, [shift, rest](Key key) { return std::min(key >> shift, rest); });
      share_out(begin);
      add_counted(keys.get(), begin, rest, [&](Key row) { return shares.back().place[row][1]; });
    }
    // The others digit by digit.
    const int passes = count_passes(uses_ - begin, count),
              digit_bits = passes == 0 ? 0 : (row_bits_ + passes - 1) / passes;
    const Key mask = (Key(1) << digit_bits) - 1;
    for (int pass = 0; pass < passes; ++pass) {
      const int low = shift + pass * digit_bits;
      sort_by(begin, mask + 1, [low, mask](Key key) { return key >> low & mask; });
      share_out(begin);
    }
    add_sorted(keys.get() + begin, keys.get() + uses_);
  }

  // The keys of some bags' uses; returns their end.
  template <bool kPositions, typename Key, typename Checked>
  Key* add_keys(const Checked& checked, const Bags& bags, int64_t first, int64_t last, int64_t padding_idx, Key* end) {
    const Checked indices = checked;
    const int shift = shift_;
    uint32_t* const bag_of = bag_of_.get();
    for (int64_t bag = first; bag < last; ++bag) {
      const int64_t past = bags.end(bag);
      for (int64_t position = bags.begin(bag); position < past; ++position) {
        const int64_t row = indices[position];
        if (kPositions) bag_of[position] = bag;
        *end = static_cast<Key>(row) << shift | static_cast<Key>(kPositions ? position : bag);
        end += row != padding_idx;
      }
    }
    return end;
  }

  // How many digits rows are sorted by: wide ones take fewer passes over the keys, but more counters.
  int count_passes(int64_t keys, int64_t shares) const {
    int best = 0;
    double least = 0;
    for (int passes = (row_bits_ + kDigit - 1) / kDigit; passes <= row_bits_; ++passes) {
      const double counters = (1 << (row_bits_ + passes - 1) / passes) * shares;
      const double cost = passes * (keys + kKeysOfDigit * counters);
      if (best == 0 || cost < least) {
        best = passes;
        least = cost;
      }
    }
    return best;
  }

  // Whether most keys are less than `limit`, by a sample.
  template <typename Key>
  static bool most_are_below(const std::vector<Share<Key>>& shares, Key limit) {
    constexpr int64_t kSample = 64;
    int64_t below = 0;
    for (const Share<Key>& share : shares) {
      for (int64_t i = 0; i < kSample && share.keys < share.end; ++i) {
        below += share.keys[(share.end - share.keys) * i / kSample] < limit;
      }
    }
    return 2 * below > kSample * static_cast<int64_t>(shares.size());
  }

  // Adds the first uses, as sorted keys, of rows below `rows`, the uses of each of which end at end_of(row).
  template <typename Key, typename EndOf>
  void add_counted(const Key* keys, int64_t uses, int64_t rows, const EndOf& end_of) {
    const Key mask = (Key(1) << shift_) - 1;
    std::transform(keys, keys + uses, low_.get(), [mask](Key key) { return static_cast<uint32_t>(key & mask); });
    uint32_t *start = start_.get(), before = 0;
    int64_t *row_of = rows_.get(), count = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const uint32_t end = end_of(row);
      row_of[count] = row;
      count += end != before;
      start[count] = before = end;
    }
    count_ = count;
  }

  // Adds the next uses, as sorted keys, of other rows than those before.
  template <typename Key>
  void add_sorted(const Key* keys, const Key* keys_end) {
    if (keys == keys_end) return;
    const int64_t before = start_[count_], uses = keys_end - keys;
    const int shift = shift_;
    const Key mask = (Key(1) << shift) - 1;
    uint32_t *low = low_.get() + before, *start = start_.get();
    int64_t *row = rows_.get(), last = count_;
    Key previous = keys[0] >> shift;
    for (int64_t i = 0; i < uses; ++i) {  // without a branch that nobody could predict
      const Key next = keys[i] >> shift;
      low[i] = static_cast<uint32_t>(keys[i] & mask);
      last += next != previous;
      row[last] = previous = next;
      start[last + 1] = before + i + 1;
    }
    count_ = last + 1;
  }

  const bool wants_positions_;
  const int row_bits_, shift_;
  int64_t uses_ = 0, count_ = 0;
  std::unique_ptr<uint32_t[]> low_, start_, bag_of_;
  std::unique_ptr<int64_t[]> rows_;
};

// What the gradient of weight is made of, checked and contiguous.
struct Gradient {
  const Bags bags;
  const SortedUses sorted;
  const Tensor grad, aux;
  const OptionalTensor factors;
  const Mode mode;
  const bool scale_grad_by_freq;

  Gradient(const char* op, const Tensor& grad_, int64_t num_embeddings, const Tensor& indices,
           const OptionalTensor& offsets, const OptionalTensor& per_sample_weights, const Tensor& aux_,
           c10::string_view mode_name, int64_t padding_idx, bool include_last_offset, bool by_freq)
      : bags(checked_bags(op, grad_, num_embeddings, indices, offsets, per_sample_weights, aux_, mode_name,
                          include_last_offset)),
        sorted(op, indices, bags, num_embeddings, padding_idx,
               per_sample_weights.has_value() || parse_mode(mode_name) == Mode::max),
        grad(grad_.contiguous()),
        aux(aux_.contiguous()),
        factors(contiguous(per_sample_weights)),
        mode(parse_mode(mode_name)),
        scale_grad_by_freq(by_freq) {}

  // For the i-th row in use, in order: begin(i); then put(i, g, factor) where its gradient is factor * g, or else the
  // gradient to destination(i), and done(i).
  template <typename T, typename Rows>
  void for_each_row(const Rows& rows_of_thread) const {
    using scalar = acc_t<T>;
    const int64_t columns = grad.size(1);
    const T* grad_data = grad.const_data_ptr<T>();
    const T* factor_data = factors ? factors->const_data_ptr<T>() : nullptr;
    const int64_t* aux_data = aux.const_data_ptr<int64_t>();
    const auto share_of_use = [&](int64_t uses) {
      return scale_grad_by_freq ? scalar(1) / static_cast<scalar>(uses) : scalar(1);
    };
    std::vector<scalar> shares(mode == Mode::mean ? bags.count() : 0);
    for (const auto bag : c10::irange(shares.size())) shares[bag] = scalar(1) / static_cast<scalar>(aux_data[bag]);
    const scalar* share_of_bag = mode == Mode::mean ? shares.data() : nullptr;
    const SortedUses::Places places = sorted.places();
    at::parallel_for(0, sorted.work(sorted.rows()), grain(columns), [&](int64_t begin_of_work, int64_t end_of_work) {
      auto rows = rows_of_thread();
      const int64_t first = sorted.row_from(begin_of_work), last = sorted.row_from(end_of_work);
      if (mode == Mode::max) {
        std::vector<scalar> best(columns);
        for (int64_t i = first; i < last; ++i) {
          rows.begin(i);
          auto* out = rows.destination(i);
          std::fill(best.begin(), best.end(), scalar(0));
          for (const auto use : c10::irange(sorted.start(i), sorted.start(i + 1))) {
            const int64_t bag = places.bag(use), position = places.position(use);
            for (const auto j : c10::irange(columns)) {
              const bool won = aux_data[bag * columns + j] == position;
              best[j] += won ? static_cast<scalar>(grad_data[bag * columns + j]) : scalar(0);
            }
          }
          const scalar share = share_of_use(sorted.start(i + 1) - sorted.start(i));
          for (const auto j : c10::irange(columns)) out[j] = static_cast<std::decay_t<decltype(*out)>>(best[j] * share);
          rows.done(i);
        }
        return;
      }
      with_row_sum<T>(columns, [&](auto sum) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t begin = sorted.start(i), end = sorted.start(i + 1);
          const scalar share = share_of_use(end - begin);
          const auto term = [=](int64_t use) __attribute__((always_inline)) -> typename decltype(sum)::Term {
            const int64_t bag = places.bag(use);
            scalar scale = share;
            if (share_of_bag != nullptr) scale *= share_of_bag[bag];
            if (factor_data != nullptr) scale *= static_cast<scalar>(factor_data[places.position(use)]);
            return {grad_data + bag * columns, scale};
          };
          rows.begin(i);
          if (end - begin == 1) {
            const auto only = term(begin);
            rows.put(i, only.row, only.factor);
          } else {
            sum(begin, end, term, false, rows.destination(i));
            rows.done(i);
          }
        }
      });
    });
  }

 private:
  static Bags checked_bags(const char* op, const Tensor& grad, int64_t num_embeddings, const Tensor& indices,
                           const OptionalTensor& offsets, const OptionalTensor& per_sample_weights, const Tensor& aux,
                           c10::string_view mode_name, bool include_last_offset) {
    const Mode mode = parse_mode(mode_name);
    TORCH_CHECK_VALUE(num_embeddings >= 0, op, ": expected num_embeddings of 0 or more, got ", num_embeddings);
    check_embedding_bag(op, grad, indices, offsets, per_sample_weights, mode, include_last_offset);
    Bags bags(op, indices, offsets, include_last_offset);
    check_embedding_bag_backward(op, grad, bags.count(), aux, mode);
    return bags;
  }
};

// Rows of a gradient to write; row(i) is where the i-th of `count` rows in use stands. Those of a large one are asked
// for some rows ahead: 51,200 random rows of 512 bytes take 0.9 of the time on an Intel Xeon.
template <typename T, typename Row>
struct Written {
  T* data;
  int64_t columns, count, ahead = 0;
  Row row;

  Written(const Tensor& gradient, int64_t count_of_rows, const Row& place)
      : data(gradient.mutable_data_ptr<T>()), columns(gradient.size(1)), count(count_of_rows), row(place) {
    const int64_t bytes_of_row = columns * sizeof(T);
    if (static_cast<int64_t>(gradient.nbytes()) > kCached) ahead = (kBytesAhead + bytes_of_row - 1) / bytes_of_row;
  }

  NLPKERNELS_INLINE void begin(int64_t i) const {
    if (ahead > 0 && i + ahead < count) prefetch_row_to_write(destination(i + ahead), columns);
  }
  T* destination(int64_t i) const { return data + row(i) * columns; }
  void done(int64_t) const {}
  void put(int64_t i, const T* gradient, acc_t<T> factor) const {
    for_each_vector<T>(columns, [&, out = destination(i)](int64_t j, int64_t n) {
      store_vector(out + j, load_vector(gradient + j, n) * Vec<T>(factor), n);
    });
  }
};

// Zeros, in huge pages where there are many: a system that clears them 4 KiB at a time takes longer over a large
// gradient than all else of a training step (152 MB, step of SGD included: 41 ms, with huge pages 18; a copy takes 4).
// Beyond what malloc keeps for itself, memory comes from the system, as zeros that take up nothing until they are
// written: then only pages with rows in use cost anything.
Tensor lazy_zeros(at::IntArrayRef sizes, const at::TensorOptions& options) {
  constexpr size_t kLarge = size_t(32) << 20, kAlign = 64;
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (bytes < kLarge) {
    Tensor zeros = at::empty(sizes, options);
    advise_huge_pages(zeros.mutable_data_ptr(), bytes);
    return zeros.zero_();
  }
  void* memory = std::calloc(bytes + kAlign, 1);
  TORCH_CHECK(memory != nullptr, "embedding_bag_backward: no memory for a gradient of ", bytes, " bytes");
  advise_huge_pages(memory, bytes);
  const auto aligned = (reinterpret_cast<uintptr_t>(memory) + kAlign - 1) / kAlign * kAlign;
  return at::from_blob(reinterpret_cast<void*>(aligned), sizes, [memory](void*) { std::free(memory); }, options);
}

Tensor embedding_bag_backward(const Tensor& grad, int64_t num_embeddings, const Tensor& indices,
                              const OptionalTensor& offsets, const OptionalTensor& per_sample_weights,
                              const Tensor& aux, c10::string_view mode, int64_t padding_idx, bool include_last_offset,
                              bool scale_grad_by_freq) {
  const Gradient gradient("embedding_bag_backward", grad, num_embeddings, indices, offsets, per_sample_weights, aux,
                          mode, padding_idx, include_last_offset, scale_grad_by_freq);
  const Tensor dweight = lazy_zeros({num_embeddings, grad.size(1)}, grad.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "embedding_bag_backward", [&] {
    const auto row = [&](int64_t i) { return gradient.sorted.row(i); };
    const Written<scalar_t, decltype(row)> rows(dweight, gradient.sorted.rows(), row);
    gradient.for_each_row<scalar_t>([&] { return rows; });
  });
  return dweight;
}

std::tuple<Tensor, Tensor> embedding_bag_sparse_backward(const Tensor& grad, int64_t num_embeddings,
                                                         const Tensor& indices, const OptionalTensor& offsets,
                                                         const OptionalTensor& per_sample_weights, const Tensor& aux,
                                                         c10::string_view mode, int64_t padding_idx,
                                                         bool include_last_offset, bool scale_grad_by_freq) {
  const Gradient gradient("embedding_bag_sparse_backward", grad, num_embeddings, indices, offsets, per_sample_weights,
                          aux, mode, padding_idx, include_last_offset, scale_grad_by_freq);
  const SortedUses& sorted = gradient.sorted;
  const Tensor rows = at::empty({sorted.rows()}, grad.options().dtype(at::kLong));
  const Tensor values = at::empty({sorted.rows(), grad.size(1)}, grad.options());
  int64_t* row_data = rows.mutable_data_ptr<int64_t>();
  std::copy_n(sorted.rows_begin(), sorted.rows(), row_data);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "embedding_bag_backward", [&] {
    const auto row = [](int64_t i) { return i; };
    const Written<scalar_t, decltype(row)> written(values, sorted.rows(), row);
    gradient.for_each_row<scalar_t>([&] { return written; });
  });
  return {rows, values};
}

// A step of an optimizer, row by row.
template <typename T>
struct Step {
  using scalar = acc_t<T>;
  using V = Vec<T>;

  const SortedUses& sorted;
  const Rule rule;
  T* table;
  scalar *first, *second;  // the optimizer's states, or nullptr
  const UpdateSettings<scalar> settings;
  const int64_t columns;
  std::vector<scalar> sum;  // of a row's gradients

  NLPKERNELS_INLINE void begin(int64_t i) const {
    if (i % kTogether != 0) return;
    for (int64_t k = i + kAhead; k < std::min(i + kAhead + kTogether, sorted.rows()); ++k) prefetch(sorted.row(k));
  }
  scalar* destination(int64_t) { return sum.data(); }
  void done(int64_t i) const { put(i, sum.data(), 1); }

  // The step of a row whose gradient is this times the factor.
  template <typename G>
  void put(int64_t i, const G* gradient, scalar factor) const {
    const int64_t row = sorted.row(i);
    if (rule == Rule::sgd) return change_row<Sgd>(row, gradient, factor, settings);
    if (rule == Rule::adagrad) return change_row<Adagrad>(row, gradient, factor, settings);
    if (rule == Rule::adam) return change_row<Adam>(row, gradient, factor, settings);
    scalar squares = 0;
    for (int64_t j = 0; j < columns; ++j) {
      const scalar g = static_cast<scalar>(gradient[j]) * factor;
      squares += g * g;
    }
    UpdateSettings<scalar> of_row = settings;
    of_row.rate = RowwiseAdagrad::rate(settings, squares / static_cast<scalar>(columns), first[row]);
    change_row<Sgd>(row, gradient, factor, of_row);
  }

 private:
  NLPKERNELS_INLINE void prefetch(int64_t row) const {
    prefetch_row_to_write(table + row * columns, columns);
    if (rule == Rule::rowwise_adagrad) prefetch_row_to_write(first + row, 1);
    if (rule == Rule::adagrad || rule == Rule::adam) prefetch_row_to_write(first + row * columns, columns);
    if (rule == Rule::adam) prefetch_row_to_write(second + row * columns, columns);
  }

  template <typename Update, typename G>
  void change_row(int64_t row, const G* gradient, scalar factor, const UpdateSettings<scalar>& given) const {
    const UpdateSettings<V> numbers{V(given.rate), V(given.eps), V(given.rest1), V(given.rest2)};
    T* w = table + row * columns;
    scalar *state_of_row = nullptr, *squares_of_row = nullptr;
    if constexpr (Update::states > 0) state_of_row = first + row * columns;
    if constexpr (Update::states > 1) squares_of_row = second + row * columns;
    for_each_vector<T>(columns, [=](int64_t j, int64_t n) {
      V state(0), squares(0);
      if constexpr (Update::states > 0) state = load_vector(state_of_row + j, n);
      if constexpr (Update::states > 1) squares = load_vector(squares_of_row + j, n);
      const V g = load_vector(gradient + j, n) * V(factor);
      const V change = Update::change(numbers, g, state, squares);
      if constexpr (Update::states > 0) store_vector(state_of_row + j, state, n);
      if constexpr (Update::states > 1) store_vector(squares_of_row + j, squares, n);
      store_vector(w + j, load_vector(w + j, n) - change, n);
    });
  }
};

void embedding_bag_update(const Tensor& grad, const Tensor& weight, const OptionalTensor& first,
                          const OptionalTensor& second, const Tensor& indices, const OptionalTensor& offsets,
                          const OptionalTensor& per_sample_weights, const Tensor& aux, c10::string_view mode,
                          int64_t padding_idx, bool include_last_offset, bool scale_grad_by_freq,
                          c10::string_view rule_name, at::ArrayRef<double> settings) {
  const char* op = "embedding_bag_update";
  const Rule rule = parse_rule(rule_name);
  check_embedding_bag_update(op, weight, grad, first, second, rule, settings);
  const Gradient gradient(op, grad, weight.size(0), indices, offsets, per_sample_weights, aux, mode, padding_idx,
                          include_last_offset, scale_grad_by_freq);
  // Everything has been checked: from here on tensors change.
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight.scalar_type(), "embedding_bag_update", [&] {
    using scalar = acc_t<scalar_t>;
    const UpdateSettings<scalar> numbers = update_settings<scalar>(settings);
    const auto data = [](const OptionalTensor& state) { return state ? state->mutable_data_ptr<scalar>() : nullptr; };
    scalar_t* table = weight.mutable_data_ptr<scalar_t>();
    scalar *first_data = data(first), *second_data = data(second);
    gradient.for_each_row<scalar_t>([&] {
      const int64_t columns = weight.size(1);
      return Step<scalar_t>{gradient.sorted, rule,    table,   first_data,
                            second_data,     numbers, columns, std::vector<scalar>(columns)};
    });
  });
}

Tensor embedding_bag_per_sample_backward(const Tensor& grad, const Tensor& weight, const Tensor& indices,
                                         const OptionalTensor& offsets, int64_t padding_idx, bool include_last_offset) {
  const char* op = "embedding_bag_per_sample_backward";
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": expected 2-D weight, got ", weight.sizes());
  check_embedding_bag(op, weight, indices, offsets, std::nullopt, Mode::sum, include_last_offset);
  const Bags bags(op, indices, offsets, include_last_offset);
  check_shape(op, "grad", grad, {bags.count(), weight.size(1)});
  check_like(op, "grad", grad, "weight", weight);
  const Tensor table = weight.contiguous(), grad_rows = grad.contiguous(), ids = indices.contiguous();
  const Tensor out = at::zeros(indices.sizes(), weight.options());
  const int64_t columns = weight.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight.scalar_type(), "embedding_bag_backward", [&] {
    AT_DISPATCH_INDEX_TYPES(indices.scalar_type(), "embedding_bag_backward", [&] {
      const Indices<index_t> checked(op, ids, weight.size(0));
      const scalar_t* table_data = table.const_data_ptr<scalar_t>();
      const scalar_t* grad_data = grad_rows.const_data_ptr<scalar_t>();
      scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
      using V = Vec<scalar_t>;
      at::parallel_for(0, bags.count(), grain(columns), [&](int64_t first, int64_t last) {
        for (const auto bag : c10::irange(first, last)) {
          for (const auto i : c10::irange(bags.begin(bag), bags.end(bag))) {
            const int64_t row = checked[i];
            if (row == padding_idx) continue;
            V sum(0);
            acc_t<scalar_t> rest = 0;
            int64_t j = 0;
            for (; j + V::size() <= columns; j += V::size()) {
              sum = at::vec::fmadd(load_vector(grad_data + bag * columns + j),
                                   load_vector(table_data + row * columns + j), sum);
            }
            for (; j < columns; ++j) {
              rest += static_cast<acc_t<scalar_t>>(grad_data[bag * columns + j]) *
                      static_cast<acc_t<scalar_t>>(table_data[row * columns + j]);
            }
            alignas(64) acc_t<scalar_t> lanes[V::size()];
            sum.store(lanes);
            for (const auto lane : lanes) rest += lane;
            out_data[i] = static_cast<scalar_t>(rest);
          }
        }
      });
    });
  });
  return out;
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels

TORCH_LIBRARY_IMPL(nlpkernels, CPU, m) {
  m.impl("embedding_bag", TORCH_FN(nlpkernels::embedding_bag));
  m.impl("embedding_bag_backward", TORCH_FN(nlpkernels::embedding_bag_backward));
  m.impl("embedding_bag_sparse_backward", TORCH_FN(nlpkernels::embedding_bag_sparse_backward));
  m.impl("embedding_bag_update", TORCH_FN(nlpkernels::embedding_bag_update));
  m.impl("embedding_bag_per_sample_backward", TORCH_FN(nlpkernels::embedding_bag_per_sample_backward));
}
