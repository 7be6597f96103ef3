// Gradients with respect to the edges' scalars and harmonics and the senders' features, and the gradients of those: a
// warp has all degrees of one receiver, or, for what are results of single edges, of a part of its edges. BASIS: the
// scalars and harmonics too, else only rows of x and w. The edges of a BATCH share each read of the weights.
#pragma once
#include "edge.cuh"

namespace rung {

// Where the gradients go; null where not wanted.
struct Outputs {
  T *radial, *harmonics, *x_rows, *w_rows;  // [channel blocks, E, R], [channel blocks, E, L], [E, C], [E, 3, C]

  RUNG_INLINE void enter_channel_block(long long E) {
    radial += blockIdx.y * E * R;
    harmonics += blockIdx.y * E * L;
  }
  // Writes a lane's sum over the block's channels: number `place` of the edge's R + L.
  RUNG_INLINE void write_basis(T sum, int place, long long edge) const {
    if (place >= R) harmonics[edge * L + place - R] = sum;
    else if (place >= 0) radial[edge * R + place] = sum;
  }
};

template <bool BASIS, int V, int BATCH> struct Gradients {
  using Pack = Lanes<T, V>;
  const Inputs& in;
  const Channels<V> channels;
  Pack B[L];
  Edge<V> edge[BATCH];
  T sums[BATCH][R + L];  // over this lane's channels: gradients of s and Y
  Pack gx[BATCH], gu[BATCH], R2[BATCH];

  RUNG_INLINE Gradients(const Inputs& in, const T* gA, long long receiver) : in(in) {
    RUNG_UNROLL for (int m = 0; m < L; m++) B[m] = channels.read(gA + (receiver * L + m) * C);
  }

  RUNG_INLINE void read(int begin, int end) {
    RUNG_UNROLL for (int b = 0; b < BATCH; b++) {
      edge[b].read(in, channels, begin + b, end);
      gx[b] = gu[b] = R2[b] = Pack{};
      RUNG_UNROLL for (int k = 0; k < R + L; k++) sums[b][k] = T(0);
    }
  }

  RUNG_INLINE void add_identity() {
    Pack v[BATCH] = {};
    RUNG_UNROLL for (int b = 0; b < BATCH; b++)
      RUNG_UNROLL for (int k = 0; k < 3; k++) v[b] += edge[b].sender.w[k] * B[1 + k];
    RUNG_UNROLL for (int n = 0; n < R; n++) {
      const Pack identity = channels.read(in.identity + n * C);
      RUNG_UNROLL for (int b = 0; b < BATCH; b++) {
        R2[b] += identity * edge[b].s[n];
        add_dot(sums[b][n], identity, v[b]);
      }
    }
  }

  RUNG_INLINE void add_degree(int l) {
    Pack q[BATCH] = {}, R0[BATCH] = {}, R1[BATCH] = {};
    RUNG_UNROLL for (int b = 0; b < BATCH; b++)
      RUNG_UNROLL for (int m = l * l; m < (l + 1) * (l + 1); m++) q[b] += B[m] * edge[b].Y[m];
    RUNG_UNROLL for (int n = 0; n < R; n++) {
      const Pack weights = channels.weights(in.weights, n, l);
      RUNG_UNROLL for (int b = 0; b < BATCH; b++) {
        R0[b] += weights * edge[b].s[n];
        add_dot(sums[b][n], weights, q[b] * edge[b].sender.x);
      }
      if constexpr (VECTORS) {
        const Pack axial = channels.weights(in.axial, n, l);
        RUNG_UNROLL for (int b = 0; b < BATCH; b++) {
          R1[b] += axial * edge[b].s[n];
          add_dot(sums[b][n], axial, q[b] * edge[b].sender.u);
        }
      }
    }
    RUNG_UNROLL for (int b = 0; b < BATCH; b++) {
      Pack P = R0[b] * edge[b].sender.x;
      gx[b] += R0[b] * q[b];
      if constexpr (VECTORS) P += R1[b] * edge[b].sender.u;
      if constexpr (VECTORS) gu[b] += R1[b] * q[b];
      RUNG_UNROLL for (int m = l * l; m < (l + 1) * (l + 1); m++) add_dot(sums[b][R + m], P, B[m]);
    }
  }

  RUNG_INLINE void write(const Outputs& out, int place) {
    RUNG_UNROLL for (int b = 0; b < BATCH; b++) {
      const long long e = edge[b].index;
      if (!edge[b].present) break;
      gu[b] = gu[b] * INV_SQRT3;
      if constexpr (BASIS) {
        RUNG_UNROLL for (int k = 0; VECTORS && k < 3; k++) add_dot(sums[b][R + 1 + k], gu[b], edge[b].sender.w[k]);
        out.write_basis(warp_sums<R + L>(sums[b], threadIdx.x % WARP), place, e);
      }
      if (out.x_rows) channels.write(out.x_rows + e * C, gx[b]);
      if (VECTORS && out.w_rows) {
        RUNG_UNROLL for (int k = 0; k < 3; k++)
          channels.write(out.w_rows + (3 * e + k) * C, gu[b] * edge[b].Y[1 + k] + R2[b] * B[1 + k]);
      }
    }
  }

  static RUNG_INLINE void run(const Inputs& in, const T* gA, long long receiver, const Outputs& out) {
    const int row = in.row_ptr[receiver], count = in.row_ptr[receiver + 1] - row, parts = gridDim.z;
    const int first = row + count * (int)blockIdx.z / parts, end = row + count * ((int)blockIdx.z + 1) / parts;
    if (first == end) return;
    Gradients g(in, gA, receiver);
    const int place = sum_place<R + L>(threadIdx.x % WARP);
    for (int begin = first; begin < end; begin += BATCH) {
      g.read(begin, end);
      RUNG_UNROLL for (int l = 0; l < DEGREES; l++) g.add_degree(l);
      if constexpr (VECTORS) g.add_identity();
      g.write(out, place);
    }
  }
};

// t before a name: its derivative along the cotangents; `moved` has those of the edge.
template <bool BASIS, int V, int BATCH> struct Gradients2 {
  using Pack = Lanes<T, V>;
  const Inputs& in;
  const Cotangents& t;
  const Channels<V> channels;
  Pack B[L], dB[L];
  Edge<V> edge[BATCH], moved[BATCH];
  T sums[BATCH][R + L];
  Pack gx[BATCH], gu[BATCH], tgu[BATCH], tR2[BATCH];

  RUNG_INLINE Gradients2(const Inputs& in, const Cotangents& t, const T* gA, long long receiver) : in(in), t(t) {
    RUNG_UNROLL for (int m = 0; m < L; m++) {
      B[m] = channels.read(gA + (receiver * L + m) * C);
      dB[m] = Pack{};
    }
  }

  RUNG_INLINE void read(int begin, int end) {
    RUNG_UNROLL for (int b = 0; b < BATCH; b++) {
      edge[b].read(in, channels, begin + b, end);
      read_cotangents(in, t, channels, edge[b], moved[b]);
      gx[b] = gu[b] = tgu[b] = tR2[b] = Pack{};
      RUNG_UNROLL for (int k = 0; k < R + L; k++) sums[b][k] = T(0);
    }
  }

  // First of all, so that w need not be kept for it.
  RUNG_INLINE void add_identity() {
    Pack R2[BATCH] = {};
    RUNG_UNROLL for (int n = 0; n < R; n++) {
      const Pack identity = channels.read(in.identity + n * C);
      RUNG_UNROLL for (int b = 0; b < BATCH; b++) {
        R2[b] += identity * edge[b].s[n];
        tR2[b] += identity * moved[b].s[n];
        RUNG_UNROLL for (int k = 0; k < 3; k++) add_dot(sums[b][n], identity * moved[b].sender.w[k], B[1 + k]);
      }
    }
    RUNG_UNROLL for (int b = 0; b < BATCH; b++)
      RUNG_UNROLL for (int k = 0; k < 3; k++) {
        dB[1 + k] += tR2[b] * edge[b].sender.w[k];
        dB[1 + k] += R2[b] * moved[b].sender.w[k];
      }
  }

  // R0, R1 and their derivatives for one degree, and what its weights add to the gradient of s.
  RUNG_INLINE void add_weights(int l, const Pack* q, const Pack* tq, Pack* R0, Pack* tR0, Pack* R1, Pack* tR1) {
    RUNG_UNROLL for (int n = 0; n < R; n++) {
      const Pack weights = channels.weights(in.weights, n, l);
      RUNG_UNROLL for (int b = 0; b < BATCH; b++) {
        R0[b] += weights * edge[b].s[n];
        tR0[b] += weights * moved[b].s[n];
        add_dot(sums[b][n], weights, q[b] * moved[b].sender.x + tq[b] * edge[b].sender.x);
      }
      if constexpr (VECTORS) {
        const Pack axial = channels.weights(in.axial, n, l);
        RUNG_UNROLL for (int b = 0; b < BATCH; b++) {
          R1[b] += axial * edge[b].s[n];
          tR1[b] += axial * moved[b].s[n];
          add_dot(sums[b][n], axial, q[b] * moved[b].sender.u + tq[b] * edge[b].sender.u);
        }
      }
    }
  }

  RUNG_INLINE void add_degree(int l) {
    Pack q[BATCH] = {}, tq[BATCH] = {}, R0[BATCH] = {}, tR0[BATCH] = {}, R1[BATCH] = {}, tR1[BATCH] = {};
    RUNG_UNROLL for (int b = 0; b < BATCH; b++)
      RUNG_UNROLL for (int m = l * l; m < (l + 1) * (l + 1); m++) {
        q[b] += B[m] * edge[b].Y[m];
        tq[b] += B[m] * moved[b].Y[m];
      }
    add_weights(l, q, tq, R0, tR0, R1, tR1);
    RUNG_UNROLL for (int b = 0; b < BATCH; b++) {
      const Sender<V>&sender = edge[b].sender, &t_sender = moved[b].sender;
      Pack P = R0[b] * sender.x, tP = tR0[b] * sender.x + R0[b] * t_sender.x;
      gx[b] += tR0[b] * q[b];
      gx[b] += R0[b] * tq[b];
      if constexpr (VECTORS) {
        P += R1[b] * sender.u;
        tP += tR1[b] * sender.u;
        tP += R1[b] * t_sender.u;
        gu[b] += R1[b] * q[b];
        tgu[b] += tR1[b] * q[b];
        tgu[b] += R1[b] * tq[b];
      }
      RUNG_UNROLL for (int m = l * l; m < (l + 1) * (l + 1); m++) {
        dB[m] += tP * edge[b].Y[m];
        dB[m] += P * moved[b].Y[m];
        add_dot(sums[b][R + m], tP, B[m]);
      }
    }
  }

  RUNG_INLINE void write(const Outputs& out, int place) {
    RUNG_UNROLL for (int b = 0; b < BATCH; b++) {
      const long long e = edge[b].index;
      if (!edge[b].present) break;
      gu[b] = gu[b] * INV_SQRT3;
      tgu[b] = tgu[b] * INV_SQRT3;
      if constexpr (BASIS) {
        RUNG_UNROLL for (int k = 0; VECTORS && k < 3; k++) {
          add_dot(sums[b][R + 1 + k], tgu[b], edge[b].sender.w[k]);
          add_dot(sums[b][R + 1 + k], gu[b], moved[b].sender.w[k]);
        }
        out.write_basis(warp_sums<R + L>(sums[b], threadIdx.x % WARP), place, e);
      }
      if (out.x_rows) channels.write(out.x_rows + e * C, gx[b]);
      if (VECTORS && out.w_rows) {
        RUNG_UNROLL for (int k = 0; k < 3; k++) {
          const Pack from_u = tgu[b] * edge[b].Y[1 + k] + gu[b] * moved[b].Y[1 + k];
          channels.write(out.w_rows + (3 * e + k) * C, from_u + tR2[b] * B[1 + k]);
        }
      }
    }
  }

  static RUNG_INLINE void run(const Inputs& in, const Cotangents& t, const T* gA, long long receiver, T* d_gA,
                              const Outputs& out) {
    Gradients2 g(in, t, gA, receiver);
    const int place = sum_place<R + L>(threadIdx.x % WARP), end = in.row_ptr[receiver + 1];
    for (int begin = in.row_ptr[receiver]; begin < end; begin += BATCH) {
      g.read(begin, end);
      if constexpr (VECTORS) g.add_identity();
      RUNG_UNROLL for (int l = 0; l < DEGREES; l++) g.add_degree(l);
      g.write(out, place);
    }
    if (!d_gA) return;
    RUNG_UNROLL for (int m = 0; m < L; m++) g.channels.write(d_gA + (receiver * L + m) * C, g.dB[m]);
  }
};

}  // namespace rung
