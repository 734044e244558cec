// The backward pass of a layer: the steps the other way, dh_{t-1} = dgates W_hh. It stores dgates for all rows,
// [row][slot][unit], from which the gradients of the weights and of x follow as large products.
#pragma once

#include <ATen/ops/empty.h>

#include <memory>
#include <vector>

#include "recurrent_layer.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

template <typename Cell, typename T>
class Backward {
  using scalar = acc_t<T>;
  using Operand = operand_t<T>;
  static constexpr int64_t kSlots = Cell::slots;
  static constexpr int64_t kSaved = Cell::saved;

 public:
  Backward(const Layer<Cell, T>& layer, const OptionalTensor& dy, const OptionalTensor& dh_n,
           const OptionalTensor& dc_n, const Tensor& y, const Tensor& workspace, bool need_dx, bool need_dweights)
      : layer_(layer),
        dy_(contiguous(dy)),
        dh_n_(contiguous(dh_n)),
        dc_n_(contiguous(dc_n)),
        y_tensor_(y.contiguous()),
        workspace_tensor_(workspace.contiguous()),
        y_(y_tensor_.template const_data_ptr<T>()),
        workspace_(workspace_tensor_.template const_data_ptr<T>()),
        need_dweights_(need_dweights),
        dh_(layer.directions * layer.batch * row_stride<scalar>(layer.features)),
        dc_(Cell::has_c ? layer.directions * layer.batch * row_stride<scalar>(layer.hidden) : 0),
        dgates_(layer.directions * layer.rows, layer.slot_columns()),
        dprojected_(layer.has_projection ? layer.directions * layer.rows : 0, layer.features) {
    const auto options = layer.x.options();
    dx = need_dx ? at::empty(layer.x.sizes(), options) : at::empty({0}, options);
    dh0 = at::empty(layer.h0.sizes(), options);
    dc0 = Cell::has_c ? at::empty(layer.c0->sizes(), options) : at::empty({0}, options);
    for (const Tensor& weight : layer.weights) {
      dweights.push_back(need_dweights ? at::empty(weight.sizes(), options) : at::empty({0}, options));
    }
    if (layer.uses_weights_once()) return;
    for (const auto d : c10::irange(layer.directions)) {
      directions_.push_back(std::make_unique<Direction>(layer, d, true));
    }
  }

  Tensor dx, dh0, dc0;
  std::vector<Tensor> dweights;

  void run() {
    layer_.for_each_share([&](Share& share) { run_share(share); });
    if (need_dweights_) run_weights();
    if (dx.dim() > 1) run_inputs();
  }

 private:
  struct Direction {
    Direction(const Layer<Cell, T>& layer, int64_t d, bool is_stored)
        : w_hh(layer.gate_rows(), layer.features, 1, is_stored),
          w_hr(layer.has_projection ? layer.features : 0, layer.hidden, 1, is_stored) {
      w_hh.pack(layer.w_hh(d).template const_data_ptr<T>(), layer.features);
      if (layer.has_projection) w_hr.pack(layer.w_hr(d).template const_data_ptr<T>(), layer.hidden);
    }
    PackedMatrix<Operand> w_hh, w_hr;
  };

  Operand* dgates_row(int64_t d, int64_t row) const { return dgates_.row(d * layer_.rows + row); }

  const T* workspace_row(int64_t d, int64_t row) const {
    return workspace_ + (d * layer_.rows + row) * kSaved * layer_.hidden;
  }

  const T* y_row(int64_t d, int64_t row) const { return y_ + (row * layer_.directions + d) * layer_.features; }

  // h_{t-1} of sequence b, in the tensors' dtype
  const T* previous_h(int64_t d, int64_t t, int64_t b) const {
    const int64_t row = layer_.previous_row(d, t, b);
    return row >= 0 ? y_row(d, row) : layer_.h0_row(d, b);
  }

