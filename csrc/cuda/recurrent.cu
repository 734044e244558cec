// The time loop of RNN, LSTM and GRU on CUDA, forward and backward. One call is one layer, all steps, both directions,
// one direction after the other, on the caller's stream. Nothing here waits for the device.
//
// Forward of one direction:
//   from_x = x W_ih^T                       one product for all steps
//   for each step:
//     from_h = h_{t-1} W_hh^T               one product
//     h_t, c_t = cell(from_x + from_h + b)  one kernel, which also stores y_t and what backward needs
//   (with a projection, h_t = W_hr (what the cell gave): another product)
//
// Backward walks the steps the other way: dh_{t-1} = dgates W_hh. It stores dgates of all rows, and beside them
// h_{t-1}, and with a projection the two factors of dW_hr, so that the gradients of the weights and of x are large
// products.
//
// Products are torch's own and obey its flags (TF32). Of bfloat16 and float16 they take operands as they are and give
// float, so that gates, c, and the sums over time of dh and dc never leave float; h and dgates are rounded to the
// tensors' dtype where a product reads them.
//
// Step t holds the first active[t] sequences, in rows [first_row[t], first_row[t] + active[t]). Those that are not
// active keep their h and c: in packed data, the forward direction leaves sequences behind as it walks, and the reverse
// direction takes them up, from h0 and c0.
//
// Letters are those of library.cpp; pointers to the rows of one step and direction are documented as [active, columns].
#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../cells.h"
#include "../checks.h"
#include "common.cuh"

