// The schemas of every op, in the only TORCH_LIBRARY block, and the pybind11 module with the facts of the build.
//
// An op is functional, but for the one that says otherwise: it changes no argument, and no two of its outputs share
// memory. Kernels are registered by csrc/cpu and csrc/cuda, behaviour (fake kernels, autograd, autocast, vmap) by
// nlpkernels/_ops.py.
//
// Letters in shapes: T steps, B sequences, N = rows of data (T * B, or the sum of batch_sizes for packed data),
// I input features, H hidden units, P features of h (proj_size if there is one, else H), D directions (1 or 2),
// G gates (RNN 1, LSTM 4, GRU 3), S saved values a unit (RNN 0, LSTM 5, GRU 4); V rows and E columns of a table.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <string>

#include "autograd.h"
#include "batched.h"

TORCH_LIBRARY(nlpkernels, m) {
  // One layer of an RNN, all steps, both directions.
  //   x            [T, B, I]; or one step, [B, I]; or packed data [N, I] with batch_sizes [T] (int64, on the CPU,
  //                non-increasing)
  //   h0, c0       [D, B, P], [D, B, H] (c0 for the LSTM only)
  //   weights      for each direction W_ih [G H, I], W_hh [G H, P], then b_ih, b_hh [G H] or neither, then W_hr [P, H]
  //                for an LSTM with a projection
  //   cell         "rnn_tanh", "rnn_relu", "lstm" or "gru"
  //   keep         whether backward will follow and needs the workspace
  //   h_mask       [D, B, P], factors of h_{t-1}, the same at all steps, where W_hh multiplies it and nowhere else:
  //                W_hh (h_mask h_{t-1}). It is constant: no op has a derivative of it
  // Returns
  //   y            [T, B, D P] or [N, D P]
  //   h_n, c_n     [D, B, P], [D, B, H] (c_n is empty, [0], but for the LSTM)
  //   workspace    [D, N, S, H], the values that cells.h saves; empty, [0], unless keep
  //
  // Here and below the ops of bfloat16 are the same for the processors that multiply it themselves (csrc/cpu): only the
  // ops without that name call them.
  for (const std::string name : {"recurrent", "_recurrent_bfloat16"}) {
    m.def((name + "(Tensor x, Tensor? batch_sizes, Tensor h0, Tensor? c0, Tensor[] weights, str cell, bool keep,"
                  " Tensor? h_mask) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor workspace)")
              .c_str());
  }

  // Its gradients. dy, dh_n, dc_n: shaped like the outputs, None stands for zeros. Returns dx, dh0, dc0 and one
  // gradient per weight, shaped like the inputs; dc0 is empty but for the LSTM, dx and the weights' are empty unless
  // needed.
  for (const std::string name : {"recurrent_backward", "_recurrent_bfloat16_backward"}) {
    m.def((name + "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? batch_sizes, Tensor h0, Tensor? c0,"
                  " Tensor[] weights, str cell, Tensor y, Tensor workspace, bool need_dx, bool need_dweights,"
                  " Tensor? h_mask) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)")
              .c_str());
  }

  // The same of an LSTM, given a gradient of the workspace as well: of the cell states between the steps.
  m.def(
      "recurrent_states_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor dworkspace, Tensor x,"
      " Tensor? batch_sizes, Tensor h0, Tensor c0, Tensor[] weights, str cell, bool need_dx, bool need_dweights,"
      " Tensor? h_mask) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)");

  // One layer that only runs, without h_mask. Weights are packed in the first call and kept, until they change or go.
  m.def(
      "recurrent_frozen(Tensor x, Tensor? batch_sizes, Tensor h0, Tensor? c0, Tensor[] weights, str cell)"
      " -> (Tensor y, Tensor h_n, Tensor c_n)");

  // All layers of an RNN that only runs, with weights of int8 or bfloat16. x, batch_sizes and cell as above, float32.
  //   h0, c0       [L D, B, P], [L D, B, H] of L layers
  //   weights      for each layer and direction W_ih, W_hh and W_hr if there is one, packed as csrc/cpu/narrow.h says:
  //                int8 with 128 added, as uint8, or the bits of bfloat16, as int16; and factors, the bits of float32,
  //                as int32: biases by panel and slot, and of int8 the scales of the rows of each matrix, by panel and
  //                gate
  //   keep         whether to return the cell states of every step, of one layer
  // Returns y, h_n, c_n like recurrent, of all layers, and c [D, N, H] or empty, [0].
  m.def(
      "frozen(Tensor x, Tensor? batch_sizes, Tensor h0, Tensor? c0, Tensor[] weights, str cell, int directions,"
      " bool keep) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor c)");

  // Rows of a table, pooled by bag.
  //   weight       [V, E]
  //   indices      [B, L] with offsets None: B bags of L; or [N] with offsets
  //   offsets      [B] where each bag starts; [B + 1] with include_last_offset: the last one is where the last bag ends
  //   per_sample_weights   like indices, or None: a factor for each row (mode "sum")
  //   mode         "sum", "mean" or "max"; "lookup" is "sum" in which padding_idx keeps its row from being trained but
  //                not from being read, which is what Embedding means by it; indices are [N, 1]
  //   padding_idx  rows with this index are not in any bag; -1 for none, as is any other number that is no row
  //   scale_grad_by_freq, sparse   of backward, here for autograd to find: divide a row's gradient by the row's number
  //                of uses; return the weight's gradient as a sparse tensor
  // Returns
  //   out          [B, E]; an empty bag gives zeros
  //   aux          what backward needs: for "mean" the rows pooled in each bag, int64 [B]; for "max" the position in
  //                the flattened indices that won, int64 [B, E], -1 in an empty bag; else empty, [0]
  m.def(
      "embedding_bag(Tensor weight, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, str mode,"
      " int padding_idx, bool include_last_offset, bool scale_grad_by_freq, bool sparse) -> (Tensor out, Tensor aux)");

  // Gradient of weight, dense [V, E].
  m.def(
      "embedding_bag_backward(Tensor grad, SymInt num_embeddings, Tensor indices, Tensor? offsets,"
      " Tensor? per_sample_weights, Tensor aux, str mode, int padding_idx, bool include_last_offset,"
      " bool scale_grad_by_freq) -> Tensor");

  // The same as the rows that were touched, sorted and each once: rows int64 [R], values [R, E].
  m.def(
      "embedding_bag_sparse_backward(Tensor grad, SymInt num_embeddings, Tensor indices, Tensor? offsets,"
      " Tensor? per_sample_weights, Tensor aux, str mode, int padding_idx, bool include_last_offset,"
      " bool scale_grad_by_freq) -> (Tensor rows, Tensor values)");

  // A step of an optimizer with that gradient, row by row, in place; the gradient itself is never stored. The only op
  // that changes its arguments: weight, and the states of its rows, contiguous and in memory of their own. It has no
  // derivative.
  //   rule         "sgd"               settings lr;                     w -= lr g
  //                "rowwise_adagrad"   lr, eps; first [V];              first += mean(g^2), w -= lr g / (first^.5 +
  //                eps) "adagrad"           lr, eps; first [V, E];           first += g^2, w -= lr g / (first^.5 + eps)
  //                "adam"              lr, eps, beta1, beta2; first, second [V, E]: moving means of g and g^2 that
  //                                    stand still for rows not in use; w -= lr first / (second^.5 + eps)
  //   first, second   float32, or float64 if weight is
  //   pooling      mode, under a name that torch's functionalisation does not take for its own
  m.def(
      "embedding_bag_update(Tensor grad, Tensor(a!) weight, Tensor(b!)? first, Tensor(c!)? second, Tensor indices,"
      " Tensor? offsets, Tensor? per_sample_weights, Tensor aux, str pooling, int padding_idx, bool "
      "include_last_offset,"
      " bool scale_grad_by_freq, str rule, float[] settings) -> ()");

  // On the CPU: a table of so many bytes, whose gradients' memory is kept from step to step, has come or gone.
  m.def("_keep_memory(int bytes, bool is_new) -> ()");

  // Products of a vector for each bag with the rows of that bag, none of which is stored: the scores of a sampled loss,
  // and the gradient of per_sample_weights (mode "sum"), of which h is the gradient of out.
  //   h            [B, E]
  //   sparse       of backward, as above
  // Returns scores like indices, h[bag] . weight[index], and 0 for padding_idx and where an index is in no bag.
  m.def(
      "embedding_dot(Tensor h, Tensor weight, Tensor indices, Tensor? offsets, int padding_idx,"
      " bool include_last_offset, bool sparse) -> Tensor");

  // Rows that a sampled loss holds against targets [B], int64: `number` for each, [B, number], from the stream of
  // random numbers that `seed`, int64 [], begins; the same for any number of threads.
  //   cumulative   int64 [V], rising to 2^53 at most: a row is as probable as its number is larger than the one before
  //   guide        int64 [2^n]: guide[i] is the first row whose number is larger than i 2^(53 - n)
  // A target itself is not drawn; -1 stands for none. There has to be another row that can be.
  m.def("draw_negatives(Tensor seed, Tensor cumulative, Tensor guide, Tensor targets, int number) -> Tensor");
}