  // All steps of a share: dgates of its rows and units, and dh0, dc0.
  void run_share(Share& share) const {
    const int64_t d = share.direction, begin = share.sequences.begin, end = share.sequences.end, batch = share.batch();
    const int64_t h_stride = row_stride<scalar>(layer_.features), c_stride = row_stride<scalar>(layer_.hidden);
    const Slice units = layer_.units(share.panels),
                features = layer_.has_projection ? Slice{0, layer_.features} : units;
    std::unique_ptr<Direction> own;
    if (layer_.uses_weights_once()) own = std::make_unique<Direction>(layer_, d, false);
    const Direction& direction = own ? *own : *directions_[d];
    const Slice panels = layer_.has_projection ? direction.w_hh.panels.all() : share.panels;
    scalar *dh = dh_.data() + (d * layer_.batch + begin) * h_stride,
           *dc = dc_.data() + (d * layer_.batch + begin) * c_stride;
    const Scratch<scalar> unprojected(layer_.has_projection ? batch * c_stride : 0);
    const Scratch<scalar> dmasked(layer_.h_mask ? batch * h_stride : 0);

    for (const auto r : c10::irange(batch)) {
      const int64_t row = d * layer_.batch + begin + r;
      read_or_zero(dh + r * h_stride, data<T>(dh_n_), row * layer_.features, features);
      if (Cell::has_c) read_or_zero(dc + r * c_stride, data<T>(dc_n_), row * layer_.hidden, units);
    }

    for (int64_t i = layer_.steps - 1; i >= 0; --i) {
      const int64_t t = layer_.step(d, i), active = layer_.active_of(t, begin, end);
      if (active == 0) continue;
      const int64_t first_row = layer_.first_row[t] + begin;
      const RowTiles tiles(active);
      if (dy_) {
        for (const auto r : c10::irange(active)) {
          const T* dy = data<T>(dy_) + ((first_row + r) * layer_.directions + d) * layer_.features;
          scalar* out = dh + r * h_stride;
          for (const auto j : c10::irange(features.begin, features.end)) out[j] += static_cast<scalar>(dy[j]);
        }
      }
      if (layer_.has_projection) {
        const int64_t first = d * layer_.rows + first_row;
        for (const auto r : c10::irange(active)) dprojected_.copy(first + r, dh + r * h_stride);
        multiply(tiles, dprojected_.operand(first), direction.w_hr, direction.w_hr.panels.all(), unprojected.data(),
                 c_stride, false);
        std::fill(dh, dh + active * h_stride, scalar(0));
      }
      for (const auto r : c10::irange(active)) {
        scalar* projected = layer_.has_projection ? unprojected.data() + r * c_stride : nullptr;
        differentiate(d, t, begin + r, units, dh + r * h_stride, projected, dc + r * c_stride);
      }
      share.meet();
      const LeftOperand<Operand> left{dgates_row(d, first_row), layer_.gate_rows(), dgates_.stride};
      if (!layer_.h_mask) {
        multiply(tiles, left, direction.w_hh, panels, dh + features.begin, h_stride, true);
        continue;
      }
      multiply(tiles, left, direction.w_hh, panels, dmasked.data() + features.begin, h_stride, false);
      for (const auto r : c10::irange(active)) {
        layer_.mask(d, begin + r, features, dmasked.data() + r * h_stride, dmasked.data() + r * h_stride);
        for (const auto j : c10::irange(features.begin, features.end))
          dh[r * h_stride + j] += dmasked.data()[r * h_stride + j];
      }
    }

    for (const auto r : c10::irange(batch)) {
      const int64_t row = d * layer_.batch + begin + r;
      write(dh0.mutable_data_ptr<T>() + row * layer_.features, dh + r * h_stride, features);
      if (Cell::has_c) write(dc0.mutable_data_ptr<T>() + row * layer_.hidden, dc + r * c_stride, units);
    }
  }

