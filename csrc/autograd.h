// The ops with their derivatives for eager calls: in Python these would take longer than the kernels of a small call.
//
// Reverse mode only; backward consists of ops, so that it can be differentiated again. Forward mode, torch.func and
// torch.compile go by nlpkernels/_ops.py, which has the same formulas.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_and_tensors.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/irange.h>
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"

namespace nlpkernels {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An op of library.cpp as a function.
template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("nlpkernels::") + name).c_str(), "")
      .typed<Signature>();
}

using Context = torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

inline bool requires_grad(const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); }

// Whether forward mode carries a tangent along with one of these.
inline bool has_tangent(at::TensorList tensors) {
  for (const Tensor& tensor : tensors) {
    if (tensor.defined() && tensor._fw_grad(/*level=*/0).defined()) return true;
  }
  return false;
}

// Past the dispatcher's autograd, which is in Python, in a backward that nobody will differentiate: not by a graph of
// it, not by torch.func, and not by forward mode, which differentiates a graph that was made before it began.
class BackwardGuard {
 public:
  BackwardGuard(at::TensorList grads, at::TensorList saved) {
    const bool is_transformed =
        c10::impl::tls_is_dispatch_key_included(at::DispatchKey::FuncTorchDynamicLayerFrontMode);
    if (!at::GradMode::is_enabled() && !is_transformed && !has_tangent(grads) && !has_tangent(saved)) {
      below_autograd_.emplace();
    }
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd_;
};

// Recurrent layers ----------------------------------------------------------------------------------------------------

inline std::tuple<Tensor, Tensor, Tensor, Tensor> call_recurrent(const Tensor& x, const OptionalTensor& batch_sizes,
                                                                 const Tensor& h0, const OptionalTensor& c0,
                                                                 at::TensorList weights, c10::string_view cell,
                                                                 bool keep, const OptionalTensor& h_mask) {
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, const Tensor&,
                                                               const OptionalTensor&, at::TensorList, c10::string_view,
                                                               bool, const OptionalTensor&);
  static const auto recurrent = op<Signature>("recurrent");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return recurrent.call(x, batch_sizes, h0, c0, weights, cell, keep, h_mask);
}

// Arguments: first those that have gradients.
class RecurrentFunction : public torch::autograd::Function<RecurrentFunction> {
 public:
  static variable_list forward(Context* ctx, const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
                               at::TensorList weights, const OptionalTensor& batch_sizes, const OptionalTensor& h_mask,
                               const std::string& cell) {
    const auto [y, h_n, c_n, workspace] = call_recurrent(x, batch_sizes, h0, c0, weights, cell, true, h_mask);
    ctx->set_materialize_grads(false);
    variable_list saved{x, h0,       c0.value_or(Tensor()), batch_sizes.value_or(Tensor()), h_mask.value_or(Tensor()),
                        y, workspace};
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["cell"] = cell;
    return c0 ? variable_list{y, h_n, c_n} : variable_list{y, h_n};
  }

  static variable_list backward(Context* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor c0 = optional(saved[2]);
    const at::TensorList weights = at::TensorList(saved).slice(kSaved);
    const size_t first_weight = c0 ? 3 : 2;
    bool need_dweights = false;
    for (const auto i : c10::irange(weights.size())) need_dweights |= ctx->needs_input_grad(first_weight + i);
    const BackwardGuard guard(grads, saved);
    // y and workspace are functions of the other arguments: what differentiates this anew goes by those.
    using Signature = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>(
        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
        const Tensor&, const OptionalTensor&, at::TensorList, c10::string_view, const Tensor&, const Tensor&, bool,
        bool, const OptionalTensor&);
    static const auto recurrent_backward = op<Signature>("recurrent_backward");
    const bool need_dx = ctx->needs_input_grad(0);
    auto [dx, dh0, dc0, dweights] = recurrent_backward.call(
        optional(grads[0]), optional(grads[1]), c0 ? optional(grads[2]) : std::nullopt, saved[0], optional(saved[3]),
        saved[1], c0, weights, ctx->saved_data["cell"].toStringRef(), saved[5].detach(), saved[6].detach(), need_dx,
        need_dweights, optional(saved[4]));
    variable_list result{need_dx ? dx : Tensor(), dh0, c0 ? dc0 : Tensor()};
    for (Tensor& dweight : dweights) result.push_back(need_dweights ? std::move(dweight) : Tensor());
    result.resize(result.size() + 3);  // batch_sizes, h_mask, cell
    return result;
  }

 private:
  static constexpr size_t kSaved = 7;  // tensors before the weights
};

