// The time loop of RNN, LSTM and GRU on CUDA, forward and backward. One call is one layer, all steps, both directions,
// on the caller's stream. Nothing here waits for the device, and no step allocates memory: a call can be captured in a
// CUDA graph.
//
// Forward:
//   from_x = x W_ih^T                       one product for all steps and both directions
//   for each step:
//     from_h = h_{t-1} W_hh^T               one product
//     h_t, c_t = cell(from_x + from_h + b)  one kernel, which also stores y_t and what backward needs
//   (with a projection, h_t = W_hr (what the cell gave): another product, and a kernel that stores y_t)
//   (with a mask of h, what stores h_t stores it once more, masked, for the next step's product)
// Both directions take their i-th step side by side: the product is a batch of two, and the kernel's grid has two
// layers. In packed data they hold different numbers of sequences, and the product is two.
//
// Backward walks the steps the other way: dh_{t-1} = dgates W_hh. It stores dgates of all rows, and beside them
// h_{t-1}, and with a projection the two factors of dW_hr, so that the gradients of the weights and of x are large
// products.
//
// Of bfloat16 and float16, and of float32 where TF32 is allowed, all steps of a pass can be one kernel instead, whose
// weights stay on the chip: forward_sequence, backward_sequence.
//
// Of bfloat16 and float16 products take operands as they are and give float, so that gates, c, and the sums over time
// of dh and dc never leave float; h and dgates are rounded to the tensors' dtype where a product reads them.
//
// Step t holds the first active[t] sequences, in rows [first_row[t], first_row[t] + active[t]). Those that are not
// active keep their h and c: in packed data, the forward direction leaves sequences behind as it walks, and the reverse
// direction takes them up, from h0 and c0.
//
// Letters are those of library.cpp; slots is 4 for the GRU (cells.h), else G.
#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>
#include <tuple>
#include <vector>

#include "../cells.h"
#include "../checks.h"
#include "common.cuh"
#include "gemm.cuh"
#include "persistent.cuh"

namespace nlpkernels {
namespace {

// Kernels ------------------------------------------------------------------------------------------------------------

// Blocks of a step's kernels for each multiprocessor. There are few: registers are for what is on its way to them.
constexpr int kStepBlocks = 6;

// What the directions do in one step: direction d is at the rows of step t[d].
struct Turn {
  int64_t directions, rows, batch, hidden, features;  // D, N, B, H, P
  int64_t active[2], first_row[2];
  // Backward: how many sequences were active in the step before (in the direction's own order), and where it begins.
  int64_t previous[2], previous_row[2];
};

// Runs a kernel over the sequences that are active and `columns`, for each direction: blockIdx.z is the direction.
template <typename Work>
void launch_turn(void (*kernel)(Work), const Turn& turn, int64_t columns, const Work& work) {
  Shape shape = rows_by_columns(std::max(turn.active[0], turn.active[1]), columns);
  shape.grid.z = static_cast<unsigned>(turn.directions);
  launch(kernel, shape, work);
}

template <typename T>
struct ForwardStep {
  Turn turn;
  const acc_t<T>* from_x;  // [N, D, G H]
  const acc_t<T>* from_h;  // [D, B, G H]
  const T *b_ih, *b_hh;    // [D, G H], or nullptr
  acc_t<T>* state;         // [D, B, H]: c_{t-1}, which becomes c_t; of cells without c, h
  T* h;                    // [D, B, H]: h_t, for the next product; where T is acc_t<T> it may be `state`
  T* y;                    // [N, D, H]: h_t again; nullptr with a projection
  const T* h_mask;         // [D, B, H], or nullptr, as with a projection
  T* masked;               // [D, B, H]: h_t under the mask, for the next product
  T* workspace;            // [D, N, S, H], or nullptr
};

// One unit of one sequence, given what x and h bring to its gates, biases included: returns h_t, makes c_t of `state`
// (h_t, of cells without c), and stores y_t and what backward needs.
template <typename Cell, typename T>
__device__ __forceinline__ acc_t<T> forward_unit(const ForwardStep<T>& step, int64_t d, int64_t row, int64_t j,
                                                 const acc_t<T>* from_x, const acc_t<T>* from_h, acc_t<T>& state) {
  using scalar = acc_t<T>;
  const Turn& turn = step.turn;
  scalar a[Cell::slots], saved[Cell::saved > 0 ? Cell::saved : 1], h;
#pragma unroll
  for (int slot = 0; slot < Cell::slots; ++slot) a[slot] = scalar(0);
#pragma unroll
  for (int gate = 0; gate < Cell::gates; ++gate) {
    a[Cell::input_slot(gate)] += from_x[gate];
    a[gate] += from_h[gate];
  }
  if constexpr (Cell::has_c) {
    h = Cell::forward(a, scalar(0), state, saved);
  } else {
    scalar c(0);
    h = Cell::forward(a, state, c, saved);
    state = h;
  }
  if (step.y != nullptr) step.y[(row * turn.directions + d) * turn.hidden + j] = static_cast<T>(h);
  if (step.workspace != nullptr) {
#pragma unroll
    for (int s = 0; s < Cell::saved; ++s) {
      step.workspace[((d * turn.rows + row) * Cell::saved + s) * turn.hidden + j] = static_cast<T>(saved[s]);
    }
  }
  return h;
}

template <typename Cell, typename T>
__global__ void __launch_bounds__(kThreads, kStepBlocks) forward_step(const __grid_constant__ ForwardStep<T> step) {
  using scalar = acc_t<T>;
  const Turn& turn = step.turn;
  const int64_t d = blockIdx.z, b = row_of_thread(), hidden = turn.hidden, gate_rows = Cell::gates * hidden;
  if (b >= turn.active[d]) return;
  const int64_t row = turn.first_row[d] + b, sequence = d * turn.batch + b;
  for (int64_t j = first_column(); j < hidden; j += column_step()) {
    // All that is read is asked for before any of it is used.
    const int64_t at = sequence * hidden + j;
    scalar state = step.state[at], from_x[Cell::gates], from_h[Cell::gates];
    T b_ih[Cell::gates] = {}, b_hh[Cell::gates] = {}, mask(1);
#pragma unroll
    for (int gate = 0; gate < Cell::gates; ++gate) {
      const int64_t column = gate * hidden + j;
      from_x[gate] = step.from_x[(row * turn.directions + d) * gate_rows + column];
      from_h[gate] = step.from_h[sequence * gate_rows + column];
      if (step.b_ih != nullptr) {
        b_ih[gate] = step.b_ih[d * gate_rows + column];
        b_hh[gate] = step.b_hh[d * gate_rows + column];
      }
    }
    if (step.h_mask != nullptr) mask = step.h_mask[at];
#pragma unroll
    for (int gate = 0; gate < Cell::gates; ++gate) {
      from_x[gate] += static_cast<scalar>(b_ih[gate]);
      from_h[gate] += static_cast<scalar>(b_hh[gate]);
    }
    const scalar h = forward_unit<Cell>(step, d, row, j, from_x, from_h, state);
    step.state[at] = state;
    step.h[at] = static_cast<T>(h);
    if (step.h_mask != nullptr) step.masked[at] = static_cast<T>(h * static_cast<scalar>(mask));
  }
}

// All steps of one pass over a layer, where the weights fit on the chip (persistent.cuh). grid.x: slices of the hidden
// units, whose cells are a block's own; grid.y: groups of sequences; grid.z: directions.
template <typename T>
struct Sequence {
  static constexpr int kMostRagged = 1024;  // steps of packed data: all of this is one argument of a kernel
  static constexpr int kApart = 32;         // counters, so that they do not share a line of L2

