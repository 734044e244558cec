// Embedding-bag pooling on CUDA: forward, backward, and backward with the optimizer's step in it.
//
// Forward: a group of threads (common.cuh) takes one bag, or one row of a lookup, and a thread 16 bytes of its columns
// where they are aligned. It has kInFlight rows on their way before it adds the first one up, in float.
//
// Backward: the positions of the indices are sorted by row, stably, with those that count for no bag at the end. A
// group adds up a chunk of them, row by row, in the order of the indices; a row that goes on in the next chunk is left
// in parts, which a second kernel adds up in order. No atomics, the same bits at every run, and a row that everyone
// uses does not keep the others waiting. The sorted rows, numbered, are the coalesced sparse gradient.
//
// Update (embedding_bag_update): the same two kernels, but a row's gradient goes from registers into the optimizer's
// step instead of to memory. One group finishes a row, so that its weights and states are read and written once.
//
// Indices and offsets are checked on the device, by a kernel of its own, before they are used; what is wrong is read as
// if it were not there, so that no kernel leaves a tensor's memory or ends the process. The first that is found is
// written down in memory that the host reads too (Report), and an op raises. NLPKERNELS_CUDA_CHECK says when:
//   later   (the default) at the next call of an op here that finds it written down; nothing waits for the device
//   now     at once: every call waits for the device, unless it is being captured in a CUDA graph
// But for that only the sparse gradient waits, to learn its size, and so cannot be captured. The update looks on the
// device for what its own check has found, and with it changes nothing at all, whenever it is raised.
//
// Letters are those of library.cpp.
#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/cuda/cub.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <string>
#include <tuple>

#include "../checks.h"
#include "../updates.h"
#include "common.cuh"

namespace nlpkernels {
namespace {

// Rows that a thread has asked for before it uses the first.
constexpr int kInFlight = 4;
// Sorted uses of rows that a group adds up.
constexpr int kUses = 32;
// Blocks of the kernels that add up, for each multiprocessor: without a word ptxas takes too few registers, and spills,
// or uses each row before it asks for the next; and of those that have most to keep.
constexpr int kBlocks = 6, kFewBlocks = 4;

// Arguments ----------------------------------------------------------------------------------------------------------

// Where each bag begins and ends in the flattened indices, for kernels; always within them.
struct Bags {
  bool has_offsets;        // else `count` bags of `length`
  const int64_t* offsets;  // [given]; nullptr if that is 0, too
  int64_t given, count, length, total;

  __device__ int64_t offset(int64_t i) const {
    const int64_t value = offsets[i];
    return value < 0 ? 0 : value > total ? total : value;
  }
  __device__ int64_t begin(int64_t bag) const { return has_offsets ? offset(bag) : bag * length; }
  __device__ int64_t end(int64_t bag) const {
    if (!has_offsets) return (bag + 1) * length;
    return bag + 1 < given ? offset(bag + 1) : total;
  }
  // Where the last bag ends.
  __device__ int64_t end() const { return count > 0 ? end(count - 1) : 0; }

  // The bag that holds a position, or -1: the last bag that begins at it or before, the others there being empty.
  __device__ int64_t of(int64_t position) const {
    if (!has_offsets) return position / length;
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (offset(middle) <= position) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low > 0 && position < end(low - 1) ? low - 1 : -1;
  }
};

// Indices and padding, for kernels: the row at a position, or -1 for none.
template <typename index_t>
struct Indices {
  const index_t* data;
  int64_t rows, padding_idx;

  __device__ int64_t operator[](int64_t position) const {
    const int64_t row = data[position];
    return row >= 0 && row < rows && row != padding_idx ? row : -1;
  }
};

__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// A thread for each of `count` positions.
Shape positions(int64_t count) { return {dim3(static_cast<unsigned>(ceil_div(count, kThreads))), dim3(kThreads)}; }

// What was found to be wrong, in page-locked memory of the host that the device can write to; one for each device.
struct Report {
  enum Kind : int { kIndex, kFirstOffset, kOffset };

  volatile int is_taken;  // by the first thread that has something to report
  volatile int is_ready;  // for the host
  Kind kind;
  int64_t position, columns, value, least, most;

  __device__ void take(Kind kind, int64_t position, int64_t columns, int64_t value, int64_t least, int64_t most) {
    if (atomicCAS(const_cast<int*>(&is_taken), 0, 1) != 0) return;
    this->kind = kind;
    this->position = position;
    this->columns = columns;
    this->value = value;
    this->least = least;
    this->most = most;
    __threadfence_system();
    is_ready = 1;
  }

  static Report& of_device(int device) {
    static std::array<Report*, C10_COMPILE_TIME_MAX_GPUS> reports{};
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    Report*& report = reports.at(device);
    if (report == nullptr) {
      void* memory = nullptr;  // until the process ends: a kernel may still be writing to it
      const c10::cuda::CUDAStreamCaptureModeGuard may_be_capturing(cudaStreamCaptureModeRelaxed);
      C10_CUDA_CHECK(cudaHostAlloc(&memory, sizeof(Report), cudaHostAllocPortable));
      report = new (memory) Report{};
    }
    return *report;
  }