inline variable_list recurrent(const Tensor& x, const OptionalTensor& batch_sizes, const Tensor& h0,
                               const OptionalTensor& c0, const variable_list& weights, const std::string& cell,
                               const OptionalTensor& h_mask) {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled() || !requires_grad(h_mask),
                              "recurrent: h_mask has no gradient: expected one that requires none");
  bool wants_derivative = x.requires_grad() || h0.requires_grad() || requires_grad(c0);
  for (const Tensor& weight : weights) wants_derivative |= weight.requires_grad();
  if (at::GradMode::is_enabled() && wants_derivative) {
    // What was made in inference mode cannot be saved for backward; torch.nn's layers take it too.
    const auto savable = [](const Tensor& tensor) { return tensor.is_inference() ? tensor.clone() : tensor; };
    const auto if_any = [&](const OptionalTensor& tensor) { return tensor ? savable(*tensor) : OptionalTensor(); };
    variable_list results = RecurrentFunction::apply(savable(x), savable(h0), if_any(c0), at::TensorList(weights),
                                                     if_any(batch_sizes), if_any(h_mask), cell);
    if (!c0) results.push_back(at::empty({0}, x.options()));
    return results;
  }
  auto [y, h_n, c_n, workspace] = call_recurrent(x, batch_sizes, h0, c0, weights, cell, false, h_mask);
  return {y, h_n, c_n};
}

inline bool has_matrices(const variable_list& weights) {
  return weights.size() >= 2 && weights[0].dim() == 2 && weights[1].dim() == 2;
}

inline bool has_states(const variable_list& states, const std::string& cell) {
  return states.size() == (cell == "lstm" ? 2 : 1);
}

inline bool has_shape(const Tensor& tensor, std::initializer_list<c10::SymInt> shape) {
  return tensor.sym_sizes() == c10::SymIntArrayRef(shape.begin(), shape.size());
}

// What no kernel takes, and Python has an answer to: torch's own layers, or an error that says what to do.
inline bool is_for_python(const Tensor& x) { return x.is_complex() || x.is_nested(); }

// One step of a cell: x [B, I] and states (h,) or (h, c), [B, H], or nothing for zeros, to such states. Nothing where
// shapes are others, or there are no hidden units.
inline std::optional<variable_list> recurrent_step(const Tensor& x, std::optional<variable_list> states,
                                                   const variable_list& weights, const std::string& cell) {
  if (is_for_python(x) || !has_matrices(weights) || x.dim() != 2 || x.sym_size(1) != weights[0].sym_size(1)) {
    return std::nullopt;
  }
  const bool has_c = cell == "lstm";
  const c10::SymInt batch = x.sym_size(0), features = weights[1].sym_size(1);
  if (!states) states.emplace(has_c ? 2 : 1, x.new_zeros_symint({batch, features}));
  if (features == 0 || !has_states(*states, cell)) return std::nullopt;
  for (const Tensor& state : *states) {
    if (!has_shape(state, {batch, features})) return std::nullopt;
  }
  auto results =
      recurrent(x, std::nullopt, states->at(0).unsqueeze(0),
                has_c ? OptionalTensor(states->at(1).unsqueeze(0)) : std::nullopt, weights, cell, std::nullopt);
  if (!has_c) return variable_list{results[0]};
  // Not as a view, of which detach_() would be refused.
  return variable_list{results[0], at::_unsafe_view_symint(results[2], {batch, results[2].sym_size(2)})};
}

// A function of tensors as one that Python may hand anything: nothing for what is no tensor or one of a subclass, which
// may have ways of its own, and for what torch.jit is tracing.
template <typename... Settings>
auto of_plain_tensors(std::optional<variable_list> (*function)(const Tensor&, std::optional<variable_list>,
                                                               const variable_list&, Settings...)) {
  return [function](pybind11::object x, pybind11::object states, pybind11::list weights,
                    Settings... settings) -> std::optional<variable_list> {
    const auto is_plain = [](pybind11::handle tensor) { return THPVariable_CheckExact(tensor.ptr()); };
    if (!is_plain(x)) return std::nullopt;
    if (!states.is_none()) {
      if (!PyTuple_Check(states.ptr()) && !PyList_Check(states.ptr())) return std::nullopt;
      for (const auto& state : states) {
        if (!is_plain(state)) return std::nullopt;
      }
    }
    for (const auto& weight : weights) {
      if (!is_plain(weight)) return std::nullopt;
    }
    if (c10::impl::tls_is_dispatch_key_included(at::DispatchKey::Tracer)) return std::nullopt;
    const auto input = x.cast<Tensor>();
    auto initial = states.cast<std::optional<variable_list>>();
    const auto parameters = weights.cast<variable_list>();
    const pybind11::gil_scoped_release no_gil;
    return function(input, std::move(initial), parameters, settings...);
  };
}

// One layer that only runs; nothing of what requires a gradient.
inline std::optional<variable_list> recurrent_frozen(const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
                                                     at::TensorList weights, const std::string& cell) {
  if (at::GradMode::is_enabled() && (x.requires_grad() || h0.requires_grad() || requires_grad(c0))) return std::nullopt;
  using Signature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, const Tensor&,
                                                       const OptionalTensor&, at::TensorList, c10::string_view);
  static const auto frozen = op<Signature>("recurrent_frozen");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto [y, h_n, c_n] = frozen.call(x, std::nullopt, h0, c0, weights, cell);
  return variable_list{y, h_n, c_n};
}

