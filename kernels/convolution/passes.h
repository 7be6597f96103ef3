// Passes over the edges of a few receivers for one block of channels. Each hands packs on to the next in small buffers that
// stay in the L1 cache, so that each can have the order of edges and sums in which no instruction waits for another.
#pragma once

#include <algorithm>

#include "sums.h"

namespace rung {

constexpr int GROUP = REGISTERS == 32 ? 4 : 2;   // rows of scalars that share a read of the weights
constexpr int BLOCKS = REGISTERS == 32 ? 2 : 1;  // blocks of channels that share a read of the harmonics
constexpr int64_t AHEAD = 8;                     // edges after which a sender's features are needed that are fetched now

// f(size, e) for the edges in groups of SIZE, what is left in groups of SIZE / 2 and so on; `size` is a constant.
template <int SIZE, class F> RUNG_INLINE void for_groups(int64_t begin, int64_t end, const F& f) {
  for (; begin + SIZE <= end; begin += SIZE) f(std::integral_constant<int, SIZE>{}, begin);
  if constexpr (SIZE > 1) for_groups<SIZE / 2>(begin, end, f);
}

template <class P> struct Arrays {
  P radial, harmonics, x, weights, w, axial, identity;
};
template <class T> using Inputs = Arrays<const T*>;

// The cotangents of the gradients. A null pointer stands for zeros: then the rows are one row of zeros.
template <class T> struct Cotangents {
  const T *radial, *harmonics, *x, *w;
  int64_t radial_stride, harmonics_stride, x_stride, w_stride;

  Cotangents(const T* zeros, int64_t C, const T* t_radial, const T* t_harmonics, const T* t_x, const T* t_w)
      : radial(t_radial ? t_radial : zeros),
        harmonics(t_harmonics ? t_harmonics : zeros),
        x(t_x ? t_x : zeros),
        w(t_w ? t_w : zeros),
        radial_stride(t_radial ? R : 0),
        harmonics_stride(t_harmonics ? L : 0),
        x_stride(t_x ? C : 0),
        w_stride(t_w ? 3 * C : 0) {}
};

// The arrays as one block of channels sees them.
template <class T> struct Block {
  const Graph& graph;
  const Inputs<T>& in;
  const T* weights;  // of the block
  int64_t c;         // its first channel

  RUNG_INLINE Pack<T> x(int64_t e) const { return load(in.x + graph.senders[e] * graph.C + c); }
  RUNG_INLINE Vector<T> w(int64_t e) const { return {in.w + graph.senders[e] * 3 * graph.C + c, graph.C}; }
  RUNG_INLINE const T* s(int64_t e) const { return in.radial + e * R; }
  RUNG_INLINE const T* Y(int64_t e) const { return in.harmonics + e * L; }

  template <bool VECTORS> RUNG_INLINE void prefetch(int64_t e) const {
    const int64_t sender = graph.senders[e];
    __builtin_prefetch(in.x + sender * graph.C + c);
    if (VECTORS)
      for (int k = 0; k < 3; k++) __builtin_prefetch(in.w + (3 * sender + k) * graph.C + c);
  }
};

// The cotangents as a block sees them.
template <class T> struct CotangentBlock {
  const Graph& graph;
  const Cotangents<T>& t;
  int64_t c;

  RUNG_INLINE Pack<T> x(int64_t e) const { return load(t.x + graph.senders[e] * t.x_stride + c); }
  RUNG_INLINE Vector<T> w(int64_t e) const { return {t.w + graph.senders[e] * t.w_stride + c, t.w_stride ? graph.C : 0}; }
  RUNG_INLINE const T* s(int64_t e) const { return t.radial + e * t.radial_stride; }
  RUNG_INLINE const T* Y(int64_t e) const { return t.harmonics + e * t.harmonics_stride; }

  template <bool VECTORS> RUNG_INLINE void prefetch(int64_t e) const {
    const int64_t sender = graph.senders[e];
    __builtin_prefetch(t.x + sender * t.x_stride + c);
    if (VECTORS)
      for (int k = 0; k < 3; k++) __builtin_prefetch(t.w + sender * t.w_stride + k * graph.C + c);
  }
};

// What the passes hand on, for each edge. SECOND: for the derivative along cotangents, twice as much.
template <class T, bool VECTORS, bool SECOND> struct Rows {
  static constexpr int ORDER = SECOND ? 2 : 1, MESSAGE = DEGREES + VECTORS, W = WIDTH<T>;
  static constexpr int64_t Q = ORDER * DEGREES * W, D = ORDER * COLUMNS<VECTORS> * W, P = ORDER * MESSAGE * W, U = ORDER * W;
  static constexpr int64_t QT = DEGREES * W, DT = COLUMNS<VECTORS> * W, PT = MESSAGE * W, UT = W;  // places of the second

  T *q;  // q_l; qt_l
  T *d;  // the derivatives with respect to the columns' r, of psi or of its derivative; of psi
  T *p;  // P_l, with vectors r_identity; Pt_l, rt_identity
  T *u;  // the derivative with respect to u; ut. Before that u; ut.

  RUNG_INLINE Rows at(int64_t edge) const { return {q + edge * Q, d + edge * D, p + edge * P, u + edge * U}; }
};

template <class T, bool VECTORS, bool SECOND> class Scratch {
 public:
  using Row = Rows<T, VECTORS, SECOND>;

  Scratch(int64_t edges, int64_t blocks)
      : edges_(edges), q_(blocks * edges * Row::Q), d_(blocks * edges * Row::D), p_(blocks * edges * Row::P), u_(blocks * edges * Row::U) {}

  // The rows of a block's messages, and of another for the rest. Without vectors, messages replace q in the second order.
  Row rows(int64_t block, int64_t rest) const {
    T* p = p_.get() + block * edges_ * Row::P;
    T* q = q_.get() + rest * edges_ * Row::Q;
    return {SECOND && !VECTORS ? p : q, d_.get() + rest * edges_ * Row::D, p, u_.get() + rest * edges_ * Row::U};
  }
  int64_t block_stride() const { return edges_ * Row::P; }

 private:
  int64_t edges_;
  Buffer<T> q_, d_, p_, u_;
};

// ---- messages: P of all edges, then their sums A -----------------------------------------------------------------------

template <class T, bool VECTORS, int EDGES>
RUNG_INLINE void messages(const Block<T>& block, int64_t e, const Rows<T, VECTORS, false>& rows) {
  const T* s[EDGES];
  Pack<T> r[EDGES][DEGREES];
  RUNG_UNROLL for (int i = 0; i < EDGES; i++) s[i] = block.s(e + i);
  radial_sums<T, EDGES, DEGREES>(block.weights, s, r);
  RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
    const Pack<T> x = block.x(e + i);
    RUNG_UNROLL for (int l = 0; l < DEGREES; l++) store(rows.at(i).p + l * WIDTH<T>, r[i][l] * x);
  }
  if constexpr (VECTORS) {
    Pack<T> r[EDGES][DEGREES + 1];
    radial_sums<T, EDGES, DEGREES + 1>(block.weights + AXIAL * COLUMN<T>, s, r);
    RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
      T* p = rows.at(i).p;
      const Pack<T> u = along(block.w(e + i), block.Y(e + i));
      RUNG_UNROLL for (int l = 0; l < DEGREES; l++) store(p + l * WIDTH<T>, load(p + l * WIDTH<T>) + r[i][l] * u);
      store(p + DEGREES * WIDTH<T>, r[i][DEGREES]);
    }
  }
}

