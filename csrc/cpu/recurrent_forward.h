// The forward pass of a layer, for one share:
//   for a block of steps whose gates fit kGateBytes:
//     gates = x W_ih^T                              one product for all steps of the block
//     for each step, for each panel of hidden units:
//       gates += h_{t-1} W_hh^T                     the panel's gates only, which then lie in the first-level cache
//       h_t, c_t = cell(gates + biases)             on them, while they are hot
// Gates are stored [row][panel][slot][unit], so that a panel's slots are neighbours. States are kept in float scratch
// (double for double) with rows padded to whole vectors; what is stored in the tensors' own dtype is never read back.
// There are two of h, as h_t is written while h_{t-1} is still a product's operand. With a mask of h, W_hh multiplies a
// masked copy of h_{t-1}, which is made anew at each step.
//
// Weights are packed once a call (gemm.h) and shared, or once for all calls if they are frozen (kept_packed.h); those
// that a call uses once only are packed as they are read, and a sequence of one step reads them as they lie (dots.h).
//
// One Zen 4 core, an LSTM of 256 over 32 sequences: the products run at 95 % of the peak and take 91 % of the time,
// activations 5 %. Multiplying x panel by panel too, so that gates never leave the first-level cache, was no faster.
#pragma once

#include <ATen/ops/empty.h>

#include <array>
#include <memory>
#include <utility>

#include "kept_packed.h"
#include "recurrent_layer.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

template <typename Cell, typename T>
class Forward {
  using scalar = acc_t<T>;
  using Operand = operand_t<T>;
  static constexpr int64_t kSlots = Cell::slots;
  static constexpr int64_t kSaved = Cell::saved;
  // Whether products read states as something else than they are kept as.
  static constexpr bool kCopies = !std::is_same_v<Operand, scalar>;
  // Vectors of units that are activated side by side, by what is fastest: an LSTM's need more registers.
  static constexpr int kTogether = std::min(kTileVecs, Cell::has_c ? 2 : 3);
  // Panels whose gates make up one group of strips.
  static constexpr int64_t kPanelGroup = std::max(1, kMaxStrips / Cell::gates);

 public:
  Forward(const Layer<Cell, T>& layer, bool keep, bool keeps_packed = false)
      : layer_(layer),
        states_(layer.steps > 1 ? 2 * layer.directions * layer.batch * h_stride() : 0),
        c_(layer.steps > 1 && Cell::has_c ? layer.directions * layer.batch * c_stride() : 0) {
    const auto options = layer.x.options();
    y = at::empty(sizes_of_y(layer, layer.x), options);
    h_n = at::empty(layer.h0.sizes(), options);
    c_n = Cell::has_c ? at::empty(layer.c0->sizes(), options) : at::empty({0}, options);
    workspace =
        keep ? at::empty({layer.directions, layer.rows, kSaved, layer.hidden}, options) : at::empty({0}, options);
    y_ = y.mutable_data_ptr<T>();
    kept_ = workspace.numel() > 0 ? workspace.mutable_data_ptr<T>() : nullptr;
    advise_huge_pages(kept_, workspace.nbytes());
    if (layer.steps <= 1) return;
    const auto [pieces, parts] = layer.cut;
    // W_ih is not stored in packed form if it is used once only.
    const bool one_block = pieces * parts == 1 && layer.rows <= block_rows(layer.batch, gate_columns(all_panels()));
    for (const auto d : c10::irange(layer.directions)) {
      const auto pack = [&](bool stores_w_ih) { return std::make_shared<const Direction>(layer, d, stores_w_ih); };
      const auto own = layer.weights.slice(d * layer.weights_per_direction, layer.weights_per_direction);
      directions_.push_back(keeps_packed ? Kept<const Direction>::of(own, [&] { return pack(true); })
                                         : pack(!one_block));
    }
  }

  Tensor y, h_n, c_n, workspace;

  void run() const {
    layer_.for_each_share([&](Share& share) { run_share(share); });
  }