  T* exchange;         // [2, D, B, columns]: what the blocks of a group make for each other; zeros where they do not
  unsigned* arrivals;  // [D, groups, kApart], from zero: blocks of a group that have stored their part, over all steps
  int64_t directions, batch, hidden, columns;
  int steps, units, sequences;  // of a block: hidden units, sequences of its group
  int chunks, tiles;            // of its slice of the weights
  bool is_ragged;
  uint16_t active[kMostRagged];  // of packed data

  // Sequences in the i-th step of a walk up or down the steps; none before the first, nor beyond the last.
  __device__ int64_t active_at(int i, bool is_up) const {
    if (i < 0 || i >= steps) return 0;
    return is_ragged ? active[is_up ? i : steps - 1 - i] : batch;
  }
};

// What a block has of it.
template <typename T>
struct Share {
  const Sequence<T>& run;
  const int64_t d = blockIdx.z, first_unit = static_cast<int64_t>(blockIdx.x) * run.units,
                first_sequence = static_cast<int64_t>(blockIdx.y) * run.sequences;
  unsigned taken = 0;  // steps, by this group

  __device__ explicit Share(const Sequence<T>& run) : run(run) {}

  // How many of the first `active` sequences of the batch are of this group.
  __device__ int own_of(int64_t active) const {
    return static_cast<int>(std::min<int64_t>(active - first_sequence, run.sequences));
  }

  // Whether this thread has an i-th unit of a sequence, of the next `count`, and which.
  __device__ bool is_own(int i, int count, int& b, int& unit) const {
    const int at = i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    b = at / run.units;
    unit = at % run.units;
    return b < count && first_unit + unit < run.hidden;
  }

  // A sequence's row of what the group made in the step before, and of what it makes in this one.
  __device__ const T* given(int64_t sequence) const { return row_of(taken, sequence); }
  __device__ T* made(int64_t sequence) const { return row_of(taken + 1, sequence); }

  // Until all of the group have made what is given.
  __device__ void wait() const {
    if (threadIdx.x == 0) wait_acquire(arrivals(), taken * gridDim.x);
    __syncthreads();
  }
  // Says that this block has made its part, all threads of which are through with it.
  __device__ void arrive() {
    if (threadIdx.x == 0) add_release(arrivals());
    ++taken;
  }

 private:
  __device__ unsigned* arrivals() const { return run.arrivals + (d * gridDim.y + blockIdx.y) * Sequence<T>::kApart; }
  __device__ T* row_of(unsigned turn, int64_t sequence) const {
    return run.exchange + ((turn % 2 * run.directions + d) * run.batch + sequence) * run.columns;
  }
};

// Units of sequences that a thread has at most, of each kSequences.
template <typename W>
constexpr int own_units(int rows_of_unit) {
  return (W::kSequences * (W::kMostTiles * W::kRows / rows_of_unit) + W::kThreads - 1) / W::kThreads;
}

// A slice has all gates of its units. What changes hands is h_{t-1} (under the mask), and h0 until there is one.
template <typename T>
struct ForwardSequence : Sequence<T> {
  using W = Slice<T, 4>;

  ForwardStep<T> step;  // but for what changes from step to step
  const T* w_hh;        // [D, G H, H]
  bool is_aligned;
  const T* start;  // [D, B, H]: c0; of cells without c, h0
  T *h_n, *c_n;    // [D, B, H]
};

template <typename Cell, typename T>
__global__ void __launch_bounds__(ForwardSequence<T>::W::kThreads, 1)
    forward_sequence(const __grid_constant__ ForwardSequence<T> run) {
  using W = typename ForwardSequence<T>::W;
  constexpr int gates = Cell::gates, kOwn = own_units<W>(gates);
  const ForwardStep<T>& step = run.step;
  const int64_t directions = run.directions, batch = run.batch, hidden = run.hidden;
  const int units = run.units;
  Share<T> share(run);
  const int64_t d = share.d, first_unit = share.first_unit;

  const W slice(shared_memory(), run.chunks, run.tiles);
  float* state = reinterpret_cast<float*>(shared_memory() + W::bytes(run.chunks, run.tiles));  // [sequences, units]
  float *b_ih = state + run.sequences * units, *b_hh = b_ih + gates * units;                   // [gates, units]
  slice.load(hidden, run.is_aligned, [&](int row) -> const T* {
    const int64_t gate = row / units, j = first_unit + row % units;
    return gate < gates && j < hidden ? run.w_hh + ((d * gates + gate) * hidden + j) * hidden : nullptr;
  });
  for (int i = threadIdx.x; i < gates * units; i += W::kThreads) {
    const int64_t j = first_unit + i % units, at = (d * gates + i / units) * hidden + j;
    const bool is_there = step.b_ih != nullptr && j < hidden;
    b_ih[i] = is_there ? static_cast<float>(step.b_ih[at]) : 0.0f;
    b_hh[i] = is_there ? static_cast<float>(step.b_hh[at]) : 0.0f;
  }
  for (int i = threadIdx.x; i < run.sequences * units; i += W::kThreads) {
    const int64_t sequence = share.first_sequence + i / units, j = first_unit + i % units;
    if (sequence < batch && j < hidden) state[i] = static_cast<float>(run.start[(d * batch + sequence) * hidden + j]);
  }
  __syncthreads();

  const bool is_up = d == 0;
  int64_t first_row = is_up ? 0 : step.turn.rows;
  for (int i = 0; i < run.steps; ++i) {
    const int64_t all_active = run.active_at(i, is_up), stay_active = run.active_at(i + 1, is_up);
    const int active = share.own_of(all_active);
    if (!is_up) first_row -= all_active;
    for (int first = 0; first < active; first += W::kSequences) {
      const int count = active - first < W::kSequences ? active - first : W::kSequences;
      // What does not depend on h_{t-1} is asked for before the wait, and used after it.
      float from_x[kOwn][gates] = {};
      T mask[kOwn] = {};
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        int b, unit;
        if (!share.is_own(own, count, b, unit)) continue;
        const int64_t sequence = share.first_sequence + first + b, j = first_unit + unit;
#pragma unroll
        for (int gate = 0; gate < gates; ++gate) {
          const int64_t at = (((first_row + sequence) * directions + d) * gates + gate) * hidden + j;
          from_x[own][gate] = step.from_x[at];
        }
        if (step.h_mask != nullptr) mask[own] = step.h_mask[(d * batch + sequence) * hidden + j];
      }
      if (first == 0) share.wait();
      slice.multiply(share.given(share.first_sequence + first), count);
      __syncthreads();
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        int b, unit;
        if (!share.is_own(own, count, b, unit)) continue;
        const int64_t sequence = share.first_sequence + first + b, j = first_unit + unit;
        float from_h[gates];
#pragma unroll
        for (int gate = 0; gate < gates; ++gate) {
          from_x[own][gate] += b_ih[gate * units + unit];
          from_h[gate] = slice.sum(gate * units + unit, b) + b_hh[gate * units + unit];
        }
        float& c = state[(first + b) * units + unit];
        const float h_t = forward_unit<Cell>(step, d, first_row + sequence, j, from_x[own], from_h, c);
        share.made(sequence)[j] =
            as_operand(static_cast<T>(step.h_mask != nullptr ? h_t * static_cast<float>(mask[own]) : h_t));
        if (sequence >= stay_active) {
          run.h_n[(d * batch + sequence) * hidden + j] = static_cast<T>(h_t);
          if (Cell::has_c) run.c_n[(d * batch + sequence) * hidden + j] = static_cast<T>(c);
        }
      }
      __syncthreads();
    }
    if (active > 0) share.arrive();
    if (is_up) first_row += all_active;
  }
}

