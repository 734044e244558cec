// Embedding-bag pooling on the CPU: forward, backward, and backward with the optimizer's step in it.
//
// Forward: a thread takes whole bags, reads each index, checks it, skips it if it is the padding, and adds its row to
// sums that are in registers (row_sum.h): kGroup rows, all their columns or, of wide ones, up to kBlock vectors at a
// time. The error of a sum of n rows thus grows with sqrt(kGroup + n / kGroup). The loop over bags is compiled for
// every number of vectors, so that the next bag's rows are on their way while a short bag's end (12,800 rows of 256
// bytes, in bags of 25: 0.8 of the time). The row that comes some indices later, in whichever bag, is asked for
// (Ahead). Only its first bytes: of rows that are in a cache already, as frequent words' are, every line asked for
// costs time.
//
// Backward: uses are sorted by row (sorted_uses.h), and a thread takes whole rows. Every gradient row is written once,
// by one thread, its terms added in the order of the indices: no atomics, and the same bits for any number of threads.
// The sorted rows are the coalesced sparse gradient as they are, and what an optimizer's step fused into backward
// (embedding_bag_update) goes over: rows of the table are asked for as in the forward pass, but to be written, which
// takes them from the other cores' caches, and kTogether at a time.
//
// Scores (embedding_dot): a thread takes whole bags, and multiplies each row by the bag's vector as it reads it. Their
// gradients are those of bags, in which scores' gradients stand for per_sample_weights.
//
// What a tensor of the caller's is changed by comes last: all that can fail, memory for the threads included, is
// before.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "bags.h"
#include "kept_memory.h"
#include "memory.h"
#include "negatives.h"
#include "row_sum.h"
#include "sorted_uses.h"
#include "threads.h"
#include "vector.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {
namespace {

// How many rows ahead a row is asked for to be written, and how many are asked for together.
constexpr int64_t kAhead = 32, kTogether = 16;
// A gradient of more bytes is taken not to be in a cache: its rows are asked for so many bytes before they are written.
constexpr int64_t kCached = 12 << 20, kBytesAhead = 12 << 10;
// Values that a thread takes at least.
constexpr int64_t kGrain = 1 << 14;

// Rows of a table worth one thread's while, when each is `size` values.
int64_t grain(int64_t size) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size)); }

// Forward ------------------------------------------------------------------------------------------------------------

// By whole vectors where it is short, the last of which may overlap the one before: a call of memcpy takes a good part
// of the time.
template <typename T>
NLPKERNELS_INLINE void copy_row(const T* from, int64_t columns, T* to) {
  using V = Vectorized<float>;
  constexpr int64_t size = sizeof(V), most = 1024;
  const int64_t bytes = columns * sizeof(T);
  const char* source = reinterpret_cast<const char*>(from);
  char* target = reinterpret_cast<char*>(to);
  if (bytes < size || bytes > most) {
    std::copy_n(from, columns, to);
    return;
  }
  for (int64_t i = 0; i < bytes - size; i += size) V::loadu(source + i).store(target + i);
  V::loadu(source + bytes - size).store(target + bytes - size);
}