TORCH_LIBRARY_IMPL(nlpkernels, Batched, m) {
  for (const char* name : {"recurrent_backward", "recurrent_states_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&nlpkernels::call_for_each_example>());
  }
}

TORCH_LIBRARY_IMPL(nlpkernels, Autograd, m) {
  m.impl("embedding_bag_update", TORCH_FN(nlpkernels::UpdatesInPlace::refuse_derivative));
}

TORCH_LIBRARY_IMPL(nlpkernels, Negative, m) {
  m.impl("embedding_bag_update", TORCH_FN(nlpkernels::UpdatesInPlace::resolve_views));
}

TORCH_LIBRARY_IMPL(nlpkernels, Conjugate, m) {
  m.impl("embedding_bag_update", TORCH_FN(nlpkernels::UpdatesInPlace::resolve_views));
}

TORCH_LIBRARY_IMPL(nlpkernels, ADInplaceOrView, m) {
  m.impl("embedding_bag_update", TORCH_FN(nlpkernels::UpdatesInPlace::count_versions));
}

namespace {

// Whether the processor multiplies vectors of bfloat16. Whether it and the system have vectors of 512 bits, torch
// knows.
bool has_avx512bf16() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvx512Bf16);
#else
  return false;
#endif
}

// Whether this process may multiply tiles of bfloat16 (AMX), and vectors of it, which no processor with AMX lacks. A
// process has to ask: the system then makes room for tiles where it keeps threads' registers.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr int kAskForFeature = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h, which old ones lack
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile) &&
         syscall(SYS_arch_prctl, kAskForFeature, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

#ifndef NLPKERNELS_CUDA_ARCHS
#define NLPKERNELS_CUDA_ARCHS ""
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Registers the schemas of nlpkernels' ops; build facts.";
  m.attr("compiler") = std::string(__VERSION__);
  m.attr("cuda_archs") = std::string(NLPKERNELS_CUDA_ARCHS);
  m.def("has_avx512bf16", &has_avx512bf16, "Whether the processor multiplies vectors of bfloat16.");
  m.def("has_amx", &has_amx, "Whether this process may use AMX, for which it asks the system.");
  m.def(
      "has_tangent", [](const nlpkernels::variable_list& tensors) { return nlpkernels::has_tangent(tensors); },
      "Whether forward mode carries a tangent along with one of these.");
  m.def("recurrent", &nlpkernels::recurrent, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "y, h_n and c_n of the op of this name, with derivatives for eager calls.");
  m.def("recurrent_step", nlpkernels::of_plain_tensors(&nlpkernels::recurrent_step),
        "One step of a cell by it; None where shapes do not fit, or something is not a plain tensor.");
  m.def("recurrent_layers", nlpkernels::of_plain_tensors(&nlpkernels::recurrent_layers),
        "All layers by it; None where shapes or dtypes do not fit, or something is not a plain tensor.");
  m.def(
      "frozen_layers", nlpkernels::of_plain_tensors(&nlpkernels::frozen_layers),
      "All layers, or one step of a cell, by the op frozen; None where shapes or dtypes do not fit, something requires "
      "a gradient, or is not a plain tensor.");
  m.def("embedding_bag", &nlpkernels::embedding_bag, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "The first output of the op of this name, with derivatives for eager calls; indices of a lookup may have any "
        "shape, before which goes no reshape.");
  m.def("embedding_dot", &nlpkernels::embedding_dot, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "The op of this name for bags [B, L], with derivatives for eager calls.");
  m.def("lookup", &nlpkernels::lookup,
        "The op embedding_bag for a table that no optimizer updates in backward, in mode lookup; None where something "
        "does not fit, or is not a plain tensor.");
  m.def("embedding_bag_update", &nlpkernels::embedding_bag_update, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "The op of this name, for a table that requires a gradient.");
  m.def("check_update", &nlpkernels::check_update,
        "Raises what embedding_bag_update would, but for values of indices and offsets; changes nothing.");
}
