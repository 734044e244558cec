// Embedding-bag pooling on the CPU, forward and backward.
//
// Forward: a thread takes whole bags. It reads a bag's indices once to check and count them, then adds the rows up,
// kBlock vectors of columns at a time, in registers.
//
// Backward: positions are sorted by row (radix sort, as many bits as the table needs), and a thread takes whole rows.
// Every gradient row is written once, by one thread, its terms added in the order of the indices: no atomics, and the
// same bits for any number of threads. The sorted rows are the coalesced sparse gradient as they are.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "vector.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {
namespace {

// Vectors of columns that are added up together.
constexpr int kBlock = 8;
// Values that a thread takes at least.
constexpr int64_t kGrain = 1 << 14;

// Rows of a table worth one thread's while, when each is `size` values.
int64_t grain(int64_t size) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size)); }

// Where each bag begins and ends in the flattened indices.
class Bags {
 public:
  Bags(const char* op, const Tensor& indices, const OptionalTensor& offsets, bool include_last_offset) {
    if (!offsets) {
      count_ = indices.size(0);
      length_ = indices.size(1);
      return;
    }
    const int64_t given = offsets->numel(), end = indices.numel();
    const Tensor starts = offsets->to(at::kLong).contiguous();
    begin_.assign(starts.const_data_ptr<int64_t>(), starts.const_data_ptr<int64_t>() + given);
    if (!include_last_offset) begin_.push_back(end);
    count_ = static_cast<int64_t>(begin_.size()) - 1;
    TORCH_CHECK_VALUE(begin_[0] == 0 || given == 0, op, ": expected offsets[0] to be 0, got ", begin_[0]);
    for (const auto i : c10::irange(given)) {
      const int64_t least = i == 0 ? 0 : begin_[i - 1];
      TORCH_CHECK_VALUE(begin_[i] >= least && begin_[i] <= end, op, ": expected offsets[", i, "] between ", least,
                        " (the offset before it) and ", end, " (the number of indices), got ", begin_[i]);
    }
  }

  int64_t count() const { return count_; }
  int64_t begin(int64_t bag) const { return begin_.empty() ? bag * length_ : begin_[bag]; }
  int64_t end(int64_t bag) const { return begin_.empty() ? (bag + 1) * length_ : begin_[bag + 1]; }

 private:
  int64_t count_ = 0, length_ = 0;
  std::vector<int64_t> begin_;
};

// indices as the caller wrote them, flattened; every index is checked before it is used.
template <typename index_t>
class Indices {
 public:
  Indices(const char* op, const Tensor& indices, int64_t rows)
      : op_(op), tensor_(indices.contiguous()), data_(tensor_.const_data_ptr<index_t>()), rows_(rows) {}

  int64_t operator[](int64_t position) const {
    const int64_t index = data_[position];
    if (C10_UNLIKELY(index < 0 || index >= rows_)) fail(position);
    return index;
  }

 private:
  [[noreturn]] void fail(int64_t position) const {
    const int64_t columns = tensor_.dim() == 2 ? tensor_.size(1) : 0;
    const std::string where = columns == 0
                                  ? std::to_string(position)
                                  : std::to_string(position / columns) + "][" + std::to_string(position % columns);
    TORCH_CHECK_INDEX(false, op_, ": indices[", where, "] is ", data_[position], ", expected a row from 0 to ",
                      rows_ - 1, " of a table of ", rows_);
  }

  const char* op_;
  const Tensor tensor_;
  const index_t* data_;
  const int64_t rows_;
};

