// The mathematics of the convolution on packs of channels, shared by its loops over edges (cpu.cpp); reference.py is the
// definition. For an edge i <- j with scalars s, harmonics Y, features x and vectors w of j, and B = gA[i]:
//
//   u = sum_k Y_1k w_k,  q_l = sum_m Y_m B_m,  v = sum_k w_k B_1k,  r = sum_n W_n s_n for each column of weights
//   A_m = sum_edges P_l Y_m + [l = 1] r_identity w_m,  P_l = r_l x + r_axial,l u
//   psi = sum_l P_l q_l + r_identity v
//
// Columns of weights: the degrees' weights, then with vectors the degrees' axial weights (over sqrt(3), which u lacks) and
// the identity weights. The derivatives of psi with respect to the columns' r are d = (q_l x, q_l u, v).
// Along the cotangents (ts, tY, tx, tw) psi has the derivative sum_l (Pt_l q_l + P_l qt_l) + rt v + r vt with
//
//   ut = sum_k tY_1k w_k + Y_1k tw_k,  qt_l = sum_m tY_m B_m,  vt = sum_k tw_k B_1k,  rt = sum_n W_n ts_n
//   Pt_l = rt_l x + r_l tx + rt_axial,l u + r_axial,l ut
//
// Everything below is inlined and unrolled into loops whose sums stay in registers.
#pragma once

#include "lanes.h"

namespace rung {

constexpr int R = RUNG_R, DEGREES = RUNG_L + 1, L = DEGREES * DEGREES;
template <bool VECTORS> constexpr int COLUMNS = VECTORS ? 2 * DEGREES + 1 : DEGREES;
constexpr int AXIAL = DEGREES, IDENTITY = 2 * DEGREES;  // places among the columns
constexpr double INV_SQRT3 = 0.57735026918962576451;

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

// A column's weights of one block of channels follow each other: R packs.
template <class T> constexpr int COLUMN = R * WIDTH<T>;

// r[i][k] = sum_n w[k][n] s[i][n] for COUNT columns: each pack of weights is read once for all rows of scalars.
template <class T, int ROWS, int COUNT>
RUNG_INLINE void radial_sums(const T* w, const T* const* s, Pack<T> (*r)[COUNT]) {
  RUNG_UNROLL for (int n = 0; n < R; n++)
    RUNG_UNROLL for (int k = 0; k < COUNT; k++) {
      const Pack<T> weights = load_once(w + k * COLUMN<T> + n * WIDTH<T>);
      RUNG_UNROLL for (int i = 0; i < ROWS; i++) r[i][k] = n ? r[i][k] + weights * s[i][n] : weights * s[i][n];
    }
}

// g_s[i][n] += sum_k w[k][n] d[i][k] for COUNT columns; the packs of d[i] begin at d + i * stride.
template <class T, int ROWS, int COUNT>
RUNG_INLINE void radial_gradients(const T* w, const T* d, int64_t stride, Pack<T> (*g_s)[R]) {
  RUNG_UNROLL for (int k = 0; k < COUNT; k++) {
    Pack<T> column[ROWS];
    RUNG_UNROLL for (int i = 0; i < ROWS; i++) column[i] = load_once(d + i * stride + k * WIDTH<T>);
    RUNG_UNROLL for (int n = 0; n < R; n++) {
      const Pack<T> weights = load_once(w + k * COLUMN<T> + n * WIDTH<T>);
      RUNG_UNROLL for (int i = 0; i < ROWS; i++) g_s[i][n] += weights * column[i];
    }
  }
}

// q[i][l] = sum_m Y[i][m] B_m; the degrees take turns, so that no sum waits for its last term. B_m is `B(m)`.
template <class T, int ROWS, class Get> RUNG_INLINE void project(const T* const* Y, Get B, Pack<T> (*q)[DEGREES]) {
  RUNG_UNROLL for (int k = 0; k < 2 * DEGREES - 1; k++)
    RUNG_UNROLL for (int l = k / 2 + k % 2; l < DEGREES; l++) {
      const Pack<T> B_m = B(l * l + k);
      RUNG_UNROLL for (int i = 0; i < ROWS; i++) {
        const T Y_m = Y[i][l * l + k];
        q[i][l] = k ? q[i][l] + B_m * Y_m : B_m * Y_m;
      }
    }
}

// The three components of an atom's vectors: w_k is C numbers after w_{k-1}.
template <class T> struct Vector {
  const T* w;
  int64_t C;
  RUNG_INLINE Pack<T> operator[](int k) const { return load(w + k * C); }
};

// sum_k Y_1k w_k
template <class T> RUNG_INLINE Pack<T> along(const Vector<T>& w, const T* Y) {
  return w[0] * Y[1] + w[1] * Y[2] + w[2] * Y[3];
}

// sum_k w_k B_1k
template <class T, class Get> RUNG_INLINE Pack<T> product(const Vector<T>& w, Get B) {
  return w[0] * B(1) + w[1] * B(2) + w[2] * B(3);
}

// g_w[k][n] += sum over edges of d[k] s[n] + dt[k] ts[n], for COUNT columns k and the scalars n0 ... n0 + SCALARS - 1.
// Rows of d and dt are `stride` apart.
template <class T, bool SECOND, int COUNT, int SCALARS>
RUNG_INLINE void weight_sums(int64_t edges, const T* s, const T* ts, int64_t ts_stride, const T* d, const T* dt, int64_t stride,
                             T* g_w) {
  Pack<T> sum[COUNT][SCALARS];
  RUNG_UNROLL for (int k = 0; k < COUNT; k++)
    RUNG_UNROLL for (int n = 0; n < SCALARS; n++) sum[k][n] = load(g_w + k * COLUMN<T> + n * WIDTH<T>);
  for (int64_t e = 0; e < edges; e++, s += R, d += stride) {
    Pack<T> column[COUNT];
    RUNG_UNROLL for (int k = 0; k < COUNT; k++) column[k] = load(d + k * WIDTH<T>);
    RUNG_UNROLL for (int n = 0; n < SCALARS; n++)
      RUNG_UNROLL for (int k = 0; k < COUNT; k++) sum[k][n] += column[k] * s[n];
    if constexpr (SECOND) {
      RUNG_UNROLL for (int k = 0; k < COUNT; k++) column[k] = load(dt + k * WIDTH<T>);
      RUNG_UNROLL for (int n = 0; n < SCALARS; n++)
        RUNG_UNROLL for (int k = 0; k < COUNT; k++) sum[k][n] += column[k] * ts[n];
      ts += ts_stride, dt += stride;
    }
  }
  RUNG_UNROLL for (int k = 0; k < COUNT; k++)
    RUNG_UNROLL for (int n = 0; n < SCALARS; n++) store(g_w + k * COLUMN<T> + n * WIDTH<T>, sum[k][n]);
}

}  // namespace rung