// All layers over input [T, B, I], or [B, T, I] if batch_first, from states (h_0,) or (h_0, c_0), or nothing for zeros:
// output, h_n and, if there is one, c_n. Nothing where shapes are others, or dtypes differ, or what is frozen would
// need a gradient.
inline std::optional<variable_list> recurrent_layers(const Tensor& input, std::optional<variable_list> given,
                                                     const variable_list& weights, const std::string& cell,
                                                     int64_t layers, int64_t directions, bool batch_first,
                                                     bool is_frozen) {
  if (is_for_python(input) || !has_matrices(weights) || input.dim() != 3 ||
      input.scalar_type() != weights[0].scalar_type() || input.sym_size(2) != weights[0].sym_size(1) || layers < 1) {
    return std::nullopt;
  }
  Tensor x = batch_first ? input.transpose(0, 1) : input;
  const bool has_c = cell == "lstm";
  const c10::SymInt rows = layers * directions, batch = x.sym_size(1), features = weights[1].sym_size(1),
                    hidden = has_c ? weights[1].sym_size(0) / 4 : features;
  variable_list states;
  if (given) {
    states = std::move(*given);
  } else {
    states.push_back(x.new_zeros_symint({rows, batch, features}));
    if (has_c) states.push_back(hidden == features ? states[0] : x.new_zeros_symint({rows, batch, hidden}));
  }
  if (!has_states(states, cell) || !has_shape(states[0], {rows, batch, features})) return std::nullopt;
  if (has_c && !has_shape(states[1], {rows, batch, hidden})) return std::nullopt;
  const auto per_layer = static_cast<int64_t>(weights.size()) / layers;
  variable_list h_n, c_n;
  for (const auto layer : c10::irange(layers)) {
    const auto own = [&](const Tensor& state) {
      return layers == 1 ? state : state.narrow(0, layer * directions, directions);
    };
    const auto first = weights.begin() + layer * per_layer;
    const Tensor h0 = own(states[0]);
    const OptionalTensor c0 = has_c ? OptionalTensor(own(states[1])) : std::nullopt;
    const variable_list own_weights{first, first + per_layer};
    auto ran = is_frozen ? recurrent_frozen(x, h0, c0, own_weights, cell)
                         : recurrent(x, std::nullopt, h0, c0, own_weights, cell, std::nullopt);
    if (!ran) return std::nullopt;
    variable_list& results = *ran;
    x = std::move(results[0]);
    h_n.push_back(std::move(results[1]));
    c_n.push_back(std::move(results[2]));
  }
  const auto joined = [&](const variable_list& finals) { return layers == 1 ? finals[0] : at::cat(finals); };
  variable_list results{batch_first ? x.transpose(0, 1) : x, joined(h_n)};
  if (has_c) results.push_back(joined(c_n));
  return results;
}

// Frozen layers -------------------------------------------------------------------------------------------------------

// All layers of x [T, B, I], or [B, T, I] if batch_first, or [T, I] from states without a batch; or one step of a cell:
// x [B, I] and states [B, H]. From states (h_0,) or (h_0, c_0), or nothing for zeros, to output, h_n and, if there is
// one, c_n; of a cell to its new states.
inline std::optional<variable_list> frozen_layers(const Tensor& input, std::optional<variable_list> given,
                                                  const variable_list& weights, const std::string& cell,
                                                  int64_t directions, bool batch_first, bool is_cell, int64_t inputs,
                                                  int64_t hidden, int64_t features) {
  const bool has_c = cell == "lstm";
  if (input.dim() != (is_cell ? 2 : 3) || input.scalar_type() != at::kFloat || !input.is_cpu() ||
      input.sym_size(input.dim() - 1) != inputs || (at::GradMode::is_enabled() && input.requires_grad())) {
    return std::nullopt;
  }
  const Tensor x = batch_first ? input.transpose(0, 1) : input;
  const c10::SymInt rows = static_cast<int64_t>(weights.size()) / 2, batch = x.sym_size(is_cell ? 0 : 1);
  variable_list states;
  if (given) {
    if (!has_states(*given, cell)) return std::nullopt;
    for (const auto i : c10::irange(given->size())) {
      const Tensor& state = given->at(i);
      const c10::SymInt width = i == 0 ? features : hidden;
      if (state.scalar_type() != at::kFloat || (at::GradMode::is_enabled() && state.requires_grad()) ||
          !(is_cell ? has_shape(state, {batch, width}) : has_shape(state, {rows, batch, width}))) {
        return std::nullopt;
      }
      states.push_back(is_cell ? state.unsqueeze(0) : state);
    }
  } else {
    states.push_back(x.new_zeros_symint({rows, batch, features}));
    if (has_c) states.push_back(hidden == features ? states[0] : x.new_zeros_symint({rows, batch, hidden}));
  }
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&, const Tensor&,
                                                               const OptionalTensor&, at::TensorList, c10::string_view,
                                                               int64_t, bool);
  static const auto frozen = op<Signature>("frozen");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto [y, h_n, c_n, c] = frozen.call(x, std::nullopt, states[0], has_c ? OptionalTensor(states[1]) : std::nullopt,
                                      weights, cell, directions, /*keep=*/false);
  if (is_cell) {
    if (!has_c) return variable_list{y};
    return variable_list{y, at::_unsafe_view_symint(c_n, {batch, c_n.sym_size(2)})};
  }
  variable_list results{batch_first ? y.transpose(0, 1) : y, h_n};
  if (has_c) results.push_back(c_n);
  return results;
}

