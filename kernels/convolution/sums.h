// Sums that several threads make together: their order is fixed by the number of parts that the receivers are divided
// into.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "edge.h"

namespace rung {

// Uninitialised numbers, aligned to cache lines.
template <class T> class Buffer {
 public:
  explicit Buffer(int64_t size = 0) { resize(size); }
  ~Buffer() { std::free(data_); }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void resize(int64_t size) {
    std::free(std::exchange(data_, nullptr));
    if (size > 0 && posix_memalign((void**)&data_, 64, size * sizeof(T))) std::abort();
  }
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
};

struct Graph {
  int64_t N, C;
  int parts;
  const int32_t *row_ptr, *senders, *reverse;

  // The first receiver of a part: parts have about equal numbers of edges and receivers together.
  int64_t part_begin(int part) const {
    const int64_t target = (row_ptr[N] + N) * part / parts;
    int64_t low = 0, high = N;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (row_ptr[middle] + middle < target) low = middle + 1;
      else high = middle;
    }
    return low;
  }
};

template <class F> void for_parts(const Graph& graph, F&& work) {
#pragma omp parallel for num_threads(graph.parts) schedule(static, 1)
  for (int part = 0; part < graph.parts; part++) work(part, graph.part_begin(part), graph.part_begin(part + 1));
}

// Sums over a sender's edges of rows of `width` numbers. Each part adds to rows of its own for the range of senders
// that it meets; where that takes more memory than a row for each edge, it fills in those, to be added through
// `reverse`.
template <class T> class SenderSums {
 public:
  SenderSums(const Graph& graph, int64_t width, T* out) : graph_(graph), width_(width), out_(out) {
    if (!out || graph.parts == 1) return;
    ranges_.resize(graph.parts);
    for_parts(graph, [&](int part, int64_t begin, int64_t end) { find_range(ranges_[part], begin, end); });
    int64_t rows = 0;
    for (Range& range : ranges_) {
      range.start = rows;
      rows += range.high - range.low;
    }
    by_edge_ = rows > graph.row_ptr[graph.N];
    buffer_.resize((by_edge_ ? int64_t(graph.row_ptr[graph.N]) : rows) * width);
  }

  // Where a part adds: a sender's row, or an edge's, begins at `base` plus its number times `width`.
  struct Part {
    T* base;
    bool by_edge;

    explicit operator bool() const { return base; }
  };

  Part start(int part, int64_t begin, int64_t end) {
    if (!out_) return {};
    const int32_t* row_ptr = graph_.row_ptr;
    T* first = out_;
    int64_t rows = graph_.N, offset = 0;
    if (by_edge_) {
      first = buffer_.get() + row_ptr[begin] * width_;
      rows = row_ptr[end] - row_ptr[begin];
      offset = row_ptr[begin];
    } else if (!ranges_.empty()) {
      const Range& range = ranges_[part];
      first = buffer_.get() + range.start * width_;
      rows = range.high - range.low;
      offset = range.low;
    }
    if (rows) std::memset(first, 0, rows * width_ * sizeof(T));
    return {(T*)((uintptr_t)first - offset * width_ * sizeof(T)), by_edge_};
  }

  // Write the sums, when all parts are done.
  void finish() {
    if (!out_ || graph_.parts == 1) return;
#pragma omp parallel for num_threads(graph_.parts) schedule(static)
    for (int64_t atom = 0; atom < graph_.N; atom++) {
      T* sum = out_ + atom * width_;
      std::fill_n(sum, width_, T(0));
      if (by_edge_) {
        for (int64_t e = graph_.row_ptr[atom]; e < graph_.row_ptr[atom + 1]; e++)
          add(sum, buffer_.get() + graph_.reverse[e] * width_);
      } else {
        for (const Range& range : ranges_)
          if (range.low <= atom && atom < range.high)
            add(sum, buffer_.get() + (range.start + atom - range.low) * width_);
      }
    }
  }

 private:
  struct Range {
    int64_t low = 0, high = 0, start = 0;
  };

  void find_range(Range& range, int64_t begin, int64_t end) const {
    const int32_t *first = graph_.senders + graph_.row_ptr[begin], *last = graph_.senders + graph_.row_ptr[end];
    if (first == last) return;
    const auto [low, high] = std::minmax_element(first, last);
    range.low = *low, range.high = *high + 1;
  }
  void add(T* sum, const T* row) const {
    for (int64_t c = 0; c < width_; c++) sum[c] += row[c];
  }

  const Graph& graph_;
  int64_t width_;
  T* out_;
  bool by_edge_ = false;
  std::vector<Range> ranges_;
  Buffer<T> buffer_;
};

// The gradients of the weights: each part sums in T over a limited number of edges, and these sums in double.
template <class T, bool VECTORS> class WeightSums {
 public:
  WeightSums(const Graph& graph, bool wanted)
      : size_(wanted ? graph.C * COLUMNS<VECTORS> * R : 0), parts_(graph.parts) {
    sums_.resize(size_ * parts_);
    totals_.resize(size_ * parts_);
  }

  struct Part {
    T* sums;  // [C / WIDTH, COLUMNS, R, WIDTH]
    double* totals;
    int64_t size, edges;

    explicit operator bool() const { return sums; }

    void count(int64_t more) {
      edges += more;
      if (edges >= 512) flush();  // sequential sums of more would have errors far above the rounding of one
    }
    void flush() {
      for (int64_t k = 0; k < size; k++) totals[k] += sums[k], sums[k] = 0;
      edges = 0;
    }
  };

  Part start(int part) {
    if (!size_) return {};
    std::fill_n(sums_.get() + part * size_, size_, T(0));
    std::fill_n(totals_.get() + part * size_, size_, 0.0);
    return {sums_.get() + part * size_, totals_.get() + part * size_, size_, 0};
  }

  void finish(int64_t C, T* weights, T* axial, T* identity) const {
    if (!size_) return;
#pragma omp parallel for num_threads(parts_) schedule(static)
    for (int64_t c = 0; c < C; c++)
      for (int k = 0; k < COLUMNS<VECTORS>; k++)
        for (int n = 0; n < R; n++) {
          const int64_t place = ((c / WIDTH<T> * COLUMNS<VECTORS> + k) * R + n) * WIDTH<T> + c % WIDTH<T>;
          double sum = 0;
          for (int part = 0; part < parts_; part++) sum += totals_.get()[part * size_ + place];
          if (k < AXIAL) weights[(n * DEGREES + k) * C + c] = T(sum);
          else if (k < IDENTITY) axial[(n * DEGREES + k - AXIAL) * C + c] = T(sum * INV_SQRT3);
          else identity[n * C + c] = T(sum);
        }
  }

 private:
  int64_t size_;
  int parts_;
  Buffer<T> sums_;
  Buffer<double> totals_;
};

}  // namespace rung
