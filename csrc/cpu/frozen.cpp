// Recurrent layers that only run, with weights of int8 or bfloat16 that have been packed once (narrow.h): all layers of
// a network in one call. Letters are those of library.cpp.
//
// A layer's work is cut and its threads wait for each other as in recurrent_layer.h. One share:
//   for a block of steps:
//     gates = x W_ih^T + biases                     float, [row][panel][slot][16]
//     for each step, for each group of panels:
//       a = gates + h_{t-1} W_hh^T                  the products in the first-level cache
//       h_t, c_t = cell(a)
// x and h are rounded to the numbers of the weights, row by row, just before they are multiplied (h to two digits of
// them, of int8); states are float.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "narrow.h"
#include "recurrent_layer.h"
#include "threads.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {
namespace {

// Groups of panels of some units, as what a layer's work is cut between.
template <typename Cell>
struct Groups {
  explicit Groups(int64_t units) : units(units) {}
  static constexpr int64_t width = panels_of_group(Cell::gates) * kPanel;
  int64_t units;
  int64_t count() const { return ceil_div(units, width); }
  int64_t begin(int64_t group) const { return group * width; }
};

template <typename Cell>
using FrozenLayer = Layer<Cell, float, Groups<Cell>>;

// Weights of a direction, and what its products are multiplied with and added to: [panel][slot or gate][16].
template <typename Cell, typename Numbers>
struct FrozenWeights {
  FrozenWeights(const RecurrentArguments& args, const Tensor& packed, const Tensor& factors)
      : w_ih{static_cast<const char*>(packed.const_data_ptr()), args.hidden, args.inputs, Cell::gates},
        w_hh{w_ih.data + 4 * w_ih.words(args.hidden, args.inputs, Cell::gates), args.hidden, args.features,
             Cell::gates},
        w_hr{w_hh.data + 4 * w_hh.words(args.hidden, args.features, Cell::gates), args.features, args.hidden, 1},
        bias(reinterpret_cast<const float*>(factors.const_data_ptr<int32_t>())),
        scale_ih(bias + w_ih.panels() * kPanel * Cell::slots),
        scale_hh(scale_ih + w_ih.panels() * kPanel * Cell::gates),
        scale_hr(scale_hh + w_ih.panels() * kPanel * Cell::gates) {}

  NarrowMatrix<Numbers> w_ih, w_hh, w_hr;
  const float *bias, *scale_ih, *scale_hh, *scale_hr;
};

template <typename Cell, typename Numbers>
class Frozen {
  static constexpr int64_t kSlots = Cell::slots, kGates = Cell::gates, kOfGroup = panels_of_group(kGates),
                           kDigits = Numbers::digits_of_state;
  static constexpr int64_t kRowsOfTile = kNarrowRows / kDigits;
  using V = Vectorized<float>;

 public:
  // h_n, c_n: [D, B, P], [D, B, H], of this layer. c_steps: [D, N, H], or nullptr.
  Frozen(const FrozenLayer<Cell>& layer, at::TensorList weights, float* y, float* h_n, float* c_n, float* c_steps)
      : layer_(layer),
        y_(y),
        h_n_(h_n),
        c_n_(c_n),
        c_steps_(c_steps),
        h_stride_(row_stride<float>(ceil_div(layer.features, kPanel) * kPanel)),
        c_stride_(row_stride<float>(ceil_div(layer.hidden, kPanel) * kPanel)),
        states_(layer.directions * layer.batch * (2 * h_stride_ + (Cell::has_c ? c_stride_ : 0))) {
    for (const auto d : c10::irange(layer.directions)) weights_.push_back({layer, weights[2 * d], weights[2 * d + 1]});
  }

  void run() const {
    layer_.for_each_share([&](Share& share) { run_share(share); });
  }

