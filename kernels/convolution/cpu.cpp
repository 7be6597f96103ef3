// The convolution and its first and second derivatives on a CPU: loops over a receiver's edges, one pack of channels at a
// time. Threads have receivers of their own; reference.py and edge.h have the formulas.

#include "edge.h"
#include "sums.h"

namespace rung {
namespace {

constexpr int PAIR = 2;        // edges that share a read of the weights
constexpr int64_t AHEAD = 8;   // edges, and
constexpr int64_t NEXT = 4;    // receivers, whose memory is fetched ahead of its use
constexpr int64_t CHUNK = 16;  // fewest edges that the weights' gradients are summed over at a time

template <class P> struct Arrays {
  P radial, harmonics, x, weights, w, axial, identity;
};
template <class T> using Inputs = Arrays<const T*>;

// The cotangents of the gradients. A null pointer stands for zeros: then the rows are one row of zeros.
template <class T> struct Cotangents {
  const T *radial, *harmonics, *x, *w;
  int64_t radial_stride, harmonics_stride, x_stride, w_stride;

  Cotangents(const T* zeros, int64_t C, const T* t_radial, const T* t_harmonics, const T* t_x, const T* t_w)
      : radial(t_radial ? t_radial : zeros),
        harmonics(t_harmonics ? t_harmonics : zeros),
        x(t_x ? t_x : zeros),
        w(t_w ? t_w : zeros),
        radial_stride(t_radial ? R : 0),
        harmonics_stride(t_harmonics ? L : 0),
        x_stride(t_x ? C : 0),
        w_stride(t_w ? 3 * C : 0) {}
};

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

// The arrays as one block of channels of a part's receivers sees them.
template <class T> struct Block {
  const Graph& graph;
  const Inputs<T>& in;
  const T* weights;  // of the block
  int64_t c;         // its first channel

  RUNG_INLINE Pack<T> x(int64_t e) const { return load(in.x + graph.senders[e] * graph.C + c); }
  RUNG_INLINE Vector<T> w(int64_t e) const { return {in.w + graph.senders[e] * 3 * graph.C + c, graph.C}; }
  RUNG_INLINE const T* s(int64_t e) const { return in.radial + e * R; }
  RUNG_INLINE const T* Y(int64_t e) const { return in.harmonics + e * L; }

  // Fetch the sender's features of an edge that is soon to come.
  template <bool VECTORS> RUNG_INLINE void prefetch(int64_t e) const {
    const int64_t sender = graph.senders[e];
    __builtin_prefetch(in.x + sender * graph.C + c);
    if (VECTORS)
      for (int k = 0; k < 3; k++) __builtin_prefetch(in.w + (3 * sender + k) * graph.C + c);
  }
};

// Fetch the block's harmonics of a receiver that is soon to come.
template <class T> RUNG_INLINE void prefetch_harmonics(const T* B, int64_t C) {
  RUNG_UNROLL for (int m = 0; m < L; m++) __builtin_prefetch(B + m * C, 0, 2);
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

// ---- A -------------------------------------------------------------------------------------------------------------

template <class T, bool VECTORS, int EDGES>
RUNG_INLINE void add_messages(const Block<T>& block, int64_t e, Pack<T>* A) {
  const T* s[EDGES];
  Pack<T> P[EDGES][DEGREES];
  RUNG_UNROLL for (int i = 0; i < EDGES; i++) s[i] = block.s(e + i);
  radial_sums<T, EDGES, DEGREES>(block.weights, s, P);
  RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
    const Pack<T> x = block.x(e + i);
    RUNG_UNROLL for (int l = 0; l < DEGREES; l++) P[i][l] *= x;
  }
  if constexpr (VECTORS) {
    Pack<T> r[EDGES][DEGREES + 1];
    radial_sums<T, EDGES, DEGREES + 1>(block.weights + AXIAL * COLUMN<T>, s, r);
    RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
      const Vector<T> w = block.w(e + i);
      const Pack<T> u = along(w, block.Y(e + i));
      RUNG_UNROLL for (int l = 0; l < DEGREES; l++) P[i][l] += r[i][l] * u;
      RUNG_UNROLL for (int k = 0; k < 3; k++) A[1 + k] += r[i][DEGREES] * w[k];
    }
  }
  RUNG_UNROLL for (int i = 0; i < EDGES; i++) spread<T>(P[i], block.Y(e + i), A);
}

template <class T, bool VECTORS>
void forward_part(const Graph& graph, const Inputs<T>& in, const T* weights, int64_t begin, int64_t end, T* A) {
  const int64_t last_edge = graph.row_ptr[end] - 1;
  for (int64_t receiver = begin; receiver < end; receiver++)
    for (int64_t c = 0; c < graph.C; c += WIDTH<T>) {
      const Block<T> block = {graph, in, weights + c * COLUMNS<VECTORS> * R, c};
      Pack<T> sum[L] = {};
      int64_t e = graph.row_ptr[receiver];
      const int64_t row_end = graph.row_ptr[receiver + 1];
      for (; e + PAIR <= row_end; e += PAIR) {
        RUNG_UNROLL for (int i = 0; i < PAIR; i++) block.template prefetch<VECTORS>(std::min(e + i + AHEAD, last_edge));
        add_messages<T, VECTORS, PAIR>(block, e, sum);
      }
      if (e < row_end) add_messages<T, VECTORS, 1>(block, e, sum);
      RUNG_UNROLL for (int m = 0; m < L; m++) store(A + (receiver * L + m) * graph.C + c, sum[m]);
    }
}

template <class T, bool VECTORS> void forward(const Graph& graph, const Inputs<T>& in, T* A) {
  const Buffer<T> weights = pack_weights<T, VECTORS>(graph.C, in);
  for_parts(graph, [&](int, int64_t begin, int64_t end) {
    forward_part<T, VECTORS>(graph, in, weights.get(), begin, end, A);
  });
}

// ---- gradients of the edge basis, with those of x and w --------------------------------------------------------------

// What the harmonics' gradients need from the sweep over the weights, for each block of channels and edge.
constexpr int KEPT = DEGREES + 2;  // P_l and the derivatives with respect to u and ut

template <class T, bool VECTORS, int EDGES>
RUNG_INLINE void sweep_block(const Block<T>& block, const T* B_row, int64_t e, typename SenderSums<T>::Part g_x,
                             typename SenderSums<T>::Part g_w, Pack<T> (*g_s)[R], T* kept) {
  const int64_t C = block.graph.C, c = block.c;
  const auto B = [&](int m) { return load(B_row + m * C + c); };
  const T* s[EDGES];
  Pack<T> x[EDGES], u[EDGES], gx[EDGES] = {}, gu[EDGES] = {}, d[EDGES], r[EDGES];
  RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
    s[i] = block.s(e + i);
    x[i] = block.x(e + i);
    if (VECTORS) u[i] = along(block.w(e + i), block.Y(e + i));
  }
  RUNG_UNROLL for (int l = 0; l < DEGREES; l++) {
    Pack<T> q[EDGES], P[EDGES];
    RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
      q[i] = project<T>(l, block.Y(e + i), B);
      d[i] = q[i] * x[i];
    }
    radial_gradients<T, EDGES>(block.weights + l * COLUMN<T>, s, d, r, g_s);
    RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
      gx[i] += r[i] * q[i];
      P[i] = r[i] * x[i];
      if (VECTORS) d[i] = q[i] * u[i];
    }
    if constexpr (VECTORS) {
      radial_gradients<T, EDGES>(block.weights + (AXIAL + l) * COLUMN<T>, s, d, r, g_s);
      RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
        gu[i] += r[i] * q[i];
        P[i] += r[i] * u[i];
      }
    }
    RUNG_UNROLL for (int i = 0; i < EDGES; i++) store(kept + (i * KEPT + l) * WIDTH<T>, P[i]);
  }
  if (g_x) {
    RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
      T* place = g_x.row(e + i) + c;
      store(place, load(place) + gx[i]);
    }
  }
  if constexpr (VECTORS) {
    RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
      d[i] = product(block.w(e + i), B);
      store(kept + (i * KEPT + DEGREES) * WIDTH<T>, gu[i]);
    }
    radial_gradients<T, EDGES>(block.weights + IDENTITY * COLUMN<T>, s, d, r, g_s);
    if (g_w) {
      RUNG_UNROLL for (int i = 0; i < EDGES; i++)
        RUNG_UNROLL for (int k = 0; k < 3; k++) {
          T* place = g_w.row(e + i) + k * C + c;
          store(place, load(place) + gu[i] * block.Y(e + i)[1 + k] + r[i] * B(1 + k));
        }
    }
  }
}