// Embedding bags ------------------------------------------------------------------------------------------------------

struct PoolingSettings {
  std::string mode;
  int64_t padding_idx;
  bool include_last_offset, scale_grad_by_freq, sparse;
  bool updated;  // in backward, by an optimizer: the table gets no gradient
};

inline const auto& embedding_bag_op() {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                               const OptionalTensor&, c10::string_view, int64_t, bool, bool, bool);
  static const auto embedding_bag = op<Signature>("embedding_bag");
  return embedding_bag;
}

inline std::tuple<Tensor, Tensor> call_embedding_bag(const Tensor& weight, const Tensor& indices,
                                                     const OptionalTensor& offsets,
                                                     const OptionalTensor& per_sample_weights,
                                                     const PoolingSettings& settings) {
  const auto& embedding_bag = embedding_bag_op();
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (settings.mode != "lookup") {
    return embedding_bag.call(weight, indices, offsets, per_sample_weights, settings.mode, settings.padding_idx,
                              settings.include_last_offset, settings.scale_grad_by_freq, settings.sparse);
  }
  auto [rows, aux] = embedding_bag.call(weight, indices.reshape({-1, 1}), offsets, per_sample_weights, settings.mode,
                                        settings.padding_idx, false, settings.scale_grad_by_freq, settings.sparse);
  auto shape = indices.sym_sizes().vec();
  shape.push_back(weight.sym_size(1));
  return {rows.view_symint(shape), aux};
}

inline Tensor call_embedding_dot(const Tensor& h, const Tensor& weight, const Tensor& indices,
                                 const OptionalTensor& offsets, int64_t padding_idx, bool include_last_offset,
                                 bool sparse) {
  using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t, bool, bool);
  static const auto embedding_dot = op<Signature>("embedding_dot");
  return embedding_dot.call(h, weight, indices, offsets, padding_idx, include_last_offset, sparse);
}

// Of gradients from which on memory is kept, as in csrc/cpu/kept_memory.h.
constexpr size_t kKeptBytes = size_t(1) << 20;

// What stands by a table in which gradients are accumulated, and goes with it.
//
// Memory of large gradients is kept from step to step as long as there is the table (csrc/cpu/kept_memory.h). And a
// sparse gradient is marked as coalesced again: accumulation takes its indices and values, but not that they are sorted
// and each once, so that an optimizer would sort them anew.
//
// autograd calls it, and frees it, as a hook of the table, of which there can be one: where users have their own, both
// are left. Accumulation holds a lock meanwhile.
class TableCompanion : public torch::autograd::PostAccumulateGradHook {
 public:
  // In a forward pass. Companions come and change under Python's lock.
  static void meet(const Tensor& table, bool sparse) {
    const auto& hook = torch::autograd::impl::post_acc_grad_hooks(table);
    if (!table.is_cpu() || table.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return;
    const bool is_large = !sparse && table.layout() == at::kStrided && table.nbytes() >= kKeptBytes;
    if (hook == nullptr && !sparse && !is_large) return;
    const pybind11::gil_scoped_acquire gil;
    if (hook == nullptr) torch::autograd::impl::set_post_acc_grad_hooks(table, std::make_unique<TableCompanion>());
    auto* companion = dynamic_cast<TableCompanion*>(torch::autograd::impl::post_acc_grad_hooks(table).get());
    if (companion != nullptr) companion->keep(is_large ? static_cast<int64_t>(table.nbytes()) : 0);
  }

  // In a backward pass: what comes next to be accumulated.
  static void expect(const Tensor& gradient) {
    expected() = {gradient._indices().storage().getWeakStorageImpl(), gradient._nnz()};
  }

  ~TableCompanion() override { keep(0); }

  void operator()(const Tensor& table) override {
    const Tensor& grad = table.grad();
    if (!grad.defined() || grad.layout() != at::kSparse || grad.is_coalesced()) return;
    const auto storage = expected().storage.lock();  // none once it is gone, as its memory may be others' then
    const Tensor indices = grad._indices();
    if (storage.get() != indices.storage().unsafeGetStorageImpl() || grad._nnz() != expected().count ||
        !indices.is_contiguous() || indices.storage_offset() != 0) {
      return;
    }
    static_cast<at::SparseTensorImpl*>(grad.unsafeGetTensorImpl())->set_coalesced(true);
  }
  // Compiled, backward does without.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {}
  void apply_with_saved(Tensor&, torch::dynamo::autograd::SwapSavedVariables&) override {}

 private:
  void keep(int64_t bytes) {
    if (bytes == bytes_) return;
    static const auto keep_memory = op<void(int64_t, bool)>("_keep_memory");
    // Below a mode that looks at ops there is nothing to see.
    const c10::impl::ExcludeDispatchKeyGuard no_modes(
        c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot}));
    if (bytes_ > 0) keep_memory.call(bytes_, false);
    if (bytes > 0) keep_memory.call(bytes, true);
    bytes_ = bytes;
  }

  // Of the last sparse gradient that this thread has made: where its indices are, and how many.
  struct Expected {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage{c10::intrusive_ptr<c10::StorageImpl>()};
    int64_t count = 0;
  };
  static Expected& expected() {
    static thread_local Expected last;
    return last;
  }

  int64_t bytes_ = 0;  // of a gradient whose memory is kept
};