// A_m of one receiver for the degrees FIRST ... LAST - 1 and NUM blocks of channels, whose messages are `stride` apart.
template <class T, bool VECTORS, bool SECOND, int NUM, int FIRST, int LAST>
RUNG_INLINE void spread(const Block<T>& block, const CotangentBlock<T>& t, int64_t begin, int64_t end,
                        const T* p, int64_t stride, T* A) {
  using Row = Rows<T, VECTORS, SECOND>;
  constexpr int BEGIN = FIRST * FIRST, COUNT = LAST * LAST - BEGIN, W = WIDTH<T>;
  const int64_t C = block.graph.C;
  Pack<T> sum[NUM][COUNT] = {};
  for (int64_t e = begin; e < end; e++, p += Row::P) {
    const T *Y = block.Y(e), *tY = SECOND ? t.Y(e) : nullptr;
    RUNG_UNROLL for (int l = FIRST; l < LAST; l++) {
      Pack<T> P[NUM], Pt[NUM];
      RUNG_UNROLL for (int b = 0; b < NUM; b++) {
        P[b] = load(p + b * stride + l * W);
        if (SECOND) Pt[b] = load(p + b * stride + Row::PT + l * W);
      }
      RUNG_UNROLL for (int m = l * l; m < (l + 1) * (l + 1); m++)
        RUNG_UNROLL for (int b = 0; b < NUM; b++) sum[b][m - BEGIN] += (SECOND ? Pt[b] : P[b]) * Y[m];
      if constexpr (SECOND)
        RUNG_UNROLL for (int m = l * l; m < (l + 1) * (l + 1); m++)
          RUNG_UNROLL for (int b = 0; b < NUM; b++) sum[b][m - BEGIN] += P[b] * tY[m];
    }
    if constexpr (VECTORS && FIRST <= 1) {
      const Vector<T> w = block.w(e), tw = SECOND ? t.w(e) : w;
      RUNG_UNROLL for (int b = 0; b < NUM; b++) {
        const Pack<T> r = load(p + b * stride + DEGREES * W);
        const Pack<T> rt = SECOND ? load(p + b * stride + Row::PT + DEGREES * W) : r;
        RUNG_UNROLL for (int k = 0; k < 3; k++) {
          sum[b][1 + k - BEGIN] += rt * load(w.w + k * w.C + b * W);
          if (SECOND) sum[b][1 + k - BEGIN] += r * load(tw.w + k * tw.C + b * W);
        }
      }
    }
  }
  RUNG_UNROLL for (int b = 0; b < NUM; b++)
    RUNG_UNROLL for (int m = 0; m < COUNT; m++) store(A + (BEGIN + m) * C + b * W, sum[b][m]);
}

