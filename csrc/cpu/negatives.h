// Rows that a sampled loss holds against its targets.
//
// Places on a line of length 2^kBits belong to rows, to each as many as it is probable: those before cumulative[row]
// and not before cumulative[row - 1]. A place is drawn from what is left of the line without the target's part, and the
// row that has it looked up: guide[i] is the row of the first place of the i-th of guide.size() equal parts (Chen and
// Asau, 1974), from which it is two steps on average, however the rows are distributed. The n-th number of a stream is
// a function of the seed and n (splitmix64; Steele et al., 2014), so that threads need not wait for each other.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>

#include "../checks.h"
#include "bags.h"
#include "threads.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

constexpr int kBits = 53;  // what a double holds
constexpr int kSteps = 3;

inline uint64_t number_of_stream(uint64_t seed, uint64_t n) {
  uint64_t x = seed + (n + 1) * 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

inline Tensor draw_negatives(const Tensor& seed, const Tensor& cumulative, const Tensor& guide, const Tensor& targets,
                             int64_t number) {
  threads_of_call();
  const char* op = "draw_negatives";
  for (const auto& [name, tensor, dim] : {std::tuple<const char*, const Tensor&, int64_t>{"seed", seed, 0},
                                          {"cumulative", cumulative, 1},
                                          {"guide", guide, 1},
                                          {"targets", targets, 1}}) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong, op, ": expected ", name, " of dtype int64, got ",
                     tensor.scalar_type());
    TORCH_CHECK(tensor.is_cpu(), op, ": expected ", name, " on the CPU, got ", tensor.device());
    TORCH_CHECK_VALUE(tensor.dim() == dim, op, ": expected ", dim, "-D ", name, ", got ", tensor.sizes());
    check_storage(op, name, tensor);
  }
  const int64_t rows = cumulative.numel(), parts = guide.numel(), count = targets.numel();
  TORCH_CHECK_VALUE(number >= 0, op, ": expected number of 0 or more, got ", number);
  TORCH_CHECK_VALUE(parts > 0 && (parts & (parts - 1)) == 0 && parts <= int64_t(1) << 40, op,
                    ": expected guide of a power of two of parts, got ", parts);
  check_product(op, "targets and number", {count, number});
  const Tensor line = cumulative.contiguous(), first_rows = guide.contiguous(), all = targets.contiguous();
  const Tensor out = at::empty({count, number}, targets.options());
  const int64_t *ends = line.const_data_ptr<int64_t>(), *first_row = first_rows.const_data_ptr<int64_t>(),
                *target = all.const_data_ptr<int64_t>();
  const auto start_of_stream = static_cast<uint64_t>(seed.item<int64_t>());
  const int shift = kBits - __builtin_ctzll(static_cast<uint64_t>(parts));
  int64_t* drawn = out.mutable_data_ptr<int64_t>();
  at::parallel_for(
      0, count, std::max<int64_t>(1, 2048 / std::max<int64_t>(1, number)), [&](int64_t begin, int64_t end) {
        for (const auto b : c10::irange(begin, end)) {
          const int64_t row = target[b];
          TORCH_CHECK_INDEX(row >= -1 && row < rows, op, ": targets[", b, "] is ", row, ", expected a row from 0 to ",
                            rows - 1, " of a table of ", rows, ", or -1");
          // Sizes are compared before one is subtracted from another: they are the caller's.
          const int64_t all_places = rows == 0 ? 0 : ends[rows - 1], excluded = row > 0 ? ends[row - 1] : 0,
                        end_of_target = row < 0 ? excluded : ends[row];
          const bool is_line = 0 <= excluded && excluded <= end_of_target && end_of_target <= all_places &&
                               all_places <= int64_t(1) << kBits;
          const int64_t width = is_line ? end_of_target - excluded : 0, left = is_line ? all_places - width : 0;
          TORCH_CHECK_VALUE(number == 0 || left > 0, op, ": no row but target ", row,
                            " has a probability, or cumulative does not rise to 2^", kBits);
          for (const auto k : c10::irange(number)) {
            const uint64_t random = number_of_stream(start_of_stream, static_cast<uint64_t>(b * number + k));
            const auto place =
                static_cast<int64_t>(static_cast<double>(random >> (64 - kBits)) * 0x1p-53 * static_cast<double>(left));
            drawn[b * number + k] = row >= 0 && place >= excluded ? place + width : place;
          }
        }
        // The row of each place. How far it is from the guide's is chance, which no branch foresees: a few steps are
        // made in any case, and stand still where the row has been found.
        for (const auto i : c10::irange(begin * number, end * number)) {
          const int64_t place = drawn[i];
          int64_t found = first_row[std::min(std::max<int64_t>(place >> shift, 0), parts - 1)];
          found = std::min(std::max<int64_t>(found, 0), rows - 1);
          for (int step = 0; step < kSteps; ++step) found += (found + 1 < rows) & (ends[found] <= place);
          while (found + 1 < rows && ends[found] <= place) ++found;
          drawn[i] = found;
        }
      });
  return out;
}

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
