// The lane pack: what one thread holds of consecutive channels. On a CPU a SIMD vector, on a GPU a small register array.
// The mathematics of an operation is written on packs and needs only +, -, * of packs and of a pack and a number: once
// for both where it is generated, twice in the convolution, whose loops keep other things in registers on a GPU.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__) || defined(RUNG_HOST_FIBERS)
#define RUNG_INLINE __device__ __forceinline__
#ifdef RUNG_HOST_FIBERS
#define RUNG_UNROLL
#define RUNG_UNROLL_4
#else
#define RUNG_UNROLL _Pragma("unroll")
#define RUNG_UNROLL_4 _Pragma("unroll 4")  // for loops over edges: more loads under way at once
#endif

namespace rung {

constexpr int WARP = 32;  // lanes

// V consecutive channels of one lane, moved by one instruction: addresses are multiples of the pack's size.
template <class T, int V> struct alignas(V * sizeof(T)) Lanes {
  T x[V];
};

template <int V, class T> RUNG_INLINE Lanes<T, V> load(const T* p) { return *(const Lanes<T, V>*)p; }
template <class T, int V> RUNG_INLINE void store(T* p, Lanes<T, V> v) { *(Lanes<T, V>*)p = v; }

template <class T, int V> RUNG_INLINE Lanes<T, V> operator+(Lanes<T, V> a, Lanes<T, V> b) {
  RUNG_UNROLL for (int k = 0; k < V; k++) a.x[k] += b.x[k];
  return a;
}
template <class T, int V> RUNG_INLINE Lanes<T, V> operator*(Lanes<T, V> a, Lanes<T, V> b) {
  RUNG_UNROLL for (int k = 0; k < V; k++) a.x[k] *= b.x[k];
  return a;
}
template <class T, int V> RUNG_INLINE Lanes<T, V> operator*(Lanes<T, V> a, T b) {
  RUNG_UNROLL for (int k = 0; k < V; k++) a.x[k] *= b;
  return a;
}
template <class T, int V> RUNG_INLINE void operator+=(Lanes<T, V>& a, Lanes<T, V> b) { a = a + b; }

// Adds the products of two packs' channels to a number.
template <class T, int V> RUNG_INLINE void add_dot(T& sum, Lanes<T, V> a, Lanes<T, V> b) {
  RUNG_UNROLL for (int k = 0; k < V; k++) sum += a.x[k] * b.x[k];
}

// Reads K numbers that every lane needs, by the widest instructions that the alignment of rows of K allows.
template <int K, class T> RUNG_INLINE void load_row(const T* p, T* row) {
  constexpr int WIDEST = 16 / sizeof(T), V = K % WIDEST == 0 ? WIDEST : K % 2 == 0 ? 2 : 1;
  RUNG_UNROLL for (int k = 0; k < K; k += V) {
    const Lanes<T, V> part = load<V>(p + k);
    RUNG_UNROLL for (int i = 0; i < V; i++) row[k + i] = part.x[i];
  }
}

// Sums each of K <= 32 numbers over the lanes of a warp, about K + 4 shuffles instead of 5 K: at each of five steps a
// lane hands half of its numbers to its partner and keeps the other half. Returns the sum number `sum_place<K>(lane)`.
template <int K, int STEP = WARP / 2, class T> RUNG_INLINE T warp_sums(T* v, int lane) {
  static_assert(K <= 2 * STEP, "one sum for each lane");
  constexpr int HALF = (K + 1) / 2;
  const bool upper = lane & STEP;
  RUNG_UNROLL for (int k = 0; k < HALF; k++) {
    const T high = K == 1 ? v[0] : k + HALF < K ? v[k + HALF] : T(0);
    v[k] = (upper ? high : v[k]) + __shfl_xor_sync(~0u, upper ? v[k] : high, STEP);
  }
  if constexpr (STEP > 1) return warp_sums<HALF, STEP / 2>(v, lane);
  return v[0];
}

// Which of the K sums `warp_sums` returns to a lane; -1 for none.
template <int K> RUNG_INLINE int sum_place(int lane) {
  int first = 0, present = K, count = K;  // `count` includes padding, `present` does not
  RUNG_UNROLL for (int step = WARP / 2; step > 0; step /= 2) {
    const int half = (count + 1) / 2;
    const int lower = present < half ? present : half;
    if (lane & step) {
      first += half;
      present -= lower;  // nothing is left where both lanes hold the same sum
    } else {
      present = lower;
    }
    count = half;
  }
  return present > 0 ? first : -1;
}

}  // namespace rung