// Degrees whose harmonics' sums stay in registers together.
constexpr int SPLIT = DEGREES > 3 ? 3 : DEGREES;

template <class T, bool VECTORS, bool SECOND, int NUM>
RUNG_INLINE void spread_all(const Block<T>& block, const CotangentBlock<T>& t, int64_t begin, int64_t end, const T* p,
                            int64_t stride, T* A) {
  spread<T, VECTORS, SECOND, NUM, 0, SPLIT>(block, t, begin, end, p, stride, A);
  if constexpr (SPLIT < DEGREES) spread<T, VECTORS, SECOND, NUM, SPLIT, DEGREES>(block, t, begin, end, p, stride, A);
}

// ---- projections q, then the gradients of x and w ----------------------------------------------------------------------

// q and d of a receiver's edges.
template <class T, bool VECTORS>
RUNG_INLINE void project_row(const Block<T>& block, const T* B_row, int64_t begin, int64_t end, Rows<T, VECTORS, false> rows) {
  constexpr int W = WIDTH<T>;
  Pack<T> B_m[L];
  RUNG_UNROLL for (int m = 0; m < L; m++) B_m[m] = load(B_row + m * block.graph.C + block.c);
  const auto B = [&](int m) { return B_m[m]; };
  const int64_t last_edge = block.graph.row_ptr[block.graph.N] - 1;
  for (int64_t e = begin; e < end; e++, rows = rows.at(1)) {
    block.template prefetch<VECTORS>(std::min(e + AHEAD, last_edge));
    const Pack<T> x = block.x(e);
    const T* const Y[1] = {block.Y(e)};
    Pack<T> q[1][DEGREES];
    project<T, 1>(Y, B, q);
    RUNG_UNROLL for (int l = 0; l < DEGREES; l++) {
      store(rows.q + l * W, q[0][l]);
      store(rows.d + l * W, q[0][l] * x);
    }
    if constexpr (VECTORS) {
      const Pack<T> u = along(block.w(e), Y[0]);
      RUNG_UNROLL for (int l = 0; l < DEGREES; l++) store(rows.d + (AXIAL + l) * W, q[0][l] * u);
      store(rows.d + IDENTITY * W, product(block.w(e), B));
      store(rows.u, u);
    }
  }
}

