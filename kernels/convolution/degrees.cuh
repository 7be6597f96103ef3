// Sums over edges whose terms belong to one degree: A and the gradients of the weights. A warp has one degree l, whose
// weights or sums it keeps in registers.
#pragma once
#include "edge.cuh"

namespace rung {

template <int l, int V> RUNG_INLINE void sum_messages(const Inputs& in, long long receiver, T* A) {
  using Pack = Lanes<T, V>;
  constexpr bool IDENTITY = VECTORS && l == 1;
  const Channels<V> channels;
  if (!channels.active) return;
  Pack weights[R], axial[VECTORS ? R : 1], identity[IDENTITY ? R : 1], sums[2 * l + 1] = {};
  RUNG_UNROLL for (int n = 0; n < R; n++) {
    weights[n] = channels.weights(in.weights, n, l);
    if constexpr (VECTORS) axial[n] = channels.weights(in.axial, n, l);
    if constexpr (IDENTITY) identity[n] = channels.read(in.identity + n * C);
  }
  const int end = in.row_ptr[receiver + 1];
  RUNG_UNROLL_4 for (int e = in.row_ptr[receiver]; e < end; e++) {
    Edge<V> edge;
    edge.read(in, channels, e, end);
    Pack R0 = {}, R1 = {}, R2 = {};
    RUNG_UNROLL for (int n = 0; n < R; n++) {
      R0 += weights[n] * edge.s[n];
      if constexpr (VECTORS) R1 += axial[n] * edge.s[n];
      if constexpr (IDENTITY) R2 += identity[n] * edge.s[n];
    }
    Pack P = R0 * edge.sender.x;
    if constexpr (VECTORS) P += R1 * edge.sender.u;
    RUNG_UNROLL for (int m = 0; m < 2 * l + 1; m++) {
      sums[m] += P * edge.Y[l * l + m];
      if constexpr (IDENTITY) sums[m] += R2 * edge.sender.w[m];
    }
  }
  RUNG_UNROLL for (int m = 0; m < 2 * l + 1; m++) channels.write(A + (receiver * L + l * l + m) * C, sums[m]);
}

// The receivers [begin, end) of which a warp sums gradients of weights, and the cotangent of A.
struct Receivers {
  long long begin, end;
  const T* gA;
};

// Gradients of the weights (and axial weights) of one degree; SECOND: of their derivative along the cotangents.
template <bool SECOND, int l, int V>
RUNG_INLINE void sum_weights(const Inputs& in, const Cotangents& t, Receivers all, T* g_weights, T* g_axial) {
  using Pack = Lanes<T, V>;
  const Channels<V> channels;
  if (!channels.active) return;
  Pack sums[R] = {}, axial_sums[R] = {};
  for (long long receiver = all.begin; receiver < all.end; receiver++) {
    Pack B[2 * l + 1];
    RUNG_UNROLL for (int m = 0; m < 2 * l + 1; m++) B[m] = channels.read(all.gA + (receiver * L + l * l + m) * C);
    const int end = in.row_ptr[receiver + 1];
    RUNG_UNROLL_4 for (int e = in.row_ptr[receiver]; e < end; e++) {
      Edge<V> edge, moved;
      edge.read(in, channels, e, end);
      if constexpr (SECOND) read_cotangents(in, t, channels, edge, moved);
      Pack q = {}, tq = {};
      RUNG_UNROLL for (int m = 0; m < 2 * l + 1; m++) {
        q += B[m] * edge.Y[l * l + m];
        if constexpr (SECOND) tq += B[m] * moved.Y[l * l + m];
      }
      const Sender<V>&sender = edge.sender, &t_sender = moved.sender;
      RUNG_UNROLL for (int n = 0; n < R; n++) {
        if constexpr (SECOND) {
          sums[n] += (q * t_sender.x + tq * sender.x) * edge.s[n];
          sums[n] += q * sender.x * moved.s[n];
          if constexpr (VECTORS) axial_sums[n] += (q * t_sender.u + tq * sender.u) * edge.s[n];
          if constexpr (VECTORS) axial_sums[n] += q * sender.u * moved.s[n];
        } else {
          sums[n] += q * sender.x * edge.s[n];
          if constexpr (VECTORS) axial_sums[n] += q * sender.u * edge.s[n];
        }
      }
    }
  }
  RUNG_UNROLL for (int n = 0; n < R; n++) {
    channels.write(g_weights + (n * DEGREES + l) * C, sums[n]);
    if constexpr (VECTORS) channels.write(g_axial + (n * DEGREES + l) * C, axial_sums[n]);
  }
}

// The same for the identity weights.
template <bool SECOND, int V>
RUNG_INLINE void sum_identity(const Inputs& in, const Cotangents& t, Receivers all, T* g_identity) {
  using Pack = Lanes<T, V>;
  const Channels<V> channels;
  if (!channels.active) return;
  Pack sums[R] = {};
  for (long long receiver = all.begin; receiver < all.end; receiver++) {
    Pack B[3];
    RUNG_UNROLL for (int k = 0; k < 3; k++) B[k] = channels.read(all.gA + (receiver * L + 1 + k) * C);
    const int end = in.row_ptr[receiver + 1];
    RUNG_UNROLL_4 for (int e = in.row_ptr[receiver]; e < end; e++) {
      Edge<V> edge, moved;
      edge.read(in, channels, e, end);
      if constexpr (SECOND) read_cotangents(in, t, channels, edge, moved);
      Pack v = {}, tv = {};
      RUNG_UNROLL for (int k = 0; k < 3; k++) {
        v += edge.sender.w[k] * B[k];
        if constexpr (SECOND) tv += moved.sender.w[k] * B[k];
      }
      RUNG_UNROLL for (int n = 0; n < R; n++) {
        sums[n] += (SECOND ? tv : v) * edge.s[n];
        if constexpr (SECOND) sums[n] += v * moved.s[n];
      }
    }
  }
  RUNG_UNROLL for (int n = 0; n < R; n++) channels.write(g_identity + n * C, sums[n]);
}

}  // namespace rung