// y_t = h_t, where a product made h_t.
template <typename T>
struct ProjectedStep {
  Turn turn;
  const T* h;       // [D, B, P]
  T* y;             // [N, D, P]
  const T* h_mask;  // [D, B, P], or nullptr
  T* masked;        // [D, B, P]: h_t under the mask, for the next product
};

template <typename T>
__global__ void __launch_bounds__(kThreads) store_projected(const __grid_constant__ ProjectedStep<T> step) {
  const Turn& turn = step.turn;
  const int64_t d = blockIdx.z, b = row_of_thread(), features = turn.features;
  if (b >= turn.active[d]) return;
  for (int64_t j = first_column(); j < features; j += column_step()) {
    const int64_t at = (d * turn.batch + b) * features + j;
    step.y[((turn.first_row[d] + b) * turn.directions + d) * features + j] = step.h[at];
    if (step.h_mask != nullptr) {
      step.masked[at] = static_cast<T>(static_cast<acc_t<T>>(step.h[at]) * static_cast<acc_t<T>>(step.h_mask[at]));
    }
  }
}

template <typename T>
struct BackwardStep {
  Turn turn;
  const T* dy;         // [N, D, H], or nullptr; with a projection it is in dh already
  const acc_t<T>* dh;  // [D, B, H]: dL/dh_t, but for dy and what `state` has of it
  acc_t<T>* state;     // [D, B, H], of cells with a state of backward
  const T *y, *h0;     // [N, D, P], [D, B, P]
  const T* workspace;  // [D, N, S, H]
  const T* c0;         // [D, B, H], LSTM
  T* factor;           // [D, B, G H]: dgates of W_hh's gates, for this step's product
  T* dgates;           // [N, D, slots, H], or nullptr
  const T* h_mask;     // [D, B, P], or nullptr
  T* h_previous;       // [N, D, P]: h_{t-1}, under the mask if there is one, for dW_hh; or nullptr
  T* outputs;          // [N, D, H]: h_t before the projection, for dW_hr; or nullptr
};

// Only the GRU's h_t depends on h_{t-1} in a way that does not pass through W_hh.
template <typename Cell>
constexpr bool kHasDirect = std::is_same_v<Cell, Gru>;

// The state of backward: of cells with c dL/dc_t without h_t's share, which becomes dL/dc_{t-1}; of the GRU what passed
// W_hh by of dL/dh_t, which becomes that of dL/dh_{t-1}.
template <typename Cell>
constexpr bool kHasState = Cell::has_c || kHasDirect<Cell>;

// A sequence at a step: its row, and that at the step before, or -1: it comes from h0 and c0.
struct Place {
  int64_t d, sequence, row, previous_row;
};

template <typename T>
__device__ __forceinline__ T h_before(const BackwardStep<T>& step, const Place& at, int64_t j) {
  const Turn& turn = step.turn;
  const T* h = at.previous_row >= 0 ? step.y + (at.previous_row * turn.directions + at.d) * turn.features
                                    : step.h0 + (at.d * turn.batch + at.sequence) * turn.features;
  return h[j];
}

// 1 without a mask.
template <typename T>
__device__ __forceinline__ T mask_of(const BackwardStep<T>& step, const Place& at, int64_t j) {
  return step.h_mask != nullptr ? step.h_mask[(at.d * step.turn.batch + at.sequence) * step.turn.features + j] : T(1);
}

template <typename T>
__device__ __forceinline__ void store_h_previous(const BackwardStep<T>& step, const Place& at, int64_t j, T h, T mask) {
  using scalar = acc_t<T>;
  const int64_t row = at.row * step.turn.directions + at.d;
  step.h_previous[row * step.turn.features + j] = static_cast<T>(static_cast<scalar>(h) * static_cast<scalar>(mask));
}

// What a unit's backward step takes that no later step has made, as it lies in memory: who loads it need not wait.
template <typename Cell, typename T>
struct Kept {
  T saved[Cell::saved > 0 ? Cell::saved : 1], h, h_prev, c_prev, dy;
};

template <typename Cell, typename T>
__device__ __forceinline__ Kept<Cell, T> load_kept(const BackwardStep<T>& step, const Place& at, int64_t j) {
  const Turn& turn = step.turn;
  const int64_t hidden = turn.hidden, row = at.row * turn.directions + at.d;
  const auto workspace_of = [&](int64_t of_row, int s) {
    return step.workspace + ((at.d * turn.rows + of_row) * Cell::saved + s) * hidden;
  };
  Kept<Cell, T> kept{};
#pragma unroll
  for (int s = 0; s < Cell::saved; ++s) kept.saved[s] = workspace_of(at.row, s)[j];
  if constexpr (Cell::has_c) {
    const T* c_before = at.previous_row >= 0 ? workspace_of(at.previous_row, Cell::saved_c)
                                             : step.c0 + (at.d * turn.batch + at.sequence) * hidden;
    kept.c_prev = c_before[j];
  } else {
    kept.h = step.y[row * hidden + j];
    kept.h_prev = h_before(step, at, j);
  }
  if (step.dy != nullptr) kept.dy = step.dy[row * hidden + j];
  return kept;
}

// One unit of one sequence, given what later steps bring to dL/dh_t by W_hh: makes its dgates, and stores them, and h_t
// before a projection, for the gradients of the weights.
template <typename Cell, typename T>
__device__ __forceinline__ void backward_unit(const BackwardStep<T>& step, const Place& at, int64_t j,
                                              const Kept<Cell, T>& kept, acc_t<T> dh, acc_t<T>& state,
                                              T (&dgates)[Cell::slots]) {
  using scalar = acc_t<T>;
  const int64_t hidden = step.turn.hidden, row = at.row * step.turn.directions + at.d;
  scalar saved[Cell::saved > 0 ? Cell::saved : 1], da[Cell::slots], dc = Cell::has_c ? state : scalar(0);
#pragma unroll
  for (int s = 0; s < Cell::saved; ++s) saved[s] = static_cast<scalar>(kept.saved[s]);
  if constexpr (kHasDirect<Cell>) dh += state;
  dh += static_cast<scalar>(kept.dy);
  const scalar direct = Cell::backward(saved, static_cast<scalar>(kept.h), static_cast<scalar>(kept.h_prev),
                                       static_cast<scalar>(kept.c_prev), dh, dc, da);
  if constexpr (kHasState<Cell>) state = Cell::has_c ? dc : direct;
#pragma unroll
  for (int slot = 0; slot < Cell::slots; ++slot) {
    dgates[slot] = static_cast<T>(da[slot]);
    if (step.dgates != nullptr) step.dgates[(row * Cell::slots + slot) * hidden + j] = dgates[slot];
  }
  if constexpr (Cell::has_c) {
    if (step.outputs != nullptr) step.outputs[row * hidden + j] = static_cast<T>(Cell::output(saved));
  }
}

