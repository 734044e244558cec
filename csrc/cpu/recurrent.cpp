// The time loop of RNN, LSTM and GRU on the CPU, forward and backward. One call is one layer, all steps, both
// directions.
//
// Work is cut into shares by direction and by sequences: a thread runs all steps of its own sequences, so that no step
// needs a barrier. Where there are too few of them it is cut by hidden units instead: then the threads wait for each
// other once a step. Weights are packed once a call (gemm.h) and shared; those that a call uses once only are packed as
// they are read, and a sequence of one step reads them as they lie (dots.h).
//
// Forward, for one share:
//   for a block of steps whose gates fit kGateBytes:
//     gates = x W_ih^T                              one product for all steps of the block
//     for each step, for each panel of hidden units:
//       gates += h_{t-1} W_hh^T                     the panel's gates only, which then lie in the first-level cache
//       h_t, c_t = cell(gates + biases)             on them, while they are hot
// Gates are stored [row][panel][slot][unit], so that a panel's slots are neighbours. States are kept in float scratch
// (double for double) with rows padded to whole vectors; what is stored in the tensors' own dtype is never read back.
// There are two of h, as h_t is written while h_{t-1} is still a product's operand.
//
// One Zen 4 core, an LSTM of 256 over 32 sequences: the products run at 95 % of the peak and take 91 % of the time,
// activations 5 %. Multiplying x panel by panel too, so that gates never leave the first-level cache, was no faster.
// Two Zen 4 cores cut by units: a GRU of 256 over one sequence takes 1.5 ms for 2.4 with one core, one of 512 3.7 for
// 7.0. With 8 to 80 sequences that and cutting by sequences are equally fast.
//
// With a mask of h, W_hh multiplies a masked copy of h_{t-1}, which is made anew at each step.
//
// Backward walks the steps the other way: dh_{t-1} = dgates W_hh. It stores dgates for all rows, [row][slot][unit],
// from which the gradients of the weights and of x follow as large products.
//
// Letters are those of library.cpp.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <exception>
#include <memory>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../checks.h"
#include "dots.h"
#include "threads.h"
#ifdef __AMX_BF16__
#include "bfloat16.h"
#endif

