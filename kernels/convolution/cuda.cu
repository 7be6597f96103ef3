// The convolution and its first and second derivatives on a GPU; reference.py is the definition. For an edge i <- j
// with scalars s and harmonics Y, features x and vectors w of j, and the cotangent B of A[i]:
//
//   u = sum_k Y_1k w_k / sqrt(3),  R0_l, R1_l, R2 = sum_n (weights_nl, axial_nl, identity_n) s_n,  q_l = sum_m Y_m B_m
//   A_m = sum_edges P_l Y_m + [l = 1] R2 w_m,  P_l = R0_l x + R1_l u
//
// psi = sum_l P_l q_l + R2 sum_k w_k B_1k is linear in s, in Y, in the Y_1 of u, in (x, w), in B and in the weights.
// `backward` is its gradient, `backward2` the gradient of its derivative along the cotangents (ts, tY, tx, tw).
//
// A warp has a receiver or a share of them and 32 V channels; it keeps its sums in registers and no other warp adds to
// them: no atomics, no shared memory, no barriers, and results are bitwise repeatable. Sums over the edges of a sender
// go through one row for each edge (sum_rows). The caller sums over channel blocks and over shares of receivers.
//
// Macros: RUNG_REAL float or double; RUNG_C, RUNG_R, RUNG_L channels, radial functions, l_max; RUNG_VECTORS 0 or 1;
// RUNG_WIDE, RUNG_MIDDLE, RUNG_NARROW the channels V of a lane, the fewer the more registers a kernel needs for each.
#include "degrees.cuh"
#include "gradients.cuh"

namespace rung {

// As many edges as leave room in the registers.
constexpr bool CROWDED = sizeof(T) == 8 || (VECTORS && R > 8);
constexpr int BATCH = CROWDED ? 1 : VECTORS ? 2 : 4, BATCH2 = CROWDED ? 1 : 2;
// Warps of backward_basis that a multiprocessor should hold, 0 for as many as the compiler finds best: it spills where
// it aims for more than these.
constexpr int RESIDENT = RUNG_WIDE < 4 ? 0 : VECTORS || R > 8 ? 8 : 10;

// A block has a share of the receivers and, in its outputs, a place of its own; each warp has one degree.
template <bool SECOND>
RUNG_INLINE void sum_all_weights(const Inputs& in, const Cotangents& t, long long N, const T* gA, T* weights, T* axial,
                                 T* identity) {
  constexpr int V = RUNG_MIDDLE;
  const long long block = blockIdx.x, size = R * DEGREES * C;
  const Receivers all = {N * block / gridDim.x, N * (block + 1) / gridDim.x, gA};
  weights += block * size;
  if (VECTORS) axial += block * size;
  const int l = threadIdx.x / WARP;
  if (l == 0) return sum_weights<SECOND, 0, V>(in, t, all, weights, axial);
  if (l == 1) return sum_weights<SECOND, 1, V>(in, t, all, weights, axial);
  if constexpr (DEGREES > 2) if (l == 2) return sum_weights<SECOND, 2, V>(in, t, all, weights, axial);
  if constexpr (DEGREES > 3) if (l == 3) return sum_weights<SECOND, 3, V>(in, t, all, weights, axial);
  if constexpr (VECTORS) sum_identity<SECOND, V>(in, t, all, identity + block * R * C);
}

}  // namespace rung

using namespace rung;

// Grid (receivers, channel blocks); a warp for each degree.
extern "C" __global__ void __launch_bounds__(WARP * DEGREES) forward(Inputs in, T* A) {
  constexpr int V = RUNG_MIDDLE;
  const int l = threadIdx.x / WARP;
  if (l == 0) return sum_messages<0, V>(in, blockIdx.x, A);
  if (l == 1) return sum_messages<1, V>(in, blockIdx.x, A);
  if constexpr (DEGREES > 2) if (l == 2) return sum_messages<2, V>(in, blockIdx.x, A);
  if constexpr (DEGREES > 3) if (l == 3) return sum_messages<3, V>(in, blockIdx.x, A);
}

// Grid (receivers, channel blocks, parts of a receiver's edges); one warp, so that a long row holds up no other.
extern "C" __global__ void __launch_bounds__(WARP, RESIDENT)
    backward_basis(Inputs in, long long E, const T* gA, Outputs out) {
  out.enter_channel_block(E);
  Gradients<true, RUNG_WIDE, 1>::run(in, gA, blockIdx.x, out);
}

extern "C" __global__ void __launch_bounds__(WARP)
    backward_rows(Inputs in, const T* gA, Outputs out) {
  Gradients<false, RUNG_NARROW, BATCH>::run(in, gA, blockIdx.x, out);
}

// Grid (receivers, channel blocks).
extern "C" __global__ void __launch_bounds__(WARP)
    backward2_basis(Inputs in, Cotangents t, long long E, const T* gA, T* d_gA, Outputs out) {
  out.enter_channel_block(E);
  Gradients2<true, RUNG_NARROW, 1>::run(in, t, gA, blockIdx.x, d_gA, out);
}

extern "C" __global__ void __launch_bounds__(WARP)
    backward2_rows(Inputs in, Cotangents t, const T* gA, T* d_gA, Outputs out) {
  Gradients2<false, RUNG_NARROW, BATCH2>::run(in, t, gA, blockIdx.x, d_gA, out);
}

// Grid (shares of the receivers, channel blocks); a warp for each degree, with vectors one for the identity weights.
extern "C" __global__ void __launch_bounds__(WARP * (DEGREES + VECTORS))
    backward_weights(Inputs in, long long N, const T* gA, T* weights, T* axial, T* identity) {
  sum_all_weights<false>(in, Cotangents{}, N, gA, weights, axial, identity);
}

extern "C" __global__ void __launch_bounds__(WARP * (DEGREES + VECTORS))
    backward2_weights(Inputs in, Cotangents t, long long N, const T* gA, T* weights, T* axial, T* identity) {
  sum_all_weights<true>(in, t, N, gA, weights, axial, identity);
}

// sums[j] = sum of the rows [E, width] of the edges that leave j, which are the reverses of those that arrive.
extern "C" __global__ void __launch_bounds__(128)
    sum_rows(long long N, long long width, const int* row_ptr, const int* reverse, const T* rows, T* sums) {
  constexpr int V = 16 / sizeof(T);
  const long long packs = width / V, thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  const long long atom = thread / packs, first = thread % packs * V;
  if (atom >= N) return;
  Lanes<T, V> sum = {};
  const int end = row_ptr[atom + 1];
  RUNG_UNROLL_4 for (int e = row_ptr[atom]; e < end; e++) sum += load<V>(rows + reverse[e] * width + first);
  store(sums + atom * width + first, sum);
}