// g_Y[i][m] = sum over blocks of channels of P_l B_m, and for l = 1 of the derivative with respect to u times w_m; `kept`
// has KEPT packs for each edge of each block.
template <class T, bool VECTORS, int EDGES, int FIRST, int LAST>
RUNG_INLINE void harmonic_gradients(const Graph& graph, const Inputs<T>& in, const T* B, int64_t e, const T* kept,
                                    Pack<T> (*g_Y)[L]) {
  constexpr int BEGIN = FIRST * FIRST, COUNT = LAST * LAST - BEGIN;
  Pack<T> sum[EDGES][COUNT] = {};
  for (int64_t c = 0; c < graph.C; c += WIDTH<T>, kept += EDGES * KEPT * WIDTH<T>) {
    RUNG_UNROLL for (int l = FIRST; l < LAST; l++) {
      Pack<T> P[EDGES];
      RUNG_UNROLL for (int i = 0; i < EDGES; i++) P[i] = load(kept + (i * KEPT + l) * WIDTH<T>);
      RUNG_UNROLL for (int m = l * l; m < (l + 1) * (l + 1); m++) {
        const Pack<T> B_m = load(B + m * graph.C + c);
        RUNG_UNROLL for (int i = 0; i < EDGES; i++) sum[i][m - BEGIN] += P[i] * B_m;
      }
    }
    if constexpr (VECTORS && FIRST <= 1) {
      RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
        const Pack<T> gu = load(kept + (i * KEPT + DEGREES) * WIDTH<T>);
        const T* w = in.w + graph.senders[e + i] * 3 * graph.C + c;
        RUNG_UNROLL for (int k = 0; k < 3; k++) sum[i][1 + k - BEGIN] += gu * load(w + k * graph.C);
      }
    }
  }
  RUNG_UNROLL for (int i = 0; i < EDGES; i++)
    RUNG_UNROLL for (int m = 0; m < COUNT; m++) g_Y[i][BEGIN + m] = sum[i][m];
}

