// The matrix product inside the kernels: a block of rows times a panel of columns.
#pragma once

#include "simd.h"

namespace deformnet::DEFORMNET_ISA {

// Columns of a panel: B is packed panel by panel, kPanel<A> columns wide, row after row.
template <class A>
constexpr int kPanel = kTileVectors * kLanes<A>;

// The left factor A[row, s, k]: `segments` runs of `depth` numbers along the summed dimension.
template <class A>
struct LeftFactor {
  const A* data;
  ptrdiff_t row_stride;
  ptrdiff_t k_stride;
  ptrdiff_t segment_stride;
  int64_t segments, depth;
};

// C[rows, n_valid] (+)= A * panel, rows <= kTileRows. The sum over k of one element has the same order
// whatever the number of rows, so results do not depend on how rows are split into blocks or threads.
template <class A, int rows, bool k_contiguous>
inline void multiply_block(const LeftFactor<A>& left, const A* panel, A* c, ptrdiff_t c_stride,
                           int n_valid, bool accumulate) {
  constexpr int lanes = kLanes<A>;
  Vec<A> total[rows][kTileVectors];
  A partial[kPanel<A>] = {};
  const bool full = n_valid == kPanel<A>;
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    const A* from = c + r * c_stride;
    if (accumulate && !full) {
      for (int j = 0; j < n_valid; ++j) partial[j] = from[j];
      from = partial;
    }
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v)
      total[r][v] = accumulate ? load(from + v * lanes) : Vec<A>{};
  }
  const ptrdiff_t row_stride = k_contiguous ? left.row_stride : 1;
  const ptrdiff_t k_stride = k_contiguous ? 1 : left.k_stride;
  for (int64_t s = 0; s < left.segments; ++s) {
    const A* a = left.data + s * left.segment_stride;
    for (int64_t k = 0; k < left.depth; ++k, a += k_stride, panel += kPanel<A>) {
      Vec<A> b[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) b[v] = load(panel + v * lanes);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const Vec<A> x = a[r * row_stride] - Vec<A>{};
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) total[r][v] += x * b[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    A* to = full ? c + r * c_stride : partial;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) store(to + v * lanes, total[r][v]);
    if (!full)
      for (int j = 0; j < n_valid; ++j) c[r * c_stride + j] = partial[j];
  }
}

template <class A, bool k_contiguous, int rows = kTileRows>
inline void multiply_few(int wanted, const LeftFactor<A>& left, const A* panel, A* c,
                         ptrdiff_t c_stride, int n_valid, bool accumulate) {
  if (wanted == rows) {
    multiply_block<A, rows, k_contiguous>(left, panel, c, c_stride, n_valid, accumulate);
  } else if constexpr (rows > 1) {
    multiply_few<A, k_contiguous, rows - 1>(wanted, left, panel, c, c_stride, n_valid, accumulate);
  }
}

// The same for any number of rows, split into blocks of nearly equal height.
template <class A, bool k_contiguous>
inline void multiply(int64_t rows, LeftFactor<A> left, const A* panel, A* c, ptrdiff_t c_stride,
                     int n_valid, bool accumulate) {
  int64_t blocks = (rows + kTileRows - 1) / kTileRows;
  const ptrdiff_t row_stride = k_contiguous ? left.row_stride : 1;
  for (; blocks > 0; --blocks) {
    const int64_t height = (rows + blocks - 1) / blocks;
    multiply_few<A, k_contiguous>(int(height), left, panel, c, c_stride, n_valid, accumulate);
    left.data += height * row_stride;
    c += height * c_stride;
    rows -= height;
  }
}

}  // namespace deformnet::DEFORMNET_ISA
