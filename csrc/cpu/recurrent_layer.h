// What the forward and the backward pass of a layer share: its sizes and where its rows lie, and how its work is cut.
//
// Work is cut into shares by direction and by sequences: a thread runs all steps of its own sequences, so that no step
// needs a barrier. Where there are too few of them it is cut by hidden units instead: then the threads wait for each
// other once a step. Two Zen 4 cores cut by units: a GRU of 256 over one sequence takes 1.5 ms for 2.4 with one core,
// one of 512 3.7 for 7.0. With 8 to 80 sequences that and cutting by sequences are equally fast.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "bfloat16.h"
#include "dots.h"
#include "threads.h"
#include "tiles.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

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
#ifdef __AVX512BF16__
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

  // Returns whether that took so long that somebody else must have the core that is waited for.
  bool wait(int64_t shares, const std::atomic<bool>& has_failed) const {
    constexpr int kSpins = 1024;  // tens of microseconds, many times what a step is late by
    int spins = 0;
    for (; arrived_.load(std::memory_order_acquire) < shares; ++spins) {
      if (has_failed.load(std::memory_order_relaxed)) break;
      if (spins > kSpins) std::this_thread::yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    return spins > kSpins;
  }

 private:
  alignas(64) std::atomic<int64_t> arrived_{0};
};

// Threads that wait for each other are many times slower than one alone where others want the cores too: other
// processes, or calls of other threads. When many waits of a call were long, the next calls go without, and then one
// tries again.
class Company {
 public:
  static bool is_bad() { return calls_alone_.load(std::memory_order_relaxed) > 0 && calls_alone_.fetch_sub(1) > 0; }
  static void report(int64_t waits, int64_t long_ones) {
    constexpr int kCallsAlone = 64;
    if (long_ones > 1 && 4 * long_ones > waits) calls_alone_.store(kCallsAlone, std::memory_order_relaxed);
  }

 private:
  static inline std::atomic<int> calls_alone_{0};
};

// Whether all that parallel_for starts runs at once, so that it may wait for each other.
constexpr bool kCanWait = NLPKERNELS_OPENMP != 0;

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
    ++meetings_;
    barrier_.arrive(own_);
    late_ += barrier_.wait(meetings_ * all_, has_failed_);
  }

  // For one that fails nobody waits, nor for what its thread was to do next; its exception ends the call.
  ~Share() {
    if (std::uncaught_exceptions() > exceptions_) has_failed_.store(true, std::memory_order_relaxed);
    Company::report(meetings_, late_);
  }

  Share(const Share&) = delete;

 private:
  Barrier& barrier_;
  const int64_t own_, all_;
  std::atomic<bool>& has_failed_;
  int64_t meetings_ = 0, late_ = 0;
  const int exceptions_ = std::uncaught_exceptions();
};

// What forward and backward share: sizes, and where the rows of each tensor are. Direction 1 runs from the last step to
// the first; "previous" is meant in the direction's own order. Units are cut between the panels of UnitPanels.
template <typename Cell, typename T, typename UnitPanels = Panels<acc_t<T>>>
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

  UnitPanels unit_panels() const { return UnitPanels(hidden); }
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
    if (can_cut_units && parts > 1 && batch < parts * kTileRows && step_work >= parts * kMinStepWork &&
        !Company::is_bad()) {
      return {1, std::min(parts, unit_panels().count())};
    }
    return {std::min(batch, std::max(wanted, ceil_div(batch, kMaxRows<Operand>))), 1};
  }

  const T *x_, *h0_, *c0_, *h_mask_;
  bool is_packed_;
};

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
