// Shapes, dtypes and devices of the ops' arguments, checked once, with the messages that users see. What passes here is
// safe for a kernel to read: every size that a kernel takes for granted is derived in this file.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cells.h"
#include "updates.h"

namespace nlpkernels {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, at::IntArrayRef expected) {
  TORCH_CHECK(tensor.sizes() == expected, op, ": expected ", name, " of shape ", expected, ", got ", tensor.sizes());
}

// A storage can be made smaller than its tensors, which torch's own copies do not notice.
inline void check_storage(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.numel() == 0) return;
  int64_t last = tensor.storage_offset();
  for (const auto i : c10::irange(tensor.dim())) last += (tensor.size(i) - 1) * tensor.stride(i);
  const auto bytes = static_cast<int64_t>(tensor.storage().nbytes());
  TORCH_CHECK(last < bytes / static_cast<int64_t>(tensor.itemsize()), op, ": expected ", name,
              " with memory for all of its values, got a storage of ", bytes, " bytes");
}

inline void check_like(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                       const Tensor& other) {
  TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), op, ": expected ", name, " of dtype ", other.scalar_type(),
              " like ", other_name, ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == other.device(), op, ": expected ", name, " on ", other.device(), " like ", other_name,
              ", got ", tensor.device());
  check_storage(op, name, tensor);
}

inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf, op,
              ": expected ", name, " of a floating dtype (float32, float64, bfloat16 or float16), got ", dtype);
  check_storage(op, name, tensor);
}

// Whether sizes are so small that no product of some of them, times what is said of each to round it up, can wrap.
// Empty and expanded tensors take up no memory, so that their sizes may be anything. In double, which does not wrap
// itself.
inline void check_product(const char* op, const char* names, std::initializer_list<int64_t> sizes) {
  constexpr double kMost = static_cast<double>(int64_t(1) << 54);  // bytes and padding are left 9 bits
  double product = 1;
  for (const auto size : sizes) product *= static_cast<double>(std::max<int64_t>(1, size));
  TORCH_CHECK_VALUE(product < kMost, op, ": expected ", names, " whose product is less than 2^54, got ",
                    at::IntArrayRef(sizes));
}

// The arguments of recurrent and recurrent_backward that both share, checked and taken apart.
struct RecurrentArguments {
  // Sizes, by the letters of library.cpp.
  int64_t steps = 0, batch = 0, rows = 0, inputs = 0, hidden = 0, features = 0, directions = 0;
  bool has_bias = false, has_projection = false;

  // Step t holds the first active[t] sequences of the batch, in rows [first_row[t], first_row[t] + active[t]).
  std::vector<int64_t> active, first_row;

  // Weights of direction d, in the order that they came in.
  at::TensorList weights;
  int64_t weights_per_direction = 0;

  const Tensor& w_ih(int64_t d) const { return weights[d * weights_per_direction]; }
  const Tensor& w_hh(int64_t d) const { return weights[d * weights_per_direction + 1]; }
  const Tensor& b_ih(int64_t d) const { return weights[d * weights_per_direction + 2]; }
  const Tensor& b_hh(int64_t d) const { return weights[d * weights_per_direction + 3]; }
  const Tensor& w_hr(int64_t d) const { return weights[(d + 1) * weights_per_direction - 1]; }
};