 private:
  // The biases of a panel as its gates are stored, [slot][unit].
  static void write_biases(const Layer<Cell, T>& layer, int64_t d, int64_t panel, scalar* out) {
    const auto panels = layer.unit_panels();
    const int64_t begin = panels.begin(panel), width = panels.width(panel);
    std::fill_n(out, kSlots * width, scalar(0));
    if (!layer.has_bias) return;
    const auto add = [&](const Tensor& b, int64_t gate, int64_t slot) {
      const T* values = b.const_data_ptr<T>() + gate * layer.hidden + begin;
      for (const auto j : c10::irange(panels.valid(panel))) out[slot * width + j] += static_cast<scalar>(values[j]);
    };
    for (const auto gate : c10::irange<int64_t>(Cell::gates)) {
      add(layer.b_ih(d), gate, Cell::input_slot(gate));
      add(layer.b_hh(d), gate, gate);
    }
  }

  // Packed weights, and biases: [panel][slot][unit].
  struct Direction {
    Direction(const Layer<Cell, T>& layer, int64_t d, bool stores_w_ih)
        : w_ih(layer.inputs, layer.hidden, Cell::gates, stores_w_ih),
          w_hh(layer.features, layer.hidden, Cell::gates),
          w_hr(layer.has_projection ? layer.hidden : 0, layer.features),
          bias(kSlots * w_ih.panels.padded()) {
      w_ih.pack_transpose_of(layer.w_ih(d).template const_data_ptr<T>(), layer.inputs);
      w_hh.pack_transpose_of(layer.w_hh(d).template const_data_ptr<T>(), layer.features);
      if (layer.has_projection) w_hr.pack_transpose_of(layer.w_hr(d).template const_data_ptr<T>(), layer.hidden);
      for (const auto panel : c10::irange(w_ih.panels.count())) {
        write_biases(layer, d, panel, bias.data() + kSlots * w_ih.panels.begin(panel));
      }
    }

    PackedMatrix<Operand> w_ih, w_hh, w_hr;
    Scratch<scalar> bias;
  };

  Slice all_panels() const { return layer_.unit_panels().all(); }
  // Where the gates of a panel begin, in a row of all of them.
  int64_t gate_begin(int64_t panel) const { return kSlots * layer_.unit_panels().begin(panel); }
  int64_t gate_columns(Slice panels) const { return gate_begin(panels.end) - gate_begin(panels.begin); }
  int64_t h_stride() const { return row_stride<scalar>(layer_.features); }
  int64_t c_stride() const { return row_stride<scalar>(layer_.hidden); }

  // Rows of a block of steps of `batch` sequences.
  int64_t block_rows(int64_t batch, int64_t gate_columns) const {
    const int64_t fitting = kGateBytes / (row_stride<scalar>(gate_columns) * sizeof(scalar));
    return std::min(std::max<int64_t>({batch, fitting, kMinBlockRows}), batch * layer_.steps);
  }

  // Sequences of one step, and of none, go a way of their own, which reads each weight once. They do so beside longer
  // ones too: a sequence's bits do not depend on the others.
  void run_share(Share& share) const {
    const auto [begin, end] = share.sequences;
    const int64_t longer = begin + (layer_.steps > 1 ? layer_.active_of(1, begin, end) : 0);
    if (longer < end) run_one_step(share, {longer, end});
    if (begin < longer) run_steps(share, {begin, longer});
  }