// Sequences from `previous` on have no step before this one.
template <typename Cell, typename T>
__global__ void __launch_bounds__(kThreads, kStepBlocks) backward_step(const __grid_constant__ BackwardStep<T> step) {
  using scalar = acc_t<T>;
  const Turn& turn = step.turn;
  const int64_t d = blockIdx.z, b = row_of_thread(), hidden = turn.hidden, features = turn.features;
  if (b >= turn.active[d]) return;
  const Place at{d, b, turn.first_row[d] + b, b < turn.previous[d] ? turn.previous_row[d] + b : -1};
  const int64_t sequence = d * turn.batch + b;
  for (int64_t j = first_column(); j < hidden || j < features; j += column_step()) {
    // All that is read is asked for before any of it is used.
    const bool stores_h = step.h_previous != nullptr && j < features;
    const T h = stores_h ? h_before(step, at, j) : T(0), mask = stores_h ? mask_of(step, at, j) : T(0);
    if (j < hidden) {
      scalar state(0);
      if constexpr (kHasState<Cell>) state = step.state[sequence * hidden + j];
      const scalar dh = step.dh[sequence * hidden + j];
      const Kept<Cell, T> kept = load_kept<Cell>(step, at, j);
      T dgates[Cell::slots];
      backward_unit<Cell>(step, at, j, kept, dh, state, dgates);
      if constexpr (kHasState<Cell>) step.state[sequence * hidden + j] = state;
#pragma unroll
      for (int gate = 0; gate < Cell::gates; ++gate) {
        step.factor[(sequence * Cell::gates + gate) * hidden + j] = dgates[gate];
      }
    }
    if (stores_h) store_h_previous(step, at, j, h, mask);
  }
}

// A slice has the rows of W_hh^T of its units, whose dL/dh and states are the block's own. What changes hands is dgates
// of W_hh's gates: dL/dh_{t-1} = dgates_t W_hh. It lies in whole chunks, which those of all rows may not. The walk goes
// against the direction's own, and a step beyond its end, to the gradients of h0 and c0.
template <typename T>
struct BackwardSequence : Sequence<T> {
  using W = Slice<T, 2>;  // not more, for the registers of what is read before the wait

  BackwardStep<T> step;  // but for what changes from step to step
  const T* w_hh;         // [D, H, columns]: transposed, its gates padded to whole chunks with zeros
  const T *dh_n, *dc_n;  // [D, B, H], or nullptr
  T *dh0, *dc0;          // [D, B, H]
};

template <typename Cell, typename T>
__global__ void __launch_bounds__(BackwardSequence<T>::W::kThreads, 1)
    backward_sequence(const __grid_constant__ BackwardSequence<T> run) {
  using W = typename BackwardSequence<T>::W;
  constexpr int kOwn = own_units<W>(1);
  const BackwardStep<T>& step = run.step;
  const int64_t batch = run.batch, hidden = run.hidden, padded = run.columns / Cell::gates;
  const int units = run.units;
  Share<T> share(run);
  const int64_t d = share.d, first_unit = share.first_unit;

  const W slice(shared_memory(), run.chunks, run.tiles);
  float* states = reinterpret_cast<float*>(shared_memory() + W::bytes(run.chunks, run.tiles));  // [sequences, units]
  slice.load(run.columns, /*is_aligned=*/true, [&](int row) -> const T* {
    return first_unit + row < hidden ? run.w_hh + (d * hidden + first_unit + row) * run.columns : nullptr;
  });
  for (int i = threadIdx.x; i < run.sequences * units; i += W::kThreads) {
    const int64_t sequence = share.first_sequence + i / units, j = first_unit + i % units;
    const bool is_there = run.dc_n != nullptr && sequence < batch && j < hidden;
    states[i] = is_there ? static_cast<float>(run.dc_n[(d * batch + sequence) * hidden + j]) : 0.0f;
  }
  __syncthreads();

  const bool is_up = d == 1;
  int64_t first_row = is_up ? 0 : step.turn.rows;
  for (int i = 0; i <= run.steps; ++i) {
    // In the step that was taken before, which is a later one of the direction's; in this; in the next to be taken.
    const int64_t all_later = run.active_at(i - 1, is_up), all_active = run.active_at(i, is_up),
                  all_previous = run.active_at(i + 1, is_up);
    const int later = share.own_of(all_later), active = share.own_of(all_active);
    // And at the direction's own first step those that have none: their gradients pass through.
    const bool takes_all = i == (is_up ? 0 : run.steps);
    const int both = share.own_of(takes_all ? batch : is_up ? all_later : all_active);
    if (!is_up) first_row -= all_active;
    const int64_t previous_row = is_up ? first_row + all_active : first_row - all_previous;
    for (int first = 0; first < both; first += W::kSequences) {
      const int count = both - first < W::kSequences ? both - first : W::kSequences;
      const auto place = [&](int b) {
        const int64_t sequence = share.first_sequence + first + b;
        return Place{d, sequence, first_row + sequence, sequence < all_previous ? previous_row + sequence : -1};
      };
      // What does not depend on later steps is asked for before the wait, and used after it.
      Kept<Cell, T> kept[kOwn] = {};
      T mask[kOwn] = {};
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        int b, unit;
        if (!share.is_own(own, count, b, unit)) continue;
        const int64_t j = first_unit + unit;
        const Place at = place(b);
        mask[own] = mask_of(step, at, j);
        if (first + b >= active) continue;
        kept[own] = load_kept<Cell>(step, at, j);
        if (Cell::has_c && step.h_previous != nullptr) kept[own].h_prev = h_before(step, at, j);
      }
      if (first == 0) share.wait();
      if (first < later) {
        slice.multiply(share.given(share.first_sequence + first),
                       later - first < W::kSequences ? later - first : W::kSequences);
      }
      __syncthreads();
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        int b, unit;
        if (!share.is_own(own, count, b, unit)) continue;
        const int64_t j = first_unit + unit;
        const Place at = place(b);
        const int64_t of_state = (d * batch + at.sequence) * hidden + j;
        float& state = states[(first + b) * units + unit];
        float dh = 0;
        if (first + b >= later) {
          if (run.dh_n != nullptr) dh = static_cast<float>(run.dh_n[of_state]);
        } else {
          dh = slice.sum(unit, b) * static_cast<float>(mask[own]);
        }
        if (first + b >= active) {
          run.dh0[of_state] = static_cast<T>(kHasDirect<Cell> ? dh + state : dh);
          if (Cell::has_c) run.dc0[of_state] = static_cast<T>(state);
          continue;
        }
        T dgates[Cell::slots];
        backward_unit<Cell>(step, at, j, kept[own], dh, state, dgates);
#pragma unroll
        for (int gate = 0; gate < Cell::gates; ++gate) {
          share.made(at.sequence)[gate * padded + j] = as_operand(dgates[gate]);
        }
        if (step.h_previous != nullptr) store_h_previous(step, at, j, kept[own].h_prev, mask[own]);
      }
      __syncthreads();
    }
    if (active > 0) share.arrive();
    if (is_up) first_row += all_active;
  }
}