// Of x, its sequences and their initial states: all sizes but that of the weights.
inline RecurrentArguments check_sequences(const char* op, const Tensor& x, const OptionalTensor& batch_sizes,
                                          const Tensor& h0) {
  RecurrentArguments args;
  check_floating(op, "x", x);
  TORCH_CHECK(h0.dim() == 3 && (h0.size(0) == 1 || h0.size(0) == 2), op,
              ": expected h0 of shape [1 or 2 directions, batch, features], got ", h0.sizes());
  args.directions = h0.size(0);
  args.batch = h0.size(1);
  args.features = h0.size(2);
  check_like(op, "h0", h0, "x", x);

  if (batch_sizes) {
    TORCH_CHECK(x.dim() == 2, op, ": expected packed x of shape [rows, features], got ", x.sizes());
    TORCH_CHECK(batch_sizes->dim() == 1 && batch_sizes->scalar_type() == at::kLong && batch_sizes->is_cpu(), op,
                ": expected batch_sizes to be a 1-D int64 tensor on the CPU, got ", batch_sizes->dim(), "-D ",
                batch_sizes->scalar_type(), " on ", batch_sizes->device());
    check_storage(op, "batch_sizes", *batch_sizes);
    const Tensor sizes = batch_sizes->contiguous();
    const int64_t* size = sizes.const_data_ptr<int64_t>();
    args.active.assign(size, size + sizes.numel());
  } else {
    TORCH_CHECK(x.dim() == 2 || x.dim() == 3, op,
                ": expected x of shape [steps, batch, features] or [batch, features], got ", x.sizes());
    TORCH_CHECK(x.size(-2) == args.batch, op, ": expected h0 for a batch of ", x.size(-2), " as x has, got ",
                args.batch);
    const int64_t steps = x.dim() == 2 ? 1 : x.size(0);
    // Steps of no sequences are as good as none. Others take up memory, if x does not: more are a mistake.
    TORCH_CHECK_VALUE(args.batch == 0 || steps < int64_t(1) << 40, op, ": expected less than 2^40 steps, got ", steps);
    check_product(op, "steps and batch", {steps, args.batch});
    args.active.assign(args.batch == 0 ? 0 : steps, args.batch);
  }
  args.steps = static_cast<int64_t>(args.active.size());
  int64_t limit = args.batch;
  for (const auto t : c10::irange(args.steps)) {
    TORCH_CHECK(args.active[t] >= 0 && args.active[t] <= limit, op, ": expected batch_sizes[", t, "] between 0 and ",
                limit, " (the size before it, or the batch of h0), got ", args.active[t]);
    limit = args.active[t];
    args.first_row.push_back(args.rows);
    TORCH_CHECK(!batch_sizes || limit <= x.size(0) - args.rows, op, ": expected x of as many rows as the sum of ",
                "batch_sizes, got ", x.size(0), ", too few for batch_sizes[", t, "]");
    args.rows += limit;
  }
  TORCH_CHECK(!batch_sizes || args.rows == x.size(0), op, ": expected x of ", args.rows,
              " rows, the sum of batch_sizes, got ", x.size(0));
  args.inputs = x.size(-1);

  return args;
}

inline RecurrentArguments check_recurrent(const Tensor& x, const OptionalTensor& batch_sizes, const Tensor& h0,
                                          const OptionalTensor& c0, at::TensorList weights,
                                          const OptionalTensor& h_mask, int64_t gates, bool has_c) {
  const char* op = "recurrent";
  RecurrentArguments args = check_sequences(op, x, batch_sizes, h0);
  args.weights = weights;
  args.weights_per_direction = static_cast<int64_t>(weights.size()) / args.directions;
  const int64_t per_direction = args.weights_per_direction;
  TORCH_CHECK(per_direction >= 2 && per_direction <= 5 &&
                  static_cast<int64_t>(weights.size()) == per_direction * args.directions,
              op, ": expected 2 to 5 weights for each of ", args.directions, " directions, got ", weights.size());
  args.has_bias = per_direction >= 4;
  args.has_projection = per_direction % 2 == 1;
  TORCH_CHECK(has_c || !args.has_projection, op, ": only an LSTM has a projection, got ", per_direction,
              " weights for each direction");
  TORCH_CHECK(weights[0].dim() == 2 && weights[0].size(0) % gates == 0, op, ": expected weight_ih of shape [", gates,
              " * hidden, features], got ", weights[0].sizes());
  args.hidden = weights[0].size(0) / gates;
  TORCH_CHECK(args.hidden > 0, op, ": expected at least one hidden unit, got weight_ih of shape ", weights[0].sizes());
  TORCH_CHECK(args.has_projection || args.features == args.hidden, op, ": expected h0 of ", args.hidden,
              " features, as weight_ih has hidden units, got ", args.features);
  // Of the work, which is more than any tensor holds; of the threads' pieces of it; of what is kept of a batch.
  const int64_t widest = std::max({args.inputs, args.hidden, args.features});
  check_product(op, "directions, rows, gates, hidden units and features",
                {args.directions, args.rows, gates + 1, args.hidden, widest});
  check_product(op, "rows and batch", {args.rows, args.batch});
  check_product(op, "directions, batch and features", {args.directions, args.batch, widest});
  const int64_t gate_rows = gates * args.hidden;
  for (const auto d : c10::irange(args.directions)) {
    check_shape(op, "weight_ih", args.w_ih(d), {gate_rows, args.inputs});
    check_shape(op, "weight_hh", args.w_hh(d), {gate_rows, args.features});
    if (args.has_bias) {
      check_shape(op, "bias_ih", args.b_ih(d), {gate_rows});
      check_shape(op, "bias_hh", args.b_hh(d), {gate_rows});
    }
    if (args.has_projection) check_shape(op, "weight_hr", args.w_hr(d), {args.features, args.hidden});
  }
  for (const Tensor& weight : weights) check_like(op, "every weight", weight, "x", x);

  TORCH_CHECK(c0.has_value() == has_c, op, ": c0 is for the LSTM, and the LSTM needs it; got ",
              has_c ? "none" : "one for another cell");
  if (c0) {
    check_shape(op, "c0", *c0, {args.directions, args.batch, args.hidden});
    check_like(op, "c0", *c0, "x", x);
  }
  if (h_mask) {
    check_shape(op, "h_mask", *h_mask, h0.sizes());
    check_like(op, "h_mask", *h_mask, "x", x);
  }
  return args;
}