  void run_one_step(const Share& share, Slice sequences) const {
    const int64_t d = share.direction, begin = sequences.begin, batch = sequences.end - begin;
    const int64_t active = layer_.steps > 0 ? layer_.active_of(0, begin, sequences.end) : 0;
    const int64_t first_row = layer_.steps > 0 ? layer_.first_row[0] + begin : 0;
    const int64_t inputs = layer_.inputs, features = layer_.features, hidden = layer_.hidden;
    const int64_t x_stride = row_stride<scalar>(inputs), h_stride = this->h_stride(), c_stride = this->c_stride(),
                  gate_stride = row_stride<scalar>(kSlots * Panels<scalar>::most);
    const Slice units = layer_.units(share.panels), outputs = layer_.has_projection ? Slice{0, features} : units;
    // One piece of memory: several take a good part of a small step's time.
    constexpr bool copies_x = !std::is_same_v<scalar, T> && !kCopies;
    const int64_t columns = (layer_.h_mask ? 3 : 2) * h_stride + (Cell::has_c ? c_stride : 0) +
                            (layer_.has_projection ? c_stride : 0) + gate_stride + (copies_x ? x_stride : 0);
    const Scratch<scalar> scratch(batch * columns);
    auto take = [batch, next = scratch.data()](int64_t stride) mutable {
      return std::exchange(next, next + batch * stride);
    };
    scalar *h = take(h_stride), *h_next = take(h_stride), *masked = layer_.h_mask ? take(h_stride) : h,
           *c = take(Cell::has_c ? c_stride : 0), *unprojected = take(layer_.has_projection ? c_stride : 0),
           *gates = take(gate_stride), *copied_x = take(copies_x ? x_stride : 0);
    const T *w_ih = layer_.w_ih(d).template const_data_ptr<T>(), *w_hh = layer_.w_hh(d).template const_data_ptr<T>();

    for (const auto r : c10::irange(batch)) {
      copy(h + r * h_stride, layer_.h0_row(d, begin + r), {0, features});
      if (Cell::has_c) copy(c + r * c_stride, layer_.c0_row(d, begin + r), units);
      if (layer_.h_mask) layer_.mask(d, begin + r, {0, features}, masked + r * h_stride, h + r * h_stride);
    }
    StepRows<Operand> x_rows(inputs, active), h_rows(features, active), unprojected_rows(hidden, active);
    if constexpr (copies_x) {
      for (const auto r : c10::irange(active)) copy(copied_x + r * x_stride, layer_.x_row(0, begin + r), {0, inputs});
      x_rows.set(copied_x, x_stride);
    } else if (active > 0) {
      x_rows.set(layer_.x_row(0, begin), layer_.x_row(0, begin + 1) - layer_.x_row(0, begin));
    }
    h_rows.set(masked, h_stride);

    const auto panels = layer_.unit_panels();
    for (const auto panel : c10::irange(share.panels.begin, share.panels.end)) {
      const int64_t first = panels.begin(panel), width = panels.width(panel), valid = panels.valid(panel);
      alignas(64) scalar bias[kSlots * Panels<scalar>::most];
      write_biases(layer_, d, panel, bias);
      for (const auto slot : c10::irange<int64_t>(kSlots)) {
        std::array<DotTerm<Operand, T>, 2> terms;
        int64_t count = 0;
        for (const auto gate : c10::irange<int64_t>(Cell::gates)) {
          const int64_t row = gate * hidden + first;
          if (Cell::input_slot(gate) == slot) terms[count++] = {&x_rows, w_ih + row * inputs};
          if (gate == slot) terms[count++] = {&h_rows, w_hh + row * features};
        }
        multiply_rows(terms.data(), count, active, valid, gates + slot * width, gate_stride);
      }
      for (const auto r : c10::irange(active)) {
        activate(d, first_row + r, first, valid, width, {gates + r * gate_stride, bias}, h + r * h_stride,
                 layer_.has_projection ? unprojected + r * c_stride : h_next + r * h_stride, c + r * c_stride);
      }
    }
    if (layer_.has_projection) {
      unprojected_rows.set(unprojected, c_stride);
      const DotTerm<Operand, T> term{&unprojected_rows, layer_.w_hr(d).template const_data_ptr<T>()};
      multiply_rows(&term, 1, active, features, h_next, h_stride);
      for (const auto r : c10::irange(active)) copy(y_row(d, first_row + r), h_next + r * h_stride, outputs);
    }
    for (const auto r : c10::irange(batch)) {
      const int64_t row = d * layer_.batch + begin + r;
      copy(h_n.mutable_data_ptr<T>() + row * features, (r < active ? h_next : h) + r * h_stride, outputs);
      if (Cell::has_c) copy(c_n.mutable_data_ptr<T>() + row * hidden, c + r * c_stride, units);
    }
  }