 private:
  void run_share(Share& share) const {
    const int64_t d = share.direction, begin = share.sequences.begin, end = share.sequences.end, batch = end - begin;
    const FrozenWeights<Cell, Numbers>& weights = weights_[d];
    const Slice groups = share.panels, units = layer_.units(groups),
                features = layer_.has_projection ? Slice{0, layer_.features} : units;
    const int64_t first_panel = groups.begin * kOfGroup, panels = ceil_div(units.end - units.begin, kPanel);
    const int64_t gate_stride = row_stride<float>(panels * kSlots * kPanel);
    const int64_t fitting = kGateBytes / (gate_stride * static_cast<int64_t>(sizeof(float)));
    const int64_t block_rows =
        std::min(std::max<int64_t>({batch, fitting, kMinBlockRows}), std::max<int64_t>(batch, share_rows(begin, end)));
    const int64_t x_depth = words_of<Numbers>(layer_.inputs), h_depth = words_of<Numbers>(layer_.features),
                  r_depth = layer_.has_projection ? words_of<Numbers>(layer_.hidden) : 0;
    // One piece of memory: several take a good part of a small step's time.
    const int64_t unprojected_stride = layer_.has_projection ? c_stride_ : 0;
    const Scratch<float> scratch(block_rows * (gate_stride + x_depth + 2) +
                                 batch * (kDigits * (h_depth + 2) + r_depth + 2) + batch * unprojected_stride);
    float* next = scratch.data();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    const auto take_rows = [&](int64_t rows, int64_t depth) {
      auto* words = reinterpret_cast<int32_t*>(take(rows * depth));
      float* scales = take(rows);
      return NarrowRows(words, depth, scales, reinterpret_cast<int32_t*>(take(rows)));
    };
    float* const gates = take(block_rows * gate_stride);
    float* const unprojected = take(batch * unprojected_stride);
    const NarrowRows x_rows = take_rows(block_rows, x_depth), h_rows = take_rows(kDigits * batch, h_depth),
                     r_rows = take_rows(batch, r_depth);

    // h_{t-1} and h_t change places after each step. A sequence that has not begun, or has ended, stands in both.
    float* const states = states_.data() + (d * layer_.batch + begin) * (2 * h_stride_ + (Cell::has_c ? c_stride_ : 0));
    float *h = states, *h_next = h + batch * h_stride_, *const c = h_next + batch * h_stride_;
    for (const auto r : c10::irange(batch)) {
      for (float* to : {h, h_next})
        begin_row(to + r * h_stride_, layer_.h0_row(d, begin + r), features, layer_.features);
      if (Cell::has_c) begin_row(c + r * c_stride_, layer_.c0_row(d, begin + r), units, layer_.hidden);
    }

    int64_t active_before = 0;
    for (int64_t i = 0; i < layer_.steps;) {
      // The steps [i, stop) of the block; its rows are in the order in which they are run.
      int64_t stop = i, count = 0;
      for (; stop < layer_.steps; ++stop) {
        const int64_t t = layer_.step(d, stop), active = layer_.active_of(t, begin, end);
        if (count + active > block_rows) break;
        for (const auto r : c10::irange(active)) {
          Numbers::template put_row<1>(x_rows, count++, layer_.x_row(t, begin + r), layer_.inputs);
        }
      }
      multiply_x(weights, groups, x_rows, count, gates, gate_stride);

      int64_t row = 0;
      for (; i < stop; ++i) {
        const int64_t t = layer_.step(d, i), active = layer_.active_of(t, begin, end);
        if (active == 0) continue;
        share.meet();
        for (int64_t r = active; r < active_before; ++r) {
          std::copy(h + r * h_stride_ + features.begin, h + r * h_stride_ + features.end,
                    h_next + r * h_stride_ + features.begin);
        }
        active_before = active;
        for (const auto r : c10::irange(active)) {
          Numbers::template put_row<kDigits>(h_rows, kDigits * r, h + r * h_stride_, layer_.features);
        }
        const int64_t first_row = layer_.first_row[t] + begin;
        float* const to = layer_.has_projection ? unprojected : h_next;
        const int64_t to_stride = layer_.has_projection ? c_stride_ : h_stride_;
        run_step(weights, groups, h_rows, active, gates + row * gate_stride, gate_stride, first_panel, h, to, to_stride,
                 c);
        if (layer_.has_projection) {
          for (const auto r : c10::irange(active)) {
            Numbers::template put_row<1>(r_rows, r, unprojected + r * c_stride_, layer_.hidden);
          }
          project(weights, r_rows, active, h_next);
        }
        for (const auto r : c10::irange(active)) {
          const float* from = h_next + r * h_stride_;
          std::copy(from + features.begin, from + features.end, y_row(d, first_row + r) + features.begin);
          if (c_steps_ != nullptr && Cell::has_c) {
            std::copy(c + r * c_stride_ + units.begin, c + r * c_stride_ + units.end,
                      c_steps_ + (d * layer_.rows + first_row + r) * layer_.hidden + units.begin);
          }
        }
        row += active;
        std::swap(h, h_next);
      }
    }

    for (const auto r : c10::irange(batch)) {
      const int64_t row = d * layer_.batch + begin + r;
      const float* from = h + r * h_stride_;
      std::copy(from + features.begin, from + features.end, h_n_ + row * layer_.features + features.begin);
      if (Cell::has_c) {
        const float* c_from = c + r * c_stride_;
        std::copy(c_from + units.begin, c_from + units.end, c_n_ + row * layer_.hidden + units.begin);
      }
    }
  }

