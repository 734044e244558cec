// What the kernels of embedding bags read: bags, indices that are checked as they are read, and rows asked for ahead.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstdint>
#include <string>

#include "../checks.h"
#include "vector.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

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
    // A copy, as what has been checked must stay: the caller's threads may write to their tensor.
    starts_ = offsets->to(at::kLong, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
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

 private:
  int64_t count_ = 0, length_ = 0, given_ = 0, end_ = 0;
  Tensor starts_;
  const int64_t* data_ = nullptr;
};

// Indices as kernels read them: int64, contiguous. (To read int32 as they are, all loops would be compiled once more,
// or take a tenth longer by a question for each.)
inline Tensor readable(const Tensor& indices) { return indices.to(at::kLong).contiguous(); }

// Readable indices, of a table of so many rows; every index is checked as it is read, as the caller's memory may change
// at any moment. To be copied into a loop: what stands in a copy stays in registers.
class Indices {
 public:
  Indices(const char* op, const Tensor& indices, int64_t rows, bool is_lookup)
      : op_(op),
        data_(indices.const_data_ptr<int64_t>()),
        rows_(rows),
        count_(indices.numel()),
        columns_(is_lookup || indices.dim() != 2 ? 0 : indices.size(1)),
        is_lookup_(is_lookup) {
    static const Ahead ahead = Ahead::of_this_processor();
    ahead_ = ahead;
  }

  const char* op() const { return op_; }

  NLPKERNELS_INLINE int64_t operator[](int64_t position) const {
    const int64_t index = data_[position];
    if (C10_UNLIKELY(index < 0 || index >= rows_)) fail(position, index);
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
  [[noreturn]] void fail(int64_t position, int64_t index) const {
    // What is left of a lookup's indices, whatever shape they had, is one column.
    const std::string where =
        is_lookup_      ? "flattened indices[" + std::to_string(position)
        : columns_ == 0 ? "indices[" + std::to_string(position)
                        : "indices[" + std::to_string(position / columns_) + "][" + std::to_string(position % columns_);
    TORCH_CHECK_INDEX(false, op_, ": ", where, "] is ", index, ", expected a row from 0 to ", rows_ - 1,
                      " of a table of ", rows_);
  }

  const char* op_;
  const int64_t* data_;
  int64_t rows_, count_, columns_;
  bool is_lookup_;
  Ahead ahead_;
};

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