// dL/dh_t with a projection: dh + dy, for this step's product and for dW_hr.
template <typename T>
struct ProjectedBackwardStep {
  Turn turn;
  const acc_t<T>* dh;  // [D, B, P]
  const T* dy;         // [N, D, P], or nullptr
  T* factor;           // [D, B, P]
  T* dprojected;       // [N, D, P], or nullptr
};

template <typename T>
__global__ void __launch_bounds__(kThreads) add_dy(const __grid_constant__ ProjectedBackwardStep<T> step) {
  const Turn& turn = step.turn;
  const int64_t d = blockIdx.z, b = row_of_thread(), features = turn.features;
  if (b >= turn.active[d]) return;
  for (int64_t j = first_column(); j < features; j += column_step()) {
    const int64_t at = (d * turn.batch + b) * features + j;
    const int64_t in_rows = ((turn.first_row[d] + b) * turn.directions + d) * features + j;
    acc_t<T> dh = step.dh[at];
    if (step.dy != nullptr) dh += static_cast<acc_t<T>>(step.dy[in_rows]);
    step.factor[at] = static_cast<T>(dh);
    if (step.dprojected != nullptr) step.dprojected[in_rows] = static_cast<T>(dh);
  }
}

// dL/dh_{t-1} of what W_hh read, under the mask.
template <typename T>
struct MaskStep {
  Turn turn;
  const T* h_mask;  // [D, B, P]
  acc_t<T>* dh;     // [D, B, P]
};

template <typename T>
__global__ void __launch_bounds__(kThreads) mask_dh(const __grid_constant__ MaskStep<T> step) {
  const Turn& turn = step.turn;
  const int64_t d = blockIdx.z, b = row_of_thread(), features = turn.features;
  if (b >= turn.active[d]) return;
  for (int64_t j = first_column(); j < features; j += column_step()) {
    const int64_t at = (d * turn.batch + b) * features + j;
    step.dh[at] *= static_cast<acc_t<T>>(step.h_mask[at]);
  }
}

// Shared by forward and backward -------------------------------------------------------------------------------------

// The arguments, contiguous, with x as [N, I] and the weights of both directions as one tensor (itself if there is
// one). Direction 1 runs from the last step to the first; "previous" is meant in the direction's own order.
struct Layer : RecurrentArguments {
  Layer(const RecurrentArguments& args, const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
        const OptionalTensor& h_mask)
      : RecurrentArguments(args),
        x(x.reshape({args.rows, args.inputs}).contiguous()),
        h0(h0.contiguous()),
        c0(contiguous(c0)),
        h_mask(contiguous(h_mask)),
        all_w_ih(all(0)),
        all_w_hh(all(1)),
        blas(this->x.scalar_type()) {
    if (has_bias) {
      all_b_ih = all(2);
      all_b_hh = all(3);
    }
    if (has_projection) all_w_hr = all(weights_per_direction - 1);
  }

  Tensor x, h0;
  OptionalTensor c0, h_mask;
  Tensor all_w_ih, all_w_hh;          // [D, G H, I], [D, G H, P]
  OptionalTensor all_b_ih, all_b_hh;  // [D, G H]
  OptionalTensor all_w_hr;            // [D, P, H]
  const Blas blas;

  // What the directions do in their i-th step.
  Turn turn(int64_t i) const {
    Turn turn{directions, rows, batch, hidden, features, {}, {}, {}, {}};
    for (const auto d : c10::irange(directions)) {
      const int64_t t = d == 0 ? i : steps - 1 - i, before = d == 0 ? t - 1 : t + 1;
      turn.active[d] = active[t];
      turn.first_row[d] = first_row[t];
      if (before >= 0 && before < steps) {
        turn.previous[d] = std::min(active[t], active[before]);
        turn.previous_row[d] = first_row[before];
      }
    }
    return turn;
  }

  // out[d] = a[d] b[d] of the rows that are active.
  void multiply_active(const Turn& turn, const Matrix& out, const Matrix& a, const Matrix& b) const {
    if (directions == 1 || turn.active[0] == turn.active[1]) {
      return blas.multiply(out.first_rows(turn.active[0]), a.first_rows(turn.active[0]), b);
    }
    for (const auto d : c10::irange(directions)) {
      const int64_t count = turn.active[d];
      blas.multiply(out.of_batch(d).first_rows(count), a.of_batch(d).first_rows(count), b.of_batch(d));
    }
  }

 private:
  Tensor all(int64_t i) const {
    if (directions == 1) return weights[i].contiguous().unsqueeze(0);
    return at::stack({weights[i], weights[weights_per_direction + i]});
  }
};

template <typename T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

template <typename T>
T* data_or_null(const Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? tensor.mutable_data_ptr<T>() : nullptr;
}

// NLPKERNELS_CUDA_PERSISTENT: never (by default), where it fits, or always, with an error where it does not fit.
enum class Persistent { kNever, kFits, kAlways };
Persistent wants_persistent() {
  const char* given = std::getenv("NLPKERNELS_CUDA_PERSISTENT");
  const std::string when = given != nullptr ? given : "never";
  TORCH_CHECK_VALUE(when == "never" || when == "fits" || when == "always", "NLPKERNELS_CUDA_PERSISTENT is '", when,
                    "', expected never, fits or always");
  return when == "never" ? Persistent::kNever : when == "fits" ? Persistent::kFits : Persistent::kAlways;
}

// Where a pass goes step by step.
void check_steps_are_wanted(const char* op, const Layer& layer) {
  TORCH_CHECK(
      wants_persistent() != Persistent::kAlways || layer.rows == 0, op,
      ": NLPKERNELS_CUDA_PERSISTENT is always, but no kernel for ", layer.hidden, " hidden units, ", layer.batch,
      " sequences and ", layer.directions, " directions of ", layer.x.scalar_type(),
      layer.has_projection ? " with a projection" : "", " fits on this device",
      layer.x.scalar_type() == at::kFloat && !allows_tf32() ? ", and none is there for float32 without TF32" : "");
}

// How a kernel of all steps splits a layer; of no blocks where it does not serve it.
struct SequencePlan {
  dim3 grid{0, 0, 0};
  int64_t columns = 0;
  int tiles = 0, units = 0, sequences = 0;
  size_t shared = 0;

  explicit operator bool() const { return grid.x > 0; }
};

