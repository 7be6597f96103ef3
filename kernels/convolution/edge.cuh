// What the convolution's kernels on a GPU read of an edge, and who reads it.
#pragma once
#include "lanes.h"

namespace rung {

using T = RUNG_REAL;
constexpr int C = RUNG_C, R = RUNG_R, DEGREES = RUNG_L + 1, L = DEGREES * DEGREES;
constexpr bool VECTORS = RUNG_VECTORS;
constexpr T INV_SQRT3 = T(0.57735026918962576451);

struct Inputs {
  const int *row_ptr, *senders;               // [N + 1], [E]
  const T *radial, *harmonics, *x, *weights;  // [E, R], [E, L], [N, C], [R, l, C]
  const T *w, *axial, *identity;              // [N, 3, C], [R, l, C], [R, C]; null without vectors
};

// Cotangents of the gradients of radial, harmonics, x and w; null for zero.
struct Cotangents {
  const T *radial, *harmonics, *x, *w;
};

// The V consecutive channels of this lane, of a block of 32 V.
template <int V> struct Channels {
  using Pack = Lanes<T, V>;
  int first;
  bool active;  // false beyond the last channel: such a lane reads channel 0, but zero features, so it adds nothing

  RUNG_INLINE Channels() {
    first = (blockIdx.y * WARP + threadIdx.x % WARP) * V;
    active = C % (WARP * V) == 0 || first < C;
    if (!active) first = 0;
  }
  RUNG_INLINE Pack read(const T* row) const { return load<V>(row + first); }
  RUNG_INLINE Pack weights(const T* array, int n, int l) const { return read(array + (n * DEGREES + l) * C); }
  RUNG_INLINE Pack features(const T* array, long long row, bool wanted) const {
    return active && wanted ? read(array + row * C) : Pack{};
  }
  RUNG_INLINE void write(T* row, Pack values) const {
    if (active) store(row + first, values);
  }
};

// What an edge's sender contributes: x, w and sum_k Y_1k w_k / sqrt(3) = u.
template <int V> struct Sender {
  using Pack = Lanes<T, V>;
  Pack x, w[3], u;

  RUNG_INLINE void read(const Channels<V>& channels, const T* x_, bool has_x, const T* w_, bool has_w, long long atom) {
    x = channels.features(x_, atom, has_x);
    u = Pack{};
    if constexpr (VECTORS) {
      RUNG_UNROLL for (int k = 0; k < 3; k++) w[k] = channels.features(w_, 3 * atom + k, has_w);
    }
  }
  RUNG_INLINE void project(const Pack* vector, const T* Y) {
    if constexpr (VECTORS) {
      RUNG_UNROLL for (int k = 0; k < 3; k++) u += vector[k] * (Y[1 + k] * INV_SQRT3);
    }
  }
};

// An edge, or, where a receiver has none left, its place in a batch, with nothing at the sender.
template <int V> struct Edge {
  long long index;
  bool present;
  T s[R], Y[L];
  Sender<V> sender;

  RUNG_INLINE void read(const Inputs& in, const Channels<V>& channels, int number, int end) {
    present = number < end;
    index = present ? number : end - 1;
    load_row<R>(in.radial + index * R, s);
    load_row<L>(in.harmonics + index * L, Y);
    sender.read(channels, in.x, present, in.w, present, in.senders[index]);
    sender.project(sender.w, Y);
  }
};

// The cotangents of an edge's gradients: `moved` is the derivative of `edge` along them.
template <int V> RUNG_INLINE void read_cotangents(const Inputs& in, const Cotangents& t, const Channels<V>& channels,
                                                  const Edge<V>& edge, Edge<V>& moved) {
  RUNG_UNROLL for (int n = 0; n < R; n++) moved.s[n] = T(0);
  RUNG_UNROLL for (int m = 0; m < L; m++) moved.Y[m] = T(0);
  if (t.radial) load_row<R>(t.radial + edge.index * R, moved.s);
  if (t.harmonics) load_row<L>(t.harmonics + edge.index * L, moved.Y);
  const bool has_x = edge.present && t.x, has_w = edge.present && t.w;
  moved.sender.read(channels, t.x, has_x, t.w, has_w, in.senders[edge.index]);
  moved.sender.project(edge.sender.w, moved.Y);
  moved.sender.project(moved.sender.w, edge.Y);
}

}  // namespace rung
