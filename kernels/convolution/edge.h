// The mathematics of the convolution on packs of channels, shared by its loops over edges (cpu.cpp); reference.py is
// the definition. For an edge i <- j with scalars s, harmonics Y, features x and vectors w of j, and B = gA[i]:
//
//   u = sum_k Y_1k w_k,  q_l = sum_m Y_m B_m,  v = sum_k w_k B_1k,  r = sum_n W_n s_n for each column of weights
//   A_m = sum_edges P_l Y_m + [l = 1] r_identity w_m,  P_l = r_l x + r_axial,l u
//   psi = sum_l P_l q_l + r_identity v
//
// Columns of weights: the degrees' weights, then with vectors the degrees' axial weights (over sqrt(3), which u
// lacks) and the identity weights. The derivatives of psi with respect to the columns' r are d = (q_l x, q_l u, v).
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

// r[b] = sum_n w[b][n] s_n
template <class T, int NUM> RUNG_INLINE void radial_sum(const Pack<T> (*w)[R], const T* s, Pack<T>* r) {
  RUNG_UNROLL for (int n = 0; n < R; n++)
    RUNG_UNROLL for (int b = 0; b < NUM; b++) r[b] = n ? r[b] + w[b][n] * s[n] : w[b][n] * s[n];
}

// sum_m Y_m B_m for the harmonics of degree l, whose first Y and B these are; B_m is `B(m)`.
template <class T, int l, class Get> RUNG_INLINE Pack<T> project(const T* Y, Get B) {
  Pack<T> q = B(0) * Y[0];
  RUNG_UNROLL for (int m = 1; m < 2 * l + 1; m++) q += B(m) * Y[m];
  return q;
}

// A_m += P Y_m
template <class T, int l> RUNG_INLINE void spread(Pack<T> P, const T* Y, Pack<T>* A) {
  RUNG_UNROLL for (int m = 0; m < 2 * l + 1; m++) A[m] += P * Y[m];
}

// The three components of an atom's vectors: w_k is C numbers after w_{k-1}.
template <class T> struct Vector {
  const T* w;
  int64_t C;
  RUNG_INLINE Pack<T> operator[](int k) const { return load(w + k * C); }
};

// sum_k Y_1k w_k for the three harmonics of degree 1
template <class T> RUNG_INLINE Pack<T> along(const Vector<T>& w, const T* Y) {
  return w[0] * Y[0] + w[1] * Y[1] + w[2] * Y[2];
}

// sum_k w_k B_1k for the three harmonics of degree 1
template <class T, class Get> RUNG_INLINE Pack<T> product(const Vector<T>& w, Get B) {
  return w[0] * B(0) + w[1] * B(1) + w[2] * B(2);
}

}  // namespace rung
