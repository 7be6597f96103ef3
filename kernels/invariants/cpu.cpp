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

// Fetches a part of an array's rows of the next atom while a pack of this one is computed: the processor does not
// foresee the packs' strided access in several arrays. Past the end of the array this does nothing.
template <int ROWS, class T> RUNG_INLINE void fetch_ahead(const T* array, int64_t i, int64_t c, int64_t C) {
  const T* part = array + ((i + 1) * C + c) * ROWS;
  RUNG_UNROLL for (int k = 0; k < ROWS; k++) __builtin_prefetch(part + k * WIDTH<T>);
}

template <class T> void value(int64_t N, int64_t C, int threads, const T* A, T* I) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < N; i++)
    for (int64_t c = 0; c < C; c += WIDTH<T>) {
      const int64_t l = i * L * C + c, k = i * K * C + c;
      fetch_ahead<L>(A, i, c, C), fetch_ahead<K>(I, i, c, C);
      RUNG_NAME(invariants_, RUNG_L)<Pack<T>, T>(Input<T>{A + l, C}, Output<T>{I + k, C});
    }
}

template <class T> void backward(int64_t N, int64_t C, int threads, const T* A, const T* g, T* gA) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < N; i++)
    for (int64_t c = 0; c < C; c += WIDTH<T>) {
      const int64_t l = i * L * C + c, k = i * K * C + c;
      fetch_ahead<L>(A, i, c, C), fetch_ahead<K>(g, i, c, C), fetch_ahead<L>(gA, i, c, C);
      RUNG_NAME(invariants_backward_, RUNG_L)<Pack<T>, T>(Input<T>{A + l, C}, Input<T>{g + k, C}, Output<T>{gA + l, C});
    }
}

template <class T>
void backward2(int64_t N, int64_t C, int threads, const T* A, const T* g, const T* u, T* dg, T* dA) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < N; i++)
    for (int64_t c = 0; c < C; c += WIDTH<T>) {
      const int64_t l = i * L * C + c, k = i * K * C + c;
      fetch_ahead<L>(A, i, c, C), fetch_ahead<K>(g, i, c, C), fetch_ahead<L>(u, i, c, C);
      fetch_ahead<K>(dg, i, c, C), fetch_ahead<L>(dA, i, c, C);
      RUNG_NAME(invariants_backward2_, RUNG_L)<Pack<T>, T>(
          Input<T>{A + l, C}, Input<T>{g + k, C}, Input<T>{u + l, C}, Output<T>{dg + k, C}, Output<T>{dA + l, C});
    }
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