  void run_steps(Share& share, Slice sequences) const {
    const int64_t d = share.direction, begin = sequences.begin, end = sequences.end, batch = end - begin;
    const int64_t gate_columns = this->gate_columns(share.panels), gate_stride = row_stride<scalar>(gate_columns);
    const int64_t block_rows = this->block_rows(batch, gate_columns);
    const int64_t h_stride = this->h_stride(), c_stride = this->c_stride();
    const Slice units = layer_.units(share.panels),
                features = layer_.has_projection ? Slice{0, layer_.features} : units;
    const Direction& direction = *directions_[d];
    const Scratch<scalar> gates(block_rows * gate_stride);
    const Scratch<scalar> unprojected(layer_.has_projection ? batch * c_stride : 0);
    const Scratch<scalar> products(kCopies ? batch * kSlots * kPanelGroup * Panels<scalar>::most : 0);
    const OperandRows<Operand> copied_x(block_rows, layer_.inputs),
        copied_h(kCopies || layer_.h_mask ? batch : 0, layer_.features),
        copied_unprojected(kCopies && layer_.has_projection ? batch : 0, layer_.hidden);
    std::vector<const T*> x_rows(block_rows);

    // h_{t-1} and h_t change places after each step. A sequence that has not begun, or has ended, stands in both.
    scalar *h = states_.data() + 2 * (d * layer_.batch + begin) * h_stride, *h_next = h + batch * h_stride;
    scalar* c = c_.data() + (d * layer_.batch + begin) * c_stride;
    int64_t active_before = 0;
    for (const auto r : c10::irange(batch)) {
      for (scalar* to : {h, h_next}) copy(to + r * h_stride, layer_.h0_row(d, begin + r), features);
      if (Cell::has_c) copy(c + r * c_stride, layer_.c0_row(d, begin + r), units);
    }

    for (int64_t i = 0; i < layer_.steps;) {
      // The steps [i, stop) of the block; its rows are in the order of time.
      int64_t stop = i, count = 0;
      for (; stop < layer_.steps; ++stop) {
        const int64_t active = layer_.active_of(layer_.step(d, stop), begin, end);
        if (count + active > block_rows) break;
        count += active;
      }
      count = 0;
      for (const auto j : c10::irange(stop - i)) {
        const int64_t t = layer_.step(d, d == 0 ? i + j : stop - 1 - j);
        for (const auto r : c10::irange(layer_.active_of(t, begin, end))) x_rows[count++] = layer_.x_row(t, begin + r);
      }
      clear_others(share.panels, count, gates.data(), gate_stride);
      multiply_slices(RowTiles(count), read_x(x_rows.data(), count, copied_x), direction.w_ih, share.panels,
                      layer_.inputs, gates.data(), gate_stride, kSlots, Cell::input_slot, false);

      int64_t row = d == 0 ? 0 : count;
      for (; i < stop; ++i) {
        const int64_t t = layer_.step(d, i), active = layer_.active_of(t, begin, end);
        if (active == 0) continue;
        if (d == 1) row -= active;
        share.meet();
        for (int64_t r = active; r < active_before; ++r) copy(h_next + r * h_stride, h + r * h_stride, features);
        active_before = active;
        if (layer_.h_mask) {
          for (const auto r : c10::irange(active)) {
            layer_.mask(d, begin + r, {0, layer_.features}, copied_h.row(r), h + r * h_stride);
          }
        }
        const LeftOperand<Operand> factor =
            layer_.h_mask ? copied_h.operand() : read_own(h, h_stride, active, copied_h);
        run_step(direction, share, layer_.first_row[t] + begin, active, gates.data() + row * gate_stride, gate_stride,
                 h, factor, products.data(), h_next, c, unprojected.data(), copied_unprojected);
        if (d == 0) row += active;
        std::swap(h, h_next);
      }
    }

    for (const auto r : c10::irange(batch)) {
      const int64_t row = d * layer_.batch + begin + r;
      copy(h_n.mutable_data_ptr<T>() + row * layer_.features, h + r * h_stride, features);
      if (Cell::has_c) copy(c_n.mutable_data_ptr<T>() + row * layer_.hidden, c + r * c_stride, units);
    }
  }