// out[0 .. columns) = sum over terms of scale * row, then `finish`; next(i) is {row, scale}.
template <typename T, typename Out, typename Next, typename Finish>
void add_rows(Out* out, int64_t columns, int64_t terms, const Next& next, const Finish& finish) {
  constexpr int64_t vector = Vec<T>::size(), block = kBlock * vector;
  int64_t begin = 0;
  for (; begin + block <= columns; begin += block) {
    Vec<T> sum[kBlock];
#pragma GCC unroll 8
    for (int v = 0; v < kBlock; ++v) sum[v] = Vec<T>(0);
    for (const auto i : c10::irange(terms)) {
      const auto [row, scale] = next(i);
      const Vec<T> factor(scale);
#pragma GCC unroll 8
      for (int v = 0; v < kBlock; ++v) {
        sum[v] = at::vec::fmadd(load_vector(row + begin + v * vector), factor, sum[v]);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kBlock; ++v) store_vector(out + begin + v * vector, finish(sum[v]));
  }
  for (; begin < columns; begin += vector) {
    const int64_t n = std::min(vector, columns - begin);
    Vec<T> sum(0);
    for (const auto i : c10::irange(terms)) {
      const auto [row, scale] = next(i);
      sum = at::vec::fmadd(load_vector(row + begin, n), Vec<T>(scale), sum);
    }
    store_vector(out + begin, finish(sum), n);
  }
}

// Forward ------------------------------------------------------------------------------------------------------------

template <typename T, typename index_t>
void pool(const Tensor& weight, const Indices<index_t>& indices, const Bags& bags,
          const OptionalTensor& per_sample_weights, Mode mode, int64_t padding_idx, const Tensor& out,
          const Tensor& aux) {
  using scalar = acc_t<T>;
  const int64_t columns = weight.size(1);
  const T* table = weight.const_data_ptr<T>();
  const T* factors = per_sample_weights ? per_sample_weights->const_data_ptr<T>() : nullptr;
  T* out_data = out.mutable_data_ptr<T>();
  int64_t* aux_data = aux.mutable_data_ptr<int64_t>();
  const int64_t length = bags.count() == 0 ? 0 : bags.end(bags.count() - 1) / bags.count();

  at::parallel_for(0, bags.count(), grain((length + 1) * columns), [&](int64_t first, int64_t last) {
    std::vector<int64_t> kept;  // positions of one bag, without the padding
    std::vector<scalar> best(mode == Mode::max ? columns : 0);
    for (const auto bag : c10::irange(first, last)) {
      T* out_row = out_data + bag * columns;
      if (mode == Mode::lookup) {
        std::copy_n(table + indices[bags.begin(bag)] * columns, columns, out_row);
        continue;
      }
      kept.clear();
      for (const auto i : c10::irange(bags.begin(bag), bags.end(bag))) {
        if (indices[i] != padding_idx) kept.push_back(i);
      }
      const int64_t count = static_cast<int64_t>(kept.size());
      if (mode == Mode::max) {
        int64_t* winner = aux_data + bag * columns;
        std::fill_n(winner, columns, -1);
        std::fill(best.begin(), best.end(), scalar(0));
        for (const int64_t i : kept) {
          const T* row = table + indices[i] * columns;
          for (const auto j : c10::irange(columns)) {
            const scalar value = static_cast<scalar>(row[j]);
            const bool wins = winner[j] < 0 || value > best[j];
            best[j] = wins ? value : best[j];
            winner[j] = wins ? i : winner[j];
          }
        }
        for (const auto j : c10::irange(columns)) out_row[j] = static_cast<T>(best[j]);
        continue;
      }
      const auto term = [&](int64_t i) {
        return std::pair(table + indices[kept[i]] * columns,
                         factors != nullptr ? static_cast<scalar>(factors[kept[i]]) : scalar(1));
      };
      if (mode == Mode::mean) {
        aux_data[bag] = count;
        const Vec<T> divisor(static_cast<scalar>(std::max<int64_t>(1, count)));
        add_rows<T>(out_row, columns, count, term, [&](const Vec<T>& sum) { return sum / divisor; });
      } else {
        add_rows<T>(out_row, columns, count, term, [](const Vec<T>& sum) { return sum; });
      }
    }
  });
}

std::tuple<Tensor, Tensor> embedding_bag(const Tensor& weight, const Tensor& indices, const OptionalTensor& offsets,
                                         const OptionalTensor& per_sample_weights, c10::string_view mode_name,
                                         int64_t padding_idx, bool include_last_offset, bool /*scale_grad_by_freq*/,
                                         bool /*sparse*/) {
  const char* op = "embedding_bag";
  const Mode mode = parse_mode(mode_name);
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": expected 2-D weight, got ", weight.sizes());
  check_embedding_bag(op, weight, indices, offsets, per_sample_weights, mode, include_last_offset);
  const Bags bags(op, indices, offsets, include_last_offset);
  const Tensor table = weight.contiguous();
  const OptionalTensor factors = contiguous(per_sample_weights);
  const Tensor out = at::empty({bags.count(), weight.size(1)}, weight.options());
  const auto integers = weight.options().dtype(at::kLong);
  const Tensor aux = mode == Mode::mean  ? at::empty({bags.count()}, integers)
                     : mode == Mode::max ? at::empty({bags.count(), weight.size(1)}, integers)
                                         : at::empty({0}, integers);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight.scalar_type(), "embedding_bag", [&] {
    AT_DISPATCH_INDEX_TYPES(indices.scalar_type(), "embedding_bag", [&] {
      pool<scalar_t, index_t>(table, Indices<index_t>(op, indices, weight.size(0)), bags, factors, mode, padding_idx,
                              out, aux);
    });
  });
  return {out, aux};
}

