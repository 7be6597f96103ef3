// The invariants and their derivatives on a GPU: a thread for each atom and channel, the polynomials in generated.h.
// Macros: RUNG_REAL float or double; RUNG_C, RUNG_L, RUNG_K channels, l_max, invariants.
#include "lanes.h"
#include "generated.h"

namespace rung {

using T = RUNG_REAL;
constexpr int C = RUNG_C, L = (RUNG_L + 1) * (RUNG_L + 1), K = RUNG_K, THREADS = 128;

#define RUNG_JOIN(name, l_max) name##l_max
#define RUNG_NAME(name, l_max) RUNG_JOIN(name, l_max)

// One channel of one atom; the channels of neighbouring threads lie side by side.
struct Place {
  long long atom;
  int channel;
  bool exists;

  RUNG_INLINE explicit Place(long long N) {
    const long long thread = (long long)blockIdx.x * THREADS + threadIdx.x;
    atom = thread / C;
    channel = thread % C;
    exists = atom < N;
  }
  template <int ROWS> RUNG_INLINE void read(const T* array, T* values) const {
    RUNG_UNROLL for (int k = 0; k < ROWS; k++) values[k] = array[(atom * ROWS + k) * C + channel];
  }
  template <int ROWS> RUNG_INLINE void write(T* array, const T* values) const {
    RUNG_UNROLL for (int k = 0; k < ROWS; k++) array[(atom * ROWS + k) * C + channel] = values[k];
  }
};

}  // namespace rung

using namespace rung;

extern "C" __global__ void __launch_bounds__(THREADS) forward(long long N, const T* A, T* values) {
  const Place place(N);
  if (!place.exists) return;
  T a[L], v[K];
  place.read<L>(A, a);
  RUNG_NAME(invariants_, RUNG_L)<T, T>(a, v);
  place.write<K>(values, v);
}

extern "C" __global__ void __launch_bounds__(THREADS) backward(long long N, const T* A, const T* g, T* gA) {
  const Place place(N);
  if (!place.exists) return;
  T a[L], cotangent[K], result[L];
  place.read<L>(A, a);
  place.read<K>(g, cotangent);
  RUNG_NAME(invariants_backward_, RUNG_L)<T, T>(a, cotangent, result);
  place.write<L>(gA, result);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    backward2(long long N, const T* A, const T* g, const T* u, T* dg, T* dA) {
  const Place place(N);
  if (!place.exists) return;
  T a[L], cotangent[K], moved[L], d_cotangent[K], d_a[L];
  place.read<L>(A, a);
  place.read<K>(g, cotangent);
  place.read<L>(u, moved);
  RUNG_NAME(invariants_backward2_, RUNG_L)<T, T>(a, cotangent, moved, d_cotangent, d_a);
  place.write<K>(dg, d_cotangent);
  place.write<L>(dA, d_a);
}