  // What was written down is forgotten when it is raised.
  void raise(const char* op) {
    if (is_ready == 0) return;
    std::atomic_thread_fence(std::memory_order_acquire);
    const Report found = *this;
    is_ready = 0;  // before another thread may take it
    is_taken = 0;
    TORCH_CHECK_VALUE(found.kind != kFirstOffset, op, ": expected offsets[0] to be 0, got ", found.value);
    TORCH_CHECK_VALUE(found.kind != kOffset, op, ": expected offsets[", found.position, "] between ", found.least,
                      " (the offset before it) and ", found.most, " (the number of indices), got ", found.value);
    // What is left of a lookup's indices, whatever shape they had, is one column.
    const std::string where = found.columns == 0  ? "indices[" + std::to_string(found.position)
                              : found.columns < 0 ? "flattened indices[" + std::to_string(found.position)
                                                  : "indices[" + std::to_string(found.position / found.columns) + "][" +
                                                        std::to_string(found.position % found.columns);
    TORCH_CHECK_INDEX(false, op, ": ", where, "] is ", found.value, ", expected a row from 0 to ", found.most,
                      " of a table of ", found.most + 1);
  }
};

bool raises_now() {
  const char* given = std::getenv("NLPKERNELS_CUDA_CHECK");
  const std::string when = given != nullptr ? given : "later";
  TORCH_CHECK_VALUE(when == "now" || when == "later", "NLPKERNELS_CUDA_CHECK is '", when, "', expected now or later");
  return when == "now";
}

// columns: of the indices that the caller wrote, 0 if they are 1-D, -1 for a lookup's. is_wrong: [1], 0 before, or
// nullptr.
template <typename index_t>
__global__ void __launch_bounds__(kThreads) check_values(const index_t* indices, const Bags bags, int64_t columns,
                                                         int64_t rows, Report* report, int* is_wrong) {
  const int64_t i = thread_index();
  const auto take = [&](auto... found) {
    if (is_wrong != nullptr) *is_wrong = 1;
    report->take(found...);
  };
  if (i < bags.given) {
    const int64_t least = i == 0 ? 0 : bags.offsets[i - 1], most = i == 0 ? 0 : bags.total, value = bags.offsets[i];
    if (value < least || value > most) {
      take(i == 0 ? Report::kFirstOffset : Report::kOffset, i, int64_t(0), value, least, most);
    }
  }
  if (i < bags.total && i < bags.end() && (indices[i] < 0 || indices[i] >= rows)) {
    take(Report::kIndex, i, columns, static_cast<int64_t>(indices[i]), int64_t(0), rows - 1);
  }
}

// Indices and offsets as the caller wrote them, on their way through the check.
class Input {
 public:
  Input(const char* op, const Tensor& indices, const OptionalTensor& offsets, bool include_last_offset, int64_t rows,
        const OptionalTensor& is_wrong = std::nullopt, bool is_lookup = false)
      : op_(op), report_(Report::of_device(c10::cuda::current_device())), indices_(indices.contiguous()) {
    report_.raise(op);
    bags.total = indices.numel();
    if (offsets) {
      offsets_ = offsets->to(at::kLong).contiguous();
      bags.has_offsets = true;
      bags.offsets = offsets_.const_data_ptr<int64_t>();
      bags.given = offsets_.numel();
      bags.count = bags.given - (include_last_offset ? 1 : 0);
    } else {
      bags.count = indices.size(0);
      bags.length = indices.size(1);
    }
    AT_DISPATCH_INDEX_TYPES(indices.scalar_type(), "embedding_bag", [&] {
      launch(check_values<index_t>, positions(std::max(bags.total, bags.given)), data<index_t>(), bags,
             is_lookup            ? -1
             : indices.dim() == 2 ? indices.size(1)
                                  : 0,
             rows, &report_, is_wrong ? is_wrong->mutable_data_ptr<int>() : nullptr);
    });
  }

  Bags bags{};

  template <typename index_t>
  const index_t* data() const {
    return indices_.const_data_ptr<index_t>();
  }

  at::ScalarType index_type() const { return indices_.scalar_type(); }

  // Once what uses the input is on its way.
  void raise_if_wrong() const {
    if (!raises_now()) return;
    if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) return;
    C10_CUDA_CHECK(cudaStreamSynchronize(c10::cuda::getCurrentCUDAStream()));
    report_.raise(op_);
  }

 private:
  const char* op_;
  Report& report_;
  const Tensor indices_;
  Tensor offsets_;
};

template <typename T>
const T* data(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// Calls body with how many columns a thread takes at once: 16 bytes of them if all rows allow it, else 1.
template <typename T, typename Body>
void dispatch_vector(bool is_aligned, const Body& body) {
  if (is_aligned) {
    body(std::integral_constant<int, kPackOf16Bytes<T>>());
  } else {
    body(std::integral_constant<int, 1>());
  }
}

// Forward ------------------------------------------------------------------------------------------------------------

template <typename T, typename index_t>
struct Pooling {
  const T* table;   // [V, E]
  int64_t columns;  // E
  Indices<index_t> indices;
  Bags bags;
  const T* factors;  // like indices, or nullptr
  T* out;            // [B, E]
  int64_t* aux;      // [B] or [B, E], or nullptr
};

// Rows as they are: bit for bit.
template <typename T, typename index_t, int vector>
__global__ void __launch_bounds__(kThreads) look_up(const Pooling<T, index_t> pooling) {
  const int64_t bag = row_of_thread();
  if (bag >= pooling.bags.count) return;
  const int64_t row = pooling.indices[bag], columns = pooling.columns;
  for (int64_t column = first_column<vector>(); column < columns; column += column_step<vector>()) {
    Pack<T, vector> values{};
    if (row >= 0) values = load_pack<vector>(pooling.table + row * columns + column);
    store_pack(pooling.out + bag * columns + column, values);
  }
}

// The rows at the next kInFlight positions before `end`, or -1.
template <typename index_t>
__device__ __forceinline__ Pack<int64_t, kInFlight> rows_in_flight(const Indices<index_t>& indices, int64_t first,
                                                                   int64_t end) {
  Pack<int64_t, kInFlight> rows;
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) rows.values[i] = first + i < end ? indices[first + i] : -1;
  return rows;
}

template <typename T, typename index_t, int vector, bool is_mean>
__global__ void __launch_bounds__(kThreads, kBlocks) pool_sum(const Pooling<T, index_t> pooling) {
  using scalar = acc_t<T>;
  const int64_t bag = row_of_thread();
  if (bag >= pooling.bags.count) return;
  const int64_t begin = pooling.bags.begin(bag), end = pooling.bags.end(bag), columns = pooling.columns;
  for (int64_t column = first_column<vector>(); column < columns; column += column_step<vector>()) {
    scalar sum[vector];
#pragma unroll
    for (int v = 0; v < vector; ++v) sum[v] = scalar(0);
    int64_t count = 0;
    auto next = rows_in_flight(pooling.indices, begin, end);
    for (int64_t first = begin; first < end; first += kInFlight) {
      const auto rows = next;
      Pack<T, vector> values[kInFlight];
      scalar factor[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        values[i] = {};  // which adds nothing
        factor[i] = scalar(1);
        if (rows.values[i] < 0) continue;
        ++count;
        values[i] = load_pack<vector>(pooling.table + rows.values[i] * columns + column);
        if (!is_mean && pooling.factors != nullptr) factor[i] = static_cast<scalar>(pooling.factors[first + i]);
      }
      next = rows_in_flight(pooling.indices, first + kInFlight, end);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
        for (int v = 0; v < vector; ++v) sum[v] += factor[i] * static_cast<scalar>(values[i].values[v]);
      }
    }
    const scalar divisor = is_mean && count > 0 ? static_cast<scalar>(count) : scalar(1);
    Pack<T, vector> out;
#pragma unroll
    for (int v = 0; v < vector; ++v) out.values[v] = static_cast<T>(sum[v] / divisor);
    store_pack(pooling.out + bag * columns + column, out);
    if (is_mean && column == 0) pooling.aux[bag] = count;
  }
}