  // The cell's gradient on one row: dgates; dh becomes the part of dh_{t-1} that passes W_hh by; dc becomes dc_{t-1}.
  // With a projection, what came through W_hr stands in `projected`, and dh is zero already.
  void differentiate(int64_t d, int64_t t, int64_t b, Slice units, scalar* dh, const scalar* projected,
                     scalar* dc) const {
    const int64_t row = layer_.first_row[t] + b, hidden = layer_.hidden;
    const int64_t previous = layer_.previous_row(d, t, b);
    const T* saved_row = workspace_row(d, row);
    const T* h_row = y_row(d, row);
    const T* h_previous = previous_h(d, t, b);
    const T* c_previous = nullptr;
    if constexpr (Cell::has_c) {
      c_previous = previous >= 0 ? workspace_row(d, previous) + Cell::saved_c * hidden : layer_.c0_row(d, b);
    }
    Operand* out = dgates_row(d, row);
    for_each_vector<T>(units.end - units.begin, [&](int64_t from_begin, int64_t n) {
      const int64_t j = units.begin + from_begin;
      Vec<T> saved[std::max<int64_t>(1, kSaved)], da[kSlots], h(0), h_prev(0), c_prev(0), dc_t(0);
#pragma GCC unroll 5
      for (int64_t s = 0; s < kSaved; ++s) saved[s] = load_vector(saved_row + s * hidden + j, n);
      if constexpr (Cell::has_c) {
        c_prev = load_vector(c_previous + j, n);
        dc_t = load_vector(dc + j);
      } else {
        h = load_vector(h_row + j, n);
        h_prev = load_vector(h_previous + j, n);
      }
      const Vec<T> direct =
          Cell::backward(saved, h, h_prev, c_prev, load_vector((projected != nullptr ? projected : dh) + j), dc_t, da);
      if constexpr (Cell::has_c) store_vector(dc + j, dc_t);
      if (projected == nullptr) store_vector(dh + j, direct);
#pragma GCC unroll 4
      for (int64_t slot = 0; slot < kSlots; ++slot) store_operand(out + slot * hidden + j, da[slot], n);
    });
  }

  // dW_ih = dgates^T x, dW_hh = dgates^T h_{t-1} (under the mask), dW_hr = dh^T (o tanh c), and the biases' column
  // sums.
  void run_weights() {
    const int64_t rows = layer_.rows, hidden = layer_.hidden, features = layer_.features, inputs = layer_.inputs;
    std::vector<const T*> x_rows(rows);
    std::vector<std::vector<const T*>> h_rows(layer_.directions, std::vector<const T*>(rows));
    for (const auto t : c10::irange(layer_.steps)) {
      for (const auto b : c10::irange(layer_.active[t])) {
        x_rows[layer_.first_row[t] + b] = layer_.x_row(t, b);
        for (const auto d : c10::irange(layer_.directions)) {
          h_rows[d][layer_.first_row[t] + b] = previous_h(d, t, b);
        }
      }
    }
    const Scratch<T> masked(layer_.h_mask ? layer_.directions * rows * features : 0);
    if (layer_.h_mask) {
      const int64_t grain = std::max<int64_t>(1, kMinWork / std::max<int64_t>(1, layer_.batch * features));
      at::parallel_for(0, layer_.directions * layer_.steps, grain, [&](int64_t begin, int64_t end) {
        for (const auto i : c10::irange(begin, end)) {
          const int64_t d = i / layer_.steps, t = i % layer_.steps;
          for (const auto b : c10::irange(layer_.active[t])) {
            const T*& h = h_rows[d][layer_.first_row[t] + b];
            T* to = masked.data() + (d * rows + layer_.first_row[t] + b) * features;
            layer_.mask(d, b, {0, features}, to, h);
            h = to;
          }
        }
      });
    }
    std::vector<TransposedProduct<Operand, T, T>> products;
    const auto dweight = [&](int64_t d, int64_t i) {
      return dweights[d * layer_.weights_per_direction + i].template mutable_data_ptr<T>();
    };
    for (const auto d : c10::irange(layer_.directions)) {
      for (const GateRun& run : input_gate_runs<Cell>()) {
        products.push_back({run.count * hidden, inputs, rows, dgates_row(d, 0) + run.slot * hidden, dgates_.stride,
                            x_rows.data(), dweight(d, 0) + run.gate * hidden * inputs, inputs});
      }
      products.push_back({layer_.gate_rows(), features, rows, dgates_row(d, 0), dgates_.stride, h_rows[d].data(),
                          dweight(d, 1), features});
    }
    run_products(products, layer_.threads);
    if (layer_.has_bias) {
      for (const auto d : c10::irange(layer_.directions)) run_biases(d, dweight(d, 2), dweight(d, 3));
    }
    if (layer_.has_projection) run_projection_weights();
  }