namespace nlpkernels {
inline namespace CPU_CAPABILITY {
namespace {

// Gates of a block of steps; half of a small second-level cache. But so many rows at least: W_ih is read once a block,
// and costs more than gates that come from further away (by 2 to 3 % at H = 512 and 650).
constexpr int64_t kGateBytes = 256 * 1024;
constexpr int64_t kMinBlockRows = 128;
// Sequences of one thread that are taken through the steps together: a panel's gates stay in the first-level cache. But
// tiles of bfloat16 are multiplied so fast that it pays more to read weights for more rows at once.
template <typename Operand>
constexpr int64_t kMaxRows = Packing<Operand>::values > 1 ? 128 : 64;
// Multiply-adds of a step, for each thread, below which a barrier costs more than another thread gives.
constexpr int64_t kMinStepWork = 1 << 14;

// What products read values of T as.
#ifdef __AMX_BF16__
template <typename T>
using operand_t = std::conditional_t<std::is_same_v<T, at::BFloat16>, at::BFloat16, acc_t<T>>;
#else
template <typename T>
using operand_t = acc_t<T>;
#endif

template <typename T>
const T* data(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// Where threads wait for each other, once a step; or no longer, once one of the call has failed.
class Barrier {
 public:
  void arrive(int64_t shares) { arrived_.fetch_add(shares, std::memory_order_acq_rel); }

  void wait(int64_t shares, const std::atomic<bool>& has_failed) const {
    constexpr int kSpins = 4096;  // some tenth of a millisecond, many times what a step is late by
    for (int spins = 0; arrived_.load(std::memory_order_acquire) < shares; ++spins) {
      if (has_failed.load(std::memory_order_relaxed)) return;
      if (spins > kSpins) std::this_thread::yield();  // another process may have the core that is waited for
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

 private:
  alignas(64) std::atomic<int64_t> arrived_{0};
};

// Whether all that parallel_for starts runs at once, so that it may wait for each other.
#if AT_PARALLEL_OPENMP
constexpr bool kCanWait = true;
#else
constexpr bool kCanWait = false;
#endif

// What one thread does: all steps of some sequences of a direction, for some panels of hidden units.
class Share {
 public:
  Share(int64_t direction, Slice sequences, Slice panels, Barrier& barrier, int64_t own, int64_t all,
        std::atomic<bool>& has_failed)
      : direction(direction),
        sequences(sequences),
        panels(panels),
        barrier_(barrier),
        own_(own),
        all_(all),
        has_failed_(has_failed) {}

  const int64_t direction;
  const Slice sequences, panels;

  int64_t batch() const { return sequences.end - sequences.begin; }

  // Waits until the shares of the same sequences have all come here.
  void meet() {
    if (own_ == all_) return;
    met_ += all_;
    barrier_.arrive(own_);
    barrier_.wait(met_, has_failed_);
  }

  // For one that fails nobody waits, nor for what its thread was to do next; its exception ends the call.
  ~Share() {
    if (std::uncaught_exceptions() > exceptions_) has_failed_.store(true, std::memory_order_relaxed);
  }

  Share(const Share&) = delete;

 private:
  Barrier& barrier_;
  const int64_t own_, all_;
  std::atomic<bool>& has_failed_;
  int64_t met_ = 0;
  const int exceptions_ = std::uncaught_exceptions();
};

// What forward and backward share: sizes, and where the rows of each tensor are. Direction 1 runs from the last step to
// the first; "previous" is meant in the direction's own order.
template <typename Cell, typename T>
struct Layer : RecurrentArguments {
  using scalar = acc_t<T>;
  using Operand = operand_t<T>;

  Layer(const RecurrentArguments& args, const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
        const OptionalTensor& h_mask, int64_t call_threads)
      : RecurrentArguments(args),
        threads(call_threads),
        x(x.stride(-1) == 1 || x.size(-1) <= 1 ? x : x.contiguous()),
        h0(h0.contiguous()),
        c0(contiguous(c0)),
        h_mask(contiguous(h_mask)),
        x_(this->x.template const_data_ptr<T>()),
        h0_(this->h0.template const_data_ptr<T>()),
        c0_(data<T>(this->c0)),
        h_mask_(data<T>(this->h_mask)),
        is_packed_(x.dim() == 2) {
    for (const Tensor& weight : args.weights) weight_storage.push_back(weight.contiguous());
    weights = weight_storage;
  }

  const int64_t threads;  // of the call
  Tensor x, h0;
  OptionalTensor c0, h_mask;
  std::vector<Tensor> weight_storage;

  int64_t gate_rows() const { return Cell::gates * hidden; }
  int64_t slot_columns() const { return Cell::slots * hidden; }
  int64_t step(int64_t direction, int64_t i) const { return direction == 0 ? i : steps - 1 - i; }

  // Of the sequences [begin, end), how many are active at step t; they are the first ones.
  int64_t active_of(int64_t t, int64_t begin, int64_t end) const {
    return std::clamp<int64_t>(active[t] - begin, 0, end - begin);
  }

  const T* x_row(int64_t t, int64_t b) const {
    return x_ + (is_packed_ ? (first_row[t] + b) * x.stride(0) : t * x.stride(0) + b * x.stride(1));
  }
  const T* h0_row(int64_t direction, int64_t b) const { return h0_ + (direction * batch + b) * features; }
  const T* c0_row(int64_t direction, int64_t b) const { return c0_ + (direction * batch + b) * hidden; }

  // to = h o h_mask, of sequence b and some features
  template <typename To, typename From>
  void mask(int64_t direction, int64_t b, Slice columns, To* to, const From* h) const {
    const T* factors = h_mask_ + (direction * batch + b) * features;
    for (const auto j : c10::irange(columns.begin, columns.end)) {
      to[j] = static_cast<To>(static_cast<scalar>(h[j]) * static_cast<scalar>(factors[j]));
    }
  }

  // The row of sequence b at the step before t, or -1 if t is the first one.
  int64_t previous_row(int64_t direction, int64_t t, int64_t b) const {
    const int64_t before = direction == 0 ? t - 1 : t + 1;
    return before >= 0 && before < steps && b < active[before] ? first_row[before] + b : -1;
  }

  Panels<scalar> unit_panels() const { return Panels<scalar>(hidden); }
  // The hidden units of some panels.
  Slice units(Slice panels) const {
    return {unit_panels().begin(panels.begin), std::min(hidden, unit_panels().begin(panels.end))};
  }

  // Into how many pieces sequences and units are cut.
  struct Cut {
    int64_t sequences, units;
  };
  const Cut cut = make_cut();

  // Where each of some pieces of the sequences begins, and the last ends: all have about as many rows.
  std::vector<int64_t> piece_begins(int64_t pieces) const {
    std::vector<int64_t> begins;
    int64_t length = steps, before = 0;  // of sequence b; rows of the sequences before it
    for (const auto b : c10::irange(batch)) {
      while (length > 0 && active[length - 1] <= b) --length;
      while (before * pieces >= rows * static_cast<int64_t>(begins.size()) &&
             static_cast<int64_t>(begins.size()) < pieces) {
        begins.push_back(b);
      }
      before += length;
    }
    begins.resize(pieces + 1, batch);
    return begins;
  }

  // Whether a share uses each of its weights once only, and no other share does: then it packs them as it reads them.
  bool uses_weights_once() const { return steps == 1 && cut.sequences == 1; }

  // Calls body(Share&) for all shares.
  template <typename Body>
  void for_each_share(const Body& body) const {
    const auto [pieces, parts] = cut;
    const int64_t shares = directions * pieces * parts, panels = unit_panels().count();
    const std::vector<int64_t> begins = piece_begins(pieces);
    std::vector<Barrier> barriers(directions * pieces);
    std::atomic<bool> has_failed{false};
    // Neighbouring shares belong together, so that two threads take a direction each.
    at::parallel_for(0, shares, threads_for_all() > 1 ? 1 : shares,
                     [&, parts = parts, pieces = pieces](int64_t i, int64_t end) {
                       const ProductScope<Operand> scope;
                       while (i < end) {
                         const int64_t piece = i / parts, part = i % parts, own = std::min(parts - part, end - i);
                         i += own;
                         const Slice sequences{begins[piece % pieces], begins[piece % pieces + 1]};
                         if (sequences.begin == sequences.end) continue;
                         Share share(piece / pieces, sequences, {panels * part / parts, panels * (part + own) / parts},
                                     barriers[piece], own, parts, has_failed);
                         body(share);
                       }
                     });
  }

 private:
  int64_t threads_for_all() const { return threads_for(rows * gate_rows() * (inputs + features), threads); }

  Cut make_cut() const {
    const int64_t wanted = ceil_div(threads_for_all(), directions);
    const bool can_cut_units = kCanWait && !has_projection;
    // One step needs no barrier, and no thread then reads all weights.
    if (steps == 1 && batch > 0 && batch <= kMaxRows<Operand> && can_cut_units) {
      return {1, std::min(wanted, unit_panels().count())};
    }
    // Threads that wait for each other must run at once: with more of them than cores, each step would take as long as
    // the system leaves a thread its core.
    const int64_t cores = wanted > 1 ? std::thread::hardware_concurrency() : 1,
                  parts = std::min(wanted, cores / directions);
    const int64_t step_work = batch * gate_rows() * features;
    if (can_cut_units && parts > 1 && batch < parts * kTileRows && step_work >= parts * kMinStepWork) {
      return {1, std::min(parts, unit_panels().count())};
    }
    return {std::min(batch, std::max(wanted, ceil_div(batch, kMaxRows<Operand>))), 1};
  }

  const T *x_, *h0_, *c0_, *h_mask_;
  bool is_packed_;
};

// Forward ------------------------------------------------------------------------------------------------------------

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
  Forward(const Layer<Cell, T>& layer, bool keep)
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
      directions_.push_back(std::make_unique<Direction>(layer, d, !one_block));
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
  std::vector<std::unique_ptr<Direction>> directions_;
  T* y_;
  T* kept_;  // the workspace, or nullptr
};

// Backward -----------------------------------------------------------------------------------------------------------

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

// The ops ------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrent(const Tensor& x, const OptionalTensor& batch_sizes,
                                                     const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                                                     c10::string_view cell, bool keep, const OptionalTensor& h_mask) {
  const int64_t threads = threads_of_call();
  std::tuple<Tensor, Tensor, Tensor, Tensor> result;
  dispatch_cell(cell, [&](auto cell_type) {
    using Cell = decltype(cell_type);
    const RecurrentArguments args = check_recurrent(x, batch_sizes, h0, c0, weights, h_mask, Cell::gates, Cell::has_c);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "recurrent", [&] {
      const Layer<Cell, scalar_t> layer(args, x, h0, c0, h_mask, threads);
      const Forward<Cell, scalar_t> forward(layer, keep);
      forward.run();
      result = {forward.y, forward.h_n, forward.c_n, forward.workspace};
    });
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> recurrent_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& x,
    const OptionalTensor& batch_sizes, const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
    c10::string_view cell, const Tensor& y, const Tensor& workspace, bool need_dx, bool need_dweights,
    const OptionalTensor& h_mask) {
  const int64_t threads = threads_of_call();
  std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> result;
  dispatch_cell(cell, [&](auto cell_type) {
    using Cell = decltype(cell_type);
    const RecurrentArguments args = check_recurrent(x, batch_sizes, h0, c0, weights, h_mask, Cell::gates, Cell::has_c);
    check_recurrent_backward(args, Cell::saved, x, h0, c0, dy, dh_n, dc_n, y, workspace);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "recurrent_backward", [&] {
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
  m.impl("recurrent", TORCH_FN(nlpkernels::recurrent));
  m.impl("recurrent_backward", TORCH_FN(nlpkernels::recurrent_backward));
}