  // Zeros in the slots of some panels that W_ih does not write.
  void clear_others(Slice panels, int64_t rows, scalar* gates, int64_t gate_stride) const {
    std::array<bool, kSlots> is_written{};
    for (int gate = 0; gate < (layer_.inputs > 0 ? Cell::gates : 0); ++gate) is_written[Cell::input_slot(gate)] = true;
    for (const auto slot : c10::irange(kSlots)) {
      if (is_written[slot]) continue;
      for (const auto panel : c10::irange(panels.begin, panels.end)) {
        const int64_t width = layer_.unit_panels().width(panel);
        scalar* out = gates + gate_begin(panel) - gate_begin(panels.begin) + slot * width;
        for (const auto r : c10::irange(rows)) std::fill_n(out + r * gate_stride, width, scalar(0));
      }
    }
  }

  // Rows of x as a left operand: where they lie if they are as far apart each, and otherwise copied.
  static LeftOperand<Operand> read_x(const T* const* rows, int64_t count, const OperandRows<Operand>& copies) {
    if constexpr (std::is_same_v<scalar, T>) {
      const int64_t ld = count > 1 ? rows[1] - rows[0] : row_stride<scalar>(copies.k);
      bool even = count > 0 && ld != 0;
      for (int64_t r = 2; r < count && even; ++r) even = rows[r] - rows[r - 1] == ld;
      if (even) return {rows[0], copies.k, ld};
    }
    for (const auto r : c10::irange(count)) copies.copy(r, rows[r]);
    return copies.operand();
  }

  // Rows of states, `ld` apart, as a left operand: where they lie, if products read what states are kept as.
  static LeftOperand<Operand> read_own(const scalar* rows, int64_t ld, int64_t count,
                                       const OperandRows<Operand>& copies) {
    if constexpr (kCopies) {
      for (const auto r : c10::irange(count)) copies.copy(r, rows + r * ld);
      return copies.operand();
    } else {
      return {rows, copies.k, ld};
    }
  }

  // One step of the first `active` sequences of a share, whose data is in the rows from first_row on. W_hh multiplies
  // `factor`: h, or h under the mask.
  void run_step(const Direction& direction, const Share& share, int64_t first_row, int64_t active, scalar* gates,
                int64_t gate_stride, const scalar* h, const LeftOperand<Operand>& factor, scalar* products,
                scalar* h_next, scalar* c, scalar* unprojected, const OperandRows<Operand>& copied_unprojected) const {
    const auto panels = layer_.unit_panels();
    const int64_t d = share.direction, features = layer_.features, h_stride = this->h_stride(),
                  c_stride = this->c_stride();
    const RowTiles tiles(active);
    const auto slot_of = [](int64_t gate) { return gate; };
    const int64_t last = last_slice<Operand>(tiles, features);
    multiply_slices(tiles, factor, direction.w_hh, share.panels, last, gates, gate_stride, kSlots, slot_of);
    for (int64_t panel = share.panels.begin; panel < share.panels.end; panel += kPanelGroup) {
      const int64_t stop = std::min(panel + kPanelGroup, share.panels.end);
      const int64_t columns = gate_begin(stop) - gate_begin(panel);
      scalar* group = gates + gate_begin(panel) - gate_begin(share.panels.begin);
      multiply_panels(tiles, factor, direction.w_hh, {panel, stop}, {last, features}, kCopies ? products : group,
                      kCopies ? columns : gate_stride, kSlots, slot_of, !kCopies);
      for (int64_t p = panel; p < stop; ++p) {
        const int64_t column = gate_begin(p) - gate_begin(panel);
        for (const auto r : c10::irange(active)) {
          activate(d, first_row + r, panels.begin(p), panels.valid(p), panels.width(p),
                   {group + column + r * gate_stride, direction.bias.data() + gate_begin(p),
                    kCopies ? products + column + r * columns : nullptr},
                   h + r * h_stride, layer_.has_projection ? unprojected + r * c_stride : h_next + r * h_stride,
                   c + r * c_stride);
        }
      }
    }
    if (layer_.has_projection) {
      multiply(tiles, read_own(unprojected, c_stride, active, copied_unprojected), direction.w_hr,
               direction.w_hr.panels.all(), h_next, h_stride, false);
      for (const auto r : c10::irange(active)) copy(y_row(d, first_row + r), h_next + r * h_stride, {0, features});
    }
  }