// The fewest passes over sequences, and of those the most blocks, that can be resident at once. A unit has `rows` of
// the weights, of `columns` in whole chunks, and in shared memory a float for each sequence and `constants` beside.
template <typename Run>
SequencePlan plan_sequence(void (*kernel)(Run), const Layer& layer, int rows, int64_t columns, int constants) {
  using W = typename Run::W;
  constexpr int64_t kMostPasses = 4;
  constexpr int64_t kMostSteps = 1 << 22;  // whose arrivals a counter holds
  const bool is_servable =
      (layer.x.scalar_type() != at::kFloat || allows_tf32()) && layer.rows > 0 && !layer.has_projection &&
      layer.steps <= kMostSteps &&
      (layer.rows == layer.steps * layer.batch || (layer.steps <= Run::kMostRagged && layer.batch <= UINT16_MAX));
  if (!is_servable || wants_persistent() == Persistent::kNever) return {};
  const Residency residency;
  if (!residency.is_possible) return {};
  const int64_t all_passes = ceil_div(layer.batch, W::kSequences);
  for (int64_t passes = 1; passes <= kMostPasses; ++passes) {
    const int64_t groups = ceil_div(all_passes, passes);
    for (int tiles = 1; tiles <= W::kMostTiles; ++tiles) {
      const int units = tiles * W::kRows / rows;
      const int64_t slices = ceil_div(layer.hidden, units), sequences = passes * W::kSequences;
      const size_t shared = W::bytes(columns / W::kColumns, tiles) + sizeof(float) * units * (sequences + constants);
      const int64_t blocks = slices * groups * layer.directions;
      if (blocks <= residency.blocks(kernel, W::kThreads, shared)) {
        return {dim3(slices, groups, layer.directions), columns, tiles, units, static_cast<int>(sequences), shared};
      }
    }
  }
  return {};
}

// All steps in one launch, given what is the pass's own. What changes hands begins as `exchange`, [2, D, B, columns].
template <typename Run, typename T>
void run_sequence(void (*kernel)(Run), const Layer& layer, const SequencePlan& plan, Run& run, const Tensor& exchange) {
  using W = typename Run::W;
  const Tensor arrivals = at::zeros({layer.directions, plan.grid.y, Run::kApart}, exchange.options().dtype(at::kInt));
  run.step.turn = layer.turn(0);
  run.exchange = exchange.mutable_data_ptr<T>();
  run.arrivals = reinterpret_cast<unsigned*>(arrivals.mutable_data_ptr<int>());
  run.directions = layer.directions;
  run.batch = layer.batch;
  run.hidden = layer.hidden;
  run.columns = plan.columns;
  run.steps = static_cast<int>(layer.steps);
  run.units = plan.units;
  run.sequences = plan.sequences;
  run.chunks = static_cast<int>(plan.columns / W::kColumns);
  run.tiles = plan.tiles;
  run.is_ragged = layer.rows != layer.steps * layer.batch;
  if (run.is_ragged) std::copy(layer.active.begin(), layer.active.end(), run.active);
  launch_together(kernel, {plan.grid, dim3(W::kThreads)}, plan.shared, run);
}

// Hidden units in whole chunks of columns.
template <typename W>
int64_t padded_hidden(const Layer& layer) {
  return ceil_div(layer.hidden, W::kColumns) * W::kColumns;
}

// Forward ------------------------------------------------------------------------------------------------------------

// All steps by one kernel, if that is wanted and fits. h_n and c_n are h0 and c0.
template <typename Cell, typename T>
bool run_as_one(const Layer& layer, const ForwardStep<T>& step, const Tensor& h_n, const Tensor& c_n) {
  const auto kernel = forward_sequence<Cell, T>;
  const int64_t columns = padded_hidden<typename ForwardSequence<T>::W>(layer);
  const SequencePlan plan = plan_sequence(kernel, layer, Cell::gates, columns, 2 * Cell::gates);
  if (!plan) return false;
  ForwardSequence<T> run{};
  run.step = step;
  run.w_hh = layer.all_w_hh.const_data_ptr<T>();
  run.is_aligned = has_aligned_rows<kPackOf16Bytes<T>>(run.w_hh, layer.hidden);
  run.start = (Cell::has_c ? *layer.c0 : layer.h0).template const_data_ptr<T>();
  run.h_n = h_n.mutable_data_ptr<T>();
  run.c_n = data_or_null<T>(c_n);
  const Tensor exchange = at::zeros({2, layer.directions, layer.batch, columns}, layer.x.options());
  exchange.narrow(3, 0, layer.hidden).copy_(layer.h_mask ? layer.h0.mul(*layer.h_mask) : layer.h0);
  run_sequence<ForwardSequence<T>, T>(kernel, layer, plan, run, exchange);
  return true;
}

// Step by step: h_n and c_n are h0 and c0.
template <typename Cell, typename T>
void run_steps(const Layer& layer, ForwardStep<T> step, const Tensor& y, const Tensor& h_n, const Tensor& c_n) {
  using scalar = acc_t<T>;
  constexpr auto wide = c10::CppTypeToScalarType<scalar>::value;
  const int64_t directions = layer.directions, batch = layer.batch, hidden = layer.hidden;
  const auto options = layer.x.options();
  // The states that the steps work on are those that are returned.
  const Tensor own_state = Cell::has_c ? c_n : h_n;
  const Tensor state = own_state.to(wide);  // itself, but of bfloat16 and float16
  const Tensor from_h = at::empty({directions, batch, Cell::gates * hidden}, options.dtype(wide));
  const Tensor cell_h = layer.has_projection ? at::empty({directions, batch, hidden}, options) : h_n;
  const Tensor masked = layer.h_mask ? layer.h0.mul(*layer.h_mask) : Tensor();
  const T* h_mask = data_or_null<T>(layer.h_mask);
  T* masked_data = data_or_null<T>(masked);
  step.from_h = from_h.template const_data_ptr<scalar>();
  step.state = state.mutable_data_ptr<scalar>();
  step.h = cell_h.mutable_data_ptr<T>();
  step.masked = masked_data;

  const Matrix h(h_n), left(layer.h_mask ? masked : h_n), product(from_h), w_hh(layer.all_w_hh.transpose(1, 2)),
      unprojected(cell_h);
  for (const auto i : c10::irange(layer.steps)) {
    step.turn = layer.turn(i);
    layer.multiply_active(step.turn, product, left, w_hh);
    launch_turn(forward_step<Cell, T>, step.turn, hidden, step);
    if (layer.has_projection) {
      layer.multiply_active(step.turn, h, unprojected, Matrix(layer.all_w_hr->transpose(1, 2)));
      const ProjectedStep<T> projected{step.turn, h_n.const_data_ptr<T>(), y.mutable_data_ptr<T>(), h_mask,
                                       masked_data};
      launch_turn(store_projected<T>, step.turn, layer.features, projected);
    }
  }
  if (Cell::has_c && !state.is_same(own_state)) own_state.copy_(state);
}

