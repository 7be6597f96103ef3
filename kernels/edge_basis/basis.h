// The edge basis of one edge (F a number) or of a pack of edges: radial functions with cut-off, and harmonics.
#pragma once
#include "generated.h"
#include "lanes.h"

namespace rung {

#ifdef __CUDACC__
RUNG_INLINE float root(float x) { return sqrtf(x); }
RUNG_INLINE double root(double x) { return sqrt(x); }
#else
RUNG_INLINE float root(float x) { return __builtin_sqrtf(x); }
RUNG_INLINE double root(double x) { return __builtin_sqrt(x); }
#endif
template <class F> RUNG_INLINE F root(F x) {
  for (unsigned k = 0; k < sizeof(F) / sizeof(x[0]); k++) x[k] = root(x[k]);
  return x;
}

// sum_k (-z)^k / prod_{j<=k} 2j (2j + ODD) for z <= (pi/2)^2, to the precision of T. ODD: -1 cos(a), 1 sin(a)/a,
// 3 -3 (sin(a)/a)'/a, where a = sqrt(z).
template <int ODD, class F, class T> RUNG_INLINE F series(F z) {
  F sum = F{} + T(1);
  RUNG_UNROLL for (int k = sizeof(T) == 4 ? 6 : 10; k > 0; k--) sum = T(1) - z * T(1.0 / (2 * k * (2 * k + ODD))) * sum;
  return sum;
}

constexpr double PI = 3.14159265358979323846;

template <class T> RUNG_INLINE T wave_number(T cutoff) { return T(PI) / cutoff; }

template <class F, class T> RUNG_INLINE F smaller(F x, T bound) {
  const F bounds = F{} + bound;
  return x < bounds ? x : bounds;
}

// Direction and distance of an edge.
template <class F> struct Direction {
  F n[3], d, r;  // r = 1/d

  template <class T> RUNG_INLINE static Direction of(const F* x) {
    Direction e;
    e.d = root(x[0] * x[0] + x[1] * x[1] + x[2] * x[2]);
    e.r = T(1) / e.d;
    RUNG_UNROLL for (int k = 0; k < 3; k++) e.n[k] = x[k] * e.r;
    return e;
  }
  RUNG_INLINE F along(const F* t) const { return n[0] * t[0] + n[1] * t[1] + n[2] * t[2]; }
};

// sin(nu theta)/theta for nu = 1..R, theta = pi d/r_c (r_c beyond it), by
//   F_(i+j) = F_i c_j + c_i F_j,   c_(i+j) = c_i c_j - theta^2 F_i F_j,   c_nu = cos(nu theta),
// with i and j as equal as can be, which keeps errors small, and without dividing by a small theta. First derivatives
// are theta H_nu, with H_(i+j) = H_i c_j + c_i H_j - (i + j) F_i F_j; second derivatives are -nu^2 F_nu - 2 H_nu.
template <int R, bool DERIVATIVES, class F, class T> struct Waves {
  F theta, sine[R + 1], slope[R + 1];  // F and H, from index 1

  RUNG_INLINE Waves(F d, T cutoff) {
    theta = smaller(d * wave_number(cutoff), T(PI));
    const F z = theta * theta, quarter = z * T(0.25), half_cosine = series<-1, F, T>(quarter);
    const F half_sine = series<1, F, T>(quarter);  // over theta/2
    F cosine[R + 1];
    sine[1] = half_sine * half_cosine;
    cosine[1] = T(1) - z * half_sine * half_sine * T(0.5);
    if constexpr (DERIVATIVES)
      slope[1] = series<3, F, T>(quarter) * half_cosine * T(-1.0 / 12) - half_sine * half_sine * T(0.25);
    RUNG_UNROLL for (int nu = 2; nu <= R; nu++) {
      const int i = nu / 2, j = nu - i;
      const F product = sine[i] * sine[j];
      sine[nu] = sine[i] * cosine[j] + cosine[i] * sine[j];
      cosine[nu] = cosine[i] * cosine[j] - z * product;
      if (2 * nu <= R + 1) {  // a length error of (cosine, theta sine) doubles with nu
        const F length = T(1.5) - T(0.5) * (cosine[nu] * cosine[nu] + z * sine[nu] * sine[nu]);
        cosine[nu] = cosine[nu] * length;
        sine[nu] = sine[nu] * length;
      }
      if constexpr (DERIVATIVES) slope[nu] = slope[i] * cosine[j] + cosine[i] * slope[j] - product * T(nu);
    }
  }
};

// d in units of the cut-off, 1 beyond it: there the envelope and its first two derivatives are zero.
template <class F, class T> RUNG_INLINE F reduced(F d, T cutoff) { return smaller(d / cutoff, T(1)); }

// 1 - 28 t^6 + 48 t^7 - 21 t^8 without its cancellation near t = 1.
template <class F, class T> RUNG_INLINE F envelope(F t) {
  const F s = T(1) - t;
  return s * s * s * (((((t * T(21) + T(15)) * t + T(10)) * t + T(6)) * t + T(3)) * t + T(1));
}

template <class F, class T> RUNG_INLINE F envelope_slope(F t) {
  const F s = t * (T(1) - t), square = t * t;
  return s * s * (square * t) * T(-168);
}

template <class F, class T> RUNG_INLINE F envelope_curvature(F t) {
  const F square = t * t;
  return (T(1) - t) * (square * square) * (t * T(7) - T(5)) * T(168);
}

template <int LMAX, class F, class T> RUNG_INLINE void harmonics(const F* n, F* Y) {
  if constexpr (LMAX == 1) harmonics_1<F, T>(n, Y);
  if constexpr (LMAX == 2) harmonics_2<F, T>(n, Y);
  if constexpr (LMAX == 3) harmonics_3<F, T>(n, Y);
}

template <int LMAX, class F, class T> RUNG_INLINE void harmonics_backward(const F* n, F r, const F* g, F* gx) {
  if constexpr (LMAX == 1) harmonics_backward_1<F, T>(n, r, g, gx);
  if constexpr (LMAX == 2) harmonics_backward_2<F, T>(n, r, g, gx);
  if constexpr (LMAX == 3) harmonics_backward_3<F, T>(n, r, g, gx);
}

template <int LMAX, class F, class T>
RUNG_INLINE void harmonics_backward2(const F* n, F r, const F* g, const F* t, F* dg, F* dx) {
  if constexpr (LMAX == 1) harmonics_backward2_1<F, T>(n, r, g, t, dg, dx);
  if constexpr (LMAX == 2) harmonics_backward2_2<F, T>(n, r, g, t, dg, dx);
  if constexpr (LMAX == 3) harmonics_backward2_3<F, T>(n, r, g, t, dg, dx);
}

// sqrt(2/r_c) sin(nu pi d/r_c)/d = scale sin(nu theta)/theta
template <class T> RUNG_INLINE T radial_scale(T cutoff) { return root(T(2) / cutoff) * wave_number(cutoff); }

// x [3] -> radial [R], Y [L]
template <int R, int LMAX, class F, class T> RUNG_INLINE void edge_basis(const F* x, T cutoff, F* radial, F* Y) {
  const auto edge = Direction<F>::template of<T>(x);
  harmonics<LMAX, F, T>(edge.n, Y);
  const F t = reduced(edge.d, cutoff), u = envelope<F, T>(t) * radial_scale(cutoff);
  const Waves<R, false, F, T> waves(edge.d, cutoff);
  RUNG_UNROLL for (int nu = 1; nu <= R; nu++) radial[nu - 1] = waves.sine[nu] * u;
}

// gx [3] for the cotangents g_radial [R] and g_Y [L].
template <int R, int LMAX, class F, class T>
RUNG_INLINE void edge_basis_backward(const F* x, T cutoff, const F* g_radial, const F* g_Y, F* gx) {
  const auto edge = Direction<F>::template of<T>(x);
  harmonics_backward<LMAX, F, T>(edge.n, edge.r, g_Y, gx);
  const F t = reduced(edge.d, cutoff);
  const Waves<R, true, F, T> waves(edge.d, cutoff);
  F sines = waves.sine[1] * g_radial[0], slopes = waves.slope[1] * g_radial[0];
  RUNG_UNROLL for (int nu = 2; nu <= R; nu++) {
    sines = sines + waves.sine[nu] * g_radial[nu - 1];
    slopes = slopes + waves.slope[nu] * g_radial[nu - 1];
  }
  const F u = envelope<F, T>(t) * wave_number(cutoff), du = envelope_slope<F, T>(t) * (T(1) / cutoff);
  const F along = (slopes * waves.theta * u + sines * du) * radial_scale(cutoff);
  RUNG_UNROLL for (int k = 0; k < 3; k++) gx[k] = gx[k] + edge.n[k] * along;
}

// dg_radial [R], dg_Y [L] and, if VECTORS, dx [3] for the cotangent t [3] of gx.
template <int R, int LMAX, bool VECTORS, class F, class T>
RUNG_INLINE void edge_basis_backward2(
    const F* x, T cutoff, const F* g_radial, const F* g_Y, const F* t, F* dg_radial, F* dg_Y, F* dx) {
  const auto edge = Direction<F>::template of<T>(x);
  F second[3];
  harmonics_backward2<LMAX, F, T>(edge.n, edge.r, g_Y, t, dg_Y, second);
  const F tau = edge.along(t), s = reduced(edge.d, cutoff);
  const Waves<R, true, F, T> waves(edge.d, cutoff);
  const T k = wave_number(cutoff), scale = radial_scale(cutoff);
  const F u = envelope<F, T>(s) * (k * scale), du = envelope_slope<F, T>(s) * (scale / cutoff);  // of R' in F' and F
  const F tau_u = u * waves.theta * tau, tau_du = du * tau;
  RUNG_UNROLL for (int nu = 1; nu <= R; nu++) {
    dg_radial[nu - 1] = waves.slope[nu] * tau_u + waves.sine[nu] * tau_du;
  }
  if constexpr (VECTORS) {
    F sines = waves.sine[1] * g_radial[0], slopes = waves.slope[1] * g_radial[0], squares = sines;
    RUNG_UNROLL for (int nu = 2; nu <= R; nu++) {
      const F product = waves.sine[nu] * g_radial[nu - 1];
      sines = sines + product;
      squares = squares + product * T(nu * nu);
      slopes = slopes + waves.slope[nu] * g_radial[nu - 1];
    }
    const F d2u = envelope_curvature<F, T>(s) * (scale / (cutoff * cutoff));
    const F first = slopes * waves.theta * u + sines * du;
    const F curvature = (waves.theta * slopes * du - slopes * u) * (T(2) * k) - squares * u * k + sines * d2u;
    const F over_d = first * edge.r, rest = (curvature - over_d) * tau;
    RUNG_UNROLL for (int i = 0; i < 3; i++) dx[i] = second[i] + edge.n[i] * rest + t[i] * over_d;
  }
}

}  // namespace rung