template <class T, bool VECTORS, int EDGES>
RUNG_INLINE void basis_edges(const Graph& graph, const Inputs<T>& in, const T* weights, const T* B, int64_t e,
                             typename SenderSums<T>::Part g_x, typename SenderSums<T>::Part g_w, T* kept, T* g_radial,
                             T* g_harmonics) {
  Pack<T> g_s[EDGES][R] = {}, g_Y[EDGES][L];
  T* place = kept;
  for (int64_t c = 0; c < graph.C; c += WIDTH<T>, place += EDGES * KEPT * WIDTH<T>) {
    const Block<T> block = {graph, in, weights + c * COLUMNS<VECTORS> * R, c};
    sweep_block<T, VECTORS, EDGES>(block, B, e, g_x, g_w, g_s, place);
  }
  lane_sums<EDGES * R>(g_s[0], g_radial + e * R);
  constexpr int SPLIT = DEGREES > 3 ? 3 : DEGREES;  // so that the sums of two edges stay in registers
  harmonic_gradients<T, VECTORS, EDGES, 0, SPLIT>(graph, in, B, e, kept, g_Y);
  if constexpr (SPLIT < DEGREES) harmonic_gradients<T, VECTORS, EDGES, SPLIT, DEGREES>(graph, in, B, e, kept, g_Y);
  lane_sums<EDGES * L>(g_Y[0], g_harmonics + e * L);
}

template <class T, bool VECTORS>
void basis_part(const Graph& graph, const Inputs<T>& in, const T* weights, int64_t begin, int64_t end, const T* gA,
                typename SenderSums<T>::Part g_x, typename SenderSums<T>::Part g_w, T* g_radial, T* g_harmonics) {
  constexpr int EDGES = 2 * R <= REGISTERS / 2 ? PAIR : 1;
  const Buffer<T> kept(graph.C * EDGES * KEPT);
  for (int64_t receiver = begin; receiver < end; receiver++) {
    const T* B = gA + receiver * L * graph.C;
    int64_t e = graph.row_ptr[receiver];
    const int64_t row_end = graph.row_ptr[receiver + 1];
    Fetch<T> next(B + L * graph.C, receiver + 1 < end ? L * graph.C : 0, (row_end - e + EDGES - 1) / EDGES);
    for (; e + EDGES <= row_end; e += EDGES) {
      next.fetch();
      basis_edges<T, VECTORS, EDGES>(graph, in, weights, B, e, g_x, g_w, kept.get(), g_radial, g_harmonics);
    }
    if (EDGES > 1 && e < row_end)
      basis_edges<T, VECTORS, 1>(graph, in, weights, B, e, g_x, g_w, kept.get(), g_radial, g_harmonics);
  }
}

// ---- gradients of x, w and the weights, first and second order -------------------------------------------------------

// The edges of whole receivers, at least CHUNK of them unless the part ends.
struct Chunk {
  int64_t first, last, edge;  // receivers first ... last - 1, the first edge

  Chunk(const Graph& graph, int64_t begin, int64_t end) : first(begin), last(begin + 1), edge(graph.row_ptr[begin]) {
    while (last < end && graph.row_ptr[last] - edge < CHUNK) last++;
  }
};

// For the edges of a chunk and one block of channels, packs that the passes over them hand on.
template <class T> struct Scratch {
  int64_t row_edges = 0, edges = 0;  // most edges of a receiver, of a chunk
  Buffer<T> q, qt, d, dt, u, ut;
  int64_t columns;

  Scratch(const Graph& graph, int64_t begin, int64_t end, int64_t columns_, bool vectors, bool second)
      : columns(columns_ * WIDTH<T>) {
    for (int64_t i = begin; i < end; i++) row_edges = std::max<int64_t>(row_edges, graph.row_ptr[i + 1] - graph.row_ptr[i]);
    edges = row_edges + CHUNK;
    q.resize(row_edges * DEGREES * WIDTH<T>);
    d.resize(edges * columns);
    if (!second) return;
    qt.resize(row_edges * DEGREES * WIDTH<T>);
    dt.resize(edges * columns);
    if (!vectors) return;
    u.resize(row_edges * WIDTH<T>);
    ut.resize(row_edges * WIDTH<T>);
  }
};