// Calls body(a cell of cells.h) for the op's argument.
template <typename Body>
void dispatch_cell(c10::string_view cell, const Body& body) {
  if (cell == "rnn_tanh") return body(RnnTanh());
  if (cell == "rnn_relu") return body(RnnRelu());
  if (cell == "lstm") return body(Lstm());
  if (cell == "gru") return body(Gru());
  TORCH_CHECK_VALUE(false, "recurrent: expected cell 'rnn_tanh', 'rnn_relu', 'lstm' or 'gru', got '", cell, "'");
}

inline std::vector<int64_t> sizes_of_y(const RecurrentArguments& args, const Tensor& x) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = args.directions * args.features;
  return sizes;
}

// What recurrent_backward takes beside recurrent's arguments.
inline void check_recurrent_backward(const RecurrentArguments& args, int64_t saved, const Tensor& x, const Tensor& h0,
                                     const OptionalTensor& c0, const OptionalTensor& dy, const OptionalTensor& dh_n,
                                     const OptionalTensor& dc_n, const Tensor& y, const Tensor& workspace) {
  const auto check = [&](const char* name, const Tensor& tensor, at::IntArrayRef sizes) {
    check_shape("recurrent_backward", name, tensor, sizes);
    check_like("recurrent_backward", name, tensor, "x", x);
  };
  const std::vector<int64_t> y_sizes = sizes_of_y(args, x);
  TORCH_CHECK(!dc_n || c0, "recurrent_backward: dc_n is for the LSTM; got one for another cell");
  check("y", y, y_sizes);
  check("workspace", workspace, {args.directions, args.rows, saved, args.hidden});
  if (dy) check("dy", *dy, y_sizes);
  if (dh_n) check("dh_n", *dh_n, h0.sizes());
  if (dc_n) check("dc_n", *dc_n, c0->sizes());
}

// How a row's embeddings are pooled; see library.cpp.
enum class Mode { sum, mean, max, lookup };

inline Mode parse_mode(c10::string_view mode) {
  if (mode == "sum") return Mode::sum;
  if (mode == "mean") return Mode::mean;
  if (mode == "max") return Mode::max;
  if (mode == "lookup") return Mode::lookup;
  TORCH_CHECK_VALUE(false, "embedding_bag: expected mode 'sum', 'mean', 'max' or 'lookup', got '", mode, "'");
}

inline void check_integer(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong || tensor.scalar_type() == at::kInt, op, ": expected ", name,
                   " of dtype int32 or int64, got ", tensor.scalar_type());
  check_storage(op, name, tensor);
}

