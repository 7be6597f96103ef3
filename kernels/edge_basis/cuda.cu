// The edge basis and its derivatives on a GPU: a thread for each edge, the mathematics in basis.h.
// Macros: RUNG_REAL float or double; RUNG_R, RUNG_L radial functions, l_max.
#include "basis.h"

namespace rung {

using T = RUNG_REAL;
constexpr int R = RUNG_R, LMAX = RUNG_L, L = (LMAX + 1) * (LMAX + 1), THREADS = 128;

// A block's rows of R and L numbers on their way to memory: a thread computes one row, but neighbouring threads store
// neighbouring numbers. The odd pitch keeps a warp's threads on different banks.
constexpr int PITCH = (R + L) | 1;

// Rows [E, K] of an array from column `first` of the tile.
template <int K> RUNG_INLINE void store_rows(const T* tile, int first, long long E, T* array) {
  const long long begin = (long long)blockIdx.x * THREADS;
  const int count = K * (int)(E - begin < THREADS ? E - begin : THREADS);
  for (int k = threadIdx.x; k < count; k += THREADS) array[begin * K + k] = tile[k / K * PITCH + first + k % K];
}

RUNG_INLINE long long edge_of_thread() { return (long long)blockIdx.x * THREADS + threadIdx.x; }

// A row of an array, zero without one.
template <int K> RUNG_INLINE void read_row(const T* array, long long e, T* row) {
  if (array) return load_row<K>(array + e * K, row);
  RUNG_UNROLL for (int k = 0; k < K; k++) row[k] = T(0);
}

}  // namespace rung

using namespace rung;

extern "C" __global__ void __launch_bounds__(THREADS)
    forward(long long E, T cutoff, const T* vectors, T* radial, T* harmonics) {
  __shared__ T tile[THREADS * PITCH];
  const long long e = edge_of_thread();
  if (e < E) {
    T x[3], s[R], Y[L];
    read_row<3>(vectors, e, x);
    edge_basis<R, LMAX, T, T>(x, cutoff, s, Y);
    RUNG_UNROLL for (int n = 0; n < R; n++) tile[threadIdx.x * PITCH + n] = s[n];
    RUNG_UNROLL for (int m = 0; m < L; m++) tile[threadIdx.x * PITCH + R + m] = Y[m];
  }
  __syncthreads();
  store_rows<R>(tile, 0, E, radial);
  store_rows<L>(tile, R, E, harmonics);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    backward(long long E, T cutoff, const T* vectors, const T* g_radial, const T* g_harmonics, T* g_vectors) {
  const long long e = edge_of_thread();
  if (e >= E) return;
  T x[3], g_s[R], g_Y[L], g_x[3];
  read_row<3>(vectors, e, x);
  read_row<R>(g_radial, e, g_s);
  read_row<L>(g_harmonics, e, g_Y);
  edge_basis_backward<R, LMAX, T, T>(x, cutoff, g_s, g_Y, g_x);
  RUNG_UNROLL for (int k = 0; k < 3; k++) g_vectors[e * 3 + k] = g_x[k];
}

extern "C" __global__ void __launch_bounds__(THREADS)
    backward2(long long E, T cutoff, const T* vectors, const T* g_radial, const T* g_harmonics, const T* t,
              T* d_g_radial, T* d_g_harmonics, T* d_vectors) {
  __shared__ T tile[THREADS * PITCH];
  const long long e = edge_of_thread();
  if (e < E) {
    T x[3], t_x[3], g_s[R], g_Y[L], d_s[R], d_Y[L], d_x[3];
    read_row<3>(vectors, e, x);
    read_row<3>(t, e, t_x);
    read_row<R>(d_vectors ? g_radial : nullptr, e, g_s);
    read_row<L>(d_vectors ? g_harmonics : nullptr, e, g_Y);
    edge_basis_backward2<R, LMAX, true, T, T>(x, cutoff, g_s, g_Y, t_x, d_s, d_Y, d_x);
    RUNG_UNROLL for (int n = 0; n < R; n++) tile[threadIdx.x * PITCH + n] = d_s[n];
    RUNG_UNROLL for (int m = 0; m < L; m++) tile[threadIdx.x * PITCH + R + m] = d_Y[m];
    RUNG_UNROLL for (int k = 0; d_vectors && k < 3; k++) d_vectors[e * 3 + k] = d_x[k];
  }
  __syncthreads();
  store_rows<R>(tile, 0, E, d_g_radial);
  store_rows<L>(tile, R, E, d_g_harmonics);
}