template <typename Cell, typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Layer& layer, at::IntArrayRef y_sizes, bool keep) {
  using scalar = acc_t<T>;
  constexpr auto wide = c10::CppTypeToScalarType<scalar>::value;
  const int64_t directions = layer.directions, rows = layer.rows, gate_rows = Cell::gates * layer.hidden;
  const auto options = layer.x.options();

  const Tensor y = at::empty(y_sizes, options);
  const Tensor h_n = layer.h0.clone(at::MemoryFormat::Contiguous);
  const Tensor c_n = Cell::has_c ? layer.c0->clone(at::MemoryFormat::Contiguous) : at::empty({0}, options);
  const Tensor workspace =
      keep ? at::empty({directions, rows, Cell::saved, layer.hidden}, options) : at::empty({0}, options);
  const Tensor from_x = at::empty({rows, directions * gate_rows}, options.dtype(wide));

  ForwardStep<T> step{};
  step.from_x = from_x.const_data_ptr<scalar>();
  step.b_ih = data_or_null<T>(layer.all_b_ih);
  step.b_hh = data_or_null<T>(layer.all_b_hh);
  step.y = layer.has_projection ? nullptr : y.mutable_data_ptr<T>();
  step.h_mask = layer.has_projection ? nullptr : data_or_null<T>(layer.h_mask);
  step.workspace = data_or_null<T>(workspace);

  layer.blas.multiply(Matrix(from_x), Matrix(layer.x),
                      Matrix(layer.all_w_ih.view({directions * gate_rows, layer.inputs}).t()));
  if constexpr (!std::is_same_v<T, double>) {
    if (run_as_one<Cell>(layer, step, h_n, c_n)) return {y, h_n, c_n, workspace};
  }
  check_steps_are_wanted("recurrent", layer);
  run_steps<Cell>(layer, step, y, h_n, c_n);
  return {y, h_n, c_n, workspace};
}

// Backward -----------------------------------------------------------------------------------------------------------

template <typename Cell, typename T>
class Backward {
  using scalar = acc_t<T>;
  static constexpr auto kWide = c10::CppTypeToScalarType<scalar>::value;
  static constexpr bool kIsWide = std::is_same_v<T, scalar>;
  static constexpr int64_t kSlots = Cell::slots;

 public:
  Backward(const Layer& layer, at::IntArrayRef x_sizes, bool need_dx, bool need_dweights)
      : layer_(layer),
        need_dx_(need_dx),
        need_dweights_(need_dweights),
        options_(layer.x.options()),
        wide_options_(options_.dtype(kWide)) {
    const int64_t rows = layer.rows, directions = layer.directions;
    dx = at::empty(need_dx ? x_sizes : at::IntArrayRef({0}), options_);
    dh0 = at::empty(layer.h0.sizes(), options_);
    dc0 = at::empty(Cell::has_c ? layer.c0->sizes() : at::IntArrayRef({0}), options_);
    for (const Tensor& weight : layer.weights) {
      dweights.push_back(at::empty(need_dweights ? weight.sizes() : at::IntArrayRef({0}), options_));
    }
    if (need_dx || need_dweights) dgates_ = at::empty({rows, directions * kSlots * layer.hidden}, options_);
    if (need_dweights) h_previous_ = at::empty({rows, directions * layer.features}, options_);
    if (need_dweights && layer.has_projection) {
      dprojected_ = at::empty({rows, directions * layer.features}, options_);
      outputs_ = at::empty({rows, directions * layer.hidden}, options_);
    }
  }

  Tensor dx, dh0, dc0;
  std::vector<Tensor> dweights;

  void run(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& y,
           const Tensor& workspace) const {
    run_loop(contiguous(dy), contiguous(dh_n), contiguous(dc_n), y.contiguous(), workspace.contiguous());
    if (need_dweights_) run_weights();
    if (need_dx_) run_inputs();
  }

 private:
  // dgates of all rows, dh0 and dc0.
  void run_loop(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& y,
                const Tensor& workspace) const {
    BackwardStep<T> step{};
    step.dy = layer_.has_projection ? nullptr : data_or_null<T>(dy);
    step.y = y.template const_data_ptr<T>();
    step.h0 = layer_.h0.template const_data_ptr<T>();
    step.workspace = workspace.template const_data_ptr<T>();
    step.c0 = data_or_null<T>(layer_.c0);
    step.dgates = data_or_null<T>(dgates_);
    step.h_mask = data_or_null<T>(layer_.h_mask);
    step.h_previous = data_or_null<T>(h_previous_);
    step.outputs = data_or_null<T>(outputs_);
    if constexpr (!std::is_same_v<T, double>) {
      if (run_as_one(step, dh_n, dc_n)) return;
    }
    check_steps_are_wanted("recurrent_backward", layer_);
    run_steps(step, dy, dh_n, dc_n);
  }

  // All steps by one kernel, if that is wanted and fits.
  bool run_as_one(const BackwardStep<T>& step, const OptionalTensor& dh_n, const OptionalTensor& dc_n) const {
    const auto kernel = backward_sequence<Cell, T>;
    const int64_t directions = layer_.directions, hidden = layer_.hidden, gates = Cell::gates;
    const int64_t padded = padded_hidden<typename BackwardSequence<T>::W>(layer_), columns = gates * padded;
    const SequencePlan plan = plan_sequence(kernel, layer_, 1, columns, 0);
    if (!plan) return false;
    const Tensor w_hh = at::zeros({directions, hidden, gates, padded}, options_);
    w_hh.narrow(3, 0, hidden).copy_(layer_.all_w_hh.view({directions, gates, hidden, hidden}).permute({0, 3, 1, 2}));
    BackwardSequence<T> run{};
    run.step = step;
    run.w_hh = w_hh.template const_data_ptr<T>();
    run.dh_n = data_or_null<T>(dh_n);
    run.dc_n = data_or_null<T>(dc_n);
    run.dh0 = dh0.template mutable_data_ptr<T>();
    run.dc0 = data_or_null<T>(dc0);
    const Tensor exchange = at::zeros({2, directions, layer_.batch, columns}, options_);
    run_sequence<BackwardSequence<T>, T>(kernel, layer_, plan, run, exchange);
    return true;
  }

  void run_steps(BackwardStep<T> step, const OptionalTensor& dy, const OptionalTensor& dh_n,
                 const OptionalTensor& dc_n) const {
    const int64_t directions = layer_.directions, batch = layer_.batch, hidden = layer_.hidden;
    const Tensor dh = start(dh0, dh_n);
    const Tensor state = Cell::has_c        ? start(dc0, dc_n)
                         : kHasDirect<Cell> ? at::zeros({directions, batch, hidden}, wide_options_)
                                            : Tensor();
    const Tensor factor = at::empty({directions, batch, Cell::gates * hidden}, options_);
    const bool has_projection = layer_.has_projection;
    const Tensor cell_dh = has_projection ? at::empty({directions, batch, hidden}, wide_options_) : dh;
    const Tensor projected_factor = has_projection ? at::empty(dh.sizes(), options_) : Tensor();

    step.dh = cell_dh.template const_data_ptr<scalar>();
    step.state = data_or_null<scalar>(state);
    step.factor = factor.template mutable_data_ptr<T>();
    const Matrix sum(dh), product(cell_dh), left(factor), w_hh(layer_.all_w_hh);
    for (int64_t i = layer_.steps - 1; i >= 0; --i) {
      step.turn = layer_.turn(i);
      if (has_projection) {
        const ProjectedBackwardStep<T> projected{step.turn, dh.template const_data_ptr<scalar>(), data_or_null<T>(dy),
                                                 projected_factor.template mutable_data_ptr<T>(),
                                                 data_or_null<T>(dprojected_)};
        launch_turn(add_dy<T>, step.turn, layer_.features, projected);
        layer_.multiply_active(step.turn, product, Matrix(projected_factor), Matrix(*layer_.all_w_hr));
      }
      launch_turn(backward_step<Cell, T>, step.turn, std::max(hidden, layer_.features), step);
      layer_.multiply_active(step.turn, sum, left, w_hh);
      if (step.h_mask != nullptr) {
        const MaskStep<T> masking{step.turn, step.h_mask, dh.template mutable_data_ptr<scalar>()};
        launch_turn(mask_dh<T>, step.turn, layer_.features, masking);
      }
    }

    if (kHasDirect<Cell>) dh.add_(state);
    if (!kIsWide) {
      dh0.copy_(dh);
      if (Cell::has_c) dc0.copy_(state);
    }
  }

