// Passes over the edges of a few receivers, for one block of channels and one degree. The degree is the outer loop so
// that its weights, their gradients and its sums over edges stay in registers: what limits these loops besides
// multiplications is moving packs to and from the cache.
#pragma once

#include "sums.h"

namespace rung {

constexpr int64_t AHEAD = 8;  // edges after which a sender's features are needed that are fetched now
constexpr int64_t NEXT = 8;   // receivers after which harmonics are needed that are fetched now

template <class P> struct Arrays {
  P radial, harmonics, x, weights, w, axial, identity;
};
template <class T> using Inputs = Arrays<const T*>;

// The cotangents of the gradients. A null pointer stands for zeros until `fill`: then they are one row for all edges
// or atoms.
template <class T> struct Cotangents {
  const T *s = nullptr, *Y = nullptr, *x = nullptr, *w = nullptr;
  int64_t s_stride = R, Y_stride = L;
  bool has_x = true, has_w = true;

  // Returns the zeros, at least `size` of them.
  Buffer<T> fill(int64_t size) {
    size = std::max<int64_t>({size, R, L});
    Buffer<T> zeros(size);
    std::fill_n(zeros.get(), size, T(0));
    if (!s) s = zeros.get(), s_stride = 0;
    if (!Y) Y = zeros.get(), Y_stride = 0;
    if (!x) x = zeros.get(), has_x = false;
    if (!w) w = zeros.get(), has_w = false;
    return zeros;
  }
};

// What an edge's passes hand on, one pack each.
template <class T> struct Rows {
  T *u, *ut;    // the projections of w and its cotangent
  T *gu, *gut;  // the derivatives with respect to them
  T *q, *qt, *p, *pt;
};

// Some receivers and a block of channels, from the channel c on.
// Functions copy it: the compiler cannot know that what they store is not one of these pointers.
template <class T, bool VECTORS> struct Pass {
  static constexpr int W = WIDTH<T>;
  Graph graph;
  Inputs<T> in;
  Cotangents<T> t;
  int64_t first, last;      // receivers
  // For each edge from the first receiver's on: where its sender's x begins, a third of where its w does; the same of
  // the cotangents and the gradients.
  const int64_t *from, *tx_from, *tw_from, *x_to, *w_to;
  Rows<T> rows;
  const T* gA;
  T *g_x, *g_w, *g_weights;  // g_weights is packed like `weights`
  const T* weights;
  int64_t c;

  RUNG_INLINE int64_t edge(int64_t receiver) const { return graph.row_ptr[receiver]; }
  RUNG_INLINE int64_t local(int64_t e) const { return e - graph.row_ptr[first]; }  // an edge's place in from, to, rows
  RUNG_INLINE const T* s(int64_t e) const { return in.radial + e * R; }
  RUNG_INLINE const T* Y(int64_t e, int l) const { return in.harmonics + e * L + l * l; }
  RUNG_INLINE const T* ts(int64_t e) const { return t.s + e * t.s_stride; }
  RUNG_INLINE const T* tY(int64_t e, int l) const { return t.Y + e * t.Y_stride + l * l; }
  RUNG_INLINE const T* x(int64_t k) const { return in.x + from[k] + c; }
  RUNG_INLINE const T* tx(int64_t k) const { return t.x + tx_from[k] + c; }
  RUNG_INLINE Vector<T> w(int64_t k) const { return {in.w + 3 * from[k] + c, graph.C}; }
  RUNG_INLINE Vector<T> tw(int64_t k) const { return {t.w + 3 * tw_from[k] + c, graph.C}; }
  // Where harmonics of a receiver begin in A and gA.
  RUNG_INLINE int64_t harmonics(int64_t receiver, int l) const { return (receiver * L + l * l) * graph.C + c; }

  // The weights of a column in registers, or their gradients.
  template <int NUM> RUNG_INLINE void load_column(const T* packed, int k, Pack<T> (*w)[R]) const {
    RUNG_UNROLL for (int b = 0; b < NUM; b++)
      RUNG_UNROLL for (int n = 0; n < R; n++)
        w[b][n] = load_once(packed + (b * COLUMNS<VECTORS> + k) * COLUMN<T> + n * W);
  }
  RUNG_INLINE void store_column(int k, const Pack<T> (*w)[R]) const {
    RUNG_UNROLL for (int n = 0; n < R; n++) store(g_weights + k * COLUMN<T> + n * W, w[0][n]);
  }

  template <int NUM> RUNG_INLINE void prefetch_sender(int64_t k) const {
    RUNG_UNROLL for (int b = 0; b < NUM; b++) __builtin_prefetch(in.x + from[k + AHEAD] + c + b * W);
  }
  RUNG_INLINE void prefetch_harmonics(int64_t receiver) const {
    if (receiver + NEXT >= graph.N) return;
    RUNG_UNROLL for (int m = 0; m < L; m++) __builtin_prefetch(gA + harmonics(receiver + NEXT, 0) + m * graph.C, 0, 2);
  }
};

#define RUNG_PASS template <class T, bool VECTORS> __attribute__((noinline)) void

// ---- A ------------------------------------------------------------------------------------------------------------

// A_1k = sum of r_identity w_k; keeps u.
RUNG_PASS forward_vectors(const Pass<T, VECTORS>& given, T* A) {
  const Pass<T, VECTORS> pass = given;
  const int64_t C = pass.graph.C;
  Pack<T> identity[1][R];
  pass.template load_column<1>(pass.weights, IDENTITY, identity);
  for (int64_t receiver = pass.first; receiver < pass.last; receiver++) {
    Pack<T> sum[3] = {};
    for (int64_t e = pass.edge(receiver), k = pass.local(e); e < pass.edge(receiver + 1); e++, k++) {
      const T* place = pass.w(k).w;
      const Pack<T> w[3] = {load_once(place), load_once(place + C), load_once(place + 2 * C)};
      const T* Y = pass.Y(e, 1);
      Pack<T> r[1];
      radial_sum<T, 1>(identity, pass.s(e), r);
      store(pass.rows.u + k * WIDTH<T>, w[0] * Y[0] + w[1] * Y[1] + w[2] * Y[2]);
      RUNG_UNROLL for (int i = 0; i < 3; i++) sum[i] += r[0] * w[i];
    }
    RUNG_UNROLL for (int i = 0; i < 3; i++) store(A + pass.harmonics(receiver, 1) + i * C, sum[i]);
  }
}

// A_m of the degree l for NUM blocks; adds to what forward_vectors left.
template <int l, int NUM, class T, bool VECTORS>
__attribute__((noinline)) void forward_degree(const Pass<T, VECTORS>& given, T* A) {
  const Pass<T, VECTORS> pass = given;
  constexpr int W = WIDTH<T>, M = 2 * l + 1;
  Pack<T> weights[NUM][R], axial[1][R];
  pass.template load_column<NUM>(pass.weights, l, weights);
  if constexpr (VECTORS) pass.template load_column<1>(pass.weights, AXIAL + l, axial);
  for (int64_t receiver = pass.first; receiver < pass.last; receiver++) {
    T* place = A + pass.harmonics(receiver, l);
    Pack<T> sum[NUM][M] = {};
    if (VECTORS && l == 1) RUNG_UNROLL for (int m = 0; m < M; m++) sum[0][m] = load(place + m * pass.graph.C);
    for (int64_t e = pass.edge(receiver), k = pass.local(e); e < pass.edge(receiver + 1); e++, k++) {
      if (l == 0) pass.template prefetch_sender<NUM>(k);
      const T *s = pass.s(e), *Y = pass.Y(e, l);
      Pack<T> P[NUM], r[1];
      if constexpr (VECTORS) {
        RUNG_UNROLL for (int n = 0; n < R; n++) {
          P[0] = n ? P[0] + weights[0][n] * s[n] : weights[0][n] * s[n];
          r[0] = n ? r[0] + axial[0][n] * s[n] : axial[0][n] * s[n];
        }
      } else {
        radial_sum<T, NUM>(weights, s, P);
      }
      RUNG_UNROLL for (int b = 0; b < NUM; b++) P[b] *= load(pass.x(k) + b * W);
      if (VECTORS) P[0] += r[0] * load(pass.rows.u + k * W);
      RUNG_UNROLL for (int m = 0; m < M; m++)
        RUNG_UNROLL for (int b = 0; b < NUM; b++) sum[b][m] += P[b] * Y[m];
    }
    RUNG_UNROLL for (int m = 0; m < M; m++)
      RUNG_UNROLL for (int b = 0; b < NUM; b++) store(place + m * pass.graph.C + b * W, sum[b][m]);
  }
}

// ---- gradients of x, w and the weights ----------------------------------------------------------------------------

// u of all edges; the derivatives with respect to it begin at 0.
RUNG_PASS project_vectors(const Pass<T, VECTORS>& given) {
  const Pass<T, VECTORS> pass = given;
  const int64_t begin = pass.edge(pass.first), end = pass.edge(pass.last);
  for (int64_t e = begin, k = 0; e < end; e++, k++) {
    store(pass.rows.u + k * WIDTH<T>, along(pass.w(k), pass.Y(e, 1)));
    store(pass.rows.gu + k * WIDTH<T>, Pack<T>{});
    if (!pass.t.w) continue;
    store(pass.rows.ut + k * WIDTH<T>, along(pass.w(k), pass.tY(e, 1)) + along(pass.tw(k), pass.Y(e, 1)));
    store(pass.rows.gut + k * WIDTH<T>, Pack<T>{});
  }
}

// One column of weights of the degree l: with x, or if ON_AXIS with u. NODES adds to the gradient of x (or u),
// WEIGHTS to that of the column. With vectors the first column leaves q for the second.
template <int l, bool ON_AXIS, bool NODES, bool WEIGHTS, class T, bool VECTORS>
__attribute__((noinline)) void gradient_column(const Pass<T, VECTORS>& given) {
  const Pass<T, VECTORS> pass = given;
  constexpr int W = WIDTH<T>, COLUMN_INDEX = ON_AXIS ? AXIAL + l : l;
  Pack<T> weights[1][R], g_weights[1][R];
  if constexpr (NODES) pass.template load_column<1>(pass.weights, COLUMN_INDEX, weights);
  if constexpr (WEIGHTS) pass.template load_column<1>(pass.g_weights, COLUMN_INDEX, g_weights);
  for (int64_t receiver = pass.first; receiver < pass.last; receiver++) {
    if (l == 0 && !ON_AXIS) pass.prefetch_harmonics(receiver);
    Pack<T> B_m[2 * l + 1];
    const T* B_row = pass.gA + pass.harmonics(receiver, l);
    if (!ON_AXIS) RUNG_UNROLL for (int m = 0; m < 2 * l + 1; m++) B_m[m] = load_once(B_row + m * pass.graph.C);
    for (int64_t e = pass.edge(receiver), k = pass.local(e); e < pass.edge(receiver + 1); e++, k++) {
      if (l == 0 && !ON_AXIS) pass.template prefetch_sender<1>(k);
      const T* s = pass.s(e);
      Pack<T> q;
      if constexpr (ON_AXIS) {
        q = load_once(pass.rows.q + k * W);
      } else {
        q = project<T, l>(pass.Y(e, l), [&](int m) { return B_m[m]; });
        if (VECTORS) store(pass.rows.q + k * W, q);
      }
      const Pack<T> d = WEIGHTS ? q * load(ON_AXIS ? pass.rows.u + k * W : pass.x(k)) : q;
      Pack<T> r = {};
      RUNG_UNROLL for (int n = 0; n < R; n++) {
        if (NODES) r = n ? r + weights[0][n] * s[n] : weights[0][n] * s[n];
        if (WEIGHTS) g_weights[0][n] += d * s[n];
      }
      if constexpr (NODES) {
        T* place = ON_AXIS ? pass.rows.gu + k * W : pass.g_x + pass.x_to[k] + pass.c;
        store(place, load(place) + r * q);
      }
    }
  }
  if constexpr (WEIGHTS) pass.store_column(COLUMN_INDEX, g_weights);
}

// The identity weights' column, and the gradient of w.
template <bool NODES, bool WEIGHTS, class T, bool VECTORS>
__attribute__((noinline)) void gradient_identity(const Pass<T, VECTORS>& given) {
  const Pass<T, VECTORS> pass = given;
  constexpr int W = WIDTH<T>;
  const int64_t C = pass.graph.C;
  Pack<T> weights[1][R], g_weights[1][R];
  if constexpr (NODES) pass.template load_column<1>(pass.weights, IDENTITY, weights);
  if constexpr (WEIGHTS) pass.template load_column<1>(pass.g_weights, IDENTITY, g_weights);
  for (int64_t receiver = pass.first; receiver < pass.last; receiver++) {
    const T* B = pass.gA + pass.harmonics(receiver, 1);
    const Pack<T> B_k[3] = {load_once(B), load_once(B + C), load_once(B + 2 * C)};
    for (int64_t e = pass.edge(receiver), k = pass.local(e); e < pass.edge(receiver + 1); e++, k++) {
      const T *s = pass.s(e), *Y = pass.Y(e, 1);
      const Pack<T> v = product(pass.w(k), [&](int i) { return B_k[i]; });
      Pack<T> r = {};
      RUNG_UNROLL for (int n = 0; n < R; n++) {
        if (NODES) r = n ? r + weights[0][n] * s[n] : weights[0][n] * s[n];
        if (WEIGHTS) g_weights[0][n] += v * s[n];
      }
      if constexpr (NODES) {
        const Pack<T> gu = load_once(pass.rows.gu + k * W);
        T* place = pass.g_w + 3 * pass.w_to[k] + pass.c;
        RUNG_UNROLL for (int i = 0; i < 3; i++) store(place + i * C, load(place + i * C) + gu * Y[i] + r * B_k[i]);
      }
    }
  }
  if constexpr (WEIGHTS) pass.store_column(IDENTITY, g_weights);
}

// ---- the same of the derivative along the cotangents, and the gradient of B ---------------------------------------

// As gradient_column, all at once; the last column of the degree adds up A_m.
template <int l, bool ON_AXIS, class T, bool VECTORS>
__attribute__((noinline)) void second_column(const Pass<T, VECTORS>& given, T* A) {
  const Pass<T, VECTORS> pass = given;
  constexpr int W = WIDTH<T>, M = 2 * l + 1, COLUMN_INDEX = ON_AXIS ? AXIAL + l : l;
  constexpr bool SPREADS = ON_AXIS == VECTORS;
  const Rows<T>& rows = pass.rows;
  const int64_t C = pass.graph.C;
  Pack<T> weights[1][R], g_weights[1][R];
  pass.template load_column<1>(pass.weights, COLUMN_INDEX, weights);
  pass.template load_column<1>(pass.g_weights, COLUMN_INDEX, g_weights);
  for (int64_t receiver = pass.first; receiver < pass.last; receiver++) {
    if (l == 0 && !ON_AXIS) pass.prefetch_harmonics(receiver);
    const T* B_row = pass.gA + pass.harmonics(receiver, l);
    Pack<T> sum[M] = {};
    for (int64_t e = pass.edge(receiver), k = pass.local(e); e < pass.edge(receiver + 1); e++, k++) {
      if (l == 0 && !ON_AXIS) pass.template prefetch_sender<1>(k);
      const T *s = pass.s(e), *ts = pass.ts(e), *Y = pass.Y(e, l), *tY = pass.tY(e, l);
      Pack<T> q = {}, qt = {};
      if constexpr (ON_AXIS) {
        q = load_once(rows.q + k * W), qt = load_once(rows.qt + k * W);
      } else {
        RUNG_UNROLL for (int m = 0; m < M; m++) {
          const Pack<T> B = load_once(B_row + m * C);
          q = m ? q + B * Y[m] : B * Y[m];
          qt = m ? qt + B * tY[m] : B * tY[m];
        }
        if (VECTORS) store(rows.q + k * W, q), store(rows.qt + k * W, qt);
      }
      const T *x = ON_AXIS ? rows.u + k * W : pass.x(k), *tx = ON_AXIS ? rows.ut + k * W : pass.tx(k);
      const Pack<T> d = q * load(tx) + qt * load(x), dt = q * load(x);
      Pack<T> r = {}, rt = {};
      RUNG_UNROLL for (int n = 0; n < R; n++) {
        r = n ? r + weights[0][n] * s[n] : weights[0][n] * s[n];
        rt = n ? rt + weights[0][n] * ts[n] : weights[0][n] * ts[n];
        g_weights[0][n] += d * s[n];
        g_weights[0][n] += dt * ts[n];
      }
      T* place = ON_AXIS ? rows.gu + k * W : pass.g_x + pass.x_to[k] + pass.c;
      store(place, load(place) + rt * q + r * qt);
      if (ON_AXIS) store(rows.gut + k * W, load(rows.gut + k * W) + r * q);
      Pack<T> P = r * load(x), Pt = rt * load(x) + r * load(tx);
      if (ON_AXIS) P += load(rows.p + k * W), Pt += load(rows.pt + k * W);
      if constexpr (SPREADS) {
        spread<T, l>(Pt, Y, sum);
        spread<T, l>(P, tY, sum);
      } else {
        store(rows.p + k * W, P), store(rows.pt + k * W, Pt);
      }
    }
    if constexpr (SPREADS)
      RUNG_UNROLL for (int m = 0; m < M; m++) store(A + pass.harmonics(receiver, l) + m * C, sum[m]);
  }
  pass.store_column(COLUMN_INDEX, g_weights);
}

// As gradient_identity, all at once; adds to A_1k.
RUNG_PASS second_identity(const Pass<T, VECTORS>& given, T* A) {
  const Pass<T, VECTORS> pass = given;
  constexpr int W = WIDTH<T>;
  const int64_t C = pass.graph.C;
  Pack<T> weights[1][R], g_weights[1][R];
  pass.template load_column<1>(pass.weights, IDENTITY, weights);
  pass.template load_column<1>(pass.g_weights, IDENTITY, g_weights);
  for (int64_t receiver = pass.first; receiver < pass.last; receiver++) {
    const T* B = pass.gA + pass.harmonics(receiver, 1);
    T* out = A + pass.harmonics(receiver, 1);
    const Pack<T> B_k[3] = {load_once(B), load_once(B + C), load_once(B + 2 * C)};
    Pack<T> sum[3] = {load(out), load(out + C), load(out + 2 * C)};
    for (int64_t e = pass.edge(receiver), k = pass.local(e); e < pass.edge(receiver + 1); e++, k++) {
      const T *s = pass.s(e), *ts = pass.ts(e), *Y = pass.Y(e, 1), *tY = pass.tY(e, 1);
      const auto B_at = [&](int i) { return B_k[i]; };
      const Pack<T> v = product(pass.w(k), B_at), vt = product(pass.tw(k), B_at);
      Pack<T> r = {}, rt = {};
      RUNG_UNROLL for (int n = 0; n < R; n++) {
        r = n ? r + weights[0][n] * s[n] : weights[0][n] * s[n];
        rt = n ? rt + weights[0][n] * ts[n] : weights[0][n] * ts[n];
        g_weights[0][n] += vt * s[n];
        g_weights[0][n] += v * ts[n];
      }
      const Pack<T> gu = load_once(pass.rows.gu + k * W), gut = load_once(pass.rows.gut + k * W);
      T* place = pass.g_w + 3 * pass.w_to[k] + pass.c;
      RUNG_UNROLL for (int i = 0; i < 3; i++) {
        store(place + i * C, load(place + i * C) + gu * Y[i] + gut * tY[i] + rt * B_k[i]);
        sum[i] += rt * pass.w(k)[i];
        sum[i] += r * pass.tw(k)[i];
      }
    }
    RUNG_UNROLL for (int i = 0; i < 3; i++) store(out + i * C, sum[i]);
  }
  pass.store_column(IDENTITY, g_weights);
}

}  // namespace rung
