// The convolution and its first and second derivatives on a CPU: reference.py is the definition, edge.h has the formulas.
// A thread has receivers of its own. For a few of them at a time the passes of passes.h go over the edges, one block of
// channels after the other.

#include "passes.h"

namespace rung {
namespace {

constexpr int64_t CHUNK = 16;  // fewest edges that are worth a pass
constexpr int64_t NEXT = 4;    // receivers after which the harmonics are needed that are fetched now

// The weights as [C / WIDTH, COLUMNS, R, WIDTH].
template <class T, bool VECTORS> Buffer<T> pack_weights(int64_t C, const Inputs<T>& in) {
  Buffer<T> buffer(C * COLUMNS<VECTORS> * R);
  T* out = buffer.get();
  for (int64_t c = 0; c < C; c += WIDTH<T>)
    for (int k = 0; k < COLUMNS<VECTORS>; k++)
      for (int n = 0; n < R; n++, out += WIDTH<T>) {
        if (k < AXIAL) store(out, load(in.weights + (n * DEGREES + k) * C + c));
        else if (k < IDENTITY) store(out, load(in.axial + (n * DEGREES + k - AXIAL) * C + c) * T(INV_SQRT3));
        else store(out, load(in.identity + n * C + c));
      }
  return buffer;
}

// The edges of whole receivers, at least CHUNK of them unless the part ends.
struct Chunk {
  int64_t first, last, edge, num_edges;  // receivers first ... last - 1, their first edge