// q and d of a receiver's edges; d's rows begin at `d_rows`.
template <class T, bool VECTORS>
RUNG_INLINE void project_row(const Block<T>& block, const T* B_row, int64_t begin, int64_t end, T* q_rows, T* d_rows) {
  Pack<T> B_m[L];
  RUNG_UNROLL for (int m = 0; m < L; m++) B_m[m] = load(B_row + m * block.graph.C + block.c);
  const auto B = [&](int m) { return B_m[m]; };
  const int64_t last_edge = block.graph.row_ptr[block.graph.N] - 1;
  for (int64_t e = begin; e < end; e++, q_rows += DEGREES * WIDTH<T>, d_rows += COLUMNS<VECTORS> * WIDTH<T>) {
    block.template prefetch<VECTORS>(std::min(e + AHEAD, last_edge));
    const Pack<T> x = block.x(e);
    Pack<T> u;
    if constexpr (VECTORS) {
      u = along(block.w(e), block.Y(e));
      store(d_rows + IDENTITY * WIDTH<T>, product(block.w(e), B));
    }
    RUNG_UNROLL for (int l = 0; l < DEGREES; l++) {
      const Pack<T> q = project<T>(l, block.Y(e), B);
      store(q_rows + l * WIDTH<T>, q);
      store(d_rows + l * WIDTH<T>, q * x);
      if (VECTORS) store(d_rows + (AXIAL + l) * WIDTH<T>, q * u);
    }
  }
}

template <class T, bool VECTORS, int EDGES>
RUNG_INLINE void node_gradients(const Block<T>& block, const T* B_row, int64_t e, const T* q, typename SenderSums<T>::Part g_x,
                                typename SenderSums<T>::Part g_w) {
  const T* s[EDGES];
  RUNG_UNROLL for (int i = 0; i < EDGES; i++) s[i] = block.s(e + i);
  if (g_x) {
    Pack<T> r[EDGES][DEGREES];
    radial_sums<T, EDGES, DEGREES>(block.weights, s, r);
    RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
      T* place = g_x.row(e + i) + block.c;
      Pack<T> sum = load(place);
      RUNG_UNROLL for (int l = 0; l < DEGREES; l++) sum += r[i][l] * load(q + (i * DEGREES + l) * WIDTH<T>);
      store(place, sum);
    }
  }
  if (VECTORS && g_w) {
    Pack<T> r[EDGES][DEGREES + 1];
    radial_sums<T, EDGES, DEGREES + 1>(block.weights + AXIAL * COLUMN<T>, s, r);
    RUNG_UNROLL for (int i = 0; i < EDGES; i++) {
      Pack<T> gu = {};
      RUNG_UNROLL for (int l = 0; l < DEGREES; l++) gu += r[i][l] * load(q + (i * DEGREES + l) * WIDTH<T>);
      RUNG_UNROLL for (int k = 0; k < 3; k++) {
        T* place = g_w.row(e + i) + k * block.graph.C + block.c;
        const Pack<T> B_k = load(B_row + (1 + k) * block.graph.C + block.c);
        store(place, load(place) + gu * block.Y(e + i)[1 + k] + r[i][DEGREES] * B_k);
      }
    }
  }
}

// Sums the gradients of the columns from FIRST on over a chunk's edges, as many columns at a time as registers allow.
template <class T, bool SECOND, int ALL, int FIRST = 0>
RUNG_INLINE void chunk_weights(int64_t edges, const T* s, const T* ts, int64_t ts_stride, const T* d, const T* dt, T* g_w) {
  constexpr int LEFT = ALL - FIRST, COUNT = LEFT == 4 ? 2 : LEFT < 3 ? LEFT : 3;
  constexpr int MOST = REGISTERS == 32 ? 24 : 12;  // sums
  constexpr int PARTS = (COUNT * R + MOST - 1) / MOST, SCALARS = (R + PARTS - 1) / PARTS;
  T* place = g_w + FIRST * COLUMN<T>;
  const int64_t at = FIRST * WIDTH<T>, stride = ALL * WIDTH<T>;
  for (int n = 0; n + SCALARS <= R; n += SCALARS)
    weight_sums<T, SECOND, COUNT, SCALARS>(edges, s + n, ts + n, ts_stride, d + at, dt + at, stride, place + n * WIDTH<T>);
  if constexpr (R % SCALARS > 0) {
    constexpr int n = R - R % SCALARS;
    weight_sums<T, SECOND, COUNT, R % SCALARS>(edges, s + n, ts + n, ts_stride, d + at, dt + at, stride, place + n * WIDTH<T>);
  }
  if constexpr (LEFT > COUNT) chunk_weights<T, SECOND, ALL, FIRST + COUNT>(edges, s, ts, ts_stride, d, dt, g_w);
}