  // What adds up to the pre-activations of a row of a panel, [slot][unit]. Products with h may stand apart.
  struct Gates {
    const scalar *products, *bias, *products_with_h = nullptr;

    template <int N>
    NLPKERNELS_INLINE Several<Vec<T>, N> load(int64_t slot, int64_t i) const {
      const Several<Vec<T>, N> sum = load_several<N>(products + i) + load_several<N>(bias + i);
      return slot < Cell::gates && products_with_h != nullptr ? sum + load_several<N>(products_with_h + i) : sum;
    }
  };

  // The cell, on one row of one panel. h is h_{t-1}; what the cell puts out goes to `h_next` and, unless it is still to
  // be projected, to y.
  void activate(int64_t d, int64_t row, int64_t column, int64_t valid, int64_t width, const Gates& gates,
                const scalar* h, scalar* h_next, scalar* c) const {
    T* kept = kept_ == nullptr ? nullptr : kept_ + (d * layer_.rows + row) * kSaved * layer_.hidden;
    T* out = layer_.has_projection ? nullptr : y_row(d, row);
    for_each_several<T, kTogether>(valid, [&]<int N>(int64_t j, int64_t n) {
      using V = Several<Vec<T>, N>;
      V a[kSlots], saved[std::max<int64_t>(1, kSaved)], c_t(0);
#pragma GCC unroll 4
      for (int64_t slot = 0; slot < kSlots; ++slot) a[slot] = gates.template load<N>(slot, slot * width + j);
      if constexpr (Cell::has_c) c_t = load_several<N>(c + column + j);
      const V h_t = Cell::forward(a, Cell::has_c ? V(0) : load_several<N>(h + column + j), c_t, saved);
      if constexpr (Cell::has_c) store_several<N>(c + column + j, c_t);
      store_several<N>(h_next + column + j, h_t);
      if (out != nullptr) store_several<N>(out + column + j, h_t, n);
      if (kept != nullptr) {
#pragma GCC unroll 5
        for (int64_t s = 0; s < kSaved; ++s) store_several<N>(kept + s * layer_.hidden + column + j, saved[s], n);
      }
    });
  }

  T* y_row(int64_t d, int64_t row) const { return y_ + (row * layer_.directions + d) * layer_.features; }

  template <typename To, typename From>
  static void copy(To* to, const From* from, Slice columns) {
    for (const auto i : c10::irange(columns.begin, columns.end)) to[i] = static_cast<To>(from[i]);
  }

  const Layer<Cell, T>& layer_;
  const Scratch<scalar> states_, c_;  // twice [B, P] and [B, H] for each direction, rows padded
  std::vector<std::shared_ptr<const Direction>> directions_;
  T* y_;
  T* kept_;  // the workspace, or nullptr
};

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