  Chunk(const Graph& graph, int64_t begin, int64_t end) : first(begin), last(begin + 1), edge(graph.row_ptr[begin]) {
    while (last < end && graph.row_ptr[last] - edge < CHUNK) last++;
    num_edges = graph.row_ptr[last] - edge;
  }
  // More edges than any chunk of these receivers has.
  static int64_t most_edges(const Graph& graph, int64_t begin, int64_t end) {
    int64_t most = 0;
    for (int64_t i = begin; i < end; i++) most = std::max<int64_t>(most, graph.row_ptr[i + 1] - graph.row_ptr[i]);
    return most + CHUNK;
  }
};

// f(count, c) for the blocks of channels, BLOCKS at a time; `count` is a constant.
template <class T, class F> RUNG_INLINE void for_blocks(int64_t C, const F& f) {
  for_groups<BLOCKS>(0, C / WIDTH<T>, [&](auto count, int64_t block) __attribute__((always_inline)) { f(count, block * WIDTH<T>); });
}

// Fetch the block's harmonics of a receiver that is soon to come.
template <class T> RUNG_INLINE void prefetch_harmonics(const T* B, int64_t C) {
  RUNG_UNROLL for (int m = 0; m < L; m++) __builtin_prefetch(B + m * C, 0, 2);
}

// ---- A -------------------------------------------------------------------------------------------------------------

template <class T, bool VECTORS>
void forward_part(const Graph& graph, const Inputs<T>& in, const T* weights, int64_t begin, int64_t end, T* A) {
  const Scratch<T, VECTORS, false> scratch(Chunk::most_edges(graph, begin, end), BLOCKS);
  const Cotangents<T> none(nullptr, graph.C, nullptr, nullptr, nullptr, nullptr);
  const int64_t last_edge = graph.row_ptr[end] - 1;
  for (int64_t first = begin; first < end;) {
    const Chunk chunk(graph, first, end);
    for_blocks<T>(graph.C, [&](auto count, int64_t c) {
      for (int b = 0; b < count; b++) {
        const int64_t channel = c + b * WIDTH<T>;
        const Block<T> block = {graph, in, weights + channel * COLUMNS<VECTORS> * R, channel};
        const auto rows = scratch.rows(b, 0);
        for_groups<GROUP>(chunk.edge, chunk.edge + chunk.num_edges, [&](auto size, int64_t e) __attribute__((always_inline)) {
          RUNG_UNROLL for (int i = 0; i < size; i++) block.template prefetch<VECTORS>(std::min(e + i + AHEAD, last_edge));
          messages<T, VECTORS, size>(block, e, rows.at(e - chunk.edge));
        });
      }
      const Block<T> block = {graph, in, nullptr, c};
      for (int64_t receiver = chunk.first; receiver < chunk.last; receiver++) {
        const int64_t row = graph.row_ptr[receiver], row_end = graph.row_ptr[receiver + 1];
        spread_all<T, VECTORS, false, count>(block, {graph, none, c}, row, row_end, scratch.rows(0, 0).at(row - chunk.edge).p,
                                             scratch.block_stride(), A + receiver * L * graph.C + c);
      }
    });
    first = chunk.last;
  }
}

template <class T, bool VECTORS> void forward(const Graph& graph, const Inputs<T>& in, T* A) {
  const Buffer<T> weights = pack_weights<T, VECTORS>(graph.C, in);
  for_parts(graph, [&](int, int64_t begin, int64_t end) {
    forward_part<T, VECTORS>(graph, in, weights.get(), begin, end, A);
  });
}

// ---- gradients of x, w and the weights -------------------------------------------------------------------------------

// Sums the gradients of the columns from FIRST on over a chunk's edges, as many columns at a time as registers allow.
template <class T, bool SECOND, int ALL, int FIRST = 0>
RUNG_INLINE void chunk_weights(int64_t edges, const T* s, const T* ts, int64_t ts_stride, const T* d, T* g_w) {
  constexpr int LEFT = ALL - FIRST, COUNT = LEFT == 4 ? 2 : LEFT < 3 ? LEFT : 3;
  constexpr int MOST = REGISTERS == 32 ? 24 : 12;  // sums
  constexpr int PARTS = (COUNT * R + MOST - 1) / MOST, SCALARS = (R + PARTS - 1) / PARTS;
  constexpr int64_t DT = ALL * WIDTH<T>, STRIDE = SECOND ? 2 * DT : DT;
  T* place = g_w + FIRST * COLUMN<T>;
  const T* column = d + FIRST * WIDTH<T>;
  for (int n = 0; n + SCALARS <= R; n += SCALARS)
    weight_sums<T, SECOND, COUNT, SCALARS>(edges, s + n, ts + n, ts_stride, column, column + DT, STRIDE, place + n * WIDTH<T>);
  if constexpr (R % SCALARS > 0) {
    constexpr int n = R - R % SCALARS;
    weight_sums<T, SECOND, COUNT, R % SCALARS>(edges, s + n, ts + n, ts_stride, column, column + DT, STRIDE, place + n * WIDTH<T>);
  }
  if constexpr (LEFT > COUNT) chunk_weights<T, SECOND, ALL, FIRST + COUNT>(edges, s, ts, ts_stride, d, g_w);
}

template <class T, bool VECTORS>
void nodes_part(const Graph& graph, const Inputs<T>& in, const T* weights, int64_t begin, int64_t end, const T* gA,
                typename SenderSums<T>::Part g_x, typename SenderSums<T>::Part g_w,
                typename WeightSums<T, VECTORS>::Part g_weights) {
  const Scratch<T, VECTORS, false> scratch(Chunk::most_edges(graph, begin, end), 1);
  for (int64_t first = begin; first < end;) {
    const Chunk chunk(graph, first, end);
    for (int64_t c = 0; c < graph.C; c += WIDTH<T>) {
      const Block<T> block = {graph, in, weights + c * COLUMNS<VECTORS> * R, c};
      for (int64_t receiver = chunk.first; receiver < chunk.last; receiver++) {
        const T* B = gA + receiver * L * graph.C;
        if (receiver + NEXT < end) prefetch_harmonics(B + NEXT * L * graph.C + c, graph.C);
        const int64_t row = graph.row_ptr[receiver], row_end = graph.row_ptr[receiver + 1];
        const auto rows = scratch.rows(0, 0).at(row - chunk.edge);
        project_row<T, VECTORS>(block, B, row, row_end, rows);
        if (g_x || g_w)
          for_groups<GROUP>(row, row_end, [&](auto size, int64_t e) __attribute__((always_inline)) {
            node_gradients<T, VECTORS, false, size>(block, B, e, rows.at(e - row), g_x, g_w);
          });
      }
      if (g_weights)
        chunk_weights<T, false, COLUMNS<VECTORS>>(chunk.num_edges, block.s(chunk.edge), block.s(chunk.edge), 0,
                                                  scratch.rows(0, 0).d, g_weights.sums + c * COLUMNS<VECTORS> * R);
    }
    if (g_weights) g_weights.count(chunk.num_edges);
    first = chunk.last;
  }
  if (g_weights) g_weights.flush();
}

template <class T, bool VECTORS>
void nodes2_part(const Graph& graph, const Inputs<T>& in, const Cotangents<T>& t, const T* weights, int64_t begin, int64_t end,
                 const T* gA, T* d_gA, typename SenderSums<T>::Part g_x, typename SenderSums<T>::Part g_w,
                 typename WeightSums<T, VECTORS>::Part g_weights) {
  const Scratch<T, VECTORS, true> scratch(Chunk::most_edges(graph, begin, end), BLOCKS);
  for (int64_t first = begin; first < end;) {
    const Chunk chunk(graph, first, end);
    for_blocks<T>(graph.C, [&](auto count, int64_t c0) {
      for (int b = 0; b < count; b++) {
        const int64_t c = c0 + b * WIDTH<T>;
        const Block<T> block = {graph, in, weights + c * COLUMNS<VECTORS> * R, c};
        const CotangentBlock<T> cotangent = {graph, t, c};
        for (int64_t receiver = chunk.first; receiver < chunk.last; receiver++) {
          const T* B = gA + receiver * L * graph.C;
          if (receiver + NEXT < end) prefetch_harmonics(B + NEXT * L * graph.C + c, graph.C);
          const int64_t row = graph.row_ptr[receiver], row_end = graph.row_ptr[receiver + 1];
          const auto rows = scratch.rows(b, 0).at(row - chunk.edge);
          project_row<T, VECTORS>(block, cotangent, B, row, row_end, rows);
          for_groups<GROUP / 2>(row, row_end, [&](auto size, int64_t e) __attribute__((always_inline)) {
            second_messages<T, VECTORS, size>(block, cotangent, B, e, rows.at(e - row), g_x, g_w);
          });
        }
        if (g_weights)
          chunk_weights<T, true, COLUMNS<VECTORS>>(chunk.num_edges, block.s(chunk.edge), cotangent.s(chunk.edge), t.radial_stride,
                                                   scratch.rows(b, 0).d, g_weights.sums + c * COLUMNS<VECTORS> * R);
      }
      if (!d_gA) return;
      const Block<T> block = {graph, in, nullptr, c0};
      for (int64_t receiver = chunk.first; receiver < chunk.last; receiver++) {
        const int64_t row = graph.row_ptr[receiver], row_end = graph.row_ptr[receiver + 1];
        spread_all<T, VECTORS, true, count>(block, {graph, t, c0}, row, row_end, scratch.rows(0, 0).at(row - chunk.edge).p,
                                            scratch.block_stride(), d_gA + receiver * L * graph.C + c0);
      }
    });
    if (g_weights) g_weights.count(chunk.num_edges);
    first = chunk.last;
  }
  if (g_weights) g_weights.flush();
}

// ---- gradients of the edge basis -------------------------------------------------------------------------------------

// g_Y[i][m] = sum over blocks of P_l B_m, for l = 1 also of the derivative with respect to u times w_m, for the degrees
// FIRST ... LAST - 1. The rows' places p and u hold P (or Pt) and that derivative; blocks are `edges` rows apart.
template <class T, bool VECTORS, bool SECOND, int EDGES, int FIRST, int LAST>
RUNG_INLINE void harmonic_gradients(const Graph& graph, const Inputs<T>& in, const Cotangents<T>& t, const T* B, int64_t e,
                                    Rows<T, VECTORS, SECOND> rows, int64_t edges, Pack<T> (*g_Y)[L]) {
  using Row = Rows<T, VECTORS, SECOND>;
  constexpr int BEGIN = FIRST * FIRST, COUNT = LAST * LAST - BEGIN, W = WIDTH<T>;
  Pack<T> sum[EDGES][COUNT] = {};
  for (int64_t c = 0; c < graph.C; c += W, rows = rows.at(edges)) {
    const T* p = rows.p + (SECOND ? Row::PT : 0);
    RUNG_UNROLL for (int l = FIRST; l < LAST; l++) {
      Pack<T> P[EDGES];
      RUNG_UNROLL for (int i = 0; i < EDGES; i++) P[i] = load_once(p + i * Row::P + l * W);
      RUNG_UNROLL for (int m = l * l; m < (l + 1) * (l + 1); m++) {
        const Pack<T> B_m = load_once(B + m * graph.C + c);
        RUNG_UNROLL for (int i = 0; i < EDGES; i++) sum[i][m - BEGIN] += P[i] * B_m;
      }
    }
    if constexpr (VECTORS && FIRST <= 1) {
      const Block<T> block = {graph, in, nullptr, c};
      const CotangentBlock<T> cotangent = {graph, t, c};
      RUNG_UNROLL for (int i = 0; i < EDGES; i++)
        RUNG_UNROLL for (int k = 0; k < 3; k++) {
          sum[i][1 + k - BEGIN] += load(rows.at(i).u) * block.w(e + i)[k];
          if (SECOND) sum[i][1 + k - BEGIN] += load(rows.at(i).u + Row::UT) * cotangent.w(e + i)[k];
        }
    }
  }
  RUNG_UNROLL for (int i = 0; i < EDGES; i++)
    RUNG_UNROLL for (int m = 0; m < COUNT; m++) g_Y[i][BEGIN + m] = sum[i][m];
}

// The gradients of the radial functions and harmonics of EDGES edges, from what the passes over all blocks left.
template <class T, bool VECTORS, bool SECOND, int EDGES>
RUNG_INLINE void basis_gradients(const Graph& graph, const Inputs<T>& in, const Cotangents<T>& t, const T* weights, const T* B,
                                 int64_t e, const Rows<T, VECTORS, SECOND>& rows, int64_t edges, T* g_radial, T* g_harmonics) {
  using Row = Rows<T, VECTORS, SECOND>;
  Pack<T> g_s[EDGES][R] = {}, g_Y[EDGES][L];
  const T* d = rows.d;
  for (int64_t c = 0; c < graph.C; c += WIDTH<T>, d += edges * Row::D)
    radial_gradients<T, EDGES, COLUMNS<VECTORS>>(weights + c * COLUMNS<VECTORS> * R, d, Row::D, g_s);
  lane_sums<EDGES * R>(g_s[0], g_radial + e * R);
  harmonic_gradients<T, VECTORS, SECOND, EDGES, 0, SPLIT>(graph, in, t, B, e, rows, edges, g_Y);
  if constexpr (SPLIT < DEGREES)
    harmonic_gradients<T, VECTORS, SECOND, EDGES, SPLIT, DEGREES>(graph, in, t, B, e, rows, edges, g_Y);
  lane_sums<EDGES * L>(g_Y[0], g_harmonics + e * L);
}

// A region of memory that is soon to be read, fetched in `times` pieces.
template <class T> class Fetch {
 public:
  Fetch(const T* begin, int64_t size, int64_t times) : place_(begin), end_(begin + size), piece_(times ? size / times + 1 : 0) {}
  void fetch() {
    const T* const stop = std::min(place_ + piece_, end_);
    for (; place_ < stop; place_ += 64 / sizeof(T)) __builtin_prefetch(place_);
  }

 private:
  const T *place_, *end_;
  int64_t piece_;
};

// SECOND: the gradients of the derivative along t; x and w then have theirs from nodes2_part.
template <class T, bool VECTORS, bool SECOND>
void basis_part(const Graph& graph, const Inputs<T>& in, const Cotangents<T>& t, const T* weights, int64_t begin, int64_t end,
                const T* gA, typename SenderSums<T>::Part g_x, typename SenderSums<T>::Part g_w, T* g_radial, T* g_harmonics) {
  constexpr int SIZE = SECOND ? GROUP / 2 : GROUP;
  constexpr int PAIR = SIZE > 1 && 2 * R <= REGISTERS / 2 ? 2 : 1;  // edges whose radial sums stay in registers
  const Scratch<T, VECTORS, SECOND> scratch(SIZE, graph.C / WIDTH<T>);
  for (int64_t receiver = begin; receiver < end; receiver++) {
    const T* B = gA + receiver * L * graph.C;
    const int64_t row = graph.row_ptr[receiver], row_end = graph.row_ptr[receiver + 1];
    Fetch<T> next(B + L * graph.C, receiver + 1 < end ? L * graph.C : 0, (row_end - row) / SIZE);
    for_groups<SIZE>(row, row_end, [&](auto size, int64_t e) {
      next.fetch();
      for (int64_t c = 0; c < graph.C; c += WIDTH<T>) {
        const Block<T> block = {graph, in, weights + c * COLUMNS<VECTORS> * R, c};
        const auto rows = scratch.rows(c / WIDTH<T>, c / WIDTH<T>);
        if constexpr (SECOND) {
          project_row<T, VECTORS>(block, {graph, t, c}, B, e, e + size, rows);
          second_messages<T, VECTORS, size>(block, {graph, t, c}, B, e, rows, {}, {});
        } else {
          project_row<T, VECTORS>(block, B, e, e + size, rows);
          node_gradients<T, VECTORS, true, size>(block, B, e, rows, g_x, g_w);
        }
      }
      constexpr int EDGES = size < PAIR ? size : PAIR;
      for (int i = 0; i < size; i += EDGES)
        basis_gradients<T, VECTORS, SECOND, EDGES>(graph, in, t, weights, B, e + i, scratch.rows(0, 0).at(i), SIZE, g_radial,
                                                   g_harmonics);
    });
  }
}

// ---- all gradients -----------------------------------------------------------------------------------------------------

template <class T, bool VECTORS>
void backward(const Graph& graph, const Inputs<T>& in, const T* gA, const Arrays<T*>& out) {
  const Buffer<T> weights = pack_weights<T, VECTORS>(graph.C, in);
  const Cotangents<T> none(nullptr, graph.C, nullptr, nullptr, nullptr, nullptr);
  SenderSums<T> x_sums(graph, graph.C, out.x), w_sums(graph, 3 * graph.C, out.w);
  WeightSums<T, VECTORS> weight_sums(graph, out.weights);
  for_parts(graph, [&](int part, int64_t begin, int64_t end) {
    auto g_x = x_sums.start(part, begin, end), g_w = w_sums.start(part, begin, end);
    const auto g_weights = weight_sums.start(part);
    if (out.radial) {
      basis_part<T, VECTORS, false>(graph, in, none, weights.get(), begin, end, gA, g_x, g_w, out.radial, out.harmonics);
      g_x = g_w = {};
    }
    if (g_x || g_w || g_weights)
      nodes_part<T, VECTORS>(graph, in, weights.get(), begin, end, gA, g_x, g_w, g_weights);
  });
  x_sums.finish();
  w_sums.finish();
  weight_sums.finish(graph.C, out.weights, out.axial, out.identity);
}

template <class T, bool VECTORS>
void backward2(const Graph& graph, const Inputs<T>& in, const T* gA, const Inputs<T>& cotangents, T* d_gA,
               const Arrays<T*>& out) {
  const Buffer<T> weights = pack_weights<T, VECTORS>(graph.C, in);
  const int64_t num_zeros = std::max<int64_t>({R, L, graph.C});
  const Buffer<T> zeros(num_zeros);
  std::fill_n(zeros.get(), num_zeros, T(0));
  const Cotangents<T> t(zeros.get(), graph.C, cotangents.radial, cotangents.harmonics, cotangents.x, cotangents.w);
  SenderSums<T> x_sums(graph, graph.C, out.x), w_sums(graph, 3 * graph.C, out.w);
  WeightSums<T, VECTORS> weight_sums(graph, out.weights);
  for_parts(graph, [&](int part, int64_t begin, int64_t end) {
    const auto g_x = x_sums.start(part, begin, end), g_w = w_sums.start(part, begin, end);
    const auto g_weights = weight_sums.start(part);
    if (d_gA || g_x || g_w || g_weights)
      nodes2_part<T, VECTORS>(graph, in, t, weights.get(), begin, end, gA, d_gA, g_x, g_w, g_weights);
    if (out.radial)
      basis_part<T, VECTORS, true>(graph, in, t, weights.get(), begin, end, gA, {}, {}, out.radial, out.harmonics);
  });
  x_sums.finish();
  w_sums.finish();
  weight_sums.finish(graph.C, out.weights, out.axial, out.identity);
}

}  // namespace
}  // namespace rung