inline Tensor embedding_bag_gradient(const Tensor& grad, const c10::SymInt& rows, const Tensor& indices,
                                     const OptionalTensor& offsets, const OptionalTensor& per_sample_weights,
                                     const Tensor& aux, const PoolingSettings& settings) {
  using Dense = Tensor(const Tensor&, c10::SymInt, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                       const Tensor&, c10::string_view, int64_t, bool, bool);
  using Sparse =
      std::tuple<Tensor, Tensor>(const Tensor&, c10::SymInt, const Tensor&, const OptionalTensor&,
                                 const OptionalTensor&, const Tensor&, c10::string_view, int64_t, bool, bool);
  static const auto dense = op<Dense>("embedding_bag_backward");
  static const auto sparse = op<Sparse>("embedding_bag_sparse_backward");
  if (!settings.sparse) {
    return dense.call(grad, rows, indices, offsets, per_sample_weights, aux, settings.mode, settings.padding_idx,
                      settings.include_last_offset, settings.scale_grad_by_freq);
  }
  const auto [touched, values] =
      sparse.call(grad, rows, indices, offsets, per_sample_weights, aux, settings.mode, settings.padding_idx,
                  settings.include_last_offset, settings.scale_grad_by_freq);
  const Tensor gradient = at::_sparse_coo_tensor_with_dims_and_tensors_symint(
      1, 1, {rows, grad.sym_size(1)}, touched.unsqueeze(0), values, values.options().layout(at::kSparse),
      /*is_coalesced=*/true);
  if (grad.is_cpu()) TableCompanion::expect(gradient);
  return gradient;
}

// Whether the backward pass at work adds to table.grad: not to a frozen table's, nor for `inputs` without it.
inline bool accumulates(Context* ctx, size_t argument, const Tensor& table) {
  if (!ctx->needs_input_grad(argument) || !table.requires_grad()) return false;
  const auto* plan = torch::autograd::get_current_graph_task_exec_info();
  TORCH_CHECK(
      plan != nullptr,
      "a table that is updated in backward (nlpkernels.optim) has no gradient outside of it: expected backward()");
  const auto accumulator = torch::autograd::impl::grad_accumulator(table);
  const auto planned = plan->find(accumulator.get());
  TORCH_CHECK(planned == plan->end() || !planned->second.captures_,
              "torch.autograd.grad wants the gradient of a table that is updated in backward (nlpkernels.optim): there "
              "is none, expected backward()");
  TORCH_CHECK(accumulator->post_hooks().empty(),
              "DistributedDataParallel, or a hook of another kind, waits for the gradient of a table of shape ",
              table.sizes(),
              " that is updated in backward (nlpkernels.optim) and has none: wrap the model while the table does not "
              "require a gradient, and give its optimizer a process_group");
  return true;
}

// Hands a table's optimizer what the table's gradient is made of, and how many rows the table had in the forward pass.
inline void collect(const Tensor& table, int64_t rows, const Tensor& grad, const Tensor& indices,
                    const OptionalTensor& offsets, const OptionalTensor& per_sample_weights, const Tensor& aux,
                    const PoolingSettings& settings) {
  const pybind11::gil_scoped_acquire gil;
  static pybind11::gil_safe_call_once_and_store<pybind11::object> of_optim;
  of_optim.call_once_and_store_result([] { return pybind11::module_::import("nlpkernels.optim").attr("collect"); });
  of_optim.get_stored()(table, rows, grad, indices, offsets, per_sample_weights, aux, settings.mode,
                        settings.padding_idx, settings.include_last_offset, settings.scale_grad_by_freq);
}

// In a backward pass, before all else.
inline void check_updated_once(Context* ctx, bool updated) {
  TORCH_CHECK(!updated || !at::GradMode::is_enabled(),
              "a gradient that is applied in backward (nlpkernels.optim) cannot be differentiated");
  TORCH_CHECK(ctx->saved_data.count("used") == 0,
              "a second backward pass through one graph: unless it failed, the first one has updated the table "
              "(nlpkernels.optim), and this one's gradient would be that of the table as it was; call the layer again");
}

class EmbeddingBagFunction : public torch::autograd::Function<EmbeddingBagFunction> {
 public:
  static Tensor forward(Context* ctx, const Tensor& weight, const OptionalTensor& per_sample_weights,
                        const Tensor& indices, const OptionalTensor& offsets, const PoolingSettings& settings) {
    const auto [out, aux] = call_embedding_bag(weight, indices, offsets, per_sample_weights, settings);
    // The table itself only where it is needed, so that it may be changed in place (max_norm) before backward.
    const bool needs_weight = requires_grad(per_sample_weights);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({needs_weight ? weight : Tensor(), per_sample_weights.value_or(Tensor()), indices,
                            offsets.value_or(Tensor()), aux});
    ctx->saved_data["settings"] = std::make_tuple(settings.mode, settings.padding_idx, settings.include_last_offset,
                                                  settings.scale_grad_by_freq, settings.sparse);
    ctx->saved_data["rows"] = weight.sym_size(0);
    if (settings.updated) ctx->saved_data["table"] = weight;
    return out;
  }