namespace nlpkernels {
namespace {

// Kernels ------------------------------------------------------------------------------------------------------------

template <typename T>
struct ForwardStep {
  int64_t active, hidden, y_stride;
  const acc_t<T>*from_x, *from_h;  // [active, G H]
  const T *b_ih, *b_hh;            // [G H], or nullptr
  acc_t<T>* state;                 // [active, H]: c_{t-1}, which becomes c_t; of cells without c, h
  T* h;                            // [active, H]: h_t, for the next product; where T is acc_t<T> it may be `state`
  T* y;                            // [active, H], rows y_stride apart: h_t again; nullptr with a projection
  T* workspace;                    // [active, S, H], or nullptr
};

template <typename Cell, typename T>
__global__ void __launch_bounds__(kThreads) forward_step(const ForwardStep<T> step) {
  using scalar = acc_t<T>;
  const int64_t b = row_of_thread(), hidden = step.hidden;
  if (b >= step.active) return;
  for (int64_t j = first_column(); j < hidden; j += column_step()) {
    scalar a[Cell::slots], saved[Cell::saved > 0 ? Cell::saved : 1];
#pragma unroll
    for (int slot = 0; slot < Cell::slots; ++slot) a[slot] = scalar(0);
#pragma unroll
    for (int gate = 0; gate < Cell::gates; ++gate) {
      const int64_t column = gate * hidden + j, at = b * Cell::gates * hidden + column;
      scalar from_x = step.from_x[at], from_h = step.from_h[at];
      if (step.b_ih != nullptr) {
        from_x += static_cast<scalar>(step.b_ih[column]);
        from_h += static_cast<scalar>(step.b_hh[column]);
      }
      a[Cell::input_slot(gate)] += from_x;
      a[gate] += from_h;
    }
    scalar state = step.state[b * hidden + j], h;
    if constexpr (Cell::has_c) {
      h = Cell::forward(a, scalar(0), state, saved);
    } else {
      scalar c(0);
      h = Cell::forward(a, state, c, saved);
      state = h;
    }
    step.state[b * hidden + j] = state;
    step.h[b * hidden + j] = static_cast<T>(h);
    if (step.y != nullptr) step.y[b * step.y_stride + j] = static_cast<T>(h);
    if (step.workspace != nullptr) {
#pragma unroll
      for (int s = 0; s < Cell::saved; ++s) {
        step.workspace[(b * Cell::saved + s) * hidden + j] = static_cast<T>(saved[s]);
      }
    }
  }
}

// Sequences from `previous` on have no step before this one, and come from h0 and c0.
template <typename T>
struct BackwardStep {
  int64_t active, previous, hidden, features, y_stride;
  const T* dy;                              // [active, P], rows y_stride apart; or nullptr
  const acc_t<T>* dh;                       // [active, H]: dL/dh_t, but for dy and `direct`
  acc_t<T>* direct;                         // [active, H], GRU: what passed W_hh by; this step's takes its place
  acc_t<T>* dc;                             // [active, H], LSTM: dL/dc_t without h_t's share becomes dL/dc_{t-1}
  const T *y, *y_previous, *h0;             // [active, P], rows of y and y_previous y_stride apart
  const T *workspace, *previous_workspace;  // [active, S, H]
  const T* c0;                              // [active, H], LSTM
  T* dgates;                                // [active, slots, H]
  T* h_previous;                            // [active, P]: h_{t-1}, for dW_hh; or nullptr
  T* outputs;                               // [active, H]: h_t before the projection, for dW_hr; or nullptr
};

// Only the GRU's h_t depends on h_{t-1} in a way that does not pass through W_hh.
template <typename Cell>
constexpr bool kHasDirect = std::is_same_v<Cell, Gru>;

template <typename Cell, typename T>
__global__ void __launch_bounds__(kThreads) backward_step(const BackwardStep<T> step) {
  using scalar = acc_t<T>;
  const int64_t b = row_of_thread(), hidden = step.hidden;
  if (b >= step.active) return;
  const bool has_previous = b < step.previous;
  const T* h_before = has_previous ? step.y_previous + b * step.y_stride : step.h0 + b * step.features;
  for (int64_t j = first_column(); j < hidden || j < step.features; j += column_step()) {
    if (step.h_previous != nullptr && j < step.features) step.h_previous[b * step.features + j] = h_before[j];
    if (j >= hidden) continue;
    const int64_t at = b * hidden + j;
    scalar saved[Cell::saved > 0 ? Cell::saved : 1], da[Cell::slots], h(0), h_prev(0), c_prev(0), dc(0);
#pragma unroll
    for (int s = 0; s < Cell::saved; ++s) {
      saved[s] = static_cast<scalar>(step.workspace[(b * Cell::saved + s) * hidden + j]);
    }
    if constexpr (Cell::has_c) {
      const T* c_before =
          has_previous ? step.previous_workspace + (b * Cell::saved + Cell::saved_c) * hidden : step.c0 + b * hidden;
      c_prev = static_cast<scalar>(c_before[j]);
      dc = step.dc[at];
      if (step.outputs != nullptr) step.outputs[at] = static_cast<T>(Cell::output(saved));
    } else {
      h = static_cast<scalar>(step.y[b * step.y_stride + j]);
      h_prev = static_cast<scalar>(h_before[j]);
    }
    scalar dh = step.dh[at];
    if constexpr (kHasDirect<Cell>) dh += step.direct[at];
    if (step.dy != nullptr) dh += static_cast<scalar>(step.dy[b * step.y_stride + j]);
    const scalar direct = Cell::backward(saved, h, h_prev, c_prev, dh, dc, da);
    if constexpr (kHasDirect<Cell>) step.direct[at] = direct;
    if constexpr (Cell::has_c) step.dc[at] = dc;
#pragma unroll
    for (int slot = 0; slot < Cell::slots; ++slot) {
      step.dgates[(b * Cell::slots + slot) * hidden + j] = static_cast<T>(da[slot]);
    }
  }
}

// out = dh + dy: [rows, columns], of which only dy has rows further apart.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_dy(int64_t rows, int64_t columns, const acc_t<T>* dh, const T* dy, int64_t dy_stride, T* out) {
  const int64_t b = row_of_thread();
  if (b >= rows) return;
  for (int64_t j = first_column(); j < columns; j += column_step()) {
    const acc_t<T> from_y = dy != nullptr ? static_cast<acc_t<T>>(dy[b * dy_stride + j]) : acc_t<T>(0);
    out[b * columns + j] = static_cast<T>(dh[b * columns + j] + from_y);
  }
}

// Shared by forward and backward
// ---------------------------------------------------------------------------------------

// out = a b, accumulated in float at least. out is a view, and is written where it lies.
void multiply(Tensor out, const Tensor& a, const Tensor& b) {
  if (out.scalar_type() == a.scalar_type()) {
    at::mm_out(out, a, b);
  } else {
    at::mm_out(out, a, b, out.scalar_type());
  }
}

// sum += a b
void add_product(Tensor sum, const Tensor& a, const Tensor& b) {
  if (sum.scalar_type() == a.scalar_type()) {
    at::addmm_out(sum, sum, a, b);
  } else {
    const Tensor product = at::empty(sum.sizes(), sum.options());
    multiply(product, a, b);
    sum.add_(product);
  }
}

// The arguments, contiguous, with x as [N, I]. Direction 1 runs from the last step to the first; "previous" is meant in
// the direction's own order.
struct Layer : RecurrentArguments {
  Layer(const RecurrentArguments& args, const Tensor& x, const Tensor& h0, const OptionalTensor& c0)
      : RecurrentArguments(args),
        x(x.reshape({args.rows, args.inputs}).contiguous()),
        h0(h0.contiguous()),
        c0(contiguous(c0)) {
    for (const Tensor& weight : args.weights) weight_storage.push_back(weight.contiguous());
    weights = weight_storage;
  }

