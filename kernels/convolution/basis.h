// The gradients of the radial functions and harmonics, with those of x and w: sums over channels. An edge's sums stay in
// registers over all blocks of channels before their lanes are added up.
#pragma once

#include "passes.h"

namespace rung {

constexpr int EDGES = REGISTERS == 32 && R <= 8 ? 2 : 1;  // that share a read of the weights
constexpr int KEPT = DEGREES + 2;  // packs that a block hands on: P_l, derivatives with respect to u and ut

template <class T, bool VECTORS> struct Basis {
  const Graph& graph;
  const Inputs<T>& in;
  const Cotangents<T>& t;
  const T *weights, *gA;
  T *kept, *g_radial, *g_harmonics;
  typename SenderSums<T>::Part g_x, g_w;

  RUNG_INLINE int64_t from(int64_t e) const { return graph.senders[e] * graph.C; }
  RUNG_INLINE T* place(const typename SenderSums<T>::Part& sums, int64_t e, int64_t width) const {
    return sums.base + (sums.by_edge ? e : int64_t(graph.senders[e])) * width;
  }
};

// For columns k[j] of weights and edges i: r[i][j] = sum_n w[n] s[i][n], and g_s[i][n] += w[n] d[i][j].
template <class T, int NUM, int COUNT>
RUNG_INLINE void radial_gradients(const T* weights, const int* k, const T* const* s, const Pack<T> (*d)[COUNT],
                                  Pack<T> (*r)[COUNT], Pack<T> (*g_s)[R]) {
  RUNG_UNROLL for (int n = 0; n < R; n++)
    RUNG_UNROLL for (int j = 0; j < COUNT; j++) {
      const Pack<T> w = load_once(weights + k[j] * COLUMN<T> + n * WIDTH<T>);
      RUNG_UNROLL for (int i = 0; i < NUM; i++) {
        r[i][j] = n ? r[i][j] + w * s[i][n] : w * s[i][n];
        g_s[i][n] += w * d[i][j];
      }
    }
}

// The columns of the degrees l0 and, if COUNT is 2, l1 of one block, for NUM edges from e on; gx and gu are added to.
template <int NUM, int COUNT, class T, bool VECTORS>
RUNG_INLINE void sweep_degrees(const Basis<T, VECTORS>& basis, const T* B, int64_t c, int64_t e, int l0, int l1,
                               const Pack<T>* u, Pack<T>* gx, Pack<T>* gu, Pack<T> (*g_s)[R], T* kept) {
  constexpr int W = WIDTH<T>;
  const T* weights = basis.weights + c * COLUMNS<VECTORS> * R;
  const int k[2] = {l0, l1}, axial[2] = {AXIAL + l0, AXIAL + l1};
  const T* s[NUM];
  Pack<T> q[NUM][COUNT], d[NUM][COUNT], r[NUM][COUNT], P[NUM][COUNT];
  RUNG_UNROLL for (int j = 0; j < COUNT; j++)
    RUNG_UNROLL for (int m = k[j] * k[j]; m < (k[j] + 1) * (k[j] + 1); m++) {
      const Pack<T> B_m = load_once(B + m * basis.graph.C + c);
      RUNG_UNROLL for (int i = 0; i < NUM; i++) {
        const T Y = basis.in.harmonics[(e + i) * L + m];
        q[i][j] = m > k[j] * k[j] ? q[i][j] + B_m * Y : B_m * Y;
      }
    }
  RUNG_UNROLL for (int i = 0; i < NUM; i++) {
    s[i] = basis.in.radial + (e + i) * R;
    RUNG_UNROLL for (int j = 0; j < COUNT; j++) d[i][j] = q[i][j] * load(basis.in.x + basis.from(e + i) + c);
  }
  radial_gradients<T, NUM, COUNT>(weights, k, s, d, r, g_s);
  RUNG_UNROLL for (int i = 0; i < NUM; i++)
    RUNG_UNROLL for (int j = 0; j < COUNT; j++) {
      gx[i] += r[i][j] * q[i][j];
      P[i][j] = r[i][j] * load(basis.in.x + basis.from(e + i) + c);
      if (VECTORS) d[i][j] = q[i][j] * u[i];
    }
  if constexpr (VECTORS) {
    radial_gradients<T, NUM, COUNT>(weights, axial, s, d, r, g_s);
    RUNG_UNROLL for (int i = 0; i < NUM; i++)
      RUNG_UNROLL for (int j = 0; j < COUNT; j++) {
        gu[i] += r[i][j] * q[i][j];
        P[i][j] += r[i][j] * u[i];
      }
  }
  RUNG_UNROLL for (int i = 0; i < NUM; i++)
    RUNG_UNROLL for (int j = 0; j < COUNT; j++) store(kept + (i * KEPT + k[j]) * W, P[i][j]);
}

// All columns of one block: adds to g_s and to the gradients of x and w, keeps P and the derivative with respect to u.
template <int NUM, class T, bool VECTORS>
RUNG_INLINE void sweep_block(const Basis<T, VECTORS>& basis, const T* B, int64_t c, int64_t e, Pack<T> (*g_s)[R], T* kept) {
  const int64_t C = basis.graph.C;
  Pack<T> u[NUM] = {}, gx[NUM] = {}, gu[NUM] = {};
  const auto w = [&](int i) { return Vector<T>{basis.in.w + 3 * basis.from(e + i) + c, C}; };
  if (VECTORS) RUNG_UNROLL for (int i = 0; i < NUM; i++) u[i] = along(w(i), basis.in.harmonics + (e + i) * L + 1);
  // Two degrees at a time, so that enough sums over radial functions are under way.
  RUNG_UNROLL for (int l = 0; l < DEGREES / 2; l++)
    sweep_degrees<NUM, 2>(basis, B, c, e, l, DEGREES - 1 - l, u, gx, gu, g_s, kept);
  if constexpr (DEGREES % 2) sweep_degrees<NUM, 1>(basis, B, c, e, DEGREES / 2, DEGREES / 2, u, gx, gu, g_s, kept);
  if (basis.g_x)
    RUNG_UNROLL for (int i = 0; i < NUM; i++) {
      T* place = basis.place(basis.g_x, e + i, C) + c;
      store(place, load(place) + gx[i]);
    }
  if constexpr (VECTORS) {
    const auto B_k = [&](int i) { return load(B + (1 + i) * C + c); };
    const int k[1] = {IDENTITY};
    const T* s[NUM];
    Pack<T> v[NUM][1], r[NUM][1];
    RUNG_UNROLL for (int i = 0; i < NUM; i++) {
      s[i] = basis.in.radial + (e + i) * R;
      v[i][0] = product(w(i), B_k);
      store(kept + (i * KEPT + DEGREES) * WIDTH<T>, gu[i]);
    }
    radial_gradients<T, NUM, 1>(basis.weights + c * COLUMNS<VECTORS> * R, k, s, v, r, g_s);
    if (!basis.g_w) return;
    RUNG_UNROLL for (int i = 0; i < NUM; i++)
      RUNG_UNROLL for (int j = 0; j < 3; j++) {
        T* place = basis.place(basis.g_w, e + i, 3 * C) + j * C + c;
        store(place, load(place) + gu[i] * basis.in.harmonics[(e + i) * L + 1 + j] + r[i][0] * B_k(j));
      }
  }
}

// g_Y[i][m] = sum over blocks of P_l B_m, for l = 1 also of the derivative with respect to u times w_m and with SECOND of
// that with respect to ut times tw_m, for the degrees FIRST ... LAST - 1.
template <int NUM, int FIRST, int LAST, bool SECOND, class T, bool VECTORS>
RUNG_INLINE void harmonic_gradients(const Basis<T, VECTORS>& basis, const T* B, int64_t e, Pack<T> (*g_Y)[L]) {
  constexpr int BEGIN = FIRST * FIRST, COUNT = LAST * LAST - BEGIN, W = WIDTH<T>;
  const int64_t C = basis.graph.C;
  const T* kept = basis.kept;
  Pack<T> sum[NUM][COUNT] = {};
  for (int64_t c = 0; c < C; c += W, kept += NUM * KEPT * W) {
    RUNG_UNROLL for (int l = FIRST; l < LAST; l++) {
      Pack<T> P[NUM];
      RUNG_UNROLL for (int i = 0; i < NUM; i++) P[i] = load_once(kept + (i * KEPT + l) * W);
      RUNG_UNROLL for (int m = l * l; m < (l + 1) * (l + 1); m++) {
        const Pack<T> B_m = load_once(B + m * C + c);
        RUNG_UNROLL for (int i = 0; i < NUM; i++) sum[i][m - BEGIN] += P[i] * B_m;
      }
    }
    if constexpr (VECTORS && FIRST <= 1)
      RUNG_UNROLL for (int i = 0; i < NUM; i++) {
        const Pack<T> gu = load_once(kept + (i * KEPT + DEGREES) * W);
        const T* w = basis.in.w + 3 * basis.from(e + i) + c;
        RUNG_UNROLL for (int j = 0; j < 3; j++) {
          sum[i][1 + j - BEGIN] += gu * load(w + j * C);
          if (SECOND && basis.t.has_w)
            sum[i][1 + j - BEGIN] += load(kept + (i * KEPT + DEGREES + 1) * W) * load(basis.t.w + 3 * basis.from(e + i) + j * C + c);
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
RUNG_INLINE void basis_edges(const Basis<T, VECTORS>& basis, const T* B, int64_t e) {
  Pack<T> g_s[NUM][R] = {};
  T* kept = basis.kept;
  for (int64_t c = 0; c < basis.graph.C; c += WIDTH<T>, kept += NUM * KEPT * WIDTH<T>)
    sweep_block<NUM>(basis, B, c, e, g_s, kept);
  finish_edges<NUM, false>(basis, B, e, g_s);
}

// The same for one edge of the derivative along cotangents; no training on energies and forces asks for it.
template <class T, bool VECTORS> __attribute__((noinline)) void second_basis_edge(const Basis<T, VECTORS>& basis, const T* B, int64_t e) {
  constexpr int W = WIDTH<T>;
  const int64_t C = basis.graph.C;
  const Cotangents<T>& t = basis.t;
  const T *s[1] = {basis.in.radial + e * R}, *ts = t.s + e * t.s_stride;
  const T *Y = basis.in.harmonics + e * L, *tY = t.Y + e * t.Y_stride;
  Pack<T> g_s[1][R] = {};
  T* kept = basis.kept;
  for (int64_t c = 0; c < C; c += W, kept += KEPT * W) {
    const Pack<T> x = load(basis.in.x + basis.from(e) + c), tx = load(t.x + (t.has_x ? basis.from(e) : 0) + c);
    Pack<T> u = {}, ut = {}, gu = {}, gut = {}, r[1][1], rt;
    const auto column = [&](int k, Pack<T> d) {
      const Pack<T> d_rows[1][1] = {{d}};
      const T* weights = basis.weights + c * COLUMNS<VECTORS> * R;
      radial_gradients<T, 1, 1>(weights, &k, s, d_rows, r, g_s);
      rt = Pack<T>{};
      for (int n = 0; n < R; n++) rt += load(weights + k * COLUMN<T> + n * W) * ts[n];
    };
    const Vector<T> w = {basis.in.w + 3 * basis.from(e) + c, C}, tw = {t.w + (t.has_w ? 3 * basis.from(e) : 0) + c, C};
    if constexpr (VECTORS) u = along(w, Y + 1), ut = along(w, tY + 1) + along(tw, Y + 1);
    for (int l = 0; l < DEGREES; l++) {
      Pack<T> q = {}, qt = {};
      for (int m = l * l; m < (l + 1) * (l + 1); m++) q += load(B + m * C + c) * Y[m], qt += load(B + m * C + c) * tY[m];
      column(l, q * tx + qt * x);
      Pack<T> Pt = rt * x + r[0][0] * tx;
      if constexpr (VECTORS) {
        column(AXIAL + l, q * ut + qt * u);
        Pt += rt * u + r[0][0] * ut;
        gu += rt * q + r[0][0] * qt;
        gut += r[0][0] * q;
      }
      store(kept + l * W, Pt);
    }
    if constexpr (VECTORS) {
      const auto B_k = [&](int i) { return load(B + (1 + i) * C + c); };
      column(IDENTITY, product(tw, B_k));
      store(kept + DEGREES * W, gu);
      store(kept + (DEGREES + 1) * W, gut);
    }
  }
  finish_edges<1, true>(basis, B, e, g_s);
}

}  // namespace rung
