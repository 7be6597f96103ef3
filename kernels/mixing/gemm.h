// Register-blocked matrix products on lane packs, for many rows and few columns.
// A tile of the result stays in registers: ROWS x PANEL packs, as large as the registers allow.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "lanes.h"

namespace rung {

constexpr int ROWS = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int PANEL = 4;  // 24 sums, 4 packs of B and a broadcast number, of 32 registers
#else
constexpr int PANEL = 2;  // 12 sums, 2 packs of B and a broadcast number, of 16 registers
#endif
template <class T> constexpr int64_t LINE = 64 / sizeof(T);  // numbers in a cache line; divides 16
template <class T> constexpr int64_t COLUMNS = PANEL * WIDTH<T>;

// y[i] = sum_p x[i][p] b[p] + bias for M rows and N packs, added to y if `add`. Row i of x begins at x + x_at[i], that
// of y at y + y_at[i], and the rows of b are `stride` apart. The depth is a multiple of 16; a null bias is 0.
// The next M entries of x_at and y_at are the rows of the next tile: they are brought into the cache.
template <class T, int M, int N>
void tile(int64_t depth, const T* x, const int64_t* x_at, const T* b, int64_t stride, const T* bias, bool add, T* y,
          const int64_t* y_at) {
  Pack<T> sum[M][N];
  RUNG_UNROLL for (int i = 0; i < M; i++)
    RUNG_UNROLL for (int j = 0; j < N; j++) sum[i][j] = bias ? load(bias + j * WIDTH<T>) : Pack<T>{};
  const T* row[M];
  RUNG_UNROLL for (int i = 0; i < M; i++) row[i] = x + x_at[i];
  for (int64_t p = 0; p < depth; p += LINE<T>) {
    RUNG_UNROLL for (int i = 0; i < M; i++) __builtin_prefetch(x + x_at[M + i] + p);
    if (p < N * WIDTH<T>) RUNG_UNROLL for (int i = 0; i < M; i++) __builtin_prefetch(y + y_at[M + i] + p, 1);
#pragma GCC unroll 4
    for (int64_t q = p; q < p + LINE<T>; q++, b += stride) {
      Pack<T> pack[N];
      RUNG_UNROLL for (int j = 0; j < N; j++) pack[j] = load(b + j * WIDTH<T>);
      RUNG_UNROLL for (int i = 0; i < M; i++)
        RUNG_UNROLL for (int j = 0; j < N; j++) sum[i][j] += pack[j] * row[i][q];
    }
  }
  RUNG_UNROLL for (int i = 0; i < M; i++)
    RUNG_UNROLL for (int j = 0; j < N; j++) {
      T* place = y + y_at[i] + j * WIDTH<T>;
      store(place, add ? load(place) + sum[i][j] : sum[i][j]);
    }
}

// out[k] (+)= sum over rows of x[row][k] g[row] for M columns k of x and N packs of g, where row r of x begins at
// x + x_at[r] and that of g at g + g_at[r]. The rows of `out` are `columns` apart. For each row, hint + hint_at[r] is
// brought into the L2 cache.
template <class T, int M, int N>
void weights_tile(int64_t rows, const T* x, const int64_t* x_at, const T* g, const int64_t* g_at, const T* hint,
                  const int64_t* hint_at, bool add, T* out, int64_t columns) {
  Pack<T> sum[M][N] = {};
#pragma GCC unroll 2
  for (int64_t r = 0; r < rows; r++) {
    const T *x_row = x + x_at[r], *g_row = g + g_at[r];
    __builtin_prefetch(hint + hint_at[r], 0, 2);
    Pack<T> pack[N];
    RUNG_UNROLL for (int j = 0; j < N; j++) pack[j] = load(g_row + j * WIDTH<T>);
    RUNG_UNROLL for (int i = 0; i < M; i++)
      RUNG_UNROLL for (int j = 0; j < N; j++) sum[i][j] += pack[j] * x_row[i];
  }
  RUNG_UNROLL for (int i = 0; i < M; i++)
    RUNG_UNROLL for (int j = 0; j < N; j++) {
      T* place = out + i * columns + j * WIDTH<T>;
      store(place, add ? load(place) + sum[i][j] : sum[i][j]);
    }
}

// The tiles by their size: pick<T>(rows, packs) is tile<T, rows, packs>.
template <class T> using Tile = decltype(&tile<T, 1, 1>);
template <class T> using WeightsTile = decltype(&weights_tile<T, 1, 1>);

template <class T, int M = ROWS, int N = PANEL> Tile<T> pick(int rows, int packs) {
  if constexpr (N > 1)
    if (packs < N) return pick<T, M, N - 1>(rows, packs);
  if constexpr (M > 1)
    if (rows < M) return pick<T, M - 1, N>(rows, packs);
  return &tile<T, M, N>;
}

// Tiles of 6 or 4 rows make up any even number but 2.
template <class T, int N = PANEL> WeightsTile<T> pick_weights(int rows, int packs) {
  if constexpr (N > 1)
    if (packs < N) return pick_weights<T, N - 1>(rows, packs);
  return rows < ROWS ? &weights_tile<T, 4, N> : &weights_tile<T, ROWS, N>;
}

}  // namespace rung
