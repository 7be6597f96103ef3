// Dense products with small matrices: y = x w, its transpose and the weight gradient x^T g, for the rows of a matrix or
// for the harmonics of each degree with the matrix of that degree (mixing).
// The arithmetic of a row of y does not depend on the number of threads; a weight gradient sums the threads' parts.

#include <cstdlib>
#include <cstring>
#include <memory>

#include "gemm.h"

namespace rung {
namespace {

constexpr int64_t DEPTH = 128;        // rows of B in a panel: 32 KB at most, which every tile reads from the L1 cache
constexpr int64_t CHUNK = 192;        // rows of x and y that stay in the L2 cache while they meet all of B
constexpr int64_t FEW = 48;           // rows that are not worth packing B for
constexpr int64_t SUM_ROWS = 64;      // most rows summed in registers before they are added to the sum: accuracy, L1
constexpr int64_t SUM_COLUMNS = 256;  // columns of x at a time: their sums stay in the L2 cache

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T> struct Buffer {
  T* data = nullptr;
  explicit Buffer(int64_t size) {
    if (size > 0 && posix_memalign((void**)&data, 64, size * sizeof(T))) std::abort();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// The rows of a factor: groups, `stride` numbers apart, of `width` rows that follow each other. The groups of a plain
// matrix are its rows; the harmonics of degree l are one group of 2l + 1 rows for each atom.
struct Rows {
  int64_t width, length, stride;

  // Write where the `size` rows from the beginning of a group begin.
  void offsets(int64_t group, int64_t size, int64_t* at) const {
    for (int64_t place = group * stride, i = 0; i < size; place += stride)
      for (int64_t within = 0; within < width && i < size; within++) at[i++] = place + within * length;
  }
};

// One of the products that a call computes side by side, one for each degree.
template <class T> struct Product {
  Rows x_rows, y_rows;
  const T *x, *w;
  T* y;
};

// B [K, C] as the tiles read it: packed, it consists of blocks of DEPTH rows, in each panels of COLUMNS columns.
template <class T> struct Matrix {
  const T* data;
  int64_t K, C;
  bool packed;

  int64_t depth(int64_t p) const { return std::min(DEPTH, K - p); }
  int64_t columns(int64_t c) const { return std::min(COLUMNS<T>, C - c); }
  int64_t start(int64_t p, int64_t c) const { return p * C + (packed ? c * depth(p) : c); }
  int64_t stride(int64_t c) const { return packed ? columns(c) : C; }
};

// Pack one panel of w, or of the transpose of w.
template <class T> void pack_panel(const T* w, bool transposed, const Matrix<T>& B, int64_t p0, int64_t c0, T* out) {
  const int64_t depth = B.depth(p0), columns = B.columns(c0);
  if (!transposed)
    for (int64_t p = 0; p < depth; p++) std::memcpy(out + p * columns, w + (p0 + p) * B.C + c0, columns * sizeof(T));
  else
    for (int64_t c = 0; c < columns; c += WIDTH<T>)  // so few lines of w at a time that they stay in the L1 cache
      for (int64_t p = 0; p < depth; p++) {
        const T* column = w + (c0 + c) * B.K + p0 + p;
        RUNG_UNROLL for (int i = 0; i < WIDTH<T>; i++) out[p * columns + c + i] = column[i * B.K];
      }
}

// y = x B + bias for some groups of rows, CHUNK rows at most.
template <class T>
void multiply(const Product<T>& product, int64_t first, int64_t groups, const Matrix<T>& B, const T* bias) {
  const int64_t num_rows = groups * product.x_rows.width;
  int64_t x_at[CHUNK + ROWS], y_at[CHUNK + ROWS];
  product.x_rows.offsets(first, num_rows + ROWS, x_at);
  product.y_rows.offsets(first, num_rows + ROWS, y_at);
  for (int64_t p = 0; p < B.K; p += DEPTH)
    for (int64_t c = 0; c < B.C; c += COLUMNS<T>) {
      const T *panel = B.data + B.start(p, c), *start = bias && p == 0 ? bias + c : nullptr;
      const int packs = B.columns(c) / WIDTH<T>;
      for (int64_t row = 0; row < num_rows; row += ROWS) {
        const auto run = pick<T>(std::min<int64_t>(ROWS, num_rows - row), packs);
        run(B.depth(p), product.x + p, x_at + row, panel, B.stride(c), start, p > 0, product.y + c, y_at + row);
      }
    }
}

// y = x w + bias of some products with w [K, C], or x w^T with w [C, K] if `transposed`, for all groups of rows.
template <class T>
void multiply_all(int count, const Product<T>* products, int64_t groups, int64_t K, int64_t C, bool transposed,
                  const T* bias, int threads) {
  if (groups == 0 || C == 0) return;
  const int64_t widest = products[count - 1].x_rows.width;
  // Of all products together CHUNK rows, fewer if that leaves threads idle; whole tiles.
  const int64_t most = std::max<int64_t>(1, std::min(CHUNK / (count * (widest + 1) / 2), ceil_div(groups, threads)));
  const int64_t size = ceil_div(most, ROWS) * ROWS, chunks = ceil_div(groups, size);
  const bool packed = transposed || groups * widest > FEW;
  const int64_t panels = ceil_div(C, COLUMNS<T>), blocks = ceil_div(K, DEPTH);
  Buffer<T> buffer(packed ? count * K * C : 0);
#pragma omp parallel num_threads(std::min<int64_t>(threads, chunks))
  {
    if (packed) {
#pragma omp for schedule(static)
      for (int64_t item = 0; item < count * blocks * panels; item++) {
        const int64_t i = item / (blocks * panels), p = item / panels % blocks * DEPTH, c = item % panels * COLUMNS<T>;
        const Matrix<T> B = {nullptr, K, C, true};
        pack_panel(products[i].w, transposed, B, p, c, buffer.data + i * K * C + B.start(p, c));
      }
    }
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++)
      for (int i = 0; i < count; i++) {
        const Matrix<T> B = {packed ? buffer.data + i * K * C : products[i].w, K, C, packed};
        multiply(products[i], chunk * size, std::min(size, groups - chunk * size), B, bias);
      }
  }
}

// y [K, C] += x^T w over some groups of rows, for the columns k0 .. k1 of x; the first time, y is set.
template <class T>
void multiply_weights(const Product<T>& product, int64_t first, int64_t groups, int64_t k0, int64_t k1, int64_t C,
                      bool add, T* y) {
  const int64_t num_rows = groups * product.x_rows.width;
  int64_t x_at[SUM_ROWS], w_at[SUM_ROWS];
  product.x_rows.offsets(first, num_rows, x_at);
  product.y_rows.offsets(first, num_rows, w_at);
  // The next rows of x, then those of w, are brought into the cache meanwhile, one line of each by every tile.
  const T* next_x = product.x + groups * product.x_rows.stride;
  const T* next_w = product.w + groups * product.y_rows.stride;
  for (int64_t c = 0; c < C; c += COLUMNS<T>) {
    const int64_t end = std::min(c + COLUMNS<T>, C);
    int64_t x_hint = c == 0 ? k0 : k1, w_hint = c;
    for (int64_t k = k0; k < k1;) {
      const int columns = k1 - k == 4 || k1 - k == 8 ? 4 : ROWS;
      const bool of_x = x_hint < k1;
      const T* hint = of_x ? next_x + x_hint : next_w + std::min(w_hint, end - 1);
      const auto run = pick_weights<T>(columns, (end - c) / WIDTH<T>);
      run(num_rows, product.x + k, x_at, product.w + c, w_at, hint, of_x ? x_at : w_at, add, y + k * C + c, C);
      (of_x ? x_hint : w_hint) += LINE<T>;
      k += columns;
    }
  }
}

// y [K, C] = x^T w of some products, where w has the rows y_rows, over all groups of rows.
template <class T>
void weights_all(int count, const Product<T>* products, int64_t groups, int64_t K, int64_t C, int threads) {
  const int64_t size = SUM_ROWS / products[count - 1].x_rows.width;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, ceil_div(groups, size)));
  Buffer<T> buffer((parts - 1) * count * K * C);
#pragma omp parallel num_threads(parts)
  {
#pragma omp for schedule(static, 1)
    for (int64_t part = 0; part < parts; part++) {
      const int64_t begin = groups * part / parts, end = groups * (part + 1) / parts;
      for (int64_t k = 0; k < K; k += SUM_COLUMNS)
        for (int64_t group = begin; group < end; group += size)
          for (int i = 0; i < count; i++) {
            T* sum = part ? buffer.data + ((part - 1) * count + i) * K * C : products[i].y;
            multiply_weights(products[i], group, std::min(size, end - group), k, std::min(k + SUM_COLUMNS, K), C,
                             group > begin, sum);
          }
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < count * K; row++) {
      T* sum = products[row / K].y + row % K * C;
      if (groups == 0) std::fill_n(sum, C, T(0));
      for (int64_t part = 1; part < parts; part++) {
        const T* other = buffer.data + ((part - 1) * count * K + row) * C;
        for (int64_t c = 0; c < C; c++) sum[c] += other[c];
      }
    }
  }
}

template <class T> Product<T> product(int64_t K, int64_t C, const T* x, const T* w, T* y) {
  return {{1, K, K}, {1, C, C}, x, w, y};
}

// Make the products of all degrees of x [N, L, C] with w [l, C, C] or [N, L, C] and y the other of both.
template <class T>
void by_degree(int64_t C, int l_max, const T* x, const T* w, bool weights, T* y, Product<T>* products) {
  const int64_t L = (l_max + 1) * (l_max + 1);
  for (int64_t l = 0; l <= l_max; l++) {
    const Rows rows = {2 * l + 1, C, L * C};
    const int64_t harmonics = l * l * C, matrix = l * C * C;
    products[l] = {rows, rows, x + harmonics, w + (weights ? harmonics : matrix), y + (weights ? matrix : harmonics)};
  }
}

constexpr int MAX_DEGREES = 8;  // l_max 7: more than the operations take

template <class T>
void mix(int64_t N, int64_t C, int l_max, int threads, const T* A, const T* weights, bool transposed, T* out) {
  Product<T> products[MAX_DEGREES];
  by_degree(C, l_max, A, weights, false, out, products);
  multiply_all<T>(l_max + 1, products, N, C, C, transposed, nullptr, threads);
}

template <class T> void mix_weights(int64_t N, int64_t C, int l_max, int threads, const T* A, const T* g, T* out) {
  Product<T> products[MAX_DEGREES];
  by_degree(C, l_max, A, g, true, out, products);
  weights_all(l_max + 1, products, N, C, C, threads);
}

}  // namespace
}  // namespace rung