template <bool kWeighted, typename T>
void pool(const Tensor& weight, const Indices& indices, const Bags& bags, const T* factors, Mode mode,
          int64_t padding_idx, const Tensor& out, const Tensor& aux) {
  using scalar = acc_t<T>;
  const int64_t columns = weight.size(1);
  const T none{}, *table = weight.numel() > 0 ? weight.const_data_ptr<T>() : &none;  // a row of no columns counts, too
  T* out_data = out.mutable_data_ptr<T>();
  int64_t* aux_data = aux.mutable_data_ptr<int64_t>();
  const int64_t length = bags.count() == 0 ? 0 : bags.total() / bags.count();

  at::parallel_for(0, bags.count(), grain((length + 1) * columns), [&](int64_t first, int64_t last) {
    if (mode == Mode::lookup) {
      const bool is_far = static_cast<int64_t>(weight.nbytes()) > kCached;
      for (const auto bag : c10::irange(first, last)) {
        if (is_far) indices.prefetch_after(table, columns, bag);
        copy_row(table + indices[bag] * columns, columns, out_data + bag * columns);
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
    std::vector<scalar> scratch(RowSum<T, 0>::scratch_size(columns));
    with_row_sum<T>(columns, scratch.data(), [&](auto sum) {
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
  threads_of_call();  // which notices a fork
  const Mode mode = parse_mode(mode_name);
  const char* op = mode == Mode::lookup ? "embedding" : "embedding_bag";
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": expected 2-D weight, got ", weight.sizes());
  check_embedding_bag(op, weight, indices, offsets, per_sample_weights, mode, include_last_offset);
  const Bags bags(op, indices, offsets, include_last_offset);
  const Tensor table = weight.contiguous(), ids = readable(indices);
  const OptionalTensor factors = contiguous(per_sample_weights);
  const Tensor out = at::empty({bags.count(), weight.size(1)}, weight.options());
  const auto integers = weight.options().dtype(at::kLong);
  const Tensor aux = mode == Mode::mean  ? at::empty({bags.count()}, integers)
                     : mode == Mode::max ? at::empty({bags.count(), weight.size(1)}, integers)
                                         : at::empty({0}, integers);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight.scalar_type(), "embedding_bag", [&] {
    const Indices checked(op, ids, weight.size(0), mode == Mode::lookup);
    if (factors) {
      pool<true>(table, checked, bags, factors->const_data_ptr<scalar_t>(), mode, padding_idx, out, aux);
    } else {
      pool<false, scalar_t>(table, checked, bags, nullptr, mode, padding_idx, out, aux);
    }
  });
  return {out, aux};
}

// Backward -----------------------------------------------------------------------------------------------------------

// What the gradient of weight is made of, checked and contiguous.
struct Gradient {
  const int64_t threads = threads_of_call();
  const Mode mode;
  const bool scale_grad_by_freq;
  const Bags bags;
  const Tensor grad, aux;
  const OptionalTensor factors;
  const SortedUses sorted;

  Gradient(const char* op, const Tensor& grad_, int64_t num_embeddings, const Tensor& indices,
           const OptionalTensor& offsets, const OptionalTensor& per_sample_weights, const Tensor& aux_,
           c10::string_view mode_name, int64_t padding_idx, bool include_last_offset, bool by_freq)
      : mode(parse_mode(mode_name)),
        scale_grad_by_freq(by_freq),
        bags(checked_bags(op, grad_, num_embeddings, indices, offsets, per_sample_weights, aux_, mode,
                          include_last_offset)),
        grad(grad_.contiguous()),
        aux(aux_.contiguous()),
        factors(contiguous(per_sample_weights)),
        sorted(sort(op, indices, num_embeddings, padding_idx)) {}

  // For the i-th row in use, in order: begin(i); then put(i, g, factor) where its gradient is factor * g, or else the
  // gradient to destination(i), and done(i). These are functions of rows_of_share(room for a row's gradient), of which
  // each share of the work has one. Nothing fails once the first of them has been called.
  template <typename T, typename RowsOfShare>
  void for_each_row(const RowsOfShare& rows_of_share) const {
    using scalar = acc_t<T>;
    constexpr int64_t line = 64 / sizeof(scalar);
    const int64_t columns = grad.size(1), work = sorted.work(sorted.rows());
    const int64_t shares = std::clamp<int64_t>((work + grain(columns) - 1) / grain(columns), 1, threads);
    const int64_t room = (RowSum<T, 0>::scratch_size(columns) + line - 1) / line * line;
    const Scratch<scalar> scratch(2 * room * shares);
    std::vector<scalar> share_of_bag(mode == Mode::mean ? bags.count() : 0);
    for (const auto bag : c10::irange(share_of_bag.size())) {
      share_of_bag[bag] = scalar(1) / static_cast<scalar>(aux.const_data_ptr<int64_t>()[bag]);
    }
    at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
      for (const auto share : c10::irange(begin, end)) {
        const Slice rows{sorted.row_from(work * share / shares), sorted.row_from(work * (share + 1) / shares)};
        scalar* own = scratch.data() + 2 * room * share;
        add_rows<T>(rows, rows_of_share(own + room), share_of_bag.data(), own);
      }
    });
  }

 private:
  // The gradients of some rows. share_of_bag is for the mode mean; scratch has room for a row's sum.
  template <typename T, typename Rows>
  void add_rows(Slice slice, Rows rows, const acc_t<T>* share_of_bag, acc_t<T>* scratch) const {
    using scalar = acc_t<T>;
    const int64_t columns = grad.size(1);
    const T* grad_data = grad.const_data_ptr<T>();
    const T* factor_data = factors ? factors->const_data_ptr<T>() : nullptr;
    const SortedUses::Places places = sorted.places();
    const auto share_of_use = [&](int64_t uses) {
      return scale_grad_by_freq ? scalar(1) / static_cast<scalar>(uses) : scalar(1);
    };
    if (mode == Mode::max) {
      const int64_t* winner = aux.const_data_ptr<int64_t>();
      for (int64_t i = slice.begin; i < slice.end; ++i) {
        rows.begin(i);
        auto* out = rows.destination(i);
        std::fill_n(scratch, columns, scalar(0));
        for (const auto use : c10::irange(sorted.start(i), sorted.start(i + 1))) {
          const int64_t bag = places.bag(use), position = places.position(use);
          for (const auto j : c10::irange(columns)) {
            const bool won = winner[bag * columns + j] == position;
            scratch[j] += won ? static_cast<scalar>(grad_data[bag * columns + j]) : scalar(0);
          }
        }
        const scalar share = share_of_use(sorted.start(i + 1) - sorted.start(i));
        for (const auto j : c10::irange(columns))
          out[j] = static_cast<std::decay_t<decltype(*out)>>(scratch[j] * share);
        rows.done(i);
      }
      return;
    }
    const bool is_mean = mode == Mode::mean;
    with_row_sum<T>(columns, scratch, [&](auto sum) {
      for (int64_t i = slice.begin; i < slice.end; ++i) {
        const int64_t begin = sorted.start(i), end = sorted.start(i + 1);
        const scalar share = share_of_use(end - begin);
        const auto term = [=](int64_t use) __attribute__((always_inline)) -> typename decltype(sum)::Term {
          const int64_t bag = places.bag(use);
          scalar scale = share;
          if (is_mean) scale *= share_of_bag[bag];
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
  }

  SortedUses sort(const char* op, const Tensor& indices, int64_t rows, int64_t padding_idx) const {
    const Tensor ids = readable(indices);
    const bool wants_positions = factors.has_value() || mode == Mode::max;
    return {Indices(op, ids, rows, mode == Mode::lookup), bags, rows, padding_idx, wants_positions, threads};
  }

  static Bags checked_bags(const char* op, const Tensor& grad, int64_t num_embeddings, const Tensor& indices,
                           const OptionalTensor& offsets, const OptionalTensor& per_sample_weights, const Tensor& aux,
                           Mode mode, bool include_last_offset) {
    check_embedding_bag(op, grad, indices, offsets, per_sample_weights, mode, include_last_offset);
    Bags bags(op, indices, offsets, include_last_offset);
    check_embedding_bag_backward(op, grad, bags.count(), aux, mode, num_embeddings);
    return bags;
  }
};

// Rows of a gradient to write: the i-th of `count` rows in use is row rows[i], or row i where rows is nullptr. Those of
// a large gradient are asked for some rows ahead: 51,200 random rows of 512 bytes take 0.9 of the time on an Intel
// Xeon.
template <typename T>
struct Written {
  T* data;
  const int64_t* rows;
  int64_t columns, count, ahead = 0;

  Written(const Tensor& gradient, const int64_t* rows_of_gradient, int64_t count_of_rows)
      : data(gradient.mutable_data_ptr<T>()), rows(rows_of_gradient), columns(gradient.size(1)), count(count_of_rows) {
    const int64_t bytes_of_row = std::max<int64_t>(1, columns * sizeof(T));
    if (static_cast<int64_t>(gradient.nbytes()) > kCached) ahead = (kBytesAhead + bytes_of_row - 1) / bytes_of_row;
  }

  NLPKERNELS_INLINE void begin(int64_t i) const {
    if (ahead > 0 && i + ahead < count) prefetch_row_to_write(destination(i + ahead), columns);
  }
  NLPKERNELS_INLINE T* destination(int64_t i) const { return data + (rows != nullptr ? rows[i] : i) * columns; }
  void done(int64_t) const {}
  void put(int64_t i, const T* gradient, acc_t<T> factor) const {
    for_each_vector<T>(columns, [&, out = destination(i)](int64_t j, int64_t n) {
      store_vector(out + j, load_vector(gradient + j, n) * Vec<T>(factor), n);
    });
  }
};

Tensor embedding_bag_backward(const Tensor& grad, int64_t num_embeddings, const Tensor& indices,
                              const OptionalTensor& offsets, const OptionalTensor& per_sample_weights,
                              const Tensor& aux, c10::string_view mode, int64_t padding_idx, bool include_last_offset,
                              bool scale_grad_by_freq) {
  const Gradient gradient("embedding_bag_backward", grad, num_embeddings, indices, offsets, per_sample_weights, aux,
                          mode, padding_idx, include_last_offset, scale_grad_by_freq);
  const Tensor dweight = gradient_zeros({num_embeddings, grad.size(1)}, grad.options(), gradient.threads);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "embedding_bag_backward", [&] {
    const Written<scalar_t> rows(dweight, gradient.sorted.rows_begin(), gradient.sorted.rows());
    gradient.for_each_row<scalar_t>([&](acc_t<scalar_t>*) { return rows; });
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
  std::copy_n(sorted.rows_begin(), sorted.rows(), rows.mutable_data_ptr<int64_t>());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "embedding_bag_backward", [&] {
    const Written<scalar_t> written(values, nullptr, sorted.rows());
    gradient.for_each_row<scalar_t>([&](acc_t<scalar_t>*) { return written; });
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
  scalar* sum;  // of a row's gradients

  NLPKERNELS_INLINE void begin(int64_t i) const {
    if (i % kTogether != 0) return;
    for (int64_t k = i + kAhead; k < std::min(i + kAhead + kTogether, sorted.rows()); ++k) prefetch(sorted.row(k));
  }
  scalar* destination(int64_t) const { return sum; }
  void done(int64_t i) const { put(i, sum, 1); }

  // The step of a row whose gradient is this times the factor. A call: it would be compiled for every number of
  // vectors.
  template <typename G>
  __attribute__((noinline)) void put(int64_t i, const G* gradient, scalar factor) const {
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
  check_embedding_bag_update(op, weight, grad, first, second, rule, settings, per_sample_weights);
  const Gradient gradient(op, grad, weight.size(0), indices, offsets, per_sample_weights, aux, mode, padding_idx,
                          include_last_offset, scale_grad_by_freq);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight.scalar_type(), "embedding_bag_update", [&] {
    using scalar = acc_t<scalar_t>;
    const UpdateSettings<scalar> numbers = update_settings<scalar>(settings);
    const auto data = [](const OptionalTensor& state) { return state ? state->mutable_data_ptr<scalar>() : nullptr; };
    scalar_t* table = weight.mutable_data_ptr<scalar_t>();
    scalar *first_data = data(first), *second_data = data(second);
    gradient.for_each_row<scalar_t>([&](scalar* sum) {
      return Step<scalar_t>{gradient.sorted, rule, table, first_data, second_data, numbers, weight.size(1), sum};
    });
  });
}

// The product of two rows.
template <typename T>
NLPKERNELS_INLINE acc_t<T> dot(const T* a, const T* b, int64_t columns) {
  Vec<T> sum(0);
  for_each_vector<T>(
      columns, [&](int64_t j, int64_t n) { sum = at::vec::fmadd(load_vector(a + j, n), load_vector(b + j, n), sum); });
  return sum_of_lanes(sum);
}

Tensor embedding_dot(const Tensor& h, const Tensor& weight, const Tensor& indices, const OptionalTensor& offsets,
                     int64_t padding_idx, bool include_last_offset, bool /*sparse*/) {
  threads_of_call();
  const char* op = "embedding_dot";
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": expected 2-D weight, got ", weight.sizes());
  check_embedding_bag(op, weight, indices, offsets, std::nullopt, Mode::sum, include_last_offset);
  const Bags bags(op, indices, offsets, include_last_offset);
  check_shape(op, "h", h, {bags.count(), weight.size(1)});
  check_like(op, "h", h, "weight", weight);
  const Tensor table = weight.contiguous(), vectors = h.contiguous(), ids = readable(indices);
  const Tensor out = at::zeros(indices.sizes(), weight.options());
  const int64_t columns = weight.size(1);
  const int64_t rows_of_bag = bags.count() == 0 ? 0 : (bags.total() + bags.count() - 1) / bags.count();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight.scalar_type(), "embedding_dot", [&] {
    const Indices checked(op, ids, weight.size(0), false);
    const scalar_t* table_data = table.const_data_ptr<scalar_t>();
    const scalar_t* vector_data = vectors.const_data_ptr<scalar_t>();
    scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, bags.count(), grain(rows_of_bag * columns), [&](int64_t first, int64_t last) {
      const Indices own = checked;
      for (const auto bag : c10::irange(first, last)) {
        for (const auto i : c10::irange(bags.begin(bag), bags.end(bag))) {
          own.prefetch_after(table_data, columns, i);
          const int64_t row = own[i];
          if (row == padding_idx) continue;
          out_data[i] = static_cast<scalar_t>(dot(vector_data + bag * columns, table_data + row * columns, columns));
        }
      }
    });
  });
  return out;
}

void keep_memory(int64_t bytes, bool is_new) {
  TORCH_CHECK_VALUE(bytes >= 0, "_keep_memory: expected bytes >= 0, got ", bytes);
  KeptMemory::count_table(bytes, is_new);
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels

TORCH_LIBRARY_IMPL(nlpkernels, CPU, m) {
  m.impl("embedding_bag", TORCH_FN(nlpkernels::embedding_bag));
  m.impl("embedding_bag_backward", TORCH_FN(nlpkernels::embedding_bag_backward));
  m.impl("embedding_bag_sparse_backward", TORCH_FN(nlpkernels::embedding_bag_sparse_backward));
  m.impl("embedding_bag_update", TORCH_FN(nlpkernels::embedding_bag_update));
  m.impl("embedding_dot", TORCH_FN(nlpkernels::embedding_dot));
  m.impl("draw_negatives", TORCH_FN(nlpkernels::draw_negatives));
}

TORCH_LIBRARY_IMPL(nlpkernels, CompositeExplicitAutograd, m) {
  m.impl("_keep_memory", TORCH_FN(nlpkernels::keep_memory));
}