template <class T, bool VECTORS>
void nodes_part(const Graph& graph, const Inputs<T>& in, const T* weights, int64_t begin, int64_t end, const T* gA,
                typename SenderSums<T>::Part g_x, typename SenderSums<T>::Part g_w,
                typename WeightSums<T, VECTORS>::Part g_weights) {
  const Scratch<T> scratch(graph, begin, end, COLUMNS<VECTORS>, VECTORS, false);
  for (int64_t first = begin; first < end;) {
    const Chunk chunk(graph, first, end);
    const int64_t num_edges = graph.row_ptr[chunk.last] - chunk.edge;
    for (int64_t c = 0; c < graph.C; c += WIDTH<T>) {
      const Block<T> block = {graph, in, weights + c * COLUMNS<VECTORS> * R, c};
      for (int64_t receiver = chunk.first; receiver < chunk.last; receiver++) {
        const T* B = gA + receiver * L * graph.C;
        if (receiver + NEXT < end) prefetch_harmonics(B + NEXT * L * graph.C + c, graph.C);
        const int64_t row = graph.row_ptr[receiver], row_end = graph.row_ptr[receiver + 1];
        project_row<T, VECTORS>(block, B, row, row_end, scratch.q.get(),
                                scratch.d.get() + (row - chunk.edge) * scratch.columns);
        if (!g_x && !g_w) continue;
        int64_t e = row;
        const T* q = scratch.q.get();
        for (; e + PAIR <= row_end; e += PAIR, q += PAIR * DEGREES * WIDTH<T>)
          node_gradients<T, VECTORS, PAIR>(block, B, e, q, g_x, g_w);
        if (e < row_end) node_gradients<T, VECTORS, 1>(block, B, e, q, g_x, g_w);
      }
      if (g_weights)
        chunk_weights<T, false, COLUMNS<VECTORS>>(num_edges, block.s(chunk.edge), (const T*)nullptr, 0, scratch.d.get(),
                                                  (const T*)nullptr, g_weights.sums + c * COLUMNS<VECTORS> * R);
    }
    if (g_weights) g_weights.count(num_edges);
    first = chunk.last;
  }
  if (g_weights) g_weights.flush();
}

template <class T, bool VECTORS>
void backward(const Graph& graph, const Inputs<T>& in, const T* gA, const Arrays<T*>& out) {
  const Buffer<T> weights = pack_weights<T, VECTORS>(graph.C, in);
  SenderSums<T> x_sums(graph, graph.C, out.x), w_sums(graph, 3 * graph.C, out.w);
  WeightSums<T, VECTORS> weight_sums(graph, out.weights);
  for_parts(graph, [&](int part, int64_t begin, int64_t end) {
    auto g_x = x_sums.start(part, begin, end), g_w = w_sums.start(part, begin, end);
    const auto g_weights = weight_sums.start(part);
    if (out.radial) {
      basis_part<T, VECTORS>(graph, in, weights.get(), begin, end, gA, g_x, g_w, out.radial, out.harmonics);
      g_x = g_w = {};
    }
    if (g_x || g_w || g_weights)
      nodes_part<T, VECTORS>(graph, in, weights.get(), begin, end, gA, g_x, g_w, g_weights);
  });
  x_sums.finish();
  w_sums.finish();
  weight_sums.finish(graph.C, out.weights, out.axial, out.identity);
}

// ---- gradients of the derivative along cotangents ---------------------------------------------------------------------

// The cotangents as a block sees them.
template <class T> struct TangentBlock {
  const Graph& graph;
  const Cotangents<T>& t;
  int64_t c;

  RUNG_INLINE Pack<T> x(int64_t e) const { return load(t.x + graph.senders[e] * t.x_stride + c); }
  RUNG_INLINE Vector<T> w(int64_t e) const { return {t.w + graph.senders[e] * t.w_stride + c, t.w_stride ? graph.C : 0}; }
  RUNG_INLINE const T* s(int64_t e) const { return t.radial + e * t.radial_stride; }
  RUNG_INLINE const T* Y(int64_t e) const { return t.harmonics + e * t.harmonics_stride; }

  template <bool VECTORS> RUNG_INLINE void prefetch(int64_t e) const {
    const int64_t sender = graph.senders[e];
    __builtin_prefetch(t.x + sender * t.x_stride + c);
    if (VECTORS)
      for (int k = 0; k < 3; k++) __builtin_prefetch(t.w + sender * t.w_stride + k * graph.C + c);
  }
};