  Tensor x, h0;
  OptionalTensor c0;
  std::vector<Tensor> weight_storage;

  int64_t step(int64_t direction, int64_t i) const { return direction == 0 ? i : steps - 1 - i; }
  int64_t step_before(int64_t direction, int64_t t) const { return direction == 0 ? t - 1 : t + 1; }

  // How many sequences of step t were active in the step before.
  int64_t previous(int64_t direction, int64_t t) const {
    const int64_t before = step_before(direction, t);
    return before >= 0 && before < steps ? std::min(active[t], active[before]) : 0;
  }

  // The rows of step t of a tensor [N, ...].
  Tensor rows_of(const Tensor& tensor, int64_t t) const { return tensor.narrow(0, first_row[t], active[t]); }
};

// The data of a tensor [D, ...] that belongs to one direction, or of an argument that is not there nullptr.
template <typename T>
const T* of_direction(const OptionalTensor& tensor, int64_t d) {
  return tensor ? tensor->const_data_ptr<T>() + d * (tensor->numel() / tensor->size(0)) : nullptr;
}

// Forward ------------------------------------------------------------------------------------------------------------

template <typename Cell, typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Layer& layer, at::IntArrayRef y_sizes, bool keep) {
  using scalar = acc_t<T>;
  constexpr auto wide = c10::CppTypeToScalarType<scalar>::value;
  const int64_t hidden = layer.hidden, features = layer.features, gate_rows = Cell::gates * hidden;
  const int64_t y_stride = layer.directions * features;
  const auto options = layer.x.options();

  const Tensor y = at::empty(y_sizes, options);
  const Tensor y_rows = y.view({layer.rows, layer.directions, features});
  // The states that the steps work on are those that are returned.
  const Tensor h_n = layer.h0.clone(at::MemoryFormat::Contiguous);
  const Tensor c_n = Cell::has_c ? layer.c0->clone(at::MemoryFormat::Contiguous) : at::empty({0}, options);
  const Tensor workspace =
      keep ? at::empty({layer.directions, layer.rows, Cell::saved, hidden}, options) : at::empty({0}, options);
  T* kept = workspace.numel() > 0 ? workspace.mutable_data_ptr<T>() : nullptr;

  const Tensor from_x = at::empty({layer.rows, gate_rows}, options.dtype(wide));
  const Tensor from_h = at::empty({layer.batch, gate_rows}, options.dtype(wide));
  const Tensor unprojected = layer.has_projection ? at::empty({layer.batch, hidden}, options) : Tensor();
  for (const auto d : c10::irange(layer.directions)) {
    const Tensor h = h_n.select(0, d);
    const Tensor own_state = Cell::has_c ? c_n.select(0, d) : h;
    const Tensor state = own_state.to(wide);  // itself, but of bfloat16 and float16
    const Tensor w_hh = layer.w_hh(d).t();
    multiply(from_x, layer.x, layer.w_ih(d).t());

    ForwardStep<T> step{};
    step.hidden = hidden;
    step.y_stride = y_stride;
    step.from_h = from_h.const_data_ptr<scalar>();
    step.b_ih = layer.has_bias ? layer.b_ih(d).template const_data_ptr<T>() : nullptr;
    step.b_hh = layer.has_bias ? layer.b_hh(d).template const_data_ptr<T>() : nullptr;
    step.state = state.mutable_data_ptr<scalar>();
    step.h = (layer.has_projection ? unprojected : h).template mutable_data_ptr<T>();
    for (const auto i : c10::irange(layer.steps)) {
      const int64_t t = layer.step(d, i), active = layer.active[t], first_row = layer.first_row[t];
      if (active == 0) continue;
      multiply(from_h.narrow(0, 0, active), h.narrow(0, 0, active), w_hh);
      step.active = active;
      step.from_x = from_x.const_data_ptr<scalar>() + first_row * gate_rows;
      step.y = layer.has_projection ? nullptr : y.mutable_data_ptr<T>() + first_row * y_stride + d * features;
      step.workspace = kept != nullptr ? kept + (d * layer.rows + first_row) * Cell::saved * hidden : nullptr;
      launch(forward_step<Cell, T>, rows_by_columns(active, hidden), step);
      if (layer.has_projection) {
        multiply(h.narrow(0, 0, active), unprojected.narrow(0, 0, active), layer.w_hr(d).t());
        layer.rows_of(y_rows, t).select(1, d).copy_(h.narrow(0, 0, active));
      }
    }
    if (Cell::has_c && !state.is_same(own_state)) own_state.copy_(state);
  }
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
  Backward(const Layer& layer, at::IntArrayRef x_sizes, const OptionalTensor& dy, const OptionalTensor& dh_n,
           const OptionalTensor& dc_n, const Tensor& y, const Tensor& workspace, bool need_dx, bool need_dweights)
      : layer_(layer),
        dy_(contiguous(dy)),
        dh_n_(dh_n),
        dc_n_(dc_n),
        y_(y.contiguous()),
        workspace_(workspace.contiguous()),
        need_dx_(need_dx),
        need_dweights_(need_dweights),
        options_(layer.x.options()),
        wide_options_(options_.dtype(kWide)) {
    dx = at::empty(need_dx ? x_sizes : at::IntArrayRef({0}), options_);
    dh0 = at::empty(layer.h0.sizes(), options_);
    dc0 = at::empty(Cell::has_c ? layer.c0->sizes() : at::IntArrayRef({0}), options_);
    for (const Tensor& weight : layer.weights) {
      dweights.push_back(at::empty(need_dweights ? weight.sizes() : at::IntArrayRef({0}), options_));
    }
    const int64_t rows = layer.rows;
    dgates_ = at::empty({rows, kSlots * layer.hidden}, options_);
    if (need_dweights) h_previous_ = at::empty({rows, layer.features}, options_);
    if (layer.has_projection) {
      dprojected_ = at::empty({rows, layer.features}, options_);
      if (need_dweights) outputs_ = at::empty({rows, layer.hidden}, options_);
    }
    if (need_dx) {
      const Tensor dx_rows = dx.view({rows, layer.inputs});
      dx_sum_ = kIsWide ? dx_rows : at::empty(dx_rows.sizes(), wide_options_);
    }
  }

  Tensor dx, dh0, dc0;
  std::vector<Tensor> dweights;

  // Directions share the buffers that hold a value for each row.
  void run() {
    for (const auto d : c10::irange(layer_.directions)) {
      run_steps(d);
      if (need_dweights_) run_weights(d);
      if (need_dx_) run_inputs(d);
    }
    if (need_dx_ && !kIsWide) dx.view(dx_sum_.sizes()).copy_(dx_sum_);
  }

 private:
  // dgates of all rows of one direction, and its dh0, dc0.
  void run_steps(int64_t d) {
    const int64_t batch = layer_.batch, hidden = layer_.hidden, features = layer_.features, saved = Cell::saved;
    const int64_t gate_rows = Cell::gates * hidden, y_stride = layer_.directions * features;
    const Tensor dh = start(dh0.select(0, d), dh_n_, d);
    const Tensor dc = Cell::has_c ? start(dc0.select(0, d), dc_n_, d) : Tensor();
    const Tensor direct = kHasDirect<Cell> ? at::zeros({batch, hidden}, wide_options_) : Tensor();
    const Tensor unprojected = layer_.has_projection ? at::empty({batch, hidden}, wide_options_) : Tensor();
    const T* y = y_.template const_data_ptr<T>() + d * features;
    const T* workspace = workspace_.template const_data_ptr<T>() + d * layer_.rows * saved * hidden;
    const T* all_dy = dy_ ? dy_->template const_data_ptr<T>() + d * features : nullptr;

    BackwardStep<T> step{};
    step.hidden = hidden;
    step.features = features;
    step.y_stride = y_stride;
    step.dh = (layer_.has_projection ? unprojected : dh).template const_data_ptr<scalar>();
    step.direct = kHasDirect<Cell> ? direct.mutable_data_ptr<scalar>() : nullptr;
    step.dc = Cell::has_c ? dc.mutable_data_ptr<scalar>() : nullptr;
    step.h0 = of_direction<T>(layer_.h0, d);
    step.c0 = of_direction<T>(layer_.c0, d);
    for (int64_t i = layer_.steps - 1; i >= 0; --i) {
      const int64_t t = layer_.step(d, i), active = layer_.active[t], first_row = layer_.first_row[t];
      if (active == 0) continue;
      const T* dy = all_dy != nullptr ? all_dy + first_row * y_stride : nullptr;
      step.active = active;
      step.previous = layer_.previous(d, t);
      const int64_t previous_row = step.previous > 0 ? layer_.first_row[layer_.step_before(d, t)] : 0;
      step.y = y + first_row * y_stride;
      step.y_previous = y + previous_row * y_stride;
      step.workspace = workspace + first_row * saved * hidden;
      step.previous_workspace = workspace + previous_row * saved * hidden;
      step.dgates = dgates_.template mutable_data_ptr<T>() + first_row * kSlots * hidden;
      step.h_previous = row_or_null(h_previous_, first_row);
      step.outputs = row_or_null(outputs_, first_row);
      if (layer_.has_projection) {
        launch(add_dy<T>, rows_by_columns(active, features), active, features, dh.template const_data_ptr<scalar>(), dy,
               y_stride, row_or_null(dprojected_, first_row));
        multiply(unprojected.narrow(0, 0, active), layer_.rows_of(dprojected_, t), layer_.w_hr(d));
      } else {
        step.dy = dy;
      }
      launch(backward_step<Cell, T>, rows_by_columns(active, std::max(hidden, features)), step);
      multiply(dh.narrow(0, 0, active), layer_.rows_of(dgates_, t).narrow(1, 0, gate_rows), layer_.w_hh(d));
    }

    if (kHasDirect<Cell>) dh.add_(direct);
    if (!kIsWide) {
      dh0.select(0, d).copy_(dh);
      if (Cell::has_c) dc0.select(0, d).copy_(dc);
    }
  }

  // Where the gradient of a state adds up, from that of its last value on: in `out` if it is wide enough.
  Tensor start(const Tensor& out, const OptionalTensor& last, int64_t d) const {
    const Tensor sum = kIsWide ? out : at::empty(out.sizes(), wide_options_);
    if (last) {
      sum.copy_(last->select(0, d));
    } else {
      sum.zero_();
    }
    return sum;
  }

  static T* row_or_null(const Tensor& tensor, int64_t row) {
    return tensor.defined() ? tensor.template mutable_data_ptr<T>() + row * tensor.size(1) : nullptr;
  }

  // dW_ih = dgates^T x, dW_hh = dgates^T h_{t-1}, dW_hr = dh^T (h before the projection), and the biases' sums.
  void run_weights(int64_t d) const {
    const int64_t hidden = layer_.hidden, gate_rows = Cell::gates * hidden;
    const Tensor* dweight = dweights.data() + d * layer_.weights_per_direction;
    for (const GateRun& run : input_gate_runs<Cell>()) {
      multiply(dweight[0].narrow(0, run.gate * hidden, run.count * hidden),
               dgates_.narrow(1, run.slot * hidden, run.count * hidden).t(), layer_.x);
    }
    multiply(dweight[1], dgates_.narrow(1, 0, gate_rows).t(), h_previous_);
    if (layer_.has_bias) {
      Tensor sums = at::empty({kSlots * hidden}, wide_options_);
      at::sum_out(sums, dgates_, {0}, /*keepdim=*/false, kWide);
      for (const GateRun& run : input_gate_runs<Cell>()) {
        dweight[2]
            .narrow(0, run.gate * hidden, run.count * hidden)
            .copy_(sums.narrow(0, run.slot * hidden, run.count * hidden));
      }
      dweight[3].copy_(sums.narrow(0, 0, gate_rows));
    }
    if (layer_.has_projection) multiply(dweight[layer_.weights_per_direction - 1], dprojected_.t(), outputs_);
  }

  // dx = dgates W_ih, over both directions; the first product is not added to what is not there.
  void run_inputs(int64_t d) const {
    const int64_t hidden = layer_.hidden;
    bool is_first = d == 0;
    for (const GateRun& run : input_gate_runs<Cell>()) {
      const Tensor dgates = dgates_.narrow(1, run.slot * hidden, run.count * hidden);
      const Tensor w_ih = layer_.w_ih(d).narrow(0, run.gate * hidden, run.count * hidden);
      if (is_first) {
        multiply(dx_sum_, dgates, w_ih);
      } else {
        add_product(dx_sum_, dgates, w_ih);
      }
      is_first = false;
    }
  }

  const Layer& layer_;
  const OptionalTensor dy_, dh_n_, dc_n_;
  const Tensor y_, workspace_;
  const bool need_dx_, need_dweights_;
  const at::TensorOptions options_, wide_options_;
  Tensor dgates_, h_previous_, dprojected_, outputs_;  // [N, slots H], [N, P], [N, P], [N, H]; undefined: not needed
  Tensor dx_sum_;                                      // [N, I]
};