// What every embedding_bag op can check without reading the data.
inline void check_embedding_bag(const char* op, const Tensor& like, const Tensor& indices,
                                const OptionalTensor& offsets, const OptionalTensor& per_sample_weights, Mode mode,
                                bool include_last_offset) {
  check_floating(op, "weight", like);
  check_integer(op, "indices", indices);
  TORCH_CHECK(indices.device() == like.device(), op, ": expected indices on ", like.device(), " like weight, got ",
              indices.device());
  if (offsets) {
    check_integer(op, "offsets", *offsets);
    TORCH_CHECK_VALUE(indices.dim() == 1, op, ": expected 1-D indices with offsets, got ", indices.sizes());
    TORCH_CHECK_VALUE(offsets->dim() == 1, op, ": expected 1-D offsets, got ", offsets->sizes());
    TORCH_CHECK_VALUE(!include_last_offset || offsets->size(0) >= 1, op,
                      ": expected at least one offset with include_last_offset, got none");
    TORCH_CHECK(offsets->device() == like.device(), op, ": expected offsets on ", like.device(), " like weight, got ",
                offsets->device());
  } else {
    TORCH_CHECK_VALUE(indices.dim() == 2, op, ": expected 2-D indices without offsets, got ", indices.sizes());
  }
  TORCH_CHECK_VALUE(mode != Mode::lookup || (!offsets && indices.size(1) == 1), op,
                    ": expected indices of shape [rows, 1] with mode 'lookup', got ", indices.sizes());
  if (per_sample_weights) {
    TORCH_CHECK_VALUE(mode == Mode::sum, op, ": per_sample_weights go with mode 'sum' only");
    check_shape(op, "per_sample_weights", *per_sample_weights, indices.sizes());
    check_like(op, "per_sample_weights", *per_sample_weights, "weight", like);
  }
}

// What the gradients of weight take beside embedding_bag's arguments. The values of offsets are the kernel's to check.
inline void check_embedding_bag_backward(const char* op, const Tensor& grad, int64_t bags, const Tensor& aux, Mode mode,
                                         int64_t num_embeddings = 0) {
  TORCH_CHECK_VALUE(num_embeddings >= 0, op, ": expected num_embeddings of 0 or more, got ", num_embeddings);
  TORCH_CHECK_VALUE(grad.dim() == 2 && grad.size(0) == bags, op, ": expected grad of shape [", bags, ", columns], got ",
                    grad.sizes());
  check_product(op, "num_embeddings and columns", {num_embeddings, grad.size(1)});
  TORCH_CHECK_TYPE(aux.scalar_type() == at::kLong, op, ": expected aux of dtype int64, got ", aux.scalar_type());
  TORCH_CHECK(aux.device() == grad.device(), op, ": expected aux on ", grad.device(), " like grad, got ", aux.device());
  check_storage(op, "aux", aux);
  if (mode == Mode::mean) check_shape(op, "aux", aux, {bags});
  if (mode == Mode::max) check_shape(op, "aux", aux, grad.sizes());
}

// The optimizers whose step embedding_bag_update takes; see library.cpp.
enum class Rule { sgd, rowwise_adagrad, adagrad, adam };

inline Rule parse_rule(c10::string_view rule) {
  if (rule == "sgd") return Rule::sgd;
  if (rule == "rowwise_adagrad") return Rule::rowwise_adagrad;
  if (rule == "adagrad") return Rule::adagrad;
  if (rule == "adam") return Rule::adam;
  TORCH_CHECK_VALUE(false, "embedding_bag_update: expected rule 'sgd', 'rowwise_adagrad', 'adagrad' or 'adam', got '",
                    rule, "'");
}

// The bytes that a tensor's values are in; nothing of one without values, or without data.
inline std::pair<const char*, const char*> bytes_of(const Tensor& tensor) {
  if (tensor.numel() == 0 || tensor.is_meta()) return {nullptr, nullptr};
  int64_t last = 0;
  for (const auto i : c10::irange(tensor.dim())) last += (tensor.size(i) - 1) * tensor.stride(i);
  const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + (last + 1) * static_cast<int64_t>(tensor.itemsize())};
}