// The first of the greatest values wins; NaN wins only where it comes first.
template <typename T, typename index_t, int vector>
__global__ void __launch_bounds__(kThreads, kBlocks) pool_max(const Pooling<T, index_t> pooling) {
  using scalar = acc_t<T>;
  const int64_t bag = row_of_thread();
  if (bag >= pooling.bags.count) return;
  const int64_t begin = pooling.bags.begin(bag), end = pooling.bags.end(bag), columns = pooling.columns;
  for (int64_t column = first_column<vector>(); column < columns; column += column_step<vector>()) {
    scalar best[vector];
    int64_t winner[vector];
#pragma unroll
    for (int v = 0; v < vector; ++v) {
      best[v] = scalar(0);
      winner[v] = -1;
    }
    auto next = rows_in_flight(pooling.indices, begin, end);
    for (int64_t first = begin; first < end; first += kInFlight) {
      const auto rows = next;
      Pack<T, vector> values[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        values[i] = {};
        if (rows.values[i] >= 0) values[i] = load_pack<vector>(pooling.table + rows.values[i] * columns + column);
      }
      next = rows_in_flight(pooling.indices, first + kInFlight, end);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (rows.values[i] < 0) continue;
#pragma unroll
        for (int v = 0; v < vector; ++v) {
          const scalar value = static_cast<scalar>(values[i].values[v]);
          if (winner[v] < 0 || value > best[v]) {
            best[v] = value;
            winner[v] = first + i;
          }
        }
      }
    }
    Pack<T, vector> out;
#pragma unroll
    for (int v = 0; v < vector; ++v) {
      out.values[v] = static_cast<T>(best[v]);
      pooling.aux[bag * columns + column + v] = winner[v];
    }
    store_pack(pooling.out + bag * columns + column, out);
  }
}

template <typename T, typename index_t>
void pool(const Input& input, const Tensor& table, const OptionalTensor& factors, Mode mode, int64_t padding_idx,
          const Tensor& out, const Tensor& aux) {
  const int64_t columns = table.size(1);
  // What is looked up is never padding: no index is -1.
  const int64_t skipped = mode == Mode::lookup ? -1 : padding_idx;
  const Pooling<T, index_t> pooling{table.const_data_ptr<T>(),
                                    columns,
                                    {input.data<index_t>(), table.size(0), skipped},
                                    input.bags,
                                    data<T>(factors),
                                    out.mutable_data_ptr<T>(),
                                    aux.mutable_data_ptr<int64_t>()};
  dispatch_vector<T>(has_aligned_rows<kPackOf16Bytes<T>>(pooling.table, columns), [&](auto size) {
    constexpr int vector = decltype(size)::value;
    const Shape shape = rows_by_columns(pooling.bags.count, columns, vector);
    if (mode == Mode::lookup) launch(look_up<T, index_t, vector>, shape, pooling);
    if (mode == Mode::sum) launch(pool_sum<T, index_t, vector, false>, shape, pooling);
    if (mode == Mode::mean) launch(pool_sum<T, index_t, vector, true>, shape, pooling);
    if (mode == Mode::max) launch(pool_max<T, index_t, vector>, shape, pooling);
  });
}

std::tuple<Tensor, Tensor> embedding_bag(const Tensor& weight, const Tensor& indices, const OptionalTensor& offsets,
                                         const OptionalTensor& per_sample_weights, c10::string_view mode_name,
                                         int64_t padding_idx, bool include_last_offset, bool /*scale_grad_by_freq*/,
                                         bool /*sparse*/) {
  const at::AutoDispatchBelowADInplaceOrView no_derivatives;
  const Mode mode = parse_mode(mode_name);
  const char* op = mode == Mode::lookup ? "embedding" : "embedding_bag";
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": expected 2-D weight, got ", weight.sizes());
  check_embedding_bag(op, weight, indices, offsets, per_sample_weights, mode, include_last_offset);
  const c10::cuda::CUDAGuard device(weight.device());
  const Input input(op, indices, offsets, include_last_offset, weight.size(0), std::nullopt, mode == Mode::lookup);
  const int64_t bags = input.bags.count, columns = weight.size(1);
  const Tensor table = weight.contiguous();
  const OptionalTensor factors = contiguous(per_sample_weights);
  const Tensor out = at::empty({bags, columns}, weight.options());
  const auto integers = weight.options().dtype(at::kLong);
  const Tensor aux = mode == Mode::mean  ? at::empty({bags}, integers)
                     : mode == Mode::max ? at::empty({bags, columns}, integers)
                                         : at::empty({0}, integers);
  if (columns == 0) aux.zero_();  // there is no thread to count
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight.scalar_type(), "embedding_bag", [&] {
    AT_DISPATCH_INDEX_TYPES(indices.scalar_type(), "embedding_bag",
                            [&] { pool<scalar_t, index_t>(input, table, factors, mode, padding_idx, out, aux); });
  });
  input.raise_if_wrong();
  return {out, aux};
}

// Backward -----------------------------------------------------------------------------------------------------------

// keys: the row that each position uses, or `rows` for none; positions: themselves, to be sorted with the keys.
template <typename index_t, typename key_t>
__global__ void __launch_bounds__(kThreads)
    find_uses(const Indices<index_t> indices, const Bags bags, key_t* keys, int32_t* positions) {
  const int64_t position = thread_index();
  if (position >= bags.total) return;
  const int64_t row = bags.of(position) >= 0 ? indices[position] : -1;
  keys[position] = static_cast<key_t>(row >= 0 ? row : indices.rows);
  positions[position] = static_cast<int32_t>(position);
}