  static variable_list backward(Context* ctx, const variable_list& grads) {
    variable_list result(5);
    const bool updated = ctx->saved_data.count("table") != 0;
    check_updated_once(ctx, updated);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const Tensor &weight = saved[0], &aux = saved[4];
    const OptionalTensor per_sample_weights = optional(saved[1]), offsets = optional(saved[3]);
    const auto stored = ctx->saved_data["settings"].toTuple()->elements().vec();
    const PoolingSettings settings{stored[0].toStringRef(), stored[1].toInt(),  stored[2].toBool(),
                                   stored[3].toBool(),      stored[4].toBool(), updated};
    const bool lookup = settings.mode == "lookup";
    const Tensor indices = lookup ? saved[2].reshape({-1, 1}) : saved[2];
    const Tensor grad = lookup ? grads[0].reshape_symint({indices.sym_size(0), grads[0].sym_size(-1)}) : grads[0];
    const BackwardGuard guard(grads, saved);
    if (ctx->needs_input_grad(0) && !updated) {
      result[0] = embedding_bag_gradient(grad, ctx->saved_data["rows"].toSymInt(), indices, offsets, per_sample_weights,
                                         aux, settings);
    }
    if (per_sample_weights && ctx->needs_input_grad(1)) {
      result[1] = call_embedding_dot(grad, weight, indices, offsets, settings.padding_idx, settings.include_last_offset,
                                     /*sparse=*/false);
    }
    if (updated && accumulates(ctx, 0, ctx->saved_data["table"].toTensor())) {
      const int64_t rows = ctx->saved_data["rows"].toSymInt().guard_int(__FILE__, __LINE__);
      collect(ctx->saved_data["table"].toTensor(), rows, grad, indices, offsets, per_sample_weights, aux, settings);
      ctx->saved_data["used"] = true;
      ctx->saved_data.erase("table");  // which a loss that is kept would keep
    }
    return result;
  }
};

inline Tensor embedding_bag(const Tensor& weight, const Tensor& indices, const OptionalTensor& offsets,
                            const OptionalTensor& per_sample_weights, std::string mode, int64_t padding_idx,
                            bool include_last_offset, bool scale_grad_by_freq, bool sparse, bool updated) {
  const PoolingSettings settings{std::move(mode),    padding_idx, include_last_offset,
                                 scale_grad_by_freq, sparse,      updated};
  const bool wants_derivative =
      at::GradMode::is_enabled() && (weight.requires_grad() || requires_grad(per_sample_weights));
  if (wants_derivative) {
    if (weight.requires_grad() && weight.is_leaf() && !updated) TableCompanion::meet(weight, sparse);
    return EmbeddingBagFunction::apply(weight, per_sample_weights, indices, offsets, settings);
  }
  return std::get<0>(call_embedding_bag(weight, indices, offsets, per_sample_weights, settings));
}

// Scores [B, K] of h [B, E] and rows of a table. Their gradients are those of bags: of h the sum of the rows, each
// times the gradient of its score, and of the table the like sum of h.
class EmbeddingDotFunction : public torch::autograd::Function<EmbeddingDotFunction> {
 public:
  static Tensor forward(Context* ctx, const Tensor& h, const Tensor& weight, const Tensor& indices, bool sparse,
                        bool updated) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->set_materialize_grads(false);
    // The table itself only for the gradient of h, so that it may be changed in place (by an update) before backward.
    ctx->save_for_backward({h, h.requires_grad() ? weight : Tensor(), indices});
    ctx->saved_data["sparse"] = sparse;
    ctx->saved_data["rows"] = weight.sym_size(0);
    if (updated) ctx->saved_data["table"] = weight;
    return call_embedding_dot(h, weight, indices, std::nullopt, kNoPadding, false, sparse);
  }

  static variable_list backward(Context* ctx, const variable_list& grads) {
    variable_list result(5);
    const bool updated = ctx->saved_data.count("table") != 0;
    check_updated_once(ctx, updated);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad = grads[0], &h = saved[0], &weight = saved[1], &indices = saved[2];
    const PoolingSettings settings{"sum", kNoPadding, false, false, ctx->saved_data["sparse"].toBool(), updated};
    const Tensor aux = at::empty({0}, indices.options().dtype(at::kLong));
    const BackwardGuard guard(grads, saved);
    if (ctx->needs_input_grad(0)) {
      result[0] = std::get<0>(embedding_bag_op().call(weight, indices, std::nullopt, grad, settings.mode, kNoPadding,
                                                      false, false, settings.sparse));
    }
    if (ctx->needs_input_grad(1) && !updated) {
      result[1] =
          embedding_bag_gradient(h, ctx->saved_data["rows"].toSymInt(), indices, std::nullopt, grad, aux, settings);
    }
    if (updated && accumulates(ctx, 1, ctx->saved_data["table"].toTensor())) {
      const int64_t rows = ctx->saved_data["rows"].toSymInt().guard_int(__FILE__, __LINE__);
      collect(ctx->saved_data["table"].toTensor(), rows, h, indices, std::nullopt, grad, aux, settings);
      ctx->saved_data["used"] = true;
      ctx->saved_data.erase("table");  // which a loss that is kept would keep
    }
    return result;
  }

 private:
  static constexpr int64_t kNoPadding = -1;
};

