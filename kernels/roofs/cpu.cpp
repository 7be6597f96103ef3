// The rate of fused multiply-adds of one core, on registers only.
#include "lanes.h"

using namespace rung;

template <class T> static double multiply_add(int64_t repetitions) {
  // 2 units of 4-5 cycles' latency need 10 chains; 12 fit AVX2's 16 registers.
  constexpr int CHAINS = 12;
  Pack<T> chain[CHAINS], factor, term;
  for (int k = 0; k < WIDTH<T>; k++) factor[k] = T(0.999), term[k] = T(0.001);
  for (int c = 0; c < CHAINS; c++) chain[c] = term;
  for (int64_t r = 0; r < repetitions; r++) {
    RUNG_UNROLL for (int c = 0; c < CHAINS; c++) chain[c] = chain[c] * factor + term;
  }
  T sum = 0;
  for (int c = 0; c < CHAINS; c++)
    for (int k = 0; k < WIDTH<T>; k++) sum += chain[c][k];
  return sum;
}

// Write the number of multiplications and additions that were done, and a result that depends on all of them.
#define RUNG_ROOF(suffix, T)                                                                   \
  extern "C" void rung_multiply_add##suffix(int64_t repetitions, int threads, double* flops, double* result) { \
    *result = multiply_add<T>(repetitions);                                                    \
    *flops = 2.0 * 12 * WIDTH<T> * repetitions;                                                \
  }
RUNG_ROOF(_f32, float)
RUNG_ROOF(_f64, double)