// Of each use, in sorted order, its bag and the factor of the bag's gradient in its row's, so that what adds gradients
// up need not go from one to the other. counts: of a mean's bags, or nullptr, as may be factors.
template <typename T>
__global__ void __launch_bounds__(kThreads) weigh_uses(const Bags bags, const int32_t* positions, const int64_t* counts,
                                                       const T* factors, int64_t* bag_of, acc_t<T>* scales) {
  const int64_t i = thread_index();
  if (i >= bags.total) return;
  const int64_t position = positions[i], bag = bags.of(position);
  acc_t<T> scale(1);
  if (counts != nullptr && bag >= 0) scale /= static_cast<acc_t<T>>(counts[bag]);
  if (factors != nullptr) scale *= static_cast<acc_t<T>>(factors[position]);
  bag_of[i] = bag;
  scales[i] = scale;
}

// Whether the i-th of the sorted keys is the first of its row.
template <typename key_t>
__device__ __forceinline__ bool is_first_use(const key_t* keys, int64_t i, int64_t rows) {
  return keys[i] < rows && (i == 0 || keys[i] != keys[i - 1]);
}

// Where the run of keys that begins at `first` ends: in steps that double, then in steps that halve.
template <typename key_t>
__device__ int64_t end_of_run(const key_t* keys, int64_t first, int64_t total) {
  const key_t key = keys[first];
  int64_t low = first, step = 1;  // keys[low] is in the run
  while (low + step < total && keys[low + step] == key) {
    low += step;
    step *= 2;
  }
  int64_t high = low + step < total ? low + step : total;  // keys[high] is not, or there is none
  while (low + 1 < high) {
    const int64_t middle = low + (high - low) / 2;
    if (keys[middle] == key) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return high;
}

template <typename key_t>
__global__ void __launch_bounds__(kThreads)
    mark_first_uses(const key_t* keys, int64_t total, int64_t rows, int64_t* marks) {
  const int64_t i = thread_index();
  if (i < total) marks[i] = is_first_use(keys, i, rows) ? 1 : 0;
}

// numbers: running sums of the marks.
template <typename key_t>
__global__ void __launch_bounds__(kThreads)
    list_rows(const key_t* keys, const int64_t* numbers, int64_t total, int64_t rows, int64_t* out) {
  const int64_t i = thread_index();
  if (i < total && is_first_use(keys, i, rows)) out[numbers[i] - 1] = keys[i];
}

// Sorted uses of rows, and what their gradients are made of.
template <typename T, typename key_t>
struct RowGradients {
  const T* grad;             // [B, E]
  int64_t columns;           // E
  const key_t* keys;         // [total], sorted rows
  const int32_t* positions;  // [total], of the keys before they were sorted
  const int64_t* bag_of;     // [total], of the keys as sorted
  const acc_t<T>* scales;    // [total], likewise
  int64_t total, rows;
  const int64_t* winners;  // [B, E], of max: a bag's position that won
  bool scale_grad_by_freq;
  acc_t<T>* partial;  // [chunks, 2, E]: of the row that came in, and of the one that begins here and goes on

  // Of the gradient of a row whose uses are [first, end).
  __device__ acc_t<T> share(int64_t first, int64_t end) const {
    return scale_grad_by_freq ? acc_t<T>(1) / static_cast<acc_t<T>>(end - first) : acc_t<T>(1);
  }
};

// What is done with a row's gradient g: its group of threads calls take() for columns of it, each thread for its own,
// and complete() when all have been taken. first: the row's first use; spare: [E], the group's to write to; `squares`
// is what take() has added to it.

template <typename T>
struct StoreRows {
  static constexpr bool kHasStates = false;
  const int64_t*
      numbers;  // [total]: a row's place in `out`, plus 1, at its first use; or nullptr: its place is the row
  T* out;       // [V, E] or [R, E]

  __device__ bool is_off() const { return false; }
  __host__ __device__ bool wants_whole_rows() const { return false; }

  template <int vector>
  __device__ void take(int64_t first, int64_t row, int64_t column, int64_t columns, const Pack<acc_t<T>, vector>& g,
                       acc_t<T>* /*spare*/, acc_t<T>& /*squares*/) const {
    const int64_t place = numbers != nullptr ? numbers[first] - 1 : row;
    Pack<T, vector> values;
#pragma unroll
    for (int v = 0; v < vector; ++v) values.values[v] = static_cast<T>(g.values[v]);
    store_pack(out + place * columns + column, values);
  }

  template <int vector>
  __device__ void complete(int64_t /*row*/, int64_t /*columns*/, const acc_t<T>* /*spare*/,
                           acc_t<T> /*squares*/) const {}
};

// The row-wise rule must know all of a row's gradient before it changes the first weight, and keeps it in `spare` until
// then: it wants all columns of a row in one group.
template <typename T>
struct UpdateRows {
  using scalar = acc_t<T>;
  static constexpr bool kHasStates = true;

  const int* is_wrong;  // [1]: whether the indices are
  Rule rule;
  UpdateSettings<scalar> settings;
  T* table;                // [V, E]
  scalar *first, *second;  // [V, E] or [V], or nullptr

  __device__ bool is_off() const { return *is_wrong != 0; }
  __host__ __device__ bool wants_whole_rows() const { return rule == Rule::rowwise_adagrad; }

  template <typename Update, int vector>
  __device__ void change(const UpdateSettings<scalar>& of_row, int64_t at, const Pack<scalar, vector>& g) const {
    auto weights = load_pack<vector>(table + at);
    Pack<scalar, vector> state{}, state_of_squares{};
    if constexpr (Update::states > 0) state = load_pack<vector>(first + at);
    if constexpr (Update::states > 1) state_of_squares = load_pack<vector>(second + at);
#pragma unroll
    for (int v = 0; v < vector; ++v) {
      const scalar change = Update::change(of_row, g.values[v], state.values[v], state_of_squares.values[v]);
      weights.values[v] = static_cast<T>(static_cast<scalar>(weights.values[v]) - change);
    }
    store_pack(table + at, weights);
    if constexpr (Update::states > 0) store_pack(first + at, state);
    if constexpr (Update::states > 1) store_pack(second + at, state_of_squares);
  }

  template <int vector>
  __device__ void take(int64_t /*first*/, int64_t row, int64_t column, int64_t columns, const Pack<scalar, vector>& g,
                       scalar* spare, scalar& squares) const {
    const int64_t at = row * columns + column;
    if (rule == Rule::sgd) return change<Sgd>(settings, at, g);
    if (rule == Rule::adagrad) return change<Adagrad>(settings, at, g);
    if (rule == Rule::adam) return change<Adam>(settings, at, g);
    store_pack(spare + column, g);
#pragma unroll
    for (int v = 0; v < vector; ++v) squares += g.values[v] * g.values[v];
  }

  template <int vector>
  __device__ void complete(int64_t row, int64_t columns, const scalar* spare, scalar squares) const {
    if (rule != Rule::rowwise_adagrad) return;
    squares = sum_of_group(squares);
    UpdateSettings<scalar> of_row = settings;
    if (threadIdx.x == 0) {
      of_row.rate = RowwiseAdagrad::rate(settings, squares / static_cast<scalar>(columns), first[row]);
    }
    of_row.rate = from_first_of_group(of_row.rate);
    for (int64_t column = first_column<vector>(); column < columns; column += column_step<vector>()) {
      change<Sgd>(of_row, row * columns + column, load_pack<vector>(spare + column));
    }
  }
};

// A use of a row, and what it adds to `vector` columns of the row's gradient.
template <typename T, typename key_t, int vector, bool is_max>
struct Use {
  key_t key;
  int32_t position;
  int64_t bag;
  acc_t<T> scale;
  Pack<T, vector> values;
  int64_t winners[is_max ? vector : 1];

  // The i-th use, if it is before `end`; else one of no row.
  __device__ Use(const RowGradients<T, key_t>& work, int64_t i, int64_t end) : Use() {
    key = static_cast<key_t>(work.rows);
    if (i >= end) return;
    key = work.keys[i];
    bag = work.bag_of[i];
    scale = work.scales[i];
    if constexpr (is_max) position = work.positions[i];
  }
  Use() = default;

  __device__ void load(const RowGradients<T, key_t>& work, int64_t column) {
    values = {};
    if (key >= work.rows) return;
    const int64_t at = bag * work.columns + column;
    values = load_pack<vector>(work.grad + at);
    if constexpr (is_max) {
#pragma unroll
      for (int v = 0; v < vector; ++v) winners[v] = work.winners[at + v];
    }
  }

  __device__ void add_to(Pack<acc_t<T>, vector>& sum) const {
#pragma unroll
    for (int v = 0; v < vector; ++v) {
      // A column that another position won adds nothing, not even NaN times nothing.
      if constexpr (is_max) {
        if (winners[v] != position) continue;
      }
      sum.values[v] += scale * static_cast<acc_t<T>>(values.values[v]);
    }
  }
};

// Calls finish(first, behind, row, sum) for the uses [first, behind) of each row among those of [begin, end), the first
// of which is one of a row: what they add up to, in order, in `vector` columns.
template <int vector, bool is_max, typename T, typename key_t, typename Finish>
__device__ __forceinline__ void add_up_runs(const RowGradients<T, key_t>& work, int64_t begin, int64_t end,
                                            int64_t column, const Finish& finish) {
  constexpr int in_flight = is_max ? 2 : kInFlight;  // max reads who won besides
  Pack<acc_t<T>, vector> sum{};
  int64_t first = begin;
  key_t row = work.keys[begin];
  for (int64_t i = begin;; i += in_flight) {
    Use<T, key_t, vector, is_max> uses[in_flight];
#pragma unroll
    for (int j = 0; j < in_flight; ++j) uses[j] = {work, i + j, end};
#pragma unroll
    for (int j = 0; j < in_flight; ++j) uses[j].load(work, column);
#pragma unroll 1  // or there were as many copies of `finish`
    for (int j = 0; j < in_flight; ++j) {
      if (uses[0].key != row) {
        finish(first, i + j, static_cast<int64_t>(row), sum);
        if (uses[0].key >= work.rows) return;
        first = i + j;
        row = uses[0].key;
        sum = {};
      }
      uses[0].add_to(sum);
#pragma unroll
      for (int other = 1; other < in_flight; ++other) uses[other - 1] = uses[other];
    }
  }
}

// A group of threads for each chunk of kUses sorted uses. Rows whose uses all lie in it are done; what it has of those
// before and behind it is left in `partial`.
template <typename T, typename key_t, int vector, bool is_max, typename Finish>
__global__ void __launch_bounds__(kThreads, is_max || Finish::kHasStates ? kFewBlocks : kBlocks)
    add_up_chunks(const RowGradients<T, key_t> work, const Finish finish) {
  using scalar = acc_t<T>;
  if (finish.is_off()) return;
  const int64_t chunk = row_of_thread(), columns = work.columns;
  const int64_t begin = chunk * kUses, end = begin + kUses < work.total ? begin + kUses : work.total;
  if (begin >= end || work.keys[begin] >= work.rows) return;
  const bool came_in = begin > 0 && work.keys[begin - 1] == work.keys[begin];
  const bool goes_on = end < work.total && work.keys[end] == work.keys[end - 1];
  for (int64_t first = begin; first < end && work.keys[first] < work.rows;) {
    // All rows at once, but for who must know all of a row's columns before it is through with them.
    const int64_t behind = finish.wants_whole_rows() ? end_of_run(work.keys, first, end) : end;
    const bool is_partial = (came_in && first == begin) || (goes_on && behind == end);
    scalar squares(0);
    for (int64_t column = first_column<vector>(); column < columns; column += column_step<vector>()) {
      const auto take = [&](int64_t of_first, int64_t of_end, int64_t row, Pack<scalar, vector>& sum) {
        const bool is_first = came_in && of_first == begin;
        scalar* part = work.partial + (chunk * 2 + (is_first ? 0 : 1)) * columns;
        if (is_first || (goes_on && of_end == end)) {
          store_pack(part + column, sum);
          return;
        }
        const scalar share = work.share(of_first, of_end);
#pragma unroll
        for (int v = 0; v < vector; ++v) sum.values[v] *= share;
        finish.template take<vector>(of_first, row, column, columns, sum, part, squares);
      };
      add_up_runs<vector, is_max>(work, first, behind, column, take);
    }
    // Of the parts the second is spare until the last row, should that go on.
    if (finish.wants_whole_rows() && !is_partial) {
      finish.template complete<vector>(work.keys[first], columns, work.partial + (chunk * 2 + 1) * columns, squares);
    }
    first = behind;
  }
}

// Rows whose uses lie in several chunks: the group of the first of them adds up the others' parts, in their order.
template <typename T, typename key_t, int vector, typename Finish>
__global__ void __launch_bounds__(kThreads, kBlocks)
    join_chunks(const RowGradients<T, key_t> work, const Finish finish) {
  using scalar = acc_t<T>;
  if (finish.is_off()) return;
  const int64_t chunk = row_of_thread(), columns = work.columns, begin = chunk * kUses, behind = begin + kUses;
  if (behind >= work.total) return;
  const key_t key = work.keys[behind];
  int64_t first = behind;
  while (first > begin && work.keys[first - 1] == key) --first;
  if (key >= work.rows || first == behind || (first == begin && begin > 0 && work.keys[begin - 1] == key)) return;
  const int64_t end = end_of_run(work.keys, behind, work.total), last = (end - 1) / kUses;
  const scalar share = work.share(first, end);
  scalar *own = work.partial + (chunk * 2 + 1) * columns, squares(0);
  for (int64_t column = first_column<vector>(); column < columns; column += column_step<vector>()) {
    auto sum = load_pack<vector>(own + column);
#pragma unroll 4
    for (int64_t other = chunk + 1; other <= last; ++other) {
      const auto part = load_pack<vector>(work.partial + other * 2 * columns + column);
#pragma unroll
      for (int v = 0; v < vector; ++v) sum.values[v] += part.values[v];
    }
#pragma unroll
    for (int v = 0; v < vector; ++v) sum.values[v] *= share;
    finish.template take<vector>(first, key, column, columns, sum, own, squares);
  }
  finish.template complete<vector>(key, columns, own, squares);
}

// The uses of all rows, sorted by row.
struct SortedUses {
  Tensor keys, positions;  // as in RowGradients
  int64_t total, rows;

  SortedUses(const Input& input, int64_t rows, int64_t padding_idx, at::TensorOptions options)
      : total(input.bags.total), rows(rows) {
    TORCH_CHECK_VALUE(total < std::numeric_limits<int32_t>::max(), "embedding_bag_backward: expected fewer than 2^31 ",
                      "indices on CUDA, got ", total);
    const auto key_dtype = rows < std::numeric_limits<int32_t>::max() ? at::kInt : at::kLong;
    const Tensor unsorted_keys = at::empty({total}, options.dtype(key_dtype));
    const Tensor unsorted_positions = at::empty({total}, options.dtype(at::kInt));
    keys = at::empty_like(unsorted_keys);
    positions = at::empty_like(unsorted_positions);
    if (total == 0) return;
    dispatch_keys(keys, [&](auto key) {
      using key_t = decltype(key);
      AT_DISPATCH_INDEX_TYPES(input.index_type(), "embedding_bag_backward", [&] {
        const Indices<index_t> indices{input.data<index_t>(), rows, padding_idx};
        launch(find_uses<index_t, key_t>, nlpkernels::positions(total), indices, input.bags,
               unsorted_keys.mutable_data_ptr<key_t>(), unsorted_positions.mutable_data_ptr<int32_t>());
      });
      at::cuda::cub::radix_sort_pairs(unsorted_keys.const_data_ptr<key_t>(), keys.mutable_data_ptr<key_t>(),
                                      unsorted_positions.const_data_ptr<int32_t>(),
                                      positions.mutable_data_ptr<int32_t>(), total, /*descending=*/false,
                                      /*begin_bit=*/0, /*end_bit=*/at::cuda::cub::get_num_bits(rows));
    });
  }

  template <typename Body>
  static void dispatch_keys(const Tensor& keys, const Body& body) {
    if (keys.scalar_type() == at::kInt) {
      body(int32_t());
    } else {
      body(int64_t());
    }
  }

  // The place of each row among those in use, plus 1, at its first use.
  Tensor number() const {
    const Tensor marks = at::empty({total}, keys.options().dtype(at::kLong));
    dispatch_keys(keys, [&](auto key) {
      using key_t = decltype(key);
      launch(mark_first_uses<key_t>, nlpkernels::positions(total), keys.const_data_ptr<key_t>(), total, rows,
             marks.mutable_data_ptr<int64_t>());
    });
    return at::cumsum(marks, 0);
  }

  void list(const Tensor& numbers, const Tensor& out) const {
    dispatch_keys(keys, [&](auto key) {
      using key_t = decltype(key);
      launch(list_rows<key_t>, nlpkernels::positions(total), keys.const_data_ptr<key_t>(),
             numbers.const_data_ptr<int64_t>(), total, rows, out.mutable_data_ptr<int64_t>());
    });
  }
};

// What both forms of the gradient take, checked and contiguous.
struct BackwardArguments {
  Mode mode;
  Input input;
  Tensor grad, aux;
  OptionalTensor factors;
  bool scale_grad_by_freq;
  SortedUses uses;

  BackwardArguments(const char* op, const Tensor& grad, int64_t num_embeddings, const Tensor& indices,
                    const OptionalTensor& offsets, const OptionalTensor& per_sample_weights, const Tensor& aux,
                    Mode mode, int64_t padding_idx, bool include_last_offset, bool scale_grad_by_freq,
                    const OptionalTensor& is_wrong = std::nullopt)
      : mode(mode),
        input(op, indices, offsets, include_last_offset, num_embeddings, is_wrong),
        grad(grad.contiguous()),
        aux(aux.contiguous()),
        factors(contiguous(per_sample_weights)),
        scale_grad_by_freq(scale_grad_by_freq),
        uses(input, num_embeddings, padding_idx, grad.options()) {
    check_embedding_bag_backward(op, grad, input.bags.count, aux, mode, num_embeddings);
  }

  // The gradient of each row in use, to its place in `out`.
  void store(const OptionalTensor& numbers, const Tensor& out) const {
    dispatch([&](auto value) {
      using scalar_t = decltype(value);
      add_up<scalar_t>(StoreRows<scalar_t>{data<int64_t>(numbers), out.mutable_data_ptr<scalar_t>()},
                       has_aligned_rows<kPackOf16Bytes<scalar_t>>(out.const_data_ptr<scalar_t>(), grad.size(1)));
    });
  }

  // Calls body(a value of grad's dtype).
  template <typename Body>
  void dispatch(const Body& body) const {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "embedding_bag_backward",
                                    [&] { body(scalar_t()); });
  }

  // finish: StoreRows or UpdateRows; is_aligned: whether it can take 16 bytes of grad's at once.
  template <typename T, typename Finish>
  void add_up(const Finish& finish, bool is_aligned) const {
    const int64_t columns = grad.size(1), chunks = ceil_div(uses.total, kUses);
    const auto wide_options = grad.options().dtype(at::toOpMathType(grad.scalar_type()));
    const Tensor partial = at::empty({chunks, 2, columns}, wide_options);
    const Tensor bag_of = at::empty({uses.total}, grad.options().dtype(at::kLong));
    const Tensor scales = at::empty({uses.total}, wide_options);
    const auto* of_bags = aux.const_data_ptr<int64_t>();
    launch(weigh_uses<T>, positions(uses.total), input.bags, uses.positions.const_data_ptr<int32_t>(),
           mode == Mode::mean ? of_bags : nullptr, data<T>(factors), bag_of.mutable_data_ptr<int64_t>(),
           scales.mutable_data_ptr<acc_t<T>>());
    SortedUses::dispatch_keys(uses.keys, [&](auto key) {
      using key_t = decltype(key);
      RowGradients<T, key_t> work{};
      work.grad = grad.const_data_ptr<T>();
      work.columns = columns;
      work.keys = uses.keys.const_data_ptr<key_t>();
      work.positions = uses.positions.const_data_ptr<int32_t>();
      work.bag_of = bag_of.const_data_ptr<int64_t>();
      work.scales = scales.const_data_ptr<acc_t<T>>();
      work.total = uses.total;
      work.rows = uses.rows;
      work.winners = of_bags;
      work.scale_grad_by_freq = scale_grad_by_freq;
      work.partial = partial.mutable_data_ptr<acc_t<T>>();
      dispatch_vector<T>(is_aligned && has_aligned_rows<kPackOf16Bytes<T>>(work.grad, columns), [&](auto size) {
        constexpr int vector = decltype(size)::value;
        Shape shape = rows_by_columns(chunks, columns, vector);
        if (finish.wants_whole_rows()) shape.grid.y = std::min(shape.grid.y, 1u);
        if (mode == Mode::max) {
          launch(add_up_chunks<T, key_t, vector, true, Finish>, shape, work, finish);
        } else {
          launch(add_up_chunks<T, key_t, vector, false, Finish>, shape, work, finish);
        }
        launch(join_chunks<T, key_t, vector, Finish>, shape, work, finish);
      });
    });
  }
};