// Backward -----------------------------------------------------------------------------------------------------------

// One use of a row: where it stands in the flattened indices, and in which bag.
struct Use {
  int64_t row, position, bag;
};

// Stable sort by row, kDigit bits at a time.
void sort_by_row(std::vector<Use>& uses, int64_t rows) {
  constexpr int kDigit = 11;
  std::vector<Use> buffer(uses.size());
  for (int shift = 0; (rows - 1) >> shift > 0; shift += kDigit) {
    std::array<size_t, (1 << kDigit) + 1> place{};
    const auto digit = [&](const Use& use) { return (use.row >> shift) & ((1 << kDigit) - 1); };
    for (const Use& use : uses) ++place[digit(use) + 1];
    for (size_t i = 1; i < place.size(); ++i) place[i] += place[i - 1];
    for (const Use& use : uses) buffer[place[digit(use)]++] = use;
    uses.swap(buffer);
  }
}

// All uses of rows, but of the padding's, sorted; start[i] is the first use of the i-th row in use, start.back() the
// end.
struct SortedUses {
  std::vector<Use> uses;
  std::vector<int64_t> start;

  SortedUses(const char* op, const Tensor& indices, const Bags& bags, int64_t rows, int64_t padding_idx) {
    uses.reserve(indices.numel());
    AT_DISPATCH_INDEX_TYPES(indices.scalar_type(), "embedding_bag_backward", [&] {
      const Indices<index_t> checked(op, indices, rows);
      for (const auto bag : c10::irange(bags.count())) {
        for (const auto i : c10::irange(bags.begin(bag), bags.end(bag))) {
          if (const int64_t row = checked[i]; row != padding_idx) uses.push_back({row, i, bag});
        }
      }
    });
    sort_by_row(uses, rows);
    const int64_t count = static_cast<int64_t>(uses.size());
    for (const auto i : c10::irange(count)) {
      if (i == 0 || uses[i].row != uses[i - 1].row) start.push_back(i);
    }
    start.push_back(count);
  }

  int64_t rows() const { return static_cast<int64_t>(start.size()) - 1; }
};

// The gradient of the i-th row in use, to destination(i).
template <typename T, typename Destination>
void add_up_uses(const SortedUses& sorted, const Tensor& grad, const OptionalTensor& per_sample_weights,
                 const Tensor& aux, Mode mode, bool scale_grad_by_freq, const Destination& destination) {
  using scalar = acc_t<T>;
  const int64_t columns = grad.size(1);
  const T* grad_data = grad.const_data_ptr<T>();
  const T* factors = per_sample_weights ? per_sample_weights->const_data_ptr<T>() : nullptr;
  const int64_t* aux_data = aux.const_data_ptr<int64_t>();
  const int64_t average = sorted.rows() == 0 ? 1 : static_cast<int64_t>(sorted.uses.size()) / sorted.rows();
  at::parallel_for(0, sorted.rows(), grain((average + 1) * columns), [&](int64_t first, int64_t last) {
    std::vector<scalar> sum(mode == Mode::max ? columns : 0);
    for (const auto i : c10::irange(first, last)) {
      const Use* uses = sorted.uses.data() + sorted.start[i];
      const int64_t count = sorted.start[i + 1] - sorted.start[i];
      const scalar share = scale_grad_by_freq ? scalar(1) / static_cast<scalar>(count) : scalar(1);
      T* out = destination(i);
      if (mode == Mode::max) {
        std::fill(sum.begin(), sum.end(), scalar(0));
        for (const Use* use = uses; use != uses + count; ++use) {
          const T* row = grad_data + use->bag * columns;
          const int64_t* winner = aux_data + use->bag * columns;
          for (const auto j : c10::irange(columns)) {
            sum[j] += winner[j] == use->position ? static_cast<scalar>(row[j]) : scalar(0);
          }
        }
        for (const auto j : c10::irange(columns)) out[j] = static_cast<T>(sum[j] * share);
        continue;
      }
      const auto term = [&](int64_t k) {
        const Use& use = uses[k];
        scalar scale = share;
        if (mode == Mode::mean) scale /= static_cast<scalar>(aux_data[use.bag]);
        if (factors != nullptr) scale *= static_cast<scalar>(factors[use.position]);
        return std::pair(grad_data + use.bag * columns, scale);
      };
      add_rows<T>(out, columns, count, term, [](const Vec<T>& total) { return total; });
    }
  });
}