// q, qt, d, dt and with vectors u, ut of a receiver's edges.
template <class T, bool VECTORS>
RUNG_INLINE void project_row2(const Block<T>& block, const TangentBlock<T>& t, const T* B_row, int64_t begin, int64_t end,
                              const Scratch<T>& scratch, T* d_rows, T* dt_rows) {
  Pack<T> B_m[L];
  RUNG_UNROLL for (int m = 0; m < L; m++) B_m[m] = load(B_row + m * block.graph.C + block.c);
  const auto B = [&](int m) { return B_m[m]; };
  const int64_t last_edge = block.graph.row_ptr[block.graph.N] - 1;
  for (int64_t e = begin; e < end; e++, d_rows += COLUMNS<VECTORS> * WIDTH<T>, dt_rows += COLUMNS<VECTORS> * WIDTH<T>) {
    const int64_t ahead = std::min(e + AHEAD, last_edge), row = (e - begin) * DEGREES * WIDTH<T>;
    block.template prefetch<VECTORS>(ahead);
    t.template prefetch<VECTORS>(ahead);
    const Pack<T> x = block.x(e), tx = t.x(e);
    Pack<T> u, ut;
    if constexpr (VECTORS) {
      const Vector<T> w = block.w(e), tw = t.w(e);
      u = along(w, block.Y(e)), ut = along(w, t.Y(e)) + along(tw, block.Y(e));
      store(scratch.u.get() + (e - begin) * WIDTH<T>, u);
      store(scratch.ut.get() + (e - begin) * WIDTH<T>, ut);
      store(d_rows + IDENTITY * WIDTH<T>, product(tw, B));
      store(dt_rows + IDENTITY * WIDTH<T>, product(w, B));
    }
    RUNG_UNROLL for (int l = 0; l < DEGREES; l++) {
      const Pack<T> q = project<T>(l, block.Y(e), B), qt = project<T>(l, t.Y(e), B);
      store(scratch.q.get() + row + l * WIDTH<T>, q);
      store(scratch.qt.get() + row + l * WIDTH<T>, qt);
      store(d_rows + l * WIDTH<T>, q * tx + qt * x);
      store(dt_rows + l * WIDTH<T>, q * x);
      if (VECTORS) store(d_rows + (AXIAL + l) * WIDTH<T>, q * ut + qt * u);
      if (VECTORS) store(dt_rows + (AXIAL + l) * WIDTH<T>, q * u);
    }
  }
}

// Adds an edge's part to the gradients of B (to A), x and w; `row` is its place in q, qt, u and ut.
template <class T, bool VECTORS>
RUNG_INLINE void second_gradients(const Block<T>& block, const TangentBlock<T>& t, const T* B_row, int64_t e, int64_t row,
                                  const Scratch<T>& scratch, typename SenderSums<T>::Part g_x,
                                  typename SenderSums<T>::Part g_w, Pack<T>* A) {
  const T *const s[2] = {block.s(e), t.s(e)}, *Y = block.Y(e), *tY = t.Y(e);
  const T *q = scratch.q.get() + row * DEGREES * WIDTH<T>, *qt = scratch.qt.get() + row * DEGREES * WIDTH<T>;
  Pack<T> P[2][DEGREES];  // P and Pt, at first r and rt
  radial_sums<T, 2, DEGREES>(block.weights, s, P);
  if (g_x) {
    T* place = g_x.row(e) + block.c;
    Pack<T> sum[2] = {load(place), {}};
    RUNG_UNROLL for (int l = 0; l < DEGREES; l++) {
      sum[0] += P[1][l] * load(q + l * WIDTH<T>);
      sum[1] += P[0][l] * load(qt + l * WIDTH<T>);
    }
    store(place, sum[0] + sum[1]);
  }
  const Pack<T> x = block.x(e), tx = t.x(e);
  RUNG_UNROLL for (int l = 0; l < DEGREES; l++) {
    P[1][l] = P[1][l] * x + P[0][l] * tx;
    P[0][l] *= x;
  }
  if constexpr (VECTORS) {
    Pack<T> r[2][DEGREES + 1];
    radial_sums<T, 2, DEGREES + 1>(block.weights + AXIAL * COLUMN<T>, s, r);
    const Vector<T> w = block.w(e), tw = t.w(e);
    if (g_w) {
      Pack<T> gu = {}, gut = {};
      RUNG_UNROLL for (int l = 0; l < DEGREES; l++) {
        gu += r[1][l] * load(q + l * WIDTH<T>) + r[0][l] * load(qt + l * WIDTH<T>);
        gut += r[0][l] * load(q + l * WIDTH<T>);
      }
      RUNG_UNROLL for (int k = 0; k < 3; k++) {
        T* place = g_w.row(e) + k * block.graph.C + block.c;
        const Pack<T> B_k = load(B_row + (1 + k) * block.graph.C + block.c);
        store(place, load(place) + gu * Y[1 + k] + gut * tY[1 + k] + r[1][DEGREES] * B_k);
      }
    }
    const Pack<T> u = load(scratch.u.get() + row * WIDTH<T>), ut = load(scratch.ut.get() + row * WIDTH<T>);
    RUNG_UNROLL for (int l = 0; l < DEGREES; l++) {
      P[1][l] += r[1][l] * u + r[0][l] * ut;
      P[0][l] += r[0][l] * u;
    }
    RUNG_UNROLL for (int k = 0; k < 3; k++) A[1 + k] += r[1][DEGREES] * w[k] + r[0][DEGREES] * tw[k];
  }
  spread<T>(P[1], Y, A);
  spread<T>(P[0], tY, A);
}