  void run_biases(int64_t d, T* db_ih, T* db_hh) const {
    const int64_t columns = layer_.slot_columns(), hidden = layer_.hidden;
    const Scratch<scalar> sums(columns);
    at::parallel_for(0, columns, std::max<int64_t>(64, kMinWork / std::max<int64_t>(1, layer_.rows)),
                     [&](int64_t begin, int64_t end) {
                       // As in gemm.h, kChain terms at a time.
                       std::vector<scalar> chain(end - begin);
                       std::fill(sums.data() + begin, sums.data() + end, scalar(0));
                       for (int64_t first = 0; first < layer_.rows; first += kChain) {
                         std::fill(chain.begin(), chain.end(), scalar(0));
                         for (const auto row : c10::irange(first, std::min(first + kChain, layer_.rows))) {
                           const Operand* da = dgates_row(d, row) + begin;
                           for (const auto j : c10::irange(end - begin)) chain[j] += static_cast<scalar>(da[j]);
                         }
                         for (const auto j : c10::irange(end - begin)) sums.data()[begin + j] += chain[j];
                       }
                     });
    for (const auto gate : c10::irange<int64_t>(Cell::gates)) {
      write(db_ih + gate * hidden, sums.data() + Cell::input_slot(gate) * hidden, {0, hidden});
      write(db_hh + gate * hidden, sums.data() + gate * hidden, {0, hidden});
    }
  }

  void run_projection_weights() {
    if constexpr (Cell::has_c) {
      const int64_t rows = layer_.rows, hidden = layer_.hidden, features = layer_.features;
      const Scratch<Operand> outputs(layer_.directions * rows * hidden);
      at::parallel_for(0, layer_.directions * rows, 64, [&](int64_t begin, int64_t end) {
        for (const auto i : c10::irange(begin, end)) {
          const T* kept = workspace_row(i / rows, i % rows);
          for_each_vector<T>(hidden, [&](int64_t j, int64_t n) {
            Vec<T> saved[kSaved];
#pragma GCC unroll 5
            for (int64_t s = 0; s < kSaved; ++s) saved[s] = load_vector(kept + s * hidden + j, n);
            store_vector(outputs.data() + i * hidden + j, Cell::output(saved), n);
          });
        }
      });
      std::vector<const Operand*> output_rows(layer_.directions * rows);
      for (const auto i : c10::irange(layer_.directions * rows)) output_rows[i] = outputs.data() + i * hidden;
      std::vector<TransposedProduct<Operand, Operand, T>> products;
      for (const auto d : c10::irange(layer_.directions)) {
        const Tensor& dw_hr = dweights[(d + 1) * layer_.weights_per_direction - 1];
        products.push_back({features, hidden, rows, dprojected_.row(d * rows), dprojected_.stride,
                            output_rows.data() + d * rows, dw_hr.template mutable_data_ptr<T>(), hidden});
      }
      run_products(products, layer_.threads);
    }
  }

