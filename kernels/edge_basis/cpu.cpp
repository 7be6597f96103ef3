// The edge basis and its derivatives on the CPU: packs of edges, the mathematics in basis.h.
// Macros: RUNG_R radial functions, RUNG_L l_max from 1 to 3.
#include <algorithm>

#include "basis.h"
#include "transpose.h"

namespace rung {
namespace {

constexpr int R = RUNG_R, LMAX = RUNG_L, L = (LMAX + 1) * (LMAX + 1);

// Room for the rows of one array in the last, incomplete pack.
template <int N, class T> struct Rows {
  alignas(PACK_BYTES) T numbers[WIDTH<T> * N];

  // Where to read the pack at edge e from; numbers past the last edge are one.
  const T* read(const T* array, int64_t e, int64_t count) {
    if (count >= WIDTH<T>) return array + e * N;
    std::fill(numbers, numbers + WIDTH<T> * N, T(1));
    std::copy(array + e * N, array + (e + count) * N, numbers);
    return numbers;
  }
  void write(T* array, int64_t e, int64_t count, const Pack<T>* packs) {
    if (count >= WIDTH<T>) return store_rows<N, T>(array + e * N, packs);
    store_rows<N, T>(numbers, packs);
    std::copy(numbers, numbers + count * N, array + e * N);
  }
};

// The N packs of an array at edge e, zero without an array.
template <int N, class T> struct Packs {
  Pack<T> packs[N];
  RUNG_INLINE Packs() {}
  RUNG_INLINE Packs(const T* array, int64_t e, int64_t count) {
    Rows<N, T> rows;
    if (array) {
      load_rows<N, T>(rows.read(array, e, count), packs);
    } else {
      RUNG_UNROLL for (int k = 0; k < N; k++) packs[k] = Pack<T>{};
    }
  }
  RUNG_INLINE void write(T* array, int64_t e, int64_t count) const {
    Rows<N, T> rows;
    rows.write(array, e, count, packs);
  }
};

// Calls function(first edge, edges that are left) for every pack.
template <class T, class Function> void each_pack(int64_t E, int threads, Function function) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t e = 0; e < E; e += WIDTH<T>) function(e, E - e);
}

template <class T> void value(int64_t E, T cutoff, int threads, const T* vectors, T* radial, T* harmonics) {
  each_pack<T>(E, threads, [=](int64_t e, int64_t count) {
    const Packs<3, T> x(vectors, e, count);
    Packs<R, T> s;
    Packs<L, T> Y;
    edge_basis<R, LMAX, Pack<T>, T>(x.packs, cutoff, s.packs, Y.packs);
    s.write(radial, e, count);
    Y.write(harmonics, e, count);
  });
}

template <class T>
void backward(
    int64_t E, T cutoff, int threads, const T* vectors, const T* g_radial, const T* g_harmonics, T* g_vectors) {
  each_pack<T>(E, threads, [=](int64_t e, int64_t count) {
    const Packs<3, T> x(vectors, e, count);
    const Packs<R, T> g_s(g_radial, e, count);
    const Packs<L, T> g_Y(g_harmonics, e, count);
    Packs<3, T> g_x;
    edge_basis_backward<R, LMAX, Pack<T>, T>(x.packs, cutoff, g_s.packs, g_Y.packs, g_x.packs);
    g_x.write(g_vectors, e, count);
  });
}

template <bool VECTORS, class T>
void backward2(int64_t E, T cutoff, int threads, const T* vectors, const T* g_radial, const T* g_harmonics, const T* t,
               T* d_g_radial, T* d_g_harmonics, T* d_vectors) {
  each_pack<T>(E, threads, [=](int64_t e, int64_t count) {
    const Packs<3, T> x(vectors, e, count), t_x(t, e, count);
    const Packs<R, T> g_s(VECTORS ? g_radial : nullptr, e, count);
    const Packs<L, T> g_Y(VECTORS ? g_harmonics : nullptr, e, count);
    Packs<R, T> d_s;
    Packs<L, T> d_Y;
    Packs<3, T> d_x;
    edge_basis_backward2<R, LMAX, VECTORS, Pack<T>, T>(
        x.packs, cutoff, g_s.packs, g_Y.packs, t_x.packs, d_s.packs, d_Y.packs, d_x.packs);
    d_s.write(d_g_radial, e, count);
    d_Y.write(d_g_harmonics, e, count);
    if constexpr (VECTORS) d_x.write(d_vectors, e, count);
  });
}

}  // namespace
}  // namespace rung

#define RUNG_FUNCTIONS(suffix, T)                                                                                    \
  void rung_edge_basis##suffix(int64_t E, T cutoff, int threads, const T* vectors, T* radial, T* harmonics) {        \
    rung::value(E, cutoff, threads, vectors, radial, harmonics);                                                     \
  }                                                                                                                  \
  void rung_edge_basis_backward##suffix(int64_t E, T cutoff, int threads, const T* vectors, const T* g_radial,       \
                                        const T* g_harmonics, T* g_vectors) {                                        \
    rung::backward(E, cutoff, threads, vectors, g_radial, g_harmonics, g_vectors);                                   \
  }                                                                                                                  \
  void rung_edge_basis_backward2##suffix(int64_t E, T cutoff, int threads, const T* vectors, const T* g_radial,      \
                                         const T* g_harmonics, const T* t, T* d_g_radial, T* d_g_harmonics,          \
                                         T* d_vectors) {                                                             \
    auto function = d_vectors ? rung::backward2<true, T> : rung::backward2<false, T>;                                \
    function(E, cutoff, threads, vectors, g_radial, g_harmonics, t, d_g_radial, d_g_harmonics, d_vectors);           \
  }

extern "C" {
RUNG_FUNCTIONS(_f32, float)
RUNG_FUNCTIONS(_f64, double)
}