#define RUNG_INPUTS(T) \
  const T *radial, const T *harmonics, const T *x, const T *weights, const T *w, const T *axial, const T *identity

// A null `axial` means no vectors; `w` is null as well when there are no atoms.
#define RUNG_FUNCTIONS(T, suffix)                                                                                      \
  void rung_convolve_##suffix(int64_t N, int64_t C, int threads, const int32_t* row_ptr, const int32_t* senders,       \
                              RUNG_INPUTS(T), T* A) {                                                                  \
    const rung::Graph graph = {N, C, threads, row_ptr, senders, nullptr};                                              \
    const rung::Inputs<T> in = {radial, harmonics, x, weights, w, axial, identity};                                    \
    axial ? rung::forward<T, true>(graph, in, A) : rung::forward<T, false>(graph, in, A);                              \
  }                                                                                                                    \
  void rung_convolve_backward_##suffix(int64_t N, int64_t C, int threads, const int32_t* row_ptr,                      \
                                       const int32_t* senders, const int32_t* reverse, const T* gA, RUNG_INPUTS(T),    \
                                       T* g_radial, T* g_harmonics, T* g_x, T* g_weights, T* g_w, T* g_axial,          \
                                       T* g_identity) {                                                                \
    const rung::Graph graph = {N, C, threads, row_ptr, senders, reverse};                                              \
    const rung::Inputs<T> in = {radial, harmonics, x, weights, w, axial, identity};                                    \
    const rung::Arrays<T*> out = {g_radial, g_harmonics, g_x, g_weights, g_w, g_axial, g_identity};                    \
    axial ? rung::backward<T, true>(graph, in, gA, out) : rung::backward<T, false>(graph, in, gA, out);                \
  }                                                                                                                    \
  void rung_convolve_backward2_##suffix(                                                                               \
      int64_t N, int64_t C, int threads, const int32_t* row_ptr, const int32_t* senders, const int32_t* reverse,       \
      const T* gA, RUNG_INPUTS(T), const T* t_radial, const T* t_harmonics, const T* t_x, const T* t_w, T* d_gA,       \
      T* d_radial, T* d_harmonics, T* d_x, T* d_weights, T* d_w, T* d_axial, T* d_identity) {                          \
    const rung::Graph graph = {N, C, threads, row_ptr, senders, reverse};                                              \
    const rung::Inputs<T> in = {radial, harmonics, x, weights, w, axial, identity};                                    \
    const rung::Inputs<T> t = {t_radial, t_harmonics, t_x, nullptr, t_w, nullptr, nullptr};                            \
    const rung::Arrays<T*> out = {d_radial, d_harmonics, d_x, d_weights, d_w, d_axial, d_identity};                    \
    axial ? rung::backward2<T, true>(graph, in, gA, t, d_gA, out)                                                      \
          : rung::backward2<T, false>(graph, in, gA, t, d_gA, out);                                                    \
  }

extern "C" {
RUNG_FUNCTIONS(float, f32)
RUNG_FUNCTIONS(double, f64)
}
