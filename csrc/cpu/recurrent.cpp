// The time loop of RNN, LSTM and GRU on the CPU: one call is one layer, all steps, both directions. The passes have
// rooms of their own: recurrent_layer.h, recurrent_forward.h, recurrent_backward.h.
//
// Compiled for processors that multiply bfloat16 themselves, this is a library of bfloat16 alone. It serves ops of its
// own, `_recurrent_bfloat16` and `_recurrent_bfloat16_backward`, which those that are everyone's call where they are.
//
// Letters are those of library.cpp.
#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "recurrent_backward.h"
#include "recurrent_forward.h"
#include "threads.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {
namespace {

#ifdef __AVX512BF16__
#define NLPKERNELS_DISPATCH(type, name, ...) \
  AT_DISPATCH_SWITCH(type, name, AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))
constexpr bool kServesBfloat16Alone = true;
#else
#define NLPKERNELS_DISPATCH(type, name, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, name, __VA_ARGS__)
constexpr bool kServesBfloat16Alone = false;
#endif

// The op of bfloat16 of this name, if a library has it here.
template <typename Signature>
std::optional<c10::TypedOperatorHandle<Signature>> of_bfloat16(const char* name) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  if (!op.hasKernelForDispatchKey(c10::DispatchKey::CPU)) return std::nullopt;
  return op.typed<Signature>();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrent(const Tensor& x, const OptionalTensor& batch_sizes,
                                                     const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                                                     c10::string_view cell, bool keep, const OptionalTensor& h_mask) {
  if (!kServesBfloat16Alone && x.scalar_type() == at::kBFloat16) {
    static const auto op = of_bfloat16<decltype(recurrent)>("nlpkernels::_recurrent_bfloat16");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (op) return op->call(x, batch_sizes, h0, c0, weights, cell, keep, h_mask);
  }
  const int64_t threads = threads_of_call();
  std::tuple<Tensor, Tensor, Tensor, Tensor> result;
  dispatch_cell(cell, [&](auto cell_type) {
    using Cell = decltype(cell_type);
    const RecurrentArguments args = check_recurrent(x, batch_sizes, h0, c0, weights, h_mask, Cell::gates, Cell::has_c);
    NLPKERNELS_DISPATCH(x.scalar_type(), "recurrent", [&] {
      const Layer<Cell, scalar_t> layer(args, x, h0, c0, h_mask, threads);
      const Forward<Cell, scalar_t> forward(layer, keep);
      forward.run();
      result = {forward.y, forward.h_n, forward.c_n, forward.workspace};
    });
  });
  return result;
}

#ifndef __AVX512BF16__
std::tuple<Tensor, Tensor, Tensor> recurrent_frozen(const Tensor& x, const OptionalTensor& batch_sizes,
                                                    const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                                                    c10::string_view cell) {
  std::tuple<Tensor, Tensor, Tensor> result;
  if (x.scalar_type() == at::kBFloat16) {  // which packs its weights as it is multiplied here
    const auto [y, h_n, c_n, workspace] = recurrent(x, batch_sizes, h0, c0, weights, cell, false, std::nullopt);
    return {y, h_n, c_n};
  }
  const int64_t threads = threads_of_call();
  dispatch_cell(cell, [&](auto cell_type) {
    using Cell = decltype(cell_type);
    const RecurrentArguments args =
        check_recurrent(x, batch_sizes, h0, c0, weights, std::nullopt, Cell::gates, Cell::has_c);
    AT_DISPATCH_FLOATING_TYPES_AND(at::kHalf, x.scalar_type(), "recurrent_frozen", [&] {
      const Layer<Cell, scalar_t> layer(args, x, h0, c0, std::nullopt, threads);
      const Forward<Cell, scalar_t> forward(layer, false, /*keeps_packed=*/true);
      forward.run();
      result = {forward.y, forward.h_n, forward.c_n};
    });
  });
  return result;
}
#endif

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> recurrent_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& x,
    const OptionalTensor& batch_sizes, const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
    c10::string_view cell, const Tensor& y, const Tensor& workspace, bool need_dx, bool need_dweights,
    const OptionalTensor& h_mask) {
  if (!kServesBfloat16Alone && x.scalar_type() == at::kBFloat16) {
    static const auto op = of_bfloat16<decltype(recurrent_backward)>("nlpkernels::_recurrent_bfloat16_backward");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (op) {
      return op->call(dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, cell, y, workspace, need_dx, need_dweights,
                      h_mask);
    }
  }
  const int64_t threads = threads_of_call();
  std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> result;
  dispatch_cell(cell, [&](auto cell_type) {
    using Cell = decltype(cell_type);
    const RecurrentArguments args = check_recurrent(x, batch_sizes, h0, c0, weights, h_mask, Cell::gates, Cell::has_c);
    check_recurrent_backward(args, Cell::saved, x, h0, c0, dy, dh_n, dc_n, y, workspace);
    NLPKERNELS_DISPATCH(x.scalar_type(), "recurrent_backward", [&] {
      const Layer<Cell, scalar_t> layer(args, x, h0, c0, h_mask, threads);
      Backward<Cell, scalar_t> backward(layer, dy, dh_n, dc_n, y, workspace, need_dx, need_dweights);
      backward.run();
      result = {backward.dx, backward.dh0, backward.dc0, backward.dweights};
    });
  });
  return result;
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels

TORCH_LIBRARY_IMPL(nlpkernels, CPU, m) {
  using namespace nlpkernels;
  m.impl(kServesBfloat16Alone ? "_recurrent_bfloat16" : "recurrent", TORCH_FN(recurrent));
  m.impl(kServesBfloat16Alone ? "_recurrent_bfloat16_backward" : "recurrent_backward", TORCH_FN(recurrent_backward));
#ifndef __AVX512BF16__
  m.impl("recurrent_frozen", TORCH_FN(recurrent_frozen));
#endif
}
