// The gradients of the radial functions and harmonics, with those of x and w: sums over channels. An edge's sums stay
// in registers over all blocks of channels before their lanes are added up.
#pragma once

#include "passes.h"

namespace rung {

constexpr int EDGES = REGISTERS == 32 && R <= 8 ? 2 : 1;  // that share a read of the weights
constexpr int KEPT = DEGREES + 2;  // packs that a block hands on: P_l, derivatives with respect to u and ut

// What an edge's sweep over the blocks reads and writes.
template <class T> struct Edge {
  const T *s, *Y, *x, *w;
  T *g_x, *g_w;  // null: unwanted
  int64_t C;
};

template <class T, bool VECTORS> struct Basis {
  const Graph& graph;
  const Inputs<T>& in;
  const Cotangents<T>& t;
  const T *weights, *gA;
  T *kept, *g_radial, *g_harmonics;
  typename SenderSums<T>::Part g_x, g_w;

  RUNG_INLINE int64_t from(int64_t e) const { return graph.senders[e] * graph.C; }
  RUNG_INLINE Edge<T> edge(int64_t e) const {
    const int64_t sender = graph.senders[e];
    const auto place = [&](const typename SenderSums<T>::Part& sums, int64_t width) {
      return sums ? sums.base + (sums.by_edge ? e : sender) * width : nullptr;
    };
    return {in.radial + e * R,     in.harmonics + e * L,     in.x + from(e),      in.w + 3 * from(e),
            place(g_x, graph.C), place(g_w, 3 * graph.C), graph.C};
  }
};

// The products of the harmonics with the receiver's are wanted one after the other: this order lets the degrees take
// turns.
struct Term {
  int l, m;
};
constexpr Term term(int index) {
  for (int k = 0; k < 2 * DEGREES - 1; k++)
    for (int l = (k + 1) / 2; l < DEGREES; l++)
      if (index-- == 0) return {l, l * l + k};
  return {0, 0};
}

// q_l of a block of channels, a few terms at a time.
template <class T> struct Projection {
  const T *B, *Y;  // B [L, WIDTH]
  Pack<T> q[DEGREES];

  template <int FIRST, int LAST> RUNG_INLINE void add_terms() {
    if constexpr (FIRST < LAST) {
      constexpr Term now = term(FIRST);
      const Pack<T> product = load(B + now.m * WIDTH<T>) * Y[now.m];
      if constexpr (now.m == now.l * now.l) q[now.l] = product;
      else q[now.l] += load(B + now.m * WIDTH<T>) * Y[now.m];
      add_terms<FIRST + 1, LAST>();
    }
  }
};

// All columns of degrees: those of x (from k = 0 on) or those of u. r[l] = sum_n w[l][n] s_n, g_s[n] += sum_l w[l][n]
// d[l]; meanwhile the terms of the next projection.
template <class T, int TERMS, int N = 0>
RUNG_INLINE void radial_gradients(const T* w, const T* s, const Pack<T>* d, Pack<T>* r, Pack<T>* g_s,
                                  Projection<T>& next) {
  RUNG_UNROLL for (int l = 0; l < DEGREES; l++) {
    const Pack<T> weights = load_once(w + l * COLUMN<T> + N * WIDTH<T>);
    r[l] = N ? r[l] + weights * s[N] : weights * s[N];
    g_s[N] += weights * d[l];
  }
  next.template add_terms<N * TERMS / R, (N + 1) * TERMS / R>();
  if constexpr (N + 1 < R) radial_gradients<T, TERMS, N + 1>(w, s, d, r, g_s, next);
}

// One block of an edge: adds to g_s and to the gradients of x and w, keeps P and the derivative with respect to u. q
// holds the block's projections; when it returns, those of `next`.
template <bool VECTORS, class T>
RUNG_INLINE void sweep_block(const Edge<T>& edge, const T* weights, const T* B, int64_t c, Pack<T>* q,
                             Projection<T>& next, Pack<T>* g_s, T* kept) {
  constexpr int W = WIDTH<T>;
  const T *s = edge.s, *x = edge.x + c;
  Pack<T> d[DEGREES], r[DEGREES], P[DEGREES];
  RUNG_UNROLL for (int l = 0; l < DEGREES; l++) d[l] = q[l] * load(x);
  radial_gradients<T, VECTORS ? 0 : L>(weights, s, d, r, g_s, next);
  Pack<T> sum = r[0] * q[0];
  RUNG_UNROLL for (int l = 1; l < DEGREES; l++) sum += r[l] * q[l];
  if (edge.g_x) store(edge.g_x + c, load(edge.g_x + c) + sum);
  RUNG_UNROLL for (int l = 0; l < DEGREES; l++) P[l] = r[l] * load(x);
  if constexpr (VECTORS) {
    const Vector<T> w = {edge.w + c, edge.C};
    const T* Y = edge.Y + 1;
    const Pack<T> u = along(w, Y);
    RUNG_UNROLL for (int l = 0; l < DEGREES; l++) {
      store(kept + l * W, P[l]);
      d[l] = q[l] * u;
    }
    radial_gradients<T, L>(weights + AXIAL * COLUMN<T>, s, d, r, g_s, next);
    Pack<T> gu = r[0] * q[0];
    RUNG_UNROLL for (int l = 0; l < DEGREES; l++) {
      if (l) gu += r[l] * q[l];
      store(kept + l * W, load(kept + l * W) + r[l] * u);
    }
    const auto B_k = [&](int i) { return load(B + (1 + i) * W); };
    const Pack<T> v = product(w, B_k);
    store(kept + DEGREES * W, gu);
    RUNG_UNROLL for (int n = 0; n < R; n++) {
      const Pack<T> identity = load_once(weights + IDENTITY * COLUMN<T> + n * W);
      sum = n ? sum + identity * s[n] : identity * s[n];
      g_s[n] += identity * v;
    }
    if (edge.g_w)
      RUNG_UNROLL for (int j = 0; j < 3; j++) {
        T* place = edge.g_w + j * edge.C + c;
        store(place, load(place) + gu * Y[j] + sum * B_k(j));
      }
  } else {
    RUNG_UNROLL for (int l = 0; l < DEGREES; l++) store(kept + l * W, P[l]);
  }
  RUNG_UNROLL for (int l = 0; l < DEGREES; l++) q[l] = next.q[l];
}

// g_Y[i][m] = sum over blocks of P_l B_m, for l = 1 also of the derivative with respect to u times w_m and with
// SECOND of that with respect to ut times tw_m, for the degrees FIRST ... LAST - 1.
template <int NUM, int FIRST, int LAST, bool SECOND, class T, bool VECTORS>
RUNG_INLINE void harmonic_gradients(const Basis<T, VECTORS>& basis, const T* B, int64_t e, Pack<T> (*g_Y)[L]) {
  constexpr int BEGIN = FIRST * FIRST, COUNT = LAST * LAST - BEGIN, W = WIDTH<T>;
  const int64_t C = basis.graph.C;
  const T* kept = basis.kept;
  Pack<T> sum[NUM][COUNT] = {};
  for (int64_t c = 0; c < C; c += W, kept += NUM * KEPT * W, B += L * W) {
    RUNG_UNROLL for (int l = FIRST; l < LAST; l++) {
      Pack<T> P[NUM];
      RUNG_UNROLL for (int i = 0; i < NUM; i++) P[i] = load_once(kept + (i * KEPT + l) * W);
      RUNG_UNROLL for (int m = l * l; m < (l + 1) * (l + 1); m++) {
        const Pack<T> B_m = load_once(B + m * W);
        RUNG_UNROLL for (int i = 0; i < NUM; i++) sum[i][m - BEGIN] += P[i] * B_m;
      }
    }
    if constexpr (VECTORS && FIRST <= 1)
      RUNG_UNROLL for (int i = 0; i < NUM; i++) {
        const Pack<T> gu = load_once(kept + (i * KEPT + DEGREES) * W);
        const T* w = basis.in.w + 3 * basis.from(e + i) + c;
        RUNG_UNROLL for (int j = 0; j < 3; j++) {
          sum[i][1 + j - BEGIN] += gu * load(w + j * C);
          if (!SECOND || !basis.t.has_w) continue;
          const Pack<T> gut = load(kept + (i * KEPT + DEGREES + 1) * W);
          sum[i][1 + j - BEGIN] += gut * load(basis.t.w + 3 * basis.from(e + i) + j * C + c);
        }
      }
  }
  RUNG_UNROLL for (int i = 0; i < NUM; i++)
    RUNG_UNROLL for (int m = 0; m < COUNT; m++) g_Y[i][BEGIN + m] = sum[i][m];
}

template <int NUM, bool SECOND, class T, bool VECTORS>
RUNG_INLINE void finish_edges(const Basis<T, VECTORS>& basis, const T* B, int64_t e, const Pack<T> (*g_s)[R]) {
  Pack<T> g_Y[NUM][L];
  constexpr int SPLIT = NUM > 1 && DEGREES > 3 ? 3 : DEGREES;  // the sums of more degrees would not stay in registers
  lane_sums<NUM * R>(g_s[0], basis.g_radial + e * R);
  harmonic_gradients<NUM, 0, SPLIT, SECOND>(basis, B, e, g_Y);
  if constexpr (SPLIT < DEGREES) harmonic_gradients<NUM, SPLIT, DEGREES, SECOND>(basis, B, e, g_Y);
  lane_sums<NUM * L>(g_Y[0], basis.g_harmonics + e * L);
}

template <int NUM, class T, bool VECTORS>
RUNG_INLINE void basis_edges(const Basis<T, VECTORS>& basis, const T* B, int64_t e, int64_t last_edge, Pack<T>* q) {
  constexpr int W = WIDTH<T>;
  const int64_t C = basis.graph.C;
  Pack<T> g_s[NUM][R];
  for (int i = 0; i < NUM; i++) {
    const Edge<T> edge = basis.edge(e + i);
    Pack<T> sum[R] = {};
    T* kept = basis.kept + i * KEPT * W;
    const T *weights = basis.weights, *Y_next = basis.in.harmonics + std::min(e + i + 1, last_edge) * L, *B_c = B;
    for (int64_t c = 0; c < C; c += W, kept += NUM * KEPT * W, B_c += L * W, weights += COLUMNS<VECTORS> * COLUMN<T>) {
      const bool last = c + W == C;
      Projection<T> next = {last ? B : B_c + L * W, last ? Y_next : edge.Y, {}};
      sweep_block<VECTORS>(edge, weights, B_c, c, q, next, sum, kept);
    }
    RUNG_UNROLL for (int n = 0; n < R; n++) g_s[i][n] = sum[n];
  }
  finish_edges<NUM, false>(basis, B, e, g_s);
}

// The same for one edge of the derivative along cotangents; no training on energies and forces asks for it.
template <class T, bool VECTORS>
__attribute__((noinline)) void second_basis_edge(const Basis<T, VECTORS>& basis, const T* B_row, int64_t e) {
  const T* B = B_row;
  constexpr int W = WIDTH<T>;
  const int64_t C = basis.graph.C;
  const Cotangents<T>& t = basis.t;
  const T *s = basis.in.radial + e * R, *ts = t.s + e * t.s_stride;
  const T *Y = basis.in.harmonics + e * L, *tY = t.Y + e * t.Y_stride;
  Pack<T> g_s[1][R] = {};
  T* kept = basis.kept;
  for (int64_t c = 0; c < C; c += W, kept += KEPT * W, B += L * W) {
    const Pack<T> x = load(basis.in.x + basis.from(e) + c), tx = load(t.x + (t.has_x ? basis.from(e) : 0) + c);
    Pack<T> u = {}, ut = {}, gu = {}, gut = {}, r, rt;
    const auto column = [&](int k, Pack<T> d) {
      const T* weights = basis.weights + (c * COLUMNS<VECTORS> + k * W) * R;
      r = rt = Pack<T>{};
      RUNG_UNROLL for (int n = 0; n < R; n++) {
        const Pack<T> w = load(weights + n * W);
        r += w * s[n], rt += w * ts[n], g_s[0][n] += w * d;
      }
    };
    const Vector<T> w = {basis.in.w + 3 * basis.from(e) + c, C}, tw = {t.w + (t.has_w ? 3 * basis.from(e) : 0) + c, C};
    if constexpr (VECTORS) u = along(w, Y + 1), ut = along(w, tY + 1) + along(tw, Y + 1);
    for (int l = 0; l < DEGREES; l++) {
      Pack<T> q = {}, qt = {};
      for (int m = l * l; m < (l + 1) * (l + 1); m++) q += load(B + m * W) * Y[m], qt += load(B + m * W) * tY[m];
      column(l, q * tx + qt * x);
      Pack<T> Pt = rt * x + r * tx;
      if constexpr (VECTORS) {
        column(AXIAL + l, q * ut + qt * u);
        Pt += rt * u + r * ut;
        gu += rt * q + r * qt;
        gut += r * q;
      }
      store(kept + l * W, Pt);
    }
    if constexpr (VECTORS) {
      const auto B_k = [&](int i) { return load(B + (1 + i) * W); };
      column(IDENTITY, product(tw, B_k));
      store(kept + DEGREES * W, gu);
      store(kept + (DEGREES + 1) * W, gut);
    }
  }
  finish_edges<1, true>(basis, B_row, e, g_s);
}

}  // namespace rung