template <class T, bool VECTORS>
void nodes2_part(const Graph& graph, const Inputs<T>& in, const Cotangents<T>& t, const T* weights, int64_t begin, int64_t end,
                 const T* gA, T* d_gA, typename SenderSums<T>::Part g_x, typename SenderSums<T>::Part g_w,
                 typename WeightSums<T, VECTORS>::Part g_weights) {
  const Scratch<T> scratch(graph, begin, end, COLUMNS<VECTORS>, VECTORS, true);
  for (int64_t first = begin; first < end;) {
    const Chunk chunk(graph, first, end);
    const int64_t num_edges = graph.row_ptr[chunk.last] - chunk.edge;
    for (int64_t c = 0; c < graph.C; c += WIDTH<T>) {
      const Block<T> block = {graph, in, weights + c * COLUMNS<VECTORS> * R, c};
      const TangentBlock<T> tangent = {graph, t, c};
      for (int64_t receiver = chunk.first; receiver < chunk.last; receiver++) {
        const T* B = gA + receiver * L * graph.C;
        if (receiver + NEXT < end) prefetch_harmonics(B + NEXT * L * graph.C + c, graph.C);
        const int64_t row = graph.row_ptr[receiver], row_end = graph.row_ptr[receiver + 1];
        const int64_t at = (row - chunk.edge) * scratch.columns;
        project_row2<T, VECTORS>(block, tangent, B, row, row_end, scratch, scratch.d.get() + at, scratch.dt.get() + at);
        if (!d_gA && !g_x && !g_w) continue;
        Pack<T> sum[L] = {};
        for (int64_t e = row; e < row_end; e++)
          second_gradients<T, VECTORS>(block, tangent, B, e, e - row, scratch, g_x, g_w, sum);
        if (d_gA) RUNG_UNROLL for (int m = 0; m < L; m++) store(d_gA + (receiver * L + m) * graph.C + c, sum[m]);
      }
      if (g_weights)
        chunk_weights<T, true, COLUMNS<VECTORS>>(num_edges, block.s(chunk.edge), tangent.s(chunk.edge), t.radial_stride,
                                                 scratch.d.get(), scratch.dt.get(),
                                                 g_weights.sums + c * COLUMNS<VECTORS> * R);
    }
    if (g_weights) g_weights.count(num_edges);
    first = chunk.last;
  }
  if (g_weights) g_weights.flush();
}

// The gradients of the edge basis of one edge; no training of energies and forces asks for them.
template <class T, bool VECTORS>
void basis2_edge(const Graph& graph, const Inputs<T>& in, const Cotangents<T>& t, const T* weights, const T* B_row, int64_t e,
                 T* kept, T* d_radial, T* d_harmonics) {
  Pack<T> g_s[1][R] = {}, g_Y[1][L], gut_w[3] = {};
  T* place = kept;
  for (int64_t c = 0; c < graph.C; c += WIDTH<T>, place += KEPT * WIDTH<T>) {
    const Block<T> block = {graph, in, weights + c * COLUMNS<VECTORS> * R, c};
    const TangentBlock<T> tangent = {graph, t, c};
    const auto B = [&](int m) { return load(B_row + m * graph.C + c); };
    const T *const s[1] = {block.s(e)}, *const ts[1] = {tangent.s(e)}, *Y = block.Y(e), *tY = tangent.Y(e);
    const auto column = [&](int k, Pack<T> d, Pack<T>& r, Pack<T>& rt) {
      Pack<T> sum[1][1];
      radial_gradients<T, 1>(block.weights + k * COLUMN<T>, s, &d, &r, g_s);
      radial_sums<T, 1, 1>(block.weights + k * COLUMN<T>, ts, sum);
      rt = sum[0][0];
    };
    const Pack<T> x = block.x(e), tx = tangent.x(e);
    Pack<T> u = {}, ut = {}, gu = {}, gut = {}, r, rt;
    const Vector<T> w = block.w(e), tw = tangent.w(e);
    if constexpr (VECTORS) u = along(w, Y), ut = along(w, tY) + along(tw, Y);
    for (int l = 0; l < DEGREES; l++) {
      const Pack<T> q = project<T>(l, Y, B), qt = project<T>(l, tY, B);
      column(l, q * tx + qt * x, r, rt);
      Pack<T> Pt = rt * x + r * tx;
      if constexpr (VECTORS) {
        column(AXIAL + l, q * ut + qt * u, r, rt);
        Pt += rt * u + r * ut;
        gu += rt * q + r * qt;
        gut += r * q;
      }
      store(place + l * WIDTH<T>, Pt);
    }
    store(place + DEGREES * WIDTH<T>, gu);
    if constexpr (VECTORS) {
      column(IDENTITY, product(tw, B), r, rt);
      for (int k = 0; k < 3; k++) gut_w[k] += gut * tw[k];
    }
  }
  lane_sums<R>(g_s[0], d_radial + e * R);
  harmonic_gradients<T, VECTORS, 1, 0, DEGREES>(graph, in, B_row, e, kept, g_Y);
  for (int k = 0; k < 3; k++) g_Y[0][1 + k] += gut_w[k];
  lane_sums<L>(g_Y[0], d_harmonics + e * L);
}

