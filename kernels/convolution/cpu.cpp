// The convolution and its first and second derivatives on a CPU: reference.py is the definition, edge.h has the
// formulas. A thread has receivers of its own; it takes the passes of passes.h over a few of them at a time, and the
// pairs of edges of basis.h for the gradients of the edge basis.

#include "basis.h"

namespace rung {
namespace {

constexpr int64_t CHUNK = 96;  // fewest edges that are worth a pass
constexpr int BLOCKS = REGISTERS == 32 && R <= 8 ? 2 : 1;  // of channels in a pass that has registers for them

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

// Divides a part's receivers into chunks with at least CHUNK edges, and prepares what passes read about a chunk's
// edges.
template <class T, bool VECTORS> class Chunks {
 public:
  using Part = typename SenderSums<T>::Part;

  Chunks(const Graph& graph, int64_t begin, int64_t end, Part g_x = {}, Part g_w = {})
      : graph_(graph), end_(end), g_x_(g_x), g_w_(g_w) {
    int64_t most = 0;
    for (int64_t i = begin; i < end; i++) most = std::max<int64_t>(most, graph.row_ptr[i + 1] - graph.row_ptr[i]);
    const int64_t edges = most + CHUNK;
    from_.resize(edges + AHEAD), to_.resize(edges), zeros_.resize(edges);
    if (VECTORS) rows_.resize(8 * edges * WIDTH<T>);
    if (!g_x || !g_w) unwanted_.resize(3 * graph.C);
    T* row = rows_.get();
    for (T** place : {&rows.u, &rows.ut, &rows.gu, &rows.gut, &rows.q, &rows.qt, &rows.p, &rows.pt})
      *place = row, row += VECTORS ? edges * WIDTH<T> : 0;
    last = begin;
  }

  // Goes on to the next chunk; false when there is none.
  bool next() {
    first = last;
    if (first == end_) return false;
    const int64_t begin = graph_.row_ptr[first], num_edges = graph_.row_ptr[graph_.N];
    for (last = first + 1; last < end_ && graph_.row_ptr[last] - begin < CHUNK;) last++;
    edges = graph_.row_ptr[last] - begin;
    if (!edges) return true;
    for (int64_t k = 0; k < edges + AHEAD; k++)
      from_[k] = graph_.senders[std::min(begin + k, num_edges - 1)] * graph_.C;
    if (g_x_.by_edge || g_w_.by_edge)
      for (int64_t k = 0; k < edges; k++) to_[k] = (begin + k) * graph_.C;
    return true;
  }

  Pass<T, VECTORS> pass(const Inputs<T>& in, const Cotangents<T>& t, const T* weights, const T* gA, T* g_weights,
                        int64_t c) {
    const auto to = [&](const Part& g) { return !g ? zeros_.data() : g.by_edge ? to_.data() : from_.data(); };
    const int64_t block = c * COLUMNS<VECTORS> * R;
    return {graph_, in, t, first, last, from_.data(), (t.has_x ? from_ : zeros_).data(),
            (t.has_w ? from_ : zeros_).data(), to(g_x_), to(g_w_), rows, gA, g_x_ ? g_x_.base : unwanted_.get(),
            g_w_ ? g_w_.base : unwanted_.get(), g_weights ? g_weights + block : nullptr, weights + block, c};
  }

  int64_t first, last, edges;

 private:
  const Graph& graph_;
  int64_t end_;
  Part g_x_, g_w_;
  std::vector<int64_t> from_, to_, zeros_;
  Buffer<T> rows_, unwanted_;
  Rows<T> rows;
};

// f(degree) for all degrees; `degree` is a constant.
template <class F, int... l> RUNG_INLINE void for_degrees(std::integer_sequence<int, l...>, const F& f) {
  (f(std::integral_constant<int, l>{}), ...);
}
template <class F> RUNG_INLINE void for_degrees(const F& f) {
  for_degrees(std::make_integer_sequence<int, DEGREES>{}, f);
}

// ---- A ------------------------------------------------------------------------------------------------------------

template <int NUM, class T, bool VECTORS> void forward_block(const Pass<T, VECTORS>& pass, T* A) {
  if constexpr (VECTORS) forward_vectors(pass, A);
  for_degrees([&](auto l) { forward_degree<l, NUM>(pass, A); });
}

template <class T, bool VECTORS> void forward(const Graph& graph, const Inputs<T>& in, T* A) {
  constexpr int NUM = VECTORS ? 1 : BLOCKS;
  const Buffer<T> weights = pack_weights<T, VECTORS>(graph.C, in);
  const Cotangents<T> none;
  for_parts(graph, [&](int, int64_t begin, int64_t end) {
    for (Chunks<T, VECTORS> chunks(graph, begin, end); chunks.next();) {
      if (!chunks.edges) {
        std::fill(A + chunks.first * L * graph.C, A + chunks.last * L * graph.C, T(0));
        continue;
      }
      int64_t c = 0;
      for (; c + NUM * WIDTH<T> <= graph.C; c += NUM * WIDTH<T>)
        forward_block<NUM>(chunks.pass(in, none, weights.get(), nullptr, nullptr, c), A);
      if constexpr (NUM > 1)
        if (c < graph.C) forward_block<1>(chunks.pass(in, none, weights.get(), nullptr, nullptr, c), A);
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------

template <class T, bool VECTORS>
void basis_part(const Basis<T, VECTORS>& basis, int64_t begin, int64_t end, bool second) {
  const Graph& graph = basis.graph;
  const Buffer<T> harmonics(L * graph.C);
  for (int64_t receiver = begin; receiver < end; receiver++) {
    const T* gA = basis.gA + receiver * L * graph.C;
    T* B = harmonics.get();  // a receiver's gA as [C / WIDTH, L, WIDTH]
    for (int64_t c = 0, k = 0; c < graph.C; c += WIDTH<T>)
      for (int m = 0; m < L; m++, k += WIDTH<T>) store(B + k, load(gA + m * graph.C + c));
    const int64_t row = graph.row_ptr[receiver], row_end = graph.row_ptr[receiver + 1];
    int64_t e = row;
    if (second) {
      for (; e < row_end; e++) second_basis_edge(basis, B, e);
      continue;
    }
    // Each group of edges fetches a piece of the next receiver's harmonics.
    const T* ahead = gA + L * graph.C;
    const T* const ahead_end = ahead + (receiver + 1 < end ? L * graph.C : 0);
    const int64_t piece = L * graph.C * EDGES / std::max<int64_t>(row_end - row, 1) + 1;
    if (e == row_end) continue;
    Projection<T> first = {B, basis.in.harmonics + e * L, {}};
    first.template add_terms<0, L>();
    Pack<T>* q = first.q;
    for (; e + EDGES <= row_end; e += EDGES) {
      const T* const stop = std::min(ahead + piece, ahead_end);
      for (; ahead < stop; ahead += 64 / sizeof(T)) __builtin_prefetch(ahead);
      basis_edges<EDGES>(basis, B, e, row_end - 1, q);
    }
    if constexpr (EDGES > 1)
      if (e < row_end) basis_edges<1>(basis, B, e, row_end - 1, q);
  }
}

template <bool NODES, bool WEIGHTS, class T, bool VECTORS>
void gradient_block(const Pass<T, VECTORS>& pass, bool x, bool w) {
  if constexpr (VECTORS) project_vectors(pass);
  for_degrees([&](auto l) {
    x ? gradient_column<l, false, NODES, WEIGHTS>(pass) : gradient_column<l, false, false, WEIGHTS>(pass);
    if constexpr (VECTORS) gradient_column<l, true, NODES, WEIGHTS>(pass);
  });
  if constexpr (VECTORS) w ? gradient_identity<NODES, WEIGHTS>(pass) : gradient_identity<false, WEIGHTS>(pass);
}

template <class T, bool VECTORS>
void gradients_part(const Graph& graph, const Inputs<T>& in, const T* weights, const T* gA, int64_t begin, int64_t end,
                    typename SenderSums<T>::Part g_x, typename SenderSums<T>::Part g_w,
                    typename WeightSums<T, VECTORS>::Part g_weights) {
  const Cotangents<T> none;
  for (Chunks<T, VECTORS> chunks(graph, begin, end, g_x, g_w); chunks.next();) {
    if (!chunks.edges) continue;
    for (int64_t c = 0; c < graph.C; c += WIDTH<T>) {
      const auto pass = chunks.pass(in, none, weights, gA, g_weights.sums, c);
      if (!g_weights) gradient_block<true, false>(pass, bool(g_x), bool(g_w));
      else if (g_x || g_w) gradient_block<true, true>(pass, bool(g_x), bool(g_w));
      else gradient_block<false, true>(pass, false, false);
    }
    if (g_weights) g_weights.count(chunks.edges);
  }
  if (g_weights) g_weights.flush();
}

template <class T, bool VECTORS>
void backward(const Graph& graph, const Inputs<T>& in, const T* gA, const Arrays<T*>& out) {
  const Buffer<T> weights = pack_weights<T, VECTORS>(graph.C, in);
  const Cotangents<T> none;
  SenderSums<T> x_sums(graph, graph.C, out.x), w_sums(graph, 3 * graph.C, out.w);
  WeightSums<T, VECTORS> weight_sums(graph, out.weights);
  for_parts(graph, [&](int part, int64_t begin, int64_t end) {
    auto g_x = x_sums.start(part, begin, end), g_w = w_sums.start(part, begin, end);
    const auto g_weights = weight_sums.start(part);
    if (out.radial) {
      const Buffer<T> kept(graph.C * EDGES * KEPT);
      const Basis<T, VECTORS> basis = {graph,      in,           none, weights.get(), gA, kept.get(),
                                       out.radial, out.harmonics, g_x,  g_w};
      basis_part(basis, begin, end, false);
      g_x = g_w = {};
    }
    if (g_x || g_w || g_weights)
      gradients_part<T, VECTORS>(graph, in, weights.get(), gA, begin, end, g_x, g_w, g_weights);
  });
  x_sums.finish();
  w_sums.finish();
  weight_sums.finish(graph.C, out.weights, out.axial, out.identity);
}

// ---- backward of backward -----------------------------------------------------------------------------------------

template <class T, bool VECTORS> void second_block(const Pass<T, VECTORS>& pass, T* A) {
  if constexpr (VECTORS) project_vectors(pass);
  for_degrees([&](auto l) {
    second_column<l, false>(pass, A);
    if constexpr (VECTORS) second_column<l, true>(pass, A);
  });
  if constexpr (VECTORS) second_identity(pass, A);
}

template <class T, bool VECTORS>
void backward2(const Graph& graph, const Inputs<T>& in, const T* gA, Cotangents<T> t, T* d_gA, const Arrays<T*>& out) {
  const Buffer<T> weights = pack_weights<T, VECTORS>(graph.C, in);
  const Buffer<T> zeros = t.fill(3 * graph.C);
  const bool wanted = d_gA || out.x || out.w || out.weights;
  const Buffer<T> unwanted(wanted && !d_gA ? graph.N * L * graph.C : 0);
  if (!d_gA) d_gA = unwanted.get();
  SenderSums<T> x_sums(graph, graph.C, out.x), w_sums(graph, 3 * graph.C, out.w);
  WeightSums<T, VECTORS> weight_sums(graph, wanted);
  for_parts(graph, [&](int part, int64_t begin, int64_t end) {
    const auto g_x = x_sums.start(part, begin, end), g_w = w_sums.start(part, begin, end);
    auto g_weights = weight_sums.start(part);
    for (Chunks<T, VECTORS> chunks(graph, begin, end, g_x, g_w); wanted && chunks.next();) {
      if (!chunks.edges) {
        std::fill(d_gA + chunks.first * L * graph.C, d_gA + chunks.last * L * graph.C, T(0));
        continue;
      }
      for (int64_t c = 0; c < graph.C; c += WIDTH<T>)
        second_block(chunks.pass(in, t, weights.get(), gA, g_weights.sums, c), d_gA);
      g_weights.count(chunks.edges);
    }
    g_weights.flush();
    if (!out.radial) return;
    const Buffer<T> kept(graph.C * KEPT);
    const Basis<T, VECTORS> basis = {graph, in, t, weights.get(), gA, kept.get(), out.radial, out.harmonics, {}, {}};
    basis_part(basis, begin, end, true);
  });
  x_sums.finish();
  w_sums.finish();
  if (out.weights) weight_sums.finish(graph.C, out.weights, out.axial, out.identity);
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
    const rung::Cotangents<T> t = {t_radial, t_harmonics, t_x, t_w};                                                   \
    const rung::Arrays<T*> out = {d_radial, d_harmonics, d_x, d_weights, d_w, d_axial, d_identity};                    \
    axial ? rung::backward2<T, true>(graph, in, gA, t, d_gA, out)                                                      \
          : rung::backward2<T, false>(graph, in, gA, t, d_gA, out);                                                    \
  }

extern "C" {
RUNG_FUNCTIONS(float, f32)
RUNG_FUNCTIONS(double, f64)
}