  int64_t share_rows(int64_t begin, int64_t end) const {
    int64_t rows = 0;
    for (const auto t : c10::irange(layer_.steps)) rows += layer_.active_of(t, begin, end);
    return rows;
  }

  // Some columns of a state, and zeros behind its last one, which products may read.
  static void begin_row(float* to, const float* from, Slice columns, int64_t all) {
    std::copy(from + columns.begin, from + columns.end, to + columns.begin);
    if (columns.end == all) std::fill(to + all, to + ceil_div(all, kPanel) * kPanel, 0.f);
  }

  // The sum of a product and what it is added to, for 16 units.
  template <typename Body>
  static NLPKERNELS_INLINE void for_each_lanes(const Body& body) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kPanel; j += V::size()) body(j);
  }
  static NLPKERNELS_INLINE V scaled(const V& product, const float* scale, const V& sum) {
    if constexpr (Numbers::has_scales) return at::vec::fmadd(product, V::loadu(scale), sum);
    return product + sum;
  }

  // gates = x W_ih^T + biases
  void multiply_x(const FrozenWeights<Cell, Numbers>& weights, Slice groups, const NarrowRows& x, int64_t count,
                  float* gates, int64_t gate_stride) const {
    alignas(64) float products[kNarrowRows * kOfGroup * kGates * kPanel];
    const int64_t ldo = kOfGroup * kGates * kPanel;
    for (const auto group : c10::irange(groups.begin, groups.end)) {
      const int64_t panels = weights.w_ih.panels_in(group), first = group * kOfGroup;
      for (int64_t r = 0; r < count; r += kNarrowRows) {
        const int64_t rows = std::min<int64_t>(kNarrowRows, count - r);
        multiply_group(x.from(r), rows, weights.w_ih, group, products, ldo);
        for (const auto m : c10::irange(rows)) {
          for (const auto p : c10::irange(panels)) {
            const float* product = products + m * ldo + p * kGates * kPanel;
            const float *bias = weights.bias + (first + p) * kSlots * kPanel,
                        *scale = weights.scale_ih + (first + p) * kGates * kPanel;
            float* out = gates + (r + m) * gate_stride + (first - groups.begin * kOfGroup + p) * kSlots * kPanel;
            if constexpr (kSlots > kGates) std::copy_n(bias, kSlots * kPanel, out);
            for (int64_t g = 0; g < kGates; ++g) {
              const int64_t slot = Cell::input_slot(g) * kPanel;
              for_each_lanes([&](int64_t j) {
                scaled(V::loadu(product + g * kPanel + j), scale + g * kPanel + j, V::loadu(bias + slot + j))
                    .store(out + slot + j);
              });
            }
          }
        }
      }
    }
  }

  // One step of the first `active` sequences of a share.
  void run_step(const FrozenWeights<Cell, Numbers>& weights, Slice groups, const NarrowRows& h_rows, int64_t active,
                const float* gates, int64_t gate_stride, int64_t first_panel, const float* h, float* h_next,
                int64_t next_stride, float* c) const {
    alignas(64) float products[kNarrowRows * kOfGroup * kGates * kPanel];
    const int64_t ldo = kOfGroup * kGates * kPanel;
    for (const auto group : c10::irange(groups.begin, groups.end)) {
      const int64_t panels = weights.w_hh.panels_in(group), first = group * kOfGroup;
      for (int64_t r = 0; r < active; r += kRowsOfTile) {
        const int64_t rows = std::min<int64_t>(kRowsOfTile, active - r);
        multiply_group(h_rows.from(kDigits * r), kDigits * rows, weights.w_hh, group, products, ldo);
        for (const auto m : c10::irange(rows)) {
          for (const auto p : c10::irange(panels)) {
            const float* product = products + kDigits * m * ldo + p * kGates * kPanel;
            const float* scale = weights.scale_hh + (first + p) * kGates * kPanel;
            const float* gate = gates + (r + m) * gate_stride + (first - first_panel + p) * kSlots * kPanel;
            const int64_t column = (first + p) * kPanel;
            for_each_lanes([&](int64_t j) {
              V a[kSlots], saved[std::max(1, Cell::saved)], c_t(0);
#pragma GCC unroll 4
              for (int64_t slot = 0; slot < kSlots; ++slot) {
                a[slot] = V::loadu(gate + slot * kPanel + j);
                if (slot >= kGates) continue;
                const float* of_h = product + slot * kPanel + j;
                const V sum = kDigits == 2 ? V::loadu(of_h) + V::loadu(of_h + ldo) : V::loadu(of_h);
                a[slot] = scaled(sum, scale + slot * kPanel + j, a[slot]);
              }
              if constexpr (Cell::has_c) c_t = V::loadu(c + (r + m) * c_stride_ + column + j);
              const V before = Cell::has_c ? V(0) : V::loadu(h + (r + m) * h_stride_ + column + j);
              const V h_t = Cell::forward(a, before, c_t, saved);
              if constexpr (Cell::has_c) c_t.store(c + (r + m) * c_stride_ + column + j);
              h_t.store(h_next + (r + m) * next_stride + column + j);
            });
          }
        }
      }
    }
  }

  // h = W_hr (o tanh(c))
  void project(const FrozenWeights<Cell, Numbers>& weights, const NarrowRows& rows, int64_t active, float* h) const {
    constexpr int64_t of_group = panels_of_group(1), ldo = of_group * kPanel;
    alignas(64) float products[kNarrowRows * ldo];
    for (int64_t group = 0; group * of_group < weights.w_hr.panels(); ++group) {
      const int64_t panels = weights.w_hr.panels_in(group), column = group * of_group * kPanel;
      for (int64_t r = 0; r < active; r += kNarrowRows) {
        const int64_t count = std::min<int64_t>(kNarrowRows, active - r);
        multiply_group(rows.from(r), count, weights.w_hr, group, products, ldo);
        for (const auto m : c10::irange(count)) {
          for (int64_t p = 0; p < panels * kPanel; p += kPanel) {
            for_each_lanes([&](int64_t j) {
              scaled(V::loadu(products + m * ldo + p + j), weights.scale_hr + column + p + j, V(0))
                  .store(h + (r + m) * h_stride_ + column + p + j);
            });
          }
        }
      }
    }
  }

  float* y_row(int64_t d, int64_t row) const { return y_ + (row * layer_.directions + d) * layer_.features; }

  const FrozenLayer<Cell>& layer_;
  std::vector<FrozenWeights<Cell, Numbers>> weights_;
  float *y_, *h_n_, *c_n_, *c_steps_;
  const int64_t h_stride_, c_stride_;
  const Scratch<float> states_;  // for each direction and sequence h twice, and c; rows padded
};

