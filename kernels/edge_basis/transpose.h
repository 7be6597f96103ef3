// Between rows in memory (the numbers of one edge side by side) and packs (one number of consecutive edges).
#pragma once
#include <cstring>
#include <utility>

#include "lanes.h"

namespace rung {

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define RUNG_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef RUNG_SHUFFLE  // g++ before 12
template <class T> struct Mask;
template <> struct Mask<float> { typedef int32_t type __attribute__((vector_size(PACK_BYTES))); };
template <> struct Mask<double> { typedef int64_t type __attribute__((vector_size(PACK_BYTES))); };
#define RUNG_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, typename Mask<T>::type{__VA_ARGS__})
#endif

// A pack of the lanes number expression(0), expression(1), ... of a followed by b.
#define RUNG_PICK(name, expression)                                                                              \
  template <class T, int... j> RUNG_INLINE Pack<T> name(Pack<T> a, Pack<T> b, std::integer_sequence<int, j...>) { \
    [[maybe_unused]] constexpr int W = WIDTH<T>;                                                                  \
    return RUNG_SHUFFLE(a, b, (expression)...);                                                                   \
  }
RUNG_PICK(zip_low, (j % 2 ? W : 0) + j / 2)
RUNG_PICK(zip_high, (j % 2 ? W : 0) + W / 2 + j / 2)
RUNG_PICK(evens, 2 * j)
RUNG_PICK(odds, 2 * j + 1)
#undef RUNG_PICK

template <class T> using Order = std::make_integer_sequence<int, WIDTH<T>>;

constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

// P packs, P a power of two, become the same numbers with the pack index varying fastest: each step moves the highest
// bit of a number's place to the lowest.
template <class T, int P> RUNG_INLINE void interleave(Pack<T>* packs) {
  RUNG_UNROLL for (int step = 1; step < P; step *= 2) {
    Pack<T> from[P];
    RUNG_UNROLL for (int k = 0; k < P; k++) from[k] = packs[k];
    RUNG_UNROLL for (int k = 0; k < P / 2; k++) {
      packs[2 * k] = zip_low<T>(from[k], from[k + P / 2], Order<T>());
      packs[2 * k + 1] = zip_high<T>(from[k], from[k + P / 2], Order<T>());
    }
  }
}

// The inverse.
template <class T, int P> RUNG_INLINE void separate(Pack<T>* packs) {
  RUNG_UNROLL for (int step = 1; step < P; step *= 2) {
    Pack<T> from[P];
    RUNG_UNROLL for (int k = 0; k < P; k++) from[k] = packs[k];
    RUNG_UNROLL for (int k = 0; k < P / 2; k++) {
      packs[k] = evens<T>(from[2 * k], from[2 * k + 1], Order<T>());
      packs[k + P / 2] = odds<T>(from[2 * k], from[2 * k + 1], Order<T>());
    }
  }
}

// A pack of edges' rows of N numbers -> N packs.
template <int N, class T> RUNG_INLINE void load_rows(const T* rows, Pack<T>* packs) {
  constexpr int P = power_of_two(N), W = WIDTH<T>;
  Pack<T> work[P];
  alignas(PACK_BYTES) T padded[W * P];
  if (N < P) {
    RUNG_UNROLL for (int e = 0; e < W; e++) std::memcpy(padded + e * P, rows + e * N, N * sizeof(T));
    rows = padded;
  }
  RUNG_UNROLL for (int k = 0; k < P; k++) work[k] = load(rows + k * W);
  separate<T, P>(work);
  RUNG_UNROLL for (int k = 0; k < N; k++) packs[k] = work[k];
}

// N packs -> a pack of edges' rows of N numbers.
template <int N, class T> RUNG_INLINE void store_rows(T* rows, const Pack<T>* packs) {
  constexpr int P = power_of_two(N), W = WIDTH<T>;
  Pack<T> work[P];
  RUNG_UNROLL for (int k = 0; k < P; k++) work[k] = packs[k < N ? k : 0];
  interleave<T, P>(work);
  if (N == P) {
    RUNG_UNROLL for (int k = 0; k < P; k++) store(rows + k * W, work[k]);
    return;
  }
  alignas(PACK_BYTES) T padded[W * P];
  RUNG_UNROLL for (int k = 0; k < P; k++) store(padded + k * W, work[k]);
  RUNG_UNROLL for (int e = 0; e < W; e++) std::memcpy(rows + e * N, padded + e * P, N * sizeof(T));
}

}  // namespace rung