  // Where the gradient of a state adds up, from that of its last value on: in `out` if it is wide enough.
  Tensor start(const Tensor& out, const OptionalTensor& last) const {
    const Tensor sum = kIsWide ? out : at::empty(out.sizes(), wide_options_);
    if (last) {
      sum.copy_(*last);
    } else {
      sum.zero_();
    }
    return sum;
  }

  // Columns of a tensor [N, D, slots, H] that belong to one direction and a run of its slots, as [N, count H].
  Tensor slots_of(const Tensor& tensor, int64_t d, int64_t slot, int64_t count) const {
    return tensor.narrow(1, (d * kSlots + slot) * layer_.hidden, count * layer_.hidden);
  }

  // dW_ih = dgates^T x, dW_hh = dgates^T h_{t-1}, dW_hr = dh^T (h before the projection), and the biases' sums.
  void run_weights() const {
    const int64_t hidden = layer_.hidden, features = layer_.features;
    const auto transposed_times = [&](const Tensor& out, const Tensor& a, const Tensor& b) {
      layer_.blas.multiply(Matrix(out), Matrix(a.t()), Matrix(b));
    };
    Tensor sums;
    if (layer_.has_bias) {
      sums = at::empty({layer_.directions * kSlots * hidden}, wide_options_);
      at::sum_out(sums, dgates_, {0}, /*keepdim=*/false, kWide);
    }
    for (const auto d : c10::irange(layer_.directions)) {
      const Tensor* dweight = dweights.data() + d * layer_.weights_per_direction;
      for (const GateRun& run : input_gate_runs<Cell>()) {
        const int64_t first = run.gate * hidden, count = run.count * hidden;
        transposed_times(dweight[0].narrow(0, first, count), slots_of(dgates_, d, run.slot, run.count), layer_.x);
        if (layer_.has_bias) {
          dweight[2].narrow(0, first, count).copy_(sums.narrow(0, (d * kSlots + run.slot) * hidden, count));
        }
      }
      transposed_times(dweight[1], slots_of(dgates_, d, 0, Cell::gates), h_previous_.narrow(1, d * features, features));
      if (layer_.has_bias) dweight[3].copy_(sums.narrow(0, d * kSlots * hidden, Cell::gates * hidden));
      if (layer_.has_projection) {
        transposed_times(dweight[layer_.weights_per_direction - 1], dprojected_.narrow(1, d * features, features),
                         outputs_.narrow(1, d * hidden, hidden));
      }
    }
  }

  // dx = dgates W_ih, over both directions: one product where slots are gates.
  void run_inputs() const {
    const int64_t hidden = layer_.hidden;
    const Tensor w_ih = layer_.all_w_ih.view({layer_.directions * Cell::gates * hidden, layer_.inputs}),
                 dx_rows = dx.view({layer_.rows, layer_.inputs});
    if (kSlots == Cell::gates) return layer_.blas.multiply(Matrix(dx_rows), Matrix(dgates_), Matrix(w_ih));
    const Tensor sum = kIsWide ? dx_rows : at::empty(dx_rows.sizes(), wide_options_);
    bool add = false;
    for (const auto d : c10::irange(layer_.directions)) {
      for (const GateRun& run : input_gate_runs<Cell>()) {
        const Tensor rows_of_w = w_ih.narrow(0, (d * Cell::gates + run.gate) * hidden, run.count * hidden);
        layer_.blas.multiply(Matrix(sum), Matrix(slots_of(dgates_, d, run.slot, run.count)), Matrix(rows_of_w), add);
        add = true;
      }
    }
    if (!kIsWide) dx_rows.copy_(sum);
  }

  const Layer& layer_;
  const bool need_dx_, need_dweights_;
  const at::TensorOptions options_, wide_options_;
  // [N, D slots H], [N, D P], [N, D P], [N, D H]; undefined: not needed
  Tensor dgates_, h_previous_, dprojected_, outputs_;
};

// The ops ------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrent(const Tensor& x, const OptionalTensor& batch_sizes,
                                                     const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                                                     c10::string_view cell, bool keep, const OptionalTensor& h_mask) {
  const at::AutoDispatchBelowADInplaceOrView no_derivatives;  // of the products: the op has its own
  std::tuple<Tensor, Tensor, Tensor, Tensor> result;
  dispatch_cell(cell, [&](auto cell_type) {
    using Cell = decltype(cell_type);
    const RecurrentArguments args = check_recurrent(x, batch_sizes, h0, c0, weights, h_mask, Cell::gates, Cell::has_c);
    const c10::cuda::CUDAGuard device(x.device());
    const Layer layer(args, x, h0, c0, h_mask);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "recurrent",
                                    [&] { result = forward<Cell, scalar_t>(layer, sizes_of_y(args, x), keep); });
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> recurrent_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& x,
    const OptionalTensor& batch_sizes, const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
    c10::string_view cell, const Tensor& y, const Tensor& workspace, bool need_dx, bool need_dweights,
    const OptionalTensor& h_mask) {
  const at::AutoDispatchBelowADInplaceOrView no_derivatives;
  std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> result;
  dispatch_cell(cell, [&](auto cell_type) {
    using Cell = decltype(cell_type);
    const RecurrentArguments args = check_recurrent(x, batch_sizes, h0, c0, weights, h_mask, Cell::gates, Cell::has_c);
    check_recurrent_backward(args, Cell::saved, x, h0, c0, dy, dh_n, dc_n, y, workspace);
    const c10::cuda::CUDAGuard device(x.device());
    const Layer layer(args, x, h0, c0, h_mask);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "recurrent_backward", [&] {
      const Backward<Cell, scalar_t> backward(layer, x.sizes(), need_dx, need_dweights);
      backward.run(dy, dh_n, dc_n, y, workspace);
      result = {backward.dx, backward.dh0, backward.dc0, backward.dweights};
    });
  });
  return result;
}

}  // namespace
}  // namespace nlpkernels

TORCH_LIBRARY_IMPL(nlpkernels, CUDA, m) {
  m.impl("recurrent", TORCH_FN(nlpkernels::recurrent));
  m.impl("recurrent_backward", TORCH_FN(nlpkernels::recurrent_backward));
}