// What can be checked before anything is read.
Mode check_backward(const char* op, const Tensor& grad, int64_t num_embeddings, const Tensor& indices,
                    const OptionalTensor& offsets, const OptionalTensor& per_sample_weights, c10::string_view mode_name,
                    bool include_last_offset) {
  const Mode mode = parse_mode(mode_name);
  TORCH_CHECK_VALUE(num_embeddings >= 0, op, ": expected num_embeddings of 0 or more, got ", num_embeddings);
  check_embedding_bag(op, grad, indices, offsets, per_sample_weights, mode, include_last_offset);
  return mode;
}

Tensor embedding_bag_backward(const Tensor& grad, int64_t num_embeddings, const Tensor& indices,
                              const OptionalTensor& offsets, const OptionalTensor& per_sample_weights,
                              const Tensor& aux, c10::string_view mode_name, int64_t padding_idx,
                              bool include_last_offset, bool scale_grad_by_freq) {
  const at::AutoDispatchBelowADInplaceOrView no_derivatives;
  const char* op = "embedding_bag_backward";
  const Mode mode =
      check_backward(op, grad, num_embeddings, indices, offsets, per_sample_weights, mode_name, include_last_offset);
  const c10::cuda::CUDAGuard device(grad.device());
  const BackwardArguments arguments(op, grad, num_embeddings, indices, offsets, per_sample_weights, aux, mode,
                                    padding_idx, include_last_offset, scale_grad_by_freq);
  const Tensor dweight = at::zeros({num_embeddings, grad.size(1)}, grad.options());
  arguments.store(std::nullopt, dweight);
  arguments.input.raise_if_wrong();
  return dweight;
}