// The sizes of one layer, whose input is x, and of its weights.
template <typename Cell, typename Numbers>
RecurrentArguments check_frozen(const Tensor& x, const OptionalTensor& batch_sizes, const Tensor& h0,
                                const OptionalTensor& c0, at::TensorList weights) {
  const char* op = "frozen";
  RecurrentArguments args = check_sequences(op, x, batch_sizes, h0);
  TORCH_CHECK(x.scalar_type() == at::kFloat, op, ": expected x of dtype float32, got ", x.scalar_type());
  TORCH_CHECK(c0.has_value() == Cell::has_c, op, ": expected ", Cell::has_c ? "c0 for an LSTM" : "no c0");
  args.hidden = args.features;
  if (c0) {
    TORCH_CHECK(c0->dim() == 3 && c0->size(0) == args.directions && c0->size(1) == args.batch, op,
                ": expected c0 of shape [", args.directions, ", ", args.batch, ", hidden], got ", c0->sizes());
    check_like(op, "c0", *c0, "x", x);
    args.hidden = c0->size(2);
  }
  args.has_projection = args.features != args.hidden;
  TORCH_CHECK(args.hidden > 0 && args.features > 0, op, ": expected at least one hidden unit, got h0 of shape ",
              h0.sizes());
  const int64_t widest = std::max({args.inputs, args.hidden, args.features});
  TORCH_CHECK_VALUE(widest <= 65536, op, ": expected at most 65,536 inputs and hidden units, got ", widest);
  check_product(op, "directions, rows, gates, hidden units and features",
                {args.directions, args.rows, Cell::gates + 1, args.hidden, widest});
  check_product(op, "directions, batch and features", {args.directions, args.batch, widest});
  using Matrix = NarrowMatrix<Numbers>;
  const int64_t words = Matrix::words(args.hidden, args.inputs, Cell::gates) +
                        Matrix::words(args.hidden, args.features, Cell::gates) +
                        (args.has_projection ? Matrix::words(args.features, args.hidden, 1) : 0);
  const int64_t padded = ceil_div(args.hidden, kPanel) * kPanel;
  const int64_t factors =
      padded * Cell::slots +
      (!Numbers::has_scales
           ? 0
           : 2 * padded * Cell::gates + (args.has_projection ? ceil_div(args.features, kPanel) * kPanel : 0));
  for (const auto d : c10::irange(args.directions)) {
    const Tensor &packed = weights[2 * d], &of = weights[2 * d + 1];
    check_shape(op, "packed weights", packed, {words * Numbers::values});
    check_shape(op, "their factors", of, {factors});
    TORCH_CHECK(packed.scalar_type() == c10::CppTypeToScalarType<typename Numbers::Stored>() &&
                    of.scalar_type() == at::kInt && packed.is_contiguous() && of.is_contiguous() && packed.is_cpu() &&
                    of.is_cpu(),
                op, ": expected contiguous packed weights of one dtype and factors of int32 on the CPU, got ",
                packed.scalar_type(), " and ", of.scalar_type());
    check_storage(op, "packed weights", packed);
    check_storage(op, "their factors", of);
  }
  return args;
}