  // dx = dgates W_ih, over both directions. Cut by rows; or by columns, if the rows are so few that a thread may as
  // well take them all, with weights that it packs as it reads them.
  void run_inputs() const {
    constexpr int64_t max_block = 96;
    const int64_t rows = layer_.rows, inputs = layer_.inputs;
    const Panels<scalar> columns(inputs);
    const int64_t threads = threads_for(rows * layer_.directions * layer_.gate_rows() * inputs, layer_.threads);
    if (rows <= max_block) {
      const int64_t parts = std::clamp<int64_t>(columns.count(), 1, threads);
      at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        const std::vector<Term> terms = input_terms(false);
        run_input_block(terms, {0, rows}, {columns.count() * begin / parts, columns.count() * end / parts});
      });
      return;
    }
    const std::vector<Term> terms = input_terms(true);
    const int64_t block = std::min(ceil_div(rows, threads), max_block);
    at::parallel_for(0, ceil_div(rows, block), threads > 1 ? 1 : rows, [&](int64_t begin, int64_t end) {
      for (const auto i : c10::irange(begin, end)) {
        run_input_block(terms, {i * block, std::min(rows, (i + 1) * block)}, columns.all());
      }
    });
  }

  // Gates of W_ih of one direction whose slots are neighbours.
  struct Term {
    int64_t direction, slot;
    std::unique_ptr<PackedMatrix<Operand>> w;
  };

  std::vector<Term> input_terms(bool is_stored) const {
    const int64_t hidden = layer_.hidden, inputs = layer_.inputs;
    std::vector<Term> terms;
    for (const auto d : c10::irange(layer_.directions)) {
      for (const GateRun& run : input_gate_runs<Cell>()) {
        terms.push_back(
            {d, run.slot, std::make_unique<PackedMatrix<Operand>>(run.count * hidden, inputs, 1, is_stored)});
        terms.back().w->pack(layer_.w_ih(d).template const_data_ptr<T>() + run.gate * hidden * inputs, inputs);
      }
    }
    return terms;
  }

  void run_input_block(const std::vector<Term>& terms, Slice rows, Slice panels) const {
    const Panels<scalar> all(layer_.inputs);
    const int64_t first = all.begin(panels.begin), count = std::min(layer_.inputs, all.begin(panels.end)) - first;
    const int64_t stride = row_stride<scalar>(count);
    const RowTiles tiles(rows.end - rows.begin);
    const ProductScope<Operand> scope;
    const Scratch<scalar> sum(tiles.total() * stride);
    for (const Term& term : terms) {
      const Operand* dgates = dgates_row(term.direction, rows.begin) + term.slot * layer_.hidden;
      multiply(tiles, {dgates, term.w->k, dgates_.stride}, *term.w, panels, sum.data(), stride,
               &term != &terms.front());
    }
    for (const auto r : c10::irange(rows.begin, rows.end)) {
      write(dx.mutable_data_ptr<T>() + r * layer_.inputs + first, sum.data() + (r - rows.begin) * stride, {0, count});
    }
  }

  // to = from + offset, or zeros, for some columns
  static void read_or_zero(scalar* to, const T* from, int64_t offset, Slice columns) {
    for (const auto i : c10::irange(columns.begin, columns.end)) {
      to[i] = from != nullptr ? static_cast<scalar>(from[offset + i]) : scalar(0);
    }
  }

  static void write(T* to, const scalar* from, Slice columns) {
    for (const auto i : c10::irange(columns.begin, columns.end)) to[i] = static_cast<T>(from[i]);
  }

  const Layer<Cell, T>& layer_;
  const OptionalTensor dy_, dh_n_, dc_n_;
  const Tensor y_tensor_, workspace_tensor_;
  const T *y_, *workspace_;
  const bool need_dweights_;
  std::vector<std::unique_ptr<Direction>> directions_;
  const Scratch<scalar> dh_, dc_;  // [B, P] and [B, H] for each direction, rows padded
  const OperandRows<Operand> dgates_, dprojected_;
};

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