std::tuple<Tensor, Tensor> embedding_bag_sparse_backward(const Tensor& grad, int64_t num_embeddings,
                                                         const Tensor& indices, const OptionalTensor& offsets,
                                                         const OptionalTensor& per_sample_weights, const Tensor& aux,
                                                         c10::string_view mode_name, int64_t padding_idx,
                                                         bool include_last_offset, bool scale_grad_by_freq) {
  const at::AutoDispatchBelowADInplaceOrView no_derivatives;
  const char* op = "embedding_bag_sparse_backward";
  const Mode mode =
      check_backward(op, grad, num_embeddings, indices, offsets, per_sample_weights, mode_name, include_last_offset);
  const c10::cuda::CUDAGuard device(grad.device());
  const BackwardArguments arguments(op, grad, num_embeddings, indices, offsets, per_sample_weights, aux, mode,
                                    padding_idx, include_last_offset, scale_grad_by_freq);
  arguments.input.raise_if_wrong();
  const Tensor numbers = arguments.uses.number();
  const int64_t count = numbers.numel() > 0 ? numbers.select(0, -1).item().toLong() : 0;
  const Tensor rows = at::empty({count}, numbers.options());
  const Tensor values = at::empty({count, grad.size(1)}, grad.options());
  arguments.uses.list(numbers, rows);
  arguments.store(numbers, values);
  return {rows, values};
}