// A tensor that is changed shares no memory with another argument, which would be read half changed.
inline void check_apart(const char* op, const char* name, const Tensor& changed, const char* other_name,
                        const OptionalTensor& other) {
  if (!other || other->device() != changed.device()) return;
  const auto [begin, end] = bytes_of(changed);
  const auto [other_begin, other_end] = bytes_of(*other);
  TORCH_CHECK_VALUE(begin >= other_end || other_begin >= end, op, ": expected ", name, " and ", other_name,
                    " in memory of their own, got two tensors that overlap");
}

// What the update takes beside the arguments of the gradient of weight.
inline void check_embedding_bag_update(const char* op, const Tensor& weight, const Tensor& grad,
                                       const OptionalTensor& first, const OptionalTensor& second, Rule rule,
                                       at::ArrayRef<double> settings,
                                       const OptionalTensor& per_sample_weights = std::nullopt) {
  TORCH_CHECK_VALUE(weight.dim() == 2, op, ": expected 2-D weight, got ", weight.sizes());
  TORCH_CHECK_VALUE(weight.is_contiguous(), op, ": expected contiguous weight, got strides ", weight.strides());
  TORCH_CHECK_VALUE(grad.dim() == 2 && grad.size(1) == weight.size(1), op, ": expected grad of shape [bags, ",
                    weight.size(1), "], got ", grad.sizes());
  check_floating(op, "weight", weight);
  check_like(op, "grad", grad, "weight", weight);
  const size_t wanted = rule == Rule::sgd ? 1 : rule == Rule::adam ? 4 : 2;
  TORCH_CHECK_VALUE(settings.size() == wanted, op, ": expected ", wanted, " settings, got ", settings.size());
  const auto check_state = [&](const char* name, const OptionalTensor& state, bool needed, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(state.has_value() == needed, op, ": ", name, " is ", needed ? "needed" : "not wanted",
                      " by this rule");
    if (!needed) return;
    check_shape(op, name, *state, sizes);
    const auto dtype = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    TORCH_CHECK_TYPE(state->scalar_type() == dtype, op, ": expected ", name, " of dtype ", dtype, ", got ",
                     state->scalar_type());
    TORCH_CHECK_VALUE(state->is_contiguous() && state->device() == weight.device(), op, ": expected contiguous ", name,
                      " on ", weight.device(), " like weight");
    check_storage(op, name, *state);
  };
  const at::IntArrayRef by_row = weight.sizes().slice(0, 1);
  check_state("first", first, rule != Rule::sgd, rule == Rule::rowwise_adagrad ? by_row : weight.sizes());
  check_state("second", second, rule == Rule::adam, weight.sizes());
  for (const auto i : c10::irange(settings.size())) {
    TORCH_CHECK_VALUE(!std::isnan(settings[i]), op, ": expected settings that are numbers, got NaN in settings[", i,
                      "]");
  }
  // A lazy copy gets memory of its own when it is asked for memory to change.
  weight.mutable_data_ptr();
  for (const auto& state : {first, second}) {
    if (state) state->mutable_data_ptr();
  }
  check_apart(op, "weight", weight, "first", first);
  check_apart(op, "weight", weight, "second", second);
  if (first) check_apart(op, "first", *first, "second", second);
  const auto check_changed = [&](const char* name, const OptionalTensor& changed) {
    if (!changed) return;
    check_apart(op, name, *changed, "grad", grad);
    check_apart(op, name, *changed, "per_sample_weights", per_sample_weights);
  };
  check_changed("weight", weight);
  check_changed("first", first);
  check_changed("second", second);
}

// The settings that passed, for updates.h.
template <typename V>
UpdateSettings<V> update_settings(at::ArrayRef<double> settings) {
  const auto setting = [&](size_t i) { return i < settings.size() ? settings[i] : 0; };
  return {static_cast<V>(setting(0)), static_cast<V>(setting(1)), static_cast<V>(1 - setting(2)),
          static_cast<V>(1 - setting(3))};
}

}  // namespace nlpkernels