// The ops ------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrent(const Tensor& x, const OptionalTensor& batch_sizes,
                                                     const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                                                     c10::string_view cell, bool keep) {
  const at::AutoDispatchBelowADInplaceOrView no_derivatives;  // of the products: the op has its own
  std::tuple<Tensor, Tensor, Tensor, Tensor> result;
  dispatch_cell(cell, [&](auto cell_type) {
    using Cell = decltype(cell_type);
    const RecurrentArguments args = check_recurrent(x, batch_sizes, h0, c0, weights, Cell::gates, Cell::has_c);
    const c10::cuda::CUDAGuard device(x.device());
    const Layer layer(args, x, h0, c0);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "recurrent",
                                    [&] { result = forward<Cell, scalar_t>(layer, sizes_of_y(args, x), keep); });
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> recurrent_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& x,
    const OptionalTensor& batch_sizes, const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
    c10::string_view cell, const Tensor& y, const Tensor& workspace, bool need_dx, bool need_dweights) {
  const at::AutoDispatchBelowADInplaceOrView no_derivatives;
  std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> result;
  dispatch_cell(cell, [&](auto cell_type) {
    using Cell = decltype(cell_type);
    const RecurrentArguments args = check_recurrent(x, batch_sizes, h0, c0, weights, Cell::gates, Cell::has_c);
    check_recurrent_backward(args, Cell::saved, x, h0, c0, dy, dh_n, dc_n, y, workspace);
    const c10::cuda::CUDAGuard device(x.device());
    const Layer layer(args, x, h0, c0);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "recurrent_backward", [&] {
      Backward<Cell, scalar_t> backward(layer, x.sizes(), dy, dh_n, dc_n, y, workspace, need_dx, need_dweights);
      backward.run();
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