#define RUNG_FUNCTIONS(T, suffix)                                                                                     \
  void rung_matmul_##suffix(int64_t M, int64_t K, int64_t C, int threads, const T* x, const T* w, const T* bias,     \
                            T* y) {                                                                                  \
    const auto product = rung::product(K, C, x, w, y);                                                               \
    rung::multiply_all(1, &product, M, K, C, false, bias, threads);                                                  \
  }                                                                                                                  \
  void rung_matmul_transposed_##suffix(int64_t M, int64_t K, int64_t C, int threads, const T* g, const T* w,         \
                                       T* gx) {                                                                      \
    const auto product = rung::product(C, K, g, w, gx);                                                              \
    rung::multiply_all<T>(1, &product, M, C, K, true, nullptr, threads);                                             \
  }                                                                                                                  \
  void rung_matmul_weights_##suffix(int64_t M, int64_t K, int64_t C, int threads, const T* x, const T* g, T* gw) {   \
    const auto product = rung::product(K, C, x, g, gw);                                                              \
    rung::weights_all(1, &product, M, K, C, threads);                                                                \
  }                                                                                                                  \
  void rung_mix_##suffix(int64_t N, int64_t C, int l_max, int threads, const T* A, const T* M, int transposed,       \
                         T* out) {                                                                                   \
    rung::mix(N, C, l_max, threads, A, M, transposed, out);                                                          \
  }                                                                                                                  \
  void rung_mix_weights_##suffix(int64_t N, int64_t C, int l_max, int threads, const T* A, const T* g, T* gM) {      \
    rung::mix_weights(N, C, l_max, threads, A, g, gM);                                                               \
  }

extern "C" {
RUNG_FUNCTIONS(float, f32)
RUNG_FUNCTIONS(double, f64)
}