// q, qt, d, dt and with vectors u, ut of a receiver's edges.
template <class T, bool VECTORS>
RUNG_INLINE void project_row(const Block<T>& block, const CotangentBlock<T>& t, const T* B_row, int64_t begin, int64_t end,
                             Rows<T, VECTORS, true> rows) {
  using Row = Rows<T, VECTORS, true>;
  constexpr int W = WIDTH<T>;
  Pack<T> B_m[L];
  RUNG_UNROLL for (int m = 0; m < L; m++) B_m[m] = load(B_row + m * block.graph.C + block.c);
  const auto B = [&](int m) { return B_m[m]; };
  const int64_t last_edge = block.graph.row_ptr[block.graph.N] - 1;
  for (int64_t e = begin; e < end; e++, rows = rows.at(1)) {
    const int64_t ahead = std::min(e + AHEAD, last_edge);
    block.template prefetch<VECTORS>(ahead);
    t.template prefetch<VECTORS>(ahead);
    const Pack<T> x = block.x(e), tx = t.x(e);
    const T* const Y[2] = {block.Y(e), t.Y(e)};
    Pack<T> q[2][DEGREES];
    project<T, 2>(Y, B, q);
    RUNG_UNROLL for (int l = 0; l < DEGREES; l++) {
      store(rows.q + l * W, q[0][l]);
      store(rows.q + Row::QT + l * W, q[1][l]);
      store(rows.d + l * W, q[0][l] * tx + q[1][l] * x);
      store(rows.d + Row::DT + l * W, q[0][l] * x);
    }
    if constexpr (VECTORS) {
      const Vector<T> w = block.w(e), tw = t.w(e);
      const Pack<T> u = along(w, Y[0]), ut = along(w, Y[1]) + along(tw, Y[0]);
      store(rows.u, u);
      store(rows.u + Row::UT, ut);
      RUNG_UNROLL for (int l = 0; l < DEGREES; l++) {
        store(rows.d + (AXIAL + l) * W, q[0][l] * ut + q[1][l] * u);
        store(rows.d + Row::DT + (AXIAL + l) * W, q[0][l] * u);
      }
      store(rows.d + IDENTITY * W, product(tw, B));
      store(rows.d + Row::DT + IDENTITY * W, product(w, B));
    }
  }
}

// Adds to the gradients of x and w; with KEEP writes P and replaces u by the derivative with respect to it.
template <class T, bool VECTORS, bool KEEP, int EDGES>
RUNG_INLINE void node_gradients(const Block<T>& block, const T* B_row, int64_t e, const Rows<T, VECTORS, false>& rows,
                                const typename SenderSums<T>::Part& g_x, const typename SenderSums<T>::Part& g_w) {
  constexpr int W = WIDTH<T>;
  const int64_t C = block.graph.C, c = block.c;
  const T* s[EDGES];
  RUNG_UNROLL for (int i = 0; i < EDGES; i++) s[i] = block.s(e + i);
  {
    Pack<T> r[EDGES][DEGREES];
    radial_sums<T, EDGES, DEGREES>(block.weights, s, r);
    RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
      const auto row = rows.at(i);
      if (g_x) {
        T* place = g_x.row(e + i) + c;
        Pack<T> sum = load(place);
        RUNG_UNROLL for (int l = 0; l < DEGREES; l++) sum += r[i][l] * load(row.q + l * W);
        store(place, sum);
      }
      if constexpr (KEEP) {
        const Pack<T> x = block.x(e + i);
        RUNG_UNROLL for (int l = 0; l < DEGREES; l++) store(row.p + l * W, r[i][l] * x);
      }
    }
  }
  if constexpr (VECTORS) {
    if (!KEEP && !g_w) return;
    Pack<T> r[EDGES][DEGREES + 1];
    radial_sums<T, EDGES, DEGREES + 1>(block.weights + AXIAL * COLUMN<T>, s, r);
    RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
      const auto row = rows.at(i);
      Pack<T> gu = r[i][0] * load(row.q);
      RUNG_UNROLL for (int l = 1; l < DEGREES; l++) gu += r[i][l] * load(row.q + l * W);
      if constexpr (KEEP) {
        const Pack<T> u = load(row.u);
        RUNG_UNROLL for (int l = 0; l < DEGREES; l++) store(row.p + l * W, load(row.p + l * W) + r[i][l] * u);
        store(row.u, gu);
      }
      if (g_w)
        RUNG_UNROLL for (int k = 0; k < 3; k++) {
          T* place = g_w.row(e + i) + k * C + c;
          store(place, load(place) + gu * block.Y(e + i)[1 + k] + r[i][DEGREES] * load(B_row + (1 + k) * C + c));
        }
    }
  }
}

