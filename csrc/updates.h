// The optimizers' steps that embedding_bag_update takes: the only place in C++ where these equations stand.
//
// A rule is a struct of functions over a value type V, as in cells.h. Notation, for one value w of a row in use:
//   g               its gradient
//   first, second   its states, of which a rule has `states`; they are changed in place
// A rule's `change` is what is taken off w.
#pragma once

#include "cells.h"

namespace nlpkernels {

template <typename V>
struct UpdateSettings {
  V rate, eps, rest1, rest2;  // rest = 1 - beta
};

struct Sgd {
  static constexpr int states = 0;

  template <typename V>
  static NLPKERNELS_INLINE V change(const UpdateSettings<V>& settings, V g, V& /*first*/, V& /*second*/) {
    return settings.rate * g;
  }
};

// first: the sum of squares
struct Adagrad {
  static constexpr int states = 1;

  template <typename V>
  static NLPKERNELS_INLINE V change(const UpdateSettings<V>& settings, V g, V& first, V& /*second*/) {
    first = first + g * g;
    return settings.rate * g / (Math<V>::sqrt(first) + settings.eps);
  }
};

// One state for a whole row, the sum of mean squares; the rest is Sgd's, at a rate of the row's own.
struct RowwiseAdagrad {
  template <typename V>
  static NLPKERNELS_INLINE V rate(const UpdateSettings<V>& settings, V mean_square, V& first) {
    first = first + mean_square;
    return settings.rate / (Math<V>::sqrt(first) + settings.eps);
  }
};

// first, second: moving means of g and of its square. The rate has the bias correction in it.
struct Adam {
  static constexpr int states = 2;

  template <typename V>
  static NLPKERNELS_INLINE V change(const UpdateSettings<V>& settings, V g, V& first, V& second) {
    first = first + (g - first) * settings.rest1;
    second = second + (g * g - second) * settings.rest2;
    return settings.rate * first / (Math<V>::sqrt(second) + settings.eps);
  }
};

}  // namespace nlpkernels