inline Tensor embedding_dot(const Tensor& h, const Tensor& weight, const Tensor& indices, bool sparse, bool updated) {
  if (at::GradMode::is_enabled() && (h.requires_grad() || weight.requires_grad())) {
    if (weight.requires_grad() && weight.is_leaf() && !updated) TableCompanion::meet(weight, sparse);
    return EmbeddingDotFunction::apply(h, weight, indices, sparse, updated);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return call_embedding_dot(h, weight, indices, std::nullopt, -1, false, sparse);
}

// Whether a lookup and its derivative are torch's own ops. A sparse gradient of theirs is the indices and the incoming
// gradient as they are, which nothing can make faster; and what there is to do for a few rows of a small table takes
// less time than a node of autograd in C++. Sums of half precision are ours.
inline bool is_torchs_to_differentiate(const Tensor& weight, const Tensor& indices, bool scale_grad_by_freq,
                                       bool sparse) {
  constexpr int64_t kFew = 128;
  constexpr size_t kSmall = 2 * kKeptBytes;
  if (!weight.is_cpu() || !indices.is_cpu() || !weight.requires_grad() || !at::GradMode::is_enabled() ||
      scale_grad_by_freq)
    return false;
  // At these torch fails.
  if (indices.dim() == 0 || indices.numel() == 0 || weight.size(1) == 0) return false;
  return sparse || (weight.nbytes() < kSmall && indices.numel() <= kFew &&
                    (weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kDouble));
}

// A lookup for what is plain: nothing for what is no tensor or one of a subclass, for what torch.jit or a mode is to
// see, and where dtypes, dimensions or padding_idx do not fit.
inline std::optional<Tensor> lookup(pybind11::handle input, pybind11::handle table, std::optional<int64_t> padding_idx,
                                    bool scale_grad_by_freq, bool sparse) {
  if (!THPVariable_CheckExact(input.ptr()) || !THPVariable_CheckExact(table.ptr()) ||
      at::impl::torch_function_mode_enabled() || c10::impl::tls_is_dispatch_key_included(at::DispatchKey::Tracer)) {
    return std::nullopt;
  }
  const Tensor &indices = THPVariable_Unpack(input.ptr()), &weight = THPVariable_Unpack(table.ptr());
  const auto index = indices.scalar_type(), value = weight.scalar_type();
  if ((index != at::kLong && index != at::kInt) || indices.layout() != at::kStrided || indices.is_nested() ||
      weight.is_nested() || weight.dim() != 2 ||
      (value != at::kFloat && value != at::kDouble && value != at::kBFloat16 && value != at::kHalf)) {
    return std::nullopt;
  }
  const int64_t rows = weight.size(0);
  if (padding_idx && (*padding_idx < -rows || *padding_idx >= rows)) return std::nullopt;
  const int64_t padding = !padding_idx ? -1 : *padding_idx < 0 ? *padding_idx + rows : *padding_idx;
  const pybind11::gil_scoped_release no_gil;
  if (is_torchs_to_differentiate(weight, indices, scale_grad_by_freq, sparse)) {
    try {
      return at::embedding(weight, indices, padding, /*scale_grad_by_freq=*/false, sparse);
    } catch (const c10::IndexError&) {
      return std::nullopt;  // which is to say where the wrong index stands
    }
  }
  return embedding_bag(weight, indices, std::nullopt, std::nullopt, "lookup", padding, false, scale_grad_by_freq,
                       sparse, /*updated=*/false);
}

using UpdateSignature = void(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                             const OptionalTensor&, const OptionalTensor&, const Tensor&, c10::string_view, int64_t,
                             bool, bool, c10::string_view, at::ArrayRef<double>);

// The op embedding_bag_update, for a table that requires a gradient: it is an optimizer's step, of which there is none.
inline void embedding_bag_update(const Tensor& grad, const Tensor& weight, const OptionalTensor& first,
                                 const OptionalTensor& second, const Tensor& indices, const OptionalTensor& offsets,
                                 const OptionalTensor& per_sample_weights, const Tensor& aux, const std::string& mode,
                                 int64_t padding_idx, bool include_last_offset, bool scale_grad_by_freq,
                                 const std::string& rule, const std::vector<double>& settings) {
  static const auto update = op<UpdateSignature>("embedding_bag_update");
  const at::AutoDispatchBelowAutograd below_autograd;
  update.call(grad, weight, first, second, indices, offsets, per_sample_weights, aux, mode, padding_idx,
              include_last_offset, scale_grad_by_freq, rule, settings);
}

// What the dispatcher has to know of an op that changes arguments: it has no derivative, and saved tensors are what
// they were only if they have not been among those that changed, whose places are `changed`. Of negated and conjugated
// views torch's own fallback expects an op to return what it changed.
template <typename Signature, size_t... changed>
struct ChangesArguments;

template <typename... Args, size_t... changed>
struct ChangesArguments<void(Args...), changed...> {
  static void refuse_derivative(c10::DispatchKeySet keys, Args... args) {
    size_t place = 0;
    (check(handle(), place++, args), ...);
    const at::AutoDispatchBelowAutograd below_autograd;
    handle().redispatch(keys & c10::after_autograd_keyset, args...);
  }

  static void resolve_views(c10::DispatchKeySet keys, Args... args) {
    const auto all = std::tie(args...);
    (refuse_view(changed, std::get<changed>(all)), ...);
    const c10::DispatchKeySet below(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::Conjugate);
    handle().redispatch(keys & below, resolved(args)...);
  }

  static void count_versions(c10::DispatchKeySet keys, Args... args) {
    // Beforehand, as it refuses tensors of inference mode outside of it.
    const auto all = std::tie(args...);
    (bump(changed, std::get<changed>(all)), ...);
    const at::AutoDispatchBelowADInplaceOrView below;
    handle().redispatch(keys & c10::after_ADInplaceOrView_keyset, args...);
  }

  // What the two above will refuse.
  static void refuse_unchangeable(Args... args) {
    const auto all = std::tie(args...);
    (refuse_view(changed, std::get<changed>(all)), ...);
    (refuse_inference(changed, std::get<changed>(all)), ...);
  }

 private:
  static const auto& handle() {
    static const auto update = op<void(Args...)>("embedding_bag_update");
    return update;
  }

  template <typename Other>
  static void check(const c10::OperatorHandle&, size_t, const Other&) {}
  static void check(const c10::OperatorHandle& op, size_t place, const OptionalTensor& tensor) {
    if (tensor) check(op, place, *tensor);
  }
  static void check(const c10::OperatorHandle& op, size_t place, const Tensor& tensor) {
    if (!tensor.defined()) return;
    const bool has_derivative =
        (at::GradMode::is_enabled() && tensor.requires_grad()) || tensor._fw_grad(/*level=*/0).defined();
    TORCH_CHECK_NOT_IMPLEMENTED(!has_derivative, op.schema().name(), ": it has no derivative: expected ",
                                op.schema().arguments()[place].name(),
                                " that requires no gradient, got one that does: use detach() or torch.no_grad()");
  }

  static void refuse_view(size_t place, const OptionalTensor& tensor) {
    TORCH_CHECK(!tensor || (!tensor->is_neg() && !tensor->is_conj()), handle().schema().name(), ": expected ",
                handle().schema().arguments()[place].name(), " to be no negated or conjugated view");
  }

  static void refuse_inference(size_t place, const OptionalTensor& tensor) {
    TORCH_CHECK(!tensor || !tensor->is_inference() || c10::InferenceMode::is_enabled(), handle().schema().name(),
                ": expected ", handle().schema().arguments()[place].name(),
                " to be no tensor of torch.inference_mode(), which cannot be changed outside of it: use clone()");
  }

  template <typename Other>
  static const Other& resolved(const Other& value) {
    return value;
  }
  static Tensor resolved(const Tensor& tensor) { return tensor.resolve_neg().resolve_conj(); }
  static OptionalTensor resolved(const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(resolved(*tensor)) : std::nullopt;
  }

  static void bump(size_t place, const Tensor& tensor) {
    TORCH_CHECK_TYPE(tensor.defined(), handle().schema().name(), ": expected ",
                     handle().schema().arguments()[place].name(), " to be a tensor, got None");
    torch::autograd::impl::bump_version(tensor);
  }
  static void bump(size_t place, const OptionalTensor& tensor) {
    if (tensor && tensor->defined()) bump(place, *tensor);
  }
};

using UpdatesInPlace = ChangesArguments<UpdateSignature, 1, 2, 3>;  // weight, first, second

// All that embedding_bag_update checks but for the values of indices and offsets, which were the forward pass's to
// check: an optimizer of several tables asks before the first of them changes.
inline void check_update(const Tensor& grad, const Tensor& weight, const OptionalTensor& first,
                         const OptionalTensor& second, const Tensor& indices, const OptionalTensor& offsets,
                         const OptionalTensor& per_sample_weights, const Tensor& aux, const std::string& mode_name,
                         int64_t padding_idx, bool include_last_offset, bool scale_grad_by_freq,
                         const std::string& rule, const std::vector<double>& settings) {
  const char* op = "embedding_bag_update";
  UpdatesInPlace::refuse_unchangeable(grad, weight, first, second, indices, offsets, per_sample_weights, aux, mode_name,
                                      padding_idx, include_last_offset, scale_grad_by_freq, rule, settings);
  check_embedding_bag_update(op, weight, grad, first, second, parse_rule(rule), settings, per_sample_weights);
  const Mode mode = parse_mode(mode_name);
  check_embedding_bag(op, grad, indices, offsets, per_sample_weights, mode, include_last_offset);
  const int64_t bags = offsets ? offsets->size(0) - (include_last_offset ? 1 : 0) : indices.size(0);
  check_embedding_bag_backward(op, grad, bags, aux, mode, weight.size(0));
}

}  // namespace nlpkernels
