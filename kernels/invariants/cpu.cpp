// The invariants and their derivatives on the CPU: packs of channels, the polynomials in generated.h.
// Macro: RUNG_L, l_max from 1 to 3.
#include "generated.h"

namespace rung {
namespace {

#define RUNG_JOIN(name, l_max) name##l_max
#define RUNG_NAME(name, l_max) RUNG_JOIN(name, l_max)

constexpr int L = (RUNG_L + 1) * (RUNG_L + 1), K = RUNG_L == 1 ? 2 : RUNG_L == 2 ? 6 : 14;

// A pack of channels in every row of an atom, read and written where the generated code indexes it.
template <class T> struct Input {
  const T* start;
  int64_t C;
  RUNG_INLINE Pack<T> operator[](int row) const { return load(start + row * C); }
};

template <class T> struct Element {
  T* place;
  RUNG_INLINE void operator=(Pack<T> value) const { store(place, value); }
};

template <class T> struct Output {
  T* start;
  int64_t C;
  RUNG_INLINE Element<T> operator[](int row) const { return {start + row * C}; }
};

// Calls function(atom, first channel) for every pack.
template <class T, class Function> void each_pack(int64_t N, int64_t C, int threads, Function function) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < N; i++)
    for (int64_t c = 0; c < C; c += WIDTH<T>) function(i, c);
}

template <class T> void value(int64_t N, int64_t C, int threads, const T* A, T* I) {
  each_pack<T>(N, C, threads, [=](int64_t i, int64_t c) {
    RUNG_NAME(invariants_, RUNG_L)<Pack<T>, T>(Input<T>{A + i * L * C + c, C}, Output<T>{I + i * K * C + c, C});
  });
}

template <class T> void backward(int64_t N, int64_t C, int threads, const T* A, const T* g, T* gA) {
  each_pack<T>(N, C, threads, [=](int64_t i, int64_t c) {
    const int64_t l = i * L * C + c, k = i * K * C + c;
    RUNG_NAME(invariants_backward_, RUNG_L)<Pack<T>, T>(Input<T>{A + l, C}, Input<T>{g + k, C}, Output<T>{gA + l, C});
  });
}

template <class T>
void backward2(int64_t N, int64_t C, int threads, const T* A, const T* g, const T* u, T* dg, T* dA) {
  each_pack<T>(N, C, threads, [=](int64_t i, int64_t c) {
    const int64_t l = i * L * C + c, k = i * K * C + c;
    RUNG_NAME(invariants_backward2_, RUNG_L)<Pack<T>, T>(
        Input<T>{A + l, C}, Input<T>{g + k, C}, Input<T>{u + l, C}, Output<T>{dg + k, C}, Output<T>{dA + l, C});
  });
}

}  // namespace
}  // namespace rung

#define RUNG_FUNCTIONS(suffix, T)                                                                                \
  void rung_invariants##suffix(int64_t N, int64_t C, int threads, const T* A, T* I) {                            \
    rung::value(N, C, threads, A, I);                                                                            \
  }                                                                                                              \
  void rung_invariants_backward##suffix(int64_t N, int64_t C, int threads, const T* A, const T* g, T* gA) {      \
    rung::backward(N, C, threads, A, g, gA);                                                                     \
  }                                                                                                              \
  void rung_invariants_backward2##suffix(int64_t N, int64_t C, int threads, const T* A, const T* g, const T* u,  \
                                         T* dg, T* dA) {                                                         \
    rung::backward2(N, C, threads, A, g, u, dg, dA);                                                             \
  }

extern "C" {
RUNG_FUNCTIONS(_f32, float)
RUNG_FUNCTIONS(_f64, double)
}