// Writes P and Pt, adds to the gradients of x and w, and replaces u and ut by the derivatives with respect to them.
template <class T, bool VECTORS, int EDGES>
RUNG_INLINE void second_messages(const Block<T>& block, const CotangentBlock<T>& t, const T* B_row, int64_t e,
                                 const Rows<T, VECTORS, true>& rows, const typename SenderSums<T>::Part& g_x,
                                 const typename SenderSums<T>::Part& g_w) {
  using Row = Rows<T, VECTORS, true>;
  constexpr int W = WIDTH<T>;
  const int64_t C = block.graph.C, c = block.c;
  const T* s[2 * EDGES];
  RUNG_UNROLL for (int i = 0; i < EDGES; i++) s[2 * i] = block.s(e + i), s[2 * i + 1] = t.s(e + i);
  {
    Pack<T> r[2 * EDGES][DEGREES];
    radial_sums<T, 2 * EDGES, DEGREES>(block.weights, s, r);
    RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
      const auto row = rows.at(i);
      const Pack<T>*r_l = r[2 * i], *rt_l = r[2 * i + 1];
      if (g_x) {
        T* place = g_x.row(e + i) + c;
        Pack<T> sum[2] = {load(place), r_l[0] * load(row.q + Row::QT)};
        RUNG_UNROLL for (int l = 0; l < DEGREES; l++) {
          sum[0] += rt_l[l] * load(row.q + l * W);
          if (l) sum[1] += r_l[l] * load(row.q + Row::QT + l * W);
        }
        store(place, sum[0] + sum[1]);
      }
      const Pack<T> x = block.x(e + i), tx = t.x(e + i);
      RUNG_UNROLL for (int l = 0; l < DEGREES; l++) {
        store(row.p + l * W, r_l[l] * x);
        store(row.p + Row::PT + l * W, rt_l[l] * x + r_l[l] * tx);
      }
    }
  }
  if constexpr (VECTORS) {
    Pack<T> r[2 * EDGES][DEGREES + 1];
    radial_sums<T, 2 * EDGES, DEGREES + 1>(block.weights + AXIAL * COLUMN<T>, s, r);
    RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
      const auto row = rows.at(i);
      const Pack<T>*r_l = r[2 * i], *rt_l = r[2 * i + 1], u = load(row.u), ut = load(row.u + Row::UT);
      Pack<T> gu[2] = {}, gut = {};
      RUNG_UNROLL for (int l = 0; l < DEGREES; l++) {
        const Pack<T> q = load(row.q + l * W);
        gu[0] += rt_l[l] * q;
        gu[1] += r_l[l] * load(row.q + Row::QT + l * W);
        gut += r_l[l] * q;
        store(row.p + l * W, load(row.p + l * W) + r_l[l] * u);
        store(row.p + Row::PT + l * W, load(row.p + Row::PT + l * W) + rt_l[l] * u + r_l[l] * ut);
      }
      store(row.p + DEGREES * W, r_l[DEGREES]);
      store(row.p + Row::PT + DEGREES * W, rt_l[DEGREES]);
      gu[0] += gu[1];
      store(row.u, gu[0]);
      store(row.u + Row::UT, gut);
      if (g_w)
        RUNG_UNROLL for (int k = 0; k < 3; k++) {
          T* place = g_w.row(e + i) + k * C + c;
          store(place, load(place) + gu[0] * block.Y(e + i)[1 + k] + gut * t.Y(e + i)[1 + k] +
                           rt_l[DEGREES] * load(B_row + (1 + k) * C + c));
        }
    }
  }
}

}  // namespace rung