void embedding_bag_update(const Tensor& grad, const Tensor& weight, const OptionalTensor& first,
                          const OptionalTensor& second, const Tensor& indices, const OptionalTensor& offsets,
                          const OptionalTensor& per_sample_weights, const Tensor& aux, c10::string_view mode_name,
                          int64_t padding_idx, bool include_last_offset, bool scale_grad_by_freq,
                          c10::string_view rule_name, at::ArrayRef<double> settings) {
  const at::AutoDispatchBelowADInplaceOrView no_derivatives;
  const char* op = "embedding_bag_update";
  const Rule rule = parse_rule(rule_name);
  check_embedding_bag_update(op, weight, grad, first, second, rule, settings, per_sample_weights);
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const Mode mode =
      check_backward(op, grad, rows, indices, offsets, per_sample_weights, mode_name, include_last_offset);
  const c10::cuda::CUDAGuard device(weight.device());
  const Tensor is_wrong = at::zeros({1}, weight.options().dtype(at::kInt));
  const BackwardArguments arguments(op, grad, rows, indices, offsets, per_sample_weights, aux, mode, padding_idx,
                                    include_last_offset, scale_grad_by_freq, is_wrong);
  arguments.dispatch([&](auto value) {
    using scalar_t = decltype(value);
    using scalar = acc_t<scalar_t>;
    constexpr int vector = kPackOf16Bytes<scalar_t>;
    const auto state = [](const OptionalTensor& given) { return given ? given->mutable_data_ptr<scalar>() : nullptr; };
    const UpdateRows<scalar_t> update{
        is_wrong.const_data_ptr<int>(),      rule,         update_settings<scalar>(settings),
        weight.mutable_data_ptr<scalar_t>(), state(first), state(second)};
    const bool is_by_row = rule == Rule::rowwise_adagrad;
    const bool is_aligned = has_aligned_rows<vector>(update.table, columns) &&
                            (is_by_row || has_aligned_rows<vector>(update.first, columns)) &&
                            has_aligned_rows<vector>(update.second, columns);
    arguments.add_up<scalar_t>(update, is_aligned);
  });
  arguments.input.raise_if_wrong();
}

