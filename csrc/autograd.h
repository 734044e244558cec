// embedding_bag with its derivatives for eager calls: in Python they would take longer than the kernels of a small
// call.
//
// Reverse mode only; its backward consists of ops, so that it can be differentiated again. Forward mode, torch.func and
// torch.compile go by nlpkernels/_ops.py, which has the same formulas.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_and_tensors.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <string>
#include <tuple>

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

struct PoolingSettings {
  std::string mode;
  int64_t padding_idx;
  bool include_last_offset, scale_grad_by_freq, sparse;
};

inline std::tuple<Tensor, Tensor> call_embedding_bag(const Tensor& weight, const Tensor& indices,
                                                     const OptionalTensor& offsets,
                                                     const OptionalTensor& per_sample_weights,
                                                     const PoolingSettings& settings) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                               const OptionalTensor&, c10::string_view, int64_t, bool, bool, bool);
  static const auto embedding_bag = op<Signature>("embedding_bag");
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
  return at::_sparse_coo_tensor_with_dims_and_tensors_symint(1, 1, {rows, grad.sym_size(1)}, touched.unsqueeze(0),
                                                             values, values.options().layout(at::kSparse),
                                                             /*is_coalesced=*/true);
}

class EmbeddingBagFunction : public torch::autograd::Function<EmbeddingBagFunction> {
 public:
  using Context = torch::autograd::AutogradContext;

  static Tensor forward(Context* ctx, const Tensor& weight, const OptionalTensor& per_sample_weights,
                        const Tensor& indices, const OptionalTensor& offsets, const PoolingSettings& settings) {
    const auto [out, aux] = call_embedding_bag(weight, indices, offsets, per_sample_weights, settings);
    // The table itself only where it is needed, so that it may be changed in place (max_norm) before backward.
    const bool needs_weight = per_sample_weights && per_sample_weights->requires_grad();
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({needs_weight ? weight : Tensor(), per_sample_weights.value_or(Tensor()), indices,
                            offsets.value_or(Tensor()), aux});
    ctx->saved_data["settings"] = std::make_tuple(settings.mode, settings.padding_idx, settings.include_last_offset,
                                                  settings.scale_grad_by_freq, settings.sparse);
    ctx->saved_data["rows"] = weight.sym_size(0);
    return out;
  }

  static torch::autograd::variable_list backward(Context* ctx, const torch::autograd::variable_list& grads) {
    torch::autograd::variable_list result(5);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const auto optional = [](const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; };
    const Tensor &weight = saved[0], &aux = saved[4];
    const OptionalTensor per_sample_weights = optional(saved[1]), offsets = optional(saved[3]);
    const auto stored = ctx->saved_data["settings"].toTuple()->elements().vec();
    const PoolingSettings settings{stored[0].toStringRef(), stored[1].toInt(), stored[2].toBool(), stored[3].toBool(),
                                   stored[4].toBool()};
    const bool lookup = settings.mode == "lookup";
    const Tensor indices = lookup ? saved[2].reshape({-1, 1}) : saved[2];
    const Tensor grad = lookup ? grads[0].reshape_symint({indices.sym_size(0), grads[0].sym_size(-1)}) : grads[0];
    // Past the dispatcher's autograd, which is in Python, where nobody will differentiate what follows.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    const bool is_transformed =
        c10::impl::tls_is_dispatch_key_included(at::DispatchKey::FuncTorchDynamicLayerFrontMode);
    if (!at::GradMode::is_enabled() && !is_transformed) below_autograd.emplace();
    if (ctx->needs_input_grad(0)) {
      result[0] = embedding_bag_gradient(grad, ctx->saved_data["rows"].toSymInt(), indices, offsets, per_sample_weights,
                                         aux, settings);
    }
    if (per_sample_weights && ctx->needs_input_grad(1)) {
      using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t, bool);
      static const auto per_sample = op<Signature>("embedding_bag_per_sample_backward");
      result[1] = per_sample.call(grad, weight, indices, offsets, settings.padding_idx, settings.include_last_offset);
    }
    return result;
  }
};

inline Tensor embedding_bag(const Tensor& weight, const Tensor& indices, const OptionalTensor& offsets,
                            const OptionalTensor& per_sample_weights, std::string mode, int64_t padding_idx,
                            bool include_last_offset, bool scale_grad_by_freq, bool sparse) {
  const PoolingSettings settings{std::move(mode), padding_idx, include_last_offset, scale_grad_by_freq, sparse};
  const bool wants_derivative = at::GradMode::is_enabled() &&
                                (weight.requires_grad() || (per_sample_weights && per_sample_weights->requires_grad()));
  if (wants_derivative) return EmbeddingBagFunction::apply(weight, per_sample_weights, indices, offsets, settings);
  return std::get<0>(call_embedding_bag(weight, indices, offsets, per_sample_weights, settings));
}

}  // namespace nlpkernels