// Checks what both forms of the gradient take, and calls body(bags, grad, per_sample_weights, aux), made contiguous.
template <typename Body>
void with_backward_arguments(const char* op, const Tensor& grad, int64_t num_embeddings, const Tensor& indices,
                             const OptionalTensor& offsets, const OptionalTensor& per_sample_weights, const Tensor& aux,
                             Mode mode, bool include_last_offset, const Body& body) {
  TORCH_CHECK_VALUE(num_embeddings >= 0, op, ": expected num_embeddings of 0 or more, got ", num_embeddings);
  check_embedding_bag(op, grad, indices, offsets, per_sample_weights, mode, include_last_offset);
  const Bags bags(op, indices, offsets, include_last_offset);
  check_embedding_bag_backward(op, grad, bags.count(), aux, mode);
  body(bags, grad.contiguous(), contiguous(per_sample_weights), aux.contiguous());
}

Tensor embedding_bag_backward(const Tensor& grad, int64_t num_embeddings, const Tensor& indices,
                              const OptionalTensor& offsets, const OptionalTensor& per_sample_weights,
                              const Tensor& aux, c10::string_view mode_name, int64_t padding_idx,
                              bool include_last_offset, bool scale_grad_by_freq) {
  const char* op = "embedding_bag_backward";
  const Mode mode = parse_mode(mode_name);
  Tensor dweight;
  with_backward_arguments(
      op, grad, num_embeddings, indices, offsets, per_sample_weights, aux, mode, include_last_offset,
      [&](const Bags& bags, const Tensor& grad, const OptionalTensor& factors, const Tensor& aux) {
        const SortedUses sorted(op, indices, bags, num_embeddings, padding_idx);
        dweight = at::zeros({num_embeddings, grad.size(1)}, grad.options());
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "embedding_bag_backward", [&] {
          scalar_t* table = dweight.mutable_data_ptr<scalar_t>();
          add_up_uses<scalar_t>(sorted, grad, factors, aux, mode, scale_grad_by_freq,
                                [&](int64_t i) { return table + sorted.uses[sorted.start[i]].row * grad.size(1); });
        });
      });
  return dweight;
}

std::tuple<Tensor, Tensor> embedding_bag_sparse_backward(const Tensor& grad, int64_t num_embeddings,
                                                         const Tensor& indices, const OptionalTensor& offsets,
                                                         const OptionalTensor& per_sample_weights, const Tensor& aux,
                                                         c10::string_view mode_name, int64_t padding_idx,
                                                         bool include_last_offset, bool scale_grad_by_freq) {
  const char* op = "embedding_bag_sparse_backward";
  const Mode mode = parse_mode(mode_name);
  Tensor rows, values;
  with_backward_arguments(
      op, grad, num_embeddings, indices, offsets, per_sample_weights, aux, mode, include_last_offset,
      [&](const Bags& bags, const Tensor& grad, const OptionalTensor& factors, const Tensor& aux) {
        const SortedUses sorted(op, indices, bags, num_embeddings, padding_idx);
        rows = at::empty({sorted.rows()}, grad.options().dtype(at::kLong));
        values = at::empty({sorted.rows(), grad.size(1)}, grad.options());
        for (const auto i : c10::irange(sorted.rows())) {
          rows.mutable_data_ptr<int64_t>()[i] = sorted.uses[sorted.start[i]].row;
        }
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "embedding_bag_backward", [&] {
          scalar_t* data = values.mutable_data_ptr<scalar_t>();
          add_up_uses<scalar_t>(sorted, grad, factors, aux, mode, scale_grad_by_freq,
                                [&](int64_t i) { return data + i * grad.size(1); });
        });
      });
  return {rows, values};
}

Tensor embedding_bag_per_sample_backward(const Tensor& grad, const Tensor& weight, const Tensor& indices,
                                         const OptionalTensor& offsets, int64_t padding_idx, bool include_last_offset) {
  const char* op = "embedding_bag_per_sample_backward";
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": expected 2-D weight, got ", weight.sizes());
  check_embedding_bag(op, weight, indices, offsets, std::nullopt, Mode::sum, include_last_offset);
  const Bags bags(op, indices, offsets, include_last_offset);
  check_shape(op, "grad", grad, {bags.count(), weight.size(1)});
  check_like(op, "grad", grad, "weight", weight);
  const Tensor table = weight.contiguous(), grad_rows = grad.contiguous();
  const Tensor out = at::zeros(indices.sizes(), weight.options());
  const int64_t columns = weight.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight.scalar_type(), "embedding_bag_backward", [&] {
    AT_DISPATCH_INDEX_TYPES(indices.scalar_type(), "embedding_bag_backward", [&] {
      const Indices<index_t> checked(op, indices, weight.size(0));
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
  m.impl("embedding_bag_per_sample_backward", TORCH_FN(nlpkernels::embedding_bag_per_sample_backward));
}