template <class T, bool VECTORS>
void backward2(const Graph& graph, const Inputs<T>& in, const T* gA, const T* t_radial, const T* t_harmonics, const T* t_x,
               const T* t_w, T* d_gA, const Arrays<T*>& out) {
  const Buffer<T> weights = pack_weights<T, VECTORS>(graph.C, in);
  const int64_t num_zeros = std::max<int64_t>({R, L, graph.C});
  const Buffer<T> zeros(num_zeros);
  std::fill_n(zeros.get(), num_zeros, T(0));
  const Cotangents<T> t(zeros.get(), graph.C, t_radial, t_harmonics, t_x, t_w);
  SenderSums<T> x_sums(graph, graph.C, out.x), w_sums(graph, 3 * graph.C, out.w);
  WeightSums<T, VECTORS> weight_sums(graph, out.weights);
  for_parts(graph, [&](int part, int64_t begin, int64_t end) {
    const auto g_x = x_sums.start(part, begin, end), g_w = w_sums.start(part, begin, end);
    const auto g_weights = weight_sums.start(part);
    if (d_gA || g_x || g_w || g_weights)
      nodes2_part<T, VECTORS>(graph, in, t, weights.get(), begin, end, gA, d_gA, g_x, g_w, g_weights);
    if (!out.radial) return;
    const Buffer<T> kept(graph.C * KEPT);
    for (int64_t receiver = begin; receiver < end; receiver++)
      for (int64_t e = graph.row_ptr[receiver]; e < graph.row_ptr[receiver + 1]; e++)
        basis2_edge<T, VECTORS>(graph, in, t, weights.get(), gA + receiver * L * graph.C, e, kept.get(), out.radial,
                                out.harmonics);
  });
  x_sums.finish();
  w_sums.finish();
  weight_sums.finish(graph.C, out.weights, out.axial, out.identity);
}

}  // namespace
}  // namespace rung

#define RUNG_INPUTS(T)                                                                                                   \
  const T *radial, const T *harmonics, const T *x, const T *weights, const T *w, const T *axial, const T *identity

#define RUNG_FUNCTIONS(T, suffix)                                                                                        \
  void rung_convolve_##suffix(int64_t N, int64_t C, int threads, const int32_t* row_ptr, const int32_t* senders,         \
                              RUNG_INPUTS(T), T* A) {                                                                    \
    const rung::Graph graph = {N, C, threads, row_ptr, senders, nullptr};                                                \
    const rung::Inputs<T> in = {radial, harmonics, x, weights, w, axial, identity};                                      \
    w ? rung::forward<T, true>(graph, in, A) : rung::forward<T, false>(graph, in, A);                                    \
  }                                                                                                                      \
  void rung_convolve_backward_##suffix(int64_t N, int64_t C, int threads, const int32_t* row_ptr,                        \
                                       const int32_t* senders, const int32_t* reverse, const T* gA, RUNG_INPUTS(T),      \
                                       T* g_radial, T* g_harmonics, T* g_x, T* g_weights, T* g_w, T* g_axial,            \
                                       T* g_identity) {                                                                  \
    const rung::Graph graph = {N, C, threads, row_ptr, senders, reverse};                                                \
    const rung::Inputs<T> in = {radial, harmonics, x, weights, w, axial, identity};                                      \
    const rung::Arrays<T*> out = {g_radial, g_harmonics, g_x, g_weights, g_w, g_axial, g_identity};                      \
    w ? rung::backward<T, true>(graph, in, gA, out) : rung::backward<T, false>(graph, in, gA, out);                      \
  }                                                                                                                      \
  void rung_convolve_backward2_##suffix(                                                                                 \
      int64_t N, int64_t C, int threads, const int32_t* row_ptr, const int32_t* senders, const int32_t* reverse,         \
      const T* gA, RUNG_INPUTS(T), const T* t_radial, const T* t_harmonics, const T* t_x, const T* t_w, T* d_gA,         \
      T* d_radial, T* d_harmonics, T* d_x, T* d_weights, T* d_w, T* d_axial, T* d_identity) {                            \
    const rung::Graph graph = {N, C, threads, row_ptr, senders, reverse};                                                \
    const rung::Inputs<T> in = {radial, harmonics, x, weights, w, axial, identity};                                      \
    const rung::Arrays<T*> out = {d_radial, d_harmonics, d_x, d_weights, d_w, d_axial, d_identity};                      \
    w ? rung::backward2<T, true>(graph, in, gA, t_radial, t_harmonics, t_x, t_w, d_gA, out)                              \
      : rung::backward2<T, false>(graph, in, gA, t_radial, t_harmonics, t_x, t_w, d_gA, out);                            \
  }

extern "C" {
RUNG_FUNCTIONS(float, f32)
RUNG_FUNCTIONS(double, f64)
}
