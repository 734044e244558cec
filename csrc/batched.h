// Gradients of many outputs at once, torch.autograd.grad(is_grads_batched=True): ops under the vmap that autograd has
// for it. Its own way for ops that know nothing of it, one call for each example, does not take ops that return a list.
#pragma once

#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/stack.h>
#include <c10/util/irange.h>

#include <vector>

namespace nlpkernels {

// The innermost vmap: its level, and how many examples it has.
struct Examples {
  int64_t level = -1, count = 0;

  void see(const at::Tensor& tensor) {
    const auto* batched = tensor.defined() ? at::maybeGetBatchedImpl(tensor) : nullptr;
    if (batched == nullptr || batched->bdims().back().level() < level) return;
    level = batched->bdims().back().level();
    count = batched->value().size(batched->bdims().back().dim());
  }

  // The i-th example of a tensor: the tensor itself where all have the same.
  at::Tensor of(const at::Tensor& tensor, int64_t i) const {
    const auto* batched = tensor.defined() ? at::maybeGetBatchedImpl(tensor) : nullptr;
    if (batched == nullptr || batched->bdims().back().level() != level) return tensor;
    const int64_t dim = batched->bdims().back().dim();
    at::Tensor example = batched->value().select(dim, i);
    for (const auto& other : batched->bdims().slice(0, batched->bdims().size() - 1)) {
      example = at::addBatchDim(example, other.level(), other.dim() - (other.dim() > dim));
    }
    return example;
  }

  at::Tensor join(const std::vector<at::Tensor>& examples) const {
    return at::addBatchDim(at::stack(examples), level, 0);
  }
};

// Any op, one call for each example.
inline void call_for_each_example(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto given = torch::jit::pop(*stack, op.schema().arguments().size());
  Examples examples;
  for (const c10::IValue& value : given) {
    if (value.isTensor()) examples.see(value.toTensor());
    if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) examples.see(tensor);
    }
  }
  TORCH_CHECK(examples.count > 0, op.schema().name(), ": expected one gradient or more, got a batch of none");
  std::vector<torch::jit::Stack> results;
  for (const auto i : c10::irange(examples.count)) {
    torch::jit::Stack own;
    for (const c10::IValue& value : given) {
      if (value.isTensor()) {
        own.emplace_back(examples.of(value.toTensor(), i));
      } else if (value.isTensorList()) {
        std::vector<at::Tensor> tensors = value.toTensorVector();
        for (at::Tensor& tensor : tensors) tensor = examples.of(tensor, i);
        own.emplace_back(tensors);
      } else {
        own.push_back(value);
      }
    }
    op.callBoxed(own);
    results.push_back(std::move(own));
  }
  for (const auto output : c10::irange(op.schema().returns().size())) {
    if (!results[0][output].isTensorList()) {
      std::vector<at::Tensor> each;
      for (const auto& result : results) each.push_back(result[output].toTensor());
      stack->emplace_back(examples.join(each));
      continue;
    }
    std::vector<at::Tensor> joined;
    for (const auto place : c10::irange(results[0][output].toTensorVector().size())) {
      std::vector<at::Tensor> each;
      for (const auto& result : results) each.push_back(result[output].toTensorVector()[place]);
      joined.push_back(examples.join(each));
    }
    stack->emplace_back(joined);
  }
}

}  // namespace nlpkernels