// The product of a bag's vector and the row of one position in it, a warp for each position.
template <typename T, typename index_t>
struct Products {
  const T *vectors, *table;  // [B, E], [V, E]
  int64_t columns;           // E
  Indices<index_t> indices;
  Bags bags;
  T* out;  // [total], zeros
};

template <typename T, typename index_t, int vector>
__global__ void __launch_bounds__(kThreads) multiply_rows(const Products<T, index_t> work) {
  using scalar = acc_t<T>;
  const int64_t position = row_of_thread(), columns = work.columns;
  if (position >= work.bags.total) return;  // all of a warp, as is the next
  const int64_t bag = work.bags.of(position), row = bag >= 0 ? work.indices[position] : -1;
  if (row < 0) return;
  scalar sum(0);
  for (int64_t column = threadIdx.x * vector; column < columns; column += kWarp * vector) {
    const auto a = load_pack<vector>(work.vectors + bag * columns + column);
    const auto b = load_pack<vector>(work.table + row * columns + column);
#pragma unroll
    for (int v = 0; v < vector; ++v) sum += static_cast<scalar>(a.values[v]) * static_cast<scalar>(b.values[v]);
  }
  sum = sum_of_group(sum);
  if (threadIdx.x == 0) work.out[position] = static_cast<T>(sum);
}

Tensor embedding_dot(const Tensor& h, const Tensor& weight, const Tensor& indices, const OptionalTensor& offsets,
                     int64_t padding_idx, bool include_last_offset, bool /*sparse*/) {
  const at::AutoDispatchBelowADInplaceOrView no_derivatives;
  const char* op = "embedding_dot";
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": expected 2-D weight, got ", weight.sizes());
  check_embedding_bag(op, weight, indices, offsets, std::nullopt, Mode::sum, include_last_offset);
  check_like(op, "h", h, "weight", weight);
  const c10::cuda::CUDAGuard device(weight.device());
  const Input input(op, indices, offsets, include_last_offset, weight.size(0));
  const int64_t columns = weight.size(1);
  check_shape(op, "h", h, {input.bags.count, columns});
  const Tensor table = weight.contiguous(), vectors = h.contiguous();
  const Tensor out = at::zeros(indices.sizes(), weight.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight.scalar_type(), "embedding_dot", [&] {
    AT_DISPATCH_INDEX_TYPES(indices.scalar_type(), "embedding_dot", [&] {
      const Products<scalar_t, index_t> work{vectors.const_data_ptr<scalar_t>(),
                                             table.const_data_ptr<scalar_t>(),
                                             columns,
                                             {input.data<index_t>(), weight.size(0), padding_idx},
                                             input.bags,
                                             out.mutable_data_ptr<scalar_t>()};
      constexpr int most = kPackOf16Bytes<scalar_t>;
      const bool is_aligned =
          has_aligned_rows<most>(work.vectors, columns) && has_aligned_rows<most>(work.table, columns);
      dispatch_vector<scalar_t>(is_aligned, [&](auto size) {
        constexpr int vector = decltype(size)::value;
        // One group over all columns, for the sum to be within a warp.
        const Shape shape = rows_by_columns(work.bags.total, /*columns=*/1, /*vector=*/1, /*group=*/kWarp);
        launch(multiply_rows<scalar_t, index_t, vector>, shape, work);
      });
    });
  });
  input.raise_if_wrong();
  return out;
}

}  // namespace
}  // namespace nlpkernels

TORCH_LIBRARY_IMPL(nlpkernels, CUDA, m) {
  m.impl("embedding_bag", TORCH_FN(nlpkernels::embedding_bag));
  m.impl("embedding_bag_backward", TORCH_FN(nlpkernels::embedding_bag_backward));
  m.impl("embedding_bag_sparse_backward", TORCH_FN(nlpkernels::embedding_bag_sparse_backward));
  m.impl("embedding_bag_update", TORCH_FN(nlpkernels::embedding_bag_update));
  m.impl("embedding_dot", TORCH_FN(nlpkernels::embedding_dot));
}