#else
#define RUNG_INLINE inline __attribute__((always_inline))
#define RUNG_UNROLL _Pragma("GCC unroll 64")

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace rung {

#if defined(__AVX512F__)
constexpr int PACK_BYTES = 64;
#elif defined(__AVX__)
constexpr int PACK_BYTES = 32;
#else
constexpr int PACK_BYTES = 16;
#endif

template <class T> struct PackOf {
  typedef T type __attribute__((vector_size(PACK_BYTES)));
  typedef T unaligned __attribute__((vector_size(PACK_BYTES), aligned(sizeof(T)), may_alias));
};
template <class T> using Pack = typename PackOf<T>::type;
template <class T> constexpr int WIDTH = PACK_BYTES / sizeof(T);  // numbers in a pack; divides 16

template <class T> RUNG_INLINE Pack<T> load(const T* p) { return *(const typename PackOf<T>::unaligned*)p; }
template <class T> RUNG_INLINE void store(T* p, Pack<T> v) { *(typename PackOf<T>::unaligned*)p = v; }

// Reads a pack that several instructions use, here and once: the compiler would make it an operand in memory of each
// of them or read it ahead of a loop that has no register for it.
template <class T> RUNG_INLINE Pack<T> load_once(const T* p) {
  Pack<T> v = load(p);
#if defined(__AVX512F__)
  asm volatile("" : "+v"(v));
#elif defined(__x86_64__)
  asm volatile("" : "+x"(v));
#endif
  return v;
}

// Lanes whose number has the bit STEP become sums of b's, the others of a's: lane i of the result is a[i] + a[i ^
// STEP] or b[i] + b[i ^ STEP]. One blend and one shuffle, where sums of two shuffles would take both from the only
// unit that shuffles.
template <int STEP, class P, int... I> RUNG_INLINE P add_pairs(P a, P b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  const P kept = __builtin_shufflevector(a, b, (I & STEP ? I + int(sizeof...(I)) : I)...);
  const P moved = __builtin_shufflevector(a, b, (I & STEP ? I - STEP + int(sizeof...(I)) : I + STEP)...);
#else
  typedef std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t> Index __attribute__((vector_size(sizeof(P))));
  const P kept = __builtin_shuffle(a, b, Index{(I & STEP ? I + int(sizeof...(I)) : I)...});
  const P moved = __builtin_shuffle(a, b, Index{(I & STEP ? I - STEP + int(sizeof...(I)) : I + STEP)...});
#endif
  return kept + moved;
}

// The sums over the lanes of v[0] ... v[COUNT - 1] in lanes 0 ... COUNT - 1, and again in every further LANES lanes.
// The nearest lanes, of which there are most pairs, come first: their blends do not need the unit that shuffles.
template <class T, int COUNT, int LANES> RUNG_INLINE Pack<T> lane_sums_of_pack(const Pack<T>* v) {
  if constexpr (COUNT <= 0) return Pack<T>{};
  else if constexpr (LANES == 1) return v[0];
  else {
    constexpr int HALF = LANES / 2;
    const Pack<T> lower = lane_sums_of_pack<T, COUNT < HALF ? COUNT : HALF, HALF>(v);
    const Pack<T> upper = lane_sums_of_pack<T, COUNT - HALF, HALF>(v + HALF);
    return add_pairs<HALF>(lower, upper, std::make_integer_sequence<int, WIDTH<T>>{});
  }
}

// out[k] = the sum over the lanes of v[k], for k < K.
template <int K, class T> RUNG_INLINE void lane_sums(const Pack<T>* v, T* out) {
  RUNG_UNROLL for (int k = 0; k + WIDTH<T> <= K; k += WIDTH<T>)
    store(out + k, lane_sums_of_pack<T, WIDTH<T>, WIDTH<T>>(v + k));
  constexpr int REST = K % WIDTH<T>;
  if constexpr (REST > 0) {
    const Pack<T> sums = lane_sums_of_pack<T, REST, WIDTH<T>>(v + K - REST);
    std::memcpy(out + K - REST, &sums, REST * sizeof(T));
  }
}

}  // namespace rung
#endif