template <typename Cell, typename Numbers>
std::tuple<Tensor, Tensor, Tensor, Tensor> run_frozen(const Tensor& x, const OptionalTensor& batch_sizes,
                                                      const Tensor& h0, const OptionalTensor& c0,
                                                      at::TensorList weights, int64_t directions, bool keep,
                                                      int64_t threads) {
  const int64_t layers = h0.size(0) / directions;
  const auto options = x.options();
  const Tensor h_n = at::empty(h0.sizes(), options),
               c_n = c0 ? at::empty(c0->sizes(), options) : at::empty({0}, options);
  Tensor y = x, c_steps = at::empty({0}, options);
  for (const auto layer : c10::irange(layers)) {
    const auto part = [&](const Tensor& states) {
      return layers == 1 ? states : states.narrow(0, layer * directions, directions);
    };
    const Tensor h = part(h0);
    const OptionalTensor c = c0 ? OptionalTensor(part(*c0)) : std::nullopt;
    const at::TensorList own = weights.slice(2 * layer * directions, 2 * directions);
    const RecurrentArguments args = check_frozen<Cell, Numbers>(y, batch_sizes, h, c, own);
    // Of narrow numbers a multiply-add takes less time, and so is worth fewer threads.
    const int64_t work = args.rows * Cell::gates * args.hidden * (args.inputs + args.features);
    const FrozenLayer<Cell> plan(args, y, h, c, std::nullopt, threads_for(work / Numbers::values, threads));
    const Tensor out = at::empty(sizes_of_y(args, y), options);
    if (keep && Cell::has_c) c_steps = at::empty({directions, args.rows, args.hidden}, options);
    const int64_t before = layer * directions * args.batch;
    Frozen<Cell, Numbers>(plan, own, out.mutable_data_ptr<float>(),
                          h_n.mutable_data_ptr<float>() + before * args.features,
                          c0 ? c_n.mutable_data_ptr<float>() + before * args.hidden : nullptr,
                          c_steps.numel() > 0 ? c_steps.mutable_data_ptr<float>() : nullptr)
        .run();
    y = out;
  }
  return {y, h_n, c_n, c_steps};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> frozen(const Tensor& x, const OptionalTensor& batch_sizes, const Tensor& h0,
                                                  const OptionalTensor& c0, at::TensorList weights,
                                                  c10::string_view cell, int64_t directions, bool keep) {
  const char* op = "frozen";
  const int64_t threads = threads_of_call();
  TORCH_CHECK_VALUE(directions == 1 || directions == 2, op, ": expected 1 or 2 directions, got ", directions);
  TORCH_CHECK(h0.dim() == 3 && h0.size(0) > 0 && h0.size(0) % directions == 0, op, ": expected h0 of shape [layers * ",
              directions, ", batch, features], got ", h0.sizes());
  TORCH_CHECK(!c0 || (c0->dim() == 3 && c0->size(0) == h0.size(0)), op, ": expected c0 of as many layers as h0");
  TORCH_CHECK(static_cast<int64_t>(weights.size()) == 2 * h0.size(0), op,
              ": expected packed weights and their factors for each of ", h0.size(0), " layers and directions, got ",
              weights.size(), " tensors");
  TORCH_CHECK_VALUE(!keep || h0.size(0) == directions, op, ": expected one layer where all states are kept, got ",
                    h0.size(0) / directions);
  const auto dtype = weights[0].scalar_type();
  TORCH_CHECK(dtype == at::kByte || dtype == at::kShort, op,
              ": expected packed weights of dtype uint8 (int8) or int16 (bfloat16), got ", dtype);
  std::tuple<Tensor, Tensor, Tensor, Tensor> result;
  dispatch_cell(cell, [&](auto cell_type) {
    using Cell = decltype(cell_type);
    const auto run = dtype == at::kByte ? run_frozen<Cell, Int8> : run_frozen<Cell, Brain>;
    result = run(x, batch_sizes, h0, c0, weights, directions, keep, threads);
  });
  return result;
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels

TORCH_LIBRARY_IMPL(nlpkernels, CPU, m) { m.impl("frozen", TORCH_FN(nlpkernels::frozen)); }
