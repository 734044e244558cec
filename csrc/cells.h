// The gate equations of RNN, LSTM and GRU, forward and backward: the only place in C++ where this maths stands.
//
// A cell is a struct of constants and two static functions over a value type V, which is at::vec::Vectorized<T> on the
// CPU (one V holds neighbouring hidden units) and a plain scalar elsewhere. Nothing here knows of tensors or of time.
//
// Notation, for one hidden unit of one sequence at step t:
//   x_t, h_{t-1}   input and previous hidden state;  W_ih, W_hh, b_ih, b_hh   weights and biases, as in torch.nn
//   a[slot]        pre-activations. RNN and LSTM have one per gate: W_ih x + b_ih + W_hh h + b_hh. GRU keeps the two
//                  halves of its last gate apart, because r multiplies only one of them, and so has four:
//                  r, z, (W_hn h + b_hn), (W_in x + b_in)
//   input_slot(g)  where W_ih's gate g adds up; hidden_slot(g) = g is where W_hh's gate g does
//   saved[]        what backward needs, besides the states: activated gates, and for the LSTM its cell state c_t
// Gate order is torch's: LSTM i, f, g, o; GRU r, z, n.
#pragma once

#include <cmath>
#include <vector>

#ifdef __CUDACC__
#define NLPKERNELS_INLINE __host__ __device__ __forceinline__
#else
#define NLPKERNELS_INLINE inline __attribute__((always_inline))
#endif

namespace nlpkernels {

// Elementary functions of a value type. This is the scalar form; vector types specialise it.
template <typename V>
struct Math {
  static NLPKERNELS_INLINE V tanh(V x) { return std::tanh(x); }
  static NLPKERNELS_INLINE V sigmoid(V x) { return V(1) / (V(1) + std::exp(-x)); }
  static NLPKERNELS_INLINE V sqrt(V x) { return std::sqrt(x); }
  // max(x, 0), and NaN stays NaN
  static NLPKERNELS_INLINE V relu(V x) { return x < V(0) ? V(0) : x; }
  // 0 where x <= 0, else y: where x is NaN, too
  static NLPKERNELS_INLINE V where_positive(V x, V y) { return x <= V(0) ? V(0) : y; }
};

struct RnnTanh {
  static constexpr int gates = 1, slots = 1, saved = 0;
  static constexpr bool has_c = false;
  static constexpr int input_slot(int gate) { return gate; }

  // h_t = tanh(a)
  template <typename V>
  static NLPKERNELS_INLINE V forward(const V* a, V /*h_prev*/, V& /*c*/, V* /*saved*/) {
    return Math<V>::tanh(a[0]);
  }

  // In: h_t, dh = dL/dh_t. Out: da = dL/da. Returns the part of dL/dh_{t-1} that does not pass through W_hh.
  template <typename V>
  static NLPKERNELS_INLINE V backward(const V* /*saved*/, V h, V /*h_prev*/, V /*c_prev*/, V dh, V& /*dc*/, V* da) {
    da[0] = dh * (V(1) - h * h);
    return V(0);
  }
};

struct RnnRelu {
  static constexpr int gates = 1, slots = 1, saved = 0;
  static constexpr bool has_c = false;
  static constexpr int input_slot(int gate) { return gate; }

  // h_t = max(a, 0)
  template <typename V>
  static NLPKERNELS_INLINE V forward(const V* a, V /*h_prev*/, V& /*c*/, V* /*saved*/) {
    return Math<V>::relu(a[0]);
  }

  template <typename V>
  static NLPKERNELS_INLINE V backward(const V* /*saved*/, V h, V /*h_prev*/, V /*c_prev*/, V dh, V& /*dc*/, V* da) {
    da[0] = Math<V>::where_positive(h, dh);
    return V(0);
  }
};

struct Lstm {
  static constexpr int gates = 4, slots = 4, saved = 5;
  static constexpr int saved_c = 4;  // saved[saved_c] is c_t
  static constexpr bool has_c = true;
  static constexpr int input_slot(int gate) { return gate; }

  // i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g);  c_t = f c_{t-1} + i g;  h_t = o tanh(c_t)
  template <typename V>
  static NLPKERNELS_INLINE V forward(const V* a, V /*h_prev*/, V& c, V* saved) {
    saved[0] = Math<V>::sigmoid(a[0]);
    saved[1] = Math<V>::sigmoid(a[1]);
    saved[2] = Math<V>::tanh(a[2]);
    saved[3] = Math<V>::sigmoid(a[3]);
    c = saved[1] * c + saved[0] * saved[2];
    saved[saved_c] = c;
    return output(saved);
  }

  // h_t from what was saved
  template <typename V>
  static NLPKERNELS_INLINE V output(const V* saved) {
    return saved[3] * Math<V>::tanh(saved[saved_c]);
  }

  // dc comes in as dL/dc_t without h_t's share, and leaves as dL/dc_{t-1}.
  template <typename V>
  static NLPKERNELS_INLINE V backward(const V* saved, V /*h*/, V /*h_prev*/, V c_prev, V dh, V& dc, V* da) {
    const V one(1), i = saved[0], f = saved[1], g = saved[2], o = saved[3], tanh_c = Math<V>::tanh(saved[saved_c]);
    dc = dc + dh * o * (one - tanh_c * tanh_c);
    da[0] = dc * g * i * (one - i);
    da[1] = dc * c_prev * f * (one - f);
    da[2] = dc * i * (one - g * g);
    da[3] = dh * tanh_c * o * (one - o);
    dc = dc * f;
    return V(0);
  }
};

struct Gru {
  static constexpr int gates = 3, slots = 4, saved = 4;
  static constexpr bool has_c = false;
  static constexpr int input_slot(int gate) { return gate == 2 ? 3 : gate; }

  // r, z = sigmoid(a_r, a_z);  n = tanh(a_in + r a_hn);  h_t = (1 - z) n + z h_{t-1}
  template <typename V>
  static NLPKERNELS_INLINE V forward(const V* a, V h_prev, V& /*c*/, V* saved) {
    saved[0] = Math<V>::sigmoid(a[0]);
    saved[1] = Math<V>::sigmoid(a[1]);
    saved[2] = Math<V>::tanh(a[3] + saved[0] * a[2]);
    saved[3] = a[2];
    return saved[2] + saved[1] * (h_prev - saved[2]);
  }

  template <typename V>
  static NLPKERNELS_INLINE V backward(const V* saved, V /*h*/, V h_prev, V /*c_prev*/, V dh, V& /*dc*/, V* da) {
    const V one(1), r = saved[0], z = saved[1], n = saved[2], a_hn = saved[3];
    da[3] = dh * (one - z) * (one - n * n);
    da[2] = da[3] * r;
    da[1] = dh * (h_prev - n) * z * (one - z);
    da[0] = da[3] * a_hn * r * (one - r);
    return dh * z;
  }
};

// Runs of gates of W_ih whose slots are neighbours too.
struct GateRun {
  int gate, slot, count;
};

template <typename Cell>
std::vector<GateRun> input_gate_runs() {
  std::vector<GateRun> runs;
  for (int gate = 0; gate < Cell::gates; ++gate) {
    const int slot = Cell::input_slot(gate);
    if (!runs.empty() && runs.back().slot + runs.back().count == slot) {
      ++runs.back().count;
    } else {
      runs.push_back({gate, slot, 1});
    }
  }
  return runs;
}

}  // namespace nlpkernels
